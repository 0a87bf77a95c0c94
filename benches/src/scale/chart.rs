//! A picture of lines as SVG: axes, ticks, a legend, one line with dots per series. Pure text; light and dark
//! readers both get a white ground.

use std::fmt::Write;

/// How an axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    /// Even steps from nought.
    Linear,
    /// Powers of a base.
    Log(u32),
}

/// One axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    pub(super) label: &'static str,
    scale: Scale,
    bytes: bool,
}

impl Axis {
    /// Even steps from nought.
    pub(super) fn linear(label: &'static str) -> Self {
        Self { label, scale: Scale::Linear, bytes: false }
    }

    /// Powers of ten.
    pub(super) fn log(label: &'static str) -> Self {
        Self { label, scale: Scale::Log(10), bytes: false }
    }

    /// Powers of two.
    pub(super) fn doubling(label: &'static str) -> Self {
        Self { label, scale: Scale::Log(2), bytes: false }
    }

    /// Powers of four, shown as sizes.
    pub(super) fn bytes(label: &'static str) -> Self {
        Self { label, scale: Scale::Log(4), bytes: true }
    }

    /// Where the ticks are; the first and the last one are the ends of the axis.
    fn ticks(self, values: &[f64]) -> Vec<f64> {
        let most = values.iter().copied().fold(f64::MIN, f64::max);
        let least = values.iter().copied().fold(f64::MAX, f64::min);
        match self.scale {
            Scale::Linear => {
                let rough = (most / 5.0).max(1e-9);
                let unit = 10_f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|k| k * unit).into_iter().find(|step| *step >= rough);
                let step = step.unwrap_or(rough);
                (0..=5).map(|at| f64::from(at) * step).take_while(|at| *at < most + step).collect()
            }
            Scale::Log(base) => {
                let power = |value: f64| value.max(1e-9).log(f64::from(base));
                let (first, last) = (power(least) + 1e-9, power(most) - 1e-9);
                let (first, last) =
                    (first.floor() as i32, (last.ceil() as i32).max(first.floor() as i32 + 1));
                (first..=last).map(|at| f64::from(base).powi(at)).collect()
            }
        }
    }

    /// How far along the axis a value is, from 0 to 1.
    fn part(self, ticks: &[f64], value: f64) -> f64 {
        let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
        match self.scale {
            Scale::Linear => value / last,
            Scale::Log(_) => (value.max(first) / first).ln() / (last / first).ln(),
        }
    }

    /// A value as a reader wants it.
    pub(super) fn text(self, value: f64) -> String {
        const UNITS: [(f64, &str); 3] =
            [(1_099_511_627_776.0, "TiB"), (1_073_741_824.0, "GiB"), (1_048_576.0, "MiB")];
        if self.bytes
            && let Some((unit, name)) = UNITS.into_iter().find(|(unit, _)| value >= *unit)
        {
            return format!("{} {name}", value / unit);
        }
        match value {
            v if v >= 1e6 => format!("{}M", (v / 1e5).round() / 10.0),
            v if v >= 1e4 => format!("{}k", (v / 1e2).round() / 10.0),
            v => format!("{}", (v * 1000.0).round() / 1000.0),
        }
    }
}

/// Lines over one pair of axes.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    /// Also the picture's file.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
}

/// A line.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
/// Without the legend, which stands between title and lines.
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 36.0;
const RIGHT: f64 = 16.0;
const BOTTOM: f64 = 48.0;
/// Height of a legend's line.
const LINE: f64 = 16.0;
const COLOURS: [&str; 6] = ["#1b6ca8", "#d1495b", "#2e933c", "#8e5ea2", "#e08e0b", "#444444"];

impl Chart {
    pub(super) fn new(name: &'static str, title: &'static str, x: Axis, y: Axis) -> Self {
        Self { name, title, x, y, series: Vec::new() }
    }

    /// Adds a point to the line of that name.
    pub(super) fn point(&mut self, series: &str, x: f64, y: f64) {
        match self.series.iter_mut().find(|known| known.name == series) {
            Some(known) => known.points.push((x, y)),
            None => self.series.push(Series { name: series.to_owned(), points: vec![(x, y)] }),
        }
    }

    /// The picture; nothing if there is no point.
    pub(super) fn svg(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|series| &series.points).filter(|(_, y)| y.is_finite());
        let xs: Vec<f64> = points().map(|(x, _)| *x).collect();
        let ys: Vec<f64> = points().map(|(_, y)| *y).collect();
        if xs.is_empty() {
            return None;
        }
        let (xs, ys) = (self.x.ticks(&xs), self.y.ticks(&ys));
        let height = self.height();
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        text(&mut out, LEFT, TOP - 16.0, "start", &format!("{} ({})", self.title, self.y.label));
        self.draw_axes(&mut out, &xs, &ys);
        for (at, series) in self.series.iter().enumerate() {
            self.draw_line(&mut out, (&xs, &ys), at, series);
        }
        out += "</svg>\n";
        Some(out)
    }

    fn draw_axes(&self, out: &mut String, xs: &[f64], ys: &[f64]) {
        let (right, bottom) = (WIDTH - RIGHT, self.height() - BOTTOM);
        for value in ys {
            let y = self.at_y(ys, *value);
            line(out, (LEFT, y), (right, y));
            text(out, LEFT - 6.0, y + 4.0, "end", &self.y.text(*value));
        }
        // Every so many, so that they do not run into each other.
        for value in xs.iter().step_by(xs.len().div_ceil(11)) {
            let x = self.at_x(xs, *value);
            line(out, (x, self.top()), (x, bottom));
            text(out, x, bottom + 16.0, "middle", &self.x.text(*value));
        }
        text(out, (LEFT + right) / 2.0, self.height() - 10.0, "middle", self.x.label);
    }

    fn draw_line(&self, out: &mut String, (xs, ys): (&[f64], &[f64]), at: usize, series: &Series) {
        let colour = COLOURS[at % COLOURS.len()];
        let finite = series.points.iter().filter(|(_, y)| y.is_finite());
        let places: Vec<(f64, f64)> = finite.map(|(x, y)| (self.at_x(xs, *x), self.at_y(ys, *y))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (x, y) in places {
            let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        }
        let y = TOP + LINE * (at as f64 + 0.5);
        let _ = writeln!(
            out,
            "<rect x=\"{}\" y=\"{}\" width=\"12\" height=\"4\" fill=\"{colour}\"/>",
            LEFT + 10.0,
            y - 6.0
        );
        text(out, LEFT + 28.0, y, "start", &series.name);
    }

    /// Top of the lines.
    fn top(&self) -> f64 {
        TOP + LINE * self.series.len() as f64
    }

    fn height(&self) -> f64 {
        HEIGHT + LINE * self.series.len() as f64
    }

    fn at_x(&self, ticks: &[f64], value: f64) -> f64 {
        LEFT + self.x.part(ticks, value) * (WIDTH - LEFT - RIGHT)
    }

    fn at_y(&self, ticks: &[f64], value: f64) -> f64 {
        self.height() - BOTTOM - self.y.part(ticks, value) * (HEIGHT - TOP - BOTTOM)
    }
}

fn line(out: &mut String, (x, y): (f64, f64), (to_x, to_y): (f64, f64)) {
    let _ = writeln!(
        out,
        "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{to_x:.1}\" y2=\"{to_y:.1}\" stroke=\"#ddd\"/>"
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ =
        writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_between_the_ticks_that_surround_them() {
        for (axis, values) in [
            (Axis::linear(""), vec![0.0, 3.0, 97.0]),
            (Axis::log(""), vec![0.7, 40.0, 1000.0]),
            (Axis::doubling(""), vec![1.0, 256.0]),
            (Axis::bytes(""), vec![1_073_741_824.0]),
        ] {
            let ticks = axis.ticks(&values);
            assert!(ticks.len() > 1 && ticks.windows(2).all(|pair| pair[0] < pair[1]), "{ticks:?}");
            let parts: Vec<f64> = values.iter().map(|value| axis.part(&ticks, *value)).collect();
            assert!(parts.iter().all(|part| (-1e-6..=1.0 + 1e-6).contains(part)), "{ticks:?} {parts:?}");
            assert!(parts.windows(2).all(|pair| pair[0] < pair[1]), "{parts:?}");
        }
    }

    #[test]
    fn a_picture_holds_every_series_and_what_is_not_a_number_is_left_out() {
        let mut chart = Chart::new("name", "title", Axis::bytes("size"), Axis::linear("MiB"));
        assert_eq!(chart.svg(), None);
        chart.point("a < b", 1_073_741_824.0, 5.0);
        chart.point("a < b", 4_294_967_296.0, f64::NAN);
        chart.point("other", 4_294_967_296.0, 9.0);
        let svg = chart.svg().unwrap();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a &lt; b") && svg.contains("4 GiB") && !svg.contains("NaN"), "{svg}");
    }
}
