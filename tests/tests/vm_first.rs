//! docs/first-database.md, as it stands, on three machines with a network of their own: each of its commands is run
//! where the page says, and db1 loses its power where the page has its plug pulled. Skipped where machines cannot be
//! booted.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_tests::binary::workspace;
use blkrepl_tests::mapped::dist;
use blkrepl_tests::report::{skipped, step};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::vm::{Init, Kind, Vm, VmOptions, unavailable};

const NAME: &str = "vm_first";
const LIMIT: Duration = Duration::from_secs(180);
const MACHINES: [&str; 3] = ["db1", "db2", "wit"];

/// One block of commands.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// The number of its section.
    section: u32,
    machines: Vec<&'static str>,
    script: String,
}

/// The blocks of a page. Each is for the machines that the last paragraph before it names.
fn blocks(text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let (mut section, mut paragraph) = (0, String::new());
    let mut inside = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(section);
        }
        let code = line.strip_prefix("    ").or_else(|| (inside && line.is_empty()).then_some(""));
        let Some(code) = code else {
            if inside {
                paragraph.clear();
            }
            inside = false;
            paragraph.push_str(line);
            paragraph.push(' ');
            continue;
        };
        if !inside {
            // What stands last before a block says where it is run.
            let last =
                paragraph.rsplit(". ").find(|sentence| sentence.trim().ends_with(':')).unwrap_or(&paragraph);
            let machines = MACHINES.into_iter().filter(|name| last.contains(name)).collect();
            found.push(Block { section, machines, script: String::new() });
        }
        inside = true;
        if let Some(block) = found.last_mut() {
            block.script.push_str(code);
            block.script.push('\n');
        }
    }
    found
}

#[test]
fn blocks_are_found_where_they_are_to_be_run() {
    let text = "On db1 and wit, say:\n\n    one\n\n    two\n\nNot on db2. On wit:\n\n    three\n\n## 2. Next\n\n\
                On db2:\n\n    x\n";
    let block = |section, machines: &[&'static str], script: &str| Block {
        section,
        machines: machines.to_vec(),
        script: script.to_owned(),
    };
    assert_eq!(
        blocks(text),
        [
            block(0, &["db1", "wit"], "one\n\ntwo\n\n"),
            block(0, &["wit"], "three\n\n"),
            block(2, &["db2"], "x\n")
        ]
    );
}

/// Three machines on one network.
struct Site {
    machines: BTreeMap<&'static str, Vm>,
}

impl Site {
    fn boot() -> Result<Self> {
        // A group and a port of this test's own.
        let port = 20_000 + std::process::id() % 20_000;
        let mut machines = BTreeMap::new();
        for name in MACHINES {
            let words = vec![format!("eth0=mcast,,239.192.77.1,{port},0")];
            let mut options = VmOptions { words, memory_mib: 512, ..VmOptions::new(Kind::Uml) };
            options.init = Init::Systemd;
            let vm = Vm::new(options)?;
            dist::put(&vm)?;
            machines.insert(name, vm);
        }
        let mut site = Self { machines };
        for name in MACHINES {
            site.start(name)?;
        }
        Ok(site)
    }

    /// Turns a machine on, and gives it its address.
    fn start(&mut self, name: &str) -> Result<()> {
        let number = 1 + MACHINES.iter().position(|known| *known == name).context("a machine of the page")?;
        let vm = self.machines.get_mut(name).context("a machine of the page")?;
        vm.boot()?;
        // systemd keeps the machine that is waited for from starting what needs the network before it is there.
        let up = format!("ip addr add 10.0.0.{number}/24 dev eth0; ip link set eth0 up");
        vm.run(&up, LIMIT)?.ok()?;
        vm.wait_started(LIMIT).map(drop)
    }

    fn run(&self, name: &str, script: &str) -> Result<String> {
        let vm = self.machines.get(name).with_context(|| format!("no machine {name}"))?;
        // Assignments hold for later blocks.
        let script = dist::in_machine(script);
        let whole = format!("set -e; touch /root/vars; . /root/vars\n{script}");
        let done = vm.run(&whole, LIMIT)?.ok().with_context(|| format!("on {name}: {script}"))?;
        if script.starts_with("number=") {
            vm.run(&format!("echo '{}' >/root/vars", script.trim()), LIMIT)?.ok()?;
        }
        Ok(done.stdout)
    }

    /// Waits until all replicas are in sync, as the witness sees it.
    fn wait_in_sync(&self) -> Result<()> {
        let all = "blkrepl volume show db | grep -c in-sync | grep -qx 2";
        self.run(
            "wit",
            &format!("for i in $(seq 300); do {all} && exit 0; sleep 0.3; done; blkrepl status; exit 1"),
        )
        .map(drop)
    }
}

fn follow(site: &mut Site, page: &[Block]) -> Result<()> {
    let mut section = 0;
    for block in page {
        if block.section != section {
            section = block.section;
            step(NAME, &format!("section {section}"));
            match section {
                2 => {
                    let up = "blkrepl node list | grep -cw up | grep -qx 3";
                    site.run(
                        "db1",
                        &format!("for i in $(seq 300); do {up} && exit 0; sleep 0.3; done; exit 1"),
                    )?;
                }
                4 => {
                    site.wait_in_sync()?;
                    // What was installed has long been on a disk where people do this; here half a minute ago.
                    site.run("db1", "sync -f /etc")?;
                    site.machines.get_mut("db1").context("db1")?.cut_power()?;
                }
                5 => {
                    site.start("db1")?;
                    site.wait_in_sync()?;
                }
                _ => {}
            }
        }
        let mut said = String::new();
        for name in &block.machines {
            said = site.run(name, &block.script)?;
        }
        if block.script.contains("SELECT count(*)") {
            ensure!(said.trim().ends_with('3'), "three orders were taken, and there are: {said}");
        }
    }
    let log = site.run("db1", "dmesg")? + &site.run("db2", "dmesg")?;
    ensure!(!log.contains("I/O error"), "a kernel was told of an error: {log}");
    Ok(())
}

#[test]
fn the_page_for_newcomers_works_as_written() -> Result<()> {
    let text = fs::read_to_string(workspace().join("docs/first-database.md"))?;
    let page = blocks(&text);
    let nowhere = page.iter().find(|block| block.machines.is_empty());
    ensure!(nowhere.is_none() && page.len() >= 9, "a block is for no machine: {nowhere:?} of {}", page.len());
    if let Some(reason) = unavailable(Kind::Uml) {
        skipped(NAME, &reason);
        return Ok(());
    }
    let mut consoles = String::new();
    let result = Site::boot().and_then(|mut site| {
        let result = follow(&mut site, &page);
        if result.is_err() {
            let journal = |name: &str| {
                site.run(name, "journalctl -b --no-pager | tail -n 40; blkrepl status; blkrepl mapped")
            };
            consoles = MACHINES.map(|name| journal(name).unwrap_or_else(|e| format!("{e:#}"))).join("\n\n");
        }
        result
    });
    if let Err(reason) = result {
        fail(NAME, None, &format!("{reason:#}\n{consoles}"));
    }
    Ok(())
}
