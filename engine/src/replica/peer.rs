//! Sessions to the other replicas, and where each message goes.
//!
//! A message acts only if the session belongs to the incarnation that it claims to speak for: those to a
//! secondary must come from the named primary in the present reign; those to a primary count only in its
//! reign, from the incarnation that the config (or a resync) names [R2, R10].

use crate::mutation::{Mutation, mutated};
use crate::types::{Incarnation, LogIndex, Member, Nanos, NodeId, Reign, ReplicaSlot};
use crate::wire::{Payload, PeerMsg, PeerReport, Run, RunsKind, SessionId};

use super::Replica;
use super::io::{Event, Output, PeerInput};
use super::meta_store::RUNS_MAX;

/// A session silent for this many peer time-outs is ended. More than one, so that a member's removal, due
/// after one, is not put off by a reconnect.
const HUNG_FACTOR: u32 = 2;

/// A live session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) incarnation: Incarnation,
}

/// What is known of one other replica.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) slot: ReplicaSlot,
    pub(super) session: Option<Session>,
    /// When the session was lost, or when the present one came up.
    pub(super) down_since: Nanos,
    pub(super) last_heard: Nanos,
    pub(super) last_sent: Nanos,
    /// The reign that it has confirmed on this session, with its whole report.
    pub(super) reported: Option<Reign>,
    pub(super) report: Option<PeerReport>,
    pub(super) intents: Vec<Run>,
    pub(super) foreign: Vec<Run>,
    /// It said on this session that it failed.
    pub(super) failed: Option<String>,
    pub(super) refused: Option<String>,
    /// A resync has copied to it since this replica was opened.
    pub(super) copied_to: bool,
}

impl Peer {
    pub(super) fn new(slot: ReplicaSlot, now: Nanos) -> Self {
        Self {
            slot,
            session: None,
            down_since: now,
            last_heard: now,
            last_sent: now,
            reported: None,
            report: None,
            intents: Vec::new(),
            foreign: Vec::new(),
            failed: None,
            refused: None,
            copied_to: false,
        }
    }

    fn reset(&mut self, now: Nanos) {
        self.session = None;
        self.down_since = now;
        self.last_heard = now;
        self.last_sent = now;
        self.failed = None;
        self.refused = None;
        self.forget_report();
    }

    pub(super) fn forget_report(&mut self) {
        self.reported = None;
        self.report = None;
        self.intents.clear();
        self.foreign.clear();
    }
}

impl PeerInput {
    /// Only a request's ordinary progress hangs on it.
    pub(super) fn is_routine(&self) -> bool {
        use PeerMsg::{Flush, FlushAck, Ping, Pong, Stable, Write, WriteAck};
        matches!(
            self,
            Self::Msg(
                _,
                Write { .. } | WriteAck { .. } | Flush { .. } | FlushAck { .. } | Stable { .. } | Ping | Pong
            )
        )
    }
}

impl Replica {
    pub(super) fn sessions(&self) -> Vec<SessionId> {
        self.peers.values().filter_map(|p| p.session.map(|s| s.id)).collect()
    }

    fn node_of(&self, session: SessionId) -> Option<NodeId> {
        self.peers.iter().find(|(_, p)| p.session.is_some_and(|s| s.id == session)).map(|(n, _)| *n)
    }

    /// The member on `node` as its live session names it.
    pub(super) fn session_member(&self, node: NodeId) -> Option<Member> {
        let session = self.peers.get(&node)?.session?;
        Some(Member { node, incarnation: session.incarnation })
    }

    /// The session to `node`, if it follows the present reign, has not failed, and speaks for the
    /// incarnation that counts: the named member's, or that of the resync target.
    pub(super) fn reported_session(&self, node: NodeId) -> Option<SessionId> {
        let peer = self.peers.get(&node)?;
        let session = peer.session?;
        let primary = self.primary.as_ref()?;
        let counts = match primary.acks.get(&node) {
            Some(incarnation) => {
                *incarnation == session.incarnation
                    || mutated(Mutation::R10)
                    || mutated(Mutation::RestartedInSync)
            }
            None => true,
        };
        (peer.reported == Some(primary.reign) && peer.failed.is_none() && counts).then_some(session.id)
    }

    pub(super) fn session_up(&mut self, id: SessionId, node: NodeId, incarnation: Incarnation) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else {
            let reason = format!("{node} is no replica of this volume in the config known here");
            self.out.push_back(Output::CloseSession(id, reason));
            return;
        };
        if let Some(old) = peer.session {
            self.session_down(old.id);
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.reset(now);
        peer.session = Some(Session { id, incarnation });
        self.event(Event::Session { node, up: true });
        self.introduce(node);
    }

    /// Tells a peer the config known here and, as primary, asks it to follow.
    pub(super) fn introduce(&mut self, node: NodeId) {
        let Some(session) = self.peers.get(&node).and_then(|p| p.session) else { return };
        if let Some(config) = self.config.clone() {
            self.send(session.id, PeerMsg::Config(Box::new(config)));
        }
        if let Some(primary) = &self.primary {
            let reign = primary.reign;
            self.send(session.id, PeerMsg::Takeover { reign });
        }
        if let Some(reason) = self.failure.as_deref().map(super::for_peers) {
            let reign = self.reign();
            self.send(session.id, PeerMsg::Failed { reign, reason });
        }
    }

    pub(super) fn session_down(&mut self, session: SessionId) {
        let Some(node) = self.node_of(session) else { return };
        let now = self.now;
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.reset(now);
        }
        self.discard_incoming(session);
        self.drop_target(node);
        self.retry_repairs(node);
        self.event(Event::Session { node, up: false });
    }

    pub(super) fn peer_msg(&mut self, session: SessionId, msg: PeerMsg) {
        let Some(node) = self.node_of(session) else {
            return self.release_msg(msg);
        };
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.last_heard = self.now;
        }
        match msg {
            PeerMsg::Config(config) => self.adopt_config(*config),
            PeerMsg::Ping => self.send(session, PeerMsg::Pong),
            PeerMsg::Pong => {}
            PeerMsg::Failed { reason, .. } => self.peer_failed(node, reason),
            msg @ (PeerMsg::Takeover { .. }
            | PeerMsg::Write { .. }
            | PeerMsg::Zero { .. }
            | PeerMsg::Flush { .. }
            | PeerMsg::Stable { .. }
            | PeerMsg::ResyncStart { .. }
            | PeerMsg::Compare { .. }
            | PeerMsg::Copy { .. }
            | PeerMsg::CopyZero { .. }
            | PeerMsg::JoinFlush { .. }
            | PeerMsg::ReadRequest { .. }) => self.follow_msg(session, node, msg),
            PeerMsg::Runs { reign, kind, runs, last } => {
                self.runs_msg(session, node, (reign, kind), runs, last)
            }
            msg => self.answer_msg(node, msg),
        }
    }

    /// A message to the primary: it counts only in its reign [R2, R10].
    fn answer_msg(&mut self, node: NodeId, msg: PeerMsg) {
        let reign = match &msg {
            PeerMsg::Report { reign, .. }
            | PeerMsg::WriteAck { reign, .. }
            | PeerMsg::FlushAck { reign, .. }
            | PeerMsg::ResyncReady { reign }
            | PeerMsg::CompareResult { reign, .. }
            | PeerMsg::CopyAck { reign, .. }
            | PeerMsg::JoinFlushAck { reign, .. }
            | PeerMsg::ReadReply { reign, .. } => *reign,
            _ => return self.release_msg(msg),
        };
        if self.primary.as_ref().is_none_or(|p| p.reign != reign) {
            return self.release_msg(msg);
        }
        if let PeerMsg::Report { report, .. } = msg {
            self.drop_target(node); // whatever it was asked on this session is void
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.forget_report();
                peer.report = Some(report);
            }
            return;
        }
        if self.reported_session(node).is_none() {
            return self.release_msg(msg);
        }
        match msg {
            PeerMsg::WriteAck { seq, .. } => self.write_acked(node, seq),
            PeerMsg::FlushAck { id, .. } => self.flush_acked(node, id),
            PeerMsg::ResyncReady { .. } => self.target_ready(node),
            PeerMsg::CompareResult { id, differ, .. } => self.compared(node, id, &differ),
            PeerMsg::CopyAck { id, .. } => self.copied(node, id),
            PeerMsg::JoinFlushAck { id, .. } => self.join_flushed(node, id),
            PeerMsg::ReadReply { id, payload, .. } => self.repair_answered(id, payload),
            other => self.release_msg(other),
        }
    }

    fn runs_msg(
        &mut self,
        session: SessionId,
        node: NodeId,
        (reign, kind): (Reign, RunsKind),
        runs: Vec<Run>,
        last: bool,
    ) {
        if let RunsKind::Dirty(slot) = kind {
            return self.dirty_runs(session, node, reign, slot, &runs);
        }
        let Some(primary) = self.primary.as_ref().filter(|p| p.reign == reign) else { return };
        let reign = primary.reign;
        let Some(peer) = self.peers.get_mut(&node).filter(|p| p.report.is_some()) else { return };
        let list = if kind == RunsKind::Intent { &mut peer.intents } else { &mut peer.foreign };
        list.extend(runs);
        if list.len() > RUNS_MAX {
            let reason = format!("a list of more than {RUNS_MAX} runs");
            self.out.push_back(Output::CloseSession(session, reason));
            return;
        }
        if last && kind == RunsKind::Intent {
            peer.reported = Some(reign);
            self.peer_reported(node);
        }
    }

    fn peer_failed(&mut self, node: NodeId, reason: String) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.failed = Some(reason);
        }
        self.drop_target(node);
        self.retry_repairs(node);
    }

    /// Releases what a message carries that nobody wants.
    pub(super) fn release_msg(&mut self, msg: PeerMsg) {
        let payload: Option<Payload> = match msg {
            PeerMsg::Write { payload, .. } | PeerMsg::Copy { payload, .. } => Some(payload),
            PeerMsg::ReadReply { payload, .. } => payload,
            _ => None,
        };
        if let Some(payload) = payload {
            self.release(payload.buf);
        }
    }

    /// Keeps silent sessions known to be alive, and ends those that stay silent: whoever hangs behind one
    /// is not connected, whatever its socket says.
    pub(super) fn tick_peers(&mut self) {
        let limit = self.settings().peer_timeout;
        let (now, every) = (self.now, limit / 4);
        let hung = |p: &Peer| now.since(p.last_heard) >= limit * HUNG_FACTOR;
        let hung: Vec<SessionId> =
            self.peers.values().filter(|p| hung(p)).filter_map(|p| p.session.map(|s| s.id)).collect();
        for session in hung {
            self.session_down(session);
            let reason = format!("nothing heard for {} ms", (limit * HUNG_FACTOR).as_millis());
            self.out.push_back(Output::CloseSession(session, reason));
        }
        let mut ping = Vec::new();
        for peer in self.peers.values_mut() {
            if let Some(session) = peer.session.filter(|_| now.since(peer.last_sent) >= every) {
                peer.last_sent = now;
                ping.push(session.id);
            }
        }
        for session in ping {
            self.send(session, PeerMsg::Ping);
        }
    }

    /// The log index of the config known here.
    pub(super) fn config_index(&self) -> LogIndex {
        self.config.as_ref().map_or(LogIndex(0), |c| c.index)
    }
}
