//! The committed configuration of one volume, as the replication core sees it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    ClusterId, Epoch, Geometry, Incarnation, LineageId, LogIndex, NodeId, Reign, ReplicaSlot, VolumeId,
};

/// A node together with the incarnation that the config names. Acknowledgements, flush answers and
/// clears count only from exactly this incarnation [R2, R10].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// The run of its process that is meant.
    pub incarnation: Incarnation,
}

/// When a write counts as committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Completed on the device of every replica of the ack set; FLUSH and FUA make it stable.
    #[default]
    Flush,
    /// Every write is FUA.
    Always,
}

/// Settings of a volume that the replication core obeys. Part of cluster state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSettings {
    /// When a write is committed.
    pub durability: Durability,
    /// A member that answers nothing for this long is proposed for removal.
    pub peer_timeout: Duration,
    /// A disk request that takes longer makes the replica unhealthy.
    pub disk_timeout: Duration,
    /// Most intent regions set at once; bounds the work after a crash.
    pub intent_regions_max: u32,
    /// Bytes of resync copies in flight per target.
    pub resync_window_bytes: u32,
    /// Of a hundred client requests at most one should take longer because of a resync: it yields then.
    pub resync_latency_budget: Duration,
}

impl Default for VolumeSettings {
    fn default() -> Self {
        Self {
            durability: Durability::Flush,
            peer_timeout: Duration::from_millis(1000),
            disk_timeout: Duration::from_secs(30),
            intent_regions_max: 256,
            resync_window_bytes: 4 << 20,
            resync_latency_budget: Duration::from_millis(10),
        }
    }
}

/// One replica of a volume in the committed config.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// The node that holds it.
    pub node: NodeId,
    /// Its place in bit sets and metadata areas.
    pub slot: ReplicaSlot,
    /// Last incarnation under which it was a committed member of the in-sync set; `None` if it never was.
    pub last_member: Option<Incarnation>,
}

/// Where a lineage ended: content up to `fork_epoch` is common with the lineage that followed; what
/// a replica of the old lineage wrote after that epoch is foreign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineageFork {
    /// The lineage that ended.
    pub lineage: LineageId,
    /// Last epoch of it that the next lineage holds.
    pub fork_epoch: Epoch,
}

/// Last epoch that a copy has in common with the present lineage, for a force that goes on from it: a copy of
/// an earlier lineage holds nothing of those since but what they had in common with it [R17]. 0: nothing.
///
/// `lineage` and `history` are the volume's, `copy` and `epoch` what the copy's superblock says.
#[must_use]
pub fn shared_epoch(lineage: LineageId, history: &[LineageFork], copy: LineageId, epoch: Epoch) -> Epoch {
    if copy == lineage {
        return epoch;
    }
    let forks = history.iter().skip_while(|f| f.lineage != copy).map(|f| f.fork_epoch);
    forks.min().map_or(Epoch(0), |common| common.min(epoch))
}

/// The committed configuration of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigView {
    /// Raft log index of the last change of this volume; orders two views.
    pub index: LogIndex,
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// Number of committed changes.
    pub epoch: Epoch,
    /// Epoch at which the current primary took over (kept while there is none).
    pub reign: Reign,
    /// Who serves; `None` after a demote.
    pub primary: Option<Member>,
    /// Who holds every acknowledged write; sorted by node, never empty.
    pub in_sync: Vec<Member>,
    /// All replicas; sorted by node.
    pub replicas: Vec<ReplicaView>,
    /// The current lineage.
    pub lineage: LineageId,
    /// Lineages before it, oldest first.
    pub history: Vec<LineageFork>,
    /// Sizes.
    pub geometry: Geometry,
    /// Settings.
    pub settings: VolumeSettings,
}

impl ConfigView {
    /// The named member on `node`, if it is in the in-sync set.
    #[must_use]
    pub fn member(&self, node: NodeId) -> Option<Member> {
        self.in_sync.iter().copied().find(|m| m.node == node)
    }

    /// The replica on `node`.
    #[must_use]
    pub fn replica(&self, node: NodeId) -> Option<&ReplicaView> {
        self.replicas.iter().find(|r| r.node == node)
    }

    /// The slot of the replica on `node`.
    #[must_use]
    pub fn slot(&self, node: NodeId) -> Option<ReplicaSlot> {
        self.replica(node).map(|r| r.slot)
    }

    /// The node that holds `slot`.
    #[must_use]
    pub fn node_of(&self, slot: ReplicaSlot) -> Option<NodeId> {
        self.replicas.iter().find(|r| r.slot == slot).map(|r| r.node)
    }
}
