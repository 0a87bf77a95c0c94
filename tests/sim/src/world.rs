//! The whole cluster, its clients, and one event after the other.

use std::sync::Arc;
use std::time::Duration;

use blkrepl_engine::control::ClusterState;
use blkrepl_engine::meta::DataIdentity;
use blkrepl_engine::mutation::{Mutation, mutated};
use blkrepl_engine::replica::{ClientInput, ConnId, DiskOpId};
use blkrepl_engine::types::{
    Durability, Geometry, Incarnation, NodeId, REGION_SIZE_DEFAULT, VolumeId, VolumeSettings,
};

use crate::client::{Client, ClientEvent};
use crate::clock::{Clock, DRIFT_PPM_MAX, MS, NEVER, S, Time, US};
use crate::content::{BLOCK, SECTORS, at};
use crate::control::queue::Queue;
use crate::control::{ControlOutput, ControlPlane, Model};
use crate::disk::Disk;
use crate::fault::{FaultKind, Strike};
use crate::history::History;
use crate::lockstep::Real;
use crate::net::{Conn, Link};
use crate::node::{Mail, Node, Phase};
use crate::operator::Operator;
use crate::options::Options;
use crate::outcome::{Invariant, Outcome, Stats, Violation};
use crate::rng::Rng;
use crate::trace::Trace;

/// The one volume.
pub(crate) const VOLUME: VolumeId = VolumeId(9);
const _: () = assert!(REGION_SIZE_DEFAULT >= 65536);

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// At a data node, in this run of its process (and for most, of the replica in it).
    Node(NodeId, Life, NodeEvent),
    /// The oldest frame that this end of the connection has sent arrives.
    Frame(usize, usize),
    /// This end hears that the other is closed.
    Closed(usize, usize),
    Client(usize, ClientEvent),
    Strike(u32),
    /// A process that is down is started.
    Start(NodeId),
    /// The data object is one machine away: an operator looks at what cannot be used.
    Operator,
    /// The checks of everything at once, and the next phase if it is time.
    Check,
}

/// A run of a node's process, and of the replica in it, which may be made anew while the process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) boot: u64,
    pub(crate) replica: u64,
}

/// Something that happens at a node.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    Tick,
    Disk(DiskOpId),
    Open,
    Mail,
    Dial(NodeId),
    /// A connection is there: this end of it goes to the replica.
    Up(usize, usize),
    Request(ConnId, usize),
    ClientGone(ConnId),
    /// A replica is to be made anew, by then.
    Recreate(Time),
    /// The process ends by itself.
    Exit,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The volume does not exist, or is not served yet.
    Founding,
    /// Faults strike until then.
    Faults {
        until: Time,
    },
    /// Faults are over: everything has to come back by then.
    Healing {
        by: Time,
    },
    /// The clients have stopped; what is under way ends, then everything is compared.
    Ending {
        at: Time,
        by: Time,
    },
    Over,
}

/// What is drawn once per run.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) data: u64,
    pub(crate) geometry: Geometry,
    pub(crate) settings: VolumeSettings,
    pub(crate) lease: Duration,
    pub(crate) clients: u64,
    /// Pace of the clients: mean pause between two bursts of one client.
    pub(crate) pause: Time,
    pub(crate) burst_max: u64,
    pub(crate) reads: u64,
    pub(crate) flushes: u64,
    pub(crate) partial: u64,
    pub(crate) hot_blocks: u64,
    /// How long faults strike.
    pub(crate) faults_for: Time,
    pub(crate) net_max: Time,
    pub(crate) disk_max: Time,
}

impl Shape {
    fn draw(rng: &mut Rng, options: &Options) -> Self {
        let data = if rng.chance(300) { 3 } else { 2 };
        let blocks = rng.pick(&[24, 48, 64, 128]);
        let ms = |n: u64| Duration::from_millis(n);
        let peer_timeout = ms(rng.pick(&[200, 300, 500, 1000]));
        let settings = VolumeSettings {
            durability: if rng.chance(100) { Durability::Always } else { Durability::Flush },
            peer_timeout,
            disk_timeout: ms(rng.pick(&[1500, 4000, 30_000])),
            intent_regions_max: u32::try_from(rng.pick(&[1, 2, 4, 256])).expect("small"),
            resync_window_bytes: u32::try_from(rng.pick(&[4096, 65536, 4 << 20])).expect("small"),
            resync_latency_budget: ms(rng.pick(&[1, 10, 1000])),
        };
        let clients = rng.between(1, 4);
        let faults_for = rng.between(4, 16) * S;
        let burst_max = rng.pick(&[1_u64, 2, 6, 16]);
        let per_client = (u64::from(options.ops) / clients).max(1);
        Self {
            data: options.data_nodes.map_or(data, u64::from).clamp(2, 3),
            geometry: Geometry::new(blocks * BLOCK, 4096, 65536).expect("sound sizes"),
            settings,
            lease: ms(rng.pick(&[300, 500, 1000, 1500])),
            clients,
            // So that the operations last about as long as the faults.
            pause: faults_for * burst_max.div_ceil(2) / per_client,
            burst_max,
            reads: rng.between(100, 600),
            flushes: rng.between(10, 120),
            partial: rng.between(0, 500),
            hot_blocks: rng.pick(&[2, 6, 24]),
            faults_for,
            net_max: rng.pick(&[100 * US, 500 * US, 3 * MS]),
            disk_max: rng.pick(&[200 * US, MS, 5 * MS]),
        }
    }
}

/// See the module's head.
pub(crate) struct World {
    pub(crate) now: Time,
    pub(crate) rng: Rng,
    pub(crate) options: Options,
    pub(crate) shape: Shape,
    pub(crate) stage: Stage,
    pub(crate) queue: Queue<Event>,
    pub(crate) control: Box<dyn ControlPlane>,
    pub(crate) committed: Arc<ClusterState>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) witness_up: bool,
    pub(crate) witness_boot: u64,
    pub(crate) conns: Vec<Conn>,
    pub(crate) links: Vec<Link>,
    pub(crate) clients: Vec<Client>,
    pub(crate) history: History,
    pub(crate) operator: Operator,
    pub(crate) strikes: Vec<Strike>,
    pub(crate) struck: Vec<bool>,
    pub(crate) stats: Stats,
    pub(crate) trace: Trace,
    pub(crate) violation: Option<Violation>,
    /// The newest reign in which an answer was given.
    pub(crate) answered_reign: u64,
    /// When the volume was last seen to be served by somebody.
    /// Requests that were answered when it was last looked whether the clients get on.
    pub(crate) answered_seen: u64,
    pub(crate) served_at: Time,
}

impl World {
    /// A world around the modelled control plane.
    pub(crate) fn new(seed: u64, options: &Options) -> Self {
        let mut rng = Rng::new(seed);
        let shape = Shape::draw(&mut rng, options);
        let control = Box::new(Model::new(rng.fork(), shape.data, shape.lease));
        Self::around(control, rng, shape, options)
    }

    /// A world around the control plane of production.
    pub(crate) fn lockstep(seed: u64, options: &Options) -> Self {
        let mut rng = Rng::new(seed);
        let shape = Shape::draw(&mut rng, options);
        let control = Box::new(Real::new(rng.fork(), shape.data, shape.lease));
        Self::around(control, rng, shape, options)
    }

    /// A world around any control plane.
    pub(crate) fn around(
        control: Box<dyn ControlPlane>,
        mut rng: Rng,
        shape: Shape,
        options: &Options,
    ) -> Self {
        let ppm = |rng: &mut Rng| {
            let half = DRIFT_PPM_MAX.unsigned_abs();
            i64::try_from(rng.between(0, 2 * half)).unwrap_or(0) - DRIFT_PPM_MAX
        };
        let drifts = rng.chance(500);
        let mut nodes = Vec::new();
        for id in 1..=shape.data {
            let drawn = ppm(&mut rng);
            let clock = Clock::new(0, rng.between(1, 900) * S, if drifts { drawn } else { 0 });
            let disk =
                Disk::blank(shape.geometry, VOLUME, DataIdentity([u8::try_from(id).expect("few nodes"); 32]));
            let mut node = Node::new(NodeId(id), clock, disk);
            node.incarnation.boot = control.boots();
            node.starts = control.boots();
            nodes.push(node);
        }
        let links = at(shape.data + 2);
        let sectors = shape.geometry.blocks() * SECTORS;
        let clients = (0..shape.clients).map(|_| Client::new(shape.data, &mut rng)).collect();
        let (committed, boots) = (control.committed(), control.boots());
        let mut world = Self {
            now: 0,
            options: options.clone(),
            stage: Stage::Founding,
            queue: Queue::default(),
            control,
            committed,
            nodes,
            witness_up: false,
            witness_boot: boots,
            conns: Vec::new(),
            links: vec![Link::default(); links * links],
            clients,
            history: History::new(sectors),
            operator: Operator::default(),
            strikes: Vec::new(),
            struck: Vec::new(),
            stats: Stats::default(),
            trace: Trace::new(options.trace),
            violation: None,
            answered_reign: 0,
            answered_seen: 0,
            served_at: 0,
            rng,
            shape,
        };
        for id in 1..=world.shape.data + 1 {
            world.start(NodeId(id));
        }
        world.queue.push(10 * MS, Event::Check);
        world
    }

    // Who is who.

    pub(crate) fn witness(&self) -> NodeId {
        NodeId(self.shape.data + 1)
    }

    pub(crate) fn node(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[at(id.0 - 1)]
    }

    pub(crate) fn node_ref(&self, id: NodeId) -> &Node {
        &self.nodes[at(id.0 - 1)]
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (1..=self.shape.data).map(NodeId)
    }

    pub(crate) fn link(&mut self, from: NodeId, to: NodeId) -> &mut Link {
        let width = at(self.shape.data + 2);
        &mut self.links[at(from.0) * width + at(to.0)]
    }

    pub(crate) fn link_ref(&self, from: NodeId, to: NodeId) -> Link {
        self.links[at(from.0) * at(self.shape.data + 2) + at(to.0)]
    }

    // What goes wrong, and what is seen.

    pub(crate) fn broke(&mut self, invariant: Invariant, text: String) {
        if self.violation.is_none() {
            self.trace.line(self.now, "BROKEN", format_args!("{invariant}: {text}"));
            self.violation = Some(Violation { invariant, text, at: self.now });
        }
    }

    pub(crate) fn note(&mut self, who: impl std::fmt::Display, what: std::fmt::Arguments<'_>) {
        self.trace.line(self.now, who, what);
    }

    // The loop.

    pub(crate) fn schedule(&mut self, after: Time, event: Event) {
        self.queue.push(self.now + after, event);
    }

    pub(crate) fn at_node(&mut self, after: Time, node: NodeId, event: NodeEvent) {
        let life = self.node_ref(node).life();
        self.schedule(after, Event::Node(node, life, event));
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(&mut self) {
        while self.violation.is_none() && self.stage != Stage::Over {
            let (control, world) = (self.control.deadline(), self.queue.next_at());
            if control <= world {
                assert!(control < NEVER, "nothing is left to happen");
                self.now = control;
                self.control.advance(control);
                self.trace.mix(&[1, control]);
            } else if let Some((at, event)) = self.queue.pop() {
                self.now = at;
                self.stats.events += 1;
                self.handle(event);
            }
            self.hear_control();
        }
        self.stats.simulated = self.now;
        self.stats.excused_reads = self.history.excused_reads;
    }

    /// The end of the run.
    pub(crate) fn outcome(&mut self) -> Outcome {
        let trace = std::mem::replace(&mut self.trace, Trace::new(false));
        let (hash, trace) = trace.finish();
        let strikes = (0u32..).zip(&self.strikes).zip(&self.struck);
        let strikes = strikes.map(|((n, s), took)| (n, s.at, s.kind, *took)).collect();
        Outcome { violation: self.violation.take(), stats: self.stats.clone(), hash, trace, strikes }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Node(id, life, event) => {
                let n = self.node_ref(id);
                let of_process = matches!(
                    event,
                    NodeEvent::Mail | NodeEvent::Open | NodeEvent::Recreate(_) | NodeEvent::Exit
                );
                if !n.is_up() || n.life().boot != life.boot || (!of_process && n.life() != life) {
                    return;
                }
                if n.paused_until > self.now {
                    let until = n.paused_until;
                    return self.queue.push(until, Event::Node(id, life, event));
                }
                self.handle_node(id, event);
            }
            Event::Frame(conn, from) => self.frame_arrives(conn, from),
            Event::Closed(conn, side) => self.hears_of_close(conn, side),
            Event::Client(client, event) => self.handle_client(client, event),
            Event::Strike(number) => self.strike(number),
            Event::Start(id) => self.start(id),
            Event::Operator => self.operate(),
            Event::Check => self.check(),
        }
    }

    fn handle_node(&mut self, id: NodeId, event: NodeEvent) {
        match event {
            NodeEvent::Tick => self.tick(id),
            NodeEvent::Disk(op) => self.disk_done(id, op),
            NodeEvent::Open => self.open(id),
            NodeEvent::Mail => self.read_mail(id),
            NodeEvent::Dial(peer) => self.dial(id, peer),
            NodeEvent::Up(conn, side) => self.session_up(id, conn, side),
            NodeEvent::Request(conn, op) => self.request_arrives(id, conn, op),
            NodeEvent::ClientGone(conn) => {
                if !mutated(Mutation::R24) && self.node(id).clients.remove(&conn).is_some() {
                    self.input(id, |r, now| r.handle_client(now, ClientInput::Closed(conn)));
                }
            }
            NodeEvent::Recreate(by) => self.recreate(id, by),
            NodeEvent::Exit => self.crash(id, false),
        }
    }

    /// Takes what the control plane has to say.
    pub(crate) fn hear_control(&mut self) {
        while let Some(output) = self.control.poll() {
            match output {
                ControlOutput::Update { node, state, lease } => {
                    if node != self.witness() {
                        self.post(node, Mail::Update(state, lease));
                    }
                }
                ControlOutput::Outcome { node, proposal, outcome } => {
                    self.post(node, Mail::Outcome(proposal, outcome));
                }
                ControlOutput::Submitted { node, ticket, result } => self.submitted(node, ticket, &result),
                ControlOutput::Committed { state } => self.committed(state),
                ControlOutput::Refused { node, reason } => {
                    self.broke(
                        Invariant::Liveness,
                        format!("{node} is refused by its own cluster: {reason}"),
                    );
                }
            }
        }
    }

    fn post(&mut self, node: NodeId, mail: Mail) {
        let delay = self.rng.skewed(5 * US, 500 * US);
        let at = (self.now + delay).max(self.node_ref(node).mail_at);
        let n = self.node(node);
        n.mail_at = at;
        n.mail.push_back(mail);
        let life = n.life();
        self.queue.push(at, Event::Node(node, life, NodeEvent::Mail));
    }

    // Processes.

    /// Starts a node's process: a new incarnation.
    pub(crate) fn start(&mut self, id: NodeId) {
        let nonce = self.rng.next();
        if id == self.witness() {
            if !self.witness_up {
                self.witness_up = true;
                self.witness_boot += 1;
                let incarnation = Incarnation::of_start(self.witness_boot, nonce);
                let clock = Clock::new(0, S, 0);
                let run = crate::control::Run { incarnation, os_boot: 1, clock };
                self.control.start(self.now, id, run);
            }
            return;
        }
        if self.node_ref(id).is_up() {
            return;
        }
        let n = self.node(id);
        n.starts += 1;
        n.incarnation = Incarnation::of_start(n.starts, nonce);
        n.phase = Phase::Waiting;
        n.failed_before = None;
        let (incarnation, os_boot, clock) = (n.incarnation, n.os_boot, n.clock);
        self.note(id, format_args!("starts as {incarnation}"));
        self.trace.mix(&[2, id.0, incarnation.boot]);
        self.control.start(self.now, id, crate::control::Run { incarnation, os_boot, clock });
    }

    /// Counts a strike that took effect.
    pub(crate) fn count(&mut self, kind: FaultKind) {
        *self.stats.faults.entry(kind).or_default() += 1;
    }
}
