//! Disk requests from issue to completion, with what goes wrong in between.

use blkrepl_engine::replica::{
    Digest, DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskRequest, DiskResult, Stretch,
};
use blkrepl_engine::types::{BlockIndex, BlockRange, NodeId};
use blkrepl_engine::wire::Payload;

use crate::clock::{Time, US};
use crate::content::{ROT, SECTOR, SECTORS, Tags, at, crc, hashes};
use crate::disk::Disk;
use crate::node::Pending;
use crate::outcome::Invariant;
use crate::world::{NodeEvent, World};

fn written(op: &DiskOp) -> Option<BlockRange> {
    match op {
        DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. } => Some(*blocks),
        _ => None,
    }
}

impl World {
    fn disk_latency(&mut self, id: NodeId, op: &DiskOp) -> Time {
        let max = self.shape.disk_max;
        let base = match op {
            DiskOp::ZeroBuffer { .. } => return US,
            DiskOp::Flush => self.rng.skewed(50 * US, max * 3),
            DiskOp::MetaWrite { .. } => self.rng.skewed(30 * US, max * 2),
            _ => self.rng.skewed(15 * US, max),
        };
        let now = self.now;
        let defects = &self.node_ref(id).disk.defects;
        let slow = if now < defects.slow_until { base * defects.slow_factor } else { base };
        slow + defects.hang_until.saturating_sub(now)
    }

    pub(crate) fn disk_starts(&mut self, id: NodeId, request: DiskRequest) {
        if let Some(blocks) = written(&request.op) {
            let pending = &self.node_ref(id).pending;
            let other = pending.iter().find(|p| written(&p.request.op).is_some_and(|b| b.overlaps(&blocks)));
            if let Some(other) = other {
                let text =
                    format!("{id} has two disk writes on one block: {:?} and {request:?}", other.request);
                return self.broke(Invariant::OneDiskWrite, text);
            }
            if !self.node_ref(id).disk.intends(blocks) {
                let text = format!("{id} writes {blocks:?}, which its intent map does not durably name");
                return self.broke(Invariant::IntentFirst, text);
            }
        }
        let latency = self.disk_latency(id, &request.op);
        let n = self.node(id);
        let (mut tags, mut snapshot) = (None, None);
        match &request.op {
            DiskOp::Write { buf, .. } => {
                n.retain(*buf);
                tags = Some(n.tags(*buf));
            }
            DiskOp::FillEdges { buf, .. } => n.retain(*buf),
            DiskOp::Flush => snapshot = Some(n.disk.snapshot()),
            _ => {}
        }
        let op = request.id;
        n.pending.push(Pending { request, tags, snapshot });
        self.at_node(latency, id, NodeEvent::Disk(op));
    }

    pub(crate) fn disk_done(&mut self, id: NodeId, op: DiskOpId) {
        let Some(pending) = self.node(id).take_pending(op) else { return };
        self.trace.mix(&[8, id.0, op.0]);
        let result = self.carry_out(id, &pending);
        let n = self.node(id);
        if let DiskOp::Write { buf, .. } | DiskOp::FillEdges { buf, .. } = &pending.request.op {
            n.release(*buf);
        }
        let failed = result.is_err();
        if failed && self.trace.is_readable() {
            self.note(id, format_args!("disk: {:?} fails: {result:?}", pending.request.op));
        }
        self.input(id, |r, now| r.handle_disk(now, DiskDone { id: op, result }));
        if failed {
            self.report(id);
        }
    }

    fn carry_out(&mut self, id: NodeId, pending: &Pending) -> Result<DiskResult, DiskErrorKind> {
        match &pending.request.op {
            DiskOp::Read { blocks, digest } => {
                let n = self.node(id);
                if !n.disk.is_readable(*blocks) {
                    return Err(DiskErrorKind::Io);
                }
                let tags = Tags::new(n.disk.read(*blocks));
                let all_zero = tags.iter().all(|t| *t == 0);
                let hashes = if *digest == Digest::Hashes { hashes(&tags) } else { Vec::new() };
                let payload = n.new_buf(tags);
                let payload = if *digest == Digest::None { Payload { crc: 0, ..payload } } else { payload };
                Ok(DiskResult::Read { payload, all_zero, hashes })
            }
            DiskOp::FillEdges { buf, blocks, head, tail } => self.fill(id, *buf, *blocks, (*head, *tail)),
            DiskOp::ZeroBuffer { len } => {
                let tags = Tags::new(vec![0; at(u64::from(*len) / SECTOR)]);
                let payload = self.node(id).new_buf(tags);
                Ok(DiskResult::Read { payload, all_zero: true, hashes: Vec::new() })
            }
            DiskOp::Write { blocks, durable, .. } | DiskOp::Zero { blocks, durable } => {
                self.write_data(id, *blocks, pending.tags.as_ref().map(|t| t.as_slice()), *durable)
            }
            DiskOp::Extents { blocks, .. } => {
                let disk = &self.node(id).disk;
                let tags = disk.read(*blocks);
                let zero = tags.chunks(at(SECTORS)).map(|block| block.iter().all(|t| *t == 0));
                // What is bad takes space.
                let good = blocks.iter().map(|start| disk.is_readable(BlockRange { start, count: 1 }));
                let holes: Vec<bool> = zero.zip(good).map(|(zero, good)| zero && good).collect();
                let runs = holes.chunk_by(|a, b| a == b);
                let found = runs.map(|run| Stretch { count: run.len() as u64, hole: run[0] }).collect();
                Ok(DiskResult::Extents(found))
            }
            DiskOp::Flush => self.flush(id, pending),
            DiskOp::MetaWrite { offset, bytes } => {
                let now = self.now;
                let n = self.node(id);
                if n.disk.defects.full_until > now {
                    return Err(DiskErrorKind::NoSpace);
                }
                n.disk.write_meta(*offset, bytes);
                if Disk::is_superblock(*offset) {
                    n.superblocks = n.disk.superblocks();
                }
                Ok(DiskResult::Done)
            }
        }
    }

    fn fill(
        &mut self,
        id: NodeId,
        buf: blkrepl_engine::wire::BufId,
        blocks: BlockRange,
        (head, tail): (u32, u32),
    ) -> Result<DiskResult, DiskErrorKind> {
        let sectors = |bytes: u32| u64::from(bytes) / SECTOR;
        let (head, tail) = (sectors(head), sectors(tail));
        let n = self.node(id);
        let single = |b: BlockIndex| BlockRange { start: b, count: 1 };
        let (first, last) = (blocks.start, BlockIndex(blocks.end() - 1));
        if (head > 0 && !n.disk.is_readable(single(first))) || (tail > 0 && !n.disk.is_readable(single(last)))
        {
            return Err(DiskErrorKind::Io);
        }
        let (begin, end) = (blocks.start.0 * SECTORS, blocks.end() * SECTORS);
        let front: Vec<u64> = (begin..begin + head).map(|s| n.disk.seen(s)).collect();
        let back: Vec<u64> = (end - tail..end).map(|s| n.disk.seen(s)).collect();
        let tags = n.tags_mut(buf);
        let len = tags.len();
        tags[..front.len()].copy_from_slice(&front);
        tags[len - back.len()..].copy_from_slice(&back);
        Ok(DiskResult::Filled { crc: crc(tags) })
    }

    fn write_data(
        &mut self,
        id: NodeId,
        blocks: BlockRange,
        tags: Option<&[u64]>,
        durable: bool,
    ) -> Result<DiskResult, DiskErrorKind> {
        let now = self.now;
        let mut rng = self.rng.fork();
        let total = self.shape.geometry.blocks();
        let disk = &mut self.node(id).disk;
        if disk.defects.full_until > now && rng.chance(700) {
            disk.write_some(blocks, tags, durable, &mut rng);
            return Err(DiskErrorKind::NoSpace);
        }
        if disk.defects.write_errors > 0 {
            disk.defects.write_errors -= 1;
            disk.write_some(blocks, tags, durable, &mut rng);
            return Err(DiskErrorKind::Io);
        }
        if disk.defects.lost_writes > 0 {
            disk.defects.lost_writes -= 1;
            disk.lose_write(blocks, durable);
        } else if disk.defects.misdirected > 0 && blocks.count * 2 <= total {
            disk.defects.misdirected -= 1;
            let to = rng.below(total - blocks.count + 1);
            if BlockRange::between(to, to + blocks.count).overlaps(&blocks) {
                disk.lose_write(blocks, durable);
            } else {
                disk.misdirect(blocks, to, tags, durable);
            }
        } else {
            disk.write(blocks, tags, durable);
        }
        debug_assert!(tags.is_none_or(|t| t.iter().all(|t| *t != u64::MAX >> 1 || t & ROT != 0)));
        Ok(DiskResult::Done)
    }

    fn flush(&mut self, id: NodeId, pending: &Pending) -> Result<DiskResult, DiskErrorKind> {
        let mut rng = self.rng.fork();
        let n = self.node(id);
        if n.disk.defects.flush_errors > 0 {
            n.disk.defects.flush_errors -= 1;
            // The kernel may have dropped what it could not write.
            n.disk.lose_cache(&mut rng);
            n.lost_boot = n.incarnation.boot;
            self.copies_changed();
            return Err(DiskErrorKind::Io);
        }
        if let Some(snapshot) = &pending.snapshot {
            n.disk.flushed(snapshot);
        }
        Ok(DiskResult::Done)
    }
}
