//! Takes the sockets that a service manager passed out of this process' environment, once, at its very start.
//!
//! What `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` mean is `serve::passed`'s to say. The variables are removed
//! and the descriptors closed in whatever this process starts, so that nobody takes them twice.
//!
//! The one place of the command line that needs `unsafe`: a number becomes an owned descriptor.

use std::os::fd::{FromRawFd, OwnedFd};

use blkrepl_ctl::serve::passed::{FIRST, Passed, announced};
use rustix::io::{FdFlags, fcntl_setfd};

const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The sockets. To be called first of all in `main`, and only there.
///
/// # Errors
/// What the variables say is not so.
pub(crate) fn take() -> Result<Vec<Passed>, String> {
    let [pid, count, names] = VARIABLES.map(|name| std::env::var(name).ok());
    for name in VARIABLES {
        // SAFETY: no other thread runs yet, so none reads the environment.
        unsafe { std::env::remove_var(name) };
    }
    let names = announced(std::process::id(), pid.as_deref(), count.as_deref(), names.as_deref())?;
    (FIRST..).zip(names).map(|(number, name)| Ok(Passed { name, socket: own(number)? })).collect()
}

fn own(number: i32) -> Result<OwnedFd, String> {
    // SAFETY: asks the kernel about a number; no memory is involved, and a number that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(format!("LISTEN_FDS announces descriptor {number}, but it is not open"));
    }
    // SAFETY: it is open, as was just seen, and nobody in this process owns it: `main` has opened nothing yet, and
    // by the convention of these variables whoever started the process has passed it to be owned.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&socket, FdFlags::CLOEXEC).map_err(|error| format!("descriptor {number}: {error}"))?;
    Ok(socket)
}
