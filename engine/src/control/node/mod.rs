//! A node of the control plane, running: Raft, the listener, renewals and, while it leads, the failover
//! controller. [`Control`] is what the rest of the process sees of it.
//!
//! Runs on tokio and needs a runtime with I/O and time; disk writes happen on a thread of their own. It
//! never touches block data, and knows of replicas only what their reactors report.

mod bootstrap;
mod inner;
mod leader;
mod renew;
mod server;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::types::{Health, Incarnation, Nanos, NodeId, Proposal, ProposalOutcome, ReplicaReport, VolumeId};

use super::command::{Applied, ClusterOp};
use super::environment::{Environment, System};
use super::error::{CallError, ControlError, SubmitError};
use super::failover::Reports;
use super::lease::{LeaseSnapshot, LeaseView};
use super::rpc::{ADMIN_BYTES_MAX, ReplyBody, RequestBody};
use super::state::{ClusterState, NodeAddrs, NodeKind, StoreId};
use super::{runtime, store};

use inner::Inner;

/// How long an admin call to another node may take.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long `shutdown` waits for the store to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// A node that this node's config names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founder {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// What it is for.
    pub kind: NodeKind,
    /// Where it is reached.
    pub addrs: NodeAddrs,
}

/// How a node runs.
#[derive(Clone, Debug)]
pub struct ControlOptions {
    /// Directory of the store (`control.redb`, `boot`).
    pub dir: PathBuf,
    /// This node.
    pub me: NodeId,
    /// Where to listen.
    pub listen: SocketAddr,
    /// The nodes that the config names, this one among them. Together they found the cluster if none of
    /// them belongs to one; else they are where the cluster is looked for.
    pub founders: Vec<Founder>,
    /// Hash of the operating system's boot id.
    pub os_boot: u128,
    /// Length of leases of a cluster that is founded; later it is cluster state.
    pub lease: Duration,
    /// How often the lease is renewed.
    pub renew: Duration,
    /// How often the Raft leader is heard.
    pub heartbeat: Duration,
    /// Silence of the leader until a follower stands for election, shortest and longest.
    pub election: (Duration, Duration),
}

impl ControlOptions {
    /// Options with the default timing and no founders.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, me: NodeId, listen: SocketAddr) -> Self {
        Self {
            dir: dir.into(),
            me,
            listen,
            founders: Vec::new(),
            os_boot: 0,
            lease: super::state::LEASE_DEFAULT,
            renew: Duration::from_millis(400),
            heartbeat: Duration::from_millis(100),
            election: (Duration::from_millis(400), Duration::from_millis(800)),
        }
    }
}

/// Answers admin calls of other nodes.
pub type AdminHandler = Arc<dyn Fn(Vec<u8>) -> Pin<Box<dyn Future<Output = Vec<u8>> + Send>> + Send + Sync>;

/// What only the leader knows, for status.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LeaderView {
    /// Leases granted in this leadership; times are the leader's.
    pub leases: Vec<LeaseView>,
    /// The leader's clock.
    pub now: Nanos,
    /// Why volumes without a live primary stay without one.
    pub blocked: BTreeMap<VolumeId, String>,
    /// What nodes said with their last renewal.
    pub reports: Reports,
}

/// Creates the store of a new node and mints its identity. The one step that ever does [R13].
///
/// # Errors
/// [`ControlError::Exists`] if the directory holds a store; I/O errors.
pub fn init(dir: &Path, me: NodeId) -> Result<StoreId, ControlError> {
    init_in(&System::new(boot_time), dir, me)
}

/// As [`init`], in another environment.
///
/// # Errors
/// As there.
pub fn init_in(env: &dyn Environment, dir: &Path, me: NodeId) -> Result<StoreId, ControlError> {
    store::create(env, dir, me)
}

/// Opens the node's store and starts the node. Returns once it listens; whether there is a leader shows in
/// [`Control::leader`]. `now` is CLOCK_BOOTTIME.
///
/// # Errors
/// The store is missing, in use or refused [R13]; the address is taken; the options contradict themselves.
pub async fn start(options: ControlOptions, now: fn() -> Nanos) -> Result<Control, ControlError> {
    start_in(options, Arc::new(System::new(now))).await
}

/// As [`start`], in another environment.
///
/// # Errors
/// As there.
pub async fn start_in(options: ControlOptions, env: Arc<dyn Environment>) -> Result<Control, ControlError> {
    inner::check_options(&options)?;
    let opened = store::open(env.as_ref(), &options.dir, options.me)?;
    let listener = env
        .listen(options.listen)
        .await
        .map_err(|source| ControlError::Listen { addr: options.listen, source })?;
    let inner = Inner::start(options, opened, env).await?;
    inner.spawn_vital("serve", server::serve(Arc::clone(&inner), listener));
    inner.spawn_vital("watch_raft", leader::watch_raft(Arc::clone(&inner)));
    inner.spawn_vital("lead", leader::lead(Arc::clone(&inner)));
    inner.spawn_vital("keep_membership", leader::keep_membership(Arc::clone(&inner)));
    inner.spawn_vital("renew", renew::renew(Arc::clone(&inner)));
    inner.spawn_vital("watch_outdated", renew::watch_outdated(Arc::clone(&inner)));
    inner.spawn_vital("follow_applied", renew::follow_applied(Arc::clone(&inner)));
    inner.spawn_vital("found", bootstrap::found(Arc::clone(&inner)));
    Ok(Control { running: Arc::new(Running { inner }) })
}

/// Stops the node's tasks when the last handle is dropped.
struct Running {
    inner: Arc<Inner>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.inner.abort();
        if runtime::is_running() {
            let raft = self.inner.raft.clone();
            runtime::spawn(async move { raft.shutdown().await });
        }
    }
}

/// A running node of the control plane. Clones are handles to the same node; when the last is dropped it
/// stops as if it had been killed.
#[derive(Clone)]
pub struct Control {
    running: Arc<Running>,
}

impl Control {
    fn inner(&self) -> &Arc<Inner> {
        &self.running.inner
    }

    /// This run of this node.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.inner().incarnation
    }

    /// Identity of this node's store.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.inner().peers.me().store
    }

    /// The applied cluster state and every later one.
    #[must_use]
    pub fn cluster_state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.inner().state.clone()
    }

    /// What this node's lease allows and every change of it.
    #[must_use]
    pub fn leases(&self) -> watch::Receiver<LeaseSnapshot> {
        self.inner().lease_out.subscribe()
    }

    /// The Raft leader as far as this node knows.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        *self.inner().leader.borrow()
    }

    /// The Raft leader and every change of it.
    #[must_use]
    pub fn leader_watch(&self) -> watch::Receiver<Option<NodeId>> {
        self.inner().leader.subscribe()
    }

    /// Turns to a reason when this node cannot go on: its store failed, or the cluster refuses it [R13]. The
    /// process should tell the operator and end.
    #[must_use]
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner().failed.subscribe()
    }

    /// What the leader knows beyond the cluster state; `None` if this node does not lead.
    #[must_use]
    pub fn leader_view(&self) -> Option<LeaderView> {
        self.inner().leader_view()
    }

    /// Changes the cluster state: hands the command to the leader and waits until it is applied there and
    /// here. Retries under one request id until a deadline of some seconds.
    ///
    /// # Errors
    /// [`SubmitError::Refused`] with the reason, or [`SubmitError::Unknown`] if no leader answered in time.
    pub async fn submit(&self, op: ClusterOp) -> Result<Applied, SubmitError> {
        let request = self.inner().next_request();
        self.inner().submit(request, op).await
    }

    /// Carries out a replica's proposal. When it says `Applied`, the state that shows it has been published
    /// here before.
    pub async fn propose(&self, proposal: Proposal) -> ProposalOutcome {
        let request = super::command::RequestId::of_proposal(&proposal);
        match self.inner().submit(request, ClusterOp::Propose(proposal)).await {
            Ok(_) => ProposalOutcome::Applied,
            Err(SubmitError::Refused(why)) => ProposalOutcome::Refused(why),
            Err(SubmitError::Unknown(_)) => ProposalOutcome::Unknown,
        }
    }

    /// What this node's replica of `volume` says of itself from now on; travels with every renewal. Becoming
    /// unhealthy, or healthy again, renews at once.
    pub fn set_volume_report(&self, volume: VolumeId, health: Health, report: ReplicaReport) {
        self.inner().set_volume_report(volume, health, report);
    }

    /// This node has no replica of `volume` any more.
    pub fn remove_volume_report(&self, volume: VolumeId) {
        self.inner().remove_volume_report(volume);
    }

    /// Answers the admin calls of other nodes (and of this one to itself).
    pub fn set_admin_handler(&self, handler: AdminHandler) {
        self.inner().set_admin_handler(handler);
    }

    /// Sends an admin request to a node, at most once.
    ///
    /// # Errors
    /// It could not be reached, refused, or did not answer in time; then its effect is not known.
    pub async fn call(&self, node: NodeId, request: Vec<u8>) -> Result<Vec<u8>, CallError> {
        if request.len() > ADMIN_BYTES_MAX {
            let reason = format!("an admin request has at most {ADMIN_BYTES_MAX} bytes");
            return Err(CallError::Refused { node, reason });
        }
        let inner = self.inner();
        let reply = if node == inner.me {
            inner.handle_admin(request).await
        } else {
            inner.peers.call(node, RequestBody::Admin(request), CALL_DEADLINE).await?
        };
        match reply {
            ReplyBody::Admin(bytes) => Ok(bytes),
            ReplyBody::Failed(reason) => Err(CallError::Refused { node, reason }),
            other => Err(CallError::Refused { node, reason: format!("unexpected answer {other:?}") }),
        }
    }

    /// Stops the node and closes its store. Says goodbye to nobody: to the others it looks like a crash, and
    /// by design it is none the worse for it.
    pub async fn shutdown(&self) {
        let inner = self.inner();
        inner.stop_tasks().await;
        // An error means that Raft's task panicked or was cancelled, so it is stopped as well.
        let _ = inner.raft.shutdown().await;
        let mut closed = inner.close_store();
        // Raft's last tasks may hold the store a moment longer; a store that stays open is reported by the
        // next start.
        let _ = runtime::timeout(CLOSE_DEADLINE, closed.wait_for(|closed| *closed)).await;
    }
}

/// CLOCK_BOOTTIME, which goes on while the machine sleeps.
#[must_use]
pub fn boot_time() -> Nanos {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(t.tv_nsec).unwrap_or(0);
    Nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}
