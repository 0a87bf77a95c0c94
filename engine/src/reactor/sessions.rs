//! Which connections of a client session are the latest.
//!
//! A client that keeps a device over the loss of a connection sends what was unanswered again, on another one. What
//! it had sent before may still be on its way, or lie unread in a socket here, and would undo what the client wrote
//! after the replay. A client session stops that: its connections share a name and say of which generation they
//! are, the client goes on with one generation only when it has given up those before it, and once a connection of
//! a generation was taken, nothing of an earlier one starts any more. That needs no clock, and holds however late
//! the first copy comes.
//!
//! Pure: numbers in, a verdict out. Never does: closing a connection.

use super::client::ClientSession;

/// Sessions that are remembered, so that a connection of an earlier generation that is handed over late is known as
/// one. More clients than this do not come back to a volume within the time that a hand-over takes.
const SESSIONS_MAX: usize = 64;

/// The client sessions of a volume.
#[derive(Debug, Default)]
pub(super) struct ClientSessions {
    /// The latest generation of each. The one joined last is at the end.
    latest: Vec<ClientSession>,
}

impl ClientSessions {
    /// A connection comes. False if one of a later generation of its session came before it: this one was given up.
    pub(super) fn join(&mut self, session: ClientSession) -> bool {
        let known = self.latest.iter().position(|known| known.id == session.id);
        if let Some(at) = known {
            if self.latest[at].generation > session.generation {
                return false;
            }
            self.latest.remove(at);
        } else if self.latest.len() >= SESSIONS_MAX {
            self.latest.remove(0);
        }
        self.latest.push(session);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: u128, generation: u64) -> ClientSession {
        ClientSession { id, generation }
    }

    #[test]
    fn an_earlier_generation_is_given_up() {
        let mut sessions = ClientSessions::default();
        assert!(sessions.join(session(1, 5)));
        assert!(sessions.join(session(1, 5)), "connections of one generation stand side by side");
        assert!(sessions.join(session(2, 1)), "another client");
        assert!(sessions.join(session(1, 6)));
        assert!(!sessions.join(session(1, 5)));
        assert!(sessions.join(session(1, 6)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut sessions = ClientSessions::default();
        for id in 0..1000 {
            assert!(sessions.join(session(id, 9)));
            assert!(sessions.join(session(0, 9)), "one that comes back stays");
        }
        assert_eq!(sessions.latest.len(), SESSIONS_MAX);
        assert!(!sessions.join(session(0, 8)));
        assert!(!sessions.join(session(999, 8)));
    }
}
