//! Structured and extended replies over a real socket, byte for byte: no client in this package speaks them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blkrepl_nbd::Replies;
use blkrepl_nbd::proto::*;
use common::{Manner, Memory, TestServer, Volume, pattern};
use proptest::prelude::*;

const SIZE: usize = 4 << 20;

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A client that says what it is told to.
struct Raw {
    stream: UnixStream,
    replies: Replies,
}

/// One reply: its type (`None` of a simple one), and its payload.
type Reply = (Option<u16>, Vec<u8>);

impl Raw {
    /// Negotiates such replies and, where these can carry them, both metadata contexts.
    fn connect(server: &TestServer, replies: Replies) -> Self {
        let mut raw = Self { stream: UnixStream::connect(server.socket()).unwrap(), replies };
        raw.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        raw.take(GREETING_LEN);
        raw.stream.write_all(&3u32.to_be_bytes()).unwrap();
        let name = [&4u32.to_be_bytes()[..], b"vol0"].concat();
        let query =
            |text: &str| [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat();
        let queries = [query("base:allocation"), query("blkrepl:dirty")].concat();
        match replies {
            Replies::Simple => {}
            Replies::Structured => raw.option(NBD_OPT_STRUCTURED_REPLY, &[]),
            Replies::Extended => raw.option(NBD_OPT_EXTENDED_HEADERS, &[]),
        }
        if replies != Replies::Simple {
            raw.option(NBD_OPT_SET_META_CONTEXT, &[&name[..], &2u32.to_be_bytes(), &queries].concat());
        }
        raw.option(NBD_OPT_GO, &[&name[..], &[0, 0]].concat());
        raw
    }

    /// Sends an option, and takes its replies, the last of which must be an acknowledgement.
    fn option(&mut self, option: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let head = [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes()].concat();
        self.stream.write_all(&[&head, data].concat()).unwrap();
        loop {
            let head = self.take(OPTION_REPLY_HEADER_LEN);
            assert_eq!((number(&head[..8]), number(&head[8..12])), (NBD_REP_MAGIC, u64::from(option)));
            self.take(number(&head[16..]) as usize);
            match u32::try_from(number(&head[12..16])).unwrap() {
                NBD_REP_ACK => return,
                reply => assert_eq!(reply & NBD_REP_FLAG_ERROR, 0, "option {option} is refused: {reply:#x}"),
            }
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Sends a request, and takes its replies; `read`: so many bytes follow a simple reply that is no error.
    fn request(&mut self, header: ExtendedRequestHeader, payload: &[u8], read: usize) -> Vec<Reply> {
        let ExtendedRequestHeader { flags, command, handle, offset, len } = header;
        let head = if self.replies == Replies::Extended {
            header.encode().to_vec()
        } else {
            let len = u32::try_from(len).unwrap();
            RequestHeader { flags, command, handle, offset, len }.encode().to_vec()
        };
        self.stream.write_all(&[&head, payload].concat()).unwrap();
        let mut replies = Vec::new();
        loop {
            let magic = self.take(4);
            let (form, extended) = match u32::try_from(number(&magic)).unwrap() {
                NBD_SIMPLE_REPLY_MAGIC => (Replies::Simple, false),
                NBD_STRUCTURED_REPLY_MAGIC => (Replies::Structured, false),
                NBD_EXTENDED_REPLY_MAGIC => (Replies::Extended, true),
                other => panic!("a reply begins with {other:#x}"),
            };
            if form == Replies::Simple {
                assert_ne!(self.replies, Replies::Extended);
                let rest = self.take(SIMPLE_REPLY_LEN - 4);
                assert_eq!(number(&rest[4..]), handle);
                let error = number(&rest[..4]) as u32;
                assert!(error == 0 || self.replies == Replies::Simple, "an error has a text");
                let data = if error == 0 { self.take(read) } else { error.to_be_bytes().to_vec() };
                let kind = if error == 0 { None } else { Some(NBD_REPLY_TYPE_ERROR) };
                return vec![(kind, data)];
            }
            assert_eq!(form, self.replies);
            let rest = self.take(if extended { EXTENDED_REPLY_LEN - 4 } else { STRUCTURED_REPLY_LEN - 4 });
            assert_eq!(number(&rest[4..12]), handle);
            let len = if extended {
                assert_eq!(number(&rest[12..20]), offset);
                number(&rest[20..])
            } else {
                number(&rest[12..])
            };
            let payload = self.take(len as usize);
            replies.push((Some(number(&rest[2..4]) as u16), payload));
            if number(&rest[..2]) as u16 == NBD_REPLY_FLAG_DONE {
                return replies;
            }
        }
    }

    /// Nothing comes any more.
    fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}

fn header(command: u16, flags: u16, offset: u64, len: u64) -> ExtendedRequestHeader {
    ExtendedRequestHeader { flags, command, handle: offset ^ len ^ 0xabcd, offset, len }
}

fn server(size: usize) -> (TestServer, Arc<Volume>) {
    let volume = Volume::new(size, Manner::InOrder);
    (TestServer::start(Memory::one(&volume)), volume)
}

fn error_of(replies: &[Reply]) -> Option<NbdErrno> {
    let [(Some(NBD_REPLY_TYPE_ERROR), payload)] = replies else { return None };
    NbdErrno::from_code(number(&payload[..4]) as u32)
}

#[test]
fn an_extended_session_goes_on_after_payloads_that_do_not_belong() {
    let (server, volume) = server(SIZE);
    let mut raw = Raw::connect(&server, Replies::Extended);
    let data = pattern(1, 8192);
    let none = vec![(Some(NBD_REPLY_TYPE_NONE), Vec::new())];
    let write = header(NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN | NBD_CMD_FLAG_FUA, 4096, 8192);
    assert_eq!(raw.request(write, &data, 0), none);
    for command in [NBD_CMD_TRIM, NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_BLOCK_STATUS, 77] {
        let junk = header(command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 100_000);
        assert_eq!(error_of(&raw.request(junk, &vec![0x25; 100_000], 0)), Some(NbdErrno::Inval));
    }
    let bare = header(NBD_CMD_WRITE, 0, 4096, 8192);
    assert_eq!(error_of(&raw.request(bare, &[], 0)), Some(NbdErrno::Inval));
    let read = raw.request(header(NBD_CMD_READ, NBD_CMD_FLAG_DF, 4096, 8192), &[], 0);
    let expected = [&4096u64.to_be_bytes()[..], &data].concat();
    assert_eq!(read, [(Some(NBD_REPLY_TYPE_OFFSET_DATA), expected)]);
    assert_eq!(raw.request(header(NBD_CMD_TRIM, 0, 4096, 4096), &[], 0), none);
    assert_eq!(raw.request(header(NBD_CMD_FLUSH, 0, 0, 0), &[], 0), none);
    assert_eq!(volume.data.lock().unwrap()[8192..12288], data[4096..]);
    let status = raw.request(header(NBD_CMD_BLOCK_STATUS, 0, 0, 2 << 20), &[], 0);
    let allocation: [u64; 6] = [8192, 3, 4096, 0, (2 << 20) - 12288, 3];
    let dirty: [u64; 4] = [1 << 20, 0, 1 << 20, 1];
    let body = |id: u32, list: &[u64]| {
        let count = u32::try_from(list.len() / 2).unwrap();
        let list: Vec<u8> = list.iter().flat_map(|number| number.to_be_bytes()).collect();
        (Some(NBD_REPLY_TYPE_BLOCK_STATUS_EXT), [&id.to_be_bytes()[..], &count.to_be_bytes(), &list].concat())
    };
    assert_eq!(status, [body(1, &allocation), body(2, &dirty)]);
}

#[test]
fn what_is_not_an_extended_request_closes_the_connection() {
    let (server, _) = server(SIZE);
    let compact = RequestHeader { flags: 0, command: NBD_CMD_FLUSH, handle: 0, offset: 0, len: 0 }.encode();
    let flood = header(NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 1 << 32).encode();
    for bytes in [[&compact[..], &[0; 4]].concat(), flood.to_vec()] {
        let mut raw = Raw::connect(&server, Replies::Extended);
        raw.stream.write_all(&bytes).unwrap();
        assert!(raw.is_closed());
    }
}

/// What one random request does. Offsets and lengths go past the end here and there.
fn any_request() -> impl Strategy<Value = (u16, u16, u64, u64)> {
    let offset = prop_oneof![0..SIZE as u64, Just(0), Just(SIZE as u64 - 4096)];
    let len = prop_oneof![8 => 1u64..20_000, 1 => Just(0), 1 => Just(4096)];
    let flags = prop_oneof![6 => Just(0u16), 2 => Just(NBD_CMD_FLAG_FUA), 1 => 0u16..64];
    (0u16..10, flags, offset, len)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 24, ..ProptestConfig::default() })]

    /// In each form: what is done is done as in a plain array, whatever is refused changes nothing, and the two
    /// sides never lose their place on the stream.
    #[test]
    fn random_requests_in_each_form_do_what_they_say(
        requests in prop::collection::vec(any_request(), 1..40), seed in any::<u64>(),
    ) {
        for replies in [Replies::Simple, Replies::Structured, Replies::Extended] {
            let (server, volume) = server(SIZE);
            let mut raw = Raw::connect(&server, replies);
            let mut model = vec![0; SIZE];
            for (n, (command, flags, offset, len)) in requests.iter().copied().enumerate() {
                if command == NBD_CMD_DISC {
                    continue;
                }
                let extended = replies == Replies::Extended;
                let flags = if extended && command == NBD_CMD_WRITE { flags ^ NBD_CMD_FLAG_PAYLOAD_LEN } else { flags };
                let follows =
                    if extended { flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0 } else { command == NBD_CMD_WRITE };
                let payload = pattern(seed ^ n as u64, if follows { len as usize } else { 0 });
                let read = if command == NBD_CMD_READ { len as usize } else { 0 };
                let said = raw.request(header(command, flags, offset, len), &payload, read);
                let fits = len > 0 && offset + len <= SIZE as u64;
                let own = match command {
                    NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE,
                    NBD_CMD_READ if replies != Replies::Simple => NBD_CMD_FLAG_DF,
                    NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
                    NBD_CMD_WRITE if extended => NBD_CMD_FLAG_PAYLOAD_LEN,
                    _ => 0,
                };
                let known = match command {
                    NBD_CMD_FLUSH => offset == 0 && len == 0,
                    NBD_CMD_BLOCK_STATUS => replies != Replies::Simple && fits,
                    NBD_CMD_WRITE => (!extended || follows) && fits,
                    _ => command <= NBD_CMD_WRITE_ZEROES && fits,
                };
                let done = known && flags & !(own | NBD_CMD_FLAG_FUA) == 0;
                prop_assert_eq!(error_of(&said).is_none(), done, "{} {:#x} {} {}", command, flags, offset, len);
                if !done {
                    continue;
                }
                let range = offset as usize..(offset + len) as usize;
                match command {
                    NBD_CMD_WRITE => model[range].copy_from_slice(&payload),
                    NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES => model[range].fill(0),
                    NBD_CMD_READ => {
                        let skip = if replies == Replies::Simple { 0 } else { 8 };
                        prop_assert!(said[0].1[skip..] == model[range]);
                    }
                    NBD_CMD_BLOCK_STATUS => prop_assert_eq!(said.len(), 2, "a chunk for each context"),
                    _ => {}
                }
            }
            prop_assert!(*volume.data.lock().unwrap() == model);
        }
    }
}
