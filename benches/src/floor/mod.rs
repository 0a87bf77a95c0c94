//! The floor: the least that a server of replicated writes can do, as fast as it can be done.
//!
//! It receives a request, writes it here and sends it to its peer at once, waits for both, answers; it reads
//! from here; a flush is an fdatasync on both at once. No metadata, no checksums, no membership, no order
//! between overlapping requests: nothing survives anything. It is the yardstick of `compare`, and no more.
//!
//! One thread, one ring, one `io_uring_enter` per turn: what came in is parsed, what that led to (disk
//! writes, sends to the peer, replies, the next receives) goes to the kernel with the next wait. Requests are
//! received in bulk; a small payload is copied once, into a registered buffer, a large one lands there
//! directly. The peer is the same program without a peer, spoken to in NBD.
//!
//! ```text
//! service  the loop and the requests in flight
//! link     one connection: what came in, what goes out
//! uring    the ring; with `arena` all of the unsafe code
//! arena    aligned buffers
//! storage  the data file
//! ```

mod arena;
mod link;
mod service;
mod storage;
mod uring;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use anyhow::{Context, Result, anyhow};
use blkrepl_nbd::{
    Admitting, ClientOptions, ExportInfo, ExportRefusal, Exports, ListenAddr, NbdUri, Peer, Server,
    ServerOptions, admit_with, connect_raw,
};
use rustix::event::EventfdFlags;

use service::Service;
use storage::Storage;

/// Longest read or write.
pub const REQUEST_BYTES_MAX: u32 = 4 << 20;

/// What a floor process does.
#[derive(Clone, Debug)]
pub struct FloorOptions {
    /// Where it listens.
    pub listen: ListenAddr,
    /// The file that it reads and writes; none is stored and reads give zeroes if not given.
    pub data: Option<PathBuf>,
    /// Bytes of the export; those of the file if there is one.
    pub size: u64,
    /// Where writes go, too.
    pub peer: Option<NbdUri>,
}

/// Serves until the process is ended.
///
/// # Errors
/// Where it cannot be set up, or the kernel breaks off.
pub fn serve(options: &FloorOptions) -> Result<()> {
    let storage = options.data.as_deref().map(Storage::open).transpose()?;
    let size = storage.as_ref().map_or(options.size, Storage::size);
    let peer = match &options.peer {
        Some(uri) => Some(connect_raw(uri, ClientOptions::default()).context("connect to the peer")?.0),
        None => None,
    };
    if let Some(peer) = &peer {
        rustix::io::ioctl_fionbio(peer, false).context("make the peer's socket wait")?;
    }
    let wake =
        Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).context("make an event descriptor")?);
    let (send, arrivals) = mpsc::channel();
    let exports = Arc::new(Door { size, send, wake: Arc::clone(&wake) });
    let listen = options.listen.clone();
    // Negotiations run on a thread of their own, which sleeps once all clients are there.
    std::thread::Builder::new().name("negotiate".into()).spawn(move || negotiate(&listen, exports))?;
    Service::new(storage, peer, wake, arrivals)?.run()
}

fn negotiate(listen: &ListenAddr, exports: Arc<Door>) {
    let run = || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let _server =
                Server::start(std::slice::from_ref(listen), exports, ServerOptions::default()).await?;
            std::future::pending::<()>().await;
            Ok(())
        })
    };
    if let Err(reason) = run() {
        eprintln!("floor: {reason:#}");
        std::process::exit(1);
    }
}

/// Hands connections from the negotiation to the loop.
struct Door {
    size: u64,
    send: Sender<OwnedFd>,
    wake: Arc<OwnedFd>,
}

impl Exports for Door {
    fn list(&self) -> Vec<String> {
        vec![String::new()]
    }

    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        let info = ExportInfo::new(name, self.size);
        Ok(ExportInfo { min_block: 512, max_payload: REQUEST_BYTES_MAX, ..info })
    }

    fn admit(&self, _name: &str, _: Peer) -> Admitting {
        let (send, wake) = (self.send.clone(), Arc::clone(&self.wake));
        admit_with(move |client| {
            let sent = send.send(client.fd);
            let woken = sent.map_err(|_| anyhow!("the loop is gone")).and_then(|()| {
                rustix::io::write(&*wake, &1u64.to_ne_bytes()).map(drop).context("wake the loop")
            });
            if let Err(reason) = woken {
                eprintln!("floor: a connection is lost: {reason:#}");
            }
        })
    }
}
