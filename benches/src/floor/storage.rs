//! The data file of a floor process, opened so that the ring never needs a helper thread for it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

pub(super) struct Storage {
    fd: OwnedFd,
    size: u64,
    in_memory: bool,
}

impl Storage {
    /// O_DIRECT where the file system has it. O_NONBLOCK means nothing to a file, but makes io_uring try a
    /// request to a tmpfs at once, which never waits, in place of giving it to a helper thread.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let plain = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, plain | OFlags::DIRECT, Mode::empty())
            .or_else(|_| rustix::fs::open(path, plain, Mode::empty()))
            .with_context(|| format!("open {}", path.display()))?;
        let file = File::from(fd);
        let size = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
        let kind = rustix::fs::fstatfs(&file).context("ask for the file system")?.f_type;
        Ok(Self { fd: file.into(), size, in_memory: kind == libc::TMPFS_MAGIC })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// A request to it is done as soon as it is submitted.
    pub(super) fn in_memory(&self) -> bool {
        self.in_memory
    }

    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The flush of a tmpfs, which does nothing: cheaper than a request to the ring, which would always go to
    /// a helper thread.
    pub(super) fn flush_now(&self) -> bool {
        rustix::fs::fdatasync(self.fd.as_fd()).is_ok()
    }
}
