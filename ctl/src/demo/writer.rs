//! A client that writes a file to a volume and does not mind when the primary changes.
//!
//! Keeps a window of requests in flight. When the connection ends it finds out who is primary by asking
//! every node, and replays what was not acknowledged: a replay is a new operation, and writing the same
//! content twice is harmless. It treats a request as done only when it was acknowledged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use blkrepl_nbd::{ClientOptions, Handle, NbdClient, NbdErrno, NbdError, NbdUri, Request};

use crate::signals::Interrupt;

/// Largest request.
pub const CHUNK_BYTES_MAX: u64 = 256 << 10;
/// Smallest request.
const CHUNK_BYTES_MIN: u64 = 4096;
/// Requests in flight.
pub const WINDOW: usize = 16;
/// How long a client looks for a primary before it gives up.
const FIND_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between two looks.
const FIND_PAUSE: Duration = Duration::from_millis(5);

/// The volume at one node.
#[derive(Clone, Debug)]
pub struct Target {
    /// Name of the node.
    pub node: String,
    /// Where.
    pub uri: NbdUri,
}

/// Connects to whoever serves the volume.
///
/// # Errors
/// Nobody does for [`FIND_TIMEOUT`], or a node answers something that no wait will cure.
pub fn connect(targets: &[Target], interrupt: &Interrupt) -> anyhow::Result<(String, NbdClient)> {
    let options =
        ClientOptions { connect_timeout: Duration::from_secs(1), io_timeout: Duration::from_secs(30) };
    let give_up = Instant::now() + FIND_TIMEOUT;
    loop {
        let mut last = None;
        for target in targets {
            match NbdClient::connect(&target.uri, options) {
                Ok(client) => return Ok((target.node.clone(), client)),
                Err(error) if error.is_transient() => last = Some(error),
                Err(error) => {
                    return Err(anyhow::Error::new(error).context(format!("{} refuses", target.node)));
                }
            }
        }
        if interrupt.is_set() {
            bail!("interrupted");
        }
        if Instant::now() >= give_up {
            let reason = last.map_or_else(String::new, |e| format!(": {e}"));
            bail!("no node serves the volume for {} s{reason}", FIND_TIMEOUT.as_secs());
        }
        std::thread::sleep(FIND_PAUSE);
    }
}

/// What the writer tells as it goes.
pub enum Seen<'a> {
    /// Requests are in flight; `acked` of `total` chunks are acknowledged.
    InFlight {
        /// Chunks.
        acked: u64,
        /// Chunks.
        total: u64,
    },
    /// The connection ended.
    Lost,
    /// A chunk was acknowledged.
    Acked {
        /// Bytes of it.
        bytes: u64,
        /// By which node.
        node: &'a str,
    },
    /// Everything is acknowledged and flushed.
    Flushed {
        /// By which node.
        node: &'a str,
    },
}

/// Writes the first `len` bytes of a file to the start of a volume.
pub struct Writer<'a> {
    /// Where the volume may be.
    pub targets: &'a [Target],
    /// The file.
    pub file: &'a File,
    /// Bytes.
    pub len: u64,
    /// Ends early.
    pub interrupt: &'a Interrupt,
}

impl Writer<'_> {
    /// Bytes per request: small files are cut finer, so that there is a middle to be killed in.
    pub fn chunk(&self) -> u64 {
        (self.len / 64 / CHUNK_BYTES_MIN * CHUNK_BYTES_MIN).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    }

    /// Writes everything and flushes. `seen` is called for all that happens.
    ///
    /// # Errors
    /// The file cannot be read, a request is answered with an error, nobody serves, or `seen` says so.
    pub fn run(&self, mut seen: impl FnMut(Seen<'_>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let chunk = self.chunk();
        let total = self.len.div_ceil(chunk);
        let mut todo: VecDeque<u64> = (0..total).collect();
        let mut acked = 0;
        loop {
            let (node, mut client) = connect(self.targets, self.interrupt)?;
            let mut flying: BTreeMap<Handle, u64> = BTreeMap::new();
            let end = loop {
                if self.interrupt.is_set() {
                    bail!("interrupted");
                }
                if let Err(error) = self.fill(&mut client, chunk, &mut todo, &mut flying)? {
                    break error;
                }
                // Only a flush that the connection saw through ends it: what an earlier primary acknowledged
                // is on the present one, too, and the flush makes it stable there.
                if flying.is_empty() {
                    match client.flush() {
                        Ok(()) => return seen(Seen::Flushed { node: &node }),
                        Err(error) => break error,
                    }
                }
                seen(Seen::InFlight { acked, total })?;
                match client.poll(Duration::from_millis(100)) {
                    Ok(Some(done)) => {
                        let Some(index) = flying.remove(&done.handle) else { continue };
                        match done.result {
                            Ok(_) => {
                                acked += 1;
                                let bytes = chunk.min(self.len - index * chunk);
                                seen(Seen::Acked { bytes, node: &node })?;
                            }
                            Err(NbdErrno::Shutdown) => {
                                todo.push_front(index);
                                break NbdError::Server(NbdErrno::Shutdown);
                            }
                            Err(errno) => bail!("{node} answered a write with {errno}"),
                        }
                    }
                    Ok(None) => {}
                    Err(error) => break error,
                }
            };
            if !end.is_transient() {
                return Err(anyhow::Error::new(end).context(format!("{node} failed")));
            }
            seen(Seen::Lost)?;
            // Replayed first and in order.
            let replay: BTreeSet<u64> = flying.into_values().collect();
            for index in replay.into_iter().rev() {
                todo.push_front(index);
            }
        }
    }

    /// Puts requests in flight up to the window. The inner error is the connection's.
    fn fill(
        &self,
        client: &mut NbdClient,
        chunk: u64,
        todo: &mut VecDeque<u64>,
        flying: &mut BTreeMap<Handle, u64>,
    ) -> anyhow::Result<Result<(), NbdError>> {
        while flying.len() < WINDOW {
            let Some(&index) = todo.front() else { break };
            let offset = index * chunk;
            let mut data = vec![0; usize::try_from(chunk.min(self.len - offset))?];
            self.file.read_exact_at(&mut data, offset).context("cannot read the file to write")?;
            match client.submit(Request::Write { offset, data: &data, fua: false }) {
                Ok(handle) => {
                    todo.pop_front();
                    flying.insert(handle, index);
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(()))
    }
}

/// Rewrites one chunk of the file again and again, and measures the longest pause between two
/// acknowledgements, reconnects included.
pub struct Prober {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    worst_ms: std::sync::Arc<std::sync::atomic::AtomicU64>,
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Prober {
    /// Starts writing the first 4096 bytes of `content` to the start of the volume.
    pub fn start(targets: Vec<Target>, content: Vec<u8>, interrupt: Interrupt) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let worst_ms = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let (halt, worst) = (stop.clone(), worst_ms.clone());
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            let mut first = true;
            'connection: while !halt.load(Relaxed) {
                let (node, mut client) = connect(&targets, &interrupt)?;
                while !halt.load(Relaxed) {
                    match client.write(0, &content) {
                        Ok(()) => {}
                        Err(error) if error.is_transient() => continue 'connection,
                        Err(error) => return Err(anyhow::Error::new(error).context(node)),
                    }
                    if !first {
                        worst.fetch_max(super::timeline::millis(last.elapsed()), Relaxed);
                    }
                    first = false;
                    last = Instant::now();
                }
            }
            Ok(())
        });
        Self { stop, worst_ms, thread }
    }

    /// The longest pause so far, milliseconds; starts anew.
    pub fn take_worst_ms(&self) -> u64 {
        self.worst_ms.swap(0, std::sync::atomic::Ordering::Relaxed)
    }

    /// Ends it.
    ///
    /// # Errors
    /// The client failed.
    pub fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the measuring client panicked"))?
    }
}
