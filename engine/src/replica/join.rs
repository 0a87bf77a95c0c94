//! The resync target's side: the inconsistent mark before the first copy, and the last steps before a
//! join.
//!
//! Outside the in-sync set nothing is cleared from the intent map: what was copied here may be in a
//! volatile cache, and the intent map is what remembers it [R5].

use crate::types::{Epoch, Member, NodeId, Reign, ReplicaSlot, SuperblockTrust};
use crate::wire::{BaseContent, InconsistentMark, PeerMsg, Run, RunsKind, SessionId, WriteSeq};

use super::Replica;
use super::flusher::FlushTicket;
use super::io::Output;
use super::meta_store::Ticket;

/// A resync into this replica that is being prepared, or a join.
#[derive(Debug, Default)]
pub(super) struct Joining {
    /// Answer `ResyncReady` once this version of the superblock is durable; with foreign runs before it.
    preparing: Option<(SessionId, Reign, u64, bool)>,
    /// A resync that was asked for while this copy has to stay as it is.
    postponed: Option<Asked>,
    flush: Option<JoinFlush>,
    /// What was copied here counts as written up to this number once the join commits.
    pub(super) through: Option<WriteSeq>,
}

/// A resync that the primary asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) session: SessionId,
    pub(super) reign: Reign,
    pub(super) epoch: Epoch,
    pub(super) send_foreign: bool,
    pub(super) everything: bool,
}

#[derive(Debug)]
struct JoinFlush {
    session: SessionId,
    reign: Reign,
    id: u64,
    data: FlushTicket,
    bitmaps: Vec<Ticket>,
}

impl Replica {
    pub(super) fn resync_asked(&mut self, asked: Asked) {
        let Asked { session, reign, epoch, send_foreign, everything } = asked;
        let Some(source) = self.config.as_ref().and_then(|c| c.primary) else { return };
        // A member is reconciled without a mark; only a replica outside the set is resynced.
        if self.is_member() {
            return;
        }
        if self.awaits_force() {
            self.following.joining.postponed = Some(asked);
            return;
        }
        let mark = InconsistentMark { epoch, reign, source };
        let version = self.store.change_superblock(|sb| {
            sb.inconsistent = Some(mark);
            sb.clean = None;
            if everything {
                sb.member = None;
                sb.chain.clear();
                sb.epoch = Epoch(0);
                sb.base = BaseContent::Unknown;
            }
        });
        if everything {
            // What the superblock now says is all there is to know: a doubt about what it said before is
            // settled by both copies being written anew.
            self.store.trust = SuperblockTrust::Sound;
            self.store.rewrite_superblock();
        }
        self.following.joining.preparing = Some((session, reign, version, send_foreign));
    }

    pub(super) fn pump_joining(&mut self) {
        if let Some(asked) = self.following.joining.postponed.filter(|_| !self.awaits_force()) {
            self.following.joining.postponed = None;
            self.resync_asked(asked);
        }
        self.pump_preparing();
        let Some(flush) = &self.following.joining.flush else { return };
        let ready =
            self.flusher.redeemed(flush.data) && flush.bitmaps.iter().all(|t| self.store.redeemed(*t));
        if ready {
            let (session, reign, id) = (flush.session, flush.reign, flush.id);
            self.following.joining.flush = None;
            self.belongs = true;
            self.send(session, PeerMsg::JoinFlushAck { reign, id });
        }
    }

    fn pump_preparing(&mut self) {
        let Some((session, reign, version, foreign)) = self.following.joining.preparing else { return };
        // A disk that still holds a request past its time limit takes no copies [R7].
        let overdue = self.disk.overdue(self.now, self.settings().disk_timeout);
        if !self.store.superblock_durable(version) || overdue {
            return;
        }
        self.following.joining.preparing = None;
        if foreign {
            let runs = self.store.dirty_for_anyone();
            self.send_runs(session, reign, RunsKind::Foreign, &runs);
        }
        self.send(session, PeerMsg::ResyncReady { reign });
    }

    /// The primary's bitmap for a replica that is missing, on its way into the own one [R12].
    pub(super) fn dirty_runs(
        &mut self,
        session: SessionId,
        node: NodeId,
        reign: Reign,
        slot: ReplicaSlot,
        runs: &[Run],
    ) {
        if !self.obeys(node, reign) || self.following.confirmed != Some((session, reign)) || slot == self.slot
        {
            return;
        }
        let blocks = self.geometry.blocks();
        let Some(bitmap) = self.store.dirty_mut(slot) else { return };
        for run in runs {
            if run.start.checked_add(run.count).is_none_or(|end| end > blocks) {
                let reason = "a bitmap names blocks outside the volume".to_owned();
                self.out.push_back(Output::CloseSession(session, reason));
                return;
            }
            bitmap.set_range(run.start, run.count);
        }
        self.suspects.suspect_all(slot);
    }

    pub(super) fn join_flush_asked(&mut self, session: SessionId, reign: Reign, id: u64, through: WriteSeq) {
        let bitmaps = self.store.save_all();
        let data = self.flusher.request();
        self.following.joining.through = Some(through);
        self.following.joining.flush = Some(JoinFlush { session, reign, id, data, bitmaps });
    }

    /// The join is committed: what the members lack of each other is known to all of them from here on.
    pub(super) fn has_joined(&mut self, members: &[Member]) {
        let through = self.following.joining.through.take().unwrap_or_default();
        self.intents.joined(through);
        let Some(config) = &self.config else { return };
        let slots: Vec<ReplicaSlot> = members.iter().filter_map(|m| config.slot(m.node)).collect();
        for slot in slots {
            if let Some(bitmap) = self.store.dirty_mut(slot) {
                bitmap.clear_all();
                self.suspects.clear(slot);
            }
        }
    }
}
