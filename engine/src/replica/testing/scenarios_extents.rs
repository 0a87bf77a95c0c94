//! What clients are told of holes, and of what a missing replica lacks.

use crate::types::Extent;

use super::world::BLOCK;
use super::{node, two};

fn extent(blocks: u64, hole: bool, dirty: bool) -> Extent {
    Extent { len: blocks * BLOCK, hole, dirty }
}

#[test]
fn a_hole_is_what_was_never_written_or_zeroed_since() {
    let mut world = two();
    world.write(node(1), 3, false);
    world.write(node(1), 4, false);
    world.run(1);
    world.extents(node(1));
    world.run(1);
    let rest = extent(59, true, false);
    assert_eq!(world.extents, [extent(3, true, false), extent(2, false, false), rest]);
    world.zero_bytes(node(1), 3 * BLOCK, BLOCK);
    world.run(1);
    world.extents(node(1));
    world.run(1);
    assert_eq!(world.extents, [extent(4, true, false), extent(1, false, false), rest]);
}

#[test]
fn r8_zeroes_that_could_still_vanish_are_not_called_a_hole() {
    let mut world = two();
    world.write(node(1), 3, false);
    world.run(1);
    world.clogged.insert(node(2)); // its acknowledgements do not come through
    world.zero_bytes(node(1), 3 * BLOCK, BLOCK);
    world.settle();
    world.extents(node(1));
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "the zeroes are not acknowledged, the block status is answered");
    assert_eq!(world.extents[1], extent(1, false, false));
    world.clogged.clear();
    world.run(1);
    world.extents(node(1));
    world.run(1);
    assert_eq!(world.extents, [extent(64, true, false)]);
}

#[test]
fn what_a_missing_replica_lacks_is_dirty() {
    let mut world = two();
    world.crash(node(2));
    world.write(node(1), 9, false);
    world.run(200);
    assert_eq!(world.acked_writes, 1, "it went on alone");
    world.extents(node(1));
    world.run(1);
    assert!(world.extents.contains(&extent(1, false, true)), "{:?}", world.extents);
    world.start(node(2));
    world.run(200);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.extents(node(1));
    world.run(1);
    assert_eq!(world.extents, [extent(9, true, false), extent(1, false, false), extent(54, true, false)]);
}

#[test]
fn r26_no_block_status_leaves_after_the_lease_has_run_out() {
    let mut world = two();
    world.nodes.get_mut(&node(1)).unwrap().cut_off = true;
    world.extents(node(1));
    world.now += 2_000_000_000;
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "held, not answered");
}

#[test]
fn what_reads_as_zeroes_travels_as_a_range_in_a_resync_also_after_it_was_compared() {
    let mut world = two();
    for block in [20, 21, 40] {
        world.write(node(1), block, false);
    }
    world.run(1);
    world.crash(node(2));
    world.run(200);
    world.zero_bytes(node(1), 20 * BLOCK, 2 * BLOCK);
    world.run(2);
    world.start(node(2));
    world.run(200);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    assert_eq!(world.sent.get("copy"), None, "{:?}", world.sent);
    assert!(world.sent.contains_key("compare") && world.sent.contains_key("copy_zero"), "{:?}", world.sent);
    world.converge();
}
