//! Leases: a primary's time-bounded right to serve [R1]. The leader's side is [`LeaseTable`], the node's
//! side [`NodeLease`]; both are pure and get the time passed in. Why it is safe:
//!
//! 1. The node counts a lease from when it *sent* the request, the leader from when it granted it, later
//!    and with 1 % on top for clocks that drift. So a lease is over at the node when the leader says so.
//! 2. The leader grants only after it confirmed its leadership with a quorum after the request arrived. So
//!    every lease that an older leader granted was requested before the new leader won its election, and
//!    is over once the new leader has waited the longest committed lease length.
//! 3. Before a change of primary away from a node is proposed, the volume is excluded from that node's
//!    grants; then, under the same lock, the last grant that included the volume is judged; then the
//!    change is proposed. The exclusion is lifted only when the entry was applied or can never take effect.
//! 4. A grant names an applied index that lies behind every change whose exclusion was lifted, and the node
//!    uses the grant only once it has applied that index itself. So it never serves by a config that the
//!    leader has already seen replaced.
//!
//! Neither side reads a clock, nor decides who becomes primary.

mod leader;
mod node;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{Incarnation, LogIndex, Nanos, NodeId, VolumeId};

pub use leader::{ExclusionId, LeaseTable};
pub use node::{LeaseSnapshot, NodeLease};

/// How long the leader waits for a lease of this length: with 1 % on top, for clocks that drift.
#[must_use]
pub fn with_drift(length: Duration) -> Duration {
    length + length / 100
}

/// The end of a lease `by` further in the past; one that is over by `now` has no time any more.
#[cfg(test)]
fn older_until(until: Nanos, now: Nanos, by: Duration) -> Nanos {
    Some(until.before(by)).filter(|until| *until > now).unwrap_or_default()
}

/// The leader's answer to a renewal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// The node that may use it.
    pub node: NodeId,
    /// The run that may use it.
    pub incarnation: Incarnation,
    /// Names the request.
    pub nonce: u64,
    /// Counted from when the request was sent.
    pub length: Duration,
    /// Volumes that the lease does not cover.
    pub excluded: Vec<VolumeId>,
    /// To be used only once this index is applied at the node.
    pub applied: LogIndex,
}

/// What the leader knows of a node's lease, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// The node.
    pub node: NodeId,
    /// The run that holds it.
    pub incarnation: Incarnation,
    /// The leader takes it for over from this point on.
    pub until: Nanos,
}
