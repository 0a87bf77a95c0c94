//! A small NBD client: blocking calls, and a pipelined interface under them.
//!
//! For `blkrepl map` and `bench`, the demo and the tests. It runs on the calling thread, starts none, and waits only in
//! poll(2), always with a deadline. While it waits for room to send it takes in replies, so that two full
//! sockets never wait for each other.
//!
//! It never retries, reconnects or sends a request twice: after an error the caller decides, with
//! [`NbdClient::in_flight`], what to do about requests whose outcome is not known.

mod error;
mod handshake;
mod sock;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

pub use error::{NbdError, RefusalKind};
pub use handshake::{ExportFacts, list_exports, places};

use blkrepl_engine::reactor::ClientSession;

use crate::proto::{self, NbdErrno, RequestHeader, SIMPLE_REPLY_LEN};
use crate::uri::NbdUri;
use sock::{Ready, Sock};

/// Bytes waiting to be sent at which a further request waits for room instead of being queued.
const UNSENT_BYTES_MAX: usize = 64 << 20;
/// Bytes taken from the socket at once, unless they go straight to where they belong.
const STAGE_BYTES: usize = 64 << 10;

/// Time limits of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// From connect to the transmission phase.
    pub connect_timeout: Duration,
    /// For one blocking call, and for room to queue a request.
    pub io_timeout: Duration,
}

impl Default for ClientOptions {
    /// 5 seconds to connect, 30 seconds for a call.
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(5), io_timeout: Duration::from_secs(30) }
    }
}

/// A request. Lengths and offsets in bytes; nothing about them is checked on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, fewer than 4 GiB.
        data: &'a [u8],
        /// Stable before the reply.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Trim.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Stable before the reply.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Stable before the reply.
        fua: bool,
        /// Keep the space allocated.
        no_hole: bool,
    },
    /// Any header at all, with any payload behind it: for tests of a server.
    Raw {
        /// Command.
        command: u16,
        /// Command flags.
        flags: u16,
        /// Offset field.
        offset: u64,
        /// Length field.
        len: u32,
        /// What follows the header.
        payload: &'a [u8],
        /// Bytes that follow a successful reply.
        reply_len: u32,
    },
}

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOp {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Trim.
    Trim,
    /// Write zeroes.
    WriteZeroes,
    /// [`Request::Raw`].
    Raw,
}

/// Names one request of a client; never reused by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

/// An answered request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub handle: Handle,
    /// What it was.
    pub op: RequestOp,
    /// The bytes of a read (empty for all else), or the server's error.
    pub result: Result<Vec<u8>, NbdErrno>,
}

/// A connection to an export, past its negotiation.
#[derive(Debug)]
pub struct NbdClient {
    sock: Sock,
    facts: ExportFacts,
    options: ClientOptions,
    next: u64,
    in_flight: BTreeMap<Handle, Pending>,
    /// Not yet sent: `out[out_at..]`.
    out: Vec<u8>,
    out_at: usize,
    /// Received, not yet looked at: `stage[stage_at..stage_end]`.
    stage: Vec<u8>,
    stage_at: usize,
    stage_end: usize,
    /// A read's data on its way in.
    reading: Option<Reading>,
    done: VecDeque<Completion>,
    /// Why the connection is over.
    over: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    op: RequestOp,
    reply_len: u32,
}

#[derive(Debug)]
struct Reading {
    handle: Handle,
    op: RequestOp,
    data: Vec<u8>,
    got: usize,
}

/// Connects and negotiates, and hands over the socket, which is non-blocking and on TCP without delay.
///
/// # Errors
/// As [`NbdClient::connect`].
pub fn connect_raw(uri: &NbdUri, options: ClientOptions) -> Result<(OwnedFd, ExportFacts), NbdError> {
    let (sock, facts) = open(uri, None, options)?;
    Ok((sock.into_fd(), facts))
}

/// The same for a connection of a client session: once it is taken, nothing starts of those of earlier generations.
///
/// # Errors
/// As for [`connect_raw`]; also if the server knows no client sessions, as others than blkrepl's do not.
pub fn connect_session(
    uri: &NbdUri,
    session: ClientSession,
    options: ClientOptions,
) -> Result<(OwnedFd, ExportFacts), NbdError> {
    let (sock, facts) = open(uri, Some(session), options)?;
    Ok((sock.into_fd(), facts))
}

fn open(
    uri: &NbdUri,
    session: Option<ClientSession>,
    options: ClientOptions,
) -> Result<(Sock, ExportFacts), NbdError> {
    let deadline = deadline_after(options.connect_timeout);
    let sock = Sock::connect(&uri.target, deadline)?;
    let facts = handshake::go(&sock, &uri.export, session, deadline)?;
    Ok((sock, facts))
}

impl NbdClient {
    /// Connects to an export with `NBD_OPT_GO`.
    ///
    /// # Errors
    /// [`NbdError::Refused`] with the server's text if it does not serve the export; otherwise what went
    /// wrong on the way.
    pub fn connect(uri: &NbdUri, options: ClientOptions) -> Result<Self, NbdError> {
        let (sock, facts) = open(uri, None, options)?;
        Ok(Self {
            sock,
            facts,
            options,
            next: 1,
            in_flight: BTreeMap::new(),
            out: Vec::new(),
            out_at: 0,
            stage: vec![0; STAGE_BYTES],
            stage_at: 0,
            stage_end: 0,
            reading: None,
            done: VecDeque::new(),
            over: None,
        })
    }

    /// What the server said about the export.
    #[must_use]
    pub fn facts(&self) -> &ExportFacts {
        &self.facts
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.facts.size
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`NbdError::Server`] if the server refuses; any other error ends the connection.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), NbdError> {
        let data = self.call(Request::Read { offset, len: request_len(buf.len())? })?;
        buf.copy_from_slice(&data);
        Ok(())
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.call(Request::Write { offset, data, fua: false }).map(drop)
    }

    /// Writes `data` at `offset`, stable before it returns.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.call(Request::Write { offset, data, fua: true }).map(drop)
    }

    /// Makes everything acknowledged on any connection so far stable.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.call(Request::Flush).map(drop)
    }

    /// Gives up `len` bytes at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.call(Request::Trim { offset, len, fua: false }).map(drop)
    }

    /// Writes `len` zeroes at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.call(Request::WriteZeroes { offset, len, fua: false, no_hole: false }).map(drop)
    }

    /// Sends one request and waits for its answer, at most [`ClientOptions::io_timeout`]. Answers to other
    /// requests that come in meanwhile are kept for [`poll`](Self::poll).
    ///
    /// # Errors
    /// As [`read`](Self::read). A time-out ends the connection, because the request may still be carried out.
    pub fn call(&mut self, request: Request<'_>) -> Result<Vec<u8>, NbdError> {
        let handle = self.submit(request)?;
        let deadline = deadline_after(self.options.io_timeout);
        loop {
            if let Some(at) = self.done.iter().position(|completion| completion.handle == handle) {
                let completion = self.done.remove(at).expect("the position was just found");
                return completion.result.map_err(NbdError::Server);
            }
            if !self.progress(deadline)? {
                return Err(self.fail_timeout("an answer"));
            }
        }
    }

    /// Sends a request, or queues it behind those that wait to be sent, and returns without waiting for its
    /// answer. Waits only while more than 64 MiB wait to be sent.
    ///
    /// # Errors
    /// [`NbdError::Usage`] for a write of 4 GiB or more; otherwise the connection is over.
    pub fn submit(&mut self, request: Request<'_>) -> Result<Handle, NbdError> {
        self.check()?;
        let deadline = deadline_after(self.options.io_timeout);
        while self.out.len() - self.out_at > UNSENT_BYTES_MAX {
            if !self.progress(deadline)? {
                return Err(self.fail_timeout("room to send a request"));
            }
        }
        let handle = Handle(self.next);
        let (header, payload, pending) = encode(handle, request)?;
        self.next += 1;
        self.in_flight.insert(handle, pending);
        let sent = if self.out_at == self.out.len() { self.send_now(&header, payload) } else { 0 };
        self.out.extend_from_slice(header.get(sent..).unwrap_or_default());
        self.out.extend_from_slice(payload.get(sent.saturating_sub(header.len())..).unwrap_or_default());
        Ok(handle)
    }

    /// The next answer, in whatever order the server gives them; `None` if there is none within `timeout`
    /// (zero: without waiting). Nothing is lost by a time-out here.
    ///
    /// # Errors
    /// The connection is over; answers that came in before that are given first.
    pub fn poll(&mut self, timeout: Duration) -> Result<Option<Completion>, NbdError> {
        let deadline = deadline_after(timeout);
        loop {
            if let Some(completion) = self.done.pop_front() {
                return Ok(Some(completion));
            }
            self.check()?;
            if !self.progress(deadline)? {
                return Ok(None);
            }
        }
    }

    /// Requests without an answer, ascending; after the end of the connection those whose outcome is unknown.
    pub fn in_flight(&self) -> impl ExactSizeIterator<Item = Handle> + '_ {
        self.in_flight.keys().copied()
    }

    /// Tells the server that no more requests will come (`NBD_CMD_DISC`) and waits until it has closed the
    /// connection. Answers that come in meanwhile are dropped.
    ///
    /// # Errors
    /// [`NbdError::TimedOut`] if the server does not close it in time.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.check()?;
        let disc = RequestHeader { flags: 0, command: proto::NBD_CMD_DISC, handle: 0, offset: 0, len: 0 };
        self.out.extend_from_slice(&disc.encode());
        let deadline = deadline_after(self.options.io_timeout);
        loop {
            match self.progress(deadline) {
                Ok(true) => self.done.clear(),
                Ok(false) => return Err(self.fail_timeout("the server to close the connection")),
                Err(NbdError::Disconnected(_)) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn check(&self) -> Result<(), NbdError> {
        match &self.over {
            None => Ok(()),
            Some(reason) => Err(NbdError::Disconnected(reason.clone())),
        }
    }

    /// Moves bytes in both directions; waits until some moved or the deadline (then: false).
    fn progress(&mut self, deadline: Instant) -> Result<bool, NbdError> {
        self.check()?;
        loop {
            let sent = self.send_queued();
            let received = self.receive()?;
            if sent || received {
                return Ok(true);
            }
            let want = Ready { read: true, write: self.out_at < self.out.len() };
            match self.sock.wait(want, deadline) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(e) => return Err(self.fail(&e)),
            }
        }
    }

    /// Sends what it can without waiting, bypassing the (empty) queue; gives the number of bytes. An error
    /// shows again when the rest is sent or the next reply is awaited.
    fn send_now(&self, header: &[u8], payload: &[u8]) -> usize {
        self.sock.send(&[io::IoSlice::new(header), io::IoSlice::new(payload)]).unwrap_or(0)
    }

    /// Sends from the queue without waiting; true if bytes moved. What the server has already answered is
    /// worth more than a send error, so that is left for the receiving side to find.
    fn send_queued(&mut self) -> bool {
        let before = self.out_at;
        while self.out_at < self.out.len() {
            match self.sock.send(&[io::IoSlice::new(&self.out[self.out_at..])]) {
                Ok(0) => break,
                Ok(sent) => self.out_at += sent,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.out.clear();
                    self.out_at = 0;
                    return false;
                }
            }
        }
        let moved = self.out_at > before;
        if self.out_at == self.out.len() {
            self.out.clear();
            self.out_at = 0;
        } else if self.out_at > UNSENT_BYTES_MAX {
            self.out.drain(..self.out_at);
            self.out_at = 0;
        }
        moved
    }

    /// Takes in what has arrived without waiting; true if bytes moved.
    fn receive(&mut self) -> Result<bool, NbdError> {
        let mut moved = false;
        loop {
            self.consume_stage()?;
            // Large data goes straight to where it belongs, all else through the stage.
            let room = match &mut self.reading {
                Some(reading) if reading.data.len() - reading.got >= STAGE_BYTES => {
                    &mut reading.data[reading.got..]
                }
                _ => {
                    self.stage.copy_within(self.stage_at..self.stage_end, 0);
                    self.stage_end -= self.stage_at;
                    self.stage_at = 0;
                    &mut self.stage[self.stage_end..]
                }
            };
            let direct = room.len();
            match self.sock.receive(room) {
                Ok(0) => return Err(self.fail_text("the server closed the connection")),
                Ok(got) => {
                    moved = true;
                    match &mut self.reading {
                        Some(reading) if reading.data.len() - reading.got >= STAGE_BYTES => {
                            reading.got += got
                        }
                        _ => self.stage_end += got,
                    }
                    // A short receive means that the socket is empty: spare the call that says so.
                    if got < direct {
                        self.consume_stage()?;
                        return Ok(true);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(e) => return Err(self.fail(&e)),
            }
        }
    }

    /// Turns staged bytes into completions, as far as they go.
    fn consume_stage(&mut self) -> Result<(), NbdError> {
        loop {
            let staged = &self.stage[self.stage_at..self.stage_end];
            if let Some(mut reading) = self.reading.take() {
                let take = staged.len().min(reading.data.len() - reading.got);
                reading.data[reading.got..reading.got + take].copy_from_slice(&staged[..take]);
                reading.got += take;
                self.stage_at += take;
                if reading.got < reading.data.len() {
                    self.reading = Some(reading);
                    return Ok(());
                }
                let result = Ok(reading.data);
                self.done.push_back(Completion { handle: reading.handle, op: reading.op, result });
                continue;
            }
            let Some(header) = staged.first_chunk::<SIMPLE_REPLY_LEN>() else { return Ok(()) };
            let (error, handle) = match proto::decode_simple_reply(header) {
                Ok((error, handle)) => (error, Handle(handle)),
                Err(magic) => {
                    return Err(self.fail_protocol(format!("a reply begins with {magic:#010x}")));
                }
            };
            self.stage_at += SIMPLE_REPLY_LEN;
            let Some(pending) = self.in_flight.remove(&handle) else {
                return Err(self.fail_protocol(format!("a reply to request {}, which is not open", handle.0)));
            };
            match error {
                Some(errno) => {
                    self.done.push_back(Completion { handle, op: pending.op, result: Err(errno) });
                }
                None => {
                    // The length is our own request's.
                    let data = vec![0; pending.reply_len as usize];
                    self.reading = Some(Reading { handle, op: pending.op, data, got: 0 });
                }
            }
        }
    }

    fn fail(&mut self, error: &io::Error) -> NbdError {
        self.fail_text(&error.to_string())
    }

    fn fail_text(&mut self, reason: &str) -> NbdError {
        if let Some(reading) = self.reading.take() {
            // Half a reply is none.
            let reply_len = u32::try_from(reading.data.len()).unwrap_or(u32::MAX);
            self.in_flight.insert(reading.handle, Pending { op: reading.op, reply_len });
        }
        self.sock.shutdown();
        self.over = Some(reason.to_owned());
        NbdError::Disconnected(reason.to_owned())
    }

    fn fail_timeout(&mut self, what: &'static str) -> NbdError {
        self.fail_text("a request was not answered in time");
        NbdError::TimedOut(what)
    }

    fn fail_protocol(&mut self, what: String) -> NbdError {
        self.fail_text(&what);
        NbdError::Protocol(what)
    }
}

impl AsFd for NbdClient {
    /// The socket, to wait on several clients at once. Reading from it or writing to it breaks the client.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }
}

/// A point in time `span` from now; a span too long for the clock is a year.
fn deadline_after(span: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    let now = Instant::now();
    now.checked_add(span).unwrap_or(now + YEAR)
}

fn request_len(len: usize) -> Result<u32, NbdError> {
    u32::try_from(len).map_err(|_| NbdError::Usage(format!("{len} bytes do not fit into one NBD request")))
}

/// Header, payload and what is to be remembered of a request.
fn encode(
    handle: Handle,
    request: Request<'_>,
) -> Result<([u8; proto::REQUEST_LEN], &[u8], Pending), NbdError> {
    let fua_flag = |fua| if fua { proto::NBD_CMD_FLAG_FUA } else { 0 };
    let mut payload: &[u8] = &[];
    let mut reply_len = 0;
    let (op, command, flags, offset, len) = match request {
        Request::Read { offset, len } => {
            reply_len = len;
            (RequestOp::Read, proto::NBD_CMD_READ, 0, offset, len)
        }
        Request::Write { offset, data, fua } => {
            payload = data;
            (RequestOp::Write, proto::NBD_CMD_WRITE, fua_flag(fua), offset, request_len(data.len())?)
        }
        Request::Flush => (RequestOp::Flush, proto::NBD_CMD_FLUSH, 0, 0, 0),
        Request::Trim { offset, len, fua } => {
            (RequestOp::Trim, proto::NBD_CMD_TRIM, fua_flag(fua), offset, len)
        }
        Request::WriteZeroes { offset, len, fua, no_hole } => {
            let hole = if no_hole { proto::NBD_CMD_FLAG_NO_HOLE } else { 0 };
            (RequestOp::WriteZeroes, proto::NBD_CMD_WRITE_ZEROES, fua_flag(fua) | hole, offset, len)
        }
        Request::Raw { command, flags, offset, len, payload: bytes, reply_len: expected } => {
            payload = bytes;
            reply_len = expected;
            (RequestOp::Raw, command, flags, offset, len)
        }
    };
    let header = RequestHeader { flags, command, handle: handle.0, offset, len };
    Ok((header.encode(), payload, Pending { op, reply_len }))
}
