//! A cluster of real node processes in a directory of its own: started by `blkrepl dev`, or by hand
//! with `init` and `serve` where a test needs more nodes or other paths than `dev` gives.
//!
//! At most one cluster runs per test process (two cores would only make tests wait for each other);
//! it holds a slot for that. A node is ended by the pid that we started or that `cluster.json` names,
//! after a look at its command line. Dropping the cluster ends whatever of it still runs.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::binary::blkrepl;
use crate::netns::NetNs;
use crate::plan::{self, NodePlan};
use crate::proc::{self, Finished, Proc};
use crate::status::{ClusterFile, NodeEntry, Status, VolumeStatus};
use crate::usage::Memory;
use crate::wait::{wait_for, wait_until};

/// Longest time until a fresh cluster serves its volume.
pub const START_LIMIT: Duration = Duration::from_secs(40);
/// Longest time until a volume has a primary again after a failure.
pub const FAILOVER_LIMIT: Duration = Duration::from_secs(30);
/// Longest time until a returned replica is in sync again (small test volumes).
pub const SYNC_LIMIT: Duration = Duration::from_secs(90);
/// Longest time for one operator command.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Longest time for a clean stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Lowest port that is given to a node.
const PORT_MIN: u16 = 20_000;

static SLOT: Mutex<()> = Mutex::new(());

/// What kind of cluster a test wants.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Size of the volume in bytes.
    pub size: u64,
    /// Lease length in milliseconds; the product's default where none is given.
    pub lease_ms: Option<u64>,
    /// Data nodes.
    pub data_nodes: u64,
    /// Whether a witness is added to them (by hand only; `dev` always has one).
    pub witness: bool,
    /// True: config files written here, `init` and `serve` per node; false: `blkrepl dev`.
    pub by_hand: bool,
    /// Where a node's data file lies, if not in its directory; by node name (by hand only).
    pub data_paths: BTreeMap<String, PathBuf>,
    /// Whether the volume is created (by hand only; `dev` always creates it).
    pub create_volume: bool,
    /// Directory in which the cluster gets its own; where scratch directories are if not given.
    pub base: Option<PathBuf>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            size: 64 << 20,
            lease_ms: None,
            data_nodes: 2,
            witness: true,
            by_hand: false,
            data_paths: BTreeMap::new(),
            create_volume: true,
            base: None,
        }
    }
}

impl ClusterOptions {
    /// Two data nodes and a witness under `dev`, with that volume size and the default timing.
    #[must_use]
    pub fn sized(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// The same with a short lease, so that many failovers fit into a test run.
    #[must_use]
    pub fn quick(size: u64) -> Self {
        Self { size, lease_ms: Some(500), ..Self::default() }
    }

    /// That many data nodes and a witness, configured by hand.
    #[must_use]
    pub fn by_hand(size: u64, data_nodes: u64) -> Self {
        Self { size, data_nodes, by_hand: true, ..Self::default() }
    }
}

/// A running (or stopped) cluster.
pub struct Cluster {
    dir: PathBuf,
    volume: String,
    options: ClusterOptions,
    supervisor: Option<Proc>,
    children: BTreeMap<String, Proc>,
    entries: Vec<NodeEntry>,
    /// Network namespaces of nodes that do not run in ours.
    netns: BTreeMap<String, Arc<NetNs>>,
    // Removed last, after every process is gone.
    _temp: TempDir,
    _slot: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts a cluster and waits until its volume is served and every replica is in sync.
    ///
    /// # Errors
    /// Where a process fails, with its log.
    pub fn start(options: ClusterOptions) -> Result<Self> {
        let mut cluster = Self::prepare(options)?;
        cluster.start_all()?;
        Ok(cluster)
    }

    /// Makes the directory (and, by hand, the config files) without starting anything.
    ///
    /// # Errors
    /// Where the directory cannot be made.
    pub fn prepare(options: ClusterOptions) -> Result<Self> {
        Self::prepare_wired(options, |_| Ok(()))
    }

    /// The same, with a last word on where the nodes listen, how they reach each other and where they run
    /// (by hand only).
    ///
    /// # Errors
    /// As [`Self::prepare`], and what `wire` returns.
    pub fn prepare_wired(
        options: ClusterOptions,
        wire: impl FnOnce(&mut [NodePlan]) -> Result<()>,
    ) -> Result<Self> {
        let slot = SLOT.lock().unwrap_or_else(PoisonError::into_inner);
        let temp = match &options.base {
            Some(base) => scratch_dir_in(base)?,
            None => scratch_dir()?,
        };
        let dir = temp.path().canonicalize().context("resolve the scratch directory")?;
        let mut cluster = Self {
            dir,
            volume: "vol0".to_owned(),
            options,
            supervisor: None,
            children: BTreeMap::new(),
            entries: Vec::new(),
            netns: BTreeMap::new(),
            _temp: temp,
            _slot: slot,
        };
        if cluster.options.by_hand {
            cluster.write_configs(wire)?;
        }
        Ok(cluster)
    }

    /// Starts every node that does not run, and waits until the volume is in sync. A cluster that was
    /// stopped, or whose nodes were all killed, carries on with its data.
    ///
    /// # Errors
    /// Where a process fails, with its log.
    pub fn start_all(&mut self) -> Result<()> {
        if self.options.by_hand {
            for entry in self.entries.clone() {
                if !entry.config.with_file_name("control.redb").exists() {
                    self.command(&["init".as_ref(), "--config".as_ref(), entry.config.as_os_str()])?.ok()?;
                }
            }
            for entry in self.entries.clone() {
                if !self.children.contains_key(&entry.name) {
                    self.spawn_node(&entry)?;
                }
            }
            if self.options.create_volume {
                self.create_volume_once()?;
            }
        } else if self.supervisor.is_none() {
            let dev = self.spawn_dev()?;
            self.supervisor = Some(dev);
        }
        if self.options.create_volume {
            self.wait_in_sync(START_LIMIT)?;
        }
        Ok(())
    }

    /// The cluster's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the volume.
    #[must_use]
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.options.size
    }

    /// The nodes, as `cluster.json` (or the config written by hand) has them now.
    ///
    /// # Errors
    /// If the file is missing or not what design section 9 says.
    pub fn nodes(&self) -> Result<Vec<NodeEntry>> {
        if self.options.by_hand {
            return Ok(self.entries.clone());
        }
        let path = self.dir.join("cluster.json");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let file: ClusterFile =
            serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
        ensure!(file.volume == self.volume, "cluster.json names volume {:?}", file.volume);
        Ok(file.nodes)
    }

    /// The data nodes.
    ///
    /// # Errors
    /// As [`Self::nodes`].
    pub fn data_nodes(&self) -> Result<Vec<NodeEntry>> {
        Ok(self.nodes()?.into_iter().filter(NodeEntry::is_data).collect())
    }

    /// One node.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn node(&self, name: &str) -> Result<NodeEntry> {
        self.nodes()?.into_iter().find(|n| n.name == name).ok_or_else(|| anyhow!("no node {name}"))
    }

    /// Bytes that the data file of each replica takes.
    ///
    /// # Errors
    /// As [`Self::nodes`], or where a file cannot be looked at.
    pub fn space(&self) -> Result<Vec<u64>> {
        let nodes = self.data_nodes()?;
        nodes.iter().map(|node| Ok(fs::metadata(node.data()?)?.blocks() * 512)).collect()
    }

    /// Name of the witness.
    ///
    /// # Errors
    /// If there is none.
    pub fn witness(&self) -> Result<String> {
        self.nodes()?.into_iter().find(|n| !n.is_data()).map(|n| n.name).ok_or_else(|| anyhow!("no witness"))
    }

    /// NBD addresses (unix sockets) of all data nodes, for a client that looks for the primary.
    ///
    /// # Errors
    /// As [`Self::nodes`].
    pub fn targets(&self) -> Result<Vec<String>> {
        self.data_nodes()?.iter().map(|n| n.unix().map(str::to_owned)).collect()
    }

    /// NBD addresses over TCP of all data nodes.
    ///
    /// # Errors
    /// As [`Self::nodes`].
    pub fn tcp_targets(&self) -> Result<Vec<String>> {
        self.data_nodes()?.iter().map(|n| n.tcp().map(str::to_owned)).collect()
    }

    /// Runs `blkrepl --admin SOCKET ARGS` against a node.
    ///
    /// # Errors
    /// Only if it cannot be run or hangs; look at the exit code.
    pub fn cli(&self, node: &str, args: &[&str]) -> Result<Finished> {
        let entry = self.node(node)?;
        let mut command = Command::new(blkrepl()?);
        command.arg("--admin").arg(&entry.admin).args(args);
        proc::run(&mut command, COMMAND_LIMIT)
    }

    /// `status --json` as that node sees it.
    ///
    /// # Errors
    /// If the node does not answer or answers something else.
    pub fn status_of(&self, node: &str) -> Result<Status> {
        let done = self.cli(node, &["status", "--json"])?.ok()?;
        serde_json::from_str(&done.stdout).with_context(|| format!("parse status of {node}: {}", done.stdout))
    }

    /// The volume's status as the primary sees it; where there is none, as the first node that answers.
    ///
    /// # Errors
    /// If no node answers.
    pub fn volume_status(&self) -> Result<VolumeStatus> {
        let mut last = anyhow!("no node in the cluster");
        let mut fallback = None;
        for node in self.nodes()? {
            if !self.runs(&node.name)? || self.pid(&node).is_some_and(proc::pid_stopped) {
                continue;
            }
            let seen = self.status_of(&node.name).and_then(|s| s.volume(&self.volume).cloned());
            match seen {
                Ok(volume) if volume.primary.as_deref() == Some(&node.name) => return Ok(volume),
                Ok(volume) => {
                    // The newest view wins among those that are not the primary's own.
                    if fallback.as_ref().is_none_or(|f: &VolumeStatus| f.epoch < volume.epoch) {
                        fallback = Some(volume);
                    }
                }
                Err(reason) => last = reason,
            }
        }
        fallback.ok_or(last)
    }

    /// All events that a node keeps, as JSON values.
    ///
    /// # Errors
    /// If the node does not answer, or not with JSON (one array, or one value per line).
    pub fn events(&self, node: &str) -> Result<Vec<serde_json::Value>> {
        let done = self.cli(node, &["events", "--json"])?.ok()?;
        let mut events = Vec::new();
        for value in serde_json::Deserializer::from_str(&done.stdout).into_iter::<serde_json::Value>() {
            match value.with_context(|| format!("parse events of {node}"))? {
                serde_json::Value::Array(items) => events.extend(items),
                other => events.push(other),
            }
        }
        Ok(events)
    }

    /// Waits until a primary is named that runs and accepts an NBD client; its name.
    ///
    /// # Errors
    /// After `limit`.
    pub fn wait_primary(&self, limit: Duration) -> Result<String> {
        wait_for("a primary that serves", limit, || {
            let volume = self.volume_status()?;
            let primary = volume.primary.ok_or_else(|| anyhow!("no primary at epoch {}", volume.epoch))?;
            ensure!(self.runs(&primary)?, "primary {primary} does not run");
            let entry = self.node(&primary)?;
            // From where the other clients are: those on the node's own machine are another client host.
            let address = if self.netns.contains_key(&primary) { entry.tcp()? } else { entry.unix()? };
            crate::client::Link::connect(address, Duration::from_secs(2))
                .map_err(|e| anyhow!("{primary} refuses: {e}"))?;
            Ok(primary)
        })
    }

    /// Waits until every replica is in the in-sync set and lacks nothing; the volume's status then.
    ///
    /// # Errors
    /// After `limit`, with what was missing and the logs of processes that died.
    pub fn wait_in_sync(&self, limit: Duration) -> Result<VolumeStatus> {
        wait_for("every replica in sync", limit, || {
            let volume = self.volume_status()?;
            volume.all_in_sync()?;
            Ok(volume)
        })
        .map_err(|reason| match &self.supervisor {
            Some(dev) => reason.context(format!("dev said: {}", proc::tail(&dev.output()))),
            None => reason,
        })
    }

    /// Creates a volume with its first member on the first of `replicas`, once the cluster accepts it; nothing
    /// if it exists.
    ///
    /// # Errors
    /// After [`START_LIMIT`].
    pub fn create_volume(&self, volume: &str, size: u64, replicas: &[&str]) -> Result<()> {
        let first = replicas.first().ok_or_else(|| anyhow!("a volume without replicas"))?;
        let (size, replicas) = (size.to_string(), replicas.join(","));
        wait_for("the cluster to accept a volume", START_LIMIT, || {
            if self.status_of(first)?.volume(volume).is_err() {
                let args = ["volume", "create", volume, "--size", &size, "--replicas", &replicas];
                self.cli(first, &args)?.ok()?;
            }
            Ok(())
        })
    }

    /// Waits until every replica of these volumes is in sync, as `node` sees it.
    ///
    /// # Errors
    /// After `limit`, with what was missing.
    pub fn wait_volumes_in_sync(&self, node: &str, volumes: &[&str], limit: Duration) -> Result<()> {
        wait_for("the volumes in sync", limit, || {
            let status = self.status_of(node)?;
            volumes.iter().try_for_each(|volume| status.volume(volume)?.all_in_sync())
        })
    }

    /// Waits until a node is no member of these volumes any more, as `seen_by` sees it.
    ///
    /// # Errors
    /// After `limit`.
    pub fn wait_removed(&self, seen_by: &str, volumes: &[&str], node: &str, limit: Duration) -> Result<()> {
        wait_for("the member to be removed", limit, || {
            let status = self.status_of(seen_by)?;
            for volume in volumes {
                let members = &status.volume(volume)?.in_sync;
                ensure!(!members.iter().any(|member| member == node), "{node} is still a member of {volume}");
            }
            Ok(())
        })
    }

    /// The data node that is not primary.
    ///
    /// # Errors
    /// If there is no primary.
    pub fn secondary(&self) -> Result<String> {
        let volume = self.volume_status()?;
        let primary = volume.primary.ok_or_else(|| anyhow!("no primary"))?;
        let other = volume.replicas.into_iter().map(|r| r.node).find(|n| *n != primary);
        other.ok_or_else(|| anyhow!("no replica beside {primary}"))
    }

    /// Whether a node's process runs.
    ///
    /// # Errors
    /// As [`Self::nodes`].
    pub fn runs(&self, node: &str) -> Result<bool> {
        let entry = self.node(node)?;
        Ok(self.pid(&entry).is_some_and(|pid| proc::pid_runs(pid, &needle(&entry))))
    }

    /// Pid of a node's process.
    ///
    /// # Errors
    /// If it has none.
    pub fn process(&self, node: &str) -> Result<u32> {
        self.pid(&self.node(node)?).ok_or_else(|| anyhow!("{node} has no pid"))
    }

    /// Memory of a node's process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn memory(&self, node: &str) -> Result<Memory> {
        Memory::of(self.process(node)?)
    }

    /// Sends a signal to a node's process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn signal(&mut self, node: &str, signal: Signal) -> Result<()> {
        if let Some(child) = self.children.get_mut(node) {
            // Ours until it is reaped, so the pid is its own, also before it has called exec.
            if let Some(status) = child.exited()? {
                bail!("{node} has ended by itself ({status}): {}", proc::tail(&child.output()));
            }
            return child.signal(signal);
        }
        let entry = self.node(node)?;
        let pid = self.pid(&entry).ok_or_else(|| anyhow!("{node} has no pid"))?;
        proc::signal_pid(pid, &needle(&entry), signal).with_context(|| format!("signal {node}"))
    }

    /// Ends a node with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// If it did not run.
    pub fn kill(&mut self, node: &str) -> Result<()> {
        self.signal(node, Signal::KILL)?;
        self.wait_gone(node)
    }

    /// Ends several nodes with SIGKILL, all signals sent before waiting for any.
    ///
    /// # Errors
    /// If one of them did not run.
    pub fn kill_at_once(&mut self, nodes: &[String]) -> Result<()> {
        for node in nodes {
            self.signal(node, Signal::KILL)?;
        }
        nodes.iter().try_for_each(|node| self.wait_gone(node))
    }

    /// Ends a node with SIGTERM, which it takes as a clean stop.
    ///
    /// # Errors
    /// If it did not run or does not end.
    pub fn stop_node(&mut self, node: &str) -> Result<()> {
        self.signal(node, Signal::TERM)?;
        self.wait_gone(node)
    }

    /// Waits until a node that got its signal is gone.
    ///
    /// # Errors
    /// After [`STOP_LIMIT`].
    pub fn wait_gone(&mut self, node: &str) -> Result<()> {
        if let Some(mut child) = self.children.remove(node) {
            child.wait(STOP_LIMIT)?;
            return Ok(());
        }
        wait_until(&format!("the end of {node}"), STOP_LIMIT, || !self.runs(node).unwrap_or(false))
    }

    /// Starts a node under another program that executes it (a helper of the tests), by hand only.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart_under(&mut self, node: &str, helper: &Path) -> Result<()> {
        let entry = self.node(node)?;
        let mut command = Command::new(helper);
        command.arg(blkrepl()?);
        self.spawn_serve(&entry, command).map(drop)
    }

    /// Starts a node that was killed, the way an operator does: `blkrepl serve --config FILE`.
    ///
    /// # Errors
    /// If it cannot be started, or `cluster.json` does not show the new pid.
    pub fn restart(&mut self, node: &str) -> Result<()> {
        let entry = self.node(node)?;
        let pid = self.spawn_node(&entry)?;
        if !self.options.by_hand {
            wait_for("the new pid in cluster.json", START_LIMIT, || {
                let shown = self.node(node)?.pid;
                ensure!(shown == Some(pid), "cluster.json shows pid {shown:?} for {node}, it is {pid}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Runs a node's `serve` in the foreground and waits for its end, for starts that are to fail.
    ///
    /// # Errors
    /// If it has not ended within `limit` (it is killed).
    pub fn serve_until_end(&self, node: &str, limit: Duration) -> Result<Finished> {
        let entry = self.node(node)?;
        proc::run(Command::new(blkrepl()?).arg("serve").arg("--config").arg(&entry.config), limit)
    }

    /// Runs the binary with arguments that need no node.
    ///
    /// # Errors
    /// If it cannot be run or hangs.
    pub fn command(&self, args: &[&std::ffi::OsStr]) -> Result<Finished> {
        proc::run(Command::new(blkrepl()?).args(args), COMMAND_LIMIT)
    }

    /// Ends the whole cluster as an operator does (Ctrl-C for `dev`, SIGTERM per node otherwise).
    ///
    /// # Errors
    /// If a process has to be killed, or `dev` does not exit with 0.
    pub fn stop(&mut self) -> Result<()> {
        let mut trouble = Vec::new();
        if let Some(mut dev) = self.supervisor.take() {
            match dev.end(Signal::INT, STOP_LIMIT) {
                Ok(status) if status.success() => {}
                Ok(status) => trouble.push(format!("dev ended with {status}: {}", proc::tail(&dev.output()))),
                Err(reason) => trouble.push(format!("{reason:#}")),
            }
        } else {
            for child in self.children.values_mut() {
                child.signal(Signal::TERM)?;
            }
        }
        for (name, mut child) in std::mem::take(&mut self.children) {
            if let Err(reason) = child.wait(STOP_LIMIT) {
                trouble.push(format!("{name}: {reason:#}"));
            }
        }
        for entry in self.nodes().unwrap_or_default() {
            if self.pid(&entry).is_some_and(|pid| proc::pid_runs(pid, &needle(&entry))) {
                trouble.push(format!("{} still runs after the stop", entry.name));
            }
        }
        ensure!(trouble.is_empty(), "stop: {}", trouble.join("; "));
        Ok(())
    }

    /// Compares the data objects of all replicas byte for byte. The volume must be in sync and nobody
    /// may write to it.
    ///
    /// # Errors
    /// Names the first block that differs.
    pub fn compare_replicas(&self) -> Result<()> {
        let nodes = self.data_nodes()?;
        let [first, rest @ ..] = nodes.as_slice() else {
            bail!("no data nodes");
        };
        for other in rest {
            crate::files::compare(first.data()?, other.data()?, self.options.size)
                .with_context(|| format!("replicas of {} and {}", first.name, other.name))?;
        }
        Ok(())
    }

    /// Ends what still runs, without a word: for drops and failed tests.
    fn end_hard(&mut self) {
        if let Some(mut dev) = self.supervisor.take() {
            let _ = dev.end(Signal::INT, Duration::from_secs(5));
        }
        self.children.clear();
        let deadline = Instant::now() + Duration::from_secs(5);
        for entry in self.nodes().unwrap_or_default() {
            if let Some(pid) = self.pid(&entry) {
                let _ = proc::signal_pid(pid, &needle(&entry), Signal::KILL);
                while proc::pid_runs(pid, &needle(&entry)) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn pid(&self, entry: &NodeEntry) -> Option<u32> {
        self.children.get(&entry.name).map(Proc::pid).or(entry.pid)
    }

    /// What a node that this harness started has logged.
    #[must_use]
    pub fn log(&self, node: &str) -> String {
        fs::read_to_string(self.log_path(node)).unwrap_or_default()
    }

    fn log_path(&self, node: &str) -> PathBuf {
        self.dir.join(format!("{node}.harness.log"))
    }

    fn spawn_node(&mut self, entry: &NodeEntry) -> Result<u32> {
        self.spawn_serve(entry, Command::new(blkrepl()?))
    }

    fn spawn_serve(&mut self, entry: &NodeEntry, mut command: Command) -> Result<u32> {
        let log = self.log_path(&entry.name);
        command.arg("serve").arg("--config").arg(&entry.config);
        let child = match self.netns.get(&entry.name) {
            Some(netns) => netns.within(|| Proc::spawn(&entry.name, &mut command, &log))?,
            None => Proc::spawn(&entry.name, &mut command, &log)?,
        };
        let pid = child.pid();
        self.children.insert(entry.name.clone(), child);
        Ok(pid)
    }

    fn spawn_dev(&self) -> Result<Proc> {
        let mut command = Command::new(blkrepl()?);
        command.arg("dev").arg("--dir").arg(&self.dir);
        command.args(["--size", &self.options.size.to_string(), "--volume", &self.volume]);
        if let Some(lease_ms) = self.options.lease_ms {
            command.args(["--leases", &lease_ms.to_string()]);
        }
        Proc::spawn("dev", &mut command, &self.dir.join("dev.harness.log"))
    }

    fn create_volume_once(&self) -> Result<()> {
        let data: Vec<String> = self.data_nodes()?.into_iter().map(|n| n.name).collect();
        let replicas: Vec<&str> = data.iter().map(String::as_str).collect();
        self.create_volume(&self.volume, self.options.size, &replicas)
    }

    fn write_configs(&mut self, wire: impl FnOnce(&mut [NodePlan]) -> Result<()>) -> Result<()> {
        let data_nodes = self.options.data_nodes;
        let count = data_nodes + u64::from(self.options.witness);
        let ports = free_ports(usize::try_from(count)? * 3)?;
        let mut plans = Vec::new();
        for (id, ports) in (1..=count).zip(ports.chunks_exact(3)) {
            let dir = self.dir.join(format!("n{id}"));
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
            let mut plan = NodePlan::new(id, id <= data_nodes, dir, [ports[0], ports[1], ports[2]]);
            plan.data_path = self.options.data_paths.get(&plan.name).cloned();
            plans.push(plan);
        }
        wire(&mut plans)?;
        let timing = plan::timing(self.options.lease_ms);
        for plan in &plans {
            let entry = plan.entry(&self.volume);
            let text = plan.config(&plans, &timing, &self.volume);
            fs::write(&entry.config, text).with_context(|| format!("write {}", entry.config.display()))?;
            self.entries.push(entry);
            if let Some(netns) = &plan.netns {
                self.netns.insert(plan.name.clone(), Arc::clone(netns));
            }
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end_hard();
    }
}

/// A fresh directory on a real disk: under `BLKREPL_TEST_DIR`, else under /var/tmp (often /tmp is in
/// memory, where O_DIRECT may be refused), with a short path because of the unix sockets in it.
///
/// # Errors
/// If it cannot be made.
pub fn scratch_dir() -> Result<TempDir> {
    let base = std::env::var_os("BLKREPL_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    scratch_dir_in(&base)
}

fn scratch_dir_in(base: &Path) -> Result<TempDir> {
    tempfile::Builder::new().prefix("blkrepl-").tempdir_in(base).with_context(|| {
        format!("make a directory under {}; set BLKREPL_TEST_DIR to one that is writable", base.display())
    })
}

/// Loopback ports that nobody listens on at the moment, all different, and none given out twice by this
/// process. They lie below those that the kernel gives to outgoing connections, so that a node that is
/// started again finds its port free.
///
/// # Errors
/// If there are not so many.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let low = range.split_whitespace().next().and_then(|n| n.parse::<u16>().ok()).unwrap_or(32_768);
    let end = if low > PORT_MIN + 1000 { low } else { u16::MAX };
    let span = u32::from(end - PORT_MIN);
    // Other test processes begin elsewhere.
    let start = std::process::id().wrapping_mul(389);
    let mut ports = Vec::new();
    for _ in 0..span {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORT_MIN + u16::try_from(start.wrapping_add(step) % span)?;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            ports.push(port);
        }
        if ports.len() == count {
            return Ok(ports);
        }
    }
    bail!("there are not {count} free ports between {PORT_MIN} and {end} on 127.0.0.1; end what uses them")
}

fn needle(entry: &NodeEntry) -> String {
    entry.config.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_lie_below_those_of_outgoing_connections_and_are_not_given_twice() {
        let (a, b) = (free_ports(8).unwrap(), free_ports(8).unwrap());
        assert!(a.iter().all(|port| !b.contains(port)));
        let outgoing = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let lowest = outgoing.map(|l| l.local_addr().unwrap().port()).min().unwrap();
        assert!(a.iter().chain(&b).all(|port| (PORT_MIN..lowest).contains(port)), "{a:?} {b:?} {lowest}");
    }

    #[test]
    fn config_written_by_hand_is_toml_with_one_table_per_founder() {
        let cluster = Cluster::prepare(ClusterOptions::by_hand(1 << 20, 3)).unwrap();
        let nodes = cluster.nodes().unwrap();
        assert_eq!(nodes.iter().filter(|n| n.is_data()).count(), 3);
        for node in &nodes {
            let text = fs::read_to_string(&node.config).unwrap();
            let value: toml::Table = toml::from_str(&text).unwrap();
            assert_eq!(value["node"]["name"].as_str(), Some(node.name.as_str()));
            assert_eq!(value["cluster"].as_array().unwrap().len(), 4);
        }
        assert_eq!(cluster.witness().unwrap(), "n4");
    }

    #[test]
    fn without_a_witness_every_node_holds_data() {
        let options = ClusterOptions { witness: false, ..ClusterOptions::by_hand(1 << 20, 3) };
        let cluster = Cluster::prepare(options).unwrap();
        assert_eq!(cluster.data_nodes().unwrap().len(), 3);
        assert!(cluster.witness().is_err());
    }
}
