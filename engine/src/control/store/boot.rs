//! The file `boot` beside the store: how often the store was opened. A store that counts fewer starts was
//! rolled back and has forgotten votes [R13].

use std::io;

use super::super::codec;
use super::super::environment::StoreDir;
use super::super::error::ControlError;
use super::super::state::StoreId;

/// Name of the file.
pub(super) const FILE: &str = "boot";

/// Reads the store and the number of starts that the file names.
pub(super) fn read(dir: &dyn StoreDir) -> Result<(StoreId, u64), ControlError> {
    let path = dir.path(FILE);
    let bytes = match dir.read(FILE) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ControlError::Damaged { path, what: "it is missing beside its store".into() });
        }
        Err(e) => return Err(ControlError::io(format!("cannot read {}", path.display()))(e)),
    };
    codec::decode(&bytes).map_err(|e| ControlError::Damaged { path, what: e.to_string() })
}

/// Replaces the file durably.
pub(super) fn write(dir: &dyn StoreDir, store: StoreId, boot: u64) -> Result<(), ControlError> {
    let path = dir.path(FILE);
    let bytes = codec::encode(&(store, boot))
        .map_err(|e| ControlError::Damaged { path: path.clone(), what: e.to_string() })?;
    dir.replace(FILE, &bytes).map_err(ControlError::io(format!("cannot write {}", path.display())))
}
