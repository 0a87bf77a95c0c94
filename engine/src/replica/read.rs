//! Reads on the primary, and what happens when a block can't be read.
//!
//! A read shares the range lock with other reads and excludes writes until all of the ack set have
//! committed them: nobody sees a value that could still vanish [R8]. A block that can't be read here is
//! read from a member of the ack set, under the exclusive lock, rewritten here (intent first) and only
//! then answered [R20]. Where no member has all that can't be read here it is halved, down to single blocks:
//! each may be good on another disk.

use smallvec::smallvec;

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, Nanos, NodeId};
use crate::wire::{Payload, PeerMsg};

use super::Replica;
use super::disk::Purpose;
use super::io::{
    ClientError, ClientOp, ClientRequest, ConnId, Cookie, Digest, DiskErrorKind, DiskOp, DiskResult, Event,
    ReplyData,
};
use super::primary::{LockOwner, Op, OpId, Plan, Planned, Primary, Stage};

/// How often what was mended piece by piece is read again before the disk is given up.
const READ_AGAIN_MAX: usize = 3;

/// A repair under way.
#[derive(Debug)]
pub(super) struct Repair {
    /// What is mended now: first the blocks of the read, or the edges of the part that could not be filled.
    blocks: BlockRange,
    /// What comes after that, the next one last. It may be readable.
    later: Vec<BlockRange>,
    /// Who has not all of `blocks`.
    tried: Vec<NodeId>,
    /// What the last one tried was asked, and when.
    request: Option<(u64, Nanos)>,
    /// Nobody can be asked at the moment; whoever can be next will be.
    waiting: bool,
    /// The plan of a write whose edges could not be filled, to go on with; `None` for a read.
    resume: Option<Plan>,
}

impl Repair {
    fn new(blocks: BlockRange, resume: Option<Plan>) -> Self {
        Self { blocks, later: Vec::new(), tried: Vec::new(), request: None, waiting: false, resume }
    }

    /// Goes on with other blocks, which nobody was asked for.
    fn turn_to(&mut self, blocks: BlockRange) {
        self.blocks = blocks;
        self.tried.clear();
        self.request = None;
    }

    /// Goes on with the first half, the second comes later; false if there are no halves.
    fn halve(&mut self) -> bool {
        let (start, end) = (self.blocks.start.0, self.blocks.end());
        let middle = start + self.blocks.count / 2;
        if middle == start {
            return false;
        }
        self.later.push(BlockRange::between(middle, end));
        self.turn_to(BlockRange::between(start, middle));
        true
    }
}

impl Primary {
    /// Since when `node` owes an answer to a repair.
    pub(super) fn repair_asked(&self, node: NodeId) -> Option<Nanos> {
        let owed = |op: &Op| {
            let repair = op.repair.as_ref().filter(|r| r.tried.last() == Some(&node))?;
            repair.request.map(|(_, asked)| asked)
        };
        self.ops.values().filter(|op| op.stage == Stage::Repair).filter_map(owed).min()
    }
}

impl Replica {
    pub(super) fn begin_read(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a granted request exists");
        op.stage = Stage::Read;
        let blocks = op.blocks;
        self.put_disk(DiskOp::Read { blocks, digest: Digest::None }, Purpose::ClientRead(id), None);
    }

    /// Reads blocks for nobody: what can't be read here is then mended as it is for a client [R20]. Does
    /// nothing without another member, or while the same is under way.
    pub(super) fn mend(&mut self, blocks: BlockRange) {
        let id = OpId(self.request_id());
        let block_size = u64::from(self.geometry.block_size());
        let Some(primary) = &mut self.primary else { return };
        if primary.acks.is_empty() || primary.ops.values().any(|op| op.orphan && op.blocks == blocks) {
            return;
        }
        let request = ClientRequest {
            conn: ConnId(0),
            cookie: Cookie(0),
            op: ClientOp::Read,
            offset: blocks.start.0 * block_size,
            len: blocks.count * block_size,
            fua: false,
        };
        primary.enqueue(id, request, blocks, self.now);
        if let Some(op) = primary.ops.get_mut(&id) {
            op.orphan = true;
        }
    }

    pub(super) fn client_read_done(&mut self, id: OpId, result: Result<DiskResult, DiskErrorKind>) {
        let known = self.primary.as_ref().is_some_and(|p| p.ops.contains_key(&id));
        match result {
            result if !known => self.discard_read(result),
            Ok(DiskResult::Read { payload, all_zero, .. }) => self.answer_read(id, payload, all_zero),
            Ok(other) => panic!("a read completed with {other:?}"),
            Err(_) if mutated(Mutation::R20) => self.finish(id, Err(ClientError::Io)),
            Err(_) => self.begin_read_repair(id),
        }
    }

    fn answer_read(&mut self, id: OpId, payload: Payload, zero: bool) {
        let block_size = u64::from(self.geometry.block_size());
        let Some(primary) = &self.primary else { return };
        let request = &primary.ops[&id].request;
        let skip = u32::try_from(request.offset % block_size).expect("less than a block");
        let len = u32::try_from(request.len).expect("a request is no longer than a payload");
        assert!(skip + len <= payload.len, "a read brought less than was asked for");
        self.finish(id, Ok(ReplyData::Read { buf: payload.buf, skip, len, zero }));
    }

    /// Trades the shared lock for the exclusive one; what waits in between comes first.
    fn begin_read_repair(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("the request of a read exists");
        let blocks = op.blocks;
        if op.repairs > READ_AGAIN_MAX {
            return self.not_kept(id, Repair::new(blocks, None));
        }
        op.stage = Stage::Repair;
        op.repair = Some(Repair::new(blocks, None));
        let shared = op.lock.take().expect("a read holds its lock");
        let let_in = primary.locks.release(shared);
        let (lock, granted) = primary.locks.acquire(blocks, true, LockOwner::Op(id));
        if let Some(op) = primary.ops.get_mut(&id) {
            op.lock = Some(lock);
            if !granted {
                // What comes in between may mend the block by overwriting it: it is read once more.
                op.stage = Stage::Lock;
                op.repair = None;
            }
        }
        for owner in let_in {
            self.range_granted(owner);
        }
        if granted {
            self.ask_for_repair(id);
        }
    }

    /// An edge of part `n` of a partial write can't be read; the write already holds the exclusive lock.
    pub(super) fn begin_edge_repair(&mut self, id: OpId, n: usize) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("the request of a fill exists");
        let edges = edges(&op.plan[n]);
        op.repairs += 1;
        let hopeless = op.repairs > op.plan.len();
        let resume = Some(std::mem::take(&mut op.plan));
        let mut repair = Repair::new(edges[0], resume);
        repair.later.extend(edges.get(1));
        if hopeless {
            return self.not_kept(id, repair);
        }
        op.stage = Stage::Repair;
        op.repair = Some(repair);
        // With two edges it is not known which one is bad.
        if edges.len() > 1 { self.read_for_repair(id) } else { self.ask_for_repair(id) }
    }

    /// What was mended is unreadable again: this disk does not keep what it is given, which is no better than
    /// one that cannot be written. Another member has the content; the client is not told an error for it.
    fn not_kept(&mut self, id: OpId, repair: Repair) {
        let alone = self.is_only_member();
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("the request of a repair exists");
        op.stage = Stage::Repair;
        op.repair = Some(repair);
        if alone {
            return self.repair_impossible(id);
        }
        self.fail(
            "a block that was rewritten cannot be read again; the role is handed over, mend the disk and \
             restart the node, it will be resynced"
                .to_string(),
        );
    }

    /// Looks whether what is to be mended next needs it.
    fn read_for_repair(&mut self, id: OpId) {
        let Some(primary) = &self.primary else { return };
        let Some(repair) = &primary.ops[&id].repair else { return };
        let op = DiskOp::Read { blocks: repair.blocks, digest: Digest::None };
        self.put_disk(op, Purpose::RepairRead(id), None);
    }

    pub(super) fn repair_read_done(&mut self, id: OpId, result: Result<DiskResult, DiskErrorKind>) {
        let known = self.primary.as_ref().is_some_and(|p| p.ops.contains_key(&id));
        let readable = result.is_ok();
        self.discard_read(result);
        match (known && self.failure.is_none(), readable) {
            (false, _) => {}
            (true, true) => self.piece_mended(id),
            (true, false) => self.ask_for_repair(id),
        }
    }

    /// Asks the next member of the ack set that was not asked yet.
    pub(super) fn ask_for_repair(&mut self, id: OpId) {
        let Some(primary) = &self.primary else { return };
        let op = &primary.ops[&id];
        let Some(repair) = &op.repair else { return };
        let (blocks, tried) = (repair.blocks, &repair.tried);
        let candidates: Vec<NodeId> = primary.acks.keys().copied().filter(|n| !tried.contains(n)).collect();
        let next = candidates.iter().find_map(|n| self.reported_session(*n).map(|s| (*n, s)));
        let Some((node, session)) = next else {
            // A member that is not connected has a good copy: it comes back, or is removed.
            return if candidates.is_empty() { self.nobody_has_all(id) } else { self.repair_waits(id) };
        };
        let (request, now, reign) = (self.request_id(), self.now, self.reign());
        let Some(primary) = &mut self.primary else { return };
        if let Some(repair) = primary.ops.get_mut(&id).and_then(|op| op.repair.as_mut()) {
            repair.tried.push(node);
            repair.request = Some((request, now));
        }
        self.send(session, PeerMsg::ReadRequest { reign, id: request, blocks });
    }

    fn repair_waits(&mut self, id: OpId) {
        let op = self.primary.as_mut().and_then(|p| p.ops.get_mut(&id));
        if let Some(repair) = op.and_then(|op| op.repair.as_mut()) {
            repair.request = None;
            repair.waiting = true;
        }
    }

    /// Somebody may be asked who could not before, or whoever was asked has left the ack set.
    pub(super) fn ask_for_waiting_repairs(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        let acks = &primary.acks;
        let left = |r: &Repair| r.request.is_some() && r.tried.last().is_some_and(|n| !acks.contains_key(n));
        let mut ids = Vec::new();
        for (id, op) in primary.ops.iter_mut().filter(|(_, op)| op.stage == Stage::Repair) {
            if let Some(repair) = op.repair.as_mut().filter(|r| r.waiting || left(r)) {
                repair.waiting = false;
                repair.request = None;
                ids.push(id);
            }
        }
        for id in ids {
            self.ask_for_repair(id);
        }
    }

    /// No member has all of the blocks, but one may have some of them, and this disk or another member the rest.
    fn nobody_has_all(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let alone = primary.acks.is_empty();
        let repair = primary.ops.get_mut(&id).and_then(|op| op.repair.as_mut());
        if !alone && repair.is_some_and(Repair::halve) {
            return self.read_for_repair(id);
        }
        self.repair_impossible(id);
    }

    /// Nobody has the blocks. The client is told so at once or not yet: what can't leave now is not decided
    /// now, for a member that has the blocks may join, and while the request keeps its lock no write that
    /// comes after it can mend them before the client hears that they can't be read.
    fn repair_impossible(&mut self, id: OpId) {
        if !self.may_answer() {
            if let Some(primary) = &mut self.primary {
                primary.undecided = true;
            }
            return self.repair_waits(id);
        }
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("the request of a repair exists");
        if let Some(plan) = op.repair.take().and_then(|r| r.resume) {
            op.plan = plan;
        }
        self.finish(id, Err(ClientError::Io));
    }

    /// Decides what could not be decided while no answer could leave.
    pub(super) fn decide_repairs(&mut self) {
        if !self.may_answer() {
            return;
        }
        let Some(primary) = &mut self.primary else { return };
        if std::mem::take(&mut primary.undecided) {
            self.ask_for_waiting_repairs();
        }
    }

    /// A member answered a repair's read.
    pub(super) fn repair_answered(&mut self, request: u64, payload: Option<Payload>) {
        let found = self.primary.as_mut().and_then(|p| {
            p.ops.iter_mut().find(|(_, op)| {
                op.stage == Stage::Repair
                    && op.repair.as_ref().is_some_and(|r| r.request.is_some_and(|(id, _)| id == request))
            })
        });
        let Some((id, op)) = found else {
            if let Some(payload) = payload {
                self.release(payload.buf);
            }
            return;
        };
        let blocks = op.repair.as_ref().map_or(op.blocks, |r| r.blocks);
        match payload {
            Some(payload)
                if u64::from(payload.len) == blocks.count * u64::from(self.geometry.block_size()) =>
            {
                op.plan = smallvec![Planned { blocks, payload: Some(payload), head: 0, tail: 0 }];
                self.queue_for_intent(id);
            }
            Some(payload) => {
                self.release(payload.buf);
                self.ask_for_repair(id);
            }
            None => self.ask_for_repair(id),
        }
    }

    /// A member that was asked is gone: ask another, or wait.
    pub(super) fn retry_repairs(&mut self, gone: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let mut ids = Vec::new();
        for (id, op) in primary.ops.iter_mut().filter(|(_, op)| op.stage == Stage::Repair) {
            let asked = |r: &&mut Repair| r.request.is_some() && r.tried.last() == Some(&gone);
            if let Some(repair) = op.repair.as_mut().filter(asked) {
                // It did not answer; it may be asked again when it is back.
                repair.tried.pop();
                repair.request = None;
                ids.push(id);
            }
        }
        for id in ids {
            self.ask_for_repair(id);
        }
    }

    /// The blocks are rewritten here: a read that was for nothing else is answered with what was written.
    pub(super) fn repaired(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a repaired request exists");
        let payload = op.plan[0].payload.expect("a repair has content");
        let repair = op.repair.as_ref().expect("a repair is under way");
        let blocks = repair.blocks;
        let whole = repair.resume.is_none() && blocks == op.blocks;
        if whole {
            op.repair = None;
        } else {
            op.stage = Stage::Repair;
            op.plan.clear();
        }
        self.event(Event::Repaired { blocks });
        if whole {
            return self.answer_read(id, payload, false);
        }
        self.release(payload.buf);
        self.piece_mended(id);
    }

    /// On to the next piece; after the last one the read is read again, or the write goes on.
    fn piece_mended(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a repaired request exists");
        let repair = op.repair.as_mut().expect("a repair is under way");
        if let Some(next) = repair.later.pop() {
            repair.turn_to(next);
            return self.read_for_repair(id);
        }
        if let Some(plan) = op.repair.take().and_then(|r| r.resume) {
            return self.resume_write(id, plan);
        }
        op.repairs += 1;
        self.begin_read(id);
    }

    fn resume_write(&mut self, id: OpId, plan: Plan) {
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a repaired request exists");
        op.plan = plan;
        op.stage = Stage::Fill;
        let partial: Vec<usize> = (0..op.plan.len())
            .filter(|n| op.plan[*n].is_partial() && op.plan[*n].payload.is_some())
            .collect();
        op.left = partial.len();
        for n in partial {
            self.fill_edges(id, n);
        }
    }

    /// Buffers of a write that waits for a repair; false if it does not.
    pub(super) fn release_saved_plan(&mut self, op: &Op) -> bool {
        let Some(plan) = op.repair.as_ref().and_then(|r| r.resume.as_ref()) else { return false };
        for payload in plan.iter().filter_map(|p| p.payload) {
            self.release(payload.buf);
        }
        debug_assert!(matches!(op.request.op, ClientOp::Write(_) | ClientOp::Zero));
        true
    }
}

/// The blocks of a part that are completed from the disk.
fn edges(part: &Planned) -> Vec<BlockRange> {
    let block = |index| BlockRange::between(index, index + 1);
    let (first, last) = (part.blocks.start.0, part.blocks.end() - 1);
    let mut edges = Vec::new();
    if part.head > 0 || first == last {
        edges.push(block(first));
    }
    if part.tail > 0 && first != last {
        edges.push(block(last));
    }
    edges
}
