//! The driver's side of the contract with the core, as `engine::reactor` and the node around it keep it:
//! inputs with the time read after they were reaped [R27], every output carried out at once, and what that
//! causes fed back before anything else happens.

use blkrepl_engine::meta::Superblock;
use blkrepl_engine::mutation::{Mutation, mutated};
use blkrepl_engine::replica::{
    Boot, ClientInput, DiskOp, Event as CoreEvent, Lease, Output, PeerInput, Replica,
};
use blkrepl_engine::types::{
    Epoch, Health, Incarnation, LineageId, Member, Nanos, NodeId, ProposalKind, ProposalOutcome, Reign,
    ReplicaReport, ReplicaSlot, SuperblockTrust,
};
use blkrepl_engine::wire::{BaseContent, SessionId};

use crate::clock::{MS, S, US};
use crate::node::{Mail, Phase};
use crate::outcome::Invariant;
use crate::world::{Event, NodeEvent, VOLUME, World};

/// First pause before a redial; doubles up to the longest.
pub(crate) const REDIAL_MIN: u64 = 50 * MS;
pub(crate) const REDIAL_MAX: u64 = 500 * MS;

impl World {
    /// Gives the core one input, then carries out all that follows.
    pub(crate) fn input(&mut self, id: NodeId, give: impl FnOnce(&mut Replica, Nanos)) {
        let local = self.reads_time(id);
        let Some(replica) = self.node(id).replica.as_mut() else { return };
        give(replica, local);
        self.settle(id);
    }

    /// The time that goes with an input, read after the input was reaped [R27].
    fn reads_time(&mut self, id: NodeId) -> Nanos {
        let now = self.now;
        let n = self.node(id);
        let local = n.clock.local(now);
        let before = std::mem::replace(&mut n.time_read, local);
        if mutated(Mutation::R27) { before } else { local }
    }

    /// Carries out everything that the core puts out, until nothing is left.
    pub(crate) fn settle(&mut self, id: NodeId) {
        while self.violation.is_none()
            && let Some(output) = self.node(id).replica.as_mut().and_then(Replica::poll_output)
        {
            self.perform(id, output);
        }
    }

    fn perform(&mut self, id: NodeId, output: Output) {
        match output {
            Output::Disk(request) => self.disk_starts(id, request),
            Output::Send(session, msg) => self.send(id, session, &msg),
            Output::Reply { conn, cookie, result } => self.answer_leaves(id, conn, cookie, result),
            Output::Release(buf) => self.node(id).release(buf),
            Output::Propose(proposal) => {
                self.note(
                    id,
                    format_args!("proposes {:?} at epoch {}", proposal.kind, proposal.expected_epoch),
                );
                self.stats.saw(proposal_name(&proposal.kind));
                let planned = matches!(proposal.kind, ProposalKind::Move(_) | ProposalKind::Demote);
                if planned && !self.node_ref(id).asked_to_give_up {
                    let text = format!("{id} proposes {:?}, which nobody asked for", proposal.kind);
                    self.broke(Invariant::NoFailback, text);
                }
                self.control.propose(self.now, id, proposal);
            }
            Output::CloseSession(session, reason) => {
                self.note(id, format_args!("closes a session: {reason}"));
                self.close_session(id, session);
            }
            Output::CloseClients(reason) => {
                self.note(id, format_args!("closes its clients: {reason}"));
                let clients = std::mem::take(&mut self.node(id).clients);
                for (conn, client) in clients {
                    let late = self.rng.skewed(5 * US, MS);
                    self.tell_closed(id, conn, client, late);
                    let local = self.reads_time(id);
                    if let Some(r) = self.node(id).replica.as_mut() {
                        r.handle_client(local, ClientInput::Closed(conn));
                    }
                }
            }
            Output::Event(event) => self.core_event(id, &event),
            Output::Stopped => {
                self.note(id, format_args!("has stopped"));
                self.node(id).phase = Phase::Stopped;
                let wait = self.rng.skewed(MS, 20 * MS);
                self.at_node(wait, id, NodeEvent::Exit);
            }
        }
    }

    fn core_event(&mut self, id: NodeId, event: &CoreEvent) {
        self.note(id, format_args!("{event:?}"));
        self.stats.saw(event_name(event));
        match event {
            CoreEvent::Serving { reign } => self.begins_to_serve(id, *reign),
            CoreEvent::Failed(_) => {
                self.report(id);
                self.copies_changed();
            }
            _ => {}
        }
    }

    // Time and the control plane.

    pub(crate) fn tick(&mut self, id: NodeId) {
        let local = self.node_ref(id).clock.local(self.now);
        let due = self.node_ref(id).replica.as_ref().and_then(Replica::poll_deadline);
        let Some(due) = due else { return };
        if due <= local {
            self.input(id, |r, now| r.handle_tick(now));
            self.report(id);
        }
        self.plan_tick(id);
    }

    fn plan_tick(&mut self, id: NodeId) {
        let n = self.node_ref(id);
        let Some(due) = n.replica.as_ref().and_then(Replica::poll_deadline) else { return };
        let at = n.clock.when(due).max(self.now);
        let late = self.rng.skewed(US, 200 * US);
        self.at_node(at + late - self.now, id, NodeEvent::Tick);
    }

    /// Tells the control plane how the replica is, if that changed.
    pub(crate) fn report(&mut self, id: NodeId) {
        let n = self.node(id);
        let (health, report) = match (&n.replica, &n.phase) {
            (Some(replica), Phase::Stopped) => (Health::Unhealthy("it stops".into()), replica.report()),
            (Some(replica), _) => (replica.health(), replica.report()),
            (None, Phase::Recreating) => (Health::Unhealthy("it is being made anew".into()), no_report()),
            (None, Phase::Unusable(reason)) => (Health::Unhealthy(reason.clone()), no_report()),
            _ => return,
        };
        let said = Some((health.clone(), report));
        if n.reported != said {
            n.reported = said;
            self.control.set_report(self.now, id, VOLUME, health, report);
        }
    }

    pub(crate) fn read_mail(&mut self, id: NodeId) {
        match self.node(id).mail.pop_front() {
            Some(Mail::Update(state, lease)) => {
                let n = self.node(id);
                n.state = Some(state);
                n.lease = lease;
                let here = n.state.as_ref().and_then(|s| s.volumes.get(&VOLUME)).is_some();
                if here && n.phase == Phase::Waiting {
                    n.phase = Phase::Opening;
                    let wait = self.rng.skewed(MS, 80 * MS);
                    self.at_node(wait, id, NodeEvent::Open);
                }
                self.forward(id, true);
            }
            Some(Mail::Outcome(proposal, outcome)) => {
                self.note(id, format_args!("hears of {:?}: {outcome:?}", proposal.kind));
                self.stats.saw(match outcome {
                    ProposalOutcome::Applied => "outcome applied",
                    ProposalOutcome::Refused(_) => "outcome refused",
                    ProposalOutcome::Unknown => "outcome unknown",
                });
                self.forward(id, false);
                self.input(id, |r, now| r.handle_proposal(now, proposal.id, outcome));
                self.report(id);
            }
            None => {}
        }
    }

    /// Config first, then the lease that was granted under it, always.
    fn forward(&mut self, id: NodeId, with_lease: bool) {
        let n = self.node_ref(id);
        let Some(replica) = &n.replica else { return };
        let Some(view) = n.state.as_ref().and_then(|s| s.config_view(VOLUME)) else { return };
        if replica.config().is_none_or(|c| c.index < view.index) {
            self.note(id, format_args!("is told epoch {} reign {}", view.epoch, view.reign));
            self.input(id, |r, now| r.handle_config(now, view));
            self.report(id);
        }
        let n = self.node_ref(id);
        if let Some(until) = n.lease.until(VOLUME).filter(|until| with_lease && *until != n.lease_until) {
            self.node(id).lease_until = until;
            self.input(id, |r, now| r.handle_lease(now, Lease { until }));
            self.check_leases(id);
        }
    }

    // Opening.

    pub(crate) fn open(&mut self, id: NodeId) {
        let n = self.node_ref(id);
        if n.phase != Phase::Opening {
            return;
        }
        let Some(view) = n.state.as_ref().and_then(|s| s.config_view(VOLUME)) else { return };
        let others: Vec<ReplicaSlot> =
            view.replicas.iter().filter(|r| r.node != id).map(|r| r.slot).collect();
        if !n.disk.has_files() {
            let made = self.superblock(id, view.lineage, None);
            self.node(id).disk.make_files(made, &others);
        }
        let local = self.node_ref(id).clock.local(self.now);
        let n = self.node(id);
        n.superblocks = n.disk.superblocks();
        match n.disk.image(&others) {
            Ok(mut image) => {
                let data_replaced = image.superblock.identity != n.disk.identity;
                if data_replaced && !mutated(Mutation::R15) {
                    // As `engine::reactor::open` does it [R15].
                    image.superblock.identity = n.disk.identity;
                    image.superblock.base = BaseContent::Unknown;
                    image.superblock.member = None;
                    image.superblock.clean = None;
                }
                let (me, os_boot, failed) = (n.me(), n.os_boot, n.failed_before.clone());
                n.replica =
                    Some(Replica::new(Boot { me, os_boot, image, data_replaced, failed, now: local }));
                n.phase = Phase::Running;
                n.time_read = local;
            }
            Err(reason) => {
                self.note(id, format_args!("cannot open its files: {reason}"));
                self.stats.saw("files unusable");
                self.node(id).phase = Phase::Unusable(reason);
                return self.report(id);
            }
        }
        self.settle(id);
        self.report(id);
        self.forward(id, true);
        self.plan_tick(id);
        let peers: Vec<NodeId> = view.replicas.iter().map(|r| r.node).filter(|n| *n > id).collect();
        for peer in peers {
            self.node(id).dialing.insert(peer, REDIAL_MIN);
            self.at_node(100 * US, id, NodeEvent::Dial(peer));
        }
    }

    /// What the metadata of a new replica says; `member`: it is the first member of a new volume.
    pub(crate) fn superblock(&self, id: NodeId, lineage: LineageId, member: Option<Member>) -> Superblock {
        let n = self.node_ref(id);
        let (epoch, reign) = if member.is_some() { (Epoch(1), Reign(1)) } else { (Epoch(0), Reign(0)) };
        Superblock {
            cluster: self.committed.cluster.unwrap_or_default(),
            volume: VOLUME,
            node: id,
            slot: n.slot,
            geometry: self.shape.geometry,
            seq: 0,
            epoch,
            reign,
            lineage,
            member: member.map(|m| m.incarnation),
            chain: Vec::new(),
            current: n.incarnation,
            os_boot: n.os_boot,
            inconsistent: None,
            base: BaseContent::Zero,
            identity: n.disk.identity,
            clean: None,
        }
    }

    // The end of a process.

    /// The process is gone, and with `power` the machine's power. Disk requests in flight land, or not, or in
    /// part.
    pub(crate) fn crash(&mut self, id: NodeId, power: bool) {
        if id == self.witness() {
            if self.witness_up {
                self.witness_up = false;
                self.control.crash(self.now, id);
            }
            return;
        }
        let was_up = self.node_ref(id).is_up();
        if was_up {
            self.note(id, format_args!("{}", if power { "loses power" } else { "dies" }));
            self.trace.mix(&[5, id.0, u64::from(power)]);
            self.land_pending(id);
            self.drop_sessions(id, power);
            let clients = std::mem::take(&mut self.node(id).clients);
            for (conn, client) in clients {
                let late =
                    if power { self.rng.between(200 * MS, 2 * S) } else { self.rng.skewed(5 * US, MS) };
                self.tell_closed(id, conn, client, late);
            }
            self.node(id).forget();
            self.control.crash(self.now, id);
        }
        if power {
            let (now, mut rng) = (self.now, self.rng.fork());
            let n = self.node(id);
            n.disk.lose_cache(&mut rng);
            n.lost_boot = n.incarnation.boot;
            n.os_boot += 1;
            n.clock = n.clock.rebooted(now);
        }
        self.copies_changed();
    }

    pub(crate) fn land_pending(&mut self, id: NodeId) {
        let mut rng = self.rng.fork();
        let n = self.node(id);
        for pending in std::mem::take(&mut n.pending) {
            let fate = rng.below(3);
            match pending.request.op {
                DiskOp::MetaWrite { offset, bytes } => match fate {
                    0 => n.disk.write_meta(offset, &bytes),
                    1 => n.disk.write_some_meta(offset, &bytes, &mut rng),
                    _ => {}
                },
                DiskOp::Write { blocks, .. } | DiskOp::Zero { blocks, .. } => {
                    let tags = pending.tags.as_ref().map(|t| t.as_slice());
                    match fate {
                        0 => n.disk.write(blocks, tags, false),
                        1 => n.disk.write_some(blocks, tags, false, &mut rng),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
    }

    /// A process that is down comes up some time.
    pub(crate) fn start_later(&mut self, id: NodeId, after: u64) {
        self.schedule(after, Event::Start(id));
    }

    /// The session that a node's process has closed, or has been told to close.
    pub(crate) fn close_session(&mut self, id: NodeId, session: SessionId) {
        let Some(end) = self.node(id).sessions.remove(&session) else { return };
        self.close_end(end.conn, end.side);
        let local = self.reads_time(id);
        if let Some(r) = self.node(id).replica.as_mut() {
            r.handle_peer(local, PeerInput::Down(session));
        }
        self.session_lost(id, end.peer);
    }

    /// The dialer of a session dials again.
    pub(crate) fn session_lost(&mut self, id: NodeId, peer: NodeId) {
        if let Some(pause) = self.node(id).dialing.get_mut(&peer) {
            *pause = REDIAL_MIN;
            self.at_node(REDIAL_MIN, id, NodeEvent::Dial(peer));
        }
    }

    /// True if the node would refuse this run of a peer: a newer one has registered [R2].
    pub(crate) fn is_ghost(&self, at: NodeId, peer: NodeId, given: Incarnation) -> bool {
        let newest = self.node_ref(at).state.as_ref().and_then(|s| s.newest(peer));
        newest.is_some_and(|n| given.boot < n.boot || (given.boot == n.boot && given != n))
    }
}

/// The report of a replica about which nothing can be said.
fn no_report() -> ReplicaReport {
    ReplicaReport {
        trust: SuperblockTrust::None,
        epoch: Epoch(0),
        reign: Reign(0),
        lineage: LineageId(0),
        member: None,
        inconsistent: false,
        clean: false,
        same_os_boot: false,
    }
}

fn proposal_name(kind: &ProposalKind) -> &'static str {
    use blkrepl_engine::types::ProposalKind as K;
    match kind {
        K::Remove(_) => "proposal remove",
        K::Join(_) => "proposal join",
        K::Move(_) => "proposal move",
        K::Demote => "proposal demote",
        K::HandOver(_) => "proposal hand-over",
        K::Bump => "proposal bump",
    }
}

fn event_name(event: &CoreEvent) -> &'static str {
    match event {
        CoreEvent::ConfigFollowed { .. } => "config followed",
        CoreEvent::TookOver { .. } => "took over",
        CoreEvent::Serving { .. } => "began to serve",
        CoreEvent::StoppedServing(_) => "stopped serving",
        CoreEvent::Session { up: true, .. } => "session up",
        CoreEvent::Session { .. } => "session down",
        CoreEvent::Removing { .. } => "removal begun",
        CoreEvent::ResyncStarted { .. } => "resync started",
        CoreEvent::Discarding { .. } => "foreign writes discarded",
        CoreEvent::ResyncFinished { .. } => "resync finished",
        CoreEvent::Refused { .. } => "peer refused",
        CoreEvent::Repaired { .. } => "block repaired",
        CoreEvent::Failed(_) => "replica failed",
        CoreEvent::MetadataDamaged(_) => "damaged metadata found",
        _ => "other event",
    }
}
