//! What the reactor and a client protocol agree on.
//!
//! The reactor owns the sockets, the buffers and the order of things; a protocol (NBD lives in its own
//! package) only turns header bytes into [`FrontRequest`]s and results into reply headers. A
//! [`ClientProtocol`] is one connection's codec: pure, no I/O, no clock. It never sees payload bytes, and
//! it never keeps a request: everything that a reply needs is handed back to it.
//!
//! Invariants:
//! - Every [`ClientFrame::Request`] is answered by exactly one reply, in any order, or the connection closes.
//! - After the header of a request exactly `payload` bytes follow on the connection: those of a write, or
//!   bytes to be thrown away of a request that carries an error.

use crate::replica::ClientError;
use crate::types::Extent;

/// The codec of one client connection that is past its negotiation.
pub trait ClientProtocol: Send {
    /// Length in bytes of the next request header (NBD with simple replies: 28). More than 0, at most 4096.
    /// The same until the next [`parse`](Self::parse).
    fn header_len(&self) -> usize;

    /// Reads one request header. `header` is exactly [`header_len`](Self::header_len) bytes long. Whatever
    /// the bytes are, this answers with a frame and never panics.
    fn parse(&mut self, header: &[u8]) -> ClientFrame;

    /// The client understands that a read brought zeroes only, without their bytes ([`Answer::Zeroes`]).
    fn can_say_zeroes(&self) -> bool {
        false
    }

    /// Appends the reply to one request to `out`: all of it, or what goes before the data of a read.
    fn reply(&mut self, request: &FrontRequest, answer: Answer<'_>, out: &mut Vec<u8>);

    /// The connection is closed. The last call; the protocol is dropped right after, when nothing of the
    /// connection is left but what the kernel may still have of its memory.
    fn closed(&mut self, _end: End) {}
}

/// What a connection says of the client session that it belongs to: those that one client has opened for one device,
/// one after the other, and over which it replays what was unanswered on those that it gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientSession {
    /// Names the session. The client's choice, random.
    pub id: u128,
    /// Rises whenever the client opens connections in the place of others, which it has given up by then.
    pub generation: u64,
}

/// Why a connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client closed it, said goodbye, or is gone.
    Client,
    /// The client broke the protocol, as [`ClientProtocol::parse`] found.
    Violation,
    /// It could not be read for too long [R24].
    Unread,
    /// The client takes no answers, or does not send what it announced.
    Stalled,
    /// The client asked nothing for too long.
    Idle,
    /// The volume has as many connections as it takes.
    Full,
    /// Its client has opened another one in its place.
    Replaced,
    /// The volume stops, or is served elsewhere.
    Server,
}

/// What a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// It is done. Nothing follows.
    Done,
    /// A read: the caller sends the data, exactly as many bytes as were asked for, right behind the reply.
    Data,
    /// A read that brought zeroes only, to a client that understands that. Nothing follows.
    Zeroes,
    /// What a [`FrontOp::BlockStatus`] asked for: at least one extent, none of them empty, the first one
    /// from its offset on, each from the end of the one before, at most to the end of the request.
    Extents(&'a [Extent]),
    /// It is refused, or failed.
    Error(ClientError),
}

/// What a request header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientFrame {
    /// A request.
    Request(FrontRequest),
    /// The client says that it will send nothing more: answer what is in flight, then close.
    Disconnect,
    /// The bytes are not the protocol's; nothing after them can be trusted. Close at once, unanswered. The
    /// text says what was wrong, for the log.
    Violation(String),
}

/// One request of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontRequest {
    /// The client's own name for it, opaque; clients may reuse one as soon as it is answered.
    pub handle: u64,
    /// What.
    pub op: FrontOp,
    /// First byte; 0 for a flush.
    pub offset: u64,
    /// Bytes; 0 for a flush. Bounded by the protocol's payload limit for reads and writes without an
    /// `error` only: the others carry no payload and may be as long as the volume.
    pub len: u64,
    /// Bytes that follow the header: `len` for a write. Any number, to be thrown away, if the request carries
    /// an `error`; else 0.
    pub payload: u64,
    /// Stable on all of the ack set before the reply.
    pub fua: bool,
    /// Of a [`FrontOp::WriteZeroes`]: the zeroes take their space, no hole is made.
    pub no_hole: bool,
    /// Of a [`FrontOp::BlockStatus`]: only the first of the extents is wanted, so its protocol tells no more.
    pub one: bool,
    /// Set if the request is already known to be refused: drain its payload, then answer this error. Nothing
    /// else is to be done for it.
    pub error: Option<ClientError>,
}

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontOp {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Make everything acknowledged on any connection so far stable.
    Flush,
    /// No longer needed; reads back as zeroes.
    Trim,
    /// Write zeroes.
    WriteZeroes,
    /// Will be read soon. There is no cache that it could be brought to, so nothing is done.
    Cache,
    /// Which parts are holes, and which a missing replica lacks.
    BlockStatus,
}

impl FrontRequest {
    /// It is carried out by writing zeroes, piece by piece.
    pub(super) fn fills(&self) -> bool {
        self.op == FrontOp::WriteZeroes && self.no_hole
    }
}

impl FrontOp {
    /// It is answered with something that was asked for.
    pub(super) fn wants_data(self) -> bool {
        matches!(self, Self::Read | Self::BlockStatus)
    }
}
