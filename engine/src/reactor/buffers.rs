//! Aligned, pooled, reference-counted buffers: every byte of block content lives in one of them.
//!
//! A [`BufId`] is a slot here. Who holds a buffer counts as one reference: the core (from the input
//! that names it to its `Release`), every disk operation and every queued send, and every operation that
//! the kernel has not yet completed. Memory is given back to the pool only with the last of them, so a
//! completion that never comes keeps its buffer for ever, whatever else closes or is released.
//!
//! Client traffic is bounded: [`Buffers::reserve`] refuses beyond [`BUFFER_BYTES_MAX`], and the caller
//! then stops reading from clients (back-pressure, never loss). Operations of the replica itself
//! (resync, repair, metadata, peers) are bounded by the core and may always allocate.
//!
//! Part of the memory is one arena that is registered with the ring when the system allows that.
//!
//! Never does: I/O, or knowing what the bytes mean. Content of a new buffer is undefined (old block
//! content or zeroes), but always initialised memory.

use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

use crate::wire::{BufId, PAYLOAD_BYTES_MAX};

/// Alignment of every buffer in bytes; enough for O_DIRECT on every usual device.
pub(super) const ALIGN: usize = 4096;
/// Most bytes of client requests (write payload on its way in, read data on its way out) per volume.
pub(super) const BUFFER_BYTES_MAX: u64 = 256 << 20;
/// Most bytes of free buffers kept for reuse; more are given back to the system.
const FREE_BYTES_MAX: usize = 64 << 20;
/// Largest power-of-two class; one more class holds the largest payload.
const CLASS_POW2_MAX: usize = 32 << 20;
/// Number of size classes: 4 KiB, 8 KiB, .. 32 MiB, and the largest payload.
const CLASSES: usize = (CLASS_POW2_MAX / ALIGN).trailing_zeros() as usize + 2;
/// Buffers up to this size come from the arena while it lasts.
const ARENA_BUFFER_MAX: usize = 256 << 10;

const _: () = assert!(PAYLOAD_BYTES_MAX as usize >= CLASS_POW2_MAX);
const _: () = assert!((PAYLOAD_BYTES_MAX as usize).is_multiple_of(ALIGN));

/// A piece of mapped, initialised memory.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    /// Bytes: the size of its class.
    len: usize,
    /// Part of the arena: registered with the ring, never unmapped on its own.
    arena: bool,
}

#[derive(Debug)]
struct Slot {
    memory: Memory,
    /// Bytes asked for; what lies behind them in `memory` is never touched.
    len: usize,
    references: u32,
    /// Bytes of the client bound that end with this buffer.
    charge: u64,
}

/// All buffers of one volume.
#[derive(Debug)]
pub(super) struct Buffers {
    slots: Vec<Option<Slot>>,
    vacant: Vec<u32>,
    free: [Vec<Memory>; CLASSES],
    free_bytes: usize,
    client_bytes: u64,
    arena: Option<Arena>,
}

#[derive(Debug)]
struct Arena {
    start: NonNull<u8>,
    len: usize,
    used: usize,
}

/// Class of a buffer of `len` bytes.
fn class_of(len: usize) -> usize {
    assert!(len <= PAYLOAD_BYTES_MAX as usize, "buffer of {len} bytes asked for, the largest is a payload");
    if len > CLASS_POW2_MAX {
        return CLASSES - 1;
    }
    (len.max(ALIGN).next_power_of_two() / ALIGN).trailing_zeros() as usize
}

/// Size in bytes of the buffers of a class.
fn class_len(class: usize) -> usize {
    if class == CLASSES - 1 { PAYLOAD_BYTES_MAX as usize } else { ALIGN << class }
}

/// Maps `len` bytes of zeroes. Running out of address space or memory here is what running out of heap
/// is elsewhere: it ends the process, as the replica could not go on anyway.
fn map(len: usize) -> NonNull<u8> {
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no memory in use.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    match start.map(|p| NonNull::new(p.cast::<u8>())) {
        Ok(Some(start)) => start,
        _ => std::alloc::handle_alloc_error(
            std::alloc::Layout::from_size_align(len, ALIGN).expect("buffer sizes are small and aligned"),
        ),
    }
}

/// Unmaps what [`map`] gave.
fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: the range is exactly one earlier mapping and its owner has just been given up.
    let result = unsafe { rustix::mm::munmap(start.as_ptr().cast(), len) };
    debug_assert!(result.is_ok(), "munmap of a buffer failed: {result:?}");
}

impl Buffers {
    /// An empty pool with an arena of `arena_len` bytes (rounded to whole buffers; 0: none).
    pub(super) fn new(arena_len: usize) -> Self {
        let len = arena_len / ARENA_BUFFER_MAX * ARENA_BUFFER_MAX;
        let arena = (len > 0).then(|| Arena { start: map(len), len, used: 0 });
        Self {
            slots: Vec::new(),
            vacant: Vec::new(),
            free: std::array::from_fn(|_| Vec::new()),
            free_bytes: 0,
            client_bytes: 0,
            arena,
        }
    }

    /// Start and length of the arena, for registration.
    pub(super) fn arena(&self) -> Option<(NonNull<u8>, usize)> {
        self.arena.as_ref().map(|a| (a.start, a.len))
    }

    /// A buffer of `len` bytes with one reference, the caller's. At most the largest payload.
    pub(super) fn alloc(&mut self, len: usize) -> BufId {
        let class = class_of(len);
        let memory = match self.free[class].pop() {
            Some(memory) => {
                self.free_bytes -= memory.len;
                memory
            }
            None => self.fresh(class_len(class)),
        };
        let slot = Slot { memory, len, references: 1, charge: 0 };
        if let Some(index) = self.vacant.pop() {
            self.slots[index as usize] = Some(slot);
            return BufId(index);
        }
        self.slots.push(Some(slot));
        BufId(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 buffers at once"))
    }

    fn fresh(&mut self, len: usize) -> Memory {
        if let Some(arena) = self.arena.as_mut()
            && len <= ARENA_BUFFER_MAX
            && arena.used + len <= arena.len
        {
            // SAFETY: `used + len` stays within the arena's one mapping.
            let start = unsafe { arena.start.add(arena.used) };
            arena.used += len;
            return Memory { start, len, arena: true };
        }
        Memory { start: map(len), len, arena: false }
    }

    fn slot(&self, id: BufId) -> &Slot {
        self.slots.get(id.0 as usize).and_then(Option::as_ref).unwrap_or_else(|| {
            panic!("{id:?} is not in use: it was released once too often or never given out")
        })
    }

    fn slot_mut(&mut self, id: BufId) -> &mut Slot {
        self.slots.get_mut(id.0 as usize).and_then(Option::as_mut).unwrap_or_else(|| {
            panic!("{id:?} is not in use: it was released once too often or never given out")
        })
    }

    /// One more holder.
    pub(super) fn retain(&mut self, id: BufId) {
        self.slot_mut(id).references += 1;
    }

    /// One holder less; the last one gives the memory back.
    pub(super) fn release(&mut self, id: BufId) {
        let slot = self.slot_mut(id);
        slot.references -= 1;
        if slot.references > 0 {
            return;
        }
        let slot = self.slots[id.0 as usize].take().expect("was found in use just above");
        self.vacant.push(id.0);
        self.unreserve(slot.charge);
        self.give_back(slot.memory);
    }

    fn give_back(&mut self, memory: Memory) {
        if !memory.arena && self.free_bytes + memory.len > FREE_BYTES_MAX {
            unmap(memory.start, memory.len);
            return;
        }
        self.free_bytes += memory.len;
        self.free[class_of(memory.len)].push(memory);
    }

    /// Bytes of the buffer.
    pub(super) fn len(&self, id: BufId) -> usize {
        self.slot(id).len
    }

    /// The content.
    pub(super) fn bytes(&self, id: BufId) -> &[u8] {
        let slot = self.slot(id);
        // SAFETY: the memory is mapped, initialised and at least `len` long as long as the slot is in
        // use. The kernel writes only into buffers (or parts) that no holder reads before the completion.
        unsafe { std::slice::from_raw_parts(slot.memory.start.as_ptr(), slot.len) }
    }

    /// The content, to change it.
    pub(super) fn bytes_mut(&mut self, id: BufId) -> &mut [u8] {
        let slot = self.slot_mut(id);
        // SAFETY: as in `bytes`; `&mut self` keeps every other slice away, and distinct slots never
        // share memory.
        unsafe { std::slice::from_raw_parts_mut(slot.memory.start.as_ptr(), slot.len) }
    }

    /// Address of `offset` in the buffer, of which `len` bytes follow; and whether it is registered.
    pub(super) fn address(&self, id: BufId, offset: usize, len: usize) -> (*mut u8, bool) {
        let slot = self.slot(id);
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= slot.len),
            "{len} bytes at {offset} of a buffer of {} bytes",
            slot.len
        );
        // SAFETY: `offset` lies within the mapping, as was just checked.
        let start = unsafe { slot.memory.start.as_ptr().add(offset) };
        (start, slot.memory.arena)
    }

    #[expect(clippy::needless_pass_by_ref_mut, reason = "keeps every slice of the target away")]
    /// Copies `len` bytes from `start` of one buffer to `at` of another.
    pub(super) fn copy(&mut self, from: BufId, start: usize, len: usize, to: BufId, at: usize) {
        assert_ne!(from, to, "copies go from one buffer to another");
        let (source, target) = (self.address(from, start, len).0, self.address(to, at, len).0);
        // SAFETY: both ranges were checked, and the memory of two slots in use never overlaps.
        unsafe { std::ptr::copy_nonoverlapping(source.cast_const(), target, len) };
    }

    /// Takes `bytes` of the client bound; false if that would exceed it (nothing is taken then).
    pub(super) fn reserve(&mut self, bytes: u64) -> bool {
        if self.client_bytes + bytes > BUFFER_BYTES_MAX {
            return false;
        }
        self.client_bytes += bytes;
        true
    }

    /// Gives `bytes` of the client bound back.
    pub(super) fn unreserve(&mut self, bytes: u64) {
        self.client_bytes =
            self.client_bytes.checked_sub(bytes).expect("only what was reserved is given back");
    }

    /// Ties reserved bytes to a buffer: they are given back with it.
    pub(super) fn charge(&mut self, id: BufId, bytes: u64) {
        self.slot_mut(id).charge += bytes;
    }

    /// Bytes of the client bound in use.
    pub(super) fn client_bytes(&self) -> u64 {
        self.client_bytes
    }

    /// Buffers in use.
    #[cfg(test)]
    pub(super) fn in_use(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        let used = self.slots.iter_mut().filter_map(Option::take).map(|slot| slot.memory);
        let free = self.free.iter_mut().flat_map(std::mem::take);
        for memory in used.chain(free).filter(|m| !m.arena) {
            unmap(memory.start, memory.len);
        }
        if let Some(arena) = self.arena.take() {
            unmap(arena.start, arena.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_cover_every_length_up_to_the_largest_payload() {
        for len in [0, 1, 4096, 4097, 65536, CLASS_POW2_MAX, CLASS_POW2_MAX + 1, PAYLOAD_BYTES_MAX as usize] {
            assert!(class_len(class_of(len)) >= len, "{len}");
            assert_eq!(class_of(class_len(class_of(len))), class_of(len));
        }
    }

    #[test]
    fn memory_is_aligned_and_reused_only_after_the_last_holder() {
        let mut buffers = Buffers::new(0);
        let a = buffers.alloc(4096);
        let (start, _) = buffers.address(a, 0, 4096);
        assert!((start as usize).is_multiple_of(ALIGN));
        buffers.retain(a);
        buffers.release(a);
        let b = buffers.alloc(4096);
        assert_ne!(buffers.address(b, 0, 1).0, start, "a holder is left");
        buffers.release(a);
        let c = buffers.alloc(100);
        assert_eq!(buffers.address(c, 0, 1).0, start);
        assert_eq!(buffers.len(c), 100);
        assert_eq!(buffers.in_use(), 2);
    }

    #[test]
    fn the_client_bound_is_kept_and_given_back_with_the_buffer() {
        let mut buffers = Buffers::new(0);
        assert!(buffers.reserve(BUFFER_BYTES_MAX));
        assert!(!buffers.reserve(1));
        let a = buffers.alloc(4096);
        buffers.charge(a, BUFFER_BYTES_MAX);
        buffers.release(a);
        assert_eq!(buffers.client_bytes(), 0);
        assert!(buffers.reserve(1));
    }

    #[test]
    fn small_buffers_come_from_the_arena_until_it_is_used_up() {
        let mut buffers = Buffers::new(ARENA_BUFFER_MAX);
        let a = buffers.alloc(ARENA_BUFFER_MAX);
        let b = buffers.alloc(4096);
        assert!(buffers.address(a, 0, 1).1);
        assert!(!buffers.address(b, 0, 1).1);
        buffers.release(a);
        let c = buffers.alloc(ARENA_BUFFER_MAX);
        assert!(buffers.address(c, 0, 1).1, "arena memory is reused");
    }

    #[test]
    #[should_panic(expected = "released once too often")]
    fn a_release_too_many_is_a_broken_invariant() {
        let mut buffers = Buffers::new(0);
        let a = buffers.alloc(1);
        buffers.release(a);
        buffers.release(a);
    }
}
