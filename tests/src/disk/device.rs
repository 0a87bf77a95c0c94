//! A failing [`Disk`] as a block device of this machine: nbdfuse shows it as a file, a loop device with
//! direct I/O makes a block device of that. Needs root. Taken down when dropped, in any state.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use rustix::process::Signal;

use super::{Disk, Sickness};
use crate::mount;
use crate::proc::{self, Proc, run_ok};
use crate::wait::wait_until;

const STEP_LIMIT: Duration = Duration::from_secs(30);

/// Why there can be no such device here; none if there can.
#[must_use]
pub fn unavailable() -> Option<String> {
    mount::unavailable()
}

/// The block device and the disk behind it.
pub struct Device {
    disk: Disk,
    shown: PathBuf,
    fuse: Option<Proc>,
    device: Option<String>,
}

impl Device {
    /// Makes a disk of `len` bytes and a block device of it; all files lie in `dir`.
    ///
    /// # Errors
    /// Where a step fails; what was built is taken down.
    pub fn new(dir: &Path, name: &str, len: u64, seed: u64) -> Result<Self> {
        let disk = Disk::new(dir, name, len, seed)?;
        let shown = dir.join(format!("{name}.fuse"));
        fs::create_dir_all(&shown)?;
        let mut device = Self { disk, shown, fuse: None, device: None };
        let mut command = Command::new("nbdfuse");
        command.arg(&device.shown).arg(device.disk.uri());
        let log = dir.join(format!("{name}.nbdfuse.log"));
        let fuse = device.fuse.insert(Proc::spawn("nbdfuse", &mut command, &log)?);
        let file = device.shown.join("nbd");
        let mut ended = false;
        wait_until("the file that nbdfuse shows", STEP_LIMIT, || {
            ended = !matches!(fuse.exited(), Ok(None));
            ended || fs::metadata(&file).is_ok_and(|meta| meta.len() > 0)
        })?;
        if ended {
            bail!("nbdfuse ended at once: {}", proc::tail(&fuse.output()));
        }
        let args = ["--find", "--show", "--direct-io=on"].map(AsRef::as_ref);
        let done = run_ok("losetup", &[args[0], args[1], args[2], file.as_os_str()], STEP_LIMIT)?;
        device.device = Some(done.stdout.trim().to_owned());
        Ok(device)
    }

    /// The disk, to make it fail.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Path of the block device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(self.device.as_deref().unwrap_or_default())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Whatever waits for the disk must end, or the device cannot go.
        self.disk.set(Sickness::default());
        if let Some(device) = self.device.take() {
            let _ = run_ok("losetup", &["-d", &device], STEP_LIMIT);
        }
        if run_ok("umount", &[self.shown.as_os_str()], STEP_LIMIT).is_err() {
            let _ = run_ok("umount", &["-l".as_ref(), self.shown.as_os_str()], STEP_LIMIT);
        }
        if let Some(mut fuse) = self.fuse.take() {
            let _ = fuse.end(Signal::TERM, Duration::from_secs(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_block_device_fails_as_its_disk_is_told() {
        if let Some(reason) = unavailable() {
            crate::report::skipped("disk::device", &reason);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let device = Device::new(dir.path(), "d", 1 << 20, 1).unwrap();
        let file = fs::File::options().read(true).write(true).open(device.path()).unwrap();
        file.write_all_at(&[5; 8192], 0).unwrap();
        file.sync_all().unwrap();
        assert!(device.disk().counts().flushes > 0, "a flush of the device reaches its disk");
        device.disk().set(Sickness { flushes: true, ..Default::default() });
        file.write_all_at(&[6; 4096], 0).unwrap();
        assert!(file.sync_all().is_err());
        device.disk().set(Sickness::default());
        drop(file);
    }
}
