//! The machines of `tests/src/vm` themselves, in each of their kinds: commands and their exit codes, clocks, the
//! drivers of NBD and DRBD, blkrepl's own demonstration, cuts of power, systemd with udev and fstab. What blkrepl
//! does in them is shown elsewhere. Skipped where they cannot be booted.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::vm::{DiskKind, Drive, Init, Kind, Vm, VmOptions, unavailable};

const NAME: &str = "vm_guest";
const LIMIT: Duration = Duration::from_secs(60);
const DISK: u64 = 64 << 20;
/// How long the clocks are compared, and by how much the answers to two commands may be late.
const CLOCK_PAUSE: Duration = Duration::from_secs(2);
const CLOCK_SLACK: f64 = 1.0;

/// A kernel's NBD client on a server that is not ours.
const NBD: &str = "set -e
modprobe nbd nbds_max=3
test -b /dev/nbd2 && test ! -e /dev/nbd3
nbdkit --unix /run/nbdkit.sock --pidfile /run/nbdkit.pid memory 64M
nbd-client -unix /run/nbdkit.sock /dev/nbd0 -b 4096
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
head -c 8M /dev/urandom >/mnt/file
cksum </mnt/file >/tmp/before
umount /mnt
mount /dev/nbd0 /mnt
cksum </mnt/file | cmp - /tmp/before
umount /mnt
nbd-client -d /dev/nbd0
kill $(cat /run/nbdkit.pid)";

/// DRBD with both of its replicas in one kernel. Its helper program, which knows one of them only, is left out, and
/// so is what slows its resync down.
const DRBD: &str = r#"set -e
modprobe drbd usermode_helper=/bin/true
cd /tmp
for name in a b; do
    truncate -s 8M $name.img
    losetup --find --show $name.img >$name.loop
done
a=$(cat a.loop) b=$(cat b.loop)
cat >/etc/drbd.d/r0.res <<END
resource r0 {
    device minor 0; disk $a; meta-disk internal; protocol C;
    on vm { address 127.0.0.1:7001; }
    on other { address 127.0.0.1:7002; }
    disk { c-min-rate 0; }
}
END
drbdadm create-md --force r0
drbdadm up r0
drbdmeta 1 v08 $b internal create-md --force
drbdsetup new-resource r1
drbdsetup new-minor r1 1 0
drbdsetup attach 1 $b $b internal --c-plan-ahead=0 --resync-rate=100M --c-min-rate=0
drbdsetup connect r1 ipv4:127.0.0.1:7002 ipv4:127.0.0.1:7001 --protocol=C
drbdadm primary --force r0
mkfs.ext4 -q /dev/drbd0
mount /dev/drbd0 /mnt
head -c 1M /dev/urandom >/mnt/file
umount /mnt
until [ $(grep -c UpToDate/UpToDate /proc/drbd) = 2 ]; do sleep 0.1; done
drbdadm down r0
drbdsetup down r1
cmp --bytes=7M a.img b.img"#;

fn ok(vm: &Vm, command: &str) -> Result<String> {
    Ok(vm.run(command, LIMIT)?.ok()?.stdout)
}

fn commands(vm: &Vm) -> Result<()> {
    let failed = vm.run("echo out; echo err >&2; exit 3", LIMIT)?;
    let seen = (failed.code(), failed.stdout.as_str(), failed.stderr.as_str());
    ensure!(seen == (3, "out\n", "err\n"), "{seen:?}");
    let late = vm.run("echo begun; sleep 100", Duration::from_secs(1));
    let reason = late.err().map(|reason| reason.to_string()).unwrap_or_default();
    ensure!(reason.contains("still ran") && reason.contains("begun"), "{reason}");
    // Side by side: the first waits for the second.
    let first = vm.start("until [ -e /run/second ]; do sleep 0.1; done; echo waited", LIMIT)?;
    ensure!(vm.finished(&first)?.is_none(), "a command that waits has ended");
    ok(vm, "touch /run/second; echo said >/dev/vm-log")?;
    ensure!(vm.finish(&first)?.ok()?.stdout == "waited\n");
    let log = fs::read_to_string(vm.log())?;
    ensure!(log.contains("said"), "the log has {log:?}");
    ensure!(vm.kernel_log().contains("Linux version 6.1"), "the kernel's log lacks its first line");
    Ok(())
}

/// A guest's monotonic clock goes as this machine's does: leases are kept by it.
fn clocks(vm: &Vm) -> Result<()> {
    let now = || -> Result<(Instant, f64)> {
        let uptime = ok(vm, "cut -d ' ' -f 1 /proc/uptime")?;
        Ok((Instant::now(), uptime.trim().parse().context("the uptime")?))
    };
    let first = now()?;
    std::thread::sleep(CLOCK_PAUSE);
    let second = now()?;
    let (here, there) = ((second.0 - first.0).as_secs_f64(), second.1 - first.1);
    ensure!((here - there).abs() < CLOCK_SLACK, "{there:.2} s passed in the machine, {here:.2} s here");
    let slept = Instant::now();
    ok(vm, "sleep 1")?;
    ensure!(slept.elapsed() >= Duration::from_millis(990), "a second was {:?}", slept.elapsed());
    Ok(())
}

fn demo(vm: &Vm) -> Result<()> {
    vm.put_program(blkrepl()?)?;
    let said = ok(vm, "blkrepl demo")?;
    ensure!(said.contains("everything held"), "{said}");
    Ok(())
}

/// A file that was synced is there after a cut of power, on the disk and on the root file system.
fn power(vm: &mut Vm, kind: Kind) -> Result<()> {
    let disk = vm.device(0);
    ok(vm, &format!("mkfs.ext4 -q {disk} && mount {disk} /mnt && echo kept >/mnt/file && sync /mnt/file"))?;
    ok(vm, "echo root >/root/file && sync /root/file && echo lost >/mnt/late")?;
    let open = vm.start("sleep 50", LIMIT)?;
    vm.cut_power()?;
    ensure!(!vm.runs() && vm.finish(&open).is_err(), "it runs after its power was cut");
    ensure!(vm.kernel_log().contains("Linux version 6.1"), "the console is lost");
    let booted = vm.boot()?;
    measured(NAME, &format!("{} booted in {} after a cut of power", kind.name(), human(booted)));
    ensure!(ok(vm, &format!("mount {disk} /mnt && cat /mnt/file /root/file"))? == "kept\nroot\n");
    if let Some(Drive::Volatile(disk)) = vm.drives().first() {
        ensure!(disk.counts().flushes > 0, "nothing was flushed");
    }
    ok(vm, &format!("umount /mnt && e2fsck -f -n {disk}")).map(drop)
}

/// Says what is being done, and how long it took.
fn part(kind: Kind, what: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    body().with_context(|| what.to_owned())?;
    step(NAME, &format!("{}: {what} in {}", kind.name(), human(begun.elapsed())));
    Ok(())
}

fn quick(kind: Kind, disk: DiskKind) -> Result<()> {
    let mut vm = Vm::new(VmOptions::new(kind).disk(DISK, disk))?;
    measured(NAME, &format!("{} booted in {}", kind.name(), human(vm.boot()?)));
    let result = (|| {
        part(kind, "commands", || commands(&vm))?;
        part(kind, "clocks", || clocks(&vm))?;
        part(kind, "NBD", || ok(&vm, NBD).map(drop))?;
        part(kind, "DRBD", || ok(&vm, DRBD).map(drop))?;
        part(kind, "blkrepl demo", || demo(&vm))?;
        part(kind, "a cut of power", || power(&mut vm, kind))?;
        part(kind, "its end", || vm.shut_down())
    })();
    result.with_context(|| vm.consoles())
}

/// What is enabled in the root file system is there once systemd has started: a unit, a name that udev gives, and a
/// file system of fstab.
fn systemd(kind: Kind) -> Result<()> {
    let mut vm = Vm::new(VmOptions::new(kind).disk(DISK, DiskKind::File))?;
    vm.boot()?;
    let disk = vm.device(0);
    let name = disk.trim_start_matches("/dev/");
    ok(
        &vm,
        &format!(
            "set -e
mkfs.ext4 -q {disk}
mkdir /data
echo '/dev/probe/disk /data ext4 defaults 0 2' >>/etc/fstab
echo 'KERNEL==\"{name}\", SYMLINK+=\"probe/disk\"' >/etc/udev/rules.d/99-probe.rules
printf '%s\\n' '[Service]' 'Type=oneshot' 'ExecStart=touch /run/probed' >/etc/systemd/system/probe.service
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -s ../probe.service /etc/systemd/system/multi-user.target.wants/"
        ),
    )?;
    vm.shut_down()?;
    vm.set_init(Init::Systemd)?;
    let booted = vm.boot()?;
    let result = (|| {
        let begun = Instant::now();
        let state = vm.wait_started(LIMIT)?;
        let failed = ok(&vm, "systemctl --failed --no-legend")?;
        ensure!(state == "running", "systemd is {state}: {failed}");
        measured(
            NAME,
            &format!(
                "{} with systemd: agent after {}, all started {} later",
                kind.name(),
                human(booted),
                human(begun.elapsed())
            ),
        );
        ok(&vm, "test -e /run/probed && mountpoint /data && findmnt -n -o SOURCE /data")?;
        vm.shut_down()
    })();
    result.with_context(|| vm.consoles())
}

fn test(name: &str, kind: Kind, body: impl FnOnce() -> Result<()>) {
    if let Some(reason) = unavailable(kind) {
        skipped(name, &reason);
        return;
    }
    if let Err(reason) = body() {
        fail(name, None, &format!("{reason:#}"));
    }
}

#[test]
fn linux_as_a_program_is_a_whole_machine() {
    test("vm_guest_uml", Kind::Uml, || quick(Kind::Uml, DiskKind::File));
}

#[test]
fn linux_under_qemu_is_a_whole_machine() {
    test("vm_guest_qemu", Kind::Qemu, || quick(Kind::Qemu, DiskKind::Volatile { seed: 1 }));
}

#[test]
fn systemd_starts_what_is_enabled() {
    test("vm_guest_systemd", Kind::Uml, || systemd(Kind::Uml));
}
