//! The control plane as the simulated nodes see it.
//!
//! Behind [`ControlPlane`] stands either [`Model`], the production state machine, leases and failover
//! controller over a modelled log, or (in lockstep) the whole production control plane over real Raft. It
//! has time of its own inside: the world asks when it wants to run, lets it run up to that point, and takes
//! what came out.
//!
//! It never touches a replica: both meet in plain data.

mod leader;
mod model;
mod node;
pub(crate) mod queue;

use std::sync::Arc;

use blkrepl_engine::control::{ClusterOp, ClusterState, LeaseSnapshot};
use blkrepl_engine::types::{
    Health, Incarnation, NodeId, Proposal, ProposalOutcome, ReplicaReport, VolumeId,
};

use crate::clock::{Clock, Time};

pub(crate) use model::Model;

/// One run of a node's process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) incarnation: Incarnation,
    pub(crate) os_boot: u128,
    pub(crate) clock: Clock,
}

/// What the control plane tells the world.
#[derive(Debug)]
pub(crate) enum ControlOutput {
    /// What a node knows has changed: the state that it has applied, or its lease.
    Update { node: NodeId, state: Arc<ClusterState>, lease: LeaseSnapshot },
    /// What became of a replica's proposal. The state that shows it has been told before.
    Outcome { node: NodeId, proposal: Proposal, outcome: ProposalOutcome },
    /// What became of an operator's command.
    Submitted { node: NodeId, ticket: u64, result: Result<(), String> },
    /// An entry is committed: the state after it. For the checks; no node knows it yet.
    Committed { state: Arc<ClusterState> },
    /// The node's process must end: the control plane refuses it.
    Refused { node: NodeId, reason: String },
}

/// What can be done to the control plane itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Disturbance {
    /// The leader loses its leadership, and may not notice at first.
    Election,
    /// Everything takes this many times as long until then.
    Slow { factor: u64, until: Time },
    /// This node hears of what is committed only then.
    Stale { node: NodeId, until: Time },
    /// So many messages with commands are lost, or their answers.
    Lose(u32),
    /// So many commands arrive twice.
    Double(u32),
}

/// See the module's head. `at` never runs backwards.
pub(crate) trait ControlPlane {
    /// How often each node was started before the run.
    fn boots(&self) -> u64 {
        0
    }
    /// A node's process starts.
    fn start(&mut self, at: Time, node: NodeId, run: Run);
    /// A node's process is gone.
    fn crash(&mut self, at: Time, node: NodeId);
    /// A node's process stands still.
    fn pause(&mut self, at: Time, node: NodeId, until: Time);
    /// Nothing passes from one node to another.
    fn block(&mut self, at: Time, from: NodeId, to: NodeId, until: Time);
    /// What a node's replica says of itself from here on.
    fn set_report(&mut self, at: Time, node: NodeId, volume: VolumeId, health: Health, report: ReplicaReport);
    /// A replica asks.
    fn propose(&mut self, at: Time, node: NodeId, proposal: Proposal);
    /// An operator asks at a node.
    fn submit(&mut self, at: Time, node: NodeId, ticket: u64, op: ClusterOp);
    /// Something goes wrong in the control plane itself.
    fn disturb(&mut self, at: Time, what: Disturbance);
    /// When it wants to run next.
    fn deadline(&self) -> Time;
    /// Runs everything that is due at `to` or before.
    fn advance(&mut self, to: Time);
    /// The next thing that it has to say.
    fn poll(&mut self) -> Option<ControlOutput>;
    /// What is committed, as far as anybody can know.
    fn committed(&self) -> Arc<ClusterState>;
    /// Ends every disturbance, partition and pause.
    fn heal(&mut self, at: Time);
}
