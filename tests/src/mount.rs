//! A volume as a file system: nbdfuse shows the export as a file, a loop device makes a block device of
//! it, ext4 or XFS lies on that. Needs root, FUSE and loop devices; [`unavailable`] says what is missing.
//!
//! The stack is taken down in any state, also after its server is gone (every request fails with EIO
//! then), and never touches a loop device or a mount that it did not make.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::proc::{self, Finished, Proc, run, run_ok};
use crate::wait::wait_until;

/// Longest time for one step of building or taking down the stack.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Why no file system can be put on a volume here; none if it can.
#[must_use]
pub fn unavailable() -> Option<String> {
    if !proc::is_root() {
        return Some("mounting needs root".to_owned());
    }
    if let Some(reason) = proc::missing(&["nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "mount", "umount"]) {
        return Some(reason);
    }
    let devices = ["/dev/fuse", "/dev/loop-control"];
    devices.iter().find(|path| !Path::new(path).exists()).map(|path| format!("{path} does not exist"))
}

/// What can be put on a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    #[default]
    Ext4,
    /// XFS.
    Xfs,
}

impl FileSystem {
    /// Why it cannot be had here; none if it can.
    #[must_use]
    pub fn unavailable(self) -> Option<String> {
        let tools: &[&str] = match self {
            Self::Ext4 => &["mkfs.ext4", "e2fsck"],
            Self::Xfs => &["mkfs.xfs", "xfs_repair"],
        };
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        // The kernel loads what is not listed yet when it is mounted, if it has it at all.
        let loads = Path::new("/proc/modules").exists();
        let unknown = !loads && !known.lines().any(|line| line.trim() == self.name());
        let unknown = unknown.then(|| format!("the kernel does not know {}", self.name()));
        unavailable().or_else(|| proc::missing(tools)).or(unknown)
    }

    /// As mount knows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// A block device that is a volume, and perhaps a file system mounted from it.
pub struct Mount {
    shown: PathBuf,
    fuse: Option<Proc>,
    device: Option<String>,
    mounted: Option<PathBuf>,
    kind: FileSystem,
}

impl Mount {
    /// Makes a block device of the export at `uri`; `scratch` is an existing directory for its files.
    ///
    /// # Errors
    /// Where a step fails; what was built is taken down.
    pub fn attach(scratch: &Path, uri: &str) -> Result<Self> {
        let shown = tempfile::Builder::new().prefix("fuse-").tempdir_in(scratch)?.keep();
        let mut mount = Self { shown, fuse: None, device: None, mounted: None, kind: FileSystem::default() };
        let mut command = Command::new("nbdfuse");
        command.arg(&mount.shown).arg(uri);
        let fuse = mount.fuse.insert(Proc::spawn("nbdfuse", &mut command, &scratch.join("nbdfuse.log"))?);
        let file = mount.shown.join("nbd");
        let mut ended = false;
        wait_until("the file that nbdfuse shows", STEP_LIMIT, || {
            ended = !matches!(fuse.exited(), Ok(None));
            ended || fs::metadata(&file).is_ok_and(|meta| meta.len() > 0)
        })?;
        if ended {
            bail!("nbdfuse ended at once: {}", proc::tail(&fuse.output()));
        }
        let done = run_ok("losetup", &["--find".as_ref(), "--show".as_ref(), file.as_os_str()], STEP_LIMIT)?;
        mount.device = Some(done.stdout.trim().to_owned());
        Ok(mount)
    }

    /// The same for another file system than ext4.
    #[must_use]
    pub fn of(mut self, kind: FileSystem) -> Self {
        self.kind = kind;
        self
    }

    /// The block device.
    ///
    /// # Errors
    /// After it was taken down.
    pub fn device(&self) -> Result<&str> {
        self.device.as_deref().context("the loop device is gone")
    }

    /// Puts an empty file system on it.
    ///
    /// # Errors
    /// Where mkfs fails.
    pub fn format(&self) -> Result<()> {
        let device = self.device()?;
        let eager = "lazy_itable_init=0,lazy_journal_init=0";
        match self.kind {
            FileSystem::Ext4 => run_ok("mkfs.ext4", &["-q", "-F", "-E", eager, device], STEP_LIMIT)?,
            FileSystem::Xfs => run_ok("mkfs.xfs", &["-q", "-f", device], STEP_LIMIT)?,
        };
        Ok(())
    }

    /// Gives up the space of what was deleted from the mounted file system; XFS may still be at it afterwards.
    ///
    /// # Errors
    /// Where it is not mounted, or fstrim fails.
    pub fn trim(&self) -> Result<()> {
        let at = self.mounted.as_ref().context("not mounted")?;
        // A block is free when the deletion is in the journal; XFS unlinks in the background, and only a freeze
        // waits for that (a sync does not).
        for way in ["--freeze", "--unfreeze"] {
            run_ok("fsfreeze", &[way.as_ref(), at.as_os_str()], STEP_LIMIT)?;
        }
        run_ok("fstrim", &[at.as_os_str()], STEP_LIMIT).map(drop)
    }

    /// Mounts it at the directory `at`, which is made if it is missing.
    ///
    /// # Errors
    /// Where mount fails.
    pub fn mount(&mut self, at: &Path) -> Result<()> {
        fs::create_dir_all(at).with_context(|| format!("make {}", at.display()))?;
        let device = self.device()?.to_owned();
        run_ok(
            "mount",
            &["-t".as_ref(), self.kind.name().as_ref(), device.as_ref(), at.as_os_str()],
            STEP_LIMIT,
        )?;
        self.mounted = Some(at.to_path_buf());
        Ok(())
    }

    /// Replays the journal of ext4, then checks the whole file system, changing nothing.
    ///
    /// # Errors
    /// If the journal cannot be replayed, or the check finds anything at all afterwards.
    pub fn check(&self) -> Result<Finished> {
        ensure!(self.mounted.is_none(), "a mounted file system is not checked");
        let device = self.device()?;
        if self.kind == FileSystem::Xfs {
            // Its journal is replayed by mounting only; with a dirty one this fails.
            return run(Command::new("xfs_repair").args(["-n", device]), STEP_LIMIT)?.ok();
        }
        let replay = run(Command::new("e2fsck").args(["-p", "-E", "journal_only", device]), STEP_LIMIT)?;
        ensure!(replay.code() <= 1, "journal replay failed ({}): {}", replay.code(), replay.text());
        run(Command::new("e2fsck").args(["-f", "-n", device]), STEP_LIMIT)?.ok()
    }

    /// Unmounts cleanly; everything is written by then.
    ///
    /// # Errors
    /// Where it is busy or a write fails.
    pub fn unmount(&mut self) -> Result<()> {
        if let Some(at) = self.mounted.take() {
            run_ok("umount", &[at.as_os_str()], STEP_LIMIT)?;
        }
        Ok(())
    }

    /// Takes everything down after a clean unmount.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn detach(mut self) -> Result<()> {
        self.unmount()?;
        if let Some(device) = self.device.take() {
            run_ok("losetup", &["-d", &device], STEP_LIMIT)?;
        }
        run_ok("umount", &[self.shown.as_os_str()], STEP_LIMIT)?;
        if let Some(mut fuse) = self.fuse.take() {
            fuse.wait(STEP_LIMIT)?;
        }
        Ok(())
    }

    /// Takes everything down after its server died: what cannot be written is given up.
    pub fn abandon(self) {
        drop(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Each step may fail because the one before did; all are tried.
        if let Some(at) = self.mounted.take() {
            let plain = run_ok("umount", &[at.as_os_str()], STEP_LIMIT);
            if plain.is_err() {
                let _ = run_ok("umount", &["-l".as_ref(), at.as_os_str()], STEP_LIMIT);
            }
        }
        if let Some(device) = self.device.take() {
            let _ = run_ok("losetup", &["-d", &device], STEP_LIMIT);
        }
        let _ = run_ok("umount", &["-l".as_ref(), self.shown.as_os_str()], STEP_LIMIT);
        if let Some(mut fuse) = self.fuse.take() {
            let _ = fuse.end(Signal::TERM, Duration::from_secs(5));
        }
        let _ = fs::remove_dir(&self.shown);
    }
}

/// A small file system in a file, for tests of a full disk. Unmounted when dropped.
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Makes `image` of `len` bytes, puts ext4 on it and mounts it at `at`.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn mount(image: &Path, len: u64, at: &Path) -> Result<Self> {
        fs::create_dir_all(at).with_context(|| format!("make {}", at.display()))?;
        let file = fs::File::create(image).with_context(|| format!("create {}", image.display()))?;
        file.set_len(len).with_context(|| format!("size {}", image.display()))?;
        run_ok(
            "mkfs.ext4",
            &["-q".as_ref(), "-F".as_ref(), "-m".as_ref(), "0".as_ref(), image.as_os_str()],
            STEP_LIMIT,
        )?;
        run_ok("mount", &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), at.as_os_str()], STEP_LIMIT)?;
        Ok(Self { at: at.to_path_buf() })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if run_ok("umount", &[self.at.as_os_str()], STEP_LIMIT).is_err() {
            let _ = run_ok("umount", &["-l".as_ref(), self.at.as_os_str()], STEP_LIMIT);
        }
    }
}
