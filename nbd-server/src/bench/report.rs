//! What a run came to: plain numbers, nothing of how they are shown.

use std::time::Duration;

use hdrhistogram::Histogram;

/// What was measured, without the warm-up.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchReport {
    /// Operations that were answered; a write with its flush is one.
    pub operations: u64,
    /// How many of them were reads.
    pub reads: u64,
    /// Time in which they were answered.
    pub time: Duration,
    /// Bytes read and written.
    pub bytes: u64,
    /// Bytes of the area that was used.
    pub area: u64,
    /// Latency of all operations.
    pub latency: LatencyReport,
    /// Of the reads, if there were any.
    pub read_latency: Option<LatencyReport>,
    /// Of the writes, if there were any.
    pub write_latency: Option<LatencyReport>,
    /// CPU time of the server's processes meanwhile, if any were named.
    pub server_cpu: Option<Duration>,
}

/// Latency of one kind of operations, in nanoseconds, to three digits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LatencyReport {
    /// Mean.
    pub mean_ns: f64,
    /// Half of the operations took at most this long.
    pub p50_ns: u64,
    /// 90 of 100.
    pub p90_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
    /// The slowest.
    pub max_ns: u64,
}

impl LatencyReport {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            mean_ns: histogram.mean(),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p999_ns: histogram.value_at_quantile(0.999),
            max_ns: histogram.max(),
        }
    }
}

impl BenchReport {
    /// Operations per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.operations as f64 / self.seconds()
    }

    /// Megabytes (10^6) per second.
    #[must_use]
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.seconds()
    }

    /// CPU time of the server per operation, in microseconds.
    #[must_use]
    pub fn server_cpu_us(&self) -> Option<f64> {
        let cpu = self.server_cpu.filter(|_| self.operations > 0)?;
        Some(cpu.as_secs_f64() * 1e6 / self.operations as f64)
    }

    fn seconds(&self) -> f64 {
        self.time.as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_from_counts_and_time() {
        let report = BenchReport {
            operations: 1000,
            reads: 0,
            time: Duration::from_secs(2),
            bytes: 4_000_000,
            area: 1 << 20,
            latency: LatencyReport::default(),
            read_latency: None,
            write_latency: None,
            server_cpu: Some(Duration::from_millis(5)),
        };
        assert_eq!(report.iops(), 500.0);
        assert_eq!(report.megabytes_per_second(), 2.0);
        assert_eq!(report.server_cpu_us(), Some(5.0));
        assert_eq!(BenchReport { operations: 0, ..report }.server_cpu_us(), None);
    }
}
