//! The commands that change the cluster state, and their results. Plain data.
//!
//! Every command has a request id; a command that is retried under its id has no second effect. Every
//! command that changes a volume names the epoch it expects (compare-and-set).

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{
    ClusterId, Epoch, Geometry, Incarnation, LineageId, LogIndex, Member, NodeId, Proposal, VolumeId,
    VolumeSettings,
};

use super::state::{Attachment, NodeAddrs, NodeRecord};

/// Names one request for good: who asks, in which run, and a number that it never uses twice. Requests of
/// a replica (proposals) count by volume, apart from those of the node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId {
    /// The node that asks.
    pub node: NodeId,
    /// The run of its process.
    pub incarnation: Incarnation,
    /// The replica that asks, if it is one.
    pub volume: Option<VolumeId>,
    /// Counts within the above.
    pub number: u64,
}

impl RequestId {
    /// The id of a replica's proposal.
    #[must_use]
    pub fn of_proposal(proposal: &Proposal) -> Self {
        Self {
            node: proposal.by.node,
            incarnation: proposal.by.incarnation,
            volume: Some(proposal.volume),
            number: proposal.id.0,
        }
    }
}

/// A leadership: one win of one election. Unlike a Raft term alone it is unique, and still it fences
/// nothing but the leader's own proposals (data is fenced by reign).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Leadership {
    /// Raft term.
    pub term: u64,
    /// The leader.
    pub node: NodeId,
}

/// A request to change the cluster state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Its id.
    pub request: RequestId,
    /// Applies only if the entry was written under this leadership. Set by the leader for everything that
    /// it judged by its lease table: the judgement holds for that table alone [R1].
    pub only_under: Option<Leadership>,
    /// The change.
    pub op: ClusterOp,
}

/// Space and metadata that a member has ready for a larger volume [R25].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The member.
    pub member: Member,
    /// Bytes it is ready for.
    pub size: u64,
}

/// The changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterOp {
    /// The first command of a cluster.
    InitCluster {
        /// The new cluster.
        cluster: ClusterId,
        /// Length of leases.
        lease: Duration,
        /// The founders.
        nodes: Vec<NodeRecord>,
    },
    /// A node's process started. A newer run replaces the older one; nothing else does [R2, R10].
    Register {
        /// The node.
        node: NodeId,
        /// Its new run.
        incarnation: Incarnation,
        /// Hash of the operating system's boot id.
        os_boot: u128,
        /// Where it is reached from now on.
        addrs: NodeAddrs,
    },
    /// Admit a node. It votes as soon as the leader has changed the membership.
    AddNode(NodeRecord),
    /// Take a node out. It must hold no replica.
    RemoveNode {
        /// The node.
        node: NodeId,
    },
    /// Make a volume. It starts with one member.
    CreateVolume {
        /// Its id.
        id: VolumeId,
        /// Its name.
        name: String,
        /// Sizes.
        geometry: Geometry,
        /// Settings.
        settings: VolumeSettings,
        /// Nodes that hold a replica, `first` among them.
        replicas: Vec<NodeId>,
        /// The first member and primary.
        first: Member,
        /// The first lineage.
        lineage: LineageId,
    },
    /// Forget a volume. The data stays where it is.
    DeleteVolume {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
    },
    /// Add an empty replica; it is resynced.
    AddReplica {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// A data node.
        node: NodeId,
    },
    /// Take a replica out. It must not be in the in-sync set.
    RemoveReplica {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// The node that holds it.
        node: NodeId,
    },
    /// A primary's proposal [R9].
    Propose(Proposal),
    /// Give the primary role to a member whose named run is alive.
    Promote {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// The member.
        to: Member,
        /// An operator asks (else the failover controller).
        operator: bool,
    },
    /// Give the primary role to the new run of a member after every member restarted [R6].
    PromoteRestarted {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// The node with its newest run.
        to: Member,
        /// An operator asks (else the failover controller).
        operator: bool,
    },
    /// An operator's choice of a replica that need not be in sync. Starts a new lineage.
    ForcePromote {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// The node with its newest run.
        to: Member,
        /// The new lineage.
        lineage: LineageId,
        /// Last epoch of the old lineage that `to` holds.
        fork_epoch: Epoch,
    },
    /// Grow a volume.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// New size in bytes.
        size: u64,
        /// What each member is ready for [R25].
        prepared: Vec<Prepared>,
    },
    /// Change a volume's settings.
    ChangeSettings {
        /// The volume.
        volume: VolumeId,
        /// Compare-and-set.
        expected_epoch: Epoch,
        /// New settings.
        settings: VolumeSettings,
    },
    /// Attach a volume to a client host, as its primary asks before it lets that client in. Expects no epoch: who
    /// is primary and who is attached is what it compares, and no config changes.
    Attach {
        /// The volume.
        volume: VolumeId,
        /// The client host.
        client: String,
        /// The primary.
        by: Member,
    },
    /// End the attachment of a client host whose end the primary has seen. Expects no epoch, as [`Self::Attach`].
    Detach {
        /// The volume.
        volume: VolumeId,
        /// The attachment. One that the client has come back to since is another.
        attachment: Attachment,
        /// The primary.
        by: Member,
    },
    /// End the attachment of a client host, as an operator asks.
    Evict {
        /// The volume.
        volume: VolumeId,
        /// The client host.
        client: String,
    },
    /// Allow several client hosts at once, or one only.
    Share {
        /// The volume.
        volume: VolumeId,
        /// Several.
        shared: bool,
    },
    /// Change the length of leases.
    SetLease {
        /// New length.
        lease: Duration,
    },
}

impl ClusterOp {
    /// The volume whose primary this may change and the epoch it expects; `None` for everything else.
    /// Such a command is proposed only while the old primary's leases exclude the volume [R1].
    #[must_use]
    pub fn changes_primary(&self) -> Option<(VolumeId, Epoch)> {
        use crate::types::ProposalKind as K;
        match self {
            Self::Promote { volume, expected_epoch, .. }
            | Self::PromoteRestarted { volume, expected_epoch, .. }
            | Self::ForcePromote { volume, expected_epoch, .. } => Some((*volume, *expected_epoch)),
            Self::Propose(p) => match p.kind {
                K::Move(_) | K::Demote | K::HandOver(_) => Some((p.volume, p.expected_epoch)),
                K::Remove(_) | K::Join(_) | K::Bump => None,
            },
            _ => None,
        }
    }

    /// True if somebody other than the primary itself takes the role away: proposed only once the
    /// primary's lease is over [R1].
    #[must_use]
    pub fn needs_lease_over(&self) -> bool {
        matches!(self, Self::Promote { .. } | Self::PromoteRestarted { .. } | Self::ForcePromote { .. })
    }
}

/// What applying a command did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// It took effect (or had, under the same request id).
    Done {
        /// Log index at which it took effect.
        index: LogIndex,
        /// The volume's epoch after it, for commands about a volume that still exists.
        epoch: Option<Epoch>,
    },
    /// It had no effect and never will have under this request id. The text says why.
    Refused(String),
}

impl Applied {
    /// True if it took effect.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done { index, epoch: Some(epoch) } => write!(f, "done at index {index}, epoch {epoch}"),
            Self::Done { index, epoch: None } => write!(f, "done at index {index}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
        }
    }
}
