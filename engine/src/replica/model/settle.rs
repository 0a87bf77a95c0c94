//! What follows a step at once, and the invariants.
//!
//! Three things are taken at the earliest moment, because that asks the most of everything after it: an answer
//! is given as soon as it may be, a read happens whenever one could, and a new primary serves when it may.

use super::action::Without;
use super::state::{Broken, Pending, Phase, Proposal, State, Target, Write, bit, nodes_of};
use super::step::{Bounds, has_lease, may_be_alone};

impl Bounds {
    /// Everything that follows by itself, then the invariants.
    pub(super) fn settle(&self, s: &mut State) {
        for n in 0..self.nodes {
            self.refuse_void(s, n);
            if s.node(n).primary.phase > Phase::Secondary {
                self.enter_targets(s, n);
                self.serve(s, n);
                self.answer(s, n);
            }
        }
        excuse(s);
        let broken = self.broken(s);
        s.world.broken = s.world.broken.or(broken);
    }

    /// A proposal that expects another epoch, or names a run that is over, has no effect
    /// (`control/apply/volumes.rs`: `expect`, `check_newest`); its proposer hears of it.
    fn refuse_void(&self, s: &mut State, n: u8) {
        let void = match s.node(n).proposal {
            Proposal::None => false,
            Proposal::Remove { by_run, epoch, .. } => epoch != s.committed.epoch || by_run != s.node(n).run,
            Proposal::Join { node, run, by_run, epoch } => {
                epoch != s.committed.epoch || by_run != s.node(n).run || run != s.node(node).run
            }
        };
        let committed = s.committed.epoch;
        let node = s.node_mut(n);
        if void {
            node.proposal = Proposal::None;
        }
        let knows_all = node.config.epoch == committed;
        if knows_all && node.proposal == Proposal::None && node.primary.pending != Pending::None {
            if let Pending::Join(f) = std::mem::take(&mut node.primary.pending) {
                let target = &mut node.primary.targets[usize::from(f)];
                if *target == Target::Proposed {
                    *target = Target::Ready;
                }
            }
            self.retain_waiting(node, n);
        }
    }

    /// A target that lacks nothing, or whose last block is on its way, enters the ack set
    /// (`resync.rs::enter_ack_set`) [R4].
    fn enter_targets(&self, s: &mut State, p: u8) {
        if self.lacks(Without::R4Entering) {
            return;
        }
        let node = s.node_mut(p);
        let lacking = node.dirty & !node.live();
        for (f, target) in (0..).zip(&mut node.primary.targets) {
            let lacks = lacking & bit(f) != 0;
            if *target == Target::Copying && (!lacks || self.lacks(Without::R4Set)) {
                *target = Target::Entered;
            }
        }
    }

    /// The take-over is complete (`takeover.rs::pump_takeover`) [R11].
    fn serve(&self, s: &mut State, p: u8) {
        let node = s.node_mut(p);
        let others = node.config.members() & !bit(p);
        let equal = others & !node.primary.reconciled == 0 || self.lacks(Without::R11);
        if node.primary.phase == Phase::Flushed && equal {
            node.primary.phase = Phase::Serving;
            node.primary.unstable = true;
        }
    }

    /// Answers of writes and flushes whose condition holds (`client.rs::release_held`).
    fn answer(&self, s: &mut State, p: u8) {
        if !has_lease(s, p) {
            return;
        }
        let node = s.node_mut(p);
        let write = node.primary.write;
        let stable = write.durable || !may_be_alone(node, p) || self.lacks(Without::R14);
        let mut acked = 0;
        if write.id > 0 && write.local_done && write.waits == 0 && stable {
            nodes_of(write.live).for_each(|f| node.primary.owed[usize::from(f)] = write.id);
            node.primary.write = Write::default();
            acked = write.id;
        }
        let round = node.primary.round;
        let mut flushed = 0;
        if round.on && round.waits == 0 {
            node.primary.round = Default::default();
            flushed = round.through;
        }
        s.world.acked = s.world.acked.max(acked);
        s.world.seen = s.world.seen.max(acked);
        s.world.flushed = s.world.flushed.max(flushed);
    }

    fn broken(&self, s: &mut State) -> Option<Broken> {
        for n in nodes_of(s.committed.members()).filter(|n| s.alive(&s.committed, *n)) {
            if s.node(n).data < s.world.acked {
                return Some(Broken::LostOnMember);
            }
            for other in nodes_of(bit(self.nodes) - 1) {
                if !self.visible_only && differ_unknown(s, n, other) {
                    return Some(Broken::UnknownDifference);
                }
            }
        }
        self.read(s)
    }

    /// A client reads whenever it can (`client.rs::start`, `read.rs::begin_read`) [R8].
    fn read(&self, s: &mut State) -> Option<Broken> {
        let p = s.committed.primary;
        let node = s.node(p);
        let waits = node.primary.write.id > 0 && !self.lacks(Without::R8);
        if node.primary.phase < Phase::Serving || !has_lease(s, p) || waits {
            return None;
        }
        let content = node.data;
        let world = &mut s.world;
        if content < world.flushed {
            return Some(Broken::FlushedLost);
        } else if content < world.acked {
            return Some(Broken::AckedLost);
        } else if content < world.seen {
            return Some(Broken::ReadWentBack);
        }
        world.seen = content;
        None
    }
}

/// Invariant 6: where a member and another replica differ, an intent of either says so, or the member's bitmap.
fn differ_unknown(s: &State, member: u8, other: u8) -> bool {
    let (a, b) = (s.node(member), s.node(other));
    a.data != b.data && !a.intent && !b.intent && a.dirty & bit(other) == 0
}

/// Where the promise ends: if every member has failed and power was lost among them, what no flush covered
/// may be gone. One member alone is no such case: its failure is a single one.
fn excuse(s: &mut State) {
    let members = s.committed.members();
    let all_failed = nodes_of(members).all(|n| !s.alive(&s.committed, n));
    let power_lost = nodes_of(members).any(|n| s.node(n).power_lost);
    let several = members.count_ones() > 1 || s.world.restarted;
    if all_failed && power_lost && several {
        s.world.acked = s.world.flushed;
        s.world.seen = s.world.flushed;
    }
}
