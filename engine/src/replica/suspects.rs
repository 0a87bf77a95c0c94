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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const SLOTS: u8 = 3;
    const REGIONS: u64 = 6;

    proptest! {
        /// The model is the set of suspect pairs of slot and region.
        #[test]
        fn behaves_like_a_set_of_pairs(steps in prop::collection::vec((0..SLOTS, 0..REGIONS, 0u8..8), 0..60)) {
            let mut suspects = Suspects::default();
            let mut model: BTreeSet<(u8, u64)> = BTreeSet::new();
            for (slot, region, what) in steps {
                let before = suspects.of(ReplicaSlot(slot));
                match what {
                    0 => {
                        suspects.suspect_all(ReplicaSlot(slot));
                        model.extend((0..REGIONS).map(|r| (slot, r)));
                    }
                    1 => {
                        suspects.clear(ReplicaSlot(slot));
                        model.retain(|(s, _)| *s != slot);
                    }
                    _ => {
                        suspects.insert(ReplicaSlot(slot), RegionIndex(region));
                        model.insert((slot, region));
                    }
                }
                for slot in 0..SLOTS {
                    let suspect = suspects.of(ReplicaSlot(slot));
                    for region in 0..REGIONS {
                        let expected = model.contains(&(slot, region));
                        prop_assert_eq!(suspect.contains(RegionIndex(region)), expected, "{} {}", slot, region);
                    }
                }
                // What a resync has taken with it is its own.
                let mut taken = before.clone();
                taken.insert(RegionIndex(region));
                for r in 0..REGIONS {
                    let expected = r == region || before.contains(RegionIndex(r));
                    prop_assert_eq!(taken.contains(RegionIndex(r)), expected);
                }
            }
        }
    }
}
