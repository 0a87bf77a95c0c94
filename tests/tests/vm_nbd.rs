//! Real block devices of a kernel's NBD client on our server, in machines of their own: `blkrepl map` and, since other
//! clients have to work as well, `nbd-client` over netlink and by ioctl.
//!
//! `vm_nbd/clients.sh` holds what blktests' group `nbd` checks and the end of a device under I/O; `traps.sh` what a
//! user may run into; `once.sh` that a request which is sent again undoes nothing; `memory.sh` that nodes and their
//! device can be on one machine. Each is a script that runs in the machine and says what is wrong. Skipped where no
//! machine can be booted.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::vm::{Kind, Vm, VmOptions, unavailable};

const COMMON: &str = include_str!("vm_nbd/common.sh");
/// Longest time of one script, on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(300);

/// A script, with what it is given.
struct Script {
    name: String,
    /// Its variables, as a shell sets them.
    given: String,
    text: &'static str,
    memory_mib: u32,
    limit: Duration,
}

impl Script {
    fn new(name: &str, given: &str, text: &'static str) -> Self {
        Self { name: format!("vm_nbd_{name}"), given: given.to_owned(), text, memory_mib: 1024, limit: LIMIT }
    }

    fn run(&self, programs: &[&Path]) -> Result<()> {
        let options = VmOptions { memory_mib: self.memory_mib, ..VmOptions::new(Kind::Uml) };
        let mut vm = Vm::new(options)?;
        vm.put_program(blkrepl()?)?;
        programs.iter().try_for_each(|program| vm.put_program(program))?;
        vm.boot()?;
        let begun = Instant::now();
        let command = format!("{}\n{COMMON}\n{}", self.given, self.text);
        let done = vm.run(&command, self.limit).with_context(|| vm.consoles())?;
        // The script is too long to be repeated in a message.
        let said = || format!("exit code {}\n{}\n{}", done.code(), done.stdout, done.stderr);
        ensure!(done.code() == 0, "{}\n{}", said(), vm.consoles());
        for line in done.stdout.lines() {
            measured(&self.name, line);
        }
        measured(&self.name, &format!("all in {}", human(begun.elapsed())));
        vm.shut_down()
    }

    fn test(&self, programs: &[&Path]) {
        if let Some(reason) = unavailable(Kind::Uml) {
            skipped(&self.name, &reason);
            return;
        }
        if let Err(reason) = self.run(programs) {
            fail(&self.name, None, &format!("{reason:#}"));
        }
    }
}

fn clients(way: &str) {
    Script::new(&format!("clients_{way}"), &format!("way={way}"), include_str!("vm_nbd/clients.sh"))
        .test(&[]);
}

#[test]
fn a_mapped_device_passes_what_blktests_checks() {
    clients("map");
}

#[test]
fn nbd_client_over_netlink_passes_what_blktests_checks() {
    clients("netlink");
}

#[test]
fn nbd_client_by_ioctl_passes_what_blktests_checks() {
    clients("ioctl");
}

#[test]
fn what_a_user_runs_into_ends_with_words() {
    Script::new("traps", "", include_str!("vm_nbd/traps.sh")).test(&[]);
}

/// `BLKREPL_SEED` runs one order of the faults again, and `NBD_SECONDS` goes on for so long (5).
#[test]
fn what_is_sent_again_undoes_nothing() {
    let given = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let seed = given("BLKREPL_SEED").unwrap_or_else(|| std::process::id() % 32768);
    let seconds = given("NBD_SECONDS").unwrap_or(5);
    step("vm_nbd_once", &format!("seed {seed}"));
    let mut script =
        Script::new("once", &format!("seed={seed} seconds={seconds}"), include_str!("vm_nbd/once.sh"));
    script.limit += Duration::from_secs(seconds.into());
    script.test(&[Path::new(env!("CARGO_BIN_EXE_counters"))]);
}

#[test]
fn nodes_and_their_device_share_a_machine_with_little_memory() {
    let mut script = Script::new("memory", "mib=384 write_mib=600", include_str!("vm_nbd/memory.sh"));
    script.memory_mib = 384;
    script.test(&[]);
}
