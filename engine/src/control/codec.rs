//! The one envelope around every control-plane value on disk or on the wire, and the only place that
//! names bincode: version byte, body length, CRC-32, then the body (fixed-width integers, no trailing
//! bytes). Lengths are checked before anything is allocated, checksums before anything is decoded.

use bincode::Options;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Version of the envelope and of the values in it.
pub const CODEC_VERSION: u8 = 2;
/// Bytes in front of the body.
pub const HEADER_LEN: usize = 9;
/// Longest body, in bytes.
pub const BODY_LEN_MAX: usize = 4 << 20;

/// Why bytes are not a value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// Fewer bytes than the header or its length says.
    #[error("control message is cut off: {have} bytes of {want}")]
    Short {
        /// Bytes there.
        have: usize,
        /// Bytes wanted.
        want: usize,
    },
    /// Another version.
    #[error(
        "control message has version {0}, this node speaks {CODEC_VERSION}; run one release on all nodes"
    )]
    Version(u8),
    /// Longer than allowed.
    #[error("control message of {0} bytes exceeds {BODY_LEN_MAX}")]
    TooLong(usize),
    /// Damaged.
    #[error("control message is damaged: its checksum does not match")]
    Checksum,
    /// The body is not a value of the type wanted.
    #[error("control message does not decode: {0}")]
    Body(String),
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the body in bytes, at most [`BODY_LEN_MAX`].
    pub len: usize,
    crc: u32,
}

fn options() -> impl Options {
    bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .with_limit(BODY_LEN_MAX as u64)
        .reject_trailing_bytes()
}

fn checksum(prefix: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(prefix);
    hasher.update(body);
    hasher.finalize()
}

/// Encodes a value with its envelope.
///
/// # Errors
/// [`CodecError::TooLong`] or [`CodecError::Body`] if the value does not fit the envelope.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let len = options().serialized_size(value).map_err(|e| CodecError::Body(e.to_string()))?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > BODY_LEN_MAX {
        return Err(CodecError::TooLong(len));
    }
    let mut out = vec![0; HEADER_LEN];
    out.reserve_exact(len);
    options().serialize_into(&mut out, value).map_err(|e| CodecError::Body(e.to_string()))?;
    let (header, body) = out.split_at_mut(HEADER_LEN);
    header[0] = CODEC_VERSION;
    let body_len = u32::try_from(body.len()).map_err(|_| CodecError::TooLong(len))?;
    header[1..5].copy_from_slice(&body_len.to_le_bytes());
    let crc = checksum(&header[..5], body);
    header[5..9].copy_from_slice(&crc.to_le_bytes());
    Ok(out)
}

/// Checks a header.
///
/// # Errors
/// [`CodecError::Version`] or [`CodecError::TooLong`].
pub fn decode_header(header: &[u8; HEADER_LEN]) -> Result<Header, CodecError> {
    if header[0] != CODEC_VERSION {
        return Err(CodecError::Version(header[0]));
    }
    let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > BODY_LEN_MAX {
        return Err(CodecError::TooLong(len));
    }
    Ok(Header { len, crc: u32::from_le_bytes([header[5], header[6], header[7], header[8]]) })
}

/// Decodes the body that belongs to `header`.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_body<T: DeserializeOwned>(header: Header, body: &[u8]) -> Result<T, CodecError> {
    if body.len() != header.len {
        return Err(CodecError::Short { have: body.len(), want: header.len });
    }
    let mut prefix = [CODEC_VERSION, 0, 0, 0, 0];
    let len = u32::try_from(header.len).map_err(|_| CodecError::TooLong(header.len))?;
    prefix[1..5].copy_from_slice(&len.to_le_bytes());
    if checksum(&prefix, body) != header.crc {
        return Err(CodecError::Checksum);
    }
    options().deserialize(body).map_err(|e| CodecError::Body(e.to_string()))
}

/// Decodes a value with its envelope.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Err(CodecError::Short { have: bytes.len(), want: HEADER_LEN });
    };
    decode_body(decode_header(header)?, body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_value_comes_back_and_no_damaged_byte_passes() {
        let value = (7u64, String::from("vol0"), vec![1u8, 2, 3]);
        let bytes = encode(&value).unwrap();
        assert_eq!(decode::<(u64, String, Vec<u8>)>(&bytes).unwrap(), value);
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 0x10;
            assert!(decode::<(u64, String, Vec<u8>)>(&bad).is_err(), "byte {i}");
        }
        for cut in 0..bytes.len() {
            assert!(decode::<(u64, String, Vec<u8>)>(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn a_hostile_length_is_refused_before_it_is_allocated() {
        let mut header = [CODEC_VERSION, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert!(matches!(decode_header(&header), Err(CodecError::TooLong(_))));
        header[0] = 9;
        assert!(matches!(decode_header(&header), Err(CodecError::Version(9))));
        // A vector that claims 2^64 - 1 elements, with a checksum that holds.
        let mut body = vec![0xff; 8];
        let mut bytes = encode(&0u64).unwrap();
        bytes.truncate(HEADER_LEN);
        let crc = checksum(&bytes[..5], &body);
        bytes[5..9].copy_from_slice(&crc.to_le_bytes());
        bytes.append(&mut body);
        assert!(matches!(decode::<Vec<u8>>(&bytes), Err(CodecError::Body(_))));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<super::super::command::Command>(&bytes);
        }
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod property_tests;
