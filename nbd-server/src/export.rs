//! What the NBD server needs from whoever owns the volumes, and what it hands over.
//!
//! Plain data and two traits. Nothing here talks to a network. A connection changes hands exactly once, in
//! [`Admission::attach`], after which this package never touches its socket again.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;

use blkrepl_engine::reactor::client::{ClientProtocol, ClientSession};
use thiserror::Error;

use crate::proto;

/// Where a client's connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A unix socket: from this machine.
    Unix,
    /// TCP.
    Tcp {
        /// The client's address.
        remote: IpAddr,
        /// The address that it connected to.
        local: IpAddr,
    },
}

impl Peer {
    /// The address that it comes from; `None` if it comes from this machine.
    #[must_use]
    pub fn elsewhere(self) -> Option<IpAddr> {
        match self {
            Self::Unix => None,
            Self::Tcp { remote, local } => {
                let (remote, local) = (remote.to_canonical(), local.to_canonical());
                (!remote.is_loopback() && remote != local).then_some(remote)
            }
        }
    }
}

/// What [`Exports::admit`] decides.
pub type Admitting = Pin<Box<dyn Future<Output = Result<Box<dyn Admission>, ExportRefusal>> + Send>>;

/// The volumes that are served, as the negotiation sees them. Called on the threads of the async runtime:
/// no call may block.
pub trait Exports: Send + Sync + 'static {
    /// Names of all volumes that the node has a replica of, primary or not.
    fn list(&self) -> Vec<String>;

    /// What a client is told about the volume `name`, if it is served here and now.
    ///
    /// # Errors
    /// Why it may not; becomes the error reply to the client's option.
    fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal>;

    /// The nodes that have a replica of the volume `name`, as clients reach them.
    ///
    /// # Errors
    /// If there is no such volume, or nobody can say.
    fn places(&self, _name: &str) -> Result<Vec<Place>, ExportRefusal> {
        Ok(Vec::new())
    }

    /// Decides whether one connection from `peer` may enter the transmission phase of the volume `name` (which is
    /// [`ExportInfo::name`]). Takes what it takes; whoever does not want to wait drops it, and nothing stays of it.
    fn admit(&self, name: &str, peer: Peer) -> Admitting;
}

/// A node that has a replica of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it serves NBD, HOST:PORT; at most 4096 bytes, or it is left out.
    pub address: String,
    /// It is primary, as far as the node that was asked knows.
    pub primary: bool,
}

/// The right of one connection to be served. Given back when it is dropped.
pub trait Admission: Send {
    /// Takes over the connection, which has just entered the transmission phase. Whoever cannot serve it any more
    /// drops it, which closes the connection.
    fn attach(self: Box<Self>, client: Attached);
}

impl<F: FnOnce(Attached) + Send> Admission for F {
    fn attach(self: Box<Self>, client: Attached) {
        self(client);
    }
}

/// Admits a client at once; `attach` takes its connection over.
pub fn admit_with(attach: impl FnOnce(Attached) + Send + 'static) -> Admitting {
    let admission: Box<dyn Admission> = Box::new(attach);
    Box::pin(std::future::ready(Ok(admission)))
}

/// What a client learns about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Smallest alignment of requests, bytes; a power of two up to 65536. 1 means any alignment.
    pub min_block: u32,
    /// Alignment that is fast, bytes; a power of two, 512 or more.
    pub preferred_block: u32,
    /// Longest read or write, bytes.
    pub max_payload: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// It lies on a disk that turns.
    pub rotational: bool,
    /// Zeroes take their place without being written out.
    pub fast_zero: bool,
    /// The lineage of its content: another one may lack writes that were acknowledged. `None` where there is none.
    pub lineage: Option<u128>,
}

impl ExportInfo {
    /// An export of `size` bytes with what blkrepl's volumes have: any alignment, blocks of 4096 bytes
    /// preferred, up to 32 MiB in one request, writable.
    #[must_use]
    pub fn new(name: impl Into<String>, size: u64) -> Self {
        Self {
            name: name.into(),
            size,
            min_block: 1,
            preferred_block: 4096,
            max_payload: proto::PAYLOAD_MAX_DEFAULT,
            read_only: false,
            rotational: false,
            fast_zero: false,
            lineage: None,
        }
    }

    /// What `NBD_INFO_DESCRIPTION` says, for people.
    #[must_use]
    pub fn description(&self) -> String {
        format!("replicated volume {} of blkrepl", self.name)
    }

    /// Transmission flags of the export, to a client that has agreed to such replies.
    #[must_use]
    pub fn transmission_flags(&self, replies: Replies) -> u16 {
        let base = proto::NBD_FLAG_HAS_FLAGS
            | proto::NBD_FLAG_SEND_FLUSH
            | proto::NBD_FLAG_SEND_FUA
            | proto::NBD_FLAG_SEND_TRIM
            | proto::NBD_FLAG_SEND_WRITE_ZEROES
            | proto::NBD_FLAG_SEND_CACHE
            | proto::NBD_FLAG_CAN_MULTI_CONN;
        let fast_zero = if self.fast_zero { proto::NBD_FLAG_SEND_FAST_ZERO } else { 0 };
        let rotational = if self.rotational { proto::NBD_FLAG_ROTATIONAL } else { 0 };
        let read_only = if self.read_only { proto::NBD_FLAG_READ_ONLY } else { 0 };
        let whole = if replies == Replies::Simple { 0 } else { proto::NBD_FLAG_SEND_DF };
        base | read_only | rotational | fast_zero | whole
    }
}

/// The form of replies (and with it that of requests) that client and server have agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replies {
    /// Simple replies: an error number, and data after a read.
    #[default]
    Simple,
    /// Structured replies: chunks, errors with a text.
    Structured,
    /// Extended headers: requests of 64 bits of length, and chunks for all replies.
    Extended,
}

/// Why an export is not served. The texts go to the client as they are.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExportRefusal {
    /// There is no such volume here; becomes `NBD_REP_ERR_UNKNOWN`.
    #[error("{0}")]
    Unknown(String),
    /// The volume is known but not served here and now; becomes `NBD_REP_ERR_POLICY`. The text names the
    /// primary and where it is.
    #[error("{0}")]
    Policy(String),
    /// The node is stopping; becomes `NBD_REP_ERR_SHUTDOWN`.
    #[error("this node is stopping; connect to another node of the cluster")]
    Shutdown,
}

/// A connection past its negotiation.
pub struct Attached {
    /// The connected socket, TCP or unix, in blocking mode (so that io_uring arms a poll where it would
    /// otherwise hand back `EAGAIN`), TCP without delay. No byte behind the negotiation has been read from it.
    pub fd: OwnedFd,
    /// Its codec.
    pub protocol: Box<dyn ClientProtocol>,
    /// The client session that it belongs to, if any.
    pub session: Option<ClientSession>,
    /// The client's address, for logs.
    pub peer: String,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("fd", &self.fd).field("peer", &self.peer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_of_this_machine_is_told_from_one_elsewhere() {
        let tcp = |remote: &str, local: &str| Peer::Tcp {
            remote: remote.parse().unwrap(),
            local: local.parse().unwrap(),
        };
        assert_eq!(Peer::Unix.elsewhere(), None);
        assert_eq!(tcp("127.0.0.1", "127.0.0.1").elsewhere(), None);
        assert_eq!(tcp("192.0.2.1", "192.0.2.1").elsewhere(), None);
        assert_eq!(tcp("192.0.2.7", "192.0.2.1").elsewhere(), Some("192.0.2.7".parse().unwrap()));
        assert_eq!(tcp("::ffff:192.0.2.7", "::").elsewhere(), Some("192.0.2.7".parse().unwrap()));
        assert_eq!(tcp("::ffff:127.0.0.1", "::ffff:127.0.0.1").elsewhere(), None);
    }
}
