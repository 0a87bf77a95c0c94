//! Memory and latency against how much of its bitmap a missing peer makes mixed: three replicas of 1 TiB, the
//! third one missing, a block dirty in so many of the bitmap's groups. Then the second one leaves and returns,
//! and takes the bitmap for the third one over.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use blkrepl_tests::client::{Link, Request};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::usage::Memory;
use blkrepl_tests::wait::wait_for;

use super::area::Area;
use super::bed::{Bed, PRIMARY, Target};
use super::chart::{Axis, Chart};
use super::report::{Report, mib};
use super::size::{GROUP_BYTES, dirty_groups};
use super::{ScaleOptions, TIB};

const VOLUME: &str = "dirty";
/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(40);

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let mut bed = Bed::start(&options.dir, 3)?;
    bed.volume(VOLUME, TIB, &["n1", "n2", "n3"])?;
    bed.lose("n3", &[VOLUME])?;
    let target = bed.target(VOLUME, TIB)?;
    target.fill(Area::Hot)?;
    let x = Axis::linear("groups of the bitmap that are mixed");
    let mut memory =
        Chart::new("dirty-memory", "1 TiB, a peer missing: resident memory", x, Axis::linear("MiB"));
    let mut latency = Chart::new(
        "dirty-latency",
        "1 TiB, a peer missing: 4 KiB writes to a hot area",
        x,
        Axis::linear("microseconds"),
    );
    let groups = TIB / GROUP_BYTES;
    let percents: &[u64] = if options.quick { &[0, 10] } else { &[0, 25, 50, 75, 100] };
    for percent in percents {
        dirty_groups(&target, groups * percent / 100)?;
        let at = *percent as f64;
        memory.point("primary", at, mib(bed.memory(PRIMARY)?.resident));
        memory.point("secondary", at, mib(bed.memory("n2")?.resident));
        for depth in [1, 32] {
            let run = target.write(Area::Hot, depth, options.time)?;
            latency.point(&format!("p50, {depth} in flight"), at, run.latency.p50_ns as f64 / 1e3);
        }
    }
    report.chart(memory);
    report.chart(latency);
    let runs = if options.quick { 1 << 14 } else { 1 << 19 };
    fragment(&target, runs)?;
    exchange(&mut bed, runs, report)?;
    bed.stop()
}

/// Makes so many single blocks dirty, every second one, without touching any content: they are trimmed.
fn fragment(target: &Target, runs: u64) -> Result<()> {
    const IN_FLIGHT: u64 = 64;
    let mut link = Link::connect(&target.uri.to_string(), LIMIT)?;
    for run in 0..runs + IN_FLIGHT {
        if run >= IN_FLIGHT {
            link.next(LIMIT)?.result.map_err(|reason| anyhow!("a trim failed: {reason}"))?;
        }
        if run < runs {
            link.submit(&Request::Trim { offset: run * 8192, len: 4096 })?;
        }
    }
    Ok(())
}

/// The second replica leaves, returns, and is in sync again with the bitmap for the third.
fn exchange(bed: &mut Bed, runs: u64, report: &mut Report) -> Result<()> {
    let before = bed.cluster.status_of(PRIMARY)?.volume(VOLUME)?.epoch;
    // Three of four voters are needed, so it returns before it is removed.
    bed.cluster.stop_node("n2")?;
    Memory::reset_peak(bed.cluster.process(PRIMARY)?)?;
    let resident = mib(bed.memory(PRIMARY)?.resident);
    report.number(&format!("before the exchange of {runs} runs at 1 TiB: primary resident"), resident, "MiB");
    bed.cluster.restart("n2")?;
    wait_for("the second replica to leave and to join", SYNC_LIMIT, || {
        let status = bed.cluster.status_of(PRIMARY)?;
        let volume = status.volume(VOLUME)?;
        let (members, epoch) = (&volume.in_sync, volume.epoch);
        ensure!(
            epoch > before && members.iter().any(|n| n == "n2"),
            "{members:?} at epoch {epoch}, was {before}"
        );
        Ok(())
    })?;
    // What was needed only for the exchange has gone back to the system by then.
    std::thread::sleep(Duration::from_secs(5));
    for (node, name) in [(PRIMARY, "primary"), ("n2", "secondary")] {
        let memory = bed.memory(node)?;
        report.number(
            &format!("after a bitmap exchange at 1 TiB: {name} resident"),
            mib(memory.resident),
            "MiB",
        );
        report.number(&format!("after a bitmap exchange at 1 TiB: {name} peak"), mib(memory.peak), "MiB");
    }
    Ok(())
}
