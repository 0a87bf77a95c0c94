//! `blkrepl map` and the file system on its device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::binary::blkrepl;
use crate::mount::FileSystem;
use crate::proc::{Proc, run, run_ok};
use crate::wait::wait_for;

/// Longest time for one step, in a machine whose system calls are a hundred times dearer.
const LIMIT: Duration = Duration::from_secs(120);
/// What the kernel says only when a file system or a process was told of a failure, or waited for too long.
const COMPLAINTS: [&str; 9] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Remounting filesystem",
    "Aborting journal",
    "log I/O",
    "Corruption",
    "blocked for more than",
    "Out of memory",
];

/// A volume as a device of this machine, and the process that keeps it.
pub struct Mapped {
    config: PathBuf,
    log: PathBuf,
    device: PathBuf,
    keeper: Option<Proc>,
}

impl Mapped {
    /// Maps `vol0` of the cluster that the node of this config belongs to.
    ///
    /// # Errors
    /// If no device is there in time, with what the process said.
    pub fn start(config: &Path, dir: &Path) -> Result<Self> {
        let mut mapped = Self {
            config: config.to_owned(),
            log: dir.join("map.log"),
            device: PathBuf::new(),
            keeper: None,
        };
        mapped.keep()?;
        Ok(mapped)
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Starts the process that keeps it, which goes on with a device that is there.
    ///
    /// # Errors
    /// As for [`start`](Self::start); also if it has another device than before.
    pub fn keep(&mut self) -> Result<()> {
        let mut command = Command::new(blkrepl()?);
        command.args(["map", "vol0", "--config"]).arg(&self.config);
        let mut keeper = Proc::spawn("map", &mut command, &self.log)?;
        let device = wait_for("the device", LIMIT, || {
            let said = keeper.output();
            if let Some(status) = keeper.exited()? {
                return Ok(Err(anyhow::anyhow!("blkrepl map ended with {status}: {said}")));
            }
            let words = said.split_once("is mapped as ").context("it is not mapped")?.1;
            Ok(Ok(PathBuf::from(words.split_whitespace().next().unwrap_or_default())))
        })??;
        ensure!(
            self.device.as_os_str().is_empty() || self.device == device,
            "{} became {}",
            self.device.display(),
            device.display()
        );
        (self.device, self.keeper) = (device, Some(keeper));
        Ok(())
    }

    /// Ends the process with SIGKILL. The device stays.
    ///
    /// # Errors
    /// If it does not run.
    pub fn abandon(&mut self) -> Result<()> {
        let mut keeper = self.keeper.take().context("nobody keeps the device")?;
        keeper.end(Signal::KILL, LIMIT).map(drop)
    }

    /// What it said.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends the mapping while it is in use: all that waits for it fails.
    ///
    /// # Errors
    /// If it does not end.
    pub fn give_up(&self) -> Result<()> {
        run(Command::new(blkrepl()?).args(["unmap", "vol0", "--force"]), LIMIT)?.ok().map(drop)
    }

    /// Ends the mapping; the process ends by itself.
    ///
    /// # Errors
    /// If either fails.
    pub fn unmap(mut self) -> Result<()> {
        run(Command::new(blkrepl()?).args(["unmap", "vol0"]), LIMIT)?.ok()?;
        let mut keeper = self.keeper.take().context("nobody keeps the device")?;
        let status = keeper.wait(LIMIT)?;
        ensure!(status.success(), "blkrepl map ended with {status}: {}", keeper.output());
        Ok(())
    }
}

/// A file system on a device.
pub struct MappedFs {
    kind: FileSystem,
    device: PathBuf,
    at: PathBuf,
}

impl MappedFs {
    /// Makes one.
    ///
    /// # Errors
    /// Where mkfs fails.
    pub fn format(kind: FileSystem, device: &Path) -> Result<()> {
        let force = if kind == FileSystem::Xfs { "-f" } else { "-F" };
        let tool = format!("mkfs.{}", kind.name());
        run_ok(&tool, &["-q".as_ref(), force.as_ref(), device.as_os_str()], LIMIT).map(drop)
    }

    /// Mounts it at a directory, which is made if it is missing.
    ///
    /// # Errors
    /// Where mount fails.
    pub fn mount(kind: FileSystem, device: &Path, at: &Path) -> Result<Self> {
        fs::create_dir_all(at).with_context(|| format!("make {}", at.display()))?;
        let fs = Self { kind, device: device.to_owned(), at: at.to_owned() };
        let args = ["-t".as_ref(), kind.name().as_ref(), device.as_os_str(), at.as_os_str()];
        run_ok("mount", &args, LIMIT)?;
        Ok(fs)
    }

    /// Unmounts it, and has every structure of it looked at.
    ///
    /// # Errors
    /// If it is busy, or damaged.
    pub fn check(self) -> Result<()> {
        run_ok("umount", &[self.at.as_os_str()], LIMIT)?;
        let device = self.device.as_os_str();
        match self.kind {
            FileSystem::Ext4 => run_ok("e2fsck", &["-fn".as_ref(), device], LIMIT),
            FileSystem::Xfs => run_ok("xfs_repair", &["-n".as_ref(), device], LIMIT),
        }
        .map(drop)
    }
}

/// Looks through the kernel's log for what it says when a file system was told of a failure.
///
/// # Errors
/// The first such line, or that the log cannot be read.
pub(super) fn check_kernel_log() -> Result<()> {
    let log = run_ok("dmesg", &[] as &[&str], LIMIT)?.stdout;
    let bad = log.lines().find(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)));
    ensure!(bad.is_none(), "the kernel says: {}", bad.unwrap_or_default());
    Ok(())
}
