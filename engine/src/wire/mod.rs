//! The peer protocol: what two replicas of one volume say to each other ([`message`]), how it looks on
//! the wire ([`encode`], [`decode_header`]), and how a session begins ([`Hello`]).
//!
//! Pure encode and decode: nothing here owns a socket. Nothing that a peer sends can panic or size an
//! allocation unchecked. Byte layout: docs/protocol.md.

#![deny(clippy::cast_possible_truncation)]

mod body;
mod config;
mod cursor;
mod error;
mod frame;
#[cfg(test)]
mod golden;
mod hello;
mod kind;
pub mod message;
#[cfg(test)]
mod proptests;
#[cfg(test)]
mod rules_tests;

pub use error::WireError;
pub use frame::{Body, BodyLen, FRAME_HEADER_LEN, FrameHeader, decode_header, decode_slice, encode};
pub use hello::{
    Established, HELLO_LEN, HELLO_REASON_MAX, HELLO_REPLY_LEN, Hello, HelloAnswer, HelloReply, LocalEnd,
    PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Refusal, VersionRange, negotiate,
};
pub use kind::{FAILED_REASON_MAX, FrameKind};
pub use message::{
    BLOCK_HASH_LEN, BaseContent, BlockHash, BufId, InconsistentMark, PAYLOAD_BYTES_MAX, Payload, PeerMsg,
    PeerReport, Run, RunsKind, SessionId, WriteSeq,
};

use crate::types::{BLOCK_SIZE_DEFAULT, VOLUME_SIZE_MAX};

/// Longest inline body of a frame in bytes.
pub const INLINE_BYTES_MAX: u32 = 2 << 20;
/// Most runs in one [`PeerMsg::Runs`]; a longer list is sent in several messages.
pub const RUNS_MAX: u32 = INLINE_BYTES_MAX / 16;
/// Most blocks of one write, copy, compare or read request: those whose content fits one payload, so that
/// the receiver can always hold it in one buffer.
pub const CONTENT_BLOCKS_MAX: u32 = PAYLOAD_BYTES_MAX / BLOCK_SIZE_DEFAULT;
/// Blocks of the largest volume: every block number on the wire is below it, so that no range of bytes
/// computed from it overflows.
pub(crate) const VOLUME_BLOCKS_MAX: u64 = VOLUME_SIZE_MAX / BLOCK_SIZE_DEFAULT as u64;
/// Regions of the largest volume with the smallest regions (64 KiB).
pub(crate) const REGIONS_MAX: u64 = VOLUME_SIZE_MAX / (64 << 10);
