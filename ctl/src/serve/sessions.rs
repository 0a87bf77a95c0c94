//! Keeps the peer sessions of one volume up: which peers this node dials, and when again.
//!
//! One task per peer with a higher node id. It dials until a session is up, then sleeps until the
//! reactor says that the session is lost. What refuses or does not answer is tried again with a growing
//! pause; the reason is logged when it changes, not each time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use blkrepl_engine::control::ClusterState;
use blkrepl_engine::reactor::VolumeHandle;
use blkrepl_engine::types::{ClusterId, Incarnation, NodeId, VolumeId};
use blkrepl_engine::wire::{Established, Hello, LocalEnd, Refusal, VersionRange};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::node::Node;
use super::peers::{self, PeerGate, REDIAL_PAUSE_MAX, REDIAL_PAUSE_MIN};
use super::status::node_name;

/// The dialing tasks of one volume. Cheap to clone.
#[derive(Clone)]
pub struct Redial(Arc<Inner>);

struct Inner {
    node: Arc<Node>,
    volume: VolumeId,
    handle: VolumeHandle,
    tasks: Mutex<BTreeMap<NodeId, (Arc<Notify>, AbortHandle)>>,
}

impl Redial {
    /// Dials nobody until [`follow`](Self::follow) names the replicas.
    pub fn start(node: Arc<Node>, volume: VolumeId, handle: VolumeHandle) -> Self {
        Self(Arc::new(Inner { node, volume, handle, tasks: Mutex::default() }))
    }

    /// Dials the replicas that cluster state names (those with a higher node id), and no others.
    pub fn follow(&self, state: &ClusterState) {
        let me = self.0.node.config.id;
        let Some(record) = state.volumes.get(&self.0.volume) else { return };
        let mut tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        for peer in record.replicas.iter().map(|r| r.node).filter(|&n| n > me) {
            tasks.entry(peer).or_insert_with(|| {
                let lost = Arc::new(Notify::new());
                let task = tokio::spawn(Arc::clone(&self.0).keep_up(peer, Arc::clone(&lost)));
                (lost, task.abort_handle())
            });
        }
        tasks.retain(|peer, (_, task)| {
            let keep = record.replica(*peer).is_some();
            if !keep {
                task.abort();
            }
            keep
        });
    }

    /// The session to `node` is over.
    pub fn lost(&self, node: NodeId) {
        let tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((lost, _)) = tasks.get(&node) {
            lost.notify_one();
        }
    }

    /// Dials no more.
    pub fn end(&self) {
        let tasks = self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.values().for_each(|(_, task)| task.abort());
    }
}

impl Inner {
    async fn keep_up(self: Arc<Self>, peer: NodeId, lost: Arc<Notify>) {
        let mut pause = REDIAL_PAUSE_MIN;
        let mut said = String::new();
        loop {
            match self.dial(peer).await {
                Ok((established, stream)) => {
                    self.handle.peer_connected(established.node, established.incarnation, stream);
                    (pause, said) = (REDIAL_PAUSE_MIN, String::new());
                    lost.notified().await;
                    // Not at once: a peer that closes every session must not keep both ends busy.
                    tokio::time::sleep(REDIAL_PAUSE_MIN).await;
                }
                Err(reason) => {
                    if reason != said {
                        let name = node_name(&self.node.state(), peer);
                        tracing::info!("no session to {name}: {reason}");
                        said = reason;
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(REDIAL_PAUSE_MAX);
                }
            }
        }
    }

    async fn dial(&self, peer: NodeId) -> Result<(Established, std::net::TcpStream), String> {
        let state = self.node.state();
        let record = state.nodes.get(&peer).ok_or("the node is not in the cluster")?;
        let addr: SocketAddr = record
            .addrs
            .peer
            .parse()
            .map_err(|_| format!("its peer address '{}' is not IP:PORT", record.addrs.peer))?;
        let local = local_end(&self.node, &state, self.volume).ok_or("the cluster is not formed")?;
        let (established, stream) = peers::dial(addr, &local, peer).await.map_err(|e| e.to_string())?;
        check_incarnation(&self.node.state(), established.node, established.incarnation)?;
        Ok((established, stream))
    }
}

fn local_end(node: &Node, state: &ClusterState, volume: VolumeId) -> Option<LocalEnd> {
    let me = node.me();
    Some(LocalEnd {
        versions: VersionRange::OWN,
        cluster: state.cluster?,
        volume,
        node: me.node,
        incarnation: me.incarnation,
    })
}

/// An incarnation older than the newest registered one is a ghost [R2]. A newer one is this node's own
/// view lagging behind; the core judges it by the config.
fn check_incarnation(state: &ClusterState, node: NodeId, given: Incarnation) -> Result<(), String> {
    match state.newest(node) {
        Some(newest) if given.boot < newest.boot || (given.boot == newest.boot && given != newest) => {
            Err(format!(
                "{node} runs as incarnation {given}, but {newest} has registered since: end the older process"
            ))
        }
        _ => Ok(()),
    }
}

impl PeerGate for Node {
    fn local_end(&self, hello: &Hello) -> Result<LocalEnd, (Refusal, String)> {
        let state = self.state();
        let not_ready = |text: &str| (Refusal::NotReady, format!("{}: {text}; try again", self.config.name));
        if self.is_stopping() {
            return Err(not_ready("the node is stopping"));
        }
        let Some(record) = state.volumes.get(&hello.volume) else {
            return Err((
                Refusal::Volume,
                format!(
                    "{} does not know volume {}: look at `blkrepl volume list`",
                    self.config.name, hello.volume
                ),
            ));
        };
        if record.replica(hello.node).is_none() {
            return Err((
                Refusal::Sender,
                format!("{} holds no replica of volume {} by the committed config", hello.node, record.name),
            ));
        }
        check_incarnation(&state, hello.node, hello.incarnation)
            .map_err(|text| (Refusal::Incarnation, text))?;
        if let Some(reason) = self.failure(hello.volume) {
            return Err(not_ready(&format!("its replica failed: {reason}")));
        }
        if self.handle(hello.volume).is_none_or(|h| h.is_stopped()) {
            return Err(not_ready("its replica is not open yet"));
        }
        local_end(self, &state, hello.volume).ok_or_else(|| not_ready("the cluster is not formed"))
    }

    fn identity(&self) -> (ClusterId, NodeId, Incarnation) {
        let me = self.me();
        (self.state().cluster.unwrap_or_default(), me.node, me.incarnation)
    }

    fn connected(&self, volume: VolumeId, peer: Established, stream: std::net::TcpStream) {
        // Without a reactor the stream is dropped here, and the dialer tries again.
        if let Some(handle) = self.handle(volume) {
            handle.peer_connected(peer.node, peer.incarnation, stream);
        }
    }
}
