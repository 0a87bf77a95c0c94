//! The medium of a disk and the volatile cache in front of it: sectors that were written and not flushed.
//! Decides nothing about time and chance.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::SECTOR;

/// Sectors in the cache at most; the oldest addresses go to the medium when there are more, as in a disk
/// that runs out of cache.
const SECTORS_MAX: usize = 64 << 10;

pub(super) struct Cache {
    medium: File,
    volatile: BTreeMap<u64, [u8; SECTOR]>,
}

impl Cache {
    pub(super) fn new(medium: File) -> Self {
        Self { medium, volatile: BTreeMap::new() }
    }

    /// Reads whole sectors.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.medium.read_exact_at(out, offset)?;
        let first = offset / SECTOR as u64;
        let count = (out.len() / SECTOR) as u64;
        for (sector, bytes) in self.volatile.range(first..first + count) {
            // In range, so it fits.
            let at = usize::try_from(sector - first).unwrap_or(0) * SECTOR;
            out[at..at + SECTOR].copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Writes whole sectors, to the medium if `through`.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], through: bool) -> io::Result<()> {
        let first = offset / SECTOR as u64;
        for (sector, piece) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            if through {
                self.volatile.remove(&sector);
                continue;
            }
            let mut copy = [0; SECTOR];
            copy.copy_from_slice(piece);
            self.volatile.insert(sector, copy);
        }
        if through {
            self.medium.write_all_at(bytes, offset)?;
        }
        while self.volatile.len() > SECTORS_MAX {
            let Some((sector, bytes)) = self.volatile.pop_first() else { break };
            self.medium.write_all_at(&bytes, sector * SECTOR as u64)?;
        }
        Ok(())
    }

    /// Everything goes to the medium, neighbours in one piece.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let (mut start, mut piece) = (0, Vec::new());
        for (sector, bytes) in std::mem::take(&mut self.volatile) {
            if start + (piece.len() / SECTOR) as u64 != sector {
                self.medium.write_all_at(&piece, start * SECTOR as u64)?;
                piece.clear();
                start = sector;
            }
            piece.extend_from_slice(&bytes);
        }
        self.medium.write_all_at(&piece, start * SECTOR as u64)
    }

    /// Empties the cache: each sector goes to the medium or is lost, as `keep` says; numbers of both.
    pub(super) fn lose(&mut self, mut keep: impl FnMut() -> bool) -> (u64, u64) {
        let (mut kept, mut lost) = (0, 0);
        for (sector, bytes) in std::mem::take(&mut self.volatile) {
            if keep() && self.medium.write_all_at(&bytes, sector * SECTOR as u64).is_ok() {
                kept += 1;
            } else {
                lost += 1;
            }
        }
        (kept, lost)
    }
}
