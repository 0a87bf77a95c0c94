//! A node's directory: its lock, and who runs in it.
//!
//! The file `pid` in the directory is locked (flock) by the running node and holds its process id, so
//! that the id is only ever believed while the lock is held. Everybody else only looks. Also used for
//! the lock of a `dev` directory, under another file name.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

/// Lock and pid file of a node's directory.
pub const PID_FILE: &str = "pid";
/// How long a lock that is held is waited for: an observer holds it for an instant only.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Why a directory cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DirError {
    /// Another process runs in it.
    #[error(
        "second {what} on directory {dir} is locked out: process {pid} already runs in it; stop that one \
        first or use another directory"
    )]
    Locked {
        /// What tries.
        what: &'static str,
        /// The directory.
        dir: PathBuf,
        /// Who is there.
        pid: String,
    },
    /// The file system refuses.
    #[error("cannot use directory {dir}: {source}; check that it exists, is writable and has space")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A directory that this process has locked. The lock ends with the process or with this value.
#[derive(Debug)]
pub struct DirLock {
    file: File,
}

impl DirLock {
    /// Locks `dir` through the file `name` in it and writes the process id into that. `what` is the
    /// word for the error ("daemon", "dev").
    ///
    /// # Errors
    /// [`DirError::Locked`] if somebody else holds it.
    pub fn take(dir: &Path, name: &str, what: &'static str) -> Result<Self, DirError> {
        let io = |source| DirError::Io { dir: dir.to_path_buf(), source };
        let path = dir.join(name);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let give_up = Instant::now() + LOCK_PATIENCE;
        while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(io(error.into()));
            }
            if Instant::now() >= give_up {
                let pid = read_pid(&mut file).map_or_else(|| "(unknown)".to_string(), |pid| pid.to_string());
                return Err(DirError::Locked { what, dir: dir.to_path_buf(), pid });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        file.set_len(0).map_err(io)?;
        file.rewind().map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { file })
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // An empty file says "nobody"; who looks also needs the lock to be held, so failure is harmless.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!("cannot clear the pid file: {error}");
        }
    }
}

/// The process that holds the lock file `name` of `dir` at the moment, if any.
pub fn holder(dir: &Path, name: &str) -> Option<u32> {
    let mut file = OpenOptions::new().read(true).write(true).open(dir.join(name)).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(_) => read_pid(&mut file).filter(|&pid| is_running(pid)),
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// True if the process exists and is not a zombie.
pub fn is_running(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state letter follows the command name, which ends with the last closing parenthesis.
    stat.rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next())
        .is_some_and(|s| s != 'Z' && s != 'X')
}

/// Sends a signal to a process; false if it is not there (any more).
pub fn signal(pid: u32, signal: Signal) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    kill_process(pid, signal).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_is_locked_out_and_names_the_first() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(holder(dir.path(), PID_FILE), None);
        let lock = DirLock::take(dir.path(), PID_FILE, "daemon").unwrap();
        assert_eq!(holder(dir.path(), PID_FILE), Some(std::process::id()));
        let error = DirLock::take(dir.path(), PID_FILE, "daemon").unwrap_err().to_string();
        assert!(
            error.contains("second daemon") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(lock);
        assert_eq!(holder(dir.path(), PID_FILE), None);
        drop(DirLock::take(dir.path(), PID_FILE, "daemon").unwrap());
    }

    #[test]
    fn running_means_alive() {
        assert!(is_running(std::process::id()));
        assert!(!is_running(u32::MAX));
    }
}
