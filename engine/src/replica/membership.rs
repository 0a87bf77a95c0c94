//! Who is in sync: what the primary proposes, and what it does while it does not know the outcome.
//!
//! - Nobody but the primary proposes a change of membership [R9].
//! - A member is proposed for removal only after this replica has flushed everything that it acknowledged
//!   itself; from before that flush until the fate is known, a write is stable before it is acknowledged if
//!   this replica would be alone [R9, R14].
//! - The ack set holds every replica of any in-sync set that is or could be committed: a joiner enters
//!   before its join is proposed and leaves only when that proposal is known to have failed; a lost member
//!   leaves only when its removal is committed.
//! - One proposal at a time; one of unknown fate is put out again under the same id.

use std::time::Duration;

use crate::mutation::{Mutation, mutated};
use crate::types::{ConfigView, Member, Nanos, NodeId, Proposal, ProposalId, ProposalKind, ProposalOutcome};

use super::Replica;
use super::flusher::FlushTicket;
use super::io::Event;
use super::primary::{Pending, Phase, Primary};

/// A write that a member leaves unanswered for this many peer time-outs makes it slow. More than one,
/// because a disk may stall for longer than a link may be silent.
const SLOW_FACTOR: u32 = 8;
/// Wait before a refused or unknown proposal is followed by another.
const RETRY: Duration = Duration::from_millis(200);

/// A removal being prepared.
#[derive(Debug)]
pub(super) struct Removal {
    member: Member,
    /// Everything acknowledged here is stable once this is redeemed.
    flush: FlushTicket,
}

impl Primary {
    /// The member that is leaving the set, or may be.
    pub(super) fn member_leaving(&self) -> Option<Member> {
        let pending = self.pending.as_ref().and_then(|p| match p.proposal.kind {
            ProposalKind::Remove(member) => Some(member),
            _ => None,
        });
        pending.or(self.removal.as_ref().map(|r| r.member))
    }

    pub(super) fn member_joining(&self) -> Option<Member> {
        self.pending.as_ref().and_then(|p| match p.proposal.kind {
            ProposalKind::Join(member) => Some(member),
            _ => None,
        })
    }
}

impl Replica {
    /// Computes anew who must commit a write.
    pub(super) fn refresh_acks(&mut self) {
        let others = self.other_members();
        let Some(primary) = &mut self.primary else { return };
        let joining = primary.member_joining().filter(|_| !mutated(Mutation::R4));
        let leaving = primary.member_leaving().filter(|_| mutated(Mutation::RemoveBeforeCommit));
        let entered = primary.targets.iter().filter(|(_, t)| t.in_ack_set());
        primary.acks = entered
            .map(|(node, t)| (*node, t.incarnation))
            .chain(joining.map(|m| (m.node, m.incarnation)))
            .chain(others.iter().filter(|m| Some(**m) != leaving).map(|m| (m.node, m.incarnation)))
            .collect();
        self.retain_waiting();
        self.ask_for_waiting_repairs();
    }

    /// Still primary in the same reign; something else changed.
    pub(super) fn config_changed_as_primary(&mut self, old: Option<&ConfigView>) {
        let Some(config) = self.config.clone() else { return };
        let Some(primary) = &mut self.primary else { return };
        // The epoch moved on: whatever was proposed under the old one has happened, or never will.
        if primary.pending.as_ref().is_some_and(|p| p.proposal.expected_epoch < config.epoch) {
            primary.pending = None;
        }
        if let Some(removal) = primary.removal.take_if(|r| !config.in_sync.contains(&r.member)) {
            debug_assert!(old.is_some_and(|o| o.in_sync.contains(&removal.member)));
        }
        self.targets_after_config(&config);
        self.hold_after_config();
        self.refresh_acks();
        for session in self.sessions() {
            self.send(session, crate::wire::PeerMsg::Config(Box::new(config.clone())));
        }
    }

    pub(super) fn tick_primary(&mut self) {
        self.tick_resync();
    }

    pub(super) fn pump_membership(&mut self) {
        let Some(primary) = &self.primary else { return };
        if primary.pending.is_some() {
            return self.repeat_pending();
        }
        if self.now < primary.retry_after || !self.config_usable() {
            return;
        }
        if self.failure.is_some() {
            return self.hand_over();
        }
        if let Some(removal) = &primary.removal {
            let (member, flush) = (removal.member, removal.flush);
            if self.flusher.redeemed(flush) || mutated(Mutation::R9) {
                self.removal_flushed(member);
            }
            return;
        }
        let gone = self.other_members().into_iter().find_map(|m| self.gone(m).map(|reason| (m, reason)));
        if let Some((member, reason)) = gone {
            self.event(Event::Removing { node: member.node, reason });
            let flush = self.flusher.request();
            if let Some(primary) = &mut self.primary {
                primary.removal = Some(Removal { member, flush });
            }
            return;
        }
        if !primary.hold.is_none() {
            return;
        }
        if let Some(member) = self.target_to_propose() {
            self.propose(ProposalKind::Join(member));
            self.refresh_acks();
        }
    }

    fn removal_flushed(&mut self, member: Member) {
        if let Some(primary) = &mut self.primary {
            primary.removal = None;
        }
        if self.gone(member).is_some() {
            self.propose(ProposalKind::Remove(member));
            if mutated(Mutation::RemoveBeforeCommit) {
                self.refresh_acks();
            }
        }
    }

    /// Why a member should be removed, if it should.
    fn gone(&self, member: Member) -> Option<String> {
        let limit = self.settings().peer_timeout;
        let peer = self.peers.get(&member.node)?;
        if let Some(reason) = &peer.failed {
            return Some(format!("it failed: {reason}"));
        }
        match peer.session {
            Some(session)
                if session.incarnation != member.incarnation && !mutated(Mutation::RestartedInSync) =>
            {
                Some("it restarted".into())
            }
            Some(_) => self.unresponsive(member.node),
            // A closed connection is a stronger sign than silence; half the time to come back.
            None if self.now.since(peer.down_since) >= limit / 2 => {
                Some(format!("no connection for {} ms", (limit / 2).as_millis()))
            }
            None => None,
        }
    }

    /// Why a connected replica holds up what waits for it, if it does: it is silent, or it answers pings
    /// and nothing else.
    pub(super) fn unresponsive(&self, node: NodeId) -> Option<String> {
        let limit = self.settings().peer_timeout;
        let peer = self.peers.get(&node)?;
        if self.now.since(peer.last_heard) >= limit {
            return Some(format!("nothing heard of it for {} ms", limit.as_millis()));
        }
        let primary = self.primary.as_ref()?;
        let write = primary.parts.values().find(|p| p.waiting.contains(node)).map(|p| p.started);
        let flush = primary.round.as_ref().filter(|r| r.waiting.contains(node)).map(|r| r.started);
        let target = primary.targets.get(&node);
        let request = target.and_then(|t| t.requests.values().map(|r| r.asked).min());
        let call = match primary.phase {
            // `down_since` is when the session came up, if there is one.
            Phase::TakingOver { since, .. } if peer.reported != Some(primary.reign) => {
                Some(since.max(peer.down_since))
            }
            _ => None,
        };
        let asked = [
            (write, "a write"),
            (flush, "a flush"),
            (request, "a block to compare or copy"),
            (call, "a take-over"),
            (primary.repair_asked(node), "a block to mend another"),
        ];
        let (since, what) = asked.into_iter().filter_map(|(at, what)| Some((at?, what))).min()?;
        let waited = self.now.since(since);
        (waited >= limit * SLOW_FACTOR).then(|| format!("{what} unanswered for {} ms", waited.as_millis()))
    }

    /// The own disk failed: a connected member takes over, if there is one.
    fn hand_over(&mut self) {
        let connected = |m: &Member| {
            self.session_member(m.node) == Some(*m)
                && self.peers.get(&m.node).is_some_and(|p| p.failed.is_none())
        };
        if let Some(member) = self.other_members().into_iter().find(connected) {
            self.propose(ProposalKind::HandOver(member));
        }
    }

    pub(super) fn primary_failed(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.removal = None;
            self.event(Event::StoppedServing("this replica failed".into()));
        }
    }

    /// Puts a proposal out under the present epoch.
    pub(super) fn propose(&mut self, kind: ProposalKind) {
        let Some(config) = &self.config else { return };
        let id = self.next_proposal;
        let proposal =
            Proposal { id, volume: config.volume, expected_epoch: config.epoch, by: self.me, kind };
        self.next_proposal = ProposalId(id.0 + 1);
        if let Some(primary) = &mut self.primary {
            assert!(primary.pending.is_none(), "two proposals at once");
            primary.pending = Some(Pending { proposal, again: None });
        }
        self.out.push_back(super::Output::Propose(proposal));
    }

    fn repeat_pending(&mut self) {
        let now = self.now;
        let pending = self.primary.as_mut().and_then(|p| p.pending.as_mut());
        if let Some(pending) = pending.filter(|p| p.again.is_some_and(|at| at <= now)) {
            pending.again = None;
            let proposal = pending.proposal;
            self.out.push_back(super::Output::Propose(proposal));
        }
    }

    pub(super) fn proposal_outcome(&mut self, id: ProposalId, outcome: ProposalOutcome) {
        let retry: Nanos = self.now.after(RETRY);
        let Some(primary) = &mut self.primary else { return };
        let Some(pending) = primary.pending.as_mut().filter(|p| p.proposal.id == id) else { return };
        match outcome {
            // The config that shows it comes separately, and ends the wait.
            ProposalOutcome::Applied => {}
            // Under another epoch its config ends the wait; under this one the change that it shall void
            // may still come, and nothing is served until it can't [R18].
            ProposalOutcome::Refused(_) if pending.proposal.kind == ProposalKind::Bump => {
                pending.again = Some(retry);
            }
            ProposalOutcome::Refused(reason) => {
                let kind = pending.proposal.kind;
                primary.pending = None;
                primary.retry_after = retry;
                self.proposal_refused(kind, &reason);
                self.refresh_acks();
            }
            ProposalOutcome::Unknown => {
                let kind = pending.proposal.kind;
                pending.again = Some(retry);
                self.proposal_unknown(kind);
            }
        }
    }

    fn proposal_refused(&mut self, kind: ProposalKind, reason: &str) {
        match kind {
            ProposalKind::Join(member) => self.join_refused(member.node),
            ProposalKind::Move(_) | ProposalKind::Demote => self.resume(reason),
            ProposalKind::Remove(_) | ProposalKind::HandOver(_) | ProposalKind::Bump => {}
        }
    }

    /// Only for the mutation that takes an unknown fate for a failure.
    fn give_planned_change_up(&mut self) {
        if let Some(primary) = &mut self.primary {
            primary.pending = None;
        }
        self.resume("its fate is not known");
    }

    /// A planned change whose fate is unknown is voided: an epoch bump under the same expected epoch
    /// commits only if it does not, and the other way round [R18].
    fn proposal_unknown(&mut self, kind: ProposalKind) {
        if matches!(kind, ProposalKind::Move(_) | ProposalKind::Demote) {
            if mutated(Mutation::R18) {
                return self.give_planned_change_up();
            }
            if let Some(primary) = &mut self.primary {
                primary.pending = None;
            }
            self.propose(ProposalKind::Bump);
        }
    }
}
