//! What machines boot: the directory that `tests/vm/build` makes. Nothing is built or downloaded here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::options::Kind;
use crate::binary::{target_dir, workspace};
use crate::proc::{missing, run};

const STEP_LIMIT: Duration = Duration::from_secs(60);
/// The guests' release: programs that are built on another one need not run there.
const RELEASE: &str = "bookworm";
/// Where Linux as a program looks for room for its guest's memory.
const SHM: &str = "/dev/shm";

/// The parts of a machine that all machines share.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The one that `BLKREPL_VM` names, else the one in the target directory.
    ///
    /// # Errors
    /// Where it is not built.
    pub fn find() -> Result<Self> {
        if let Some(dir) = std::env::var_os("BLKREPL_VM") {
            let dir = PathBuf::from(dir);
            ensure!(dir.join("root.img").is_file(), "BLKREPL_VM names {}, which has none", dir.display());
            return Ok(Self { dir });
        }
        let mut command = Command::new(workspace().join("tests/vm/build"));
        let found = run(command.arg("--where").env("CARGO_TARGET_DIR", target_dir()?), STEP_LIMIT)?;
        ensure!(found.status.success(), "{}", found.stderr.trim());
        Ok(Self { dir: PathBuf::from(found.stdout.trim()) })
    }

    /// The root file system.
    pub(super) fn root(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    /// Linux as a program, and the library that it needs with it.
    pub(super) fn uml(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("linux.uml"), self.dir.join("xstate.so"))
    }

    /// Linux for qemu, and its initial file system.
    pub(super) fn stock(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("vmlinux"), self.dir.join("initrd"))
    }
}

/// Why machines of this kind cannot be booted here; none if they can.
#[must_use]
pub fn unavailable(kind: Kind) -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("the machines are x86_64 ones".to_owned());
    }
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !release.lines().any(|line| line == format!("VERSION_CODENAME={RELEASE}")) {
        return Some(format!("what is built here need not run in the machines, which are Debian {RELEASE}"));
    }
    let programs: &[&str] = match kind {
        Kind::Uml => &["sh"],
        Kind::Qemu => &["sh", "qemu-system-x86_64", "qemu-img"],
    };
    if let Some(reason) = missing(programs) {
        return Some(reason);
    }
    if kind == Kind::Uml && !Path::new(SHM).is_dir() {
        return Some(format!("no {SHM} for the memory of a machine"));
    }
    Image::find().context("no root file system").err().map(|reason| format!("{reason:#}"))
}
