//! What a simulated process has from outside: its clock, its disk, the network, chance from the seed.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use blkrepl_engine::control::{ClusterState, Environment, Listener, Pending, StoreDir, StoreWorker, Stream};
use blkrepl_engine::types::Nanos;

use crate::clock::{MS, Time, US};
use crate::rng::Rng;

use super::disk::Disk;
use super::host::{Process, lock};
use super::net::Net;

/// Takes what nodes apply: who, and the state after the entry.
pub(crate) type Tap = Arc<Mutex<Vec<(u64, Arc<ClusterState>)>>>;

/// The environment of one process.
pub(crate) struct SimEnv {
    pub(crate) node: u64,
    pub(crate) process: Arc<Process>,
    pub(crate) net: Net,
    pub(crate) disk: Disk,
    /// How slow the disk is at times, per thousand jobs.
    pub(crate) slow: u64,
    /// What the first random number is, which names the run.
    pub(crate) nonce: Mutex<Option<u64>>,
    pub(crate) tap: Tap,
}

impl Environment for SimEnv {
    fn now(&self) -> Nanos {
        self.process.local()
    }

    fn random(&self) -> io::Result<u128> {
        let high = self.process.draw(Rng::next);
        let given = lock(&self.nonce).take();
        let low = given.unwrap_or_else(|| self.process.draw(Rng::next));
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    fn connect(&self, addr: String) -> Pending<'static, io::Result<Box<dyn Stream>>> {
        self.net.connect(self.node, &addr)
    }

    fn listen(&self, _: SocketAddr) -> Pending<'static, io::Result<Box<dyn Listener>>> {
        let listener = self.net.listen(self.node);
        Box::pin(std::future::ready(Ok(listener)))
    }

    fn store_dir(&self, _: &Path) -> Box<dyn StoreDir> {
        Box::new(self.disk.dir())
    }

    fn start_store(&self, worker: StoreWorker) -> io::Result<()> {
        let (process, slow) = (Arc::clone(&self.process), self.slow);
        self.process.start(worker.run(move || {
            let taken = process.draw(|rng| job_time(rng, slow));
            process.pause(taken)
        }));
        Ok(())
    }

    fn applied(&self, state: &ClusterState) {
        lock(&self.tap).push((self.node, Arc::new(state.clone())));
    }
}

/// How long a job of the store takes.
fn job_time(rng: &mut Rng, slow: u64) -> Time {
    if rng.chance(slow) { rng.skewed(MS, 400 * MS) } else { rng.skewed(20 * US, 2 * MS) }
}
