//! A writer that notices when a write is undone: counters in blocks of a device, each in one place and never lower.
//!
//! Every block belongs to one thread, which writes the next number only when the one before was acknowledged, and reads
//! it back. So each block has one right content at any time: the last number that was acknowledged. A request that a
//! client sends again after it was done, and something newer with it, shows as a number that is lower. Several
//! threads on blocks side by side keep several requests in flight, and share a region, a bitmap page and a stripe.
//!
//! Reads and writes go past the page cache (`O_DIRECT`). Never does: finding the device, or what happens to it
//! meanwhile.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Bytes of a block; a counter is written to all of it.
pub const BLOCK: usize = 4096;
const NUMBER: usize = 8;

/// What the writer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Writes that were acknowledged, and read back.
    pub writes: u64,
    /// The longest that one of them took, with its reading back.
    pub longest: Duration,
}

/// A block in memory that the device can take directly.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let bytes = vec![0; 2 * BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + BLOCK]
    }

    fn fill(&mut self, number: u64) {
        for part in self.block().chunks_exact_mut(NUMBER) {
            part.copy_from_slice(&number.to_le_bytes());
        }
    }
}

/// The number in a block.
///
/// # Errors
/// If it is not the same in all of it.
pub fn number_in(block: &[u8]) -> Result<u64> {
    let parts: Vec<u64> = block
        .chunks_exact(NUMBER)
        .map(|part| part.try_into().map(u64::from_le_bytes).context("a part of a block"))
        .collect::<Result<_>>()?;
    let first = *parts.first().context("an empty block")?;
    match parts.iter().position(|part| *part != first) {
        Some(at) => bail!("torn: {first} at its start, {} at byte {}", parts[at], at * NUMBER),
        None => Ok(first),
    }
}

/// Writes to `blocks` blocks of the device, each from a thread of its own, until `over` is true; then all are read
/// again.
///
/// # Errors
/// An I/O error, or the first block that has another number than the last that was acknowledged.
pub fn run(device: &Path, blocks: u64, over: &(dyn Fn() -> bool + Sync)) -> Result<Done> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device);
    let file = file.with_context(|| format!("open {}", device.display()))?;
    let results: Vec<Result<(u64, Duration)>> = std::thread::scope(|scope| {
        let start = |block| {
            let file = &file;
            scope.spawn(move || count(file, block, over).with_context(|| format!("block {block}")))
        };
        let threads: Vec<_> = (0..blocks).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect()
    });
    let mut done = Done::default();
    let mut last = Vec::new();
    for result in results {
        let (number, longest) = result?;
        done.writes += number;
        done.longest = done.longest.max(longest);
        last.push(number);
    }
    // Once more when nothing is in flight any more: what came late has come by now.
    check(&file, &last)?;
    Ok(done)
}

/// Counts in one block; the last number, and the longest time of one.
fn count(file: &File, block: u64, over: &(dyn Fn() -> bool + Sync)) -> Result<(u64, Duration)> {
    let at = block * BLOCK as u64;
    let mut buffer = Buffer::new();
    let mut longest = Duration::ZERO;
    let mut number = 0;
    while !over() {
        number += 1;
        let begun = Instant::now();
        buffer.fill(number);
        file.write_all_at(buffer.block(), at).with_context(|| format!("write {number}"))?;
        buffer.fill(0);
        file.read_exact_at(buffer.block(), at).with_context(|| format!("read {number}"))?;
        let read = number_in(buffer.block())?;
        ensure!(read == number, "{number} was acknowledged, then {read} was read");
        longest = longest.max(begun.elapsed());
    }
    Ok((number, longest))
}

/// Demands that these numbers are in the first blocks.
///
/// # Errors
/// Names the first block that has another one.
pub fn check(file: &File, numbers: &[u64]) -> Result<()> {
    let mut buffer = Buffer::new();
    for (block, number) in numbers.iter().enumerate() {
        file.read_exact_at(buffer.block(), (block * BLOCK) as u64).context("read")?;
        let read = number_in(buffer.block()).with_context(|| format!("block {block}"))?;
        ensure!(read == *number, "block {block} ends with {read}; {number} was acknowledged");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use super::*;

    fn device() -> tempfile::NamedTempFile {
        // Not where temporary files are: that may take no direct I/O.
        let file = tempfile::NamedTempFile::new_in(crate::binary::target_dir().unwrap()).unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        file
    }

    #[test]
    fn a_device_that_keeps_what_it_acknowledged_passes() {
        let file = device();
        let looks = AtomicU32::new(0);
        let done = run(file.path(), 4, &|| looks.fetch_add(1, Ordering::Relaxed) > 400).unwrap();
        assert!(done.writes > 300, "{done:?}");
    }

    #[test]
    fn a_write_that_is_undone_is_found() {
        let file = device();
        let found = AtomicBool::new(false);
        let undo = || {
            while !found.load(Ordering::Relaxed) {
                file.as_file().write_all_at(&[1, 0, 0, 0, 0, 0, 0, 0].repeat(BLOCK / NUMBER), 0).unwrap();
            }
        };
        let reason = std::thread::scope(|scope| {
            scope.spawn(undo);
            let begun = Instant::now();
            let result = run(file.path(), 1, &|| begun.elapsed() > Duration::from_secs(20));
            found.store(true, Ordering::Relaxed);
            format!("{:#}", result.unwrap_err())
        });
        assert!(reason.contains("acknowledged") || reason.contains("torn"), "{reason}");
    }

    #[test]
    fn a_block_that_is_torn_or_was_never_written_is_told_apart() {
        let mut block = vec![0; BLOCK];
        assert_eq!(number_in(&block).unwrap(), 0);
        block[BLOCK - NUMBER] = 7;
        assert!(number_in(&block).unwrap_err().to_string().contains("at byte 4088"));
        let file = device();
        assert!(check(file.as_file(), &[0, 0]).is_ok());
        assert!(check(file.as_file(), &[0, 1]).unwrap_err().to_string().contains("block 1 ends with 0"));
    }
}
