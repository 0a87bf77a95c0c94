//! What a replica reads from its metadata file: the two copies of the superblock, and a bitmap's pages.
//!
//! Page layout and the table of which page counts are written down here a second time, after
//! docs/metadata-format.md, as an oracle for the real decoder.

use std::convert::Infallible;

use blkrepl_engine::meta::{
    Area, GROUP_BITS, Layout, META_GROUP_LEN, META_PAGE_LEN, PAGES_PER_GROUP, PagedBitmap, SUPERBLOCK_LEN,
    SUPERBLOCK_VERSION, Superblock, read_pair,
};
use blkrepl_engine::types::{Geometry, ReplicaSlot, SuperblockTrust, VolumeId};
use blkrepl_engine::wire::Run;

use crate::Verdict;
use crate::input::{Input, put};

/// The bytes of a copy in which fields stand; the others are zero.
pub(crate) const FIELDS_LEN: usize = 512;
pub(crate) const VOLUME: VolumeId = VolumeId(0x70);

/// The highest sequence number of a superblock that is used.
const SUPERBLOCK_SEQ_MAX: u64 = 1 << 61;
const PAGE_HEADER_LEN: usize = META_PAGE_LEN - PAGE_BITS / 8;
const PAGE_BITS: usize = GROUP_BITS as usize / PAGES_PER_GROUP;
const PAGE_CRC_AT: usize = 28;
/// The highest sequence number of a page that counts.
const PAGE_SEQ_MAX: u64 = 1 << 61;

/// Both copies of a superblock. Control byte: bits 0 and 1 make the checksum of copy A and B good, bits 2
/// and 3 also what stands before the fields, bit 4 cuts copy A short; then 512 bytes of each, then the rest
/// of copy A. Holds: what can be read can be written again, and the new content counts as soon as the
/// first of its two writes is done [R16].
pub fn superblock_pair(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let control = input.u8();
    let mut copies = [[0; SUPERBLOCK_LEN]; 2];
    for copy in &mut copies {
        put(copy, 0, input.take(FIELDS_LEN));
    }
    put(&mut copies[0], FIELDS_LEN, input.rest());
    for (n, copy) in copies.iter_mut().enumerate() {
        if control & (4 << n) != 0 {
            put(copy, 0, b"BLKREPSB");
            put(copy, 8, &SUPERBLOCK_VERSION.to_le_bytes());
            put(copy, 16, &(SUPERBLOCK_LEN as u64).to_le_bytes());
            put(copy, 24, &((n * SUPERBLOCK_LEN) as u64).to_le_bytes());
        }
        if control & (1 << n) != 0 {
            let crc = crc32fast::hash(&[&copy[..12], &copy[16..]].concat());
            put(copy, 12, &crc.to_le_bytes());
        }
    }
    let len = if control & 16 != 0 { usize::from(copies[1][0]) * 16 } else { SUPERBLOCK_LEN };
    match read_pair(&copies[0][..len], &copies[1]) {
        Ok((superblock, trust, note)) => {
            assert_ne!(trust, SuperblockTrust::None);
            assert_eq!(trust == SuperblockTrust::Doubtful, note.is_some());
            write_again(superblock, copies);
            Verdict::Accepted
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            Verdict::Refused
        }
    }
}

fn write_again(mut superblock: Superblock, mut copies: [[u8; SUPERBLOCK_LEN]; 2]) {
    let writes = superblock.advance();
    if superblock.seq > SUPERBLOCK_SEQ_MAX {
        // Nobody's number: it can be written, but is not used again.
        return;
    }
    for (at, (offset, bytes)) in writes.iter().enumerate() {
        let copy = usize::try_from(*offset).expect("a small offset") / SUPERBLOCK_LEN;
        copies[copy].copy_from_slice(bytes);
        let (read, trust, _) = read_pair(&copies[0], &copies[1]).expect("a superblock that was just written");
        // A doubtful pair may raise the number once more.
        assert_eq!(Superblock { seq: superblock.seq, ..read.clone() }, superblock, "after write {at}");
        assert!(at == 0 || (trust == SuperblockTrust::Sound && read == superblock), "after both writes");
    }
}

/// A bitmap on disk, as bytes and as what it is.
pub(crate) struct Disk {
    pub(crate) area: Area,
    pub(crate) bits: u64,
    pub(crate) layout: Layout,
    /// The whole area.
    pub(crate) bytes: Vec<u8>,
}

impl Disk {
    /// An area that was never written. Bit 0 of `control`: intent map or dirty bitmap; then its length.
    pub(crate) fn new(control: u8) -> Self {
        const BITS: [u64; 5] = [1, 64, 3841, 30_720, 30_725];
        let bits = BITS[usize::from(control >> 1) % BITS.len()];
        let (area, unit) =
            if control & 1 == 0 { (Area::Intent, 65_536) } else { (Area::Dirty(ReplicaSlot(3)), 4096) };
        let geometry = Geometry::new(bits * unit, 4096, 65_536).expect("a good geometry");
        let layout = Layout::new(&geometry);
        let bytes = vec![0; layout.area(area).groups() as usize * 2 * META_GROUP_LEN];
        Self { area, bits, layout, bytes }
    }

    /// The bitmap, and how many of its pages were damaged.
    pub(crate) fn decode(&self) -> (PagedBitmap, u32) {
        let start = self.layout.area(self.area).offset();
        let mut read = |offset: u64, into: &mut [u8]| {
            let at = usize::try_from(offset - start).expect("a small offset");
            into.copy_from_slice(&self.bytes[at..at + into.len()]);
            Ok::<_, Infallible>(())
        };
        match PagedBitmap::decode(self.area, self.bits, VOLUME, &self.layout, &mut read) {
            Ok(decoded) => decoded,
            Err(never) => match never {},
        }
    }

    /// Carries out a write of one group, or of those of its pages that `pages` names.
    pub(crate) fn write(&mut self, (offset, bytes): (u64, Vec<u8>), pages: u8) {
        let at = usize::try_from(offset - self.layout.area(self.area).offset()).expect("a small offset");
        for (page, content) in bytes.chunks(META_PAGE_LEN).enumerate() {
            if pages & (1 << page) != 0 {
                put(&mut self.bytes, at + page * META_PAGE_LEN, content);
            }
        }
    }

    fn page(&mut self, place: usize) -> &mut [u8] {
        &mut self.bytes[place * META_PAGE_LEN..(place + 1) * META_PAGE_LEN]
    }

    fn places(&self) -> usize {
        self.bytes.len() / META_PAGE_LEN
    }

    /// Everything of a page's header but the checksum.
    fn header(&self, place: usize, seq: u64) -> [u8; PAGE_HEADER_LEN] {
        let (slot_pages, page) = (place / PAGES_PER_GROUP, place % PAGES_PER_GROUP);
        let number = slot_pages / 2 * PAGES_PER_GROUP + page;
        let mut header = [0; PAGE_HEADER_LEN];
        put(&mut header, 0, b"BRpg");
        put(&mut header, 4, &1_u16.to_le_bytes());
        header[6] = self.area.number();
        header[7] = u8::from(slot_pages % 2 == 1);
        put(&mut header, 8, &u32::try_from(number).expect("few pages").to_le_bytes());
        put(&mut header, 16, &seq.to_le_bytes());
        header
    }

    fn crc(&self, place: usize, page: &[u8]) -> u32 {
        let offset = self.layout.area(self.area).offset() + (place * META_PAGE_LEN) as u64;
        let [id, at] = [&VOLUME.0.to_le_bytes()[..], &offset.to_le_bytes()[..]];
        crc32fast::hash(&[id, at, &page[..PAGE_CRC_AT], &page[PAGE_HEADER_LEN..]].concat())
    }

    fn seal(&mut self, place: usize, seq: u64, bits: &[u8]) {
        let header = self.header(place, seq);
        let page = self.page(place);
        page.fill(0);
        put(page, 0, &header);
        put(page, PAGE_HEADER_LEN, bits);
        let crc = self.crc(place, &self.bytes[place * META_PAGE_LEN..(place + 1) * META_PAGE_LEN]);
        put(self.page(place), PAGE_CRC_AT, &crc.to_le_bytes());
    }

    /// Sequence number and bits of a page, if it is valid.
    fn valid(&self, place: usize) -> Option<(u64, &[u8])> {
        let page = &self.bytes[place * META_PAGE_LEN..(place + 1) * META_PAGE_LEN];
        let seq = u64::from_le_bytes(page[16..24].try_into().ok()?);
        let good = page[PAGE_CRC_AT..PAGE_HEADER_LEN] == self.crc(place, page).to_le_bytes()
            && page[..PAGE_CRC_AT] == self.header(place, seq)[..PAGE_CRC_AT]
            && seq <= PAGE_SEQ_MAX;
        good.then_some((seq, &page[PAGE_HEADER_LEN..]))
    }

    /// What the format says that this holds: the set bits, damaged pages, the highest number of a page.
    fn expected(&self) -> (Vec<Run>, u32, u64) {
        let (mut runs, mut damaged, mut seq_max) = (Runs::default(), 0, 0);
        for group in 0..self.places() / (2 * PAGES_PER_GROUP) {
            let first = group * 2 * PAGES_PER_GROUP;
            let bytes = &self.bytes[first * META_PAGE_LEN..][..2 * META_GROUP_LEN];
            let unwritten = self.area != Area::Intent && bytes.iter().all(|byte| *byte == 0);
            for page in 0..PAGES_PER_GROUP {
                let pair = [first, first + PAGES_PER_GROUP].map(|start| self.valid(start + page));
                seq_max = pair.iter().flatten().fold(seq_max, |most, (seq, _)| most.max(*seq));
                let counts = match (pair[0], pair[1]) {
                    (Some(a), Some(b)) if a.0 != b.0 => Some(if a.0 > b.0 { a } else { b }),
                    _ => None,
                };
                damaged += u32::from(counts.is_none() && !unwritten);
                let start = (group * PAGES_PER_GROUP + page) * PAGE_BITS;
                for bit in (0..PAGE_BITS).take_while(|bit| ((start + bit) as u64) < self.bits) {
                    if counts.is_none_or(|(_, bits)| bits[bit / 8] >> (bit % 8) & 1 == 1) {
                        runs.push((start + bit) as u64);
                    }
                }
            }
        }
        (runs.0, damaged, seq_max)
    }
}

#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, bit: u64) {
        match self.0.last_mut() {
            Some(run) if run.start + run.count == bit => run.count += 1,
            _ => self.0.push(Run { start: bit, count: 1 }),
        }
    }
}

/// How a record of [`metadata_pages`] says what a page holds.
pub(crate) mod record {
    /// The page's bytes, filled up with zeroes.
    pub(crate) const RAW: u8 = 0;
    /// Sequence number (8 bytes) and bits of a page that is valid where it stands.
    pub(crate) const SEALED: u8 = 1;
    /// Position in the page (2 bytes) and bytes to change there by exclusive or.
    pub(crate) const DAMAGE: u8 = 2;
    /// The place of another page (1 byte) that is copied here.
    pub(crate) const MISPLACED: u8 = 3;
}

/// The pages of one bitmap. Control byte as in `Disk::new`, a byte that says which pages of a later write
/// land; then records: place, kind, length (2 bytes), content. Holds: exactly the bits that the format
/// says read set; a write that lands in part loses none; once the unsaved groups are written the same bits
/// read without damage.
pub fn metadata_pages(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let mut disk = Disk::new(input.u8());
    let torn = input.u8();
    while !input.is_empty() {
        let (place, kind) = (usize::from(input.u8()) % disk.places(), input.u8());
        let len = usize::from(input.u16());
        apply_record(&mut disk, place, kind % 4, input.take(len));
    }
    let (expected, damaged, seq_max) = disk.expected();
    let (mut bitmap, found) = disk.decode();
    let runs: Vec<Run> = bitmap.runs(0).collect();
    assert!(runs == expected, "other bits read set than the format says");
    assert_eq!(found, damaged, "damaged pages");
    assert_eq!(bitmap.count(), expected.iter().map(|run| run.count).sum::<u64>());
    assert_eq!(bitmap.unsaved_groups().count() > 0, damaged > 0);
    let written = disk.bytes.iter().any(|byte| *byte != 0);

    let mut partly = Disk { bytes: disk.bytes.clone(), ..disk };
    partly.write(bitmap.clone().encode_group(0), torn);
    assert_holds(&partly.decode().0, &expected);

    while let Some(group) = bitmap.first_unsaved(0) {
        disk.write(bitmap.encode_group(group), 0xff);
        if bitmap.is_group_unsaved(group) {
            disk.write(bitmap.encode_group(group), 0xff);
        }
        assert!(!bitmap.is_group_unsaved(group), "a group with both slots written is saved");
    }
    let (again, damaged_again) = disk.decode();
    assert_holds(&again, &expected);
    // Numbers near the largest are nobody's; what is written above it counts as damage, which is safe.
    if seq_max < PAGE_SEQ_MAX / 2 {
        assert!(again.runs(0).eq(expected), "other bits after the unsaved groups were written");
        assert_eq!(damaged_again, 0);
    }
    Verdict::of(written && damaged == 0)
}

fn apply_record(disk: &mut Disk, place: usize, kind: u8, content: &[u8]) {
    match kind {
        record::RAW => {
            disk.page(place).fill(0);
            put(disk.page(place), 0, content);
        }
        record::SEALED => {
            let mut content = Input::new(content);
            let mut seq = [0; 8];
            put(&mut seq, 0, content.take(8));
            disk.seal(place, u64::from_le_bytes(seq), content.rest());
        }
        record::DAMAGE => {
            let mut content = Input::new(content);
            let at = usize::from(content.u16()) % META_PAGE_LEN;
            for (byte, change) in disk.page(place)[at..].iter_mut().zip(content.rest()) {
                *byte ^= change;
            }
        }
        _ => {
            let from = content.first().map_or(0, |from| usize::from(*from)) % disk.places();
            let copied = disk.page(from).to_vec();
            put(disk.page(place), 0, &copied);
        }
    }
}

fn assert_holds(bitmap: &PagedBitmap, runs: &[Run]) {
    for run in runs {
        let clear = bitmap.next_clear(run.start).filter(|bit| *bit < run.start + run.count);
        assert_eq!(clear, None, "a set bit was lost");
    }
}
