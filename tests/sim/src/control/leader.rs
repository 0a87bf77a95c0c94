//! What the leader does: confirm that it leads, grant leases, propose, fail over [R1]. Step by step as
//! `engine::control::node::leader` does it, in the same order, with the production lease table and failover
//! controller.

use std::collections::BTreeMap;

use blkrepl_engine::control::failover::eligible_restarted;
use blkrepl_engine::control::lease::ExclusionId;
use blkrepl_engine::control::{
    Applied, ClusterOp, ClusterState, Command, Failover, Grant, Leadership, LeaseTable, NodeReport, Reports,
    VolumeReport,
};
use blkrepl_engine::types::{Epoch, Health, Incarnation, LogIndex, Member, NodeId, ReplicaReport, VolumeId};

use super::model::{Inside, Model, Step, Waits, fate};
use super::node::Reply;
use crate::clock::{MS, S, Time, US};

/// How often the leader looks after failed primaries.
const TICK: Time = 50 * MS;
/// How long confirming leadership may take.
const CONFIRM_DEADLINE: Time = S;
/// How often a proposal that waits for a lease to run out looks again.
const LEASE_POLL: Time = 10 * MS;

/// The leader's side; empty while another node leads.
#[derive(Debug, Default)]
pub(super) struct Lead {
    table: LeaseTable,
    reports: Reports,
    failover: Failover,
    /// Failovers that were proposed and not answered yet.
    under_way: BTreeMap<VolumeId, Epoch>,
}

/// A renewal as it travels.
#[derive(Debug)]
pub(super) struct Renewal {
    pub(super) member: Member,
    pub(super) nonce: u64,
    pub(super) volumes: Vec<(VolumeId, Health, ReplicaReport)>,
}

/// A leader asks a quorum whether it still leads.
#[derive(Debug)]
pub(super) struct Confirm {
    leader: NodeId,
    run: Incarnation,
    leadership: Leadership,
    /// What had to be committed when it was asked.
    read: usize,
    deadline: Time,
    good: bool,
    then: Then,
}

/// What waits for the confirmation.
#[derive(Debug)]
enum Then {
    Grant(Box<Renewal>),
    Submit((u64, u32), Box<Command>),
}

/// A proposal that waits for the old primary's lease to run out.
#[derive(Debug)]
pub(super) struct Waiting {
    leadership: Leadership,
    from: (u64, u32),
    command: Command,
    held: Option<Held>,
    primary: Option<Member>,
    deadline: Time,
}

/// An exclusion that an entry holds.
#[derive(Debug)]
pub(super) struct Held {
    run: Incarnation,
    id: ExclusionId,
}

impl Model {
    fn lead(&mut self, node: NodeId) -> &mut Lead {
        &mut self.node(node).lead
    }

    // Leadership.

    pub(super) fn sees_leadership(&mut self, node: NodeId) {
        let Some(leadership) = self.nodes[&node].believes else { return };
        let (now, last) = (self.local(node), self.last_log());
        let lead = self.lead(node);
        if lead.table.leadership() != Some(leadership) {
            *lead = Lead { table: std::mem::take(&mut lead.table), ..Lead::default() };
            lead.table.became_leader(leadership, now, last);
            let wait = self.rng.below(TICK);
            self.later(wait, node, Step::LeaderTick);
        }
    }

    pub(super) fn step_down(&mut self, node: NodeId) {
        let lead = self.lead(node);
        lead.table.lost_leadership();
        *lead = Lead { table: std::mem::take(&mut lead.table), ..Lead::default() };
        for waits in std::mem::take(&mut self.node(node).stale_writes) {
            self.written(node, waits, None);
        }
    }

    /// Asks a quorum. The answer comes by `confirmed`.
    fn confirm(&mut self, leader: NodeId, then: Then) {
        let (Some(leadership), Some(me)) = (self.nodes[&leader].believes, self.me(leader)) else {
            return self.not_confirmed(leader, then);
        };
        let confirm = Confirm {
            leader,
            run: me.incarnation,
            leadership,
            // An entry of its own leadership included, which is in its log from the beginning.
            read: self.last_index(),
            deadline: self.now + CONFIRM_DEADLINE,
            good: false,
            then,
        };
        let wait = self.delay();
        self.push(wait, Inside::Quorum(confirm));
    }

    /// The others answer the leader, or do not: decided here, whatever the leader's process does meanwhile.
    pub(super) fn quorum_asked(&mut self, mut confirm: Confirm) {
        let Confirm { leader, run, .. } = confirm;
        if self.nodes[&leader].run.is_none_or(|r| r.incarnation != run) {
            return;
        }
        let own_entry = self.leads == Some(confirm.leadership)
            && self.last_log().0 >= 1
            && self.begun(confirm.leadership);
        confirm.good = own_entry && self.has_quorum(leader);
        if !confirm.good && self.now < confirm.deadline {
            return self.push(40 * MS, Inside::Quorum(confirm));
        }
        let wait = self.rng.skewed(US, 3 * MS);
        self.push(wait, Inside::At(leader, run, Step::Confirmed(confirm)));
    }

    pub(super) fn confirmed(&mut self, leader: NodeId, confirm: Confirm) {
        if !confirm.good {
            return self.not_confirmed(leader, confirm.then);
        }
        if self.nodes[&leader].applied < confirm.read {
            if self.now >= confirm.deadline {
                return self.not_confirmed(leader, confirm.then);
            }
            return self.later(5 * MS, leader, Step::Confirmed(confirm));
        }
        match confirm.then {
            Then::Grant(renewal) => self.grant(leader, *renewal, confirm.leadership, confirm.read),
            Then::Submit(from, command) => self.submit_confirmed(leader, from, *command, confirm.leadership),
        }
    }

    fn not_confirmed(&mut self, leader: NodeId, then: Then) {
        match then {
            Then::Grant(renewal) => self.renewal_answer(leader, &renewal, Err("not leading".into())),
            Then::Submit(from, _) => self.answer(leader, from, Reply::NotLeader),
        }
    }

    // Leases.

    pub(super) fn renewal_arrived(&mut self, leader: NodeId, renewal: Renewal) {
        self.confirm(leader, Then::Grant(Box::new(renewal)));
    }

    fn renewal_answer(&mut self, leader: NodeId, renewal: &Renewal, answer: Result<Grant, String>) {
        let (node, nonce) = (renewal.member.node, renewal.nonce);
        if let Some(after) = self.arrival(leader, node, S) {
            self.later(after, node, Step::RenewAnswer(nonce, Box::new(answer)));
        }
    }

    fn grant(&mut self, leader: NodeId, renewal: Renewal, leadership: Leadership, read: usize) {
        let (state, now) = (self.current(leader), self.local(leader));
        let Renewal { member, nonce, ref volumes } = renewal;
        let lead = self.lead(leader);
        // What is unhealthy is excluded before this grant counts.
        if state.is_newest(member) && lead.table.leadership() == Some(leadership) {
            let mut said = BTreeMap::new();
            let held =
                |id: &VolumeId| state.volumes.get(id).is_some_and(|v| v.replica(member.node).is_some());
            for (volume, health, report) in volumes.iter().filter(|(id, ..)| held(id)) {
                lead.table.set_healthy(*volume, member.node, *health == Health::Healthy);
                said.insert(*volume, VolumeReport { health: health.clone(), report: *report });
            }
            lead.reports.insert(member.node, NodeReport { member, volumes: said });
        }
        let answer = lead.table.grant(&state, leadership, LogIndex(read as u64), member, nonce, now);
        self.renewal_answer(leader, &renewal, answer);
    }

    // Proposals.

    pub(super) fn submit_arrived(&mut self, leader: NodeId, from: (u64, u32), command: Command) {
        // The stamp is the leader's to set.
        let command = Command { only_under: None, ..command };
        if command.op.changes_primary().is_some() {
            return self.confirm(leader, Then::Submit(from, Box::new(command)));
        }
        if self.nodes[&leader].believes.is_none() {
            return self.answer(leader, from, Reply::Failed);
        }
        self.append(leader, command, Waits { call: Some(from), held: None });
    }

    fn submit_confirmed(
        &mut self,
        leader: NodeId,
        from: (u64, u32),
        command: Command,
        leadership: Leadership,
    ) {
        let Some((volume, epoch)) = command.op.changes_primary() else { return };
        let state = self.current(leader);
        let Some(me) = self.me(leader) else { return };
        let lead = self.lead(leader);
        if lead.table.leadership() != Some(leadership) {
            return self.answer(leader, from, Reply::NotLeader);
        }
        let (mut held, mut primary) = (None, None);
        if let Some(v) = state.volumes.get(&volume) {
            if v.epoch < epoch {
                return self.answer(leader, from, Reply::Declined("an epoch that does not exist".into()));
            }
            // If the epoch has moved on the command cannot take effect any more; the log gives its result.
            primary = v.primary.filter(|_| v.epoch == epoch);
            held =
                primary.map(|p| Held { run: me.incarnation, id: lead.table.exclude(volume, p.node, epoch) });
        }
        let wait = command.op.needs_lease_over();
        let longest = u64::try_from(state.lease_longest.as_nanos()).unwrap_or(u64::MAX);
        let deadline = self.now + longest + longest / 100 + CONFIRM_DEADLINE;
        let waiting = Waiting { leadership, from, command, held, primary, deadline };
        if wait { self.wait_lease(leader, waiting) } else { self.propose_held(leader, waiting) }
    }

    pub(super) fn wait_lease(&mut self, leader: NodeId, waiting: Waiting) {
        let (state, now) = (self.current(leader), self.local(leader));
        let Some((volume, _)) = waiting.command.op.changes_primary() else { return };
        let lead = &self.nodes[&leader].lead;
        let verdict = if lead.table.leadership() != Some(waiting.leadership) {
            Some(Err(Reply::NotLeader))
        } else if let Err(why) = check_restarted(&state, &lead.reports, &waiting.command.op) {
            Some(Err(Reply::Declined(why)))
        } else {
            match waiting.primary {
                None => Some(Ok(())),
                Some(p) if lead.table.lease_over(&state, volume, p, now) => Some(Ok(())),
                Some(p) => {
                    let op = &waiting.command.op;
                    let asked = matches!(op, ClusterOp::Promote { .. } | ClusterOp::PromoteRestarted { .. });
                    let sick = is_sick(&lead.reports, volume, p);
                    let alive = asked && lead.table.is_alive(p, now) && !sick;
                    alive.then(|| Err(Reply::Declined("the primary is alive; move".into())))
                }
            }
        };
        match verdict {
            Some(Ok(())) => self.propose_held(leader, waiting),
            Some(Err(reply)) => self.give_up(leader, waiting, reply),
            None if self.now >= waiting.deadline => {
                self.give_up(leader, waiting, Reply::Declined("the lease did not run out".into()));
            }
            None => self.later(LEASE_POLL, leader, Step::WaitLease(Box::new(waiting))),
        }
    }

    fn give_up(&mut self, leader: NodeId, waiting: Waiting, reply: Reply) {
        if let Some(held) = waiting.held {
            self.lead(leader).table.lift(held.id, LogIndex(0));
        }
        self.answer(leader, waiting.from, reply);
    }

    fn propose_held(&mut self, leader: NodeId, waiting: Waiting) {
        let command = Command { only_under: Some(waiting.leadership), ..waiting.command };
        let waits = Waits { call: Some(waiting.from), held: waiting.held };
        if self.nodes[&leader].believes.is_none() {
            return self.written(leader, waits, None);
        }
        self.append(leader, command, waits);
    }

    /// The fate of an entry, at the leader that wrote it; `None`: nobody knows.
    pub(super) fn written(
        &mut self,
        leader: NodeId,
        waits: Waits,
        fate_of: Option<(usize, Option<Applied>)>,
    ) {
        let run = self.me(leader).map(|m| m.incarnation);
        if let (Some(held), Some((index, _))) = (&waits.held, &fate_of)
            && Some(held.run) == run
        {
            // Without an applied index nobody knows whether the entry is in a log: the exclusion stays.
            let index = LogIndex(*index as u64);
            self.lead(leader).table.lift(held.id, index);
        }
        match (waits.call, fate_of) {
            (Some(from), Some((_, applied))) => self.answer(leader, from, fate(applied)),
            (Some(from), None) => {
                self.answer(leader, from, Reply::Failed);
            }
            (None, _) => self.lead(leader).under_way.clear(),
        }
    }

    // Failover.

    pub(super) fn leader_tick(&mut self, node: NodeId) {
        let (state, now) = (self.current(node), self.local(node));
        let Some(leadership) = self.nodes[&node].lead.table.leadership() else { return };
        self.later(TICK, node, Step::LeaderTick);
        let lead = self.lead(node);
        lead.table.lift_void(&state);
        let decisions = lead.failover.decide(&state, &lead.table, &lead.reports, now);
        for op in decisions.proposals {
            let Some((volume, epoch)) = op.changes_primary() else { continue };
            let Some(primary) = state.volumes.get(&volume).and_then(|v| v.primary) else { continue };
            let Some(request) = self.next_request(node) else { return };
            let lead = self.lead(node);
            if lead.under_way.get(&volume) == Some(&epoch) {
                continue;
            }
            // Exclude first, then judge again: the order that [R1] asks for.
            let id = lead.table.exclude(volume, primary.node, epoch);
            if !lead.table.lease_over(&state, volume, primary, now) {
                lead.table.lift(id, LogIndex(0));
                continue;
            }
            lead.under_way.insert(volume, epoch);
            let command = Command { request, only_under: Some(leadership), op };
            let waits = Waits { call: None, held: Some(Held { run: request.incarnation, id }) };
            if self.nodes[&node].believes.is_none() {
                self.written(node, waits, None);
            } else {
                self.append(node, command, waits);
            }
        }
    }
}

/// [R6, R16]: an operator's promotion of a restarted member is held to the same standard as the
/// controller's.
fn check_restarted(state: &ClusterState, reports: &Reports, op: &ClusterOp) -> Result<(), String> {
    let ClusterOp::PromoteRestarted { volume, to, .. } = op else { return Ok(()) };
    let Some(v) = state.volumes.get(volume) else { return Ok(()) };
    let Some(named) = v.member(to.node) else { return Ok(()) };
    let said = reports.get(&to.node).filter(|r| r.member == *to).and_then(|r| r.volumes.get(volume));
    said.map_or_else(|| Err("has not reported yet".into()), |said| eligible_restarted(v, named, said))
}

fn is_sick(reports: &Reports, volume: VolumeId, member: Member) -> bool {
    let said = reports.get(&member.node).filter(|r| r.member == member).and_then(|r| r.volumes.get(&volume));
    said.is_some_and(|said| said.health != Health::Healthy)
}
