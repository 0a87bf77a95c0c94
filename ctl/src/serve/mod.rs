//! `blkrepl serve`: one node, from its directory lock to its clean stop.
//!
//! Order at the start: lock the directory (a second daemon is locked out), bind every socket (a port in
//! use is found before anything has happened), start the control plane (this run gets its incarnation),
//! follow cluster state. At the stop: no new clients, every volume flushed and marked clean, then the
//! control plane. Threads: one for tokio, one for the control plane's store, one per volume, and those of
//! tokio's pool while files are opened or made.

pub mod attachments;
pub mod client_host;
pub mod exports;
pub mod files;
pub mod left_over;
pub mod node;
pub mod passed;
pub mod peers;
pub mod sessions;
pub mod status;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use blkrepl_engine::control::{self, Control, ControlError, ControlOptions, Founder, NodeAddrs, NodeKind};
use blkrepl_engine::reactor::boottime_now;
use blkrepl_nbd::{ListenAddr, Server, ServerOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::server as admin;
use crate::config::{Kind, NodeConfig};
use crate::events::{EventLog, Happening};
use crate::memory;
use crate::node_dir::{DirLock, PID_FILE};
use crate::ops::{self, Ops};
use exports::NodeExports;
use node::Node;
use passed::Passed;
use peers::PeerGate;

/// File descriptors that are kept from clients: connections of other nodes and operators (128 each, and 64
/// handshakes), and files.
const DESCRIPTORS_KEPT: i32 = 384;
/// How long volumes get for a clean stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a node until SIGTERM or SIGINT; NBD listens on the sockets that were passed, if any.
///
/// # Errors
/// It cannot start (directory, ports, store), or did not stop cleanly.
pub fn run(config: NodeConfig, passed: Vec<Passed>) -> anyhow::Result<()> {
    let lock = DirLock::take(&config.dir, PID_FILE, "daemon")?;
    end_with_any_panic();
    // The volume may be mapped on this very machine, and goes on only while a quorum does.
    memory::hold_for_block_io();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(daemon(config, passed));
    runtime.shutdown_timeout(Duration::from_millis(500));
    drop(lock);
    result
}

/// From now on a panic on this thread, which runs every task of the node, ends the process. A node without
/// one of its tasks would look alive and keep its role while nobody does its part; one that is gone is replaced.
/// Volumes have threads of their own, which report how they end.
fn end_with_any_panic() {
    let node = std::thread::current().id();
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        if std::thread::current().id() == node {
            std::process::abort();
        }
    }));
}

async fn daemon(config: NodeConfig, passed: Vec<Passed>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let events = Arc::new(EventLog::new(&config.name));
    let exports = Arc::new(NodeExports::default());
    let sockets = Sockets::bind(&config, Arc::clone(&exports), passed).await?;
    let os_boot = os_boot_id()?;
    let control = start_control(&config, os_boot).await?;
    let incarnation = control.incarnation();
    let mut failed = control.failed();
    let clients = sockets.nbd.as_ref().map(|nbd| Arc::clone(nbd.misbehaviour()));
    let node = Node::new(config, control, Arc::clone(&events), os_boot, clients);
    let asked = Arc::clone(&node);
    node.control.set_admin_handler(Arc::new(move |call| {
        let node = Arc::clone(&asked);
        Box::pin(ops::answer(node, call))
    }));
    exports.set(Arc::clone(&node));
    events.record(
        None,
        Happening::new("started", format!("{} runs as incarnation {incarnation}", node.config.name)),
    );
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(listener) = sockets.peers {
        tasks.spawn(peers::accept(listener, Arc::clone(&node) as Arc<dyn PeerGate>));
    }
    tasks.spawn(admin::serve(sockets.admin, Arc::new(Ops(Arc::clone(&node))), Arc::clone(&events)));
    tasks.spawn(Arc::clone(&node).follow());
    tasks.spawn(attachments::sweep(Arc::clone(&node)));
    let failure = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        // The control plane keeps its sender as long as it lives; a closed channel says nothing.
        Ok(reason) = failed.wait_for(Option::is_some) => reason.clone(),
    };
    events.record(None, Happening::new("stopping", format!("{} stops", node.config.name)));
    let late = node.stop_volumes(STOP_TIMEOUT).await;
    if let Some(nbd) = sockets.nbd {
        nbd.stop().await;
    }
    node.control.shutdown().await;
    tasks.shutdown().await;
    let removed = std::fs::remove_file(&node.config.admin);
    tracing::debug!("admin socket removed: {removed:?}");
    if let Some(reason) = failure {
        anyhow::bail!("the control plane of {} cannot go on: {reason}", node.config.name);
    }
    if !late.is_empty() {
        anyhow::bail!(
            "{} did not stop within {} s and was left; nothing acknowledged is lost, its next start takes \
            longer",
            late.join(", "),
            STOP_TIMEOUT.as_secs()
        );
    }
    Ok(())
}

/// Every socket of the node but the control plane's.
struct Sockets {
    peers: Option<TcpListener>,
    nbd: Option<Server>,
    admin: tokio::net::UnixListener,
}

impl Sockets {
    async fn bind(
        config: &NodeConfig,
        exports: Arc<NodeExports>,
        passed: Vec<Passed>,
    ) -> anyhow::Result<Self> {
        let admin = admin::listen(&config.admin)?;
        if config.kind == Kind::Witness {
            anyhow::ensure!(passed.is_empty(), "a witness serves no clients; let no socket unit start it");
            return Ok(Self { peers: None, nbd: None, admin });
        }
        let peers = TcpListener::bind(config.peer).await.with_context(|| {
            format!(
                "cannot listen for peers on {} (listen.peer in {}); if the port is in use, end who uses it \
                (`ss -ltnp` shows it) or choose another on every node",
                config.peer,
                config.file.display()
            )
        })?;
        let mut listen = vec![ListenAddr::Unix(config.nbd_unix.clone())];
        listen.extend(config.nbd_tcp.map(ListenAddr::Tcp));
        let options = ServerOptions {
            descriptor_max: descriptors_for_clients(),
            connections: config.nbd.connections,
            negotiation_timeout: config.nbd.handshake_timeout,
            ..ServerOptions::default()
        };
        let (sockets, listen) = passed::for_nbd(passed, listen)?;
        let nbd = Server::start_on(sockets, &listen, exports, options).await?;
        Ok(Self { peers: Some(peers), nbd: Some(nbd), admin })
    }
}

/// Raises the limit of open files as far as it goes, and returns the highest descriptor that a client's
/// connection may have. The rest is for files, peers, the control plane and the operator: clients must not be
/// able to cut a node off from its cluster.
fn descriptors_for_clients() -> i32 {
    let mut limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit = raised,
        Err(error) => tracing::debug!("the limit of open files stays at {:?}: {error}", limit.current),
    }
    let Some(most) = limit.current.and_then(|most| i32::try_from(most).ok()) else { return i32::MAX };
    most - DESCRIPTORS_KEPT.min(most / 2)
}

fn control_options(config: &NodeConfig, os_boot: u128) -> ControlOptions {
    let mut options = ControlOptions::new(&config.dir, config.id, config.control);
    options.founders = config
        .founders
        .iter()
        .map(|f| Founder {
            id: f.id,
            name: f.name.clone(),
            kind: match f.kind {
                Kind::Data => NodeKind::Data,
                Kind::Witness => NodeKind::Witness,
            },
            addrs: NodeAddrs { control: f.control.to_string(), peer: f.peer.to_string(), nbd: f.nbd.clone() },
        })
        .collect();
    options.os_boot = os_boot;
    options.lease = config.timing.lease;
    options.renew = config.timing.renew;
    options.heartbeat = config.timing.heartbeat;
    options.election = config.timing.election;
    options
}

/// Starts the control plane; an error says what to do next.
async fn start_control(config: &NodeConfig, os_boot: u128) -> anyhow::Result<Control> {
    let started = control::start(control_options(config, os_boot), boottime_now).await;
    started.map_err(|error| match error {
        ControlError::Io { ref source, .. } if is_full(source) => anyhow::Error::new(error).context(format!(
            "cannot start the control plane of {}: free some space in {} and start it again",
            config.name,
            config.dir.display()
        )),
        ControlError::Missing(_) => anyhow::Error::new(error).context(format!(
            "{} has no store (config {})",
            config.name,
            config.file.display()
        )),
        _ => anyhow::Error::new(error).context(format!("cannot start the control plane of {}", config.name)),
    })
}

/// Room is what is missing.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// The boot id of the operating system: the same until the machine restarts.
fn os_boot_id() -> anyhow::Result<u128> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    u128::from_str_radix(&text.trim().replace('-', ""), 16)
        .with_context(|| format!("{path} holds no boot id"))
}
