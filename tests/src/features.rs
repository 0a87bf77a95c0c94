//! What `nbdinfo --json` says of NBD servers, set side by side: blkrepl, nbdkit's file plugin, qemu-nbd, each with
//! an export of the same size. The table is that of `docs/nbd.md`; a test compares our column with what is there.
//!
//! Only what `nbdinfo` says is in it: nothing is added by hand.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::proc::{Proc, run_ok};
use crate::wait::wait_until;

const LIMIT: Duration = Duration::from_secs(30);
/// What is said of one export only, not of the server.
const OWN: [&str; 8] = [
    "export-name",
    "uri",
    "export-size",
    "export-size-str",
    "content",
    "description",
    "canonical-name",
    "is_rotational",
];

/// Names of features, with what is said of each.
pub type Features = BTreeMap<String, String>;

/// What `nbdinfo` says of the export at `uri`.
///
/// # Errors
/// Where it fails, or says something else than one export.
pub fn features(uri: &str) -> Result<Features> {
    let text = run_ok("nbdinfo", &["--json", uri], LIMIT)?.stdout;
    let info: Value = serde_json::from_str(&text).context("parse nbdinfo's JSON")?;
    let exports = info["exports"].as_array().context("a list of exports")?;
    ensure!(exports.len() == 1, "{} exports", exports.len());
    let server = info.as_object().into_iter().flatten().filter(|(name, _)| *name != "exports");
    let export = exports[0].as_object().into_iter().flatten();
    let all = server.chain(export).filter(|(name, _)| !OWN.contains(&name.as_str()));
    Ok(all.map(|(name, value)| (name.clone(), shown(value))).collect())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// A server of somebody else with a file, ended when dropped.
pub struct OtherServer {
    /// Its name and version.
    pub name: String,
    /// Where its export is.
    pub uri: String,
    _process: Proc,
}

impl OtherServer {
    /// nbdkit with its file plugin.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn nbdkit(scratch: &Path, size: u64) -> Result<Self> {
        let socket = scratch.join("nbdkit.sock");
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(make_file(scratch, size)?);
        Self::start("nbdkit", ", file plugin", command, &socket)
    }

    /// qemu-nbd, for several clients.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn qemu_nbd(scratch: &Path, size: u64) -> Result<Self> {
        let socket = scratch.join("qemu-nbd.sock");
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--discard=unmap", "--shared=8", "--persistent", "--socket"]);
        command.arg(&socket).arg(make_file(scratch, size)?);
        Self::start("qemu-nbd", "", command, &socket)
    }

    fn start(program: &str, more: &str, mut command: Command, socket: &Path) -> Result<Self> {
        let version = run_ok(program, &["--version"], LIMIT)?.stdout;
        // The first word that begins with a digit.
        let version = version.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        let name = format!("{program} {}{more}", version.unwrap_or("of unknown version"));
        let mut process = Proc::spawn(program, &mut command, &socket.with_extension("log"))?;
        let mut ended = false;
        wait_until(&format!("the socket of {program}"), LIMIT, || {
            ended = !matches!(process.exited(), Ok(None));
            ended || UnixStream::connect(socket).is_ok()
        })?;
        ensure!(!ended, "{program} ended at once: {}", process.output());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        Ok(Self { name, uri, _process: process })
    }
}

fn make_file(scratch: &Path, size: u64) -> Result<std::path::PathBuf> {
    let path = scratch.join("file");
    std::fs::File::create(&path)?.set_len(size).with_context(|| format!("size {}", path.display()))?;
    Ok(path)
}

/// The table in Markdown, a row for each feature that any of the servers is said to have or not.
#[must_use]
pub fn table(servers: &[(String, Features)]) -> String {
    let names: std::collections::BTreeSet<&String> = servers.iter().flat_map(|(_, f)| f.keys()).collect();
    let heads: Vec<&str> = servers.iter().map(|(name, _)| name.as_str()).collect();
    let mut text =
        format!("| `nbdinfo --json` | {} |\n|---|{}\n", heads.join(" | "), "---|".repeat(heads.len()));
    for name in names {
        let cells = servers.iter().map(|(_, features)| features.get(name).map_or("not said", String::as_str));
        text.push_str(&format!("| `{name}` | {} |\n", cells.collect::<Vec<_>>().join(" | ")));
    }
    text
}

/// Features in the first column of a table that [`table`] made, wherever it stands in a text.
#[must_use]
pub fn first_column(document: &str) -> Features {
    let rows = document.lines().skip_while(|line| !line.starts_with("| `nbdinfo --json` |")).skip(2);
    rows.map_while(|line| line.strip_prefix("| `"))
        .filter_map(|row| {
            let (name, cells) = row.split_once("` | ")?;
            Some((name.to_owned(), cells.split(" | ").next()?.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_was_made() {
        let of = |pairs: &[(&str, &str)]| -> Features {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let (ours, theirs) = (of(&[("a", "yes"), ("b", "x, y")]), of(&[("a", "no"), ("c", "1")]));
        let text = table(&[("ours".to_owned(), ours), ("theirs 1.0".to_owned(), theirs)]);
        assert_eq!(text.lines().nth(3), Some("| `b` | x, y | not said |"));
        let read = first_column(&format!("before\n\n{text}\nafter\n"));
        assert_eq!(read, of(&[("a", "yes"), ("b", "x, y"), ("c", "not said")]));
    }
}
