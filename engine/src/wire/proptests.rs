//! Property tests of the whole module: every kind of message survives the wire, damage of any single bit
//! is noticed, and no bytes, however wrong, panic or claim memory that did not arrive.

use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::types::{
    BlockIndex, BlockRange, ClusterId, ConfigView, Durability, Epoch, Geometry, Incarnation, LineageFork,
    LineageId, LogIndex, Member, NodeId, Reign, ReplicaSlot, ReplicaView, SlotSet, SuperblockTrust, VolumeId,
    VolumeSettings,
};

const BUF: BufId = BufId(77);

fn incarnation() -> impl Strategy<Value = Incarnation> {
    any::<(u64, u64)>().prop_map(|(boot, nonce)| Incarnation { boot, nonce })
}

fn member() -> impl Strategy<Value = Member> {
    (any::<u64>(), incarnation()).prop_map(|(node, incarnation)| Member { node: NodeId(node), incarnation })
}

fn blocks(most: u64) -> impl Strategy<Value = BlockRange> {
    (1..=most).prop_flat_map(|count| {
        (0..=VOLUME_BLOCKS_MAX - count).prop_map(move |start| BlockRange { start: BlockIndex(start), count })
    })
}

/// Content of whole blocks; small, its bytes do not matter.
fn content(len: u64, fill: u8) -> Vec<u8> {
    vec![fill; usize::try_from(len).unwrap()]
}

fn payload(content: &[u8]) -> Payload {
    Payload { buf: BUF, len: u32::try_from(content.len()).unwrap(), crc: crc32fast::hash(content) }
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    vec((0u64..1 << 18, 1u64..1 << 10), 0..40).prop_map(|gaps| {
        let mut from = 0;
        gaps.iter()
            .map(|(gap, count)| {
                let run = Run { start: from + gap, count: *count };
                from = run.start + run.count;
                run
            })
            .collect()
    })
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (1..=VOLUME_BLOCKS_MAX, 16u32..=26)
        .prop_map(|(blocks, region)| Geometry::new(blocks * 4096, 4096, 1 << region).unwrap())
}

fn settings() -> impl Strategy<Value = VolumeSettings> {
    any::<(bool, u64, u64, u32, u32, u64)>().prop_map(|(always, peer, disk, regions, window, budget)| {
        VolumeSettings {
            durability: if always { Durability::Always } else { Durability::Flush },
            peer_timeout: Duration::from_nanos(peer),
            disk_timeout: Duration::from_nanos(disk),
            intent_regions_max: regions,
            resync_window_bytes: window,
            resync_latency_budget: Duration::from_nanos(budget),
        }
    })
}

fn replicas() -> impl Strategy<Value = Vec<ReplicaView>> {
    let nodes = proptest::collection::btree_set(any::<u64>(), 1..=8);
    let slots = Just((0u8..8).collect::<Vec<_>>()).prop_shuffle();
    (nodes, slots, vec(option::of(incarnation()), 8)).prop_map(|(nodes, slots, last)| {
        let parts = nodes.into_iter().zip(slots).zip(last);
        parts
            .map(|((node, slot), last_member)| ReplicaView {
                node: NodeId(node),
                slot: ReplicaSlot(slot),
                last_member,
            })
            .collect()
    })
}

fn config() -> impl Strategy<Value = ConfigView> {
    let ids = any::<(u64, u128, u128, u64, u64, u128)>();
    let history = vec(any::<(u128, u64)>(), 0..5);
    let picks = (1u8..=255, vec(incarnation(), 8), option::of((0usize..8, incarnation())));
    (ids, replicas(), picks, history, geometry(), settings()).prop_map(
        |(ids, replicas, (pick, runs, primary), history, geometry, settings)| {
            let chosen = replicas.iter().zip(&runs).enumerate();
            let mut in_sync: Vec<Member> = chosen
                .filter(|(at, _)| pick & (1 << at) != 0)
                .map(|(_, (replica, run))| Member { node: replica.node, incarnation: *run })
                .collect();
            if in_sync.is_empty() {
                in_sync.push(Member { node: replicas[0].node, incarnation: runs[0] });
            }
            let primary = primary
                .map(|(at, incarnation)| Member { node: replicas[at % replicas.len()].node, incarnation });
            ConfigView {
                index: LogIndex(ids.0),
                cluster: ClusterId(ids.1),
                volume: VolumeId(ids.2),
                epoch: Epoch(ids.3.max(ids.4)),
                reign: Reign(ids.3.min(ids.4)),
                primary,
                in_sync,
                replicas,
                lineage: LineageId(ids.5),
                history: history
                    .into_iter()
                    .map(|(lineage, epoch)| LineageFork {
                        lineage: LineageId(lineage),
                        fork_epoch: Epoch(epoch),
                    })
                    .collect(),
                geometry,
                settings,
            }
        },
    )
}

fn report() -> impl Strategy<Value = PeerReport> {
    let trust = prop_oneof![
        Just(SuperblockTrust::Sound),
        Just(SuperblockTrust::Doubtful),
        Just(SuperblockTrust::None)
    ];
    let base = prop_oneof![Just(BaseContent::Zero), Just(BaseContent::Unknown), Just(BaseContent::Member)];
    let mark = (any::<(u64, u64)>(), member()).prop_map(|((epoch, reign), source)| InconsistentMark {
        epoch: Epoch(epoch),
        reign: Reign(reign),
        source,
    });
    (trust, base, any::<(u64, u128, u32)>(), option::of(incarnation()), option::of(mark)).prop_map(
        |(trust, base, (epoch, lineage, damaged_pages), member, inconsistent)| PeerReport {
            trust,
            epoch: Epoch(epoch),
            lineage: LineageId(lineage),
            member,
            base,
            inconsistent,
            damaged_pages,
        },
    )
}

/// A message of the given kind, with the content that follows its frame.
fn message_of(kind: FrameKind) -> BoxedStrategy<(PeerMsg, Vec<u8>)> {
    let bare = |msg: PeerMsg| (msg, Vec::new());
    let fence = any::<u64>().prop_map(Reign);
    let numbered = (any::<u64>().prop_map(Reign), any::<u64>());
    match kind {
        FrameKind::Config => config().prop_map(move |v| bare(PeerMsg::Config(Box::new(v)))).boxed(),
        FrameKind::Takeover => fence.prop_map(move |reign| bare(PeerMsg::Takeover { reign })).boxed(),
        FrameKind::Report => {
            (fence, report()).prop_map(move |(reign, report)| bare(PeerMsg::Report { reign, report })).boxed()
        }
        FrameKind::Runs => {
            let which = prop_oneof![
                Just(RunsKind::Intent),
                Just(RunsKind::Foreign),
                (0u8..8).prop_map(|slot| RunsKind::Dirty(ReplicaSlot(slot)))
            ];
            (fence, which, runs(), any::<bool>())
                .prop_map(move |(reign, kind, runs, last)| bare(PeerMsg::Runs { reign, kind, runs, last }))
                .boxed()
        }
        FrameKind::Zero => (any::<(u64, u64, bool, u8, u64)>(), blocks(VOLUME_BLOCKS_MAX))
            .prop_map(move |((reign, seq, durable, missing, config), blocks)| {
                bare(PeerMsg::Zero {
                    reign: Reign(reign),
                    seq: WriteSeq(seq),
                    blocks,
                    durable,
                    missing: SlotSet(missing),
                    config: LogIndex(config),
                })
            })
            .boxed(),
        FrameKind::Compare => (numbered, 1usize..40, any::<u8>())
            .prop_flat_map(move |((reign, id), count, fill)| {
                let hashes = vec![[fill; BLOCK_HASH_LEN]; count];
                let exact = count as u64;
                (0..=VOLUME_BLOCKS_MAX - exact).prop_map(move |start| {
                    let blocks = BlockRange { start: BlockIndex(start), count: exact };
                    bare(PeerMsg::Compare { reign, id, blocks, hashes: hashes.clone() })
                })
            })
            .boxed(),
        FrameKind::CompareResult => (numbered, vec(any::<bool>(), 1..70))
            .prop_map(move |((reign, id), differ)| bare(PeerMsg::CompareResult { reign, id, differ }))
            .boxed(),
        FrameKind::Failed => (fence, ".{0,200}")
            .prop_map(move |(reign, reason)| bare(PeerMsg::Failed { reign, reason }))
            .boxed(),
        FrameKind::Write | FrameKind::Copy | FrameKind::ReadReply => content_message_of(kind),
        _ => small_message_of(kind),
    }
}

/// The kinds that block content may follow.
fn content_message_of(kind: FrameKind) -> BoxedStrategy<(PeerMsg, Vec<u8>)> {
    let numbered = (any::<u64>().prop_map(Reign), any::<u64>());
    let write = (any::<(u64, u64, bool, u8, u64)>(), blocks(3), any::<u8>());
    match kind {
        FrameKind::Write => write
            .prop_map(|((reign, seq, durable, missing, config), blocks, fill)| {
                let bytes = content(blocks.count * 4096, fill);
                let msg = PeerMsg::Write {
                    reign: Reign(reign),
                    seq: WriteSeq(seq),
                    blocks,
                    durable,
                    missing: SlotSet(missing),
                    config: LogIndex(config),
                    payload: payload(&bytes),
                };
                (msg, bytes)
            })
            .boxed(),
        FrameKind::Copy => (numbered, blocks(3), any::<u8>())
            .prop_map(|((reign, id), blocks, fill)| {
                let bytes = content(blocks.count * 4096, fill);
                (PeerMsg::Copy { reign, id, blocks, payload: payload(&bytes) }, bytes)
            })
            .boxed(),
        FrameKind::ReadReply => (numbered, option::of((1u64..4, any::<u8>())))
            .prop_map(|((reign, id), some)| {
                let bytes = some.map(|(count, fill)| content(count * 4096, fill));
                let payload = bytes.as_deref().map(payload);
                (PeerMsg::ReadReply { reign, id, payload }, bytes.unwrap_or_default())
            })
            .boxed(),
        other => panic!("{other} carries no content"),
    }
}

/// The kinds that are a header and nothing more.
fn small_message_of(kind: FrameKind) -> BoxedStrategy<(PeerMsg, Vec<u8>)> {
    (any::<(u64, u64, u64, bool)>(), blocks(VOLUME_BLOCKS_MAX), blocks(u64::from(CONTENT_BLOCKS_MAX)))
        .prop_map(move |((reign, id, epoch, flag), any_blocks, few_blocks)| {
            let reign = Reign(reign);
            let msg = match kind {
                FrameKind::WriteAck => PeerMsg::WriteAck { reign, seq: WriteSeq(id) },
                FrameKind::Flush => PeerMsg::Flush { reign, id },
                FrameKind::FlushAck => PeerMsg::FlushAck { reign, id },
                FrameKind::Stable => PeerMsg::Stable { reign, through: WriteSeq(id), drain: flag },
                FrameKind::ResyncStart => PeerMsg::ResyncStart {
                    reign,
                    epoch: Epoch(epoch),
                    send_foreign: flag,
                    everything: epoch % 3 == 0,
                },
                FrameKind::ResyncReady => PeerMsg::ResyncReady { reign },
                FrameKind::CopyZero => PeerMsg::CopyZero { reign, id, blocks: any_blocks },
                FrameKind::CopyAck => PeerMsg::CopyAck { reign, id },
                FrameKind::JoinFlush => PeerMsg::JoinFlush { reign, id, through: WriteSeq(epoch) },
                FrameKind::JoinFlushAck => PeerMsg::JoinFlushAck { reign, id },
                FrameKind::ReadRequest => PeerMsg::ReadRequest { reign, id, blocks: few_blocks },
                FrameKind::Ping => PeerMsg::Ping,
                FrameKind::Pong => PeerMsg::Pong,
                other => panic!("{other} has a body"),
            };
            (msg, Vec::new())
        })
        .boxed()
}

fn any_message() -> impl Strategy<Value = (PeerMsg, Vec<u8>)> {
    (0..FrameKind::ALL.len()).prop_flat_map(|at| message_of(FrameKind::ALL[at]))
}

/// The frame with its content, as it travels.
fn on_the_wire(msg: &PeerMsg, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let bulk = encode(msg, &mut bytes);
    assert_eq!(bulk.map_or(0, |p| p.len as usize), content.len());
    bytes.extend_from_slice(content);
    bytes
}

/// Gives a header that was tampered with a checksum that holds.
fn seal_header(bytes: &mut [u8]) {
    let crc = crc32fast::hash(&bytes[..FRAME_HEADER_LEN - 4]);
    bytes[FRAME_HEADER_LEN - 4..FRAME_HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
}

/// Memory that the lists of a message hold.
fn list_bytes(msg: &PeerMsg) -> usize {
    match msg {
        PeerMsg::Config(view) => {
            view.history.capacity() * 24 + view.in_sync.capacity() * 24 + view.replicas.capacity() * 32
        }
        PeerMsg::Runs { runs, .. } => runs.capacity() * 16,
        PeerMsg::Compare { hashes, .. } => hashes.capacity() * 16,
        PeerMsg::CompareResult { differ, .. } => differ.capacity() / 8,
        PeerMsg::Failed { reason, .. } => reason.capacity(),
        _ => 0,
    }
}

#[test]
fn every_kind_of_message_round_trips_and_frames_follow_each_other() {
    let mut runner = TestRunner::new(ProptestConfig::with_cases(48));
    for kind in FrameKind::ALL {
        runner
            .run(&message_of(*kind), |(msg, content)| {
                prop_assert_eq!(FrameKind::of(&msg), *kind);
                let mut bytes = on_the_wire(&msg, &content);
                let len = bytes.len();
                prop_assert_eq!(decode_slice(&bytes[..len - 1], BUF), Ok(None));
                bytes.extend_from_slice(&on_the_wire(&PeerMsg::Ping, &[]));
                let header = decode_header(bytes.first_chunk().unwrap()).unwrap();
                prop_assert_eq!(header.kind(), *kind);
                let (read, used) = decode_slice(&bytes, BUF).unwrap().unwrap();
                prop_assert_eq!(&read, &msg);
                prop_assert_eq!(used, len);
                prop_assert_eq!(
                    decode_slice(&bytes[len..], BUF),
                    Ok(Some((PeerMsg::Ping, FRAME_HEADER_LEN)))
                );
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_flip_of_any_single_bit_of_any_kind_of_frame_is_noticed() {
    let mut runner = TestRunner::deterministic();
    for kind in FrameKind::ALL {
        let (msg, content) =
            proptest::strategy::ValueTree::current(&message_of(*kind).new_tree(&mut runner).unwrap());
        let good = on_the_wire(&msg, &content);
        // Every bit of the header and the first of the body; of long bodies a sample of the rest.
        let bits = good.len() * 8;
        let dense = bits.min((FRAME_HEADER_LEN + 64) * 8);
        for bit in (0..dense).chain((dense..bits).step_by(97)) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_slice(&bad, BUF).is_err(), "{kind}: bit {bit} of {bits}");
        }
    }
}

proptest! {
    #[test]
    fn a_flip_of_one_bit_is_noticed((msg, content) in any_message(), at in any::<prop::sample::Index>()) {
        let mut bytes = on_the_wire(&msg, &content);
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode_slice(&bytes, BUF).is_err());
    }

    #[test]
    fn random_bytes_are_refused_without_a_panic(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(!matches!(decode_slice(&bytes, BUF), Ok(Some(_))));
    }

    /// A faulty peer whose checksums hold: any header field, any body.
    #[test]
    fn tampered_frames_with_good_checksums_never_panic_nor_claim_memory(
        (msg, content) in any_message(),
        edits in vec((4usize..52, any::<u8>()), 0..6),
        kind in option::of(0u8..30),
        body_edits in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        len in option::of(0usize..400),
    ) {
        let mut bytes = on_the_wire(&msg, &content);
        for (at, value) in edits {
            bytes[at] = value;
        }
        if let Some(kind) = kind {
            bytes[4] = kind;
        }
        if let Some(len) = len {
            bytes.resize(FRAME_HEADER_LEN + len, 0xa5);
        }
        let body = bytes.len() - FRAME_HEADER_LEN;
        for (at, value) in body_edits {
            if body > 0 {
                bytes[FRAME_HEADER_LEN + at.index(body)] = value;
            }
        }
        let crc = crc32fast::hash(&bytes[FRAME_HEADER_LEN..]);
        bytes[52..56].copy_from_slice(&u32::try_from(body).unwrap().to_le_bytes());
        bytes[56..60].copy_from_slice(&crc.to_le_bytes());
        seal_header(&mut bytes);
        if let Ok(Some((read, used))) = decode_slice(&bytes, BUF) {
            prop_assert!(used == bytes.len());
            prop_assert!(list_bytes(&read) <= body + 8, "{} bytes for a body of {body}", list_bytes(&read));
            // What is accepted has one encoding only.
            let mut again = Vec::new();
            encode(&read, &mut again);
            prop_assert_eq!(&again[..], &bytes[..again.len()]);
        }
    }

    /// Whatever a header with a good checksum announces, what follows is within the limits.
    #[test]
    fn announced_lengths_are_bounded(
        kind in 1u8..=24, flags in 0u8..32, selector in 0u8..30, count in 0u64..20_000,
        items in any::<u32>(), len in any::<u32>(),
    ) {
        let mut bytes = [0u8; FRAME_HEADER_LEN];
        bytes[..8].copy_from_slice(&[b'B', b'R', b'f', b'r', kind, flags, 0, selector]);
        bytes[32..40].copy_from_slice(&count.to_le_bytes());
        for (items, len) in [(items, len), (0, len), (items, items.wrapping_mul(16)), (0, 4096)] {
            bytes[48..52].copy_from_slice(&items.to_le_bytes());
            bytes[52..56].copy_from_slice(&len.to_le_bytes());
            seal_header(&mut bytes);
            if let Ok(header) = decode_header(&bytes) {
                match header.body_len() {
                    BodyLen::None => {}
                    BodyLen::Inline(len) => prop_assert!(len <= INLINE_BYTES_MAX),
                    BodyLen::Bulk(len) => prop_assert!(len <= PAYLOAD_BYTES_MAX && len % 4096 == 0),
                }
            }
        }
    }

    #[test]
    fn version_negotiation_is_symmetric_and_picks_the_highest_common(
        a in (1u16..40, 0u16..20), b in (1u16..40, 0u16..20),
    ) {
        let range = |(min, more): (u16, u16)| VersionRange { min, max: min + more };
        let (a, b) = (range(a), range(b));
        let holds = |r: VersionRange, v: u16| r.min <= v && v <= r.max;
        let expected = (1..=60).rev().find(|v| holds(a, *v) && holds(b, *v));
        prop_assert_eq!(negotiate(a, b), expected);
        prop_assert_eq!(negotiate(b, a), expected);
    }

    #[test]
    fn hellos_and_answers_round_trip_and_notice_any_flipped_bit(
        ids in any::<(u128, u128, u64, u64)>(), run in incarnation(), versions in (1u16..99, 0u16..99),
        code in 0u16..12, reason in ".{0,200}", at in any::<prop::sample::Index>(),
    ) {
        let versions = VersionRange { min: versions.0, max: versions.0 + versions.1 };
        let (cluster, volume) = (ClusterId(ids.0), VolumeId(ids.1));
        let local = LocalEnd { versions, cluster, volume, node: NodeId(ids.2), incarnation: run };
        let hello = Hello::new(&local, NodeId(ids.3));
        let mut bytes = hello.encode();
        prop_assert_eq!(Hello::decode(&bytes), Ok(hello));
        let bit = at.index(HELLO_LEN * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Hello::decode(&bytes).is_err());

        let reply = match code {
            0 => hello.answer(&LocalEnd { node: hello.to, ..local }),
            _ => HelloReply::refuse(&local, Refusal::from_number(code), &reason),
        };
        let mut bytes = reply.encode();
        prop_assert_eq!(HelloReply::decode(&bytes), Ok(reply));
        let bit = at.index(HELLO_REPLY_LEN * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(HelloReply::decode(&bytes).is_err());
    }

    #[test]
    fn random_hellos_never_panic(bytes in vec(any::<u8>(), HELLO_REPLY_LEN)) {
        prop_assert!(Hello::decode(bytes.first_chunk().unwrap()).is_err());
        prop_assert!(HelloReply::decode(bytes.first_chunk().unwrap()).is_err());
    }
}

#[test]
fn an_unknown_kind_is_named() {
    let mut bytes = on_the_wire(&PeerMsg::Ping, &[]);
    bytes[4] = 200;
    seal_header(&mut bytes);
    let error = decode_slice(&bytes, BUF).unwrap_err();
    assert_eq!(error, WireError::UnknownKind(200));
    assert!(error.to_string().contains("200"));
}

#[test]
fn a_body_that_the_header_did_not_announce_is_refused() {
    let bytes = on_the_wire(&PeerMsg::Failed { reign: Reign(1), reason: "disk".into() }, &[]);
    let header = decode_header(bytes.first_chunk().unwrap()).unwrap();
    assert_eq!(header.body_len(), BodyLen::Inline(4));
    assert_eq!(header.reign(), Some(Reign(1)));
    let bulk = Payload { buf: BUF, len: 4, crc: header.body_crc() };
    for body in [Body::None, Body::Bulk(bulk), Body::Inline(vec![0; 5])] {
        assert!(matches!(header.into_message(body), Err(WireError::BodyDiffers { .. })));
    }
    let damaged = header.into_message(Body::Inline(b"disc".to_vec()));
    assert!(matches!(damaged, Err(WireError::Checksum { .. })));
}

#[test]
fn damaged_content_is_refused_before_it_can_reach_a_disk() {
    let bytes = content(4096, 7);
    let blocks = BlockRange { start: BlockIndex(3), count: 1 };
    let msg = PeerMsg::Copy { reign: Reign(1), id: 2, blocks, payload: payload(&bytes) };
    let frame = on_the_wire(&msg, &bytes);
    let header = decode_header(frame.first_chunk().unwrap()).unwrap();
    assert_eq!(header.body_len(), BodyLen::Bulk(4096));
    let arrived = Payload { crc: header.body_crc() ^ 1, ..payload(&bytes) };
    assert!(matches!(header.into_message(Body::Bulk(arrived)), Err(WireError::Checksum { .. })));
}

#[test]
#[should_panic(expected = "body length")]
fn content_that_does_not_fit_its_range_is_never_sent() {
    let blocks = BlockRange { start: BlockIndex(0), count: 2 };
    let payload = payload(&content(4096, 1));
    encode(&PeerMsg::Copy { reign: Reign(1), id: 1, blocks, payload }, &mut Vec::new());
}

#[test]
fn a_reason_that_is_too_long_is_cut() {
    let msg = PeerMsg::Failed { reign: Reign(1), reason: "x".repeat(5000) };
    let (read, _) = decode_slice(&on_the_wire(&msg, &[]), BUF).unwrap().unwrap();
    assert!(matches!(read, PeerMsg::Failed { reason, .. } if reason.len() == FAILED_REASON_MAX as usize));
}
