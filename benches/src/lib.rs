//! What the benches share: a cluster of real processes with one volume on two nodes and one on a
//! single node, a load over NBD, and the table of results.
//!
//! The volume with one replica runs the same code with replication off; the difference between the two
//! is what replication costs. Nothing here judges a number.

pub mod compare;
pub mod floor;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use blkrepl_tests::bits::Random;
use blkrepl_tests::client::{Link, Request};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions};

/// Bytes of each volume.
const SIZE: u64 = 256 << 20;
/// Bytes of it that are written, once before anything is measured so that no space is allocated later.
const AREA: u64 = 128 << 20;
/// Name of the volume with one replica.
const ALONE: &str = "alone";
const MIB: u64 = 1 << 20;
/// Longest wait for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

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

/// What is done to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// For names of benches.
    pub name: &'static str,
    /// Bytes per request.
    pub len: u32,
    /// Requests in flight.
    pub depth: usize,
    /// Random places, else one after the other.
    pub random: bool,
}

impl Load {
    /// The loads of the table.
    pub const ALL: [Self; 3] = [
        Self { name: "4k_random_depth_1", len: 4096, depth: 1, random: true },
        Self { name: "4k_random_depth_32", len: 4096, depth: 32, random: true },
        Self { name: "1m_sequential_depth_4", len: 1 << 20, depth: 4, random: false },
    ];
}

impl Fixture {
    /// Starts the cluster, creates the second volume and writes both areas once.
    ///
    /// # Errors
    /// Where the cluster does not come up.
    pub fn start() -> Result<Self> {
        let cluster = Cluster::start(ClusterOptions::sized(SIZE))?;
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        let size = SIZE.to_string();
        cluster.cli(&primary, &["volume", "create", ALONE, "--size", &size, "--replicas", &primary])?.ok()?;
        wait_for("the second volume", SYNC_LIMIT, || {
            cluster.status_of(&primary)?.volume(ALONE)?.all_in_sync()
        })?;
        let fixture = Self { cluster };
        for replication in Replication::ALL {
            let mut runner = fixture.runner(replication, Load { random: false, ..Load::ALL[2] })?;
            runner.run(AREA / MIB)?;
        }
        Ok(fixture)
    }

    /// A connection over TCP that makes `load`.
    ///
    /// # Errors
    /// If nobody serves.
    pub fn runner(&self, replication: Replication, load: Load) -> Result<Runner> {
        let primary = self.cluster.node(&self.cluster.wait_primary(FAILOVER_LIMIT)?)?;
        let address = primary.tcp()?;
        let address = match replication {
            Replication::On => address.to_owned(),
            Replication::Off => {
                let (server, _) =
                    address.rsplit_once('/').ok_or_else(|| anyhow!("{address} names no export"))?;
                format!("{server}/{ALONE}")
            }
        };
        let link = wait_for("the volume", FAILOVER_LIMIT, || Ok(Link::connect(&address, ANSWER_LIMIT)?))?;
        let data: Vec<u8> = (0..load.len).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        Ok(Runner { link, load, data, random: Random::new(17), next: 0 })
    }

    /// Stops the cluster.
    ///
    /// # Errors
    /// If it does not stop cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.cluster.stop().context("stop the cluster")
    }
}

/// Makes requests on one connection.
pub struct Runner {
    link: Link,
    load: Load,
    data: Vec<u8>,
    random: Random,
    next: u64,
}

impl Runner {
    /// Makes `count` requests, keeping the load's depth in flight, and waits for all; the time it took.
    ///
    /// # Errors
    /// If the connection ends or a request fails: a bench of errors would mean nothing.
    pub fn run(&mut self, count: u64) -> Result<Duration> {
        let started = Instant::now();
        let (mut sent, mut answered) = (0, 0);
        while answered < count {
            while sent < count && sent - answered < self.load.depth as u64 {
                let offset = self.next_offset();
                let data = std::mem::take(&mut self.data);
                let request = Request::Write { offset, data, fua: false };
                self.link.submit(&request)?;
                if let Request::Write { data, .. } = request {
                    self.data = data;
                }
                sent += 1;
            }
            if let Err(reason) = self.link.next(ANSWER_LIMIT)?.result {
                bail!("a write failed: {reason}");
            }
            answered += 1;
        }
        Ok(started.elapsed())
    }

    fn next_offset(&mut self) -> u64 {
        let len = u64::from(self.load.len);
        let slots = AREA / len;
        let slot = if self.load.random { self.random.below(slots) } else { self.next % slots };
        self.next += 1;
        slot * len
    }
}

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// The load.
    pub load: Load,
    /// With or without a second replica.
    pub replication: Replication,
    /// Requests made in all.
    pub requests: u64,
    /// Time they took in all.
    pub time: Duration,
}

/// All results as one table.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<24} {:<12} {:>10} {:>12} {:>12} {:>10}\n",
        "load", "volume", "requests", "requests/s", "MB/s", "us each"
    );
    for row in rows.iter().filter(|row| row.requests > 0) {
        let seconds = row.time.as_secs_f64().max(1e-9);
        let rate = row.requests as f64 / seconds;
        text += &format!(
            "{:<24} {:<12} {:>10} {:>12.0} {:>12.1} {:>10.1}\n",
            row.load.name,
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
    fn the_table_has_one_line_per_row_that_ran() {
        let row = |requests| Row {
            load: Load::ALL[0],
            replication: Replication::On,
            requests,
            time: Duration::from_secs(2),
        };
        let text = table(&[row(1000), row(0)]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("500") && text.contains("2000.0"), "{text}");
    }
}
