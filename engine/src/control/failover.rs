//! The failover controller: what the leader proposes when a primary's lease is gone. Pure; the leader
//! calls it every tick under the lock of its lease table and carries out what it says.
//!
//! It never promotes outside the in-sync set, never anything while a volume is demoted, and knows no rule
//! that prefers a former primary (only as the last tie-break after every member restarted [R6]). Where it
//! can do nothing it says why, for operators.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::mutation::{Mutation, mutated};
use crate::types::{Epoch, Health, Member, Nanos, NodeId, ReplicaReport, SuperblockTrust, VolumeId};

use super::command::ClusterOp;
use super::lease::{LeaseTable, with_drift};
use super::state::{ClusterState, VolumeRecord};

/// After every member restarted and the first eligible one was seen, how long the others get to show up,
/// because one of them may be the better choice.
pub const RESTART_WAIT: Duration = Duration::from_secs(2);

/// What one replica said of itself with its node's last renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeReport {
    /// Whether it works.
    pub health: Health,
    /// What its superblock records.
    pub report: ReplicaReport,
}

/// What one node said with its last renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeReport {
    /// The run that said it.
    pub member: Member,
    /// Its replicas.
    pub volumes: BTreeMap<VolumeId, VolumeReport>,
}

/// Last renewals by node. Those of older runs and of nodes without a lease do not count.
pub type Reports = BTreeMap<NodeId, NodeReport>;

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Decisions {
    /// Changes of primary to propose. Each replaces a primary whose lease is over.
    pub proposals: Vec<ClusterOp>,
    /// Why a volume without a live primary stays without one.
    pub blocked: BTreeMap<VolumeId, String>,
}

/// The controller. Remembers only since when it waits for members that restarted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Failover {
    waiting: BTreeMap<VolumeId, (Epoch, Nanos)>,
}

impl Failover {
    /// Decides for all volumes.
    pub fn decide(
        &mut self,
        state: &ClusterState,
        leases: &LeaseTable,
        reports: &Reports,
        now: Nanos,
    ) -> Decisions {
        let mut out = Decisions::default();
        self.waiting.retain(|id, (epoch, _)| state.volumes.get(id).is_some_and(|v| v.epoch == *epoch));
        for volume in state.volumes.values() {
            let Some(primary) = volume.primary else { continue };
            if !leases.lease_over(state, volume.id, primary, now) {
                continue;
            }
            match self.decide_volume(state, leases, reports, volume, now) {
                Ok(op) => out.proposals.push(op),
                Err(why) => {
                    out.blocked.insert(volume.id, why);
                }
            }
        }
        out
    }

    /// As `LeaseTable::age`, for the model.
    #[cfg(test)]
    pub(super) fn age(&mut self, by: Duration) {
        for (_, since) in self.waiting.values_mut() {
            *since = since.before(by);
        }
    }

    fn decide_volume(
        &mut self,
        state: &ClusterState,
        leases: &LeaseTable,
        reports: &Reports,
        volume: &VolumeRecord,
        now: Nanos,
    ) -> Result<ClusterOp, String> {
        if let Some(to) = alive_member(state, leases, reports, volume, now) {
            return Ok(ClusterOp::Promote {
                volume: volume.id,
                expected_epoch: volume.epoch,
                to,
                operator: false,
            });
        }
        if let Some(missing) = volume.in_sync.iter().find(|m| !state.has_restarted(**m)) {
            return Err(why_not_alive(state, reports, volume, *missing));
        }
        let to = self.choose_restarted(state, leases, reports, volume, now)?;
        Ok(ClusterOp::PromoteRestarted {
            volume: volume.id,
            expected_epoch: volume.epoch,
            to,
            operator: false,
        })
    }

    /// [R6]: every member restarted. Waits a little so that the best one can show up.
    fn choose_restarted(
        &mut self,
        state: &ClusterState,
        leases: &LeaseTable,
        reports: &Reports,
        volume: &VolumeRecord,
        now: Nanos,
    ) -> Result<Member, String> {
        let mut reported = 0;
        let mut best: Option<((bool, bool, bool), Member)> = None;
        let mut refused = Vec::new();
        for named in &volume.in_sync {
            let Some((to, said)) = current(state, leases, reports, volume.id, named.node, now) else {
                refused.push(format!("{} has not reported", state.node_label(named.node)));
                continue;
            };
            // One that is not healthy may have only just started: it counts as heard when it is.
            reported += usize::from(said.health == Health::Healthy);
            if let Err(why) = eligible_restarted(volume, *named, said) {
                refused.push(format!("{}: {why}", state.node_label(named.node)));
                continue;
            }
            let was_primary = volume.primary_last.is_some_and(|p| p.node == named.node);
            let merit = (said.report.same_os_boot, said.report.clean, was_primary);
            // Members are sorted by node; only more merit displaces, so ties go to the lowest node.
            if best.is_none_or(|(most, _)| merit > most) {
                best = Some((merit, to));
            }
        }
        let Some((_, to)) = best else {
            self.waiting.remove(&volume.id);
            return Err(format!(
                "every member restarted and none is eligible ({}); bring one back, or force one",
                refused.join("; ")
            ));
        };
        let (_, since) = *self.waiting.entry(volume.id).or_insert((volume.epoch, now));
        if reported < volume.in_sync.len() && now < since.after(RESTART_WAIT) {
            return Err(format!("every member restarted; waiting for the others ({})", refused.join("; ")));
        }
        Ok(to)
    }
}

/// What a node's newest run says of its replica, if it has a lease.
fn current<'r>(
    state: &ClusterState,
    leases: &LeaseTable,
    reports: &'r Reports,
    volume: VolumeId,
    node: NodeId,
    now: Nanos,
) -> Option<(Member, &'r VolumeReport)> {
    let report = reports.get(&node)?;
    let ok = state.is_newest(report.member) && leases.is_alive(report.member, now);
    Some((report.member, report.volumes.get(&volume).filter(|_| ok)?))
}

/// A member other than the primary whose named run is alive and healthy: first one that renewed lately,
/// then the lowest node.
fn alive_member(
    state: &ClusterState,
    leases: &LeaseTable,
    reports: &Reports,
    volume: &VolumeRecord,
    now: Nanos,
) -> Option<Member> {
    let usable = |m: &&Member| {
        volume.primary != Some(**m)
            && current(state, leases, reports, volume.id, m.node, now)
                .is_some_and(|(run, said)| run == **m && said.health == Health::Healthy)
    };
    let soon = now.after(with_drift(state.lease) / 2);
    volume.in_sync.iter().filter(usable).min_by_key(|m| (!leases.is_alive(**m, soon), m.node)).copied()
}

/// [R6, R16]: whether a restarted member's content is known to be that of the member `named`.
///
/// # Errors
/// Why it is not.
pub fn eligible_restarted(volume: &VolumeRecord, named: Member, said: &VolumeReport) -> Result<(), String> {
    let report = &said.report;
    if let Health::Unhealthy(why) = &said.health {
        return Err(format!("is unhealthy: {why}"));
    }
    if mutated(Mutation::R6) {
        return Ok(());
    }
    if report.inconsistent {
        return Err("was in the middle of a resync".into());
    }
    let matches =
        (report.epoch, report.reign, report.lineage) == (volume.epoch, volume.reign, volume.lineage);
    match report.trust {
        SuperblockTrust::Sound => {}
        SuperblockTrust::Doubtful if matches => {}
        SuperblockTrust::Doubtful => {
            return Err("has a doubtful superblock that does not match the config".into());
        }
        SuperblockTrust::None => return Err("has no valid superblock".into()),
    }
    let continues = |run| run == named.incarnation || volume.continued_from.contains(&run);
    match report.member {
        Some(run) if continues(run) => Ok(()),
        Some(run) => Err(format!("holds the content of run {run}, in sync is run {}", named.incarnation)),
        None => Err("holds content that is not in sync".into()),
    }
}

fn why_not_alive(state: &ClusterState, reports: &Reports, volume: &VolumeRecord, missing: Member) -> String {
    let name = state.node_label(missing.node);
    let said = reports.get(&missing.node).filter(|r| r.member == missing);
    let health = said.and_then(|r| r.volumes.get(&volume.id)).map(|v| &v.health);
    match health {
        Some(Health::Unhealthy(why)) => format!(
            "{name} is in sync but unhealthy ({why}) and no other member can take over; repair it, or force"
        ),
        _ => format!(
            "{name} is in sync as run {} and does not answer; bring it back, or force another replica",
            missing.incarnation
        ),
    }
}
