//! Scenarios, one situation each.

use super::{Options, World, node};

#[test]
fn a_new_volume_gets_its_second_replica_and_serves() {
    let mut world = World::new(&Options::default());
    world.run(10);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world.write(node(1), 3, false);
    world.run(1);
    assert_eq!(world.acked_writes, 1);
    world.converge();
}
