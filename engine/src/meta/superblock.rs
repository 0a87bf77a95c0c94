//! What a replica records of itself, twice: fields, codec, and the rules for reading the pair [R16].
//! Does no I/O and takes no decision on what a doubtful superblock is good for.
//!
//! Invariants:
//! - `seq` grows with every write; both copies of one write carry the same number.
//! - `encode(decode(bytes)) == bytes`: a copy with anything in it that this version does not write is
//!   refused, not half understood.
//! - Of two writes in a row the second begins with the copy that the first ended with. So a stop between
//!   the copies, any number of times, always leaves one whole copy.
//! - Everything but zeroes lies in the first 512 bytes: a copy lands whole or not at all on a disk that
//!   writes sectors whole.

use std::fmt;

use thiserror::Error;

use crate::types::{
    ClusterId, Epoch, Geometry, Incarnation, LineageId, Member, NodeId, REPLICAS_MAX, Reign, ReplicaSlot,
    SuperblockTrust, VolumeId,
};
use crate::wire::{BaseContent, InconsistentMark};

/// Length of one copy of the superblock in bytes.
pub const SUPERBLOCK_LEN: usize = 4096;
/// The byte after both copies of the superblock.
pub const SUPERBLOCKS_END: u64 = 8192;
/// The version of the metadata format that this program reads and writes.
pub const SUPERBLOCK_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"BLKREPSB";
/// [`SUPERBLOCK_LEN`] as it is stored.
const LENGTH: u32 = 4096;
/// More writes than a superblock ever sees; a higher number was not written by this program.
const SEQ_MAX: u64 = 1 << 62;
/// The highest number of a pair that is used: what was read can always be written again, above it.
const SEQ_READ_MAX: u64 = SEQ_MAX / 2;
const _: () = assert!(LENGTH as u128 == SUPERBLOCK_LEN as u128);

// Magic, version and checksum keep their places in every later version.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = AT_MAGIC + 8;
const AT_CRC: usize = AT_VERSION + 4;
const AT_LENGTH: usize = AT_CRC + 4;
const AT_ZERO: usize = AT_LENGTH + 4;
const AT_ADDRESS: usize = AT_ZERO + 4;
const AT_CLUSTER: usize = AT_ADDRESS + 8;
const AT_VOLUME: usize = AT_CLUSTER + 16;
const AT_LINEAGE: usize = AT_VOLUME + 16;
const AT_OS_BOOT: usize = AT_LINEAGE + 16;
const AT_IDENTITY: usize = AT_OS_BOOT + 16;
const AT_NODE: usize = AT_IDENTITY + 32;
const AT_SEQ: usize = AT_NODE + 8;
const AT_EPOCH: usize = AT_SEQ + 8;
const AT_REIGN: usize = AT_EPOCH + 8;
const AT_SIZE: usize = AT_REIGN + 8;
const AT_BLOCK_SIZE: usize = AT_SIZE + 8;
const AT_REGION_SIZE: usize = AT_BLOCK_SIZE + 4;
const AT_CURRENT: usize = AT_REGION_SIZE + 4;
const AT_MEMBER: usize = AT_CURRENT + 16;
const AT_CLEAN: usize = AT_MEMBER + 16;
const AT_INCONSISTENT: usize = AT_CLEAN + 24;
const AT_SLOT: usize = AT_INCONSISTENT + 40;
const AT_BASE: usize = AT_SLOT + 1;
const AT_PRESENT: usize = AT_BASE + 1;
const AT_CHAIN_LEN: usize = AT_PRESENT + 1;
const AT_CHAIN: usize = AT_CHAIN_LEN + 5;
const AT_END: usize = AT_CHAIN + 16 * CHAIN_MAX;

/// Most runs after the member's that a superblock remembers.
pub const CHAIN_MAX: usize = 8;

const _: () = assert!(AT_CHAIN == 280);
const _: () = assert!(AT_CLUSTER == 32 && AT_NODE == 128 && AT_SLOT == 272 && AT_END <= 512);

/// Bits of the byte that says which optional fields are present.
const HAS_MEMBER: u8 = 1;
const HAS_CLEAN: u8 = 2;
const HAS_INCONSISTENT: u8 = 4;

/// One of the two copies of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SuperblockCopy {
    /// At byte 0.
    A,
    /// At byte 4096.
    B,
}

impl SuperblockCopy {
    /// Its first byte in the metadata file.
    #[must_use]
    pub fn offset(self) -> u64 {
        match self {
            Self::A => 0,
            Self::B => SUPERBLOCKS_END / 2,
        }
    }

    /// The other copy.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The copy that the write with this sequence number begins with.
    fn first_of(seq: u64) -> Self {
        if seq.is_multiple_of(2) { Self::B } else { Self::A }
    }
}

impl fmt::Display for SuperblockCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A (byte 0)",
            Self::B => "B (byte 4096)",
        })
    }
}

/// Identity of the data object (file or device) that the metadata describes; made and compared by the
/// driver (a random tag, inode and birth time, or device id), opaque here [R15].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct DataIdentity(pub [u8; 32]);

/// Everything was flushed and the process stopped on purpose. Erased durably before the first write of
/// the next run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CleanMark {
    /// The run that stopped.
    pub incarnation: Incarnation,
    /// The epoch that it followed.
    pub epoch: Epoch,
}

/// What a replica records of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// The node that holds the replica.
    pub node: NodeId,
    /// The replica's place in its volume.
    pub slot: ReplicaSlot,
    /// Sizes of the volume; they fix where everything lies in the file.
    pub geometry: Geometry,
    /// Counts the writes of the superblock; [`Superblock::advance`] raises it.
    pub seq: u64,
    /// Newest epoch that the replica followed.
    pub epoch: Epoch,
    /// Newest reign that it followed.
    pub reign: Reign,
    /// Lineage of its content.
    pub lineage: LineageId,
    /// Incarnation under which it was last a member of the in-sync set, if its content continues from
    /// there.
    pub member: Option<Incarnation>,
    /// Runs that opened this replica after `member` (or, if it was never a member's, at all) and went on from
    /// its content, oldest first, at most [`CHAIN_MAX`]: a set that names one of them means this content,
    /// too [R6, R17].
    pub chain: Vec<Incarnation>,
    /// The run that wrote this.
    pub current: Incarnation,
    /// Boot id of the operating system under which this was written.
    pub os_boot: u128,
    /// A resync into this replica has begun and no join has ended it.
    pub inconsistent: Option<InconsistentMark>,
    /// What the content was before any replicated write.
    pub base: BaseContent,
    /// The data object.
    pub identity: DataIdentity,
    /// The last stop was clean.
    pub clean: Option<CleanMark>,
}

/// Why a superblock, or one copy of it, cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SuperblockError {
    /// Not 4096 bytes were handed in.
    #[error("superblock copy {copy} is 4096 bytes, got {found}: the metadata file is cut off")]
    Length {
        /// The copy.
        copy: SuperblockCopy,
        /// Bytes that were there.
        found: usize,
    },
    /// Only zeroes.
    #[error(
        "superblock copy {0} holds only zeroes: this metadata file was never set up, or its set-up did not end"
    )]
    Blank(SuperblockCopy),
    /// Something else.
    #[error("superblock copy {0} does not begin like blkrepl metadata: check the path of the metadata file")]
    Magic(SuperblockCopy),
    /// Damaged.
    #[error("superblock copy {0} is damaged (its checksum does not match)")]
    Checksum(SuperblockCopy),
    /// Intact, but of another version of the format.
    #[error(
        "the metadata file has format version {found}, this program reads version {SUPERBLOCK_VERSION}: \
         start the release that wrote it; nothing was changed"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Intact, but written to another place.
    #[error("superblock copy {0} was written for another place of the file (a misdirected write)")]
    Address(SuperblockCopy),
    /// Intact, but a field holds what this program never writes.
    #[error("superblock copy {copy}: field `{field}` holds a value that this release does not know")]
    Field {
        /// The copy.
        copy: SuperblockCopy,
        /// The field.
        field: &'static str,
    },
    /// Neither copy can be used.
    #[error(
        "neither copy of the superblock can be used ({a}; {b}). If another replica is in sync, give this one \
         up: move its metadata file and its data file away and restart the node, or run `blkrepl volume \
         recreate VOL --discard-data` on it; the replica is then made anew and copies everything"
    )]
    Both {
        /// What is wrong with copy A.
        a: Box<Self>,
        /// What is wrong with copy B.
        b: Box<Self>,
    },
}

impl SuperblockError {
    /// True if nothing was ever written where the superblock belongs: a file whose set-up did not end.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Blank(_) => true,
            Self::Both { a, b } => a.is_blank() && b.is_blank(),
            _ => false,
        }
    }
}

impl Superblock {
    /// Raises the sequence number and gives both writes: file offset and bytes. The first must be
    /// durable before the second is begun, and both before anything relies on what changed [R16].
    pub fn advance(&mut self) -> [(u64, Vec<u8>); 2] {
        self.seq += 1;
        let first = SuperblockCopy::first_of(self.seq);
        [first, first.other()].map(|copy| (copy.offset(), self.encode(copy).to_vec()))
    }

    /// One copy as bytes, with the sequence number as it stands.
    ///
    /// # Panics
    /// If it would not be read back as it is: a slot that is out of range, a chain that is too long.
    #[must_use]
    pub fn encode(&self, copy: SuperblockCopy) -> [u8; SUPERBLOCK_LEN] {
        let bytes = self.encode_fields(copy);
        assert_eq!(Self::decode(&bytes, copy).as_ref(), Ok(self), "superblock decodes to itself");
        bytes
    }

    fn encode_fields(&self, copy: SuperblockCopy) -> [u8; SUPERBLOCK_LEN] {
        let mut bytes = [0; SUPERBLOCK_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(AT_MAGIC, &MAGIC);
        put(AT_VERSION, &SUPERBLOCK_VERSION.to_le_bytes());
        put(AT_LENGTH, &LENGTH.to_le_bytes());
        put(AT_ADDRESS, &copy.offset().to_le_bytes());
        put(AT_CLUSTER, &self.cluster.0.to_le_bytes());
        put(AT_VOLUME, &self.volume.0.to_le_bytes());
        put(AT_LINEAGE, &self.lineage.0.to_le_bytes());
        put(AT_OS_BOOT, &self.os_boot.to_le_bytes());
        put(AT_IDENTITY, &self.identity.0);
        put(AT_NODE, &self.node.0.to_le_bytes());
        put(AT_SEQ, &self.seq.to_le_bytes());
        put(AT_EPOCH, &self.epoch.0.to_le_bytes());
        put(AT_REIGN, &self.reign.0.to_le_bytes());
        put(AT_SIZE, &self.geometry.size().to_le_bytes());
        put(AT_BLOCK_SIZE, &self.geometry.block_size().to_le_bytes());
        put(AT_REGION_SIZE, &self.geometry.region_size().to_le_bytes());
        put(AT_CURRENT, &incarnation_bytes(self.current));
        let mut present = 0;
        if let Some(member) = self.member {
            present |= HAS_MEMBER;
            put(AT_MEMBER, &incarnation_bytes(member));
        }
        if let Some(clean) = self.clean {
            present |= HAS_CLEAN;
            put(AT_CLEAN, &incarnation_bytes(clean.incarnation));
            put(AT_CLEAN + 16, &clean.epoch.0.to_le_bytes());
        }
        if let Some(mark) = self.inconsistent {
            present |= HAS_INCONSISTENT;
            put(AT_INCONSISTENT, &mark.epoch.0.to_le_bytes());
            put(AT_INCONSISTENT + 8, &mark.reign.0.to_le_bytes());
            put(AT_INCONSISTENT + 16, &mark.source.node.0.to_le_bytes());
            put(AT_INCONSISTENT + 24, &incarnation_bytes(mark.source.incarnation));
        }
        let base = match self.base {
            BaseContent::Zero => 1,
            BaseContent::Unknown => 2,
            BaseContent::Member => 3,
        };
        let chain = u8::try_from(self.chain.len()).expect("a chain is short");
        put(AT_SLOT, &[self.slot.0, base, present, chain]);
        for (n, run) in self.chain.iter().enumerate() {
            put(AT_CHAIN + 16 * n, &incarnation_bytes(*run));
        }
        let crc = checksum(&bytes);
        bytes[AT_CRC..AT_LENGTH].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads one copy.
    ///
    /// # Errors
    /// [`SuperblockError`] says what is wrong with it. [`SuperblockError::Version`] means that the copy
    /// is intact: the checksum is judged before the version.
    pub fn decode(bytes: &[u8], copy: SuperblockCopy) -> Result<Self, SuperblockError> {
        let found = bytes.len();
        let bytes: &[u8; SUPERBLOCK_LEN] =
            bytes.try_into().map_err(|_| SuperblockError::Length { copy, found })?;
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(SuperblockError::Blank(copy));
        }
        if bytes[AT_MAGIC..AT_VERSION] != MAGIC {
            return Err(SuperblockError::Magic(copy));
        }
        if u32_at(bytes, AT_CRC) != checksum(bytes) {
            return Err(SuperblockError::Checksum(copy));
        }
        let version = u32_at(bytes, AT_VERSION);
        if version != SUPERBLOCK_VERSION {
            return Err(SuperblockError::Version { found: version });
        }
        if u64_at(bytes, AT_ADDRESS) != copy.offset() {
            return Err(SuperblockError::Address(copy));
        }
        let superblock = Self::decode_fields(bytes, copy)?;
        // Catches everything at once that this version does not write: reserved bytes, unknown flags,
        // values in fields that are marked absent.
        if superblock.encode_fields(copy) != *bytes {
            return Err(SuperblockError::Field { copy, field: "reserved" });
        }
        Ok(superblock)
    }

    /// The fields of a copy whose checksum, version and address were found good.
    fn decode_fields(bytes: &[u8; SUPERBLOCK_LEN], copy: SuperblockCopy) -> Result<Self, SuperblockError> {
        let bad = |field| SuperblockError::Field { copy, field };
        let present = bytes[AT_PRESENT];
        let slot = ReplicaSlot(bytes[AT_SLOT]);
        if usize::from(slot.0) >= REPLICAS_MAX {
            return Err(bad("slot"));
        }
        let base = match bytes[AT_BASE] {
            1 => BaseContent::Zero,
            2 => BaseContent::Unknown,
            3 => BaseContent::Member,
            _ => return Err(bad("base")),
        };
        let chain = usize::from(bytes[AT_CHAIN_LEN]);
        if chain > CHAIN_MAX {
            return Err(bad("chain"));
        }
        let seq = u64_at(bytes, AT_SEQ);
        if seq > SEQ_MAX {
            return Err(bad("seq"));
        }
        let size = u64_at(bytes, AT_SIZE);
        let geometry = Geometry::new(size, u32_at(bytes, AT_BLOCK_SIZE), u32_at(bytes, AT_REGION_SIZE))
            .map_err(|_| bad("geometry"))?;
        let member = (present & HAS_MEMBER != 0).then(|| incarnation_at(bytes, AT_MEMBER));
        let clean = (present & HAS_CLEAN != 0).then(|| CleanMark {
            incarnation: incarnation_at(bytes, AT_CLEAN),
            epoch: Epoch(u64_at(bytes, AT_CLEAN + 16)),
        });
        let inconsistent = (present & HAS_INCONSISTENT != 0).then(|| InconsistentMark {
            epoch: Epoch(u64_at(bytes, AT_INCONSISTENT)),
            reign: Reign(u64_at(bytes, AT_INCONSISTENT + 8)),
            source: Member {
                node: NodeId(u64_at(bytes, AT_INCONSISTENT + 16)),
                incarnation: incarnation_at(bytes, AT_INCONSISTENT + 24),
            },
        });
        Ok(Self {
            cluster: ClusterId(u128_at(bytes, AT_CLUSTER)),
            volume: VolumeId(u128_at(bytes, AT_VOLUME)),
            node: NodeId(u64_at(bytes, AT_NODE)),
            slot,
            geometry,
            seq,
            epoch: Epoch(u64_at(bytes, AT_EPOCH)),
            reign: Reign(u64_at(bytes, AT_REIGN)),
            lineage: LineageId(u128_at(bytes, AT_LINEAGE)),
            member,
            chain: (0..chain).map(|n| incarnation_at(bytes, AT_CHAIN + 16 * n)).collect(),
            current: incarnation_at(bytes, AT_CURRENT),
            os_boot: u128_at(bytes, AT_OS_BOOT),
            inconsistent,
            base,
            identity: DataIdentity(array_at(bytes, AT_IDENTITY)),
            clean,
        })
    }
}

/// Reads both copies [R16]: the one with the higher sequence number counts. The result is
/// [`SuperblockTrust::Sound`] if both are valid and equal, or if they are what a stop between the two
/// writes leaves: both valid, and the one that is written first is ahead by exactly one. Then nothing newer
/// than it can have existed. The text says what was wrong.
///
/// After a doubtful pair the sequence number returned may be one above the stored one: it is chosen so
/// that the next write begins with the copy that does *not* count here.
///
/// # Errors
/// [`SuperblockError::Version`] if either copy is intact but of another version (the other one may be
/// outdated then, whatever it says), [`SuperblockError::Both`] if neither can be used.
pub fn read_pair(
    a: &[u8],
    b: &[u8],
) -> Result<(Superblock, SuperblockTrust, Option<String>), SuperblockError> {
    let [a, b] = [(a, SuperblockCopy::A), (b, SuperblockCopy::B)].map(|(bytes, copy)| {
        let superblock = Superblock::decode(bytes, copy)?;
        let room = superblock.seq <= SEQ_READ_MAX;
        if room { Ok(superblock) } else { Err(SuperblockError::Field { copy, field: "seq" }) }
    });
    for copy in [&a, &b] {
        if let Err(version @ SuperblockError::Version { .. }) = copy {
            return Err(version.clone());
        }
    }
    let (mut superblock, counts, note) = match (a, b) {
        (Ok(a), Ok(b)) if a == b => return Ok((a, SuperblockTrust::Sound, None)),
        (Ok(a), Ok(b)) if is_stopped_between(&a, &b) => {
            return Ok((if a.seq > b.seq { a } else { b }, SuperblockTrust::Sound, None));
        }
        (Ok(a), Ok(b)) => {
            let note = format!("the two superblock copies differ (writes {} and {})", a.seq, b.seq);
            if b.seq > a.seq { (b, SuperblockCopy::B, note) } else { (a, SuperblockCopy::A, note) }
        }
        (Ok(a), Err(error)) => (a, SuperblockCopy::A, error.to_string()),
        (Err(error), Ok(b)) => (b, SuperblockCopy::B, error.to_string()),
        (Err(a), Err(b)) => return Err(SuperblockError::Both { a: Box::new(a), b: Box::new(b) }),
    };
    if SuperblockCopy::first_of(superblock.seq + 1) == counts {
        superblock.seq += 1;
    }
    let note = format!("{note}; copy {counts} is used, unknown until it matches the committed config");
    Ok((superblock, SuperblockTrust::Doubtful, Some(note)))
}

/// True if a stop between the two writes of one change leaves these copies.
fn is_stopped_between(a: &Superblock, b: &Superblock) -> bool {
    let (newer, older, copy) =
        if a.seq > b.seq { (a, b, SuperblockCopy::A) } else { (b, a, SuperblockCopy::B) };
    newer.seq == older.seq + 1 && SuperblockCopy::first_of(newer.seq) == copy
}

/// CRC-32 over a whole copy, the place of the checksum itself left out.
fn checksum(bytes: &[u8; SUPERBLOCK_LEN]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..AT_CRC]);
    hasher.update(&bytes[AT_LENGTH..]);
    hasher.finalize()
}

fn incarnation_bytes(incarnation: Incarnation) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&incarnation.boot.to_le_bytes());
    bytes[8..].copy_from_slice(&incarnation.nonce.to_le_bytes());
    bytes
}

fn incarnation_at(bytes: &[u8; SUPERBLOCK_LEN], at: usize) -> Incarnation {
    Incarnation { boot: u64_at(bytes, at), nonce: u64_at(bytes, at + 8) }
}

fn array_at<const N: usize>(bytes: &[u8; SUPERBLOCK_LEN], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the slice has just this length")
}

fn u32_at(bytes: &[u8; SUPERBLOCK_LEN], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8; SUPERBLOCK_LEN], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn u128_at(bytes: &[u8; SUPERBLOCK_LEN], at: usize) -> u128 {
    u128::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
#[path = "superblock_tests.rs"]
pub(crate) mod tests;
