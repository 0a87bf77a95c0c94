//! The loads, each run by fio on the device of a system.

use anyhow::{Context, Result};
use serde_json::Value;

use super::Guest;

/// Not measured, at the beginning of each load.
const RAMP_MS: u32 = 300;

/// One load.
pub(super) struct Load {
    pub(super) name: &'static str,
    /// What fio is told.
    args: &'static str,
    /// Whether it is told in MiB/s.
    pub(super) bulk: bool,
}

impl Load {
    /// The unit of its rate.
    pub(super) fn unit(&self) -> &'static str {
        if self.bulk { "MiB/s" } else { "IOPS" }
    }
}

/// All of them.
pub(super) const LOADS: [Load; 5] = [
    Load {
        name: "4 KiB random write and flush, 1 in flight",
        args: "--rw=randwrite --bs=4k --ioengine=psync --fdatasync=1",
        bulk: false,
    },
    Load {
        name: "4 KiB random writes, 16 in flight",
        args: "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=16",
        bulk: false,
    },
    Load {
        name: "4 KiB random reads, 16 in flight",
        args: "--rw=randread --bs=4k --ioengine=libaio --iodepth=16",
        bulk: false,
    },
    Load {
        name: "128 KiB sequential writes, 4 in flight",
        args: "--rw=write --bs=128k --ioengine=libaio --iodepth=4",
        bulk: true,
    },
    Load {
        name: "128 KiB sequential reads, 4 in flight",
        args: "--rw=read --bs=128k --ioengine=libaio --iodepth=4",
        bulk: true,
    },
];

/// Runs it: operations or MiB a second.
pub(super) fn run(guest: &Guest, device: &str, load: &Load) -> Result<f64> {
    let ms = guest.options.time.as_millis();
    let said = guest.steps(&format!("load {device} {RAMP_MS} {ms} {}", load.args))?;
    rate(&said, load.bulk).with_context(|| format!("fio's report: {said}"))
}

fn rate(report: &str, bulk: bool) -> Result<f64> {
    // Warnings may stand before it.
    let begin = report.find('{').context("no JSON")?;
    let report: Value = serde_json::from_str(&report[begin..])?;
    let job = &report["jobs"][0];
    let key = if bulk { "bw_bytes" } else { "iops" };
    let sum: f64 = ["read", "write"].iter().filter_map(|way| job[way][key].as_f64()).sum();
    anyhow::ensure!(job["error"] == 0 && sum > 0.0, "nothing was done");
    Ok(if bulk { sum / f64::from(1 << 20) } else { sum })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_fio_is_understood() {
        let report = r#"note: something
{"jobs": [{"error": 0, "read": {"iops": 0, "bw_bytes": 0}, "write": {"iops": 12.5, "bw_bytes": 2097152}}]}"#;
        assert!((rate(report, false).unwrap() - 12.5).abs() < 1e-9);
        assert!((rate(report, true).unwrap() - 2.0).abs() < 1e-9);
        assert!(rate(r#"{"jobs": [{"error": 5}]}"#, true).is_err());
        assert!(rate("fio: no such device", true).is_err());
    }
}
