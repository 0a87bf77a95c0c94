//! Waiting: what a lone message costs until its answer leaves.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::link::{self, Sample, Work};
use super::receive::HEADER;
use super::ring::{Done, Memory, Ring};
use super::way::Wait;

const BODY: usize = 4096;
/// Bytes of an NBD reply (proto.md, "Simple reply message").
const REPLY: usize = 16;
const RECEIVE: u64 = 1;
const SEND: u64 = 2;

pub(super) fn run(how: Wait, time: Duration) -> Result<Sample> {
    let message = vec![7; HEADER + BODY];
    link::between(|socket| measured(how, socket, time), |socket| link::ask(socket, &message, REPLY))
}

/// Waits in this way for `want` completions, or where it spins for one, or until the time is over.
fn wait(how: Wait, ring: &mut Ring, want: usize, done: &mut Vec<Done>, end: Instant) -> Result<()> {
    loop {
        match how {
            Wait::Asleep | Wait::AsleepPlainRing | Wait::KernelSubmits => return ring.turn(want, done),
            Wait::Spinning => ring.ask(done)?,
            Wait::KernelSubmitsSpinning => ring.look(done)?,
        }
        if !done.is_empty() || Instant::now() >= end {
            return Ok(());
        }
    }
}

fn measured(how: Wait, socket: &TcpStream, time: Duration) -> Result<Work> {
    let mut ring = match how {
        Wait::Asleep | Wait::Spinning => Ring::new(socket)?,
        Wait::AsleepPlainRing => Ring::plain(socket)?,
        Wait::KernelSubmits | Wait::KernelSubmitsSpinning => Ring::with_submitter(socket)?,
    };
    let (mut message, mut reply) = (Memory::new(HEADER + BODY), Memory::new(REPLY));
    let (end, mut done) = (Instant::now() + time, Vec::new());
    // A turn waits beyond its own send, as the reactor does.
    let (mut messages, mut at, mut sending) = (0, 0, 0);
    ring.receive(message.whole(), false, false, RECEIVE);
    while Instant::now() < end {
        wait(how, &mut ring, 1 + sending, &mut done, end)?;
        for done in &done {
            if done.tag == SEND {
                sending -= 1;
                continue;
            }
            at += done.len;
            if at == HEADER + BODY {
                (at, messages) = (0, messages + 1);
                ring.send(reply.whole(), SEND);
                sending += 1;
            }
            ring.receive(&mut message.whole()[at..], false, false, RECEIVE);
        }
    }
    Ok(Work { messages, enters: ring.enters() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_answers() {
        for how in [
            Wait::Asleep,
            Wait::AsleepPlainRing,
            Wait::Spinning,
            Wait::KernelSubmits,
            Wait::KernelSubmitsSpinning,
        ] {
            assert!(run(how, Duration::from_millis(50)).unwrap().micros > 0.0, "{how:?}");
        }
    }
}
