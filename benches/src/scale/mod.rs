//! `scale`: what blkrepl costs as volumes grow, as more is in flight, dirty, or served at once.
//!
//! Real clusters through the harness, on files that are sparse and lie on a tmpfs unless another directory is
//! given: what is measured is the program, not a disk. Little is ever touched ([`area`]), so that memory of the
//! machine is no part of the figures. Parts run one after the other, each on clusters of its own. It asserts nothing.
//!
//! ```text
//! bed       a cluster under measurement: volumes, loads, memory
//! area      which blocks of a volume are touched
//! chart     a picture of lines as SVG
//! report    charts and single numbers: text, JSON, pictures
//! size      latency, CPU and memory against volume size
//! depth     latency against requests in flight
//! dirty     memory and latency against how much a missing peer lacks
//! volumes   memory and latency against the number of volumes; 256 connections
//! crash     time until served again after the death of all nodes
//! exchange  bytes of a dirty bitmap on the wire
//! ```

mod area;
pub(crate) mod bed;
mod chart;
mod crash;
mod depth;
mod dirty;
mod exchange;
mod report;
mod size;
mod volumes;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use report::Report;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// What `scale` is to do.
#[derive(Clone, Debug)]
pub struct ScaleOptions {
    /// Only parts whose name contains one of these; all if there are none.
    pub only: Vec<String>,
    /// Smaller and fewer of everything: whether it works, not what comes out.
    pub quick: bool,
    /// Where the clusters' files lie.
    pub dir: PathBuf,
    /// Directory for the pictures, which exists.
    pub pictures: Option<PathBuf>,
    /// File for the figures as JSON.
    pub json: Option<PathBuf>,
    /// Measured time of each load, in several rounds.
    pub time: Duration,
}

type Part = fn(&ScaleOptions, &mut Report) -> Result<()>;

/// All parts, in the order in which they run.
const PARTS: [(&str, Part); 6] = [
    ("size", size::measure),
    ("depth", depth::measure),
    ("dirty", dirty::measure),
    ("volumes", volumes::measure),
    ("crash", crash::measure),
    ("exchange", exchange::measure),
];

/// Names of the parts.
pub fn parts() -> impl Iterator<Item = &'static str> {
    PARTS.iter().map(|(name, _)| *name)
}

/// Measures, printing what it does and what comes out.
///
/// # Errors
/// If no part can be measured, or the results cannot be written. A part that fails is left out with a line.
pub fn scale(options: &ScaleOptions) -> Result<()> {
    let mut report = Report::default();
    for (name, part) in PARTS.into_iter().filter(|(name, _)| crate::is_chosen(name, &options.only)) {
        println!("== {name}");
        let mut found = Report::default();
        match part(options, &mut found) {
            Ok(()) => println!("{}", found.text()),
            Err(reason) => println!("SKIPPED {name}: {reason:#}"),
        }
        report.append(found);
    }
    ensure!(!report.is_empty(), "nothing could be measured");
    if let Some(dir) = &options.pictures {
        report.write_pictures(dir)?;
        println!("pictures are in {}", dir.display());
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.json(options))?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
        println!("figures are in {}", path.display());
    }
    Ok(())
}
