//! True time and what a node's clock makes of it.
//!
//! Every node has a clock of its own rate, within half of the 1 % that leases allow for, so that no two
//! drift apart by more. It counts from the boot of the machine, as CLOCK_BOOTTIME does: a power loss begins
//! it anew. Never runs backwards within a boot.

use blkrepl_engine::types::Nanos;

/// True time in nanoseconds since the start of the run.
pub(crate) type Time = u64;

pub(crate) const US: Time = 1_000;
pub(crate) const MS: Time = 1_000_000;
pub(crate) const S: Time = 1_000_000_000;
pub(crate) const NEVER: Time = Time::MAX;

/// Fastest and slowest clock, in parts per million: together below the 1 % that a lease allows for.
pub(crate) const DRIFT_PPM_MAX: i64 = 4_900;

/// One node's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    base: i64,
    ppm: i64,
}

impl Clock {
    /// A clock that shows `shows` at `now` and runs `ppm` parts per million too fast.
    pub(crate) fn new(now: Time, shows: Time, ppm: i64) -> Self {
        assert!(ppm.abs() <= DRIFT_PPM_MAX, "a clock beyond the promise");
        let mut clock = Self { base: 0, ppm };
        clock.base = signed(shows) - signed(clock.local(now).0);
        clock
    }

    /// The same clock after the machine has booted at `now`.
    pub(crate) fn rebooted(self, now: Time) -> Self {
        Self::new(now, S, self.ppm)
    }

    /// What it shows at a point in true time.
    pub(crate) fn local(&self, t: Time) -> Nanos {
        let t = signed(t);
        let shown = t + t / 1_000_000 * self.ppm + t % 1_000_000 * self.ppm / 1_000_000 + self.base;
        Nanos(u64::try_from(shown).unwrap_or(0))
    }

    /// The first point in true time, or hardly later, at which it shows `local`.
    pub(crate) fn when(&self, local: Nanos) -> Time {
        let wanted = i128::from(signed(local.0) - self.base);
        let mut t = u64::try_from(wanted * 1_000_000 / i128::from(1_000_000 + self.ppm)).unwrap_or(0);
        while self.local(t) < local {
            t += 1;
        }
        t
    }
}

fn signed(t: u64) -> i64 {
    i64::try_from(t).expect("a run is short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_and_its_inverse_agree() {
        for ppm in [-DRIFT_PPM_MAX, -1, 0, 333, DRIFT_PPM_MAX] {
            let clock = Clock::new(5 * S, 3 * S, ppm);
            assert_eq!(clock.local(5 * S), Nanos(3 * S));
            for t in [5 * S, 5 * S + 1, 7 * S + 12_345, 90 * S] {
                let local = clock.local(t);
                let back = clock.when(local);
                assert!(
                    clock.local(back) >= local && back <= t + 2 && back + 40 * MS > t,
                    "{ppm} {t} {back}"
                );
            }
        }
    }

    #[test]
    fn two_clocks_differ_by_less_than_a_lease_allows_for() {
        let fast = Clock::new(0, 0, DRIFT_PPM_MAX).local(1500 * MS).0;
        let slow = Clock::new(0, 0, -DRIFT_PPM_MAX).local(1500 * MS).0;
        assert!(fast * 100 < slow * 101);
    }
}
