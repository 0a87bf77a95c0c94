//! What a node of the control plane has from outside: the clock of its leases, random numbers, connections, the
//! directory of its store, and what runs the store's jobs. [`System`] is the operating system; a simulator has
//! another. Tasks and timers come from `runtime`.
//!
//! Nothing here decides anything, and nothing in `control` reaches the operating system but through here.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::thread;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

use crate::durable;
use crate::types::Nanos;

use super::random::random_u128;
use super::state::ClusterState;
use super::store::StoreWorker;

/// Something that takes its time.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A stream of bytes to another node.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Takes connections of other nodes.
pub trait Listener: Send {
    /// The next connection, and where it comes from.
    fn accept(&mut self) -> Pending<'_, io::Result<(Box<dyn Stream>, String)>>;
}

/// The file of the store's database.
pub enum StoreFile {
    /// A file, locked against other processes.
    Os(File),
    /// Something else that keeps bytes.
    Other(Box<dyn RawFile>),
}

/// What the database needs of a file. Of what was written since the last sync any part may be lost.
pub trait RawFile: fmt::Debug + Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// The disk's.
    fn size(&self) -> io::Result<u64>;
    /// Reads all of `out`.
    ///
    /// # Errors
    /// The disk's; the range is not within the file.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Cuts the file off, or lengthens it with zeroes.
    ///
    /// # Errors
    /// The disk's.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written durable.
    ///
    /// # Errors
    /// The disk's.
    fn sync(&self) -> io::Result<()>;
    /// Writes.
    ///
    /// # Errors
    /// The disk's.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// The directory of a node's store.
pub trait StoreDir {
    /// Where a file is, for people.
    fn path(&self, name: &str) -> PathBuf;
    /// Makes the directory, if it is not there.
    ///
    /// # Errors
    /// The file system's.
    fn create_dir(&self) -> io::Result<()>;
    /// True if there is something of that name.
    fn exists(&self, name: &str) -> bool;
    /// Length of a file.
    ///
    /// # Errors
    /// The file system's.
    fn len(&self, name: &str) -> io::Result<u64>;
    /// Content of a file.
    ///
    /// # Errors
    /// The file system's.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Gives a file its content, all of it or none, durably.
    ///
    /// # Errors
    /// The file system's; the file is as it was, or new.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// An empty file under that name.
    ///
    /// # Errors
    /// The file system's.
    fn create(&self, name: &str) -> io::Result<StoreFile>;
    /// A file that is there.
    ///
    /// # Errors
    /// The file system's.
    fn open(&self, name: &str) -> io::Result<StoreFile>;
    /// Renames a file durably.
    ///
    /// # Errors
    /// The file system's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
}

/// What a node has from outside.
pub trait Environment: Send + Sync {
    /// Time by which leases are counted: CLOCK_BOOTTIME. Never goes back within a run.
    fn now(&self) -> Nanos;
    /// A random number for ids and nonces. Nothing that decides draws one.
    ///
    /// # Errors
    /// There is none to be had.
    fn random(&self) -> io::Result<u128>;
    /// Connects to a node.
    fn connect(&self, addr: String) -> Pending<'static, io::Result<Box<dyn Stream>>>;
    /// Listens for nodes.
    fn listen(&self, addr: SocketAddr) -> Pending<'static, io::Result<Box<dyn Listener>>>;
    /// A directory of a store.
    fn store_dir(&self, dir: &Path) -> Box<dyn StoreDir>;
    /// Starts what runs the jobs of the store.
    ///
    /// # Errors
    /// It cannot be started.
    fn start_store(&self, worker: StoreWorker) -> io::Result<()>;
    /// A committed entry is about to take effect here: the state after it. For checks; changes nothing.
    fn applied(&self, _state: &ClusterState) {}
}

/// The operating system: tokio's sockets, files, a thread for the store.
#[derive(Clone, Copy, Debug)]
pub struct System {
    now: fn() -> Nanos,
}

impl System {
    /// The operating system with a function that reads CLOCK_BOOTTIME.
    #[must_use]
    pub fn new(now: fn() -> Nanos) -> Self {
        Self { now }
    }
}

impl Environment for System {
    fn now(&self) -> Nanos {
        (self.now)()
    }

    fn random(&self) -> io::Result<u128> {
        random_u128()
    }

    fn connect(&self, addr: String) -> Pending<'static, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }

    fn listen(&self, addr: SocketAddr) -> Pending<'static, io::Result<Box<dyn Listener>>> {
        Box::pin(async move { Ok(Box::new(TcpListener::bind(addr).await?) as Box<dyn Listener>) })
    }

    fn store_dir(&self, dir: &Path) -> Box<dyn StoreDir> {
        Box::new(OsDir(dir.into()))
    }

    fn start_store(&self, worker: StoreWorker) -> io::Result<()> {
        // Disk latency stays off the runtime that sends heartbeats.
        thread::Builder::new().name("blkrepl-store".into()).spawn(move || worker.run_blocking())?;
        Ok(())
    }
}

impl Listener for TcpListener {
    fn accept(&mut self) -> Pending<'_, io::Result<(Box<dyn Stream>, String)>> {
        Box::pin(async move {
            let (stream, from) = Self::accept(self).await?;
            // A connection that is gone already says so when it is read.
            let _ = stream.set_nodelay(true);
            Ok((Box::new(stream) as Box<dyn Stream>, from.to_string()))
        })
    }
}

/// A directory of the file system.
struct OsDir(PathBuf);

impl StoreDir for OsDir {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn create_dir(&self) -> io::Result<()> {
        durable::create_dir_all(&self.0)
    }

    fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.path(name))?.len())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(name))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        durable::replace(&self.path(name), bytes)
    }

    fn create(&self, name: &str) -> io::Result<StoreFile> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Ok(StoreFile::Os(options.open(self.path(name))?))
    }

    fn open(&self, name: &str) -> io::Result<StoreFile> {
        Ok(StoreFile::Os(OpenOptions::new().read(true).write(true).open(self.path(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        durable::rename(&self.path(from), &self.path(to))
    }
}
