//! The command that runs a machine as Linux as a program.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity};

use super::image::Image;
use super::{Drive, Files, VmOptions};

/// First and second serial line of the machine.
pub(super) const REQUESTS: &str = "ttyS0";
pub(super) const LOG: &str = "ttyS1";

/// Linux as a program does not keep AVX-512 registers over a signal handler, so that no handler may use them; in
/// programs that nobody builds for such a processor only the C library does. The first is for all that the
/// machine's first program starts, the second for systemd's services.
const NO_AVX512: [&str; 2] = [
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW",
    "systemd.setenv=GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW",
];

/// The overlay over the root file system. The machine makes it.
pub(super) fn overlay(dir: &Path) -> PathBuf {
    dir.join("root.cow")
}

/// The processor that the next machine runs on, one after the other of those that this process may use. A machine's
/// kernel and its programs are processes that take turns: each system call of a program is two changes from one to the
/// other. Between two processors each of them wakes an idle one, which under a hypervisor costs many times the call.
fn processor() -> Result<usize> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let allowed = sched_getaffinity(None).context("ask for the processors of this process")?;
    let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    usable.get(turn % usable.len().max(1)).copied().context("this process may use no processor")
}

/// The command: what the machine's console says is its standard output, and its commands its standard input.
pub(super) fn command(
    image: &Image,
    options: &VmOptions,
    files: &Files,
    drives: &[Drive],
    words: &[String],
) -> Result<Command> {
    let (program, preload) = image.uml();
    // Only a shell gives a program a third descriptor, for what goes to the guest's log.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 3>>\"$0\""]).arg(&files.log);
    command.args(["taskset", "--cpu-list", &processor()?.to_string()]).arg(program);
    command.env("LD_PRELOAD", preload);
    command.arg(format!("mem={}M", options.memory_mib));
    command.arg(format!("ubd0={},{}", overlay(&files.dir).display(), image.root().display()));
    for (index, drive) in drives.iter().enumerate() {
        let Drive::File(path) = drive else {
            bail!("a disk with a volatile cache needs a machine under qemu");
        };
        command.arg(format!("ubd{}={}", index + 1, path.display()));
    }
    command.args(["root=/dev/ubda", "rw", "con=null", "con0=null,fd:1", "ssl=null", "ssl0=fd:0,null"]);
    command.args(["ssl1=null,fd:3", "pty.legacy_count=0"]);
    command.arg(format!("uml_dir={}", files.dir.join("uml").display()));
    command.arg(format!("vm.share={}", files.share.display()));
    command.args(NO_AVX512).args(words);
    Ok(command)
}
