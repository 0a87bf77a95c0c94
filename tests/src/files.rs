//! Whole files: compared byte for byte, filled with repeatable content.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::bits::Random;

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Compares the first `len` bytes of two files.
///
/// # Errors
/// Names the first 4 KiB block that differs, or the file that is too short.
pub fn compare(left: &Path, right: &Path, len: u64) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let (mut a, mut b) = (open(left)?, open(right)?);
    let (mut buffer_a, mut buffer_b) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0u64;
    while at < len {
        let part = usize::try_from((len - at).min(CHUNK as u64))?;
        read_part(&mut a, &mut buffer_a[..part], left, at)?;
        read_part(&mut b, &mut buffer_b[..part], right, at)?;
        if buffer_a[..part] != buffer_b[..part] {
            let differs = |start: &usize| {
                let end = (start + BLOCK).min(part);
                buffer_a[*start..end] != buffer_b[*start..end]
            };
            let blocks: Vec<u64> = (0..part)
                .step_by(BLOCK)
                .filter(differs)
                .map(|start| (at + start as u64) / BLOCK as u64)
                .collect();
            bail!("{} and {} differ, first in blocks {blocks:?}", left.display(), right.display());
        }
        at += part as u64;
    }
    Ok(())
}

fn read_part(file: &mut File, out: &mut [u8], path: &Path, at: u64) -> Result<()> {
    file.read_exact(out).map_err(|e| match e.kind() {
        ErrorKind::UnexpectedEof => {
            anyhow::anyhow!("{} ends before byte {}", path.display(), at + out.len() as u64)
        }
        _ => anyhow::Error::new(e).context(format!("read {}", path.display())),
    })
}

/// Writes a file of `len` bytes that do not compress, the same for the same seed.
///
/// # Errors
/// Where the file system refuses.
pub fn make_random(path: &Path, len: u64, seed: u64) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut random = Random::new(seed);
    let mut left = len;
    let mut buffer = vec![0u8; CHUNK];
    while left > 0 {
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        let part = usize::try_from(left.min(CHUNK as u64))?;
        file.write_all(&buffer[..part]).with_context(|| format!("write {}", path.display()))?;
        left -= part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_differ_in_one_byte_are_told_apart_by_block() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let len = (3 << 20) + 100;
        make_random(&a, len, 5).unwrap();
        make_random(&b, len, 5).unwrap();
        compare(&a, &b, len).unwrap();
        let mut bytes = std::fs::read(&b).unwrap();
        bytes[2 << 20] ^= 1;
        std::fs::write(&b, &bytes).unwrap();
        let text = compare(&a, &b, len).unwrap_err().to_string();
        assert!(text.contains("[512]"), "{text}");
        std::fs::write(&b, &bytes[..100]).unwrap();
        assert!(compare(&a, &b, len).unwrap_err().to_string().contains("ends before"));
    }
}
