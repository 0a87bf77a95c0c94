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

    #[test]
    fn requests_before_the_start_share_one_flush() {
        let mut flusher = Flusher::new();
        assert_eq!(flusher.request(), flusher.request());
    }
}
