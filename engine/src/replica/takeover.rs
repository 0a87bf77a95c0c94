//! Becoming primary.
//!
//! A new primary serves nothing, reads included, until every other member has confirmed the new reign (and
//! so refuses the old one) and holds the same content in all regions that the intent map of either names,
//! or has been removed by a committed change [R11]. It has flushed everything that it acknowledged as a
//! secondary [R9, R14], and the superblock of the new reign is durable [R16].

use std::collections::BTreeSet;

use crate::mutation::{Mutation, mutated};
use crate::types::{Member, NodeId};

use super::Replica;
use super::io::Event;
use super::node_set::NodeSet;
use super::primary::{Phase, Primary};
use super::resync::{Target, TargetPhase};

impl Replica {
    pub(super) fn become_primary(&mut self) {
        let Some(config) = &self.config else { return };
        let reign = config.reign;
        self.primary = Some(Box::new(Primary::new(reign, self.now)));
        self.discard_all_incoming();
        // Whatever an intent region holds, others may lack it, or hold what is lacking here [R3].
        self.mark_intents_for_all();
        self.refresh_acks();
        let regions = self.store.intent().count();
        self.event(Event::TookOver { reign, regions });
        for node in self.peers.keys().copied().collect::<Vec<NodeId>>() {
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.forget_report();
            }
            self.introduce(node);
        }
    }

    /// Members other than this replica.
    pub(super) fn other_members(&self) -> Vec<Member> {
        let members = self.config.as_ref().map(|c| c.in_sync.clone()).unwrap_or_default();
        members.into_iter().filter(|m| m.node != self.me.node).collect()
    }

    pub(super) fn pump_takeover(&mut self) {
        let usable = self.config_usable();
        let others = self.other_members();
        let Some(primary) = &mut self.primary else { return };
        let Phase::TakingOver { flush, reconciled, .. } = &mut primary.phase else { return };
        // What was begun in older reigns has to be on the disk before it is flushed or compared [R7].
        if flush.is_none() {
            if !self.disk.quiet() || self.failure.is_some() {
                return;
            }
            *flush = Some(self.flusher.request());
            return;
        }
        reconciled.retain(|node| others.iter().any(|m| m.node == *node));
        let flushed = flush.is_some_and(|ticket| mutated(Mutation::R9) || self.flusher.redeemed(ticket));
        if !flushed || !usable {
            return;
        }
        let open: BTreeSet<NodeId> =
            others.iter().map(|m| m.node).filter(|node| !reconciled.contains(node)).collect();
        if !open.is_empty() && !mutated(Mutation::R11) {
            for node in open {
                self.reconcile(node);
            }
            return;
        }
        primary.phase = Phase::Serving;
        let reign = primary.reign;
        // Members like any others from here on: nobody keeps account of what is sent to them.
        let done = |t: &Target| t.member && t.phase == TargetPhase::Reconciled;
        let equal: NodeSet = primary.targets.iter().filter(|(_, t)| done(t)).map(|(node, _)| *node).collect();
        equal.iter().for_each(|node| self.drop_target(node));
        self.event(Event::Serving { reign });
    }

    /// A member holds the same content as this replica.
    pub(super) fn reconciled(&mut self, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if let Phase::TakingOver { reconciled, .. } = &mut primary.phase {
            reconciled.insert(node);
        }
        self.pump_takeover();
    }

    /// A peer follows this reign and has reported.
    pub(super) fn peer_reported(&mut self, node: NodeId) {
        let Some(primary) = &self.primary else { return };
        if primary.serving() && self.reported_session(node).is_some() && primary.acks.contains_key(&node) {
            self.resend_parts(node);
            self.ask_for_waiting_repairs();
        }
    }
}
