//! Replication cores without disk, clock or socket: what a request costs in the core itself.
//!
//! A [`Core`] is the production state machine, driven through its public inputs and outputs as the reactor drives it.
//! Its disk completes everything at once, what it sends is kept until somebody looks, and time stands still: the tick
//! of 50 ms is no part of a request. Payloads are numbers of buffers, as everywhere in the core.
//!
//! [`Core::alone`] is the only replica of a volume, [`Core::pair`] are the two of a replicated one that have shaken
//! hands. From then on the halves of the pair are driven apart, with the other's messages made by hand.

use blkrepl_engine::meta::{DataIdentity, Image, Superblock};
use blkrepl_engine::replica::{
    Boot, ClientInput, ClientOp, ClientRequest, ConnId, Cookie, DiskDone, DiskOp, DiskRequest, DiskResult,
    Lease, Output, PeerInput, Replica,
};
use blkrepl_engine::types::{
    BlockIndex, BlockRange, ClusterId, ConfigView, Epoch, Geometry, Incarnation, LineageId, LogIndex, Member,
    Nanos, NodeId, Reign, ReplicaSlot, ReplicaView, SlotSet, VolumeId, VolumeSettings,
};
use blkrepl_engine::wire::{BaseContent, BufId, Payload, PeerMsg, SessionId, WriteSeq};

const VOLUME_BYTES: u64 = 1 << 30;
const BLOCK_BYTES: u32 = 4096;
const REGION_BYTES: u32 = 1 << 20;
/// Requests to begin with, as many as there are blocks in 16 regions.
const WARM_UP: u64 = 4096;
/// Within 16 regions, few enough that all of them stay in the intent map.
const HOT: Walk = Walk { blocks: 4096, step: 37 };
/// Over the whole volume, each request in another region than the one before: four times as many regions as may be set.
const SCATTERED: Walk = Walk { blocks: VOLUME_BYTES / BLOCK_BYTES as u64, step: 37 * 256 + 1 };
const NOW: Nanos = Nanos(1_000_000_000);
const REIGN: Reign = Reign(2);
/// The buffer of the one request in flight.
const PAYLOAD: Payload = Payload { buf: BufId(1), len: BLOCK_BYTES, crc: 0 };
const CONN: ConnId = ConnId(1);
/// Both ends of the one session of a pair call it this.
const SESSION: SessionId = SessionId(1);

/// Where requests go: so many blocks, and from one request to the next, so that neighbours in time are none in space.
/// Odd: all blocks have their turn.
#[derive(Clone, Copy)]
struct Walk {
    blocks: u64,
    step: u64,
}

/// One replica, and what stands in for its driver.
pub struct Core {
    replica: Replica,
    next_cookie: u64,
    next_seq: u64,
    walk: Walk,
    block: u64,
    /// Requests that were answered well.
    answered: u64,
    /// Messages for the other replica that nobody has looked at.
    sent: Vec<PeerMsg>,
}

impl Core {
    /// The only replica of a volume, serving.
    ///
    /// # Panics
    /// If it does not serve.
    #[must_use]
    pub fn alone() -> Self {
        let mut core = Self::start(0, 1);
        core.settle();
        core.warm_up("a volume with one replica", Self::write_alone)
    }

    /// The only replica of a volume, each of whose requests goes to another region: its intent has to be set, and that
    /// of an older one cleared to make room.
    ///
    /// # Panics
    /// If it does not serve.
    #[must_use]
    pub fn scattered() -> Self {
        let mut core = Self { walk: SCATTERED, ..Self::start(0, 1) };
        core.settle();
        core.warm_up("a volume with one replica", Self::write_alone)
    }

    /// Primary and secondary of a volume, in sync, serving.
    ///
    /// # Panics
    /// If the primary does not serve.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let (mut primary, mut secondary) = (Self::start(0, 2), Self::start(1, 2));
        for (here, there) in [(&mut primary, 1), (&mut secondary, 0)] {
            let Member { node, incarnation } = member(there);
            here.replica.handle_peer(NOW, PeerInput::Up { session: SESSION, node, incarnation });
            here.settle();
        }
        while !primary.sent.is_empty() || !secondary.sent.is_empty() {
            primary.deliver_to(&mut secondary);
            secondary.deliver_to(&mut primary);
        }
        let primary = primary.warm_up("a volume with two replicas", Self::write_replicated);
        (primary, secondary.warm_up("a secondary", Self::follow_write))
    }

    /// A replica that has followed its config and holds a lease.
    fn start(slot: u8, replicas: u8) -> Self {
        let others: Vec<_> = (0..replicas).filter(|other| *other != slot).map(ReplicaSlot).collect();
        let boot = Boot {
            me: member(slot),
            os_boot: 0,
            image: Image::fresh(superblock(slot), &others, true),
            data_replaced: false,
            failed: None,
            now: NOW,
        };
        let mut replica = Replica::new(boot);
        replica.handle_config(NOW, config(replicas));
        replica.handle_lease(NOW, Lease { until: Nanos(u64::MAX) });
        let mut core = Self {
            replica,
            next_cookie: 1,
            next_seq: 1,
            walk: HOT,
            block: 0,
            answered: 0,
            sent: Vec::with_capacity(4),
        };
        core.settle();
        core
    }

    /// Begins with many requests, so that every table has its size and, of a hot volume, every region's intent is set.
    fn warm_up(mut self, what: &str, step: fn(&mut Self)) -> Self {
        for n in 1..=WARM_UP {
            step(&mut self);
            assert_eq!(self.answered, n, "{what} does not answer: {:?}", self.replica.status());
        }
        self
    }

    /// A read of one block, from request to reply.
    pub fn read(&mut self) {
        self.request(ClientOp::Read);
        self.settle();
    }

    /// A write of one block by a volume's only replica: stable before the reply.
    pub fn write_alone(&mut self) {
        self.request(ClientOp::Write(PAYLOAD));
        self.settle();
    }

    /// A write of one block by the primary of a pair, from request to reply; the secondary's answer comes at once.
    pub fn write_replicated(&mut self) {
        self.write_alone();
        // Other messages need no answer for a write to be complete.
        while let Some(msg) = self.sent.pop() {
            if let PeerMsg::Write { reign, seq, .. } = msg {
                let ack = PeerMsg::WriteAck { reign, seq };
                self.replica.handle_peer(NOW, PeerInput::Msg(SESSION, ack));
                self.settle();
            }
        }
    }

    /// The secondary's part of a write of one block: from the primary's message to the acknowledgement.
    pub fn follow_write(&mut self) {
        let write = PeerMsg::Write {
            reign: REIGN,
            seq: WriteSeq(take(&mut self.next_seq)),
            blocks: BlockRange { start: BlockIndex(self.next_block()), count: 1 },
            durable: false,
            missing: SlotSet::default(),
            config: LogIndex(1),
            payload: PAYLOAD,
        };
        self.replica.handle_peer(NOW, PeerInput::Msg(SESSION, write));
        self.settle();
        let acks = self.sent.drain(..).filter(|msg| matches!(msg, PeerMsg::WriteAck { .. })).count();
        self.answered += acks as u64;
    }

    fn request(&mut self, op: ClientOp) {
        let (offset, len) = (self.next_block() * u64::from(BLOCK_BYTES), u64::from(BLOCK_BYTES));
        let cookie = Cookie(take(&mut self.next_cookie));
        let request = ClientRequest { conn: CONN, cookie, op, offset, len, fua: false };
        self.replica.handle_client(NOW, ClientInput::Request(request));
    }

    /// Carries out what the core wants until it wants nothing more.
    fn settle(&mut self) {
        while let Some(output) = self.replica.poll_output() {
            match output {
                Output::Disk(request) => self.carry_out(&request),
                Output::Send(_, msg) => self.sent.push(msg),
                Output::Reply { result, .. } => self.answered += u64::from(result.is_ok()),
                _ => {}
            }
        }
    }

    fn carry_out(&mut self, request: &DiskRequest) {
        let result = match request.op {
            DiskOp::Read { .. } => DiskResult::Read { payload: PAYLOAD, all_zero: false, hashes: Vec::new() },
            _ => DiskResult::Done,
        };
        self.replica.handle_disk(NOW, DiskDone { id: request.id, result: Ok(result) });
    }

    fn deliver_to(&mut self, other: &mut Self) {
        for msg in self.sent.drain(..) {
            other.replica.handle_peer(NOW, PeerInput::Msg(SESSION, msg));
            other.settle();
        }
    }

    fn next_block(&mut self) -> u64 {
        self.block = (self.block + self.walk.step) % self.walk.blocks;
        self.block
    }
}

fn take(counter: &mut u64) -> u64 {
    *counter += 1;
    *counter - 1
}

fn member(slot: u8) -> Member {
    let n = u64::from(slot) + 1;
    Member { node: NodeId(n), incarnation: Incarnation { boot: 1, nonce: n } }
}

fn geometry() -> Geometry {
    Geometry::new(VOLUME_BYTES, BLOCK_BYTES, REGION_BYTES).expect("a geometry of constants")
}

fn config(replicas: u8) -> ConfigView {
    let replica = |n: u8| {
        let Member { node, incarnation } = member(n);
        ReplicaView { node, slot: ReplicaSlot(n), last_member: Some(incarnation) }
    };
    ConfigView {
        index: LogIndex(1),
        cluster: ClusterId(1),
        volume: VolumeId(2),
        epoch: Epoch(2),
        reign: REIGN,
        primary: Some(member(0)),
        in_sync: (0..replicas).map(member).collect(),
        replicas: (0..replicas).map(replica).collect(),
        lineage: LineageId(3),
        history: Vec::new(),
        geometry: geometry(),
        settings: VolumeSettings::default(),
    }
}

/// Of a replica that was in sync when it stopped.
fn superblock(slot: u8) -> Superblock {
    let Member { node, incarnation } = member(slot);
    Superblock {
        cluster: ClusterId(1),
        volume: VolumeId(2),
        node,
        slot: ReplicaSlot(slot),
        geometry: geometry(),
        seq: 0,
        epoch: Epoch(1),
        reign: Reign(1),
        lineage: LineageId(3),
        member: Some(incarnation),
        chain: Vec::new(),
        current: incarnation,
        os_boot: 0,
        inconsistent: None,
        base: BaseContent::Member,
        identity: DataIdentity::default(),
        clean: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_answers_one_request() {
        let (mut alone, (mut primary, mut secondary)) = (Core::alone(), Core::pair());
        let answers = |core: &mut Core, step: fn(&mut Core)| {
            let before = core.answered;
            step(core);
            core.answered - before
        };
        assert_eq!(answers(&mut alone, Core::read), 1);
        assert_eq!(answers(&mut alone, Core::write_alone), 1);
        assert_eq!(answers(&mut Core::scattered(), Core::write_alone), 1);
        assert_eq!(answers(&mut primary, Core::read), 1);
        assert_eq!(answers(&mut primary, Core::write_replicated), 1);
        assert_eq!(answers(&mut secondary, Core::follow_write), 1);
    }

    #[test]
    fn a_replicated_write_waits_for_the_other_replica() {
        let (mut primary, _) = Core::pair();
        let before = primary.answered;
        primary.write_alone();
        assert_eq!((primary.answered, primary.sent.len()), (before, 1));
    }
}
