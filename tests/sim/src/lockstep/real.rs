//! The production control plane in lockstep with the data plane: real Raft behind [`ControlPlane`].
//!
//! The world owns time. It asks when the control plane wants to run, lets it do one event, and takes what the
//! nodes publish; what a replica or an operator asks goes to the node of that machine, as in `blkrepl serve`.
//! The cluster is founded before the run begins, always in the same way, and its disks are where it begins.
//!
//! A disturbance that only a model can do by a word is done here as it happens: a leader loses its leadership
//! because nobody hears it, messages are lost because streams break.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blkrepl_engine::control::{ClusterOp, ClusterState, NodeKind, StoreId, SubmitError};
use blkrepl_engine::types::{Health, Member, NodeId, Proposal, ProposalOutcome, ReplicaReport, VolumeId};

use crate::clock::{Clock, MS, NEVER, S, Time, US};
use crate::control::{ControlOutput, ControlPlane, Disturbance, Run};
use crate::rng::Rng;

use super::cluster::{Cluster, Setup, Stepped};
use super::disk::Image;
use super::host::{Now, lock};
use super::net::Link;

/// How long the founding may take.
const FOUNDING: Time = 20 * S;

enum Answer {
    Proposed(Proposal, ProposalOutcome),
    Submitted(u64, Result<(), SubmitError>),
}

/// By whom (node and run) and what.
type Answers = Arc<Mutex<Vec<(Member, Answer)>>>;

/// What waits for its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Todo {
    Resume(u64),
    Unblock(u64, u64),
    Normal,
}

/// A founded cluster, stopped: what a run begins with.
#[derive(Clone)]
struct Founded {
    images: Vec<(u64, Image, StoreId)>,
    state: Arc<ClusterState>,
}

thread_local! {
    /// By number of data nodes and length of leases. They follow from these alone.
    static FOUNDED: RefCell<BTreeMap<(u64, Duration), Founded>> = const { RefCell::new(BTreeMap::new()) };
}

/// See the module's head.
pub(crate) struct Real {
    cluster: Cluster,
    rng: Rng,
    /// What delays and losses are, without a disturbance.
    link: Link,
    todo: BTreeSet<(Time, u64, Todo)>,
    number: u64,
    blocked: BTreeMap<(u64, u64), Time>,
    reports: BTreeMap<(u64, VolumeId), (Health, ReplicaReport)>,
    /// Asked while the node was still starting.
    early: Vec<(u64, Asked)>,
    answers: Answers,
    committed: Arc<ClusterState>,
    out: VecDeque<ControlOutput>,
    running: BTreeMap<u64, Run>,
    paused: BTreeMap<u64, Time>,
}

#[derive(Clone)]
enum Asked {
    Propose(Proposal),
    Submit(u64, ClusterOp),
}

fn setup(data: u64, lease: Duration) -> Setup {
    let mut founders: Vec<_> = (1..=data).map(|id| (id, NodeKind::Data)).collect();
    founders.push((data + 1, NodeKind::Witness));
    Setup {
        founders,
        lease,
        renew: Duration::from_millis(400),
        heartbeat: Duration::from_millis(100),
        election: (Duration::from_millis(400), Duration::from_millis(800)),
    }
}

fn found(data: u64, lease: Duration) -> Founded {
    let mut cluster = Cluster::new(setup(data, lease), Now::default(), Rng::new(data));
    let ids = 1..=data + 1;
    for id in ids.clone() {
        cluster.add(id, Clock::new(0, S, 0));
        cluster.start(id);
    }
    let registered = |cluster: &Cluster| {
        let mut states = cluster.ups().map(|(_, up)| Arc::clone(&up.state.borrow()));
        let all = |s: &ClusterState| {
            s.nodes.values().filter(|n| n.incarnation.is_some()).count() as u64 == data + 1
        };
        let first = states.next()?;
        let agree = cluster.ups().count() as u64 == data + 1 && states.all(|s| s.applied == first.applied);
        (agree && all(&first)).then_some(first)
    };
    while cluster.now.get() < FOUNDING {
        assert!(!matches!(cluster.step(FOUNDING), Stepped::Broken(_)), "a founding without faults");
        assert!(cluster.look().is_empty(), "a founding without faults");
        if let Some(state) = registered(&cluster) {
            for id in ids {
                cluster.kill(id, false);
            }
            let images = cluster.machines.values().map(|m| (m.id, m.disk.image(), m.store)).collect();
            return Founded { images, state };
        }
    }
    panic!("a cluster without faults is founded within {FOUNDING} ns");
}

impl Real {
    /// A founded cluster: data nodes 1 to `data`, and a witness after them.
    pub(crate) fn new(mut rng: Rng, data: u64, lease: Duration) -> Self {
        let known = FOUNDED.with(|founded| founded.borrow().get(&(data, lease)).cloned());
        let founded = known.unwrap_or_else(|| {
            let founded = found(data, lease);
            FOUNDED.with(|all| all.borrow_mut().insert((data, lease), founded.clone()));
            founded
        });
        let mut cluster = Cluster::new(setup(data, lease), Now::default(), rng.fork());
        for (id, image, store) in founded.images {
            cluster.add_with(id, Clock::new(0, S, 0), image, store);
        }
        let link = Link {
            delay_max: rng.pick(&[200 * US, MS, 5 * MS]),
            loss: rng.pick(&[0, 0, 1, 10]),
            ..Link::default()
        };
        let real = Self {
            cluster,
            rng,
            link,
            todo: BTreeSet::new(),
            number: 0,
            blocked: BTreeMap::new(),
            reports: BTreeMap::new(),
            early: Vec::new(),
            answers: Answers::default(),
            committed: founded.state,
            out: VecDeque::new(),
            running: BTreeMap::new(),
            paused: BTreeMap::new(),
        };
        real.all_links(|_| {});
        real
    }

    fn ids(&self) -> Vec<u64> {
        self.cluster.machines.keys().copied().collect()
    }

    /// Sets all links to what is normal, with a change; those that are blocked stay so.
    fn all_links(&self, change: impl Fn(&mut Link)) {
        let ids = self.ids();
        for from in &ids {
            for to in ids.iter().filter(|to| *to != from) {
                let mut link = self.link;
                change(&mut link);
                link.cut = self.blocked.contains_key(&(*from, *to));
                self.cluster.net.set_link(*from, *to, link);
            }
        }
    }

    fn later(&mut self, at: Time, what: Todo) {
        self.number += 1;
        self.todo.insert((at, self.number, what));
    }

    fn block_link(&mut self, from: u64, to: u64, until: Time) {
        let blocked = self.blocked.entry((from, to)).or_default();
        *blocked = (*blocked).max(until);
        let link = Link { cut: true, ..self.cluster.net.link(from, to) };
        self.cluster.net.set_link(from, to, link);
        self.later(until, Todo::Unblock(from, to));
    }

    fn act(&mut self, what: Todo) {
        let now = self.cluster.now.get();
        match what {
            Todo::Resume(id) if self.paused.get(&id).is_some_and(|until| *until > now) => {}
            Todo::Resume(id) => {
                let machine = self.cluster.machines.get_mut(&id).expect("a machine");
                machine.paused = false;
            }
            Todo::Unblock(from, to) => {
                if self.blocked.get(&(from, to)).is_some_and(|until| *until <= now) {
                    self.blocked.remove(&(from, to));
                    let link = Link { cut: false, ..self.cluster.net.link(from, to) };
                    self.cluster.net.set_link(from, to, link);
                }
            }
            Todo::Normal => self.all_links(|_| {}),
        }
    }

    /// Time goes on to `at`; nothing was due before.
    fn now(&self, at: Time) {
        self.cluster.now.set(at.max(self.cluster.now.get()));
    }

    /// Hands a question to a node.
    fn ask(&mut self, id: u64, asked: Asked) {
        let Some(run) = self.running.get(&id) else { return };
        let member = Member { node: NodeId(id), incarnation: run.incarnation };
        let answers = Arc::clone(&self.answers);
        let question = asked.clone();
        let done = self.cluster.with(id, |process, control| {
            let control = control.clone();
            process.start(async move {
                let answer = match question {
                    Asked::Propose(proposal) => Answer::Proposed(proposal, control.propose(proposal).await),
                    Asked::Submit(ticket, op) => {
                        Answer::Submitted(ticket, control.submit(op).await.map(drop))
                    }
                };
                lock(&answers).push((member, answer));
            });
        });
        if done.is_none() {
            self.early.push((id, asked));
        }
    }

    /// Takes what the nodes have published.
    fn observe(&mut self) {
        let before: Vec<u64> = self.cluster.ups().map(|(m, _)| m.id).collect();
        for (id, reason) in self.cluster.look() {
            self.out.push_back(ControlOutput::Refused { node: NodeId(id), reason });
        }
        let after: Vec<u64> = self.cluster.ups().map(|(m, _)| m.id).collect();
        for (_, state) in self.cluster.take_applied() {
            if state.applied > self.committed.applied {
                self.committed = Arc::clone(&state);
                self.out.push_back(ControlOutput::Committed { state });
            }
        }
        for id in after.iter().filter(|id| !before.contains(id)) {
            self.came_up(*id);
        }
        for (id, machine) in &mut self.cluster.machines {
            let Some(up) = machine.run.as_mut().and_then(|run| run.up.as_mut()) else { continue };
            // The senders live as long as the node.
            let new = up.state.has_changed().unwrap_or(false) || up.leases.has_changed().unwrap_or(false);
            if new || !before.contains(id) {
                let state = Arc::clone(&up.state.borrow_and_update());
                let lease = up.leases.borrow_and_update().clone();
                self.out.push_back(ControlOutput::Update { node: NodeId(*id), state, lease });
            }
        }
        for (member, answer) in std::mem::take(&mut *lock(&self.answers)) {
            let node = member.node;
            if self.running.get(&node.0).is_none_or(|run| run.incarnation != member.incarnation) {
                continue;
            }
            self.out.push_back(match answer {
                Answer::Proposed(proposal, outcome) => ControlOutput::Outcome { node, proposal, outcome },
                Answer::Submitted(ticket, result) => {
                    let result = result.map_err(|e| e.to_string());
                    ControlOutput::Submitted { node, ticket, result }
                }
            });
        }
    }

    /// A node runs: it hears what its replicas said meanwhile.
    fn came_up(&mut self, id: u64) {
        let run = self.running[&id];
        let own = self.cluster.up(id).map(|up| up.control.incarnation());
        assert_eq!(own, Some(run.incarnation), "the store counts the starts that the world counts");
        let reports: Vec<_> = self.reports.iter().filter(|((node, _), _)| *node == id).collect();
        for ((_, volume), (health, report)) in reports {
            self.cluster.with(id, |_, c| c.set_volume_report(*volume, health.clone(), *report));
        }
        for (node, asked) in std::mem::take(&mut self.early) {
            if node == id {
                self.ask(id, asked);
            } else {
                self.early.push((node, asked));
            }
        }
    }

    /// A node that leads.
    fn leader(&self) -> Option<NodeId> {
        let leads = |id: &u64| self.cluster.up(*id).is_some_and(|up| up.control.leader_view().is_some());
        self.cluster.machines.keys().find(|id| leads(id)).map(|id| NodeId(*id))
    }
}

impl ControlPlane for Real {
    fn boots(&self) -> u64 {
        1
    }

    fn start(&mut self, at: Time, node: NodeId, run: Run) {
        self.now(at);
        let machine = self.cluster.machines.get_mut(&node.0).expect("a machine");
        machine.clock = run.clock;
        machine.os_boot = run.os_boot;
        machine.nonce = Some(run.incarnation.nonce);
        self.running.insert(node.0, run);
        self.cluster.start(node.0);
    }

    fn crash(&mut self, at: Time, node: NodeId) {
        self.now(at);
        if self.running.remove(&node.0).is_none() {
            return;
        }
        // Whether the machine lost its power, too, is all the same to the world; the store must survive both.
        let power = self.rng.chance(500);
        self.cluster.kill(node.0, power);
        self.paused.remove(&node.0);
        self.reports.retain(|(id, _), _| *id != node.0);
        self.early.retain(|(id, _)| *id != node.0);
    }

    fn pause(&mut self, at: Time, node: NodeId, until: Time) {
        self.now(at);
        let machine = self.cluster.machines.get_mut(&node.0).expect("a machine");
        machine.paused = machine.run.is_some();
        self.paused.insert(node.0, until);
        self.later(until, Todo::Resume(node.0));
    }

    fn block(&mut self, at: Time, from: NodeId, to: NodeId, until: Time) {
        self.now(at);
        if from != to {
            self.block_link(from.0, to.0, until);
        }
    }

    fn set_report(
        &mut self,
        at: Time,
        node: NodeId,
        volume: VolumeId,
        health: Health,
        report: ReplicaReport,
    ) {
        self.now(at);
        self.cluster.with(node.0, |_, control| control.set_volume_report(volume, health.clone(), report));
        self.reports.insert((node.0, volume), (health, report));
    }

    fn propose(&mut self, at: Time, node: NodeId, proposal: Proposal) {
        self.now(at);
        self.ask(node.0, Asked::Propose(proposal));
    }

    fn submit(&mut self, at: Time, node: NodeId, ticket: u64, op: ClusterOp) {
        self.now(at);
        self.ask(node.0, Asked::Submit(ticket, op));
    }

    fn disturb(&mut self, at: Time, what: Disturbance) {
        self.now(at);
        match what {
            Disturbance::Election => {
                // Nobody hears the leader for longer than they wait for it.
                let Some(leader) = self.leader() else { return };
                let until = at + self.rng.between(900 * MS, 1800 * MS);
                let one_way = self.rng.chance(300);
                for id in self.ids().into_iter().filter(|id| *id != leader.0) {
                    self.block_link(leader.0, id, until);
                    if !one_way {
                        self.block_link(id, leader.0, until);
                    }
                }
            }
            Disturbance::Slow { factor, until } => {
                self.all_links(|link| link.delay_max *= factor);
                self.later(until, Todo::Normal);
            }
            Disturbance::Stale { node, until } => {
                for id in self.ids().into_iter().filter(|id| *id != node.0) {
                    self.block_link(id, node.0, until.min(at + S));
                }
            }
            Disturbance::Lose(count) | Disturbance::Double(count) => {
                // What is under way is lost, or was heard and is sent again.
                for _ in 0..count {
                    let ids = self.ids();
                    let (a, b) = (self.rng.pick(&ids), self.rng.pick(&ids));
                    self.cluster.net.reset(a, b);
                }
            }
        }
    }

    fn deadline(&self) -> Time {
        if !self.out.is_empty() {
            return self.cluster.now.get();
        }
        let todo = self.todo.first().map(|(at, ..)| *at);
        let next = self.cluster.next_event().into_iter().chain(todo).min();
        next.map_or(NEVER, |at| at.max(self.cluster.now.get()))
    }

    fn advance(&mut self, to: Time) {
        while let Some((at, number, what)) = self.todo.first().copied()
            && at <= to
        {
            self.now(at);
            self.todo.remove(&(at, number, what));
            self.act(what);
        }
        // One event, so that the world hears of each at its time.
        if let Stepped::Broken(why) = self.cluster.step(to) {
            panic!("the control plane: {why}");
        }
        self.observe();
    }

    fn poll(&mut self) -> Option<ControlOutput> {
        self.out.pop_front()
    }

    fn committed(&self) -> Arc<ClusterState> {
        Arc::clone(&self.committed)
    }

    fn heal(&mut self, at: Time) {
        self.now(at);
        self.blocked.clear();
        self.todo.retain(|(_, _, what)| matches!(what, Todo::Resume(_)));
        self.all_links(|_| {});
    }
}
