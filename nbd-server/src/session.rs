//! The transmission phase of one connection: request headers in, reply headers out.
//!
//! Pure: no I/O, no payload bytes, no memory of requests. It checks everything about a request that can be
//! known from its header and the export, so that what it hands on without an error lies within the export.
//! It never closes a connection for a request that is merely refused; only a wrong magic does, because then
//! nothing on the stream can be trusted any more.

use blkrepl_engine::reactor::client::{Answer, ClientFrame, ClientProtocol, FrontOp, FrontRequest};
use blkrepl_engine::replica::ClientError;

use crate::export::{ExportInfo, Replies};
use crate::proto::{self, NbdErrno, REQUEST_LEN, RequestHeader};

/// Codec of a connection. With structured replies a read is answered by one chunk that has all of its data, every
/// error by a chunk with a text; what is done without data is answered by a simple reply, as the specification
/// allows.
#[derive(Clone, Debug)]
pub struct Session {
    size: u64,
    min_block: u32,
    max_payload: u32,
    read_only: bool,
    replies: Replies,
}

impl Session {
    /// A session on `export`, as it was announced to the client, with the replies that were agreed to.
    #[must_use]
    pub fn new(export: &ExportInfo, replies: Replies) -> Self {
        Self {
            size: export.size,
            min_block: export.min_block.max(1),
            max_payload: export.max_payload,
            read_only: export.read_only,
            replies,
        }
    }

    fn request(&self, header: &RequestHeader) -> FrontRequest {
        let op = match header.command {
            proto::NBD_CMD_READ => FrontOp::Read,
            proto::NBD_CMD_WRITE => FrontOp::Write,
            proto::NBD_CMD_FLUSH => FrontOp::Flush,
            proto::NBD_CMD_TRIM => FrontOp::Trim,
            proto::NBD_CMD_WRITE_ZEROES => FrontOp::WriteZeroes,
            proto::NBD_CMD_CACHE => FrontOp::Cache,
            _ => return refused(header.handle),
        };
        FrontRequest {
            handle: header.handle,
            op,
            offset: header.offset,
            len: u64::from(header.len),
            payload: if op == FrontOp::Write { u64::from(header.len) } else { 0 },
            fua: header.flags & proto::NBD_CMD_FLAG_FUA != 0,
            error: self.check(op, header).err(),
        }
    }

    fn check(&self, op: FrontOp, header: &RequestHeader) -> Result<(), ClientError> {
        let known = match op {
            FrontOp::WriteZeroes => proto::NBD_CMD_FLAG_FUA | proto::NBD_CMD_FLAG_NO_HOLE,
            FrontOp::Read if self.replies == Replies::Structured => {
                proto::NBD_CMD_FLAG_FUA | proto::NBD_CMD_FLAG_DF
            }
            _ => proto::NBD_CMD_FLAG_FUA,
        };
        if header.flags & !known != 0 {
            return Err(ClientError::Invalid);
        }
        if op == FrontOp::Flush {
            // Offset and length of a flush are reserved.
            return if header.offset == 0 && header.len == 0 { Ok(()) } else { Err(ClientError::Invalid) };
        }
        if self.read_only && !matches!(op, FrontOp::Read | FrontOp::Cache) {
            return Err(ClientError::Invalid);
        }
        // The specification leaves a length of 0 open (but for not disconnecting). It is refused, so that
        // nobody takes an empty write with FUA for a flush.
        let align = u64::from(self.min_block);
        if header.len == 0
            || !header.offset.is_multiple_of(align)
            || !u64::from(header.len).is_multiple_of(align)
        {
            return Err(ClientError::Invalid);
        }
        if matches!(op, FrontOp::Read | FrontOp::Write) && header.len > self.max_payload {
            return Err(ClientError::Invalid);
        }
        let inside = header.offset.checked_add(u64::from(header.len)).is_some_and(|end| end <= self.size);
        match op {
            _ if inside => Ok(()),
            FrontOp::Write | FrontOp::WriteZeroes => Err(ClientError::NoSpace),
            _ => Err(ClientError::Invalid),
        }
    }

    fn errno(&self, error: ClientError, op: FrontOp) -> NbdErrno {
        let writes = matches!(op, FrontOp::Write | FrontOp::Trim | FrontOp::WriteZeroes);
        match error {
            // On a read-only export every write is refused for this one reason.
            ClientError::Invalid if writes && self.read_only => NbdErrno::Perm,
            error => NbdErrno::of(error),
        }
    }
}

/// A request that is not known at all: it has no payload (none can be known), so nothing is drained.
fn refused(handle: u64) -> FrontRequest {
    let error = Some(ClientError::Invalid);
    FrontRequest { handle, op: FrontOp::Flush, offset: 0, len: 0, payload: 0, fua: false, error }
}

impl ClientProtocol for Session {
    fn header_len(&self) -> usize {
        REQUEST_LEN
    }

    fn parse(&mut self, header: &[u8]) -> ClientFrame {
        let Ok(bytes) = <&[u8; REQUEST_LEN]>::try_from(header) else {
            return ClientFrame::Violation(format!(
                "request header of {} bytes instead of {REQUEST_LEN}",
                header.len()
            ));
        };
        match RequestHeader::decode(bytes) {
            Ok(header) if header.command == proto::NBD_CMD_DISC => ClientFrame::Disconnect,
            Ok(header) => ClientFrame::Request(self.request(&header)),
            Err(magic) => ClientFrame::Violation(format!(
                "request begins with {magic:#010x} instead of {:#010x}; the client has lost its place",
                proto::NBD_REQUEST_MAGIC
            )),
        }
    }

    fn can_say_zeroes(&self) -> bool {
        self.replies == Replies::Structured
    }

    fn reply(&mut self, request: &FrontRequest, answer: Answer<'_>, out: &mut Vec<u8>) {
        let structured = self.replies == Replies::Structured;
        match answer {
            Answer::Data if structured => put_data_header(request, out),
            Answer::Zeroes => put_hole(request, out),
            Answer::Extents(_) => unreachable!("no metadata context was agreed to"),
            Answer::Done | Answer::Data => {
                out.extend_from_slice(&proto::encode_simple_reply(None, request.handle));
            }
            Answer::Error(error) => {
                let error = self.errno(error, request.op);
                if structured {
                    put_error_chunk(request.handle, error, out);
                } else {
                    out.extend_from_slice(&proto::encode_simple_reply(Some(error), request.handle));
                }
            }
        }
    }
}

/// What goes before the data of a read, all of it in one chunk.
fn put_data_header(request: &FrontRequest, out: &mut Vec<u8>) {
    let len = 8 + payload_len(request); // the offset, and the data
    let (done, kind) = (proto::NBD_REPLY_FLAG_DONE, proto::NBD_REPLY_TYPE_OFFSET_DATA);
    out.extend_from_slice(&proto::encode_chunk(done, kind, request.handle, len));
    out.extend_from_slice(&request.offset.to_be_bytes());
}

/// A read that brought zeroes only.
fn put_hole(request: &FrontRequest, out: &mut Vec<u8>) {
    let (done, kind) = (proto::NBD_REPLY_FLAG_DONE, proto::NBD_REPLY_TYPE_OFFSET_HOLE);
    out.extend_from_slice(&proto::encode_chunk(done, kind, request.handle, 8 + 4));
    out.extend_from_slice(&request.offset.to_be_bytes());
    out.extend_from_slice(&payload_len(request).to_be_bytes());
}

fn payload_len(request: &FrontRequest) -> u32 {
    u32::try_from(request.len).expect("a read fits one payload")
}

fn put_error_chunk(handle: u64, error: NbdErrno, out: &mut Vec<u8>) {
    let text = error.to_string();
    let len = u16::try_from(text.len()).expect("a text of ours has some tens of bytes");
    let (done, kind) = (proto::NBD_REPLY_FLAG_DONE, proto::NBD_REPLY_TYPE_ERROR);
    out.extend_from_slice(&proto::encode_chunk(done, kind, handle, 4 + 2 + u32::from(len)));
    out.extend_from_slice(&error.code().to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::*;

    const SIZE: u64 = 1 << 30;

    fn session() -> Session {
        Session::new(&ExportInfo::new("vol0", SIZE), Replies::Simple)
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
        let expected = FrontRequest {
            handle: 42,
            op: FrontOp::Write,
            offset: 4096,
            len: 512,
            payload: 512,
            fua: true,
            error: None,
        };
        assert_eq!(request, expected);
        assert_eq!(error(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, 4096), None);
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
        for command in [7, 8, 9, 255, u16::MAX] {
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
                    prop_assert_eq!(request.payload, u64::from(len), "a write's payload always has the header's length");
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
            prop_assert_eq!((request.offset, request.len), if known { (offset, u64::from(len)) } else { (0, 0) });
            prop_assert_eq!(request.fua, known && flags & NBD_CMD_FLAG_FUA != 0);
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = session().parse(&bytes);
        }
    }
}
