//! Following the committed config: who is missing, who am I, whose reign is it.
//!
//! A config is adopted from the control plane or from a peer's message, whichever comes first; it is
//! committed either way, and its log index orders two of them [R12]. The superblock records it, on both
//! copies, before the new reign, epoch or lineage is used [R16].

use crate::meta::Superblock;
use crate::mutation::{Mutation, mutated};
use crate::types::{ConfigView, Epoch, Geometry, Incarnation, Member, ReplicaSlot, SuperblockTrust};
use crate::wire::BaseContent;

use super::Replica;
use super::io::{Event, Output};
use super::peer::Peer;

impl Replica {
    pub(super) fn adopt_config(&mut self, config: ConfigView) {
        let superblock = self.store.superblock();
        if config.volume != superblock.volume || config.replica(self.me.node).is_none() {
            return self.not_ours(&config);
        }
        if self.config.as_ref().is_some_and(|old| old.index >= config.index) {
            return;
        }
        let old = self.config.replace(config.clone());
        let by_term = mutated(Mutation::FenceByTerm);
        let new_reign =
            old.as_ref().is_none_or(|o| o.reign != config.reign || (!by_term && o.primary != config.primary));
        if new_reign {
            self.leave_reign(&config);
        }
        self.follow_replicas(&config);
        if config.in_sync.contains(&self.me) && !self.belongs_to(&config) {
            let next = if self.is_only_member() {
                "no other copy is in sync: promote another replica by force, then restart the node"
            } else {
                "restart the node, it will be resynced"
            };
            return self.fail(format!(
                "the config names this run as in sync, but its copy was made anew since; {next}"
            ));
        }
        if config.in_sync == [self.me] && self.changed_since_force(&config) {
            return self.fail(
                "it was promoted by force, but a resync into it has begun since: its content is a mix of old and \
                 new; promote another replica by force, or restart the node and add --discard-inconsistent"
                    .into(),
            );
        }
        self.follow_membership(old.as_ref(), &config);
        self.record_config(&config);
        self.event(Event::ConfigFollowed { epoch: config.epoch, reign: config.reign });
        if config.primary.is_some_and(|p| self.is_me(p)) && self.primary.is_none() {
            self.become_primary();
        } else if self.primary.is_some() {
            self.config_changed_as_primary(old.as_ref());
        }
    }

    /// True if the set can mean this very copy: it was a member's when it was opened, or has been resynced
    /// since, or an operator forced it. Otherwise the set means a copy that this run had before [R10]; so
    /// does a force that is recorded as of a copy which shares something with those before it, as this one,
    /// which was never a member's, does not [R17].
    fn belongs_to(&self, config: &ConfigView) -> bool {
        self.belongs || self.begins_from_nothing(config)
    }

    /// True if this copy does not hold the lineage of the config yet.
    pub(super) fn begins_lineage(&self, config: &ConfigView) -> bool {
        config.lineage != self.store.superblock().lineage
    }

    /// True if, in addition, that lineage began by force from a copy that shares nothing with those before it.
    pub(super) fn begins_from_nothing(&self, config: &ConfigView) -> bool {
        let shares = config.history.last().is_some_and(|fork| fork.fork_epoch > Epoch(0));
        self.begins_lineage(config) && !shares
    }

    /// A lineage begins from this copy. In the one that it leaves behind any copy may have become like any other
    /// (resynced from it, or made anew), and what this one knows of the other's differences was never told to it.
    /// So each copy counts as different wherever one of them is, durably before anything is done in the new
    /// lineage, and so before a bit is cleared [R17].
    fn doubt_all_copies(&mut self) {
        let runs = self.store.dirty_for_anyone();
        for slot in self.store.slots() {
            let Some(bitmap) = self.store.dirty_mut(slot) else { continue };
            for run in &runs {
                bitmap.set_range(run.start, run.count);
            }
            self.suspects.suspect_all(slot);
        }
        let tickets = self.store.save_all();
        self.store.hold_superblock_until(tickets);
    }

    fn not_ours(&mut self, config: &ConfigView) {
        let reason = format!("volume {} of this config is not the one on this disk", config.volume);
        if config.volume == self.store.superblock().volume {
            // Removed from the volume: nothing is served any more, nothing is lost.
            self.leave_reign(config);
        }
        self.event(Event::Refused { node: self.me.node, reason });
    }

    /// The reign is over for whoever acted in it: the primary drops its requests and closes their
    /// connections [R23]; a secondary drops what it has not begun.
    fn leave_reign(&mut self, config: &ConfigView) {
        if self.primary.is_some() {
            self.drop_requests();
            self.drop_all_targets();
            self.primary = None;
            let reason = format!("the reign is over: {}", primary_name(config));
            self.event(Event::StoppedServing(reason.clone()));
            if !mutated(Mutation::R23) {
                self.out.push_back(Output::CloseClients(reason));
            }
        }
        self.discard_all_incoming();
        self.following.stable = None;
        self.following.confirmed = None;
        self.intents.enter_reign();
        for peer in self.peers.values_mut() {
            peer.forget_report();
        }
    }

    /// Keeps one entry per other replica of the config.
    fn follow_replicas(&mut self, config: &ConfigView) {
        let gone: Vec<_> = self.peers.keys().copied().filter(|n| config.replica(*n).is_none()).collect();
        for node in gone {
            if let Some(session) = self.peers.get(&node).and_then(|p| p.session) {
                self.session_down(session.id);
                self.out
                    .push_back(Output::CloseSession(session.id, "no replica of this volume any more".into()));
            }
            self.peers.remove(&node);
        }
        let me = self.me.node;
        for replica in config.replicas.iter().filter(|r| r.node != me) {
            let now = self.now;
            self.store.add_dirty(replica.slot);
            self.peers.entry(replica.node).or_insert_with(|| Peer::new(replica.slot, now));
        }
    }

    /// Marks whoever left, clears whoever joined.
    fn follow_membership(&mut self, old: Option<&ConfigView>, config: &ConfigView) {
        let Some(old) = old else {
            if config.in_sync.contains(&self.me) {
                self.has_joined(&config.in_sync);
            }
            return;
        };
        let slot = |m: &Member| config.slot(m.node);
        let others = |m: &&Member| m.node != self.me.node;
        let left = old.in_sync.iter().filter(others).filter(|m| !config.in_sync.contains(m));
        let left: Vec<ReplicaSlot> = left.filter_map(slot).collect();
        let joined = config.in_sync.iter().filter(others).filter(|m| !old.in_sync.contains(m));
        let joined: Vec<ReplicaSlot> = joined.filter_map(slot).collect();
        // Before the next acknowledgement, which comes after this call [R12].
        for slot in left.into_iter().filter(|_| !mutated(Mutation::R12)) {
            self.mark_intents_for(slot);
        }
        let (was, is) = (old.in_sync.contains(&self.me), config.in_sync.contains(&self.me));
        if !was && is {
            self.has_joined(&config.in_sync);
        }
        if was && is {
            for slot in joined {
                if let Some(bitmap) = self.store.dirty_mut(slot) {
                    bitmap.clear_all();
                    self.suspects.clear(slot);
                }
            }
        }
    }

    /// Puts the config into the superblock, if this run of the process is a member of it.
    fn record_config(&mut self, config: &ConfigView) {
        let me = self.me.incarnation;
        if !config.in_sync.contains(&self.me) {
            return self.settle_doubt(config);
        }
        if config.in_sync == [self.me] && self.begins_lineage(config) {
            self.doubt_all_copies();
        }
        let os_boot = self.os_boot;
        let doubtful = self.store.trust != SuperblockTrust::Sound;
        self.config_version = self.store.change_superblock(|sb| {
            sb.cluster = config.cluster;
            sb.epoch = config.epoch;
            sb.reign = config.reign;
            sb.lineage = config.lineage;
            sb.member = Some(me);
            sb.chain.clear();
            sb.current = me;
            sb.os_boot = os_boot;
            sb.inconsistent = None;
            sb.base = BaseContent::Member;
            sb.clean = None;
        });
        if doubtful {
            self.store.trust = SuperblockTrust::Sound;
            self.config_version = self.store.rewrite_superblock();
        }
    }

    /// A doubtful superblock is believed if it says exactly what the committed config says of this
    /// replica [R16].
    fn settle_doubt(&mut self, config: &ConfigView) {
        if self.store.trust != SuperblockTrust::Doubtful {
            return;
        }
        let superblock = self.store.superblock();
        let last = config.replica(self.me.node).and_then(|r| r.last_member);
        let matches = superblock.epoch == config.epoch
            && superblock.reign == config.reign
            && superblock.lineage == config.lineage
            && last.is_some_and(|run| continues(superblock, run));
        if matches {
            self.store.trust = SuperblockTrust::Sound;
            self.config_version = self.store.rewrite_superblock();
        }
    }

    /// The sizes that this replica was opened with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// True if the content goes on from what `run` held as a member, with nothing in between but later runs of
/// the same replica [R6].
pub(super) fn continues(superblock: &Superblock, run: Incarnation) -> bool {
    superblock.member.is_some_and(|member| member == run || superblock.chain.contains(&run))
}

fn primary_name(config: &ConfigView) -> String {
    match config.primary {
        Some(primary) => format!("{} is primary since epoch {}", primary.node, config.reign),
        None => format!("the volume was demoted at epoch {}", config.epoch),
    }
}
