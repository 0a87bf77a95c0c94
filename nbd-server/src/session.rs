//! The transmission phase of one connection: request headers in, reply headers out.
//!
//! Pure: no I/O, no payload bytes, no memory of requests. It checks everything about a request that can be
//! known from its header and the export, so that what it hands on without an error lies within the export.
//! It never closes a connection for a request that is merely refused; only a wrong magic does, because then
//! nothing on the stream can be trusted any more, and a payload so long that nobody means it.

use std::sync::Arc;

use blkrepl_engine::reactor::client::{Answer, ClientFrame, ClientProtocol, End, FrontOp, FrontRequest};
use blkrepl_engine::replica::ClientError;
use blkrepl_engine::types::Extent;

use crate::context::{Contexts, Descriptors, MetaContext};
use crate::export::{ExportInfo, Replies};
use crate::misbehaviour::Guest;
use crate::negotiate::Terms;
use crate::proto::{
    self, EXTENDED_REQUEST_LEN, ExtendedRequestHeader as Header, NbdErrno, REQUEST_LEN, RequestHeader,
};

/// Flags of the last chunk of a reply.
const LAST: u16 = proto::NBD_REPLY_FLAG_DONE;
/// Most bytes in one descriptor of 32 bits: the most that is a multiple of any smallest block.
const DESCRIPTOR_LEN_MAX: u32 = u32::MAX - 0xffff;

/// Codec of a connection. With structured replies a read is answered by one chunk that has all of its data, every
/// error by a chunk with a text; what is done without data is answered by a simple reply, as the specification
/// allows. With extended headers every reply is chunks. The block status is one chunk for each context.
#[derive(Clone, Debug)]
pub struct Session {
    size: u64,
    min_block: u32,
    max_payload: u32,
    read_only: bool,
    fast_zero: bool,
    replies: Replies,
    contexts: Contexts,
    /// Whose connection it is; `None` where nobody counts.
    guest: Option<Arc<Guest>>,
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
            fast_zero: export.fast_zero,
            replies,
            contexts: Contexts::NONE,
            guest: None,
        }
    }

    /// A session on the terms that a negotiation came to.
    #[must_use]
    pub fn on(terms: &Terms) -> Self {
        Self::new(&terms.export, terms.replies).with_contexts(terms.contexts)
    }

    /// The same with the metadata contexts that the client has chosen. Simple replies cannot say what they say, so
    /// there are none.
    #[must_use]
    pub fn with_contexts(mut self, contexts: Contexts) -> Self {
        self.contexts = if self.replies == Replies::Simple { Contexts::NONE } else { contexts };
        self
    }

    /// The same for a client whose place is given back when the session is dropped, and whose mistakes are counted.
    #[must_use]
    pub(crate) fn with_guest(mut self, guest: Guest) -> Self {
        self.guest = Some(Arc::new(guest));
        self
    }

    /// Reads a request header of either form. The text of an error says what stands there instead of one.
    fn decode(&self, header: &[u8]) -> Result<Header, String> {
        let wrong_len =
            |_| format!("request header of {} bytes instead of {}", header.len(), self.header_len());
        let (decoded, magic) = if self.replies == Replies::Extended {
            let bytes = <&[u8; EXTENDED_REQUEST_LEN]>::try_from(header).map_err(wrong_len)?;
            (Header::decode(bytes), proto::NBD_EXTENDED_REQUEST_MAGIC)
        } else {
            let bytes = <&[u8; REQUEST_LEN]>::try_from(header).map_err(wrong_len)?;
            (RequestHeader::decode(bytes).map(Header::from), proto::NBD_REQUEST_MAGIC)
        };
        decoded.map_err(|found| {
            format!(
                "request begins with {found:#010x} instead of {magic:#010x}; the client has lost its place"
            )
        })
    }

    fn frame(&self, header: &Header) -> ClientFrame {
        if header.command == proto::NBD_CMD_DISC {
            return ClientFrame::Disconnect;
        }
        let payload = self.payload(header);
        if payload > u64::from(u32::MAX) {
            return ClientFrame::Violation(format!(
                "a request with {payload} bytes of payload; none may have more than {}",
                u32::MAX
            ));
        }
        ClientFrame::Request(self.request(header, payload))
    }

    /// Bytes that follow the header. With extended headers a flag says that there are some, else the command.
    fn payload(&self, header: &Header) -> u64 {
        let follows = match self.replies {
            Replies::Extended => header.flags & proto::NBD_CMD_FLAG_PAYLOAD_LEN != 0,
            Replies::Simple | Replies::Structured => header.command == proto::NBD_CMD_WRITE,
        };
        if follows { header.len } else { 0 }
    }

    fn request(&self, header: &Header, payload: u64) -> FrontRequest {
        let op = match header.command {
            proto::NBD_CMD_READ => FrontOp::Read,
            proto::NBD_CMD_WRITE => FrontOp::Write,
            proto::NBD_CMD_FLUSH => FrontOp::Flush,
            proto::NBD_CMD_TRIM => FrontOp::Trim,
            proto::NBD_CMD_WRITE_ZEROES => FrontOp::WriteZeroes,
            proto::NBD_CMD_CACHE => FrontOp::Cache,
            proto::NBD_CMD_BLOCK_STATUS => FrontOp::BlockStatus,
            _ => return unknown(header, payload),
        };
        FrontRequest {
            handle: header.handle,
            op,
            offset: header.offset,
            len: header.len,
            payload,
            fua: header.flags & proto::NBD_CMD_FLAG_FUA != 0,
            no_hole: op == FrontOp::WriteZeroes && header.flags & proto::NBD_CMD_FLAG_NO_HOLE != 0,
            one: op == FrontOp::BlockStatus && header.flags & proto::NBD_CMD_FLAG_REQ_ONE != 0,
            error: self.check(op, header).err(),
        }
    }

    fn check(&self, op: FrontOp, header: &Header) -> Result<(), ClientError> {
        if header.flags & !self.flags_of(op) != 0 {
            return Err(ClientError::Invalid);
        }
        if op == FrontOp::Flush {
            // Offset and length of a flush are reserved.
            return if header.offset == 0 && header.len == 0 { Ok(()) } else { Err(ClientError::Invalid) };
        }
        if op == FrontOp::BlockStatus && self.contexts.is_empty() {
            return Err(ClientError::Invalid);
        }
        if self.read_only && matches!(op, FrontOp::Write | FrontOp::Trim | FrontOp::WriteZeroes) {
            return Err(ClientError::Invalid);
        }
        // The specification leaves a length of 0 open (but for not disconnecting). It is refused, so that
        // nobody takes an empty write with FUA for a flush.
        let align = u64::from(self.min_block);
        if header.len == 0 || !header.offset.is_multiple_of(align) || !header.len.is_multiple_of(align) {
            return Err(ClientError::Invalid);
        }
        if matches!(op, FrontOp::Read | FrontOp::Write) && header.len > u64::from(self.max_payload) {
            return Err(ClientError::Invalid);
        }
        // An extended write that does not say that its length is that of a payload has none.
        if op == FrontOp::Write && self.payload(header) == 0 {
            return Err(ClientError::Invalid);
        }
        let inside = header.offset.checked_add(header.len).is_some_and(|end| end <= self.size);
        // Zeroes that take their space are written out, like any others.
        let insists = header.flags & proto::NBD_CMD_FLAG_FAST_ZERO != 0;
        match op {
            _ if inside && insists && header.flags & proto::NBD_CMD_FLAG_NO_HOLE != 0 => {
                Err(ClientError::Unsupported)
            }
            _ if inside => Ok(()),
            FrontOp::Write | FrontOp::WriteZeroes => Err(ClientError::NoSpace),
            _ => Err(ClientError::Invalid),
        }
    }

    /// Command flags that belong to an operation in the negotiated form.
    fn flags_of(&self, op: FrontOp) -> u16 {
        let own = match op {
            FrontOp::WriteZeroes if self.fast_zero => {
                proto::NBD_CMD_FLAG_NO_HOLE | proto::NBD_CMD_FLAG_FAST_ZERO
            }
            FrontOp::WriteZeroes => proto::NBD_CMD_FLAG_NO_HOLE,
            FrontOp::Read if self.replies != Replies::Simple => proto::NBD_CMD_FLAG_DF,
            FrontOp::Write if self.replies == Replies::Extended => proto::NBD_CMD_FLAG_PAYLOAD_LEN,
            FrontOp::BlockStatus => proto::NBD_CMD_FLAG_REQ_ONE,
            _ => 0,
        };
        proto::NBD_CMD_FLAG_FUA | own
    }

    fn errno(&self, error: ClientError, op: FrontOp) -> NbdErrno {
        let writes = matches!(op, FrontOp::Write | FrontOp::Trim | FrontOp::WriteZeroes);
        match error {
            // On a read-only export every write is refused for this one reason.
            ClientError::Invalid if writes && self.read_only => NbdErrno::Perm,
            error => NbdErrno::of(error),
        }
    }

    /// Header of a chunk in the negotiated form. `flags`: [`LAST`], or 0 where more chunks follow. `len`: bytes
    /// of payload behind it.
    fn put_chunk(&self, request: &FrontRequest, flags: u16, kind: u16, len: u32, out: &mut Vec<u8>) {
        if self.replies == Replies::Extended {
            let (handle, offset) = (request.handle, request.offset);
            let len = u64::from(len);
            out.extend_from_slice(&proto::encode_extended_chunk(flags, kind, handle, offset, len));
        } else {
            out.extend_from_slice(&proto::encode_chunk(flags, kind, request.handle, len));
        }
    }

    /// What goes before the data of a read, all of it in one chunk.
    fn put_data_header(&self, request: &FrontRequest, out: &mut Vec<u8>) {
        let len = 8 + payload_len(request); // the offset, and the data
        self.put_chunk(request, LAST, proto::NBD_REPLY_TYPE_OFFSET_DATA, len, out);
        out.extend_from_slice(&request.offset.to_be_bytes());
    }

    /// A read that brought zeroes only.
    fn put_hole(&self, request: &FrontRequest, out: &mut Vec<u8>) {
        self.put_chunk(request, LAST, proto::NBD_REPLY_TYPE_OFFSET_HOLE, 8 + 4, out);
        out.extend_from_slice(&request.offset.to_be_bytes());
        out.extend_from_slice(&payload_len(request).to_be_bytes());
    }

    /// What the chosen metadata contexts say of the extents, a chunk for each.
    fn put_status(&self, request: &FrontRequest, extents: &[Extent], out: &mut Vec<u8>) {
        let last = self.contexts.iter().next_back();
        for context in self.contexts.iter() {
            let flags = if Some(context) == last { LAST } else { 0 };
            self.put_context(request, context, flags, extents, out);
        }
    }

    fn put_context(
        &self,
        request: &FrontRequest,
        context: MetaContext,
        flags: u16,
        extents: &[Extent],
        out: &mut Vec<u8>,
    ) {
        let extended = self.replies == Replies::Extended;
        let longest = if extended { u64::MAX } else { u64::from(DESCRIPTOR_LEN_MAX) };
        let wanted = if request.one { 1 } else { usize::MAX };
        let descriptors = Descriptors::new(context, extents, request.len, longest).take(wanted);
        let count = u32::try_from(descriptors.clone().count()).expect("some hundreds of extents at most");
        if extended {
            let kind = proto::NBD_REPLY_TYPE_BLOCK_STATUS_EXT;
            self.put_chunk(request, flags, kind, 4 + 4 + 16 * count, out);
            out.extend_from_slice(&context.id().to_be_bytes());
            out.extend_from_slice(&count.to_be_bytes());
            for (len, state) in descriptors {
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&u64::from(state).to_be_bytes());
            }
            return;
        }
        self.put_chunk(request, flags, proto::NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * count, out);
        out.extend_from_slice(&context.id().to_be_bytes());
        for (len, state) in descriptors {
            let len = u32::try_from(len).expect("a descriptor is cut to what 32 bits can say");
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(&state.to_be_bytes());
        }
    }

    fn put_error(&self, request: &FrontRequest, error: NbdErrno, out: &mut Vec<u8>) {
        if self.replies == Replies::Simple {
            out.extend_from_slice(&proto::encode_simple_reply(Some(error), request.handle));
            return;
        }
        let text = error.to_string();
        let len = u16::try_from(text.len()).expect("a text of ours has some tens of bytes");
        self.put_chunk(request, LAST, proto::NBD_REPLY_TYPE_ERROR, 4 + 2 + u32::from(len), out);
        out.extend_from_slice(&error.code().to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(text.as_bytes());
    }
}

/// A request whose command is not known. What follows its header is thrown away.
fn unknown(header: &Header, payload: u64) -> FrontRequest {
    FrontRequest {
        handle: header.handle,
        op: FrontOp::Flush,
        offset: header.offset,
        len: 0,
        payload,
        fua: false,
        no_hole: false,
        one: false,
        error: Some(ClientError::Invalid),
    }
}

fn payload_len(request: &FrontRequest) -> u32 {
    u32::try_from(request.len).expect("a read fits one payload")
}

impl ClientProtocol for Session {
    fn header_len(&self) -> usize {
        match self.replies {
            Replies::Extended => EXTENDED_REQUEST_LEN,
            Replies::Simple | Replies::Structured => REQUEST_LEN,
        }
    }

    fn parse(&mut self, header: &[u8]) -> ClientFrame {
        let frame = match self.decode(header) {
            Ok(header) => self.frame(&header),
            Err(text) => ClientFrame::Violation(text),
        };
        if let (ClientFrame::Violation(text), Some(guest)) = (&frame, &self.guest) {
            guest.broke_protocol(text);
        }
        frame
    }

    fn closed(&mut self, end: End) {
        if let Some(guest) = &self.guest {
            guest.was_closed(end);
        }
    }

    fn can_say_zeroes(&self) -> bool {
        self.replies != Replies::Simple
    }

    fn reply(&mut self, request: &FrontRequest, answer: Answer<'_>, out: &mut Vec<u8>) {
        match answer {
            Answer::Error(error) => {
                let error = self.errno(error, request.op);
                if let Some(guest) = &self.guest {
                    guest.was_refused(request, error);
                }
                self.put_error(request, error, out);
            }
            Answer::Data if self.replies != Replies::Simple => self.put_data_header(request, out),
            Answer::Zeroes => self.put_hole(request, out),
            Answer::Extents(extents) => self.put_status(request, extents, out),
            Answer::Done if self.replies == Replies::Extended => {
                self.put_chunk(request, LAST, proto::NBD_REPLY_TYPE_NONE, 0, out);
            }
            Answer::Done | Answer::Data => {
                out.extend_from_slice(&proto::encode_simple_reply(None, request.handle));
            }
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
