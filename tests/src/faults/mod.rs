//! Random faults on real processes, several at once, and the end of all of them.
//!
//! The faults stay within what the product promises to survive: a disk fails only while the other replica
//! is well, and that one is then left alone until the sick one is back (with no other copy, an error is all
//! that a client can get). No byte of a client's link is damaged: NBD has no checksums.

mod arena;
mod kind;
mod strike;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;

use crate::binary::blkrepl;
use crate::bits::Random;
use crate::cluster::Cluster;
use crate::disk::Sickness;
use crate::proc::{self, Finished};
use crate::status::VolumeStatus;
use crate::wait::wait_for;
pub use arena::{Arena, SIZE};
pub use kind::{Kind, Weights};

/// Longest time from the end of the faults to service, and to all replicas in sync.
pub const HEAL_LIMIT: Duration = Duration::from_secs(60);
/// How long a replica may be failed before the operator of these tests restarts its node.
const FAILED_GRACE: Duration = Duration::from_secs(1);
/// How long the other replica is left alone after a disk works again.
const WELL_GRACE: Duration = Duration::from_millis(1500);

/// A cluster to which bad things happen.
pub struct Faults<'a> {
    cluster: &'a mut Cluster,
    arena: &'a Arena,
    random: Random,
    weights: Weights,
    names: Vec<String>,
    data: Vec<String>,
    dead: BTreeSet<String>,
    paused: BTreeSet<String>,
    /// Node whose disk fails or has failed; the other replica is left alone then.
    sick: Option<String>,
    /// Since when that disk works again.
    well_since: Option<Instant>,
    cables: bool,
    demoted: bool,
    commands: Vec<JoinHandle<Result<Finished>>>,
    told: Vec<String>,
    counts: BTreeMap<Kind, u64>,
    failed: BTreeMap<String, u64>,
    begun: Instant,
}

impl<'a> Faults<'a> {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// If the cluster's nodes are not known.
    pub fn new(cluster: &'a mut Cluster, arena: &'a Arena, seed: u64) -> Result<Self> {
        let names = cluster.nodes()?.into_iter().map(|n| n.name).collect();
        let data = cluster.data_nodes()?.into_iter().map(|n| n.name).collect();
        Ok(Self {
            cluster,
            arena,
            random: Random::new(seed),
            weights: Weights::default(),
            names,
            data,
            dead: BTreeSet::new(),
            paused: BTreeSet::new(),
            sick: None,
            well_since: None,
            cables: false,
            demoted: false,
            commands: Vec::new(),
            told: Vec::new(),
            counts: BTreeMap::new(),
            failed: BTreeMap::new(),
            begun: Instant::now(),
        })
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&mut self) -> &mut Cluster {
        self.cluster
    }

    /// What has happened since the last [`Self::begin_round`].
    #[must_use]
    pub fn told(&self) -> String {
        self.told.join("\n")
    }

    /// Faults so far, by kind.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<Kind, u64> {
        &self.counts
    }

    /// Replicas that said that they failed, and were started anew, by node.
    #[must_use]
    pub fn failed(&self) -> &BTreeMap<String, u64> {
        &self.failed
    }

    /// Draws what this round is made of.
    pub fn begin_round(&mut self) {
        self.told.clear();
        self.begun = Instant::now();
        self.weights = Weights::draw(self.arena, &mut self.random);
        self.tell(format!("kinds {:?}", self.weights));
    }

    /// One fault, perhaps something put right again, and a pause: often short, sometimes long enough for a
    /// whole failover.
    ///
    /// # Errors
    /// Where a fault cannot be done: the harness's or the machine's trouble.
    pub fn act(&mut self) -> Result<()> {
        let mut done = false;
        // What is drawn may not be possible now; then something is put right, until it is.
        for _ in 0..20 {
            let kind = self.weights.pick(&mut self.random);
            done = self.inject(kind).with_context(|| format!("{kind:?}"))?;
            if done {
                *self.counts.entry(kind).or_default() += 1;
                break;
            }
            self.mend_one()?;
        }
        if !done {
            done = self.inject(Kind::Move)?;
            *self.counts.entry(Kind::Move).or_default() += 1;
        }
        if self.random.chance(1, 16) {
            self.mend_all()?;
        } else if done && self.random.chance(2, 3) {
            self.mend_one()?;
        }
        let most = if self.random.chance(1, 5) { 1000 } else { 120 };
        std::thread::sleep(Duration::from_millis(self.random.below(most)));
        Ok(())
    }

    fn tell(&mut self, what: String) {
        self.told.push(format!("{:>6} ms {what}", self.begun.elapsed().as_millis()));
    }

    fn any(&mut self, of_data: bool) -> String {
        let names = if of_data { &self.data } else { &self.names };
        let index = self.random.below(names.len() as u64);
        names[usize::try_from(index).expect("a small number")].clone()
    }

    /// False for the replica that must carry on alone while the other's disk fails.
    fn may_harm(&self, node: &str) -> bool {
        self.sick.as_deref().is_none_or(|sick| sick == node || !self.data.iter().any(|name| name == node))
    }

    fn is_up(&self, node: &str) -> bool {
        !self.dead.contains(node) && !self.paused.contains(node)
    }

    fn kill(&mut self, nodes: &[String]) -> Result<()> {
        self.tell(format!("kill {nodes:?}"));
        for node in nodes {
            self.cluster.signal(node, Signal::KILL)?;
        }
        // A process that waits for its disk in the kernel is not gone before it has the answer [R7].
        for disk in self.arena.devices.values().map(crate::disk::Device::disk) {
            if disk.sickness().hung {
                disk.set(Sickness::default());
            }
        }
        for node in nodes {
            self.cluster.wait_gone(node)?;
            self.paused.remove(node);
            self.dead.insert(node.clone());
        }
        Ok(())
    }

    fn start(&mut self, node: &str) -> Result<()> {
        if self.dead.remove(node) {
            self.tell(format!("start {node}"));
            self.cluster.restart(node)?;
        }
        Ok(())
    }

    fn wake(&mut self, node: &str) -> Result<()> {
        if self.paused.remove(node) {
            self.tell(format!("wake {node}"));
            self.cluster.signal(node, Signal::CONT)?;
        }
        Ok(())
    }

    /// Runs a command beside whatever else happens; it may be refused.
    fn command(&mut self, node: &str, args: &[&str]) -> Result<()> {
        self.tell(format!("{args:?} at {node}"));
        let mut command = Command::new(blkrepl()?);
        command.arg("--admin").arg(&self.cluster.node(node)?.admin).args(args);
        self.commands.push(std::thread::spawn(move || proc::run(&mut command, HEAL_LIMIT)));
        Ok(())
    }

    /// Puts one thing right, if anything is wrong.
    fn mend_one(&mut self) -> Result<()> {
        let sick_links: Vec<usize> = (0..self.arena.links.len())
            .filter(|at| self.arena.links[*at].proxy.condition() != Default::default())
            .collect();
        let wrong = [
            !self.dead.is_empty(),
            !self.paused.is_empty(),
            !sick_links.is_empty(),
            self.cables,
            self.sick.is_some(),
            self.demoted,
        ];
        let options: Vec<usize> = (0..wrong.len()).filter(|at| wrong[*at]).collect();
        let Some(what) = self.one_of(&options) else { return Ok(()) };
        match what {
            0 => {
                let dead: Vec<String> = self.dead.iter().cloned().collect();
                let node = self.one_of(&dead).unwrap_or_default();
                self.start(&node)
            }
            1 => {
                let paused: Vec<String> = self.paused.iter().cloned().collect();
                let node = self.one_of(&paused).unwrap_or_default();
                self.wake(&node)
            }
            2 => {
                let at = self.one_of(&sick_links).unwrap_or_default();
                self.mend_link(at);
                Ok(())
            }
            3 => self.mend_cables(),
            4 => self.mend_disks(),
            _ => {
                let node = self.any(true);
                self.demoted = false;
                self.command(&node, &["promote", "vol0"])
            }
        }
    }

    /// Puts everything right, without waiting for what comes of it.
    fn mend_all(&mut self) -> Result<()> {
        (0..self.arena.links.len()).for_each(|at| self.mend_link(at));
        self.mend_cables()?;
        for node in self.names.clone() {
            self.wake(&node)?;
            self.start(&node)?;
        }
        Ok(())
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        let len = of.len() as u64;
        (len > 0).then(|| of[usize::try_from(self.random.below(len)).unwrap_or(0)].clone())
    }

    fn mend_link(&mut self, at: usize) {
        let broken = self.random.chance(1, 3);
        let proxy = &self.arena.links[at].proxy;
        let wrong = proxy.condition() != Default::default();
        proxy.heal(broken);
        if wrong {
            let name = proxy.name().to_owned();
            self.tell(format!("heal {name} (broken: {broken})"));
        }
    }

    fn mend_cables(&mut self) -> Result<()> {
        if let Some(bridge) = &self.arena.bridge
            && std::mem::take(&mut self.cables)
        {
            bridge.heal()?;
            self.tell("heal all cables".to_owned());
        }
        Ok(())
    }

    /// The disk is well again; whether its replica is in sync again decides when the other may be harmed.
    fn mend_disks(&mut self) -> Result<()> {
        let Some(node) = self.sick.clone() else { return Ok(()) };
        self.well_disks();
        if self.well_since.is_none() {
            self.tell(format!("the disk of {node} is well"));
        }
        self.wake(&node)?;
        self.start(&node)?;
        if self.restart_failed(None)? {
            return Ok(());
        }
        // What failed before may still be on its way to the other replica for its copy.
        let since = *self.well_since.get_or_insert_with(Instant::now);
        let whole = || self.cluster.volume_status().is_ok_and(|volume| volume.all_in_sync().is_ok());
        if since.elapsed() >= WELL_GRACE && whole() {
            (self.sick, self.well_since) = (None, None);
        }
        Ok(())
    }

    fn well_disks(&self) {
        self.arena.devices.values().for_each(|device| device.disk().set(Sickness::default()));
        self.arena.rooms.values().for_each(arena::Tmpfs::free);
    }

    /// Restarts nodes whose replica says that it failed: what an operator does once the disk is well. True
    /// if there was one. `since`: how long each has been seen failed.
    fn restart_failed(&mut self, since: Option<&mut BTreeMap<String, Instant>>) -> Result<bool> {
        let mut found = false;
        let mut seen = since;
        for node in self.data.clone() {
            if !self.is_up(&node) {
                continue;
            }
            let failed = self.replica_state(&node).is_some_and(|state| state == "failed");
            if !failed {
                if let Some(seen) = seen.as_deref_mut() {
                    seen.remove(&node);
                }
                continue;
            }
            found = true;
            if let Some(seen) = seen.as_deref_mut() {
                let first = *seen.entry(node.clone()).or_insert_with(Instant::now);
                if first.elapsed() < FAILED_GRACE {
                    continue;
                }
                seen.remove(&node);
            }
            self.tell(format!("the replica of {node} failed"));
            *self.failed.entry(node.clone()).or_default() += 1;
            self.kill(std::slice::from_ref(&node))?;
            self.start(&node)?;
        }
        Ok(found)
    }

    /// What a node says of its own replica.
    fn replica_state(&self, node: &str) -> Option<String> {
        let status = self.cluster.status_of(node).ok()?;
        let volume = status.volume(self.cluster.volume()).ok()?.clone();
        volume.replica(node).ok().map(|replica| replica.state.clone())
    }

    /// Ends all faults and waits until the volume is served; time that took.
    ///
    /// # Errors
    /// If it is not served after [`HEAL_LIMIT`], or an operator's command ended oddly.
    pub fn heal(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.tell("heal everything".to_owned());
        self.well_disks();
        self.mend_all()?;
        for command in std::mem::take(&mut self.commands) {
            let done = command.join().map_err(|_| anyhow!("a command's thread died"))??;
            ensure!([0, 1].contains(&done.code()), "{}: exit code {}", done.shown, done.code());
        }
        self.demoted = false;
        let mut failed = BTreeMap::new();
        wait_for("service", HEAL_LIMIT, || {
            self.restart_failed(Some(&mut failed))?;
            self.serve_again()
        })?;
        Ok(begun.elapsed())
    }

    /// Whether every node that we started runs: one that ended by itself is a finding.
    fn all_run(&self) -> Result<()> {
        for node in self.names.iter().filter(|node| !self.dead.contains(*node)) {
            if !self.cluster.runs(node)? {
                bail!("{node} has ended by itself: {}", proc::tail(&self.cluster.log(node)));
            }
        }
        Ok(())
    }

    /// Promotes, if the volume was demoted: only an operator ends that. Whoever is eligible says so.
    fn serve_again(&self) -> Result<()> {
        if self.cluster.volume_status()?.primary.is_some() {
            return self.cluster.wait_primary(Duration::from_secs(1)).map(drop);
        }
        let mut answers = Vec::new();
        for node in &self.data {
            let done = self.cluster.cli(node, &["promote", "vol0"])?;
            if done.code() == 0 {
                return Ok(());
            }
            answers.push(done.stderr);
        }
        bail!("nobody can be promoted: {}", answers.join("; "))
    }

    /// Waits until every replica is in sync again; nobody's disk is sick from then on.
    ///
    /// # Errors
    /// After [`HEAL_LIMIT`].
    pub fn wait_in_sync(&mut self) -> Result<VolumeStatus> {
        let mut failed = BTreeMap::new();
        let volume = wait_for("every replica in sync", HEAL_LIMIT, || {
            self.all_run()?;
            self.restart_failed(Some(&mut failed))?;
            let volume = self.cluster.volume_status()?;
            volume.all_in_sync()?;
            Ok(volume)
        })?;
        (self.sick, self.well_since) = (None, None);
        Ok(volume)
    }
}
