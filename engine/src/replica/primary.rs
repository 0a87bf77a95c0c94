//! State of a replica while it is primary.
//!
//! The state lives and dies with one reign: a replica that finds itself in another reign throws it away,
//! closes the client connections unanswered [R23] and, if it is primary again, begins anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use smallvec::SmallVec;

use crate::rising_map::{RisingMap, rising};
use crate::types::{BlockRange, Incarnation, Nanos, NodeId, Proposal, Reign};
use crate::wire::{BufId, Payload, WriteSeq};

use super::budget::Budget;
use super::chunk::ChunkId;
use super::flusher::FlushTicket;
use super::hold::Hold;
use super::io::{ClientError, ClientRequest, ConnId, Cookie, ReplyData};
use super::membership::Removal;
use super::node_set::NodeSet;
use super::range_lock::{LockId, RangeLocks};
use super::resync::Target;

/// Names a client request inside the primary. Never reused, in later reigns neither: a read of an older
/// reign may complete in a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OpId(pub(super) u64);

rising!(OpId);

/// Whose a range lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockOwner {
    Op(OpId),
    Chunk(NodeId, ChunkId),
}

/// A part of a write: whole blocks with one content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) blocks: BlockRange,
    /// `None`: zeroes.
    pub(super) payload: Option<Payload>,
    /// Bytes at the front and at the end that the client did not give.
    pub(super) head: u32,
    pub(super) tail: u32,
}

impl Planned {
    /// The client did not give all of the first or the last block.
    pub(super) fn is_partial(&self) -> bool {
        self.head > 0 || self.tail > 0
    }
}

/// The parts of a write. Only zeroes have more than one.
pub(super) type Plan = SmallVec<[Planned; 1]>;

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Waits for its range lock (or has not started).
    Lock,
    /// Partial blocks are being completed.
    Fill,
    /// A read is on the disk.
    Read,
    /// Waits for room in the intent map or for its bits to be durable.
    Intent,
    /// Its parts are on their way.
    Commit,
    /// Committed; waits for a local flush because this replica is (or may be) the whole set [R14].
    Solo(FlushTicket),
    /// Waits for a flush of the ack set.
    Flush,
    /// A block could not be read here; see `read`.
    Repair,
}

/// A client request on its way.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) request: ClientRequest,
    pub(super) arrived: Nanos,
    pub(super) blocks: BlockRange,
    pub(super) stage: Stage,
    pub(super) lock: Option<LockId>,
    pub(super) plan: Plan,
    /// Parts not yet filled, or not yet committed.
    pub(super) left: usize,
    /// The intent map counts it as a write in flight.
    pub(super) intent: bool,
    /// Every write of it was ordered to be stable before it completes.
    pub(super) durable: bool,
    /// Last of its parts' numbers.
    pub(super) last_seq: Option<WriteSeq>,
    /// Its connection is gone; nobody waits for the reply.
    pub(super) orphan: bool,
    pub(super) repair: Option<super::read::Repair>,
    /// Parts whose edges could not be read; mended one after the other [R20].
    pub(super) unfilled: Vec<usize>,
    /// How many repairs were begun for it.
    pub(super) repairs: usize,
    pub(super) error: Option<ClientError>,
}

/// A replicated write in flight.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) op: OpId,
    pub(super) blocks: BlockRange,
    pub(super) payload: Option<Payload>,
    pub(super) durable: bool,
    pub(super) started: Nanos,
    pub(super) local_done: bool,
    pub(super) local_lock: LockId,
    pub(super) local_issued: bool,
    /// Members of the ack set that have not acknowledged.
    pub(super) waiting: NodeSet,
}

/// One flush of the whole ack set.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) id: u64,
    /// Every write up to here is committed when the round starts.
    pub(super) through: WriteSeq,
    pub(super) local: FlushTicket,
    pub(super) started: Nanos,
    pub(super) waiting: NodeSet,
    pub(super) ops: Vec<OpId>,
}

/// A finished answer that waits for its condition: lease valid, same reign, superblock durable.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) conn: ConnId,
    pub(super) cookie: Cookie,
    pub(super) result: Result<ReplyData, ClientError>,
    pub(super) buf: Option<BufId>,
    pub(super) acked_write: bool,
}

/// A proposal whose fate is not known.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) proposal: Proposal,
    /// When to put it out again, if its outcome was unknown.
    pub(super) again: Option<Nanos>,
}

/// How far the take-over is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Serves nothing yet [R11].
    TakingOver {
        since: Nanos,
        flush: Option<FlushTicket>,
        reconciled: BTreeSet<NodeId>,
    },
    Serving,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Primary {
    pub(super) reign: Reign,
    pub(super) phase: Phase,
    pub(super) hold: Hold,
    pub(super) ops: RisingMap<OpId, Op>,
    pub(super) queue: VecDeque<OpId>,
    pub(super) intent_queue: VecDeque<OpId>,
    /// A write waits for room in the intent map: later ones queue behind it.
    pub(super) intent_full: bool,
    pub(super) solo_queue: Vec<OpId>,
    pub(super) locks: RangeLocks<LockOwner>,
    pub(super) next_seq: WriteSeq,
    pub(super) parts: RisingMap<WriteSeq, Part>,
    pub(super) stable: Option<WriteSeq>,
    /// The ack set has not been told of it yet.
    pub(super) stable_untold: bool,
    pub(super) round: Option<Round>,
    pub(super) flush_queue: Vec<OpId>,
    /// Memory of an ended round, for the next one.
    pub(super) spare_queue: Vec<OpId>,
    pub(super) flush_wanted: bool,
    pub(super) held: VecDeque<Held>,
    /// Repairs that nobody can help wait until an answer may leave.
    pub(super) undecided: bool,
    /// Who must commit a write besides this replica: the other named members, and who is joining.
    pub(super) acks: BTreeMap<NodeId, Incarnation>,
    pub(super) targets: BTreeMap<NodeId, Target>,
    /// What resyncs may do at once.
    pub(super) budget: Budget,
    pub(super) removal: Option<Removal>,
    pub(super) pending: Option<Pending>,
    pub(super) retry_after: Nanos,
}

impl Primary {
    pub(super) fn new(reign: Reign, now: Nanos) -> Self {
        Self {
            reign,
            phase: Phase::TakingOver { since: now, flush: None, reconciled: BTreeSet::new() },
            hold: Hold::None,
            ops: RisingMap::new(),
            queue: VecDeque::new(),
            intent_queue: VecDeque::new(),
            intent_full: false,
            solo_queue: Vec::new(),
            locks: RangeLocks::new(),
            next_seq: WriteSeq(1),
            parts: RisingMap::new(),
            stable: None,
            stable_untold: false,
            round: None,
            flush_queue: Vec::new(),
            spare_queue: Vec::new(),
            flush_wanted: false,
            held: VecDeque::new(),
            undecided: false,
            acks: BTreeMap::new(),
            targets: BTreeMap::new(),
            budget: Budget::new(now),
            removal: None,
            pending: None,
            retry_after: Nanos(0),
        }
    }

    pub(super) fn serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// True while something else than requests is under way.
    pub(super) fn is_changing(&self) -> bool {
        !self.serving()
            || !self.hold.is_none()
            || !self.targets.is_empty()
            || self.removal.is_some()
            || self.pending.is_some()
    }

    /// Puts a request at the end of the queue.
    pub(super) fn enqueue(&mut self, id: OpId, request: ClientRequest, blocks: BlockRange, now: Nanos) {
        let op = Op {
            request,
            arrived: now,
            blocks,
            stage: Stage::Lock,
            lock: None,
            plan: Plan::new(),
            left: 0,
            intent: false,
            durable: false,
            last_seq: None,
            orphan: false,
            repair: None,
            unfilled: Vec::new(),
            repairs: 0,
            error: None,
        };
        self.ops.insert(id, op);
        self.queue.push_back(id);
    }

    /// Last number given out.
    pub(super) fn last_seq(&self) -> WriteSeq {
        WriteSeq(self.next_seq.0 - 1)
    }

    /// Every write up to this number is committed by the ack set.
    pub(super) fn committed_through(&self) -> WriteSeq {
        self.parts.keys().next().map_or(self.last_seq(), |first| WriteSeq(first.0 - 1))
    }

    pub(super) fn take_seq(&mut self) -> WriteSeq {
        let seq = self.next_seq;
        self.next_seq = WriteSeq(seq.0 + 1);
        seq
    }

    /// Requests that have started and are not answered.
    pub(super) fn started(&self) -> usize {
        self.ops.len() - self.queue.len()
    }
}
