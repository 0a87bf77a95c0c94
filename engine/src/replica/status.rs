//! What a replica says of itself.

use crate::types::{
    ConfigView, Epoch, Health, PeerStatus, Reign, ReplicaReport, ReplicaState, ReplicaStatus, Role,
};

use super::Replica;

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
            member: superblock.member,
            inconsistent: superblock.inconsistent.is_some(),
            clean: self.was_clean,
            same_os_boot: self.same_os_boot,
        }
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
            serving: self.serving(),
            writes_acked: self.writes_acked,
            intent_regions: self.intents.len() as u64,
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
