//! The io_uring ring and every operation that goes through it.
//!
//! All `unsafe` that hands memory to the kernel is here. The rule that makes it sound: whatever an
//! operation points at is *held* by its slot - a buffer by a reference, a message or word by ownership, a
//! file by a counted descriptor - from the push until its completion is reaped. Nothing is ever
//! cancelled; an operation on a socket ends because the socket is shut down. If an [`Io`] is dropped
//! while operations are in the kernel, ring and memory are leaked rather than freed.
//!
//! Invariants: every pushed operation completes exactly once; `user_data` is the slot's index, and a
//! slot is reused only after its completion was reaped. Timers have no slot: they point at nothing once the
//! kernel has taken them, and end with the ring.
//!
//! Never does: deciding anything. It knows no blocks, clients or peers.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, cqueue, opcode, types};

use crate::replica::{ConnId, DiskOpId};
use crate::types::Nanos;
use crate::wire::{BufId, SessionId};

use super::alarm::{Alarm, Plan};
use super::buffers::{Buffers, PIECE_LEN};
use super::error::ReactorError;
use super::handle::boottime_now;
use super::outgoing::Message;

/// Submission entries of a ring unless the options say otherwise.
pub(super) const RING_ENTRIES: u32 = 256;
/// Completion entries per submission entry.
const COMPLETIONS_PER_ENTRY: u32 = 16;
/// `IORING_RECVSEND_POLL_FIRST`: do not try before the socket is readable.
const POLL_FIRST: u16 = 1;
/// `user_data` of timers; no slot has such an index.
const TIMER: u64 = u64::MAX;

/// Whose operation completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// Another thread has put something into the mailbox.
    Wake,
    /// Part of a disk operation.
    Disk(DiskOpId),
    /// Bytes from a client.
    ClientReceive(ConnId),
    /// Bytes to a client.
    ClientSend(ConnId),
    /// A client has shut down its side [R24].
    ClientGone(ConnId),
    /// Bytes from a peer.
    PeerReceive(SessionId),
    /// Bytes to a peer.
    PeerSend(SessionId),
}

/// Memory that an operation in the kernel points at.
pub(super) enum Hold {
    /// None.
    Nothing,
    /// One reference to a buffer.
    Buffer(BufId),
    /// A message and the references of its parts.
    Message(Box<Message>),
    /// The counter read from an event descriptor.
    Word(#[expect(dead_code, reason = "owned so that the kernel can write to it")] Box<u64>),
}

/// A reaped completion. Who gets it owns what it holds.
pub(super) struct Completion {
    /// Whose.
    pub(super) token: Token,
    /// As the system call would have returned it: a count, or a negated error number.
    pub(super) result: i32,
    /// What the operation held.
    pub(super) hold: Hold,
    /// Of a receive: the socket holds more. Kernels before 5.19 do not say so.
    pub(super) more: bool,
}

struct Operation {
    token: Token,
    hold: Hold,
    /// Keeps the descriptor open and its number ours.
    _file: Rc<OwnedFd>,
}

/// Where in a buffer, and how much.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// The buffer.
    pub(super) buf: BufId,
    /// First byte in it.
    pub(super) start: usize,
    /// Bytes.
    pub(super) len: usize,
}

/// A ring with the operations in it.
pub(super) struct Ring {
    uring: IoUring,
    operations: Vec<Option<Operation>>,
    vacant: Vec<u32>,
    /// Entries that did not fit into the submission queue yet.
    backlog: VecDeque<Entry>,
    in_kernel: usize,
    /// The kernel knows `IORING_RECVSEND_POLL_FIRST`, and tells whether a socket holds more.
    poll_first: bool,
    alarm: Alarm,
    /// When the timers end, for the kernel, which reads it as it takes an entry.
    alarm_time: Box<types::Timespec>,
}

/// A ring and the buffers that its operations use.
pub(super) struct Io {
    ring: ManuallyDrop<Ring>,
    /// The buffers.
    pub(super) buffers: ManuallyDrop<Buffers>,
    /// Which pieces of the arena are registered.
    registered: Vec<bool>,
    /// No more of them can be.
    refused: bool,
}

/// Sets up a ring, with the flags for a single thread where the kernel knows them.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY));
    let mut single = builder.clone();
    single.setup_submit_all().setup_single_issuer().setup_defer_taskrun();
    match single.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(entries),
        other => other,
    }
}

fn setup_error(error: io::Error) -> ReactorError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => ReactorError::Forbidden(error),
        Some(libc::ENOSYS) => ReactorError::Unsupported("it has no io_uring".into()),
        Some(libc::ENOMEM) => ReactorError::Memory(error),
        _ => ReactorError::Io { action: "setting up an io_uring ring", source: error },
    }
}

/// What this kernel's io_uring can do.
fn probe_operations(ring: &IoUring) -> Result<Probe, ReactorError> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|source| ReactorError::Io { action: "asking io_uring what it can do", source })?;
    Ok(probe)
}

/// Names of the operations that a volume needs and this kernel lacks.
fn missing_operations(probe: &Probe) -> Vec<&'static str> {
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("WRITE_FIXED", opcode::WriteFixed::CODE),
        ("FSYNC", opcode::Fsync::CODE),
        ("FALLOCATE", opcode::Fallocate::CODE),
        ("RECV", opcode::Recv::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("POLL_ADD", opcode::PollAdd::CODE),
        ("TIMEOUT", opcode::Timeout::CODE),
    ];
    needed.iter().filter(|(_, code)| !probe.is_supported(*code)).map(|(name, _)| *name).collect()
}

/// Checks that this process may use io_uring and that the kernel has what a volume needs.
///
/// # Errors
/// What is in the way, and how to allow it.
pub fn probe() -> Result<(), ReactorError> {
    Ring::new(8).map(drop)
}

impl Ring {
    /// A ring. The thread that makes it must be the one that uses it.
    fn new(entries: u32) -> Result<Self, ReactorError> {
        let uring = build(entries).map_err(setup_error)?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(ReactorError::Unsupported("its io_uring cannot wait with a time-out".into()));
        }
        let probe = probe_operations(&uring)?;
        let missing = missing_operations(&probe);
        if !missing.is_empty() {
            return Err(ReactorError::Unsupported(format!("its io_uring lacks {}", missing.join(", "))));
        }
        Ok(Self {
            uring,
            operations: Vec::new(),
            vacant: Vec::new(),
            backlog: VecDeque::new(),
            in_kernel: 0,
            // Of 5.19; SEND_ZC came with 6.0 and can be asked for.
            poll_first: probe.is_supported(opcode::SendZc::CODE),
            alarm: Alarm::new(),
            alarm_time: Box::default(),
        })
    }

    /// Queues an entry; it goes to the kernel with the next submit. `hold` and `file` must own everything
    /// that the entry points at.
    fn push(&mut self, entry: Entry, token: Token, hold: Hold, file: &Rc<OwnedFd>) {
        let operation = Some(Operation { token, hold, _file: Rc::clone(file) });
        let index = match self.vacant.pop() {
            Some(index) => {
                self.operations[index as usize] = operation;
                index
            }
            None => {
                self.operations.push(operation);
                u32::try_from(self.operations.len() - 1).expect("fewer than 2^32 operations at once")
            }
        };
        self.in_kernel += 1;
        self.backlog.push_back(entry.user_data(u64::from(index)));
        self.fill();
    }

    /// Has a wait for `want` completions end at `deadline`: by timers, or by the time-out that this returns.
    fn limit(&mut self, want: usize, deadline: Nanos) -> Option<Duration> {
        match self.alarm.plan(want, deadline) {
            Plan::Timeout => Some(deadline.since(boottime_now())),
            Plan::Timers(more) => {
                self.set_timers(more);
                None
            }
        }
    }

    fn set_timers(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let at = self.alarm.at().0;
        let nanos =
            u32::try_from(at % 1_000_000_000).expect("less than a second of nanoseconds fits 32 bits");
        // Entries that still wait in the backlog have this very time.
        *self.alarm_time = types::Timespec::new().sec(at / 1_000_000_000).nsec(nanos);
        for _ in 0..count {
            let entry = opcode::Timeout::new(&raw const *self.alarm_time)
                .flags(types::TimeoutFlags::ABS | types::TimeoutFlags::BOOTTIME);
            self.backlog.push_back(entry.build().user_data(TIMER));
        }
    }

    /// Moves entries into the submission queue as far as it has room.
    fn fill(&mut self) {
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: everything that the entry points at is owned by its operation in `operations`, which
            // is kept until the completion is reaped, and leaked if the ring is dropped before that. A timer's
            // entry points at `alarm_time`, which lives as long as the ring.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits everything and waits until `want` operations completed or the time is over (`None`: no limit).
    fn submit_and_wait(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        self.fill();
        while !self.backlog.is_empty() {
            match self.uring.submit() {
                Ok(_) => self.fill(),
                // The kernel wants completions reaped first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
        let waited = match timeout {
            None => self.uring.submit_and_wait(want),
            Some(limit) => {
                let time = types::Timespec::new().sec(limit.as_secs()).nsec(limit.subsec_nanos());
                let args = types::SubmitArgs::new().timespec(&time);
                self.uring.submitter().submit_with_args(want, &args)
            }
        };
        match waited {
            Ok(_) => Ok(()),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Takes the completions that are there and appends them to `out`.
    fn reap(&mut self, out: &mut Vec<Completion>) {
        for entry in self.uring.completion() {
            if entry.user_data() == TIMER {
                self.alarm.ended(entry.result());
                continue;
            }
            let index = usize::try_from(entry.user_data()).expect("user data is a slot index");
            let operation = self.operations[index].take().expect("an operation completes only once");
            self.vacant.push(u32::try_from(index).expect("slot indices fit 32 bits"));
            self.in_kernel -= 1;
            out.push(Completion {
                token: operation.token,
                result: entry.result(),
                hold: operation.hold,
                more: cqueue::sock_nonempty(entry.flags()),
            });
        }
    }
}

impl Io {
    /// A ring and a pool; up to `arena_len` bytes of the pool are registered, piece by piece as they come into
    /// use, if the system allows that.
    pub(super) fn new(entries: u32, arena_len: usize) -> Result<Self, ReactorError> {
        let ring = Ring::new(entries)?;
        let buffers = Buffers::new(arena_len);
        let pieces = buffers.pieces();
        let mut refused = false;
        if pieces > 0
            && let Err(error) = ring.uring.submitter().register_buffers_sparse(u32::from(pieces))
        {
            // Linux before 5.19 knows no table of buffers that are named later.
            tracing::warn!(%error, "buffers are not registered with io_uring (a little slower)");
            refused = true;
        }
        let registered = vec![false; usize::from(pieces)];
        let (ring, buffers) = (ManuallyDrop::new(ring), ManuallyDrop::new(buffers));
        Ok(Self { ring, buffers, registered, refused })
    }

    /// The index under which the kernel knows a piece of the arena, which it gets with its first use.
    fn index_of(&mut self, piece: Option<u16>) -> Option<u16> {
        let piece = piece?;
        let known = self.registered[usize::from(piece)] || (!self.refused && self.register(piece));
        known.then_some(piece)
    }

    /// Names a piece to the kernel. What is refused once is not asked for again.
    #[cold]
    fn register(&mut self, piece: u16) -> bool {
        let region = libc::iovec { iov_base: self.buffers.piece(piece).cast(), iov_len: PIECE_LEN };
        // SAFETY: the arena stays mapped until `buffers` is dropped, which is after the ring.
        let done =
            unsafe { self.ring.uring.submitter().register_buffers_update(u32::from(piece), &[region], None) };
        match done {
            Ok(()) => self.registered[usize::from(piece)] = true,
            Err(error) => {
                self.refused = true;
                tracing::warn!(
                    %error, bytes = self.registered.iter().filter(|known| **known).count() * PIECE_LEN,
                    "no more buffers are registered with io_uring (a little slower): raise RLIMIT_MEMLOCK \
                     (`ulimit -l`, or LimitMEMLOCK= in the systemd unit) to change that"
                );
            }
        }
        !self.refused
    }

    /// Operations that have not completed.
    pub(super) fn in_kernel(&self) -> usize {
        self.ring.in_kernel
    }

    /// Submits what was pushed, waits for a completion or the time-out, appends what completed to `out`.
    pub(super) fn turn(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) -> io::Result<()> {
        self.ring.submit_and_wait(1, timeout)?;
        self.ring.reap(out);
        Ok(())
    }

    /// As [`Self::turn`], but it ends at a time, and `quiet` completions do not end the wait: those of sends
    /// that the kernel carries out as it takes them, and that lead to nothing.
    pub(super) fn turn_beyond(
        &mut self,
        quiet: usize,
        deadline: Option<Nanos>,
        out: &mut Vec<Completion>,
    ) -> io::Result<()> {
        let want = 1 + quiet;
        let timeout = deadline.and_then(|at| self.ring.limit(want, at));
        self.ring.submit_and_wait(want, timeout)?;
        self.ring.reap(out);
        Ok(())
    }

    /// Reads from `file` at byte `at` into a span.
    pub(super) fn read(&mut self, file: &Rc<OwnedFd>, span: Span, at: u64, token: Token) {
        let (start, piece) = self.buffers.address(span.buf, span.start, span.len);
        let (fd, len) = (types::Fd(file.as_raw_fd()), span_len(span));
        let entry = if let Some(index) = self.index_of(piece) {
            opcode::ReadFixed::new(fd, start, len, index).offset(at).build()
        } else {
            opcode::Read::new(fd, start, len).offset(at).build()
        };
        self.push_held(entry, token, span.buf, file);
    }

    /// Writes a span to `file` at byte `at`; `durable`: on stable storage before it completes.
    pub(super) fn write(&mut self, file: &Rc<OwnedFd>, span: Span, at: u64, durable: bool, token: Token) {
        let (start, piece) = self.buffers.address(span.buf, span.start, span.len);
        let (fd, len) = (types::Fd(file.as_raw_fd()), span_len(span));
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let start = start.cast_const();
        let entry = if let Some(index) = self.index_of(piece) {
            opcode::WriteFixed::new(fd, start, len, index).offset(at).rw_flags(flags).build()
        } else {
            opcode::Write::new(fd, start, len).offset(at).rw_flags(flags).build()
        };
        self.push_held(entry, token, span.buf, file);
    }

    /// Flushes the data of `file` (and what is needed to find it again).
    pub(super) fn flush(&mut self, file: &Rc<OwnedFd>, token: Token) {
        let entry =
            opcode::Fsync::new(types::Fd(file.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
        self.ring.push(entry, token, Hold::Nothing, file);
    }

    /// Makes `len` bytes at `at` read as zeroes and gives up their space.
    pub(super) fn punch(&mut self, file: &Rc<OwnedFd>, at: u64, len: u64, token: Token) {
        let entry = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), len)
            .offset(at)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build();
        self.ring.push(entry, token, Hold::Nothing, file);
    }

    /// Receives into a span, as much as there is. `empty`: the socket is thought to hold nothing yet.
    pub(super) fn receive(&mut self, socket: &Rc<OwnedFd>, span: Span, empty: bool, token: Token) {
        let (start, _) = self.buffers.address(span.buf, span.start, span.len);
        let ioprio = if empty && self.ring.poll_first { POLL_FIRST } else { 0 };
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), start, span_len(span)).ioprio(ioprio);
        self.push_held(entry.build(), token, span.buf, socket);
    }

    /// Sends what is left of a message; it comes back with the completion.
    pub(super) fn send(&mut self, socket: &Rc<OwnedFd>, mut message: Box<Message>, token: Token) {
        let header = message.prepare(&self.buffers);
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fd(socket.as_raw_fd()), header).flags(flags).build();
        self.ring.push(entry, token, Hold::Message(message), socket);
    }

    /// Completes when the other side of a socket has shut down, or the socket fails [R24].
    pub(super) fn watch_shutdown(&mut self, socket: &Rc<OwnedFd>, token: Token) {
        let entry =
            opcode::PollAdd::new(types::Fd(socket.as_raw_fd()), u32::from(libc::POLLRDHUP as u16)).build();
        self.ring.push(entry, token, Hold::Nothing, socket);
    }

    /// Completes when the event descriptor was written to, and clears it.
    pub(super) fn await_event(&mut self, event: &Rc<OwnedFd>, token: Token) {
        let mut word = Box::new(0_u64);
        let target = (&raw mut *word).cast::<u8>();
        let entry = opcode::Read::new(types::Fd(event.as_raw_fd()), target, 8).build();
        self.ring.push(entry, token, Hold::Word(word), event);
    }

    fn push_held(&mut self, entry: Entry, token: Token, buf: BufId, file: &Rc<OwnedFd>) {
        self.buffers.retain(buf);
        self.ring.push(entry, token, Hold::Buffer(buf), file);
    }
}

fn span_len(span: Span) -> u32 {
    u32::try_from(span.len).expect("a buffer is at most one payload long")
}

impl Drop for Io {
    fn drop(&mut self) {
        if self.ring.in_kernel > 0 {
            // The kernel may still write to the buffers: they, and the ring that ends with its last
            // operation, stay for the rest of the process.
            tracing::error!(
                operations = self.ring.in_kernel,
                "a volume stops with operations that the kernel has not completed; their memory is kept"
            );
            return;
        }
        // SAFETY: neither is used again; the ring goes first, as the arena is registered with it.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.buffers);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::super::outgoing::Outgoing;
    use super::*;

    fn turn(io: &mut Io, limit: Duration) -> Vec<Completion> {
        let mut out = Vec::new();
        io.turn(Some(limit), &mut out).unwrap();
        out
    }

    #[test]
    fn a_hung_operation_keeps_its_buffer_until_the_kernel_is_done() {
        let mut io = Io::new(8, 0).unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let here = Rc::new(OwnedFd::from(here));
        let buf = io.buffers.alloc(4096);
        let (start, _) = io.buffers.address(buf, 0, 1);
        io.receive(&here, Span { buf, start: 0, len: 4096 }, false, Token::Wake);
        io.buffers.release(buf);
        assert!(turn(&mut io, Duration::from_millis(20)).is_empty());
        let other = io.buffers.alloc(4096);
        assert_ne!(io.buffers.address(other, 0, 1).0, start);
        there.write_all(b"late").unwrap();
        let done = turn(&mut io, Duration::from_secs(5));
        assert_eq!((done.len(), done[0].result), (1, 4));
        let Hold::Buffer(held) = done[0].hold else { panic!("the completion returns the buffer") };
        assert_eq!(&io.buffers.bytes(held)[..4], b"late");
        io.buffers.release(held);
        assert_eq!(io.buffers.in_use(), 1);
    }

    #[test]
    fn more_operations_than_entries_all_complete() {
        let mut io = Io::new(2, 0).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let here = Rc::new(OwnedFd::from(here));
        for _ in 0..100 {
            io.watch_shutdown(&here, Token::Wake);
        }
        drop(there);
        let mut done = Vec::new();
        while done.len() < 100 {
            io.turn(Some(Duration::from_secs(5)), &mut done).unwrap();
        }
        assert_eq!(io.in_kernel(), 0);
    }

    #[test]
    fn a_wait_goes_beyond_sends_that_complete_at_once() {
        let mut io = Io::new(8, 0).unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let here = Rc::new(OwnedFd::from(here));
        let buf = io.buffers.alloc(4096);
        let mut queue = Outgoing::new();
        queue.push_head(|out| out.extend_from_slice(b"out"));
        let message = queue.take().unwrap();
        assert!(message.leaves_at_once());
        io.receive(&here, Span { buf, start: 0, len: 4096 }, true, Token::ClientReceive(ConnId(1)));
        io.send(&here, message, Token::ClientSend(ConnId(1)));
        let answer = std::thread::spawn(move || {
            let mut bytes = [0; 3];
            there.read_exact(&mut bytes).unwrap();
            there.write_all(&bytes).unwrap();
        });
        let mut done = Vec::new();
        io.turn_beyond(1, Some(within(Duration::from_secs(60))), &mut done).unwrap();
        answer.join().unwrap();
        assert_eq!(
            done.iter().map(|d| d.result).collect::<Vec<_>>(),
            [3, 3],
            "the send and the answer to it"
        );
        // Its time ends it all the same, here by a time-out: the timers are those of the first wait.
        queue.on_sent(message_of(&mut done), 3, &mut io.buffers);
        queue.push_head(|out| out.extend_from_slice(b"out"));
        io.send(&here, queue.take().unwrap(), Token::ClientSend(ConnId(1)));
        done.clear();
        io.turn_beyond(1, Some(within(Duration::from_millis(20))), &mut done).unwrap();
        assert_eq!(done.len(), 1);
    }

    fn within(limit: Duration) -> Nanos {
        boottime_now().after(limit)
    }

    #[test]
    fn timers_end_a_wait_for_several_and_are_set_again() {
        let mut io = Io::new(8, 0).unwrap();
        let mut done = Vec::new();
        for want in [3, 1, 4, 9] {
            let deadline = within(Duration::from_millis(20));
            // The timers of one wait may end one by one; none of them is left before the next.
            while boottime_now() < deadline || !io.ring.alarm.is_idle() {
                io.turn_beyond(want - 1, Some(deadline), &mut done).unwrap();
            }
            assert!(done.is_empty(), "a timer is nobody's completion");
        }
        assert_eq!(io.in_kernel(), 0);
    }

    #[test]
    fn a_ring_with_timers_in_it_is_given_up() {
        let mut io = Io::new(8, 0).unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        let here = Rc::new(OwnedFd::from(here));
        io.watch_shutdown(&here, Token::Wake);
        there.shutdown(std::net::Shutdown::Both).unwrap();
        let mut done = Vec::new();
        io.turn_beyond(0, Some(within(Duration::from_secs(3600))), &mut done).unwrap();
        assert_eq!((done.len(), io.in_kernel()), (1, 0), "a timer keeps nobody from stopping");
        drop(io);
        assert_eq!(there.read(&mut [0; 1]).unwrap(), 0);
    }

    fn message_of(done: &mut Vec<Completion>) -> Box<Message> {
        let mut holds = done.drain(..).map(|d| d.hold);
        holds.find_map(|h| if let Hold::Message(m) = h { Some(m) } else { None }).expect("a message was sent")
    }

    /// Without the right to lock more than the limit, buffers are used unregistered.
    #[test]
    fn a_low_limit_on_locked_memory_only_costs_the_registration() {
        fn give_up_ipc_lock() {
            const VERSION_3: u32 = 0x2008_0522;
            const CAP_IPC_LOCK: u32 = 14;
            let mut head = [VERSION_3, 0];
            let mut sets = [0_u32; 6];
            // SAFETY: plain capget and capset of this thread, with structures of the version's size.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_capget, head.as_mut_ptr(), sets.as_mut_ptr()), 0);
                sets[0] &= !(1 << CAP_IPC_LOCK);
                assert_eq!(libc::syscall(libc::SYS_capset, head.as_mut_ptr(), sets.as_ptr()), 0);
            }
        }
        let works = std::thread::spawn(|| {
            give_up_ipc_lock();
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            let len = 64 << 20;
            let mut io = Io::new(8, len).unwrap();
            let zero = Rc::new(OwnedFd::from(std::fs::File::open("/dev/zero").unwrap()));
            for _ in 0..len / PIECE_LEN {
                let buf = io.buffers.alloc(PIECE_LEN);
                io.read(&zero, Span { buf, start: 0, len: 4096 }, 0, Token::Wake);
                assert_eq!(turn(&mut io, Duration::from_secs(5))[0].result, 4096);
            }
            let registered = io.registered.iter().filter(|known| **known).count() * PIECE_LEN;
            if limit.is_some_and(|limit| limit < len as u64) {
                assert!(registered as u64 <= limit.unwrap(), "more was registered than the limit allows");
            } else {
                eprintln!("partly skipped: the limit on locked memory is {limit:?}, higher than tested");
            }
        });
        works.join().unwrap();
    }

    #[test]
    fn only_what_is_used_is_registered() {
        let mut io = Io::new(8, 4 * PIECE_LEN).unwrap();
        let zero = Rc::new(OwnedFd::from(std::fs::File::open("/dev/zero").unwrap()));
        assert_eq!(io.registered, [false; 4]);
        for _ in 0..2 {
            let buf = io.buffers.alloc(4096);
            io.read(&zero, Span { buf, start: 0, len: 4096 }, 0, Token::Wake);
            assert_eq!(turn(&mut io, Duration::from_secs(5))[0].result, 4096);
        }
        assert_eq!(io.registered, [true, false, false, false]);
    }

    /// The kernel's refusal, produced for this thread alone by a seccomp filter.
    #[test]
    fn a_kernel_that_forbids_io_uring_is_reported_with_what_to_do() {
        fn forbid_io_uring_setup() {
            let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
            let is_setup = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 };
            let refuse = libc::sock_filter {
                code: 0x06,
                jt: 0,
                jf: 0,
                k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            };
            let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
            let mut filter = [load_number, is_setup, refuse, allow];
            let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
            // SAFETY: plain prctl calls for this thread; `program` outlives the call that reads it.
            unsafe {
                assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
                let mode = libc::SECCOMP_MODE_FILTER;
                assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
            }
        }
        let refused = std::thread::spawn(|| {
            forbid_io_uring_setup();
            probe().unwrap_err()
        });
        let error = refused.join().unwrap();
        assert!(matches!(error, ReactorError::Forbidden(_)), "{error}");
        assert!(error.to_string().contains("kernel.io_uring_disabled=0"));
        assert!(error.to_string().contains("seccomp"));
    }
}
