//! What can be wrong with bytes that a peer sent.
//!
//! Every error means the same to the driver: nothing more of that stream can be trusted, close the
//! session and open a new one (or, for a refusal, try again later or tell the operator). No error is
//! ever a reason to change data or metadata.

use thiserror::Error;

use super::{FrameKind, Refusal, VersionRange};
use crate::types::{GeometryError, NodeId};

/// Why bytes from a peer are not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes do not begin as they must.
    #[error(
        "{what} begins with {found:#x} instead of the blkrepl magic: the other end is no blkrepl peer port, \
         or the stream lost its place; check the peer address in the node config"
    )]
    Magic {
        /// What was expected there.
        what: &'static str,
        /// The bytes found, as a little-endian number.
        found: u64,
    },
    /// A checksum does not match.
    #[error(
        "{what} carries checksum {carried:#010x} but its bytes give {computed:#010x}: damaged on the way; \
         the session is closed and opened again, look at the network if this repeats"
    )]
    Checksum {
        /// What is damaged.
        what: &'static str,
        /// The checksum that came with it.
        carried: u32,
        /// The checksum of what arrived.
        computed: u32,
    },
    /// A frame of a kind that this version does not know.
    #[error(
        "frame of unknown kind {0}: the peer speaks a protocol that was not agreed; \
         run the same version of blkrepl on both nodes"
    )]
    UnknownKind(u8),
    /// A field of a frame holds what it must not.
    #[error(
        "{field} of a {kind} frame is {value:#x}, which the protocol does not allow: \
         the peer is faulty or of another version; run the same version of blkrepl on both nodes"
    )]
    Field {
        /// Kind of the frame.
        kind: FrameKind,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The body that the driver hands over is not the one that the header announced.
    #[error(
        "body of a {kind} frame has {given} bytes where the header announced {declared}: \
         the reader of this stream mixed frames up; the session must be closed"
    )]
    BodyDiffers {
        /// Kind of the frame.
        kind: FrameKind,
        /// Bytes announced by the header.
        declared: u32,
        /// Bytes handed over.
        given: u64,
    },
    /// The body ends before what it must contain, or goes on after it.
    #[error(
        "{what} of {len} bytes does not end where its content does: \
         the peer is faulty or of another version; run the same version of blkrepl on both nodes"
    )]
    BodyLength {
        /// Name of the frame's kind, or of what else it is.
        what: &'static str,
        /// Bytes of it.
        len: usize,
    },
    /// A text is not UTF-8.
    #[error("text in {0} is not UTF-8: the peer is faulty; run the same version of blkrepl on both nodes")]
    Text(&'static str),
    /// A config announces sizes that no volume can have.
    #[error("config from a peer is refused: {0}")]
    Geometry(#[from] GeometryError),
    /// A hello or its answer names an empty or unknown range of versions.
    #[error(
        "{what} names protocol version {version} while this node speaks {own}: \
         run versions of blkrepl whose ranges overlap on both nodes"
    )]
    Version {
        /// What names it.
        what: &'static str,
        /// The version named.
        version: u16,
        /// What this end speaks.
        own: VersionRange,
    },
    /// Another node than the intended one answered.
    #[error("reached {found} where {wanted} was meant: correct the peer address of {wanted}")]
    WrongNode {
        /// Who was meant.
        wanted: NodeId,
        /// Who answered.
        found: NodeId,
    },
    /// The peer refused the session.
    #[error("{peer} refuses the session ({code}): {reason}")]
    Refused {
        /// Who refused.
        peer: NodeId,
        /// Why, for programs.
        code: Refusal,
        /// Why and what to do, for people.
        reason: String,
    },
}
