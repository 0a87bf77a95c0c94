//! Flushes of the whole ack set: client FLUSH, and the lazy flush that lets intents be cleared.
//!
//! A round makes everything committed before it started stable here and on every member of the ack set;
//! waiting flushes share the next round. When it ends, all writes up to its number are *stable* and every
//! member is told, soon, so that intent regions may be cleared [R5].

use crate::mutation::{Mutation, mutated};
use crate::types::{Nanos, NodeId};
use crate::wire::PeerMsg;

use super::io::ReplyData;
use super::node_set::NodeSet;
use super::primary::{OpId, Round, Stage};
use super::{INTENT_IDLE, INTENT_IDLE_BUSY, Replica};

/// Bitmap groups written per tick, when idle, only because bits were cleared.
const CLEARED_GROUPS_PER_TICK: usize = 4;

impl Replica {
    pub(super) fn pump_flush(&mut self) {
        self.pump_solo();
        self.pump_round();
        self.start_round();
    }

    fn pump_solo(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        let (flusher, ops) = (&self.flusher, &primary.ops);
        let stable = |id: &OpId| match ops.get(id).map(|op| op.stage) {
            Some(Stage::Solo(ticket)) => flusher.redeemed(ticket),
            _ => false,
        };
        let done: Vec<OpId> = primary.solo_queue.iter().copied().filter(stable).collect();
        if done.is_empty() {
            return;
        }
        primary.solo_queue.retain(|id| !done.contains(id));
        for id in done {
            self.finish(id, Ok(ReplyData::None));
        }
    }

    fn pump_round(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        let ended =
            primary.round.as_ref().is_some_and(|r| r.waiting.is_empty() && self.flusher.redeemed(r.local));
        if !ended {
            return;
        }
        let mut round = primary.round.take().expect("checked above");
        primary.stable = primary.stable.max(Some(round.through));
        for id in round.ops.drain(..) {
            self.finish(id, Ok(ReplyData::None));
        }
        if let Some(primary) = &mut self.primary {
            primary.spare_queue = round.ops;
            primary.stable_untold = true;
        }
        self.clear_intents(false);
    }

    /// Tells the ack set of what became stable, with the next flush or tick: it lets intents be cleared, for which
    /// nobody waits, and alone it would wake every member once more in each round.
    fn tell_untold(&mut self) {
        if self.primary.as_ref().is_some_and(|p| p.stable_untold) {
            self.tell_stable(false);
        }
    }

    /// Tells the ack set what is stable.
    pub(super) fn tell_stable(&mut self, drain: bool) {
        let Some(primary) = &mut self.primary else { return };
        primary.stable_untold = false;
        let Some(through) = primary.stable else { return };
        let reign = primary.reign;
        self.send_to_acks(&PeerMsg::Stable { reign, through, drain });
    }

    /// Sends to those of the ack set that follow this reign.
    fn send_to_acks(&mut self, msg: &PeerMsg) {
        let Some(primary) = &self.primary else { return };
        let nodes: NodeSet = primary.acks.keys().copied().collect();
        for node in nodes.iter() {
            if let Some(session) = self.reported_session(node) {
                self.send(session, msg.clone());
            }
        }
    }

    fn start_round(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let Some(primary) = &mut self.primary else { return };
        if !primary.serving() || primary.round.is_some() {
            return;
        }
        let through = primary.committed_through();
        // Not `through`: what overtook an older write in flight is committed and acknowledged, too.
        if primary.stable == Some(primary.last_seq()) {
            // Nothing has been written since the last round: it is stable already.
            primary.flush_wanted = false;
            let mut stable_already = std::mem::take(&mut primary.flush_queue);
            stable_already.drain(..).for_each(|id| self.finish(id, Ok(ReplyData::None)));
            if let Some(primary) = self.primary.as_mut().filter(|p| p.flush_queue.is_empty()) {
                primary.flush_queue = stable_already;
            }
            return;
        }
        // Without a client that asks, a round that makes nothing more stable can wait.
        primary.flush_wanted &= primary.stable != Some(through);
        if primary.flush_queue.is_empty() && !primary.flush_wanted {
            return;
        }
        primary.flush_wanted = false;
        let spare = std::mem::take(&mut primary.spare_queue);
        let ops = std::mem::replace(&mut primary.flush_queue, spare);
        let locally = mutated(Mutation::FlushOnlyLocally);
        let waiting = primary.acks.keys().copied().filter(|_| !locally).collect();
        let reign = primary.reign;
        let id = self.request_id();
        let (local, now) = (self.flusher.request(), self.now);
        let Some(primary) = &mut self.primary else { return };
        primary.round = Some(Round { id, through, local, started: now, waiting, ops });
        self.tell_untold();
        self.send_to_acks(&PeerMsg::Flush { reign, id });
    }

    pub(super) fn flush_acked(&mut self, node: NodeId, id: u64) {
        let round = self.primary.as_mut().and_then(|p| p.round.as_mut());
        if let Some(round) = round.filter(|r| r.id == id) {
            round.waiting.remove(node);
        }
    }

    /// The lazy part: flush when regions have been idle, then clear them.
    pub(super) fn tick_intents(&mut self) {
        self.tell_untold();
        let idle = self.idle_before();
        if let Some(primary) = &mut self.primary {
            let stable = primary.stable;
            let unflushed = self.intents.wants_flush(&self.store, stable, idle, false);
            primary.flush_wanted |= unflushed && primary.serving();
        }
        if self.is_member() {
            self.clear_intents(false);
        } else {
            self.intents.settle(&self.store);
        }
        let idle = self.primary.as_ref().is_none_or(|p| p.ops.is_empty()) && self.following.is_idle();
        if idle && self.failure.is_none() {
            self.store.save_cleared(CLEARED_GROUPS_PER_TICK);
        }
    }

    /// A region last touched before this may be cleared.
    fn idle_before(&self) -> Nanos {
        let busy = self.now.since(self.intents.touched()) < INTENT_IDLE;
        let idle = if busy { INTENT_IDLE_BUSY } else { INTENT_IDLE };
        self.now.before(idle)
    }

    /// Clears the intent regions that may go [R5]: only as a named member, only what is stable on all of
    /// the ack set, and only when the bitmaps of all missing replicas are durable for it, under a config
    /// that the superblock holds [R16]. `drain`: now, not when idle.
    pub(super) fn clear_intents(&mut self, drain: bool) {
        if !self.is_member() || !self.config_usable() || self.failure.is_some() {
            return;
        }
        let max = self.settings().intent_regions_max;
        let stable = match &self.primary {
            Some(primary) if primary.serving() => primary.stable,
            Some(_) => None,
            None => self.following.stable,
        };
        let idle_before = if drain { self.now } else { self.idle_before() };
        // Writers that wait for room get some, in larger steps than one where the map is not tiny. Otherwise
        // what is written to at the time stays: clearing it would only make the next write wait.
        let room_wanted =
            self.primary.as_ref().map_or(self.store.intent().count() > u64::from(max), |p| p.intent_full);
        let keep_max = if room_wanted { u64::from(max.saturating_sub((max / 4).max(1))) } else { u64::MAX };
        let missing = self.missing_slots();
        loop {
            let before = self.store.intent().count();
            self.intents.clear_idle(&mut self.store, stable, idle_before, keep_max, |store, blocks| {
                missing.iter().flat_map(|slot| store.save_dirty(slot, blocks)).collect()
            });
            // Settled regions go some at a time; whoever takes over would have to compare what is left.
            if !drain || self.store.intent().count() == before {
                return;
            }
        }
    }
}
