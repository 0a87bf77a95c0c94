//! The verifying client: several connections write blocks that say what they are, through failovers,
//! and everything that is read back must fit one order of all operations.
//!
//! What it demands of a volume, from the clients' side alone (never from a node's inside):
//! an acknowledged write is there until something newer is; an unacknowledged one may be, or not, but
//! not after its replay was acknowledged [R24]; a block is never torn, never another block's, never
//! from nowhere; reads never go back; after a loss of every node at once, what was flushed is there.
//! A replay after a reconnect is a new operation with a new number. The verifier retries nothing
//! that the volume answered with an error: an error reply is a finding.
//!
//! Units are the pieces of the volume that it keeps account of, 4096 bytes by default; 512 makes
//! neighbours share a block, so that partial blocks are covered. *Private* units belong to one
//! worker ([`model`]); *shared* ones are written by all at once ([`history`]).

pub mod history;
pub mod load;
pub mod model;
pub mod pattern;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::bits::fresh_seed;
use crate::client::Link;
use crate::wait::wait_until;
use history::{Access, HistoryOp};
use load::{Shared, Worker, WorkerEnd};
use model::UnitModel;
use pattern::{Pattern, Value};

/// What load a verifier makes.
#[derive(Clone, Debug)]
pub struct VerifierOptions {
    /// Everything random follows from it.
    pub seed: u64,
    /// Connections, each driven by a thread of its own.
    pub workers: u64,
    /// Requests in flight per connection.
    pub depth: usize,
    /// Bytes of a unit: 4096, or 512 for partial blocks.
    pub unit_len: usize,
    /// Units that all workers write.
    pub shared_units: u64,
    /// Units of each worker alone.
    pub private_units: u64,
    /// Byte on the volume where the area begins, a multiple of 4096.
    pub offset: u64,
    /// Most units in one request.
    pub request_units_max: u64,
    /// Pause of a worker between requests, to make a mild load.
    pub pause: Duration,
    /// Longest wait for one answer on a connection that looks alive; then it is reset and replayed.
    pub answer_limit: Duration,
    /// Longest time for connecting to one node.
    pub connect_limit: Duration,
}

impl Default for VerifierOptions {
    fn default() -> Self {
        Self {
            seed: fresh_seed(),
            workers: 4,
            depth: 8,
            unit_len: 4096,
            shared_units: 512,
            private_units: 512,
            offset: 0,
            request_units_max: 16,
            pause: Duration::from_micros(200),
            answer_limit: Duration::from_secs(40),
            connect_limit: Duration::from_secs(5),
        }
    }
}

impl VerifierOptions {
    fn units(&self) -> u64 {
        self.shared_units + self.private_units * self.workers
    }

    /// Bytes of the area.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.units() * self.unit_len as u64
    }

    /// True if there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units() == 0
    }
}

/// Keeps account of an area of a volume over any number of loads.
pub struct Verifier {
    options: VerifierOptions,
    targets: Vec<String>,
    shared: Arc<Shared>,
    models: Vec<Vec<UnitModel>>,
    base: Vec<Value>,
    histories: Vec<Vec<HistoryOp>>,
    rounds: u64,
}

/// What one load did.
#[derive(Clone, Debug, Default)]
pub struct LoadReport {
    /// Acknowledged requests.
    pub acked: u64,
    /// Requests that were in flight when a connection broke.
    pub unknown: u64,
    /// Connections made.
    pub connects: u64,
    /// Longest time that a worker went without an answer, reconnects included.
    pub stall_max: Duration,
    /// Error replies of the volume, with what they answered.
    pub errors: Vec<String>,
}

/// A load that runs.
pub struct Running<'a> {
    verifier: &'a mut Verifier,
    threads: Vec<std::thread::JoinHandle<WorkerEnd>>,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
}

impl Verifier {
    /// A verifier of an area that was never written (reads as zeroes).
    #[must_use]
    pub fn new(targets: Vec<String>, options: VerifierOptions) -> Self {
        let shared = Arc::new(Shared::new(Pattern::new(options.seed, options.unit_len)));
        let model = vec![UnitModel::default(); usize::try_from(options.private_units).unwrap_or(0)];
        let models = vec![model; usize::try_from(options.workers).unwrap_or(0)];
        let base = vec![Value::Zero; usize::try_from(options.shared_units).unwrap_or(0)];
        crate::report::step("verifier", &format!("seed {} (BLKREPL_SEED repeats it)", options.seed));
        Self { options, targets, shared, models, base, histories: Vec::new(), rounds: 0 }
    }

    /// Starts the workers.
    pub fn start(&mut self) -> Running<'_> {
        let stop = Arc::new(AtomicBool::new(false));
        let acked = Arc::new(AtomicU64::new(0));
        self.rounds += 1;
        let mut threads = Vec::new();
        for (index, models) in self.models.iter_mut().enumerate() {
            let worker = Worker::new(
                index as u64,
                self.rounds,
                self.options.clone(),
                self.targets.clone(),
                Arc::clone(&self.shared),
                std::mem::take(models),
                Arc::clone(&stop),
                Arc::clone(&acked),
            );
            threads.push(std::thread::spawn(move || worker.run()));
        }
        Running { verifier: self, threads, stop, acked }
    }

    /// Reads the whole area through whoever is primary and checks everything since the last call.
    ///
    /// # Errors
    /// The first finding: a lost write, a torn or foreign block, a read that went back.
    pub fn verify(&mut self) -> Result<()> {
        self.read_back(false)
    }

    /// The same after every node was ended at once: what was acknowledged but not flushed may be gone.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_flushed(&mut self) -> Result<()> {
        self.read_back(true)
    }

    fn read_back(&mut self, after_power_loss: bool) -> Result<()> {
        let mut link = connect_any(&self.targets, Duration::from_secs(60))?;
        let flushed = self.shared.flushed_before();
        let mut reads = Vec::new();
        let unit_len = self.options.unit_len as u64;
        let chunk = (1 << 20) / unit_len;
        let mut at = 0;
        while at < self.options.units() {
            let count = chunk.min(self.options.units() - at);
            let start = self.shared.tick();
            let bytes = link
                .read(self.options.offset + at * unit_len, u32::try_from(count * unit_len)?)
                .with_context(|| format!("read units {at}..{} back", at + count))?;
            let end = self.shared.tick();
            for (index, piece) in bytes.chunks_exact(self.options.unit_len).enumerate() {
                let unit = at + index as u64;
                let value = self.shared.pattern.read(unit, piece).map_err(|damage| anyhow!("{damage}"))?;
                self.settle(unit, value, after_power_loss.then_some(flushed), end)?;
                if unit < self.options.shared_units {
                    let access = Access::Read(value);
                    reads.push(HistoryOp {
                        unit,
                        worker: u64::MAX,
                        access,
                        start,
                        end: Some(end),
                        acked: true,
                    });
                }
            }
            at += count;
        }
        let mut ops: Vec<HistoryOp> = std::mem::take(&mut self.histories).into_iter().flatten().collect();
        if after_power_loss {
            // What was read before the loss need not be what is there after it; each part is checked alone.
            check_shared(&self.base, &ops)?;
        } else {
            ops.extend(reads.iter().copied());
            check_shared(&self.base, &ops)?;
        }
        for read in reads {
            self.base[usize::try_from(read.unit)?] = read.access.value();
        }
        Ok(())
    }

    fn settle(&mut self, unit: u64, value: Value, flushed: Option<u64>, at: u64) -> Result<()> {
        let Some(private) = unit.checked_sub(self.options.shared_units) else {
            return Ok(());
        };
        let worker = usize::try_from(private / self.options.private_units)?;
        let index = usize::try_from(private % self.options.private_units)?;
        let model = &mut self.models[worker][index];
        if let Some(flushed) = flushed {
            model.lose_power(flushed);
        }
        model.observe(value).map_err(|finding| anyhow!("unit {unit} (worker {worker}): {finding}"))?;
        if flushed.is_some() {
            model.read_after_loss(value, at);
        }
        Ok(())
    }

    /// The area's length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.options.len()
    }

    /// True if the area is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.options.is_empty()
    }
}

impl Running<'_> {
    /// Requests acknowledged so far.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// Waits until that many more requests are acknowledged.
    ///
    /// # Errors
    /// After `limit`: the volume does not serve.
    pub fn wait_progress(&self, more: u64, limit: Duration) -> Result<()> {
        let goal = self.acked() + more;
        wait_until(&format!("{more} more acknowledged requests"), limit, || {
            self.acked() >= goal || self.threads.iter().any(std::thread::JoinHandle::is_finished)
        })?;
        // A worker that ended by itself has a finding; stop() tells it.
        Ok(())
    }

    /// No new requests from now on, and no more reads; what is open is answered or replayed.
    pub fn halt(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Ends the load: no new requests, all open ones answered or replayed.
    ///
    /// # Errors
    /// A worker's finding: a damaged block, a read that its own model forbids, no way to reconnect, an
    /// error reply.
    pub fn stop(self) -> Result<LoadReport> {
        let report = self.stop_with_errors()?;
        if let Some(first) = report.errors.first() {
            bail!("{} error replies, first: {first}", report.errors.len());
        }
        Ok(report)
    }

    /// As [`Self::stop`], but error replies are only reported.
    ///
    /// # Errors
    /// As [`Self::stop`], without error replies.
    pub fn stop_with_errors(self) -> Result<LoadReport> {
        self.stop.store(true, Ordering::SeqCst);
        let mut report = LoadReport::default();
        let mut findings = Vec::new();
        for (index, thread) in self.threads.into_iter().enumerate() {
            let end = thread.join().map_err(|_| anyhow!("worker {index} panicked"))?;
            report.acked += end.report.acked;
            report.unknown += end.report.unknown;
            report.connects += end.report.connects;
            report.stall_max = report.stall_max.max(end.report.stall_max);
            report.errors.extend(end.report.errors);
            self.verifier.models[index] = end.models;
            self.verifier.histories.push(end.history);
            if let Some(finding) = end.finding {
                findings.push(format!("worker {index}: {finding}"));
            }
        }
        ensure!(findings.is_empty(), "{}", findings.join("\n"));
        Ok(report)
    }
}

/// Connects to whichever target accepts.
///
/// # Errors
/// After `limit`, with each target's last answer.
pub fn connect_any(targets: &[String], limit: Duration) -> Result<Link> {
    connect_each(targets, Duration::from_secs(5), limit)
}

/// The same, with a limit of its own for each try.
fn connect_each(targets: &[String], each: Duration, limit: Duration) -> Result<Link> {
    crate::wait::wait_for("a node that accepts clients", limit, || {
        let mut answers = Vec::new();
        for target in targets {
            match Link::connect(target, each) {
                Ok(link) => return Ok(link),
                Err(reason) => answers.push(format!("{target}: {reason}")),
            }
        }
        bail!("{}", answers.join("; "))
    })
}

fn check_shared(base: &[Value], ops: &[HistoryOp]) -> Result<()> {
    history::check(base, ops).map_err(|finding| anyhow!("{finding}"))
}
