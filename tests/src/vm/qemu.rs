//! The command that runs a machine under qemu.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::image::Image;
use super::{Drive, Files, VmOptions};
use crate::guest::accelerators;
use crate::proc::run;

/// Second and third serial line of the machine; the first is its console.
pub(super) const REQUESTS: &str = "ttyS1";
pub(super) const LOG: &str = "ttyS2";
const STEP_LIMIT: Duration = Duration::from_secs(60);

fn overlay(dir: &Path) -> PathBuf {
    dir.join("root.qcow2")
}

/// Makes the overlay over the root file system.
pub(super) fn prepare(image: &Image, dir: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(image.root()).arg(overlay(dir));
    run(&mut command, STEP_LIMIT)?.ok().map(drop)
}

/// The command: the machine's commands are its standard input.
pub(super) fn command(
    image: &Image,
    options: &VmOptions,
    files: &Files,
    drives: &[Drive],
    words: &[String],
) -> Command {
    let (kernel, initrd) = image.stock();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
    for part in accelerators() {
        command.args(["-accel", part]);
    }
    command.args(["-cpu", "max", "-smp", &options.cpus.to_string(), "-m", &options.memory_mib.to_string()]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    command.arg("-append");
    command.arg(format!("console=ttyS0 panic=-1 mitigations=off {}", words.join(" ")));
    for (id, path) in [("console", &files.console), ("log", &files.log)] {
        command.arg("-chardev").arg(format!("file,id={id},path={},append=on", path.display()));
    }
    command.args(["-serial", "chardev:console", "-serial", "stdio", "-serial", "chardev:log"]);
    // Linux as a program locks the root file system, which all only read, in a way that qemu takes for a writer's.
    let root = overlay(&files.dir);
    let root = format!("file={},format=qcow2,if=none,id=root,backing.file.locking=off", root.display());
    command.args(["-drive", &root, "-device", "virtio-blk-pci,drive=root"]);
    for (index, drive) in drives.iter().enumerate() {
        let node = format!("node-name=d{index},discard=unmap");
        command.arg("-blockdev").arg(match drive {
            Drive::File(path) => {
                format!("driver=raw,{node},file.driver=file,file.filename={}", path.display())
            }
            Drive::Volatile(disk) => {
                format!("driver=nbd,{node},server.type=unix,server.path={}", disk.socket().display())
            }
        });
        command.args(["-device", &format!("virtio-blk-pci,drive=d{index},write-cache=on")]);
    }
    command.args(["-device", "virtio-rng-pci", "-virtfs"]);
    command.arg(format!(
        "local,path={},mount_tag=host,security_model=none,multidevs=remap",
        files.share.display()
    ));
    command
}
