//! What a replica says of itself: to operators (status), to the failover controller (health and the
//! report of what its superblock records).

use serde::{Deserialize, Serialize};

use super::{Epoch, Incarnation, LineageId, NodeId, Reign};

/// What a replica is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Serves clients (or is about to).
    Primary,
    /// Follows a primary.
    Secondary,
}

/// State of a replica as `blkrepl status` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// A committed member of the in-sync set, connected.
    InSync,
    /// Receives the blocks it lacks.
    Resyncing,
    /// No session to it.
    Disconnected,
    /// Its disk failed or its metadata refuses the volume.
    Failed,
}

/// Whether a replica may be vouched for. An unhealthy one gets no lease for the volume and is never
/// promoted by the failover controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// Works.
    Healthy,
    /// Does not; the text says why.
    Unhealthy(String),
}

/// How far what the superblock says can be trusted [R16].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SuperblockTrust {
    /// Both copies valid, and equal or one write apart: what a crash between their two writes leaves.
    Sound,
    /// One copy bad, or they disagree: unknown until it matches the committed config.
    Doubtful,
    /// No valid copy, or none that belongs here.
    None,
}

/// What one replica's superblock records; carried by lease renewals so that the failover controller
/// can judge a cluster in which every member restarted [R6].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// How far the rest can be trusted.
    pub trust: SuperblockTrust,
    /// Epoch that the superblock last recorded.
    pub epoch: Epoch,
    /// Reign that it last recorded.
    pub reign: Reign,
    /// Lineage of the content.
    pub lineage: LineageId,
    /// Incarnation under which this replica was last a member of the in-sync set, if its content
    /// still continues from there.
    pub member: Option<Incarnation>,
    /// A resync was begun and has not ended with a join.
    pub inconsistent: bool,
    /// The last stop was clean under the recorded epoch.
    pub clean: bool,
    /// Hash of the operating system's boot id when `member` was recorded equals the present one: what
    /// was written since may still be in caches, nothing was lost by power.
    pub same_os_boot: bool,
}

/// Progress of one resync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResyncProgress {
    /// Bytes compared or copied so far.
    pub done_bytes: u64,
    /// Bytes in the set in all.
    pub total_bytes: u64,
    /// Payload bytes that really travelled.
    pub moved_bytes: u64,
    /// Recent speed in bytes per second (of `done_bytes`).
    pub bytes_per_s: u64,
}

/// What a replica knows of one other replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The other's node.
    pub node: NodeId,
    /// A session to it is up.
    pub connected: bool,
    /// State, as seen from here.
    pub state: ReplicaState,
    /// Bytes that it lacks, by the local dirty bitmap.
    pub dirty_bytes: u64,
    /// Present while it is being resynced by this replica.
    pub resync: Option<ResyncProgress>,
}

/// Snapshot of one replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its node.
    pub node: NodeId,
    /// Epoch of the config that it follows.
    pub epoch: Epoch,
    /// Reign of that config.
    pub reign: Reign,
    /// Its role.
    pub role: Role,
    /// State of itself.
    pub state: ReplicaState,
    /// Whether it may be vouched for.
    pub health: Health,
    /// It is primary, has reconciled [R11], is not stopping for a move, and holds a valid lease. While the
    /// superblock of a newer config is written, requests wait [R16], and this stays true: clients come to
    /// the right place.
    pub serving: bool,
    /// Client writes acknowledged since start.
    pub writes_acked: u64,
    /// Intent regions set at the moment.
    pub intent_regions: u64,
    /// The other replicas.
    pub peers: Vec<PeerStatus>,
    /// What the superblock records.
    pub report: ReplicaReport,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}
