//! A stretch of a volume whose bytes have one state.
//!
//! Plain data. Who makes it answers for its truth; nothing here looks at a disk.

/// A stretch of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not 0.
    pub len: u64,
    /// Takes no space on the primary, and reads as zeroes.
    pub hole: bool,
    /// A replica that is missing, or whose resync is not complete, lacks some of it.
    pub dirty: bool,
}
