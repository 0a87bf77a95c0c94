//! Wrong or damaged files under a replica: another volume's metadata, sizes that do not fit, damaged
//! superblocks and bitmap pages, a full disk. The replica refuses with a reason that names the file, or
//! heals by a longer resync; the other replica serves on and nothing is lost.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::mount::{self, SmallDisk};
use blkrepl_tests::report::{measured, skipped};
use blkrepl_tests::status::numbers_named;
use blkrepl_tests::verify::{Verifier, VerifierOptions, connect_any};
use blkrepl_tests::wait::{wait_for, wait_until};
use blkrepl_tests::{Cluster, ClusterOptions, scenario, with_cluster};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const PAGE: usize = 512;
/// Superblock copies lie at 0 and at this offset; what follows are bitmap pages.
const SUPERBLOCK_LEN: u64 = 4096;

/// Waits until `node` reports its replica of `volume` as failed with a reason that holds all `words`.
fn wait_failed(cluster: &Cluster, node: &str, volume: &str, words: &[&str]) -> Result<String> {
    wait_for(&format!("{node} to report a failed replica"), FAILOVER_LIMIT, || {
        let status = cluster.status_of(node)?;
        let replica = status.volume(volume)?.replica(node)?.clone();
        ensure!(replica.state == "failed", "{node} is {}", replica.state);
        let reason = replica.failure.ok_or_else(|| anyhow!("failed without a reason"))?;
        for word in words {
            ensure!(reason.contains(word), "the reason lacks {word:?}: {reason}");
        }
        Ok(reason)
    })
}

/// Flips one bit of a file in place.
fn flip(path: &Path, at: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).with_context(|| format!("damage {}", path.display()))
}

fn write_blocks(cluster: &Cluster, first: u64, count: u64, byte: u8) -> Result<()> {
    let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
    for index in first..first + count {
        link.write(index * 4096, &[byte; 4096])?;
    }
    link.flush()
}

/// Some content, then the secondary is stopped and handed to `damage`, then started again.
fn with_damaged_secondary(
    name: &str,
    damage: impl FnOnce(&Cluster, &str) -> Result<()>,
    then: impl FnOnce(&mut Cluster, &str) -> Result<()>,
) {
    with_cluster(name, ClusterOptions::by_hand(SIZE, 2), |cluster| {
        write_blocks(cluster, 0, 64, 0x11)?;
        let node = cluster.secondary()?;
        cluster.kill(&node)?;
        write_blocks(cluster, 64, 8, 0x22)?;
        damage(cluster, &node)?;
        cluster.restart(&node)?;
        then(cluster, &node)?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        ensure!(
            link.read(0, 4096)? == [0x11; 4096] && link.read(64 * 4096, 4096)? == [0x22; 4096],
            "content lost"
        );
        Ok(())
    });
}

/// Makes the refused replica anew, as its reason says, and waits until all is well.
fn recreate(cluster: &Cluster, node: &str) -> Result<()> {
    cluster.cli(node, &["volume", "recreate", cluster.volume(), "--discard-data"])?.ok()?;
    cluster.wait_in_sync(SYNC_LIMIT)?;
    cluster.compare_replicas()
}

#[test]
fn another_volumes_metadata_is_refused() {
    with_cluster("wrong_metadata", ClusterOptions::by_hand(SIZE, 2), |cluster| {
        cluster.cli("n1", &["volume", "create", "vol1", "--size", &SIZE.to_string()])?.ok()?;
        wait_for("vol1 in sync", SYNC_LIMIT, || cluster.status_of("n1")?.volume("vol1")?.all_in_sync())?;
        write_blocks(cluster, 0, 64, 0x11)?;
        let node = cluster.secondary()?;
        let meta = cluster.node(&node)?.meta()?.clone();
        let other = meta.with_file_name("vol1.meta");
        let kept = meta.with_file_name("kept.meta");
        cluster.kill(&node)?;
        fs::copy(&meta, &kept)?;
        fs::copy(&other, &meta)?;
        cluster.restart(&node)?;
        let reason = wait_failed(cluster, &node, "vol0", &[&meta.display().to_string()])?;
        measured("wrong_metadata", &reason);
        // The other volume on that node is none the worse.
        wait_for("vol1 in sync", SYNC_LIMIT, || cluster.status_of("n1")?.volume("vol1")?.all_in_sync())?;
        cluster.kill(&node)?;
        fs::copy(&kept, &meta)?;
        cluster.restart(&node)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

#[test]
fn a_truncated_data_file_is_refused_and_can_be_made_anew() {
    let damage = |cluster: &Cluster, node: &str| {
        let data = cluster.node(node)?.data()?.clone();
        Ok(OpenOptions::new().write(true).open(data)?.set_len(SIZE / 2)?)
    };
    with_damaged_secondary("truncated_data", damage, |cluster, node| {
        let data = cluster.node(node)?.data()?.display().to_string();
        let reason =
            wait_failed(cluster, node, "vol0", &[&data, &SIZE.to_string(), &(SIZE / 2).to_string()])?;
        measured("truncated_data", &reason);
        recreate(cluster, node)
    });
}

#[test]
fn a_data_file_of_another_size_is_refused() {
    let damage = |cluster: &Cluster, node: &str| {
        let data = cluster.node(node)?.data()?.clone();
        Ok(OpenOptions::new().write(true).open(data)?.set_len(SIZE + MIB)?)
    };
    with_damaged_secondary("size_mismatch", damage, |cluster, node| {
        let data = cluster.node(node)?.data()?.clone();
        let reason = wait_failed(cluster, node, "vol0", &[&data.display().to_string()])?;
        measured("size_mismatch", &reason);
        // Put right, it is used again as it is.
        cluster.kill(node)?;
        OpenOptions::new().write(true).open(&data)?.set_len(SIZE)?;
        cluster.restart(node)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}

#[test]
fn a_missing_data_file_is_refused_and_can_be_made_anew() {
    let damage = |cluster: &Cluster, node: &str| Ok(fs::remove_file(cluster.node(node)?.data()?)?);
    with_damaged_secondary("missing_data", damage, |cluster, node| {
        let data = cluster.node(node)?.data()?.display().to_string();
        let reason = wait_failed(cluster, node, "vol0", &[&data])?;
        measured("missing_data", &reason);
        recreate(cluster, node)
    });
}

#[test]
fn one_damaged_superblock_copy_heals_two_are_refused() {
    let one = |cluster: &Cluster, node: &str| flip(cluster.node(node)?.meta()?, 100);
    with_damaged_secondary("superblock_one", one, |cluster, _| {
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
    let both = |cluster: &Cluster, node: &str| {
        let meta = cluster.node(node)?.meta()?.clone();
        flip(&meta, 100)?;
        flip(&meta, SUPERBLOCK_LEN + 100)
    };
    with_damaged_secondary("superblock_both", both, |cluster, node| {
        let meta = cluster.node(node)?.meta()?.display().to_string();
        let reason = wait_failed(cluster, node, "vol0", &[&meta])?;
        measured("superblock_both", &reason);
        recreate(cluster, node)
    });
}

/// Invariant 9: damage of the bitmaps costs a longer resync, never a shorter one.
#[test]
fn damaged_bitmap_pages_make_the_resync_longer() {
    with_cluster("damaged_bitmap", ClusterOptions::by_hand(SIZE, 2), |cluster| {
        write_blocks(cluster, 0, 512, 0x11)?;
        let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
        let away = cluster.secondary()?;
        cluster.kill(&away)?;
        write_blocks(cluster, 1000, 16, 0x22)?;
        // The primary is the only member; its bitmap is all that knows what the other lacks.
        cluster.kill(&primary)?;
        let meta = cluster.node(&primary)?.meta()?.clone();
        let pages = damage_all_pages(&meta)?;
        ensure!(pages > 0, "{} holds no bitmap pages", meta.display());
        cluster.restart(&primary)?;
        let again = cluster.wait_primary(FAILOVER_LIMIT)?;
        ensure!(again == primary, "{again} was promoted, which was not in sync");
        cluster.restart(&away)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        let events = cluster.events(&primary)?;
        let started =
            events.iter().find(|e| e["kind"] == "resync_started" && e["data"]["peer"] == away.as_str());
        let bytes = started.map(|e| numbers_named(e, "bytes")).unwrap_or_default();
        measured(
            "damaged_bitmap",
            &format!("{pages} pages damaged; resync of {bytes:?} bytes for 65536 changed"),
        );
        ensure!(bytes.first().is_none_or(|b| *b >= 16 * 4096), "the resync became shorter: {bytes:?}");
        cluster.compare_replicas()?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        ensure!(link.read(1000 * 4096, 4096)? == [0x22; 4096], "content lost");
        Ok(())
    });
}

fn damage_all_pages(meta: &Path) -> Result<usize> {
    let bytes = fs::read(meta)?;
    let mut damaged = 0;
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let at = index * PAGE;
        if (at as u64) < 2 * SUPERBLOCK_LEN || page.iter().all(|byte| *byte == 0) {
            continue;
        }
        flip(meta, at as u64 + 70)?;
        damaged += 1;
    }
    Ok(damaged)
}

/// A cluster in which `node`'s data file lies on a disk that is much smaller than the volume.
fn on_a_small_disk(name: &str, node: &str, body: impl FnOnce(&mut Cluster) -> Result<()>) {
    if let Some(reason) = mount::unavailable() {
        skipped(name, &reason);
        return;
    }
    // Outlives the cluster, and is unmounted before its directory goes.
    let scratch = match blkrepl_tests::cluster::scratch_dir() {
        Ok(scratch) => scratch,
        Err(reason) => panic!("{reason:#}"),
    };
    let mut small = None;
    let make = || {
        let disk = SmallDisk::mount(&scratch.path().join("image"), 48 * MIB, &scratch.path().join("small"))?;
        let data_paths = [(node.to_owned(), disk.path().join("vol0.data"))].into();
        small = Some(disk);
        Cluster::prepare(ClusterOptions { data_paths, ..ClusterOptions::by_hand(256 * MIB, 2) })
    };
    scenario(name, make, |cluster| {
        cluster.start_all()?;
        body(cluster)
    });
}

/// Writes more than the small disk holds, through whoever is primary; everything acknowledged must be
/// there, and the node with the full disk be out of the in-sync set with a reason.
fn fill_up(cluster: &Cluster, full: &str) -> Result<()> {
    let options = VerifierOptions {
        workers: 2,
        shared_units: 4096,
        private_units: 8192,
        request_units_max: 64,
        pause: Duration::ZERO,
        ..Default::default()
    };
    let mut verifier = Verifier::new(cluster.targets()?, options);
    let load = verifier.start();
    wait_until("the full disk to be noticed", SYNC_LIMIT, || {
        cluster.volume_status().is_ok_and(|v| !v.in_sync.iter().any(|n| n == full))
    })?;
    load.wait_progress(500, FAILOVER_LIMIT)?;
    load.stop()?;
    verifier.verify()?;
    let reason = wait_failed(cluster, full, "vol0", &[])?;
    measured("full_disk", &reason);
    let status = cluster.volume_status()?;
    ensure!(status.primary.as_deref().is_some_and(|p| p != full), "primary is {:?}", status.primary);
    Ok(())
}

#[test]
fn a_full_disk_takes_the_secondary_out() {
    on_a_small_disk("full_disk_secondary", "n2", |cluster| {
        if cluster.wait_primary(FAILOVER_LIMIT)? == "n2" {
            cluster.cli("n2", &["move", "vol0", "--to", "n1"])?.ok()?;
        }
        fill_up(cluster, "n2")
    });
}

#[test]
fn a_full_disk_makes_the_primary_hand_over() {
    on_a_small_disk("full_disk_primary", "n1", |cluster| {
        if cluster.wait_primary(FAILOVER_LIMIT)? == "n2" {
            cluster.cli("n2", &["move", "vol0", "--to", "n1"])?.ok()?;
        }
        fill_up(cluster, "n1")
    });
}

/// The node's log goes to a full disk, too: what cannot be logged is lost, and nothing else.
#[test]
fn a_log_that_cannot_be_written_changes_nothing() {
    with_cluster("full_log", ClusterOptions::by_hand(64 * MIB, 2), |cluster| {
        let script = cluster.dir().join("full-log");
        fs::write(&script, "#!/bin/sh\nexec \"$@\" 2>/dev/full\n")?;
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut verifier = Verifier::new(cluster.targets()?, VerifierOptions::default());
        for node in ["n1", "n2"] {
            cluster.kill(node)?;
            cluster.restart_under(node, &script)?;
            cluster.wait_in_sync(SYNC_LIMIT)?;
        }
        let load = verifier.start();
        for to in ["n1", "n2", "n1"] {
            load.wait_progress(300, FAILOVER_LIMIT)?;
            cluster.cli("n1", &["move", "vol0", "--to", to])?.ok()?;
        }
        load.wait_progress(300, FAILOVER_LIMIT)?;
        load.stop()?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        verifier.verify()?;
        cluster.compare_replicas()
    });
}
