//! What can be chosen about a run besides its seed, and how it is written down.
//!
//! A kept scenario is one line of text, `seed=5 ops=200 faults=crash,move skip=3,4`; everything that is
//! not named is drawn from the seed.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::fault::{FaultKind, FaultSet};

/// Client operations of a run unless told otherwise.
pub const OPS_DEFAULT: u32 = 1000;

/// Choices that are not drawn from the seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Client operations that are to end.
    pub ops: u32,
    /// Kinds of faults that may be drawn.
    pub faults: FaultSet,
    /// Number of data nodes; drawn if not given.
    pub data_nodes: Option<u8>,
    /// Numbers of strikes in the schedule that are left out.
    pub skip: BTreeSet<u32>,
    /// Strikes from this number on are left out.
    pub strikes_max: u32,
    /// Kinds that strike for certain, whatever the seed says; for schedules that are to be likely.
    pub always: FaultSet,
    /// Keep a readable trace.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ops: OPS_DEFAULT,
            faults: FaultSet::ALL,
            data_nodes: None,
            skip: BTreeSet::new(),
            strikes_max: u32::MAX,
            always: FaultSet::NONE,
            trace: false,
        }
    }
}

/// A seed with its options: what a kept scenario says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// The rest.
    pub options: Options,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={}", self.seed)?;
        let o = &self.options;
        if o.ops != OPS_DEFAULT {
            write!(f, " ops={}", o.ops)?;
        }
        if let Some(n) = o.data_nodes {
            write!(f, " nodes={n}")?;
        }
        for (name, set, unsaid) in [("faults", o.faults, FaultSet::ALL), ("always", o.always, FaultSet::NONE)]
        {
            if set != unsaid {
                let names: Vec<_> = set.iter().map(FaultKind::name).collect();
                write!(f, " {name}={}", names.join(","))?;
            }
        }
        if !o.skip.is_empty() {
            let numbers: Vec<_> = o.skip.iter().map(u32::to_string).collect();
            write!(f, " skip={}", numbers.join(","))?;
        }
        if o.strikes_max != u32::MAX {
            write!(f, " strikes={}", o.strikes_max)?;
        }
        Ok(())
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut seed = None;
        let mut options = Options::default();
        for word in text.split_whitespace() {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("{word}: not NAME=VALUE"))?;
            let number = || value.parse::<u64>().map_err(|e| format!("{word}: {e}"));
            let small = || value.parse::<u32>().map_err(|e| format!("{word}: {e}"));
            match name {
                "seed" => seed = Some(number()?),
                "ops" => options.ops = small()?,
                "nodes" => options.data_nodes = Some(value.parse().map_err(|e| format!("{word}: {e}"))?),
                "faults" => options.faults = set(value)?,
                "always" => options.always = set(value)?,
                "strikes" => options.strikes_max = small()?,
                "skip" => {
                    let numbers = value.split(',').filter(|n| !n.is_empty()).map(str::parse::<u32>);
                    options.skip = numbers.collect::<Result<_, _>>().map_err(|e| format!("{word}: {e}"))?;
                }
                _ => return Err(format!("{name}: not known")),
            }
        }
        Ok(Self { seed: seed.ok_or("no seed is named")?, options })
    }
}

fn set(value: &str) -> Result<FaultSet, String> {
    let find = |name: &str| {
        FaultKind::ALL
            .iter()
            .copied()
            .find(|k| k.name() == name)
            .ok_or_else(|| format!("{name}: no such fault"))
    };
    let kinds: Vec<_> = value.split(',').filter(|n| !n.is_empty()).map(find).collect::<Result<_, _>>()?;
    Ok(FaultSet::of(&kinds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_reads_as_it_was_written() {
        for text in
            ["seed=5", "seed=7 ops=200 nodes=2 faults=crash,move skip=3,4 strikes=9", "seed=1 faults="]
        {
            let scenario: Scenario = text.parse().unwrap();
            assert_eq!(scenario.to_string(), text);
        }
        assert!("ops=5".parse::<Scenario>().is_err());
        assert!("seed=5 faults=typo".parse::<Scenario>().is_err());
    }
}
