//! The store's file as redb sees it. Adds nothing but the lock that a file of another kind does not need.

use std::io;
use std::ops::Bound;

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

use super::super::environment::{RawFile, StoreFile};
use super::db::DbError;

/// The file of a store.
#[derive(Debug)]
pub(super) enum Backend {
    Os(FileBackend),
    Other(Box<dyn RawFile>),
}

impl Backend {
    pub(super) fn new(file: StoreFile) -> Result<Self, DbError> {
        Ok(match file {
            StoreFile::Os(file) => Self::Os(FileBackend::new(file)?),
            StoreFile::Other(file) => Self::Other(file),
        })
    }
}

/// A file of another kind has one user, so every lock on it is free.
impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Os(file) => file.len(),
            Self::Other(file) => file.size(),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Os(file) => file.read(offset, out),
            Self::Other(file) => file.read(offset, out),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self {
            Self::Os(file) => file.set_len(len),
            Self::Other(file) => file.set_len(len),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        match self {
            Self::Os(file) => file.sync_data(),
            Self::Other(file) => file.sync(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Os(file) => file.write(offset, data),
            Self::Other(file) => file.write(offset, data),
        }
    }

    fn close(&self) -> io::Result<()> {
        match self {
            Self::Os(file) => file.close(),
            Self::Other(_) => Ok(()),
        }
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        match self {
            Self::Os(file) => file.try_lock_range(start, end),
            Self::Other(_) => Ok(true),
        }
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        match self {
            Self::Os(file) => file.try_lock_shared_range(start, end),
            Self::Other(_) => Ok(true),
        }
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        match self {
            Self::Os(file) => file.lock_range(start, end),
            Self::Other(_) => Ok(()),
        }
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        match self {
            Self::Os(file) => file.lock_shared_range(start, end),
            Self::Other(_) => Ok(()),
        }
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        match self {
            Self::Os(file) => file.unlock_range(start, end),
            Self::Other(_) => Ok(()),
        }
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        match self {
            Self::Os(file) => file.query_lock_range(start, end),
            Self::Other(_) => Ok(false),
        }
    }
}
