//! Processes: spawned with their output in a file, ended by pid, waited for with a deadline.
//!
//! A process is signalled only if this harness holds it as its child, or if its pid comes from a
//! cluster's `cluster.json` and its command line still names that cluster's directory: a pid that the
//! kernel gave to somebody else in the meantime is left alone.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for the end of a process that was killed.
const DROP_LIMIT: Duration = Duration::from_secs(10);

/// A child of ours. Dropping it kills it, if it still runs, and reaps it.
pub struct Proc {
    child: Child,
    label: String,
    log: PathBuf,
    /// Length of the log before it wrote.
    from: u64,
}

impl Proc {
    /// Starts `command` with standard output and error appended to `log` and no standard input.
    ///
    /// # Errors
    /// Where the log cannot be opened or the program cannot be started.
    pub fn spawn(label: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open the log {}", log.display()))?;
        let from = out.metadata().with_context(|| format!("look at the log {}", log.display()))?.len();
        let err = out.try_clone().context("duplicate the log's descriptor")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::from(out))
            .stderr(Stdio::from(err))
            .spawn()
            .with_context(|| format!("start {label} ({})", shown(command)))?;
        Ok(Self { child, label: label.to_owned(), log: log.to_owned(), from })
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it is, for messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What it has written so far; not what a process before it wrote to the same log.
    #[must_use]
    pub fn output(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let own = usize::try_from(self.from).ok().and_then(|from| log.get(from..)).unwrap_or_default();
        String::from_utf8_lossy(own).into_owned()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// Where the kernel refuses to tell.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.label))
    }

    /// Sends a signal, unless it has ended.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_some() {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("send {signal:?} to {} (pid {})", self.label, self.pid()))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} (pid {}) still runs after {limit:?}; its log: {}",
                    self.label,
                    self.pid(),
                    self.log.display()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends `signal` and waits; kills it if that was not enough, and says so.
    ///
    /// # Errors
    /// If it had to be killed.
    pub fn end(&mut self, signal: Signal, grace: Duration) -> Result<ExitStatus> {
        self.signal(signal)?;
        match self.wait(grace) {
            Ok(status) => Ok(status),
            Err(reason) => {
                let _ = self.child.kill();
                let _ = self.child.wait();
                Err(reason.context(format!("{} did not end on {signal:?} and was killed", self.label)))
            }
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // A stopped process takes the kill as well. One that waits for a disk that hangs ends when the disk does,
        // which may be after us.
        let _ = self.child.kill();
        let _ = self.wait(DROP_LIMIT);
    }
}

/// What a finished command left.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The command line, for messages.
    pub shown: String,
}

impl Finished {
    /// Its exit code; -1 if a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Both outputs as one text, for searching in messages.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Itself, if the exit code is 0.
    ///
    /// # Errors
    /// With both outputs, otherwise.
    pub fn ok(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!(
            "{}: {}\nstdout: {}\nstderr: {}",
            self.shown,
            self.status,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// Runs a command to its end.
///
/// # Errors
/// Where it cannot be started, or still runs after `limit` (it is killed then).
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    let shown = shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {shown}"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("wait for {shown}"))? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{shown} still ran after {limit:?} and was killed");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let join = |reader: std::thread::JoinHandle<String>| {
        reader.join().map_err(|_| anyhow!("a reader of {shown} died"))
    };
    let (stdout, stderr) = (join(stdout)?, join(stderr)?);
    Ok(Finished { status, stdout, stderr, shown })
}

/// Runs a program with arguments; any exit code but 0 is an error.
///
/// # Errors
/// As [`run`] and [`Finished::ok`].
pub fn run_ok<S: AsRef<OsStr>>(program: &str, args: &[S], limit: Duration) -> Result<Finished> {
    run(Command::new(program).args(args), limit)?.ok()
}

/// True if `pid` runs (not a zombie) and its command line contains `needle`.
#[must_use]
pub fn pid_runs(pid: u32, needle: &str) -> bool {
    let Ok(cmdline) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    // A zombie's command line is empty, so it never contains the needle.
    String::from_utf8_lossy(&cmdline).contains(needle)
}

/// True if `pid` is stopped (SIGSTOP): it is there and answers nothing.
#[must_use]
pub fn pid_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command's name, which stands in parentheses and may hold anything.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}

/// Sends a signal to a process that is not our child, after checking that it is the one meant.
///
/// # Errors
/// If no process with that pid names `needle` on its command line, or the kernel refuses.
pub fn signal_pid(pid: u32, needle: &str, signal: Signal) -> Result<()> {
    if !pid_runs(pid, needle) {
        bail!("pid {pid} does not run a command with {needle:?}; nothing was signalled");
    }
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("{pid} is no pid"))?;
    kill_process(raw, signal).with_context(|| format!("send {signal:?} to pid {pid}"))
}

/// Finds a program in PATH and in the system directories that users' PATHs lack.
#[must_use]
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The first of `programs` that is not installed, as a reason to skip.
#[must_use]
pub fn missing(programs: &[&str]) -> Option<String> {
    programs.iter().find(|p| which(p).is_none()).map(|p| format!("{p} is not installed"))
}

/// True if we run as root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// The last part of a long text.
#[must_use]
pub fn tail(text: &str) -> String {
    const TAIL_LINES: usize = 60;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_signalled_only_if_its_command_line_is_the_expected_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut child =
            Proc::spawn("sleep", Command::new("sleep").arg("77.5"), &dir.path().join("log")).unwrap();
        assert!(signal_pid(child.pid(), "another-directory", Signal::KILL).is_err());
        assert!(child.exited().unwrap().is_none());
        // Until the child has called exec its command line is still ours.
        crate::wait::wait_until("exec", Duration::from_secs(5), || pid_runs(child.pid(), "77.5")).unwrap();
        signal_pid(child.pid(), "77.5", Signal::STOP).unwrap();
        crate::wait::wait_until("the stop", Duration::from_secs(5), || pid_stopped(child.pid())).unwrap();
        signal_pid(child.pid(), "77.5", Signal::KILL).unwrap();
        assert!(child.wait(Duration::from_secs(5)).unwrap().code().is_none());
        assert!(!pid_runs(child.pid(), "77.5"));
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_named() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("sleep 60"), "{error}");
    }

    #[test]
    fn a_failed_command_shows_both_outputs() {
        let error =
            run_ok("sh", &["-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(5)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("out") && text.contains("err"), "{text}");
    }
}
