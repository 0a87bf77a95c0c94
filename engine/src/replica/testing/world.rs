//! The world: nodes, links, the committed config, and one step at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::meta::{DataIdentity, Image, Superblock};
use crate::types::{
    BlockIndex, BlockRange, ClusterId, ConfigView, Epoch, Extent, Geometry, Incarnation, LineageId, LogIndex,
    Member, Nanos, NodeId, Proposal, ProposalId, ProposalOutcome, Reign, ReplicaSlot, ReplicaView, VolumeId,
    VolumeSettings,
};
use crate::wire::{BaseContent, BufId, Payload, PeerMsg, SessionId};

use super::super::io::{
    ClientInput, ClientOp, ClientRequest, ConnId, Cookie, Digest, DiskDone, DiskErrorKind, DiskOp, DiskOpId,
    DiskRequest, DiskResult, Event, Lease, Output, PeerInput, ReplyData,
};
use super::super::{Boot, Replica};
use super::history::{Change, Flushable, mixed};
use super::{History, Rng, TestDisk};

pub(in super::super) const BLOCK: u64 = 4096;
const LEASE: u64 = 1_500_000_000;

pub(in super::super) fn node(n: u64) -> NodeId {
    NodeId(n)
}

#[derive(Debug, Clone)]
pub(in super::super) struct Options {
    pub(in super::super) replicas: u64,
    pub(in super::super) blocks: u64,
    pub(in super::super) seed: u64,
    pub(in super::super) settings: VolumeSettings,
}

impl Default for Options {
    fn default() -> Self {
        let settings = VolumeSettings { intent_regions_max: 64, ..VolumeSettings::default() };
        Self { replicas: 2, blocks: 64, seed: 1, settings }
    }
}

/// Disk operations that do not return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Hang {
    Read,
    /// Writes to this block.
    Write(u64),
    Flush,
    /// Metadata writes at these offsets.
    Meta(u64, u64),
}

impl Hang {
    fn holds(self, op: &DiskOp) -> bool {
        match (self, op) {
            (Self::Read, DiskOp::Read { .. }) | (Self::Flush, DiskOp::Flush) => true,
            (Self::Write(block), DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. }) => {
                blocks.contains(BlockIndex(block))
            }
            (Self::Meta(from, to), DiskOp::MetaWrite { offset, .. }) => (from..to).contains(offset),
            _ => false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Buf {
    tags: Vec<u64>,
    refs: u32,
}

/// A client request without an answer.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Write(Vec<(u64, Change)>),
    Read { first: u64 },
    Extents { first: u64 },
    Flush(Flushable),
}

#[derive(Debug)]
pub(in super::super) struct Node {
    pub(in super::super) replica: Option<Replica>,
    pub(in super::super) incarnation: Incarnation,
    pub(in super::super) disk: TestDisk,
    pub(super) os_boot: u128,
    pub(in super::super) pending: VecDeque<DiskRequest>,
    pub(in super::super) disk_paused: bool,
    pub(in super::super) hangs: Vec<Hang>,
    /// Hears no config, gets no lease, no outcome.
    pub(in super::super) cut_off: bool,
    seen: LogIndex,
    pub(super) outcomes: VecDeque<(ProposalId, ProposalOutcome)>,
    pub(super) bufs: BTreeMap<u32, Buf>,
    next_buf: u32,
    pub(in super::super) lease_until: u64,
    pub(super) asked: BTreeMap<(ConnId, Cookie), Asked>,
    next_cookie: u64,
    conn: u64,
    pub(in super::super) events: Vec<Event>,
    pub(in super::super) stopped: bool,
}

impl Node {
    /// The disk requests in flight that may complete now.
    fn returning(&self) -> Vec<usize> {
        let returns = |r: &DiskRequest| !self.disk_paused && !self.hangs.iter().any(|h| h.holds(&r.op));
        (0..self.pending.len()).filter(|at| returns(&self.pending[*at])).collect()
    }

    /// [R7]: one disk write per block at a time.
    fn assert_alone(&self, op: &DiskOp) {
        let written = |op: &DiskOp| match op {
            DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. } => Some(*blocks),
            _ => None,
        };
        let Some(blocks) = written(op) else { return };
        let other = self.pending.iter().find(|r| written(&r.op).is_some_and(|b| b.overlaps(&blocks)));
        assert!(other.is_none(), "two disk writes on one block [R7]: {other:?} and {op:?}");
    }
}

/// A message and the content that it carries.
pub(super) type OnWire = (PeerMsg, Option<Vec<u64>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link(pub(super) NodeId, pub(super) NodeId);

#[derive(Debug)]
pub(in super::super) struct World {
    pub(in super::super) nodes: BTreeMap<NodeId, Node>,
    pub(in super::super) config: ConfigView,
    pub(in super::super) history: History,
    pub(in super::super) rng: Rng,
    pub(in super::super) now: u64,
    /// Messages under way, per direction, with their content copied out of the sender's buffers.
    pub(super) wires: BTreeMap<Link, VecDeque<OnWire>>,
    pub(super) sessions: BTreeMap<Link, SessionId>,
    pub(super) cut: BTreeSet<Link>,
    pub(super) silent: BTreeSet<Link>,
    pub(super) replaced: bool,
    /// Why the copy that is opened next failed when it was open before.
    pub(in super::super) failed: Option<String>,
    pub(in super::super) clogged: BTreeSet<NodeId>,
    next_session: u64,
    next_tag: u64,
    pub(in super::super) proposals: Vec<(NodeId, Proposal)>,
    pub(in super::super) hold_proposals: bool,
    pub(in super::super) sent: BTreeMap<&'static str, u64>,
    pub(in super::super) acked_writes: u64,
    pub(in super::super) acked_flushes: u64,
    /// The last block status that a client was told.
    pub(in super::super) extents: Vec<Extent>,
    /// Clients may be told of errors: a disk of the only replica fails.
    pub(in super::super) errors_allowed: bool,
}

impl World {
    /// A volume with `n1` as the only member and primary; the others are new and all zeroes.
    pub(in super::super) fn new(options: &Options) -> Self {
        let geometry = Geometry::new(options.blocks * BLOCK, 4096, 65536).unwrap();
        let replicas = (1..=options.replicas).map(|n| ReplicaView {
            node: node(n),
            slot: ReplicaSlot(u8::try_from(n - 1).unwrap()),
            last_member: None,
        });
        let first = Member { node: node(1), incarnation: Incarnation { boot: 1, nonce: 1 } };
        let mut config = ConfigView {
            index: LogIndex(1),
            cluster: ClusterId(7),
            volume: VolumeId(9),
            epoch: Epoch(1),
            reign: Reign(1),
            primary: Some(first),
            in_sync: vec![first],
            replicas: replicas.collect(),
            lineage: LineageId(100),
            history: Vec::new(),
            geometry,
            settings: options.settings,
        };
        config.replicas[0].last_member = Some(first.incarnation);
        let mut world = Self {
            nodes: BTreeMap::new(),
            config,
            history: History::default(),
            rng: Rng(options.seed),
            now: 1_000_000_000,
            wires: BTreeMap::new(),
            sessions: BTreeMap::new(),
            cut: BTreeSet::new(),
            silent: BTreeSet::new(),
            replaced: false,
            failed: None,
            clogged: BTreeSet::new(),
            next_session: 1,
            next_tag: 1,
            proposals: Vec::new(),
            hold_proposals: false,
            sent: BTreeMap::new(),
            acked_writes: 0,
            acked_flushes: 0,
            extents: Vec::new(),
            errors_allowed: false,
        };
        for n in 1..=options.replicas {
            world.add_node(node(n));
        }
        world
    }

    /// A disk as a new replica has it: all zeroes, new metadata.
    pub(super) fn blank_disk(&self, id: NodeId) -> TestDisk {
        let geometry = self.config.geometry;
        let slots: Vec<ReplicaSlot> = self.config.replicas.iter().map(|r| r.slot).collect();
        let mine = self.config.slot(id).unwrap();
        // The first member of a new volume is one from the beginning.
        let first = self.config.member(id).filter(|_| self.config.epoch == Epoch(1));
        let superblock = Superblock {
            cluster: self.config.cluster,
            volume: self.config.volume,
            node: id,
            slot: mine,
            geometry,
            seq: 1,
            epoch: Epoch(0),
            reign: Reign(0),
            lineage: self.config.lineage,
            member: first.map(|m| m.incarnation),
            chain: Vec::new(),
            current: Incarnation { boot: 1, nonce: id.0 },
            os_boot: 5,
            inconsistent: None,
            base: BaseContent::Zero,
            identity: DataIdentity([0; 32]),
            clean: None,
        };
        let others: Vec<_> = slots.into_iter().filter(|s| *s != mine).collect();
        let mut image = Image::fresh(superblock, &others, true);
        let mut disk = TestDisk::new(geometry.blocks());
        for (offset, bytes) in image.encode_all() {
            disk.write_meta(offset, &bytes);
        }
        disk
    }

    /// The volume gets one more replica.
    pub(in super::super) fn add_replica(&mut self, id: NodeId) {
        let mut next = self.config.clone();
        let slot = ReplicaSlot(u8::try_from(next.replicas.len()).unwrap());
        next.replicas.push(ReplicaView { node: id, slot, last_member: None });
        self.commit(next);
        self.add_node(id);
    }

    fn add_node(&mut self, id: NodeId) {
        let disk = self.blank_disk(id);
        let fresh = Node {
            replica: None,
            incarnation: Incarnation { boot: 0, nonce: id.0 },
            disk,
            os_boot: 5,
            pending: VecDeque::new(),
            disk_paused: false,
            hangs: Vec::new(),
            cut_off: false,
            seen: LogIndex(0),
            outcomes: VecDeque::new(),
            bufs: BTreeMap::new(),
            next_buf: 1,
            lease_until: 0,
            asked: BTreeMap::new(),
            next_cookie: 1,
            conn: 1,
            events: Vec::new(),
            stopped: false,
        };
        self.nodes.insert(id, fresh);
        self.start(id);
    }

    /// Starts the node's process: a new incarnation over what its disk holds.
    pub(in super::super) fn start(&mut self, id: NodeId) {
        let now = Nanos(self.now);
        let mine = self.config.slot(id).unwrap();
        let slots: Vec<_> = self.config.replicas.iter().map(|r| r.slot).filter(|s| *s != mine).collect();
        let n = self.nodes.get_mut(&id).unwrap();
        assert!(n.replica.is_none(), "started twice");
        n.incarnation.boot += 1;
        let me = Member { node: id, incarnation: n.incarnation };
        let disk = &n.disk;
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
            disk.read_meta(offset, out);
            Ok(())
        };
        let image = Image::read(&mut read, &slots).expect("the superblock is readable");
        n.replica = Some(Replica::new(Boot {
            me,
            os_boot: n.os_boot,
            image,
            data_replaced: self.replaced,
            failed: self.failed.take(),
            now,
        }));
        n.seen = LogIndex(0);
        n.lease_until = 0;
        n.stopped = false;
        n.conn += 1;
        self.collect(id);
    }

    pub(super) fn others(&self, id: NodeId) -> Vec<NodeId> {
        self.nodes.keys().copied().filter(|n| *n != id).collect()
    }

    pub(super) fn lose_clients(&mut self, id: NodeId) {
        let n = self.nodes.get_mut(&id).unwrap();
        n.conn += 1;
        for asked in std::mem::take(&mut n.asked).into_values() {
            if let Asked::Write(changes) = asked {
                for (block, _) in changes {
                    self.history.write_lost(block);
                }
            }
        }
    }

    pub(in super::super) fn image(&self, id: NodeId) -> Image {
        let disk = &self.nodes[&id].disk;
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
            disk.read_meta(offset, out);
            Ok(())
        };
        let mine = self.config.slot(id);
        let slots: Vec<_> =
            self.config.replicas.iter().map(|r| r.slot).filter(|s| Some(*s) != mine).collect();
        Image::read(&mut read, &slots).expect("the superblock is readable")
    }

    /// The connections of the clients end.
    pub(in super::super) fn close_clients(&mut self, id: NodeId) {
        let conn = ConnId(self.nodes[&id].conn);
        self.lose_clients(id);
        let now = Nanos(self.now);
        self.replica(id).handle_client(now, ClientInput::Closed(conn));
        self.collect(id);
    }

    /// Completes the metadata writes in flight of a node whose disk is paused, in order.
    pub(in super::super) fn complete_meta(&mut self, id: NodeId) {
        let is_meta = |r: &DiskRequest| matches!(r.op, DiskOp::MetaWrite { .. });
        while let Some(at) = self.nodes[&id].pending.iter().position(is_meta) {
            self.complete_disk(id, at);
        }
    }

    /// A client writes a block again, whatever became of its last write.
    pub(in super::super) fn overwrite(&mut self, id: NodeId, block: u64) -> u64 {
        self.history.write_lost(block);
        self.write(id, block, false)
    }

    pub(in super::super) fn outcome(&mut self, id: NodeId, proposal: ProposalId, outcome: ProposalOutcome) {
        let now = Nanos(self.now);
        self.replica(id).handle_proposal(now, proposal, outcome);
        self.collect(id);
    }

    pub(in super::super) fn refuses(&mut self, proposal: Proposal) -> bool {
        matches!(self.apply(&proposal), ProposalOutcome::Refused(_))
    }

    /// The session from `a` to `b`, as `a` counts it.
    pub(in super::super) fn session(&self, a: NodeId, b: NodeId) -> SessionId {
        self.sessions[&Link(a, b)]
    }

    fn connect_all(&mut self) {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for a in &ids {
            for b in ids.iter().filter(|b| *b > a) {
                let up = |n: &NodeId| self.nodes[n].replica.is_some();
                if up(a)
                    && up(b)
                    && !self.sessions.contains_key(&Link(*a, *b))
                    && !self.cut.contains(&Link(*a, *b))
                {
                    for (me, other) in [(*a, *b), (*b, *a)] {
                        let session = SessionId(self.next_session);
                        self.next_session += 1;
                        self.sessions.insert(Link(me, other), session);
                        let incarnation = self.nodes[&other].incarnation;
                        let input = PeerInput::Up { session, node: other, incarnation };
                        let now = Nanos(self.now);
                        self.nodes.get_mut(&me).unwrap().replica.as_mut().unwrap().handle_peer(now, input);
                    }
                    self.collect(*a);
                    self.collect(*b);
                }
            }
        }
    }

    // Outputs.

    pub(in super::super) fn replica(&mut self, id: NodeId) -> &mut Replica {
        self.nodes.get_mut(&id).unwrap().replica.as_mut().unwrap()
    }

    pub(in super::super) fn collect(&mut self, id: NodeId) {
        while let Some(out) = self.nodes.get_mut(&id).unwrap().replica.as_mut().and_then(Replica::poll_output)
        {
            self.output(id, out);
        }
    }

    fn output(&mut self, id: NodeId, out: Output) {
        let n = self.nodes.get_mut(&id).unwrap();
        match out {
            Output::Disk(request) => {
                if let DiskOp::Write { buf, .. } | DiskOp::FillEdges { buf, .. } = request.op {
                    n.bufs.get_mut(&buf.0).expect("a disk write names a live buffer").refs += 1;
                }
                n.assert_alone(&request.op);
                n.pending.push_back(request);
            }
            Output::Send(session, msg) => self.send(id, session, msg),
            Output::Reply { conn, cookie, result } => {
                let tags = match &result {
                    Ok(ReplyData::Read { buf, .. }) => Some(n.bufs[&buf.0].tags.clone()),
                    _ => None,
                };
                if let Some(asked) = n.asked.remove(&(conn, cookie)) {
                    assert!(result.is_ok() || self.errors_allowed, "{id} answers {asked:?} with {result:?}");
                    match (result, asked) {
                        (Ok(ReplyData::Extents(extents)), Asked::Extents { first }) => {
                            self.extents_answered(id, first, extents);
                        }
                        (Ok(_), asked) => self.answered(id, asked, tags),
                        // What a failed write left behind is open.
                        (Err(_), Asked::Write(changes)) => {
                            changes.iter().for_each(|(block, _)| self.history.write_lost(*block));
                        }
                        (Err(_), _) => {}
                    }
                }
            }
            Output::Release(buf) => Self::release(n, buf),
            Output::Propose(proposal) => self.proposals.push((id, proposal)),
            Output::CloseSession(session, reason) => {
                let link = self.sessions.iter().find(|(_, s)| **s == session).map(|(l, _)| *l);
                if let Some(Link(a, b)) = link {
                    assert!(!reason.contains("outside"), "{reason}");
                    self.disconnect(a, b);
                }
            }
            Output::CloseClients(_) => self.lose_clients(id),
            Output::Event(event) => n.events.push(event),
            Output::Stopped => n.stopped = true,
        }
    }

    fn release(n: &mut Node, buf: BufId) {
        let entry = n.bufs.get_mut(&buf.0).expect("released a buffer that does not exist");
        entry.refs -= 1;
        if entry.refs == 0 {
            n.bufs.remove(&buf.0);
        }
    }

    fn new_buf(n: &mut Node, tags: Vec<u64>) -> Payload {
        let buf = BufId(n.next_buf);
        n.next_buf += 1;
        let len = u32::try_from(tags.len() as u64 * BLOCK).unwrap();
        let crc = crc_of(&tags);
        n.bufs.insert(buf.0, Buf { tags, refs: 1 });
        Payload { buf, len, crc }
    }

    fn send(&mut self, id: NodeId, session: SessionId, msg: PeerMsg) {
        let link = self.sessions.iter().find(|(l, s)| l.0 == id && **s == session).map(|(l, _)| *l);
        let Some(link) = link else { return };
        *self.sent.entry(kind_of(&msg)).or_default() += 1;
        let payload = match &msg {
            PeerMsg::Write { payload, .. } | PeerMsg::Copy { payload, .. } => Some(*payload),
            PeerMsg::ReadReply { payload, .. } => *payload,
            _ => None,
        };
        let tags = payload.map(|p| {
            let tags = self.nodes[&id].bufs[&p.buf.0].tags.clone();
            assert_eq!(crc_of(&tags), p.crc, "the checksum follows the content: {msg:?}");
            tags
        });
        self.check_intent_covers(id, &msg);
        self.wires.entry(link).or_default().push_back((msg, tags));
    }

    /// Design invariant 5: no block is sent unless the sender's own intent map durably covers it.
    fn check_intent_covers(&self, id: NodeId, msg: &PeerMsg) {
        if let PeerMsg::Write { blocks, .. } | PeerMsg::Zero { blocks, .. } = msg {
            self.assert_intent_on_disk(id, *blocks);
        }
    }

    fn assert_intent_on_disk(&self, id: NodeId, blocks: BlockRange) {
        let n = &self.nodes[&id];
        let mut read = |offset: u64, out: &mut [u8]| -> Result<(), ()> {
            n.disk.read_meta(offset, out);
            Ok(())
        };
        let image = Image::read(&mut read, &[]).expect("the superblock is readable");
        for region in self.config.geometry.regions_of(blocks) {
            assert!(image.intent.get(region.0), "{id}: region {} is not durably intended", region.0);
        }
    }

    // Inputs.

    /// A client writes one block; returns the tag.
    pub(in super::super) fn write(&mut self, id: NodeId, block: u64, fua: bool) -> u64 {
        let tag = self.next_tag;
        self.write_bytes(id, block * BLOCK, BLOCK, fua);
        tag
    }

    /// A client writes any bytes; each block gets a tag of its own.
    pub(in super::super) fn write_bytes(&mut self, id: NodeId, offset: u64, len: u64, fua: bool) {
        let mut changes = Vec::new();
        for (block, whole) in blocks_of(offset, len) {
            let tag = self.next_tag;
            self.next_tag += 1;
            changes.push((block, if whole { Change::Whole(tag) } else { Change::Part(tag) }));
        }
        let tags = changes.iter().map(|(_, change)| change.tag()).collect();
        let payload = Self::new_buf(self.nodes.get_mut(&id).unwrap(), tags);
        self.change(id, ClientOp::Write(payload), (offset, len), fua, changes);
    }

    /// A client writes zeroes.
    pub(in super::super) fn zero_bytes(&mut self, id: NodeId, offset: u64, len: u64) {
        let change = |whole| if whole { Change::Whole(0) } else { Change::Part(0) };
        let changes = blocks_of(offset, len).map(|(block, whole)| (block, change(whole))).collect();
        self.change(id, ClientOp::Zero, (offset, len), false, changes);
    }

    fn change(
        &mut self,
        id: NodeId,
        op: ClientOp,
        (offset, len): (u64, u64),
        fua: bool,
        changes: Vec<(u64, Change)>,
    ) {
        for (block, change) in &changes {
            self.history.write_sent(*block, *change);
        }
        self.ask(id, op, (offset, len), fua, Asked::Write(changes));
    }

    pub(in super::super) fn read(&mut self, id: NodeId, block: u64) {
        self.read_blocks(id, block, 1);
    }

    pub(in super::super) fn read_blocks(&mut self, id: NodeId, first: u64, count: u64) {
        self.ask(id, ClientOp::Read, (first * BLOCK, count * BLOCK), false, Asked::Read { first });
    }

    /// Asks for the block status of the whole volume.
    pub(in super::super) fn extents(&mut self, id: NodeId) {
        let len = self.config.geometry.size();
        self.ask(id, ClientOp::Extents { max: usize::MAX }, (0, len), false, Asked::Extents { first: 0 });
    }

    /// Holes are said to read as zeroes: that must be what a read may see.
    fn extents_answered(&mut self, id: NodeId, first: u64, extents: Vec<Extent>) {
        let blocks = extents.iter().flat_map(|e| (0..e.len / BLOCK).map(|_| *e));
        for (block, extent) in (first..).zip(blocks) {
            if extent.hole {
                self.history.read(block, 0, &id.to_string());
            }
        }
        self.extents = extents;
    }

    pub(in super::super) fn flush(&mut self, id: NodeId) {
        let sent = self.history.flush_sent();
        self.ask(id, ClientOp::Flush, (0, 0), false, Asked::Flush(sent));
    }

    fn ask(&mut self, id: NodeId, op: ClientOp, (offset, len): (u64, u64), fua: bool, asked: Asked) {
        let n = self.nodes.get_mut(&id).unwrap();
        let (conn, cookie) = (ConnId(n.conn), Cookie(n.next_cookie));
        n.next_cookie += 1;
        n.asked.insert((conn, cookie), asked);
        let request = ClientRequest { conn, cookie, op, offset, len, fua };
        let now = Nanos(self.now);
        self.replica(id).handle_client(now, ClientInput::Request(request));
        self.collect(id);
    }

    fn answered(&mut self, id: NodeId, asked: Asked, tags: Option<Vec<u64>>) {
        match asked {
            Asked::Write(changes) => {
                self.acked_writes += 1;
                for (block, change) in changes {
                    self.history.write_acked(block, change);
                    self.assert_on_all_members(block);
                }
            }
            Asked::Read { first } => {
                for (block, value) in (first..).zip(tags.expect("a read brings content")) {
                    self.history.read(block, value, &id.to_string());
                }
            }
            Asked::Extents { .. } => panic!("a block status is answered with extents"),
            Asked::Flush(sent) => {
                self.acked_flushes += 1;
                self.history.flush_acked(&sent);
            }
        }
    }

    /// Design invariant 1: an acknowledged write is present on every member of the committed set.
    fn assert_on_all_members(&self, block: u64) {
        let at = usize::try_from(block).unwrap();
        let allowed = self.history.allowed(block);
        for member in &self.config.in_sync {
            let n = &self.nodes[&member.node];
            if n.replica.is_none() || n.incarnation != member.incarnation {
                continue; // died since it acknowledged: one failure
            }
            let held = n.disk.data[at];
            assert!(allowed.contains(&held), "{} lacks an acknowledged write of block {block}", member.node);
        }
        if let [only] = self.config.in_sync.as_slice() {
            let held = self.nodes[&only.node].disk.stable[at];
            assert!(allowed.contains(&held), "alone, and an acknowledged write is not stable [R14]");
        }
    }

    pub(in super::super) fn waiting(&self, id: NodeId) -> usize {
        self.nodes[&id].asked.len()
    }

    // Steps.

    pub(super) fn land(&mut self, id: NodeId, op: &DiskOp) {
        let n = self.nodes.get_mut(&id).unwrap();
        let (blocks, tags, durable) = match op {
            DiskOp::Write { blocks, buf, durable } => (*blocks, n.bufs[&buf.0].tags.clone(), *durable),
            DiskOp::Zero { blocks, durable } => {
                (*blocks, vec![0; usize::try_from(blocks.count).unwrap()], *durable)
            }
            _ => return,
        };
        for (block, tag) in blocks.iter().zip(tags) {
            let at = usize::try_from(block.0).unwrap();
            n.disk.data[at] = tag;
            if durable {
                n.disk.stable[at] = tag;
            }
        }
    }

    /// Completes the `at`-th disk request in flight.
    pub(in super::super) fn complete_disk(&mut self, id: NodeId, at: usize) {
        let n = self.nodes.get_mut(&id).unwrap();
        let DiskRequest { id: op_id, op } = n.pending.remove(at).expect("a request in flight");
        let result = self.carry_out(id, &op);
        let n = self.nodes.get_mut(&id).unwrap();
        if let DiskOp::Write { buf, .. } | DiskOp::FillEdges { buf, .. } = op {
            Self::release(n, buf);
        }
        self.done(id, op_id, result);
    }

    fn done(&mut self, id: NodeId, op: DiskOpId, result: Result<DiskResult, DiskErrorKind>) {
        let now = Nanos(self.now);
        self.replica(id).handle_disk(now, DiskDone { id: op, result });
        self.collect(id);
    }

    fn carry_out(&mut self, id: NodeId, op: &DiskOp) -> Result<DiskResult, DiskErrorKind> {
        if let DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. } = op {
            self.assert_intent_on_disk(id, *blocks);
        }
        let n = self.nodes.get_mut(&id).unwrap();
        match op {
            DiskOp::Read { blocks, digest } => {
                if blocks.iter().any(|b| n.disk.bad.contains(&b.0)) {
                    return Err(DiskErrorKind::Io);
                }
                let at = usize::try_from(blocks.start.0).unwrap();
                let tags = n.disk.data[at..][..usize::try_from(blocks.count).unwrap()].to_vec();
                let hashes = if *digest == Digest::Hashes {
                    tags.iter().map(|t| u128::from(*t).to_le_bytes()).collect()
                } else {
                    vec![]
                };
                let all_zero = tags.iter().all(|t| *t == 0);
                let payload = Self::new_buf(n, tags);
                let payload = if *digest == Digest::None { Payload { crc: 0, ..payload } } else { payload };
                Ok(DiskResult::Read { payload, all_zero, hashes })
            }
            DiskOp::FillEdges { buf, blocks, head, tail } => {
                let tags = &mut n.bufs.get_mut(&buf.0).unwrap().tags;
                for (edge, block) in [(*head, blocks.start.0), (*tail, blocks.end() - 1)] {
                    if edge > 0 && n.disk.bad.contains(&block) {
                        return Err(DiskErrorKind::Io);
                    }
                    if edge > 0 {
                        let old = n.disk.data[usize::try_from(block).unwrap()];
                        let tag = &mut tags[usize::try_from(block - blocks.start.0).unwrap()];
                        *tag = mixed(old, *tag);
                    }
                }
                Ok(DiskResult::Filled { crc: crc_of(tags) })
            }
            DiskOp::ZeroBuffer { len } => {
                let tags = vec![0; usize::try_from(u64::from(*len) / BLOCK).unwrap()];
                let payload = Self::new_buf(n, tags);
                Ok(DiskResult::Read { payload, all_zero: true, hashes: vec![] })
            }
            DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. } => {
                if n.disk.write_error {
                    return Err(DiskErrorKind::Io);
                }
                let for_good = n.disk.bad_for_good;
                n.disk.bad.retain(|b| for_good || !blocks.contains(BlockIndex(*b)));
                self.land(id, op);
                Ok(DiskResult::Done)
            }
            DiskOp::Extents { blocks, .. } => Ok(DiskResult::Extents(n.disk.stretches(*blocks))),
            DiskOp::Flush => {
                if n.disk.flush_error {
                    return Err(DiskErrorKind::Io);
                }
                n.disk.stable = n.disk.data.clone();
                Ok(DiskResult::Done)
            }
            DiskOp::MetaWrite { offset, bytes } => {
                n.disk.write_meta(*offset, bytes);
                Ok(DiskResult::Done)
            }
        }
    }

    /// Delivers the oldest message from `a` to `b`.
    pub(in super::super) fn deliver(&mut self, a: NodeId, b: NodeId) {
        let Some((mut msg, tags)) = self.wires.get_mut(&Link(a, b)).and_then(VecDeque::pop_front) else {
            return;
        };
        let Some(session) = self.sessions.get(&Link(b, a)).copied() else { return };
        let n = self.nodes.get_mut(&b).unwrap();
        if let Some(tags) = tags {
            let new = Self::new_buf(n, tags);
            match &mut msg {
                PeerMsg::Write { payload, .. } | PeerMsg::Copy { payload, .. } => *payload = new,
                PeerMsg::ReadReply { payload, .. } => *payload = Some(new),
                other => panic!("{other:?} carries no content"),
            }
        }
        let now = Nanos(self.now);
        self.replica(b).handle_peer(now, PeerInput::Msg(session, msg));
        self.collect(b);
    }

    /// Time passes for everyone: ticks, connections, leases.
    pub(in super::super) fn pass(&mut self, by: Duration) {
        self.now += u64::try_from(by.as_nanos()).unwrap();
        self.connect_all();
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let n = self.nodes.get_mut(&id).unwrap();
            let Some(replica) = n.replica.as_mut() else { continue };
            // A grant counts only once the node has applied what the leader had [R1].
            if !n.cut_off && n.seen == self.config.index {
                n.lease_until = self.now + LEASE;
                replica.handle_lease(Nanos(self.now), Lease { until: Nanos(n.lease_until) });
            }
            replica.handle_tick(Nanos(self.now));
            self.collect(id);
        }
    }

    pub(in super::super) fn give_config(&mut self, id: NodeId) {
        let config = self.config.clone();
        let now = Nanos(self.now);
        let n = self.nodes.get_mut(&id).unwrap();
        n.seen = config.index;
        if let Some(replica) = n.replica.as_mut() {
            replica.handle_config(now, config);
        }
        self.collect(id);
    }

    /// Something that can happen happens; false if nothing can but the passing of time.
    pub(in super::super) fn step(&mut self) -> bool {
        let mut choices: Vec<(u8, NodeId, NodeId)> = Vec::new();
        for (id, n) in &self.nodes {
            if n.replica.is_none() {
                continue;
            }
            if !n.returning().is_empty() {
                choices.push((0, *id, *id));
            }
            if !n.cut_off && n.seen < self.config.index {
                choices.push((1, *id, *id));
            }
            if !n.cut_off && !n.outcomes.is_empty() {
                choices.push((2, *id, *id));
            }
        }
        for (link, queue) in &self.wires {
            if !queue.is_empty() && !self.clogged.contains(&link.0) && !self.silent.contains(link) {
                choices.push((3, link.0, link.1));
            }
        }
        if !self.proposals.is_empty() && !self.hold_proposals {
            choices.push((4, NodeId(0), NodeId(0)));
        }
        if choices.is_empty() {
            return false;
        }
        let (what, a, b) = choices[usize::try_from(self.rng.below(choices.len() as u64)).unwrap()];
        match what {
            0 => {
                let returning = self.nodes[&a].returning();
                let at = usize::try_from(self.rng.below(returning.len() as u64)).unwrap();
                self.complete_disk(a, returning[at]);
            }
            1 => self.give_config(a),
            2 => {
                let (id, outcome) = self.nodes.get_mut(&a).unwrap().outcomes.pop_front().unwrap();
                let now = Nanos(self.now);
                self.replica(a).handle_proposal(now, id, outcome);
                self.collect(a);
            }
            3 => self.deliver(a, b),
            _ => {
                let (from, proposal) = self.proposals.remove(0);
                self.decide(from, proposal);
            }
        }
        true
    }

    /// Steps until nothing but time is left.
    pub(in super::super) fn settle(&mut self) {
        for _ in 0..200_000 {
            if !self.step() {
                return;
            }
        }
        panic!("does not settle");
    }

    /// Settles while time passes.
    pub(in super::super) fn run(&mut self, ticks: u32) {
        for _ in 0..ticks {
            self.settle();
            self.pass(Duration::from_millis(50));
        }
        self.settle();
    }
}

/// The blocks that a byte range touches, and whether it covers them.
fn blocks_of(offset: u64, len: u64) -> impl Iterator<Item = (u64, bool)> {
    let end = offset + len;
    let whole = move |block: u64| offset <= block * BLOCK && (block + 1) * BLOCK <= end;
    (offset / BLOCK..end.div_ceil(BLOCK)).map(move |block| (block, whole(block)))
}

fn crc_of(tags: &[u64]) -> u32 {
    tags.iter()
        .fold(17u32, |crc, t| crc.wrapping_mul(31).wrapping_add(u32::try_from(t % 0xffff_fffb).unwrap()))
}

fn kind_of(msg: &PeerMsg) -> &'static str {
    match msg {
        PeerMsg::Write { .. } => "write",
        PeerMsg::Copy { .. } => "copy",
        PeerMsg::CopyZero { .. } => "copy_zero",
        PeerMsg::Compare { .. } => "compare",
        PeerMsg::JoinFlush { .. } => "join_flush",
        PeerMsg::Stable { .. } => "stable",
        PeerMsg::ReadRequest { .. } => "read_request",
        PeerMsg::ResyncStart { .. } => "resync_start",
        _ => "other",
    }
}
