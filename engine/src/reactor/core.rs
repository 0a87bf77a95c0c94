//! What the reactor drives: the sans-IO core of one volume.

use crate::replica::{ClientInput, DiskDone, Lease, Output, PeerInput, Replica};
use crate::types::{ConfigView, Nanos, NodeId, ProposalId, ProposalOutcome, ReplicaReport, ReplicaStatus};

/// The sans-IO core as its driver sees it. It lives on the volume's thread alone, so it need not be
/// `Send`. Every `now` is read from the clock after the input that comes with it was reaped [R27], and
/// never runs backwards. After each call the reactor drains [`Self::poll_output`] until `None`.
pub trait Core {
    /// Takes a request, or the news that a connection is gone.
    fn handle_client(&mut self, now: Nanos, input: ClientInput);
    /// Takes the completion of a disk operation.
    fn handle_disk(&mut self, now: Nanos, done: DiskDone);
    /// Takes a message of a peer, or the news that a session came or went.
    fn handle_peer(&mut self, now: Nanos, input: PeerInput);
    /// Takes a committed config.
    fn handle_config(&mut self, now: Nanos, config: ConfigView);
    /// Takes a new lease.
    fn handle_lease(&mut self, now: Nanos, lease: Lease);
    /// Takes the fate of a proposal.
    fn handle_proposal(&mut self, now: Nanos, id: ProposalId, outcome: ProposalOutcome);
    /// The deadline has passed.
    fn handle_tick(&mut self, now: Nanos);
    /// Begins to hand the primary role to `to`.
    ///
    /// # Errors
    /// Why it cannot, and what to do.
    fn begin_move(&mut self, now: Nanos, to: NodeId) -> Result<(), String>;
    /// Begins to give up the primary role.
    ///
    /// # Errors
    /// Why it cannot, and what to do.
    fn begin_demote(&mut self, now: Nanos) -> Result<(), String>;
    /// Keeps the copy as it is for a forced promotion, and says what it is. `discard_inconsistent`: also one that a
    /// resync left half done.
    ///
    /// # Errors
    /// Why it cannot be promoted, and what to do.
    fn begin_force(&mut self, now: Nanos, discard_inconsistent: bool) -> Result<ReplicaReport, String>;
    /// Nothing came of the force.
    fn end_force(&mut self, now: Nanos);
    /// Begins a clean stop, which ends with [`Output::Stopped`].
    fn begin_stop(&mut self, now: Nanos);
    /// The next thing to be done.
    fn poll_output(&mut self) -> Option<Output>;
    /// When [`Self::handle_tick`] is wanted.
    fn poll_deadline(&self) -> Option<Nanos>;
    /// A snapshot for operators and the failover controller.
    fn status(&self) -> ReplicaStatus;
}

/// The core that production drives. Every method is the core's own of the same name.
impl Core for Replica {
    fn handle_client(&mut self, now: Nanos, input: ClientInput) {
        Self::handle_client(self, now, input);
    }
    fn handle_disk(&mut self, now: Nanos, done: DiskDone) {
        Self::handle_disk(self, now, done);
    }
    fn handle_peer(&mut self, now: Nanos, input: PeerInput) {
        Self::handle_peer(self, now, input);
    }
    fn handle_config(&mut self, now: Nanos, config: ConfigView) {
        Self::handle_config(self, now, config);
    }
    fn handle_lease(&mut self, now: Nanos, lease: Lease) {
        Self::handle_lease(self, now, lease);
    }
    fn handle_proposal(&mut self, now: Nanos, id: ProposalId, outcome: ProposalOutcome) {
        Self::handle_proposal(self, now, id, outcome);
    }
    fn handle_tick(&mut self, now: Nanos) {
        Self::handle_tick(self, now);
    }
    fn begin_move(&mut self, now: Nanos, to: NodeId) -> Result<(), String> {
        Self::begin_move(self, now, to)
    }
    fn begin_demote(&mut self, now: Nanos) -> Result<(), String> {
        Self::begin_demote(self, now)
    }
    fn begin_force(&mut self, now: Nanos, discard_inconsistent: bool) -> Result<ReplicaReport, String> {
        Self::begin_force(self, now, discard_inconsistent)
    }
    fn end_force(&mut self, now: Nanos) {
        Self::end_force(self, now);
    }
    fn begin_stop(&mut self, now: Nanos) {
        Self::begin_stop(self, now);
    }
    fn poll_output(&mut self) -> Option<Output> {
        Self::poll_output(self)
    }
    fn poll_deadline(&self) -> Option<Nanos> {
        Self::poll_deadline(self)
    }
    fn status(&self) -> ReplicaStatus {
        Self::status(self)
    }
}
