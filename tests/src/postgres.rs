//! A PostgreSQL server on a directory, run as user `postgres` (it refuses root), reached over a unix
//! socket only, with page checksums on; and the account of what it reported committed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;

use crate::ledger::{self, Ledger};
use crate::proc::{self, Finished, Proc, run};
use crate::wait::wait_for;

/// Longest time for initdb, a start with recovery, or a stop.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Why no PostgreSQL can be run here; none if it can.
#[must_use]
pub fn unavailable() -> Option<String> {
    if !proc::is_root() {
        return Some("running PostgreSQL as user postgres needs root".to_owned());
    }
    if let Some(reason) = proc::missing(&["setpriv", "chown"]) {
        return Some(reason);
    }
    if bin_dir().is_none() {
        return Some("no PostgreSQL server under /usr/lib/postgresql".to_owned());
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let known = passwd.lines().any(|line| line.starts_with("postgres:"));
    (!known).then(|| "there is no user postgres".to_owned())
}

/// Directory of the newest installed server's programs.
fn bin_dir() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let dirs = versions.flatten().map(|entry| entry.path().join("bin"));
    dirs.filter(|dir| dir.join("initdb").is_file()).max_by_key(|dir| {
        let version = dir.parent().and_then(Path::file_name).map(|v| v.to_string_lossy().into_owned());
        version.and_then(|v| v.parse::<u32>().ok()).unwrap_or(0)
    })
}

/// A running server.
pub struct Postgres {
    bin: PathBuf,
    sockets: PathBuf,
    server: Proc,
}

impl Postgres {
    /// Makes a database cluster in `data` (its parent must exist).
    ///
    /// # Errors
    /// Where initdb fails.
    pub fn init(data: &Path) -> Result<()> {
        fs::create_dir_all(data).with_context(|| format!("make {}", data.display()))?;
        give_away(data)?;
        let bin = bin_dir().ok_or_else(|| anyhow!("no PostgreSQL server"))?;
        let mut command = as_postgres(&bin.join("initdb"));
        command.args([
            "--auth=trust",
            "--data-checksums",
            "--no-instructions",
            "--encoding=UTF8",
            "--no-locale",
            "-D",
        ]);
        run(command.arg(data), STEP_LIMIT)?.ok()?;
        Ok(())
    }

    /// Starts the server on `data` and waits until it accepts connections, which includes its crash
    /// recovery. `sockets` is a directory outside the volume.
    ///
    /// # Errors
    /// If it ends or does not accept in time, with its log.
    pub fn start(data: &Path, sockets: &Path) -> Result<Self> {
        fs::create_dir_all(sockets).with_context(|| format!("make {}", sockets.display()))?;
        give_away(sockets)?;
        let bin = bin_dir().ok_or_else(|| anyhow!("no PostgreSQL server"))?;
        let mut command = as_postgres(&bin.join("postgres"));
        command.arg("-D").arg(data).arg("-k").arg(sockets);
        // Frequent checkpoints, so that a short test sees data pages written back, not only the log.
        for setting in
            ["listen_addresses=", "checkpoint_timeout=30s", "max_wal_size=64MB", "shared_buffers=32MB"]
        {
            command.arg("-c").arg(setting);
        }
        // setpriv executes the server in its own place, so the child's pid is the server's.
        let mut server = Proc::spawn("postgres", &mut command, &sockets.join("server.log"))?;
        wait_for("PostgreSQL to accept connections", STEP_LIMIT, || {
            if let Some(status) = server.exited()? {
                return Ok(Err(anyhow!("postgres ended with {status}: {}", proc::tail(&server.output()))));
            }
            let mut ready = Command::new(bin.join("pg_isready"));
            run(ready.arg("-q").arg("-h").arg(sockets), STEP_LIMIT)?.ok()?;
            Ok(Ok(()))
        })??;
        Ok(Self { bin, sockets: sockets.to_path_buf(), server })
    }

    /// A client program of this server's version, told where the server is.
    #[must_use]
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.arg("-h").arg(&self.sockets).args(["-U", "postgres"]);
        command
    }

    /// Runs SQL; exit code 0 means that it is committed.
    ///
    /// # Errors
    /// If psql cannot be run or hangs.
    pub fn sql(&self, text: &str) -> Result<Finished> {
        run(
            self.client("psql").args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", text]),
            STEP_LIMIT,
        )
    }

    /// Runs SQL that must work; its output.
    ///
    /// # Errors
    /// Where it fails.
    pub fn query(&self, text: &str) -> Result<String> {
        Ok(self.sql(text)?.ok()?.stdout.trim().to_owned())
    }

    /// Makes the table of accounts, see [`account`](Self::account).
    ///
    /// # Errors
    /// Where it fails.
    pub fn create_accounts(&self) -> Result<()> {
        self.query("CREATE TABLE ledger(worker int, n bigint, PRIMARY KEY (worker, n))").map(drop)
    }

    /// Keeps an account, each of its numbers in a transaction.
    #[must_use]
    pub fn account(self: &Arc<Self>, worker: usize) -> Ledger {
        let server = Arc::clone(self);
        Ledger::start(move |number| {
            let done = server.sql(&format!("INSERT INTO ledger VALUES ({worker}, {number})"));
            done.is_ok_and(|done| done.code() == 0)
        })
    }

    /// The numbers of an account, from 1 on without a gap, reach at least to what was reported committed. Returns how
    /// many there are, and the last.
    ///
    /// # Errors
    /// What is there instead.
    pub fn check_account(&self, worker: usize, committed: u64) -> Result<String> {
        let sql =
            format!("SELECT count(*) || ' ' || coalesce(max(n), 0) FROM ledger WHERE worker = {worker}");
        let found = self.query(&sql)?;
        ledger::check_counts(&found, committed).with_context(|| format!("account {worker} of PostgreSQL"))?;
        Ok(found)
    }

    /// The balances of pgbench add up to its history, and every table and index page can be read; page checksums are
    /// on.
    ///
    /// # Errors
    /// What does not, or cannot.
    pub fn check_pgbench(&self) -> Result<()> {
        let money = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = \
                     (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
        ensure!(self.query(money)? == "t", "the balances do not add up to the history");
        run(self.client("pg_dumpall").args(["--no-sync", "-f", "/dev/null"]), STEP_LIMIT)?.ok().map(drop)
    }

    /// Where its sockets and its log are.
    #[must_use]
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// Stops it cleanly.
    ///
    /// # Errors
    /// If it does not end with code 0.
    pub fn stop(mut self) -> Result<()> {
        let status = self.server.end(Signal::INT, STEP_LIMIT)?;
        if !status.success() {
            bail!("postgres ended with {status}: {}", proc::tail(&self.server.output()));
        }
        Ok(())
    }

    /// Ends it at once, as if the machine had failed; its children follow by themselves.
    pub fn abandon(mut self) {
        // SIGQUIT: the server ends its own children without touching the disk.
        let _ = self.server.end(Signal::QUIT, Duration::from_secs(20));
    }
}

fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    // initdb and the server look at their working directory; root's home is closed to them.
    command.current_dir("/");
    command
}

fn give_away(path: &Path) -> Result<()> {
    proc::run_ok("chown", &["-R".as_ref(), "postgres:postgres".as_ref(), path.as_os_str()], STEP_LIMIT)?;
    Ok(())
}
