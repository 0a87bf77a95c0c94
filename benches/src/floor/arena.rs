//! Buffers for payloads: one aligned piece of memory, cut into powers of two, never given back.
//!
//! Invariant: a buffer is handed out once until it is released. Whoever gives its address to the kernel keeps
//! it until the kernel is done.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::ptr::NonNull;

/// Bytes in all.
const ARENA_BYTES: usize = 128 << 20;
/// Alignment of the whole: that of a huge page.
const ARENA_ALIGN: usize = 2 << 20;
/// The smallest buffer.
const BUFFER_BYTES_MIN: usize = 4096;
/// Sizes of buffers: from the smallest in powers of two, up to 4 MiB.
const CLASSES: usize = 11;

/// A buffer: its place and its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    start: u32,
    class: u8,
}

pub(super) struct Arena {
    memory: NonNull<u8>,
    /// Everything from here on was never handed out.
    fresh: usize,
    free: [Vec<u32>; CLASSES],
}

impl Arena {
    pub(super) fn new() -> Self {
        let layout = Layout::from_size_align(ARENA_BYTES, ARENA_ALIGN).expect("a layout of constants");
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(memory) = NonNull::new(memory) else { handle_alloc_error(layout) };
        // SAFETY: the range is the allocation just made. Advice that is refused changes nothing.
        unsafe { libc::madvise(memory.as_ptr().cast(), ARENA_BYTES, libc::MADV_HUGEPAGE) };
        Self { memory, fresh: 0, free: std::array::from_fn(|_| Vec::with_capacity(4096)) }
    }

    /// The whole, for registration with the ring. It lives as long as the process.
    pub(super) fn whole(&self) -> (*mut u8, usize) {
        (self.memory.as_ptr(), ARENA_BYTES)
    }

    /// A buffer of at least `len` bytes; none if all are in use or it is too long.
    pub(super) fn take(&mut self, len: usize) -> Option<Buffer> {
        let blocks = len.div_ceil(BUFFER_BYTES_MIN).next_power_of_two();
        let class = blocks.trailing_zeros() as usize;
        let free = self.free.get_mut(class)?;
        let class = u8::try_from(class).ok()?;
        if let Some(start) = free.pop() {
            return Some(Buffer { start, class });
        }
        let bytes = blocks * BUFFER_BYTES_MIN;
        if self.fresh + bytes > ARENA_BYTES {
            return None;
        }
        let start = u32::try_from(self.fresh).ok()?;
        self.fresh += bytes;
        Some(Buffer { start, class })
    }

    pub(super) fn release(&mut self, buffer: Buffer) {
        self.free[buffer.class as usize].push(buffer.start);
    }

    /// Address of byte `at` of a buffer.
    pub(super) fn at(&self, buffer: Buffer, at: usize) -> *mut u8 {
        assert!(at <= BUFFER_BYTES_MIN << buffer.class, "byte {at} of {buffer:?}");
        // SAFETY: buffers lie inside of the allocation, and `at` inside of the buffer, or at its end.
        unsafe { self.memory.as_ptr().add(buffer.start as usize + at) }
    }

    /// Copies `bytes` to byte `at` of a buffer that the kernel does not use.
    pub(super) fn fill(&mut self, buffer: Buffer, at: usize, bytes: &[u8]) {
        assert!(
            at + bytes.len() <= BUFFER_BYTES_MIN << buffer.class,
            "{} at {at} of {buffer:?}",
            bytes.len()
        );
        // SAFETY: the range lies inside of the buffer; `bytes` is other memory, and nobody else refers to it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(buffer, at), bytes.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let mut arena = Arena::new();
        let small = arena.take(100).unwrap();
        let large = arena.take((1 << 20) + 1).unwrap();
        for buffer in [small, large] {
            assert_eq!(arena.at(buffer, 0) as usize % BUFFER_BYTES_MIN, 0);
        }
        arena.fill(large, 1 << 20, &[1]);
        arena.release(large);
        assert_eq!(arena.take(2 << 20), Some(large));
        assert_eq!(arena.take(5 << 20), None);
        while arena.take(4 << 20).is_some() {}
        assert!(arena.take(4096).is_some() || arena.take(4 << 20).is_none());
    }
}
