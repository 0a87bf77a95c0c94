//! Hunts with the simulator: the lowest seed under which a mutation breaks a promise, over several threads.
//!
//! The switch is one per thread, so each thread sets it for itself before each run. The result does not depend
//! on the number of threads: every seed below the one reported was tried and found nothing.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use blkrepl_engine::mutation::{Mutation, set};
use blkrepl_sim::lockstep::control;
use blkrepl_sim::{Options, Violation, run};

use super::table::{Aim, By, Row};

/// The lowest seed that showed something.
pub(crate) struct Hit {
    pub(crate) seed: u64,
    pub(crate) violation: Violation,
}

/// Runs `count` seeds from `first` on under `mutation` until a promise is broken.
pub(crate) fn hunt(mutation: Mutation, aim: Aim, first: u64, count: u64, jobs: usize) -> Option<Hit> {
    lowest(Some(mutation), &aim.options(), first, count, jobs)
}

/// The lowest seed of the control plane alone under which a mutation breaks a promise, and which.
pub(crate) fn hunt_control(mutation: Mutation, first: u64, count: u64) -> Option<(u64, &'static str)> {
    (first..first + count).find_map(|seed| {
        set(Some(mutation));
        let result = control::run(seed, None);
        set(None);
        let what = result.err()?.what;
        control::run(seed, None).is_ok().then_some((seed, what))
    })
}

/// Runs seeds without a mutation, also with the aims of the table. True if all are clean.
pub(crate) fn control(rows: &[&Row], first: u64, count: u64, jobs: usize) -> bool {
    let aims: BTreeSet<String> = rows.iter().filter_map(|r| aimed(r)).map(|a| format!("{a:?}")).collect();
    let mut left = aims;
    let mut good = true;
    let each = count / left.len().max(1) as u64 + 1;
    for row in rows {
        let Some(aim) = aimed(row).filter(|a| left.remove(&format!("{a:?}"))) else { continue };
        if let Some(hit) = lowest(None, &aim.options(), first, each, jobs) {
            good = false;
            println!(
                "control run: seed {} breaks a promise without a mutation: {}",
                hit.seed, hit.violation.text
            );
        }
    }
    println!("control run: {count} seeds without a mutation, {}", if good { "clean" } else { "NOT clean" });
    good
}

fn aimed(row: &Row) -> Option<Aim> {
    match row.by {
        By::Seeds(aim) => Some(aim),
        By::Model(_) | By::Control | By::Test(_) => None,
    }
}

fn lowest(mutation: Option<Mutation>, options: &Options, first: u64, count: u64, jobs: usize) -> Option<Hit> {
    let next = AtomicU64::new(first);
    let end = AtomicU64::new(first + count);
    let found: Mutex<Option<Hit>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    set(mutation);
                    let outcome = run(seed, options);
                    set(None);
                    let Some(violation) = outcome.violation else { continue };
                    // What the same seed shows without the mutation is not the mutation's doing.
                    if mutation.is_some() && !run(seed, options).is_clean() {
                        continue;
                    }
                    end.fetch_min(seed, Ordering::Relaxed);
                    let mut found = found.lock().expect("no thread panics while it holds this");
                    if found.as_ref().is_none_or(|hit| hit.seed > seed) {
                        *found = Some(Hit { seed, violation });
                    }
                }
            });
        }
    });
    found.into_inner().expect("no thread panics while it holds this")
}
