//! What runs on a mapped file system while things fail: PostgreSQL under pgbench, with accounts of what was reported
//! committed, SQLite with one, and a writer of small synchronous writes that knows the longest of them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::ledger::{Ledger, check_counts};
use crate::postgres::Postgres;
use crate::proc::run;
use crate::wait::wait_until;

const LIMIT: Duration = Duration::from_secs(120);
/// Accounts in PostgreSQL.
const LEDGERS: usize = 2;
/// Pause between two writes of the writer.
const TICK: Duration = Duration::from_millis(5);

/// A writer of one block after the other, each synchronous.
struct Ticker {
    thread: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
    longest: Arc<Mutex<Duration>>,
    /// When the write that is under way began, in nanoseconds since `epoch`; 0: none is.
    begun: Arc<AtomicU64>,
    epoch: Instant,
}

impl Ticker {
    fn start(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
        let (stop, longest) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Duration::ZERO)));
        let (begun, epoch) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let (ends, worst, at) = (Arc::clone(&stop), Arc::clone(&longest), Arc::clone(&begun));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                let start = Instant::now();
                let since = u64::try_from((start - epoch).as_nanos()).unwrap_or(u64::MAX);
                at.store(since.max(1), Ordering::SeqCst);
                tick(&file)?;
                at.store(0, Ordering::SeqCst);
                let mut worst = worst.lock().unwrap_or_else(PoisonError::into_inner);
                *worst = start.elapsed().max(*worst);
                drop(worst);
                std::thread::sleep(TICK);
            }
            Ok(())
        });
        Ok(Self { thread: Some(thread), stop, longest, begun, epoch })
    }

    /// Waits until the write that is under way is done; the longest since the last call.
    fn longest(&self) -> Result<Duration> {
        let called = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        wait_until("the writer to go on", LIMIT, || {
            let begun = self.begun.load(Ordering::SeqCst);
            begun == 0 || begun > called || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
        })?;
        let mut longest = self.longest.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *longest))
    }

    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("a writer ends once")?;
        thread.join().map_err(|_| anyhow!("the writer panicked"))?.context("a synchronous write failed")
    }
}

fn tick(file: &File) -> Result<()> {
    file.write_all_at(&[0x5a; 4096], 0)?;
    Ok(file.sync_data()?)
}

/// Everything that runs on one file system.
pub struct Load {
    at: PathBuf,
    scratch: PathBuf,
    server: Arc<Postgres>,
    pgbench: Child,
    ledgers: Vec<Ledger>,
    sqlite: Ledger,
    ticker: Ticker,
}

impl Load {
    /// Starts it on the file system that is mounted at `at`. `scratch`: a directory elsewhere.
    ///
    /// # Errors
    /// Where a part does not start.
    pub fn start(at: &Path, scratch: &Path) -> Result<Self> {
        let data = at.join("pg");
        Postgres::init(&data)?;
        let server = Arc::new(Postgres::start(&data, &scratch.join("run"))?);
        run(server.client("pgbench").args(["-i", "-q", "-s", "2", "postgres"]), LIMIT)?.ok()?;
        server.create_accounts()?;
        server.query("CREATE EXTENSION amcheck")?;
        let pgbench = start_pgbench(&server, scratch)?;
        let ledgers = (0..LEDGERS).map(|worker| server.account(worker)).collect();
        let sqlite = start_sqlite(&at.join("ledger.db"))?;
        let ticker = Ticker::start(&at.join("ticks"))?;
        let load =
            Self { at: at.to_owned(), scratch: scratch.to_owned(), server, pgbench, ledgers, sqlite, ticker };
        load.wait_progress()?;
        Ok(load)
    }

    /// Waits until every part has got on.
    ///
    /// # Errors
    /// If one does not.
    pub fn wait_progress(&self) -> Result<()> {
        let all = || self.ledgers.iter().chain([&self.sqlite]);
        let before: Vec<u64> = all().map(Ledger::committed).collect();
        let on = || all().zip(&before).all(|(ledger, before)| ledger.committed() > *before + 1);
        wait_until("every account to go on", LIMIT, on)
    }

    /// The longest synchronous write since the last call, one that is under way included.
    ///
    /// # Errors
    /// If it does not end.
    pub fn longest_pause(&self) -> Result<Duration> {
        self.ticker.longest()
    }

    /// Ends it and looks whether everything that was reported committed is there, and every table and index sound.
    /// Returns how many transactions were reported.
    ///
    /// # Errors
    /// What is missing, or broken.
    pub fn end(mut self) -> Result<u64> {
        self.ticker.end()?;
        self.pgbench.kill().context("end pgbench")?;
        self.pgbench.wait()?;
        let mut reported = 0;
        for (worker, ledger) in self.ledgers.into_iter().enumerate() {
            let committed = ledger.end()?;
            self.server.check_account(worker, committed)?;
            reported += committed;
        }
        let committed = self.sqlite.end()?;
        check_sqlite(&self.at.join("ledger.db"), committed)?;
        reported += committed;
        check_tables(&self.server)?;
        let server = Arc::into_inner(self.server).context("an account still has the server")?;
        server.stop()?;
        let out = std::fs::read_to_string(self.scratch.join("pgbench.out"))?;
        ensure!(!out.contains("aborted"), "pgbench was told of an error: {out}");
        Ok(reported)
    }
}

fn start_pgbench(server: &Postgres, scratch: &Path) -> Result<Child> {
    let output = File::create(scratch.join("pgbench.out"))?;
    let mut command = server.client("pgbench");
    command.args(["-n", "-c", "4", "-T", "36000", "postgres"]).stdin(Stdio::null());
    command.stderr(output.try_clone()?).stdout(output).spawn().context("start pgbench")
}

fn sqlite(db: &Path, sql: &str) -> Result<String> {
    let mut command = Command::new("sqlite3");
    command.args(["-bail", "-cmd", ".timeout 60000"]).arg(db).arg(sql);
    Ok(run(&mut command, LIMIT)?.ok()?.stdout.trim().to_owned())
}

fn start_sqlite(db: &Path) -> Result<Ledger> {
    sqlite(db, "PRAGMA journal_mode=WAL; CREATE TABLE ledger(n INTEGER PRIMARY KEY);")?;
    let db = db.to_owned();
    Ok(Ledger::start(move |number| {
        sqlite(&db, &format!("PRAGMA synchronous=FULL; INSERT INTO ledger VALUES ({number});")).is_ok()
    }))
}

fn check_sqlite(db: &Path, committed: u64) -> Result<()> {
    ensure!(sqlite(db, "PRAGMA integrity_check;")? == "ok", "SQLite finds its file broken");
    let counts = sqlite(db, "SELECT count(*) || ' ' || coalesce(max(n), 0) FROM ledger;")?;
    check_counts(&counts, committed).context("the account in SQLite")
}

/// Every index agrees with its table, all pages have their checksums, and the balances add up.
///
/// # Errors
/// What does not.
pub(super) fn check_tables(server: &Postgres) -> Result<()> {
    let indexes = "SELECT bt_index_parent_check(c.oid, true) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
                   JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'btree' AND c.relpersistence = 'p'";
    server.query(indexes).context("amcheck")?;
    server.check_pgbench()
}
