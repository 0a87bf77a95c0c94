//! A ring with the memory that its operations use.
//!
//! Invariant: memory that is given to the kernel is never freed: an operation may still be under way when a run ends.
//! The next run that wants as much gets it again.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use io_uring::squeue::Entry;
use io_uring::types::{BufRingEntry, Fd, Fixed};
use io_uring::{IoUring, cqueue, opcode};

/// Provided buffers; a power of two.
const PROVIDED: u16 = 32;
/// Bytes of each.
const PROVIDED_BYTES: usize = 64 << 10;
const GROUP: u16 = 1;
const ENTRIES: u32 = 64;
/// `IORING_ENTER_GETEVENTS` (io_uring_enter(2)).
const GET_EVENTS: u32 = 1;
/// Milliseconds that the kernel's thread looks for submissions before it sleeps.
const SUBMITTER_IDLE: u32 = 1000;

/// A completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) tag: u64,
    /// Bytes.
    pub(super) len: usize,
    /// First of the provided buffers that hold them.
    pub(super) buffer: Option<u16>,
    /// The operation goes on.
    pub(super) more: bool,
    /// The kernel is done with what was sent.
    pub(super) released: bool,
    /// The socket has more.
    pub(super) nonempty: bool,
}

/// Buffers that the kernel chooses from, and the ring by which it is given them: whole pages, aligned.
struct Provided {
    entries: Memory,
    buffers: Memory,
    tail: u16,
}

/// Memory that begins at a page.
pub(super) struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

/// What earlier runs had.
static USED: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

impl Drop for Memory {
    fn drop(&mut self) {
        USED.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.bytes));
    }
}

impl Memory {
    const PAGE: usize = 4096;

    pub(super) fn new(len: usize) -> Self {
        let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
        let same = used.iter().position(|bytes| bytes.len() == len + Self::PAGE);
        // Written, so that no page is made while something is measured.
        let bytes = same.map_or_else(|| vec![1; len + Self::PAGE], |at| used.swap_remove(at));
        let start = bytes.as_ptr().align_offset(Self::PAGE);
        Self { bytes, start, len }
    }

    pub(super) fn whole(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

pub(super) struct Ring {
    ring: IoUring,
    fd: RawFd,
    /// The file is registered, as the first one.
    is_registered: bool,
    provided: Option<Provided>,
    enters: u64,
}

impl Ring {
    /// As the reactor's.
    pub(super) fn new(socket: &impl AsRawFd) -> Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_submit_all().setup_single_issuer().setup_defer_taskrun();
        Self::of(builder.build(ENTRIES), socket)
    }

    /// Without the reactor's flags.
    pub(super) fn plain(file: &impl AsRawFd) -> Result<Self> {
        Self::of(IoUring::new(ENTRIES), file)
    }

    /// With a thread of the kernel that submits.
    pub(super) fn with_submitter(socket: &impl AsRawFd) -> Result<Self> {
        Self::of(IoUring::builder().setup_sqpoll(SUBMITTER_IDLE).build(ENTRIES), socket)
    }

    fn of(ring: std::io::Result<IoUring>, file: &impl AsRawFd) -> Result<Self> {
        let ring = ring.context("set up io_uring")?;
        Ok(Self { ring, fd: file.as_raw_fd(), is_registered: false, provided: None, enters: 0 })
    }

    /// Registers the file that is written to.
    pub(super) fn register_file(&mut self, file: RawFd) -> Result<()> {
        self.ring.submitter().register_files(&[file]).context("register a file")?;
        self.is_registered = true;
        Ok(())
    }

    /// Registers memory that is written from.
    pub(super) fn register_buffer(&mut self, buffer: &mut [u8]) -> Result<()> {
        let whole = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: memory of operations is kept as the head of this file says.
        unsafe { self.ring.submitter().register_buffers(&[whole]) }.context("register a buffer")
    }

    /// Writes to the file; `registered`: from the registered buffer.
    pub(super) fn write(&mut self, from: &[u8], offset: u64, registered: bool, tag: u64) {
        let (len, from) = (u32::try_from(from.len()).expect("blocks are short"), from.as_ptr());
        let entry = match (registered, self.is_registered) {
            (true, true) => opcode::WriteFixed::new(Fixed(0), from, len, 0).offset(offset).build(),
            (true, false) => opcode::WriteFixed::new(Fd(self.fd), from, len, 0).offset(offset).build(),
            (false, _) => opcode::Write::new(Fd(self.fd), from, len).offset(offset).build(),
        };
        self.push(entry, tag);
    }

    pub(super) fn enters(&self) -> u64 {
        self.enters
    }

    fn push(&mut self, entry: Entry, tag: u64) {
        let entry = entry.user_data(tag);
        // SAFETY: memory of operations is kept as the head of this file says.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("there are fewer operations than entries");
    }

    /// Into `into`, all of it if `whole`. `at_once`: without waiting for the socket first.
    pub(super) fn receive(&mut self, into: &mut [u8], whole: bool, at_once: bool, tag: u64) {
        let flags = if whole { libc::MSG_WAITALL } else { 0 };
        let len = u32::try_from(into.len()).expect("messages are short");
        let entry = opcode::Recv::new(Fd(self.fd), into.as_mut_ptr(), len).flags(flags);
        self.push(entry.ioprio(u16::from(!at_once)).build(), tag);
    }

    /// Into provided buffers, until it ends.
    pub(super) fn receive_on(&mut self, bundles: bool, tag: u64) -> Result<()> {
        if self.provided.is_none() {
            self.provide()?;
        }
        let entry = if bundles {
            opcode::RecvMultiBundle::new(Fd(self.fd), GROUP).build()
        } else {
            opcode::RecvMulti::new(Fd(self.fd), GROUP).build()
        };
        self.push(entry, tag);
        Ok(())
    }

    pub(super) fn send(&mut self, from: &[u8], tag: u64) {
        let len = u32::try_from(from.len()).expect("messages are short");
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        self.push(opcode::Send::new(Fd(self.fd), from.as_ptr(), len).flags(flags).build(), tag);
    }

    pub(super) fn send_zero_copy(&mut self, from: &[u8], tag: u64) {
        let len = u32::try_from(from.len()).expect("messages are short");
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        self.push(opcode::SendZc::new(Fd(self.fd), from.as_ptr(), len).flags(flags).build(), tag);
    }

    /// Submits, waits for that many completions, and gives all there are.
    pub(super) fn turn(&mut self, want: usize, done: &mut Vec<Done>) -> Result<()> {
        self.enters += 1;
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(e).context("wait for completions"),
        }
        self.reap(done)
    }

    /// Submits, does not wait, and gives what is there.
    pub(super) fn ask(&mut self, done: &mut Vec<Done>) -> Result<()> {
        self.enters += 1;
        let submitted = u32::try_from(self.ring.submission().len()).expect("the queue is short");
        // What is done is noted in the task's own call only (DEFER_TASKRUN), which has to say that it comes for that.
        // SAFETY: memory of operations is kept as the head of this file says; there is no argument.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(submitted, 0, GET_EVENTS, None) }
            .context("ask for completions")?;
        self.reap(done)
    }

    /// Submits to the kernel's thread, and gives what is there without a call.
    pub(super) fn look(&mut self, done: &mut Vec<Done>) -> Result<()> {
        self.ring.submission().sync();
        self.reap(done)
    }

    fn reap(&mut self, done: &mut Vec<Done>) -> Result<()> {
        done.clear();
        for entry in self.ring.completion() {
            let flags = entry.flags();
            let released = cqueue::notif(flags);
            let len = match (entry.result(), released) {
                (_, true) => 0,
                // No buffer was left: the receive ended, and is begun again.
                (e, _) if e == -libc::ENOBUFS => 0,
                (0, _) => bail!("the peer is gone"),
                (result, _) => usize::try_from(result)
                    .map_err(|_| std::io::Error::from_raw_os_error(-result))
                    .context("an operation failed")?,
            };
            done.push(Done {
                tag: entry.user_data(),
                len,
                buffer: cqueue::buffer_select(flags),
                more: cqueue::more(flags),
                released,
                nonempty: cqueue::sock_nonempty(flags),
            });
        }
        Ok(())
    }

    fn provide(&mut self) -> Result<()> {
        let mut entries = Memory::new(usize::from(PROVIDED) * size_of::<BufRingEntry>());
        entries.whole().fill(0);
        let buffers = Memory::new(usize::from(PROVIDED) * PROVIDED_BYTES);
        let address = entries.whole().as_ptr() as u64;
        // SAFETY: the entries outlive the ring: it is dropped before them.
        unsafe { self.ring.submitter().register_buf_ring_with_flags(address, PROVIDED, GROUP, 0) }
            .context("register a ring of buffers")?;
        let mut provided = Provided { entries, buffers, tail: 0 };
        (0..PROVIDED).for_each(|buffer| provided.give(buffer));
        self.provided = Some(provided);
        Ok(())
    }

    /// Gives what lies in provided buffers to `take`, piece by piece, and the buffers back to the kernel.
    pub(super) fn take(&mut self, done: Done, mut take: impl FnMut(&[u8])) -> Result<()> {
        let Some(mut buffer) = done.buffer else { return Ok(()) };
        let provided = self.provided.as_mut().context("no buffers were provided")?;
        let mut left = done.len;
        while left > 0 {
            ensure!(buffer < PROVIDED, "buffer {buffer} was never provided");
            let len = left.min(PROVIDED_BYTES);
            let start = usize::from(buffer) * PROVIDED_BYTES;
            take(&provided.buffers.whole()[start..start + len]);
            provided.give(buffer);
            // They are used in the order in which they were given, and given back in that order.
            buffer = (buffer + 1) % PROVIDED;
            left -= len;
        }
        Ok(())
    }
}

impl Provided {
    fn give(&mut self, buffer: u16) {
        let address = self.buffers.whole()[usize::from(buffer) * PROVIDED_BYTES..].as_ptr() as u64;
        let base = self.entries.whole().as_mut_ptr().cast::<BufRingEntry>();
        let place = usize::from(self.tail % PROVIDED);
        // SAFETY: the place is one of the entries, page-aligned memory of this ring. Their tail lies in the first one,
        // in a field that this does not write.
        unsafe {
            let entry = &mut *base.add(place);
            entry.set_addr(address);
            entry.set_len(PROVIDED_BYTES as u32);
            entry.set_bid(buffer);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the first entry, aligned; the kernel reads it at any time.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}
