//! The superblock's codec and the rules of the pair [R16].

use proptest::prelude::*;

use super::SuperblockCopy::{A, B};
use super::*;

pub(crate) fn sample() -> Superblock {
    Superblock {
        cluster: ClusterId(0x0c),
        volume: VolumeId(0x1111_2222),
        node: NodeId(3),
        slot: ReplicaSlot(1),
        geometry: Geometry::new(1 << 30, 4096, 1 << 20).unwrap(),
        seq: 7,
        epoch: Epoch(12),
        reign: Reign(11),
        lineage: LineageId(0x77),
        member: Some(Incarnation { boot: 4, nonce: 0xabcd }),
        chain: vec![Incarnation { boot: 5, nonce: 0xef01 }, Incarnation { boot: 6, nonce: 3 }],
        current: Incarnation { boot: 5, nonce: 0xef01 },
        os_boot: 0xb007,
        inconsistent: Some(InconsistentMark {
            epoch: Epoch(9),
            reign: Reign(8),
            source: Member { node: NodeId(1), incarnation: Incarnation { boot: 2, nonce: 22 } },
        }),
        base: BaseContent::Member,
        identity: DataIdentity([0x5a; 32]),
        clean: Some(CleanMark { incarnation: Incarnation { boot: 4, nonce: 0xabcd }, epoch: Epoch(12) }),
    }
}

/// Of a replica that was just made.
pub(crate) fn blank(slot: ReplicaSlot, geometry: Geometry) -> Superblock {
    Superblock {
        cluster: ClusterId(1),
        volume: VolumeId(2),
        node: NodeId(3),
        slot,
        geometry,
        seq: 0,
        epoch: Epoch(1),
        reign: Reign(1),
        lineage: LineageId(4),
        member: None,
        chain: Vec::new(),
        current: Incarnation { boot: 1, nonce: 5 },
        os_boot: 6,
        inconsistent: None,
        base: BaseContent::Zero,
        identity: DataIdentity([7; 32]),
        clean: None,
    }
}

fn pair(a: &Superblock, b: &Superblock) -> [[u8; SUPERBLOCK_LEN]; 2] {
    [a.encode(A), b.encode(B)]
}

fn with_seq(seq: u64) -> Superblock {
    Superblock { seq, epoch: Epoch(100 + seq), ..sample() }
}

fn resealed(mut bytes: [u8; SUPERBLOCK_LEN]) -> [u8; SUPERBLOCK_LEN] {
    let crc = checksum(&bytes);
    bytes[AT_CRC..AT_LENGTH].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn incarnation() -> impl Strategy<Value = Incarnation> {
    (any::<u64>(), any::<u64>()).prop_map(|(boot, nonce)| Incarnation { boot, nonce })
}

prop_compose! {
    fn any_superblock()(
        ids in (any::<u128>(), any::<u128>(), any::<u128>(), any::<u128>(), any::<[u8; 32]>()),
        (node, slot, seq, epoch, reign) in
            (any::<u64>(), 0..8_u8, 0..=SEQ_MAX, any::<u64>(), any::<u64>()),
        (blocks, region) in (1..1_000_000_u64, 16..=26_u32),
        member in prop::option::of(incarnation()),
        current in incarnation(),
        chain in prop::collection::vec(incarnation(), 0..=CHAIN_MAX),
        clean in prop::option::of((incarnation(), any::<u64>())),
        mark in prop::option::of((any::<u64>(), any::<u64>(), any::<u64>(), incarnation())),
        base in prop::sample::select(vec![BaseContent::Zero, BaseContent::Unknown, BaseContent::Member]),
    ) -> Superblock {
        Superblock {
            cluster: ClusterId(ids.0),
            volume: VolumeId(ids.1),
            lineage: LineageId(ids.2),
            os_boot: ids.3,
            identity: DataIdentity(ids.4),
            node: NodeId(node),
            slot: ReplicaSlot(slot),
            geometry: Geometry::new(blocks * 4096, 4096, 1 << region).unwrap(),
            seq,
            epoch: Epoch(epoch),
            reign: Reign(reign),
            member,
            chain,
            current,
            clean: clean.map(|(incarnation, epoch)| CleanMark { incarnation, epoch: Epoch(epoch) }),
            inconsistent: mark.map(|(epoch, reign, node, incarnation)| InconsistentMark {
                epoch: Epoch(epoch),
                reign: Reign(reign),
                source: Member { node: NodeId(node), incarnation },
            }),
            base,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_superblock_comes_back_as_it_was_written(superblock in any_superblock()) {
        for copy in [A, B] {
            let decoded = Superblock::decode(&superblock.encode(copy), copy);
            prop_assert_eq!(decoded.as_ref(), Ok(&superblock));
        }
    }

    #[test]
    fn any_flipped_bit_of_a_copy_is_noticed(bit in 0..SUPERBLOCK_LEN * 8) {
        let mut bytes = sample().encode(A);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Superblock::decode(&bytes, A).is_err());
    }

    /// Whatever stands in the fields of an intact copy: decoding never panics, and what it accepts it
    /// would write just so.
    #[test]
    fn intact_copies_of_any_content_are_read_whole_or_refused(
        at in AT_CLUSTER..AT_END + 8,
        bytes in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let mut copy = sample().encode(B);
        copy[at..at + bytes.len()].copy_from_slice(&bytes);
        let copy = resealed(copy);
        if let Ok(superblock) = Superblock::decode(&copy, B) {
            prop_assert_eq!(superblock.encode(B), copy);
        }
    }

    /// Any number of stops in the middle of superblock writes, at either copy, with that copy torn or
    /// untouched: one whole copy always remains, and never an older one than the last durable write.
    #[test]
    fn r16_a_stop_between_the_copies_always_leaves_one(stops in prop::collection::vec(0..5_u8, 1..20)) {
        let mut superblock = sample();
        let mut disk = pair(&superblock, &superblock);
        let mut durable = superblock.epoch;
        for stop in stops {
            superblock.epoch = superblock.epoch.next();
            let writes = superblock.advance();
            for (index, (offset, bytes)) in (0_u8..).zip(&writes) {
                let place = &mut disk[usize::from(*offset != 0)];
                if stop > 2 * index + 1 {
                    place.copy_from_slice(bytes);
                } else if stop == 2 * index + 1 {
                    place[..300].copy_from_slice(&bytes[..300]);
                    place[20] ^= 0xff;
                }
                if stop <= 2 * index + 1 {
                    break;
                }
            }
            if stop >= 4 {
                durable = superblock.epoch;
            }
            let (read, trust, note) = read_pair(&disk[0], &disk[1]).unwrap();
            prop_assert!(read.epoch >= durable);
            prop_assert_eq!(trust == SuperblockTrust::Sound, note.is_none());
            prop_assert!(stop < 4 || trust == SuperblockTrust::Sound);
            durable = durable.max(read.epoch);
            superblock = read;
        }
    }
}

#[test]
fn r16_equal_valid_copies_are_sound() {
    let (superblock, trust, note) = {
        let [a, b] = pair(&sample(), &sample());
        read_pair(&a, &b).unwrap()
    };
    assert_eq!((superblock, trust, note), (sample(), SuperblockTrust::Sound, None));
}

#[test]
fn r16_the_higher_number_counts_and_is_doubtful() {
    for (a, b) in [(6, 5), (6, 7), (5, 8), (9, 5)] {
        let [bytes_a, bytes_b] = pair(&with_seq(a), &with_seq(b));
        let (mut superblock, trust, note) = read_pair(&bytes_a, &bytes_b).unwrap();
        assert_eq!(superblock.epoch, Epoch(100 + a.max(b)));
        assert_eq!(trust, SuperblockTrust::Doubtful);
        assert!(note.unwrap().contains("differ"));
        // The next write begins with the copy that lost.
        let [(offset, _), _] = superblock.advance();
        assert_eq!(offset, if a > b { B.offset() } else { A.offset() });
        assert!(superblock.seq > a.max(b));
    }
}

/// Odd numbers begin with copy A, even ones with B.
#[test]
fn r16_a_stop_between_the_copies_leaves_no_doubt() {
    for (a, b) in [(5, 4), (5, 6), (7, 6), (7, 8)] {
        let [bytes_a, bytes_b] = pair(&with_seq(a), &with_seq(b));
        let (superblock, trust, note) = read_pair(&bytes_a, &bytes_b).unwrap();
        assert_eq!((superblock.epoch, trust), (Epoch(100 + a.max(b)), SuperblockTrust::Sound));
        assert!(note.is_none());
    }
}

#[test]
fn r16_copies_of_one_number_that_differ_are_doubtful() {
    let other = Superblock { lineage: LineageId(1), ..sample() };
    let [a, b] = pair(&sample(), &other);
    let (superblock, trust, _) = read_pair(&a, &b).unwrap();
    assert_eq!((superblock.lineage, trust), (sample().lineage, SuperblockTrust::Doubtful));
}

#[test]
fn r16_one_damaged_copy_leaves_the_other_in_doubt() {
    for seq in [6, 7] {
        for damaged in [0, 1] {
            let mut copies = pair(&with_seq(seq), &with_seq(seq));
            copies[damaged][4000] ^= 1;
            let (mut superblock, trust, note) = read_pair(&copies[0], &copies[1]).unwrap();
            assert_eq!((superblock.epoch, trust), (Epoch(100 + seq), SuperblockTrust::Doubtful));
            assert!(note.unwrap().contains("damaged"));
            let [(offset, _), _] = superblock.advance();
            assert_eq!(offset, [A, B][damaged].offset(), "the whole copy is not put at risk");
        }
    }
}

#[test]
fn r16_without_a_valid_copy_there_is_no_superblock() {
    let zero = [0; SUPERBLOCK_LEN];
    let mut torn = sample().encode(B);
    torn[50] ^= 1;
    let error = read_pair(&zero, &torn).unwrap_err();
    assert!(!error.is_blank());
    assert!(error.to_string().contains("copy A (byte 0) holds only zeroes"), "{error}");
    assert!(error.to_string().contains("copy B (byte 4096) is damaged"), "{error}");
    assert!(read_pair(&zero, &zero).unwrap_err().is_blank());
}

#[test]
fn a_copy_in_the_place_of_the_other_is_misdirected() {
    let [a, b] = pair(&sample(), &sample());
    assert_eq!(Superblock::decode(&a, B), Err(SuperblockError::Address(B)));
    assert_eq!(read_pair(&a, &a).unwrap().1, SuperblockTrust::Doubtful);
    assert!(matches!(read_pair(&b, &a), Err(SuperblockError::Both { .. })));
}

#[test]
fn a_newer_version_is_refused_even_beside_a_copy_of_ours() {
    let mut newer = sample().encode(A);
    newer[AT_VERSION] = 2;
    let newer = resealed(newer);
    let error = read_pair(&newer, &sample().encode(B)).unwrap_err();
    assert_eq!(error, SuperblockError::Version { found: 2 });
    // A damaged version byte is damage, not a version.
    let mut damaged = sample().encode(A);
    damaged[AT_VERSION] = 2;
    assert_eq!(Superblock::decode(&damaged, A), Err(SuperblockError::Checksum(A)));
}

#[test]
fn fields_that_are_out_of_range_are_named() {
    let cases: [(usize, u8, &str); 9] = [
        (AT_CHAIN_LEN, 9, "chain"),
        (AT_SLOT, 8, "slot"),
        (AT_BASE, 0, "base"),
        (AT_BASE, 4, "base"),
        (AT_SIZE, 1, "geometry"),
        (AT_SEQ + 7, 0xff, "seq"),
        (AT_PRESENT, 0xff, "reserved"),
        (AT_PRESENT, 0, "reserved"),
        (AT_END, 1, "reserved"),
    ];
    for (at, value, field) in cases {
        let mut bytes = sample().encode(A);
        bytes[at] = value;
        let error = Superblock::decode(&resealed(bytes), A).unwrap_err();
        assert_eq!(error, SuperblockError::Field { copy: A, field });
    }
}

/// A number that leaves no room for the next writes is nobody's, whatever its checksum says.
#[test]
fn a_pair_that_could_not_be_written_again_is_not_used() {
    let numbered = |seq| {
        let [a, b] = pair(&Superblock { seq, ..sample() }, &Superblock { seq, ..sample() });
        read_pair(&a, &b)
    };
    let (mut superblock, ..) = numbered(SEQ_READ_MAX).unwrap();
    superblock.advance();
    for seq in [SEQ_READ_MAX + 1, SEQ_MAX] {
        assert!(matches!(numbered(seq), Err(SuperblockError::Both { .. })), "{seq}");
    }
}

#[test]
fn foreign_short_and_long_bytes_are_refused() {
    assert_eq!(Superblock::decode(&[b'x'; SUPERBLOCK_LEN], A), Err(SuperblockError::Magic(A)));
    let whole = sample().encode(A);
    for bytes in [&whole[..4095], &[whole.as_slice(), &[0]].concat(), &[]] {
        let found = bytes.len();
        assert_eq!(Superblock::decode(bytes, A), Err(SuperblockError::Length { copy: A, found }));
    }
}

/// The format of version 1 is fixed: this image only changes together with the version.
#[test]
fn the_format_is_the_documented_one() {
    let bytes = sample().encode(B);
    let word = |at: usize| u64_at(&bytes, at);
    assert_eq!(&bytes[..8], b"BLKREPSB");
    assert_eq!((u32_at(&bytes, 8), u32_at(&bytes, 16), word(24)), (1, 4096, 4096));
    assert_eq!((word(32), word(48), word(64), word(80)), (0x0c, 0x1111_2222, 0x77, 0xb007));
    assert_eq!(bytes[96..128], [0x5a; 32]);
    assert_eq!([128, 136, 144, 152, 160].map(word), [3, 7, 12, 11, 1 << 30]);
    assert_eq!((u32_at(&bytes, 168), u32_at(&bytes, 172)), (4096, 1 << 20));
    assert_eq!([176, 184, 192, 200].map(word), [5, 0xef01, 4, 0xabcd]);
    assert_eq!([208, 216, 224].map(word), [4, 0xabcd, 12]);
    assert_eq!([232, 240, 248, 256, 264].map(word), [9, 8, 1, 2, 22]);
    assert_eq!(bytes[272..276], [1, 3, 7, 2]);
    assert_eq!([280, 288, 296, 304].map(word), [5, 0xef01, 6, 3]);
    assert!(bytes[312..].iter().all(|byte| *byte == 0));
    let mut covered = bytes[..12].to_vec();
    covered.extend(&bytes[16..]);
    assert_eq!(u32_at(&bytes, 12), crc32fast::hash(&covered));
}
