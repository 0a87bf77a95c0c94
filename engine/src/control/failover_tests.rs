//! Scenario tests of the failover controller.

use crate::types::{Health, LogIndex, Member, Nanos, NodeId, ProposalKind, SuperblockTrust};

use super::command::{ClusterOp, Leadership};
use super::failover::{Decisions, Failover, NodeReport, Reports, VolumeReport};
use super::fixture::{Cluster, VOL, member};
use super::lease::LeaseTable;

const MS: u64 = 1_000_000;
const LEAD: Leadership = Leadership { term: 2, node: NodeId(3) };

struct Scene {
    c: Cluster,
    table: LeaseTable,
    reports: Reports,
    failover: Failover,
    now: u64,
}

impl Scene {
    /// Led since 0; at 10 s, nobody has renewed.
    fn new(c: Cluster) -> Self {
        let mut table = LeaseTable::default();
        table.became_leader(LEAD, Nanos(0), LogIndex(0));
        Self { c, table, reports: Reports::new(), failover: Failover::default(), now: 10_000 }
    }

    fn renew(&mut self, m: Member, report: Option<VolumeReport>) {
        let now = Nanos(self.now * MS);
        self.table.grant(&self.c.state, LEAD, LogIndex(0), m, 1, now).unwrap();
        let volumes = report.map(|r| (VOL, r)).into_iter().collect();
        self.reports.insert(m.node, NodeReport { member: m, volumes });
    }

    fn healthy(&mut self, m: Member) {
        let report = self.c.report(m.incarnation);
        self.renew(m, Some(report));
    }

    fn decide(&mut self) -> Decisions {
        self.failover.decide(&self.c.state, &self.table, &self.reports, Nanos(self.now * MS))
    }

    fn promoted(&mut self) -> Option<Member> {
        match self.decide().proposals.as_slice() {
            [] => None,
            [ClusterOp::Promote { to, operator: false, .. }]
            | [ClusterOp::PromoteRestarted { to, operator: false, .. }] => Some(*to),
            other => panic!("unexpected {other:?}"),
        }
    }

    fn blocked(&mut self) -> String {
        let d = self.decide();
        assert!(d.proposals.is_empty(), "{d:?}");
        d.blocked[&VOL].clone()
    }
}

#[test]
fn a_dead_primary_is_replaced_by_a_live_member_and_not_before_its_lease_ran_out() {
    let mut s = Scene::new(Cluster::pair());
    s.healthy(member(1, 1));
    s.healthy(member(2, 1));
    assert_eq!(s.decide(), Decisions::default());
    s.now += 1400;
    s.healthy(member(2, 1));
    assert_eq!(s.decide(), Decisions::default());
    s.now += 115;
    assert_eq!(s.promoted(), Some(member(2, 1)));
}

#[test]
fn r2_a_primary_that_restarted_is_replaced_at_once() {
    let mut s = Scene::new(Cluster::pair());
    s.healthy(member(1, 1));
    s.healthy(member(2, 1));
    s.c.register(1, 2);
    assert_eq!(s.promoted(), Some(member(2, 1)));
}

#[test]
fn nobody_outside_the_in_sync_set_is_promoted() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
    let mut s = Scene::new(c);
    s.healthy(member(2, 1));
    let why = s.blocked();
    assert!(why.contains("n1 is in sync") && why.contains("force"), "{why}");
}

#[test]
fn a_demoted_volume_is_left_alone() {
    let mut c = Cluster::pair();
    c.propose_ok(member(1, 1), ProposalKind::Demote);
    let mut s = Scene::new(c);
    s.healthy(member(2, 1));
    assert_eq!(s.decide(), Decisions::default());
}

#[test]
fn an_unhealthy_member_is_not_promoted_and_an_unhealthy_primary_is_replaced_after_its_lease() {
    let mut s = Scene::new(Cluster::pair());
    s.healthy(member(2, 1));
    s.healthy(member(1, 1));
    let mut sick = s.c.report(member(1, 1).incarnation);
    sick.health = Health::Unhealthy("disk".into());
    s.table.set_healthy(VOL, NodeId(1), false);
    for _ in 0..4 {
        s.now += 375;
        s.renew(member(1, 1), Some(sick.clone()));
        s.healthy(member(2, 1));
        assert_eq!(s.decide(), Decisions::default());
    }
    s.now += 20;
    assert_eq!(s.promoted(), Some(member(2, 1)));
    // The other way round: the only other member is sick.
    let mut sick = s.c.report(member(2, 1).incarnation);
    sick.health = Health::Unhealthy("disk".into());
    s.renew(member(2, 1), Some(sick));
    let why = s.blocked();
    assert!(why.contains("unhealthy"), "{why}");
}

#[test]
fn a_member_without_a_report_of_the_volume_is_not_promoted() {
    let mut s = Scene::new(Cluster::pair());
    s.renew(member(2, 1), None);
    assert!(s.promoted().is_none());
}

#[test]
fn r6_a_lone_primary_that_restarted_takes_over_itself() {
    let mut s = Scene::new(Cluster::new(&[1, 2]));
    s.c.register(1, 2);
    assert!(s.blocked().contains("has not reported"));
    let report = s.c.report(member(1, 1).incarnation);
    s.renew(member(1, 2), Some(report));
    assert_eq!(s.promoted(), Some(member(1, 2)));
}

#[test]
fn r6_if_a_member_never_returns_nothing_happens() {
    let mut s = Scene::new(Cluster::pair());
    s.c.register(1, 2);
    let report = s.c.report(member(1, 1).incarnation);
    for _ in 0..100 {
        s.now += 500;
        s.renew(member(1, 2), Some(report.clone()));
        assert!(s.blocked().contains("n2"));
    }
}

/// Both members restarted; `edit` changes the reports of nodes 1 and 2.
fn restarted(edit: impl Fn(&mut VolumeReport, &mut VolumeReport)) -> Scene {
    let mut s = Scene::new(Cluster::pair());
    s.c.register(1, 2);
    s.c.register(2, 2);
    let (mut a, mut b) = (s.c.report(member(1, 1).incarnation), s.c.report(member(2, 1).incarnation));
    edit(&mut a, &mut b);
    s.renew(member(1, 2), Some(a));
    s.renew(member(2, 2), Some(b));
    s
}

#[test]
fn r6_of_restarted_members_the_same_os_boot_wins_then_clean_then_the_last_primary() {
    let same = |r: &mut VolumeReport| r.report.same_os_boot = true;
    let clean = |r: &mut VolumeReport| r.report.clean = true;
    assert_eq!(restarted(|_, b| same(b)).promoted(), Some(member(2, 2)));
    assert_eq!(restarted(|a, b| (clean(a), same(b)).1).promoted(), Some(member(2, 2)));
    assert_eq!(restarted(|_, b| clean(b)).promoted(), Some(member(2, 2)));
    assert_eq!(restarted(|_, _| ()).promoted(), Some(member(1, 2)));
}

#[test]
fn r16_a_doubtful_superblock_counts_only_if_it_matches_the_config() {
    let doubtful = |r: &mut VolumeReport| r.report.trust = SuperblockTrust::Doubtful;
    assert_eq!(restarted(|a, _| doubtful(a)).promoted(), Some(member(1, 2)));
    let stale = |a: &mut VolumeReport, _: &mut VolumeReport| {
        doubtful(a);
        a.report.epoch.0 -= 1;
    };
    assert_eq!(restarted(stale).promoted(), Some(member(2, 2)));
    let none = |a: &mut VolumeReport, _: &mut VolumeReport| a.report.trust = SuperblockTrust::None;
    assert_eq!(restarted(none).promoted(), Some(member(2, 2)));
}

#[test]
fn r6_r16_what_is_inconsistent_or_of_another_run_is_not_eligible() {
    let s = |edit: fn(&mut VolumeReport)| restarted(move |a, b| (edit(a), edit(b)).0);
    assert!(s(|r| r.report.inconsistent = true).blocked().contains("resync"));
    assert!(s(|r| r.report.member = None).blocked().contains("not in sync"));
    assert!(s(|r| r.report.member = Some(member(9, 9).incarnation)).blocked().contains("content of run"));
    assert!(s(|r| r.health = Health::Unhealthy("x".into())).blocked().contains("unhealthy"));
}

#[test]
fn r6_the_first_eligible_waits_a_short_while_for_the_others() {
    let mut s = Scene::new(Cluster::pair());
    s.c.register(1, 2);
    s.c.register(2, 2);
    let report = s.c.report(member(2, 1).incarnation);
    for _ in 0..4 {
        s.renew(member(2, 2), Some(report.clone()));
        assert!(s.blocked().contains("waiting"));
        s.now += 500;
    }
    s.renew(member(2, 2), Some(report));
    assert_eq!(s.promoted(), Some(member(2, 2)));
}

#[test]
fn r6_a_member_that_restarts_again_before_it_recorded_its_promotion_is_still_eligible() {
    let mut s = Scene::new(Cluster::new(&[1, 2]));
    s.c.register(1, 2);
    let op = s.c.promote_restarted(member(1, 2), false);
    s.c.must(op);
    s.c.register(1, 3);
    let report = s.c.report(member(1, 1).incarnation);
    s.renew(member(1, 3), Some(report));
    assert_eq!(s.promoted(), Some(member(1, 3)));
}

#[test]
fn no_rule_moves_the_primary_back_when_its_node_returns() {
    let mut s = Scene::new(Cluster::pair());
    let op = s.c.promote(member(2, 1), false);
    s.c.must(op);
    s.c.register(1, 2);
    s.healthy(member(1, 2));
    s.healthy(member(2, 1));
    for _ in 0..10 {
        s.now += 400;
        s.healthy(member(1, 2));
        s.healthy(member(2, 1));
        assert_eq!(s.decide(), Decisions::default());
    }
}

#[test]
fn of_several_live_members_one_that_renewed_lately_is_taken() {
    let mut c = Cluster::new(&[1, 2, 4]);
    c.propose_ok(member(1, 1), ProposalKind::Join(member(2, 1)));
    c.propose_ok(member(1, 1), ProposalKind::Join(member(4, 1)));
    let mut s = Scene::new(c);
    s.healthy(member(2, 1));
    s.now += 1200;
    s.healthy(member(4, 1));
    assert_eq!(s.promoted(), Some(member(4, 1)));
}
