//! What a node keeps of the Raft group on disk: `control.redb`, written through redb, and `boot` beside it.
//!
//! Everything that Raft relies on is durable before it is answered. The state machine is persisted with
//! every batch that it applies, so that the cluster state is there at once after a start. A store is
//! created by an explicit step only, and a store that is missing, damaged or rolled back is refused [R13].

mod backend;
mod boot;
mod db;
mod log;
mod machine;
#[cfg(test)]
mod tests;
mod worker;

use std::path::{Path, PathBuf};

use crate::mutation::{Mutation, mutated};
use crate::types::{ClusterId, Incarnation, NodeId};

use super::environment::{Environment, StoreDir};
use super::error::ControlError;
use super::raft::Vote;
use super::state::StoreId;

use backend::Backend;
pub(super) use db::{Db, DbError, Machine};
pub(super) use machine::{StateMachine, apply_offline, decode_snapshot};
pub use worker::StoreWorker;
pub(super) use worker::{Closed, StoreHandle};

/// File name of the store.
const STORE_FILE: &str = "control.redb";
/// The same while it is being created.
const STORE_FILE_NEW: &str = "control.redb.new";

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
pub(super) fn store_path(env: &dyn Environment, dir: &Path) -> PathBuf {
    env.store_dir(dir).path(STORE_FILE)
}

/// Creates the store of a new node and mints its identity.
pub(super) fn create(env: &dyn Environment, dir: &Path, me: NodeId) -> Result<StoreId, ControlError> {
    let files = env.store_dir(dir);
    let files = files.as_ref();
    let path = files.path(STORE_FILE);
    if files.exists(STORE_FILE) {
        return Err(ControlError::Exists(path));
    }
    // The boot file comes first: alone and without a start it is what a creation left that was cut short.
    // With a start, or unreadable, it says that a store was here and is lost [R13].
    if files.exists(boot::FILE) && !matches!(boot::read(files), Ok((_, 0))) {
        return Err(ControlError::Exists(files.path(boot::FILE)));
    }
    if me == NodeId(0) {
        return Err(ControlError::Options("node ids start at 1".into()));
    }
    files.create_dir().map_err(ControlError::io(format!("cannot create {}", dir.display())))?;
    let random = env.random().map_err(ControlError::io("cannot draw a random number"))?;
    let identity = StoreIdentity { store: StoreId(random), node: me };
    // Under another name first: the store exists whole or not at all.
    let temp = files.path(STORE_FILE_NEW);
    let file = files
        .create(STORE_FILE_NEW)
        .map_err(ControlError::io(format!("cannot create {}", temp.display())))?;
    let failed = |e: DbError| e.at(&temp);
    Db::create_on(Backend::new(file).map_err(failed)?, identity).map_err(failed)?;
    boot::write(files, identity.store, 0)?;
    files
        .rename(STORE_FILE_NEW, STORE_FILE)
        .map_err(ControlError::io(format!("cannot create {}", path.display())))?;
    Ok(identity.store)
}

/// Opens the database of an existing store, checks that it was not rolled back, counts nothing.
pub(super) fn open_uncounted(
    env: &dyn Environment,
    dir: &Path,
    me: NodeId,
) -> Result<(Db, StoreIdentity, u64), ControlError> {
    let files = env.store_dir(dir);
    let files = files.as_ref();
    let path = files.path(STORE_FILE);
    match files.len(STORE_FILE) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(ControlError::Missing(path)),
        Err(e) => return Err(ControlError::io(format!("cannot read {}", path.display()))(e)),
        // redb would make a new database of an empty file.
        Ok(0) => {
            return Err(ControlError::Damaged { path, what: "it is empty".into() });
        }
        Ok(_) => {}
    }
    let (boot_store, boot_file) = boot::read(files)?;
    let failed = |e: DbError| e.at(&path);
    let file = files.open(STORE_FILE).map_err(ControlError::io(format!("cannot open {}", path.display())))?;
    let db = Backend::new(file).and_then(Db::open_on).map_err(failed)?;
    let identity = db.identity().map_err(failed)?;
    if identity.node != me {
        return Err(ControlError::OtherNode { path: path.clone(), found: identity.node, me });
    }
    // The file still names the identity before a recovery if the process died right after that.
    let before = db.identity_before().map_err(failed)?;
    if identity.store != boot_store && before != Some(boot_store) {
        let what = format!("the file `boot` beside it belongs to store {boot_store}");
        return Err(ControlError::Damaged { path, what });
    }
    let boot = db.boot().map_err(failed)?;
    if boot < boot_file && !mutated(Mutation::R13) {
        return Err(ControlError::RolledBack { path, store: boot, file: boot_file });
    }
    Ok((db, identity, boot))
}

/// Opens an existing store for a new run: counts the start durably, then names the run. Never creates one.
pub(super) fn open(env: &dyn Environment, dir: &Path, me: NodeId) -> Result<Opened, ControlError> {
    let (db, identity, boot) = open_uncounted(env, dir, me)?;
    let path = store_path(env, dir);
    let failed = |e: DbError| e.at(&path);
    if let Some(newest) = db.outdated().map_err(failed)? {
        return Err(ControlError::Outdated { path, newest });
    }
    let boot = boot.checked_add(1).ok_or_else(|| failed(DbError::Value("boot counter".into())))?;
    // The store first: if the process dies in between, the file is behind, which is harmless.
    db.set_boot(boot).map_err(failed)?;
    boot::write(env.store_dir(dir).as_ref(), identity.store, boot)?;
    let cluster = db.cluster().map_err(failed)?;
    let random = env.random().map_err(ControlError::io("cannot draw a random number"))?;
    let nonce = random as u64;
    Ok(Opened { db, identity, incarnation: Incarnation::of_start(boot, nonce), cluster })
}

/// Starts an existing store over under a new identity, in a new cluster [R13, R19].
pub(super) fn restart_as(
    files: &dyn StoreDir,
    db: &Db,
    boot: u64,
    store: StoreId,
    machine: &Machine,
    cluster: ClusterId,
    vote: &Vote,
) -> Result<(), ControlError> {
    let failed = |e: DbError| e.at(&files.path(STORE_FILE));
    // The file may still name the identity before an earlier recovery. The store knows one identity back, no more.
    boot::write(files, db.identity().map_err(failed)?.store, boot)?;
    // One transaction: the store is of the old cluster or of the new one. The file beside it follows; until
    // it does the store knows it by the identity that it had before.
    db.restart_from(machine, cluster, vote, store).map_err(failed)?;
    boot::write(files, store, boot)
}
