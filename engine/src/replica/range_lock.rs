//! Locks on block ranges, granted in the order of arrival.
//!
//! One structure serves two purposes: the primary's *range lock* (client requests, repairs and resync
//! copies exclude each other, reads share) and every replica's *disk lock* (one disk write per block at
//! a time, ended only by the kernel's completion [R7]).
//!
//! Invariants:
//! - no two granted entries conflict;
//! - an entry never passes an earlier conflicting one, waiting or granted: nobody starves, and
//!   overlapping requests start in arrival order.

use std::collections::BTreeMap;

use crate::types::BlockRange;

/// Names one entry; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LockId(u64);

#[derive(Debug)]
struct Entry<O> {
    range: BlockRange,
    exclusive: bool,
    granted: bool,
    owner: O,
}

impl<O> Entry<O> {
    fn conflicts(&self, range: &BlockRange, exclusive: bool) -> bool {
        (self.exclusive || exclusive) && self.range.overlaps(range)
    }
}

/// The lock table. `O` says whose an entry is, so that a grant can be acted on.
#[derive(Debug)]
pub(super) struct RangeLocks<O> {
    next: u64,
    entries: BTreeMap<u64, Entry<O>>,
}

impl<O: Copy> RangeLocks<O> {
    pub(super) fn new() -> Self {
        Self { next: 1, entries: BTreeMap::new() }
    }

    /// Enters the queue for `range`; true if the lock is granted at once.
    pub(super) fn acquire(&mut self, range: BlockRange, exclusive: bool, owner: O) -> (LockId, bool) {
        let granted = !self.entries.values().any(|e| e.conflicts(&range, exclusive));
        let id = self.next;
        self.next += 1;
        self.entries.insert(id, Entry { range, exclusive, granted, owner });
        (LockId(id), granted)
    }

    /// Leaves: gives the lock up, or the place in the queue. Returns whom that lets in, in order.
    pub(super) fn release(&mut self, id: LockId) -> Vec<O> {
        let Some(gone) = self.entries.remove(&id.0) else {
            panic!("range lock {id:?} released twice");
        };
        let waiting: Vec<u64> = self
            .entries
            .range(id.0..)
            .filter(|(_, e)| !e.granted && e.conflicts(&gone.range, gone.exclusive))
            .map(|(n, _)| *n)
            .collect();
        let mut let_in = Vec::new();
        for n in waiting {
            let entry = &self.entries[&n];
            let blocked = self.entries.range(..n).any(|(_, e)| e.conflicts(&entry.range, entry.exclusive));
            if !blocked && let Some(entry) = self.entries.get_mut(&n) {
                entry.granted = true;
                let_in.push(entry.owner);
            }
        }
        let_in
    }

    /// True if nothing is locked or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// True if no two granted entries conflict. For the invariant check.
    pub(super) fn is_consistent(&self) -> bool {
        let granted: Vec<_> = self.entries.values().filter(|e| e.granted).collect();
        granted
            .iter()
            .enumerate()
            .all(|(n, a)| granted.iter().skip(n + 1).all(|b| !a.conflicts(&b.range, b.exclusive)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> BlockRange {
        BlockRange::between(start, end)
    }

    #[test]
    fn readers_share_and_a_writer_waits_for_all_of_them() {
        let mut locks = RangeLocks::new();
        let (a, granted_a) = locks.acquire(range(0, 4), false, 'a');
        let (b, granted_b) = locks.acquire(range(2, 6), false, 'b');
        let (_, granted_w) = locks.acquire(range(3, 4), true, 'w');
        assert!(granted_a && granted_b && !granted_w);
        assert!(locks.release(a).is_empty());
        assert_eq!(locks.release(b), ['w']);
    }

    #[test]
    fn a_later_reader_does_not_pass_a_waiting_writer() {
        let mut locks = RangeLocks::new();
        let (a, _) = locks.acquire(range(0, 4), false, 'a');
        let (w, _) = locks.acquire(range(0, 4), true, 'w');
        let (_, granted) = locks.acquire(range(0, 4), false, 'r');
        assert!(!granted, "a reader that passes a writer starves it");
        assert_eq!(locks.release(a), ['w']);
        assert_eq!(locks.release(w), ['r']);
    }

    #[test]
    fn leaving_the_queue_lets_those_behind_in() {
        let mut locks = RangeLocks::new();
        let (_, _) = locks.acquire(range(0, 2), true, 'a');
        let (b, _) = locks.acquire(range(0, 8), true, 'b');
        let (_, granted) = locks.acquire(range(4, 8), true, 'c');
        assert!(!granted);
        assert_eq!(locks.release(b), ['c']);
    }

    proptest! {
        #[test]
        fn grants_are_exclusive_fair_and_nobody_is_forgotten(
            steps in prop::collection::vec((0u64..12, 1u64..6, any::<bool>(), 0usize..8), 1..80)
        ) {
            let mut locks = RangeLocks::new();
            let mut held: Vec<(LockId, u32)> = Vec::new();
            let mut waiting: Vec<(LockId, u32)> = Vec::new();
            for (n, (start, len, exclusive, drop_at)) in steps.into_iter().enumerate() {
                let owner = u32::try_from(n).unwrap();
                let (id, granted) = locks.acquire(range(start, start + len), exclusive, owner);
                if granted { held.push((id, owner)); } else { waiting.push((id, owner)); }
                prop_assert!(locks.is_consistent());
                if drop_at < held.len() {
                    let (id, _) = held.remove(drop_at);
                    for owner in locks.release(id) {
                        let at = waiting.iter().position(|w| w.1 == owner).unwrap();
                        held.push(waiting.remove(at));
                    }
                }
            }
            while let Some((id, _)) = held.pop() {
                for owner in locks.release(id) {
                    let at = waiting.iter().position(|w| w.1 == owner).unwrap();
                    held.push(waiting.remove(at));
                }
                prop_assert!(locks.is_consistent());
            }
            prop_assert!(waiting.is_empty() && locks.is_empty());
        }
    }
}
