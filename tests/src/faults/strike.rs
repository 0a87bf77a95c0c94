//! How each kind of fault is done.

use std::time::Duration;

use anyhow::Result;
use rustix::process::Signal;

use super::arena::Link;
use super::{Faults, Kind};
use crate::disk::Sickness;
use crate::proxy::{Blow, Condition, Direction, Traffic};

impl Faults<'_> {
    /// Does it; false if it is not possible, or not allowed, as things are.
    pub(super) fn inject(&mut self, kind: Kind) -> Result<bool> {
        if kind.is_of_disk() {
            return self.disk_fault(kind);
        }
        match kind {
            Kind::Kill | Kind::Pause => self.process_fault(kind),
            Kind::KillAll => {
                if self.sick.is_some() {
                    return Ok(false);
                }
                let alive: Vec<String> =
                    self.names.iter().filter(|name| !self.dead.contains(*name)).cloned().collect();
                self.kill(&alive)?;
                Ok(true)
            }
            Kind::Move | Kind::Promote | Kind::Demote => self.operator(kind).map(|()| true),
            Kind::CableCut | Kind::CableOneWay | Kind::CablePair => self.cable_fault(kind),
            _ => self.link_fault(kind),
        }
    }

    fn process_fault(&mut self, kind: Kind) -> Result<bool> {
        let node = self.any(false);
        if self.dead.contains(&node) || !self.may_harm(&node) {
            return Ok(false);
        }
        if kind == Kind::Kill {
            return self.kill(&[node]).map(|()| true);
        }
        if self.paused.contains(&node) {
            return Ok(false);
        }
        self.tell(format!("pause {node}"));
        self.cluster.signal(&node, Signal::STOP)?;
        self.paused.insert(node);
        Ok(true)
    }

    fn operator(&mut self, kind: Kind) -> Result<()> {
        let (at, to) = (self.any(true), self.any(true));
        match kind {
            Kind::Move => self.command(&at, &["move", "vol0", "--to", &to]),
            Kind::Demote => {
                self.demoted = true;
                self.command(&at, &["demote", "vol0"])
            }
            _ => self.command(&at, &["promote", "vol0"]),
        }
    }

    fn link_fault(&mut self, kind: Kind) -> Result<bool> {
        let arena = self.arena;
        if arena.links.is_empty() {
            return Ok(false);
        }
        if kind == Kind::LinkIsolate {
            let node = self.any(false);
            self.tell(format!("isolate {node}"));
            let touches = |link: &&Link| link.ends.0.as_ref() == Some(&node) || link.ends.1 == node;
            arena.links.iter().filter(touches).for_each(|link| link.proxy.set(Condition::black_hole()));
            return Ok(true);
        }
        let proxy = &arena.links[usize::try_from(self.random.below(arena.links.len() as u64))?].proxy;
        let nbd = proxy.traffic() == Traffic::Nbd;
        if nbd && kind == Kind::LinkCorrupt {
            return Ok(false);
        }
        let forward = self.random.chance(1, 2);
        let way = if forward { Direction::Forward } else { Direction::Back };
        let late = Duration::from_millis(5 + self.random.below(400));
        let now = proxy.condition();
        match kind {
            Kind::LinkSilent => proxy.set(Condition::black_hole()),
            Kind::LinkOneWay => {
                proxy.set(Condition { silent_forward: forward, silent_back: !forward, ..now });
            }
            Kind::LinkDelay => proxy.set(Condition { delay: late, ..now }),
            Kind::LinkThrottle => {
                let rate = 16_384 << self.random.below(7);
                proxy.set(Condition { rate, ..now });
            }
            Kind::LinkRefuse => proxy.set(Condition { refused: true, ..now }),
            Kind::LinkCorrupt => proxy.strike(Blow::Corrupt(way)),
            Kind::LinkTruncate => proxy.strike(Blow::Truncate(way)),
            // A client's end is always told to the server.
            Kind::LinkHalfOpen => {
                proxy.strike(if forward && !nbd { Blow::ResetDialer } else { Blow::ResetListener });
            }
            _ => proxy.strike(Blow::Reset),
        }
        let more = proxy.condition();
        self.tell(format!("{kind:?} {way:?} on {}, now {more:?}", proxy.name()));
        Ok(true)
    }

    fn cable_fault(&mut self, kind: Kind) -> Result<bool> {
        let Some(bridge) = &self.arena.bridge else { return Ok(false) };
        let one = 1 + u8::try_from(self.random.below(3))?;
        let other = 1 + (one + u8::try_from(self.random.below(2))?) % 3;
        match kind {
            Kind::CableCut => bridge.cut(one)?,
            Kind::CableOneWay => bridge.cut_one_way(one, other)?,
            _ => bridge.cut_pair(one, other)?,
        }
        self.cables = true;
        self.tell(format!("{kind:?} {one} {other}"));
        Ok(true)
    }

    /// Only while both replicas are well, and then the other one is left alone.
    fn disk_fault(&mut self, kind: Kind) -> Result<bool> {
        let arena = self.arena;
        let of_room = kind == Kind::RoomFull;
        let node = if of_room { arena.rooms.keys().next() } else { arena.devices.keys().next() };
        let Some(node) = node.cloned() else { return Ok(false) };
        let whole = self.data.iter().all(|name| self.is_up(name));
        if self.sick.is_some() || !whole {
            return Ok(false);
        }
        if self.cluster.volume_status().and_then(|volume| volume.all_in_sync()).is_err() {
            return Ok(false);
        }
        self.tell(format!("{kind:?} at {node}"));
        if let (true, Some(room)) = (of_room, arena.rooms.get(&node)) {
            room.fill()?;
        }
        if let (false, Some(device)) = (of_room, arena.devices.get(&node)) {
            let slow = Duration::from_millis(1 + self.random.below(60));
            let mut sickness = Sickness::default();
            match kind {
                Kind::DiskReads => sickness.reads = true,
                Kind::DiskWrites => sickness.writes = true,
                Kind::DiskFlushes => sickness.flushes = true,
                Kind::DiskFull => sickness.full = true,
                Kind::DiskHung => sickness.hung = true,
                _ => sickness.delay = slow,
            }
            device.disk().set(sickness);
        }
        self.sick = Some(node);
        Ok(true)
    }
}
