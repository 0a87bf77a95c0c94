//! Errors of the control plane, by what the caller can do about them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

use crate::types::{ClusterId, Incarnation, NodeId};

use super::codec::CodecError;
use super::state::StoreId;

/// Why the control plane cannot be created, opened or started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// `init` where a store is, or was. Names the file that is there.
    #[error(
        "{0} exists: this node has a control store, or had one, and a store is created once and never over \
         another; start the node as it is, or if its store is lost, remove the node from the cluster and \
         create it under a new id in an empty directory"
    )]
    Exists(PathBuf),
    /// `open` where none is. It is never created silently, since a node that lost its votes must not vote
    /// again [R13].
    #[error(
        "{0} does not exist; on a new node create it with `blkrepl init --config FILE`; if this node lost its \
         disk, remove the node from the cluster and add it under a new id"
    )]
    Missing(PathBuf),
    /// Another process has it open.
    #[error("{0} is open in another process; stop that one first")]
    InUse(PathBuf),
    /// It belongs to another node.
    #[error("{path} belongs to {found}, this is {me}; check `id` in the node's config")]
    OtherNode {
        /// The store.
        path: PathBuf,
        /// Whose it is.
        found: NodeId,
        /// Who opens it.
        me: NodeId,
    },
    /// It is older than what this node has already run with [R13].
    #[error(
        "{path} was rolled back: it counts {store} starts, the file `boot` beside it {file}; it may have \
         forgotten votes and is refused; remove the node from the cluster and add it under a new id"
    )]
    RolledBack {
        /// The store.
        path: PathBuf,
        /// Starts by the store.
        store: u64,
        /// Starts by the boot file.
        file: u64,
    },
    /// The cluster knows a newer run of it [R13].
    #[error(
        "{path} was rolled back or copied: the cluster knows run {newest} of it, which it does not remember; it \
         may have forgotten votes and is refused; remove the node from the cluster and add it under a new id"
    )]
    Outdated {
        /// The store.
        path: PathBuf,
        /// The run that the cluster knows.
        newest: Incarnation,
    },
    /// Damaged or not a control store [R13].
    #[error(
        "{path} is damaged ({what}) and is refused; remove the node from the cluster and add it under a new id"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// I/O.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path or address.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The control plane's address cannot be used.
    #[error(
        "cannot listen on {addr}: {source}; if another process has the port, stop it (`ss -ltnp` shows it), \
         else change [listen] control in node.toml"
    )]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The options contradict themselves or the store.
    #[error("{0}")]
    Options(String),
    /// Raft did not start.
    #[error("Raft did not start: {0}; the log above says why, restart the node after it is repaired")]
    Raft(String),
}

impl ControlError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Why a request to the cluster did not take effect.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// It had no effect and never will have.
    #[error("{0}")]
    Refused(String),
    /// Nobody knows: no answer from a leader in time. It may still take effect.
    #[error(
        "no answer from a leader in time ({0}); look at `blkrepl status`, the request may still take effect"
    )]
    Unknown(String),
}

/// Why a call to another node failed. Nothing is known about its effect.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallError {
    /// Not connected and not going to try right now.
    #[error("{node} at {addr} is not reachable: {what}")]
    Unreachable {
        /// The node.
        node: NodeId,
        /// Its address.
        addr: String,
        /// The cause.
        what: String,
    },
    /// No answer in time.
    #[error("{0} did not answer in time")]
    Timeout(NodeId),
    /// The other side answered something that is not a valid message.
    #[error("{node}: {source}")]
    Codec {
        /// The node.
        node: NodeId,
        /// The cause.
        source: CodecError,
    },
    /// The other side refused the request.
    #[error("{node} refused: {reason}")]
    Refused {
        /// The node.
        node: NodeId,
        /// Its reason.
        reason: String,
    },
    /// The node that answered is not the one that membership knows [R13].
    #[error("{node} answered as store {found} of cluster {cluster:?}, expected was store {expected}; {what}")]
    Impostor {
        /// The node that was meant.
        node: NodeId,
        /// The store expected.
        expected: StoreId,
        /// The store that answered.
        found: StoreId,
        /// The cluster that answered.
        cluster: Option<ClusterId>,
        /// More.
        what: String,
    },
}
