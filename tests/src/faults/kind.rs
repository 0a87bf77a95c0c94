//! The kinds of faults, and which of them a round draws.

use std::collections::BTreeMap;

use super::arena::Arena;
use crate::bits::Random;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIGKILL of a node.
    Kill,
    /// SIGKILL of all nodes at once.
    KillAll,
    /// SIGSTOP of a node.
    Pause,
    /// `move` to some node, asked of some node.
    Move,
    /// `promote` on some node.
    Promote,
    /// `demote`.
    Demote,
    /// A link carries nothing.
    LinkSilent,
    /// A link carries nothing one way.
    LinkOneWay,
    /// One end of a link's connections is reset, the other hears nothing.
    LinkHalfOpen,
    /// A link is late.
    LinkDelay,
    /// A link is slow.
    LinkThrottle,
    /// A bit of a message is flipped.
    LinkCorrupt,
    /// A message stops in its middle.
    LinkTruncate,
    /// A link's connections are reset.
    LinkReset,
    /// New connections of a link are reset.
    LinkRefuse,
    /// All links of a node carry nothing.
    LinkIsolate,
    /// A host's cable is pulled.
    CableCut,
    /// A host reaches another no more, which still reaches it.
    CableOneWay,
    /// Two hosts do not see each other, all others see both.
    CablePair,
    /// Reads of a disk fail.
    DiskReads,
    /// Writes fail.
    DiskWrites,
    /// Flushes fail.
    DiskFlushes,
    /// A disk has no room.
    DiskFull,
    /// A disk is slow.
    DiskSlow,
    /// A disk answers nothing.
    DiskHung,
    /// A file system has no room.
    RoomFull,
}

impl Kind {
    const PROCESS: [(Self, u64); 6] = [
        (Self::Kill, 6),
        (Self::KillAll, 1),
        (Self::Pause, 4),
        (Self::Move, 3),
        (Self::Promote, 2),
        (Self::Demote, 1),
    ];
    const LINK: [(Self, u64); 10] = [
        (Self::LinkSilent, 4),
        (Self::LinkOneWay, 4),
        (Self::LinkHalfOpen, 3),
        (Self::LinkDelay, 2),
        (Self::LinkThrottle, 2),
        (Self::LinkCorrupt, 4),
        (Self::LinkTruncate, 3),
        (Self::LinkReset, 4),
        (Self::LinkRefuse, 2),
        (Self::LinkIsolate, 3),
    ];
    const CABLE: [(Self, u64); 3] = [(Self::CableCut, 5), (Self::CableOneWay, 4), (Self::CablePair, 4)];
    /// Often drawn: they wait for both replicas to be well, which the others prevent.
    const DISK: [(Self, u64); 7] = [
        (Self::DiskReads, 15),
        (Self::DiskWrites, 15),
        (Self::DiskFlushes, 15),
        (Self::DiskFull, 10),
        (Self::DiskSlow, 10),
        (Self::DiskHung, 10),
        (Self::RoomFull, 20),
    ];

    /// True for those that make a data object fail.
    #[must_use]
    pub fn is_of_disk(self) -> bool {
        Self::DISK.iter().any(|(kind, _)| *kind == self)
    }
}

/// How often each kind is drawn in a round.
#[derive(Clone, Debug, Default)]
pub struct Weights(BTreeMap<Kind, u64>);

impl Weights {
    /// For one round in that arena: each kind is left out in a third of the rounds, and often a few kinds
    /// are all there is, so that rare combinations come up, too.
    #[must_use]
    pub fn draw(arena: &Arena, random: &mut Random) -> Self {
        let mut all = Kind::PROCESS.to_vec();
        if !arena.links.is_empty() {
            all.extend(Kind::LINK);
        }
        if arena.bridge.is_some() {
            all.extend(Kind::CABLE);
        }
        if !arena.devices.is_empty() {
            all.extend(Kind::DISK);
        }
        let sparse = random.chance(1, 4);
        let mut weights = BTreeMap::new();
        while weights.is_empty() {
            let odds = if sparse { 1 } else { 4 };
            weights = all.iter().filter(|_| random.chance(odds, 6)).copied().collect();
        }
        Self(weights)
    }

    /// One of them.
    #[must_use]
    pub fn pick(&self, random: &mut Random) -> Kind {
        let total: u64 = self.0.values().sum();
        let mut at = random.below(total.max(1));
        for (kind, weight) in &self.0 {
            if at < *weight {
                return *kind;
            }
            at -= weight;
        }
        Kind::Kill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_arena_has_is_drawn() {
        let mut random = Random::new(5);
        for _ in 0..200 {
            let weights = Weights::draw(&Arena::default(), &mut random);
            let kind = weights.pick(&mut random);
            assert!(Kind::PROCESS.iter().any(|(known, _)| *known == kind), "{kind:?}");
        }
    }
}
