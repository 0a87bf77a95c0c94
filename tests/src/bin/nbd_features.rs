//! Prints the table of `docs/nbd.md` that sets blkrepl beside nbdkit and qemu-nbd. It starts a cluster of its own
//! and both other servers, asks each with `nbdinfo --json`, and ends them all. Writes no file that stays.

use anyhow::{Result, bail};
use blkrepl_tests::cluster::{SYNC_LIMIT, scratch_dir};
use blkrepl_tests::features::{OtherServer, features, table};
use blkrepl_tests::proc::missing;
use blkrepl_tests::{Cluster, ClusterOptions};

const SIZE: u64 = 64 << 20;

fn main() -> Result<()> {
    if let Some(reason) = missing(&["nbdinfo", "nbdkit", "qemu-nbd"]) {
        bail!("{reason}");
    }
    let mut cluster = Cluster::start(ClusterOptions::sized(SIZE))?;
    let primary = cluster.node(&cluster.wait_primary(SYNC_LIMIT)?)?;
    let mut servers = vec![("blkrepl".to_owned(), features(primary.unix()?)?)];
    let scratch = scratch_dir()?;
    for other in [OtherServer::nbdkit(scratch.path(), SIZE)?, OtherServer::qemu_nbd(scratch.path(), SIZE)?] {
        servers.push((other.name.clone(), features(&other.uri)?));
    }
    print!("{}", table(&servers));
    cluster.stop()
}
