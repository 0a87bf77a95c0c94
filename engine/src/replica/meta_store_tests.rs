//! [`MetaStore`] against a model: the bits and the superblock as they are in memory, and a metadata file that
//! holds what has completed. Whatever is said to be durable must be read from the file.
//!
//! The writes of one moment complete in any order, as a ring completes them; none is torn (what becomes of
//! those is for the tests of `meta`).

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::meta::{GROUP_BITS, META_GROUP_LEN, SuperblockCopy, blank};
use crate::types::{Epoch, Geometry};

/// A store with its file and the writes that are under way.
pub(in super::super) struct Rig {
    pub(in super::super) store: MetaStore,
    pub(in super::super) flights: Vec<MetaIo>,
    file: BTreeMap<u64, Vec<u8>>,
    slots: Vec<ReplicaSlot>,
}

impl Rig {
    /// A replica that was just made: everything clear, and durable.
    pub(in super::super) fn new(geometry: Geometry, slots: &[ReplicaSlot]) -> Self {
        let mut image = Image::fresh(blank(ReplicaSlot(7), geometry), slots, true);
        let file = image.encode_all().collect();
        Self { store: MetaStore::new(image), flights: Vec::new(), file, slots: slots.to_vec() }
    }

    /// What a start would find if the process ended now.
    pub(in super::super) fn read(&self) -> Image {
        let mut read_at = |offset: u64, buffer: &mut [u8]| {
            for (at, piece) in (offset..).step_by(META_GROUP_LEN).zip(buffer.chunks_exact_mut(META_GROUP_LEN))
            {
                match self.file.get(&at) {
                    Some(bytes) => piece.copy_from_slice(bytes),
                    None => piece.fill(0),
                }
            }
            Ok::<_, Infallible>(())
        };
        let image = Image::read(&mut read_at, &self.slots).unwrap();
        assert_eq!((image.trust, image.damaged_pages), (SuperblockTrust::Sound, 0));
        image
    }

    /// Puts out one write, if there is one. Of a group, and of the superblock, at most one is under way.
    pub(in super::super) fn poll(&mut self) -> bool {
        let Some(io) = self.store.poll_io() else { return false };
        let same = |other: &MetaIo| match (other.what, io.what) {
            (MetaWrite::Group(a), MetaWrite::Group(b)) => a == b,
            (a, b) => !matches!(a, MetaWrite::Group(_)) && !matches!(b, MetaWrite::Group(_)),
        };
        assert!(!self.flights.iter().any(same), "two writes of one place at once: {:?}", io.what);
        self.flights.push(io);
        true
    }

    /// The write at this place of the list completes.
    pub(in super::super) fn complete(&mut self, at: usize) {
        let MetaIo { what, offset, bytes } = self.flights.remove(at);
        self.file.insert(offset, bytes);
        self.flights.extend(self.store.handle_done(what));
    }

    /// Everything that was asked for is written.
    pub(in super::super) fn settle(&mut self) {
        while self.poll() || !self.flights.is_empty() {
            if let Some(last) = self.flights.len().checked_sub(1) {
                self.complete(last);
            }
        }
    }

    /// The process ends; of the writes under way those land of which `lands` says so. A new run opens what is
    /// there.
    pub(in super::super) fn restart(&mut self, mut lands: impl FnMut(usize) -> bool) {
        for (at, io) in std::mem::take(&mut self.flights).into_iter().enumerate() {
            if lands(at) {
                self.file.insert(io.offset, io.bytes);
            }
        }
        self.store = MetaStore::new(self.read());
    }
}

const SLOTS: [ReplicaSlot; 2] = [ReplicaSlot(1), ReplicaSlot(4)];
const GROUP: u64 = GROUP_BITS as u64;

/// Two groups of regions; more of blocks.
fn geometry() -> Geometry {
    Geometry::new((GROUP + 9) * 65_536, 4096, 65_536).unwrap()
}

/// The bits that are used of an area: some at each border of its first groups.
fn bits_of(area: u8) -> Vec<u64> {
    let borders = if area == 0 { vec![0, GROUP] } else { vec![0, GROUP, 2 * GROUP] };
    borders.into_iter().flat_map(|border: u64| border.saturating_sub(2)..border + 3).collect()
}

fn area_of(number: u8) -> Area {
    if number == 0 { Area::Intent } else { Area::Dirty(ReplicaSlot(number - 1)) }
}

#[derive(Clone, Debug)]
enum Step {
    /// Of the area's bits in use, from the first for so many.
    Change {
        area: u8,
        from: prop::sample::Index,
        count: usize,
        to: bool,
    },
    SaveIntent(prop::sample::Index),
    SaveDirty(ReplicaSlot, prop::sample::Index, u64),
    SaveAll,
    SaveCleared(usize),
    Poll,
    Done(prop::sample::Index),
    Restart(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let any_index = any::<prop::sample::Index>;
    let slot = || prop::sample::select(SLOTS.to_vec());
    let area = prop::sample::select(vec![0u8, SLOTS[0].0 + 1, SLOTS[1].0 + 1]);
    prop_oneof![
        8 => (area, any_index(), 1usize..6, any::<bool>())
            .prop_map(|(area, from, count, to)| Step::Change { area, from, count, to }),
        2 => any_index().prop_map(Step::SaveIntent),
        3 => (slot(), any_index(), 1..2 * GROUP).prop_map(|(slot, at, count)| Step::SaveDirty(slot, at, count)),
        1 => Just(Step::SaveAll),
        1 => (1usize..4).prop_map(Step::SaveCleared),
        6 => Just(Step::Poll),
        6 => any_index().prop_map(Step::Done),
        1 => any::<u8>().prop_map(Step::Restart),
    ]
}

/// What a ticket was given for: bits with the values they had, but for those that changed since.
struct Promise {
    ticket: Ticket,
    bits: BTreeMap<u64, bool>,
    /// Clears are part of it.
    exact: bool,
}

struct Model {
    rig: Rig,
    memory: BTreeMap<(u8, u64), bool>,
    promises: Vec<Promise>,
}

impl Model {
    fn new() -> Self {
        let areas = [0, SLOTS[0].0 + 1, SLOTS[1].0 + 1];
        let memory = areas.iter().flat_map(|a| bits_of(*a).into_iter().map(|bit| ((*a, bit), false)));
        Self { rig: Rig::new(geometry(), &SLOTS), memory: memory.collect(), promises: Vec::new() }
    }

    fn bits_in(&self, key: GroupKey) -> BTreeMap<u64, bool> {
        let here = |(area, bit): &(u8, u64)| *area == key.area && bit / GROUP == u64::from(key.group);
        self.memory.iter().filter(|(at, _)| here(at)).map(|((_, bit), set)| (*bit, *set)).collect()
    }

    /// A ticket was asked for this group: it promises what is in memory now, or that is there already.
    fn promised(&mut self, key: GroupKey, ticket: Option<Ticket>, exact: bool) {
        let bits = self.bits_in(key);
        match ticket {
            Some(ticket) => self.promises.push(Promise { ticket, bits, exact }),
            None => self.expect_on_disk(&self.rig.read(), key.area, &bits, exact),
        }
    }

    fn expect_on_disk(&self, image: &Image, area: u8, bits: &BTreeMap<u64, bool>, exact: bool) {
        let map = if area == 0 { &image.intent } else { &image.dirty[&ReplicaSlot(area - 1)] };
        for (bit, set) in bits.iter().filter(|(_, set)| exact || **set) {
            assert_eq!(map.get(*bit), *set, "bit {bit} of the {}", area_of(area));
        }
    }

    fn change(&mut self, area: u8, bits: &[u64], to: bool) {
        for bit in bits.iter().copied() {
            let store = &mut self.rig.store;
            let map =
                if area == 0 { store.intent_mut() } else { store.dirty_mut(ReplicaSlot(area - 1)).unwrap() };
            let changed = if to { map.set(bit) } else { map.clear(bit) };
            let before = self.memory.insert((area, bit), to).unwrap();
            assert_eq!(changed, before != to);
            if changed {
                for promise in self.promises.iter_mut().filter(|p| p.ticket.key.area == area) {
                    promise.bits.remove(&bit);
                }
            }
        }
    }

    fn save_dirty(&mut self, slot: ReplicaSlot, at: prop::sample::Index, count: u64) {
        let used = bits_of(slot.0 + 1);
        let start = used[at.index(used.len())];
        let end = (start + count).min(geometry().blocks());
        let tickets = self.rig.store.save_dirty(slot, BlockRange::between(start, end));
        for group in start / GROUP..=(end - 1) / GROUP {
            let key = GroupKey { area: slot.0 + 1, group: u32::try_from(group).unwrap() };
            let ticket = tickets.iter().copied().find(|t| t.key == key);
            self.promised(key, ticket, false);
        }
    }

    fn save_all(&mut self) {
        let tickets = self.rig.store.save_all();
        for area in [0, SLOTS[0].0 + 1, SLOTS[1].0 + 1] {
            let groups: BTreeSet<u64> = bits_of(area).iter().map(|bit| bit / GROUP).collect();
            for group in groups {
                let key = GroupKey { area, group: u32::try_from(group).unwrap() };
                // A group that is under way and changed since has two: the later one stands for all of it.
                let ticket = tickets.iter().copied().filter(|t| t.key == key).max_by_key(|t| t.number);
                self.promised(key, ticket, true);
            }
        }
    }

    fn restart(&mut self, lands: u8) {
        self.rig.restart(|at| lands & (1 << (at % 8)) != 0);
        self.promises.clear();
        let store = &self.rig.store;
        for ((area, bit), set) in &mut self.memory {
            let map = if *area == 0 { store.intent() } else { store.dirty(ReplicaSlot(*area - 1)).unwrap() };
            *set = map.get(*bit);
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Change { area, from, count, to } => {
                let used = bits_of(area);
                let from = from.index(used.len());
                self.change(area, &used[from..used.len().min(from + count)], to);
            }
            Step::SaveIntent(at) => {
                let used = bits_of(0);
                let region = used[at.index(used.len())];
                let ticket = self.rig.store.save_intent(region);
                self.promised(ticket.key, Some(ticket), true);
            }
            Step::SaveDirty(slot, at, count) => self.save_dirty(slot, at, count),
            Step::SaveAll => self.save_all(),
            Step::SaveCleared(count) => self.rig.store.save_cleared(count),
            Step::Poll => {
                self.rig.poll();
            }
            Step::Done(at) if !self.rig.flights.is_empty() => {
                self.rig.complete(at.index(self.rig.flights.len()))
            }
            Step::Done(_) => {}
            Step::Restart(lands) => self.restart(lands),
        }
    }

    /// Every promise that is said to be kept is.
    fn check(&self) {
        let kept = |p: &&Promise| self.rig.store.redeemed(p.ticket);
        if self.promises.iter().any(|p| kept(&p)) {
            let image = self.rig.read();
            for promise in self.promises.iter().filter(kept) {
                self.expect_on_disk(&image, promise.ticket.key.area, &promise.bits, promise.exact);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bits set and cleared, saved in every way, written and completed in any order, with restarts: a redeemed
    /// ticket means that the file holds what it stands for, and whatever was asked for comes in the end [R22].
    #[test]
    fn what_a_redeemed_ticket_stands_for_is_on_the_disk(steps in prop::collection::vec(step(), 1..60)) {
        let mut model = Model::new();
        for step in steps {
            model.take(step);
            model.check();
        }
        model.save_all();
        model.rig.settle();
        prop_assert!(model.promises.iter().all(|p| model.rig.store.redeemed(p.ticket)));
        model.check();
        prop_assert_eq!(model.rig.store.intent().first_unsaved(0), None);
    }

    /// Clears for which nobody waits reach the disk too, in time.
    #[test]
    fn clears_alone_are_saved_bit_by_bit(steps in prop::collection::vec(step(), 1..40), count in 1usize..3) {
        let mut model = Model::new();
        for step in steps {
            model.take(step);
        }
        model.save_all();
        model.rig.settle();
        let area = SLOTS[0].0 + 1;
        model.change(area, &bits_of(area), false);
        for _ in 0..3 {
            model.rig.store.save_cleared(count);
            model.rig.settle();
        }
        prop_assert_eq!(model.rig.read().dirty[&SLOTS[0]].count(), 0);
        prop_assert_eq!(model.rig.store.dirty(SLOTS[0]).unwrap().first_unsaved(0), None);
    }

    /// Whenever the process ends, the superblock on disk is one that was written, not older than the last that
    /// was said to be durable [R16].
    #[test]
    fn r16_a_durable_superblock_is_what_a_start_reads(steps in prop::collection::vec(0u8..6, 1..60)) {
        let mut rig = Rig::new(geometry(), &SLOTS);
        // What each version holds, and the last of those known to be durable.
        let mut epochs = BTreeMap::from([(0u64, Epoch(1))]);
        for step in steps {
            match step {
                0 => {
                    let epoch = rig.store.superblock().epoch.next();
                    let version = rig.store.change_superblock(|sb| sb.epoch = epoch);
                    prop_assert!(epochs.insert(version, epoch).is_none(), "a change is a new version");
                }
                1 => {
                    let version = rig.store.change_superblock(|_| {});
                    prop_assert_eq!(epochs.last_key_value(), Some((&version, &rig.store.superblock().epoch)));
                }
                2 => {
                    let version = rig.store.rewrite_superblock();
                    epochs.insert(version, rig.store.superblock().epoch);
                }
                3 => {
                    rig.store.intent_mut().set(5);
                    rig.store.save_intent(5);
                }
                4 => {
                    rig.poll();
                }
                _ => if !rig.flights.is_empty() {
                    rig.complete(0);
                },
            }
            let read = rig.read().superblock.epoch;
            let durable = epochs.iter().filter(|(version, _)| rig.store.superblock_durable(**version));
            let newest = durable.map(|(_, epoch)| *epoch).max().unwrap();
            prop_assert!(newest <= read && read <= rig.store.superblock().epoch, "{newest} {read}");
            for copy in [SuperblockCopy::A, SuperblockCopy::B] {
                let held = Superblock::decode(&rig.file[&copy.offset()], copy).unwrap();
                prop_assert!(newest <= held.epoch, "copy {copy} holds {}, {newest} is durable", held.epoch);
            }
        }
        rig.settle();
        prop_assert!(epochs.keys().all(|version| rig.store.superblock_durable(*version)));
        prop_assert_eq!(rig.read().superblock.epoch, rig.store.superblock().epoch);
    }

    /// The blocks that anyone lacks are the union of the bitmaps, as runs that are as long as they can be.
    #[test]
    fn what_anyone_lacks_is_the_union_of_the_bitmaps(
        ranges in prop::collection::vec((prop::sample::select(SLOTS.to_vec()), 0u64..60, 1u64..12), 0..10),
        added in any::<bool>(),
    ) {
        let mut rig = Rig::new(Geometry::new(64 * 4096, 4096, 65_536).unwrap(), &SLOTS);
        let mut lacking = BTreeSet::new();
        for (slot, start, count) in ranges {
            let count = count.min(64 - start);
            rig.store.dirty_mut(slot).unwrap().set_range(start, count);
            lacking.extend(start..start + count);
        }
        // A replica added later lacks everything; one that is there already stays as it is.
        rig.store.add_dirty(SLOTS[0]);
        if added {
            rig.store.add_dirty(ReplicaSlot(6));
            lacking.extend(0..64);
        }
        let runs = rig.store.dirty_for_anyone();
        let named: Vec<u64> = runs.iter().flat_map(|run| run.start..run.start + run.count).collect();
        prop_assert_eq!(named, lacking.into_iter().collect::<Vec<_>>());
        prop_assert!(runs.windows(2).all(|pair| pair[0].start + pair[0].count < pair[1].start), "{:?}", runs);
    }
}
