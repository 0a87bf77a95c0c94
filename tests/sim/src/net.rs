//! The network: links between nodes and the connections over them.
//!
//! A connection keeps the order of what is sent on it, as TCP does, and knows no time of its own: what is
//! sent while a link is blocked arrives when it is not any more, unless the connection is lost before. Frames
//! are the production codec's bytes; block content travels beside them, under the checksum that the frame
//! carries.

use std::collections::VecDeque;

use blkrepl_engine::types::{Incarnation, NodeId};
use blkrepl_engine::wire::{
    Body, BodyLen, FRAME_HEADER_LEN, Payload, PeerMsg, SessionId, WireError, decode_header, encode,
};

use crate::clock::Time;
use crate::content::{Tags, at, crc};
use crate::rng::Rng;

/// What happens to a frame on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    Flip,
    Truncate,
}

/// A message as it travels.
#[derive(Debug)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
    content: Option<Tags>,
    pub(crate) damaged: bool,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    /// `None` before it is up, and after it is closed.
    pub(crate) session: Option<SessionId>,
    pub(crate) closed: bool,
}

/// A connection between the replicas on two nodes.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) ends: [End; 2],
    /// What was sent by each end and has not arrived.
    pub(crate) sent: [VecDeque<Frame>; 2],
    pub(crate) last_at: [Time; 2],
}

impl Conn {
    pub(crate) fn new(ends: [(NodeId, Incarnation); 2]) -> Self {
        let end = |(node, incarnation)| End { node, incarnation, session: None, closed: false };
        Self { ends: ends.map(end), sent: [VecDeque::new(), VecDeque::new()], last_at: [0; 2] }
    }
}

/// State of the link in one direction.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    pub(crate) blocked_until: Time,
    pub(crate) slow_until: Time,
    pub(crate) slow_factor: u64,
    /// The next frame is damaged.
    pub(crate) damage: Option<Damage>,
}

impl Frame {
    /// Encodes a message; `content` gives what the payload's buffer holds.
    pub(crate) fn encode(msg: &PeerMsg, content: impl FnOnce(Payload) -> Tags) -> Self {
        let mut bytes = Vec::with_capacity(FRAME_HEADER_LEN);
        let content = encode(msg, &mut bytes).map(content);
        Self { bytes, content, damaged: false }
    }

    /// Damages it, so that whoever receives it must notice.
    pub(crate) fn damage(&mut self, how: Damage, rng: &mut Rng) {
        self.damaged = true;
        match (how, &mut self.content) {
            (Damage::Flip, Some(tags)) if rng.chance(500) => {
                let tags = Tags::make_mut(tags);
                let n = at(rng.below(tags.len() as u64));
                tags[n] ^= 1 << rng.below(40);
            }
            (Damage::Flip, _) => {
                let n = at(rng.below(self.bytes.len() as u64));
                self.bytes[n] ^= 1 << rng.below(8);
            }
            (Damage::Truncate, content) => {
                // What follows on the stream takes the place of what is missing.
                let kept = at(rng.below(self.bytes.len() as u64));
                for byte in &mut self.bytes[kept..] {
                    // Never what was there: the frame would not be damaged.
                    *byte = byte.wrapping_add(37);
                }
                if let Some(tags) = content {
                    let tags = Tags::make_mut(tags);
                    let last = tags.len() - 1;
                    tags[last] = tags[last].wrapping_add(0x1_0001);
                }
            }
        }
    }

    /// Decodes it with the production codec. `buffer` makes a buffer of the content.
    ///
    /// # Errors
    /// What the codec finds wrong; no buffer is made then.
    pub(crate) fn decode(self, buffer: impl FnOnce(Tags) -> Payload) -> Result<PeerMsg, WireError> {
        let Some((head, rest)) = self.bytes.split_first_chunk::<FRAME_HEADER_LEN>() else {
            return Err(WireError::Checksum { what: "frame header", carried: 0, computed: 1 });
        };
        let header = decode_header(head)?;
        match (header.body_len(), self.content) {
            (BodyLen::Bulk(len), Some(tags)) => {
                // The checksum is judged before a buffer is made, as a driver cannot; it would release it.
                let found = crc(&tags);
                if found != header.body_crc() {
                    return Err(WireError::Checksum {
                        what: "content",
                        carried: header.body_crc(),
                        computed: found,
                    });
                }
                let payload = buffer(tags);
                header.into_message(Body::Bulk(Payload { len, ..payload }))
            }
            _ if rest.is_empty() => header.into_message(Body::None),
            _ => header.into_message(Body::Inline(rest.to_vec())),
        }
    }
}

#[cfg(test)]
mod tests {
    use blkrepl_engine::types::Reign;
    use blkrepl_engine::wire::{BufId, Run, RunsKind};

    use super::*;

    fn messages() -> [PeerMsg; 3] {
        let payload = Payload { buf: BufId(1), len: 4096, crc: crc(&[1, 2, 3, 4, 5, 6, 7, 8]) };
        let blocks = blkrepl_engine::types::BlockRange::between(3, 4);
        [
            PeerMsg::Flush { reign: Reign(3), id: 9 },
            PeerMsg::Copy { reign: Reign(3), id: 9, blocks, payload },
            PeerMsg::Runs {
                reign: Reign(2),
                kind: RunsKind::Intent,
                runs: vec![Run { start: 1, count: 2 }],
                last: true,
            },
        ]
    }

    fn frame(msg: &PeerMsg) -> Frame {
        Frame::encode(msg, |_| Tags::new(vec![1, 2, 3, 4, 5, 6, 7, 8]))
    }

    fn decode(frame: Frame) -> Result<PeerMsg, WireError> {
        frame.decode(|tags| Payload { buf: BufId(1), len: 0, crc: crc(&tags) })
    }

    #[test]
    fn a_message_comes_out_as_it_went_in() {
        for msg in messages() {
            assert_eq!(decode(frame(&msg)).unwrap(), msg);
        }
    }

    #[test]
    fn every_damage_is_noticed() {
        let mut rng = Rng::new(4);
        for msg in messages() {
            for how in [Damage::Flip, Damage::Truncate] {
                for _ in 0..300 {
                    let mut hurt = frame(&msg);
                    hurt.damage(how, &mut rng);
                    assert!(decode(hurt).is_err(), "{how:?} of {msg:?}");
                }
            }
        }
    }
}
