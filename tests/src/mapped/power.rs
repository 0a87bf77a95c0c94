//! A cut of the power of the whole machine, on which both data nodes, the witness and the client run: what a database
//! reported committed, it had flushed, so it is there afterwards.
//!
//! [`load`] runs until the machine is gone and says outside what was reported; [`check`] runs after the next boot.
//! [`write_numbers`] is both, for a device without a file system, whose cluster may be cut as soon as it serves.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::OFlags;
use rustix::process::Signal;

use super::device::check_kernel_log;
use super::load::check_tables;
use super::{Mapped, MappedFs};
use crate::binary::blkrepl;
use crate::mount::FileSystem;
use crate::postgres::Postgres;
use crate::proc::{Proc, run};
use crate::wait::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(120);
const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
/// So many numbers are on the device, so far from each other.
const NUMBERS: u64 = 1024;
const STRIDE: u64 = SIZE / NUMBERS;
const AT: &str = "/mnt/mapped";
/// How often it is said outside what was reported.
const TELL: Duration = Duration::from_millis(50);

/// The cluster, in a directory that outlives a cut.
fn cluster(dir: &Path) -> Result<(Proc, Mapped)> {
    fs::create_dir_all(dir)?;
    let mut dev = Command::new(blkrepl()?);
    dev.args(["dev", "--size", &SIZE.to_string(), "--dir"]).arg(dir.join("nodes"));
    let mut dev = Proc::spawn("dev", &mut dev, &dir.join("dev.log"))?;
    let served = wait_for("the cluster to serve", LIMIT, || match dev.exited()? {
        Some(status) => Ok(Err(anyhow!("the cluster ended with {status}"))),
        None if dev.output().contains("serves vol0") => Ok(Ok(())),
        None => bail!("it does not say so"),
    });
    served.flatten().with_context(|| format!("the cluster said: {}", dev.output()))?;
    let mapped = Mapped::start(&dir.join("nodes/n1/node.toml"), dir);
    let mapped = mapped.with_context(|| format!("the cluster said: {}", dev.output()))?;
    Ok((dev, mapped))
}

fn data() -> PathBuf {
    Path::new(AT).join("pg")
}

/// Commits until the power is cut; `tell` is a file outside the machine, which gets the last number that was reported.
///
/// # Errors
/// Where a part does not start.
pub fn load(kind: FileSystem, dir: &Path, tell: &Path) -> Result<()> {
    let (_dev, mapped) = cluster(dir)?;
    MappedFs::format(kind, mapped.device())?;
    let _fs = MappedFs::mount(kind, mapped.device(), Path::new(AT))?;
    Postgres::init(&data())?;
    let server = Arc::new(Postgres::start(&data(), Path::new("/run/pg-load"))?);
    run(server.client("pgbench").args(["-i", "-q", "-s", "1", "postgres"]), LIMIT)?.ok()?;
    server.create_accounts()?;
    server.query("CREATE EXTENSION amcheck")?;
    let ledger = server.account(0);
    let mut pgbench = server.client("pgbench");
    let _pgbench = pgbench.args(["-n", "-c", "2", "-T", "36000", "postgres"]).spawn()?;
    let mut out = fs::OpenOptions::new().write(true).open(tell)?;
    let mut told = None;
    loop {
        let committed = ledger.committed();
        if told.replace(committed) != Some(committed) {
            writeln!(out, "REPORTED {committed}")?;
        }
        std::thread::sleep(TELL);
    }
}

/// Looks at what is there after a boot.
///
/// # Errors
/// What is missing, or broken.
pub fn check(kind: FileSystem, dir: &Path, committed: u64) -> Result<()> {
    let (mut dev, mapped) = cluster(dir)?;
    let fs = MappedFs::mount(kind, mapped.device(), Path::new(AT))?;
    // What its last run left; nobody has it any more.
    let _absent = fs::remove_file(data().join("postmaster.pid"));
    let server = Postgres::start(&data(), Path::new("/run/pg-check"))?;
    server.check_account(0, committed)?;
    check_tables(&server)?;
    server.stop()?;
    fs.check()?;
    mapped.unmap()?;
    check_kernel_log()?;
    dev.signal(Signal::TERM)?;
    wait_until("the cluster to stop", LIMIT, || matches!(dev.exited(), Ok(Some(_)) | Err(_)))
}

/// Writes numbers to the device one after the other, each synchronous, until the power is cut. `tell` is a file outside
/// the machine, which gets the last number that was written; `last` is what an earlier run told there, and it is looked
/// at first whether that and what was written before it are still there.
///
/// # Errors
/// Where a part does not start, or which number is missing.
pub fn write_numbers(dir: &Path, tell: &Path, last: u64) -> Result<()> {
    let (_dev, mapped) = cluster(dir)?;
    let mut options = fs::OpenOptions::new();
    let flags = OFlags::DIRECT | OFlags::DSYNC;
    let device =
        options.read(true).write(true).custom_flags(flags.bits().cast_signed()).open(mapped.device())?;
    for number in last.saturating_sub(NUMBERS - 1).max(1)..=last {
        let mut block = Block([0; BLOCK]);
        device.read_exact_at(&mut block.0, place_of(number))?;
        let found = block.number();
        // What came after the last was perhaps written before the cut, and not told.
        ensure!(
            found == number || (found > last && found % NUMBERS == number % NUMBERS),
            "{number} was written and told, {last} last; in its place is {found}"
        );
    }
    let mut out = fs::OpenOptions::new().write(true).open(tell)?;
    for number in last + 1.. {
        device.write_all_at(&Block::of(number).0, place_of(number))?;
        writeln!(out, "REPORTED {number}")?;
    }
    Ok(())
}

/// A block that repeats a number.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    fn of(number: u64) -> Self {
        let mut block = Self([0; BLOCK]);
        block.0.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
        block
    }

    /// The number; 0 if not all of it is there.
    fn number(&self) -> u64 {
        let (words, _) = self.0.as_chunks::<8>();
        if words.iter().all(|word| *word == words[0]) { u64::from_le_bytes(words[0]) } else { 0 }
    }
}

/// Where a number is written: spread over the whole volume.
fn place_of(number: u64) -> u64 {
    (number % NUMBERS) * STRIDE
}
