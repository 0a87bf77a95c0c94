//! A server under test: its address, its processes, what of it has to be stopped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_nbd::{ClientOptions, NbdClient, NbdUri};
use blkrepl_tests::Cluster;
use blkrepl_tests::proc::{Proc, pid_runs, signal_pid, tail};
use blkrepl_tests::wait::{wait_for, wait_until};
use rustix::fs::FallocateFlags;
use rustix::process::Signal;

use super::{Transport, own, peers};

/// Name of the export, where a server lets one choose.
pub(super) const EXPORT: &str = "vol0";
/// Longest time until a server that was started answers.
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// All servers, in the order of the table.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    own::FLOOR_NAMES.into_iter().chain(own::BLKREPL_NAMES).chain(peers::NAMES)
}

pub(super) struct Subject {
    pub(super) name: &'static str,
    /// A peer that replicates, for the ratio to the best of them.
    pub(super) is_replicated_peer: bool,
    pub(super) uri: NbdUri,
    /// All processes of the server.
    pub(super) pids: Vec<u32>,
    /// The one whose calls of io_uring_enter are counted, if that means anything.
    pub(super) primary: Option<u32>,
    pub(super) procs: Vec<Proc>,
    pub(super) cluster: Option<Cluster>,
    pub(super) daemon: Option<Daemon>,
}

/// A process that went to the background by itself. Dropping it ends it.
pub(super) struct Daemon {
    pub(super) pid: u32,
    /// Stands on its command line, so that nobody else is ended.
    pub(super) needle: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        if signal_pid(self.pid, &self.needle, Signal::TERM).is_ok() {
            let _ = wait_until("the end of a daemon", STOP_LIMIT, || !pid_runs(self.pid, &self.needle));
        }
    }
}

impl Subject {
    /// A server of processes that were just started, once it answers.
    pub(super) fn ready(name: &'static str, uri: NbdUri, mut procs: Vec<Proc>) -> Result<Self> {
        wait_for(&format!("{name} to answer"), START_LIMIT, || {
            NbdClient::connect(&uri, ClientOptions::default())?.disconnect()?;
            Ok(())
        })
        .map_err(|reason| {
            let said: Vec<String> = procs.iter().map(|proc| tail(&proc.output())).collect();
            reason.context(said.join("\n"))
        })?;
        for proc in &mut procs {
            ensure!(proc.exited()?.is_none(), "{} has ended: {}", proc.label(), tail(&proc.output()));
        }
        let pids = procs.iter().map(Proc::pid).collect();
        Ok(Self {
            name,
            is_replicated_peer: false,
            uri,
            pids,
            primary: None,
            procs,
            cluster: None,
            daemon: None,
        })
    }

    /// Stops what was started for it.
    pub(super) fn stop(&mut self) -> Result<()> {
        // The first is what clients connect to; whoever it depends on comes after it.
        for proc in &mut self.procs {
            proc.end(Signal::TERM, STOP_LIMIT)?;
        }
        self.procs.clear();
        self.daemon = None;
        if let Some(mut cluster) = self.cluster.take() {
            cluster.stop()?;
        }
        Ok(())
    }
}

/// A file of `size` bytes whose space is allocated.
pub(super) fn allocated(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
        .with_context(|| format!("allocate {}", path.display()))
}

/// Where a server listens and clients find it.
pub(super) struct Address {
    pub(super) socket: PathBuf,
    pub(super) port: u16,
    transport: Transport,
}

impl Address {
    pub(super) fn new(name: &str, dir: &Path, transport: Transport) -> Result<Self> {
        let port = blkrepl_tests::cluster::free_ports(1)?[0];
        Ok(Self { socket: dir.join(format!("{name}.sock")), port, transport })
    }

    pub(super) fn uri(&self, export: &str) -> NbdUri {
        match self.transport {
            Transport::Unix => NbdUri::unix(&self.socket, export),
            Transport::Tcp => NbdUri::tcp("127.0.0.1", self.port, export),
        }
    }

    pub(super) fn is_unix(&self) -> bool {
        self.transport == Transport::Unix
    }
}
