//! `sim`: runs seeds of the simulator, replays one with its trace, compares, minimises.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blkrepl_sim::{FaultKind, FaultSet, OPS_DEFAULT, Options, Outcome, Scenario, Stats, run, run_lockstep};
use clap::Parser;

/// A seeded simulator of a whole blkrepl cluster.
#[derive(Debug, Parser)]
struct Cli {
    /// Replay this seed with a readable trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// With the control plane of production (real Raft) instead of a model of it.
    #[arg(long)]
    lockstep: bool,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Client operations per run.
    #[arg(long, default_value_t = OPS_DEFAULT)]
    ops: u32,
    /// Only these kinds of faults (`none`: none at all).
    #[arg(long, value_delimiter = ',')]
    faults: Option<Vec<String>>,
}

impl Cli {
    fn run(&self, seed: u64, options: &Options) -> Outcome {
        if self.lockstep { run_lockstep(seed, options) } else { run(seed, options) }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut options = Options { ops: cli.ops, ..Options::default() };
    if let Some(names) = &cli.faults {
        let kinds: Vec<FaultKind> =
            FaultKind::ALL.iter().copied().filter(|k| names.iter().any(|n| n == k.name())).collect();
        options.faults = FaultSet::of(&kinds);
    }
    if let Some(seed) = cli.seed {
        options.trace = true;
        let outcome = cli.run(seed, &options);
        print!("{}", outcome.trace);
        println!("hash {:016x}", outcome.hash);
        println!("{:?}", outcome.stats);
        if let Some(v) = &outcome.violation {
            println!("VIOLATION of {} at {} ns: {}", v.invariant, v.at, v.text);
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    many(&cli, &options)
}

fn many(cli: &Cli, options: &Options) -> ExitCode {
    let count = cli.seeds.unwrap_or(1);
    let started = Instant::now();
    let next = AtomicU64::new(cli.first);
    let totals = Mutex::new((Stats::default(), BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..cli.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= cli.first + count {
                        return;
                    }
                    let outcome = cli.run(seed, options);
                    let mut totals = totals.lock().expect("no thread panics while it holds this");
                    totals.0.add(&outcome.stats);
                    if let Some(v) = outcome.violation {
                        println!(
                            "seed {seed}: {}: {}",
                            v.invariant,
                            v.text.chars().take(600).collect::<String>()
                        );
                        totals.1.insert(seed, v.invariant);
                    }
                }
            });
        }
    });
    let (stats, failed) = totals.into_inner().expect("no thread panicked");
    println!(
        "{count} runs in {:.1} s, {:.2} simulated hours",
        started.elapsed().as_secs_f64(),
        stats.simulated as f64 / 3.6e12
    );
    println!("{stats:#?}");
    for seed in failed.keys().take(5) {
        println!("replay: {}", Scenario { seed: *seed, options: options.clone() });
    }
    println!("{} failed", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
