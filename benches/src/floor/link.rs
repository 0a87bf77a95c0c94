//! One connection of a floor process: bytes that came in and were not looked at, bytes that are to go out.
//!
//! What goes out is gathered while the last send is in the kernel, then leaves as a whole. Pure but for
//! addresses: the ring is not touched here. Allocates nothing once its vectors have grown.

use std::os::fd::OwnedFd;

/// Bytes received at once.
pub(super) const STAGE_BYTES: usize = 256 << 10;
/// Most pieces of one send.
const PIECES_MAX: usize = 1024;

/// Whose end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Peer,
}

/// A payload on its way in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Landing {
    pub(super) op: u32,
    pub(super) got: usize,
    pub(super) len: usize,
}

/// What the receive in the kernel fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiving {
    Nothing,
    Stage,
    Landing,
}

pub(super) struct Link {
    pub(super) fd: OwnedFd,
    pub(super) role: Role,
    /// Tells this connection from an earlier one in the same place.
    pub(super) generation: u32,
    pub(super) stage: Vec<u8>,
    pub(super) stage_at: usize,
    pub(super) stage_end: usize,
    pub(super) landing: Option<Landing>,
    pub(super) receiving: Receiving,
    /// The socket held more than the last receive took.
    pub(super) more: bool,
    /// The last request was large, so the next may be: its payload is not to go through the stage.
    pub(super) large: bool,
    /// What came in waits for a buffer.
    pub(super) stalled: bool,
    pub(super) out: Outgoing,
    pub(super) sending: Outgoing,
    pub(super) send_in_kernel: bool,
    pub(super) closed: bool,
}

impl Link {
    pub(super) fn new(fd: OwnedFd, role: Role, generation: u32) -> Self {
        Self {
            fd,
            role,
            generation,
            stage: vec![0; STAGE_BYTES],
            stage_at: 0,
            stage_end: 0,
            landing: None,
            receiving: Receiving::Nothing,
            more: false,
            large: false,
            stalled: false,
            out: Outgoing::default(),
            sending: Outgoing::default(),
            send_in_kernel: false,
            closed: false,
        }
    }

    /// Bytes that came in and were not looked at.
    pub(super) fn staged(&self) -> &[u8] {
        &self.stage[self.stage_at..self.stage_end]
    }

    /// Makes room behind what is staged.
    pub(super) fn compact(&mut self) {
        if self.stage_at == self.stage_end {
            (self.stage_at, self.stage_end) = (0, 0);
        } else if self.stage_at > 0 {
            self.stage.copy_within(self.stage_at..self.stage_end, 0);
            self.stage_end -= self.stage_at;
            self.stage_at = 0;
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// A range of `heads`.
    Head {
        start: usize,
        len: usize,
    },
    Payload {
        address: *const u8,
        len: usize,
    },
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Head { len, .. } | Self::Payload { len, .. } => *len,
        }
    }
}

/// Headers and payloads in the order in which they leave.
pub(super) struct Outgoing {
    heads: Vec<u8>,
    pieces: Vec<Piece>,
    /// The first piece that has not left whole, and how much of it has.
    at: usize,
    sent: usize,
    /// Operations that end when all has left.
    pub(super) ends: Vec<u32>,
    iov: Vec<libc::iovec>,
    message: Box<libc::msghdr>,
}

impl Default for Outgoing {
    fn default() -> Self {
        // SAFETY: all fields of a message header may be zero or null: no name, no pieces, no control data.
        let message = unsafe { std::mem::zeroed() };
        Self {
            heads: Vec::with_capacity(64 << 10),
            pieces: Vec::with_capacity(2 * PIECES_MAX),
            at: 0,
            sent: 0,
            ends: Vec::with_capacity(PIECES_MAX),
            iov: Vec::with_capacity(PIECES_MAX),
            message: Box::new(message),
        }
    }
}

impl Outgoing {
    pub(super) fn is_empty(&self) -> bool {
        self.at == self.pieces.len()
    }

    pub(super) fn push_head(&mut self, bytes: &[u8]) {
        let start = self.heads.len();
        self.heads.extend_from_slice(bytes);
        match self.pieces.last_mut() {
            Some(Piece::Head { len, .. }) => *len += bytes.len(),
            _ => self.pieces.push(Piece::Head { start, len: bytes.len() }),
        }
    }

    /// The memory has to stay as it is until it has left.
    pub(super) fn push_payload(&mut self, address: *const u8, len: usize) {
        self.pieces.push(Piece::Payload { address, len });
    }

    /// A message of what has not left, at most what one send takes, and its bytes. It is valid until the next
    /// change.
    pub(super) fn message(&mut self) -> (*const libc::msghdr, usize) {
        self.iov.clear();
        let mut bytes = 0;
        let mut skip = self.sent;
        for piece in self.pieces[self.at..].iter().take(PIECES_MAX) {
            let address = match piece {
                Piece::Head { start, .. } => self.heads[*start..].as_ptr(),
                Piece::Payload { address, .. } => *address,
            };
            let iov_base = address.wrapping_add(skip).cast_mut().cast();
            bytes += piece.len() - skip;
            self.iov.push(libc::iovec { iov_base, iov_len: piece.len() - skip });
            skip = 0;
        }
        self.message.msg_iov = self.iov.as_mut_ptr();
        self.message.msg_iovlen = self.iov.len() as _;
        (&raw const *self.message, bytes)
    }

    /// Counts bytes that have left; true if that was all of it.
    pub(super) fn left(&mut self, mut bytes: usize) -> bool {
        while let Some(piece) = self.pieces.get(self.at) {
            let rest = piece.len() - self.sent;
            if bytes < rest {
                self.sent += bytes;
                return false;
            }
            bytes -= rest;
            self.sent = 0;
            self.at += 1;
        }
        true
    }

    /// Forgets everything; the operations that end are the caller's to take first.
    pub(super) fn clear(&mut self) {
        self.heads.clear();
        self.pieces.clear();
        self.ends.clear();
        (self.at, self.sent) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(out: &mut Outgoing) -> Vec<usize> {
        out.message();
        out.iov.iter().map(|piece| piece.iov_len).collect()
    }

    #[test]
    fn headers_that_follow_each_other_are_one_piece_and_leave_in_parts() {
        let payload = [1u8; 100];
        let mut out = Outgoing::default();
        out.push_head(&[0; 16]);
        out.push_head(&[0; 16]);
        out.push_payload(payload.as_ptr(), payload.len());
        out.push_head(&[0; 16]);
        assert_eq!(lens(&mut out), [32, 100, 16]);
        assert!(!out.left(40));
        assert_eq!(lens(&mut out), [92, 16]);
        assert!(!out.left(92));
        assert_eq!(lens(&mut out), [16]);
        assert!(out.left(16) && out.is_empty());
        out.clear();
        out.push_head(&[0; 8]);
        assert_eq!(lens(&mut out), [8]);
    }
}
