//! A disk that fails as told: an NBD server over a unix socket with a volatile cache, for guest machines
//! and (through nbdfuse and a loop device) for nodes on this machine.
//!
//! A write without FUA lies in the cache until a flush, sector by sector. [`Disk::cut_power`] keeps a
//! random part of what lies there, any sector without its neighbours, so that writes are torn and out of
//! order; what was flushed is never touched. Beside that: read, write and flush errors, no space, slow and
//! hanging requests, each switched on and off at any time. It does not lie about flushes: that is outside the
//! promise of the product.
//!
//! nbdkit's `error`, `delay` and `cache` filters do less: no failing flush, no switch for a delay, and a cut
//! that loses all of the cache or nothing.

mod cache;
mod device;
mod server;

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bits::Random;
use cache::Cache;
pub use device::{Device, unavailable};

/// Bytes of a sector: what a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// How often the acceptor looks whether it is to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);

/// What is wrong with a disk as long as it lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sickness {
    /// Reads fail.
    pub reads: bool,
    /// Writes, zeroes and trims fail.
    pub writes: bool,
    /// Flushes fail.
    pub flushes: bool,
    /// Writes fail for want of space.
    pub full: bool,
    /// Every request takes so much longer.
    pub delay: Duration,
    /// Nothing is answered until this ends.
    pub hung: bool,
}

/// What a disk has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Requests that failed as told.
    pub failed: u64,
    /// Flushes done, FUA not counted.
    pub flushes: u64,
    /// Sectors in the cache that a cut of power lost.
    pub lost: u64,
    /// Sectors in the cache that a cut of power kept.
    pub kept: u64,
}

struct State {
    cache: Cache,
    sickness: Sickness,
    counts: DiskCounts,
    random: Random,
    powered: bool,
    ended: bool,
    connections: Vec<UnixStream>,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    len: u64,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The disk; it serves until dropped.
pub struct Disk {
    inner: Arc<Inner>,
    socket: PathBuf,
    image: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

impl Disk {
    /// A disk of `len` bytes (a multiple of 4096) that reads as zeroes; `NAME.img` and `NAME.sock` in `dir` are
    /// its medium and its cable.
    ///
    /// # Errors
    /// Where the files cannot be made.
    pub fn new(dir: &Path, name: &str, len: u64, seed: u64) -> Result<Self> {
        let image = dir.join(format!("{name}.img"));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&image);
        let file = file.with_context(|| format!("create {}", image.display()))?;
        file.set_len(len).with_context(|| format!("size {}", image.display()))?;
        let socket = dir.join(format!("{name}.sock"));
        let listener = UnixListener::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
        listener.set_nonblocking(true).context("make a listener non-blocking")?;
        let state = State {
            cache: Cache::new(file),
            sickness: Sickness::default(),
            counts: DiskCounts::default(),
            random: Random::new(seed),
            powered: true,
            ended: false,
            connections: Vec::new(),
        };
        let inner = Arc::new(Inner { state: Mutex::new(state), changed: Condvar::new(), len });
        let shared = Arc::clone(&inner);
        let acceptor = std::thread::spawn(move || accept(&listener, &shared));
        Ok(Self { inner, socket, image, acceptor: Some(acceptor) })
    }

    /// Where it is served.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its address for NBD clients.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// What is on the medium; what lies in the cache is not there.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// From now on this is wrong with it.
    pub fn set(&self, sickness: Sickness) {
        self.inner.lock().sickness = sickness;
        self.inner.changed.notify_all();
    }

    /// What is wrong with it.
    #[must_use]
    pub fn sickness(&self) -> Sickness {
        self.inner.lock().sickness
    }

    /// What it has seen.
    #[must_use]
    pub fn counts(&self) -> DiskCounts {
        self.inner.lock().counts
    }

    /// Nothing is answered any more, every connection ends, and what lies in the cache is kept or lost sector
    /// by sector, as chance has it.
    pub fn cut_power(&self) {
        let mut state = self.inner.lock();
        state.powered = false;
        for connection in std::mem::take(&mut state.connections) {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        let State { cache, random, counts, .. } = &mut *state;
        // Sometimes nearly all is lost, sometimes nearly nothing.
        let odds = random.below(9);
        let (kept, lost) = cache.lose(|| random.below(8) < odds);
        counts.kept += kept;
        counts.lost += lost;
        drop(state);
        self.inner.changed.notify_all();
    }

    /// Serves again.
    pub fn restore_power(&self) {
        self.inner.lock().powered = true;
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        {
            let mut state = self.inner.lock();
            state.ended = true;
            for connection in std::mem::take(&mut state.connections) {
                let _ = connection.shutdown(std::net::Shutdown::Both);
            }
        }
        self.inner.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn accept(listener: &UnixListener, inner: &Arc<Inner>) {
    loop {
        if inner.lock().ended {
            return;
        }
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        let mut state = inner.lock();
        let (true, Ok(handle)) = (state.powered && !state.ended, stream.try_clone()) else { continue };
        state.connections.push(handle);
        drop(state);
        let inner = Arc::clone(inner);
        std::thread::spawn(move || {
            let _ = stream.set_nonblocking(false);
            // A broken connection is the client's to notice.
            let _ = server::serve(&stream, &inner);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Link, Request};

    fn with_disk(body: impl FnOnce(&Disk, &mut Link)) {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path(), "disk", 1 << 20, 3).unwrap();
        let mut link = Link::connect(&disk.uri(), Duration::from_secs(5)).unwrap();
        assert_eq!(link.size(), 1 << 20);
        body(&disk, &mut link);
    }

    #[test]
    fn what_was_flushed_outlives_a_cut_and_the_rest_is_torn() {
        with_disk(|disk, link| {
            link.write(0, &[1; 64 << 10]).unwrap();
            link.flush().unwrap();
            link.write(0, &[2; 64 << 10]).unwrap();
            link.call(&Request::Write { offset: 0, data: vec![3; 4096], fua: true }).unwrap();
            link.call(&Request::Trim { offset: 8192, len: 4096 }).unwrap();
            assert_eq!(link.read(8192, 4096).unwrap(), [0; 4096]);
            disk.cut_power();
            assert!(link.read(0, 4096).is_err());
            disk.restore_power();
            let mut link = Link::connect(&disk.uri(), Duration::from_secs(5)).unwrap();
            assert_eq!(link.read(0, 4096).unwrap(), [3; 4096]);
            let rest = link.read(12_288, (64 << 10) - 12_288).unwrap();
            let sectors: Vec<&[u8]> = rest.chunks(SECTOR).collect();
            assert!(sectors.iter().all(|sector| **sector == [1; SECTOR] || **sector == [2; SECTOR]));
            let DiskCounts { lost, kept, .. } = disk.counts();
            assert_eq!(lost + kept, (60 << 10) / SECTOR as u64);
        });
    }

    #[test]
    fn it_fails_as_told_and_recovers() {
        with_disk(|disk, link| {
            let write = |link: &mut Link| link.write(0, &[1; 4096]);
            write(link).unwrap();
            disk.set(Sickness { writes: true, ..Default::default() });
            assert!(write(link).is_err() && link.flush().is_ok() && link.read(0, 4096).is_ok());
            disk.set(Sickness { flushes: true, ..Default::default() });
            assert!(link.flush().is_err() && write(link).is_ok());
            disk.set(Sickness { reads: true, full: true, ..Default::default() });
            assert!(link.read(0, 4096).is_err());
            assert!(write(link).unwrap_err().to_string().to_lowercase().contains("space"));
            assert_eq!(disk.counts().failed, 4);
            disk.set(Sickness { hung: true, ..Default::default() });
            link.submit(&Request::Read { offset: 0, len: 4096 }).unwrap();
            assert!(link.poll(Duration::from_millis(100)).unwrap().is_none());
            disk.set(Sickness::default());
            assert!(link.next(Duration::from_secs(5)).unwrap().result.is_ok());
        });
    }
}
