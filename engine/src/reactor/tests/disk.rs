//! Disk operations, with and without O_DIRECT.

use std::os::fd::AsRawFd;

use super::*;
use crate::reactor::disk::Disk;
use crate::reactor::open::OpenFile;
use crate::reactor::ring::{Hold, Io, Token};
use crate::replica::{DiskErrorKind, EXTENTS_MAX};
use crate::wire::Payload;

struct Bench {
    io: Io,
    disk: Disk,
    next: u64,
    /// Stands in for the result of the next completion.
    inject: Option<i32>,
}

impl Bench {
    fn new(files: VolumeFiles) -> Self {
        Self {
            io: Io::new(16, 1 << 20).unwrap(),
            disk: Disk::new(files, Arc::new(|| ())),
            next: 0,
            inject: None,
        }
    }

    fn start(&mut self, op: DiskOp) -> DiskOpId {
        self.next += 1;
        let id = DiskOpId(self.next);
        self.disk.start(&mut self.io, DiskRequest { id, op });
        id
    }

    /// One turn; the completion that it brought, if any.
    fn turn(&mut self, limit: Duration) -> Option<DiskDone> {
        if let Some(done) = self.disk.poll_done() {
            return Some(done);
        }
        if self.io.in_kernel() == 0 {
            // A search for holes is not in the ring.
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut done = Vec::new();
        let limit = if self.io.in_kernel() == 0 { Duration::ZERO } else { limit };
        self.io.turn(Some(limit), &mut done).unwrap();
        for completion in done {
            if let Hold::Buffer(buf) = completion.hold {
                self.io.buffers.release(buf);
            }
            let Token::Disk(id) = completion.token else { panic!("only disk operations here") };
            let result = self.inject.take().unwrap_or(completion.result);
            self.disk.complete(&mut self.io, id, result);
        }
        self.disk.poll_done()
    }

    fn run(&mut self, op: DiskOp) -> Result<DiskResult, DiskErrorKind> {
        let id = self.start(op);
        for _ in 0..1000 {
            if let Some(done) = self.turn(Duration::from_secs(5)) {
                assert_eq!(done.id, id);
                return done.result;
            }
        }
        panic!("the operation does not complete");
    }

    fn buffer(&mut self, bytes: &[u8]) -> BufId {
        let buf = self.io.buffers.alloc(bytes.len());
        self.io.buffers.bytes_mut(buf).copy_from_slice(bytes);
        buf
    }

    fn write(&mut self, start: u64, bytes: &[u8], durable: bool) {
        let buf = self.buffer(bytes);
        let blocks = BlockRange::between(start, start + bytes.len() as u64 / 4096);
        assert_eq!(self.run(DiskOp::Write { blocks, buf, durable }), Ok(DiskResult::Done));
        self.io.buffers.release(buf);
    }

    fn read(&mut self, start: u64, end: u64) -> (Vec<u8>, Payload, bool, usize) {
        let blocks = BlockRange::between(start, end);
        match self.run(DiskOp::Read { blocks, digest: Digest::Hashes }).unwrap() {
            DiskResult::Read { payload, all_zero, hashes } => {
                let bytes = self.io.buffers.bytes(payload.buf)[..payload.len as usize].to_vec();
                assert_eq!(payload.crc, crc32fast::hash(&bytes));
                for (block, hash) in bytes.chunks(4096).zip(&hashes) {
                    assert_eq!(hash[..], blake3::hash(block).as_bytes()[..16]);
                }
                self.io.buffers.release(payload.buf);
                (bytes, payload, all_zero, hashes.len())
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The files of a fresh volume, O_DIRECT switched off if asked for.
fn files(dir: &tempfile::TempDir, size: u64, direct: bool) -> VolumeFiles {
    let mut files = make(dir, size).files;
    if !direct {
        for file in [&mut files.data, &mut files.meta] {
            let flags = rustix::fs::fcntl_getfl(&file.fd).unwrap();
            rustix::fs::fcntl_setfl(&file.fd, flags - rustix::fs::OFlags::DIRECT).unwrap();
            file.direct = false;
        }
    }
    files
}

#[test]
fn operations_round_trip_with_and_without_o_direct() {
    for direct in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Bench::new(files(&dir, 8 << 20, direct));
        let big = pattern(3 << 20, 5);
        bench.write(1, &big, false);
        bench.write(1, &big[..4096], true);
        let (bytes, _, all_zero, hashes) = bench.read(0, 769);
        assert_eq!((&bytes[..4096], all_zero, hashes), (&[0; 4096][..], false, 769));
        assert_eq!(bytes[4096..], big);
        assert!(bench.read(1000, 1010).2, "never written: zeroes");
        assert_eq!(bench.run(DiskOp::Flush), Ok(DiskResult::Done));
        for durable in [false, true] {
            let blocks = BlockRange::between(2, 500);
            assert_eq!(bench.run(DiskOp::Zero { blocks, durable }), Ok(DiskResult::Done));
            assert!(bench.read(2, 500).2);
            assert_eq!(bench.read(500, 769).0, big[499 << 12..]);
        }
        let bytes = pattern(8192, 9);
        let op = DiskOp::MetaWrite { offset: 8192, bytes: bytes.clone() };
        assert_eq!(bench.run(op), Ok(DiskResult::Done));
        assert_eq!(std::fs::read(paths(&dir).meta).unwrap()[8192..16384], bytes);
        assert_eq!(bench.io.buffers.in_use(), 0, "every buffer came back");
    }
}

#[test]
fn edges_of_partial_writes_are_filled_from_disk() {
    for direct in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Bench::new(files(&dir, 1 << 20, direct));
        let old = pattern(16 << 12, 1);
        bench.write(4, &old, false);
        for count in 1..5_usize {
            for (head, tail) in [(0, 0), (0, 100), (7, 0), (7, 100), (4000, 90)] {
                let new = pattern(count << 12, 77);
                let mut given = vec![0xEE; count << 12];
                let inner = head..given.len() - tail;
                given[inner.clone()].copy_from_slice(&new[inner.clone()]);
                let buf = bench.buffer(&given);
                let blocks = BlockRange::between(6, 6 + count as u64);
                let (h, t) = (u32::try_from(head).unwrap(), u32::try_from(tail).unwrap());
                let filled = bench.run(DiskOp::FillEdges { buf, blocks, head: h, tail: t }).unwrap();
                let mut want = old[2 << 12..(2 + count) << 12].to_vec();
                want[inner.clone()].copy_from_slice(&new[inner]);
                assert_eq!(bench.io.buffers.bytes(buf), want, "{count} blocks, edges {head} and {tail}");
                assert_eq!(filled, DiskResult::Filled { crc: crc32fast::hash(&want) });
                bench.io.buffers.release(buf);
            }
        }
        assert_eq!(bench.io.buffers.in_use(), 0);
    }
}

#[test]
fn zeroes_are_written_where_holes_cannot_be_punched() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(files(&dir, 8 << 20, true));
    let bytes = pattern(4 << 20, 3);
    bench.write(0, &bytes, false);
    bench.inject = Some(-libc::EOPNOTSUPP);
    // More than three chunks, the last one partial.
    let blocks = BlockRange::between(1, 900);
    assert_eq!(bench.run(DiskOp::Zero { blocks, durable: true }), Ok(DiskResult::Done));
    assert!(bench.read(1, 900).2);
    let blocks = BlockRange::between(0, 1024);
    assert_eq!(
        bench.run(DiskOp::Zero { blocks: BlockRange::between(1, 2), durable: false }),
        Ok(DiskResult::Done)
    );
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(paths(&dir).data).unwrap());
    assert!(allocated * 512 >= blocks.count * 4096, "written, not punched: {allocated}");
    assert_eq!(bench.read(0, 1).0, bytes[..4096]);
    assert_eq!(bench.read(900, 1024).0, bytes[900 << 12..]);
    assert_eq!(bench.io.buffers.in_use(), 0);
}

#[test]
fn a_zero_buffer_needs_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(files(&dir, 1 << 20, true));
    let dirty = bench.buffer(&pattern(8192, 1));
    bench.io.buffers.release(dirty);
    let done = bench.run(DiskOp::ZeroBuffer { len: 8192 }).unwrap();
    let DiskResult::Read { payload, all_zero, .. } = done else { panic!("{done:?}") };
    assert!(all_zero && bench.io.buffers.bytes(payload.buf) == [0; 8192]);
    assert_eq!(payload.crc, crc32fast::hash(&[0; 8192]));
}

#[test]
fn a_data_file_that_is_truncated_in_use_is_an_error_and_not_zeroes() {
    for direct in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Bench::new(files(&dir, 1 << 20, direct));
        bench.write(0, &pattern(1 << 20, 3), false);
        std::fs::OpenOptions::new().write(true).open(paths(&dir).data).unwrap().set_len(10_000).unwrap();
        let blocks = BlockRange::between(0, 8);
        assert_eq!(bench.run(DiskOp::Read { blocks, digest: Digest::None }), Err(DiskErrorKind::Io));
        let data = vec![Stretch { count: 8, hole: false }];
        assert_eq!(
            bench.run(DiskOp::Extents { blocks, max: EXTENTS_MAX }),
            Ok(DiskResult::Extents(data)),
            "nor is it a hole"
        );
        assert_eq!(bench.io.buffers.in_use(), 0);
    }
}

#[test]
fn a_failed_flush_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = files(&dir, 1 << 20, false);
    let (pipe, _other) = std::io::pipe().unwrap();
    files.data = OpenFile { fd: pipe.into(), path: "pipe".into(), direct: false, in_memory: false };
    let mut bench = Bench::new(files);
    assert_eq!(bench.run(DiskOp::Flush), Err(DiskErrorKind::Io));
}

/// A pipe in place of the data file gives what a file never does at will: short counts and no end.
fn piped(dir: &tempfile::TempDir) -> (Bench, std::fs::File, std::fs::File) {
    let (read_end, write_end) = std::io::pipe().unwrap();
    let path = format!("/proc/self/fd/{}", write_end.as_raw_fd());
    let both = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut files = files(dir, 1 << 20, false);
    files.data = OpenFile { fd: OwnedFd::from(both), path: "pipe".into(), direct: false, in_memory: false };
    let ends = [OwnedFd::from(read_end), OwnedFd::from(write_end)].map(std::fs::File::from);
    let [read_end, write_end] = ends;
    (Bench::new(files), read_end, write_end)
}

#[test]
fn short_reads_are_continued() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, _read_end, mut write_end) = piped(&dir);
    let bytes = pattern(8192, 6);
    let blocks = BlockRange::between(0, 2);
    let id = bench.start(DiskOp::Read { blocks, digest: Digest::None });
    for piece in bytes.chunks(3000) {
        assert!(bench.turn(Duration::from_millis(20)).is_none(), "not complete yet");
        write_end.write_all(piece).unwrap();
    }
    let done = (0..10).find_map(|_| bench.turn(Duration::from_secs(1))).unwrap();
    let Ok(DiskResult::Read { payload, .. }) = done.result else { panic!("{done:?}") };
    assert_eq!((done.id, bench.io.buffers.bytes(payload.buf)), (id, &bytes[..]));
}

#[test]
fn a_hung_write_keeps_its_buffer_although_the_core_released_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, mut read_end, _write_end) = piped(&dir);
    let bytes = pattern(128 << 10, 6);
    let buf = bench.buffer(&bytes);
    let blocks = BlockRange::between(0, 32);
    bench.start(DiskOp::Write { blocks, buf, durable: false });
    bench.io.buffers.release(buf);
    // The pipe takes 64 KiB; the rest hangs.
    assert!(bench.turn(Duration::from_millis(50)).is_none());
    let other = bench.buffer(&vec![0xFF; 128 << 10]);
    assert_ne!(other, buf);
    let mut taken = vec![0; 128 << 10];
    let reader = std::thread::spawn(move || {
        read_end.read_exact(&mut taken).unwrap();
        taken
    });
    let done = (0..100).find_map(|_| bench.turn(Duration::from_secs(1))).unwrap();
    assert_eq!(done.result, Ok(DiskResult::Done));
    assert_eq!(reader.join().unwrap(), bytes, "what was written is what was given");
    assert_eq!(bench.io.buffers.in_use(), 1);
}

#[test]
fn o_direct_is_given_up_when_a_request_is_refused_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let files = files(&dir, 1 << 20, true);
    if !files.is_direct() {
        eprintln!("skipped: no O_DIRECT in the temporary directory");
        return;
    }
    let fd = files.data.fd.try_clone().unwrap();
    let mut bench = Bench::new(files);
    bench.inject = Some(-libc::EINVAL);
    bench.write(3, &pattern(4096, 2), true);
    assert!(!rustix::fs::fcntl_getfl(&fd).unwrap().contains(rustix::fs::OFlags::DIRECT));
    assert_eq!(bench.read(3, 4).0, pattern(4096, 2));
    // Without O_DIRECT the same refusal is an error.
    let buf = bench.buffer(&pattern(4096, 2));
    bench.inject = Some(-libc::EINVAL);
    let blocks = BlockRange::between(0, 1);
    assert_eq!(bench.run(DiskOp::Write { blocks, buf, durable: false }), Err(DiskErrorKind::Io));
}

#[test]
fn a_full_disk_is_told_from_a_broken_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(files(&dir, 1 << 20, true));
    let errors = [
        (libc::ENOSPC, DiskErrorKind::NoSpace),
        (libc::EFBIG, DiskErrorKind::NoSpace),
        (libc::EIO, DiskErrorKind::Io),
    ];
    for (error, kind) in errors {
        let buf = bench.buffer(&pattern(4096, 2));
        bench.inject = Some(-error);
        let blocks = BlockRange::between(0, 1);
        assert_eq!(bench.run(DiskOp::Write { blocks, buf, durable: false }), Err(kind));
        bench.io.buffers.release(buf);
        assert_eq!(bench.io.buffers.in_use(), 0);
    }
}

/// Holes of whole blocks, as the file system that the test runs on sees them.
#[test]
fn holes_are_found_between_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(files(&dir, 8 << 20, true));
    let all = BlockRange::between(0, 2048);
    let stretch = |count, hole| Stretch { count, hole };
    let found = |found| Ok(DiskResult::Extents(found));
    assert_eq!(
        bench.run(DiskOp::Extents { blocks: all, max: EXTENTS_MAX }),
        found(vec![stretch(2048, true)])
    );
    bench.write(16, &pattern(64 << 10, 1), false);
    bench.write(1024, &pattern(64 << 10, 2), false);
    let holes = vec![
        stretch(16, true),
        stretch(16, false),
        stretch(992, true),
        stretch(16, false),
        stretch(1008, true),
    ];
    assert_eq!(bench.run(DiskOp::Extents { blocks: all, max: EXTENTS_MAX }), found(holes));
    let part = BlockRange::between(20, 40);
    assert_eq!(
        bench.run(DiskOp::Extents { blocks: part, max: EXTENTS_MAX }),
        found(vec![stretch(12, false), stretch(8, true)])
    );
    assert_eq!(bench.run(DiskOp::Zero { blocks: part, durable: false }), Ok(DiskResult::Done));
    let whole = BlockRange::between(0, 1024);
    let left = vec![stretch(16, true), stretch(4, false), stretch(1004, true)];
    assert_eq!(bench.run(DiskOp::Extents { blocks: whole, max: EXTENTS_MAX }), found(left));
    let few = DiskOp::Extents { blocks: whole, max: 2 };
    assert_eq!(bench.run(few), found(vec![stretch(16, true), stretch(4, false)]));
}

#[test]
fn a_search_for_holes_ends_after_a_bounded_number() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(files(&dir, 8 << 20, true));
    for n in 0..200 {
        bench.write(n * 8 + 4, &pattern(4096, 3), false);
    }
    let all = BlockRange::between(0, 2048);
    let Ok(DiskResult::Extents(found)) = bench.run(DiskOp::Extents { blocks: all, max: EXTENTS_MAX }) else {
        panic!("extents")
    };
    assert_eq!(found.len(), EXTENTS_MAX);
    assert!(found.iter().enumerate().all(|(n, s)| s.hole == (n % 2 == 0)));
    assert!(found.iter().skip(1).step_by(2).all(|s| s.count == 1));
}
