//! Scenarios with failing disks, lost power and operators who force things.

use std::time::Duration;

use crate::types::{Epoch, Health, LineageId, ProposalKind, SuperblockTrust};
use crate::wire::{BaseContent, InconsistentMark, PeerReport};

use super::super::io::Event;
use super::super::resync::{Remembered, Verdict, judge};
use super::scenarios_force::blank_and_alone;
use super::{Options, World, node, two};

#[test]
fn a_write_error_hands_the_role_over_and_the_client_never_sees_it() {
    let mut world = two();
    world.nodes.get_mut(&node(1)).unwrap().disk.write_error = true;
    world.write(node(1), 1, false);
    world.run(20);
    assert_eq!(world.config.primary.unwrap().node, node(2));
    assert!(world.config.member(node(1)).is_none(), "taken out");
    assert_eq!(world.waiting(node(1)), 0, "closed, not failed");
    assert!(matches!(world.replica(node(1)).health(), Health::Unhealthy(_)));
    world.nodes.get_mut(&node(1)).unwrap().disk.write_error = false;
    world.crash(node(1));
    world.converge();
    assert_eq!(world.serving(), Some(node(2)), "no fail-back");
}

#[test]
fn whoever_has_joined_again_stays_secondary() {
    let mut world = two();
    world.crash(node(1));
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.run(20);
    assert_eq!(world.serving(), Some(node(2)));
    world.start(node(1));
    world.run(100);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    assert_eq!(world.serving(), Some(node(2)), "no rule moves the role back");
}

#[test]
fn a_flush_error_fails_the_replica_at_once_and_is_not_retried() {
    let mut world = two();
    world.write(node(1), 1, false);
    world.run(1);
    world.nodes.get_mut(&node(2)).unwrap().disk.flush_error = true;
    world.flush(node(1));
    world.settle();
    world.nodes.get_mut(&node(2)).unwrap().disk.flush_error = false;
    world.run(20);
    assert!(world.config.member(node(2)).is_none(), "out until it is restarted");
    assert_eq!(world.waiting(node(1)), 0, "the flush is answered by who is left");
    world.crash(node(2));
    world.converge();
}

#[test]
fn all_nodes_lose_power_and_what_was_flushed_is_there() {
    for seed in 0..40 {
        let mut world = World::new(&Options { seed, ..Options::default() });
        world.run(12);
        for block in 0..20 {
            world.write(node(1), block, false);
        }
        world.run(2);
        world.flush(node(1));
        world.run(2);
        for block in 10..30 {
            world.write(node(1), block, false);
        }
        let steps = world.rng.below(60);
        for _ in 0..steps {
            world.step();
        }
        world.power_off(node(1));
        world.power_off(node(2));
        world.history.power_lost();
        world.start(node(1));
        world.start(node(2));
        world.converge();
    }
}

#[test]
fn a_paused_replica_in_resync_is_never_promoted_but_by_force() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    world.write(node(1), 1, false);
    world.run(2);
    world.start(node(2));
    world.hold_proposals = true;
    world.run(10);
    world.crash(node(1));
    world.pass(Duration::from_millis(2000));
    assert!(!world.failover(), "node 2 is not in the set");
    world.converge();
}

#[test]
fn r17_forced_promotion_starts_a_lineage_and_the_other_side_gives_its_writes_up() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    for block in 0..4 {
        world.write(node(1), block, false); // only node 1 has these
    }
    world.run(2);
    world.crash(node(1));
    world.start(node(2));
    world.pass(Duration::from_millis(2000));
    assert!(!world.failover());
    world.force(node(2));
    world.history = super::History::default(); // the operator has thrown node 1's writes away
    world.run(4);
    assert_eq!(world.serving(), Some(node(2)));
    world.overwrite(node(2), 40);
    world.run(2);
    world.start(node(1));
    world.run(60);
    let events = &world.nodes[&node(2)].events;
    assert!(events.iter().any(|e| matches!(e, Event::Discarding { bytes, .. } if *bytes >= 4 * 4096)));
    assert_eq!(world.nodes[&node(1)].disk.data, world.nodes[&node(2)].disk.data);
}

fn report(world: &World) -> PeerReport {
    PeerReport {
        trust: SuperblockTrust::Sound,
        epoch: world.config.epoch,
        lineage: world.config.lineage,
        member: world.config.replicas[1].last_member,
        base: BaseContent::Member,
        inconsistent: None,
        damaged_pages: 0,
    }
}

#[test]
fn a_returning_replica_has_three_outcomes() {
    let mut world = two();
    let me = world.member_now(node(1));
    world.crash(node(2));
    world.run(20);
    let good = report(&world);
    let fresh = Remembered { untouched: true, copied_to: false };
    let judged = |r: &PeerReport| judge(r, node(2), me, &world.config, fresh);
    assert!(matches!(judged(&good), Verdict::Known { foreign: false, .. }));
    let doubtful = PeerReport { trust: SuperblockTrust::Doubtful, ..good };
    assert!(matches!(judged(&doubtful), Verdict::Everything { .. }), "[R16]");
    let replaced = PeerReport { member: None, base: BaseContent::Unknown, ..good };
    assert!(matches!(judged(&replaced), Verdict::Everything { .. }), "[R15]");
    let blank = PeerReport { member: None, base: BaseContent::Zero, ..good };
    assert!(matches!(judged(&blank), Verdict::Everything { .. }), "a new disk in an old member's place");
    let mark = InconsistentMark { epoch: Epoch(1), reign: world.config.reign, source: me };
    let half_done = PeerReport { inconsistent: Some(mark), ..replaced };
    assert!(matches!(judged(&half_done), Verdict::Everything { .. }), "by whom it began has forgotten");
    let copied = Remembered { untouched: false, copied_to: true };
    let resumed = judge(&half_done, node(2), me, &world.config, copied);
    assert!(matches!(resumed, Verdict::Known { foreign: false, reason: "its resync goes on" }));
    let stranger = PeerReport { lineage: LineageId(5), ..good };
    assert!(matches!(judged(&stranger), Verdict::Refused(_)));
    let mut forked = world.config.clone();
    forked.history.push(crate::types::LineageFork { lineage: forked.lineage, fork_epoch: Epoch(2) });
    forked.lineage = LineageId(101);
    assert!(matches!(judge(&good, node(2), me, &forked, fresh), Verdict::Known { foreign: true, .. }));
    let before_fork = PeerReport { epoch: Epoch(2), ..good };
    assert!(matches!(
        judge(&before_fork, node(2), me, &forked, fresh),
        Verdict::Known { foreign: false, .. }
    ));
}

#[test]
fn r15_a_replaced_data_object_is_copied_whole() {
    let mut world = two();
    for block in [5, 50] {
        world.write(node(1), block, false);
    }
    world.run(60);
    world.crash(node(2));
    world.nodes.get_mut(&node(2)).unwrap().disk.data = vec![77; 64];
    world.nodes.get_mut(&node(2)).unwrap().disk.stable = vec![77; 64];
    world.run(20);
    world.start_replaced(node(2));
    world.converge();
}

#[test]
fn damaged_bitmap_pages_make_a_resync_longer_never_shorter() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    for block in [5, 50] {
        world.write(node(1), block, false);
    }
    world.run(60);
    world.crash(node(1));
    world.damage_bitmaps(node(1));
    world.start(node(1));
    world.start(node(2));
    world.converge();
    let started = world.nodes[&node(1)].events.iter().rev().find_map(|e| match e {
        Event::ResyncStarted { bytes, .. } => Some(*bytes),
        _ => None,
    });
    assert_eq!(started, Some(64 * 4096), "the damaged page reads all-set");
}

#[test]
fn a_bounded_intent_map_holds_writers_back_and_loses_nothing() {
    let mut options = Options { blocks: 64 * 16, ..Options::default() };
    options.settings.intent_regions_max = 4;
    let mut world = World::new(&options);
    world.run(12);
    for region in 0..40 {
        world.write(node(1), region * 16, false);
    }
    world.run(20);
    assert_eq!(world.acked_writes, 40, "{:#?}", world.summary());
    assert!(world.replica(node(1)).status().intent_regions <= 4);
    world.converge();
}

#[test]
fn a_clean_stop_flushes_clears_and_marks() {
    let mut world = two();
    world.write(node(1), 1, false);
    world.run(1);
    let now = crate::types::Nanos(world.now);
    for id in [node(1), node(2)] {
        world.replica(id).begin_stop(now);
        world.collect(id);
    }
    world.run(30);
    for id in [node(1), node(2)] {
        assert!(world.nodes[&id].stopped, "{:#?}", world.summary());
        let image = world.image(id);
        assert!(image.superblock.clean.is_some());
        world.crash(id);
    }
    world.power_off(node(1));
    world.power_off(node(2));
    world.converge();
}

#[test]
fn r20_a_read_that_failed_is_tried_again_after_a_write_that_came_in_between() {
    let mut world = two();
    world.crash(node(2));
    world.run(30);
    world.write(node(1), 10, false);
    world.run(1);
    world.nodes.get_mut(&node(1)).unwrap().disk.bad = vec![10];
    world.read(node(1), 10);
    world.overwrite(node(1), 10);
    world.run(2);
    assert_eq!(world.waiting(node(1)), 0, "and nobody was told of an error");
}

#[test]
fn r17_everything_is_compared_if_a_lineage_began_from_a_copy_that_was_never_in_sync() {
    let mut world = blank_and_alone();
    world.force(node(2));
    world.history.power_lost();
    world.converge();
}

/// Found by the simulator, seed 200607: the error was decided while there was no lease, and told when it was
/// no longer true.
#[test]
fn r20_r26_an_error_is_not_decided_before_it_can_be_told() {
    let mut world = two();
    let tag = world.write(node(1), 10, false);
    world.run(60);
    let disk = &mut world.nodes.get_mut(&node(1)).unwrap().disk;
    (disk.bad, disk.data[10]) = (vec![10], 0);
    world.cut(node(1), node(2));
    world.read(node(1), 10);
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.pass(Duration::from_millis(1700));
    world.settle();
    assert!(world.config.member(node(2)).is_none(), "{:#?}", world.summary());
    // The other member, which has the block, comes back before the primary may say anything.
    world.heal();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.pass(Duration::from_secs(2));
    world.settle();
    assert_eq!(world.config.in_sync.len(), 2, "{:#?}", world.summary());
    assert_eq!(world.waiting(node(1)), 1, "neither failed nor answered");
    world.nodes.get_mut(&node(1)).unwrap().cut_off = false;
    world.run(2);
    assert_eq!(world.waiting(node(1)), 0);
    assert_eq!(world.nodes[&node(1)].disk.data[10], tag);
    world.converge();
}

/// Found by the simulator, seed 704021: the blank copy of the lineage in between was taken for a known one.
#[test]
fn r17_everything_is_compared_if_the_lineage_before_began_from_a_copy_that_was_never_in_sync() {
    let mut world = blank_and_alone();
    world.force(node(2));
    world.history.power_lost();
    world.run(20);
    assert_eq!(world.serving(), Some(node(2)));
    world.crash(node(2));
    world.start(node(1));
    world.give_config(node(1));
    world.settle();
    world.force(node(1));
    world.history.power_lost();
    world.converge();
}

#[test]
fn a_small_intent_map_makes_room_without_waiting_until_a_region_is_idle() {
    let mut options = Options::default();
    options.settings.intent_regions_max = 1;
    let mut world = World::new(&options);
    world.run(20);
    for block in [0, 20, 40] {
        world.write(node(1), block, false);
        world.settle();
        assert_eq!(world.waiting(node(1)), 0, "block {block}");
    }
}

#[test]
fn a_replica_that_is_opened_anew_in_one_run_counts_its_proposals_on() {
    let mut world = two();
    let first = world.replica(node(1)).next_proposal;
    world.crash(node(1));
    world.pass(Duration::from_millis(10));
    world.start_in_same_run(node(1));
    assert!(world.replica(node(1)).next_proposal > first);
}

/// Found by the simulator, seed 1022022: a new disk was taken for one to which nothing had been copied.
#[test]
fn a_primary_that_was_opened_anew_in_its_first_run_does_not_know_what_it_copied() {
    let mut world = World::new(&Options::default());
    // Node 2 gets everything, the bits for it are cleared, and its join is never committed.
    world.hold_proposals = true;
    world.run(2);
    world.write(node(1), 20, false);
    world.run(60);
    assert!(world.config.member(node(2)).is_none() && !world.proposals.is_empty(), "{:#?}", world.summary());
    world.proposals.clear();
    world.hold_proposals = false;
    world.crash(node(2));
    world.replace_disk(node(2));
    world.crash(node(1));
    world.start_in_same_run(node(1));
    world.start(node(2));
    world.run(60);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.converge();
}

#[test]
fn r10_a_copy_that_was_made_anew_is_not_taken_for_the_member_that_its_run_was() {
    let mut world = two();
    world.write(node(1), 20, false);
    world.run(60);
    // In one run of the process.
    world.crash(node(2));
    world.replace_disk(node(2));
    world.start_in_same_run(node(2));
    world.run(20);
    assert!(matches!(world.replica(node(2)).health(), Health::Unhealthy(_)));
    assert!(world.config.member(node(2)).is_none(), "removed, and not in sync again");
    world.converge();
}

/// Found by the simulator, seed 1041157: the fork was recorded for the copy that the operator had seen.
#[test]
fn r17_a_copy_that_was_made_anew_is_not_taken_for_the_one_that_was_to_be_forced() {
    let mut world = two();
    world.write(node(1), 20, false);
    world.run(60);
    world.crash(node(1));
    world.crash(node(2));
    world.start(node(2));
    let forced = world.judge_force(node(2));
    // In one run of the process, before the force commits.
    world.crash(node(2));
    world.replace_disk(node(2));
    world.start_in_same_run(node(2));
    world.commit(forced);
    world.run(40);
    assert!(matches!(world.replica(node(2)).health(), Health::Unhealthy(_)), "{:#?}", world.summary());
    world.start(node(1));
    world.run(2);
    world.force(node(1));
    world.history.power_lost();
    world.converge();
}

#[test]
fn a_primary_whose_flush_failed_sends_nothing_that_it_read_since() {
    let mut world = two();
    let tag = world.write(node(1), 5, false);
    world.run(1);
    world.nodes.get_mut(&node(1)).unwrap().disk.flush_error = true;
    world.nodes.get_mut(&node(1)).unwrap().disk_paused = true;
    world.flush(node(1));
    world.settle();
    // Its edges are read from the disk, whose cache is gone when the flush fails.
    world.write_bytes(node(1), 5 * 4096, 512, false);
    let is_flush = |r: &crate::replica::DiskRequest| r.op == crate::replica::DiskOp::Flush;
    let at = world.nodes[&node(1)].pending.iter().position(is_flush).unwrap();
    world.complete_disk(node(1), at);
    let disk = &mut world.nodes.get_mut(&node(1)).unwrap().disk;
    disk.data = disk.stable.clone();
    world.nodes.get_mut(&node(1)).unwrap().disk_paused = false;
    world.settle();
    assert_eq!(world.nodes[&node(2)].disk.data[5], tag, "the good copy is as it was");
}

/// Found by the simulator, seed 6022030: the primary had the same name, and what was left in its bitmap on the disk
/// was taken for all that the target lacked.
#[test]
fn r15_a_copy_of_everything_begins_again_if_its_source_was_opened_anew() {
    let mut world = two();
    for block in [5, 50] {
        world.write(node(1), block, false);
    }
    world.run(60);
    world.crash(node(2));
    world.run(20);
    world.replace_disk(node(2));
    world.start(node(2));
    for _ in 0..1000 {
        if world.replica(node(2)).report().inconsistent {
            break;
        }
        if !world.step() {
            world.pass(Duration::from_millis(50));
        }
    }
    assert!(world.replica(node(2)).report().inconsistent, "{:#?}", world.summary());
    // In one run of the process.
    world.crash(node(1));
    world.start_in_same_run(node(1));
    world.converge();
}

/// Found by the simulator, seed 6048663: while another replica served, by force, one that had failed and knew of
/// nothing told the clients that it still had of errors.
#[test]
fn r26_a_failed_replica_tells_no_error_without_a_lease() {
    let mut world = two();
    world.crash(node(2));
    world.run(60);
    assert_eq!(world.config.in_sync.len(), 1, "{:#?}", world.summary());
    world.nodes.get_mut(&node(1)).unwrap().disk.flush_error = true;
    world.errors_allowed = true;
    world.flush(node(1));
    world.settle();
    assert_eq!(world.waiting(node(1)), 0, "nobody else could answer");
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.pass(Duration::from_secs(2));
    world.errors_allowed = false;
    world.read(node(1), 5);
    world.settle();
    assert_eq!(world.waiting(node(1)), 0, "closed, not failed");
}

/// Found by the simulator, seed 7046661: a recreation was given up, and the copy whose flush had failed was opened
/// again in the same run, which the set still named; it took over without what its flush had lost.
#[test]
fn r10_a_copy_that_failed_does_not_come_back_in_the_same_run() {
    let mut world = two();
    world.hold_proposals = true;
    world.nodes.get_mut(&node(2)).unwrap().disk.flush_error = true;
    world.flush(node(1));
    world.settle();
    let failure = world.replica(node(2)).status().failure;
    assert!(failure.is_some(), "{:#?}", world.summary());
    world.crash(node(2));
    world.failed = failure;
    world.start_in_same_run(node(2));
    world.run(4);
    assert!(matches!(world.replica(node(2)).health(), Health::Unhealthy(_)), "{:#?}", world.summary());
    world.converge();
}

/// Found by the simulator, seed 8098086: the join of a run was proposed and not decided, its copy was made anew, and
/// the primary mended a bad block from it.
#[test]
fn r10_r20_nothing_is_mended_from_a_copy_that_was_made_anew_while_its_run_joins() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    let tag = world.write(node(1), 5, false);
    world.run(60);
    world.hold_proposals = true;
    world.start(node(2));
    world.run(20);
    assert!(matches!(world.proposals[0].1.kind, ProposalKind::Join(_)), "{:#?}", world.summary());
    // In one run of the process.
    world.crash(node(2));
    world.replace_disk(node(2));
    world.start_in_same_run(node(2));
    world.run(10);
    world.nodes.get_mut(&node(1)).unwrap().disk.bad = vec![5];
    world.errors_allowed = true;
    world.read(node(1), 5);
    world.run(4);
    assert_eq!(world.waiting(node(1)), 0, "{:#?}", world.summary());
    assert_eq!(world.nodes[&node(1)].disk.data[5], tag);
    // It never comes to that join.
    world.proposals.clear();
    for id in [node(1), node(2)] {
        world.crash(id);
        world.start(id);
    }
    world.converge();
}
