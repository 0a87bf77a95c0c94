//! Everything that goes into a replica and comes out of it, as plain data.
//!
//! The driver's side of the contract:
//! - It feeds inputs one at a time, with `now` read *after* the completion was reaped [R27], and drains
//!   `poll_output` until `None` after each input (or a batch of them) before it waits again.
//! - Outputs are carried out in the order in which they came out, as far as one session, one
//!   connection or one buffer is concerned; disk operations run concurrently, the core orders them by
//!   waiting for completions.
//! - A buffer named in an input belongs to the core until it puts out [`Output::Release`]; operations
//!   that the core has put out hold the buffer on their own account (the driver counts), so a release
//!   may precede the end of a send or of a disk write.
//! - A disk operation completes exactly once, however late. It is never cancelled.

use std::fmt;

use crate::rising_map::rising;
use crate::types::{
    BlockRange, Epoch, Extent, Incarnation, Nanos, NodeId, Proposal, Reign, ReplicaStatus, ResyncProgress,
};
use crate::wire::{BlockHash, BufId, Payload, PeerMsg, SessionId};

/// A client connection, counted by the driver; never reused within an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Names one request of a connection for its reply; the driver's, opaque to the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

rising!(Cookie);

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientOp {
    /// Read.
    Read,
    /// Write. The buffer spans the whole blocks that the request touches; the client's bytes stand at
    /// `offset % block size` in it, the rest is not yet filled. The checksum covers the whole buffer and
    /// means something only if the request is aligned at both ends.
    Write(Payload),
    /// Make everything acknowledged on any connection so far stable.
    Flush,
    /// Write zeroes (trim and write-zeroes are the same here: both read back as zeroes).
    Zero,
    /// Say which parts are holes, and which a missing replica lacks.
    Extents {
        /// Most extents that are wanted, at least 1. No more than [`EXTENTS_MAX`](super::EXTENTS_MAX) are given.
        max: usize,
    },
}

/// One request. The driver has checked that the range lies within the volume it announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientRequest {
    /// The connection.
    pub conn: ConnId,
    /// For the reply.
    pub cookie: Cookie,
    /// What.
    pub op: ClientOp,
    /// First byte (0 for a flush).
    pub offset: u64,
    /// Bytes (0 for a flush).
    pub len: u64,
    /// Stable on all of the ack set before the reply.
    pub fua: bool,
}

/// Input from clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientInput {
    /// A request.
    Request(ClientRequest),
    /// The connection is gone: what has not started is dropped, no reply is wanted any more [R24].
    Closed(ConnId),
}

/// Error of a client request; mapped to the protocol's error numbers by the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientError {
    /// Outside the volume, or a length that is not allowed.
    Invalid,
    /// No replica could read or write it.
    Io,
    /// No space left for it on the only replica.
    NoSpace,
    /// The volume is stopping.
    Shutdown,
    /// It cannot be done in the way that the client insists on. Never the core's: the front end judges it.
    Unsupported,
}

/// What a successful reply carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyData {
    /// Nothing.
    None,
    /// `len` bytes at `skip` of the buffer.
    Read {
        /// The buffer.
        buf: BufId,
        /// Offset of the first wanted byte in it.
        skip: u32,
        /// Wanted bytes.
        len: u32,
        /// All of them are known to be zero.
        zero: bool,
    },
    /// From the request's first byte on, one after the other; at most [`EXTENTS_MAX`](super::EXTENTS_MAX), and
    /// at least one. They may end before the request does.
    Extents(Vec<Extent>),
}

/// Names one disk operation; never reused within an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskOpId(pub u64);

rising!(DiskOpId);

/// What is computed from the content of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digest {
    /// Nothing: it goes to a client, and the payload's checksum is 0.
    None,
    /// The payload's checksum: it goes to a peer.
    Checksum,
    /// The checksum, and a hash of each block.
    Hashes,
}

/// A disk operation with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// Name, for the completion.
    pub id: DiskOpId,
    /// What to do.
    pub op: DiskOp,
}

/// What the disk shall do. Blocks mean the data object; metadata goes to the metadata file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Read into a new buffer; completes with [`DiskResult::Read`].
    Read {
        /// Where.
        blocks: BlockRange,
        /// What to compute from the content.
        digest: Digest,
    },
    /// Complete a partial write: fill the first `head` and the last `tail` bytes of `buf` with what
    /// the disk holds there. Completes with [`DiskResult::Filled`].
    FillEdges {
        /// The buffer; spans `blocks`.
        buf: BufId,
        /// Where.
        blocks: BlockRange,
        /// Bytes at the front that the client did not give; less than a block.
        head: u32,
        /// Bytes at the end that the client did not give; less than a block.
        tail: u32,
    },
    /// A buffer of zeroes, `len` bytes, for the partial blocks of a zero request. Completes with
    /// [`DiskResult::Read`] (no disk is touched).
    ZeroBuffer {
        /// Bytes, whole blocks.
        len: u32,
    },
    /// Write `blocks` from the start of the buffer.
    Write {
        /// Where.
        blocks: BlockRange,
        /// From.
        buf: BufId,
        /// On stable storage before completion.
        durable: bool,
    },
    /// Make the blocks read as zeroes, giving up their space where the file system can.
    Zero {
        /// Where.
        blocks: BlockRange,
        /// On stable storage before completion.
        durable: bool,
    },
    /// Find the holes: parts that take no space and read as zeroes. Completes with [`DiskResult::Extents`].
    Extents {
        /// Where.
        blocks: BlockRange,
        /// Most stretches that are wanted, at least 1. The answer may end before the range does.
        max: usize,
    },
    /// Flush the data object.
    Flush,
    /// Write metadata: whole 4 KiB groups at a 4 KiB offset of the metadata file, on stable storage
    /// before completion.
    MetaWrite {
        /// Byte offset in the metadata file.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// Why a disk operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskErrorKind {
    /// The device or file system reports an error.
    Io,
    /// No space left.
    NoSpace,
}

impl fmt::Display for DiskErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O error",
            Self::NoSpace => "no space left",
        })
    }
}

/// Blocks that are all holes, or not known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Blocks; not 0.
    pub count: u64,
    /// They take no space and read as zeroes.
    pub hole: bool,
}

/// A finished disk operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDone {
    /// Which.
    pub id: DiskOpId,
    /// How it ended.
    pub result: Result<DiskResult, DiskErrorKind>,
}

/// Result of a disk operation that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskResult {
    /// Done (write, zero, flush, metadata).
    Done,
    /// Content read into a new buffer that now belongs to the core.
    Read {
        /// The content.
        payload: Payload,
        /// Every byte of it is zero.
        all_zero: bool,
        /// One hash per block for [`Digest::Hashes`], else empty.
        hashes: Vec<BlockHash>,
    },
    /// The blocks asked about, from the first one on, at most [`EXTENTS_MAX`](super::EXTENTS_MAX) stretches and at
    /// least one. They may end before the blocks do.
    Extents(Vec<Stretch>),
    /// The edges are filled; checksum of the whole buffer.
    Filled {
        /// CRC-32 of the whole buffer.
        crc: u32,
    },
}

/// Input from peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerInput {
    /// A session to the replica on `node`, run `incarnation`, is up. An older session to that node is
    /// over: the driver has delivered (or thrown away) what it received and will deliver no more.
    Up {
        /// The new session.
        session: SessionId,
        /// The peer's node.
        node: NodeId,
        /// The peer's run.
        incarnation: Incarnation,
    },
    /// The session is over.
    Down(SessionId),
    /// A message arrived whole, its checksums hold.
    Msg(SessionId, PeerMsg),
}

/// The right to serve until a point in time, already confirmed by a quorum and applied here [R1].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Valid while `now` is before this.
    pub until: Nanos,
}

/// What the core wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Carry out a disk operation.
    Disk(DiskRequest),
    /// Send a message on a session. Messages of one session keep their order.
    Send(SessionId, PeerMsg),
    /// Answer a client. Dropped if the connection is gone.
    Reply {
        /// The connection.
        conn: ConnId,
        /// The request.
        cookie: Cookie,
        /// The answer.
        result: Result<ReplyData, ClientError>,
    },
    /// The core is done with the buffer.
    Release(BufId),
    /// Ask the control plane. Its outcome comes back through `handle_proposal`.
    Propose(Proposal),
    /// End a session.
    CloseSession(SessionId, String),
    /// Close every client connection of the volume, unanswered, and drop what they have sent [R23].
    CloseClients(String),
    /// Something happened that people or tools want to know.
    Event(Event),
    /// A stop asked for by `begin_stop` is complete: everything is flushed and marked clean.
    Stopped,
}

/// What happened, for logs, `blkrepl events` and the demo's timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A config of a newer epoch is followed.
    ConfigFollowed {
        /// Its epoch.
        epoch: Epoch,
        /// Its reign.
        reign: Reign,
    },
    /// This replica is primary and begins to reconcile with the other members.
    TookOver {
        /// The reign.
        reign: Reign,
        /// Regions to compare.
        regions: u64,
    },
    /// This replica serves clients.
    Serving {
        /// The reign.
        reign: Reign,
    },
    /// This replica no longer serves clients.
    StoppedServing(String),
    /// A peer's session came up or went down.
    Session {
        /// The peer.
        node: NodeId,
        /// Up or down.
        up: bool,
    },
    /// A member is proposed for removal.
    Removing {
        /// The member's node.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// A resync into a peer began.
    ResyncStarted {
        /// The target.
        node: NodeId,
        /// Bytes in the set.
        bytes: u64,
        /// Why the set is what it is.
        reason: String,
    },
    /// A returning replica holds writes of another lineage that will be thrown away.
    Discarding {
        /// The replica.
        node: NodeId,
        /// Bytes that differ at most.
        bytes: u64,
    },
    /// A resync ended and the target was proposed to join.
    ResyncFinished {
        /// The target.
        node: NodeId,
        /// What was done.
        progress: ResyncProgress,
    },
    /// A peer is refused.
    Refused {
        /// The peer.
        node: NodeId,
        /// Why, and what to do.
        reason: String,
    },
    /// A block was read from a peer and rewritten here [R20].
    Repaired {
        /// Where.
        blocks: BlockRange,
    },
    /// This replica failed.
    Failed(String),
    /// A damaged metadata page was found and reads all-set.
    MetadataDamaged(String),
}

/// What the driver publishes of a replica after each turn in which it changed.
pub type StatusSnapshot = ReplicaStatus;
