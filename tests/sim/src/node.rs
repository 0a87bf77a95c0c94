//! One data node: its machine, its process, and what the process has in hand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use blkrepl_engine::control::{ClusterState, LeaseSnapshot};
use blkrepl_engine::meta::Superblock;
use blkrepl_engine::replica::{ConnId, DiskOpId, DiskRequest, Replica};
use blkrepl_engine::types::{
    Health, Incarnation, Member, Nanos, NodeId, Proposal, ProposalOutcome, ReplicaReport, ReplicaSlot,
};
use blkrepl_engine::wire::{BufId, Payload, SessionId};

use crate::clock::{Clock, Time};
use crate::content::{BLOCK, Tags, at, crc};
use crate::disk::{Disk, Snapshot};
use crate::world::Life;

/// What became of the replica in the present run of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No process.
    Down,
    /// No volume is known here yet.
    Waiting,
    /// Its files are being opened.
    Opening,
    Running,
    /// Its files cannot be opened.
    Unusable(String),
    /// It has ended, to be made anew once its run is no member.
    Recreating,
    /// It has stopped; the process is about to end.
    Stopped,
}

/// A buffer of the driver.
#[derive(Debug)]
pub(crate) struct Buf {
    pub(crate) tags: Tags,
    refs: u32,
}

/// A disk request in flight.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) request: DiskRequest,
    /// What a write writes.
    pub(crate) tags: Option<Tags>,
    /// What a flush covers.
    pub(crate) snapshot: Option<Snapshot>,
}

/// What comes from the control plane to the replica, in order.
#[derive(Debug)]
pub(crate) enum Mail {
    Update(Arc<ClusterState>, LeaseSnapshot),
    Outcome(Proposal, ProposalOutcome),
}

/// One end of a connection to a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionEnd {
    pub(crate) conn: usize,
    pub(crate) side: usize,
    pub(crate) peer: NodeId,
    pub(crate) incarnation: Incarnation,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) slot: ReplicaSlot,
    pub(crate) clock: Clock,
    pub(crate) os_boot: u128,
    pub(crate) paused_until: Time,
    /// What the clock showed when the replica was opened, then at its last input.
    pub(crate) time_read: Nanos,
    /// How often its process was started; what is on its way to an older run is dropped.
    pub(crate) starts: u64,
    pub(crate) incarnation: Incarnation,
    pub(crate) phase: Phase,
    pub(crate) replica: Option<Replica>,
    pub(crate) disk: Disk,
    pub(crate) superblocks: [Option<Superblock>; 2],
    pub(crate) pending: Vec<Pending>,
    pub(crate) bufs: BTreeMap<u32, Buf>,
    next_buf: u32,
    pub(crate) state: Option<Arc<ClusterState>>,
    pub(crate) lease: LeaseSnapshot,
    /// End of the lease that the replica was given, by the node's clock.
    pub(crate) lease_until: Nanos,
    pub(crate) sessions: BTreeMap<SessionId, SessionEnd>,
    pub(crate) next_session: u64,
    /// Pause before the next dial, by peer; present once the node dials that peer.
    pub(crate) dialing: BTreeMap<NodeId, Time>,
    /// Open client connections and whose they are.
    pub(crate) clients: BTreeMap<ConnId, usize>,
    pub(crate) next_conn: u64,
    pub(crate) mail: VecDeque<Mail>,
    pub(crate) mail_at: Time,
    pub(crate) reported: Option<(Health, ReplicaReport)>,
    /// The newest run whose writes, if they were not flushed, may be gone.
    pub(crate) lost_boot: u64,
    /// The disk was lost or given up: what it held is gone, also what was flushed.
    pub(crate) emptied_boot: u64,
    /// A copy of its superblock was damaged once.
    pub(crate) superblock_rotted: bool,
    /// Replicas that were ended while the process went on.
    pub(crate) replicas_made: u64,
    /// Why the copy failed that was open before in this run, and is still there.
    pub(crate) failed_before: Option<String>,
    /// It has served since it was named the only member.
    pub(crate) served_in: u64,
    /// An operator asked this run of the process to move the role or to give it up.
    pub(crate) asked_to_give_up: bool,
}

impl Node {
    pub(crate) fn new(id: NodeId, clock: Clock, disk: Disk) -> Self {
        let slot = ReplicaSlot(u8::try_from(id.0 - 1).expect("few nodes"));
        Self {
            id,
            slot,
            clock,
            os_boot: u128::from(id.0) << 64,
            paused_until: 0,
            time_read: Nanos(0),
            starts: 0,
            incarnation: Incarnation { boot: 0, nonce: id.0 },
            phase: Phase::Down,
            replica: None,
            superblocks: disk.superblocks(),
            disk,
            pending: Vec::new(),
            bufs: BTreeMap::new(),
            next_buf: 1,
            state: None,
            lease: LeaseSnapshot::default(),
            lease_until: Nanos(0),
            sessions: BTreeMap::new(),
            next_session: 1,
            dialing: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_conn: 1,
            mail: VecDeque::new(),
            mail_at: 0,
            reported: None,
            lost_boot: 0,
            emptied_boot: 0,
            superblock_rotted: false,
            replicas_made: 0,
            failed_before: None,
            served_in: 0,
            asked_to_give_up: false,
        }
    }

    pub(crate) fn me(&self) -> Member {
        Member { node: self.id, incarnation: self.incarnation }
    }

    pub(crate) fn life(&self) -> Life {
        Life { boot: self.starts, replica: self.replicas_made }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.phase != Phase::Down
    }

    pub(crate) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.replica.as_ref().is_some_and(|r| r.status().failure.is_some())
    }

    pub(crate) fn serves(&self) -> bool {
        self.replica.as_ref().is_some_and(Replica::serving)
    }

    /// True if this very member still holds what it acknowledged: its run is the one named, or it died
    /// without its disk's cache.
    pub(crate) fn holds_all_of(&self, member: Member) -> bool {
        member.node == self.id && member.incarnation.boot > self.lost_boot
    }

    /// True if the member is alive and well.
    pub(crate) fn lives_as(&self, member: Member) -> bool {
        self.is_up() && self.incarnation == member.incarnation && !self.has_failed()
    }

    // Buffers.

    pub(crate) fn new_buf(&mut self, tags: Tags) -> Payload {
        let buf = BufId(self.next_buf);
        self.next_buf += 1;
        let len = u32::try_from(tags.len() as u64 / 8 * BLOCK).expect("a payload is bounded");
        let crc = crc(&tags);
        self.bufs.insert(buf.0, Buf { tags, refs: 1 });
        Payload { buf, len, crc }
    }

    pub(crate) fn tags(&self, buf: BufId) -> Tags {
        Tags::clone(&self.bufs.get(&buf.0).expect("the core names a live buffer").tags)
    }

    pub(crate) fn tags_mut(&mut self, buf: BufId) -> &mut Vec<u64> {
        Tags::make_mut(&mut self.bufs.get_mut(&buf.0).expect("the core names a live buffer").tags)
    }

    pub(crate) fn retain(&mut self, buf: BufId) {
        self.bufs.get_mut(&buf.0).expect("the core names a live buffer").refs += 1;
    }

    pub(crate) fn release(&mut self, buf: BufId) {
        let entry = self.bufs.get_mut(&buf.0).expect("the core releases a live buffer");
        entry.refs -= 1;
        if entry.refs == 0 {
            self.bufs.remove(&buf.0);
        }
    }

    /// Takes a disk request out of flight.
    pub(crate) fn take_pending(&mut self, id: DiskOpId) -> Option<Pending> {
        let n = self.pending.iter().position(|p| p.request.id == id)?;
        Some(self.pending.remove(n))
    }

    /// The session to a peer.
    pub(crate) fn session_to(&self, peer: NodeId) -> Option<SessionId> {
        self.sessions.iter().find(|(_, s)| s.peer == peer).map(|(id, _)| *id)
    }

    /// Forgets everything that the process had in hand.
    pub(crate) fn forget(&mut self) {
        self.phase = Phase::Down;
        self.replica = None;
        self.pending.clear();
        self.bufs.clear();
        self.state = None;
        self.lease = LeaseSnapshot::default();
        self.lease_until = Nanos(0);
        self.sessions.clear();
        self.dialing.clear();
        self.clients.clear();
        self.mail.clear();
        self.reported = None;
        self.paused_until = 0;
        self.asked_to_give_up = false;
    }

    /// Regions whose intent is durable here, as bits.
    pub(crate) fn intends_sector(&self, sector: u64, sectors_per_region: u64) -> bool {
        self.disk.intent() >> at(sector / sectors_per_region) & 1 == 1
    }
}
