//! `sim`: runs seeds of the simulator, replays one with its trace, prints hashes, minimises a failing one.
//!
//! Exit code 1 if a promise was broken; the first failing seeds and how to replay them are printed last.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use blkrepl_sim::{
    COVERAGE_KNOWN, FaultKind, FaultSet, OPS_DEFAULT, Options, Outcome, Scenario, Stats, minimise, run,
    run_lockstep,
};
use clap::Parser;

/// What runs a seed.
type Runs = fn(u64, &Options) -> Outcome;

/// Most characters of a violation that are printed in a list.
const TEXT_MAX: usize = 400;

/// A seeded simulator of a whole blkrepl cluster.
#[derive(Debug, Parser)]
struct Cli {
    /// Replay this seed with a readable trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Replay a scenario (`"seed=5 ops=200 skip=3"`) with a readable trace.
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Run this many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// With the control plane of production (real Raft) instead of a model of it; not with --kept and
    /// --minimise.
    #[arg(long, conflicts_with_all = ["kept", "minimise"])]
    lockstep: bool,
    /// Threads; one per processor unless told otherwise.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the trace hashes of this many seeds.
    #[arg(long)]
    hashes: Option<u64>,
    /// Find a small scenario that fails as this seed does.
    #[arg(long)]
    minimise: Option<u64>,
    /// Run every scenario kept in this directory.
    #[arg(long)]
    kept: Option<PathBuf>,
    /// Client operations per run.
    #[arg(long, default_value_t = OPS_DEFAULT)]
    ops: u32,
    /// Data nodes, 2 or 3; drawn from the seed unless given.
    #[arg(long)]
    nodes: Option<u8>,
    /// Only these kinds of faults (`none`: no faults).
    #[arg(long, value_delimiter = ',')]
    faults: Option<Vec<String>>,
    /// Kinds that strike in every run.
    #[arg(long, value_delimiter = ',')]
    always: Option<Vec<String>>,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let runs: Runs = if cli.lockstep { run_lockstep } else { run };
    let mut options = Options { ops: cli.ops, data_nodes: cli.nodes, ..Options::default() };
    if let Some(names) = &cli.faults {
        options.faults = kinds(names)?;
    }
    if let Some(names) = &cli.always {
        options.always = kinds(names)?;
    }
    if let Some(scenario) = cli.scenario {
        return Ok(replay(runs, scenario));
    }
    if let Some(seed) = cli.seed {
        return Ok(replay(runs, Scenario { seed, options }));
    }
    if let Some(seed) = cli.minimise {
        return Ok(smallest(&Scenario { seed, options }));
    }
    if let Some(dir) = cli.kept {
        return kept(&dir);
    }
    if let Some(count) = cli.hashes {
        for seed in cli.first..cli.first + count {
            println!("{seed} {:016x}", runs(seed, &options).hash);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let jobs = cli.jobs.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    Ok(many(runs, cli.first, cli.seeds.unwrap_or(100), jobs, &options))
}

fn kinds(names: &[String]) -> anyhow::Result<FaultSet> {
    let mut found = Vec::new();
    for name in names.iter().filter(|name| *name != "none") {
        match FaultKind::ALL.iter().find(|kind| kind.name() == name) {
            Some(kind) => found.push(*kind),
            None => {
                let all: Vec<_> = FaultKind::ALL.iter().map(|kind| kind.name()).collect();
                bail!("no fault is called {name}; there are: {}", all.join(", "));
            }
        }
    }
    Ok(FaultSet::of(&found))
}

fn replay(runs: Runs, mut scenario: Scenario) -> ExitCode {
    scenario.options.trace = true;
    let outcome = runs(scenario.seed, &scenario.options);
    print!("{}", outcome.trace);
    print_end(&scenario, &outcome)
}

fn print_end(scenario: &Scenario, outcome: &Outcome) -> ExitCode {
    println!("{scenario}: {} events, hash {:016x}", outcome.stats.events, outcome.hash);
    match &outcome.violation {
        None => {
            println!("clean");
            ExitCode::SUCCESS
        }
        Some(v) => {
            println!("BROKEN at {} ns: invariant {}: {}", v.at, v.invariant, v.text);
            ExitCode::FAILURE
        }
    }
}

fn smallest(scenario: &Scenario) -> ExitCode {
    let Some((small, outcome)) = minimise(scenario) else {
        println!("{scenario}: clean");
        return ExitCode::SUCCESS;
    };
    for (number, at, kind, took) in &outcome.strikes {
        let left_out = small.options.skip.contains(number) || *number >= small.options.strikes_max;
        if !left_out && *took {
            println!("strike {number} at {} ms: {}", at / 1_000_000, kind.name());
        }
    }
    print_end(&small, &outcome)
}

/// Every line of every file is a scenario; what begins with `#` is a comment.
fn kept(dir: &std::path::Path) -> anyhow::Result<ExitCode> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let (mut clean, mut failed) = (0, 0);
    for file in files {
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for line in text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')) {
            let scenario: Scenario =
                line.parse().map_err(|e| anyhow::anyhow!("{}: {line}: {e}", file.display()))?;
            match run(scenario.seed, &scenario.options).violation {
                None => clean += 1,
                Some(v) => {
                    println!("{}: {scenario}: invariant {}: {}", file.display(), v.invariant, short(&v.text));
                    failed += 1;
                }
            }
        }
    }
    println!("{clean} kept scenarios are clean, {failed} are not");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn short(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

fn many(runs: Runs, first: u64, count: u64, jobs: usize, options: &Options) -> ExitCode {
    let started = Instant::now();
    let next = AtomicU64::new(first);
    let totals = Mutex::new((Stats::default(), BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let outcome = runs(seed, options);
                    let mut totals = totals.lock().expect("no thread panics while it holds this");
                    totals.0.add(&outcome.stats);
                    if let Some(v) = outcome.violation {
                        println!("seed {seed}: invariant {}: {}", v.invariant, short(&v.text));
                        totals.1.insert(seed, v.invariant);
                    }
                }
            });
        }
    });
    let (stats, failed) = totals.into_inner().expect("no thread panicked");
    print_stats(count, started.elapsed().as_secs_f64(), &stats);
    for seed in failed.keys().take(10) {
        let scenario = Scenario { seed: *seed, options: options.clone() };
        println!("replay: cargo run --bin sim -- --scenario \"{scenario}\"");
    }
    println!("{} of {count} seeds failed", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_stats(runs: u64, seconds: f64, stats: &Stats) {
    let hours = std::time::Duration::from_nanos(stats.simulated).as_secs_f64() / 3600.0;
    println!("{runs} runs in {seconds:.1} s: {hours:.2} simulated hours, {} events", stats.events);
    println!(
        "client operations: {} answered ({} flushes), {} of unknown fate and done again",
        stats.answered, stats.flushes, stats.unknown
    );
    println!(
        "the promise ended for unflushed writes {} times; {} sectors read were excused as falsified by a disk",
        stats.promise_ends, stats.excused_reads
    );
    println!("faults that struck (and were held back, or met nothing):");
    for kind in FaultKind::ALL {
        let count = |of: &BTreeMap<FaultKind, u64>| of.get(kind).copied().unwrap_or(0);
        println!("  {:<22} {:>9} ({})", kind.name(), count(&stats.faults), count(&stats.held_back));
    }
    println!("transitions seen:");
    for (name, n) in &stats.coverage {
        println!("  {name:<32} {n:>9}");
    }
    let never: Vec<_> = COVERAGE_KNOWN.iter().filter(|name| !stats.coverage.contains_key(**name)).collect();
    println!("never seen: {never:?}");
}
