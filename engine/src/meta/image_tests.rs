//! A whole image against a model file: made, stopped in the middle, read, damaged.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::meta::{SUPERBLOCKS_END, blank};
use crate::types::{Geometry, SuperblockTrust, VolumeId};

const OTHERS: [ReplicaSlot; 2] = [ReplicaSlot(0), ReplicaSlot(4)];

fn superblock() -> Superblock {
    blank(ReplicaSlot(1), Geometry::new(200 << 20, 4096, 1 << 20).unwrap())
}

/// A sparse file: 4096-byte pieces by offset.
#[derive(Clone, Default)]
struct File(BTreeMap<u64, Vec<u8>>);

impl File {
    fn write(&mut self, (offset, bytes): (u64, Vec<u8>)) {
        assert!(offset.is_multiple_of(4096) && bytes.len() == 4096);
        self.0.insert(offset, bytes);
    }

    fn read(&self, slots: &[ReplicaSlot]) -> Result<Image, ImageError<std::io::Error>> {
        let mut read_at = |offset: u64, buffer: &mut [u8]| {
            for (at, piece) in (offset..).step_by(4096).zip(buffer.chunks_exact_mut(4096)) {
                match self.0.get(&at) {
                    Some(bytes) => piece.copy_from_slice(bytes),
                    None => piece.fill(0),
                }
            }
            Ok(())
        };
        Image::read(&mut read_at, slots)
    }
}

fn made(base_zero: bool) -> (Image, File) {
    let mut image = Image::fresh(superblock(), &OTHERS, base_zero);
    let mut file = File::default();
    image.encode_all().for_each(|write| file.write(write));
    (image, file)
}

#[test]
fn what_is_made_is_what_is_read() {
    for base_zero in [true, false] {
        let (image, file) = made(base_zero);
        let read = file.read(&OTHERS).unwrap();
        assert_eq!(read.superblock, image.superblock);
        assert_eq!((read.trust, read.damaged_pages), (SuperblockTrust::Sound, 0));
        assert_eq!(read.notes, [""; 0]);
        assert!(read.intent.is_empty());
        let blocks = superblock().geometry.blocks();
        for slot in OTHERS {
            assert_eq!(read.dirty[&slot].count(), if base_zero { 0 } else { blocks });
            assert_eq!(read.dirty[&slot].first_unsaved(0), None);
            assert_eq!(image.dirty[&slot].first_unsaved(0), None);
        }
        let last = file.0.keys().next_back().unwrap() + 4096;
        assert!(last <= image.layout().file_len());
    }
}

#[test]
fn a_stop_while_it_is_made_leaves_no_superblock_or_a_doubtful_one() {
    let mut image = Image::fresh(superblock(), &OTHERS, true);
    let writes: Vec<_> = image.encode_all().collect();
    let superblocks = writes.iter().position(|(offset, _)| *offset < SUPERBLOCKS_END).unwrap();
    assert_eq!(superblocks, writes.len() - 2);
    for done in 0..writes.len() {
        let mut file = File::default();
        writes[..done].iter().cloned().for_each(|write| file.write(write));
        match file.read(&OTHERS) {
            Ok(read) => {
                assert_eq!((done, read.trust), (writes.len() - 1, SuperblockTrust::Doubtful));
                assert_eq!(read.damaged_pages, 0);
            }
            Err(ImageError::Superblock(error)) => assert!(error.is_blank() && done <= superblocks),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_replica_added_later_is_missing_everything() {
    let (_, file) = made(true);
    let added = ReplicaSlot(7);
    let read = file.read(&[OTHERS[0], added]).unwrap();
    assert!(read.dirty[&OTHERS[0]].is_empty());
    assert_eq!(read.dirty[&added].count(), superblock().geometry.blocks());
    assert_eq!((read.damaged_pages, read.notes.len()), (0, 0));
}

#[test]
fn damage_is_counted_noted_and_unsaved() {
    let (image, mut file) = made(true);
    let layout = image.layout();
    let intent = layout.area(Area::Intent).offset();
    let dirty = layout.area(Area::Dirty(OTHERS[1])).group_offset(1, 1);
    file.0.get_mut(&intent).unwrap()[512] ^= 1;
    file.0.remove(&dirty);
    let read = file.read(&OTHERS).unwrap();
    assert_eq!(read.damaged_pages, 9);
    assert_eq!(
        read.notes,
        [
            "intent map: 1 damaged page(s) read all-set",
            "dirty bitmap for replica slot 4: 8 damaged page(s) read all-set"
        ]
    );
    // 200 regions fill a part of the first page only: the damaged second page holds none of them.
    assert!(read.intent.is_empty() && read.intent.has_unsaved_sets(0));
    assert!(read.dirty[&OTHERS[0]].is_empty());
    assert_eq!(read.dirty[&OTHERS[1]].count(), superblock().geometry.blocks() - 30_720);
}

#[test]
fn metadata_of_another_volume_under_our_superblock_reads_all_set() {
    let (_, mut file) = made(true);
    let mut other = Image::fresh(Superblock { volume: VolumeId(99), ..superblock() }, &OTHERS, true);
    for (offset, bytes) in other.encode_all().filter(|(offset, _)| *offset >= SUPERBLOCKS_END) {
        file.write((offset, bytes));
    }
    let read = file.read(&OTHERS).unwrap();
    assert_eq!(read.intent.count(), read.intent.len());
    assert_eq!(read.dirty[&OTHERS[0]].count(), read.dirty[&OTHERS[0]].len());
    assert_eq!(read.damaged_pages, 8 + 2 * 8 * read.dirty[&OTHERS[0]].groups());
}

#[test]
fn a_truncated_file_reads_all_set_where_it_ends() {
    let (image, mut file) = made(true);
    let cut = image.layout().area(Area::Intent).offset();
    file.0.retain(|offset, _| *offset < cut);
    let read = file.read(&OTHERS).unwrap();
    assert_eq!((read.intent.count(), read.damaged_pages), (200, 8));
    assert_eq!(read.dirty[&OTHERS[0]].count(), superblock().geometry.blocks());
}

#[test]
fn a_reader_error_says_what_could_not_be_read() {
    let (_, file) = made(true);
    let mut read_at = |offset: u64, buffer: &mut [u8]| match file.0.get(&offset) {
        Some(bytes) if offset < SUPERBLOCKS_END => {
            buffer.copy_from_slice(bytes);
            Ok(())
        }
        _ => Err(std::io::Error::other("medium error")),
    };
    let error = Image::read(&mut read_at, &OTHERS).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the intent map"), "{error}");
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "medium error");
}

/// What is done to a file between two opens.
#[derive(Clone, Debug)]
enum Harm {
    Flip(prop::sample::Index, usize, u8),
    Blank(prop::sample::Index),
    CopyTo(prop::sample::Index, prop::sample::Index),
    CutAt(prop::sample::Index),
}

fn harm() -> impl Strategy<Value = Harm> {
    let place = any::<prop::sample::Index>;
    prop_oneof![
        4 => (place(), 0..4096usize, 1..=255u8).prop_map(|(at, byte, bits)| Harm::Flip(at, byte, bits)),
        1 => place().prop_map(Harm::Blank),
        1 => (place(), place()).prop_map(|(from, to)| Harm::CopyTo(from, to)),
        1 => place().prop_map(Harm::CutAt),
    ]
}

impl Harm {
    fn strike(&self, file: &mut File) {
        let places: Vec<u64> = file.0.keys().copied().collect();
        if places.is_empty() {
            return;
        }
        let at = |place: &prop::sample::Index| places[place.index(places.len())];
        match self {
            Self::Flip(place, byte, bits) => file.0.get_mut(&at(place)).unwrap()[*byte] ^= bits,
            Self::Blank(place) => file.0.get_mut(&at(place)).unwrap().fill(0),
            Self::CopyTo(from, to) => {
                let bytes = file.0[&at(from)].clone();
                file.0.insert(at(to), bytes);
            }
            Self::CutAt(place) => file.0.retain(|offset, _| *offset < at(place)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A file with any bits in its maps, harmed in any way: it cannot be read, or it holds the superblock that
    /// was written and at least every bit that was set; and it is never called sound if its superblock was
    /// touched [R16].
    #[test]
    fn whatever_harm_a_file_takes_no_set_bit_of_it_is_lost(
        regions in prop::collection::btree_set(0..200u64, 0..20),
        blocks in prop::collection::vec((0..51_200u64, 1..4000u64), 0..6),
        harms in prop::collection::vec(harm(), 0..4),
    ) {
        let mut image = Image::fresh(superblock(), &OTHERS, true);
        regions.iter().for_each(|region| { image.intent.set(*region); });
        let mut lacking = BTreeSet::new();
        for (start, count) in blocks {
            let count = count.min(51_200 - start);
            image.dirty.get_mut(&OTHERS[1]).unwrap().set_range(start, count);
            lacking.extend(start..start + count);
        }
        let mut file = File::default();
        image.encode_all().for_each(|write| file.write(write));
        let before = file.clone();
        harms.iter().for_each(|harm| harm.strike(&mut file));
        let whole = |at: u64| file.0.get(&at) == before.0.get(&at);
        match file.read(&OTHERS) {
            Ok(read) => {
                prop_assert!(whole(0) || whole(4096));
                let sound = read.trust == SuperblockTrust::Sound;
                prop_assert_eq!(sound, whole(0) && whole(4096));
                let expected = Superblock { seq: read.superblock.seq, ..superblock() };
                prop_assert_eq!(&read.superblock, &expected);
                prop_assert!(regions.iter().all(|region| read.intent.get(*region)));
                prop_assert!(lacking.iter().all(|block| read.dirty[&OTHERS[1]].get(*block)));
                let untouched = before.0.keys().all(|at| whole(*at));
                prop_assert!(!untouched || read.dirty[&OTHERS[1]].count() == lacking.len() as u64);
                prop_assert_eq!(read.notes.is_empty(), sound && read.damaged_pages == 0);
            }
            Err(ImageError::Superblock(_)) => prop_assert!(!whole(0) && !whole(4096)),
            Err(error) => panic!("{error}"),
        }
    }
}
