//! The invariants, checked as things happen. Each check is cheap, so that it runs at every step that could
//! break it: at each answer, each message, each disk write, each committed change.
//!
//! They read the disks and the committed state, never the core's own idea of itself, but for whom it serves.

use std::sync::Arc;

use blkrepl_engine::control::{ClusterState, VolumeRecord};
use blkrepl_engine::replica::ClientError;
use blkrepl_engine::types::{Member, NodeId, Reign};
use blkrepl_engine::wire::PeerMsg;

use crate::content::{ROT, SECTORS};
use crate::history::OpKind;
use crate::outcome::Invariant;
use crate::world::{VOLUME, World};

impl World {
    pub(crate) fn volume(&self) -> Option<&VolumeRecord> {
        self.committed.volumes.get(&VOLUME)
    }

    fn members(&self) -> Vec<Member> {
        self.volume().map(|v| v.in_sync.clone()).unwrap_or_default()
    }

    /// True if the node serves at this moment, by its own clock as it is now.
    pub(crate) fn serves_now(&self, id: NodeId) -> bool {
        let n = self.node_ref(id);
        n.serves() && n.clock.local(self.now) < n.lease_until
    }

    /// Invariant 2: leases of two primaries never overlap.
    pub(crate) fn check_leases(&mut self, id: NodeId) {
        if !self.serves_now(id) {
            return;
        }
        self.served_at = self.now;
        let other = self.ids().find(|other| *other != id && self.serves_now(*other));
        if let Some(other) = other {
            self.broke(Invariant::OneServer, format!("{id} and {other} serve at the same time"));
        }
    }

    pub(crate) fn begins_to_serve(&mut self, id: NodeId, reign: Reign) {
        self.node(id).served_in = reign.0;
        self.check_leases(id);
    }

    /// An answer is let go.
    pub(crate) fn check_answer(&mut self, id: NodeId, op: usize, values: &Result<Vec<u64>, ClientError>) {
        let now = self.now;
        let n = self.node_ref(id);
        let Some(config) = n.replica.as_ref().and_then(|r| r.config()) else { return };
        let (reign, epoch) = (config.reign, config.epoch);
        if reign.0 < self.answered_reign {
            let text =
                format!("{id} answers in reign {reign}, after an answer in reign {}", self.answered_reign);
            return self.broke(Invariant::OneServer, text);
        }
        // A failed replica without a successor tells its clients so whether it has a lease or not.
        if n.clock.local(now) >= n.lease_until && values.is_ok() {
            return self.broke(Invariant::OneServer, format!("{id} answers {op} without a lease [R26, R27]"));
        }
        // One that failed cannot write its superblock; all it says is that.
        let behind = n.superblocks.iter().flatten().find(|sb| sb.reign != reign || sb.epoch != epoch);
        if let Some(sb) = behind.filter(|_| values.is_ok()) {
            let text = format!(
                "{id} answers in reign {reign} at epoch {epoch}, its superblock says reign {} and epoch {}",
                sb.reign, sb.epoch
            );
            return self.broke(Invariant::SuperblockFirst, text);
        }
        self.answered_reign = reign.0;
        let kind = self.history.op(op).kind;
        match values {
            Ok(_) => {
                let durable = self.members().len() == 1
                    || self.shape.settings.durability == blkrepl_engine::types::Durability::Always;
                self.history.released(op, durable);
                if matches!(kind, OpKind::Write | OpKind::Zero) {
                    let (first, count) = (self.history.op(op).first, self.history.op(op).count);
                    self.check_members(first, count, "acknowledged");
                }
            }
            Err(error) => self.check_error(id, op, *error),
        }
    }

    /// A client is told of an error: allowed only where a disk failed, and no good copy was in reach.
    fn check_error(&mut self, id: NodeId, op: usize, error: ClientError) {
        let o = self.history.op(op);
        let (first, count) = (o.first, o.count);
        if self.disk_trouble(id, first, count) {
            self.stats.saw("error answered");
            return;
        }
        let bad = &self.node_ref(id).disk.bad;
        let text = format!("{id} answers operation {op} with {error:?} for no reason (unreadable: {bad:?})");
        self.broke(Invariant::Answered, text);
    }

    /// Invariant 1, and what R14 adds for the only member: every member holds what was acknowledged.
    pub(crate) fn check_members(&mut self, first: u64, count: u64, when: &str) {
        let members = self.members();
        for member in &members {
            let n = self.node_ref(member.node);
            if !n.holds_all_of(*member) {
                continue;
            }
            let alone = members.len() == 1;
            for sector in first..first + count {
                if n.disk.bad.contains(&sector) {
                    continue;
                }
                if let Some(why) = self.history.outdated(sector, n.disk.seen(sector)) {
                    let text = format!("{when}: member {}: {why}", member.node);
                    return self.broke(Invariant::AckedOnMembers, text);
                }
                if !alone || !self.is_settled(*member) {
                    continue;
                }
                if let Some(why) = self.history.outdated(sector, n.disk.stable(sector)) {
                    let text = format!("{when}: {} is the only member and has not made stable: {why}", n.id);
                    return self.broke(Invariant::Survives, text);
                }
            }
        }
    }

    /// True if the only member has served since it was named alone: what it takes to be alone is done.
    fn is_settled(&self, member: Member) -> bool {
        self.volume().is_some_and(|v| v.reign.0 == self.node_ref(member.node).served_in)
    }

    /// A copy was lost, or the members changed: does the promise for what was not flushed end here? It does
    /// if no member is left that is alive, and one of several lost what it had not flushed.
    pub(crate) fn copies_changed(&mut self) {
        let members = self.members();
        if members.is_empty() {
            return;
        }
        let alive = |m: &Member| self.node_ref(m.node).lives_as(*m);
        let lost = |m: &Member| !self.node_ref(m.node).holds_all_of(*m);
        if members.iter().any(alive) || !members.iter().any(lost) {
            return;
        }
        if let [only] = members.as_slice()
            && self.is_settled(*only)
            && self.node_ref(only.node).emptied_boot < only.incarnation.boot
        {
            return;
        }
        let key: Vec<u64> = members.iter().map(|m| self.node_ref(m.node).lost_boot).collect();
        let epoch = self.volume().map_or(0, |v| v.epoch.0);
        if self.operator.promise_ended(epoch, key) {
            self.note("ATLAS", format_args!("what was not flushed may be gone: no member is left"));
            self.stats.promise_ends += 1;
            self.history.promise_ends(self.now, false);
        }
    }

    /// Invariant 5 for what is sent.
    pub(crate) fn check_send(&mut self, id: NodeId, msg: &PeerMsg) {
        if let PeerMsg::Write { blocks, .. } | PeerMsg::Zero { blocks, .. } = msg
            && !self.node_ref(id).disk.intends(*blocks)
        {
            let text = format!("{id} sends {blocks:?}, which its intent map does not durably name");
            self.broke(Invariant::IntentFirst, text);
        }
    }

    /// An entry of the log is committed.
    pub(crate) fn committed(&mut self, state: Arc<ClusterState>) {
        let old = std::mem::replace(&mut self.committed, state);
        let (Some(old), Some(new)) = (old.volumes.get(&VOLUME).cloned(), self.volume().cloned()) else {
            return;
        };
        if old.epoch == new.epoch {
            return;
        }
        self.trace.mix(&[
            9,
            new.epoch.0,
            new.reign.0,
            new.primary.map_or(0, |p| p.node.0),
            new.in_sync.len() as u64,
        ]);
        let members: Vec<String> =
            new.in_sync.iter().map(|m| format!("{} {}", m.node, m.incarnation)).collect();
        let primary = new.primary.map_or("nobody".into(), |p| p.node.to_string());
        self.note(
            "COMMIT",
            format_args!(
                "epoch {} reign {} primary {primary}, in sync: {}",
                new.epoch,
                new.reign,
                members.join(", ")
            ),
        );
        if new.lineage != old.lineage {
            self.forced(&new);
        }
        self.check_change(&old, &new);
        self.copies_changed();
        let sectors = self.history_sectors();
        self.check_members(0, sectors, "committed");
        self.check_differences();
    }

    fn history_sectors(&self) -> u64 {
        self.shape.geometry.blocks() * SECTORS
    }

    fn forced(&mut self, new: &VolumeRecord) {
        if !self.operator.takes_force() {
            self.broke(Invariant::PromotedInSync, "a lineage began without an operator".into());
        }
        self.history.promise_ends(self.now, true);
        self.operator.lineage_began(new.epoch.0);
    }

    /// Invariants 2, 7 and 8 at a change of primary.
    fn check_change(&mut self, old: &VolumeRecord, new: &VolumeRecord) {
        if new.epoch != old.epoch.next() {
            self.broke(Invariant::OneServer, format!("epoch {} follows {}", new.epoch, old.epoch));
        }
        let forced = new.lineage != old.lineage;
        let restarted = |m: &Member| self.committed.has_restarted(*m);
        self.stats.saw(match (old.primary, new.primary) {
            _ if forced => "commit forced",
            (Some(a), Some(b)) if a == b && new.in_sync.len() > old.in_sync.len() => "commit join",
            (Some(a), Some(b)) if a == b && new.in_sync.len() < old.in_sync.len() => "commit remove",
            (Some(a), Some(b)) if a == b => "commit other",
            (Some(_), None) => "commit demote",
            (None, Some(_)) => "commit promote demoted",
            (Some(_), Some(b)) if !old.in_sync.contains(&b) => "commit promote restarted",
            (Some(_), Some(_)) if new.in_sync.len() < old.in_sync.len() => "commit hand-over",
            _ => "commit promote",
        });
        if old.primary == new.primary {
            return;
        }
        if let Some(primary) = new.primary.filter(|_| !forced) {
            let named = old.in_sync.contains(&primary);
            let again = old.member(primary.node).is_some()
                && new.in_sync == [primary]
                && (old.demoted || old.in_sync.iter().all(restarted));
            if !named && !again {
                let text = format!("{} run {} was not in sync", primary.node, primary.incarnation);
                self.broke(Invariant::PromotedInSync, text);
            }
        }
        let Some(was) = old.primary else { return };
        let n = self.node_ref(was.node);
        if n.is_up() && n.incarnation == was.incarnation && self.serves_now(was.node) {
            let text = format!("{} still serves when its role is given away", was.node);
            self.broke(Invariant::OneServer, text);
        }
    }

    /// Invariant 6: replicas differ only where intent maps and dirty bitmaps on their disks say so.
    pub(crate) fn check_differences(&mut self) {
        let Some(v) = self.volume().cloned() else { return };
        let holds = |m: &&Member| {
            let n = self.node_ref(m.node);
            n.holds_all_of(**m) && n.disk.has_files()
        };
        let members: Vec<Member> = v.in_sync.iter().filter(holds).copied().collect();
        let Some(a) = members.first().copied() else { return };
        for other in self.ids().filter(|id| *id != a.node) {
            let b = self.node_ref(other);
            if !b.disk.has_files() {
                continue;
            }
            let member = members.iter().any(|m| m.node == other);
            // Of a replica outside the set that goes on from a member's content, the difference is known.
            let known = !member
                && v.member(other).is_none()
                && b.superblocks.iter().all(|sb| {
                    sb.as_ref().is_some_and(|sb| {
                        sb.lineage == v.lineage
                            && sb.identity == b.disk.identity
                            && sb.member.is_some_and(|run| {
                                let last = v.replica(other).and_then(|r| r.last_member);
                                last == Some(run) || last.is_some_and(|l| sb.chain.contains(&l))
                            })
                    })
                });
            if !member && !known {
                continue;
            }
            if let Some(text) = self.difference(a.node, other, !member) {
                return self.broke(Invariant::ReplicasEqual, text);
            }
        }
    }

    /// The first block in which two replicas differ and no map says so.
    fn difference(&self, a: NodeId, b: NodeId, bitmap: bool) -> Option<String> {
        let (one, two) = (self.node_ref(a), self.node_ref(b));
        let per_region = self.shape.geometry.blocks_per_region() * SECTORS;
        let mut dirty = None;
        for sector in 0..one.disk.sectors() {
            let (x, y) = (one.disk.seen(sector), two.disk.seen(sector));
            if x == y || (x | y) & ROT != 0 {
                continue;
            }
            if one.intends_sector(sector, per_region) || two.intends_sector(sector, per_region) {
                continue;
            }
            if bitmap && dirty.get_or_insert_with(|| one.disk.dirty(two.slot)).get(sector / SECTORS) {
                continue;
            }
            return Some(format!(
                "sector {sector} is {} on {a} and {} on {b}, and no intent map or bitmap says so",
                self.history.describe(x),
                self.history.describe(y)
            ));
        }
        None
    }

    /// At the end: all replicas hold the same, nothing is left over.
    pub(crate) fn check_end(&mut self) {
        for id in self.ids().skip(1) {
            let (one, two) = (self.node_ref(NodeId(1)), self.node_ref(id));
            let differs = (0..one.disk.sectors()).find(|s| {
                let (x, y) = (one.disk.seen(*s), two.disk.seen(*s));
                x != y && (x | y) & ROT == 0
            });
            if let Some(sector) = differs {
                let text = format!(
                    "in the end sector {sector} is {} on node 1 and {} on {id}",
                    self.history.describe(one.disk.seen(sector)),
                    self.history.describe(two.disk.seen(sector))
                );
                return self.broke(Invariant::ReplicasEqual, text);
            }
        }
        for id in self.ids() {
            let n = self.node_ref(id);
            if !n.bufs.is_empty() || !n.pending.is_empty() {
                let text = format!("{id} keeps buffers {:?} and disk requests {:?}", n.bufs, n.pending);
                return self.broke(Invariant::NothingLeaks, text);
            }
        }
        let sectors = self.history_sectors();
        self.check_members(0, sectors, "in the end");
        if let Err(text) = self.history.check() {
            self.broke(Invariant::Linearizable, text);
        }
    }
}
