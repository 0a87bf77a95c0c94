//! Frames: a fixed header of 64 bytes, then a body of a few bytes kept inline or of bulk content that
//! stays in a buffer of the driver.
//!
//! Header and body each have their own CRC-32, so that a length or a kind is believed only after its
//! checksum held. One message has exactly one encoding. Nothing here reads a socket, and nothing a peer
//! sends panics or sizes an allocation beyond what has arrived. Layout: docs/protocol.md.

use super::body::{
    cut, decode_bits, decode_hashes, decode_report, decode_runs, decode_text, encode_bits, encode_hashes,
    encode_report, encode_runs, runs_kind_of, selector_of,
};
use super::config::{decode_config, encode_config};
use super::cursor::Cursor;
use super::kind::{
    BlocksUse, BodyRule, FAILED_REASON_MAX, FLAG_CONTENT, FLAG_DRAIN, FLAG_DURABLE, FLAG_EVERYTHING,
    FLAG_FOREIGN, FLAG_LAST, FrameKind, RUN_LEN,
};
use super::message::{BufId, PAYLOAD_BYTES_MAX, Payload, PeerMsg, WriteSeq};
use super::{CONTENT_BLOCKS_MAX, INLINE_BYTES_MAX, RUNS_MAX, VOLUME_BLOCKS_MAX, WireError};
use crate::types::{BLOCK_SIZE_DEFAULT, BlockIndex, BlockRange, Epoch, LogIndex, Reign, SlotSet};

/// Length of every frame's header in bytes.
pub const FRAME_HEADER_LEN: usize = 64;
/// First four bytes of every frame.
const FRAME_MAGIC: [u8; 4] = *b"BRfr";
/// The header's checksum stands in its last four bytes and covers all before them.
const HEADER_CRC_AT: usize = FRAME_HEADER_LEN - 4;

/// What follows a header on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLen {
    /// Nothing.
    None,
    /// So many bytes, 1 to [`INLINE_BYTES_MAX`], to be read into memory.
    Inline(u32),
    /// So many bytes of block content, whole blocks, at most [`PAYLOAD_BYTES_MAX`], to be read into a buffer.
    Bulk(u32),
}

/// A body that has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    None,
    /// The bytes of an inline body.
    Inline(Vec<u8>),
    /// Block content in a buffer, with the checksum that was computed from what arrived.
    Bulk(Payload),
}

/// A frame's header, checked: what it says obeys the rules of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    kind: FrameKind,
    flags: u8,
    missing: u8,
    selector: u8,
    reign: u64,
    id: u64,
    start: u64,
    count: u64,
    index: u64,
    items: u32,
    body_len: u32,
    body_crc: u32,
}

/// Appends the frame of `msg` to `out`: the header and, if it has one, the inline body. Bulk content is
/// not copied: it is returned, and the driver sends it right after.
///
/// A reason longer than [`FAILED_REASON_MAX`] is cut.
///
/// # Panics
/// If the message breaks a rule of the protocol (a range that is empty, too long or past the largest
/// volume, content that does not match its range, more than [`RUNS_MAX`] runs or [`CONTENT_BLOCKS_MAX`]
/// hashes): the replica made it, so one of its invariants is broken.
pub fn encode(msg: &PeerMsg, out: &mut Vec<u8>) -> Option<Payload> {
    let at = out.len();
    out.resize(at + FRAME_HEADER_LEN, 0);
    let mut header = header_of(msg);
    let bulk = match msg {
        PeerMsg::Write { payload, .. } | PeerMsg::Copy { payload, .. } => Some(*payload),
        PeerMsg::ReadReply { payload, .. } => *payload,
        _ => None,
    };
    encode_inline(msg, out);
    let inline = &out[at + FRAME_HEADER_LEN..];
    (header.body_len, header.body_crc) = match bulk {
        Some(payload) => (payload.len, payload.crc),
        None => (u32::try_from(inline.len()).unwrap_or(u32::MAX), crc32fast::hash(inline)),
    };
    if let Err(error) = header.check() {
        panic!("the replica made a {} message that the protocol forbids: {error}", header.kind);
    }
    debug_assert!(
        bulk.is_some() || header.kind == FrameKind::Failed || decodes_to(header, inline, msg),
        "a {} message does not decode to itself: {msg:?}",
        header.kind
    );
    out[at..at + FRAME_HEADER_LEN].copy_from_slice(&header.to_bytes());
    bulk
}

/// Pair assertion: what was encoded reads back as the same message.
fn decodes_to(header: FrameHeader, inline: &[u8], msg: &PeerMsg) -> bool {
    let body = if inline.is_empty() { Body::None } else { Body::Inline(inline.to_vec()) };
    header.into_message(body).as_ref() == Ok(msg)
}

/// Reads and checks a header.
///
/// # Errors
/// [`WireError`] if the magic, the checksum, the kind or any field is not as it must be. The stream has
/// no place to go on from then: the session must be closed.
pub fn decode_header(bytes: &[u8; FRAME_HEADER_LEN]) -> Result<FrameHeader, WireError> {
    let mut c = Cursor::new("frame header", bytes);
    let magic = c.array::<4>()?;
    if magic != FRAME_MAGIC {
        return Err(WireError::Magic { what: "a frame", found: u64::from(u32::from_le_bytes(magic)) });
    }
    let [kind, flags, missing, selector] = c.array::<4>()?;
    let (reign, id, start, count, index) = (c.u64()?, c.u64()?, c.u64()?, c.u64()?, c.u64()?);
    let (items, body_len, body_crc, carried) = (c.u32()?, c.u32()?, c.u32()?, c.u32()?);
    let computed = crc32fast::hash(&bytes[..HEADER_CRC_AT]);
    if carried != computed {
        return Err(WireError::Checksum { what: "frame header", carried, computed });
    }
    let kind = FrameKind::from_number(kind).ok_or(WireError::UnknownKind(kind))?;
    let header = FrameHeader {
        kind,
        flags,
        missing,
        selector,
        reign,
        id,
        start,
        count,
        index,
        items,
        body_len,
        body_crc,
    };
    header.check()?;
    Ok(header)
}

/// Reads one frame from the front of `bytes`, its content included; `buf` is the name that block content
/// gets in the message. Returns the message and the length of the frame, or `None` if more bytes are
/// needed. For readers that have the bytes in memory (simulator, tests, fuzzing); a driver reads the
/// content into its buffer instead.
///
/// # Errors
/// [`WireError`] as [`decode_header`] and [`FrameHeader::into_message`].
pub fn decode_slice(bytes: &[u8], buf: BufId) -> Result<Option<(PeerMsg, usize)>, WireError> {
    let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEADER_LEN>() else {
        return Ok(None);
    };
    let header = decode_header(head)?;
    let Some(content) = rest.get(..header.body_len as usize) else {
        return Ok(None);
    };
    let body = match header.body_len() {
        BodyLen::None => Body::None,
        BodyLen::Inline(_) => Body::Inline(content.to_vec()),
        BodyLen::Bulk(len) => Body::Bulk(Payload { buf, len, crc: crc32fast::hash(content) }),
    };
    Ok(Some((header.into_message(body)?, FRAME_HEADER_LEN + content.len())))
}

impl FrameHeader {
    /// Kind of the frame.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        self.kind
    }

    /// The reign that fences the message; `None` for the kinds that have none.
    #[must_use]
    pub fn reign(&self) -> Option<Reign> {
        self.kind.shape().reign.then_some(Reign(self.reign))
    }

    /// What follows the header.
    #[must_use]
    pub fn body_len(&self) -> BodyLen {
        match (self.body_len, self.kind.shape().body) {
            (0, _) => BodyLen::None,
            (len, BodyRule::Content | BodyRule::MaybeContent) => BodyLen::Bulk(len),
            (len, _) => BodyLen::Inline(len),
        }
    }

    /// CRC-32 (IEEE) that the body must have.
    #[must_use]
    pub fn body_crc(&self) -> u32 {
        self.body_crc
    }

    /// The message, from the header and the body that followed it. A [`Body::Bulk`] carries the checksum
    /// that the driver computed from what arrived.
    ///
    /// # Errors
    /// [`WireError::Checksum`] if the body is damaged, others if it is not what the kind requires. The
    /// session must be closed; content of a refused frame must not reach a disk.
    pub fn into_message(self, body: Body) -> Result<PeerMsg, WireError> {
        self.check_body(&body)?;
        match body {
            Body::None => self.inline_message(&[]),
            Body::Inline(bytes) => self.inline_message(&bytes),
            Body::Bulk(payload) => self.bulk_message(payload),
        }
    }

    /// A header of `kind` with every field zero.
    fn blank(kind: FrameKind) -> Self {
        Self {
            kind,
            flags: 0,
            missing: 0,
            selector: 0,
            reign: 0,
            id: 0,
            start: 0,
            count: 0,
            index: 0,
            items: 0,
            body_len: 0,
            body_crc: 0,
        }
    }

    fn fenced(self, reign: Reign) -> Self {
        Self { reign: reign.0, ..self }
    }

    fn numbered(self, reign: Reign, id: u64) -> Self {
        Self { reign: reign.0, id, ..self }
    }

    fn at(self, blocks: BlockRange) -> Self {
        Self { start: blocks.start.0, count: blocks.count, ..self }
    }

    fn flag(self, flag: u8, set: bool) -> Self {
        Self { flags: if set { self.flags | flag } else { self.flags }, ..self }
    }

    /// A count that does not fit becomes one that the check refuses.
    fn listing(self, items: usize) -> Self {
        Self { items: u32::try_from(items).unwrap_or(u32::MAX), ..self }
    }

    fn to_bytes(self) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[..4].copy_from_slice(&FRAME_MAGIC);
        bytes[4..8].copy_from_slice(&[self.kind.number(), self.flags, self.missing, self.selector]);
        for (at, value) in [self.reign, self.id, self.start, self.count, self.index].iter().enumerate() {
            bytes[8 + 8 * at..16 + 8 * at].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [self.items, self.body_len, self.body_crc].iter().enumerate() {
            bytes[48 + 4 * at..52 + 4 * at].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes[..HEADER_CRC_AT]);
        bytes[HEADER_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn wrong(&self, field: &'static str, value: u64) -> WireError {
        WireError::Field { kind: self.kind, field, value }
    }

    /// The rules of the kind, as far as the header alone can break them. Both ends apply them.
    fn check(&self) -> Result<(), WireError> {
        let shape = self.kind.shape();
        let unused = [
            ("reign", self.reign, shape.reign),
            ("number", self.id, shape.id),
            ("config index or epoch", self.index, shape.index),
            ("missing set", u64::from(self.missing), shape.missing),
            ("flags", u64::from(self.flags & !shape.flags), false),
            ("selector", u64::from(self.selector), shape.selector),
        ];
        for (field, value, used) in unused {
            if !used && value != 0 {
                return Err(self.wrong(field, value));
            }
        }
        if shape.selector && runs_kind_of(self.selector).is_none() {
            return Err(self.wrong("selector", u64::from(self.selector)));
        }
        self.check_blocks(shape.blocks)?;
        self.check_items(shape.body)?;
        self.check_length(shape.body)
    }

    fn check_blocks(&self, rule: BlocksUse) -> Result<(), WireError> {
        let most = match rule {
            BlocksUse::None if self.start == 0 && self.count == 0 => return Ok(()),
            BlocksUse::None => return Err(self.wrong("block range", self.count)),
            BlocksUse::OnePayload => u64::from(CONTENT_BLOCKS_MAX),
            BlocksUse::Any => VOLUME_BLOCKS_MAX,
        };
        if self.count == 0 || self.count > most {
            return Err(self.wrong("block count", self.count));
        }
        match self.start.checked_add(self.count) {
            Some(end) if end <= VOLUME_BLOCKS_MAX => Ok(()),
            _ => Err(self.wrong("first block", self.start)),
        }
    }

    fn check_items(&self, rule: BodyRule) -> Result<(), WireError> {
        let fits = match rule {
            BodyRule::Runs => self.items <= RUNS_MAX,
            BodyRule::Hashes => u64::from(self.items) == self.count,
            BodyRule::Bits => (1..=CONTENT_BLOCKS_MAX).contains(&self.items),
            _ => self.items == 0,
        };
        if fits { Ok(()) } else { Err(self.wrong("item count", u64::from(self.items))) }
    }

    fn check_length(&self, rule: BodyRule) -> Result<(), WireError> {
        let len = u64::from(self.body_len);
        let block = u64::from(BLOCK_SIZE_DEFAULT);
        let fits = match rule {
            BodyRule::None => len == 0,
            BodyRule::Inline { min, max } => (u64::from(min)..=u64::from(max)).contains(&len),
            BodyRule::Runs | BodyRule::Hashes => len == u64::from(self.items) * RUN_LEN as u64,
            BodyRule::Bits => len == u64::from(self.items.div_ceil(8)),
            BodyRule::Content => len == self.count * block,
            BodyRule::MaybeContent => {
                let some = self.flags & FLAG_CONTENT != 0;
                some == (len > 0) && len <= u64::from(PAYLOAD_BYTES_MAX) && len.is_multiple_of(block)
            }
        };
        if !fits {
            return Err(self.wrong("body length", len));
        }
        // CRC-32 of nothing.
        if len == 0 && self.body_crc != 0 {
            return Err(self.wrong("checksum of an empty body", u64::from(self.body_crc)));
        }
        Ok(())
    }

    /// The body is the one that the header announced.
    fn check_body(&self, body: &Body) -> Result<(), WireError> {
        let (given, computed) = match body {
            Body::None => (BodyLen::None, 0),
            Body::Inline(bytes) => {
                let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                (if len == 0 { BodyLen::None } else { BodyLen::Inline(len) }, crc32fast::hash(bytes))
            }
            Body::Bulk(payload) => (BodyLen::Bulk(payload.len), payload.crc),
        };
        if given != self.body_len() {
            let given = match body {
                Body::None => 0,
                Body::Inline(bytes) => bytes.len() as u64,
                Body::Bulk(payload) => u64::from(payload.len),
            };
            return Err(WireError::BodyDiffers { kind: self.kind, declared: self.body_len, given });
        }
        if computed != self.body_crc {
            let what = self.kind.name();
            return Err(WireError::Checksum { what, carried: self.body_crc, computed });
        }
        Ok(())
    }

    fn blocks(&self) -> BlockRange {
        BlockRange { start: BlockIndex(self.start), count: self.count }
    }

    fn bulk_message(self, payload: Payload) -> Result<PeerMsg, WireError> {
        let (reign, id, blocks) = (Reign(self.reign), self.id, self.blocks());
        match self.kind {
            FrameKind::Write => Ok(PeerMsg::Write {
                reign,
                seq: WriteSeq(id),
                blocks,
                durable: self.flags & FLAG_DURABLE != 0,
                missing: SlotSet(self.missing),
                config: LogIndex(self.index),
                payload,
            }),
            FrameKind::Copy => Ok(PeerMsg::Copy { reign, id, blocks, payload }),
            FrameKind::ReadReply => Ok(PeerMsg::ReadReply { reign, id, payload: Some(payload) }),
            _ => {
                let given = u64::from(payload.len);
                Err(WireError::BodyDiffers { kind: self.kind, declared: self.body_len, given })
            }
        }
    }

    /// Messages whose body, if any, is inline.
    fn inline_message(self, body: &[u8]) -> Result<PeerMsg, WireError> {
        let (reign, id, blocks) = (Reign(self.reign), self.id, self.blocks());
        Ok(match self.kind {
            FrameKind::Config => PeerMsg::Config(Box::new(decode_config(body)?)),
            FrameKind::Takeover => PeerMsg::Takeover { reign },
            FrameKind::Report => PeerMsg::Report { reign, report: decode_report(body)? },
            FrameKind::Runs => {
                let kind = runs_kind_of(self.selector)
                    .ok_or_else(|| self.wrong("selector", u64::from(self.selector)))?;
                let last = self.flags & FLAG_LAST != 0;
                PeerMsg::Runs { reign, kind, runs: decode_runs(kind, body)?, last }
            }
            FrameKind::Zero => PeerMsg::Zero {
                reign,
                seq: WriteSeq(id),
                blocks,
                durable: self.flags & FLAG_DURABLE != 0,
                missing: SlotSet(self.missing),
                config: LogIndex(self.index),
            },
            FrameKind::WriteAck => PeerMsg::WriteAck { reign, seq: WriteSeq(id) },
            FrameKind::Flush => PeerMsg::Flush { reign, id },
            FrameKind::FlushAck => PeerMsg::FlushAck { reign, id },
            FrameKind::Stable => {
                PeerMsg::Stable { reign, through: WriteSeq(id), drain: self.flags & FLAG_DRAIN != 0 }
            }
            FrameKind::ResyncStart => PeerMsg::ResyncStart {
                reign,
                epoch: Epoch(self.index),
                send_foreign: self.flags & FLAG_FOREIGN != 0,
                everything: self.flags & FLAG_EVERYTHING != 0,
            },
            FrameKind::ResyncReady => PeerMsg::ResyncReady { reign },
            FrameKind::Compare => PeerMsg::Compare { reign, id, blocks, hashes: decode_hashes(body)? },
            FrameKind::CompareResult => {
                PeerMsg::CompareResult { reign, id, differ: decode_bits(self.items, body)? }
            }
            FrameKind::CopyZero => PeerMsg::CopyZero { reign, id, blocks },
            FrameKind::CopyAck => PeerMsg::CopyAck { reign, id },
            FrameKind::JoinFlush => PeerMsg::JoinFlush { reign, id, through: WriteSeq(self.index) },
            FrameKind::JoinFlushAck => PeerMsg::JoinFlushAck { reign, id },
            FrameKind::ReadRequest => PeerMsg::ReadRequest { reign, id, blocks },
            FrameKind::ReadReply => PeerMsg::ReadReply { reign, id, payload: None },
            FrameKind::Failed => PeerMsg::Failed { reign, reason: decode_text("a Failed frame", body)? },
            FrameKind::Ping => PeerMsg::Ping,
            FrameKind::Pong => PeerMsg::Pong,
            FrameKind::Write | FrameKind::Copy => {
                let given = body.len() as u64;
                return Err(WireError::BodyDiffers { kind: self.kind, declared: self.body_len, given });
            }
        })
    }
}

/// The header of a message, but for what describes the body.
fn header_of(msg: &PeerMsg) -> FrameHeader {
    let blank = FrameHeader::blank(FrameKind::of(msg));
    match msg {
        PeerMsg::Config(_) | PeerMsg::Ping | PeerMsg::Pong => blank,
        PeerMsg::Takeover { reign }
        | PeerMsg::Report { reign, .. }
        | PeerMsg::ResyncReady { reign }
        | PeerMsg::Failed { reign, .. } => blank.fenced(*reign),
        PeerMsg::Runs { reign, kind, runs, last } => {
            let header = blank.fenced(*reign).flag(FLAG_LAST, *last).listing(runs.len());
            FrameHeader { selector: selector_of(*kind), ..header }
        }
        PeerMsg::Write { reign, seq, blocks, durable, missing, config, .. }
        | PeerMsg::Zero { reign, seq, blocks, durable, missing, config } => {
            let header = blank.numbered(*reign, seq.0).at(*blocks).flag(FLAG_DURABLE, *durable);
            FrameHeader { missing: missing.0, index: config.0, ..header }
        }
        PeerMsg::WriteAck { reign, seq } => blank.numbered(*reign, seq.0),
        PeerMsg::Flush { reign, id }
        | PeerMsg::FlushAck { reign, id }
        | PeerMsg::CopyAck { reign, id }
        | PeerMsg::JoinFlushAck { reign, id } => blank.numbered(*reign, *id),
        PeerMsg::Stable { reign, through, drain } => {
            blank.numbered(*reign, through.0).flag(FLAG_DRAIN, *drain)
        }
        PeerMsg::JoinFlush { reign, id, through } => {
            FrameHeader { index: through.0, ..blank.numbered(*reign, *id) }
        }
        PeerMsg::ResyncStart { reign, epoch, send_foreign, everything } => {
            let header = blank.fenced(*reign);
            let header = header.flag(FLAG_FOREIGN, *send_foreign).flag(FLAG_EVERYTHING, *everything);
            FrameHeader { index: epoch.0, ..header }
        }
        PeerMsg::Compare { reign, id, blocks, hashes } => {
            blank.numbered(*reign, *id).at(*blocks).listing(hashes.len())
        }
        PeerMsg::CompareResult { reign, id, differ } => blank.numbered(*reign, *id).listing(differ.len()),
        PeerMsg::Copy { reign, id, blocks, .. }
        | PeerMsg::CopyZero { reign, id, blocks }
        | PeerMsg::ReadRequest { reign, id, blocks } => blank.numbered(*reign, *id).at(*blocks),
        PeerMsg::ReadReply { reign, id, payload } => {
            blank.numbered(*reign, *id).flag(FLAG_CONTENT, payload.is_some())
        }
    }
}

/// Appends the inline body of a message, if it has one.
fn encode_inline(msg: &PeerMsg, out: &mut Vec<u8>) {
    match msg {
        PeerMsg::Config(view) => encode_config(view, out),
        PeerMsg::Report { report, .. } => encode_report(report, out),
        PeerMsg::Runs { runs, .. } => encode_runs(runs, out),
        PeerMsg::Compare { hashes, .. } => encode_hashes(hashes, out),
        PeerMsg::CompareResult { differ, .. } => encode_bits(differ, out),
        PeerMsg::Failed { reason, .. } => {
            out.extend_from_slice(cut(reason, FAILED_REASON_MAX as usize).as_bytes());
        }
        _ => {}
    }
}

const _: () = assert!(4 + 4 + 5 * 8 + 3 * 4 == HEADER_CRC_AT, "fields fill the header");
const _: () = assert!(RUNS_MAX as usize * RUN_LEN <= INLINE_BYTES_MAX as usize);
const _: () = assert!(CONTENT_BLOCKS_MAX as usize * RUN_LEN <= INLINE_BYTES_MAX as usize);
const _: () = assert!(CONTENT_BLOCKS_MAX as u64 * BLOCK_SIZE_DEFAULT as u64 == PAYLOAD_BYTES_MAX as u64);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BLOCK_HASH_LEN, Run, RunsKind};

    /// Checks the header of `msg` after `tamper`, its checksum good.
    fn checked(msg: &PeerMsg, tamper: impl FnOnce(&mut FrameHeader)) -> Result<FrameHeader, WireError> {
        let mut out = Vec::new();
        encode(msg, &mut out);
        let mut header = decode_header(out.first_chunk().unwrap()).unwrap();
        tamper(&mut header);
        decode_header(&header.to_bytes())
    }

    fn zero(start: u64, count: u64) -> PeerMsg {
        PeerMsg::Zero {
            reign: Reign(1),
            seq: WriteSeq(1),
            blocks: BlockRange { start: BlockIndex(start), count },
            durable: false,
            missing: SlotSet(0),
            config: LogIndex(1),
        }
    }

    #[test]
    fn fields_that_a_kind_does_not_use_must_be_zero() {
        type Tamper = fn(&mut FrameHeader);
        let tampers: [(&str, Tamper); 10] = [
            ("reign", |h| h.reign = 1),
            ("number", |h| h.id = 1),
            ("config index or epoch", |h| h.index = 1),
            ("missing set", |h| h.missing = 1),
            ("flags", |h| h.flags = FLAG_DURABLE),
            ("selector", |h| h.selector = 1),
            ("block range", |h| h.start = 1),
            ("block range", |h| h.count = 1),
            ("item count", |h| h.items = 1),
            ("checksum of an empty body", |h| h.body_crc = 1),
        ];
        for (name, tamper) in tampers {
            let error = checked(&PeerMsg::Ping, tamper).unwrap_err();
            assert!(matches!(error, WireError::Field { field, .. } if field == name), "{name}: {error}");
        }
        let error = checked(&PeerMsg::Ping, |h| h.body_len = 1).unwrap_err();
        assert!(matches!(error, WireError::Field { field: "body length", .. }), "{error}");
    }

    #[test]
    fn block_ranges_that_overflow_or_leave_the_largest_volume_are_refused() {
        let last = VOLUME_BLOCKS_MAX - 1;
        assert!(checked(&zero(last, 1), |_| ()).is_ok());
        assert!(checked(&zero(last, 1), |h| h.count = 2).is_err());
        assert!(checked(&zero(last, 1), |h| h.start = VOLUME_BLOCKS_MAX).is_err());
        assert!(checked(&zero(last, 1), |h| h.start = u64::MAX).is_err());
        assert!(checked(&zero(last, 1), |h| h.count = 0).is_err());
        assert!(checked(&zero(0, VOLUME_BLOCKS_MAX), |h| h.count = u64::MAX).is_err());
    }

    #[test]
    fn a_request_whose_answer_would_not_fit_one_payload_is_refused() {
        let most = u64::from(CONTENT_BLOCKS_MAX);
        let blocks = BlockRange { start: BlockIndex(0), count: most };
        let request = PeerMsg::ReadRequest { reign: Reign(1), id: 1, blocks };
        assert!(checked(&request, |_| ()).is_ok());
        assert!(checked(&request, |h| h.count = most + 1).is_err());
        let hashes = vec![[1; BLOCK_HASH_LEN]; CONTENT_BLOCKS_MAX as usize];
        let compare = PeerMsg::Compare { reign: Reign(1), id: 1, blocks, hashes };
        assert!(checked(&compare, |_| ()).is_ok());
        assert!(checked(&compare, |h| h.items -= 1).is_err());
        assert!(checked(&compare, |h| h.count -= 1).is_err());
    }

    #[test]
    fn the_longest_list_of_runs_fits_and_a_longer_one_is_refused() {
        let runs: Vec<_> = (0..u64::from(RUNS_MAX)).map(|at| Run { start: 2 * at, count: 1 }).collect();
        let msg = PeerMsg::Runs { reign: Reign(1), kind: RunsKind::Intent, runs, last: true };
        let header = checked(&msg, |_| ()).unwrap();
        assert_eq!(header.body_len(), BodyLen::Inline(INLINE_BYTES_MAX));
        let longer = checked(&msg, |h| {
            h.items += 1;
            h.body_len += 16;
        });
        assert!(matches!(longer, Err(WireError::Field { field: "item count", .. })));
        assert!(checked(&msg, |h| h.selector = 2).is_err());
        assert!(checked(&msg, |h| h.selector = 24).is_err());
    }

    #[test]
    fn content_is_announced_by_its_flag_and_is_whole_blocks() {
        let payload = Payload { buf: BufId(1), len: 4096, crc: 9 };
        let reply = PeerMsg::ReadReply { reign: Reign(1), id: 1, payload: Some(payload) };
        assert_eq!(checked(&reply, |_| ()).unwrap().body_len(), BodyLen::Bulk(4096));
        assert!(checked(&reply, |h| h.flags = 0).is_err());
        assert!(checked(&reply, |h| h.body_len = 4095).is_err());
        assert!(checked(&reply, |h| h.body_len = PAYLOAD_BYTES_MAX + 4096).is_err());
        assert!(checked(&reply, |h| h.body_len = 0).is_err());
    }
}
