//! Latency, CPU and memory against the size of the volume: two replicas in sync, and memory with the second one
//! missing and lacking a block in every group of the bitmap, which is the most that a bitmap ever takes.

use std::path::Path;

use anyhow::Result;
use blkrepl_nbd::bench::{BenchOptions, Job, Pattern, Spread, run};

use super::area::Area;
use super::bed::{Bed, PRIMARY, Target, WRITES};
use super::chart::{Axis, Chart};
use super::report::{Report, mib};
use super::{GIB, ScaleOptions, TIB};

const SIZES: [u64; 4] = [GIB, 64 * GIB, TIB, 16 * TIB];
/// Of `--quick`.
const SIZES_QUICK: [u64; 2] = [GIB, TIB];
/// Bytes of a volume that one group of the dirty bitmap stands for.
pub(super) const GROUP_BYTES: u64 = 30_720 * 4096;
const VOLUME: &str = "size";

struct Charts {
    latency: Chart,
    latency_32: Chart,
    cpu: Chart,
    memory: Chart,
}

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let x = Axis::bytes("volume size");
    let us = Axis::linear("microseconds");
    let mut charts = Charts {
        latency: Chart::new("size-latency-d1", "4 KiB random writes, one in flight: median latency", x, us),
        latency_32: Chart::new(
            "size-latency-d32",
            "4 KiB random writes, 32 in flight: median latency",
            x,
            us,
        ),
        cpu: Chart::new("size-cpu-d32", "4 KiB random writes, 32 in flight: CPU of all nodes each", x, us),
        memory: Chart::new("size-memory", "Resident memory of a process", x, Axis::log("MiB")),
    };
    let sizes: &[u64] = if options.quick { &SIZES_QUICK } else { &SIZES };
    for size in sizes {
        in_sync(options, *size, &mut charts, report)?;
        one_missing(&options.dir, *size, &mut charts, report)?;
    }
    let Charts { latency, latency_32, cpu, memory } = charts;
    [latency, latency_32, cpu, memory].into_iter().for_each(|chart| report.chart(chart));
    Ok(())
}

fn in_sync(options: &ScaleOptions, size: u64, charts: &mut Charts, report: &mut Report) -> Result<()> {
    let bed = Bed::start(&options.dir, 2)?;
    if size == SIZES[0] {
        report.number("a data node without volumes: resident", mib(bed.memory(PRIMARY)?.resident), "MiB");
    }
    let target = bed.volume(VOLUME, size, &["n1", "n2"])?;
    let x = size as f64;
    for area in Area::ALL {
        target.fill(area)?;
        let one = target.write(area, 1, options.time)?;
        let many = target.write(area, 32, options.time)?;
        charts.latency.point(area.word(), x, one.latency.p50_ns as f64 / 1e3);
        charts.latency_32.point(area.word(), x, many.latency.p50_ns as f64 / 1e3);
        charts.cpu.point(area.word(), x, many.server_cpu_us().unwrap_or(f64::NAN));
    }
    charts.memory.point("primary", x, mib(bed.memory(PRIMARY)?.resident));
    charts.memory.point("secondary", x, mib(bed.memory("n2")?.resident));
    charts.memory.point("witness", x, mib(bed.witness_memory()?.resident));
    bed.stop()
}

fn one_missing(dir: &Path, size: u64, charts: &mut Charts, report: &mut Report) -> Result<()> {
    let mut bed = Bed::start(dir, 2)?;
    bed.volume(VOLUME, size, &["n1", "n2"])?;
    bed.lose("n2", &[VOLUME])?;
    let target = bed.target(VOLUME, size)?;
    let before = bed.memory(PRIMARY)?;
    dirty_groups(&target, size / GROUP_BYTES)?;
    let after = bed.memory(PRIMARY)?;
    charts.memory.point("primary, a peer missing, bitmap at its most", size as f64, mib(after.resident));
    let tib = size as f64 / TIB as f64;
    report.number(
        &format!("bitmap at its most, {tib:.3} TiB"),
        mib(after.own.saturating_sub(before.own)),
        "MiB",
    );
    bed.stop()
}

/// Writes one block in each of the first `groups` groups of the dirty bitmap.
pub(super) fn dirty_groups(target: &Target, groups: u64) -> Result<()> {
    if groups == 0 {
        return Ok(());
    }
    let job = Job { pattern: Pattern::Sequential, ..WRITES };
    let limit = std::time::Duration::from_secs(900);
    let options = BenchOptions {
        warm_up: std::time::Duration::ZERO,
        count: Some(groups),
        area: Some(groups * 4096),
        spread: Some(Spread { piece: 4096, distance: GROUP_BYTES }),
        ..target.options(job, 128, limit)
    };
    run(&target.uri, &options)?;
    Ok(())
}
