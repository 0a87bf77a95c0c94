//! What a test has to tell beside pass and fail: that it could not run here, and what it measured.
//!
//! Both go straight to standard error, past the capture of the test runner, and as lines to the file
//! that `BLKREPL_REPORT` names, where `tests/run` counts them. Nothing is ever skipped silently, and
//! a measured time is printed, never asserted.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::time::Duration;

/// Says that `name` cannot run on this machine, and why. The caller returns right after.
pub fn skipped(name: &str, reason: &str) {
    emit(&format!("SKIPPED {name}: {reason}"));
}

/// Says that a part of `name` cannot be done on this machine, and why; the rest goes on.
pub fn skipped_part(name: &str, reason: &str) {
    emit(&format!("SKIPPED part of {name}: {reason}"));
}

/// Prints something that was measured.
pub fn measured(name: &str, text: &str) {
    emit(&format!("MEASURED {name}: {text}"));
}

/// Prints a step of a long test, so that a reader sees where it is.
pub fn step(name: &str, text: &str) {
    emit(&format!("STEP {name}: {text}"));
}

/// A duration as a reader wants it.
#[must_use]
pub fn human(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{:.1} ms", time.as_secs_f64() * 1e3)
    } else {
        format!("{:.2} s", time.as_secs_f64())
    }
}

fn emit(line: &str) {
    // One write call per line, so that lines of parallel tests do not mix. A closed standard error
    // must not fail a test.
    let text = format!("{line}\n");
    let _ = io::stderr().write_all(text.as_bytes());
    let Ok(path) = std::env::var("BLKREPL_REPORT") else {
        return;
    };
    if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(&path) {
        let _ = file.write_all(text.as_bytes());
    }
}
