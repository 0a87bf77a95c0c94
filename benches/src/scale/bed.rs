//! A cluster under measurement: data nodes n1, n2, .. and a witness, volumes, loads, memory.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, Job, Pattern, run};
use blkrepl_nbd::{ClientOptions, NbdClient, NbdUri};
use blkrepl_tests::cluster::{START_LIMIT, SYNC_LIMIT};
use blkrepl_tests::usage::Memory;
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions};

use super::area::Area;

/// The node that serves everything.
pub(crate) const PRIMARY: &str = "n1";
/// Load before a measurement begins.
const WARM_UP: Duration = Duration::from_millis(100);
/// Runs of each load, one after the other.
const ROUNDS: u32 = 5;
/// Longest time for touching blocks once.
const FILL_LIMIT: Duration = Duration::from_secs(300);

/// Random writes of 4 KiB.
pub(crate) const WRITES: Job =
    Job { pattern: Pattern::Random, read_percent: 0, block_size: 4096, fua: false, flush_after_write: false };

pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    dir: tempfile::TempDir,
}

/// A volume of a bed.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(super) size: u64,
    pub(crate) uri: NbdUri,
    pub(super) pids: Vec<u32>,
}

impl Bed {
    /// A cluster without volumes.
    pub(crate) fn start(base: &Path, data_nodes: u64) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blkrepl-bench-").tempdir_in(base)?;
        let mut cluster = Cluster::prepare(ClusterOptions {
            create_volume: false,
            base: Some(dir.path().to_owned()),
            ..ClusterOptions::by_hand(1 << 30, data_nodes)
        })?;
        cluster.start_all()?;
        wait_for("every node in the cluster", START_LIMIT, || {
            cluster.nodes()?.iter().try_for_each(|node| cluster.status_of(&node.name).map(drop))
        })?;
        Ok(Self { cluster, dir })
    }

    /// Creates a volume whose primary is n1 and waits until it is in sync.
    pub(crate) fn volume(&self, name: &str, size: u64, replicas: &[&str]) -> Result<Target> {
        self.cluster.create_volume(name, size, replicas)?;
        self.cluster.wait_volumes_in_sync(PRIMARY, &[name], SYNC_LIMIT)?;
        self.target(name, size)
    }

    /// A volume that is there, once it is served.
    pub(crate) fn target(&self, name: &str, size: u64) -> Result<Target> {
        let uri: NbdUri = self.cluster.node(PRIMARY)?.unix()?.parse()?;
        let uri = NbdUri { export: name.to_owned(), ..uri };
        wait_for("the volume to be served", START_LIMIT, || {
            NbdClient::connect(&uri, ClientOptions::default())?.disconnect()?;
            Ok(())
        })?;
        let mut pids = Vec::new();
        for node in self.cluster.nodes()? {
            if self.cluster.runs(&node.name)? {
                pids.push(self.cluster.process(&node.name)?);
            }
        }
        Ok(Target { size, uri, pids })
    }

    /// Stops a node and waits until the volumes are without it.
    pub(crate) fn lose(&mut self, node: &str, volumes: &[&str]) -> Result<()> {
        self.cluster.stop_node(node)?;
        self.cluster.wait_removed(PRIMARY, volumes, node, SYNC_LIMIT)
    }

    pub(super) fn memory(&self, node: &str) -> Result<Memory> {
        self.cluster.memory(node)
    }

    pub(super) fn witness_memory(&self) -> Result<Memory> {
        self.cluster.memory(&self.cluster.witness()?)
    }

    /// Stops the cluster and removes its files.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.cluster.stop()?;
        drop(self.cluster);
        self.dir.close().context("remove the cluster's files")
    }
}

impl Target {
    /// Random writes within an area, several times: the run with the lowest median. What else the machine does
    /// makes a run slower, never faster.
    pub(super) fn write(&self, area: Area, depth: usize, time: Duration) -> Result<BenchReport> {
        let mut options = self.options(WRITES, depth, time / ROUNDS);
        area.apply(self.size, &mut options);
        self.best(&options)
    }

    /// The run with the lowest median of several.
    pub(super) fn best(&self, options: &BenchOptions) -> Result<BenchReport> {
        let runs = (0..ROUNDS).map(|_| Ok(run(&self.uri, options)?));
        let runs = runs.collect::<Result<Vec<_>>>()?;
        runs.into_iter().min_by_key(|run| run.latency.p50_ns).context("no round was run")
    }

    /// Touches every block of an area once, so that no space is allocated later.
    pub(super) fn fill(&self, area: Area) -> Result<()> {
        let job = Job { pattern: Pattern::Sequential, ..WRITES };
        let mut options = self.options(job, 32, FILL_LIMIT);
        (options.warm_up, options.count) = (Duration::ZERO, Some(Area::blocks()));
        area.apply(self.size, &mut options);
        run(&self.uri, &options).context("touch every block of the area once")?;
        Ok(())
    }

    /// All processes of the cluster.
    pub(crate) fn pids(&self) -> &[u32] {
        &self.pids
    }

    pub(crate) fn options(&self, job: Job, depth: usize, time: Duration) -> BenchOptions {
        BenchOptions {
            warm_up: WARM_UP,
            time,
            pids: self.pids.clone(),
            destroys_data: true,
            ..BenchOptions::new(job, depth)
        }
    }
}
