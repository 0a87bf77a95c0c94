//! Sending: one message after the other, the next one while the last one is under way. The peer answers each, so that
//! no socket is ever full: what that costs is no matter of how a message is sent.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::link::{self, Sample, Work};
use super::ring::{Memory, Ring};
use super::way::Send;

pub(super) fn run(how: Send, len: usize, time: Duration) -> Result<Sample> {
    link::between(|socket| measured(how, socket, len, time), |socket| link::take(socket, len))
}

fn measured(how: Send, mut socket: &TcpStream, len: usize, time: Duration) -> Result<Work> {
    let mut buffers = [Memory::new(len), Memory::new(len)];
    let mut ring = Ring::new(socket)?;
    let (end, mut done, mut messages) = (Instant::now() + time, Vec::new(), 0);
    // Which buffers the kernel has.
    let mut lent = [false; 2];
    while Instant::now() < end {
        let place = (messages % 2) as usize;
        if messages >= 2 {
            socket.read_exact(&mut [0]).context("wait for the peer")?;
        }
        while lent[place] {
            ring.turn(1, &mut done)?;
            done.iter().filter(|done| done.released).for_each(|done| lent[done.tag as usize] = false);
        }
        match how {
            Send::Copy => ring.send(buffers[place].whole(), place as u64),
            Send::ZeroCopy => ring.send_zero_copy(buffers[place].whole(), place as u64),
        }
        let mut sent = false;
        while !sent {
            ring.turn(1, &mut done)?;
            for done in &done {
                if done.released {
                    lent[done.tag as usize] = false;
                } else {
                    (sent, lent[place]) = (true, done.more);
                }
            }
        }
        messages += 1;
    }
    while lent.contains(&true) {
        ring.turn(1, &mut done)?;
        done.iter().filter(|done| done.released).for_each(|done| lent[done.tag as usize] = false);
    }
    Ok(Work { messages, enters: ring.enters() })
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
