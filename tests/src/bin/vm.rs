//! Boots a machine of `tests/src/vm`, runs commands in it one after the other, and shuts it down: to look at something
//! by hand. Each command's output and exit code are printed; the exit code is that of the first that failed.
//!
//!     cargo run -p blkrepl-tests --bin vm -- [--systemd] [--disk MIB] [--put PROGRAM] uml|qemu COMMAND...

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use blkrepl_tests::report::human;
use blkrepl_tests::vm::{DiskKind, Init, Kind, Vm, VmOptions};

const LIMIT: Duration = Duration::from_secs(600);

struct Order {
    options: VmOptions,
    programs: Vec<PathBuf>,
    commands: Vec<String>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Order> {
    // The kind stands behind the options, so they are kept until it is known.
    let mut options = VmOptions::new(Kind::Uml);
    let mut programs = Vec::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--systemd" => options = options.systemd(),
            "--disk" => {
                let mib: u64 = args.next().and_then(|n| n.parse().ok()).context("--disk takes MiB")?;
                options = options.disk(mib << 20, DiskKind::File);
            }
            "--put" => programs.push(args.next().context("--put takes a program")?.into()),
            "uml" | "qemu" => {
                options.kind = if arg == "uml" { Kind::Uml } else { Kind::Qemu };
                return Ok(Order { options, programs, commands: args.collect() });
            }
            _ => bail!("unknown argument {arg}"),
        }
    }
    Err(anyhow!("which kind, uml or qemu?"))
}

fn run(order: Order) -> Result<i32> {
    let init = order.options.init;
    let mut vm = Vm::new(order.options)?;
    for program in &order.programs {
        vm.put_program(program)?;
    }
    println!("-- booted in {}", human(vm.boot()?));
    if init == Init::Systemd {
        println!("-- systemd is {}", vm.wait_started(LIMIT)?);
    }
    let mut worst = 0;
    for command in &order.commands {
        let begun = Instant::now();
        let done = vm.run(command, LIMIT)?;
        print!("{}", done.stdout);
        eprint!("{}", done.stderr);
        println!("-- exit code {} after {}", done.code(), human(begun.elapsed()));
        if worst == 0 {
            worst = done.code();
        }
    }
    vm.shut_down()?;
    Ok(worst)
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(run) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(reason) => {
            eprintln!("vm: {reason:#}");
            ExitCode::FAILURE
        }
    }
}
