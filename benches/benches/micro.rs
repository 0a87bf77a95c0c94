//! The pieces of the hot path that stand alone: peer frames, checksums, bitmaps and the intent map, the core's steps of
//! a request, requests and replies of NBD.
//!
//! `cargo bench -p blkrepl-benches --bench micro`; with `-- --test` each runs once, as a smoke test.

use std::hint::black_box;

use blkrepl_benches::cores::Core;
use blkrepl_engine::meta::{Area, Layout, PagedBitmap};
use blkrepl_engine::reactor::client::{Answer, ClientFrame, ClientProtocol};
use blkrepl_engine::types::{
    BlockIndex, BlockRange, Geometry, LogIndex, Reign, ReplicaSlot, SlotSet, VolumeId,
};
use blkrepl_engine::wire::{self, BufId, FRAME_HEADER_LEN, Payload, PeerMsg, WriteSeq};
use blkrepl_nbd::proto::{NBD_CMD_WRITE, RequestHeader};
use blkrepl_nbd::{ExportInfo, Replies, Session};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Bytes of the volume that the bitmaps are of.
const VOLUME_BYTES: u64 = 1 << 40;
const BLOCK_BYTES: u32 = 4096;
const REGION_BYTES: u32 = 1 << 20;
/// Blocks whose bits are set by the benches that look for them.
const SPARSE_STEP: u64 = 10_007;

fn write_of(content: &[u8]) -> PeerMsg {
    let len = u32::try_from(content.len()).expect("payloads of the benches are short");
    PeerMsg::Write {
        reign: Reign(3),
        seq: WriteSeq(42),
        blocks: BlockRange { start: BlockIndex(7), count: u64::from(len / BLOCK_BYTES) },
        durable: false,
        missing: SlotSet(0),
        config: LogIndex(9),
        payload: Payload { buf: BufId(1), len, crc: crc32fast::hash(content) },
    }
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("peer_frame");
    for len in [4096, 64 << 10] {
        let content = vec![0x5a; len];
        let msg = write_of(&content);
        let mut out = Vec::with_capacity(4096);
        group.bench_function(BenchmarkId::new("encode_write", len), |b| {
            b.iter(|| {
                out.clear();
                black_box(wire::encode(black_box(&msg), &mut out))
            });
        });
        out.clear();
        wire::encode(&msg, &mut out);
        let header: [u8; FRAME_HEADER_LEN] = out[..].try_into().expect("a write has no inline body");
        group.bench_function(BenchmarkId::new("decode_header", len), |b| {
            b.iter(|| black_box(wire::decode_header(black_box(&header))));
        });
        out.extend_from_slice(&content);
        group.bench_function(BenchmarkId::new("decode_with_checksum", len), |b| {
            b.iter(|| black_box(wire::decode_slice(black_box(&out), BufId(1))));
        });
    }
    group.finish();
}

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for len in [4096, 64 << 10, 1 << 20] {
        let content = vec![0x5a; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("crc32", len), |b| {
            b.iter(|| black_box(crc32fast::hash(black_box(&content))));
        });
    }
    group.finish();
}

fn bitmap(area: Area) -> PagedBitmap {
    let geometry = Geometry::new(VOLUME_BYTES, BLOCK_BYTES, REGION_BYTES).expect("a geometry of constants");
    let bits = if area == Area::Intent { geometry.regions() } else { geometry.blocks() };
    PagedBitmap::new_clear(area, bits, VolumeId(1), &Layout::new(&geometry))
}

fn bitmaps(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap");
    for (name, area) in [("intent", Area::Intent), ("dirty", Area::Dirty(ReplicaSlot(1)))] {
        let mut map = bitmap(area);
        let mut at = 0;
        group.bench_function(BenchmarkId::new("set_and_clear", name), |b| {
            b.iter(|| {
                at = (at + SPARSE_STEP) % map.len();
                map.set(black_box(at));
                map.clear(black_box(at))
            });
        });
        group.bench_function(BenchmarkId::new("set_again", name), |b| {
            b.iter(|| map.set(black_box(17)));
        });
        (0..map.len()).step_by(SPARSE_STEP as usize).for_each(|bit| {
            map.set(bit);
        });
        group.bench_function(BenchmarkId::new("next_set", name), |b| {
            b.iter(|| {
                at = (at + SPARSE_STEP) % map.len();
                black_box(map.next_set(black_box(at + 1)))
            });
        });
    }
    let map = {
        let mut map = bitmap(Area::Dirty(ReplicaSlot(1)));
        (0..map.len()).step_by(SPARSE_STEP as usize).for_each(|bit| {
            map.set_range(bit, 16);
        });
        map
    };
    group.bench_function("all_runs_of_1_tib", |b| b.iter(|| black_box(map.runs(0).count())));
    group.finish();
}

/// One request of 4 KiB in the core, whose disk and peer answer at once.
fn core_steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("core_step");
    let mut alone = Core::alone();
    let (mut primary, mut secondary) = Core::pair();
    group.bench_function("read_alone", |b| b.iter(|| alone.read()));
    group.bench_function("write_alone", |b| b.iter(|| alone.write_alone()));
    let mut scattered = Core::scattered();
    group.bench_function("write_alone_sets_intent", |b| b.iter(|| scattered.write_alone()));
    group.bench_function("read_primary", |b| b.iter(|| primary.read()));
    group.bench_function("write_primary", |b| b.iter(|| primary.write_replicated()));
    group.bench_function("write_secondary", |b| b.iter(|| secondary.follow_write()));
    group.finish();
}

fn nbd(c: &mut Criterion) {
    let mut group = c.benchmark_group("nbd");
    let header = RequestHeader { flags: 0, command: NBD_CMD_WRITE, handle: 7, offset: 8192, len: 4096 };
    let bytes = header.encode();
    let mut session = Session::new(&ExportInfo::new("vol0", VOLUME_BYTES), Replies::Simple);
    group.bench_function("parse_request", |b| b.iter(|| black_box(session.parse(black_box(&bytes)))));
    let ClientFrame::Request(request) = session.parse(&bytes) else { panic!("a request") };
    let mut out = Vec::with_capacity(64);
    group.bench_function("encode_reply", |b| {
        b.iter(|| {
            out.clear();
            session.reply(black_box(&request), Answer::Done, &mut out);
            black_box(out.len())
        });
    });
    group.finish();
}

criterion_group!(benches, frames, checksums, bitmaps, core_steps, nbd);
criterion_main!(benches);
