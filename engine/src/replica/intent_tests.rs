//! [`IntentBook`] against a model: what each set region has seen, and a metadata file that holds what has
//! completed. After every step, and after a crash at any moment: a write that was let go has its bits on disk,
//! and what a missing replica lacks is on disk either as a dirty bit or by the intent of its region.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::meta_store::tests::Rig;
use super::*;
use crate::types::ReplicaSlot;

const REGIONS: u64 = 6;
const PER: u64 = 16;
/// The last region is a partial one.
const BLOCKS: u64 = REGIONS * PER - 6;
const SLOTS: [ReplicaSlot; 2] = [ReplicaSlot(0), ReplicaSlot(5)];

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * 4096, 4096, 65_536).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    /// A write begins.
    Begin(u64, u64),
    /// One that was begun is let go if its intent is durable, and marks what the missing lack.
    Launch(prop::sample::Index),
    /// One that was begun is over: carried out in this reign, and by a member, or not.
    End(prop::sample::Index, bool, bool),
    /// The replica in this slot was brought these blocks.
    Settle(usize, u64, u64),
    /// Every set region is marked for the replica in this slot.
    MarkSet(usize),
    /// Everything up to the newest write, or an older one, is stable; regions untouched for so long may go.
    Clear {
        stable: Option<u64>,
        idle: u64,
        keep: usize,
    },
    /// The accounts of what came by resync are taken together.
    Gather,
    EnterReign,
    Joined,
    Poll,
    Done(prop::sample::Index),
    Crash(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let range = || (0..BLOCKS, 1..40u64).prop_map(|(start, count)| (start, count.min(BLOCKS - start)));
    prop_oneof![
        6 => range().prop_map(|(start, count)| Step::Begin(start, count)),
        6 => index().prop_map(Step::Launch),
        6 => (index(), prop::bool::weighted(0.8), prop::bool::weighted(0.2))
            .prop_map(|(at, here, outside)| Step::End(at, here, outside)),
        2 => (0..2usize, range()).prop_map(|(slot, (start, count))| Step::Settle(slot, start, count)),
        1 => (0..2usize).prop_map(Step::MarkSet),
        6 => (prop::option::weighted(0.9, 0u64..6), 0u64..12, 0usize..8)
            .prop_map(|(stable, idle, keep)| Step::Clear { stable, idle, keep }),
        2 => Just(Step::Gather),
        1 => Just(Step::EnterReign),
        1 => Just(Step::Joined),
        10 => Just(Step::Poll),
        10 => index().prop_map(Step::Done),
        1 => any::<u8>().prop_map(Step::Crash),
    ]
}

#[derive(Clone, Debug, Default)]
struct Seen {
    in_flight: u32,
    last: Option<u64>,
    outside: bool,
    touched: u64,
    /// Without an account of its own.
    settled: bool,
}

impl Seen {
    fn may_go(&self, stable: Option<u64>) -> bool {
        self.in_flight == 0 && !self.outside && stable.is_some_and(|stable| self.last.unwrap_or(0) <= stable)
    }
}

struct Write {
    blocks: BlockRange,
    launched: bool,
}

struct Model {
    rig: Rig,
    book: IntentBook,
    set: BTreeMap<u64, Seen>,
    writes: Vec<Write>,
    /// By slot, what writes that were let go left it lacking.
    lacking: [BTreeSet<u64>; 2],
    seq: u64,
    now: u64,
}

fn regions_of(blocks: BlockRange) -> BTreeSet<u64> {
    blocks.iter().map(|block| block.0 / PER).collect()
}

impl Model {
    fn new() -> Self {
        let rig = Rig::new(geometry(), &SLOTS);
        let book = IntentBook::new(geometry());
        let (set, writes, lacking) = (BTreeMap::new(), Vec::new(), Default::default());
        Self { rig, book, set, writes, lacking, seq: 0, now: 0 }
    }

    fn mark(&mut self, slot: usize, blocks: BlockRange) {
        self.rig.store.dirty_mut(SLOTS[slot]).unwrap().set_range(blocks.start.0, blocks.count);
        self.lacking[slot].extend(blocks.iter().map(|block| block.0));
    }

    fn mark_set(&mut self, slot: usize) {
        for region in self.rig.store.intent_regions().collect::<Vec<_>>() {
            let blocks = geometry().blocks_of_region(region);
            self.rig.store.dirty_mut(SLOTS[slot]).unwrap().set_range(blocks.start.0, blocks.count);
            if self.book.durable(&self.rig.store, blocks) {
                self.lacking[slot].extend(blocks.iter().map(|block| block.0));
            }
        }
        self.book.reconsider_clears();
    }

    fn begin(&mut self, blocks: BlockRange) {
        let new = regions_of(blocks).into_iter().filter(|r| !self.set.contains_key(r)).count();
        assert_eq!(self.book.new_regions(&self.rig.store, blocks), new);
        self.book.begin(&mut self.rig.store, blocks, Nanos(self.now));
        for region in regions_of(blocks) {
            let seen = self.set.entry(region).or_default();
            seen.in_flight += 1;
            seen.settled = false;
            seen.touched = self.now;
        }
        self.writes.push(Write { blocks, launched: false });
    }

    fn launch(&mut self, at: usize) {
        let blocks = self.writes[at].blocks;
        if self.book.durable(&self.rig.store, blocks) {
            self.writes[at].launched = true;
            self.mark(0, blocks);
            self.mark(1, blocks);
        }
    }

    fn end(&mut self, at: usize, here: bool, outside: bool) {
        let Write { blocks, launched } = self.writes.remove(at);
        self.seq += u64::from(launched);
        let written = (launched && here).then_some(self.seq);
        self.book.end(blocks, written.map(WriteSeq), outside);
        for region in regions_of(blocks) {
            let seen = self.set.get_mut(&region).unwrap();
            seen.in_flight -= 1;
            seen.last = seen.last.max(written);
            seen.outside |= outside;
        }
    }

    /// Of regions without an account only the latest of what was known of each is kept.
    fn gather(&mut self) {
        self.book.settle(&self.rig.store);
        for (region, seen) in &mut self.set {
            let blocks = geometry().blocks_of_region(RegionIndex(*region));
            seen.settled |= seen.outside && seen.in_flight == 0 && self.book.durable(&self.rig.store, blocks);
        }
        let all: Vec<Seen> = self.set.values().filter(|seen| seen.settled).cloned().collect();
        for seen in self.set.values_mut().filter(|seen| seen.settled) {
            seen.last = all.iter().map(|s| s.last).max().flatten();
            seen.touched = all.iter().map(|s| s.touched).max().unwrap_or_default();
            seen.outside = all.iter().any(|s| s.outside);
        }
    }

    /// The regions that a clear may take: those that are idle, and of the others the longest untouched as long
    /// as there are too many.
    fn clearable(&self, stable: Option<u64>, idle_before: u64, keep: usize) -> BTreeSet<u64> {
        let mut ready: Vec<(u64, u64)> =
            self.set.iter().filter(|(_, s)| s.may_go(stable)).map(|(r, s)| (s.touched, *r)).collect();
        ready.sort_unstable();
        let excess = self.set.len().saturating_sub(keep);
        let chosen = |(at, (touched, _)): &(usize, (u64, u64))| *touched <= idle_before || *at < excess;
        ready.into_iter().enumerate().filter(chosen).map(|(_, (_, region))| region).collect()
    }

    fn clear(&mut self, back: Option<u64>, idle: u64, keep: usize) {
        let stable = back.map(|back| self.seq.saturating_sub(back));
        let idle_before = self.now.saturating_sub(idle);
        let wanted = |urgent: bool| {
            let old = |s: &Seen| s.in_flight == 0 && (urgent || s.touched <= idle_before);
            self.set.values().any(|s| old(s) && !s.may_go(stable))
        };
        for urgent in [true, false] {
            let wants =
                self.book.wants_flush(&self.rig.store, stable.map(WriteSeq), Nanos(idle_before), urgent);
            assert_eq!(wants, wanted(urgent));
        }
        let may_go = self.clearable(stable, idle_before, keep);
        let excess = self.set.len() > keep;
        // Nothing holds a region back whose bitmaps are on disk, with no write of them under way.
        let free = self.rig.flights.is_empty()
            && SLOTS.iter().all(|slot| !self.rig.store.dirty(*slot).unwrap().has_unsaved_sets(0));
        let (store, before) = (&mut self.rig.store, Nanos(idle_before));
        self.book.clear_idle(store, stable.map(WriteSeq), before, keep as u64, |store, blocks| {
            SLOTS.iter().flat_map(|slot| store.save_dirty(*slot, blocks)).collect()
        });
        let left: BTreeSet<u64> = self.rig.store.intent_regions().map(|r| r.0).collect();
        let gone: BTreeSet<u64> = self.set.keys().copied().filter(|r| !left.contains(r)).collect();
        assert!(gone.is_subset(&may_go), "cleared {gone:?} of {may_go:?}");
        assert!(!free || gone == may_go, "cleared only {gone:?} of {may_go:?}");
        self.set.retain(|region, _| left.contains(region));
        let due = |s: &Seen| s.may_go(stable) && (s.touched <= idle_before || excess);
        for seen in self.set.values_mut().filter(|s| s.settled && due(s)) {
            seen.settled = false;
        }
    }

    /// A crash: a new run takes over what the disk says and marks every set region for all others [R3].
    fn crash(&mut self, lands: u8) {
        self.rig.restart(|at| lands & (1 << (at % 8)) != 0);
        self.book = IntentBook::new(geometry());
        self.writes.clear();
        (self.seq, self.set) = (0, BTreeMap::new());
        let settled = || Seen { settled: true, ..Seen::default() };
        self.set.extend(self.rig.store.intent_regions().map(|r| (r.0, settled())));
        self.mark_set(0);
        self.mark_set(1);
    }

    fn take(&mut self, step: Step) {
        self.now += 1;
        let blocks = |start, count| BlockRange::between(start, start + count);
        match step {
            Step::Begin(start, count) => self.begin(blocks(start, count)),
            Step::Launch(at) if !self.writes.is_empty() => self.launch(at.index(self.writes.len())),
            Step::End(at, here, outside) if !self.writes.is_empty() => {
                self.end(at.index(self.writes.len()), here, outside);
            }
            Step::Settle(slot, start, count) => {
                self.rig.store.dirty_mut(SLOTS[slot]).unwrap().clear_range(start, count);
                self.lacking[slot].retain(|block| !(start..start + count).contains(block));
            }
            Step::MarkSet(slot) => self.mark_set(slot),
            Step::Clear { stable, idle, keep } => self.clear(stable, idle, keep),
            Step::Gather => self.gather(),
            Step::EnterReign => {
                self.book.enter_reign();
                self.seq = 0;
                self.set.values_mut().for_each(|seen| seen.last = None);
            }
            Step::Joined => {
                self.book.joined(WriteSeq(self.seq));
                for seen in self.set.values_mut().filter(|seen| seen.outside) {
                    (seen.outside, seen.last) = (false, seen.last.max(Some(self.seq)));
                }
            }
            Step::Poll => {
                self.rig.poll();
            }
            Step::Done(at) if !self.rig.flights.is_empty() => {
                self.rig.complete(at.index(self.rig.flights.len()));
            }
            Step::Crash(lands) => self.crash(lands),
            Step::Launch(_) | Step::End(..) | Step::Done(_) => {}
        }
    }

    fn check(&self) {
        let disk = self.rig.read();
        assert!(self.book.is_consistent(&self.rig.store));
        assert_eq!(self.rig.store.intent_regions().map(|r| r.0).collect::<Vec<_>>(), self.keys());
        assert_eq!(self.book.accounts(), self.set.values().filter(|seen| !seen.settled).count());
        // Design invariant 5.
        for write in self.writes.iter().filter(|w| w.launched) {
            for region in regions_of(write.blocks) {
                assert!(disk.intent.get(region), "a write to region {region} was let go without its intent");
            }
        }
        // [R3, R5, R12]
        for (slot, lacking) in SLOTS.iter().zip(&self.lacking) {
            for block in lacking {
                let known = disk.dirty[slot].get(*block) || disk.intent.get(block / PER);
                assert!(known, "block {block} that {slot:?} lacks is in no map on disk");
            }
        }
    }

    fn keys(&self) -> Vec<u64> {
        self.set.keys().copied().collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn r3_r5_r12_r22_what_a_crash_leaves_names_all_that_others_may_lack(
        steps in prop::collection::vec(step(), 1..90),
    ) {
        let mut model = Model::new();
        for step in steps {
            model.take(step);
            model.check();
        }
        // With nothing under way, everything stable and joined, the map becomes empty, on disk as well.
        while !model.writes.is_empty() {
            model.end(0, true, false);
        }
        model.take(Step::Joined);
        for _ in 0..3 {
            model.take(Step::Clear { stable: Some(0), idle: 0, keep: 0 });
            model.rig.settle();
            model.check();
        }
        prop_assert_eq!(model.keys(), Vec::<u64>::new());
        prop_assert_eq!(model.rig.read().intent.count(), 0);
    }
}
