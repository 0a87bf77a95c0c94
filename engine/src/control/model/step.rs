//! The steps of the model. Those of leader and node call the code of production; the glue around it, which in
//! production is asynchronous, is repeated here in the same order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::apply::apply_under;
use super::super::command::{Applied, ClusterOp, Command, Leadership, RequestId};
use super::super::failover::{NodeReport, Reports, VolumeReport};
use super::super::fixture::{Cluster, VOL};
use super::super::lease::NodeLease;
use super::super::state::ClusterState;
use super::state::{
    Broken, DATA, Entry, Lead, NODES, NOW, Op, Renewal, Said, Stage, State, id, place, run, volume,
};
use crate::types::{
    Epoch, Health, Incarnation, LogIndex, Member, Proposal, ProposalId, ProposalKind, ReplicaReport,
    SuperblockTrust,
};

/// One step. `n` is a node, `m` the place of a renewal on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Time passes for all.
    Tick,
    /// A node wins an election with the quorum's votes; of what is not committed it has the first `kept`
    /// entries. Then it is seen to lead: `control/node/leader.rs::watch_raft`, `LeaseTable::became_leader`.
    Elect { n: u8, kept: usize },
    /// A leader that restarted finds itself leader of the same term: the same.
    LeadAgain { n: u8 },
    /// A leader hears of a newer one: `watch_raft`, `LeaseTable::lost_leadership`.
    StepDown { n: u8 },
    /// The next entry has reached a quorum, `apply::apply_under`.
    Commit,
    /// A node applies the next committed entry: `apply::apply_under`, `NodeLease::on_applied`,
    /// `leader.rs::propose_held` (lifts the exclusion), `replica/config.rs::record_config`.
    Apply { n: u8 },
    /// A run asks to be registered: `control/node/renew.rs::register`.
    Register { n: u8 },
    /// A renewal is sent: `renew.rs::renew_once`, `NodeLease::on_send`.
    Send { n: u8 },
    /// The leader confirms that it leads, after the request arrived: `leader.rs::confirm` [R1].
    Confirm { m: usize },
    /// It grants: `leader.rs::grant`, `LeaseTable::grant`.
    Grant { m: usize },
    /// The answer arrives: `NodeLease::on_grant`.
    Receive { m: usize },
    /// A request or an answer is lost.
    Lose { m: usize },
    /// The failover controller looks: `leader.rs::decide`, `Failover::decide`.
    Decide { n: u8 },
    /// The primary proposes to remove the other member: `replica/membership.rs` [R9].
    ProposeRemoval { n: u8 },
    /// The primary has resynced the other replica and proposes it: `replica/resync.rs` [R4].
    ProposeJoin { n: u8 },
    /// A proposal whose fate is unknown is made again: `membership.rs::repeat_pending`.
    ProposeAgain { n: u8 },
    /// The primary acknowledges a write, committed by its ack set: `replica/write.rs::part_progress`.
    Write { n: u8 },
    /// A process dies.
    Crash { n: u8 },
    /// It starts again, as a new run.
    Start { n: u8 },
}

/// What can be left out, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Without {
    /// [R1]: a leader grants without confirming that it still leads.
    Confirm,
    /// [R1]: a change of primary is proposed without excluding the old one from grants.
    Exclude,
    /// [R1]: a grant is used before its index is applied.
    Index,
    /// [R1]: the lease counts from when the answer arrives.
    FromSending,
    /// [R1]: a new leader does not wait for the leases of older ones.
    Quiet,
    /// A lost member leaves the ack set before its removal is committed.
    AckSet,
}

/// Bounds of a run of the model. Time, lost messages, and elections after the leader died are not bounded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) crashes: u8,
    /// Elections while the leader is alive.
    pub(super) elections: u8,
    /// Removals of a member that is alive.
    pub(super) removals: u8,
    /// Promotions that are proposed; a lease may run out again and again.
    pub(super) promotions: u8,
    /// Renewals of one node, or their answers, on their way at once.
    pub(super) renewals: usize,
    /// How far time goes on at once; a lease is 1.5 s long.
    pub(super) tick: Duration,
    pub(super) without: Option<Without>,
}

fn ensure(holds: bool) -> Option<()> {
    holds.then_some(())
}

impl Bounds {
    pub(super) fn lacks(&self, rule: Without) -> bool {
        self.without == Some(rule)
    }

    pub(super) fn initial(&self) -> State {
        let mut s = State::initial();
        s.crashes_left = self.crashes;
        s.elections_left = self.elections;
        s.removals_left = self.removals;
        s.promotions_left = self.promotions;
        s
    }

    /// Every step that could be possible; [`Bounds::next`] decides.
    pub(super) fn candidates(&self, s: &State, out: &mut Vec<Action>) {
        if s.broken.is_some() {
            return;
        }
        out.extend([Action::Tick, Action::Commit]);
        for n in 0..NODES {
            out.extend((0..=s.tail.len()).map(|kept| Action::Elect { n, kept }));
            out.extend([Action::LeadAgain { n }, Action::StepDown { n }, Action::Apply { n }]);
            out.extend([Action::Decide { n }, Action::Crash { n }, Action::Start { n }]);
        }
        for n in 0..DATA {
            out.extend([Action::Register { n }, Action::Send { n }, Action::Write { n }]);
            out.extend([Action::ProposeRemoval { n }, Action::ProposeJoin { n }, Action::ProposeAgain { n }]);
        }
        for m in 0..s.renewals.len() {
            out.extend([
                Action::Confirm { m },
                Action::Grant { m },
                Action::Receive { m },
                Action::Lose { m },
            ]);
        }
    }

    /// The state after `action`; `None` if it cannot be taken.
    pub(super) fn next(&self, state: &State, action: Action) -> Option<State> {
        let mut s = state.clone();
        s.last_fault = false;
        let faults = s.crashes_left + s.elections_left + s.removals_left;
        match action {
            Action::Tick => self.tick(&mut s),
            Action::Elect { n, kept } => self.elect(&mut s, n, kept),
            Action::LeadAgain { n } => self.lead_again(&mut s, n),
            Action::StepDown { n } => step_down(&mut s, n),
            Action::Commit => self.commit(&mut s),
            Action::Apply { n } => apply_next(&mut s, n),
            Action::Register { n } => register(&mut s, n),
            Action::Send { n } => self.send(&mut s, n),
            Action::Confirm { m } => self.confirm(&mut s, m),
            Action::Grant { m } => self.grant(&mut s, m),
            Action::Receive { m } => self.receive(&mut s, m),
            Action::Lose { m } => lose(&mut s, m),
            Action::Decide { n } => self.decide(&mut s, n),
            Action::ProposeRemoval { n } => propose_removal(&mut s, n),
            Action::ProposeJoin { n } => propose_join(&mut s, n),
            Action::ProposeAgain { n } => propose_again(&mut s, n),
            Action::Write { n } => self.write(&mut s, n),
            Action::Crash { n } => crash(&mut s, n),
            Action::Start { n } => start(&mut s, n),
        }?;
        self.skip_plain(&mut s);
        self.forget(&mut s);
        let left = s.crashes_left + s.elections_left + s.removals_left;
        s.last_fault = faults > 0 && left == 0;
        s.renewals.sort_by_key(|r| (r.n, r.nonce));
        s.broken = s.broken.or_else(|| broken(&s));
        Some(s)
    }

    // Raft.

    /// Entries that change no volume are committed and applied as soon as they can be: that they are late is the
    /// same as that they were written late. A witness that does not lead does nothing with what it applies.
    fn skip_plain(&self, s: &mut State) {
        let plain = |op: Op| matches!(op, Op::Blank | Op::Register { .. });
        while s.tail.first().is_some_and(|e| plain(e.op)) && self.commit(s).is_some() {}
        for n in 0..NODES {
            let all = n >= DATA && s.node(n).lead.is_none();
            let next = |s: &State| s.log.get(s.node(n).applied).map(|e| e.op);
            while next(s).is_some_and(|op| all || plain(op)) && apply_next(s, n).is_some() {}
        }
    }

    fn elect(&self, s: &mut State, n: u8, kept: usize) -> Option<()> {
        ensure(
            s.node(n).up && s.quorum() && s.elected.is_none_or(|e| e.node != id(n) || s.leader().is_none()),
        )?;
        ensure(kept <= s.tail.len())?;
        if s.leader().is_some() {
            ensure(s.elections_left > 0)?;
            s.elections_left -= 1;
        }
        s.tail.truncate(kept);
        let leadership = Leadership { term: s.elected.map_or(1, |e| e.term + 1), node: id(n) };
        s.elected = Some(leadership);
        self.lead(s, n, leadership);
        s.tail.push(Entry { by: leadership, judged: false, op: Op::Blank });
        Some(())
    }

    fn lead_again(&self, s: &mut State, n: u8) -> Option<()> {
        ensure(s.node(n).up && s.node(n).lead.is_none())?;
        let leadership = s.elected.filter(|e| e.node == id(n))?;
        self.lead(s, n, leadership);
        Some(())
    }

    fn lead(&self, s: &mut State, n: u8, leadership: Leadership) {
        let last = s.last_index();
        let mut table = s.node_mut(n).lead.take().map(|l| l.table).unwrap_or_default();
        table.became_leader(leadership, NOW, last);
        if self.lacks(Without::Quiet) {
            table.age(NOW, Duration::from_secs(3));
        }
        s.node_mut(n).lead = Some(Lead { table, ..Lead::default() });
    }

    fn commit(&self, s: &mut State) -> Option<()> {
        s.leader()?;
        ensure(!s.tail.is_empty())?;
        let entry = s.tail.remove(0);
        let index = s.index(s.log.len());
        let mut state = ClusterState::clone(s.committed());
        if let Some(command) = command(s, &entry, index) {
            // What became of it is told to its proposer when that applies it.
            let _: Option<Applied> = apply_under(&mut state, index, entry.by, command);
        } else {
            state.applied = index;
        }
        let (old, new) = (volume(s.committed()).clone(), volume(&state).clone());
        if let (Some(was), Some(is)) = (old.primary, new.primary)
            && was != is
        {
            if old.member(is.node).is_none() {
                s.broken = Some(Broken::PromotedOutside);
            } else if s.alive(was) && s.serves(place(was).0) {
                s.broken = Some(Broken::TakenFromServing);
            }
        }
        s.log.push(entry);
        s.after.0.truncate(s.log.len());
        s.after.0.push(Arc::new(state));
        Some(())
    }

    // Leases.

    fn tick(&self, s: &mut State) -> Option<()> {
        let before = (s.nodes.clone(), s.renewals.len());
        for node in &mut s.nodes {
            node.lease.age(NOW, self.tick);
            if let Some(lead) = &mut node.lead {
                lead.table.age(NOW, self.tick);
                lead.failover.age(self.tick);
            }
        }
        s.renewals.iter_mut().for_each(|r| r.age += 1);
        // An answer that comes when its lease is over is as one that was lost.
        let lease = s.after.0[0].lease;
        let useless = |r: &Renewal| self.tick * r.age >= lease && !self.lacks(Without::FromSending);
        s.renewals.retain(|r| !useless(r));
        ensure(before != (s.nodes.clone(), s.renewals.len()))
    }

    /// A renewal of one that is not primary, as far as it knows: nothing can come between that matters, so its
    /// steps are taken as one.
    fn renew_at_once(&self, s: &mut State) -> Option<()> {
        let m = s.renewals.len() - 1;
        self.confirm(s, m)?;
        if s.renewals.get(m).is_some_and(|r| matches!(r.stage, Stage::Confirmed { .. })) {
            self.grant(s, m)?;
        }
        s.renewals.get(m)?; // refused: as one that was never sent
        self.receive(s, m)
    }

    /// Forgets what can have no effect any more.
    fn forget(&self, s: &mut State) {
        for n in 0..DATA {
            if !s.renewals.iter().any(|r| r.n == n) {
                s.node_mut(n).lease.give_up();
            }
        }
        if self.lacks(Without::Confirm) {
            return;
        }
        for n in 0..NODES {
            let leadership = s.node(n).lead.as_ref().and_then(|l| l.table.leadership());
            let confirmed = |r: &Renewal| match r.stage {
                Stage::Confirmed { leadership: by, .. } => Some(by) == leadership,
                _ => false,
            };
            if leadership != s.elected && !s.renewals.iter().any(confirmed) {
                s.node_mut(n).lead = None;
            }
        }
    }

    fn send(&self, s: &mut State, n: u8) -> Option<()> {
        let under_way = s.renewals.iter().filter(|r| r.n == n);
        ensure(s.node(n).up && s.seen_by(n).is_newest(s.me(n)) && under_way.clone().count() < self.renewals)?;
        // Another one at the same time would bring nothing new, nor do more that wait for an index.
        ensure(s.node(n).lease.snapshot().until(VOL) != Some(NOW.after(s.seen_by(n).lease)))?;
        ensure(s.node(n).lease.waiting() < 2)?;
        let nonce = (1..).find(|nonce| !under_way.clone().any(|r| r.nonce == *nonce))?;
        let said = said(s, n);
        s.node_mut(n).lease.on_send(nonce, NOW);
        s.renewals.push(Renewal { n, nonce, said, stage: Stage::Sent, age: 0 });
        if volume(s.seen_by(n)).primary != Some(s.me(n)) {
            return self.renew_at_once(s);
        }
        Some(())
    }

    fn confirm(&self, s: &mut State, m: usize) -> Option<()> {
        ensure(s.renewals[m].stage == Stage::Sent)?;
        let (leadership, read) = if self.lacks(Without::Confirm) {
            // Whoever thinks that it leads, by what it has applied.
            let n = (0..NODES).find(|n| s.node(*n).up && s.node(*n).lead.is_some())?;
            (s.node(n).lead.as_ref()?.table.leadership()?, s.seen_by(n).applied)
        } else {
            let (_, leadership) = s.leader()?;
            // The index names this leadership: its first entry at least.
            ensure(s.log.iter().any(|e| e.by == leadership))?;
            (leadership, s.committed().applied)
        };
        s.renewals[m].stage = Stage::Confirmed { leadership, read };
        // In between, only a new leader matters.
        let rival = s.elections_left > 0 || s.crashes_left > 0 || s.nodes.iter().any(|n| !n.up);
        if !rival && !self.lacks(Without::Confirm) {
            self.grant(s, m)?;
        }
        Some(())
    }

    fn grant(&self, s: &mut State, m: usize) -> Option<()> {
        let Renewal { n, nonce, said, stage: Stage::Confirmed { leadership, read }, .. } =
            s.renewals[m].clone()
        else {
            return None;
        };
        let l = u8::try_from(leadership.node.0 - 1).expect("a node of the model");
        ensure(s.node(l).up && s.seen_by(l).applied >= read)?;
        let state = Arc::clone(s.seen_by(l));
        let lead = s.node_mut(l).lead.as_mut()?;
        let member = run(n, said.run);
        if state.is_newest(member) && lead.table.leadership() == Some(leadership) {
            lead.table.set_healthy(VOL, member.node, true);
            lead.said[usize::from(n)] = Some(said);
        }
        match lead.table.grant(&state, leadership, read, member, nonce, NOW) {
            Ok(grant) => s.renewals[m].stage = Stage::Granted(grant),
            Err(_) => drop(s.renewals.remove(m)),
        }
        Some(())
    }

    fn receive(&self, s: &mut State, m: usize) -> Option<()> {
        let Renewal { n, nonce, stage: Stage::Granted(grant), .. } = s.renewals[m].clone() else {
            return None;
        };
        ensure(s.node(n).up)?;
        s.renewals.remove(m);
        let mut applied = s.seen_by(n).applied;
        if self.lacks(Without::Index) {
            applied = LogIndex(u64::MAX);
        }
        let lease = &mut s.node_mut(n).lease;
        if self.lacks(Without::FromSending) {
            lease.on_send(nonce, NOW);
        }
        lease.on_grant(&grant, applied);
        Some(())
    }

    // Failover, membership, content.

    fn decide(&self, s: &mut State, n: u8) -> Option<()> {
        ensure(s.node(n).up)?;
        let state = Arc::clone(s.seen_by(n));
        let reports = reports(s, n);
        let elected = s.leader().is_some_and(|(l, _)| l == n);
        let at = LogIndex(s.last_index().0 + 1);
        let lead = s.node_mut(n).lead.as_mut()?;
        let before = lead.clone();
        lead.table.lift_void(&state);
        let decisions = lead.failover.decide(&state, &lead.table, &reports, NOW);
        let mut entry = None;
        for op in decisions.proposals {
            let (_, epoch) = op.changes_primary()?;
            let primary = volume(&state).primary?;
            if lead.under_way == Some(epoch.0) {
                continue;
            }
            let exclusion = lead.table.exclude(VOL, primary.node, epoch);
            if !lead.table.lease_over(&state, VOL, primary, NOW) {
                lead.table.lift(exclusion, LogIndex(0));
                continue;
            }
            if self.lacks(Without::Exclude) {
                lead.table.lift(exclusion, LogIndex(0));
            }
            lead.under_way = Some(epoch.0);
            lead.held.push((exclusion, at));
            entry = lead.table.leadership().map(|by| Entry { by, judged: true, op: small(&op) });
        }
        // Only ids have moved on: nothing has changed.
        let mut idle = lead.table.clone();
        idle.clone_next_id(&before.table);
        if entry.is_none() && idle == before.table && lead.failover == before.failover {
            return None;
        }
        if entry.is_some() {
            ensure(s.promotions_left > 0)?;
            s.promotions_left -= 1;
        }
        // What an outvoted leader writes never commits.
        s.tail.extend(entry.filter(|_| elected));
        Some(())
    }

    fn write(&self, s: &mut State, n: u8) -> Option<()> {
        ensure(s.serves(n))?;
        let mut acks = volume(s.seen_by(n)).in_sync.clone();
        match s.node(n).pending {
            Some(Op::Join { who, .. }) => acks.push(who),
            Some(Op::Remove { who, .. }) if self.lacks(Without::AckSet) => acks.retain(|m| *m != who),
            _ => {}
        }
        ensure(acks.iter().all(|m| s.alive(*m)))?;
        let complete = acks.iter().fold(0, |set, m| set | 1 << place(*m).0);
        ensure(complete != s.complete)?;
        s.complete = complete;
        Some(())
    }
}

fn step_down(s: &mut State, n: u8) -> Option<()> {
    let leadership = s.node(n).lead.as_ref()?.table.leadership();
    ensure(s.node(n).up && leadership != s.elected)?;
    // The table is kept for its ids alone, and those start anew without harm: what they named is gone.
    s.node_mut(n).lead = None;
    Some(())
}

fn apply_next(s: &mut State, n: u8) -> Option<()> {
    ensure(s.node(n).up && s.node(n).applied < s.log.len())?;
    let index = s.index(s.node(n).applied);
    s.node_mut(n).applied += 1;
    let state = Arc::clone(s.seen_by(n));
    let me = s.me(n);
    let node = s.node_mut(n);
    node.lease.on_applied(index);
    if let Some(lead) = &mut node.lead {
        while let Some(at) = lead.held.iter().position(|(_, i)| *i == index) {
            let (exclusion, _) = lead.held.remove(at);
            lead.table.lift(exclusion, index);
            lead.under_way = None;
        }
    }
    let v = volume(&state);
    if v.in_sync.contains(&me) {
        node.recorded = node.run;
        node.inconsistent = false;
    }
    let over = |op: &Op| epoch_of(op).is_some_and(|e| e < v.epoch.0);
    if node.pending.as_ref().is_some_and(over) || v.primary != Some(me) {
        node.pending = None;
    }
    // Its own proposal was refused.
    let mine = s.log[s.node(n).applied - 1].op;
    if s.node(n).pending == Some(mine) {
        s.node_mut(n).pending = None;
    }
    Some(())
}

fn register(s: &mut State, n: u8) -> Option<()> {
    let (_, by) = s.leader()?;
    let run = s.node(n).run;
    ensure(s.node(n).up && !s.seen_by(n).is_newest(s.me(n)))?;
    submit(s, Entry { by, judged: false, op: Op::Register { n, run } })
}

/// Puts an entry into the leader's log, if it is not on its way already.
fn submit(s: &mut State, entry: Entry) -> Option<()> {
    let known = s.tail.iter().chain(&s.log).any(|e| e.op == entry.op);
    ensure(!known)?;
    s.tail.push(entry);
    Some(())
}

fn lose(s: &mut State, m: usize) -> Option<()> {
    // Losing it in the middle is as losing the request.
    ensure(!matches!(s.renewals[m].stage, Stage::Confirmed { .. }))?;
    s.renewals.remove(m);
    Some(())
}

fn other(n: u8) -> u8 {
    1 - n
}

fn propose_removal(s: &mut State, n: u8) -> Option<()> {
    let (_, leadership) = s.leader()?;
    let v = volume(s.seen_by(n)).clone();
    let me = s.me(n);
    ensure(s.node(n).up && v.primary == Some(me) && s.node(n).pending.is_none())?;
    let who = v.member(id(other(n)))?;
    if s.alive(who) {
        ensure(s.removals_left > 0)?;
        s.removals_left -= 1;
    }
    let op = Op::Remove { by: me, who, epoch: v.epoch.0 };
    s.node_mut(n).pending = Some(op);
    submit(s, Entry { by: leadership, judged: false, op })
}

fn propose_join(s: &mut State, n: u8) -> Option<()> {
    let (_, leadership) = s.leader()?;
    let v = volume(s.seen_by(n)).clone();
    let (me, joiner) = (s.me(n), other(n));
    ensure(s.serves(n) && s.node(joiner).up && v.member(id(joiner)).is_none())?;
    ensure(s.node(n).pending.is_none())?;
    let op = Op::Join { by: me, who: s.me(joiner), epoch: v.epoch.0 };
    s.node_mut(n).pending = Some(op);
    s.node_mut(joiner).inconsistent = true;
    s.complete |= 1 << joiner;
    submit(s, Entry { by: leadership, judged: false, op })
}

fn propose_again(s: &mut State, n: u8) -> Option<()> {
    let (_, by) = s.leader()?;
    let op = s.node(n).pending?;
    ensure(s.node(n).up)?;
    submit(s, Entry { by, judged: false, op })
}

fn crash(s: &mut State, n: u8) -> Option<()> {
    ensure(s.node(n).up && s.crashes_left > 0)?;
    s.crashes_left -= 1;
    let lease = NodeLease::new(id(n), Incarnation::default());
    let node = s.node_mut(n);
    (node.up, node.lead, node.pending, node.lease) = (false, None, None, lease);
    Some(())
}

fn start(s: &mut State, n: u8) -> Option<()> {
    ensure(!s.node(n).up)?;
    let node = s.node_mut(n);
    node.up = true;
    node.run += 1;
    let me = s.me(n);
    s.node_mut(n).lease = NodeLease::new(me.node, me.incarnation);
    Some(())
}

fn epoch_of(op: &Op) -> Option<u64> {
    match op {
        Op::Remove { epoch, .. } | Op::Join { epoch, .. } => Some(*epoch),
        _ => None,
    }
}

fn small(op: &ClusterOp) -> Op {
    match op {
        ClusterOp::Promote { to, expected_epoch, .. } => Op::Promote { to: *to, epoch: expected_epoch.0 },
        ClusterOp::PromoteRestarted { to, expected_epoch, .. } => {
            Op::PromoteRestarted { to: *to, epoch: expected_epoch.0 }
        }
        other => unreachable!("the controller proposes nothing but promotions: {other:?}"),
    }
}

/// The command of production that an entry stands for.
fn command(s: &State, entry: &Entry, index: LogIndex) -> Option<Command> {
    let by = match entry.op {
        Op::Remove { by, .. } | Op::Join { by, .. } => by,
        _ => run(0, 0),
    };
    let propose = |epoch: u64, kind: ProposalKind| {
        let id = ProposalId(index.0);
        ClusterOp::Propose(Proposal { id, volume: VOL, expected_epoch: Epoch(epoch), by, kind })
    };
    let op = match entry.op {
        Op::Blank => return None,
        Op::Register { n, run: r } => Cluster::registration(run(n, r)),
        Op::Promote { to, epoch } => {
            ClusterOp::Promote { volume: VOL, expected_epoch: Epoch(epoch), to, operator: false }
        }
        Op::PromoteRestarted { to, epoch } => {
            ClusterOp::PromoteRestarted { volume: VOL, expected_epoch: Epoch(epoch), to, operator: false }
        }
        Op::Remove { who, epoch, .. } => propose(epoch, ProposalKind::Remove(who)),
        Op::Join { who, epoch, .. } => propose(epoch, ProposalKind::Join(who)),
    };
    debug_assert!(s.log.len() < 64, "the bounds keep the log short");
    // A request of its own for each entry: that a retry has no second effect is tested elsewhere.
    let request =
        RequestId { node: by.node, incarnation: by.incarnation, volume: None, number: 1_000_000 + index.0 };
    Some(Command { request, only_under: entry.judged.then_some(entry.by), op })
}

/// What a data node says of its replica.
fn said(s: &State, n: u8) -> Said {
    let node = s.node(n);
    let named = volume(s.seen_by(n)).member(id(n)).map(|m| place(m).1);
    // The run that the config means, if the content goes on from it (`status.rs::claimed_member`).
    let member = named.filter(|r| (node.recorded..=node.run).contains(r)).unwrap_or(node.recorded);
    Said { run: node.run, member, inconsistent: node.inconsistent }
}

/// The reports that the leader keeps, as production has them.
fn reports(s: &State, l: u8) -> Reports {
    let Some(lead) = &s.node(l).lead else { return Reports::new() };
    let mut reports = Reports::new();
    for n in 0..DATA {
        let Some(said) = lead.said[usize::from(n)] else { continue };
        let report = ReplicaReport {
            trust: SuperblockTrust::Sound,
            epoch: Epoch(0),
            reign: Default::default(),
            lineage: Default::default(),
            member: Some(run(n, said.member).incarnation),
            inconsistent: said.inconsistent,
            clean: false,
            same_os_boot: true,
        };
        let volumes = BTreeMap::from([(VOL, VolumeReport { health: Health::Healthy, report })]);
        reports.insert(id(n), NodeReport { member: run(n, said.run), volumes });
    }
    reports
}

/// The invariants that hold in every state.
fn broken(s: &State) -> Option<Broken> {
    if (0..DATA).filter(|n| s.serves(*n)).count() > 1 {
        return Some(Broken::TwoServe);
    }
    let lacks = |m: &Member| s.complete & 1 << place(*m).0 == 0;
    let stale = (0..DATA).any(|n| s.serves(n) && s.complete & 1 << n == 0);
    (stale || volume(s.committed()).in_sync.iter().any(lacks)).then_some(Broken::MemberLacks)
}
