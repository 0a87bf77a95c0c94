//! CPU time that processes have used, from `/proc`.
//!
//! `/proc/PID/task/*/schedstat` counts nanoseconds, but only of threads that are there; `/proc/PID/stat`
//! counts threads that have ended, too, but in clock ticks. A difference is taken from the first, thread by
//! thread, so that the end of one takes nothing off what the others have used; unless the second has moved on
//! by more than its own coarseness further.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::client::NbdError;

/// Clock ticks per second in `/proc`: fixed by the kernel's interface on all architectures of today.
const TICKS_PER_SECOND: u64 = 100;
/// Ticks by which `stat` may differ without meaning anything: one at each end, of user and of system time.
const TICKS_COARSE: u64 = 4;

/// CPU time of some processes at one moment, in both countings, per process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSample(Vec<ProcessSample>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct ProcessSample {
    /// Nanoseconds by thread; none where the kernel does not count them.
    threads: BTreeMap<u32, u64>,
    ticks: u64,
}

/// Reads the CPU time of some processes.
#[derive(Clone, Debug)]
pub struct CpuMeter {
    pids: Vec<u32>,
}

impl CpuMeter {
    /// For these processes and those children that they have at this moment (some servers fork one for each
    /// connection); there may be none.
    ///
    /// # Errors
    /// [`NbdError::Usage`] if one of them does not run.
    pub fn new(pids: &[u32]) -> Result<Self, NbdError> {
        let children = pids.iter().flat_map(|&pid| children_of(pid)).filter(|child| !pids.contains(child));
        let meter = Self { pids: pids.iter().copied().chain(children).collect() };
        meter.sample()?;
        Ok(meter)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pids.is_empty()
    }

    /// What they have used so far.
    ///
    /// # Errors
    /// [`NbdError::Usage`] if one of them does not run any more.
    pub fn sample(&self) -> Result<CpuSample, NbdError> {
        self.pids.iter().map(|&pid| sample_of(pid)).collect::<Result<_, _>>().map(CpuSample)
    }
}

impl CpuSample {
    /// CPU time of all processes between the two.
    #[must_use]
    pub fn since(&self, before: &Self) -> Duration {
        self.0.iter().zip(&before.0).map(|(now, before)| now.since(before)).sum()
    }
}

impl ProcessSample {
    fn since(&self, before: &Self) -> Duration {
        let ticks = self.ticks.saturating_sub(before.ticks);
        let used = |(thread, now): (&u32, &u64)| {
            now.saturating_sub(before.threads.get(thread).copied().unwrap_or(0))
        };
        let nanos: u64 = self.threads.iter().map(used).sum();
        let nanos_of = |ticks: u64| ticks * (1_000_000_000 / TICKS_PER_SECOND);
        let is_whole = !self.threads.is_empty() && nanos >= nanos_of(ticks.saturating_sub(TICKS_COARSE));
        Duration::from_nanos(if is_whole { nanos } else { nanos_of(ticks) })
    }
}

fn sample_of(pid: u32) -> Result<ProcessSample, NbdError> {
    let gone = || NbdError::Usage(format!("no process {pid} whose CPU time could be read"));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|_| gone())?;
    let ticks = ticks_in(&stat).ok_or_else(gone)?;
    Ok(ProcessSample { threads: threads_of(pid), ticks })
}

/// Children of a process; none where the kernel does not list them.
fn children_of(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// User and system time in a line of `stat`; the name in it stands in parentheses and may hold anything.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    // Fields 14 and 15 of the line; the first after the name is field 3.
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system) = (fields.next()?.parse::<u64>().ok()?, fields.next()?.parse::<u64>().ok()?);
    Some(user + system)
}

/// Time of each thread that is there, but for those that have used none.
fn threads_of(pid: u32) -> BTreeMap<u32, u64> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return BTreeMap::new() };
    let time_of = |task: std::io::Result<fs::DirEntry>| {
        let task = task.ok()?;
        let thread = task.file_name().to_str()?.parse().ok()?;
        // A thread may end while the list is read.
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some((thread, text.split_whitespace().next()?.parse().ok()?))
    };
    tasks.filter_map(time_of).filter(|(_, nanos)| *nanos > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 17 5 0 0 20 0 1 0 100 1 1";
        assert_eq!(ticks_in(line), Some(22));
        assert_eq!(ticks_in("42 nothing"), None);
    }

    #[test]
    fn the_time_of_threads_that_ended_is_not_lost() {
        let sample = |threads: &[(u32, u64)], ticks| ProcessSample {
            threads: threads.iter().copied().collect(),
            ticks,
        };
        let before = sample(&[(1, 5_000_000)], 10);
        let fine = sample(&[(1, 25_000_000)], 12);
        assert_eq!(fine.since(&before), Duration::from_millis(20));
        let ended = sample(&[(1, 6_000_000)], 110);
        assert_eq!(ended.since(&before), Duration::from_secs(1));
        let coarse = sample(&[], 12);
        assert_eq!(coarse.since(&before), Duration::from_millis(20));
        // What one had used before it ended is nothing that the others have not.
        let two = sample(&[(1, 5_000_000), (2, 300_000_000)], 10);
        assert_eq!(sample(&[(1, 8_000_000), (3, 1_000_000)], 10).since(&two), Duration::from_millis(4));
    }

    #[test]
    fn own_work_is_seen_and_strangers_are_refused() {
        let meter = CpuMeter::new(&[std::process::id()]).unwrap();
        let before = meter.sample().unwrap();
        let mut random = super::super::job::Random::new(1);
        while meter.sample().unwrap().since(&before) < Duration::from_millis(5) {
            std::hint::black_box((0..10_000).map(|_| random.next()).fold(0, u64::wrapping_add));
        }
        assert!(matches!(CpuMeter::new(&[u32::MAX]), Err(NbdError::Usage(_))));
    }
}
