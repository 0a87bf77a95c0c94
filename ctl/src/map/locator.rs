//! Finds the primary of a volume: every known node is asked at once, and the one that serves it answers.
//!
//! Starts from the addresses that it is given and learns the others from whichever node answers, so one that is
//! reachable is enough. Never does: keeping a connection, or deciding what becomes of the device.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use blkrepl_engine::reactor::{ClientSession, boottime_now};
use blkrepl_nbd::{ClientOptions, ExportFacts, NbdError, NbdUri, Place, Target, connect_session, places};
use rustix::net::sockopt;

/// Longest time of one attempt. Those at other nodes run beside it.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
/// How long answers are waited for before the nodes that have answered are asked again.
const ROUND_LIMIT: Duration = Duration::from_millis(250);
/// Most addresses that are kept in mind.
const ADDRESSES_MAX: usize = 64;
/// Silence after which the kernel asks whether the primary's machine is there, and the time between such questions.
const PROBE: Duration = Duration::from_secs(1);
/// Questions without an answer after which it is not.
const PROBES: u32 = 2;
/// Longest time that what was sent may wait for the acknowledgement of the primary's machine.
const GONE_AFTER: Duration = Duration::from_secs(3);

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

/// What an attempt at a node came to.
struct Answer {
    target: Target,
    generation: u64,
    found: Result<(OwnedFd, ExportFacts), NbdError>,
}

/// Where a volume may be.
pub struct Locator {
    volume: String,
    session: u128,
    targets: Vec<Target>,
    /// Attempts under way. A machine that says nothing must not keep the others from being asked again.
    asked: BTreeSet<String>,
    answer: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
    /// Generation of the connection that was taken last: what is older was given up with it.
    taken: u64,
    /// Why each node did not serve the volume when it was asked last.
    refusals: Refusals,
    /// Whose turn it is to be asked who is primary.
    turn: usize,
}

impl Locator {
    /// `seeds`: nodes of the cluster, in the order of preference; a unix socket is a node of this machine.
    pub fn new(volume: &str, session: u128, seeds: Vec<Target>) -> Self {
        let (answer, answers) = mpsc::channel();
        Self {
            volume: volume.to_owned(),
            session,
            targets: seeds,
            asked: BTreeSet::new(),
            answer,
            answers,
            taken: 0,
            refusals: Refusals::new(),
            turn: 0,
        }
    }

    fn options() -> ClientOptions {
        ClientOptions { connect_timeout: ATTEMPT_LIMIT, io_timeout: ATTEMPT_LIMIT }
    }

    /// Connects to whichever node serves the volume, if one does soon. The connections that the device had are given up
    /// with that.
    ///
    /// # Errors
    /// What each node said when it was asked last; those that have said nothing yet are left out.
    pub fn find(&mut self) -> Result<Found, Refusals> {
        // One for all that are asked now: a node that is reached by two addresses must not take the second connection
        // for the successor of the first. Rises also from one keeper to the next: a device does not outlive the run
        // of its kernel.
        let generation = boottime_now().0;
        for target in self.targets.clone() {
            self.ask(target, generation);
        }
        let end = Instant::now() + ROUND_LIMIT;
        while !self.asked.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(answer) = self.answers.recv_timeout(left) else { break };
            if let Some(found) = self.hear(answer) {
                return Ok(found);
            }
        }
        // Whoever answered may know of others.
        for target in self.targets.clone() {
            if self.refusals.get(&target.to_string()).is_some_and(|e| matches!(e, NbdError::Refused { .. })) {
                self.learn(&target);
            }
        }
        Err(std::mem::take(&mut self.refusals))
    }

    /// Begins an attempt at a node, unless one is under way.
    fn ask(&mut self, target: Target, generation: u64) {
        if !self.asked.insert(target.to_string()) {
            return;
        }
        let session = ClientSession { id: self.session, generation };
        let (answer, volume, name) = (self.answer.clone(), self.volume.clone(), target.to_string());
        let ask = move || {
            let found = connect(&target, &volume, session);
            // Nobody listens any more when the keeper has ended.
            let _unheard = answer.send(Answer { target, generation, found });
        };
        if let Err(error) = thread::Builder::new().name("locate".into()).spawn(ask) {
            tracing::warn!("cannot start a thread to ask a node: {error}");
            self.asked.remove(&name);
        }
    }

    fn hear(&mut self, answer: Answer) -> Option<Found> {
        let Answer { target, generation, found } = answer;
        self.asked.remove(&target.to_string());
        match found {
            // Not needed beside the one that was taken, or given up with it.
            Ok(_) if generation <= self.taken => None,
            Ok((connection, facts)) => {
                self.taken = generation;
                self.refusals.clear();
                let called = self.learn(&target).into_iter().find(|place| place.primary);
                let called = called.and_then(|place| target_of(&place.address));
                Some(Found { target, facts, connection, called })
            }
            Err(error) => {
                self.refusals.insert(target.to_string(), error);
                None
            }
        }
    }

    /// Who is primary, as one of the nodes sees it, another one each time; `None` if it does not answer.
    pub fn primary(&mut self) -> Option<Target> {
        // What came too late is closed.
        while let Ok(answer) = self.answers.try_recv() {
            self.asked.remove(&answer.target.to_string());
        }
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
        Target::Tcp { .. } => watch(&connection),
        Target::Unix(_) => Ok(()),
    });
    prepared.map_err(|error| NbdError::Disconnected(error.to_string()))?;
    Ok((connection, facts))
}

/// Lets the kernel find out by itself, and soon, that the primary's machine is gone: also when nobody keeps the device.
fn watch(connection: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_keepidle(connection, PROBE)?;
    sockopt::set_tcp_keepintvl(connection, PROBE)?;
    sockopt::set_tcp_keepcnt(connection, PROBES)?;
    sockopt::set_tcp_user_timeout(connection, GONE_AFTER.as_millis() as u32)?;
    sockopt::set_socket_keepalive(connection, true)
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

    #[test]
    fn a_machine_that_says_nothing_does_not_hold_up_the_others() {
        // Its kernel takes connections, and nobody says a word.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = |listener: &std::net::TcpListener| {
            let port = listener.local_addr().unwrap().port();
            Target::Tcp { host: "127.0.0.1".into(), port }
        };
        let mut locator = Locator::new("vol0", 1, vec![at(&silent), at(&refusing)]);
        let (count, counted) = mpsc::channel();
        thread::spawn(move || {
            // Each connection is closed at once: the node is starting.
            refusing.incoming().try_for_each(|connection| {
                drop(connection);
                count.send(())
            })
        });
        let mut asked = 0;
        while locator.asked.contains(&at(&silent).to_string()) || asked == 0 {
            assert!(locator.find().is_err());
            asked += counted.try_iter().count();
            if asked >= 3 {
                // The first attempt at the silent one is still under way, or it would have been given up by now.
                return;
            }
        }
        panic!("the other was asked {asked} times only while one was silent");
    }
}
