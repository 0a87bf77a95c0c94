//! What an NBD client sends: the negotiation, then request headers.

use blkrepl_engine::reactor::client::{Answer, ClientFrame, ClientProtocol, FrontOp, FrontRequest};
use blkrepl_engine::types::Extent;
use blkrepl_nbd::negotiate::{Negotiation, OPTION_BYTES_MAX, OPTION_DRAIN_MAX, Progress, Terms, Want};
use blkrepl_nbd::proto::{
    EXPORT_NAME_ZEROES, EXTENDED_REPLY_LEN, EXTENDED_REQUEST_LEN, ExtendedRequestHeader, GREETING_LEN,
    NBD_CMD_DISC, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_WRITE, NBD_EXTENDED_REPLY_MAGIC,
    NBD_EXTENDED_REQUEST_MAGIC, NBD_REP_MAGIC, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT, NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REQUEST_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC, OPTION_REPLY_HEADER_LEN, REQUEST_LEN, RequestHeader, STRING_BYTES_MAX,
    STRUCTURED_REPLY_LEN, decode_simple_reply,
};
use blkrepl_nbd::{
    Admitting, Contexts, ExportInfo, ExportRefusal, Exports, MetaContext, Peer, Replies, Session,
};

use crate::Verdict;
use crate::input::Input;

/// More than the server ever answers to one option of a node with few volumes.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// Size of the first export, in bytes.
pub(crate) const EXPORT_SIZE: u64 = 1 << 30;

/// The volumes of a node.
struct Shelf(Vec<ExportInfo>);

impl Shelf {
    fn new(count: u8) -> Self {
        Self((0..u64::from(count)).map(|n| ExportInfo::new(format!("vol{n}"), EXPORT_SIZE << n)).collect())
    }
}

impl Exports for Shelf {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|export| export.name.clone()).collect()
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        match name {
            "policy" => Err(ExportRefusal::Policy(format!("{name} is not served here"))),
            "shutdown" => Err(ExportRefusal::Shutdown),
            _ => self
                .0
                .iter()
                .find(|export| export.name == name)
                .cloned()
                .ok_or_else(|| ExportRefusal::Unknown(format!("no volume {name}; choose another name"))),
        }
    }

    fn admit(&self, name: &str, _: Peer) -> Admitting {
        panic!("a negotiation admitted a client to {name}, which is for the server to do");
    }
}

/// The negotiation. Control byte: number of volumes of the node, modulo 4; then what the client sends.
/// Holds: the server wants no more than its limits, and answers in whole replies of bounded length.
pub fn nbd_negotiation(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let exports = Shelf::new(input.u8() % 4);
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(&mut out);
    assert_eq!(out.len(), GREETING_LEN);
    loop {
        out.clear();
        let mut progress = match negotiation.wants() {
            Want::Bytes(len) => {
                assert!((1..=OPTION_BYTES_MAX as usize).contains(&len), "{len} bytes wanted");
                let Some(bytes) = input.exactly(len) else { return Verdict::Refused };
                negotiation.advance(bytes, &exports, &mut out)
            }
            Want::Discard(len) => {
                assert!((1..=OPTION_DRAIN_MAX).contains(&len), "{len} bytes to be thrown away");
                // Short of them the client would have hung up; what follows is more interesting.
                input.take(len as usize);
                negotiation.advance(&[], &exports, &mut out)
            }
        };
        if let Progress::Admit(info) = &progress {
            assert!(out.is_empty(), "an answer before the admission");
            // A name of even length is admitted.
            let refusal = || ExportRefusal::Policy(format!("{} is attached by another client", info.name));
            let admitted = (info.name.len() % 2 == 0).then_some(()).ok_or_else(refusal);
            progress = negotiation.admitted(admitted, &mut out);
        }
        assert!(out.len() <= ANSWER_BYTES_MAX, "an answer of {} bytes", out.len());
        match progress {
            Progress::Admit(_) => panic!("an admission was asked for twice"),
            Progress::Continue => check_replies(&out),
            Progress::Transmission(Terms { export: info, replies, contexts, .. }) => {
                assert!(replies != Replies::Simple || contexts.is_empty(), "contexts need chunks");
                assert_eq!(exports.open(&info.name).as_ref(), Ok(&info));
                // The answer to NBD_OPT_EXPORT_NAME has a form of its own.
                if ![10, 10 + EXPORT_NAME_ZEROES].contains(&out.len()) {
                    check_replies(&out);
                }
                return Verdict::Accepted;
            }
            Progress::Close(reason) => {
                check_replies(&out);
                assert!(!reason.to_string().is_empty());
                return Verdict::Refused;
            }
        }
    }
}

fn check_replies(mut out: &[u8]) {
    while !out.is_empty() {
        let (head, rest) = out.split_at_checked(OPTION_REPLY_HEADER_LEN).expect("a whole reply header");
        assert_eq!(head[..8], NBD_REP_MAGIC.to_be_bytes());
        let len = u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize;
        assert!(len <= 2 + STRING_BYTES_MAX, "a reply of {len} bytes");
        out = rest.get(len..).expect("as many bytes as the reply's header says");
    }
}

/// Requests. Control byte: bit 0 read-only, bit 1 blocks of 512 bytes, bit 2 small payloads, bit 3 structured
/// replies, bit 4 extended headers, bit 5 `base:allocation`, bit 6 `blkrepl:dirty`, bit 7 makes the magic of
/// every header good; then headers, each followed by its payload if it has one. Holds: what passes lies within
/// the export, and each request has a reply of its own.
pub fn nbd_requests(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let control = input.u8();
    let mut export = ExportInfo::new("vol0", EXPORT_SIZE);
    export.read_only = control & 1 != 0;
    export.min_block = if control & 2 != 0 { 512 } else { 1 };
    export.max_payload = if control & 4 != 0 { 8192 } else { export.max_payload };
    let replies = match control & 24 {
        0 => Replies::Simple,
        8 => Replies::Structured,
        _ => Replies::Extended,
    };
    let bits = [(32, MetaContext::Allocation), (64, MetaContext::Dirty)];
    let contexts: Contexts =
        bits.into_iter().filter(|(bit, _)| control & bit != 0).map(|(_, context)| context).collect();
    let mut session = Session::new(&export, replies).with_contexts(contexts);
    let mut accepted = false;
    while !input.is_empty() {
        let Some(sent) = next_header(&mut input, &mut session, replies, control & 0x80 != 0) else { break };
        let (sent, request) = sent;
        assert_eq!((request.handle, request.offset), (sent.handle, sent.offset));
        let follows = match replies {
            Replies::Extended => sent.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0,
            Replies::Simple | Replies::Structured => sent.command == NBD_CMD_WRITE,
        };
        assert_eq!(request.payload, if follows { sent.len } else { 0 }, "what follows the header");
        input.take(usize::try_from(request.payload).expect("a payload has a length of 32 bits"));
        if request.error.is_none() {
            accepted = true;
            check_accepted(&request, &export);
        }
        let mut out = Vec::new();
        if request.error.is_none() && request.op == FrontOp::BlockStatus {
            assert!(replies != Replies::Simple && !contexts.is_empty());
            session.reply(&request, Answer::Extents(&extents_of(&request)), &mut out);
            check_status(&out, &request, replies, contexts);
            continue;
        }
        let done = if request.op == FrontOp::Read { Answer::Data } else { Answer::Done };
        session.reply(&request, request.error.map_or(done, Answer::Error), &mut out);
        check_reply(&out, &request, replies);
    }
    Verdict::of(accepted)
}

/// Takes a header and has it read; `None` at the end of the connection.
fn next_header(
    input: &mut Input<'_>,
    session: &mut Session,
    replies: Replies,
    good_magic: bool,
) -> Option<(ExtendedRequestHeader, FrontRequest)> {
    let extended = replies == Replies::Extended;
    let (len, magic) = if extended {
        (EXTENDED_REQUEST_LEN, NBD_EXTENDED_REQUEST_MAGIC)
    } else {
        (REQUEST_LEN, NBD_REQUEST_MAGIC)
    };
    assert_eq!(session.header_len(), len);
    let mut header = [0; EXTENDED_REQUEST_LEN];
    let taken = input.take(len);
    header[..taken.len()].copy_from_slice(taken);
    if taken.len() < len {
        assert!(matches!(session.parse(taken), ClientFrame::Violation(_)));
    }
    if good_magic {
        header[..4].copy_from_slice(&magic.to_be_bytes());
    }
    let sent = if extended {
        ExtendedRequestHeader::decode(&header)
    } else {
        let compact = header[..REQUEST_LEN].try_into().expect("the length of a compact header");
        RequestHeader::decode(compact).map(ExtendedRequestHeader::from)
    };
    match session.parse(&header[..len]) {
        ClientFrame::Request(request) => Some((sent.expect("a request has a good header"), request)),
        ClientFrame::Disconnect => {
            assert_eq!(sent.expect("a request has a good header").command, NBD_CMD_DISC);
            None
        }
        ClientFrame::Violation(text) => {
            let flood = sent.is_ok_and(|sent| extended && sent.len > u64::from(u32::MAX));
            assert!((sent.is_err() || flood) && !text.is_empty());
            None
        }
    }
}

fn check_accepted(request: &FrontRequest, export: &ExportInfo) {
    assert!(request.offset.checked_add(request.len).is_some_and(|end| end <= export.size));
    assert!(request.len > 0 || request.op == FrontOp::Flush);
    assert!(
        !export.read_only || !matches!(request.op, FrontOp::Write | FrontOp::Trim | FrontOp::WriteZeroes)
    );
    let carries_data = matches!(request.op, FrontOp::Read | FrontOp::Write);
    assert!(!carries_data || request.len <= u64::from(export.max_payload));
    assert_eq!(request.payload, if request.op == FrontOp::Write { request.len } else { 0 });
}

/// Holds: whole replies of the form that was agreed to, of the request's handle, the last of which says so.
fn check_reply(out: &[u8], request: &FrontRequest, replies: Replies) {
    if let (Ok(simple), true) = (out.try_into(), replies != Replies::Extended) {
        let (error, handle) = decode_simple_reply(simple).expect("a reply begins with its magic");
        assert!(replies == Replies::Simple || error.is_none() && request.op != FrontOp::Read);
        assert_eq!((error.is_some(), handle), (request.error.is_some(), request.handle));
        return;
    }
    let (header_len, magic) = match replies {
        Replies::Simple => panic!("{} bytes are no simple reply", out.len()),
        Replies::Structured => (STRUCTURED_REPLY_LEN, NBD_STRUCTURED_REPLY_MAGIC),
        Replies::Extended => (EXTENDED_REPLY_LEN, NBD_EXTENDED_REPLY_MAGIC),
    };
    let (head, payload) = out.split_at_checked(header_len).expect("a whole chunk header");
    let number = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let wide = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!(head[..4], magic.to_be_bytes());
    assert_eq!((number(4), wide(8)), (NBD_REPLY_FLAG_DONE, request.handle));
    let len = if replies == Replies::Extended {
        assert_eq!(wide(16), request.offset);
        wide(24)
    } else {
        u64::from(u32::from_be_bytes([head[16], head[17], head[18], head[19]]))
    };
    let data = if number(6) == NBD_REPLY_TYPE_OFFSET_DATA { request.len } else { 0 };
    assert_eq!(len, payload.len() as u64 + data);
    assert_eq!(number(6) == NBD_REPLY_TYPE_ERROR, request.error.is_some());
}

/// Extents for a request, as the core makes them: as many and of such states as its numbers say.
fn extents_of(request: &FrontRequest) -> Vec<Extent> {
    let count = request.handle % 300 + 1;
    let piece = (request.len / count).max(1);
    let mut left = request.len;
    let mut extents = Vec::new();
    for n in 0..count.min(left) {
        let (len, state) = (piece.min(left), request.handle >> (n % 60));
        left -= len;
        extents.push(Extent { len, hole: state & 1 != 0, dirty: state & 2 != 0 });
    }
    extents
}

/// Holds: a chunk for each context, in their order, with descriptors that lie within the request.
fn check_status(mut out: &[u8], request: &FrontRequest, replies: Replies, contexts: Contexts) {
    let extended = replies == Replies::Extended;
    let (header_len, head_len, descriptor_len, kind) = if extended {
        (EXTENDED_REPLY_LEN, 8, 16, NBD_REPLY_TYPE_BLOCK_STATUS_EXT)
    } else {
        (STRUCTURED_REPLY_LEN, 4, 8, NBD_REPLY_TYPE_BLOCK_STATUS)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    for context in contexts.iter() {
        let (head, rest) = out.split_at_checked(header_len).expect("a whole chunk header");
        assert_eq!(number(&head[6..8]), u64::from(kind));
        assert_eq!(number(&head[8..16]), request.handle);
        let len = number(&head[header_len - if extended { 8 } else { 4 }..]);
        let (payload, rest) = rest.split_at_checked(len as usize).expect("a whole chunk");
        assert_eq!(head[5] == 1, rest.is_empty(), "the last chunk says so");
        assert_eq!(number(&payload[..4]), u64::from(context.id()));
        let descriptors = payload[head_len..].chunks(descriptor_len);
        assert!(descriptors.len() > 0 && (!request.one || descriptors.len() == 1));
        let lens = descriptors.map(|descriptor| number(&descriptor[..descriptor_len / 2]));
        let total = lens.inspect(|len| assert!(*len > 0)).sum::<u64>();
        assert!(total <= request.len, "{total} bytes for a request of {}", request.len);
        out = rest;
    }
    assert!(out.is_empty());
}
