//! A node's disk: data with a volatile cache, metadata as the real bytes, and everything that can go wrong
//! with them.
//!
//! What completed is visible; what was flushed, or written durably, survives a power cut, of the rest any
//! sectors do. A request in flight at a crash lands whole, in part (512 bytes are whole), or not at all. A
//! flush makes stable what had completed when it was issued, and nothing more.
//!
//! Never decides when something happens; the world does.

use std::collections::BTreeSet;

use blkrepl_engine::meta::{
    Area, DataIdentity, Image, Layout, META_PAGE_LEN, PagedBitmap, SUPERBLOCK_LEN, SUPERBLOCKS_END,
    Superblock, SuperblockCopy,
};
use blkrepl_engine::types::{BlockRange, Geometry, ReplicaSlot, VolumeId};

use crate::clock::Time;
use crate::content::{ROT, SECTORS, at};
use crate::rng::Rng;

/// What is wrong with a disk at present.
#[derive(Debug, Default)]
pub(crate) struct Defects {
    pub(crate) slow_until: Time,
    pub(crate) slow_factor: u64,
    /// Requests issued before this hang until then.
    pub(crate) hang_until: Time,
    pub(crate) full_until: Time,
    /// Clients may be told of errors that were made before this.
    pub(crate) errors_until: Time,
    pub(crate) write_errors: u32,
    pub(crate) flush_errors: u32,
    pub(crate) lost_writes: u32,
    pub(crate) misdirected: u32,
}

/// One sector of the data object.
#[derive(Clone, Copy, Debug, Default)]
struct Sector {
    /// What a read gives.
    seen: u64,
    /// What a power cut leaves for certain.
    stable: u64,
    version: u64,
    stable_version: u64,
}

/// What a flush found completed.
pub(crate) type Snapshot = Vec<(u64, u64, u64)>;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Disk {
    geometry: Geometry,
    volume: VolumeId,
    sectors: Vec<Sector>,
    version: u64,
    /// Empty if there are no files.
    meta: Vec<u8>,
    /// Sectors that cannot be read.
    pub(crate) bad: BTreeSet<u64>,
    pub(crate) identity: DataIdentity,
    pub(crate) defects: Defects,
    /// Regions that the intent map on the disk names.
    intent: u64,
}

impl Disk {
    /// A disk without files.
    pub(crate) fn blank(geometry: Geometry, volume: VolumeId, identity: DataIdentity) -> Self {
        Self {
            geometry,
            volume,
            sectors: vec![Sector::default(); at(geometry.blocks() * SECTORS)],
            version: 0,
            meta: Vec::new(),
            bad: BTreeSet::new(),
            identity,
            defects: Defects::default(),
            intent: u64::MAX,
        }
    }

    pub(crate) fn has_files(&self) -> bool {
        !self.meta.is_empty()
    }

    /// Makes the files of a new replica.
    pub(crate) fn make_files(&mut self, superblock: Superblock, others: &[ReplicaSlot]) {
        let len = Layout::new(&self.geometry).file_len();
        self.meta = vec![0; at(len)];
        self.sectors.fill(Sector::default());
        self.bad.clear();
        let mut image = Image::fresh(Superblock { identity: self.identity, ..superblock }, others, true);
        for (offset, bytes) in image.encode_all() {
            self.meta[at(offset)..][..bytes.len()].copy_from_slice(&bytes);
        }
        self.reread_intent();
    }

    /// The data object is another one from here on, the metadata stays.
    pub(crate) fn replace_data(&mut self) {
        self.identity.0[1] = self.identity.0[1].wrapping_add(1);
        self.version += 1;
        let version = self.version;
        self.sectors.fill(Sector { version, stable_version: version, ..Sector::default() });
        self.bad.clear();
    }

    // Data.

    fn span(blocks: BlockRange) -> std::ops::Range<u64> {
        blocks.start.0 * SECTORS..blocks.end() * SECTORS
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// What a sector reads as.
    pub(crate) fn seen(&self, sector: u64) -> u64 {
        self.sectors[at(sector)].seen
    }

    /// What a power cut would leave of it for certain.
    pub(crate) fn stable(&self, sector: u64) -> u64 {
        self.sectors[at(sector)].stable
    }

    pub(crate) fn is_readable(&self, blocks: BlockRange) -> bool {
        self.bad.range(Self::span(blocks)).next().is_none()
    }

    pub(crate) fn read(&self, blocks: BlockRange) -> Vec<u64> {
        let span = Self::span(blocks);
        self.sectors[at(span.start)..at(span.end)].iter().map(|s| s.seen).collect()
    }

    fn put(&mut self, sector: u64, tag: u64, durable: bool) {
        self.version += 1;
        let s = &mut self.sectors[at(sector)];
        s.seen = tag;
        s.version = self.version;
        if durable {
            s.stable = tag;
            s.stable_version = self.version;
        }
        self.bad.remove(&sector);
    }

    /// A write has completed. `tags`: `None` for zeroes.
    pub(crate) fn write(&mut self, blocks: BlockRange, tags: Option<&[u64]>, durable: bool) {
        for (n, sector) in Self::span(blocks).enumerate() {
            self.put(sector, tags.map_or(0, |t| t[n]), durable);
        }
    }

    /// Some sectors of a write land. What a write that fails leaves behind is taken to be as durable as the
    /// write was to be.
    pub(crate) fn write_some(
        &mut self,
        blocks: BlockRange,
        tags: Option<&[u64]>,
        durable: bool,
        rng: &mut Rng,
    ) {
        let keep = rng.below(1001);
        for (n, sector) in Self::span(blocks).enumerate() {
            if rng.chance(keep) {
                self.put(sector, tags.map_or(0, |t| t[n]), durable);
            }
        }
    }

    /// The disk says that it wrote, and did not.
    pub(crate) fn lose_write(&mut self, blocks: BlockRange, durable: bool) {
        for sector in Self::span(blocks) {
            let old = self.sectors[at(sector)].seen;
            self.put(sector, old | ROT, durable);
        }
    }

    /// The disk writes to `to` what was meant for `blocks`.
    pub(crate) fn misdirect(&mut self, blocks: BlockRange, to: u64, tags: Option<&[u64]>, durable: bool) {
        self.lose_write(blocks, durable);
        let target = BlockRange::between(to, to + blocks.count);
        for (n, sector) in Self::span(target).enumerate() {
            self.put(sector, tags.map_or(0, |t| t[n]) | ROT, durable);
        }
    }

    /// Data decays on the disk.
    pub(crate) fn rot(&mut self, sector: u64) {
        let s = &mut self.sectors[at(sector)];
        s.seen |= ROT;
        s.stable |= ROT;
    }

    /// What a flush that is issued now is to make stable.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let dirty = self.sectors.iter().enumerate().filter(|(_, s)| s.version != s.stable_version);
        dirty.map(|(n, s)| (n as u64, s.seen, s.version)).collect()
    }

    /// The flush has completed.
    pub(crate) fn flushed(&mut self, snapshot: &Snapshot) {
        for (sector, tag, version) in snapshot {
            let s = &mut self.sectors[at(*sector)];
            if s.stable_version < *version {
                s.stable = *tag;
                s.stable_version = *version;
            }
        }
    }

    /// The power goes: of what was not stable, some is gone.
    pub(crate) fn lose_cache(&mut self, rng: &mut Rng) {
        let keep = [0, 500, 1000, rng.below(1001)][at(rng.below(4))];
        for s in &mut self.sectors {
            if s.version != s.stable_version {
                if rng.chance(keep) {
                    s.stable = s.seen;
                } else {
                    s.seen = s.stable;
                }
                s.version = s.stable_version;
            }
        }
    }

    // Metadata.

    /// A metadata write has completed: it is durable.
    pub(crate) fn write_meta(&mut self, offset: u64, bytes: &[u8]) {
        self.meta[at(offset)..][..bytes.len()].copy_from_slice(bytes);
        if self.is_intent(offset) {
            self.reread_intent();
        }
    }

    /// Some pages of a metadata write land.
    pub(crate) fn write_some_meta(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        let keep = rng.below(1001);
        for (n, page) in bytes.chunks(META_PAGE_LEN).enumerate() {
            if rng.chance(keep) {
                self.meta[at(offset) + n * META_PAGE_LEN..][..page.len()].copy_from_slice(page);
            }
        }
        self.reread_intent();
    }

    fn is_intent(&self, offset: u64) -> bool {
        let area = Layout::new(&self.geometry).area(Area::Intent);
        (area.offset()..area.end()).contains(&offset)
    }

    /// Metadata decays on the disk: one bit of the page at `offset`.
    pub(crate) fn rot_meta(&mut self, offset: u64, rng: &mut Rng) {
        let at = at(offset + rng.below(META_PAGE_LEN as u64));
        if let Some(byte) = self.meta.get_mut(at) {
            *byte ^= 1 << rng.below(8);
        }
        self.reread_intent();
    }

    /// Length of the metadata file.
    pub(crate) fn meta_len(&self) -> u64 {
        self.meta.len() as u64
    }

    fn read_meta(meta: &[u8], offset: u64, out: &mut [u8]) {
        let from = at(offset).min(meta.len());
        let there = (meta.len() - from).min(out.len());
        out[..there].copy_from_slice(&meta[from..from + there]);
        out[there..].fill(0);
    }

    fn reread_intent(&mut self) {
        let bits = self.bitmap(Area::Intent, self.geometry.regions());
        assert!(bits.len() <= 64, "a volume of the simulator has at most 64 regions");
        self.intent = (0..bits.len()).filter(|r| bits.get(*r)).fold(0, |set, r| set | 1 << r);
    }

    fn bitmap(&self, area: Area, bits: u64) -> PagedBitmap {
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), std::convert::Infallible> {
            Self::read_meta(&self.meta, offset, out);
            Ok(())
        };
        let Ok((bitmap, _)) =
            PagedBitmap::decode(area, bits, self.volume, &Layout::new(&self.geometry), &mut read);
        bitmap
    }

    /// Regions that the intent map on the disk names, as bits.
    pub(crate) fn intent(&self) -> u64 {
        if self.has_files() { self.intent } else { u64::MAX }
    }

    /// True if the intent map on the disk covers all of the blocks.
    pub(crate) fn intends(&self, blocks: BlockRange) -> bool {
        self.geometry.regions_of(blocks).all(|r| self.intent() >> r.0 & 1 == 1)
    }

    /// The dirty bitmap for a replica, as the disk has it.
    pub(crate) fn dirty(&self, slot: ReplicaSlot) -> PagedBitmap {
        self.bitmap(Area::Dirty(slot), self.geometry.blocks())
    }

    /// The metadata as the next run of the process finds it.
    pub(crate) fn image(&self, others: &[ReplicaSlot]) -> Result<Image, String> {
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), std::convert::Infallible> {
            Self::read_meta(&self.meta, offset, out);
            Ok(())
        };
        Image::read(&mut read, others).map_err(|e| e.to_string())
    }

    /// Both copies of the superblock, as far as they can be read.
    pub(crate) fn superblocks(&self) -> [Option<Superblock>; 2] {
        [SuperblockCopy::A, SuperblockCopy::B].map(|copy| {
            let bytes = self.meta.get(at(copy.offset())..at(copy.offset()) + SUPERBLOCK_LEN)?;
            Superblock::decode(bytes, copy).ok()
        })
    }

    /// True if a metadata write goes to the superblock.
    pub(crate) fn is_superblock(offset: u64) -> bool {
        offset < SUPERBLOCKS_END
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        Disk::blank(Geometry::new(32 * 4096, 4096, 65536).unwrap(), VolumeId(9), DataIdentity([1; 32]))
    }

    fn block(n: u64) -> BlockRange {
        BlockRange::between(n, n + 1)
    }

    #[test]
    fn a_flush_covers_what_had_completed_when_it_was_issued() {
        let mut disk = disk();
        disk.write(block(0), Some(&[1; 8]), false);
        let snapshot = disk.snapshot();
        disk.write(block(0), Some(&[2; 8]), false);
        disk.flushed(&snapshot);
        assert_eq!((disk.seen(0), disk.stable(0)), (2, 1));
        disk.write(block(1), Some(&[3; 8]), true);
        assert_eq!(disk.stable(8), 3);
    }

    #[test]
    fn an_older_flush_does_not_undo_a_durable_write() {
        let mut disk = disk();
        disk.write(block(0), Some(&[1; 8]), false);
        let snapshot = disk.snapshot();
        disk.write(block(0), Some(&[2; 8]), true);
        disk.flushed(&snapshot);
        assert_eq!(disk.stable(0), 2);
    }

    #[test]
    fn a_power_cut_leaves_each_sector_as_it_was_or_as_it_is() {
        let mut rng = Rng::new(5);
        for _ in 0..50 {
            let mut disk = disk();
            disk.write(block(0), Some(&[7; 8]), false);
            disk.lose_cache(&mut rng);
            for sector in 0..8 {
                assert!([0, 7].contains(&disk.seen(sector)));
                assert_eq!(disk.seen(sector), disk.stable(sector));
            }
        }
    }

    #[test]
    fn falsified_content_is_marked_until_it_is_overwritten() {
        let mut disk = disk();
        disk.write(block(0), Some(&[7; 8]), true);
        disk.lose_write(block(0), false);
        assert_eq!(disk.seen(0), 7 | ROT);
        disk.write(block(0), Some(&[8; 8]), false);
        assert_eq!(disk.seen(0), 8);
    }
}
