//! The loop of one volume: wait, reap, feed the core, carry out what it puts out, submit.
//!
//! One submit-and-wait per turn. The time given to the core is read after the completion in question was
//! reaped [R27]. Order within a turn: first the clients that have shut down are closed [R24], then the
//! mailbox (with new connections), then the other completions as they came, then the tick, then answers
//! and frames are handed to the kernel together.
//!
//! If the core breaks an invariant (or the ring fails), the volume stops: it answers nobody any more,
//! closes every socket, and its last status says that it is unhealthy and why. The other volumes of the
//! process go on.
//!
//! Never does: blocking calls, or deciding anything about replication.

use std::any::Any;
use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::mutation::{Mutation, mutated};
use crate::replica::{ClientInput, ClientOp, ConnId, Output, PeerInput};
use crate::types::{Health, Incarnation, Nanos, NodeId, ReplicaState, ReplicaStatus};
use crate::wire::SessionId;

use super::client::End;
use super::clients::{Clients, Next};
use super::core::Core;
use super::disk::Disk;
use super::error::ReactorError;
use super::handle::{ClientKey, Command, NewClient, ReactorOptions, Shared, VolumeHooks, boottime_now};
use super::open::VolumeFiles;
use super::peers::{Peers, content_of};
use super::ring::{Completion, Hold, Io, Token};

/// Shortest time between two published statuses that differ in numbers only.
const STATUS_INTERVAL: Duration = Duration::from_millis(50);
/// How long memory lies free before it goes back to the system, at least.
const TRIM_INTERVAL: Duration = Duration::from_secs(2);
/// How long a clean stop waits for the last answers and frames to leave.
const LINGER_MAX: Duration = Duration::from_millis(500);
/// How long the end waits for the kernel to give back what it has; then that memory is kept for ever.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// What a volume is made of.
pub(super) struct VolumeParts {
    pub(super) files: VolumeFiles,
    pub(super) hooks: Box<dyn VolumeHooks>,
    pub(super) shared: Arc<Shared>,
    pub(super) options: ReactorOptions,
}

/// An input that an output caused.
enum Input {
    Client(ClientInput),
    Peer(PeerInput),
}

/// When which status was published.
struct StatusBoard {
    last: Arc<ReplicaStatus>,
    at: Nanos,
    /// Something happened since.
    touched: bool,
    /// Something happened that may have changed role, health or serving.
    urgent: bool,
}

/// A volume on its own thread.
pub(super) struct Volume<C> {
    core: C,
    io: Io,
    disk: Disk,
    clients: Clients,
    peers: Peers,
    hooks: Box<dyn VolumeHooks>,
    shared: Arc<Shared>,
    wake: Rc<OwnedFd>,
    pending: VecDeque<Input>,
    board: StatusBoard,
    stopped: bool,
    /// When free memory is looked at next.
    trim_at: Nanos,
    /// Only for the mutation of [R27]: when the present turn began to wait.
    began: Nanos,
}

impl<C: Core> Volume<C> {
    /// Sets up ring and core on the present thread, and publishes the first status.
    pub(super) fn new(make_core: impl FnOnce(Nanos) -> C, parts: VolumeParts) -> Result<Self, ReactorError> {
        let VolumeParts { files, mut hooks, shared, options } = parts;
        let mut io = Io::new(options.ring_entries, options.registered_bytes)?;
        let wake = shared
            .wake_fd()
            .map_err(|source| ReactorError::Io { action: "copying an event descriptor", source })?;
        let wake = Rc::new(wake);
        io.await_event(&wake, Token::Wake);
        let mailbox = Arc::clone(&shared);
        let disk = Disk::new(files, Arc::new(move || mailbox.wake()));
        let now = boottime_now();
        let core = make_core(now);
        let last = Arc::new(core.status());
        shared.publish(Arc::clone(&last));
        hooks.status_changed(Arc::clone(&last));
        Ok(Self {
            core,
            io,
            clients: Clients::new(disk.geometry(), options.unread_max, options.idle_max),
            peers: Peers::new(disk.geometry()),
            disk,
            hooks,
            shared,
            wake,
            pending: VecDeque::new(),
            board: StatusBoard { last, at: now, touched: true, urgent: true },
            stopped: false,
            trim_at: now.after(TRIM_INTERVAL),
            began: now,
        })
    }

    /// Runs until the core has stopped or failed, then closes everything.
    pub(super) fn run(mut self) {
        let name = self.shared.name().to_owned();
        match std::panic::catch_unwind(AssertUnwindSafe(|| self.turns())) {
            Ok(Ok(())) => {
                tracing::info!(volume = name, "volume stopped");
                self.linger();
            }
            Ok(Err(error)) => self.fail(&format!("the io_uring ring failed: {error}")),
            Err(panic) => self.fail(&format!("an invariant is broken: {}", panic_text(&*panic))),
        }
        self.shut_down();
    }

    fn turns(&mut self) -> std::io::Result<()> {
        let mut done = Vec::new();
        self.settle();
        loop {
            let now = boottime_now();
            let quiet = self.clients.flush(&mut self.io, now) + self.peers.flush(&mut self.io);
            let quiet = if self.clients.any_waiting() { 0 } else { quiet };
            self.publish(now);
            if self.stopped {
                return Ok(());
            }
            let deadline = self.deadline();
            if mutated(Mutation::R27) {
                self.began = boottime_now();
            }
            self.io.turn_beyond(quiet, deadline, &mut done)?;
            self.handle(&mut done);
            if deadline.is_some_and(|at| at <= boottime_now()) {
                self.tick();
            }
        }
    }

    /// Until when the next turn may wait.
    fn deadline(&self) -> Option<Nanos> {
        let status = self.board.touched.then(|| self.board.at.after(STATUS_INTERVAL));
        let trim = self.io.buffers.has_spare().then_some(self.trim_at);
        let deadlines = [self.core.poll_deadline(), self.clients.deadline(&self.io), status, trim];
        deadlines.into_iter().flatten().min()
    }

    fn handle(&mut self, done: &mut Vec<Completion>) {
        for completion in done.iter() {
            if let Token::ClientGone(conn) = completion.token {
                self.close_client(conn, End::Client, "the client has shut down");
            }
        }
        self.settle();
        if done.iter().any(|completion| completion.token == Token::Wake) {
            self.io.await_event(&self.wake, Token::Wake);
            for command in self.shared.take() {
                self.command(command);
            }
        }
        for completion in done.drain(..) {
            self.complete(completion);
        }
        while let Some(conn) = self.clients.first_waiting(&self.io) {
            self.pump_client(conn);
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { token, result, hold, more } = completion;
        match (token, hold) {
            (Token::Wake | Token::ClientGone(_), _) => {}
            (Token::Disk(id), hold) => {
                if let Hold::Buffer(buf) = hold {
                    self.io.buffers.release(buf);
                }
                self.disk.complete(&mut self.io, id, result);
                self.settle();
            }
            (Token::ClientReceive(conn), Hold::Buffer(buf)) => {
                let received = self.clients.received(conn, buf, result, more);
                self.io.buffers.release(buf);
                match received {
                    Ok(()) => self.pump_client(conn),
                    Err(reason) => self.close_client(conn, End::Client, &reason),
                }
                self.settle();
            }
            (Token::ClientSend(conn), Hold::Message(message)) => {
                match self.clients.sent(&mut self.io, conn, message, result) {
                    Ok(()) => self.pump_client(conn),
                    Err(reason) => self.close_client(conn, End::Client, &reason),
                }
                self.settle();
            }
            (Token::PeerReceive(session), Hold::Buffer(buf)) => {
                let received = self.peers.received(session, buf, result, more);
                self.io.buffers.release(buf);
                match received {
                    Ok(()) => self.pump_peer(session),
                    Err(reason) => self.close_session(session, &reason),
                }
                self.settle();
            }
            (Token::PeerSend(session), Hold::Message(message)) => {
                if let Err(reason) = self.peers.sent(&mut self.io, session, message, result) {
                    self.close_session(session, &reason);
                    self.settle();
                }
            }
            (token, _) => panic!("the completion of {token:?} holds something else than it was given"),
        }
    }

    /// Feeds the core what a client has sent, then reads on.
    fn pump_client(&mut self, conn: ConnId) {
        while let Some(next) = self.clients.next(&mut self.io, conn) {
            match next {
                Next::Request(request) => self.give(Input::Client(ClientInput::Request(request))),
                Next::Close(end, reason) => self.close_client(conn, end, &reason),
            }
            self.settle();
        }
        self.clients.arm(&mut self.io, conn, boottime_now());
    }

    /// Feeds the core what a peer has sent, then reads on.
    fn pump_peer(&mut self, session: SessionId) {
        loop {
            match self.peers.next(&mut self.io, session) {
                Ok(Some(message)) => self.give(Input::Peer(PeerInput::Msg(session, message))),
                Ok(None) => break,
                Err(reason) => {
                    tracing::warn!(volume = self.shared.name(), reason, "a peer's frame is not accepted");
                    self.close_session(session, &reason);
                }
            }
            self.settle();
        }
        self.peers.arm(&mut self.io, session);
    }

    fn command(&mut self, command: Command) {
        self.board.urgent = true;
        let now = self.input_time();
        match command {
            Command::Config(config) => self.core.handle_config(now, *config),
            Command::Lease(lease) => self.core.handle_lease(now, lease),
            Command::Proposal(id, outcome) => self.core.handle_proposal(now, id, outcome),
            Command::Peer { node, incarnation, stream } => self.add_peer(node, incarnation, stream),
            Command::Client(client) => self.add_client(*client),
            Command::EndClients(keys) => self.end_clients(&keys),
            Command::Move(to, reply) => reply(self.core.begin_move(now, to)),
            Command::Demote(reply) => reply(self.core.begin_demote(now)),
            Command::Force(discard, reply) => reply(self.core.begin_force(now, discard)),
            Command::EndForce => self.core.end_force(now),
            Command::Stop => self.core.begin_stop(now),
        }
        self.settle();
    }

    fn end_clients(&mut self, keys: &[ClientKey]) {
        for conn in self.clients.named(keys) {
            self.close_client(conn, End::Server, "its attachment was ended");
        }
    }

    fn add_client(&mut self, mut client: NewClient) {
        if let Err(error) = prepare_socket(&client.socket) {
            tracing::warn!(client = client.name, %error, "client connection refused: its socket cannot be used");
            return;
        }
        // A client that comes back must not be overtaken by what its old connection still holds [R24].
        for conn in self.clients.gone() {
            self.close_client(conn, End::Client, "the client has shut down");
        }
        if let Some(session) = client.session {
            let Some(replaced) = self.clients.replaced_by(session) else {
                tracing::debug!(
                    client = client.name,
                    "client connection refused: a later one has taken its place"
                );
                return client.protocol.closed(End::Replaced);
            };
            for conn in replaced {
                self.close_client(conn, End::Replaced, "its client has opened another one in its place");
            }
        }
        self.settle();
        if let Some(conn) = self.clients.add(&mut self.io, client) {
            self.pump_client(conn);
        }
    }

    fn add_peer(&mut self, node: NodeId, incarnation: Incarnation, stream: TcpStream) {
        let socket = OwnedFd::from(stream);
        if let Err(error) = prepare_socket(&socket) {
            tracing::warn!(%node, %error, "peer connection refused: its socket cannot be used");
            self.hooks.session_lost(node);
            return;
        }
        if let Some(old) = self.peers.session_to(node) {
            if let Some(newer) = self.peers.incarnation(old).filter(|known| *known > incarnation) {
                tracing::warn!(%node, %incarnation, %newer, "peer connection of an older incarnation refused");
                return;
            }
            // The core hears of the old session's end before it hears of the new one.
            tracing::debug!(%node, "peer session replaced by a newer one");
            self.peers.close(&mut self.io, old);
            self.pending.push_back(Input::Peer(PeerInput::Down(old)));
            self.settle();
        }
        let session = self.peers.add(&mut self.io, node, incarnation, socket);
        self.give(Input::Peer(PeerInput::Up { session, node, incarnation }));
        self.settle();
        self.peers.arm(&mut self.io, session);
    }

    fn close_client(&mut self, conn: ConnId, end: End, reason: &str) {
        if self.clients.close(&mut self.io, conn, end, reason) {
            self.pending.push_back(Input::Client(ClientInput::Closed(conn)));
        }
    }

    fn close_session(&mut self, session: SessionId, reason: &str) {
        if let Some(node) = self.peers.close(&mut self.io, session) {
            tracing::info!(volume = self.shared.name(), %node, reason, "peer session ended");
            self.board.urgent = true;
            self.pending.push_back(Input::Peer(PeerInput::Down(session)));
            self.hooks.session_lost(node);
        }
    }

    /// Gives the core one input, unless what it came from is closed by now [R23].
    fn give(&mut self, input: Input) {
        self.board.touched = true;
        let now = self.input_time();
        match input {
            Input::Client(ClientInput::Request(request)) if !self.clients.is_open(request.conn) => {
                if let ClientOp::Write(payload) = request.op {
                    self.io.buffers.release(payload.buf);
                }
            }
            Input::Client(input) => self.core.handle_client(now, input),
            Input::Peer(PeerInput::Msg(session, message)) if !self.peers.is_open(session) => {
                if let Some(buf) = content_of(&message) {
                    self.io.buffers.release(buf);
                }
            }
            Input::Peer(input) => {
                self.board.urgent |= !matches!(input, PeerInput::Msg(..));
                self.core.handle_peer(now, input);
            }
        }
    }

    /// Carries out everything that the core puts out, and feeds back what that causes at once, until
    /// nothing is left.
    fn settle(&mut self) {
        loop {
            while let Some(output) = self.core.poll_output() {
                self.perform(output);
            }
            if let Some(input) = self.pending.pop_front() {
                self.give(input);
            } else if let Some(done) = self.disk.poll_done() {
                self.board.touched = true;
                self.board.urgent |= done.result.is_err();
                self.core.handle_disk(self.input_time(), done);
            } else {
                return;
            }
        }
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Disk(request) => self.disk.start(&mut self.io, request),
            Output::Send(session, message) => self.peers.send(&mut self.io, session, &message),
            Output::Reply { conn, cookie, result } => {
                if let Some(piece) = self.clients.reply(&mut self.io, conn, cookie, result) {
                    self.pending.push_back(Input::Client(ClientInput::Request(piece)));
                }
            }
            Output::Release(buf) => self.io.buffers.release(buf),
            Output::Propose(proposal) => {
                self.board.urgent = true;
                self.hooks.propose(proposal);
            }
            Output::CloseSession(session, reason) => self.close_session(session, &reason),
            Output::CloseClients(reason) => {
                self.board.urgent = true;
                for conn in self.clients.all() {
                    self.close_client(conn, End::Server, &reason);
                }
            }
            Output::Event(event) => {
                self.board.urgent = true;
                self.hooks.event(event);
            }
            Output::Stopped => self.stopped = true,
        }
    }

    /// The time that goes with an input: read now, after the input was reaped [R27].
    fn input_time(&self) -> Nanos {
        if mutated(Mutation::R27) { self.began } else { boottime_now() }
    }

    /// What is due by the clock; called once [`Self::deadline`] is over.
    fn tick(&mut self) {
        let now = self.input_time();
        for (conn, end) in self.clients.expired(now) {
            let reason = match end {
                End::Unread => "it stayed unread for too long, so that what it holds may be stale",
                _ => "it took no answers, or did not send the rest of a request, for too long",
            };
            self.close_client(conn, end, reason);
        }
        for conn in self.clients.stalled(&self.io, now) {
            let reason = "it takes no answers or sends no payload, and others wait for its memory";
            self.close_client(conn, End::Stalled, reason);
        }
        for conn in self.clients.idle(now) {
            self.close_client(conn, End::Idle, "it asked nothing for too long");
        }
        if self.core.poll_deadline().is_some_and(|at| at <= now) {
            self.board.touched = true;
            self.board.urgent = true;
            self.core.handle_tick(now);
        }
        if self.trim_at <= now {
            self.trim_at = now.after(TRIM_INTERVAL);
            self.io.buffers.trim();
        }
        self.settle();
    }

    /// Publishes the status if it changed: at once where others decide by it, else not too often.
    fn publish(&mut self, now: Nanos) {
        let board = &mut self.board;
        let due = board.touched && board.at.after(STATUS_INTERVAL) <= now;
        if !due && !board.urgent {
            return;
        }
        board.urgent = false;
        let status = self.core.status();
        let last = &board.last;
        let decisive = (status.role, status.serving, &status.health, status.state, status.epoch)
            != (last.role, last.serving, &last.health, last.state, last.epoch);
        if !decisive && !due {
            board.touched = true;
            return;
        }
        board.touched = false;
        board.at = now;
        if status != **last {
            board.last = Arc::new(status);
            self.shared.publish(Arc::clone(&board.last));
            self.hooks.status_changed(Arc::clone(&board.last));
        }
    }

    /// The volume cannot go on: says so where health is judged.
    fn fail(&mut self, reason: &str) {
        let text = format!("{reason}; this replica does nothing any more until its node is started again");
        let status = Arc::new(ReplicaStatus {
            state: ReplicaState::Failed,
            health: Health::Unhealthy(text.clone()),
            serving: false,
            failure: Some(text.clone()),
            ..(*self.board.last).clone()
        });
        self.shared.publish(Arc::clone(&status));
        self.hooks.status_changed(status);
        tracing::error!(volume = self.shared.name(), "{text}");
    }

    /// After a clean stop: lets the last answers and frames leave.
    fn linger(&mut self) {
        let end = Instant::now() + LINGER_MAX;
        let mut done = Vec::new();
        while !(self.clients.is_idle() && self.peers.is_idle()) && Instant::now() < end {
            if self.io.turn(Some(LINGER_MAX / 10), &mut done).is_err() {
                return;
            }
            for Completion { token, result, hold, .. } in done.drain(..) {
                // A socket that fails now is closed right after; its error has nobody to go to.
                let _closing = match (token, hold) {
                    (Token::ClientSend(conn), Hold::Message(message)) => {
                        self.clients.sent(&mut self.io, conn, message, result)
                    }
                    (Token::PeerSend(session), Hold::Message(message)) => {
                        self.peers.sent(&mut self.io, session, message, result)
                    }
                    _ => Ok(()),
                };
            }
            self.clients.flush(&mut self.io, boottime_now());
            self.peers.flush(&mut self.io);
        }
    }

    /// Closes every socket and waits until the kernel has given back what it can.
    fn shut_down(&mut self) {
        self.shared.close();
        for conn in self.clients.all() {
            self.clients.close(&mut self.io, conn, End::Server, "the volume stops");
        }
        for session in self.peers.all() {
            self.peers.close(&mut self.io, session);
        }
        self.shared.wake();
        let end = Instant::now() + DRAIN_MAX;
        let mut done = Vec::new();
        while self.io.in_kernel() > 0 && Instant::now() < end {
            if self.io.turn(Some(Duration::from_millis(100)), &mut done).is_err() {
                return;
            }
            done.clear();
        }
    }
}

/// Makes a socket fit for the ring: blocking (the ring waits for it, the thread never does) and, if it
/// is TCP, without delay and with a probe now and then whether a silent other end still exists.
fn prepare_socket(socket: &OwnedFd) -> rustix::io::Result<()> {
    rustix::net::sockopt::socket_type(socket)?;
    rustix::io::ioctl_fionbio(socket, false)?;
    // Refused if it is not TCP; then there is nothing to set.
    let _unix = rustix::net::sockopt::set_tcp_nodelay(socket, true);
    rustix::net::sockopt::set_socket_keepalive(socket, true)?;
    Ok(())
}

/// What a panic says.
fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no text)")
}
