//! What clients do wrong, and what is refused them: a counter of each kind, and a log that nobody can fill.
//!
//! A kind and a client host have one line in [`PAUSE`]; it says how many more there were since the one before.
//! The counters hold all of them. Memory: one entry per kind and host, at most [`LINES_MAX`]; hosts beyond that
//! share one entry per kind.
//!
//! Never does: deciding what is wrong, or closing anything. A request that is fine does not come here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blkrepl_engine::reactor::client::{End, FrontRequest};

use crate::limits::{ClientHost, Connections, Full, Ticket};
use crate::proto::NbdErrno;

/// Shortest time between two lines of one kind about one client host.
const PAUSE: Duration = Duration::from_secs(10);
/// Most pairs of kind and client host that are told apart.
const LINES_MAX: usize = 256;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Accepted,
    RefusedAll,
    RefusedPerClient,
    RefusedDescriptors,
    RefusedVolume,
    HandshakeTimeout,
    HandshakeViolation,
    Violation,
    RequestPerm,
    RequestIo,
    RequestInval,
    RequestNoSpc,
    RequestNotSup,
    RequestShutdown,
    ClosedStalled,
    ClosedUnread,
    ClosedIdle,
}

impl Kind {
    /// Each with its name in the status, in the order of their numbers.
    const ALL: [(Self, &'static str); 17] = [
        (Self::Accepted, "accepted"),
        (Self::RefusedAll, "refused_connections_max"),
        (Self::RefusedPerClient, "refused_connections_per_client_max"),
        (Self::RefusedDescriptors, "refused_descriptors"),
        (Self::RefusedVolume, "refused_volume_max"),
        (Self::HandshakeTimeout, "handshake_timeouts"),
        (Self::HandshakeViolation, "handshake_violations"),
        (Self::Violation, "violations"),
        (Self::RequestPerm, "requests_eperm"),
        (Self::RequestIo, "requests_eio"),
        (Self::RequestInval, "requests_einval"),
        (Self::RequestNoSpc, "requests_enospc"),
        (Self::RequestNotSup, "requests_enotsup"),
        (Self::RequestShutdown, "requests_eshutdown"),
        (Self::ClosedStalled, "closed_stalled"),
        (Self::ClosedUnread, "closed_unread"),
        (Self::ClosedIdle, "closed_idle"),
    ];
}

/// The counters of a server, and what its log said lately.
#[derive(Debug)]
pub struct Misbehaviour {
    counts: [AtomicU64; Kind::ALL.len()],
    connections: Arc<Connections>,
    log: Mutex<Limiter>,
}

impl Misbehaviour {
    pub(crate) fn new(connections: Arc<Connections>) -> Arc<Self> {
        Arc::new(Self {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            connections,
            log: Mutex::default(),
        })
    }

    /// Connections that are open, and every counter since the start, by name.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let open = ("open".to_owned(), self.connections.open() as u64);
        let counted = Kind::ALL.iter().map(|(kind, name)| ((*name).to_owned(), self.count(*kind)));
        std::iter::once(open).chain(counted).collect()
    }

    pub(crate) fn count(&self, kind: Kind) -> u64 {
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    /// Counts one without a word.
    pub(crate) fn add(&self, kind: Kind) {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one, and tells of it if that was not done just now.
    pub(crate) fn note(&self, kind: Kind, host: ClientHost, text: impl FnOnce() -> String) {
        self.add(kind);
        let said = self.log.lock().unwrap_or_else(PoisonError::into_inner).say(kind, host, Instant::now());
        match said {
            Some(0) => tracing::warn!("{}", text()),
            Some(more) => {
                tracing::warn!("{} ({more} more of this kind from {host} since it was told last)", text());
            }
            None => {}
        }
    }

    /// A connection that there is no room for.
    pub(crate) fn full(&self, host: ClientHost, peer: &str, full: Full) {
        let kind = match full {
            Full::All(_) => Kind::RefusedAll,
            Full::Client(_) => Kind::RefusedPerClient,
        };
        self.note(kind, host, || format!("NBD client {peer} refused: {full}"));
    }
}

/// When which line was last written. Hosts beyond [`LINES_MAX`] have no name.
#[derive(Debug, Default)]
struct Limiter {
    lines: BTreeMap<(Option<ClientHost>, Kind), Line>,
}

#[derive(Debug)]
struct Line {
    at: Instant,
    held_back: u64,
}

impl Limiter {
    /// Whether to say it now: how many of the kind were held back since it was last said.
    fn say(&mut self, kind: Kind, host: ClientHost, now: Instant) -> Option<u64> {
        let mut key = (Some(host), kind);
        if !self.lines.contains_key(&key) && self.lines.len() >= LINES_MAX {
            self.lines.retain(|_, line| now.saturating_duration_since(line.at) < PAUSE);
            if self.lines.len() >= LINES_MAX {
                key.0 = None;
            }
        }
        match self.lines.get_mut(&key) {
            Some(line) if now.saturating_duration_since(line.at) < PAUSE => {
                line.held_back += 1;
                None
            }
            Some(line) => {
                line.at = now;
                Some(std::mem::take(&mut line.held_back))
            }
            None => {
                self.lines.insert(key, Line { at: now, held_back: 0 });
                Some(0)
            }
        }
    }
}

/// One client connection, as far as its place and its manners are concerned. Whoever serves the connection
/// owns this, and drops it when the connection has really ended.
#[derive(Debug)]
pub(crate) struct Guest {
    _ticket: Ticket,
    watch: Arc<Misbehaviour>,
    host: ClientHost,
    peer: String,
}

impl Guest {
    pub(crate) fn new(ticket: Ticket, watch: &Arc<Misbehaviour>, host: ClientHost, peer: String) -> Self {
        Self { _ticket: ticket, watch: Arc::clone(watch), host, peer }
    }

    fn note(&self, kind: Kind, what: impl FnOnce() -> String) {
        self.watch.note(kind, self.host, || format!("NBD client {} {}", self.peer, what()));
    }

    /// The handshake took too long.
    pub(crate) fn was_slow(&self, limit: Duration) {
        self.note(Kind::HandshakeTimeout, || format!("closed: its handshake was not done within {limit:?}"));
    }

    /// The client broke a rule of the handshake.
    pub(crate) fn broke_handshake(&self, text: &str) {
        self.note(Kind::HandshakeViolation, || format!("closed in its handshake: {text}"));
    }

    /// The client broke the protocol behind the handshake.
    pub(crate) fn broke_protocol(&self, text: &str) {
        self.note(Kind::Violation, || format!("closed: {text}"));
    }

    /// A request is answered with an error.
    pub(crate) fn was_refused(&self, request: &FrontRequest, error: NbdErrno) {
        let kind = match error {
            // Whatever is no fault of the client is told of where it happens.
            NbdErrno::Io => return self.watch.add(Kind::RequestIo),
            NbdErrno::Shutdown => return self.watch.add(Kind::RequestShutdown),
            // A client that asks for fast zeroes wants to know whether there are any.
            NbdErrno::NotSup => return self.watch.add(Kind::RequestNotSup),
            NbdErrno::Perm => Kind::RequestPerm,
            NbdErrno::NoSpc => Kind::RequestNoSpc,
            _ => Kind::RequestInval,
        };
        self.note(kind, || {
            let FrontRequest { op, offset, len, .. } = request;
            format!("has a request refused with {error}: {op:?} of {len} bytes at {offset}")
        });
    }

    /// Its connection is closed.
    pub(crate) fn was_closed(&self, end: End) {
        match end {
            End::Stalled => {
                self.note(Kind::ClosedStalled, || {
                    "closed: it takes no answers, or does not send what it announced".into()
                });
            }
            End::Unread => {
                self.note(Kind::ClosedUnread, || "closed: it could not be read for too long".into());
            }
            End::Idle => {
                self.note(Kind::ClosedIdle, || {
                    "closed: it asked nothing for too long (nbd.idle_timeout_s)".into()
                });
            }
            End::Full => {
                self.note(Kind::RefusedVolume, || {
                    "closed: its volume has as many connections as it takes".into()
                });
            }
            // A violation was noted when it was read.
            End::Client | End::Violation | End::Replaced | End::Server => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use blkrepl_engine::reactor::client::FrontOp;

    use super::*;
    use crate::limits::ConnectionLimits;

    fn host(n: u32) -> ClientHost {
        ClientHost::Remote(IpAddr::from((0x0a00_0000 + n).to_be_bytes()))
    }

    /// A server's counters, and a connection that they count.
    fn guest() -> (Arc<Misbehaviour>, Guest) {
        let connections = Connections::new(ConnectionLimits::default());
        let watch = Misbehaviour::new(Arc::clone(&connections));
        let ticket = connections.enter(ClientHost::Local).unwrap();
        let guest = Guest::new(ticket, &watch, ClientHost::Local, "test".into());
        (watch, guest)
    }

    #[test]
    fn each_kind_has_its_number_and_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Kind::ALL.iter().map(|(_, name)| name).collect();
        assert_eq!(names.len(), Kind::ALL.len());
        assert!(Kind::ALL.iter().enumerate().all(|(n, (kind, _))| *kind as usize == n));
    }

    #[test]
    fn a_kind_has_one_line_per_host_and_pause_which_says_how_many_there_were() {
        let (mut log, start) = (Limiter::default(), Instant::now());
        assert_eq!(log.say(Kind::Violation, host(1), start), Some(0));
        for _ in 0..1000 {
            assert_eq!(log.say(Kind::Violation, host(1), start + PAUSE / 2), None);
        }
        assert_eq!(log.say(Kind::ClosedIdle, host(1), start + PAUSE / 2), Some(0), "another kind");
        assert_eq!(log.say(Kind::Violation, host(2), start + PAUSE / 2), Some(0), "another host");
        assert_eq!(log.say(Kind::Violation, host(1), start + PAUSE), Some(1000));
        assert_eq!(log.say(Kind::Violation, host(1), start + PAUSE), None);
    }

    #[test]
    fn hosts_without_number_take_bounded_memory_and_few_lines() {
        let (mut log, start) = (Limiter::default(), Instant::now());
        let said = (0..100_000).filter(|n| log.say(Kind::Violation, host(*n), start).is_some()).count();
        assert_eq!((said, log.lines.len()), (LINES_MAX + 1, LINES_MAX + 1));
        // What is old makes room.
        assert_eq!(log.say(Kind::Violation, host(200_000), start + PAUSE), Some(0));
        assert_eq!(log.lines.len(), 1);
    }

    #[test]
    fn what_is_noted_is_counted_by_name() {
        let (watch, guest) = guest();
        guest.broke_protocol("garbage");
        guest.broke_protocol("garbage");
        guest.was_closed(End::Idle);
        guest.was_closed(End::Client);
        let counts = watch.counts();
        assert_eq!((counts["violations"], counts["closed_idle"], counts["closed_unread"]), (2, 1, 0));
        assert_eq!(counts.len(), Kind::ALL.len() + 1);
    }

    #[test]
    fn a_request_that_is_not_supported_is_counted_as_that_and_not_told_of() {
        let (watch, guest) = guest();
        let request = FrontRequest {
            handle: 1,
            op: FrontOp::WriteZeroes,
            offset: 0,
            len: 4096,
            payload: 0,
            fua: false,
            no_hole: true,
            one: false,
            error: None,
        };
        let lines = || watch.log.lock().unwrap().lines.len();
        guest.was_refused(&request, NbdErrno::NotSup);
        assert_eq!((watch.count(Kind::RequestNotSup), watch.count(Kind::RequestInval), lines()), (1, 0, 0));
        guest.was_refused(&request, NbdErrno::Inval);
        assert_eq!((watch.count(Kind::RequestNotSup), watch.count(Kind::RequestInval), lines()), (1, 1, 1));
    }
}
