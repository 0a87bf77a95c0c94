//! openraft's log storage on the store: votes and entries, durable before they are answered.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogState, OptionalSend, RaftLogReader, StorageIOError};

use super::super::codec;
use super::super::raft::{Entry, LogId, StorageError, TypeConfig, Vote};
use super::StoreHandle;

pub(super) fn storage_error(
    make: impl FnOnce(AnyError) -> StorageIOError<u64>,
) -> impl FnOnce(io::Error) -> StorageError {
    move |e| StorageError::IO { source: make(AnyError::new(&e)) }
}

impl RaftLogReader<TypeConfig> for StoreHandle {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let bounds: (Bound<u64>, Bound<u64>) = (range.start_bound().cloned(), range.end_bound().cloned());
        self.run(move |db| db.entries(bounds)).await.map_err(storage_error(StorageIOError::read_logs))
    }
}

impl RaftLogStorage<TypeConfig> for StoreHandle {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let (purged, last) = self
            .run(|db| Ok::<_, super::db::DbError>((db.purged()?, db.last_entry()?)))
            .await
            .map_err(storage_error(StorageIOError::read_logs))?;
        Ok(LogState { last_purged_log_id: purged, last_log_id: last.or(purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let vote = *vote;
        self.run(move |db| db.set_vote(&vote)).await.map_err(storage_error(StorageIOError::write_vote))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        self.run(|db| db.vote()).await.map_err(storage_error(StorageIOError::read_vote))
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.run(move |db| db.set_committed(committed)).await.map_err(storage_error(StorageIOError::write))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        self.run(|db| db.committed()).await.map_err(storage_error(StorageIOError::read))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encode = |e: Entry| codec::encode(&e).map(|bytes| (e.log_id.index, bytes));
        let entries: Result<Vec<_>, _> = entries.into_iter().map(encode).collect();
        let entries = entries.map_err(io::Error::other).map_err(storage_error(StorageIOError::write_logs))?;
        // Reads are queued behind this write, so the entries are readable from here on.
        self.post(move |db| callback.log_io_completed(db.append(&entries).map_err(Into::into)))
            .await
            .map_err(storage_error(StorageIOError::write_logs))
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.run(move |db| db.truncate(log_id.index)).await.map_err(storage_error(StorageIOError::write_logs))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.run(move |db| db.purge(&log_id)).await.map_err(storage_error(StorageIOError::write_logs))
    }
}
