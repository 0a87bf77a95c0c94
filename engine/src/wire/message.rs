//! Messages between the replicas of one volume, as plain data.
//!
//! Bulk payload (block content) is not in here: a [`Payload`] names a buffer of the driver, its length
//! and its checksum. Every message that acts on content carries the reign that fences it.

use crate::rising_map::rising;
use crate::types::{
    BlockRange, ConfigView, Epoch, Incarnation, LineageId, LogIndex, Member, Reign, ReplicaSlot, SlotSet,
    SuperblockTrust,
};

/// Largest bulk payload of one frame in bytes: the largest client request (32 MiB) widened to whole blocks.
pub const PAYLOAD_BYTES_MAX: u32 = (32 << 20) + 8192;
/// Length of a block hash in bytes.
pub const BLOCK_HASH_LEN: usize = 16;

/// 128-bit hash of one block's content (BLAKE3 cut to 16 bytes).
pub type BlockHash = [u8; BLOCK_HASH_LEN];

/// A buffer of the driver. The core only passes it on and says when it is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BufId(pub u32);

/// Block content held in a buffer of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Payload {
    /// The buffer; content starts at its first byte.
    pub buf: BufId,
    /// Bytes of content: whole blocks.
    pub len: u32,
    /// CRC-32 (IEEE) of the content.
    pub crc: u32,
}

/// One connection to a peer, counted by the driver; never reused within an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Number of a write within a reign, from 1, in the order in which the primary started them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WriteSeq(pub u64);

rising!(WriteSeq);

/// `start .. start + count`, of blocks or of regions as the message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First.
    pub start: u64,
    /// How many, 1 or more.
    pub count: u64,
}

/// What a list of runs means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunsKind {
    /// Regions set in the sender's intent map.
    Intent,
    /// Blocks set in any of the sender's dirty bitmaps, sent by a replica that holds foreign writes of
    /// another lineage: they were missing at the replica from which the next lineage started [R17].
    Foreign,
    /// Blocks set in the primary's dirty bitmap for the replica in this slot; for a joiner [R12].
    Dirty(ReplicaSlot),
}

/// What a replica's content was before any replicated write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseContent {
    /// Made by us, all zeroes.
    Zero,
    /// Not known: everything must be copied before it can join.
    Unknown,
    /// It was a committed member once.
    Member,
}

/// Durable note on a replica that a resync into it has begun and no join has ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InconsistentMark {
    /// Epoch under which the set of blocks to copy was determined.
    pub epoch: Epoch,
    /// Reign of the source.
    pub reign: Reign,
    /// The source.
    pub source: Member,
}

/// What a replica tells the primary about itself when a session or a reign begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerReport {
    /// How far its superblock can be trusted.
    pub trust: SuperblockTrust,
    /// Epoch that its superblock records.
    pub epoch: Epoch,
    /// Lineage of its content.
    pub lineage: LineageId,
    /// Incarnation under which it was last a member, if its content continues from there.
    pub member: Option<Incarnation>,
    /// What its content was before any replicated write.
    pub base: BaseContent,
    /// A resync was begun and has not ended.
    pub inconsistent: Option<InconsistentMark>,
    /// Some page of its intent map or bitmaps was damaged (and reads all-set).
    pub damaged_pages: u32,
}

/// One message between two replicas of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerMsg {
    /// The sender's committed config. Sent when a session begins and before the first message under a
    /// newer one; a receiver whose own view is older adopts it [R12].
    Config(Box<ConfigView>),
    /// The primary of `reign` asks the receiver to follow it: to refuse every older reign, finish what
    /// the old one left in flight, and answer with [`PeerMsg::Report`] and its intent regions [R11].
    Takeover {
        /// The new reign.
        reign: Reign,
    },
    /// Answer to a take-over; `Runs` of kind `Intent` follow, the last one marked.
    Report {
        /// The reign that the sender now follows.
        reign: Reign,
        /// What its superblock records.
        report: PeerReport,
    },
    /// A list of runs; a long one comes in several messages.
    Runs {
        /// Fence.
        reign: Reign,
        /// Meaning.
        kind: RunsKind,
        /// The runs, ascending.
        runs: Vec<Run>,
        /// No more follow.
        last: bool,
    },
    /// Commit these blocks.
    Write {
        /// Fence.
        reign: Reign,
        /// Its number.
        seq: WriteSeq,
        /// Where.
        blocks: BlockRange,
        /// Must be on stable storage before it is acknowledged.
        durable: bool,
        /// Replicas that do not get this write (or are not yet members): mark it for them [R12].
        missing: SlotSet,
        /// Index of the sender's config.
        config: LogIndex,
        /// Content.
        payload: Payload,
    },
    /// Commit zeroes to these blocks.
    Zero {
        /// Fence.
        reign: Reign,
        /// Its number.
        seq: WriteSeq,
        /// Where.
        blocks: BlockRange,
        /// Must be on stable storage before it is acknowledged.
        durable: bool,
        /// Replicas that do not get this write: mark it for them [R12].
        missing: SlotSet,
        /// Index of the sender's config.
        config: LogIndex,
    },
    /// The write is committed here.
    WriteAck {
        /// Fence.
        reign: Reign,
        /// Its number.
        seq: WriteSeq,
    },
    /// Make everything committed here so far stable.
    Flush {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
    },
    /// Everything committed before the flush arrived is stable here.
    FlushAck {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
    },
    /// Every write up to `through` is stable on all of the ack set: intents may be cleared [R5].
    Stable {
        /// Fence.
        reign: Reign,
        /// Last such write.
        through: WriteSeq,
        /// Clear now what can be cleared, in memory at once: a move is about to be proposed.
        drain: bool,
    },
    /// Prepare to be resynced: make the inconsistent mark durable.
    ResyncStart {
        /// Fence.
        reign: Reign,
        /// Epoch under which the set is determined.
        epoch: Epoch,
        /// Also send the dirty bitmaps (foreign writes).
        send_foreign: bool,
        /// Everything will be compared or copied: what the receiver's content was counts no more.
        everything: bool,
    },
    /// The mark is durable; `Runs` of kind `Foreign` came before if they were asked for.
    ResyncReady {
        /// Fence.
        reign: Reign,
    },
    /// Compare these blocks with the receiver's by hash.
    Compare {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Where.
        blocks: BlockRange,
        /// One hash per block.
        hashes: Vec<BlockHash>,
    },
    /// Which blocks of a compare differ.
    CompareResult {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// One flag per block of the request, in order; true: differs.
        differ: Vec<bool>,
    },
    /// Copy these blocks into place.
    Copy {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Where.
        blocks: BlockRange,
        /// Content.
        payload: Payload,
    },
    /// These blocks are all zeroes.
    CopyZero {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Where.
        blocks: BlockRange,
    },
    /// The copy is written.
    CopyAck {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
    },
    /// All bitmaps for a joiner were sent; make them durable, flush the data, then answer.
    JoinFlush {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Last write that the primary had started: what the joiner was sent by resync is as old as
        /// that and may leave its intent map once writes up to there are stable [R5].
        through: WriteSeq,
    },
    /// Done: the joiner may be proposed.
    JoinFlushAck {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
    },
    /// Read blocks for a repair [R20].
    ReadRequest {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Where.
        blocks: BlockRange,
    },
    /// Answer; no payload if the receiver could not read them either.
    ReadReply {
        /// Fence.
        reign: Reign,
        /// Request number.
        id: u64,
        /// Content.
        payload: Option<Payload>,
    },
    /// The sender's replica failed; the primary should propose to remove it.
    Failed {
        /// Fence.
        reign: Reign,
        /// What happened, for people (at most 1024 bytes).
        reason: String,
    },
    /// Keeps a silent session known to be alive. Answered by [`PeerMsg::Pong`].
    Ping,
    /// Answer to a ping.
    Pong,
}
