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
//! place     where the files lie
//! quiet     processors kept from idling
//! enters    io_uring_enter calls per write, with perf
//! resync    the speed of a resync, and what clients notice of it (a program of its own)
//! table     medians, ratios, text and JSON
//! ```

mod enters;
mod jobs;
mod own;
mod peers;
mod place;
mod quiet;
mod resync;
mod subject;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_nbd::NbdUri;
use blkrepl_nbd::bench::{BenchOptions, BenchReport, Job, Pattern, run};
use tempfile::TempDir;

use jobs::{JOBS, NamedJob};
use subject::Subject;
use table::PlaceResults;

pub use place::{Place, PlaceArgs};
pub use resync::{ResyncOptions, resync};

pub(crate) use quiet::Quiet;
pub(crate) use table::{Cell, SPREAD_MAX, median, ratio, shown, spread};

/// Load before a measurement begins.
pub(crate) const WARM_UP: Duration = Duration::from_millis(300);
/// Longest time for writing all of a server's area once.
const FILL_LIMIT: Duration = Duration::from_secs(600);
/// Copies of the area that all servers of a place take together.
const COPIES: u64 = 20;

/// How clients reach the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Unix sockets.
    Unix,
    /// TCP on loopback.
    Tcp,
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
    /// Where, each with a directory there.
    pub places: Vec<(Place, PathBuf)>,
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
    let quiet = Quiet::start();
    println!("{}", quiet.text());
    println!("peers here: {}", peers::versions().join("; "));
    let mut results = Vec::new();
    for (place, base) in &options.places {
        let measured = measure_place(*place, base, options);
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

fn measure_place(place: Place, base: &Path, options: &CompareOptions) -> Result<PlaceResults> {
    place.check(base, COPIES * options.size)?;
    let dir = tempfile::Builder::new().prefix("blkrepl-compare-").tempdir_in(base)?;
    let jobs = chosen_jobs(&options.only);
    let mut subjects = start_all(&dir, options);
    ensure!(!subjects.is_empty(), "no server could be started");
    println!("writing the area of each server once");
    subjects.retain_mut(|subject| match fill(&subject.uri, options.size) {
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
                place.settle(dir.path());
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
    crate::is_chosen(name, &words)
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
    let own: Vec<_> = own::BLKREPL_NAMES.into_iter().filter(|name| wanted(name)).collect();
    if !own.is_empty() {
        match own::start_blkrepl(dir.path(), options, &own) {
            Ok(started) => started.into_iter().for_each(|subject| keep(subject.name, Ok(subject))),
            Err(reason) => println!("SKIPPED blkrepl: {reason:#}"),
        }
    }
    for name in peers::NAMES.into_iter().filter(|name| wanted(name)) {
        keep(name, peers::start(name, dir.path(), options));
    }
    subjects
}

/// Writes everything once, so that no space is allocated later and no block is read that was never written.
pub(crate) fn fill(uri: &NbdUri, size: u64) -> Result<()> {
    run(uri, &sequential(FILL_LIMIT, Some(size >> 20))).context("write the area")?;
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
