//! The directory that a machine shares with this one, and the commands that go through it: `vm/N.cmd` is a command,
//! `vm/N.out`, `vm/N.err` and `vm/N.code` are what it left. The agent in the machine (`guest/agent.sh`) learns the
//! number and the limit over a serial line and answers with files, the exit code last.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::proc::Finished;

const AGENT: &str = include_str!("guest/agent.sh");
const SETUP: &str = include_str!("guest/setup.sh");
/// What `timeout` exits with: the command ended on the signal, or had to be killed.
const LATE: [i32; 2] = [124, 137];

/// A command that was given to a machine.
#[derive(Debug)]
pub struct Job {
    number: u32,
    pub(super) shown: String,
    pub(super) deadline: Instant,
    started: Instant,
    limit: Duration,
}

impl Job {
    /// What the agent is told.
    pub(super) fn request(&self) -> String {
        // Whole seconds, never less than the limit: what ends it then has run too long by either clock.
        let seconds = self.limit.as_millis().div_ceil(1000).max(1);
        format!("{} {seconds}\n", self.number)
    }
}

/// The directory.
pub(super) struct Share {
    dir: PathBuf,
    next: AtomicU32,
}

impl Share {
    /// Makes it, with the agent and a place for programs, which is in the machine's PATH.
    pub(super) fn new(dir: PathBuf) -> Result<Self> {
        for part in ["bin", "vm"] {
            fs::create_dir_all(dir.join(part)).with_context(|| format!("make {}", dir.display()))?;
        }
        fs::write(dir.join("vm/agent"), AGENT).context("write the machine's agent")?;
        fs::write(dir.join("vm/setup"), SETUP).context("write the machine's setup")?;
        Ok(Self { dir, next: AtomicU32::new(1) })
    }

    /// Where it is on this machine.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// True once the agent of the boot with that name reads commands.
    pub(super) fn is_ready(&self, boot: &str) -> bool {
        fs::read_to_string(self.dir.join("vm/ready")).is_ok_and(|text| text.trim() == boot)
    }

    /// Writes a command down. `grace` is what the machine may need beyond `limit` to tell that it was too late.
    pub(super) fn put(&self, command: &str, limit: Duration, grace: Duration) -> Result<Job> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (path, text) = (self.path(number, "cmd"), format!("{command}\n"));
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        let started = Instant::now();
        Ok(Job { number, shown: command.to_owned(), deadline: started + limit + grace, started, limit })
    }

    /// What a command left, once it has ended.
    pub(super) fn take(&self, job: &Job) -> Result<Option<Finished>> {
        let code = fs::read_to_string(self.path(job.number, "code")).unwrap_or_default();
        if !code.ends_with('\n') {
            return Ok(None);
        }
        let code: i32 = code.trim().parse().with_context(|| format!("an exit code, {code:?}"))?;
        let read = |part: &str| -> Result<String> {
            let path = self.path(job.number, part);
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (stdout, stderr) = (read("out")?, read("err")?);
        if LATE.contains(&code) && job.started.elapsed() >= job.limit {
            bail!("{} still ran after {:?}\nstdout: {stdout}\nstderr: {stderr}", job.shown, job.limit);
        }
        for part in ["cmd", "out", "err", "code"] {
            let _ = fs::remove_file(self.path(job.number, part));
        }
        // As a wait reports the exit code: in the second byte.
        let status = ExitStatus::from_raw(code << 8);
        Ok(Some(Finished { status, stdout, stderr, shown: job.shown.clone() }))
    }

    fn path(&self, number: u32, part: &str) -> PathBuf {
        self.dir.join(format!("vm/{number}.{part}"))
    }
}
