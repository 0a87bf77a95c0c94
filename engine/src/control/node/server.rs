//! The listener: takes requests of other nodes, checks who they come from, and answers.

use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::super::raft::Snapshot;
use super::super::rpc::{self, Receiver, Reply, ReplyBody, Request, RequestBody};
use super::super::store::decode_snapshot;
use super::inner::Inner;

/// Connections served at once; beyond, new ones are closed (their callers try again).
const CONNECTIONS_MAX: usize = 128;
/// A connection that stays silent for this long is closed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// A reply must be taken within this.
const REPLY_DEADLINE: Duration = Duration::from_secs(10);

/// Serves until aborted; the connections end with it.
pub(super) async fn serve(inner: Arc<Inner>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = listener.accept().await;
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) if connections.len() < CONNECTIONS_MAX => {
                connections.spawn(connection(Arc::clone(&inner), stream));
            }
            Ok((stream, from)) => {
                tracing::warn!(%from, "more than {CONNECTIONS_MAX} control connections; closed one");
                drop(stream);
            }
            Err(e) => {
                // Out of descriptors, most likely; give them time to come back.
                tracing::warn!(%e, "cannot accept control connections");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(inner: Arc<Inner>, mut stream: TcpStream) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    loop {
        let request = match timeout(SILENCE_MAX, rpc::read_frame::<Request>(&mut stream)).await {
            Ok(Ok(Some(Ok(request)))) => request,
            Ok(Ok(Some(Err(e)))) => {
                tracing::warn!(%e, from = ?stream.peer_addr().ok(), "closes a control connection");
                return;
            }
            _ => return,
        };
        let body = handle(&inner, request).await;
        // After handling: this node may have adopted its cluster just now.
        let reply = Reply { from: inner.peers.me(), body };
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
            return ReplyBody::Refused(why);
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
