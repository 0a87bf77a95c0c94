//! Where the `blkrepl` under test is: `BLKREPL_BIN` if set, else the release build of this workspace,
//! which is brought up to date with cargo once per test process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::proc;

/// Longest time that a release build from nothing may take.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);

/// The workspace's top directory.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The target directory that this very executable was built into.
///
/// # Errors
/// If the executable does not lie in one (`target/PROFILE/deps/NAME`, or `target/PROFILE/NAME`).
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("find the test executable")?;
    let in_deps = exe.parent().is_some_and(|dir| dir.ends_with("deps"));
    exe.ancestors()
        .nth(if in_deps { 3 } else { 2 })
        .map(Path::to_path_buf)
        .ok_or_else(|| anyhow!("{} has no target directory", exe.display()))
}

/// The binary under test.
///
/// # Errors
/// If `BLKREPL_BIN` names no file, or the build fails.
pub fn blkrepl() -> Result<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOUND.get_or_init(|| find().map_err(|e| format!("{e:#}"))) {
        Ok(path) => Ok(path),
        Err(reason) => bail!("no blkrepl binary: {reason}"),
    }
}

fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BLKREPL_BIN") {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("BLKREPL_BIN names {}, which is no file; build it or unset the variable", path.display());
        }
        return path.canonicalize().context("resolve BLKREPL_BIN");
    }
    let target = target_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--release", "--package", "blkrepl", "--target-dir"])
        .arg(&target)
        .current_dir(workspace());
    proc::run(&mut build, BUILD_LIMIT)?.ok()?;
    Ok(target.join("release/blkrepl"))
}
