//! Scenarios with operators who force a copy, while it or another one changes.

use std::time::Duration;

use crate::types::{Health, Nanos};

use super::{History, Options, World, node, two};

/// Node 2 has lost its disk, has never been in sync since, and node 1 is gone.
pub(super) fn blank_and_alone() -> World {
    let mut world = two();
    world.write(node(1), 20, false);
    world.run(60);
    world.crash(node(2));
    world.replace_disk(node(2));
    world.cut(node(1), node(2));
    world.start(node(2));
    world.crash(node(1));
    world.give_config(node(2));
    world.settle();
    world
}

/// Node 2 is out of the set, lacks something, and is about to be connected.
fn returning() -> World {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    world.write(node(1), 5, false);
    world.run(60);
    world.start(node(2));
    world.give_config(node(2));
    world
}

/// Found by the simulator, seed 5001985: the copy in the middle had given up what the two at the ends have, and
/// only the difference between these was on record.
#[test]
fn r17_a_copy_may_have_become_like_any_other_of_the_lineage_that_is_left_behind() {
    let mut world = World::new(&Options { replicas: 3, ..Options::default() });
    world.run(20);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.crash(node(3));
    world.run(20);
    let tag = world.write(node(1), 5, false); // nodes 1 and 2 have it
    world.run(60); // and no intent map names it any more
    world.crash(node(1));
    world.crash(node(2));
    world.start(node(3));
    world.pass(Duration::from_secs(2));
    world.force(node(3));
    world.history = History::default();
    world.run(4);
    world.start(node(2)); // gives it up
    world.run(60);
    world.write(node(3), 40, false);
    world.run(100);
    assert_eq!(world.replica(node(2)).status().intent_regions, 0, "no intent map remembers that either");
    assert_eq!(world.config.in_sync.len(), 2, "{:#?}", world.summary());
    assert_ne!(world.nodes[&node(2)].disk.data[5], tag);
    world.crash(node(2));
    world.crash(node(3));
    world.start(node(1));
    world.pass(Duration::from_secs(2));
    world.force(node(1));
    world.history.power_lost();
    world.run(4);
    world.start(node(2));
    world.start(node(3));
    world.converge();
    assert_eq!(world.nodes[&node(2)].disk.data[5], tag);
}

/// Found by the simulator, seed 5008731: the forced run ended before it heard of it, and its copy did not know its
/// name.
#[test]
fn r17_a_copy_that_was_never_in_sync_takes_over_by_force_after_a_restart_too() {
    let mut world = blank_and_alone();
    let forced = world.judge_force(node(2));
    world.commit(forced);
    world.history.power_lost();
    world.crash(node(2));
    world.start(node(2));
    world.run(4);
    assert!(world.failover(), "{:#?}", world.summary());
    world.run(20);
    assert_eq!(world.serving(), Some(node(2)), "{:#?}", world.summary());
    world.converge();
}

/// The same, but the copy was made anew in between: what was forced had something in common with the others.
#[test]
fn r6_a_copy_that_was_made_anew_does_not_take_over_for_the_forced_one_after_a_restart() {
    let mut world = two();
    world.write(node(1), 20, false);
    world.run(60);
    world.crash(node(1));
    world.crash(node(2));
    world.start(node(2));
    let forced = world.judge_force(node(2));
    world.crash(node(2));
    world.replace_disk(node(2));
    world.start_in_same_run(node(2));
    world.commit(forced);
    world.crash(node(2));
    world.start(node(2));
    world.run(4);
    assert!(!world.failover(), "{:#?}", world.summary());
    world.run(60);
    assert_eq!(world.serving(), None, "{:#?}", world.summary());
}

/// Found by the simulator, seed 5075936: the primary that a force was to replace was back, and half of its content
/// came over the copy that the operator had judged.
#[test]
fn r17_no_resync_begins_before_a_force_is_decided() {
    let mut world = returning();
    let now = Nanos(world.now);
    world.replica(node(2)).begin_force(now, false).unwrap();
    world.run(40);
    assert!(!world.replica(node(2)).report().inconsistent, "{:#?}", world.summary());
    assert!(world.config.member(node(2)).is_none());
    // Refused: the resync that waited goes on.
    let now = Nanos(world.now);
    world.replica(node(2)).end_force(now);
    world.collect(node(2));
    world.run(60);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.converge();
}

#[test]
fn r17_a_force_whose_fate_nobody_tells_holds_a_resync_up_for_a_while_only() {
    let mut world = returning();
    let now = Nanos(world.now);
    world.replica(node(2)).begin_force(now, false).unwrap();
    world.run(40);
    assert!(world.config.member(node(2)).is_none());
    world.run(620);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.converge();
}

#[test]
fn r17_a_copy_that_a_resync_has_half_overwritten_is_not_promoted_as_the_whole_one_that_was_judged() {
    let mut world = returning();
    let now = Nanos(world.now);
    world.replica(node(2)).begin_force(now, false).unwrap();
    let forced = world.judge_force(node(2));
    // So late that the resync went on; it ends before its join.
    world.hold_proposals = true;
    world.run(700);
    assert!(world.replica(node(2)).report().inconsistent, "{:#?}", world.summary());
    world.crash(node(1));
    world.commit(forced);
    world.run(20);
    assert_eq!(world.serving(), None);
    assert!(matches!(world.replica(node(2)).health(), Health::Unhealthy(_)), "{:#?}", world.summary());
    let now = Nanos(world.now);
    world.crash(node(2));
    world.start(node(2));
    let refused = world.replica(node(2)).begin_force(now, false).unwrap_err();
    assert!(refused.contains("--discard-inconsistent"), "{refused}");
    assert!(world.replica(node(2)).begin_force(now, true).unwrap().inconsistent);
}
