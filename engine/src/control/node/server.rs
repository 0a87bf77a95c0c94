//! The listener: takes requests of other nodes, checks who they come from, and answers.
//!
//! Strangers that connect and say nothing must not keep the other nodes out, nor fill the log: when every place
//! is taken, the connection that has been without an answered request for longest makes room, and what
//! is wrong with connections is told once in a while only.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::environment::{Listener, Stream};
use super::super::raft::Snapshot;
use super::super::rpc::{self, Receiver, Reply, ReplyBody, Request, RequestBody};
use super::super::runtime::{AbortHandle, Instant, TaskSet, sleep, timeout};
use super::super::store::decode_snapshot;
use super::inner::Inner;

/// Connections served at once; beyond, the most useless one is closed for a new one.
pub(super) const CONNECTIONS_MAX: usize = 128;
/// A connection that stays silent for this long is closed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// A reply must be taken within this.
const REPLY_DEADLINE: Duration = Duration::from_secs(10);

/// Shortest time between two warnings about connections.
const WARN_PAUSE: Duration = Duration::from_secs(5);

/// Value of [`Activity`] while a request is being handled.
const BUSY: u64 = u64::MAX;

/// When a connection was last of use: the listener's count of answered requests then, 0 before the first one,
/// or [`BUSY`].
type Activity = Arc<AtomicU64>;

/// What all connections have in common.
struct Served {
    inner: Arc<Inner>,
    answered: AtomicU64,
    warnings: Seldom,
}

/// Lets something through once in a while, and counts what it holds back.
struct Seldom(std::sync::Mutex<(Option<Instant>, u64)>);

impl Seldom {
    /// How many were held back since the last that passed, if this one passes.
    fn pass(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.0.is_some_and(|last| last.elapsed() < WARN_PAUSE) {
            state.1 += 1;
            return None;
        }
        state.0 = Some(Instant::now());
        Some(std::mem::take(&mut state.1))
    }
}

/// Serves until aborted; the connections end with it.
pub(super) async fn serve(inner: Arc<Inner>, mut listener: Box<dyn Listener>) {
    let warnings = Seldom(std::sync::Mutex::default());
    let served = Arc::new(Served { inner, answered: AtomicU64::new(1), warnings });
    let mut connections = TaskSet::default();
    // In the order of their arrival.
    let mut open: BTreeMap<u64, (AbortHandle, Activity)> = BTreeMap::new();
    for number in 0.. {
        let accepted = listener.accept().await;
        connections.reap();
        if open.len() >= CONNECTIONS_MAX {
            open.retain(|_, (task, _)| !task.is_finished());
        }
        match accepted {
            Ok((_, from)) if open.len() >= CONNECTIONS_MAX && !make_room(&mut open) => {
                if let Some(more) = served.warnings.pass() {
                    tracing::warn!(%from, more, "{CONNECTIONS_MAX} control connections are busy; refused one");
                }
            }
            Ok((stream, from)) => {
                let activity = Activity::default();
                let serve = connection(Arc::clone(&served), stream, from, Arc::clone(&activity));
                let task = connections.spawn(serve);
                open.insert(number, (task, activity));
            }
            Err(e) => {
                // Out of descriptors, most likely; give them time to come back.
                tracing::warn!(%e, "cannot accept control connections");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Closes the connection that was of use least recently, the oldest of several; false if all are busy.
fn make_room(open: &mut BTreeMap<u64, (AbortHandle, Activity)>) -> bool {
    let least = open
        .iter()
        .map(|(number, (_, activity))| (activity.load(Ordering::Relaxed), *number))
        .filter(|(activity, _)| *activity != BUSY)
        .min();
    let Some((_, number)) = least else { return false };
    if let Some((task, _)) = open.remove(&number) {
        task.abort();
    }
    true
}

async fn connection(served: Arc<Served>, mut stream: Box<dyn Stream>, from: String, activity: Activity) {
    let inner = &served.inner;
    loop {
        let request = match timeout(SILENCE_MAX, rpc::read_frame::<Request>(&mut stream)).await {
            Ok(Ok(Some(Ok(request)))) => request,
            Ok(Ok(Some(Err(e)))) => {
                if let Some(more) = served.warnings.pass() {
                    tracing::warn!(%e, from, more, "closes a control connection that is not understood");
                }
                return;
            }
            _ => return,
        };
        activity.store(BUSY, Ordering::Relaxed);
        let body = handle(inner, request).await;
        let useful = !matches!(body, ReplyBody::Refused(_) | ReplyBody::Identity | ReplyBody::Outdated(_));
        let now = if useful { served.answered.fetch_add(1, Ordering::Relaxed) } else { 0 };
        // After handling: this node may have adopted its cluster just now.
        let reply = Reply { from: inner.peers.me(), body };
        activity.store(now, Ordering::Relaxed);
        if !matches!(timeout(REPLY_DEADLINE, rpc::write_frame(&mut stream, &reply)).await, Ok(Ok(()))) {
            return;
        }
    }
}

async fn handle(inner: &Arc<Inner>, request: Request) -> ReplyBody {
    let contacts: Vec<_> = inner.options.founders.iter().map(|f| f.id).collect();
    let state = inner.current();
    let receiver = Receiver { me: inner.peers.me(), state: &state, contacts: &contacts };
    match receiver.check(&request) {
        Ok(None) => {}
        Ok(Some(cluster)) => {
            // Durable before this node votes in it, so that it never votes in two [R13].
            let Some(store) = inner.store() else { return ReplyBody::Failed("the node is stopping".into()) };
            if let Err(e) = store.run(move |db| db.adopt_cluster(cluster)).await {
                return ReplyBody::Failed(e.to_string());
            }
            inner.peers.set_cluster(cluster);
        }
        Err(why) => {
            tracing::warn!(node = inner.me.0, from = request.from.node.0, why, "refused a control request");
            let same_cluster = receiver.me.cluster.is_some() && receiver.me.cluster == request.from.cluster;
            return match rpc::newer_run(&state, &request.from) {
                Some(newest) if same_cluster => ReplyBody::Outdated(newest),
                _ => ReplyBody::Refused(why),
            };
        }
    }
    match request.body {
        RequestBody::Identify => ReplyBody::Identity,
        RequestBody::Append(rpc) => match inner.raft.append_entries(rpc).await {
            Ok(response) => ReplyBody::Append(response),
            Err(e) => ReplyBody::Failed(e.to_string()),
        },
        RequestBody::Vote(rpc) => match inner.raft.vote(rpc).await {
            Ok(response) => ReplyBody::Vote(response),
            Err(e) => ReplyBody::Failed(e.to_string()),
        },
        RequestBody::Snapshot { vote, meta, data } => {
            // Checked before Raft sees it: a bad one must not stop Raft.
            if let Err(e) = decode_snapshot(&data) {
                return ReplyBody::Refused(format!("the snapshot is not usable: {e}"));
            }
            let snapshot = Snapshot { meta, snapshot: Box::new(Cursor::new(data)) };
            match inner.raft.install_full_snapshot(vote, snapshot).await {
                Ok(response) => ReplyBody::Snapshot(response.vote),
                Err(e) => ReplyBody::Failed(e.to_string()),
            }
        }
        RequestBody::Submit(command) => inner.submit_here(command).await,
        RequestBody::Renew(renewal) if renewal.member.node == request.from.node => inner.grant(renewal).await,
        RequestBody::Renew(_) => ReplyBody::Refused("a node renews for itself alone".into()),
        RequestBody::Admin(bytes) => inner.handle_admin(bytes).await,
    }
}
