//! `fair`: what a well-behaved client notices of one that is greedy or stalled. What it does: `blkrepl_benches::fair`.
//!
//! `cargo run --release -p blkrepl-benches --bin fair -- --help`

use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::compare::PlaceArgs;
use blkrepl_benches::fair::{FairOptions, fair};
use blkrepl_benches::{exit_code, seconds};
use clap::Parser;

/// Measures a client with one request in flight alone, and beside one that misbehaves.
#[derive(Parser)]
struct Cli {
    /// Rounds of every case.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Measured seconds of each run.
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// MiB of the volume.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..1 << 20))]
    size: u64,
    #[command(flatten)]
    places: PlaceArgs,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = FairOptions {
        rounds: cli.rounds,
        time: cli.seconds,
        places: cli.places.places(),
        size: cli.size << 20,
    };
    exit_code("fair", fair(&options))
}
