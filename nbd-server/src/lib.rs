//! # blkrepl-nbd
//!
//! NBD for blkrepl: what clients of a volume speak. The package knows NBD and nothing of replication; the
//! engine knows replication and nothing of NBD. They meet in `blkrepl_engine::reactor::client`.
//!
//! ```text
//! server     tokio: listens, runs the negotiation, hands the socket over   -> Exports::attach
//! context    metadata contexts: their names, and what is said of an extent
//! negotiate  sans-IO: fixed newstyle negotiation
//! session    sans-IO: request headers and replies (a ClientProtocol) -> runs on the reactor
//! keepalive  how a client's machine that is gone is noticed
//! desk       which connections are let in: `limits` counts them, `misbehaviour` what they do wrong
//! client     a blocking and pipelined client for tests, demo and benches
//! bench      the load generator behind `blkrepl bench`
//! proto, uri, export   the protocol's constants, addresses, plain data and the Exports trait
//! ```
//!
//! What of the specification is supported: `docs/nbd.md`.

#![forbid(unsafe_code)]

pub mod bench;
pub mod client;
pub mod context;
pub mod export;
pub mod keepalive;
pub mod negotiate;
pub mod proto;
pub mod server;
pub mod session;
pub mod uri;

mod desk;
mod limits;
mod listen;
mod misbehaviour;

pub use client::{
    ClientOptions, Completion, ExportFacts, Handle, NbdClient, NbdError, RefusalKind, Request, RequestOp,
    connect_raw, connect_session, list_exports, places,
};
pub use context::{Contexts, MetaContext};
pub use export::{
    Admission, Admitting, Attached, ExportInfo, ExportRefusal, Exports, Peer, Place, Replies, admit_with,
};
pub use limits::{CONNECTIONS_MAX, CONNECTIONS_PER_CLIENT_MAX, ConnectionLimits};
pub use listen::{ListenAddr, ListenError};
pub use misbehaviour::Misbehaviour;
pub use proto::NbdErrno;
pub use server::{Server, ServerOptions};
pub use session::Session;
pub use uri::{NbdUri, Target, UriError};
