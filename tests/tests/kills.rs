//! kill -9 of the primary, of the secondary, of the witness, each under a verifying write load: no
//! acknowledged write lost, no torn block, replicas byte-identical after resync, the former primary
//! stays secondary. Rounds from `ROUNDS` (10 by default; `tests/run --rounds 100`).
//!
//! The lease is short, so that many rounds fit into a run; the default timing is measured by the demo
//! and by `roles.rs`.

use std::time::Instant;

use anyhow::{Result, ensure};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::report::{human, measured, step};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

const SIZE: u64 = 64 << 20;

fn rounds() -> u32 {
    std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// Kills the node that `victim` picks, in the middle of a load, `ROUNDS` times.
fn kill_rounds(name: &str, options: ClusterOptions, victim: fn(&Cluster) -> Result<String>) {
    with_cluster(name, options, |cluster| {
        let area = VerifierOptions { unit_len: 4096, ..Default::default() };
        let partial = VerifierOptions {
            unit_len: 512,
            workers: 2,
            request_units_max: 20,
            offset: area.len().next_multiple_of(1 << 20),
            ..Default::default()
        };
        let mut verifiers =
            [Verifier::new(cluster.targets()?, area), Verifier::new(cluster.targets()?, partial)];
        for round in 1..=rounds() {
            one_round(name, cluster, &mut verifiers, victim(cluster)?)
                .map_err(|reason| reason.context(format!("round {round}")))?;
        }
        Ok(())
    });
}

fn one_round(name: &str, cluster: &mut Cluster, verifiers: &mut [Verifier; 2], victim: String) -> Result<()> {
    let before = cluster.volume_status()?;
    let was_primary = before.primary.as_deref() == Some(&victim);
    let [whole, partial] = verifiers;
    let (load, partial_load) = (whole.start(), partial.start());
    load.wait_progress(300, FAILOVER_LIMIT)?;
    partial_load.wait_progress(100, FAILOVER_LIMIT)?;

    let killed = Instant::now();
    cluster.kill(&victim)?;
    load.wait_progress(200, FAILOVER_LIMIT)?;
    partial_load.wait_progress(50, FAILOVER_LIMIT)?;
    let back_in_service = killed.elapsed();
    cluster.restart(&victim)?;
    load.wait_progress(300, FAILOVER_LIMIT)?;

    // The resync has to end under load, too.
    let synced = cluster.wait_in_sync(SYNC_LIMIT)?;
    let report = load.stop()?;
    let partial_report = partial_load.stop()?;
    if was_primary {
        ensure!(synced.primary.as_deref() != Some(&victim), "{victim} took its old role back");
    } else {
        ensure!(
            synced.primary == before.primary,
            "the primary moved from {:?} to {:?}",
            before.primary,
            synced.primary
        );
    }
    whole.verify()?;
    partial.verify()?;
    cluster.wait_in_sync(SYNC_LIMIT)?;
    cluster.compare_replicas()?;
    let outage = report.stall_max.max(partial_report.stall_max);
    step(name, &format!("{victim} killed, {} acknowledged, {} unknown", report.acked, report.unknown));
    measured(name, &format!("outage {}, 200 more requests after {}", human(outage), human(back_in_service)));
    Ok(())
}

#[test]
fn primary_killed_under_load() {
    kill_rounds("kill_primary", ClusterOptions::quick(SIZE), |cluster| cluster.wait_primary(FAILOVER_LIMIT));
}

#[test]
fn secondary_killed_under_load() {
    kill_rounds("kill_secondary", ClusterOptions::quick(SIZE), Cluster::secondary);
}

#[test]
fn witness_killed_under_load() {
    kill_rounds("kill_witness", ClusterOptions::quick(SIZE), Cluster::witness);
}

/// With the default timing, because the promise of three seconds is about that one. Printed, not
/// asserted.
#[test]
fn outage_with_default_timing_is_measured() {
    with_cluster("default_outage", ClusterOptions::sized(SIZE), |cluster| {
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        for _ in 0..3 {
            let load = verifier.start();
            load.wait_progress(300, FAILOVER_LIMIT)?;
            let victim = cluster.wait_primary(FAILOVER_LIMIT)?;
            cluster.kill(&victim)?;
            load.wait_progress(300, FAILOVER_LIMIT)?;
            let report = load.stop()?;
            measured(
                "default_outage",
                &format!("service again after {} (aim: 3 s)", human(report.stall_max)),
            );
            cluster.restart(&victim)?;
            cluster.wait_in_sync(SYNC_LIMIT)?;
            verifier.verify()?;
        }
        for node in cluster.nodes()? {
            let mib = cluster.memory(&node.name)?.resident as f64 / f64::from(1 << 20);
            measured(
                "resident",
                &format!("{} ({}): {mib:.1} MiB (aim for a witness: 30)", node.name, node.kind),
            );
        }
        Ok(())
    });
}
