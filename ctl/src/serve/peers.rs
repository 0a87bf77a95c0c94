//! Sessions between the replicas of a volume, up to the point where the reactor takes the socket.
//!
//! One session per pair of nodes and volume: the node with the lower id dials, the other accepts. Both
//! ends check cluster, volume, node and incarnation in a handshake of fixed size under a deadline; only
//! then the socket goes to the reactor. Nothing of a session's later traffic passes here. A dialer redials
//! with a growing pause until it is told to end.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use blkrepl_engine::types::{ClusterId, Incarnation, NodeId, VolumeId};
use blkrepl_engine::wire::{
    Established, HELLO_LEN, HELLO_REPLY_LEN, Hello, HelloAnswer, HelloReply, LocalEnd, Refusal, VersionRange,
};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

/// How long connecting and the handshake may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// First pause before a redial; doubles up to [`REDIAL_PAUSE_MAX`].
pub const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause before a redial.
pub const REDIAL_PAUSE_MAX: Duration = Duration::from_millis(500);
/// Handshakes at once on the accepting side; further ones wait in the listen queue.
const HANDSHAKES_MAX: usize = 64;
/// How long a handshake may take while others wait, so that strangers who connect and say nothing do not
/// keep the peers out.
const CROWDED_TIMEOUT: Duration = Duration::from_millis(250);

/// Why a session did not come about.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Network.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Took too long.
    #[error("no answer within {} ms", HANDSHAKE_TIMEOUT.as_millis())]
    Timeout,
    /// Not our protocol, damaged, or refused.
    #[error("{0}")]
    Wire(#[from] blkrepl_engine::wire::WireError),
}

/// What the node must know to judge who dials it, and what it does with an accepted session.
pub trait PeerGate: Send + Sync + 'static {
    /// This end for `volume`, or why there can be no session now.
    ///
    /// # Errors
    /// Code and text for the refusal.
    fn local_end(&self, hello: &Hello) -> Result<LocalEnd, (Refusal, String)>;

    /// This node for refusals before the volume is known.
    fn identity(&self) -> (ClusterId, NodeId, Incarnation);

    /// Takes an established session.
    fn connected(&self, volume: VolumeId, peer: Established, stream: std::net::TcpStream);
}

/// Dials a peer and shakes hands.
///
/// # Errors
/// [`SessionError`].
pub async fn dial(
    addr: SocketAddr,
    local: &LocalEnd,
    to: NodeId,
) -> Result<(Established, std::net::TcpStream), SessionError> {
    let shake = async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        let hello = Hello::new(local, to);
        stream.write_all(&hello.encode()).await?;
        let mut bytes = [0; HELLO_REPLY_LEN];
        stream.read_exact(&mut bytes).await?;
        let established = HelloReply::decode(&bytes)?.check(&hello)?;
        Ok((established, into_std(stream)?))
    };
    timeout(HANDSHAKE_TIMEOUT, shake).await.unwrap_or(Err(SessionError::Timeout))
}

/// Accepts sessions until the task is dropped.
pub async fn accept(listener: TcpListener, gate: Arc<dyn PeerGate>) {
    let mut handshakes = JoinSet::new();
    let mut by_age: VecDeque<(Instant, AbortHandle)> = VecDeque::new();
    loop {
        by_age.retain(|(_, handshake)| !handshake.is_finished());
        let room = by_age.len() < HANDSHAKES_MAX;
        let oldest = by_age.front().map_or_else(Instant::now, |(since, _)| *since);
        let accepted = tokio::select! {
            Some(_) = handshakes.join_next(), if !handshakes.is_empty() => continue,
            () = sleep_until(oldest + CROWDED_TIMEOUT), if !room => {
                if let Some((_, handshake)) = by_age.pop_front() {
                    handshake.abort();
                }
                continue;
            }
            accepted = listener.accept(), if room => accepted,
        };
        match accepted {
            Ok((stream, from)) => {
                let gate = Arc::clone(&gate);
                let handshake = handshakes.spawn(async move {
                    if let Err(error) = answer(stream, gate.as_ref()).await {
                        tracing::debug!(%from, "no session: {error}");
                    }
                });
                by_age.push_back((Instant::now(), handshake));
            }
            Err(error) => {
                tracing::warn!("cannot accept a peer: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, gate: &dyn PeerGate) -> Result<(), SessionError> {
    let shake = async {
        stream.set_nodelay(true)?;
        let mut bytes = [0; HELLO_LEN];
        stream.read_exact(&mut bytes).await?;
        let hello = Hello::decode(&bytes)?;
        let (reply, established) = judge(&hello, gate);
        stream.write_all(&reply.encode()).await?;
        Ok::<_, SessionError>((hello, reply, established))
    };
    let (hello, reply, established) =
        timeout(HANDSHAKE_TIMEOUT, shake).await.unwrap_or(Err(SessionError::Timeout))?;
    match established {
        Some(established) => gate.connected(hello.volume, established, into_std(stream)?),
        None => {
            if let HelloAnswer::Refused { code, reason } = reply.answer {
                tracing::debug!(peer = hello.node.0, "session refused ({code}): {reason}");
            }
        }
    }
    Ok(())
}

/// The answer to a hello; with what is established if it is accepted.
fn judge(hello: &Hello, gate: &dyn PeerGate) -> (HelloReply, Option<Established>) {
    let (cluster, node, incarnation) = gate.identity();
    let own = LocalEnd { versions: VersionRange::OWN, cluster, volume: hello.volume, node, incarnation };
    // Whom and what the sender means is judged first: its answer names the cluster or address to correct.
    let reply = hello.answer(&own);
    let HelloAnswer::Accepted(version) = reply.answer else { return (reply, None) };
    if hello.node > node {
        let text = format!(
            "{} dials {}: the node with the lower id dials; both must run one version of blkrepl",
            hello.node, node
        );
        return (HelloReply::refuse(&own, Refusal::Sender, &text), None);
    }
    match gate.local_end(hello) {
        Ok(_) => (reply, Some(Established { version, node: hello.node, incarnation: hello.incarnation })),
        Err((code, text)) => (HelloReply::refuse(&own, code, &text), None),
    }
}

/// The reactor takes blocking or non-blocking sockets alike through io_uring; blocking is what it expects.
fn into_std(stream: TcpStream) -> std::io::Result<std::net::TcpStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Gate {
        refuse: Option<(Refusal, String)>,
        got: Mutex<Vec<Established>>,
    }

    const CLUSTER: ClusterId = ClusterId(7);
    const VOLUME: VolumeId = VolumeId(9);

    fn end(node: u64) -> LocalEnd {
        LocalEnd {
            versions: VersionRange::OWN,
            cluster: CLUSTER,
            volume: VOLUME,
            node: NodeId(node),
            incarnation: Incarnation { boot: node, nonce: 1 },
        }
    }

    impl PeerGate for Gate {
        fn local_end(&self, _: &Hello) -> Result<LocalEnd, (Refusal, String)> {
            self.refuse.clone().map_or(Ok(end(2)), Err)
        }
        fn identity(&self) -> (ClusterId, NodeId, Incarnation) {
            (CLUSTER, NodeId(2), end(2).incarnation)
        }
        fn connected(&self, volume: VolumeId, peer: Established, _: std::net::TcpStream) {
            assert_eq!(volume, VOLUME);
            self.got.lock().unwrap().push(peer);
        }
    }

    async fn start(refuse: Option<(Refusal, String)>) -> (SocketAddr, Arc<Gate>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let gate = Arc::new(Gate { refuse, got: Mutex::default() });
        tokio::spawn(accept(listener, Arc::clone(&gate) as Arc<dyn PeerGate>));
        (addr, gate)
    }

    #[tokio::test]
    async fn both_ends_learn_the_others_incarnation_r2() {
        let (addr, gate) = start(None).await;
        let (peer, _stream) = dial(addr, &end(1), NodeId(2)).await.unwrap();
        assert_eq!(peer.incarnation, end(2).incarnation);
        for _ in 0..100 {
            if !gate.got.lock().unwrap().is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(gate.got.lock().unwrap()[0].incarnation, end(1).incarnation);
    }

    #[tokio::test]
    async fn strangers_that_say_nothing_do_not_keep_a_peer_out() {
        let (addr, _gate) = start(None).await;
        let mut silent = Vec::new();
        for _ in 0..2 * HANDSHAKES_MAX {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let begun = std::time::Instant::now();
        dial(addr, &end(1), NodeId(2)).await.unwrap();
        assert!(begun.elapsed() < HANDSHAKE_TIMEOUT, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn who_must_not_be_a_peer_is_told_why() {
        let (addr, gate) = start(Some((Refusal::NotReady, "not open yet; try again".into()))).await;
        let error = dial(addr, &end(1), NodeId(2)).await.unwrap_err().to_string();
        assert!(error.contains("not open yet"), "{error}");
        let error = dial(addr, &end(3), NodeId(2)).await.unwrap_err().to_string();
        assert!(error.contains("lower id dials"), "{error}");
        let error = dial(addr, &end(1), NodeId(5)).await.unwrap_err().to_string();
        assert!(error.contains("reached node 2"), "{error}");
        let stranger = LocalEnd { cluster: ClusterId(8), ..end(1) };
        assert!(dial(addr, &stranger, NodeId(2)).await.unwrap_err().to_string().contains("cluster"));
        assert!(gate.got.lock().unwrap().is_empty());
    }
}
