//! What clients know: per block the values that a read may return.
//!
//! A write that was acknowledged is the only value; one that was not may have taken effect or not,
//! until a read decides it. A client has one write per block under way at a time.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(in super::super) struct History {
    possible: BTreeMap<u64, BTreeSet<u64>>,
    under_way: BTreeMap<u64, u64>,
    /// Per block the values that may survive a power loss of all nodes: since the last flush.
    flushed: BTreeMap<u64, BTreeSet<u64>>,
}

impl History {
    fn values(&mut self, block: u64) -> &mut BTreeSet<u64> {
        self.possible.entry(block).or_insert_with(|| BTreeSet::from([0]))
    }

    pub(in super::super) fn busy(&self, block: u64) -> bool {
        self.under_way.contains_key(&block)
    }

    pub(in super::super) fn write_sent(&mut self, block: u64, tag: u64) {
        self.values(block).insert(tag);
        self.flushed.entry(block).or_insert_with(|| BTreeSet::from([0])).insert(tag);
        assert!(self.under_way.insert(block, tag).is_none(), "one write per block at a time");
    }

    pub(in super::super) fn write_acked(&mut self, block: u64, tag: u64) {
        assert_eq!(self.under_way.remove(&block), Some(tag), "acknowledged twice, or never sent");
        *self.values(block) = BTreeSet::from([tag]);
    }

    /// The connection broke: the write may have taken effect.
    pub(in super::super) fn write_lost(&mut self, block: u64) {
        self.under_way.remove(&block);
    }

    pub(in super::super) fn read(&mut self, block: u64, value: u64, who: &str) {
        let allowed = self.values(block).clone();
        assert!(allowed.contains(&value), "{who}: block {block} reads {value}, may be {allowed:?}");
        if !self.busy(block) {
            *self.values(block) = BTreeSet::from([value]);
        }
    }

    /// The values of each block right now, to be handed to `flush_acked` if a flush sent now succeeds.
    pub(in super::super) fn flush_sent(&mut self) -> BTreeMap<u64, BTreeSet<u64>> {
        self.possible.clone()
    }

    /// A flush ended: what is possible now is what was possible when it was sent, or written since.
    pub(in super::super) fn flush_acked(&mut self, sent: &BTreeMap<u64, BTreeSet<u64>>) {
        for (block, then) in sent {
            let now = self.possible[block].clone();
            self.flushed.insert(*block, then.union(&now).copied().collect());
        }
    }

    /// All nodes lost power at once: what was acknowledged but not flushed may be gone.
    pub(in super::super) fn power_lost(&mut self) {
        for (block, values) in &mut self.possible {
            values.extend(self.flushed.get(block).into_iter().flatten().copied());
        }
        self.under_way.clear();
    }

    pub(in super::super) fn blocks(&self) -> Vec<u64> {
        self.possible.keys().copied().collect()
    }

    pub(in super::super) fn check_final(&mut self, block: u64, value: u64) {
        self.read(block, value, "at the end");
    }
}
