//! How fast a replica that was away gets what it lacks, beside the floor's sequential writes, and what clients
//! notice of it.
//!
//! Per round, on one cluster of two data nodes and a witness: the floor writes 1 MiB after 1 MiB, four in flight.
//! Then the secondary is stopped, the whole volume is written, and it is started again, once with idle clients, and
//! once under each load. The speed of a resync is what was moved between its two events. Under a load, runs of it
//! follow each other until the replica is in sync; before, the same load was measured with both in sync.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, Job, Pattern, run};
use blkrepl_nbd::{ClientOptions, NbdClient, NbdUri};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions};

use super::quiet::Quiet;
use super::subject::EXPORT;
use super::{CompareOptions, Place, Transport, fill, own};

/// One run of a load during a resync.
const SLICE: Duration = Duration::from_millis(100);
/// A resync under load that takes longer has not ended.
const LOADED_LIMIT: Duration = Duration::from_secs(60);
const PRIMARY: &str = "n1";
const SECONDARY: &str = "n2";

/// What to measure.
#[derive(Clone, Debug)]
pub struct ResyncOptions {
    /// Where the files lie.
    pub place: Place,
    /// A directory there.
    pub dir: PathBuf,
    /// Bytes of the volume.
    pub size: u64,
    /// Rounds.
    pub rounds: u8,
    /// Time of each measurement that is not of a resync.
    pub time: Duration,
}

/// Figures of one round, in megabytes (10^6) per second.
struct Round {
    floor: f64,
    idle: f64,
    loads: Vec<Loaded>,
}

/// A load, and a resync under it.
struct Loaded {
    /// With both in sync.
    before: Figures,
    /// While one was being resynced.
    during: Figures,
    /// Megabytes per second that the resync moved; `None`: it did not end in time.
    speed: Option<f64>,
}

#[derive(Clone, Copy)]
struct Figures {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
}

impl Figures {
    fn of(report: &BenchReport) -> Self {
        let micros = |ns: u64| ns as f64 / 1000.0;
        Self {
            iops: report.iops(),
            p50_us: micros(report.latency.p50_ns),
            p99_us: micros(report.latency.p99_ns),
        }
    }

    fn median(all: &[Self]) -> Self {
        Self {
            iops: median(all.iter().map(|f| f.iops)),
            p50_us: median(all.iter().map(|f| f.p50_us)),
            p99_us: median(all.iter().map(|f| f.p99_us)),
        }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:8.0} IOPS, p50 {:8.1} us, p99 {:8.1} us", self.iops, self.p50_us, self.p99_us)
    }
}

/// Loads of clients during a resync: 4 KiB writes at random places, so many in flight.
const LOADS: [usize; 2] = [1, 32];

/// Measures and prints.
///
/// # Errors
/// If a server does not start, or a resync with idle clients does not end.
pub fn resync(options: &ResyncOptions) -> Result<()> {
    let quiet = Quiet::start();
    println!("{}", quiet.text());
    let dir = tempfile::Builder::new().prefix("blkrepl-resync-").tempdir_in(&options.dir)?;
    let servers = CompareOptions {
        rounds: 1,
        time: options.time,
        only: Vec::new(),
        places: vec![options.place],
        disk_dir: options.dir.clone(),
        tmpfs_dir: options.dir.clone(),
        size: options.size,
        transport: Transport::Unix,
        json: None,
    };
    let mut floor = own::start_floor("floor", dir.path(), &servers)?;
    fill(&floor, options.size)?;
    let base = dir.path().join("cluster");
    std::fs::create_dir(&base)?;
    let mut bed = Bed::start(ClusterOptions {
        create_volume: false,
        base: Some(base),
        ..ClusterOptions::by_hand(options.size, 2)
    })?;
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        println!("{}: round {number} of {}", options.place.word(), options.rounds);
        let written = run(&floor.uri, &sequential(options.time, None))?;
        let idle = bed.idle_resync()?;
        let mut loads = Vec::new();
        for depth in LOADS {
            loads.push(bed.loaded_resync(depth, options.time)?);
        }
        rounds.push(Round { floor: written.megabytes_per_second(), idle, loads });
    }
    print(options.place, &rounds);
    bed.cluster.stop()?;
    floor.stop()
}

fn sequential(time: Duration, count: Option<u64>) -> BenchOptions {
    let job = Job { pattern: Pattern::Sequential, read_percent: 0, block_size: 1 << 20, ..Job::default() };
    BenchOptions { warm_up: Duration::ZERO, time, count, destroys_data: true, ..BenchOptions::new(job, 4) }
}

/// A cluster whose secondary goes and comes back.
struct Bed {
    cluster: Cluster,
    uri: NbdUri,
    /// Of the content written last: a block that is equal does not travel.
    seed: u64,
}

impl Bed {
    fn start(options: ClusterOptions) -> Result<Self> {
        let size = options.size;
        let cluster = Cluster::start(options)?;
        cluster.create_volume(EXPORT, size, &[PRIMARY, SECONDARY])?;
        let uri: NbdUri = cluster.node(PRIMARY)?.unix()?.parse()?;
        let mut bed = Self { seed: 0, cluster, uri: NbdUri { export: EXPORT.to_owned(), ..uri } };
        bed.wait_in_sync()?;
        bed.write_all()?;
        Ok(bed)
    }

    fn wait_in_sync(&self) -> Result<()> {
        self.cluster.wait_volumes_in_sync(PRIMARY, &[EXPORT], SYNC_LIMIT)
    }

    fn state(&self) -> Result<String> {
        Ok(self.cluster.status_of(PRIMARY)?.volume(EXPORT)?.replica(SECONDARY)?.state.clone())
    }

    /// A node that stops may have led the control plane: then nobody serves until another one leads.
    fn wait_served(&self) -> Result<()> {
        wait_for("the volume to be served", SYNC_LIMIT, || {
            Ok(NbdClient::connect(&self.uri, ClientOptions::default())?.disconnect()?)
        })
    }

    fn write_all(&mut self) -> Result<()> {
        self.wait_served()?;
        self.seed += 1;
        let options =
            BenchOptions { seed: self.seed, ..sequential(SYNC_LIMIT, Some(self.cluster.size() >> 20)) };
        run(&self.uri, &options).context("write it all")?;
        Ok(())
    }

    /// Leaves the secondary behind in every block, and starts it again.
    fn leave_behind(&mut self) -> Result<()> {
        self.cluster.stop_node(SECONDARY)?;
        self.cluster.wait_removed(PRIMARY, &[EXPORT], SECONDARY, SYNC_LIMIT)?;
        self.write_all()?;
        // What the intent map names would be compared before it is copied.
        wait_for("the intent map to be empty", SYNC_LIMIT, || {
            let status = self.cluster.status_of(PRIMARY)?;
            let regions =
                status.volume(EXPORT)?.replica(PRIMARY)?.more.get("intent_regions").and_then(|n| n.as_u64());
            let regions = regions.context("a status without the number of set regions")?;
            ensure!(regions == 0, "{regions} regions are set");
            Ok(())
        })?;
        self.cluster.restart(SECONDARY)
    }

    /// Megabytes (10^6) per second of the last resync.
    fn speed(&self) -> Result<f64> {
        let events = self.cluster.events(PRIMARY)?;
        let last = |kind: &str| {
            let found = events.iter().rev().find(|e| e["kind"] == kind);
            found.ok_or_else(|| anyhow!("{PRIMARY} has no event {kind}"))
        };
        let (start, end) = (last("resync_started")?, last("resync_finished")?);
        let at = |event: &serde_json::Value| event["time_ms"].as_u64().context("an event without a time");
        let moved = end["data"]["moved_bytes"].as_u64().context("an event without its bytes")?;
        let millis = at(end)?.checked_sub(at(start)?).context("the last resync has not ended")?;
        Ok(moved as f64 / 1000.0 / millis.max(1) as f64)
    }

    fn idle_resync(&mut self) -> Result<f64> {
        self.leave_behind()?;
        self.wait_in_sync()?;
        self.speed()
    }

    fn loaded_resync(&mut self, depth: usize, time: Duration) -> Result<Loaded> {
        let before = self.load(depth, time)?;
        self.leave_behind()?;
        wait_for("the resync to begin", SYNC_LIMIT, || {
            ensure!(self.state()? != "disconnected", "{SECONDARY} is not back");
            Ok(())
        })?;
        let mut slices = Vec::new();
        let began = Instant::now();
        let mut ended = false;
        while !ended && began.elapsed() < LOADED_LIMIT {
            slices.push(self.load(depth, SLICE)?);
            ended = self.state()? == "in_sync";
        }
        self.wait_in_sync()?;
        let speed = if ended { Some(self.speed()?) } else { None };
        Ok(Loaded { before, during: Figures::median(&slices), speed })
    }

    fn load(&self, depth: usize, time: Duration) -> Result<Figures> {
        self.wait_served()?;
        let job = Job { pattern: Pattern::Random, read_percent: 0, block_size: 4096, ..Job::default() };
        let options = BenchOptions {
            warm_up: Duration::ZERO,
            time,
            destroys_data: true,
            ..BenchOptions::new(job, depth)
        };
        Ok(Figures::of(&run(&self.uri, &options)?))
    }
}

fn print(place: Place, rounds: &[Round]) {
    let floor = median(rounds.iter().map(|r| r.floor));
    let idle = median(rounds.iter().map(|r| r.idle));
    println!("\n{}: medians of {} rounds", place.word(), rounds.len());
    println!("floor, 1 MiB sequential writes, 4 in flight {floor:9.1} MB/s");
    println!("resync, clients idle                        {idle:9.1} MB/s, {:.2} x floor", idle / floor);
    for (number, depth) in LOADS.into_iter().enumerate() {
        let of = |pick: fn(&Loaded) -> Figures| {
            Figures::median(&rounds.iter().map(|r| pick(&r.loads[number])).collect::<Vec<_>>())
        };
        let (before, during) = (of(|l| l.before), of(|l| l.during));
        let ended: Vec<f64> = rounds.iter().filter_map(|r| r.loads[number].speed).collect();
        println!("4 KiB random writes, {depth} in flight, in sync:      {before}");
        println!("4 KiB random writes, {depth} in flight, in a resync:  {during}");
        println!(
            "  the resync ended in {} of {} rounds, {:.1} MB/s, {:.2} x floor",
            ended.len(),
            rounds.len(),
            median(ended.iter().copied()),
            median(ended.iter().copied()) / floor
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
