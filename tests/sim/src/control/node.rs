//! What every node does: register its run, renew its lease, hand commands to the leader. Step by step as
//! `engine::control::node::{renew, inner}` do it, with the production types.

use std::time::Duration;

use blkrepl_engine::control::{Applied, ClusterOp, Command, Grant, NodeAddrs, RequestId};
use blkrepl_engine::types::{LogIndex, NodeId, Proposal, ProposalOutcome};

use super::ControlOutput;
use super::leader::Renewal;
use super::model::{Model, Step};
use crate::clock::{MS, S, Time};

/// Pause before another try after a renewal that failed.
const RETRY: Time = 31 * MS;
/// How long a command is retried in all; a promotion gets the lease that it waits out on top.
const SUBMIT_DEADLINE: Time = 5 * S;
/// How long one attempt waits for the leader's answer.
const ATTEMPT_DEADLINE: Time = 2 * S;
/// Pause between attempts.
const ATTEMPT_PAUSE: Time = 20 * MS;

/// Who wants to know what became of a command.
#[derive(Clone, Copy, Debug)]
pub(super) enum CallKind {
    Register,
    Proposal(Proposal),
    Operator(u64),
}

/// A command on its way to the log.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) node: NodeId,
    command: Command,
    kind: CallKind,
    deadline: Time,
    limit: Time,
    attempt: u32,
    /// An attempt whose answer did not come may still be in somebody's log.
    uncertain: bool,
    /// Took effect there; waits to be applied here.
    waiting_for: Option<LogIndex>,
}

/// The leader's answer to an attempt.
#[derive(Debug)]
pub(super) enum Reply {
    /// It went through the log.
    Applied(Applied),
    /// The leader did not propose it.
    Declined(String),
    /// Nothing happened.
    NotLeader,
    /// Something may have happened.
    Failed,
}

fn nanos(d: Duration) -> Time {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl Model {
    pub(super) fn next_request(&mut self, node: NodeId) -> Option<RequestId> {
        let incarnation = self.me(node)?.incarnation;
        let n = self.node(node);
        let number = n.requests;
        n.requests += 1;
        Some(RequestId { node, incarnation, volume: None, number })
    }

    // The lease.

    /// Renews now, whatever was planned.
    pub(super) fn renew_soon(&mut self, node: NodeId) {
        let wait = self.rng.between(1, 1000) * 1000;
        self.renew_after(node, wait);
    }

    fn renew_after(&mut self, node: NodeId, wait: Time) {
        let n = self.node(node);
        if n.nonce.is_some() {
            return; // The one under way comes first; it plans the next.
        }
        n.renew_turn += 1;
        let turn = n.renew_turn;
        self.later(wait, node, Step::Renew(turn));
    }

    fn renew_period(&self, node: NodeId) -> Time {
        nanos(self.current(node).lease) * 4 / 15
    }

    pub(super) fn renew(&mut self, node: NodeId, turn: u64) {
        if self.nodes[&node].renew_turn != turn {
            return;
        }
        let Some(member) = self.me(node) else { return };
        if !self.current(node).is_newest(member) {
            let registering = |c: &Call| c.node == node && matches!(c.kind, CallKind::Register);
            if !self.calls.values().any(registering) {
                self.register(node);
            }
            return self.renew_after(node, RETRY);
        }
        let Some(leader) = self.nodes[&node].leader else { return self.renew_after(node, RETRY) };
        let volumes =
            self.nodes[&node].reports.iter().map(|(id, r)| (*id, r.health.clone(), r.report)).collect();
        let Some(RequestId { number: nonce, .. }) = self.next_request(node) else { return };
        // Read before the first byte leaves: the lease counts from here [R1].
        let sent = self.local(node);
        let n = self.node(node);
        n.lease.on_send(nonce, sent);
        n.nonce = Some(nonce);
        let period = self.renew_period(node);
        let limit = if leader == node { 2 * S } else { period };
        if let Some(after) = self.arrival(node, leader, limit) {
            let renewal = Renewal { member, nonce, volumes };
            self.later(after, leader, Step::RenewArrives(Box::new(renewal)));
        }
        self.later(limit, node, Step::RenewLate(nonce));
    }

    fn register(&mut self, node: NodeId) {
        let Some(run) = self.nodes[&node].run else { return };
        let addrs = self.current(node).nodes.get(&node).map_or_else(NodeAddrs::default, |n| n.addrs.clone());
        let op = ClusterOp::Register { node, incarnation: run.incarnation, os_boot: run.os_boot, addrs };
        let Some(request) = self.next_request(node) else { return };
        self.submit_call(node, request, op, CallKind::Register);
    }

    pub(super) fn renew_late(&mut self, node: NodeId, nonce: u64) {
        if self.nodes[&node].nonce == Some(nonce) {
            self.node(node).nonce = None;
            self.renew_after(node, RETRY);
        }
    }

    pub(super) fn renew_answered(&mut self, node: NodeId, nonce: u64, answer: Result<Grant, String>) {
        if self.nodes[&node].nonce != Some(nonce) {
            return; // Nobody waits any more: the connection of that call is closed.
        }
        let n = self.node(node);
        n.nonce = None;
        let counted = match answer {
            Ok(grant) => {
                let applied = LogIndex(n.applied as u64);
                let before = n.lease.snapshot().clone();
                let counted = n.lease.on_grant(&grant, applied);
                if *n.lease.snapshot() != before {
                    self.publish(node);
                }
                counted
            }
            Err(_) => false,
        };
        let wait = if counted { self.renew_period(node) } else { RETRY };
        self.renew_after(node, wait);
    }

    // Commands.

    pub(super) fn submit_call(&mut self, node: NodeId, request: RequestId, op: ClusterOp, kind: CallKind) {
        let mut limit = ATTEMPT_DEADLINE;
        let mut whole = SUBMIT_DEADLINE;
        if op.needs_lease_over() {
            let lease = self.current(node).lease_longest;
            let lease = nanos(lease + lease / 100);
            limit += lease;
            whole += lease;
        }
        let command = Command { request, only_under: None, op };
        let deadline = self.now + whole;
        let call =
            Call { node, command, kind, deadline, limit, attempt: 0, uncertain: false, waiting_for: None };
        let id = self.next_call;
        self.next_call += 1;
        self.calls.insert(id, call);
        self.later(1000, node, Step::Attempt(id));
    }

    pub(super) fn attempt(&mut self, id: u64) {
        let now = self.now;
        let Some(call) = self.calls.get_mut(&id) else { return };
        let node = call.node;
        if now >= call.deadline {
            return self.finish_call(id, Err(None));
        }
        if call.waiting_for.is_some() {
            return;
        }
        call.attempt += 1;
        let (attempt, limit) = (call.attempt, call.limit.min(call.deadline - now));
        let command = call.command.clone();
        let Some(leader) = self.nodes[&node].leader else {
            return self.later(ATTEMPT_PAUSE, node, Step::Attempt(id));
        };
        self.later(limit, node, Step::AttemptLate(id, attempt));
        if leader != node && self.loses() {
            return;
        }
        if let Some(after) = self.arrival(node, leader, limit) {
            if leader != node && self.doubles() {
                let more = after + self.delay();
                self.later(more, leader, Step::SubmitArrives(id, attempt, Box::new(command.clone())));
            }
            self.later(after, leader, Step::SubmitArrives(id, attempt, Box::new(command)));
        }
    }

    pub(super) fn attempt_late(&mut self, id: u64, attempt: u32) {
        let Some(call) = self.calls.get_mut(&id).filter(|c| c.attempt == attempt) else { return };
        if call.waiting_for.is_some() {
            return;
        }
        call.uncertain = true;
        let node = call.node;
        self.later(ATTEMPT_PAUSE, node, Step::Attempt(id));
    }

    /// The leader answers an attempt.
    pub(super) fn answer(&mut self, leader: NodeId, (id, attempt): (u64, u32), reply: Reply) {
        let Some(node) = self.calls.get(&id).map(|c| c.node) else { return };
        if leader != node && self.loses() {
            return;
        }
        if let Some(after) = self.arrival(leader, node, ATTEMPT_DEADLINE) {
            self.later(after, node, Step::AttemptAnswer(id, attempt, reply));
        }
    }

    pub(super) fn attempt_answered(&mut self, id: u64, attempt: u32, reply: Reply) {
        let Some(call) = self.calls.get_mut(&id).filter(|c| c.attempt == attempt) else { return };
        if call.waiting_for.is_some() {
            return;
        }
        let node = call.node;
        match reply {
            Reply::Applied(Applied::Refused(why)) => self.finish_call(id, Err(Some(why))),
            Reply::Applied(Applied::Done { index, .. }) => {
                call.waiting_for = Some(index);
                self.applied_more(node);
            }
            Reply::Declined(_) if call.uncertain => self.finish_call(id, Err(None)),
            Reply::Declined(why) => self.finish_call(id, Err(Some(why))),
            Reply::NotLeader => {
                // A new attempt, so that the present one is not found late.
                call.attempt += 1;
                self.later(ATTEMPT_PAUSE, node, Step::Attempt(id));
            }
            Reply::Failed => {
                call.attempt += 1;
                call.uncertain = true;
                self.later(ATTEMPT_PAUSE, node, Step::Attempt(id));
            }
        }
    }

    /// More is applied at a node: what waited for it ends.
    pub(super) fn applied_more(&mut self, node: NodeId) {
        let applied = LogIndex(self.nodes[&node].applied as u64);
        let here = |c: &Call| c.node == node && c.waiting_for.is_some_and(|index| index <= applied);
        let done: Vec<u64> = self.calls.iter().filter(|(_, c)| here(c)).map(|(id, _)| *id).collect();
        if !done.is_empty() {
            self.publish(node);
        }
        for id in done {
            self.finish_call(id, Ok(()));
        }
    }

    /// `Err(None)`: its fate is not known.
    fn finish_call(&mut self, id: u64, result: Result<(), Option<String>>) {
        let Some(call) = self.calls.remove(&id) else { return };
        let node = call.node;
        match (call.kind, result) {
            (CallKind::Register, Err(Some(reason))) => self.say(ControlOutput::Refused { node, reason }),
            (CallKind::Register, Ok(())) => self.renew_soon(node),
            (CallKind::Register, Err(None)) => {}
            (CallKind::Proposal(proposal), result) => {
                let outcome = match result {
                    Ok(()) => ProposalOutcome::Applied,
                    Err(Some(why)) => ProposalOutcome::Refused(why),
                    Err(None) => ProposalOutcome::Unknown,
                };
                self.say(ControlOutput::Outcome { node, proposal, outcome });
            }
            (CallKind::Operator(ticket), result) => {
                let result = result.map_err(|e| e.unwrap_or_else(|| "unknown".into()));
                self.say(ControlOutput::Submitted { node, ticket, result });
            }
        }
    }
}
