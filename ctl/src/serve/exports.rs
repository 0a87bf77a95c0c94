//! What this node offers over NBD: every volume that it serves at the moment.
//!
//! A volume that another node serves, or nobody, is refused with a text that names the primary and its
//! address; one that is attached by another client host, with a text that names that one. Connections that pass go
//! straight to the volume's reactor; no request is seen here.

use std::sync::{Arc, OnceLock};

use blkrepl_engine::control::{ClusterState, VolumeRecord};
use blkrepl_nbd::{Admitting, ExportInfo, ExportRefusal, Exports, Peer, Place};

use super::attachments;
use super::client_host::client_host;
use super::node::Node;
use super::status::node_name;

/// The exports of a node. Until the node is there every volume is refused, so that the sockets can be
/// bound (and a port in use be found) before anything else is started.
#[derive(Default)]
pub struct NodeExports {
    node: OnceLock<Arc<Node>>,
}

impl NodeExports {
    /// From now on `node` answers.
    pub fn set(&self, node: Arc<Node>) {
        if self.node.set(node).is_err() {
            tracing::error!("the node was set twice");
        }
    }

    fn node(&self) -> Result<&Arc<Node>, ExportRefusal> {
        let node = self
            .node
            .get()
            .ok_or_else(|| ExportRefusal::Policy("this node is starting; try again".into()))?;
        if node.is_stopping() {
            return Err(ExportRefusal::Shutdown);
        }
        Ok(node)
    }
}

fn find<'a>(state: &'a ClusterState, name: &str) -> Result<&'a VolumeRecord, ExportRefusal> {
    let mut all = state.volumes.values();
    let found = match (name, all.len()) {
        ("", 1) => all.next(),
        ("", n) => return Err(ExportRefusal::Unknown(format!("there are {n} volumes: name one of them"))),
        _ => all.find(|v| v.name == name),
    };
    found.ok_or_else(|| {
        ExportRefusal::Unknown(format!("no volume is named '{name}': look at `blkrepl volume list`"))
    })
}

/// Why a volume is refused here: who is primary and where.
fn refusal(state: &ClusterState, v: &VolumeRecord, my_name: &str) -> String {
    let Some(primary) = v.primary else {
        return format!("volume {} has no primary (demoted by an operator); promote a node first", v.name);
    };
    let name = node_name(state, primary.node);
    if name == my_name {
        return format!("{name} is primary of volume {} but does not serve it yet; try again", v.name);
    }
    let nbd = state.nodes.get(&primary.node).map_or("", |n| n.addrs.nbd.as_str());
    let place = if nbd.is_empty() { String::new() } else { format!(" at nbd://{nbd}/{}", v.name) };
    format!("{my_name} is not primary of volume {}; {name} is: connect there{place}", v.name)
}

impl Exports for NodeExports {
    fn list(&self) -> Vec<String> {
        let Ok(node) = self.node() else { return Vec::new() };
        let mut names: Vec<String> = node.state().volumes.values().map(|v| v.name.clone()).collect();
        names.sort();
        names
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        let node = self.node()?;
        let state = node.state();
        let volume = find(&state, name)?;
        let serving = node.handle(volume.id).is_some_and(|h| !h.is_stopped() && h.status().serving);
        if !serving {
            return Err(ExportRefusal::Policy(refusal(&state, volume, &node.config.name)));
        }
        let nature = node.nature(volume.id);
        Ok(ExportInfo {
            rotational: nature.is_some_and(|nature| nature.rotational),
            lineage: Some(volume.lineage.0),
            fast_zero: nature.is_some_and(|nature| nature.makes_holes),
            ..ExportInfo::new(volume.name.clone(), volume.geometry.size())
        })
    }

    fn places(&self, name: &str) -> Result<Vec<Place>, ExportRefusal> {
        let state = self.node()?.state();
        let volume = find(&state, name)?;
        let nodes = volume.replicas.iter().filter_map(|replica| state.nodes.get(&replica.node));
        let placed = nodes.filter(|node| !node.addrs.nbd.is_empty());
        let is_primary = |id| volume.primary.is_some_and(|primary| primary.node == id);
        Ok(placed.map(|n| Place { address: n.addrs.nbd.clone(), primary: is_primary(n.id) }).collect())
    }

    fn admit(&self, name: &str, peer: Peer) -> Admitting {
        let admitting = self.node().cloned().and_then(|node| {
            let state = node.state();
            let volume = find(&state, name)?.id;
            let client = client_host(&state, node.config.id, peer);
            // A task of its own: a client that hangs up must not leave it half done.
            Ok(tokio::spawn(async move { attachments::admit(&node, volume, &client).await }))
        });
        Box::pin(async move {
            let ended =
                |error| ExportRefusal::Policy(format!("the admission did not end: {error}; try again"));
            admitting?.await.map_err(ended)?
        })
    }
}
