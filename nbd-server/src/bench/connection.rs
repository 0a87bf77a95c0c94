//! One connection of the load generator, in the transmission phase.
//!
//! Each operation in flight has a slot; the slot's number is the request's handle. A slot begins its next
//! operation as soon as its last one is answered, and what has begun leaves with the next send, as many
//! requests as there are. Replies are received in bulk; the data of reads is received and passed over.
//!
//! Invariants: a slot is in `unsent` at most once; replies are taken only for slots that wait for one.
//! Allocates nothing after [`Connection::new`].

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::job::Job;
use super::recorder::Recorder;
use crate::client::NbdError;
use crate::proto::{self, REQUEST_LEN, RequestHeader, SIMPLE_REPLY_LEN};

/// Bytes taken from the socket at once: what a depth of 32 reads of 4 KiB brings fits twice.
const STAGE_BYTES: usize = 256 << 10;
/// Most pieces given to the socket at once.
const PIECES_MAX: usize = 256;

/// What a slot waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Reading,
    Writing,
    /// The write is answered, its flush is not.
    Flushing,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    started: Instant,
    header: [u8; REQUEST_LEN],
}

pub(super) struct Connection<'p> {
    job: Job,
    payload: &'p [u8],
    slots: Vec<Slot>,
    busy: usize,
    /// Slots whose request has not left yet, whole.
    unsent: VecDeque<u32>,
    /// Bytes of the first of them that have left.
    unsent_at: usize,
    /// Received, not yet looked at: `stage[stage_at..stage_end]`.
    stage: Vec<u8>,
    stage_at: usize,
    stage_end: usize,
    /// A read whose data is on its way in, and how much of it is missing.
    incoming: Option<(usize, usize)>,
}

impl<'p> Connection<'p> {
    pub(super) fn new(job: Job, depth: usize, payload: &'p [u8]) -> Self {
        let slot = Slot { state: State::Idle, started: Instant::now(), header: [0; REQUEST_LEN] };
        Self {
            job,
            payload,
            slots: vec![slot; depth],
            busy: 0,
            unsent: VecDeque::with_capacity(depth),
            unsent_at: 0,
            stage: vec![0; STAGE_BYTES],
            stage_at: 0,
            stage_end: 0,
            incoming: None,
        }
    }

    /// Begins an operation in every slot.
    pub(super) fn start_all(&mut self, recorder: &mut Recorder, now: Instant) {
        for index in 0..self.slots.len() {
            self.start(index, recorder, now);
        }
    }

    /// Nothing is in flight and nothing will be.
    pub(super) fn is_idle(&self) -> bool {
        self.busy == 0
    }

    pub(super) fn wants_to_send(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn start(&mut self, index: usize, recorder: &mut Recorder, now: Instant) {
        let Some(place) = recorder.next_place() else { return };
        let (state, command) = if place.reads {
            (State::Reading, proto::NBD_CMD_READ)
        } else {
            (State::Writing, proto::NBD_CMD_WRITE)
        };
        let fua = self.job.fua && !place.reads;
        let flags = if fua { proto::NBD_CMD_FLAG_FUA } else { 0 };
        self.slots[index].started = now;
        self.busy += 1;
        self.request(index, state, command, flags, place.offset, self.job.block_size);
    }

    fn request(&mut self, index: usize, state: State, command: u16, flags: u16, offset: u64, len: u32) {
        let header = RequestHeader { flags, command, handle: index as u64, offset, len };
        let slot = &mut self.slots[index];
        slot.state = state;
        slot.header = header.encode();
        self.unsent.push_back(u32::try_from(index).expect("a depth fits 32 bits"));
    }

    /// Sends what fits without waiting.
    pub(super) fn send(&mut self, sock: &OwnedFd) -> Result<(), NbdError> {
        while !self.unsent.is_empty() {
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let mut used = 0;
            let mut skip = self.unsent_at;
            for &index in self.unsent.iter().take(PIECES_MAX / 2) {
                let (header, payload) = self.message(index);
                for piece in [header, payload] {
                    let rest = piece.get(skip..).unwrap_or_default();
                    skip = skip.saturating_sub(piece.len());
                    if !rest.is_empty() {
                        pieces[used] = IoSlice::new(rest);
                        used += 1;
                    }
                }
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(sock, &pieces[..used], &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => self.sent(sent),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(NbdError::Disconnected(e.to_string())),
            }
        }
        Ok(())
    }

    fn message(&self, index: u32) -> (&[u8], &[u8]) {
        let slot = &self.slots[index as usize];
        (&slot.header, if slot.state == State::Writing { self.payload } else { &[] })
    }

    fn sent(&mut self, bytes: usize) {
        self.unsent_at += bytes;
        while let Some(&index) = self.unsent.front() {
            let (header, payload) = self.message(index);
            let len = header.len() + payload.len();
            if self.unsent_at < len {
                return;
            }
            self.unsent_at -= len;
            self.unsent.pop_front();
        }
    }

    /// Takes in what the server sent, waiting for it or not; false if there was nothing (in time).
    pub(super) fn receive(
        &mut self,
        sock: &OwnedFd,
        wait: bool,
        recorder: &mut Recorder,
    ) -> Result<bool, NbdError> {
        self.stage.copy_within(self.stage_at..self.stage_end, 0);
        self.stage_end -= self.stage_at;
        self.stage_at = 0;
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let got = loop {
            match rustix::net::recv(sock, &mut self.stage[self.stage_end..], flags) {
                Ok((_, 0)) => {
                    return Err(NbdError::Disconnected("the server closed the connection".into()));
                }
                Ok((_, got)) => break got,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(e) => return Err(NbdError::Disconnected(e.to_string())),
            }
        };
        self.stage_end += got;
        let now = Instant::now();
        self.take_replies(recorder, now)?;
        recorder.tick(now)?;
        Ok(true)
    }

    fn take_replies(&mut self, recorder: &mut Recorder, now: Instant) -> Result<(), NbdError> {
        loop {
            let there = self.stage_end - self.stage_at;
            if let Some((index, missing)) = self.incoming.take() {
                let taken = there.min(missing);
                self.stage_at += taken;
                if taken < missing {
                    self.incoming = Some((index, missing - taken));
                    return Ok(());
                }
                self.finish(index, true, recorder, now);
                continue;
            }
            let Some(header) = self.stage[self.stage_at..self.stage_end].first_chunk::<SIMPLE_REPLY_LEN>()
            else {
                return Ok(());
            };
            let (error, handle) = proto::decode_simple_reply(header)
                .map_err(|magic| NbdError::Protocol(format!("a reply begins with {magic:#010x}")))?;
            if let Some(errno) = error {
                return Err(NbdError::Server(errno));
            }
            self.stage_at += SIMPLE_REPLY_LEN;
            self.reply(handle, recorder, now)?;
        }
    }

    fn reply(&mut self, handle: u64, recorder: &mut Recorder, now: Instant) -> Result<(), NbdError> {
        let unknown = || NbdError::Protocol(format!("a reply to request {handle}, which was not made"));
        let index = usize::try_from(handle).map_err(|_| unknown())?;
        match self.slots.get(index).map(|slot| slot.state) {
            None | Some(State::Idle) => return Err(unknown()),
            Some(State::Reading) => self.incoming = Some((index, self.job.block_size as usize)),
            Some(State::Writing) if self.job.flush_after_write => {
                self.request(index, State::Flushing, proto::NBD_CMD_FLUSH, 0, 0, 0);
            }
            Some(State::Writing | State::Flushing) => self.finish(index, false, recorder, now),
        }
        Ok(())
    }

    fn finish(&mut self, index: usize, reads: bool, recorder: &mut Recorder, now: Instant) {
        recorder.answered(reads, self.slots[index].started, now);
        self.slots[index].state = State::Idle;
        self.busy -= 1;
        self.start(index, recorder, now);
    }

    /// Tells the server that no more requests will come. A courtesy: the connection is closed after it.
    pub(super) fn say_goodbye(&self, sock: &OwnedFd) {
        let header =
            RequestHeader { flags: 0, command: proto::NBD_CMD_DISC, handle: u64::MAX, offset: 0, len: 0 };
        let _ = rustix::net::send(sock, &header.encode(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::super::cpu::CpuMeter;
    use super::super::job::Places;
    use super::super::{BenchOptions, set_blocking};
    use super::*;
    use crate::proto::{NbdErrno, encode_simple_reply};

    const BLOCK: usize = 64;

    /// A connection with operations in each of its slots, sent, and the server's end.
    fn connected(job: Job, depth: usize, payload: &[u8]) -> (Connection<'_>, Recorder, OwnedFd, UnixStream) {
        let (ours, server) = UnixStream::pair().unwrap();
        let sock = OwnedFd::from(ours);
        set_blocking(&sock).unwrap();
        let options = BenchOptions { warm_up: std::time::Duration::ZERO, ..BenchOptions::new(job, depth) };
        let places = Places::new(job, 0, 1 << 20, 1);
        let mut recorder = Recorder::new(&options, places, CpuMeter::new(&[]).unwrap()).unwrap();
        let mut connection = Connection::new(job, depth, payload);
        connection.start_all(&mut recorder, Instant::now());
        connection.send(&sock).unwrap();
        assert!(!connection.wants_to_send() && !connection.is_idle());
        (connection, recorder, sock, server)
    }

    fn job(read_percent: u8) -> Job {
        Job { read_percent, block_size: 64, ..Job::default() }
    }

    fn next_request(server: &mut UnixStream) -> RequestHeader {
        let mut bytes = [0; REQUEST_LEN];
        server.read_exact(&mut bytes).unwrap();
        let header = RequestHeader::decode(&bytes).unwrap();
        if header.command == proto::NBD_CMD_WRITE {
            server.read_exact(&mut [0; BLOCK]).unwrap();
        }
        header
    }

    #[test]
    fn replies_may_come_in_any_order_and_in_pieces() {
        let payload = [7; BLOCK];
        let (mut connection, mut recorder, sock, mut server) = connected(job(100), 3, &payload);
        let handles: Vec<u64> = (0..3).map(|_| next_request(&mut server).handle).collect();
        let mut bytes = Vec::new();
        for handle in handles.iter().rev() {
            bytes.extend_from_slice(&encode_simple_reply(None, *handle));
            bytes.extend_from_slice(&[1; BLOCK]);
        }
        for piece in bytes.chunks(7) {
            server.write_all(piece).unwrap();
            assert!(connection.receive(&sock, true, &mut recorder).unwrap());
        }
        assert_eq!(recorder.report(1).reads, 3);
        connection.send(&sock).unwrap();
        let again: Vec<u64> = (0..3).map(|_| next_request(&mut server).handle).collect();
        assert_eq!(again, handles.iter().rev().copied().collect::<Vec<_>>(), "each slot goes on at once");
        assert!(!connection.receive(&sock, false, &mut recorder).unwrap());
    }

    #[test]
    fn a_write_and_its_flush_are_one_operation() {
        let payload = [7; BLOCK];
        let job = Job { flush_after_write: true, ..job(0) };
        let (mut connection, mut recorder, sock, mut server) = connected(job, 1, &payload);
        let write = next_request(&mut server);
        assert_eq!(write.command, proto::NBD_CMD_WRITE);
        server.write_all(&encode_simple_reply(None, write.handle)).unwrap();
        connection.receive(&sock, true, &mut recorder).unwrap();
        assert_eq!(recorder.report(1).operations, 0);
        connection.send(&sock).unwrap();
        let flush = next_request(&mut server);
        assert_eq!((flush.command, flush.offset, flush.len), (proto::NBD_CMD_FLUSH, 0, 0));
        server.write_all(&encode_simple_reply(None, flush.handle)).unwrap();
        connection.receive(&sock, true, &mut recorder).unwrap();
        assert_eq!(recorder.report(1).operations, 1);
    }

    #[test]
    fn a_large_write_leaves_in_pieces_and_whole() {
        let payload: Vec<u8> = (0..1 << 20).map(|i: u32| u8::try_from(i % 251).unwrap()).collect();
        let (ours, mut server) = UnixStream::pair().unwrap();
        let sock = OwnedFd::from(ours);
        let job = Job { block_size: 1 << 20, ..job(0) };
        let options = BenchOptions::new(job, 2);
        let places = Places::new(job, 0, 1 << 21, 1);
        let mut recorder = Recorder::new(&options, places, CpuMeter::new(&[]).unwrap()).unwrap();
        let mut connection = Connection::new(job, 2, &payload);
        connection.start_all(&mut recorder, Instant::now());
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; 2 * (REQUEST_LEN + (1 << 20))];
            server.read_exact(&mut all).unwrap();
            all
        });
        while connection.wants_to_send() {
            connection.send(&sock).unwrap();
            std::thread::yield_now();
        }
        let all = reader.join().unwrap();
        for message in all.chunks(REQUEST_LEN + (1 << 20)) {
            assert_eq!(&message[REQUEST_LEN..], payload);
        }
    }

    #[test]
    fn what_is_no_reply_to_a_request_is_refused() {
        let payload = [7; BLOCK];
        for (reply, protocol) in [
            (encode_simple_reply(None, 1), true),
            (encode_simple_reply(None, u64::MAX), true),
            ([0; SIMPLE_REPLY_LEN], true),
            (encode_simple_reply(Some(NbdErrno::Io), 0), false),
        ] {
            let (mut connection, mut recorder, sock, mut server) = connected(job(0), 1, &payload);
            server.write_all(&reply).unwrap();
            let error = connection.receive(&sock, true, &mut recorder).unwrap_err();
            assert_eq!(matches!(error, NbdError::Protocol(_)), protocol, "{error}");
            assert_eq!(matches!(error, NbdError::Server(NbdErrno::Io)), !protocol, "{error}");
        }
    }
}
