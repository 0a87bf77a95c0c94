//! A running machine: its processes on this one, ended together, and the serial line over which it takes commands.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

/// Longest wait for the end of processes that were killed.
const KILL_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// The machine. Dropping it cuts its power.
pub(super) struct Machine {
    child: Child,
    requests: ChildStdin,
    // After the machine, whose processes it would end.
    _leash: Leash,
}

impl Machine {
    /// Starts `command` in a process group of its own; what it says goes to `console`.
    pub(super) fn start(command: &mut Command, console: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(console);
        let log = log.with_context(|| format!("open {}", console.display()))?;
        let err = log.try_clone().context("duplicate a log's descriptor")?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::piped()).stdout(log).stderr(err).process_group(0);
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        let requests = child.stdin.take().ok_or_else(|| anyhow!("no pipe to {program}"));
        let ready = requests.and_then(|requests| Ok((requests, Leash::new(child.id())?)));
        match ready {
            Ok((requests, leash)) => Ok(Self { child, requests, _leash: leash }),
            Err(reason) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(reason)
            }
        }
    }

    /// Tells the agent in it that a command waits.
    pub(super) fn request(&mut self, line: &str) -> Result<()> {
        self.requests.write_all(line.as_bytes()).context("write to the machine's serial line")
    }

    /// Its exit status, if it has ended.
    pub(super) fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("wait for a machine")
    }

    /// Waits until it ends by itself.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the machine still runs after {limit:?}");
            std::thread::sleep(POLL);
        }
    }

    /// Ends all of its processes at once, and waits until none of them runs.
    pub(super) fn kill(&mut self) -> Result<()> {
        // Its first process is not reaped before, so the group's number is nobody else's.
        if self.exited()?.is_none() {
            let group = Pid::from_child(&self.child);
            kill_process_group(group, Signal::KILL).context("kill a machine")?;
        }
        self.wait(KILL_LIMIT)?;
        let (group, deadline) = (self.child.id(), Instant::now() + KILL_LIMIT);
        while group_runs(group) {
            if Instant::now() >= deadline {
                bail!("processes of the machine (group {group}) still run after {KILL_LIMIT:?}");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Ends a machine whose owner was killed, and so could not do it: its pipe closes then.
struct Leash(Child);

impl Leash {
    fn new(group: u32) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r line; kill -s KILL -- \"-$0\" 2>/dev/null"]).arg(group.to_string());
        // Whoever ends the owner's process group is not to end this first.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Ok(Self(command.spawn().context("start a machine's leash")?))
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// True if a process of that group runs; one that has ended and waits for its parent does not.
fn group_runs(group: u32) -> bool {
    let group = group.to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok()).any(|stat| {
        // State, parent and group follow the command's name, which may hold anything, in parentheses.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let mut fields = rest.split_whitespace();
        let runs = !matches!(fields.next(), Some("Z" | "X") | None);
        runs && fields.nth(1) == Some(group.as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_processes_of_a_machine_end_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 71 & sleep 72 & read line; echo \"got $line\"; wait"]);
        let console = dir.path().join("console");
        let mut machine = Machine::start(&mut command, &console).unwrap();
        machine.request("7 1\n").unwrap();
        let said = || fs::read_to_string(&console).unwrap_or_default().contains("got 7 1");
        crate::wait::wait_until("the request", Duration::from_secs(10), said).unwrap();
        let group = machine.child.id();
        assert!(group_runs(group));
        machine.kill().unwrap();
        assert!(!group_runs(group));
    }

    #[test]
    fn a_machine_without_its_owner_ends() {
        let mut sleeper = Command::new("sleep").arg("73").process_group(0).spawn().unwrap();
        let mut leash = Leash::new(sleeper.id()).unwrap();
        drop(leash.0.stdin.take());
        let ended = || sleeper.try_wait().unwrap().is_some();
        crate::wait::wait_until("the end", Duration::from_secs(10), ended).unwrap();
    }
}
