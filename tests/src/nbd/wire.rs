//! Bytes to and from a server, over a unix socket or TCP, each wait with a limit.
//!
//! A thread takes in what the server sends at any time, so that a test which sends without reading never makes
//! both sides wait for each other.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

/// Longest wait for bytes, and for the end of a connection.
const LIMIT: Duration = Duration::from_secs(40);
/// How often one that does not listen looks whether it should.
const NAP: Duration = Duration::from_millis(5);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Path of a unix socket.
    Unix(String),
    /// Host and port.
    Tcp(String),
}

impl Address {
    /// Of `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST:PORT/EXPORT`, with the name of the export.
    ///
    /// # Errors
    /// If it is neither.
    pub fn parse(uri: &str) -> Result<(Self, String)> {
        if let Some(rest) = uri.strip_prefix("nbd+unix:///") {
            let (export, path) =
                rest.split_once("?socket=").with_context(|| format!("no socket in {uri}"))?;
            return Ok((Self::Unix(path.to_owned()), export.to_owned()));
        }
        let rest = uri.strip_prefix("nbd://").with_context(|| format!("{uri} is no address of NBD"))?;
        let (host, export) = rest.split_once('/').with_context(|| format!("no export in {uri}"))?;
        Ok((Self::Tcp(host.to_owned()), export.to_owned()))
    }

    /// `unix` or `TCP`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unix(_) => "unix",
            Self::Tcp(_) => "TCP",
        }
    }
}

/// Either kind of socket.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> Result<Self> {
        let stream = match address {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(host) => Self::Tcp(TcpStream::connect(host)?),
        };
        match &stream {
            Self::Unix(stream) => stream.set_write_timeout(Some(LIMIT))?,
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(LIMIT))?;
            }
        }
        Ok(stream)
    }

    fn try_clone(&self) -> std::io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    fn shutdown(&self, how: Shutdown) -> std::io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        }
    }

    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(out),
            Self::Tcp(stream) => stream.read(out),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// A connection. Closed when dropped.
pub struct Wire {
    stream: Stream,
    incoming: Receiver<Vec<u8>>,
    reader: Option<JoinHandle<()>>,
    deaf: Arc<AtomicBool>,
    buffer: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Wire {
    /// Connects, and sends nothing.
    ///
    /// # Errors
    /// Where nobody listens.
    pub fn connect(address: &Address) -> Result<Self> {
        Self::over(Stream::connect(address).with_context(|| format!("connect to {address:?}"))?)
    }

    fn over(stream: Stream) -> Result<Self> {
        let source = stream.try_clone().context("duplicate a socket")?;
        let (sender, incoming) = channel();
        let deaf = Arc::new(AtomicBool::new(false));
        let hears = Arc::clone(&deaf);
        let reader = std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || pump(source, &sender, &hears))
            .context("start a reader")?;
        Ok(Self { stream, incoming, reader: Some(reader), deaf, buffer: Vec::new(), at: 0, ended: false })
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// If the connection is closed, or the server takes nothing for long.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("send to the server")
    }

    /// Takes nothing more off the socket, so that it fills, but for one piece at most.
    pub fn stop_listening(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// Sends nothing more; the server sees the end of the stream.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn finish(&mut self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).context("end the sending side")
    }

    /// The next bytes, so many.
    ///
    /// # Errors
    /// If the connection ends before, or they do not come.
    pub fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        ensure!(self.fill(len, LIMIT)?, "only {} of {len} bytes came in {LIMIT:?}", self.held());
        let bytes = self.buffer[self.at..self.at + len].to_vec();
        self.at += len;
        Ok(bytes)
    }

    /// The next bytes without taking them; none if so many do not come within `limit`.
    ///
    /// # Errors
    /// If the connection ends before.
    pub fn peek(&mut self, len: usize, limit: Duration) -> Result<Option<&[u8]>> {
        Ok(if self.fill(len, limit)? { Some(&self.buffer[self.at..self.at + len]) } else { None })
    }

    /// Waits for the end of the connection, before which nothing may come.
    ///
    /// # Errors
    /// If something comes, or the connection stays open.
    pub fn expect_end(&mut self) -> Result<()> {
        let rest = self.rest()?;
        ensure!(rest.is_empty(), "{} bytes before the end: {:02x?}", rest.len(), &rest[..rest.len().min(64)]);
        Ok(())
    }

    /// All that comes until the connection ends.
    ///
    /// # Errors
    /// If it stays open.
    pub fn rest(&mut self) -> Result<Vec<u8>> {
        let deadline = Instant::now() + LIMIT;
        while !self.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the connection is still open after {LIMIT:?}");
            self.wait(left);
        }
        let rest = self.buffer.split_off(self.at);
        Ok(rest)
    }

    fn held(&self) -> usize {
        self.buffer.len() - self.at
    }

    /// Waits until so many bytes are there; false if they are not within `limit`.
    fn fill(&mut self, len: usize, limit: Duration) -> Result<bool> {
        let mut deadline = None;
        while self.held() < len {
            if self.ended {
                bail!("the connection ended; {} of {len} bytes had come", self.held());
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + limit);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && !limit.is_zero() {
                return Ok(false);
            }
            if !self.wait(left) && limit.is_zero() && !self.ended {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for more; true if some came.
    fn wait(&mut self, limit: Duration) -> bool {
        match self.incoming.recv_timeout(limit) {
            Ok(bytes) => {
                self.buffer.drain(..self.at);
                self.at = 0;
                self.buffer.extend_from_slice(&bytes);
                true
            }
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => {
                self.ended = true;
                false
            }
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.deaf.store(false, Ordering::Relaxed);
        // Fails where the server has closed already, and then there is nothing to end.
        drop(self.stream.shutdown(Shutdown::Both));
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
    }
}

/// Takes in what comes until the connection ends. A reset is an end like any other: a server that closes while
/// bytes of ours are under way makes one.
fn pump(mut source: Stream, sink: &Sender<Vec<u8>>, deaf: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        while deaf.load(Ordering::Relaxed) {
            std::thread::sleep(NAP);
        }
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => {
                if sink.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
            Err(reason) if reason.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// A connection to a server that the test plays itself.
#[cfg(test)]
pub(super) fn pair() -> (Wire, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Wire::over(Stream::Unix(ours)).unwrap(), theirs)
}

/// An error that says where a reply breaks a rule.
pub(super) fn broken(rule: &str, what: impl std::fmt::Debug) -> anyhow::Error {
    anyhow!("{rule}: {what:02x?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let unix = Address::parse("nbd+unix:///vol0?socket=/a/b.sock").unwrap();
        assert_eq!(unix, (Address::Unix("/a/b.sock".to_owned()), "vol0".to_owned()));
        let tcp = Address::parse("nbd://127.0.0.1:10809/v").unwrap();
        assert_eq!(tcp, (Address::Tcp("127.0.0.1:10809".to_owned()), "v".to_owned()));
        assert!(Address::parse("http://x/").is_err());
    }
}
