//! `ways`: what other ways of using io_uring would gain the hot path, each measured by itself.
//!
//! One connected pair of TCP sockets on loopback, a peer in a thread of its own, and one way after the other to
//! receive, to send and to wait; and a file that blocks are written to ([`Way`]). All ways follow each other, the whole
//! several times; figures are medians of the rounds, ratios are to the way that the reactor takes, within this one run.
//! Processor time is that of the measured side, threads of the kernel on its behalf included. It asserts nothing.
//!
//! ```text
//! way       the ways, and the messages that each is measured with
//! link      the pair, the peer, the clocks
//! ring      a ring with the memory that its operations use
//! receive   one receive after the other; one that stays, into provided buffers
//! send      with and without the kernel's copy
//! wait      asleep, spinning, with a kernel thread that submits
//! write     blocks to a file, with what may be registered
//! ```

mod link;
mod receive;
mod ring;
mod send;
mod wait;
mod way;
mod write;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::compare::{Quiet, median};
use link::Sample;
use way::Way;

/// What `ways` is to do.
#[derive(Clone, Debug)]
pub struct WaysOptions {
    /// Rounds of every way.
    pub rounds: u8,
    /// About how long each run takes.
    pub time: Duration,
    /// Only ways whose name contains one of these; all if there are none.
    pub only: Vec<String>,
    /// A directory on a disk, for what is written to one.
    pub disk_dir: PathBuf,
    /// A directory on a tmpfs.
    pub tmpfs_dir: PathBuf,
}

/// Measures, printing what it does and a table.
///
/// # Errors
/// If the options choose nothing. A way that this kernel does not have is left out with a line.
pub fn ways(options: &WaysOptions) -> Result<()> {
    let quiet = Quiet::start();
    println!("{}", quiet.text());
    let ways: Vec<Way> = Way::all().filter(|way| crate::is_chosen(&way.name(), &options.only)).collect();
    ensure!(!ways.is_empty(), "no way has such a name; --list prints them");
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); ways.len()];
    for round in 0..options.rounds {
        for (way, samples) in ways.iter().zip(&mut samples) {
            match way.run(options) {
                Ok(sample) => samples.push(sample),
                Err(reason) if round == 0 => println!("left out: {}: {reason:#}", way.name()),
                Err(reason) => return Err(reason),
            }
        }
    }
    println!("\n{}", table(&ways, &samples));
    Ok(())
}

/// Names of all ways.
pub fn names() -> impl Iterator<Item = String> {
    Way::all().map(|way| way.name())
}

fn table(ways: &[Way], samples: &[Vec<Sample>]) -> String {
    let mut text = format!(
        "{:<44} {:>10} {:>10} {:>8} {:>8} {:>8}\n",
        "way", "us each", "us of CPU", "enters", "x time", "x CPU"
    );
    let mut first: Option<(String, f64, f64)> = None;
    for (way, samples) in ways.iter().zip(samples) {
        let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure).collect());
        let (Some(time), Some(cpu), Some(enters)) =
            (of(|s| s.micros), of(|s| s.cpu_micros), of(|s| s.enters))
        else {
            continue;
        };
        let group = way.group();
        if first.as_ref().is_none_or(|(of, ..)| *of != group) {
            first = Some((group, time, cpu));
        }
        let (_, base, base_cpu) = first.as_ref().expect("it was just set");
        let ratios = format!("{:>8.2} {:>8.2}", time / base, cpu / base_cpu);
        writeln!(text, "{:<44} {time:>10.2} {cpu:>10.2} {enters:>8.2} {ratios}", way.name())
            .expect("a string takes all");
    }
    text
}
