//! An account of what a database reported committed: numbers from 1 on, one transaction each, so that the last one
//! says which must be there after a crash.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow, bail, ensure};

/// Commits numbers one after the other with `commit`, and knows which were reported committed.
pub struct Ledger {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
}

impl Ledger {
    /// `commit(n)` returns true once the transaction that inserts `n` is reported committed; the
    /// ledger ends at the first that is not.
    pub fn start(commit: impl Fn(u64) -> bool + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let committed = Arc::new(AtomicU64::new(0));
        let (ends, counts) = (Arc::clone(&stop), Arc::clone(&committed));
        let thread = std::thread::spawn(move || {
            for number in 1.. {
                if ends.load(Ordering::SeqCst) || !commit(number) {
                    break;
                }
                counts.store(number, Ordering::SeqCst);
            }
        });
        Self { thread: Some(thread), stop, committed }
    }

    /// The last number that was reported committed so far.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::SeqCst)
    }

    /// Ends it; the last number that was reported committed (all below were, too).
    ///
    /// # Errors
    /// If its thread panicked.
    pub fn end(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("a ledger panicked"))?;
        }
        Ok(self.committed())
    }
}

/// Looks at what a database says of an account: how many numbers there are, and the last one, with a space between.
///
/// # Errors
/// If some are missing, or the last is not as far as was reported committed.
pub fn check_counts(found: &str, committed: u64) -> Result<()> {
    let numbers: Vec<u64> = found.split(' ').filter_map(|number| number.parse().ok()).collect();
    let [count, last] = numbers[..] else { bail!("it says {found}") };
    ensure!(count == last && last >= committed, "{committed} reported committed; count and last: {found}");
    Ok(())
}
