//! The course of a run: warm-up, measurement, end; and what is counted in it.
//!
//! An operation counts if it was answered within the measurement, whenever it began: so the rate is right
//! from the first moment on. The clock is read by the caller, once for all replies of one receive.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::cpu::{CpuMeter, CpuSample};
use super::job::{Place, Places};
use super::report::{BenchReport, LatencyReport};
use super::{BenchOptions, usage};
use crate::client::NbdError;

/// Longest latency that is told apart from longer ones.
const LATENCY_MAX_NS: u64 = 120_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measuring,
    /// What is in flight is waited for and not counted; nothing new starts.
    Ending,
}

pub(super) struct Recorder {
    phase: Phase,
    /// When the present phase ends.
    until: Instant,
    time: Duration,
    count_max: u64,
    block_size: u64,
    places: Places,
    reads: Histogram<u64>,
    writes: Histogram<u64>,
    began: Instant,
    ended: Instant,
    meter: CpuMeter,
    cpu_before: Option<CpuSample>,
    cpu: Option<Duration>,
}

impl Recorder {
    pub(super) fn new(options: &BenchOptions, places: Places, meter: CpuMeter) -> Result<Self, NbdError> {
        let histogram = || {
            Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).map_err(|e| usage(format!("no histogram: {e}")))
        };
        let now = Instant::now();
        let mut recorder = Self {
            phase: Phase::WarmUp,
            until: now + options.warm_up,
            time: options.time,
            count_max: options.count.unwrap_or(u64::MAX),
            block_size: u64::from(options.job.block_size),
            places,
            reads: histogram()?,
            writes: histogram()?,
            began: now,
            ended: now,
            meter,
            cpu_before: None,
            cpu: None,
        };
        if options.warm_up.is_zero() {
            recorder.begin()?;
        }
        Ok(recorder)
    }

    /// The next operation, unless the run is at its end.
    pub(super) fn next_place(&mut self) -> Option<Place> {
        (self.phase != Phase::Ending).then(|| self.places.next())
    }

    /// An operation that began at `started` was answered before `now`.
    pub(super) fn answered(&mut self, reads: bool, started: Instant, now: Instant) {
        if self.phase != Phase::Measuring {
            return;
        }
        let nanos = u64::try_from(now.saturating_duration_since(started).as_nanos()).unwrap_or(u64::MAX);
        let histogram = if reads { &mut self.reads } else { &mut self.writes };
        histogram.saturating_record(nanos.max(1));
    }

    /// Looks at the clock: begins and ends the measurement. Called once per receive, after its replies.
    pub(super) fn tick(&mut self, now: Instant) -> Result<(), NbdError> {
        match self.phase {
            Phase::WarmUp if now >= self.until => self.begin(),
            Phase::Measuring if now >= self.until || self.operations() >= self.count_max => self.end(now),
            _ => Ok(()),
        }
    }

    fn begin(&mut self) -> Result<(), NbdError> {
        self.cpu_before = Some(self.meter.sample()?);
        self.phase = Phase::Measuring;
        self.began = Instant::now();
        self.until = self.began + self.time;
        Ok(())
    }

    fn end(&mut self, now: Instant) -> Result<(), NbdError> {
        self.phase = Phase::Ending;
        self.ended = now;
        if let Some(before) = self.cpu_before.as_ref().filter(|_| !self.meter.is_empty()) {
            self.cpu = Some(self.meter.sample()?.since(before));
        }
        Ok(())
    }

    fn operations(&self) -> u64 {
        self.reads.len() + self.writes.len()
    }

    pub(super) fn report(&self, area: u64) -> BenchReport {
        let mut all = self.reads.clone();
        // Both have the same bounds.
        all.add(&self.writes).expect("histograms of the same bounds add up");
        let some = |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| LatencyReport::of(histogram));
        BenchReport {
            operations: self.operations(),
            reads: self.reads.len(),
            time: self.ended.saturating_duration_since(self.began),
            bytes: self.operations() * self.block_size,
            area,
            latency: LatencyReport::of(&all),
            read_latency: some(&self.reads),
            write_latency: some(&self.writes),
            server_cpu: self.cpu,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::Job;
    use super::*;

    fn recorder(warm_up: u64, time: u64, count: Option<u64>) -> Recorder {
        let warm_up = Duration::from_secs(warm_up);
        let options = BenchOptions {
            warm_up,
            time: Duration::from_secs(time),
            count,
            ..BenchOptions::new(Job::default(), 1)
        };
        let places = Places::new(options.job, 0, 1 << 20, 1);
        Recorder::new(&options, places, CpuMeter::new(&[]).unwrap()).unwrap()
    }

    #[test]
    fn only_what_is_answered_in_the_measurement_counts() {
        let mut recorder = recorder(10, 100, None);
        let start = Instant::now();
        recorder.answered(true, start, start + Duration::from_secs(5));
        recorder.tick(start + Duration::from_secs(11)).unwrap();
        recorder.answered(true, start, start + Duration::from_secs(12));
        recorder.answered(false, start, start + Duration::from_secs(12));
        assert!(recorder.next_place().is_some());
        recorder.tick(start + Duration::from_secs(200)).unwrap();
        recorder.answered(true, start, start + Duration::from_secs(201));
        assert_eq!(recorder.next_place(), None);
        let report = recorder.report(1 << 20);
        assert_eq!((report.operations, report.reads, report.bytes), (2, 1, 8192));
        assert!(report.read_latency.unwrap().p50_ns.abs_diff(12_000_000_000) < 12_000_000_000 / 500);
        assert_eq!(report.server_cpu, None);
    }

    #[test]
    fn a_count_ends_the_run_before_its_time() {
        let mut recorder = recorder(0, 100, Some(2));
        let now = Instant::now();
        recorder.answered(true, now, now);
        recorder.tick(now).unwrap();
        assert!(recorder.next_place().is_some());
        recorder.answered(true, now, now);
        recorder.tick(now).unwrap();
        assert!(recorder.next_place().is_none());
    }
}
