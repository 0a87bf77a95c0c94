//! `blkrepl serve`: one node, from its directory lock to its clean stop.
//!
//! Order at the start: lock the directory (a second daemon is locked out), bind every socket (a port in
//! use is found before anything has happened), start the control plane (this run gets its incarnation),
//! follow cluster state. At the stop: no new clients, every volume flushed and marked clean, then the
//! control plane. The process's own threads are one for tokio and one per volume.

pub mod exports;
pub mod files;
pub mod node;
pub mod peers;
pub mod sessions;
pub mod status;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use blkrepl_engine::control::{self, ControlOptions, Founder, NodeKind};
use blkrepl_engine::reactor::boottime_now;
use blkrepl_nbd::{ListenAddr, Server, ServerOptions};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::server as admin;
use crate::config::{Kind, NodeConfig};
use crate::events::{EventLog, Happening};
use crate::node_dir::{DirLock, PID_FILE};
use crate::ops::{self, Ops};
use exports::NodeExports;
use node::Node;
use peers::PeerGate;

/// How long volumes get for a clean stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a node until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start (directory, ports, store), or did not stop cleanly.
pub fn run(config: NodeConfig) -> anyhow::Result<()> {
    let lock = DirLock::take(&config.dir, PID_FILE, "daemon")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(daemon(config));
    runtime.shutdown_timeout(Duration::from_millis(500));
    drop(lock);
    result
}

async fn daemon(config: NodeConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let events = Arc::new(EventLog::new(&config.name));
    let exports = Arc::new(NodeExports::default());
    let sockets = Sockets::bind(&config, Arc::clone(&exports)).await?;
    let control = control::start(control_options(&config), boottime_now)
        .await
        .with_context(|| format!("cannot start the control plane of {}", config.name))?;
    let incarnation = control.incarnation();
    let os_boot = os_boot_id()?;
    let node = Node::new(config, control, Arc::clone(&events), os_boot);
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
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    events.record(None, Happening::new("stopping", format!("{} stops", node.config.name)));
    let late = node.stop_volumes(STOP_TIMEOUT).await;
    if let Some(nbd) = sockets.nbd {
        nbd.stop().await;
    }
    node.control.shutdown().await;
    tasks.shutdown().await;
    let removed = std::fs::remove_file(&node.config.admin);
    tracing::debug!("admin socket removed: {removed:?}");
    if !late.is_empty() {
        anyhow::bail!(
            "{} did not stop within {} s and was left; nothing acknowledged is lost, its next start takes longer",
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
    async fn bind(config: &NodeConfig, exports: Arc<NodeExports>) -> anyhow::Result<Self> {
        let admin = admin::listen(&config.admin)?;
        if config.kind == Kind::Witness {
            return Ok(Self { peers: None, nbd: None, admin });
        }
        let peers = TcpListener::bind(config.peer).await.with_context(|| {
            format!(
                "cannot listen for peers on {} (listen.peer in {}); if the port is in use, end who uses it (`ss -ltnp` shows it) or choose another on every node",
                config.peer,
                config.file.display()
            )
        })?;
        let mut listen = vec![ListenAddr::Unix(config.nbd_unix.clone())];
        listen.extend(config.nbd_tcp.map(ListenAddr::Tcp));
        let nbd = Server::start(&listen, exports, ServerOptions::default()).await?;
        Ok(Self { peers: Some(peers), nbd: Some(nbd), admin })
    }
}

fn control_options(config: &NodeConfig) -> ControlOptions {
    ControlOptions {
        dir: config.dir.clone(),
        me: config.id,
        listen: config.control,
        founders: config
            .founders
            .iter()
            .map(|f| Founder {
                id: f.id,
                name: f.name.clone(),
                kind: match f.kind {
                    Kind::Data => NodeKind::Data,
                    Kind::Witness => NodeKind::Witness,
                },
                control_addr: f.control.to_string(),
                peer_addr: f.peer.to_string(),
                nbd_addr: f.nbd.clone(),
            })
            .collect(),
        lease: config.timing.lease,
        renew: config.timing.renew,
        heartbeat: config.timing.heartbeat,
        election: config.timing.election,
    }
}

/// The boot id of the operating system: the same until the machine restarts.
fn os_boot_id() -> anyhow::Result<u128> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    u128::from_str_radix(&text.trim().replace('-', ""), 16)
        .with_context(|| format!("{path} holds no boot id"))
}
