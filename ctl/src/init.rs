//! `blkrepl init` and `blkrepl cluster recover`: what is done to a node's store while the node is stopped.
//!
//! Making the store is an explicit step, because a node that finds its store missing must never quietly
//! make a new one: it would vote a second time [R13]. A forced recovery makes this node the sole voter of
//! a new cluster and starts a new lineage for every volume [R17, R19].

use anyhow::{Context, bail};
use blkrepl_engine::control::{self, ControlError, StoreId};
use blkrepl_engine::durable;
use serde::Serialize;

use crate::config::NodeConfig;
use crate::node_dir::{DirLock, PID_FILE};

/// Makes the store of a node; refuses if there is one. Gives its id.
///
/// # Errors
/// There is one, the node runs, or the directory cannot be used.
pub fn create(config: &NodeConfig) -> anyhow::Result<String> {
    durable::create_dir_all(&config.dir)
        .with_context(|| format!("cannot create {}", config.dir.display()))?;
    let lock = DirLock::take(&config.dir, PID_FILE, "init")?;
    let store: StoreId = control::init(&config.dir, config.id)?;
    drop(lock);
    Ok(store.to_string())
}

/// Makes the store if the directory holds none (for `dev`, whose directory is its own).
///
/// # Errors
/// As [`create`].
pub fn ensure(config: &NodeConfig) -> anyhow::Result<()> {
    match create(config) {
        Err(error) if !matches!(error.downcast_ref(), Some(ControlError::Exists(_))) => Err(error),
        _ => Ok(()),
    }
}

/// What a recovery did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// The new cluster's id.
    pub cluster: String,
    /// Volumes of the new cluster.
    pub volumes: Vec<String>,
    /// Those of them whose replica here was not in sync: only a forced promotion makes it primary.
    pub not_in_sync: Vec<String>,
    /// Volumes without a replica here, which the new cluster does not know.
    pub dropped: Vec<String>,
    /// Nodes that belonged to the old cluster and are refused from now on.
    pub nodes_lost: Vec<String>,
    /// For people.
    pub text: String,
}

/// Makes this node the sole voter of a new cluster.
///
/// # Errors
/// `force` is not given, the node runs, or its store cannot be used.
pub fn recover(config: &NodeConfig, force: bool) -> anyhow::Result<Recovered> {
    if !force {
        bail!(
            "this makes {} the sole voter of a new cluster and starts new lineages: what only other nodes \
            hold is given up, and they are refused from then on. If they are gone for good, add --force",
            config.name
        );
    }
    let lock = DirLock::take(&config.dir, PID_FILE, "recover")?;
    let report = control::recover_force(&config.dir, config.id)?;
    drop(lock);
    let mut text = format!(
        "{} is the sole voter of the new cluster {}; start it with: blkrepl serve --config {}",
        config.name,
        report.cluster,
        config.file.display()
    );
    let volumes: Vec<String> = report.volumes.iter().map(|v| v.name.clone()).collect();
    let not_in_sync: Vec<String> =
        report.volumes.iter().filter(|v| !v.was_in_sync).map(|v| v.name.clone()).collect();
    let dropped: Vec<String> = report.dropped.into_iter().map(|(_, name)| name).collect();
    let nodes_lost: Vec<String> = report.nodes_lost.into_iter().map(|(_, name)| name).collect();
    for (names, what) in [
        (
            &not_in_sync,
            "not in sync here: what it lacks is lost, and `blkrepl promote VOL --force` makes it primary",
        ),
        (&dropped, "without a replica here, and forgotten"),
        (&nodes_lost, "no longer of this cluster, and refused"),
    ] {
        if !names.is_empty() {
            text.push_str(&format!("\n  {}: {what}", names.join(", ")));
        }
    }
    Ok(Recovered { cluster: report.cluster.to_string(), volumes, not_in_sync, dropped, nodes_lost, text })
}
