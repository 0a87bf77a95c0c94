//! The frame around one process test: a cluster for the body, evidence if the body fails, and a clean
//! stop that must work if it does not.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use anyhow::Result;

use crate::cluster::{Cluster, ClusterOptions};
use crate::evidence;
use crate::report::{human, step};

/// Starts a cluster, runs `body` with it, stops it cleanly.
///
/// # Panics
/// If anything fails, after saving evidence whose place the text names.
pub fn with_cluster(name: &str, options: ClusterOptions, body: impl FnOnce(&mut Cluster) -> Result<()>) {
    scenario(
        name,
        || Cluster::prepare(options),
        |cluster| {
            cluster.start_all()?;
            body(cluster)
        },
    );
}

/// Runs `body` with what `make` made; the body starts the cluster itself, or not at all.
///
/// # Panics
/// If anything fails, after saving evidence whose place the text names.
pub fn scenario(
    name: &str,
    make: impl FnOnce() -> Result<Cluster>,
    body: impl FnOnce(&mut Cluster) -> Result<()>,
) {
    let started = Instant::now();
    let mut cluster = match make() {
        Ok(cluster) => cluster,
        Err(reason) => fail(name, None, &told(&reason)),
    };
    match catch_unwind(AssertUnwindSafe(|| body(&mut cluster))) {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => fail(name, Some(&cluster), &told(&reason)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            let _ = evidence::keep(name, Some(&cluster), &text.unwrap_or_default());
            resume_unwind(panic);
        }
    }
    if let Err(reason) = cluster.stop() {
        fail(name, Some(&cluster), &told(&reason));
    }
    step(name, &format!("passed in {}", human(started.elapsed())));
}

/// The error and what caused it, a line each, without the backtrace that anyhow would add.
fn told(reason: &anyhow::Error) -> String {
    let lines: Vec<String> = reason.chain().map(ToString::to_string).collect();
    lines.join("\n  because: ")
}

/// Ends a test that failed, after saving evidence whose place the text names.
///
/// # Panics
/// Always.
pub fn fail(name: &str, cluster: Option<&Cluster>, text: &str) -> ! {
    match evidence::keep(name, cluster, text) {
        Ok(dir) => panic!("{name}: {text}\nevidence: {}", dir.display()),
        Err(reason) => panic!("{name}: {text}\nno evidence kept: {reason:#}"),
    }
}
