//! How many connections a server takes, in all and of one client host.
//!
//! A connection is counted from its accept to its real end: whoever serves it owns its [`Ticket`], and dropping
//! that gives its place back. A client host is an IP address; unix sockets and loopback are one host together,
//! since whoever is on this machine can have as many addresses as he likes.
//!
//! Memory: one entry per host with an open connection, so at most as many as there are connections.
//!
//! Never does: closing a connection that has its ticket.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::export::Peer;

/// Most connections of a node unless it is told otherwise.
pub const CONNECTIONS_MAX: usize = 4096;
/// Most connections of one client host unless it is told otherwise: as many as a volume takes.
pub const CONNECTIONS_PER_CLIENT_MAX: usize = 1024;

/// The machine that a client runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ClientHost {
    /// This one.
    Local,
    /// Another one, or another address of it.
    Remote(IpAddr),
}

impl ClientHost {
    /// The host that a connection comes from.
    pub(crate) fn of(peer: Peer) -> Self {
        peer.elsewhere().map_or(Self::Local, Self::Remote)
    }
}

impl fmt::Display for ClientHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("this machine"),
            Self::Remote(addr) => write!(f, "{addr}"),
        }
    }
}

/// Most connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// In all.
    pub all: usize,
    /// Of one client host.
    pub per_client: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { all: CONNECTIONS_MAX, per_client: CONNECTIONS_PER_CLIENT_MAX }
    }
}

/// Which limit leaves no room for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    All(usize),
    Client(usize),
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(max) => write!(
                f,
                "this node has its {max} client connections already (nbd.connections_max of its config); close some"
            ),
            Self::Client(max) => write!(
                f,
                "this node has {max} connections of your machine already (nbd.connections_per_client_max of its \
                 config); close some"
            ),
        }
    }
}

/// The open connections of a server.
#[derive(Debug)]
pub(crate) struct Connections {
    limits: ConnectionLimits,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_host: BTreeMap<ClientHost, usize>,
}

impl Connections {
    pub(crate) fn new(limits: ConnectionLimits) -> Arc<Self> {
        Arc::new(Self { limits, open: Mutex::default() })
    }

    /// Counts a connection that was accepted.
    ///
    /// # Errors
    /// There is no room for it.
    pub(crate) fn enter(self: &Arc<Self>, host: ClientHost) -> Result<Ticket, Full> {
        let mut open = self.lock();
        if open.all >= self.limits.all {
            return Err(Full::All(self.limits.all));
        }
        let of_host = open.by_host.get(&host).copied().unwrap_or(0);
        if of_host >= self.limits.per_client {
            return Err(Full::Client(self.limits.per_client));
        }
        open.all += 1;
        open.by_host.insert(host, of_host + 1);
        Ok(Ticket { connections: Arc::clone(self), host })
    }

    /// How many there are.
    pub(crate) fn open(&self) -> usize {
        self.lock().all
    }

    /// Every change is whole within the lock, so what a panic left is sound.
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    connections: Arc<Connections>,
    host: ClientHost,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut open = self.connections.lock();
        open.all -= 1;
        if let Some(of_host) = open.by_host.get_mut(&self.host) {
            *of_host -= 1;
            if *of_host == 0 {
                open.by_host.remove(&self.host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(last: u8) -> ClientHost {
        ClientHost::Remote(IpAddr::from([10, 0, 0, last]))
    }

    #[test]
    fn each_limit_is_kept_and_a_place_is_given_back_with_its_ticket() {
        let connections = Connections::new(ConnectionLimits { all: 3, per_client: 2 });
        let mut held = vec![connections.enter(remote(1)).unwrap(), connections.enter(remote(1)).unwrap()];
        assert_eq!(connections.enter(remote(1)).unwrap_err(), Full::Client(2));
        held.push(connections.enter(remote(2)).unwrap());
        assert_eq!(connections.enter(remote(3)).unwrap_err(), Full::All(3));
        assert_eq!(connections.open(), 3);
        held.remove(0);
        held.push(connections.enter(remote(1)).unwrap());
        drop(held);
        assert_eq!(
            (connections.open(), connections.lock().by_host.len()),
            (0, 0),
            "nothing is kept of a host"
        );
    }
}
