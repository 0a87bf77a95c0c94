//! What each step does: guards first, then the effect. Nothing here is random; a step that cannot be taken is
//! `None`.

use super::action::{Action, Without};
use super::state::{
    Config, Node, Pending, Phase, Primary, Proposal, Round, State, Target, Write, bit, nodes_of,
};

/// Bounds of one run of the model, and the rule that it leaves out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Data nodes, all in sync at first; node 0 is primary.
    pub(super) nodes: u8,
    /// Writes that clients issue.
    pub(super) writes: u8,
    /// Losses of power, each of one node; two may follow each other at once.
    pub(super) powers: u8,
    /// Processes killed.
    pub(super) kills: u8,
    /// Removals of a member that is alive. Those of one that died or restarted are not counted.
    pub(super) removals: u8,
    /// Leases of a live primary that run out.
    pub(super) lapses: u8,
    pub(super) without: Option<Without>,
    /// Leave invariant 6 unchecked: how far does a fault go until a client could notice it?
    pub(super) visible_only: bool,
}

fn ensure(holds: bool) -> Option<()> {
    holds.then_some(())
}

impl Bounds {
    pub(super) fn lacks(&self, rule: Without) -> bool {
        self.without == Some(rule)
    }

    fn all(&self) -> u8 {
        bit(self.nodes) - 1
    }

    /// A volume with all replicas in sync and equal; its primary serves.
    pub(super) fn initial(&self) -> State {
        let mut committed = Config { epoch: 1, reign: 1, primary: 0, ..Config::default() };
        (0..usize::from(self.nodes)).for_each(|n| committed.named[n] = 1);
        let mut s = State { nodes: Default::default(), committed, world: Default::default() };
        for n in 0..self.nodes {
            *s.node_mut(n) = Node { up: true, run: 1, kept: bit(0), config: committed, ..Node::default() };
        }
        let others = self.all() & !bit(0);
        s.node_mut(0).primary =
            Primary { phase: Phase::Serving, links: others, reconciled: others, ..Primary::default() };
        s.world.powers_left = self.powers;
        s.world.kills_left = self.kills;
        s.world.removals_left = self.removals;
        s.world.lapses_left = self.lapses;
        s
    }

    /// Every step that could be possible; [`Bounds::next`] decides.
    pub(super) fn candidates(&self, s: &State, out: &mut Vec<Action>) {
        if s.world.broken.is_some() {
            return;
        }
        for n in 0..self.nodes {
            let node = s.node(n);
            if node.up {
                out.extend([Action::Learn { n }, Action::Kill { n }, Action::PromoteRestarted { n }]);
                out.push(Action::Promote { n });
                if node.primary.phase > Phase::Secondary {
                    self.candidates_of_primary(n, out);
                }
            } else {
                out.push(Action::Start { n });
            }
            if node.proposal != Proposal::None {
                out.push(Action::Commit { n });
            }
            if s.world.powers_left > 0 {
                out.extend(nodes_of(node.kept).map(|content| Action::PowerLoss { n, content }));
            }
        }
    }

    fn candidates_of_primary(&self, p: u8, out: &mut Vec<Action>) {
        out.extend([
            Action::Write { p },
            Action::WriteHere { p },
            Action::FlushAlone { p },
            Action::Flush { p },
        ]);
        out.extend([Action::Save { p, n: p }, Action::Clear { p, n: p }]);
        out.extend([Action::ProposeRemoval { p }, Action::TakeoverFlush { p }]);
        for f in nodes_of(self.all() & !bit(p)) {
            out.extend([
                Action::WriteThere { p, f },
                Action::LiveThere { p, f },
                Action::FlushThere { p, f },
            ]);
            out.extend([Action::Save { p, n: f }, Action::Clear { p, n: f }]);
            out.extend([Action::Suspect { p, f }, Action::Connect { p, f }, Action::BeginResync { p, f }]);
            out.extend([Action::Copy { p, f }, Action::JoinFlush { p, f }, Action::ProposeJoin { p, f }]);
            out.extend([Action::Reconcile { p, f }, Action::Hear { p, f }]);
        }
    }

    /// The state after `action`, settled and renumbered; `None` if it cannot be taken.
    pub(super) fn next(&self, state: &State, action: Action) -> Option<State> {
        let mut s = *state;
        match action {
            Action::Write { p } => self.write(&mut s, p),
            Action::WriteHere { p } => write_here(&mut s, p),
            Action::WriteThere { p, f } => self.write_there(&mut s, p, f),
            Action::LiveThere { p, f } => self.live_there(&mut s, p, f),
            Action::FlushAlone { p } => self.flush_alone(&mut s, p),
            Action::Flush { p } => self.flush(&mut s, p),
            Action::FlushThere { p, f } => flush_there(&mut s, p, f),
            Action::Save { p, n } => self.save(&mut s, p, n),
            Action::Clear { p, n } => self.clear(&mut s, p, n),
            Action::Suspect { p, f } => self.suspect(&mut s, p, f),
            Action::ProposeRemoval { p } => self.propose_removal(&mut s, p),
            Action::Connect { p, f } => self.connect(&mut s, p, f),
            Action::BeginResync { p, f } => self.begin_resync(&mut s, p, f),
            Action::Copy { p, f } => self.copy(&mut s, p, f),
            Action::JoinFlush { p, f } => self.join_flush(&mut s, p, f),
            Action::ProposeJoin { p, f } => self.propose_join(&mut s, p, f),
            Action::Commit { n } => commit(&mut s, n),
            Action::Learn { n } => self.learn(&mut s, n),
            Action::Hear { p, f } => self.hear_config(&mut s, p, f),
            Action::Promote { n } => self.promote(&mut s, n),
            Action::PromoteRestarted { n } => self.promote_restarted(&mut s, n),
            Action::TakeoverFlush { p } => takeover_flush(&mut s, p),
            Action::Reconcile { p, f } => self.reconcile(&mut s, p, f),
            Action::Kill { n } => self.kill(&mut s, n),
            Action::PowerLoss { n, content } => self.power_loss(&mut s, n, content),
            Action::Start { n } => self.start(&mut s, n),
        }?;
        self.settle(&mut s);
        s.renumber();
        Some(s)
    }

    /// Who must commit a write besides `p` (`membership.rs::refresh_acks`) [R4].
    pub(super) fn acks(&self, node: &Node, p: u8) -> u8 {
        let members = node.config.members() & !bit(p);
        if self.lacks(Without::R4Entering) {
            return members;
        }
        let mut acks = members;
        for (f, target) in (0..).zip(node.primary.targets) {
            if target >= Target::Entered {
                acks |= bit(f);
            }
        }
        if let Pending::Join(f) = node.primary.pending {
            acks |= bit(f);
        }
        acks
    }

    /// The ack set has changed (`write.rs::retain_waiting`).
    pub(super) fn retain_waiting(&self, node: &mut Node, p: u8) {
        let acks = self.acks(node, p);
        node.primary.write.waits &= acks;
        node.primary.round.waits &= acks;
    }

    // The write path.

    fn write(&self, s: &mut State, p: u8) -> Option<()> {
        ensure(has_lease(s, p) && s.world.issued < self.writes)?;
        let all = self.all();
        let node = s.node(p);
        ensure(node.primary.phase == Phase::Serving && node.primary.write.id == 0)?;
        let (acks, missing) = (self.acks(node, p), all & !node.config.members());
        let durable = !self.lacks(Without::R14) && may_be_alone(node, p);
        s.world.issued += 1;
        let id = s.world.issued;
        let node = s.node_mut(p);
        let targets = nodes_of(all).filter(|f| node.primary.targets[usize::from(*f)] > Target::None);
        let live = targets.fold(0, |set, f| set | bit(f)) & node.primary.links;
        node.intent = true;
        node.clearing = false;
        node.dirty |= missing;
        node.primary.unstable = true;
        let epoch = node.config.epoch;
        node.primary.write = Write { id, local_done: false, durable, waits: acks, live, missing, epoch };
        Some(())
    }

    fn write_there(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        ensure(follows(s, p, f))?;
        let write = s.node(p).primary.write;
        ensure(write.id > 0 && (write.waits | write.live) & bit(f) != 0)?;
        if s.node(f).config.epoch < write.epoch {
            // The config went out before the write, on the same session.
            self.hear(s, p, f)?;
        }
        let all = self.all();
        let waited = write.waits & bit(f) != 0;
        if s.node(p).primary.owed[usize::from(f)] > 0 {
            self.live_there(s, p, f)?; // it was sent before
        }
        let node = s.node_mut(f);
        if !self.lacks(Without::R12Receiver) {
            node.dirty |= write.missing & !bit(f);
            if node.config.epoch > write.epoch {
                node.dirty |= all & !node.config.members() & !bit(f);
            }
        }
        node.intent = true;
        node.clearing = false;
        node.put(write.id, write.durable && waited);
        let primary = s.node_mut(p);
        if write.live & bit(f) != 0 {
            unmark(primary, bit(f));
        }
        primary.primary.write.waits &= !bit(f);
        primary.primary.write.live &= !bit(f);
        Some(())
    }

    fn live_there(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        ensure(follows(s, p, f))?;
        let id = s.node(p).primary.owed[usize::from(f)];
        ensure(id > 0)?;
        let missing = self.all() & !s.node(p).config.members() & !bit(f);
        let node = s.node_mut(f);
        if !self.lacks(Without::R12Receiver) {
            node.dirty |= missing;
        }
        node.intent = true;
        node.clearing = false;
        node.put(id, false);
        let primary = s.node_mut(p);
        primary.primary.owed[usize::from(f)] = 0;
        // Only the newest clears the bit [R21].
        if primary.primary.write.live & bit(f) == 0 {
            unmark(primary, bit(f));
        }
        Some(())
    }

    fn flush_alone(&self, s: &mut State, p: u8) -> Option<()> {
        let node = s.node_mut(p);
        let write = node.primary.write;
        ensure(write.id > 0 && write.local_done && write.waits == 0 && !write.durable)?;
        ensure(may_be_alone(node, p) && !self.lacks(Without::R14))?;
        node.flush();
        node.primary.write.durable = true;
        Some(())
    }

    fn flush(&self, s: &mut State, p: u8) -> Option<()> {
        let acked = s.world.acked;
        let node = s.node_mut(p);
        ensure(node.primary.phase == Phase::Serving && !node.primary.round.on && node.primary.unstable)?;
        node.flush();
        node.primary.unstable = node.primary.write.id > 0;
        let waits = self.acks(node, p);
        node.primary.round = Round { on: true, waits, through: acked };
        Some(())
    }

    /// What a clear needs: everything written in the region is stable on all of the ack set, and this replica
    /// is a member. A follower heard so on its session, after the config that counted then.
    fn may_clear(&self, s: &mut State, p: u8, n: u8) -> Option<()> {
        if n != p {
            ensure(follows(s, p, n))?;
            self.hear(s, p, n)?;
        }
        let primary = &s.node(p).primary;
        ensure(primary.phase == Phase::Serving && primary.write.id == 0 && s.node(n).intent)?;
        ensure(self.lacks(Without::R5Flush) || !(primary.unstable || primary.round.on))?;
        ensure(s.node(n).config.names(n, s.node(n).run) || self.lacks(Without::R5Outside))
    }

    /// Marks of missing replicas that are not on the disk.
    fn unsaved(&self, node: &Node) -> u8 {
        node.dirty & !node.dirty_disk & self.all() & !node.config.members()
    }

    fn save(&self, s: &mut State, p: u8, n: u8) -> Option<()> {
        self.may_clear(s, p, n)?;
        ensure(!s.node(n).clearing && self.unsaved(s.node(n)) != 0 && !self.lacks(Without::R5Bitmaps))?;
        let node = s.node_mut(n);
        node.dirty_disk = node.dirty;
        node.clearing = true;
        Some(())
    }

    fn clear(&self, s: &mut State, p: u8, n: u8) -> Option<()> {
        self.may_clear(s, p, n)?;
        let saved = s.node(n).clearing || self.unsaved(s.node(n)) == 0;
        ensure(saved || self.lacks(Without::R5Bitmaps))?;
        let node = s.node_mut(n);
        node.intent = false;
        node.clearing = false;
        Some(())
    }

    // Membership and resync.

    fn propose_removal(&self, s: &mut State, p: u8) -> Option<()> {
        let node = s.node_mut(p);
        let primary = &mut node.primary;
        ensure(primary.removal != 0 && primary.pending == Pending::None)?;
        let f = nodes_of(primary.removal).next()?;
        primary.removal = 0;
        primary.pending = Pending::Remove(f);
        let run = node.config.named[usize::from(f)];
        node.proposal = Proposal::Remove { node: f, run, by_run: node.run, epoch: node.config.epoch };
        if !self.lacks(Without::R9Flush) {
            node.flush();
        }
        Some(())
    }

    /// True if the run of `f` counts for what `config` names.
    fn counts(&self, s: &State, config: &Config, f: u8) -> bool {
        s.alive(config, f) || (self.lacks(Without::R10) && s.node(f).up && config.members() & bit(f) != 0)
    }

    /// `f` hears the config of `p` and follows its reign.
    fn hear(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let config = s.node(p).config;
        self.adopt(s, f, config);
        ensure(obeys(s, p, f))
    }

    fn connect(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let node = s.node(p);
        ensure(node.primary.phase == Phase::Serving && node.primary.links & bit(f) == 0)?;
        ensure(node.primary.removal & bit(f) == 0 && self.counts(s, &node.config, f))?;
        self.hear(s, p, f)?;
        s.node_mut(p).primary.links |= bit(f);
        Some(())
    }

    fn begin_resync(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let node = s.node(p);
        let primary = &node.primary;
        ensure(primary.phase == Phase::Serving && s.node(f).up && node.config.members() & bit(f) == 0)?;
        ensure(primary.targets[usize::from(f)] == Target::None && primary.pending != Pending::Join(f))?;
        self.hear(s, p, f)?;
        ensure(!s.node(f).config.names(f, s.node(f).run))?;
        s.node_mut(f).inconsistent = true;
        let intents = s.node(p).intent || s.node(f).intent;
        let node = s.node_mut(p);
        if intents {
            node.dirty |= bit(f);
        }
        node.primary.links |= bit(f);
        node.primary.targets[usize::from(f)] = Target::Copying;
        Some(())
    }

    fn copy(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        ensure(follows(s, p, f))?;
        self.hear(s, p, f)?;
        let node = s.node(p);
        let target = node.primary.targets[usize::from(f)];
        ensure(matches!(target, Target::Copying | Target::Entered))?;
        ensure(node.dirty & !node.live() & bit(f) != 0 && node.primary.write.id == 0)?;
        bring(s, p, f);
        Some(())
    }

    fn join_flush(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        ensure(follows(s, p, f))?;
        self.hear(s, p, f)?;
        let all = self.all();
        let node = s.node(p);
        let entered = if self.lacks(Without::R4Entering) { Target::Copying } else { Target::Entered };
        ensure(node.primary.targets[usize::from(f)] == entered)?;
        let (write, lacking) = (node.primary.write, node.dirty & bit(f) != 0);
        // What it lacks is on its way in a write that came after it entered.
        let newer = write.id > 0 && write.live & write.waits & bit(f) != 0;
        let owed = node.primary.owed[usize::from(f)] > 0;
        let older = owed || (write.id > 0 && write.live & !write.waits & bit(f) != 0);
        ensure(self.lacks(Without::R4Set) || (!older && (!lacking || newer)))?;
        let bitmaps = node.dirty & all & !node.config.members() & !bit(f);
        s.node_mut(p).primary.targets[usize::from(f)] = Target::Ready;
        let joiner = s.node_mut(f);
        if !self.lacks(Without::R12Join) {
            joiner.dirty |= bitmaps;
        }
        joiner.dirty_disk = joiner.dirty;
        if !self.lacks(Without::R4Flush) {
            joiner.flush();
        }
        Some(())
    }

    fn propose_join(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let run = s.node(f).run;
        let node = s.node_mut(p);
        let primary = &mut node.primary;
        ensure(primary.phase == Phase::Serving && primary.targets[usize::from(f)] == Target::Ready)?;
        ensure(primary.pending == Pending::None && primary.removal == 0)?;
        primary.targets[usize::from(f)] = Target::Proposed;
        primary.pending = Pending::Join(f);
        node.proposal = Proposal::Join { node: f, run, by_run: node.run, epoch: node.config.epoch };
        Some(())
    }

    // Configs and roles.

    fn learn(&self, s: &mut State, n: u8) -> Option<()> {
        ensure(s.node(n).config.epoch < s.committed.epoch)?;
        // A primary passes every config on before the next, so who is linked has each in turn. That it had the
        // last one before this step is the order that is looked at; the other way round changes nothing.
        let behind = |f: u8| s.node(f).config.epoch < s.node(n).config.epoch && follows(s, n, f);
        ensure(s.node(n).primary.phase == Phase::Secondary || !(0..self.nodes).any(behind))?;
        let config = s.committed;
        self.adopt(s, n, config);
        Some(())
    }

    fn hear_config(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        ensure(follows(s, p, f) && s.node(f).config.epoch < s.node(p).config.epoch)?;
        self.hear(s, p, f)
    }

    /// `n` takes over a config that it hears of.
    fn adopt(&self, s: &mut State, n: u8, new: Config) {
        let old = s.node(n).config;
        if old.epoch >= new.epoch {
            return;
        }
        let all = self.all();
        let r12_removal = !self.lacks(Without::R12Removal);
        let node = s.node_mut(n);
        node.config = new;
        let new_reign = old.reign != new.reign;
        if new_reign {
            node.primary = Primary::default();
            node.clearing = false;
        }
        let is = new.names(n, node.run);
        let others = new.members() & !bit(n);
        let changed = |a: &Config, b: &Config| {
            let gone =
                |f: &u8| a.named[usize::from(*f)] > 0 && a.named[usize::from(*f)] != b.named[usize::from(*f)];
            nodes_of(all & !bit(n)).filter(gone).fold(0, |set, f| set | bit(f))
        };
        if old.epoch == 0 {
            if is {
                unmark(node, others);
            }
        } else {
            if node.intent && r12_removal {
                let left = changed(&old, &new);
                node.dirty |= left;
                node.clearing &= left == 0;
            }
            match (old.names(n, node.run), is) {
                (true, true) => unmark(node, changed(&new, &old)),
                (false, true) => unmark(node, others),
                _ => {}
            }
        }
        if is {
            node.inconsistent = false;
        }
        if is && new.primary == n && node.primary.phase == Phase::Secondary {
            node.primary.phase = Phase::TakingOver;
            if node.intent && !self.lacks(Without::R3) {
                node.dirty |= all & !bit(n);
            }
        } else if node.primary.phase > Phase::Secondary {
            self.config_changed(node, n);
        }
        if new_reign {
            // What an older primary still has to say to it is refused from here on.
            for q in nodes_of(all & !bit(n))
                .filter(|q| s.nodes[usize::from(*q)].config.reign != new.reign)
                .collect::<Vec<_>>()
            {
                s.node_mut(q).primary.links &= !bit(n);
            }
        }
    }

    fn promote(&self, s: &mut State, n: u8) -> Option<()> {
        let old = s.committed;
        ensure(n != old.primary && self.counts(s, &old, n))?;
        if s.alive(&old, old.primary) {
            ensure(s.world.lapses_left > 0)?;
            s.world.lapses_left -= 1;
        }
        take_over(s, n);
        if self.lacks(Without::R10) {
            s.committed.named[usize::from(n)] = s.node(n).run;
        }
        if self.lacks(Without::R9Promotion) {
            s.committed.named[usize::from(old.primary)] = 0;
        }
        Some(())
    }

    fn promote_restarted(&self, s: &mut State, n: u8) -> Option<()> {
        let old = s.committed;
        let restarted = |f: u8| s.node(f).run > old.named[usize::from(f)];
        if self.lacks(Without::R6) {
            ensure(!s.alive(&old, old.primary) && !s.alive(&old, n))?;
        } else {
            ensure(nodes_of(old.members()).all(restarted))?;
            ensure(old.members() & bit(n) != 0 && !s.node(n).inconsistent)?;
        }
        take_over(s, n);
        s.committed.named = Default::default();
        s.committed.named[usize::from(n)] = s.node(n).run;
        s.node_mut(n).power_lost = false;
        s.world.restarted = true;
        Some(())
    }

    fn reconcile(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let node = s.node(p);
        ensure(node.primary.phase == Phase::Flushed && node.primary.reconciled & bit(f) == 0)?;
        ensure(node.primary.removal & bit(f) == 0 && self.counts(s, &node.config, f))?;
        self.hear(s, p, f)?;
        if s.node(p).intent || s.node(f).intent || s.node(p).dirty & bit(f) != 0 {
            bring(s, p, f);
        }
        let node = s.node_mut(p);
        node.primary.links |= bit(f);
        node.primary.reconciled |= bit(f);
        Some(())
    }

    fn start(&self, s: &mut State, n: u8) -> Option<()> {
        let all = self.all();
        let node = s.node_mut(n);
        ensure(!node.up)?;
        node.up = true;
        node.run += 1;
        if node.intent && !self.lacks(Without::R3) {
            node.dirty |= all & !bit(n);
        }
        Some(())
    }

    fn suspect(&self, s: &mut State, p: u8, f: u8) -> Option<()> {
        let node = s.node(p);
        let primary = &node.primary;
        ensure(primary.removal == 0 && primary.pending == Pending::None)?;
        ensure(node.config.members() & bit(f) != 0)?;
        if s.alive(&node.config, f) {
            ensure(s.world.removals_left > 0)?;
            s.world.removals_left -= 1;
        }
        self.end_session(s.node_mut(p), p, f);
        s.node_mut(p).primary.removal = bit(f);
        Some(())
    }

    /// The session from `p` to `f` is over (`peer.rs::session_down`).
    fn end_session(&self, node: &mut Node, p: u8, f: u8) {
        node.primary.links &= !bit(f);
        node.primary.targets[usize::from(f)] = Target::None;
        node.primary.write.live &= !bit(f);
        node.primary.owed[usize::from(f)] = 0;
        self.retain_waiting(node, p);
    }

    /// Still primary in the same reign under a newer config (`membership.rs::config_changed_as_primary`).
    fn config_changed(&self, node: &mut Node, p: u8) {
        let members = node.config.members();
        node.primary.pending = Pending::None;
        node.primary.removal &= members;
        for (f, target) in (0..).zip(&mut node.primary.targets) {
            if members & bit(f) != 0 {
                *target = Target::None;
            } else if *target == Target::Proposed {
                *target = Target::Ready;
            }
        }
        node.primary.reconciled &= members;
        self.retain_waiting(node, p);
    }

    fn kill(&self, s: &mut State, n: u8) -> Option<()> {
        ensure(s.world.kills_left > 0)?;
        s.world.kills_left -= 1;
        self.end(s, n);
        Some(())
    }

    fn power_loss(&self, s: &mut State, n: u8, content: u8) -> Option<()> {
        ensure(s.world.powers_left > 0)?;
        s.world.powers_left -= 1;
        let node = s.node_mut(n);
        node.data = content;
        node.kept = bit(content);
        node.power_lost = true;
        self.end(s, n);
        Some(())
    }

    /// The process on `n` is gone, with its memory and its sessions.
    fn end(&self, s: &mut State, n: u8) {
        let node = s.node_mut(n);
        node.up = false;
        node.config = Config::default();
        node.dirty = node.dirty_disk;
        node.clearing = false;
        node.primary = Primary::default();
        for (q, node) in (0..).zip(&mut s.nodes) {
            if node.primary.phase > Phase::Secondary {
                self.end_session(node, q, n);
            }
        }
    }
}

/// True if the lease of `p` covers the volume: nobody was promoted away from it.
pub(super) fn has_lease(s: &State, p: u8) -> bool {
    s.committed.primary == p && s.alive(&s.committed, p) && s.node(p).config.primary == p
}

/// True if `p` is, or could be, the whole set (`write.rs::may_be_alone`) [R14].
pub(super) fn may_be_alone(node: &Node, p: u8) -> bool {
    let leaving = match node.primary.pending {
        Pending::Remove(f) => bit(f),
        _ => node.primary.removal,
    };
    node.config.members() & !bit(p) & !leaving == 0
}

/// True if `f` takes orders of `p` (`follow.rs::obeys`).
fn obeys(s: &State, p: u8, f: u8) -> bool {
    let (primary, node) = (s.node(p), s.node(f));
    node.up
        && node.primary.phase == Phase::Secondary
        && node.config.reign == primary.config.reign
        && node.config.primary == p
        && node.config.names(p, primary.run)
}

/// True if a message of `p` reaches `f` and is obeyed.
fn follows(s: &State, p: u8, f: u8) -> bool {
    s.node(p).primary.links & bit(f) != 0 && obeys(s, p, f)
}

/// Clears marks. A clear reaches the disk late or never; at once is the case with the least left.
fn unmark(node: &mut Node, set: u8) {
    node.dirty &= !set;
    node.dirty_disk &= !set;
}

/// Brings the block from `p` to `f`, if it differs there.
fn bring(s: &mut State, p: u8, f: u8) {
    let content = s.node(p).data;
    let node = s.node_mut(f);
    if node.data != content {
        node.intent = true;
        node.clearing = false;
        node.put(content, false);
    }
    unmark(s.node_mut(p), bit(f));
}

fn write_here(s: &mut State, p: u8) -> Option<()> {
    let node = s.node_mut(p);
    let write = node.primary.write;
    ensure(write.id > 0 && !write.local_done)?;
    node.put(write.id, write.durable);
    node.primary.write.local_done = true;
    Some(())
}

fn flush_there(s: &mut State, p: u8, f: u8) -> Option<()> {
    ensure(follows(s, p, f))?;
    let round = &mut s.node_mut(p).primary.round;
    ensure(round.on && round.waits & bit(f) != 0)?;
    round.waits &= !bit(f);
    s.node_mut(f).flush();
    Some(())
}

fn commit(s: &mut State, n: u8) -> Option<()> {
    let proposal = std::mem::take(&mut s.node_mut(n).proposal);
    match proposal {
        Proposal::None => return None,
        Proposal::Remove { node, .. } => s.committed.named[usize::from(node)] = 0,
        Proposal::Join { node, run, .. } => {
            s.committed.named[usize::from(node)] = run;
            s.node_mut(node).power_lost = false;
        }
    }
    s.committed.epoch += 1;
    Some(())
}

fn take_over(s: &mut State, n: u8) {
    s.committed.epoch += 1;
    s.committed.reign = s.committed.epoch;
    s.committed.primary = n;
}

fn takeover_flush(s: &mut State, p: u8) -> Option<()> {
    let named = s.committed.primary == p && s.alive(&s.committed, p);
    let node = s.node_mut(p);
    ensure(node.primary.phase == Phase::TakingOver)?;
    node.primary.phase = Phase::Flushed;
    node.flush();
    s.world.restarted &= !named;
    Some(())
}
