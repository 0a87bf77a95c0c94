//! The loads of `compare`.

use blkrepl_nbd::bench::{Job, Pattern};

/// A load and its name.
#[derive(Clone, Copy, Debug)]
pub(super) struct NamedJob {
    pub(super) name: &'static str,
    pub(super) job: Job,
    pub(super) depth: usize,
}

const RANDOM: Job =
    Job { pattern: Pattern::Random, read_percent: 0, block_size: 4096, fua: false, flush_after_write: false };
const FLUSHED: Job = Job { flush_after_write: true, ..RANDOM };
const READS: Job = Job { read_percent: 100, ..RANDOM };
const MIX: Job = Job { read_percent: 70, ..RANDOM };
const SEQUENTIAL: Job = Job { pattern: Pattern::Sequential, ..RANDOM };

/// All of them.
pub(super) const JOBS: [NamedJob; 9] = [
    NamedJob { name: "randwrite-4k-d1", job: RANDOM, depth: 1 },
    NamedJob { name: "randwrite-4k-d32", job: RANDOM, depth: 32 },
    NamedJob { name: "writeflush-4k-d1", job: FLUSHED, depth: 1 },
    NamedJob { name: "writeflush-4k-d16", job: FLUSHED, depth: 16 },
    NamedJob { name: "randread-4k-d1", job: READS, depth: 1 },
    NamedJob { name: "randread-4k-d32", job: READS, depth: 32 },
    NamedJob { name: "mix70-4k-d32", job: MIX, depth: 32 },
    NamedJob { name: "seqwrite-64k-d8", job: Job { block_size: 65_536, ..SEQUENTIAL }, depth: 8 },
    NamedJob { name: "seqwrite-1m-d4", job: Job { block_size: 1 << 20, ..SEQUENTIAL }, depth: 4 },
];
