//! A bitmap's way to disk and back: which slot a group goes to, and which of two pages counts.
//!
//! Never does the reading or writing itself. Rules:
//! - A group is written whole, into one slot, with a sequence number above everything that either slot
//!   may hold. So a page that lands wins, and one that does not land changes nothing.
//! - Pages are judged one by one. A slot whose page is damaged counts as the newest: nobody can tell
//!   what it held, so the page reads all-set; the older page in the other slot is no substitute.
//! - A group with damage is unsaved from the start: what reads all-set today by damage is not durable,
//!   it might read as something else tomorrow.

use super::bitmap::{Group, PagedBitmap};
use super::group::GroupBits;
use super::image::ReadAt;
use super::layout::{Area, Layout, META_GROUP_LEN, META_PAGE_LEN, PAGE_WORDS, PAGES_PER_GROUP};
use super::page::{PageAddress, PageWords};
use crate::mutation::{Mutation, mutated};
use crate::types::VolumeId;

/// Bytes of both slots of a group.
const PAIR_LEN: usize = 2 * META_GROUP_LEN;
/// Groups read by one call of the reader: 1 MiB.
const GROUPS_PER_READ: u32 = 128;
/// Added to the highest readable number of a group with damage: more writes than a disk makes in its
/// life, so that the next write also beats what is unreadable now but might be readable later.
const SEQ_JUMP: u64 = 1 << 40;
/// A page with a higher number was not written by this program; it counts as damaged.
const SEQ_MAX: u64 = 1 << 61;

/// [`PAGES_PER_GROUP`] as a page number.
const PAGES_U32: u32 = 8;
/// [`META_PAGE_LEN`] as a file offset.
const PAGE_BYTES: u64 = 512;

const _: () = assert!(PAGES_U32 as u128 == PAGES_PER_GROUP as u128);
const _: () = assert!(PAGE_BYTES as u128 == META_PAGE_LEN as u128);

/// What the two slots of one group say.
struct Judged {
    pages: [Option<PageWords>; PAGES_PER_GROUP],
    seq: u64,
    slots_bad: u8,
    /// Pages whose newest copy lies in slot 0 and 1.
    won: [u32; 2],
}

impl PagedBitmap {
    /// The bytes that save `group`: file offset and one whole group, to be written as they are. Takes
    /// the next sequence number, alternates the slot and counts the group as saved - unless its other
    /// slot is still damaged or was never written: then it stays unsaved, to be encoded once more.
    ///
    /// The caller must not encode a group while an earlier write of that group is in flight.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn encode_group(&mut self, group: u32) -> (u64, Vec<u8>) {
        assert!(group < self.groups(), "group {group} of the {} of {}", self.area, self.groups());
        let (slot, seq) = {
            let state = &mut self.groups[group as usize];
            state.seq += 1;
            let slot = state.slot_next;
            state.slot_next = 1 - slot;
            state.slots_bad &= !(1 << slot);
            (slot, state.seq)
        };
        let state = &self.groups[group as usize];
        let mut bytes = Vec::with_capacity(META_GROUP_LEN);
        for page in 0..PAGES_PER_GROUP {
            let address = self.page_address(group, slot, page);
            let words = state.bits.page(page);
            let encoded = address.encode(seq, &words);
            assert!(address.decode(&encoded) == Some((seq, words)), "page encodes to itself: {address:?}");
            bytes.extend_from_slice(&encoded);
        }
        if state.slots_bad == 0 {
            self.unsaved.remove(&group);
        }
        // With the sequence number above whatever the other slot may hold, every set bit of these bytes
        // reads as set once they are on disk, whatever becomes of the other slot.
        self.short.remove(&group);
        (self.place.group_offset(group, slot), bytes)
    }

    /// Reads a bitmap and says how many of its pages were damaged (and read all-set).
    ///
    /// A group of a *dirty* bitmap of which both slots hold only zeroes was never written: it reads
    /// all-set, and is neither damaged nor unsaved. The intent map is written whole when it is made, so
    /// there it is damage.
    ///
    /// # Errors
    /// Only those of `read_at`.
    ///
    /// # Panics
    /// If `bits` is not what `layout` holds for `area`.
    pub fn decode<E>(
        area: Area,
        bits: u64,
        volume: VolumeId,
        layout: &Layout,
        read_at: ReadAt<'_, E>,
    ) -> Result<(Self, u32), E> {
        let mut bitmap = Self::unwritten(area, bits, volume, layout, GroupBits::full);
        let groups = bitmap.groups();
        let mut damaged = 0_u32;
        let mut buffer = vec![0; PAIR_LEN * groups.min(GROUPS_PER_READ) as usize];
        let mut group = 0;
        while group < groups {
            let chunk = GROUPS_PER_READ.min(groups - group);
            let buffer = &mut buffer[..PAIR_LEN * chunk as usize];
            read_at(bitmap.place.group_offset(group, 0), buffer)?;
            for pair in buffer.chunks_exact(PAIR_LEN) {
                damaged = damaged.saturating_add(bitmap.decode_group(group, pair));
                group += 1;
            }
        }
        bitmap.count = bitmap.groups.iter().map(|g| u64::from(g.bits.count())).sum();
        Ok((bitmap, damaged))
    }

    /// Takes over what both slots of a group hold; returns the number of damaged pages.
    fn decode_group(&mut self, group: u32, pair: &[u8]) -> u32 {
        if self.area != Area::Intent && pair.iter().all(|byte| *byte == 0) {
            return 0;
        }
        let mut judged = self.judge(group, pair);
        if mutated(Mutation::DamagedPageClean) {
            judged.pages = judged.pages.map(|page| page.or(Some([0; PAGE_WORDS])));
        }
        let bits = GroupBits::from_pages(self.place.bits_of(group), &judged.pages);
        let slot_next = match judged.slots_bad {
            0b01 => 0,
            0b10 => 1,
            // Put the fewest newest copies at risk: after a torn write that is the torn slot or, if it
            // landed in good part, the older one.
            _ => u8::from(judged.won[1] < judged.won[0]),
        };
        let damaged = judged.pages.iter().filter(|page| page.is_none()).count();
        let mut seq = judged.seq;
        if damaged > 0 {
            seq += SEQ_JUMP;
            self.unsaved.insert(group);
            self.short.insert(group);
        }
        self.groups[group as usize] = Group { bits, seq, slot_next, slots_bad: judged.slots_bad };
        u32::try_from(damaged).expect("pages of a group")
    }

    fn judge(&self, group: u32, pair: &[u8]) -> Judged {
        let mut judged = Judged { pages: [None; PAGES_PER_GROUP], seq: 0, slots_bad: 0, won: [0; 2] };
        for page in 0..PAGES_PER_GROUP {
            let read = [0_u8, 1].map(|slot| {
                let start = usize::from(slot) * META_GROUP_LEN + page * META_PAGE_LEN;
                let address = self.page_address(group, slot, page);
                address.decode(&pair[start..start + META_PAGE_LEN]).filter(|(seq, _)| *seq <= SEQ_MAX)
            });
            for (slot, copy) in read.iter().enumerate() {
                match copy {
                    Some((seq, _)) => judged.seq = judged.seq.max(*seq),
                    None => judged.slots_bad |= 1 << slot,
                }
            }
            let [Some((seq_0, words_0)), Some((seq_1, words_1))] = read else { continue };
            // Two copies of one number were never written by this program: which one is newer cannot
            // be known, so the page is as good as damaged.
            if seq_0 != seq_1 {
                let newest = usize::from(seq_1 > seq_0);
                judged.won[newest] += 1;
                judged.pages[page] = Some([words_0, words_1][newest]);
            } else {
                judged.slots_bad = 0b11;
            }
        }
        judged
    }

    fn page_address(&self, group: u32, slot: u8, page: usize) -> PageAddress {
        let page = u32::try_from(page).expect("a page of a group");
        PageAddress {
            volume: self.volume,
            area: self.area.number(),
            slot,
            page: group * PAGES_U32 + page,
            offset: self.place.group_offset(group, slot) + u64::from(page) * PAGE_BYTES,
        }
    }
}

#[cfg(test)]
#[path = "bitmap_tests.rs"]
mod tests;
