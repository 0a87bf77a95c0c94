//! An NBD server for tests: the real negotiation and session in front of volumes in memory, with one thread
//! per connection in the place of the reactor.

#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkrepl_engine::reactor::client::{Answer, ClientFrame, ClientProtocol, FrontOp, FrontRequest};
use blkrepl_engine::types::Extent;
use blkrepl_nbd::{
    Admitting, Attached, ClientOptions, ExportInfo, ExportRefusal, Exports, ListenAddr, NbdClient, NbdUri,
    Peer, Server, ServerOptions, admit_with,
};

/// How a volume treats its connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// Answers each request before it takes the next.
    #[default]
    InOrder,
    /// Collects so many requests, then answers them last one first.
    Reversed(usize),
    /// Answers so many requests, then closes the connection with the next one unanswered.
    CloseAfter(usize),
    /// Takes requests and answers none.
    Silent,
    /// Drops the connection instead of serving it.
    Drop,
}

#[derive(Default)]
pub struct Volume {
    pub data: Mutex<Vec<u8>>,
    pub flushes: AtomicU64,
    pub fuas: AtomicU64,
    /// Bytes that were read.
    pub read: AtomicU64,
    pub manner: Manner,
}

impl Volume {
    pub fn new(size: usize, manner: Manner) -> Arc<Self> {
        Arc::new(Self { data: Mutex::new(vec![0; size]), manner, ..Self::default() })
    }
}

#[derive(Default)]
pub struct Memory {
    pub volumes: BTreeMap<String, Arc<Volume>>,
    pub refusals: BTreeMap<String, ExportRefusal>,
}

impl Memory {
    pub fn one(volume: &Arc<Volume>) -> Arc<Self> {
        Self::of([("vol0", volume)])
    }

    pub fn of<'a>(volumes: impl IntoIterator<Item = (&'a str, &'a Arc<Volume>)>) -> Arc<Self> {
        let volumes = volumes.into_iter().map(|(name, volume)| (name.to_owned(), Arc::clone(volume)));
        Arc::new(Self { volumes: volumes.collect(), refusals: BTreeMap::new() })
    }
}

impl Exports for Memory {
    fn list(&self) -> Vec<String> {
        self.volumes.keys().chain(self.refusals.keys()).cloned().collect()
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        if let Some(refusal) = self.refusals.get(name) {
            return Err(refusal.clone());
        }
        let volume = self.volumes.get(name);
        let volume = volume.ok_or_else(|| ExportRefusal::Unknown(format!("no volume {name:?} here")))?;
        Ok(ExportInfo::new(name, volume.data.lock().unwrap().len() as u64))
    }

    fn admit(&self, name: &str, _: Peer) -> Admitting {
        let volume = Arc::clone(&self.volumes[name]);
        admit_with(move |client| {
            if volume.manner != Manner::Drop {
                std::thread::spawn(move || Connection::new(client, volume).run());
            }
        })
    }
}

struct Connection {
    socket: File,
    protocol: Box<dyn ClientProtocol>,
    volume: Arc<Volume>,
    held: Vec<(FrontRequest, Vec<u8>)>,
    answered: usize,
}

impl Connection {
    fn new(client: Attached, volume: Arc<Volume>) -> Self {
        Self { socket: client.fd.into(), protocol: client.protocol, volume, held: Vec::new(), answered: 0 }
    }

    fn run(mut self) {
        loop {
            let mut header = vec![0; self.protocol.header_len()];
            if self.socket.read_exact(&mut header).is_err() {
                return;
            }
            let ClientFrame::Request(request) = self.protocol.parse(&header) else { return };
            let mut payload = Vec::new();
            if request.error.is_some() {
                // Drained in small pieces, as a server with bounded memory does.
                std::io::copy(&mut (&self.socket).take(request.payload), &mut std::io::sink()).unwrap();
            } else {
                (&self.socket).take(request.payload).read_to_end(&mut payload).unwrap();
            }
            self.held.push((request, payload));
            let keep = match self.volume.manner {
                Manner::Reversed(count) => self.held.len() < count,
                Manner::CloseAfter(count) if self.answered == count => return,
                Manner::Silent => true,
                _ => false,
            };
            if !keep {
                while let Some((request, payload)) = self.held.pop() {
                    self.answered += 1;
                    if self.answer(request, &payload).is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn answer(&mut self, request: FrontRequest, payload: &[u8]) -> std::io::Result<()> {
        let mut out = Vec::new();
        if let Some(error) = request.error {
            self.protocol.reply(&request, Answer::Error(error), &mut out);
            return self.socket.write_all(&out);
        }
        self.volume.fuas.fetch_add(u64::from(request.fua), Ordering::Relaxed);
        let start = usize::try_from(request.offset).unwrap();
        let range = start..start + usize::try_from(request.len).unwrap();
        match request.op {
            FrontOp::Read => {
                self.volume.read.fetch_add(request.len, Ordering::Relaxed);
                self.protocol.reply(&request, Answer::Data, &mut out);
                out.extend_from_slice(&self.volume.data.lock().unwrap()[range]);
                return self.socket.write_all(&out);
            }
            FrontOp::BlockStatus => {
                let extents = extents(start, &self.volume.data.lock().unwrap()[range]);
                self.protocol.reply(&request, Answer::Extents(&extents), &mut out);
                return self.socket.write_all(&out);
            }
            FrontOp::Write => self.volume.data.lock().unwrap()[range].copy_from_slice(payload),
            FrontOp::Trim | FrontOp::WriteZeroes => self.volume.data.lock().unwrap()[range].fill(0),
            FrontOp::Cache => {}
            FrontOp::Flush => {
                self.volume.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.protocol.reply(&request, Answer::Done, &mut out);
        self.socket.write_all(&out)
    }
}

/// Blocks of zeroes are holes; those at odd MiB are dirty. Not the whole answer, if there are many.
fn extents(start: usize, bytes: &[u8]) -> Vec<Extent> {
    let states = bytes.chunks(4096).enumerate().map(|(n, block)| {
        let (hole, dirty) = (block.iter().all(|byte| *byte == 0), (start / 4096 + n) / 256 % 2 == 1);
        Extent { len: block.len() as u64, hole, dirty }
    });
    let mut out: Vec<Extent> = Vec::new();
    for next in states {
        match out.last_mut() {
            Some(last) if (last.hole, last.dirty) == (next.hole, next.dirty) => last.len += next.len,
            _ => out.push(next),
        }
    }
    out.truncate(64);
    out
}

/// A server on a unix socket and a TCP port, with a runtime of its own.
pub struct TestServer {
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
    pub dir: tempfile::TempDir,
}

impl TestServer {
    pub fn start(exports: Arc<dyn Exports>) -> Self {
        Self::with(exports, ServerOptions::default())
    }

    pub fn with(exports: Arc<dyn Exports>, options: ServerOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listen =
            [ListenAddr::Unix(dir.path().join("nbd.sock")), ListenAddr::Tcp("127.0.0.1:0".parse().unwrap())];
        let server = runtime.block_on(Server::start(&listen, exports, options)).unwrap();
        Self { runtime, server: Some(server), dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub fn unix(&self, export: &str) -> NbdUri {
        NbdUri::unix(self.socket(), export)
    }

    pub fn tcp(&self, export: &str) -> NbdUri {
        match &self.server.as_ref().unwrap().addrs()[1] {
            ListenAddr::Tcp(addr) => NbdUri::tcp(addr.ip().to_string(), addr.port(), export),
            ListenAddr::Unix(path) => panic!("{}", path.display()),
        }
    }

    /// One of the server's counters.
    pub fn count(&self, name: &str) -> u64 {
        self.server.as_ref().unwrap().misbehaviour().counts()[name]
    }

    /// Waits until a counter has a value, ten seconds at most.
    pub fn await_count(&self, name: &str, wanted: u64) {
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while self.count(name) != wanted {
            assert!(std::time::Instant::now() < end, "{name} is {}, not {wanted}", self.count(name));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn connect(&self) -> NbdClient {
        NbdClient::connect(&self.unix("vol0"), quick()).unwrap()
    }

    pub fn stop(&mut self) {
        self.runtime.block_on(self.server.take().unwrap().stop());
    }
}

/// Generous for a busy machine, short enough to end a test that hangs.
pub fn quick() -> ClientOptions {
    ClientOptions { connect_timeout: Duration::from_secs(20), io_timeout: Duration::from_secs(20) }
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
