//! What a replica asks of the control plane. Every proposal names the epoch that it expects and is
//! refused if that is not the current one.

use serde::{Deserialize, Serialize};

use super::{Epoch, Member, VolumeId};

/// Tells the proposals of one replica apart; counts from 1 within one incarnation. Together with the
/// proposing member it is the request id that makes a retry idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProposalId(pub u64);

/// A change of one volume's config that the replica `by` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Request id within `by`.
    pub id: ProposalId,
    /// The volume.
    pub volume: VolumeId,
    /// Compare-and-set: applies only if this is the volume's current epoch.
    pub expected_epoch: Epoch,
    /// Who proposes. Must be the named primary.
    pub by: Member,
    /// The change.
    pub kind: ProposalKind,
}

/// The kinds of change that a primary may propose [R9].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProposalKind {
    /// Take a member out of the in-sync set.
    Remove(Member),
    /// Put a replica that finished resync into the in-sync set.
    Join(Member),
    /// Hand the primary role to a member; the proposer stays in sync. It has stopped serving, drained
    /// and flushed [R18].
    Move(Member),
    /// Give up the primary role; nobody takes it until an operator says so. Stopped, drained, flushed.
    Demote,
    /// The proposer's disk failed: hand the role to a member and leave the in-sync set.
    HandOver(Member),
    /// Only count the epoch up, which voids every proposal that expects the current one [R18].
    Bump,
}

/// What became of a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProposalOutcome {
    /// It was committed and applied; the config that shows it arrives separately (and first).
    Applied,
    /// It was refused for good (a compare-and-set that failed, or a rule): it never takes effect.
    Refused(String),
    /// Nobody knows: no quorum within the time given. It may still take effect.
    Unknown,
}
