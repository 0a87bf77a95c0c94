//! What a run comes to: whether a promise was broken, and what happened on the way.

use std::collections::BTreeMap;
use std::fmt;

use crate::fault::FaultKind;

/// What is checked. The numbered ones are the design's (section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// 1: an acknowledged write is on every member.
    AckedOnMembers,
    /// 2: one node serves at a time; leases of two primaries never overlap.
    OneServer,
    /// 3: reads and writes are linearizable.
    Linearizable,
    /// 4: what was flushed, or acknowledged, survives what it is promised to survive.
    Survives,
    /// 5: no block is written or sent that the own intent map does not durably cover.
    IntentFirst,
    /// 6: replicas differ only where maps say so; they are equal in the end.
    ReplicasEqual,
    /// 7: nobody outside the in-sync set is promoted but by force.
    PromotedInSync,
    /// 8: no rule moves the primary back.
    NoFailback,
    /// 9: damage is never served or spread, and never shrinks a resync.
    DamageContained,
    /// 10: the volume serves again.
    Liveness,
    /// [R7]: one disk write per block at a time.
    OneDiskWrite,
    /// [R16]: the superblock is durable before a reign is used.
    SuperblockFirst,
    /// Buffers and disk requests are all given back.
    NothingLeaks,
    /// Every request is answered or its connection closed.
    Answered,
    /// The wire: a damaged frame is refused.
    FramesRefused,
    /// The production code stopped by an assertion of its own.
    Panic,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AckedOnMembers => "1 (acknowledged on every member)",
            Self::OneServer => "2 (one server at a time)",
            Self::Linearizable => "3 (linearizable)",
            Self::Survives => "4 (flushed or acknowledged writes survive)",
            Self::IntentFirst => "5 (intent first)",
            Self::ReplicasEqual => "6 (replicas differ only where maps say so)",
            Self::PromotedInSync => "7 (promoted in sync or by force)",
            Self::NoFailback => "8 (no fail-back)",
            Self::DamageContained => "9 (damage is contained)",
            Self::Liveness => "10 (serves again)",
            Self::OneDiskWrite => "R7 (one disk write per block)",
            Self::SuperblockFirst => "R16 (superblock first)",
            Self::NothingLeaks => "leak",
            Self::Answered => "answered or closed",
            Self::FramesRefused => "damaged frames are refused",
            Self::Panic => "assertion of the production code",
        })
    }
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// What was seen.
    pub text: String,
    /// When, in nanoseconds of simulated time.
    pub at: u64,
}

/// The transitions and other things that a long series of seeds is to show.
pub const COVERAGE_KNOWN: &[&str] = &[
    "began to serve",
    "block repaired",
    "commit demote",
    "commit forced",
    "commit hand-over",
    "commit join",
    "commit other",
    "commit promote",
    "commit promote demoted",
    "commit promote restarted",
    "commit remove",
    "config followed",
    "damaged metadata found",
    "error answered",
    "files unusable",
    "forced because no member is eligible",
    "foreign writes discarded",
    "frame refused",
    "outcome applied",
    "outcome refused",
    "outcome unknown",
    "peer refused",
    "proposal bump",
    "proposal demote",
    "proposal hand-over",
    "proposal join",
    "proposal move",
    "proposal remove",
    "removal begun",
    "replica failed",
    "resync finished",
    "resync started",
    "session down",
    "session up",
    "stopped serving",
    "took over",
];

/// Figures of a run, or of many together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Simulated time in nanoseconds.
    pub simulated: u64,
    /// Events.
    pub events: u64,
    /// Client operations that were answered.
    pub answered: u64,
    /// Client operations whose fate stayed unknown to the client (each is done again).
    pub unknown: u64,
    /// Flushes among the answered.
    pub flushes: u64,
    /// Strikes that took effect, by kind.
    pub faults: BTreeMap<FaultKind, u64>,
    /// Strikes that the fault atlas held back, by kind.
    pub held_back: BTreeMap<FaultKind, u64>,
    /// Transitions and other things seen, by name.
    pub coverage: BTreeMap<&'static str, u64>,
    /// Sectors read by clients that a disk had falsified in silence.
    pub excused_reads: u64,
    /// Moments at which acknowledged writes that were not flushed lost their promise.
    pub promise_ends: u64,
}

impl Stats {
    /// Adds the figures of another run.
    pub fn add(&mut self, other: &Self) {
        self.simulated += other.simulated;
        self.events += other.events;
        self.answered += other.answered;
        self.unknown += other.unknown;
        self.flushes += other.flushes;
        self.excused_reads += other.excused_reads;
        self.promise_ends += other.promise_ends;
        for (kind, n) in &other.faults {
            *self.faults.entry(*kind).or_default() += n;
        }
        for (kind, n) in &other.held_back {
            *self.held_back.entry(*kind).or_default() += n;
        }
        for (name, n) in &other.coverage {
            *self.coverage.entry(name).or_default() += n;
        }
    }

    pub(crate) fn saw(&mut self, name: &'static str) {
        *self.coverage.entry(name).or_default() += 1;
    }
}

/// The end of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The first promise that was broken, if one was.
    pub violation: Option<Violation>,
    /// Figures.
    pub stats: Stats,
    /// Hash of everything that happened: the same for the same seed, always.
    pub hash: u64,
    /// The readable trace, if it was asked for.
    pub trace: String,
    /// The strikes of the schedule: number, nanoseconds, kind, and whether it took effect.
    pub strikes: Vec<(u32, u64, FaultKind, bool)>,
}

impl Outcome {
    /// True if nothing was broken.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violation.is_none()
    }
}
