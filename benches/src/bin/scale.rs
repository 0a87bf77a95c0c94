//! `scale`: what blkrepl costs against volume size, depth, dirty blocks and number of volumes. What it does:
//! `blkrepl_benches::scale`.
//!
//! `cargo run --release -p blkrepl-benches --bin scale -- --help`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use blkrepl_benches::scale::{ScaleOptions, parts, scale};
use blkrepl_benches::{exit_code, seconds};
use clap::Parser;

/// Measures what blkrepl costs as volumes, depth, dirty blocks and the number of volumes grow.
#[derive(Parser)]
struct Cli {
    /// Only parts whose name contains this; may be repeated.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Less of everything: whether it works, not what comes out.
    #[arg(long)]
    quick: bool,
    /// Measured seconds of each load, all its rounds together.
    #[arg(long, default_value = "1.5", value_parser = seconds)]
    seconds: Duration,
    /// Where the files lie; they are sparse, but a volume of 16 TiB has over 2 GiB of metadata.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Also write pictures (SVG) to this directory.
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Also write all figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    let options = ScaleOptions {
        only: cli.only,
        quick: cli.quick,
        dir: cli.dir,
        pictures: cli.pictures,
        json: cli.json,
        time: cli.seconds,
    };
    exit_code("scale", scale(&options))
}
