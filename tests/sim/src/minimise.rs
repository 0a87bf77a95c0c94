//! Makes a failing scenario small: fewest strikes, fewest operations, fewest kinds of faults, as long as the
//! same invariant stays broken. Greedy, and every step is a whole run, so the result is not the smallest there
//! is, only one from which nothing more can be taken alone.

use crate::options::Scenario;
use crate::outcome::{Invariant, Outcome};
use crate::runner::run;

/// A smaller scenario that breaks the same invariant, with its outcome; `None` if this one breaks none.
#[must_use]
pub fn minimise(scenario: &Scenario) -> Option<(Scenario, Outcome)> {
    let first = run(scenario.seed, &scenario.options);
    let broken = first.violation.as_ref()?.invariant;
    let mut best = (scenario.clone(), first);
    // What comes after the violation does not matter.
    let at = best.1.violation.as_ref().map_or(0, |v| v.at);
    let before = best.1.strikes.iter().filter(|(_, t, ..)| *t <= at).count();
    let mut shorter = best.0.clone();
    shorter.options.strikes_max = shorter.options.strikes_max.min(u32::try_from(before).unwrap_or(u32::MAX));
    accept(&mut best, shorter, broken);
    for _ in 0..4 {
        let runs_before = best.0.clone();
        fewer_strikes(&mut best, broken);
        fewer_operations(&mut best, broken);
        if best.0 == runs_before {
            break;
        }
    }
    Some(best)
}

fn accept(best: &mut (Scenario, Outcome), candidate: Scenario, broken: Invariant) -> bool {
    if candidate == best.0 {
        return false;
    }
    let outcome = run(candidate.seed, &candidate.options);
    let same = outcome.violation.as_ref().is_some_and(|v| v.invariant == broken);
    if same {
        *best = (candidate, outcome);
    }
    same
}

/// Leaves strikes out, many at once at first.
fn fewer_strikes(best: &mut (Scenario, Outcome), broken: Invariant) {
    let all = best.1.strikes.len();
    let mut size = (all / 2).max(1);
    loop {
        let mut from = 0;
        while from < all {
            let max = best.0.options.strikes_max;
            let numbers = (from..(from + size).min(all)).filter_map(|n| u32::try_from(n).ok());
            let new: Vec<u32> = numbers.filter(|n| *n < max && !best.0.options.skip.contains(n)).collect();
            if !new.is_empty() {
                let mut candidate = best.0.clone();
                candidate.options.skip.extend(new);
                accept(best, candidate, broken);
            }
            from += size;
        }
        if size == 1 {
            return;
        }
        size /= 2;
    }
}

fn fewer_operations(best: &mut (Scenario, Outcome), broken: Invariant) {
    for divisor in [10, 4, 2] {
        let mut candidate = best.0.clone();
        candidate.options.ops = (candidate.options.ops / divisor).max(1);
        if accept(best, candidate, broken) {
            return;
        }
    }
}
