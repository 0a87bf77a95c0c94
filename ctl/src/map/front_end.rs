//! What shows a volume as a block device of this machine, as its keeper sees it.
//!
//! The kernel's NBD client is the one there is ([`KernelDevice`]). Another one (ublk) has to hold requests while no
//! primary is there, and send what is unanswered again on the connection that it is given next, never on two at
//! once. Never does: finding the primary.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use super::device::{self, Identity};
use super::kernel::KernelNbd;
use super::record;

/// What a device has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests done since it was made.
    pub done: u64,
    /// Requests in flight.
    pub in_flight: u64,
}

/// A device that shows a volume.
pub trait FrontEnd {
    /// What it shows.
    fn identity(&self) -> &Identity;

    /// It is there, and shows what it did.
    ///
    /// # Errors
    /// That cannot be told.
    fn is_there(&self) -> io::Result<bool>;

    /// What it has done; `None` if that cannot be told.
    fn progress(&self) -> Option<Progress>;

    /// Its size and block size in bytes; `None` if it is gone.
    fn size(&self) -> Option<(u64, u32)>;

    /// Puts a connection in the place of the dead one; changes nothing if that one lives.
    /// `resize`: the new size and block size.
    ///
    /// # Errors
    /// The device is gone, or does not take them.
    fn replace(&mut self, resize: Option<(u64, u32)>, connection: &OwnedFd) -> io::Result<()>;

    /// Waits for so long, or until a connection of the device has died; says whether one has. That may be one whose
    /// place was taken since.
    ///
    /// # Errors
    /// It cannot be told any more.
    fn wait_dead(&mut self, limit: Duration) -> io::Result<bool>;
}

/// A device of the kernel's NBD client.
#[derive(Debug)]
pub struct KernelDevice {
    /// The client.
    pub kernel: KernelNbd,
    /// The device's number.
    pub index: u32,
    /// What it shows.
    pub identity: Identity,
}

impl FrontEnd for KernelDevice {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn is_there(&self) -> io::Result<bool> {
        let shows = device::identity(self.index)?.as_ref() == Some(&self.identity);
        Ok(shows && !record::has_ended(Path::new(record::RUN_DIR), &self.identity))
    }

    fn progress(&self) -> Option<Progress> {
        // Documentation/block/stat.rst: requests done of reads, writes, discards and flushes, and those in flight.
        let stat = std::fs::read_to_string(device::sysfs(self.index).join("stat")).ok()?;
        let numbers: Vec<u64> = stat.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let done = [0, 4, 11, 15].iter().filter_map(|at| numbers.get(*at)).sum();
        Some(Progress { done, in_flight: *numbers.get(8)? })
    }

    fn size(&self) -> Option<(u64, u32)> {
        device::mapped(self.index).ok()?.map(|m| (m.size, m.block_size))
    }

    fn replace(&mut self, resize: Option<(u64, u32)>, connection: &OwnedFd) -> io::Result<()> {
        self.kernel.reconfigure(self.index, &self.identity, resize, connection)
    }

    fn wait_dead(&mut self, limit: Duration) -> io::Result<bool> {
        self.kernel.wait_dead(self.index, limit)
    }
}
