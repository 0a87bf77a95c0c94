//! The operator: commands as `blkrepl` carries them out (`ctl/src/ops.rs`), at any moment, also twice.

use std::collections::BTreeMap;

use blkrepl_engine::control::ClusterOp;
use blkrepl_engine::replica::Replica;
use blkrepl_engine::types::{Health, LineageId, NodeId};

use crate::node::Phase;
use crate::world::{NodeEvent, VOLUME, World};

/// How long a replica that is to be made anew waits until it is no member.
const RECREATE_BY: u64 = 15_000_000_000;

/// Whether a promotion is forced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Force {
    No,
    Yes,
    /// Also a copy that a resync into it left half done.
    AlsoInconsistent,
}

/// What an operator has asked for and not heard of.
#[derive(Debug, Default)]
pub(crate) struct Operator {
    next_ticket: u64,
    asked: BTreeMap<u64, &'static str>,
    /// Forced promotions that were asked for; each may begin a lineage.
    forces: u64,
    promise_ended: Option<(u64, Vec<u64>)>,
    pub(crate) creating: bool,
}

impl Operator {
    fn ticket(&mut self, what: &'static str) -> u64 {
        self.next_ticket += 1;
        self.asked.insert(self.next_ticket, what);
        self.next_ticket
    }

    /// True if a lineage may begin: somebody asked for it.
    pub(crate) fn takes_force(&mut self) -> bool {
        let asked = self.forces > 0;
        self.forces -= u64::from(asked);
        asked
    }

    pub(crate) fn lineage_began(&mut self, epoch: u64) {
        self.promise_ended = Some((epoch, Vec::new()));
    }

    /// True the first time that the promise ends for these copies.
    pub(crate) fn promise_ended(&mut self, epoch: u64, copies: Vec<u64>) -> bool {
        let key = Some((epoch, copies));
        let first = self.promise_ended != key;
        self.promise_ended = key;
        first
    }
}

impl World {
    pub(crate) fn submitted(&mut self, node: NodeId, ticket: u64, result: &Result<(), String>) {
        let what = self.operator.asked.remove(&ticket).unwrap_or("something");
        self.note("OPERATOR", format_args!("{what} at {node}: {result:?}"));
        if what == "create" && result.is_err() {
            self.operator.creating = false;
        }
        let refused = result.as_ref().is_err_and(|why| why != "unknown");
        if what == "promote by force" && refused && self.node_ref(node).is_running() {
            self.input(node, Replica::end_force);
        }
    }

    pub(crate) fn submit(&mut self, at: NodeId, what: &'static str, op: ClusterOp) {
        let ticket = self.operator.ticket(what);
        self.note("OPERATOR", format_args!("{what} at {at}"));
        self.control.submit(self.now, at, ticket, op);
    }

    /// Begins a move at the primary, if it can be reached.
    pub(crate) fn ask_move(&mut self, to: NodeId) -> bool {
        self.at_primary("move", |r, now| r.begin_move(now, to))
    }

    pub(crate) fn ask_demote(&mut self) -> bool {
        self.at_primary("demote", Replica::begin_demote)
    }

    fn at_primary(
        &mut self,
        what: &'static str,
        ask: impl FnOnce(&mut Replica, blkrepl_engine::types::Nanos) -> Result<(), String>,
    ) -> bool {
        let Some(primary) = self.volume().and_then(|v| v.primary) else { return false };
        let n = self.node_ref(primary.node);
        if !n.is_running() || n.paused_until > self.now {
            return false;
        }
        let mut begun = false;
        let mut said = Ok(());
        self.input(primary.node, |r, now| {
            said = ask(r, now);
            begun = said.is_ok();
        });
        self.note("OPERATOR", format_args!("{what} at {}: {said:?}", primary.node));
        self.node(primary.node).asked_to_give_up |= begun;
        begun
    }

    /// `blkrepl promote`, at a node, by its own view of the cluster.
    pub(crate) fn ask_promote(&mut self, at: NodeId, force: Force) -> bool {
        let n = self.node_ref(at);
        let me = n.me();
        let Some(state) = n.state.clone().filter(|_| n.is_running() && n.paused_until <= self.now) else {
            return false;
        };
        let Some(v) = state.volumes.get(&VOLUME) else { return false };
        if v.primary == Some(me) {
            return false;
        }
        let expected_epoch = v.epoch;
        let volume = VOLUME;
        if v.in_sync.contains(&me) {
            if v.primary.is_some() {
                return self.ask_move(at);
            }
            let op = ClusterOp::Promote { volume, expected_epoch, to: me, operator: true };
            self.submit(at, "promote", op);
            return true;
        }
        let restarted = v.member(at).is_some() && v.in_sync.iter().all(|m| state.has_restarted(*m));
        if restarted && force == Force::No {
            let op = ClusterOp::PromoteRestarted { volume, expected_epoch, to: me, operator: true };
            self.submit(at, "promote restarted", op);
            return true;
        }
        if force == Force::No {
            return false;
        }
        let Some(health) = n.replica.as_ref().map(Replica::health) else { return false };
        if n.has_failed() || health != Health::Healthy {
            return false;
        }
        let mut judged = None;
        self.input(at, |r, now| judged = r.begin_force(now, force == Force::AlsoInconsistent).ok());
        let Some(report) = judged else { return false };
        let lineage = LineageId(u128::from(self.rng.next()) << 16 | 1);
        let fork_epoch = v.shared_epoch(&report);
        let op = ClusterOp::ForcePromote { volume, expected_epoch, to: me, lineage, fork_epoch };
        self.operator.forces += 1;
        self.submit(at, "promote by force", op);
        true
    }

    /// `blkrepl volume recreate --discard-data`: the process goes on, its replica is made anew.
    pub(crate) fn ask_recreate(&mut self, id: NodeId) -> bool {
        let n = self.node_ref(id);
        if !matches!(n.phase, Phase::Running | Phase::Unusable(_)) || n.paused_until > self.now {
            return false;
        }
        let Some(state) = n.state.clone() else { return false };
        let Some(v) = state.volumes.get(&VOLUME) else { return false };
        // As `Node::recreate` judges it.
        if v.in_sync.iter().all(|m| m.node == id) {
            return false;
        }
        self.note("OPERATOR", format_args!("recreate at {id}"));
        self.end_replica(id);
        self.node(id).phase = Phase::Recreating;
        self.report(id);
        let by = self.now + RECREATE_BY;
        self.at_node(0, id, NodeEvent::Recreate(by));
        true
    }

    /// The files go once the committed set does not name this run any more: another primary, or the present
    /// one, must not take the new files for those of the member.
    pub(crate) fn recreate(&mut self, id: NodeId, by: u64) {
        let n = self.node_ref(id);
        let me = n.me();
        let named =
            n.state.as_ref().and_then(|s| s.volumes.get(&VOLUME)).is_none_or(|v| v.in_sync.contains(&me));
        if named && self.now < by {
            return self.at_node(20_000_000, id, NodeEvent::Recreate(by));
        }
        if named || !self.may_lose_copy(id) {
            self.node(id).phase = Phase::Opening;
            return self.at_node(1_000_000, id, NodeEvent::Open);
        }
        self.empty_disk(id);
        self.node(id).failed_before = None;
        self.node(id).phase = Phase::Opening;
        self.copies_changed();
        let wait = self.rng.skewed(1_000_000, 60_000_000);
        self.at_node(wait, id, NodeEvent::Open);
    }

    /// Ends the replica within a process that goes on.
    fn end_replica(&mut self, id: NodeId) {
        self.drop_sessions(id, false);
        let clients = std::mem::take(&mut self.node(id).clients);
        for (conn, client) in clients {
            self.tell_closed(id, conn, client, 50_000);
        }
        self.land_pending(id);
        let n = self.node(id);
        let failure = n.replica.take().and_then(|r| r.status().failure);
        n.failed_before = n.failed_before.take().or(failure);
        n.replicas_made += 1;
        n.bufs.clear();
        n.sessions.clear();
        n.dialing.clear();
        n.lease_until = blkrepl_engine::types::Nanos(0);
        n.reported = None;
    }
}
