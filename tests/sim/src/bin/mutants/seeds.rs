//! Hunts with the simulator: the lowest seed under which a mutation breaks a promise, over several threads.
//!
//! The switch is one per thread, so each thread sets it for itself before each run. The result does not depend
//! on the number of threads: every seed below the one reported was tried and found nothing.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use blkrepl_engine::mutation::{Mutation, set};
use blkrepl_sim::lockstep::control;
use blkrepl_sim::run;

use super::table::{Aim, By, Row};

/// A broken promise: which, and what was seen.
pub(crate) type Broken = (String, String);

/// The lowest seed that showed something.
pub(crate) struct Hit {
    pub(crate) seed: u64,
    pub(crate) broken: Broken,
}

/// Which simulator runs a seed.
#[derive(Clone, Copy)]
enum Simulator {
    /// The whole cluster.
    Cluster(Aim),
    /// The control plane alone, with production's Raft.
    Control,
}

impl Simulator {
    fn of(by: By) -> Option<Self> {
        match by {
            By::Seeds(aim) => Some(Self::Cluster(aim)),
            By::Control => Some(Self::Control),
            By::Model(_) | By::Test(_) => None,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Cluster(aim) => format!("{aim:?}"),
            Self::Control => "control".into(),
        }
    }

    fn run(self, seed: u64) -> Option<Broken> {
        match self {
            Self::Cluster(aim) => {
                let violation = run(seed, &aim.options()).violation?;
                Some((violation.invariant.to_string(), violation.text))
            }
            Self::Control => {
                let violation = control::run(seed, None).err()?;
                Some((format!("control plane: {}", violation.what), violation.text))
            }
        }
    }
}

/// Runs `count` seeds from `first` on under the row's mutation until a promise is broken.
pub(crate) fn hunt(row: &Row, first: u64, count: u64, jobs: usize) -> Option<Hit> {
    lowest(Some(row.mutation), Simulator::of(row.by)?, first, count, jobs)
}

/// Runs seeds without a mutation, with every aim of the table. True if all are clean.
pub(crate) fn control(rows: &[&Row], first: u64, count: u64, jobs: usize) -> bool {
    let simulators: Vec<Simulator> = rows.iter().filter_map(|row| Simulator::of(row.by)).collect();
    let mut left: BTreeSet<String> = simulators.iter().map(|s| s.name()).collect();
    let each = count / left.len().max(1) as u64 + 1;
    let (mut good, mut seeds) = (true, 0);
    for simulator in simulators.into_iter().filter(|s| left.remove(&s.name())) {
        seeds += each;
        if let Some(Hit { seed, broken: (what, text) }) = lowest(None, simulator, first, each, jobs) {
            good = false;
            println!("control run: seed {seed} breaks {what} without a mutation: {text}");
        }
    }
    println!("control run: {seeds} seeds without a mutation, {}", if good { "clean" } else { "NOT clean" });
    good
}

fn lowest(
    mutation: Option<Mutation>,
    simulator: Simulator,
    first: u64,
    count: u64,
    jobs: usize,
) -> Option<Hit> {
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
                    let broken = simulator.run(seed);
                    set(None);
                    let Some(broken) = broken else { continue };
                    // What the same seed shows without the mutation is not the mutation's doing.
                    if mutation.is_some() && simulator.run(seed).is_some() {
                        continue;
                    }
                    end.fetch_min(seed, Ordering::Relaxed);
                    let mut found = found.lock().expect("no thread panics while it holds this");
                    if found.as_ref().is_none_or(|hit| hit.seed > seed) {
                        *found = Some(Hit { seed, broken });
                    }
                }
            });
        }
    });
    found.into_inner().expect("no thread panics while it holds this")
}
