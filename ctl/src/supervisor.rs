//! Three nodes on loopback as child processes, for `dev` and `demo`.
//!
//! Lays the directory out once (node.toml with ports that stay), starts each node with this very
//! executable, sees who runs through the nodes' own locks (so also a node that somebody started again by
//! hand), ends them by process id. It never restarts a node on its own and never touches a volume's
//! files. Child processes have a process group of their own, so that a Ctrl-C at the terminal reaches
//! the supervisor alone, which then ends the nodes in order.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use blkrepl_engine::durable;
use rustix::process::Signal;

use crate::cli::TimingArgs;
use crate::cluster_json::{ClusterJson, NodeJson};
use crate::config::{self, Kind, LEASE_MS_DEFAULT, NodeConfig};
use crate::node_dir::{self, PID_FILE};

/// How long nodes get for a clean stop before they are killed.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Lock file of a `dev` directory.
pub const DEV_LOCK: &str = "dev.lock";
/// Lowest port that is given to a node.
const PORT_MIN: u16 = 20_000;

/// One node of the three.
pub struct ManagedNode {
    /// Its config, as it stands in its node.toml.
    pub config: NodeConfig,
    child: Option<Child>,
}

/// The three nodes.
pub struct Supervisor {
    /// The directory, absolute.
    pub dir: PathBuf,
    /// Name of the volume.
    pub volume: String,
    /// The nodes by id.
    pub nodes: Vec<ManagedNode>,
    exe: PathBuf,
}

/// A child that ended since somebody looked last.
pub struct Ended {
    /// Name of the node.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// How.
    pub how: String,
    /// Its config, to start it again.
    pub config: PathBuf,
}

/// Times for node.toml, in milliseconds; what is not given follows from the lease.
pub fn timing_section(args: &TimingArgs) -> String {
    let lease = args.leases.unwrap_or(LEASE_MS_DEFAULT);
    let scale = |default: u64, floor: u64| (default * lease / LEASE_MS_DEFAULT).max(floor);
    let renew = args.renew.unwrap_or_else(|| scale(config::RENEW_MS_DEFAULT, 20));
    let heartbeat = args.heartbeat.unwrap_or_else(|| scale(config::HEARTBEAT_MS_DEFAULT, 10));
    let election = args.election.unwrap_or_else(|| scale(config::ELECTION_MIN_MS_DEFAULT, 3 * heartbeat));
    format!(
        "[timing]\nlease_ms = {lease}\nrenew_ms = {renew}\nheartbeat_ms = {heartbeat}\nelection_min_ms = \
        {election}\nelection_max_ms = {}\n",
        election * 2
    )
}

impl Supervisor {
    /// Opens a directory, laying it out if it is new. `timing` is written into the nodes' configs where
    /// the user gave any (also into those that exist).
    ///
    /// # Errors
    /// The directory cannot be used, or a config in it is not good.
    pub fn open(dir: &Path, volume: &str, timing: &TimingArgs) -> anyhow::Result<Self> {
        config::check_name(volume).map_err(anyhow::Error::msg)?;
        let dir = std::path::absolute(dir)?;
        let exe = std::env::current_exe().context("cannot find the path of this executable")?;
        let names = ["n1", "n2", "n3"];
        let socket = dir.join("n1").join("admin.sock");
        if socket.as_os_str().len() > config::UNIX_PATH_MAX {
            bail!(
                "the path {} is too long for a unix socket (at most {} bytes); use a directory with a \
                shorter path",
                socket.display(),
                config::UNIX_PATH_MAX
            );
        }
        if names.iter().any(|n| !dir.join(n).join("node.toml").exists()) {
            lay_out(&dir, &names, timing)?;
        } else if timing.is_given() {
            for name in names {
                set_timing(&dir.join(name).join("node.toml"), timing)?;
            }
        }
        let mut nodes = Vec::new();
        for name in names {
            let config = config::load(&dir.join(name).join("node.toml"))?;
            nodes.push(ManagedNode { config, child: None });
        }
        Ok(Self { dir, volume: volume.to_string(), nodes, exe })
    }

    /// Starts every node that does not run. Nodes that run already (left over by a supervisor that was
    /// killed, or started by hand) are taken over as they are.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        for index in 0..self.nodes.len() {
            if self.pid(index).is_none() {
                self.start(index)?;
            }
        }
        Ok(())
    }

    /// Starts one node.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(&mut self, index: usize) -> anyhow::Result<u32> {
        let node = &mut self.nodes[index];
        if let Some(mut old) = node.child.take() {
            old.wait().context("cannot reap the node's former process")?;
        }
        let log_path = node.config.dir.join("log");
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .with_context(|| format!("cannot open the log {}", log_path.display()))?;
        let child = Command::new(&self.exe)
            .arg("serve")
            .arg("--config")
            .arg(&node.config.file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {} for {}", self.exe.display(), node.config.name))?;
        let pid = child.id();
        node.child = Some(child);
        Ok(pid)
    }

    /// The process that runs as this node at the moment.
    pub fn pid(&self, index: usize) -> Option<u32> {
        node_dir::holder(&self.nodes[index].config.dir, PID_FILE)
    }

    /// Children that ended since the last call.
    pub fn reap(&mut self) -> Vec<Ended> {
        let mut ended = Vec::new();
        for node in &mut self.nodes {
            let Some(child) = &mut node.child else { continue };
            if let Ok(Some(status)) = child.try_wait() {
                ended.push(Ended {
                    name: node.config.name.clone(),
                    pid: child.id(),
                    how: describe_exit(status),
                    config: node.config.file.clone(),
                });
                node.child = None;
            }
        }
        ended
    }

    /// The nodes as cluster.json shows them now.
    pub fn cluster_json(&self, size: u64) -> ClusterJson {
        let nodes = (0..self.nodes.len()).map(|index| self.node_json(index)).collect();
        ClusterJson { volume: self.volume.clone(), size, nodes }
    }

    fn node_json(&self, index: usize) -> NodeJson {
        let config = &self.nodes[index].config;
        let data = config.kind == Kind::Data;
        let (data_path, meta_path) = config.volume_paths(&self.volume);
        NodeJson {
            id: config.id.0,
            name: config.name.clone(),
            kind: config.kind.word().to_string(),
            pid: self.pid(index),
            nbd_unix: data
                .then(|| format!("nbd+unix:///{}?socket={}", self.volume, config.nbd_unix.display())),
            nbd_tcp: config.nbd_tcp.filter(|_| data).map(|addr| format!("nbd://{addr}/{}", self.volume)),
            admin: config.admin.clone(),
            config: config.file.clone(),
            data: data.then_some(data_path),
            meta: data.then_some(meta_path),
        }
    }

    /// Ends all nodes cleanly (SIGTERM, all at once) and waits. Names those that had to be killed.
    pub fn stop_all(&mut self) -> Vec<String> {
        let running = (0..self.nodes.len()).map(|index| self.pid(index)).collect();
        self.stop(running)
    }

    /// Ends the nodes that this supervisor started, and leaves those alone that ran before.
    pub fn stop_started(&mut self) {
        self.stop(vec![None; self.nodes.len()]);
    }

    /// Ends what was started and, by node, what else is named.
    fn stop(&mut self, others: Vec<Option<u32>>) -> Vec<String> {
        let mut pids: Vec<(String, u32)> = Vec::new();
        for (node, other) in self.nodes.iter().zip(others) {
            // A child that just started may not have taken its lock yet.
            let child = node.child.as_ref().map(Child::id);
            for pid in [other, child].into_iter().flatten() {
                if !pids.iter().any(|(_, p)| *p == pid) {
                    pids.push((node.config.name.clone(), pid));
                }
            }
        }
        for (_, pid) in &pids {
            node_dir::signal(*pid, Signal::TERM);
            // A node that somebody paused must wake up to stop.
            node_dir::signal(*pid, Signal::CONT);
        }
        let give_up = Instant::now() + STOP_TIMEOUT;
        loop {
            self.reap();
            pids.retain(|(_, pid)| node_dir::is_running(*pid));
            if pids.is_empty() || Instant::now() >= give_up {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for (_, pid) in &pids {
            node_dir::signal(*pid, Signal::KILL);
        }
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take()
                && let Err(error) = child.wait()
            {
                tracing::warn!("cannot reap {}: {error}", node.config.name);
            }
        }
        pids.into_iter().map(|(name, _)| name).collect()
    }

    /// The last lines of a node's log, for an error message.
    pub fn log_tail(&self, index: usize) -> String {
        let text = std::fs::read(self.nodes[index].config.dir.join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl TimingArgs {
    /// True if the user gave any.
    pub fn is_given(&self) -> bool {
        self.leases.or(self.renew).or(self.heartbeat).or(self.election).is_some()
    }
}

/// A process's end in words.
pub fn describe_exit(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended cleanly".to_string(),
        (Some(code), _) => format!("ended with exit code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".to_string(),
    }
}

fn lay_out(dir: &Path, names: &[&str], timing: &TimingArgs) -> anyhow::Result<()> {
    let ports = free_ports(8)?;
    let addr = |index: usize| format!("127.0.0.1:{}", ports[index]);
    let kind = |index: usize| if index == 2 { "witness" } else { "data" };
    let mut cluster = String::new();
    for (index, name) in names.iter().enumerate() {
        write!(
            cluster,
            "\n[[cluster]]\nid = {}\nname = \"{name}\"\nkind = \"{}\"\ncontrol = \"{}\"\npeer = \"{}\"\n",
            index + 1,
            kind(index),
            addr(index),
            addr(3 + index)
        )?;
        if index < 2 {
            writeln!(cluster, "nbd = \"{}\"", addr(6 + index))?;
        }
    }
    for (index, name) in names.iter().enumerate() {
        let mut text = format!(
            "# Made by blkrepl dev. `blkrepl serve --config` this file starts the node.\n[node]\nid = \
            {}\nname = \"{name}\"\nkind = \"{}\"\n\n[listen]\ncontrol = \"{}\"\npeer = \"{}\"\n",
            index + 1,
            kind(index),
            addr(index),
            addr(3 + index)
        );
        if index < 2 {
            writeln!(text, "nbd_tcp = \"{}\"", addr(6 + index))?;
        }
        write!(text, "\n{}{cluster}", timing_section(timing))?;
        let node_dir = dir.join(name);
        durable::create_dir_all(&node_dir)
            .with_context(|| format!("cannot create {}", node_dir.display()))?;
        let file = node_dir.join("node.toml");
        let config = config::parse(&file, &text).context("the timing given does not fit together")?;
        crate::init::ensure(&config)?;
        // Last, so that a directory that was laid out halfway is laid out again.
        durable::replace(&file, text.as_bytes())
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn set_timing(file: &Path, timing: &TimingArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let (mut kept, mut inside) = (String::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            inside = line.trim() == "[timing]";
        }
        if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept.push('\n');
    kept.push_str(&timing_section(timing));
    config::parse(file, &kept).context("the timing given does not fit together")?;
    durable::replace(file, kept.as_bytes()).with_context(|| format!("cannot write {}", file.display()))
}

/// Ports on loopback that nobody listens on and that the kernel gives to no outgoing connection, so
/// that a node that is started again finds its port free.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let low = range.split_whitespace().next().and_then(|n| n.parse::<u16>().ok()).unwrap_or(32_768);
    let (from, to) = if low > PORT_MIN + 1000 { (PORT_MIN, low) } else { (PORT_MIN, u16::MAX) };
    // Different starts keep two supervisors that run at once apart.
    let spread = u64::from(std::process::id()) * 97 + crate::events::wall_ms();
    let span = u64::from(to - from);
    let mut held = Vec::new();
    for step in 0..span {
        let port = from + u16::try_from((spread + step * 7) % span).unwrap_or(0);
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push((port, listener));
        }
        if held.len() == count {
            return Ok(held.into_iter().map(|(port, _)| port).collect());
        }
    }
    bail!("cannot find {count} free ports between {from} and {to} on 127.0.0.1; end what uses them")
}

#[cfg(test)]
mod tests {
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ports_are_free_and_different() {
        let mut ports = free_ports(8).unwrap();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 8);
    }

    #[test]
    fn a_laid_out_directory_opens_again_with_the_same_ports_and_new_timing() {
        let dir = tempfile::tempdir().unwrap();
        let first = Supervisor::open(dir.path(), "vol0", &TimingArgs::default()).unwrap();
        let timing = TimingArgs { leases: Some(600), ..TimingArgs::default() };
        let second = Supervisor::open(dir.path(), "vol0", &timing).unwrap();
        for (a, b) in first.nodes.iter().zip(&second.nodes) {
            assert_eq!(a.config.control, b.config.control);
            assert_eq!(a.config.founders, b.config.founders);
        }
        assert_eq!(second.nodes[0].config.timing.lease, Duration::from_millis(600));
        assert_eq!(second.nodes[2].config.kind, Kind::Witness);
        let json = second.cluster_json(4096);
        assert!(
            json.nodes[0].nbd_unix.as_deref().is_some_and(|uri| uri.starts_with("nbd+unix:///vol0?socket=/"))
        );
        assert_eq!((json.nodes[2].data.as_ref(), json.nodes[0].pid), (None, None));
    }

    fn config_with(timing: &TimingArgs) -> Result<NodeConfig, config::ConfigError> {
        let addrs = "control = \"127.0.0.1:1\"\npeer = \"127.0.0.1:2\"";
        let node = "id = 1\nname = \"n1\"\nkind = \"data\"";
        let timing = timing_section(timing);
        let text = format!("[node]\n{node}\n[listen]\n{addrs}\n{timing}[[cluster]]\n{node}\n{addrs}\n");
        config::parse(Path::new("/d/n1/node.toml"), &text)
    }

    proptest! {
        #[test]
        fn times_that_follow_from_others_fit_and_times_that_do_not_fit_are_refused(
            leases in option::of(100..=60_000u64), heartbeat in option::of(10..=60_000u64),
            renew in option::of(10..=60_000u64), election in option::of(20..=60_000u64),
        ) {
            let timing = TimingArgs { leases, renew: None, heartbeat, election: None };
            let followed = config_with(&timing).unwrap().timing;
            prop_assert_eq!(followed.lease.as_millis(), u128::from(leases.unwrap_or(LEASE_MS_DEFAULT)));
            let fits = renew.is_none_or(|ms| Duration::from_millis(2 * ms) <= followed.lease)
                && election.is_none_or(|ms| followed.heartbeat * 2 <= Duration::from_millis(ms));
            let read = config_with(&TimingArgs { renew, election, ..timing });
            prop_assert_eq!(read.is_ok(), fits, "{:?}", read);
        }
    }
}
