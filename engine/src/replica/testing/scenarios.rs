//! Scenarios, one situation each, named after the rule that decides it.

use std::time::Duration;

use crate::types::{Nanos, ProposalKind, ProposalOutcome, ReplicaSlot};

use super::super::io::Event;
use super::{Options, World, node, two};

fn three() -> World {
    let mut world = World::new(&Options { replicas: 3, ..Options::default() });
    world.run(20);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world
}

/// Waits until the lease of a dead or cut-off primary is over and another takes over.
fn fail_over(world: &mut World) {
    for _ in 0..60 {
        world.pass(Duration::from_millis(50));
        world.settle();
        if world.failover() {
            break;
        }
    }
    world.run(40);
}

#[test]
fn a_new_volume_gets_its_second_replica_without_copying_zeroes() {
    let mut world = two();
    assert_eq!(world.sent.get("copy"), None, "both are provably zero: nothing to copy");
    world.write(node(1), 3, false);
    world.run(1);
    assert_eq!(world.acked_writes, 1);
    world.converge();
}

#[test]
fn r26_r27_no_answer_leaves_after_the_lease_has_run_out() {
    let mut world = two();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.write(node(1), 1, false);
    world.read(node(1), 2);
    // The process sleeps past its lease; the completions are reaped afterwards, with the time of then.
    world.now += 2_000_000_000;
    world.settle();
    assert_eq!((world.acked_writes, world.waiting(node(1))), (0, 2), "held, not answered");
    // The lease comes back in the same reign: the same answers go out.
    world.nodes.get_mut(&node(1)).unwrap().cut_off = false;
    world.run(2);
    assert_eq!((world.acked_writes, world.waiting(node(1))), (1, 0));
    world.converge();
}

#[test]
fn r23_a_primary_in_another_reign_drops_its_requests_and_closes_the_connections() {
    let mut world = two();
    world.clogged.insert(node(2)); // its acknowledgements do not come through
    world.write(node(1), 1, false);
    world.settle();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.clogged.clear();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = false;
    world.run(40);
    assert_eq!(world.waiting(node(1)), 0, "closed unanswered");
    assert_eq!(world.acked_writes, 0);
    assert_eq!(world.config.primary.unwrap().node, node(2));
    world.converge();
}

#[test]
fn r24_a_closed_connection_starts_nothing_any_more() {
    let mut world = two();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.now += 2_000_000_000; // no lease: the request waits in the queue
    let tag = world.write(node(1), 5, false);
    world.close_clients(node(1));
    world.nodes.get_mut(&node(1)).unwrap().cut_off = false;
    world.run(4);
    assert_ne!(world.nodes[&node(1)].disk.data[5], tag, "a stale request started after its connection's end");
    world.converge();
}

#[test]
fn r8_a_read_waits_for_the_overlapping_write_until_all_have_committed_it() {
    let mut world = two();
    world.clogged.insert(node(2));
    world.write(node(1), 7, false);
    world.read(node(1), 7);
    world.read(node(1), 8);
    world.settle();
    assert_eq!(world.waiting(node(1)), 2, "only the read beside it is answered");
    world.clogged.clear();
    world.run(2);
    assert_eq!(world.waiting(node(1)), 0);
    world.converge();
}

#[test]
fn r2_r10_a_restarted_member_counts_for_nothing_until_it_has_joined_again() {
    let mut world = two();
    world.crash(node(2));
    world.start(node(2));
    world.hold_proposals = true; // its removal is not decided
    world.pass(Duration::from_millis(20));
    world.settle();
    world.write(node(1), 4, false);
    world.run(5);
    assert_eq!(world.acked_writes, 0, "the new incarnation is not the one that the config names");
    world.hold_proposals = false;
    world.run(40);
    assert_eq!(world.acked_writes, 1);
    assert!(world.all_in_sync());
    world.converge();
}

#[test]
fn r9_only_the_primary_proposes_and_it_flushes_first() {
    let mut world = two();
    world.write(node(1), 4, false);
    world.run(1);
    assert_ne!(world.nodes[&node(1)].disk.stable[4], world.nodes[&node(1)].disk.data[4]);
    world.crash(node(2));
    world.hold_proposals = true;
    world.run(20);
    assert!(matches!(world.proposals[0].1.kind, ProposalKind::Remove(m) if m.node == node(2)));
    let disk = &world.nodes[&node(1)].disk;
    assert_eq!(disk.stable[4], disk.data[4], "flushed before the removal is proposed");
    assert!(world.proposals.iter().all(|(from, _)| *from == node(1)));
    world.converge();
}

#[test]
fn r14_alone_or_possibly_alone_every_acknowledged_write_is_stable() {
    let mut world = two();
    // Committed by both, but the answer of the other comes only while its removal is proposed.
    world.clogged.insert(node(2));
    world.write(node(1), 9, false);
    world.settle();
    world.hold_proposals = true;
    world.pass(Duration::from_millis(1200));
    world.settle();
    assert_eq!(world.proposals.len(), 1, "silent for too long: proposed for removal");
    world.clogged.clear();
    world.settle(); // the acknowledgement arrives; the world checks stability when alone
    world.hold_proposals = false;
    world.run(3);
    assert_eq!(world.acked_writes, 1);
    let disk = &world.nodes[&node(1)].disk;
    assert_eq!(disk.stable[9], disk.data[9]);
    world.power_off(node(1));
    world.converge();
}

#[test]
fn r11_a_new_primary_serves_nothing_before_the_other_members_follow_it() {
    let mut world = three();
    world.write(node(1), 20, false);
    world.run(1);
    world.crash(node(1));
    world.clogged.insert(node(3)); // its confirmation does not come
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.hold_proposals = true;
    world.settle();
    let primary = world.config.primary.unwrap().node;
    world.read(primary, 20);
    world.settle();
    assert_eq!(world.waiting(primary), 1, "reads included");
    world.hold_proposals = false;
    world.run(60);
    assert_eq!(world.waiting(primary), 0, "{:#?}", world.summary());
    world.converge();
}

#[test]
fn r11_members_are_made_equal_where_an_unacknowledged_write_reached_only_one() {
    let mut world = three();
    // The write reaches node 2 alone, then the primary dies.
    world.cut_wire(node(1), node(3));
    let tag = world.write(node(1), 30, false);
    world.settle_without(node(3));
    assert_eq!(world.nodes[&node(2)].disk.data[30], tag);
    assert_ne!(world.nodes[&node(3)].disk.data[30], tag);
    world.crash(node(1));
    world.restore_wires();
    fail_over(&mut world);
    let (a, b) = (world.nodes[&node(2)].disk.data[30], world.nodes[&node(3)].disk.data[30]);
    assert_eq!(a, b, "equal before anything was served");
    world.converge();
}

#[test]
fn r3_intent_regions_are_marked_for_all_others_at_start_and_at_promotion() {
    let mut world = two();
    world.write(node(1), 17, false);
    world.settle();
    world.crash(node(2));
    world.crash(node(1));
    world.start(node(1));
    let dirty = world.replica(node(1)).store.dirty(ReplicaSlot(1)).unwrap().count();
    assert_eq!(dirty, 16, "the region of block 17, whole");
    world.converge();
}

#[test]
fn r4_r12_a_joiner_is_in_the_ack_set_before_its_join_is_proposed() {
    let mut world = World::new(&Options::default());
    world.hold_proposals = true;
    world.run(8);
    assert!(matches!(world.proposals[0].1.kind, ProposalKind::Join(m) if m.node == node(2)));
    world.clogged.insert(node(2));
    world.write(node(1), 1, false);
    world.settle();
    assert_eq!(world.acked_writes, 0, "the join may commit at any time: the write waits for the joiner");
    world.clogged.clear();
    world.run(4);
    assert_eq!(world.acked_writes, 1);
    world.converge();
}

#[test]
fn r12_secondaries_mark_the_removed_one_and_a_joiner_gets_the_bitmaps() {
    let mut world = three();
    world.crash(node(3));
    world.run(20);
    for block in [1, 2, 40] {
        world.write(node(1), block, false);
    }
    world.run(3);
    let dirty = |w: &mut World, at: u64| {
        let bitmap = w.replica(node(at)).store.dirty(ReplicaSlot(2)).unwrap();
        [1, 2, 40].iter().all(|b| bitmap.get(*b))
    };
    assert!(dirty(&mut world, 1) && dirty(&mut world, 2), "both know what node 3 lacks");
    world.crash(node(2));
    world.start(node(2));
    world.run(40);
    assert!(world.config.member(node(2)).is_some(), "{:#?}", world.summary());
    assert!(dirty(&mut world, 2), "a joiner has the bitmap of the missing one");
    // Both others die; node 2 alone brings node 3 up to date.
    world.crash(node(1));
    fail_over(&mut world);
    world.start(node(3));
    world.converge();
}

#[test]
fn r5_intents_go_only_when_all_have_flushed_and_the_bitmaps_are_durable() {
    let mut world = two();
    world.write(node(1), 3, false);
    world.run(1);
    assert_eq!(world.replica(node(1)).status().intent_regions, 1);
    world.run(60);
    assert_eq!(world.replica(node(1)).status().intent_regions, 0, "idle and stable");
    assert_eq!(world.replica(node(2)).status().intent_regions, 0);
    let disk = &world.nodes[&node(2)].disk;
    assert_eq!(disk.stable[3], disk.data[3], "the secondary flushed before");
    // With one missing, its bitmap has to be durable before the bit goes.
    world.crash(node(2));
    world.run(20);
    world.write(node(1), 33, false);
    world.run(60);
    assert_eq!(world.replica(node(1)).status().intent_regions, 0);
    world.crash(node(1));
    world.start(node(1));
    assert!(world.replica(node(1)).store.dirty(ReplicaSlot(1)).unwrap().get(33), "the dirty bit was durable");
    world.converge();
}

#[test]
fn r5_outside_the_set_nothing_is_cleared() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    for block in 0..20 {
        world.write(node(1), block, false);
    }
    world.run(4);
    world.start(node(2));
    world.hold_proposals = true;
    world.run(60);
    assert!(world.replica(node(2)).status().intent_regions >= 2, "copied, perhaps only into a cache");
    world.converge();
    world.run(80);
    assert_eq!(world.replica(node(2)).status().intent_regions, 0);
}

#[test]
fn r7_a_new_session_waits_for_what_the_kernel_still_has() {
    let mut world = two();
    world.nodes.get_mut(&node(2)).unwrap().disk_paused = true;
    let old = world.write(node(1), 6, false);
    // The intent becomes durable, the data write hangs in the kernel.
    world.settle();
    world.complete_meta(node(2));
    world.settle();
    assert_eq!(world.nodes[&node(2)].pending.len(), 1);
    world.crash(node(1));
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.give_config(node(2));
    world.complete_meta(node(2));
    assert!(!world.replica(node(2)).serving(), "an older write of the block is still under way");
    world.nodes.get_mut(&node(2)).unwrap().disk_paused = false;
    world.run(40);
    assert_eq!(world.nodes[&node(2)].disk.data[6], old);
    let new = world.overwrite(node(2), 6);
    world.run(2);
    assert_eq!(world.nodes[&node(2)].disk.data[6], new);
    world.converge();
}

#[test]
fn r18_a_move_stops_drains_flushes_and_only_then_proposes() {
    let mut world = two();
    world.write(node(1), 2, false);
    let now = Nanos(world.now);
    world.replica(node(1)).begin_move(now, node(2)).unwrap();
    world.collect(node(1));
    assert!(world.proposals.is_empty(), "a write is under way");
    world.hold_proposals = true;
    // Each of its steps may wait for the next tick.
    world.run(8);
    assert_eq!(world.acked_writes, 1);
    assert!(matches!(world.proposals[0].1.kind, ProposalKind::Move(m) if m.node == node(2)));
    let disk = &world.nodes[&node(1)].disk;
    assert_eq!(disk.stable, disk.data, "flushed");
    world.read(node(1), 2);
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "stopped serving");
    world.hold_proposals = false;
    world.run(4);
    assert_eq!(world.serving(), Some(node(2)));
    assert_eq!(world.waiting(node(1)), 0, "closed, to be asked again at the new primary");
    world.converge();
    assert_eq!(world.serving(), Some(node(2)), "and it stays there");
}

#[test]
fn r18_a_move_of_unknown_fate_is_voided_before_the_old_primary_serves_again() {
    let mut world = two();
    let now = Nanos(world.now);
    world.replica(node(1)).begin_move(now, node(2)).unwrap();
    world.collect(node(1));
    world.hold_proposals = true;
    world.settle();
    world.pass(Duration::from_millis(200));
    world.settle();
    let (_, lost) = world.proposals.remove(0);
    world.outcome(node(1), lost.id, ProposalOutcome::Unknown);
    world.settle();
    let (_, bump) = world.proposals.remove(0);
    assert_eq!(bump.kind, ProposalKind::Bump);
    world.outcome(node(1), bump.id, ProposalOutcome::Refused("the leader is busy".into()));
    world.run(2);
    assert!(!world.replica(node(1)).serving(), "the move may still commit");
    world.hold_proposals = false;
    world.pass(Duration::from_millis(200));
    world.run(2);
    assert_eq!(world.serving(), Some(node(1)), "the bump committed: the move never can");
    assert!(world.refuses(lost), "the old proposal expects an epoch that is over");
    world.converge();
}

#[test]
fn r20_a_block_that_cannot_be_read_comes_from_a_member_and_is_rewritten() {
    let mut world = two();
    let tag = world.write(node(1), 11, false);
    world.run(1);
    world.nodes.get_mut(&node(1)).unwrap().disk.bad = vec![11];
    world.nodes.get_mut(&node(1)).unwrap().disk.data[11] = 0;
    world.read(node(1), 11);
    world.run(2);
    assert_eq!(world.waiting(node(1)), 0);
    assert_eq!(world.nodes[&node(1)].disk.data[11], tag, "rewritten");
    let events = &world.nodes[&node(1)].events;
    assert!(events.iter().any(|e| matches!(e, Event::Repaired { .. })));
    world.converge();
}

#[test]
fn r21_only_the_newest_write_of_a_block_clears_its_bit() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    world.write(node(1), 12, false);
    world.run(2);
    world.start(node(2));
    world.clogged.insert(node(1)); // the target has asked, nothing reaches it
    world.pass(Duration::from_millis(10));
    world.settle();
    world.clogged.clear();
    world.settle();
    world.clogged.insert(node(2));
    for _ in 0..3 {
        world.overwrite(node(1), 12);
        world.settle();
    }
    world.clogged.clear();
    world.converge();
}

#[test]
fn without_a_fault_every_write_is_answered_and_nobody_leaves() {
    let mut world = two();
    let epoch = world.config.epoch;
    for n in 0..150 {
        world.write(node(1), n % 32, false);
        world.run(1);
        assert_eq!(world.waiting(node(1)), 0, "write {n}");
    }
    assert_eq!(world.config.epoch, epoch);
    world.converge();
}

#[test]
fn whoever_has_joined_again_stays_secondary() {
    let mut world = two();
    world.crash(node(1));
    fail_over(&mut world);
    assert_eq!(world.serving(), Some(node(2)));
    world.start(node(1));
    world.run(100);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    assert_eq!(world.serving(), Some(node(2)), "no rule moves the role back");
    world.converge();
}

#[test]
fn r22_a_region_set_again_while_its_clear_is_written_is_durable_again_first() {
    let mut world = two();
    world.write(node(1), 3, false);
    world.run(22);
    // Somewhere in these ticks the clear is on its way; a write in between has to set it durably again,
    // which the world checks for every write that reaches a disk or a wire.
    for n in 0..40 {
        world.write(node(1), 3 + (n % 2), false);
        world.run(1 + u32::try_from(n % 30).unwrap());
    }
    world.converge();
}

#[test]
fn r16_nothing_is_acknowledged_under_a_config_that_the_superblock_does_not_hold() {
    let mut world = two();
    world.crash(node(2));
    world.run(20);
    assert!(world.config.member(node(2)).is_none());
    world.start(node(2));
    world.hold_proposals = true;
    world.run(20);
    world.hold_proposals = false;
    world.nodes.get_mut(&node(1)).unwrap().disk_paused = true;
    world.settle();
    assert!(world.config.member(node(2)).is_some(), "the join is committed");
    world.read(node(1), 0);
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "its superblock does not say so yet");
    world.nodes.get_mut(&node(1)).unwrap().disk_paused = false;
    world.converge();
    let image = world.image(node(1));
    assert_eq!(image.superblock.epoch, world.config.epoch);
}

/// A slow write in front of it does not make an acknowledged one stable: a flush has to flush it
/// (design invariant 4).
#[test]
fn a_flush_covers_what_was_acknowledged_past_a_write_still_under_way() {
    let mut world = two();
    for block in [3, 4] {
        world.write(node(1), block, false);
    }
    world.run(1);
    world.flush(node(1));
    world.run(1);
    // The first of two writes hangs on the secondary's disk, the second is acknowledged.
    world.nodes.get_mut(&node(2)).unwrap().disk_paused = true;
    world.write(node(1), 3, false);
    let tag = world.write(node(1), 4, false);
    world.settle();
    let last = world.nodes[&node(2)].pending.len() - 1;
    world.complete_disk(node(2), last);
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "the write behind the slow one is acknowledged");
    world.flush(node(1));
    world.settle();
    if world.waiting(node(1)) == 1 {
        let stable = &world.nodes[&node(2)].disk.stable;
        assert_eq!(stable[4], tag, "the flush was answered, and the write is not stable");
    }
    world.nodes.get_mut(&node(2)).unwrap().disk_paused = false;
    world.converge();
}
