//! Keeps processors from going to sleep while something is measured: waking one costs more than the work of a
//! request, most of all in a virtual machine.

use std::fs::{self, File};
use std::io::Write;

/// Held as long as it lives.
pub(crate) struct Quiet {
    _request: Option<File>,
    text: String,
}

impl Quiet {
    /// Asks the kernel for a wake-up latency of 0; says so if that is not possible.
    pub(crate) fn start() -> Self {
        let path = "/dev/cpu_dma_latency";
        // The request is in force while the file is open.
        let request = File::options().write(true).open(path).and_then(|mut file| {
            file.write_all(&0u32.to_ne_bytes())?;
            Ok(file)
        });
        let driver = fs::read_to_string("/sys/devices/system/cpu/cpuidle/current_driver").unwrap_or_default();
        let driver = driver.trim();
        let text = match &request {
            Ok(_) if driver.is_empty() || driver == "none" => format!(
                "{path} is held at 0, but there is no cpuidle driver that would obey: an idle processor halts"
            ),
            Ok(_) => format!("{path} is held at 0: idle processors poll (cpuidle driver {driver})"),
            Err(reason) => format!("{path} cannot be held at 0 ({reason}): idle processors may sleep"),
        };
        Self { _request: request.ok(), text }
    }

    /// For the output.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}
