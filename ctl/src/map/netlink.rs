//! Generic netlink: requests to one family of the kernel, its answers, and what it tells of its own accord.
//!
//! As much of it as [`kernel`](super::kernel) needs: attributes of numbers, strings and nests, one request at a time,
//! each with a time limit. Never does: knowing what the attributes mean.
//!
//! Layout: `linux/netlink.h` and `linux/genetlink.h`. Everything is in the machine's byte order.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// Longest time that the kernel may take for an answer, once it has taken the request.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Longest message of the kernel: the list of all devices of a machine fits, some thousands of them.
const MESSAGE_BYTES_MAX: usize = 256 << 10;
const HEADER_LEN: usize = 16;
const FAMILY_HEADER_LEN: usize = 4;
const ATTRIBUTE_HEADER_LEN: usize = 4;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
/// Bits of an attribute's type that are not its number.
const TYPE_FLAGS: u16 = 0xc000;

const CONTROLLER: u16 = 0x10;
const CONTROLLER_GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const FAMILY_GROUPS: u16 = 7;
const GROUP_NAME: u16 = 1;
const GROUP_ID: u16 = 2;

/// Attributes under construction.
#[derive(Clone, Debug, Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Appends one of any content.
    pub fn bytes(mut self, kind: u16, content: &[u8]) -> Self {
        let len = u16::try_from(ATTRIBUTE_HEADER_LEN + content.len()).expect("an attribute of a few bytes");
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number of 32 bits.
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a number of 64 bits.
    pub fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a string.
    pub fn string(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Appends attributes within one.
    pub fn nest(self, kind: u16, inner: &Self) -> Self {
        self.bytes(kind, &inner.0)
    }
}

/// The attributes in some bytes: number and content. Ends where they are not attributes.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !TYPE_FLAGS;
        let content = bytes.get(ATTRIBUTE_HEADER_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

/// The content of the first attribute of a kind.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, content)| content)
}

/// The number of 32 bits in the first attribute of a kind.
pub fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    attribute(bytes, kind)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// One message of the kernel.
struct Message<'a> {
    kind: u16,
    seq: u32,
    body: &'a [u8],
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let (kind, seq) = (u16_at(bytes, 4)?, u32_at(bytes, 8)?);
        let body = bytes.get(HEADER_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, seq, body })
    })
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// A family of generic netlink, on a socket of its own.
#[derive(Debug)]
pub struct Family {
    socket: OwnedFd,
    seq: u32,
    id: u16,
    version: u8,
    groups: Vec<(String, u32)>,
    buf: Vec<u8>,
}

impl Family {
    /// Looks a family up.
    ///
    /// # Errors
    /// `NotFound` where the kernel has none of that name, which may only mean that its module is not loaded.
    pub fn open(name: &str, version: u8) -> io::Result<Self> {
        let mut family = Self::controller(0)?;
        let wanted = Attributes::default().string(FAMILY_NAME, name);
        let found = family.ask(CONTROLLER_GET_FAMILY, &wanted)?.ok_or_else(|| invalid("no such family"))?;
        let id = attribute(&found, FAMILY_ID).and_then(|bytes| u16_at(bytes, 0));
        let groups = attribute(&found, FAMILY_GROUPS).unwrap_or_default();
        let group = |(_, group): (u16, &[u8])| {
            let name = attribute(group, GROUP_NAME)?.strip_suffix(&[0])?;
            Some((String::from_utf8(name.to_vec()).ok()?, number(group, GROUP_ID)?))
        };
        family.groups = attributes(groups).filter_map(group).collect();
        family.id = id.ok_or_else(|| invalid("the family has no id"))?;
        family.version = version;
        Ok(family)
    }

    /// Another socket, which hears what the kernel tells a group of the family. `None` if the group has a number that
    /// cannot be asked for when a socket is bound, or is not there: then nothing will be heard.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen(&self, group: &str) -> io::Result<Option<Self>> {
        let found = self.groups.iter().find(|(name, _)| name == group);
        let Some(bit) = found.and_then(|(_, id)| id.checked_sub(1)).filter(|bit| *bit < u32::BITS) else {
            return Ok(None);
        };
        Ok(Some(Self { id: self.id, version: self.version, ..Self::controller(1 << bit)? }))
    }

    /// The family that knows the others, on a socket that hears these groups.
    fn controller(groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(netlink::GENERIC);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        let buf = vec![0; MESSAGE_BYTES_MAX];
        Ok(Self { socket, seq: 0, id: CONTROLLER, version: 1, groups: Vec::new(), buf })
    }

    /// Sends a request and waits for what becomes of it: the attributes of the answer, if it has one.
    ///
    /// # Errors
    /// The kernel's, or that it does not answer in time.
    pub fn ask(&mut self, command: u8, attributes: &Attributes) -> io::Result<Option<Vec<u8>>> {
        self.seq = self.seq.wrapping_add(1);
        let len = HEADER_LEN + FAMILY_HEADER_LEN + attributes.0.len();
        let mut request = u32::try_from(len).map_err(io::Error::other)?.to_ne_bytes().to_vec();
        request.extend_from_slice(&self.id.to_ne_bytes());
        request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        request.extend_from_slice(&self.seq.to_ne_bytes());
        request.extend_from_slice(&[0; 4]); // to be filled in by the kernel: whose socket it is
        request.extend_from_slice(&[command, self.version, 0, 0]);
        request.extend_from_slice(&attributes.0);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut answer = None;
        loop {
            let Some(len) = self.receive(deadline)? else {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not answer"));
            };
            for message in messages(&self.buf[..len]).filter(|m| m.seq == self.seq) {
                if message.kind == self.id {
                    answer = message.body.get(FAMILY_HEADER_LEN..).map(<[u8]>::to_vec);
                } else if message.kind == NLMSG_ERROR {
                    return match u32_at(message.body, 0).map(u32::cast_signed) {
                        Some(0) => Ok(answer),
                        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                        None => Err(invalid("an answer without its outcome")),
                    };
                }
            }
        }
    }

    /// Waits for what the kernel tells of its own accord: command and attributes. Empty after `limit`.
    ///
    /// # Errors
    /// The kernel's; `ENOBUFS` if it had more to tell than there was room for.
    pub fn hear(&mut self, limit: Duration) -> io::Result<Vec<(u8, Vec<u8>)>> {
        let Some(len) = self.receive(Instant::now() + limit)? else { return Ok(Vec::new()) };
        let told = messages(&self.buf[..len]).filter(|m| m.kind == self.id);
        let parts = |m: Message<'_>| Some((*m.body.first()?, m.body.get(FAMILY_HEADER_LEN..)?.to_vec()));
        Ok(told.filter_map(parts).collect())
    }

    /// Length of the next datagram; none by the deadline.
    fn receive(&mut self, deadline: Instant) -> io::Result<Option<usize>> {
        loop {
            match rustix::net::recv(&self.socket, &mut self.buf[..], RecvFlags::empty()) {
                Ok((len, _)) => return Ok(Some(len)),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let left = Timespec::try_from(left).ok();
            match rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let inner = Attributes::default().u32(1, 7).string(2, "vol");
        let all = Attributes::default().u64(5, 1 << 40).nest(6, &inner);
        assert_eq!(all.0.len() % 4, 0);
        let nested = attribute(&all.0, 6).unwrap();
        assert_eq!(number(nested, 1), Some(7));
        assert_eq!(attribute(nested, 2), Some(&b"vol\0"[..]));
        assert_eq!(attribute(&all.0, 5), Some(&(1u64 << 40).to_ne_bytes()[..]));
        assert_eq!(attribute(&all.0, 9), None);
    }

    #[test]
    fn what_is_no_attribute_ends_the_list() {
        for broken in [&[][..], &[1], &[0; 4], &[3, 0, 1, 0], &[200, 0, 1, 0, 5]] {
            assert_eq!(attributes(broken).count(), 0, "{broken:?}");
        }
        assert_eq!(messages(&[9; 40]).count(), 0);
    }

    #[test]
    fn the_kernel_knows_its_controller() {
        let family = Family::open("nlctrl", 2).unwrap();
        assert_eq!(family.id, CONTROLLER);
        let mut heard = family.listen("notify").unwrap().unwrap();
        assert_eq!(heard.hear(Duration::ZERO).unwrap(), []);
        assert!(family.listen("nix").unwrap().is_none());
        let none = Family::open("no-such-family", 1).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound, "{none}");
    }
}
