//! The bytes of protocol version 1, computed by an independent program from docs/protocol.md. They never
//! change: a test here that fails means that old and new nodes no longer understand each other.

use std::time::Duration;

use super::*;
use crate::types::{
    BlockIndex, BlockRange, ClusterId, ConfigView, Durability, Epoch, Geometry, Incarnation, LineageFork,
    LineageId, LogIndex, Member, NodeId, Reign, ReplicaSlot, ReplicaView, SlotSet, SuperblockTrust, VolumeId,
    VolumeSettings,
};

fn bytes(hex: &[&str]) -> Vec<u8> {
    let digits = hex.concat();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn frame(msg: &PeerMsg) -> Vec<u8> {
    let mut out = Vec::new();
    encode(msg, &mut out);
    out
}

const RUN: Incarnation = Incarnation { boot: 5, nonce: 6 };

#[test]
fn a_write_frame() {
    let content = vec![0x5a; 8192];
    let msg = PeerMsg::Write {
        reign: Reign(0x0102_0304_0506_0708),
        seq: WriteSeq(42),
        blocks: BlockRange { start: BlockIndex(7), count: 2 },
        durable: true,
        missing: SlotSet(0b101),
        config: LogIndex(99),
        payload: Payload { buf: BufId(1), len: 8192, crc: crc32fast::hash(&content) },
    };
    let expected = bytes(&[
        "425266720501050008070605040302012a000000000000000700000000000000",
        "020000000000000063000000000000000000000000200000496e88dea7d741fd",
    ]);
    assert_eq!(frame(&msg), expected);
    let whole = [expected, content].concat();
    assert_eq!(decode_slice(&whole, BufId(1)), Ok(Some((msg, FRAME_HEADER_LEN + 8192))));
}

#[test]
fn a_list_of_runs() {
    let msg = PeerMsg::Runs {
        reign: Reign(5),
        kind: RunsKind::Dirty(ReplicaSlot(2)),
        runs: vec![Run { start: 3, count: 1 }, Run { start: 10, count: 4 }],
        last: true,
    };
    let expected = bytes(&[
        "4252667204020012050000000000000000000000000000000000000000000000",
        "000000000000000000000000000000000200000020000000e38cc9213842fdb8",
        "030000000000000001000000000000000a000000000000000400000000000000",
    ]);
    assert_eq!(frame(&msg), expected);
}

#[test]
fn a_config() {
    let named = Member { node: NodeId(1), incarnation: RUN };
    let view = ConfigView {
        index: LogIndex(99),
        cluster: ClusterId(0xc1),
        volume: VolumeId(0xf0),
        epoch: Epoch(12),
        reign: Reign(11),
        primary: Some(named),
        in_sync: vec![named],
        replicas: vec![
            ReplicaView { node: NodeId(1), slot: ReplicaSlot(0), last_member: Some(RUN) },
            ReplicaView { node: NodeId(2), slot: ReplicaSlot(1), last_member: None },
        ],
        lineage: LineageId(0x11),
        history: vec![LineageFork { lineage: LineageId(0x10), fork_epoch: Epoch(4) }],
        geometry: Geometry::new(1 << 30, 4096, 1 << 20).unwrap(),
        settings: VolumeSettings {
            durability: Durability::Always,
            peer_timeout: Duration::from_secs(1),
            disk_timeout: Duration::from_secs(30),
            intent_regions_max: 256,
            resync_window_bytes: 4 << 20,
            resync_latency_budget: Duration::from_millis(10),
        },
    };
    let expected = bytes(&[
        "6300000000000000c1000000000000000000000000000000f000000000000000",
        "00000000000000000c000000000000000b000000000000001100000000000000",
        "0000000000000000000000400000000000100000000010000101010201000000",
        "00ca9a3b0000000000ac23fc0600000000010000000040008096980000000000",
        "0100000000000000",
        "0500000000000000060000000000000001000000000000000500000000000000",
        "0600000000000000010000000000000000010000000000000500000000000000",
        "0600000000000000020000000000000001000000000000000000000000000000",
        "0000000000000000100000000000000000000000000000000400000000000000",
    ]);
    assert_eq!(frame(&PeerMsg::Config(Box::new(view)))[FRAME_HEADER_LEN..], expected);
}

#[test]
fn a_report() {
    let report = PeerReport {
        trust: SuperblockTrust::Doubtful,
        epoch: Epoch(7),
        lineage: LineageId(9),
        member: Some(RUN),
        base: BaseContent::Member,
        inconsistent: Some(InconsistentMark {
            epoch: Epoch(8),
            reign: Reign(2),
            source: Member { node: NodeId(1), incarnation: Incarnation { boot: 3, nonce: 4 } },
        }),
        damaged_pages: 3,
    };
    let expected = bytes(&[
        "0102010103000000070000000000000009000000000000000000000000000000",
        "0500000000000000060000000000000008000000000000000200000000000000",
        "010000000000000003000000000000000400000000000000",
    ]);
    assert_eq!(frame(&PeerMsg::Report { reign: Reign(2), report })[FRAME_HEADER_LEN..], expected);
}

#[test]
fn a_hello_and_a_refusal() {
    let local = LocalEnd {
        versions: VersionRange { min: 1, max: 1 },
        cluster: ClusterId(0xc1),
        volume: VolumeId(0xf0),
        node: NodeId(1),
        incarnation: RUN,
    };
    let expected = bytes(&[
        "424c4b5245504c700100010000000000c1000000000000000000000000000000",
        "f000000000000000000000000000000001000000000000000500000000000000",
        "06000000000000000200000000000000000000000000000000000000126ad14b",
    ]);
    assert_eq!(Hello::new(&local, NodeId(2)).encode()[..], expected);

    let other = LocalEnd { node: NodeId(2), incarnation: Incarnation { boot: 8, nonce: 9 }, ..local };
    let reply = HelloReply::refuse(&other, Refusal::NotReady, "later").encode();
    let mut expected = bytes(&[
        "424c4b5245504c72070000000100010002000000000000000800000000000000",
        "090000000000000005000000000000006c61746572",
    ]);
    expected.resize(HELLO_REPLY_LEN - 4, 0);
    expected.extend_from_slice(&bytes(&["6dff42d7"]));
    assert_eq!(reply[..], expected);
}

#[test]
fn the_document_lists_every_kind_and_limit() {
    let text = include_str!("../../../docs/protocol.md");
    for kind in FrameKind::ALL {
        let row = format!("\n| {} | {kind} | ", kind.number());
        assert!(text.contains(&row), "no row for {kind} in docs/protocol.md");
    }
    for limit in [
        format!("content of one frame | {PAYLOAD_BYTES_MAX} bytes"),
        format!("ReadRequest | 1 to {CONTENT_BLOCKS_MAX} |"),
        format!("runs in one message | {RUNS_MAX} |"),
        format!("| {FAILED_REASON_MAX} / {HELLO_REASON_MAX} bytes |"),
        format!("**Hello**, {HELLO_LEN} bytes"),
        format!("**HelloReply**, {HELLO_REPLY_LEN} bytes"),
    ] {
        assert!(text.contains(&limit), "docs/protocol.md does not say: {limit}");
    }
    assert_eq!((VOLUME_BLOCKS_MAX, REGIONS_MAX, INLINE_BYTES_MAX), (1 << 34, 1 << 30, 2 << 20));
}
