//! blkrepl beside DRBD and beside an NBD server without replication, in one machine: `blkrepl_tests::vm_compare`.
//! Prints one table.
//!
//!     cargo run -p blkrepl-tests --bin vm_compare -- [--kind uml|qemu] [--seconds N] [--rounds N] [--size MIB]
//!         [--only NAME]... [--part loads|connections|faults|resyncs]... [--quick]
//!
//! `--quick`: one round with short loads and the smallest resync. `--only`: systems, by a part of the name. `--part`:
//! not all that is done to them.
//!
//! In the machine it is the writer as well: `vm_compare writer DEVICE FILES`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::vm::Kind;
use blkrepl_tests::vm_compare::{Options, PARTS, compare, writer};

const USAGE: &str = "vm_compare [--kind uml|qemu] [--seconds N] [--rounds N] [--size MIB] [--only NAME]... \
                     [--part loads|connections|faults|resyncs]... [--quick]";

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options {
        kind: Kind::Uml,
        time: Duration::from_secs(2),
        rounds: 3,
        size_mib: 160,
        changed_mib: vec![8, 32, 128],
        only: Vec::new(),
        parts: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value; {USAGE}"));
        match arg.as_str() {
            "--kind" => {
                options.kind = match value()?.as_str() {
                    "uml" => Kind::Uml,
                    "qemu" => Kind::Qemu,
                    other => bail!("which kind, uml or qemu? Not {other}"),
                }
            }
            "--seconds" => options.time = seconds(value()?)?,
            "--rounds" => options.rounds = value()?.parse().context("--rounds takes a number")?,
            "--size" => options.size_mib = value()?.parse().context("--size takes MiB")?,
            "--only" => options.only.push(value()?.clone()),
            "--part" => options.parts.push(part(value()?)?),
            "--quick" => {
                (options.time, options.rounds) = (Duration::from_millis(500), 1);
                options.changed_mib = vec![8];
            }
            _ => bail!("unknown argument {arg}; {USAGE}"),
        }
    }
    ensure!(options.rounds > 0, "no rounds, no figures");
    Ok(options)
}

fn part(text: &str) -> Result<String> {
    ensure!(PARTS.contains(&text), "which part, {}? Not {text}", PARTS.join(", "));
    Ok(text.to_owned())
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse().context("--seconds takes a number")?;
    ensure!((0.2..=60.0).contains(&seconds), "--seconds takes 0.2 to 60");
    Ok(Duration::from_secs_f64(seconds))
}

fn run(args: &[String]) -> Result<()> {
    if let [word, device, files] = args
        && word == "writer"
    {
        return writer::run(Path::new(device), Path::new(files));
    }
    print!("{}", compare(&parse(args)?)?);
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("vm_compare: {reason:#}");
            ExitCode::FAILURE
        }
    }
}
