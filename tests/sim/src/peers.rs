//! Connections between replicas: dialing, frames on their way, and ends that hear of each other late.

use blkrepl_engine::replica::PeerInput;
use blkrepl_engine::types::NodeId;
use blkrepl_engine::wire::{PeerMsg, SessionId};

use crate::clock::{MS, S, Time, US};
use crate::drive::{REDIAL_MAX, REDIAL_MIN};
use crate::net::{Conn, Frame};
use crate::node::SessionEnd;
use crate::outcome::Invariant;
use crate::world::{Event, NodeEvent, World};

impl World {
    /// How long a packet takes from one node to another if nothing blocks it.
    fn latency(&mut self, from: NodeId, to: NodeId) -> Time {
        let max = self.shape.net_max;
        let base = self.rng.skewed(5 * US, max);
        let link = self.link_ref(from, to);
        if self.now < link.slow_until { base * link.slow_factor } else { base }
    }

    pub(crate) fn dial(&mut self, id: NodeId, peer: NodeId) {
        if self.node_ref(id).replica.is_none() || !self.node_ref(id).dialing.contains_key(&peer) {
            return;
        }
        let blocked = self.link_ref(id, peer).blocked_until.max(self.link_ref(peer, id).blocked_until);
        if blocked > self.now {
            // A handshake takes 2 s at most, and what was lost is sent again until then.
            let wait = (blocked - self.now).min(2 * S) + MS;
            return self.at_node(wait, id, NodeEvent::Dial(peer));
        }
        let (n, p) = (self.node_ref(id), self.node_ref(peer));
        let takes = p.is_running()
            && p.replica.is_some()
            && p.state.as_ref().is_some_and(|s| s.volumes.contains_key(&crate::world::VOLUME))
            && !self.is_ghost(peer, id, n.incarnation)
            && !self.is_ghost(id, peer, p.incarnation);
        if !takes || p.paused_until > self.now + S {
            let pause = self.node(id).dialing.get_mut(&peer).expect("checked above");
            let wait = *pause;
            *pause = (*pause * 2).min(REDIAL_MAX);
            return self.at_node(wait, id, NodeEvent::Dial(peer));
        }
        self.node(id).dialing.insert(peer, REDIAL_MIN);
        self.connect_peers(id, peer);
    }

    /// Opens a connection; each end hears of it in its own time.
    pub(crate) fn connect_peers(&mut self, id: NodeId, peer: NodeId) {
        let ends = [(id, self.node_ref(id).incarnation), (peer, self.node_ref(peer).incarnation)];
        let conn = self.conns.len();
        self.conns.push(Conn::new(ends));
        for (side, (node, _)) in ends.into_iter().enumerate() {
            let wait = self.latency(id, peer) * 2;
            self.at_node(wait, node, NodeEvent::Up(conn, side));
        }
    }

    pub(crate) fn session_up(&mut self, id: NodeId, conn: usize, side: usize) {
        let [end, other] = [self.conns[conn].ends[side], self.conns[conn].ends[1 - side]];
        if end.closed || self.node_ref(id).replica.is_none() {
            return self.close_end(conn, side);
        }
        if let Some(old) = self.node_ref(id).session_to(other.node) {
            let known = self.node_ref(id).sessions[&old];
            if known.incarnation > other.incarnation {
                return self.close_end(conn, side);
            }
            // The core hears of the old session's end before it hears of the new one.
            self.node(id).sessions.remove(&old);
            self.close_end(known.conn, known.side);
            self.input(id, |r, now| r.handle_peer(now, PeerInput::Down(old)));
        }
        let n = self.node(id);
        let session = SessionId(n.next_session);
        n.next_session += 1;
        n.sessions
            .insert(session, SessionEnd { conn, side, peer: other.node, incarnation: other.incarnation });
        self.conns[conn].ends[side].session = Some(session);
        self.trace.mix(&[6, id.0, session.0]);
        self.input(id, |r, now| {
            r.handle_peer(now, PeerInput::Up { session, node: other.node, incarnation: other.incarnation });
        });
        // What the other end has sent meanwhile is there already.
        let waiting = self.conns[conn].sent[1 - side].len();
        for _ in 0..waiting {
            self.schedule(US, Event::Frame(conn, 1 - side));
        }
    }

    pub(crate) fn send(&mut self, id: NodeId, session: SessionId, msg: &PeerMsg) {
        let Some(end) = self.node_ref(id).sessions.get(&session).copied() else { return };
        self.check_send(id, msg);
        let node = self.node_ref(id);
        let mut frame = Frame::encode(msg, |payload| {
            let tags = node.tags(payload.buf);
            assert_eq!(crate::content::crc(&tags), payload.crc, "the checksum follows the content: {msg:?}");
            tags
        });
        if self.trace.is_readable() && !matches!(msg, PeerMsg::Ping | PeerMsg::Pong) {
            self.note(id, format_args!("sends {} {}", end.peer, brief(msg)));
        }
        if let Some(how) = self.link(id, end.peer).damage.take() {
            let mut rng = self.rng.fork();
            frame.damage(how, &mut rng);
            self.note(id, format_args!("the frame is damaged on its way ({how:?})"));
        }
        let at = self.now + self.latency(id, end.peer);
        let conn = &mut self.conns[end.conn];
        conn.last_at[end.side] = conn.last_at[end.side].max(at);
        let at = conn.last_at[end.side];
        conn.sent[end.side].push_back(frame);
        self.queue.push(at, Event::Frame(end.conn, end.side));
    }

    /// The oldest frame that an end has sent arrives at the other.
    pub(crate) fn frame_arrives(&mut self, conn: usize, from: usize) {
        let to = self.conns[conn].ends[1 - from];
        let sender = self.conns[conn].ends[from].node;
        let until = self.link_ref(sender, to.node).blocked_until.max(self.node_ref(to.node).paused_until);
        if until > self.now {
            // All of the connection waits, in order.
            return self.queue.push(until, Event::Frame(conn, from));
        }
        if to.closed {
            self.conns[conn].sent[from].clear();
            return;
        }
        // Before the end is up the frame waits in its socket.
        let Some(session) = to.session else { return };
        let Some(frame) = self.conns[conn].sent[from].pop_front() else { return };
        if !self.node_ref(to.node).sessions.contains_key(&session) {
            return;
        }
        let damaged = frame.damaged;
        let n = self.node(to.node);
        match frame.decode(|tags| n.new_buf(tags)) {
            Ok(msg) => {
                if damaged {
                    return self.broke(Invariant::FramesRefused, format!("a damaged frame reads as {msg:?}"));
                }
                self.trace.mix(&[7, to.node.0, session.0]);
                self.input(to.node, |r, now| r.handle_peer(now, PeerInput::Msg(session, msg)));
            }
            Err(error) => {
                self.note(to.node, format_args!("refuses a frame: {error}"));
                self.stats.saw("frame refused");
                self.close_session(to.node, session);
                self.settle(to.node);
            }
        }
    }

    /// One end closes; the other hears of it behind what was sent before.
    pub(crate) fn close_end(&mut self, conn: usize, side: usize) {
        if std::mem::replace(&mut self.conns[conn].ends[side].closed, true) {
            return;
        }
        self.conns[conn].ends[side].session = None;
        let (here, there) = (self.conns[conn].ends[side].node, self.conns[conn].ends[1 - side].node);
        let at = (self.now + self.latency(here, there)).max(self.conns[conn].last_at[side]);
        self.queue.push(at, Event::Closed(conn, 1 - side));
    }

    /// An end hears that the other is closed.
    pub(crate) fn hears_of_close(&mut self, conn: usize, side: usize) {
        let [end, other] = [self.conns[conn].ends[side], self.conns[conn].ends[1 - side]];
        let until =
            self.link_ref(other.node, end.node).blocked_until.max(self.node_ref(end.node).paused_until);
        if until > self.now {
            return self.queue.push(until, Event::Closed(conn, side));
        }
        match end.session {
            Some(session) if !end.closed => {
                self.close_session(end.node, session);
                self.settle(end.node);
            }
            _ => {
                self.close_end(conn, side);
                let n = self.node_ref(end.node);
                if n.incarnation == end.incarnation && n.session_to(other.node).is_none() {
                    self.session_lost(end.node, other.node);
                }
            }
        }
    }

    /// A connection breaks: of what is under way some is lost, and both ends hear of it.
    pub(crate) fn break_conn(&mut self, conn: usize, keep: u64) {
        for side in 0..2 {
            let sent = &mut self.conns[conn].sent[side];
            let kept = sent.len() * crate::content::at(keep) / 1000;
            sent.truncate(kept);
        }
        for side in 0..2 {
            let wait = self.rng.skewed(5 * US, 5 * MS);
            let at = (self.now + wait).max(self.conns[conn].last_at[1 - side]);
            self.queue.push(at, Event::Closed(conn, side));
        }
    }

    /// A process is gone: its ends are closed, and with `silent` nobody is told.
    pub(crate) fn drop_sessions(&mut self, id: NodeId, silent: bool) {
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                let end = self.conns[conn].ends[side];
                if end.node != id || end.closed {
                    continue;
                }
                if silent {
                    self.conns[conn].ends[side].closed = true;
                    self.conns[conn].ends[side].session = None;
                } else {
                    self.close_end(conn, side);
                }
            }
        }
    }
}

/// A message in few words.
fn brief(msg: &PeerMsg) -> String {
    match msg {
        PeerMsg::Config(c) => format!("Config epoch {} reign {}", c.epoch, c.reign),
        PeerMsg::Write { seq, blocks, durable, .. } => {
            format!(
                "Write {} of {}+{}{}",
                seq.0,
                blocks.start.0,
                blocks.count,
                if *durable { " durable" } else { "" }
            )
        }
        PeerMsg::Compare { id, blocks, .. } => format!("Compare {id} of {}+{}", blocks.start.0, blocks.count),
        PeerMsg::Copy { id, blocks, .. } => format!("Copy {id} of {}+{}", blocks.start.0, blocks.count),
        other => format!("{other:?}"),
    }
}
