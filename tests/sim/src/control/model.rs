//! A model of Raft under the production state machine: one totally ordered log, elections with terms,
//! delays, stale views, lost and doubled messages, no quorum.
//!
//! What is real: the commands, `apply_under`, leases on both sides, the failover controller (in `leader` and
//! `node`, step by step as the production node uses them). What is modelled: how entries get committed. An
//! entry of the leader is committed once a majority is in reach; at an election a random part of what was
//! not committed survives; a leader that lost its leadership goes on believing in it until it hears of the
//! next one. Committed entries reach each node on their own time.
//!
//! Not modelled: votes and logs on disk, membership changes, snapshots [R13]; lockstep runs the real ones.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use blkrepl_engine::control::{
    Applied, ClusterOp, ClusterState, Command, Leadership, LeaseSnapshot, NodeAddrs, NodeKind, NodeLease,
    NodeRecord, RequestId, StoreId, VolumeReport, apply, apply_under,
};
use blkrepl_engine::types::{
    ClusterId, Health, Incarnation, LogIndex, Member, NodeId, Proposal, ReplicaReport, VolumeId,
};

use super::leader::{Confirm, Held, Lead};
use super::node::{Call, CallKind};
use super::queue::Queue;
use super::{ControlOutput, ControlPlane, Disturbance, Run};
use crate::clock::{Clock, MS, Time, US};
use crate::content::at as index;
use crate::rng::Rng;

/// How often it is looked whether there is a leader.
const WATCH: Time = 40 * MS;

/// Something that happens inside.
#[derive(Debug)]
pub(super) enum Inside {
    /// Look whether the leader leads.
    Watch,
    /// What is in the leader's log may be committed now.
    Commit,
    /// A quorum has (or has not) answered the leader.
    Quorum(Confirm),
    /// Something that a node does; put off while it stands still, void when its run is over.
    At(NodeId, Incarnation, Step),
}

/// What a node does.
#[derive(Debug)]
pub(super) enum Step {
    /// Applies what is committed.
    Apply,
    /// Sees in the metrics that it leads.
    SeesLeadership,
    LeaderTick,
    Renew(u64),
    RenewLate(u64),
    RenewAnswer(u64, Box<Result<blkrepl_engine::control::Grant, String>>),
    /// A renewal arrives at the leader.
    RenewArrives(Box<super::leader::Renewal>),
    Confirmed(Confirm),
    SubmitArrives(u64, u32, Box<Command>),
    WaitLease(Box<super::leader::Waiting>),
    Attempt(u64),
    AttemptLate(u64, u32),
    AttemptAnswer(u64, u32, super::node::Reply),
}

/// An entry that is not committed.
#[derive(Debug)]
pub(super) struct Entry {
    /// `None`: the blank one that a leadership begins with.
    command: Option<Command>,
    under: Leadership,
    ready: Time,
    /// Who waits for it at the leader, and what it holds there.
    pub(super) waits: Option<Waits>,
}

/// Who waits for an entry.
#[derive(Debug)]
pub(super) struct Waits {
    /// The call and the attempt; `None` for the failover controller.
    pub(super) call: Option<(u64, u32)>,
    pub(super) held: Option<Held>,
}

/// A node's part of the control plane.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) run: Option<Run>,
    pub(super) paused_until: Time,
    pub(super) applied: usize,
    stale_until: Time,
    pub(super) leader: Option<NodeId>,
    /// It leads, as far as it knows.
    pub(super) believes: Option<Leadership>,
    pub(super) lead: Lead,
    /// Written under a leadership that was over.
    pub(super) stale_writes: Vec<Waits>,
    pub(super) lease: NodeLease,
    pub(super) reports: BTreeMap<VolumeId, VolumeReport>,
    pub(super) requests: u64,
    pub(super) renew_turn: u64,
    pub(super) nonce: Option<u64>,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Model {
    pub(super) rng: Rng,
    pub(super) now: Time,
    pub(super) nodes: BTreeMap<NodeId, Node>,
    blocked: BTreeMap<(NodeId, NodeId), Time>,
    /// The state after each committed entry.
    pub(super) states: Vec<Arc<ClusterState>>,
    pending: VecDeque<Entry>,
    /// The leadership that can commit.
    pub(super) leads: Option<Leadership>,
    term: u64,
    leaderless_since: Option<Time>,
    patience: Time,
    slow: (u64, Time),
    lose: u32,
    double: u32,
    pub(super) calls: BTreeMap<u64, Call>,
    pub(super) next_call: u64,
    queue: Queue<Inside>,
    out: VecDeque<ControlOutput>,
}

impl Model {
    /// A founded cluster: data nodes 1 to `data`, and a witness after them.
    pub(crate) fn new(mut rng: Rng, data: u64, lease: Duration) -> Self {
        let addr = |kind: &str, id: u64| format!("n{id}:{kind}");
        let record = |id: u64| NodeRecord {
            id: NodeId(id),
            name: format!("n{id}"),
            kind: if id > data { NodeKind::Witness } else { NodeKind::Data },
            addrs: NodeAddrs { control: addr("c", id), peer: addr("p", id), nbd: addr("n", id) },
            store: StoreId(u128::from(id)),
            incarnation: None,
            os_boot: 0,
        };
        let nodes: Vec<NodeRecord> = (1..=data + 1).map(record).collect();
        let mut state = ClusterState::default();
        let request =
            RequestId { node: NodeId(1), incarnation: Incarnation::default(), volume: None, number: 0 };
        let op = ClusterOp::InitCluster { cluster: ClusterId(7), lease, nodes: nodes.clone() };
        let founded = apply(&mut state, LogIndex(1), Command { request, only_under: None, op });
        assert!(founded.is_done(), "the founding is sound: {founded}");
        let founded = Arc::new(state);
        let nodes = nodes.iter().map(|n| (n.id, Node::new(n.id))).collect();
        let patience = rng.between(200, 900) * MS;
        let mut model = Self {
            rng,
            now: 0,
            nodes,
            blocked: BTreeMap::new(),
            states: vec![Arc::new(ClusterState::default()), founded],
            pending: VecDeque::new(),
            leads: None,
            term: 0,
            leaderless_since: None,
            patience,
            slow: (1, 0),
            lose: 0,
            double: 0,
            calls: BTreeMap::new(),
            next_call: 1,
            queue: Queue::default(),
            out: VecDeque::new(),
        };
        model.queue.push(WATCH, Inside::Watch);
        model
    }

    // What is where.

    pub(super) fn is_up(&self, node: NodeId) -> bool {
        self.nodes[&node].run.is_some()
    }

    /// Until when nothing passes from one node to another; the past if it does.
    pub(super) fn blocked_until(&self, from: NodeId, to: NodeId) -> Time {
        self.blocked.get(&(from, to)).copied().unwrap_or(0)
    }

    fn is_awake(&self, node: NodeId) -> bool {
        self.is_up(node) && self.nodes[&node].paused_until <= self.now
    }

    fn reaches(&self, a: NodeId, b: NodeId) -> bool {
        a == b || (self.blocked_until(a, b) <= self.now && self.blocked_until(b, a) <= self.now)
    }

    /// True if a majority answers this node.
    pub(super) fn has_quorum(&self, node: NodeId) -> bool {
        let with = self.nodes.keys().filter(|n| self.is_awake(**n) && self.reaches(node, **n)).count();
        self.is_awake(node) && with * 2 > self.nodes.len()
    }

    pub(super) fn last_index(&self) -> usize {
        self.states.len() - 1
    }

    /// Last index of the leader's log.
    pub(super) fn last_log(&self) -> LogIndex {
        LogIndex((self.last_index() + self.pending.len()) as u64)
    }

    /// True once the blank entry of a leadership is committed: no read index is known before.
    pub(super) fn begun(&self, leadership: Leadership) -> bool {
        !self.pending.iter().any(|e| e.command.is_none() && e.under == leadership)
    }

    pub(super) fn current(&self, node: NodeId) -> Arc<ClusterState> {
        Arc::clone(&self.states[self.nodes[&node].applied])
    }

    pub(super) fn clock(&self, node: NodeId) -> Clock {
        self.nodes[&node].run.expect("only a running node reads its clock").clock
    }

    pub(super) fn local(&self, node: NodeId) -> blkrepl_engine::types::Nanos {
        self.clock(node).local(self.now)
    }

    pub(super) fn me(&self, node: NodeId) -> Option<Member> {
        Some(Member { node, incarnation: self.nodes[&node].run?.incarnation })
    }

    pub(super) fn node(&mut self, node: NodeId) -> &mut Node {
        self.nodes.get_mut(&node).expect("nodes are not removed")
    }

    // Time and messages.

    /// How long a message takes.
    pub(super) fn delay(&mut self) -> Time {
        let (factor, until) = self.slow;
        let factor = if self.now < until { factor } else { 1 };
        self.rng.skewed(50 * US, 4 * MS) * factor
    }

    pub(super) fn push(&mut self, after: Time, event: Inside) {
        self.queue.push(self.now + after, event);
    }

    /// Something that a node will do, unless its run ends before.
    pub(super) fn later(&mut self, after: Time, node: NodeId, step: Step) {
        if let Some(run) = self.nodes[&node].run {
            self.push(after, Inside::At(node, run.incarnation, step));
        }
    }

    /// When a message from `from` to `to` arrives if it leaves now; `None` if it does not within `limit`.
    pub(super) fn arrival(&mut self, from: NodeId, to: NodeId, limit: Time) -> Option<Time> {
        if from == to {
            return Some(self.rng.between(1, 50) * US);
        }
        let blocked = self.blocked_until(from, to).saturating_sub(self.now);
        let delay = blocked + self.delay();
        (delay <= limit && self.is_up(to)).then_some(delay)
    }

    /// True if a message with a command gets lost.
    pub(super) fn loses(&mut self) -> bool {
        let lost = self.lose > 0 && self.rng.chance(500);
        self.lose -= u32::from(lost);
        lost
    }

    pub(super) fn doubles(&mut self) -> bool {
        let doubled = self.double > 0;
        self.double -= u32::from(doubled);
        doubled
    }

    pub(super) fn say(&mut self, output: ControlOutput) {
        self.out.push_back(output);
    }

    /// Tells the world what a node knows now.
    pub(super) fn publish(&mut self, node: NodeId) {
        let state = self.current(node);
        let lease: LeaseSnapshot = self.nodes[&node].lease.snapshot().clone();
        self.say(ControlOutput::Update { node, state, lease });
    }

    fn run_event(&mut self, event: Inside) {
        match event {
            Inside::Watch => {
                self.watch();
                let wait = WATCH + self.rng.below(WATCH / 4);
                self.push(wait, Inside::Watch);
            }
            Inside::Commit => self.commit(),
            Inside::Quorum(confirm) => self.quorum_asked(confirm),
            Inside::At(node, incarnation, step) => {
                let n = &self.nodes[&node];
                if n.run.is_none_or(|run| run.incarnation != incarnation) {
                    return;
                }
                if n.paused_until > self.now {
                    // The order of what waits stays as it is.
                    let until = n.paused_until;
                    return self.queue.push(until, Inside::At(node, incarnation, step));
                }
                self.step(node, step);
            }
        }
    }

    fn step(&mut self, node: NodeId, step: Step) {
        match step {
            Step::Apply => self.apply_here(node),
            Step::SeesLeadership => self.sees_leadership(node),
            Step::LeaderTick => self.leader_tick(node),
            Step::Renew(turn) => self.renew(node, turn),
            Step::RenewLate(nonce) => self.renew_late(node, nonce),
            Step::RenewAnswer(nonce, answer) => self.renew_answered(node, nonce, *answer),
            Step::RenewArrives(renewal) => self.renewal_arrived(node, *renewal),
            Step::Confirmed(confirm) => self.confirmed(node, confirm),
            Step::SubmitArrives(call, attempt, command) => {
                self.submit_arrived(node, (call, attempt), *command);
            }
            Step::WaitLease(waiting) => self.wait_lease(node, *waiting),
            Step::Attempt(call) => self.attempt(call),
            Step::AttemptLate(call, attempt) => self.attempt_late(call, attempt),
            Step::AttemptAnswer(call, attempt, reply) => self.attempt_answered(call, attempt, reply),
        }
    }

    // The log.

    /// The leader writes an entry. False if its leadership is over without its knowing.
    pub(super) fn append(&mut self, leader: NodeId, command: Command, waits: Waits) -> bool {
        let Some(under) = self.nodes[&leader].believes.filter(|l| self.leads == Some(*l)) else {
            self.node(leader).stale_writes.push(waits);
            return false;
        };
        let delay = self.delay() + self.delay();
        let ready = self.now + delay;
        self.pending.push_back(Entry { command: Some(command), under, ready, waits: Some(waits) });
        self.push(delay, Inside::Commit);
        true
    }

    fn commit(&mut self) {
        let Some(leads) = self.leads else { return };
        if self.pending.is_empty() {
            return;
        }
        if !self.has_quorum(leads.node) {
            return self.push(20 * MS, Inside::Commit);
        }
        while self.pending.front().is_some_and(|e| e.ready <= self.now)
            && let Some(entry) = self.pending.pop_front()
        {
            self.commit_entry(leads, entry);
        }
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            if node == leads.node {
                self.apply_here(node);
            } else {
                let stale = self.nodes[&node].stale_until.saturating_sub(self.now);
                let after = stale.max(self.delay()) + self.rng.skewed(100 * US, 20 * MS);
                self.later(after, node, Step::Apply);
            }
        }
    }

    fn commit_entry(&mut self, leads: Leadership, entry: Entry) {
        let at = self.states.len();
        let mut state = ClusterState::clone(&self.states[at - 1]);
        let applied = match entry.command {
            Some(command) => apply_under(&mut state, LogIndex(at as u64), entry.under, command),
            None => {
                state.applied = LogIndex(at as u64);
                None
            }
        };
        if let Err(broken) = state.check() {
            panic!("a command broke an invariant of the cluster state: {broken}");
        }
        let state = Arc::new(state);
        self.states.push(Arc::clone(&state));
        self.say(ControlOutput::Committed { state });
        // Whoever waited at another leader hears that the leader changed.
        if let Some(waits) = entry.waits.filter(|_| entry.under == leads) {
            self.apply_here(leads.node);
            self.written(leads.node, waits, Some((at, applied)));
        }
    }

    fn apply_here(&mut self, node: NodeId) {
        let last = self.last_index();
        let applied = self.nodes[&node].applied;
        if !self.is_up(node) || applied == last {
            return;
        }
        let from = self.leads.map_or(node, |l| l.node);
        let blocked = self.blocked_until(from, node).max(self.nodes[&node].stale_until);
        if blocked > self.now && from != node {
            let wait = blocked - self.now + MS;
            return self.later(wait, node, Step::Apply);
        }
        // Entries come in batches; sometimes the end of one is still to come.
        let to = if from == node || self.rng.chance(800) { last } else { applied + 1 };
        if to < last {
            let wait = self.delay();
            self.later(wait, node, Step::Apply);
        }
        let n = self.node(node);
        n.applied = to;
        n.lease.on_applied(LogIndex(to as u64));
        self.applied_more(node);
        self.publish(node);
    }

    // Elections.

    fn watch(&mut self) {
        let fine = self.leads.is_some_and(|l| self.has_quorum(l.node));
        if fine {
            self.leaderless_since = None;
            let leads = self.leads.map(|l| l.node);
            for node in self.nodes.keys().copied().collect::<Vec<_>>() {
                let from = leads.unwrap_or(node);
                if self.nodes[&node].leader != leads && self.is_awake(node) && self.reaches(from, node) {
                    self.learn_leader(node);
                }
            }
            return;
        }
        let since = *self.leaderless_since.get_or_insert(self.now);
        if self.now - since >= self.patience {
            self.elect();
        }
    }

    /// Somebody wins an election, if anybody can.
    fn elect(&mut self) {
        let able: Vec<NodeId> = self.nodes.keys().copied().filter(|n| self.has_quorum(*n)).collect();
        if able.is_empty() {
            return;
        }
        let winner = self.rng.pick(&able);
        self.term += self.rng.between(1, 2);
        self.patience = self.rng.between(200, 900) * MS;
        self.leaderless_since = None;
        let leadership = Leadership { term: self.term, node: winner };
        // What the winner has of the old leader's log stays in it; the rest never happened.
        let kept = index(self.rng.below(self.pending.len() as u64 + 1));
        let (kept, lost): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.pending).into_iter().enumerate().partition(|(n, _)| *n < kept);
        if let Some(old) = self.leads {
            let waits = lost.into_iter().filter_map(|(_, e)| e.waits);
            self.node(old.node).stale_writes.extend(waits);
        }
        self.leads = Some(leadership);
        for (_, mut entry) in kept {
            let waits = entry.waits.take();
            let old = entry.under.node;
            self.node(old).stale_writes.extend(waits);
            self.pending.push_back(entry);
        }
        let delay = self.delay() + self.delay();
        let ready = self.now + delay;
        self.pending.iter_mut().for_each(|e| e.ready = ready);
        self.pending.push_back(Entry { command: None, under: leadership, ready, waits: None });
        self.push(delay, Inside::Commit);
        let n = self.node(winner);
        n.believes = Some(leadership);
        let notices = self.rng.skewed(10 * US, 5 * MS);
        self.later(notices, winner, Step::SeesLeadership);
        self.set_leader_known(winner, winner);
    }

    fn learn_leader(&mut self, node: NodeId) {
        let Some(leads) = self.leads else { return };
        if node != leads.node && self.nodes[&node].believes.is_some() {
            self.node(node).believes = None;
            self.step_down(node);
        }
        self.set_leader_known(node, leads.node);
        self.later(US, node, Step::Apply);
    }

    fn set_leader_known(&mut self, node: NodeId, leader: NodeId) {
        if self.nodes[&node].leader != Some(leader) {
            self.node(node).leader = Some(leader);
            self.renew_soon(node);
        }
    }
}

impl Node {
    fn new(id: NodeId) -> Self {
        Self {
            run: None,
            paused_until: 0,
            applied: 1,
            stale_until: 0,
            leader: None,
            believes: None,
            lead: Lead::default(),
            stale_writes: Vec::new(),
            lease: NodeLease::new(id, Incarnation::default()),
            reports: BTreeMap::new(),
            requests: 1,
            renew_turn: 0,
            nonce: None,
        }
    }
}

impl ControlPlane for Model {
    fn start(&mut self, at: Time, node: NodeId, run: Run) {
        self.now = at;
        let applied = self.nodes[&node].applied;
        let fresh =
            Node { run: Some(run), applied, lease: NodeLease::new(node, run.incarnation), ..Node::new(node) };
        self.nodes.insert(node, fresh);
        self.publish(node);
        self.renew_soon(node);
        let wait = self.rng.skewed(MS, 50 * MS);
        self.later(wait, node, Step::Apply);
    }

    fn crash(&mut self, at: Time, node: NodeId) {
        self.now = at;
        let applied = self.nodes[&node].applied;
        self.nodes.insert(node, Node { applied, ..Node::new(node) });
        self.calls.retain(|_, call| call.node != node);
        if self.leads.is_some_and(|l| l.node == node) {
            // Its log stays on its disk; whether others have it is decided at the election.
            self.leads = None;
        }
    }

    fn pause(&mut self, at: Time, node: NodeId, until: Time) {
        self.now = at;
        self.node(node).paused_until = until;
    }

    fn block(&mut self, at: Time, from: NodeId, to: NodeId, until: Time) {
        self.now = at;
        let blocked = self.blocked.entry((from, to)).or_default();
        *blocked = (*blocked).max(until);
    }

    fn set_report(
        &mut self,
        at: Time,
        node: NodeId,
        volume: VolumeId,
        health: Health,
        report: ReplicaReport,
    ) {
        self.now = at;
        let was = self.nodes[&node].reports.get(&volume).map(|r| r.health == Health::Healthy);
        let healthy = health == Health::Healthy;
        self.node(node).reports.insert(volume, VolumeReport { health, report });
        if was != Some(healthy) {
            self.renew_soon(node);
        }
    }

    fn propose(&mut self, at: Time, node: NodeId, proposal: Proposal) {
        self.now = at;
        let request = RequestId::of_proposal(&proposal);
        self.submit_call(node, request, ClusterOp::Propose(proposal), CallKind::Proposal(proposal));
    }

    fn submit(&mut self, at: Time, node: NodeId, ticket: u64, op: ClusterOp) {
        self.now = at;
        let Some(request) = self.next_request(node) else { return };
        self.submit_call(node, request, op, CallKind::Operator(ticket));
    }

    fn disturb(&mut self, at: Time, what: Disturbance) {
        self.now = at;
        match what {
            Disturbance::Election => self.elect(),
            Disturbance::Slow { factor, until } => self.slow = (factor, until),
            Disturbance::Stale { node, until } => self.node(node).stale_until = until,
            Disturbance::Lose(n) => self.lose += n,
            Disturbance::Double(n) => self.double += n,
        }
    }

    fn deadline(&self) -> Time {
        self.queue.next_at()
    }

    fn advance(&mut self, to: Time) {
        while self.queue.next_at() <= to {
            let Some((at, event)) = self.queue.pop() else { return };
            self.now = at;
            self.run_event(event);
        }
        self.now = to;
    }

    fn poll(&mut self) -> Option<ControlOutput> {
        self.out.pop_front()
    }

    fn committed(&self) -> Arc<ClusterState> {
        Arc::clone(self.states.last().expect("the founding is committed"))
    }

    fn heal(&mut self, at: Time) {
        self.now = at;
        self.blocked.clear();
        self.slow = (1, 0);
        (self.lose, self.double) = (0, 0);
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.node(node).stale_until = 0;
            self.later(MS, node, Step::Apply);
        }
    }
}

/// What an applied entry says to whoever waited for it.
pub(super) fn fate(applied: Option<Applied>) -> super::node::Reply {
    match applied {
        Some(applied) => super::node::Reply::Applied(applied),
        None => super::node::Reply::NotLeader,
    }
}
