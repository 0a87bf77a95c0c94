//! The tables of the store and the transactions on them. Blocking; runs on the store's own thread.
//!
//! Every write that returns `Ok` is durable, but for the committed index, which is a hint. After a failed
//! write redb refuses all further ones: a store that failed once is not trusted again.

use redb::{Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::ErrorKind;
use std::ops::RangeBounds;
use std::path::Path;
use thiserror::Error;

use crate::types::{ClusterId, Incarnation};

use super::super::codec::{self, CodecError};
use super::super::error::ControlError;
use super::super::raft::{Entry, LogId, SnapshotMeta, StoredMembership, Vote};
use super::super::state::{ClusterState, StoreId};
use super::StoreIdentity;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");

const IDENTITY: &str = "identity";
const IDENTITY_BEFORE: &str = "identity-before";
const BOOT: &str = "boot";
const OUTDATED: &str = "outdated";
const CLUSTER: &str = "cluster";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const MACHINE: &str = "machine";
const SNAPSHOT: &str = "snapshot";

/// Memory for pages, in bytes. The whole content is a few hundred KiB.
const CACHE_BYTES: usize = 1 << 20;

/// Why a store operation failed.
#[derive(Debug, Error)]
pub(in super::super) enum DbError {
    #[error("it is open in another process")]
    InUse,
    #[error("database: {0}")]
    Redb(#[from] redb::Error),
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("value of `{0}` is missing or makes no sense")]
    Value(String),
}

impl DbError {
    /// What it means for the store at `path`. A disk that is full or fails says nothing against what is stored.
    pub(in super::super) fn at(self, path: &Path) -> ControlError {
        let path = path.to_owned();
        match self {
            Self::InUse => ControlError::InUse(path),
            // Bytes that are missing, or make no sense: damage.
            Self::Redb(redb::Error::Io(source))
                if !matches!(source.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) =>
            {
                ControlError::Io { what: format!("cannot use {}", path.display()), source }
            }
            other => ControlError::Damaged { path, what: other.to_string() },
        }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for DbError {
            fn from(e: $error) -> Self {
                Self::Redb(e.into())
            }
        })*
    };
}
from_redb!(redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError);

impl From<redb::DatabaseError> for DbError {
    fn from(e: redb::DatabaseError) -> Self {
        match e {
            redb::DatabaseError::DatabaseAlreadyOpen => Self::InUse,
            e => Self::Redb(e.into()),
        }
    }
}

impl From<DbError> for std::io::Error {
    fn from(e: DbError) -> Self {
        Self::other(e.to_string())
    }
}

/// The applied state, as it is persisted.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in super::super) struct Machine {
    pub(in super::super) last_applied: Option<LogId>,
    pub(in super::super) membership: StoredMembership,
    pub(in super::super) state: ClusterState,
}

/// The database.
pub(in super::super) struct Db {
    db: Database,
}

impl Db {
    fn builder() -> redb::Builder {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        builder
    }

    pub(in super::super) fn create_on(
        backend: impl StorageBackend,
        identity: StoreIdentity,
    ) -> Result<Self, DbError> {
        let this = Self { db: Self::builder().create_with_backend(backend)? };
        let txn = this.db.begin_write()?;
        txn.open_table(LOG)?;
        {
            let mut meta = txn.open_table(META)?;
            meta.insert(IDENTITY, codec::encode(&identity)?.as_slice())?;
            meta.insert(BOOT, codec::encode(&0u64)?.as_slice())?;
        }
        txn.commit()?;
        Ok(this)
    }

    pub(in super::super) fn open_on(backend: impl StorageBackend) -> Result<Self, DbError> {
        let this = Self { db: Self::builder().create_with_backend(backend)? };
        this.identity()?;
        Ok(this)
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, DbError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(META)?;
        let Some(bytes) = table.get(key)? else { return Ok(None) };
        Ok(Some(codec::decode(bytes.value())?))
    }

    fn put<T: Serialize>(&self, durability: Durability, key: &str, value: &T) -> Result<(), DbError> {
        let bytes = codec::encode(value)?;
        self.write(durability, |txn| {
            txn.open_table(META)?.insert(key, bytes.as_slice())?;
            Ok(())
        })
    }

    fn write(
        &self,
        durability: Durability,
        body: impl FnOnce(&redb::WriteTransaction) -> Result<(), DbError>,
    ) -> Result<(), DbError> {
        let mut txn = self.db.begin_write()?;
        txn.set_durability(durability).map_err(|e| DbError::Value(e.to_string()))?;
        body(&txn)?;
        txn.commit()?;
        Ok(())
    }

    pub(in super::super) fn identity(&self) -> Result<StoreIdentity, DbError> {
        self.get(IDENTITY)?.ok_or_else(|| DbError::Value(IDENTITY.into()))
    }

    /// The identity before the last recovery, if there was one.
    pub(in super::super) fn identity_before(&self) -> Result<Option<StoreId>, DbError> {
        self.get(IDENTITY_BEFORE)
    }

    pub(in super::super) fn boot(&self) -> Result<u64, DbError> {
        self.get(BOOT)?.ok_or_else(|| DbError::Value(BOOT.into()))
    }

    pub(in super::super) fn set_boot(&self, boot: u64) -> Result<(), DbError> {
        self.put(Durability::Immediate, BOOT, &boot)
    }

    /// The newer run of this store that the cluster knows, if one was ever heard of.
    pub(in super::super) fn outdated(&self) -> Result<Option<Incarnation>, DbError> {
        self.get(OUTDATED)
    }

    /// Remembers for good that this store was rolled back or copied: counting more starts must not make it
    /// credible again [R13].
    pub(in super::super) fn set_outdated(&self, newest: Incarnation) -> Result<(), DbError> {
        self.put(Durability::Immediate, OUTDATED, &newest)
    }

    pub(in super::super) fn cluster(&self) -> Result<Option<ClusterId>, DbError> {
        self.get(CLUSTER)
    }

    /// Makes this a store of `cluster`. A store belongs to one cluster for good [R13].
    pub(in super::super) fn adopt_cluster(&self, cluster: ClusterId) -> Result<(), DbError> {
        match self.cluster()? {
            None => self.put(Durability::Immediate, CLUSTER, &cluster),
            Some(mine) if mine == cluster => Ok(()),
            Some(mine) => Err(DbError::Value(format!("cluster: it is {mine} already, not {cluster}"))),
        }
    }

    pub(in super::super) fn vote(&self) -> Result<Option<Vote>, DbError> {
        self.get(VOTE)
    }

    pub(in super::super) fn set_vote(&self, vote: &Vote) -> Result<(), DbError> {
        self.put(Durability::Immediate, VOTE, vote)
    }

    pub(in super::super) fn committed(&self) -> Result<Option<LogId>, DbError> {
        Ok(self.get::<Option<LogId>>(COMMITTED)?.flatten())
    }

    /// A hint, so it need not be durable: the applied state is.
    pub(in super::super) fn set_committed(&self, committed: Option<LogId>) -> Result<(), DbError> {
        self.put(Durability::None, COMMITTED, &committed)
    }

    pub(in super::super) fn purged(&self) -> Result<Option<LogId>, DbError> {
        self.get(PURGED)
    }

    /// Id of the last entry, if there is any.
    pub(in super::super) fn last_entry(&self) -> Result<Option<LogId>, DbError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(LOG)?;
        let Some((_, bytes)) = table.last()? else { return Ok(None) };
        Ok(Some(codec::decode::<Entry>(bytes.value())?.log_id))
    }

    pub(in super::super) fn entries(&self, range: impl RangeBounds<u64>) -> Result<Vec<Entry>, DbError> {
        let txn = self.db.begin_read()?;
        let table = txn.open_table(LOG)?;
        let mut out = Vec::new();
        for item in table.range(range)? {
            let (index, bytes) = item?;
            let entry: Entry = codec::decode(bytes.value())?;
            if entry.log_id.index != index.value() {
                return Err(DbError::Value(format!("log entry {}", index.value())));
            }
            out.push(entry);
        }
        Ok(out)
    }

    pub(in super::super) fn append(&self, entries: &[(u64, Vec<u8>)]) -> Result<(), DbError> {
        self.write(Durability::Immediate, |txn| {
            let mut table = txn.open_table(LOG)?;
            for (index, bytes) in entries {
                table.insert(index, bytes.as_slice())?;
            }
            Ok(())
        })
    }

    /// Drops the entries from `index` on.
    pub(in super::super) fn truncate(&self, index: u64) -> Result<(), DbError> {
        self.write(Durability::Immediate, |txn| {
            txn.open_table(LOG)?.retain_in(index.., |_, _| false)?;
            Ok(())
        })
    }

    /// Drops the entries up to and with `log_id`.
    pub(in super::super) fn purge(&self, log_id: &LogId) -> Result<(), DbError> {
        let purged = codec::encode(log_id)?;
        self.write(Durability::Immediate, |txn| {
            txn.open_table(LOG)?.retain_in(..=log_id.index, |_, _| false)?;
            txn.open_table(META)?.insert(PURGED, purged.as_slice())?;
            Ok(())
        })
    }

    pub(in super::super) fn machine(&self) -> Result<Machine, DbError> {
        let machine: Machine = self.get(MACHINE)?.unwrap_or_default();
        machine.state.check().map_err(DbError::Value)?;
        Ok(machine)
    }

    pub(in super::super) fn set_machine(&self, machine: &Machine) -> Result<(), DbError> {
        self.put(Durability::Immediate, MACHINE, machine)
    }

    pub(in super::super) fn snapshot(&self) -> Result<Option<(SnapshotMeta, Vec<u8>)>, DbError> {
        self.get(SNAPSHOT)
    }

    pub(in super::super) fn set_snapshot(&self, snapshot: &(SnapshotMeta, Vec<u8>)) -> Result<(), DbError> {
        self.put(Durability::Immediate, SNAPSHOT, snapshot)
    }

    /// Replaces the applied state by that of a snapshot, and the snapshot with it, in one transaction.
    pub(in super::super) fn install(
        &self,
        machine: &Machine,
        snapshot: &(SnapshotMeta, Vec<u8>),
    ) -> Result<(), DbError> {
        let (machine, snapshot) = (codec::encode(machine)?, codec::encode(snapshot)?);
        self.write(Durability::Immediate, |txn| {
            let mut meta = txn.open_table(META)?;
            meta.insert(MACHINE, machine.as_slice())?;
            meta.insert(SNAPSHOT, snapshot.as_slice())?;
            Ok(())
        })
    }

    /// Forgets log, vote and snapshot and starts over from `machine` as `store` of a new cluster, in one
    /// transaction [R19].
    pub(in super::super) fn restart_from(
        &self,
        machine: &Machine,
        cluster: ClusterId,
        vote: &Vote,
        store: StoreId,
    ) -> Result<(), DbError> {
        let before = self.identity()?;
        let purged = machine.last_applied.map(|id| codec::encode(&id)).transpose()?;
        let values = [
            (IDENTITY, codec::encode(&StoreIdentity { store, ..before })?),
            (IDENTITY_BEFORE, codec::encode(&before.store)?),
            (MACHINE, codec::encode(machine)?),
            (CLUSTER, codec::encode(&cluster)?),
            (VOTE, codec::encode(vote)?),
            (COMMITTED, codec::encode(&machine.last_applied)?),
        ];
        self.write(Durability::Immediate, |txn| {
            txn.open_table(LOG)?.retain(|_, _| false)?;
            let mut meta = txn.open_table(META)?;
            meta.remove(SNAPSHOT)?;
            meta.remove(OUTDATED)?;
            for (key, bytes) in &values {
                meta.insert(*key, bytes.as_slice())?;
            }
            if let Some(purged) = &purged {
                meta.insert(PURGED, purged.as_slice())?;
            }
            Ok(())
        })
    }
}
