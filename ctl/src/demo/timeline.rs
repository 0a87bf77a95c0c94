//! What the demo saw: events with times, measured numbers, and what had to hold.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Collects and, unless JSON is wanted, prints as it goes.
pub struct Timeline {
    start: Instant,
    quiet: bool,
    result: DemoResult,
}

/// `demo --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DemoResult {
    /// Everything that had to hold held.
    pub ok: bool,
    /// What happened when.
    pub timeline: Vec<Entry>,
    /// What had to hold.
    pub checks: Vec<Check>,
    /// Numbers.
    pub measured: Measured,
}

/// One line of the timeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Seconds since the start.
    pub at_s: f64,
    /// What.
    pub text: String,
}

/// One thing that had to hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What.
    pub text: String,
    /// Whether it did.
    pub held: bool,
}

/// Measured numbers; `null` until measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Bytes of FILE.
    pub file_bytes: u64,
    /// From SIGKILL to the first write acknowledged by the new primary, milliseconds.
    pub service_again_ms: Option<u64>,
    /// From the restart of the old primary until it was in sync, milliseconds.
    pub rejoin_ms: Option<u64>,
    /// Bytes written while one replica was away, and in flight when it died.
    pub changed_bytes: Option<u64>,
    /// Bytes that the resync moved.
    pub moved_bytes: Option<u64>,
    /// Longest pause that a writing client saw around the move, milliseconds.
    pub move_stall_ms: Option<u64>,
    /// The same client's longest pause in a quiet time, for comparison, milliseconds.
    pub quiet_stall_ms: Option<u64>,
}

impl Timeline {
    /// Starts the clock.
    pub fn new(quiet: bool) -> Self {
        Self { start: Instant::now(), quiet, result: DemoResult::default() }
    }

    /// Notes what happened just now.
    pub fn note(&mut self, text: impl Into<String>) {
        self.note_at(Instant::now(), text);
    }

    /// Notes what happened at `at`.
    pub fn note_at(&mut self, at: Instant, text: impl Into<String>) {
        let entry = Entry { at_s: at.duration_since(self.start).as_secs_f64(), text: text.into() };
        if !self.quiet {
            println!("{:8.3} s  {}", entry.at_s, entry.text);
        }
        self.result.timeline.push(entry);
    }

    /// Notes something that has to hold.
    pub fn check(&mut self, held: bool, text: impl Into<String>) {
        let text = text.into();
        if !self.quiet {
            println!("{}  {text}", if held { "      held" } else { "NOT   held" });
        }
        self.result.checks.push(Check { text, held });
    }

    /// The numbers, to be filled in.
    pub fn measured(&mut self) -> &mut Measured {
        &mut self.result.measured
    }

    /// Ends: everything has to have been checked by now.
    pub fn finish(mut self) -> DemoResult {
        self.result.ok = !self.result.checks.is_empty() && self.result.checks.iter().all(|c| c.held);
        self.result
    }
}

/// Whole milliseconds.
pub fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_well_only_if_every_check_held_and_there_was_one() {
        assert!(!Timeline::new(true).finish().ok);
        let mut t = Timeline::new(true);
        t.check(true, "a");
        assert!(t.finish().ok);
        let mut t = Timeline::new(true);
        t.check(true, "a");
        t.check(false, "b");
        assert!(!t.finish().ok);
    }
}
