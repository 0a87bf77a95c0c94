//! The ring of a floor process: entries with a tag, one submission and wait per turn.
//!
//! The caller keeps what an entry points at until its completion was reaped; the loop does so because
//! buffers, stages and messages live in vectors of their own that are not touched meanwhile.

use std::io;
use std::os::fd::RawFd;

use anyhow::{Context, Result};
use io_uring::squeue::Entry;
use io_uring::{IoUring, cqueue, opcode, types};

use super::arena::Arena;

/// Submission entries.
const ENTRIES: u32 = 2048;
/// Descriptors that are registered: the data file and connections.
const FILES: u32 = 300;
/// Do not try before the socket is readable (`IORING_RECVSEND_POLL_FIRST`).
const POLL_FIRST: u16 = 1;

/// What a completion belongs to, in `user_data`: a kind, and a number whose meaning the kind decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Wake,
    Receive(u32),
    Send(u32),
    Disk(u32),
    Flush,
}

impl Tag {
    fn encode(self) -> u64 {
        let (kind, number) = match self {
            Self::Wake => (0, 0),
            Self::Receive(link) => (1, link),
            Self::Send(link) => (2, link),
            Self::Disk(op) => (3, op),
            Self::Flush => (4, 0),
        };
        kind << 32 | u64::from(number)
    }

    fn decode(data: u64) -> Self {
        let number = data as u32;
        match data >> 32 {
            0 => Self::Wake,
            1 => Self::Receive(number),
            2 => Self::Send(number),
            3 => Self::Disk(number),
            4 => Self::Flush,
            kind => panic!("a completion of kind {kind}, which was never submitted"),
        }
    }
}

/// A reaped completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reaped {
    pub(super) tag: Tag,
    pub(super) result: i32,
    /// The socket holds more.
    pub(super) more: bool,
}

pub(super) struct Uring {
    ring: IoUring,
    registered: bool,
}

impl Uring {
    pub(super) fn new(arena: &Arena) -> Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_cqsize(4 * ENTRIES);
        let ring: IoUring = builder.build(ENTRIES).context("set up io_uring; the floor needs Linux 6.1")?;
        ring.submitter().register_files_sparse(FILES).context("register descriptors")?;
        let (base, len) = arena.whole();
        let whole = libc::iovec { iov_base: base.cast(), iov_len: len };
        // SAFETY: the arena is never freed.
        let registered = unsafe { ring.submitter().register_buffers(&[whole]) }.is_ok();
        if !registered {
            eprintln!(
                "floor: buffers are not registered (limit of locked memory); it is slower than it could be"
            );
        }
        Ok(Self { ring, registered })
    }

    /// Gives a descriptor its place among the registered ones.
    pub(super) fn register(&self, place: u32, fd: RawFd) -> Result<()> {
        self.ring.submitter().register_files_update(place, &[fd]).context("register a descriptor")?;
        Ok(())
    }

    /// Submits everything, waits for `want` completions and gives all there are to `take`.
    pub(super) fn turn(&mut self, want: usize, reaped: &mut Vec<Reaped>) -> Result<()> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(e) => return Err(e).context("wait for completions"),
        }
        reaped.clear();
        for entry in self.ring.completion() {
            reaped.push(Reaped {
                tag: Tag::decode(entry.user_data()),
                result: entry.result(),
                more: cqueue::sock_nonempty(entry.flags()),
            });
        }
        Ok(())
    }

    fn push(&mut self, entry: Entry, tag: Tag) {
        let entry = entry.user_data(tag.encode());
        // SAFETY: what the entry points at is kept by the caller, see the head of this file.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            if let Err(e) = self.ring.submit() {
                assert!(e.kind() == io::ErrorKind::Interrupted, "io_uring takes nothing more: {e}");
            }
        }
    }

    pub(super) fn wake(&mut self, fd: RawFd, word: *mut u64) {
        self.push(opcode::Read::new(types::Fd(fd), word.cast(), 8).build(), Tag::Wake);
    }

    pub(super) fn receive(
        &mut self,
        file: u32,
        link: u32,
        address: *mut u8,
        len: usize,
        whole: bool,
        at_once: bool,
    ) {
        let flags = if whole { libc::MSG_WAITALL } else { 0 };
        let ioprio = if at_once { 0 } else { POLL_FIRST };
        let entry = opcode::Recv::new(types::Fixed(file), address, len_of(len)).flags(flags).ioprio(ioprio);
        self.push(entry.build(), Tag::Receive(link));
    }

    pub(super) fn send(&mut self, file: u32, link: u32, message: *const libc::msghdr) {
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fixed(file), message).flags(flags);
        self.push(entry.build(), Tag::Send(link));
    }

    pub(super) fn write(&mut self, op: u32, file: u32, address: *const u8, len: u32, offset: u64, fua: bool) {
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        let file = types::Fixed(file);
        let entry = if self.registered {
            opcode::WriteFixed::new(file, address, len, 0).offset(offset).rw_flags(flags).build()
        } else {
            opcode::Write::new(file, address, len).offset(offset).rw_flags(flags).build()
        };
        self.push(entry, Tag::Disk(op));
    }

    pub(super) fn read(&mut self, op: u32, file: u32, address: *mut u8, len: u32, offset: u64) {
        let file = types::Fixed(file);
        let entry = if self.registered {
            opcode::ReadFixed::new(file, address, len, 0).offset(offset).build()
        } else {
            opcode::Read::new(file, address, len).offset(offset).build()
        };
        self.push(entry, Tag::Disk(op));
    }

    pub(super) fn flush(&mut self, file: u32) {
        let entry = opcode::Fsync::new(types::Fixed(file)).flags(types::FsyncFlags::DATASYNC);
        self.push(entry.build(), Tag::Flush);
    }
}

fn len_of(len: usize) -> u32 {
    u32::try_from(len).expect("no request is longer than 4 MiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_survive_user_data() {
        for tag in [Tag::Wake, Tag::Receive(7), Tag::Send(u32::MAX), Tag::Disk(0), Tag::Flush] {
            assert_eq!(Tag::decode(tag.encode()), tag);
        }
    }
}
