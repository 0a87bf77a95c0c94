//! Medians of the rounds, ratios, and how both are shown.

use std::fmt::Write;

use blkrepl_nbd::bench::BenchReport;
use serde_json::{Value, json};

use super::jobs::NamedJob;
use super::own::BLKREPL_NAMES;
use super::subject::Subject;
use super::{CompareOptions, peers};

/// The fastest round of a server may be so much faster than its slowest before it counts as noisy.
pub(crate) const SPREAD_MAX: f64 = 1.25;
/// Whom everything is compared to.
const FLOOR: &str = "floor";

/// One run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) iops: f64,
    pub(crate) mb_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU of all of the server's processes, per operation.
    pub(crate) cpu_us: Option<f64>,
}

impl Cell {
    pub(crate) fn of(report: &BenchReport) -> Self {
        Self {
            iops: report.iops(),
            mb_per_s: report.megabytes_per_second(),
            p50_us: report.latency.p50_ns as f64 / 1e3,
            p99_us: report.latency.p99_ns as f64 / 1e3,
            cpu_us: report.server_cpu_us(),
        }
    }

    /// Figure by figure; `None` of no runs.
    pub(crate) fn median(runs: &[Self]) -> Option<Self> {
        let of = |value: fn(&Self) -> f64| median(runs.iter().map(value).collect());
        Some(Self {
            iops: of(|cell| cell.iops)?,
            mb_per_s: of(|cell| cell.mb_per_s)?,
            p50_us: of(|cell| cell.p50_us)?,
            p99_us: of(|cell| cell.p99_us)?,
            cpu_us: median(runs.iter().filter_map(|cell| cell.cpu_us).collect()),
        })
    }
}

/// All runs of a place: by job, by server, by round.
pub(super) struct PlaceResults {
    place: &'static str,
    jobs: Vec<&'static str>,
    servers: Vec<(&'static str, bool)>,
    runs: Vec<Vec<Vec<Cell>>>,
    /// Calls of io_uring_enter per write, of those for which they were counted.
    pub(super) enters: Vec<(&'static str, f64)>,
}

impl PlaceResults {
    pub(super) fn new(place: &'static str, subjects: &[Subject], jobs: &[NamedJob]) -> Self {
        let servers: Vec<_> = subjects.iter().map(|s| (s.name, s.is_replicated_peer)).collect();
        Self {
            place,
            jobs: jobs.iter().map(|job| job.name).collect(),
            runs: vec![vec![Vec::new(); servers.len()]; jobs.len()],
            servers,
            enters: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, job: usize, server: usize, cell: Cell) {
        self.runs[job][server].push(cell);
    }

    fn median(&self, job: usize, server: usize) -> Option<Cell> {
        Cell::median(&self.runs[job][server])
    }

    fn spread(&self, job: usize, server: usize) -> f64 {
        spread(&self.runs[job][server])
    }

    fn floor(&self, job: usize) -> Option<Cell> {
        let at = self.servers.iter().position(|(name, _)| *name == FLOOR)?;
        self.median(job, at)
    }

    /// IOPS of a volume whose other replica is away, by those of one that never had another.
    fn degraded_by_single(&self, job: usize) -> Option<f64> {
        let [_, degraded, single] = BLKREPL_NAMES;
        let iops = |name| {
            let at = self.servers.iter().position(|(known, _)| *known == name)?;
            self.median(job, at).map(|cell| cell.iops)
        };
        ratio(iops(degraded), iops(single))
    }

    /// IOPS of the fastest peer that replicates.
    fn best_peer(&self, job: usize) -> Option<f64> {
        let peers = (0..self.servers.len()).filter(|server| self.servers[*server].1);
        peers.filter_map(|server| self.median(job, server)).map(|cell| cell.iops).reduce(f64::max)
    }
}

/// Fastest by slowest run.
pub(crate) fn spread(runs: &[Cell]) -> f64 {
    let rates = || runs.iter().map(|cell| cell.iops);
    rates().fold(0.0, f64::max) / rates().fold(f64::INFINITY, f64::min).max(1e-9)
}

/// The middle one; of an even number the mean of the middle two.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

pub(crate) fn ratio(value: Option<f64>, base: Option<f64>) -> Option<f64> {
    Some(value? / base.filter(|base| *base > 0.0)?)
}

pub(crate) fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// The table of a place.
pub(super) fn text(results: &PlaceResults) -> String {
    let mut out = format!(
        "{}: medians of the rounds; x floor and x peer are ratios to the floor and to the fastest replicated peer;\n\
         ~ marks a server whose fastest round was more than {SPREAD_MAX} times its slowest\n",
        results.place
    );
    for (job, name) in results.jobs.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "\n{name:<20} {:>9} {:>7} {:>7} {:>8} {:>9} {:>7} {:>9} {:>8} {:>7} {:>7}",
            "IOPS", "x floor", "x peer", "MB/s", "p50 us", "x floor", "p99 us", "CPU us", "x floor", "spread"
        );
        let (floor, peer) = (results.floor(job), results.best_peer(job));
        for (server, (name, _)) in results.servers.iter().enumerate() {
            let cell = results.median(job, server);
            let of = |value: fn(&Cell) -> f64| (cell.as_ref().map(value), floor.as_ref().map(value));
            let (iops, floor_iops) = of(|cell| cell.iops);
            let (p50, floor_p50) = of(|cell| cell.p50_us);
            let cpu = cell.and_then(|cell| cell.cpu_us);
            let floor_cpu = floor.and_then(|cell| cell.cpu_us);
            let spread = results.spread(job, server);
            let mark = if spread > SPREAD_MAX { "~" } else { "" };
            let _ = writeln!(
                out,
                "{name:<20} {:>9} {:>7} {:>7} {:>8} {:>9} {:>7} {:>9} {:>8} {:>7} {:>7}",
                shown(iops, 0),
                shown(ratio(iops, floor_iops), 2),
                shown(ratio(iops, peer), 2),
                shown(cell.map(|cell| cell.mb_per_s), 1),
                shown(p50, 1),
                shown(ratio(p50, floor_p50), 2),
                shown(cell.map(|cell| cell.p99_us), 1),
                shown(cpu, 2),
                shown(ratio(cpu, floor_cpu), 2),
                format!("{mark}{}", shown(cell.map(|_| spread), 2)),
            );
        }
    }
    let degraded: Vec<String> = (results.jobs.iter().enumerate())
        .filter_map(|(job, name)| Some(format!("{name} {:.2}", results.degraded_by_single(job)?)))
        .collect();
    if !degraded.is_empty() {
        let _ = writeln!(
            out,
            "\nIOPS of {} by those of {}: {}",
            BLKREPL_NAMES[1],
            BLKREPL_NAMES[2],
            degraded.join(", ")
        );
    }
    for (name, calls) in &results.enters {
        let _ = writeln!(
            out,
            "\n{name}: {calls:.3} io_uring_enter calls of its primary per 4 KiB write at depth 32"
        );
    }
    out
}

/// Everything, for tools.
pub(super) fn json(results: &[PlaceResults], quiet: &str, options: &CompareOptions) -> Value {
    json!({
        "rounds": options.rounds,
        "seconds": options.time.as_secs_f64(),
        "size_bytes": options.size,
        "transport": format!("{:?}", options.transport).to_lowercase(),
        "idle_processors": quiet,
        "spread_max": SPREAD_MAX,
        "versions": peers::versions(),
        "places": results.iter().map(place_json).collect::<Vec<_>>(),
    })
}

fn place_json(results: &PlaceResults) -> Value {
    let mut rows = Vec::new();
    for (job, name) in results.jobs.iter().enumerate() {
        for (server, (server_name, _)) in results.servers.iter().enumerate() {
            let runs = &results.runs[job][server];
            let (iops, floor) = (results.median(job, server), results.floor(job));
            let (iops, floor) = (iops.map(|cell| cell.iops), floor.map(|cell| cell.iops));
            rows.push(json!({
                "job": name,
                "server": server_name,
                "median": results.median(job, server).as_ref().map(cell_json),
                "rounds": runs.iter().map(cell_json).collect::<Vec<_>>(),
                "iops_by_floor": ratio(iops, floor),
                "iops_by_best_replicated_peer": ratio(iops, results.best_peer(job)),
                "noisy": results.spread(job, server) > SPREAD_MAX,
            }));
        }
    }
    let enters: serde_json::Map<String, Value> =
        results.enters.iter().map(|(name, calls)| ((*name).to_owned(), json!(calls))).collect();
    json!({"place": results.place, "results": rows, "io_uring_enter_per_write": enters})
}

fn cell_json(cell: &Cell) -> Value {
    json!({
        "iops": cell.iops,
        "mb_per_s": cell.mb_per_s,
        "p50_us": cell.p50_us,
        "p99_us": cell.p99_us,
        "server_cpu_us": cell.cpu_us,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(iops: f64) -> Cell {
        Cell { iops, mb_per_s: 1.0, p50_us: 1e6 / iops, p99_us: 1.0, cpu_us: Some(2.0) }
    }

    fn results() -> PlaceResults {
        PlaceResults {
            place: "disk",
            jobs: vec!["job"],
            servers: vec![("floor", false), ("blkrepl-replicated", false), ("qemu-quorum", true)],
            runs: vec![vec![
                vec![cell(100.0), cell(300.0), cell(200.0)],
                vec![cell(150.0), cell(160.0)],
                Vec::new(),
            ]],
            enters: vec![("floor", 0.25)],
        }
    }

    #[test]
    fn figures_are_medians_and_ratios_are_of_medians() {
        let results = results();
        assert_eq!(results.median(0, 0).unwrap().iops, 200.0);
        assert_eq!(results.median(0, 1).unwrap().iops, 155.0);
        assert_eq!(results.median(0, 2), None);
        assert_eq!(results.best_peer(0), None);
        let value = place_json(&results);
        assert_eq!(value["results"][1]["iops_by_floor"], 0.775);
        assert_eq!(value["results"][1]["noisy"], false);
        assert_eq!(value["results"][0]["noisy"], true);
        assert!(value["results"][2]["median"].is_null());
    }

    #[test]
    fn a_degraded_volume_is_compared_to_a_single_one() {
        let mut results = results();
        assert_eq!(results.degraded_by_single(0), None);
        results.servers = vec![("floor", false), ("blkrepl-single", false), ("blkrepl-degraded", false)];
        results.runs[0][2] = vec![cell(124.0)];
        assert_eq!(results.degraded_by_single(0), Some(0.8));
        assert!(text(&results).contains("of blkrepl-degraded by those of blkrepl-single: job 0.80"));
    }

    #[test]
    fn the_table_marks_noise_and_what_is_missing() {
        let text = text(&results());
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("floor ").contains("~3.00"), "{text}");
        assert!(line("blkrepl").contains("0.78") && !line("blkrepl").contains('~'), "{text}");
        assert!(line("qemu-quorum").contains('-'), "{text}");
        assert!(text.contains("0.250 io_uring_enter"), "{text}");
    }
}
