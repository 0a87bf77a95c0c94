//! `compare`: blkrepl beside the floor and beside the servers that Debian packages, under the same loads.
//!
//! All servers of a place (disk, tmpfs) run at the same time, each on preallocated files of its own, all of one
//! size, and are idle but for the one under load. Jobs are interleaved: job by job, all servers in turn, for
//! several rounds, so that what else the machine does falls on all of them alike. Figures are medians of the
//! rounds. It asserts nothing.
//!
//! ```text
//! jobs      the loads
//! subject   a server under test: address, processes
//! own       the floor and blkrepl
//! peers     the others
//! quiet     processors kept from idling
//! enters    io_uring_enter calls per write, with perf
//! resync    the speed of a resync, and what clients notice of it (a program of its own)
//! table     medians, ratios, text and JSON
//! ```

mod enters;
mod jobs;
mod own;
mod peers;
mod quiet;
mod resync;
mod subject;
mod table;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, Job, Pattern, run};
use tempfile::TempDir;

use jobs::{JOBS, NamedJob};
use subject::Subject;
use table::{Cell, PlaceResults};

pub use resync::{ResyncOptions, resync};

/// Load before a measurement begins.
const WARM_UP: Duration = Duration::from_millis(300);
/// Longest time for writing all of a server's area once.
const FILL_LIMIT: Duration = Duration::from_secs(600);
/// Copies of the area that all servers of a place take together.
const COPIES: u64 = 16;

/// How clients reach the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Unix sockets.
    Unix,
    /// TCP on loopback.
    Tcp,
}

/// Where the files lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A real disk: what users get.
    Disk,
    /// Memory: what the program itself costs.
    Tmpfs,
}

impl Place {
    fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Tmpfs => "tmpfs",
        }
    }
}

/// What `compare` is to do.
#[derive(Clone, Debug)]
pub struct CompareOptions {
    /// Rounds of every job.
    pub rounds: usize,
    /// Measured time of each.
    pub time: Duration,
    /// Only servers and jobs whose name contains one of these; all if there are none.
    pub only: Vec<String>,
    /// Where.
    pub places: Vec<Place>,
    /// A directory on a disk.
    pub disk_dir: PathBuf,
    /// A directory on a tmpfs.
    pub tmpfs_dir: PathBuf,
    /// Bytes of each export.
    pub size: u64,
    /// How clients reach the servers.
    pub transport: Transport,
    /// File for the figures as JSON.
    pub json: Option<PathBuf>,
}

/// Measures, printing what it does and the tables.
///
/// # Errors
/// If no server can be measured, or the results cannot be written. A server that fails is left out.
pub fn compare(options: &CompareOptions) -> Result<()> {
    let quiet = quiet::Quiet::start();
    println!("{}", quiet.text());
    let mut results = Vec::new();
    for place in &options.places {
        let measured = measure_place(*place, options);
        match measured {
            Ok(measured) => {
                println!("\n{}", table::text(&measured));
                results.push(measured);
            }
            Err(reason) => println!("SKIPPED {}: {reason:#}", place.word()),
        }
    }
    ensure!(!results.is_empty(), "nothing could be measured");
    if let Some(path) = &options.json {
        let value = table::json(&results, quiet.text(), options);
        let text = serde_json::to_string_pretty(&value)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        println!("figures are in {}", path.display());
    }
    Ok(())
}

fn measure_place(place: Place, options: &CompareOptions) -> Result<PlaceResults> {
    let base = match place {
        Place::Disk => &options.disk_dir,
        Place::Tmpfs => &options.tmpfs_dir,
    };
    check_base(place, base, options.size)?;
    let dir = tempfile::Builder::new().prefix("blkrepl-compare-").tempdir_in(base)?;
    let jobs = chosen_jobs(&options.only);
    let mut subjects = start_all(&dir, options);
    ensure!(!subjects.is_empty(), "no server could be started");
    println!("writing the area of each server once");
    subjects.retain_mut(|subject| match fill(subject, options.size) {
        Ok(()) => true,
        Err(reason) => {
            println!("SKIPPED {}: {reason:#}", subject.name);
            false
        }
    });
    let mut results = PlaceResults::new(place.word(), &subjects, &jobs);
    for round in 1..=options.rounds {
        for (row, job) in jobs.iter().enumerate() {
            println!("{}: round {round} of {}: {}", place.word(), options.rounds, job.name);
            for (column, subject) in subjects.iter().enumerate() {
                match run_once(subject, job, options.time) {
                    Ok(report) => results.add(row, column, Cell::of(&report)),
                    Err(reason) => println!("  {} failed: {reason:#}", subject.name),
                }
                settle(place, dir.path());
            }
        }
    }
    for subject in subjects.iter().filter(|subject| subject.primary.is_some()) {
        match enters::per_write(subject) {
            Ok(calls) => results.enters.push((subject.name, calls)),
            Err(reason) => println!("io_uring_enter calls of {} are not counted: {reason:#}", subject.name),
        }
    }
    for subject in &mut subjects {
        if let Err(reason) = subject.stop() {
            println!("{} did not stop well: {reason:#}", subject.name);
        }
    }
    Ok(results)
}

fn chosen_jobs(only: &[String]) -> Vec<NamedJob> {
    let named: Vec<NamedJob> =
        JOBS.into_iter().filter(|job| only.iter().any(|word| job.name.contains(word.as_str()))).collect();
    if named.is_empty() { JOBS.to_vec() } else { named }
}

/// Servers whose name one of the words is part of; all if the words name jobs only.
fn is_wanted(name: &str, only: &[String]) -> bool {
    let names_servers = |word: &&String| subject::names().any(|known| known.contains(word.as_str()));
    let words: Vec<&String> = only.iter().filter(names_servers).collect();
    words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
}

fn start_all(dir: &TempDir, options: &CompareOptions) -> Vec<Subject> {
    let wanted = |name: &str| is_wanted(name, &options.only);
    let mut subjects = Vec::new();
    let mut keep = |name: &str, started: Result<Subject>| match started {
        Ok(subject) => {
            println!("started {name}");
            subjects.push(subject);
        }
        Err(reason) => println!("SKIPPED {name}: {reason:#}"),
    };
    for name in own::FLOOR_NAMES.into_iter().filter(|name| wanted(name)) {
        keep(name, own::start_floor(name, dir.path(), options));
    }
    if own::BLKREPL_NAMES.into_iter().any(wanted) {
        match own::start_blkrepl(dir.path(), options) {
            Ok(started) => {
                for subject in started.into_iter().filter(|subject| wanted(subject.name)) {
                    keep(subject.name, Ok(subject));
                }
            }
            Err(reason) => println!("SKIPPED blkrepl: {reason:#}"),
        }
    }
    for name in peers::NAMES.into_iter().filter(|name| wanted(name)) {
        keep(name, peers::start(name, dir.path(), options));
    }
    subjects
}

/// The directory is what the place says, and has room.
fn check_base(place: Place, base: &Path, size: u64) -> Result<()> {
    let stat = rustix::fs::statfs(base).with_context(|| format!("look at {}", base.display()))?;
    let is_tmpfs = stat.f_type == libc::TMPFS_MAGIC;
    if is_tmpfs != (place == Place::Tmpfs) {
        let is = if is_tmpfs { "is" } else { "is not" };
        bail!("{} {is} a tmpfs; name another with --{}-dir", base.display(), place.word());
    }
    let room = stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize)?);
    ensure!(room >= COPIES * size, "{} has {room} bytes left, {} are needed", base.display(), COPIES * size);
    Ok(())
}

/// Writes everything once, so that no space is allocated later and no block is read that was never written.
fn fill(subject: &Subject, size: u64) -> Result<()> {
    run(&subject.uri, &sequential(FILL_LIMIT, Some(size >> 20))).context("write the area")?;
    Ok(())
}

/// 1 MiB after 1 MiB, 4 in flight.
fn sequential(time: Duration, count: Option<u64>) -> BenchOptions {
    let job = Job { pattern: Pattern::Sequential, read_percent: 0, block_size: 1 << 20, ..Job::default() };
    BenchOptions { warm_up: Duration::ZERO, time, count, destroys_data: true, ..BenchOptions::new(job, 4) }
}

fn run_once(subject: &Subject, job: &NamedJob, time: Duration) -> Result<BenchReport> {
    let options = BenchOptions {
        warm_up: WARM_UP,
        time,
        pids: subject.pids.clone(),
        destroys_data: true,
        ..BenchOptions::new(job.job, job.depth)
    };
    Ok(run(&subject.uri, &options)?)
}

/// What a server left in the page cache is not to be written out during the next one's measurement.
fn settle(place: Place, dir: &Path) {
    if place == Place::Disk
        && let Ok(dir) = File::open(dir)
    {
        // Only costs noise if it fails.
        let _ = rustix::fs::syncfs(dir);
    }
}
