//! Carries out the core's disk operations on the data object and the metadata file.
//!
//! One [`DiskOp`] becomes one or more ring operations: short reads and writes are continued, O_DIRECT is
//! given up (with a warning) where it turns out not to work, holes are punched or, where the file system
//! cannot, zeroes written. Each operation completes exactly once, however late; nothing is cancelled or
//! retried after an error, and a flush that failed is reported as failed.
//!
//! Invariants: an operation holds its buffers from start to end; blocks outside the volume, unaligned
//! metadata and buffers that are too short are broken invariants of the core and stop the volume.
//!
//! Never does: ordering operations against each other (the core waits for completions), caching.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use rustix::fs::OFlags;

use crate::replica::{Digest, DiskDone, DiskErrorKind, DiskOp, DiskOpId, DiskRequest, DiskResult};
use crate::rising_map::RisingMap;
use crate::types::{BlockRange, Geometry};
use crate::wire::{BLOCK_HASH_LEN, BlockHash, BufId, Payload};

use super::buffers::{ALIGN, Buffers};
use super::holes::{Searcher, Waker};
use super::open::{OpenFile, VolumeFiles};
use super::ring::{Io, Span, Token};

/// Bytes of zeroes written at a time where holes cannot be punched.
const ZERO_CHUNK: usize = 1 << 20;

/// An open file or device.
struct Object {
    file: Rc<OwnedFd>,
    path: PathBuf,
    /// O_DIRECT is on.
    direct: bool,
    /// Holes can be punched, as far as is known.
    punch: bool,
    /// It is a file in memory, whose flush waits for nothing.
    in_memory: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Data,
    Meta,
}

/// Bytes on their way between a buffer and an object.
struct Transfer {
    target: Target,
    /// Byte in the object.
    at: u64,
    span: Span,
    done: usize,
    /// A read, or a write that may have to be durable.
    write: Option<bool>,
    /// O_DIRECT was on when it was last issued.
    direct: bool,
}

/// What a step of an operation came to.
enum Step {
    /// Issue the (rest of the) same step again.
    Again,
    /// It is done.
    Finished,
    Failed(DiskErrorKind),
}

enum Operation {
    Read { transfer: Transfer, digest: Digest },
    Edges(Edges),
    Write(Transfer),
    Zero(Zero),
    Flush,
}

/// Reads the block at each unfilled edge into a buffer of its own, then copies the edges over.
struct Edges {
    buf: BufId,
    blocks: BlockRange,
    head: usize,
    tail: usize,
    transfer: Transfer,
    /// The last block has still to be read.
    last_pending: bool,
}

struct Zero {
    at: u64,
    len: u64,
    durable: bool,
    step: ZeroStep,
}

enum ZeroStep {
    Punch,
    /// Writing zeroes, chunk by chunk; `done` bytes were written by the chunks before this one.
    Write {
        transfer: Transfer,
        done: u64,
    },
    Flush,
}

/// The disk side of one volume.
pub(super) struct Disk {
    data: Object,
    meta: Object,
    geometry: Geometry,
    operations: RisingMap<DiskOpId, Operation>,
    finished: VecDeque<DiskDone>,
    searcher: Searcher,
}

impl Object {
    fn new(open: OpenFile) -> Self {
        Self {
            file: Rc::new(open.fd),
            path: open.path,
            direct: open.direct,
            punch: true,
            in_memory: open.in_memory,
        }
    }

    /// Judges a failed system call; the text is for the log.
    fn failure(&self, error: i32, what: &str, at: u64) -> DiskErrorKind {
        let source = std::io::Error::from_raw_os_error(error);
        tracing::error!(file = %self.path.display(), offset = at, error = %source, "{what} failed");
        match error {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => DiskErrorKind::NoSpace,
            _ => DiskErrorKind::Io,
        }
    }

    /// Goes on without O_DIRECT.
    fn give_up_direct(&mut self) {
        if !self.direct {
            return;
        }
        self.direct = false;
        let result = rustix::fs::fcntl_getfl(&*self.file)
            .and_then(|flags| rustix::fs::fcntl_setfl(&*self.file, flags - OFlags::DIRECT));
        tracing::warn!(
            file = %self.path.display(), ?result,
            "the file system refuses O_DIRECT for this request: going on with buffered I/O (correct, but slower)"
        );
    }
}

impl Transfer {
    fn new(target: Target, at: u64, span: Span, write: Option<bool>) -> Self {
        Self { target, at, span, done: 0, write, direct: false }
    }

    /// Hands what is left to the kernel.
    fn issue(&mut self, object: &Object, io: &mut Io, token: Token) {
        self.direct = object.direct;
        let rest =
            Span { buf: self.span.buf, start: self.span.start + self.done, len: self.span.len - self.done };
        let at = self.at + self.done as u64;
        match self.write {
            Some(durable) => io.write(&object.file, rest, at, durable, token),
            None => io.read(&object.file, rest, at, token),
        }
    }

    fn complete(&mut self, object: &mut Object, result: i32) -> Step {
        let what = if self.write.is_some() { "write" } else { "read" };
        let Ok(count) = usize::try_from(result) else {
            return match -result {
                libc::EINTR | libc::EAGAIN => Step::Again,
                libc::EINVAL if self.direct => {
                    object.give_up_direct();
                    Step::Again
                }
                error => Step::Failed(object.failure(error, what, self.at + self.done as u64)),
            };
        };
        // The kernel may stop in the middle of a sector; O_DIRECT goes on only at an aligned place.
        let reached = self.done + count;
        let next = if self.direct && reached < self.span.len { reached / ALIGN * ALIGN } else { reached };
        if next == self.done {
            tracing::error!(
                file = %object.path.display(), offset = self.at + reached as u64,
                missing = self.span.len - reached,
                "{what} ended early: the file is shorter than the volume, something truncated it while in use; \
                 restore its size and let this replica be resynced"
            );
            return Step::Failed(DiskErrorKind::Io);
        }
        self.done = next;
        if self.done == self.span.len { Step::Finished } else { Step::Again }
    }
}

impl Disk {
    /// Takes over the open files. `waker` has [`Self::poll_done`] called again.
    pub(super) fn new(files: VolumeFiles, waker: Waker) -> Self {
        let data = Object::new(files.data);
        let block = u64::from(files.geometry.block_size());
        let searcher = Searcher::new(Rc::clone(&data.file), block, waker);
        Self {
            data,
            meta: Object::new(files.meta),
            geometry: files.geometry,
            operations: RisingMap::new(),
            finished: VecDeque::new(),
            searcher,
        }
    }

    /// Sizes of the volume.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The next completion for the core.
    pub(super) fn poll_done(&mut self) -> Option<DiskDone> {
        self.finished.pop_front().or_else(|| self.searcher.poll())
    }

    /// Byte offset and length of blocks.
    fn place(&self, blocks: BlockRange) -> (u64, u64) {
        assert!(self.geometry.contains_blocks(blocks), "disk operation outside the volume: {blocks:?}");
        let bytes = self.geometry.bytes_of(blocks);
        (bytes.offset, bytes.len)
    }

    /// As [`Self::place`], for a length that is to be in one buffer.
    fn place_in_buffer(&self, blocks: BlockRange) -> (u64, usize) {
        let (at, len) = self.place(blocks);
        (at, usize::try_from(len).expect("addresses have 64 bits here"))
    }

    /// Starts an operation.
    pub(super) fn start(&mut self, io: &mut Io, request: DiskRequest) {
        let id = request.id;
        let operation = match request.op {
            DiskOp::Read { blocks, digest } => {
                let (at, len) = self.place_in_buffer(blocks);
                let span = Span { buf: io.buffers.alloc(len), start: 0, len };
                Operation::Read { transfer: Transfer::new(Target::Data, at, span, None), digest }
            }
            DiskOp::FillEdges { buf, blocks, head, tail } => {
                if head == 0 && tail == 0 {
                    let crc = crc32fast::hash(io.buffers.bytes(buf));
                    self.finished.push_back(DiskDone { id, result: Ok(DiskResult::Filled { crc }) });
                    return;
                }
                Operation::Edges(self.edges(io, buf, blocks, head as usize, tail as usize))
            }
            DiskOp::ZeroBuffer { len } => {
                let buf = io.buffers.alloc(len as usize);
                io.buffers.bytes_mut(buf).fill(0);
                let result = read_result(&io.buffers, buf, len as usize, Digest::Checksum);
                self.finished.push_back(DiskDone { id, result: Ok(result) });
                return;
            }
            DiskOp::Write { blocks, buf, durable } => {
                let (at, len) = self.place_in_buffer(blocks);
                io.buffers.retain(buf);
                let span = Span { buf, start: 0, len };
                Operation::Write(Transfer::new(Target::Data, at, span, Some(durable)))
            }
            DiskOp::Zero { blocks, durable } => {
                let (at, len) = self.place(blocks);
                let zero = Zero { at, len, durable, step: ZeroStep::Punch };
                Operation::Zero(if self.data.punch { zero } else { zero.by_writing(io) })
            }
            DiskOp::Extents { blocks, max } => {
                let _checked = self.place(blocks);
                return self.searcher.start(id, blocks, max);
            }
            DiskOp::Flush => Operation::Flush,
            DiskOp::MetaWrite { offset, bytes } => Operation::Write(meta_write(io, offset, &bytes)),
        };
        self.operations.insert(id, operation);
        self.issue(io, id);
    }

    fn edges(&self, io: &mut Io, buf: BufId, blocks: BlockRange, head: usize, tail: usize) -> Edges {
        let (at, len) = self.place_in_buffer(blocks);
        let block = self.geometry.block_size() as usize;
        assert!(head < block && tail < block && head + tail < len, "edges {head} and {tail} of {len} bytes");
        assert!(io.buffers.len(buf) >= len, "a buffer shorter than its blocks");
        io.buffers.retain(buf);
        let bounce = io.buffers.alloc(2 * block);
        // Two blocks at most are read by one request; else the first one needed, and then the last one.
        let (first_at, first_len, start, last_pending) = if blocks.count <= 2 && head > 0 {
            (at, len, 0, false)
        } else if head > 0 {
            (at, block, 0, tail > 0)
        } else {
            (at + (len - block) as u64, block, block, false)
        };
        let span = Span { buf: bounce, start, len: first_len };
        let transfer = Transfer::new(Target::Data, first_at, span, None);
        Edges { buf, blocks, head, tail, transfer, last_pending }
    }

    /// Hands the current step of an operation to the kernel.
    fn issue(&mut self, io: &mut Io, id: DiskOpId) {
        let token = Token::Disk(id);
        let operation = self.operations.get_mut(&id).expect("issued only while it is known");
        match operation {
            Operation::Read { transfer, .. }
            | Operation::Write(transfer)
            | Operation::Edges(Edges { transfer, .. })
            | Operation::Zero(Zero { step: ZeroStep::Write { transfer, .. }, .. }) => {
                let object = if transfer.target == Target::Data { &self.data } else { &self.meta };
                transfer.issue(object, io, token);
            }
            Operation::Zero(Zero { at, len, step: ZeroStep::Punch, .. }) => {
                io.punch(&self.data.file, *at, *len, token);
            }
            Operation::Zero(Zero { step: ZeroStep::Flush, .. }) | Operation::Flush => {
                if self.data.in_memory {
                    return self.flush_in_place(io, id);
                }
                io.flush(&self.data.file, token);
            }
        }
    }

    /// Flushes a file in memory. The ring hands every flush to a thread, which takes many times longer than this
    /// system call does: it has nothing to wait for.
    fn flush_in_place(&mut self, io: &mut Io, id: DiskOpId) {
        let result = match rustix::fs::fdatasync(&*self.data.file) {
            Ok(()) => 0,
            Err(error) => -error.raw_os_error(),
        };
        self.complete(io, id, result);
    }

    /// Takes a completion of the ring. The kernel's own hold on the buffer has been released.
    pub(super) fn complete(&mut self, io: &mut Io, id: DiskOpId, result: i32) {
        let block = self.geometry.block_size() as usize;
        let operation = self.operations.get_mut(&id).expect("only known operations are in the kernel");
        let step = match operation {
            Operation::Read { transfer, .. } => transfer.complete(&mut self.data, result),
            Operation::Write(transfer) => {
                let object = if transfer.target == Target::Data { &mut self.data } else { &mut self.meta };
                transfer.complete(object, result)
            }
            Operation::Edges(edges) => match edges.transfer.complete(&mut self.data, result) {
                Step::Finished if edges.last_pending => edges.go_to_last(block),
                step => step,
            },
            Operation::Zero(zero) => zero.complete(&mut self.data, io, result),
            Operation::Flush => match result {
                0.. => Step::Finished,
                error => Step::Failed(self.data.failure(-error, "flush", 0)),
            },
        };
        match step {
            Step::Again => self.issue(io, id),
            Step::Finished => self.finish(io, id, None),
            Step::Failed(kind) => self.finish(io, id, Some(kind)),
        }
    }

    /// Ends an operation: gives its buffers up or on, and reports it.
    fn finish(&mut self, io: &mut Io, id: DiskOpId, failed: Option<DiskErrorKind>) {
        let block = self.geometry.block_size() as usize;
        let operation = self.operations.remove(&id).expect("an operation finishes once");
        let buffers = &mut *io.buffers;
        let done = match operation {
            Operation::Read { transfer, digest } => {
                let buf = transfer.span.buf;
                if failed.is_some() {
                    buffers.release(buf);
                    DiskResult::Done
                } else {
                    // The reference goes on to the core.
                    read_result(buffers, buf, transfer.span.len, digest)
                }
            }
            Operation::Edges(edges) => {
                let crc = if failed.is_some() { 0 } else { edges.copy(buffers, block) };
                buffers.release(edges.transfer.span.buf);
                buffers.release(edges.buf);
                DiskResult::Filled { crc }
            }
            Operation::Write(transfer)
            | Operation::Zero(Zero { step: ZeroStep::Write { transfer, .. }, .. }) => {
                buffers.release(transfer.span.buf);
                DiskResult::Done
            }
            Operation::Zero(_) | Operation::Flush => DiskResult::Done,
        };
        self.finished.push_back(DiskDone { id, result: failed.map_or(Ok(done), Err) });
    }
}

impl Edges {
    /// The first block is there; the last one comes next.
    fn go_to_last(&mut self, block: usize) -> Step {
        self.last_pending = false;
        let at = (self.blocks.end() - 1) * block as u64;
        let span = Span { buf: self.transfer.span.buf, start: block, len: block };
        self.transfer = Transfer::new(Target::Data, at, span, None);
        Step::Again
    }

    /// Copies the edges and returns the checksum of the whole buffer.
    fn copy(&self, buffers: &mut Buffers, block: usize) -> u32 {
        let len = usize::try_from(self.blocks.count).expect("a buffer's blocks") * block;
        let bounce = self.transfer.span.buf;
        let head: Vec<u8> = buffers.bytes(bounce)[..self.head].to_vec();
        // A single block was read to the front, more than one so that the last one ends the second half.
        let last_end = if self.blocks.count == 1 && self.head > 0 { block } else { 2 * block };
        let tail: Vec<u8> = buffers.bytes(bounce)[last_end - self.tail..last_end].to_vec();
        let target = &mut buffers.bytes_mut(self.buf)[..len];
        target[..self.head].copy_from_slice(&head);
        target[len - self.tail..].copy_from_slice(&tail);
        crc32fast::hash(target)
    }
}

impl Zero {
    /// Goes on (or begins) by writing zeroes.
    fn by_writing(mut self, io: &mut Io) -> Self {
        self.step = self.write_step(io);
        self
    }

    fn write_step(&self, io: &mut Io) -> ZeroStep {
        let len = usize::try_from(self.len).map_or(ZERO_CHUNK, |len| len.min(ZERO_CHUNK));
        let buf = io.buffers.alloc(len);
        io.buffers.bytes_mut(buf).fill(0);
        let span = Span { buf, start: 0, len };
        ZeroStep::Write { transfer: Transfer::new(Target::Data, self.at, span, Some(self.durable)), done: 0 }
    }

    fn complete(&mut self, data: &mut Object, io: &mut Io, result: i32) -> Step {
        match &mut self.step {
            ZeroStep::Punch => match -result {
                libc::EINTR | libc::EAGAIN => Step::Again,
                libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV => {
                    if data.punch {
                        tracing::info!(
                            file = %data.path.display(),
                            "holes cannot be punched here: zeroes are written instead, trim gives up no space"
                        );
                    }
                    data.punch = false;
                    self.step = self.write_step(io);
                    Step::Again
                }
                error if error > 0 => Step::Failed(data.failure(error, "punching a hole", self.at)),
                _ if self.durable => {
                    self.step = ZeroStep::Flush;
                    Step::Again
                }
                _ => Step::Finished,
            },
            ZeroStep::Write { transfer, done } => match transfer.complete(data, result) {
                Step::Finished => {
                    *done += transfer.span.len as u64;
                    let left = self.len - *done;
                    if left == 0 {
                        return Step::Finished;
                    }
                    transfer.at = self.at + *done;
                    transfer.done = 0;
                    transfer.span.len =
                        usize::try_from(left).map_or(transfer.span.len, |l| l.min(transfer.span.len));
                    Step::Again
                }
                step => step,
            },
            ZeroStep::Flush if result < 0 => {
                Step::Failed(data.failure(-result, "flush after punching a hole", self.at))
            }
            ZeroStep::Flush => Step::Finished,
        }
    }
}

/// A durable write of metadata, from a buffer of its own.
fn meta_write(io: &mut Io, offset: u64, bytes: &[u8]) -> Transfer {
    assert!(
        offset.is_multiple_of(ALIGN as u64) && bytes.len().is_multiple_of(ALIGN) && !bytes.is_empty(),
        "metadata is written in whole groups, not {} bytes at {offset}",
        bytes.len()
    );
    let buf = io.buffers.alloc(bytes.len());
    io.buffers.bytes_mut(buf).copy_from_slice(bytes);
    Transfer::new(Target::Meta, offset, Span { buf, start: 0, len: bytes.len() }, Some(true))
}

/// Checksum, zero test and hashes of what was read.
fn read_result(buffers: &Buffers, buf: BufId, len: usize, digest: Digest) -> DiskResult {
    let bytes = &buffers.bytes(buf)[..len];
    let payload = Payload {
        buf,
        len: u32::try_from(len).expect("a buffer is at most one payload long"),
        crc: if digest == Digest::None { 0 } else { crc32fast::hash(bytes) },
    };
    let all_zero = bytes.chunks(16).all(|chunk| chunk == &[0; 16][..chunk.len()]);
    let hashes =
        if digest == Digest::Hashes { bytes.chunks(ALIGN).map(block_hash).collect() } else { Vec::new() };
    DiskResult::Read { payload, all_zero, hashes }
}

/// The hash of one block.
fn block_hash(block: &[u8]) -> BlockHash {
    let mut hash = [0; BLOCK_HASH_LEN];
    hash.copy_from_slice(&blake3::hash(block).as_bytes()[..BLOCK_HASH_LEN]);
    hash
}
