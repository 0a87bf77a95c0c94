//! Tests of both sides of leases, schedule by schedule.

use std::time::Duration;

use proptest::prelude::*;

use crate::types::{LogIndex, Member, Nanos, NodeId, ProposalKind};

use super::super::command::{ClusterOp, Leadership};
use super::super::fixture::{Cluster, VOL, member};
use super::{LeaseTable, NodeLease};

const MS: u64 = 1_000_000;
const LEAD: Leadership = Leadership { term: 5, node: NodeId(3) };

fn ms(n: u64) -> Nanos {
    Nanos(n * MS)
}

/// A leader whose quiet time is over, at 10 s.
fn settled(c: &Cluster) -> LeaseTable {
    let mut table = LeaseTable::default();
    table.became_leader(LEAD, ms(0), c.state.applied);
    table
}

fn grant(
    table: &mut LeaseTable,
    c: &Cluster,
    m: Member,
    nonce: u64,
    at: u64,
) -> Result<super::Grant, String> {
    table.grant(&c.state, LEAD, c.state.applied, m, nonce, ms(at))
}

#[test]
fn r1_a_new_leader_waits_the_longest_lease_before_it_judges() {
    let mut c = Cluster::pair();
    c.must(ClusterOp::SetLease { lease: Duration::from_secs(10) });
    c.must(ClusterOp::SetLease { lease: Duration::from_millis(1500) });
    let mut table = LeaseTable::default();
    assert!(!table.lease_over(&c.state, VOL, member(1, 1), ms(100_000)), "not a leader judges nothing");
    table.became_leader(LEAD, ms(1000), c.state.applied);
    assert!(!table.lease_over(&c.state, VOL, member(1, 1), ms(1000 + 10_099)));
    assert!(table.lease_over(&c.state, VOL, member(1, 1), ms(1000 + 10_100)));
    // Seen again: the clock does not start anew. Another leadership: it does.
    table.became_leader(LEAD, ms(9000), c.state.applied);
    assert!(table.lease_over(&c.state, VOL, member(1, 1), ms(1000 + 10_100)));
    table.became_leader(Leadership { term: 6, ..LEAD }, ms(9000), c.state.applied);
    assert!(!table.lease_over(&c.state, VOL, member(1, 1), ms(1000 + 10_100)));
}

#[test]
fn r1_no_grant_before_the_log_found_at_the_start_is_applied() {
    let c = Cluster::pair();
    let mut table = LeaseTable::default();
    table.became_leader(LEAD, ms(0), LogIndex(c.state.applied.0 + 1));
    assert!(grant(&mut table, &c, member(1, 1), 1, 100).is_err());
    let read = LogIndex(c.state.applied.0 + 1);
    let mut table = settled(&c);
    assert!(table.grant(&c.state, LEAD, read, member(1, 1), 1, ms(1)).is_err());
    let stale = Leadership { term: 4, ..LEAD };
    assert!(table.grant(&c.state, stale, c.state.applied, member(1, 1), 1, ms(1)).is_err());
    assert!(grant(&mut table, &c, member(1, 1), 1, 1).is_ok());
}

#[test]
fn r1_the_leader_counts_longer_than_the_node() {
    let c = Cluster::pair();
    let mut table = settled(&c);
    let mut node = NodeLease::new(NodeId(1), member(1, 1).incarnation);
    node.on_send(7, ms(10_000));
    let grant = grant(&mut table, &c, member(1, 1), 7, 10_300).unwrap();
    assert!(node.on_grant(&grant, c.state.applied));
    assert_eq!(node.snapshot().until(VOL), Some(ms(11_500)));
    assert!(!table.lease_over(&c.state, VOL, member(1, 1), ms(11_814)));
    assert!(table.lease_over(&c.state, VOL, member(1, 1), ms(11_815)));
}

#[test]
fn r1_an_excluded_volume_runs_out_although_its_node_renews() {
    let c = Cluster::pair();
    let mut table = settled(&c);
    grant(&mut table, &c, member(1, 1), 1, 10_000).unwrap();
    let id = table.exclude(VOL, NodeId(1), c.epoch());
    for at in [10_400, 10_800, 11_200, 11_600] {
        assert_eq!(grant(&mut table, &c, member(1, 1), at, at).unwrap().excluded, [VOL]);
        let over = table.lease_over(&c.state, VOL, member(1, 1), ms(at));
        assert_eq!(over, at >= 11_515, "at {at}");
    }
    // Other volumes are covered as before.
    assert!(!table.lease_over(&c.state, crate::types::VolumeId(8), member(1, 1), ms(11_600)));
    // The fate is known: the next grants cover it again, and name an index behind the fate.
    let fate = LogIndex(c.state.applied.0 + 5);
    table.lift(id, fate);
    let after = grant(&mut table, &c, member(1, 1), 9, 12_000).unwrap();
    assert!(after.excluded.is_empty());
    assert_eq!(after.applied, fate);
}

#[test]
fn r1_a_grant_confirmed_before_a_promotion_is_useless_after_it() {
    // Race: the renewal was confirmed (read index taken) before the promotion was proposed, the grant is
    // made after it was applied and its exclusion lifted.
    let mut c = Cluster::pair();
    let mut table = settled(&c);
    let mut old = NodeLease::new(NodeId(1), member(1, 1).incarnation);
    old.on_send(1, ms(10_000));
    let (confirmed, applied_at_node) = (c.state.applied, c.state.applied);
    let id = table.exclude(VOL, NodeId(1), c.epoch());
    assert!(table.lease_over(&c.state, VOL, member(1, 1), ms(10_000)));
    let op = c.promote(member(2, 1), false);
    c.must(op);
    table.lift(id, c.state.applied);
    let grant = table.grant(&c.state, LEAD, confirmed, member(1, 1), 1, ms(10_050)).unwrap();
    assert!(old.on_grant(&grant, applied_at_node));
    assert_eq!(old.snapshot().until(VOL), None, "the node has not applied the promotion");
    old.on_applied(c.state.applied);
    assert!(old.snapshot().until(VOL).is_some(), "now it knows that it is not primary");
}

#[test]
fn r1_exclusions_are_lifted_one_by_one_and_when_the_epoch_moved_on() {
    let mut c = Cluster::pair();
    let mut table = settled(&c);
    let a = table.exclude(VOL, NodeId(1), c.epoch());
    let _b = table.exclude(VOL, NodeId(1), c.epoch());
    table.lift(a, LogIndex(0));
    assert_eq!(table.excluded(NodeId(1)), [VOL]);
    table.lift_void(&c.state);
    assert_eq!(table.excluded(NodeId(1)), [VOL], "the entry may still be applied");
    c.propose_ok(member(1, 1), ProposalKind::Bump);
    table.lift_void(&c.state);
    assert!(table.excluded(NodeId(1)).is_empty());
    let next = grant(&mut table, &c, member(1, 1), 1, 10_000).unwrap();
    assert!(next.applied >= c.state.applied);
}

#[test]
fn an_unhealthy_volume_is_not_vouched_for_until_it_is_healthy_again() {
    let c = Cluster::pair();
    let mut table = settled(&c);
    grant(&mut table, &c, member(1, 1), 1, 10_000).unwrap();
    table.set_healthy(VOL, NodeId(1), false);
    assert_eq!(grant(&mut table, &c, member(1, 1), 2, 10_400).unwrap().excluded, [VOL]);
    let id = table.exclude(VOL, NodeId(1), c.epoch());
    table.set_healthy(VOL, NodeId(1), true);
    assert_eq!(table.excluded(NodeId(1)), [VOL], "the proposal still holds it");
    table.lift(id, LogIndex(0));
    assert!(table.excluded(NodeId(1)).is_empty());
}

#[test]
fn r2_a_newer_run_ends_the_lease_of_the_older_at_once() {
    let mut c = Cluster::pair();
    let mut table = settled(&c);
    grant(&mut table, &c, member(1, 1), 1, 10_000).unwrap();
    assert!(!table.lease_over(&c.state, VOL, member(1, 1), ms(10_100)));
    c.register(1, 2);
    assert!(table.lease_over(&c.state, VOL, member(1, 1), ms(10_100)));
    assert!(grant(&mut table, &c, member(1, 1), 2, 10_100).is_err());
    assert!(grant(&mut table, &c, member(1, 2), 3, 10_100).is_ok());
    assert!(!table.is_alive(member(1, 1), ms(10_101)));
    assert!(table.is_alive(member(1, 2), ms(10_101)));
}

#[test]
fn r2_r10_a_grant_counts_for_exactly_one_run_and_one_request() {
    let c = Cluster::pair();
    let mut table = settled(&c);
    let good = grant(&mut table, &c, member(1, 1), 7, 10_000).unwrap();
    let mut node = NodeLease::new(NodeId(1), member(1, 1).incarnation);
    assert!(!node.on_grant(&good, c.state.applied), "nothing was asked");
    node.on_send(8, ms(10_000));
    assert!(!node.on_grant(&good, c.state.applied), "an answer to an older request");
    node.on_send(7, ms(10_000));
    let other = super::Grant { incarnation: member(1, 2).incarnation, ..good.clone() };
    assert!(!node.on_grant(&other, c.state.applied));
    assert!(node.on_grant(&good, c.state.applied));
    assert!(!node.on_grant(&good, c.state.applied), "once");
}

#[test]
fn r1_an_exclusion_counts_at_once_and_its_end_waits_for_the_index() {
    let c = Cluster::pair();
    let mut node = NodeLease::new(NodeId(1), member(1, 1).incarnation);
    let grant = |nonce, excluded: &[_], applied| super::Grant {
        node: NodeId(1),
        incarnation: member(1, 1).incarnation,
        nonce,
        length: c.state.lease,
        excluded: excluded.to_vec(),
        applied: LogIndex(applied),
    };
    node.on_send(1, ms(1000));
    node.on_grant(&grant(1, &[], 10), LogIndex(10));
    assert!(node.snapshot().until(VOL).is_some());
    node.on_send(2, ms(1400));
    node.on_grant(&grant(2, &[VOL], 20), LogIndex(10));
    assert_eq!(node.snapshot().until(VOL), None);
    node.on_send(3, ms(1800));
    node.on_grant(&grant(3, &[], 30), LogIndex(20));
    assert_eq!(node.snapshot().until(VOL), None);
    assert_eq!(node.snapshot().until, ms(2900));
    node.on_applied(LogIndex(30));
    assert_eq!(node.snapshot().until(VOL), Some(ms(3300)));
}

/// Steps of a random race between renewals of node 1 and changes of primary, seen by one leader.
#[derive(Clone, Copy, Debug)]
enum Step {
    Pass(u64),
    Send,
    Confirm,
    Grant,
    Deliver,
    NodeApplies,
    Promote(bool),
    Commit,
}

proptest! {
    /// Whatever the order of sending, confirming, granting, delivering, judging and committing: while node
    /// 2 is primary by the committed state, node 1 never believes that it may serve.
    #[test]
    fn r1_leases_of_two_primaries_never_overlap(steps in proptest::collection::vec(
        prop_oneof![
            3 => (1u64..700).prop_map(Step::Pass),
            2 => Just(Step::Send), 2 => Just(Step::Confirm), 2 => Just(Step::Grant), 2 => Just(Step::Deliver),
            1 => Just(Step::NodeApplies), 2 => any::<bool>().prop_map(Step::Promote), 1 => Just(Step::Commit),
        ], 1..120)) {
        let mut c = Cluster::pair();
        let mut at_node = c.state.clone();
        let mut table = settled(&c);
        let mut node = NodeLease::new(NodeId(1), member(1, 1).incarnation);
        let (mut now, mut nonce) = (2000u64, 0u64);
        let (mut asked, mut confirmed, mut granted, mut pending) = (None, None, None, None);
        for step in steps {
            match step {
                Step::Pass(n) => now += n,
                Step::Send => {
                    nonce += 1;
                    node.on_send(nonce, ms(now));
                    asked = Some(nonce);
                }
                Step::Confirm => confirmed = asked.take().map(|n| (n, c.state.applied)).or(confirmed),
                Step::Grant => if let Some((n, read)) = confirmed.take() {
                    granted = table.grant(&c.state, LEAD, read, member(1, 1), n, ms(now)).ok();
                },
                Step::Deliver => if let Some(g) = granted.take() {
                    node.on_grant(&g, at_node.applied);
                },
                Step::NodeApplies => {
                    at_node = c.state.clone();
                    node.on_applied(at_node.applied);
                }
                Step::Promote(wait) => {
                    let v = c.vol();
                    if pending.is_none() && let Some(primary) = v.primary {
                        let to = if primary == member(1, 1) { member(2, 1) } else { member(1, 1) };
                        let id = table.exclude(VOL, primary.node, v.epoch);
                        if wait {
                            now += 1600;
                        }
                        if table.lease_over(&c.state, VOL, primary, ms(now)) {
                            pending = Some((id, c.promote(to, false)));
                        } else {
                            table.lift(id, LogIndex(0));
                        }
                    }
                }
                Step::Commit => if let Some((id, op)) = pending.take() {
                    c.must(op);
                    table.lift(id, c.state.applied);
                },
            }
            let believes = at_node.volumes[&VOL].primary == Some(member(1, 1))
                && node.snapshot().until(VOL).is_some_and(|until| ms(now) < until);
            let other = c.vol().primary == Some(member(2, 1));
            prop_assert!(!(believes && other), "two primaries at {now} ms");
        }
    }
}
