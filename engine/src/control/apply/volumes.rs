//! The rules about volumes: who may change what [R2, R6, R9, R10, R17, R18, R25].

use crate::mutation::{Mutation, mutated};
use crate::types::{
    Epoch, Geometry, LineageId, LogIndex, Member, NodeId, Proposal, ProposalKind, REPLICAS_MAX, Reign,
    ReplicaSlot, ReplicaView, SlotSet, VolumeId, VolumeSettings,
};

use super::super::command::{ClusterOp, Prepared};
use super::super::state::{ClusterState, NodeKind, VOLUMES_MAX, VolumeRecord, check_settings};
use super::nodes::check_name;
use super::{Effect, Refusal};

/// Earlier incarnations remembered of a member that was promoted after restarts.
const CONTINUED_MAX: usize = 16;

pub(super) fn apply(state: &mut ClusterState, index: LogIndex, op: ClusterOp) -> Effect {
    match op {
        ClusterOp::CreateVolume { id, name, geometry, settings, replicas, first, lineage } => {
            let new = New { id, name, geometry, settings, replicas, first, lineage };
            create(state, index, new)
        }
        ClusterOp::DeleteVolume { volume, expected_epoch } => {
            expect(state, volume, expected_epoch)?;
            state.volumes.remove(&volume);
            Ok(None)
        }
        ClusterOp::AddReplica { volume, expected_epoch, node } => {
            change(state, index, volume, expected_epoch, |state, v| add_replica(state, v, node))
        }
        ClusterOp::RemoveReplica { volume, expected_epoch, node } => {
            change(state, index, volume, expected_epoch, |_, v| remove_replica(v, node))
        }
        ClusterOp::Propose(p) => change(state, index, p.volume, p.expected_epoch, |s, v| propose(s, v, &p)),
        ClusterOp::Promote { volume, expected_epoch, to, operator } => {
            change(state, index, volume, expected_epoch, |s, v| promote(s, v, to, operator))
        }
        ClusterOp::PromoteRestarted { volume, expected_epoch, to, operator } => {
            change(state, index, volume, expected_epoch, |s, v| promote_restarted(s, v, to, operator))
        }
        ClusterOp::ForcePromote { volume, expected_epoch, to, lineage, fork_epoch } => {
            change(state, index, volume, expected_epoch, |s, v| force(s, v, to, lineage, fork_epoch))
        }
        ClusterOp::Resize { volume, expected_epoch, size, prepared } => {
            change(state, index, volume, expected_epoch, |_, v| resize(v, size, &prepared))
        }
        ClusterOp::ChangeSettings { volume, expected_epoch, settings } => {
            change(state, index, volume, expected_epoch, |_, v| {
                check_settings(&settings)?;
                v.settings = settings;
                Ok(())
            })
        }
        ClusterOp::InitCluster { .. }
        | ClusterOp::Register { .. }
        | ClusterOp::AddNode(_)
        | ClusterOp::RemoveNode { .. }
        | ClusterOp::Attach { .. }
        | ClusterOp::Detach { .. }
        | ClusterOp::Evict { .. }
        | ClusterOp::Share { .. }
        | ClusterOp::SetLease { .. } => unreachable!("not a command about a volume's config"),
    }
}

/// Compare-and-set: finds the volume at exactly the epoch expected.
fn expect(state: &ClusterState, volume: VolumeId, expected: Epoch) -> Result<&VolumeRecord, Refusal> {
    let Some(record) = state.volumes.get(&volume) else {
        return Err(format!("volume {volume} does not exist"));
    };
    if record.epoch != expected {
        return Err(format!(
            "volume {} is at epoch {}, the request expects {expected}; look again and retry",
            record.name, record.epoch
        ));
    }
    Ok(record)
}

/// Runs one change on a copy and, if it is not refused, counts the epoch up and puts the copy in place.
/// A change that moved the primary begins a reign; any change but another restart promotion ends the
/// chain of incarnations that the sole member continues.
fn change(
    state: &mut ClusterState,
    index: LogIndex,
    volume: VolumeId,
    expected: Epoch,
    body: impl FnOnce(&ClusterState, &mut VolumeRecord) -> Result<(), Refusal>,
) -> Effect {
    let before = expect(state, volume, expected)?;
    let mut record = before.clone();
    record.continued_from.clear();
    body(state, &mut record)?;
    record.epoch = before.epoch.next();
    record.index = index;
    if record.primary.is_some() && record.primary != before.primary {
        record.reign = Reign(record.epoch.0);
        record.primary_last = record.primary;
    }
    let epoch = record.epoch;
    state.volumes.insert(volume, record);
    Ok(Some(epoch))
}

struct New {
    id: VolumeId,
    name: String,
    geometry: Geometry,
    settings: VolumeSettings,
    replicas: Vec<NodeId>,
    first: Member,
    lineage: LineageId,
}

fn create(state: &mut ClusterState, index: LogIndex, new: New) -> Effect {
    check_name("volume", &new.name)?;
    if state.volumes.contains_key(&new.id) {
        return Err(format!("volume {} exists; its id is never reused", new.id));
    }
    if state.volume_by_name(&new.name).is_some() {
        return Err(format!("a volume named {} exists; choose another name", new.name));
    }
    if state.volumes.len() >= VOLUMES_MAX {
        return Err(format!("the cluster has its maximum of {VOLUMES_MAX} volumes"));
    }
    check_settings(&new.settings)?;
    let g = new.geometry;
    Geometry::new(g.size(), g.block_size(), g.region_size()).map_err(|e| e.to_string())?;
    let mut nodes = new.replicas;
    nodes.sort_unstable();
    nodes.dedup();
    if nodes.len() > REPLICAS_MAX {
        return Err(format!("a volume has at most {REPLICAS_MAX} replicas"));
    }
    if !nodes.contains(&new.first.node) {
        return Err(format!("{} is to be the first member but holds no replica", new.first.node));
    }
    nodes.iter().try_for_each(|node| check_data_node(state, *node))?;
    check_newest(state, new.first)?;
    let mut slots_used = SlotSet::default();
    let mut replicas = Vec::with_capacity(nodes.len());
    for (slot, node) in (0u8..).map(ReplicaSlot).zip(nodes) {
        slots_used.insert(slot);
        let last_member = (node == new.first.node).then_some(new.first.incarnation);
        replicas.push(ReplicaView { node, slot, last_member });
    }
    let record = VolumeRecord {
        id: new.id,
        name: new.name,
        geometry: new.geometry,
        settings: new.settings,
        replicas,
        slots_used,
        epoch: Epoch(1),
        reign: Reign(1),
        primary: Some(new.first),
        primary_last: Some(new.first),
        demoted: false,
        in_sync: vec![new.first],
        continued_from: Vec::new(),
        lineage: new.lineage,
        history: Vec::new(),
        index,
        shared: false,
        attached: None,
        evicted: None,
    };
    state.volumes.insert(record.id, record);
    Ok(Some(Epoch(1)))
}

fn check_data_node(state: &ClusterState, node: NodeId) -> Result<(), Refusal> {
    match state.nodes.get(&node) {
        None => Err(format!("{node} is not in this cluster")),
        Some(record) if record.kind == NodeKind::Witness => {
            Err(format!("{node} is a witness and holds no replicas; choose a data node"))
        }
        Some(_) => Ok(()),
    }
}

/// [R2, R10]: only the newest registered run of a node may enter a config.
fn check_newest(state: &ClusterState, member: Member) -> Result<(), Refusal> {
    match state.newest(member.node) {
        Some(newest) if newest == member.incarnation || mutated(Mutation::R2) => Ok(()),
        Some(newest) => Err(format!(
            "{} runs as {newest} now, the request names run {}; look again and retry",
            member.node, member.incarnation
        )),
        None => Err(format!("{} has not registered; start it first", member.node)),
    }
}

fn check_member(v: &VolumeRecord, member: Member) -> Result<(), Refusal> {
    match v.member(member.node) {
        Some(named) if named == member || mutated(Mutation::R10) => Ok(()),
        Some(named) => Err(format!(
            "{} is in sync as run {}, the request names run {}",
            member.node, named.incarnation, member.incarnation
        )),
        None => Err(format!("{} is not in the in-sync set of volume {}", member.node, v.name)),
    }
}

fn insert_member(v: &mut VolumeRecord, member: Member) -> Result<(), Refusal> {
    let Some(replica) = v.replicas.iter_mut().find(|r| r.node == member.node) else {
        return Err(format!("{} holds no replica of volume {}", member.node, v.name));
    };
    replica.last_member = Some(member.incarnation);
    v.in_sync.push(member);
    v.in_sync.sort_unstable();
    Ok(())
}

fn add_replica(state: &ClusterState, v: &mut VolumeRecord, node: NodeId) -> Result<(), Refusal> {
    check_data_node(state, node)?;
    if v.replica(node).is_some() {
        return Err(format!("{node} holds a replica of volume {} already", v.name));
    }
    let Some(slot) = v.free_slot() else {
        return Err(format!(
            "volume {} has given out all of its {REPLICAS_MAX} replica slots, and none is reused",
            v.name
        ));
    };
    v.slots_used.insert(slot);
    v.replicas.push(ReplicaView { node, slot, last_member: None });
    v.replicas.sort_unstable_by_key(|r| r.node);
    Ok(())
}

fn remove_replica(v: &mut VolumeRecord, node: NodeId) -> Result<(), Refusal> {
    if v.replica(node).is_none() {
        return Err(format!("{node} holds no replica of volume {}", v.name));
    }
    if v.member(node).is_some() {
        return Err(format!("{node} is in sync for volume {}; stop it first, or move the primary", v.name));
    }
    v.replicas.retain(|r| r.node != node);
    Ok(())
}

/// [R9]: only the named run of the primary changes membership, and only while no newer run of its node
/// registered.
fn propose(state: &ClusterState, v: &mut VolumeRecord, p: &Proposal) -> Result<(), Refusal> {
    if v.primary != Some(p.by) {
        let who = v.primary.map_or("nobody".into(), |m| format!("{} run {}", m.node, m.incarnation));
        return Err(format!(
            "the primary of volume {} is {who}, not {} run {}",
            v.name, p.by.node, p.by.incarnation
        ));
    }
    check_newest(state, p.by)?;
    match p.kind {
        ProposalKind::Remove(m) => {
            check_member(v, m)?;
            if m.node == p.by.node {
                return Err("a primary cannot remove itself; it hands over".into());
            }
            v.in_sync.retain(|x| *x != m);
        }
        ProposalKind::Join(m) => {
            check_newest(state, m)?;
            if let Some(named) = v.member(m.node) {
                return Err(format!(
                    "{} is in sync already, as run {}; that one must be removed first",
                    m.node, named.incarnation
                ));
            }
            insert_member(v, m)?;
        }
        ProposalKind::Move(to) => take_role(state, v, to)?,
        ProposalKind::HandOver(to) => {
            take_role(state, v, to)?;
            v.in_sync.retain(|x| *x != p.by);
        }
        ProposalKind::Demote => {
            v.primary = None;
            v.demoted = true;
        }
        ProposalKind::Bump => {}
    }
    Ok(())
}

fn take_role(state: &ClusterState, v: &mut VolumeRecord, to: Member) -> Result<(), Refusal> {
    if v.primary == Some(to) {
        return Err(format!("{} is the primary of volume {} already", to.node, v.name));
    }
    check_member(v, to)?;
    check_newest(state, to)?;
    v.primary = Some(to);
    v.demoted = false;
    Ok(())
}

fn check_demoted(v: &VolumeRecord, operator: bool) -> Result<(), Refusal> {
    if v.demoted && !operator {
        return Err(format!(
            "volume {} was demoted by an operator; only `promote` gives it a primary",
            v.name
        ));
    }
    Ok(())
}

fn promote(state: &ClusterState, v: &mut VolumeRecord, to: Member, operator: bool) -> Result<(), Refusal> {
    check_demoted(v, operator)?;
    take_role(state, v, to)
}

/// [R6]: after every member restarted, one of their new runs takes over alone. A demoted volume was
/// drained and flushed on all members before, so there a restarted member holds everything as well.
fn promote_restarted(
    state: &ClusterState,
    v: &mut VolumeRecord,
    to: Member,
    operator: bool,
) -> Result<(), Refusal> {
    check_demoted(v, operator)?;
    let still = v.in_sync.iter().find(|m| !state.has_restarted(**m));
    if let Some(m) = still
        && !v.demoted
    {
        return Err(format!(
            "{} is in sync as run {} and is not known to have restarted; wait for it, or force",
            m.node, m.incarnation
        ));
    }
    let Some(named) = v.member(to.node) else {
        return Err(format!("{} is not in the in-sync set of volume {}", to.node, v.name));
    };
    if !state.has_restarted(named) {
        return Err(format!("{} has not restarted; promote the run that is in sync", to.node));
    }
    check_newest(state, to)?;
    let chain = v.in_sync.len() == 1;
    let mut continued = if chain { expect(state, v.id, v.epoch)?.continued_from.clone() } else { Vec::new() };
    continued.push(named.incarnation);
    if continued.len() > CONTINUED_MAX {
        continued.remove(0);
    }
    v.in_sync.clear();
    insert_member(v, to)?;
    v.continued_from = continued;
    v.primary = Some(to);
    v.demoted = false;
    Ok(())
}

/// [R17]: an operator's choice, recorded as a fork of the lineage.
fn force(
    state: &ClusterState,
    v: &mut VolumeRecord,
    to: Member,
    lineage: LineageId,
    fork_epoch: Epoch,
) -> Result<(), Refusal> {
    check_newest(state, to)?;
    if v.lineage == lineage || v.history.iter().any(|fork| fork.lineage == lineage) {
        return Err(format!("lineage {lineage} is not new; draw another and retry"));
    }
    if fork_epoch > v.epoch {
        return Err(format!("fork epoch {fork_epoch} lies beyond the volume's epoch {}", v.epoch));
    }
    if !mutated(Mutation::R17) {
        v.fork(lineage, fork_epoch);
    }
    v.in_sync.clear();
    insert_member(v, to)?;
    // Clear it first, so that a force onto the primary itself begins a reign, too.
    v.primary = Some(to);
    v.demoted = false;
    v.reign = Reign(v.epoch.next().0);
    v.primary_last = Some(to);
    Ok(())
}

/// [R25]: grow only, and only with every member ready for it.
fn resize(v: &mut VolumeRecord, size: u64, prepared: &[Prepared]) -> Result<(), Refusal> {
    let old = v.geometry;
    if size <= old.size() {
        return Err(format!("volume {} has {} bytes and only grows; ask for more", v.name, old.size()));
    }
    for m in &v.in_sync {
        let ready = prepared.iter().find(|p| p.member == *m).map_or(0, |p| p.size);
        if ready < size && !mutated(Mutation::R25) {
            return Err(format!(
                "{} is ready for {ready} bytes, not for {size}; prepare space and metadata on it first",
                m.node
            ));
        }
    }
    v.geometry = Geometry::new(size, old.block_size(), old.region_size()).map_err(|e| e.to_string())?;
    Ok(())
}
