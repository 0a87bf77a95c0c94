//! What the strikes do, and the fault atlas: where each may strike.
//!
//! The atlas keeps one good copy of every block wherever a promise depends on one. It holds back nothing
//! that the promise covers; what it lets through beyond the promise it names: the moment from which
//! acknowledged writes that were not flushed may be gone (`checks::copies_changed`), content that a disk
//! falsified in silence (marked sector by sector, wherever it is copied to), and errors that a client may be
//! told of because the only copy cannot be read or written.

use blkrepl_engine::control::VolumeReport;
use blkrepl_engine::control::failover::eligible_restarted;
use blkrepl_engine::replica::Replica;
use blkrepl_engine::types::{BlockRange, Member, NodeId};

use crate::client::ClientEvent;
use crate::clock::{MS, S, Time};
use crate::content::{ROT, SECTORS, at};
use crate::control::Disturbance;
use crate::fault::FaultKind;
use crate::net::Damage;
use crate::node::{Node, Phase};
use crate::operator::Force;
use crate::outcome::Invariant;
use crate::rng::Rng;
use crate::world::{Event, NodeEvent, Stage, VOLUME, World};

/// How long the volume has to be without a primary before an operator forces.
const FORCE_AFTER: Time = 8 * S;
/// How long after an injected disk error clients may be told of it.
const ERROR_EXCUSED: Time = 30 * S;

impl World {
    /// A strike of the schedule is due.
    pub(crate) fn strike(&mut self, number: u32) {
        let strike = self.strikes[at(u64::from(number))];
        if !matches!(self.stage, Stage::Faults { .. }) {
            return;
        }
        if self.options.skip.contains(&number) || number >= self.options.strikes_max {
            return;
        }
        let mut rng = Rng::new(strike.seed);
        self.note("FAULT", format_args!("{number}: {}", strike.kind.name()));
        let took = self.carry_out_strike(strike.kind, &mut rng);
        self.trace.mix(&[10, u64::from(number), u64::from(took)]);
        self.struck[at(u64::from(number))] = took;
        if took {
            self.count(strike.kind);
        } else {
            *self.stats.held_back.entry(strike.kind).or_default() += 1;
            self.note("ATLAS", format_args!("{number} is held back, or meets nothing"));
        }
    }

    fn carry_out_strike(&mut self, kind: FaultKind, rng: &mut Rng) -> bool {
        use FaultKind as K;
        let id = NodeId(1 + rng.below(self.shape.data));
        match kind {
            K::SlowLink | K::ConnectionLoss | K::Partition | K::OneWay | K::Isolate | K::ControlCut => {
                self.strike_link(kind, rng)
            }
            K::HalfOpen | K::CorruptFrame | K::TruncateFrame | K::DuplicateConnection => {
                self.strike_conn(kind, rng)
            }
            K::ClientLoss => self.lose_client(rng),
            K::ClientUnread => self.leave_unread(rng),
            K::SlowDisk
            | K::HungIo
            | K::WriteError
            | K::FlushError
            | K::DiskFull
            | K::LostWrite
            | K::MisdirectedWrite => self.strike_disk(kind, id, rng),
            K::ReadError | K::DataRot | K::MetaRot | K::SuperblockRot => self.damage_disk(kind, id, rng),
            K::Crash
            | K::CleanStop
            | K::Pause
            | K::PowerLoss
            | K::PowerLossTwo
            | K::PowerLossAll
            | K::DiskLoss
            | K::DataReplaced => self.strike_process(kind, id, rng),
            K::Move => self.ask_move(id),
            K::Demote => {
                let begun = self.ask_demote();
                if begun {
                    let wait = rng.skewed(50 * MS, 4 * S);
                    self.schedule(wait, Event::Operator);
                }
                begun
            }
            K::Promote => self.ask_promote(id, Force::No),
            K::Force => self.ask_promote(id, Force::Yes),
            K::Recreate => self.may_lose_copy(id) && self.ask_recreate(id),
            K::Election | K::SlowControl | K::StaleView | K::LostCommand | K::DoubledCommand => {
                self.disturb_control(kind, rng);
                true
            }
        }
    }

    fn disturb_control(&mut self, kind: FaultKind, rng: &mut Rng) {
        let until = self.now + rng.skewed(100 * MS, 5 * S);
        let what = match kind {
            FaultKind::Election => Disturbance::Election,
            FaultKind::SlowControl => Disturbance::Slow { factor: rng.between(5, 80), until },
            FaultKind::StaleView => {
                Disturbance::Stale { node: NodeId(1 + rng.below(self.shape.data + 1)), until }
            }
            FaultKind::LostCommand => Disturbance::Lose(u32::try_from(rng.between(1, 4)).unwrap_or(1)),
            _ => Disturbance::Double(u32::try_from(rng.between(1, 4)).unwrap_or(1)),
        };
        self.control.disturb(self.now, what);
    }

    // Network.

    fn two_nodes(&self, rng: &mut Rng) -> (NodeId, NodeId) {
        let a = 1 + rng.below(self.shape.data);
        let b = 1 + (a + rng.below(self.shape.data - 1)) % self.shape.data;
        (NodeId(a), NodeId(b))
    }

    /// Nothing passes from one node to another until then.
    fn block(&mut self, from: NodeId, to: NodeId, until: Time, data: bool, control: bool) {
        if data {
            let link = self.link(from, to);
            link.blocked_until = link.blocked_until.max(until);
        }
        if control {
            self.control.block(self.now, from, to, until);
        }
    }

    fn strike_link(&mut self, kind: FaultKind, rng: &mut Rng) -> bool {
        let (a, b) = self.two_nodes(rng);
        let until = self.now + rng.skewed(20 * MS, 8 * S);
        self.note("FAULT", format_args!("{a} and {b} for {} ms", (until - self.now) / MS));
        match kind {
            FaultKind::SlowLink => {
                let factor = rng.between(5, 300);
                let link = self.link(a, b);
                (link.slow_until, link.slow_factor) = (until, factor);
            }
            FaultKind::ConnectionLoss => {
                let open: Vec<usize> = (0..self.conns.len())
                    .filter(|c| self.conns[*c].ends.iter().all(|e| e.session.is_some()))
                    .collect();
                if open.is_empty() {
                    return false;
                }
                let (conn, keep) = (rng.pick(&open), rng.below(1001));
                self.break_conn(conn, keep);
            }
            FaultKind::Partition => {
                let control = rng.chance(500);
                self.block(a, b, until, true, control);
                self.block(b, a, until, true, control);
            }
            FaultKind::OneWay => self.block(a, b, until, true, rng.chance(500)),
            FaultKind::ControlCut => {
                let witness = self.witness();
                let b = if rng.chance(500) { witness } else { b };
                self.block(a, b, until, false, true);
                if rng.chance(700) {
                    self.block(b, a, until, false, true);
                }
            }
            _ => {
                for other in (1..=self.shape.data + 1).map(NodeId).filter(|o| *o != a) {
                    self.block(a, other, until, true, true);
                    self.block(other, a, until, true, true);
                }
            }
        }
        true
    }

    fn strike_conn(&mut self, kind: FaultKind, rng: &mut Rng) -> bool {
        let (a, b) = self.two_nodes(rng);
        match kind {
            FaultKind::CorruptFrame => self.link(a, b).damage = Some(Damage::Flip),
            FaultKind::TruncateFrame => self.link(a, b).damage = Some(Damage::Truncate),
            FaultKind::DuplicateConnection => {
                let (low, high) = (a.min(b), a.max(b));
                if !self.node_ref(low).is_running() || !self.node_ref(high).is_running() {
                    return false;
                }
                self.connect_peers(low, high);
            }
            _ => {
                let Some(session) = self.node_ref(a).session_to(b) else { return false };
                let end = self.node_ref(a).sessions[&session];
                // The other end is not told.
                self.conns[end.conn].ends[end.side].closed = true;
                self.conns[end.conn].ends[end.side].session = None;
                self.close_session(a, session);
                self.settle(a);
            }
        }
        true
    }

    fn lose_client(&mut self, rng: &mut Rng) -> bool {
        let client = at(rng.below(self.shape.clients));
        let Some(c) = self.clients[client].connection else { return false };
        let wait = rng.skewed(10_000, 5 * MS);
        let life = c.life;
        self.queue.push(self.now + wait, Event::Node(c.node, life, NodeEvent::ClientGone(c.conn)));
        self.connection_over(client);
        true
    }

    /// What a client asks from now on is not read for a while; it loses patience before that [R24].
    fn leave_unread(&mut self, rng: &mut Rng) -> bool {
        let client = at(rng.below(self.shape.clients));
        let Some(c) = self.clients[client].connection else { return false };
        let unread = rng.skewed(20 * MS, S);
        self.leaves_unread(client, self.now + unread);
        let patience = rng.between(MS, unread / 2);
        let gone = Event::Node(c.node, c.life, NodeEvent::ClientGone(c.conn));
        self.queue.push(self.now + patience + rng.skewed(10_000, 5 * MS), gone);
        self.queue.push(self.now + patience, Event::Client(client, ClientEvent::Closed { conn: c.number }));
        true
    }

    // Disks.

    fn strike_disk(&mut self, kind: FaultKind, id: NodeId, rng: &mut Rng) -> bool {
        let now = self.now;
        let n = self.node(id);
        if !n.is_running() {
            return false;
        }
        let defects = &mut n.disk.defects;
        let some = u32::try_from(rng.between(1, 3)).unwrap_or(1);
        match kind {
            FaultKind::SlowDisk => {
                (defects.slow_until, defects.slow_factor) =
                    (now + rng.skewed(50 * MS, 5 * S), rng.between(5, 200));
            }
            FaultKind::HungIo => defects.hang_until = now + rng.skewed(50 * MS, 12 * S),
            FaultKind::WriteError => defects.write_errors += some,
            FaultKind::FlushError => defects.flush_errors += 1,
            FaultKind::DiskFull => defects.full_until = now + rng.skewed(10 * MS, 3 * S),
            FaultKind::LostWrite => defects.lost_writes += some,
            _ => defects.misdirected += some,
        }
        if matches!(kind, FaultKind::WriteError | FaultKind::DiskFull) {
            n.disk.defects.errors_until = now + ERROR_EXCUSED;
        }
        true
    }

    fn damage_disk(&mut self, kind: FaultKind, id: NodeId, rng: &mut Rng) -> bool {
        let sectors = self.node_ref(id).disk.sectors();
        if !self.node_ref(id).disk.has_files() {
            return false;
        }
        match kind {
            FaultKind::ReadError => {
                let first = rng.below(sectors);
                let count = rng.between(1, 12).min(sectors - first);
                let good = (first..first + count).all(|s| self.has_good_copy(s, id));
                if good {
                    self.node(id).disk.bad.extend(first..first + count);
                }
                good
            }
            FaultKind::DataRot => {
                let sector = rng.below(sectors);
                if !self.has_good_copy(sector, id) {
                    return false;
                }
                self.node(id).disk.rot(sector);
                true
            }
            FaultKind::MetaRot => {
                let len = self.node_ref(id).disk.meta_len();
                // Where something is: the areas of the replicas that there are.
                let used = (8192 + 8192 * (1 + self.shape.data)).min(len);
                let pages = (used - 8192) / 512;
                for _ in 0..rng.between(1, 3) {
                    let page = 8192 + 512 * rng.below(pages);
                    self.node(id).disk.rot_meta(page, rng);
                }
                true
            }
            _ => {
                let copy = rng.below(2);
                let other = self.node_ref(id).disk.superblocks()[at(1 - copy)].is_some();
                if other {
                    self.node(id).disk.rot_meta(copy * 4096, rng);
                    let n = self.node(id);
                    n.superblocks = n.disk.superblocks();
                    n.superblock_rotted = true;
                }
                other
            }
        }
    }

    // Copies.

    fn members_but(&self, id: NodeId) -> Vec<Member> {
        let Some(v) = self.volume() else { return Vec::new() };
        v.in_sync.iter().filter(|m| m.node != id).copied().collect()
    }

    fn is_member(&self, id: NodeId) -> bool {
        self.volume().is_some_and(|v| v.member(id).is_some())
    }

    /// True if another member that is alive has everything, and nothing of it is known or made to be bad.
    pub(crate) fn may_lose_copy(&self, id: NodeId) -> bool {
        if self.volume().is_none() {
            return false;
        }
        if !self.is_member(id) {
            return true;
        }
        self.members_but(id).iter().any(|m| {
            let n = self.node_ref(m.node);
            let whole = (0..n.disk.sectors()).all(|s| n.disk.seen(s) & ROT == 0);
            n.lives_as(*m) && n.holds_all_of(*m) && n.disk.bad.is_empty() && whole
        })
    }

    /// The node's disk is a new one from here on, without files.
    pub(crate) fn empty_disk(&mut self, id: NodeId) {
        let geometry = self.shape.geometry;
        let n = self.node(id);
        let mut identity = n.disk.identity;
        identity.0[3] = identity.0[3].wrapping_add(1);
        n.disk = crate::disk::Disk::blank(geometry, VOLUME, identity);
        n.superblocks = [None, None];
        n.lost_boot = n.incarnation.boot;
        n.emptied_boot = n.incarnation.boot;
    }

    /// True if a member other than this node has a good copy of a sector.
    fn has_good_copy(&self, sector: u64, but: NodeId) -> bool {
        if !self.is_member(but) {
            return true;
        }
        self.members_but(but).iter().any(|m| {
            let n = self.node_ref(m.node);
            let good = !n.disk.bad.contains(&sector) && n.disk.seen(sector) & ROT == 0;
            n.lives_as(*m) && n.holds_all_of(*m) && good
        })
    }

    /// True if an error that a client is told of has its reason: the disk failed here, or a block
    /// cannot be read here and nobody who counts has it.
    pub(crate) fn disk_trouble(&self, id: NodeId, first: u64, count: u64) -> bool {
        let n = self.node_ref(id);
        if n.disk.defects.errors_until > self.now || n.has_failed() {
            return true;
        }
        let blocks = first / SECTORS..(first + count).div_ceil(SECTORS);
        let readable = |n: &Node, block: u64| n.disk.is_readable(BlockRange::between(block, block + 1));
        let others = self.members_but(id);
        let elsewhere = |block| {
            others.iter().any(|m| {
                let o = self.node_ref(m.node);
                o.lives_as(*m) && o.holds_all_of(*m) && readable(o, block)
            })
        };
        blocks.into_iter().any(|block| !readable(n, block) && !elsewhere(block))
    }

    // Processes.

    fn strike_process(&mut self, kind: FaultKind, id: NodeId, rng: &mut Rng) -> bool {
        let back = rng.skewed(10 * MS, 8 * S);
        // The witness is a process, too.
        let any = NodeId(1 + rng.below(self.shape.data + 1));
        match kind {
            FaultKind::Crash => {
                self.crash(any, false);
                self.start_later(any, back);
            }
            FaultKind::Pause => {
                let until = self.now + rng.skewed(50 * MS, 6 * S);
                self.control.pause(self.now, any, until);
                if any != self.witness() {
                    self.node(any).paused_until = until;
                }
            }
            FaultKind::CleanStop => {
                if !self.node_ref(id).is_running() {
                    return false;
                }
                self.input(id, Replica::begin_stop);
                self.start_later(id, back + S);
            }
            FaultKind::PowerLoss => {
                self.crash(id, true);
                self.start_later(id, back);
            }
            FaultKind::PowerLossTwo => {
                let other = NodeId(1 + id.0 % self.shape.data);
                for node in [id, other] {
                    self.crash(node, true);
                    self.start_later(node, rng.skewed(10 * MS, 8 * S));
                }
            }
            FaultKind::PowerLossAll => {
                let with_witness = rng.chance(500);
                for node in self.ids().collect::<Vec<_>>() {
                    self.crash(node, true);
                    self.start_later(node, rng.skewed(10 * MS, 8 * S));
                }
                if with_witness {
                    let witness = self.witness();
                    self.crash(witness, true);
                    self.start_later(witness, back);
                }
            }
            _ => {
                if !self.may_lose_copy(id) || !self.node_ref(id).disk.has_files() {
                    return false;
                }
                self.crash(id, true);
                if kind == FaultKind::DataReplaced {
                    let n = self.node(id);
                    n.emptied_boot = n.incarnation.boot;
                    n.disk.replace_data();
                } else {
                    self.empty_disk(id);
                }
                self.start_later(id, back);
            }
        }
        true
    }

    /// An operator looks after what waits for one: a volume that was demoted, a replica that cannot be used.
    pub(crate) fn operate(&mut self) {
        let Some(v) = self.volume().cloned() else { return };
        if v.primary.is_none() {
            let mut able: Vec<NodeId> = v.in_sync.iter().map(|m| m.node).collect();
            let n = at(self.rng.below(able.len() as u64));
            able.rotate_left(n);
            let _promoted = able.into_iter().any(|id| self.ask_promote(id, Force::No));
        }
        for id in self.ids().collect::<Vec<_>>() {
            if matches!(self.node_ref(id).phase, Phase::Unusable(_)) {
                self.ask_recreate(id);
            }
        }
    }

    /// Everything that is wrong ends.
    pub(crate) fn heal(&mut self) {
        self.note("HEAL", format_args!("faults are over"));
        let now = self.now;
        for link in &mut self.links {
            *link = crate::net::Link::default();
        }
        self.control.heal(now);
        for id in self.ids().collect::<Vec<_>>() {
            let disk = &mut self.node(id).disk;
            // What could not be read before may be told of later.
            let told_until = if disk.bad.is_empty() { 0 } else { now + ERROR_EXCUSED };
            let errors_until = disk.defects.errors_until.max(told_until);
            disk.defects = crate::disk::Defects { errors_until, ..crate::disk::Defects::default() };
            disk.bad.clear();
        }
        let witness = self.witness();
        self.start(witness);
    }

    /// While everything comes back: processes that are down or failed are started again.
    pub(crate) fn bring_back(&mut self) {
        let witness = self.witness();
        self.start(witness);
        for id in self.ids().collect::<Vec<_>>() {
            if self.node_ref(id).has_failed() && self.node_ref(id).paused_until <= self.now {
                self.crash(id, false);
            }
            self.start(id);
        }
        self.operate();
        self.force_if_nothing_else_helps();
    }

    /// If a disk was lost and the rest of the set with it, an operator has to force.
    fn force_if_nothing_else_helps(&mut self) {
        let Some(v) = self.volume().cloned() else { return };
        if self.ids().any(|id| self.serves_now(id)) || self.now < self.served_at + FORCE_AFTER {
            return;
        }
        // A copy whose superblock lost its second copy, and does not match the config, is not believed [R16];
        // nor is one that lost power before it could note that it had joined, or had been forced [R6].
        let refused = |m: &&Member| {
            let n = self.node_ref(m.node);
            // Nor one whose disk failed before it could.
            let well = n.holds_all_of(**m) && !n.superblock_rotted && n.disk.defects.errors_until <= self.now;
            let (Some(replica), false) = (&n.replica, well) else {
                return false;
            };
            let said = VolumeReport { health: replica.health(), report: replica.report() };
            eligible_restarted(&v, **m, &said).is_err()
        };
        let doubted: Vec<NodeId> = v.in_sync.iter().filter(refused).map(|m| m.node).collect();
        if !doubted.is_empty() {
            self.stats.saw("forced because no member is eligible");
            let _asked = doubted.into_iter().any(|id| self.ask_promote(id, Force::AlsoInconsistent));
            return;
        }
        let content_left = v.in_sync.iter().any(|m| {
            let n = self.node_ref(m.node);
            n.emptied_boot < m.incarnation.boot
        });
        if content_left {
            return;
        }
        let candidates: Vec<NodeId> = self.ids().filter(|id| v.member(*id).is_none()).collect();
        if candidates.is_empty() {
            self.broke(Invariant::Liveness, "every member's copy is gone: the atlas let it happen".into());
        }
        let _asked = candidates.into_iter().any(|id| self.ask_promote(id, Force::Yes));
    }
}
