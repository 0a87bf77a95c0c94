//! Power loss of real kernels: guests under qemu whose disks have a volatile cache, cut off in mid-write. What was
//! flushed is there after both were cut at once; what was acknowledged is there after one was; the replicas
//! converge. Skipped where guests cannot be booted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::bits::{Random, fresh_seed};
use blkrepl_tests::guest::{self, BOOT_LIMIT, GuestCluster, SYNC_LIMIT};
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::scenario::fail;
use blkrepl_tests::verify::{Verifier, VerifierOptions, connect_any};

const NAME: &str = "vm_power";
const SIZE: u64 = 32 << 20;
/// Cuts of both at once.
const BOTH: u32 = 3;
/// Where the blocks of the quiet cuts lie, past the load's area; one per region of 1 MiB.
const QUIET: u64 = 8 << 20;
const QUIET_BLOCKS: u64 = 16;
/// Longer than an intent outlives the last write of its region, with the flush and the batches that it waits for.
const INTENT_PAUSE: Duration = Duration::from_millis(3500);

fn options() -> VerifierOptions {
    VerifierOptions {
        workers: 3,
        depth: 4,
        // A disk tears what was not flushed at its sectors, so that is what a unit is.
        unit_len: 512,
        shared_units: 0,
        private_units: 2048,
        pause: Duration::from_millis(1),
        answer_limit: Duration::from_secs(20),
        ..Default::default()
    }
}

/// Both machines at once, in mid-write: flushed writes are there, the replicas converge.
fn cut_both(cluster: &mut GuestCluster, verifier: &mut Verifier, random: &mut Random) -> Result<()> {
    let names = cluster.names();
    let load = verifier.start();
    load.wait_progress(300 + random.below(600), BOOT_LIMIT)?;
    cluster.cut_power(&names)?;
    // From here on workers only replay: a read of what is left would not know of the loss.
    load.halt();
    let begun = Instant::now();
    for name in &names {
        cluster.boot(name)?;
    }
    cluster.wait_in_sync(SYNC_LIMIT)?;
    measured(NAME, &format!("in sync {} after a cut of both", human(begun.elapsed())));
    load.stop().context("replay after the loss")?;
    verifier.verify_flushed().context("after a cut of both")
}

/// One machine in mid-write, while the other carries on: every acknowledged write is there.
fn cut_one(cluster: &mut GuestCluster, verifier: &mut Verifier, of_primary: bool) -> Result<()> {
    let primary = cluster.volume()?.primary.ok_or_else(|| anyhow!("no primary"))?;
    let other = cluster.names().into_iter().find(|name| *name != primary);
    let other = other.ok_or_else(|| anyhow!("no secondary"))?;
    let victim = if of_primary { primary.clone() } else { other.clone() };
    let load = verifier.start();
    load.wait_progress(300, BOOT_LIMIT)?;
    cluster.cut_power(std::slice::from_ref(&victim))?;
    load.wait_progress(300, BOOT_LIMIT)?;
    cluster.boot(&victim)?;
    let volume = cluster.wait_in_sync(SYNC_LIMIT)?;
    let survivor = if of_primary { &other } else { &primary };
    ensure!(volume.primary.as_ref() == Some(survivor), "{:?} is primary, not {survivor}", volume.primary);
    let report = load.stop()?;
    measured(NAME, &format!("{victim} cut, primary {of_primary}: outage {}", human(report.stall_max)));
    verifier.verify().with_context(|| format!("after a cut of {victim}"))
}

/// Blocks that are written and flushed, and left alone until their intents are gone [R5]: from then on no
/// resync looks at them, so each replica must have them by itself.
fn cut_in_quiet(cluster: &mut GuestCluster, primary: &str, names: &[String], fill: u8) -> Result<()> {
    cluster.move_to(primary)?;
    let mut link = connect_any(&cluster.targets(), BOOT_LIMIT)?;
    let block_of = |index: u64| QUIET + index * (1 << 20) + index * 4096;
    for index in 0..QUIET_BLOCKS {
        link.write(block_of(index), &[fill; 4096])?;
    }
    link.flush()?;
    drop(link);
    std::thread::sleep(INTENT_PAUSE);
    cluster.cut_power(names)?;
    for name in names {
        cluster.boot(name)?;
    }
    cluster.wait_in_sync(SYNC_LIMIT)?;
    for name in cluster.names() {
        cluster.move_to(&name)?;
        let mut link = connect_any(&cluster.targets(), BOOT_LIMIT)?;
        for index in 0..QUIET_BLOCKS {
            let found = link.read(block_of(index), 4096)?;
            ensure!(found == [fill; 4096], "a flushed block at {} is lost on {name}", block_of(index));
        }
    }
    measured(NAME, &format!("{names:?} cut in quiet, {primary} was primary: all that was flushed is there"));
    Ok(())
}

fn run(cluster: &mut GuestCluster, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let mut verifier = Verifier::new(cluster.targets(), options());
    for round in 1..=BOTH {
        cut_both(cluster, &mut verifier, &mut random).with_context(|| format!("cut {round} of both"))?;
    }
    for of_primary in [true, false, true] {
        cut_one(cluster, &mut verifier, of_primary)?;
    }
    let names = cluster.names();
    for (primary, other, fill) in [(&names[0], &names[1], 0x51), (&names[1], &names[0], 0x61)] {
        cut_in_quiet(cluster, primary, std::slice::from_ref(other), fill)?;
        cut_in_quiet(cluster, primary, &names, fill + 1)?;
    }
    cluster.compare_replicas()?;
    let lost: u64 = cluster.guests().iter().flat_map(|g| g.disks()).map(|d| d.counts().lost).sum();
    let kept: u64 = cluster.guests().iter().flat_map(|g| g.disks()).map(|d| d.counts().kept).sum();
    measured(NAME, &format!("sectors not flushed at the cuts: {lost} lost, {kept} kept"));
    ensure!(lost > 0, "no cut lost anything: nothing was shown");
    Ok(())
}

#[test]
fn flushed_writes_outlive_a_cut_of_both_and_acknowledged_ones_a_cut_of_one() {
    if let Some(reason) = guest::unavailable() {
        skipped(NAME, &reason);
        return;
    }
    let seed = fresh_seed();
    step(NAME, &format!("seed {seed}"));
    let started = Instant::now();
    let mut consoles = String::new();
    let result = GuestCluster::start(SIZE, seed).and_then(|mut cluster| {
        let result = run(&mut cluster, seed);
        consoles = cluster.consoles();
        result
    });
    if let Err(reason) = result {
        fail(NAME, None, &format!("seed {seed}: {reason:#}\n{consoles}"));
    }
    step(NAME, &format!("passed in {}", human(started.elapsed())));
}
