//! What stands in for a replica while the control plane is tested alone: reports, proposals, and the right to
//! serve, as a core has them. No block is written; what a superblock would record is kept per machine.
//!
//! It keeps a primary's side of the bargain: it stops serving before it proposes to give the role away, and
//! serves again only when it knows that the proposal failed or is void [R18].

use blkrepl_engine::control::{ClusterState, VolumeRecord};
use blkrepl_engine::types::{
    Epoch, Health, Incarnation, LineageId, Member, NodeId, Proposal, ProposalId, ProposalKind,
    ProposalOutcome, Reign, ReplicaReport, SuperblockTrust, VolumeId,
};

use crate::rng::Rng;

/// What a machine's disk knows of the volume.
#[derive(Clone, Copy, Debug, Default)]
struct Recorded {
    epoch: u64,
    reign: u64,
    lineage: u128,
    member: Option<Incarnation>,
}

/// One replica.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stub {
    recorded: Recorded,
    /// Of the run at hand.
    proposals: u64,
    /// The proposal under way.
    asked: Option<Proposal>,
    /// It has stopped serving in order to give the role away at this epoch.
    stopped: Option<Epoch>,
    pub(crate) sick: bool,
}

impl Stub {
    /// The process is gone.
    pub(crate) fn restart(&mut self) {
        *self = Self { recorded: self.recorded, sick: self.sick, ..Self::default() };
    }

    /// True if it would answer clients, given that it is the named primary and holds a lease.
    pub(crate) fn would_serve(&self) -> bool {
        self.stopped.is_none()
    }

    /// Takes up a config.
    pub(crate) fn adopt(&mut self, me: Member, v: &VolumeRecord) {
        self.recorded.epoch = v.epoch.0;
        self.recorded.reign = v.reign.0;
        self.recorded.lineage = v.lineage.0;
        match v.member(me.node) {
            Some(named) if named == me => self.recorded.member = Some(me.incarnation),
            Some(_) => {}
            None => self.recorded.member = None,
        }
        // The proposal took effect, or can no more.
        if self.stopped.is_some_and(|epoch| v.epoch > epoch) {
            self.stopped = None;
        }
    }

    /// What it says of itself.
    pub(crate) fn report(&self) -> (Health, ReplicaReport) {
        let health = if self.sick { Health::Unhealthy("disk".into()) } else { Health::Healthy };
        let report = ReplicaReport {
            trust: SuperblockTrust::Sound,
            epoch: Epoch(self.recorded.epoch),
            reign: Reign(self.recorded.reign),
            lineage: LineageId(self.recorded.lineage),
            member: self.recorded.member,
            inconsistent: false,
            clean: false,
            same_os_boot: true,
        };
        (health, report)
    }

    /// What it wants to change, as the primary that serves.
    pub(crate) fn wish(
        &mut self,
        me: Member,
        v: &VolumeRecord,
        state: &ClusterState,
        lost: &[NodeId],
        rng: &mut Rng,
    ) -> Option<Proposal> {
        if self.asked.is_some() || v.primary != Some(me) {
            return None;
        }
        let kind = self.kind(me, v, state, lost, rng)?;
        if matches!(kind, ProposalKind::Move(_) | ProposalKind::Demote | ProposalKind::HandOver(_)) {
            self.stopped = Some(v.epoch);
        }
        Some(self.ask(v.id, v.epoch, me, kind))
    }

    fn ask(&mut self, volume: VolumeId, epoch: Epoch, by: Member, kind: ProposalKind) -> Proposal {
        self.proposals += 1;
        let id = ProposalId(self.proposals);
        let proposal = Proposal { id, volume, expected_epoch: epoch, by, kind };
        self.asked = Some(proposal);
        proposal
    }

    fn kind(
        &self,
        me: Member,
        v: &VolumeRecord,
        state: &ClusterState,
        lost: &[NodeId],
        rng: &mut Rng,
    ) -> Option<ProposalKind> {
        let others = || v.in_sync.iter().filter(|m| **m != me);
        if self.stopped.is_some() {
            // Of unknown fate: voided before it serves again.
            return Some(ProposalKind::Bump);
        }
        if let Some(m) = others().find(|m| !state.is_newest(**m) || lost.contains(&m.node)) {
            return Some(ProposalKind::Remove(*m));
        }
        if self.sick {
            return others().next().map(|m| ProposalKind::HandOver(*m));
        }
        let joiner = v.replicas.iter().find(|r| v.member(r.node).is_none() && !lost.contains(&r.node));
        if let Some(joiner) = joiner
            && rng.chance(300)
        {
            let incarnation = state.newest(joiner.node)?;
            return Some(ProposalKind::Join(Member { node: joiner.node, incarnation }));
        }
        match rng.below(100) {
            0..3 => others().next().map(|m| ProposalKind::Move(*m)),
            3 => Some(ProposalKind::Demote),
            4 => Some(ProposalKind::Bump),
            _ => None,
        }
    }

    /// The fate of a proposal. May ask once more: the bump that voids it.
    pub(crate) fn outcome(
        &mut self,
        asked: &Proposal,
        outcome: &ProposalOutcome,
        v: Option<&VolumeRecord>,
    ) -> Option<Proposal> {
        if self.asked.as_ref() != Some(asked) {
            return None;
        }
        self.asked = None;
        let v = v?;
        match outcome {
            ProposalOutcome::Applied => {
                // The state that shows it has been taken up before.
                self.stopped = self.stopped.filter(|epoch| v.epoch <= *epoch);
            }
            // A bump is only refused because the epoch has moved on, and the config will say so.
            ProposalOutcome::Refused(_) if asked.kind != ProposalKind::Bump => self.stopped = None,
            ProposalOutcome::Refused(_) => {}
            ProposalOutcome::Unknown if self.stopped.is_some() => {
                return Some(self.ask(asked.volume, asked.expected_epoch, asked.by, ProposalKind::Bump));
            }
            ProposalOutcome::Unknown => {}
        }
        None
    }
}
