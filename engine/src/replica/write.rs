//! Writes on the primary (design section 5).
//!
//! The order is load-bearing: range lock; partial blocks completed; own intent durable; only then is the
//! write sent to all of the ack set and put on the own disk, both at once; it is committed when all of
//! them have committed it in their named incarnations.
//!
//! Whoever is not a named member is marked in the own dirty bitmaps before the write goes out, and the
//! write tells every receiver to do the same [R12]. While this replica is, or could be, the whole
//! committed set, a write is stable before it is acknowledged [R14].

use smallvec::{SmallVec, smallvec};

use crate::mutation::{Mutation, mutated};
use crate::types::{BlockRange, Durability, LogIndex, NodeId};
use crate::wire::{PeerMsg, WriteSeq};

use super::Replica;
use super::disk::{DiskOwner, Purpose};
use super::io::{ClientError, ClientOp, DiskErrorKind, DiskOp, DiskResult, ReplyData};
use super::node_set::NodeSet;
use super::primary::{OpId, Part, Plan, Planned, Stage};

impl Replica {
    /// The range lock is held: plan the parts.
    pub(super) fn begin_write(&mut self, id: OpId) {
        let block_size = u64::from(self.geometry.block_size());
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a granted request exists");
        let (start, end) = (op.request.offset, op.request.offset + op.request.len);
        op.stage = Stage::Fill;
        if let ClientOp::Write(payload) = op.request.op {
            let head = offset_in_block(start, block_size);
            let tail = offset_in_block(op.blocks.end() * block_size - end, block_size);
            op.plan = smallvec![Planned { blocks: op.blocks, payload: Some(payload), head, tail }];
        } else {
            op.plan = plan_zeroes(start, end, block_size);
        }
        op.left = op.plan.iter().filter(|p| p.is_partial()).count();
        if op.left == 0 {
            self.queue_for_intent(id);
            return;
        }
        for (n, planned) in op.plan.clone().into_iter().enumerate().filter(|(_, p)| p.is_partial()) {
            match planned.payload {
                Some(_) => self.fill_edges(id, n),
                None => {
                    let len = self.geometry.block_size();
                    self.put_disk(DiskOp::ZeroBuffer { len }, Purpose::ZeroBuffer(id, n), None);
                }
            }
        }
    }

    /// Reads what the client did not give of the first and the last block.
    pub(super) fn fill_edges(&mut self, id: OpId, n: usize) {
        let Some(primary) = &self.primary else { return };
        let Planned { blocks, payload, head, tail } = primary.ops[&id].plan[n];
        let buf = payload.expect("edges are filled of a part that has a buffer").buf;
        self.put_disk(DiskOp::FillEdges { buf, blocks, head, tail }, Purpose::FillEdges(id, n), None);
    }

    pub(super) fn zero_buffer_done(&mut self, id: OpId, n: usize, result: Result<DiskResult, DiskErrorKind>) {
        let op = self.primary.as_mut().and_then(|p| p.ops.get_mut(&id));
        let Some(op) = op else { return self.discard_read(result) };
        match result {
            Ok(DiskResult::Read { payload, .. }) => {
                op.plan[n].payload = Some(payload);
                self.fill_edges(id, n);
            }
            Ok(other) => panic!("a zero buffer completed with {other:?}"),
            Err(_) => self.part_failed(id, ClientError::Io),
        }
    }

    pub(super) fn edges_filled(&mut self, id: OpId, n: usize, result: Result<DiskResult, DiskErrorKind>) {
        let Some(op) = self.primary.as_mut().and_then(|p| p.ops.get_mut(&id)) else { return };
        match result {
            Ok(DiskResult::Filled { crc }) => {
                let payload = op.plan[n].payload.as_mut().expect("the part has a buffer");
                payload.crc = crc;
                op.left -= 1;
                if op.left == 0 {
                    self.fill_complete(id);
                }
            }
            Ok(other) => panic!("filling edges completed with {other:?}"),
            // The block under the edge can't be read: once the other edge is back it is mended from a
            // member's copy, then the write goes on [R20].
            Err(_) if mutated(Mutation::R20) => self.part_failed(id, ClientError::Io),
            Err(_) => {
                op.unfilled.push(n);
                op.left -= 1;
                if op.left == 0 {
                    self.fill_complete(id);
                }
            }
        }
    }

    fn part_failed(&mut self, id: OpId, error: ClientError) {
        let Some(op) = self.primary.as_mut().and_then(|p| p.ops.get_mut(&id)) else { return };
        op.error = Some(error);
        op.left -= 1;
        if op.left == 0 {
            self.fill_complete(id);
        }
    }

    fn fill_complete(&mut self, id: OpId) {
        let Some(op) = self.primary.as_mut().and_then(|p| p.ops.get_mut(&id)) else { return };
        let unfilled = std::mem::take(&mut op.unfilled);
        match (op.error, unfilled.first()) {
            (Some(error), _) => self.finish(id, Err(error)),
            (None, Some(part)) => self.begin_edge_repair(id, *part),
            (None, None) => self.queue_for_intent(id),
        }
    }

    /// Sets the intent of a request and launches it if that is durable, which it is in regions that are
    /// written to at the time. Otherwise the request waits.
    pub(super) fn queue_for_intent(&mut self, id: OpId) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(op) = primary.ops.get_mut(&id) {
            op.stage = Stage::Intent;
        }
        if self.set_intent(id) && self.may_launch() {
            self.launch(id);
        } else if let Some(primary) = &mut self.primary {
            primary.intent_queue.push_back(id);
        }
    }

    /// Sets what intents have room now, in order of arrival, and launches what is covered durably.
    pub(super) fn pump_intent_queue(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let Some(primary) = &mut self.primary else { return };
        primary.intent_full = false;
        let mut ready = Vec::new();
        for n in 0..primary.intent_queue.len() {
            let id = self.primary.as_ref().map(|p| p.intent_queue[n]);
            ready.extend(id.filter(|id| self.set_intent(*id)));
        }
        if ready.is_empty() || !self.may_launch() {
            return;
        }
        let Some(primary) = &mut self.primary else { return };
        // Both are in the order of arrival.
        let mut next = ready.iter().peekable();
        primary.intent_queue.retain(|id| next.next_if_eq(&id).is_none());
        for id in ready {
            self.launch(id);
        }
    }

    /// A failed replica sends nothing more: what it filled edges with may be older than what was acknowledged.
    fn may_launch(&self) -> bool {
        self.config_usable() && self.failure.is_none()
    }

    /// Sets the bits of a request's regions if they are not set yet, within the bound on set regions and not
    /// before those of an earlier request. True if they are durable.
    fn set_intent(&mut self, id: OpId) -> bool {
        let max = u64::from(self.settings().intent_regions_max);
        let Some(primary) = &mut self.primary else { return false };
        let op = primary.ops.get_mut(&id).expect("a request waiting for its intent exists");
        let (intents, store) = (&mut self.intents, &mut self.store);
        if !op.intent {
            primary.intent_full |= store.intent().count() >= max && intents.new_regions(store, op.blocks) > 0;
            primary.flush_wanted |= primary.intent_full;
            if primary.intent_full {
                return false;
            }
            intents.begin(store, op.blocks, self.now);
            op.intent = true;
        }
        intents.durable(store, op.blocks) || mutated(Mutation::SendBeforeIntent)
    }

    /// True if this replica is the whole committed set, or could be once a removal under way commits [R14].
    pub(super) fn may_be_alone(&self) -> bool {
        if mutated(Mutation::R14) {
            return false;
        }
        let Some(config) = &self.config else { return true };
        let leaving = self.primary.as_ref().and_then(|p| p.member_leaving());
        config.in_sync.iter().all(|m| *m == self.me || Some(*m) == leaving)
    }

    fn launch(&mut self, id: OpId) {
        let always = self.settings().durability == Durability::Always;
        let alone = self.may_be_alone();
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a request with its intent set exists");
        op.stage = Stage::Commit;
        op.left = op.plan.len();
        op.durable = op.request.fua || always || alone;
        let (plan, durable) = (op.plan.clone(), op.durable);
        // A repair writes here alone: the others have the content.
        let repair = op.repair.is_some();
        let waiting = if repair { NodeSet::default() } else { primary.acks.keys().copied().collect() };
        let mut launched: SmallVec<[_; 1]> = SmallVec::new();
        for planned in plan {
            let seq = primary.take_seq();
            let owner = DiskOwner::Local(seq);
            let (local_lock, granted) = self.disk.lock(planned.blocks, true, owner);
            let part = Part {
                op: id,
                blocks: planned.blocks,
                payload: planned.payload,
                durable,
                started: self.now,
                local_done: false,
                local_lock,
                local_issued: false,
                waiting,
            };
            primary.parts.insert(seq, part);
            launched.push((seq, granted, planned.blocks));
        }
        if let Some(op) = primary.ops.get_mut(&id) {
            op.last_seq = launched.last().map(|(seq, ..)| *seq);
        }
        for (seq, granted, blocks) in launched {
            if !repair {
                self.mark_missing(blocks);
                self.send_to_all(seq);
                if mutated(Mutation::ReorderOverlapping) {
                    self.send_older_again(seq);
                }
            }
            if granted {
                self.local_write_granted(seq);
            }
        }
    }

    /// Marks blocks for every replica that is not a named member [R12].
    pub(super) fn mark_missing(&mut self, blocks: BlockRange) {
        for slot in self.missing_slots().iter() {
            if let Some(bitmap) = self.store.dirty_mut(slot) {
                bitmap.set_range(blocks.start.0, blocks.count);
            }
        }
    }

    fn send_to_all(&mut self, seq: WriteSeq) {
        let Some(primary) = &self.primary else { return };
        let members: NodeSet =
            primary.acks.keys().copied().filter(|n| !primary.targets.contains_key(n)).collect();
        let targets: NodeSet = primary.targets.keys().copied().collect();
        for node in members.iter() {
            self.send_part(seq, node);
        }
        for node in targets.iter() {
            self.send_live(seq, node);
        }
    }

    /// Only for the mutation that reorders: the members get the older overlapping writes once more, last.
    fn send_older_again(&mut self, newer: WriteSeq) {
        let Some(primary) = &self.primary else { return };
        let blocks = primary.parts[&newer].blocks;
        let older: Vec<(WriteSeq, Vec<NodeId>)> = primary
            .parts
            .range(..newer)
            .filter(|(_, part)| part.blocks.overlaps(&blocks))
            .map(|(seq, part)| (seq, part.waiting.iter().collect()))
            .collect();
        for (seq, nodes) in older {
            for node in nodes {
                self.send_part(seq, node);
            }
        }
    }

    /// Sends a write in flight to a replica, if a session to the right incarnation follows this reign.
    /// If there is none it is sent when there is one (`resend_parts`).
    pub(super) fn send_part(&mut self, seq: WriteSeq, node: NodeId) -> bool {
        let Some(session) = self.reported_session(node) else { return false };
        let missing = self.missing_slots();
        let config = self.config.as_ref().map_or(LogIndex(0), |c| c.index);
        let Some(primary) = &self.primary else { return false };
        let part = &primary.parts[&seq];
        // A replica outside the ack set answers for resync alone: it need not be stable.
        let durable = part.durable && primary.acks.contains_key(&node);
        let (reign, blocks) = (primary.reign, part.blocks);
        let msg = match part.payload {
            Some(payload) => PeerMsg::Write { reign, seq, blocks, durable, missing, config, payload },
            None => PeerMsg::Zero { reign, seq, blocks, durable, missing, config },
        };
        self.send(session, msg);
        true
    }

    /// The disk lock of an own write is held: no other write to its blocks is in the kernel [R7].
    pub(super) fn local_write_granted(&mut self, seq: WriteSeq) {
        let Some(part) = self.primary.as_mut().and_then(|p| p.parts.get_mut(&seq)) else { return };
        part.local_issued = true;
        let (blocks, durable, lock) = (part.blocks, part.durable, part.local_lock);
        let op = match part.payload {
            Some(payload) => DiskOp::Write { blocks, buf: payload.buf, durable },
            None => DiskOp::Zero { blocks, durable },
        };
        self.put_disk(op, Purpose::LocalWrite(seq), Some(lock));
    }

    pub(super) fn local_write_done(&mut self, seq: WriteSeq, result: Result<DiskResult, DiskErrorKind>) {
        let alone = self.is_only_member();
        let Some(primary) = &mut self.primary else { return };
        let Some(part) = primary.parts.get_mut(&seq) else { return };
        match result {
            Ok(_) => part.local_done = true,
            Err(kind) if alone && primary.member_joining().is_none() => self.only_copy_failed(seq, kind),
            Err(kind) => {
                return self.fail(format!(
                    "writing data failed: {kind}; the role is handed over, mend the disk (or free space) and \
                     restart the node, it will be resynced"
                ));
            }
        }
        self.part_progress(seq);
    }

    /// The only member could not write, and nobody could take over: the client has to know. The block is
    /// not acknowledged, what it holds is open. A replica in resync may hold what is lacking here, and may
    /// have had its bit cleared for it: its resync begins anew, with the block in the set.
    fn only_copy_failed(&mut self, seq: WriteSeq, kind: DiskErrorKind) {
        self.drop_all_targets();
        let Some(primary) = &mut self.primary else { return };
        let Some(part) = primary.parts.get_mut(&seq) else { return };
        part.local_done = true;
        part.waiting.clear();
        let blocks = part.blocks;
        let error = match kind {
            DiskErrorKind::NoSpace => ClientError::NoSpace,
            DiskErrorKind::Io => ClientError::Io,
        };
        if let Some(op) = primary.ops.get_mut(&part.op) {
            op.error = Some(error);
        }
        self.mark_missing(blocks);
    }

    /// A replica has committed a write.
    pub(super) fn write_acked(&mut self, node: NodeId, seq: WriteSeq) {
        self.live_acked(node, seq);
        let Some(primary) = &mut self.primary else { return };
        let Some(part) = primary.parts.get_mut(&seq) else { return };
        if part.waiting.remove(node) {
            self.part_progress(seq);
        }
    }

    pub(super) fn part_progress(&mut self, seq: WriteSeq) {
        let Some(primary) = &mut self.primary else { return };
        let Some(part) = primary.parts.get(&seq) else { return };
        let others = part.waiting.is_empty() || mutated(Mutation::AckBeforeSecondary);
        if !part.local_done || !others {
            return;
        }
        let id = part.op;
        primary.parts.remove(&seq);
        let op = primary.ops.get_mut(&id).expect("the request of a write in flight exists");
        op.left -= 1;
        if op.left == 0 {
            self.committed(id);
        }
    }

    /// All parts are committed by all of the ack set.
    fn committed(&mut self, id: OpId) {
        let alone = self.may_be_alone();
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a committed request exists");
        op.intent = false;
        let (blocks, last, error, durable) = (op.blocks, op.last_seq, op.error, op.durable);
        let repair = op.repair.is_some();
        self.intents.end(blocks, last, false);
        if let Some(error) = error {
            self.finish(id, Err(error));
        } else if repair {
            self.repaired(id);
        } else if alone && !durable {
            // Sent when there were others, committed when there may be none: flush before the answer [R14].
            let ticket = self.flusher.request();
            let Some(primary) = &mut self.primary else { return };
            if let Some(op) = primary.ops.get_mut(&id) {
                op.stage = Stage::Solo(ticket);
            }
            primary.solo_queue.push(id);
        } else {
            self.finish(id, Ok(ReplyData::None));
        }
    }

    /// The ack set has changed: writes wait only for those in it.
    pub(super) fn retain_waiting(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        let acks = &primary.acks;
        let mut touched = Vec::new();
        for (seq, part) in primary.parts.iter_mut() {
            let before = part.waiting.len();
            part.waiting.retain(|node| acks.contains_key(&node));
            if part.waiting.len() != before {
                touched.push(seq);
            }
        }
        if let Some(round) = &mut primary.round {
            round.waiting.retain(|node| acks.contains_key(&node));
        }
        for seq in touched {
            self.part_progress(seq);
        }
    }

    /// A session to a member of the ack set is (again) ready: what it has not acknowledged goes out anew,
    /// under the same numbers. Overlapping writes cannot be among it, their range locks exclude them.
    pub(super) fn resend_parts(&mut self, node: NodeId) {
        let Some(primary) = &self.primary else { return };
        let seqs: Vec<WriteSeq> =
            primary.parts.iter().filter(|(_, p)| p.waiting.contains(node)).map(|(seq, _)| seq).collect();
        for seq in seqs {
            self.send_part(seq, node);
        }
        let Some(primary) = &self.primary else { return };
        if let Some(round) = primary.round.as_ref().filter(|r| r.waiting.contains(node)) {
            let (reign, id) = (primary.reign, round.id);
            if let Some(session) = self.reported_session(node) {
                self.send(session, PeerMsg::Flush { reign, id });
            }
        }
    }
}

fn offset_in_block(bytes: u64, block_size: u64) -> u32 {
    u32::try_from(bytes % block_size).expect("a remainder of the block size fits")
}

/// Whole blocks in the middle as zeroes, partial blocks at the ends as read-modify-write.
fn plan_zeroes(start: u64, end: u64, block_size: u64) -> Plan {
    let (first, last) = (start / block_size, (end - 1) / block_size);
    let whole_start = start.div_ceil(block_size);
    let whole_end = end / block_size;
    let block = |index| BlockRange::between(index, index + 1);
    let mut plan = Plan::new();
    let head = offset_in_block(start, block_size);
    let tail = offset_in_block((last + 1) * block_size - end, block_size);
    if first == last && (head > 0 || tail > 0) {
        return smallvec![Planned { blocks: block(first), payload: None, head, tail }];
    }
    if head > 0 {
        plan.push(Planned { blocks: block(first), payload: None, head, tail: 0 });
    }
    if whole_start < whole_end {
        let blocks = BlockRange::between(whole_start, whole_end);
        plan.push(Planned { blocks, payload: None, head: 0, tail: 0 });
    }
    if tail > 0 {
        plan.push(Planned { blocks: block(last), payload: None, head: 0, tail });
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The model is a byte for a byte: what the parts zero is what was asked for, blocks never overlap, and
        /// a block is filled from the disk only if a part of it is to stay.
        #[test]
        fn the_parts_of_a_zero_request_cover_its_bytes_exactly(start in 0u64..60, len in 1u64..60) {
            const BLOCK: u64 = 8;
            let end = start + len;
            let mut zeroed = [0u8; 128];
            let mut touched = [0u8; 16];
            for part in plan_zeroes(start, end, BLOCK) {
                let (head, tail) = (u64::from(part.head), u64::from(part.tail));
                prop_assert!(part.blocks.count == 1 || head == 0 && tail == 0, "{:?}", part);
                prop_assert!(head + tail < BLOCK);
                for byte in part.blocks.start.0 * BLOCK + head..part.blocks.end() * BLOCK - tail {
                    zeroed[usize::try_from(byte).unwrap()] += 1;
                }
                for block in part.blocks.iter() {
                    touched[usize::try_from(block.0).unwrap()] += 1;
                }
            }
            for (byte, times) in (0u64..).zip(zeroed) {
                prop_assert_eq!(times, u8::from((start..end).contains(&byte)), "byte {}", byte);
            }
            for (block, times) in (0u64..).zip(touched) {
                let expected = start < (block + 1) * BLOCK && block * BLOCK < end;
                prop_assert_eq!(times, u8::from(expected), "block {}", block);
            }
        }
    }

    fn shape(start: u64, end: u64) -> Vec<(u64, u64, u32, u32)> {
        plan_zeroes(start, end, 4096)
            .iter()
            .map(|p| (p.blocks.start.0, p.blocks.count, p.head, p.tail))
            .collect()
    }

    #[test]
    fn zeroes_are_split_into_partial_ends_and_whole_blocks() {
        assert_eq!(shape(0, 8192), [(0, 2, 0, 0)]);
        assert_eq!(shape(10, 20), [(0, 1, 10, 4076)]);
        assert_eq!(shape(4096, 5000), [(1, 1, 0, 3192)]);
        assert_eq!(shape(100, 12388), [(0, 1, 100, 0), (1, 2, 0, 0), (3, 1, 0, 3996)]);
        assert_eq!(shape(4000, 4200), [(0, 1, 4000, 0), (1, 1, 0, 3992)]);
    }
}
