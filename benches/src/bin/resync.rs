//! `resync`: how fast a replica gets what it lacks, and what clients notice of it. What it does:
//! `blkrepl_benches::compare::resync`.
//!
//! `cargo run --release -p blkrepl-benches --bin resync -- --help`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::compare::{Place, ResyncOptions, resync};
use blkrepl_benches::exit_code;
use clap::Parser;

/// Measures the resync of a replica that was away, with idle clients and under load.
#[derive(Parser)]
struct Cli {
    /// Rounds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// MiB of the volume, all of which is resynced. Of a small one the hand-shake and the join are a large part.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..1 << 20))]
    size: u64,
    /// Measured seconds of whatever is not a resync.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..600))]
    seconds: u64,
    /// The clients' latency budget, in milliseconds, that the resync is to keep to.
    #[arg(long, value_name = "MS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..60_000))]
    latency: u64,
    /// The files lie on a disk, in this directory.
    #[arg(long, default_value = "/var/tmp")]
    disk_dir: PathBuf,
    /// They lie on a tmpfs instead.
    #[arg(long)]
    tmpfs: bool,
    /// Where that is.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs_dir: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (place, dir) = if cli.tmpfs { (Place::Tmpfs, cli.tmpfs_dir) } else { (Place::Disk, cli.disk_dir) };
    let time = Duration::from_secs(cli.seconds);
    let budget = Duration::from_millis(cli.latency);
    exit_code(
        "resync",
        resync(&ResyncOptions { place, dir, size: cli.size << 20, rounds: cli.rounds, time, budget }),
    )
}
