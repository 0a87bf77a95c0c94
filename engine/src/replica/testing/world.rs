//! The world: nodes, links, the committed config, and one step at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::meta::{DataIdentity, Image, Superblock};
use crate::types::{
    BlockRange, ClusterId, ConfigView, Epoch, Geometry, Health, Incarnation, LineageFork, LineageId,
    LogIndex, Member, Nanos, NodeId, Proposal, ProposalId, ProposalKind, ProposalOutcome, Reign, ReplicaSlot,
    ReplicaView, VolumeId, VolumeSettings,
};
use crate::wire::{BaseContent, BufId, Payload, PeerMsg, SessionId};

use super::super::io::{
    ClientInput, ClientOp, ClientRequest, ConnId, Cookie, DiskDone, DiskErrorKind, DiskOp, DiskOpId,
    DiskRequest, DiskResult, Event, Lease, Output, PeerInput, ReplyData,
};
use super::super::{Boot, Replica};
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

#[derive(Debug)]
struct Buf {
    tags: Vec<u64>,
    refs: u32,
}

/// A client request without an answer.
#[derive(Debug, Clone)]
enum Asked {
    Write { block: u64, tag: u64 },
    Read { block: u64 },
    Flush(BTreeMap<u64, BTreeSet<u64>>),
}

#[derive(Debug)]
pub(in super::super) struct Node {
    pub(in super::super) replica: Option<Replica>,
    pub(in super::super) incarnation: Incarnation,
    pub(in super::super) disk: TestDisk,
    os_boot: u128,
    pub(in super::super) pending: VecDeque<DiskRequest>,
    pub(in super::super) disk_paused: bool,
    /// Hears no config, gets no lease, no outcome.
    pub(in super::super) cut_off: bool,
    seen: LogIndex,
    outcomes: VecDeque<(ProposalId, ProposalOutcome)>,
    bufs: BTreeMap<u32, Buf>,
    next_buf: u32,
    pub(in super::super) lease_until: u64,
    asked: BTreeMap<(ConnId, Cookie), Asked>,
    next_cookie: u64,
    conn: u64,
    pub(in super::super) events: Vec<Event>,
    pub(in super::super) stopped: bool,
}

/// A message and the content that it carries.
type OnWire = (PeerMsg, Option<Vec<u64>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Link(NodeId, NodeId);

#[derive(Debug)]
pub(in super::super) struct World {
    pub(in super::super) nodes: BTreeMap<NodeId, Node>,
    pub(in super::super) config: ConfigView,
    pub(in super::super) history: History,
    pub(in super::super) rng: Rng,
    pub(in super::super) now: u64,
    /// Messages under way, per direction, with their content copied out of the sender's buffers.
    wires: BTreeMap<Link, VecDeque<OnWire>>,
    sessions: BTreeMap<Link, SessionId>,
    cut: BTreeSet<Link>,
    silent: BTreeSet<Link>,
    replaced: bool,
    pub(in super::super) clogged: BTreeSet<NodeId>,
    next_session: u64,
    next_tag: u64,
    pub(in super::super) proposals: Vec<(NodeId, Proposal)>,
    pub(in super::super) hold_proposals: bool,
    pub(in super::super) sent: BTreeMap<&'static str, u64>,
    pub(in super::super) acked_writes: u64,
    pub(in super::super) acked_flushes: u64,
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
            clogged: BTreeSet::new(),
            next_session: 1,
            next_tag: 1,
            proposals: Vec::new(),
            hold_proposals: false,
            sent: BTreeMap::new(),
            acked_writes: 0,
            acked_flushes: 0,
        };
        for n in 1..=options.replicas {
            world.add_node(node(n), geometry);
        }
        world
    }

    fn add_node(&mut self, id: NodeId, geometry: Geometry) {
        let slots: Vec<ReplicaSlot> = self.config.replicas.iter().map(|r| r.slot).collect();
        let mine = self.config.slot(id).unwrap();
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
            member: None,
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
        let fresh = Node {
            replica: None,
            incarnation: Incarnation { boot: 0, nonce: id.0 },
            disk,
            os_boot: 5,
            pending: VecDeque::new(),
            disk_paused: false,
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
        n.replica =
            Some(Replica::new(Boot { me, os_boot: n.os_boot, image, data_replaced: self.replaced, now }));
        n.seen = LogIndex(0);
        n.lease_until = 0;
        n.stopped = false;
        n.conn += 1;
        self.collect(id);
    }

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

    fn others(&self, id: NodeId) -> Vec<NodeId> {
        self.nodes.keys().copied().filter(|n| *n != id).collect()
    }

    fn lose_clients(&mut self, id: NodeId) {
        let n = self.nodes.get_mut(&id).unwrap();
        n.conn += 1;
        for asked in std::mem::take(&mut n.asked).into_values() {
            if let Asked::Write { block, .. } = asked {
                self.history.write_lost(block);
            }
        }
    }

    /// Starts with a data object that is not the one the metadata belongs to.
    pub(in super::super) fn start_replaced(&mut self, id: NodeId) {
        self.replaced = true;
        self.start(id);
        self.replaced = false;
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

    pub(in super::super) fn outcome_unknown(&mut self, id: NodeId, proposal: ProposalId) {
        let now = Nanos(self.now);
        self.replica(id).handle_proposal(now, proposal, ProposalOutcome::Unknown);
        self.collect(id);
    }

    pub(in super::super) fn refuses(&mut self, proposal: Proposal) -> bool {
        matches!(self.apply(&proposal), ProposalOutcome::Refused(_))
    }

    /// Messages from `a` to `b` wait.
    pub(in super::super) fn cut_wire(&mut self, a: NodeId, b: NodeId) {
        self.silent.insert(Link(a, b));
    }

    pub(in super::super) fn restore_wires(&mut self) {
        self.silent.clear();
    }

    /// Settles while `id` does nothing.
    pub(in super::super) fn settle_without(&mut self, id: NodeId) {
        self.nodes.get_mut(&id).unwrap().disk_paused = true;
        self.settle();
        self.nodes.get_mut(&id).unwrap().disk_paused = false;
    }

    // Links.

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
                n.pending.push_back(request);
            }
            Output::Send(session, msg) => self.send(id, session, msg),
            Output::Reply { conn, cookie, result } => {
                let tags = match result {
                    Ok(ReplyData::Read { buf, .. }) => Some(n.bufs[&buf.0].tags.clone()),
                    _ => None,
                };
                if let Some(asked) = n.asked.remove(&(conn, cookie)) {
                    assert!(result.is_ok(), "{id} answers {asked:?} with {result:?}");
                    self.answered(id, asked, tags);
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
        self.next_tag += 1;
        self.history.write_sent(block, tag);
        let n = self.nodes.get_mut(&id).unwrap();
        let payload = Self::new_buf(n, vec![tag]);
        self.ask(id, ClientOp::Write(payload), block, fua, Asked::Write { block, tag });
        tag
    }

    pub(in super::super) fn read(&mut self, id: NodeId, block: u64) {
        self.ask(id, ClientOp::Read, block, false, Asked::Read { block });
    }

    pub(in super::super) fn flush(&mut self, id: NodeId) {
        let sent = self.history.flush_sent();
        self.ask(id, ClientOp::Flush, 0, false, Asked::Flush(sent));
    }

    fn ask(&mut self, id: NodeId, op: ClientOp, block: u64, fua: bool, asked: Asked) {
        let n = self.nodes.get_mut(&id).unwrap();
        let (conn, cookie) = (ConnId(n.conn), Cookie(n.next_cookie));
        n.next_cookie += 1;
        n.asked.insert((conn, cookie), asked);
        let len = if matches!(op, ClientOp::Flush) { 0 } else { BLOCK };
        let request = ClientRequest { conn, cookie, op, offset: block * BLOCK, len, fua };
        let now = Nanos(self.now);
        self.replica(id).handle_client(now, ClientInput::Request(request));
        self.collect(id);
    }

    fn answered(&mut self, id: NodeId, asked: Asked, tags: Option<Vec<u64>>) {
        match asked {
            Asked::Write { block, tag } => {
                self.acked_writes += 1;
                self.history.write_acked(block, tag);
                self.assert_on_all_members(block, tag);
            }
            Asked::Read { block } => {
                let value = tags.expect("a read brings content")[0];
                self.history.read(block, value, &id.to_string());
            }
            Asked::Flush(sent) => {
                self.acked_flushes += 1;
                self.history.flush_acked(&sent);
            }
        }
    }

    /// Design invariant 1: an acknowledged write is present on every member of the committed set.
    fn assert_on_all_members(&self, block: u64, tag: u64) {
        let at = usize::try_from(block).unwrap();
        for member in &self.config.in_sync {
            let n = &self.nodes[&member.node];
            if n.replica.is_none() || n.incarnation != member.incarnation {
                continue; // died since it acknowledged: one failure
            }
            assert_eq!(n.disk.data[at], tag, "{} lacks an acknowledged write of block {block}", member.node);
        }
        if let [only] = self.config.in_sync.as_slice() {
            let n = &self.nodes[&only.node];
            assert_eq!(n.disk.stable[at], tag, "alone, and an acknowledged write is not stable [R14]");
        }
    }

    pub(in super::super) fn waiting(&self, id: NodeId) -> usize {
        self.nodes[&id].asked.len()
    }

    // Steps.

    fn land(&mut self, id: NodeId, op: &DiskOp) {
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
            DiskOp::Read { blocks, hash } => {
                if blocks.iter().any(|b| n.disk.bad.contains(&b.0)) {
                    return Err(DiskErrorKind::Io);
                }
                let at = usize::try_from(blocks.start.0).unwrap();
                let tags = n.disk.data[at..][..usize::try_from(blocks.count).unwrap()].to_vec();
                let hashes =
                    if *hash { tags.iter().map(|t| u128::from(*t).to_le_bytes()).collect() } else { vec![] };
                let all_zero = tags.iter().all(|t| *t == 0);
                let payload = Self::new_buf(n, tags);
                Ok(DiskResult::Read { payload, all_zero, hashes })
            }
            DiskOp::FillEdges { buf, blocks, .. } => {
                if blocks.iter().any(|b| n.disk.bad.contains(&b.0)) {
                    return Err(DiskErrorKind::Io);
                }
                Ok(DiskResult::Filled { crc: crc_of(&n.bufs[&buf.0].tags) })
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
                n.disk.bad.retain(|b| !blocks.contains(crate::types::BlockIndex(*b)));
                self.land(id, op);
                Ok(DiskResult::Done)
            }
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
            if !n.pending.is_empty() && !n.disk_paused {
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
                let len = self.nodes[&a].pending.len() as u64;
                let at = usize::try_from(self.rng.below(len)).unwrap();
                self.complete_disk(a, at);
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

    // The committed config.

    fn decide(&mut self, from: NodeId, proposal: Proposal) {
        let outcome = self.apply(&proposal);
        let n = self.nodes.get_mut(&from).unwrap();
        if n.replica.is_some() && n.incarnation == proposal.by.incarnation {
            n.outcomes.push_back((proposal.id, outcome));
        }
    }

    fn apply(&mut self, proposal: &Proposal) -> ProposalOutcome {
        let config = &self.config;
        if proposal.expected_epoch != config.epoch || config.primary != Some(proposal.by) {
            return ProposalOutcome::Refused("the epoch moved on".into());
        }
        let mut next = config.clone();
        match proposal.kind {
            ProposalKind::Remove(m) if next.in_sync.contains(&m) && m != proposal.by => {
                next.in_sync.retain(|x| *x != m);
            }
            ProposalKind::Join(m) if self.nodes[&m.node].incarnation == m.incarnation => {
                assert!(config.member(m.node).is_none(), "{} joins twice", m.node);
                // A proposer that has died left writes under way, which its intent map names.
                if self.member_now(proposal.by.node) == proposal.by {
                    self.assert_holds_everything(m.node, proposal.by.node);
                }
                next.in_sync.push(m);
                next.in_sync.sort();
            }
            ProposalKind::Move(m) if next.in_sync.contains(&m) => next.primary = Some(m),
            ProposalKind::Demote => next.primary = None,
            ProposalKind::HandOver(m) if next.in_sync.contains(&m) && m != proposal.by => {
                next.in_sync.retain(|x| *x != proposal.by);
                next.primary = Some(m);
            }
            ProposalKind::Bump => {}
            _ => return ProposalOutcome::Refused("a rule".into()),
        }
        self.commit(next);
        ProposalOutcome::Applied
    }

    /// Design invariant 6 at a join: the joiner differs only where writes are under way.
    fn assert_holds_everything(&self, joiner: NodeId, primary: NodeId) {
        let (a, b) = (&self.nodes[&joiner].disk, &self.nodes[&primary].disk);
        for block in 0..a.data.len() {
            if !self.history.busy(block as u64) && self.nodes[&primary].replica.is_some() {
                let under_way = self.nodes[&primary].asked.len() + self.nodes[&joiner].pending.len() > 0;
                assert!(
                    a.data[block] == b.data[block] || under_way,
                    "{joiner} joins without block {block}: {} there, {} here",
                    a.data[block],
                    b.data[block]
                );
            }
        }
    }

    /// Commits a config: counts the epoch, names the reign.
    pub(in super::super) fn commit(&mut self, mut next: ConfigView) {
        next.epoch = self.config.epoch.next();
        next.index = LogIndex(self.config.index.0 + 1);
        if next.primary != self.config.primary && next.primary.is_some() {
            next.reign = Reign(next.epoch.0);
        }
        for member in &next.in_sync {
            let replica = next.replicas.iter_mut().find(|r| r.node == member.node).unwrap();
            replica.last_member = Some(member.incarnation);
        }
        self.config = next;
    }

    pub(in super::super) fn member_now(&self, id: NodeId) -> Member {
        Member { node: id, incarnation: self.nodes[&id].incarnation }
    }

    fn lease_over(&self, id: NodeId) -> bool {
        let n = &self.nodes[&id];
        n.replica.is_none() || n.lease_until <= self.now
    }

    /// What the failover controller does: promotes a named member that is alive if the primary's lease
    /// is over; if every member restarted, one whose superblock says that it belongs [R6].
    pub(in super::super) fn failover(&mut self) -> bool {
        let Some(primary) = self.config.primary else { return false };
        let named = self.nodes[&primary.node].incarnation == primary.incarnation;
        let alive = named && self.nodes[&primary.node].replica.is_some();
        if alive && !self.lease_over(primary.node) {
            return false;
        }
        let candidate = self.config.in_sync.iter().copied().find(|m| {
            let n = &self.nodes[&m.node];
            *m != primary && n.replica.is_some() && !n.cut_off && n.incarnation == m.incarnation
        });
        if let Some(candidate) = candidate {
            let mut next = self.config.clone();
            next.primary = Some(candidate);
            self.commit(next);
            return true;
        }
        self.restart_promotion()
    }

    fn restart_promotion(&mut self) -> bool {
        let all_back = self.config.in_sync.iter().all(|m| {
            let n = &self.nodes[&m.node];
            let healthy = n.replica.as_ref().is_some_and(|r| r.health() == Health::Healthy);
            healthy && n.incarnation != m.incarnation && !n.cut_off
        });
        if !all_back {
            return false;
        }
        let reports =
            self.config.in_sync.iter().map(|m| (m, self.nodes[&m.node].replica.as_ref().unwrap().report()));
        let eligible = reports.filter(|(m, r)| r.member == Some(m.incarnation) && !r.inconsistent);
        let Some((chosen, _)) = eligible.max_by_key(|(_, r)| r.same_os_boot) else { return false };
        let chosen = self.member_now(chosen.node);
        let mut next = self.config.clone();
        next.in_sync = vec![chosen];
        next.primary = Some(chosen);
        self.commit(next);
        true
    }

    pub(in super::super) fn force(&mut self, id: NodeId) {
        let mut next = self.config.clone();
        let fork_epoch = self.nodes[&id].replica.as_ref().unwrap().report().epoch;
        next.history.push(LineageFork { lineage: next.lineage, fork_epoch });
        next.lineage = LineageId(next.lineage.0 + 1);
        next.in_sync = vec![self.member_now(id)];
        next.primary = Some(self.member_now(id));
        self.commit(next);
    }

    pub(in super::super) fn serving(&self) -> Option<NodeId> {
        self.nodes.iter().find(|(_, n)| n.replica.as_ref().is_some_and(Replica::serving)).map(|(id, _)| *id)
    }

    pub(in super::super) fn all_in_sync(&self) -> bool {
        let all = self
            .nodes
            .iter()
            .all(|(id, n)| n.replica.is_some() && self.config.in_sync.contains(&self.member_now(*id)));
        all && self.serving().is_some()
    }

    /// Faults are over: everything comes back, in bounded time (design invariant 10), and all replicas
    /// hold the same (invariant 6).
    pub(in super::super) fn converge(&mut self) {
        self.heal();
        self.hold_proposals = false;
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            if self.nodes[&id].replica.is_none() {
                self.start(id);
            }
        }
        for _ in 0..400 {
            self.settle();
            self.failover();
            self.pass(Duration::from_millis(50));
            if self.all_in_sync() && self.nodes.values().all(|n| n.asked.is_empty()) {
                break;
            }
        }
        self.run(60);
        assert!(self.all_in_sync(), "not in sync again: {:#?}", self.summary());
        let asked: usize = self.nodes.values().map(|n| n.asked.len()).sum();
        assert_eq!(asked, 0, "requests without an answer: {:#?}", self.summary());
        let data: Vec<_> = self.nodes.values().map(|n| &n.disk.data).collect();
        assert!(data.windows(2).all(|w| w[0] == w[1]), "replicas differ: {data:?}");
        let data = data[0].clone();
        for block in self.history.blocks() {
            self.history.check_final(block, data[usize::try_from(block).unwrap()]);
        }
        for (id, n) in &self.nodes {
            assert!(n.bufs.is_empty(), "{id} leaks buffers: {:?}", n.bufs);
            assert!(n.pending.is_empty(), "{id} has disk requests under way: {:?}", n.pending);
        }
    }

    pub(in super::super) fn summary(&self) -> Vec<String> {
        let mut lines = vec![format!("config {:?} {:?}", self.config.primary, self.config.in_sync)];
        for (id, n) in &self.nodes {
            let status = n.replica.as_ref().map(Replica::status);
            lines.push(format!(
                "{id} {:?} asked {:?} pending {} {status:?}",
                n.incarnation,
                n.asked,
                n.pending.len()
            ));
            lines.push(format!("  {:?}", n.events.iter().rev().take(12).collect::<Vec<_>>()));
        }
        lines
    }
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
