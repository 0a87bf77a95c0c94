//! How much a resync does at once, so that clients keep within their latency budget.
//!
//! The volume's one knob is the setting `resync_latency_budget`: while a replica is resynced, at most one
//! client request in a hundred should take longer. What may be in flight shrinks by half when more do and grows by
//! one chunk when no more do, as congestion control does (additive increase, multiplicative decrease: Chiu and
//! Jain, 1989). It never goes below one chunk a tick, so that a resync ends whatever the clients do; without
//! clients it goes up to the whole window.
//!
//! It never decides what is copied, only when the next piece may begin.

use std::time::Duration;

use crate::types::Nanos;

/// How often what may be in flight is judged.
const INTERVAL: Duration = Duration::from_millis(100);
/// Without a request for so long clients count as idle. Also the longest time to wait for enough answers to
/// judge by.
const IDLE_AFTER: Duration = Duration::from_secs(1);
/// Answers that tell how late one in a hundred is.
const ANSWERS_MIN: u32 = 100;
/// Chunks in flight when clients come back, or are there when a resync begins.
const START: usize = 2;

/// See the module's head.
#[derive(Debug)]
pub(super) struct Budget {
    /// Chunks that may be in flight. 0: one may begin a tick.
    limit: usize,
    /// Answers since the last judgement, and how many of them exceeded the budget.
    answers: u32,
    late: u32,
    judged: Nanos,
    /// When a client's request came last.
    asked: Option<Nanos>,
}

impl Budget {
    pub(super) fn new(now: Nanos) -> Self {
        Self { limit: usize::MAX, answers: 0, late: 0, judged: now, asked: None }
    }

    /// A client's request has come.
    pub(super) fn asked(&mut self, now: Nanos) {
        if self.is_idle(now) {
            self.limit = self.limit.min(START);
            self.judge_from(now);
        }
        self.asked = Some(now);
    }

    /// A client's request took `latency`, of at most `budget`.
    pub(super) fn answered(&mut self, latency: Duration, budget: Duration) {
        self.answers = self.answers.saturating_add(1);
        self.late = self.late.saturating_add(u32::from(latency > budget));
    }

    /// A resync begins: what was seen before says nothing of it.
    pub(super) fn begin(&mut self, now: Nanos) {
        self.limit = if self.is_idle(now) { usize::MAX } else { START };
        self.judge_from(now);
    }

    /// Time has passed. `window`: chunks that may be in flight at most; `waiting`: a client's request waits.
    pub(super) fn tick(&mut self, now: Nanos, window: usize, waiting: bool) {
        let elapsed = now.since(self.judged);
        if elapsed < INTERVAL {
            return;
        }
        let late = self.late > self.answers.max(ANSWERS_MIN) / 100;
        let few_in_time = self.answers > 0 && self.late == 0 && elapsed >= IDLE_AFTER;
        let limit = self.limit.min(window);
        self.limit = if late {
            limit / 2
        } else if self.answers >= ANSWERS_MIN || few_in_time {
            limit + 1
        } else if self.answers == 0 && !waiting && self.is_idle(now) {
            limit.max(1) * 2
        } else {
            return; // too little is known yet
        };
        self.judge_from(now);
    }

    /// Chunks that may be in flight, of at most `window`; 0: one may begin now and then.
    pub(super) fn limit(&self, window: usize) -> usize {
        self.limit.min(window)
    }

    fn is_idle(&self, now: Nanos) -> bool {
        self.asked.is_none_or(|at| now.since(at) >= IDLE_AFTER)
    }

    fn judge_from(&mut self, now: Nanos) {
        (self.judged, self.answers, self.late) = (now, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(10);
    const WINDOW: usize = 16;

    fn at(millis: u64) -> Nanos {
        Nanos(millis * 1_000_000)
    }

    /// Lets `answers` requests be answered each 100 ms from `from` on, `late` of them too late, `times` times.
    fn load(budget: &mut Budget, from: u64, times: u64, answers: u32, late: u32) {
        for step in 0..times {
            let now = from + step * 100;
            for n in 0..answers {
                budget.asked(at(now));
                let latency = if n < late { BUDGET * 2 } else { BUDGET };
                budget.answered(latency, BUDGET);
            }
            budget.tick(at(now + 100), WINDOW, false);
        }
    }

    #[test]
    fn without_clients_the_whole_window_is_used() {
        let mut budget = Budget::new(at(5000));
        budget.begin(at(5000));
        assert_eq!(budget.limit(WINDOW), WINDOW);
        budget.tick(at(6000), WINDOW, false);
        assert_eq!(budget.limit(WINDOW), WINDOW);
    }

    #[test]
    fn clients_that_come_back_find_little_in_their_way() {
        let mut budget = Budget::new(at(5000));
        budget.begin(at(5000));
        budget.asked(at(5001));
        assert_eq!(budget.limit(WINDOW), START);
    }

    #[test]
    fn requests_in_time_let_it_grow_by_one_late_ones_halve_it() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 4, 200, 2);
        assert_eq!(budget.limit(WINDOW), START + 4, "one in a hundred may be late");
        load(&mut budget, 5400, 1, 200, 3);
        assert_eq!(budget.limit(WINDOW), (START + 4) / 2);
    }

    #[test]
    fn it_goes_down_to_one_chunk_a_tick_and_comes_back() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 5, 10, 10);
        assert_eq!(budget.limit(WINDOW), 0);
        load(&mut budget, 5500, 3, 200, 0);
        assert_eq!(budget.limit(WINDOW), 3);
    }

    #[test]
    fn few_answers_are_gathered_before_it_grows_but_not_for_ever() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 9, 5, 0);
        assert_eq!(budget.limit(WINDOW), START, "45 answers tell nothing of one in a hundred");
        load(&mut budget, 5900, 1, 5, 0);
        assert_eq!(budget.limit(WINDOW), START + 1);
    }

    #[test]
    fn one_late_answer_of_few_is_no_sign() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 1, 10, 1);
        assert_eq!(budget.limit(WINDOW), START);
    }

    #[test]
    fn the_few_answers_of_a_slow_client_are_gathered_until_two_are_late() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 8, 0, 0);
        for second in 0..6 {
            load(&mut budget, 6000 + second * 900, 1, 1, 1);
            assert!(budget.limit(WINDOW) <= START, "it never grows, with every answer late");
        }
        assert_eq!(budget.limit(WINDOW), 0);
    }

    #[test]
    fn a_request_that_hangs_is_no_sign_of_idle_clients() {
        let mut budget = Budget::new(at(5000));
        budget.asked(at(5000));
        for tick in 0..100 {
            budget.tick(at(5000 + tick * 50), WINDOW, true);
        }
        assert_eq!(budget.limit(WINDOW), START);
    }

    #[test]
    fn what_was_never_used_is_not_saved_up() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 100, 200, 0);
        load(&mut budget, 15_000, 1, 200, 100);
        assert_eq!(budget.limit(WINDOW), WINDOW / 2);
    }

    #[test]
    fn when_clients_fall_silent_it_doubles_up_to_the_window() {
        let mut budget = Budget::new(at(5000));
        load(&mut budget, 5000, 5, 10, 10);
        for tick in 0..40 {
            budget.tick(at(5500 + tick * 50), WINDOW, false);
        }
        assert_eq!(budget.limit(WINDOW), WINDOW);
    }
}
