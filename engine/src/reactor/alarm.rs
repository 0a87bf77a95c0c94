//! Timers of a ring that end its waits, so that most waits need no time-out of their own.
//!
//! A time-out given with a wait makes the kernel set up and take down a timer for each turn, which a lone
//! write pays four times. A timer operation stays from turn to turn, and completes like any other: a wait
//! that ends with `want` completions also ends with `want` timers. All timers that are set have one time.
//!
//! Invariant: [`Alarm::plan`] lets a wait go without a time-out only if as many timers as it wants
//! completions are set, none of them later than its deadline. Whatever else is asked for, the wait gets a
//! time-out.
//!
//! Never does: setting a timer. It says what to set; the ring does.

use crate::types::Nanos;

/// The most timers that are set at once. A wait for more completions gets a time-out.
const TIMERS_MAX: usize = 4;

/// How a wait is to end by the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// By timers, after so many more were set at [`Alarm::at`].
    Timers(usize),
    /// By a time-out of its own.
    Timeout,
}

/// Which timers are set.
#[derive(Debug)]
pub(super) struct Alarm {
    at: Nanos,
    set: usize,
    refused: bool,
}

impl Alarm {
    pub(super) fn new() -> Self {
        Self { at: Nanos(0), set: 0, refused: false }
    }

    /// When the timers end.
    pub(super) fn at(&self) -> Nanos {
        self.at
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.set == 0
    }

    /// How a wait for `want` completions that must end at `deadline` goes about it. What it says to set
    /// counts as set.
    pub(super) fn plan(&mut self, want: usize, deadline: Nanos) -> Plan {
        let later = self.set > 0 && deadline < self.at;
        if self.refused || later || want > TIMERS_MAX {
            return Plan::Timeout;
        }
        if self.set == 0 {
            self.at = deadline;
        }
        let more = want.saturating_sub(self.set);
        self.set += more;
        Plan::Timers(more)
    }

    /// A timer has completed, with what the kernel says of it. One that did not end by the clock was
    /// refused: kernels before 5.15 know no timers on this clock.
    pub(super) fn ended(&mut self, result: i32) {
        self.set = self.set.checked_sub(1).expect("a timer that ends was set");
        self.refused |= result != -libc::ETIME;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_has_as_many_timers_as_it_wants_completions() {
        let mut alarm = Alarm::new();
        assert_eq!(alarm.plan(1, Nanos(50)), Plan::Timers(1));
        assert_eq!(alarm.plan(1, Nanos(60)), Plan::Timers(0), "one that ends earlier will do");
        assert_eq!(alarm.plan(3, Nanos(70)), Plan::Timers(2));
        assert_eq!(alarm.at(), Nanos(50));
        alarm.ended(-libc::ETIME);
        assert_eq!(alarm.plan(3, Nanos(70)), Plan::Timers(1));
        for _ in 0..3 {
            alarm.ended(-libc::ETIME);
        }
        assert_eq!(alarm.plan(2, Nanos(70)), Plan::Timers(2));
        assert_eq!(alarm.at(), Nanos(70));
    }

    #[test]
    fn timers_that_end_too_late_or_are_too_few_are_not_relied_on() {
        let mut alarm = Alarm::new();
        assert_eq!(alarm.plan(TIMERS_MAX + 1, Nanos(50)), Plan::Timeout);
        assert_eq!(alarm.plan(TIMERS_MAX, Nanos(50)), Plan::Timers(TIMERS_MAX));
        assert_eq!(alarm.plan(1, Nanos(49)), Plan::Timeout);
        assert_eq!(alarm.plan(1, Nanos(50)), Plan::Timers(0));
    }

    #[test]
    fn a_kernel_that_refuses_timers_is_not_asked_again() {
        let mut alarm = Alarm::new();
        assert_eq!(alarm.plan(1, Nanos(50)), Plan::Timers(1));
        alarm.ended(-libc::EINVAL);
        assert_eq!(alarm.plan(1, Nanos(50)), Plan::Timeout);
    }
}
