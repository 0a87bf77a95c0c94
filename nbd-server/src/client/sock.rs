//! A non-blocking socket, TCP or unix, with waits that have a deadline.
//!
//! Never blocks outside [`Sock::wait`], but for the name resolution of a TCP host.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::NbdError;
use crate::uri::Target;

/// Pause between attempts to get into the full backlog of a unix socket; poll(2) cannot wait for that.
const BACKLOG_PAUSE: Duration = Duration::from_millis(5);

/// What to wait for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) read: bool,
    pub(super) write: bool,
}

#[derive(Debug)]
pub(super) enum Sock {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Sock {
    pub(super) fn connect(target: &Target, deadline: Instant) -> Result<Self, NbdError> {
        let connected = match target {
            Target::Tcp { host, port } => connect_tcp(host, *port, deadline).map(Self::Tcp),
            Target::Unix(path) => connect_unix(path, deadline).map(Self::Unix),
        };
        connected.map_err(|source| NbdError::Connect { target: target.to_string(), source })
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        match self {
            Self::Tcp(stream) => stream.into(),
            Self::Unix(stream) => stream.into(),
        }
    }

    /// Sends what fits without waiting.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        retry_interrupted(|| match self {
            Self::Tcp(stream) => (&*stream).write_vectored(parts),
            Self::Unix(stream) => (&*stream).write_vectored(parts),
        })
    }

    /// Takes what is there without waiting; 0 is the end of the stream.
    pub(super) fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        retry_interrupted(|| match self {
            Self::Tcp(stream) => (&*stream).read(buf),
            Self::Unix(stream) => (&*stream).read(buf),
        })
    }

    /// Waits until the socket is ready in one of the wanted ways (or broken); false at the deadline.
    pub(super) fn wait(&self, want: Ready, deadline: Instant) -> io::Result<bool> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, want.read);
        flags.set(PollFlags::OUT, want.write);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A span that does not fit into a timespec is as good as none.
            let left = Timespec::try_from(left).ok();
            match rustix::event::poll(&mut [PollFd::new(self, flags)], left.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Fills `buf` by the deadline.
    pub(super) fn receive_exact(&self, mut buf: &mut [u8], deadline: Instant) -> Result<(), NbdError> {
        while !buf.is_empty() {
            match self.receive(buf) {
                Ok(0) => return Err(NbdError::Disconnected("the server closed the connection".into())),
                Ok(got) => buf = &mut buf[got..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for(Ready { read: true, write: false }, deadline)?;
                }
                Err(e) => return Err(NbdError::Disconnected(e.to_string())),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes` by the deadline.
    pub(super) fn send_all(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), NbdError> {
        while !bytes.is_empty() {
            match self.send(&[IoSlice::new(bytes)]) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for(Ready { read: false, write: true }, deadline)?;
                }
                Err(e) => return Err(NbdError::Disconnected(e.to_string())),
            }
        }
        Ok(())
    }

    fn wait_for(&self, want: Ready, deadline: Instant) -> Result<(), NbdError> {
        match self.wait(want, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(NbdError::TimedOut("the server in the negotiation")),
            Err(e) => Err(NbdError::Disconnected(e.to_string())),
        }
    }

    /// Ends the connection in both directions. Errors mean that it has ended already.
    pub(super) fn shutdown(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Sock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for addr in (host, port).to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&addr, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn connect_unix(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let addr = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    loop {
        // A connect to a unix socket is done at once or refused at once; a full backlog says EAGAIN.
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&fd, &addr) {
            Ok(()) => return Ok(UnixStream::from(fd)),
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(BACKLOG_PAUSE),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
