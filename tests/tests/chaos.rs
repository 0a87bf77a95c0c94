//! Faults and operator commands at random, several at once, under a verifying load: nodes killed and started
//! again (in the middle of a resync, all of them at once), paused and woken, moves, demotions and promotions
//! racing with all of that. After each round everything is healed; then no acknowledged write is lost, no
//! block is torn, no read went back, and the replicas are byte-identical. `ROUNDS` and `BLKREPL_SEED` as for
//! the other tests.

use std::collections::BTreeSet;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::bits::{Random, fresh_seed};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::proc::{self, Finished};
use blkrepl_tests::report::{human, measured, step};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};
use rustix::process::Signal;

const SIZE: u64 = 64 << 20;
/// Faults and commands in one round.
const ACTIONS: u64 = 8;
/// Longest time from the end of the faults to service.
const HEAL_LIMIT: Duration = Duration::from_secs(60);

fn rounds() -> u32 {
    std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// A cluster to which bad things happen.
struct Chaos<'a> {
    cluster: &'a mut Cluster,
    random: Random,
    names: Vec<String>,
    data: Vec<String>,
    dead: BTreeSet<String>,
    paused: BTreeSet<String>,
    commands: Vec<JoinHandle<Result<Finished>>>,
    told: Vec<String>,
}

impl<'a> Chaos<'a> {
    fn new(cluster: &'a mut Cluster, seed: u64) -> Result<Self> {
        let names = cluster.nodes()?.into_iter().map(|n| n.name).collect();
        let data = cluster.data_nodes()?.into_iter().map(|n| n.name).collect();
        let (dead, paused, random) = (BTreeSet::new(), BTreeSet::new(), Random::new(seed));
        Ok(Self { cluster, random, names, data, dead, paused, commands: Vec::new(), told: Vec::new() })
    }

    fn any(&mut self, of_data: bool) -> String {
        let names = if of_data { &self.data } else { &self.names };
        let index = self.random.below(names.len() as u64);
        names[usize::try_from(index).expect("a small number")].clone()
    }

    fn act(&mut self) -> Result<()> {
        let node = self.any(false);
        match self.random.below(16) {
            0..=4 => self.kill(&[node])?,
            5..=7 => self.start(&node)?,
            8..=9 => self.pause(&node)?,
            10..=11 => self.wake(&node)?,
            12 => {
                let all = self.names.clone();
                self.kill(&all)?;
            }
            13 => {
                let (at, to) = (self.any(true), self.any(true));
                self.command(&at, &["move", "vol0", "--to", &to])?;
            }
            14 => {
                let at = self.any(true);
                self.command(&at, &["promote", "vol0"])?;
            }
            _ => {
                let at = self.any(true);
                self.command(&at, &["demote", "vol0"])?;
            }
        }
        // Often at once, sometimes long enough for a whole failover.
        let most = if self.random.chance(1, 4) { 2500 } else { 300 };
        std::thread::sleep(Duration::from_millis(self.random.below(most)));
        Ok(())
    }

    fn kill(&mut self, nodes: &[String]) -> Result<()> {
        let alive: Vec<String> = nodes.iter().filter(|n| !self.dead.contains(*n)).cloned().collect();
        self.told.push(format!("kill {alive:?}"));
        self.cluster.kill_at_once(&alive)?;
        for node in alive {
            self.paused.remove(&node);
            self.dead.insert(node);
        }
        Ok(())
    }

    fn start(&mut self, node: &str) -> Result<()> {
        if self.dead.remove(node) {
            self.told.push(format!("start {node}"));
            self.cluster.restart(node)?;
        }
        Ok(())
    }

    fn pause(&mut self, node: &str) -> Result<()> {
        if !self.dead.contains(node) && self.paused.insert(node.to_owned()) {
            self.told.push(format!("pause {node}"));
            self.cluster.signal(node, Signal::STOP)?;
        }
        Ok(())
    }

    fn wake(&mut self, node: &str) -> Result<()> {
        if self.paused.remove(node) {
            self.told.push(format!("wake {node}"));
            self.cluster.signal(node, Signal::CONT)?;
        }
        Ok(())
    }

    /// Runs a command beside whatever else happens; it may be refused.
    fn command(&mut self, node: &str, args: &[&str]) -> Result<()> {
        self.told.push(format!("{args:?} at {node}"));
        let mut command = Command::new(blkrepl()?);
        command.arg("--admin").arg(&self.cluster.node(node)?.admin).args(args);
        self.commands.push(std::thread::spawn(move || proc::run(&mut command, HEAL_LIMIT)));
        Ok(())
    }

    /// Ends all faults and waits until the volume is served; time that took.
    fn heal(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        for node in self.names.clone() {
            self.wake(&node)?;
            self.start(&node)?;
        }
        for command in std::mem::take(&mut self.commands) {
            let done = command.join().map_err(|_| anyhow!("a command's thread died"))??;
            ensure!([0, 1].contains(&done.code()), "{}: exit code {}", done.shown, done.code());
        }
        // Demoted: only an operator ends that. Whoever is eligible says so.
        let data = self.data.clone();
        wait_for("service", HEAL_LIMIT, || {
            let volume = self.cluster.volume_status()?;
            if volume.primary.is_some() {
                return self.cluster.wait_primary(Duration::from_secs(1)).map(drop);
            }
            let mut answers = Vec::new();
            for node in &data {
                let done = self.cluster.cli(node, &["promote", "vol0"])?;
                if done.code() == 0 {
                    return Ok(());
                }
                answers.push(done.stderr);
            }
            Err(anyhow!("nobody can be promoted: {}", answers.join("; ")))
        })?;
        Ok(begun.elapsed())
    }

    fn round(&mut self, verifiers: &mut [Verifier; 2]) -> Result<()> {
        let [whole, partial] = verifiers;
        let (load, partial_load) = (whole.start(), partial.start());
        load.wait_progress(100, FAILOVER_LIMIT)?;
        for _ in 0..ACTIONS {
            self.act()?;
        }
        let healed = self.heal()?;
        load.wait_progress(100, FAILOVER_LIMIT)?;
        partial_load.wait_progress(50, FAILOVER_LIMIT)?;
        self.cluster.wait_in_sync(SYNC_LIMIT)?;
        let (report, partial_report) = (load.stop()?, partial_load.stop()?);
        whole.verify()?;
        partial.verify()?;
        self.cluster.wait_in_sync(SYNC_LIMIT)?;
        self.cluster.compare_replicas()?;
        let (acked, unknown) = (report.acked + partial_report.acked, report.unknown + partial_report.unknown);
        measured(
            "chaos",
            &format!("service {} after faults, {acked} acknowledged, {unknown} unknown", human(healed)),
        );
        Ok(())
    }
}

fn chaos(name: &str, options: ClusterOptions) {
    with_cluster(name, options, |cluster| {
        let area = VerifierOptions::default();
        let partial = VerifierOptions {
            unit_len: 512,
            workers: 2,
            request_units_max: 20,
            offset: area.len().next_multiple_of(1 << 20),
            ..Default::default()
        };
        let mut verifiers =
            [Verifier::new(cluster.targets()?, area), Verifier::new(cluster.targets()?, partial)];
        let seed = fresh_seed();
        step(name, &format!("seed of the faults {seed}"));
        let mut chaos = Chaos::new(cluster, seed)?;
        for round in 1..=rounds() {
            chaos.told.clear();
            let result = chaos.round(&mut verifiers);
            result.with_context(|| format!("round {round}: {}", chaos.told.join(", ")))?;
        }
        Ok(())
    });
}

#[test]
fn two_replicas_and_a_witness() {
    chaos("chaos", ClusterOptions::quick(SIZE));
}

#[test]
fn three_replicas() {
    let three = ClusterOptions { witness: false, lease_ms: Some(500), ..ClusterOptions::by_hand(SIZE, 3) };
    chaos("chaos_three", three);
}
