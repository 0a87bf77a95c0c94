//! What waits to be sent on one socket, and the message that the kernel is sending of it.
//!
//! Headers are appended to one byte vector, block content is named by its buffer; one `sendmsg` carries
//! as much of both as the kernel takes. While a message is in the kernel it belongs to the ring (its
//! memory must stay where it is); what is pushed meanwhile gathers in the next one. Each buffer that is
//! named holds one reference from the push until its bytes are sent or the socket is given up.
//!
//! Never does: system calls, or reordering. Bounded by who pushes: the core bounds what it puts on a
//! session, the requests in flight bound what is answered on a connection.

use crate::wire::BufId;

use super::buffers::Buffers;

/// Most parts handed to the kernel by one call (the system's own bound is 1024).
const PARTS_MAX: usize = 256;
/// Most bytes handed to the kernel by one call, which ends only when all of them are in the socket: what was sent is
/// given back, and counts as progress, as it goes.
const SEND_LEN_MAX: usize = 2 << 20;
/// A message of at most so many bytes is expected to find room in its socket, and so to be sent at once.
const AT_ONCE_MAX: usize = 64 << 10;

/// One stretch of bytes to send.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// `head[start .. start + len]`.
    Head { start: usize, len: usize },
    /// `len` bytes at `start` of a buffer.
    Buffer { buf: BufId, start: usize, len: usize },
}

impl Part {
    fn len(&self) -> usize {
        match *self {
            Self::Head { len, .. } | Self::Buffer { len, .. } => len,
        }
    }
}

/// A message: parts in order, the first `next` of them sent, and `skip` bytes of the one after.
pub(super) struct Message {
    head: Vec<u8>,
    parts: Vec<Part>,
    next: usize,
    skip: usize,
    /// Answers to requests that it holds; counted for the connection's bound.
    answers: u32,
    iovecs: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Message {
    fn new() -> Box<Self> {
        Box::new(Self {
            head: Vec::new(),
            parts: Vec::new(),
            next: 0,
            skip: 0,
            answers: 0,
            iovecs: Vec::new(),
            header: empty_header(),
        })
    }

    fn clear(&mut self) {
        self.head.clear();
        self.parts.clear();
        self.iovecs.clear();
        self.next = 0;
        self.skip = 0;
        self.answers = 0;
    }

    /// Points the system's header at the bytes not yet sent and returns its address, valid until the
    /// message is changed or dropped.
    pub(super) fn prepare(&mut self, buffers: &Buffers) -> *const libc::msghdr {
        self.iovecs.clear();
        let (mut skip, mut room) = (self.skip, SEND_LEN_MAX);
        for part in self.parts[self.next..].iter().take(PARTS_MAX) {
            let start: *const u8 = match *part {
                Part::Head { start, len } => self.head[start..start + len].as_ptr(),
                Part::Buffer { buf, start, len } => buffers.address(buf, start, len).0,
            };
            let base = start.wrapping_add(skip).cast_mut().cast();
            let len = (part.len() - skip).min(room);
            self.iovecs.push(libc::iovec { iov_base: base, iov_len: len });
            room -= len;
            if room == 0 {
                break;
            }
            skip = 0;
        }
        self.header = empty_header();
        self.header.msg_iov = self.iovecs.as_mut_ptr();
        self.header.msg_iovlen = self.iovecs.len();
        &raw const self.header
    }

    /// It is expected to leave as soon as the kernel takes it.
    pub(super) fn leaves_at_once(&self) -> bool {
        self.parts.iter().map(Part::len).sum::<usize>() <= AT_ONCE_MAX
    }

    /// Notes that `sent` more bytes are out; buffers sent whole are released. True if nothing is left.
    fn advance(&mut self, mut sent: usize, buffers: &mut Buffers) -> bool {
        while let Some(part) = self.parts.get(self.next) {
            let left = part.len() - self.skip;
            if sent < left {
                self.skip += sent;
                return false;
            }
            sent -= left;
            if let Part::Buffer { buf, .. } = *part {
                buffers.release(buf);
            }
            self.next += 1;
            self.skip = 0;
        }
        assert_eq!(sent, 0, "the kernel sent more than it was given");
        true
    }

    /// Releases every buffer that is still named: the rest will not be sent.
    pub(super) fn abandon(&mut self, buffers: &mut Buffers) {
        for part in &self.parts[self.next..] {
            if let Part::Buffer { buf, .. } = *part {
                buffers.release(buf);
            }
        }
        self.clear();
    }
}

fn empty_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: std::ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// The queue of one socket.
pub(super) struct Outgoing {
    gathering: Box<Message>,
    /// An empty message for the next turn; `None` while both are in use.
    spare: Option<Box<Message>>,
    in_kernel: bool,
}

/// What is to be done after a send completed.
pub(super) struct Sent {
    /// The message again, if some of it is left: hand it to the kernel once more.
    pub(super) rest: Option<Box<Message>>,
    /// Answers that are now out whole.
    pub(super) answers: u32,
}

impl Outgoing {
    /// An empty queue.
    pub(super) fn new() -> Self {
        Self { gathering: Message::new(), spare: Some(Message::new()), in_kernel: false }
    }

    /// Appends whatever `write` appends.
    pub(super) fn push_head<R>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        let message = &mut self.gathering;
        let before = message.head.len();
        let result = write(&mut message.head);
        let added = message.head.len() - before;
        match message.parts.last_mut() {
            _ if added == 0 => {}
            Some(Part::Head { len, .. }) => *len += added,
            _ => message.parts.push(Part::Head { start: before, len: added }),
        }
        result
    }

    /// Appends `len` bytes at `start` of a buffer, which is held until they are sent.
    pub(super) fn push_buffer(&mut self, buffers: &mut Buffers, buf: BufId, start: usize, len: usize) {
        let _checked = buffers.address(buf, start, len);
        if len > 0 {
            buffers.retain(buf);
            self.gathering.parts.push(Part::Buffer { buf, start, len });
        }
    }

    /// Counts one answer as pushed.
    pub(super) fn count_answer(&mut self) {
        self.gathering.answers += 1;
    }

    /// The message to hand to the kernel now, if there is one and none is there yet.
    pub(super) fn take(&mut self) -> Option<Box<Message>> {
        if self.in_kernel || self.gathering.parts.is_empty() {
            return None;
        }
        self.in_kernel = true;
        let next = self.spare.take().unwrap_or_else(Message::new);
        Some(std::mem::replace(&mut self.gathering, next))
    }

    /// Nothing waits and nothing is in the kernel.
    pub(super) fn is_idle(&self) -> bool {
        !self.in_kernel && self.gathering.parts.is_empty()
    }

    /// Takes back a message of which the kernel sent `sent` more bytes.
    pub(super) fn on_sent(&mut self, mut message: Box<Message>, sent: usize, buffers: &mut Buffers) -> Sent {
        assert!(self.in_kernel, "a send completed that was not under way");
        if !message.advance(sent, buffers) {
            return Sent { rest: Some(message), answers: 0 };
        }
        let answers = message.answers;
        message.clear();
        self.in_kernel = false;
        self.spare = Some(message);
        Sent { rest: None, answers }
    }

    /// Gives up: what gathers is not sent. The message in the kernel, if any, comes back to who reaps it.
    pub(super) fn abandon(&mut self, buffers: &mut Buffers) {
        self.gathering.abandon(buffers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_and_buffers_are_released_as_they_are_sent() {
        let mut buffers = Buffers::new(0);
        let buf = buffers.alloc(10);
        let mut queue = Outgoing::new();
        queue.push_head(|out| out.extend_from_slice(b"ab"));
        queue.push_head(|out| out.extend_from_slice(b"cd"));
        queue.push_buffer(&mut buffers, buf, 2, 8);
        queue.push_head(|out| out.push(b'z'));
        queue.count_answer();
        buffers.release(buf);
        let mut message = queue.take().unwrap();
        assert!(queue.take().is_none(), "nothing new to send");
        queue.push_head(|out| out.push(b'n'));
        assert!(queue.take().is_none(), "one message at a time");
        message.prepare(&buffers);
        assert_eq!(message.iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [4, 8, 1]);
        let sent = queue.on_sent(message, 5, &mut buffers);
        let mut message = sent.rest.unwrap();
        message.prepare(&buffers);
        assert_eq!(message.iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [7, 1]);
        let sent = queue.on_sent(message, 7, &mut buffers);
        assert_eq!(buffers.in_use(), 0);
        let sent = queue.on_sent(sent.rest.unwrap(), 1, &mut buffers);
        assert!(sent.rest.is_none());
        assert_eq!(sent.answers, 1);
        assert!(!queue.is_idle());
        assert!(queue.take().is_some());
    }

    #[test]
    fn a_queue_that_is_given_up_releases_its_buffers() {
        let mut buffers = Buffers::new(0);
        let buf = buffers.alloc(10);
        let mut queue = Outgoing::new();
        queue.push_buffer(&mut buffers, buf, 0, 10);
        buffers.release(buf);
        assert_eq!(buffers.in_use(), 1);
        queue.abandon(&mut buffers);
        assert_eq!(buffers.in_use(), 0);
    }
}
