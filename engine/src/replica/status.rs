//! What a replica says of itself.

use crate::types::{
    ConfigView, Epoch, Health, Incarnation, PeerStatus, Reign, ReplicaReport, ReplicaState, ReplicaStatus,
    Role,
};

use super::Replica;
use super::config::continues;

impl Replica {
    /// The committed config that this replica follows.
    #[must_use]
    pub fn config(&self) -> Option<&ConfigView> {
        self.config.as_ref()
    }

    /// Whether this replica may be vouched for.
    #[must_use]
    pub fn health(&self) -> Health {
        if let Some(reason) = &self.failure {
            return Health::Unhealthy(reason.clone());
        }
        // Until this run is on record nothing can be vouched for; a better replica is not to be passed
        // over because it is slower to start [R6].
        if !self.store.superblock_durable(self.opened_version) {
            return Health::Unhealthy("it has just started and records its start".into());
        }
        let limit = self.settings().disk_timeout;
        if self.disk.overdue(self.now, limit) {
            let reason = format!("a disk request is unanswered for more than {} s", limit.as_secs());
            return Health::Unhealthy(reason);
        }
        Health::Healthy
    }

    /// What the superblock records, for the failover controller [R6].
    #[must_use]
    pub fn report(&self) -> ReplicaReport {
        let superblock = self.store.superblock();
        ReplicaReport {
            trust: self.store.trust,
            epoch: superblock.epoch,
            reign: superblock.reign,
            lineage: superblock.lineage,
            member: self.claimed_member().filter(|_| self.store.superblock_durable(self.opened_version)),
            inconsistent: superblock.inconsistent.is_some(),
            clean: self.was_clean,
            same_os_boot: self.same_os_boot,
        }
    }

    /// The member whose content this replica holds: of the runs that its superblock names, the one that the
    /// config means, if it does mean one.
    pub(super) fn claimed_member(&self) -> Option<Incarnation> {
        let superblock = self.store.superblock();
        let config = self.config.as_ref();
        let named = config.and_then(|c| c.member(self.me.node)).map(|m| m.incarnation);
        let last = config.and_then(|c| c.replica(self.me.node)).and_then(|r| r.last_member);
        let meant = [named, last].into_iter().flatten().find(|run| continues(superblock, *run));
        // A run of this copy, which was never a member's, was forced and ended before it could record that.
        let from_nothing = config.is_some_and(|c| self.begins_from_nothing(c));
        let forced = named.filter(|run| from_nothing && superblock.chain.contains(run));
        meant.or(forced).or(superblock.member)
    }

    /// Snapshot for operators.
    #[must_use]
    pub fn status(&self) -> ReplicaStatus {
        let state = if self.failure.is_some() {
            ReplicaState::Failed
        } else if self.is_member() {
            ReplicaState::InSync
        } else if self.following.confirmed.is_some() {
            ReplicaState::Resyncing
        } else {
            ReplicaState::Disconnected
        };
        ReplicaStatus {
            node: self.me.node,
            epoch: self.config.as_ref().map_or(Epoch(0), |c| c.epoch),
            reign: self.config.as_ref().map_or(Reign(0), |c| c.reign),
            role: if self.primary.is_some() { Role::Primary } else { Role::Secondary },
            state,
            health: self.health(),
            serving: self.in_service(),
            writes_acked: self.writes_acked,
            intent_regions: self.store.intent().count(),
            peers: self.peers.keys().map(|node| self.peer_status(*node)).collect(),
            report: self.report(),
            failure: self.failure.clone(),
        }
    }

    fn peer_status(&self, node: crate::types::NodeId) -> PeerStatus {
        let peer = &self.peers[&node];
        let connected = peer.session.is_some();
        let named = self.config.as_ref().and_then(|c| c.member(node));
        let member = named.is_some_and(|m| peer.session.is_none_or(|s| s.incarnation == m.incarnation));
        let target = self.primary.as_ref().and_then(|p| p.targets.get(&node)).filter(|t| !t.member);
        let state = match (&peer.failed, connected, member) {
            (Some(_), ..) => ReplicaState::Failed,
            (None, true, true) => ReplicaState::InSync,
            (None, true, false) if peer.refused.is_some() => ReplicaState::Failed,
            (None, true, false) => ReplicaState::Resyncing,
            (None, false, _) => ReplicaState::Disconnected,
        };
        PeerStatus {
            node,
            connected,
            state,
            dirty_bytes: self.dirty_bytes(node),
            resync: target.map(|t| t.progress),
        }
    }
}
