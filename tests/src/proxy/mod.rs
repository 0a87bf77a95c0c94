//! A proxy on one link of a cluster, through which faults come to real connections: delay, throttle, silence in
//! one direction or both, half-open ends, flipped bits, cut-off messages, resets.
//!
//! It never does what TCP cannot do to a program: bytes are not lost from the middle of a stream, nor
//! reordered or repeated. Silence holds bytes back; when it ends they arrive late or the connection breaks.
//! The one exception is a flipped bit, which gets past TCP's checksum in practice, too; it is for links
//! whose messages carry checksums of their own, not for NBD.
//!
//! On a client's link the end of the client always reaches the server and takes with it what was held
//! back: what a client cannot promise, a request that starts after its replay, is outside the promise (R24
//! in the design says what the server does promise).

mod pump;

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bits::Random;

/// Longest time to reach the server of a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Connections through one proxy at once; further ones are refused.
const CONNECTIONS_MAX: usize = 256;
/// How often the acceptor looks whether it is to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);

/// What flows through a link; decides which faults it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Control messages between nodes.
    Control,
    /// Sessions between replicas.
    Peer,
    /// Clients.
    Nbd,
}

/// A direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From who dialed.
    Forward,
    /// To who dialed.
    Back,
}

/// What is wrong with a link as long as it lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Nothing that the dialer sends arrives, nor that it closes.
    pub silent_forward: bool,
    /// Nothing that is sent to the dialer arrives.
    pub silent_back: bool,
    /// Each piece of a stream arrives so much later.
    pub delay: Duration,
    /// Bytes per second in each direction; 0: as many as there are.
    pub rate: u64,
    /// New connections are reset.
    pub refused: bool,
}

impl Condition {
    fn silent(&self, direction: Direction) -> bool {
        match direction {
            Direction::Forward => self.silent_forward,
            Direction::Back => self.silent_back,
        }
    }

    /// Nothing arrives in either direction.
    #[must_use]
    pub fn black_hole() -> Self {
        Self { silent_forward: true, silent_back: true, ..Self::default() }
    }
}

/// A fault that happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// The next piece that goes this way has a bit flipped.
    Corrupt(Direction),
    /// The next piece that goes this way stops in its middle, and the connection ends orderly.
    Truncate(Direction),
    /// Every connection is reset at both ends.
    Reset,
    /// Every connection is reset at the dialer's end alone; the other end hears nothing.
    ResetDialer,
    /// Every connection is reset at the listener's end alone; the dialer hears nothing.
    ResetListener,
}

/// What the pumps of a link share.
struct State {
    condition: Condition,
    corrupt: [u32; 2],
    truncate: [u32; 2],
    random: Random,
    connections: Vec<Arc<Connection>>,
    ended: bool,
}

struct Shared {
    traffic: Traffic,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both ends of one connection.
struct Connection {
    dialer: TcpStream,
    listener: TcpStream,
    over: AtomicBool,
    /// One end was reset, the other is not to hear of it until the link is healed.
    half: AtomicBool,
    pumps: AtomicU32,
}

impl Connection {
    /// Ends it for our pumps; what the ends hear is decided by who calls.
    fn finish(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn is_half(&self) -> bool {
        self.half.load(Ordering::SeqCst)
    }

    /// Breaks it, and both ends hear of it.
    fn end(&self) {
        self.half.store(false, Ordering::SeqCst);
        self.finish();
        pump::reset(&self.dialer);
        pump::reset(&self.listener);
    }
}

/// A proxy that listens at one address and forwards to another.
pub struct Proxy {
    name: String,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    at: SocketAddr,
}

impl Proxy {
    /// Starts one.
    ///
    /// # Errors
    /// Where the address is taken.
    pub fn start(name: &str, traffic: Traffic, at: SocketAddr, to: SocketAddr, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind(at).with_context(|| format!("bind the proxy {name} to {at}"))?;
        let at = listener.local_addr().context("look up the proxy's address")?;
        listener.set_nonblocking(true).context("make the proxy's listener non-blocking")?;
        let state = State {
            condition: Condition::default(),
            corrupt: [0; 2],
            truncate: [0; 2],
            random: Random::new(seed),
            connections: Vec::new(),
            ended: false,
        };
        let shared = Arc::new(Shared { traffic, state: Mutex::new(state), changed: Condvar::new() });
        let inner = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || accept(&listener, to, &inner));
        Ok(Self { name: name.to_owned(), shared, acceptor: Some(acceptor), at })
    }

    /// Where it listens.
    #[must_use]
    pub fn at(&self) -> SocketAddr {
        self.at
    }

    /// Its name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What flows through it.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.shared.traffic
    }

    /// What is wrong with it now.
    #[must_use]
    pub fn condition(&self) -> Condition {
        self.shared.lock().condition
    }

    /// From now on this is wrong with it.
    pub fn set(&self, condition: Condition) {
        self.shared.lock().condition = condition;
        self.shared.changed.notify_all();
    }

    /// Does something once.
    ///
    /// # Panics
    /// If bits of a client's link are to be flipped: NBD has no checksums, so no server could tell.
    pub fn strike(&self, blow: Blow) {
        let mut state = self.shared.lock();
        match blow {
            Blow::Corrupt(direction) => {
                assert!(self.shared.traffic != Traffic::Nbd, "NBD carries no checksums");
                state.corrupt[direction as usize] += 1;
            }
            Blow::Truncate(direction) => state.truncate[direction as usize] += 1,
            Blow::Reset => state.connections.iter().for_each(|connection| connection.end()),
            Blow::ResetDialer | Blow::ResetListener => {
                let at_dialer = blow == Blow::ResetDialer;
                assert!(!at_dialer || self.shared.traffic != Traffic::Nbd, "a client's end is always told");
                for connection in state.connections.iter().filter(|c| !c.is_over()) {
                    connection.half.store(true, Ordering::SeqCst);
                    connection.finish();
                    pump::reset(if at_dialer { &connection.dialer } else { &connection.listener });
                }
            }
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Nothing is wrong with it any more: half-open connections break, and all others, too, if `broken`; else
    /// what was held back arrives now.
    pub fn heal(&self, broken: bool) {
        let mut state = self.shared.lock();
        let held = state.condition != Condition::default();
        state.condition = Condition::default();
        (state.corrupt, state.truncate) = ([0; 2], [0; 2]);
        for connection in &state.connections {
            if connection.is_half() || (held && broken) {
                connection.end();
            }
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Connections that it holds now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.iter().filter(|c| !c.is_over()).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        for connection in std::mem::take(&mut state.connections) {
            connection.finish();
            let _ = connection.dialer.shutdown(Shutdown::Both);
            let _ = connection.listener.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, to: SocketAddr, shared: &Arc<Shared>) {
    loop {
        {
            let mut state = shared.lock();
            if state.ended {
                return;
            }
            state.connections.retain(|c| !c.is_over() || c.is_half());
        }
        match listener.accept() {
            Ok((dialer, _)) => {
                let shared = Arc::clone(shared);
                std::thread::spawn(move || open(dialer, to, &shared));
            }
            Err(_) => std::thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// Connects a dialer to the server once the link carries anything towards it.
fn open(dialer: TcpStream, to: SocketAddr, shared: &Arc<Shared>) {
    let _ = dialer.set_nonblocking(false);
    if !pump::wait_open(&dialer, shared) {
        pump::reset(&dialer);
        return;
    }
    let Ok(listener) = TcpStream::connect_timeout(&to, CONNECT_LIMIT) else {
        pump::reset(&dialer);
        return;
    };
    let _ = (dialer.set_nodelay(true), listener.set_nodelay(true));
    let no = || AtomicBool::new(false);
    let connection =
        Arc::new(Connection { dialer, listener, over: no(), half: no(), pumps: AtomicU32::new(2) });
    {
        let mut state = shared.lock();
        if state.ended || state.connections.len() >= CONNECTIONS_MAX {
            pump::reset(&connection.dialer);
            return;
        }
        state.connections.push(Arc::clone(&connection));
    }
    for direction in [Direction::Forward, Direction::Back] {
        let (connection, shared) = (Arc::clone(&connection), Arc::clone(shared));
        std::thread::spawn(move || pump::run(&connection, direction, &shared));
    }
}

#[cfg(test)]
mod tests;
