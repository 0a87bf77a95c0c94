//! The pair of sockets, the peer at its other end, and the clocks.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::time::{ClockId, clock_gettime};

/// Longest time that either end waits for the other.
const PEER_LIMIT: Duration = Duration::from_secs(20);

/// What a message cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Time, microseconds.
    pub(super) micros: f64,
    /// Processor time of everything but the peer, microseconds.
    pub(super) cpu_micros: f64,
    /// Calls of `io_uring_enter`.
    pub(super) enters: f64,
}

/// What the measured side did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) messages: u64,
    pub(super) enters: u64,
}

impl Work {
    fn sample(self, took: Duration, own: Duration) -> Sample {
        let messages = self.messages.max(1) as f64;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / messages;
        Sample { micros: each(took), cpu_micros: each(own), enters: self.enters as f64 / messages }
    }
}

fn cpu(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("nanoseconds of a second"))
}

fn pair() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
    let here = TcpStream::connect(listener.local_addr()?).context("connect on loopback")?;
    let (there, _) = listener.accept()?;
    for end in [&here, &there] {
        end.set_nodelay(true)?;
        end.set_read_timeout(Some(PEER_LIMIT))?;
        end.set_write_timeout(Some(PEER_LIMIT))?;
    }
    Ok((here, there))
}

/// Runs `measured` at one end and `peer` at the other, which ends when its socket does.
///
/// # Errors
/// What the measured side says. The end of the pair ends the peer, so what it says then is no error.
pub(super) fn between(
    measured: impl FnOnce(&TcpStream) -> Result<Work>,
    peer: impl FnOnce(TcpStream) -> std::io::Result<()> + Send,
) -> Result<Sample> {
    let (here, there) = pair()?;
    thread::scope(|scope| {
        let started = (Instant::now(), cpu(ClockId::ProcessCPUTime));
        let peer = scope.spawn(move || {
            let before = cpu(ClockId::ThreadCPUTime);
            let _ended = peer(there);
            cpu(ClockId::ThreadCPUTime) - before
        });
        let worked = measured(&here);
        let took = started.0.elapsed();
        here.shutdown(std::net::Shutdown::Both).or_else(|e| match e.kind() {
            std::io::ErrorKind::NotConnected => Ok(()),
            _ => Err(e),
        })?;
        let peers = peer.join().map_err(|_| anyhow!("the peer panicked"))?;
        let own = cpu(ClockId::ProcessCPUTime).saturating_sub(started.1).saturating_sub(peers);
        Ok(worked?.sample(took, own))
    })
}

/// Runs `measured`, which needs no peer.
pub(super) fn alone(measured: impl FnOnce() -> Result<Work>) -> Result<Sample> {
    let started = (Instant::now(), cpu(ClockId::ProcessCPUTime));
    let work = measured()?;
    Ok(work.sample(started.0.elapsed(), cpu(ClockId::ProcessCPUTime).saturating_sub(started.1)))
}

/// Sends `batch` again and again; one more is under way before the last one was answered by a byte.
pub(super) fn feed(mut socket: TcpStream, batch: &[u8]) -> std::io::Result<()> {
    let mut answer = [0];
    socket.write_all(batch)?;
    loop {
        socket.write_all(batch)?;
        socket.read_exact(&mut answer)?;
    }
}

/// Sends a message and waits for its answer, again and again.
pub(super) fn ask(mut socket: TcpStream, message: &[u8], answer: usize) -> std::io::Result<()> {
    let mut got = vec![0; answer];
    loop {
        socket.write_all(message)?;
        socket.read_exact(&mut got)?;
    }
}

/// Takes messages of so many bytes and answers each by a byte.
pub(super) fn take(mut socket: TcpStream, len: usize) -> std::io::Result<()> {
    let mut message = vec![0; len];
    loop {
        socket.read_exact(&mut message)?;
        socket.write_all(&[0])?;
    }
}
