//! Errors of the NBD client: by what the caller can do about them.

use std::io;

use thiserror::Error;

use crate::proto::{self, NbdErrno};

/// Why a call failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The server could not be connected to.
    #[error("cannot connect to {target}: {source}; check that the node is running")]
    Connect {
        /// Where.
        target: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The server is there but does not serve the export now.
    #[error("the server refuses the export ({kind}): {message}")]
    Refused {
        /// Kind of refusal.
        kind: RefusalKind,
        /// The server's own words.
        message: String,
    },
    /// The connection is over. The outcome of requests without an answer is unknown.
    #[error("disconnected: {0}")]
    Disconnected(String),
    /// Something did not happen in time. The connection is over.
    #[error("timed out waiting for {0}")]
    TimedOut(&'static str),
    /// The server answered one request with an error. The connection goes on.
    #[error("the server answered {0}")]
    Server(NbdErrno),
    /// What came from the server is not NBD as this client speaks it. The connection is over.
    #[error("the server breaks the protocol: {0}")]
    Protocol(String),
    /// The call cannot be made into a request. The connection goes on.
    #[error("{0}")]
    Usage(String),
}

impl NbdError {
    /// True if a later attempt, perhaps at another node, may succeed where this one did not: the server could
    /// not be reached, went away, was silent, is not primary or is stopping.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Disconnected(_) | Self::TimedOut(_) => true,
            Self::Refused { kind, .. } => matches!(kind, RefusalKind::Policy | RefusalKind::Shutdown),
            Self::Server(errno) => *errno == NbdErrno::Shutdown,
            Self::Protocol(_) | Self::Usage(_) => false,
        }
    }
}

/// Kind of an error reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum RefusalKind {
    /// Not served here and now: the node is not primary.
    #[error("NBD_REP_ERR_POLICY")]
    Policy,
    /// No such export.
    #[error("NBD_REP_ERR_UNKNOWN")]
    Unknown,
    /// The server is stopping.
    #[error("NBD_REP_ERR_SHUTDOWN")]
    Shutdown,
    /// The server does not know the option.
    #[error("NBD_REP_ERR_UNSUP")]
    Unsupported,
    /// Another error reply.
    #[error("option reply {0:#x}")]
    Other(u32),
}

impl RefusalKind {
    /// The kind behind the number of an error reply.
    #[must_use]
    pub fn of(reply: u32) -> Self {
        match reply {
            proto::NBD_REP_ERR_POLICY => Self::Policy,
            proto::NBD_REP_ERR_UNKNOWN => Self::Unknown,
            proto::NBD_REP_ERR_SHUTDOWN => Self::Shutdown,
            proto::NBD_REP_ERR_UNSUP => Self::Unsupported,
            other => Self::Other(other),
        }
    }
}
