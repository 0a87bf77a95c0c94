//! The buffer into which a socket is read, and what of it has not been parsed yet.
//!
//! Headers and small bodies are parsed in place or copied out; what remains of a large body is received
//! straight into its own buffer by the caller, which uses this one only while it is empty.
//!
//! Never does: system calls, or interpreting bytes.

use crate::wire::BufId;

use super::buffers::Buffers;
use super::ring::Span;

/// Bytes of a staging buffer: what 32 requests to write 4 KiB take has to fit in, for one receive to bring it.
pub(super) const STAGING_LEN: usize = 256 << 10;
/// Bytes of it that are used where many connections share a volume, so that what they keep resident stays small.
pub(super) const SHARED_LEN: usize = 64 << 10;
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
        Self { buf: buffers.alloc_lasting(STAGING_LEN), start: 0, end: 0, after_large: false }
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

    /// Where to receive next: all of the free room in the first `most` bytes, unparsed bytes moved to the front if it
    /// is short; little of it after a large body.
    pub(super) fn room(&mut self, buffers: &mut Buffers, most: usize) -> Span {
        if self.end + most / 4 > most {
            buffers.bytes_mut(self.buf).copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        assert!(self.end < most, "a header never fills the staging buffer");
        let room = most - self.end;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_moves_to_the_front_before_room_is_short() {
        let mut buffers = Buffers::new(0);
        let mut staging = Staging::new(&mut buffers);
        // It was the only one at first, and has more than its part of many.
        staging.filled(STAGING_LEN - 100);
        staging.consume(STAGING_LEN - 140);
        buffers.bytes_mut(staging.buf)[STAGING_LEN - 140..STAGING_LEN - 100].fill(9);
        let room = staging.room(&mut buffers, SHARED_LEN);
        assert_eq!((room.start, room.len), (40, SHARED_LEN - 40));
        assert_eq!(staging.bytes(&buffers), [9; 40]);
        for _ in 0..100 {
            let room = staging.room(&mut buffers, SHARED_LEN);
            assert!(room.start + room.len <= SHARED_LEN && room.len >= SHARED_LEN / 4);
            staging.filled(1000);
            staging.consume(1000);
            assert_eq!(staging.len(), 40);
        }
        let room = staging.room(&mut buffers, STAGING_LEN);
        assert_eq!(room.start + room.len, STAGING_LEN);
    }
}
