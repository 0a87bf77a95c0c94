//! What is kept when a test fails: logs, configs, metadata, every node's status and events, under
//! `target/evidence/NAME`. Data files are not copied (they are large); their hashes of differing
//! blocks are in the error text.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::binary::target_dir;
use crate::cluster::Cluster;

/// Files above this size are only listed.
const COPY_BYTES_MAX: u64 = 32 << 20;

/// Saves what a reader needs to understand a failure; the directory.
///
/// # Errors
/// Where the target directory cannot be written.
pub fn keep(name: &str, cluster: Option<&Cluster>, error: &str) -> Result<PathBuf> {
    let dir = cleared(name)?;
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    fs::write(dir.join("error.txt"), error).context("write the error")?;
    let Some(cluster) = cluster else {
        return Ok(dir);
    };
    let mut listing = String::new();
    copy_tree(cluster.dir(), &dir.join("cluster"), &mut listing)?;
    fs::write(dir.join("files.txt"), listing).context("write the list of files")?;
    for node in cluster.nodes().unwrap_or_default() {
        for what in ["status", "events"] {
            let text = match cluster.cli(&node.name, &[what, "--json"]) {
                Ok(done) => done.text(),
                Err(reason) => format!("{reason:#}"),
            };
            fs::write(dir.join(format!("{}.{what}.json", node.name)), text)
                .context("write what a node says")?;
        }
    }
    Ok(dir)
}

/// Puts what was kept elsewhere, in a machine, beside the rest; the directory.
///
/// # Errors
/// Where either directory fails.
pub fn keep_tree(name: &str, from: &Path) -> Result<PathBuf> {
    let dir = cleared(name)?;
    let mut listing = String::new();
    copy_tree(from, &dir, &mut listing)?;
    Ok(dir)
}

/// The directory of that name, without what an earlier failure left in it.
fn cleared(name: &str) -> Result<PathBuf> {
    let dir = target_dir()?.join("evidence").join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("clear {}", dir.display()))?;
    }
    Ok(dir)
}

fn copy_tree(from: &Path, to: &Path, listing: &mut String) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry.context("read a directory entry")?;
        // A file may vanish while the cluster still runs.
        let Ok(meta) = entry.metadata() else { continue };
        listing.push_str(&format!("{:>12} {}\n", meta.len(), entry.path().display()));
        let target = to.join(entry.file_name());
        if meta.is_dir() {
            copy_tree(&entry.path(), &target, listing)?;
        } else if meta.is_file() && meta.len() <= COPY_BYTES_MAX && !is_data(&entry.path()) {
            let _ = fs::copy(entry.path(), target);
        }
    }
    Ok(())
}

fn is_data(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "data")
}
