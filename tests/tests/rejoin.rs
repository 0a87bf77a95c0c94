//! A replica that was away gets the blocks that changed, not the volume: bytes moved at most twice the
//! changed bytes plus 1 MiB.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use blkrepl_tests::bits::Random;
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::report::measured;
use blkrepl_tests::status::numbers_named;
use blkrepl_tests::verify::connect_any;
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions, files, with_cluster};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const BLOCK: u64 = 4096;

/// What the last resync into `node` moved, by the event that the primary recorded.
fn moved_bytes(cluster: &Cluster, primary: &str, node: &str) -> Result<u64> {
    wait_for("the event that ends the resync", Duration::from_secs(5), || {
        let events = cluster.events(primary)?;
        let last = events.iter().rev().find(|e| e["kind"] == "resync_finished" && e["data"]["peer"] == node);
        let last = last.ok_or_else(|| anyhow!("{primary} has no resync_finished for {node}"))?;
        numbers_named(last, "moved_bytes").pop().ok_or_else(|| anyhow!("no moved_bytes in {last}"))
    })
}

fn fill(cluster: &Cluster, seed: u64) -> Result<()> {
    let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
    let source = cluster.dir().join("fill");
    files::make_random(&source, SIZE / 2, seed)?;
    for (index, piece) in std::fs::read(&source)?.chunks(MIB as usize).enumerate() {
        link.write(index as u64 * MIB, piece)?;
    }
    link.flush()
}

/// Writes one block in each of `count` places; the bytes that differ now.
fn change_blocks(cluster: &Cluster, count: u64, seed: u64) -> Result<u64> {
    let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
    let mut random = Random::new(seed);
    let mut changed = std::collections::BTreeSet::new();
    for _ in 0..count {
        let block = random.below(SIZE / BLOCK);
        let data: Vec<u8> = (0..BLOCK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        link.write(block * BLOCK, &data)?;
        changed.insert(block);
    }
    link.flush()?;
    Ok(changed.len() as u64 * BLOCK)
}

fn rejoin(name: &str, victim: fn(&Cluster) -> Result<String>) {
    with_cluster(name, ClusterOptions::sized(SIZE), |cluster| {
        fill(cluster, 3)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        for blocks in [0, 1, 64, 2000] {
            let away = victim(cluster)?;
            // The intent map is cleared lazily: what it still names counts as changed, so let it settle.
            std::thread::sleep(Duration::from_secs(3));
            cluster.kill(&away)?;
            let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
            let changed = change_blocks(cluster, blocks, blocks + 1)?;
            cluster.restart(&away)?;
            let status = cluster.wait_in_sync(SYNC_LIMIT)?;
            ensure!(status.primary.as_deref() == Some(&primary), "the primary moved");
            let moved = moved_bytes(cluster, &primary, &away)?;
            measured(name, &format!("{changed} bytes changed while {away} was away, {moved} moved"));
            let bound = 2 * changed + MIB;
            ensure!(
                moved <= bound,
                "{moved} bytes moved for {changed} changed ones; at most {bound} are due"
            );
            ensure!(moved >= changed, "{moved} bytes moved cannot carry {changed} changed ones");
            cluster.compare_replicas()?;
        }
        Ok(())
    });
}

#[test]
fn a_secondary_that_was_away_gets_what_changed() {
    rejoin("rejoin_secondary", Cluster::secondary);
}

#[test]
fn a_former_primary_gets_what_changed() {
    rejoin("rejoin_primary", |cluster| cluster.wait_primary(FAILOVER_LIMIT));
}
