//! Chunks: the pieces in which a resync compares and copies.
//!
//! A chunk holds the range lock of its blocks from before it reads them until the target has answered, so
//! that no client write comes between; what it copies is therefore the newest content [R21]. Blocks named
//! by an intent map are compared by hash first, and only those that differ travel; all-zero blocks travel
//! as a range.

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, NodeId};
use crate::wire::{Payload, PeerMsg};

use super::disk::Purpose;
use super::io::{Digest, DiskErrorKind, DiskOp, DiskResult, Event};
use super::primary::LockOwner;
use super::range_lock::LockId;
use super::resync::{Request, TargetPhase};
use super::{Replica, TICK};

/// Most blocks of one chunk: 256 KiB, what a client's write may have to wait for.
const CHUNK_BLOCKS: u64 = 64;

/// Names a chunk. Never reused: a read for an ended resync may complete during the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ChunkId(u64);

/// See the module's head.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Locked.
    range: BlockRange,
    lock: LockId,
    granted: bool,
    /// What of it is worked on.
    blocks: BlockRange,
    compare: bool,
    /// What was read to be compared, and whether all of it is zero.
    payload: Option<(Payload, bool)>,
    /// Copies not answered yet.
    left: usize,
}

impl Replica {
    /// Keeps full what may be in flight.
    pub(super) fn pump_chunks(&mut self, node: NodeId) {
        while self.chunk_may_begin(node) {
            let Some(range) = self.next_range(node) else { return };
            self.begin_chunk(node, range);
        }
    }

    /// Chunks in flight at most, whatever clients do.
    pub(super) fn chunk_window(&self) -> usize {
        let window = u64::from(self.settings().resync_window_bytes);
        let window = window / (CHUNK_BLOCKS * u64::from(self.geometry.block_size()));
        usize::try_from(window).unwrap_or(usize::MAX).max(1)
    }

    /// The window bounds what is in flight, and the clients' latency budget. Nobody is served before the members
    /// of a new reign are reconciled, so that one is not held back.
    fn chunk_may_begin(&self, node: NodeId) -> bool {
        let window = self.chunk_window();
        let Some(primary) = &self.primary else { return false };
        let Some(target) = primary.targets.get(&node) else { return false };
        let phase = matches!(target.phase, TargetPhase::Copying | TargetPhase::Draining);
        let limit = if target.member { window } else { primary.budget.limit(window) };
        let room = match limit {
            0 => target.chunks.is_empty() && target.chunk_begun.after(TICK) <= self.now,
            limit => target.chunks.len() < limit,
        };
        phase && room && self.now >= target.paused_until
    }

    /// The next run of blocks that the target lacks and that nobody brings it yet; goes round once.
    fn next_range(&mut self, node: NodeId) -> Option<BlockRange> {
        let target = self.primary.as_mut()?.targets.get_mut(&node)?;
        let bitmap = self.store.dirty(target.slot)?;
        let mut wrapped = false;
        let mut from = target.cursor;
        let start = loop {
            match bitmap.next_set(from) {
                Some(block) => {
                    let taken =
                        target.chunks.values().find(|c| c.range.contains(crate::types::BlockIndex(block)));
                    if let Some(chunk) = taken {
                        from = chunk.range.end();
                    } else if target.live.contains_key(&block) {
                        from = block + 1;
                    } else {
                        break block;
                    }
                }
                None if wrapped => return None,
                None => {
                    wrapped = true;
                    from = 0;
                }
            }
            if wrapped && from > target.cursor {
                return None;
            }
        };
        let limit = self.geometry.blocks().min(start + CHUNK_BLOCKS);
        let region = self.geometry.regions_of(BlockRange::between(start, start + 1)).next()?;
        let region_end = self.geometry.blocks_of_region(region).end();
        let mut end = start + 1;
        while end < limit.min(region_end) && bitmap.get(end) && !target.live.contains_key(&end) {
            end += 1;
        }
        if let Some(next) = target.chunks.values().map(|c| c.range.start.0).filter(|s| *s > start).min() {
            end = end.min(next);
        }
        target.cursor = end;
        target.rounds += u32::from(wrapped);
        Some(BlockRange::between(start, end))
    }

    fn begin_chunk(&mut self, node: NodeId, range: BlockRange) {
        let region = self.geometry.regions_of(range).next();
        let id = ChunkId(self.request_id());
        let Some(primary) = &mut self.primary else { return };
        let Some(target) = primary.targets.get_mut(&node) else { return };
        let locked = if mutated(Mutation::CopyOvertakesWrite) { BlockRange::default() } else { range };
        let (lock, granted) = primary.locks.acquire(locked, true, LockOwner::Chunk(node, id));
        let compare = region.is_some_and(|r| target.compares(r));
        let chunk = Chunk { range, lock, granted: false, blocks: range, compare, payload: None, left: 0 };
        target.chunks.insert(id, chunk);
        target.chunk_begun = self.now;
        if granted {
            self.chunk_granted(node, id);
        }
    }

    /// The lock is held: read what is still lacking.
    pub(super) fn chunk_granted(&mut self, node: NodeId, id: ChunkId) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let Some(bitmap) = self.store.dirty(target.slot) else { return };
        let Some(chunk) = target.chunks.get_mut(&id) else { return };
        chunk.granted = true;
        let start = bitmap.next_set(chunk.range.start.0).filter(|b| *b < chunk.range.end());
        let Some(start) = start else {
            return self.end_chunk(node, id); // a client's write brought all of it meanwhile
        };
        let end = bitmap.next_clear(start).unwrap_or(u64::MAX).min(chunk.range.end());
        chunk.blocks = BlockRange::between(start, end);
        let digest = if chunk.compare { Digest::Hashes } else { Digest::Checksum };
        let blocks = chunk.blocks;
        self.put_disk(DiskOp::Read { blocks, digest }, Purpose::Chunk(node, id), None);
    }

    pub(super) fn chunk_read(
        &mut self,
        node: NodeId,
        id: ChunkId,
        result: Result<DiskResult, DiskErrorKind>,
    ) {
        let Some((compare, blocks)) = self.chunk(node, id).map(|c| (c.compare, c.blocks)) else {
            return self.discard_read(result);
        };
        match result {
            Ok(DiskResult::Read { payload, hashes, all_zero }) if compare => {
                assert_eq!(hashes.len() as u64, blocks.count, "a hash per block");
                if let Some(chunk) = self.chunk(node, id) {
                    chunk.payload = Some((payload, all_zero));
                }
                let reign = self.reign();
                self.ask_target(node, id, blocks, |request| PeerMsg::Compare {
                    reign,
                    id: request,
                    blocks,
                    hashes,
                });
            }
            Ok(DiskResult::Read { payload, all_zero, .. }) => {
                if let Some(chunk) = self.chunk(node, id) {
                    chunk.left = 1;
                }
                self.copy(node, id, blocks, payload, all_zero);
                self.release(payload.buf);
            }
            Ok(other) => panic!("a read completed with {other:?}"),
            Err(kind) => self.chunk_unreadable(node, id, kind),
        }
    }

    /// A block of the source can't be read: leave its bit set, say so, have it mended from another member's
    /// copy [R20], try again later. A new primary would never serve then: it leaves the role to a member that
    /// can read its own.
    fn chunk_unreadable(&mut self, node: NodeId, id: ChunkId, kind: DiskErrorKind) {
        let Some(primary) = &self.primary else { return };
        if !primary.serving() {
            return self.fail(format!(
                "a block that has to be compared with the other members can't be read: {kind}; the role is handed \
                 over, mend the disk and restart the node, it will be resynced"
            ));
        }
        let until = self.now.after(std::time::Duration::from_secs(1));
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        (target.paused_until, target.unreadable) = (until, true);
        let Some(chunk) = target.chunks.get(&id) else { return };
        let blocks = chunk.blocks;
        let (first, last) = (blocks.start.0, blocks.end() - 1);
        let reason =
            format!("its resync waits: blocks {first} to {last} can't be read at the source ({kind})");
        self.event(Event::Refused { node, reason });
        self.end_chunk(node, id);
        self.mend(blocks);
    }

    fn chunk(&mut self, node: NodeId, id: ChunkId) -> Option<&mut Chunk> {
        self.primary.as_mut()?.targets.get_mut(&node)?.chunks.get_mut(&id)
    }

    fn ask_target(
        &mut self,
        node: NodeId,
        id: ChunkId,
        blocks: BlockRange,
        msg: impl FnOnce(u64) -> PeerMsg,
    ) {
        let Some(session) = self.reported_session(node) else { return };
        let (request, asked) = (self.request_id(), self.now);
        let msg = msg(request);
        if let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) {
            let compare = matches!(msg, PeerMsg::Compare { .. });
            target.requests.insert(request, Request { chunk: id, blocks, compare, asked });
        }
        self.send(session, msg);
    }

    fn copy(&mut self, node: NodeId, id: ChunkId, blocks: BlockRange, payload: Payload, all_zero: bool) {
        let reign = self.reign();
        if all_zero {
            self.ask_target(node, id, blocks, |request| PeerMsg::CopyZero { reign, id: request, blocks });
            return;
        }
        if let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) {
            target.progress.moved_bytes += u64::from(payload.len);
        }
        self.ask_target(node, id, blocks, |request| PeerMsg::Copy { reign, id: request, blocks, payload });
    }

    /// The target has compared: what is equal is done, what differs is copied.
    pub(super) fn compared(&mut self, node: NodeId, request: u64, differ: &[bool]) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let Some(Request { chunk: id, blocks, .. }) = target.answered(request, true) else { return };
        if blocks.count != differ.len() as u64 {
            return self.drop_target(node); // it does not speak our protocol; the session's report begins anew
        }
        let runs = runs_of(blocks, differ, true);
        for equal in runs_of(blocks, differ, false) {
            self.settled(node, equal);
        }
        let Some(chunk) = self.chunk(node, id) else { return };
        chunk.left = runs.len();
        let payload = chunk.payload.take();
        let whole = runs.as_slice() == [blocks];
        match payload {
            Some((payload, all_zero)) if whole => {
                self.copy(node, id, blocks, payload, all_zero);
                self.release(payload.buf);
            }
            payload => {
                if let Some((payload, _)) = payload {
                    self.release(payload.buf);
                }
                for run in &runs {
                    let op = DiskOp::Read { blocks: *run, digest: Digest::Checksum };
                    self.put_disk(op, Purpose::ChunkRun(node, id, *run), None);
                }
            }
        }
        if runs.is_empty() {
            self.end_chunk(node, id);
        }
    }

    pub(super) fn chunk_run_read(
        &mut self,
        node: NodeId,
        id: ChunkId,
        run: BlockRange,
        result: Result<DiskResult, DiskErrorKind>,
    ) {
        if self.chunk(node, id).is_none() {
            return self.discard_read(result);
        }
        match result {
            Ok(DiskResult::Read { payload, all_zero, .. }) => {
                self.copy(node, id, run, payload, all_zero);
                self.release(payload.buf);
            }
            Ok(other) => panic!("a read completed with {other:?}"),
            Err(kind) => self.chunk_unreadable(node, id, kind),
        }
    }

    /// The target has written a copy.
    pub(super) fn copied(&mut self, node: NodeId, request: u64) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let Some(Request { chunk: id, blocks, .. }) = target.answered(request, false) else { return };
        self.settled(node, blocks);
        let Some(chunk) = self.chunk(node, id) else { return };
        chunk.left -= 1;
        if chunk.left == 0 {
            self.end_chunk(node, id);
        }
    }

    /// The target holds the newest content of these blocks: the range lock kept it so.
    fn settled(&mut self, node: NodeId, blocks: BlockRange) {
        let block_size = u64::from(self.geometry.block_size());
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let older: Vec<u64> = target.live.range(blocks.start.0..blocks.end()).map(|(b, _)| *b).collect();
        for block in older {
            target.live.remove(&block);
        }
        target.progress.done_bytes += blocks.count * block_size;
        let slot = target.slot;
        if let Some(bitmap) = self.store.dirty_mut(slot) {
            bitmap.clear_range(blocks.start.0, blocks.count);
        }
    }

    fn end_chunk(&mut self, node: NodeId, id: ChunkId) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let Some(chunk) = target.chunks.remove(&id) else { return };
        target.requests.retain(|_, request| request.chunk != id);
        self.drop_chunk(chunk);
    }

    /// Gives up what a chunk holds. A copy of it that is still under way is ordered before whatever the
    /// target is sent next, on the same session.
    pub(super) fn drop_chunk(&mut self, chunk: Chunk) {
        if let Some((payload, _)) = chunk.payload {
            self.release(payload.buf);
        }
        let Some(primary) = &mut self.primary else { return };
        for owner in primary.locks.release(chunk.lock) {
            self.range_granted(owner);
        }
    }
}

/// The runs of blocks whose flag is `want`.
fn runs_of(blocks: BlockRange, flags: &[bool], want: bool) -> Vec<BlockRange> {
    let mut runs: Vec<BlockRange> = Vec::new();
    for (block, flag) in blocks.iter().zip(flags) {
        if *flag != want {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end() == block.0 => run.count += 1,
            _ => runs.push(BlockRange { start: block, count: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Both kinds of runs together cover the range; each is as long as it can be and holds its kind alone.
        #[test]
        fn runs_name_each_block_once_by_its_flag(
            start in 0u64..100, flags in prop::collection::vec(any::<bool>(), 0..70),
        ) {
            let blocks = BlockRange::between(start, start + flags.len() as u64);
            for want in [true, false] {
                let runs = runs_of(blocks, &flags, want);
                let named: Vec<u64> = runs.iter().flat_map(|run| run.iter().map(|b| b.0)).collect();
                let expected: Vec<u64> =
                    blocks.iter().zip(&flags).filter(|(_, f)| **f == want).map(|(b, _)| b.0).collect();
                prop_assert_eq!(named, expected);
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start.0), "{:?}", runs);
            }
        }
    }

    #[test]
    fn runs_split_a_range_by_its_flags() {
        let blocks = BlockRange::between(10, 15);
        let flags = [true, true, false, true, false];
        assert_eq!(runs_of(blocks, &flags, true), [BlockRange::between(10, 12), BlockRange::between(13, 14)]);
        assert_eq!(
            runs_of(blocks, &flags, false),
            [BlockRange::between(12, 13), BlockRange::between(14, 15)]
        );
    }
}
