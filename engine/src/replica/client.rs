//! Client requests from arrival to answer.
//!
//! Requests start in arrival order over all connections. An answer is a value that waits: it leaves only
//! while the lease is valid, in the reign in which the request started, with the superblock of the
//! config durable, judged at `now` read after the completion was reaped [R26, R27]. Without a lease
//! requests are held, never failed; when the reign ends they are dropped and their connections closed
//! [R23].

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, ByteRange};

use super::Replica;
use super::io::{ClientError, ClientOp, ClientRequest, ConnId, Cookie, Output, ReplyData};
use super::primary::{Held, LockOwner, Op, OpId, Primary, Stage};
use crate::wire::BufId;

/// Most requests that may have started and not been answered; later ones wait in the queue.
const STARTED_MAX: usize = 4096;

impl Replica {
    pub(super) fn client_request(&mut self, request: ClientRequest) {
        let id = OpId(self.request_id());
        let Some(primary) = &mut self.primary else {
            self.release_request(&request);
            self.out.push_back(Output::CloseClients("this node is not primary".into()));
            return;
        };
        let bytes = ByteRange { offset: request.offset, len: request.len };
        let blocks = if matches!(request.op, ClientOp::Flush) || request.len == 0 {
            BlockRange::default()
        } else if self.geometry.contains(bytes) {
            self.geometry.blocks_of(bytes)
        } else {
            self.release_request(&request);
            let (conn, cookie) = (request.conn, request.cookie);
            self.out.push_back(Output::Reply { conn, cookie, result: Err(ClientError::Invalid) });
            return;
        };
        primary.budget.asked(self.now);
        primary.enqueue(id, request, blocks, self.now);
    }

    /// What has not started is dropped; what has runs to its end, unanswered [R24].
    pub(super) fn client_closed(&mut self, conn: ConnId) {
        if mutated(Mutation::R24) {
            return;
        }
        let Some(primary) = &mut self.primary else { return };
        let queue = std::mem::take(&mut primary.queue);
        let mut dropped = Vec::new();
        for id in queue {
            if primary.ops[&id].request.conn == conn {
                dropped.extend(primary.ops.remove(&id));
            } else {
                primary.queue.push_back(id);
            }
        }
        for op in primary.ops.values_mut().filter(|op| op.request.conn == conn) {
            op.orphan = true;
        }
        let held = std::mem::take(&mut primary.held);
        let (gone, kept): (Vec<_>, Vec<_>) = held.into_iter().partition(|h| h.conn == conn);
        primary.held = kept.into();
        for op in dropped {
            self.release_request(&op.request);
        }
        for held in gone {
            self.release_held_buffer(&held);
        }
    }

    fn release_request(&mut self, request: &ClientRequest) {
        if let ClientOp::Write(payload) = request.op {
            self.release(payload.buf);
        }
    }

    /// Every buffer of a request, each once, but for the one that the answer carries.
    fn release_op_buffers(&mut self, op: &Op, kept: Option<BufId>) {
        for payload in op.plan.iter().filter_map(|p| p.payload).filter(|p| Some(p.buf) != kept) {
            self.release(payload.buf);
        }
        let saved = self.release_saved_plan(op);
        // Without a plan, its own or one that waits for a repair, the request still has its buffer.
        if op.plan.is_empty() && !saved {
            self.release_request(&op.request);
        }
    }

    fn release_held_buffer(&mut self, held: &Held) {
        if let Some(buf) = held.buf {
            self.release(buf);
        }
    }

    /// True if this replica serves at this moment.
    #[must_use]
    pub fn serving(&self) -> bool {
        self.can_start() && self.lease_valid()
    }

    /// True if this replica serves, or will once the superblock of a config that it follows already is on
    /// disk: requests wait that long [R16], but nobody need look for another primary.
    pub(super) fn in_service(&self) -> bool {
        self.may_serve() && self.config.is_some() && self.lease_valid()
    }

    fn can_start(&self) -> bool {
        self.may_serve() && self.config_usable()
    }

    fn may_serve(&self) -> bool {
        let held = |p: &Primary| !p.hold.is_none() && !mutated(Mutation::R18);
        self.primary.as_ref().is_some_and(|p| p.serving() && !held(p))
            && self.stop.is_no()
            && self.failure.is_none()
    }

    pub(super) fn pump_clients(&mut self) {
        if self.failure.is_some() {
            self.fail_requests_if_alone();
            return;
        }
        self.decide_repairs();
        while self.can_start() && self.lease_valid() {
            let Some(primary) = &mut self.primary else { return };
            if primary.started() >= STARTED_MAX {
                return;
            }
            let Some(id) = primary.queue.pop_front() else { return };
            self.start(id);
        }
    }

    /// A failed replica that is the whole set has nobody to hand over to: its clients get an error,
    /// instead of waiting for ever. Without a lease another replica may serve already, by force: then they get
    /// no answer, and look for it [R26].
    fn fail_requests_if_alone(&mut self) {
        let (alone, lease) = (self.is_only_member(), self.lease_valid() || mutated(Mutation::R26));
        let Some(primary) = &mut self.primary else { return };
        if !alone || (primary.ops.is_empty() && primary.held.is_empty()) {
            return;
        }
        if !lease {
            self.drop_requests();
            let reason = "this replica failed, and has no lease to say so";
            self.out.push_back(Output::CloseClients(reason.into()));
            return;
        }
        let ops: Vec<(ConnId, Cookie)> = primary
            .ops
            .values()
            .filter(|op| !op.orphan)
            .map(|op| (op.request.conn, op.request.cookie))
            .chain(primary.held.iter().map(|h| (h.conn, h.cookie)))
            .collect();
        self.drop_requests();
        for (conn, cookie) in ops {
            self.out.push_back(Output::Reply { conn, cookie, result: Err(ClientError::Io) });
        }
    }

    fn start(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a queued request exists");
        if op.request.len == 0 && !matches!(op.request.op, ClientOp::Flush) {
            self.finish(id, Ok(ReplyData::None));
            return;
        }
        if matches!(op.request.op, ClientOp::Flush) {
            op.stage = Stage::Flush;
            primary.flush_queue.push(id);
            return;
        }
        if matches!(op.request.op, ClientOp::Extents { .. }) {
            self.begin_extents(id);
            return;
        }
        let read = matches!(op.request.op, ClientOp::Read);
        let exclusive = read == mutated(Mutation::ReorderOverlapping);
        let blocks = if read && mutated(Mutation::R8) { BlockRange::default() } else { op.blocks };
        let (lock, granted) = primary.locks.acquire(blocks, exclusive, LockOwner::Op(id));
        if let Some(op) = primary.ops.get_mut(&id) {
            op.lock = Some(lock);
        }
        if granted {
            self.op_granted(id);
        }
    }

    pub(super) fn range_granted(&mut self, owner: LockOwner) {
        match owner {
            LockOwner::Op(id) => self.op_granted(id),
            LockOwner::Chunk(node, chunk) => self.chunk_granted(node, chunk),
        }
    }

    fn op_granted(&mut self, id: OpId) {
        // A request that is being thrown away may still be let in by one that was thrown away before it.
        let Some(op) = self.primary.as_ref().and_then(|p| p.ops.get(&id)) else { return };
        match (op.stage, op.request.op) {
            (Stage::Repair, _) => self.ask_for_repair(id),
            (_, ClientOp::Read) => self.begin_read(id),
            (_, ClientOp::Write(_) | ClientOp::Zero) => self.begin_write(id),
            (_, op @ (ClientOp::Flush | ClientOp::Extents { .. })) => {
                unreachable!("{op:?} takes no range lock")
            }
        }
    }

    /// Ends a request: gives its lock and buffers up and queues the answer. `result` of a read names
    /// the buffer, which then belongs to the answer.
    pub(super) fn finish(&mut self, id: OpId, result: Result<ReplyData, ClientError>) {
        let (now, budget) = (self.now, self.settings().resync_latency_budget);
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.remove(&id).expect("a request finishes once");
        assert!(!op.intent, "a request finished with its intent open");
        if !primary.targets.is_empty() && !op.orphan {
            primary.budget.answered(now.since(op.arrived), budget);
        }
        let acked_write = result.is_ok() && matches!(op.request.op, ClientOp::Write(_) | ClientOp::Zero);
        let let_in = op.lock.map(|lock| primary.locks.release(lock)).unwrap_or_default();
        let buf = match &result {
            Ok(ReplyData::Read { buf, .. }) => Some(*buf),
            _ => None,
        };
        let (conn, cookie) = (op.request.conn, op.request.cookie);
        let held = Held { conn, cookie, result, buf, acked_write };
        self.release_op_buffers(&op, buf);
        if op.orphan {
            self.release_held_buffer(&held);
        } else if let Some(primary) = &mut self.primary {
            primary.held.push_back(held);
        }
        for owner in let_in {
            self.range_granted(owner);
        }
    }

    /// True if an answer may leave at this moment [R26].
    pub(super) fn may_answer(&self) -> bool {
        let lease = self.lease_valid() || mutated(Mutation::R26);
        lease && self.config_usable() && self.failure.is_none()
    }

    /// Lets answers go whose condition holds now.
    pub(super) fn release_held(&mut self) {
        if !self.may_answer() {
            return;
        }
        // The state belongs to one reign, so every answer in it is of the reign in which it started.
        while let Some(held) = self.primary.as_mut().and_then(|p| p.held.pop_front()) {
            self.writes_acked += u64::from(held.acked_write);
            let buf = held.buf;
            let Held { conn, cookie, result, .. } = held;
            self.out.push_back(Output::Reply { conn, cookie, result });
            if let Some(buf) = buf {
                self.release(buf);
            }
        }
    }

    /// Throws every request away, unanswered: buffers are released, locks forgotten. Disk writes that the
    /// kernel has keep their disk lock [R7].
    pub(super) fn drop_requests(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        let ops = std::mem::take(&mut primary.ops);
        let parts = std::mem::take(&mut primary.parts);
        let held = std::mem::take(&mut primary.held);
        primary.queue.clear();
        primary.intent_queue.clear();
        primary.solo_queue.clear();
        primary.flush_queue.clear();
        if let Some(round) = &mut primary.round {
            round.ops.clear();
        }
        for part in parts.into_values().filter(|p| !p.local_issued) {
            self.drop_disk_lock(part.local_lock);
        }
        for op in ops.into_values() {
            if let Some(lock) = op.lock {
                self.drop_range_lock(lock);
            }
            if op.intent {
                self.intents.end(op.blocks, op.last_seq, false);
            }
            self.release_op_buffers(&op, None);
        }
        for held in held {
            self.release_held_buffer(&held);
        }
    }

    fn drop_range_lock(&mut self, lock: super::range_lock::LockId) {
        let Some(primary) = &mut self.primary else { return };
        for owner in primary.locks.release(lock) {
            // Requests are being thrown away; only resync copies may go on.
            if let LockOwner::Chunk(node, chunk) = owner {
                self.chunk_granted(node, chunk);
            }
        }
    }
}
