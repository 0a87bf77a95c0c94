//! The buffer into which a socket is read, and what of it has not been parsed yet.
//!
//! Headers and small bodies are parsed in place or copied out; what remains of a large body is received
//! straight into its own buffer by the caller, which uses this one only while it is empty.
//!
//! Never does: system calls, or interpreting bytes.

use crate::wire::BufId;

use super::buffers::Buffers;
use super::ring::Span;

/// Bytes of a staging buffer.
pub(super) const STAGING_LEN: usize = 64 << 10;
/// A body of which at least this much is missing is received straight into its own buffer.
const DIRECT_MIN: usize = 32 << 10;

/// After a body of at least this much the next receive takes little more than a header, so that another such body
/// lands in its own buffer and is not copied there.
const LARGE_MIN: usize = 2 * DIRECT_MIN;
/// Bytes of such a receive.
const SHORT_LEN: usize = 4096;

/// Bytes `start .. end` of the buffer are received and not yet consumed.
pub(super) struct Staging {
    buf: BufId,
    start: usize,
    end: usize,
    /// The last body was large.
    after_large: bool,
}

impl Staging {
    /// Allocates an empty one. Give it back with [`Self::release`].
    pub(super) fn new(buffers: &mut Buffers) -> Self {
        Self { buf: buffers.alloc(STAGING_LEN), start: 0, end: 0, after_large: false }
    }

    /// True if `buf` is this buffer.
    pub(super) fn is(&self, buf: BufId) -> bool {
        self.buf == buf
    }

    /// The unparsed bytes.
    pub(super) fn bytes<'a>(&self, buffers: &'a Buffers) -> &'a [u8] {
        &buffers.bytes(self.buf)[self.start..self.end]
    }

    /// Number of unparsed bytes.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Notes that the first `len` bytes are done with.
    pub(super) fn consume(&mut self, len: usize) {
        assert!(len <= self.len(), "consumed {len} of {} bytes", self.len());
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves up to `len` bytes to `at` of another buffer; returns how many.
    pub(super) fn move_to(&mut self, buffers: &mut Buffers, len: usize, to: BufId, at: usize) -> usize {
        let len = len.min(self.len());
        buffers.copy(self.buf, self.start, len, to, at);
        self.consume(len);
        len
    }

    /// Notes how long the body is that comes now.
    pub(super) fn expect_body(&mut self, len: usize) {
        self.after_large = len >= LARGE_MIN;
    }

    /// Whether what is missing of a body, `left` bytes, is to be received straight into its own buffer.
    pub(super) fn bypass(&self, left: usize) -> bool {
        left >= DIRECT_MIN || self.after_large
    }

    /// Where to receive next: all of the free room, unparsed bytes moved to the front if it is short; little of it
    /// after a large body.
    pub(super) fn room(&mut self, buffers: &mut Buffers) -> Span {
        if STAGING_LEN - self.end < STAGING_LEN / 4 {
            buffers.bytes_mut(self.buf).copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        assert!(self.end < STAGING_LEN, "a header never fills the staging buffer");
        let room = STAGING_LEN - self.end;
        let len = if self.after_large && self.len() == 0 { room.min(SHORT_LEN) } else { room };
        Span { buf: self.buf, start: self.end, len }
    }

    /// Notes that `len` more bytes were received.
    pub(super) fn filled(&mut self, len: usize) {
        self.end += len;
        assert!(self.end <= STAGING_LEN, "more was received than there was room for");
    }

    /// Gives the buffer up (the kernel may still hold it).
    pub(super) fn release(self, buffers: &mut Buffers) {
        buffers.release(self.buf);
    }
}
