//! Switching a mutation on makes the named tests fail: the unit tests of the engine, built once with the
//! feature `mutations`, run with the switch off (all must pass) and on (all of the mutation's must fail).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::table::Row;

/// A mutated test may wait for what never comes; then it counts as failed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The engine's unit tests.
pub(crate) struct TestBinary(PathBuf);

/// What the named tests of a mutation said.
pub(crate) struct Verdict {
    pub(crate) good: bool,
    pub(crate) text: String,
}

impl Verdict {
    pub(crate) fn left_out() -> Self {
        Self { good: true, text: "(left out)".into() }
    }
}

impl TestBinary {
    /// Builds it.
    pub(crate) fn build() -> Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args([
                "test",
                "--locked",
                "-p",
                "blkrepl-engine",
                "--features",
                "mutations",
                "--lib",
                "--no-run",
            ])
            .args(["--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo to build the unit tests")?;
        if !output.status.success() {
            bail!("the unit tests do not build");
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let artifact = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let executable = artifact.filter_map(|v| v["executable"].as_str().map(PathBuf::from)).next_back();
        executable.map(Self).context("cargo names no test binary")
    }

    /// All named tests pass without a mutation.
    pub(crate) fn control(&self, rows: &[&Row]) -> Result<bool> {
        let names: BTreeSet<&str> = rows.iter().flat_map(|r| r.tests.iter().copied()).collect();
        let names: Vec<&str> = names.into_iter().collect();
        let (passed, _) = self.run("", &names)?;
        println!("control run: {passed} of {} named tests pass without a mutation", names.len());
        Ok(passed == names.len())
    }

    /// All named tests of the row fail under its mutation.
    pub(crate) fn fails_under(&self, row: &Row) -> Result<Verdict> {
        let (passed, finished) = self.run(row.mutation.name(), row.tests)?;
        let good = passed == 0 && !row.tests.is_empty();
        let short: Vec<&str> = row.tests.iter().map(|t| t.rsplit("::").next().unwrap_or(t)).collect();
        let mut text = short.join(", ");
        if !good {
            text = format!("{passed} OF {} DO NOT FAIL: {text}", row.tests.len());
        } else if !finished {
            text += " (ended after a minute)";
        }
        Ok(Verdict { good, text })
    }

    /// Runs tests; how many passed, and whether they came to an end.
    fn run(&self, mutation: &str, names: &[&str]) -> Result<(usize, bool)> {
        let mut child = Command::new(&self.0)
            .arg("--exact")
            .args(names.iter().map(|name| path(name)))
            .env("BLKREPL_MUTATION", mutation)
            .env("RUST_BACKTRACE", "0")
            .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run the unit tests")?;
        let stdout = child.stdout.take().context("the tests' output is piped")?;
        let reader = std::thread::spawn(move || std::io::read_to_string(stdout));
        let finished = wait(&mut child)?;
        let text = match reader.join() {
            Ok(text) => text.context("cannot read what the tests say")?,
            Err(_) => bail!("the reader of the tests' output panicked"),
        };
        let passed =
            text.lines().filter(|line| line.starts_with("test ") && line.ends_with("... ok")).count();
        Ok((passed, finished))
    }
}

/// The path of a test as the test binary knows it.
fn path(name: &str) -> String {
    if name.starts_with("scenarios") { format!("replica::testing::{name}") } else { name.into() }
}

/// Waits for the end, or brings it about.
fn wait(child: &mut Child) -> Result<bool> {
    let end = Instant::now() + TIMEOUT;
    while Instant::now() < end {
        if child.try_wait().context("cannot wait for the tests")?.is_some() {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().context("cannot end the tests")?;
    child.wait().context("cannot wait for the tests")?;
    Ok(false)
}
