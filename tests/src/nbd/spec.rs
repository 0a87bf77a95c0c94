//! Numbers of the NBD specification, by its own names, and the lengths of its headers. Copied from its text by
//! value, so that they do not follow an error in the server's.
#![allow(missing_docs, reason = "the specification says what each is")]

pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1;
pub const NBD_FLAG_NO_ZEROES: u16 = 2;
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1;
pub const NBD_FLAG_C_NO_ZEROES: u32 = 2;

pub const NBD_FLAG_HAS_FLAGS: u16 = 0x1;
pub const NBD_FLAG_READ_ONLY: u16 = 0x2;
pub const NBD_FLAG_SEND_FLUSH: u16 = 0x4;
pub const NBD_FLAG_SEND_FUA: u16 = 0x8;
pub const NBD_FLAG_SEND_TRIM: u16 = 0x20;
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 0x40;
pub const NBD_FLAG_SEND_DF: u16 = 0x80;
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 0x100;
pub const NBD_FLAG_SEND_CACHE: u16 = 0x400;
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 0x800;
pub const NBD_FLAG_ROTATIONAL: u16 = 0x10;

pub const NBD_OPT_EXPORT_NAME: u32 = 1;
pub const NBD_OPT_ABORT: u32 = 2;
pub const NBD_OPT_LIST: u32 = 3;
pub const NBD_OPT_PEEK_EXPORT: u32 = 4;
pub const NBD_OPT_STARTTLS: u32 = 5;
pub const NBD_OPT_INFO: u32 = 6;
pub const NBD_OPT_GO: u32 = 7;
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

pub const NBD_REP_ACK: u32 = 1;
pub const NBD_REP_SERVER: u32 = 2;
pub const NBD_REP_INFO: u32 = 3;
pub const NBD_REP_META_CONTEXT: u32 = 4;
pub const NBD_REP_FLAG_ERROR: u32 = 0x8000_0000;
pub const NBD_REP_ERR_UNSUP: u32 = 0x8000_0001;
pub const NBD_REP_ERR_POLICY: u32 = 0x8000_0002;
pub const NBD_REP_ERR_INVALID: u32 = 0x8000_0003;
pub const NBD_REP_ERR_UNKNOWN: u32 = 0x8000_0006;
pub const NBD_REP_ERR_TOO_BIG: u32 = 0x8000_0009;
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;

pub const NBD_INFO_EXPORT: u16 = 0;
pub const NBD_INFO_NAME: u16 = 1;
pub const NBD_INFO_DESCRIPTION: u16 = 2;
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

pub const NBD_CMD_READ: u16 = 0;
pub const NBD_CMD_WRITE: u16 = 1;
pub const NBD_CMD_DISC: u16 = 2;
pub const NBD_CMD_FLUSH: u16 = 3;
pub const NBD_CMD_TRIM: u16 = 4;
pub const NBD_CMD_CACHE: u16 = 5;
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;
pub const NBD_CMD_RESIZE: u16 = 8;

pub const NBD_CMD_FLAG_FUA: u16 = 0x1;
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 0x2;
pub const NBD_CMD_FLAG_DF: u16 = 0x4;
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 0x8;
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 0x10;
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 0x20;

pub const NBD_REPLY_FLAG_DONE: u16 = 1;
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
pub const NBD_REPLY_TYPE_ERROR: u16 = 0x8001;

pub const NBD_STATE_HOLE: u64 = 1;
pub const NBD_STATE_ZERO: u64 = 2;

pub const NBD_EINVAL: u32 = 22;
pub const NBD_ENOTSUP: u32 = 95;
pub const NBD_ENOSPC: u32 = 28;
/// Error numbers that the specification gives to servers.
pub const ERRORS: [u32; 8] = [1, 5, 12, NBD_EINVAL, NBD_ENOSPC, 75, NBD_ENOTSUP, 108];

pub const STRING_MAX: usize = 4096;

/// A number of any length in network byte order.
#[must_use]
pub fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// One of at most 32 bits.
#[must_use]
pub fn short(bytes: &[u8]) -> u32 {
    u32::try_from(number(bytes) & 0xffff_ffff).unwrap_or(u32::MAX)
}

/// One of at most 16 bits.
#[must_use]
pub fn tiny(bytes: &[u8]) -> u16 {
    u16::try_from(number(bytes) & 0xffff).unwrap_or(u16::MAX)
}
