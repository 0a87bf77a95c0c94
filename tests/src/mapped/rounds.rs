//! Rounds of failures under a mapped file system with databases: the primary is killed, moved, restarted cleanly, the
//! keeper is killed and started again. What holds after each: everything goes on; after all: nothing that was reported
//! is lost, no layer was told of an error, both replicas are equal.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::device::check_kernel_log;
use super::{Load, Mapped, MappedFs};
use crate::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use crate::mount::FileSystem;
use crate::report::{human, measured, step};
use crate::{Cluster, ClusterOptions, evidence};

const SIZE: u64 = 384 << 20;
/// Time without a keeper.
const UNKEPT: Duration = Duration::from_millis(500);

/// What is done in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL to the primary.
    Kill,
    /// A planned change of primary.
    Move,
    /// SIGKILL to the keeper, and another one.
    Keeper,
    /// A clean stop and start of a node, primary and secondary in turn.
    Reboot,
    /// A change of primary while nobody keeps the device.
    Unkept,
}

const FAULTS: [Fault; 5] = [Fault::Kill, Fault::Move, Fault::Keeper, Fault::Reboot, Fault::Unkept];

/// Does `count` rounds of each fault with a file system of this kind, and prints the pauses.
///
/// # Errors
/// What did not hold.
pub fn run(kind: FileSystem, count: u32) -> Result<()> {
    let name = format!("vm_map {}", kind.name());
    let mut cluster = Cluster::start(ClusterOptions::sized(SIZE))?;
    crate::proc::run_ok("chmod", &["755".as_ref(), cluster.dir().as_os_str()], SYNC_LIMIT)?;
    let scratch = cluster.dir().join("scratch");
    std::fs::create_dir_all(&scratch)?;
    let mut mapped = Mapped::start(&cluster.dir().join("n1/node.toml"), cluster.dir())?;
    MappedFs::format(kind, mapped.device())?;
    let at = Path::new("/mnt/mapped");
    let fs = MappedFs::mount(kind, mapped.device(), at)?;
    let load = Load::start(at, &scratch)?;
    step(&name, "PostgreSQL, SQLite and a writer run on the mapped volume");
    if let Err(reason) = faults(&name, count, &mut cluster, &mut mapped, &load) {
        // Before anything is ended, and then everything that waits for the device: it would wait for ever.
        let kept = evidence::keep(&name.replace(' ', "_"), Some(&cluster), &format!("{reason:#}"));
        let after = [kept.err(), mapped.give_up().err()].into_iter().flatten();
        return Err(after.fold(reason, |reason, also| reason.context(format!("and then: {also:#}"))));
    }
    let reported = load.end()?;
    fs.check()?;
    mapped.unmap()?;
    check_kernel_log()?;
    cluster.wait_in_sync(SYNC_LIMIT)?;
    cluster.compare_replicas()?;
    measured(&name, &format!("{reported} transactions reported committed, all there; replicas equal"));
    Ok(())
}

fn faults(name: &str, count: u32, cluster: &mut Cluster, mapped: &mut Mapped, load: &Load) -> Result<()> {
    for fault in FAULTS {
        let mut pauses = Vec::new();
        for number in 0..count {
            load.longest_pause()?;
            let done = act(fault, number, cluster, mapped);
            done.with_context(|| format!("{fault:?} {number}; the keeper said: {}", mapped.said()))?;
            load.wait_progress().with_context(|| format!("{fault:?} {number}: {}", mapped.said()))?;
            pauses.push(load.longest_pause()?);
            cluster.wait_in_sync(SYNC_LIMIT)?;
        }
        pauses.sort_unstable();
        let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
        let pauses = format!("pause {} at the median, {} at most", human(median), human(longest));
        measured(name, &format!("{fault:?} x {count}: {pauses}"));
    }
    Ok(())
}

fn act(fault: Fault, number: u32, cluster: &mut Cluster, mapped: &mut Mapped) -> Result<()> {
    let primary = cluster.wait_primary(FAILOVER_LIMIT)?;
    let other = cluster.secondary()?;
    match fault {
        Fault::Kill => {
            cluster.kill(&primary)?;
            ensure!(cluster.wait_primary(FAILOVER_LIMIT)? == other, "another node takes over");
            cluster.restart(&primary)
        }
        Fault::Move => cluster.cli(&primary, &["move", "vol0", "--to", &other])?.ok().map(drop),
        Fault::Keeper => {
            mapped.abandon()?;
            std::thread::sleep(UNKEPT);
            mapped.keep()
        }
        Fault::Reboot => {
            let node = if number.is_multiple_of(2) { &primary } else { &other };
            cluster.stop_node(node)?;
            cluster.wait_primary(FAILOVER_LIMIT)?;
            cluster.restart(node)
        }
        Fault::Unkept => {
            mapped.abandon()?;
            cluster.cli(&primary, &["move", "vol0", "--to", &other])?.ok()?;
            std::thread::sleep(UNKEPT);
            mapped.keep()
        }
    }
}
