//! Receiving: one receive after the other, or one that stays and takes provided buffers.
//!
//! In all cases a body ends in aligned memory, from which a disk could take it.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::link::{self, Sample, Work};
use super::ring::{Memory, Ring};
use super::way::Receive;

/// Bytes of an NBD request (proto.md, "Request message").
pub(super) const HEADER: usize = 28;
/// Bytes that the reactor receives at once, and the size of a body that it receives where it belongs.
const STAGE: usize = 64 << 10;

/// Takes a stream of messages apart and copies the bodies to where they belong.
struct Bodies {
    body: Memory,
    /// Bytes of the current message that are there.
    at: usize,
    messages: u64,
}

impl Bodies {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = self.body.whole().len();
            if self.at < HEADER {
                let skip = bytes.len().min(HEADER - self.at);
                self.at += skip;
                bytes = &bytes[skip..];
                continue;
            }
            let at = self.at - HEADER;
            let part = bytes.len().min(len - at);
            self.body.whole()[at..at + part].copy_from_slice(&bytes[..part]);
            self.came(part);
            bytes = &bytes[part..];
        }
    }

    /// So many bytes of the body are there.
    fn came(&mut self, part: usize) {
        self.at += part;
        if self.at == HEADER + self.body.whole().len() {
            self.at = 0;
            self.messages += 1;
        }
    }
}

struct Receiver<'a> {
    ring: Ring,
    socket: &'a TcpStream,
    bodies: Bodies,
    batch: u64,
    /// Batches that were answered.
    answered: u64,
    end: Instant,
}

impl Receiver<'_> {
    /// Answers each whole batch by a byte. False when it is time to end.
    fn goes_on(&mut self) -> Result<bool> {
        while (self.answered + 1) * self.batch <= self.bodies.messages {
            self.answered += 1;
            self.socket.write_all(&[0]).context("answer the peer")?;
        }
        Ok(Instant::now() < self.end)
    }

    fn work(&self) -> Work {
        Work { messages: self.bodies.messages, enters: self.ring.enters() }
    }

    fn single(mut self) -> Result<Work> {
        let large = self.bodies.body.whole().len() >= STAGE;
        let mut stage = Memory::new(STAGE);
        let (mut done, mut nonempty) = (Vec::new(), false);
        while self.goes_on()? {
            let direct = large && self.bodies.at >= HEADER;
            if direct {
                let at = self.bodies.at - HEADER;
                self.ring.receive(&mut self.bodies.body.whole()[at..], true, true, 0);
            } else {
                let most = if large { HEADER - self.bodies.at } else { STAGE };
                self.ring.receive(&mut stage.whole()[..most], false, nonempty, 0);
            }
            self.ring.turn(1, &mut done)?;
            for done in &done {
                nonempty = done.nonempty;
                if direct { self.bodies.came(done.len) } else { self.bodies.take(&stage.whole()[..done.len]) }
            }
        }
        Ok(self.work())
    }

    fn multishot(mut self, bundles: bool) -> Result<Work> {
        let (mut done, mut stays) = (Vec::new(), false);
        while self.goes_on()? {
            if !stays {
                self.ring.receive_on(bundles, 0)?;
                stays = true;
            }
            self.ring.turn(1, &mut done)?;
            for done in &done {
                let bodies = &mut self.bodies;
                self.ring.take(*done, |bytes| bodies.take(bytes))?;
                stays = done.more;
            }
        }
        Ok(self.work())
    }
}

pub(super) fn run(how: Receive, len: usize, batch: usize, time: Duration) -> Result<Sample> {
    let messages = vec![7; batch * (HEADER + len)];
    let measured = |socket: &TcpStream| {
        let bodies = Bodies { body: Memory::new(len), at: 0, messages: 0 };
        let (ring, end) = (Ring::new(socket)?, Instant::now() + time);
        let receiver = Receiver { ring, socket, bodies, batch: batch as u64, answered: 0, end };
        match how {
            Receive::Single => receiver.single(),
            Receive::Multishot => receiver.multishot(false),
            Receive::Bundles => receiver.multishot(true),
        }
    };
    link::between(measured, |socket| link::feed(socket, &messages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        for cut in [1, 27, 28, 29, 4096, 10_000] {
            let stream = vec![7; 10 * (HEADER + 4096)];
            let mut bodies = Bodies { body: Memory::new(4096), at: 0, messages: 0 };
            stream.chunks(cut).for_each(|bytes| bodies.take(bytes));
            assert_eq!((bodies.messages, bodies.at), (10, 0), "pieces of {cut}");
            assert!(bodies.body.whole().iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn every_way_receives_whole_messages() {
        for how in [Receive::Single, Receive::Multishot] {
            for (len, batch) in [(4096, 32), (65536, 2), (1 << 20, 1)] {
                let sample = run(how, len, batch, Duration::from_millis(50)).unwrap();
                assert!(sample.micros > 0.0 && sample.enters > 0.0, "{how:?} {len}");
            }
        }
    }
}
