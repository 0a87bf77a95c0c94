//! Waiting for a condition of another process: polled, with a deadline and a text that says what was
//! waited for. Never sleeps blindly for a fixed time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Polls `look` until it yields a value.
///
/// # Errors
/// After `limit`, naming `what` and the last reason that `look` gave.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let reason = match look() {
            Ok(value) => return Ok(value),
            Err(reason) => reason,
        };
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}; at last: {reason:#}");
        }
        std::thread::sleep(POLL);
    }
}

/// Polls until `look` is true.
///
/// # Errors
/// After `limit`, naming `what`.
pub fn wait_until(what: &str, limit: Duration, mut look: impl FnMut() -> bool) -> Result<()> {
    wait_for(what, limit, || if look() { Ok(()) } else { bail!("not so") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_reason_is_told_after_the_deadline() {
        let mut seen = 0;
        let got = wait_for::<()>("a number", Duration::from_millis(120), || {
            seen += 1;
            bail!("look {seen}")
        });
        let text = format!("{:#}", got.unwrap_err());
        assert!(text.contains("a number") && text.contains("look "), "{text}");
        assert!(seen >= 2);
    }
}
