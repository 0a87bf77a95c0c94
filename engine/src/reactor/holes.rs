//! Where the data object has holes, by asking the file system (`SEEK_HOLE` and `SEEK_DATA` of lseek(2)).
//!
//! io_uring has no such operation, and the call may wait: for the disk, and on ext4 for writes in flight while
//! a hole is being punched. So a thread of its own asks, and wakes the volume's thread when it has the answer.
//! The thread is made with the first search and ends with the volume; while it hangs, so does the search, and
//! nothing else.
//!
//! Only file systems that are known to tell the truth of what was just written are asked; anywhere else, on a
//! block device, and where the file system fails to answer, all is data. The file's position, which these calls
//! move, is used by nobody: all other access names its place.
//!
//! Invariant: a block is called a hole only if all of it is one, and lies before the end of the file.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::fs::SeekFrom;

use crate::replica::{DiskDone, DiskOpId, DiskResult, Stretch};
use crate::types::BlockRange;

/// File systems whose word is taken: ext4 (and its forebears), XFS, btrfs, tmpfs.
const TRUSTED: [libc::__fsword_t; 4] =
    [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC, libc::BTRFS_SUPER_MAGIC, libc::TMPFS_MAGIC];

/// One search.
struct Job {
    id: DiskOpId,
    blocks: BlockRange,
    max: usize,
}

/// Has the volume's thread look for answers.
pub(super) type Waker = Arc<dyn Fn() + Send + Sync>;

/// Searches for holes in one file. See the module's head.
pub(super) struct Searcher {
    file: Rc<OwnedFd>,
    block: u64,
    waker: Waker,
    /// `None`: nothing was asked yet, or no thread could be made.
    jobs: Option<Sender<Job>>,
    answers: (Sender<DiskDone>, Receiver<DiskDone>),
    /// Searches whose answer was not taken yet.
    waiting: usize,
}

impl Searcher {
    /// `waker` is called after each answer.
    pub(super) fn new(file: Rc<OwnedFd>, block: u64, waker: Waker) -> Self {
        Self { file, block, waker, jobs: None, answers: channel(), waiting: 0 }
    }

    /// Begins a search for at most `max` stretches; its end comes out of [`Self::poll`].
    pub(super) fn start(&mut self, id: DiskOpId, blocks: BlockRange, max: usize) {
        self.waiting += 1;
        if self.jobs.is_none() {
            self.jobs = self.make_thread();
        }
        let job = Job { id, blocks, max };
        let refused = match &self.jobs {
            Some(jobs) => jobs.send(job).err().map(|error| error.0),
            None => Some(job),
        };
        if let Some(job) = refused {
            self.jobs = None;
            let done = DiskDone { id, result: Ok(DiskResult::Extents(all_data(job.blocks))) };
            self.answers.0.send(done).expect("the receiver lives as long as this");
            (self.waker)();
        }
    }

    /// The next answer, if there is one.
    pub(super) fn poll(&mut self) -> Option<DiskDone> {
        if self.waiting == 0 {
            return None;
        }
        let answer = self.answers.1.try_recv().ok()?;
        self.waiting -= 1;
        Some(answer)
    }

    fn make_thread(&self) -> Option<Sender<Job>> {
        let (jobs, queue) = channel::<Job>();
        let block = self.block;
        let (answers, waker) = (self.answers.0.clone(), Arc::clone(&self.waker));
        let search = |file: OwnedFd| {
            move || {
                let trusted = is_trusted(&file);
                // Ends when the volume drops its side of either queue.
                while let Ok(Job { id, blocks, max }) = queue.recv() {
                    let found = if trusted { stretches(&file, block, blocks, max) } else { None };
                    let found = found.unwrap_or_else(|| all_data(blocks));
                    if answers.send(DiskDone { id, result: Ok(DiskResult::Extents(found)) }).is_err() {
                        return;
                    }
                    waker();
                }
            }
        };
        let thread = std::thread::Builder::new().name("blkrepl-holes".into());
        match self.file.try_clone().and_then(|file| thread.spawn(search(file))) {
            Ok(_detached) => Some(jobs),
            Err(error) => {
                tracing::warn!(%error, "no thread can be made to search for holes: all is called data");
                None
            }
        }
    }
}

fn is_trusted(file: &OwnedFd) -> bool {
    let system = rustix::fs::fstatfs(file);
    system.is_ok_and(|system| TRUSTED.contains(&(system.f_type as libc::__fsword_t)))
}

/// A file at this path gives up its space at once where zeroes are written: it lies on a file system that is known to
/// make holes. A block device, and what is not known, does not.
#[must_use]
pub fn makes_holes(path: &Path) -> bool {
    let open = std::fs::File::open(path);
    open.is_ok_and(|file| file.metadata().is_ok_and(|meta| meta.is_file()) && is_trusted(&file.into()))
}

/// The answer where it cannot be told.
fn all_data(blocks: BlockRange) -> Vec<Stretch> {
    vec![Stretch { count: blocks.count, hole: false }]
}

/// The blocks in at most `max` stretches, from the first one on. `None`: it cannot be told.
fn stretches(file: &OwnedFd, block: u64, blocks: BlockRange, max: usize) -> Option<Vec<Stretch>> {
    let size = u64::try_from(rustix::fs::fstat(file).ok()?.st_size).ok()?;
    let mut holes = Holes { seek: |to| seek(file, to), size, block, at: blocks.start.0 * block };
    let end = blocks.end() * block;
    let mut found: Vec<Stretch> = Vec::new();
    while holes.at < end && found.len() < max {
        let begin = holes.at;
        let hole = holes.go_on(end);
        let count = (holes.at - begin) / block;
        match found.last_mut() {
            Some(last) if last.hole == hole => last.count += count,
            _ => found.push(Stretch { count, hole }),
        }
    }
    Some(found)
}

/// What lies at or after a place, if the file system says so; [`None`] if there is nothing up to its end.
fn seek(file: &OwnedFd, to: SeekFrom) -> Result<Option<u64>, rustix::io::Errno> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A walk through a file.
struct Holes<S> {
    seek: S,
    /// Bytes of the file. What lies behind them cannot be read, and is no hole.
    size: u64,
    block: u64,
    /// Where it is; a whole number of blocks.
    at: u64,
}

impl<S: Fn(SeekFrom) -> Result<Option<u64>, rustix::io::Errno>> Holes<S> {
    /// Goes on to the end of what begins here, at most to `end` (whole blocks), at least by a block. True: it is
    /// a hole.
    fn go_on(&mut self, end: u64) -> bool {
        let (begin, readable) = (self.at, self.size / self.block * self.block);
        // A block with some data in it is data, and so is what cannot be told.
        let data = match (self.seek)(SeekFrom::Data(begin)) {
            Ok(Some(at)) => at / self.block * self.block,
            Ok(None) => readable,
            Err(_) => begin,
        };
        let data = data.min(readable).min(end);
        if data > begin {
            self.at = data;
            return true;
        }
        let hole = match (self.seek)(SeekFrom::Hole(begin)) {
            Ok(Some(at)) => at,
            Ok(None) | Err(_) => end,
        };
        // The block in which the hole begins is data; at least this one is.
        self.at = hole.min(end).next_multiple_of(self.block).clamp(begin + self.block, end);
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of `bytes`, where 0 is a hole.
    fn model(bytes: &[u8], to: SeekFrom) -> Option<u64> {
        let (from, data) = match to {
            SeekFrom::Data(at) => (at, true),
            SeekFrom::Hole(at) => (at, false),
            other => panic!("{other:?}"),
        };
        let len = bytes.len() as u64;
        if from >= len {
            return None;
        }
        let found = (from..len).find(|at| (bytes[*at as usize] != 0) == data);
        if data { found } else { Some(found.unwrap_or(len)) }
    }

    proptest! {
        /// Blocks of 4 bytes over a file that holds any bytes and may end early.
        #[test]
        fn only_whole_blocks_of_holes_before_the_end_of_the_file_are_holes(
            bytes in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => Just(1u8)], 0..80),
            start in 0u64..10, count in 1u64..20, broken in prop::bool::weighted(0.1),
        ) {
            let seek = |to| if broken { Err(rustix::io::Errno::IO) } else { Ok(model(&bytes, to)) };
            let mut holes = Holes { seek, size: bytes.len() as u64, block: 4, at: start * 4 };
            let end = (start + count) * 4;
            while holes.at < end {
                let begin = holes.at;
                let hole = holes.go_on(end);
                prop_assert!(holes.at > begin && holes.at <= end && holes.at % 4 == 0);
                for block in (begin..holes.at).step_by(4) {
                    let content = bytes.get(block as usize..block as usize + 4);
                    let is_hole = content.is_some_and(|b| b == [0; 4]);
                    prop_assert!(!hole || is_hole, "block at {} is called a hole", block);
                }
                prop_assert!(!(broken && hole));
            }
        }
    }

    #[test]
    fn a_file_system_that_is_not_known_is_not_asked() {
        let proc = OwnedFd::from(std::fs::File::open("/proc/self/status").unwrap());
        assert!(!is_trusted(&proc) && !makes_holes(Path::new("/proc/self/status")));
        assert!(!makes_holes(Path::new("/dev/null")) && !makes_holes(Path::new("/nowhere")));
    }
}
