//! How much of the machine's processor time was idle, from `/proc/stat`: with nothing idle, whoever is slower than
//! alone may simply lack a processor.

use std::fs;

use anyhow::{Context, Result};

const PATH: &str = "/proc/stat";

/// Clock ticks of all processors together since the machine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticks {
    idle: u64,
    all: u64,
}

impl Ticks {
    pub(super) fn now() -> Result<Self> {
        let text = fs::read_to_string(PATH).with_context(|| format!("read {PATH}"))?;
        Self::parse(&text).with_context(|| format!("{PATH} does not begin with the time of all processors"))
    }

    /// Idle counts, too, while something waits for a disk: a processor was to be had.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; what follows is part of the first two.
        let counted = fields.get(..8)?;
        Some(Self { idle: counted[3] + counted[4], all: counted.iter().sum() })
    }

    /// Percent that were idle from then to now; `None` if no tick has passed.
    pub(super) fn idle_since(self, then: Self) -> Option<f64> {
        let all = self.all.saturating_sub(then.all);
        // The kernel's count of idle time may go back a little.
        let idle = self.idle.saturating_sub(then.idle);
        (all > 0).then(|| 100.0 * idle as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_disk_is_idle_and_guests_are_not_counted_twice() {
        let then = Ticks::parse("cpu  10 0 10 50 10 5 5 10 99 99\ncpu0 1 2 3\n").unwrap();
        assert_eq!(then, Ticks { idle: 60, all: 100 });
        let now = Ticks { idle: 110, all: 300 };
        assert_eq!(now.idle_since(then), Some(25.0));
        assert_eq!(then.idle_since(then), None);
        assert_eq!(Ticks::parse("cpu0 1 2 3 4 5 6 7 8\n"), None);
        assert!(Ticks::now().unwrap().all > 0);
    }
}
