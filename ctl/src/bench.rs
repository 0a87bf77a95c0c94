//! `blkrepl bench`: the load generator for people.
//!
//! It turns the command line into a run and the report into a table or JSON; the load itself is
//! `blkrepl_nbd::bench`. It judges no number.

use std::fmt::Write;
use std::time::Duration;

use blkrepl_nbd::bench::{BenchOptions, BenchReport, Job, LatencyReport, Pattern};
use blkrepl_nbd::{NbdError, NbdUri};
use serde_json::{Value, json};

use crate::cli::{BenchArgs, RwArg};

/// Measured time without `--seconds` and without `--count`.
const TIME_DEFAULT: Duration = Duration::from_secs(10);
/// Limit of the measured time with `--count` alone.
const TIME_OF_COUNT: Duration = Duration::from_secs(600);

/// Makes the load that the arguments describe.
///
/// # Errors
/// As [`blkrepl_nbd::bench::run`].
pub fn run(args: &BenchArgs) -> Result<BenchReport, NbdError> {
    blkrepl_nbd::bench::run(&args.uri, &options(args))
}

fn options(args: &BenchArgs) -> BenchOptions {
    let (pattern, read_percent) = match args.rw {
        RwArg::Randread => (Pattern::Random, 100),
        RwArg::Randwrite => (Pattern::Random, 0),
        RwArg::Randrw => (Pattern::Random, args.mix),
        RwArg::Read => (Pattern::Sequential, 100),
        RwArg::Write => (Pattern::Sequential, 0),
    };
    let job = Job {
        pattern,
        read_percent,
        block_size: args.block_size,
        fua: args.fua,
        flush_after_write: args.flush_after_write,
    };
    let limit = if args.count.is_some() { TIME_OF_COUNT } else { TIME_DEFAULT };
    BenchOptions {
        job,
        connections: args.connections,
        depth: args.depth,
        warm_up: args.warm_up,
        time: args.seconds.unwrap_or(limit),
        count: args.count,
        offset: args.offset,
        area: args.area,
        spread: None,
        seed: args.seed,
        pids: args.pids.clone(),
        destroys_data: args.destroys_data,
    }
}

/// The report as `--json` prints it.
#[must_use]
pub fn json(uri: &NbdUri, report: &BenchReport) -> Value {
    json!({
        "uri": uri.to_string(),
        "operations": report.operations,
        "reads": report.reads,
        "seconds": report.time.as_secs_f64(),
        "iops": report.iops(),
        "mb_per_s": report.megabytes_per_second(),
        "area_bytes": report.area,
        "latency_us": latency_json(&report.latency),
        "read_latency_us": report.read_latency.as_ref().map(latency_json),
        "write_latency_us": report.write_latency.as_ref().map(latency_json),
        "server_cpu_us_per_operation": report.server_cpu_us(),
    })
}

fn latency_json(latency: &LatencyReport) -> Value {
    json!({
        "mean": latency.mean_ns / 1e3,
        "p50": micros(latency.p50_ns),
        "p90": micros(latency.p90_ns),
        "p99": micros(latency.p99_ns),
        "p99_9": micros(latency.p999_ns),
        "max": micros(latency.max_ns),
    })
}

/// The report for people.
#[must_use]
pub fn table(report: &BenchReport) -> String {
    let mut out = format!(
        "{} operations in {:.2} s: {:.0} IOPS, {:.1} MB/s\n",
        report.operations,
        report.time.as_secs_f64(),
        report.iops(),
        report.megabytes_per_second()
    );
    if let Some(cpu) = report.server_cpu_us() {
        // Writing to a string does not fail.
        let _ = writeln!(out, "server CPU {cpu:.2} us per operation");
    }
    let _ = writeln!(
        out,
        "{:<14} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "latency in us", "mean", "p50", "p90", "p99", "p99.9", "max"
    );
    let both = report.read_latency.is_some() && report.write_latency.is_some();
    let split = |latency: &Option<LatencyReport>| latency.filter(|_| both);
    let rows = [
        ("all", Some(report.latency)),
        ("reads", split(&report.read_latency)),
        ("writes", split(&report.write_latency)),
    ];
    for (name, latency) in rows.iter().filter_map(|(name, latency)| latency.map(|latency| (name, latency))) {
        let _ = writeln!(
            out,
            "{name:<14} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1}",
            latency.mean_ns / 1e3,
            micros(latency.p50_ns),
            micros(latency.p90_ns),
            micros(latency.p99_ns),
            micros(latency.p999_ns),
            micros(latency.max_ns)
        );
    }
    out
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(args: &[&str]) -> BenchOptions {
        let head = ["blkrepl", "bench", "nbd://h/v"];
        let cli = Cli::try_parse_from(head.iter().chain(args)).unwrap();
        let Command::Bench(args) = cli.command else { panic!("wrong command") };
        options(&args)
    }

    #[test]
    fn nothing_said_is_harmless_and_bounded() {
        let options = parsed(&[]);
        assert!(!options.job.writes() && !options.destroys_data);
        assert_eq!((options.time, options.count), (TIME_DEFAULT, None));
        assert_eq!(parsed(&["--count", "5"]).time, TIME_OF_COUNT);
    }

    #[test]
    fn each_kind_of_load_can_be_named() {
        let job = |args: &[&str]| parsed(args).job;
        assert_eq!(job(&["--rw", "randwrite"]).read_percent, 0);
        assert_eq!(job(&["--rw", "randrw"]).read_percent, 70);
        assert_eq!(job(&["--rw", "randrw", "--mix", "20"]).read_percent, 20);
        let write = job(&["--rw", "write", "--block-size", "1MiB", "--fua", "--flush-after-write"]);
        assert_eq!((write.pattern, write.block_size), (Pattern::Sequential, 1 << 20));
        assert!(write.fua && write.flush_after_write);
        assert_eq!(parsed(&["--pid", "1", "--pid", "2"]).pids, [1, 2]);
        assert_eq!(parsed(&["--seconds", "0.5"]).time, Duration::from_millis(500));
    }

    #[test]
    fn table_and_json_carry_the_same_numbers() {
        let latency = LatencyReport { p50_ns: 20_500, ..LatencyReport::default() };
        let report = BenchReport {
            operations: 100,
            reads: 70,
            time: Duration::from_secs(1),
            bytes: 409_600,
            area: 1 << 20,
            latency,
            read_latency: Some(latency),
            write_latency: Some(latency),
            server_cpu: Some(Duration::from_millis(1)),
        };
        let text = table(&report);
        assert!(text.contains("100 IOPS") && text.contains("10.00 us") && text.contains("writes"), "{text}");
        let value = json(&NbdUri::tcp("h", 1, "v"), &report);
        assert_eq!(value["latency_us"]["p50"], 20.5);
        assert_eq!(value["server_cpu_us_per_operation"], 10.0);
        assert_eq!(value["uri"], "nbd://h:1/v");
    }
}
