//! What docs/map.md says of boots, on a machine with systemd and udev: the units and the rule as they are in
//! `ctl/dist`, a line of fstab; the keeper killed, restarted and stopped by systemd. Skipped where machines cannot be
//! booted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_tests::binary::workspace;
use blkrepl_tests::mapped::dist;
use blkrepl_tests::report::{human, measured, skipped};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::vm::{DiskKind, Init, Kind, Vm, VmOptions, unavailable};

const NAME: &str = "vm_boot";
const LIMIT: Duration = Duration::from_secs(180);
const DISK: u64 = 1 << 30;

/// A cluster of three nodes in /etc: this machine's, and two others that have copies of its unit (and
/// would stop on their own machines, later than what is mounted on this one).
const CLUSTER: &str = r#"set -e
install -m 755 /host/bin/blkrepl /usr/bin/blkrepl
blkrepl dev --dir /disk/nodes --size 256MiB >/tmp/dev.log 2>&1 &
until grep -q "serves vol0" /tmp/dev.log; do sleep 0.2; done
kill $!
wait $! || true
mkdir -p /etc/blkrepl
ln -s /disk/nodes/n1/node.toml /etc/blkrepl/node.toml
sed -i "s|^kind = \"data\"$|&\ndir = \"/disk/nodes/n1\"|;t" /disk/nodes/n1/node.toml
sed -i "0,/^dir = /!{/^dir = /d}" /disk/nodes/n1/node.toml
for node in n2 n3; do
    sed "s|/etc/blkrepl/node.toml|/disk/nodes/$node/node.toml|
        s|^After=.*|&\nRequiresMountsFor=/disk\nBefore=blkrepl-map@vol0.service|" \
        /etc/systemd/system/blkrepl.service >/etc/systemd/system/blkrepl-$node.service
done
mkdir /etc/systemd/system/blkrepl.service.d
printf '[Unit]\nRequiresMountsFor=/disk\n' >/etc/systemd/system/blkrepl.service.d/disk.conf"#;

/// The block of docs/map.md that installs what is started at boot, and its line of fstab.
fn documented() -> Result<(String, String)> {
    let text = std::fs::read_to_string(workspace().join("docs/map.md")).context("read docs/map.md")?;
    let section = text.split_once("## At boot").context("docs/map.md has no section on boots")?.1;
    let lines = section.lines().filter_map(|line| line.strip_prefix("    "));
    let commands: Vec<&str> = lines
        .clone()
        .take_while(|line| !line.starts_with('/'))
        // There is no systemd yet to be told.
        .filter(|line| line.starts_with("install "))
        .collect();
    ensure!(commands.len() == 3, "what docs/map.md installs: {commands:?}");
    let fstab = lines.clone().find(|line| line.starts_with("/dev/blkrepl/"));
    let fstab = fstab.context("docs/map.md has no line for fstab")?;
    Ok((commands.join("\n"), fstab.to_owned()))
}

fn ok(vm: &Vm, command: &str) -> Result<String> {
    let done = vm.run(command, LIMIT).with_context(|| command.to_owned())?;
    Ok(done.ok().with_context(|| command.to_owned())?.stdout)
}

/// Waits in the machine until a command succeeds.
fn until(vm: &Vm, command: &str) -> Result<()> {
    ok(vm, &format!("for i in $(seq 300); do {command} && exit 0; sleep 0.2; done; exit 1")).map(drop)
}

fn install(vm: &Vm) -> Result<()> {
    let disk = vm.device(0);
    ok(vm, &format!("mkfs.ext4 -q {disk} && mkdir /disk /srv/db && mount {disk} /disk"))?;
    ok(vm, &format!("echo '{disk} /disk ext4 defaults 0 2' >>/etc/fstab"))?;
    let (commands, fstab) = documented()?;
    ok(vm, &format!("set -e\n{}", dist::in_machine(&commands)))?;
    ok(vm, CLUSTER)?;
    let enable = "cd /etc/systemd/system && mkdir -p multi-user.target.wants && for unit in blkrepl blkrepl-n2 \
                  blkrepl-n3; do ln -s ../$unit.service multi-user.target.wants/; done && \
                  ln -s ../blkrepl-map@.service multi-user.target.wants/blkrepl-map@vol0.service";
    ok(vm, enable)?;
    ok(vm, &format!("echo '{}' >>/etc/fstab", fstab.replace(" /srv ", " /srv/db ")))?;
    Ok(())
}

/// The first boot finds an empty device: it is there under its name, and gets a file system.
fn first_boot(vm: &mut Vm) -> Result<()> {
    vm.boot()?;
    vm.wait_started(LIMIT)?;
    until(vm, "test -e /dev/blkrepl/vol0")?;
    ok(vm, "set -e; mkfs.ext4 -q /dev/blkrepl/vol0; mount /srv/db; date >/srv/db/file; sync")?;
    ok(vm, "systemctl is-active blkrepl-map@vol0.service")?;
    vm.shut_down()
}

fn later_boot(vm: &mut Vm) -> Result<()> {
    let booted = vm.boot()?;
    vm.wait_started(LIMIT)?;
    until(vm, "mountpoint -q /srv/db")?;
    measured(NAME, &format!("commands after {}, the volume of fstab is mounted", human(booted)));
    ok(vm, "test -s /srv/db/file && findmnt -n -o SOURCE /srv/db | grep -q /dev/nbd")?;
    // Whatever becomes of the keeper, the device stays while it is in use.
    let pid = "systemctl show -P MainPID blkrepl-map@vol0.service";
    for how in ["kill -9 $($PID)", "systemctl restart blkrepl-map@vol0.service"] {
        let how = how.replace("$PID", pid);
        ok(vm, &format!("set -e; before=$({pid}); {how}; touch /srv/db/file; sync /srv/db/file"))?;
        until(vm, "systemctl is-active -q blkrepl-map@vol0.service")?;
        ok(vm, "set -e; mountpoint -q /srv/db; date >>/srv/db/file; sync /srv/db/file")?;
    }
    ok(vm, "systemctl stop blkrepl-map@vol0.service; mountpoint -q /srv/db && date >>/srv/db/file && sync")?;
    ok(vm, "set -e; blkrepl mapped | grep 'nobody keeps it'; systemctl start blkrepl-map@vol0.service")?;
    // Once it is unused, a stop ends the device, and its name goes.
    ok(
        vm,
        "set -e; umount /srv/db; systemctl stop blkrepl-map@vol0.service; blkrepl mapped | grep 'No volume'",
    )?;
    until(vm, "test ! -e /dev/blkrepl/vol0")?;
    let log = ok(vm, "dmesg")?;
    ensure!(!log.contains("I/O error"), "the kernel was told of an error: {log}");
    Ok(())
}

#[test]
fn a_volume_of_fstab_is_there_after_a_boot_whatever_becomes_of_its_keeper() {
    if let Some(reason) = unavailable(Kind::Uml) {
        return skipped(NAME, &reason);
    }
    let mut consoles = String::new();
    let result = (|| {
        let mut vm = Vm::new(VmOptions::new(Kind::Uml).disk(DISK, DiskKind::File))?;
        dist::put(&vm)?;
        vm.boot()?;
        let result = (|| {
            install(&vm).context("install")?;
            vm.shut_down()?;
            vm.set_init(Init::Systemd)?;
            first_boot(&mut vm).context("first boot")?;
            later_boot(&mut vm).context("later boot")
        })();
        if result.is_err() {
            let journal = vm.run("journalctl -b --no-pager | tail -n 60; blkrepl mapped", LIMIT);
            consoles = format!("{}\n{}", vm.consoles(), journal.map_or_else(|e| e.to_string(), |j| j.stdout));
        }
        result
    })();
    if let Err(reason) = result {
        fail(NAME, None, &format!("{reason:#}\n{consoles}"));
    }
}
