//! Where faults happen: a cluster of real processes, and beside it the parts that can be made to fail. Three
//! kinds, because one machine can seldom give all of it: links through proxies (needs nothing), hosts in
//! network namespaces, disks that fail (both need root).
//!
//! An arena outlives its cluster: devices cannot go while a node holds them.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::cluster::{Cluster, ClusterOptions, scratch_dir};
use crate::disk::{self, Device};
use crate::netns::{self, Bridge};
use crate::plan::NodePlan;
use crate::proc::run_ok;
use crate::proxy::{Proxy, Traffic};

/// Size of the volume.
pub const SIZE: u64 = 64 << 20;
/// Lease of the clusters: short, so that many failovers fit into a round.
const LEASE_MS: u64 = 500;
/// Who dials for the sessions of replicas: the one with the lower id, so the first is dialed by nobody.
const DIALER: &str = "n1";
/// Room of the file system in memory: more than the volume, so that it is full only when filled.
const TMPFS_LEN: u64 = 96 << 20;
const STEP_LIMIT: Duration = Duration::from_secs(20);

/// A link and its ends.
pub struct Link {
    /// The proxy on it.
    pub proxy: Proxy,
    /// Names of the node that dials (none: clients) and of the one that listens.
    pub ends: (Option<String>, String),
}

/// What can fail beside processes.
#[derive(Default)]
pub struct Arena {
    /// Proxies.
    pub links: Vec<Link>,
    /// The switch between hosts.
    pub bridge: Option<Bridge>,
    /// Failing block devices, by node.
    pub devices: BTreeMap<String, Device>,
    /// File systems that can be filled, by node.
    pub rooms: BTreeMap<String, Tmpfs>,
    _scratch: Option<TempDir>,
}

fn options() -> ClusterOptions {
    ClusterOptions { lease_ms: Some(LEASE_MS), ..ClusterOptions::by_hand(SIZE, 2) }
}

/// Three replicas and no witness.
fn three() -> ClusterOptions {
    ClusterOptions { data_nodes: 3, witness: false, ..options() }
}

impl Arena {
    /// Two replicas and a witness on loopback with a proxy on every link: control each way, sessions of
    /// replicas, clients.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn with_links(seed: u64) -> Result<(Self, Cluster)> {
        Self::linked(options(), seed)
    }

    /// The same with three replicas. The sessions to the third share a proxy.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn with_three(seed: u64) -> Result<(Self, Cluster)> {
        Self::linked(three(), seed)
    }

    fn linked(options: ClusterOptions, seed: u64) -> Result<(Self, Cluster)> {
        let mut arena = Self::default();
        let cluster = Cluster::prepare_wired(options, |plans| {
            arena.links = proxies(plans, seed)?;
            Ok(())
        })?;
        Ok((arena, cluster))
    }

    /// Nodes in network namespaces of their own, clients in another. The calling thread is moved to where
    /// the clients are.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn with_hosts() -> Result<(Self, Cluster)> {
        let bridge = Bridge::new(3)?;
        let cluster = Cluster::prepare_wired(options(), |plans| NodePlan::on_hosts(plans, &bridge))?;
        Ok((Self { bridge: Some(bridge), ..Self::default() }, cluster))
    }

    /// One node on a disk that fails as told, the other on a file system in memory that can be full.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn with_disks(seed: u64) -> Result<(Self, Cluster)> {
        let scratch = scratch_dir()?;
        let device = Device::new(scratch.path(), "n1", SIZE, seed)?;
        let room = Tmpfs::mount(&scratch.path().join("n2.room"))?;
        let data_paths = [("n1".to_owned(), device.path()), ("n2".to_owned(), room.path().join("vol0.data"))];
        let cluster = Cluster::prepare(ClusterOptions { data_paths: data_paths.into(), ..options() })?;
        let arena = Self {
            devices: [("n1".to_owned(), device)].into(),
            rooms: [("n2".to_owned(), room)].into(),
            _scratch: Some(scratch),
            ..Self::default()
        };
        Ok((arena, cluster))
    }

    /// Why there can be no hosts here.
    #[must_use]
    pub fn no_hosts() -> Option<String> {
        netns::unavailable()
    }

    /// Why there can be no failing disks here.
    #[must_use]
    pub fn no_disks() -> Option<String> {
        disk::unavailable().or_else(|| {
            let tried =
                scratch_dir().and_then(|dir| Tmpfs::mount(&dir.path().join("probe"))?.takes_direct_io());
            tried.err().map(|reason| format!("no file system in memory with direct I/O: {reason:#}"))
        })
    }
}

fn proxies(plans: &mut [NodePlan], seed: u64) -> Result<Vec<Link>> {
    let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let names: Vec<(u64, String)> = plans.iter().map(|plan| (plan.id, plan.name.clone())).collect();
    let mut links = Vec::new();
    for plan in plans {
        let mut add = |from: Option<&str>, traffic, to| -> Result<SocketAddr> {
            let name = format!("{}>{} {traffic:?}", from.unwrap_or("clients"), plan.name);
            let proxy = Proxy::start(&name, traffic, any, to, seed ^ links.len() as u64)?;
            let at = proxy.at();
            links.push(Link { proxy, ends: (from.map(str::to_owned), plan.name.clone()) });
            Ok(at)
        };
        for (id, from) in names.iter().filter(|(id, _)| *id != plan.id) {
            plan.control_at.insert(*id, add(Some(from), Traffic::Control, plan.control_listen())?);
        }
        if plan.data {
            if plan.name != DIALER {
                plan.peer_at = Some(add(Some(DIALER), Traffic::Peer, plan.peer_listen())?);
            }
            plan.nbd_at = Some(add(None, Traffic::Nbd, plan.nbd_listen())?);
        }
    }
    Ok(links)
}

/// A small file system in memory. Unmounted when dropped.
pub struct Tmpfs {
    at: PathBuf,
}

impl Tmpfs {
    /// Mounts one at `at`, which is made.
    ///
    /// # Errors
    /// Where a step fails.
    pub fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at).with_context(|| format!("make {}", at.display()))?;
        let size = format!("size={TMPFS_LEN}");
        let args = ["-t", "tmpfs", "-o", &size, "tmpfs"].map(AsRef::as_ref);
        run_ok("mount", &[&args[..], &[at.as_os_str()]].concat(), STEP_LIMIT)?;
        Ok(Self { at: at.to_path_buf() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Takes all room that is left.
    ///
    /// # Errors
    /// Where the filler cannot be made.
    pub fn fill(&self) -> Result<()> {
        let file = fs::File::create(self.filler()).context("make a filler")?;
        let room = rustix::fs::statvfs(&self.at).context("look at the room left")?;
        let len = room.f_bavail * room.f_frsize;
        if len > 0 {
            let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len);
        }
        Ok(())
    }

    /// Gives the room back.
    pub fn free(&self) {
        let _ = fs::remove_file(self.filler());
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    fn takes_direct_io(&self) -> Result<()> {
        let direct = rustix::fs::OFlags::DIRECT.bits();
        let mut options = fs::File::options();
        options.create(true).truncate(true).write(true).custom_flags(i32::try_from(direct)?);
        let opened = options.open(self.at.join("probe"));
        ensure!(opened.is_ok(), "{opened:?}");
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if run_ok("umount", &[self.at.as_os_str()], STEP_LIMIT).is_err() {
            let _ = run_ok("umount", &["-l".as_ref(), self.at.as_os_str()], STEP_LIMIT);
        }
    }
}
