//! `connections`: whether several connections to a volume gain, and what two volumes take from each other.
//!
//! One cluster of two data nodes and a witness with two volumes, both served by n1, each on a reactor of its own.
//! All cases ([`cases`]) follow each other, the whole several times, so that what else the machine does falls on all of
//! them alike. Figures are medians of the rounds, ratios are within this one run. It asserts nothing.
//!
//! Three parts:
//! - `connections`: the load generator over 1, 2 and 4 connections, once with the same number of requests in flight in
//!   all, once with the same number on each connection;
//! - `nbdcopy`: the whole volume in and out over 1 and 4 connections;
//! - `volumes`: one volume alone, with a load on the other one, and with the same load on itself instead. The load
//!   generators take processors, too: the third case has them and only one volume, so it shows what of the second
//!   case is due to there being two.
//!
//! ```text
//! cases     what is measured, in which order, and what it is compared to
//! run       one run of each kind of case
//! idle      how much of the machine was idle
//! table     medians and ratios
//! ```

mod cases;
mod idle;
mod run;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::compare::{Place, Quiet, fill};
use crate::scale::bed::{Bed, PRIMARY, Target};

use cases::{Case, Part, What};
use run::{Sample, Stage};

/// Names of the volumes: the one that is measured, and the other one.
const VOLUMES: [&str; 2] = ["first", "second"];
const SECONDARY: &str = "n2";
/// Copies of a volume's size that a place has room for: two volumes with two replicas each, and some for logs.
const COPIES: u64 = 5;

/// What `connections` is to do.
#[derive(Clone, Debug)]
pub struct ConnectionsOptions {
    /// Rounds of every case.
    pub rounds: u8,
    /// Measured time of each run of the load generator.
    pub time: Duration,
    /// Only parts whose name contains one of these; all if there are none.
    pub only: Vec<String>,
    /// Where, each with a directory there.
    pub places: Vec<(Place, PathBuf)>,
    /// A directory in memory, for the file that nbdcopy copies in.
    pub memory_dir: PathBuf,
    /// Bytes of each volume.
    pub size: u64,
}

/// Names of the parts.
pub fn parts() -> impl Iterator<Item = &'static str> {
    Part::ALL.into_iter().map(Part::word)
}

/// Measures, printing what it does and a table for each place.
///
/// # Errors
/// If the options choose nothing, or nothing can be measured. A place that fails is left out with a line.
pub fn connections(options: &ConnectionsOptions) -> Result<()> {
    let quiet = Quiet::start();
    println!("{}", quiet.text());
    let cases = chosen_cases(&options.only)?;
    let mut measured = 0;
    for (place, base) in &options.places {
        match measure_place(*place, base, &cases, options) {
            Ok(samples) => {
                measured += samples.iter().filter(|runs| !runs.is_empty()).count();
                println!("\n{}", table::text(&heading(*place, options), &cases, &samples));
            }
            Err(reason) => println!("SKIPPED {}: {reason:#}", place.word()),
        }
    }
    ensure!(measured > 0, "nothing could be measured");
    Ok(())
}

fn heading(place: Place, options: &ConnectionsOptions) -> String {
    let (rounds, seconds, mib) = (options.rounds, options.time.as_secs_f64(), options.size >> 20);
    format!("{}: medians, rounds: {rounds}, {seconds} s each, volumes of {mib} MiB", place.word())
}

/// The cases of the parts that were asked for and can be measured here.
fn chosen_cases(only: &[String]) -> Result<Vec<Case>> {
    let is_wanted = |part: &Part| crate::is_chosen(part.word(), only);
    let known: Vec<_> = parts().collect();
    ensure!(
        Part::ALL.iter().any(is_wanted),
        "no part is named {}; there are {}",
        only.join(" or "),
        known.join(", ")
    );
    let mut cases = Vec::new();
    for part in Part::ALL.into_iter().filter(is_wanted) {
        match part.missing() {
            Some(reason) => println!("SKIPPED {}: {reason}", part.word()),
            None => cases.extend(part.cases()),
        }
    }
    Ok(cases)
}

/// All samples by case.
fn measure_place(
    place: Place,
    base: &Path,
    cases: &[Case],
    options: &ConnectionsOptions,
) -> Result<Vec<Vec<Sample>>> {
    place.check(base, COPIES * options.size)?;
    let bed = Bed::start(base, 2)?;
    let mut stage = set_up(&bed, options)?;
    if cases.iter().any(|case| matches!(case.what, What::Copy { .. })) {
        stage = stage.with_source(&options.memory_dir)?;
    }
    let mut samples = vec![Vec::new(); cases.len()];
    for round in 1..=options.rounds {
        println!("{}: round {round} of {}", place.word(), options.rounds);
        for (case, samples) in cases.iter().zip(&mut samples) {
            match stage.run(case.what) {
                Ok(sample) => samples.push(sample),
                Err(reason) => println!("  {} failed: {reason:#}", case.name),
            }
            place.settle(base);
        }
    }
    drop(stage);
    bed.stop()?;
    Ok(samples)
}

/// Both volumes, each written once as a whole, so that no space is allocated later.
fn set_up(bed: &Bed, options: &ConnectionsOptions) -> Result<Stage> {
    let volume = |name: &str| -> Result<Target> {
        let target = bed.volume(name, options.size, &[PRIMARY, SECONDARY])?;
        fill(&target.uri, options.size).with_context(|| format!("fill the volume {name}"))?;
        Ok(target)
    };
    let [first, second] = VOLUMES;
    Ok(Stage::new(volume(first)?, volume(second)?, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_chosen_by_a_part_of_their_name() {
        assert_eq!(chosen_cases(&["vol".to_owned()]).unwrap(), Part::Volumes.cases());
        let text = chosen_cases(&["nothing".to_owned()]).unwrap_err().to_string();
        assert!(text.contains("nothing") && text.contains("nbdcopy"), "{text}");
    }
}
