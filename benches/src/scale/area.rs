//! Which blocks of a volume a load touches: few, and the same number whatever the size of the volume.

use blkrepl_nbd::bench::{BenchOptions, Spread};

/// Bytes that a load touches.
const TOUCHED: u64 = 16 << 20;
/// Size of an intent region.
const REGION: u64 = 1 << 20;

/// How the touched blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    /// 16 MiB in one piece in the middle of the volume: 16 intent regions.
    Hot,
    /// 16 MiB in 128 pieces at equal distances over the whole volume: 128 intent regions, all of which may be set.
    Spread,
    /// 16 MiB in 4096 single blocks at equal distances over the whole volume: more intent regions than may be
    /// set, so that some are cleared for others all the time.
    Scattered,
}

impl Area {
    pub(super) const ALL: [Self; 3] = [Self::Hot, Self::Spread, Self::Scattered];

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Spread => "spread",
            Self::Scattered => "scattered",
        }
    }

    /// Bytes of a piece, if there are several.
    fn piece(self) -> Option<u64> {
        match self {
            Self::Hot => None,
            Self::Spread => Some(TOUCHED / 128),
            Self::Scattered => Some(4096),
        }
    }

    /// Points a load at this area of a volume.
    pub(super) fn apply(self, volume_size: u64, options: &mut BenchOptions) {
        options.area = Some(TOUCHED);
        match self.piece() {
            None => options.offset = volume_size / 2 / REGION * REGION,
            Some(piece) => {
                let distance = volume_size / (TOUCHED / piece) / 4096 * 4096;
                options.spread = Some(Spread { piece, distance });
            }
        }
    }

    /// Blocks of 4 KiB that are touched.
    pub(super) fn blocks() -> u64 {
        TOUCHED / 4096
    }
}

#[cfg(test)]
mod tests {
    use blkrepl_nbd::bench::Job;

    use super::*;

    #[test]
    fn every_area_fits_every_volume_and_spreads_over_it() {
        for size in [1 << 30, 1 << 36, 1 << 40, 1 << 44] {
            for area in Area::ALL {
                let mut options = BenchOptions::new(Job::default(), 1);
                area.apply(size, &mut options);
                let reach = options.spread.map_or(TOUCHED, |spread| spread.reach(TOUCHED));
                assert!(options.offset + reach <= size, "{area:?} of {size}");
                assert!(area == Area::Hot || reach > size / 2, "{area:?} of {size}");
            }
        }
    }
}
