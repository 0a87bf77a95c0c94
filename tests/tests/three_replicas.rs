//! Three data nodes, configured by hand: the loss of any one, the rejoin of each, all three byte for
//! byte the same afterwards.

use anyhow::{Result, anyhow, ensure};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::report::{human, measured};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

const SIZE: u64 = 64 << 20;

fn three(lease_ms: u64) -> ClusterOptions {
    ClusterOptions { witness: false, lease_ms: Some(lease_ms), ..ClusterOptions::by_hand(SIZE, 3) }
}

/// A round in which `victim` is killed under load and comes back.
fn lose_one(cluster: &mut Cluster, verifier: &mut Verifier, victim: &str) -> Result<()> {
    let was_primary = cluster.wait_primary(FAILOVER_LIMIT)? == victim;
    let load = verifier.start();
    load.wait_progress(300, FAILOVER_LIMIT)?;
    cluster.kill(victim)?;
    load.wait_progress(300, FAILOVER_LIMIT)?;
    let alone = cluster.volume_status()?;
    ensure!(alone.in_sync.len() == 2, "two of three are left, in sync are {:?}", alone.in_sync);
    cluster.restart(victim)?;
    let status = cluster.wait_in_sync(SYNC_LIMIT)?;
    let report = load.stop()?;
    ensure!(status.in_sync.len() == 3, "in sync are {:?}", status.in_sync);
    if was_primary {
        ensure!(status.primary.as_deref() != Some(victim), "{victim} took its old role back");
    }
    measured("three_replicas", &format!("{victim} killed: outage {}", human(report.stall_max)));
    verifier.verify()?;
    cluster.compare_replicas()
}

#[test]
fn each_of_three_is_killed_under_load_and_rejoins() {
    with_cluster("three_replicas", three(500), |cluster| {
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        for _ in 0..2 {
            let victim = cluster.wait_primary(FAILOVER_LIMIT)?;
            lose_one(cluster, &mut verifier, &victim)?;
        }
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        for node in cluster.data_nodes()?.into_iter().map(|n| n.name).filter(|n| *n != primary) {
            lose_one(cluster, &mut verifier, &node)?;
        }
        Ok(())
    });
}

/// One replica is away and returns while another dies: what it lacks is known to every member, not
/// only to the one that was primary when it left [R12].
#[test]
fn a_new_primary_knows_what_an_absent_replica_lacks() {
    with_cluster("three_absent", three(500), |cluster| {
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        let first = cluster.wait_primary(FAILOVER_LIMIT)?;
        let absent = cluster.secondary()?;
        let load = verifier.start();
        load.wait_progress(200, FAILOVER_LIMIT)?;
        cluster.kill(&absent)?;
        load.wait_progress(500, FAILOVER_LIMIT)?;
        // Moved, not killed: two of three voters are needed.
        let names = cluster.data_nodes()?.into_iter().map(|n| n.name);
        let second =
            names.into_iter().find(|n| *n != first && *n != absent).ok_or_else(|| anyhow!("no third"))?;
        cluster.cli(&first, &["move", cluster.volume(), "--to", &second])?.ok()?;
        load.wait_progress(500, FAILOVER_LIMIT)?;
        cluster.restart(&absent)?;
        let status = cluster.wait_in_sync(SYNC_LIMIT)?;
        load.stop()?;
        ensure!(status.primary.as_deref() == Some(&second), "primary is {:?}", status.primary);
        verifier.verify()?;
        cluster.compare_replicas()
    });
}

#[test]
fn all_three_killed_at_once_converge() {
    with_cluster("three_power", three(1500), |cluster| {
        let options = VerifierOptions { shared_units: 0, private_units: 512, ..Default::default() };
        let mut verifier = Verifier::new(cluster.targets()?, options);
        let load = verifier.start();
        load.wait_progress(800, FAILOVER_LIMIT)?;
        let names: Vec<String> = cluster.nodes()?.into_iter().map(|n| n.name).collect();
        cluster.kill_at_once(&names)?;
        for node in &names {
            cluster.restart(node)?;
        }
        load.wait_progress(100, SYNC_LIMIT)?;
        load.stop()?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        verifier.verify()?;
        cluster.compare_replicas()
    });
}
