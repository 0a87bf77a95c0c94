//! The servers that Debian packages, as subjects of `compare`.
//!
//! Each is set up for what it does best on a file: io_uring and O_DIRECT where it has them. What each promises
//! when it acknowledges is in `docs/performance.md`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use blkrepl_nbd::{ClientOptions, NbdClient};
use blkrepl_tests::proc::{Proc, missing, run};
use blkrepl_tests::wait::wait_for;
use serde_json::{Value, json};

use super::subject::{Address, Daemon, EXPORT, Subject, allocated};
use super::{CompareOptions, Transport};

/// Unreplicated first, then those that replicate.
pub(super) const NAMES: [&str; 7] = [
    "nbdkit",
    "qemu-nbd",
    "nbd-server",
    "qemu-mirror",
    "qemu-quorum",
    "qemu-mirror-unix",
    "qemu-quorum-unix",
];

const START_LIMIT: Duration = Duration::from_secs(20);
/// Longest time until a mirror has copied what was there before.
const MIRROR_LIMIT: Duration = Duration::from_secs(300);
/// Longest wait for one answer of a monitor.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Starts one of them.
pub(super) fn start(name: &'static str, dir: &Path, options: &CompareOptions) -> Result<Subject> {
    let program = if name.starts_with("qemu-") && name != "qemu-nbd" { "qemu-storage-daemon" } else { name };
    if let Some(reason) = missing(&[program]) {
        bail!("{reason}");
    }
    let data = dir.join(format!("{name}.data"));
    allocated(&data, options.size)?;
    let address = Address::new(name, dir, options.transport)?;
    let log = dir.join(format!("{name}.log"));
    match name {
        "nbdkit" => nbdkit(name, &address, &data, &log),
        "qemu-nbd" => qemu_nbd(name, &address, &data, &log),
        "nbd-server" => nbd_server(name, &address, &data, dir),
        _ => replicated(name, &address, &data, dir, options),
    }
}

fn nbdkit(name: &'static str, address: &Address, data: &Path, log: &Path) -> Result<Subject> {
    let mut command = Command::new("nbdkit");
    command.arg("--foreground");
    if address.is_unix() {
        command.arg("--unix").arg(&address.socket);
    } else {
        command.args(["--ipaddr", "127.0.0.1", "--port", &address.port.to_string()]);
    }
    command.arg("file").arg(data).arg("cache=none");
    let proc = Proc::spawn(name, &mut command, log)?;
    Subject::ready(name, address.uri(""), vec![proc])
}

fn qemu_nbd(name: &'static str, address: &Address, data: &Path, log: &Path) -> Result<Subject> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--aio=io_uring", "--cache=none", "--persistent", "--shared=0"]);
    command.args(["--export-name", EXPORT]);
    if address.is_unix() {
        command.arg("--socket").arg(&address.socket);
    } else {
        command.args(["--bind", "127.0.0.1", "--port", &address.port.to_string()]);
    }
    command.arg(data);
    let proc = Proc::spawn(name, &mut command, log)?;
    Subject::ready(name, address.uri(EXPORT), vec![proc])
}

/// It goes to the background by itself and names its pid in a file.
fn nbd_server(name: &'static str, address: &Address, data: &Path, dir: &Path) -> Result<Subject> {
    let (config, pid_file) = (dir.join("nbd-server.conf"), dir.join("nbd-server.pid"));
    let mut text = format!("[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nport = {}\n", address.port);
    if address.is_unix() {
        text += &format!("unixsock = {}\n", address.socket.display());
    }
    text += &format!("[{EXPORT}]\nexportname = {}\nflush = true\nfua = true\n", data.display());
    std::fs::write(&config, text).context("write the config of nbd-server")?;
    let mut command = Command::new("nbd-server");
    command.arg("-C").arg(&config).arg("-p").arg(&pid_file);
    // A daemon keeps the descriptors of its parent, so its output is not waited for.
    let mut parent = Proc::spawn(name, &mut command, &dir.join("nbd-server.log"))?;
    parent.wait(START_LIMIT)?;
    let pid = wait_for("nbd-server to name its pid", START_LIMIT, || {
        Ok(std::fs::read_to_string(&pid_file)?.trim().parse::<u32>()?)
    })?;
    let daemon = Daemon { pid, needle: config.display().to_string() };
    let subject = Subject::ready(name, address.uri(EXPORT), Vec::new())?;
    Ok(Subject { pids: vec![pid], daemon: Some(daemon), ..subject })
}

/// qemu-storage-daemon with a second one behind it: over TCP, or, what two machines could not do, over a unix socket,
/// which has no Nagle's algorithm to wait for.
fn replicated(
    name: &'static str,
    address: &Address,
    data: &Path,
    dir: &Path,
    options: &CompareOptions,
) -> Result<Subject> {
    let other_data = dir.join(format!("{name}.other"));
    allocated(&other_data, options.size)?;
    let transport = if name.ends_with("-unix") { Transport::Unix } else { Transport::Tcp };
    let behind = Address::new(&format!("{name}-other"), dir, transport)?;
    let mut other = Command::new("qemu-storage-daemon");
    add_file(&mut other, "file", &other_data);
    other.args(["--nbd-server", &listen_on(&behind)]);
    add_export(&mut other, "file");
    let other = Proc::spawn(name, &mut other, &dir.join(format!("{name}-other.log")))?;
    wait_for("the second server", START_LIMIT, || {
        Ok(NbdClient::connect(&behind.uri(EXPORT), ClientOptions::default())?.disconnect()?)
    })?;
    let mut command = Command::new("qemu-storage-daemon");
    add_file(&mut command, "here", data);
    let there = if behind.is_unix() {
        json!({"type": "unix", "path": behind.socket.display().to_string()})
    } else {
        json!({"type": "inet", "host": "127.0.0.1", "port": behind.port.to_string()})
    };
    let there = json!({"driver": "nbd", "node-name": "there", "export": EXPORT, "server": there});
    command.args(["--blockdev", &there.to_string()]);
    let monitor = dir.join(format!("{name}.qmp"));
    let is_quorum = name.starts_with("qemu-quorum");
    if is_quorum {
        let quorum = json!({"driver": "quorum", "node-name": "both", "vote-threshold": 2,
            "read-pattern": "fifo", "children": ["here", "there"]});
        command.args(["--blockdev", &quorum.to_string()]);
    } else {
        command.args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", monitor.display())]);
        command.args(["--monitor", "chardev=qmp"]);
    }
    command.args(["--nbd-server", &listen_on(address)]);
    add_export(&mut command, if is_quorum { "both" } else { "here" });
    let server = Proc::spawn(name, &mut command, &dir.join(format!("{name}.log")))?;
    let subject = Subject::ready(name, address.uri(EXPORT), vec![server, other])?;
    if !is_quorum {
        start_mirror(&monitor)?;
    }
    Ok(Subject { is_replicated_peer: true, ..subject })
}

/// Where a qemu-storage-daemon listens.
fn listen_on(address: &Address) -> String {
    if address.is_unix() {
        format!("addr.type=unix,addr.path={}", address.socket.display())
    } else {
        format!("addr.type=inet,addr.host=127.0.0.1,addr.port={}", address.port)
    }
}

fn add_file(command: &mut Command, node: &str, path: &Path) {
    let file = json!({"driver": "file", "node-name": node, "filename": path.display().to_string(),
        "aio": "io_uring", "cache": {"direct": true}});
    command.args(["--blockdev", &file.to_string()]);
}

fn add_export(command: &mut Command, node: &str) {
    let export = format!("type=nbd,id=export,node-name={node},name={EXPORT},writable=on");
    command.args(["--export", &export]);
}

/// Mirrors `here` to `there`; from then on a write is answered when both have it.
fn start_mirror(monitor: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(monitor)?;
    qmp.call("qmp_capabilities", json!({}))?;
    let arguments = json!({"job-id": "mirror", "device": "here", "target": "there", "sync": "full",
        "copy-mode": "write-blocking"});
    qmp.call("blockdev-mirror", arguments)?;
    wait_for("the mirror to be ready", MIRROR_LIMIT, || {
        let jobs = qmp.call("query-jobs", json!({}))?;
        let status = jobs[0]["status"].as_str().unwrap_or("gone").to_owned();
        ensure!(status == "ready", "the mirror is {status}: {jobs}");
        Ok(())
    })
}

/// A monitor of QEMU.
struct Qmp {
    write: UnixStream,
    read: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let write = wait_for("the monitor", START_LIMIT, || Ok(UnixStream::connect(path)?))?;
        write.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut read = BufReader::new(write.try_clone()?);
        let mut greeting = String::new();
        read.read_line(&mut greeting).context("read the monitor's greeting")?;
        Ok(Self { write, read })
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.write, "{request}").context("write to the monitor")?;
        loop {
            let mut line = String::new();
            ensure!(self.read.read_line(&mut line)? > 0, "the monitor is gone");
            let mut answer: Value = serde_json::from_str(&line).context("parse the monitor's answer")?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            // Events stand between the answers.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

/// Versions of the peers, for the output; those that are missing are left out.
pub(super) fn versions() -> Vec<String> {
    let programs = ["nbdkit", "qemu-nbd", "nbd-server", "qemu-storage-daemon"];
    programs.iter().filter_map(|program| version(program).ok()).collect()
}

fn version(program: &str) -> Result<String> {
    let flag = if program == "nbd-server" { "-V" } else { "--version" };
    let done = run(Command::new(program).arg(flag), START_LIMIT)?;
    let text = done.text();
    let line = text.lines().find(|line| line.contains(char::is_numeric));
    line.map(|line| line.trim().to_owned()).ok_or_else(|| anyhow!("{program} names no version"))
}
