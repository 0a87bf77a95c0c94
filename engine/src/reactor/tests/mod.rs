//! Tests on real rings, with files in a temporary directory, socket pairs and loopback TCP.
//!
//! [`TestCore`] is a write-through core of a single replica that also answers a few peer messages; it
//! notes every input with the time that came with it. [`Toy`] is a minimal client protocol.

mod clients;
mod disk;
mod fairness;
mod open;
mod peers;
mod volume;

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::meta::Superblock;
use crate::replica::{
    ClientError, ClientInput, ClientOp, ClientRequest, Cookie, Digest, DiskDone, DiskOp, DiskOpId,
    DiskRequest, DiskResult, Event, Lease, Output, PeerInput, ReplyData, Stretch,
};
use crate::types::*;
use crate::wire::{BaseContent, BufId, PeerMsg, SessionId};

/// What test and core have in common.
#[derive(Default)]
pub(super) struct Shared {
    /// Every input, as text, with its time.
    log: Mutex<Vec<(Nanos, String)>>,
    /// Requests are not started while this is set.
    hold: AtomicBool,
}

impl Shared {
    fn note(&self, now: Nanos, text: String) {
        self.log.lock().unwrap().push((now, text));
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().iter().map(|(_, text)| text.clone()).collect()
    }

    pub(super) fn times(&self, of: &str) -> Vec<Nanos> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|(_, text)| text.starts_with(of)).map(|(now, _)| *now).collect()
    }

    pub(super) fn count(&self, of: &str) -> usize {
        self.times(of).len()
    }
}

enum Doing {
    /// Edges of a partial write are being filled.
    Edges(ClientRequest),
    /// A disk operation that ends a client's request.
    Client(ClientRequest),
    PeerWrite(SessionId, PeerMsg, BufId),
    PeerRead(SessionId, PeerMsg),
    Stop,
}

/// A write-through core of one replica.
pub(super) struct TestCore {
    geometry: Geometry,
    shared: Arc<Shared>,
    outputs: VecDeque<Output>,
    doing: BTreeMap<DiskOpId, Doing>,
    held: Vec<ClientRequest>,
    next: u64,
    deadline: Option<Nanos>,
    serving: bool,
    acked: u64,
}

impl TestCore {
    pub(super) fn new(geometry: Geometry, shared: Arc<Shared>) -> Self {
        let (outputs, doing) = (VecDeque::new(), BTreeMap::new());
        let serving = false;
        Self { geometry, shared, outputs, doing, held: vec![], next: 0, deadline: None, serving, acked: 0 }
    }

    fn disk(&mut self, op: DiskOp, doing: Doing) {
        self.next += 1;
        let id = DiskOpId(self.next);
        self.doing.insert(id, doing);
        self.outputs.push_back(Output::Disk(DiskRequest { id, op }));
    }

    fn blocks(&self, request: &ClientRequest) -> BlockRange {
        self.geometry.blocks_of(ByteRange { offset: request.offset, len: request.len })
    }

    fn start(&mut self, request: ClientRequest) {
        let durable = request.fua;
        match request.op {
            ClientOp::Read => {
                let blocks = self.blocks(&request);
                self.disk(DiskOp::Read { blocks, digest: Digest::None }, Doing::Client(request));
            }
            ClientOp::Flush => self.disk(DiskOp::Flush, Doing::Client(request)),
            ClientOp::Extents { max } => {
                let blocks = self.blocks(&request);
                self.disk(DiskOp::Extents { blocks, max }, Doing::Client(request));
            }
            ClientOp::Zero => {
                let blocks = self.blocks(&request);
                self.disk(DiskOp::Zero { blocks, durable }, Doing::Client(request));
            }
            ClientOp::Write(payload) => {
                let (blocks, buf) = (self.blocks(&request), payload.buf);
                let bytes = self.geometry.bytes_of(blocks);
                let head = u32::try_from(request.offset - bytes.offset).unwrap();
                let tail = u32::try_from(bytes.offset + bytes.len - request.offset - request.len).unwrap();
                if head > 0 || tail > 0 {
                    self.disk(DiskOp::FillEdges { buf, blocks, head, tail }, Doing::Edges(request));
                } else {
                    self.disk(DiskOp::Write { blocks, buf, durable }, Doing::Client(request));
                }
            }
        }
    }

    fn reply(&mut self, request: &ClientRequest, result: Result<ReplyData, ClientError>) {
        self.outputs.push_back(Output::Reply { conn: request.conn, cookie: request.cookie, result });
    }

    fn finish_client(&mut self, request: ClientRequest, result: Result<DiskResult, ClientError>) {
        let skip = u32::try_from(request.offset % 4096).unwrap();
        match (request.op, result) {
            (ClientOp::Read, Ok(DiskResult::Read { payload, all_zero: zero, .. })) => {
                let (buf, len) = (payload.buf, u32::try_from(request.len).unwrap());
                self.reply(&request, Ok(ReplyData::Read { buf, skip, len, zero }));
                self.outputs.push_back(Output::Release(buf));
            }
            (ClientOp::Extents { .. }, Ok(DiskResult::Extents(found))) => {
                let extent = |s: Stretch| Extent { len: s.count * 4096, hole: s.hole, dirty: false };
                self.reply(&request, Ok(ReplyData::Extents(found.into_iter().map(extent).collect())));
            }
            (op, result) => {
                self.reply(&request, result.map(|_| ReplyData::None));
                if let ClientOp::Write(payload) = op {
                    self.acked += 1;
                    self.outputs.push_back(Output::Release(payload.buf));
                }
            }
        }
    }

    fn peer_message(&mut self, session: SessionId, message: PeerMsg) {
        match message {
            PeerMsg::Ping => self.outputs.push_back(Output::Send(session, PeerMsg::Pong)),
            PeerMsg::Write { blocks, payload, durable, .. } => {
                let op = DiskOp::Write { blocks, buf: payload.buf, durable };
                self.disk(op, Doing::PeerWrite(session, message, payload.buf));
            }
            PeerMsg::ReadRequest { blocks, .. } => {
                self.disk(DiskOp::Read { blocks, digest: Digest::Hashes }, Doing::PeerRead(session, message));
            }
            PeerMsg::Failed { reason, .. } if reason == "panic" => panic!("asked to"),
            PeerMsg::Failed { reason, .. } => self.outputs.push_back(Output::CloseSession(session, reason)),
            _ => {}
        }
    }
}

impl Core for TestCore {
    fn handle_client(&mut self, now: Nanos, input: ClientInput) {
        match input {
            ClientInput::Request(request) => {
                let kind = format!("{:?}", request.op);
                let kind = kind.split('(').next().unwrap();
                self.shared.note(now, format!("request {} {kind} {}", request.conn.0, request.len));
                if self.shared.hold.load(Ordering::SeqCst) {
                    self.held.push(request);
                } else {
                    self.start(request);
                }
            }
            ClientInput::Closed(conn) => {
                self.shared.note(now, format!("closed {}", conn.0));
                let (gone, kept) = self.held.drain(..).partition::<Vec<_>, _>(|r| r.conn == conn);
                self.held = kept;
                for request in gone {
                    if let ClientOp::Write(payload) = request.op {
                        self.outputs.push_back(Output::Release(payload.buf));
                    }
                }
            }
        }
    }

    fn handle_disk(&mut self, now: Nanos, done: DiskDone) {
        self.shared.note(now, format!("disk {}", done.result.is_ok()));
        match self.doing.remove(&done.id).unwrap() {
            Doing::Edges(request) => {
                let ClientOp::Write(payload) = request.op else { unreachable!() };
                let blocks = self.blocks(&request);
                let op = DiskOp::Write { blocks, buf: payload.buf, durable: request.fua };
                self.disk(op, Doing::Client(request));
            }
            Doing::Client(request) => {
                self.finish_client(request, done.result.map_err(|_| ClientError::Io));
            }
            Doing::PeerWrite(session, PeerMsg::Write { reign, seq, .. }, buf) => {
                self.outputs.push_back(Output::Release(buf));
                self.outputs.push_back(Output::Send(session, PeerMsg::WriteAck { reign, seq }));
            }
            Doing::PeerRead(session, PeerMsg::ReadRequest { reign, id, blocks }) => {
                let Ok(DiskResult::Read { payload, hashes, .. }) = done.result else { panic!("read failed") };
                assert_eq!(hashes.len() as u64, blocks.count);
                let reply = PeerMsg::ReadReply { reign, id, payload: Some(payload) };
                self.outputs.push_back(Output::Send(session, reply));
                self.outputs.push_back(Output::Release(payload.buf));
            }
            Doing::Stop => self.outputs.push_back(Output::Stopped),
            Doing::PeerWrite(..) | Doing::PeerRead(..) => unreachable!(),
        }
    }

    fn handle_peer(&mut self, now: Nanos, input: PeerInput) {
        match input {
            PeerInput::Up { session, node, .. } => {
                self.shared.note(now, format!("up {} of {node}", session.0));
            }
            PeerInput::Down(session) => self.shared.note(now, format!("down {}", session.0)),
            PeerInput::Msg(session, message) => {
                let kind = crate::wire::FrameKind::of(&message);
                self.shared.note(now, format!("message {} {kind}", session.0));
                self.peer_message(session, message);
            }
        }
    }

    fn handle_config(&mut self, now: Nanos, _config: ConfigView) {
        self.shared.note(now, "config".into());
    }

    /// A lease until 0 closes all clients; one until 1 lets held requests go; else it is the deadline.
    fn handle_lease(&mut self, now: Nanos, lease: Lease) {
        self.shared.note(now, format!("lease {}", lease.until.0));
        match lease.until.0 {
            0 => self.outputs.push_back(Output::CloseClients("told to".into())),
            1 => {
                self.shared.hold.store(false, Ordering::SeqCst);
                for request in std::mem::take(&mut self.held) {
                    self.start(request);
                }
            }
            until => self.deadline = Some(Nanos(until)),
        }
    }

    fn handle_proposal(&mut self, now: Nanos, id: ProposalId, _outcome: ProposalOutcome) {
        self.shared.note(now, format!("proposal {}", id.0));
    }

    fn handle_tick(&mut self, now: Nanos) {
        self.shared.note(now, "tick".into());
        self.deadline = None;
        self.serving = true;
    }

    fn begin_move(&mut self, _now: Nanos, to: NodeId) -> Result<(), String> {
        Err(format!("{to} is not in sync"))
    }

    fn begin_demote(&mut self, _now: Nanos) -> Result<(), String> {
        Ok(())
    }

    fn begin_force(&mut self, _now: Nanos, discard: bool) -> Result<ReplicaReport, String> {
        if discard { Ok(self.status().report) } else { Err("half done".into()) }
    }

    fn end_force(&mut self, now: Nanos) {
        self.shared.note(now, "end of force".into());
    }

    fn begin_stop(&mut self, _now: Nanos) {
        self.disk(DiskOp::Flush, Doing::Stop);
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn poll_deadline(&self) -> Option<Nanos> {
        self.deadline
    }

    fn status(&self) -> ReplicaStatus {
        ReplicaStatus {
            node: NodeId(1),
            epoch: Epoch(1),
            reign: Reign(1),
            role: Role::Primary,
            state: ReplicaState::InSync,
            health: Health::Healthy,
            serving: self.serving,
            writes_acked: self.acked,
            intent_regions: 0,
            peers: Vec::new(),
            report: ReplicaReport {
                trust: SuperblockTrust::Sound,
                epoch: Epoch(1),
                reign: Reign(1),
                lineage: LineageId(1),
                member: None,
                inconsistent: false,
                clean: false,
                same_os_boot: true,
            },
            failure: None,
        }
    }
}

/// Header of a request: operation, flags, handle, offset, length. Of a reply: handle, error.
pub(super) struct Toy;

pub(super) const TOY_HEADER: usize = 22;
pub(super) const READ: u8 = 0;
pub(super) const WRITE: u8 = 1;
pub(super) const FLUSH: u8 = 2;
pub(super) const TRIM: u8 = 3;
pub(super) const GOODBYE: u8 = 4;
/// Zeroes that take their space.
pub(super) const FILL: u8 = 5;
/// Which parts are holes: the reply goes on with a number of extents, a length and a byte each.
pub(super) const STATUS: u8 = 6;

impl ClientProtocol for Toy {
    fn header_len(&self) -> usize {
        TOY_HEADER
    }

    fn parse(&mut self, header: &[u8]) -> ClientFrame {
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        let op = match header[0] {
            READ => FrontOp::Read,
            WRITE => FrontOp::Write,
            FLUSH => FrontOp::Flush,
            TRIM => FrontOp::Trim,
            FILL => FrontOp::WriteZeroes,
            STATUS => FrontOp::BlockStatus,
            GOODBYE => return ClientFrame::Disconnect,
            other => return ClientFrame::Violation(format!("operation {other}")),
        };
        let len = u32::from_le_bytes(header[18..22].try_into().unwrap());
        let (handle, offset, fua) = (number(2), number(10), header[1] == 1);
        let len = u64::from(len);
        let payload = if op == FrontOp::Write { len } else { 0 };
        ClientFrame::Request(FrontRequest {
            handle,
            op,
            offset,
            len,
            payload,
            fua,
            no_hole: op == FrontOp::WriteZeroes,
            one: false,
            error: None,
        })
    }

    fn reply(&mut self, request: &FrontRequest, answer: Answer<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(&request.handle.to_le_bytes());
        out.push(match answer {
            Answer::Error(ClientError::Invalid) => 1,
            Answer::Error(_) => 2,
            _ => 0,
        });
        if let Answer::Extents(extents) = answer {
            out.push(u8::try_from(extents.len()).unwrap());
            for extent in extents {
                out.extend_from_slice(&extent.len.to_le_bytes());
                out.push(u8::from(extent.hole));
            }
        }
    }
}

/// Bytes of a request header.
pub(super) fn header(op: u8, handle: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![op, 0];
    bytes.extend_from_slice(&handle.to_le_bytes());
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes
}

/// A client of a volume over any stream.
pub(super) struct Client<S>(pub(super) S);

impl<S: Read + Write> Client<S> {
    pub(super) fn send(&mut self, op: u8, handle: u64, offset: u64, len: u32, payload: &[u8]) {
        self.0.write_all(&header(op, handle, offset, len)).unwrap();
        self.0.write_all(payload).unwrap();
    }

    /// Handle and error of the next reply.
    pub(super) fn reply(&mut self) -> (u64, u8) {
        let mut bytes = [0; 9];
        self.0.read_exact(&mut bytes).unwrap();
        (u64::from_le_bytes(bytes[..8].try_into().unwrap()), bytes[8])
    }

    pub(super) fn write(&mut self, offset: u64, payload: &[u8]) {
        self.send(WRITE, 7, offset, u32::try_from(payload.len()).unwrap(), payload);
        assert_eq!(self.reply(), (7, 0));
    }

    pub(super) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(READ, 8, offset, len, &[]);
        assert_eq!(self.reply(), (8, 0));
        let mut bytes = vec![0; len as usize];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Extents of a range: how long, and whether it is a hole.
    pub(super) fn status(&mut self, offset: u64, len: u32) -> Vec<(u64, bool)> {
        self.send(STATUS, 9, offset, len, &[]);
        assert_eq!(self.reply(), (9, 0));
        let mut count = [0; 1];
        self.0.read_exact(&mut count).unwrap();
        let mut bytes = vec![0; usize::from(count[0]) * 9];
        self.0.read_exact(&mut bytes).unwrap();
        bytes.chunks(9).map(|b| (u64::from_le_bytes(b[..8].try_into().unwrap()), b[8] == 1)).collect()
    }

    /// True if the other side closed, and sent nothing more before.
    pub(super) fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 1];
        !matches!(self.0.read(&mut bytes), Ok(1))
    }
}

#[derive(Clone, Default)]
pub(super) struct Hooks {
    pub(super) lost: Arc<Mutex<Vec<NodeId>>>,
    pub(super) statuses: Arc<Mutex<Vec<Arc<ReplicaStatus>>>>,
}

impl VolumeHooks for Hooks {
    fn propose(&mut self, _proposal: Proposal) {}
    fn event(&mut self, _event: Event) {}
    fn session_lost(&mut self, node: NodeId) {
        self.lost.lock().unwrap().push(node);
    }
    fn status_changed(&mut self, status: Arc<ReplicaStatus>) {
        self.statuses.lock().unwrap().push(status);
    }
}

pub(super) fn geometry(size: u64) -> Geometry {
    Geometry::new(size, 4096, 65536).unwrap()
}

pub(super) fn superblock(geometry: Geometry) -> Superblock {
    Superblock {
        cluster: ClusterId(1),
        volume: VolumeId(2),
        node: NodeId(1),
        slot: ReplicaSlot(0),
        geometry,
        seq: 0,
        epoch: Epoch(1),
        reign: Reign(1),
        lineage: LineageId(3),
        member: Some(Incarnation { boot: 1, nonce: 1 }),
        chain: Vec::new(),
        current: Incarnation { boot: 1, nonce: 1 },
        os_boot: 0,
        inconsistent: None,
        base: BaseContent::Zero,
        identity: crate::meta::DataIdentity::default(),
        clean: None,
    }
}

pub(super) fn paths(dir: &tempfile::TempDir) -> VolumePaths {
    VolumePaths { data: dir.path().join("v.data"), meta: dir.path().join("v.meta") }
}

pub(super) fn make(dir: &tempfile::TempDir, size: u64) -> OpenVolume {
    let slots = [ReplicaSlot(1)];
    create(&paths(dir), superblock(geometry(size)), &slots, true, Duration::ZERO).unwrap()
}

/// A running volume with a [`TestCore`].
pub(super) struct Rig {
    pub(super) dir: tempfile::TempDir,
    pub(super) volume: VolumeHandle,
    pub(super) shared: Arc<Shared>,
    pub(super) hooks: Hooks,
}

/// A client of the toy protocol.
pub(super) fn new_client(socket: OwnedFd, key: u64, guard: ClientGuard) -> NewClient {
    let (key, protocol) = (ClientKey(key), Box::new(Toy));
    NewClient { key, socket, protocol, session: None, name: "test".into(), guard }
}

impl Rig {
    pub(super) fn new(size: u64) -> Self {
        Self::with(size, ReactorOptions::new("test"))
    }

    pub(super) fn with(size: u64, options: ReactorOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let open = make(&dir, size);
        let (shared, hooks) = (Arc::new(Shared::default()), Hooks::default());
        let for_core = Arc::clone(&shared);
        let core = move |_now| TestCore::new(geometry(size), for_core);
        let volume = spawn(core, open.files, Box::new(hooks.clone()), options).unwrap();
        Self { dir, volume, shared, hooks }
    }

    /// A client over a unix socket. Reads of it end after ten seconds.
    pub(super) fn client(&self) -> Client<UnixStream> {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        there.set_nonblocking(true).unwrap();
        self.volume.client_connected(new_client(OwnedFd::from(there), 0, Box::new(|_| ())));
        Client(here)
    }

    /// The same, of a client session.
    pub(super) fn client_of(&self, id: u128, generation: u64) -> Client<UnixStream> {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let client = new_client(OwnedFd::from(there), 0, Box::new(|_| ()));
        self.volume.client_connected(NewClient { session: Some(ClientSession { id, generation }), ..client });
        Client(here)
    }

    /// The same, with a key and a guard.
    pub(super) fn client_with(&self, key: u64, guard: ClientGuard) -> Client<UnixStream> {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        self.volume.client_connected(new_client(OwnedFd::from(there), key, guard));
        Client(here)
    }

    pub(super) fn hold(&self) {
        self.shared.hold.store(true, Ordering::SeqCst);
    }

    pub(super) fn let_go(&self) {
        self.volume.lease(Lease { until: Nanos(1) });
    }

    pub(super) fn stop(&self) {
        self.volume.stop();
        assert!(self.volume.wait_stopped(Duration::from_secs(10)));
    }
}

/// Waits until something holds, ten seconds at most.
pub(super) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Content that differs from place to place.
pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ (at >> 12) as u8 ^ seed).collect()
}
