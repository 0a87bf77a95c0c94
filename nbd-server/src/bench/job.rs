//! What a load does, and where each of its operations goes.
//!
//! Pure: the places follow from the seed alone. It knows no server and takes no time.

/// How places follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere in the area, at multiples of the block size.
    Random,
    /// One after the other, from the start again at the end; all connections share the walk.
    Sequential,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Where.
    pub pattern: Pattern,
    /// How many of 100 operations read; the others write.
    pub read_percent: u8,
    /// Bytes of each operation.
    pub block_size: u32,
    /// Every write carries FUA.
    pub fua: bool,
    /// Every write is followed by a flush; both together are one operation.
    pub flush_after_write: bool,
}

impl Default for Job {
    /// Random reads of 4 KiB.
    fn default() -> Self {
        Self {
            pattern: Pattern::Random,
            read_percent: 100,
            block_size: 4096,
            fua: false,
            flush_after_write: false,
        }
    }
}

impl Job {
    /// Whether any of its operations writes.
    #[must_use]
    pub fn writes(&self) -> bool {
        self.read_percent < 100
    }

    /// Whether any of its operations reads.
    #[must_use]
    pub fn reads(&self) -> bool {
        self.read_percent > 0
    }
}

/// The area in pieces with room between them, so that little is touched of much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Bytes of a piece: a multiple of the job's block size.
    pub piece: u64,
    /// Bytes from the start of a piece to the start of the next.
    pub distance: u64,
}

impl Spread {
    /// From the first byte to the end of the last piece of `area` bytes in all. The last piece counts as whole.
    #[must_use]
    pub fn reach(self, area: u64) -> u64 {
        let pieces = area.div_ceil(self.piece).max(1);
        (pieces - 1).saturating_mul(self.distance).saturating_add(self.piece)
    }

    /// Where a byte of the area lies, from the first one on.
    fn place(self, at: u64) -> u64 {
        at / self.piece * self.distance + at % self.piece
    }
}

/// Numbers that look random (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..below`, which is not 0.
    fn below(&mut self, below: u64) -> u64 {
        // The high half of the product: no division, and the bias of 2^-64 times the area is of no account.
        ((u128::from(self.next()) * u128::from(below)) >> 64) as u64
    }
}

/// One operation to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) reads: bool,
}

/// The operations of a job, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Places {
    job: Job,
    start: u64,
    blocks: u64,
    spread: Option<Spread>,
    cursor: u64,
    random: Random,
}

impl Places {
    /// The area holds at least one block.
    pub(super) fn new(job: Job, start: u64, area: u64, seed: u64) -> Self {
        let blocks = area / u64::from(job.block_size);
        assert!(blocks > 0, "an area of {area} bytes was let through for blocks of {}", job.block_size);
        Self { job, start, blocks, spread: None, cursor: 0, random: Random::new(seed) }
    }

    /// The same blocks, in pieces with room between them.
    pub(super) fn spread(self, spread: Option<Spread>) -> Self {
        Self { spread, ..self }
    }

    pub(super) fn next(&mut self) -> Place {
        let block = match self.job.pattern {
            Pattern::Random => self.random.below(self.blocks),
            Pattern::Sequential => {
                let block = self.cursor;
                self.cursor = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        let reads = match self.job.read_percent {
            0 => false,
            100 => true,
            percent => self.random.below(100) < u64::from(percent),
        };
        let at = block * u64::from(self.job.block_size);
        Place { offset: self.start + self.spread.map_or(at, |spread| spread.place(at)), reads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_are_whole_blocks_of_the_area_and_reach_all_of_it() {
        let mut places = Places::new(Job::default(), 8192, 10 * 4096 + 5, 7);
        let mut seen = [false; 10];
        for _ in 0..1000 {
            let place = places.next();
            let block = (place.offset - 8192) / 4096;
            assert_eq!(place.offset % 4096, 0);
            seen[usize::try_from(block).unwrap()] = true;
        }
        assert_eq!(seen, [true; 10]);
    }

    #[test]
    fn sequential_places_go_round() {
        let job = Job { pattern: Pattern::Sequential, block_size: 512, ..Job::default() };
        let mut places = Places::new(job, 100, 3 * 512, 1);
        let offsets: Vec<u64> = (0..5).map(|_| places.next().offset).collect();
        assert_eq!(offsets, [100, 612, 1124, 100, 612]);
    }

    #[test]
    fn a_spread_area_is_touched_in_its_pieces_alone() {
        let job = Job { pattern: Pattern::Sequential, ..Job::default() };
        let spread = Spread { piece: 8192, distance: 1 << 20 };
        let mut places = Places::new(job, 4096, 4 * 4096, 1).spread(Some(spread));
        let offsets: Vec<u64> = (0..5).map(|_| places.next().offset).collect();
        assert_eq!(offsets, [4096, 8192, 4096 + (1 << 20), 8192 + (1 << 20), 4096]);
        assert_eq!(spread.reach(4 * 4096), (1 << 20) + 8192);
        assert_eq!(spread.reach(8192), 8192);
    }

    #[test]
    fn a_mix_reads_as_often_as_it_says() {
        let mut places = Places::new(Job { read_percent: 70, ..Job::default() }, 0, 1 << 20, 3);
        let reads = (0..10_000).filter(|_| places.next().reads).count();
        assert!((6_800..7_200).contains(&reads), "{reads} of 10000");
    }

    #[test]
    fn the_seed_decides_the_places() {
        let take = |seed| {
            let mut places = Places::new(Job::default(), 0, 1 << 30, seed);
            (0..10).map(|_| places.next().offset).collect::<Vec<_>>()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
    }
}
