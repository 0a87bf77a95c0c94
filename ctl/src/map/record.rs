//! What a keeper says of its device: to systemd, and in a file for `blkrepl mapped`.
//!
//! The file is a courtesy: what is mapped is in the kernel, and nothing here is needed to go on. A file that cannot be
//! written is told of once.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blkrepl_nbd::Target;
use serde::{Deserialize, Serialize};

use super::device::Identity;
use crate::node_dir::{self, DirLock};

/// Where keepers leave their records and locks.
pub const RUN_DIR: &str = "/run/blkrepl/map";

/// What a keeper knows of its device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The node that serves it, as the keeper reaches it; `None` while it is searched for.
    pub primary: Option<String>,
    /// What nodes call that one's address.
    #[serde(default)]
    pub called: Option<String>,
    /// Why it is waiting, in words.
    pub waiting: Option<String>,
    /// Seconds since 1970 when `primary` last changed.
    pub since: u64,
    /// How often new connections were given to the device.
    pub reconnects: u64,
    /// How long the last of them took, milliseconds: from the death of a connection to new ones.
    pub last_reconnect_ms: Option<u64>,
}

/// Writes the record of one device.
#[derive(Debug)]
pub struct Recorder {
    file: PathBuf,
    record: Record,
    ready: bool,
    failed: bool,
}

impl Recorder {
    /// Of the volume, in a directory that exists. What an earlier keeper counted is carried on.
    pub fn new(dir: &Path, volume: &str) -> Self {
        let record = read(dir, volume).unwrap_or_default();
        Self { file: file_of(dir, volume), record, ready: false, failed: false }
    }

    /// What was written last, also by an earlier keeper.
    pub fn last(&self) -> &Record {
        &self.record
    }

    /// The device is connected to this node, and what nodes call its address.
    pub fn connected(&mut self, target: &Target, called: Option<&Target>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.record.primary = Some(target.to_string());
        self.record.called = called.map(Target::to_string);
        self.record.since = now.as_secs();
        self.record.waiting = None;
        self.write();
        self.notify(&format!("STATUS=connected to {target}"));
    }

    /// The device goes on with what an earlier keeper gave it.
    pub fn taken_over(&mut self) {
        self.notify("STATUS=taken over");
    }

    /// The device may have lost its connection.
    pub fn searching(&mut self) {
        (self.record.primary, self.record.called) = (None, None);
        self.write();
    }

    /// The primary is not found.
    pub fn waiting(&mut self, reason: &str) {
        self.record.waiting = Some(reason.to_owned());
        self.write();
        // systemd takes one line.
        self.notify(&format!("STATUS=waiting for the primary: {}", reason.replace('\n', " ")));
    }

    /// New connections were given to the device, after so long.
    pub fn reconnected(&mut self, took: Duration) {
        self.record.reconnects += 1;
        self.record.last_reconnect_ms = u64::try_from(took.as_millis()).ok();
        self.write();
    }

    /// Tells systemd, the first time also that the device is there.
    fn notify(&mut self, status: &str) {
        let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
        let ready = if std::mem::replace(&mut self.ready, true) { "" } else { "READY=1\n" };
        if let Err(error) = send(Path::new(&socket), &format!("{ready}{status}")) {
            tracing::debug!("cannot tell systemd: {error}");
        }
    }

    fn write(&mut self) {
        let text = serde_json::to_vec(&self.record).expect("a record is plain data");
        let new = self.file.with_extension("new");
        let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.file));
        if let Err(error) = written
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!("cannot write {}: {error}; `blkrepl mapped` will say less", self.file.display());
        }
    }
}

fn send(socket: &Path, text: &str) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;
    let bytes = socket.as_os_str().as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address).map(drop)
}

fn file_of(dir: &Path, volume: &str) -> PathBuf {
    dir.join(format!("{volume}.json"))
}

fn lock_of(volume: &str) -> String {
    format!("{volume}.pid")
}

/// What the keeper of a volume wrote last.
pub fn read(dir: &Path, volume: &str) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(file_of(dir, volume)).ok()?).ok()
}

/// Notes that a mapping was ended: as long as a device is open, the kernel shows it as if it were still mapped.
///
/// # Errors
/// Names the file that cannot be written.
pub fn note_end(dir: &Path, identity: &Identity) -> anyhow::Result<()> {
    use anyhow::Context;
    let file = end_of(dir, &identity.volume);
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&file, identity.to_string()))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// A mapping was ended; the device may still be there, for those that have it open.
pub fn has_ended(dir: &Path, identity: &Identity) -> bool {
    std::fs::read_to_string(end_of(dir, &identity.volume)).is_ok_and(|text| text == identity.to_string())
}

/// Forgets that it was ended: it was not.
pub fn forget_end(dir: &Path, volume: &str) {
    if let Err(error) = std::fs::remove_file(end_of(dir, volume)) {
        tracing::warn!("cannot remove {}: {error}", end_of(dir, volume).display());
    }
}

fn end_of(dir: &Path, volume: &str) -> PathBuf {
    dir.join(format!("{volume}.ended"))
}

/// Forgets what was written of a volume.
pub fn forget(dir: &Path, volume: &str) {
    // It may never have been written.
    let _absent = std::fs::remove_file(file_of(dir, volume));
}

/// Makes the caller the one keeper of a volume on this machine.
///
/// # Errors
/// Names the other one, or the file that cannot be made.
pub fn lock(dir: &Path, volume: &str) -> anyhow::Result<DirLock> {
    use anyhow::Context;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(DirLock::take(dir, &lock_of(volume), "blkrepl map")?)
}

/// The process that keeps a volume.
pub fn keeper(dir: &Path, volume: &str) -> Option<u32> {
    node_dir::holder(dir, &lock_of(volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_can_be_read_by_others_and_is_carried_on() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path(), "vol0"), None);
        let mut recorder = Recorder::new(dir.path(), "vol0");
        let target = Target::Tcp { host: "n1".into(), port: 5 };
        recorder.connected(&target, Some(&target));
        recorder.searching();
        recorder.waiting("nobody is there");
        let record = read(dir.path(), "vol0").unwrap();
        assert_eq!((record.primary, record.waiting.as_deref()), (None, Some("nobody is there")));
        recorder.connected(&target, Some(&target));
        recorder.reconnected(Duration::from_millis(40));
        let mut next = Recorder::new(dir.path(), "vol0");
        next.reconnected(Duration::from_millis(60));
        let record = read(dir.path(), "vol0").unwrap();
        assert_eq!((record.reconnects, record.last_reconnect_ms), (2, Some(60)));
        assert_eq!(record.primary.as_deref(), Some("n1:5"));
        forget(dir.path(), "vol0");
        assert_eq!(read(dir.path(), "vol0"), None);
    }

    #[test]
    fn an_end_is_that_of_one_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let identity = |session| Identity { volume: "vol0".into(), lineage: 3, session };
        assert!(!has_ended(dir.path(), &identity(1)));
        note_end(dir.path(), &identity(1)).unwrap();
        assert!(has_ended(dir.path(), &identity(1)));
        assert!(!has_ended(dir.path(), &identity(2)), "the next one goes on");
    }

    #[test]
    fn one_keeper_keeps_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path(), "vol0").unwrap();
        assert_eq!(keeper(dir.path(), "vol0"), Some(std::process::id()));
        assert!(lock(dir.path(), "vol0").is_err());
        lock(dir.path(), "vol1").unwrap();
        drop(held);
        assert_eq!(keeper(dir.path(), "vol0"), None);
    }
}
