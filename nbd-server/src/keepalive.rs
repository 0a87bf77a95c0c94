//! How the kernel finds out that the machine of a TCP client is gone.
//!
//! A machine that loses power, or its network, says no goodbye. Without what is set here, its connection would
//! stay for ever if the server waits for a request, and for about 15 minutes if answers wait for it. With it the
//! kernel ends the connection within [`GONE_AFTER`] in both cases, and whatever the connection held is given back.
//!
//! Never does: judging a client that is there. Its kernel answers probes whatever the program does; only one that
//! lets answers wait for [`GONE_AFTER`] without making room for any of them is closed by the same limit.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;

/// Silence after which the kernel asks whether the other end is still there.
pub const PROBE_IDLE: Duration = Duration::from_secs(30);
/// Time between two such probes.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// Probes without an answer after which the connection is over.
pub const PROBES: u32 = 3;
/// Longest time that bytes may wait for the other end's acknowledgement.
pub const GONE_AFTER: Duration = Duration::from_secs(60);

// The two limits say the same: with a user time-out the kernel goes by it instead of the number of probes.
const _: () =
    assert!(PROBE_IDLE.as_secs() + PROBE_INTERVAL.as_secs() * PROBES as u64 == GONE_AFTER.as_secs());

/// When the kernel takes the other end of a connection for gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Silence after which it asks.
    pub probe_idle: Duration,
    /// Time between two such probes.
    pub probe_interval: Duration,
    /// Probes without an answer after which the connection is over.
    pub probes: u32,
    /// Longest time that bytes may wait for the other end's acknowledgement; at most some weeks.
    pub gone_after: Duration,
}

/// That of a server with its clients.
pub const CLIENTS: Patience = Patience {
    probe_idle: PROBE_IDLE,
    probe_interval: PROBE_INTERVAL,
    probes: PROBES,
    gone_after: GONE_AFTER,
};

/// Sets it on a connected TCP socket.
///
/// # Errors
/// The kernel's, which has a reason only if the socket is no TCP socket or not open any more.
pub fn watch<S: AsFd>(socket: S, patience: Patience) -> rustix::io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_keepidle(socket, patience.probe_idle)?;
    sockopt::set_tcp_keepintvl(socket, patience.probe_interval)?;
    sockopt::set_tcp_keepcnt(socket, patience.probes)?;
    sockopt::set_tcp_user_timeout(socket, patience.gone_after.as_millis() as u32)?;
    sockopt::set_socket_keepalive(socket, true)
}
