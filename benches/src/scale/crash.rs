//! Time until a volume of 1 TiB is served again after all nodes were killed with writes in flight.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use blkrepl_nbd::bench::run;
use blkrepl_tests::client::Link;
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::wait::wait_for;

use super::bed::{Bed, PRIMARY, WRITES};
use super::report::Report;
use super::{ScaleOptions, TIB};

const VOLUME: &str = "crash";
const ROUNDS: usize = 3;
/// Load before the kill.
const LOAD: Duration = Duration::from_secs(2);

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let mut bed = Bed::start(&options.dir, 2)?;
    bed.volume(VOLUME, TIB, &["n1", "n2"])?;
    let nodes: Vec<String> = bed.cluster.nodes()?.into_iter().map(|node| node.name).collect();
    for round in 0..if options.quick { 1 } else { ROUNDS } {
        let (serving, in_sync) = once(&mut bed, &nodes)?;
        report.number(&format!("round {round}: killed until the first write is answered"), serving, "s");
        report.number(&format!("round {round}: killed until all is in sync"), in_sync, "s");
    }
    bed.stop()
}

/// Seconds from the start of the first node.
fn once(bed: &mut Bed, nodes: &[String]) -> Result<(f64, f64)> {
    let served = |bed: &Bed| -> Result<String> {
        let status = bed.cluster.status_of(PRIMARY)?;
        let primary = status.volume(VOLUME)?.primary.clone().ok_or_else(|| anyhow!("no primary"))?;
        Ok(bed.cluster.node(&primary)?.unix()?.replace("/vol0?", &format!("/{VOLUME}?")))
    };
    let uri = wait_for("a primary", FAILOVER_LIMIT, || served(bed))?;
    let load = std::thread::spawn({
        let mut options = bed.target(VOLUME, TIB)?.options(WRITES, 32, SYNC_LIMIT);
        options.pids.clear();
        let uri = uri.parse()?;
        // It ends when the server dies.
        move || run(&uri, &options).map(drop)
    });
    std::thread::sleep(LOAD);
    bed.cluster.kill_at_once(nodes)?;
    let began = Instant::now();
    let _ended = load.join();
    for node in nodes {
        bed.cluster.restart(node)?;
    }
    wait_for("a write to be answered", SYNC_LIMIT, || {
        let mut link = Link::connect(&served(bed)?, Duration::from_secs(2))?;
        link.write(0, &[7; 4096])?;
        Ok(())
    })?;
    let serving = began.elapsed().as_secs_f64();
    bed.cluster.wait_volumes_in_sync(PRIMARY, &[VOLUME], SYNC_LIMIT)?;
    Ok((serving, began.elapsed().as_secs_f64()))
}
