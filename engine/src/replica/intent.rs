//! The intent map: which regions this replica may have a write in that others lack (or the reverse).
//!
//! Invariants:
//! - no block is written or sent before the bit of its region is durable here (design invariant 5);
//!   [`IntentBook::begin`] sets bits, [`IntentBook::durable`] says when they are;
//! - a bit is cleared only by [`IntentBook::clear_idle`], whose caller vouches for [R5]: this replica is in
//!   the ack set, all of the ack set have flushed, its bitmaps of all missing replicas are durable;
//! - a clear takes the bit out of memory first; setting it again is a later write of the same group,
//!   ordered after the clear by [`MetaStore`] [R22].

use std::collections::BTreeMap;

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, Geometry, Nanos, RegionIndex};
use crate::wire::{Run, WriteSeq};

use super::meta_store::{MetaStore, Ticket};

/// What is known of one set region.
#[derive(Debug)]
struct Region {
    /// Durability of the bit.
    ticket: Option<Ticket>,
    /// Writes in flight in it.
    in_flight: u32,
    /// Last write in it, in the present reign. `None`: older, covered by the first flush of the reign.
    last: Option<WriteSeq>,
    /// Its writes came by resync: nothing counts until this replica has joined.
    outside: bool,
    touched: Nanos,
    /// Bitmaps that have to be durable before the bit may go.
    clearing: Option<Vec<Ticket>>,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct IntentBook {
    geometry: Geometry,
    regions: BTreeMap<RegionIndex, Region>,
    /// When a write began last.
    touched: Nanos,
}

impl IntentBook {
    /// Takes over what the disk says: every set bit is durable and of unknown age.
    pub(super) fn new(geometry: Geometry, store: &MetaStore) -> Self {
        let mut regions = BTreeMap::new();
        let mut from = 0;
        while let Some(bit) = store.intent().next_set(from) {
            let region = Region {
                ticket: None,
                in_flight: 0,
                last: None,
                outside: false,
                touched: Nanos(0),
                clearing: None,
            };
            regions.insert(RegionIndex(bit), region);
            from = bit + 1;
        }
        Self { geometry, regions, touched: Nanos(0) }
    }

    pub(super) fn len(&self) -> usize {
        self.regions.len()
    }

    /// When a write began last; zero if none has since the start.
    pub(super) fn touched(&self) -> Nanos {
        self.touched
    }

    /// The set regions.
    pub(super) fn regions(&self) -> Vec<RegionIndex> {
        self.regions.keys().copied().collect()
    }

    /// The set regions as runs, for a report.
    pub(super) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for region in self.regions.keys() {
            match runs.last_mut() {
                Some(run) if run.start + run.count == region.0 => run.count += 1,
                _ => runs.push(Run { start: region.0, count: 1 }),
            }
        }
        runs
    }

    /// Begins a write to `blocks`: sets the bits that are not set and asks for their durability.
    pub(super) fn begin(&mut self, store: &mut MetaStore, blocks: BlockRange, now: Nanos) {
        self.touched = now;
        for index in self.geometry.regions_of(blocks) {
            let region = self.regions.entry(index).or_insert_with(|| {
                let before = mutated(Mutation::R22).then(|| store.save_intent(index.0));
                store.intent_mut().set(index.0);
                let own = store.save_intent(index.0);
                Region {
                    ticket: before.filter(|t| !store.redeemed(*t)).or(Some(own)),
                    in_flight: 0,
                    last: None,
                    outside: false,
                    touched: now,
                    clearing: None,
                }
            });
            region.in_flight += 1;
            region.touched = now;
            region.clearing = None;
        }
    }

    /// How many regions `begin` would add.
    pub(super) fn new_regions(&self, blocks: BlockRange) -> usize {
        self.geometry.regions_of(blocks).filter(|r| !self.regions.contains_key(r)).count()
    }

    /// True if the bit of every region of `blocks` is durable.
    pub(super) fn durable(&self, store: &MetaStore, blocks: BlockRange) -> bool {
        self.geometry
            .regions_of(blocks)
            .all(|index| self.regions.get(&index).is_some_and(|r| r.ticket.is_none_or(|t| store.redeemed(t))))
    }

    /// A write to `blocks` begun with `begin` is over. `written`: its number, if it was carried out in
    /// the present reign; `outside`: carried out by a replica that is not a member.
    pub(super) fn end(&mut self, blocks: BlockRange, written: Option<WriteSeq>, outside: bool) {
        for index in self.geometry.regions_of(blocks) {
            let region = self.regions.get_mut(&index).expect("the region of a write in flight is set");
            assert!(region.in_flight > 0, "intent of region {} ended twice", index.0);
            region.in_flight -= 1;
            region.last = region.last.max(written);
            region.outside |= outside;
        }
    }

    /// A new reign counts its writes anew: what is set is older than all of them.
    pub(super) fn enter_reign(&mut self) {
        for region in self.regions.values_mut() {
            region.last = None;
            region.clearing = None;
        }
    }

    /// More blocks were marked for a missing replica: clears under way must save the bitmaps again [R12].
    pub(super) fn reconsider_clears(&mut self) {
        for region in self.regions.values_mut() {
            region.clearing = None;
        }
    }

    /// This replica has joined: what it wrote outside counts as written up to `through`.
    pub(super) fn joined(&mut self, through: WriteSeq) {
        for region in self.regions.values_mut().filter(|r| r.outside) {
            region.outside = false;
            region.last = region.last.max(Some(through));
        }
    }

    /// True if a flush would let something be cleared that `stable` does not.
    pub(super) fn wants_flush(&self, stable: Option<WriteSeq>, idle_before: Nanos, urgent: bool) -> bool {
        self.regions
            .values()
            .any(|r| r.in_flight == 0 && (urgent || r.touched <= idle_before) && !Self::covered(r, stable))
    }

    fn covered(region: &Region, stable: Option<WriteSeq>) -> bool {
        mutated(Mutation::R5)
            || !region.outside && stable.is_some_and(|s| region.last.unwrap_or_default() <= s)
    }

    /// Clears the bits of regions that have no write in flight, whose writes are all stable on the ack
    /// set, and that were last touched at or before `idle_before`, or, beyond `keep_max` set regions,
    /// the longest untouched ones. `save_bitmaps` asks for the bitmaps of all missing replicas to be
    /// durable for a region's blocks and returns the tickets still open; the bit goes when all are redeemed.
    pub(super) fn clear_idle(
        &mut self,
        store: &mut MetaStore,
        stable: Option<WriteSeq>,
        idle_before: Nanos,
        keep_max: usize,
        mut save_bitmaps: impl FnMut(&mut MetaStore, BlockRange) -> Vec<Ticket>,
    ) {
        let mut excess = self.regions.len().saturating_sub(keep_max);
        let due = |r: &Region| excess > 0 || r.touched <= idle_before;
        let mut ready: Vec<(Nanos, RegionIndex)> = self
            .regions
            .iter()
            .filter(|(_, r)| due(r) && r.in_flight == 0 && Self::covered(r, stable))
            .map(|(index, r)| (r.touched, *index))
            .collect();
        ready.sort_unstable();
        for (touched, index) in ready {
            if touched > idle_before && excess == 0 {
                break;
            }
            excess = excess.saturating_sub(1);
            let blocks = self.geometry.blocks_of_region(index);
            let region = self.regions.get_mut(&index).expect("listed above");
            let open = match region.clearing.take() {
                _ if mutated(Mutation::R5) => Vec::new(),
                Some(tickets) => tickets.into_iter().filter(|t| !store.redeemed(*t)).collect(),
                None => save_bitmaps(store, blocks),
            };
            if open.is_empty() {
                self.regions.remove(&index);
                store.intent_mut().clear(index.0);
                store.save_intent(index.0);
            } else {
                region.clearing = Some(open);
            }
        }
    }

    /// Memory and map agree. For the invariant check.
    pub(super) fn is_consistent(&self, store: &MetaStore) -> bool {
        store.intent().count() == self.regions.len() as u64
            && self.regions.keys().all(|r| store.intent().get(r.0))
    }
}

#[cfg(test)]
#[path = "intent_tests.rs"]
mod tests;
