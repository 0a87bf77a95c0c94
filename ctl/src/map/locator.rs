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
use blkrepl_nbd::keepalive::{self, Patience};
use blkrepl_nbd::{ClientOptions, ExportFacts, NbdError, NbdUri, Place, Target, connect_session, places};

/// Longest time of one attempt. Those at other nodes run beside it.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(2);
/// How long answers are waited for before the nodes that have answered are asked again.
const ROUND_LIMIT: Duration = Duration::from_millis(250);
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

/// What an attempt at a node came to.
type Answer = (Target, Result<(OwnedFd, ExportFacts), NbdError>);

/// A search for the primary: from the first attempt until one of them succeeds.
#[derive(Debug)]
struct Search {
    /// Of every connection of this search, however often a node is asked: a node ends what is older than the newest
    /// that it sees, so an attempt that is still under way must not end the connection that was taken.
    session: ClientSession,
    /// Attempts under way. A machine that says nothing must not keep the others from being asked again.
    asked: BTreeSet<String>,
    answer: mpsc::Sender<Answer>,
    answers: mpsc::Receiver<Answer>,
}

impl Search {
    fn new(id: u128) -> Self {
        let (answer, answers) = mpsc::channel();
        // Rises also from one keeper to the next: a device does not outlive the run of its kernel.
        let session = ClientSession { id, generation: boottime_now().0 };
        Self { session, asked: BTreeSet::new(), answer, answers }
    }

    /// Begins an attempt at a node, unless one is under way.
    fn ask(&mut self, target: &Target, volume: &str) {
        if !self.asked.insert(target.to_string()) {
            return;
        }
        let (answer, session) = (self.answer.clone(), self.session);
        let (asked, volume) = (target.clone(), volume.to_owned());
        let attempt = move || {
            let found = connect(&asked, &volume, session);
            // Nobody listens any more when another node was found.
            let _unheard = answer.send((asked, found));
        };
        if !ask_beside(attempt) {
            self.asked.remove(&target.to_string());
        }
    }

    /// The next answer, if there is one to come until then.
    fn hear(&mut self, until: Instant) -> Option<Answer> {
        if self.asked.is_empty() {
            return None;
        }
        let answer = self.answers.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
        self.asked.remove(&answer.0.to_string());
        Some(answer)
    }
}

/// Where a volume may be.
#[derive(Debug)]
pub struct Locator {
    volume: String,
    session: u128,
    targets: Vec<Target>,
    search: Option<Search>,
    /// The answer of the node that was asked last who is primary.
    opinion: Option<mpsc::Receiver<Vec<Place>>>,
    /// Whose turn it is to be asked who is primary.
    turn: usize,
}

impl Locator {
    /// `seeds`: nodes of the cluster, in the order of preference; a unix socket is a node of this machine.
    pub fn new(volume: &str, session: u128, seeds: Vec<Target>) -> Self {
        Self { volume: volume.to_owned(), session, targets: seeds, search: None, opinion: None, turn: 0 }
    }

    fn options() -> ClientOptions {
        ClientOptions { connect_timeout: ATTEMPT_LIMIT, io_timeout: ATTEMPT_LIMIT }
    }

    /// Connects to whichever node serves the volume, if one does soon. The connections that the device had are given up
    /// with that.
    ///
    /// # Errors
    /// What each node said, or that it has not answered yet.
    pub fn find(&mut self) -> Result<Found, Refusals> {
        let mut search = self.search.take().unwrap_or_else(|| Search::new(self.session));
        for target in &self.targets {
            search.ask(target, &self.volume);
        }
        let until = Instant::now() + ROUND_LIMIT;
        let mut refusals = Refusals::new();
        while let Some((target, found)) = search.hear(until) {
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
        for silent in &search.asked {
            refusals.insert(silent.clone(), NbdError::TimedOut("an answer"));
        }
        self.search = Some(search);
        // Whoever answered may know of others.
        for target in self.targets.clone() {
            if refusals.get(&target.to_string()).is_some_and(|e| matches!(e, NbdError::Refused { .. })) {
                self.learn(&target);
            }
        }
        Err(refusals)
    }

    /// Who is primary, as one of the nodes saw it when this was called last, another one each time; `None` if it has
    /// not answered. Never waits: the next one is asked meanwhile.
    pub fn primary(&mut self) -> Option<Target> {
        let answer = match self.opinion.as_ref().map(mpsc::Receiver::try_recv) {
            Some(Err(mpsc::TryRecvError::Empty)) => return None,
            Some(Ok(known)) => known,
            Some(Err(mpsc::TryRecvError::Disconnected)) | None => Vec::new(),
        };
        self.note(&answer);
        self.turn = (self.turn + 1) % self.targets.len().max(1);
        let asked = self.targets.get(self.turn)?.clone();
        let (tell, told) = mpsc::channel();
        let volume = self.volume.clone();
        let ask = move || {
            // Nobody listens any more when the keeper has ended.
            let _unheard = tell.send(ask_places(&asked, &volume));
        };
        self.opinion = ask_beside(ask).then_some(told);
        target_of(&answer.into_iter().find(|place| place.primary)?.address)
    }

    /// Asks a node which nodes have the volume.
    fn learn(&mut self, target: &Target) -> Vec<Place> {
        let known = ask_places(target, &self.volume);
        self.note(&known);
        known
    }

    fn note(&mut self, known: &[Place]) {
        for target in known.iter().filter_map(|place| target_of(&place.address)) {
            if !self.targets.contains(&target) && self.targets.len() < ADDRESSES_MAX {
                tracing::info!("learnt that volume {} may be at {target}", self.volume);
                self.targets.push(target);
            }
        }
    }
}

/// Asks a node on a thread of its own, so that nobody waits for it; false if there is none to be had.
fn ask_beside(ask: impl FnOnce() + Send + 'static) -> bool {
    let started = thread::Builder::new().name("locate".into()).spawn(ask);
    if let Err(error) = &started {
        tracing::warn!("cannot start a thread to ask a node: {error}");
    }
    started.is_ok()
}

/// Which nodes have the volume, as a node sees it; none if it does not say.
fn ask_places(target: &Target, volume: &str) -> Vec<Place> {
    places(target, volume, Locator::options()).unwrap_or_else(|error| {
        tracing::debug!("{target} does not say where volume {volume} is: {error}");
        Vec::new()
    })
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
        let (mut asked, mut generations) = (0, BTreeSet::new());
        while asked < 3 {
            assert!(locator.find().is_err());
            asked += counted.try_iter().count();
            let search = locator.search.as_ref().expect("nobody was found");
            generations.insert(search.session.generation);
            assert!(
                search.asked.contains(&at(&silent).to_string()),
                "{asked} times only while one was silent"
            );
        }
        assert_eq!(generations.len(), 1, "no attempt ends a connection that another one finds");
    }
}
