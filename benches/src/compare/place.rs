//! Where the files of what is measured lie: on a disk, in memory, or first one and then the other.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

/// Where the files lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A real disk: what users get.
    Disk,
    /// Memory: what the program itself costs.
    Tmpfs,
}

/// The options that say where, for the command lines.
#[derive(Args, Clone, Debug)]
pub struct PlaceArgs {
    /// Where the files lie.
    #[arg(long, value_enum, default_value_t = Choice::Both)]
    place: Choice,
    /// A directory on a disk.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    disk_dir: PathBuf,
    /// A directory on a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    tmpfs_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    Disk,
    Tmpfs,
    Both,
}

impl PlaceArgs {
    /// The places that were chosen, each with its directory.
    #[must_use]
    pub fn places(&self) -> Vec<(Place, PathBuf)> {
        let disk = (Place::Disk, self.disk_dir.clone());
        let tmpfs = (Place::Tmpfs, self.tmpfs_dir.clone());
        match self.place {
            Choice::Disk => vec![disk],
            Choice::Tmpfs => vec![tmpfs],
            Choice::Both => vec![disk, tmpfs],
        }
    }

    /// The directory on a tmpfs, whatever was chosen.
    #[must_use]
    pub fn tmpfs_dir(&self) -> &Path {
        &self.tmpfs_dir
    }
}

impl Place {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Tmpfs => "tmpfs",
        }
    }

    /// The directory is what the place says, and has that many bytes of room.
    pub(crate) fn check(self, base: &Path, needed: u64) -> Result<()> {
        let stat = rustix::fs::statfs(base).with_context(|| format!("look at {}", base.display()))?;
        let is_tmpfs = stat.f_type == libc::TMPFS_MAGIC;
        if is_tmpfs != (self == Self::Tmpfs) {
            let is = if is_tmpfs { "is" } else { "is not" };
            bail!("{} {is} a tmpfs; name another with --{}-dir", base.display(), self.word());
        }
        let room = stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize)?);
        ensure!(room >= needed, "{} has {room} bytes left, {needed} are needed", base.display());
        Ok(())
    }

    /// What a server left in the page cache is not to be written out during the next measurement.
    pub(crate) fn settle(self, dir: &Path) {
        if self == Self::Disk
            && let Ok(dir) = File::open(dir)
        {
            // Only costs noise if it fails.
            let _ = rustix::fs::syncfs(dir);
        }
    }
}
