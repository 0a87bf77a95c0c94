//! `mutants`: shows that the checks bite. Each deliberate fault of [`blkrepl_engine::mutation`] is switched on
//! and has to be found, by the simulator within so many seeds where the rule lives in what it runs, and always
//! by the unit tests that the table names. Exits 1 if one survives, or if anything is found without one.
//!
//! Built without the feature `mutations` it runs cargo again with it, so that `cargo run --bin
//! mutants` is all that one has to know. Never part of production: nothing else turns that feature on.

#[cfg(feature = "mutations")]
mod named;
#[cfg(feature = "mutations")]
mod seeds;
#[cfg(feature = "mutations")]
mod table;

use std::process::ExitCode;

#[cfg(feature = "mutations")]
use clap::Parser;

/// Switches deliberate faults on, one after the other, and shows what finds each of them.
#[cfg(feature = "mutations")]
#[derive(Debug, Parser)]
struct Args {
    /// Seeds that are tried for each at most.
    #[arg(long, default_value_t = 5000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Seeds of the control run without a fault, which has to be clean.
    #[arg(long, default_value_t = 300)]
    control: u64,
    /// Threads.
    #[arg(long)]
    jobs: Option<usize>,
    /// Only this mutation; may be given more than once.
    #[arg(long)]
    only: Vec<String>,
    /// Leave the unit tests out.
    #[arg(long)]
    no_tests: bool,
    /// Leave the simulator out.
    #[arg(long)]
    no_seeds: bool,
    /// Print the mutations and what each leaves out, then end.
    #[arg(long)]
    list: bool,
}

#[cfg(feature = "mutations")]
fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("mutants: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if every mutation was found and nothing without one.
#[cfg(feature = "mutations")]
fn run(args: &Args) -> anyhow::Result<bool> {
    use table::{By, TABLE};

    if args.list {
        for row in TABLE {
            println!("{:22} {}", row.mutation.name(), row.mutation.what());
        }
        return Ok(true);
    }
    for name in &args.only {
        anyhow::ensure!(
            TABLE.iter().any(|r| r.mutation.name() == name),
            "{name} names no mutation; see --list"
        );
    }
    let wanted =
        |row: &&table::Row| args.only.is_empty() || args.only.iter().any(|n| n == row.mutation.name());
    let rows: Vec<&table::Row> = TABLE.iter().filter(wanted).collect();
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let mut good = true;
    let binary = if args.no_tests { None } else { Some(named::TestBinary::build()?) };
    if let Some(binary) = &binary {
        good &= binary.control(&rows)?;
    }
    // Production code that panics under a mutation is caught and counts; a line says so, not a page.
    std::panic::set_hook(Box::new(|info| eprintln!("{}", info.to_string().replace('\n', " "))));
    if !args.no_seeds {
        good &= seeds::control(&rows, args.first, args.control, jobs);
    }
    println!("{:22} {:>6}  {:44} named tests", "mutation", "seeds", "found by");
    for row in rows {
        let (seeds, found, seen) = match row.by {
            By::Seeds(_) | By::Control if !args.no_seeds => {
                match seeds::hunt(row, args.first, args.seeds, jobs) {
                    Some(hit) => ((hit.seed - args.first + 1).to_string(), hit.broken.0, true),
                    None => (format!(">{}", args.seeds), "NOTHING: IT SURVIVES".into(), false),
                }
            }
            By::Seeds(_) | By::Control => ("-".into(), "(simulator left out)".into(), true),
            By::Model(_) | By::Test(_) => ("-".into(), row.by.to_string(), true),
        };
        let verdict = match &binary {
            Some(binary) => binary.fails_under(row)?,
            None => named::Verdict::left_out(),
        };
        good &= seen && verdict.good;
        println!("{:22} {seeds:>6}  {found:44} {}", row.mutation.name(), verdict.text);
    }
    println!(
        "{}",
        if good {
            "every mutation is found"
        } else {
            "NOT every mutation is found, or the control run is not clean"
        }
    );
    Ok(good)
}

/// Runs itself again, built with the feature.
#[cfg(not(feature = "mutations"))]
fn main() -> ExitCode {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = std::process::Command::new(cargo)
        .args(["run", "--locked", "--quiet", "-p", "blkrepl-sim", "--features", "mutations"])
        .args(["--bin", "mutants", "--"])
        .args(std::env::args_os().skip(1))
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("mutants: cannot run cargo, which builds this with the feature mutations: {e}");
            ExitCode::FAILURE
        }
    }
}
