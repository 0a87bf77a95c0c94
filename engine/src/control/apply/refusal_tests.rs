//! What the rules refuse, each with its reason: a refusal changes nothing, and the bounds hold that keep the
//! cluster state small.

use crate::types::{Epoch, Geometry, LineageId, NodeId, REPLICAS_MAX, VolumeId, VolumeSettings};

use super::super::command::{Applied, ClusterOp};
use super::super::fixture::{Cluster, VOL, member, record};
use super::super::state::{ADDR_LEN_MAX, NODES_MAX, NodeKind, VOLUMES_MAX};

fn says(c: &mut Cluster, op: ClusterOp, text: &str) {
    let why = c.refused(op);
    assert!(why.contains(text), "{why:?} does not say {text:?}");
}

fn volume(id: u128, name: &str, replicas: &[u64]) -> ClusterOp {
    ClusterOp::CreateVolume {
        id: VolumeId(id),
        name: name.into(),
        geometry: Geometry::new(1 << 20, 4096, 65_536).unwrap(),
        settings: VolumeSettings::default(),
        replicas: replicas.iter().map(|id| NodeId(*id)).collect(),
        first: member(1, 1),
        lineage: LineageId(id),
    }
}

#[test]
fn a_node_is_added_once_under_a_name_and_an_id_of_its_own_up_to_a_bound() {
    let mut c = Cluster::pair();
    says(&mut c, ClusterOp::AddNode(record(0, NodeKind::Data)), "start at 1");
    says(&mut c, ClusterOp::AddNode(record(2, NodeKind::Data)), "exists with store");
    let mut twin = record(5, NodeKind::Data);
    twin.name = "n1".into();
    says(&mut c, ClusterOp::AddNode(twin), "named n1 exists");
    let mut nameless = record(5, NodeKind::Data);
    nameless.name = "a b".into();
    says(&mut c, ClusterOp::AddNode(nameless), "name must be");
    let mut far = record(5, NodeKind::Data);
    far.addrs.nbd = "x".repeat(ADDR_LEN_MAX + 1);
    says(&mut c, ClusterOp::AddNode(far), "longer than");
    for id in 4..=NODES_MAX as u64 {
        c.must(ClusterOp::AddNode(record(id, NodeKind::Data)));
    }
    says(&mut c, ClusterOp::AddNode(record(90, NodeKind::Data)), "maximum of 16 nodes");
}

#[test]
fn r13_a_node_leaves_without_replicas_and_its_id_is_gone_for_good() {
    let mut c = Cluster::pair();
    says(&mut c, ClusterOp::RemoveNode { node: NodeId(8) }, "not in this cluster");
    says(&mut c, ClusterOp::RemoveNode { node: NodeId(2) }, "holds a replica");
    c.must(ClusterOp::DeleteVolume { volume: VOL, expected_epoch: c.epoch() });
    for node in [2, 3] {
        c.must(ClusterOp::RemoveNode { node: NodeId(node) });
    }
    says(&mut c, ClusterOp::AddNode(record(2, NodeKind::Data)), "never reused");
    says(&mut c, ClusterOp::RemoveNode { node: NodeId(1) }, "last node");
}

#[test]
fn a_cluster_is_founded_once_and_by_somebody() {
    let mut c = Cluster::pair();
    let found = |nodes| ClusterOp::InitCluster {
        cluster: crate::types::ClusterId(5),
        lease: std::time::Duration::from_secs(1),
        nodes,
    };
    says(&mut c, found(vec![record(1, NodeKind::Data)]), "initialised already");
    c.state = super::ClusterState::default();
    says(&mut c, found(Vec::new()), "at least one node");
    assert_eq!(c.state.cluster, None);
    c.must(found(vec![record(1, NodeKind::Data)]));
}

#[test]
fn a_volume_is_deleted_at_the_epoch_that_was_seen_and_alone() {
    let mut c = Cluster::pair();
    c.must(volume(8, "vol1", &[1, 2]));
    let delete = |epoch| ClusterOp::DeleteVolume { volume: VOL, expected_epoch: Epoch(epoch) };
    says(&mut c, delete(1), "look again");
    let epoch = c.epoch().0;
    let Applied::Done { epoch: None, .. } = c.apply(delete(epoch)) else { panic!("not deleted") };
    assert_eq!(c.state.volumes.keys().collect::<Vec<_>>(), [&VolumeId(8)]);
    says(&mut c, delete(epoch), "does not exist");
    // Its name is free again.
    c.must(volume(9, "vol0", &[1, 2]));
}

#[test]
fn r2_volumes_and_replicas_have_bounds_and_registered_nodes() {
    let mut c = Cluster::pair();
    for id in 4..=12 {
        c.must(ClusterOp::AddNode(record(id, NodeKind::Data)));
    }
    let many: Vec<u64> = [1, 2].into_iter().chain(4..=10).collect();
    says(&mut c, volume(8, "wide", &many), "at most 8 replicas");
    says(&mut c, volume(8, "odd", &[2]), "is to be the first member");
    let first = member(4, 1);
    let ClusterOp::CreateVolume { id, name, geometry, settings, lineage, .. } = volume(8, "new", &[]) else {
        panic!("a volume")
    };
    let replicas = vec![NodeId(4)];
    let unregistered = ClusterOp::CreateVolume { id, name, geometry, settings, replicas, first, lineage };
    says(&mut c, unregistered, "has not registered");
    // Slots are given out once: removing a replica frees none.
    let (volume_id, add) = (VOL, |c: &Cluster, node| ClusterOp::AddReplica {
        volume: VOL,
        expected_epoch: c.epoch(),
        node: NodeId(node),
    });
    for node in 4..4 + (REPLICAS_MAX as u64 - 2) {
        c.must(add(&c, node));
    }
    let last = NodeId(4);
    c.must(ClusterOp::RemoveReplica { volume: volume_id, expected_epoch: c.epoch(), node: last });
    let op = add(&c, 12);
    says(&mut c, op, "none is reused");
    for id in 0..VOLUMES_MAX as u128 - 1 {
        c.must(volume(100 + id, &format!("v{id}"), &[1]));
    }
    says(&mut c, volume(8, "more", &[1]), "maximum of 64 volumes");
}

#[test]
fn a_result_says_what_became_of_the_command() {
    let mut c = Cluster::pair();
    let bump = c.proposal(member(1, 1), crate::types::ProposalKind::Bump);
    let done = c.apply(bump);
    assert_eq!(done.to_string(), format!("done at index {}, epoch 3", c.state.applied));
    let lease = c.apply(ClusterOp::SetLease { lease: std::time::Duration::from_secs(1) });
    assert_eq!(lease.to_string(), format!("done at index {}", c.state.applied));
    let lease = c.apply(ClusterOp::SetLease { lease: std::time::Duration::ZERO });
    assert!(lease.to_string().starts_with("refused: lease 0ns is not between"), "{lease}");
}
