//! `ways`: what other ways of using io_uring would gain. What it does: `blkrepl_benches::ways`.
//!
//! `cargo run --release -p blkrepl-benches --bin ways -- --help`

use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::ways::{WaysOptions, names, ways};
use blkrepl_benches::{exit_code, seconds};
use clap::Parser;

/// Measures ways of receiving, sending and waiting, each by itself, on a TCP connection over loopback.
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
    exit_code("ways", ways(&WaysOptions { rounds: cli.rounds, time: cli.seconds, only: cli.only }))
}
