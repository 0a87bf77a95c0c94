//! A forced promotion of this copy that an operator has asked for, from the judgement of the copy to the commit.
//!
//! In between the old primary's lease is waited out, and that primary may be back and begin a resync into this
//! copy. The operator took the loss that the copy had when it was judged: so until the force is decided no resync
//! begins, and a copy that was half overwritten all the same is not promoted unless that was asked for [R17].
//!
//! Never does: judging how much a force loses, or proposing it (the operator's side of the node does).

use std::time::Duration;

use crate::types::{ConfigView, Epoch, Nanos, ReplicaReport};

use super::Replica;

/// How long a resync waits for a force whose fate nobody tells. Longer than it takes to submit one with retries.
const FORCE_MAX: Duration = Duration::from_secs(30);

/// A force that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskedForce {
    /// It takes effect at this epoch or not at all.
    epoch: Epoch,
    since: Nanos,
    /// A copy that a resync left half done was taken, too.
    discard_inconsistent: bool,
}

impl Replica {
    /// Keeps this copy as it is for a forced promotion, and says what it is. `discard_inconsistent`: also if a
    /// resync into it began and did not end. [`Self::end_force`] tells that nothing came of it; else a newer epoch
    /// ends it, or 30 s.
    ///
    /// # Errors
    /// Why this copy cannot be promoted.
    pub fn begin_force(&mut self, now: Nanos, discard_inconsistent: bool) -> Result<ReplicaReport, String> {
        self.advance(now, true);
        if let Some(failure) = &self.failure {
            return Err(format!("it failed: {failure}"));
        }
        let report = self.report();
        if report.inconsistent && !discard_inconsistent {
            return Err(
                "a resync into it began and did not end: its content is a mix of old and new and no \
                 state that the volume ever had; only if no other copy is left, add --discard-inconsistent"
                    .into(),
            );
        }
        let epoch = self.config.as_ref().map_or(Epoch(0), |c| c.epoch);
        self.asked_force = Some(AskedForce { epoch, since: now, discard_inconsistent });
        self.maintain();
        Ok(report)
    }

    /// The force that was asked for is refused: resyncs may begin again.
    pub fn end_force(&mut self, now: Nanos) {
        self.advance(now, true);
        self.asked_force = None;
        self.maintain();
    }

    /// True while this copy has to stay as it is.
    pub(super) fn awaits_force(&self) -> bool {
        let epoch = self.config.as_ref().map_or(Epoch(0), |c| c.epoch);
        self.asked_force.is_some_and(|f| f.epoch == epoch && self.now < f.since.after(FORCE_MAX))
    }

    /// True if the force that `config` shows took a whole copy, and this one is not whole any more.
    pub(super) fn changed_since_force(&self, config: &ConfigView) -> bool {
        let whole =
            self.asked_force.is_some_and(|f| !f.discard_inconsistent && config.epoch == f.epoch.next());
        whole && self.begins_lineage(config) && self.store.superblock().inconsistent.is_some()
    }
}
