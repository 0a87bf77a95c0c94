//! A small world of replicas for unit and scenario tests: disks with a volatile cache, links, a
//! committed config that reaches the nodes late, leases, crashes and power loss. One seed decides
//! every choice; scenarios steer it by hand.
//!
//! Blocks hold a tag instead of bytes. The world keeps what clients were told and checks that no
//! acknowledged write is lost and nothing stale is read.

mod breaks;
mod committed;
mod disk;
mod history;
mod power;
mod random;
mod scenarios;
mod scenarios_extents;
mod scenarios_faults;
mod scenarios_force;
mod scenarios_refusals;
mod scenarios_rules;
mod scenarios_schedules;
mod world;

pub(super) use disk::TestDisk;
pub(super) use history::History;
pub(super) use world::{Options, World, node};

/// Two replicas, in sync.
pub(super) fn two() -> World {
    let mut world = World::new(&Options::default());
    world.run(12);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world
}

/// Steps until one more message of this kind was sent.
pub(super) fn until_sent(world: &mut World, kind: &str) {
    let count = |w: &World| w.sent.get(kind).copied().unwrap_or_default();
    let before = count(world);
    for _ in 0..10_000 {
        if count(world) > before {
            return;
        }
        if !world.step() {
            world.pass(std::time::Duration::from_millis(10));
        }
    }
    panic!("no {kind} is sent: {:#?}", world.summary());
}

/// Deterministic random numbers (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
