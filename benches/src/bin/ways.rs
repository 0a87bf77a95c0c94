//! `ways`: what other ways of using io_uring would gain. What it does: `blkrepl_benches::ways`.
//!
//! `cargo run --release -p blkrepl-benches --bin ways -- --help`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::ways::{WaysOptions, names, ways};
use blkrepl_benches::{exit_code, seconds};
use clap::Parser;

/// Measures ways of receiving, sending and waiting on a TCP connection over loopback, and of writing to a file, each by
/// itself.
#[derive(Parser)]
struct Cli {
    /// Rounds of every way.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Only ways whose name contains this; may be repeated.
    #[arg(long, value_name = "WAY")]
    only: Vec<String>,
    /// Measured seconds of each run.
    #[arg(long, default_value = "1", value_parser = seconds)]
    seconds: Duration,
    /// A directory on a disk, for what is written to one.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    disk_dir: PathBuf,
    /// A directory on a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    tmpfs_dir: PathBuf,
    /// Print the names of the ways.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        names().for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let Cli { rounds, only, seconds, disk_dir, tmpfs_dir, .. } = cli;
    exit_code("ways", ways(&WaysOptions { rounds, time: seconds, only, disk_dir, tmpfs_dir }))
}
