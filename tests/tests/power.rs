//! All three nodes are killed at once and started again: the volume comes back, flushed writes are
//! there, the replicas converge.

use anyhow::{Result, ensure};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::report::{human, measured};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};
use std::time::Instant;

const SIZE: u64 = 64 << 20;
const ROUNDS: u32 = 4;

fn names(cluster: &Cluster) -> Result<Vec<String>> {
    Ok(cluster.nodes()?.into_iter().map(|n| n.name).collect())
}

#[test]
fn all_nodes_killed_at_once_come_back_with_what_was_flushed() {
    with_cluster("power", ClusterOptions::sized(SIZE), |cluster| {
        // Private units only: after the loss each may hold anything since the last flush, which only
        // the account of a single writer can tell.
        let options = VerifierOptions { shared_units: 0, private_units: 1024, ..Default::default() };
        let mut verifier = Verifier::new(cluster.targets()?, options);
        for round in 0..ROUNDS {
            let load = verifier.start();
            load.wait_progress(1500, FAILOVER_LIMIT)?;
            if round % 2 == 1 {
                // One node dies first: the volume is degraded when the rest goes.
                let secondary = cluster.secondary()?;
                cluster.kill(&secondary)?;
                load.wait_progress(300, FAILOVER_LIMIT)?;
            }
            let alive: Vec<String> =
                names(cluster)?.into_iter().filter(|n| cluster.runs(n).unwrap_or(false)).collect();
            // The load goes on into the loss, so that writes are in flight.
            cluster.kill_at_once(&alive)?;
            let gone = Instant::now();
            for node in names(cluster)? {
                cluster.restart(&node)?;
            }
            load.wait_progress(100, SYNC_LIMIT)?;
            measured("power", &format!("service {} after all nodes were killed", human(gone.elapsed())));
            // Workers reconnected and replayed; what they saw then is checked by their own accounts, which
            // a process kill must not break either: the kernel still has what was written.
            load.stop()?;
            cluster.wait_in_sync(SYNC_LIMIT)?;
            verifier.verify()?;
            cluster.compare_replicas()?;
        }
        Ok(())
    });
}

#[test]
fn what_was_flushed_before_everything_died_is_there() {
    with_cluster("power_flushed", ClusterOptions::sized(SIZE), |cluster| {
        let options = VerifierOptions { shared_units: 0, private_units: 1024, ..Default::default() };
        let mut verifier = Verifier::new(cluster.targets()?, options);
        let load = verifier.start();
        load.wait_progress(2000, FAILOVER_LIMIT)?;
        load.stop()?;
        let all = names(cluster)?;
        cluster.kill_at_once(&all)?;
        for node in &all {
            ensure!(!cluster.runs(node)?, "{node} still runs");
        }
        for node in &all {
            cluster.restart(node)?;
        }
        cluster.wait_in_sync(SYNC_LIMIT)?;
        verifier.verify_flushed()?;
        cluster.compare_replicas()
    });
}

#[test]
fn a_clean_stop_and_start_keeps_everything() {
    with_cluster("clean_restart", ClusterOptions::sized(SIZE), |cluster| {
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        let load = verifier.start();
        load.wait_progress(1000, FAILOVER_LIMIT)?;
        load.stop()?;
        verifier.verify()?;
        cluster.stop()?;
        cluster.compare_replicas()?;
        cluster.start_all()?;
        verifier.verify()
    });
}
