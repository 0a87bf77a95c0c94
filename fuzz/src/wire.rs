//! What a peer sends: hellos and frames.

use blkrepl_engine::types::{ClusterId, Incarnation, NodeId, VolumeId};
use blkrepl_engine::wire::{
    Body, BodyLen, BufId, FRAME_HEADER_LEN, HELLO_LEN, HELLO_REPLY_LEN, Hello, HelloReply, LocalEnd, PeerMsg,
    VersionRange, decode_header, decode_slice, encode, negotiate,
};

use crate::Verdict;
use crate::input::{Input, put};

const BUF: BufId = BufId(7);
const FRAME_MAGIC: &[u8] = b"BRfr";
const BODY_LEN_AT: usize = 52;
const BODY_CRC_AT: usize = 56;
const HEADER_CRC_AT: usize = 60;

/// The end that hellos of the seeds are meant for.
pub(crate) fn local_end() -> LocalEnd {
    LocalEnd {
        versions: VersionRange::OWN,
        cluster: ClusterId(0xc1),
        volume: VolumeId(0x70),
        node: NodeId(2),
        incarnation: Incarnation { boot: 5, nonce: 0x5eed },
    }
}

/// Frames. Control byte: bit 0 makes the first frame's body as long as the input; then the stream, taken
/// as it is and with the first frame's magic and checksums made good. Holds: a message that was decoded
/// encodes to the same bytes, and a body other than the announced one is refused.
pub fn peer_frame(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let control = input.u8();
    let stream = input.rest();
    let as_it_is = frames(stream);
    let Some(sealed) = sealed_frame(stream, control & 1 != 0) else { return Verdict::of(as_it_is) };
    let sealed = frames(&sealed);
    Verdict::of(as_it_is || sealed)
}

fn sealed_frame(stream: &[u8], stretch: bool) -> Option<Vec<u8>> {
    let mut sealed = stream.to_vec();
    let (head, body) = sealed.split_first_chunk_mut::<FRAME_HEADER_LEN>()?;
    put(head, 0, FRAME_MAGIC);
    if stretch {
        put(head, BODY_LEN_AT, &u32::try_from(body.len()).ok()?.to_le_bytes());
    }
    let announced = u32::from_le_bytes(head[BODY_LEN_AT..BODY_CRC_AT].try_into().ok()?);
    if let Some(body) = body.get(..announced as usize) {
        put(head, BODY_CRC_AT, &crc32fast::hash(body).to_le_bytes());
    }
    let crc = crc32fast::hash(&head[..HEADER_CRC_AT]);
    put(head, HEADER_CRC_AT, &crc.to_le_bytes());
    Some(sealed)
}

/// True if the stream begins with a good frame.
fn frames(stream: &[u8]) -> bool {
    let mut at = 0;
    loop {
        let bytes = &stream[at..];
        match decode_slice(bytes, BUF) {
            Ok(Some((message, len))) => {
                check_frame(&bytes[..len], &message);
                at += len;
            }
            Ok(None) => return at > 0,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return at > 0;
            }
        }
    }
}

fn check_frame(frame: &[u8], message: &PeerMsg) {
    let (head, body) = frame.split_first_chunk::<FRAME_HEADER_LEN>().expect("a frame has a header");
    let mut encoded = Vec::new();
    if encode(message, &mut encoded).is_some() {
        encoded.extend_from_slice(body);
    }
    assert!(encoded == frame, "{message:?} encodes to other bytes than it was decoded from");
    // As a driver that mixes bodies up would call it.
    let header = decode_header(head).expect("the header of a good frame");
    let other = match header.body_len() {
        BodyLen::None => Body::Inline(vec![0]),
        BodyLen::Inline(_) => Body::Inline(body[1..].to_vec()),
        BodyLen::Bulk(_) => Body::Inline(body.to_vec()),
    };
    assert!(header.into_message(other).is_err(), "a body that was not announced was accepted");
}

/// Hellos and their answers. Control byte: bit 0 a hello, else an answer; bit 1 makes the checksum good.
/// Holds: what was decoded survives the wire again; an accepted version is one that both ends speak.
pub fn hello(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let control = input.u8();
    let seal = control & 2 != 0;
    if control & 1 != 0 {
        on_hello(&fixed::<HELLO_LEN>(input.rest(), b"BLKREPLp", seal))
    } else {
        on_reply(&fixed::<HELLO_REPLY_LEN>(input.rest(), b"BLKREPLr", seal))
    }
}

fn on_hello(bytes: &[u8; HELLO_LEN]) -> Verdict {
    let Ok(hello) = Hello::decode(bytes) else { return Verdict::Refused };
    assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    let own = local_end();
    assert_eq!(negotiate(hello.versions, own.versions), negotiate(own.versions, hello.versions));
    let reply = hello.answer(&own);
    let read = HelloReply::decode(&reply.encode()).expect("an answer that this node made");
    assert_eq!(read, reply);
    match read.check(&hello) {
        Ok(established) => {
            let version = established.version;
            assert!(version >= hello.versions.min && version <= hello.versions.max);
            assert!(version >= own.versions.min && version <= own.versions.max);
            assert_eq!((established.node, established.incarnation), (own.node, own.incarnation));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    Verdict::Accepted
}

fn on_reply(bytes: &[u8; HELLO_REPLY_LEN]) -> Verdict {
    let Ok(reply) = HelloReply::decode(bytes) else { return Verdict::Refused };
    assert_eq!(HelloReply::decode(&reply.encode()).as_ref(), Ok(&reply));
    let asked = Hello::new(&local_end(), NodeId(1));
    if let Ok(established) = reply.check(&asked) {
        assert_eq!(established.node, asked.to);
        assert!((asked.versions.min..=asked.versions.max).contains(&established.version));
    }
    Verdict::Accepted
}

/// Cut or filled up with zeroes to the fixed length.
fn fixed<const N: usize>(bytes: &[u8], magic: &[u8], seal: bool) -> [u8; N] {
    let mut out = [0; N];
    put(&mut out, 0, bytes);
    if seal {
        put(&mut out, 0, magic);
        let crc = crc32fast::hash(&out[..N - 4]);
        put(&mut out, N - 4, &crc.to_le_bytes());
    }
    out
}
