//! A cut of the power of the whole machine, on which both data nodes, the witness and the client run: what a database
//! reported committed, it had flushed, so it is there afterwards.
//!
//! [`load`] runs until the machine is gone and says outside what was reported; [`check`] runs after the next boot.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::device::check_kernel_log;
use super::load::check_tables;
use super::{Mapped, MappedFs};
use crate::binary::blkrepl;
use crate::mount::FileSystem;
use crate::postgres::Postgres;
use crate::proc::{Proc, run};
use crate::wait::wait_until;

const LIMIT: Duration = Duration::from_secs(120);
const SIZE: &str = "256MiB";
const AT: &str = "/mnt/mapped";
/// How often it is said outside what was reported.
const TELL: Duration = Duration::from_millis(50);

/// The cluster, in a directory that outlives a cut.
fn cluster(dir: &Path) -> Result<(Proc, Mapped)> {
    fs::create_dir_all(dir)?;
    let mut dev = Command::new(blkrepl()?);
    dev.args(["dev", "--size", SIZE, "--dir"]).arg(dir.join("nodes"));
    let dev = Proc::spawn("dev", &mut dev, &dir.join("dev.log"))?;
    wait_until("the cluster to serve", LIMIT, || dev.output().contains("serves vol0"))
        .with_context(|| format!("the cluster said: {}", dev.output()))?;
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
    loop {
        writeln!(out, "REPORTED {}", ledger.committed())?;
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
