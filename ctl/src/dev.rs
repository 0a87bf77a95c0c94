//! `blkrepl dev`: two data nodes and a witness on loopback until interrupted, and a true cluster.json.
//!
//! A directory that exists is carried on with. A node that dies stays dead until somebody starts it
//! again with `blkrepl serve`; cluster.json follows within [`TICK`]. Ctrl-C ends every node cleanly,
//! whoever started it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use blkrepl_engine::durable;

use crate::admin::client::{self, AskError};
use crate::admin::{Done, DurabilityWord, Request, SharingWord, StatusView};
use crate::cli::{DevArgs, TimingArgs};
use crate::cluster_json::{self, ClusterJson};
use crate::node_dir::DirLock;
use crate::signals::Interrupt;
use crate::supervisor::{DEV_LOCK, Supervisor};

/// How often nodes are looked at.
pub const TICK: Duration = Duration::from_millis(100);
/// How long the cluster may take to form and the volume to be created on a first start.
const FORM_TIMEOUT: Duration = Duration::from_secs(60);

/// A running cluster of three on loopback, with its cluster.json.
pub struct DevCluster {
    /// The nodes.
    pub supervisor: Supervisor,
    shown: Option<ClusterJson>,
    size: u64,
    _lock: DirLock,
}

impl DevCluster {
    /// Locks the directory, lays it out if new, starts what does not run, waits until the cluster is
    /// formed and the volume exists, and writes cluster.json.
    ///
    /// # Errors
    /// What is in the way; nodes that were started are ended again.
    pub fn start(
        dir: &Path,
        volume: &str,
        size: u64,
        durability: DurabilityWord,
        timing: &TimingArgs,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        durable::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let lock = DirLock::take(&dir, DEV_LOCK, "dev")?;
        let known = cluster_json::read(&dir).filter(|known| known.volume == volume);
        let mut dev = Self {
            supervisor: Supervisor::open(&dir, volume, timing)?,
            shown: None,
            size: known.as_ref().map_or(size, |known| known.size),
            _lock: lock,
        };
        let started = dev.supervisor.start_all().and_then(|()| match known {
            // Carried on with: tools may look at once, even if not all nodes can start.
            Some(_) => {
                dev.try_refresh(&mut None);
                Ok(())
            }
            None => dev.form(size, durability, interrupt),
        });
        if let Err(error) = started.and_then(|()| dev.set_lease(timing, interrupt)) {
            // Ctrl-C ends every node; what only could not be done leaves alone who served before.
            if interrupt.is_set() {
                dev.supervisor.stop_all();
            } else {
                dev.supervisor.stop_started();
            }
            return Err(error);
        }
        Ok(dev)
    }

    /// Index of the node with this name.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.supervisor.nodes.iter().position(|n| n.config.name == name)
    }

    /// Status from a node that answers; one that knows the Raft leader is preferred, since what another
    /// one has applied may be old.
    ///
    /// # Errors
    /// None answers: the last error.
    pub fn status(&self) -> Result<StatusView, AskError> {
        best_status(&self.admins())
    }

    fn admins(&self) -> Vec<PathBuf> {
        self.supervisor.nodes.iter().map(|node| node.config.admin.clone()).collect()
    }

    /// Brings cluster.json up to date.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn refresh(&mut self) -> anyhow::Result<()> {
        let now = self.supervisor.cluster_json(self.size);
        if self.shown.as_ref() != Some(&now) {
            cluster_json::write(&self.supervisor.dir, &now).with_context(|| {
                format!("cannot write {}", self.supervisor.dir.join(cluster_json::FILE_NAME).display())
            })?;
            self.shown = Some(now);
        }
        Ok(())
    }

    /// Brings cluster.json up to date, or says once why that fails. On a full disk, say: the nodes run on, so their
    /// supervisor does, and tries again.
    fn try_refresh(&mut self, told: &mut Option<String>) {
        let error = self.refresh().err().map(|error| format!("{error:#}"));
        if let Some(error) = error.as_ref().filter(|_| error != *told) {
            eprintln!("blkrepl dev: {error}");
        }
        *told = error;
    }

    fn form(&mut self, size: u64, durability: DurabilityWord, interrupt: &Interrupt) -> anyhow::Result<()> {
        let give_up = Instant::now() + FORM_TIMEOUT;
        let mut reason = "no node has answered yet".to_string();
        while Instant::now() < give_up {
            self.check_children(interrupt)?;
            match self.try_form(size, durability) {
                Ok(size) => {
                    self.size = size;
                    return self.refresh();
                }
                Err(error) => reason = error.to_string(),
            }
            std::thread::sleep(TICK);
        }
        bail!(
            "the cluster did not come up within {} s: {reason}; see the file `log` in each node's \
            directory under {}",
            FORM_TIMEOUT.as_secs(),
            self.supervisor.dir.display()
        )
    }

    /// One attempt: the size of the volume once it exists.
    fn try_form(&self, size: u64, durability: DurabilityWord) -> anyhow::Result<u64> {
        let view = self.status()?;
        if view.cluster.is_none() {
            bail!("the cluster is not formed yet");
        }
        if let Some(volume) = view.volumes.iter().find(|v| v.name == self.supervisor.volume) {
            return Ok(volume.size);
        }
        if let Some(missing) = view.nodes.iter().find(|n| n.boot == 0) {
            bail!("{} has not registered yet", missing.name);
        }
        let request = Request::VolumeCreate {
            volume: self.supervisor.volume.clone(),
            size,
            replicas: Vec::new(),
            durability,
            sharing: SharingWord::Exclusive,
        };
        let admin = &self.supervisor.nodes[0].config.admin;
        let done: Done = client::ask(admin, &request, client::ANSWER_TIMEOUT)?;
        tracing::debug!("{}", done.text);
        Ok(size)
    }

    /// The lease length is cluster state: a directory that exists has to be told of another one.
    fn set_lease(&mut self, timing: &TimingArgs, interrupt: &Interrupt) -> anyhow::Result<()> {
        let Some(ms) = timing.leases else { return Ok(()) };
        let give_up = Instant::now() + FORM_TIMEOUT;
        loop {
            self.check_children(interrupt)?;
            let admin = &self.supervisor.nodes[0].config.admin;
            let result = client::ask::<Done>(admin, &Request::SetLease { ms }, client::ANSWER_TIMEOUT);
            match result {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= give_up => {
                    return Err(anyhow::Error::new(error).context("cannot set the lease length"));
                }
                Err(_) => std::thread::sleep(TICK),
            }
        }
    }

    fn check_children(&mut self, interrupt: &Interrupt) -> anyhow::Result<()> {
        if interrupt.is_set() {
            bail!("interrupted");
        }
        let Some(ended) = self.supervisor.reap().into_iter().next() else { return Ok(()) };
        let index = self.index(&ended.name).unwrap_or(0);
        bail!(
            "{} {} at its start; its log ends with:\n{}",
            ended.name,
            ended.how,
            self.supervisor.log_tail(index)
        )
    }
}

/// Runs `blkrepl dev` until interrupted.
///
/// # Errors
/// The cluster cannot be started, or a node did not stop cleanly.
pub fn run(args: &DevArgs) -> anyhow::Result<()> {
    let interrupt = Interrupt::install().context("cannot install signal handlers")?;
    let durability = args.durability.into();
    let mut dev =
        DevCluster::start(&args.dir, &args.volume, args.size, durability, &args.timing, &interrupt)?;
    println!("{}", usage(&dev));
    watch_service(dev.admins(), args.volume.clone(), interrupt.clone());
    let mut told = None;
    while !interrupt.is_set() {
        for ended in dev.supervisor.reap() {
            println!(
                "{} (process {}) {}; start it again with: blkrepl serve --config {}",
                ended.name,
                ended.pid,
                ended.how,
                ended.config.display()
            );
        }
        dev.try_refresh(&mut told);
        std::thread::sleep(TICK);
    }
    println!("stopping");
    let killed = dev.supervisor.stop_all();
    let refreshed = dev.refresh();
    if !killed.is_empty() {
        bail!(
            "{} did not stop in time and had to be killed; see the log in its directory",
            killed.join(", ")
        );
    }
    refreshed
}

/// Tells who serves the volume whenever that changes, until interrupted. On a thread of its own: a node that is
/// stopped (SIGSTOP) keeps who asks it waiting, and cluster.json must stay true meanwhile.
fn watch_service(admins: Vec<PathBuf>, volume: String, interrupt: Interrupt) {
    std::thread::spawn(move || {
        let mut served_by: Option<String> = None;
        while !interrupt.is_set() {
            let now = serving_node(&admins, &volume);
            if now != served_by && !interrupt.is_set() {
                match &now {
                    Some(node) => println!("{node} serves {volume}"),
                    None => println!("nobody serves {volume}"),
                }
                served_by = now;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

fn serving_node(admins: &[PathBuf], volume: &str) -> Option<String> {
    let view = best_status(admins).ok()?;
    let volume = view.volumes.into_iter().find(|v| v.name == volume)?;
    volume.primary.filter(|_| volume.serving)
}

fn best_status(admins: &[PathBuf]) -> Result<StatusView, AskError> {
    let mut error = AskError::Refused("there is no node".to_string());
    let mut second_best: Option<StatusView> = None;
    for admin in admins {
        match client::status(admin) {
            Ok(view) if view.leader.is_some() => return Ok(view),
            Ok(view) if second_best.as_ref().is_none_or(|b| b.cluster.is_none()) => {
                second_best = Some(view);
            }
            Ok(_) => {}
            Err(e) => error = e,
        }
    }
    second_best.ok_or(error)
}

/// How to use a running cluster.
pub fn usage(dev: &DevCluster) -> String {
    let nodes = &dev.supervisor.nodes;
    let volume = &dev.supervisor.volume;
    let admin = nodes[0].config.admin.display();
    let mut text = format!(
        "cluster in {} (cluster.json there names processes and sockets)\n  status    blkrepl --admin \
        {admin} status\n  attach    to the node that status calls primary:\n",
        dev.supervisor.dir.display(),
    );
    for node in nodes.iter().filter(|n| n.config.nbd_tcp.is_some()) {
        let (name, socket) = (&node.config.name, node.config.nbd_unix.display());
        text.push_str(&format!(
            "    {name}: nbd-client -unix {socket} -N {volume} /dev/nbd0\n        nbdfuse DIR/disk \
            'nbd+unix:///{volume}?socket={socket}'\n        qemu-system-x86_64 -drive \
            'file=nbd+unix:///{volume}?socket={socket},format=raw'\n"
        ));
        if let Some(addr) = node.config.nbd_tcp {
            text.push_str(&format!("        nbdinfo nbd://{addr}/{volume}\n"));
        }
    }
    text.push_str(&format!("  move      blkrepl --admin {admin} move {volume} --to n2\n  stop      Ctrl-C"));
    text
}
