//! A small cluster for the tests of the pure parts: three nodes (1, 2 data, 3 witness; 4 data if asked),
//! one volume. Never used outside tests.

use std::time::Duration;

use crate::types::{
    ClusterId, Epoch, Geometry, Health, Incarnation, LineageId, LogIndex, Member, NodeId, Proposal,
    ProposalId, ProposalKind, ReplicaReport, SuperblockTrust, VolumeId, VolumeSettings,
};

use super::apply::apply;
use super::command::{Applied, ClusterOp, Command, RequestId};
use super::failover::VolumeReport;
use super::state::{ClusterState, NodeAddrs, NodeKind, NodeRecord, StoreId, VolumeRecord};

pub(super) const VOL: VolumeId = VolumeId(7);

pub(super) fn member(node: u64, boot: u64) -> Member {
    Member { node: NodeId(node), incarnation: Incarnation { boot, nonce: boot << 32 | node } }
}

pub(super) fn record(id: u64, kind: NodeKind) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        name: format!("n{id}"),
        kind,
        addrs: NodeAddrs::default(),
        store: StoreId(u128::from(id) << 64),
        incarnation: None,
        os_boot: 0,
    }
}

pub(super) struct Cluster {
    pub(super) state: ClusterState,
    pub(super) number: u64,
}

impl Cluster {
    /// Nodes are registered in run 1; the volume's only member is node 1, replicas on all data nodes.
    pub(super) fn new(data: &[u64]) -> Self {
        let mut c = Self { state: ClusterState::default(), number: 0 };
        let mut nodes: Vec<_> = data.iter().map(|id| record(*id, NodeKind::Data)).collect();
        nodes.push(record(3, NodeKind::Witness));
        let cluster = ClusterId(99);
        c.must(ClusterOp::InitCluster { cluster, lease: Duration::from_millis(1500), nodes });
        for node in data.iter().chain(&[3]) {
            c.register(*node, 1);
        }
        c.must(ClusterOp::CreateVolume {
            id: VOL,
            name: "vol0".into(),
            geometry: Geometry::new(1 << 20, 4096, 65536).unwrap(),
            settings: VolumeSettings::default(),
            replicas: data.iter().map(|id| NodeId(*id)).collect(),
            first: member(data[0], 1),
            lineage: LineageId(1),
        });
        c
    }

    /// As `new`, with nodes 1 and 2 in sync, 1 primary. The volume is at epoch 2, reign 1.
    pub(super) fn pair() -> Self {
        let mut c = Self::new(&[1, 2]);
        c.propose_ok(member(1, 1), ProposalKind::Join(member(2, 1)));
        c
    }

    pub(super) fn apply(&mut self, op: ClusterOp) -> Applied {
        self.number += 1;
        let request = RequestId {
            node: NodeId(1),
            incarnation: Incarnation::default(),
            volume: None,
            number: self.number,
        };
        self.apply_as(request, op)
    }

    pub(super) fn apply_as(&mut self, request: RequestId, op: ClusterOp) -> Applied {
        let index = LogIndex(self.state.applied.0 + 1);
        apply(&mut self.state, index, Command { request, only_under: None, op })
    }

    pub(super) fn must(&mut self, op: ClusterOp) {
        let text = format!("{op:?}");
        let applied = self.apply(op);
        assert!(applied.is_done(), "{text}: {applied}");
    }

    pub(super) fn refused(&mut self, op: ClusterOp) -> String {
        let before = self.state.volumes.clone();
        let text = format!("{op:?}");
        match self.apply(op) {
            Applied::Refused(why) => {
                assert_eq!(self.state.volumes, before, "a refusal changed something");
                why
            }
            done => panic!("{text} was not refused: {done}"),
        }
    }

    pub(super) fn register(&mut self, node: u64, boot: u64) {
        self.must(Self::registration(member(node, boot)));
    }

    pub(super) fn registration(m: Member) -> ClusterOp {
        let Member { node, incarnation } = m;
        ClusterOp::Register { node, incarnation, os_boot: 1, addrs: NodeAddrs::default() }
    }

    pub(super) fn vol(&self) -> &VolumeRecord {
        &self.state.volumes[&VOL]
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.vol().epoch
    }

    pub(super) fn proposal(&mut self, by: Member, kind: ProposalKind) -> ClusterOp {
        self.number += 1;
        let id = ProposalId(self.number);
        ClusterOp::Propose(Proposal { id, volume: VOL, expected_epoch: self.epoch(), by, kind })
    }

    pub(super) fn propose_ok(&mut self, by: Member, kind: ProposalKind) {
        let op = self.proposal(by, kind);
        self.must(op);
    }

    pub(super) fn propose_refused(&mut self, by: Member, kind: ProposalKind) -> String {
        let op = self.proposal(by, kind);
        self.refused(op)
    }

    pub(super) fn promote(&self, to: Member, operator: bool) -> ClusterOp {
        ClusterOp::Promote { volume: VOL, expected_epoch: self.epoch(), to, operator }
    }

    pub(super) fn promote_restarted(&self, to: Member, operator: bool) -> ClusterOp {
        ClusterOp::PromoteRestarted { volume: VOL, expected_epoch: self.epoch(), to, operator }
    }

    pub(super) fn force(&self, to: Member, lineage: u128, fork: u64) -> ClusterOp {
        ClusterOp::ForcePromote {
            volume: VOL,
            expected_epoch: self.epoch(),
            to,
            lineage: LineageId(lineage),
            fork_epoch: Epoch(fork),
        }
    }

    /// A healthy report of a replica that was in sync as `run`.
    pub(super) fn report(&self, run: Incarnation) -> VolumeReport {
        let v = self.vol();
        VolumeReport {
            health: Health::Healthy,
            report: ReplicaReport {
                trust: SuperblockTrust::Sound,
                epoch: v.epoch,
                reign: v.reign,
                lineage: v.lineage,
                member: Some(run),
                inconsistent: false,
                clean: false,
                same_os_boot: false,
            },
        }
    }
}
