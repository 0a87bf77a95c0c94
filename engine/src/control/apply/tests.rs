//! Tests of the apply rules, one per rule, and random command sequences.

use std::time::Duration;

use proptest::prelude::*;

use crate::types::{
    Epoch, Geometry, Incarnation, LineageFork, LineageId, LogIndex, Member, NodeId, ProposalKind, Reign,
    ReplicaReport, VolumeSettings,
};

use super::super::codec;
use super::super::command::{Applied, ClusterOp, Command, Leadership, Prepared, RequestId};
use super::super::failover::eligible_restarted;
use super::super::fixture::{Cluster, VOL, member, record};
use super::super::state::{ClusterState, NodeKind, TIMEOUT_MAX};
use super::{apply, apply_under};

#[test]
fn r2_r10_only_a_newer_run_registers() {
    let mut c = Cluster::pair();
    c.register(2, 2);
    // The same again is a retry.
    c.register(2, 2);
    let why = c.refused(Cluster::registration(member(2, 1)));
    assert!(why.contains("rolled back"), "{why}");
    let mut twin = member(2, 2);
    twin.incarnation.nonce += 1;
    c.refused(Cluster::registration(twin));
    assert_eq!(c.state.newest(NodeId(2)), Some(member(2, 2).incarnation));
    c.refused(Cluster::registration(member(9, 1)));
}

#[test]
fn every_change_counts_the_epoch_and_only_a_new_primary_begins_a_reign() {
    let mut c = Cluster::pair();
    assert_eq!((c.vol().epoch, c.vol().reign), (Epoch(2), Reign(1)));
    c.propose_ok(member(1, 1), ProposalKind::Bump);
    assert_eq!((c.vol().epoch, c.vol().reign), (Epoch(3), Reign(1)));
    c.propose_ok(member(1, 1), ProposalKind::Move(member(2, 1)));
    assert_eq!((c.vol().epoch, c.vol().reign), (Epoch(4), Reign(4)));
    assert_eq!(c.vol().primary, Some(member(2, 1)));
    c.propose_ok(member(2, 1), ProposalKind::Demote);
    assert_eq!((c.vol().epoch, c.vol().reign, c.vol().primary), (Epoch(5), Reign(4), None));
    // The same member again: a new reign all the same.
    let op = c.promote(member(2, 1), true);
    c.must(op);
    assert_eq!((c.vol().epoch, c.vol().reign), (Epoch(6), Reign(6)));
    assert_eq!(c.vol().index, c.state.applied);
}

#[test]
fn r18_a_bump_voids_every_proposal_that_expects_the_epoch_before() {
    let mut c = Cluster::pair();
    let delayed = c.proposal(member(1, 1), ProposalKind::Move(member(2, 1)));
    c.propose_ok(member(1, 1), ProposalKind::Bump);
    let why = c.refused(delayed);
    assert!(why.contains("epoch 3") && why.contains("expects 2"), "{why}");
    assert_eq!(c.vol().primary, Some(member(1, 1)));
}

#[test]
fn r9_only_the_named_run_of_the_primary_changes_membership() {
    let mut c = Cluster::pair();
    c.propose_refused(member(2, 1), ProposalKind::Remove(member(1, 1)));
    c.propose_refused(member(1, 2), ProposalKind::Remove(member(2, 1)));
    // A promotion changes only the primary.
    let before = c.vol().in_sync.clone();
    let op = c.promote(member(2, 1), false);
    c.must(op);
    assert_eq!(c.vol().in_sync, before);
    // The former primary's late removal of the new one finds itself refused.
    c.propose_refused(member(1, 1), ProposalKind::Remove(member(2, 1)));
    c.propose_refused(member(2, 1), ProposalKind::Remove(member(2, 1)));
    c.propose_ok(member(2, 1), ProposalKind::Remove(member(1, 1)));
    assert_eq!(c.vol().in_sync, [member(2, 1)]);
}

#[test]
fn r2_a_proposal_of_a_run_that_was_replaced_is_refused() {
    let mut c = Cluster::pair();
    c.register(1, 2);
    let why = c.propose_refused(member(1, 1), ProposalKind::Remove(member(2, 1)));
    assert!(why.contains("runs as"), "{why}");
}

#[test]
fn r10_a_join_names_the_newest_run_of_a_replica() {
    let mut c = Cluster::new(&[1, 2]);
    c.register(2, 2);
    c.propose_refused(member(1, 1), ProposalKind::Join(member(2, 1)));
    c.propose_refused(member(1, 1), ProposalKind::Join(member(3, 1)));
    c.propose_ok(member(1, 1), ProposalKind::Join(member(2, 2)));
    assert_eq!(c.vol().replica(NodeId(2)).unwrap().last_member, Some(member(2, 2).incarnation));
    // In sync as an older run: that one goes first.
    c.register(2, 3);
    c.propose_refused(member(1, 1), ProposalKind::Join(member(2, 3)));
    c.propose_refused(member(1, 1), ProposalKind::Move(member(2, 2)));
    let op = c.promote(member(2, 2), false);
    c.refused(op);
}

#[test]
fn handing_over_leaves_the_set_and_moving_does_not() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::HandOver(member(2, 1)));
    assert_eq!((c.vol().primary, c.vol().in_sync.clone()), (Some(member(2, 1)), vec![member(2, 1)]));
}

#[test]
fn a_demoted_volume_gets_a_primary_from_an_operator_alone() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Demote);
    let op = c.promote(member(2, 1), false);
    c.refused(op);
    c.register(1, 2);
    c.register(2, 2);
    let op = c.promote_restarted(member(2, 2), false);
    c.refused(op);
    let op = c.promote_restarted(member(2, 2), true);
    c.must(op);
    assert!(!c.vol().demoted);
}

#[test]
fn r6_a_restarted_member_takes_over_only_if_every_member_restarted() {
    let mut c = Cluster::pair();
    c.register(1, 2);
    let op = c.promote_restarted(member(1, 2), false);
    let why = c.refused(op);
    assert!(why.contains("node 2"), "{why}");
    c.register(2, 2);
    let op = c.promote_restarted(member(2, 1), false);
    c.refused(op);
    let op = c.promote_restarted(member(2, 2), false);
    c.must(op);
    assert_eq!(c.vol().in_sync, [member(2, 2)]);
    assert_eq!(c.vol().continued_from, [member(2, 1).incarnation]);
    // Again, before it served: the chain grows; any other change ends it.
    c.register(2, 3);
    let op = c.promote_restarted(member(2, 3), false);
    c.must(op);
    assert_eq!(c.vol().continued_from.len(), 2);
    c.propose_ok(member(2, 3), ProposalKind::Bump);
    assert!(c.vol().continued_from.is_empty());
}

#[test]
fn r6_a_chain_of_restarts_that_served_nothing_forgets_its_oldest_runs() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
    for boot in 2..=20 {
        c.register(1, boot);
        let op = c.promote_restarted(member(1, boot), false);
        c.must(op);
    }
    // A copy that stems from a forgotten run is not taken for it: it is promoted by force only.
    let remembered: Vec<_> = (4..=19).map(|boot| member(1, boot).incarnation).collect();
    assert_eq!(c.vol().continued_from, remembered);
    let named = member(1, 20);
    eligible_restarted(c.vol(), named, &c.report(remembered[0])).unwrap();
    eligible_restarted(c.vol(), named, &c.report(member(1, 3).incarnation)).unwrap_err();
}

#[test]
fn r17_a_force_forks_the_lineage_and_begins_a_reign() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
    let op = c.force(member(2, 1), 1, 2);
    c.refused(op);
    let op = c.force(member(2, 1), 2, 9);
    c.refused(op);
    let op = c.force(member(2, 1), 2, 2);
    c.must(op);
    let v = c.vol();
    assert_eq!(v.history, [LineageFork { lineage: LineageId(1), fork_epoch: Epoch(2) }]);
    assert_eq!((v.lineage, v.in_sync.clone()), (LineageId(2), vec![member(2, 1)]));
    assert_eq!(v.reign.0, v.epoch.0);
    let op = c.force(member(2, 1), 1, 2);
    c.refused(op);
    // Onto the primary itself.
    let op = c.force(member(2, 1), 3, 4);
    c.must(op);
    assert_eq!(c.vol().reign.0, c.vol().epoch.0);
}

/// What the copy that was forced on lacks of a lineage, it lacks of all before it as well.
#[test]
fn r17_a_force_onto_an_older_copy_leaves_no_lineage_with_more_in_common_than_that_copy_holds() {
    let mut c = Cluster::new(&[1, 2, 4]);
    for other in [2, 4] {
        c.propose_ok(member(1, 1), ProposalKind::Join(member(other, 1)));
    }
    // Node 2 left after epoch 3, node 4 after epoch 4: it holds writes of epoch 4 that 2 lacks.
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(4, 1)));
    let op = c.force(member(1, 1), 2, 5);
    c.must(op);
    let op = c.force(member(2, 1), 3, 3);
    c.must(op);
    let fork = |lineage| LineageFork { lineage: LineageId(lineage), fork_epoch: Epoch(3) };
    assert_eq!(c.vol().history, [fork(1), fork(2)]);
}

#[test]
fn r17_a_copy_shares_with_the_present_lineage_no_more_than_its_own_did() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
    let copy = |lineage, epoch| ReplicaReport {
        lineage: LineageId(lineage),
        epoch: Epoch(epoch),
        ..c.report(member(2, 1).incarnation).report
    };
    let (old, present, unknown) = (copy(1, 2), copy(2, 4), copy(7, 4));
    assert_eq!(c.vol().shared_epoch(&old), Epoch(2), "of this lineage: what it holds");
    // Node 2 was made anew: its copy holds no epoch.
    let op = c.force(member(2, 1), 2, 0);
    c.must(op);
    assert_eq!(c.vol().shared_epoch(&old), Epoch(0));
    assert_eq!(c.vol().shared_epoch(&present), Epoch(4));
    assert_eq!(c.vol().shared_epoch(&unknown), Epoch(0));
}

#[test]
fn r25_a_resize_only_grows_and_needs_every_member_ready() {
    let mut c = Cluster::pair();
    let op = |c: &Cluster, size, prepared: &[(Member, u64)]| ClusterOp::Resize {
        volume: VOL,
        expected_epoch: c.epoch(),
        size,
        prepared: prepared.iter().map(|(member, size)| Prepared { member: *member, size: *size }).collect(),
    };
    let (a, b) = (member(1, 1), member(2, 1));
    let bad = [
        op(&c, 1 << 20, &[(a, 1 << 30), (b, 1 << 30)]),
        op(&c, 2 << 20, &[(a, 2 << 20)]),
        op(&c, 2 << 20, &[(a, 2 << 20), (b, 1 << 20)]),
        op(&c, 2 << 20, &[(a, 2 << 20), (member(2, 2), 2 << 20)]),
        op(&c, (2 << 20) + 1, &[(a, 4 << 20), (b, 4 << 20)]),
    ];
    for op in bad {
        c.refused(op);
    }
    let good = op(&c, 2 << 20, &[(a, 2 << 20), (b, 3 << 20)]);
    c.must(good);
    assert_eq!((c.vol().geometry.size(), c.vol().epoch, c.vol().reign), (2 << 20, Epoch(3), Reign(1)));
}

#[test]
fn a_retried_request_gets_its_result_and_has_no_second_effect() {
    let mut c = Cluster::pair();
    let request =
        RequestId { node: NodeId(1), incarnation: member(1, 1).incarnation, volume: Some(VOL), number: 5 };
    let bump = c.proposal(member(1, 1), ProposalKind::Bump);
    let first = c.apply_as(request, bump.clone());
    let epoch = c.epoch();
    assert_eq!(c.apply_as(request, bump.clone()), first);
    assert_eq!(c.epoch(), epoch);
    let refused = RequestId { number: 6, ..request };
    let why = c.apply_as(refused, bump.clone());
    assert!(matches!(why, Applied::Refused(_)));
    assert_eq!(c.apply_as(refused, bump), why);
    // The memory is bounded.
    for _ in 0..200 {
        c.propose_ok(member(1, 1), ProposalKind::Bump);
    }
    let most = super::REQUESTS_REMEMBERED_MAX + super::PROPOSALS_REMEMBERED_MAX;
    assert!(c.state.recent.values().all(|r| r.len() <= most));
}

#[test]
fn r1_what_was_judged_under_another_leadership_has_no_effect_and_may_be_tried_again() {
    let mut c = Cluster::pair();
    let [mine, other] = [3, 4].map(|term| Leadership { term, node: NodeId(3) });
    let request = RequestId { node: NodeId(3), incarnation: Incarnation::default(), volume: None, number: 1 };
    let op = c.promote(member(2, 1), false);
    let command = Command { request, only_under: Some(mine), op };
    let index = LogIndex(100);
    assert_eq!(apply_under(&mut c.state, index, other, command.clone()), None);
    assert_eq!((c.vol().primary, c.state.applied), (Some(member(1, 1)), index));
    assert!(apply_under(&mut c.state, LogIndex(101), mine, command).unwrap().is_done());
    assert_eq!(c.vol().primary, Some(member(2, 1)));
}

/// The data path is fenced by the reign: two primaries of one Raft term have two of them.
#[test]
fn every_change_of_primary_begins_a_reign_whatever_the_raft_term() {
    let mut c = Cluster::pair();
    let leadership = Leadership { term: 1, node: NodeId(3) };
    for (number, to) in [(1, member(2, 1)), (2, member(1, 1))] {
        let request =
            RequestId { node: NodeId(3), incarnation: Incarnation::default(), volume: None, number };
        let (before, index) = (c.vol().reign, LogIndex(c.state.applied.0 + 1));
        let command = Command { request, only_under: Some(leadership), op: c.promote(to, false) };
        assert!(apply_under(&mut c.state, index, leadership, command).unwrap().is_done());
        assert!(c.vol().reign > before);
        assert_eq!(c.vol().reign.0, c.vol().epoch.0);
    }
}

#[test]
fn r13_a_node_id_is_not_given_twice() {
    let mut c = Cluster::new(&[1, 2]);
    let why = c.refused(ClusterOp::AddNode(record(2, NodeKind::Data)));
    assert!(why.contains("exists with store"), "{why}");
    c.refused(ClusterOp::RemoveNode { node: NodeId(2) });
    let epoch = c.epoch();
    c.refused(ClusterOp::RemoveReplica { volume: VOL, expected_epoch: epoch, node: NodeId(1) });
    c.must(ClusterOp::RemoveReplica { volume: VOL, expected_epoch: epoch, node: NodeId(2) });
    c.must(ClusterOp::RemoveNode { node: NodeId(2) });
    let why = c.refused(ClusterOp::AddNode(record(2, NodeKind::Data)));
    assert!(why.contains("never reused"), "{why}");
    c.must(ClusterOp::AddNode(record(4, NodeKind::Data)));
    let epoch = c.epoch();
    c.must(ClusterOp::AddReplica { volume: VOL, expected_epoch: epoch, node: NodeId(4) });
    // The slot of the removed replica stays used.
    assert_eq!(c.vol().replica(NodeId(4)).unwrap().slot.0, 2);
}

#[test]
fn names_sizes_and_leases_are_checked() {
    let mut c = Cluster::new(&[1, 2]);
    let create = |name: &str, id, first: Member| ClusterOp::CreateVolume {
        id: crate::types::VolumeId(id),
        name: name.into(),
        geometry: Geometry::new(1 << 20, 4096, 65536).unwrap(),
        settings: VolumeSettings::default(),
        replicas: vec![NodeId(1), NodeId(2)],
        first,
        lineage: LineageId(5),
    };
    c.refused(create("vol0", 8, member(1, 1)));
    c.refused(create("", 8, member(1, 1)));
    c.refused(create("a/b", 8, member(1, 1)));
    c.refused(create("vol1", 7, member(1, 1)));
    c.refused(create("vol1", 8, member(1, 2)));
    c.refused(create("vol1", 8, member(3, 1)));
    c.must(create("vol1", 8, member(2, 1)));
    c.refused(ClusterOp::SetLease { lease: Duration::from_millis(1) });
    c.must(ClusterOp::SetLease { lease: Duration::from_secs(9) });
    c.must(ClusterOp::SetLease { lease: Duration::from_secs(1) });
    assert_eq!(c.state.lease_longest, Duration::from_secs(9));
    let change = |epoch, disk_timeout| ClusterOp::ChangeSettings {
        volume: VOL,
        expected_epoch: epoch,
        settings: VolumeSettings { disk_timeout, ..VolumeSettings::default() },
    };
    c.refused(change(c.epoch(), TIMEOUT_MAX + Duration::from_nanos(1)));
    c.must(change(c.epoch(), TIMEOUT_MAX));
}

#[test]
fn settings_that_no_replica_can_work_with_are_refused() {
    let mut c = Cluster::new(&[1, 2]);
    let good = VolumeSettings::default();
    let change = |c: &Cluster, settings| ClusterOp::ChangeSettings {
        volume: VOL,
        expected_epoch: c.epoch(),
        settings,
    };
    for bad in [
        VolumeSettings { peer_timeout: Duration::MAX, ..good },
        VolumeSettings { disk_timeout: Duration::ZERO, ..good },
        VolumeSettings { resync_latency_budget: Duration::ZERO, ..good },
        VolumeSettings { resync_latency_budget: Duration::MAX, ..good },
        VolumeSettings { peer_timeout: Duration::from_millis(199), ..good },
        VolumeSettings { disk_timeout: Duration::from_millis(999), ..good },
        VolumeSettings { resync_window_bytes: (64 << 20) + 1, ..good },
        VolumeSettings { intent_regions_max: 0, ..good },
        VolumeSettings { resync_window_bytes: 1, ..good },
    ] {
        let op = change(&c, bad);
        c.refused(op);
    }
    let op = change(&c, VolumeSettings { peer_timeout: Duration::from_secs(2), ..good });
    c.must(op);
}

/// A replica that is told "refused" of its move serves again, so a move that took effect must not be
/// forgotten while it still asks, whatever else its node asks meanwhile [R18].
#[test]
fn r18_other_requests_of_a_node_do_not_make_a_replicas_proposal_forgotten() {
    let mut c = Cluster::pair();
    let op = c.proposal(member(1, 1), ProposalKind::Move(member(2, 1)));
    let request =
        |volume, number| RequestId { node: NodeId(1), incarnation: member(1, 1).incarnation, volume, number };
    let done = c.apply_as(request(Some(VOL), 1), op.clone());
    assert!(done.is_done());
    let lease = |ms| ClusterOp::SetLease { lease: Duration::from_millis(ms) };
    for number in 0..200 {
        // Of the node itself, and of a volume that is no more.
        c.apply_as(request(None, number), lease(1000 + number));
        c.apply_as(request(Some(crate::types::VolumeId(5)), number), lease(1000 + number));
    }
    assert_eq!(c.apply_as(request(Some(VOL), 1), op), done);
    let most = super::REQUESTS_REMEMBERED_MAX + super::PROPOSALS_REMEMBERED_MAX;
    assert!(c.state.recent.values().all(|r| r.len() <= most));
    for number in 2..20 {
        c.apply_as(request(Some(VOL), number), lease(1000 + number));
    }
    assert!(c.state.recent.values().all(|r| r.len() <= most));
}

#[test]
fn nothing_happens_before_the_cluster_is_initialised() {
    let mut state = ClusterState::default();
    let request = RequestId { node: NodeId(1), incarnation: Incarnation::default(), volume: None, number: 1 };
    let op = Cluster::registration(member(1, 1));
    let applied = apply(&mut state, LogIndex(1), Command { request, only_under: None, op });
    assert!(matches!(applied, Applied::Refused(_)));
}

/// A random step; members are drawn from few nodes and runs so that many hit.
#[derive(Clone, Debug)]
enum Step {
    Register(u64, u64),
    Propose(Member, ProposalKind),
    Promote(Member, bool),
    Restarted(Member, bool),
    Force(Member, u64),
    Replica(u64, bool),
}

fn members() -> impl Strategy<Value = Member> {
    (1u64..5, 1u64..4).prop_map(|(node, boot)| member(node, boot))
}

fn steps() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        members().prop_map(ProposalKind::Remove),
        members().prop_map(ProposalKind::Join),
        members().prop_map(ProposalKind::Move),
        members().prop_map(ProposalKind::HandOver),
        Just(ProposalKind::Demote),
        Just(ProposalKind::Bump),
    ];
    prop_oneof![
        1 => (1u64..5, 1u64..4).prop_map(|(n, b)| Step::Register(n, b)),
        6 => (members(), kind).prop_map(|(by, kind)| Step::Propose(by, kind)),
        2 => (members(), any::<bool>()).prop_map(|(m, o)| Step::Promote(m, o)),
        2 => (members(), any::<bool>()).prop_map(|(m, o)| Step::Restarted(m, o)),
        1 => (members(), 0u64..4).prop_map(|(m, e)| Step::Force(m, e)),
        1 => (1u64..6, any::<bool>()).prop_map(|(n, add)| Step::Replica(n, add)),
    ]
}

fn op_of(c: &mut Cluster, step: &Step, lineage: u128) -> ClusterOp {
    let (volume, expected_epoch) = (VOL, c.epoch());
    match *step {
        Step::Register(node, boot) => Cluster::registration(member(node, boot)),
        // Half of the time the right proposer, whoever was drawn.
        Step::Propose(by, kind) => {
            let by = c.vol().primary.filter(|_| by.incarnation.boot > 1).unwrap_or(by);
            c.proposal(by, kind)
        }
        Step::Promote(to, operator) => c.promote(to, operator),
        Step::Restarted(to, operator) => c.promote_restarted(to, operator),
        Step::Force(to, fork) => c.force(to, lineage, fork),
        Step::Replica(node, true) => ClusterOp::AddReplica { volume, expected_epoch, node: NodeId(node) },
        Step::Replica(node, false) => ClusterOp::RemoveReplica { volume, expected_epoch, node: NodeId(node) },
    }
}

proptest! {
    #[test]
    fn random_commands_keep_the_invariants(steps in proptest::collection::vec(steps(), 1..80)) {
        let mut c = Cluster::new(&[1, 2, 4]);
        // What a restart reads is what was.
        let survives = |state: &ClusterState| codec::decode(&codec::encode(state).unwrap()).as_ref() == Ok(state);
        for (lineage, step) in (100u128..).zip(&steps) {
            let before = c.vol().clone();
            let op = op_of(&mut c, step, lineage);
            let about_volume = !matches!(op, ClusterOp::Register { .. });
            let done = c.apply(op).is_done();
            let v = c.vol();
            prop_assert_eq!(c.state.check(), Ok(()));
            prop_assert_eq!(v.epoch.0, before.epoch.0 + u64::from(done && about_volume));
            prop_assert!(v.reign >= before.reign);
            if v.primary.is_some() && v.primary != before.primary {
                prop_assert_eq!(v.reign.0, v.epoch.0);
            }
            if v.primary == before.primary && v.lineage == before.lineage {
                prop_assert_eq!(v.reign, before.reign);
            }
            // [R9]: nobody but a proposal, a restart or a force changes membership.
            if matches!(step, Step::Promote(..) | Step::Register(..) | Step::Replica(..)) {
                prop_assert_eq!(&v.in_sync, &before.in_sync);
            }
        }
        prop_assert!(survives(&c.state));
    }

    /// The model of what is remembered: by origin (a node, or one of its replicas), the last few results in
    /// order. A request in it gets its result again and has no effect; any other is judged anew [R18].
    #[test]
    fn r18_a_retry_gets_its_result_while_it_is_remembered(
        steps in proptest::collection::vec((1u64..3, 0u8..4, 0usize..12, 100u64..400), 1..300)
    ) {
        let mut c = Cluster::pair();
        c.state.recent.clear();
        let mut model: Remembered = Vec::new();
        let mut number = 0;
        for (node, volume, back, ms) in steps {
            // One volume that exists, one that does not (its requests are the node's own), or none.
            let volume = [None, None, Some(VOL), Some(crate::types::VolumeId(5))][usize::from(volume)];
            number += 1;
            let request = RequestId {
                node: NodeId(node),
                incarnation: member(node, 1).incarnation,
                volume,
                number: number - (back as u64).min(number - 1),
            };
            let op = ClusterOp::SetLease { lease: Duration::from_millis(ms) };
            let (before, state) = (c.state.lease, c.state.recent.clone());
            let applied = c.apply_as(request, op);
            let origin = (node, volume.filter(|v| *v == VOL));
            let most = if origin.1.is_some() { 4 } else { 64 };
            if let Some((.., known)) = model.iter().find(|(_, id, _)| *id == request) {
                prop_assert_eq!(&applied, known);
                prop_assert_eq!((c.state.lease, &c.state.recent), (before, &state));
                continue;
            }
            prop_assert!(applied.is_done() && c.state.lease == Duration::from_millis(ms));
            model.push((origin, request, applied));
            let of_origin: Vec<usize> = (0..model.len()).filter(|at| model[*at].0 == origin).collect();
            if of_origin.len() > most {
                model.remove(of_origin[0]);
            }
        }
        let kept: usize = c.state.recent.values().map(std::collections::VecDeque::len).sum();
        prop_assert_eq!(kept, model.len());
    }
}

/// Origin (node, and volume if a replica asked), request, result; oldest first.
type Remembered = Vec<((u64, Option<crate::types::VolumeId>), RequestId, Applied)>;
