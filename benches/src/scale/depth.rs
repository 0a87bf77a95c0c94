//! Latency, CPU time and memory against requests in flight, on one connection, within a hot area.

use std::time::Duration;

use anyhow::Result;
use blkrepl_nbd::bench::{BenchOptions, Job, Pattern, run};

use super::area::Area;
use super::bed::{Bed, PRIMARY, Target, WRITES};
use super::chart::{Axis, Chart};
use super::report::{Report, mib};
use super::{GIB, ScaleOptions};

const DEPTHS: [u16; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// Longer than memory lies free before it goes back to the system.
const REST: Duration = Duration::from_secs(6);

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let bed = Bed::start(&options.dir, 2)?;
    let target = bed.volume("depth", GIB, &["n1", "n2"])?;
    target.fill(Area::Hot)?;
    let x = Axis::doubling("writes in flight");
    let mut latency =
        Chart::new("depth-latency", "4 KiB random writes: latency", x, Axis::log("microseconds"));
    let mut cpu =
        Chart::new("depth-cpu", "4 KiB random writes: CPU of all nodes", x, Axis::linear("us each"));
    let mut memory =
        Chart::new("depth-memory", "memory right after a load", x, Axis::linear("MiB of the primary"));
    for depth in DEPTHS {
        let seen = target.write(Area::Hot, usize::from(depth), options.time)?;
        let x = f64::from(depth);
        latency.point("p50", x, seen.latency.p50_ns as f64 / 1e3);
        latency.point("p99", x, seen.latency.p99_ns as f64 / 1e3);
        cpu.point("CPU", x, seen.server_cpu_us().unwrap_or(f64::NAN));
        memory.point("4 KiB writes", x, mib(bed.memory(PRIMARY)?.resident));
        report.number(&format!("writes per second at depth {depth}"), seen.iops(), "/s");
        let large = Job { block_size: 64 << 10, ..WRITES };
        let load =
            BenchOptions { area: Some(32 << 20), ..target.options(large, usize::from(depth), options.time) };
        run(&target.uri, &load)?;
        memory.point("64 KiB writes", x, mib(bed.memory(PRIMARY)?.resident));
    }
    after_large_writes(&bed, &target, options, report)?;
    report.chart(latency);
    report.chart(cpu);
    report.chart(memory);
    bed.stop()
}

/// What a load of large writes leaves behind in memory.
fn after_large_writes(bed: &Bed, target: &Target, options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let job = Job { pattern: Pattern::Sequential, block_size: 1 << 20, ..WRITES };
    let load = BenchOptions { area: Some(32 << 20), ..target.options(job, 32, options.time) };
    let rate = run(&target.uri, &load)?.megabytes_per_second();
    report.number("1 MiB writes, 32 in flight", rate, "MB/s");
    report.number("right after them: primary resident", mib(bed.memory(PRIMARY)?.resident), "MiB");
    std::thread::sleep(REST);
    report.number("6 s later: primary resident", mib(bed.memory(PRIMARY)?.resident), "MiB");
    Ok(())
}
