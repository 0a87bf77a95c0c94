//! Lists of runs of bounded length, for sets whose bits may be scattered over a whole volume.
//!
//! A list that would be too long names more than was set: runs grow to multiples of a grain, the least power of
//! two with which they fit. A set that says too much costs a comparison of what is equal already; one that says too
//! little would lose a block. Memory while it is made is that of the result.

use crate::wire::Run;

/// At most `max` ascending, disjoint runs that name at least the bits of `runs`, which ascend by their start, of a
/// bitmap of `len` bits. Exactly these bits, with as few runs as can be, if that is within `max`.
///
/// # Panics
/// If `max` is 0: then no set but the empty one could be named.
#[must_use]
pub fn coarse_runs(runs: impl IntoIterator<Item = Run>, len: u64, max: usize) -> Vec<Run> {
    assert!(max > 0, "a set is named by at least one run");
    let mut grain = 1;
    let mut out: Vec<Run> = Vec::new();
    for run in runs {
        append(&mut out, widen(run, grain, len));
        while out.len() > max {
            grain *= 2;
            out = widen_all(out, grain, len);
        }
    }
    out
}

fn widen_all(runs: Vec<Run>, grain: u64, len: u64) -> Vec<Run> {
    let mut out = Vec::new();
    for run in runs {
        append(&mut out, widen(run, grain, len));
    }
    out
}

/// The least run that starts and ends at multiples of the grain, or at the end of the bitmap.
fn widen(run: Run, grain: u64, len: u64) -> Run {
    let start = run.start / grain * grain;
    let end = run.start.saturating_add(run.count).div_ceil(grain).saturating_mul(grain).min(len);
    Run { start, count: end.saturating_sub(start) }
}

/// Appends a run that starts no earlier than the last one; what touches becomes one.
fn append(out: &mut Vec<Run>, run: Run) {
    match out.last_mut() {
        Some(last) if run.start <= last.start + last.count => {
            last.count = last.count.max(run.start + run.count - last.start);
        }
        _ => out.push(run),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn bits(runs: &[Run]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.start..run.start + run.count).collect()
    }

    proptest! {
        #[test]
        fn nothing_is_left_out_and_the_list_is_bounded(
            mut runs in vec((0_u64..2000, 1_u64..20), 0..200), max in 1_usize..40,
        ) {
            runs.sort_unstable();
            let len = 2000;
            let runs: Vec<Run> =
                runs.into_iter().map(|(start, count)| Run { start, count: count.min(len - start) }).collect();
            let exact = coarse_runs(runs.clone(), len, usize::MAX);
            prop_assert_eq!(bits(&exact), bits(&runs));
            let coarse = coarse_runs(runs.clone(), len, max);
            prop_assert!(coarse.len() <= max);
            prop_assert!(bits(&coarse).is_superset(&bits(&runs)));
            prop_assert!(coarse.iter().all(|run| run.count > 0 && run.start + run.count <= len));
            prop_assert!(coarse.windows(2).all(|pair| pair[0].start + pair[0].count < pair[1].start));
            if exact.len() <= max {
                prop_assert_eq!(coarse, exact);
            }
        }
    }

    #[test]
    fn scattered_bits_grow_to_the_least_grain_that_fits() {
        let scattered = (0..8_u64).map(|n| Run { start: 100 * n, count: 1 });
        let coarse = coarse_runs(scattered, 750, 4);
        // Pairs of bits are one run each with a grain of 64; with 32 they are not yet.
        assert_eq!(coarse, [0, 192, 384, 576].map(|start| Run { start, count: 128 }));
        let pairs = [Run { start: 3, count: 1 }, Run { start: 5, count: 1 }, Run { start: 900, count: 1 }];
        assert_eq!(coarse_runs(pairs, 1000, 2), [Run { start: 2, count: 4 }, Run { start: 900, count: 2 }]);
    }
}
