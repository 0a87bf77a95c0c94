//! The `blkrepl` binary: parses the command line, runs the command, turns its end into an exit code.

mod listen_fds;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Before anything else: no other thread runs, and nothing was opened.
    let passed = listen_fds::take();
    blkrepl_ctl::run::main(blkrepl_ctl::cli::Cli::parse(), passed)
}
