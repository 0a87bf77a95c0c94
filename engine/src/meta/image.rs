//! The whole metadata of one replica: made anew, or read from a file. The bytes come from and go to the
//! owner; nothing here opens anything.
//!
//! A new image is written with the superblock last: a stop in the middle leaves no superblock, so that
//! half-made metadata is never taken for whole.

use std::collections::BTreeMap;

use thiserror::Error;

use super::bitmap::PagedBitmap;
use super::layout::{Area, Layout};
use super::superblock::{SUPERBLOCK_LEN, Superblock, SuperblockCopy, SuperblockError, read_pair};
use crate::types::{ReplicaSlot, SuperblockTrust};

/// Reads from a metadata file: fills the buffer from the offset given, with zeroes for what lies beyond
/// the file's end. Offsets and lengths are multiples of 4096; a length is 1 MiB at most.
pub type ReadAt<'a, E> = &'a mut (dyn FnMut(u64, &mut [u8]) -> Result<(), E> + 'a);

/// Why an image could not be read.
#[derive(Debug, Error)]
pub enum ImageError<E> {
    /// The superblock cannot be used.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The reader failed.
    #[error("cannot read the {what} from the metadata file; check the disk that holds it")]
    Read {
        /// What was being read.
        what: String,
        /// The reader's error.
        source: E,
    },
}

/// All metadata of one replica.
#[derive(Clone, Debug)]
pub struct Image {
    /// The superblock that counts.
    pub superblock: Superblock,
    /// How far it can be trusted [R16]; never [`SuperblockTrust::None`].
    pub trust: SuperblockTrust,
    /// The intent map.
    pub intent: PagedBitmap,
    /// The dirty bitmaps for other replicas.
    pub dirty: BTreeMap<ReplicaSlot, PagedBitmap>,
    /// Pages that were damaged when read, and read all-set.
    pub damaged_pages: u32,
    /// What was found wrong, for people; one line each.
    pub notes: Vec<String>,
}

impl Image {
    /// Metadata of a replica that is just being made: intent map clear; the dirty bitmaps for the
    /// replicas in `slots_of_others` clear if all of them are known to hold the same zeroes
    /// (`base_zero`), else full. Nothing of it is on disk until [`Image::encode_all`] is carried out.
    ///
    /// # Panics
    /// If a slot is out of range.
    #[must_use]
    pub fn fresh(superblock: Superblock, slots_of_others: &[ReplicaSlot], base_zero: bool) -> Self {
        let (layout, volume) = (Layout::new(&superblock.geometry), superblock.volume);
        let (regions, blocks) = (superblock.geometry.regions(), superblock.geometry.blocks());
        let make = if base_zero { PagedBitmap::new_clear } else { PagedBitmap::new_full };
        let dirty = slots_of_others
            .iter()
            .map(|slot| (*slot, make(Area::Dirty(*slot), blocks, volume, &layout)))
            .collect();
        Self {
            trust: SuperblockTrust::Sound,
            intent: PagedBitmap::new_clear(Area::Intent, regions, volume, &layout),
            dirty,
            damaged_pages: 0,
            notes: Vec::new(),
            superblock,
        }
    }

    /// Reads all metadata, with the dirty bitmaps for the replicas in `slots`. Whether it belongs to the
    /// right cluster, volume, node and data object is for the caller to check.
    ///
    /// Groups that were damaged are unsaved afterwards: their bits read set, but they become durable
    /// only when the groups are written.
    ///
    /// # Errors
    /// [`ImageError::Superblock`] if no copy of the superblock can be used, [`ImageError::Read`] if
    /// `read_at` failed.
    ///
    /// # Panics
    /// If a slot is out of range.
    pub fn read<E>(read_at: ReadAt<'_, E>, slots: &[ReplicaSlot]) -> Result<Self, ImageError<E>> {
        let (superblock, trust, note) = read_superblock(read_at)?;
        let (layout, volume) = (Layout::new(&superblock.geometry), superblock.volume);
        let (regions, blocks) = (superblock.geometry.regions(), superblock.geometry.blocks());
        let mut notes: Vec<String> = note.into_iter().collect();
        let mut damaged_pages = 0_u32;
        let mut read = |area: Area, bits: u64| {
            let (bitmap, damaged) = PagedBitmap::decode(area, bits, volume, &layout, read_at)
                .map_err(|source| ImageError::Read { what: area.to_string(), source })?;
            if damaged > 0 {
                notes.push(format!("{area}: {damaged} damaged page(s) read all-set"));
                damaged_pages = damaged_pages.saturating_add(damaged);
            }
            Ok::<_, ImageError<E>>(bitmap)
        };
        let intent = read(Area::Intent, regions)?;
        let dirty = slots
            .iter()
            .map(|slot| Ok((*slot, read(Area::Dirty(*slot), blocks)?)))
            .collect::<Result<_, ImageError<E>>>()?;
        Ok(Self { superblock, trust, intent, dirty, damaged_pages, notes })
    }

    /// Everything, as writes in the order in which they must be made: every group of every bitmap in
    /// both of its slots, then the two copies of the superblock. The file must read zeroes before; all
    /// groups must be durable before the first superblock write, and that before the second (an offset
    /// below [`SUPERBLOCKS_END`] is a superblock write).
    ///
    /// Calling it takes the superblock's next sequence number.
    ///
    /// [`SUPERBLOCKS_END`]: super::SUPERBLOCKS_END
    pub fn encode_all(&mut self) -> impl Iterator<Item = (u64, Vec<u8>)> + use<'_> {
        let superblocks = self.superblock.advance();
        let bitmaps = std::iter::once(&mut self.intent).chain(self.dirty.values_mut());
        let groups = bitmaps.flat_map(|bitmap| {
            (0..bitmap.groups()).flat_map(|group| [group, group]).map(move |group| bitmap.encode_group(group))
        });
        groups.chain(superblocks)
    }

    /// Where everything lies in the file.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(&self.superblock.geometry)
    }
}

fn read_superblock<E>(
    read_at: ReadAt<'_, E>,
) -> Result<(Superblock, SuperblockTrust, Option<String>), ImageError<E>> {
    let mut copies = [[0; SUPERBLOCK_LEN]; 2];
    for (copy, bytes) in [SuperblockCopy::A, SuperblockCopy::B].into_iter().zip(&mut copies) {
        read_at(copy.offset(), bytes)
            .map_err(|source| ImageError::Read { what: format!("superblock copy {copy}"), source })?;
    }
    Ok(read_pair(&copies[0], &copies[1])?)
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
