//! `connections`: several connections to a volume, and two volumes at once. What it does:
//! `blkrepl_benches::connections`.
//!
//! `cargo run --release -p blkrepl-benches --bin connections -- --help`

use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::compare::PlaceArgs;
use blkrepl_benches::connections::{ConnectionsOptions, connections, parts};
use blkrepl_benches::{exit_code, seconds};
use clap::Parser;

/// Measures whether several connections to a volume gain, and what two volumes take from each other.
#[derive(Parser)]
struct Cli {
    /// Rounds of every case.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Only parts whose name contains this; may be repeated.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Measured seconds of each run.
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// MiB of each of the two volumes.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..1 << 20))]
    size: u64,
    #[command(flatten)]
    places: PlaceArgs,
    /// Print the names of the parts.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        parts().for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let options = ConnectionsOptions {
        rounds: cli.rounds,
        time: cli.seconds,
        only: cli.only,
        places: cli.places.places(),
        memory_dir: cli.places.tmpfs_dir().to_owned(),
        size: cli.size << 20,
    };
    exit_code("connections", connections(&options))
}
