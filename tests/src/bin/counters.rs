//! `counters DEVICE BLOCKS END_FILE`: counts in blocks of a device until a file is there, and tells when a number is
//! undone (`tests/src/counters.rs`). For machines of `tests/src/vm`, which get it as a program.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use blkrepl_tests::counters;
use blkrepl_tests::report::human;

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("counters: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Vec<String>) -> Result<String> {
    let [device, blocks, end] = &args[..] else { bail!("usage: counters DEVICE BLOCKS END_FILE") };
    let blocks = blocks.parse().context("a number of blocks")?;
    let done = counters::run(Path::new(device), blocks, &|| Path::new(end).exists())?;
    Ok(format!("{} writes, each read back, the longest in {}", done.writes, human(done.longest)))
}
