//! The secondary's side (and a resync target's): carrying out what the primary sends.
//!
//! - Only the named primary of the present reign is obeyed; whoever else sends is told the config known
//!   here, so that an old primary learns that it is one.
//! - A write marks the missing replicas, makes the own intent durable, waits for the disk lock, is written,
//!   then acknowledged [R7, R12].
//! - A new session, or a new reign, first discards what the old one had not begun; what the kernel has runs
//!   to its end under its disk lock before the new reign is confirmed [R7, R11].

use std::collections::VecDeque;

use crate::mutation::{Mutation, mutated};
use crate::rising_map::{RisingMap, rising};
use crate::types::{BlockRange, LogIndex, Member, NodeId, Reign, SlotSet};
use crate::wire::{BlockHash, Payload, PeerMsg, PeerReport, Run, RunsKind, SessionId, WriteSeq};

use super::Replica;
use super::disk::{DiskOwner, Purpose};
use super::flusher::FlushTicket;
use super::io::{Digest, DiskErrorKind, DiskOp, DiskResult, Output};
use super::join::{Asked, Joining};
use super::range_lock::LockId;

/// Most runs in one message.
const RUNS_PER_MSG: usize = 32_768;

/// Names something a peer asked for; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IncomingId(u64);

rising!(IncomingId);

/// What a peer asked for.
#[derive(Debug)]
enum Work {
    Write { seq: WriteSeq, payload: Option<Payload>, durable: bool },
    Copy { id: u64, payload: Option<Payload> },
    Compare { id: u64, hashes: Vec<BlockHash> },
    Read { id: u64 },
}

impl Work {
    fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Copy { .. })
    }
}

#[derive(Debug)]
struct Incoming {
    session: SessionId,
    reign: Reign,
    blocks: BlockRange,
    work: Work,
    lock: LockId,
    granted: bool,
    started: bool,
}

/// State of following a primary.
#[derive(Debug, Default)]
pub(super) struct Following {
    next: u64,
    incoming: RisingMap<IncomingId, Incoming>,
    /// A take-over to confirm as soon as the disk is quiet.
    takeover: Option<(SessionId, Reign)>,
    /// The session and reign that were confirmed.
    pub(super) confirmed: Option<(SessionId, Reign)>,
    /// Acknowledgements that wait for the superblock of the config.
    answers: VecDeque<(SessionId, Reign, PeerMsg)>,
    flushes: VecDeque<(SessionId, Reign, u64, FlushTicket)>,
    /// Writes of this reign that are stable on all of the ack set.
    pub(super) stable: Option<WriteSeq>,
    pub(super) joining: Joining,
}

impl Following {
    pub(super) fn is_idle(&self) -> bool {
        self.incoming.is_empty()
    }
}

impl Replica {
    /// True if `node` on this session is the named primary of `reign`, and that is the present one.
    pub(super) fn obeys(&self, node: NodeId, reign: Reign) -> bool {
        let Some(config) = &self.config else { return false };
        self.primary.is_none()
            && reign == config.reign
            && config.primary.is_some_and(|p| self.speaks_for(node, p))
    }

    /// True if the session to `node` is one to this very member [R2].
    fn speaks_for(&self, node: NodeId, member: Member) -> bool {
        let of = self.session_member(node);
        of == Some(member) || (mutated(Mutation::R2) && of.is_some_and(|m| m.node == member.node))
    }

    pub(super) fn follow_msg(&mut self, session: SessionId, node: NodeId, msg: PeerMsg) {
        let reign = match &msg {
            PeerMsg::Takeover { reign }
            | PeerMsg::Write { reign, .. }
            | PeerMsg::Zero { reign, .. }
            | PeerMsg::Flush { reign, .. }
            | PeerMsg::Stable { reign, .. }
            | PeerMsg::ResyncStart { reign, .. }
            | PeerMsg::Compare { reign, .. }
            | PeerMsg::Copy { reign, .. }
            | PeerMsg::CopyZero { reign, .. }
            | PeerMsg::JoinFlush { reign, .. }
            | PeerMsg::ReadRequest { reign, .. } => *reign,
            _ => return self.release_msg(msg),
        };
        if !self.obeys(node, reign) || self.failure.is_some() {
            self.release_msg(msg);
            if let Some(config) = self.config.clone().filter(|c| c.reign > reign) {
                self.send(session, PeerMsg::Config(Box::new(config)));
            }
            return;
        }
        if self.stop.is_closing() {
            return self.release_msg(msg); // flushed, about to be marked clean: as good as gone
        }
        if let PeerMsg::Takeover { .. } = msg {
            self.following.takeover = Some((session, reign));
            self.following.confirmed = None;
            self.discard_all_incoming();
            return;
        }
        if self.following.confirmed != Some((session, reign)) {
            return self.release_msg(msg); // sent before the report was asked for: the primary sends it again
        }
        if !self.is_sound(&msg) {
            let reason = "a message names blocks outside the volume or a payload of the wrong length";
            self.release_msg(msg);
            self.out.push_back(Output::CloseSession(session, reason.into()));
            return;
        }
        self.obey(session, reign, msg);
    }

    /// Bounds that the wire can't check, not knowing the volume.
    fn is_sound(&self, msg: &PeerMsg) -> bool {
        let bytes = |count: u64| count * u64::from(self.geometry.block_size());
        match msg {
            PeerMsg::Write { blocks, payload, .. } | PeerMsg::Copy { blocks, payload, .. } => {
                self.geometry.contains_blocks(*blocks) && bytes(blocks.count) == u64::from(payload.len)
            }
            PeerMsg::Zero { blocks, .. } | PeerMsg::CopyZero { blocks, .. } => {
                self.geometry.contains_blocks(*blocks)
            }
            PeerMsg::ReadRequest { blocks, .. } => {
                self.geometry.contains_blocks(*blocks)
                    && bytes(blocks.count) <= u64::from(crate::wire::PAYLOAD_BYTES_MAX)
            }
            PeerMsg::Compare { blocks, hashes, .. } => {
                self.geometry.contains_blocks(*blocks)
                    && blocks.count == hashes.len() as u64
                    && bytes(blocks.count) <= u64::from(crate::wire::PAYLOAD_BYTES_MAX)
            }
            _ => true,
        }
    }

    fn obey(&mut self, session: SessionId, reign: Reign, msg: PeerMsg) {
        match msg {
            PeerMsg::Write { seq, blocks, durable, missing, config, payload, .. } => {
                self.mark_for(blocks, missing, config);
                let work = Work::Write { seq, payload: Some(payload), durable };
                self.incoming(session, reign, blocks, work);
            }
            PeerMsg::Zero { seq, blocks, durable, missing, config, .. } => {
                self.mark_for(blocks, missing, config);
                self.incoming(session, reign, blocks, Work::Write { seq, payload: None, durable });
            }
            PeerMsg::Copy { id, blocks, payload, .. } => {
                self.incoming(session, reign, blocks, Work::Copy { id, payload: Some(payload) });
            }
            PeerMsg::CopyZero { id, blocks, .. } => {
                self.incoming(session, reign, blocks, Work::Copy { id, payload: None });
            }
            PeerMsg::Compare { id, blocks, hashes, .. } => {
                self.incoming(session, reign, blocks, Work::Compare { id, hashes });
            }
            PeerMsg::ReadRequest { id, .. } if !self.holds_the_content() => {
                self.send(session, PeerMsg::ReadReply { reign, id, payload: None });
            }
            PeerMsg::ReadRequest { id, blocks, .. } => {
                self.incoming(session, reign, blocks, Work::Read { id });
            }
            PeerMsg::Flush { id, .. } => {
                let ticket = self.flusher.request();
                self.following.flushes.push_back((session, reign, id, ticket));
            }
            PeerMsg::Stable { through, drain, .. } => {
                self.following.stable = self.following.stable.max(Some(through));
                self.clear_intents(drain);
            }
            PeerMsg::ResyncStart { epoch, send_foreign, everything, .. } => {
                self.resync_asked(Asked { session, reign, epoch, send_foreign, everything });
            }
            PeerMsg::JoinFlush { id, through, .. } => self.join_flush_asked(session, reign, id, through),
            other => self.release_msg(other),
        }
    }

    /// Marks the replicas that the primary says are missing; what the own, newer config says is missing is
    /// marked, too: marking more costs a comparison, marking less a block [R12].
    fn mark_for(&mut self, blocks: BlockRange, missing: SlotSet, config: LogIndex) {
        if mutated(Mutation::R12) {
            return;
        }
        let newer = if self.config_index() > config { self.missing_slots() } else { SlotSet::default() };
        for slot in missing.union(newer).iter().filter(|slot| *slot != self.slot) {
            if let Some(bitmap) = self.store.dirty_mut(slot) {
                bitmap.set_range(blocks.start.0, blocks.count);
            }
        }
    }

    fn incoming(&mut self, session: SessionId, reign: Reign, blocks: BlockRange, work: Work) {
        let id = IncomingId(self.following.next);
        self.following.next += 1;
        let exclusive = work.writes();
        // Queued for the disk lock on arrival, so that overlapping ones keep their order.
        let (lock, granted) = self.disk.lock(blocks, exclusive, DiskOwner::Incoming(id));
        if exclusive {
            self.intents.begin(&mut self.store, blocks, self.now);
        }
        let incoming = Incoming { session, reign, blocks, work, lock, granted, started: false };
        self.following.incoming.insert(id, incoming);
        self.try_start(id);
    }

    pub(super) fn incoming_granted(&mut self, id: IncomingId) {
        if let Some(incoming) = self.following.incoming.get_mut(&id) {
            incoming.granted = true;
            self.try_start(id);
        }
    }

    /// Bits of the intent map or the superblock may have become durable: begin what waited for them.
    pub(super) fn intents_changed(&mut self) {
        let waiting: Vec<_> =
            self.following.incoming.iter().filter(|(_, i)| !i.started).map(|(id, _)| id).collect();
        for id in waiting {
            self.try_start(id);
        }
    }

    fn try_start(&mut self, id: IncomingId) {
        let superblock = self.config_durable();
        let Some(incoming) = self.following.incoming.get_mut(&id) else { return };
        let covered = !incoming.work.writes() || self.intents.durable(&self.store, incoming.blocks);
        if incoming.started || !incoming.granted || !covered || !superblock {
            return;
        }
        incoming.started = true;
        let (blocks, lock) = (incoming.blocks, incoming.lock);
        let op = match &incoming.work {
            Work::Write { payload: Some(p), durable, .. } => {
                DiskOp::Write { blocks, buf: p.buf, durable: *durable }
            }
            Work::Write { payload: None, durable, .. } => DiskOp::Zero { blocks, durable: *durable },
            Work::Copy { payload: Some(p), .. } => DiskOp::Write { blocks, buf: p.buf, durable: false },
            Work::Copy { payload: None, .. } => DiskOp::Zero { blocks, durable: false },
            Work::Compare { .. } => DiskOp::Read { blocks, digest: Digest::Hashes },
            Work::Read { .. } => DiskOp::Read { blocks, digest: Digest::Checksum },
        };
        self.put_disk(op, Purpose::Incoming(id), Some(lock));
    }

    pub(super) fn incoming_done(&mut self, id: IncomingId, result: Result<DiskResult, DiskErrorKind>) {
        let incoming = self.following.incoming.remove(&id).expect("something begun stays until it completes");
        let Incoming { session, reign, blocks, work, .. } = incoming;
        let same_reign = reign == self.reign();
        let outside = !self.is_member();
        let answer = match work {
            Work::Write { seq, payload, .. } => {
                self.intents.end(blocks, same_reign.then_some(seq), outside);
                self.release_payload(payload);
                match result {
                    Ok(_) => PeerMsg::WriteAck { reign, seq },
                    Err(kind) => return self.incoming_failed(kind),
                }
            }
            Work::Copy { id, payload } => {
                self.intents.end(blocks, None, outside);
                self.release_payload(payload);
                match result {
                    Ok(_) => PeerMsg::CopyAck { reign, id },
                    Err(kind) => return self.incoming_failed(kind),
                }
            }
            Work::Compare { id, hashes } => {
                // What can't be read here differs: it gets a good copy.
                let differ = match &result {
                    Ok(DiskResult::Read { hashes: mine, .. }) => {
                        hashes.iter().zip(mine).map(|(a, b)| a != b).collect()
                    }
                    _ => vec![true; hashes.len()],
                };
                self.discard_read(result);
                PeerMsg::CompareResult { reign, id, differ }
            }
            Work::Read { id } => {
                return self.read_for_repair_done(session, reign, id, result);
            }
        };
        self.following.answers.push_back((session, reign, answer));
    }

    fn incoming_failed(&mut self, kind: DiskErrorKind) {
        self.fail(format!(
            "writing data failed: {kind}; this replica is taken out, mend the disk (or free space) and restart the \
             node, it will be resynced"
        ));
    }

    fn read_for_repair_done(
        &mut self,
        session: SessionId,
        reign: Reign,
        id: u64,
        result: Result<DiskResult, DiskErrorKind>,
    ) {
        let payload = match result {
            // What a failed replica holds may be older than what it acknowledged.
            result if self.failure.is_some() => {
                self.discard_read(result);
                None
            }
            Ok(DiskResult::Read { payload, .. }) => Some(payload),
            _ => None,
        };
        if self.following.confirmed == Some((session, reign)) {
            self.send(session, PeerMsg::ReadReply { reign, id, payload });
        }
        self.release_payload(payload);
    }

    fn release_payload(&mut self, payload: Option<Payload>) {
        if let Some(payload) = payload {
            self.release(payload.buf);
        }
    }

    /// True unless this copy was made anew while its run was about to join: the primary asks that run for what it
    /// cannot read itself, and would take a blank block for the content [R10, R20].
    fn holds_the_content(&self) -> bool {
        self.belongs || self.store.superblock().inconsistent.is_some()
    }

    /// A session is over: what came by it and has not begun is discarded.
    pub(super) fn discard_incoming(&mut self, session: SessionId) {
        self.discard_where(|i| i.session == session);
        self.following.flushes.retain(|f| f.0 != session);
        self.following.answers.retain(|a| a.0 != session);
        if self.following.takeover.is_some_and(|t| t.0 == session) {
            self.following.takeover = None;
        }
        if self.following.confirmed.is_some_and(|c| c.0 == session) {
            self.following.confirmed = None;
            self.following.joining = Joining::default();
        }
    }

    pub(super) fn discard_all_incoming(&mut self) {
        self.discard_where(|_| true);
        self.following.flushes.clear();
        self.following.answers.clear();
        self.following.joining = Joining::default();
    }

    fn discard_where(&mut self, which: impl Fn(&Incoming) -> bool) {
        let ids: Vec<_> = self
            .following
            .incoming
            .iter()
            .filter(|(_, i)| !i.started && which(i))
            .map(|(id, _)| id)
            .collect();
        let mut locks = Vec::new();
        for id in ids {
            let Some(incoming) = self.following.incoming.remove(&id) else { continue };
            locks.push(incoming.lock);
            if incoming.work.writes() {
                self.intents.end(incoming.blocks, None, false);
            }
            match incoming.work {
                Work::Write { payload, .. } | Work::Copy { payload, .. } => self.release_payload(payload),
                Work::Compare { .. } | Work::Read { .. } => {}
            }
        }
        for lock in locks {
            self.drop_disk_lock(lock);
        }
    }

    pub(super) fn pump_following(&mut self) {
        if self.failure.is_some() {
            return;
        }
        self.confirm_takeover();
        while self.config_durable()
            && let Some((session, reign, answer)) = self.following.answers.pop_front()
        {
            if self.following.confirmed == Some((session, reign)) {
                self.send(session, answer);
            }
        }
        // Tickets are redeemed in the order in which they were made.
        while let Some((session, reign, id, ticket)) = self.following.flushes.front().copied()
            && self.flusher.redeemed(ticket)
        {
            self.following.flushes.pop_front();
            if self.following.confirmed == Some((session, reign)) {
                self.send(session, PeerMsg::FlushAck { reign, id });
            }
        }
        self.pump_joining();
    }

    /// Confirms a new reign once nothing of an older one is left in the kernel [R7, R11].
    fn confirm_takeover(&mut self) {
        let Some((session, reign)) = self.following.takeover else { return };
        if !self.disk.quiet() || !self.config_durable() {
            return;
        }
        self.following.takeover = None;
        if reign != self.reign() {
            return;
        }
        self.following.confirmed = Some((session, reign));
        let report = self.peer_report();
        self.send(session, PeerMsg::Report { reign, report });
        let runs: Vec<Run> = self.store.intent().runs(0).collect();
        self.send_runs(session, reign, RunsKind::Intent, &runs);
    }

    pub(super) fn peer_report(&self) -> PeerReport {
        let superblock = self.store.superblock();
        PeerReport {
            trust: self.store.trust,
            epoch: superblock.epoch,
            lineage: superblock.lineage,
            member: self.claimed_member(),
            base: superblock.base,
            inconsistent: superblock.inconsistent,
            damaged_pages: self.store.damaged_pages,
        }
    }

    /// Sends a list of runs in messages of bounded size, the last one marked.
    pub(super) fn send_runs(&mut self, session: SessionId, reign: Reign, kind: RunsKind, runs: &[Run]) {
        let mut chunks = runs.chunks(RUNS_PER_MSG).peekable();
        if chunks.peek().is_none() {
            self.send(session, PeerMsg::Runs { reign, kind, runs: Vec::new(), last: true });
        }
        while let Some(chunk) = chunks.next() {
            let last = chunks.peek().is_none();
            self.send(session, PeerMsg::Runs { reign, kind, runs: chunk.to_vec(), last });
        }
    }
}
