//! All nodes lose power at once, at any moment of a busy life: what was flushed is there afterwards
//! (design invariant 4), and no block holds what was never written to it.

use std::time::Duration;

use super::{Options, World, node};

fn one_run(seed: u64, replicas: u64) -> u64 {
    let options = Options { replicas, seed, blocks: 48, ..Options::default() };
    let mut world = World::new(&options);
    world.run(20);
    for _ in 0..240 {
        let flushes = world.acked_flushes;
        for _ in 0..world.rng.below(10) {
            world.step();
        }
        // The moment after a flush was answered is the one that counts.
        let percent = if world.acked_flushes > flushes { 12 } else { 1 };
        if world.rng.chance(percent) {
            for n in 1..=replicas {
                world.power_off(node(n));
            }
            world.history.power_lost();
            world.converge();
        }
        let Some(primary) = world.serving() else {
            world.pass(Duration::from_millis(20));
            continue;
        };
        let block = world.rng.below(options.blocks);
        match world.rng.below(6) {
            0 => world.flush(primary),
            1 => world.read(primary, block),
            _ if !world.history.busy(block) => {
                let fua = world.rng.chance(10);
                world.write(primary, block, fua);
            }
            _ => {}
        }
        if world.rng.chance(20) {
            world.pass(Duration::from_millis(20));
        }
    }
    world.acked_writes
}

#[test]
fn flushed_writes_survive_power_loss_of_all_nodes_at_any_moment() {
    let mut acked = 0;
    for seed in 0..30 {
        acked += one_run(20_000 + seed, 2) + one_run(30_000 + seed, 3);
    }
    assert!(acked > 1000, "the workload gets through: {acked} writes");
}
