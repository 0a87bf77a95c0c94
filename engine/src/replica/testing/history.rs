//! What clients know: per block the values that a read may return.
//!
//! A write that was acknowledged is the only value; one that was not may have taken effect or not,
//! until a read decides it. A client has one write per block under way at a time.

use std::collections::{BTreeMap, BTreeSet};

/// Per block the values that it may have.
type Values = BTreeMap<u64, BTreeSet<u64>>;

/// What a flush, if it succeeds, makes of what may survive: these values, and what was sent after it.
#[derive(Debug, Clone)]
pub(super) struct Flushable {
    number: u64,
    then: Values,
}

/// What a write makes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Its value is the tag.
    Whole(u64),
    /// Some bytes of it: its value is the tag, mixed with what it was.
    Part(u64),
}

impl Change {
    pub(super) fn tag(self) -> u64 {
        match self {
            Self::Whole(tag) | Self::Part(tag) => tag,
        }
    }

    fn of(self, old: &BTreeSet<u64>) -> BTreeSet<u64> {
        match self {
            Self::Whole(tag) => BTreeSet::from([tag]),
            Self::Part(tag) => old.iter().map(|old| mixed(*old, tag)).collect(),
        }
    }
}

/// A block whose value was `old`, partly overwritten with `tag`. A second mixing replaces the first, as a
/// buffer whose edges are filled twice does.
pub(super) fn mixed(old: u64, tag: u64) -> u64 {
    let fold = old.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (fold << 32) | (tag & 0xffff_ffff)
}

#[derive(Debug, Default)]
pub(in super::super) struct History {
    possible: Values,
    under_way: BTreeMap<u64, Change>,
    /// Per block the values that may survive a power loss of all nodes, with the number of flushes that
    /// were sent before they were.
    flushed: BTreeMap<u64, BTreeSet<(u64, u64)>>,
    flushes: u64,
}

impl History {
    fn values(&mut self, block: u64) -> &mut BTreeSet<u64> {
        self.possible.entry(block).or_insert_with(|| BTreeSet::from([0]))
    }

    pub(in super::super) fn busy(&self, block: u64) -> bool {
        self.under_way.contains_key(&block)
    }

    pub(super) fn write_sent(&mut self, block: u64, change: Change) {
        // A write whose connection broke may be carried out before this one or in the middle of a part.
        let new = change.of(self.values(block));
        self.values(block).extend(&new);
        let numbered = new.into_iter().map(|value| (self.flushes, value));
        self.flushed.entry(block).or_insert_with(|| BTreeSet::from([(0, 0)])).extend(numbered);
        assert!(self.under_way.insert(block, change).is_none(), "one write per block at a time");
    }

    pub(super) fn write_acked(&mut self, block: u64, change: Change) {
        assert_eq!(self.under_way.remove(&block), Some(change), "acknowledged twice, or never sent");
        let new = change.of(self.values(block));
        *self.values(block) = new;
    }

    /// The values that a block may have now.
    pub(super) fn allowed(&self, block: u64) -> BTreeSet<u64> {
        self.possible.get(&block).cloned().unwrap_or_else(|| BTreeSet::from([0]))
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
    pub(super) fn flush_sent(&mut self) -> Flushable {
        self.flushes += 1;
        Flushable { number: self.flushes, then: self.possible.clone() }
    }

    /// A flush ended: what may survive is what was possible when it was sent, or sent since.
    pub(super) fn flush_acked(&mut self, flush: &Flushable) {
        for (block, then) in &flush.then {
            let survivors = self.flushed.entry(*block).or_default();
            survivors.retain(|(number, _)| *number >= flush.number);
            survivors.extend(then.iter().map(|value| (flush.number - 1, *value)));
        }
    }

    /// All nodes lost power at once: what was acknowledged but not flushed may be gone.
    pub(in super::super) fn power_lost(&mut self) {
        for (block, values) in &mut self.possible {
            values.extend(self.flushed.get(block).into_iter().flatten().map(|(_, value)| *value));
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
