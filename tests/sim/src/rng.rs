//! The one source of chance: splitmix64, written out here so that a seed means the same run for ever,
//! whatever a crate does. Never reads a clock or the system's randomness.

/// Numbers that follow from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(seed ^ 0x6a09_e667_f3bc_c908);
        rng.next();
        rng
    }

    /// A stream of its own, so that one part of the simulator drawing more does not change another.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not zero. The bias is of no importance here.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Between both, inclusive.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True `permille` times of a thousand.
    pub(crate) fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// True `ppm` times of a million.
    pub(crate) fn rare(&mut self, ppm: u64) -> bool {
        self.below(1_000_000) < ppm
    }

    /// One of them.
    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).expect("an index of a slice")]
    }

    /// Mostly short, sometimes long: between `low` and `high`, every factor of two as likely as the next.
    pub(crate) fn skewed(&mut self, low: u64, high: u64) -> u64 {
        let steps = u64::from((high / low.max(1)).max(1).ilog2());
        let base = low << self.below(steps + 1);
        self.between(base, (base * 2).min(high).max(base)).min(high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_numbers_for_ever() {
        let mut rng = Rng::new(1);
        let first = [rng.next(), rng.next()];
        assert_eq!(first, [15_854_718_752_513_223_404, 587_234_269_635_191_198]);
        assert_ne!(Rng::new(2).next(), first[0]);
    }

    #[test]
    fn skewed_numbers_stay_within_their_bounds() {
        let mut rng = Rng::new(3);
        for _ in 0..1000 {
            assert!((50..=3000).contains(&rng.skewed(50, 3000)));
        }
    }
}
