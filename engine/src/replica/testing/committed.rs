//! The world's control plane: what is committed, who is promoted, and how everything ends well.

use std::time::Duration;

use crate::types::{
    ConfigView, Health, LineageFork, LineageId, LogIndex, Member, NodeId, Proposal, ProposalKind,
    ProposalOutcome, Reign, shared_epoch,
};

use super::super::Replica;
use super::world::World;

impl World {
    pub(super) fn decide(&mut self, from: NodeId, proposal: Proposal) {
        let outcome = self.apply(&proposal);
        let n = self.nodes.get_mut(&from).unwrap();
        if n.replica.is_some() && n.incarnation == proposal.by.incarnation {
            n.outcomes.push_back((proposal.id, outcome));
        }
    }

    pub(super) fn apply(&mut self, proposal: &Proposal) -> ProposalOutcome {
        let config = &self.config;
        if proposal.expected_epoch != config.epoch || config.primary != Some(proposal.by) {
            return ProposalOutcome::Refused("the epoch moved on".into());
        }
        let mut next = config.clone();
        match proposal.kind {
            ProposalKind::Remove(m) if next.in_sync.contains(&m) && m != proposal.by => {
                next.in_sync.retain(|x| *x != m);
            }
            ProposalKind::Join(m) if self.nodes[&m.node].incarnation == m.incarnation => {
                assert!(config.member(m.node).is_none(), "{} joins twice", m.node);
                // A proposer that has died left writes under way, which its intent map names; one that failed
                // is about to hand the role over and to leave the set.
                let failed = |r: &Replica| r.status().failure.is_some();
                let failed = self.nodes[&proposal.by.node].replica.as_ref().is_some_and(failed);
                if self.member_now(proposal.by.node) == proposal.by && !failed {
                    self.assert_holds_everything(m.node, proposal.by.node);
                }
                next.in_sync.push(m);
                next.in_sync.sort();
            }
            ProposalKind::Move(m) if next.in_sync.contains(&m) => next.primary = Some(m),
            ProposalKind::Demote => next.primary = None,
            ProposalKind::HandOver(m) if next.in_sync.contains(&m) && m != proposal.by => {
                next.in_sync.retain(|x| *x != proposal.by);
                next.primary = Some(m);
            }
            ProposalKind::Bump => {}
            _ => return ProposalOutcome::Refused("a rule".into()),
        }
        self.commit(next);
        ProposalOutcome::Applied
    }

    /// Design invariant 6 at a join: the joiner differs only where writes are under way.
    fn assert_holds_everything(&self, joiner: NodeId, primary: NodeId) {
        let (a, b) = (&self.nodes[&joiner].disk, &self.nodes[&primary].disk);
        for block in 0..a.data.len() {
            if !self.history.busy(block as u64) && self.nodes[&primary].replica.is_some() {
                let under_way = self.nodes[&primary].asked.len() + self.nodes[&joiner].pending.len() > 0;
                assert!(
                    a.data[block] == b.data[block] || under_way,
                    "{joiner} joins without block {block}: {} there, {} here",
                    a.data[block],
                    b.data[block]
                );
            }
        }
    }

    /// Commits a config: counts the epoch, names the reign.
    pub(in super::super) fn commit(&mut self, mut next: ConfigView) {
        next.epoch = self.config.epoch.next();
        next.index = LogIndex(self.config.index.0 + 1);
        if next.primary != self.config.primary && next.primary.is_some() {
            next.reign = Reign(next.epoch.0);
        }
        for member in &next.in_sync {
            let replica = next.replicas.iter_mut().find(|r| r.node == member.node).unwrap();
            replica.last_member = Some(member.incarnation);
        }
        self.config = next;
    }

    pub(in super::super) fn member_now(&self, id: NodeId) -> Member {
        Member { node: id, incarnation: self.nodes[&id].incarnation }
    }

    fn lease_over(&self, id: NodeId) -> bool {
        let n = &self.nodes[&id];
        n.replica.is_none() || n.lease_until <= self.now
    }

    /// What the failover controller does: promotes a named member that is alive if the primary's lease
    /// is over; if every member restarted, one whose superblock says that it belongs [R6].
    pub(in super::super) fn failover(&mut self) -> bool {
        let Some(primary) = self.config.primary else { return false };
        let named = self.nodes[&primary.node].incarnation == primary.incarnation;
        let alive = named && self.nodes[&primary.node].replica.is_some();
        if alive && !self.lease_over(primary.node) {
            return false;
        }
        let candidate = self.config.in_sync.iter().copied().find(|m| {
            let n = &self.nodes[&m.node];
            *m != primary && n.replica.is_some() && !n.cut_off && n.incarnation == m.incarnation
        });
        if let Some(candidate) = candidate {
            let mut next = self.config.clone();
            next.primary = Some(candidate);
            self.commit(next);
            return true;
        }
        self.restart_promotion()
    }

    fn restart_promotion(&mut self) -> bool {
        let all_back = self.config.in_sync.iter().all(|m| {
            let n = &self.nodes[&m.node];
            let healthy = n.replica.as_ref().is_some_and(|r| r.health() == Health::Healthy);
            healthy && n.incarnation != m.incarnation && !n.cut_off
        });
        if !all_back {
            return false;
        }
        let reports =
            self.config.in_sync.iter().map(|m| (m, self.nodes[&m.node].replica.as_ref().unwrap().report()));
        let eligible = reports.filter(|(m, r)| r.member == Some(m.incarnation) && !r.inconsistent);
        let Some((chosen, _)) = eligible.max_by_key(|(_, r)| r.same_os_boot) else { return false };
        let chosen = self.member_now(chosen.node);
        let mut next = self.config.clone();
        next.in_sync = vec![chosen];
        next.primary = Some(chosen);
        self.commit(next);
        true
    }

    pub(in super::super) fn force(&mut self, id: NodeId) {
        let forced = self.judge_force(id);
        self.commit(forced);
    }

    /// What a force onto the copy that the node has now comes to, once it is committed.
    pub(in super::super) fn judge_force(&self, id: NodeId) -> ConfigView {
        let mut next = self.config.clone();
        let copy = self.nodes[&id].replica.as_ref().unwrap().report();
        let fork_epoch = shared_epoch(next.lineage, &next.history, copy.lineage, copy.epoch);
        for earlier in &mut next.history {
            earlier.fork_epoch = earlier.fork_epoch.min(fork_epoch);
        }
        next.history.push(LineageFork { lineage: next.lineage, fork_epoch });
        next.lineage = LineageId(next.lineage.0 + 1);
        next.in_sync = vec![self.member_now(id)];
        next.primary = Some(self.member_now(id));
        next
    }

    pub(in super::super) fn serving(&self) -> Option<NodeId> {
        self.nodes.iter().find(|(_, n)| n.replica.as_ref().is_some_and(Replica::serving)).map(|(id, _)| *id)
    }

    pub(in super::super) fn all_in_sync(&self) -> bool {
        let all = self
            .nodes
            .iter()
            .all(|(id, n)| n.replica.is_some() && self.config.in_sync.contains(&self.member_now(*id)));
        all && self.serving().is_some()
    }

    /// Faults are over: everything comes back, in bounded time (design invariant 10), and all replicas
    /// hold the same (invariant 6).
    pub(in super::super) fn converge(&mut self) {
        self.heal();
        self.mend_disks();
        self.hold_proposals = false;
        self.restart_what_is_over();
        for _ in 0..400 {
            self.settle();
            self.restart_what_is_over();
            self.failover();
            self.pass(Duration::from_millis(50));
            if self.all_in_sync() && self.nodes.values().all(|n| n.asked.is_empty()) {
                break;
            }
        }
        self.run(60);
        assert!(self.all_in_sync(), "not in sync again: {:#?}", self.summary());
        let asked: usize = self.nodes.values().map(|n| n.asked.len()).sum();
        assert_eq!(asked, 0, "requests without an answer: {:#?}", self.summary());
        let data: Vec<_> = self.nodes.values().map(|n| &n.disk.data).collect();
        assert!(data.windows(2).all(|w| w[0] == w[1]), "replicas differ: {data:?}");
        let data = data[0].clone();
        for block in self.history.blocks() {
            self.history.check_final(block, data[usize::try_from(block).unwrap()]);
        }
        for (id, n) in &self.nodes {
            assert!(n.bufs.is_empty(), "{id} leaks buffers: {:?}", n.bufs);
            assert!(n.pending.is_empty(), "{id} has disk requests under way: {:?}", n.pending);
        }
    }

    /// Starts every node that is not running, has stopped, or has failed.
    fn restart_what_is_over(&mut self) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let failed = |r: &Replica| r.status().failure.is_some();
            let n = &self.nodes[&id];
            if n.replica.is_some() && (n.stopped || n.replica.as_ref().is_some_and(failed)) {
                self.crash(id);
            }
            if self.nodes[&id].replica.is_none() {
                self.start(id);
            }
        }
    }

    pub(in super::super) fn summary(&self) -> Vec<String> {
        let mut lines = vec![format!("config {:?} {:?}", self.config.primary, self.config.in_sync)];
        for (id, n) in &self.nodes {
            let status = n.replica.as_ref().map(Replica::status);
            lines.push(format!(
                "{id} {:?} asked {:?} pending {} {status:?}",
                n.incarnation,
                n.asked,
                n.pending.len()
            ));
            lines.push(format!("  {:?}", n.events.iter().rev().take(12).collect::<Vec<_>>()));
        }
        lines
    }
}
