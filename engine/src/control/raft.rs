//! The types that openraft is instantiated with. They stay within `control`.

use std::io::Cursor;

use serde::{Deserialize, Serialize};

use crate::types::NodeId;

use super::command::{Applied, Command, Leadership};
use super::runtime::Runtime;
use super::state::StoreId;

openraft::declare_raft_types!(
    /// Our instantiation of openraft.
    pub(super) TypeConfig:
        D = Command,
        R = Response,
        NodeId = u64,
        Node = RaftNode,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = Runtime,
);

/// A voter as the Raft membership knows it: its store, so that another one under the same id does not
/// vote in its place [R13], and where it was reached when it was added.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct RaftNode {
    pub(super) store: StoreId,
    pub(super) addr: String,
}

/// What applying one log entry gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Response {
    /// Not a command of ours.
    Nothing,
    /// The command's result.
    Applied(Applied),
    /// The command was judged under another leadership: no effect, may be tried again.
    Stale,
}

pub(super) type Raft = openraft::Raft<TypeConfig>;
pub(super) type Entry = openraft::Entry<TypeConfig>;
pub(super) type LogId = openraft::LogId<u64>;
pub(super) type Vote = openraft::Vote<u64>;
pub(super) type StoredMembership = openraft::StoredMembership<u64, RaftNode>;
pub(super) type SnapshotMeta = openraft::SnapshotMeta<u64, RaftNode>;
pub(super) type Snapshot = openraft::Snapshot<TypeConfig>;
pub(super) type StorageError = openraft::StorageError<u64>;

/// The leadership under which an entry was written.
pub(super) fn leadership_of(log_id: &LogId) -> Leadership {
    Leadership { term: log_id.leader_id.term, node: NodeId(log_id.leader_id.node_id) }
}
