//! Finds the primary of a volume: every known node is asked at once, and the one that serves it answers.
//!
//! Starts from the addresses that it is given and learns the others from whichever node answers, so one that is
//! reachable is enough. Never does: keeping a connection, or deciding what becomes of the device.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blkrepl_engine::reactor::{ClientSession, boottime_now};
use blkrepl_nbd::keepalive::{self, Patience};
use blkrepl_nbd::{ClientOptions, ExportFacts, NbdError, NbdUri, Place, Target, connect_session, places};

/// Longest time of one attempt. Those at other nodes run beside it.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
/// Most addresses that are kept in mind.
const ADDRESSES_MAX: usize = 64;
/// When the kernel finds out by itself that the primary's machine is gone: soon, as nobody may keep the device.
const PRIMARY: Patience = Patience {
    probe_idle: Duration::from_secs(1),
    probe_interval: Duration::from_secs(1),
    probes: 2,
    gone_after: Duration::from_secs(3),
};

/// A node that serves the volume.
#[derive(Debug)]
pub struct Found {
    /// Where.
    pub target: Target,
    /// What it says of the volume.
    pub facts: ExportFacts,
    /// A connection, past its negotiation. Nothing of those before it starts any more.
    pub connection: OwnedFd,
    /// What nodes call its address; `None` if it does not say so.
    pub called: Option<Target>,
}

/// Why each of the nodes does not serve the volume.
pub type Refusals = BTreeMap<String, NbdError>;

/// Where a volume may be.
#[derive(Debug)]
pub struct Locator {
    volume: String,
    session: u128,
    targets: Vec<Target>,
    /// Whose turn it is to be asked who is primary.
    turn: usize,
}

impl Locator {
    /// `seeds`: nodes of the cluster, in the order of preference; a unix socket is a node of this machine.
    pub fn new(volume: &str, session: u128, seeds: Vec<Target>) -> Self {
        Self { volume: volume.to_owned(), session, targets: seeds, turn: 0 }
    }

    fn options() -> ClientOptions {
        ClientOptions { connect_timeout: ATTEMPT_LIMIT, io_timeout: ATTEMPT_LIMIT }
    }

    /// Connects to whichever node serves the volume. The connections that the device had are given up with that.
    ///
    /// # Errors
    /// What each node said.
    pub fn find(&mut self) -> Result<Found, Refusals> {
        let (answer, answers) = mpsc::channel();
        // Rises also from one keeper to the next: a device does not outlive the run of its kernel.
        let generation = boottime_now().0;
        let session = ClientSession { id: self.session, generation };
        for target in self.targets.clone() {
            let (answer, volume) = (answer.clone(), self.volume.clone());
            let ask = move || {
                let found = connect(&target, &volume, session);
                // Nobody listens any more when another node was found.
                let _unheard = answer.send((target, found));
            };
            if let Err(error) = thread::Builder::new().name("locate".into()).spawn(ask) {
                tracing::warn!("cannot start a thread to ask a node: {error}");
            }
        }
        drop(answer);
        let mut refusals = Refusals::new();
        for (target, found) in answers {
            match found {
                Ok((connection, facts)) => {
                    let called = self.learn(&target).into_iter().find(|place| place.primary);
                    let called = called.and_then(|place| target_of(&place.address));
                    return Ok(Found { target, facts, connection, called });
                }
                Err(error) => {
                    refusals.insert(target.to_string(), error);
                }
            }
        }
        // Whoever answered may know of others.
        for target in self.targets.clone() {
            if refusals.get(&target.to_string()).is_some_and(|e| matches!(e, NbdError::Refused { .. })) {
                self.learn(&target);
            }
        }
        Err(refusals)
    }

    /// Who is primary, as one of the nodes sees it, another one each time; `None` if it does not answer.
    pub fn primary(&mut self) -> Option<Target> {
        self.turn = (self.turn + 1) % self.targets.len().max(1);
        let asked = self.targets.get(self.turn)?.clone();
        let primary = self.learn(&asked).into_iter().find(|place| place.primary)?;
        target_of(&primary.address)
    }

    /// Asks a node which nodes have the volume.
    fn learn(&mut self, target: &Target) -> Vec<Place> {
        let known = places(target, &self.volume, Self::options()).unwrap_or_else(|error| {
            tracing::debug!("{target} does not say where volume {} is: {error}", self.volume);
            Vec::new()
        });
        for place in &known {
            let Some(target) = target_of(&place.address) else { continue };
            if !self.targets.contains(&target) && self.targets.len() < ADDRESSES_MAX {
                tracing::info!("learnt that volume {} may be at {target}", self.volume);
                self.targets.push(target);
            }
        }
        known
    }
}

/// The server at `HOST:PORT`.
pub fn target_of(address: &str) -> Option<Target> {
    if address.contains(|c: char| c.is_whitespace() || c == '/') {
        return None;
    }
    format!("nbd://{address}").parse::<NbdUri>().ok().map(|uri| uri.target)
}

fn connect(
    target: &Target,
    volume: &str,
    session: ClientSession,
) -> Result<(OwnedFd, ExportFacts), NbdError> {
    let uri = NbdUri { target: target.clone(), export: volume.to_owned() };
    let (connection, facts) = connect_session(&uri, session, Locator::options())?;
    let prepared = rustix::io::ioctl_fionbio(&connection, false).and_then(|()| match target {
        Target::Tcp { .. } => keepalive::watch(&connection, PRIMARY),
        Target::Unix(_) => Ok(()),
    });
    prepared.map_err(|error| NbdError::Disconnected(error.to_string()))?;
    Ok((connection, facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_nodes_tell_them() {
        let tcp = |host: &str, port| Some(Target::Tcp { host: host.into(), port });
        assert_eq!(target_of("10.0.0.1:10809"), tcp("10.0.0.1", 10809));
        assert_eq!(target_of("[fd00::1]:1"), tcp("fd00::1", 1));
        assert_eq!(target_of("a host"), None);
    }

    #[test]
    fn nodes_that_do_not_answer_are_told_of() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let nobody = Target::Tcp { host: "127.0.0.1".into(), port };
        let mut locator = Locator::new("vol0", 1, vec![nobody.clone()]);
        let refusals = locator.find().unwrap_err();
        assert!(refusals[&nobody.to_string()].is_transient());
        assert_eq!(locator.primary(), None);
    }
}
