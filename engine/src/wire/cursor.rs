//! Little-endian reading from a slice that a peer filled. Never reads past its end, never allocates.

use super::WireError;
use crate::types::{ClusterId, Incarnation, LineageId, Member, NodeId, VolumeId};

/// Reads from the front of a slice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    what: &'static str,
    len: usize,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Starts at the front of `bytes`; `what` names them in errors.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, len: bytes.len(), rest: bytes }
    }

    /// Number of bytes not read yet.
    pub(super) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The error that says that the content does not end where the bytes do.
    pub(super) fn length_error(&self) -> WireError {
        WireError::BodyLength { what: self.what, len: self.len }
    }

    /// Checks that everything was read.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.length_error()) }
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.length_error())?;
        self.rest = rest;
        Ok(*head)
    }

    /// The next `len` bytes.
    pub(super) fn slice(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.length_error())?;
        self.rest = rest;
        Ok(head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self) -> Result<u128, WireError> {
        self.array().map(u128::from_le_bytes)
    }

    pub(super) fn incarnation(&mut self) -> Result<Incarnation, WireError> {
        Ok(Incarnation { boot: self.u64()?, nonce: self.u64()? })
    }

    pub(super) fn member(&mut self) -> Result<Member, WireError> {
        Ok(Member { node: NodeId(self.u64()?), incarnation: self.incarnation()? })
    }

    pub(super) fn cluster(&mut self) -> Result<ClusterId, WireError> {
        self.u128().map(ClusterId)
    }

    pub(super) fn volume(&mut self) -> Result<VolumeId, WireError> {
        self.u128().map(VolumeId)
    }

    pub(super) fn lineage(&mut self) -> Result<LineageId, WireError> {
        self.u128().map(LineageId)
    }
}

/// Appends an incarnation: boot counter, random part.
pub(super) fn put_incarnation(out: &mut Vec<u8>, incarnation: Incarnation) {
    out.extend_from_slice(&incarnation.boot.to_le_bytes());
    out.extend_from_slice(&incarnation.nonce.to_le_bytes());
}

/// Appends a member: node, boot counter, random part.
pub(super) fn put_member(out: &mut Vec<u8>, member: Member) {
    out.extend_from_slice(&member.node.0.to_le_bytes());
    put_incarnation(out, member.incarnation);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_is_an_error_and_consumes_nothing() {
        let mut cursor = Cursor::new("a test", &[1, 2, 3]);
        let short = WireError::BodyLength { what: "a test", len: 3 };
        assert_eq!(cursor.u16(), Ok(0x0201));
        assert_eq!(cursor.u16(), Err(short.clone()));
        assert_eq!(cursor.slice(2), Err(short.clone()));
        assert_eq!(cursor.end(), Err(short));
        assert_eq!(cursor.array(), Ok([3]));
        assert_eq!(cursor.end(), Ok(()));
    }
}
