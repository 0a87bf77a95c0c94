//! The disk under a control store: a few files, a volatile cache, and what a power cut leaves of it.
//!
//! What was written since a file's last sync may survive a power cut in any part of 512 bytes; a file's length
//! survives at once, and a replaced small file is the old one or the new one. A process that died has its writes
//! in the cache still. Errors come when they are asked for; a file of a process that is gone takes nothing any
//! more.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use blkrepl_engine::control::{RawFile, StoreDir, StoreFile};

use crate::rng::Rng;

use super::host::lock;

/// What a power cut keeps or loses at once.
const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
struct FileData {
    data: Vec<u8>,
    /// Content before each write since the last sync, and the write: offset, old, new.
    unsynced: Vec<(usize, Vec<u8>, Vec<u8>)>,
}

/// Errors to come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Writes and syncs until all of them fail.
    pub(crate) fail_after: Option<u64>,
    /// Reads until all of them fail.
    pub(crate) unreadable_after: Option<u64>,
    /// Syncs until the power is cut, in the middle of one.
    pub(crate) cut_after: Option<u64>,
    /// No file grows.
    pub(crate) full: bool,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, FileData>,
    faults: Faults,
    cut: bool,
    /// Counts the processes; files of earlier ones are dead.
    run: u64,
    failed: u64,
}

/// A disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk(Arc<Mutex<State>>);

/// The content of a disk at one moment, all of it durable.
#[derive(Clone, Debug)]
pub(crate) struct Image(BTreeMap<String, FileData>);

impl Disk {
    pub(crate) fn set_faults(&self, faults: Faults) {
        lock(&self.0).faults = faults;
    }

    /// True if the power was cut in the middle of a sync.
    pub(crate) fn is_cut(&self) -> bool {
        lock(&self.0).cut
    }

    /// How many operations failed.
    pub(crate) fn failed(&self) -> u64 {
        lock(&self.0).failed
    }

    /// The process is gone; its files are dead, its writes are in the cache.
    pub(crate) fn drop_process(&self) {
        let mut s = lock(&self.0);
        s.run += 1;
        s.faults = Faults::default();
        s.cut = false;
    }

    /// The power is gone, and with it any part of what was not synced.
    pub(crate) fn lose_power(&self, rng: &mut Rng) {
        self.drop_process();
        let keep = rng.pick(&[0, 0, 300, 500, 900, 1000]);
        let mut s = lock(&self.0);
        for file in s.files.values_mut() {
            let mut writes = std::mem::take(&mut file.unsynced);
            for (offset, old, _) in writes.iter().rev() {
                put(&mut file.data, *offset, old);
            }
            // redb's order of writes between two syncs is its own; what survives must not depend on it.
            writes.sort_by(|a, b| (a.0, &a.2).cmp(&(b.0, &b.2)));
            for (offset, _, new) in writes {
                let mut at = 0;
                while at < new.len() {
                    let end = (((offset + at) / SECTOR + 1) * SECTOR - offset).min(new.len());
                    if rng.chance(keep) {
                        put(&mut file.data, offset + at, &new[at..end]);
                    }
                    at = end;
                }
            }
        }
    }

    /// A copy of everything, as after a clean stop.
    pub(crate) fn image(&self) -> Image {
        let mut files = lock(&self.0).files.clone();
        files.values_mut().for_each(|f| f.unsynced.clear());
        Image(files)
    }

    /// Puts an image in place of everything.
    pub(crate) fn restore(&self, image: Image) {
        self.drop_process();
        lock(&self.0).files = image.0;
    }
}

/// Overwrites what is still within the file.
fn put(data: &mut [u8], offset: usize, bytes: &[u8]) {
    let end = (offset + bytes.len()).min(data.len());
    if offset < end {
        data[offset..end].copy_from_slice(&bytes[..end - offset]);
    }
}

impl State {
    fn alive(&self, run: u64) -> io::Result<()> {
        if self.run == run { Ok(()) } else { Err(io::Error::other("the process is gone")) }
    }

    /// Counts one write or sync down.
    fn spend(&mut self, run: u64) -> io::Result<()> {
        self.alive(run)?;
        if self.cut {
            return Err(io::Error::other("the power is gone"));
        }
        if let Some(left) = &mut self.faults.fail_after {
            if *left == 0 {
                self.failed += 1;
                return Err(io::Error::other("the disk failed"));
            }
            *left -= 1;
        }
        Ok(())
    }

    fn grow(&mut self) -> io::Result<()> {
        if self.faults.full {
            self.failed += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn file(&mut self, name: &str) -> io::Result<&mut FileData> {
        self.files.get_mut(name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// The disk as a directory of one process.
pub(crate) struct Dir {
    disk: Disk,
    run: u64,
}

impl Disk {
    /// The directory for the process that starts now.
    pub(crate) fn dir(&self) -> Dir {
        let run = lock(&self.0).run;
        Dir { disk: self.clone(), run }
    }
}

impl StoreDir for Dir {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/sim").join(name)
    }

    fn create_dir(&self) -> io::Result<()> {
        lock(&self.disk.0).spend(self.run)
    }

    fn exists(&self, name: &str) -> bool {
        lock(&self.disk.0).files.contains_key(name)
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        Ok(lock(&self.disk.0).file(name)?.data.len() as u64)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(lock(&self.disk.0).file(name)?.data.clone())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        s.spend(self.run)?;
        s.grow()?;
        s.files.insert(name.into(), FileData { data: bytes.to_vec(), unsynced: Vec::new() });
        Ok(())
    }

    fn create(&self, name: &str) -> io::Result<StoreFile> {
        let mut s = lock(&self.disk.0);
        s.spend(self.run)?;
        s.files.insert(name.into(), FileData::default());
        drop(s);
        self.open(name)
    }

    fn open(&self, name: &str) -> io::Result<StoreFile> {
        lock(&self.disk.0).file(name)?;
        let file = SimFile { disk: self.disk.clone(), run: self.run, name: name.into() };
        Ok(StoreFile::Other(Box::new(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        s.spend(self.run)?;
        let file = s.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        s.files.insert(to.into(), file);
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: Disk,
    run: u64,
    name: String,
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl RawFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        let mut s = lock(&self.disk.0);
        s.alive(self.run)?;
        Ok(s.file(&self.name)?.data.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        s.alive(self.run)?;
        match &mut s.faults.unreadable_after {
            Some(0) => {
                s.failed += 1;
                return Err(io::Error::other("unreadable"));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        let start = index(offset);
        let data = &s.file(&self.name)?.data;
        let Some(from) = data.get(start..start.saturating_add(out.len())) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        out.copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        s.spend(self.run)?;
        let old = s.file(&self.name)?.data.len();
        if index(len) > old {
            s.grow()?;
        }
        let file = s.file(&self.name)?;
        file.data.resize(index(len), 0);
        file.unsynced.retain(|(offset, _, new)| offset + new.len() <= index(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        s.spend(self.run)?;
        if let Some(left) = &mut s.faults.cut_after {
            if *left == 0 {
                s.cut = true;
                return Err(io::Error::other("the power is gone"));
            }
            *left -= 1;
        }
        s.file(&self.name)?.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut s = lock(&self.disk.0);
        let failed = s.spend(self.run);
        if failed.is_err() && s.run != self.run {
            return failed;
        }
        // A write that fails may have got half of its bytes down.
        let data = if failed.is_err() { &data[..data.len() / 2] } else { data };
        let file = s.file(&self.name)?;
        let start = index(offset);
        let end = start + data.len();
        if file.data.len() < end {
            file.data.resize(end, 0);
        }
        let old = file.data[start..end].to_vec();
        file.data[start..end].copy_from_slice(data);
        file.unsynced.push((start, old, data.to_vec()));
        failed
    }
}
