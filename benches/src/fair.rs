//! `fair`: what a client with one request in flight notices of another one on the same volume.
//!
//! One cluster of two data nodes and a witness, one volume. The well-behaved client is the load generator; it is
//! measured alone, and beside
//! - a greedy one: the load generator with as many requests in flight as it knows;
//! - one that asks for much, and never reads an answer: thousands of small reads on one connection, and the largest
//!   reads on another;
//! - one that sends one byte a second: of a request's header on one connection, of the largest write on another.
//!
//! Figures are medians of the rounds; ratios are to the same load alone. It asserts nothing.

use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_nbd::bench::{BenchOptions, BenchReport, DEPTH_MAX, Job, run};
use blkrepl_nbd::proto::{NBD_CMD_READ, NBD_CMD_WRITE, PAYLOAD_MAX_DEFAULT, RequestHeader};
use blkrepl_nbd::{ClientOptions, connect_raw};

use crate::compare::{Cell, Place, Quiet, WARM_UP, fill, median, ratio, shown};
use crate::scale::bed::{Bed, PRIMARY, Target, WRITES};

const VOLUME: &str = "shared";
const SECONDARY: &str = "n2";
/// Copies of the volume's size that a place has room for: two replicas, and some for logs.
const COPIES: u64 = 3;
/// The other client is at work alone for so long before and after the one that is measured.
const MARGIN: Duration = Duration::from_millis(500);
/// Small reads whose answers nobody takes.
const UNREAD: u64 = 4000;
/// Time between two bytes of the slow one.
const BYTE_PAUSE: Duration = Duration::from_secs(1);
const READS: Job = Job { read_percent: 100, ..WRITES };

/// What `fair` is to do.
#[derive(Clone, Debug)]
pub struct FairOptions {
    /// Rounds of every case.
    pub rounds: u8,
    /// Measured time of each run.
    pub time: Duration,
    /// Where, each with a directory there.
    pub places: Vec<(Place, PathBuf)>,
    /// Bytes of the volume.
    pub size: u64,
}

/// Who else there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Nobody,
    Greedy(Job),
    Deaf,
    Slow,
}

const OTHERS: [(&str, Other); 5] = [
    ("alone", Other::Nobody),
    ("greedy reads", Other::Greedy(READS)),
    ("greedy writes", Other::Greedy(WRITES)),
    ("never reads answers", Other::Deaf),
    ("one byte a second", Other::Slow),
];

/// Figures of one run, and what the other one got, if it got something.
#[derive(Clone, Copy, Debug)]
struct Sample {
    cell: Cell,
    other_iops: Option<f64>,
}

/// Measures, printing what it does and a table for each place.
///
/// # Errors
/// If nothing can be measured. A place that fails is left out with a line.
pub fn fair(options: &FairOptions) -> Result<()> {
    let quiet = Quiet::start();
    println!("{}", quiet.text());
    let mut measured = 0;
    for (place, base) in &options.places {
        match measure(*place, base, options) {
            Ok(text) => {
                measured += 1;
                println!("\n{text}");
            }
            Err(reason) => println!("SKIPPED {}: {reason:#}", place.word()),
        }
    }
    ensure!(measured > 0, "nothing could be measured");
    Ok(())
}

fn measure(place: Place, base: &Path, options: &FairOptions) -> Result<String> {
    place.check(base, COPIES * options.size)?;
    let bed = Bed::start(base, 2)?;
    let target = bed.volume(VOLUME, options.size, &[PRIMARY, SECONDARY])?;
    fill(&target.uri, options.size).context("fill the volume")?;
    let loads = [("4 KiB random reads", READS), ("4 KiB random writes", WRITES)];
    let mut samples = vec![[const { Vec::new() }; OTHERS.len()]; loads.len()];
    for round in 1..=options.rounds {
        println!("{}: round {round} of {}", place.word(), options.rounds);
        for ((_, job), samples) in loads.iter().zip(&mut samples) {
            for ((name, other), samples) in OTHERS.iter().zip(samples) {
                match beside(&target, *job, *other, options.time) {
                    Ok(sample) => samples.push(sample),
                    Err(reason) => println!("  {name} failed: {reason:#}"),
                }
                place.settle(base);
            }
        }
    }
    bed.stop()?;
    let heading = format!(
        "{}: one request in flight, medians of {} rounds, {} s each, a volume of {} MiB",
        place.word(),
        options.rounds,
        options.time.as_secs_f64(),
        options.size >> 20
    );
    Ok(loads.iter().zip(&samples).fold(heading, |text, ((name, _), samples)| text + &table(name, samples)))
}

/// One run of the well-behaved client beside the other one.
fn beside(target: &Target, job: Job, other: Other, time: Duration) -> Result<Sample> {
    let load = || -> Result<BenchReport> {
        Ok(run(&target.uri, &BenchOptions { warm_up: WARM_UP, ..target.options(job, 1, time) })?)
    };
    match other {
        Other::Nobody => Ok(Sample { cell: Cell::of(&load()?), other_iops: None }),
        Other::Greedy(job) => {
            let options = BenchOptions {
                warm_up: MARGIN,
                seed: 2,
                pids: Vec::new(),
                ..target.options(job, DEPTH_MAX, time + WARM_UP + MARGIN)
            };
            std::thread::scope(|scope| {
                let greedy = scope.spawn(|| run(&target.uri, &options));
                std::thread::sleep(MARGIN);
                let report = load();
                let greedy = greedy.join().map_err(|_| anyhow!("the greedy client panicked"))?;
                let other_iops = Some(greedy.context("the greedy client")?.iops());
                Ok(Sample { cell: Cell::of(&report?), other_iops })
            })
        }
        Other::Deaf => {
            let _small = connect_and_send(target, &small_reads())?;
            let _large = connect_and_send(target, &large_reads())?;
            std::thread::sleep(MARGIN);
            Ok(Sample { cell: Cell::of(&load()?), other_iops: None })
        }
        Other::Slow => {
            let header = connect_and_send(target, &[])?;
            let payload = connect_and_send(target, &large(NBD_CMD_WRITE, 0))?;
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| trickle(&[header, payload], &stop));
                std::thread::sleep(MARGIN);
                let report = load();
                stop.store(true, Ordering::SeqCst);
                Ok(Sample { cell: Cell::of(&report?), other_iops: None })
            })
        }
    }
}

fn small_reads() -> Vec<u8> {
    let read =
        |handle| RequestHeader { flags: 0, command: NBD_CMD_READ, handle, offset: handle * 4096, len: 4096 };
    (0..UNREAD).flat_map(|n| read(n).encode()).collect()
}

fn large(command: u16, handle: u64) -> Vec<u8> {
    RequestHeader { flags: 0, command, handle, offset: 0, len: PAYLOAD_MAX_DEFAULT }.encode().to_vec()
}

fn large_reads() -> Vec<u8> {
    (0..8).flat_map(|handle| large(NBD_CMD_READ, handle)).collect()
}

/// A connection on which these bytes were sent, as far as its socket takes them.
fn connect_and_send(target: &Target, mut bytes: &[u8]) -> Result<OwnedFd> {
    let (socket, _) = connect_raw(&target.uri, ClientOptions::default())?;
    while !bytes.is_empty() {
        match rustix::io::write(&socket, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => return Err(error).context("send requests"),
        }
    }
    Ok(socket)
}

/// Sends the bytes of a request's header, one at a time, until told to stop.
fn trickle(sockets: &[OwnedFd], stop: &AtomicBool) {
    let header = large(NBD_CMD_READ, 1);
    let mut next = Instant::now();
    for byte in header.iter().cycle() {
        while Instant::now() < next {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        next += BYTE_PAUSE;
        // A connection that the server has closed gets no more; that is the server's good right.
        for socket in sockets {
            let _closed = rustix::io::write(socket, &[*byte]);
        }
    }
}

fn table(load: &str, samples: &[Vec<Sample>; OTHERS.len()]) -> String {
    let mut out = format!(
        "\n\n{load}\n{:<20} {:>9} {:>6} {:>9} {:>6} {:>9} {:>6} {:>10}\n",
        "beside", "per s", "x", "p50 us", "x", "p99 us", "x", "other per s"
    );
    let medians = |runs: &Vec<Sample>| Cell::median(&runs.iter().map(|run| run.cell).collect::<Vec<_>>());
    let alone = medians(&samples[0]);
    for ((name, _), runs) in OTHERS.iter().zip(samples) {
        let cell = medians(runs);
        let of = |value: fn(&Cell) -> f64| {
            let (mine, base) = (cell.as_ref().map(value), alone.as_ref().map(value));
            (mine, ratio(mine, base))
        };
        let ((rate, rate_x), (p50, p50_x), (p99, p99_x)) =
            (of(|c| c.iops), of(|c| c.p50_us), of(|c| c.p99_us));
        let other = median(runs.iter().filter_map(|run| run.other_iops).collect());
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{name:<20} {:>9} {:>6} {:>9} {:>6} {:>9} {:>6} {:>10}",
            shown(rate, 0),
            shown(rate_x, 2),
            shown(p50, 1),
            shown(p50_x, 2),
            shown(p99, 1),
            shown(p99_x, 2),
            shown(other, 0)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_compared_to_the_client_alone() {
        let sample = |iops: f64, other_iops| Sample {
            cell: Cell { iops, mb_per_s: 1.0, p50_us: 1e6 / iops, p99_us: 2e6 / iops, cpu_us: None },
            other_iops,
        };
        let mut samples = [const { Vec::new() }; OTHERS.len()];
        samples[0] = vec![sample(1000.0, None)];
        samples[1] = vec![sample(250.0, Some(90_000.0))];
        let text = table("reads", &samples);
        let words: Vec<&str> = text.lines().nth(5).unwrap().split_whitespace().collect();
        assert_eq!(
            words,
            ["greedy", "reads", "250", "0.25", "4000.0", "4.00", "8000.0", "4.00", "90000"],
            "{text}"
        );
    }
}
