//! The command that runs a machine as Linux as a program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

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

/// How many of this process's machines have each processor.
static TAKEN: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

/// The processor that a machine runs on, of those that this process may use the one with the fewest machines. A
/// machine's kernel and its programs are processes that take turns: each system call of a program is two changes from
/// one to the other. Between two processors each of them wakes an idle one, which under a hypervisor costs many times
/// the call.
pub(super) struct Processor(usize);

impl Processor {
    pub(super) fn take() -> Result<Self> {
        let allowed = sched_getaffinity(None).context("ask for the processors of this process")?;
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let usable = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let free = usable.min_by_key(|cpu| taken.get(cpu).copied().unwrap_or(0));
        let free = free.context("this process may use no processor")?;
        *taken.entry(free).or_default() += 1;
        Ok(Self(free))
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.0) {
            *count -= 1;
        }
    }
}

/// The command: what the machine's console says is its standard output, and its commands its standard input.
pub(super) fn command(
    image: &Image,
    options: &VmOptions,
    processor: Option<&Processor>,
    files: &Files,
    drives: &[Drive],
    words: &[String],
) -> Result<Command> {
    let (program, preload) = image.uml();
    // Only a shell gives a program a third descriptor, for what goes to the guest's log.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 3>>\"$0\""]).arg(&files.log);
    if let Some(processor) = processor {
        command.args(["taskset", "--cpu-list", &processor.0.to_string()]);
    }
    command.arg(program);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_spread_over_the_processors() {
        // No other test of this program has a machine.
        let allowed = sched_getaffinity(None).unwrap();
        let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let mut all: Vec<Processor> = usable.iter().map(|_| Processor::take().unwrap()).collect();
        assert_eq!(all.iter().map(|processor| processor.0).collect::<Vec<_>>(), usable);
        let last = all.pop().map(|processor| processor.0);
        assert_eq!(Some(Processor::take().unwrap().0), last);
    }
}
