//! Which faults a seed turns on, how often they come, and for how long. Each kind may be off.

use crate::clock::{MS, S, Time};
use crate::rng::Rng;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    Kill,
    Power,
    PowerAll,
    Pause,
    CutOneWay,
    CutBoth,
    Isolate,
    Slow,
    Reset,
    /// Segments that arrive changed, all the time.
    Damage,
    /// Clocks that differ by up to 1 %.
    Drift,
    DiskFails,
    DiskCut,
    DiskFull,
    DiskUnreadable,
    DiskSlow,
    Sick,
    StoreLost,
    StoreRolledBack,
    Recovered,
}

impl Fault {
    const ALL: [Self; 20] = [
        Self::Kill,
        Self::Power,
        Self::PowerAll,
        Self::Pause,
        Self::CutOneWay,
        Self::CutBoth,
        Self::Isolate,
        Self::Slow,
        Self::Reset,
        Self::Damage,
        Self::Drift,
        Self::DiskFails,
        Self::DiskCut,
        Self::DiskFull,
        Self::DiskUnreadable,
        Self::DiskSlow,
        Self::Sick,
        Self::StoreLost,
        Self::StoreRolledBack,
        Self::Recovered,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Power => "power",
            Self::PowerAll => "power of all",
            Self::Pause => "pause",
            Self::CutOneWay => "cut one way",
            Self::CutBoth => "cut",
            Self::Isolate => "isolate",
            Self::Slow => "slow link",
            Self::Reset => "reset",
            Self::Damage => "damage",
            Self::Drift => "drift",
            Self::DiskFails => "disk fails",
            Self::DiskCut => "power in a sync",
            Self::DiskFull => "disk full",
            Self::DiskUnreadable => "disk unreadable",
            Self::DiskSlow => "slow disk",
            Self::Sick => "sick replica",
            Self::StoreLost => "store lost",
            Self::StoreRolledBack => "store rolled back",
            Self::Recovered => "recovered alone",
        }
    }
}

/// What a run is to suffer.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    on: Vec<Fault>,
    forces: bool,
    pause_min: Time,
    pause_max: Time,
    damage: u64,
    /// How long faults come.
    pub(crate) length: Time,
}

impl Plan {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let share = rng.pick(&[0, 100, 300, 300, 500, 700]);
        let mut on: Vec<Fault> = Fault::ALL.into_iter().filter(|_| rng.chance(share)).collect();
        on.sort_unstable();
        let damage = if on.contains(&Fault::Damage) { rng.pick(&[100, 1000, 10_000]) } else { 0 };
        let pause_min = rng.pick(&[20 * MS, 100 * MS, 300 * MS]);
        let pause_max = pause_min * rng.pick(&[4, 20, 40]);
        let length = rng.between(10 * S, 40 * S);
        Self { on, forces: rng.chance(400), pause_min, pause_max, damage, length }
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.on.contains(&fault)
    }

    pub(crate) fn has_forces(&self) -> bool {
        self.forces
    }

    /// Damaged segments per million.
    pub(crate) fn damage(&self) -> u64 {
        self.damage
    }

    pub(crate) fn next(&self, rng: &mut Rng) -> Option<Fault> {
        let rare = |f: Fault| matches!(f, Fault::PowerAll | Fault::StoreLost | Fault::Recovered);
        let fault = if self.on.is_empty() { return None } else { rng.pick(&self.on) };
        (!rare(fault) || rng.chance(200)).then_some(fault)
    }

    /// Time until the next fault.
    pub(crate) fn pause(&self, rng: &mut Rng) -> Time {
        rng.skewed(self.pause_min, self.pause_max)
    }

    /// No more faults.
    pub(crate) fn end(&mut self) {
        self.on.clear();
        self.forces = false;
        self.damage = 0;
    }
}
