//! The leader's side of leases. One table serves one leadership; a new leadership starts an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::mutation::{Mutation, mutated};
use crate::types::{Epoch, Incarnation, LogIndex, Member, Nanos, NodeId, VolumeId};

use super::super::command::Leadership;
use super::super::state::ClusterState;
use super::{Grant, LeaseView, with_drift};

/// Names one exclusion that a proposal holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExclusionId(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Granted {
    incarnation: Incarnation,
    until: Nanos,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Exclusion {
    volume: VolumeId,
    node: NodeId,
    expected_epoch: Epoch,
}

/// Grants and exclusions of one leadership.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LeaseTable {
    /// Whose table this is; `None` while this node does not lead.
    leadership: Option<Leadership>,
    /// When this node was first seen to lead. At or after the true time, so waiting from here is safe.
    since: Nanos,
    /// No grant before this is applied: the log may hold changes of primary from before the start.
    must_apply: LogIndex,
    /// The last grant per node.
    grants: BTreeMap<NodeId, Granted>,
    /// Exclusions held by proposals.
    proposals: BTreeMap<ExclusionId, Exclusion>,
    /// Exclusions because the volume is unhealthy on the node.
    unhealthy: BTreeSet<(VolumeId, NodeId)>,
    /// End of the last grant that still covered an excluded volume. Present while excluded.
    frozen: BTreeMap<(VolumeId, NodeId), Nanos>,
    /// Every grant names at least this index: where lifted exclusions met their fate.
    floor: LogIndex,
    next_id: u64,
}

impl LeaseTable {
    /// This node leads since `now` or before. Does nothing if it is known already; else the table starts
    /// empty and waits. `last_log` is the last index of the log, at the time or later.
    pub fn became_leader(&mut self, leadership: Leadership, now: Nanos, last_log: LogIndex) {
        if self.leadership == Some(leadership) {
            return;
        }
        *self = Self {
            leadership: Some(leadership),
            since: now,
            must_apply: last_log,
            // Ids go on, so that a late lift from an older leadership hits nothing.
            next_id: self.next_id,
            ..Self::default()
        };
    }

    /// This node does not lead any more.
    pub fn lost_leadership(&mut self) {
        if self.leadership.is_some() {
            *self = Self { next_id: self.next_id, ..Self::default() };
        }
    }

    /// The leadership whose table this is.
    #[must_use]
    pub fn leadership(&self) -> Option<Leadership> {
        self.leadership
    }

    /// Before this nothing that an older leader granted may be taken for over [R1].
    #[must_use]
    pub fn quiet_until(&self, longest: Duration) -> Nanos {
        self.since.after(with_drift(longest))
    }

    /// Grants a lease. `confirmed` is the leadership that a quorum confirmed after the request arrived, and
    /// `read_index` the index that had to be applied after that; `state` is the state applied here now.
    ///
    /// # Errors
    /// The reason why this request gets no lease.
    pub fn grant(
        &mut self,
        state: &ClusterState,
        confirmed: Leadership,
        read_index: LogIndex,
        member: Member,
        nonce: u64,
        now: Nanos,
    ) -> Result<Grant, String> {
        let Member { node, incarnation } = member;
        if self.leadership != Some(confirmed) {
            return Err("the leader has not settled; ask again".into());
        }
        if state.applied < self.must_apply.max(read_index) {
            return Err("the leader has not applied its log; ask again".into());
        }
        if !state.is_newest(member) {
            // [R2]: an older run gets nothing, and its lease is over anyway.
            return Err(format!("{node} run {incarnation} is not the newest registered; register first"));
        }
        let until = now.after(with_drift(state.lease));
        let granted = self.grants.entry(node).or_insert(Granted { incarnation, until });
        // A shorter length than before does not shorten what was granted.
        let earlier = if granted.incarnation == incarnation { granted.until } else { Nanos(0) };
        *granted = Granted { incarnation, until: until.max(earlier) };
        let excluded = self.excluded(node);
        Ok(Grant {
            node,
            incarnation,
            nonce,
            length: state.lease,
            excluded,
            applied: state.applied.max(self.floor),
        })
    }

    /// Volumes excluded from the grants of `node`.
    #[must_use]
    pub fn excluded(&self, node: NodeId) -> Vec<VolumeId> {
        self.frozen.keys().filter(|(_, n)| *n == node).map(|(volume, _)| *volume).collect()
    }

    /// Excludes a volume from a node's grants, from now until the fate of a proposal that expects
    /// `expected_epoch` is known. Several may be held at once.
    pub fn exclude(&mut self, volume: VolumeId, node: NodeId, expected_epoch: Epoch) -> ExclusionId {
        let id = ExclusionId(self.next_id);
        self.next_id += 1;
        self.freeze(volume, node);
        self.proposals.insert(id, Exclusion { volume, node, expected_epoch });
        id
    }

    /// Lifts an exclusion whose entry was applied at or before `applied`, or was never handed to Raft.
    pub fn lift(&mut self, id: ExclusionId, applied: LogIndex) {
        if let Some(e) = self.proposals.remove(&id) {
            self.floor = self.floor.max(applied);
            self.thaw(e.volume, e.node);
        }
    }

    /// Lifts the exclusions of proposals that can never take effect any more because the volume's applied
    /// epoch has moved on.
    pub fn lift_void(&mut self, state: &ClusterState) {
        let void = |e: &Exclusion| state.volumes.get(&e.volume).is_none_or(|v| v.epoch > e.expected_epoch);
        let ids: Vec<_> = self.proposals.iter().filter(|(_, e)| void(e)).map(|(id, _)| *id).collect();
        for id in ids {
            self.lift(id, state.applied);
        }
    }

    /// Says whether a volume is healthy on a node. What is not healthy is not vouched for.
    pub fn set_healthy(&mut self, volume: VolumeId, node: NodeId, healthy: bool) {
        if healthy {
            if self.unhealthy.remove(&(volume, node)) {
                self.thaw(volume, node);
            }
        } else if self.unhealthy.insert((volume, node)) {
            self.freeze(volume, node);
        }
    }

    fn freeze(&mut self, volume: VolumeId, node: NodeId) {
        let until = self.grants.get(&node).map_or(Nanos(0), |g| g.until);
        // An exclusion held already froze an earlier end, and no grant since has covered the volume.
        self.frozen.entry((volume, node)).or_insert(until);
    }

    fn thaw(&mut self, volume: VolumeId, node: NodeId) {
        let held = self.unhealthy.contains(&(volume, node))
            || self.proposals.values().any(|e| e.volume == volume && e.node == node);
        if !held {
            self.frozen.remove(&(volume, node));
        }
    }

    /// True if `member`'s right to serve `volume` is over for certain: a newer run of its node registered
    /// [R2], or this leadership is old enough and the last grant that covered the volume has run out [R1].
    #[must_use]
    pub fn lease_over(&self, state: &ClusterState, volume: VolumeId, member: Member, now: Nanos) -> bool {
        if state.has_restarted(member) {
            return true;
        }
        // What is not applied yet may hold a longer lease than the state knows.
        let settled = self.leadership.is_some() && state.applied >= self.must_apply;
        if !settled || now < self.quiet_until(state.lease_longest) {
            return false;
        }
        let granted = self.grants.get(&member.node).map_or(Nanos(0), |g| g.until);
        let covered = self.frozen.get(&(volume, member.node)).copied().unwrap_or(granted);
        now >= covered || mutated(Mutation::R1)
    }

    /// Makes everything older, as if the clock stood still and all else were moved back, for the model. What
    /// is over is as if it had never been.
    #[cfg(test)]
    pub(in super::super) fn age(&mut self, now: Nanos, by: Duration) {
        self.since = self.since.before(by);
        let untils = self.grants.values_mut().map(|g| &mut g.until);
        for until in untils.chain(self.frozen.values_mut()) {
            *until = super::older_until(*until, now, by);
        }
    }

    /// Takes over the number of the next exclusion, so that two tables that differ in it alone are equal.
    #[cfg(test)]
    pub(in super::super) fn clone_next_id(&mut self, other: &Self) {
        self.next_id = other.next_id;
    }

    /// True if `member` renewed lately in exactly this run.
    #[must_use]
    pub fn is_alive(&self, member: Member, now: Nanos) -> bool {
        self.grants.get(&member.node).is_some_and(|g| g.incarnation == member.incarnation && now < g.until)
    }

    /// All leases granted in this leadership.
    pub fn views(&self) -> impl Iterator<Item = LeaseView> + '_ {
        self.grants.iter().map(|(node, g)| LeaseView {
            node: *node,
            incarnation: g.incarnation,
            until: g.until,
        })
    }
}
