//! `status`: cluster state merged with what each node says of its replicas.
//!
//! Pure: the asked node collects the answers, this puts them together. The primary's word counts for
//! who is connected, who lacks what and how a resync goes; a node's own word for its own failure; cluster
//! state for everything else. What nobody who answered knows is `null`, never guessed.

use std::collections::BTreeMap;

use blkrepl_engine::control::{ClusterState, NodeKind, NodeRecord, VolumeRecord};
use blkrepl_engine::types::{Durability, Member, NodeId, PeerStatus, ReplicaState, ReplicaStatus, VolumeId};
use serde::{Deserialize, Serialize};

use crate::admin::{DurabilityWord, NodeView, ReplicaView, ResyncView, SharingWord, StatusView, VolumeView};

/// What one node says of its own replica of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnReplica {
    /// The volume.
    pub volume: VolumeId,
    /// The replica's status; `None` if it does not run.
    pub status: Option<ReplicaStatus>,
    /// Why it does not run.
    pub failure: Option<String>,
}

/// What one node says of all its replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnReplicas {
    /// One per volume with a replica here.
    pub replicas: Vec<OwnReplica>,
    /// From the Raft leader: why volumes without a live primary stay without one.
    pub blocked: Vec<(VolumeId, String)>,
    /// What the node's NBD clients did since its start, by name; nothing from a node of an earlier release.
    #[serde(default)]
    pub clients: BTreeMap<String, u64>,
}

impl OwnReplicas {
    fn of(&self, volume: VolumeId) -> Option<&OwnReplica> {
        self.replicas.iter().find(|r| r.volume == volume)
    }
}

/// Everything that was gathered for one status.
pub struct Gathered<'a> {
    /// Cluster state of the asked node.
    pub state: &'a ClusterState,
    /// The asked node and its run.
    pub me: Member,
    /// Name of the asked node.
    pub my_name: &'a str,
    /// Raft leader, if known.
    pub leader: Option<NodeId>,
    /// Answers by node; a node that did not answer is missing.
    pub answers: BTreeMap<NodeId, OwnReplicas>,
}

impl Gathered<'_> {
    /// The merged status.
    pub fn view(&self) -> StatusView {
        let mut volumes: Vec<VolumeView> = self.state.volumes.values().map(|v| self.volume(v)).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        StatusView {
            cluster: self.state.cluster.map(|id| id.to_string()),
            asked: self.my_name.to_string(),
            leader: self.leader.map(|id| node_name(self.state, id)),
            nodes: self.state.nodes.values().map(|n| self.node(n)).collect(),
            volumes,
        }
    }

    fn node(&self, n: &NodeRecord) -> NodeView {
        NodeView {
            id: n.id.0,
            name: n.name.clone(),
            kind: kind_word(n.kind).to_string(),
            reachable: n.id == self.me.node || self.answers.contains_key(&n.id),
            leader: self.leader == Some(n.id),
            boot: n.incarnation.map_or(0, |i| i.boot),
            control: n.addrs.control.clone(),
            peer: n.addrs.peer.clone(),
            nbd: n.addrs.nbd.clone(),
            clients: self.answers.get(&n.id).map(|a| a.clients.clone()).filter(|counts| !counts.is_empty()),
        }
    }

    fn volume(&self, v: &VolumeRecord) -> VolumeView {
        let primary = self.primary_status(v);
        let in_sync: Vec<String> = v
            .in_sync
            .iter()
            .filter(|m| self.is_current(**m))
            .map(|m| node_name(self.state, m.node))
            .collect();
        VolumeView {
            name: v.name.clone(),
            id: v.id.to_string(),
            size: v.geometry.size(),
            block_size: v.geometry.block_size(),
            durability: durability_word(v.settings.durability),
            settings: Some(v.settings.into()),
            sharing: if v.shared { SharingWord::Shared } else { SharingWord::Exclusive },
            attached: v.holder().map(str::to_owned),
            epoch: v.epoch.0,
            reign: v.reign.0,
            lineage: v.lineage.to_string(),
            primary: v.primary.map(|m| node_name(self.state, m.node)),
            demoted: v.demoted,
            serving: primary.is_some_and(|p| p.serving),
            degraded: in_sync.len() < v.replicas.len(),
            in_sync,
            note: self.note(v, primary),
            replicas: v.replicas.iter().map(|r| self.replica(v, r.node, primary)).collect(),
        }
    }

    /// The named run is, as far as is known here, the one that runs: a member that restarted is in sync no
    /// more, even before the config says so [R2]. Of itself the asked node knows before cluster state does.
    fn is_current(&self, member: Member) -> bool {
        if member.node == self.me.node { member == self.me } else { self.state.is_newest(member) }
    }

    /// The status of the replica that the config names primary, if its node answered and agrees.
    fn primary_status(&self, v: &VolumeRecord) -> Option<&ReplicaStatus> {
        let primary = v.primary?;
        if !self.is_current(primary) {
            return None;
        }
        self.answers.get(&primary.node)?.of(v.id)?.status.as_ref()
    }

    fn replica(&self, v: &VolumeRecord, node: NodeId, primary: Option<&ReplicaStatus>) -> ReplicaView {
        let own = self.answers.get(&node).and_then(|a| a.of(v.id));
        let own_status = own.and_then(|o| o.status.as_ref());
        let is_primary = v.primary.is_some_and(|p| p.node == node);
        let seen: Option<&PeerStatus> = primary.and_then(|p| p.peers.iter().find(|s| s.node == node));
        let failure =
            own.and_then(|o| o.failure.clone().or_else(|| o.status.as_ref().and_then(|s| s.failure.clone())));
        let member = v.member(node).is_some_and(|m| self.is_current(m));
        let state = if failure.is_some() {
            ReplicaState::Failed
        } else if !self.answers.contains_key(&node) && seen.is_none_or(|s| !s.connected) {
            ReplicaState::Disconnected
        } else if let Some(seen) = seen {
            seen.state
        } else {
            own_status.map_or(ReplicaState::Disconnected, |s| s.state)
        };
        ReplicaView {
            node: node_name(self.state, node),
            role: if is_primary { "primary" } else { "secondary" }.to_string(),
            state: state_word(state).to_string(),
            dirty_bytes: match seen {
                Some(seen) => Some(seen.dirty_bytes),
                None if member && is_primary => Some(0),
                None => self.dirty_by_others(v, node).or(member.then_some(0)),
            },
            resync: seen.and_then(|s| s.resync).map(|p| ResyncView {
                done_bytes: p.done_bytes,
                total_bytes: p.total_bytes,
                moved_bytes: p.moved_bytes,
                bytes_per_s: p.bytes_per_s,
                eta_s: p.total_bytes.saturating_sub(p.done_bytes).checked_div(p.bytes_per_s),
            }),
            epoch: own_status.map(|s| s.epoch.0),
            writes_acked: own_status.map(|s| s.writes_acked),
            intent_regions: own_status.map(|s| s.intent_regions),
            failure,
        }
    }

    /// Without a primary's word: the most that any member of the in-sync set has on record for `node`.
    fn dirty_by_others(&self, v: &VolumeRecord, node: NodeId) -> Option<u64> {
        v.in_sync
            .iter()
            .filter(|m| m.node != node)
            .filter_map(|m| self.answers.get(&m.node)?.of(v.id)?.status.as_ref())
            .filter_map(|s| s.peers.iter().find(|p| p.node == node))
            .map(|p| p.dirty_bytes)
            .max()
    }

    /// Why the volume is not served, and what to do.
    fn note(&self, v: &VolumeRecord, primary: Option<&ReplicaStatus>) -> Option<String> {
        if primary.is_some_and(|p| p.serving) {
            return None;
        }
        let Some(named) = v.primary else {
            return Some(format!(
                "demoted by an operator: ask an in-sync node ({}) to promote {}",
                self.names(v.in_sync.iter().map(|m| m.node)),
                v.name
            ));
        };
        let name = node_name(self.state, named.node);
        if primary.is_some() {
            return Some(format!(
                "{name} is primary but does not serve yet: it reconciles, moves, or has no lease"
            ));
        }
        let blocked = self.answers.values().flat_map(|a| &a.blocked).find(|(id, _)| *id == v.id);
        if let Some((_, why)) = blocked {
            return Some(format!("no replica can take over: {why}"));
        }
        if self.leader.is_none() {
            return Some(format!(
                "{name} was primary; no Raft leader is known here, and without a quorum nothing is \
                promoted: start the nodes that are down"
            ));
        }
        let gone: Vec<NodeId> =
            v.in_sync.iter().map(|m| m.node).filter(|n| !self.answers.contains_key(n)).collect();
        if gone.len() == v.in_sync.len() {
            return Some(format!(
                "every in-sync replica is away ({}): start one of these nodes; if they are lost for good, \
                `blkrepl promote {} --force` on another node gives up what only they hold",
                self.names(gone.into_iter()),
                v.name
            ));
        }
        Some(format!("{name} was primary and is gone: waiting for an in-sync replica to take over"))
    }

    fn names(&self, nodes: impl Iterator<Item = NodeId>) -> String {
        nodes.map(|n| node_name(self.state, n)).collect::<Vec<_>>().join(", ")
    }
}

/// Name of a node, or `node ID` if it is not known.
pub fn node_name(state: &ClusterState, node: NodeId) -> String {
    state.nodes.get(&node).map_or_else(|| node.to_string(), |n| n.name.clone())
}

fn kind_word(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::Data => "data",
        NodeKind::Witness => "witness",
    }
}

fn state_word(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::InSync => "in_sync",
        ReplicaState::Resyncing => "resyncing",
        ReplicaState::Disconnected => "disconnected",
        ReplicaState::Failed => "failed",
    }
}

fn durability_word(d: Durability) -> DurabilityWord {
    match d {
        Durability::Flush => DurabilityWord::Flush,
        Durability::Always => DurabilityWord::Always,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use blkrepl_engine::control::{NodeAddrs, StoreId};
    use blkrepl_engine::types::{
        ClusterId, Epoch, Geometry, Health, Incarnation, LineageId, LogIndex, Member, Reign, ReplicaReport,
        ReplicaSlot, ReplicaView as CommittedReplica, ResyncProgress, Role, SlotSet, SuperblockTrust,
        VolumeSettings,
    };

    use super::*;

    const VOLUME: VolumeId = VolumeId(1);

    fn member(node: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation { boot: 1, nonce: node } }
    }

    /// n1 and n2 hold replicas, n3 is the witness; n1 is primary.
    fn cluster(in_sync: &[u64]) -> ClusterState {
        let mut state = ClusterState { cluster: Some(ClusterId(5)), ..ClusterState::default() };
        for id in 1..=3 {
            let record = NodeRecord {
                id: NodeId(id),
                name: format!("n{id}"),
                kind: if id == 3 { NodeKind::Witness } else { NodeKind::Data },
                addrs: NodeAddrs { nbd: format!("10.0.0.{id}:10809"), ..NodeAddrs::default() },
                store: StoreId(u128::from(id)),
                incarnation: Some(member(id).incarnation),
                os_boot: 0,
            };
            state.nodes.insert(record.id, record);
        }
        let replica = |node: u64, slot| CommittedReplica {
            node: NodeId(node),
            slot: ReplicaSlot(slot),
            last_member: Some(member(node).incarnation),
        };
        let volume = VolumeRecord {
            id: VOLUME,
            name: "vol0".into(),
            geometry: Geometry::new(1 << 30, 4096, 1 << 20).unwrap(),
            settings: VolumeSettings::default(),
            replicas: vec![replica(1, 0), replica(2, 1)],
            slots_used: SlotSet(3),
            epoch: Epoch(4),
            reign: Reign(3),
            primary: Some(member(1)),
            primary_last: Some(member(1)),
            demoted: false,
            in_sync: in_sync.iter().map(|n| member(*n)).collect(),
            continued_from: Vec::new(),
            shared: false,
            attached: None,
            evicted: None,
            lineage: LineageId(9),
            history: Vec::new(),
            index: LogIndex(7),
        };
        state.volumes.insert(VOLUME, volume);
        state
    }

    /// A volume on n1 and n2, both in sync, attached by nobody.
    pub(in super::super) fn record() -> VolumeRecord {
        cluster(&[1, 2]).volumes.remove(&VOLUME).unwrap()
    }

    fn own(node: u64, serving: bool, peers: Vec<PeerStatus>) -> OwnReplicas {
        let report = ReplicaReport {
            trust: SuperblockTrust::Sound,
            epoch: Epoch(4),
            reign: Reign(3),
            lineage: LineageId(9),
            member: None,
            inconsistent: false,
            clean: false,
            same_os_boot: true,
        };
        let status = ReplicaStatus {
            node: NodeId(node),
            epoch: Epoch(4),
            reign: Reign(3),
            role: if serving { Role::Primary } else { Role::Secondary },
            state: ReplicaState::InSync,
            health: Health::Healthy,
            serving,
            writes_acked: 5,
            intent_regions: 1,
            peers,
            report,
            failure: None,
        };
        OwnReplicas {
            replicas: vec![OwnReplica { volume: VOLUME, status: Some(status), failure: None }],
            ..OwnReplicas::default()
        }
    }

    fn view(state: &ClusterState, me: u64, answers: Vec<(u64, OwnReplicas)>) -> StatusView {
        let answers = answers.into_iter().map(|(n, a)| (NodeId(n), a)).collect();
        Gathered { state, me: member(me), my_name: "me", leader: Some(NodeId(3)), answers }.view()
    }

    #[test]
    fn the_primarys_word_counts_whoever_is_asked() {
        let state = cluster(&[1]);
        let progress = ResyncProgress { done_bytes: 10, total_bytes: 30, moved_bytes: 10, bytes_per_s: 10 };
        let peer = PeerStatus {
            node: NodeId(2),
            connected: true,
            state: ReplicaState::Resyncing,
            dirty_bytes: 20,
            resync: Some(progress),
        };
        let answers = vec![(1, own(1, true, vec![peer])), (2, own(2, false, vec![]))];
        for me in [1, 2] {
            let v = &view(&state, me, answers.clone()).volumes[0];
            assert!(v.serving && v.degraded && v.note.is_none());
            assert_eq!((v.primary.as_deref(), v.in_sync.as_slice()), (Some("n1"), &["n1".to_string()][..]));
            let r = &v.replicas[1];
            assert_eq!((r.state.as_str(), r.dirty_bytes), ("resyncing", Some(20)));
            assert_eq!(r.resync.unwrap().eta_s, Some(2));
            assert_eq!((v.replicas[0].role.as_str(), v.replicas[0].dirty_bytes), ("primary", Some(0)));
        }
    }

    #[test]
    fn a_silent_primary_is_disconnected_and_the_note_says_what_happens() {
        let state = cluster(&[1, 2]);
        let v = view(&state, 2, vec![(2, own(2, false, vec![]))]);
        assert!(!v.nodes[0].reachable && v.nodes[1].reachable);
        let v = &v.volumes[0];
        assert!(!v.serving);
        assert_eq!(v.replicas[0].state, "disconnected");
        assert!(
            v.note.as_deref().is_some_and(|n| n.contains("waiting for an in-sync replica")),
            "{:?}",
            v.note
        );
        let alone = view(&cluster(&[1]), 2, vec![(2, own(2, false, vec![]))]);
        assert!(alone.volumes[0].note.as_deref().is_some_and(|n| n.contains("promote vol0 --force")));
        assert_eq!(alone.volumes[0].replicas[1].dirty_bytes, None, "nobody who knows answered");
    }

    #[test]
    fn what_clients_did_is_told_of_nodes_that_answered() {
        let clients = BTreeMap::from([("violations".to_string(), 3)]);
        let one = OwnReplicas { clients: clients.clone(), ..own(1, true, vec![]) };
        let v = view(&cluster(&[1]), 1, vec![(1, one), (3, OwnReplicas::default())]);
        assert_eq!(
            [&v.nodes[0].clients, &v.nodes[1].clients, &v.nodes[2].clients],
            [&Some(clients), &None, &None]
        );
    }

    #[test]
    fn a_replica_that_cannot_be_opened_is_failed_with_its_reason() {
        let state = cluster(&[1]);
        let failed = OwnReplicas {
            replicas: vec![OwnReplica { volume: VOLUME, status: None, failure: Some("truncated".into()) }],
            ..OwnReplicas::default()
        };
        let v = view(&state, 2, vec![(1, own(1, true, vec![])), (2, failed)]);
        let r = &v.volumes[0].replicas[1];
        assert_eq!((r.state.as_str(), r.failure.as_deref()), ("failed", Some("truncated")));
    }

    #[test]
    fn a_primary_that_restarted_is_not_taken_for_serving_r2() {
        let mut state = cluster(&[1]);
        state.nodes.get_mut(&NodeId(1)).unwrap().incarnation = Some(Incarnation { boot: 2, nonce: 2 });
        let v = &view(&state, 2, vec![(1, own(1, true, vec![]))]).volumes[0];
        assert!(!v.serving && v.in_sync.is_empty() && v.degraded);
    }
}
