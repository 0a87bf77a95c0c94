//! Random schedules: faults of every kind over a workload, then convergence. A failing seed is printed
//! and can be run alone with `BLKREPL_SEED`; `BLKREPL_SEED_COUNT` runs more than the usual number.

use std::time::Duration;

use super::world::BLOCK;
use super::{Options, World, node};

/// Options of one run that are drawn once.
struct Plan {
    replicas: u64,
    blocks: u64,
    steps: u32,
    /// A disk may fail. Then it is the only kind of fault that takes copies away.
    disk_errors: bool,
}

fn faults(world: &mut World, plan: &Plan) {
    let id = node(1 + world.rng.below(plan.replicas));
    let other = node(1 + world.rng.below(plan.replicas));
    let up = world.nodes[&id].replica.is_some();
    match world.rng.below(15) {
        0 if up => world.crash(id),
        // The promise is any single failure: one power loss at a time.
        1 if up && world.all_in_sync() && world.disks_work() => world.power_off(id),
        0..=4 if !up => world.start(id),
        2 if id != other => world.disconnect(id, other),
        3 if id != other => world.cut(id, other),
        4 => world.heal(),
        5 => world.nodes.get_mut(&id).unwrap().cut_off ^= true,
        6 => world.nodes.get_mut(&id).unwrap().disk_paused ^= true,
        7 => {
            world.clogged.insert(id);
        }
        8 => world.clogged.clear(),
        9 => world.hold_proposals ^= true,
        10 => {
            let now = crate::types::Nanos(world.now);
            if let Some(p) = world.config.primary.filter(|p| world.nodes[&p.node].replica.is_some()) {
                let _ = world.replica(p.node).begin_move(now, id);
                world.collect(p.node);
            }
        }
        11 if up => {
            let now = crate::types::Nanos(world.now);
            world.replica(id).begin_stop(now);
            world.collect(id);
        }
        12 if plan.disk_errors && world.all_in_sync() && world.disks_work() => break_disk(world, id),
        13 => world.mend_disks(),
        // What was flushed survives even this.
        14 if world.disks_work() && world.rng.chance(30) => {
            for n in 1..=plan.replicas {
                world.power_off(node(n));
            }
            world.history.power_lost();
        }
        _ => {}
    }
    // A process that has stopped ends.
    for n in 1..=plan.replicas {
        if world.nodes[&node(n)].stopped && world.nodes[&node(n)].replica.is_some() && world.rng.chance(50) {
            world.crash(node(n));
        }
    }
}

/// One disk at a time, and only while every replica has everything.
fn break_disk(world: &mut World, id: crate::types::NodeId) {
    let kind = world.rng.below(3);
    let block = world.rng.below(48);
    let disk = &mut world.nodes.get_mut(&id).unwrap().disk;
    match kind {
        0 => disk.write_error = true,
        1 => disk.flush_error = true,
        _ => disk.bad = vec![block, block + 1],
    }
}

fn request(world: &mut World, primary: crate::types::NodeId, blocks: u64) {
    let block = world.rng.below(blocks);
    let fua = world.rng.chance(10);
    match world.rng.below(10) {
        0 => world.flush(primary),
        1 => world.read(primary, block),
        2 => world.extents(primary),
        3..=4 => {
            let offset = block * BLOCK + 512 * world.rng.below(8);
            let len = (512 * (1 + world.rng.below(24))).min(blocks * BLOCK - offset);
            let end = (offset + len).div_ceil(BLOCK);
            if (block..end).any(|b| world.history.busy(b)) {
                return;
            }
            if world.rng.chance(40) {
                world.zero_bytes(primary, offset, len);
            } else {
                world.write_bytes(primary, offset, len, fua);
            }
        }
        _ if !world.history.busy(block) => {
            world.write(primary, block, fua);
        }
        _ => {}
    }
}

fn one_run(seed: u64, replicas: u64, steps: u32) -> u64 {
    let mut options = Options { replicas, seed, ..Options::default() };
    options.blocks = 48;
    let mut world = World::new(&options);
    let disk_errors = world.rng.chance(40);
    let plan = Plan { replicas, blocks: options.blocks, steps, disk_errors };
    world.errors_allowed = disk_errors;
    world.run(30);
    for _ in 0..plan.steps {
        for _ in 0..world.rng.below(30) {
            world.step();
        }
        if let Some(primary) = world.serving() {
            for _ in 0..world.rng.below(4) {
                request(&mut world, primary, plan.blocks);
            }
        }
        if world.rng.chance(8) {
            faults(&mut world, &plan);
        }
        if world.rng.chance(30) {
            world.failover();
        }
        let by = if world.rng.chance(10) { 1700 } else { 20 };
        world.pass(Duration::from_millis(by));
    }
    world.converge();
    world.acked_writes
}

fn seeds(first: u64, count: u64, replicas: u64, steps: u32) {
    if let Ok(seed) = std::env::var("BLKREPL_SEED") {
        one_run(seed.parse().expect("a number"), replicas, steps);
        return;
    }
    let count = std::env::var("BLKREPL_SEED_COUNT").map_or(count, |n| n.parse().expect("a number"));
    let mut acked = 0;
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| one_run(seed, replicas, steps));
        match run {
            Ok(n) => acked += n,
            Err(panic) => {
                eprintln!("failed with BLKREPL_SEED={seed} ({replicas} replicas)");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(acked > count * 5, "the workload gets through: {acked} writes in {count} runs");
}

#[test]
fn two_replicas_under_random_faults_lose_nothing() {
    seeds(1, 150, 2, 200);
}

#[test]
fn three_replicas_under_random_faults_lose_nothing() {
    seeds(10_001, 100, 3, 200);
}
