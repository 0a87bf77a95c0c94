//! The loop of a floor process and the requests in flight in it.
//!
//! A turn: completions that were reaped are handled, in order; then flushes begin, everything that waits
//! goes out, receives are armed; then one submission that waits. A write is answered when each of its parts,
//! here and at the peer, is done. A buffer is released when its write is answered (the peer's answer shows that
//! it has left), or when the read that it carries has left.
//!
//! It ends with the process; a lost peer ends the process.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::{Result, bail, ensure};
use blkrepl_nbd::proto::{self, NbdErrno, REQUEST_LEN, RequestHeader, SIMPLE_REPLY_LEN};

use super::REQUEST_BYTES_MAX;
use super::arena::{Arena, Buffer};
use super::link::{Landing, Link, Receiving, Role, STAGE_BYTES};
use super::storage::Storage;
use super::uring::{Reaped, Tag, Uring};

/// Requests in flight.
const OPS_MAX: usize = 4096;
/// Connections.
const LINKS_MAX: usize = 256;
/// Bytes of a payload that are worth a receive of their own.
const LANDING_MIN: usize = 16 << 10;
/// A send of at most so many bytes is over as soon as it is submitted.
const SEND_AT_ONCE: usize = 64 << 10;
/// Place of the data file among registered descriptors; connections follow.
const DATA_FILE: u32 = 0;
/// The peer's name for a flush; other requests have an operation's number.
const FLUSH_HANDLE: u64 = u64::MAX;

/// Who asked, and under which name.
#[derive(Clone, Copy, Debug)]
struct Asker {
    link: u32,
    generation: u32,
    cookie: u64,
}

#[derive(Clone, Copy, Debug)]
struct Op {
    asker: Asker,
    writes: bool,
    fua: bool,
    buffer: Buffer,
    offset: u64,
    len: u32,
    /// Parts that are not done.
    waiting: u8,
    failed: bool,
}

/// Flushes: those that wait share the next one.
#[derive(Default)]
struct Flushes {
    waiting: Vec<Asker>,
    running: Vec<Asker>,
    parts: u8,
    failed: bool,
}

pub(super) struct Service {
    ring: Uring,
    arena: Arena,
    storage: Option<Storage>,
    links: Vec<Option<Link>>,
    peer: Option<u32>,
    ops: Vec<Option<Op>>,
    vacant: Vec<u32>,
    flushes: Flushes,
    wake: Arc<OwnedFd>,
    word: Box<u64>,
    arrivals: Receiver<OwnedFd>,
    generation: u32,
    /// Completions that this turn's submission brings at once and that lead to nothing by themselves.
    idle: usize,
}

impl Service {
    pub(super) fn new(
        storage: Option<Storage>,
        peer: Option<OwnedFd>,
        wake: Arc<OwnedFd>,
        arrivals: Receiver<OwnedFd>,
    ) -> Result<Self> {
        let arena = Arena::new();
        let ring = Uring::new(&arena)?;
        if let Some(storage) = &storage {
            ring.register(DATA_FILE, storage.raw())?;
        }
        let mut service = Self {
            ring,
            arena,
            storage,
            links: Vec::new(),
            peer: None,
            ops: vec![None; OPS_MAX],
            vacant: (0..u32::try_from(OPS_MAX)?).rev().collect(),
            flushes: Flushes::default(),
            wake,
            word: Box::new(0),
            arrivals,
            generation: 0,
            idle: 0,
        };
        if let Some(peer) = peer {
            service.peer = service.add_link(peer, Role::Peer)?;
        }
        Ok(service)
    }

    pub(super) fn run(mut self) -> Result<()> {
        self.ring.wake(self.wake.as_raw_fd(), &raw mut *self.word);
        let mut reaped = Vec::with_capacity(16 << 10);
        loop {
            self.end_turn()?;
            let want = 1 + std::mem::take(&mut self.idle);
            self.ring.turn(want, &mut reaped)?;
            for completion in &reaped {
                self.handle(completion)?;
            }
        }
    }

    fn handle(&mut self, reaped: &Reaped) -> Result<()> {
        match reaped.tag {
            Tag::Wake => {
                while let Ok(fd) = self.arrivals.try_recv() {
                    self.add_link(fd, Role::Client)?;
                }
                self.ring.wake(self.wake.as_raw_fd(), &raw mut *self.word);
            }
            Tag::Receive(link) => self.received(link, reaped)?,
            Tag::Send(link) => self.has_sent(link, reaped.result)?,
            Tag::Disk(op) => {
                let done = self.op(op).is_some_and(|o| usize::try_from(reaped.result) == Ok(o.len as usize));
                self.part_done(op, done);
            }
            Tag::Flush => self.flush_part_done(reaped.result == 0),
        }
        Ok(())
    }

    fn end_turn(&mut self) -> Result<()> {
        let count = u32::try_from(self.links.len())?;
        for link in 0..count {
            if self.link(link).is_some_and(|l| std::mem::take(&mut l.stalled)) {
                self.parse(link)?;
            }
        }
        self.begin_flush();
        for link in 0..count {
            self.send(link);
            self.receive(link);
            self.forget_if_closed(link);
        }
        Ok(())
    }

    // Connections.

    fn link(&mut self, link: u32) -> Option<&mut Link> {
        self.links.get_mut(link as usize)?.as_mut()
    }

    fn add_link(&mut self, fd: OwnedFd, role: Role) -> Result<Option<u32>> {
        let place = self.links.iter().position(Option::is_none).unwrap_or(self.links.len());
        if place >= LINKS_MAX {
            eprintln!("floor: more than {LINKS_MAX} connections; one is closed");
            return Ok(None);
        }
        let index = u32::try_from(place)?;
        self.ring.register(file_of(index), fd.as_raw_fd())?;
        self.generation += 1;
        let link = Some(Link::new(fd, role, self.generation));
        if place == self.links.len() {
            self.links.push(link);
        } else {
            self.links[place] = link;
        }
        Ok(Some(index))
    }

    /// Ends a connection; what is in the kernel for it completes because of the shutdown.
    fn close(&mut self, link: u32) -> Result<()> {
        ensure!(self.peer != Some(link), "the peer is gone");
        if let Some(link) = self.link(link) {
            link.closed = true;
            // It may be shut down already; there is nothing more to be done to it.
            let _ = rustix::net::shutdown(&link.fd, rustix::net::Shutdown::Both);
        }
        Ok(())
    }

    fn forget_if_closed(&mut self, index: u32) {
        let is_over = |l: &mut Link| l.closed && l.receiving == Receiving::Nothing && !l.send_in_kernel;
        if !self.link(index).is_some_and(is_over) {
            return;
        }
        let Some(link) = self.links[index as usize].take() else { return };
        let unsent = link.out.ends.iter().chain(&link.sending.ends).copied();
        for op in unsent.chain(link.landing.map(|landing| landing.op)) {
            self.release(op);
        }
    }

    fn receive(&mut self, index: u32) {
        let Some(link) = self.links[index as usize].as_mut() else { return };
        if link.closed || link.stalled || link.receiving != Receiving::Nothing {
            return;
        }
        let missing = link.landing.map_or(0, |landing| landing.len - landing.got);
        if let Some(landing) = link.landing.filter(|_| missing >= LANDING_MIN)
            && let Some(op) = self.ops[landing.op as usize]
        {
            link.receiving = Receiving::Landing;
            let address = self.arena.at(op.buffer, landing.got);
            self.ring.receive(file_of(index), index, address, missing, true, link.more);
            return;
        }
        link.compact();
        let room = STAGE_BYTES - link.stage_end;
        // Of what is large only the header is to go through the stage.
        let len = if link.large { (missing + REQUEST_LEN - link.staged().len()).min(room) } else { room };
        link.receiving = Receiving::Stage;
        let address = link.stage[link.stage_end..].as_mut_ptr();
        self.ring.receive(file_of(index), index, address, len, false, link.more);
    }

    fn received(&mut self, index: u32, reaped: &Reaped) -> Result<()> {
        let Some(link) = self.link(index) else { return Ok(()) };
        let receiving = std::mem::replace(&mut link.receiving, Receiving::Nothing);
        let got = usize::try_from(reaped.result).unwrap_or(0);
        if got == 0 || link.closed {
            return self.close(index);
        }
        link.more = reaped.more;
        match (receiving, &mut link.landing) {
            (Receiving::Landing, Some(landing)) => landing.got += got,
            _ => link.stage_end += got,
        }
        self.parse(index)
    }

    fn send(&mut self, index: u32) {
        let Some(link) = self.links[index as usize].as_mut() else { return };
        if link.closed || link.send_in_kernel {
            return;
        }
        if link.sending.is_empty() {
            if link.out.is_empty() {
                return;
            }
            std::mem::swap(&mut link.sending, &mut link.out);
        }
        let (message, bytes) = link.sending.message();
        link.send_in_kernel = true;
        self.ring.send(file_of(index), index, message);
        self.idle += usize::from(bytes <= SEND_AT_ONCE);
    }

    fn has_sent(&mut self, index: u32, result: i32) -> Result<()> {
        let Some(link) = self.link(index) else { return Ok(()) };
        link.send_in_kernel = false;
        let Ok(sent) = usize::try_from(result) else { return self.close(index) };
        if link.sending.left(sent) {
            while let Some(op) = self.link(index).and_then(|link| link.sending.ends.pop()) {
                self.release(op);
            }
            if let Some(link) = self.link(index) {
                link.sending.clear();
            }
        }
        Ok(())
    }

    // Requests.

    /// Looks at what came in, as far as it goes.
    fn parse(&mut self, index: u32) -> Result<()> {
        while let Some(link) = self.links[index as usize].as_mut().filter(|link| !link.closed) {
            if let Some(mut landing) = link.landing {
                let staged = &link.stage[link.stage_at..link.stage_end];
                let taken = staged.len().min(landing.len - landing.got);
                if let Some(op) = self.ops[landing.op as usize].filter(|_| taken > 0) {
                    self.arena.fill(op.buffer, landing.got, &staged[..taken]);
                }
                link.stage_at += taken;
                landing.got += taken;
                link.landing = Some(landing).filter(|landing| landing.got < landing.len);
                if link.landing.is_some() {
                    return Ok(());
                }
                self.begin_write(landing.op);
                continue;
            }
            let goes_on = match link.role {
                Role::Client => self.parse_request(index)?,
                Role::Peer => self.parse_answer(index)?,
            };
            if !goes_on {
                return Ok(());
            }
        }
        Ok(())
    }

    fn parse_request(&mut self, index: u32) -> Result<bool> {
        let Some(link) = self.link(index) else { return Ok(false) };
        let generation = link.generation;
        let Some(header) = link.staged().first_chunk::<REQUEST_LEN>() else { return Ok(false) };
        let Ok(header) = RequestHeader::decode(header) else {
            eprintln!("floor: a client sends what is no request");
            self.close(index)?;
            return Ok(false);
        };
        let asker = Asker { link: index, generation, cookie: header.handle };
        match header.command {
            proto::NBD_CMD_READ | proto::NBD_CMD_WRITE if (1..=REQUEST_BYTES_MAX).contains(&header.len) => {
                let Some(op) = self.new_op(asker, &header) else {
                    // It is looked at again at the end of each turn, until a buffer is free.
                    if let Some(link) = self.link(index) {
                        link.stalled = true;
                    }
                    return Ok(false);
                };
                let len = header.len as usize;
                let writes = header.command == proto::NBD_CMD_WRITE;
                if let Some(link) = self.link(index) {
                    link.stage_at += REQUEST_LEN;
                    link.large = writes && len > 2 * LANDING_MIN;
                    link.landing = writes.then_some(Landing { op, got: 0, len });
                }
                if !writes {
                    self.begin_read(op);
                }
            }
            proto::NBD_CMD_FLUSH => {
                self.flushes.waiting.push(asker);
                if let Some(link) = self.link(index) {
                    link.stage_at += REQUEST_LEN;
                }
            }
            command => {
                if command != proto::NBD_CMD_DISC {
                    eprintln!("floor: command {command} of {} bytes is none of the floor's", header.len);
                }
                self.close(index)?;
            }
        }
        Ok(true)
    }

    fn parse_answer(&mut self, index: u32) -> Result<bool> {
        let Some(link) = self.link(index) else { return Ok(false) };
        let Some(header) = link.staged().first_chunk::<SIMPLE_REPLY_LEN>() else { return Ok(false) };
        let Ok((error, handle)) = proto::decode_simple_reply(header) else {
            bail!("the peer sends what is no answer");
        };
        link.stage_at += SIMPLE_REPLY_LEN;
        match u32::try_from(handle) {
            Ok(op) => self.part_done(op, error.is_none()),
            Err(_) => self.flush_part_done(error.is_none()),
        }
        Ok(true)
    }

    fn op(&self, op: u32) -> Option<Op> {
        self.ops.get(op as usize).copied().flatten()
    }

    fn new_op(&mut self, asker: Asker, header: &RequestHeader) -> Option<u32> {
        let place = *self.vacant.last()?;
        let buffer = self.arena.take(header.len as usize)?;
        self.vacant.pop();
        self.ops[place as usize] = Some(Op {
            asker,
            writes: header.command == proto::NBD_CMD_WRITE,
            fua: header.flags & proto::NBD_CMD_FLAG_FUA != 0,
            buffer,
            offset: header.offset,
            len: header.len,
            waiting: 0,
            failed: false,
        });
        Some(place)
    }

    fn release(&mut self, op: u32) {
        if let Some(gone) = self.ops[op as usize].take() {
            self.arena.release(gone.buffer);
            self.vacant.push(op);
        }
    }

    fn begin_read(&mut self, index: u32) {
        let Some(op) = self.op(index) else { return };
        if self.storage.is_some() {
            self.expect(index, 1);
            self.ring.read(index, DATA_FILE, self.arena.at(op.buffer, 0), op.len, op.offset);
        } else {
            self.finish(index);
        }
    }

    fn begin_write(&mut self, index: u32) {
        let Some(op) = self.op(index) else { return };
        let parts = u8::from(self.storage.is_some()) + u8::from(self.peer.is_some());
        self.expect(index, parts);
        let address = self.arena.at(op.buffer, 0);
        if let Some(storage) = &self.storage {
            self.ring.write(index, DATA_FILE, address, op.len, op.offset, op.fua);
            self.idle += usize::from(storage.in_memory() && self.peer.is_some());
        }
        if let Some(peer) = self.peer.and_then(|peer| self.link(peer)) {
            let flags = if op.fua { proto::NBD_CMD_FLAG_FUA } else { 0 };
            let (command, handle) = (proto::NBD_CMD_WRITE, u64::from(index));
            let header = RequestHeader { flags, command, handle, offset: op.offset, len: op.len };
            peer.out.push_head(&header.encode());
            peer.out.push_payload(address, op.len as usize);
        }
        if parts == 0 {
            self.finish(index);
        }
    }

    fn expect(&mut self, index: u32, parts: u8) {
        if let Some(op) = &mut self.ops[index as usize] {
            op.waiting = parts;
        }
    }

    fn part_done(&mut self, index: u32, well: bool) {
        let Some(Some(op)) = self.ops.get_mut(index as usize) else { return };
        op.failed |= !well;
        op.waiting = op.waiting.saturating_sub(1);
        if op.waiting == 0 {
            self.finish(index);
        }
    }

    /// Answers an operation whose parts are all done.
    fn finish(&mut self, index: u32) {
        let Some(op) = self.op(index) else { return };
        let address = self.arena.at(op.buffer, 0);
        let carries = !op.writes && !op.failed;
        match self.asker(op.asker) {
            Some(link) => {
                link.out.push_head(&reply(op.failed, op.asker.cookie));
                if carries {
                    link.out.push_payload(address, op.len as usize);
                    link.out.ends.push(index);
                } else {
                    self.release(index);
                }
            }
            None => self.release(index),
        }
    }

    fn asker(&mut self, asker: Asker) -> Option<&mut Link> {
        self.link(asker.link).filter(|link| link.generation == asker.generation && !link.closed)
    }

    // Flushes.

    fn begin_flush(&mut self) {
        if self.flushes.parts > 0 || self.flushes.waiting.is_empty() {
            return;
        }
        std::mem::swap(&mut self.flushes.waiting, &mut self.flushes.running);
        self.flushes.failed = false;
        // One for this function, so that the group does not end before all parts are counted.
        self.flushes.parts = 1;
        if let Some(storage) = &self.storage {
            if storage.in_memory() {
                self.flushes.failed |= !storage.flush_now();
            } else {
                self.flushes.parts += 1;
                self.ring.flush(DATA_FILE);
            }
        }
        if let Some(peer) = self.peer {
            self.flushes.parts += 1;
            let (command, handle) = (proto::NBD_CMD_FLUSH, FLUSH_HANDLE);
            let header = RequestHeader { flags: 0, command, handle, offset: 0, len: 0 };
            if let Some(link) = self.link(peer) {
                link.out.push_head(&header.encode());
            }
        }
        self.flush_part_done(true);
    }

    fn flush_part_done(&mut self, well: bool) {
        self.flushes.failed |= !well;
        self.flushes.parts = self.flushes.parts.saturating_sub(1);
        if self.flushes.parts > 0 {
            return;
        }
        let failed = self.flushes.failed;
        while let Some(asker) = self.flushes.running.pop() {
            if let Some(link) = self.asker(asker) {
                link.out.push_head(&reply(failed, asker.cookie));
            }
        }
        // Those that came meanwhile begin at the end of the turn.
    }
}

fn file_of(link: u32) -> u32 {
    link + 1
}

fn reply(failed: bool, cookie: u64) -> [u8; SIMPLE_REPLY_LEN] {
    proto::encode_simple_reply(failed.then_some(NbdErrno::Io), cookie)
}
