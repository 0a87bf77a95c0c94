//! Memory, idle CPU and latency against the number of volumes on one node; then 256 connections to 64 volumes.

use std::time::Duration;

use anyhow::{Result, anyhow};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, run};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::usage::cpu_time;

use super::bed::{Bed, PRIMARY, Target, WRITES};
use super::chart::{Axis, Chart};
use super::report::{Report, mib};
use super::{GIB, ScaleOptions};

const COUNTS: [usize; 4] = [1, 4, 16, 64];
const COUNTS_QUICK: [usize; 2] = [1, 4];
/// Connections to all volumes together.
const CONNECTIONS: usize = 256;
/// Bytes that are touched of each volume.
const TOUCHED: u64 = 256 << 10;
/// How long the idle cluster is watched.
const IDLE: Duration = Duration::from_secs(4);

struct Charts {
    memory: Chart,
    idle: Chart,
    latency: Chart,
}

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let bed = Bed::start(&options.dir, 2)?;
    let x = Axis::doubling("volumes");
    let mut charts = Charts {
        memory: Chart::new("volumes-memory", "Resident memory, idle volumes", x, Axis::linear("MiB")),
        idle: Chart::new("volumes-idle", "CPU of a node with idle volumes", x, Axis::linear("ms per second")),
        latency: Chart::new(
            "volumes-latency",
            "4 KiB writes to one volume, the others idle: median",
            x,
            Axis::linear("microseconds"),
        ),
    };
    let counts: &[usize] = if options.quick { &COUNTS_QUICK } else { &COUNTS };
    let mut targets = Vec::new();
    for count in counts {
        while targets.len() < *count {
            let name = format!("v{:02}", targets.len());
            bed.cluster.create_volume(&name, GIB, &["n1", "n2"])?;
            targets.push((bed.target(&name, GIB)?, name));
        }
        let names: Vec<&str> = targets.iter().map(|(_, name)| name.as_str()).collect();
        bed.cluster.wait_volumes_in_sync(PRIMARY, &names, SYNC_LIMIT)?;
        let (first, _) = targets.first().ok_or_else(|| anyhow!("no volume"))?;
        at_count(&bed, first, *count, options, &mut charts)?;
    }
    connections(&targets, options, report)?;
    for (node, name) in [(PRIMARY, "primary"), ("n2", "secondary")] {
        let memory = bed.memory(node)?;
        report.number(&format!("after the connections: {name} resident"), mib(memory.resident), "MiB");
        report.number(&format!("after the connections: {name} peak"), mib(memory.peak), "MiB");
    }
    let Charts { memory, idle, latency } = charts;
    [memory, idle, latency].into_iter().for_each(|chart| report.chart(chart));
    bed.stop()
}

fn at_count(
    bed: &Bed,
    first: &Target,
    count: usize,
    options: &ScaleOptions,
    charts: &mut Charts,
) -> Result<()> {
    let x = count as f64;
    std::thread::sleep(IDLE / 2);
    let pids = [bed.cluster.process(PRIMARY)?, bed.cluster.process("n2")?];
    let before = [cpu_time(pids[0])?, cpu_time(pids[1])?];
    std::thread::sleep(IDLE);
    for (at, name) in ["primary", "secondary"].into_iter().enumerate() {
        let used = cpu_time(pids[at])?.saturating_sub(before[at]);
        charts.idle.point(name, x, used.as_secs_f64() * 1e3 / IDLE.as_secs_f64());
    }
    charts.memory.point("primary", x, mib(bed.memory(PRIMARY)?.resident));
    charts.memory.point("secondary", x, mib(bed.memory("n2")?.resident));
    charts.memory.point("witness", x, mib(bed.witness_memory()?.resident));
    for depth in [1, 32] {
        let run = first.best(&load(first, depth, 1, options.time / 5))?;
        charts.latency.point(&format!("{depth} in flight"), x, run.latency.p50_ns as f64 / 1e3);
    }
    Ok(())
}

fn load(target: &Target, depth: usize, connections: usize, time: Duration) -> BenchOptions {
    BenchOptions { area: Some(TOUCHED), connections, ..target.options(WRITES, depth, time) }
}

/// All connections at once, each with one write in flight.
fn connections(targets: &[(Target, String)], options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let each = CONNECTIONS / targets.len();
    let runs: Vec<Result<BenchReport>> = std::thread::scope(|scope| {
        let loads = targets.iter().map(|(target, _)| {
            scope.spawn(move || Ok(run(&target.uri, &load(target, 1, each, options.time))?))
        });
        let threads: Vec<_> = loads.collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a load panicked")))).collect()
    });
    let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
    let mut medians: Vec<u64> = runs.iter().map(|run| run.latency.p50_ns).collect();
    medians.sort_unstable();
    let slowest = runs.iter().map(|run| run.latency.max_ns).max().unwrap_or(0);
    let rate: f64 = runs.iter().map(BenchReport::iops).sum();
    let what = format!("{} connections to {} volumes", each * targets.len(), targets.len());
    report.number(&format!("{what}: writes per second"), rate, "/s");
    report.number(
        &format!("{what}: median of the volumes' medians"),
        medians[medians.len() / 2] as f64 / 1e3,
        "us",
    );
    report.number(&format!("{what}: slowest write"), slowest as f64 / 1e3, "us");
    Ok(())
}
