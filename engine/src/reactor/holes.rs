//! Where a file has holes, by asking the file system (`SEEK_HOLE` and `SEEK_DATA` of lseek(2)).
//!
//! A file system that knows no holes, and a block device, say that all is data; so does this where one fails
//! to answer. The file's position, which these calls move, is used by nobody: all other access names its place.
//!
//! Invariant: a block is called a hole only if all of it is one.

use std::os::fd::OwnedFd;

use rustix::fs::SeekFrom;

/// Most holes that are looked at in search of one that is a block long.
const SMALL_HOLES_MAX: usize = 64;

/// A look at the part of a file that is left.
pub(super) struct Holes<'a> {
    pub(super) file: &'a OwnedFd,
    /// Where it begins; a whole number of blocks.
    pub(super) at: u64,
    /// Where it ends; a whole number of blocks.
    pub(super) end: u64,
}

impl Holes<'_> {
    /// The end of the stretch that begins here, a whole number of blocks, and whether it is a hole; `None` at
    /// the end.
    pub(super) fn next_stretch(&self, block: u64) -> Option<(u64, bool)> {
        if self.at >= self.end {
            return None;
        }
        let data = self.seek(SeekFrom::Data(self.at));
        // A block with some data in it is data.
        let data = data.map_or(self.at, |at| at / block * block);
        if data > self.at {
            return Some((data.min(self.end), true));
        }
        let mut hole = self.at;
        // A hole that ends within the block in which it begins is none.
        for _ in 0..SMALL_HOLES_MAX {
            let begin = self.seek(SeekFrom::Hole(hole)).unwrap_or(self.end).next_multiple_of(block);
            if begin >= self.end {
                return Some((self.end, false));
            }
            let over = self.seek(SeekFrom::Data(begin)).map_or(self.end, |at| at / block * block);
            if over > begin {
                return Some((begin, false));
            }
            hole = begin + block;
        }
        Some((hole.min(self.end), false))
    }

    /// `None`: the file system cannot say. No data up to the end of the file is data at its end.
    fn seek(&self, to: SeekFrom) -> Option<u64> {
        match rustix::fs::seek(self.file, to) {
            Ok(at) => Some(at),
            Err(rustix::io::Errno::NXIO) => Some(u64::MAX),
            Err(error) => {
                tracing::debug!(%error, "a file system does not say where a file has holes");
                None
            }
        }
    }
}
