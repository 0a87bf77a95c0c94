//! Where everything lies in a metadata file. Pure arithmetic on a checked geometry; reads nothing.
//!
//! Every offset is derived from the one before it and is a multiple of 4096, so that each write of the
//! module is one aligned 4 KiB write. Areas for all eight replica slots have their place from the start:
//! a replica added later moves nothing, and an area that nobody uses stays a hole in a sparse file.

use std::fmt;

use super::superblock::SUPERBLOCKS_END;
use crate::types::{Geometry, REPLICAS_MAX, ReplicaSlot};

/// Length of a page in bytes: the unit that is checksummed, and that a disk writes whole or not at all.
pub const META_PAGE_LEN: usize = 512;
/// Pages in one group.
pub const PAGES_PER_GROUP: usize = 8;
/// Length of a group in bytes: the unit that is written.
pub const META_GROUP_LEN: usize = META_PAGE_LEN * PAGES_PER_GROUP;
/// Length of a page's header in bytes.
pub(super) const PAGE_HEADER_LEN: usize = 32;
/// 64-bit words of bits in one page.
pub(super) const PAGE_WORDS: usize = (META_PAGE_LEN - PAGE_HEADER_LEN) / 8;
/// 64-bit words of bits in one group.
pub(super) const GROUP_WORDS: usize = PAGE_WORDS * PAGES_PER_GROUP;
/// Bits in one group.
pub const GROUP_BITS: u32 = 30_720;
/// [`META_GROUP_LEN`] as a file offset.
const GROUP_BYTES: u64 = 4096;

const _: () = assert!(META_GROUP_LEN == 4096);
const _: () = assert!(GROUP_BYTES as u128 == META_GROUP_LEN as u128);
const _: () = assert!(GROUP_BITS as u128 == GROUP_WORDS as u128 * 64);
const _: () = assert!(SUPERBLOCKS_END.is_multiple_of(GROUP_BYTES));

/// One bitmap of a metadata file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// The intent map: one bit per region.
    Intent,
    /// The dirty bitmap for the replica in this slot: one bit per block that it lacks.
    Dirty(ReplicaSlot),
}

impl Area {
    /// The area's number on disk: 0 for the intent map, 1 + slot for a dirty bitmap.
    ///
    /// # Panics
    /// If the slot is not below [`REPLICAS_MAX`].
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Intent => 0,
            Self::Dirty(slot) => {
                assert!(usize::from(slot.0) < REPLICAS_MAX, "replica slot {} out of range", slot.0);
                1 + slot.0
            }
        }
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intent => f.write_str("intent map"),
            Self::Dirty(slot) => write!(f, "dirty bitmap for replica slot {}", slot.0),
        }
    }
}

/// Where one area lies and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AreaLayout {
    offset: u64,
    bits: u64,
    groups: u32,
}

impl AreaLayout {
    fn new(offset: u64, bits: u64) -> Self {
        assert!(bits > 0, "an area without bits");
        let groups = u32::try_from(bits.div_ceil(u64::from(GROUP_BITS)))
            .expect("a volume's size is bounded, so are the groups of its bitmaps");
        Self { offset, bits, groups }
    }

    /// First byte of the area in the metadata file.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that the area takes: two slots per group.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        u64::from(self.groups) * 2 * GROUP_BYTES
    }

    /// The byte after the area.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.byte_len()
    }

    /// Bits that the area holds.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Groups that the area holds.
    #[must_use]
    pub fn groups(&self) -> u32 {
        self.groups
    }

    /// Bits in `group`: [`GROUP_BITS`], fewer in the last one.
    ///
    /// # Panics
    /// If there is no such group.
    #[must_use]
    pub fn bits_of(&self, group: u32) -> u32 {
        assert!(group < self.groups, "group {group} of {}", self.groups);
        let rest = self.bits - u64::from(group) * u64::from(GROUP_BITS);
        u32::try_from(rest).map_or(GROUP_BITS, |rest| rest.min(GROUP_BITS))
    }

    /// File offset of one of the two slots (0 or 1) of `group`. The slots of a group are adjacent.
    ///
    /// # Panics
    /// If there is no such group or slot.
    #[must_use]
    pub fn group_offset(&self, group: u32, slot: u8) -> u64 {
        assert!(group < self.groups && slot < 2, "group {group} of {}, slot {slot}", self.groups);
        self.offset + (2 * u64::from(group) + u64::from(slot)) * GROUP_BYTES
    }
}

/// Where everything lies in the metadata file of a volume of some geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: u64,
    blocks: u64,
}

impl Layout {
    /// The layout for volumes of this geometry.
    #[must_use]
    pub fn new(geometry: &Geometry) -> Self {
        Self { regions: geometry.regions(), blocks: geometry.blocks() }
    }

    /// Where `area` lies.
    ///
    /// # Panics
    /// If the area's replica slot is not below [`REPLICAS_MAX`].
    #[must_use]
    pub fn area(&self, area: Area) -> AreaLayout {
        let intent = AreaLayout::new(SUPERBLOCKS_END, self.regions);
        match area.number() {
            0 => intent,
            number => {
                let first = AreaLayout::new(intent.end(), self.blocks);
                AreaLayout { offset: first.offset + u64::from(number - 1) * first.byte_len(), ..first }
            }
        }
    }

    /// Length of the whole file in bytes, all areas included.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        let intent = AreaLayout::new(SUPERBLOCKS_END, self.regions);
        let dirty = AreaLayout::new(intent.end(), self.blocks);
        dirty.offset + u64::try_from(REPLICAS_MAX).expect("a small constant") * dirty.byte_len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::VOLUME_SIZE_MAX;

    proptest! {
        /// The model counts: every slot of every group of every area takes the next 4 KiB, in that order, and
        /// the groups of an area share its bits out.
        #[test]
        fn every_place_is_the_next_one(blocks in 1u64..400_000, region in 16u32..=26) {
            let geometry = Geometry::new(blocks * 4096, 4096, 1 << region).unwrap();
            let layout = Layout::new(&geometry);
            let mut next = 2 * 4096;
            for area in areas() {
                let place = layout.area(area);
                prop_assert_eq!(place.offset(), next);
                let mut left = if area == Area::Intent { (blocks * 4096).div_ceil(1 << region) } else { blocks };
                prop_assert_eq!(place.bits(), left);
                let mut group = 0;
                while left > 0 {
                    let here = left.min(8 * 480 * 8);
                    prop_assert_eq!(u64::from(place.bits_of(group)), here);
                    for slot in [0, 1] {
                        prop_assert_eq!(place.group_offset(group, slot), next);
                        next += 4096;
                    }
                    (left, group) = (left - here, group + 1);
                }
                prop_assert_eq!(place.groups(), group);
                prop_assert_eq!(place.end(), next);
            }
            prop_assert_eq!(layout.file_len(), next);
        }
    }

    fn areas() -> impl Iterator<Item = Area> {
        let slots = u8::try_from(REPLICAS_MAX).unwrap();
        std::iter::once(Area::Intent).chain((0..slots).map(|s| Area::Dirty(ReplicaSlot(s))))
    }

    #[test]
    fn areas_follow_each_other_without_gap_or_overlap() {
        for size in [4096, 1 << 20, (1 << 30) + 4096, 1 << 40, VOLUME_SIZE_MAX] {
            let geometry = Geometry::new(size, 4096, 65536).unwrap();
            let layout = Layout::new(&geometry);
            let mut at = SUPERBLOCKS_END;
            for area in areas() {
                let place = layout.area(area);
                assert_eq!(place.offset(), at, "{area}");
                assert_eq!(place.offset() % 4096, 0);
                at = place.end();
                let bits: u64 = (0..place.groups().min(70_000)).map(|g| u64::from(place.bits_of(g))).sum();
                assert!(bits == place.bits() || place.groups() > 70_000);
            }
            assert_eq!(layout.file_len(), at);
        }
    }

    #[test]
    fn slots_of_a_group_are_adjacent() {
        let layout = Layout::new(&Geometry::new(1 << 30, 4096, 1 << 20).unwrap());
        let place = layout.area(Area::Dirty(ReplicaSlot(2)));
        assert_eq!(place.groups(), 9);
        assert_eq!(place.group_offset(0, 0), place.offset());
        assert_eq!(place.group_offset(0, 1), place.offset() + 4096);
        assert_eq!(place.group_offset(8, 1) + 4096, place.end());
        assert_eq!(place.bits_of(8), 262_144 - 8 * 30_720);
    }

    #[test]
    #[should_panic(expected = "replica slot 8 out of range")]
    fn a_replica_slot_out_of_range_has_no_area() {
        let _ = Area::Dirty(ReplicaSlot(8)).number();
    }
}
