//! The cluster state: what the Raft group agrees on, and nothing else.
//!
//! Plain data and look-ups. It changes only through [`apply`](super::apply::apply); it never reads a
//! clock, draws a number or does I/O. Invariants (see [`ClusterState::check`]): epochs only grow, a
//! volume's primary is in its in-sync set, the in-sync set is never empty and lies within the replicas,
//! `reign <= epoch`, a volume has no primary exactly if it is demoted, and a shared volume is attached to nobody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{
    BLOCK_SIZE_DEFAULT, ClusterId, ConfigView, Epoch, Geometry, Incarnation, LineageFork, LineageId,
    LogIndex, Member, NodeId, Reign, ReplicaReport, ReplicaSlot, ReplicaView, SlotSet, VolumeId,
    VolumeSettings, shared_epoch,
};

use super::command::{Applied, RequestId};

/// Most nodes of a cluster.
pub const NODES_MAX: usize = 16;
/// Most volumes of a cluster.
pub const VOLUMES_MAX: usize = 64;
/// Longest name of a node or volume, in bytes.
pub const NAME_LEN_MAX: usize = 64;
/// Longest name of a client host, in bytes: a node's name or an address.
pub const CLIENT_LEN_MAX: usize = 64;
/// Longest address text, in bytes.
pub const ADDR_LEN_MAX: usize = 256;
/// Shortest lease that can be set.
pub const LEASE_MIN: Duration = Duration::from_millis(100);
/// Longest lease that can be set.
pub const LEASE_MAX: Duration = Duration::from_secs(60);
/// Shortest peer time-out that can be set: peers are asked for a sign of life once a tick of 50 ms.
pub const PEER_TIMEOUT_MIN: Duration = Duration::from_millis(200);
/// Shortest disk time-out that can be set: below it a disk that is merely busy counts as broken.
pub const DISK_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Smallest latency budget of resync that can be set.
pub const RESYNC_LATENCY_MIN: Duration = Duration::from_millis(1);
/// Largest window of a resync, in bytes; as much memory may be held for it on both sides.
pub const RESYNC_WINDOW_MAX: u32 = 64 << 20;
/// Longest time-out and latency budget of a volume that can be set.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// Results remembered per node so that a retried request has no second effect.
pub const REQUESTS_REMEMBERED_MAX: usize = 64;
/// Results remembered per replica. It has one proposal at a time, and one more to void that [R18].
pub const PROPOSALS_REMEMBERED_MAX: usize = 4;

/// Identity of a node's Raft state on disk, minted once when it is created. A node that lost its disk has
/// another one and is refused until it is added as a new node [R13].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct StoreId(pub u128);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreId({:032x})", self.0)
    }
}

impl std::str::FromStr for StoreId {
    type Err = std::num::ParseIntError;

    /// Reads 32 hexadecimal digits; dashes are ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(&text.replace('-', ""), 16).map(Self)
    }
}

/// What a node is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Holds replicas.
    Data,
    /// Only votes.
    Witness,
}

/// Where a node is reached.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeAddrs {
    /// Control plane, `host:port`.
    pub control: String,
    /// Peer protocol, `host:port`; empty for a witness.
    pub peer: String,
    /// NBD, shown to clients; empty for a witness.
    pub nbd: String,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// What it is for.
    pub kind: NodeKind,
    /// Where it is reached.
    pub addrs: NodeAddrs,
    /// Identity of its Raft state [R13].
    pub store: StoreId,
    /// The newest run of its process that registered; `None` before the first [R2, R10].
    pub incarnation: Option<Incarnation>,
    /// Hash of the operating system's boot id in that run.
    pub os_boot: u128,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id, never reused.
    pub id: VolumeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Sizes.
    pub geometry: Geometry,
    /// Settings of the replication core.
    pub settings: VolumeSettings,
    /// All replicas, sorted by node.
    pub replicas: Vec<ReplicaView>,
    /// Slots that were ever given out; none is given out twice.
    pub slots_used: SlotSet,
    /// Number of committed changes.
    pub epoch: Epoch,
    /// Epoch at which the current primary took over.
    pub reign: Reign,
    /// Who serves.
    pub primary: Option<Member>,
    /// Who served last; equals `primary` while there is one. Only a tie-break when every member
    /// restarted [R6].
    pub primary_last: Option<Member>,
    /// An operator took the primary role away; only an operator gives it again.
    pub demoted: bool,
    /// Who holds every acknowledged write; sorted by node, never empty.
    pub in_sync: Vec<Member>,
    /// Earlier incarnations of the sole member that were named before it and from which its content
    /// continues, because each was promoted after a restart. Empty otherwise [R6].
    pub continued_from: Vec<Incarnation>,
    /// Current lineage.
    pub lineage: LineageId,
    /// Lineages before it, oldest first.
    pub history: Vec<LineageFork>,
    /// Log index of the last change of what its config says; the fields below are not in the config.
    pub index: LogIndex,
    /// Several client hosts may be attached at once, for cluster file systems. Nobody is recorded then.
    pub shared: bool,
    /// The client host that the volume is attached to. It alone is let in, also by another primary.
    pub attached: Option<Attachment>,
    /// The client host whose attachment an operator ended, until another one begins.
    pub evicted: Option<String>,
}

/// What attaches a volume to a client host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The client host: a node's name or an address.
    pub client: String,
    /// Log index of the command that made it, or renewed it.
    pub index: LogIndex,
}

impl VolumeRecord {
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

    /// The lowest slot that was never given out.
    #[must_use]
    pub fn free_slot(&self) -> Option<ReplicaSlot> {
        (0..8u8).map(ReplicaSlot).find(|slot| !self.slots_used.contains(*slot))
    }

    /// Last epoch that a copy has in common with the present lineage: where a force onto it forks [R17].
    #[must_use]
    pub fn shared_epoch(&self, copy: &ReplicaReport) -> Epoch {
        shared_epoch(self.lineage, &self.history, copy.lineage, copy.epoch)
    }

    /// Ends the lineage at `fork_epoch`, the last epoch that the copy which goes on holds, and begins
    /// `lineage`. That copy holds nothing younger of any earlier lineage either, so none of them has more in
    /// common with what follows [R17].
    pub(super) fn fork(&mut self, lineage: LineageId, fork_epoch: Epoch) {
        for earlier in &mut self.history {
            earlier.fork_epoch = earlier.fork_epoch.min(fork_epoch);
        }
        self.history.push(LineageFork { lineage: self.lineage, fork_epoch });
        self.lineage = lineage;
    }

    /// A client host may be served.
    #[must_use]
    pub fn lets_in(&self, client: &str) -> bool {
        self.shared || self.holder() == Some(client)
    }

    /// The client host that the volume is attached to.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        self.attached.as_ref().map(|attachment| attachment.client.as_str())
    }

    /// The client hosts that are named.
    fn clients(&self) -> impl Iterator<Item = &str> {
        self.holder().into_iter().chain(self.evicted.as_deref())
    }

    /// Why a client host may not be attached: another one is. Says what to do.
    #[must_use]
    pub fn refusal(&self, client: &str) -> Option<String> {
        let holder = self.holder().filter(|holder| *holder != client)?;
        let name = &self.name;
        Some(format!(
            "volume {name} is attached by {holder}, and not shared; if that client is gone for good: `blkrepl detach \
             {name} --client {holder}`"
        ))
    }

    fn view(&self, cluster: ClusterId) -> ConfigView {
        ConfigView {
            index: self.index,
            cluster,
            volume: self.id,
            epoch: self.epoch,
            reign: self.reign,
            primary: self.primary,
            in_sync: self.in_sync.clone(),
            replicas: self.replicas.clone(),
            lineage: self.lineage,
            history: self.history.clone(),
            geometry: self.geometry,
            settings: self.settings,
        }
    }
}

/// The Raft state machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// The cluster; `None` before it is initialised.
    pub cluster: Option<ClusterId>,
    /// Length of the leases that the leader grants.
    pub lease: Duration,
    /// The longest lease that was ever committed: what a new leader waits for [R1].
    pub lease_longest: Duration,
    /// Nodes.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// Ids of removed nodes; an id is never reused [R13].
    pub retired: BTreeSet<NodeId>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Index of the last entry applied, of any kind.
    pub applied: LogIndex,
    /// Results of recent requests by origin, oldest first: at most [`REQUESTS_REMEMBERED_MAX`] of a node,
    /// and [`PROPOSALS_REMEMBERED_MAX`] of each of its replicas.
    pub recent: BTreeMap<NodeId, VecDeque<(RequestId, Applied)>>,
}

/// Length of the leases of a new cluster.
pub const LEASE_DEFAULT: Duration = Duration::from_millis(1500);

impl Default for ClusterState {
    fn default() -> Self {
        Self {
            cluster: None,
            lease: LEASE_DEFAULT,
            lease_longest: LEASE_DEFAULT,
            nodes: BTreeMap::new(),
            retired: BTreeSet::new(),
            volumes: BTreeMap::new(),
            applied: LogIndex(0),
            recent: BTreeMap::new(),
        }
    }
}

/// Settings that a replica can work with: with others it would stand still, or overflow in reckoning with
/// them, on every node at once.
pub(super) fn check_settings(s: &VolumeSettings) -> Result<(), String> {
    let times = [
        ("peer_timeout", s.peer_timeout, PEER_TIMEOUT_MIN),
        ("disk_timeout", s.disk_timeout, DISK_TIMEOUT_MIN),
        ("resync_latency_budget", s.resync_latency_budget, RESYNC_LATENCY_MIN),
    ];
    for (what, given, min) in times {
        if !(min..=TIMEOUT_MAX).contains(&given) {
            return Err(format!("{what} {given:?} is not between {min:?} and {TIMEOUT_MAX:?}"));
        }
    }
    if s.intent_regions_max == 0 {
        return Err("intent_regions_max 0 leaves no region to write to; at least 1 is needed".into());
    }
    if s.resync_window_bytes > RESYNC_WINDOW_MAX {
        return Err(format!(
            "resync_window_bytes {} are more than {RESYNC_WINDOW_MAX}",
            s.resync_window_bytes
        ));
    }
    if s.resync_window_bytes < BLOCK_SIZE_DEFAULT {
        return Err(format!(
            "resync_window_bytes {} holds no block; at least {BLOCK_SIZE_DEFAULT} are needed",
            s.resync_window_bytes
        ));
    }
    Ok(())
}

impl ClusterState {
    /// The config of a volume as the replication core sees it.
    #[must_use]
    pub fn config_view(&self, volume: VolumeId) -> Option<ConfigView> {
        Some(self.volumes.get(&volume)?.view(self.cluster?))
    }

    /// The volume with this name.
    #[must_use]
    pub fn volume_by_name(&self, name: &str) -> Option<&VolumeRecord> {
        self.volumes.values().find(|v| v.name == name)
    }

    /// The node with this name.
    #[must_use]
    pub fn node_by_name(&self, name: &str) -> Option<&NodeRecord> {
        self.nodes.values().find(|n| n.name == name)
    }

    /// What people call a node: its name, or its id if it is not known here.
    #[must_use]
    pub fn node_label(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| node.to_string(), |n| n.name.clone())
    }

    /// The newest registered incarnation of a node.
    #[must_use]
    pub fn newest(&self, node: NodeId) -> Option<Incarnation> {
        self.nodes.get(&node)?.incarnation
    }

    /// True if `member` is the newest registered run of its node.
    #[must_use]
    pub fn is_newest(&self, member: Member) -> bool {
        self.newest(member.node) == Some(member.incarnation)
    }

    /// True if a newer run than `member` registered for its node, so that `member` is over for good.
    #[must_use]
    pub fn has_restarted(&self, member: Member) -> bool {
        self.newest(member.node).is_some_and(|newest| newest.boot > member.incarnation.boot)
    }

    /// Checks the invariants of the head comment. For states that arrive from outside (snapshots, disk)
    /// and for tests.
    ///
    /// # Errors
    /// Names the first invariant that is broken.
    pub fn check(&self) -> Result<(), String> {
        for (id, node) in &self.nodes {
            if *id != node.id {
                return Err(format!("record of {} stands under {id}", node.id));
            }
        }
        self.volumes.iter().try_for_each(|(id, volume)| {
            let broken = Self::check_volume(volume);
            let broken = if *id == volume.id { broken } else { Some("it stands under another id") };
            broken.map_or(Ok(()), |what| Err(format!("volume {id}: {what}")))
        })
    }

    fn check_volume(v: &VolumeRecord) -> Option<&'static str> {
        let g = v.geometry;
        // A geometry that came in through serde has not passed its constructor.
        if Geometry::new(g.size(), g.block_size(), g.region_size()).is_err() {
            return Some("its geometry breaks the rules");
        }
        if check_settings(&v.settings).is_err() {
            return Some("a timeout is out of range");
        }
        let mut slots = SlotSet::default();
        for slot in v.replicas.iter().map(|r| r.slot) {
            if usize::from(slot.0) >= crate::types::REPLICAS_MAX || slots.contains(slot) {
                return Some("a replica slot is out of range, or doubled");
            }
            slots.insert(slot);
        }
        if v.in_sync.is_empty() {
            return Some("the in-sync set is empty");
        }
        if !v.in_sync.is_sorted_by(|a, b| a.node < b.node) || !v.replicas.is_sorted_by(|a, b| a.node < b.node)
        {
            return Some("members or replicas are not sorted by node, or doubled");
        }
        if v.in_sync.iter().any(|m| v.replica(m.node).is_none()) {
            return Some("a member is not a replica");
        }
        if v.primary.is_some_and(|p| !v.in_sync.contains(&p)) {
            return Some("the primary is not in the in-sync set");
        }
        if v.primary.is_none() != v.demoted {
            return Some("a volume has no primary exactly if it is demoted");
        }
        if v.reign.0 > v.epoch.0 {
            return Some("the reign is above the epoch");
        }
        if v.shared && v.attached.is_some() {
            return Some("it is shared, and attached to one client");
        }
        if v.clients().any(|client| client.is_empty() || client.len() > CLIENT_LEN_MAX) {
            return Some("the name of its client is empty or too long");
        }
        None
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
