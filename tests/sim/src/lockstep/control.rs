//! The control plane alone, under faults of every kind that a seed turns on: three nodes (two data and a
//! witness, or three data), one volume whose replicas are stubs, an operator who interferes.
//!
//! A run has two parts. First faults come, and [`Checks`] must hold after every event. Then all faults end, every
//! node is started, and within a bounded time there must be a leader, registrations, and a primary that serves.
//! Every disk failure here is one that a node may survive or die of; what no node survives is not injected: at
//! most one store of three is lost or rolled back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkrepl_engine::control::{ClusterOp, ClusterState, NodeAddrs, NodeKind, NodeRecord, SubmitError};
use blkrepl_engine::types::{
    Geometry, LineageId, Member, NodeId, Proposal, ProposalOutcome, VolumeId, VolumeSettings,
};

use crate::clock::{Clock, DRIFT_PPM_MAX, MS, S, Time};
use crate::rng::Rng;

use super::checks::{Broken, Checks};
use super::cluster::{Cluster, POWER_CUT, Setup, Stepped};
use super::disk::{Faults, Image};
use super::host::{Now, lock};
use super::net::{Link, addr_of};
use super::plan::{Fault, Plan};
use super::stub::Stub;

const VOL: VolumeId = VolumeId(77);
/// How long after the last fault everything must be well again.
const LIVELY: Time = 40 * S;

/// What a run of the control plane gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlStats {
    /// Simulated nanoseconds.
    pub simulated: u64,
    /// Events: segments and timers.
    pub events: u64,
    /// Hash of all of them.
    pub hash: u64,
    /// Entries applied, at the node that applied most.
    pub applied: u64,
    /// Faults and operator's deeds by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Changes of the volume's config by kind.
    pub changes: BTreeMap<&'static str, u64>,
    /// States that two nodes published and that were equal.
    pub compared: u64,
}

impl ControlStats {
    /// Adds the figures of another run; the hashes of all are mixed.
    pub fn add(&mut self, other: &Self) {
        self.simulated += other.simulated;
        self.events += other.events;
        self.hash ^= other.hash;
        self.applied += other.applied;
        self.compared += other.compared;
        for (kind, n) in &other.faults {
            *self.faults.entry(kind).or_default() += n;
        }
        for (kind, n) in &other.changes {
            *self.changes.entry(kind).or_default() += n;
        }
    }
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlViolation {
    /// Which: an invariant of the design or a rule.
    pub what: &'static str,
    /// What was seen.
    pub text: String,
    /// When, in simulated nanoseconds.
    pub at: u64,
}

/// Runs one seed. `trace` gets a line per happening, the same for the same seed.
///
/// # Errors
/// The first broken promise.
pub fn run(seed: u64, trace: Option<&mut String>) -> Result<ControlStats, ControlViolation> {
    let mut world = World::new(seed, trace);
    let result = world.run();
    let at = world.cluster.now.get();
    result.map_err(|Broken { what, text }| {
        world.say(&format!("BROKEN {what}: {text}"));
        ControlViolation { what, text, at }
    })
}

/// What a node answered to somebody outside.
enum Answer {
    Proposed(Proposal, ProposalOutcome),
    Submitted(&'static str, Result<(), SubmitError>),
}

type Answers = Arc<Mutex<Vec<(u64, u64, Answer)>>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Todo {
    Fault,
    Operate,
    Stub(u64),
    Start(u64),
    Resume(u64),
    Well(u64),
    Heal,
}

struct World<'t> {
    cluster: Cluster,
    plan: Plan,
    stubs: BTreeMap<u64, Stub>,
    checks: Checks,
    rng: Rng,
    todo: BTreeSet<(Time, u64, Todo)>,
    number: u64,
    /// Runs of processes, so that answers of an earlier one are dropped.
    runs: BTreeMap<u64, u64>,
    answers: Answers,
    /// The node whose store was lost or rolled back.
    outcast: Option<u64>,
    /// The same, and the newest run that it had before.
    outcast_run: Option<(u64, u64)>,
    /// The run to which the outcast was rolled back, plus its starts since then.
    rolled_back: Option<u64>,
    /// An earlier state of a disk, and the run that it was taken in.
    image: Option<(u64, Image, u64)>,
    disk_failures: BTreeMap<u64, u64>,
    faulty: bool,
    faults: BTreeMap<&'static str, u64>,
    trace: Option<&'t mut String>,
}

impl<'t> World<'t> {
    fn new(seed: u64, trace: Option<&'t mut String>) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        let third = if rng.chance(600) { NodeKind::Witness } else { NodeKind::Data };
        let lease = Duration::from_millis(rng.pick(&[300, 1000, 1500, 1500, 1500, 3000]));
        let setup = Setup {
            founders: vec![(1, NodeKind::Data), (2, NodeKind::Data), (3, third)],
            lease,
            renew: (lease * 4 / 15).max(Duration::from_millis(50)),
            heartbeat: Duration::from_millis(100),
            election: (Duration::from_millis(400), Duration::from_millis(800)),
        };
        let mut cluster = Cluster::new(setup, Now::default(), rng.fork());
        let mut stubs = BTreeMap::new();
        for (id, kind) in cluster.setup.founders.clone() {
            let ppm = i64::try_from(rng.below(2 * DRIFT_PPM_MAX as u64 + 1)).expect("small") - DRIFT_PPM_MAX;
            cluster.add(id, Clock::new(0, S + rng.below(S), if plan.has(Fault::Drift) { ppm } else { 0 }));
            if kind == NodeKind::Data {
                stubs.insert(id, Stub::default());
            }
        }
        Self {
            cluster,
            plan,
            stubs,
            checks: Checks::default(),
            rng,
            todo: BTreeSet::new(),
            number: 0,
            runs: BTreeMap::new(),
            answers: Answers::default(),
            outcast: None,
            outcast_run: None,
            rolled_back: None,
            image: None,
            disk_failures: BTreeMap::new(),
            faulty: true,
            faults: BTreeMap::new(),
            trace,
        }
    }

    fn say(&mut self, what: &str) {
        let now = self.cluster.now.get();
        if let Some(trace) = &mut self.trace {
            // Writing to a string does not fail.
            let _ = writeln!(trace, "{:>10}.{:06} {what}", now / MS, now % MS);
        }
    }

    fn later(&mut self, delay: Time, what: Todo) {
        self.number += 1;
        self.todo.insert((self.cluster.now.get() + delay, self.number, what));
    }

    fn run(&mut self) -> Result<ControlStats, Broken> {
        let plan = format!("{:?}, lease {:?}", self.plan, self.cluster.setup.lease);
        self.say(&plan);
        let ids: Vec<u64> = self.cluster.machines.keys().copied().collect();
        for id in ids {
            let delay = self.rng.below(300 * MS);
            self.later(delay, Todo::Start(id));
            self.later(delay + 100 * MS, Todo::Stub(id));
        }
        self.later(S, Todo::Operate);
        self.later(2 * S, Todo::Fault);
        let end = self.plan.length;
        self.run_until(end, |_| false)?;
        self.end_faults();
        let deadline = self.cluster.now.get() + LIVELY;
        if !self.run_until(deadline, Self::is_well)? {
            let text = self.picture();
            return Err(Broken {
                what: "10",
                text: format!("not well {LIVELY} ns after the last fault: {text}"),
            });
        }
        let ups = self.cluster.ups();
        let applied = ups.map(|(_, up)| up.state.borrow().applied.0).max().unwrap_or(0);
        Ok(ControlStats {
            simulated: self.cluster.now.get(),
            events: self.cluster.events,
            hash: self.cluster.trace_hash(),
            applied,
            faults: self.faults.clone(),
            changes: self.checks.changes.clone(),
            compared: self.checks.compared,
        })
    }

    /// Runs to a point in time, or until it is well. Says whether it is.
    fn run_until(&mut self, end: Time, well: impl Fn(&Self) -> bool) -> Result<bool, Broken> {
        loop {
            let now = self.cluster.now.get();
            let todo = self.todo.first().map(|(at, ..)| *at);
            let until = todo.unwrap_or(end).min(end);
            match self.cluster.step(until) {
                Stepped::Broken(text) => return Err(Broken { what: "panic", text }),
                Stepped::Event => self.observe()?,
                Stepped::Idle => {
                    if now >= end {
                        return Ok(false);
                    }
                    while let Some((at, number, what)) = self.todo.first().copied() {
                        if at > self.cluster.now.get() {
                            break;
                        }
                        self.todo.remove(&(at, number, what));
                        self.act(what)?;
                    }
                    if let Stepped::Broken(text) = self.cluster.settle() {
                        return Err(Broken { what: "panic", text });
                    }
                    self.observe()?;
                    if well(self) {
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// Looks at all nodes after an event.
    fn observe(&mut self) -> Result<(), Broken> {
        for (id, why) in self.cluster.look() {
            self.ended(id, &why)?;
        }
        for (id, state) in self.cluster.take_applied() {
            if Some(id) != self.outcast {
                self.checks.applied_entry(id, &state)?;
            }
        }
        let changed: Vec<(u64, Arc<ClusterState>)> = self
            .cluster
            .machines
            .values_mut()
            .filter_map(|m| {
                let up = m.run.as_mut()?.up.as_mut()?;
                // The sender lives as long as the node.
                let new = up.state.has_changed().unwrap_or(false);
                new.then(|| (m.id, Arc::clone(&up.state.borrow_and_update())))
            })
            .collect();
        for (id, state) in changed {
            self.adopt(id, &state)?;
        }
        self.take_answers();
        let serving = self.serving();
        self.checks.serving(VOL, &serving)
    }

    fn adopt(&mut self, id: u64, state: &Arc<ClusterState>) -> Result<(), Broken> {
        if Some(id) == self.outcast {
            // It may hear of what the others decide, and has no part in it.
            return Ok(());
        }
        self.checks.published(id, state)?;
        if let Some((out, run)) = self.outcast_run
            && state.newest(NodeId(out)).is_some_and(|newest| newest.boot > run)
        {
            let newest = state.newest(NodeId(out));
            return Err(Broken { what: "R13", text: format!("outcast {out} is believed as {newest:?}") });
        }
        let me = self.member(id);
        if let (Some(v), Some(me), Some(stub)) = (state.volumes.get(&VOL), me, self.stubs.get_mut(&id)) {
            stub.adopt(me, v);
        }
        if self.trace.is_some() {
            let v = state.volumes.get(&VOL).map(|v| {
                let set: Vec<String> =
                    v.in_sync.iter().map(|m| format!("{}.{}", m.node.0, m.incarnation.boot)).collect();
                let primary = v.primary.map(|m| m.node.0);
                format!("epoch {} reign {} primary {primary:?} in sync {set:?}", v.epoch, v.reign.0)
            });
            self.say(&format!("n{id} applied {} {}", state.applied, v.unwrap_or_default()));
        }
        Ok(())
    }

    fn member(&self, id: u64) -> Option<Member> {
        let incarnation = self.cluster.up(id)?.control.incarnation();
        Some(Member { node: NodeId(id), incarnation })
    }

    /// Who believes right now that it may serve. A paused process counts: it holds its lease still.
    fn serving(&self) -> Vec<Member> {
        let now = self.cluster.now.get();
        self.cluster
            .ups()
            .filter_map(|(m, up)| {
                let me = Member { node: NodeId(m.id), incarnation: up.control.incarnation() };
                let state = up.state.borrow();
                let v = state.volumes.get(&VOL)?;
                let until = self.cluster.lease_end(m, up.leases.borrow().until(VOL))?;
                let serves = v.primary == Some(me) && now < until && self.stubs.get(&m.id)?.would_serve();
                serves.then_some(me)
            })
            .collect()
    }

    /// A process says that it cannot go on, or did not come up.
    fn ended(&mut self, id: u64, why: &str) -> Result<(), Broken> {
        let disk = self.cluster.machines[&id].disk.failed();
        let known = self.disk_failures.insert(id, disk).unwrap_or(0);
        let power = why == POWER_CUT;
        self.say(&format!("n{id} ends: {why}"));
        if why.contains("rolled back or copied") {
            self.rolled_back = None;
        }
        if disk == known && !power && Some(id) != self.outcast {
            return Err(Broken { what: "R13", text: format!("node {id} ended without a cause: {why}") });
        }
        self.cluster.kill(id, power);
        self.restart_later(id);
        Ok(())
    }

    fn restart_later(&mut self, id: u64) {
        *self.runs.entry(id).or_default() += 1;
        if let Some(stub) = self.stubs.get_mut(&id) {
            stub.restart();
        }
        let delay = self.rng.skewed(5 * MS, if self.faulty { 5 * S } else { S });
        self.later(delay, Todo::Start(id));
    }

    fn act(&mut self, what: Todo) -> Result<(), Broken> {
        match what {
            Todo::Start(id) => {
                if self.cluster.machines[&id].run.is_none() && self.may_start(id) {
                    self.say(&format!("n{id} starts"));
                    self.cluster.start(id);
                }
            }
            Todo::Resume(id) => {
                if let Some(m) = self.cluster.machines.get_mut(&id) {
                    m.paused = false;
                }
                self.say(&format!("n{id} goes on"));
            }
            Todo::Well(id) => {
                if let Some(stub) = self.stubs.get_mut(&id) {
                    stub.sick = false;
                }
                self.report(id);
            }
            Todo::Heal => self.heal(),
            Todo::Stub(id) => self.tick_stub(id),
            Todo::Operate => self.operate(),
            Todo::Fault if self.faulty => {
                let fault = self.plan.next(&mut self.rng);
                if let Some(fault) = fault {
                    self.inject(fault);
                }
                let pause = self.plan.pause(&mut self.rng);
                self.later(pause, Todo::Fault);
            }
            Todo::Fault => {}
        }
        Ok(())
    }

    /// Here the promise ends: a copy that is started until it has counted past the run that the others know,
    /// without reaching any of them before, is not noticed [R13]. Once told, it may start as often as it likes.
    fn may_start(&mut self, id: u64) -> bool {
        let (Some(boot), Some((out, known))) = (self.rolled_back, self.outcast_run) else { return true };
        if out != id {
            return true;
        }
        self.rolled_back = Some(boot + 1);
        boot < known
    }

    fn heal(&mut self) {
        let ids: Vec<u64> = self.cluster.machines.keys().copied().collect();
        for from in &ids {
            for to in &ids {
                if from != to {
                    let link = Link { damage: self.plan.damage(), ..Link::default() };
                    self.cluster.net.set_link(*from, *to, link);
                }
            }
        }
        self.say("links heal");
    }

    fn end_faults(&mut self) {
        self.say("faults end");
        self.faulty = false;
        self.plan.end();
        self.heal();
        for id in self.cluster.machines.keys().copied().collect::<Vec<_>>() {
            let machine = self.cluster.machines.get_mut(&id).expect("a machine");
            machine.disk.set_faults(Faults::default());
            machine.slow_disk = 0;
            machine.paused = false;
            let running = machine.run.is_some();
            if let Some(stub) = self.stubs.get_mut(&id) {
                stub.sick = false;
            }
            if !running {
                self.later(100 * MS, Todo::Start(id));
            }
        }
    }

    fn inject(&mut self, fault: Fault) {
        let ids: Vec<u64> = self.cluster.machines.keys().copied().collect();
        let id = self.rng.pick(&ids);
        let other = self.rng.pick(&ids.iter().copied().filter(|x| *x != id).collect::<Vec<_>>());
        self.say(&format!("fault {fault:?} n{id} n{other}"));
        *self.faults.entry(fault.name()).or_default() += 1;
        match fault {
            Fault::Kill => self.kill(id, false),
            Fault::Power => self.kill(id, true),
            Fault::PowerAll => ids.iter().for_each(|id| self.kill(*id, true)),
            Fault::Pause => {
                let machine = self.cluster.machines.get_mut(&id).expect("a machine");
                machine.paused = machine.run.is_some();
                let long = self.rng.skewed(10 * MS, 4 * S);
                self.later(long, Todo::Resume(id));
            }
            Fault::CutOneWay | Fault::CutBoth | Fault::Isolate => self.cut(fault, id, other, &ids),
            Fault::Slow => {
                let link = Link {
                    delay_max: self.rng.skewed(MS, 300 * MS),
                    loss: self.rng.pick(&[0, 10, 100, 300]),
                    damage: self.plan.damage(),
                    ..self.cluster.net.link(id, other)
                };
                self.cluster.net.set_link(id, other, link);
                let long = self.rng.skewed(50 * MS, 5 * S);
                self.later(long, Todo::Heal);
            }
            Fault::Reset => self.cluster.net.reset(id, other),
            Fault::Damage | Fault::Drift => {}
            Fault::DiskFails | Fault::DiskCut | Fault::DiskFull | Fault::DiskUnreadable => {
                let after = Some(self.rng.below(200));
                let faults = match fault {
                    Fault::DiskFails => Faults { fail_after: after, ..Faults::default() },
                    Fault::DiskCut => Faults { cut_after: Some(self.rng.below(12)), ..Faults::default() },
                    Fault::DiskFull => Faults { full: true, ..Faults::default() },
                    _ => Faults { unreadable_after: after, ..Faults::default() },
                };
                self.cluster.machines[&id].disk.set_faults(faults);
            }
            Fault::DiskSlow => {
                let slow = self.rng.pick(&[0, 5, 50, 500]);
                self.cluster.machines.get_mut(&id).expect("a machine").slow_disk = slow;
            }
            Fault::Sick => {
                if let Some(stub) = self.stubs.get_mut(&id) {
                    stub.sick = true;
                    self.report(id);
                    let long = self.rng.skewed(50 * MS, 5 * S);
                    self.later(long, Todo::Well(id));
                }
            }
            Fault::StoreLost | Fault::StoreRolledBack | Fault::Recovered => self.lose_store(fault, id),
        }
    }

    fn cut(&mut self, fault: Fault, id: u64, other: u64, ids: &[u64]) {
        let pairs: Vec<(u64, u64)> = match fault {
            Fault::CutOneWay => vec![(id, other)],
            Fault::CutBoth => vec![(id, other), (other, id)],
            _ => ids.iter().filter(|x| **x != id).flat_map(|x| [(id, *x), (*x, id)]).collect(),
        };
        for (from, to) in pairs {
            let link = Link { cut: true, ..self.cluster.net.link(from, to) };
            self.cluster.net.set_link(from, to, link);
        }
        let long = self.rng.skewed(20 * MS, 6 * S);
        self.later(long, Todo::Heal);
    }

    fn kill(&mut self, id: u64, power: bool) {
        self.cluster.kill(id, power);
        self.restart_later(id);
    }

    /// A store is replaced by an empty one, or by an older copy of itself, or becomes that of another cluster: the
    /// node is out [R13, R19]. One of three, so that a quorum is left.
    fn lose_store(&mut self, fault: Fault, id: u64) {
        let founded = self.cluster.ups().all(|(_, up)| up.state.borrow().volumes.contains_key(&VOL));
        if self.outcast.is_some_and(|out| out != id) || !founded || self.cluster.ups().count() < 3 {
            return;
        }
        if self.outcast.is_some() {
            return;
        }
        let boot = self.member(id).map_or(0, |m| m.incarnation.boot);
        match (fault, self.image.take()) {
            (Fault::StoreLost, image) => {
                self.image = image;
                self.kill(id, true);
                self.cluster.replace_disk(id);
                self.disk_failures.remove(&id);
                self.outcast = Some(id);
            }
            // An operator gives the others up, wrongly: they go on without it [R19].
            (Fault::Recovered, image) => {
                self.image = image;
                self.kill(id, true);
                if self.cluster.recover(id).is_ok() {
                    self.outcast = Some(id);
                }
            }
            // Rolled back to before a run that the others know.
            (_, Some((of, image, then))) if of == id && then + 1 < boot && self.others_know(id, boot) => {
                self.kill(id, true);
                self.cluster.machines[&id].disk.restore(image);
                self.outcast = Some(id);
                self.rolled_back = Some(then);
            }
            (_, None) => self.image = Some((id, self.cluster.machines[&id].disk.image(), boot)),
            (_, image) => self.image = image,
        }
        if self.outcast == Some(id) {
            self.outcast_run = Some((id, boot));
            self.stubs.remove(&id);
            self.say(&format!("n{id} is an outcast"));
        }
    }

    fn others_know(&self, id: u64, boot: u64) -> bool {
        let knows = |state: &ClusterState| state.newest(NodeId(id)).is_some_and(|i| i.boot >= boot);
        self.cluster.ups().all(|(m, up)| m.id == id || knows(&up.state.borrow()))
    }

    fn report(&self, id: u64) {
        let Some(stub) = self.stubs.get(&id) else { return };
        let (health, report) = stub.report();
        let knows = self.cluster.up(id).is_some_and(|up| up.state.borrow().volumes.contains_key(&VOL));
        if knows {
            self.cluster.with(id, |_, control| control.set_volume_report(VOL, health, report));
        }
    }

    fn tick_stub(&mut self, id: u64) {
        let pause = self.rng.between(30 * MS, 150 * MS);
        self.later(pause, Todo::Stub(id));
        let machine = &self.cluster.machines[&id];
        if machine.paused || Some(id) == self.outcast {
            return;
        }
        self.report(id);
        let Some(up) = self.cluster.up(id) else { return };
        let state = Arc::clone(&up.state.borrow());
        let (Some(me), Some(v)) = (self.member(id), state.volumes.get(&VOL)) else { return };
        // What a session to a peer would show.
        let lost: Vec<NodeId> = self
            .cluster
            .machines
            .values()
            .filter(|m| m.run.is_none() || m.paused || Some(m.id) == self.outcast)
            .map(|m| NodeId(m.id))
            .collect();
        let Some(stub) = self.stubs.get_mut(&id) else { return };
        if let Some(proposal) = stub.wish(me, v, &state, &lost, &mut self.rng) {
            self.propose(id, proposal);
        }
    }

    fn propose(&mut self, id: u64, proposal: Proposal) {
        self.say(&format!("n{id} proposes {:?} at epoch {}", proposal.kind, proposal.expected_epoch));
        let (answers, run) = (Arc::clone(&self.answers), self.runs.get(&id).copied().unwrap_or(0));
        self.cluster.with(id, |process, control| {
            let control = control.clone();
            process.start(async move {
                let outcome = control.propose(proposal).await;
                lock(&answers).push((id, run, Answer::Proposed(proposal, outcome)));
            });
        });
    }

    fn submit(&mut self, id: u64, name: &'static str, op: ClusterOp) {
        self.say(&format!("operator at n{id}: {op:?}"));
        *self.faults.entry(name).or_default() += 1;
        let (answers, run) = (Arc::clone(&self.answers), self.runs.get(&id).copied().unwrap_or(0));
        self.cluster.with(id, |process, control| {
            let control = control.clone();
            process.start(async move {
                let result = control.submit(op).await.map(drop);
                lock(&answers).push((id, run, Answer::Submitted(name, result)));
            });
        });
    }

    fn take_answers(&mut self) {
        let answers = std::mem::take(&mut *lock(&self.answers));
        for (id, run, answer) in answers {
            if self.runs.get(&id).copied().unwrap_or(0) != run {
                continue;
            }
            match answer {
                Answer::Submitted(name, result) => self.say(&format!("n{id} {name}: {result:?}")),
                Answer::Proposed(proposal, outcome) => {
                    self.say(&format!("n{id} {:?}: {outcome:?}", proposal.kind));
                    let state = self.cluster.up(id).map(|up| Arc::clone(&up.state.borrow()));
                    let v = state.as_ref().and_then(|s| s.volumes.get(&VOL));
                    let again = self.stubs.get_mut(&id).and_then(|stub| stub.outcome(&proposal, &outcome, v));
                    if let Some(bump) = again {
                        self.propose(id, bump);
                    }
                }
            }
        }
    }

    /// What the operator does next, at a node that runs.
    fn operate(&mut self) {
        let pause = if self.faulty { self.rng.skewed(200 * MS, 5 * S) } else { S };
        self.later(pause, Todo::Operate);
        let ids: Vec<u64> = self
            .cluster
            .ups()
            .filter(|(m, _)| !m.paused && Some(m.id) != self.outcast)
            .map(|(m, _)| m.id)
            .collect();
        if ids.is_empty() {
            return;
        }
        let at = self.rng.pick(&ids);
        let Some(up) = self.cluster.up(at) else { return };
        let state = Arc::clone(&up.state.borrow());
        if state.nodes.is_empty() {
            return;
        }
        let Some(v) = state.volumes.get(&VOL) else { return self.create(at, &state) };
        let data: Vec<u64> = self.stubs.keys().copied().collect();
        let node = NodeId(self.rng.pick(&data));
        let newest = state.newest(node).map(|incarnation| Member { node, incarnation });
        let (volume, expected_epoch) = (VOL, v.epoch);
        // Once faults have ended the operator only gives a volume a primary that has none.
        let choice = if self.faulty { self.rng.below(100) } else { 100 };
        match choice {
            0..20 => {
                let Some(to) = v.member(node) else { return };
                self.submit(at, "promote", ClusterOp::Promote { volume, expected_epoch, to, operator: true });
            }
            20..26 => {
                let Some(to) = newest else { return };
                let op = ClusterOp::PromoteRestarted { volume, expected_epoch, to, operator: true };
                self.submit(at, "promote restarted", op);
            }
            26..32 if self.plan.has_forces() => {
                let Some(to) = newest else { return };
                let lineage = LineageId(u128::from(self.rng.next()));
                let op = ClusterOp::ForcePromote { volume, expected_epoch, to, lineage, fork_epoch: v.epoch };
                self.submit(at, "force", op);
            }
            32..36 => {
                let ms = self.rng.pick(&[100, 500, 1500, 4000]);
                let lease = Duration::from_millis(ms);
                self.submit(at, "set lease", ClusterOp::SetLease { lease });
            }
            36..42 => {
                let settings = VolumeSettings {
                    peer_timeout: Duration::from_millis(self.rng.between(500, 9000)),
                    ..v.settings
                };
                self.submit(at, "settings", ClusterOp::ChangeSettings { volume, expected_epoch, settings });
            }
            42..60 if self.outcast.is_some() => self.replace(at, &state),
            100 if self.is_hopeless(v, &state) => {
                let Some(to) = newest else { return };
                let lineage = LineageId(u128::from(self.rng.next()));
                let op = ClusterOp::ForcePromote { volume, expected_epoch, to, lineage, fork_epoch: v.epoch };
                self.submit(at, "force", op);
            }
            100 if v.primary.is_none() => {
                let Some(to) = newest else { return };
                let op = match v.member(node) {
                    Some(named) if named == to => {
                        ClusterOp::Promote { volume, expected_epoch, to, operator: true }
                    }
                    _ => ClusterOp::PromoteRestarted { volume, expected_epoch, to, operator: true },
                };
                self.submit(at, "promote", op);
            }
            100 if self.outcast.is_some() => self.replace(at, &state),
            _ => {}
        }
    }

    /// Nobody is eligible: a member is an outcast, or its superblock does not say that it is one [R6].
    fn is_hopeless(&self, v: &blkrepl_engine::control::VolumeRecord, state: &ClusterState) -> bool {
        let lost = |m: &Member| {
            Some(m.node.0) == self.outcast
                || state.retired.contains(&m.node)
                || (state.has_restarted(*m)
                    && self.stubs.get(&m.node.0).is_none_or(|s| {
                        let run = s.report().1.member;
                        !run.is_some_and(|run| run == m.incarnation || v.continued_from.contains(&run))
                    }))
        };
        let idle = self.serving().is_empty();
        let out = |m: &Member| Some(m.node.0) == self.outcast;
        idle && (v.in_sync.iter().any(out) || v.in_sync.iter().all(lost))
    }

    fn create(&mut self, at: u64, state: &ClusterState) {
        let replicas: Vec<NodeId> = self.stubs.keys().map(|id| NodeId(*id)).collect();
        let node = self.rng.pick(&replicas);
        let Some(incarnation) = state.newest(node) else { return };
        let op = ClusterOp::CreateVolume {
            id: VOL,
            name: "vol0".into(),
            geometry: Geometry::new(1 << 20, 4096, 65536).expect("a geometry that fits"),
            settings: VolumeSettings::default(),
            replicas,
            first: Member { node, incarnation },
            lineage: LineageId(1),
        };
        self.submit(at, "create", op);
    }

    /// The outcast is removed, and a new node added in its place [R13].
    fn replace(&mut self, at: u64, state: &ClusterState) {
        let Some(outcast) = self.outcast else { return };
        let (node, new) = (NodeId(outcast), outcast + 3);
        let Some(v) = state.volumes.get(&VOL) else { return };
        if v.replica(node).is_some() {
            let op = ClusterOp::RemoveReplica { volume: VOL, expected_epoch: v.epoch, node };
            return self.submit(at, "remove replica", op);
        }
        if state.nodes.contains_key(&node) {
            return self.submit(at, "remove node", ClusterOp::RemoveNode { node });
        }
        if !self.cluster.machines.contains_key(&new) {
            let clock = Clock::new(self.cluster.now.get(), S, 0);
            self.cluster.add(new, clock);
            self.later(S, Todo::Start(new));
            self.later(S, Todo::Stub(new));
        }
        if !state.nodes.contains_key(&NodeId(new)) {
            let record = NodeRecord {
                id: NodeId(new),
                name: format!("n{new}"),
                kind: NodeKind::Data,
                addrs: NodeAddrs { control: addr_of(new), ..NodeAddrs::default() },
                store: self.cluster.machines[&new].store,
                incarnation: None,
                os_boot: 0,
            };
            return self.submit(at, "add node", ClusterOp::AddNode(record));
        }
        if v.replica(NodeId(new)).is_none() {
            let op = ClusterOp::AddReplica { volume: VOL, expected_epoch: v.epoch, node: NodeId(new) };
            self.stubs.entry(new).or_default();
            self.submit(at, "add replica", op);
        }
    }

    /// Every node that belongs to the cluster runs, is registered and agrees; the volume is served.
    fn is_well(&self) -> bool {
        let members: Vec<_> = self.cluster.ups().filter(|(m, _)| Some(m.id) != self.outcast).collect();
        let Some((_, first)) = members.first() else { return false };
        let state = Arc::clone(&first.state.borrow());
        let Some(v) = state.volumes.get(&VOL) else { return false };
        let leader = first.control.leader();
        let known = state.nodes.keys().filter(|n| Some(n.0) != self.outcast).count();
        known == members.len()
            && leader.is_some()
            && members.iter().all(|(m, up)| {
                let newest = state.newest(NodeId(m.id));
                up.control.leader() == leader
                    && newest == Some(up.control.incarnation())
                    && up.state.borrow().applied == state.applied
            })
            && self.serving().len() == 1
            && v.primary.is_some()
    }

    /// What the nodes are at, for people.
    fn picture(&self) -> String {
        let mut out = String::new();
        for (m, up) in self.cluster.ups() {
            let state = up.state.borrow();
            let leader = up.control.leader();
            let v = state.volumes.get(&VOL);
            let v = v.map(|v| (v.epoch, v.primary, v.in_sync.clone()));
            let blocked = up.control.leader_view().map(|view| view.blocked);
            let applied = state.applied;
            let _ = write!(
                out,
                "n{} applied {applied} leader {leader:?} volume {v:?} blocked {blocked:?}; ",
                m.id
            );
        }
        out
    }
}
