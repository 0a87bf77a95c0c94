//! Properties of [`PagedBitmap`] against an oracle (`Vec<bool>`), and of what torn, lost, damaged and
//! misplaced pages read as. Holds a model disk: bytes, nothing else.

use std::convert::Infallible;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::meta::layout::GROUP_BITS;
use crate::types::{Geometry, ReplicaSlot};
use crate::wire::Run;

const VOLUME: VolumeId = VolumeId(0x5eed);
const DIRTY: Area = Area::Dirty(ReplicaSlot(2));
const PAGE_BITS: usize = 3840;

fn layout(bits: u64) -> Layout {
    Layout::new(&Geometry::new(bits * 4096, 4096, 65536).unwrap())
}

fn clear(bits: u64) -> PagedBitmap {
    PagedBitmap::new_clear(DIRTY, bits, VOLUME, &layout(bits))
}

fn bools(bitmap: &PagedBitmap) -> Vec<bool> {
    (0..bitmap.len()).map(|bit| bitmap.get(bit)).collect()
}

/// What one page of a write does on the way to the disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Lands,
    Lost,
    Garbled,
}

/// The area of one bitmap as a disk holds it.
#[derive(Clone)]
struct Disk {
    start: u64,
    bytes: Vec<u8>,
}

impl Disk {
    fn new(bitmap: &PagedBitmap) -> Self {
        let len = usize::try_from(bitmap.place.byte_len()).unwrap();
        Self { start: bitmap.place.offset(), bytes: vec![0; len] }
    }

    fn at(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let at = usize::try_from(offset - self.start).unwrap();
        &mut self.bytes[at..at + len]
    }

    fn write(&mut self, (offset, bytes): &(u64, Vec<u8>)) {
        self.at(*offset, bytes.len()).copy_from_slice(bytes);
    }

    fn write_torn(&mut self, (offset, bytes): &(u64, Vec<u8>), fates: &[Fate]) {
        let place = self.at(*offset, bytes.len());
        for ((old, new), fate) in place.chunks_mut(512).zip(bytes.chunks(512)).zip(fates) {
            match fate {
                Fate::Lands => old.copy_from_slice(new),
                Fate::Lost => {}
                Fate::Garbled => {
                    old[..256].copy_from_slice(&new[..256]);
                    old[300] ^= 0x40;
                    old[16] ^= 1;
                }
            }
        }
    }

    fn read(&self, area: Area, bits: u64, volume: VolumeId) -> (PagedBitmap, u32) {
        let mut read_at = |offset: u64, buffer: &mut [u8]| {
            assert!(offset.is_multiple_of(4096) && buffer.len().is_multiple_of(4096));
            assert!(buffer.len() <= 1 << 20);
            let at = usize::try_from(offset - self.start).unwrap();
            buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
            Ok::<_, Infallible>(())
        };
        PagedBitmap::decode(area, bits, volume, &layout(bits), &mut read_at).unwrap()
    }
}

type ModelPage = Option<(usize, Vec<bool>)>;

/// What must be read after torn writes, told page by page without sequence numbers or checksums: per
/// slot the round in which its page last landed and its bits, or nothing if it is garbled or unwritten.
struct Model {
    len: usize,
    pages: Vec<[ModelPage; 2]>,
}

impl Model {
    fn new(len: u64) -> Self {
        let groups = usize::try_from(len.div_ceil(u64::from(GROUP_BITS))).unwrap();
        Self { len: usize::try_from(len).unwrap(), pages: vec![[None, None]; groups * PAGES_PER_GROUP] }
    }

    fn bits(&self, page: usize) -> std::ops::Range<usize> {
        (page * PAGE_BITS).min(self.len)..((page + 1) * PAGE_BITS).min(self.len)
    }

    fn write(&mut self, page: usize, slot: usize, fate: Fate, round: usize, memory: &[bool]) {
        match fate {
            Fate::Lands => self.pages[page][slot] = Some((round, memory[self.bits(page)].to_vec())),
            Fate::Garbled => self.pages[page][slot] = None,
            Fate::Lost => {}
        }
    }

    fn read(&self) -> Vec<bool> {
        let page = |(page, slots): (usize, &[ModelPage; 2])| match slots {
            [Some(a), Some(b)] => if a.0 > b.0 { &a.1 } else { &b.1 }.clone(),
            _ => vec![true; self.bits(page).len()],
        };
        self.pages.iter().enumerate().flat_map(page).collect()
    }
}

/// Writes whatever is unsaved until nothing is; a group takes two writes at most.
fn save(bitmap: &mut PagedBitmap, disk: &mut Disk) {
    for _ in 0..2 {
        let groups: Vec<_> = bitmap.unsaved_groups().collect();
        for group in groups {
            disk.write(&bitmap.encode_group(group));
        }
    }
    assert_eq!(bitmap.first_unsaved(0), None);
    assert_eq!(bitmap.unsaved_set_groups().count(), 0);
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Clear(u64, u64),
    SetAll,
    ClearAll,
    Encode,
}

/// Ranges as fractions of the length, so that one strategy fits every length.
fn op() -> impl Strategy<Value = Op> {
    let range = (0..1000_u64, prop_oneof![3 => Just(0_u64), 2 => 0..1000_u64]);
    prop_oneof![
        8 => range.clone().prop_map(|(a, n)| Op::Set(a, n)),
        8 => range.prop_map(|(a, n)| Op::Clear(a, n)),
        1 => Just(Op::SetAll),
        1 => Just(Op::ClearAll),
        4 => Just(Op::Encode),
    ]
}

fn lens() -> impl Strategy<Value = u64> {
    let group = u64::from(GROUP_BITS);
    prop_oneof![
        1..200_u64,
        3830..3850_u64,
        Just(group - 1),
        Just(group),
        Just(group + 1),
        2 * group + 5..2 * group + 3900
    ]
}

fn resolve(len: u64, start: u64, count: u64) -> (u64, u64) {
    let start = start * len / 1000;
    (start, (count * len / 1000).max(1).min(len - start))
}

fn fill(oracle: &mut [bool], start: u64, count: u64, to: bool) -> u64 {
    let start = usize::try_from(start).unwrap();
    let range = &mut oracle[start..start + usize::try_from(count).unwrap()];
    let changed = range.iter().filter(|bit| **bit != to).count();
    range.fill(to);
    changed as u64
}

fn apply(bitmap: &mut PagedBitmap, oracle: &mut [bool], op: &Op) {
    let len = bitmap.len();
    match *op {
        Op::Set(a, n) => {
            let (start, count) = resolve(len, a, n);
            assert_eq!(bitmap.set_range(start, count), fill(oracle, start, count, true));
        }
        Op::Clear(a, n) => {
            let (start, count) = resolve(len, a, n);
            assert_eq!(bitmap.clear_range(start, count), fill(oracle, start, count, false));
        }
        Op::SetAll => {
            bitmap.set_all();
            oracle.fill(true);
        }
        Op::ClearAll => {
            bitmap.clear_all();
            oracle.fill(false);
        }
        Op::Encode => {}
    }
}

fn runs_of(oracle: &[bool]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (bit, _) in (0_u64..).zip(oracle).filter(|(_, set)| **set) {
        match runs.last_mut() {
            Some(run) if run.start + run.count == bit => run.count += 1,
            _ => runs.push(Run { start: bit, count: 1 }),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_vector_of_bools(len in lens(), ops in vec(op(), 1..25), from in 0..1000_u64) {
        let mut bitmap = clear(len);
        let mut oracle = vec![false; usize::try_from(len).unwrap()];
        for op in &ops {
            apply(&mut bitmap, &mut oracle, op);
            prop_assert_eq!(bitmap.count(), oracle.iter().filter(|b| **b).count() as u64);
        }
        prop_assert_eq!(bitmap.is_empty(), !oracle.contains(&true));
        prop_assert_eq!(bools(&bitmap), oracle.clone());
        prop_assert_eq!(bitmap.runs(0).collect::<Vec<_>>(), runs_of(&oracle));
        let from = from * len / 1000;
        let at = usize::try_from(from).unwrap();
        let find = |set: bool| oracle[at..].iter().position(|b| *b == set).map(|i| from + i as u64);
        prop_assert_eq!(bitmap.next_set(from), find(true));
        prop_assert_eq!(bitmap.next_clear(from), find(false));
        prop_assert_eq!(bitmap.next_set(len), None);
        let mut copy = clear(len);
        let runs: Vec<_> = bitmap.runs(0).collect();
        prop_assert_eq!(copy.union_runs(&runs), Ok(bitmap.count()));
        prop_assert_eq!(bools(&copy), oracle);
    }

    #[test]
    fn what_was_saved_is_what_is_read(len in lens(), ops in vec(op(), 1..25)) {
        let mut bitmap = clear(len);
        let mut disk = Disk::new(&bitmap);
        let mut oracle = vec![false; usize::try_from(len).unwrap()];
        for op in &ops {
            apply(&mut bitmap, &mut oracle, op);
            if matches!(op, Op::Encode) {
                save(&mut bitmap, &mut disk);
                let (read, damaged) = disk.read(DIRTY, len, VOLUME);
                prop_assert_eq!(damaged, 0);
                prop_assert_eq!(read.count(), bitmap.count());
                prop_assert_eq!(bools(&read), oracle.clone());
                prop_assert_eq!(read.first_unsaved(0), None);
                // Carrying on from what was read is the same as carrying on from memory.
                bitmap = read;
            }
        }
    }

    /// A chain of crashes, each in the middle of group writes of which any pages land, are lost or are
    /// garbled. Every page must read as it was, as it was to become, or all-set; never less.
    #[test]
    fn torn_writes_never_lose_a_durable_bit(
        len in lens(),
        rounds in vec((vec(op(), 1..5), vec(0..3_u8, 24), any::<bool>()), 1..8),
    ) {
        let mut bitmap = clear(len);
        let mut disk = Disk::new(&bitmap);
        let mut model = Model::new(len);
        let mut durable = bools(&disk.read(DIRTY, len, VOLUME).0);
        for (round, (ops, fates, garble)) in rounds.into_iter().enumerate() {
            let mut memory = bools(&bitmap);
            for op in &ops {
                apply(&mut bitmap, &mut memory, op);
            }
            let groups: Vec<_> = bitmap.unsaved_groups().collect();
            for group in groups {
                let write = bitmap.encode_group(group);
                let slot = usize::try_from((write.0 - disk.start) / 4096 % 2).unwrap();
                let fates: Vec<_> = (0..PAGES_PER_GROUP)
                    .map(|page| match fates[(group as usize * PAGES_PER_GROUP + page) % fates.len()] {
                        0 => Fate::Lands,
                        1 if garble => Fate::Garbled,
                        _ => Fate::Lost,
                    })
                    .collect();
                disk.write_torn(&write, &fates);
                for (page, fate) in fates.into_iter().enumerate() {
                    let page = group as usize * PAGES_PER_GROUP + page;
                    model.write(page, slot, fate, round, &memory);
                }
            }
            let (read, damaged) = disk.read(DIRTY, len, VOLUME);
            let got = bools(&read);
            prop_assert_eq!(&got, &model.read());
            for bit in 0..got.len() {
                prop_assert!(got[bit] || !(durable[bit] && memory[bit]), "bit {} lost", bit);
            }
            prop_assert!(damaged == 0 || read.unsaved_set_groups().next().is_some());
            durable = got;
            bitmap = read;
        }
        // Once all that is unsaved is written, nothing is damaged any more and nothing was lost by it.
        save(&mut bitmap, &mut disk);
        let (read, damaged) = disk.read(DIRTY, len, VOLUME);
        prop_assert_eq!(damaged, 0);
        prop_assert_eq!(bools(&read), durable);
    }

    /// Any number of pages flipped, zeroed or overwritten by other pages of the same bitmap: what is
    /// read is a superset of what was saved, page by page equal or all-set, and writing it heals it.
    #[test]
    fn any_damage_reads_as_a_superset(
        len in lens(),
        ops in vec(op(), 1..10),
        damage in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..3_u8), 1..12),
    ) {
        let mut bitmap = clear(len);
        let mut disk = Disk::new(&bitmap);
        let mut oracle = vec![false; usize::try_from(len).unwrap()];
        for op in &ops {
            apply(&mut bitmap, &mut oracle, op);
        }
        save(&mut bitmap, &mut disk);
        let pages = disk.bytes.len() / 512;
        for (page, other, kind) in &damage {
            let (at, from) = (page.index(pages) * 512, other.index(pages) * 512);
            match kind {
                0 => disk.bytes[at + from % 511] ^= 0x10,
                1 => disk.bytes[at..at + 512].fill(0),
                _ => disk.bytes.copy_within(from..from + 512, at),
            }
        }
        let (mut read, _) = disk.read(DIRTY, len, VOLUME);
        let got = bools(&read);
        for (got, saved) in got.chunks(PAGE_BITS).zip(oracle.chunks(PAGE_BITS)) {
            prop_assert!(got == saved || got.iter().all(|bit| *bit));
        }
        save(&mut read, &mut disk);
        prop_assert_eq!(bools(&disk.read(DIRTY, len, VOLUME).0), got);
    }

    #[test]
    fn any_bytes_read_without_panic_and_only_valid_pages_clear_bits(
        len in 1..9000_u64,
        bytes in vec(any::<u8>(), 1..600),
    ) {
        let template = clear(len);
        let mut disk = Disk::new(&template);
        let mut source = bytes.iter().cycle();
        disk.bytes.fill_with(|| *source.next().unwrap());
        let (read, damaged) = disk.read(DIRTY, len, VOLUME);
        prop_assert_eq!(read.count(), len);
        prop_assert_eq!(read.next_clear(0), None);
        prop_assert!(damaged == 8 || bytes.iter().all(|b| *b == 0));
    }
}

/// A saved bitmap with every third bit set, and its disk.
fn saved(len: u64) -> (PagedBitmap, Disk) {
    let mut bitmap = clear(len);
    for bit in (0..len).step_by(3) {
        bitmap.set(bit);
    }
    let mut disk = Disk::new(&bitmap);
    save(&mut bitmap, &mut disk);
    (bitmap, disk)
}

#[test]
fn a_damaged_page_reads_all_set_and_its_neighbours_do_not() {
    let len = u64::from(GROUP_BITS) + 9000;
    for slot in [0, 1] {
        let (bitmap, mut disk) = saved(len);
        let offset = bitmap.place.group_offset(1, slot) + 512;
        disk.at(offset, 512)[100] ^= 1;
        let (read, damaged) = disk.read(DIRTY, len, VOLUME);
        assert_eq!(damaged, 1);
        let hurt = u64::from(GROUP_BITS) + 3840..u64::from(GROUP_BITS) + 7680;
        for bit in 0..len {
            assert_eq!(read.get(bit), hurt.contains(&bit) || bit % 3 == 0, "bit {bit}, slot {slot}");
        }
        assert!(read.has_unsaved_sets(1), "all-set by damage is not durable");
        assert!(!read.is_group_unsaved(0));
    }
}

#[test]
fn the_write_after_damage_goes_to_the_damaged_slot_and_beats_both() {
    for slot in [0_u8, 1] {
        let (bitmap, mut disk) = saved(100);
        let offset = bitmap.place.group_offset(0, slot);
        let kept = disk.at(offset, 512).to_vec();
        disk.at(offset, 512)[7] ^= 1;
        let (mut read, damaged) = disk.read(DIRTY, 100, VOLUME);
        assert_eq!((damaged, read.count()), (1, 100));
        let write = read.encode_group(0);
        assert_eq!(write.0, offset);
        assert!(!read.is_group_unsaved(0));
        disk.write(&write);
        let (again, damaged) = disk.read(DIRTY, 100, VOLUME);
        assert_eq!((damaged, again.count()), (0, 100));
        // Even if the unreadable page was sound and comes back, in a slot written later, it has lost.
        disk.at(offset, 512).copy_from_slice(&kept);
        let next = read.encode_group(0);
        assert_ne!(next.0, offset);
        disk.write(&next);
        assert_eq!(disk.read(DIRTY, 100, VOLUME).0.count(), 100);
    }
}

#[test]
fn the_write_after_damage_also_beats_what_was_unreadable_only_for_a_while() {
    let (bitmap, mut disk) = saved(100);
    let sound = disk.bytes.clone();
    disk.bytes.fill(0xee);
    let (mut read, damaged) = disk.read(DIRTY, 100, VOLUME);
    assert_eq!((damaged, read.count()), (8, 100));
    let write = read.encode_group(0);
    disk.bytes = sound;
    disk.write(&write);
    let (again, damaged) = disk.read(DIRTY, 100, VOLUME);
    assert_eq!((damaged, again.count()), (0, 100), "{} bits were set before", bitmap.count());
}

#[test]
fn the_write_after_reading_goes_to_the_slot_with_fewer_pages_in_force() {
    let (mut bitmap, mut disk) = saved(9000);
    let newest = disk.read(DIRTY, 9000, VOLUME).0.encode_group(0).0;
    assert_eq!(newest, bitmap.place.group_offset(0, 0), "slot 1 was written last");
    bitmap.clear_all();
    let write = bitmap.encode_group(0);
    for landed in 0..=PAGES_PER_GROUP {
        let fates: Vec<_> =
            (0..PAGES_PER_GROUP).map(|page| if page < landed { Fate::Lands } else { Fate::Lost }).collect();
        let mut torn = disk.clone();
        torn.write_torn(&write, &fates);
        let offset = torn.read(DIRTY, 9000, VOLUME).0.encode_group(0).0;
        assert_eq!(offset, bitmap.place.group_offset(0, u8::from(landed > 4)), "{landed} landed");
    }
    disk.write(&write);
    assert_eq!(disk.read(DIRTY, 9000, VOLUME).0.count(), 0);
}

#[test]
fn damage_in_both_slots_takes_two_writes_to_heal_and_reads_all_set_until_then() {
    let (bitmap, mut disk) = saved(8000);
    disk.at(bitmap.place.group_offset(0, 0), 512).fill(0xff);
    disk.at(bitmap.place.group_offset(0, 1) + 512, 512).fill(0);
    let (mut read, damaged) = disk.read(DIRTY, 8000, VOLUME);
    assert_eq!(damaged, 2);
    read.clear_range(0, 7680);
    disk.write(&read.encode_group(0));
    assert!(read.is_group_unsaved(0) && !read.has_unsaved_sets(0));
    let (between, damaged) = disk.read(DIRTY, 8000, VOLUME);
    assert_eq!(damaged, 1);
    assert!(between.count() >= 3840);
    disk.write(&read.encode_group(0));
    assert!(!read.is_group_unsaved(0));
    let (healed, damaged) = disk.read(DIRTY, 8000, VOLUME);
    assert_eq!((damaged, bools(&healed)), (0, bools(&read)));
}

#[test]
fn a_misdirected_group_or_page_is_damage() {
    let len = 3 * u64::from(GROUP_BITS);
    // A whole group of the same bitmap at another group's place, at the other slot's, and one page at
    // its neighbour's.
    for (from, to, bytes, pages) in [
        ((0, 0), (2, 0), 4096, 8),
        ((0, 0), (2, 1), 4096, 8),
        ((1, 0), (1, 1), 4096, 8),
        ((1, 1), (1, 0), 4096, 8),
        ((2, 1), (0, 1), 512, 1),
    ] {
        let (bitmap, mut disk) = saved(len);
        let copy = disk.at(bitmap.place.group_offset(from.0, from.1), bytes).to_vec();
        disk.write(&(bitmap.place.group_offset(to.0, to.1), copy));
        let (read, damaged) = disk.read(DIRTY, len, VOLUME);
        assert_eq!(damaged, pages, "{from:?} -> {to:?}");
        let first = u64::from(to.0) * u64::from(GROUP_BITS);
        let hurt = first..first + u64::from(pages) * 3840;
        for bit in 0..len {
            assert_eq!(read.get(bit), hurt.contains(&bit) || bit % 3 == 0, "{from:?} -> {to:?}, bit {bit}");
        }
    }
}

#[test]
fn pages_of_another_volume_or_area_are_damage() {
    let (_, disk) = saved(9000);
    for (area, volume) in [(DIRTY, VolumeId(0x5eee)), (Area::Dirty(ReplicaSlot(3)), VOLUME)] {
        let mut moved = disk.clone();
        moved.start = layout(9000).area(area).offset();
        let (read, damaged) = moved.read(area, 9000, volume);
        assert_eq!((damaged, read.count()), (8, 9000));
    }
}

#[test]
fn pages_of_one_number_in_both_slots_or_of_an_absurd_number_are_damage() {
    for (slot, seq) in [(0, 2), (1, 1), (0, u64::MAX), (1, (1 << 61) + 1)] {
        let (bitmap, mut disk) = saved(100);
        let address = bitmap.page_address(0, slot, 0);
        let page = address.encode(seq, &[0; 60]);
        disk.write(&(address.offset, page.to_vec()));
        let (mut read, damaged) = disk.read(DIRTY, 100, VOLUME);
        assert_eq!((damaged, read.count()), (1, 100), "slot {slot}, number {seq}");
        save(&mut read, &mut disk);
        assert_eq!(disk.read(DIRTY, 100, VOLUME).1, 0);
    }
}

#[test]
fn an_area_never_written_reads_all_set_without_being_damaged() {
    let bits = u64::from(GROUP_BITS) + 1;
    let mut full = PagedBitmap::new_full(DIRTY, bits, VOLUME, &layout(bits));
    assert_eq!((full.count(), full.first_unsaved(0)), (bits, None));
    let mut disk = Disk::new(&full);
    let (read, damaged) = disk.read(DIRTY, bits, VOLUME);
    assert_eq!((damaged, read.count(), read.first_unsaved(0)), (0, bits, None));
    // The first clear in a group that was never written takes two writes; until both are there, the
    // group reads all-set.
    full.clear(3);
    assert_eq!(full.unsaved_groups().collect::<Vec<_>>(), [0]);
    disk.write(&full.encode_group(0));
    assert!(full.is_group_unsaved(0));
    assert_eq!(disk.read(DIRTY, bits, VOLUME).0.count(), bits);
    disk.write(&full.encode_group(0));
    assert!(!full.is_group_unsaved(0));
    let (read, damaged) = disk.read(DIRTY, bits, VOLUME);
    assert_eq!((damaged, read.next_clear(0), read.count()), (0, Some(3), bits - 1));
}

#[test]
fn an_intent_map_of_zeroes_is_damage() {
    let place = layout(500).area(Area::Intent);
    let disk = Disk { start: place.offset(), bytes: vec![0; usize::try_from(place.byte_len()).unwrap()] };
    let mut read_at = |_: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&disk.bytes);
        Ok::<_, Infallible>(())
    };
    let (read, damaged) =
        PagedBitmap::decode(Area::Intent, place.bits(), VOLUME, &layout(500), &mut read_at).unwrap();
    assert_eq!((damaged, read.count()), (8, place.bits()));
    assert!(read.has_unsaved_sets(0));
}

#[test]
fn clears_alone_are_unsaved_but_not_urgent() {
    let (mut bitmap, _) = saved(1000);
    assert!(bitmap.clear(3));
    assert!(bitmap.is_group_unsaved(0) && !bitmap.has_unsaved_sets(0));
    assert!(bitmap.set(3), "[R22] a bit set again after a clear must be written again");
    assert!(bitmap.has_unsaved_sets(0));
    bitmap.encode_group(0);
    assert!(!bitmap.is_group_unsaved(0) && !bitmap.has_unsaved_sets(0));
    assert!(!bitmap.set(3) && !bitmap.clear(4));
    assert!(!bitmap.is_group_unsaved(0), "what changes nothing leaves nothing to save");
}

#[test]
fn runs_from_a_peer_are_checked_before_any_is_taken() {
    let mut bitmap = clear(100);
    for (start, count) in [(100, 1), (0, 101), (0, 0), (u64::MAX, 2), (99, u64::MAX)] {
        let runs = [Run { start: 0, count: 5 }, Run { start, count }];
        let error = bitmap.union_runs(&runs).unwrap_err();
        assert_eq!((error.start, error.count, error.len), (start, count, 100));
        assert!(bitmap.is_empty());
    }
    let runs = [Run { start: 0, count: 5 }, Run { start: 3, count: 97 }];
    assert_eq!(bitmap.union_runs(&runs), Ok(100));
}

#[test]
fn a_reader_error_is_passed_on() {
    let mut read_at = |_: u64, _: &mut [u8]| Err("gone");
    let result = PagedBitmap::decode(DIRTY, 100, VOLUME, &layout(100), &mut read_at);
    assert_eq!(result.err(), Some("gone"));
}

#[test]
fn large_areas_are_read_in_parts_and_cost_little_when_clear_or_full() {
    let bits = 300 * u64::from(GROUP_BITS) + 17;
    let mut bitmap = clear(bits);
    bitmap.set_range(40 * u64::from(GROUP_BITS) - 5, 200 * u64::from(GROUP_BITS));
    bitmap.set(bits - 1);
    let mut disk = Disk::new(&bitmap);
    save(&mut bitmap, &mut disk);
    let (read, damaged) = disk.read(DIRTY, bits, VOLUME);
    assert_eq!(damaged, 0);
    assert_eq!(read.runs(0).collect::<Vec<_>>(), bitmap.runs(0).collect::<Vec<_>>());
    assert_eq!(read.runs(0).count(), 2);
}
