//! How many calls of io_uring_enter a server makes per write, counted by perf while a load runs.
//!
//! In a run of its own, since counting costs something.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use blkrepl_nbd::bench::{BenchOptions, Job, run};
use blkrepl_tests::proc::missing;
use rustix::process::{Pid, Signal, kill_process};

use super::subject::Subject;

/// Writes of the run.
const WRITES: u64 = 50_000;
const DEPTH: usize = 32;
const EVENT: &str = "syscalls:sys_enter_io_uring_enter";
/// perf has attached itself by then.
const ATTACH: Duration = Duration::from_millis(500);

/// Calls per random write of 4 KiB at depth 32, of the subject's primary.
pub(super) fn per_write(subject: &Subject) -> Result<f64> {
    let pid = subject.primary.ok_or_else(|| anyhow!("it names no process"))?;
    if let Some(reason) = missing(&["perf"]) {
        bail!("{reason}");
    }
    let mut perf = Command::new("perf");
    perf.args(["stat", "-x", ",", "-e", EVENT, "-p", &pid.to_string()]);
    let perf = perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    std::thread::sleep(ATTACH);
    let options = BenchOptions {
        warm_up: Duration::ZERO,
        time: Duration::from_secs(60),
        count: Some(WRITES),
        destroys_data: true,
        ..BenchOptions::new(Job { read_percent: 0, ..Job::default() }, DEPTH)
    };
    let report = run(&subject.uri, &options);
    // perf prints its count when it is interrupted; it may have ended by itself.
    let _ = kill_process(Pid::from_child(&perf), Signal::INT);
    let output = perf.wait_with_output().context("wait for perf")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let calls = count_in(&text).with_context(|| format!("perf said: {}", text.trim()))?;
    let writes = report?.operations;
    ensure!(writes > 0, "nothing was written");
    Ok(calls / writes as f64)
}

/// The first field of the event's line.
fn count_in(text: &str) -> Option<f64> {
    text.lines().find(|line| line.contains(EVENT))?.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_perf_prints() {
        let text = "some warning\n1234,,syscalls:sys_enter_io_uring_enter,99,100.00,,\n";
        assert_eq!(count_in(text), Some(1234.0));
        assert_eq!(count_in("<not counted>,,syscalls:sys_enter_io_uring_enter,0\n"), None);
        assert_eq!(count_in(""), None);
    }
}
