//! What must hold of the control plane after every step, whatever fails. Looks at what the nodes publish, and
//! remembers it; never changes anything.
//!
//! - the applied state is the same at the same index, so what is committed never changes;
//! - a node's applied index, epochs, reigns and incarnations only grow [R2];
//! - one epoch differs from the one before by a change that one command may make [R9];
//! - of all nodes at most one serves a volume, until the last lease is over for certain [R1];
//! - a node whose store was replaced or rolled back takes part in nothing [R13].

use std::collections::BTreeMap;
use std::sync::Arc;

use blkrepl_engine::control::{ClusterState, VolumeRecord, codec};
use blkrepl_engine::types::{ClusterId, LogIndex, Member, NodeId, VolumeId};

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Which one: a number of the design's invariants, or a rule.
    pub(crate) what: &'static str,
    /// What was seen.
    pub(crate) text: String,
}

fn broken<T>(what: &'static str, text: String) -> Result<T, Broken> {
    Err(Broken { what, text })
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// All states that were published, by cluster and index.
    states: BTreeMap<(ClusterId, LogIndex), (u64, Arc<ClusterState>)>,
    applied: BTreeMap<(NodeId, ClusterId), LogIndex>,
    /// States that two nodes published.
    pub(crate) compared: u64,
    /// Changes of one epoch by kind.
    pub(crate) changes: BTreeMap<&'static str, u64>,
}

fn hash_of(state: &ClusterState) -> u64 {
    let bytes = codec::encode(state).expect("a state of some kilobytes");
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

impl Checks {
    /// A node published a state.
    pub(crate) fn published(&mut self, node: u64, state: &Arc<ClusterState>) -> Result<(), Broken> {
        let Some(cluster) = state.cluster else { return Ok(()) };
        let index = state.applied;
        if let Err(why) = state.check() {
            return broken("state", format!("node {node} at {index}: {why}"));
        }
        let last = self.applied.entry((NodeId(node), cluster)).or_insert(index);
        if *last > index {
            return broken("applied", format!("node {node} applied {last} and shows {index} now"));
        }
        *last = index;
        self.applied_entry(node, state)
    }

    /// A node applied an entry, and this is the state after it. It may not be durable there yet.
    pub(crate) fn applied_entry(&mut self, node: u64, state: &Arc<ClusterState>) -> Result<(), Broken> {
        let (Some(cluster), index) = (state.cluster, state.applied) else { return Ok(()) };
        let hash = hash_of(state);
        if let Some((known, _)) = self.states.get(&(cluster, index)) {
            self.compared += 1;
            if *known != hash {
                return broken("committed", format!("node {node} has another state at {index}"));
            }
            return Ok(());
        }
        let before = self.states.range(..(cluster, index)).next_back();
        if let Some((_, (_, old))) = before.filter(|((c, _), _)| *c == cluster) {
            let kinds = compare(old, state)?;
            kinds.into_iter().for_each(|kind| *self.changes.entry(kind).or_default() += 1);
        }
        let after = self.states.range((cluster, LogIndex(index.0 + 1))..).next();
        if let Some((_, (_, new))) = after.filter(|((c, _), _)| *c == cluster) {
            compare(state, new)?;
        }
        self.states.insert((cluster, index), (hash, Arc::clone(state)));
        Ok(())
    }

    /// These nodes believe at this moment that they may serve.
    pub(crate) fn serving(&self, volume: VolumeId, who: &[Member]) -> Result<(), Broken> {
        if who.len() > 1 {
            return broken("2", format!("volume {volume} is served by {who:?}"));
        }
        Ok(())
    }
}

/// Compares two states of one cluster, the first older. Gives the kinds of change that took one epoch.
fn compare(old: &ClusterState, new: &ClusterState) -> Result<Vec<&'static str>, Broken> {
    let at = format!("between {} and {}", old.applied, new.applied);
    for (id, node) in &old.nodes {
        let Some(later) = new.nodes.get(id) else {
            if !new.retired.contains(id) {
                return broken("R13", format!("{at}: {id} is gone and not retired"));
            }
            continue;
        };
        if later.store != node.store {
            return broken("R13", format!("{at}: {id} has another store"));
        }
        let boots = (node.incarnation.map(|i| i.boot), later.incarnation.map(|i| i.boot));
        let same = node.incarnation == later.incarnation;
        if !same && boots.0 >= boots.1 {
            return broken("R2", format!("{at}: {id} went from run {boots:?}"));
        }
    }
    if !old.retired.is_subset(&new.retired) {
        return broken("R13", format!("{at}: a retired id is no more"));
    }
    if new.lease_longest < old.lease_longest {
        return broken("R1", format!("{at}: the longest lease shrank"));
    }
    let mut kinds = Vec::new();
    for (id, v) in &old.volumes {
        let Some(later) = new.volumes.get(id) else { continue };
        if later.epoch < v.epoch || later.reign < v.reign || later.index < v.index {
            return broken("epoch", format!("{at}: volume {id} went back"));
        }
        if later.epoch == v.epoch && later != v {
            return broken("epoch", format!("{at}: volume {id} changed within an epoch"));
        }
        if later.epoch == v.epoch.next() {
            match kind_of(v, later) {
                Ok(kind) => kinds.push(kind),
                Err(why) => return broken("R9", format!("{at}: volume {id}: {why}: {v:?} -> {later:?}")),
            }
        }
    }
    Ok(kinds)
}

/// Which change led from one epoch to the next.
fn kind_of(old: &VolumeRecord, new: &VolumeRecord) -> Result<&'static str, &'static str> {
    let nodes = |v: &VolumeRecord| v.in_sync.iter().map(|m| m.node).collect::<Vec<_>>();
    let gone: Vec<_> = old.in_sync.iter().filter(|m| !new.in_sync.contains(m)).collect();
    let come: Vec<_> = new.in_sync.iter().filter(|m| !old.in_sync.contains(m)).collect();
    let moved = old.primary != new.primary;
    if (moved && new.primary.is_some()) != (new.reign.0 == new.epoch.0) && new.lineage == old.lineage {
        return Err("a reign begins with a primary, and only so");
    }
    if new.lineage != old.lineage {
        let forked = new.history.len() == old.history.len() + 1 && new.in_sync.len() == 1;
        return if forked && new.primary.is_some() { Ok("force") } else { Err("a lineage without a force") };
    }
    match (gone.as_slice(), come.as_slice(), moved) {
        ([], [], false) if new.settings != old.settings => Ok("settings"),
        ([], [], false) if new.replicas.len() != old.replicas.len() => Ok("replicas"),
        ([], [], false) => Ok("bump"),
        ([], [], true) if new.primary.is_none() => Ok("demote"),
        ([], [], true) => Ok("promote"),
        ([m], [], false) if Some(**m) != old.primary => Ok("remove"),
        ([], [m], false) if old.member(m.node).is_none() => Ok("join"),
        ([m], [], true) if Some(**m) == old.primary && new.primary.is_some() => Ok("hand over"),
        (_, [m], true)
            if new.in_sync == [**m] && nodes(old).contains(&m.node) && new.primary == Some(**m) =>
        {
            Ok("promote restarted")
        }
        _ => Err("no command makes that change"),
    }
}
