//! How a session begins: the dialing node sends a [`Hello`], the other answers with a [`HelloReply`];
//! frames follow only if it accepts.
//!
//! Both have a fixed length and a layout that no protocol version changes, so that two versions that
//! share nothing can still tell each other so. A hello names whom it means: a node that was given another
//! one's address cannot be taken for it, and each end learns the other's incarnation, which is what makes
//! its acknowledgements count [R2, R10].
//!
//! Who may be a peer of whom (is the sender a replica of the volume, is its incarnation stale) is for the
//! driver to judge; it refuses through [`HelloReply::refuse`]. Nothing here proves who the sender is.

use std::fmt;

use super::WireError;
use super::body::{cut, decode_text};
use super::cursor::{Cursor, put_incarnation};
use crate::types::{ClusterId, Incarnation, NodeId, VolumeId};

/// Lowest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;
/// Highest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MAX: u16 = 1;
/// Length of an encoded [`Hello`] in bytes.
pub const HELLO_LEN: usize = 96;
/// Length of an encoded [`HelloReply`] in bytes.
pub const HELLO_REPLY_LEN: usize = 564;
/// Longest reason of a refusal in bytes.
pub const HELLO_REASON_MAX: usize = 512;

const HELLO_MAGIC: [u8; 8] = *b"BLKREPLp";
const REPLY_MAGIC: [u8; 8] = *b"BLKREPLr";

/// Protocol versions `min ..= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// Lowest.
    pub min: u16,
    /// Highest; not below `min`.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OWN: Self = Self { min: PROTOCOL_VERSION_MIN, max: PROTOCOL_VERSION_MAX };
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// The highest version that both ranges hold. The same from either side.
#[must_use]
pub fn negotiate(a: VersionRange, b: VersionRange) -> Option<u16> {
    let highest = a.max.min(b.max);
    (highest >= a.min && highest >= b.min).then_some(highest)
}

/// First message of the node that dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the sender speaks.
    pub versions: VersionRange,
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The volume that the session is for.
    pub volume: VolumeId,
    /// The sender.
    pub node: NodeId,
    /// Its run.
    pub incarnation: Incarnation,
    /// The node that it means to reach.
    pub to: NodeId,
}

/// One end of a session, as it knows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalEnd {
    /// Versions that it speaks; [`VersionRange::OWN`] outside tests.
    pub versions: VersionRange,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// Its node.
    pub node: NodeId,
    /// Its run.
    pub incarnation: Incarnation,
}

/// Why a session is refused, for programs. The numbers are the wire's and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// No common protocol version.
    Version,
    /// Another cluster.
    Cluster,
    /// The volume is not known here.
    Volume,
    /// Another node was meant.
    Receiver,
    /// The sender is no replica of the volume, by the config known here.
    Sender,
    /// The sender's incarnation is older than one already seen.
    Incarnation,
    /// The replica is not open (yet, or any more): try again.
    NotReady,
    /// The hello is damaged or makes no sense.
    Malformed,
    /// A reason of a later version.
    Other(u16),
}

impl Refusal {
    /// Its number on the wire; never 0, which means acceptance.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::Cluster => 2,
            Self::Volume => 3,
            Self::Receiver => 4,
            Self::Sender => 5,
            Self::Incarnation => 6,
            Self::NotReady => 7,
            Self::Malformed => 8,
            // A refusal is never mistaken for acceptance, whatever it was made from.
            Self::Other(0) => u16::MAX,
            Self::Other(number) => number,
        }
    }

    /// The refusal with this number.
    #[must_use]
    pub fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Version,
            2 => Self::Cluster,
            3 => Self::Volume,
            4 => Self::Receiver,
            5 => Self::Sender,
            6 => Self::Incarnation,
            7 => Self::NotReady,
            8 => Self::Malformed,
            _ => Self::Other(number),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "no common protocol version",
            Self::Cluster => "another cluster",
            Self::Volume => "unknown volume",
            Self::Receiver => "another node was meant",
            Self::Sender => "sender is no replica",
            Self::Incarnation => "incarnation is out of date",
            Self::NotReady => "replica not open",
            Self::Malformed => "malformed hello",
            Self::Other(number) => return write!(f, "refusal {number}"),
        })
    }
}

/// What the answering node says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloAnswer {
    /// Frames of this protocol version may follow.
    Accepted(u16),
    /// They may not; the connection is closed.
    Refused {
        /// Why, for programs.
        code: Refusal,
        /// Why and what to do, for people; at most [`HELLO_REASON_MAX`] bytes.
        reason: String,
    },
}

/// Answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloReply {
    /// Versions that the answering node speaks.
    pub versions: VersionRange,
    /// The answering node.
    pub node: NodeId,
    /// Its run.
    pub incarnation: Incarnation,
    /// Its answer.
    pub answer: HelloAnswer,
}

/// What both ends know once a hello was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Established {
    /// The version that frames have.
    pub version: u16,
    /// The other end's node.
    pub node: NodeId,
    /// The other end's run.
    pub incarnation: Incarnation,
}

impl Hello {
    /// The hello of `local` to node `to`.
    #[must_use]
    pub fn new(local: &LocalEnd, to: NodeId) -> Self {
        Self {
            versions: local.versions,
            cluster: local.cluster,
            volume: local.volume,
            node: local.node,
            incarnation: local.incarnation,
            to,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut out = Vec::with_capacity(HELLO_LEN);
        out.extend_from_slice(&HELLO_MAGIC);
        out.extend_from_slice(&self.versions.min.to_le_bytes());
        out.extend_from_slice(&self.versions.max.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.cluster.0.to_le_bytes());
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        out.extend_from_slice(&self.node.0.to_le_bytes());
        put_incarnation(&mut out, self.incarnation);
        out.extend_from_slice(&self.to.0.to_le_bytes());
        seal(&out)
    }

    /// Reads a hello. Bytes kept for later versions are ignored.
    ///
    /// # Errors
    /// [`WireError`] if it is no hello, is damaged, or names an empty range of versions.
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self, WireError> {
        const WHAT: &str = "a hello";
        let mut c = opened(WHAT, bytes, HELLO_MAGIC)?;
        let versions = version_range(WHAT, c.u16()?, c.u16()?)?;
        c.array::<4>()?;
        Ok(Self {
            versions,
            cluster: c.cluster()?,
            volume: c.volume()?,
            node: NodeId(c.u64()?),
            incarnation: c.incarnation()?,
            to: NodeId(c.u64()?),
        })
    }

    /// What `local` answers by what the hello itself says. The driver has yet to judge whether the sender
    /// may be a peer.
    #[must_use]
    pub fn answer(&self, local: &LocalEnd) -> HelloReply {
        let (code, reason) = if self.cluster != local.cluster {
            let text = format!(
                "{} belongs to cluster {}, {} to cluster {}: correct the peer addresses, \
                 or add the node to this cluster",
                self.node, self.cluster, local.node, local.cluster
            );
            (Refusal::Cluster, text)
        } else if self.to != local.node || self.node == local.node {
            let text = format!(
                "{} dialed {} but reached {}: correct the peer address of {}",
                self.node, self.to, local.node, self.to
            );
            (Refusal::Receiver, text)
        } else if self.volume != local.volume {
            let text = format!(
                "{} holds volume {} here, not {}: look at `blkrepl volume list`",
                local.node, local.volume, self.volume
            );
            (Refusal::Volume, text)
        } else if let Some(version) = negotiate(self.versions, local.versions) {
            return HelloReply { answer: HelloAnswer::Accepted(version), ..HelloReply::blank(local) };
        } else {
            let text = format!(
                "{} speaks protocol version {}, {} speaks {}: run versions of blkrepl whose ranges overlap",
                self.node, self.versions, local.node, local.versions
            );
            (Refusal::Version, text)
        };
        HelloReply::refuse(local, code, &reason)
    }
}

impl HelloReply {
    fn blank(local: &LocalEnd) -> Self {
        Self {
            versions: local.versions,
            node: local.node,
            incarnation: local.incarnation,
            answer: HelloAnswer::Accepted(0),
        }
    }

    /// A refusal; `reason` says what is wrong and what to do, and is cut at [`HELLO_REASON_MAX`] bytes.
    #[must_use]
    pub fn refuse(local: &LocalEnd, code: Refusal, reason: &str) -> Self {
        let reason = cut(reason, HELLO_REASON_MAX).to_owned();
        Self { answer: HelloAnswer::Refused { code, reason }, ..Self::blank(local) }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_REPLY_LEN] {
        let (code, version, reason) = match &self.answer {
            HelloAnswer::Accepted(version) => (0, *version, ""),
            HelloAnswer::Refused { code, reason } => (code.number(), 0, cut(reason, HELLO_REASON_MAX)),
        };
        let reason_len = u16::try_from(reason.len()).expect("a reason is cut to 512 bytes");
        let mut out = Vec::with_capacity(HELLO_REPLY_LEN);
        out.extend_from_slice(&REPLY_MAGIC);
        for value in [code, version, self.versions.min, self.versions.max] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.node.0.to_le_bytes());
        put_incarnation(&mut out, self.incarnation);
        out.extend_from_slice(&reason_len.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(reason.as_bytes());
        seal(&out)
    }

    /// Reads an answer. Bytes kept for later versions are ignored.
    ///
    /// # Errors
    /// [`WireError`] if it is no answer or is damaged.
    pub fn decode(bytes: &[u8; HELLO_REPLY_LEN]) -> Result<Self, WireError> {
        const WHAT: &str = "the answer to a hello";
        let mut c = opened(WHAT, bytes, REPLY_MAGIC)?;
        let (code, version) = (c.u16()?, c.u16()?);
        let versions = version_range(WHAT, c.u16()?, c.u16()?)?;
        let (node, incarnation) = (NodeId(c.u64()?), c.incarnation()?);
        let reason_len = usize::from(c.u16()?);
        c.array::<6>()?;
        if reason_len > HELLO_REASON_MAX {
            return Err(WireError::BodyLength { what: WHAT, len: reason_len });
        }
        let reason = c.slice(reason_len)?;
        let answer = match code {
            0 => HelloAnswer::Accepted(version),
            _ => {
                HelloAnswer::Refused { code: Refusal::from_number(code), reason: decode_text(WHAT, reason)? }
            }
        };
        Ok(Self { versions, node, incarnation, answer })
    }

    /// What the dialing node makes of the answer to its `hello`.
    ///
    /// # Errors
    /// [`WireError::Refused`] if it was refused, [`WireError::WrongNode`] if another node than the one
    /// meant answered, [`WireError::Version`] if the version chosen is not one that was offered.
    pub fn check(&self, hello: &Hello) -> Result<Established, WireError> {
        match &self.answer {
            HelloAnswer::Refused { code, reason } => {
                Err(WireError::Refused { peer: self.node, code: *code, reason: reason.clone() })
            }
            HelloAnswer::Accepted(_) if self.node != hello.to => {
                Err(WireError::WrongNode { wanted: hello.to, found: self.node })
            }
            HelloAnswer::Accepted(version) if negotiate(self.versions, hello.versions) != Some(*version) => {
                let what = "the answer to a hello";
                Err(WireError::Version { what, version: *version, own: hello.versions })
            }
            HelloAnswer::Accepted(version) => {
                Ok(Established { version: *version, node: self.node, incarnation: self.incarnation })
            }
        }
    }
}

/// `content`, zeroes, and a CRC-32 of both in the last four bytes.
fn seal<const N: usize>(content: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..content.len()].copy_from_slice(content);
    let crc = crc32fast::hash(&bytes[..N - 4]);
    bytes[N - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Checks magic and checksum; the cursor stands after the magic and ends before the checksum.
fn opened<'a, const N: usize>(
    what: &'static str,
    bytes: &'a [u8; N],
    magic: [u8; 8],
) -> Result<Cursor<'a>, WireError> {
    let (content, crc) = bytes.split_at(N - 4);
    let mut cursor = Cursor::new(what, content);
    let found = cursor.array::<8>()?;
    if found != magic {
        return Err(WireError::Magic { what, found: u64::from_le_bytes(found) });
    }
    let carried = Cursor::new(what, crc).u32()?;
    let computed = crc32fast::hash(content);
    if carried != computed {
        return Err(WireError::Checksum { what, carried, computed });
    }
    Ok(cursor)
}

/// Version 0 does not exist and a range is not empty.
fn version_range(what: &'static str, min: u16, max: u16) -> Result<VersionRange, WireError> {
    if min == 0 || min > max {
        return Err(WireError::Version { what, version: max, own: VersionRange::OWN });
    }
    Ok(VersionRange { min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(node: u64) -> LocalEnd {
        LocalEnd {
            versions: VersionRange::OWN,
            cluster: ClusterId(1),
            volume: VolumeId(2),
            node: NodeId(node),
            incarnation: Incarnation { boot: 3, nonce: 4 },
        }
    }

    fn refusal(hello: &Hello, end: &LocalEnd) -> Refusal {
        match hello.answer(end).answer {
            HelloAnswer::Refused { code, reason } => {
                assert!(reason.len() <= HELLO_REASON_MAX && reason.contains("node"), "{reason}");
                code
            }
            HelloAnswer::Accepted(version) => panic!("accepted {version}"),
        }
    }

    #[test]
    fn both_ends_learn_each_others_incarnation_r2_r10() {
        let hello = Hello::new(&local(1), NodeId(2));
        let end = LocalEnd { incarnation: Incarnation { boot: 9, nonce: 8 }, ..local(2) };
        let seen = Hello::decode(&hello.encode()).unwrap();
        assert_eq!(seen.incarnation, local(1).incarnation);
        let reply = HelloReply::decode(&seen.answer(&end).encode()).unwrap();
        let established = reply.check(&hello).unwrap();
        let expected = Established {
            version: PROTOCOL_VERSION_MAX,
            node: NodeId(2),
            incarnation: Incarnation { boot: 9, nonce: 8 },
        };
        assert_eq!(established, expected);
    }

    #[test]
    fn a_hello_for_another_cluster_volume_node_or_version_is_refused() {
        let hello = Hello::new(&local(1), NodeId(2));
        let other = LocalEnd { cluster: ClusterId(9), ..local(2) };
        assert_eq!(refusal(&hello, &other), Refusal::Cluster);
        assert_eq!(refusal(&hello, &LocalEnd { volume: VolumeId(9), ..local(2) }), Refusal::Volume);
        assert_eq!(refusal(&hello, &local(3)), Refusal::Receiver);
        assert_eq!(refusal(&Hello::new(&local(2), NodeId(2)), &local(2)), Refusal::Receiver);
        let newer = LocalEnd { versions: VersionRange { min: 7, max: 9 }, ..local(2) };
        assert_eq!(refusal(&hello, &newer), Refusal::Version);
    }

    #[test]
    fn an_answer_that_does_not_fit_the_hello_is_not_believed() {
        let hello = Hello::new(&local(1), NodeId(2));
        let good = hello.answer(&local(2));
        let wrong_node = HelloReply { node: NodeId(3), ..good.clone() };
        assert!(matches!(wrong_node.check(&hello), Err(WireError::WrongNode { .. })));
        let wrong_version = HelloReply { answer: HelloAnswer::Accepted(2), ..good };
        assert!(matches!(wrong_version.check(&hello), Err(WireError::Version { .. })));
        let refused = HelloReply::refuse(&local(2), Refusal::NotReady, "starting; try again");
        let refused = HelloReply::decode(&refused.encode()).unwrap();
        let error = refused.check(&hello).unwrap_err().to_string();
        assert_eq!(error, "node 2 refuses the session (replica not open): starting; try again");
    }

    #[test]
    fn reserved_bytes_are_ignored_and_an_empty_version_range_is_refused() {
        let hello = Hello::new(&local(1), NodeId(2));
        let mut bytes = hello.encode();
        (bytes[12], bytes[90]) = (1, 1);
        let resealed: [u8; HELLO_LEN] = seal(&bytes[..HELLO_LEN - 4]);
        assert_eq!(Hello::decode(&resealed).unwrap(), hello);
        for versions in [VersionRange { min: 0, max: 4 }, VersionRange { min: 3, max: 2 }] {
            let bytes = Hello { versions, ..hello }.encode();
            assert!(matches!(Hello::decode(&bytes), Err(WireError::Version { .. })));
        }
    }

    #[test]
    fn a_longest_reason_survives_and_a_longer_one_is_cut() {
        let reply = HelloReply::refuse(&local(2), Refusal::Other(77), &"\u{e9}".repeat(400));
        assert_eq!(HelloReply::decode(&reply.encode()).unwrap(), reply);
        assert_ne!(Refusal::Other(0).number(), 0);
        let HelloAnswer::Refused { reason, .. } = reply.answer else { panic!("a refusal") };
        assert_eq!(reason.len(), HELLO_REASON_MAX);
    }
}
