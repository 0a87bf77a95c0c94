//! Runs inside a guest machine with a kernel that has NBD: failures under a mapped volume with databases. Booted and
//! told what to do by `tests/tests/vm_map.rs`; `BLKREPL_BIN` is the binary under test.
//!
//!     vm_rounds rounds ext4|xfs COUNT
//!     vm_rounds load ext4|xfs DIR TELL
//!     vm_rounds check ext4|xfs DIR COMMITTED
//!     vm_rounds write DIR TELL LAST

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use blkrepl_tests::mapped::{power, rounds};
use blkrepl_tests::mount::FileSystem;

fn file_system(name: &str) -> Result<FileSystem> {
    match name {
        "ext4" => Ok(FileSystem::Ext4),
        "xfs" => Ok(FileSystem::Xfs),
        _ => bail!("'{name}' is no file system that is tested: ext4 or xfs"),
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["rounds", kind, count] => rounds::run(file_system(kind)?, count.parse().context("COUNT")?),
        ["load", kind, dir, tell] => power::load(file_system(kind)?, Path::new(dir), Path::new(tell)),
        ["check", kind, dir, committed] => {
            power::check(file_system(kind)?, Path::new(dir), committed.parse().context("COMMITTED")?)
        }
        ["write", dir, tell, last] => {
            power::write_numbers(Path::new(dir), Path::new(tell), last.parse().context("LAST")?)
        }
        _ => bail!("wrong arguments {args:?}; see the head of vm_rounds.rs"),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("vm_rounds: {reason:#}");
            ExitCode::FAILURE
        }
    }
}
