//! One 512-byte page of a bitmap: header, checksum, bits. Knows nothing of slots that alternate or of
//! which of two pages is the newer one.
//!
//! The checksum covers the page's own address and the volume's id, though neither the offset nor the id
//! is stored: a page that a disk put into the wrong place, or that was left there by another volume,
//! fails its checksum like any other damage.
//!
//! Layout (little-endian): 0 magic, 4 version, 6 area number, 7 slot, 8 page number in the area,
//! 12 zero, 16 sequence number, 24 zero, 28 CRC-32, 32 bits.

use super::layout::{META_PAGE_LEN, PAGE_HEADER_LEN, PAGE_WORDS};
use crate::types::VolumeId;

const MAGIC: [u8; 4] = *b"BRpg";
const VERSION: u16 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = AT_MAGIC + 4;
const AT_AREA: usize = AT_VERSION + 2;
const AT_SLOT: usize = AT_AREA + 1;
const AT_PAGE: usize = AT_SLOT + 1;
const AT_ZERO_A: usize = AT_PAGE + 4;
const AT_SEQ: usize = AT_ZERO_A + 4;
const AT_ZERO_B: usize = AT_SEQ + 8;
const AT_CRC: usize = AT_ZERO_B + 4;
const AT_BITS: usize = AT_CRC + 4;

const _: () = assert!(AT_BITS == PAGE_HEADER_LEN);
const _: () = assert!(AT_BITS + PAGE_WORDS * 8 == META_PAGE_LEN);

/// The bits of one page. Bit `i` is bit `i % 64` of word `i / 64`.
pub(super) type PageWords = [u64; PAGE_WORDS];

/// What a page must be to count as itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageAddress {
    /// The volume; enters the checksum only.
    pub(super) volume: VolumeId,
    /// Number of the area.
    pub(super) area: u8,
    /// 0 or 1.
    pub(super) slot: u8,
    /// Number of the page in its area.
    pub(super) page: u32,
    /// First byte in the metadata file; enters the checksum only.
    pub(super) offset: u64,
}

impl PageAddress {
    /// Header of the page at this address, without its checksum.
    fn header(&self, seq: u64) -> [u8; PAGE_HEADER_LEN] {
        let mut header = [0; PAGE_HEADER_LEN];
        header[AT_MAGIC..AT_VERSION].copy_from_slice(&MAGIC);
        header[AT_VERSION..AT_AREA].copy_from_slice(&VERSION.to_le_bytes());
        header[AT_AREA] = self.area;
        header[AT_SLOT] = self.slot;
        header[AT_PAGE..AT_ZERO_A].copy_from_slice(&self.page.to_le_bytes());
        header[AT_SEQ..AT_ZERO_B].copy_from_slice(&seq.to_le_bytes());
        header
    }

    /// Checksum of a whole page at this address; the place of the checksum itself is left out.
    fn crc(&self, page: &[u8; META_PAGE_LEN]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.volume.0.to_le_bytes());
        hasher.update(&self.offset.to_le_bytes());
        hasher.update(&page[..AT_CRC]);
        hasher.update(&page[AT_BITS..]);
        hasher.finalize()
    }

    /// The page as bytes.
    pub(super) fn encode(&self, seq: u64, words: &PageWords) -> [u8; META_PAGE_LEN] {
        let mut page = [0; META_PAGE_LEN];
        page[..PAGE_HEADER_LEN].copy_from_slice(&self.header(seq));
        for (bytes, word) in page[AT_BITS..].chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let crc = self.crc(&page);
        page[AT_CRC..AT_BITS].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Sequence number and bits of a page read from this address; `None` if it is not, byte for byte,
    /// a page that was written to this address of this volume.
    pub(super) fn decode(&self, bytes: &[u8]) -> Option<(u64, PageWords)> {
        let page: &[u8; META_PAGE_LEN] = bytes.try_into().ok()?;
        let stored = u32::from_le_bytes(page[AT_CRC..AT_BITS].try_into().ok()?);
        if stored != self.crc(page) {
            return None;
        }
        let seq = u64::from_le_bytes(page[AT_SEQ..AT_ZERO_B].try_into().ok()?);
        if page[..AT_CRC] != self.header(seq)[..AT_CRC] {
            return None;
        }
        let mut words = [0; PAGE_WORDS];
        for (word, bytes) in words.iter_mut().zip(page[AT_BITS..].chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        Some((seq, words))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_address() -> impl Strategy<Value = PageAddress> {
        (any::<u128>(), any::<u8>(), 0u8..2, any::<u32>(), any::<u64>()).prop_map(
            |(volume, area, slot, page, offset)| PageAddress {
                volume: VolumeId(volume),
                area,
                slot,
                page,
                offset,
            },
        )
    }

    proptest! {
        /// Any page at any address, read by a second decoder that knows the documented layout alone.
        #[test]
        fn any_page_comes_back_and_has_the_documented_layout(
            here in any_address(), seq in any::<u64>(), fill in any::<[u64; 4]>(),
        ) {
            let words: PageWords = std::array::from_fn(|i| fill[i % 4].rotate_left(u32::try_from(i).unwrap()));
            let page = here.encode(seq, &words);
            prop_assert_eq!(here.decode(&page), Some((seq, words)));
            let mut expected = b"BRpg\x01\x00".to_vec();
            expected.extend([here.area, here.slot]);
            expected.extend(here.page.to_le_bytes());
            expected.extend([0; 4]);
            expected.extend(seq.to_le_bytes());
            expected.extend([0; 4]);
            let bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let (volume, offset) = (here.volume.0.to_le_bytes(), here.offset.to_le_bytes());
            let covered = [&volume[..], &offset, &expected, &bits].concat();
            expected.extend(crc32fast::hash(&covered).to_le_bytes());
            expected.extend(bits);
            prop_assert_eq!(&page[..], expected);
        }

        /// What was written for one address is nothing at any other; a page with any of its bytes changed is
        /// none.
        #[test]
        fn a_page_is_only_itself(
            here in any_address(), there in any_address(), take in 0u8..31,
            edits in prop::collection::vec((0..META_PAGE_LEN, any::<u8>()), 0..4),
        ) {
            let page = here.encode(9, &words());
            let pick = |bit: u8| take >> bit & 1 == 1;
            let other = PageAddress {
                volume: if pick(0) { there.volume } else { here.volume },
                area: if pick(1) { there.area } else { here.area },
                slot: if pick(2) { there.slot } else { here.slot },
                page: if pick(3) { there.page } else { here.page },
                offset: if pick(4) { there.offset } else { here.offset },
            };
            let mut hurt = page;
            for (at, value) in edits {
                hurt[at] = value;
            }
            prop_assert_eq!(other.decode(&hurt).is_some(), other == here && hurt == page);
        }
    }

    const HERE: PageAddress =
        PageAddress { volume: VolumeId(0xfeed), area: 3, slot: 1, page: 77, offset: 0x12_3000 };

    fn words() -> PageWords {
        std::array::from_fn(|i| 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(i as u64 + 1))
    }

    #[test]
    fn a_page_comes_back_as_it_was_written() {
        assert_eq!(HERE.decode(&HERE.encode(42, &words())), Some((42, words())));
    }

    #[test]
    fn every_single_flipped_bit_is_damage() {
        let page = HERE.encode(42, &words());
        for bit in 0..META_PAGE_LEN * 8 {
            let mut hurt = page;
            hurt[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(HERE.decode(&hurt), None, "bit {bit}");
        }
    }

    #[test]
    fn a_page_of_another_place_or_volume_is_damage() {
        let page = HERE.encode(42, &words());
        for other in [
            PageAddress { volume: VolumeId(0xfeee), ..HERE },
            PageAddress { area: 4, ..HERE },
            PageAddress { slot: 0, ..HERE },
            PageAddress { page: 78, ..HERE },
            PageAddress { offset: 0x12_4000, ..HERE },
        ] {
            assert_eq!(other.decode(&page), None, "{other:?}");
        }
    }

    #[test]
    fn short_long_and_zero_bytes_are_damage() {
        let page = HERE.encode(1, &words());
        assert_eq!(HERE.decode(&page[..511]), None);
        assert_eq!(HERE.decode(&[page.as_slice(), &[0]].concat()), None);
        assert_eq!(HERE.decode(&[0; META_PAGE_LEN]), None);
    }

    /// The format of version 1 is fixed: these values only change together with the version.
    #[test]
    fn the_format_is_the_documented_one() {
        let page = HERE.encode(0x0102_0304_0506_0708, &std::array::from_fn(|i| u64::from(i == 0)));
        assert_eq!(&page[..8], b"BRpg\x01\x00\x03\x01");
        assert_eq!(&page[8..16], [77, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&page[16..28], [8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0]);
        let mut covered = 0xfeed_u128.to_le_bytes().to_vec();
        covered.extend(0x12_3000_u64.to_le_bytes());
        covered.extend(&page[..28]);
        covered.extend(&page[32..]);
        assert_eq!(page[28..32], crc32fast::hash(&covered).to_le_bytes());
        assert_eq!(page[32], 1);
        assert!(page[33..].iter().all(|b| *b == 0));
    }
}
