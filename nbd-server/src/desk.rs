//! Decides of each accepted connection whether there is room for it, and who hears if there is none.
//!
//! A client beyond a limit is told why, as a refusal of whatever export it names, as long as only
//! [`REFUSALS_MAX`] are being told at once; beyond that it is closed at once. So clients without number cost
//! neither memory nor the places of others.
//!
//! Never does: I/O.

use std::sync::Arc;

use crate::export::{Admitting, ExportInfo, ExportRefusal, Exports, Peer};
use crate::limits::{ClientHost, ConnectionLimits, Connections, Full, Ticket};
use crate::misbehaviour::{Guest, Kind, Misbehaviour};

/// Most connections at once that are told that there is no room for them.
const REFUSALS_MAX: usize = 16;

/// What all listeners of a server have in common. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Desk {
    exports: Arc<dyn Exports>,
    connections: Arc<Connections>,
    /// Those that are told that there is no room.
    refusals: Arc<Connections>,
    watch: Arc<Misbehaviour>,
}

/// A connection that is let in, or at least told why not.
pub(crate) struct Received {
    /// What it is to know of it.
    pub(crate) guest: Guest,
    /// What it may ask for.
    pub(crate) exports: Arc<dyn Exports>,
    /// It is only told why there is no room.
    pub(crate) refusal: bool,
}

impl Desk {
    pub(crate) fn new(exports: Arc<dyn Exports>, limits: ConnectionLimits) -> Self {
        let connections = Connections::new(limits);
        let refusals = Connections::new(ConnectionLimits { all: REFUSALS_MAX, per_client: REFUSALS_MAX });
        let watch = Misbehaviour::new(Arc::clone(&connections));
        Self { exports, connections, refusals, watch }
    }

    pub(crate) fn watch(&self) -> &Arc<Misbehaviour> {
        &self.watch
    }

    /// A connection was accepted. `None`: close it.
    pub(crate) fn receive(&self, host: ClientHost, peer: &str) -> Option<Received> {
        let guest = |ticket: Ticket| Guest::new(ticket, &self.watch, host, peer.to_owned());
        let full = match self.connections.enter(host) {
            Ok(ticket) => {
                self.watch.add(Kind::Accepted);
                let exports = Arc::clone(&self.exports);
                return Some(Received { guest: guest(ticket), exports, refusal: false });
            }
            Err(full) => full,
        };
        self.watch.full(host, peer, full);
        let ticket = self.refusals.enter(host).ok()?;
        let exports = Arc::new(NoRoom { exports: Arc::clone(&self.exports), full });
        Some(Received { guest: guest(ticket), exports, refusal: true })
    }
}

/// The exports for a client that there is no room for: they are listed, and each is refused.
struct NoRoom {
    exports: Arc<dyn Exports>,
    full: Full,
}

impl Exports for NoRoom {
    fn list(&self) -> Vec<String> {
        self.exports.list()
    }

    fn open(&self, _name: &str) -> Result<ExportInfo, ExportRefusal> {
        Err(ExportRefusal::Policy(self.full.to_string()))
    }

    fn admit(&self, _name: &str, _peer: Peer) -> Admitting {
        Box::pin(std::future::ready(Err(ExportRefusal::Policy(self.full.to_string()))))
    }
}
