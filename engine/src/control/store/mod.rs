//! What a node keeps of the Raft group on disk: `control.redb`, written through redb, and `boot` beside it.
//!
//! Everything that Raft relies on is durable before it is answered. The state machine is persisted with
//! every batch that it applies, so that the cluster state is there at once after a start. A store is
//! created by an explicit step only, and a store that is missing, damaged or rolled back is refused [R13].

mod boot;
mod db;
mod log;
mod machine;
#[cfg(test)]
mod tests;
mod worker;

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;

use crate::mutation::{Mutation, mutated};
use crate::types::{ClusterId, Incarnation, NodeId};

use super::error::ControlError;
use super::raft::Vote;
use super::random::{random_u64, random_u128};
use super::state::StoreId;

pub(super) use db::{Db, Machine};
pub(super) use machine::{StateMachine, apply_offline, decode_snapshot};
pub(super) use worker::{Closed, StoreHandle};

/// File name of the store.
const STORE_FILE: &str = "control.redb";

/// Whose store this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct StoreIdentity {
    pub(super) store: StoreId,
    pub(super) node: NodeId,
}

/// A store, opened for one run of the node's process.
pub(super) struct Opened {
    pub(super) db: Db,
    pub(super) identity: StoreIdentity,
    pub(super) incarnation: Incarnation,
    pub(super) cluster: Option<ClusterId>,
}

/// Path of the store in a node's directory.
pub(super) fn store_path(dir: &Path) -> PathBuf {
    dir.join(STORE_FILE)
}

/// Creates the store of a new node and mints its identity.
pub(super) fn create(dir: &Path, me: NodeId) -> Result<StoreId, ControlError> {
    let path = store_path(dir);
    if path.symlink_metadata().is_ok() {
        return Err(ControlError::Exists(path));
    }
    // The boot file comes first: alone and without a start it is what a creation left that was cut short.
    // With a start, or unreadable, it says that a store was here and is lost [R13].
    let boot_file = boot::path(dir);
    if boot_file.symlink_metadata().is_ok() && !matches!(boot::read(dir), Ok((_, 0))) {
        return Err(ControlError::Exists(boot_file));
    }
    if me == NodeId(0) {
        return Err(ControlError::Options("node ids start at 1".into()));
    }
    fs::create_dir_all(dir).map_err(ControlError::io(format!("cannot create {}", dir.display())))?;
    let random = random_u128().map_err(ControlError::io("cannot draw a random number"))?;
    let identity = StoreIdentity { store: StoreId(random), node: me };
    // Under another name first: the store exists whole or not at all.
    let temp = dir.join("control.redb.new");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temp)
        .map_err(ControlError::io(format!("cannot create {}", temp.display())))?;
    let damaged = |e: db::DbError| ControlError::Damaged { path: temp.clone(), what: e.to_string() };
    let backend = FileBackend::new(file).map_err(|e| damaged(e.into()))?;
    Db::create_on(backend, identity).map_err(damaged)?;
    boot::write(dir, identity.store, 0)?;
    fs::rename(&temp, &path)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(ControlError::io(format!("cannot create {}", path.display())))?;
    Ok(identity.store)
}

/// Opens the database of an existing store, checks that it was not rolled back, counts nothing.
pub(super) fn open_uncounted(dir: &Path, me: NodeId) -> Result<(Db, StoreIdentity, u64), ControlError> {
    let path = store_path(dir);
    match fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(ControlError::Missing(path)),
        Err(e) => return Err(ControlError::io(format!("cannot read {}", path.display()))(e)),
        // redb would make a new database of an empty file.
        Ok(meta) if meta.len() == 0 => {
            return Err(ControlError::Damaged { path, what: "it is empty".into() });
        }
        Ok(_) => {}
    }
    let (boot_store, boot_file) = boot::read(dir)?;
    let damaged = |what: String| ControlError::Damaged { path: path.clone(), what };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(ControlError::io(format!("cannot open {}", path.display())))?;
    let backend = FileBackend::new(file).map_err(|e| damaged(e.to_string()))?;
    let db = Db::open_on(backend).map_err(|e| match e {
        db::DbError::InUse => ControlError::InUse(path.clone()),
        e => damaged(e.to_string()),
    })?;
    let identity = db.identity().map_err(|e| damaged(e.to_string()))?;
    if identity.node != me {
        return Err(ControlError::OtherNode { path: path.clone(), found: identity.node, me });
    }
    // The file still names the identity before a recovery if the process died right after that.
    let before = db.identity_before().map_err(|e| damaged(e.to_string()))?;
    if identity.store != boot_store && before != Some(boot_store) {
        return Err(damaged(format!("the file `boot` beside it belongs to store {boot_store}")));
    }
    let boot = db.boot().map_err(|e| damaged(e.to_string()))?;
    if boot < boot_file && !mutated(Mutation::R13) {
        return Err(ControlError::RolledBack { path, store: boot, file: boot_file });
    }
    Ok((db, identity, boot))
}

/// Opens an existing store for a new run: counts the start durably, then names the run. Never creates one.
pub(super) fn open(dir: &Path, me: NodeId) -> Result<Opened, ControlError> {
    let (db, identity, boot) = open_uncounted(dir, me)?;
    let path = store_path(dir);
    let damaged = |e: db::DbError| ControlError::Damaged { path: path.clone(), what: e.to_string() };
    let boot = boot.checked_add(1).ok_or_else(|| damaged(db::DbError::Value("boot counter".into())))?;
    // The store first: if the process dies in between, the file is behind, which is harmless.
    db.set_boot(boot).map_err(damaged)?;
    boot::write(dir, identity.store, boot)?;
    let cluster = db.cluster().map_err(damaged)?;
    let nonce = random_u64().map_err(ControlError::io("cannot draw a random number"))?;
    Ok(Opened { db, identity, incarnation: Incarnation::of_start(boot, nonce), cluster })
}

/// Starts an existing store over under a new identity, in a new cluster [R13, R19].
pub(super) fn restart_as(
    dir: &Path,
    db: &Db,
    boot: u64,
    store: StoreId,
    machine: &Machine,
    cluster: ClusterId,
    vote: &Vote,
) -> Result<(), ControlError> {
    // One transaction: the store is of the old cluster or of the new one. The file beside it follows; until
    // it does the store knows it by the identity that it had before.
    db.restart_from(machine, cluster, vote, store)
        .map_err(|e| ControlError::Damaged { path: store_path(dir), what: e.to_string() })?;
    boot::write(dir, store, boot)
}
