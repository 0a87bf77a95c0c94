//! Every command in README.md is run, as it stands there but for its paths: the example directory
//! becomes the test cluster's, mount points become scratch directories. A command that this file does
//! not know fails the test, so that none is added unchecked.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkrepl_tests::binary::{blkrepl, target_dir, workspace};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::proc::{Proc, is_root, missing, run};
use blkrepl_tests::report::{human, measured, skipped_part, step};
use blkrepl_tests::wait::wait_until;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};
use rustix::process::Signal;

/// The example directory of the README.
const EXAMPLE_DIR: &str = "/tmp/blk";
/// The example mount point.
const EXAMPLE_MOUNT: &str = "/mnt/vol";
/// Where the README finds the binary.
const EXAMPLE_BINARY: &str = "target/release/blkrepl";
const LIMIT: Duration = Duration::from_secs(120);
/// The demo on a machine that is busy with a first build.
const DEMO_LIMIT: Duration = Duration::from_secs(900);

/// The commands in the fenced shell blocks of a document, continuation lines joined.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    let mut pending = String::new();
    for line in text.lines() {
        if let Some(info) = line.strip_prefix("```") {
            inside = !inside && ["sh", "bash", "console", "shell"].contains(&info.trim());
            continue;
        }
        let code = line.strip_prefix("$ ").unwrap_or(line).trim();
        if !inside || code.is_empty() || code.starts_with('#') {
            continue;
        }
        if let Some(head) = code.strip_suffix('\\') {
            pending.push_str(head);
            continue;
        }
        found.push(std::mem::take(&mut pending) + code);
    }
    found
}

#[test]
fn commands_are_found_in_shell_blocks_only() {
    let text = "```text\nno\n```\n```sh\n# comment\n$ one \\\n  two\nthree\n```\nno\n```sh\nfour\n```\n";
    assert_eq!(commands(text), ["one two", "three", "four"]);
}

fn readme() -> Result<Vec<String>> {
    let path = workspace().join("README.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let found = commands(&text);
    ensure!(found.len() >= 5, "README.md has only {} commands", found.len());
    Ok(found)
}

/// What a command needs to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// By itself: builds, the demo.
    Alone,
    /// Is what runs this test.
    TestsRun,
    /// Is how the test cluster was started.
    Dev,
    /// A client or an operator command that ends by itself.
    Plain,
    /// Stays in the foreground until it is unmounted.
    Nbdfuse,
    /// Needs the kernel's nbd module.
    NbdClient,
    /// Needs it, too, and stays in the foreground until it is ended.
    Map,
}

fn kind(command: &str) -> Option<Kind> {
    let starts = |prefix: &str| command.starts_with(prefix);
    if starts("cargo run --release -- demo") || starts("cargo build --release") {
        Some(Kind::Alone)
    } else if starts("tests/run") {
        Some(Kind::TestsRun)
    } else if starts(&format!("{EXAMPLE_BINARY} dev ")) {
        Some(Kind::Dev)
    } else if starts(&format!("{EXAMPLE_BINARY} --admin "))
        || starts(&format!("{EXAMPLE_BINARY} bench "))
        || ["nbdinfo ", "nbdcopy ", "qemu-"].iter().any(|p| starts(p))
    {
        Some(Kind::Plain)
    } else if starts("nbdfuse ") {
        Some(Kind::Nbdfuse)
    } else if starts("nbd-client ") {
        Some(Kind::NbdClient)
    } else if starts(&format!("{EXAMPLE_BINARY} map ")) {
        Some(Kind::Map)
    } else {
        None
    }
}

#[test]
fn every_command_of_the_readme_is_known_here() -> Result<()> {
    let unknown: Vec<String> = readme()?.into_iter().filter(|command| kind(command).is_none()).collect();
    ensure!(
        unknown.is_empty(),
        "README.md has commands that tests/tests/readme.rs does not run: {unknown:#?}"
    );
    Ok(())
}

#[test]
fn commands_that_need_no_cluster_run() -> Result<()> {
    let target = target_dir()?;
    for command in readme()? {
        match kind(&command) {
            Some(Kind::Alone) => {
                let started = Instant::now();
                // Not where BLKREPL_BIN points: the README's user has cargo build it.
                let mut shell = shell(&command);
                shell.env("CARGO_TARGET_DIR", &target);
                let done = run(&mut shell, DEMO_LIMIT)?.ok()?;
                measured("readme", &format!("`{command}` took {}", human(started.elapsed())));
                if command.contains("demo") {
                    println!("{}", done.stdout);
                }
            }
            Some(Kind::TestsRun) => check_tests_run(&command)?,
            _ => {}
        }
    }
    Ok(())
}

/// It cannot run itself; its options and the names of its steps can be looked at.
fn check_tests_run(command: &str) -> Result<()> {
    let script = workspace().join("tests/run");
    let mode = fs::metadata(&script)?.permissions().mode();
    ensure!(mode & 0o111 == 0o111, "tests/run is not executable");
    let list = run(shell(&format!("{command} --list")).env_remove("BLKREPL_REPORT"), LIMIT)?.ok()?;
    ensure!(list.stdout.lines().any(|line| line == "readme"), "tests/run does not run this test");
    Ok(())
}

#[test]
fn commands_against_a_cluster_run() {
    with_cluster("readme", ClusterOptions::sized(1 << 30), |cluster| {
        // The README says "n1 here".
        if cluster.wait_primary(FAILOVER_LIMIT)? != "n1" {
            cluster.cli("n1", &["move", "vol0", "--to", "n1"])?.ok()?;
        }
        for command in readme()? {
            let Some(kind) = kind(&command) else { bail!("unknown command {command}") };
            step("readme", &command);
            let ready = command
                .replace(EXAMPLE_DIR, &cluster.dir().display().to_string())
                .replace(EXAMPLE_BINARY, &blkrepl()?.display().to_string());
            match kind {
                Kind::Alone | Kind::TestsRun => {}
                Kind::Dev => check_dev(cluster, &command)?,
                Kind::Plain => run_plain(&ready)?,
                Kind::Nbdfuse => run_nbdfuse(cluster.dir(), &ready)?,
                Kind::NbdClient => run_nbd_client(&ready)?,
                Kind::Map => run_map(cluster.dir(), &ready)?,
            }
            cluster.wait_in_sync(SYNC_LIMIT)?;
        }
        Ok(())
    });
}

/// The test cluster was started by the same command; only its directory differs.
fn check_dev(cluster: &Cluster, command: &str) -> Result<()> {
    let words: Vec<&str> = command.split_whitespace().skip(2).collect();
    let expected = ["--dir", EXAMPLE_DIR, "--size", "1GiB", "--volume", "vol0"];
    ensure!(words == expected, "the README starts {words:?}; the test starts {expected:?}");
    ensure!(cluster.volume() == "vol0" && cluster.size() == 1 << 30, "the test cluster is another one");
    Ok(())
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).current_dir(workspace());
    shell
}

fn program(command: &str) -> &str {
    command.split(' ').next().unwrap_or_default()
}

fn run_plain(command: &str) -> Result<()> {
    let program = program(command);
    if !program.contains('/')
        && let Some(reason) = missing(&[program])
    {
        skipped_part("readme", &reason);
        return Ok(());
    }
    let done = run(&mut shell(command), LIMIT)?.ok()?;
    ensure!(!done.stdout.trim().is_empty() || command.contains("nbdcopy"), "`{command}` says nothing");
    Ok(())
}

fn run_nbdfuse(scratch: &Path, command: &str) -> Result<()> {
    let no_fuse = || (!Path::new("/dev/fuse").exists()).then(|| "/dev/fuse does not exist".to_owned());
    let no_root = || (!is_root()).then(|| "unmounting needs root".to_owned());
    if let Some(reason) = missing(&["nbdfuse", "umount"]).or_else(no_fuse).or_else(no_root) {
        skipped_part("readme", &reason);
        return Ok(());
    }
    let at: PathBuf = scratch.join("mount");
    fs::create_dir_all(&at)?;
    ensure!(command.contains(EXAMPLE_MOUNT), "`{command}` mounts elsewhere than {EXAMPLE_MOUNT}");
    let command = command.replace(EXAMPLE_MOUNT, &at.display().to_string());
    let mut fuse =
        Proc::spawn("nbdfuse", &mut shell(&format!("exec {command}")), &scratch.join("nbdfuse.log"))?;
    let shown = wait_until("the file that nbdfuse shows", LIMIT, || {
        fs::metadata(at.join("nbd")).is_ok_and(|meta| meta.len() == 1 << 30)
    });
    let unmounted = run(Command::new("umount").arg(&at), LIMIT)?;
    if fuse.wait(Duration::from_secs(10)).is_err() {
        fuse.end(Signal::TERM, LIMIT)?;
    }
    shown.with_context(|| format!("nbdfuse said: {}", fuse.output()))?;
    unmounted.ok().map(drop)
}

fn run_nbd_client(command: &str) -> Result<()> {
    let device = command.split_whitespace().find(|word| word.starts_with("/dev/")).unwrap_or("/dev/nbd0");
    let no_device =
        || (!Path::new(device).exists()).then(|| format!("{device} does not exist (no nbd module)"));
    let no_root = || (!is_root()).then(|| "nbd-client needs root".to_owned());
    if let Some(reason) = missing(&["nbd-client"]).or_else(no_device).or_else(no_root) {
        skipped_part("readme", &format!("`{}`: {reason}", program(command)));
        return Ok(());
    }
    run(&mut shell(command), LIMIT)?.ok()?;
    run(Command::new("nbd-client").args(["-d", device]), LIMIT)?.ok().map(drop)
}

/// What it does on a kernel with the module, and through failovers: `vm_map`.
fn run_map(scratch: &Path, command: &str) -> Result<()> {
    if let Some(reason) = (!is_root()).then_some("it needs root") {
        skipped_part("readme", &format!("`blkrepl map`: {reason}"));
        return Ok(());
    }
    let log = scratch.join("map.log");
    let mut map = Proc::spawn("map", &mut shell(&format!("exec {command}")), &log)?;
    let mut ended = None;
    wait_until("a device, or word of why there is none", LIMIT, || {
        ended = map.exited().ok().flatten();
        ended.is_some() || map.output().contains("is mapped as /dev/nbd")
    })?;
    if ended.is_some() {
        ensure!(map.output().contains("no NBD client"), "it said: {}", map.output());
        skipped_part("readme", "`blkrepl map`: no nbd module, which it says");
        return Ok(());
    }
    let blkrepl = blkrepl()?;
    run(Command::new(blkrepl).args(["unmap", "vol0"]), LIMIT)?.ok()?;
    let status = map.wait(LIMIT)?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}
