//! Random schedules: faults of every kind over a workload, then convergence. A failing seed is printed
//! and can be run alone with `BLKREPL_SEED`.

use std::time::Duration;

use super::{Options, World, node};

fn faults(world: &mut World, replicas: u64, power: bool) {
    let id = node(1 + world.rng.below(replicas));
    let other = node(1 + world.rng.below(replicas));
    let up = world.nodes[&id].replica.is_some();
    match world.rng.below(12) {
        0 if up => world.crash(id),
        1 if up && power => {
            // One power loss at a time; another node must not be down with writes only it lacks.
            world.power_off(id);
        }
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
        _ => {}
    }
}

fn one_run(seed: u64, replicas: u64, steps: u32) -> u64 {
    let mut options = Options { replicas, seed, ..Options::default() };
    options.blocks = 48;
    let mut world = World::new(&options);
    world.run(30);
    for _ in 0..steps {
        for _ in 0..world.rng.below(30) {
            world.step();
        }
        let serving = world.serving();
        if let Some(primary) = serving {
            for _ in 0..world.rng.below(4) {
                let block = world.rng.below(options.blocks);
                match world.rng.below(8) {
                    0 => world.flush(primary),
                    1..=2 => world.read(primary, block),
                    _ if !world.history.busy(block) => {
                        let fua = world.rng.chance(10);
                        world.write(primary, block, fua);
                    }
                    _ => {}
                }
            }
        }
        if world.rng.chance(8) {
            faults(&mut world, replicas, false);
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
