//! Sizes and positions on a volume: bytes, blocks and regions, and the checks that keep one from
//! being taken for another.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Block size of new volumes, in bytes.
pub const BLOCK_SIZE_DEFAULT: u32 = 4096;
/// Region size of new volumes, in bytes: what one bit of the intent map covers.
pub const REGION_SIZE_DEFAULT: u32 = 1 << 20;
/// Largest volume, in bytes: 64 TiB.
pub const VOLUME_SIZE_MAX: u64 = 64 << 40;

/// Why a geometry is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// Size is zero, too large, or not a multiple of the block size.
    #[error(
        "volume size {size} is not a positive multiple of the block size {block_size} up to {VOLUME_SIZE_MAX}"
    )]
    Size {
        /// The size given, bytes.
        size: u64,
        /// The block size it must be a multiple of.
        block_size: u32,
    },
    /// Block size is not 4096.
    #[error("block size {0} is not supported (only 4096)")]
    BlockSize(u32),
    /// Region size is not a power of two from 64 KiB to 64 MiB.
    #[error("region size {0} is not a power of two between 65536 and 67108864")]
    RegionSize(u32),
}

/// Sizes of a volume. Only made by [`Geometry::new`], so that its rules hold everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    size: u64,
    block_size: u32,
    region_size: u32,
}

impl Geometry {
    /// Checks and makes a geometry. All in bytes.
    ///
    /// # Errors
    /// [`GeometryError`] names the first rule that is broken.
    pub fn new(size: u64, block_size: u32, region_size: u32) -> Result<Self, GeometryError> {
        if block_size != BLOCK_SIZE_DEFAULT {
            return Err(GeometryError::BlockSize(block_size));
        }
        if !region_size.is_power_of_two() || !(64 << 10..=64 << 20).contains(&region_size) {
            return Err(GeometryError::RegionSize(region_size));
        }
        if size == 0 || size > VOLUME_SIZE_MAX || !size.is_multiple_of(u64::from(block_size)) {
            return Err(GeometryError::Size { size, block_size });
        }
        Ok(Self { size, block_size, region_size })
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Size of a block in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Size of a region in bytes.
    #[must_use]
    pub fn region_size(&self) -> u32 {
        self.region_size
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size / u64::from(self.block_size)
    }

    /// Number of regions; the last one may be partial.
    #[must_use]
    pub fn regions(&self) -> u64 {
        self.size.div_ceil(u64::from(self.region_size))
    }

    /// Blocks in one whole region.
    #[must_use]
    pub fn blocks_per_region(&self) -> u64 {
        u64::from(self.region_size / self.block_size)
    }

    /// All blocks.
    #[must_use]
    pub fn all(&self) -> BlockRange {
        BlockRange { start: BlockIndex(0), count: self.blocks() }
    }

    /// True if the byte range is not empty and lies within the volume (no overflow).
    #[must_use]
    pub fn contains(&self, range: ByteRange) -> bool {
        range.len > 0 && range.offset.checked_add(range.len).is_some_and(|end| end <= self.size)
    }

    /// True if the block range is not empty and lies within the volume (no overflow).
    #[must_use]
    pub fn contains_blocks(&self, range: BlockRange) -> bool {
        range.count > 0 && range.start.0.checked_add(range.count).is_some_and(|end| end <= self.blocks())
    }

    /// The blocks that a byte range touches. The range must lie within the volume.
    #[must_use]
    pub fn blocks_of(&self, range: ByteRange) -> BlockRange {
        let bs = u64::from(self.block_size);
        let start = range.offset / bs;
        BlockRange { start: BlockIndex(start), count: (range.offset + range.len).div_ceil(bs) - start }
    }

    /// The bytes of a block range.
    #[must_use]
    pub fn bytes_of(&self, range: BlockRange) -> ByteRange {
        let bs = u64::from(self.block_size);
        ByteRange { offset: range.start.0 * bs, len: range.count * bs }
    }

    /// The blocks of a region, cut off at the volume's end.
    #[must_use]
    pub fn blocks_of_region(&self, region: RegionIndex) -> BlockRange {
        let start = region.0 * self.blocks_per_region();
        BlockRange { start: BlockIndex(start), count: self.blocks_per_region().min(self.blocks() - start) }
    }

    /// The regions that a block range touches, ascending.
    pub fn regions_of(&self, range: BlockRange) -> impl Iterator<Item = RegionIndex> + use<> {
        let per = self.blocks_per_region();
        let first = range.start.0 / per;
        let end = if range.count == 0 { first } else { (range.end() - 1) / per + 1 };
        (first..end).map(RegionIndex)
    }
}

/// Bytes `offset .. offset + len` of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Number of a block, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct BlockIndex(pub u64);

/// Number of a region, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct RegionIndex(pub u64);

/// Blocks `start .. start + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub start: BlockIndex,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// Blocks `start .. end`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "block range ends at {end} before its start {start}");
        Self { start: BlockIndex(start), count: end - start }
    }

    /// The block after the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.0 + self.count
    }

    /// True if both have a block in common.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end()
    }

    /// True if `block` lies in the range.
    #[must_use]
    pub fn contains(&self, block: BlockIndex) -> bool {
        self.start <= block && block.0 < self.end()
    }

    /// The blocks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = BlockIndex> + use<> {
        (self.start.0..self.end()).map(BlockIndex)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The model counts: a byte lies in block `byte / 4096`, a block in region `block / blocks per region`.
        #[test]
        fn blocks_and_regions_are_those_of_the_bytes(
            blocks in 1u64..200, offset in 0u64..900_000, len in 0u64..70_000,
        ) {
            let g = Geometry::new(blocks * 4096, 4096, 65_536).unwrap();
            let range = ByteRange { offset, len };
            prop_assert_eq!(g.contains(range), len > 0 && offset + len <= blocks * 4096);
            if !g.contains(range) {
                return Ok(());
            }
            let touched: BTreeSet<u64> = (offset..offset + len).map(|byte| byte / 4096).collect();
            let found = g.blocks_of(range);
            prop_assert!(g.contains_blocks(found) && g.all().count == blocks);
            prop_assert_eq!(&found.iter().map(|b| b.0).collect::<BTreeSet<_>>(), &touched);
            prop_assert_eq!(g.blocks_of(g.bytes_of(found)), found);
            let regions: BTreeSet<u64> = touched.iter().map(|block| block / 16).collect();
            prop_assert_eq!(&g.regions_of(found).map(|r| r.0).collect::<BTreeSet<_>>(), &regions);
            prop_assert_eq!(g.regions(), (0..blocks).map(|block| block / 16).max().unwrap() + 1);
            for region in regions {
                let of_region: Vec<u64> = (0..blocks).filter(|block| block / 16 == region).collect();
                let found: Vec<u64> = g.blocks_of_region(RegionIndex(region)).iter().map(|b| b.0).collect();
                prop_assert_eq!(found, of_region);
            }
        }

        /// The model of a range is the set of its blocks.
        #[test]
        fn ranges_overlap_if_they_share_a_block(a in (0u64..20, 1u64..8), b in (0u64..20, 1u64..8), at in 0u64..30) {
            let (a, b) = (BlockRange::between(a.0, a.0 + a.1), BlockRange::between(b.0, b.0 + b.1));
            let blocks = |range: &BlockRange| range.iter().map(|b| b.0).collect::<BTreeSet<_>>();
            prop_assert_eq!(a.overlaps(&b), !blocks(&a).is_disjoint(&blocks(&b)));
            prop_assert_eq!(a.contains(BlockIndex(at)), blocks(&a).contains(&at));
        }
    }

    #[test]
    fn ranges_that_leave_the_volume_or_overflow_are_outside() {
        let g = Geometry::new(1 << 20, 4096, 65536).unwrap();
        assert!(g.contains(ByteRange { offset: 0, len: 1 << 20 }));
        assert!(!g.contains(ByteRange { offset: 1, len: 1 << 20 }));
        assert!(!g.contains(ByteRange { offset: u64::MAX, len: 2 }));
        assert!(!g.contains(ByteRange { offset: 0, len: 0 }));
        assert!(!g.contains_blocks(BlockRange { start: BlockIndex(u64::MAX), count: 1 }));
    }

    #[test]
    fn partial_blocks_and_the_partial_last_region_are_covered() {
        let g = Geometry::new(65536 + 8192, 4096, 65536).unwrap();
        assert_eq!(g.regions(), 2);
        assert_eq!(g.blocks_of(ByteRange { offset: 4095, len: 2 }), BlockRange::between(0, 2));
        assert_eq!(g.blocks_of_region(RegionIndex(1)), BlockRange::between(16, 18));
        let touched: Vec<_> = g.regions_of(BlockRange::between(15, 17)).collect();
        assert_eq!(touched, [RegionIndex(0), RegionIndex(1)]);
    }

    #[test]
    fn geometry_refuses_sizes_that_break_its_rules() {
        assert!(Geometry::new(0, 4096, 65536).is_err());
        assert!(Geometry::new(4097, 4096, 65536).is_err());
        assert!(Geometry::new(1 << 20, 512, 65536).is_err());
        assert!(Geometry::new(1 << 20, 4096, 65537).is_err());
        assert!(Geometry::new(VOLUME_SIZE_MAX + 4096, 4096, 1 << 20).is_err());
    }
}
