//! The rules about nodes, registrations and leases.

use std::time::Duration;

use crate::types::{ClusterId, Incarnation, NodeId};

use super::super::state::{
    ADDR_LEN_MAX, ClusterState, LEASE_MAX, LEASE_MIN, NAME_LEN_MAX, NODES_MAX, NodeAddrs, NodeRecord,
};
use super::{Effect, Refusal};

/// Checks a name that an operator chose.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), Refusal> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_LEN_MAX || !name.chars().all(ok) {
        return Err(format!(
            "{what} name must be 1 to {NAME_LEN_MAX} letters, digits, '-', '_' or '.'; choose another"
        ));
    }
    Ok(())
}

fn check_addrs(addrs: &NodeAddrs) -> Result<(), Refusal> {
    if [&addrs.control, &addrs.peer, &addrs.nbd].iter().any(|a| a.len() > ADDR_LEN_MAX) {
        return Err(format!("an address is longer than {ADDR_LEN_MAX} bytes; check the node's config"));
    }
    Ok(())
}

fn check_lease(lease: Duration) -> Result<(), Refusal> {
    if !(LEASE_MIN..=LEASE_MAX).contains(&lease) {
        return Err(format!("lease {lease:?} is not between {LEASE_MIN:?} and {LEASE_MAX:?}"));
    }
    Ok(())
}

fn check_new(state: &ClusterState, record: &NodeRecord) -> Result<(), Refusal> {
    let id = record.id;
    check_name("node", &record.name)?;
    check_addrs(&record.addrs)?;
    if id == NodeId(0) {
        return Err("node ids start at 1".into());
    }
    if state.retired.contains(&id) {
        return Err(format!("{id} was removed and an id is never reused; choose another id"));
    }
    if let Some(old) = state.nodes.get(&id) {
        return Err(format!(
            "{id} exists with store {}; if it lost its disk, remove it and add it under a new id",
            old.store
        ));
    }
    if state.node_by_name(&record.name).is_some() {
        return Err(format!("a node named {} exists; choose another name", record.name));
    }
    if state.nodes.len() >= NODES_MAX {
        return Err(format!("the cluster has its maximum of {NODES_MAX} nodes"));
    }
    Ok(())
}

pub(super) fn init_cluster(
    state: &mut ClusterState,
    cluster: ClusterId,
    lease: Duration,
    nodes: Vec<NodeRecord>,
) -> Effect {
    if let Some(old) = state.cluster {
        return Err(format!("the cluster is initialised already, as {old}"));
    }
    check_lease(lease)?;
    if nodes.is_empty() {
        return Err("a cluster needs at least one node".into());
    }
    let mut next = ClusterState { cluster: Some(cluster), lease, lease_longest: lease, ..state.clone() };
    for mut record in nodes {
        check_new(&next, &record)?;
        record.incarnation = None;
        next.nodes.insert(record.id, record);
    }
    *state = next;
    Ok(None)
}

/// A newer run replaces the older; an older one, or another with the same counter, is refused: it comes
/// from a store that was rolled back or copied [R2, R10, R13].
pub(super) fn register(
    state: &mut ClusterState,
    node: NodeId,
    incarnation: Incarnation,
    os_boot: u128,
    addrs: NodeAddrs,
) -> Effect {
    check_addrs(&addrs)?;
    let Some(record) = state.nodes.get_mut(&node) else {
        return Err(format!("{node} is not in this cluster; add it with `blkrepl node add`"));
    };
    if let Some(newest) = record.incarnation
        && newest != incarnation
        && newest.boot >= incarnation.boot
    {
        return Err(format!(
            "{node} registered run {newest} already, so run {incarnation} is from a store that was rolled \
             back or copied; remove the node and add it under a new id"
        ));
    }
    record.incarnation = Some(incarnation);
    record.os_boot = os_boot;
    record.addrs = addrs;
    Ok(None)
}

pub(super) fn add(state: &mut ClusterState, mut record: NodeRecord) -> Effect {
    check_new(state, &record)?;
    record.incarnation = None;
    state.nodes.insert(record.id, record);
    Ok(None)
}

pub(super) fn remove(state: &mut ClusterState, node: NodeId) -> Effect {
    if !state.nodes.contains_key(&node) {
        return Err(format!("{node} is not in this cluster"));
    }
    if let Some(volume) = state.volumes.values().find(|v| v.replica(node).is_some()) {
        return Err(format!("{node} holds a replica of volume {}; remove the replica first", volume.name));
    }
    if state.nodes.len() == 1 {
        return Err(format!("{node} is the last node of the cluster"));
    }
    state.nodes.remove(&node);
    state.recent.remove(&node);
    state.retired.insert(node);
    Ok(None)
}

pub(super) fn set_lease(state: &mut ClusterState, lease: Duration) -> Effect {
    check_lease(lease)?;
    state.lease = lease;
    state.lease_longest = state.lease_longest.max(lease);
    Ok(None)
}
