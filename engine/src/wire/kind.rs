//! The kinds of frame and, for each, which header fields it uses and what its body is. This table is
//! the one place that says so; encoding and decoding both obey it, docs/protocol.md prints it.
//!
//! Fields that a kind does not use are zero on the wire and refused if they are not, so that one message
//! has exactly one encoding and a later version can give them a meaning.

use std::fmt;

use super::{INLINE_BYTES_MAX, PeerMsg};
use crate::wire::body::REPORT_LEN;
use crate::wire::config::CONFIG_LEN_MIN;
use crate::wire::message::BLOCK_HASH_LEN;

/// Must be stable before it is acknowledged (write, zero).
pub(super) const FLAG_DURABLE: u8 = 1 << 0;
/// Last message of a list (runs).
pub(super) const FLAG_LAST: u8 = 1 << 1;
/// Clear intents at once (stable).
pub(super) const FLAG_DRAIN: u8 = 1 << 2;
/// The dirty bitmap for the source is wanted (resync start).
pub(super) const FLAG_FOREIGN: u8 = 1 << 3;
/// Content follows (read reply).
pub(super) const FLAG_CONTENT: u8 = 1 << 4;
/// ResyncStart: everything is compared or copied.
pub(super) const FLAG_EVERYTHING: u8 = 1 << 5;

/// Longest reason of a `Failed` message in bytes.
pub const FAILED_REASON_MAX: u32 = 1024;
/// Bytes of one run in a body.
pub(super) const RUN_LEN: usize = 16;

macro_rules! kinds {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// Kind of a frame: one per [`PeerMsg`] variant. The numbers are the wire's and never change.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum FrameKind {
            $(#[doc = concat!("[`PeerMsg::", stringify!($name), "`]")] $name = $number,)*
        }

        impl FrameKind {
            /// Every kind, ascending by number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The kind with this number on the wire.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its number on the wire.
            #[must_use]
            pub fn number(self) -> u8 {
                match self {
                    $(Self::$name => $number,)*
                }
            }

            /// Its name, for logs and counters.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

kinds! {
    Config = 1,
    Takeover = 2,
    Report = 3,
    Runs = 4,
    Write = 5,
    Zero = 6,
    WriteAck = 7,
    Flush = 8,
    FlushAck = 9,
    Stable = 10,
    ResyncStart = 11,
    ResyncReady = 12,
    Compare = 13,
    CompareResult = 14,
    Copy = 15,
    CopyZero = 16,
    CopyAck = 17,
    JoinFlush = 18,
    JoinFlushAck = 19,
    ReadRequest = 20,
    ReadReply = 21,
    Failed = 22,
    Ping = 23,
    Pong = 24,
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a kind uses the block fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlocksUse {
    /// Not at all: both zero.
    None,
    /// A range of one or more blocks inside the largest volume.
    Any,
    /// The same, and small enough that its content fits one payload.
    OnePayload,
}

/// What follows the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyRule {
    /// Nothing.
    None,
    /// `min ..= max` bytes.
    Inline {
        /// Fewest bytes.
        min: u32,
        /// Most bytes.
        max: u32,
    },
    /// As many runs as the item count says.
    Runs,
    /// One hash per block of the range; the item count repeats it.
    Hashes,
    /// As many bits as the item count says, padded to whole bytes with zeroes.
    Bits,
    /// The content of the block range.
    Content,
    /// Whole blocks if the content flag is set, else nothing.
    MaybeContent,
}

/// Which fields of the header a kind uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) reign: bool,
    pub(super) id: bool,
    pub(super) index: bool,
    pub(super) missing: bool,
    pub(super) selector: bool,
    pub(super) flags: u8,
    pub(super) blocks: BlocksUse,
    pub(super) body: BodyRule,
}

impl Shape {
    /// No field used, no body.
    const BARE: Self = Self {
        reign: false,
        id: false,
        index: false,
        missing: false,
        selector: false,
        flags: 0,
        blocks: BlocksUse::None,
        body: BodyRule::None,
    };
    /// Fenced by a reign.
    const FENCED: Self = Self { reign: true, ..Self::BARE };
    /// Fenced and numbered.
    const NUMBERED: Self = Self { id: true, ..Self::FENCED };
    /// A replicated write; content or not is added by the kind.
    const WRITE: Self =
        Self { index: true, missing: true, flags: FLAG_DURABLE, blocks: BlocksUse::Any, ..Self::NUMBERED };
}

impl FrameKind {
    /// The kind of a message.
    #[must_use]
    pub fn of(msg: &PeerMsg) -> Self {
        match msg {
            PeerMsg::Config(_) => Self::Config,
            PeerMsg::Takeover { .. } => Self::Takeover,
            PeerMsg::Report { .. } => Self::Report,
            PeerMsg::Runs { .. } => Self::Runs,
            PeerMsg::Write { .. } => Self::Write,
            PeerMsg::Zero { .. } => Self::Zero,
            PeerMsg::WriteAck { .. } => Self::WriteAck,
            PeerMsg::Flush { .. } => Self::Flush,
            PeerMsg::FlushAck { .. } => Self::FlushAck,
            PeerMsg::Stable { .. } => Self::Stable,
            PeerMsg::ResyncStart { .. } => Self::ResyncStart,
            PeerMsg::ResyncReady { .. } => Self::ResyncReady,
            PeerMsg::Compare { .. } => Self::Compare,
            PeerMsg::CompareResult { .. } => Self::CompareResult,
            PeerMsg::Copy { .. } => Self::Copy,
            PeerMsg::CopyZero { .. } => Self::CopyZero,
            PeerMsg::CopyAck { .. } => Self::CopyAck,
            PeerMsg::JoinFlush { .. } => Self::JoinFlush,
            PeerMsg::JoinFlushAck { .. } => Self::JoinFlushAck,
            PeerMsg::ReadRequest { .. } => Self::ReadRequest,
            PeerMsg::ReadReply { .. } => Self::ReadReply,
            PeerMsg::Failed { .. } => Self::Failed,
            PeerMsg::Ping => Self::Ping,
            PeerMsg::Pong => Self::Pong,
        }
    }

    /// The row of this kind.
    pub(super) fn shape(self) -> Shape {
        const REPORT: BodyRule = BodyRule::Inline { min: REPORT_LEN, max: REPORT_LEN };
        const CONFIG: BodyRule = BodyRule::Inline { min: CONFIG_LEN_MIN, max: INLINE_BYTES_MAX };
        const REASON: BodyRule = BodyRule::Inline { min: 0, max: FAILED_REASON_MAX };
        match self {
            Self::Ping | Self::Pong => Shape::BARE,
            Self::Config => Shape { body: CONFIG, ..Shape::BARE },
            Self::Takeover | Self::ResyncReady => Shape::FENCED,
            Self::Report => Shape { body: REPORT, ..Shape::FENCED },
            Self::Failed => Shape { body: REASON, ..Shape::FENCED },
            Self::Runs => Shape { selector: true, flags: FLAG_LAST, body: BodyRule::Runs, ..Shape::FENCED },
            Self::Write => Shape { blocks: BlocksUse::OnePayload, body: BodyRule::Content, ..Shape::WRITE },
            Self::Zero => Shape::WRITE,
            Self::WriteAck | Self::Flush | Self::FlushAck | Self::CopyAck | Self::JoinFlushAck => {
                Shape::NUMBERED
            }
            Self::JoinFlush => Shape { index: true, ..Shape::NUMBERED },
            Self::Stable => Shape { flags: FLAG_DRAIN, ..Shape::NUMBERED },
            Self::ResyncStart => {
                Shape { index: true, flags: FLAG_FOREIGN | FLAG_EVERYTHING, ..Shape::FENCED }
            }
            Self::Compare => {
                Shape { blocks: BlocksUse::OnePayload, body: BodyRule::Hashes, ..Shape::NUMBERED }
            }
            Self::CompareResult => Shape { body: BodyRule::Bits, ..Shape::NUMBERED },
            Self::Copy => Shape { blocks: BlocksUse::OnePayload, body: BodyRule::Content, ..Shape::NUMBERED },
            Self::CopyZero => Shape { blocks: BlocksUse::Any, ..Shape::NUMBERED },
            Self::ReadRequest => Shape { blocks: BlocksUse::OnePayload, ..Shape::NUMBERED },
            Self::ReadReply => Shape { flags: FLAG_CONTENT, body: BodyRule::MaybeContent, ..Shape::NUMBERED },
        }
    }
}

const _: () = assert!(RUN_LEN == BLOCK_HASH_LEN, "items of both lists are counted with one length");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_numbers_round_trip_and_are_dense_from_one() {
        for (at, kind) in FrameKind::ALL.iter().enumerate() {
            assert_eq!(usize::from(kind.number()), at + 1);
            assert_eq!(FrameKind::from_number(kind.number()), Some(*kind));
        }
        assert_eq!(FrameKind::from_number(0), None);
        assert_eq!(FrameKind::from_number(25), None);
    }
}
