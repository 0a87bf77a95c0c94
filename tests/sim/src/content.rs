//! What blocks hold in the simulator: eight tags a block, one a sector. A tag names the write and the sector
//! that it was written to, so that a lost, torn, stale or misplaced sector shows by itself.
//!
//! Tag 0 is zeroes. [`ROT`] marks content that a disk falsified in silence: nothing but a checksum at rest
//! could tell, so it is excused wherever it goes, and only there.

use std::rc::Rc;

use blkrepl_engine::wire::BlockHash;

/// Sectors in a block.
pub(crate) const SECTORS: u64 = 8;
/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// Bytes of a block.
pub(crate) const BLOCK: u64 = SECTOR * SECTORS;
/// The content was falsified by the disk without a sign.
pub(crate) const ROT: u64 = 1 << 63;
/// Bits of a tag that are the sector's number.
const SECTOR_BITS: u32 = 14;

/// Tags of whole blocks.
pub(crate) type Tags = Rc<Vec<u64>>;

/// An index; what is counted here is small.
pub(crate) fn at(n: u64) -> usize {
    usize::try_from(n).expect("addresses have 64 bits here")
}

/// The tag that operation `op` writes to a sector.
pub(crate) fn tag(op: usize, sector: u64) -> u64 {
    debug_assert!(sector < 1 << SECTOR_BITS);
    ((op as u64 + 1) << SECTOR_BITS) | sector
}

/// The operation and the sector that a tag names; `None` for zeroes and rot.
pub(crate) fn named(tag: u64) -> Option<(usize, u64)> {
    if tag == 0 || tag & ROT != 0 {
        return None;
    }
    Some((at((tag >> SECTOR_BITS) - 1), tag & ((1 << SECTOR_BITS) - 1)))
}

fn mix(seed: u64, tags: &[u64]) -> u64 {
    tags.iter().fold(seed, |h, tag| {
        let h = (h ^ tag).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^ (h >> 29)
    })
}

/// Stands for the CRC-32 of the content.
pub(crate) fn crc(tags: &[u64]) -> u32 {
    let h = mix(0x51ed_270b, tags);
    u32::try_from((h >> 32) ^ (h & 0xffff_ffff)).expect("32 bits of the hash")
}

/// Stands for the hash of each block.
pub(crate) fn hashes(tags: &[u64]) -> Vec<BlockHash> {
    let hash = |block: &[u64]| {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&mix(1, block).to_le_bytes());
        out[8..].copy_from_slice(&mix(2, block).to_le_bytes());
        out
    };
    tags.chunks(at(SECTORS)).map(hash).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_names_its_write_and_its_sector() {
        assert_eq!(named(tag(7, 513)), Some((7, 513)));
        assert_eq!(named(tag(0, 0)), Some((0, 0)));
        assert_eq!(named(0), None);
        assert_eq!(named(tag(7, 513) | ROT), None);
    }

    #[test]
    fn a_changed_sector_changes_checksum_and_hash() {
        let a = vec![1, 2, 3, 4, 5, 6, 7, 8];
        let mut b = a.clone();
        b[3] ^= 1;
        assert_ne!(crc(&a), crc(&b));
        assert_ne!(hashes(&a), hashes(&b));
    }
}
