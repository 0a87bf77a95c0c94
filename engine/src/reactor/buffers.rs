//! Aligned, pooled, reference-counted buffers: every byte of block content lives in one of them.
//!
//! A [`BufId`] is a slot here. Who holds a buffer counts as one reference: the core (from the input
//! that names it to its `Release`), every disk operation and every queued send, and every operation that
//! the kernel has not yet completed. Memory is given back to the pool only with the last of them, so a
//! completion that never comes keeps its buffer for ever, whatever else closes or is released.
//!
//! Client traffic is bounded: [`Buffers::reserve`] refuses beyond [`BUFFER_BYTES_MAX`] (but for one small request of
//! each connection, [`Buffers::reserve_beyond`]), and the caller then stops reading from clients (back-pressure, never
//! loss). An [`Account`] says what each of them holds.
//! Operations of the replica itself (resync, repair, metadata, peers) are bounded by the core and may always
//! allocate.
//!
//! Part of the memory is one arena in pieces of [`PIECE_LEN`], each of which the ring registers when a disk
//! operation first uses it: registered memory is resident, and an idle volume shall not take what a busy one
//! needs. Free memory outside the arena that was of no use for a while goes back to the system
//! ([`Buffers::trim`]).
//!
//! Large content lies in huge pages, if the system has them: what is one page is handed to a device as one
//! segment and pinned by one reference, where 1 MiB in small pages takes 256 of either. Small content shares the
//! arena's first [`SMALL_LEN`] bytes, in small pages, so that a volume that is idle or moves small blocks only has no
//! huge page.
//!
//! Never does: I/O, or knowing what the bytes mean. Content of a new buffer is undefined (old block
//! content or zeroes), but always initialised memory.

use std::ops::Range;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::wire::{BufId, PAYLOAD_BYTES_MAX};

/// Alignment of every buffer in bytes; enough for O_DIRECT on every usual device.
pub(super) const ALIGN: usize = 4096;
/// Most bytes of client requests (write payload on its way in, read data on its way out) per volume.
pub(super) const BUFFER_BYTES_MAX: u64 = 256 << 20;
/// Most bytes of free buffers kept for reuse; more are given back to the system at once.
const FREE_BYTES_MAX: usize = 64 << 20;
/// Largest power-of-two class; one more class holds the largest payload.
const CLASS_POW2_MAX: usize = 32 << 20;
/// Number of size classes: 4 KiB, 8 KiB, .. 32 MiB, and the largest payload.
const CLASSES: usize = (CLASS_POW2_MAX / ALIGN).trailing_zeros() as usize + 2;
/// Buffers up to this size come from the arena while it lasts.
const ARENA_BUFFER_MAX: usize = 256 << 10;
/// Bytes of the arena that are registered together; no buffer lies in two pieces.
pub(super) const PIECE_LEN: usize = ARENA_BUFFER_MAX;
/// Bytes of a huge page.
const HUGE_LEN: usize = 2 << 20;
/// Bytes at the arena's start that are in small pages.
const SMALL_LEN: usize = HUGE_LEN;
/// From this size on buffers come from the arena's huge pages, while they last.
const HUGE_MIN: usize = 64 << 10;

const _: () = assert!(PAYLOAD_BYTES_MAX as usize >= CLASS_POW2_MAX);
const _: () = assert!((PAYLOAD_BYTES_MAX as usize).is_multiple_of(ALIGN));

/// A piece of mapped, initialised memory.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    /// Bytes: the size of its class.
    len: usize,
    /// The piece of the arena that it is part of: never unmapped on its own.
    piece: Option<u16>,
}

#[derive(Debug)]
struct Slot {
    memory: Memory,
    /// Bytes asked for; what lies behind them in `memory` is never touched.
    len: usize,
    references: u32,
    /// Bytes of the client bound that end with this buffer, and to whom they count.
    charge: u64,
    account: Account,
}

/// Who holds some of the client bytes: a connection, also after its end, until the last of them is given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Account(u32);

/// What an account holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    bytes: u64,
    /// Its owner is gone: it is free as soon as nothing is held.
    closed: bool,
}

/// All buffers of one volume.
#[derive(Debug)]
pub(super) struct Buffers {
    slots: Vec<Option<Slot>>,
    vacant: Vec<u32>,
    free: [Vec<Memory>; CLASSES],
    free_bytes: usize,
    /// Free bytes outside the arena, and the least there were since the last [`Buffers::trim`].
    spare: usize,
    spare_min: usize,
    client_bytes: u64,
    accounts: Vec<Held>,
    vacant_accounts: Vec<u32>,
    arena: Option<Arena>,
}

#[derive(Debug)]
struct Arena {
    start: NonNull<u8>,
    len: usize,
    /// What was not given out yet of the small and of the huge pages, as ranges of bytes.
    small: Range<usize>,
    large: Range<usize>,
}

impl Arena {
    /// An arena of `len` bytes.
    fn new(len: usize) -> Self {
        let start = map_for_huge_pages(len);
        let middle = len.min(SMALL_LEN);
        // SAFETY: the range lies within the mapping that was just made.
        unsafe { prefer_huge_pages(start.add(middle), len - middle) };
        Self { start, len, small: 0..middle, large: middle..len }
    }

    /// Memory for a buffer of one of the classes, while there is room. What is left of a piece that it does
    /// not fit into stays unused.
    fn take(&mut self, len: usize) -> Option<Memory> {
        if len > ARENA_BUFFER_MAX {
            return None;
        }
        let (first, second) = (&mut self.small, &mut self.large);
        let (first, second) = if len < HUGE_MIN { (first, second) } else { (second, first) };
        let start = cut(first, len).or_else(|| cut(second, len))?;
        let piece = Some(u16::try_from(start / PIECE_LEN).expect("an arena of fewer than 2^16 pieces"));
        // SAFETY: `start + len` stays within the arena's one mapping.
        let start = unsafe { self.start.add(start) };
        Some(Memory { start, len, piece })
    }
}

/// Takes `len` bytes of what is left, all in one piece; their place.
fn cut(left: &mut Range<usize>, len: usize) -> Option<usize> {
    let of_piece = PIECE_LEN - left.start % PIECE_LEN;
    let start = if len <= of_piece { left.start } else { left.start + of_piece };
    if start + len > left.end {
        return None;
    }
    left.start = start + len;
    Some(start)
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

/// As [`map`], at an address where huge pages can begin.
fn map_for_huge_pages(len: usize) -> NonNull<u8> {
    let whole = map(len + HUGE_LEN);
    let before = whole.as_ptr().align_offset(HUGE_LEN);
    // SAFETY: `before` is less than a huge page, so both places lie within the mapping that was just made.
    let (start, end) = unsafe { (whole.add(before), whole.add(before + len)) };
    if before > 0 {
        unmap(whole, before);
    }
    unmap(end, HUGE_LEN - before);
    start
}

/// Asks for huge pages. Where the system has none, small ones do.
///
/// # Safety
/// The range is mapped, and only by whoever asks.
unsafe fn prefer_huge_pages(start: NonNull<u8>, len: usize) {
    // SAFETY: as the caller has promised; this advice changes no content.
    let advised = unsafe { rustix::mm::madvise(start.as_ptr().cast(), len, Advice::LinuxHugepage) };
    if let Err(error) = advised {
        tracing::debug!(%error, "no huge pages for large buffers");
    }
}

/// Unmaps (a part of) what [`map`] gave.
fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: the range is (a part of) an earlier mapping and its owner has just been given up.
    let result = unsafe { rustix::mm::munmap(start.as_ptr().cast(), len) };
    debug_assert!(result.is_ok(), "munmap of a buffer failed: {result:?}");
}

impl Buffers {
    /// An empty pool with an arena of `arena_len` bytes (rounded to whole pieces; 0: none).
    pub(super) fn new(arena_len: usize) -> Self {
        let len = arena_len / PIECE_LEN * PIECE_LEN;
        let arena = (len > 0).then(|| Arena::new(len));
        Self {
            slots: Vec::new(),
            vacant: Vec::new(),
            free: std::array::from_fn(|_| Vec::new()),
            free_bytes: 0,
            spare: 0,
            spare_min: 0,
            client_bytes: 0,
            accounts: Vec::new(),
            vacant_accounts: Vec::new(),
            arena,
        }
    }

    /// Number of pieces of the arena.
    pub(super) fn pieces(&self) -> u16 {
        let pieces = self.arena.as_ref().map_or(0, |arena| arena.len / PIECE_LEN);
        u16::try_from(pieces).expect("an arena of fewer than 2^16 pieces")
    }

    /// Start of a piece of the arena, for its registration; it is [`PIECE_LEN`] bytes long.
    pub(super) fn piece(&self, piece: u16) -> *mut u8 {
        assert!(piece < self.pieces(), "piece {piece} of {}", self.pieces());
        let arena = self.arena.as_ref().expect("an arena has pieces");
        // SAFETY: the piece lies within the arena's one mapping, as was just checked.
        unsafe { arena.start.add(usize::from(piece) * PIECE_LEN) }.as_ptr()
    }

    /// A buffer of `len` bytes with one reference, the caller's. At most the largest payload.
    pub(super) fn alloc(&mut self, len: usize) -> BufId {
        let class = class_of(len);
        let memory = match self.free[class].pop() {
            Some(memory) => {
                self.taken(&memory);
                memory
            }
            None => self.fresh(class_len(class)),
        };
        self.occupy(memory, len)
    }

    fn occupy(&mut self, memory: Memory, len: usize) -> BufId {
        let slot = Slot { memory, len, references: 1, charge: 0, account: Account::default() };
        if let Some(index) = self.vacant.pop() {
            self.slots[index as usize] = Some(slot);
            return BufId(index);
        }
        self.slots.push(Some(slot));
        BufId(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 buffers at once"))
    }

    /// A buffer that is kept as long as a connection: outside the arena, in small pages of which only those are
    /// resident that were ever used.
    pub(super) fn alloc_lasting(&mut self, len: usize) -> BufId {
        let len = class_len(class_of(len));
        self.occupy(Memory { start: map(len), len, piece: None }, len)
    }

    fn fresh(&mut self, len: usize) -> Memory {
        if let Some(memory) = self.arena.as_mut().and_then(|arena| arena.take(len)) {
            return memory;
        }
        if len <= ARENA_BUFFER_MAX {
            return Memory { start: map(len), len, piece: None };
        }
        let whole = len.max(HUGE_LEN);
        let start = map_for_huge_pages(whole);
        // SAFETY: the range was just mapped.
        unsafe { prefer_huge_pages(start, whole) };
        // What is left of a huge page is for the next ones.
        for at in (len..whole).step_by(len) {
            // SAFETY: the class's size divides that of a huge page, so the part lies within the mapping.
            let start = unsafe { start.add(at) };
            self.give_back(Memory { start, len, piece: None });
        }
        Memory { start, len, piece: None }
    }

    /// A free buffer came into use.
    fn taken(&mut self, memory: &Memory) {
        self.free_bytes -= memory.len;
        if memory.piece.is_none() {
            self.spare -= memory.len;
            self.spare_min = self.spare_min.min(self.spare);
        }
    }

    /// Gives back to the system what lay free, outside the arena, ever since the last call. So a volume that
    /// rests after a load keeps nothing of it, and one under load keeps what it uses again and again.
    pub(super) fn trim(&mut self) {
        let mut unused = self.spare_min;
        for class in (0..CLASSES).rev() {
            let mut at = self.free[class].len();
            while at > 0 && unused >= class_len(class) {
                at -= 1;
                if self.free[class][at].piece.is_none() {
                    let memory = self.free[class].swap_remove(at);
                    unused -= memory.len;
                    self.taken(&memory);
                    unmap(memory.start, memory.len);
                }
            }
        }
        self.spare_min = self.spare;
    }

    /// Whether there is anything that a later [`Buffers::trim`] may give back.
    pub(super) fn has_spare(&self) -> bool {
        self.spare > 0
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
        if slot.charge > 0 {
            self.unreserve(slot.account, slot.charge);
        }
        self.give_back(slot.memory);
    }

    fn give_back(&mut self, memory: Memory) {
        if memory.piece.is_none() {
            if self.free_bytes + memory.len > FREE_BYTES_MAX {
                unmap(memory.start, memory.len);
                return;
            }
            self.spare += memory.len;
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

    /// Address of `offset` in the buffer, of which `len` bytes follow; and the piece of the arena it lies in.
    pub(super) fn address(&self, id: BufId, offset: usize, len: usize) -> (*mut u8, Option<u16>) {
        let slot = self.slot(id);
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= slot.len),
            "{len} bytes at {offset} of a buffer of {} bytes",
            slot.len
        );
        // SAFETY: `offset` lies within the mapping, as was just checked.
        let start = unsafe { slot.memory.start.as_ptr().add(offset) };
        (start, slot.memory.piece)
    }

    #[expect(clippy::needless_pass_by_ref_mut, reason = "keeps every slice of the target away")]
    /// Copies `len` bytes from `start` of one buffer to `at` of another.
    pub(super) fn copy(&mut self, from: BufId, start: usize, len: usize, to: BufId, at: usize) {
        assert_ne!(from, to, "copies go from one buffer to another");
        let (source, target) = (self.address(from, start, len).0, self.address(to, at, len).0);
        // SAFETY: both ranges were checked, and the memory of two slots in use never overlaps.
        unsafe { std::ptr::copy_nonoverlapping(source.cast_const(), target, len) };
    }

    /// A new account, which holds nothing.
    pub(super) fn open_account(&mut self) -> Account {
        if let Some(index) = self.vacant_accounts.pop() {
            self.accounts[index as usize] = Held::default();
            return Account(index);
        }
        self.accounts.push(Held::default());
        Account(u32::try_from(self.accounts.len() - 1).expect("fewer than 2^32 connections at once"))
    }

    /// Nobody takes anything on this account any more. What it holds still counts until it is given back.
    pub(super) fn close_account(&mut self, account: Account) {
        let held = &mut self.accounts[account.0 as usize];
        held.closed = true;
        if held.bytes == 0 {
            self.vacant_accounts.push(account.0);
        }
    }

    /// Client bytes that an account holds.
    pub(super) fn held(&self, account: Account) -> u64 {
        self.accounts[account.0 as usize].bytes
    }

    /// Takes `bytes` of the client bound; false if that would exceed it (nothing is taken then).
    pub(super) fn reserve(&mut self, account: Account, bytes: u64) -> bool {
        if bytes > self.client_bytes_free() {
            return false;
        }
        self.reserve_beyond(account, bytes);
        true
    }

    /// Takes `bytes` beyond the client bound if need be: for requests that are bounded otherwise.
    pub(super) fn reserve_beyond(&mut self, account: Account, bytes: u64) {
        self.client_bytes += bytes;
        self.accounts[account.0 as usize].bytes += bytes;
    }

    /// Gives `bytes` of the client bound back.
    pub(super) fn unreserve(&mut self, account: Account, bytes: u64) {
        let less = |held: u64| held.checked_sub(bytes).expect("only what was reserved is given back");
        self.client_bytes = less(self.client_bytes);
        let held = &mut self.accounts[account.0 as usize];
        held.bytes = less(held.bytes);
        if held.closed && held.bytes == 0 && bytes > 0 {
            self.vacant_accounts.push(account.0);
        }
    }

    /// Ties reserved bytes to a buffer: they are given back with it. A buffer is charged to one account.
    pub(super) fn charge(&mut self, id: BufId, account: Account, bytes: u64) {
        let slot = self.slot_mut(id);
        assert!(slot.charge == 0 || slot.account == account, "{id:?} is charged to two accounts");
        slot.charge += bytes;
        slot.account = account;
    }

    /// Bytes of the client bound that nobody has.
    pub(super) fn client_bytes_free(&self) -> u64 {
        BUFFER_BYTES_MAX.saturating_sub(self.client_bytes)
    }

    /// Bytes of the client bound in use.
    #[cfg(test)]
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
        for memory in used.chain(free).filter(|m| m.piece.is_none()) {
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
        let (one, other) = (buffers.open_account(), buffers.open_account());
        assert!(buffers.reserve(one, BUFFER_BYTES_MAX));
        assert!(!buffers.reserve(other, 1));
        let a = buffers.alloc(4096);
        buffers.charge(a, one, BUFFER_BYTES_MAX);
        buffers.release(a);
        assert_eq!(buffers.client_bytes(), 0);
        assert!(buffers.reserve(other, 1));
        assert_eq!((buffers.held(one), buffers.held(other)), (0, 1));
    }

    #[test]
    fn an_account_is_used_again_only_when_it_holds_nothing() {
        let mut buffers = Buffers::new(0);
        let one = buffers.open_account();
        assert!(buffers.reserve(one, 10));
        buffers.close_account(one);
        let two = buffers.open_account();
        assert_ne!(one, two, "something of it is still held");
        buffers.unreserve(one, 10);
        assert_eq!((buffers.open_account(), buffers.held(one)), (one, 0));
        buffers.close_account(two);
        assert_eq!(buffers.open_account(), two);
    }

    #[test]
    fn small_buffers_come_from_the_arena_until_it_is_used_up() {
        let mut buffers = Buffers::new(ARENA_BUFFER_MAX);
        let a = buffers.alloc(ARENA_BUFFER_MAX);
        let b = buffers.alloc(4096);
        assert_eq!(buffers.address(a, 0, 1).1, Some(0));
        assert_eq!(buffers.address(b, 0, 1).1, None);
        buffers.release(a);
        let c = buffers.alloc(ARENA_BUFFER_MAX);
        assert_eq!(buffers.address(c, 0, 1).1, Some(0), "arena memory is reused");
    }

    #[test]
    fn a_buffer_lies_in_one_piece_of_the_arena() {
        let mut buffers = Buffers::new(3 * PIECE_LEN + 1);
        assert_eq!(buffers.pieces(), 3);
        let pieces = [4096, PIECE_LEN, 4096, 8192, PIECE_LEN].map(|len| {
            let buf = buffers.alloc(len);
            let (start, piece) = buffers.address(buf, 0, len);
            if let Some(piece) = piece {
                let first = buffers.piece(piece) as usize;
                assert!(start as usize >= first && start as usize + len <= first + PIECE_LEN, "{len}");
            }
            piece
        });
        assert_eq!(pieces, [Some(0), Some(1), Some(2), Some(2), None]);
    }

    #[test]
    fn large_buffers_have_the_huge_pages_and_small_ones_keep_out_of_them() {
        let mut buffers = Buffers::new(SMALL_LEN + 2 * PIECE_LEN);
        let mut piece = |len| {
            let buf = buffers.alloc(len);
            buffers.address(buf, 0, len).1
        };
        let large = u16::try_from(SMALL_LEN / PIECE_LEN).unwrap();
        assert_eq!([4096, HUGE_MIN / 2].map(&mut piece), [Some(0), Some(0)]);
        assert_eq!([HUGE_MIN, PIECE_LEN].map(&mut piece), [Some(large), Some(large + 1)]);
        assert_eq!(piece(PIECE_LEN), Some(1), "small pages are better than none");
        let lasting = buffers.alloc_lasting(PIECE_LEN);
        assert_eq!(buffers.address(lasting, 0, 1).1, None);
    }

    #[test]
    fn a_huge_page_is_shared_and_given_back_in_parts() {
        let mut buffers = Buffers::new(0);
        let len = HUGE_LEN / 4;
        let four: [BufId; 4] = std::array::from_fn(|_| buffers.alloc(len));
        let at = four.map(|buf| buffers.address(buf, 0, len).0 as usize);
        let first = at.into_iter().min().unwrap();
        assert!(first.is_multiple_of(HUGE_LEN) && at.iter().all(|at| *at < first + HUGE_LEN), "{at:x?}");
        assert_eq!(buffers.spare, 0);
        let [kept, other @ ..] = four;
        buffers.bytes_mut(kept).fill(7);
        other.into_iter().for_each(|buf| buffers.release(buf));
        buffers.trim();
        buffers.trim();
        assert!(!buffers.has_spare(), "the parts that are free have gone");
        assert!(buffers.bytes(kept).iter().all(|byte| *byte == 7));
        let whole = buffers.alloc(HUGE_LEN);
        assert!((buffers.address(whole, 0, 1).0 as usize).is_multiple_of(HUGE_LEN));
    }

    #[test]
    fn what_was_of_no_use_between_two_trims_goes_back_to_the_system() {
        let mut buffers = Buffers::new(PIECE_LEN);
        let kept = buffers.alloc(PIECE_LEN);
        let all: Vec<BufId> = (0..8).map(|_| buffers.alloc(1 << 20)).collect();
        all.into_iter().for_each(|buf| buffers.release(buf));
        buffers.release(kept);
        assert_eq!(buffers.spare, 8 << 20);
        // All of it was in use since the start.
        buffers.trim();
        assert_eq!(buffers.spare, 8 << 20);
        let three: Vec<BufId> = (0..3).map(|_| buffers.alloc(1 << 20)).collect();
        three.into_iter().for_each(|buf| buffers.release(buf));
        buffers.trim();
        assert_eq!(buffers.spare, 3 << 20);
        buffers.trim();
        assert!(!buffers.has_spare());
        assert_eq!(buffers.free_bytes, PIECE_LEN, "the arena stays");
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
