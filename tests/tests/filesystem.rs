//! A file system with databases on the volume: nbdfuse, loop, ext4; SQLite and PostgreSQL under load; the
//! primary is killed; the volume is mounted from the new primary. Journal replay, e2fsck clean, and
//! every transaction that was reported committed is there. And what files gave up takes no space on either replica,
//! with ext4 and XFS.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::ledger::Ledger;
use blkrepl_tests::mount::{self, FileSystem, Mount};
use blkrepl_tests::postgres::{self, Postgres};
use blkrepl_tests::proc::{missing, run, run_ok};
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::wait::{wait_for, wait_until};
use blkrepl_tests::{Cluster, ClusterOptions, files, with_cluster};

const SIZE: u64 = 768 << 20;
const LIMIT: Duration = Duration::from_secs(120);
/// How long the load runs before the primary is killed.
const LOAD: Duration = Duration::from_secs(12);

/// The primary's NBD address.
fn primary_address(cluster: &Cluster) -> Result<String> {
    Ok(cluster.node(&cluster.wait_primary(FAILOVER_LIMIT)?)?.unix()?.to_owned())
}

/// Kills the primary and returns the address of the new one.
fn fail_over(name: &str, cluster: &mut Cluster) -> Result<String> {
    let victim = cluster.wait_primary(FAILOVER_LIMIT)?;
    let killed = Instant::now();
    cluster.kill(&victim)?;
    let address = primary_address(cluster)?;
    measured(name, &format!("{victim} killed; another node serves after {}", human(killed.elapsed())));
    cluster.restart(&victim)?;
    Ok(address)
}

/// A scratch directory that user postgres may walk through.
fn open_dir(cluster: &Cluster, name: &str) -> Result<PathBuf> {
    let path = cluster.dir().join(name);
    std::fs::create_dir_all(&path)?;
    for dir in [cluster.dir(), &path] {
        run_ok("chmod", &["755".as_ref(), dir.as_os_str()], LIMIT)?;
    }
    Ok(path)
}

/// Attaches the volume at `address` and mounts what is on it, after a clean check.
fn mount_checked(scratch: &Path, address: &str, at: &Path) -> Result<Mount> {
    let mut disk = Mount::attach(scratch, address)?;
    let check = disk.check().context("e2fsck after the failover")?;
    step("e2fsck", check.stdout.lines().last().unwrap_or("clean"));
    disk.mount(at)?;
    Ok(disk)
}

#[test]
fn sqlite_survives_the_primary() {
    let name = "sqlite";
    if let Some(reason) = mount::unavailable().or_else(|| missing(&["sqlite3"])) {
        skipped(name, &reason);
        return;
    }
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        let scratch = open_dir(cluster, "fs")?;
        let at = scratch.join("mnt");
        let mut disk = Mount::attach(&scratch, &primary_address(cluster)?)?;
        disk.format()?;
        disk.mount(&at)?;
        let database = at.join("ledger.db");
        let schema = "PRAGMA journal_mode=WAL; CREATE TABLE ledger(n INTEGER PRIMARY KEY, filler TEXT);";
        run(Command::new("sqlite3").arg(&database).arg(schema), LIMIT)?.ok()?;
        let path = database.clone();
        let ledger = Ledger::start(move |number| {
            let sql = format!(
                "PRAGMA synchronous=FULL; INSERT INTO ledger VALUES ({number}, hex(randomblob(900))); SELECT 'done';"
            );
            let done = run(Command::new("sqlite3").arg("-bail").arg(&path).arg(sql), LIMIT);
            done.is_ok_and(|done| done.code() == 0 && done.stdout.contains("done"))
        });
        wait_until("the first commits", LIMIT, || ledger.committed() >= 50)?;
        std::thread::sleep(LOAD / 3);
        let address = fail_over(name, cluster)?;
        let committed = ledger.end()?;
        disk.abandon();

        let disk = mount_checked(&scratch, &address, &at)?;
        let sql = "PRAGMA integrity_check; SELECT count(*), min(n), max(n) FROM ledger;";
        let found = run(Command::new("sqlite3").arg(&database).arg(sql), LIMIT)?.ok()?.stdout;
        let mut lines = found.lines();
        ensure!(lines.next() == Some("ok"), "integrity check: {found}");
        let numbers: Vec<u64> =
            lines.next().unwrap_or_default().split('|').filter_map(|t| t.parse().ok()).collect();
        let [count, 1, last] = numbers[..] else {
            return Err(anyhow!("ledger: {found}"));
        };
        measured(name, &format!("{committed} transactions reported committed, {last} there"));
        ensure!(
            last >= committed && count == last,
            "{committed} reported committed; {count} rows up to {last}"
        );
        disk.detach()?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

/// pgbench in the background, each client's finished transactions in a log of its own.
fn start_pgbench(server: &Postgres, logs: &Path) -> Result<Child> {
    let mut command = server.client("pgbench");
    command.current_dir(logs).args([
        "-n",
        "-c",
        "4",
        "-j",
        "2",
        "-T",
        "120",
        "-l",
        "--log-prefix=pgb",
        "postgres",
    ]);
    let output = std::fs::File::create(logs.join("pgbench.out"))?;
    command.stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output).spawn().context("start pgbench")
}

/// Transactions that pgbench saw finish.
fn pgbench_finished(logs: &Path) -> Result<u64> {
    let mut finished = 0;
    for entry in std::fs::read_dir(logs)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pgb.") {
            finished += std::fs::read_to_string(entry.path())?.lines().count() as u64;
        }
    }
    Ok(finished)
}

fn wait_child(what: &str, child: &mut Child) -> Result<()> {
    let waited = wait_until(what, LIMIT, || matches!(child.try_wait(), Ok(Some(_)) | Err(_)));
    if waited.is_err() {
        child.kill()?;
        child.wait()?;
    }
    waited
}

#[test]
fn postgresql_survives_the_primary_under_pgbench() {
    let name = "postgresql";
    let why = mount::unavailable().or_else(postgres::unavailable);
    if let Some(reason) = why {
        skipped(name, &reason);
        return;
    }
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        let scratch = open_dir(cluster, "fs")?;
        let (at, logs) = (scratch.join("mnt"), scratch.join("logs"));
        std::fs::create_dir_all(&logs)?;
        let mut disk = Mount::attach(&scratch, &primary_address(cluster)?)?;
        disk.format()?;
        disk.mount(&at)?;
        let data = at.join("pg");
        Postgres::init(&data)?;
        let server = Arc::new(Postgres::start(&data, &scratch.join("run"))?);
        run(server.client("pgbench").args(["-i", "-q", "-s", "4", "postgres"]), LIMIT)?.ok()?;
        server.create_accounts()?;

        let mut pgbench = start_pgbench(&server, &logs)?;
        let ledgers: Vec<Ledger> = (0..2).map(|worker| server.account(worker)).collect();
        std::thread::sleep(LOAD);
        wait_until("the first commits", LIMIT, || ledgers.iter().all(|l| l.committed() >= 10))?;
        let address = fail_over(name, cluster)?;

        // The old device answers nothing but errors now; the server cannot go on.
        let committed: Vec<u64> = ledgers.into_iter().map(Ledger::end).collect::<Result<_>>()?;
        Arc::into_inner(server).ok_or_else(|| anyhow!("a ledger still holds the server"))?.abandon();
        wait_child("pgbench to end", &mut pgbench)?;
        let finished = pgbench_finished(&logs)?;
        disk.abandon();

        let disk = mount_checked(&scratch, &address, &at)?;
        let started = Instant::now();
        let server = Postgres::start(&data, &scratch.join("run"))?;
        step(name, &format!("recovered in {}", human(started.elapsed())));
        let rows: u64 = server.query("SELECT count(*) FROM pgbench_history")?.parse()?;
        measured(name, &format!("{finished} pgbench transactions reported finished, {rows} there"));
        ensure!(rows >= finished, "{finished} pgbench transactions were reported finished, {rows} are there");
        ensure!(finished >= 100, "only {finished} pgbench transactions: no load worth the name");
        for (worker, committed) in committed.into_iter().enumerate() {
            let found = server.check_account(worker, committed)?;
            measured(
                name,
                &format!("ledger {worker}: {committed} reported committed; count and last: {found}"),
            );
        }
        server.check_pgbench()?;
        server.stop()?;
        disk.detach()?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

/// Writes files, deletes most of them, and gives up what they took.
fn trims(kind: FileSystem) {
    const FILES: u64 = 16;
    const KEPT: u64 = 4;
    const LEN: u64 = 10 << 20;
    let name = format!("fstrim {}", kind.name());
    if let Some(reason) = kind.unavailable().or_else(|| missing(&["fstrim", "fsfreeze"])) {
        return skipped(&name, &reason);
    }
    with_cluster(&format!("fstrim_{}", kind.name()), ClusterOptions::sized(SIZE), |cluster| {
        let scratch = open_dir(cluster, "fs")?;
        let at = scratch.join("mnt");
        let mut disk = Mount::attach(&scratch, &primary_address(cluster)?)?.of(kind);
        disk.format()?;
        disk.mount(&at)?;
        let file = |number: u64| at.join(format!("file{number}"));
        (0..FILES).try_for_each(|number| files::make_random(&file(number), LEN, number))?;
        disk.trim()?;
        let full = cluster.space()?;
        ensure!(full.iter().all(|taken| *taken >= FILES * LEN), "{full:?} bytes for {FILES} files of {LEN}");

        (KEPT..FILES).try_for_each(|number| std::fs::remove_file(file(number)))?;
        disk.trim()?;
        // What the file system has for itself may grow a little.
        let given_up = (FILES - KEPT) * LEN - (2 << 20);
        // XFS discards in the background (Linux 6.6 and later); fstrim does not wait for that.
        let left = wait_for("what was deleted takes no space", LIMIT, || {
            let left = cluster.space()?;
            let less = left.iter().zip(&full).all(|(left, full)| left + given_up <= *full);
            ensure!(less, "{left:?} bytes of {full:?} left, {given_up} given up");
            Ok(left)
        })?;
        measured(&name, &format!("{full:?} bytes on the replicas with {FILES} files, {left:?} with {KEPT}"));

        disk.unmount()?;
        disk.check()?;
        disk.mount(&at)?;
        let expected = cluster.dir().join("expected");
        for number in 0..KEPT {
            files::make_random(&expected, LEN, number)?;
            files::compare(&expected, &file(number), LEN)?;
        }
        disk.detach()?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

#[test]
fn what_is_deleted_from_ext4_takes_no_space_on_either_replica_after_fstrim() {
    trims(FileSystem::Ext4);
}

#[test]
fn what_is_deleted_from_xfs_takes_no_space_on_either_replica_after_fstrim() {
    trims(FileSystem::Xfs);
}
