//! What `scale` found: charts and single numbers, as text, JSON and pictures.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::ScaleOptions;
use super::chart::{Axis, Chart};

/// Bytes as MiB.
pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

struct Number {
    name: String,
    value: f64,
    unit: &'static str,
}

#[derive(Default)]
pub(super) struct Report {
    charts: Vec<Chart>,
    numbers: Vec<Number>,
}

impl Report {
    pub(super) fn chart(&mut self, chart: Chart) {
        self.charts.push(chart);
    }

    pub(super) fn number(&mut self, name: &str, value: f64, unit: &'static str) {
        println!("{name}: {value:.2} {unit}");
        self.numbers.push(Number { name: name.to_owned(), value, unit });
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.charts.append(&mut other.charts);
        self.numbers.append(&mut other.numbers);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.charts.is_empty() && self.numbers.is_empty()
    }

    /// Each chart as a table; numbers were printed when they were found.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        for chart in &self.charts {
            // Writing to a string does not fail.
            let _ = writeln!(out, "\n{} ({}); {}:", chart.title, chart.y.label, chart.x.label);
            for series in &chart.series {
                let points: Vec<String> =
                    series.points.iter().map(|(x, y)| format!("{} {y:.1}", chart.x.text(*x))).collect();
                let _ = writeln!(out, "  {}: {}", series.name, points.join(", "));
            }
        }
        out
    }

    pub(super) fn json(&self, options: &ScaleOptions) -> Value {
        let axis = |axis: &Axis| json!(axis.label);
        let charts: Vec<Value> = self
            .charts
            .iter()
            .map(|chart| {
                let series: serde_json::Map<String, Value> =
                    chart.series.iter().map(|s| (s.name.clone(), json!(s.points))).collect();
                let (x, y) = (axis(&chart.x), axis(&chart.y));
                json!({"name": chart.name, "title": chart.title, "x": x, "y": y, "series": series})
            })
            .collect();
        let numbers: Vec<Value> =
            self.numbers.iter().map(|n| json!({"name": n.name, "value": n.value, "unit": n.unit})).collect();
        json!({
            "seconds": options.time.as_secs_f64(),
            "quick": options.quick,
            "charts": charts,
            "numbers": numbers,
        })
    }

    /// One file per chart.
    pub(super) fn write_pictures(&self, dir: &Path) -> Result<()> {
        for chart in &self.charts {
            let path = dir.join(format!("{}.svg", chart.name));
            if let Some(svg) = chart.svg() {
                std::fs::write(&path, svg).with_context(|| format!("write {}", path.display()))?;
            }
        }
        Ok(())
    }
}
