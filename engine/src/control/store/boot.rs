//! The file `boot` beside the store: how often the store was opened. A store that counts fewer starts was
//! rolled back and has forgotten votes [R13].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::super::codec;
use super::super::error::ControlError;
use super::super::state::StoreId;

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("boot")
}

/// Reads the store and the number of starts that the file names.
pub(super) fn read(dir: &Path) -> Result<(StoreId, u64), ControlError> {
    let path = path(dir);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ControlError::Damaged { path, what: "it is missing beside its store".into() });
        }
        Err(e) => return Err(ControlError::io(format!("cannot read {}", path.display()))(e)),
    };
    codec::decode(&bytes).map_err(|e| ControlError::Damaged { path, what: e.to_string() })
}

/// Replaces the file durably.
pub(super) fn write(dir: &Path, store: StoreId, boot: u64) -> Result<(), ControlError> {
    let path = path(dir);
    let bytes = codec::encode(&(store, boot))
        .map_err(|e| ControlError::Damaged { path: path.clone(), what: e.to_string() })?;
    let temp = dir.join("boot.new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temp)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temp, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(ControlError::io(format!("cannot write {}", path.display())))
}
