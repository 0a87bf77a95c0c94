//! Regions whose dirty bits say more than is known: they were marked whole because of an intent, or come
//! from a disk that cannot tell the two apart. A resync compares their blocks by hash before it copies.
//!
//! It lives in memory alone and decides nothing but *how* a block is brought, never whether.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{RegionIndex, ReplicaSlot};

/// What is suspect for one other replica.
#[derive(Debug, Clone, Default)]
pub(super) struct Suspect {
    all: bool,
    regions: BTreeSet<RegionIndex>,
}

impl Suspect {
    pub(super) fn contains(&self, region: RegionIndex) -> bool {
        self.all || self.regions.contains(&region)
    }

    pub(super) fn insert(&mut self, region: RegionIndex) {
        if !self.all {
            self.regions.insert(region);
        }
    }
}

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    slots: BTreeMap<ReplicaSlot, Suspect>,
}

impl Suspects {
    /// Bits of unknown origin: compare everything.
    pub(super) fn suspect_all(&mut self, slot: ReplicaSlot) {
        self.slots.insert(slot, Suspect { all: true, regions: BTreeSet::new() });
    }

    pub(super) fn insert(&mut self, slot: ReplicaSlot, region: RegionIndex) {
        self.slots.entry(slot).or_default().insert(region);
    }

    /// The replica lacks nothing any more.
    pub(super) fn clear(&mut self, slot: ReplicaSlot) {
        self.slots.remove(&slot);
    }

    pub(super) fn of(&self, slot: ReplicaSlot) -> Suspect {
        self.slots.get(&slot).cloned().unwrap_or_default()
    }
}
