//! Nodes of the control plane, each a process on a machine of its own, and the loop that drives them.
//!
//! [`Cluster::step`] does exactly one event - a segment arrives, a timer fires, somebody outside asked for
//! something - and then lets every process run until nothing is left to do. The caller decides what happens
//! between two events, and looks at the nodes only through [`Control`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkrepl_engine::control::{
    ClusterState, Control, ControlError, ControlOptions, Founder, LeaseSnapshot, NodeAddrs, NodeKind,
    StoreId, init_in, recover_force_in, start_in,
};
use blkrepl_engine::types::{Nanos, NodeId};
use tokio::sync::watch;

use crate::clock::{Clock, Time};
use crate::rng::Rng;

use super::disk::{Disk, Image};
use super::env::{SimEnv, Tap};
use super::host::{Now, Process, lock};
use super::net::{Net, addr_of};

/// Why a process ended whose machine lost its power in the middle of a sync.
pub(crate) const POWER_CUT: &str = "the power was cut";
/// Most polls without time going on: more is a livelock.
const POLLS_MAX: u32 = 200_000;

type Starting = Arc<Mutex<Option<Result<Control, ControlError>>>>;

/// A started process of a node.
pub(crate) struct Run {
    pub(crate) process: Arc<Process>,
    starting: Starting,
    pub(crate) up: Option<Up>,
}

/// A process whose node is running.
pub(crate) struct Up {
    pub(crate) control: Control,
    pub(crate) state: watch::Receiver<Arc<ClusterState>>,
    pub(crate) leases: watch::Receiver<LeaseSnapshot>,
    pub(crate) failed: watch::Receiver<Option<String>>,
}

/// A machine with a disk, and perhaps a process.
pub(crate) struct Machine {
    pub(crate) id: u64,
    pub(crate) disk: Disk,
    pub(crate) clock: Clock,
    pub(crate) os_boot: u128,
    pub(crate) run: Option<Run>,
    pub(crate) paused: bool,
    pub(crate) slow_disk: u64,
    pub(crate) store: StoreId,
    /// The random part of the next run, if somebody outside has drawn it.
    pub(crate) nonce: Option<u64>,
}

/// How the nodes are set up.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// The founders: id and kind.
    pub(crate) founders: Vec<(u64, NodeKind)>,
    pub(crate) lease: Duration,
    pub(crate) renew: Duration,
    pub(crate) heartbeat: Duration,
    pub(crate) election: (Duration, Duration),
}

/// What one step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stepped {
    /// Nothing is left to do before the time given.
    Idle,
    /// One event.
    Event,
    /// A process panicked, or never came to rest.
    Broken(String),
}

/// All machines, their network and their time.
pub(crate) struct Cluster {
    pub(crate) setup: Setup,
    pub(crate) now: Now,
    pub(crate) net: Net,
    pub(crate) machines: BTreeMap<u64, Machine>,
    pub(crate) rng: Rng,
    pub(crate) hash: u64,
    pub(crate) events: u64,
    /// Takes the state after every entry that any node applies.
    tap: Tap,
}

impl Cluster {
    pub(crate) fn new(setup: Setup, now: Now, mut rng: Rng) -> Self {
        let net = Net::new(now.clone(), rng.fork());
        let hash = 0xcbf2_9ce4_8422_2325;
        Self { setup, now, net, machines: BTreeMap::new(), rng, hash, events: 0, tap: Tap::default() }
    }

    /// Adds a machine with an initialised store.
    pub(crate) fn add(&mut self, id: u64, clock: Clock) {
        let disk = Disk::default();
        let os_boot = u128::from(self.rng.next());
        let mut machine = Machine {
            id,
            disk,
            clock,
            os_boot,
            run: None,
            paused: false,
            slow_disk: 0,
            store: StoreId::default(),
            nonce: None,
        };
        let env = self.env(&machine);
        machine.store = init_in(&env, Path::new("/sim"), NodeId(id)).expect("a new disk takes a store");
        machine.disk.drop_process();
        self.machines.insert(id, machine);
    }

    /// Adds a machine with a disk that was taken elsewhere.
    pub(crate) fn add_with(&mut self, id: u64, clock: Clock, image: Image, store: StoreId) {
        let disk = Disk::default();
        disk.restore(image);
        let machine = Machine {
            id,
            disk,
            clock,
            os_boot: 0,
            run: None,
            paused: false,
            slow_disk: 0,
            store,
            nonce: None,
        };
        self.machines.insert(id, machine);
    }

    /// Gives a machine an empty disk with a new store.
    pub(crate) fn replace_disk(&mut self, id: u64) {
        let clock = self.machines[&id].clock;
        self.add(id, clock);
    }

    fn env(&mut self, machine: &Machine) -> SimEnv {
        SimEnv {
            node: machine.id,
            process: Process::new(self.now.clone(), machine.clock, self.rng.fork()),
            net: self.net.clone(),
            disk: machine.disk.clone(),
            slow: machine.slow_disk,
            nonce: Mutex::new(machine.nonce),
            tap: Arc::clone(&self.tap),
        }
    }

    fn founder(id: u64, kind: NodeKind) -> Founder {
        let addrs = NodeAddrs { control: addr_of(id), ..NodeAddrs::default() };
        Founder { id: NodeId(id), name: format!("n{id}"), kind, addrs }
    }

    fn options(&self, id: u64, os_boot: u128) -> ControlOptions {
        let listen = SocketAddr::from(([127, 0, 0, 1], 7000));
        let mut options = ControlOptions::new("/sim", NodeId(id), listen);
        options.founders = self.setup.founders.iter().map(|(id, kind)| Self::founder(*id, *kind)).collect();
        if options.founders.iter().all(|f| f.id != NodeId(id)) {
            options.founders.push(Self::founder(id, NodeKind::Data));
        }
        options.os_boot = os_boot;
        options.lease = self.setup.lease;
        options.renew = self.setup.renew;
        options.heartbeat = self.setup.heartbeat;
        options.election = self.setup.election;
        options
    }

    /// Starts the process of a node; whether its node comes up shows later.
    pub(crate) fn start(&mut self, id: u64) {
        let machine = self.machines.remove(&id).expect("a machine of this cluster");
        assert!(machine.run.is_none(), "one process at a time");
        let env = self.env(&machine);
        let process = Arc::clone(&env.process);
        self.net.set_power(id, true);
        let options = self.options(id, machine.os_boot);
        let starting = Starting::default();
        let slot = Arc::clone(&starting);
        process.start(async move {
            let started = start_in(options, Arc::new(env)).await;
            *lock(&slot) = Some(started);
        });
        let run = Some(Run { process, starting, up: None });
        self.machines.insert(id, Machine { run, paused: false, ..machine });
    }

    /// Ends the process from one moment to the next; with the power, what its disk had not synced goes, too.
    pub(crate) fn kill(&mut self, id: u64, power: bool) {
        let now = self.now.get();
        let machine = self.machines.get_mut(&id).expect("a machine of this cluster");
        // First the disk: nothing that ends with the process tidies up there.
        if power {
            machine.disk.lose_power(&mut self.rng);
            machine.os_boot = u128::from(self.rng.next());
            machine.clock = machine.clock.rebooted(now);
        } else {
            machine.disk.drop_process();
        }
        if let Some(run) = machine.run.take() {
            run.process.kill();
            drop(run.up);
            drop(lock(&run.starting).take());
        }
        machine.paused = false;
        self.net.drop_process(id, !power);
        self.mix(0x6b69_6c6c ^ id);
    }

    /// Makes a new cluster of one stopped node.
    pub(crate) fn recover(&mut self, id: u64) -> Result<(), ControlError> {
        let machine = self.machines.remove(&id).expect("a machine of this cluster");
        let env = self.env(&machine);
        let recovered = recover_force_in(&env, Path::new("/sim"), NodeId(id));
        machine.disk.drop_process();
        let store = recovered.as_ref().map_or(machine.store, |r| r.store);
        self.machines.insert(id, Machine { store, ..machine });
        recovered.map(drop)
    }

    pub(crate) fn up(&self, id: u64) -> Option<&Up> {
        self.machines.get(&id)?.run.as_ref()?.up.as_ref()
    }

    pub(crate) fn ups(&self) -> impl Iterator<Item = (&Machine, &Up)> {
        self.machines.values().filter_map(|m| Some((m, m.run.as_ref()?.up.as_ref()?)))
    }

    /// Runs code on a node as part of its process.
    pub(crate) fn with<R>(&self, id: u64, f: impl FnOnce(&Process, &Control) -> R) -> Option<R> {
        let run = self.machines.get(&id)?.run.as_ref()?;
        let control = &run.up.as_ref()?.control;
        Some(run.process.enter(|| f(&run.process, control)))
    }

    /// The next moment at which something happens by itself.
    pub(crate) fn next_event(&self) -> Option<Time> {
        let running = self.machines.values().filter(|m| !m.paused);
        let processes = running.filter_map(|m| {
            let process = &m.run.as_ref()?.process;
            if process.is_ready() { Some(self.now.get()) } else { process.next_timer() }
        });
        // A process that was paused is late with its timers.
        processes.chain(self.net.next_event()).min().map(|at| at.max(self.now.get()))
    }

    /// What was applied since the last call: who, and the state after the entry.
    pub(crate) fn take_applied(&self) -> Vec<(u64, Arc<ClusterState>)> {
        std::mem::take(&mut *lock(&self.tap))
    }

    fn mix(&mut self, value: u64) {
        self.hash = (self.hash ^ value).wrapping_mul(0x100_0000_01b3);
    }

    /// Hash of all that happened.
    pub(crate) fn trace_hash(&self) -> u64 {
        (self.hash ^ self.net.hash()).wrapping_mul(0x100_0000_01b3)
    }

    /// Does the next event, if it comes before `until`; else lets time go on to there.
    pub(crate) fn step(&mut self, until: Time) -> Stepped {
        let Some(next) = self.next_event().filter(|at| *at <= until) else {
            self.now.set(until);
            return Stepped::Idle;
        };
        self.now.set(next);
        self.events += 1;
        self.mix(next);
        if self.net.next_event().is_some_and(|at| at <= next) {
            self.net.deliver();
        } else {
            let due = |m: &&Machine| {
                let timer = m.run.as_ref().and_then(|r| r.process.next_timer());
                !m.paused && timer.is_some_and(|at| at <= next)
            };
            if let Some(run) = self.machines.values().find(due).and_then(|m| m.run.as_ref()) {
                run.process.fire();
            }
        }
        self.settle()
    }

    /// Lets every process run until nothing is left to do.
    pub(crate) fn settle(&mut self) -> Stepped {
        let mut polls = 0;
        let mut hash = self.hash;
        let mut broken = None;
        for (id, machine) in self.machines.iter_mut().filter(|(_, m)| !m.paused) {
            let Some(run) = &mut machine.run else { continue };
            while let Some(task) = run.process.step() {
                polls += 1;
                if machine.disk.is_cut() {
                    // It is dead already, and says nothing any more.
                    break;
                }
                hash = (hash ^ (id << 32) ^ task).wrapping_mul(0x100_0000_01b3);
                if polls > POLLS_MAX {
                    return Stepped::Broken(format!("node {id} never comes to rest"));
                }
            }
            if let Some(panic) = run.process.take_panics().first() {
                broken.get_or_insert(format!("node {id} panicked: {panic}"));
            }
        }
        self.hash = hash;
        broken.map_or(Stepped::Event, Stepped::Broken)
    }

    /// Takes up nodes that have started. Gives those that could not, and those that failed, with the reason.
    pub(crate) fn look(&mut self) -> Vec<(u64, String)> {
        let mut ended = Vec::new();
        for (id, machine) in &mut self.machines {
            let Some(run) = &mut machine.run else { continue };
            if machine.disk.is_cut() {
                ended.push((*id, POWER_CUT.into()));
                continue;
            }
            if run.up.is_none() {
                match lock(&run.starting).take() {
                    None => {}
                    Some(Err(e)) => ended.push((*id, e.to_string())),
                    Some(Ok(control)) => {
                        let (state, leases) = (control.cluster_state(), control.leases());
                        let failed = control.failed();
                        run.up = Some(Up { control, state, leases, failed });
                    }
                }
            }
            if let Some(up) = &run.up
                && let Some(why) = up.failed.borrow().clone()
            {
                ended.push((*id, why));
            }
        }
        ended
    }

    /// Until when in true time a node may serve by its lease; `None` if it has none for the volume.
    pub(crate) fn lease_end(&self, machine: &Machine, until: Option<Nanos>) -> Option<Time> {
        let run = machine.run.as_ref()?;
        until.map(|until| run.process.when(until))
    }
}
