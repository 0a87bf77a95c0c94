//! What the codec of a connection makes of requests and answers, byte for byte, in all three forms.

use proptest::prelude::*;

use super::*;
use crate::proto::*;

const SIZE: u64 = 1 << 30;

fn session() -> Session {
    Session::new(&ExportInfo::new("vol0", SIZE), Replies::Simple)
}

/// The request that a write of 512 bytes at 4096 with FUA is in all forms.
fn durable_write() -> FrontRequest {
    FrontRequest {
        handle: 42,
        op: FrontOp::Write,
        offset: 4096,
        len: 512,
        payload: 512,
        fua: true,
        no_hole: false,
        one: false,
        error: None,
    }
}

fn parse(session: &mut Session, command: u16, flags: u16, offset: u64, len: u32) -> FrontRequest {
    let header = RequestHeader { flags, command, handle: 42, offset, len };
    match session.parse(&header.encode()) {
        ClientFrame::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

fn error(command: u16, flags: u16, offset: u64, len: u32) -> Option<ClientError> {
    parse(&mut session(), command, flags, offset, len).error
}

#[test]
fn requests_inside_the_export_pass_at_any_alignment() {
    for command in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
        for flags in [0, NBD_CMD_FLAG_FUA] {
            assert_eq!(error(command, flags, 0, 1), None);
            assert_eq!(error(command, flags, 513, 4097), None);
            assert_eq!(error(command, flags, SIZE - 1, 1), None);
            assert_eq!(error(command, flags, 0, PAYLOAD_MAX_DEFAULT), None);
        }
    }
    let request = parse(&mut session(), NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 4096, 512);
    assert_eq!(request, durable_write());
    let zeroes = parse(&mut session(), NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, 4096);
    assert_eq!((zeroes.error, zeroes.no_hole), (None, true));
    assert!(!parse(&mut session(), NBD_CMD_WRITE_ZEROES, 0, 0, 4096).no_hole);
    assert_eq!(error(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0), None);
}

#[test]
fn past_the_end_is_einval_for_reads_and_trims_and_enospc_for_writes() {
    let cases = [
        (NBD_CMD_READ, ClientError::Invalid),
        (NBD_CMD_TRIM, ClientError::Invalid),
        (NBD_CMD_WRITE, ClientError::NoSpace),
        (NBD_CMD_WRITE_ZEROES, ClientError::NoSpace),
    ];
    for (command, expected) in cases {
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 4095, 4096)] {
            assert_eq!(error(command, 0, offset, len), Some(expected), "command {command} at {offset}");
        }
    }
}

#[test]
fn unknown_commands_and_flags_are_refused_and_the_session_goes_on() {
    for command in [8, 9, 255, u16::MAX] {
        let request = parse(&mut session(), command, 0, 0, 4096);
        assert_eq!(request.error, Some(ClientError::Invalid));
        assert_eq!((request.op, request.len), (FrontOp::Flush, 0), "nothing may be drained");
    }
    for flags in [1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 15] {
        for command in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_FLUSH] {
            assert_eq!(error(command, flags, 0, 0), Some(ClientError::Invalid));
        }
    }
    assert_eq!(error(NBD_CMD_WRITE_ZEROES, 1 << 4, 0, 4096), Some(ClientError::Invalid));
}

#[test]
fn an_oversized_write_is_refused_with_its_payload_to_drain() {
    let request = parse(&mut session(), NBD_CMD_WRITE, 0, 0, PAYLOAD_MAX_DEFAULT + 1);
    assert_eq!(request.error, Some(ClientError::Invalid));
    assert_eq!((request.op, request.len), (FrontOp::Write, u64::from(PAYLOAD_MAX_DEFAULT) + 1));
    assert_eq!(error(NBD_CMD_READ, 0, 0, u32::MAX), Some(ClientError::Invalid));
    // No payload, no limit but the export's end.
    assert_eq!(error(NBD_CMD_TRIM, 0, 0, 1 << 30), None);
    assert_eq!(error(NBD_CMD_WRITE_ZEROES, 0, 0, 1 << 30), None);
}

#[test]
fn empty_requests_and_flushes_with_a_range_are_refused() {
    for command in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
        assert_eq!(error(command, 0, 0, 0), Some(ClientError::Invalid));
    }
    assert_eq!(error(NBD_CMD_FLUSH, 0, 4096, 0), Some(ClientError::Invalid));
    assert_eq!(error(NBD_CMD_FLUSH, 0, 0, 4096), Some(ClientError::Invalid));
}

#[test]
fn a_read_only_export_answers_writes_with_eperm() {
    let mut session =
        Session::new(&ExportInfo { read_only: true, ..ExportInfo::new("vol0", SIZE) }, Replies::Simple);
    for command in [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
        let request = parse(&mut session, command, 0, 0, 4096);
        let mut out = Vec::new();
        session.reply(&request, Answer::Error(request.error.unwrap()), &mut out);
        let reply = decode_simple_reply(out.as_slice().try_into().unwrap());
        assert_eq!(reply, Ok((Some(NbdErrno::Perm), 42)));
    }
    assert_eq!(parse(&mut session, NBD_CMD_READ, 0, 0, 4096).error, None);
}

#[test]
fn a_smallest_block_that_was_announced_is_enforced() {
    let mut session =
        Session::new(&ExportInfo { min_block: 512, ..ExportInfo::new("vol0", SIZE) }, Replies::Simple);
    assert_eq!(parse(&mut session, NBD_CMD_READ, 0, 512, 1024).error, None);
    assert_eq!(parse(&mut session, NBD_CMD_READ, 0, 1, 512).error, Some(ClientError::Invalid));
    assert_eq!(parse(&mut session, NBD_CMD_WRITE, 0, 0, 513).error, Some(ClientError::Invalid));
}

/// Splits a structured reply of one chunk into its type, its handle and its payload.
fn only_chunk(bytes: &[u8]) -> (u16, u64, &[u8]) {
    assert_eq!(be32(bytes, 0), NBD_STRUCTURED_REPLY_MAGIC);
    assert_eq!(be16(bytes, 4), NBD_REPLY_FLAG_DONE);
    (be16(bytes, 6), be64(bytes, 8), &bytes[STRUCTURED_REPLY_LEN..])
}

#[test]
fn a_structured_read_is_one_chunk_with_its_offset_and_df_asks_for_no_more() {
    let mut session = Session::new(&ExportInfo::new("vol0", SIZE), Replies::Structured);
    let request = parse(&mut session, NBD_CMD_READ, NBD_CMD_FLAG_DF, 8192, 4096);
    assert_eq!(request.error, None);
    let mut out = Vec::new();
    session.reply(&request, Answer::Data, &mut out);
    assert_eq!(only_chunk(&out), (NBD_REPLY_TYPE_OFFSET_DATA, 42, &8192u64.to_be_bytes()[..]));
    assert_eq!(be32(&out, 16), 8 + 4096, "the data that the reactor sends belongs to the chunk");
    // Without structured replies the flag does not exist.
    assert_eq!(error(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 4096), Some(ClientError::Invalid));
}

#[test]
fn a_read_of_zeroes_is_one_hole_where_replies_are_structured() {
    let mut session = Session::new(&ExportInfo::new("vol0", SIZE), Replies::Structured);
    assert!(session.can_say_zeroes());
    let request = parse(&mut session, NBD_CMD_READ, 0, 8192, 4096);
    let mut out = Vec::new();
    session.reply(&request, Answer::Zeroes, &mut out);
    let body = [&8192u64.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
    assert_eq!(only_chunk(&out), (NBD_REPLY_TYPE_OFFSET_HOLE, 42, &body[..]));
    assert_eq!(be32(&out, 16), 12);
    assert!(!Session::new(&ExportInfo::new("vol0", SIZE), Replies::Simple).can_say_zeroes());
}

#[test]
fn a_structured_error_has_its_number_and_a_text() {
    let mut session = Session::new(&ExportInfo::new("vol0", SIZE), Replies::Structured);
    for command in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, 9] {
        let request = parse(&mut session, command, 0, SIZE, 4096);
        let mut out = Vec::new();
        session.reply(&request, Answer::Error(request.error.unwrap()), &mut out);
        let (kind, handle, payload) = only_chunk(&out);
        assert_eq!((kind, handle), (NBD_REPLY_TYPE_ERROR, 42));
        assert_eq!(be32(&out, 16) as usize, payload.len());
        let error = if command == NBD_CMD_WRITE { NbdErrno::NoSpc } else { NbdErrno::Inval };
        assert_eq!(NbdErrno::from_code(be32(payload, 0)), Some(error));
        assert_eq!(usize::from(be16(payload, 4)), payload.len() - 6);
        assert_eq!(std::str::from_utf8(&payload[6..]).unwrap(), error.to_string());
    }
}

#[test]
fn what_has_no_data_is_answered_simply_also_among_structured_replies() {
    let mut session = Session::new(&ExportInfo::new("vol0", SIZE), Replies::Structured);
    for command in [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE] {
        let request = parse(&mut session, command, 0, 0, 4096);
        let mut out = Vec::new();
        session.reply(&request, Answer::Done, &mut out);
        assert_eq!(decode_simple_reply(out.as_slice().try_into().unwrap()), Ok((None, 42)));
    }
}

#[test]
fn a_cache_request_is_judged_like_a_read_of_any_length() {
    assert_eq!(error(NBD_CMD_CACHE, 0, 0, u32::MAX), Some(ClientError::Invalid), "past the end");
    assert_eq!(error(NBD_CMD_CACHE, 0, 0, 1 << 30), None);
    assert_eq!(error(NBD_CMD_CACHE, 0, 0, 0), Some(ClientError::Invalid));
    assert_eq!(error(NBD_CMD_CACHE, NBD_CMD_FLAG_DF, 0, 4096), Some(ClientError::Invalid));
    let export = ExportInfo { read_only: true, ..ExportInfo::new("vol0", SIZE) };
    let mut session = Session::new(&export, Replies::Simple);
    assert_eq!(parse(&mut session, NBD_CMD_CACHE, 0, 0, 4096).error, None);
}

fn extended() -> Session {
    Session::new(&ExportInfo::new("vol0", SIZE), Replies::Extended)
}

fn frame(session: &mut Session, command: u16, flags: u16, offset: u64, len: u64) -> ClientFrame {
    session.parse(&ExtendedRequestHeader { flags, command, handle: 42, offset, len }.encode())
}

fn parse_extended(command: u16, flags: u16, offset: u64, len: u64) -> FrontRequest {
    match frame(&mut extended(), command, flags, offset, len) {
        ClientFrame::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

/// Splits an extended reply of one chunk into its type and its payload.
fn only_extended_chunk(bytes: &[u8], offset: u64) -> (u16, &[u8]) {
    assert_eq!(be32(bytes, 0), NBD_EXTENDED_REPLY_MAGIC);
    assert_eq!(be16(bytes, 4), NBD_REPLY_FLAG_DONE);
    assert_eq!((be64(bytes, 8), be64(bytes, 16)), (42, offset), "handle and offset are the request's");
    (be16(bytes, 6), &bytes[EXTENDED_REPLY_LEN..])
}

#[test]
fn extended_requests_have_32_bytes_and_a_magic_of_their_own() {
    assert_eq!((extended().header_len(), session().header_len()), (32, 28));
    let compact = RequestHeader { flags: 0, command: NBD_CMD_FLUSH, handle: 1, offset: 0, len: 0 }.encode();
    assert!(matches!(extended().parse(&compact), ClientFrame::Violation(_)));
    assert!(matches!(extended().parse(&[&compact[..], &[0; 4]].concat()), ClientFrame::Violation(_)));
    assert_eq!(frame(&mut extended(), NBD_CMD_DISC, 0, 0, 0), ClientFrame::Disconnect);
    let flags = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_PAYLOAD_LEN;
    assert_eq!(parse_extended(NBD_CMD_WRITE, flags, 4096, 512), durable_write());
    let header = ExtendedRequestHeader { flags, command: NBD_CMD_WRITE, handle: 1, offset: 0, len: 512 };
    assert!(matches!(session().parse(&header.encode()[..REQUEST_LEN]), ClientFrame::Violation(_)));
}

#[test]
fn an_extended_write_says_that_its_length_is_that_of_a_payload() {
    let request = parse_extended(NBD_CMD_WRITE, 0, 0, 4096);
    assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 0), "no payload follows");
    let request = parse_extended(NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 0);
    assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 0));
}

#[test]
fn a_payload_where_none_belongs_is_refused_and_thrown_away() {
    let commands =
        [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE, 7, 8, u16::MAX];
    for command in commands {
        let request = parse_extended(command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096);
        assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 4096), "{command}");
        assert_eq!(error(command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096), Some(ClientError::Invalid));
    }
    // With compact headers the flag does not exist, and a write's payload is where it always was.
    let request = parse(&mut session(), NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096);
    assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 4096));
    let request = parse(&mut session(), NBD_CMD_TRIM, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 4096);
    assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 0));
}

#[test]
fn a_payload_of_more_than_32_bits_ends_the_connection() {
    for command in [NBD_CMD_WRITE, NBD_CMD_TRIM, 99] {
        for len in [1 << 32, u64::MAX] {
            let frame = frame(&mut extended(), command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, len);
            assert!(matches!(frame, ClientFrame::Violation(_)), "{frame:?}");
        }
        let request = parse_extended(command, NBD_CMD_FLAG_PAYLOAD_LEN, 0, u64::from(u32::MAX));
        assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), u64::from(u32::MAX)));
    }
}

#[test]
fn what_has_no_payload_may_be_longer_than_32_bits() {
    let large = ExportInfo::new("vol0", 1 << 40);
    let mut session = Session::new(&large, Replies::Extended);
    for command in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE] {
        let ClientFrame::Request(request) = frame(&mut session, command, 0, 4096, (1 << 40) - 4096) else {
            panic!("{command} is a request");
        };
        assert_eq!((request.error, request.len, request.payload), (None, (1 << 40) - 4096, 0));
        let past = parse_extended(command, 0, 4096, u64::MAX);
        assert!(past.error.is_some());
    }
    assert_eq!(parse_extended(NBD_CMD_READ, 0, 0, (32 << 20) + 1).error, Some(ClientError::Invalid));
}

#[test]
fn fast_zeroes_where_they_are_not_offered_are_refused_as_invalid() {
    for flags in [NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE] {
        assert_eq!(error(NBD_CMD_WRITE_ZEROES, flags, 0, 4096), Some(ClientError::Invalid));
        let request = parse_extended(NBD_CMD_WRITE_ZEROES, flags, 0, 4096);
        assert_eq!(request.error, Some(ClientError::Invalid));
    }
}

#[test]
fn fast_zeroes_are_holes_and_fail_quickly_where_they_are_to_take_space() {
    let export = ExportInfo { fast_zero: true, ..ExportInfo::new("vol0", SIZE) };
    for replies in [Replies::Simple, Replies::Structured] {
        let mut session = Session::new(&export, replies);
        let mut asked = |flags, offset| parse(&mut session, NBD_CMD_WRITE_ZEROES, flags, offset, 4096);
        let request = asked(NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_FUA, 0);
        assert_eq!((request.error, request.no_hole, request.fua), (None, false, true));
        let both = NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE;
        assert_eq!(asked(both, 0).error, Some(ClientError::Unsupported));
        assert_eq!(asked(both, SIZE).error, Some(ClientError::NoSpace));
        assert_eq!(asked(NBD_CMD_FLAG_NO_HOLE, 0).error, None);
        for command in [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_READ] {
            let request = parse(&mut session, command, NBD_CMD_FLAG_FAST_ZERO, 0, 4096);
            assert_eq!(request.error, Some(ClientError::Invalid));
        }
    }
}

#[test]
fn all_replies_to_extended_requests_are_extended_chunks() {
    let mut session = extended();
    let mut reply = |request: &FrontRequest, answer: Answer<'_>| {
        let mut out = Vec::new();
        session.reply(request, answer, &mut out);
        out
    };
    for command in [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE] {
        let done = reply(&parse_extended(command, 0, 8192, 4096), Answer::Done);
        assert_eq!(only_extended_chunk(&done, 8192), (NBD_REPLY_TYPE_NONE, &b""[..]));
        assert_eq!(be64(&done, 24), 0);
    }
    let read = parse_extended(NBD_CMD_READ, NBD_CMD_FLAG_DF, 8192, 4096);
    let data = reply(&read, Answer::Data);
    let offset = 8192u64.to_be_bytes();
    assert_eq!(only_extended_chunk(&data, 8192), (NBD_REPLY_TYPE_OFFSET_DATA, &offset[..]));
    assert_eq!(be64(&data, 24), 8 + 4096);
    let hole = reply(&read, Answer::Zeroes);
    let body = [&offset[..], &4096u32.to_be_bytes()].concat();
    assert_eq!(only_extended_chunk(&hole, 8192), (NBD_REPLY_TYPE_OFFSET_HOLE, &body[..]));
    assert_eq!(be64(&hole, 24), 12);
    for (command, flags) in [(NBD_CMD_READ, 0), (NBD_CMD_FLUSH, 0), (NBD_CMD_WRITE, 0), (99, 0)] {
        let refused = parse_extended(command, flags, SIZE, 4096);
        let error = reply(&refused, Answer::Error(refused.error.unwrap()));
        let (kind, payload) = only_extended_chunk(&error, SIZE);
        assert_eq!((kind, be64(&error, 24)), (NBD_REPLY_TYPE_ERROR, payload.len() as u64));
        assert_eq!(NbdErrno::from_code(be32(payload, 0)), Some(NbdErrno::Inval));
        assert_eq!(std::str::from_utf8(&payload[6..]).unwrap(), NbdErrno::Inval.to_string());
    }
}

fn both(replies: Replies) -> Session {
    Session::new(&ExportInfo::new("vol0", 1 << 40), replies).with_contexts(Contexts::all())
}

fn status_request(flags: u16, offset: u64, len: u64) -> FrontRequest {
    match frame(&mut both(Replies::Extended), NBD_CMD_BLOCK_STATUS, flags, offset, len) {
        ClientFrame::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

/// Descriptors of each context by its number, taken from a reply whose chunks are as they should be.
fn statuses(replies: Replies, contexts: Contexts, request: &FrontRequest, extents: &[Extent]) -> Statuses {
    let (mut session, mut out) = (both(replies).with_contexts(contexts), Vec::new());
    session.reply(request, Answer::Extents(extents), &mut out);
    let extended = replies == Replies::Extended;
    let (mut bytes, mut found) = (&out[..], Vec::new());
    while !bytes.is_empty() {
        let (magic, header_len, kind) = if extended {
            (NBD_EXTENDED_REPLY_MAGIC, EXTENDED_REPLY_LEN, NBD_REPLY_TYPE_BLOCK_STATUS_EXT)
        } else {
            (NBD_STRUCTURED_REPLY_MAGIC, STRUCTURED_REPLY_LEN, NBD_REPLY_TYPE_BLOCK_STATUS)
        };
        assert_eq!((be32(bytes, 0), be16(bytes, 6), be64(bytes, 8)), (magic, kind, request.handle));
        let len = if extended {
            assert_eq!(be64(bytes, 16), request.offset);
            be64(bytes, 24) as usize
        } else {
            be32(bytes, 16) as usize
        };
        let (payload, rest) = bytes[header_len..].split_at(len);
        let flags = if rest.is_empty() { NBD_REPLY_FLAG_DONE } else { 0 };
        assert_eq!(be16(bytes, 4), flags, "the last chunk says so, no other does");
        let list: Vec<(u64, u64)> = if extended {
            assert_eq!(be32(payload, 4) as usize * 16 + 8, len, "the count is that of the descriptors");
            payload[8..].chunks_exact(16).map(|d| (be64(d, 0), be64(d, 8))).collect()
        } else {
            assert!(len > 4 && (len - 4).is_multiple_of(8));
            payload[4..].chunks_exact(8).map(|d| (be32(d, 0).into(), be32(d, 4).into())).collect()
        };
        found.push((be32(payload, 0), list));
        bytes = rest;
    }
    found
}

type Statuses = Vec<(u32, Vec<(u64, u64)>)>;

fn extent(len: u64, hole: bool, dirty: bool) -> Extent {
    Extent { len, hole, dirty }
}

#[test]
fn block_status_is_one_chunk_for_each_chosen_context() {
    let extents = [extent(4096, false, false), extent(4096, true, false), extent(8192, true, true)];
    let request = status_request(0, 4096, 16384);
    assert_eq!((request.op, request.error, request.one), (FrontOp::BlockStatus, None, false));
    let both = [(1, vec![(4096, 0), (12288, 3)]), (2, vec![(8192, 0), (8192, 1)])];
    for replies in [Replies::Structured, Replies::Extended] {
        let said = |contexts| statuses(replies, contexts, &request, &extents);
        assert_eq!(said(Contexts::all()), both);
        assert_eq!(said([MetaContext::Allocation].into_iter().collect()), both[..1]);
        assert_eq!(said([MetaContext::Dirty].into_iter().collect()), both[1..]);
    }
}

#[test]
fn req_one_brings_exactly_one_descriptor_of_each_context() {
    let extents = [extent(4096, true, false), extent(4096, true, true), extent(8192, false, true)];
    let request = status_request(NBD_CMD_FLAG_REQ_ONE, 0, 16384);
    assert_eq!((request.error, request.one), (None, true));
    let expected = [(1, vec![(8192, 3)]), (2, vec![(4096, 0)])];
    for replies in [Replies::Structured, Replies::Extended] {
        assert_eq!(statuses(replies, Contexts::all(), &request, &extents), expected);
    }
    let short = status_request(NBD_CMD_FLAG_REQ_ONE, 0, 100);
    let expected = [(1, vec![(100, 3)]), (2, vec![(100, 0)])];
    assert_eq!(statuses(Replies::Structured, Contexts::all(), &short, &extents), expected);
}

#[test]
fn a_descriptor_of_32_bits_is_cut_and_one_of_64_bits_is_not() {
    let extents = [extent(4096, true, false), extent(1 << 39, false, false)];
    let request = status_request(0, 0, 1 << 39);
    let said = statuses(Replies::Extended, Contexts::all(), &request, &extents);
    assert_eq!(said[0], (1, vec![(4096, 3), ((1 << 39) - 4096, 0)]));
    let said = statuses(Replies::Structured, Contexts::all(), &request, &extents);
    let cut = u64::from(DESCRIPTOR_LEN_MAX);
    assert_eq!(said, [(1, vec![(4096, 3), (cut, 0)]), (2, vec![(cut, 0)])]);
    assert!(cut < 1 << 32 && cut.is_multiple_of(65536));
}

#[test]
fn fua_is_accepted_on_every_command() {
    for command in 0..=NBD_CMD_BLOCK_STATUS {
        let range = if command == NBD_CMD_FLUSH { (0, 0) } else { (4096, 4096) };
        let mut session = both(Replies::Structured);
        let header =
            RequestHeader { flags: NBD_CMD_FLAG_FUA, command, handle: 0, offset: range.0, len: range.1 };
        match session.parse(&header.encode()) {
            ClientFrame::Request(request) => assert_eq!((request.error, request.fua), (None, true)),
            frame => assert_eq!((frame, command), (ClientFrame::Disconnect, NBD_CMD_DISC)),
        }
    }
}

#[test]
fn block_status_without_a_context_is_invalid() {
    assert_eq!(error(NBD_CMD_BLOCK_STATUS, 0, 0, 4096), Some(ClientError::Invalid));
    let request = parse_extended(NBD_CMD_BLOCK_STATUS, 0, 0, 4096);
    assert_eq!((request.error, request.payload), (Some(ClientError::Invalid), 0));
    // Nor can simple replies tell what a context says.
    let mut simple = both(Replies::Simple);
    let request = parse(&mut simple, NBD_CMD_BLOCK_STATUS, 0, 0, 4096);
    assert_eq!(request.error, Some(ClientError::Invalid));
}

#[test]
fn block_status_is_refused_past_the_end_and_of_nothing() {
    assert_eq!(status_request(0, 0, 1 << 40).error, None);
    assert_eq!(status_request(NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE, 513, 1).error, None);
    for (offset, len) in [(0, 0), (0, (1 << 40) + 1), (1 << 40, 1), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(status_request(0, offset, len).error, Some(ClientError::Invalid));
    }
    for flags in [NBD_CMD_FLAG_DF, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_FLAG_PAYLOAD_LEN] {
        assert_eq!(status_request(flags, 0, 4096).error, Some(ClientError::Invalid));
    }
    let export = ExportInfo { read_only: true, ..ExportInfo::new("vol0", SIZE) };
    let mut session = Session::new(&export, Replies::Structured).with_contexts(Contexts::all());
    assert_eq!(parse(&mut session, NBD_CMD_BLOCK_STATUS, 0, 0, 4096).error, None);
}

#[test]
fn the_block_status_of_256_extents_has_at_most_12_kib() {
    let extents: Vec<Extent> = (0..256).map(|n| extent(4096, n % 2 == 0, n % 2 == 0)).collect();
    let request = status_request(0, 0, 256 * 4096);
    for replies in [Replies::Structured, Replies::Extended] {
        let said = statuses(replies, Contexts::all(), &request, &extents);
        assert!(said.iter().all(|(_, list)| list.len() == 256));
        let mut out = Vec::new();
        both(replies).reply(&request, Answer::Extents(&extents), &mut out);
        assert!(out.len() <= 12 << 10, "{} bytes", out.len());
    }
}

#[test]
fn disc_disconnects_and_a_wrong_magic_is_a_violation() {
    let mut session = session();
    let disc = RequestHeader { flags: 0, command: NBD_CMD_DISC, handle: 0, offset: 0, len: 0 };
    assert_eq!(session.parse(&disc.encode()), ClientFrame::Disconnect);
    assert!(matches!(session.parse(&[0; REQUEST_LEN]), ClientFrame::Violation(_)));
    assert!(matches!(session.parse(&[0; 5]), ClientFrame::Violation(_)));
}

proptest! {
    #[test]
    fn whatever_the_header_what_passes_lies_within_the_export(
        flags in any::<u16>(), command in 0u16..9, handle in any::<u64>(),
        offset in prop_oneof![any::<u64>(), 0..SIZE + 8192], len in prop_oneof![any::<u32>(), 0u32..8192],
    ) {
        let mut session = session();
        let header = RequestHeader { flags, command, handle, offset, len };
        if let ClientFrame::Request(request) = session.parse(&header.encode()) {
            prop_assert_eq!(request.handle, handle);
            prop_assert_eq!(request.op == FrontOp::Write, command == NBD_CMD_WRITE);
            if request.error.is_none() {
                prop_assert!(request.offset + request.len <= SIZE);
                prop_assert!(request.len > 0 || request.op == FrontOp::Flush);
            }
            if request.op == FrontOp::Write {
                prop_assert_eq!(request.payload, u64::from(len), "a write's payload has the header's length");
            }
        } else {
            prop_assert_eq!(command, NBD_CMD_DISC);
        }
    }

    /// The model is the table of docs/nbd.md: what of a request is refused, with which error.
    #[test]
    fn a_request_is_refused_exactly_for_the_reasons_of_the_table(
        flags in prop_oneof![4 => 0u16..4, 1 => any::<u16>()], command in 0u16..9,
        offset in prop_oneof![0u64..9000, SIZE - 9000..SIZE + 9000, any::<u64>()],
        len in prop_oneof![0u32..9000, PAYLOAD_MAX_DEFAULT - 5..PAYLOAD_MAX_DEFAULT + 5, any::<u32>()],
        align in prop::sample::select(vec![1u32, 512, 4096]), snap in any::<bool>(), read_only in any::<bool>(),
    ) {
        let (offset, len) = if snap {
            (offset / u64::from(align) * u64::from(align), len / align * align)
        } else {
            (offset, len)
        };
        let export = ExportInfo { min_block: align, read_only, ..ExportInfo::new("vol0", SIZE) };
        let header = RequestHeader { flags, command, handle: 3, offset, len };
        let ClientFrame::Request(request) = Session::new(&export, Replies::Simple).parse(&header.encode()) else {
            prop_assert_eq!(command, NBD_CMD_DISC);
            return Ok(());
        };
        let writes = [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES].contains(&command);
        // No context was chosen, so it is always refused.
        let status = command == NBD_CMD_BLOCK_STATUS;
        let known = writes || [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_CACHE].contains(&command);
        let allowed = if command == NBD_CMD_WRITE_ZEROES { 0b11 } else { 0b01 };
        let malformed = !known || flags & !allowed != 0;
        let aligned = offset % u64::from(align) == 0 && len % align == 0;
        let long = [NBD_CMD_READ, NBD_CMD_WRITE].contains(&command) && len > 32 << 20;
        let past = u128::from(offset) + u128::from(len) > u128::from(SIZE);
        let expected = if malformed {
            Some(ClientError::Invalid)
        } else if command == NBD_CMD_FLUSH {
            (offset != 0 || len != 0).then_some(ClientError::Invalid)
        } else if writes && read_only || len == 0 || !aligned || long {
            Some(ClientError::Invalid)
        } else if past && [NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES].contains(&command) {
            Some(ClientError::NoSpace)
        } else {
            past.then_some(ClientError::Invalid)
        };
        prop_assert_eq!(request.error, expected);
        prop_assert_eq!((request.offset, request.len), (offset, if known || status { u64::from(len) } else { 0 }));
        prop_assert_eq!(request.fua, (known || status) && flags & NBD_CMD_FLAG_FUA != 0);
    }

    /// What an extended header says is refused for the same reasons as the compact one that says the same; and
    /// whatever it says, as many bytes are thrown away as its flag announces.
    #[test]
    fn an_extended_request_is_judged_like_its_compact_counterpart(
        flags in prop_oneof![4 => 0u16..64, 1 => any::<u16>()], command in 0u16..9,
        offset in prop_oneof![0u64..9000, SIZE - 9000..SIZE + 9000, any::<u64>()],
        len in prop_oneof![0u64..9000, u64::from(PAYLOAD_MAX_DEFAULT) - 5..u64::from(PAYLOAD_MAX_DEFAULT) + 5,
            u64::from(u32::MAX) - 5..u64::from(u32::MAX) + 5, any::<u64>()],
        read_only in any::<bool>(),
    ) {
        let export = ExportInfo { read_only, ..ExportInfo::new("vol0", SIZE) };
        let of = |replies| Session::new(&export, replies).with_contexts(Contexts::all());
        let (mut wide, mut narrow) = (of(Replies::Extended), of(Replies::Structured));
        let announced = flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        let request = match frame(&mut wide, command, flags, offset, len) {
            ClientFrame::Request(request) => request,
            ClientFrame::Disconnect => {
                prop_assert_eq!(command, NBD_CMD_DISC);
                return Ok(());
            }
            ClientFrame::Violation(_) => {
                prop_assert!(announced && len > u64::from(u32::MAX));
                return Ok(());
            }
        };
        prop_assert_eq!(request.payload, if announced { len } else { 0 });
        prop_assert_eq!((request.handle, request.offset), (42, offset));
        if announced != (command == NBD_CMD_WRITE) {
            prop_assert_eq!(request.error, Some(ClientError::Invalid));
        } else if let Ok(len) = u32::try_from(len) {
            let flags = flags & !NBD_CMD_FLAG_PAYLOAD_LEN;
            let same = parse(&mut narrow, command, flags, offset, len);
            prop_assert_eq!(request, same);
        } else {
            prop_assert!(request.error.is_some(), "no export of 1 GiB has a range of more than 4");
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = session().parse(&bytes);
        let _ = extended().parse(&bytes);
    }
}
