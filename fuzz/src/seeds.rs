//! The seeds of the corpus: small real inputs, made by the code that writes such bytes. `examples/seeds.rs`
//! puts them into `corpus`, a test checks that they are there. The names of those that the code under test
//! must refuse begin with `refused-`.

use std::time::Duration;

use blkrepl_engine::control::codec::HEADER_LEN;
use blkrepl_engine::control::{Applied, ClusterOp, codec};
use blkrepl_engine::meta::{CleanMark, DataIdentity, META_PAGE_LEN, Superblock, SuperblockCopy};
use blkrepl_engine::types::{
    BlockIndex, BlockRange, ClusterId, Epoch, Geometry, Incarnation, LineageId, LogIndex, Member, NodeId,
    Proposal, ProposalId, ProposalKind, Reign, ReplicaSlot, SlotSet, SuperblockTrust, VolumeId,
    VolumeSettings,
};
use blkrepl_engine::wire::{
    BaseContent, BufId, Hello, HelloReply, InconsistentMark, LocalEnd, Payload, PeerMsg, PeerReport, Refusal,
    Run, RunsKind, WriteSeq, encode,
};
use blkrepl_nbd::proto::{
    ExtendedRequestHeader, IHAVEOPT, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH, NBD_CMD_READ,
    NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_INFO_BLOCK_SIZE, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, RequestHeader,
};

use crate::meta::{Disk, FIELDS_LEN, VOLUME, record};
use crate::{control, nbd, wire};

/// File name and bytes of a seed.
pub type Seed = (&'static str, Vec<u8>);

/// The seeds of one target.
///
/// # Panics
/// If there is no such target.
#[must_use]
pub fn of(target: &str) -> Vec<Seed> {
    match target {
        "nbd_negotiation" => negotiations(),
        "nbd_requests" => requests(),
        "peer_frame" => frames(),
        "hello" => hellos(),
        "superblock_pair" => superblocks(),
        "metadata_pages" => bitmaps(),
        "control_codec" => control_values(),
        "config" => configs(),
        other => panic!("no target {other}"),
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("a short option");
    [&IHAVEOPT.to_be_bytes()[..], &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
fn info_request(name: &str, infos: &[u16]) -> Vec<u8> {
    let len = u32::try_from(name.len()).expect("a short name");
    let count = u16::try_from(infos.len()).expect("few");
    let mut data = [&len.to_be_bytes()[..], name.as_bytes(), &count.to_be_bytes()].concat();
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// Data of the two options for metadata contexts.
fn contexts_request(name: &str, queries: &[&str]) -> Vec<u8> {
    let number = |count: usize| u32::try_from(count).expect("few").to_be_bytes();
    let string = |text: &str| [&number(text.len())[..], text.as_bytes()].concat();
    let queries_sent: Vec<Vec<u8>> = queries.iter().map(|query| string(query)).collect();
    [string(name), number(queries.len()).to_vec(), queries_sent.concat()].concat()
}

fn negotiations() -> Vec<Seed> {
    let client = |volumes: u8, flags: u8, options: &[Vec<u8>]| {
        [&[volumes, 0, 0, 0, flags][..], options.concat().as_slice()].concat()
    };
    let go = option(NBD_OPT_GO, &info_request("vol0", &[NBD_INFO_BLOCK_SIZE, 1, 2]));
    let empty = option(NBD_OPT_GO, &info_request("", &[]));
    let structured = option(NBD_OPT_STRUCTURED_REPLY, &[]);
    let list = option(NBD_OPT_LIST_META_CONTEXT, &contexts_request("vol1", &[]));
    let queries = ["base:allocation", "x-none:", "blkrepl:dirty"];
    let set = option(NBD_OPT_SET_META_CONTEXT, &contexts_request("vol0", &queries));
    vec![
        // As the Linux client and qemu do it.
        ("go", client(1, 3, &[structured.clone(), go.clone()])),
        ("go-extended", client(1, 3, &[option(NBD_OPT_EXTENDED_HEADERS, &[]), empty.clone()])),
        ("go-contexts", client(2, 3, &[structured, list, set, go])),
        ("go-only-volume", client(1, 3, &[option(NBD_OPT_LIST, &[]), empty.clone()])),
        ("export-name", client(2, 1, &[option(NBD_OPT_EXPORT_NAME, b"vol1")])),
        ("export-name-oldest", client(1, 0, &[option(NBD_OPT_EXPORT_NAME, b"")])),
        ("refused-info", client(3, 3, &[option(NBD_OPT_INFO, &info_request("policy", &[3])), empty])),
        ("refused-abort", client(3, 3, &[option(NBD_OPT_LIST, &[]), option(NBD_OPT_ABORT, &[])])),
        ("refused-long-option", client(1, 3, &[option(99, &[0; 60]), option(NBD_OPT_LIST, b"x")])),
    ]
}

fn requests() -> Vec<Seed> {
    let header = |command, flags, offset, len| RequestHeader {
        flags,
        command,
        handle: 0x0102_0304_0506_0708,
        offset,
        len,
    };
    let stream = |control: u8, parts: &[(RequestHeader, &[u8])]| {
        let parts = parts.iter().map(|(header, payload)| [&header.encode()[..], payload].concat());
        [vec![control], parts.collect::<Vec<_>>().concat()].concat()
    };
    let end = nbd::EXPORT_SIZE;
    let good = stream(
        0,
        &[
            (header(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 4096, 16), &[0xab; 16]),
            (header(NBD_CMD_READ, 0, end - 512, 512), &[]),
            (header(NBD_CMD_TRIM, 0, 0, 1 << 20), &[]),
            (header(NBD_CMD_WRITE_ZEROES, 3, 0, 1 << 30), &[]),
            (header(NBD_CMD_FLUSH, 0, 0, 0), &[]),
            (header(NBD_CMD_DISC, 0, 0, 0), &[]),
        ],
    );
    let beyond = stream(
        6,
        &[
            (header(NBD_CMD_WRITE, 0, u64::MAX - 7, 8), &[1; 8]),
            (header(NBD_CMD_READ, 0, 0, 1 << 20), &[]),
            (header(7, 0, 0, 4096), &[]),
        ],
    );
    let structured = stream(
        8,
        &[
            (header(NBD_CMD_READ, NBD_CMD_FLAG_DF, 4096, 512), &[]),
            (header(NBD_CMD_READ, 0, end, 512), &[]),
            (header(NBD_CMD_CACHE, 0, 0, 1 << 20), &[]),
            (header(NBD_CMD_WRITE, 0, end, 8), &[3; 8]),
        ],
    );
    let status = stream(
        8 + 32 + 64,
        &[
            (header(NBD_CMD_BLOCK_STATUS, 0, 4096, 1 << 20), &[]),
            (header(NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 0, 4096), &[]),
            (header(NBD_CMD_BLOCK_STATUS, 0, end, 4096), &[]),
        ],
    );
    let extended = {
        let payload = NBD_CMD_FLAG_PAYLOAD_LEN;
        let parts = [
            (header(NBD_CMD_WRITE, payload, 4096, 16), &[0xab; 16][..]),
            (header(NBD_CMD_WRITE, 0, 4096, 16), &[]),
            (header(NBD_CMD_TRIM, payload, 0, 8), &[1; 8]),
            (header(NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 4096), &[]),
            (header(NBD_CMD_TRIM, 0, 0, 1 << 30), &[]),
            (header(NBD_CMD_BLOCK_STATUS, 0, 0, 1 << 30), &[]),
            (header(NBD_CMD_FLUSH, 0, 0, 0), &[]),
        ];
        let parts = parts
            .map(|(header, payload)| [&ExtendedRequestHeader::from(header).encode()[..], payload].concat());
        [vec![16 + 64], parts.concat()].concat()
    };
    let read_only = stream(1, &[(header(NBD_CMD_WRITE, 0, 0, 4), &[2; 4])]);
    let magic = stream(0, &[(header(NBD_CMD_READ, 0, 0, 4096), &[])])[2..].to_vec();
    vec![
        ("every-command", good),
        ("structured-replies", structured),
        ("extended-headers", extended),
        ("block-status", status),
        ("refused-beyond", beyond),
        ("refused-read-only", read_only),
        ("refused-magic", magic),
    ]
}

fn run_of(node: u64) -> Member {
    Member { node: NodeId(node), incarnation: Incarnation { boot: 4, nonce: node << 32 } }
}

fn frame(messages: &[(PeerMsg, &[u8])]) -> Vec<u8> {
    // The control byte: as it is.
    let mut out = vec![0];
    for (message, content) in messages {
        encode(message, &mut out);
        out.extend_from_slice(content);
    }
    out
}

fn frames() -> Vec<Seed> {
    let (reign, blocks) = (Reign(3), BlockRange { start: BlockIndex(17), count: 1 });
    let content: Vec<u8> = [7, 0, 1, 0xff].repeat(1024);
    let payload = Payload { buf: BufId(0), len: 4096, crc: crc32fast::hash(&content) };
    let view = control::founded().config_view(control::VOLUME).expect("the volume");
    let report = PeerReport {
        trust: SuperblockTrust::Sound,
        epoch: Epoch(5),
        lineage: LineageId(1),
        member: Some(run_of(2).incarnation),
        base: BaseContent::Member,
        inconsistent: Some(InconsistentMark { epoch: Epoch(4), reign, source: run_of(1) }),
        damaged_pages: 2,
    };
    let runs = vec![Run { start: 0, count: 2 }, Run { start: 5, count: 1000 }];
    let write = PeerMsg::Write {
        reign,
        seq: WriteSeq(9),
        blocks,
        durable: true,
        missing: SlotSet(0b100),
        config: LogIndex(12),
        payload,
    };
    let numbered = [
        PeerMsg::WriteAck { reign, seq: WriteSeq(9) },
        PeerMsg::Flush { reign, id: 1 },
        PeerMsg::Stable { reign, through: WriteSeq(9), drain: true },
        PeerMsg::JoinFlush { reign, id: 2, through: WriteSeq(9) },
        PeerMsg::ReadRequest { reign, id: 3, blocks },
        PeerMsg::ReadReply { reign, id: 3, payload: None },
        PeerMsg::CopyZero { reign, id: 4, blocks },
        PeerMsg::Ping,
    ];
    let numbered: Vec<(PeerMsg, &[u8])> = numbered.into_iter().map(|message| (message, &[][..])).collect();
    let dirty = RunsKind::Dirty(ReplicaSlot(1));
    vec![
        ("config", frame(&[(PeerMsg::Config(Box::new(view)), &[])])),
        ("take-over", frame(&[(PeerMsg::Takeover { reign }, &[]), (PeerMsg::Report { reign, report }, &[])])),
        ("runs", frame(&[(PeerMsg::Runs { reign, kind: dirty, runs, last: true }, &[])])),
        ("write", frame(&[(write, &content)])),
        ("small-kinds", frame(&numbered)),
        (
            "compare",
            frame(&[
                (PeerMsg::Compare { reign, id: 6, blocks, hashes: vec![[0x5a; 16]] }, &[]),
                (PeerMsg::CompareResult { reign, id: 6, differ: vec![true, false, true] }, &[]),
                (PeerMsg::Failed { reign, reason: "cannot write vol0.data: I/O error".into() }, &[]),
            ]),
        ),
        ("refused-short", frame(&[(PeerMsg::Ping, &[])])[..30].to_vec()),
    ]
}

fn hellos() -> Vec<Seed> {
    let own = wire::local_end();
    let dialer = LocalEnd { node: NodeId(1), ..own };
    let hello = Hello::new(&dialer, own.node);
    let stranger = Hello { cluster: ClusterId(1), ..hello };
    let answered = HelloReply { node: NodeId(1), ..hello.answer(&own) };
    let refusal = HelloReply::refuse(&own, Refusal::NotReady, "vol0 is opening; try again");
    let tagged = |control: u8, bytes: &[u8]| [&[control], bytes].concat();
    vec![
        ("hello", tagged(1, &hello.encode())),
        ("hello-stranger", tagged(1, &stranger.encode())),
        ("hello-resealed", tagged(3, &hello.encode()[..90])),
        ("accepted", tagged(0, &answered.encode())),
        ("answer-no", tagged(2, &refusal.encode())),
        ("refused-checksum", tagged(1, &hello.encode()[..95])),
    ]
}

fn superblock(seq: u64) -> Superblock {
    Superblock {
        cluster: ClusterId(0xc1),
        volume: VolumeId(0x70),
        node: NodeId(2),
        slot: ReplicaSlot(1),
        geometry: Geometry::new(1 << 30, 4096, 1 << 20).expect("a good geometry"),
        seq,
        epoch: Epoch(6),
        reign: Reign(5),
        lineage: LineageId(1),
        member: Some(run_of(2).incarnation),
        chain: vec![run_of(2).incarnation, Incarnation { boot: 5, nonce: 77 }],
        current: Incarnation { boot: 5, nonce: 77 },
        os_boot: 0xb007,
        inconsistent: None,
        base: BaseContent::Member,
        identity: DataIdentity([0x1d; 32]),
        clean: Some(CleanMark { incarnation: run_of(2).incarnation, epoch: Epoch(6) }),
    }
}

fn superblocks() -> Vec<Seed> {
    let pair = |a: &Superblock, b: &Superblock| {
        let [a, b] = [a.encode(SuperblockCopy::A), b.encode(SuperblockCopy::B)];
        [&[0], &a[..FIELDS_LEN], &b[..FIELDS_LEN]].concat()
    };
    let (older, newer) = (superblock(8), superblock(9));
    let resync = Superblock {
        inconsistent: Some(InconsistentMark { epoch: Epoch(4), reign: Reign(3), source: run_of(1) }),
        member: None,
        chain: Vec::new(),
        clean: None,
        base: BaseContent::Unknown,
        ..superblock(41)
    };
    let mut one_damaged = pair(&resync, &resync);
    one_damaged[1 + FIELDS_LEN + 200] ^= 0x10;
    let mut resealed = pair(&newer, &newer);
    // The reader must cope with what only a good checksum lets through.
    resealed[0] = 0b1111;
    vec![
        ("equal", pair(&newer, &newer)),
        ("stopped-between", pair(&newer, &older)),
        ("differ", pair(&older, &newer)),
        ("one-damaged", one_damaged),
        ("resealed", resealed),
        // Once read, and then too large to be written again.
        ("refused-largest-number", pair(&superblock(1 << 62), &superblock(1 << 62))),
        ("refused-blank", vec![0; 40]),
    ]
}

fn page_record(place: u8, kind: u8, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(content.len()).expect("a page");
    [&[place, kind][..], &len.to_le_bytes(), content].concat()
}

/// A bitmap as the program writes it: every group in both slots, then one change.
fn written(control: u8, set: &[(u64, u64)]) -> Vec<u8> {
    let mut disk = Disk::new(control);
    let mut bitmap = blkrepl_engine::meta::PagedBitmap::new_clear(disk.area, disk.bits, VOLUME, &disk.layout);
    for group in (0..bitmap.groups()).flat_map(|group| [group, group]) {
        disk.write(bitmap.encode_group(group), 0xff);
    }
    for (start, count) in set {
        bitmap.set_range(*start, *count);
    }
    while let Some(group) = bitmap.first_unsaved(0) {
        disk.write(bitmap.encode_group(group), 0xff);
    }
    let mut out = vec![control, 0b1010_0101];
    for (place, page) in disk.bytes.chunks(META_PAGE_LEN).enumerate() {
        let len = page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let place = u8::try_from(place).expect("few pages");
        out.extend(page_record(place, record::RAW, &page[..len]));
    }
    out
}

fn bitmaps() -> Vec<Seed> {
    let sealed = |place, seq: u64, bits: &[u8]| {
        page_record(place, record::SEALED, &[&seq.to_le_bytes()[..], bits].concat())
    };
    let whole: Vec<u8> =
        (0..16).flat_map(|place| sealed(place, 1 + u64::from(place / 8), &[place])).collect();
    let damaged = page_record(3, record::DAMAGE, &[40, 0, 0xff]);
    let misplaced = page_record(9, record::MISPLACED, &[8]);
    vec![
        ("intent", written(2, &[(3, 1), (60, 4)])),
        ("dirty-two-groups", written(9, &[(0, 90), (30_719, 3)])),
        ("sealed", [&[6, 0xff][..], &whole].concat()),
        ("refused-torn", [&[6, 0x0f][..], &whole, &damaged].concat()),
        ("refused-misplaced", [&[7, 0xf0][..], &whole, &misplaced].concat()),
        ("refused-same-number", [&[2, 0][..], &sealed(0, 4, &[1]), &sealed(8, 4, &[2])].concat()),
        ("refused-unwritten", vec![3, 1]),
    ]
}

fn control_values() -> Vec<Seed> {
    let ops = control::founding();
    let create = ops.last().cloned().expect("the volume");
    let join = ClusterOp::Propose(Proposal {
        id: ProposalId(3),
        volume: control::VOLUME,
        expected_epoch: Epoch(1),
        by: control::member(1),
        kind: ProposalKind::Join(control::member(2)),
    });
    let lease = ClusterOp::SetLease { lease: Duration::from_secs(3) };
    // Once committed, and then too long for the config that a peer gets.
    let settings = VolumeSettings { disk_timeout: Duration::MAX, ..VolumeSettings::default() };
    let timeout = ClusterOp::ChangeSettings { volume: control::VOLUME, expected_epoch: Epoch(1), settings };
    let whole = |op: &ClusterOp| codec::encode(&control::command(40, op.clone())).expect("a short command");
    let body = |control: u8, bytes: &[u8]| [&[control], &bytes[HEADER_LEN..]].concat();
    let state = codec::encode(&control::founded()).expect("a small state");
    let applied = Applied::Refused("epoch 4 was expected, it is 5; ask again".into());
    let applied = codec::encode(&applied).expect("a short text");
    vec![
        ("command", [&[0], &whole(&join)[..]].concat()),
        ("init", body(1, &whole(&ops[0]))),
        ("register", body(1, &whole(&ops[2]))),
        ("create-volume", body(1, &whole(&create))),
        ("join", body(1, &whole(&join))),
        ("set-lease", body(1, &whole(&lease))),
        ("longest-timeout", body(1, &whole(&timeout))),
        ("snapshot", body(2, &state)),
        ("applied", body(3, &applied)),
        ("refused-damaged", [&[0], &whole(&join)[1..]].concat()),
    ]
}

fn configs() -> Vec<Seed> {
    const NODE: &str = "[node]\nid = 1\nname = \"n1\"\nkind = \"data\"\n\n[listen]\n\
        control = \"127.0.0.1:7101\"\npeer = \"127.0.0.1:7102\"\nnbd_tcp = \"[::1]:10809\"\n\n";
    const FIRST: &str = "[[cluster]]\nid = 1\nname = \"n1\"\nkind = \"data\"\n\
        control = \"127.0.0.1:7101\"\npeer = \"127.0.0.1:7102\"\nnbd = \"n1.example:10809\"\n\n";
    const WITNESS: &str = "[[cluster]]\nid = 3\nname = \"n3\"\nkind = \"witness\"\n\
        control = \"127.0.0.1:7301\"\npeer = \"127.0.0.1:7302\"\n\n";
    const REST: &str = "[timing]\nlease_ms = 3000\nrenew_ms = 500\nelection_min_ms = 600\n\
        election_max_ms = 900\n\n[volume.vol0]\ndata = \"/dev/vg/vol0\"\nmeta = \"meta/vol0\"\n";
    let bytes = |parts: &[&str]| parts.concat().into_bytes();
    vec![
        ("smallest.toml", bytes(&[NODE, FIRST])),
        ("all-keys.toml", bytes(&[NODE, FIRST, WITNESS, REST])),
        ("refused-unknown-key.toml", bytes(&[NODE, FIRST, "[volume.vol0]\nsize = 1\n"])),
        ("refused-timing.toml", bytes(&[NODE, FIRST, "[timing]\nrenew_ms = 2000\n"])),
        ("refused-no-founder.toml", bytes(&[NODE, WITNESS])),
    ]
}
