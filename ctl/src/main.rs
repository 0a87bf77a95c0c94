//! The `blkrepl` binary: parses the command line, runs the command, turns its end into an exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    blkrepl_ctl::run::main(blkrepl_ctl::cli::Cli::parse())
}
