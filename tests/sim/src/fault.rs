//! The kinds of faults, and which of them a run turns on and when.
//!
//! Swarm style: every run draws a subset of the kinds and how often each strikes. The whole schedule is drawn
//! before the run begins, every strike with a seed of its own, so that leaving one out (see `minimise`)
//! changes nothing about the others but what follows from it.

use crate::clock::{MS, S, Time};
use crate::rng::Rng;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// What can go wrong, or be asked for, in a run.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum FaultKind {
            $($(#[$doc])* $name),+
        }

        impl FaultKind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Its name, as options and traces spell it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }
        }
    };
}

kinds! {
    /// A link is slow for a while.
    SlowLink = "slow_link",
    /// A connection between two replicas breaks; what was under way on it is lost from some point on.
    ConnectionLoss = "connection_loss",
    /// Nothing passes between two nodes for a while.
    Partition = "partition",
    /// Nothing passes in one direction for a while.
    OneWay = "one_way",
    /// One node is cut off from all others, data and control.
    Isolate = "isolate",
    /// The control network alone is cut between two nodes.
    ControlCut = "control_cut",
    /// One end of a connection closes and the other does not hear of it.
    HalfOpen = "half_open",
    /// A bit of a frame flips.
    CorruptFrame = "corrupt_frame",
    /// The end of a frame is missing.
    TruncateFrame = "truncate_frame",
    /// A second connection is opened beside the first.
    DuplicateConnection = "duplicate_connection",
    /// A client drops its connections and comes back.
    ClientLoss = "client_loss",
    /// A disk is slow for a while.
    SlowDisk = "slow_disk",
    /// A disk request does not return for long.
    HungIo = "hung_io",
    /// Sectors cannot be read until they are written.
    ReadError = "read_error",
    /// A write fails, having been carried out in part.
    WriteError = "write_error",
    /// A flush fails, and some of what it was to make stable is gone.
    FlushError = "flush_error",
    /// The disk has no space left for a while.
    DiskFull = "disk_full",
    /// A write is reported done and never happens.
    LostWrite = "lost_write",
    /// A write lands in another place.
    MisdirectedWrite = "misdirected_write",
    /// Data changes on the disk.
    DataRot = "data_rot",
    /// A page of an intent map or dirty bitmap changes on the disk.
    MetaRot = "meta_rot",
    /// A copy of the superblock changes on the disk.
    SuperblockRot = "superblock_rot",
    /// A process is killed.
    Crash = "crash",
    /// A process is stopped cleanly.
    CleanStop = "clean_stop",
    /// A process stands still, for longer than a lease at times.
    Pause = "pause",
    /// A machine loses power.
    PowerLoss = "power_loss",
    /// Two machines lose power at once.
    PowerLossTwo = "power_loss_two",
    /// All machines lose power at once.
    PowerLossAll = "power_loss_all",
    /// A disk is lost with everything on it, and replaced.
    DiskLoss = "disk_loss",
    /// The data object is replaced under metadata that stays.
    DataReplaced = "data_replaced",
    /// An operator moves the primary role.
    Move = "move",
    /// An operator demotes the volume; somebody promotes later.
    Demote = "demote",
    /// An operator promotes a node.
    Promote = "promote",
    /// An operator promotes a node by force.
    Force = "force",
    /// An operator makes a replica anew.
    Recreate = "recreate",
    /// The leader of the control plane loses its leadership.
    Election = "election",
    /// The control plane is slow.
    SlowControl = "slow_control",
    /// A node hears of what was committed late.
    StaleView = "stale_view",
    /// Messages of the control plane get lost.
    LostCommand = "lost_command",
    /// Commands reach the log twice.
    DoubledCommand = "doubled_command",
    /// A node leaves a connection unread until after its client has given up and come back.
    ClientUnread = "client_unread",
}

/// A set of kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultSet(u64);

const _: () = assert!(FaultKind::ALL.len() <= 64);

impl FaultSet {
    /// None.
    pub const NONE: Self = Self(0);
    /// All.
    pub const ALL: Self = Self(u64::MAX);

    /// These.
    #[must_use]
    pub fn of(kinds: &[FaultKind]) -> Self {
        Self(kinds.iter().fold(0, |set, kind| set | 1 << *kind as u8))
    }

    /// All of this set but one.
    #[must_use]
    pub fn without(self, kind: FaultKind) -> Self {
        Self(self.0 & !(1 << kind as u8))
    }

    /// True if it is in the set.
    #[must_use]
    pub fn has(self, kind: FaultKind) -> bool {
        self.0 & (1 << kind as u8) != 0
    }

    /// Those in the set.
    pub fn iter(self) -> impl Iterator<Item = FaultKind> {
        FaultKind::ALL.iter().copied().filter(move |kind| self.has(*kind))
    }
}

/// One strike of the schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    pub(crate) at: Time,
    pub(crate) kind: FaultKind,
    /// Decides everything else about it.
    pub(crate) seed: u64,
}

/// How often a kind strikes in a run that has it, at least and at most.
fn strikes(kind: FaultKind) -> (u64, u64) {
    use FaultKind as K;
    match kind {
        K::CorruptFrame | K::TruncateFrame | K::ConnectionLoss | K::ClientLoss | K::ClientUnread => (1, 12),
        K::SlowLink | K::SlowDisk | K::OneWay | K::HalfOpen | K::DuplicateConnection => (1, 6),
        K::Crash | K::PowerLoss | K::Pause | K::Move | K::Promote | K::Election => (1, 8),
        K::DoubledCommand | K::LostCommand | K::StaleView | K::SlowControl => (1, 6),
        K::MetaRot | K::DataRot | K::ReadError | K::LostWrite | K::MisdirectedWrite => (1, 5),
        K::PowerLossAll | K::PowerLossTwo => (1, 4),
        K::Partition | K::Isolate | K::ControlCut => (1, 5),
        _ => (1, 3),
    }
}

/// Draws what strikes when within `from .. to`, in order of time.
pub(crate) fn schedule(
    rng: &mut Rng,
    allowed: FaultSet,
    always: FaultSet,
    from: Time,
    to: Time,
) -> Vec<Strike> {
    let strength = rng.between(30, 300);
    let mut out = Vec::new();
    // Strikes that come close together meet the system half way through the answer to the one before.
    let hot: Vec<Time> = (0..rng.between(2, 6)).map(|_| rng.between(from, to)).collect();
    for kind in FaultKind::ALL {
        // Drawn for every kind, so that leaving one out does not change the others.
        let mut own = rng.fork();
        let drawn = own.chance(strength);
        if !(drawn && allowed.has(*kind) || always.has(*kind)) {
            continue;
        }
        let (low, high) = strikes(*kind);
        for _ in 0..own.between(low, high) {
            let at = if own.chance(500) {
                own.between(from, to)
            } else {
                (own.pick(&hot) + own.skewed(MS / 10, 2 * S)).min(to)
            };
            out.push(Strike { at, kind: *kind, seed: own.next() });
        }
    }
    out.sort_by_key(|s| (s.at, s.seed));
    out
}
