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
//!
//! The common case, a range that meets no other one, costs the same however many entries there are: blocks
//! are counted in a table by their number's last bits, and only where a count says that there may be an
//! overlap are the entries looked at. Nothing is allocated once there have been as many entries before.

use crate::types::BlockRange;

/// Places in the table of counts.
const PLACES: usize = 4096;
/// A range of more blocks than this is not counted block by block: while there is one, all entries are
/// looked at.
const COUNTED_MAX: u64 = 256;

/// Names one entry; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockId {
    number: u64,
    at: u32,
}

#[derive(Debug)]
struct Entry<O> {
    number: u64,
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
    /// In no order; vacant places are used again.
    entries: Vec<Option<Entry<O>>>,
    vacant: Vec<u32>,
    waiting: usize,
    /// Entries whose range has a block with these last bits.
    counts: Box<[u32]>,
    /// Entries too long to be counted.
    uncounted: usize,
}

/// The places of a range in the table, unless it is too long for that.
fn places(range: &BlockRange) -> Option<impl Iterator<Item = usize> + use<>> {
    let (start, count) = (range.start.0, range.count);
    let place = move |n: u64| usize::try_from((start + n) % PLACES as u64).unwrap_or(0);
    (count <= COUNTED_MAX).then(|| (0..count).map(place))
}

impl<O: Copy> RangeLocks<O> {
    pub(super) fn new() -> Self {
        Self {
            next: 1,
            entries: Vec::new(),
            vacant: Vec::new(),
            waiting: 0,
            counts: vec![0; PLACES].into_boxed_slice(),
            uncounted: 0,
        }
    }

    /// Enters the queue for `range`; true if the lock is granted at once.
    pub(super) fn acquire(&mut self, range: BlockRange, exclusive: bool, owner: O) -> (LockId, bool) {
        let granted = !self.may_overlap(&range) || !self.all().any(|e| e.conflicts(&range, exclusive));
        let number = self.next;
        self.next += 1;
        self.count(&range, true);
        self.waiting += usize::from(!granted);
        let entry = Some(Entry { number, range, exclusive, granted, owner });
        let at = if let Some(at) = self.vacant.pop() {
            self.entries[at as usize] = entry;
            at
        } else {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).expect("fewer than 2^32 locks at once")
        };
        (LockId { number, at }, granted)
    }

    /// Leaves: gives the lock up, or the place in the queue. Returns whom that lets in, in order.
    pub(super) fn release(&mut self, id: LockId) -> Vec<O> {
        let place = &mut self.entries[id.at as usize];
        let Some(gone) = place.take_if(|e| e.number == id.number) else {
            panic!("range lock {id:?} released twice");
        };
        self.vacant.push(id.at);
        self.count(&gone.range, false);
        self.waiting -= usize::from(!gone.granted);
        if self.waiting == 0 {
            return Vec::new();
        }
        let waits = |e: &&Entry<O>| !e.granted && e.number > gone.number;
        let mut waiting: Vec<(u64, usize)> = self
            .entries
            .iter()
            .enumerate()
            .filter_map(|(at, e)| Some((at, e.as_ref().filter(waits)?)))
            .filter(|(_, e)| e.conflicts(&gone.range, gone.exclusive))
            .map(|(at, e)| (e.number, at))
            .collect();
        waiting.sort_unstable();
        waiting.into_iter().filter_map(|(_, at)| self.let_in(at)).collect()
    }

    /// Grants the lock to a waiting entry if nothing earlier is in its way.
    fn let_in(&mut self, at: usize) -> Option<O> {
        let entry = self.entries[at].as_ref()?;
        let earlier = |e: &&Entry<O>| e.number < entry.number;
        if self.all().filter(earlier).any(|e| e.conflicts(&entry.range, entry.exclusive)) {
            return None;
        }
        let entry = self.entries[at].as_mut()?;
        entry.granted = true;
        self.waiting -= 1;
        Some(entry.owner)
    }

    /// True if nothing is locked or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.len() == self.vacant.len()
    }

    /// True if no two granted entries conflict, and the counts are those of the entries. For the invariant
    /// check.
    pub(super) fn is_consistent(&self) -> bool {
        let granted = || self.all().filter(|e| e.granted);
        let apart = granted()
            .enumerate()
            .all(|(n, a)| granted().skip(n + 1).all(|b| !a.conflicts(&b.range, b.exclusive)));
        let long = self.all().filter(|e| e.range.count > COUNTED_MAX).count();
        let blocks: u64 = self.all().map(|e| e.range.count).filter(|count| *count <= COUNTED_MAX).sum();
        apart
            && self.waiting == self.all().filter(|e| !e.granted).count()
            && self.uncounted == long
            && self.counts.iter().map(|n| u64::from(*n)).sum::<u64>() == blocks
    }

    fn all(&self) -> impl Iterator<Item = &Entry<O>> {
        self.entries.iter().flatten()
    }

    /// False only if no entry overlaps `range`.
    fn may_overlap(&self, range: &BlockRange) -> bool {
        self.uncounted > 0 || places(range).is_none_or(|mut places| places.any(|n| self.counts[n] > 0))
    }

    fn count(&mut self, range: &BlockRange, enters: bool) {
        match places(range) {
            Some(places) if enters => places.for_each(|n| self.counts[n] += 1),
            Some(places) => places.for_each(|n| self.counts[n] -= 1),
            None if enters => self.uncounted += 1,
            None => self.uncounted -= 1,
        }
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

        /// The table of counts and the vacant places change nothing of what looking at every entry would say.
        #[test]
        fn it_grants_what_a_list_of_all_entries_grants(
            steps in prop::collection::vec(
                (0u64..40, 0u64..3, prop_oneof![1u64..6, 250u64..260, 4000u64..5000], any::<bool>(),
                 any::<prop::sample::Index>(), 0u8..5),
                1..80
            )
        ) {
            let mut locks = RangeLocks::new();
            // Lock, range, exclusive, granted; oldest first.
            let mut model: Vec<(LockId, BlockRange, bool, bool)> = Vec::new();
            let conflict = |a: &(LockId, BlockRange, bool, bool), range: &BlockRange, exclusive: bool| {
                (a.2 || exclusive) && a.1.overlaps(range)
            };
            for (start, wrap, len, exclusive, which, kind) in steps {
                if kind > 1 || model.is_empty() {
                    let start = start + wrap * PLACES as u64;
                    let range = range(start, start + len);
                    let free = !model.iter().any(|e| conflict(e, &range, exclusive));
                    let (id, granted) = locks.acquire(range, exclusive, start);
                    prop_assert_eq!(granted, free);
                    model.push((id, range, exclusive, granted));
                } else {
                    let gone = model.remove(which.index(model.len()));
                    let mut expected = Vec::new();
                    for n in 0..model.len() {
                        let entry = model[n];
                        if !entry.3 && !model[..n].iter().any(|e| conflict(e, &entry.1, entry.2)) {
                            model[n].3 = true;
                            expected.push(entry.1.start.0);
                        }
                    }
                    prop_assert_eq!(locks.release(gone.0), expected);
                }
                prop_assert!(locks.is_consistent());
            }
        }
    }
}
