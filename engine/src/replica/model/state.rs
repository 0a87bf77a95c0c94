//! The state of the model: what each node holds in memory and on its disk of one block in one region, what is
//! committed, and what clients were told.
//!
//! Everything is small and plain so that it hashes fast. Contents are numbers of writes, in the order in which
//! clients issued them; 0 is the content from before. Epochs and runs are renumbered after each step
//! ([`State::renumber`]): only their order means anything, so states that differ in nothing else are one.
//!
//! Left out because another model or test has it: time, Raft (a commit is one step), leases (a promotion ends
//! the old primary's at once; `control/model` shows that), superblock copies, identity of disks.

/// Most nodes.
pub(super) const NODES_MAX: usize = 3;

/// The set that holds only `node`.
pub(super) fn bit(node: u8) -> u8 {
    1 << node
}

/// The nodes of a set, ascending.
pub(super) fn nodes_of(set: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |n| set & bit(*n) != 0)
}

/// A committed config (`types/config.rs::ConfigView`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Config {
    /// 0: none is known.
    pub(super) epoch: u8,
    pub(super) reign: u8,
    pub(super) primary: u8,
    /// The run of each node that is in sync; 0: none.
    pub(super) named: [u8; NODES_MAX],
}

impl Config {
    pub(super) fn members(&self) -> u8 {
        (0..).zip(self.named).filter(|(_, run)| *run > 0).fold(0, |set, (n, _)| set | bit(n))
    }

    pub(super) fn names(&self, node: u8, run: u8) -> bool {
        run > 0 && self.named[usize::from(node)] == run
    }
}

/// A client's write under way at the primary (`replica/primary.rs`: `Op` and its `Part`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Write {
    /// Its number; 0: none is under way.
    pub(super) id: u8,
    pub(super) local_done: bool,
    /// Ordered to be stable, or flushed since.
    pub(super) durable: bool,
    /// Of the ack set, who has not committed it.
    pub(super) waits: u8,
    /// Targets of a resync that were sent it and have not answered.
    pub(super) live: u8,
    /// Who the message says is missing, and the epoch of the config by which it does.
    pub(super) missing: u8,
    pub(super) epoch: u8,
}

/// A flush of the ack set (`replica/primary.rs::Round`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Round {
    pub(super) on: bool,
    pub(super) waits: u8,
    /// What was acknowledged when it began.
    pub(super) through: u8,
}

/// How far a primary is (`replica/primary.rs::Phase`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Phase {
    /// Not primary.
    #[default]
    Secondary,
    TakingOver,
    /// Taking over, and has flushed what it acknowledged as a secondary.
    Flushed,
    Serving,
}

/// Where a resync target is (`replica/resync.rs::TargetPhase`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Target {
    #[default]
    None,
    Copying,
    /// In the ack set.
    Entered,
    /// It has flushed, with the bitmaps.
    Ready,
    Proposed,
}

/// What a primary has proposed without knowing the fate (`replica/primary.rs::Pending`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Pending {
    #[default]
    None,
    Remove(u8),
    Join(u8),
}

/// A primary's memory; lives for one reign (`replica/primary.rs::Primary`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Primary {
    pub(super) phase: Phase,
    /// Who has confirmed this reign on a session that is up (`peer.rs::reported_session`).
    pub(super) links: u8,
    /// Members made equal during the take-over.
    pub(super) reconciled: u8,
    pub(super) write: Write,
    pub(super) round: Round,
    /// Something was written since the last round began, or none has been.
    pub(super) unstable: bool,
    /// The member whose removal is being prepared, as a set.
    pub(super) removal: u8,
    /// Its proposal of unknown fate.
    pub(super) pending: Pending,
    pub(super) targets: [Target; NODES_MAX],
    /// A write that was answered before the target had it; 0: none. Of several the newest
    /// (`replica/resync.rs::Target`: `unanswered`).
    pub(super) owed: [u8; NODES_MAX],
}

/// A proposal on its way to be committed; outlives whoever made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Proposal {
    #[default]
    None,
    Remove {
        node: u8,
        run: u8,
        by_run: u8,
        epoch: u8,
    },
    Join {
        node: u8,
        run: u8,
        by_run: u8,
        epoch: u8,
    },
}

impl Proposal {
    pub(super) fn epoch(&self) -> Option<u8> {
        match self {
            Self::None => None,
            Self::Remove { epoch, .. } | Self::Join { epoch, .. } => Some(*epoch),
        }
    }
}

/// One node: its disk, its process, and its proposal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) up: bool,
    /// The newest run of its process; registered when it starts.
    pub(super) run: u8,
    // On disk.
    /// What a read of the block returns.
    pub(super) data: u8,
    /// What the block may hold after a loss of power: the set of contents.
    pub(super) kept: u8,
    pub(super) intent: bool,
    pub(super) dirty_disk: u8,
    pub(super) inconsistent: bool,
    /// Power was lost since the committed config named the present member here.
    pub(super) power_lost: bool,
    // In memory.
    pub(super) config: Config,
    pub(super) dirty: u8,
    /// A clear is under way: the bitmaps of the missing are on the disk (`intent.rs`: `clearing`).
    pub(super) clearing: bool,
    pub(super) primary: Primary,
    // On its way.
    pub(super) proposal: Proposal,
}

impl Node {
    /// Targets that a write is on its way to (`replica/resync.rs::Target`: `live`).
    pub(super) fn live(&self) -> u8 {
        let owed = (0..).zip(self.primary.owed).filter(|(_, id)| *id > 0);
        owed.fold(self.primary.write.live, |set, (f, _)| set | bit(f))
    }

    /// A write to the block completes.
    pub(super) fn put(&mut self, content: u8, durable: bool) {
        self.data = content;
        self.kept = if durable { bit(content) } else { self.kept | bit(content) };
    }

    /// A flush completes.
    pub(super) fn flush(&mut self) {
        self.kept = bit(self.data);
    }
}

/// An invariant of the design, section 8, that a step broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Broken {
    /// 1: an acknowledged write is missing on a member.
    LostOnMember,
    /// 3: a read returned something older than a read before it.
    ReadWentBack,
    /// 4: an acknowledged write is gone after a single failure.
    AckedLost,
    /// 4: a flushed write is gone.
    FlushedLost,
    /// 6: replicas differ where nothing says so.
    UnknownDifference,
}

/// What clients did and saw, and which faults are left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// Writes that clients have issued.
    pub(super) issued: u8,
    /// The newest write that was acknowledged and must not be lost.
    pub(super) acked: u8,
    /// The newest content that a client has read or been told of.
    pub(super) seen: u8,
    /// The newest write that a flush covered.
    pub(super) flushed: u8,
    /// The only member was promoted after a restart and has not flushed since.
    pub(super) restarted: bool,
    pub(super) powers_left: u8,
    pub(super) kills_left: u8,
    pub(super) removals_left: u8,
    pub(super) lapses_left: u8,
    pub(super) broken: Option<Broken>,
}

/// The whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) nodes: [Node; NODES_MAX],
    pub(super) committed: Config,
    pub(super) world: World,
}

impl State {
    pub(super) fn node(&self, n: u8) -> &Node {
        &self.nodes[usize::from(n)]
    }

    pub(super) fn node_mut(&mut self, n: u8) -> &mut Node {
        &mut self.nodes[usize::from(n)]
    }

    /// True if the run that `config` names on `n` is alive.
    pub(super) fn alive(&self, config: &Config, n: u8) -> bool {
        self.node(n).up && config.names(n, self.node(n).run)
    }

    /// Renumbers epochs and runs so that only their order is left of them.
    pub(super) fn renumber(&mut self) {
        let mut epochs = 1u32; // 0 stays 0
        let mut see = |e: u8| epochs |= 1 << e;
        for config in self.nodes.iter().map(|n| &n.config).chain([&self.committed]) {
            see(config.epoch);
            see(config.reign);
        }
        for node in &self.nodes {
            node.proposal.epoch().into_iter().for_each(&mut see);
            see(node.primary.write.epoch);
        }
        let rank = |e: u8| ranked(epochs, e);
        for config in self.nodes.iter_mut().map(|n| &mut n.config).chain([&mut self.committed]) {
            config.epoch = rank(config.epoch);
            config.reign = rank(config.reign);
        }
        for node in &mut self.nodes {
            node.primary.write.epoch = rank(node.primary.write.epoch);
            if let Proposal::Remove { epoch, .. } | Proposal::Join { epoch, .. } = &mut node.proposal {
                *epoch = rank(*epoch);
            }
        }
        for n in 0..NODES_MAX {
            self.renumber_runs(n);
        }
    }

    fn renumber_runs(&mut self, n: usize) {
        let mut runs = 1u32 | 1 << self.nodes[n].run | 1 << self.committed.named[n];
        for (at, node) in self.nodes.iter().enumerate() {
            runs |= 1 << node.config.named[n];
            match node.proposal {
                Proposal::Remove { node: who, run, by_run, .. }
                | Proposal::Join { node: who, run, by_run, .. } => {
                    if usize::from(who) == n {
                        runs |= 1 << run;
                    }
                    if at == n {
                        runs |= 1 << by_run;
                    }
                }
                Proposal::None => {}
            }
        }
        let rank = |r: u8| ranked(runs, r);
        self.committed.named[n] = rank(self.committed.named[n]);
        for (at, node) in self.nodes.iter_mut().enumerate() {
            node.config.named[n] = rank(node.config.named[n]);
            if at == n {
                node.run = rank(node.run);
            }
            match &mut node.proposal {
                Proposal::Remove { node: who, run, by_run, .. }
                | Proposal::Join { node: who, run, by_run, .. } => {
                    if usize::from(*who) == n {
                        *run = rank(*run);
                    }
                    if at == n {
                        *by_run = rank(*by_run);
                    }
                }
                Proposal::None => {}
            }
        }
    }
}

/// How many numbers of the set lie below `number`.
fn ranked(set: u32, number: u8) -> u8 {
    let below = set & ((1u32 << number) - 1);
    u8::try_from(below.count_ones()).expect("at most 32 bits are set")
}
