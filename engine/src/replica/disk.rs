//! Disk operations in flight: what each was for, and the disk lock.
//!
//! The disk lock allows one write per block at a time in every role. It is taken before a write is put
//! out and given up only when the kernel's completion comes in, whatever sessions, reigns and roles did
//! in between [R7].

use std::time::Duration;

use crate::mutation::{Mutation, mutated};
use crate::rising_map::RisingMap;
use crate::types::{BlockRange, Nanos, NodeId};
use crate::wire::WriteSeq;

use super::Replica;
use super::chunk::ChunkId;
use super::follow::IncomingId;
use super::io::{DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskRequest, DiskResult, Output};
use super::meta_store::{MetaIo, MetaWrite};
use super::primary::OpId;
use super::range_lock::{LockId, RangeLocks};

/// Whose a disk lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskOwner {
    /// The primary's own part of a write.
    Local(WriteSeq),
    /// Something a secondary or target was sent.
    Incoming(IncomingId),
}

/// What an operation in flight was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Meta(MetaWrite),
    Flush,
    ClientRead(OpId),
    Extents(OpId),
    /// Read of what a repair is to mend: it may be readable.
    RepairRead(OpId),
    /// The `n`-th planned part of the request.
    ZeroBuffer(OpId, usize),
    FillEdges(OpId, usize),
    LocalWrite(WriteSeq),
    Incoming(IncomingId),
    /// Read of a whole chunk.
    Chunk(NodeId, ChunkId),
    /// Read of the blocks of a chunk that differ.
    ChunkRun(NodeId, ChunkId, BlockRange),
}

impl Purpose {
    /// Only a request's ordinary progress hangs on it.
    fn is_routine(self) -> bool {
        matches!(
            self,
            Self::Flush
                | Self::ClientRead(_)
                | Self::Extents(_)
                | Self::ZeroBuffer(..)
                | Self::FillEdges(..)
                | Self::LocalWrite(_)
                | Self::Incoming(_)
        )
    }
}

#[derive(Debug)]
struct InFlight {
    since: Nanos,
    purpose: Purpose,
    lock: Option<LockId>,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct DiskBook {
    next: u64,
    ops: RisingMap<DiskOpId, InFlight>,
    pub(super) locks: RangeLocks<DiskOwner>,
}

impl DiskBook {
    pub(super) fn new() -> Self {
        Self { next: 1, ops: RisingMap::new(), locks: RangeLocks::new() }
    }

    /// Enters the queue for the disk lock of `blocks`; true if it is granted at once [R7].
    pub(super) fn lock(&mut self, blocks: BlockRange, exclusive: bool, owner: DiskOwner) -> (LockId, bool) {
        self.locks.acquire(blocks, exclusive && !mutated(Mutation::R7), owner)
    }

    /// True if the kernel has nothing that was begun under a disk lock, and nobody waits for one [R7].
    pub(super) fn quiet(&self) -> bool {
        self.locks.is_empty() || mutated(Mutation::R7)
    }

    /// True if the operation longest in flight is older than `limit`.
    pub(super) fn overdue(&self, now: Nanos, limit: Duration) -> bool {
        self.ops.values().next().is_some_and(|op| now.since(op.since) > limit)
    }
}

impl Replica {
    /// Puts out a disk operation; `lock` is given up when it completes.
    pub(super) fn put_disk(&mut self, op: DiskOp, purpose: Purpose, lock: Option<LockId>) {
        let id = DiskOpId(self.disk.next);
        self.disk.next += 1;
        self.disk.ops.insert(id, InFlight { since: self.now, purpose, lock });
        self.out.push_back(Output::Disk(DiskRequest { id, op }));
    }

    pub(super) fn put_meta(&mut self, io: MetaIo) {
        let op = DiskOp::MetaWrite { offset: io.offset, bytes: io.bytes };
        self.put_disk(op, Purpose::Meta(io.what), None);
    }

    pub(super) fn pump_flusher(&mut self) {
        if self.failure.is_none() && self.flusher.poll_start() {
            self.put_disk(DiskOp::Flush, Purpose::Flush, None);
        }
    }

    /// Gives up a disk lock whose write was never put out.
    pub(super) fn drop_disk_lock(&mut self, lock: LockId) {
        for owner in self.disk.locks.release(lock) {
            self.disk_granted(owner);
        }
    }

    fn disk_granted(&mut self, owner: DiskOwner) {
        match owner {
            DiskOwner::Local(seq) => self.local_write_granted(seq),
            DiskOwner::Incoming(id) => self.incoming_granted(id),
        }
    }

    /// Routes a completion. The operation may outlive whoever asked for it; its lock ends here, its
    /// buffer is released if nobody wants it any more.
    pub(super) fn disk_done(&mut self, done: DiskDone) {
        let DiskDone { id, result } = done;
        let op = self.disk.ops.remove(&id).expect("a disk operation completes exactly once");
        self.news |= result.is_err() || !op.purpose.is_routine();
        // A failed replica acknowledges nothing more; its locks end all the same.
        self.route(op.purpose, result);
        if let Some(lock) = op.lock {
            self.drop_disk_lock(lock);
        }
    }

    fn route(&mut self, purpose: Purpose, result: Result<DiskResult, DiskErrorKind>) {
        match purpose {
            Purpose::Meta(what) => match result {
                Ok(_) => {
                    if let Some(next) = self.store.handle_done(what) {
                        self.put_meta(next);
                    }
                    self.intents_changed();
                }
                Err(kind) => self.fail(format!(
                    "writing metadata failed: {kind}; mend the disk (or free space) and restart the node"
                )),
            },
            Purpose::Flush => match result {
                Ok(_) => self.flusher.handle_done(),
                Err(_) if mutated(Mutation::IgnoreFlushError) => self.flusher.handle_done(),
                // Never retried: the kernel may have dropped what it could not write.
                Err(kind) => self.fail(format!(
                    "flushing the data failed: {kind}; what was unflushed may be gone: mend the disk and restart \
                     the node, it will be resynced"
                )),
            },
            Purpose::ClientRead(op) => self.client_read_done(op, result),
            Purpose::Extents(op) => self.extents_done(op, result),
            Purpose::RepairRead(op) => self.repair_read_done(op, result),
            Purpose::ZeroBuffer(op, part) => self.zero_buffer_done(op, part, result),
            Purpose::FillEdges(op, part) => self.edges_filled(op, part, result),
            Purpose::LocalWrite(seq) => self.local_write_done(seq, result),
            Purpose::Incoming(id) => self.incoming_done(id, result),
            // What a failed replica reads may be older than what it acknowledged: nobody gets a copy of it.
            Purpose::Chunk(..) | Purpose::ChunkRun(..) if self.failure.is_some() => self.discard_read(result),
            Purpose::Chunk(node, chunk) => self.chunk_read(node, chunk, result),
            Purpose::ChunkRun(node, chunk, run) => self.chunk_run_read(node, chunk, run, result),
        }
    }

    /// Releases what a read brought that nobody wants.
    pub(super) fn discard_read(&mut self, result: Result<DiskResult, DiskErrorKind>) {
        if let Ok(DiskResult::Read { payload, .. }) = result {
            self.release(payload.buf);
        }
    }
}
