//! The program that runs in the machine while something is done to a system: it writes 4 KiB after 4 KiB to its device,
//! each on stable storage before the next, and tells how long the longest one took, what failed, and what was
//! acknowledged and is not there in the end.
//!
//! Files beside it that begin with its name: `ready` (it writes), `mark` (when the thing was done), `stop`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const BLOCK: usize = 4096;
/// Blocks that it writes to, in an order that is far from sequential.
const BLOCKS: u64 = 4096;
const STRIDE: u64 = 1543;
/// Failures after which the device is taken for gone.
const ERRORS_MAX: u32 = 20;
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// Longest run, whoever forgets to stop it.
const LIMIT: Duration = Duration::from_secs(300);

/// What the writer saw.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Seen {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Median of a write before the mark, ms.
    pub median_ms: f64,
    /// Longest write before the mark, ms.
    pub before_ms: f64,
    /// Longest time between two acknowledgements after the mark, ms.
    pub stall_ms: f64,
    /// Writes that failed.
    pub errors: u32,
    /// The first of them, in words.
    pub first_error: Option<String>,
    /// When it failed, counted from the mark, ms.
    pub failed_ms: Option<f64>,
    /// Blocks whose last acknowledged write is not there; none if they cannot be read.
    pub lost: Option<u64>,
}

/// A write that was acknowledged: when the one before it was, and when it was; seconds.
struct Acked {
    from: f64,
    until: f64,
}

struct Writer {
    file: File,
    buffer: Vec<u8>,
    /// Number of the last acknowledged write of each block; 0: none.
    last: Vec<u64>,
    acked: Vec<Acked>,
    errors: u32,
    first_error: Option<(String, f64)>,
}

/// Runs it until it is told to stop; prints what it saw.
///
/// # Errors
/// Where the device or the files beside it cannot be opened.
pub fn run(device: &Path, name: &Path) -> Result<()> {
    let beside = |ending: &str| PathBuf::from(format!("{}.{ending}", name.display()));
    let mut writer = Writer::open(device)?;
    fs::write(beside("ready"), "").context("say that it writes")?;
    writer.write_until(&beside("stop"));
    let mark = fs::read_to_string(beside("mark")).context("read when the thing was done")?;
    let mark: f64 = mark.trim().parse().context("when the thing was done")?;
    println!("{}", serde_json::to_string(&writer.seen(mark, device))?);
    Ok(())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn open(device: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(device)
}

/// The part of the buffer that direct I/O can use.
fn aligned(buffer: &mut [u8]) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(BLOCK);
    &mut buffer[skip..skip + BLOCK]
}

fn offset(block: u64) -> u64 {
    block * BLOCK as u64
}

impl Writer {
    fn open(device: &Path) -> Result<Self> {
        let file = open(device).with_context(|| format!("open {}", device.display()))?;
        let last = (0..BLOCKS).map(|_| 0).collect();
        let buffer = vec![0; 2 * BLOCK];
        Ok(Self { file, buffer, last, acked: Vec::new(), errors: 0, first_error: None })
    }

    fn write_until(&mut self, stop: &Path) {
        let begun = now();
        let mut before = begun;
        let mut number = 1;
        while !stop.exists() && before - begun < LIMIT.as_secs_f64() && self.errors < ERRORS_MAX {
            let block = number * STRIDE % BLOCKS;
            match self.write(block, number) {
                Ok(()) => {
                    let until = now();
                    self.acked.push(Acked { from: before, until });
                    self.last[usize::try_from(block).unwrap_or_default()] = number;
                    (before, number) = (until, number + 1);
                }
                Err(error) => {
                    self.errors += 1;
                    self.first_error.get_or_insert_with(|| (error.to_string(), now()));
                    std::thread::sleep(ERROR_PAUSE);
                }
            }
        }
    }

    fn write(&mut self, block: u64, number: u64) -> io::Result<()> {
        let buffer = aligned(&mut self.buffer);
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        self.file.write_all_at(buffer, offset(block))
    }

    fn seen(&mut self, mark: f64, device: &Path) -> Seen {
        let longest = |acked: &mut dyn Iterator<Item = &Acked>| {
            acked.map(|a| (a.until - a.from) * 1e3).fold(0.0_f64, f64::max)
        };
        let mut times: Vec<f64> =
            self.acked.iter().filter(|a| a.until < mark).map(|a| a.until - a.from).collect();
        times.sort_by(f64::total_cmp);
        Seen {
            writes: self.acked.len() as u64,
            median_ms: times.get(times.len() / 2).copied().unwrap_or_default() * 1e3,
            before_ms: longest(&mut self.acked.iter().filter(|a| a.until < mark)),
            stall_ms: longest(&mut self.acked.iter().filter(|a| a.until >= mark)),
            errors: self.errors,
            first_error: self.first_error.as_ref().map(|(words, _)| words.clone()),
            failed_ms: self.first_error.as_ref().map(|(_, at)| (at - mark) * 1e3),
            lost: self.lost(device).ok(),
        }
    }

    /// Counts the blocks that have less than was acknowledged.
    fn lost(&mut self, device: &Path) -> io::Result<u64> {
        let file = open(device)?;
        let mut lost = 0;
        for (block, acked) in (0..BLOCKS).zip(&self.last) {
            if *acked == 0 {
                continue;
            }
            let buffer = aligned(&mut self.buffer);
            file.read_exact_at(buffer, offset(block))?;
            let mut words =
                buffer.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
            let first = words.next().unwrap_or_default();
            // One that failed and is there all the same is newer than what was acknowledged.
            if first < *acked || words.any(|word| word != first) {
                lost += 1;
            }
        }
        Ok(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in place of the device; /var/tmp, since direct I/O is refused where files are in memory.
    #[test]
    fn it_finds_what_was_acknowledged_and_is_not_there() {
        let dir = crate::cluster::scratch_dir().unwrap();
        let device = dir.path().join("device");
        File::create(&device).unwrap().set_len(offset(BLOCKS)).unwrap();
        let mut writer = Writer::open(&device).unwrap();
        for number in 1..=20 {
            writer.write(number, number).unwrap();
            writer.last[usize::try_from(number).unwrap()] = number;
        }
        assert_eq!(writer.lost(&device).unwrap(), 0);
        writer.write(7, 3).unwrap();
        writer.write(8, 9).unwrap();
        writer.file.write_all_at(aligned(&mut writer.buffer), offset(9)).unwrap();
        let buffer = aligned(&mut writer.buffer);
        buffer[BLOCK - 1] ^= 1;
        writer.file.write_all_at(buffer, offset(10)).unwrap();
        // Block 7 is older than what was acknowledged, block 10 is torn; 8 is newer, 9 is as it was.
        assert_eq!(writer.lost(&device).unwrap(), 2);
    }
}
