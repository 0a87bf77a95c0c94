//! Why a volume's reactor does not start. Each text says what to do next.

use std::io;

use thiserror::Error;

/// Why a reactor could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReactorError {
    /// The system forbids io_uring.
    #[error(
        "io_uring is forbidden here (io_uring_setup: {0}). Allow it: `sysctl kernel.io_uring_disabled=0` on \
         the host (with 1, this user must be in the group that kernel.io_uring_group names); in a container, \
         use a seccomp profile that permits io_uring_setup, io_uring_enter and io_uring_register"
    )]
    Forbidden(#[source] io::Error),
    /// The kernel has no io_uring, or one that is too old.
    #[error(
        "this kernel cannot drive a volume: {0}. blkrepl needs Linux 5.11 or later (6.1 or later is \
         recommended) built with CONFIG_IO_URING; run `uname -r` to see what runs here"
    )]
    Unsupported(String),
    /// Setting up the ring failed for want of memory.
    #[error(
        "no memory for an io_uring ring ({0}). Raise the limit on locked memory: `ulimit -l unlimited`, or \
         LimitMEMLOCK=infinity in the systemd unit"
    )]
    Memory(#[source] io::Error),
    /// Another failure of the system.
    #[error("{action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The core could not be made; its thread ended before the first turn.
    #[error("the thread of volume {0} ended while it was starting; its log says why")]
    ThreadEnded(String),
}
