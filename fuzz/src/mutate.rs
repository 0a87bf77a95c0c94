//! Inputs for the plain tests: seeds with random changes, and random bytes. Deterministic: one number gives
//! one sequence of inputs. No coverage is looked at; that is what libFuzzer is for.

/// A small generator of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

/// Numbers at which lengths, offsets and counts go wrong.
const EDGES: [u64; 16] = [
    0,
    1,
    7,
    8,
    64,
    255,
    4095,
    4096,
    65_536,
    (32 << 20) + 8192,
    u32::MAX as u64,
    1 << 34,
    1 << 61,
    1 << 62,
    i64::MAX as u64,
    u64::MAX,
];

impl Rng {
    /// The generator that `seed` names.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap_or(0)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    /// The next input: a changed one of `seeds`, now and then nothing but random bytes.
    #[must_use]
    pub fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        if seeds.is_empty() || self.below(16) == 0 {
            let len = self.below(700);
            return self.bytes(len);
        }
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            self.change(&mut input, seeds);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let rest = input.len() - at;
        match self.below(8) {
            0 if rest > 0 => input[at] ^= 1 << self.below(8),
            1 if rest > 0 => input[at] = self.next().to_le_bytes()[0],
            2 | 3 => self.overwrite(&mut input[at..]),
            4 if rest > 0 => drop(input.drain(at..at + 1 + self.below(rest.min(40)))),
            5 => {
                let len = 1 + self.below(20);
                let new = self.bytes(len);
                input.splice(at..at, new);
            }
            6 if rest > 0 => {
                let copied = input[at..at + 1 + self.below(rest.min(100))].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copied);
            }
            7 if self.below(4) == 0 => input.truncate(at),
            _ => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }

    /// A number of some width, of either byte order, at or next to an edge.
    fn overwrite(&mut self, bytes: &mut [u8]) {
        let width = [1, 2, 4, 8][self.below(4)];
        let near = [0, 1, u64::MAX][self.below(3)];
        let mut number = EDGES[self.below(EDGES.len())].wrapping_add(near).to_le_bytes()[..width].to_vec();
        if self.below(2) == 0 {
            number.reverse();
        }
        let len = width.min(bytes.len());
        bytes[..len].copy_from_slice(&number[..len]);
    }
}
