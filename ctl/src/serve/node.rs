//! One node's process: what its parts share, and how they hear of each other.
//!
//! The control plane says who is primary and grants leases; each volume's reactor does the data path; this
//! carries messages between them and keeps the order that they rely on:
//! - a config is given to a reactor before a lease that was granted under it, and before the outcome of
//!   the proposal that made it;
//! - a reactor's health and report reach the control plane whenever they change.
//!
//! It decides nothing about data. A volume that cannot be opened is reported as failed with its reason,
//! and everything else goes on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blkrepl_engine::control::{ClusterState, Control, LeaseSnapshot};
use blkrepl_engine::reactor::VolumeHandle;
use blkrepl_engine::replica::Lease;
use blkrepl_engine::types::{
    Epoch, Health, Incarnation, LineageId, LogIndex, Member, NodeId, Proposal, ProposalOutcome, Reign,
    ReplicaReport, ReplicaStatus, SuperblockTrust, VolumeId,
};
use blkrepl_nbd::Misbehaviour;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::attachments::Attachments;
use super::files::{self, Nature, OpenError};
use super::sessions;
use super::status::{OwnReplica, OwnReplicas, node_name};
use crate::config::NodeConfig;
use crate::events::{EventLog, Happening, describe};

/// How long the config that shows a proposal's effect may take to arrive here after its outcome.
const CONFIG_PATIENCE: Duration = Duration::from_secs(5);
/// How long a replica that is made anew waits until the committed set does not name this run any more.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(15);
/// How long files that are being opened are waited for.
const OPENING_PATIENCE: Duration = Duration::from_secs(5);

/// The node.
pub struct Node {
    /// Its config file.
    pub config: NodeConfig,
    /// The control plane.
    pub control: Control,
    /// Its events.
    pub events: Arc<EventLog>,
    /// Boot id of the operating system.
    pub os_boot: u128,
    /// Which clients may write to the volumes served here.
    pub attachments: Attachments,
    /// What its NBD clients do; `None` on a witness.
    pub clients: Option<Arc<Misbehaviour>>,
    volumes: Mutex<BTreeMap<VolumeId, Slot>>,
    stopping: AtomicBool,
}

/// One volume with a replica here.
struct Slot {
    name: String,
    phase: Phase,
    /// Why the copy failed that was open before, and is still there.
    failed: Option<String>,
}

enum Phase {
    /// Its files are being opened.
    Opening,
    /// Its reactor runs.
    Running(Running),
    /// It cannot run; why.
    Failed(String),
}

struct Running {
    handle: VolumeHandle,
    nature: Nature,
    sessions: sessions::Redial,
    tasks: Vec<AbortHandle>,
}

/// What a volume's thread tells the node.
pub enum FromVolume {
    /// Ask the control plane.
    Propose(Proposal),
    /// Something happened.
    Event(blkrepl_engine::replica::Event),
    /// The session to a node is over.
    SessionLost(NodeId),
    /// The published status changed.
    Status(Arc<ReplicaStatus>),
}

/// The hooks of a volume's thread: everything goes into a channel, nothing waits.
pub struct Hooks(pub mpsc::UnboundedSender<FromVolume>);

impl blkrepl_engine::reactor::VolumeHooks for Hooks {
    // A closed channel means that the node is stopping: nobody wants to know any more.
    fn propose(&mut self, proposal: Proposal) {
        let _stopping = self.0.send(FromVolume::Propose(proposal));
    }
    fn event(&mut self, event: blkrepl_engine::replica::Event) {
        let _stopping = self.0.send(FromVolume::Event(event));
    }
    fn session_lost(&mut self, node: NodeId) {
        let _stopping = self.0.send(FromVolume::SessionLost(node));
    }
    fn status_changed(&mut self, status: Arc<ReplicaStatus>) {
        let _stopping = self.0.send(FromVolume::Status(status));
    }
}

impl Node {
    /// A node whose volumes are not opened yet.
    pub fn new(
        config: NodeConfig,
        control: Control,
        events: Arc<EventLog>,
        os_boot: u128,
        clients: Option<Arc<Misbehaviour>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            control,
            events,
            os_boot,
            attachments: Attachments::new(),
            clients,
            volumes: Mutex::default(),
            stopping: AtomicBool::new(false),
        })
    }

    /// This node and this run.
    pub fn me(&self) -> Member {
        Member { node: self.config.id, incarnation: self.incarnation() }
    }

    /// This run.
    pub fn incarnation(&self) -> Incarnation {
        self.control.incarnation()
    }

    /// Cluster state as applied here.
    pub fn state(&self) -> Arc<ClusterState> {
        self.control.cluster_state().borrow().clone()
    }

    /// Waits until the entry at a log index is applied here; false if that takes longer than `limit`.
    pub async fn applied(&self, index: LogIndex, limit: Duration) -> bool {
        let mut states = self.control.cluster_state();
        let shown = states.wait_for(|state| state.applied >= index);
        matches!(tokio::time::timeout(limit, shown).await, Ok(Ok(_)))
    }

    /// The node has begun to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// The reactor of a volume, if it runs here.
    pub fn handle(&self, volume: VolumeId) -> Option<VolumeHandle> {
        match &self.lock().get(&volume)?.phase {
            Phase::Running(running) => Some(running.handle.clone()),
            _ => None,
        }
    }

    /// What lies under the data of a volume that runs here.
    pub fn nature(&self, volume: VolumeId) -> Option<Nature> {
        match &self.lock().get(&volume)?.phase {
            Phase::Running(running) => Some(running.nature),
            _ => None,
        }
    }

    /// Why a volume's replica does not run here, if it failed.
    pub fn failure(&self, volume: VolumeId) -> Option<String> {
        match &self.lock().get(&volume)?.phase {
            Phase::Failed(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// What this node says of its replicas.
    pub fn own_replicas(&self) -> OwnReplicas {
        let replicas = self
            .lock()
            .iter()
            .map(|(&volume, slot)| match &slot.phase {
                Phase::Opening => OwnReplica { volume, status: None, failure: None },
                Phase::Failed(reason) => OwnReplica { volume, status: None, failure: Some(reason.clone()) },
                Phase::Running(r) => {
                    let status = r.handle.status();
                    let ended = r.handle.is_stopped() && !self.is_stopping();
                    let failure = ended.then(|| {
                        let why = status.failure.clone().unwrap_or_else(|| "see the log".to_string());
                        format!("its thread ended: {why}; restart the node")
                    });
                    OwnReplica { volume, status: Some((*status).clone()), failure }
                }
            })
            .collect();
        let blocked = self.control.leader_view().map(|v| v.blocked.into_iter().collect()).unwrap_or_default();
        let clients = self.clients.as_ref().map(|clients| clients.counts()).unwrap_or_default();
        OwnReplicas { replicas, blocked, clients }
    }

    /// Follows cluster state and leases until the task is dropped.
    pub async fn follow(self: Arc<Self>) {
        let mut states = self.control.cluster_state();
        let mut leases = self.control.leases();
        loop {
            // The lease is read before the state: the state is then no older than the lease needs.
            let lease = leases.borrow_and_update().clone();
            let state = states.borrow_and_update().clone();
            self.follow_once(&state, &lease);
            self.attachments.follow(&self, &state);
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                changed = leases.changed() => if changed.is_err() { return },
            }
        }
    }

    fn follow_once(self: &Arc<Self>, state: &ClusterState, lease: &LeaseSnapshot) {
        let stopping = self.is_stopping();
        let mut volumes = self.lock();
        for (&id, record) in &state.volumes {
            if record.replica(self.config.id).is_none() {
                continue;
            }
            match volumes.get_mut(&id) {
                Some(Slot { phase: Phase::Running(running), .. }) => {
                    forward(&running.handle, state, id, Some(lease));
                    if !stopping {
                        running.sessions.follow(state);
                    }
                }
                Some(_) => {}
                None if stopping => {}
                None => {
                    volumes
                        .insert(id, Slot { name: record.name.clone(), phase: Phase::Opening, failed: None });
                    tokio::spawn(Arc::clone(self).open(id, false));
                }
            }
        }
        // Volumes and replicas that are no more.
        volumes.retain(|id, slot| {
            let keep = state.volumes.get(id).is_some_and(|v| v.replica(self.config.id).is_some());
            if !keep && let Phase::Running(running) = &slot.phase {
                tracing::info!(volume = slot.name, "no replica here any more; stopping");
                running.end();
            }
            if !keep {
                self.control.remove_volume_report(*id);
            }
            keep
        });
    }

    /// Opens the replica of the volume of this name once more if it failed: what was in its way may be gone.
    pub async fn open_again(self: &Arc<Self>, name: &str) {
        let give_up = tokio::time::Instant::now() + OPENING_PATIENCE;
        loop {
            let failed = {
                let mut volumes = self.lock();
                let Some((&id, slot)) = volumes.iter_mut().find(|(_, slot)| slot.name == name) else {
                    return;
                };
                match slot.phase {
                    Phase::Running(_) => return,
                    Phase::Failed(_) => {
                        slot.phase = Phase::Opening;
                        Some(id)
                    }
                    Phase::Opening => None,
                }
            };
            if let Some(id) = failed {
                return Arc::clone(self).open(id, false).await;
            }
            if tokio::time::Instant::now() >= give_up {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Opens the files of a volume (or makes them, if there can be none yet) and starts its reactor.
    async fn open(self: Arc<Self>, id: VolumeId, recreate: bool) {
        let result = self.try_open(id, recreate).await;
        let mut volumes = self.lock();
        let Some(slot) = volumes.get_mut(&id) else { return };
        match result {
            Ok(running) if self.is_stopping() => running.end(),
            Ok(running) => {
                let (state, lease) = {
                    let lease = self.control.leases().borrow().clone();
                    (self.state(), lease)
                };
                forward(&running.handle, &state, id, Some(&lease));
                running.sessions.follow(&state);
                slot.phase = Phase::Running(running);
            }
            Err(error) => {
                let reason = format!("{}{}", crate::run::chain(&error), give_up_hint(&error, &slot.name));
                self.events.record(
                    Some(&slot.name),
                    Happening::new("volume_failed", format!("the replica here cannot be used: {reason}")),
                );
                slot.phase = Phase::Failed(reason.clone());
                self.control.set_volume_report(id, Health::Unhealthy(reason), no_report());
            }
        }
    }

    async fn try_open(self: &Arc<Self>, id: VolumeId, recreate: bool) -> anyhow::Result<Running> {
        let state = self.state();
        let view = state.config_view(id).ok_or_else(|| anyhow::anyhow!("the volume is gone"))?;
        let record = state.volumes.get(&id).ok_or_else(|| anyhow::anyhow!("the volume is gone"))?;
        let name = record.name.clone();
        let place = files::Place::of(&self.config, &name);
        let (me, os_boot) = (self.me(), self.os_boot);
        let opened = tokio::task::spawn_blocking(move || {
            let wanted = files::Wanted { view: &view, me, os_boot };
            if recreate { files::create(&place, &wanted) } else { files::open_or_create(&place, &wanted) }
        })
        .await
        .map_err(|e| anyhow::anyhow!("opening its files panicked: {e}"))?;
        let opened = opened?;
        let nature = opened.nature;
        for note in &opened.notes {
            self.events.record(Some(&name), Happening::new("opened", note.clone()));
        }
        let (to_node, from_volume) = mpsc::unbounded_channel();
        let hooks = Box::new(Hooks(to_node));
        let failed = self.lock().get(&id).and_then(|slot| slot.failed.clone());
        let idle_max = self.config.nbd.idle_timeout;
        let starting =
            tokio::task::spawn_blocking(move || files::start(opened, me, os_boot, failed, idle_max, hooks));
        let handle = starting.await.map_err(|e| anyhow::anyhow!("starting it panicked: {e}"))??;
        let redial = sessions::Redial::start(Arc::clone(self), id, handle.clone());
        let pump = tokio::spawn(Arc::clone(self).pump(id, name, handle.clone(), redial.clone(), from_volume));
        Ok(Running { handle, nature, sessions: redial, tasks: vec![pump.abort_handle()] })
    }

    /// Carries what a volume's thread says to where it belongs.
    async fn pump(
        self: Arc<Self>,
        id: VolumeId,
        name: String,
        handle: VolumeHandle,
        redial: sessions::Redial,
        mut from: mpsc::UnboundedReceiver<FromVolume>,
    ) {
        let status = handle.status();
        self.control.set_volume_report(id, status.health.clone(), status.report);
        while let Some(message) = from.recv().await {
            match message {
                FromVolume::Propose(proposal) => {
                    tokio::spawn(Arc::clone(&self).propose(proposal, handle.clone()));
                }
                FromVolume::Event(event) => {
                    let state = self.state();
                    self.events.record(Some(&name), describe(&event, |n| node_name(&state, n)));
                }
                FromVolume::SessionLost(node) => redial.lost(node),
                FromVolume::Status(status) => {
                    self.control.set_volume_report(id, status.health.clone(), status.report);
                }
            }
        }
        // The thread ended: cleanly in a stop, else it failed and must not be vouched for any more.
        if !self.is_stopping() {
            let status = handle.status();
            let why = status.failure.clone().unwrap_or_else(|| "its thread ended".to_string());
            self.events.record(
                Some(&name),
                Happening::new("volume_failed", format!("the replica here runs no longer: {why}")),
            );
            self.control.set_volume_report(id, Health::Unhealthy(why), status.report);
        }
    }

    async fn propose(self: Arc<Self>, proposal: Proposal, handle: VolumeHandle) {
        let outcome = self.control.propose(proposal).await;
        let mut states = self.control.cluster_state();
        if outcome == ProposalOutcome::Applied {
            let beyond = |s: &Arc<ClusterState>| {
                s.volumes.get(&proposal.volume).is_none_or(|v| v.epoch > proposal.expected_epoch)
            };
            if tokio::time::timeout(CONFIG_PATIENCE, states.wait_for(beyond)).await.is_err() {
                tracing::warn!("the config of a proposal that was applied has not arrived here yet");
            }
        }
        // The config that shows the outcome goes first; both in one go, so nothing comes between.
        let state = states.borrow().clone();
        forward(&handle, &state, proposal.volume, None);
        handle.proposal_outcome(proposal.id, outcome);
    }

    /// Makes this node's failed or lost replica anew. With `discard`, files that exist are removed.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub async fn recreate(self: &Arc<Self>, id: VolumeId, discard: bool) -> Result<(), String> {
        let state = self.state();
        let record = state.volumes.get(&id).ok_or("the volume is gone")?;
        if record.in_sync.iter().all(|m| m.node == self.config.id) {
            return Err(format!(
                "this node's replica is the only one in sync; making it anew would give up its content. \
                Promote another replica first (`blkrepl promote {} --force` there)",
                record.name
            ));
        }
        let old = {
            let mut volumes = self.lock();
            let slot = volumes.get_mut(&id).ok_or("this node has no replica of the volume")?;
            match &slot.phase {
                Phase::Opening => return Err("its files are being opened; try again in a moment".to_string()),
                Phase::Running(r)
                    if r.handle.status().failure.is_none() && !r.handle.is_stopped() && !discard =>
                {
                    return Err("the replica here works; add --discard-data to throw it away all the same"
                        .to_string());
                }
                _ => {}
            }
            std::mem::replace(&mut slot.phase, Phase::Opening)
        };
        let result = self.clear_away(id, &record.name, old, discard).await;
        if let Some(slot) = self.lock().get_mut(&id) {
            match &result {
                Ok(()) => slot.failed = None,
                Err(reason) => slot.phase = Phase::Failed(reason.clone()),
            }
        }
        result?;
        Arc::clone(self).open(id, true).await;
        self.failure(id).map_or(Ok(()), Err)
    }

    async fn clear_away(&self, id: VolumeId, name: &str, old: Phase, discard: bool) -> Result<(), String> {
        if let Phase::Running(running) = old {
            running.end();
            let (handle, ended) = (running.handle.clone(), running.handle);
            let wait = tokio::task::spawn_blocking(move || handle.wait_stopped(Duration::from_secs(10)));
            if !wait.await.unwrap_or(false) {
                return Err("the old replica did not stop; restart the node and try again".to_string());
            }
            // If it stays after all, it is not to be taken for one that works.
            if let Some(slot) = self.lock().get_mut(&id) {
                slot.failed = slot.failed.take().or_else(|| ended.status().failure.clone());
            }
        }
        self.await_removal(id, name).await?;
        let place = files::Place::of(&self.config, name);
        if discard { files::remove(&place) } else { files::check_absent(&place) }
            .map_err(|e: OpenError| e.to_string())
    }

    /// The new copy speaks for the same run of this process as the old one: as long as the committed set names
    /// that run, the copy would be taken for the member's [R10]. The core refuses that, too.
    async fn await_removal(&self, id: VolumeId, name: &str) -> Result<(), String> {
        self.control.set_volume_report(id, Health::Unhealthy("it is being made anew".into()), no_report());
        let me = self.me();
        let gone = |s: &Arc<ClusterState>| s.volumes.get(&id).is_none_or(|v| !v.in_sync.contains(&me));
        let mut states = self.control.cluster_state();
        let wait = states.wait_for(gone);
        match tokio::time::timeout(REMOVAL_PATIENCE, wait).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(format!(
                "the cluster still counts this node's replica of {name} as in sync, so its files stay: see `blkrepl \
                 status`, and ask again when another replica has taken it out"
            )),
        }
    }

    /// Stops every volume cleanly; names those that did not manage within `limit`.
    pub async fn stop_volumes(&self, limit: Duration) -> Vec<String> {
        self.stopping.store(true, Ordering::Relaxed);
        let running: Vec<(String, VolumeHandle)> = self
            .lock()
            .values()
            .filter_map(|slot| match &slot.phase {
                Phase::Running(r) => {
                    r.sessions.end();
                    Some((slot.name.clone(), r.handle.clone()))
                }
                _ => None,
            })
            .collect();
        running.iter().for_each(|(_, handle)| handle.stop());
        let waiting = tokio::task::spawn_blocking(move || {
            let end = std::time::Instant::now() + limit;
            let mut late = Vec::new();
            for (name, handle) in running {
                if !handle.wait_stopped(end.saturating_duration_since(std::time::Instant::now())) {
                    late.push(name);
                }
            }
            late
        });
        waiting.await.unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Slot>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    fn end(&self) {
        self.sessions.end();
        self.handle.stop();
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Config first, then the lease that was granted under it, always.
fn forward(handle: &VolumeHandle, state: &ClusterState, id: VolumeId, lease: Option<&LeaseSnapshot>) {
    let Some(view) = state.config_view(id) else { return };
    handle.config(view);
    if let Some(until) = lease.and_then(|l| l.until(id)) {
        handle.lease(Lease { until });
    }
}

/// How to give a copy up that cannot be opened, where that may be what is wanted.
fn give_up_hint(error: &anyhow::Error, name: &str) -> String {
    use blkrepl_engine::reactor::OpenError as E;
    match error.downcast_ref::<OpenError>() {
        Some(OpenError::Engine(
            E::Missing { .. }
            | E::Truncated { .. }
            | E::TooLong { .. }
            | E::Foreign { .. }
            | E::Superblock { .. },
        )) => format!(
            ". To give this copy up and have everything copied anew: `blkrepl volume recreate {name} \
            --discard-data` on this node"
        ),
        _ => String::new(),
    }
}

/// The report of a replica about which nothing can be said.
fn no_report() -> ReplicaReport {
    ReplicaReport {
        trust: SuperblockTrust::None,
        epoch: Epoch(0),
        reign: Reign(0),
        lineage: LineageId(0),
        member: None,
        inconsistent: false,
        clean: false,
        same_os_boot: false,
    }
}
