//! The peer protocol: what two replicas of one volume say to each other ([`message`]), how it looks on
//! the wire ([`frame`]), and how a session begins ([`hello`]).
//!
//! Pure encode and decode: nothing here owns a socket. Nothing that a peer sends can panic or size an
//! allocation unchecked. Byte layout: docs/protocol.md.

pub mod message;

pub use message::{
    BLOCK_HASH_LEN, BaseContent, BlockHash, BufId, InconsistentMark, PAYLOAD_BYTES_MAX, Payload, PeerMsg,
    PeerReport, Run, RunsKind, SessionId, WriteSeq,
};
