//! The sans-IO replication core: one [`Replica`] per volume and node.
//!
//! It has four kinds of methods and no others:
//! - getters ([`Replica::status`], [`Replica::serving`], ...);
//! - inputs: `handle_client`, `handle_disk`, `handle_peer`, `handle_config`, `handle_lease`,
//!   `handle_proposal`, `handle_tick`, each with `now`, read by the driver after the completion was reaped [R27];
//! - operator commands: [`Replica::begin_move`], [`Replica::begin_demote`], [`Replica::begin_force`],
//!   [`Replica::begin_stop`];
//! - outputs: [`Replica::poll_output`] until `None`, and [`Replica::poll_deadline`].
//!
//! It has no clock, socket, file, thread or randomness of its own, and payload bytes never pass
//! through it. After every input it runs `maintain`, a fixed list of cheap idempotent steps, and then
//! checks its invariants.
//!
//! | file | concern |
//! |---|---|
//! | `io` | inputs and outputs |
//! | `range_lock`, `meta_store`, `intent`, `suspects`, `flusher` | the pieces, each testable alone |
//! | `config`, `takeover`, `membership`, `hold` | roles, promotion, who is in sync, planned changes |
//! | `client`, `write`, `read`, `extents`, `flush` | the primary's request path |
//! | `follow`, `join` | the secondary's and the resync target's side |
//! | `resync`, `chunk` | the source's side of resync and reconciliation |
//! | `disk`, `peer` | dispatch of completions and messages |

// Lengths are bounded by Geometry and PAYLOAD_BYTES_MAX; a silent truncation would corrupt data.
#![deny(clippy::cast_possible_truncation)]

mod budget;
mod chunk;
mod client;
mod config;
mod disk;
mod extents;
mod flush;
mod flusher;
mod follow;
mod force;
mod hold;
mod intent;
pub mod io;
mod join;
mod membership;
mod meta_store;
#[cfg(test)]
mod model;
mod node_set;
mod peer;
mod primary;
mod range_lock;
mod read;
mod resync;
mod status;
mod suspects;
mod takeover;
#[cfg(test)]
mod testing;
mod write;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::meta::{CHAIN_MAX, Image};
use crate::mutation::{Mutation, mutated};
use crate::types::{
    ConfigView, Epoch, Geometry, Incarnation, Member, Nanos, NodeId, ProposalId, ProposalOutcome, Reign,
    ReplicaSlot, SlotSet, SuperblockTrust, VolumeSettings,
};
use crate::wire::{BaseContent, BufId, PeerMsg, SessionId};

pub use extents::EXTENTS_MAX;
pub use io::{
    ClientError, ClientInput, ClientOp, ClientRequest, ConnId, Cookie, Digest, DiskDone, DiskErrorKind,
    DiskOp, DiskOpId, DiskRequest, DiskResult, Event, Lease, Output, PeerInput, ReplyData, Stretch,
};

use disk::DiskBook;
use flusher::Flusher;
use follow::Following;
use force::AskedForce;
use hold::Stop;
use intent::IntentBook;
use meta_store::MetaStore;
use peer::Peer;
use primary::Primary;
use suspects::Suspects;

/// How often the core wants `handle_tick` at least.
pub const TICK: Duration = Duration::from_millis(50);
/// Most characters of a reason that are sent to peers (each at most 4 bytes, the wire takes 1024).
const REASON_CHARS_MAX: usize = 256;
/// Once nothing was written for this long, regions are cleared from the intent map when they are stable everywhere.
pub(crate) const INTENT_IDLE: Duration = Duration::from_millis(1000);
/// While the volume is written to, only regions untouched for this long are cleared. Much longer than it takes to
/// write once to each region that may be set, each write to a cleared one waiting for the disk of the metadata:
/// otherwise writes all over the volume stay as slow as that disk because they are slow.
const INTENT_IDLE_BUSY: Duration = Duration::from_secs(10);

/// What a replica starts from.
#[derive(Debug)]
pub struct Boot {
    /// This node and this run of its process.
    pub me: Member,
    /// Identifies the boot of the operating system (a hash of its boot id).
    pub os_boot: u128,
    /// The metadata as read from the disk.
    pub image: Image,
    /// The data object is not the one that the metadata belongs to: everything must be copied [R15].
    pub data_replaced: bool,
    /// Why this very copy failed when it was open before, in the same run of the process. What was not flushed then
    /// may be gone, and the name of the run still stands for it: it stays failed until the next run [R10].
    pub failed: Option<String>,
    /// The present time.
    pub now: Nanos,
}

/// One replica of one volume. See the module's head.
#[derive(Debug)]
pub struct Replica {
    me: Member,
    os_boot: u128,
    slot: ReplicaSlot,
    geometry: Geometry,
    now: Nanos,
    config: Option<ConfigView>,
    /// Superblock version that must be durable before the config is used [R16].
    config_version: u64,
    /// Superblock version that records this run: before it is durable nobody may be told that the content
    /// goes on from a member's [R6].
    opened_version: u64,
    lease: Option<Lease>,
    store: MetaStore,
    intents: IntentBook,
    suspects: Suspects,
    disk: DiskBook,
    flusher: Flusher,
    peers: BTreeMap<NodeId, Peer>,
    following: Following,
    primary: Option<Box<Primary>>,
    stop: Stop,
    asked_force: Option<AskedForce>,
    failure: Option<String>,
    /// A set that names this run can mean this copy.
    belongs: bool,
    was_clean: bool,
    /// No config was ever recorded in its superblock before it was opened: it had served nobody, and copied
    /// nothing to anybody.
    never_served: bool,
    same_os_boot: bool,
    writes_acked: u64,
    next_proposal: ProposalId,
    next_request: u64,
    next_tick: Nanos,
    /// Something came in since the last maintenance that is not a request's ordinary progress.
    news: bool,
    out: VecDeque<Output>,
}

impl Replica {
    /// Starts a replica from its metadata. It follows nobody until a config arrives.
    #[must_use]
    pub fn new(boot: Boot) -> Self {
        let superblock = &boot.image.superblock;
        let (slot, geometry) = (superblock.slot, superblock.geometry);
        let was_clean =
            superblock.clean.is_some_and(|c| c.epoch == superblock.epoch && superblock.member.is_some());
        let same_os_boot = superblock.os_boot == boot.os_boot;
        let notes = boot.image.notes.clone();
        let mut store = MetaStore::new(boot.image);
        let intents = IntentBook::new(geometry);
        if boot.data_replaced && !mutated(Mutation::R15) {
            store.change_superblock(|sb| {
                sb.member = None;
                sb.chain.clear();
                // Its content is of no epoch: should it be promoted by force, nothing is in common [R17].
                sb.epoch = Epoch(0);
                sb.base = BaseContent::Unknown;
                // A resync that was under way went to the other data object: it does not go on here.
                sb.inconsistent = None;
            });
        }
        let never_served = store.superblock().base == BaseContent::Zero;
        let belongs = store.superblock().member.is_some();
        let mut replica = Self {
            me: boot.me,
            os_boot: boot.os_boot,
            slot,
            geometry,
            now: boot.now,
            config: None,
            config_version: 0,
            opened_version: 0,
            lease: None,
            store,
            intents,
            suspects: Suspects::default(),
            disk: DiskBook::new(),
            flusher: Flusher::new(),
            peers: BTreeMap::new(),
            following: Following::default(),
            primary: None,
            stop: Stop::No,
            asked_force: None,
            failure: None,
            belongs,
            was_clean,
            never_served,
            same_os_boot,
            writes_acked: 0,
            // A replica may be opened more than once in a run of the process (it was made anew), and the control
            // plane takes a known id for a retry: it would answer with the fate of the older proposal.
            next_proposal: ProposalId(boot.now.0.max(1)),
            next_request: 1,
            next_tick: boot.now,
            news: true,
            out: VecDeque::new(),
        };
        for slot in replica.store.slots() {
            if replica.store.dirty(slot).is_some_and(|b| !b.is_empty()) {
                replica.suspects.suspect_all(slot);
            }
        }
        replica.mark_intents_for_all();
        // The clean mark goes durably before the first write: nothing is written before the superblock
        // version of the first config or resync mark is durable, and that is no older than this one. A
        // doubtful superblock is left as it is until it matches the committed config [R16].
        if replica.store.trust == SuperblockTrust::Sound {
            let me = replica.me.incarnation;
            replica.config_version = replica.store.change_superblock(|sb| {
                sb.clean = None;
                sb.current = me;
                sb.chain.push(me);
                let excess = sb.chain.len().saturating_sub(CHAIN_MAX);
                sb.chain.drain(..excess);
            });
            replica.opened_version = replica.config_version;
        }
        for note in notes {
            replica.event(Event::MetadataDamaged(note));
        }
        if let Some(reason) = boot.failed {
            replica.fail(reason);
        }
        replica.maintain();
        replica
    }

    // Inputs.

    /// A request of a client, or the end of its connection.
    pub fn handle_client(&mut self, now: Nanos, input: ClientInput) {
        self.advance(now, matches!(input, ClientInput::Closed(_)));
        match input {
            ClientInput::Request(request) => self.client_request(request),
            ClientInput::Closed(conn) => self.client_closed(conn),
        }
        self.maintain();
    }

    /// A disk operation has completed.
    pub fn handle_disk(&mut self, now: Nanos, done: DiskDone) {
        self.advance(now, false);
        self.disk_done(done);
        self.maintain();
    }

    /// Something came from a peer.
    pub fn handle_peer(&mut self, now: Nanos, input: PeerInput) {
        self.advance(now, !input.is_routine());
        match input {
            PeerInput::Up { session, node, incarnation } => self.session_up(session, node, incarnation),
            PeerInput::Down(session) => self.session_down(session),
            PeerInput::Msg(session, msg) => self.peer_msg(session, msg),
        }
        self.maintain();
    }

    /// A committed config, from the control plane.
    pub fn handle_config(&mut self, now: Nanos, config: ConfigView) {
        self.advance(now, true);
        self.adopt_config(config);
        self.maintain();
    }

    /// A lease for this volume was granted or prolonged.
    pub fn handle_lease(&mut self, now: Nanos, lease: Lease) {
        self.advance(now, true);
        self.lease = Some(lease);
        self.maintain();
    }

    /// What became of a proposal.
    pub fn handle_proposal(&mut self, now: Nanos, id: ProposalId, outcome: ProposalOutcome) {
        self.advance(now, true);
        self.proposal_outcome(id, outcome);
        self.maintain();
    }

    /// Time has passed; wanted at [`Replica::poll_deadline`].
    pub fn handle_tick(&mut self, now: Nanos) {
        self.advance(now, true);
        if self.next_tick <= now {
            self.next_tick = now.after(TICK);
            self.tick();
        }
        self.maintain();
    }

    // Outputs.

    /// The next thing to be done.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// When `handle_tick` is wanted next.
    #[must_use]
    pub fn poll_deadline(&self) -> Option<Nanos> {
        Some(self.next_tick)
    }

    // Inside.

    /// Takes the time of an input. `news`: the input is not a request's ordinary progress.
    fn advance(&mut self, now: Nanos, news: bool) {
        self.news |= news;
        assert!(now >= self.now, "time went back from {} to {}", self.now.0, now.0);
        self.now = now;
    }

    fn tick(&mut self) {
        self.tick_peers();
        self.tick_intents();
        self.tick_primary();
    }

    /// The fixed list of steps after each input. Each is idempotent and cheap when there is nothing to do.
    ///
    /// While requests make their ordinary progress on a volume that is in sync and whose set is not about to
    /// change, the steps that look at members, targets and planned changes have nothing to do; they run all
    /// the same after everything else that comes in, a tick included, so that none can be forgotten.
    fn maintain(&mut self) {
        let news = std::mem::take(&mut self.news) || self.is_changing();
        if news {
            self.intents_changed();
        }
        self.pump_following();
        if news {
            self.pump_takeover();
            self.pump_intent_queue();
        }
        self.pump_clients();
        self.pump_flush();
        if news {
            self.pump_membership();
            self.pump_resync();
            self.pump_hold();
            self.pump_stop();
        }
        self.pump_flusher();
        self.pump_store();
        self.release_held();
        self.check_invariants();
    }

    /// True while a role, the set or a replica's state is changing: then every input may move that on.
    fn is_changing(&self) -> bool {
        self.failure.is_some()
            || !self.stop.is_no()
            || self.primary.as_ref().is_some_and(|primary| primary.is_changing())
    }

    fn pump_store(&mut self) {
        while let Some(io) = self.store.poll_io() {
            self.put_meta(io);
        }
    }

    /// The cheap invariants, checked in production, too.
    fn check_invariants(&self) {
        debug_assert!(self.disk.locks.is_consistent(), "two disk writes on one block [R7]");
        debug_assert!(self.intents.is_consistent(&self.store), "intent map and book differ");
        let Some(primary) = &self.primary else { return };
        let config = self.config.as_ref().expect("a primary has a config");
        assert!(
            config.primary.is_some_and(|p| self.is_me(p)),
            "serving without being the named primary, which is {:?}",
            config.primary
        );
        assert_eq!(config.reign, primary.reign, "serving in a reign that is over");
        debug_assert!(primary.locks.is_consistent(), "range locks conflict");
    }

    fn send(&mut self, session: SessionId, msg: PeerMsg) {
        let keeps_alive = matches!(msg, PeerMsg::Ping | PeerMsg::Pong);
        if !keeps_alive && crate::mutation::drops_frame() {
            return;
        }
        self.out.push_back(Output::Send(session, msg));
    }

    fn release(&mut self, buf: BufId) {
        self.out.push_back(Output::Release(buf));
    }

    fn event(&mut self, event: Event) {
        self.out.push_back(Output::Event(event));
    }

    fn request_id(&mut self) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        id
    }

    fn settings(&self) -> VolumeSettings {
        self.config.as_ref().map(|c| c.settings).unwrap_or_default()
    }

    fn reign(&self) -> Reign {
        self.config.as_ref().map(|c| c.reign).unwrap_or_default()
    }

    /// True if `member` is this very run of this process, not just a run of its node [R2].
    fn is_me(&self, member: Member) -> bool {
        member == self.me || (mutated(Mutation::R2) && member.node == self.me.node)
    }

    /// True if the committed config names this very run of this process as a member.
    fn is_member(&self) -> bool {
        self.config.as_ref().is_some_and(|c| c.in_sync.contains(&self.me))
    }

    /// True if the committed config names this very run of this process and nobody else as a member.
    fn is_only_member(&self) -> bool {
        self.config.as_ref().is_some_and(|c| c.in_sync == [self.me])
    }

    /// True if the superblock that belongs to the config is durable: only then is a new reign, epoch or
    /// lineage used [R16].
    fn config_usable(&self) -> bool {
        self.config.is_some() && self.config_durable()
    }

    /// True if what the superblock has to say of the config is on both copies [R16].
    fn config_durable(&self) -> bool {
        mutated(Mutation::R16) || self.store.superblock_durable(self.config_version)
    }

    fn lease_valid(&self) -> bool {
        self.lease.is_some_and(|l| self.now < l.until)
    }

    /// Slots of all replicas but this one that are not named members: who is missing.
    fn missing_slots(&self) -> SlotSet {
        let mut missing = SlotSet::default();
        let Some(config) = &self.config else { return missing };
        for replica in &config.replicas {
            if replica.node != self.me.node && config.member(replica.node).is_none() {
                missing.insert(replica.slot);
            }
        }
        missing
    }

    /// Marks every set intent region whole in the bitmaps of all others [R3].
    fn mark_intents_for_all(&mut self) {
        if mutated(Mutation::R3) {
            return;
        }
        for slot in self.store.slots() {
            self.mark_intents_for(slot);
        }
    }

    /// Marks every set intent region whole in the bitmap of `slot` [R3, R12].
    fn mark_intents_for(&mut self, slot: ReplicaSlot) {
        for region in self.store.intent_regions().collect::<Vec<_>>() {
            let blocks = self.geometry.blocks_of_region(region);
            if let Some(bitmap) = self.store.dirty_mut(slot) {
                bitmap.set_range(blocks.start.0, blocks.count);
                self.suspects.insert(slot, region);
            }
        }
        self.intents.reconsider_clears();
    }

    /// This replica can be used no more; the process has to be restarted. Never undone [design 5].
    fn fail(&mut self, reason: String) {
        if self.failure.is_some() {
            return;
        }
        self.event(Event::Failed(reason.clone()));
        self.failure = Some(reason.clone());
        let reign = self.reign();
        for session in self.sessions() {
            let reason = for_peers(&reason);
            self.send(session, PeerMsg::Failed { reign, reason });
        }
        self.primary_failed();
    }

    fn incarnation(&self) -> Incarnation {
        self.me.incarnation
    }
}

/// A reason cut to what a message may carry, at a character's end.
fn for_peers(reason: &str) -> String {
    reason.chars().take(REASON_CHARS_MAX).collect()
}
