//! Memory of a process on which the writing back of memory depends.
//!
//! Where a node and a device that it serves are on one machine, the kernel may have to write pages of that device to
//! make room, and waits for the node to do it. If the node then waits for memory itself, neither goes on. So its pages
//! stay in memory, and what it asks for is never got by writing back: it takes what the kernel keeps for such
//! processes.
//!
//! Best effort: without the privilege the process runs on, and says once what is missing.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, configure_io_flusher_behavior, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// Prepares the process. To be called while it has one thread: the others inherit it.
pub fn hold_for_block_io() {
    // PR_SET_IO_FLUSHER (Linux 5.6): needs CAP_SYS_RESOURCE.
    if let Err(error) = configure_io_flusher_behavior(true) {
        tracing::info!(
            "not marked as serving block I/O ({error}); run as root, or with CAP_SYS_RESOURCE, where this machine also \
             maps the volume"
        );
    }
    if !may_lock_all() {
        tracing::info!(
            "memory is not locked; raise the limit (LimitMEMLOCK=infinity, ulimit -l unlimited), where this machine \
             also maps the volume"
        );
        return;
    }
    // On fault: what is reserved and never used takes no memory.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(flags) {
        tracing::info!("memory is not locked: {error}");
    }
}

/// Without a limit. Under one, which also counts what is reserved and never used, a later mapping would fail.
fn may_lock_all() -> bool {
    let privileged = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    privileged || getrlimit(Resource::Memlock).current.is_none()
}
