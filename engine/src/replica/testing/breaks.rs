//! What the world breaks, and how it mends: processes, power, disks, links.

use crate::types::{Nanos, NodeId, ReplicaSlot};

use super::super::io::{DiskOp, PeerInput};
use super::world::{Link, World};

impl World {
    /// The process dies. Disk requests in flight land, or not, or in part.
    pub(in super::super) fn crash(&mut self, id: NodeId) {
        let n = self.nodes.get_mut(&id).unwrap();
        n.replica = None;
        let pending: Vec<_> = n.pending.drain(..).collect();
        for request in pending {
            let n = self.nodes.get_mut(&id).unwrap();
            match request.op {
                DiskOp::MetaWrite { offset, bytes } => match self.rng.below(3) {
                    0 => n.disk.write_meta(offset, &bytes),
                    1 => n.disk.tear_meta(offset, &bytes, &mut self.rng),
                    _ => {}
                },
                DiskOp::Write { .. } | DiskOp::Zero { .. } if self.rng.chance(50) => {
                    self.land(id, &request.op);
                }
                _ => {}
            }
        }
        let n = self.nodes.get_mut(&id).unwrap();
        n.bufs.clear();
        n.outcomes.clear();
        n.disk_paused = false;
        n.hangs.clear();
        self.lose_clients(id);
        for other in self.others(id) {
            self.disconnect(id, other);
        }
    }

    pub(in super::super) fn power_off(&mut self, id: NodeId) {
        if self.nodes[&id].replica.is_some() {
            self.crash(id);
        }
        let (nodes, rng) = (&mut self.nodes, &mut self.rng);
        let n = nodes.get_mut(&id).unwrap();
        n.disk.lose_power(rng);
        n.os_boot += 1;
    }

    /// True if no disk is broken, and no replica has failed because its disk was.
    pub(in super::super) fn disks_work(&self) -> bool {
        self.nodes.values().all(|n| {
            let failed = n.replica.as_ref().is_some_and(|r| r.status().failure.is_some());
            !n.disk.write_error && !n.disk.flush_error && n.disk.bad.is_empty() && !failed
        })
    }

    /// Every disk works again. A replica that failed stays so until it is restarted.
    pub(in super::super) fn mend_disks(&mut self) {
        for n in self.nodes.values_mut() {
            n.disk.write_error = false;
            n.disk.flush_error = false;
            n.disk.bad.clear();
        }
    }

    /// Starts with a data object that is not the one the metadata belongs to.
    pub(in super::super) fn start_replaced(&mut self, id: NodeId) {
        self.replaced = true;
        self.start(id);
        self.replaced = false;
    }

    /// The node's disk is replaced by a blank one.
    pub(in super::super) fn replace_disk(&mut self, id: NodeId) {
        let disk = self.blank_disk(id);
        self.nodes.get_mut(&id).unwrap().disk = disk;
    }

    /// Opens the replica again within the run of the process that had it open before.
    pub(in super::super) fn start_in_same_run(&mut self, id: NodeId) {
        self.nodes.get_mut(&id).unwrap().incarnation.boot -= 1;
        self.start(id);
    }

    /// Flips a bit in every page of every dirty bitmap.
    pub(in super::super) fn damage_bitmaps(&mut self, id: NodeId) {
        let area = self.image(id).layout().area(crate::meta::Area::Dirty(ReplicaSlot(0))).offset();
        for (offset, bytes) in &mut self.nodes.get_mut(&id).unwrap().disk.meta {
            if *offset >= area {
                for page in bytes.chunks_mut(512) {
                    page[100] ^= 4;
                }
            }
        }
    }

    /// Messages from `a` to `b` wait.
    pub(in super::super) fn cut_wire(&mut self, a: NodeId, b: NodeId) {
        self.silent.insert(Link(a, b));
    }

    pub(in super::super) fn restore_wires(&mut self) {
        self.silent.clear();
    }

    pub(in super::super) fn cut(&mut self, a: NodeId, b: NodeId) {
        self.cut.insert(Link(a, b));
        self.cut.insert(Link(b, a));
        self.disconnect(a, b);
    }

    pub(in super::super) fn heal(&mut self) {
        self.cut.clear();
        self.silent.clear();
        self.clogged.clear();
        for n in self.nodes.values_mut() {
            n.cut_off = false;
            n.disk_paused = false;
            n.hangs.clear();
        }
    }

    pub(in super::super) fn disconnect(&mut self, a: NodeId, b: NodeId) {
        for (me, other) in [(a, b), (b, a)] {
            self.wires.remove(&Link(me, other));
            let session = self.sessions.remove(&Link(me, other));
            let now = Nanos(self.now);
            if let (Some(session), Some(r)) = (session, self.nodes.get_mut(&me).unwrap().replica.as_mut()) {
                r.handle_peer(now, PeerInput::Down(session));
                self.collect(me);
            }
        }
    }

    /// Settles while `id` does nothing.
    pub(in super::super) fn settle_without(&mut self, id: NodeId) {
        self.nodes.get_mut(&id).unwrap().disk_paused = true;
        self.settle();
        self.nodes.get_mut(&id).unwrap().disk_paused = false;
    }
}
