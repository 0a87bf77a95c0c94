//! Client connections: requests in, answers out.
//!
//! A connection is read one receive at a time; headers are parsed in place, a write's payload lands at
//! its offset within whole blocks of an aligned buffer, answers gather and leave with one `sendmsg` per
//! turn. Reading stops (back-pressure, never loss) while the connection's window of requests is unanswered, or
//! the volume's bound on client bytes or the connection's share of them ([`fair`]) is reached.
//!
//! Rules kept here: a client that has shut down is gone at once, and what it sent and nobody read is
//! dropped; a connection that stays unread too long is closed [R24]; nothing of a closed connection is
//! delivered afterwards [R23]; a client that takes no answers, or does not send the payload that it
//! announced, keeps its share of the client bytes only as long as nobody else waits for them, and its connection
//! for [`OWED_LIMITS`] unread times.
//!
//! Never does: deciding when or whether a request is answered (the core's), or speaking a protocol (a
//! [`ClientProtocol`]'s).

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::mutation::{Mutation, mutated};
use crate::replica::{ClientError, ClientOp, ClientRequest, ConnId, Cookie, EXTENTS_MAX, ReplyData};
use crate::rising_map::RisingMap;
use crate::types::{ByteRange, Extent, Geometry, Nanos};
use crate::wire::{BufId, Payload};

use super::buffers::Account;
use super::client::{Answer, ClientFrame, ClientProtocol, ClientSession, End, FrontOp, FrontRequest};
use super::fair;
use super::handle::{ClientGuard, ClientKey, NewClient};
use super::outgoing::{Message, Outgoing};
use super::ring::{Io, Span, Token};
use super::sessions::ClientSessions;
use super::staging::{SHARED_LEN, STAGING_LEN, Staging};

/// Most client connections of one volume; further ones are closed at once.
pub(super) const CONNECTIONS_MAX: usize = 1024;
/// Longest read or write in bytes.
pub(super) const CLIENT_LEN_MAX: u64 = 32 << 20;
/// A longer trim or write-zeroes is given to the core in pieces of this many bytes, one after the other.
const ZERO_PIECE_LEN: u64 = 32 << 20;
/// Zeroes that are to take their space are written in pieces of this many bytes, one after the other.
const FILL_PIECE_LEN: u64 = 1 << 20;
/// Longest answer to a request for the block status, in bytes: [`EXTENTS_MAX`] extents in two contexts, 16 bytes
/// each, and what goes before them.
const STATUS_LEN_MAX: u64 = 12 << 10;
/// A client that moves fewer bytes than this within a quarter of the longest unread time, while it owes a
/// payload or answers wait for it, counts as stalled.
const STALL_LEN: usize = 64 << 10;
/// One that does so for this many times the longest unread time is closed, whether anybody waits or not, and so is
/// one that does not send the rest of a header.
const OWED_LIMITS: u32 = 3;
/// While a volume has more connections than this, each uses [`SHARED_LEN`] of its staging buffer only.
const WHOLE_STAGING_MAX: usize = 16;
/// Longest header of a client protocol.
const HEADER_LEN_MAX: usize = 4096;

const _: () = assert!(HEADER_LEN_MAX * 2 <= SHARED_LEN && SHARED_LEN <= STAGING_LEN);
const _: () = assert!(EXTENTS_MAX as u64 * 2 * 16 + 1024 <= STATUS_LEN_MAX);

/// What a connection is in the middle of.
enum State {
    /// The next header.
    Header,
    /// A request whose answer or payload waits for its share of the client bytes.
    Waiting(FrontRequest),
    /// The payload of a write: `got` bytes of it are in `buf`.
    Payload { request: FrontRequest, buf: BufId, got: usize },
    /// The payload of a request that is refused: `left` bytes are still to be thrown away.
    Draining { request: FrontRequest, left: u64 },
    /// The client said that it sends nothing more.
    Finishing,
}

/// A request that the core has (or had a piece of).
struct Request {
    front: FrontRequest,
    /// Client bytes reserved for its answer, or for its pieces one after the other, which no buffer carries.
    reserved: u64,
    /// The zeroes that are written for it at the moment, which it holds, too.
    piece: Option<BufId>,
    /// Of a long zero request: bytes after the piece that the core has.
    rest: u64,
}

struct Connection {
    key: ClientKey,
    socket: Rc<OwnedFd>,
    protocol: Box<dyn ClientProtocol>,
    session: Option<ClientSession>,
    name: String,
    staging: Staging,
    state: State,
    receiving: bool,
    /// The last receive left something in the socket.
    more: bool,
    outgoing: Outgoing,
    requests: RisingMap<Cookie, Request>,
    /// Whose client bytes are its own.
    account: Account,
    /// It is among those with something to send.
    listed: bool,
    /// Requests read whose answer is not yet sent whole.
    unanswered: u32,
    next_cookie: u64,
    /// Since when it is not read.
    unread_since: Option<Nanos>,
    /// Since when the client owes the rest of a request or does not take its answers, and has moved less than
    /// [`STALL_LEN`].
    owes_since: Option<Nanos>,
    /// Bytes moved in either direction since then.
    moved: usize,
    /// When it last sent something, or took an answer.
    active_at: Nanos,
    /// Hears of its end.
    guard: ClientGuard,
}

/// What a connection comes up with.
#[derive(Debug)]
pub(super) enum Next {
    /// A request for the core.
    Request(ClientRequest),
    /// The connection is to be closed, for this reason.
    Close(End, String),
}

/// All client connections of one volume.
pub(super) struct Clients {
    geometry: Geometry,
    unread_max: Duration,
    idle_max: Option<Duration>,
    /// When idle connections are looked for next, if they are.
    idle_check: Nanos,
    /// Connections with requests that are not answered.
    busy: usize,
    connections: BTreeMap<ConnId, Connection>,
    next_conn: u64,
    sessions: ClientSessions,
    /// Connections that wait for client bytes, in the order in which they began to.
    waiting: VecDeque<ConnId>,
    /// Connections with something to send, each once; some may be closed by now.
    to_flush: Vec<ConnId>,
    /// The answer to a request for the block status, while it is made.
    status: Vec<u8>,
}

impl Clients {
    /// None yet. `unread_max`: how long a connection may stay unread; `idle_max`: how long it may ask nothing.
    pub(super) fn new(geometry: Geometry, unread_max: Duration, idle_max: Option<Duration>) -> Self {
        Self {
            geometry,
            unread_max,
            idle_max,
            idle_check: Nanos(0),
            busy: 0,
            connections: BTreeMap::new(),
            next_conn: 1,
            sessions: ClientSessions::default(),
            waiting: VecDeque::new(),
            to_flush: Vec::new(),
            status: Vec::new(),
        }
    }

    /// Connections whose client has shut down, by a look at the sockets themselves: what the ring will
    /// report of them may not have been reaped yet [R24].
    pub(super) fn gone(&self) -> Vec<ConnId> {
        if mutated(Mutation::R24) {
            return Vec::new();
        }
        let watched = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds: Vec<_> =
            self.connections.values().map(|c| PollFd::new(&*c.socket, PollFlags::RDHUP)).collect();
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = rustix::event::poll(&mut fds, Some(&now)) {
            tracing::warn!(%error, "poll of client connections failed");
            return Vec::new();
        }
        let states = self.connections.keys().zip(&fds);
        states.filter(|(_, fd)| fd.revents().intersects(watched)).map(|(id, _)| *id).collect()
    }

    /// The connections that a client gave up when it opened one of this session: those of earlier generations [R24].
    /// `None` if it has given up that one itself by now.
    pub(super) fn replaced_by(&mut self, session: ClientSession) -> Option<Vec<ConnId>> {
        if mutated(Mutation::R24) {
            return Some(Vec::new());
        }
        let earlier = |c: &Connection| {
            c.session.is_some_and(|s| s.id == session.id && s.generation < session.generation)
        };
        self.sessions.join(session).then(|| self.select(earlier))
    }

    /// Takes over a negotiated connection. `None` if there are too many.
    pub(super) fn add(&mut self, io: &mut Io, client: NewClient) -> Option<ConnId> {
        let NewClient { key, socket, mut protocol, session, name, guard } = client;
        if self.connections.len() >= CONNECTIONS_MAX {
            // The protocol tells of it, as of all that clients do wrong: not as often as they do it.
            tracing::debug!(client = name, max = CONNECTIONS_MAX, "too many client connections: refused");
            protocol.closed(End::Full);
            return None;
        }
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        let socket = Rc::new(socket);
        io.watch_shutdown(&socket, Token::ClientGone(conn));
        let connection = Connection {
            key,
            socket,
            protocol,
            session,
            name,
            guard,
            staging: Staging::new(&mut io.buffers),
            state: State::Header,
            receiving: false,
            more: true,
            outgoing: Outgoing::new(),
            requests: RisingMap::new(),
            account: io.buffers.open_account(),
            listed: false,
            unanswered: 0,
            next_cookie: 1,
            unread_since: None,
            owes_since: None,
            moved: 0,
            active_at: Nanos(0),
        };
        self.connections.insert(conn, connection);
        Some(conn)
    }

    /// True while the connection is open.
    pub(super) fn is_open(&self, conn: ConnId) -> bool {
        self.connections.contains_key(&conn)
    }

    /// The open ones of these connections.
    pub(super) fn named(&self, keys: &[ClientKey]) -> Vec<ConnId> {
        self.connections.iter().filter(|(_, c)| keys.contains(&c.key)).map(|(id, _)| *id).collect()
    }

    /// The open connections.
    pub(super) fn all(&self) -> Vec<ConnId> {
        self.connections.keys().copied().collect()
    }

    /// Closes a connection: what it sent is dropped, what it would be sent too. False if it is not open.
    pub(super) fn close(&mut self, io: &mut Io, conn: ConnId, end: End, reason: &str) -> bool {
        let Some(mut connection) = self.connections.remove(&conn) else { return false };
        tracing::debug!(client = connection.name, reason, "client connection closed");
        connection.protocol.closed(end);
        let buffers = &mut *io.buffers;
        connection.outgoing.abandon(buffers);
        if let State::Payload { buf, .. } = connection.state {
            buffers.release(buf);
        }
        for request in connection.requests.values() {
            match request.piece {
                // The core may still write it: its bytes count until it is given back.
                Some(piece) => {
                    buffers.charge(piece, connection.account, request.reserved);
                    buffers.release(piece);
                }
                None => buffers.unreserve(connection.account, request.reserved),
            }
        }
        connection.staging.release(buffers);
        buffers.close_account(connection.account);
        self.busy -= usize::from(connection.unanswered > 0);
        self.waiting.retain(|id| *id != conn);
        // Whatever the kernel has of this socket ends now; it may have failed already.
        let _failed = rustix::net::shutdown(&*connection.socket, rustix::net::Shutdown::Both);
        (connection.guard)(end);
        true
    }

    /// Takes what a receive brought. The caller then asks [`Self::next`].
    ///
    /// # Errors
    /// The reason for which the connection is to be closed.
    pub(super) fn received(
        &mut self,
        conn: ConnId,
        buf: BufId,
        result: i32,
        more: bool,
    ) -> Result<(), String> {
        let Some(connection) = self.connections.get_mut(&conn) else { return Ok(()) };
        (connection.receiving, connection.more) = (false, more);
        let len = match usize::try_from(result) {
            Ok(0) => return Err("the client closed it".into()),
            Ok(len) => len,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => return Ok(()),
            Err(_) => {
                return Err(format!("receiving failed: {}", std::io::Error::from_raw_os_error(-result)));
            }
        };
        connection.moved += len;
        if connection.staging.is(buf) {
            connection.staging.filled(len);
        } else if let State::Payload { got, .. } = &mut connection.state {
            *got += len;
        }
        Ok(())
    }

    /// What the bytes received so far come to; `None` if more is needed or it must wait.
    pub(super) fn next(&mut self, io: &mut Io, conn: ConnId) -> Option<Next> {
        loop {
            let connection = self.connections.get_mut(&conn)?;
            match connection.state {
                State::Header => {
                    if connection.unanswered >= fair::window(self.busy) {
                        return None;
                    }
                    match connection.parse(io)? {
                        ClientFrame::Violation(text) => {
                            return Some(Next::Close(End::Violation, text));
                        }
                        ClientFrame::Disconnect => connection.state = State::Finishing,
                        ClientFrame::Request(request) => {
                            self.busy += usize::from(connection.unanswered == 0);
                            connection.unanswered += 1;
                            if let Some(next) = self.begin(conn, request) {
                                return Some(next);
                            }
                        }
                    }
                }
                State::Waiting(request) => {
                    if !self.admit(io, conn, request) {
                        return None;
                    }
                    // What comes next waits for itself.
                    let connection = self.connections.get_mut(&conn)?;
                    connection.unread_since = None;
                    match request.op {
                        FrontOp::Read => return self.start(conn, request, ClientOp::Read),
                        FrontOp::BlockStatus => {
                            let max = if request.one { 1 } else { EXTENTS_MAX };
                            return self.start(conn, request, ClientOp::Extents { max });
                        }
                        FrontOp::WriteZeroes => return self.start_fill(io, conn, request),
                        _ => {}
                    }
                }
                State::Payload { request, .. } => return self.go_on_with_payload(io, conn, request),
                State::Draining { request, left } => {
                    let now = connection.staging.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    connection.staging.consume(now);
                    let left = left - now as u64;
                    connection.state = State::Draining { request, left };
                    if left > 0 {
                        return None;
                    }
                    connection.state = State::Header;
                    let error = request.error.unwrap_or(ClientError::Invalid);
                    connection.answer(request, Answer::Error(error));
                    connection.list(conn, &mut self.to_flush);
                }
                State::Finishing => {
                    let done = connection.unanswered == 0 && connection.outgoing.is_idle();
                    return done.then(|| Next::Close(End::Client, "the client disconnected".into()));
                }
            }
        }
    }

    /// Judges a fresh request and sets what comes next; a request without payload or reservation is
    /// returned at once.
    fn begin(&mut self, conn: ConnId, request: FrontRequest) -> Option<Next> {
        let range = ByteRange { offset: request.offset, len: request.len };
        let carries_data = matches!(request.op, FrontOp::Read | FrontOp::Write);
        let valid = match request.op {
            FrontOp::Flush => true,
            // Nothing to do is done at once, wherever it is.
            _ if request.len == 0 => true,
            _ => self.geometry.contains(range) && !(carries_data && request.len > CLIENT_LEN_MAX),
        };
        let connection = self.connections.get_mut(&conn)?;
        if request.error.is_some() || !valid {
            let left = request.payload;
            connection.staging.expect_body(0); // what is thrown away has no buffer of its own
            connection.state = State::Draining { request, left };
            return None;
        }
        match request.op {
            FrontOp::Flush => {
                let flush = FrontRequest { offset: 0, len: 0, ..request };
                Some(connection.hand_over(conn, flush, ClientOp::Flush, 0, 0))
            }
            FrontOp::Trim | FrontOp::WriteZeroes if request.len > 0 && !request.fills() => {
                let rest = range.len.saturating_sub(ZERO_PIECE_LEN);
                Some(connection.hand_over(conn, request, ClientOp::Zero, 0, rest))
            }
            FrontOp::Read | FrontOp::Write | FrontOp::BlockStatus | FrontOp::WriteZeroes
                if request.len > 0 =>
            {
                connection.state = State::Waiting(request);
                None
            }
            // A protocol that lets a request for the status of nothing pass gets an answer, if no good one.
            FrontOp::BlockStatus => {
                connection.answer(request, Answer::Error(ClientError::Invalid));
                connection.list(conn, &mut self.to_flush);
                None
            }
            FrontOp::Cache | FrontOp::Trim | FrontOp::WriteZeroes | FrontOp::Read | FrontOp::Write => {
                connection.answer(request, Answer::Done);
                connection.list(conn, &mut self.to_flush);
                None
            }
        }
    }

    /// The share of the client bytes that a request needs: for a read or write the whole blocks that it touches,
    /// for zeroes to be written those of the first piece, after which all others begin at whole blocks.
    fn share(&self, request: FrontRequest) -> u64 {
        if request.op == FrontOp::BlockStatus {
            return STATUS_LEN_MAX;
        }
        let len = if request.fills() { request.len.min(FILL_PIECE_LEN) } else { request.len };
        let range = ByteRange { offset: request.offset, len };
        self.geometry.blocks_of(range).count * u64::from(self.geometry.block_size())
    }

    /// Reserves the client bytes of a request, in turn. False: wait.
    fn admit(&mut self, io: &mut Io, conn: ConnId, request: FrontRequest) -> bool {
        let len = self.share(request);
        let Some(connection) = self.connections.get(&conn) else { return false };
        let account = connection.account;
        let in_turn = self.first_in_turn(io).is_none_or(|(first, _)| first == conn);
        if fair::is_first_and_small(io.buffers.held(account), len) {
            io.buffers.reserve_beyond(account, len);
        } else if !in_turn || !within_share(io, account, len) || !io.buffers.reserve(account, len) {
            if !self.waiting.contains(&conn) {
                self.waiting.push_back(conn);
            }
            return false;
        }
        self.waiting.retain(|id| *id != conn);
        if request.op == FrontOp::Write {
            let buf = io.buffers.alloc(usize::try_from(len).expect("a write fits one payload"));
            io.buffers.charge(buf, account, len);
            let connection = self.connections.get_mut(&conn).expect("admitted while it is open");
            connection.staging.expect_body(usize::try_from(request.len).expect("a write fits one payload"));
            connection.state = State::Payload { request, buf, got: 0 };
        }
        true
    }

    fn start(&mut self, conn: ConnId, request: FrontRequest, op: ClientOp) -> Option<Next> {
        let reserved = self.share(request);
        let connection = self.connections.get_mut(&conn)?;
        connection.state = State::Header;
        Some(connection.hand_over(conn, request, op, reserved, 0))
    }

    /// Begins to write zeroes that are to take their space.
    fn start_fill(&mut self, io: &mut Io, conn: ConnId, request: FrontRequest) -> Option<Next> {
        let reserved = self.share(request);
        let block = u64::from(self.geometry.block_size());
        // The first piece ends with a block, unless it is the only one.
        let first = request.len.min(FILL_PIECE_LEN - request.offset % block);
        let piece = ByteRange { offset: request.offset, len: first };
        let op = ClientOp::Write(zero_payload(io, self.geometry, piece));
        let connection = self.connections.get_mut(&conn)?;
        connection.state = State::Header;
        Some(connection.hand_over(conn, request, op, reserved, request.len - first))
    }

    fn go_on_with_payload(&mut self, io: &mut Io, conn: ConnId, request: FrontRequest) -> Option<Next> {
        let block = u64::from(self.geometry.block_size());
        let skip = usize::try_from(request.offset % block).expect("less than a block");
        let connection = self.connections.get_mut(&conn)?;
        let State::Payload { buf, ref mut got, .. } = connection.state else { return None };
        let len = usize::try_from(request.len).expect("a write fits one payload");
        *got += connection.staging.move_to(&mut io.buffers, len - *got, buf, skip + *got);
        if *got < len {
            return None;
        }
        connection.state = State::Header;
        let aligned = skip == 0 && request.len.is_multiple_of(block);
        let content = io.buffers.bytes(buf);
        let payload = Payload {
            buf,
            len: u32::try_from(content.len()).expect("a write fits one payload"),
            crc: if aligned { crc32fast::hash(content) } else { 0 },
        };
        Some(connection.hand_over(conn, request, ClientOp::Write(payload), 0, 0))
    }

    /// Answers a request that the core is done with. For a long zero request, returns the next piece.
    pub(super) fn reply(
        &mut self,
        io: &mut Io,
        conn: ConnId,
        cookie: Cookie,
        result: Result<ReplyData, ClientError>,
    ) -> Option<ClientRequest> {
        let connection = self.connections.get_mut(&conn)?;
        let Some(request) = connection.requests.get_mut(&cookie) else {
            panic!("the core answers a request twice or one that it never had: {conn:?} {cookie:?}");
        };
        if let Some(piece) = request.piece.take() {
            io.buffers.release(piece);
        }
        if request.rest > 0 && result.is_ok() {
            let fills = request.front.fills();
            let done = request.front.len - request.rest;
            let len = request.rest.min(if fills { FILL_PIECE_LEN } else { ZERO_PIECE_LEN });
            request.rest -= len;
            let (offset, fua) = (request.front.offset + done, request.front.fua);
            let op = if fills {
                let payload = zero_payload(io, self.geometry, ByteRange { offset, len });
                request.piece = Some(payload.buf);
                ClientOp::Write(payload)
            } else {
                ClientOp::Zero
            };
            return Some(ClientRequest { conn, cookie, op, offset, len, fua });
        }
        let request = connection.requests.remove(&cookie).expect("was found just above");
        let (front, reserved) = (request.front, request.reserved);
        match result {
            Ok(ReplyData::Read { buf, skip, len, zero }) => {
                assert_eq!((front.op, u64::from(len)), (FrontOp::Read, front.len), "read data as asked for");
                if zero && connection.protocol.can_say_zeroes() {
                    io.buffers.unreserve(connection.account, reserved);
                    connection.answer(front, Answer::Zeroes);
                } else {
                    io.buffers.charge(buf, connection.account, reserved);
                    connection.answer(front, Answer::Data);
                    connection.outgoing.push_buffer(&mut io.buffers, buf, skip as usize, len as usize);
                }
            }
            Ok(ReplyData::Extents(extents)) => {
                assert_eq!(front.op, FrontOp::BlockStatus, "extents for a request that asked for them");
                connection.answer_extents(io, &mut self.status, front, reserved, &extents);
            }
            Ok(ReplyData::None) => {
                assert!(!front.op.wants_data(), "{:?} is answered with data", front.op);
                io.buffers.unreserve(connection.account, reserved);
                connection.answer(front, Answer::Done);
            }
            Err(error) => {
                io.buffers.unreserve(connection.account, reserved);
                connection.answer(front, Answer::Error(error));
            }
        }
        connection.list(conn, &mut self.to_flush);
        None
    }

    /// Takes back what a send left of its message.
    ///
    /// # Errors
    /// The reason for which the connection is to be closed.
    pub(super) fn sent(
        &mut self,
        io: &mut Io,
        conn: ConnId,
        mut message: Box<Message>,
        result: i32,
    ) -> Result<(), String> {
        let Some(connection) = self.connections.get_mut(&conn) else {
            message.abandon(&mut io.buffers);
            return Ok(());
        };
        let len = match usize::try_from(result) {
            Ok(len) => len,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => 0,
            Err(_) => {
                message.abandon(&mut io.buffers);
                return Err(format!("sending failed: {}", std::io::Error::from_raw_os_error(-result)));
            }
        };
        connection.moved += len;
        let sent = connection.outgoing.on_sent(message, len, &mut io.buffers);
        connection.unanswered -= sent.answers;
        self.busy -= usize::from(sent.answers > 0 && connection.unanswered == 0);
        match sent.rest {
            Some(rest) => io.send(&connection.socket, rest, Token::ClientSend(conn)),
            None => {
                connection.list(conn, &mut self.to_flush);
            }
        }
        Ok(())
    }

    /// Hands the gathered answers to the kernel. Returns how many completions will come of that at once, and
    /// lead to nothing but memory given back: their connections are read.
    pub(super) fn flush(&mut self, io: &mut Io, now: Nanos) -> usize {
        let mut quiet = 0;
        for conn in self.to_flush.drain(..) {
            let Some(connection) = self.connections.get_mut(&conn) else { continue };
            connection.listed = false;
            if let Some(message) = connection.outgoing.take() {
                // No completion may ever come of this one.
                connection.note_debt(now);
                quiet += usize::from(connection.receiving && message.leaves_at_once());
                io.send(&connection.socket, message, Token::ClientSend(conn));
            }
        }
        quiet
    }

    /// Reads on, if the connection is to be read and is not being read; else notes since when it is not.
    pub(super) fn arm(&mut self, io: &mut Io, conn: ConnId, now: Nanos) {
        let block = self.geometry.block_size() as usize;
        let shared = self.connections.len() > WHOLE_STAGING_MAX;
        let staged_max = if shared { SHARED_LEN } else { STAGING_LEN };
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.note_debt(now);
        connection.active_at = now;
        let direct = match connection.state {
            State::Header if connection.unanswered < fair::window(self.busy) => None,
            State::Draining { .. } => None,
            State::Payload { request, buf, got } => {
                let left = usize::try_from(request.len).expect("a write fits one payload") - got;
                let skip = request.offset as usize % block;
                connection.staging.bypass(left).then_some(Span { buf, start: skip + got, len: left })
            }
            State::Header | State::Waiting(_) | State::Finishing => {
                connection.unread_since.get_or_insert(now);
                return;
            }
        };
        connection.unread_since = None;
        if !connection.receiving {
            connection.receiving = true;
            let span = direct.unwrap_or_else(|| connection.staging.room(&mut io.buffers, staged_max));
            io.receive(&connection.socket, span, !connection.more, Token::ClientReceive(conn));
        }
    }

    /// A connection waits for memory.
    pub(super) fn any_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The connection whose turn it is to wait for client bytes, if they suffice now.
    pub(super) fn first_waiting(&self, io: &Io) -> Option<ConnId> {
        let (conn, len) = self.first_in_turn(io)?;
        (len <= io.buffers.client_bytes_free()).then_some(conn)
    }

    /// The first that waits for client bytes which others hold, and how many: one whose own share is used up waits
    /// for nobody but itself, and holds up nobody.
    fn first_in_turn(&self, io: &Io) -> Option<(ConnId, u64)> {
        self.waiting.iter().find_map(|conn| {
            let connection = self.connections.get(conn)?;
            let State::Waiting(request) = connection.state else { return None };
            let len = self.share(request);
            within_share(io, connection.account, len).then_some((*conn, len))
        })
    }

    /// When the next connection will have been unread, stalled, or perhaps idle, for too long.
    pub(super) fn deadline(&self, io: &Io) -> Option<Nanos> {
        let (mut unread, mut owing): (Option<Nanos>, Option<Nanos>) = (None, None);
        let earlier = |a: Option<Nanos>, b: Option<Nanos>| a.into_iter().chain(b).min();
        for connection in self.connections.values() {
            unread = earlier(unread, connection.unread_since);
            owing = earlier(owing, connection.owes_since);
        }
        let unread = unread.map(|at| at.after(self.unread_max));
        let owed = owing.map(|at| at.after(self.owed_max()));
        let stalled = self.waiting_since(io).and_then(|waiting| {
            let holding = self.connections.values().filter(|c| c.holds_up());
            let owing = holding.filter_map(|c| c.owes_since).min()?;
            Some(owing.max(waiting).after(self.stall_max()))
        });
        let idle = (self.idle_max.is_some() && !self.connections.is_empty()).then_some(self.idle_check);
        [unread, owed, stalled, idle].into_iter().flatten().min()
    }

    /// Connections that hold up others: somebody has waited for client bytes for a while, and for as long
    /// these have not taken their answers or sent the payload that they announced. Closing them gives the
    /// bytes back before those who wait are unread for too long themselves.
    pub(super) fn stalled(&self, io: &Io, now: Nanos) -> Vec<ConnId> {
        let over = |since: Nanos| since.after(self.stall_max()) <= now;
        if !self.waiting_since(io).is_some_and(over) {
            return Vec::new();
        }
        self.select(|c| c.holds_up() && c.owes_since.is_some_and(over))
    }

    /// Connections that have asked nothing for too long, with nothing in flight. They are searched a few times in
    /// that time.
    pub(super) fn idle(&mut self, now: Nanos) -> Vec<ConnId> {
        let Some(idle_max) = self.idle_max else { return Vec::new() };
        if now < self.idle_check {
            return Vec::new();
        }
        self.idle_check = now.after(idle_max / 4);
        self.select(|c| {
            matches!(c.state, State::Header) && c.unanswered == 0 && c.active_at.after(idle_max) <= now
        })
    }

    fn select(&self, is_meant: impl Fn(&Connection) -> bool) -> Vec<ConnId> {
        self.connections.iter().filter(|(_, c)| is_meant(c)).map(|(id, _)| *id).collect()
    }

    /// Since when the first in turn waits for client bytes.
    fn waiting_since(&self, io: &Io) -> Option<Nanos> {
        let (conn, _) = self.first_in_turn(io)?;
        self.connections.get(&conn)?.unread_since
    }

    fn owed_max(&self) -> Duration {
        self.unread_max * OWED_LIMITS
    }

    fn stall_max(&self) -> Duration {
        self.unread_max / 4
    }

    /// Connections that have been unread for too long [R24], or whose clients have owed something for so long that
    /// they are given up, whoever waits.
    pub(super) fn expired(&self, now: Nanos) -> Vec<(ConnId, End)> {
        let over = |since: Option<Nanos>, limit| since.is_some_and(|since: Nanos| since.after(limit) <= now);
        let end = |c: &Connection| {
            if over(c.unread_since, self.unread_max) && !mutated(Mutation::R24) {
                return Some(End::Unread);
            }
            over(c.owes_since, self.owed_max()).then_some(End::Stalled)
        };
        self.connections.iter().filter_map(|(id, c)| Some((*id, end(c)?))).collect()
    }

    /// Nothing is left to send.
    pub(super) fn is_idle(&self) -> bool {
        self.connections.values().all(|c| c.outgoing.is_idle())
    }
}

/// [`fair::within_share`], by what an account holds and what is free.
fn within_share(io: &Io, account: Account, len: u64) -> bool {
    fair::within_share(io.buffers.held(account), len, io.buffers.client_bytes_free())
}

/// Zeroes for a write: a buffer of the whole blocks that it touches, one reference for the core and one for the
/// request.
fn zero_payload(io: &mut Io, geometry: Geometry, bytes: ByteRange) -> Payload {
    let blocks = geometry.bytes_of(geometry.blocks_of(bytes)).len;
    let len = usize::try_from(blocks).expect("a piece fits one payload");
    let buf = io.buffers.alloc(len);
    let content = &mut io.buffers.bytes_mut(buf)[..len];
    content.fill(0);
    let crc = crc32fast::hash(content);
    io.buffers.retain(buf);
    Payload { buf, len: u32::try_from(len).expect("a piece fits one payload"), crc }
}

impl Connection {
    /// Puts it on the list of those with something to send.
    fn list(&mut self, conn: ConnId, to_flush: &mut Vec<ConnId>) {
        if !std::mem::replace(&mut self.listed, true) {
            to_flush.push(conn);
        }
    }

    /// It may hold client bytes that its client does not let go of.
    fn holds_up(&self) -> bool {
        matches!(self.state, State::Payload { .. }) || !self.outgoing.is_idle()
    }

    /// The client has begun a request, and the rest is to come.
    fn is_amid_request(&self) -> bool {
        match self.state {
            State::Header => (1..self.protocol.header_len()).contains(&self.staging.len()),
            State::Payload { .. } | State::Draining { .. } => true,
            State::Waiting(_) | State::Finishing => false,
        }
    }

    /// Notes since when the client has owed something without getting on with it.
    fn note_debt(&mut self, now: Nanos) {
        if !self.is_amid_request() && self.outgoing.is_idle() {
            self.owes_since = None;
        } else if self.owes_since.is_none() || self.moved >= STALL_LEN {
            self.owes_since = Some(now);
            self.moved = 0;
        }
    }

    /// Parses one header, if it is there whole.
    fn parse(&mut self, io: &Io) -> Option<ClientFrame> {
        let len = self.protocol.header_len();
        assert!((1..=HEADER_LEN_MAX).contains(&len), "a client protocol announces a header of {len} bytes");
        let frame = self.protocol.parse(self.staging.bytes(&io.buffers).get(..len)?);
        self.staging.consume(len);
        Some(frame)
    }

    /// Remembers a request and makes the core's form of it.
    fn hand_over(
        &mut self,
        conn: ConnId,
        front: FrontRequest,
        op: ClientOp,
        reserved: u64,
        rest: u64,
    ) -> Next {
        let cookie = Cookie(self.next_cookie);
        self.next_cookie += 1;
        let piece = match op {
            ClientOp::Write(payload) if front.fills() => Some(payload.buf),
            _ => None,
        };
        self.requests.insert(cookie, Request { front, reserved, piece, rest });
        let len = front.len - rest;
        Next::Request(ClientRequest { conn, cookie, op, offset: front.offset, len, fua: front.fua })
    }

    /// Appends an answer, or what goes before the data of one.
    fn answer(&mut self, front: FrontRequest, answer: Answer<'_>) {
        let protocol = &mut self.protocol;
        self.outgoing.push_head(|out| protocol.reply(&front, answer, out));
        self.outgoing.count_answer();
    }

    /// Appends the answer to a request for the block status, in a buffer that carries its share of the client
    /// bytes until it is sent. `scratch` is empty before and after.
    fn answer_extents(
        &mut self,
        io: &mut Io,
        scratch: &mut Vec<u8>,
        front: FrontRequest,
        reserved: u64,
        extents: &[Extent],
    ) {
        self.protocol.reply(&front, Answer::Extents(extents), scratch);
        assert!(scratch.len() as u64 <= STATUS_LEN_MAX, "a block status of {} bytes", scratch.len());
        let buf = io.buffers.alloc(scratch.len());
        io.buffers.charge(buf, self.account, reserved);
        io.buffers.bytes_mut(buf)[..scratch.len()].copy_from_slice(scratch);
        self.outgoing.push_buffer(&mut io.buffers, buf, 0, scratch.len());
        self.outgoing.count_answer();
        io.buffers.release(buf);
        scratch.clear();
    }
}
