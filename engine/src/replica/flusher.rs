//! Flushes of the local data object, shared: everyone who asks before a flush starts is served by it.
//!
//! A ticket stands for "everything completed on the data object when I asked is stable". A flush in
//! flight when the ticket was made does not redeem it: it may have begun before the write completed.

/// See the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FlushTicket(u64);

/// Counts flushes; at most one is in flight.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    started: u64,
    completed: u64,
    wanted: bool,
}

impl Flusher {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Asks for a flush that starts from now on.
    pub(super) fn request(&mut self) -> FlushTicket {
        self.wanted = true;
        FlushTicket(self.started + 1)
    }

    pub(super) fn redeemed(&self, ticket: FlushTicket) -> bool {
        self.completed >= ticket.0
    }

    /// True if a flush has to be put out now; it then counts as started.
    pub(super) fn poll_start(&mut self) -> bool {
        let start = self.wanted && self.started == self.completed;
        if start {
            self.wanted = false;
            self.started += 1;
        }
        start
    }

    pub(super) fn handle_done(&mut self) {
        assert!(self.completed < self.started, "flush completed that was not started");
        self.completed = self.started;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flush_in_flight_does_not_cover_what_completed_after_it_began() {
        let mut flusher = Flusher::new();
        let first = flusher.request();
        assert!(flusher.poll_start());
        let second = flusher.request();
        assert!(!flusher.poll_start(), "one at a time");
        flusher.handle_done();
        assert!(flusher.redeemed(first) && !flusher.redeemed(second));
        assert!(flusher.poll_start());
        flusher.handle_done();
        assert!(flusher.redeemed(second));
        assert!(!flusher.poll_start());
    }

    proptest! {
        /// Time is counted in steps. A ticket is redeemed exactly if a flush that began after it was asked for
        /// is over; at most one flush is in flight, and none starts that nobody waits for.
        #[test]
        fn a_ticket_is_redeemed_exactly_by_a_flush_that_began_after_it(
            steps in prop::collection::vec(0u8..3, 1..60)
        ) {
            let mut flusher = Flusher::new();
            let (mut asked, mut over): (Vec<(usize, FlushTicket)>, Vec<usize>) = (Vec::new(), Vec::new());
            let mut in_flight = None;
            for (now, step) in steps.into_iter().enumerate() {
                match step {
                    0 => asked.push((now, flusher.request())),
                    1 => {
                        let served = |at: usize| over.iter().chain(&in_flight).any(|start| *start > at);
                        let waits = asked.iter().any(|(at, _)| !served(*at));
                        prop_assert_eq!(flusher.poll_start(), waits && in_flight.is_none());
                        in_flight = in_flight.or(waits.then_some(now));
                    }
                    _ => if let Some(start) = in_flight.take() {
                        flusher.handle_done();
                        over.push(start);
                    },
                }
                for (at, ticket) in &asked {
                    prop_assert_eq!(flusher.redeemed(*ticket), over.iter().any(|start| start > at));
                }
            }
        }
    }

    #[test]
    fn requests_before_the_start_share_one_flush() {
        let mut flusher = Flusher::new();
        assert_eq!(flusher.request(), flusher.request());
    }
}
