//! # blkrepl-engine
//!
//! Everything of blkrepl that replicates; it knows no NBD. Modules and the direction in which
//! they may depend on each other (a module may use those to its right, never to its left):
//!
//! ```text
//! reactor -> replica -> meta -> wire -> types
//! control ------------------------------> types
//! ```
//!
//! `control` stands beside `replica`; they meet only in the plain data of [`types`]
//! ([`types::ConfigView`], [`types::Proposal`]). Any module may ask [`mutation`], which is constant in
//! production; `rising_map` is a container that they share; `durable` is what both drivers ask of a file system.
//! Built without the features `control` and
//! `reactor` the crate holds the sans-IO core alone: no clock, no socket, no file, no thread, no randomness.

// Rule tags such as [R7] are references to the design, not links.
#![allow(rustdoc::broken_intra_doc_links)]

pub mod meta;
pub mod mutation;
pub mod replica;
mod rising_map;
pub mod types;
pub mod wire;

#[cfg(feature = "control")]
pub mod control;
#[cfg(any(feature = "control", feature = "reactor"))]
pub mod durable;
#[cfg(feature = "reactor")]
pub mod reactor;
