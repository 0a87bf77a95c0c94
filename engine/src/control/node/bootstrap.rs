//! Founding a cluster: once, by the data founder with the lowest id, after it has reached all founders and
//! found that none of them belongs to a cluster.
//!
//! A founder that lost its disk never founds anew, because the others still belong to the cluster [R13].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::types::{ClusterId, NodeId};

use super::super::command::{ClusterOp, Command};
use super::super::raft::RaftNode;
use super::super::runtime::{sleep, timeout};
use super::super::state::{NodeKind, NodeRecord};
use super::inner::Inner;

/// Pause between two rounds.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a founder may take to say who it is.
const IDENTIFY_DEADLINE: Duration = Duration::from_millis(500);
/// How long the first command may take before it is tried again.
const FIRST_COMMAND_DEADLINE: Duration = Duration::from_secs(2);
/// How often a founder that cannot found says why.
const SAY_EVERY: u32 = 50;

/// Founds the cluster if it is this node's task.
pub(super) async fn found(inner: Arc<Inner>) {
    let founders = &inner.options.founders;
    let first = founders.iter().filter(|f| f.kind == NodeKind::Data).map(|f| f.id).min();
    if first != Some(inner.me) {
        return;
    }
    for round in 0u32.. {
        if !matches!(inner.raft.is_initialized().await, Ok(false)) {
            return;
        }
        match reach(&inner).await {
            Ok(members) => {
                if let Err(why) = initialise(&inner, members).await {
                    tracing::error!(why, "could not found the cluster");
                } else {
                    return;
                }
            }
            Err(why) if round % SAY_EVERY == 0 => {
                tracing::info!(node = inner.me.0, why, "cannot found the cluster yet");
            }
            Err(_) => {}
        }
        sleep(PAUSE).await;
    }
}

async fn reach(inner: &Inner) -> Result<BTreeMap<u64, RaftNode>, String> {
    let me = inner.peers.me();
    let mut members = BTreeMap::new();
    for founder in &inner.options.founders {
        let sender = if founder.id == inner.me {
            me
        } else {
            inner.peers.identify(founder.id, IDENTIFY_DEADLINE).await.map_err(|e| e.to_string())?
        };
        if sender.node != founder.id {
            return Err(format!("at {} is {}, not {}", founder.addrs.control, sender.node, founder.id));
        }
        // A crash between adopting its own new cluster and initialising leaves this node alone with one.
        if founder.id != inner.me
            && let Some(cluster) = sender.cluster
            && me.cluster != Some(cluster)
        {
            return Err(format!(
                "{} belongs to cluster {cluster} already; if this node lost its disk, remove it there and add \
                 it under a new id",
                founder.id
            ));
        }
        members.insert(founder.id.0, RaftNode { store: sender.store, addr: founder.addrs.control.clone() });
    }
    Ok(members)
}

async fn initialise(inner: &Inner, members: BTreeMap<u64, RaftNode>) -> Result<(), String> {
    if inner.peers.me().cluster.is_none() {
        let cluster = ClusterId(inner.env.random().map_err(|e| e.to_string())?);
        let Some(store) = inner.store() else { return Err("the node is stopping".into()) };
        store.run(move |db| db.adopt_cluster(cluster)).await.map_err(|e| e.to_string())?;
        inner.peers.set_cluster(cluster);
    }
    inner.raft.initialize(members).await.map_err(|e| e.to_string())
}

impl Inner {
    /// As leader of a cluster whose state is still empty, writes its first command. Any leader may: what it
    /// says follows from the membership, the config and the adopted cluster id.
    pub(super) async fn found_state(&self) {
        let (state, me) = (self.current(), self.peers.me());
        let (None, Some(cluster)) = (state.cluster, me.cluster) else { return };
        let stored = Arc::clone(&self.raft.metrics().borrow().membership_config);
        let nodes = stored.nodes().filter_map(|(id, node)| {
            let founder = self.options.founders.iter().find(|f| f.id == NodeId(*id))?;
            Some(NodeRecord {
                id: founder.id,
                name: founder.name.clone(),
                kind: founder.kind,
                addrs: founder.addrs.clone(),
                store: node.store,
                incarnation: None,
                os_boot: 0,
            })
        });
        let op = ClusterOp::InitCluster { cluster, lease: self.options.lease, nodes: nodes.collect() };
        let command = Command { request: self.next_request(), only_under: None, op };
        match timeout(FIRST_COMMAND_DEADLINE, self.submit_here(command)).await {
            Ok(reply) => tracing::info!(%cluster, ?reply, "founded the cluster"),
            Err(_) => tracing::debug!(%cluster, "no quorum to found the cluster yet"),
        }
    }
}
