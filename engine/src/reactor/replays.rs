//! Which requests of a client were replaced by their replay.
//!
//! A client that gives a connection up sends what was unanswered again, on another one. What it had sent before may
//! still be on its way, or lie unread in a socket here, and would undo what the client wrote after the replay. A
//! client session stops that: its connections share a name, each request has a slot that holds one request at a time
//! and says how often the slot was sent, and a request starts only while none that was sent later from its slot has.
//! That needs no clock and holds however late the first copy comes, also where the client replays on a connection
//! that was there before.
//!
//! Never does: closing a connection, or answering. What a slot and its count are, the codec knows
//! ([`ClientProtocol::turn`](super::client::ClientProtocol::turn)).

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::client::{ClientSessionId, Turn};

/// Sessions without a connection that are remembered, so that a copy on a connection that is handed over late is
/// known as one.
const FORSAKEN_MAX: usize = 64;
/// Most slots of a session: 16 connections with 1024 requests each. Linux has 128 to a connection.
const SLOTS_MAX: usize = 16 << 10;

/// What became of a request's claim to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is the latest of its slot.
    Latest,
    /// A later one of its slot has started: this is what the client has replaced.
    Replaced,
    /// The session has more slots than any client needs.
    TooManySlots,
}

/// The latest count of each slot of a session.
#[derive(Debug, Default)]
struct Slots {
    latest: HashMap<u32, u32>,
}

/// A session, as one of its connections has it.
#[derive(Clone, Debug)]
pub(super) struct Replays(Rc<RefCell<Slots>>);

impl Replays {
    /// Notes a request that is about to start, unless it was replaced.
    pub(super) fn claim(&self, turn: Turn) -> Claim {
        let mut slots = self.0.borrow_mut();
        let full = slots.latest.len() >= SLOTS_MAX;
        match slots.latest.get_mut(&turn.slot) {
            Some(latest) if turn.count == *latest || is_later(turn.count, *latest) => {
                *latest = turn.count;
                Claim::Latest
            }
            Some(_) => Claim::Replaced,
            None if full => Claim::TooManySlots,
            None => {
                slots.latest.insert(turn.slot, turn.count);
                Claim::Latest
            }
        }
    }
}

/// Counts wrap around: one is later than another if it is less than half the numbers ahead.
fn is_later(count: u32, than: u32) -> bool {
    (1..=u32::MAX / 2).contains(&count.wrapping_sub(than))
}

/// The client sessions of a volume.
#[derive(Debug, Default)]
pub(super) struct ClientSessions {
    /// The one joined last is at the end.
    sessions: Vec<(ClientSessionId, Replays)>,
}

impl ClientSessions {
    /// One more connection of a session.
    pub(super) fn join(&mut self, id: ClientSessionId) -> Replays {
        let known = self.sessions.iter().position(|(known, _)| *known == id);
        let replays = match known {
            Some(at) => self.sessions.remove(at).1,
            None => Replays(Rc::default()),
        };
        self.sessions.push((id, replays.clone()));
        self.forget();
        replays
    }

    /// Forgets the sessions that nobody has joined for longest, beyond a number.
    fn forget(&mut self) {
        let forsaken = |(_, replays): &(ClientSessionId, Replays)| Rc::strong_count(&replays.0) == 1;
        let mut over = self.sessions.iter().filter(|s| forsaken(s)).count().saturating_sub(FORSAKEN_MAX);
        self.sessions.retain(|session| {
            let goes = over > 0 && forsaken(session);
            over -= usize::from(goes);
            !goes
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(slot: u32, count: u32) -> Turn {
        Turn { slot, count }
    }

    #[test]
    fn what_was_replaced_does_not_start() {
        let mut sessions = ClientSessions::default();
        let (one, other) = (sessions.join(ClientSessionId(7)), sessions.join(ClientSessionId(7)));
        assert_eq!(one.claim(turn(3, 10)), Claim::Latest);
        assert_eq!(other.claim(turn(3, 11)), Claim::Latest, "the replay");
        assert_eq!(one.claim(turn(3, 10)), Claim::Replaced, "what it replaces comes late");
        assert_eq!(one.claim(turn(4, 10)), Claim::Latest, "another slot");
        assert_eq!(other.claim(turn(3, 11)), Claim::Latest, "the next piece of the same request");
        let strange = sessions.join(ClientSessionId(8));
        assert_eq!(strange.claim(turn(3, 1)), Claim::Latest, "another client");
    }

    #[test]
    fn counts_wrap_around() {
        let mut sessions = ClientSessions::default();
        let session = sessions.join(ClientSessionId(1));
        assert_eq!(session.claim(turn(0, u32::MAX)), Claim::Latest);
        assert_eq!(session.claim(turn(0, 0)), Claim::Latest);
        assert_eq!(session.claim(turn(0, u32::MAX)), Claim::Replaced);
    }

    #[test]
    fn a_session_is_remembered_without_connections() {
        let mut sessions = ClientSessions::default();
        assert_eq!(sessions.join(ClientSessionId(1)).claim(turn(0, 5)), Claim::Latest);
        let kept = sessions.join(ClientSessionId(2));
        for id in 3..3 + FORSAKEN_MAX as u128 - 1 {
            sessions.join(ClientSessionId(id));
        }
        assert_eq!(sessions.join(ClientSessionId(1)).claim(turn(0, 4)), Claim::Replaced);
        for id in 1000..1000 + 2 * FORSAKEN_MAX as u128 {
            sessions.join(ClientSessionId(id));
        }
        assert!(sessions.sessions.len() <= FORSAKEN_MAX + 2, "what is remembered is bounded");
        assert_eq!(kept.claim(turn(9, 9)), Claim::Latest);
        let again = sessions.join(ClientSessionId(2));
        assert_eq!(again.claim(turn(9, 8)), Claim::Replaced, "one with a connection is never forgotten");
    }

    #[test]
    fn slots_are_bounded() {
        let mut sessions = ClientSessions::default();
        let session = sessions.join(ClientSessionId(1));
        for slot in 0..SLOTS_MAX as u32 {
            assert_eq!(session.claim(turn(slot, 1)), Claim::Latest);
        }
        assert_eq!(session.claim(turn(SLOTS_MAX as u32, 1)), Claim::TooManySlots);
        assert_eq!(session.claim(turn(0, 2)), Claim::Latest);
    }
}
