//! The bits of one group in memory. Knows nothing of disks.
//!
//! Invariants: a `Mixed` holds at least one set and at least one clear bit, its `count` is the number
//! of set bits, and no bit at or beyond `len` is set. So clear and full groups cost no memory.

use super::layout::{GROUP_BITS, GROUP_WORDS, PAGE_WORDS, PAGES_PER_GROUP};
use super::page::PageWords;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mixed {
    words: [u64; GROUP_WORDS],
    count: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Clear,
    Full,
    Mixed(Box<Mixed>),
}

/// Bits `0..len` of one group; `len` is [`GROUP_BITS`] but in the last group of an area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GroupBits {
    content: Content,
    len: u32,
}

/// The words that bits `start .. start + count` touch, each with a mask of those bits.
fn masks(start: u32, count: u32) -> impl Iterator<Item = (usize, u64)> {
    let end = start + count;
    let words = if count == 0 { 0..0 } else { start / 64..(end - 1) / 64 + 1 };
    words.map(move |word| {
        let low = start.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        (word as usize, (u64::MAX << low) & (u64::MAX >> (64 - high)))
    })
}

impl GroupBits {
    pub(super) fn clear(len: u32) -> Self {
        assert!(len > 0 && len <= GROUP_BITS, "a group of {len} bits");
        Self { content: Content::Clear, len }
    }

    pub(super) fn full(len: u32) -> Self {
        Self { content: Content::Full, ..Self::clear(len) }
    }

    /// A group from what its pages say, a page that says nothing being all-set. Bits beyond `len` are
    /// dropped.
    pub(super) fn from_pages(len: u32, pages: &[Option<PageWords>; PAGES_PER_GROUP]) -> Self {
        let mut words = [0; GROUP_WORDS];
        for (part, page) in words.chunks_exact_mut(PAGE_WORDS).zip(pages) {
            part.copy_from_slice(page.as_ref().unwrap_or(&[u64::MAX; PAGE_WORDS]));
        }
        let mut group = Self::clear(len);
        for (word, mask) in masks(len, GROUP_BITS - len) {
            words[word] &= !mask;
        }
        let count = words.iter().map(|w| w.count_ones()).sum();
        group.content = Content::Mixed(Box::new(Mixed { words, count }));
        group.normalize();
        group
    }

    /// The bits of one page of the group.
    pub(super) fn page(&self, page: usize) -> PageWords {
        match &self.content {
            Content::Clear => [0; PAGE_WORDS],
            Content::Full => {
                let words = self.full_words();
                std::array::from_fn(|i| words[page * PAGE_WORDS + i])
            }
            Content::Mixed(mixed) => std::array::from_fn(|i| mixed.words[page * PAGE_WORDS + i]),
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Number of set bits.
    pub(super) fn count(&self) -> u32 {
        match &self.content {
            Content::Clear => 0,
            Content::Full => self.len,
            Content::Mixed(mixed) => mixed.count,
        }
    }

    pub(super) fn get(&self, bit: u32) -> bool {
        assert!(bit < self.len, "bit {bit} of a group of {}", self.len);
        match &self.content {
            Content::Clear => false,
            Content::Full => true,
            Content::Mixed(mixed) => mixed.words[bit as usize / 64] & (1 << (bit % 64)) != 0,
        }
    }

    /// Sets (or clears) bits `start .. start + count`; returns how many changed.
    pub(super) fn change(&mut self, start: u32, count: u32, to: bool) -> u32 {
        let end = start.checked_add(count).expect("a range of a group is small");
        assert!(end <= self.len, "bits {start}..{end} of a group of {}", self.len);
        let before = self.count();
        if count == 0 || before == if to { self.len } else { 0 } {
            return 0;
        }
        if count == self.len {
            self.content = if to { Content::Full } else { Content::Clear };
        } else {
            let mixed = self.mixed_mut();
            for (word, mask) in masks(start, count) {
                let old = mixed.words[word];
                let new = if to { old | mask } else { old & !mask };
                mixed.words[word] = new;
                mixed.count = mixed.count + new.count_ones() - old.count_ones();
            }
            self.normalize();
        }
        self.count().abs_diff(before)
    }

    /// First bit at or after `from` that is set (or clear).
    pub(super) fn next(&self, from: u32, set: bool) -> Option<u32> {
        if from >= self.len {
            return None;
        }
        let mixed = match &self.content {
            Content::Clear => return (!set).then_some(from),
            Content::Full => return set.then_some(from),
            Content::Mixed(mixed) => mixed,
        };
        let found = masks(from, self.len - from).find_map(|(word, mask)| {
            let bits = if set { mixed.words[word] } else { !mixed.words[word] } & mask;
            (bits != 0).then(|| (word, bits.trailing_zeros()))
        });
        found.map(|(word, bit)| u32::try_from(word).expect("a word of a group") * 64 + bit)
    }

    fn full_words(&self) -> [u64; GROUP_WORDS] {
        let mut words = [0; GROUP_WORDS];
        for (word, mask) in masks(0, self.len) {
            words[word] = mask;
        }
        words
    }

    fn mixed_mut(&mut self) -> &mut Mixed {
        match self.content {
            Content::Clear => {
                self.content = Content::Mixed(Box::new(Mixed { words: [0; GROUP_WORDS], count: 0 }));
            }
            Content::Full => {
                let mixed = Mixed { words: self.full_words(), count: self.len };
                self.content = Content::Mixed(Box::new(mixed));
            }
            Content::Mixed(_) => {}
        }
        match &mut self.content {
            Content::Mixed(mixed) => mixed,
            Content::Clear | Content::Full => unreachable!("made mixed just above"),
        }
    }

    fn normalize(&mut self) {
        if let Content::Mixed(mixed) = &self.content {
            debug_assert_eq!(mixed.count, mixed.words.iter().map(|w| w.count_ones()).sum::<u32>());
            if mixed.count == 0 {
                self.content = Content::Clear;
            } else if mixed.count == self.len {
                self.content = Content::Full;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lengths at which words, pages and groups end, and any.
    fn lens() -> impl Strategy<Value = u32> {
        prop_oneof![
            prop::sample::select(vec![1, 63, 64, 65, 3840, GROUP_BITS - 1, GROUP_BITS]),
            1..GROUP_BITS
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// The model is a vector of flags. It also says which form a group has: that of all clear and of all set
        /// is not the mixed one, however it was reached.
        #[test]
        fn behaves_like_a_vector_of_flags(
            len in lens(),
            steps in prop::collection::vec((0u32..1000, prop_oneof![Just(0), 0u32..1001], any::<bool>()), 1..20),
            from in 0u32..1001,
        ) {
            let at = |part: u32| part * (len / 1000) + part * (len % 1000) / 1000;
            let mut group = GroupBits::clear(len);
            let mut model = vec![false; len as usize];
            for (start, count, to) in steps {
                let start = at(start).min(len - 1);
                let count = at(count).min(len - start);
                let range = &mut model[start as usize..(start + count) as usize];
                let changed = range.iter().filter(|bit| **bit != to).count();
                range.fill(to);
                prop_assert_eq!(group.change(start, count, to) as usize, changed);
                prop_assert_eq!(group.count() as usize, model.iter().filter(|bit| **bit).count());
                prop_assert_eq!(group == GroupBits::clear(len), !model.contains(&true));
                prop_assert_eq!(group == GroupBits::full(len), !model.contains(&false));
            }
            let seen: Vec<bool> = (0..len).map(|bit| group.get(bit)).collect();
            prop_assert_eq!(&seen, &model);
            // In two pieces, whatever it holds.
            let cut = at(from).min(len);
            for (to, expected) in [(true, GroupBits::full(len)), (false, GroupBits::clear(len))] {
                let mut whole = group.clone();
                whole.change(0, cut, to);
                whole.change(cut, len - cut, to);
                prop_assert_eq!(whole, expected, "cut at {}", cut);
            }
            let from = at(from);
            for set in [true, false] {
                let rest = model.iter().enumerate().skip(from as usize);
                let found = rest.filter(|(_, bit)| **bit == set).map(|(bit, _)| bit).next();
                prop_assert_eq!(group.next(from, set).map(|bit| bit as usize), found, "from {}", from);
            }
        }

        /// What the pages say is what comes back; a page that says nothing is all-set, and nothing beyond the
        /// end counts, whatever the pages hold there.
        #[test]
        fn a_group_is_what_its_pages_say(
            len in lens(),
            pages in prop::collection::vec(prop::option::of(any::<(u64, u64)>()), PAGES_PER_GROUP),
        ) {
            let words = |(a, b): (u64, u64)| -> PageWords {
                std::array::from_fn(|i| if i % 3 == 0 { a } else { b.rotate_left(u32::try_from(i).unwrap()) })
            };
            let pages: [Option<PageWords>; PAGES_PER_GROUP] = std::array::from_fn(|i| pages[i].map(words));
            let group = GroupBits::from_pages(len, &pages);
            let bit_of = |bit: usize| {
                let (page, bit) = (bit / (PAGE_WORDS * 64), bit % (PAGE_WORDS * 64));
                pages[page].is_none_or(|words| words[bit / 64] >> (bit % 64) & 1 == 1)
            };
            let model: Vec<bool> = (0..len as usize).map(bit_of).collect();
            let seen: Vec<bool> = (0..len).map(|bit| group.get(bit)).collect();
            prop_assert_eq!(&seen, &model);
            prop_assert_eq!(group.count() as usize, model.iter().filter(|bit| **bit).count());
            let again: [Option<PageWords>; PAGES_PER_GROUP] = std::array::from_fn(|i| Some(group.page(i)));
            prop_assert_eq!(GroupBits::from_pages(len, &again), group);
            let set: u32 = again.iter().flatten().flatten().map(|word| word.count_ones()).sum();
            prop_assert_eq!(set as usize, model.iter().filter(|bit| **bit).count(), "bits beyond the end");
        }
    }

    #[test]
    fn masks_cover_exactly_the_range() {
        for (start, count) in [(0, 0), (0, 1), (63, 1), (63, 2), (0, 64), (1, 64), (5, 200), (64, 64)] {
            let mut seen = Vec::new();
            for (word, mask) in masks(start, count) {
                seen.extend((0..64).filter(|b| mask & (1 << b) != 0).map(|b| word * 64 + b));
            }
            let want: Vec<_> = (start as usize..(start + count) as usize).collect();
            assert_eq!(seen, want, "{start}+{count}");
        }
    }

    #[test]
    fn clear_and_full_are_reached_again_whatever_the_way() {
        for len in [1, 63, 64, 65, 3840, GROUP_BITS - 1, GROUP_BITS] {
            let mut group = GroupBits::clear(len);
            for bit in (0..len).rev() {
                assert_eq!(group.change(bit, 1, true), 1);
            }
            assert_eq!(group, GroupBits::full(len));
            for bit in 0..len {
                assert_eq!(group.change(bit, 1, false), 1);
            }
            assert_eq!(group, GroupBits::clear(len));
        }
    }

    #[test]
    fn bits_beyond_the_end_never_appear() {
        let group = GroupBits::from_pages(100, &[None; PAGES_PER_GROUP]);
        assert_eq!(group, GroupBits::full(100));
        assert_eq!(group.page(0)[1], (1 << 36) - 1);
        assert_eq!(group.page(1), [0; PAGE_WORDS]);
        assert_eq!(group.next(100, true), None);
        assert_eq!(group.next(0, false), None);
    }
}
