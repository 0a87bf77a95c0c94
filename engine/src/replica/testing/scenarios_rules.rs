//! One scenario per rule whose absence no other scenario would show: something hangs at the very point
//! that the rule guards, and what must wait for it is seen to wait.

use std::time::Duration;

use crate::meta::Area;
use crate::types::{Durability, Nanos, ReplicaSlot};
use crate::wire::{PeerMsg, WriteSeq};

use super::super::io::{ClientInput, ClientOp, ClientRequest, ConnId, Cookie, Event, PeerInput};
use super::world::{BLOCK, Hang};
use super::{Options, World, node, until_sent};

fn world(replicas: u64) -> World {
    let mut world = World::new(&Options { replicas, ..Options::default() });
    world.run(20);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world
}

/// Node 2 was away while block 5 was written and is back; its resync is at the first message of `kind`.
fn resync_at(kind: &str) -> World {
    let mut world = world(2);
    return_without(&mut world, 5, kind);
    world
}

/// The same of block `block`, with room for `window` blocks in flight; its copy is on its way.
fn resync_with_window(window: u32, block: u64) -> World {
    let mut options = Options { blocks: 64 * 256, ..Options::default() };
    options.settings.resync_window_bytes = window * 4096;
    let mut world = World::new(&options);
    world.run(12);
    return_without(&mut world, block, "copy");
    world
}

/// Node 2 goes, `block` is written, and it comes back; its resync gets to the first message of `kind`.
fn return_without(world: &mut World, block: u64, kind: &str) {
    world.crash(node(2));
    world.run(20);
    world.write(node(1), block, false);
    world.run(60);
    world.start(node(2));
    until_sent(world, kind);
}

fn hang(world: &mut World, id: u64, what: Hang) {
    world.nodes.get_mut(&node(id)).unwrap().hangs.push(what);
}

fn return_all(world: &mut World) {
    world.nodes.values_mut().for_each(|n| n.hangs.clear());
}

fn dirty(world: &mut World, at: u64, of: u8, block: u64) -> bool {
    world.replica(node(at)).store.dirty(ReplicaSlot(of)).unwrap().get(block)
}

fn dirty_count(world: &mut World, at: u64, of: u8) -> u64 {
    world.replica(node(at)).store.dirty(ReplicaSlot(of)).unwrap().count()
}

fn intents(world: &mut World, at: u64) -> u64 {
    world.replica(node(at)).status().intent_regions
}

fn superblocks() -> Hang {
    Hang::Meta(0, 8192)
}

/// The metadata writes of every dirty bitmap.
fn bitmaps(world: &World) -> Hang {
    let area = world.image(node(1)).layout().area(Area::Dirty(ReplicaSlot(0)));
    Hang::Meta(area.offset(), u64::MAX)
}

fn held_is_stable(world: &World, id: u64, block: usize) -> bool {
    let disk = &world.nodes[&node(id)].disk;
    disk.stable[block] == disk.data[block]
}

/// The primary lives, but hears nothing of the cluster: its lease runs out and another is promoted.
fn take_over_from_a_living_primary(world: &mut World) {
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.nodes.get_mut(&node(1)).unwrap().cut_off = false;
}

fn move_to(world: &mut World, from: u64, to: u64) {
    let now = Nanos(world.now);
    world.replica(node(from)).begin_move(now, node(to)).unwrap();
    world.collect(node(from));
    world.run(20);
    assert_eq!(world.serving(), Some(node(to)), "{:#?}", world.summary());
}

fn say(world: &mut World, from: u64, to: u64, msg: PeerMsg) {
    let session = world.session(node(to), node(from));
    let now = Nanos(world.now);
    world.replica(node(to)).handle_peer(now, PeerInput::Msg(session, msg));
    world.collect(node(to));
}

#[test]
fn r2_another_run_of_the_primary_is_not_obeyed() {
    let mut world = world(2);
    world.crash(node(1));
    world.start(node(1));
    world.run(2);
    let reign = world.config.reign;
    say(&mut world, 1, 2, PeerMsg::Takeover { reign });
    world.settle();
    assert_eq!(world.replica(node(2)).following.confirmed, None, "the config names the run before");
    world.converge();
}

#[test]
fn r2_an_answer_or_a_call_of_an_older_reign_counts_for_nothing() {
    let mut world = world(2);
    let old = world.config.reign;
    move_to(&mut world, 1, 2);
    move_to(&mut world, 2, 1);
    world.clogged.insert(node(2));
    world.write(node(1), 9, false);
    world.settle();
    for seq in 0..10 {
        say(&mut world, 2, 1, PeerMsg::WriteAck { reign: old, seq: WriteSeq(seq) });
    }
    assert_eq!(world.acked_writes, 0);
    say(&mut world, 1, 2, PeerMsg::Takeover { reign: old });
    world.clogged.clear();
    world.run(2);
    assert_eq!(world.acked_writes, 1);
    world.write(node(1), 10, false);
    world.run(2);
    assert_eq!(world.acked_writes, 2, "node 2 still follows");
    world.converge();
}

#[test]
fn r3_a_promoted_replica_marks_its_intent_regions_for_all_others() {
    let mut world = world(3);
    world.crash(node(3));
    world.run(20);
    world.write(node(1), 17, false);
    world.settle();
    assert_eq!(dirty_count(&mut world, 2, 2), 1, "the block");
    take_over_from_a_living_primary(&mut world);
    world.give_config(node(2));
    assert_eq!(dirty_count(&mut world, 2, 2), 16, "its region");
    world.converge();
}

#[test]
fn r4_a_joiner_has_flushed_before_it_is_proposed() {
    let mut world = resync_at("copy");
    hang(&mut world, 2, Hang::Flush);
    world.run(10);
    assert!(world.config.member(node(2)).is_none(), "its copies are in a cache");
    return_all(&mut world);
    world.run(2);
    assert!(world.config.member(node(2)).is_some());
    assert!(held_is_stable(&world, 2, 5));
    world.converge();
}

#[test]
fn r4_a_joiner_is_waited_for_from_before_its_flush() {
    let mut world = resync_at("join_flush");
    world.clogged.insert(node(2));
    world.write(node(1), 7, false);
    world.settle();
    assert_eq!(world.acked_writes, 1, "the flush may come before this write");
    world.clogged.clear();
    world.run(2);
    assert_eq!(world.acked_writes, 2);
    world.converge();
}

#[test]
fn r4_what_was_sent_before_the_joiner_was_waited_for_has_arrived_before_its_join() {
    let mut world = resync_at("copy");
    hang(&mut world, 2, Hang::Write(40));
    world.write(node(1), 40, false);
    world.settle();
    assert_eq!(world.acked_writes, 2, "acknowledged without the target");
    world.run(10);
    assert!(world.config.member(node(2)).is_none());
    return_all(&mut world);
    world.run(2);
    assert!(world.config.member(node(2)).is_some());
    world.converge();
}

#[test]
fn r5_a_flush_waits_for_the_others_and_for_the_own_disk() {
    for id in [1, 2] {
        let mut world = world(2);
        world.write(node(1), 3, false);
        world.run(1);
        hang(&mut world, id, Hang::Flush);
        world.flush(node(1));
        world.run(2);
        assert_eq!(world.waiting(node(1)), 1, "node {id} has not flushed");
        world.run(30);
        assert_eq!((intents(&mut world, 1), intents(&mut world, 2)), (1, 1), "node {id} has not flushed");
        return_all(&mut world);
        world.run(1);
        assert_eq!(world.waiting(node(1)), 0);
        assert!(held_is_stable(&world, 1, 3) && held_is_stable(&world, 2, 3));
        world.converge();
    }
}

#[test]
fn r5_an_intent_goes_only_after_the_bitmaps_of_the_missing_are_durable() {
    let mut world = world(2);
    world.crash(node(2));
    world.run(20);
    let bitmaps = bitmaps(&world);
    hang(&mut world, 1, bitmaps);
    world.write(node(1), 33, false);
    world.run(60);
    assert!(world.image(node(1)).intent.get(2), "nothing else names the block yet");
    return_all(&mut world);
    world.run(60);
    let image = world.image(node(1));
    assert!(!image.intent.get(2) && image.dirty[&ReplicaSlot(1)].get(33));
    world.converge();
}

#[test]
fn r5_what_a_replica_held_when_it_left_is_not_cleared_before_it_has_joined() {
    let mut world = world(2);
    world.write(node(1), 33, false);
    world.settle();
    world.crash(node(2));
    world.run(20);
    world.start(node(2));
    world.hold_proposals = true;
    world.run(4);
    world.write(node(1), 1, false); // so that something becomes stable, of which the joiner is told
    world.run(60);
    assert!(world.image(node(2)).intent.get(2));
    world.converge();
}

#[test]
fn r5_what_was_stable_in_an_older_reign_says_nothing_of_this_one() {
    let mut world = world(3);
    for block in 0..20 {
        world.write(node(1), block, false);
    }
    world.run(60);
    move_to(&mut world, 1, 2);
    hang(&mut world, 2, Hang::Flush);
    world.write(node(2), 33, false);
    world.run(60);
    assert!(world.image(node(3)).intent.get(2), "node 2 has not flushed it");
    return_all(&mut world);
    world.run(60);
    assert!(!world.image(node(3)).intent.get(2));
    world.converge();
}

#[test]
fn r5_what_was_written_in_an_older_reign_goes_with_the_first_flush_of_this_one() {
    let mut world = world(2);
    for block in 0..20 {
        world.write(node(1), block, false);
    }
    world.settle();
    take_over_from_a_living_primary(&mut world);
    world.run(80);
    assert_eq!((intents(&mut world, 1), intents(&mut world, 2)), (0, 0));
    world.converge();
}

#[test]
fn r7_a_target_begins_no_write_before_an_older_one_of_the_block_has_ended() {
    let mut world = resync_at("copy");
    hang(&mut world, 2, Hang::Write(5)); // so that it stays a target, which is not waited for
    hang(&mut world, 2, Hang::Write(40));
    for _ in 0..3 {
        world.write(node(1), 40, false);
        world.settle();
    }
    assert_eq!(world.nodes[&node(2)].pending.len(), 2, "{:?}", world.nodes[&node(2)].pending);
    return_all(&mut world);
    world.converge();
}

#[test]
fn r7_nothing_is_confirmed_while_the_kernel_has_a_write_of_an_older_reign() {
    let mut world = world(3);
    hang(&mut world, 3, Hang::Write(20));
    world.write(node(1), 20, false);
    world.settle();
    world.crash(node(1));
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.run(30);
    let reign = world.config.reign;
    assert_ne!(world.replica(node(2)).peers[&node(3)].reported, Some(reign));
    return_all(&mut world);
    world.run(2);
    assert_eq!(world.replica(node(2)).peers[&node(3)].reported, Some(reign));
    world.converge();
}

#[test]
fn r7_a_new_primary_serves_nothing_while_its_kernel_has_a_write_of_an_older_reign() {
    let mut world = world(3);
    hang(&mut world, 2, Hang::Write(20));
    world.write(node(1), 20, false);
    world.settle();
    world.crash(node(1));
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.run(60);
    assert_eq!(world.serving(), None, "what it would compare and flush may change");
    return_all(&mut world);
    world.run(20);
    assert_eq!(world.serving(), Some(node(2)));
    world.converge();
}

#[test]
fn r7_a_lost_session_takes_what_had_not_begun_with_it() {
    let mut world = world(2);
    hang(&mut world, 2, Hang::Meta(0, u64::MAX)); // its intent is never durable
    let tag = world.write(node(1), 20, false);
    world.settle();
    world.cut(node(1), node(2));
    return_all(&mut world);
    world.settle();
    assert_ne!(world.nodes[&node(2)].disk.data[20], tag);
    world.converge();
}

#[test]
fn r7_a_disk_that_still_holds_an_overdue_request_takes_no_copies() {
    let mut options = Options::default();
    options.settings.disk_timeout = Duration::from_secs(2);
    let mut world = World::new(&options);
    world.run(12);
    world.write(node(1), 20, false);
    world.run(1);
    hang(&mut world, 2, Hang::Flush);
    world.flush(node(1));
    world.run(200);
    assert!(world.config.member(node(2)).is_none(), "it holds the flush up");
    let tag = world.write(node(1), 40, false);
    world.run(40);
    assert_ne!(world.nodes[&node(2)].disk.data[40], tag);
    world.converge();
}

#[test]
fn r9_no_removal_is_proposed_before_the_own_flush() {
    let mut world = world(2);
    world.write(node(1), 4, false);
    world.run(1);
    hang(&mut world, 1, Hang::Flush);
    world.crash(node(2));
    world.run(20);
    assert!(world.proposals.is_empty() && world.config.member(node(2)).is_some());
    return_all(&mut world);
    world.run(10);
    assert!(world.config.member(node(2)).is_none());
    world.converge();
}

#[test]
fn r9_a_new_primary_flushes_what_it_acknowledged_as_a_secondary_before_it_serves() {
    let mut world = world(2);
    world.write(node(1), 4, false);
    world.settle();
    hang(&mut world, 2, Hang::Flush);
    take_over_from_a_living_primary(&mut world);
    world.run(20);
    assert_eq!(world.serving(), None);
    return_all(&mut world);
    world.run(4);
    assert_eq!(world.serving(), Some(node(2)));
    assert!(held_is_stable(&world, 2, 4));
    world.converge();
}

#[test]
fn r11_what_only_another_member_has_is_made_equal_too() {
    let mut world = world(3);
    world.cut_wire(node(1), node(2));
    let tag = world.write(node(1), 30, false);
    world.settle();
    assert_eq!(world.nodes[&node(3)].disk.data[30], tag);
    world.crash(node(1));
    world.restore_wires();
    world.pass(Duration::from_millis(1700));
    assert!(world.failover());
    world.run(40);
    assert_eq!(world.serving(), Some(node(2)));
    let data = |id: u64| world.nodes[&node(id)].disk.data[30];
    assert_eq!(data(2), data(3), "equal before anything was served");
    world.converge();
}

#[test]
fn r12_at_a_removal_every_member_marks_its_intent_regions() {
    let mut world = world(3);
    world.write(node(1), 20, false);
    world.settle();
    world.crash(node(3));
    while world.config.member(node(3)).is_some() {
        world.run(1);
    }
    assert_eq!((dirty_count(&mut world, 1, 2), dirty_count(&mut world, 2, 2)), (16, 16));
    world.converge();
}

#[test]
fn r12_a_joiner_learns_what_the_missing_lack_and_forgets_it_when_they_have_joined() {
    let mut world = world(3);
    world.crash(node(3));
    world.crash(node(2));
    world.run(30);
    world.write(node(1), 41, false);
    world.run(60);
    let hold = bitmaps(&world);
    hang(&mut world, 2, hold);
    world.start(node(2));
    hang(&mut world, 2, hold);
    world.run(20);
    assert!(world.config.member(node(2)).is_none(), "the bitmaps that it got are not durable");
    return_all(&mut world);
    world.run(10);
    assert!(world.config.member(node(2)).is_some());
    assert!(dirty(&mut world, 2, 2, 41), "node 3 lacks it, says node 1");
    world.start(node(3));
    world.run(40);
    assert!(world.all_in_sync());
    assert_eq!((dirty_count(&mut world, 1, 2), dirty_count(&mut world, 2, 2)), (0, 0));
    world.converge();
}

#[test]
fn r12_who_knows_a_newer_config_than_the_sender_marks_by_it() {
    let mut world = world(3);
    world.crash(node(3));
    world.hold_proposals = true;
    world.run(14);
    assert!(!world.proposals.is_empty());
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.hold_proposals = false;
    world.settle();
    assert!(world.config.member(node(3)).is_none());
    assert!(!dirty(&mut world, 2, 2, 40));
    world.write(node(1), 40, false);
    world.settle();
    assert!(dirty(&mut world, 2, 2, 40), "the sender still counts node 3 in");
    world.converge();
}

#[test]
fn r14_while_a_removal_is_undecided_an_acknowledged_write_is_stable() {
    let mut world = world(2);
    world.clogged.insert(node(2));
    world.write(node(1), 9, false);
    world.settle();
    world.hold_proposals = true;
    world.pass(Duration::from_millis(1200));
    world.settle();
    assert_eq!(world.proposals.len(), 1);
    world.clogged.clear();
    hang(&mut world, 1, Hang::Flush);
    world.settle();
    assert_eq!(world.acked_writes, 0, "committed by both, but this replica may be alone at any moment");
    return_all(&mut world);
    world.settle();
    assert_eq!(world.acked_writes, 1);
    world.converge();
}

#[test]
fn r14_what_was_sent_to_two_and_committed_by_one_is_flushed_first() {
    let mut world = world(2);
    world.clogged.insert(node(2));
    hang(&mut world, 1, Hang::Write(9));
    world.write(node(1), 9, false);
    world.settle();
    world.crash(node(2));
    world.run(30);
    assert!(world.config.member(node(2)).is_none());
    hang(&mut world, 1, Hang::Flush);
    world.nodes.get_mut(&node(1)).unwrap().hangs.remove(0);
    world.settle();
    assert_eq!(world.acked_writes, 0, "it landed after the flush of the removal");
    return_all(&mut world);
    world.run(1);
    assert_eq!(world.acked_writes, 1);
    assert!(held_is_stable(&world, 1, 9));
    world.converge();
}

#[test]
fn fua_and_durability_always_make_a_write_stable_everywhere_before_it_is_acknowledged() {
    for (fua, durability) in [(true, Durability::Flush), (false, Durability::Always)] {
        let mut options = Options::default();
        options.settings.durability = durability;
        let mut world = World::new(&options);
        world.run(12);
        world.write(node(1), 9, fua);
        world.settle();
        assert_eq!(world.acked_writes, 1);
        assert!(held_is_stable(&world, 1, 9) && held_is_stable(&world, 2, 9));
        world.converge();
    }
}

/// Both copies of the superblock have to be written: each one in turn does not return.
#[test]
fn r16_neither_an_answer_nor_a_clear_comes_before_both_copies_of_the_superblock() {
    for copy in [0, 4096] {
        let mut world = world(2);
        world.write(node(1), 3, false);
        world.settle();
        world.crash(node(2));
        hang(&mut world, 1, Hang::Meta(copy, copy + 4096));
        world.run(20);
        assert!(world.config.member(node(2)).is_none());
        world.read(node(1), 3);
        world.run(40);
        assert_eq!(world.waiting(node(1)), 1, "copy at {copy}");
        assert!(world.image(node(1)).intent.get(0), "copy at {copy}");
        let here = world.replica(node(1));
        assert!(!here.serving() && here.status().serving, "copy at {copy}: clients still belong here");
        return_all(&mut world);
        world.run(60);
        assert_eq!(world.waiting(node(1)), 0);
        assert!(!world.image(node(1)).intent.get(0));
        world.converge();
    }
}

#[test]
fn r16_a_follower_answers_nothing_under_a_config_that_its_superblock_does_not_hold() {
    let mut world = world(3);
    hang(&mut world, 2, superblocks());
    world.crash(node(3));
    world.run(20);
    assert!(world.config.member(node(3)).is_none());
    world.write(node(1), 3, false);
    world.settle();
    assert_eq!(world.acked_writes, 0);
    return_all(&mut world);
    world.run(1);
    assert_eq!(world.acked_writes, 1);
    world.converge();
}

#[test]
fn r16_a_doubtful_superblock_that_says_something_else_than_the_config_is_not_believed() {
    let mut world = world(2);
    world.crash(node(2));
    world.run(20);
    assert!(world.config.member(node(2)).is_none());
    world.nodes.get_mut(&node(2)).unwrap().disk.meta.get_mut(&4096).unwrap()[200] ^= 1;
    world.start(node(2));
    world.converge();
    let everything = |e: &Event| matches!(e, Event::ResyncStarted { bytes, .. } if *bytes == 64 * BLOCK);
    assert!(world.nodes[&node(1)].events.iter().any(everything), "{:#?}", world.summary());
}

#[test]
fn r21_a_copy_waits_for_the_write_of_its_block() {
    let mut world = resync_at("resync_start");
    hang(&mut world, 1, Hang::Write(5));
    let newest = world.write(node(1), 5, false);
    world.run(10);
    assert_eq!(world.sent.get("compare").or(world.sent.get("copy")), None, "the block is being written");
    return_all(&mut world);
    world.run(10);
    assert!(world.all_in_sync());
    assert_eq!(world.nodes[&node(2)].disk.data[5], newest);
    world.converge();
}

/// For one tick clients wait longer than they may.
fn tick_of_late_answers(world: &mut World) {
    hang(world, 1, Hang::Read);
    for block in [16_000, 16_001, 16_002] {
        world.read(node(1), block);
    }
    world.settle();
    world.pass(Duration::from_millis(50));
    world.nodes.get_mut(&node(1)).unwrap().hangs.clear();
    world.settle();
}

/// The resync of node 2 begins with clients about, and two of its chunks, a region each, stay under way.
#[test]
fn a_resync_that_makes_clients_late_goes_on_by_one_chunk_a_tick() {
    let mut options = Options { blocks: 64 * 256, ..Options::default() };
    options.settings.resync_latency_budget = Duration::from_millis(10);
    let mut world = World::new(&options);
    world.run(12);
    world.crash(node(2));
    world.run(20);
    world.zero_bytes(node(1), 0, 256 * 16 * BLOCK);
    world.run(60);
    let away = dirty_count(&mut world, 1, 1);
    hang(&mut world, 2, Hang::Write(0));
    hang(&mut world, 2, Hang::Write(16));
    world.read(node(1), 16_000);
    world.start(node(2));
    world.run(6);
    assert_eq!(dirty_count(&mut world, 1, 1), away, "the two that hang fill what may be in flight");
    for _ in 0..8 {
        tick_of_late_answers(&mut world);
    }
    return_all(&mut world);
    world.settle();
    let mut left = dirty_count(&mut world, 1, 1);
    for _ in 0..10 {
        tick_of_late_answers(&mut world);
        let now = dirty_count(&mut world, 1, 1);
        assert_eq!(left - now, 16, "{left} blocks were lacking");
        left = now;
    }
    world.run(60); // without clients it is done soon
    assert!(world.all_in_sync(), "{:#?}", world.summary());
}

/// A live write for which there is no room is not sent; an older one of the same block must not clear
/// the bit then, whatever else its answer covers.
#[test]
fn r21_the_answer_to_an_older_write_leaves_the_bit_of_a_newer_one_that_was_not_sent() {
    let mut world = resync_with_window(64, 5); // one chunk at a time, and the first one hangs
    hang(&mut world, 2, Hang::Write(5)); // the resync does not end meanwhile
    hang(&mut world, 2, Hang::Write(40));
    world.write(node(1), 40, false);
    world.settle();
    world.zero_bytes(node(1), 1024 * BLOCK, 8 * 64 * 4096 - BLOCK); // leaves room for nothing
    hang(&mut world, 2, Hang::Write(1024));
    world.settle();
    let newest = world.write(node(1), 40, false); // no room
    world.settle();
    assert_eq!(world.acked_writes, 4);
    // The older write of block 40 returns; its answer comes back.
    world.nodes.get_mut(&node(2)).unwrap().hangs.retain(|h| *h != Hang::Write(40));
    world.clogged.insert(node(1));
    world.settle();
    assert!(dirty(&mut world, 1, 1, 40), "the target lacks the newer one");
    world.clogged.clear();
    return_all(&mut world);
    world.run(40);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    assert_eq!(world.nodes[&node(2)].disk.data[40], newest);
}

/// Writes for which there is no room are left for a later round, and in each round there are new ones: once the
/// cursor has come round twice, clients wait for the target.
#[test]
fn a_target_that_falls_behind_is_waited_for() {
    let window = 128; // blocks: two chunks, of which one hangs
    let mut world = resync_with_window(window, 500);
    hang(&mut world, 2, Hang::Write(500)); // the resync does not end meanwhile
    hang(&mut world, 2, Hang::Write(1024));
    world.zero_bytes(node(1), 1024 * BLOCK, 8 * u64::from(window) * BLOCK); // leaves room for nothing
    world.settle();
    for block in [5, 4] {
        world.write(node(1), block, false);
        world.settle();
        world.run(2);
        assert_eq!(world.waiting(node(1)), 0, "block {block}: nobody waits for a target yet");
    }
    let newest = world.write(node(1), 60, false);
    hang(&mut world, 2, Hang::Write(60));
    world.run(2);
    assert_eq!(world.waiting(node(1)), 1, "each write is waited for from here on");
    return_all(&mut world);
    world.run(40);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    assert_eq!(world.nodes[&node(2)].disk.data[60], newest);
}

#[test]
fn r21_the_answer_to_an_older_write_leaves_the_bit_of_a_newer_one_under_way() {
    let mut world = resync_at("copy");
    hang(&mut world, 2, Hang::Write(5));
    world.write(node(1), 40, false);
    world.cut_wire(node(2), node(1));
    world.settle();
    world.cut_wire(node(1), node(2));
    world.write(node(1), 40, false);
    world.settle();
    world.restore_wires();
    world.cut_wire(node(1), node(2));
    world.settle(); // the first is answered, the second has not arrived
    assert!(dirty(&mut world, 1, 1, 40));
    world.disconnect(node(1), node(2));
    world.converge();
}

#[test]
fn r22_a_set_waits_for_a_write_of_its_own_behind_that_of_the_clear() {
    let mut world = world(2);
    world.write(node(1), 3, false);
    world.run(1);
    let layout = world.image(node(1)).layout();
    let (from, to) = (layout.area(Area::Intent).offset(), layout.area(Area::Dirty(ReplicaSlot(0))).offset());
    hang(&mut world, 1, Hang::Meta(from, to));
    for _ in 0..60 {
        let set = intents(&mut world, 1) > 0;
        world.run(u32::from(set));
    }
    assert_eq!(intents(&mut world, 1), 0, "cleared in memory, on its way to the disk");
    world.write(node(1), 3, false);
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "the intent is not on the disk");
    return_all(&mut world);
    world.run(1); // the world looks at the disk before every write and every send
    assert_eq!(world.waiting(node(1)), 0);
    world.converge();
}

#[test]
fn overlapping_writes_are_carried_out_in_the_same_order_everywhere() {
    let mut world = world(2);
    world.clogged.insert(node(2));
    world.write(node(1), 5, false);
    // Of a connection that the history does not follow: that one knows one write per block at a time.
    let (conn, cookie, offset) = (ConnId(u64::MAX), Cookie(1), 5 * BLOCK);
    let zero = ClientRequest { conn, cookie, op: ClientOp::Zero, offset, len: BLOCK, fua: false };
    let now = Nanos(world.now);
    world.replica(node(1)).handle_client(now, ClientInput::Request(zero));
    world.collect(node(1));
    world.settle();
    world.clogged.clear();
    world.run(2);
    assert_eq!([1, 2].map(|id| world.nodes[&node(id)].disk.data[5]), [0, 0], "the later one wins on both");
}

#[test]
fn a_secondary_that_cannot_write_does_not_acknowledge_and_is_taken_out() {
    let mut world = world(2);
    world.nodes.get_mut(&node(2)).unwrap().disk.write_error = true;
    world.hold_proposals = true;
    world.write(node(1), 3, false);
    world.run(10);
    assert_eq!(world.acked_writes, 0);
    world.hold_proposals = false;
    world.run(10);
    assert_eq!(world.acked_writes, 1);
    assert!(world.config.member(node(2)).is_none());
    world.mend_disks();
    world.crash(node(2));
    world.converge();
}

#[test]
fn a_failed_primary_answers_nothing_any_more() {
    let mut world = world(2);
    hang(&mut world, 1, Hang::Read);
    world.read(node(1), 3);
    world.settle();
    world.nodes.get_mut(&node(1)).unwrap().disk.flush_error = true;
    world.hold_proposals = true;
    world.write(node(1), 4, false);
    world.settle();
    world.flush(node(1));
    world.settle();
    assert!(world.replica(node(1)).status().failure.is_some());
    return_all(&mut world);
    world.settle();
    assert_eq!(world.waiting(node(1)), 2, "the read, and the flush");
    world.hold_proposals = false;
    world.run(20);
    assert_eq!(world.waiting(node(1)), 0, "closed, to be asked again at node 2");
    world.mend_disks();
    world.crash(node(1));
    world.converge();
}
