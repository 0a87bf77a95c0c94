//! Plain data that every part of the engine speaks: ids, numbers with a unit, the committed
//! configuration of a volume ([`ConfigView`]), and what the replication core asks of the control
//! plane ([`Proposal`]).
//!
//! Nothing here does I/O, reads a clock or draws a random number. `control` and `replica` meet in
//! these types and nowhere else.

mod config;
mod extent;
mod geometry;
mod ids;
mod proposal;
mod status;

pub use config::{ConfigView, Durability, LineageFork, Member, ReplicaView, VolumeSettings, shared_epoch};
pub use extent::Extent;
pub use geometry::{
    BLOCK_SIZE_DEFAULT, BlockIndex, BlockRange, ByteRange, Geometry, GeometryError, REGION_SIZE_DEFAULT,
    RegionIndex, VOLUME_SIZE_MAX,
};
pub use ids::{
    ClusterId, Epoch, Incarnation, LineageId, LogIndex, Nanos, NodeId, REPLICAS_MAX, Reign, ReplicaSlot,
    SlotSet, VolumeId,
};
pub use proposal::{Proposal, ProposalId, ProposalKind, ProposalOutcome};
pub use status::{
    Health, PeerStatus, ReplicaReport, ReplicaState, ReplicaStatus, ResyncProgress, Role, SuperblockTrust,
};
