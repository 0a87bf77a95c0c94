//! Metadata contexts: what `NBD_CMD_BLOCK_STATUS` can tell of a range, and how a client chooses among them.
//!
//! Plain data, the data of the two options that choose, and the descriptors of a reply. Nothing here knows a
//! connection, or whether an export may be served. However many queries a client sends, they are looked at one
//! after the other and none is kept.

use blkrepl_engine::types::Extent;

use crate::proto;

/// A metadata context that this server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaContext {
    /// `base:allocation`: holes, which take no space and read as zeroes.
    Allocation,
    /// `blkrepl:dirty`: what a replica that is missing, or not yet complete, lacks.
    Dirty,
}

impl MetaContext {
    /// All of them, in the order of their chunks in a reply.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Dirty];

    /// Its name: namespace, colon, leaf-name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Dirty => "blkrepl:dirty",
        }
    }

    /// Its number in the replies to a client that chose it; not 0.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Dirty => 2,
        }
    }

    /// The status flags of an extent.
    #[must_use]
    pub fn state(self, extent: &Extent) -> u32 {
        match self {
            Self::Allocation if extent.hole => proto::NBD_STATE_HOLE | proto::NBD_STATE_ZERO,
            Self::Dirty if extent.dirty => proto::BLKREPL_STATE_DIRTY,
            Self::Allocation | Self::Dirty => 0,
        }
    }

    /// A query to list contexts names it: by its name, or by its namespace with no leaf-name.
    fn is_listed_by(self, query: &str) -> bool {
        let namespace = self.name().find(':').map_or("", |colon| &self.name()[..=colon]);
        query == self.name() || query == namespace
    }
}

/// A set of metadata contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts(u8);

impl Contexts {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// Every one.
    #[must_use]
    pub fn all() -> Self {
        MetaContext::ALL.into_iter().collect()
    }

    /// Puts one in; it may be there already.
    pub fn insert(&mut self, context: MetaContext) {
        self.0 |= Self::bit(context);
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that are there, in the order of [`MetaContext::ALL`].
    pub fn iter(self) -> impl DoubleEndedIterator<Item = MetaContext> {
        MetaContext::ALL.into_iter().filter(move |context| self.0 & Self::bit(*context) != 0)
    }

    fn bit(context: MetaContext) -> u8 {
        1 << (context as u8)
    }
}

impl FromIterator<MetaContext> for Contexts {
    fn from_iter<I: IntoIterator<Item = MetaContext>>(contexts: I) -> Self {
        let mut set = Self::NONE;
        contexts.into_iter().for_each(|context| set.insert(context));
        set
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest<'a> {
    /// The export.
    pub(crate) name: &'a str,
    /// What the queries list: no query at all lists everything.
    pub(crate) listed: Contexts,
    /// What the queries select: only whole names do, and no query selects nothing.
    pub(crate) selected: Contexts,
}

impl<'a> MetaRequest<'a> {
    /// `None` if the lengths contradict each other, or the name or a query is not a string. Queries that name
    /// nothing that is known here are passed over, as the specification wants it.
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let (name, rest) = split_string(data)?;
        let (count, mut rest) = rest.split_first_chunk::<4>()?;
        let count = u32::from_be_bytes(*count);
        let mut request = Self { name, listed: Contexts::NONE, selected: Contexts::NONE };
        for _ in 0..count {
            let query;
            (query, rest) = split_string(rest)?;
            for context in MetaContext::ALL {
                if context.is_listed_by(query) {
                    request.listed.insert(context);
                }
                if query == context.name() {
                    request.selected.insert(context);
                }
            }
        }
        if count == 0 {
            request.listed = Contexts::all();
        }
        rest.is_empty().then_some(request)
    }
}

/// Takes a string with its length before it off the front.
fn split_string(data: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*len)).ok()?)?;
    Some((proto::parse_string(text)?, rest))
}

/// The descriptors of one context: bytes and status flags, neighbours of one state merged. As many as lie within
/// the request, or up to the first that has more bytes than a descriptor can say; that one is cut and the last.
/// There is at least one where there is an extent and the request has a length.
#[derive(Clone, Debug)]
pub(crate) struct Descriptors<'a> {
    context: MetaContext,
    extents: &'a [Extent],
    left: u64,
    longest: u64,
}

impl<'a> Descriptors<'a> {
    /// Descriptors of `extents`, together at most `len` bytes, each at most `longest`.
    pub(crate) fn new(context: MetaContext, extents: &'a [Extent], len: u64, longest: u64) -> Self {
        Self { context, extents, left: len, longest }
    }
}

impl Iterator for Descriptors<'_> {
    type Item = (u64, u32);

    fn next(&mut self) -> Option<(u64, u32)> {
        let state = self.context.state(self.extents.first()?);
        let same = self.extents.iter().take_while(|extent| self.context.state(extent) == state).count();
        let (merged, rest) = self.extents.split_at(same);
        let len = merged.iter().fold(0_u64, |len, extent| len.saturating_add(extent.len)).min(self.left);
        if len > self.longest {
            (self.extents, self.left) = (&[], 0);
            return Some((self.longest, state));
        }
        self.extents = rest;
        self.left -= len;
        (len > 0).then_some((len, state))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(len: u64, hole: bool, dirty: bool) -> Extent {
        Extent { len, hole, dirty }
    }

    fn said(context: MetaContext, extents: &[Extent], len: u64, longest: u64) -> Vec<(u64, u32)> {
        Descriptors::new(context, extents, len, longest).collect()
    }

    #[test]
    fn names_have_a_namespace_and_numbers_are_unique_and_not_0() {
        for context in MetaContext::ALL {
            let (namespace, leaf) = context.name().split_once(':').unwrap();
            assert!(!namespace.is_empty() && !leaf.is_empty() && !leaf.contains(':'));
            assert_ne!(context.id(), 0);
            assert_eq!(MetaContext::ALL.into_iter().filter(|other| other.id() == context.id()).count(), 1);
        }
    }

    #[test]
    fn neighbours_of_one_state_are_merged_for_each_context_alone() {
        let extents = [extent(10, false, false), extent(20, false, true), extent(30, true, true)];
        assert_eq!(said(MetaContext::Allocation, &extents, 60, u64::MAX), [(30, 0), (30, 3)]);
        assert_eq!(said(MetaContext::Dirty, &extents, 60, u64::MAX), [(10, 0), (50, 1)]);
    }

    #[test]
    fn descriptors_end_with_the_request_and_at_one_that_is_cut() {
        let extents = [extent(10, false, false), extent(20, true, false), extent(30, false, false)];
        assert_eq!(said(MetaContext::Allocation, &extents, 15, u64::MAX), [(10, 0), (5, 3)]);
        assert_eq!(said(MetaContext::Allocation, &extents, 10, u64::MAX), [(10, 0)]);
        assert_eq!(said(MetaContext::Allocation, &extents, 60, 20), [(10, 0), (20, 3), (20, 0)]);
        assert_eq!(said(MetaContext::Allocation, &extents, 60, 16), [(10, 0), (16, 3)]);
        let endless = [extent(u64::MAX, false, false), extent(u64::MAX, false, false)];
        assert_eq!(said(MetaContext::Dirty, &endless, u64::MAX, u64::MAX), [(u64::MAX, 0)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The model says the state of each byte alone.
        #[test]
        fn descriptors_say_of_each_byte_what_its_extent_says(
            extents in prop::collection::vec((1u64..50, any::<bool>(), any::<bool>()), 1..20),
            len in 1u64..600, longest in 1u64..80,
        ) {
            let extents: Vec<Extent> = extents.into_iter().map(|(len, hole, dirty)| extent(len, hole, dirty)).collect();
            for context in MetaContext::ALL {
                let bytes = |list: &[(u64, u32)]| -> Vec<u32> {
                    list.iter().flat_map(|(len, state)| std::iter::repeat_n(*state, *len as usize)).collect()
                };
                let truth: Vec<(u64, u32)> = extents.iter().map(|e| (e.len, context.state(e))).collect();
                let truth: Vec<u32> = bytes(&truth).into_iter().take(len as usize).collect();
                let list = said(context, &extents, len, longest);
                let described = bytes(&list);
                prop_assert!(!list.is_empty() && list.iter().all(|(len, _)| (1..=longest).contains(len)));
                prop_assert!(list.windows(2).all(|pair| pair[0].1 != pair[1].1), "{list:?}");
                prop_assert_eq!(&truth[..described.len()], &described[..]);
                let cut = list.last().is_some_and(|(len, _)| *len == longest);
                prop_assert!(cut || described.len() == truth.len(), "it ends early only where it is cut");
            }
        }
    }
}
