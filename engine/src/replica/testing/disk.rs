//! A disk with a volatile cache: what completed is visible, what was flushed (or written durably)
//! survives power loss. Metadata writes are durable on completion; one in flight at a crash lands whole,
//! in part (per 512-byte page), or not at all.

use std::collections::BTreeMap;

use crate::types::{BlockIndex, BlockRange};

use super::super::io::Stretch;
use super::Rng;

#[derive(Debug, Clone)]
pub(in super::super) struct TestDisk {
    pub(in super::super) data: Vec<u64>,
    pub(in super::super) stable: Vec<u64>,
    pub(in super::super) meta: BTreeMap<u64, Vec<u8>>,
    /// Blocks that can't be read.
    pub(in super::super) bad: Vec<u64>,
    /// Writing them does not mend them.
    pub(in super::super) bad_for_good: bool,
    pub(in super::super) write_error: bool,
    pub(in super::super) flush_error: bool,
}

impl TestDisk {
    pub(in super::super) fn new(blocks: u64) -> Self {
        let blocks = usize::try_from(blocks).unwrap();
        Self {
            data: vec![0; blocks],
            stable: vec![0; blocks],
            meta: BTreeMap::new(),
            bad: Vec::new(),
            bad_for_good: false,
            write_error: false,
            flush_error: false,
        }
    }

    pub(in super::super) fn write_meta(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!((offset % 4096, bytes.len() % 4096), (0, 0), "metadata writes are aligned");
        for (n, group) in bytes.chunks(4096).enumerate() {
            self.meta.insert(offset + n as u64 * 4096, group.to_vec());
        }
    }

    /// A crash in the middle of a metadata write.
    pub(in super::super) fn tear_meta(&mut self, offset: u64, bytes: &[u8], rng: &mut Rng) {
        let old = self.meta.get(&offset).cloned().unwrap_or_else(|| vec![0; 4096]);
        let mut new = old;
        for page in 0..8 {
            if rng.chance(50) {
                new[page * 512..][..512].copy_from_slice(&bytes[page * 512..][..512]);
            }
        }
        self.meta.insert(offset, new);
    }

    pub(in super::super) fn read_meta(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        for (n, byte) in out.iter_mut().enumerate() {
            let at = offset + n as u64;
            if let Some(group) = self.meta.get(&(at / 4096 * 4096)) {
                *byte = group[usize::try_from(at % 4096).unwrap()];
            }
        }
    }

    /// Good blocks of zeroes are holes; what is bad takes space.
    pub(in super::super) fn stretches(&self, blocks: BlockRange) -> Vec<Stretch> {
        let hole = |b: BlockIndex| self.data[usize::try_from(b.0).unwrap()] == 0 && !self.bad.contains(&b.0);
        let holes: Vec<bool> = blocks.iter().map(hole).collect();
        let runs = holes.chunk_by(|a, b| a == b);
        runs.map(|run| Stretch { count: run.len() as u64, hole: run[0] }).collect()
    }

    /// Power loss: of what was not stable, a random part is gone.
    pub(in super::super) fn lose_power(&mut self, rng: &mut Rng) {
        for n in 0..self.data.len() {
            if self.data[n] != self.stable[n] {
                if rng.chance(50) {
                    self.data[n] = self.stable[n];
                } else {
                    self.stable[n] = self.data[n];
                }
            }
        }
    }
}
