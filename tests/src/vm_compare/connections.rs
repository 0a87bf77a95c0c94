//! What several connections of the kernel's client to one volume gain: the loads on a device of nbd-client, over one
//! connection and over four.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};

use super::figures::median;
use super::loads::{self, LOADS};
use super::{Guest, NAME};
use crate::report::step;

/// Numbers of connections; the others are compared to the first.
const CONNECTIONS: [u32; 2] = [1, 4];
const DEVICE: &str = "/dev/nbd1";

/// Rates of all rounds, by load and number of connections.
#[derive(Default)]
pub(super) struct Connections(BTreeMap<(&'static str, u32), Vec<f64>>);

impl Connections {
    /// Measures all loads over each number of connections; `client` is the step that connects.
    pub(super) fn measure(&mut self, guest: &Guest, client: &str) -> Result<()> {
        for connections in CONNECTIONS {
            guest.steps(&format!("{client} {DEVICE} {connections}"))?;
            for load in &LOADS {
                let rate = loads::run(guest, DEVICE, load).context(load.name)?;
                step(NAME, &format!("nbd-client -C {connections}: {}: {rate:.0}", load.name));
                self.0.entry((load.name, connections)).or_default().push(rate);
            }
            guest.steps(&format!("{client}_ends {DEVICE}"))?;
        }
        Ok(())
    }

    /// Medians as Markdown; nothing if nothing was measured.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        for load in &LOADS {
            let rates = CONNECTIONS.map(|connections| self.0.get(&(load.name, connections)));
            let [Some(one), Some(several)] = rates else { continue };
            let (unit, one, several) = (load.unit(), median(one), median(several));
            // Writing to a string does not fail.
            let _ =
                writeln!(text, "| {}, {unit} | {one:.0} | {several:.0}, x {:.2} |", load.name, several / one);
        }
        if text.is_empty() {
            return text;
        }
        let heads = CONNECTIONS.map(|connections| format!("`nbd-client -C {connections}`"));
        format!("\n| blkrepl | {} |\n|---|---|---|\n{text}", heads.join(" | "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_connections_are_compared_to_one() {
        let mut all = Connections::default();
        assert_eq!(all.table(), "");
        all.0.insert((LOADS[1].name, 1), vec![100.0, 200.0, 120.0]);
        all.0.insert((LOADS[1].name, 4), vec![180.0]);
        let table = all.table();
        assert!(table.contains("| `nbd-client -C 1` | `nbd-client -C 4` |"), "{table}");
        assert!(table.ends_with("16 in flight, IOPS | 120 | 180, x 1.50 |\n"), "{table}");
    }
}
