//! Listening sockets, TCP and unix, bound here or passed by whoever started the process, and the unix socket's file.
//!
//! A unix socket file that is in the way is replaced only if it is a socket and nobody answers on it; any
//! other file, and a living server, are left alone. The file is taken away again when the listener is
//! dropped, unless somebody else has put another one in its place meanwhile. That of a socket that was passed is
//! its maker's: never touched.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SocketAddrUnix, SocketType, sockopt};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::export::Peer;
use crate::keepalive;

/// Longest path of a unix socket in bytes, by the size of the kernel's `sun_path` less its final NUL.
const UNIX_PATH_MAX: usize = 107;
/// How long a server on the other end of an existing socket file may take to be connected to. A server that
/// takes longer is alive: its backlog is full.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddr {
    /// TCP; port 0 lets the kernel choose one.
    Tcp(SocketAddr),
    /// Unix socket.
    Unix(PathBuf),
}

impl ListenAddr {
    /// Where a socket listens.
    ///
    /// # Errors
    /// It is no stream socket that listens, or has an address of another kind.
    pub fn of_socket(socket: &impl AsFd) -> Result<Self, ListenError> {
        let unfit = |source: rustix::io::Errno| ListenError::Passed(source.to_string());
        let is_stream = sockopt::socket_type(socket).map_err(unfit)? == SocketType::STREAM;
        if !is_stream || !sockopt::socket_acceptconn(socket).map_err(unfit)? {
            return Err(ListenError::Passed("it does not listen".into()));
        }
        let addr = rustix::net::getsockname(socket).map_err(unfit)?;
        if let Ok(addr) = SocketAddr::try_from(addr.clone()) {
            return Ok(Self::Tcp(addr));
        }
        let unix = SocketAddrUnix::try_from(addr).ok();
        let path = unix.and_then(|addr| addr.path_bytes().map(<[u8]>::to_vec));
        match path {
            Some(path) => Ok(Self::Unix(OsString::from_vec(path).into())),
            None => Err(ListenError::Passed("its address is neither one of TCP nor a path".into())),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why an address cannot be listened on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another process listens on the TCP address.
    #[error(
        "NBD address {0} is in use by another process; stop that process (`ss -ltnp` shows it) or \
         configure another port"
    )]
    TcpInUse(SocketAddr),
    /// The TCP address cannot be used.
    #[error("cannot listen for NBD on {addr}: {source}; check that the address belongs to this machine")]
    Tcp {
        /// The address.
        addr: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// A living server answers on the unix socket.
    #[error("NBD socket {0} is in use: a process answers on it; stop that process or configure another path")]
    UnixInUse(PathBuf),
    /// The path of the unix socket is taken by something that is not a socket.
    #[error("{0} exists and is not a socket; move it away or configure another path for the NBD socket")]
    UnixNotASocket(PathBuf),
    /// The path does not fit into a socket address.
    #[error(
        "NBD socket path {0} is longer than the {UNIX_PATH_MAX} bytes that a unix socket can have; \
         configure a shorter path"
    )]
    UnixPathTooLong(PathBuf),
    /// A socket that was passed cannot be used.
    #[error("it is not a TCP or unix socket that listens: {0}")]
    Passed(String),
    /// The unix socket cannot be made.
    #[error("cannot listen for NBD on {path}: {source}; check that its directory exists and is writable")]
    Unix {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// A connection just accepted.
#[derive(Debug)]
pub(crate) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Accepted {
    /// Number of its file descriptor.
    pub(crate) fn descriptor(&self) -> i32 {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

impl Listener {
    pub(crate) async fn bind(addr: &ListenAddr) -> Result<Self, ListenError> {
        match addr {
            ListenAddr::Tcp(addr) => match TcpListener::bind(addr).await {
                Ok(listener) => Ok(Self::Tcp(listener)),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(ListenError::TcpInUse(*addr)),
                Err(source) => Err(ListenError::Tcp { addr: *addr, source }),
            },
            ListenAddr::Unix(path) => {
                let listener = bind_unix(path).await?;
                let file = SocketFile::of(path).map_err(|source| unix_error(path, source))?;
                Ok(Self::Unix(listener, file))
            }
        }
    }

    /// Takes a socket that listens already, and says where.
    pub(crate) fn adopt(socket: OwnedFd) -> Result<(Self, ListenAddr), ListenError> {
        let addr = ListenAddr::of_socket(&socket)?;
        let unfit = |source: io::Error| ListenError::Passed(source.to_string());
        let listener = match &addr {
            ListenAddr::Tcp(_) => {
                let listener = std::net::TcpListener::from(socket);
                listener.set_nonblocking(true).map_err(unfit)?;
                Self::Tcp(TcpListener::from_std(listener).map_err(unfit)?)
            }
            ListenAddr::Unix(path) => {
                let listener = std::os::unix::net::UnixListener::from(socket);
                listener.set_nonblocking(true).map_err(unfit)?;
                Self::Unix(
                    UnixListener::from_std(listener).map_err(unfit)?,
                    SocketFile { path: path.clone(), made: None },
                )
            }
        };
        Ok((listener, addr))
    }

    /// Where it really listens, the kernel's choice of a port included.
    pub(crate) fn addr(&self) -> io::Result<ListenAddr> {
        match self {
            Self::Tcp(listener) => Ok(ListenAddr::Tcp(listener.local_addr()?)),
            Self::Unix(_, file) => Ok(ListenAddr::Unix(file.path.clone())),
        }
    }

    /// Waits for a connection; gives it with where it comes from, and its name for logs. Cancelling loses
    /// no connection.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, Peer, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Without it small replies wait for the client's delayed acknowledgement. It fails only if the
                // connection is gone already, which shows soon enough.
                let _ = stream.set_nodelay(true);
                if let Err(error) = keepalive::watch(&stream, keepalive::CLIENTS) {
                    tracing::debug!(%peer, %error, "an NBD client's socket cannot be watched");
                }
                // A connection without it is gone, which shows soon enough, too.
                let local = stream.local_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |addr| addr.ip());
                Ok((Accepted::Tcp(stream), Peer::Tcp { remote: peer.ip(), local }, peer.to_string()))
            }
            Self::Unix(listener, file) => {
                let (stream, _) = listener.accept().await?;
                let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
                let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                let peer = format!("unix:{}{pid}", file.path.display());
                Ok((Accepted::Unix(stream), Peer::Unix, peer))
            }
        }
    }
}

async fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    if path.as_os_str().len() > UNIX_PATH_MAX {
        return Err(ListenError::UnixPathTooLong(path.to_owned()));
    }
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map_err(|source| unix_error(path, source)),
    }
    if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        return Err(ListenError::UnixNotASocket(path.to_owned()));
    }
    // Only a refused connection proves that nobody listens. Whatever else happens, somebody may.
    match tokio::time::timeout(PROBE_TIMEOUT, UnixStream::connect(path)).await {
        Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(ListenError::UnixInUse(path.to_owned())),
    }
    tracing::info!(path = %path.display(), "replacing the NBD socket of a process that is gone");
    std::fs::remove_file(path).map_err(|source| unix_error(path, source))?;
    UnixListener::bind(path).map_err(|source| unix_error(path, source))
}

fn unix_error(path: &Path, source: io::Error) -> ListenError {
    ListenError::Unix { path: path.to_owned(), source }
}

/// The file of a unix socket; taken away when dropped, if it was made here.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode; `None` if somebody else made it.
    made: Option<(u64, u64)>,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), made: Some((meta.dev(), meta.ino())) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |meta: std::fs::Metadata| self.made == Some((meta.dev(), meta.ino()));
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), "cannot remove the NBD socket: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> ListenAddr {
        ListenAddr::Unix(path.to_owned())
    }

    #[tokio::test]
    async fn a_socket_that_was_passed_is_listened_on_and_its_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let made = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (listener, addr) = Listener::adopt(made.into()).unwrap();
        assert_eq!(addr, unix(&path));
        let _client = UnixStream::connect(&path).await.unwrap();
        assert!(listener.accept().await.is_ok());
        drop(listener);
        assert!(path.exists());
        let made = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let bound = ListenAddr::Tcp(made.local_addr().unwrap());
        assert_eq!(Listener::adopt(made.into()).unwrap().1, bound);
        let file = std::fs::File::create(dir.path().join("file")).unwrap();
        assert!(matches!(Listener::adopt(file.into()), Err(ListenError::Passed(_))));
    }

    #[tokio::test]
    async fn a_port_in_use_is_named_with_what_to_do() {
        let first = Listener::bind(&ListenAddr::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let taken = first.addr().unwrap();
        let error = Listener::bind(&taken).await.unwrap_err().to_string();
        assert!(error.contains(&taken.to_string()) && error.contains("another port"), "{error}");
    }

    #[tokio::test]
    async fn the_socket_of_a_dead_process_is_replaced_and_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        // Dropping std's listener leaves the file behind, like a killed process does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&unix(&path)).await.unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_living_server_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let _first = Listener::bind(&unix(&path)).await.unwrap();
        let error = Listener::bind(&unix(&path)).await.unwrap_err();
        assert!(matches!(error, ListenError::UnixInUse(_)), "{error}");
        assert!(UnixStream::connect(&path).await.is_ok());
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        std::fs::write(&path, "mine").unwrap();
        let error = Listener::bind(&unix(&path)).await.unwrap_err();
        assert!(matches!(error, ListenError::UnixNotASocket(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn a_socket_that_was_replaced_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let old = Listener::bind(&unix(&path)).await.unwrap();
        std::fs::rename(&path, dir.path().join("old.sock")).unwrap();
        let _new = Listener::bind(&unix(&path)).await.unwrap();
        drop(old);
        assert!(UnixStream::connect(&path).await.is_ok());
    }

    #[tokio::test]
    async fn paths_that_cannot_work_say_why() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        assert!(matches!(Listener::bind(&unix(&long)).await, Err(ListenError::UnixPathTooLong(_))));
        let nowhere = PathBuf::from("/nonexistent/nbd.sock");
        let error = Listener::bind(&unix(&nowhere)).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/nbd.sock") && error.contains("directory"), "{error}");
    }
}
