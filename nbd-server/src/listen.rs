//! Listening sockets, TCP and unix, and the unix socket's file.
//!
//! A unix socket file that is in the way is replaced only if it is a socket and nobody answers on it; any
//! other file, and a living server, are left alone. The file is taken away again when the listener is
//! dropped, unless somebody else has put another one in its place meanwhile.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Where it comes from.
    pub(crate) fn peer(&self) -> io::Result<Peer> {
        match self {
            Self::Tcp(stream) => {
                let (remote, local) = (stream.peer_addr()?.ip(), stream.local_addr()?.ip());
                Ok(Peer::Tcp { remote, local })
            }
            Self::Unix(_) => Ok(Peer::Unix),
        }
    }

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

    /// Where it really listens, the kernel's choice of a port included.
    pub(crate) fn addr(&self) -> io::Result<ListenAddr> {
        match self {
            Self::Tcp(listener) => Ok(ListenAddr::Tcp(listener.local_addr()?)),
            Self::Unix(_, file) => Ok(ListenAddr::Unix(file.path.clone())),
        }
    }

    /// Waits for a connection; gives it with the peer's name for logs. Cancelling loses no connection.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Without it small replies wait for the client's delayed acknowledgement. It fails only if the
                // connection is gone already, which shows soon enough.
                let _ = stream.set_nodelay(true);
                if let Err(error) = keepalive::watch(&stream) {
                    tracing::debug!(%peer, %error, "an NBD client's socket cannot be watched");
                }
                Ok((Accepted::Tcp(stream), peer.to_string()))
            }
            Self::Unix(listener, file) => {
                let (stream, _) = listener.accept().await?;
                let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
                let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                Ok((Accepted::Unix(stream), format!("unix:{}{pid}", file.path.display())))
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

/// The file of a unix socket; taken away when dropped.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: meta.dev(), inode: meta.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |meta: std::fs::Metadata| meta.dev() == self.device && meta.ino() == self.inode;
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
