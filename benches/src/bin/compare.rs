//! `compare`: blkrepl beside the floor and other NBD servers. What it does: `blkrepl_benches::compare`.
//!
//! `cargo run --release -p blkrepl-benches --bin compare -- --help`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::compare::{CompareOptions, PlaceArgs, Transport, compare};
use blkrepl_benches::{exit_code, seconds};
use clap::{Parser, ValueEnum};

/// Measures blkrepl, the floor and the NBD servers that Debian packages under the same loads.
#[derive(Parser)]
struct Cli {
    /// Rounds of every job.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Only servers and jobs whose name contains this; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Measured seconds of each run.
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// MiB of each export.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..1 << 20))]
    size: u64,
    /// How clients reach the servers; replicas always reach each other over TCP.
    #[arg(long, value_enum, default_value_t = TransportArg::Unix)]
    transport: TransportArg,
    #[command(flatten)]
    places: PlaceArgs,
    /// Also write all figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum TransportArg {
    Unix,
    Tcp,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = CompareOptions {
        rounds: usize::from(cli.rounds),
        time: cli.seconds,
        only: cli.only,
        places: cli.places.places(),
        size: cli.size << 20,
        transport: match cli.transport {
            TransportArg::Unix => Transport::Unix,
            TransportArg::Tcp => Transport::Tcp,
        },
        json: cli.json,
    };
    exit_code("compare", compare(&options))
}
