//! Recovery without a quorum, offline, on one node: a new cluster with this node as its only voter
//! [R17, R19].
//!
//! The operator decides that the other voters are gone or are not to be believed. What the cluster state
//! here does not know is lost, so every volume starts a new lineage far above any epoch that the old
//! cluster can have reached. The old voters belong to another cluster from now on and are refused until
//! they are added again. Never run by anything but an operator; no block data is touched.

use std::collections::BTreeMap;
use std::path::Path;

use openraft::Membership;

use crate::types::{ClusterId, Epoch, Incarnation, LineageId, LogIndex, Member, NodeId, Reign, VolumeId};

use super::environment::{Environment, System};
use super::error::ControlError;
use super::raft::{LogId, RaftNode, StoredMembership, Vote};
use super::state::{ClusterState, StoreId, VolumeRecord};
use super::store::{self, DbError, Machine, apply_offline};

/// Distance from the highest known epoch to the epochs of the new cluster. The old cluster, should it live
/// on somewhere, does not get there.
pub const RECOVERED_EPOCH_STEP: u64 = 1 << 32;

/// What a recovery did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverReport {
    /// The cluster that is given up.
    pub old_cluster: Option<ClusterId>,
    /// The new cluster.
    pub cluster: ClusterId,
    /// The new identity of this node's store.
    pub store: StoreId,
    /// Volumes of the new cluster.
    pub volumes: Vec<RecoveredVolume>,
    /// Volumes without a replica here, which the new cluster does not know: id and name.
    pub dropped: Vec<(VolumeId, String)>,
    /// Nodes to add again: id and name.
    pub nodes_lost: Vec<(NodeId, String)>,
}

/// One volume after a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredVolume {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Last epoch of the old lineage that the new one holds for certain; 0 if the replica was not in sync.
    pub fork_epoch: Epoch,
    /// Its epoch now.
    pub epoch: Epoch,
    /// The new lineage.
    pub lineage: LineageId,
    /// This replica was in sync when the old cluster was last heard of. If not, what it lacks is lost, and
    /// only a forced promotion makes it primary.
    pub was_in_sync: bool,
}

/// Makes a new cluster of this node alone. The node must be stopped.
///
/// # Errors
/// The store is missing, in use, refused, or never belonged to a cluster; I/O errors.
pub fn recover_force(dir: &Path, me: NodeId) -> Result<RecoverReport, ControlError> {
    recover_force_in(&System::new(super::boot_time), dir, me)
}

/// As [`recover_force`], in another environment.
///
/// # Errors
/// As there.
pub fn recover_force_in(
    env: &dyn Environment,
    dir: &Path,
    me: NodeId,
) -> Result<RecoverReport, ControlError> {
    let (db, _, boot) = store::open_uncounted(env, dir, me)?;
    let path = store::store_path(env, dir);
    let failed = |e: DbError| e.at(&path);
    let mut machine = db.machine().map_err(failed)?;
    // What was committed for certain counts as well. What only stands in the log may never have been.
    let applied = machine.last_applied.map_or(0, |id| id.index);
    let committed = db.committed().map_err(failed)?.map_or(0, |id| id.index);
    let entries = db.entries(applied + 1..committed.max(applied) + 1).map_err(failed)?;
    apply_offline(&mut machine, entries);
    if !machine.state.nodes.contains_key(&me) {
        return Err(ControlError::Options(format!(
            "{me} never belonged to a cluster, so there is nothing to recover; start it with its founders"
        )));
    }
    let last_term = db.last_entry().map_err(failed)?.map_or(0, |id| id.leader_id.term);
    let vote_term = db.vote().map_err(failed)?.map_or(0, |v| v.leader_id.term);
    let term = last_term.max(vote_term).max(machine.last_applied.map_or(0, |id| id.leader_id.term)) + 1;

    let random = || env.random().map_err(ControlError::io("cannot draw a random number"));
    let cluster = ClusterId(random()?);
    let store = StoreId(random()?);
    let old_cluster = machine.state.cluster;
    let mut report = RecoverReport {
        old_cluster,
        cluster,
        store,
        volumes: Vec::new(),
        dropped: Vec::new(),
        nodes_lost: Vec::new(),
    };
    let mut lineages = Vec::new();
    for _ in 0..machine.state.volumes.len() {
        lineages.push(LineageId(random()?));
    }
    rewrite(&mut machine, cluster, store, me, lineages, &mut report);
    machine.state.check().map_err(|what| ControlError::Damaged { path: path.clone(), what })?;
    store::restart_as(
        env.store_dir(dir).as_ref(),
        &db,
        boot,
        store,
        &machine,
        cluster,
        &Vote::new(term, me.0),
    )?;
    Ok(report)
}

fn rewrite(
    machine: &mut Machine,
    cluster: ClusterId,
    store: StoreId,
    me: NodeId,
    lineages: Vec<LineageId>,
    report: &mut RecoverReport,
) {
    let state: &mut ClusterState = &mut machine.state;
    let addr = state.nodes.get(&me).map(|n| n.addrs.control.clone()).unwrap_or_default();
    state.cluster = Some(cluster);
    state.recent.clear();
    // The lost ones may come back under their ids, with new stores: their replicas keep their slots, so that
    // they need not be copied whole.
    state.retired.clear();
    let (mine, lost): (BTreeMap<_, _>, BTreeMap<_, _>) =
        std::mem::take(&mut state.nodes).into_iter().partition(|(id, _)| *id == me);
    state.nodes = mine;
    report.nodes_lost = lost.into_iter().map(|(id, node)| (id, node.name)).collect();
    if let Some(node) = state.nodes.get_mut(&me) {
        node.store = store;
    }
    // An index of its own, so that the configs before and after do not share one.
    let last = machine.last_applied.unwrap_or_default();
    let next = LogId::new(last.leader_id, last.index + 1);
    machine.last_applied = Some(next);
    state.applied = LogIndex(next.index);
    let volumes = std::mem::take(&mut state.volumes);
    for ((id, volume), lineage) in volumes.into_iter().zip(lineages) {
        match recover_volume(volume, me, lineage, state.applied) {
            Ok((volume, recovered)) => {
                state.volumes.insert(id, volume);
                report.volumes.push(recovered);
            }
            Err(name) => report.dropped.push((id, name)),
        }
    }
    let nodes = BTreeMap::from([(me.0, RaftNode { store, addr })]);
    let membership = Membership::new(vec![[me.0].into()], nodes);
    machine.membership = StoredMembership::new(Some(next), membership);
}

/// Gives the volume's name back if there is no replica of it here.
fn recover_volume(
    mut v: VolumeRecord,
    me: NodeId,
    lineage: LineageId,
    index: LogIndex,
) -> Result<(VolumeRecord, RecoveredVolume), String> {
    if v.replica(me).is_none() {
        return Err(v.name);
    }
    let known_epoch = v.epoch;
    let named = v.member(me);
    // A copy that was not in sync ends at an epoch that nobody here knows, so it shares none for certain:
    // what another replica holds is foreign to it and gets compared [R17].
    let fork_epoch = if named.is_some() { known_epoch } else { Epoch(0) };
    // A run that no superblock records, for a copy that was not in sync: it may have been a member before,
    // and must not be taken for one now. Only a force promotes it [R6].
    let incarnation = named.map_or_else(Incarnation::default, |m| m.incarnation);
    let member = Member { node: me, incarnation };
    v.fork(lineage, fork_epoch);
    v.epoch = Epoch(known_epoch.0.saturating_add(RECOVERED_EPOCH_STEP));
    v.reign = Reign(v.epoch.0);
    v.index = index;
    v.in_sync = vec![member];
    if named.is_none() {
        v.continued_from.clear();
    }
    // An operator who recovers wants the volume served; one that was demoted stays so.
    v.primary = (!v.demoted).then_some(member);
    v.primary_last = Some(member);
    let recovered = RecoveredVolume {
        id: v.id,
        name: v.name.clone(),
        fork_epoch,
        epoch: v.epoch,
        lineage,
        was_in_sync: named.is_some(),
    };
    Ok((v, recovered))
}

#[cfg(test)]
mod tests {
    use crate::types::{LineageFork, ProposalKind};

    use super::super::failover::eligible_restarted;
    use super::super::fixture::{Cluster, member};
    use super::*;

    /// A copy that was a member once and was removed while its node was down still says in its superblock
    /// that it is that member's.
    #[test]
    fn r6_r17_a_copy_that_was_not_in_sync_is_promoted_by_force_only_and_shares_no_epoch_for_certain() {
        let mut c = Cluster::pair();
        let stale = c.report(member(2, 1).incarnation);
        c.propose_ok(member(1, 1), ProposalKind::Remove(member(2, 1)));
        let before = c.vol().clone();
        let (v, report) = recover_volume(before.clone(), NodeId(2), LineageId(9), LogIndex(50)).unwrap();
        assert!(!report.was_in_sync);
        eligible_restarted(&v, v.member(NodeId(2)).unwrap(), &stale).unwrap_err();
        assert_eq!(v.history, [LineageFork { lineage: before.lineage, fork_epoch: Epoch(0) }]);
        assert_eq!(v.epoch.0, before.epoch.0 + RECOVERED_EPOCH_STEP);
        // One that was in sync continues, and shares what is known here.
        let (v, report) = recover_volume(before.clone(), NodeId(1), LineageId(9), LogIndex(50)).unwrap();
        assert!(report.was_in_sync);
        let mine = c.report(member(1, 1).incarnation);
        eligible_restarted(&v, v.member(NodeId(1)).unwrap(), &mine).unwrap();
        assert_eq!(v.history, [LineageFork { lineage: before.lineage, fork_epoch: before.epoch }]);
    }
}
