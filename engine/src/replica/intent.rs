//! The intent map: which regions this replica may have a write in that others lack (or the reverse).
//!
//! Invariants:
//! - no block is written or sent before the bit of its region is durable here (design invariant 5);
//!   [`IntentBook::begin`] sets bits, [`IntentBook::durable`] says when they are;
//! - a bit is cleared only by [`IntentBook::clear_idle`], whose caller vouches for [R5]: this replica is in
//!   the ack set, all of the ack set have flushed, its bitmaps of all missing replicas are durable;
//! - a clear takes the bit out of memory first; setting it again is a later write of the same group,
//!   ordered after the clear by [`MetaStore`] [R22];
//! - memory is bounded: what a resync brings is in no region's account once it is durable, only in the map
//!   itself, one bit a region, until this replica has joined.

use std::collections::BTreeMap;

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, Geometry, Nanos, RegionIndex};
use crate::wire::WriteSeq;

use super::meta_store::{MetaStore, Ticket};

/// Settled regions get accounts again up to so many at a time: 2 MiB of memory.
const ACCOUNTS_MAX: usize = 16_384;

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

/// What is known, in common, of the set regions that have no account of their own. Their bits are durable and no
/// write is in flight in them; what is said here is the latest of what was known of each.
#[derive(Debug, Default)]
struct Settled {
    last: Option<WriteSeq>,
    outside: bool,
    touched: Nanos,
}

impl Settled {
    /// The account of one of them.
    fn account(&self) -> Region {
        let Self { last, outside, touched } = *self;
        Region { ticket: None, in_flight: 0, last, outside, touched, clearing: None }
    }
}

impl Region {
    fn covered(&self, stable: Option<WriteSeq>) -> bool {
        covered(self.last, self.outside, stable)
    }
}

/// True if what was written up to `last` is stable on the whole ack set.
fn covered(last: Option<WriteSeq>, outside: bool, stable: Option<WriteSeq>) -> bool {
    mutated(Mutation::R5) || !outside && stable.is_some_and(|s| last.unwrap_or_default() <= s)
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct IntentBook {
    geometry: Geometry,
    /// Accounts of set regions. A set region without one is settled.
    regions: BTreeMap<RegionIndex, Region>,
    settled: Settled,
    /// When a write began last.
    touched: Nanos,
    /// No region with an account was touched before this: while that is too late, none of them is looked at.
    oldest: Nanos,
}

impl IntentBook {
    /// Takes over what the disk says: every set bit is durable and of unknown age.
    pub(super) fn new(geometry: Geometry) -> Self {
        let (regions, settled) = (BTreeMap::new(), Settled::default());
        Self { geometry, regions, settled, touched: Nanos(0), oldest: Nanos(u64::MAX) }
    }

    /// When a write began last; zero if none has since the start.
    pub(super) fn touched(&self) -> Nanos {
        self.touched
    }

    /// Begins a write to `blocks`: sets the bits that are not set and asks for their durability.
    pub(super) fn begin(&mut self, store: &mut MetaStore, blocks: BlockRange, now: Nanos) {
        self.touched = now;
        self.oldest = self.oldest.min(now);
        for index in self.geometry.regions_of(blocks) {
            let settled = &self.settled;
            let region = self.regions.entry(index).or_insert_with(|| {
                if store.intent().get(index.0) {
                    return settled.account();
                }
                let before = mutated(Mutation::R22).then(|| store.save_intent(index.0));
                store.intent_mut().set(index.0);
                let own = store.save_intent(index.0);
                let ticket = before.filter(|t| !store.redeemed(*t)).or(Some(own));
                Region { ticket, in_flight: 0, last: None, outside: false, touched: now, clearing: None }
            });
            region.in_flight += 1;
            region.touched = now;
            region.clearing = None;
        }
    }

    /// How many regions `begin` would add.
    pub(super) fn new_regions(&self, store: &MetaStore, blocks: BlockRange) -> usize {
        self.geometry.regions_of(blocks).filter(|r| !store.intent().get(r.0)).count()
    }

    /// True if the bit of every region of `blocks` is durable.
    pub(super) fn durable(&self, store: &MetaStore, blocks: BlockRange) -> bool {
        let durable = |r: &Region| r.ticket.is_none_or(|t| store.redeemed(t));
        self.geometry
            .regions_of(blocks)
            .all(|index| store.intent().get(index.0) && self.regions.get(&index).is_none_or(durable))
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
        self.settled.last = None;
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
        if self.settled.outside {
            self.settled.outside = false;
            self.settled.last = self.settled.last.max(Some(through));
        }
        for region in self.regions.values_mut().filter(|r| r.outside) {
            region.outside = false;
            region.last = region.last.max(Some(through));
        }
    }

    /// True if a flush would let something be cleared that `stable` does not.
    pub(super) fn wants_flush(
        &self,
        store: &MetaStore,
        stable: Option<WriteSeq>,
        idle_before: Nanos,
        urgent: bool,
    ) -> bool {
        let old = |touched: Nanos| urgent || touched <= idle_before;
        let settled = &self.settled;
        self.regions.values().any(|r| r.in_flight == 0 && old(r.touched) && !r.covered(stable))
            || self.settled_len(store) > 0
                && old(settled.touched)
                && !covered(settled.last, settled.outside, stable)
    }

    /// While this replica is no member nothing can be cleared: takes the accounts of what a resync brought
    /// together.
    pub(super) fn settle(&mut self, store: &MetaStore) {
        if self.settled_len(store) == 0 {
            self.settled = Settled::default();
        }
        let settled = &mut self.settled;
        self.regions.retain(|_, r| {
            let quiet = r.in_flight == 0 && r.ticket.is_none_or(|t| store.redeemed(t));
            if !(r.outside && quiet) {
                return true;
            }
            settled.outside = true;
            settled.last = settled.last.max(r.last);
            settled.touched = settled.touched.max(r.touched);
            false
        });
    }

    fn settled_len(&self, store: &MetaStore) -> u64 {
        store.intent().count() - self.regions.len() as u64
    }

    /// Gives settled regions accounts again if they may be cleared, some at a time.
    fn unsettle(&mut self, store: &MetaStore, stable: Option<WriteSeq>, due: impl Fn(Nanos) -> bool) {
        let may_go = covered(self.settled.last, self.settled.outside, stable) && due(self.settled.touched);
        let room = ACCOUNTS_MAX.saturating_sub(self.regions.len());
        let room = room.min(usize::try_from(self.settled_len(store)).unwrap_or(usize::MAX));
        if !may_go || room == 0 {
            return;
        }
        let settled = store.intent_regions().filter(|index| !self.regions.contains_key(index)).take(room);
        let accounts: Vec<_> = settled.map(|index| (index, self.settled.account())).collect();
        self.regions.extend(accounts);
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
        keep_max: u64,
        mut save_bitmaps: impl FnMut(&mut MetaStore, BlockRange) -> Vec<Ticket>,
    ) {
        let mut excess = store.intent().count().saturating_sub(keep_max);
        if excess == 0 && idle_before < self.oldest && self.settled_len(store) == 0 {
            return;
        }
        let due = |touched: Nanos| excess > 0 || touched <= idle_before;
        self.unsettle(store, stable, due);
        let mut ready: Vec<(Nanos, RegionIndex)> = self
            .regions
            .iter()
            .filter(|(_, r)| due(r.touched) && r.in_flight == 0 && r.covered(stable))
            .map(|(index, r)| (r.touched, *index))
            .collect();
        ready.sort_unstable();
        self.oldest = self.regions.values().map(|r| r.touched).min().unwrap_or(Nanos(u64::MAX));
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

    /// Every account is that of a set region, and none is older than is thought. For the invariant check.
    pub(super) fn is_consistent(&self, store: &MetaStore) -> bool {
        self.regions.iter().all(|(index, r)| store.intent().get(index.0) && r.touched >= self.oldest)
    }

    /// Set regions with an account of their own.
    #[cfg(test)]
    fn accounts(&self) -> usize {
        self.regions.len()
    }
}

#[cfg(test)]
#[path = "intent_tests.rs"]
mod tests;
