//! Fifty random faults per round on real processes, under a verifying load of several connections: kills,
//! pauses, operator commands, and what the place has: links through proxies, hosts with cables, disks that
//! fail. Then everything is healed, and no acknowledged write is lost, no block is torn, no read went back,
//! the replicas are byte-identical, and nobody has taken a role back by itself.
//!
//! `FAULT_ROUNDS` rounds in all (15), shared out among the places; `BLKREPL_SEED` repeats the draws of a run.

use std::cell::OnceCell;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_tests::bits::fresh_seed;
use blkrepl_tests::cluster::FAILOVER_LIMIT;
use blkrepl_tests::faults::{Arena, Faults};
use blkrepl_tests::report::{human, measured, skipped, step};
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::{Cluster, scenario};

/// Faults in one round.
const FAULTS: u32 = 50;

/// This place's part of all rounds: `part` of 15.
fn rounds(part: u32) -> u32 {
    let all = std::env::var("FAULT_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15u32);
    (all * part).div_ceil(15)
}

/// One load of whole blocks, one of parts of blocks, side by side. A place whose disks are slow gets a mild one:
/// clients that write faster than a returning replica can take keep its resync from ending.
fn verifiers(targets: &[String], mild: bool) -> [Verifier; 2] {
    let (pause, request_units_max) = if mild { (10_000, 8) } else { (200, 16) };
    let area = VerifierOptions {
        pause: Duration::from_micros(pause),
        request_units_max,
        answer_limit: Duration::from_secs(4),
        connect_limit: Duration::from_millis(700),
        ..Default::default()
    };
    let partial = VerifierOptions {
        unit_len: 512,
        workers: 2,
        request_units_max: 20,
        offset: area.len().next_multiple_of(1 << 20),
        ..area
    };
    [area, partial].map(|options| Verifier::new(targets.to_vec(), options))
}

fn round(name: &str, faults: &mut Faults<'_>, verifiers: &mut [Verifier; 2]) -> Result<()> {
    let [whole, partial] = verifiers;
    let (load, partial_load) = (whole.start(), partial.start());
    load.wait_progress(100, FAILOVER_LIMIT)?;
    for _ in 0..FAULTS {
        faults.act()?;
    }
    let healed = faults.heal()?;
    load.wait_progress(100, FAILOVER_LIMIT)?;
    partial_load.wait_progress(50, FAILOVER_LIMIT)?;
    let before = faults.cluster().wait_primary(FAILOVER_LIMIT)?;
    faults.wait_in_sync()?;
    load.wait_progress(100, FAILOVER_LIMIT)?;
    let (report, partial_report) = (load.stop()?, partial_load.stop()?);
    whole.verify()?;
    partial.verify()?;
    let after = faults.wait_in_sync()?.primary;
    ensure!(
        after.as_deref() == Some(&before),
        "{before} was primary, now {after:?} is, with no fault between"
    );
    faults.cluster().compare_replicas()?;
    let (acked, unknown) = (report.acked + partial_report.acked, report.unknown + partial_report.unknown);
    measured(
        name,
        &format!("service {} after faults, {acked} acknowledged, {unknown} unknown", human(healed)),
    );
    Ok(())
}

fn run(name: &str, part: u32, disks: bool, make: impl FnOnce(u64) -> Result<(Arena, Cluster)>) {
    let seed = fresh_seed();
    step(name, &format!("seed of the faults {seed}"));
    // Outlives the cluster: disks cannot go before the nodes that hold them.
    let place = OnceCell::new();
    let prepare = || {
        let (arena, cluster) = make(seed)?;
        let _ = place.set(arena);
        Ok(cluster)
    };
    scenario(name, prepare, |cluster| {
        cluster.start_all()?;
        let targets = if disks { cluster.targets()? } else { cluster.tcp_targets()? };
        let mut verifiers = verifiers(&targets, disks);
        let arena = place.get().ok_or_else(|| anyhow!("no arena"))?;
        let mut faults = Faults::new(cluster, arena, seed)?;
        for number in 1..=rounds(part) {
            faults.begin_round();
            let result = round(name, &mut faults, &mut verifiers);
            result.with_context(|| format!("round {number} of seed {seed}:\n{}", faults.told()))?;
        }
        let total: u64 = faults.counts().values().sum();
        measured(name, &format!("{total} faults in {} rounds: {:?}", rounds(part), faults.counts()));
        measured(name, &format!("replicas that failed and were started anew: {:?}", faults.failed()));
        Ok(())
    });
}

#[test]
fn links_and_processes() {
    run("faults_links", 6, false, Arena::with_links);
}

#[test]
fn three_replicas() {
    run("faults_three", 3, false, Arena::with_three);
}

#[test]
fn hosts_and_processes() {
    let name = "faults_hosts";
    if let Some(reason) = Arena::no_hosts() {
        skipped(name, &reason);
        return;
    }
    // A thread of its own: it moves into a network namespace and does not come back.
    let moved = std::thread::spawn(move || run(name, 3, false, |_| Arena::with_hosts()));
    if let Err(panic) = moved.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn disks_and_processes() {
    let name = "faults_disks";
    match Arena::no_disks() {
        Some(reason) => skipped(name, &reason),
        None => run(name, 3, true, Arena::with_disks),
    }
}
