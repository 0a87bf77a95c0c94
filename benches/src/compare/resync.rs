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
use blkrepl_nbd::bench::{BenchOptions, run};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::wait::wait_for;

use super::quiet::Quiet;
use super::subject::EXPORT;
use super::table::{Cell, median};
use super::{CompareOptions, Place, Transport, fill, own, sequential};
use crate::scale::bed::{Bed, PRIMARY, Target, WRITES};

/// One run of a load during a resync.
const SLICE: Duration = Duration::from_millis(100);
/// A resync under load that takes longer has not ended.
const LOADED_LIMIT: Duration = Duration::from_secs(60);
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
    /// The volume's latency budget of resync.
    pub budget: Duration,
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
    before: Cell,
    /// While one was being resynced.
    during: Cell,
    /// Megabytes per second that the resync moved; `None`: it did not end in time.
    speed: Option<f64>,
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
        places: vec![(options.place, options.dir.clone())],
        size: options.size,
        transport: Transport::Unix,
        json: None,
    };
    let mut floor = own::start_floor("floor", dir.path(), &servers)?;
    fill(&floor.uri, options.size)?;
    let mut pair = Pair::start(options)?;
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        println!("{}: round {number} of {}", options.place.word(), options.rounds);
        let written = run(&floor.uri, &sequential(options.time, None))?;
        let idle = pair.idle_resync()?;
        let mut loads = Vec::new();
        for depth in LOADS {
            loads.push(pair.loaded_resync(depth, options.time)?);
        }
        rounds.push(Round { floor: written.megabytes_per_second(), idle, loads });
    }
    print(options, &rounds);
    pair.bed.stop()?;
    floor.stop()
}

/// Two replicas, of which the secondary goes and comes back.
struct Pair {
    bed: Bed,
    size: u64,
    /// Of the content written last: a block that is equal does not travel.
    seed: u64,
}

impl Pair {
    fn start(options: &ResyncOptions) -> Result<Self> {
        let bed = Bed::start(&options.dir, 2)?;
        bed.volume(EXPORT, options.size, &[PRIMARY, SECONDARY])?;
        let budget = options.budget.as_millis().to_string();
        bed.cluster.cli(PRIMARY, &["volume", "set", EXPORT, "--resync-latency", &budget])?.ok()?;
        let mut pair = Self { bed, size: options.size, seed: 0 };
        pair.write_all()?;
        Ok(pair)
    }

    fn wait_in_sync(&self) -> Result<()> {
        self.bed.cluster.wait_volumes_in_sync(PRIMARY, &[EXPORT], SYNC_LIMIT)
    }

    fn state(&self) -> Result<String> {
        Ok(self.bed.cluster.status_of(PRIMARY)?.volume(EXPORT)?.replica(SECONDARY)?.state.clone())
    }

    /// The volume, once it is served: a node that stops may have led the control plane, and then nobody serves until
    /// another one leads.
    fn target(&self) -> Result<Target> {
        self.bed.target(EXPORT, self.size)
    }

    fn write_all(&mut self) -> Result<()> {
        self.seed += 1;
        let options = BenchOptions { seed: self.seed, ..sequential(SYNC_LIMIT, Some(self.size >> 20)) };
        run(&self.target()?.uri, &options).context("write it all")?;
        Ok(())
    }

    /// Leaves the secondary behind in every block, and starts it again.
    fn leave_behind(&mut self) -> Result<()> {
        self.bed.lose(SECONDARY, &[EXPORT])?;
        self.write_all()?;
        // What the intent map names would be compared before it is copied.
        wait_for("the intent map to be empty", SYNC_LIMIT, || {
            let status = self.bed.cluster.status_of(PRIMARY)?;
            let regions =
                status.volume(EXPORT)?.replica(PRIMARY)?.more.get("intent_regions").and_then(|n| n.as_u64());
            let regions = regions.context("a status without the number of set regions")?;
            ensure!(regions == 0, "{regions} regions are set");
            Ok(())
        })?;
        self.bed.cluster.restart(SECONDARY)
    }

    /// Megabytes (10^6) per second of the last resync.
    fn speed(&self) -> Result<f64> {
        let events = self.bed.cluster.events(PRIMARY)?;
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
        let during = Cell::median(&slices).context("a resync was over before its load began")?;
        Ok(Loaded { before, during, speed })
    }

    fn load(&self, depth: usize, time: Duration) -> Result<Cell> {
        let target = self.target()?;
        let options = BenchOptions { warm_up: Duration::ZERO, ..target.options(WRITES, depth, time) };
        Ok(Cell::of(&run(&target.uri, &options)?))
    }
}

fn print(options: &ResyncOptions, rounds: &[Round]) {
    let of = |value: fn(&Round) -> f64| middle(rounds.iter().map(value));
    let (floor, idle) = (of(|r| r.floor), of(|r| r.idle));
    let (place, budget) = (options.place.word(), options.budget);
    println!("\n{place}: medians of {} rounds, latency budget {budget:?}", rounds.len());
    println!("floor, 1 MiB sequential writes, 4 in flight {floor:9.1} MB/s");
    println!("resync, clients idle                        {idle:9.1} MB/s, {:.2} x floor", idle / floor);
    for (number, depth) in LOADS.into_iter().enumerate() {
        let loads = || rounds.iter().map(|r| &r.loads[number]);
        for (when, cells) in [
            ("in sync", loads().map(|l| l.before).collect::<Vec<_>>()),
            ("in a resync", loads().map(|l| l.during).collect()),
        ] {
            let Some(Cell { iops, p50_us, p99_us, .. }) = Cell::median(&cells) else { continue };
            println!(
                "4 KiB random writes, {depth} in flight, {when:11} \
                 {iops:8.0} IOPS, p50 {p50_us:8.1} us, p99 {p99_us:8.1} us"
            );
        }
        let ended = loads().filter_map(|l| l.speed).count();
        let speed = middle(loads().filter_map(|l| l.speed));
        println!(
            "  the resync ended in {ended} of {} rounds, {speed:.1} MB/s, {:.2} x floor",
            rounds.len(),
            speed / floor
        );
    }
}

/// The median; not a number of none.
fn middle(values: impl Iterator<Item = f64>) -> f64 {
    median(values.collect()).unwrap_or(f64::NAN)
}
