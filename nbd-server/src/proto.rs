//! The constants and fixed-size structures of the NBD protocol, under the specification's own names.
//!
//! Pure data: nothing here decides anything. All numbers travel in network byte order. What of the
//! specification is supported, and what is refused, is listed in `docs/nbd.md`.

use std::fmt;

use blkrepl_engine::replica::ClientError;

/// First 8 bytes of a server's greeting.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second 8 bytes of the greeting, and the first of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// First 8 bytes of every option reply.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of every request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of every simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of every chunk of a structured reply.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First 4 bytes of every request with an extended header.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First 4 bytes of every chunk of a reply with an extended header.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the 124 zeroes after `NBD_OPT_EXPORT_NAME` can be left out.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: leave out the 124 zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: nothing can be written.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` works.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` works.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: the export lies on a disk that turns, so that order matters.
pub const NBD_FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: `NBD_CMD_TRIM` works.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` works.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` works. Only where replies come in chunks.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: flush and FUA hold across connections.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` works.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: `NBD_CMD_FLAG_FAST_ZERO` is understood.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// Option: choose an export, no error possible.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: start TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: describe an export and go on with it.
pub const NBD_OPT_GO: u32 = 7;
/// Option: structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: extended headers.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;
/// Option of blkrepl: which nodes have a volume, and which of them is primary. Data: the volume's name.
pub const NBD_OPT_BLKREPL_NODES: u32 = 0x424c_0001;
/// Option of blkrepl: the connection belongs to a client session. Data: the session's id, 16 bytes, and its
/// generation, 8 bytes.
pub const NBD_OPT_BLKREPL_SESSION: u32 = 0x424c_0002;

/// Option reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of the list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one piece of information on an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Set in every reply that is an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Option reply: unknown option.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR + 1;
/// Option reply: understood, but not allowed here and now.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR + 2;
/// Option reply: malformed.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR + 3;
/// Option reply: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR + 6;
/// Option reply: the server is stopping.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR + 7;
/// Option reply: request or reply too large.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR + 9;
/// Option reply: extended headers were agreed to, and there is no way back.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = NBD_REP_FLAG_ERROR + 10;

/// Information: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information: canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Information: description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;
/// Information of blkrepl: the lineage of the volume's content, 16 bytes.
pub const NBD_INFO_BLKREPL_LINEAGE: u16 = 0x424c;

/// Request: read.
pub const NBD_CMD_READ: u16 = 0;
/// Request: write.
pub const NBD_CMD_WRITE: u16 = 1;
/// Request: no more requests will come.
pub const NBD_CMD_DISC: u16 = 2;
/// Request: flush.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Request: trim.
pub const NBD_CMD_TRIM: u16 = 4;
/// Request: the range will be read soon.
pub const NBD_CMD_CACHE: u16 = 5;
/// Request: write zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Request: what the chosen metadata contexts say of the range.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: on stable storage before the reply.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of `NBD_CMD_WRITE_ZEROES`: keep the space allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of `NBD_CMD_READ`: the data in one chunk.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of `NBD_CMD_BLOCK_STATUS`: one extent of each metadata context.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of `NBD_CMD_WRITE_ZEROES`: fail rather than be slow. Not supported.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag with extended headers: the header's length is that of a payload which follows it.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Flag of a chunk: the last one of its reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing; the request is done.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: data of a read, with its offset.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: the part of a read from this offset on, so many bytes, is zeroes.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: what one metadata context says, lengths of 32 bits.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: what one metadata context says, lengths of 64 bits.
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: an error, with a text for people.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

/// Status flag of `base:allocation`: takes no space.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Status flag of `base:allocation`: reads as zeroes.
pub const NBD_STATE_ZERO: u32 = 1 << 1;
/// Status flag of `blkrepl:dirty`, not of the specification: a replica that is missing or not complete lacks some
/// of it.
pub const BLKREPL_STATE_DIRTY: u32 = 1 << 0;

/// Length of the greeting in bytes.
pub const GREETING_LEN: usize = 18;
/// Length of an option header in bytes.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of an option reply header in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// Length of a compact request header in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply's header in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a structured reply chunk's header in bytes.
pub const STRUCTURED_REPLY_LEN: usize = 20;
/// Length of an extended request header in bytes.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Length of an extended reply chunk's header in bytes.
pub const EXTENDED_REPLY_LEN: usize = 32;
/// Zeroes that follow the answer to `NBD_OPT_EXPORT_NAME` unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Longest string that the protocol allows, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// Largest payload of one request that every client may count on, in bytes: 32 MiB.
pub const PAYLOAD_MAX_DEFAULT: u32 = 32 << 20;

/// Error number of a reply. The protocol's own numbers, whatever the machine's errno are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum NbdErrno {
    /// `NBD_EPERM`: not allowed (a write to a read-only export).
    Perm,
    /// `NBD_EIO`: no replica could do it.
    Io,
    /// `NBD_ENOMEM`.
    NoMem,
    /// `NBD_EINVAL`: malformed, unknown, or outside the export.
    Inval,
    /// `NBD_ENOSPC`: no space, or written past the end of the export.
    NoSpc,
    /// `NBD_EOVERFLOW`.
    Overflow,
    /// `NBD_ENOTSUP`.
    NotSup,
    /// `NBD_ESHUTDOWN`: the server is stopping.
    Shutdown,
    /// A number that the specification does not know; to be treated like `NBD_EINVAL`.
    Other(u32),
}

impl NbdErrno {
    /// Its number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
            Self::Other(code) => code,
        }
    }

    /// Reads a number from the wire; `None` for 0, which is success.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            other => Self::Other(other),
        })
    }

    /// The one table that turns an error of the core into a number on the wire.
    #[must_use]
    pub fn of(error: ClientError) -> Self {
        match error {
            ClientError::Invalid => Self::Inval,
            ClientError::NoSpace => Self::NoSpc,
            ClientError::Shutdown => Self::Shutdown,
            ClientError::Unsupported => Self::NotSup,
            // `ClientError` may grow; whatever is not known here is an I/O error to a client.
            _ => Self::Io,
        }
    }
}

impl fmt::Display for NbdErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Perm => "NBD_EPERM (operation not permitted)",
            Self::Io => "NBD_EIO (input/output error)",
            Self::NoMem => "NBD_ENOMEM (out of memory)",
            Self::Inval => "NBD_EINVAL (invalid request)",
            Self::NoSpc => "NBD_ENOSPC (no space left, or past the end of the export)",
            Self::Overflow => "NBD_EOVERFLOW (value too large)",
            Self::NotSup => "NBD_ENOTSUP (not supported)",
            Self::Shutdown => "NBD_ESHUTDOWN (server is stopping)",
            Self::Other(code) => return write!(f, "error number {code} that NBD does not define"),
        })
    }
}

/// A compact request header as it stands on the wire, without its magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags, `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// Command, `NBD_CMD_*`.
    pub command: u16,
    /// The client's name for the request (the specification's "cookie", formerly "handle").
    pub handle: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl RequestHeader {
    /// The header as it goes over the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        put_head(&mut out, NBD_REQUEST_MAGIC, self.flags, self.command, self.handle);
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Reads a header; `Err` gives the magic that stood there instead of `NBD_REQUEST_MAGIC`.
    ///
    /// # Errors
    /// The wrong magic.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, u32> {
        let magic = be32(bytes, 0);
        if magic != NBD_REQUEST_MAGIC {
            return Err(magic);
        }
        Ok(Self {
            flags: be16(bytes, 4),
            command: be16(bytes, 6),
            handle: be64(bytes, 8),
            offset: be64(bytes, 16),
            len: be32(bytes, 24),
        })
    }
}

/// An extended request header as it stands on the wire, without its magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedRequestHeader {
    /// Command flags, `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// Command, `NBD_CMD_*`.
    pub command: u16,
    /// The client's name for the request.
    pub handle: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes: of the payload behind the header with `NBD_CMD_FLAG_PAYLOAD_LEN`, else of the export.
    pub len: u64,
}

impl ExtendedRequestHeader {
    /// The header as it goes over the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let mut out = [0; EXTENDED_REQUEST_LEN];
        put_head(&mut out, NBD_EXTENDED_REQUEST_MAGIC, self.flags, self.command, self.handle);
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..32].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// Reads a header; `Err` gives the magic that stood there instead of `NBD_EXTENDED_REQUEST_MAGIC`.
    ///
    /// # Errors
    /// The wrong magic.
    pub fn decode(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Self, u32> {
        let magic = be32(bytes, 0);
        if magic != NBD_EXTENDED_REQUEST_MAGIC {
            return Err(magic);
        }
        Ok(Self {
            flags: be16(bytes, 4),
            command: be16(bytes, 6),
            handle: be64(bytes, 8),
            offset: be64(bytes, 16),
            len: be64(bytes, 24),
        })
    }
}

/// What requests and chunks of both forms begin with.
fn put_head(out: &mut [u8], magic: u32, flags: u16, kind: u16, handle: u64) {
    out[0..4].copy_from_slice(&magic.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&handle.to_be_bytes());
}

impl From<RequestHeader> for ExtendedRequestHeader {
    fn from(header: RequestHeader) -> Self {
        let RequestHeader { flags, command, handle, offset, len } = header;
        Self { flags, command, handle, offset, len: u64::from(len) }
    }
}

/// A simple reply's header as it goes over the wire; error 0 is success.
#[must_use]
pub fn encode_simple_reply(error: Option<NbdErrno>, handle: u64) -> [u8; SIMPLE_REPLY_LEN] {
    let mut out = [0; SIMPLE_REPLY_LEN];
    out[0..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, NbdErrno::code).to_be_bytes());
    out[8..16].copy_from_slice(&handle.to_be_bytes());
    out
}

/// Reads a simple reply's header: error (if any) and handle.
///
/// # Errors
/// The magic that stood there instead of `NBD_SIMPLE_REPLY_MAGIC`.
pub fn decode_simple_reply(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<(Option<NbdErrno>, u64), u32> {
    let magic = be32(bytes, 0);
    if magic != NBD_SIMPLE_REPLY_MAGIC {
        return Err(magic);
    }
    Ok((NbdErrno::from_code(be32(bytes, 4)), be64(bytes, 8)))
}

/// A chunk header of a structured reply as it goes over the wire. `len`: bytes of payload behind it.
#[must_use]
pub fn encode_chunk(flags: u16, kind: u16, handle: u64, len: u32) -> [u8; STRUCTURED_REPLY_LEN] {
    let mut out = [0; STRUCTURED_REPLY_LEN];
    put_head(&mut out, NBD_STRUCTURED_REPLY_MAGIC, flags, kind, handle);
    out[16..20].copy_from_slice(&len.to_be_bytes());
    out
}

/// A chunk header of an extended reply as it goes over the wire. `offset`: that of the request. `len`: bytes of
/// payload behind it.
#[must_use]
pub fn encode_extended_chunk(
    flags: u16,
    kind: u16,
    handle: u64,
    offset: u64,
    len: u64,
) -> [u8; EXTENDED_REPLY_LEN] {
    let mut out = [0; EXTENDED_REPLY_LEN];
    put_head(&mut out, NBD_EXTENDED_REPLY_MAGIC, flags, kind, handle);
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..32].copy_from_slice(&len.to_be_bytes());
    out
}

/// A string as the specification defines it: UTF-8, no NUL, at most 4096 bytes.
pub(crate) fn parse_string(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (text.len() <= STRING_BYTES_MAX && !text.contains('\0')).then_some(text)
}

/// The 16 bits at `at`. The caller has checked the length.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(fixed(bytes, at))
}

/// The 32 bits at `at`. The caller has checked the length.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(fixed(bytes, at))
}

/// The 64 bits at `at`. The caller has checked the length.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(fixed(bytes, at))
}

fn fixed<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes fits an array of N bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Any request header is the specification's fields in network byte order, one after the other.
        #[test]
        fn any_request_header_is_its_fields_in_order(
            flags in any::<u16>(), command in any::<u16>(), handle in any::<u64>(), offset in any::<u64>(),
            len in any::<u32>(), at in 0..4usize, flip in 1u8..,
        ) {
            let header = RequestHeader { flags, command, handle, offset, len };
            let mut bytes = header.encode();
            let expected = [
                &[0x25, 0x60, 0x95, 0x13][..], &flags.to_be_bytes(), &command.to_be_bytes(), &handle.to_be_bytes(),
                &offset.to_be_bytes(), &len.to_be_bytes(),
            ];
            prop_assert_eq!(&bytes[..], expected.concat());
            prop_assert_eq!(RequestHeader::decode(&bytes), Ok(header));
            bytes[at] ^= flip;
            prop_assert_eq!(RequestHeader::decode(&bytes), Err(be32(&bytes, 0)));
        }

        /// The same of extended headers, of requests and of replies.
        #[test]
        fn any_extended_header_is_its_fields_in_order(
            flags in any::<u16>(), command in any::<u16>(), handle in any::<u64>(), offset in any::<u64>(),
            len in any::<u64>(), at in 0..4usize, flip in 1u8..,
        ) {
            let header = ExtendedRequestHeader { flags, command, handle, offset, len };
            let mut bytes = header.encode();
            let fields = [
                &flags.to_be_bytes()[..], &command.to_be_bytes(), &handle.to_be_bytes(), &offset.to_be_bytes(),
                &len.to_be_bytes(),
            ].concat();
            prop_assert_eq!(&bytes[..], [&[0x21, 0xe4, 0x1c, 0x71][..], &fields].concat());
            prop_assert_eq!(ExtendedRequestHeader::decode(&bytes), Ok(header));
            let chunk = encode_extended_chunk(flags, command, handle, offset, len);
            prop_assert_eq!(&chunk[..], [&[0x6e, 0x8a, 0x27, 0x8c][..], &fields].concat());
            bytes[at] ^= flip;
            prop_assert_eq!(ExtendedRequestHeader::decode(&bytes), Err(be32(&bytes, 0)));
        }

        /// The same of replies. Every number but 0 is an error, and stays the number that it was.
        #[test]
        fn any_reply_header_is_its_fields_in_order(
            code in prop_oneof![0u32..120, any::<u32>()], handle in any::<u64>(), at in 0..4usize, flip in 1u8..,
        ) {
            let error = NbdErrno::from_code(code);
            prop_assert_eq!(error.map_or(0, NbdErrno::code), code);
            let mut bytes = encode_simple_reply(error, handle);
            let expected = [&[0x67, 0x44, 0x66, 0x98][..], &code.to_be_bytes(), &handle.to_be_bytes()];
            prop_assert_eq!(&bytes[..], expected.concat());
            prop_assert_eq!(decode_simple_reply(&bytes), Ok((error, handle)));
            bytes[at] ^= flip;
            prop_assert_eq!(decode_simple_reply(&bytes), Err(be32(&bytes, 0)));
        }
    }

    #[test]
    fn magics_are_the_letters_of_the_specification() {
        assert_eq!(&NBDMAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&IHAVEOPT.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn request_and_reply_headers_survive_the_wire() {
        let request = RequestHeader {
            flags: NBD_CMD_FLAG_FUA,
            command: NBD_CMD_WRITE,
            handle: 0x0102_0304_0506_0708,
            offset: u64::MAX - 1,
            len: 4096,
        };
        assert_eq!(RequestHeader::decode(&request.encode()), Ok(request));
        let mut damaged = request.encode();
        damaged[0] ^= 1;
        assert_eq!(RequestHeader::decode(&damaged), Err(NBD_REQUEST_MAGIC ^ 0x0100_0000));

        let reply = encode_simple_reply(Some(NbdErrno::NoSpc), 7);
        assert_eq!(decode_simple_reply(&reply), Ok((Some(NbdErrno::NoSpc), 7)));
        assert_eq!(decode_simple_reply(&encode_simple_reply(None, 9)), Ok((None, 9)));
    }

    #[test]
    fn error_numbers_are_those_of_the_specification() {
        let table = [(1, NbdErrno::Perm), (5, NbdErrno::Io), (12, NbdErrno::NoMem), (22, NbdErrno::Inval)];
        let more = [(28, NbdErrno::NoSpc), (75, NbdErrno::Overflow), (95, NbdErrno::NotSup)];
        for (code, errno) in table.into_iter().chain(more).chain([(108, NbdErrno::Shutdown)]) {
            assert_eq!(errno.code(), code);
            assert_eq!(NbdErrno::from_code(code), Some(errno));
        }
        assert_eq!(NbdErrno::from_code(0), None);
        assert_eq!(NbdErrno::from_code(13), Some(NbdErrno::Other(13)));
    }

    #[test]
    fn every_error_of_the_core_has_a_number() {
        assert_eq!(NbdErrno::of(ClientError::Invalid), NbdErrno::Inval);
        assert_eq!(NbdErrno::of(ClientError::Io), NbdErrno::Io);
        assert_eq!(NbdErrno::of(ClientError::NoSpace), NbdErrno::NoSpc);
        assert_eq!(NbdErrno::of(ClientError::Shutdown), NbdErrno::Shutdown);
        assert_eq!(NbdErrno::of(ClientError::Unsupported), NbdErrno::NotSup);
    }
}
