//! One run of each kind of case.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, CpuMeter, Job, run};
use blkrepl_tests::proc;
use tempfile::NamedTempFile;

use crate::compare::{Cell, WARM_UP, median};
use crate::scale::bed::{Target, WRITES};

use super::ConnectionsOptions;
use super::cases::{Way, What, Where};
use super::idle::Ticks;

/// The other load works alone for so long before and after the one that is measured.
const MARGIN: Duration = Duration::from_millis(300);
/// Longest time of one copy.
const COPY_LIMIT: Duration = Duration::from_secs(600);
/// Bytes of a request of nbdcopy; its own default, named so that requests can be counted.
const COPY_REQUEST: u64 = 256 << 10;

/// One run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// CPU is per operation of all loads together. A copy has no latencies: they are not a number.
    pub(super) cell: Cell,
    /// Operations per second of the other load, if there is one.
    pub(super) other_iops: Option<f64>,
    /// Percent of all processor time in which nothing ran, warm-up included.
    pub(super) idle: Option<f64>,
}

impl Sample {
    /// Figure by figure; `None` of no runs.
    pub(super) fn median(runs: &[Self]) -> Option<Self> {
        let cells: Vec<Cell> = runs.iter().map(|run| run.cell).collect();
        Some(Self {
            cell: Cell::median(&cells)?,
            other_iops: median(runs.iter().filter_map(|run| run.other_iops).collect()),
            idle: median(runs.iter().filter_map(|run| run.idle).collect()),
        })
    }
}

/// Two volumes, and what is done to them.
pub(super) struct Stage {
    first: Target,
    second: Target,
    size: u64,
    time: Duration,
    /// What nbdcopy copies in, if anything is: nothing in it is zero, so nothing of it is left out.
    source: Option<NamedTempFile>,
}

impl Stage {
    pub(super) fn new(first: Target, second: Target, options: &ConnectionsOptions) -> Self {
        Self { first, second, size: options.size, time: options.time, source: None }
    }

    /// Makes the file that is copied in.
    pub(super) fn with_source(self, dir: &Path) -> Result<Self> {
        let source = source(dir, self.size)?;
        Ok(Self { source: Some(source), ..self })
    }

    pub(super) fn run(&self, what: What) -> Result<Sample> {
        let then = Ticks::now()?;
        let (cell, other_iops) = match what {
            What::Load { job, connections, depth } => (Cell::of(&self.load(job, connections, depth)?), None),
            What::Copy { way, connections } => (self.copy(way, connections)?, None),
            What::Beside { depth, other, other_depth } => return self.beside(depth, other, other_depth),
        };
        Ok(Sample { cell, other_iops, idle: Ticks::now()?.idle_since(then) })
    }

    fn load(&self, job: Job, connections: usize, depth: usize) -> Result<BenchReport> {
        let options = self.first.options(job, depth, self.time);
        Ok(run(&self.first.uri, &BenchOptions { connections, warm_up: WARM_UP, ..options })?)
    }

    fn beside(&self, depth: usize, other: Where, other_depth: usize) -> Result<Sample> {
        let target = match other {
            Where::Second => &self.second,
            Where::Same => &self.first,
        };
        let lasting = self.time + WARM_UP + MARGIN;
        // The CPU time of the servers is counted by the load that is measured, for both.
        let options = BenchOptions {
            warm_up: MARGIN,
            seed: 2,
            pids: Vec::new(),
            ..target.options(WRITES, other_depth, lasting)
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| run(&target.uri, &options));
            std::thread::sleep(MARGIN);
            let then = Ticks::now()?;
            let report = self.load(WRITES, 1, depth);
            let idle = Ticks::now()?.idle_since(then);
            let has_ended = other.is_finished();
            let other =
                other.join().map_err(|_| anyhow!("the other load panicked"))?.context("the other load")?;
            let report = report?;
            ensure!(!has_ended, "the other load ended before the one that is measured");
            Ok(together(&report, &other, idle))
        })
    }

    fn copy(&self, way: Way, connections: usize) -> Result<Cell> {
        let uri = self.first.uri.to_string();
        let mut command = Command::new("nbdcopy");
        // Without as many threads it would make fewer connections.
        command.arg(format!("--connections={connections}")).arg(format!("--threads={connections}"));
        command.arg(format!("--request-size={COPY_REQUEST}"));
        match way {
            Way::In => {
                let source = self.source.as_ref().context("there is no file to copy in")?;
                command.arg("--flush").arg(source.path()).arg(uri)
            }
            Way::Out => command.arg(uri).arg("null:"),
        };
        let meter = CpuMeter::new(self.first.pids())?;
        let before = meter.sample()?;
        let began = Instant::now();
        proc::run(&mut command, COPY_LIMIT)?.ok()?;
        let time = began.elapsed().as_secs_f64();
        let requests = self.size as f64 / COPY_REQUEST as f64;
        Ok(Cell {
            iops: requests / time,
            mb_per_s: self.size as f64 / 1e6 / time,
            p50_us: f64::NAN,
            p99_us: f64::NAN,
            cpu_us: Some(meter.sample()?.since(&before).as_secs_f64() * 1e6 / requests),
        })
    }
}

/// The load that is measured, with CPU time per operation of both.
fn together(report: &BenchReport, other: &BenchReport, idle: Option<f64>) -> Sample {
    let cell = Cell::of(report);
    let other_iops = other.iops();
    let share = cell.iops / (cell.iops + other_iops);
    let cpu_us = cell.cpu_us.map(|cpu| cpu * share);
    Sample { cell: Cell { cpu_us, ..cell }, other_iops: Some(other_iops), idle }
}

/// A file of random content.
fn source(dir: &Path, size: u64) -> Result<NamedTempFile> {
    let make = || {
        let mut file = tempfile::Builder::new().prefix("blkrepl-connections-").tempfile_in(dir)?;
        let mut random = std::fs::File::open("/dev/urandom")?.take(size);
        std::io::copy(&mut random, &mut file)?;
        file.flush()?;
        Ok::<_, std::io::Error>(file)
    };
    make().with_context(|| format!("write {size} random bytes into {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(operations: u64) -> BenchReport {
        BenchReport {
            operations,
            reads: 0,
            time: Duration::from_secs(1),
            bytes: operations * 4096,
            area: 1 << 20,
            latency: Default::default(),
            read_latency: None,
            write_latency: None,
            server_cpu: Some(Duration::from_millis(4)),
        }
    }

    #[test]
    fn cpu_time_is_shared_by_all_operations() {
        let sample = together(&report(100), &report(300), Some(5.0));
        assert_eq!((sample.cell.cpu_us, sample.other_iops), (Some(10.0), Some(300.0)));
        let median = Sample::median(&[sample, Sample { other_iops: None, ..sample }]).unwrap();
        assert_eq!((median.other_iops, median.idle), (Some(300.0), Some(5.0)));
        assert_eq!(Sample::median(&[]), None);
    }

    #[test]
    fn a_source_has_its_size() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(source(dir.path(), 5000).unwrap().as_file().metadata().unwrap().len(), 5000);
        assert!(source(&dir.path().join("none"), 1).is_err());
    }
}
