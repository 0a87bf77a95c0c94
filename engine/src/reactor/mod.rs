//! The io_uring driver: runs the sans-IO core of one volume on a thread of its own.
//!
//! One ring carries everything that the volume does: its data object and metadata file, the sessions to
//! its peers, and its clients' connections. [`open`] or [`create`] the files, [`spawn`] the thread, and
//! hand configs, leases and connections to its [`VolumeHandle`].
//!
//! ```text
//! handle    the way in from other threads: mailbox and event descriptor
//! volume    the loop: wait, reap, feed the core, carry out its outputs, submit
//! fair      what one client may have while others want some, too
//! clients   client connections (their protocol is a ClientProtocol)     \
//! peers     sessions to the other replicas                                > staging, outgoing
//! disk      disk operations                                              /
//! ring      io_uring: every operation in the kernel and what it holds
//! alarm     timers that end the ring's waits
//! buffers   aligned, pooled, counted memory
//! open      making, locking and checking the files, before the thread starts
//! holes     where the data object has holes
//! ```
//!
//! Never does: deciding anything about replication, speaking NBD, blocking the volume's thread.

pub mod client;

mod alarm;
mod buffers;
mod clients;
mod core;
mod disk;
mod error;
mod fair;
mod handle;
mod holes;
mod open;
mod outgoing;
mod peers;
mod ring;
mod sessions;
mod staging;
mod volume;

#[cfg(test)]
mod tests;

pub use self::core::Core;
pub use client::{Answer, ClientFrame, ClientProtocol, ClientSession, End, FrontOp, FrontRequest};
pub use error::ReactorError;
pub use handle::{
    CONNECTIONS_WAITING_MAX, ClientGuard, ClientKey, CommandReply, ForceReply, NewClient, ReactorOptions,
    UNREAD_MAX, VolumeHandle, VolumeHooks, boottime_now, spawn,
};
pub use holes::makes_holes;
pub use open::{
    Expected, LOCK_WAIT_DEFAULT, OpenError, OpenVolume, Part, VolumeFiles, VolumePaths, create, open,
    remove_lone_metadata, superblock_of,
};
pub use ring::probe;
