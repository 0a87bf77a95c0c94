//! Byte for byte comparisons. Reads only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blkrepl_nbd::{NbdClient, NbdError};

const STEP: usize = 1 << 20;

/// Offset of the first byte in which two files differ within the first `len` bytes; `None` if they are
/// equal there.
///
/// # Errors
/// A file cannot be read or is shorter than `len`.
pub fn files(a: &Path, b: &Path, len: u64) -> io::Result<Option<u64>> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let (mut x, mut y) = (vec![0; STEP], vec![0; STEP]);
    let mut offset = 0;
    while offset < len {
        let n = STEP.min(usize::try_from(len - offset).unwrap_or(STEP));
        a.read_exact_at(&mut x[..n], offset)?;
        b.read_exact_at(&mut y[..n], offset)?;
        if let Some(at) = first_difference(&x[..n], &y[..n]) {
            return Ok(Some(offset + at));
        }
        offset += n as u64;
    }
    Ok(None)
}

/// As [`files`], for a volume and a file.
///
/// # Errors
/// Either cannot be read.
pub fn volume(client: &mut NbdClient, file: &File, len: u64) -> Result<Option<u64>, NbdError> {
    let (mut x, mut y) = (vec![0; STEP], vec![0; STEP]);
    let mut offset = 0;
    while offset < len {
        let n = STEP.min(usize::try_from(len - offset).unwrap_or(STEP));
        client.read(offset, &mut x[..n])?;
        file.read_exact_at(&mut y[..n], offset)
            .map_err(|e| NbdError::Usage(format!("cannot read the file: {e}")))?;
        if let Some(at) = first_difference(&x[..n], &y[..n]) {
            return Ok(Some(offset + at));
        }
        offset += n as u64;
    }
    Ok(None)
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(x, y)| x != y).map(|at| at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_across_steps() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut content = vec![7u8; STEP * 2 + 100];
        std::fs::write(&a, &content).unwrap();
        std::fs::write(&b, &content).unwrap();
        let len = content.len() as u64;
        assert_eq!(files(&a, &b, len).unwrap(), None);
        assert!(files(&a, &b, len + 1).is_err(), "a file that is too short is no equal");
        content[STEP + 5] = 8;
        std::fs::write(&b, &content).unwrap();
        assert_eq!(files(&a, &b, len).unwrap(), Some(STEP as u64 + 5));
    }
}
