//! A map whose keys are given out in rising order, such as the numbers of requests in flight.
//!
//! Invariants:
//! - a key is inserted at most once, after every smaller one; iteration is in the order of keys;
//! - inserting, finding and removing cost the same however much is in flight, and allocate nothing once the
//!   map has held as much before.
//!
//! Values stand in a ring in the order of their keys. What stays behind while many later ones come and go
//! (a request that a disk does not give back) moves to a tree of stragglers, so that the ring is never much
//! longer than what it holds.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Index, RangeTo};

/// A number that is counted up and never given out twice.
pub(crate) trait Rising: Copy + Ord {
    /// The number itself.
    fn number(self) -> u64;
    /// The key with this number.
    fn of(number: u64) -> Self;
}

/// Makes a number in a newtype a key.
macro_rules! rising {
    ($key:ty) => {
        impl crate::rising_map::Rising for $key {
            fn number(self) -> u64 {
                self.0
            }

            fn of(number: u64) -> Self {
                Self(number)
            }
        }
    };
}
pub(crate) use rising;

/// Empty places that a ring may have before its oldest value counts as a straggler.
const GAPS_MIN: usize = 64;
/// The same for a fuller ring: places per value in it.
const PLACES_PER_VALUE: usize = 4;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct RisingMap<K, V> {
    /// Smaller than every key in the ring.
    stragglers: BTreeMap<K, V>,
    ring: VecDeque<Option<V>>,
    /// Number of the key that stands first in the ring.
    base: u64,
    /// Values in the ring.
    live: usize,
}

impl<K, V> Default for RisingMap<K, V> {
    fn default() -> Self {
        Self { stragglers: BTreeMap::new(), ring: VecDeque::new(), base: 0, live: 0 }
    }
}

impl<K: Rising, V> RisingMap<K, V> {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn len(&self) -> usize {
        self.stragglers.len() + self.live
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.live == 0 && self.stragglers.is_empty()
    }

    /// Adds a value under a key greater than every one before it.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        let end = self.base + self.ring.len() as u64;
        let gap = key.number().checked_sub(end).expect("keys are given out in rising order");
        if gap > GAPS_MIN as u64 {
            self.set_aside_all();
            self.base = key.number();
        } else {
            self.ring.extend((0..gap).map(|_| None));
        }
        self.ring.push_back(Some(value));
        self.live += 1;
        while self.ring.len() > GAPS_MIN + PLACES_PER_VALUE * self.live {
            self.set_aside_first();
        }
    }

    fn place(&self, key: K) -> Option<usize> {
        let place = usize::try_from(key.number().checked_sub(self.base)?).ok()?;
        (place < self.ring.len()).then_some(place)
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        match self.place(*key) {
            Some(place) => self.ring[place].as_ref(),
            None => self.stragglers.get(key),
        }
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        match self.place(*key) {
            Some(place) => self.ring[place].as_mut(),
            None => self.stragglers.get_mut(key),
        }
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let Some(place) = self.place(*key) else { return self.stragglers.remove(key) };
        let value = self.ring[place].take()?;
        self.live -= 1;
        while let Some(None) = self.ring.front() {
            self.ring.pop_front();
            self.base += 1;
        }
        Some(value)
    }

    /// All entries, smallest key first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        let base = self.base;
        let in_ring = self.ring.iter().enumerate();
        let in_ring = in_ring.filter_map(move |(n, v)| Some((K::of(base + n as u64), v.as_ref()?)));
        self.stragglers.iter().map(|(key, value)| (*key, value)).chain(in_ring)
    }

    /// As [`Self::iter`], to change the values.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (K, &mut V)> {
        let base = self.base;
        let in_ring = self.ring.iter_mut().enumerate();
        let in_ring = in_ring.filter_map(move |(n, v)| Some((K::of(base + n as u64), v.as_mut()?)));
        self.stragglers.iter_mut().map(|(key, value)| (*key, value)).chain(in_ring)
    }

    /// Entries with smaller keys than `range` ends with, smallest first.
    pub(crate) fn range(&self, range: RangeTo<K>) -> impl Iterator<Item = (K, &V)> {
        self.iter().take_while(move |(key, _)| *key < range.end)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = K> {
        self.iter().map(|(key, _)| key)
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.stragglers.values().chain(self.ring.iter().flatten())
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.stragglers.values_mut().chain(self.ring.iter_mut().flatten())
    }

    /// All values, smallest key first.
    pub(crate) fn into_values(self) -> impl Iterator<Item = V> {
        self.stragglers.into_values().chain(self.ring.into_iter().flatten())
    }

    fn set_aside_first(&mut self) {
        if let Some(Some(value)) = self.ring.pop_front() {
            self.stragglers.insert(K::of(self.base), value);
            self.live -= 1;
        }
        self.base += 1;
    }

    fn set_aside_all(&mut self) {
        while !self.ring.is_empty() {
            self.set_aside_first();
        }
    }
}

impl<K: Rising, V> Index<&K> for RisingMap<K, V> {
    type Output = V;

    fn index(&self, key: &K) -> &V {
        self.get(key).expect("the key is in the map")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Rising for u64 {
        fn number(self) -> u64 {
            self
        }

        fn of(number: u64) -> Self {
            number
        }
    }

    #[test]
    fn a_straggler_does_not_make_the_ring_grow() {
        let mut map = RisingMap::new();
        map.insert(1_u64, 'a');
        for key in 2..100_000 {
            map.insert(key, 'b');
            assert_eq!(map.remove(&key), Some('b'));
            assert!(map.ring.len() <= GAPS_MIN + 2 * PLACES_PER_VALUE);
        }
        assert_eq!((map.len(), map[&1]), (1, 'a'));
        assert_eq!(map.remove(&1), Some('a'));
        assert!(map.is_empty());
    }

    #[test]
    #[should_panic(expected = "rising order")]
    fn a_key_that_comes_too_late_is_a_broken_invariant() {
        let mut map = RisingMap::new();
        map.insert(5_u64, ());
        map.insert(4, ());
    }

    proptest! {
        #[test]
        fn it_does_what_an_ordered_map_does(
            steps in prop::collection::vec((0u64..4, 0u64..200, any::<prop::sample::Index>()), 1..400)
        ) {
            let (mut map, mut model) = (RisingMap::new(), BTreeMap::new());
            let mut next = 0_u64;
            for (step, gap, which) in steps {
                if step < 2 {
                    // Small gaps as a rule, now and then one that is longer than any ring has places.
                    next += 1 + if gap > 190 { gap } else { gap % 3 };
                    map.insert(next, next);
                    model.insert(next, next);
                } else if !model.is_empty() {
                    let key = *which.get(&model.keys().copied().collect::<Vec<_>>());
                    prop_assert_eq!(map.remove(&key), model.remove(&key));
                    prop_assert_eq!(map.remove(&key), None);
                }
                prop_assert_eq!(map.len(), model.len());
                prop_assert_eq!(map.is_empty(), model.is_empty());
                let (mine, theirs): (Vec<_>, Vec<_>) =
                    (map.iter().collect(), model.iter().map(|(k, v)| (*k, v)).collect());
                prop_assert_eq!(mine, theirs);
                let middle = next / 2;
                prop_assert!(map.range(..middle).map(|(k, _)| k).eq(model.range(..middle).map(|(k, _)| *k)));
                prop_assert!(map.get(&(next + 1)).is_none() && map.get(&next) == model.get(&next));
                prop_assert!(map.keys().eq(model.keys().copied()) && map.values().eq(model.values()));
            }
            prop_assert!(map.into_values().eq(model.into_values()));
        }
    }
}
