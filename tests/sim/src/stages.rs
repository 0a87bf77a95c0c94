//! The course of a run: found the volume, strike, heal, wait until everything is well, compare.

use blkrepl_engine::control::ClusterOp;
use blkrepl_engine::types::{LineageId, NodeId, ReplicaSlot};

use crate::clock::{MS, S};
use crate::fault::schedule;
use crate::outcome::Invariant;
use crate::world::{Event, Stage, VOLUME, World};

/// How often everything is looked at.
const CHECK: u64 = 50 * MS;
/// How long founding may take.
const FOUND_BY: u64 = 30 * S;
/// After faults are over the volume is served within this (design invariant 10)...
const SERVED_BY: u64 = 25 * S;
/// ... and every replica is in sync within this.
const IN_SYNC_BY: u64 = 120 * S;
/// How long the clients are given to get their answers and the intent maps to empty.
const QUIET: u64 = 3 * S;

impl World {
    pub(crate) fn check(&mut self) {
        for id in self.ids().collect::<Vec<_>>() {
            self.check_leases(id);
        }
        self.check_differences();
        match self.stage {
            Stage::Founding => self.found(),
            Stage::Faults { until } if self.now >= until => self.begin_healing(),
            Stage::Faults { .. } => {}
            Stage::Healing { by } => self.heals(by),
            Stage::Ending { at, by } => self.ends(at, by),
            Stage::Over => return,
        }
        self.schedule(CHECK, Event::Check);
    }

    fn found(&mut self) {
        if self.now > FOUND_BY {
            return self.broke(Invariant::Liveness, format!("no volume is served: {}", self.summary()));
        }
        if self.volume().is_none() {
            let ready = self.ids().all(|id| self.committed.is_newest(self.node_ref(id).me()));
            if ready && !self.operator.creating {
                self.operator.creating = true;
                self.create_volume();
            }
            return;
        }
        if !self.ids().any(|id| self.serves_now(id)) {
            return;
        }
        let until = self.now + self.shape.faults_for;
        self.stage = Stage::Faults { until };
        let mut rng = self.rng.fork();
        let (allowed, always) = (self.options.faults, self.options.always);
        self.strikes = schedule(&mut rng, allowed, always, self.now + 10 * MS, until);
        self.struck = vec![false; self.strikes.len()];
        for (number, strike) in (0u32..).zip(self.strikes.clone()) {
            self.queue.push(strike.at, Event::Strike(number));
        }
        self.start_clients();
    }

    /// As `blkrepl volume create`: the first member's files are made before the volume is committed.
    fn create_volume(&mut self) {
        let first = NodeId(1);
        let lineage = LineageId(u128::from(self.rng.next()) << 16);
        let member = self.node_ref(first).me();
        let superblock = self.superblock(first, lineage, Some(member));
        let others: Vec<ReplicaSlot> =
            self.ids().filter(|id| *id != first).map(|id| self.node_ref(id).slot).collect();
        self.node(first).disk.make_files(superblock, &others);
        let op = ClusterOp::CreateVolume {
            id: VOLUME,
            name: "vol0".into(),
            geometry: self.shape.geometry,
            settings: self.shape.settings,
            replicas: self.ids().collect(),
            first: member,
            lineage,
        };
        self.submit(first, "create", op);
    }

    fn begin_healing(&mut self) {
        self.heal();
        self.served_at = self.now;
        self.stage = Stage::Healing { by: self.now + IN_SYNC_BY };
    }

    fn all_in_sync(&self) -> bool {
        let Some(v) = self.volume() else { return false };
        self.ids().all(|id| v.in_sync.contains(&self.node_ref(id).me()))
            && self.ids().any(|id| self.serves_now(id))
            && !self.ids().any(|id| self.node_ref(id).has_failed())
    }

    fn heals(&mut self, by: u64) {
        self.bring_back();
        let paused = self.ids().any(|id| self.node_ref(id).paused_until > self.now);
        if paused {
            self.served_at = self.now;
        }
        if self.now > self.served_at + SERVED_BY {
            let text = format!("not served {} s after faults ended: {}", SERVED_BY / S, self.summary());
            return self.broke(Invariant::Liveness, text);
        }
        let enough = self.stats.answered >= u64::from(self.options.ops);
        if self.all_in_sync() && enough {
            self.note("END", format_args!("all replicas are in sync; the clients stop"));
            self.stage = Stage::Ending { at: self.now + QUIET, by: self.now + IN_SYNC_BY };
        } else if self.all_in_sync() && self.stats.answered > self.answered_seen {
            // Only the clients are not done, and they get on.
            self.answered_seen = self.stats.answered;
            self.stage = Stage::Healing { by: self.now + IN_SYNC_BY };
        } else if self.now > by && self.all_in_sync() {
            let open: Vec<_> = self.clients.iter().map(|c| c.open.clone()).collect();
            self.broke(Invariant::Answered, format!("requests stay open: {open:?}; {}", self.summary()));
        } else if self.now > by {
            let text = format!("not in sync {} s after faults ended: {}", IN_SYNC_BY / S, self.summary());
            self.broke(Invariant::Liveness, text);
        }
    }

    fn ends(&mut self, at: u64, by: u64) {
        self.bring_back();
        let quiet = self.clients.iter().all(crate::client::Client::is_done)
            && self.ids().all(|id| self.node_ref(id).pending.is_empty());
        if self.now >= at && quiet && self.all_in_sync() {
            self.check_end();
            self.stage = Stage::Over;
        } else if self.now > by {
            let open: Vec<_> = self.clients.iter().map(|c| c.open.clone()).collect();
            let text = format!("requests stay open: {open:?}; {}", self.summary());
            self.broke(Invariant::Answered, text);
        }
    }

    /// What is what, for a report.
    fn summary(&self) -> String {
        let mut out = String::new();
        if let Some(v) = self.volume() {
            out += &format!("epoch {} primary {:?} in sync {:?}; ", v.epoch, v.primary, v.in_sync);
        }
        for id in self.ids() {
            let n = self.node_ref(id);
            let status = n.replica.as_ref().map(|r| r.status());
            out += &format!("{id} {} {:?} lease {:?}: {status:?}; ", n.incarnation, n.phase, n.lease_until);
        }
        out
    }
}
