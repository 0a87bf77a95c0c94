//! What a simulated process has from outside: its clock, its disk, the network, chance from the seed.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use blkrepl_engine::control::{Environment, Listener, Pending, StoreDir, StoreWorker, Stream};
use blkrepl_engine::types::Nanos;

use crate::clock::{MS, Time, US};
use crate::rng::Rng;

use super::disk::Disk;
use super::host::Process;
use super::net::Net;

/// The environment of one process.
pub(crate) struct SimEnv {
    pub(crate) node: u64,
    pub(crate) process: Arc<Process>,
    pub(crate) net: Net,
    pub(crate) disk: Disk,
    /// How slow the disk is at times, per thousand jobs.
    pub(crate) slow: u64,
}

impl Environment for SimEnv {
    fn now(&self) -> Nanos {
        self.process.local()
    }

    fn random(&self) -> io::Result<u128> {
        let high = self.process.draw(Rng::next);
        Ok(u128::from(high) << 64 | u128::from(self.process.draw(Rng::next)))
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
}

/// How long a job of the store takes.
fn job_time(rng: &mut Rng, slow: u64) -> Time {
    if rng.chance(slow) { rng.skewed(MS, 400 * MS) } else { rng.skewed(20 * US, 2 * MS) }
}
