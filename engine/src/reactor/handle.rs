//! The way into a volume's thread from every other one.
//!
//! A [`VolumeHandle`] puts commands into a mailbox and wakes the ring through an event descriptor; the
//! thread takes the whole mailbox once per wake. The mailbox's lock is held for a push or a swap and
//! never while anything waits. Commands come from the control plane and from negotiated connections, so
//! their rate is not that of requests; connections, the only ones that outsiders cause, are bounded.
//!
//! Never does: waiting for the volume's thread (but for [`spawn`] and [`VolumeHandle::wait_stopped`]).

use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use crate::replica::{Event, Lease};
use crate::types::{
    ConfigView, Incarnation, Nanos, NodeId, Proposal, ProposalId, ProposalOutcome, ReplicaReport,
    ReplicaStatus,
};

use super::client::{ClientProtocol, ClientSession, End};
use super::core::Core;
use super::error::ReactorError;
use super::open::VolumeFiles;
use super::volume::{Volume, VolumeParts};

/// Most client connections that wait in the mailbox; further ones are closed unanswered.
pub const CONNECTIONS_WAITING_MAX: usize = 256;
/// How long a client connection may stay unread before it is closed [R24]. Below the 30 s after which a
/// kernel or library NBD client commonly gives a request up.
pub const UNREAD_MAX: Duration = Duration::from_secs(20);
/// Bytes of buffers that are registered with the ring, if the limit on locked memory allows.
const REGISTERED_BYTES: usize = 16 << 20;

/// What a volume asks of the rest of its node. Called on the volume's thread: must return at once and
/// never wait (send on a channel, set a flag).
pub trait VolumeHooks: Send + 'static {
    /// Asks the control plane; the outcome comes back through [`VolumeHandle::proposal_outcome`].
    fn propose(&mut self, proposal: Proposal);
    /// Something happened.
    fn event(&mut self, event: Event);
    /// The session to this node is over and no newer one exists: connect again.
    fn session_lost(&mut self, node: NodeId);
    /// The published status changed.
    fn status_changed(&mut self, status: Arc<ReplicaStatus>);
}

/// How a volume's thread is to run.
#[derive(Clone, Debug)]
pub struct ReactorOptions {
    /// The volume's name, for logs and the thread.
    pub name: String,
    /// Submission entries of the ring.
    pub ring_entries: u32,
    /// Bytes of buffers to register with the ring; 0: none.
    pub registered_bytes: usize,
    /// How long a client connection may stay unread before it is closed [R24].
    pub unread_max: Duration,
    /// How long a client connection may ask nothing, with nothing in flight, before it is closed. `None`: for ever.
    pub idle_max: Option<Duration>,
}

impl ReactorOptions {
    /// The defaults, for a volume of this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ring_entries: super::ring::RING_ENTRIES,
            registered_bytes: REGISTERED_BYTES,
            unread_max: UNREAD_MAX,
            idle_max: None,
        }
    }
}

/// The answer to an operator's command. Called once, on the volume's thread: must not wait.
pub type CommandReply = Box<dyn FnOnce(Result<(), String>) + Send>;

/// The answer to [`VolumeHandle::begin_force`]. Called once, on the volume's thread: must not wait.
pub type ForceReply = Box<dyn FnOnce(Result<ReplicaReport, String>) + Send>;

/// Names one client connection for whoever gave it to the volume, who uses none twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey(pub u64);

/// Hears how a client connection ended. Called on the volume's thread: must not wait.
pub type ClientGuard = Box<dyn FnOnce(End) + Send>;

/// A client connection past its negotiation.
pub struct NewClient {
    /// Names it in [`VolumeHandle::end_clients`].
    pub key: ClientKey,
    /// The socket, TCP or unix; from the next byte on it carries requests of `protocol`.
    pub socket: OwnedFd,
    /// Its codec.
    pub protocol: Box<dyn ClientProtocol>,
    /// The client session that it belongs to, if any.
    pub session: Option<ClientSession>,
    /// Who it is, for logs.
    pub name: String,
    /// Told when the connection is over (the volume takes no request from it any more) and how it ended; dropped
    /// untold if the volume ends before it has taken the connection, or fails.
    pub guard: ClientGuard,
}

/// What other threads ask of a volume.
pub(super) enum Command {
    Config(Box<ConfigView>),
    Lease(Lease),
    Proposal(ProposalId, ProposalOutcome),
    Peer { node: NodeId, incarnation: Incarnation, stream: TcpStream },
    Client(Box<NewClient>),
    EndClients(Vec<ClientKey>),
    Move(NodeId, CommandReply),
    Demote(CommandReply),
    Force(bool, ForceReply),
    EndForce,
    Stop,
}

struct Mailbox {
    commands: VecDeque<Command>,
    clients: usize,
    /// The thread takes no more.
    closed: bool,
}

/// What a volume's thread and its handles have in common.
pub(super) struct Shared {
    name: String,
    mailbox: Mutex<Mailbox>,
    status: Mutex<Option<Arc<ReplicaStatus>>>,
    stopped: Mutex<bool>,
    stopped_changed: Condvar,
    wake: OwnedFd,
}

/// A lock whose data stays valid whatever a panicking thread left behind: every section is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(name: &str) -> Result<Self, ReactorError> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| ReactorError::Io {
            action: "making an event descriptor",
            source: error.into(),
        })?;
        Ok(Self {
            name: name.to_owned(),
            mailbox: Mutex::new(Mailbox { commands: VecDeque::new(), clients: 0, closed: false }),
            status: Mutex::new(None),
            stopped: Mutex::new(false),
            stopped_changed: Condvar::new(),
            wake,
        })
    }

    /// The volume's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A second descriptor of the wake event, for the ring.
    pub(super) fn wake_fd(&self) -> std::io::Result<OwnedFd> {
        self.wake.try_clone()
    }

    /// Wakes the thread.
    pub(super) fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::error!(volume = self.name, %error, "the volume's thread cannot be woken");
        }
    }

    /// Takes everything in the mailbox.
    pub(super) fn take(&self) -> VecDeque<Command> {
        let mut mailbox = lock(&self.mailbox);
        mailbox.clients = 0;
        std::mem::take(&mut mailbox.commands)
    }

    /// The thread takes no more: what is in the mailbox is answered or dropped, as will be what comes.
    pub(super) fn close(&self) {
        let left = {
            let mut mailbox = lock(&self.mailbox);
            mailbox.closed = true;
            std::mem::take(&mut mailbox.commands)
        };
        left.into_iter().for_each(|command| refuse(command, &self.name));
    }

    /// The thread is about to end and holds nothing any more.
    fn ended(&self) {
        self.close();
        *lock(&self.stopped) = true;
        self.stopped_changed.notify_all();
    }

    /// Makes a status the published one.
    pub(super) fn publish(&self, status: Arc<ReplicaStatus>) {
        *lock(&self.status) = Some(status);
    }

    /// The published status.
    pub(super) fn status(&self) -> Option<Arc<ReplicaStatus>> {
        lock(&self.status).clone()
    }
}

/// Answers a command that nobody will carry out; connections are closed by being dropped.
fn refuse(command: Command, name: &str) {
    let stopped = format!("volume {name} is stopped on this node; start the node again");
    match command {
        Command::Move(_, reply) | Command::Demote(reply) => reply(Err(stopped)),
        Command::Force(_, reply) => reply(Err(stopped)),
        Command::Client(mut client) => client.protocol.closed(End::Full),
        _ => {}
    }
}

/// A volume that runs on its own thread. Cheap to clone; dropping every handle does not stop it.
#[derive(Clone)]
pub struct VolumeHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for VolumeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeHandle").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

impl VolumeHandle {
    fn send(&self, command: Command) {
        let is_client = matches!(command, Command::Client(_));
        let refused = {
            let mut mailbox = lock(&self.shared.mailbox);
            if mailbox.closed || (is_client && mailbox.clients >= CONNECTIONS_WAITING_MAX) {
                Some(command)
            } else {
                mailbox.clients += usize::from(is_client);
                mailbox.commands.push_back(command);
                None
            }
        };
        match refused {
            Some(command) => refuse(command, &self.shared.name),
            None => self.shared.wake(),
        }
    }

    /// A config was committed and applied here. Views may come more than once, but in order.
    pub fn config(&self, config: ConfigView) {
        self.send(Command::Config(Box::new(config)));
    }

    /// A lease was granted to this node, this volume not excluded.
    pub fn lease(&self, lease: Lease) {
        self.send(Command::Lease(lease));
    }

    /// What became of a proposal. The config that shows it must have been given before.
    pub fn proposal_outcome(&self, id: ProposalId, outcome: ProposalOutcome) {
        self.send(Command::Proposal(id, outcome));
    }

    /// A peer of this volume is connected and greeted; from the next byte on the stream carries frames. It
    /// replaces an older session to the same node. Non-blocking mode is switched off, TCP_NODELAY on.
    pub fn peer_connected(&self, node: NodeId, incarnation: Incarnation, stream: TcpStream) {
        self.send(Command::Peer { node, incarnation, stream });
    }

    /// A client has negotiated. Closed unanswered if there are too many.
    pub fn client_connected(&self, client: NewClient) {
        self.send(Command::Client(Box::new(client)));
    }

    /// Closes those of these connections that are open, unanswered; also one that was given over before and is not
    /// open yet. Requests of theirs that the volume has taken may still be carried out, but before any request of a
    /// connection that is given over later and touches the same bytes.
    pub fn end_clients(&self, clients: Vec<ClientKey>) {
        self.send(Command::EndClients(clients));
    }

    /// Begins to hand the primary role to `to`. `reply` tells whether it began; that it ended shows in the
    /// config.
    pub fn begin_move(&self, to: NodeId, reply: impl FnOnce(Result<(), String>) + Send + 'static) {
        self.send(Command::Move(to, Box::new(reply)));
    }

    /// Begins to give the primary role up. `reply` as in [`Self::begin_move`].
    pub fn begin_demote(&self, reply: impl FnOnce(Result<(), String>) + Send + 'static) {
        self.send(Command::Demote(Box::new(reply)));
    }

    /// Keeps this copy as it is for a forced promotion that is about to be proposed, for 30 s at most; `reply` gets
    /// what it is, or why it cannot be promoted. `discard_inconsistent`: also a copy that a resync left half done.
    pub fn begin_force(
        &self,
        discard_inconsistent: bool,
        reply: impl FnOnce(Result<ReplicaReport, String>) + Send + 'static,
    ) {
        self.send(Command::Force(discard_inconsistent, Box::new(reply)));
    }

    /// The force is refused: resyncs may begin again.
    pub fn end_force(&self) {
        self.send(Command::EndForce);
    }

    /// Begins a clean stop: flush, mark clean, close everything, end the thread.
    pub fn stop(&self) {
        self.send(Command::Stop);
    }

    /// The latest published status: at most 50 ms old, and never older than the last change of role, health
    /// or serving.
    #[must_use]
    pub fn status(&self) -> Arc<ReplicaStatus> {
        self.shared.status().expect("published before the handle is given out")
    }

    /// True once the thread has ended: stopped cleanly, or failed (then the status says why).
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        *lock(&self.shared.stopped)
    }

    /// Waits until the thread has ended, its files closed and unlocked (unless the kernel still has a
    /// request of theirs); false if it takes longer than `limit`. Blocks: not for an async thread.
    #[must_use]
    pub fn wait_stopped(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut stopped = lock(&self.shared.stopped);
        while !*stopped {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            let waited = self.shared.stopped_changed.wait_timeout(stopped, left);
            stopped = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// CLOCK_BOOTTIME, the clock of every `now` and every lease.
#[must_use]
pub fn boottime_now() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Nanos(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Starts the thread of one volume: makes the core there with `make_core` (given the time) and drives it
/// until it has stopped. Returns when the core is made and its first status published. Blocks for that
/// long: not for an async thread.
///
/// # Errors
/// [`ReactorError`]: io_uring is not allowed or not there, or the thread could not be made.
pub fn spawn<C, F>(
    make_core: F,
    files: VolumeFiles,
    hooks: Box<dyn VolumeHooks>,
    options: ReactorOptions,
) -> Result<VolumeHandle, ReactorError>
where
    C: Core + 'static,
    F: FnOnce(Nanos) -> C + Send + 'static,
{
    let shared = Arc::new(Shared::new(&options.name)?);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let name = options.name.clone();
    let for_thread = Arc::clone(&shared);
    let run = move || {
        // Told last, when the volume and its files are dropped, and however the thread ends.
        let guard = EndedOnDrop(Arc::clone(&for_thread));
        match Volume::new(make_core, VolumeParts { files, hooks, shared: for_thread, options }) {
            Ok(volume) => {
                let _started = ready.send(Ok(()));
                volume.run();
            }
            Err(error) => drop(ready.send(Err(error))),
        }
        drop(guard);
    };
    std::thread::Builder::new()
        .name(format!("vol-{name}"))
        .spawn(run)
        .map_err(|source| ReactorError::Io { action: "starting the volume's thread", source })?;
    match started.recv() {
        Ok(result) => result.map(|()| VolumeHandle { shared }),
        Err(_) => Err(ReactorError::ThreadEnded(name)),
    }
}

struct EndedOnDrop(Arc<Shared>);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        self.0.ended();
    }
}
