//! The table of a place: medians, and ratios to the first line of each group.

use std::fmt::Write;

use crate::compare::{Cell, SPREAD_MAX, ratio, shown, spread};

use super::cases::Case;
use super::run::Sample;

/// All cases with their samples.
pub(super) fn text(heading: &str, cases: &[Case], samples: &[Vec<Sample>]) -> String {
    let mut out = format!(
        "{heading}; x are ratios to the first line of each block;\n\
         CPU is that of all servers per operation of all loads, idle is of all processors;\n\
         2nd is the rate of the other load, both x that of both together by the first line's;\n\
         ~ marks a line whose fastest round was more than {SPREAD_MAX} times its slowest\n"
    );
    let mut samples = samples.iter();
    for group in cases.chunk_by(|a, b| a.group == b.group) {
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "\n{}\n{:<20} {:>9} {:>6} {:>8} {:>9} {:>6} {:>9} {:>6} {:>8} {:>6} {:>6} {:>9} {:>7} {:>7}",
            group[0].group,
            "",
            "per s",
            "x",
            "MB/s",
            "p50 us",
            "x",
            "p99 us",
            "x",
            "CPU us",
            "x",
            "idle %",
            "2nd",
            "both x",
            "spread"
        );
        let mut first = None;
        for (case, runs) in group.iter().zip(samples.by_ref()) {
            let sample = Sample::median(runs);
            out += &line(case, sample, *first.get_or_insert(sample), runs);
        }
    }
    out
}

fn line(case: &Case, sample: Option<Sample>, first: Option<Sample>, runs: &[Sample]) -> String {
    let of = |value: fn(&Cell) -> Option<f64>| {
        let of = |sample: Option<Sample>| sample.and_then(|s| value(&s.cell)).filter(|v| v.is_finite());
        (of(sample), ratio(of(sample), of(first)))
    };
    let (iops, iops_x) = of(|cell| Some(cell.iops));
    let (p50, p50_x) = of(|cell| Some(cell.p50_us));
    let (p99, p99_x) = of(|cell| Some(cell.p99_us));
    let (cpu, cpu_x) = of(|cell| cell.cpu_us);
    let other = sample.and_then(|sample| sample.other_iops);
    let both = iops.zip(other).map(|(iops, other)| iops + other);
    let cells: Vec<Cell> = runs.iter().map(|run| run.cell).collect();
    let spread = sample.map(|_| spread(&cells));
    let mark = if spread.is_some_and(|spread| spread > SPREAD_MAX) { "~" } else { "" };
    format!(
        "{:<20} {:>9} {:>6} {:>8} {:>9} {:>6} {:>9} {:>6} {:>8} {:>6} {:>6} {:>9} {:>7} {:>7}\n",
        case.name,
        shown(iops, 0),
        shown(iops_x, 2),
        shown(of(|cell| Some(cell.mb_per_s)).0, 1),
        shown(p50, 1),
        shown(p50_x, 2),
        shown(p99, 1),
        shown(p99_x, 2),
        shown(cpu, 2),
        shown(cpu_x, 2),
        shown(sample.and_then(|sample| sample.idle), 0),
        shown(other, 0),
        shown(ratio(both, first.map(|first| first.cell.iops)), 2),
        format!("{mark}{}", shown(spread, 2)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::cases::Part;
    use super::*;

    fn sample(iops: f64, other_iops: Option<f64>) -> Sample {
        let cell = Cell { iops, mb_per_s: 1.0, p50_us: 1e6 / iops, p99_us: f64::NAN, cpu_us: Some(2.0) };
        Sample { cell, other_iops, idle: Some(12.0) }
    }

    #[test]
    fn lines_are_compared_to_the_first_of_their_block() {
        let cases = &Part::Volumes.cases()[..3];
        let samples =
            [vec![sample(200.0, None), sample(100.0, None)], vec![sample(75.0, Some(120.0))], Vec::new()];
        let text = text("disk", cases, &samples);
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("alone").contains("1.00") && line("alone").ends_with("~2.00"), "{text}");
        let words = line(&cases[1].name);
        let words: Vec<&str> = words.split_whitespace().rev().collect();
        assert_eq!(words[..4], ["1.00", "1.30", "120", "12"], "{text}");
        assert!(text.lines().last().unwrap().split_whitespace().all(|word| word != "0.00"), "{text}");
    }
}
