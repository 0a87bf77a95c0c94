//! What the benches share, and the programs that measure blkrepl: [`floor`], [`compare`], [`connections`],
//! [`fair`], [`scale`] and [`ways`]; [`cores`] are what the bench of pieces drives.
//!
//! Here: a cluster of real processes with one volume on two nodes and one on a single node, the loads of the
//! criterion benches, and the table of their results. The volume with one replica runs the same code with
//! replication off; the difference between the two is what replication costs. Nothing here judges a number.

pub mod compare;
pub mod connections;
pub mod cores;
pub mod fair;
pub mod floor;
pub mod scale;
pub mod ways;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use blkrepl_nbd::NbdUri;
use blkrepl_nbd::bench::{BenchOptions, Job, Pattern, TIME_MAX, run};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::{Cluster, ClusterOptions};

/// Bytes of each volume.
const SIZE: u64 = 256 << 20;
/// Bytes of it that are written, once before anything is measured so that no space is allocated later.
const AREA: u64 = 128 << 20;
/// Name of the volume with one replica.
const ALONE: &str = "alone";
/// Longest time for the operations of one sample.
const SAMPLE_LIMIT: Duration = Duration::from_secs(600);

/// The cluster that is measured.
pub struct Fixture {
    cluster: Cluster,
}

/// Whether the volume has a second replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replication {
    /// Two replicas.
    On,
    /// One.
    Off,
}

impl Replication {
    /// Both.
    pub const ALL: [Self; 2] = [Self::On, Self::Off];

    /// For names of benches.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::On => "replicated",
            Self::Off => "alone",
        }
    }
}

/// Writes of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// For names of benches.
    pub name: &'static str,
    /// Bytes per request.
    pub len: u32,
    /// Where they go.
    pub pattern: Pattern,
}

impl Load {
    /// The loads of the table.
    pub const ALL: [Self; 3] = [
        Self { name: "4k_random", len: 4096, pattern: Pattern::Random },
        Self { name: "64k_random", len: 64 << 10, pattern: Pattern::Random },
        Self { name: "1m_sequential", len: 1 << 20, pattern: Pattern::Sequential },
    ];
    /// Requests in flight.
    pub const DEPTHS: [usize; 4] = [1, 8, 32, 128];
}

impl Fixture {
    /// Starts the cluster, creates the second volume and writes both areas once.
    ///
    /// # Errors
    /// Where the cluster does not come up.
    pub fn start() -> Result<Self> {
        let cluster = Cluster::start(ClusterOptions::sized(SIZE))?;
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        cluster.create_volume(ALONE, SIZE, &[&primary])?;
        cluster.wait_volumes_in_sync(&primary, &[ALONE], SYNC_LIMIT)?;
        let fixture = Self { cluster };
        for replication in Replication::ALL {
            let fill = Runner { uri: fixture.uri(replication)?, load: Load::ALL[2], depth: 4 };
            fill.run(AREA >> 20)?;
        }
        Ok(fixture)
    }

    fn uri(&self, replication: Replication) -> Result<NbdUri> {
        let primary = self.cluster.node(&self.cluster.wait_primary(FAILOVER_LIMIT)?)?;
        let uri: NbdUri = primary.tcp()?.parse()?;
        Ok(match replication {
            Replication::On => uri,
            Replication::Off => NbdUri { export: ALONE.to_owned(), ..uri },
        })
    }

    /// Makes `load` over TCP.
    ///
    /// # Errors
    /// If nobody serves.
    pub fn runner(&self, replication: Replication, load: Load, depth: usize) -> Result<Runner> {
        Ok(Runner { uri: self.uri(replication)?, load, depth })
    }

    /// Stops the cluster.
    ///
    /// # Errors
    /// If it does not stop cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.cluster.stop().context("stop the cluster")
    }
}

/// Makes requests, on a connection of their own each time.
pub struct Runner {
    uri: NbdUri,
    load: Load,
    depth: usize,
}

impl Runner {
    /// The time that `count` requests take, with so many in flight as there are to be.
    ///
    /// # Errors
    /// If the connection ends or a request fails: a bench of errors would mean nothing.
    pub fn run(&self, count: u64) -> Result<Duration> {
        let Load { pattern, len, .. } = self.load;
        let job = Job { pattern, read_percent: 0, block_size: len, ..Job::default() };
        let options = BenchOptions {
            warm_up: Duration::ZERO,
            time: SAMPLE_LIMIT,
            count: Some(count),
            area: Some(AREA),
            destroys_data: true,
            ..BenchOptions::new(job, self.depth)
        };
        let report = run(&self.uri, &options)?;
        // The last receive may have brought more answers than were asked for.
        Ok(report.time.mul_f64(count as f64 / report.operations.max(1) as f64))
    }
}

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// The load.
    pub load: Load,
    /// Requests in flight.
    pub depth: usize,
    /// With or without a second replica.
    pub replication: Replication,
    /// Requests made in all.
    pub requests: u64,
    /// Time they took in all.
    pub time: Duration,
}

/// A measured time from a command line.
///
/// # Errors
/// If it is no number, nothing, or longer than the load generator runs.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.filter(|time| !time.is_zero() && *time <= TIME_MAX)
        .ok_or_else(|| format!("not a number of seconds above 0 and up to {}", TIME_MAX.as_secs()))
}

/// Whether a name is among those that were asked for: it has one of the words in it, or there are none.
pub(crate) fn is_chosen(name: &str, only: &[impl AsRef<str>]) -> bool {
    only.is_empty() || only.iter().any(|word| name.contains(word.as_ref()))
}

/// How a program that measures ends; the reason of a failure goes to standard error.
#[must_use]
pub fn exit_code(program: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{program}: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

/// All results as one table.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<14} {:>5} {:<12} {:>10} {:>12} {:>12} {:>10}\n",
        "load", "depth", "volume", "requests", "requests/s", "MB/s", "us each"
    );
    for row in rows.iter().filter(|row| row.requests > 0) {
        let seconds = row.time.as_secs_f64().max(1e-9);
        let rate = row.requests as f64 / seconds;
        text += &format!(
            "{:<14} {:>5} {:<12} {:>10} {:>12.0} {:>12.1} {:>10.1}\n",
            row.load.name,
            row.depth,
            row.replication.word(),
            row.requests,
            rate,
            rate * f64::from(row.load.len) / 1e6,
            seconds * 1e6 / row.requests as f64
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_a_time_that_can_be_measured() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "x", "0", "-1", "nan", "inf", "1e9"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_table_has_one_line_per_row_that_ran() {
        let row = |requests| Row {
            load: Load::ALL[0],
            depth: 1,
            replication: Replication::On,
            requests,
            time: Duration::from_secs(2),
        };
        let text = table(&[row(1000), row(0)]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("500") && text.contains("2000.0"), "{text}");
    }
}
