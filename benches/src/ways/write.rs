//! Writing: blocks of 4 KiB at random places of a file, many in flight, with what may be registered with the ring.
//!
//! On a disk past the page cache, in memory at once within the call that submits, both as the reactor opens its files.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::link::{self, Sample, Work};
use super::ring::{Memory, Ring};
use super::way::{Medium, Write};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 8192;
const IN_FLIGHT: usize = 32;
/// From one block to the next, so that neighbours in time are none in space. Odd: all blocks have their turn.
const STEP: u64 = 3697;

/// Measures it on a file of its own in `dir`.
pub(super) fn run(how: Write, medium: Medium, dir: &Path, time: Duration) -> Result<Sample> {
    let file = tempfile::Builder::new().prefix("blkrepl-ways-").tempfile_in(dir);
    let file = file.with_context(|| format!("make a file in {}", dir.display()))?;
    // Every block is there before anything is measured.
    file.as_file().write_all_at(&vec![1; BLOCK * BLOCKS as usize], 0).context("fill the file")?;
    file.as_file().sync_all().context("flush the file")?;
    let flag = match medium {
        Medium::Disk => libc::O_DIRECT,
        // A write through the page cache would be handed to a thread of the kernel.
        Medium::Memory => libc::O_DIRECT | libc::O_NONBLOCK,
    };
    let data =
        OpenOptions::new().write(true).custom_flags(flag).open(file.path()).context("open the file")?;
    link::alone(|| measured(how, &data, time))
}

fn measured(how: Write, data: &File, time: Duration) -> Result<Work> {
    let mut ring = if how == Write::PlainRing { Ring::plain(data)? } else { Ring::new(data)? };
    let mut content = Memory::new(IN_FLIGHT * BLOCK);
    if how == Write::RegisteredFile {
        ring.register_file(data.as_raw_fd())?;
    }
    let registered = how != Write::OwnBuffer;
    if registered {
        ring.register_buffer(content.whole())?;
    }
    let (end, mut done, mut block, mut blocks) = (Instant::now() + time, Vec::new(), 0, 0);
    let mut begin = |ring: &mut Ring, content: &mut Memory, slot: u64| {
        block = (block + STEP) % BLOCKS;
        let place = usize::try_from(slot).expect("there are few") * BLOCK;
        ring.write(&content.whole()[place..place + BLOCK], block * BLOCK as u64, registered, slot);
    };
    (0..IN_FLIGHT as u64).for_each(|slot| begin(&mut ring, &mut content, slot));
    while Instant::now() < end {
        ring.turn(1, &mut done)?;
        for done in &done {
            ensure!(done.len == BLOCK, "a write of {} bytes", done.len);
            blocks += 1;
            begin(&mut ring, &mut content, done.tag);
        }
    }
    // The memory is the ring's until the last one is over.
    let mut left = IN_FLIGHT;
    while left > 0 {
        ring.turn(left, &mut done)?;
        left -= done.len();
    }
    Ok(Work { messages: blocks, enters: ring.enters() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_writes() {
        let dir = tempfile::tempdir().unwrap();
        for how in [Write::RegisteredBuffer, Write::OwnBuffer, Write::RegisteredFile, Write::PlainRing] {
            let sample = run(how, Medium::Memory, dir.path(), Duration::from_millis(30)).unwrap();
            assert!(sample.micros > 0.0 && sample.enters > 0.0, "{how:?}: {sample:?}");
        }
    }
}
