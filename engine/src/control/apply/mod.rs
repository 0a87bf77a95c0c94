//! Applies a command to the cluster state. Pure: the same state, index and command give the same result
//! on every node and in the simulator.
//!
//! A command takes effect whole or not at all; a refusal is a value with a reason. Every change of a
//! volume counts its epoch up by one; a change of primary sets the reign to the new epoch. The volume
//! rules stand in [`volumes`], the node rules in [`nodes`], those about clients, which change no config and no
//! epoch, in [`clients`].

mod clients;
mod nodes;
#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod tests;
mod volumes;

use crate::mutation::{Mutation, mutated};
use crate::types::{Epoch, LogIndex, Reign};

use super::command::{Applied, ClusterOp, Command, Leadership, RequestId};
use super::state::{ClusterState, PROPOSALS_REMEMBERED_MAX, REQUESTS_REMEMBERED_MAX};

/// Reason of a refusal.
type Refusal = String;
/// The epoch after the change, for commands about a volume that still exists.
type Effect = Result<Option<Epoch>, Refusal>;

/// Applies one committed command. Returns the remembered result if this request was applied before.
pub fn apply(state: &mut ClusterState, index: LogIndex, command: Command) -> Applied {
    state.applied = index;
    let request = command.request;
    let known = state.recent.get(&request.node).and_then(|r| r.iter().find(|(id, _)| *id == request));
    if let Some((_, applied)) = known {
        return applied.clone();
    }
    let applied = match apply_op(state, index, command.op) {
        Ok(epoch) => Applied::Done { index, epoch },
        Err(reason) => Applied::Refused(reason),
    };
    debug_assert_eq!(state.check(), Ok(()), "a command broke an invariant of the cluster state");
    remember(state, command.request, applied.clone());
    applied
}

/// Applies one committed command written under `leadership`. `None` if the command was judged under
/// another one: it has no effect, and because nothing is remembered its request may be tried again [R1].
pub fn apply_under(
    state: &mut ClusterState,
    index: LogIndex,
    leadership: Leadership,
    command: Command,
) -> Option<Applied> {
    if command.only_under.is_some_and(|wanted| wanted != leadership) {
        state.applied = index;
        return None;
    }
    let applied = apply(state, index, command);
    if mutated(Mutation::FenceByTerm) {
        fence_by_term(state, index, leadership);
    }
    Some(applied)
}

/// Only for the mutation of that name: whoever takes over does so in the reign of the Raft term.
fn fence_by_term(state: &mut ClusterState, index: LogIndex, leadership: Leadership) {
    for v in state.volumes.values_mut().filter(|v| v.index == index && v.reign.0 == v.epoch.0) {
        v.reign = Reign(leadership.term.min(v.epoch.0));
    }
}

fn remember(state: &mut ClusterState, request: RequestId, applied: Applied) {
    // Only nodes of the cluster leave a trace, so that the memory is bounded. The very first command
    // makes its own node one.
    if !state.nodes.contains_key(&request.node) {
        state.recent.remove(&request.node);
        return;
    }
    // What the node itself asks and what each of its replicas proposes is bounded apart, so that no other
    // volume's requests make a result forgotten while a replica still asks for it: a retry that met a
    // changed epoch would be told "refused" of a change that took effect [R18].
    let volumes = &state.volumes;
    let origin = |id: &RequestId| id.volume.filter(|volume| volumes.contains_key(volume));
    let mine = origin(&request);
    let max = if mine.is_some() { PROPOSALS_REMEMBERED_MAX } else { REQUESTS_REMEMBERED_MAX };
    let results = state.recent.entry(request.node).or_default();
    // A volume that was deleted left its requests to the node.
    while results.iter().filter(|(id, _)| origin(id) == mine).count() >= max {
        let oldest = results.iter().position(|(id, _)| origin(id) == mine);
        oldest.and_then(|at| results.remove(at));
    }
    results.push_back((request, applied));
}

fn apply_op(state: &mut ClusterState, index: LogIndex, op: ClusterOp) -> Effect {
    if !matches!(op, ClusterOp::InitCluster { .. }) && state.cluster.is_none() {
        return Err("the cluster is not initialised yet; wait until its founders have met".into());
    }
    match op {
        ClusterOp::InitCluster { cluster, lease, nodes } => nodes::init_cluster(state, cluster, lease, nodes),
        ClusterOp::Register { node, incarnation, os_boot, addrs } => {
            nodes::register(state, node, incarnation, os_boot, addrs)
        }
        ClusterOp::AddNode(record) => nodes::add(state, record),
        ClusterOp::RemoveNode { node } => nodes::remove(state, node),
        ClusterOp::SetLease { lease } => nodes::set_lease(state, lease),
        ClusterOp::Attach { volume, client, by } => clients::attach(state, index, volume, client, by),
        ClusterOp::Detach { volume, attachment, by } => clients::detach(state, volume, &attachment, by),
        ClusterOp::Evict { volume, client } => clients::evict(state, volume, client),
        ClusterOp::Share { volume, shared } => clients::share(state, volume, shared),
        op => volumes::apply(state, index, op),
    }
}
