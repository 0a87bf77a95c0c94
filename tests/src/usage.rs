//! What a process uses, as the kernel counts it in `/proc/PID`: memory and processor time.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

/// Bytes resident of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it (`VmRSS`).
    pub resident: u64,
    /// The most there ever was (`VmHWM`).
    pub peak: u64,
    /// What is the process's own (`RssAnon`): heap, stacks, buffers; not its program, nor shared mappings.
    pub own: u64,
}

impl Memory {
    /// Of a process that runs.
    ///
    /// # Errors
    /// If it does not.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Self::parse(&text).ok_or_else(|| anyhow!("{path} does not say what is resident"))
    }

    /// Lets the peak of a process begin anew at what is resident.
    ///
    /// # Errors
    /// If it does not run, or is another user's.
    pub fn reset_peak(pid: u32) -> Result<()> {
        let path = format!("/proc/{pid}/clear_refs");
        fs::write(&path, "5").with_context(|| format!("write {path}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = |key: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            rest.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
        };
        Some(Self { resident: bytes("VmRSS")?, peak: bytes("VmHWM")?, own: bytes("RssAnon")? })
    }
}

/// Processor time that the threads of a process have used so far; those that have ended do not count.
///
/// # Errors
/// If it does not run.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let dir = format!("/proc/{pid}/task");
    let mut nanos = 0;
    for task in fs::read_dir(&dir).with_context(|| format!("list {dir}"))? {
        // A thread may end in between.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanos += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_their_lines() {
        let text = "Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t  1000 kB\nRssAnon:\t     500 kB\n";
        let expected = Memory { resident: 1000 << 10, peak: 2000 << 10, own: 500 << 10 };
        assert_eq!(Memory::parse(text), Some(expected));
        assert_eq!(Memory::parse("Name:\tzombie\n"), None);
        assert!(Memory::of(std::process::id()).unwrap().resident > 1 << 20);
        assert!(cpu_time(std::process::id()).unwrap() > Duration::ZERO);
    }
}
