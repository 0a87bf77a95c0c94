//! The one binary `blkrepl`: a node's daemon and every operator command.
//!
//! This library exists so that the parts can be tested; it is no API. What tools may rely on is the
//! command line, its JSON and cluster.json (docs/cli.md). The daemon (`serve`) wires the engine's parts
//! together and decides nothing about data by itself: who is primary is the control plane's to say, what
//! happens to a block the replication core's.

#![forbid(unsafe_code)]

pub mod admin;
pub mod bench;
pub mod cli;
pub mod cluster_json;
pub mod config;
pub mod demo;
pub mod dev;
pub mod events;
pub mod init;
pub mod map;
pub mod memory;
pub mod node_dir;
pub mod ops;
pub mod render;
pub mod run;
pub mod serve;
pub mod settings;
pub mod signals;
pub mod supervisor;
