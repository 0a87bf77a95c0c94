//! `blkrepl map` on a real kernel's /dev/nbdN, with a file system and databases on it: the primary is killed, moved,
//! restarted, the keeper is killed, power is cut. File system and databases see pauses, no error; nothing that was
//! reported is lost. `VM_ROUNDS` says how often each is done (1), `VM_KIND=qemu` has it done by an emulated machine
//! with two processors. Skipped where machines cannot be booted.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::bits::{Random, fresh_seed};
use blkrepl_tests::evidence::keep_tree;
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::vm::{DiskKind, Job, Kind, Vm, VmOptions, unavailable};
use blkrepl_tests::wait::wait_until;

/// Longest time for one round of each fault, all of them together, in a slow machine.
const ROUND_LIMIT: Duration = Duration::from_secs(300);
const CHECK_LIMIT: Duration = Duration::from_secs(240);
/// Cuts of one new cluster's power, and the longest time from its start or its first write to the cut.
const CUTS: usize = 3;
const EARLY_MS: u64 = 4000;
const DISK: u64 = 2 << 30;
const MEMORY_MIB: u32 = 1536;

fn rounds() -> u32 {
    std::env::var("VM_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn kind() -> Kind {
    if std::env::var("VM_KIND").is_ok_and(|kind| kind == "qemu") { Kind::Qemu } else { Kind::Uml }
}

fn machine() -> Result<Vm> {
    let options = VmOptions { memory_mib: MEMORY_MIB, ..VmOptions::new(kind()).disk(DISK, DiskKind::File) };
    let mut vm = Vm::new(options)?;
    vm.put_program(blkrepl()?)?;
    vm.put_program(Path::new(env!("CARGO_BIN_EXE_vm_rounds")))?;
    vm.boot()?;
    Ok(vm)
}

/// The environment of the program in the machine, and where its files are: on the machine's own disk.
fn command(words: &str) -> String {
    format!(
        "export BLKREPL_BIN=/host/bin/blkrepl BLKREPL_TEST_DIR=/disk BLKREPL_REPORT=/dev/vm-log; exec vm_rounds {words}"
    )
}

fn run_in(vm: &Vm, command: &str, limit: Duration) -> Result<()> {
    let done = vm.run(command, limit)?;
    for line in done.stderr.lines().filter(|line| line.starts_with("MEASURED ")) {
        let (name, text) = line["MEASURED ".len()..].split_once(": ").unwrap_or((line, ""));
        measured(name, text);
    }
    done.ok().map(drop)
}

fn with_machine(name: &str, body: impl FnOnce(&mut Vm) -> Result<()>) {
    if let Some(reason) = unavailable(kind()) {
        return skipped(name, &reason);
    }
    let started = Instant::now();
    let mut consoles = String::new();
    let result = machine().and_then(|mut vm| {
        let made = run_in(&vm, &format!("mkfs.ext4 -q {}", vm.device(0)), CHECK_LIMIT);
        let result = made.and_then(|()| mount_disk(&vm)).and_then(|()| body(&mut vm));
        consoles = vm.consoles();
        let kept = vm.share().join("evidence");
        if result.is_err()
            && kept.exists()
            && let Err(also) = keep_tree(&format!("{name}_machine"), &kept)
        {
            consoles += &format!("\nits evidence is lost: {also:#}");
        }
        result
    });
    if let Err(reason) = result {
        fail(name, None, &format!("{reason:#}\n{consoles}"));
    }
    step(name, &format!("passed in {}", human(started.elapsed())));
}

fn all_faults(fs: &str) {
    let count = rounds();
    with_machine(&format!("vm_map_{fs}"), |vm| {
        run_in(vm, &command(&format!("rounds {fs} {count}")), ROUND_LIMIT * (count + 1))
    });
}

#[test]
fn databases_on_ext4_on_a_mapped_volume_see_pauses_and_no_error() {
    all_faults("ext4");
}

#[test]
fn databases_on_xfs_on_a_mapped_volume_see_pauses_and_no_error() {
    all_faults("xfs");
}

/// Keeps what the nodes on the machine's disk said and say, as evidence of a failure; its content is not copied.
const KEEP: &str = "
    kept=/host/evidence; mkdir -p $kept; cd /disk || exit
    find . -type f -size -8192k ! -name '*.data' -exec cp --parents {} $kept ';'
    for socket in $(find . -name admin.sock); do
        for what in status events; do
            to=$kept/${socket%/*}/$what.json
            timeout 10 /host/bin/blkrepl --admin $socket $what --json >$to 2>&1 || echo 'no answer' >>$to
        done
    done
    { cat /proc/uptime /proc/loadavg /proc/diskstats; ps -o pid,stat,time,args; } >$kept/machine.txt";

/// Does `body`; if it fails and the machine still runs, what its nodes say is kept.
fn with_evidence<T>(vm: &mut Vm, body: impl FnOnce(&mut Vm) -> Result<T>) -> Result<T> {
    body(vm).map_err(|reason| match vm.runs().then(|| run_in(vm, KEEP, CHECK_LIMIT)) {
        Some(Err(also)) => reason.context(format!("and then, as evidence was kept: {also:#}")),
        _ => reason,
    })
}

/// The last number that the machine said was reported committed.
fn reported(log: &Path) -> u64 {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    // The last line may be cut short.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().rev().find_map(|l| l.strip_prefix("REPORTED ")?.trim().parse().ok()).unwrap_or(0)
}

/// Cuts the power of one machine in each round, as `cut` does it with chance; what it says of that is told.
fn cuts_of_power(name: &str, cut: impl Fn(&mut Vm, u32, &mut Random) -> Result<String>) {
    let seed = fresh_seed();
    with_machine(name, |vm| {
        step(name, &format!("seed {seed}"));
        let mut random = Random::new(seed);
        for round in 0..rounds() {
            measured(name, &with_evidence(vm, |vm| cut(vm, round, &mut random))?);
        }
        Ok(())
    });
}

#[test]
fn what_was_reported_committed_is_there_after_a_cut_of_power() {
    cuts_of_power("vm_map_power", |vm, round, random| {
        let committed = cut_under_load(vm, round, 20 + random.below(40))?;
        Ok(format!("cut after {committed} commits were reported: all there"))
    });
}

/// Cuts the power once so many commits were reported, and looks after a boot; how many were reported in the end.
fn cut_under_load(vm: &mut Vm, round: u32, enough: u64) -> Result<u64> {
    let dir = format!("/disk/power{round}");
    let before = reported(vm.log());
    let job = vm.start(&command(&format!("load ext4 {dir} /dev/vm-log")), ROUND_LIMIT)?;
    wait_reported(vm, &job, |now| now != before && now >= enough)?;
    let committed = cut_and_boot(vm, &job)?;
    ensure!(committed >= enough, "{committed} commits reported");
    run_in(vm, &command(&format!("check ext4 {dir} {committed}")), CHECK_LIMIT)
        .with_context(|| format!("cut after {committed} commits"))?;
    Ok(committed)
}

/// Waits until what the machine says was reported, while this runs in it, is `enough`.
fn wait_reported(vm: &Vm, job: &Job, enough: impl Fn(u64) -> bool) -> Result<()> {
    let mut ended = None;
    // Longer than what runs waits for any of its steps: then it ends, and says for which.
    let waited = wait_until("what is reported", ROUND_LIMIT, || {
        ended = vm.finished(job).transpose();
        ended.is_some() || enough(reported(vm.log()))
    });
    match ended {
        Some(ended) => Err(anyhow!("it ended: {}", ended?.text())),
        None => waited,
    }
}

/// Cuts the power while this runs, and boots with the disk mounted; what was reported before the cut.
fn cut_and_boot(vm: &mut Vm, job: &Job) -> Result<u64> {
    if let Some(ended) = vm.finished(job)? {
        return Err(anyhow!("it ended: {}", ended.text()));
    }
    vm.cut_power()?;
    let last = reported(vm.log());
    vm.boot()?;
    mount_disk(vm)?;
    Ok(last)
}

/// Mounts the machine's disk. Nothing is written back to it but what somebody flushes, so that a cut takes all else,
/// however long it was there.
fn mount_disk(vm: &Vm) -> Result<()> {
    let disk = vm.device(0);
    let mount = format!("modprobe nbd && mkdir -p /disk && mount {disk} /disk");
    run_in(vm, &format!("{mount} && echo 0 >/proc/sys/vm/dirty_writeback_centisecs"), CHECK_LIMIT)
}

#[test]
fn a_new_cluster_serves_again_after_every_cut_of_power() {
    cuts_of_power("vm_map_early", |vm, round, random| {
        let told = cut_early(vm, round, random)?;
        Ok(format!("cut after writes {told:?} were reported: served again, all there"))
    });
}

/// Cuts the power several times, the first time while a new cluster is made, then a moment after its device was written
/// to. Each start looks whether what was reported before is there. The last number reported at each cut.
fn cut_early(vm: &mut Vm, round: u32, random: &mut Random) -> Result<Vec<u64>> {
    let started = reported(vm.log());
    let mut told = Vec::new();
    for cut in 0.. {
        let (before, last) = (reported(vm.log()), told.last().copied().unwrap_or(0));
        let words = format!("write /disk/early{round} /dev/vm-log {last}");
        let job = vm.start(&command(&words), ROUND_LIMIT)?;
        if cut > 0 {
            wait_reported(vm, &job, |now| now != before && now > last)?;
        }
        if cut == CUTS {
            // The next round has a cluster of its own.
            cut_and_boot(vm, &job)?;
            break;
        }
        // No condition to wait for: a cut may come at any moment.
        std::thread::sleep(Duration::from_millis(random.below(EARLY_MS)));
        let last = cut_and_boot(vm, &job)?;
        told.push(if last == started { 0 } else { last });
    }
    Ok(told)
}
