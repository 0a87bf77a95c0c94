//! `compare`: blkrepl beside the floor and other NBD servers. What it does: `blkrepl_benches::compare`.
//!
//! `cargo run --release -p blkrepl-benches --bin compare -- --help`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::compare::{CompareOptions, Place, Transport, compare};
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
    /// Where the files lie.
    #[arg(long, value_enum, default_value_t = PlaceArg::Both)]
    place: PlaceArg,
    /// Measured seconds of each run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// MiB of each export.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..1 << 20))]
    size: u64,
    /// How clients reach the servers; replicas always reach each other over TCP.
    #[arg(long, value_enum, default_value_t = TransportArg::Unix)]
    transport: TransportArg,
    /// A directory on a disk.
    #[arg(long, default_value = "/var/tmp")]
    disk_dir: PathBuf,
    /// A directory on a tmpfs.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs_dir: PathBuf,
    /// Also write all figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PlaceArg {
    Disk,
    Tmpfs,
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
enum TransportArg {
    Unix,
    Tcp,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let Ok(time) = Duration::try_from_secs_f64(cli.seconds) else {
        eprintln!("compare: {} is not a number of seconds", cli.seconds);
        return ExitCode::from(2);
    };
    let options = CompareOptions {
        rounds: usize::from(cli.rounds),
        time,
        only: cli.only,
        places: match cli.place {
            PlaceArg::Disk => vec![Place::Disk],
            PlaceArg::Tmpfs => vec![Place::Tmpfs],
            PlaceArg::Both => vec![Place::Disk, Place::Tmpfs],
        },
        disk_dir: cli.disk_dir,
        tmpfs_dir: cli.tmpfs_dir,
        size: cli.size << 20,
        transport: match cli.transport {
            TransportArg::Unix => Transport::Unix,
            TransportArg::Tcp => Transport::Tcp,
        },
        json: cli.json,
    };
    match compare(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("compare: {reason:#}");
            ExitCode::FAILURE
        }
    }
}
