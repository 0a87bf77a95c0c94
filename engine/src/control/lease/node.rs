//! The node's side of leases: from sent requests and received grants to "may serve until".

use std::collections::VecDeque;

use crate::types::{Incarnation, LogIndex, Nanos, NodeId, VolumeId};

use super::Grant;

/// Grants that wait for their index at once; beyond, the oldest is dropped (later ones say more).
const PENDING_MAX: usize = 8;

/// What a node may do at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct LeaseSnapshot {
    /// Volumes not excluded may be served before this point.
    pub until: Nanos,
    /// Volumes that the lease does not cover, sorted.
    pub excluded: Vec<VolumeId>,
}

impl LeaseSnapshot {
    /// Until when `volume` may be served; `None` if it is excluded or nothing was granted yet.
    #[must_use]
    pub fn until(&self, volume: VolumeId) -> Option<Nanos> {
        (self.until > Nanos(0) && self.excluded.binary_search(&volume).is_err()).then_some(self.until)
    }
}

/// The lease of one run of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeLease {
    node: NodeId,
    incarnation: Incarnation,
    /// The request under way: its nonce and when it was sent.
    sent: Option<(u64, Nanos)>,
    /// Received, but their index is not applied here yet.
    pending: VecDeque<(LogIndex, LeaseSnapshot)>,
    current: LeaseSnapshot,
}

impl NodeLease {
    /// No lease.
    #[must_use]
    pub fn new(node: NodeId, incarnation: Incarnation) -> Self {
        Self { node, incarnation, sent: None, pending: VecDeque::new(), current: LeaseSnapshot::default() }
    }

    /// A request is about to be sent. `now` must be read before the first byte leaves. A request still
    /// under way is given up: its answer will not count.
    pub fn on_send(&mut self, nonce: u64, now: Nanos) {
        self.sent = Some((nonce, now));
    }

    /// A grant arrived; `applied` is the index applied here. True if it answers the request under way. A
    /// grant for another run or another request never counts [R1, R2].
    pub fn on_grant(&mut self, grant: &Grant, applied: LogIndex) -> bool {
        let Some((nonce, sent)) = self.sent else { return false };
        if grant.node != self.node || grant.incarnation != self.incarnation || grant.nonce != nonce {
            return false;
        }
        self.sent = None;
        let mut excluded = grant.excluded.clone();
        excluded.sort_unstable();
        // What is excluded is so at once; the rest waits for the index.
        self.current.excluded.extend_from_slice(&excluded);
        self.current.excluded.sort_unstable();
        self.current.excluded.dedup();
        if self.pending.len() >= PENDING_MAX {
            self.pending.pop_front();
        }
        let until = sent.after(grant.length);
        self.pending.push_back((grant.applied, LeaseSnapshot { until, excluded }));
        self.on_applied(applied);
        true
    }

    /// More was applied here: grants that waited for it count from now on.
    pub fn on_applied(&mut self, applied: LogIndex) {
        while let Some((index, _)) = self.pending.front()
            && *index <= applied
        {
            let (_, next) = self.pending.pop_front().expect("the front was just seen");
            // Both grants hold; the one that ends later counts.
            let until = self.current.until.max(next.until);
            let mut excluded = next.excluded;
            for (_, later) in &self.pending {
                excluded.extend_from_slice(&later.excluded);
            }
            excluded.sort_unstable();
            excluded.dedup();
            self.current = LeaseSnapshot { until, excluded };
        }
    }

    /// Nothing under way can be answered any more, for the model.
    #[cfg(test)]
    pub(in super::super) fn give_up(&mut self) {
        self.sent = None;
    }

    /// How many grants wait for their index, for the model.
    #[cfg(test)]
    pub(in super::super) fn waiting(&self) -> usize {
        self.pending.len()
    }

    /// As `LeaseTable::age`, for the model.
    #[cfg(test)]
    pub(in super::super) fn age(&mut self, now: Nanos, by: std::time::Duration) {
        if let Some((_, sent)) = &mut self.sent {
            *sent = sent.before(by);
        }
        let pending = self.pending.iter_mut().map(|(_, snapshot)| snapshot);
        for snapshot in pending.chain([&mut self.current]) {
            snapshot.until = super::older_until(snapshot.until, now, by);
        }
    }

    /// What may be done.
    #[must_use]
    pub fn snapshot(&self) -> &LeaseSnapshot {
        &self.current
    }
}
