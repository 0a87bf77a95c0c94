//! What the leader does: confirm that it leads, grant leases, propose, and fail over [R1].
//!
//! Everything that decides about leases happens under one lock, in this order: exclude, judge, propose. No
//! await happens under it. An exclusion outlives the call that made it: it is lifted by the task that sees
//! the entry applied, or by the tick that sees the volume's epoch move on, or it goes with the leadership.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, RaftMetrics, ServerState};
use tokio::sync::oneshot;

use crate::types::{Epoch, Health, LogIndex, Member, NodeId, VolumeId};

use super::super::codec;
use super::super::command::{Applied, ClusterOp, Command, Leadership};
use super::super::failover::{Failover, NodeReport, Reports, VolumeReport, eligible_restarted};
use super::super::lease::{ExclusionId, LeaseTable, with_drift};
use super::super::raft::{RaftNode, Response, leadership_of};
use super::super::rpc::{COMMAND_BYTES_MAX, HEALTH_TEXT_MAX, Renewal, ReplyBody};
use super::super::runtime::{Instant, Ticker, sleep, timeout_at};
use super::super::state::ClusterState;
use super::inner::{Inner, lock};

/// How often the failover controller looks.
const TICK: Duration = Duration::from_millis(50);
/// How often the Raft membership is compared with the nodes of the cluster state.
const MEMBERSHIP_TICK: Duration = Duration::from_millis(200);
/// How long one step of a membership change may take.
const MEMBERSHIP_DEADLINE: Duration = Duration::from_secs(5);
/// A new node votes once it lacks at most this many log entries.
const LEARNER_LAG_MAX: u64 = 16;
/// How long confirming the leadership may take.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(1);
/// How often a promotion that waits for a lease to run out looks.
const LEASE_POLL: Duration = Duration::from_millis(10);

/// The leader's side of a node.
#[derive(Default)]
pub(super) struct Lead {
    pub(super) table: LeaseTable,
    pub(super) reports: Reports,
    pub(super) blocked: BTreeMap<VolumeId, String>,
    failover: Failover,
    /// Changes that the failover controller has proposed and whose fate is not known.
    under_way: BTreeMap<VolumeId, Epoch>,
}

/// Why this node cannot answer as leader.
struct NotLeading(String);

/// An exclusion whose change is not proposed yet. Dropped before that, however it comes about, it is lifted:
/// nothing was proposed, so nothing has to be waited for.
struct Held {
    inner: Arc<Inner>,
    id: Option<ExclusionId>,
}

impl Held {
    /// From here on the change may be in a log; whoever took the id lifts it when its fate is known.
    fn into_id(mut self) -> Option<ExclusionId> {
        self.id.take()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            lock(&self.inner.lead).table.lift(id, LogIndex(0));
        }
    }
}

/// Follows Raft's metrics; the only task that does. Keeps who leads, and opens and closes the lease table.
pub(super) async fn watch_raft(inner: Arc<Inner>) {
    let mut metrics = inner.raft.metrics();
    loop {
        {
            let m = metrics.borrow_and_update();
            if let Err(e) = &m.running_state {
                inner.fail(format!(
                    "Raft stopped: {e}; repair the disk of {} and restart",
                    inner.options.dir.display()
                ));
                return;
            }
            let mut lead = lock(&inner.lead);
            if m.state == ServerState::Leader {
                let leadership = Leadership { term: m.current_term, node: inner.me };
                if lead.table.leadership() != Some(leadership) {
                    *lead = Lead { table: std::mem::take(&mut lead.table), ..Lead::default() };
                    let last = LogIndex(m.last_log_index.unwrap_or(0));
                    lead.table.became_leader(leadership, inner.env.now(), last);
                    tracing::info!(node = inner.me.0, term = leadership.term, "leads the cluster");
                }
            } else if lead.table.leadership().is_some() {
                lead.table.lost_leadership();
                *lead = Lead { table: std::mem::take(&mut lead.table), ..Lead::default() };
                tracing::info!(node = inner.me.0, "does not lead the cluster any more");
            }
            drop(lead);
            let leader = m.current_leader.map(NodeId);
            let changed = inner.leader.send_if_modified(|l| std::mem::replace(l, leader) != leader);
            if changed && leader.is_some() {
                inner.renew_now.notify_one();
            }
        }
        if metrics.changed().await.is_err() {
            // The tasks of a node that stops end before its Raft does, so this is a panic in there.
            inner.fail("Raft ended without a reason; restart the node and report the log above".into());
            return;
        }
    }
}

/// The leader's clockwork: fails over.
pub(super) async fn lead(inner: Arc<Inner>) {
    let mut tick = Ticker::new(TICK);
    loop {
        tick.tick().await;
        inner.fail_over();
    }
}

/// The leader's slower clockwork: writes the first state, and keeps the membership in step.
pub(super) async fn keep_membership(inner: Arc<Inner>) {
    let mut tick = Ticker::new(MEMBERSHIP_TICK);
    loop {
        tick.tick().await;
        if lock(&inner.lead).table.leadership().is_some() {
            inner.found_state().await;
            inner.reconcile_membership().await;
        }
    }
}

impl Inner {
    /// Confirms with a quorum, from now on, that this node leads, and applies everything up to that point
    /// [R1].
    async fn confirm(&self) -> Result<(Leadership, LogIndex), NotLeading> {
        let deadline = Instant::now() + CONFIRM_DEADLINE;
        let read = match timeout_at(deadline, self.raft.get_read_log_id()).await {
            // At least the first entry of this very leadership, so its id names the leadership confirmed.
            Ok(Ok((Some(read), _))) => read,
            Ok(Ok((None, _))) => return Err(NotLeading("the log is empty".into())),
            Ok(Err(e)) => return Err(NotLeading(e.to_string())),
            Err(_) => return Err(NotLeading("no quorum answered".into())),
        };
        let index = LogIndex(read.index);
        if !self.wait_applied(index, deadline).await {
            return Err(NotLeading("the log is not applied yet".into()));
        }
        Ok((leadership_of(&read), index))
    }

    /// Handles a renewal. The request has arrived before this is called, so what `confirm` confirms holds
    /// after its arrival [R1].
    pub(super) async fn grant(&self, renewal: Renewal) -> ReplyBody {
        let Renewal { member, nonce, mut volumes } = renewal;
        let (leadership, read) = match self.confirm().await {
            Ok(confirmed) => confirmed,
            Err(NotLeading(why)) => {
                tracing::debug!(node = self.me.0, why, "cannot grant a lease");
                return ReplyBody::NotLeader(*self.leader.borrow());
            }
        };
        let state = self.current();
        volumes.retain(|(id, ..)| state.volumes.get(id).is_some_and(|v| v.replica(member.node).is_some()));
        let mut lead = lock(&self.lead);
        // Taken under the lock: behind the fate of every exclusion that is lifted already.
        let state = self.current();
        // What is unhealthy is excluded before this grant counts.
        if state.is_newest(member) && lead.table.leadership() == Some(leadership) {
            let mut said = BTreeMap::new();
            for (volume, mut health, report) in volumes {
                lead.table.set_healthy(volume, member.node, health == Health::Healthy);
                if let Health::Unhealthy(why) = &mut health
                    && why.len() > HEALTH_TEXT_MAX
                {
                    *why = "(reason too long)".into();
                }
                said.insert(volume, VolumeReport { health, report });
            }
            lead.reports.insert(member.node, NodeReport { member, volumes: said });
        }
        match lead.table.grant(&state, leadership, read, member, nonce, self.env.now()) {
            Ok(grant) => ReplyBody::Grant(grant),
            Err(why) => ReplyBody::Declined(why),
        }
    }

    /// Handles a command as leader.
    pub(super) async fn submit_here(&self, command: Command) -> ReplyBody {
        // The stamp is the leader's to set.
        let command = Command { only_under: None, ..command };
        if codec::encode(&command).is_ok_and(|bytes| bytes.len() > COMMAND_BYTES_MAX) {
            return ReplyBody::Declined(format!("the request is larger than {COMMAND_BYTES_MAX} bytes"));
        }
        let Some((volume, epoch)) = command.op.changes_primary() else {
            return self.write(command).await.1;
        };
        let Ok((leadership, _)) = self.confirm().await else {
            return ReplyBody::NotLeader(*self.leader.borrow());
        };
        let (held, primary) = match self.exclude_primary(leadership, volume, epoch) {
            Ok(held) => held,
            Err(reply) => return reply,
        };
        if command.op.needs_lease_over()
            && let Err(reply) = self.wait_lease_over(leadership, &command.op, volume, primary).await
        {
            return reply;
        }
        self.propose_held(Command { only_under: Some(leadership), ..command }, held).await
    }

    /// First step of every change of primary [R1]: no grant from here on covers the volume for the node that
    /// is primary at the epoch that the command expects.
    fn exclude_primary(
        &self,
        leadership: Leadership,
        volume: VolumeId,
        epoch: Epoch,
    ) -> Result<(Held, Option<Member>), ReplyBody> {
        let Some(inner) = self.this.upgrade() else { return Err(ReplyBody::NotLeader(None)) };
        let mut lead = lock(&self.lead);
        let state = self.current();
        if lead.table.leadership() != Some(leadership) {
            return Err(ReplyBody::NotLeader(None));
        }
        let Some(v) = state.volumes.get(&volume) else {
            // A retry of something applied, or a mistake; the log knows.
            return Ok((Held { inner, id: None }, None));
        };
        if v.epoch < epoch {
            return Err(ReplyBody::Declined(format!(
                "volume {} is at epoch {}, the request expects {epoch}, which does not exist",
                v.name, v.epoch
            )));
        }
        // If the epoch has moved on the command cannot take effect any more; the log gives its result.
        let primary = v.primary.filter(|_| v.epoch == epoch);
        let id = primary.map(|p| lead.table.exclude(volume, p.node, epoch));
        Ok((Held { inner, id }, primary))
    }

    /// Second step: waits until the excluded primary's lease is over for certain, and looks whether the
    /// command may be proposed at all.
    async fn wait_lease_over(
        &self,
        leadership: Leadership,
        op: &ClusterOp,
        volume: VolumeId,
        primary: Option<Member>,
    ) -> Result<(), ReplyBody> {
        let longest = self.current().lease_longest;
        let deadline = Instant::now() + with_drift(longest) + CONFIRM_DEADLINE;
        loop {
            {
                let lead = lock(&self.lead);
                let (state, now) = (self.current(), self.env.now());
                if lead.table.leadership() != Some(leadership) {
                    return Err(ReplyBody::NotLeader(None));
                }
                check_restarted(&state, &lead.reports, op)?;
                let Some(primary) = primary else { return Ok(()) };
                if lead.table.lease_over(&state, volume, primary, now) {
                    return Ok(());
                }
                let operator = matches!(op, ClusterOp::Promote { .. } | ClusterOp::PromoteRestarted { .. });
                if operator && lead.table.is_alive(primary, now) && !is_sick(&lead.reports, volume, primary) {
                    return Err(ReplyBody::Declined(format!(
                        "{} is primary and alive; use `blkrepl move`, which loses nothing",
                        state.node_label(primary.node)
                    )));
                }
            }
            if Instant::now() >= deadline {
                return Err(ReplyBody::Declined("the old primary's lease did not run out; try again".into()));
            }
            sleep(LEASE_POLL).await;
        }
    }

    /// Third step: writes the command and lifts the exclusion once it is applied. The write goes on in a task
    /// of its own, so that the exclusion stays even if the caller gives up.
    async fn propose_held(&self, command: Command, held: Held) -> ReplyBody {
        let (done, result) = oneshot::channel();
        let this = Arc::clone(&held.inner);
        let id = held.into_id();
        self.spawn(async move {
            let (fate, reply) = this.write(command).await;
            // Without an applied index nobody knows whether the entry is in a log: the exclusion stays until
            // the epoch moves on or the leadership ends.
            if let (Some(id), Some(index)) = (id, fate) {
                lock(&this.lead).table.lift(id, index);
            }
            // The caller may have given up.
            let _ = done.send(reply);
        });
        result.await.unwrap_or_else(|_| ReplyBody::Failed("the node is stopping".into()))
    }

    /// Writes to the log. Gives the index at which the entry was applied, if it is known to be.
    async fn write(&self, command: Command) -> (Option<LogIndex>, ReplyBody) {
        match self.raft.client_write(command).await {
            Ok(written) => {
                let reply = match written.data {
                    Response::Applied(applied) => ReplyBody::Applied(applied),
                    Response::Stale => ReplyBody::NotLeader(None),
                    Response::Nothing => ReplyBody::Failed("the entry was not ours".into()),
                };
                (Some(LogIndex(written.log_id.index)), reply)
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                // It may have been written before the leadership was lost.
                (None, ReplyBody::Failed("the leader has changed".into()))
            }
            Err(e) => (None, ReplyBody::Failed(e.to_string())),
        }
    }

    /// One look of the failover controller: decides and excludes under one lock, then proposes.
    fn fail_over(&self) {
        for (volume, epoch, command, held) in self.decide() {
            tracing::info!(%volume, op = ?command.op, "fails over");
            let this = Arc::clone(&held.inner);
            self.spawn(async move {
                let reply = this.propose_held(command, held).await;
                if !matches!(reply, ReplyBody::Applied(Applied::Done { .. })) {
                    tracing::warn!(%volume, ?reply, "a failover was not carried out");
                }
                let mut lead = lock(&this.lead);
                if lead.under_way.get(&volume) == Some(&epoch) {
                    lead.under_way.remove(&volume);
                }
            });
        }
    }

    fn decide(&self) -> Vec<(VolumeId, Epoch, Command, Held)> {
        let mut out = Vec::new();
        let mut guard = lock(&self.lead);
        let lead = &mut *guard;
        let (state, now) = (self.current(), self.env.now());
        let Some(leadership) = lead.table.leadership() else { return out };
        lead.table.lift_void(&state);
        let decisions = lead.failover.decide(&state, &lead.table, &lead.reports, now);
        for (volume, why) in &decisions.blocked {
            if lead.blocked.get(volume) != Some(why) {
                tracing::warn!(%volume, why, "a volume has no live primary");
            }
        }
        lead.blocked = decisions.blocked;
        for op in decisions.proposals {
            let Some((volume, epoch)) = op.changes_primary() else { continue };
            let Some(primary) = state.volumes.get(&volume).and_then(|v| v.primary) else { continue };
            let Some(inner) = self.this.upgrade() else { continue };
            if lead.under_way.get(&volume) == Some(&epoch) {
                continue;
            }
            // Exclude first, then judge again under the same lock: the order that [R1] asks for.
            let id = lead.table.exclude(volume, primary.node, epoch);
            if !lead.table.lease_over(&state, volume, primary, now) {
                lead.table.lift(id, LogIndex(0));
                continue;
            }
            lead.under_way.insert(volume, epoch);
            let command = Command { request: self.next_request(), only_under: Some(leadership), op };
            out.push((volume, epoch, command, Held { inner, id: Some(id) }));
        }
        out
    }

    /// Brings the Raft membership in step with the nodes of the cluster state. Level-triggered, so that a
    /// leader that dies half way leaves nothing behind.
    async fn reconcile_membership(&self) {
        let state = self.current();
        let metrics = self.raft.metrics().borrow().clone();
        if state.cluster.is_none() || !state.nodes.contains_key(&self.me) || metrics.replication.is_none() {
            return;
        }
        let Some(change) = membership_change(&state, &metrics) else { return };
        tracing::info!(?change, "changes the Raft membership");
        let deadline = Instant::now() + MEMBERSHIP_DEADLINE;
        match timeout_at(deadline, self.raft.change_membership(change, false)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!(%e, "could not change the Raft membership; will try again"),
            Err(_) => tracing::warn!("no quorum to change the Raft membership; will try again"),
        }
    }
}

/// The next step from the membership as it is to the nodes of the cluster state.
fn membership_change(
    state: &ClusterState,
    metrics: &RaftMetrics<u64, RaftNode>,
) -> Option<ChangeMembers<u64, RaftNode>> {
    let membership = metrics.membership_config.membership();
    if let [_, .., target] = membership.get_joint_config().as_slice() {
        // A leader died between the two halves of a change; finish it.
        return Some(ChangeMembers::ReplaceAllVoters(target.clone()));
    }
    let voters: Vec<u64> = membership.voter_ids().collect();
    for node in state.nodes.values().filter(|n| !voters.contains(&n.id.0)) {
        let id = node.id.0;
        if membership.get_node(&id).is_none() {
            let raft_node = RaftNode { store: node.store, addr: node.addrs.control.clone() };
            return Some(ChangeMembers::AddNodes([(id, raft_node)].into()));
        }
        // It votes once it holds the log: a voter that is not there yet could cost the quorum.
        let matched = metrics.replication.as_ref()?.get(&id).copied().flatten().map_or(0, |log| log.index);
        if matched + LEARNER_LAG_MAX >= metrics.last_log_index.unwrap_or(0) && matched > 0 {
            return Some(ChangeMembers::AddVoterIds([id].into()));
        }
    }
    let gone = voters.into_iter().find(|id| !state.nodes.contains_key(&NodeId(*id)))?;
    Some(ChangeMembers::RemoveVoters([gone].into()))
}

/// [R6, R16]: an operator's promotion of a restarted member is held to the same standard as the
/// controller's.
fn check_restarted(state: &ClusterState, reports: &Reports, op: &ClusterOp) -> Result<(), ReplyBody> {
    let ClusterOp::PromoteRestarted { volume, to, .. } = op else { return Ok(()) };
    let Some(v) = state.volumes.get(volume) else { return Ok(()) };
    let Some(named) = v.member(to.node) else { return Ok(()) };
    let said = reports.get(&to.node).filter(|r| r.member == *to).and_then(|r| r.volumes.get(volume));
    let verdict = match said {
        Some(said) => eligible_restarted(v, named, said),
        None => Err("has not reported yet".into()),
    };
    let name = state.node_label(to.node);
    verdict.map_err(|why| ReplyBody::Declined(format!("{name} {why}; choose another, or force")))
}

fn is_sick(reports: &Reports, volume: VolumeId, member: Member) -> bool {
    let said = reports.get(&member.node).filter(|r| r.member == member).and_then(|r| r.volumes.get(&volume));
    said.is_some_and(|said| said.health != Health::Healthy)
}
