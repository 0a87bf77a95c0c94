//! The clients: several, each with one connection at a time and several requests in flight on it.
//!
//! A client looks for the node that serves, as those of NBD do, and asks. When its connection is over, what
//! was open on it is of unknown fate: reads and flushes are forgotten, writes are done again on the next
//! connection, as new operations, before anything else.

use std::collections::VecDeque;

use blkrepl_engine::mutation::{Mutation, mutated};
use blkrepl_engine::replica::{ClientError, ClientInput, ClientOp, ClientRequest, ConnId, Cookie, ReplyData};
use blkrepl_engine::types::NodeId;

use crate::clock::{MS, Time, US};
use crate::content::{SECTOR, SECTORS, Tags, at};
use crate::history::OpKind;
use crate::outcome::Invariant;
use crate::rng::Rng;
use crate::world::{Event, Life, NodeEvent, Stage, World};

/// Something that happens at a client.
#[derive(Debug)]
pub(crate) enum ClientEvent {
    /// Look for the node that serves.
    Connect,
    /// Ask for more.
    Ask,
    /// An answer is there. `released`: when the node let it go.
    Answer { conn: u64, op: usize, released: Time, result: Result<Vec<u64>, ClientError> },
    /// The connection is over.
    Closed { conn: u64 },
}

/// A connection as its client sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) node: NodeId,
    pub(crate) life: Life,
    pub(crate) conn: ConnId,
    /// Counts the connections of the client.
    pub(crate) number: u64,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) connection: Option<Connection>,
    next_number: u64,
    next_node: u64,
    data: u64,
    pub(crate) open: Vec<usize>,
    again: VecDeque<usize>,
    sent_at: Time,
    /// When the last answer of this connection is due; answers keep their order.
    pub(crate) answer_at: Time,
    asking: bool,
}

impl Client {
    pub(crate) fn new(data: u64, rng: &mut Rng) -> Self {
        Self {
            connection: None,
            next_number: 1,
            next_node: rng.below(data),
            data,
            open: Vec::new(),
            again: VecDeque::new(),
            sent_at: 0,
            answer_at: 0,
            asking: false,
        }
    }

    /// True if it waits for nothing and has nothing to do again.
    pub(crate) fn is_done(&self) -> bool {
        self.open.is_empty() && self.again.is_empty()
    }
}

/// One request about to be made.
struct Wish {
    kind: OpKind,
    first: u64,
    count: u64,
    fua: bool,
    again: Option<usize>,
}

impl World {
    pub(crate) fn start_clients(&mut self) {
        for client in 0..self.clients.len() {
            let wait = self.rng.skewed(US, 20 * MS);
            self.schedule(wait, Event::Client(client, ClientEvent::Connect));
        }
    }

    pub(crate) fn handle_client(&mut self, client: usize, event: ClientEvent) {
        match event {
            ClientEvent::Connect => self.connect(client),
            ClientEvent::Ask => self.ask_more(client),
            ClientEvent::Answer { conn, op, released, result } => {
                if self.clients[client].connection.is_some_and(|c| c.number == conn) {
                    self.client_answered(client, op, released, result);
                }
            }
            ClientEvent::Closed { conn } => {
                if self.clients[client].connection.is_some_and(|c| c.number == conn) {
                    self.connection_over(client);
                }
            }
        }
    }

    fn connect(&mut self, client: usize) {
        if self.clients[client].connection.is_some() {
            return;
        }
        let c = &mut self.clients[client];
        let id = NodeId(1 + c.next_node % c.data);
        c.next_node += 1;
        let n = self.node_ref(id);
        if n.paused_until > self.now || !n.serves() {
            let wait = self.rng.skewed(2 * MS, 50 * MS);
            return self.schedule(wait, Event::Client(client, ClientEvent::Connect));
        }
        // Its older connections there have ended before: their end was sent first [R24].
        let older: Vec<ConnId> =
            n.clients.iter().filter(|(_, whose)| **whose == client).map(|(conn, _)| *conn).collect();
        for conn in older.into_iter().filter(|_| !mutated(Mutation::R24)) {
            self.node(id).clients.remove(&conn);
            self.input(id, |r, now| r.handle_client(now, ClientInput::Closed(conn)));
        }
        let n = self.node(id);
        if !n.is_up() {
            return;
        }
        let conn = ConnId(n.next_conn);
        n.next_conn += 1;
        n.clients.insert(conn, client);
        let life = n.life();
        let c = &mut self.clients[client];
        // It will be there again.
        c.next_node = id.0 - 1;
        let number = c.next_number;
        c.next_number += 1;
        c.connection = Some(Connection { node: id, life, conn, number });
        (c.sent_at, c.answer_at) = (self.now, self.now);
        self.note(format!("client {client}"), format_args!("is connected to {id}"));
        self.ask_soon(client, US);
    }

    fn ask_soon(&mut self, client: usize, after: Time) {
        if !std::mem::replace(&mut self.clients[client].asking, true) {
            self.schedule(after, Event::Client(client, ClientEvent::Ask));
        }
    }

    fn ask_more(&mut self, client: usize) {
        self.clients[client].asking = false;
        if self.clients[client].connection.is_none() {
            return;
        }
        let burst = self.rng.between(1, self.shape.burst_max);
        for _ in 0..burst {
            if self.clients[client].open.len() >= 16 {
                break;
            }
            let Some(wish) = self.wish(client) else { break };
            self.ask(client, &wish);
        }
        if !matches!(self.stage, Stage::Ending { .. }) || !self.clients[client].again.is_empty() {
            let pause = self.shape.pause;
            // Short pauses let requests of one client overlap, long ones let everything settle.
            let wait = if self.rng.chance(30) {
                self.rng.between(0, pause * 12)
            } else {
                self.rng.between(0, pause)
            };
            self.ask_soon(client, wait.max(10 * US));
        }
    }

    fn wish(&mut self, client: usize) -> Option<Wish> {
        if let Some(op) = self.clients[client].again.pop_front() {
            let o = self.history.op(op);
            let (kind, first, count, fua) = (o.kind, o.first, o.count, o.fua);
            return Some(Wish { kind, first, count, fua, again: Some(op) });
        }
        if matches!(self.stage, Stage::Ending { .. }) {
            return None;
        }
        let shape = &self.shape;
        let (reads, flushes, partial, hot) = (shape.reads, shape.flushes, shape.partial, shape.hot_blocks);
        let blocks = shape.geometry.blocks();
        let rng = &mut self.rng;
        if rng.chance(flushes) {
            return Some(Wish { kind: OpKind::Flush, first: 0, count: 0, fua: false, again: None });
        }
        let block = if rng.chance(600) { rng.below(hot.min(blocks)) } else { rng.below(blocks) };
        let len = if rng.chance(800) { 1 } else { rng.between(1, 8) }.min(blocks - block);
        let (mut first, mut count) = (block * SECTORS, len * SECTORS);
        if rng.chance(partial) {
            let skip = rng.below(SECTORS);
            first += skip;
            count = rng.between(1, count - skip);
        }
        let kind = match rng.below(1000) {
            n if n < reads => OpKind::Read,
            n if n > 930 => OpKind::Zero,
            _ => OpKind::Write,
        };
        let fua = kind != OpKind::Read && rng.chance(80);
        Some(Wish { kind, first, count, fua, again: None })
    }

    fn ask(&mut self, client: usize, wish: &Wish) {
        let Some(Connection { node, life, conn, .. }) = self.clients[client].connection else { return };
        let who = u8::try_from(client).expect("few clients");
        let op = self.history.ask(who, wish.kind, (wish.first, wish.count), wish.fua, self.now, wish.again);
        let delay = self.rng.skewed(5 * US, self.shape.net_max);
        let c = &mut self.clients[client];
        c.open.push(op);
        c.sent_at = c.sent_at.max(self.now + delay);
        let at = c.sent_at;
        self.queue.push(at, Event::Node(node, life, NodeEvent::Request(conn, op)));
        if self.trace.is_readable() {
            self.note(
                format!("client {client}"),
                format_args!(
                    "asks {op}: {:?} {}+{}{}",
                    wish.kind,
                    wish.first,
                    wish.count,
                    if wish.fua { " fua" } else { "" }
                ),
            );
        }
    }

    /// The node reads nothing of the client's connection before `until`.
    pub(crate) fn leaves_unread(&mut self, client: usize, until: Time) {
        let c = &mut self.clients[client];
        c.sent_at = c.sent_at.max(until);
    }

    /// A request reaches the node.
    pub(crate) fn request_arrives(&mut self, id: NodeId, conn: ConnId, op: usize) {
        let tags = {
            let o = self.history.op(op);
            (o.kind == OpKind::Write).then(|| padded(o.first, self.history.tags(op)))
        };
        let o = self.history.op(op);
        let (kind, first, count, fua) = (o.kind, o.first, o.count, o.fua);
        let n = self.node(id);
        if !n.clients.contains_key(&conn) || n.replica.is_none() {
            return;
        }
        let client_op = match (kind, tags) {
            (OpKind::Write, Some(tags)) => ClientOp::Write(n.new_buf(Tags::new(tags))),
            (OpKind::Zero, _) => ClientOp::Zero,
            (OpKind::Flush, _) => ClientOp::Flush,
            _ if asks_for_extents(op) => ClientOp::Extents { max: 1 + op % 3 },
            _ => ClientOp::Read,
        };
        let request = ClientRequest {
            conn,
            cookie: Cookie(op as u64),
            op: client_op,
            offset: first * SECTOR,
            len: count * SECTOR,
            fua,
        };
        self.trace.mix(&[3, id.0, op as u64]);
        self.input(id, |r, now| r.handle_client(now, ClientInput::Request(request)));
    }

    /// The node lets an answer go.
    pub(crate) fn answer_leaves(
        &mut self,
        id: NodeId,
        conn: ConnId,
        cookie: Cookie,
        result: Result<ReplyData, ClientError>,
    ) {
        let op = at(cookie.0);
        let Some(client) = self.node_ref(id).clients.get(&conn).copied() else { return };
        let values = match result {
            Ok(ReplyData::Read { buf, skip, len, .. }) => {
                let tags = self.node_ref(id).tags(buf);
                let skip = at(u64::from(skip) / SECTOR);
                Ok(tags[skip..skip + at(u64::from(len) / SECTOR)].to_vec())
            }
            Ok(ReplyData::Extents(extents)) => {
                let len = self.history.op(op).count;
                let hole = extents.first().is_some_and(|e| e.hole && e.len == len * SECTOR);
                Ok(if hole { vec![0; at(len)] } else { Vec::new() })
            }
            Ok(ReplyData::None) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        self.trace.mix(&[4, id.0, op as u64, values.as_ref().map_or(1, |v| v.iter().fold(2, |a, b| a ^ b))]);
        self.check_answer(id, op, &values);
        let delay = self.rng.skewed(5 * US, self.shape.net_max);
        let Some(number) = self.clients[client].connection.filter(|c| c.conn == conn && c.node == id) else {
            return;
        };
        let c = &mut self.clients[client];
        c.answer_at = c.answer_at.max(self.now + delay);
        let (at, released) = (c.answer_at, self.now);
        let event = ClientEvent::Answer { conn: number.number, op, released, result: values };
        self.queue.push(at, Event::Client(client, event));
    }

    fn client_answered(
        &mut self,
        client: usize,
        op: usize,
        released: Time,
        result: Result<Vec<u64>, ClientError>,
    ) {
        let open = &mut self.clients[client].open;
        let Some(n) = open.iter().position(|o| *o == op) else {
            return self.broke(Invariant::Answered, format!("operation {op} is answered twice"));
        };
        open.swap_remove(n);
        if self.trace.is_readable() {
            let what = match &result {
                Ok(values) if values.is_empty() => "done".to_string(),
                Ok(values) => format!("reads {}", self.history.describe(values[0])),
                Err(error) => format!("fails: {error:?}"),
            };
            self.note(format!("client {client}"), format_args!("{op} {what}"));
        }
        let kind = self.history.op(op).kind;
        match result {
            Ok(values) => {
                self.stats.answered += 1;
                self.stats.flushes += u64::from(kind == OpKind::Flush);
                if kind == OpKind::Read && values.is_empty() {
                    // It was told that there is data, but not what.
                    self.history.given_up(op);
                } else {
                    self.history.answered(op, released, values);
                }
            }
            // What a failed write left behind is open; the client does it again.
            Err(_) => {
                self.fate_unknown(client, op);
                self.ask_soon(client, MS);
            }
        }
    }

    fn fate_unknown(&mut self, client: usize, op: usize) {
        self.stats.unknown += 1;
        match self.history.op(op).kind {
            OpKind::Write | OpKind::Zero => self.clients[client].again.push_back(op),
            OpKind::Read | OpKind::Flush => self.history.given_up(op),
        }
    }

    /// The connection of a client is over, as the client sees it.
    pub(crate) fn connection_over(&mut self, client: usize) {
        self.clients[client].connection = None;
        let mut open = std::mem::take(&mut self.clients[client].open);
        open.sort_unstable();
        for op in open {
            self.fate_unknown(client, op);
        }
        self.note(format!("client {client}"), format_args!("has lost its connection"));
        let wait = self.rng.skewed(MS, 30 * MS);
        self.schedule(wait, Event::Client(client, ClientEvent::Connect));
    }

    /// A node closes a client's connection, or dies; the client hears of it some time.
    pub(crate) fn tell_closed(&mut self, id: NodeId, conn: ConnId, client: usize, late: Time) {
        let Some(connection) = self.clients[client].connection else { return };
        if connection.conn == conn && connection.node == id {
            let at = self.clients[client].answer_at.max(self.now + late);
            let event = ClientEvent::Closed { conn: connection.number };
            self.queue.push(at, Event::Client(client, event));
        }
    }
}

/// Some reads are requests for the block status: where all is a hole, zeroes were read.
fn asks_for_extents(op: usize) -> bool {
    op % 8 == 3
}

/// Tags of whole blocks for a write of sectors: what the client did not give is filled from the disk.
fn padded(first: u64, tags: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut out = vec![u64::MAX >> 1; at(first % SECTORS)];
    out.extend(tags);
    out.resize(out.len().next_multiple_of(at(SECTORS)), u64::MAX >> 1);
    out
}
