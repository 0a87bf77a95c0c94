//! The control plane: a small Raft group that decides who is primary and who is in sync. Block data never
//! goes through it.
//!
//! - [`state`], [`command`], [`apply`]: the replicated state machine, pure;
//! - [`lease`], [`failover`]: leases and who gets promoted, pure, time is passed in;
//! - [`codec`]: the one envelope of everything on disk and on the wire;
//! - `store`: votes, log and state in redb, on a thread of its own; `rpc`, `network`: messages and who may send
//!   them; `node`: a running node, seen from outside as [`Control`];
//! - [`recover_force`]: a new cluster of one node when there is no quorum left, offline.
//!
//! What is pure here also runs in the simulator; there is no second implementation. openraft's types and
//! redb's stay within this folder.

pub mod apply;
pub mod codec;
pub mod command;
mod environment;
mod error;
pub mod failover;
#[cfg(test)]
mod failover_tests;
#[cfg(test)]
mod fixture;
pub mod lease;
#[cfg(test)]
mod model;
mod network;
mod node;
mod raft;
mod random;
mod recover;
mod rpc;
mod runtime;
pub mod state;
mod store;

pub use apply::{apply, apply_under};
pub use command::{Applied, ClusterOp, Command, Leadership, Prepared, RequestId};
pub use environment::{Environment, Listener, Pending, RawFile, StoreDir, StoreFile, Stream, System};
pub use error::{CallError, ControlError, SubmitError};
pub use failover::{Decisions, Failover, NodeReport, Reports, VolumeReport};
pub use lease::{Grant, LeaseSnapshot, LeaseTable, LeaseView, NodeLease};
pub use node::{
    AdminHandler, Control, ControlOptions, Founder, LeaderView, boot_time, init, init_in, start, start_in,
};
pub use recover::{RECOVERED_EPOCH_STEP, RecoverReport, RecoveredVolume, recover_force, recover_force_in};
pub use rpc::ADMIN_BYTES_MAX;
pub use runtime::{Host, HostTask, enter};
pub use state::{
    Attachment, CLIENT_LEN_MAX, ClusterState, NodeAddrs, NodeKind, NodeRecord, RESYNC_WINDOW_MAX, StoreId,
    VolumeRecord,
};
pub use store::StoreWorker;
