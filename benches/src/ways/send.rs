//! Sending: one message after the other, the next one while the last one is under way. The peer answers each, so that
//! no socket is ever full: what that costs is no matter of how a message is sent.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::link::{self, Sample, Work};
use super::ring::{Done, Memory, Ring};
use super::way::Send;

pub(super) fn run(how: Send, len: usize, time: Duration) -> Result<Sample> {
    link::between(|socket| measured(how, socket, len, time), |socket| link::take(socket, len))
}

/// What is under way: buffers that the kernel has, and whether the last message was taken.
struct Sender {
    ring: Ring,
    done: Vec<Done>,
    lent: [bool; 2],
    sent: bool,
}

impl Sender {
    fn turn(&mut self) -> Result<()> {
        self.ring.turn(1, &mut self.done)?;
        for done in &self.done {
            // Said of a message that was sent: the kernel has its buffer until it says more.
            self.sent |= !done.released;
            self.lent[done.tag as usize] = !done.released && done.more;
        }
        Ok(())
    }
}

fn measured(how: Send, mut socket: &TcpStream, len: usize, time: Duration) -> Result<Work> {
    let mut buffers = [Memory::new(len), Memory::new(len)];
    let mut sender = Sender { ring: Ring::new(socket)?, done: Vec::new(), lent: [false; 2], sent: false };
    let (end, mut messages) = (Instant::now() + time, 0);
    while Instant::now() < end {
        let place = (messages % 2) as usize;
        if messages >= 2 {
            socket.read_exact(&mut [0]).context("wait for the peer")?;
        }
        while sender.lent[place] {
            sender.turn()?;
        }
        match how {
            Send::Copy => sender.ring.send(buffers[place].whole(), place as u64),
            Send::ZeroCopy => sender.ring.send_zero_copy(buffers[place].whole(), place as u64),
        }
        sender.sent = false;
        while !sender.sent {
            sender.turn()?;
        }
        messages += 1;
    }
    while sender.lent.contains(&true) {
        sender.turn()?;
    }
    Ok(Work { messages, enters: sender.ring.enters() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_sent_in_each_way() {
        for how in [Send::Copy, Send::ZeroCopy] {
            assert!(run(how, 65536, Duration::from_millis(50)).unwrap().micros > 0.0, "{how:?}");
        }
    }
}
