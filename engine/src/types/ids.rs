//! Newtypes for every id and number with a unit. They are ordered, hashable and serializable, and
//! carry no behaviour beyond what their meaning allows.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::mutation::{Mutation, mutated};

/// Most replicas that one volume can have. A [`SlotSet`] is one byte because of it.
pub const REPLICAS_MAX: usize = 8;

/// A node of the cluster. Chosen by the operator, 1 or more, never reused after its disk was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// One run of a node's process: a boot counter, made durable before the first message, and a random
/// number. Ordered by the counter; two incarnations with one counter and different random parts come
/// from two different stores and are never both valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation {
    /// Counts the starts of this node's process, from 1.
    pub boot: u64,
    /// Random per run.
    pub nonce: u64,
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:08x}", self.boot, self.nonce >> 32)
    }
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:032x})"), self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            /// Reads 32 hexadecimal digits; dashes are ignored.
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(&text.replace('-', ""), 16).map(Self)
            }
        }
    };
}

id128! {
    /// A cluster. A forced recovery makes a new one.
    ClusterId
}
id128! {
    /// A volume; its name may be reused, its id never.
    VolumeId
}
id128! {
    /// A history of a volume's content. Only a forced promotion (or a recovery) starts a new one.
    LineageId
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// Counts the committed changes of one volume's config. Starts at 1.
    Epoch
}
number! {
    /// The epoch at which the current primary took over. It fences the data path.
    Reign
}
number! {
    /// Position in the Raft log.
    LogIndex
}

impl Incarnation {
    /// The run that begins with the `boot`-th start of a node's store, which is counted durably before:
    /// newer than every run before it, and no other one [R2].
    #[must_use]
    pub fn of_start(boot: u64, nonce: u64) -> Self {
        if mutated(Mutation::ReuseIncarnation) {
            return Self { boot: 1, nonce: 1 };
        }
        Self { boot, nonce }
    }
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A point in time: nanoseconds on CLOCK_BOOTTIME (virtual nanoseconds in a simulator). Comparable
/// only within one run of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Nanos(pub u64);

impl Nanos {
    /// This time plus `d`, saturating.
    #[must_use]
    pub fn after(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// This time less `d`, saturating.
    #[must_use]
    pub fn before(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is before.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A replica's place in its volume, 0 to 7. Given out once per volume and never reused, so that a
/// [`SlotSet`] means the same under every config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ReplicaSlot(pub u8);

/// A set of replica slots in one byte; travels with every replicated write to say who is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct SlotSet(pub u8);

impl SlotSet {
    /// True if `slot` is in the set.
    #[must_use]
    pub fn contains(self, slot: ReplicaSlot) -> bool {
        self.0 & (1 << slot.0) != 0
    }

    /// Adds `slot`.
    pub fn insert(&mut self, slot: ReplicaSlot) {
        assert!(usize::from(slot.0) < REPLICAS_MAX, "replica slot {} out of range", slot.0);
        self.0 |= 1 << slot.0;
    }

    /// The slots that are in either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The slots in the set, ascending.
    pub fn iter(self) -> impl Iterator<Item = ReplicaSlot> {
        (0..8u8).map(ReplicaSlot).filter(move |slot| self.contains(*slot))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_is_read_as_it_is_shown(id in any::<u128>(), dashes in prop::collection::vec(0usize..33, 0..6)) {
            let shown = LineageId(id).to_string();
            prop_assert_eq!(shown.len(), 32);
            let mut written = shown.to_uppercase();
            for at in dashes {
                written.insert(at.min(written.len()), '-');
            }
            prop_assert_eq!(shown.parse(), Ok(LineageId(id)));
            prop_assert_eq!(written.parse(), Ok(LineageId(id)));
            let longer = format!("{shown}0").parse::<LineageId>();
            prop_assert!(longer.is_err() || id >> 124 == 0);
        }

        #[test]
        fn a_slot_set_is_a_set(slots in prop::collection::vec(0u8..8, 0..12)) {
            let (mut set, mut model) = (SlotSet::default(), BTreeSet::new());
            for slot in slots {
                set.insert(ReplicaSlot(slot));
                model.insert(ReplicaSlot(slot));
                prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), model.clone());
                prop_assert!(set.iter().is_sorted());
                prop_assert!((0..8).map(ReplicaSlot).all(|s| set.contains(s) == model.contains(&s)));
            }
        }

        /// Times neither wrap nor run backwards.
        #[test]
        fn times_saturate(at in any::<u64>(), by in any::<u64>()) {
            let later = Nanos(at).after(Duration::from_nanos(by));
            prop_assert_eq!(u128::from(later.0), (u128::from(at) + u128::from(by)).min(u128::from(u64::MAX)));
            prop_assert_eq!(later.since(Nanos(at)), Duration::from_nanos(later.0 - at));
            prop_assert_eq!(Nanos(at).since(later), Duration::ZERO);
        }
    }
}
