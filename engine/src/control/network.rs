//! Calls to other nodes over persistent TCP connections, and openraft's network on top of them.
//!
//! One request is under way per connection; a connection whose call did not end well is dropped. Every
//! call has a deadline. A node that cannot be connected is left alone for a short, growing while.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::error::{
    Fatal, InstallSnapshotError, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError,
    Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    SnapshotResponse, VoteRequest, VoteResponse,
};
use tokio::sync::watch;

use crate::types::{ClusterId, Incarnation, NodeId};

use super::environment::{Environment, Stream};
use super::error::CallError;
use super::raft::{RaftNode, Snapshot, TypeConfig, Vote};
use super::rpc::{self, Reply, ReplyBody, Request, RequestBody, Sender};
use super::runtime::{Instant, timeout_at};
use super::state::{ClusterState, StoreId};

/// Idle connections kept per node.
const IDLE_MAX: usize = 4;
/// First and longest pause after a failed connect. Short: a node that is back must be noticed well within
/// a lease.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

#[derive(Default)]
struct Target {
    idle: Vec<Box<dyn Stream>>,
    pause: Duration,
    retry_at: Option<Instant>,
}

struct Inner {
    env: Arc<dyn Environment>,
    node: NodeId,
    store: StoreId,
    incarnation: Incarnation,
    cluster: Mutex<Option<ClusterId>>,
    /// Addresses from this node's own config; they count before those of the cluster state, so that an
    /// operator can move a whole cluster to other addresses.
    contacts: BTreeMap<NodeId, String>,
    state: watch::Receiver<Arc<ClusterState>>,
    targets: Mutex<BTreeMap<NodeId, Target>>,
    outdated: watch::Sender<Option<Incarnation>>,
}

/// The way to all other nodes. Clones share connections.
#[derive(Clone)]
pub(super) struct Peers {
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // No code panics while it holds one of these, and what they guard is valid at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    pub(super) fn new(
        env: Arc<dyn Environment>,
        me: Sender,
        contacts: BTreeMap<NodeId, String>,
        state: watch::Receiver<Arc<ClusterState>>,
    ) -> Self {
        let inner = Inner {
            env,
            node: me.node,
            store: me.store,
            incarnation: me.incarnation,
            cluster: Mutex::new(me.cluster),
            contacts,
            state,
            targets: Mutex::default(),
            outdated: watch::channel(None).0,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Who this node says it is.
    pub(super) fn me(&self) -> Sender {
        let Inner { node, store, incarnation, .. } = *self.inner;
        Sender { cluster: *lock(&self.inner.cluster), node, store, incarnation }
    }

    /// From now on this node belongs to `cluster`. The caller has made that durable.
    pub(super) fn set_cluster(&self, cluster: ClusterId) {
        *lock(&self.inner.cluster) = Some(cluster);
    }

    fn addr(&self, node: NodeId) -> Option<String> {
        if let Some(addr) = self.inner.contacts.get(&node) {
            return Some(addr.clone());
        }
        self.inner.state.borrow().nodes.get(&node).map(|n| n.addrs.control.clone())
    }

    /// Asks a node who it is. The answer is not checked.
    pub(super) async fn identify(&self, node: NodeId, limit: Duration) -> Result<Sender, CallError> {
        let request = Request { from: self.me(), to: None, body: RequestBody::Identify };
        Ok(self.exchange(node, None, &request, limit, true).await?.from)
    }

    /// Calls a node that the cluster state knows.
    pub(super) async fn call(
        &self,
        node: NodeId,
        body: RequestBody,
        limit: Duration,
    ) -> Result<ReplyBody, CallError> {
        let store = self.inner.state.borrow().nodes.get(&node).map(|n| n.store);
        let Some(store) = store else {
            return Err(unreachable(node, "", "it is not in the cluster state here"));
        };
        self.call_store(node, store, None, body, limit).await
    }

    /// Calls a node with the store that is expected there [R13]; `hint` is an address to use if no other is
    /// known.
    async fn call_store(
        &self,
        node: NodeId,
        store: StoreId,
        hint: Option<&str>,
        body: RequestBody,
        limit: Duration,
    ) -> Result<ReplyBody, CallError> {
        // What must not be sent twice goes over a connection that was not used before.
        let reuse = !matches!(body, RequestBody::Admin(_));
        let request = Request { from: self.me(), to: Some((node, store)), body };
        let reply = self.exchange(node, hint, &request, limit, reuse).await?;
        if let ReplyBody::Refused(reason) = reply.body {
            return Err(CallError::Refused { node, reason });
        }
        let (mine, from) = (request.from, reply.from);
        let known = rpc::check_sender(&self.inner.state.borrow(), &from);
        // The other side may have adopted its cluster in answering; a node without one answers nothing.
        let same = from.node == node && from.store == store && from.cluster == mine.cluster;
        if !same || known.is_err() {
            return Err(CallError::Impostor {
                node,
                expected: store,
                found: from.store,
                cluster: from.cluster,
                what: known.err().unwrap_or_else(|| "its answer is not believed".into()),
            });
        }
        if let ReplyBody::Outdated(newest) = reply.body {
            self.inner.outdated.send_replace(Some(newest));
            let reason =
                format!("this node has run as {newest} already; its store was rolled back or copied");
            return Err(CallError::Refused { node, reason });
        }
        Ok(reply.body)
    }

    /// Turns to the newest run of this node once a node of the cluster says that it is not this one [R13].
    pub(super) fn outdated(&self) -> watch::Receiver<Option<Incarnation>> {
        self.inner.outdated.subscribe()
    }

    async fn exchange(
        &self,
        node: NodeId,
        hint: Option<&str>,
        request: &Request,
        limit: Duration,
        reuse: bool,
    ) -> Result<Reply, CallError> {
        let deadline = Instant::now() + limit;
        let Some(addr) = self.addr(node).or_else(|| hint.map(Into::into)) else {
            return Err(unreachable(node, "", "its address is not known"));
        };
        let idle = if reuse { self.take_idle(node) } else { None };
        if let Some(mut stream) = idle {
            match timeout_at(deadline, transact(&mut stream, request)).await {
                Ok(Ok(reply)) => return self.finish(node, stream, reply),
                // The other side may have restarted since; try once more from scratch.
                Ok(Err(_)) => {}
                Err(_) => {
                    self.forget_idle(node);
                    return Err(CallError::Timeout(node));
                }
            }
            self.forget_idle(node);
        }
        let mut stream = self.connect(node, &addr, deadline).await?;
        match timeout_at(deadline, transact(&mut stream, request)).await {
            Ok(Ok(reply)) => self.finish(node, stream, reply),
            Ok(Err(e)) => Err(unreachable(node, &addr, &e.to_string())),
            Err(_) => Err(CallError::Timeout(node)),
        }
    }

    fn finish(
        &self,
        node: NodeId,
        stream: Box<dyn Stream>,
        reply: Result<Reply, super::codec::CodecError>,
    ) -> Result<Reply, CallError> {
        let reply = reply.map_err(|source| CallError::Codec { node, source })?;
        let mut targets = lock(&self.inner.targets);
        let target = targets.entry(node).or_default();
        if target.idle.len() < IDLE_MAX {
            target.idle.push(stream);
        }
        Ok(reply)
    }

    fn take_idle(&self, node: NodeId) -> Option<Box<dyn Stream>> {
        lock(&self.inner.targets).get_mut(&node)?.idle.pop()
    }

    fn forget_idle(&self, node: NodeId) {
        if let Some(target) = lock(&self.inner.targets).get_mut(&node) {
            target.idle.clear();
        }
    }

    async fn connect(
        &self,
        node: NodeId,
        addr: &str,
        deadline: Instant,
    ) -> Result<Box<dyn Stream>, CallError> {
        let retry_at = lock(&self.inner.targets).get(&node).and_then(|t| t.retry_at);
        if retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(unreachable(node, addr, "it could not be connected a moment ago"));
        }
        let connected = timeout_at(deadline, self.inner.env.connect(addr.into())).await;
        let mut targets = lock(&self.inner.targets);
        let target = targets.entry(node).or_default();
        match connected {
            Ok(Ok(stream)) => {
                target.pause = Duration::ZERO;
                target.retry_at = None;
                Ok(stream)
            }
            failed => {
                target.pause = (target.pause * 2).clamp(BACKOFF.0, BACKOFF.1);
                target.retry_at = Some(Instant::now() + target.pause);
                let what = failed.map_or_else(
                    |_| "no answer".into(),
                    |r| match r {
                        Ok(_) => "no answer".into(),
                        Err(e) => e.to_string(),
                    },
                );
                Err(unreachable(node, addr, &what))
            }
        }
    }
}

async fn transact(
    stream: &mut Box<dyn Stream>,
    request: &Request,
) -> io::Result<Result<Reply, super::codec::CodecError>> {
    rpc::write_frame(stream, request).await?;
    rpc::read_frame(stream).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn unreachable(node: NodeId, addr: &str, what: &str) -> CallError {
    CallError::Unreachable { node, addr: addr.into(), what: what.into() }
}

/// One Raft target.
pub(super) struct Client {
    peers: Peers,
    target: NodeId,
    node: RaftNode,
}

impl Client {
    async fn call(&self, body: RequestBody, limit: Duration) -> Result<ReplyBody, CallError> {
        let hint = Some(self.node.addr.as_str());
        self.peers.call_store(self.target, self.node.store, hint, body, limit).await
    }
}

type RpcResult<T> = Result<T, RPCError<u64, RaftNode, RaftError<u64>>>;

/// openraft waits a little after `Unreachable` and retries at once after `Network`.
fn failed<E: std::error::Error>(e: &CallError) -> RPCError<u64, RaftNode, E> {
    match e {
        CallError::Timeout(_) => RPCError::Network(NetworkError::new(e)),
        _ => RPCError::Unreachable(Unreachable::new(e)),
    }
}

fn unexpected(body: &ReplyBody) -> io::Error {
    io::Error::other(format!("unexpected answer {body:?}"))
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &RaftNode) -> Client {
        Client { peers: self.clone(), target: NodeId(target), node: node.clone() }
    }
}

impl RaftNetwork<TypeConfig> for Client {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<u64>> {
        match self.call(RequestBody::Append(rpc), option.hard_ttl()).await {
            Ok(ReplyBody::Append(response)) => Ok(response),
            Ok(other) => Err(RPCError::Unreachable(Unreachable::new(&unexpected(&other)))),
            Err(e) => Err(failed(&e)),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, option: RPCOption) -> RpcResult<VoteResponse<u64>> {
        match self.call(RequestBody::Vote(rpc), option.hard_ttl()).await {
            Ok(ReplyBody::Vote(response)) => Ok(response),
            Ok(other) => Err(RPCError::Unreachable(Unreachable::new(&unexpected(&other)))),
            Err(e) => Err(failed(&e)),
        }
    }

    async fn install_snapshot(
        &mut self,
        _rpc: InstallSnapshotRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, RPCError<u64, RaftNode, RaftError<u64, InstallSnapshotError>>>
    {
        // Snapshots are small and travel whole, see `full_snapshot`.
        let e = io::Error::from(io::ErrorKind::Unsupported);
        Err(RPCError::Unreachable(Unreachable::new(&e)))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        let data = snapshot.snapshot.into_inner();
        let body = RequestBody::Snapshot { vote, meta: snapshot.meta, data };
        let answer = tokio::select! {
            biased;
            closed = cancel => return Err(closed.into()),
            answer = self.call(body, option.hard_ttl()) => answer,
        };
        match answer {
            Ok(ReplyBody::Snapshot(vote)) => Ok(SnapshotResponse::new(vote)),
            Ok(other) => Err(Unreachable::new(&unexpected(&other)).into()),
            Err(e) => Err(Unreachable::new(&e).into()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(Duration::from_millis(50)))
    }
}
