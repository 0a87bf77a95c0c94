//! `sim-control`: runs seeds of the control plane alone (real Raft, no block data), replays one with its trace.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blkrepl_sim::lockstep::control::{ControlStats, run};
use clap::Parser;

/// The production control plane in simulated time, under faults.
#[derive(Debug, Parser)]
struct Cli {
    /// Replay this seed with a readable trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print the trace hash of each seed.
    #[arg(long)]
    hashes: bool,
}

#[derive(Default)]
struct Totals {
    sum: ControlStats,
    hashes: BTreeMap<u64, u64>,
    failed: BTreeMap<u64, String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let Some(seed) = cli.seed else { return many(&cli) };
    let mut trace = String::new();
    let result = run(seed, Some(&mut trace));
    print!("{trace}");
    match result {
        Ok(stats) => println!("{stats:#?}"),
        Err(v) => {
            println!("seed {seed}: VIOLATION of {} at {} ns: {}", v.what, v.at, v.text);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn many(cli: &Cli) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(cli.first);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..cli.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= cli.first + cli.seeds {
                        return;
                    }
                    let result = run(seed, None);
                    let mut totals = totals.lock().expect("no thread panics while it holds this");
                    match result {
                        Ok(stats) => {
                            totals.hashes.insert(seed, stats.hash);
                            totals.sum.add(&stats);
                        }
                        Err(v) => {
                            let text: String = v.text.chars().take(600).collect();
                            totals.failed.insert(seed, format!("{} at {} ns: {text}", v.what, v.at));
                        }
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().expect("no thread panicked");
    for (seed, why) in &totals.failed {
        println!("seed {seed}: VIOLATION of {why}");
        println!("replay: cargo run --bin sim-control -- --seed {seed}");
    }
    if cli.hashes {
        totals.hashes.iter().for_each(|(seed, hash)| println!("{seed} {hash:016x}"));
    } else {
        let hours = totals.sum.simulated as f64 / 3.6e12;
        println!("{} runs in {:.1} s, {hours:.2} simulated hours", cli.seeds, began.elapsed().as_secs_f64());
        println!("{:#?}", totals.sum);
    }
    println!("{} failed", totals.failed.len());
    if totals.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
