//! The replica's metadata in memory, and the order in which it reaches the disk.
//!
//! The superblock is written to both copies, one after the other, so that a torn write never damages
//! both; a version counts as durable when both are written. Of a page group at most one write is in
//! flight, so that a bit set after a clear reaches the disk after it [R22]. Durability of a bit is asked
//! for by [`MetaStore::save`], which returns a [`Ticket`].
//!
//! It never decides what a bit means; [`super::intent`] and the rest of the core do.

use std::collections::{BTreeMap, BTreeSet};

use crate::meta::{Area, Image, Layout, PagedBitmap, Superblock, coarse_runs};
use crate::types::{BlockRange, RegionIndex, ReplicaSlot, SuperblockTrust};
use crate::wire::Run;

/// Runs per TiB of volume of a list of blocks that is sent to a peer: 2 MiB of memory, where the bitmap takes 32.
const RUNS_PER_TIB: usize = 1 << 17;
/// log2 of the blocks of a TiB.
const TIB_SHIFT: u32 = 28;
/// Most runs of a list at all: who gets it takes no more.
pub(super) const RUNS_MAX: usize = 1 << 22;

/// A page group of one area. Ordered, so that writes come out in a fixed order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GroupKey {
    area: u8,
    group: u32,
}

impl GroupKey {
    pub(super) fn is_intent(self) -> bool {
        self.area == 0
    }
}

/// Stands for "everything in this group as it was in memory when the ticket was made is durable".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    key: GroupKey,
    number: u64,
}

/// A metadata write to put out.
#[derive(Debug)]
pub(super) struct MetaIo {
    pub(super) what: MetaWrite,
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
}

/// What a metadata write was for; comes back with its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MetaWrite {
    Superblock { version: u64, second: bool },
    Group(GroupKey),
}

#[derive(Debug, Default)]
struct GroupState {
    encoded: u64,
    durable: u64,
    in_flight: bool,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct MetaStore {
    superblock: Superblock,
    pub(super) trust: SuperblockTrust,
    version: u64,
    durable: u64,
    /// The version being written, as encoded for both copies: the second follows the first.
    flight: Option<(u64, (u64, Vec<u8>))>,
    /// The superblock is not written before these are redeemed.
    superblock_after: Vec<Ticket>,
    intent: PagedBitmap,
    dirty: BTreeMap<ReplicaSlot, PagedBitmap>,
    groups: BTreeMap<GroupKey, GroupState>,
    wanted: BTreeSet<GroupKey>,
    pub(super) damaged_pages: u32,
}

impl MetaStore {
    pub(super) fn new(image: Image) -> Self {
        Self {
            superblock: image.superblock,
            trust: image.trust,
            version: 0,
            durable: 0,
            flight: None,
            superblock_after: Vec::new(),
            intent: image.intent,
            dirty: image.dirty,
            groups: BTreeMap::new(),
            wanted: BTreeSet::new(),
            damaged_pages: image.damaged_pages,
        }
    }

    pub(super) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Changes the superblock; the returned version is to be waited for. A change that changes nothing
    /// returns the version that already holds it.
    pub(super) fn change_superblock(&mut self, change: impl FnOnce(&mut Superblock)) -> u64 {
        let before = self.superblock.clone();
        change(&mut self.superblock);
        if self.superblock != before {
            self.version += 1;
        }
        self.version
    }

    /// Holds further writes of the superblock back until what the tickets stand for is durable.
    pub(super) fn hold_superblock_until(&mut self, tickets: Vec<Ticket>) {
        self.superblock_after.extend(tickets);
    }

    /// Writes the superblock again even if it did not change (to mend a bad copy).
    pub(super) fn rewrite_superblock(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// True if this version of the superblock is on both copies.
    pub(super) fn superblock_durable(&self, version: u64) -> bool {
        self.durable >= version
    }

    pub(super) fn intent(&self) -> &PagedBitmap {
        &self.intent
    }

    /// The set regions of the intent map.
    pub(super) fn intent_regions(&self) -> impl Iterator<Item = RegionIndex> + use<'_> {
        self.intent.runs(0).flat_map(|run| run.start..run.start + run.count).map(RegionIndex)
    }

    pub(super) fn intent_mut(&mut self) -> &mut PagedBitmap {
        &mut self.intent
    }

    pub(super) fn dirty(&self, slot: ReplicaSlot) -> Option<&PagedBitmap> {
        self.dirty.get(&slot)
    }

    pub(super) fn dirty_mut(&mut self, slot: ReplicaSlot) -> Option<&mut PagedBitmap> {
        self.dirty.get_mut(&slot)
    }

    /// Runs of a list of blocks at most: [`RUNS_PER_TIB`] for each TiB of blocks of 4 KiB.
    fn runs_max(&self) -> usize {
        let blocks = self.superblock.geometry.blocks();
        let max =
            usize::try_from((blocks >> TIB_SHIFT) + 1).unwrap_or(usize::MAX).saturating_mul(RUNS_PER_TIB);
        max.min(RUNS_MAX)
    }

    /// The blocks that a replica lacks, or a few more if they are scattered too widely.
    pub(super) fn dirty_runs(&self, slot: ReplicaSlot) -> Vec<Run> {
        let bits = self.superblock.geometry.blocks();
        self.dirty.get(&slot).map_or_else(Vec::new, |b| coarse_runs(b.runs(0), bits, self.runs_max()))
    }

    /// The blocks that some other replica lacks, as far as is known here, or a few more. Foreign writes were missing
    /// at the replica from which the next lineage started, whoever is the source today [R17].
    pub(super) fn dirty_for_anyone(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = self.dirty.keys().flat_map(|slot| self.dirty_runs(*slot)).collect();
        runs.sort_unstable_by_key(|run| run.start);
        coarse_runs(runs, self.superblock.geometry.blocks(), self.runs_max())
    }

    /// Keeps a bitmap for a replica that the volume did not have before: it lacks everything.
    pub(super) fn add_dirty(&mut self, slot: ReplicaSlot) {
        let Superblock { geometry, volume, .. } = self.superblock;
        self.dirty.entry(slot).or_insert_with(|| {
            PagedBitmap::new_full(Area::Dirty(slot), geometry.blocks(), volume, &Layout::new(&geometry))
        });
    }

    pub(super) fn slots(&self) -> Vec<ReplicaSlot> {
        self.dirty.keys().copied().collect()
    }

    /// Asks for the intent group of `region` to be written; see [`Ticket`].
    pub(super) fn save_intent(&mut self, region: u64) -> Ticket {
        let group = self.intent.group_of(region);
        let unsaved = self.intent.is_group_unsaved(group);
        self.save(GroupKey { area: 0, group }, unsaved)
    }

    /// Asks for every set bit of `slot` in the groups that cover `blocks` to be durable; the tickets that
    /// are not redeemed yet. Clears may wait: a bit too many costs a comparison.
    pub(super) fn save_dirty(&mut self, slot: ReplicaSlot, blocks: BlockRange) -> Vec<Ticket> {
        let Some(bitmap) = self.dirty.get(&slot) else { return Vec::new() };
        let (first, last) = (bitmap.group_of(blocks.start.0), bitmap.group_of(blocks.end() - 1));
        let groups: Vec<_> = (first..=last).map(|g| (g, bitmap.has_unsaved_sets(g))).collect();
        let area = slot.0 + 1;
        let tickets = groups.into_iter().map(|(group, unsaved)| self.save(GroupKey { area, group }, unsaved));
        let tickets: Vec<_> = tickets.collect();
        tickets.into_iter().filter(|t| !self.redeemed(*t)).collect()
    }

    /// Asks for everything unsaved to be written; the tickets that are not redeemed yet.
    pub(super) fn save_all(&mut self) -> Vec<Ticket> {
        let mut keys: Vec<GroupKey> =
            self.intent.unsaved_groups().map(|group| GroupKey { area: 0, group }).collect();
        for (slot, bitmap) in &self.dirty {
            keys.extend(bitmap.unsaved_groups().map(|group| GroupKey { area: slot.0 + 1, group }));
        }
        let mut tickets: Vec<_> = keys.into_iter().map(|key| self.save(key, true)).collect();
        // What is already on its way has to arrive, too.
        tickets.extend(
            self.groups
                .iter()
                .filter(|(_, g)| g.in_flight)
                .map(|(key, g)| Ticket { key: *key, number: g.encoded }),
        );
        tickets
    }

    /// Asks for up to `count` groups to be written that differ from the disk by clears alone. Nobody waits
    /// for them, but what stays set there makes a resync after a restart longer.
    pub(super) fn save_cleared(&mut self, count: usize) {
        let only_clears = |(slot, bitmap): (&ReplicaSlot, &PagedBitmap)| {
            let groups: Vec<u32> =
                bitmap.unsaved_groups().filter(|g| !bitmap.has_unsaved_sets(*g)).take(count).collect();
            groups.into_iter().map(|group| GroupKey { area: slot.0 + 1, group }).collect::<Vec<_>>()
        };
        let keys: Vec<GroupKey> = self.dirty.iter().flat_map(only_clears).take(count).collect();
        self.wanted.extend(keys);
    }

    fn save(&mut self, key: GroupKey, unsaved: bool) -> Ticket {
        let encoded = self.groups.get(&key).map_or(0, |g| g.encoded);
        if unsaved {
            self.wanted.insert(key);
            Ticket { key, number: encoded + 1 }
        } else {
            Ticket { key, number: encoded }
        }
    }

    /// True if what the ticket stands for is durable.
    pub(super) fn redeemed(&self, ticket: Ticket) -> bool {
        self.groups.get(&ticket.key).map_or(0, |g| g.durable) >= ticket.number
    }

    /// The next metadata write to put out, if there is one.
    pub(super) fn poll_io(&mut self) -> Option<MetaIo> {
        if let Some(io) = self.poll_superblock() {
            return Some(io);
        }
        let key = *self.wanted.iter().find(|key| !self.groups.get(key).is_some_and(|g| g.in_flight))?;
        self.wanted.remove(&key);
        let bitmap = if key.is_intent() {
            &mut self.intent
        } else {
            let slot = ReplicaSlot(key.area - 1);
            self.dirty.get_mut(&slot).expect("a group is only wanted of a bitmap that exists")
        };
        let (offset, bytes) = bitmap.encode_group(key.group);
        let state = self.groups.entry(key).or_default();
        state.encoded += 1;
        state.in_flight = true;
        Some(MetaIo { what: MetaWrite::Group(key), offset, bytes })
    }

    fn poll_superblock(&mut self) -> Option<MetaIo> {
        if self.flight.is_some() || self.durable >= self.version {
            return None;
        }
        if self.superblock_after.iter().any(|ticket| !self.redeemed(*ticket)) {
            return None;
        }
        self.superblock_after.clear();
        let version = self.version;
        let [(offset, bytes), second] = self.superblock.advance();
        self.flight = Some((version, second));
        let what = MetaWrite::Superblock { version, second: false };
        Some(MetaIo { what, offset, bytes })
    }

    /// A write has completed. Returns the one that must follow it, if any.
    pub(super) fn handle_done(&mut self, what: MetaWrite) -> Option<MetaIo> {
        match what {
            MetaWrite::Superblock { version, second: false } => {
                let (flight, second) = self.flight.clone().expect("superblock completion without a write");
                assert_eq!(flight, version, "superblock copies of two versions mixed");
                let what = MetaWrite::Superblock { version, second: true };
                Some(MetaIo { what, offset: second.0, bytes: second.1 })
            }
            MetaWrite::Superblock { version, second: true } => {
                self.flight = None;
                self.durable = version;
                None
            }
            MetaWrite::Group(key) => {
                let state = self.groups.get_mut(&key).expect("completion of a group never written");
                assert!(state.in_flight, "group {key:?} completed twice");
                state.in_flight = false;
                state.durable = state.encoded;
                None
            }
        }
    }
}

#[cfg(test)]
#[path = "meta_store_tests.rs"]
pub(super) mod tests;
