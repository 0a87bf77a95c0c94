//! Metadata of one replica: superblock, intent map, dirty bitmaps - in memory and as bytes.
//!
//! Pure: nothing here reads or writes a file, reads a clock, draws a random number or keeps a
//! thread. The owner hands in bytes and carries out the writes that come out, each a whole 4 KiB at
//! a 4 KiB offset. Byte layout, and why it is so: docs/metadata-format.md.
//!
//! Invariants that the module holds:
//! - Damage never shrinks a set: what cannot be read as written reads all-set (design 6, invariant 9).
//! - A write that lands in part (any pages of it, in any order) leaves every page as it was before or
//!   as it was to become, or damaged - and then it reads all-set.
//! - Nothing read from disk can panic or size an allocation: sizes come from a checked [`Geometry`].
//!
//! What it relies on its owner for:
//! - **One write per group at a time.** After [`PagedBitmap::encode_group`] the same group is encoded
//!   again only when that write has completed. Two writes of one group in flight may both end in one
//!   slot, and the older one last.
//! - **A superblock's second copy is written only when the first is durable** [R16].
//! - A metadata file is made from nothing: it reads zeroes before [`Image::encode_all`] is carried out.
//!
//! [`Geometry`]: crate::types::Geometry

#![deny(clippy::cast_possible_truncation)]

mod bitmap;
mod bitmap_disk;
mod coarse;
mod group;
mod image;
mod layout;
mod page;
mod superblock;

pub use bitmap::{PagedBitmap, RunOutside};
pub use coarse::coarse_runs;
pub use image::{Image, ImageError, ReadAt};
pub use layout::{Area, AreaLayout, GROUP_BITS, Layout, META_GROUP_LEN, META_PAGE_LEN, PAGES_PER_GROUP};
#[cfg(test)]
pub(crate) use superblock::tests::blank;
pub use superblock::{
    CHAIN_MAX, CleanMark, DataIdentity, SUPERBLOCK_LEN, SUPERBLOCK_VERSION, SUPERBLOCKS_END, Superblock,
    SuperblockCopy, SuperblockError, read_pair,
};
