//! Mutations: deliberate faults, one for each rule [R1] to [R27] left out and some that a hasty change
//! could bring, so that tests and simulator can show that they would find them.
//!
//! A point in the code asks [`mutated`] at the very place that enforces a rule. Without the feature
//! `mutations` that is the constant `false`: no production build holds a mutation. With it a switch
//! per thread decides, which starts as the environment variable `BLKREPL_MUTATION` names it, so that an
//! ordinary test binary can run under one, and which `set` changes.
//!
//! Never changes what the code does while no mutation is switched on. At most one is on at a time.

macro_rules! mutations {
    ($($(#[doc = $doc:literal])+ $mutation:ident = $name:literal,)+) => {
        /// A deliberate fault: what is left out, and where.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Mutation {
            $($(#[doc = $doc])+ $mutation,)+
        }

        impl Mutation {
            /// Every mutation, in order.
            pub const ALL: &'static [Self] = &[$(Self::$mutation,)+];

            /// Its name, as on a command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$mutation => $name,)+
                }
            }

            /// What is left out, and where.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self {
                    $(Self::$mutation => concat!($($doc),+).trim_ascii_start(),)+
                }
            }
        }
    };
}

mutations! {
    /// R1: a change of primary does not wait until the old primary's lease is over (`LeaseTable::lease_over`).
    R1 = "r1",
    /// R2: another run of the named node counts as the named one (`Replica::is_me`, `obeys`; `check_newest`).
    R2 = "r2",
    /// R3: set intent regions are not marked for the others at start and promotion (`mark_intents_for_all`).
    R3 = "r3",
    /// R4: a joiner is waited for only once its join has committed (`Target::in_ack_set`, `refresh_acks`).
    R4 = "r4",
    /// R5: an intent goes without a flush and without durable bitmaps (`IntentBook::covered`, `clear_idle`).
    R5 = "r5",
    /// R6: any restarted member may take over, whatever its superblock says (`eligible_restarted`).
    R6 = "r6",
    /// R7: disk writes of one block run at once, and nobody locks the files (`DiskBook::lock`; `open::lock`).
    R7 = "r7",
    /// R8: a read does not wait for the overlapping write (`client::start`).
    R8 = "r8",
    /// R9: a removal is proposed and a role taken without the own flush (`pump_membership`, `pump_takeover`).
    R9 = "r9",
    /// R10: answers of another run of a member count as the member's (`reported_session`; `check_member`).
    R10 = "r10",
    /// R11: a new primary serves before the other members follow it and are equal (`pump_takeover`).
    R11 = "r11",
    /// R12: secondaries mark no missing replica, nor does a removal; a joiner gets no bitmaps (`mark_for`).
    R12 = "r12",
    /// R13: a store that was rolled back, or whose run or identity is not the known one, is believed.
    R13 = "r13",
    /// R14: a write of the only member is acknowledged before it is stable (`may_be_alone`).
    R14 = "r14",
    /// R15: another data object under old metadata goes unnoticed (`Replica::new`; `open`).
    R15 = "r15",
    /// R16: a config is used before the superblock holds it on both copies (`config_durable`).
    R16 = "r16",
    /// R17: a forced promotion goes on in the same lineage (`apply::volumes::force`).
    R17 = "r17",
    /// R18: the old primary serves on while a move is decided, and after one of unknown fate (`can_start`).
    R18 = "r18",
    /// R19: a node of another cluster is believed (`Receiver::check`).
    R19 = "r19",
    /// R20: a block that cannot be read is answered with an error (`client_read_done`, `edges_filled`).
    R20 = "r20",
    /// R21: the answer to an older write clears the bit of a newer one (`live_acked`, `forget_live`).
    R21 = "r21",
    /// R22: a set counts as durable with the write of the clear before it (`IntentBook::begin`).
    R22 = "r22",
    /// R23: the end of a reign does not close the client connections (`leave_reign`).
    R23 = "r23",
    /// R24: what a closed or stale connection sent is still begun (`client_closed`; `Clients::gone`, `replaced_by`).
    R24 = "r24",
    /// R25: a resize does not ask whether the members are ready (`apply::volumes::resize`).
    R25 = "r25",
    /// R26: answers leave without a valid lease (`release_held`).
    R26 = "r26",
    /// R27: the time given with a completion was read before it was reaped (the driver's clock).
    R27 = "r27",
    /// A write is acknowledged before the secondaries have committed it (`part_progress`).
    AckBeforeSecondary = "ack-before-secondary",
    /// A member leaves the ack set when its removal is proposed, not when it commits (`refresh_acks`).
    RemoveBeforeCommit = "remove-before-commit",
    /// A target joins while blocks that it lacks are still to be copied (`pump_phase`).
    JoinBeforeResyncEnds = "join-before-resync-ends",
    /// A member whose node restarted is neither removed nor told apart (`gone`, `reported_session`).
    RestartedInSync = "restarted-in-sync",
    /// A resync copy takes no range lock, so it may overtake a newer write (`begin_chunk`).
    CopyOvertakesWrite = "copy-overtakes-write",
    /// Overlapping writes run at once, and secondaries get the older one again last (`client::start`).
    ReorderOverlapping = "reorder-overlapping",
    /// A flush waits for the own disk alone (`start_round`).
    FlushOnlyLocally = "flush-only-locally",
    /// A flush that failed counts as done (`disk::route`).
    IgnoreFlushError = "ignore-flush-error",
    /// A damaged page of a bitmap reads as clean (`bitmap_disk::decode_group`).
    DamagedPageClean = "damaged-page-clean",
    /// Every run of a node is the same incarnation (`Incarnation::of_start`).
    ReuseIncarnation = "reuse-incarnation",
    /// The data path is fenced by Raft's term, not by the reign (`apply_under`, `adopt_config`).
    FenceByTerm = "fence-by-term",
    /// Whoever has joined again gets the primary role back (`targets_after_config`).
    FailBack = "fail-back",
    /// A write is sent and written before its intent is durable (`pump_intent_queue`).
    SendBeforeIntent = "send-before-intent",
    /// Some messages to peers are lost while their session goes on (`Replica::send`).
    DropFrame = "drop-frame",
}

impl Mutation {
    /// The mutation with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|m| m.name() == name)
    }
}

#[cfg(feature = "mutations")]
mod switch {
    use std::cell::Cell;

    use super::Mutation;

    /// Of the messages that [`super::drops_frame`] is asked about, one in so many is lost.
    const DROP_ONE_IN: u64 = 97;

    thread_local! {
        static ACTIVE: Cell<Option<Mutation>> = Cell::new(from_env());
        static ASKED: Cell<u64> = const { Cell::new(0) };
    }

    fn from_env() -> Option<Mutation> {
        let name = std::env::var("BLKREPL_MUTATION").ok().filter(|name| !name.is_empty())?;
        let found = Mutation::from_name(&name);
        assert!(found.is_some(), "BLKREPL_MUTATION={name} names no mutation");
        found
    }

    /// True if `mutation` is switched on in this thread.
    #[must_use]
    pub fn mutated(mutation: Mutation) -> bool {
        ACTIVE.get() == Some(mutation)
    }

    /// Switches a mutation on in this thread, or none.
    pub fn set(mutation: Option<Mutation>) {
        ACTIVE.set(mutation);
        ASKED.set(0);
    }

    /// True for the messages that [`Mutation::DropFrame`] loses: a fixed share, counted, so that a run can
    /// be repeated.
    #[must_use]
    pub fn drops_frame() -> bool {
        if !mutated(Mutation::DropFrame) {
            return false;
        }
        ASKED.set(ASKED.get() + 1);
        ASKED.get().is_multiple_of(DROP_ONE_IN)
    }
}

#[cfg(feature = "mutations")]
pub use switch::{drops_frame, mutated, set};

/// Whether `mutation` is switched on: never, in a build without the feature `mutations`.
#[cfg(not(feature = "mutations"))]
#[must_use]
pub const fn mutated(_mutation: Mutation) -> bool {
    false
}

/// Whether a message to a peer is to be lost: never, in a build without the feature `mutations`.
#[cfg(not(feature = "mutations"))]
#[must_use]
pub const fn drops_frame() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutation_has_a_name_of_its_own_and_says_what_it_is() {
        for (index, mutation) in Mutation::ALL.iter().enumerate() {
            assert_eq!(Mutation::from_name(mutation.name()), Some(*mutation));
            assert_eq!(Mutation::ALL.iter().position(|m| m.name() == mutation.name()), Some(index));
            assert!(mutation.what().ends_with('.'), "{}", mutation.what());
        }
        assert_eq!(Mutation::ALL.len(), 27 + 14);
        assert_eq!(Mutation::from_name("r28"), None);
    }

    /// Whoever runs the tests under a mutation knows that it is on; else none is, in any build.
    #[test]
    fn no_mutation_is_on_unless_one_is_asked_for() {
        let asked = std::env::var("BLKREPL_MUTATION").is_ok_and(|name| !name.is_empty());
        let on = Mutation::ALL.iter().filter(|m| mutated(**m)).count();
        assert_eq!(on, usize::from(asked && cfg!(feature = "mutations")));
    }
}
