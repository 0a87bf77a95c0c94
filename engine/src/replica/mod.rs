//! The sans-IO replication core: one [`Replica`] per volume and node.
//!
//! Inputs and outputs are the plain data of [`io`].

pub mod io;

pub use io::{
    ClientError, ClientInput, ClientOp, ClientRequest, ConnId, Cookie, DiskDone, DiskErrorKind, DiskOp,
    DiskOpId, DiskRequest, DiskResult, Event, Lease, Output, PeerInput, ReplyData,
};
