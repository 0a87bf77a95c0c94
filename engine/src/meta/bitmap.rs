//! One bitmap of a replica (intent map, or dirty bitmap for another replica) in memory, and which of
//! its groups the disk does not know yet. How a group looks on disk is in `bitmap_disk`.
//!
//! Invariants: `count` is the number of set bits; `short` is a subset of `unsaved`; a group that is
//! not in `short` has no set bit that its last encoded content lacks; a group that is not in
//! `unsaved` equals its last encoded content.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

use super::group::GroupBits;
use super::layout::{Area, AreaLayout, GROUP_BITS, Layout};
use crate::types::VolumeId;
use crate::wire::Run;

/// A run that does not lie within the bitmap it was meant for, or is empty.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("run of {count} bits from {start} does not lie within the {len} bits of the {area}")]
pub struct RunOutside {
    /// The bitmap.
    pub area: Area,
    /// First bit of the run.
    pub start: u64,
    /// Bits of the run.
    pub count: u64,
    /// Bits of the bitmap.
    pub len: u64,
}

/// A group: its bits, and what is known of its two slots on disk.
#[derive(Clone)]
pub(super) struct Group {
    pub(super) bits: GroupBits,
    /// At least the highest sequence number that either slot may hold.
    pub(super) seq: u64,
    /// The slot that the next write goes to.
    pub(super) slot_next: u8,
    /// Bit per slot that holds, or may hold, something that does not read as a page of this group.
    pub(super) slots_bad: u8,
}

/// A bitmap of fixed length, stored in pages that are written group by group.
///
/// A *group* is what one write carries: [`GROUP_BITS`] bits. Every change marks its group unsaved;
/// [`PagedBitmap::encode_group`] makes the bytes that save it. Whether those bytes are durable is for
/// the owner to know: it must not encode a group again before the last write of it has completed.
#[derive(Clone)]
pub struct PagedBitmap {
    pub(super) area: Area,
    pub(super) volume: VolumeId,
    pub(super) place: AreaLayout,
    pub(super) groups: Vec<Group>,
    pub(super) count: u64,
    pub(super) unsaved: BTreeSet<u32>,
    pub(super) short: BTreeSet<u32>,
}

fn group_and_bit(bit: u64) -> (usize, u32) {
    let group = usize::try_from(bit / u64::from(GROUP_BITS)).expect("bits of a volume are bounded");
    let within = u32::try_from(bit % u64::from(GROUP_BITS)).expect("less than the bits of a group");
    (group, within)
}

fn first_bit(group: usize) -> u64 {
    u64::try_from(group).expect("an index of a vector") * u64::from(GROUP_BITS)
}

fn group_number(group: usize) -> u32 {
    u32::try_from(group).expect("groups of an area are counted in 32 bits")
}

impl PagedBitmap {
    /// All clear, for an area that was never written. All its groups are unsaved, because an unwritten
    /// area reads all-set; each takes two writes (one per slot) before it counts as saved.
    ///
    /// # Panics
    /// If `bits` is not what `layout` holds for `area`.
    #[must_use]
    pub fn new_clear(area: Area, bits: u64, volume: VolumeId, layout: &Layout) -> Self {
        let mut bitmap = Self::unwritten(area, bits, volume, layout, GroupBits::clear);
        bitmap.unsaved = (0..bitmap.place.groups()).collect();
        bitmap
    }

    /// All set, for an area that was never written. Nothing of it is unsaved: an unwritten area reads
    /// all-set. To set everything in an area that was written use [`PagedBitmap::set_all`].
    ///
    /// # Panics
    /// If `bits` is not what `layout` holds for `area`.
    #[must_use]
    pub fn new_full(area: Area, bits: u64, volume: VolumeId, layout: &Layout) -> Self {
        let mut bitmap = Self::unwritten(area, bits, volume, layout, GroupBits::full);
        bitmap.count = bits;
        bitmap
    }

    pub(super) fn unwritten(
        area: Area,
        bits: u64,
        volume: VolumeId,
        layout: &Layout,
        content: fn(u32) -> GroupBits,
    ) -> Self {
        let place = layout.area(area);
        assert_eq!(bits, place.bits(), "bits of the {area}");
        let group = |g| Group { bits: content(place.bits_of(g)), seq: 0, slot_next: 0, slots_bad: 0b11 };
        let groups = (0..place.groups()).map(group).collect();
        Self { area, volume, place, groups, count: 0, unsaved: BTreeSet::new(), short: BTreeSet::new() }
    }

    /// Sets a bit; true if it was clear.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn set(&mut self, bit: u64) -> bool {
        self.set_range(bit, 1) == 1
    }

    /// Clears a bit; true if it was set.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn clear(&mut self, bit: u64) -> bool {
        self.clear_range(bit, 1) == 1
    }

    /// Sets `start .. start + count`; returns how many of them were clear.
    ///
    /// # Panics
    /// If the range leaves the bitmap.
    pub fn set_range(&mut self, start: u64, count: u64) -> u64 {
        let changed = self.change(start, count, true);
        self.count += changed;
        changed
    }

    /// Clears `start .. start + count`; returns how many of them were set.
    ///
    /// # Panics
    /// If the range leaves the bitmap.
    pub fn clear_range(&mut self, start: u64, count: u64) -> u64 {
        let changed = self.change(start, count, false);
        self.count -= changed;
        changed
    }

    /// Sets every bit.
    pub fn set_all(&mut self) {
        self.set_range(0, self.len());
        assert_eq!(self.count, self.len(), "bits set in the {} after setting all", self.area);
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        self.clear_range(0, self.len());
        assert_eq!(self.count, 0, "bits set in the {} after clearing all", self.area);
    }

    /// Sets every bit that a run names; returns how many of them were clear. The runs may come from a
    /// peer: all are checked before the first bit is set.
    ///
    /// # Errors
    /// [`RunOutside`] names the first run that is empty or leaves the bitmap; nothing is set then.
    pub fn union_runs(&mut self, runs: &[Run]) -> Result<u64, RunOutside> {
        for run in runs {
            let end = run.start.checked_add(run.count);
            if run.count == 0 || end.is_none_or(|end| end > self.len()) {
                let (start, count) = (run.start, run.count);
                return Err(RunOutside { area: self.area, start, count, len: self.len() });
            }
        }
        Ok(runs.iter().map(|run| self.set_range(run.start, run.count)).sum())
    }

    fn change(&mut self, start: u64, count: u64, to: bool) -> u64 {
        let end = start.checked_add(count).expect("a range of bits does not overflow");
        assert!(end <= self.len(), "bits {start}..{end} of the {} of {} bits", self.area, self.len());
        let mut changed = 0;
        let mut at = start;
        while at < end {
            let (index, bit) = group_and_bit(at);
            let group = &mut self.groups[index];
            let room = group.bits.len() - bit;
            let here = u32::try_from(end - at).map_or(room, |rest| rest.min(room));
            let changed_here = group.bits.change(bit, here, to);
            if changed_here > 0 {
                changed += u64::from(changed_here);
                self.unsaved.insert(group_number(index));
                if to {
                    self.short.insert(group_number(index));
                }
            }
            at += u64::from(here);
        }
        changed
    }

    /// True if the bit is set.
    ///
    /// # Panics
    /// If there is no such bit.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        assert!(bit < self.len(), "bit {bit} of the {} of {} bits", self.area, self.len());
        let (group, bit) = group_and_bit(bit);
        self.groups[group].bits.get(bit)
    }

    /// Number of set bits; costs nothing.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// True if no bit is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Number of bits, set or not.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.place.bits()
    }

    /// Which bitmap this is.
    #[must_use]
    pub fn area(&self) -> Area {
        self.area
    }

    /// First set bit at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if self.is_empty() { None } else { self.next(from, true) }
    }

    /// First clear bit at or after `from`.
    #[must_use]
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        if self.count == self.len() { None } else { self.next(from, false) }
    }

    fn next(&self, from: u64, set: bool) -> Option<u64> {
        if from >= self.len() {
            return None;
        }
        let (first, bit) = group_and_bit(from);
        let found = self.groups[first].bits.next(bit, set).map(|bit| (first, bit)).or_else(|| {
            let rest = self.groups.iter().enumerate().skip(first + 1);
            rest.filter_map(|(i, group)| Some((i, group.bits.next(0, set)?))).next()
        });
        found.map(|(group, bit)| first_bit(group) + u64::from(bit))
    }

    /// The set bits at or after `from` as runs, ascending, each as long as it can be.
    pub fn runs(&self, from: u64) -> impl Iterator<Item = Run> + use<'_> {
        let mut at = from;
        std::iter::from_fn(move || {
            let start = self.next_set(at)?;
            at = self.next_clear(start).unwrap_or(self.len());
            Some(Run { start, count: at - start })
        })
    }

    /// Number of groups.
    #[must_use]
    pub fn groups(&self) -> u32 {
        self.place.groups()
    }

    /// The group that holds `bit`.
    ///
    /// # Panics
    /// If there is no such bit.
    #[must_use]
    pub fn group_of(&self, bit: u64) -> u32 {
        assert!(bit < self.len(), "bit {bit} of the {} of {} bits", self.area, self.len());
        group_number(group_and_bit(bit).0)
    }

    /// True if the group differs (or may differ) from what was last encoded of it, or if one of its
    /// slots is still damaged.
    #[must_use]
    pub fn is_group_unsaved(&self, group: u32) -> bool {
        self.unsaved.contains(&group)
    }

    /// True if the group may have a set bit that its last encoded content lacks. A group that is
    /// unsaved but not this differs only by clears, which may wait as long as the owner likes.
    #[must_use]
    pub fn has_unsaved_sets(&self, group: u32) -> bool {
        self.short.contains(&group)
    }

    /// All unsaved groups, ascending.
    pub fn unsaved_groups(&self) -> impl Iterator<Item = u32> + use<'_> {
        self.unsaved.iter().copied()
    }

    /// All groups with unsaved sets, ascending.
    pub fn unsaved_set_groups(&self) -> impl Iterator<Item = u32> + use<'_> {
        self.short.iter().copied()
    }

    /// First unsaved group at or after `from`.
    #[must_use]
    pub fn first_unsaved(&self, from: u32) -> Option<u32> {
        self.unsaved.range(from..).next().copied()
    }
}

impl fmt::Debug for PagedBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedBitmap")
            .field("area", &self.area)
            .field("set", &self.count)
            .field("len", &self.len())
            .field("unsaved_groups", &self.unsaved.len())
            .finish_non_exhaustive()
    }
}
