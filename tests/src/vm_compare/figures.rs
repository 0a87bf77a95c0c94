//! What was measured, and the table of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::connections::Connections;
use super::loads::LOADS;
use super::systems::SYSTEMS;
use super::writer::Seen;

/// What is done to a system, in the table's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    PrimaryKilled,
    Moved,
    SecondaryEnds,
    SecondarySilent,
    SecondaryBack,
}

const ROWS: [Row; 5] =
    [Row::PrimaryKilled, Row::Moved, Row::SecondaryEnds, Row::SecondarySilent, Row::SecondaryBack];

impl Row {
    /// Its name in the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PrimaryKilled => "server or primary killed",
            Self::Moved => "role handed over",
            Self::SecondaryEnds => "secondary ends",
            Self::SecondarySilent => "secondary falls silent",
            Self::SecondaryBack => "secondary comes back",
        }
    }
}

type System = &'static str;

/// All figures of all rounds.
#[derive(Default)]
pub(super) struct Figures {
    rates: BTreeMap<(&'static str, System), Vec<f64>>,
    seen: BTreeMap<(Row, System), Vec<Seen>>,
    gaps: BTreeMap<(Row, System), Vec<f64>>,
    words: BTreeMap<(Row, System), &'static str>,
    resyncs: BTreeMap<(u64, System, &'static str), Vec<f64>>,
    pub(super) connections: Connections,
}

impl Figures {
    pub(super) fn rate(&mut self, load: &'static str, system: System, rate: f64) {
        self.rates.entry((load, system)).or_default().push(rate);
    }

    pub(super) fn seen(&mut self, row: Row, system: System, seen: Seen) {
        self.seen.entry((row, system)).or_default().push(seen);
    }

    /// Seconds without a device.
    pub(super) fn gap(&mut self, row: Row, system: System, seconds: f64) {
        self.gaps.entry((row, system)).or_default().push(seconds);
    }

    pub(super) fn words(&mut self, row: Row, system: System, words: &'static str) {
        self.words.insert((row, system), words);
    }

    pub(super) fn resync(&mut self, mib: u64, system: System, how: &'static str, seconds: f64) {
        self.resyncs.entry((mib, system, how)).or_default().push(seconds);
    }

    /// All of it as Markdown.
    pub(super) fn table(&self) -> String {
        let names: Vec<&str> = SYSTEMS.iter().map(|system| system.name).collect();
        let mut text = format!("| | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
        for load in &LOADS {
            line(&mut text, &format!("{}, {}", load.name, load.unit()), |system| {
                self.rate_cell(load.name, system)
            });
        }
        line(&mut text, "median of a lone 4 KiB synchronous write", |system| self.latency_cell(system));
        for row in ROWS {
            line(&mut text, row.name(), |system| self.fault_cell(row, system));
        }
        let sizes: std::collections::BTreeSet<u64> = self.resyncs.keys().map(|key| key.0).collect();
        for mib in sizes {
            line(&mut text, &format!("resync after {mib} MiB changed"), |system| {
                self.resync_cell(mib, system)
            });
        }
        text + &self.connections.table()
    }

    /// The best rate and the median one, and how the best ones compare to those of the server without replication:
    /// what else the host does only ever slows a round down.
    fn rate_cell(&self, load: &'static str, system: System) -> Option<String> {
        let rates = self.rates.get(&(load, system))?;
        let best = best(rates);
        let ratio = match self.rates.get(&(load, SYSTEMS[0].name)) {
            Some(base) if system != SYSTEMS[0].name => format!(", x {:.2}", best / self::best(base)),
            _ => String::new(),
        };
        Some(format!("{best:.0} ({:.0}){ratio}", median(rates)))
    }

    fn latency_cell(&self, system: System) -> Option<String> {
        let seen = self.seen.iter().filter(|((row, of), _)| *of == system && *row != Row::SecondaryBack);
        let medians: Vec<f64> = seen.flat_map(|(_, all)| all.iter().map(|seen| seen.median_ms)).collect();
        (!medians.is_empty()).then(|| format!("{:.2} ms", median(&medians)))
    }

    fn fault_cell(&self, row: Row, system: System) -> Option<String> {
        if let Some(gaps) = self.gaps.get(&(row, system)) {
            let longest = gaps.iter().copied().fold(0.0, f64::max);
            let median = median(gaps);
            return Some(format!("no device for {median:.2} s (at most {longest:.2})"));
        }
        match self.seen.get(&(row, system)) {
            Some(all) => Some(seen_cell(all)),
            None => self.words.get(&(row, system)).map(|words| (*words).to_owned()),
        }
    }

    fn resync_cell(&self, mib: u64, system: System) -> Option<String> {
        let each = self.resyncs.iter().filter(|((m, of, _), _)| *m == mib && *of == system);
        let cells: Vec<String> = each
            .map(|((_, _, how), times)| {
                let how = if how.is_empty() { String::new() } else { format!("{how}: ") };
                format!("{how}{:.2} s", median(times))
            })
            .collect();
        (!cells.is_empty()).then(|| cells.join("; "))
    }
}

/// What the writer saw in all rounds.
fn seen_cell(all: &[Seen]) -> String {
    let errors: u32 = all.iter().map(|seen| seen.errors).sum();
    if errors > 0 {
        let failed: Vec<f64> = all.iter().filter_map(|seen| seen.failed_ms).collect();
        return format!("no answer for {}, then every write fails", time(median(&failed)));
    }
    let lost: Option<u64> = all.iter().map(|seen| seen.lost).sum();
    let lost =
        lost.map_or_else(|| "what was written cannot be read".to_owned(), |lost| format!("{lost} lost"));
    let of = |part: fn(&Seen) -> f64| all.iter().map(part).collect::<Vec<f64>>();
    let stalls = of(|seen| seen.stall_ms);
    let longest = stalls.iter().copied().fold(0.0, f64::max);
    format!("stall {} (at most {}), no error, {lost}", time(median(&stalls)), time(longest))
}

fn time(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.0} ms") } else { format!("{:.2} s", ms / 1e3) }
}

fn line(text: &mut String, name: &str, cell: impl Fn(System) -> Option<String>) {
    let cells: Vec<String> =
        SYSTEMS.iter().map(|system| cell(system.name).unwrap_or_else(|| "-".to_owned())).collect();
    let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
}

/// The median; of an even number the lower one of the two in the middle.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The largest.
fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::MIN, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_thing_and_says_what_failed() {
        let mut figures = Figures::default();
        let load = LOADS[0].name;
        for rate in [100.0, 120.0, 300.0] {
            figures.rate(load, SYSTEMS[0].name, rate);
        }
        figures.rate(load, SYSTEMS[1].name, 60.0);
        let stalled = Seen { stall_ms: 1500.0, lost: Some(0), ..Seen::default() };
        figures.seen(Row::PrimaryKilled, SYSTEMS[1].name, stalled);
        figures.seen(
            Row::PrimaryKilled,
            SYSTEMS[0].name,
            Seen { errors: 20, failed_ms: Some(50.0), ..Seen::default() },
        );
        figures.resync(8, SYSTEMS[2].name, "", 5.0);
        figures.resync(8, SYSTEMS[2].name, "tuned", 1.0);
        let table = figures.table();
        assert!(table.contains("| 300 (120) | 60 (60), x 0.20 | - |"), "{table}");
        assert!(table.contains("no answer for 50 ms, then every write fails"), "{table}");
        assert!(table.contains("stall 1.50 s (at most 1.50 s), no error, 0 lost"), "{table}");
        assert!(table.contains("| resync after 8 MiB changed | - | - | 5.00 s; tuned: 1.00 s |"), "{table}");
    }
}
