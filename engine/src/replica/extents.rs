//! Which parts of a range are holes, and which a missing replica lacks: what a client's request for the block
//! status is answered.
//!
//! A hole is said to read as zeroes, so it is an answer like that of a read, under the same conditions [R26].
//! It takes no range lock, which over a range of a GiB would hold up every write: instead, what a write in
//! flight touches when the disk has answered is called data. So nobody is told of zeroes that could still
//! vanish [R8], and whatever ended before is committed.
//!
//! An answer may end before the range does, as the protocol allows, but never covers nothing. Whatever is not
//! known to be a hole is data.

use crate::types::{BlockRange, Extent};

use super::Replica;
use super::disk::Purpose;
use super::io::{ClientOp, DiskErrorKind, DiskOp, DiskResult, ReplyData, Stretch};
use super::primary::{OpId, Primary, Stage};
use crate::meta::PagedBitmap;

/// Most extents of one answer.
pub const EXTENTS_MAX: usize = 256;
/// Most bytes that one answer covers, so that a file of many holes is not searched for ones that are not told.
const EXTENTS_BYTES_MAX: u64 = 1 << 30;
/// Most changes of state that one answer looks at.
const STEPS_MAX: usize = 4 * EXTENTS_MAX;

impl Replica {
    pub(super) fn begin_extents(&mut self, id: OpId) {
        let most = EXTENTS_BYTES_MAX / u64::from(self.geometry.block_size());
        let Some(primary) = &mut self.primary else { return };
        let op = primary.ops.get_mut(&id).expect("a started request exists");
        let max = wanted(&op.request.op);
        op.stage = Stage::Read;
        op.blocks.count = op.blocks.count.min(most);
        let blocks = op.blocks;
        self.put_disk(DiskOp::Extents { blocks, max }, Purpose::Extents(id), None);
    }

    pub(super) fn extents_done(&mut self, id: OpId, result: Result<DiskResult, DiskErrorKind>) {
        let Some(primary) = &self.primary else { return };
        let Some(op) = primary.ops.get(&id) else { return };
        let max = wanted(&op.request.op);
        let blocks = op.blocks;
        let found = match result {
            Ok(DiskResult::Extents(found)) => found,
            // Where the holes are is not known: there are none.
            Err(_) => vec![Stretch { count: blocks.count, hole: false }],
            Ok(other) => panic!("a search for holes completed with {other:?}"),
        };
        let missing = self.missing_slots();
        let lacking: Vec<&PagedBitmap> = (self.store.slots().into_iter())
            .filter(|slot| missing.contains(*slot))
            .filter_map(|slot| self.store.dirty(slot))
            .collect();
        let states = States { blocks, found: &found, busy: &busy(primary, blocks), lacking: &lacking, max };
        let (offset, len) = (op.request.offset, op.request.len);
        let extents = cut(states.extents(), u64::from(self.geometry.block_size()), offset, len);
        self.finish(id, Ok(ReplyData::Extents(extents)));
    }
}

/// Most extents of the answer to a request.
fn wanted(op: &ClientOp) -> usize {
    let ClientOp::Extents { max } = op else { panic!("{op:?} is no request for extents") };
    (*max).clamp(1, EXTENTS_MAX)
}

/// What the writes in flight touch of `blocks`, in order. It may overlap.
fn busy(primary: &Primary, blocks: BlockRange) -> Vec<BlockRange> {
    let writes = |op: &ClientOp| matches!(op, ClientOp::Write(_) | ClientOp::Zero);
    let started = primary.ops.values().filter(|op| writes(&op.request.op) || op.repair.is_some());
    let mut busy: Vec<_> = started.map(|op| op.blocks).filter(|b| b.overlaps(&blocks)).collect();
    busy.sort_unstable_by_key(|b| b.start);
    busy
}

/// Blocks of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    count: u64,
    hole: bool,
    dirty: bool,
}

/// What is known of a range.
struct States<'a> {
    blocks: BlockRange,
    /// From its start on.
    found: &'a [Stretch],
    /// What is written to.
    busy: &'a [BlockRange],
    /// What each missing replica lacks.
    lacking: &'a [&'a PagedBitmap],
    /// Most pieces.
    max: usize,
}

impl States<'_> {
    /// The range in pieces that each have one state and differ from the next, as far as limits let it.
    fn extents(&self) -> Vec<Piece> {
        let mut out: Vec<Piece> = Vec::new();
        let (mut at, mut found) = (self.blocks.start.0, self.found.iter());
        let mut stretch_end = at;
        let mut hole = false;
        let mut busy = 0;
        for _ in 0..STEPS_MAX {
            while stretch_end == at {
                let Some(next) = found.next() else { return out };
                stretch_end += next.count;
                hole = next.hole;
            }
            let written = self.busy_at(at, &mut busy);
            let lacking = self.lacking_at(at);
            let end = stretch_end.min(written.until).min(lacking.until).min(self.blocks.end());
            let piece = Piece { count: end - at, hole: hole && !written.yes, dirty: lacking.yes };
            let full = out.len() == self.max;
            match out.last_mut() {
                Some(last) if (last.hole, last.dirty) == (piece.hole, piece.dirty) => {
                    last.count += piece.count;
                }
                _ if full => return out,
                _ => out.push(piece),
            }
            at = end;
            if at == self.blocks.end() {
                return out;
            }
        }
        out
    }

    /// Whether a block is written to. `from`: the ranges before this one are over.
    fn busy_at(&self, at: u64, from: &mut usize) -> Until {
        while self.busy.get(*from).is_some_and(|range| range.end() <= at) {
            *from += 1;
        }
        let rest = self.busy[*from..].iter();
        let over = rest.clone().take_while(|range| range.start.0 <= at).map(BlockRange::end).max();
        match over.filter(|end| *end > at) {
            Some(end) => Until { yes: true, until: end },
            None => {
                Until { yes: false, until: rest.map(|r| r.start.0).find(|s| *s > at).unwrap_or(u64::MAX) }
            }
        }
    }

    /// Whether a missing replica lacks a block.
    fn lacking_at(&self, at: u64) -> Until {
        let yes = self.lacking.iter().any(|bitmap| bitmap.get(at));
        let ends = self.lacking.iter().filter_map(|bitmap| match (yes, bitmap.get(at)) {
            (true, false) => None,
            (true, true) => Some(bitmap.next_clear(at).unwrap_or(u64::MAX)),
            (false, _) => Some(bitmap.next_set(at).unwrap_or(u64::MAX)),
        });
        let until = if yes { ends.max() } else { ends.min() };
        Until { yes, until: until.unwrap_or(u64::MAX) }
    }
}

/// A state, and the block before which it does not change.
struct Until {
    yes: bool,
    until: u64,
}

/// Pieces that begin with the block of byte `offset`, as extents of the `len` bytes from there.
fn cut(pieces: Vec<Piece>, block_size: u64, offset: u64, len: u64) -> Vec<Extent> {
    let (mut skip, mut left) = (offset % block_size, len);
    let mut out = Vec::with_capacity(pieces.len());
    for Piece { count, hole, dirty } in pieces {
        let len = (count * block_size - skip).min(left);
        skip = 0;
        left -= len;
        out.push(Extent { len, hole, dirty });
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::meta::{Area, Layout};
    use crate::types::{Geometry, ReplicaSlot, VolumeId};

    proptest! {
        /// The model asks each block for itself.
        #[test]
        fn extents_say_of_each_block_what_is_known_of_it(
            start in 0u64..40,
            found in prop::collection::vec((1u64..20, any::<bool>()), 1..20),
            busy in prop::collection::vec((0u64..200, 1u64..10), 0..12),
            sets in prop::collection::vec(prop::collection::vec((0u64..200, 1u64..30), 0..6), 0..3),
        ) {
            let found: Vec<_> = found.into_iter().map(|(count, hole)| Stretch { count, hole }).collect();
            let count: u64 = found.iter().map(|s| s.count).sum();
            let blocks = BlockRange::between(start, start + count);
            let mut busy: Vec<_> = busy.into_iter().map(|(s, n)| BlockRange::between(s, s + n)).collect();
            busy.sort_unstable_by_key(|b| b.start);
            let bitmaps: Vec<_> = sets.iter().map(|set| bitmap(set)).collect();
            let lacking: Vec<_> = bitmaps.iter().collect();
            let pieces = States { blocks, found: &found, busy: &busy, lacking: &lacking, max: EXTENTS_MAX };
            let pieces = pieces.extents();
            prop_assert_eq!(pieces.iter().map(|p| p.count).sum::<u64>(), count);
            prop_assert!(pieces.windows(2).all(|w| (w[0].hole, w[0].dirty) != (w[1].hole, w[1].dirty)));
            let said = pieces.iter().flat_map(|p| (0..p.count).map(|_| (p.hole, p.dirty)));
            let holes = found.iter().flat_map(|s| (0..s.count).map(|_| s.hole));
            for ((block, hole), said) in blocks.iter().zip(holes).zip(said) {
                let written = busy.iter().any(|range| range.contains(block));
                let dirty = bitmaps.iter().any(|bitmap| bitmap.get(block.0));
                prop_assert_eq!(said, (hole && !written, dirty), "block {}", block.0);
            }
        }

        #[test]
        fn an_answer_covers_just_what_was_asked_for(
            offset in 0u64..5000, len in 1u64..20_000, counts in prop::collection::vec(1u64..4, 1..8),
        ) {
            let first = offset / 4096;
            let blocks = (offset + len).div_ceil(4096) - first;
            let mut left = blocks;
            let mut pieces = Vec::new();
            for (n, count) in counts.into_iter().enumerate() {
                let count = count.min(left);
                left -= count;
                if count > 0 {
                    pieces.push(Piece { count, hole: n % 2 == 0, dirty: false });
                }
            }
            let extents = cut(pieces, 4096, offset, len);
            prop_assert!(extents.iter().all(|e| e.len > 0));
            let covered: u64 = extents.iter().map(|e| e.len).sum();
            let end = if left == 0 { offset + len } else { (first + blocks - left) * 4096 };
            prop_assert_eq!(offset + covered, end);
        }
    }

    fn bitmap(set: &[(u64, u64)]) -> PagedBitmap {
        let geometry = Geometry::new(BITS * 4096, 4096, 1 << 16).expect("a small volume");
        let area = Area::Dirty(ReplicaSlot(0));
        let mut bitmap = PagedBitmap::new_clear(area, BITS, VolumeId(1), &Layout::new(&geometry));
        for (start, count) in set {
            bitmap.set_range(*start, *count);
        }
        bitmap
    }

    const BITS: u64 = 4096;

    #[test]
    fn an_answer_has_a_bounded_number_of_extents_and_covers_something() {
        let found: Vec<_> = (0..1000).map(|n| Stretch { count: 1, hole: n % 2 == 0 }).collect();
        let blocks = BlockRange::between(0, 1000);
        for max in [1, 7, EXTENTS_MAX] {
            let pieces = States { blocks, found: &found, busy: &[], lacking: &[], max };
            let pieces = pieces.extents();
            assert_eq!(pieces.len(), max);
            assert_eq!(pieces.iter().map(|p| p.count).sum::<u64>(), max as u64);
        }
    }
}
