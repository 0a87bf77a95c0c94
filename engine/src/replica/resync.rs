//! The source's side of resync: what a returning replica lacks, and the way to its join.
//!
//! A returning replica has three outcomes: a known set, everything, or refused. The set is the primary's
//! bitmap for it united with both sides' intent regions (and, for foreign writes of another lineage, with
//! its own bitmaps). Order of a join: set empty, enter the ack set, the target flushes, the
//! primary's bitmaps are copied to it, then it is proposed [R4, R12].
//!
//! Client writes go to the target live and set its bit; only a copy or a write that is still the newest for
//! its block clears the bit [R21]: `live` holds, per block, the number of the newest write under way.
//!
//! A target that is slower than the clients would never be done: what they write faster than it answers is left
//! for later, round after round. In the second round it enters the ack set with what is left: from there on clients
//! wait for it and nothing is added.
//!
//! The same machinery reconciles the members of the set after a promotion [R11].

use std::collections::{BTreeMap, BTreeSet};

use crate::mutation::{Mutation, mutated};
use crate::types::{
    BlockRange, ConfigView, Epoch, Incarnation, Member, Nanos, NodeId, RegionIndex, Reign, ReplicaSlot,
    ResyncProgress, SuperblockTrust,
};
use crate::wire::{BaseContent, PeerMsg, PeerReport, RunsKind, WriteSeq};

use crate::meta::PagedBitmap;

use super::Replica;
use super::chunk::{Chunk, ChunkId};
use super::hold::Hold;
use super::io::{Event, Output};
use super::suspects::Suspect;

/// Of live writes a target may leave this many resync windows unanswered before further ones are not sent to
/// it (their bits stay set): 32 MiB unless the window is set. Inside the ack set there is no such limit: it is
/// waited for.
const LIVE_WINDOWS_MAX: u64 = 8;

/// A target for which the cursor came round so often, and found something left behind, is waited for. Once is
/// no sign yet: a chunk leaves behind what lies after a block that a client's write brought meanwhile.
const ROUNDS_MAX: u32 = 2;

/// The reign in which a volume is created.
const FIRST_REIGN: Reign = Reign(1);

/// Where a target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetPhase {
    /// Its inconsistent mark is being made durable.
    Preparing,
    /// Blocks are compared and copied.
    Copying,
    /// In the ack set; older live writes are still under way.
    Draining,
    /// It flushes, with the bitmaps.
    Flushing(u64),
    /// May be proposed.
    Ready,
    /// Its join is proposed.
    Proposed,
    /// A member that holds the same content.
    Reconciled,
}

/// What the target was asked and has not answered.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chunk: ChunkId,
    pub(super) blocks: BlockRange,
    /// A comparison; else a copy.
    pub(super) compare: bool,
    pub(super) asked: Nanos,
}

/// A replica that is being resynced, or a member being reconciled.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) incarnation: Incarnation,
    pub(super) slot: ReplicaSlot,
    pub(super) member: bool,
    pub(super) phase: TargetPhase,
    everything: bool,
    /// Regions whose bits may say too much: compared before they are copied.
    compare: Suspect,
    pub(super) cursor: u64,
    /// How often the cursor has come round to a block that was left behind.
    pub(super) rounds: u32,
    /// A block that it lacks could not be read here.
    pub(super) unreadable: bool,
    pub(super) chunks: BTreeMap<ChunkId, Chunk>,
    /// When the last one began.
    pub(super) chunk_begun: Nanos,
    pub(super) requests: BTreeMap<u64, Request>,
    pub(super) live: BTreeMap<u64, WriteSeq>,
    unanswered: BTreeMap<WriteSeq, BlockRange>,
    unanswered_bytes: u64,
    entered_at: WriteSeq,
    pub(super) progress: ResyncProgress,
    speed: (Nanos, u64),
    /// A chunk could not be read here: wait before the next try.
    pub(super) paused_until: Nanos,
}

impl Target {
    pub(super) fn in_ack_set(&self) -> bool {
        let early = matches!(self.phase, TargetPhase::Preparing | TargetPhase::Copying);
        self.member || !(early || mutated(Mutation::R4))
    }

    pub(super) fn compares(&self, region: RegionIndex) -> bool {
        self.everything || self.compare.contains(region)
    }

    /// Takes an answer to a question of this kind; an answer to another is none.
    pub(super) fn answered(&mut self, request: u64, compare: bool) -> Option<Request> {
        self.requests.get(&request).filter(|r| r.compare == compare)?;
        self.requests.remove(&request)
    }

    /// What it still lacks shrinks only if clients wait for it. A block that can't be read is no reason for that:
    /// waiting does not bring it.
    fn must_be_waited_for(&self) -> bool {
        self.rounds >= ROUNDS_MAX && !self.unreadable && !self.member
    }

    fn copies(&self) -> bool {
        !matches!(self.phase, TargetPhase::Preparing | TargetPhase::Reconciled)
    }
}

/// What to do with a returning replica.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The primary's bitmap for it says what it lacks.
    Known { foreign: bool, reason: &'static str },
    /// Nothing can be relied on.
    Everything { foreign: bool, reason: &'static str },
    /// Not a replica of this history.
    Refused(String),
}

/// What the source knows of its own doings towards a returning replica.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remembered {
    /// The bitmap for it names every block ever written, because nothing was ever copied to it.
    pub(super) untouched: bool,
    /// It has copied to it since it was opened, so the bitmap in memory says what is left of that resync. The one
    /// on the disk need not: that everything is to be copied is not saved before copying begins.
    pub(super) copied_to: bool,
}

/// Judges what a returning replica says of itself against the committed config [design 7]. Both replicas'
/// metadata never decide who copies from whom: the config does.
pub(super) fn judge(
    report: &PeerReport,
    node: NodeId,
    me: Member,
    config: &ConfigView,
    remembered: Remembered,
) -> Verdict {
    let Remembered { untouched, copied_to } = remembered;
    let blank = report.member.is_none() && report.inconsistent.is_none();
    // A later lineage may have started from an older epoch than an earlier one did.
    let forks = config.history.iter().skip_while(|f| f.lineage != report.lineage).map(|f| f.fork_epoch);
    let mut common = None;
    let foreign = if report.lineage == config.lineage || report.trust == SuperblockTrust::None {
        false
    } else if let Some(epoch) = forks.min() {
        common = Some(epoch);
        report.epoch > epoch
    } else if blank && report.base == BaseContent::Zero {
        false
    } else {
        return Verdict::Refused(format!(
            "its content is of lineage {}, which the history of this volume does not know; if it may be thrown away, \
             remove its data and metadata files and restart the node",
            report.lineage
        ));
    };
    if report.trust != SuperblockTrust::Sound {
        return Verdict::Everything { foreign, reason: "its superblock is damaged" };
    }
    // A source that was opened anew in its run has the same name, and has forgotten.
    let ours = report.inconsistent.is_some_and(|mark| mark.reign == config.reign && mark.source == me);
    let resumed = ours && copied_to;
    let last_member = config.replica(node).and_then(|r| r.last_member);
    if common == Some(Epoch(0)) && !resumed {
        // The copy that the lineage went on from was never in sync, so no bitmap says what it lacks [R17].
        return Verdict::Everything {
            foreign,
            reason: "the present lineage began from a copy that shares nothing",
        };
    }
    match (report.member, report.base) {
        (Some(member), _) if Some(member) == last_member => {
            Verdict::Known { foreign, reason: "it was in sync before" }
        }
        (Some(_), _) => Verdict::Everything { foreign, reason: "it is not the copy that was last in sync" },
        (None, _) if resumed => Verdict::Known { foreign, reason: "its resync goes on" },
        (None, BaseContent::Zero) if last_member.is_none() && untouched => {
            Verdict::Known { foreign, reason: "it is new and all zeroes" }
        }
        // What was copied to the disk that it had before is in no bitmap any more.
        (None, BaseContent::Zero) if last_member.is_none() => {
            Verdict::Everything { foreign, reason: "it is new, and what it lacks is not on record" }
        }
        (None, BaseContent::Zero) => Verdict::Everything { foreign, reason: "its disk was replaced" },
        (None, _) => Verdict::Everything { foreign, reason: "what it holds is not known" },
    }
}

impl Replica {
    /// Begins what can begin, moves on what can move on.
    pub(super) fn pump_resync(&mut self) {
        let Some(primary) = &self.primary else { return };
        if self.failure.is_some() {
            return;
        }
        if primary.serving() {
            let waiting = |n: &NodeId| !primary.acks.contains_key(n) && !primary.targets.contains_key(n);
            let new: Vec<NodeId> = self.peers.keys().copied().filter(waiting).collect();
            for node in new {
                self.begin_resync(node);
            }
        }
        let Some(primary) = &self.primary else { return };
        for node in primary.targets.keys().copied().collect::<Vec<NodeId>>() {
            self.pump_chunks(node);
            self.pump_phase(node);
        }
    }

    /// After a promotion: makes a member's content equal in all regions that either intent map names.
    pub(super) fn reconcile(&mut self, node: NodeId) {
        let known = self.primary.as_ref().is_some_and(|p| p.targets.contains_key(&node));
        if known || self.reported_session(node).is_none() || self.failure.is_some() {
            return;
        }
        self.add_target(node, true, false, TargetPhase::Copying);
        self.pump_phase(node);
    }

    fn begin_resync(&mut self, node: NodeId) {
        let Some(session) = self.reported_session(node) else { return };
        let (Some(config), Some(peer)) = (&self.config, self.peers.get(&node)) else { return };
        let (Some(report), None) = (peer.report, &peer.refused) else { return };
        // Only the first primary, in its first run, knows that nobody else has copied anything to it; and one
        // that was opened anew in that run has forgotten what it copied itself.
        let copied_to = peer.copied_to;
        let untouched = config.reign == FIRST_REIGN && self.never_served && !copied_to;
        let verdict = judge(&report, node, self.me, config, Remembered { untouched, copied_to });
        let (epoch, reign) = (config.epoch, config.reign);
        let (everything, foreign, reason) = match verdict {
            Verdict::Known { foreign, reason } => (false, foreign, reason),
            Verdict::Everything { foreign, reason } => (true, foreign, reason),
            Verdict::Refused(reason) => {
                if let Some(peer) = self.peers.get_mut(&node) {
                    peer.refused = Some(reason.clone());
                }
                return self.event(Event::Refused { node, reason });
            }
        };
        self.add_target(node, false, everything, TargetPhase::Preparing);
        self.event(Event::ResyncStarted { node, bytes: self.dirty_bytes(node), reason: reason.into() });
        self.send(session, PeerMsg::ResyncStart { reign, epoch, send_foreign: foreign, everything });
    }

    /// Unites the set: the own bitmap, and both sides' intent regions.
    fn add_target(&mut self, node: NodeId, member: bool, everything: bool, phase: TargetPhase) {
        let Some(peer) = self.peers.get(&node) else { return };
        let (slot, theirs) = (peer.slot, peer.intents.clone());
        let Some(incarnation) = peer.session.map(|s| s.incarnation) else { return };
        let regions = self.geometry.regions();
        let mut intents: BTreeSet<RegionIndex> = self.store.intent_regions().collect();
        for run in theirs {
            let end = run.start.saturating_add(run.count).min(regions);
            intents.extend((run.start..end).map(RegionIndex));
        }
        let geometry = self.geometry;
        let mut compare = self.suspects.of(slot);
        let Some(bitmap) = self.store.dirty_mut(slot) else { return };
        if everything {
            bitmap.set_all();
        }
        for region in intents {
            compare.insert(region);
            let blocks = geometry.blocks_of_region(region);
            bitmap.set_range(blocks.start.0, blocks.count);
        }
        let total_bytes = bitmap.count() * u64::from(geometry.block_size());
        let target = Target {
            incarnation,
            slot,
            member,
            phase,
            everything,
            compare,
            cursor: 0,
            rounds: 0,
            unreadable: false,
            chunks: BTreeMap::new(),
            chunk_begun: self.now,
            requests: BTreeMap::new(),
            live: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            unanswered_bytes: 0,
            entered_at: WriteSeq(0),
            progress: ResyncProgress { total_bytes, ..ResyncProgress::default() },
            speed: (self.now, 0),
            paused_until: self.now,
        };
        if let Some(primary) = &mut self.primary {
            primary.budget.begin(self.now);
            primary.targets.insert(node, target);
        }
    }

    /// The target's mark is durable; foreign runs, if any, have come.
    pub(super) fn target_ready(&mut self, node: NodeId) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        if target.phase != TargetPhase::Preparing {
            return;
        }
        target.phase = TargetPhase::Copying;
        let slot = target.slot;
        let blocks = self.geometry.blocks();
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.copied_to = true;
        let foreign = std::mem::take(&mut peer.foreign);
        if foreign.is_empty() {
            return;
        }
        let Some(bitmap) = self.store.dirty_mut(slot) else { return };
        let mut count = 0;
        for run in foreign.iter().filter(|r| r.start < blocks) {
            let len = run.count.min(blocks - run.start);
            count += len;
            bitmap.set_range(run.start, len);
        }
        let total_bytes = bitmap.count() * u64::from(self.geometry.block_size());
        if let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) {
            target.progress.total_bytes = total_bytes;
        }
        let bytes = count * u64::from(self.geometry.block_size());
        self.event(Event::Discarding { node, bytes });
    }

    pub(super) fn dirty_bytes(&self, node: NodeId) -> u64 {
        let bitmap = self.peers.get(&node).and_then(|p| self.store.dirty(p.slot));
        bitmap.map_or(0, |b| b.count() * u64::from(self.geometry.block_size()))
    }

    /// Sends a client's write to a target while it is being resynced.
    pub(super) fn send_live(&mut self, seq: WriteSeq, node: NodeId) {
        let block_size = u64::from(self.geometry.block_size());
        let room_max = u64::from(self.settings().resync_window_bytes) * LIVE_WINDOWS_MAX;
        let Some(primary) = &mut self.primary else { return };
        let waited_for = primary.acks.contains_key(&node);
        let Some(target) = primary.targets.get_mut(&node) else { return };
        let blocks = primary.parts[&seq].blocks;
        let bytes = blocks.count * block_size;
        let room = target.unanswered_bytes + bytes <= room_max;
        let send = waited_for || (target.copies() && room);
        if !send || !self.send_part(seq, node) {
            // An older write under way is no longer the newest for its blocks: its answer clears nothing [R21].
            return self.forget_live(node, blocks);
        }
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        target.unanswered.insert(seq, blocks);
        target.unanswered_bytes += bytes;
        for block in blocks.iter() {
            target.live.insert(block.0, seq);
        }
    }

    fn forget_live(&mut self, node: NodeId, blocks: BlockRange) {
        if mutated(Mutation::R21) {
            return;
        }
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let gone: Vec<u64> = target.live.range(blocks.start.0..blocks.end()).map(|(b, _)| *b).collect();
        for block in gone {
            target.live.remove(&block);
        }
    }

    /// A target has committed a live write: its bit goes where that write is still the newest [R21].
    pub(super) fn live_acked(&mut self, node: NodeId, seq: WriteSeq) {
        let block_size = u64::from(self.geometry.block_size());
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) else { return };
        let Some(blocks) = target.unanswered.remove(&seq) else { return };
        target.unanswered_bytes -= blocks.count * block_size;
        let newest: Vec<u64> = target
            .live
            .range(blocks.start.0..blocks.end())
            .filter(|(_, newest)| **newest == seq || mutated(Mutation::R21))
            .map(|(block, _)| *block)
            .collect();
        let slot = target.slot;
        for block in newest {
            target.live.remove(&block);
            if let Some(bitmap) = self.store.dirty_mut(slot) {
                bitmap.clear(block);
            }
        }
    }

    /// The order of a join [R4].
    fn pump_phase(&mut self, node: NodeId) {
        let Some(primary) = &self.primary else { return };
        let Some(target) = primary.targets.get(&node) else { return };
        let dirty = self.store.dirty(target.slot).map_or(0, PagedBitmap::count);
        let last = primary.last_seq();
        let brought = target.chunks.is_empty() && dirty == target.live.len() as u64;
        let brought = brought || (mutated(Mutation::JoinBeforeResyncEnds) && !target.member);
        match target.phase {
            TargetPhase::Copying if brought => {
                if target.member {
                    self.set_phase(node, TargetPhase::Reconciled);
                    return self.reconciled(node);
                }
                // Every block it lacks is in a write on its way: from here on each write waits for it.
                self.enter_ack_set(node);
            }
            TargetPhase::Copying if target.must_be_waited_for() => self.enter_ack_set(node),
            TargetPhase::Draining => {
                let entered = target.entered_at;
                let older = target.unanswered.keys().next().is_some_and(|first| *first <= entered);
                if !older && brought {
                    self.flush_joiner(node, last);
                }
            }
            _ => {}
        }
    }

    fn set_phase(&mut self, node: NodeId, phase: TargetPhase) {
        if let Some(target) = self.primary.as_mut().and_then(|p| p.targets.get_mut(&node)) {
            target.phase = phase;
        }
    }

    fn enter_ack_set(&mut self, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let entered_at = primary.last_seq();
        if let Some(target) = primary.targets.get_mut(&node) {
            target.entered_at = entered_at;
            target.phase = TargetPhase::Draining;
        }
        self.refresh_acks();
        self.pump_phase(node);
    }

    /// Copies the bitmaps for all other missing replicas and asks for a flush [R12].
    fn flush_joiner(&mut self, node: NodeId, through: WriteSeq) {
        let Some(session) = self.reported_session(node) else { return };
        let reign = self.reign();
        let joiner = self.peers.get(&node).map(|p| p.slot);
        let wanted = |s: &ReplicaSlot| Some(*s) != joiner && !mutated(Mutation::R12);
        for slot in self.missing_slots().iter().filter(wanted) {
            let runs = self.store.dirty_runs(slot);
            self.send_runs(session, reign, RunsKind::Dirty(slot), &runs);
        }
        let id = self.request_id();
        self.set_phase(node, TargetPhase::Flushing(id));
        self.send(session, PeerMsg::JoinFlush { reign, id, through });
    }

    pub(super) fn join_flushed(&mut self, node: NodeId, id: u64) {
        let phase = self.primary.as_ref().and_then(|p| p.targets.get(&node)).map(|t| t.phase);
        if phase == Some(TargetPhase::Flushing(id)) {
            self.set_phase(node, TargetPhase::Ready);
        }
    }

    /// The target whose join is to be proposed next, then counted as proposed.
    pub(super) fn target_to_propose(&mut self) -> Option<Member> {
        let primary = self.primary.as_mut().filter(|p| p.serving())?;
        let (node, target) = primary.targets.iter_mut().find(|(_, t)| t.phase == TargetPhase::Ready)?;
        target.phase = TargetPhase::Proposed;
        Some(Member { node: *node, incarnation: target.incarnation })
    }

    pub(super) fn join_refused(&mut self, node: NodeId) {
        let phase = self.primary.as_ref().and_then(|p| p.targets.get(&node)).map(|t| t.phase);
        if phase == Some(TargetPhase::Proposed) {
            self.set_phase(node, TargetPhase::Ready);
        }
    }

    /// A newer config: who joined is a target no more; who was proposed under the old epoch is again.
    pub(super) fn targets_after_config(&mut self, config: &ConfigView) {
        let Some(primary) = &self.primary else { return };
        let nodes: Vec<(NodeId, Incarnation, bool)> =
            primary.targets.iter().map(|(n, t)| (*n, t.incarnation, t.member)).collect();
        for (node, incarnation, member) in nodes {
            let is_member = config.in_sync.contains(&Member { node, incarnation });
            if is_member && !member {
                let progress = self.primary.as_ref().map(|p| p.targets[&node].progress);
                self.drop_target(node);
                if mutated(Mutation::FailBack) {
                    self.give_role_back(Member { node, incarnation });
                }
                if let Some(progress) = progress {
                    self.event(Event::ResyncFinished { node, progress });
                }
            } else if member && !is_member {
                self.drop_target(node);
            } else {
                self.join_refused(node);
            }
        }
    }

    /// Only for the mutation that fails back: moves the role to whoever has just joined.
    fn give_role_back(&mut self, to: Member) {
        let since = self.now;
        if let Some(primary) = self.primary.as_mut().filter(|p| p.hold.is_none()) {
            primary.hold = Hold::Draining { to: Some(to), since };
        }
    }

    /// Ends a resync or reconciliation: what it had under way is forgotten, its bits stay.
    pub(super) fn drop_target(&mut self, node: NodeId) {
        let Some(target) = self.primary.as_mut().and_then(|p| p.targets.remove(&node)) else { return };
        for chunk in target.chunks.into_values() {
            self.drop_chunk(chunk);
        }
        self.refresh_acks();
    }

    pub(super) fn drop_all_targets(&mut self) {
        let nodes: Vec<NodeId> =
            self.primary.as_ref().map(|p| p.targets.keys().copied().collect()).unwrap_or_default();
        for node in nodes {
            self.drop_target(node);
        }
    }

    /// A target holds range locks and, in the ack set, client writes. One that has fallen silent or hangs is
    /// let go with its session; when it is back its resync goes on where it stopped. Whoever is proposed for
    /// the set stays until that is decided.
    fn end_stuck_targets(&mut self) {
        let Some(primary) = &self.primary else { return };
        let undecided = |t: &Target| !t.member && t.phase != TargetPhase::Proposed;
        let nodes: Vec<NodeId> =
            primary.targets.iter().filter(|(_, t)| undecided(t)).map(|(node, _)| *node).collect();
        for node in nodes {
            let Some(session) = self.peers.get(&node).and_then(|p| p.session) else { continue };
            if let Some(reason) = self.unresponsive(node) {
                self.session_down(session.id);
                self.out.push_back(Output::CloseSession(session.id, format!("its resync stops: {reason}")));
            }
        }
    }

    /// Measures the speed of each resync, once a second.
    pub(super) fn tick_resync(&mut self) {
        self.end_stuck_targets();
        let (now, window) = (self.now, self.chunk_window());
        let Some(primary) = &mut self.primary else { return };
        if !primary.targets.is_empty() {
            primary.budget.tick(now, window, !primary.ops.is_empty());
        }
        for target in primary.targets.values_mut() {
            let elapsed = now.since(target.speed.0);
            if elapsed.as_millis() >= 1000 {
                let done = target.progress.done_bytes - target.speed.1;
                let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
                target.progress.bytes_per_s = done.saturating_mul(1000) / millis;
                target.speed = (now, target.progress.done_bytes);
            }
        }
    }
}
