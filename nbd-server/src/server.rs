//! Accept loops and the negotiation of each connection, on tokio.
//!
//! A connection lives here from its accept to the end of its negotiation, at most
//! [`ServerOptions::negotiation_timeout`]; then its socket goes to [`Admission::attach`] and this module
//! forgets it. It never reads a byte of the transmission phase: the negotiation says how many bytes it
//! wants, and exactly as many are taken from the socket.
//!
//! At most [`ServerOptions::negotiations_max`] connections of one address negotiate at once. When as many do,
//! nothing more is accepted there until one of them is through or has had [`CROWDED_TIMEOUT`]; clients wait in
//! the kernel's backlog. So connections that nobody speaks on cannot keep clients out for long.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::desk::Desk;
use crate::export::{Admission, Attached, Exports, Peer};
use crate::limits::{ClientHost, ConnectionLimits};
use crate::listen::{Accepted, ListenAddr, ListenError, Listener};
use crate::misbehaviour::{Guest, Kind, Misbehaviour};
use crate::negotiate::{CloseReason, Negotiation, OPTION_BYTES_MAX, Progress, Terms, Want};
use crate::session::Session;

/// Pause after a failed accept (out of file descriptors, mostly), so that it does not spin.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long a negotiation may take while as many as allowed are under way; it needs a few round trips.
const CROWDED_TIMEOUT: Duration = Duration::from_secs(1);

/// Limits of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Longest time from accept to the transmission phase. A client that takes longer is disconnected.
    pub negotiation_timeout: Duration,
    /// Most connections that negotiate at once, for each address that the server listens on; at least 1. While
    /// others wait, each is closed after a second.
    pub negotiations_max: usize,
    /// Highest file descriptor that a connection may get; one with a higher number is closed at once. Leaves
    /// descriptors to what the process needs besides clients, since the kernel gives out the lowest free one.
    pub descriptor_max: i32,
    /// Most connections at once, from accept to their end.
    pub connections: ConnectionLimits,
}

impl Default for ServerOptions {
    /// 10 seconds, 256 negotiations, any descriptor, and the default limits on connections.
    fn default() -> Self {
        Self {
            negotiation_timeout: Duration::from_secs(10),
            negotiations_max: 256,
            descriptor_max: i32::MAX,
            connections: ConnectionLimits::default(),
        }
    }
}

/// A running server. Dropped, it stops at once.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    loops: JoinSet<()>,
    addrs: Vec<ListenAddr>,
    watch: Arc<Misbehaviour>,
}

impl Server {
    /// Listens on all addresses and starts to accept. To be called within a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// The first address that cannot be listened on; nothing is left listening then.
    pub async fn start(
        listen: &[ListenAddr],
        exports: Arc<dyn Exports>,
        options: ServerOptions,
    ) -> Result<Self, ListenError> {
        Self::start_on(Vec::new(), listen, exports, options).await
    }

    /// The same, with sockets besides that listen already. Whoever made them keeps their files.
    ///
    /// # Errors
    /// As [`start`](Self::start), or one of the sockets does not listen.
    pub async fn start_on(
        sockets: Vec<OwnedFd>,
        listen: &[ListenAddr],
        exports: Arc<dyn Exports>,
        options: ServerOptions,
    ) -> Result<Self, ListenError> {
        let mut listeners = Vec::with_capacity(sockets.len() + listen.len());
        let mut addrs = Vec::with_capacity(sockets.len() + listen.len());
        for socket in sockets {
            let (listener, addr) = Listener::adopt(socket)?;
            addrs.push(addr);
            listeners.push(listener);
        }
        for addr in listen {
            let listener = Listener::bind(addr).await?;
            // A bound socket has an address; where the kernel does not tell, what was asked for stands.
            addrs.push(listener.addr().unwrap_or_else(|_| addr.clone()));
            listeners.push(listener);
        }
        let (stop, stopped) = watch::channel(false);
        let mut loops = JoinSet::new();
        let desk = Desk::new(exports, options.connections);
        let watch = Arc::clone(desk.watch());
        for listener in listeners {
            let acceptor = Acceptor { listener, desk: desk.clone(), options };
            loops.spawn(acceptor.run(stopped.clone()));
        }
        Ok(Self { stop, loops, addrs, watch })
    }

    /// The addresses that it listens on: those of sockets that it was given, then those that it was to bind.
    /// Ports chosen by the kernel are filled in.
    #[must_use]
    pub fn addrs(&self) -> &[ListenAddr] {
        &self.addrs
    }

    /// What its clients do wrong, and how many are connected.
    #[must_use]
    pub fn misbehaviour(&self) -> &Arc<Misbehaviour> {
        &self.watch
    }

    /// Stops accepting, ends negotiations under way, removes unix socket files. Connections that were handed
    /// over are not touched.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.loops.join_next().await.is_some() {}
    }
}

struct Acceptor {
    listener: Listener,
    desk: Desk,
    options: ServerOptions,
}

impl Acceptor {
    async fn run(self, mut stopped: watch::Receiver<bool>) {
        // Dropping the set at the end aborts the negotiations that are still under way.
        let mut negotiations = JoinSet::new();
        let mut by_age: VecDeque<(Instant, ClientHost, AbortHandle)> = VecDeque::new();
        loop {
            by_age.retain(|(.., negotiation)| !negotiation.is_finished());
            let room = by_age.len() < self.options.negotiations_max.max(1);
            let oldest = by_age.front().map_or_else(Instant::now, |(since, ..)| *since);
            let accepted = tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => return,
                Some(_) = negotiations.join_next(), if !negotiations.is_empty() => continue,
                () = tokio::time::sleep_until(oldest + CROWDED_TIMEOUT), if !room => {
                    if let Some((_, host, negotiation)) = by_age.pop_front() {
                        negotiation.abort();
                        self.cut_short(host);
                    }
                    continue;
                }
                accepted = self.listener.accept(), if room => accepted,
            };
            let accepted = accepted.map(|(stream, from, peer)| (stream, from, ClientHost::of(from), peer));
            match accepted {
                Ok((stream, _, host, peer)) if stream.descriptor() > self.options.descriptor_max => {
                    drop(stream);
                    self.desk.watch().note(Kind::RefusedDescriptors, host, || {
                        format!(
                            "NBD client {peer} refused: too many open files; end clients or raise the limit of \
                             open files (LimitNOFILE=, ulimit -n)"
                        )
                    });
                    // Who connects again at once must not fill the log.
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
                Ok((stream, from, host, peer)) => {
                    let Some(received) = self.desk.receive(host, &peer) else { continue };
                    let timeout = self.options.negotiation_timeout;
                    let timeout = if received.refusal { timeout.min(CROWDED_TIMEOUT) } else { timeout };
                    let serving = async move {
                        serve((stream, from), &peer, received.exports.as_ref(), timeout, received.guest)
                            .await;
                    };
                    by_age.push_back((Instant::now(), host, negotiations.spawn(serving)));
                }
                Err(e) => {
                    tracing::warn!("cannot accept an NBD connection: {e}");
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
            }
        }
    }
}

impl Acceptor {
    /// A negotiation was ended because others wait for its place.
    fn cut_short(&self, host: ClientHost) {
        self.desk.watch().note(Kind::HandshakeTimeout, host, || {
            format!(
                "an NBD client on {host} was closed: others wait, and its handshake was not done within \
                 {CROWDED_TIMEOUT:?}"
            )
        });
    }
}

/// What a negotiation came to that did not end the connection.
struct Agreed {
    terms: Terms,
    admission: Box<dyn Admission>,
}

/// One connection from accept to hand-over.
async fn serve(
    (mut stream, from): (Accepted, Peer),
    peer: &str,
    exports: &dyn Exports,
    timeout: Duration,
    guest: Guest,
) {
    let negotiation = async {
        match &mut stream {
            Accepted::Tcp(stream) => negotiate(stream, from, exports).await,
            Accepted::Unix(stream) => negotiate(stream, from, exports).await,
        }
    };
    let Agreed { terms, admission } = match tokio::time::timeout(timeout, negotiation).await {
        Ok(Ok(Ok(agreed))) => agreed,
        Ok(Ok(Err(reason))) => {
            tracing::debug!(peer, "NBD negotiation ended: {reason}");
            if reason.is_violation() {
                guest.broke_handshake(&reason.to_string());
            }
            return;
        }
        Ok(Err(e)) => return tracing::debug!(peer, "NBD connection lost in the negotiation: {e}"),
        Err(_) => return guest.was_slow(timeout),
    };
    match into_fd(stream) {
        Ok(fd) => {
            tracing::debug!(peer, export = terms.export.name, "NBD client attached");
            let protocol = Box::new(Session::on(&terms).with_guest(guest));
            admission.attach(Attached { fd, protocol, session: terms.session, peer: peer.to_owned() });
        }
        Err(e) => tracing::warn!(peer, "cannot hand over an NBD connection: {e}"),
    }
}

/// Runs a negotiation on a stream, reading exactly what it wants.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    from: Peer,
    exports: &dyn Exports,
) -> io::Result<Result<Agreed, CloseReason>> {
    let mut out = Vec::new();
    let mut machine = Negotiation::new(&mut out);
    let mut admission = None;
    // Most negotiations need a few hundred bytes; grows to the largest option data at most.
    let mut buf = vec![0; 256];
    loop {
        stream.write_all(&out).await?;
        stream.flush().await?;
        out.clear();
        let bytes = match machine.wants() {
            Want::Bytes(len) => {
                if buf.len() < len {
                    buf.resize(OPTION_BYTES_MAX as usize, 0);
                }
                stream.read_exact(&mut buf[..len]).await?;
                &buf[..len]
            }
            Want::Discard(mut left) => {
                while left > 0 {
                    let chunk = buf.len().min(left as usize);
                    let got = stream.read(&mut buf[..chunk]).await?;
                    if got == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    // `got` is at most `left`, a u32.
                    left -= got as u32;
                }
                &[]
            }
        };
        let mut progress = machine.advance(bytes, exports, &mut out);
        if let Progress::Admit(info) = &progress {
            let result = exports.admit(&info.name, from).await;
            progress = machine.admitted(result.map(|given| admission = Some(given)), &mut out);
        }
        match progress {
            Progress::Continue => {}
            Progress::Admit(_) => unreachable!("an admission is asked for by the client, not by its answer"),
            Progress::Transmission(terms) => {
                stream.write_all(&out).await?;
                stream.flush().await?;
                let admission = admission.expect("a client enters the transmission phase admitted");
                return Ok(Ok(Agreed { terms, admission }));
            }
            Progress::Close(reason) => {
                stream.write_all(&out).await?;
                stream.shutdown().await?;
                return Ok(Err(reason));
            }
        }
    }
}

/// Takes the socket out of tokio, back in blocking mode.
fn into_fd(stream: Accepted) -> io::Result<OwnedFd> {
    match stream {
        Accepted::Tcp(stream) => {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        }
        Accepted::Unix(stream) => {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        }
    }
}
