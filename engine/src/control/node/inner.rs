//! What the tasks of a running node share, and submitting commands from any node.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use openraft::{Config, SnapshotPolicy};
use tokio::sync::{Notify, watch};

use crate::types::{Health, Incarnation, LogIndex, NodeId, ReplicaReport, VolumeId};

use super::super::codec;
use super::super::command::{Applied, ClusterOp, Command, RequestId};
use super::super::environment::Environment;
use super::super::error::{ControlError, SubmitError};
use super::super::failover::VolumeReport;
use super::super::lease::{LeaseSnapshot, NodeLease, with_drift};
use super::super::network::Peers;
use super::super::raft::Raft;
use super::super::rpc::{ADMIN_BYTES_MAX, ReplyBody, RequestBody, Sender};
use super::super::rpc::{COMMAND_BYTES_MAX, ENTRIES_PER_MESSAGE_MAX, HEALTH_TEXT_MAX};
use super::super::runtime::{Instant, TaskSet, sleep, timeout_at};
use super::super::state::{ClusterState, LEASE_MAX, LEASE_MIN, VOLUMES_MAX};
use super::super::store::{Closed, Opened, StateMachine, StoreHandle};
use super::leader::Lead;
use super::{AdminHandler, ControlOptions, LeaderView};

/// How long a command is retried in all; a promotion gets the lease that it waits out on top.
const SUBMIT_DEADLINE: Duration = Duration::from_secs(5);
/// How long one attempt waits for the leader's answer.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(2);
/// Pause between attempts.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// What all tasks of a node share.
pub(super) struct Inner {
    /// Itself, for the tasks that it starts.
    pub(super) this: Weak<Self>,
    pub(super) me: NodeId,
    pub(super) incarnation: Incarnation,
    pub(super) options: ControlOptions,
    pub(super) env: Arc<dyn Environment>,
    pub(super) raft: Raft,
    pub(super) peers: Peers,
    pub(super) state: watch::Receiver<Arc<ClusterState>>,
    pub(super) leader: watch::Sender<Option<NodeId>>,
    pub(super) failed: watch::Sender<Option<String>>,
    /// The leader's side; empty while another node leads.
    pub(super) lead: Mutex<Lead>,
    pub(super) lease: Mutex<NodeLease>,
    pub(super) lease_out: watch::Sender<LeaseSnapshot>,
    pub(super) reports: Mutex<BTreeMap<VolumeId, VolumeReport>>,
    /// Wakes the renewal before its time.
    pub(super) renew_now: Notify,
    store: Mutex<Option<StoreHandle>>,
    closed: Closed,
    admin: Mutex<Option<AdminHandler>>,
    requests: AtomicU64,
    tasks: Mutex<TaskSet>,
}

/// Locks one of ours. No code panics while it holds one, and none is held across an await.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn check_options(o: &ControlOptions) -> Result<(), ControlError> {
    let bad = |what: String| Err(ControlError::Options(what));
    if !o.founders.iter().any(|f| f.id == o.me) {
        return bad(format!("{} is not among the nodes that its own config names; add it", o.me));
    }
    let mut ids: Vec<_> = o.founders.iter().map(|f| f.id).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() != o.founders.len() {
        return bad("the config names a node id twice".into());
    }
    if !(LEASE_MIN..=LEASE_MAX).contains(&o.lease) {
        // The cluster state takes no other: the cluster would never be founded.
        return bad(format!(
            "a lease of {:?} is not between {LEASE_MIN:?} and {LEASE_MAX:?}; change [timing] lease_ms in node.toml",
            o.lease
        ));
    }
    raft_config(o).map(drop)
}

/// openraft counts silence as leader lease (its longest timeout) plus a random timeout, and looks at it only
/// every one and a half heartbeats. Ours means the whole.
fn raft_config(o: &ControlOptions) -> Result<Config, ControlError> {
    let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let heartbeat = ms(o.heartbeat).max(1);
    let tick = heartbeat * 3 / 2;
    let (shortest, longest) = (ms(o.election.0), ms(o.election.1));
    let max = longest.saturating_sub(tick) / 2;
    let min = shortest.saturating_sub(max).max(heartbeat + 1);
    if min >= max || shortest > longest || o.renew.is_zero() {
        return Err(ControlError::Options(format!(
            "timing does not fit: the longest election timeout {longest} ms must be at least four heartbeats of \
             {heartbeat} ms and not below the shortest, {shortest} ms"
        )));
    }
    let config = Config {
        cluster_name: "blkrepl".into(),
        heartbeat_interval: heartbeat,
        election_timeout_min: min,
        election_timeout_max: max,
        install_snapshot_timeout: 2000,
        max_payload_entries: ENTRIES_PER_MESSAGE_MAX,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(256),
        max_in_snapshot_log_to_keep: 64,
        replication_lag_threshold: 512,
        ..Config::default()
    };
    config.validate().map_err(|e| ControlError::Options(e.to_string()))
}

impl Inner {
    pub(super) async fn start(
        options: ControlOptions,
        opened: Opened,
        env: Arc<dyn Environment>,
    ) -> Result<Arc<Self>, ControlError> {
        let config = raft_config(&options)?;
        let (me, incarnation) = (options.me, opened.incarnation);
        let sender = Sender { cluster: opened.cluster, node: me, store: opened.identity.store, incarnation };
        let (store, closed) = StoreHandle::start(env.as_ref(), opened.db)
            .map_err(ControlError::io("cannot start the store's thread"))?;
        let (machine, state) = StateMachine::load(Arc::clone(&env), store.clone())
            .await
            .map_err(ControlError::io(format!("cannot read the store in {}", options.dir.display())))?;
        let contacts = options.founders.iter().map(|f| (f.id, f.addrs.control.clone())).collect();
        let peers = Peers::new(Arc::clone(&env), sender, contacts, state.clone());
        let raft = Raft::new(me.0, Arc::new(config), peers.clone(), store.clone(), machine)
            .await
            .map_err(|e| ControlError::Raft(e.to_string()))?;
        Ok(Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            me,
            incarnation,
            options,
            env,
            raft,
            peers,
            state,
            leader: watch::channel(None).0,
            failed: watch::channel(None).0,
            lead: Mutex::default(),
            lease: Mutex::new(NodeLease::new(me, incarnation)),
            lease_out: watch::channel(LeaseSnapshot::default()).0,
            reports: Mutex::default(),
            renew_now: Notify::new(),
            store: Mutex::new(Some(store)),
            closed,
            admin: Mutex::default(),
            requests: AtomicU64::new(1),
            tasks: Mutex::default(),
        }))
    }

    /// Runs a task until it ends or the node stops.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        tasks.reap();
        tasks.spawn(task);
    }

    /// As `spawn`, for a task without which this is no node any more: should it panic, the node fails. Else
    /// it would go on renewing its lease, or leading, with a part of it standing still.
    pub(super) fn spawn_vital(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let guard = FailsOnPanic { node: Weak::clone(&self.this), name };
        self.spawn(async move {
            let _guard = guard;
            task.await;
        });
    }

    /// Stops all tasks, some time soon.
    pub(super) fn abort(&self) {
        lock(&self.tasks).abort_all();
    }

    /// Stops all tasks and waits until they are gone. Tasks started later run on until `abort`.
    pub(super) async fn stop_tasks(&self) {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }

    /// Gives up this node's hold on the store.
    pub(super) fn close_store(&self) -> Closed {
        lock(&self.store).take();
        self.closed.clone()
    }

    /// This node's hold on the store, unless it stops.
    pub(super) fn store(&self) -> Option<StoreHandle> {
        lock(&self.store).clone()
    }

    pub(super) fn current(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// This node cannot go on. The first reason stays.
    pub(super) fn fail(&self, reason: String) {
        tracing::error!(node = self.me.0, reason, "the control plane stopped");
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert(reason);
            first
        });
    }

    /// The cluster knows a newer run of this store, so it was rolled back or copied. It says so to every later
    /// run: counting on, it would be believed again, and it has forgotten votes [R13].
    pub(super) async fn give_up(&self, newest: Incarnation) {
        if let Some(store) = self.store()
            && let Err(e) = store.run(move |db| db.set_outdated(newest)).await
        {
            tracing::error!(node = self.me.0, %e, "cannot record that the store was rolled back");
        }
        let path = self.options.dir.clone();
        self.fail(ControlError::Outdated { path, newest }.to_string());
    }

    pub(super) fn next_request(&self) -> RequestId {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        RequestId { node: self.me, incarnation: self.incarnation, volume: None, number }
    }

    pub(super) fn set_volume_report(&self, volume: VolumeId, health: Health, report: ReplicaReport) {
        let health = match health {
            Health::Unhealthy(mut why) => {
                let cut = (0..=HEALTH_TEXT_MAX.min(why.len())).rev().find(|at| why.is_char_boundary(*at));
                why.truncate(cut.unwrap_or(0));
                Health::Unhealthy(why)
            }
            Health::Healthy => health,
        };
        let mut reports = lock(&self.reports);
        if reports.len() >= VOLUMES_MAX && !reports.contains_key(&volume) {
            tracing::warn!(%volume, "more replicas report than a cluster has volumes; this one is left out");
            return;
        }
        let new = VolumeReport { health, report };
        let old = reports.insert(volume, new.clone());
        drop(reports);
        let was_healthy = old.as_ref().map(|o| o.health == Health::Healthy);
        if was_healthy != Some(new.health == Health::Healthy) {
            self.renew_now.notify_one();
        }
    }

    pub(super) fn remove_volume_report(&self, volume: VolumeId) {
        lock(&self.reports).remove(&volume);
    }

    pub(super) fn set_admin_handler(&self, handler: AdminHandler) {
        *lock(&self.admin) = Some(handler);
    }

    pub(super) async fn handle_admin(&self, request: Vec<u8>) -> ReplyBody {
        let handler = lock(&self.admin).clone();
        let Some(handler) = handler else {
            return ReplyBody::Failed(format!("{} is still starting; ask again", self.me));
        };
        let answer = handler(request).await;
        if answer.len() > ADMIN_BYTES_MAX {
            return ReplyBody::Failed(format!("the answer has more than {ADMIN_BYTES_MAX} bytes"));
        }
        ReplyBody::Admin(answer)
    }

    pub(super) fn leader_view(&self) -> Option<LeaderView> {
        let lead = lock(&self.lead);
        lead.table.leadership()?;
        Some(LeaderView {
            leases: lead.table.views().collect(),
            now: self.env.now(),
            blocked: lead.blocked.clone(),
            reports: lead.reports.clone(),
        })
    }

    /// Waits until this node has applied `index`. False if it has not by the deadline, or stops.
    pub(super) async fn wait_applied(&self, index: LogIndex, deadline: Instant) -> bool {
        let mut state = self.state.clone();
        let applied = timeout_at(deadline, state.wait_for(|s| s.applied >= index)).await;
        matches!(applied, Ok(Ok(_)))
    }

    /// Hands a command to the leader, again and again under one id, until its fate is known.
    pub(super) async fn submit(&self, request: RequestId, op: ClusterOp) -> Result<Applied, SubmitError> {
        let command = Command { request, only_under: None, op };
        match codec::encode(&command) {
            Ok(bytes) if bytes.len() <= COMMAND_BYTES_MAX => {}
            _ => {
                let why = format!("the request is larger than {COMMAND_BYTES_MAX} bytes");
                return Err(SubmitError::Refused(why));
            }
        }
        let mut attempt_limit = ATTEMPT_DEADLINE;
        let mut limit = SUBMIT_DEADLINE;
        if command.op.needs_lease_over() {
            let lease = with_drift(self.current().lease_longest);
            attempt_limit += lease;
            limit += lease;
        }
        let deadline = Instant::now() + limit;
        // An attempt whose answer did not come may still be in somebody's log.
        let mut uncertain = false;
        let mut last = String::from("no leader is known");
        while Instant::now() < deadline {
            let limit = attempt_limit.min(deadline - Instant::now());
            match self.attempt(command.clone(), limit).await {
                Attempt::Applied(Applied::Refused(why)) => return Err(SubmitError::Refused(why)),
                Attempt::Applied(applied) => {
                    let Applied::Done { index, .. } = &applied else { continue };
                    if self.wait_applied(*index, deadline).await {
                        return Ok(applied);
                    }
                    return Err(SubmitError::Unknown("it took effect but did not arrive here yet".into()));
                }
                Attempt::Declined(why) if uncertain => return Err(SubmitError::Unknown(why)),
                Attempt::Declined(why) => return Err(SubmitError::Refused(why)),
                Attempt::NoEffect(why) => last = why,
                Attempt::Uncertain(why) => {
                    uncertain = true;
                    last = why;
                }
            }
            sleep(ATTEMPT_PAUSE).await;
        }
        Err(SubmitError::Unknown(last))
    }

    async fn attempt(&self, command: Command, limit: Duration) -> Attempt {
        let leader = *self.leader.borrow();
        let reply = match leader {
            None => return Attempt::NoEffect("no leader is known".into()),
            Some(leader) if leader == self.me => {
                let here = self.submit_here(command);
                match timeout_at(Instant::now() + limit, here).await {
                    Ok(reply) => reply,
                    Err(_) => return Attempt::Uncertain("the leader, this node, found no quorum".into()),
                }
            }
            Some(leader) => match self.peers.call(leader, RequestBody::Submit(command), limit).await {
                Ok(reply) => reply,
                Err(e) => return Attempt::Uncertain(e.to_string()),
            },
        };
        match reply {
            ReplyBody::Applied(applied) => Attempt::Applied(applied),
            ReplyBody::Declined(why) => Attempt::Declined(why),
            ReplyBody::NotLeader(_) => Attempt::NoEffect("the leader has changed".into()),
            ReplyBody::Failed(why) => Attempt::Uncertain(why),
            other => Attempt::Uncertain(format!("unexpected answer {other:?}")),
        }
    }
}

/// Dropped by the unwinding of a task, it fails the node.
struct FailsOnPanic {
    node: Weak<Inner>,
    name: &'static str,
}

impl Drop for FailsOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(node) = self.node.upgrade()
        {
            node.fail(format!(
                "its task `{}` panicked, which is a bug; restart the node and report the log above",
                self.name
            ));
        }
    }
}

/// What one attempt to submit gave.
enum Attempt {
    /// It went through the log.
    Applied(Applied),
    /// The leader did not propose it.
    Declined(String),
    /// Nothing happened; try again.
    NoEffect(String),
    /// Something may have happened; try again.
    Uncertain(String),
}

#[cfg(test)]
mod tests {
    use super::super::super::state::{NodeAddrs, NodeKind};
    use super::super::Founder;
    use super::*;

    fn options() -> ControlOptions {
        let founder = |id| Founder {
            id: NodeId(id),
            name: format!("n{id}"),
            kind: NodeKind::Data,
            addrs: NodeAddrs::default(),
        };
        let listen = "127.0.0.1:7000".parse().unwrap();
        let mut options = ControlOptions::new("/nowhere", NodeId(1), listen);
        options.founders = vec![founder(1), founder(2)];
        options
    }

    /// A cluster with such options would never be founded, or would elect without end.
    #[test]
    fn options_that_cannot_work_are_refused_before_anything_starts() {
        type Break = (fn(&mut ControlOptions), &'static str);
        check_options(&options()).unwrap();
        let ms = Duration::from_millis;
        let breaks: [Break; 7] = [
            (|o| o.me = NodeId(3), "not among the nodes"),
            (|o| o.founders[1].id = NodeId(1), "twice"),
            (|o| o.lease = Duration::from_millis(1), "lease of 1ms"),
            (|o| o.lease = Duration::from_secs(3600), "lease of 3600s"),
            (|o| o.heartbeat = o.election.1, "timing does not fit"),
            (|o| o.election.0 = o.election.1 * 2, "timing does not fit"),
            (|o| o.renew = Duration::ZERO, "timing does not fit"),
        ];
        for (break_it, expected) in breaks {
            let mut bad = options();
            break_it(&mut bad);
            let why = check_options(&bad).unwrap_err().to_string();
            assert!(why.contains(expected), "{why:?} does not say {expected:?}");
        }
        let mut slow = options();
        (slow.heartbeat, slow.election) = (ms(1000), (ms(5000), ms(9000)));
        check_options(&slow).unwrap();
    }
}
