//! Axes with their ticks, and charts of lines over them.

use serde_json::json;

use super::drawing::{Anchor, Drawing, Ink, SERIES, VectorPath};
use super::text::digits;

/// Font size of the labels of ticks and axes.
pub(super) const SMALL: f64 = 11.0;
/// Ink of the labels of ticks.
pub(super) const FAINT: Ink = Ink::Text(0.72);
const RULE: Ink = Ink::Text(0.45);
const GRID: Ink = Ink::Text(0.11);

/// The name of the axis of learning rates.
pub(super) const LEARNING_RATE: &str = "learning rate";

/// Values over more than this ratio are drawn on a logarithmic scale.
const LOGARITHMIC_FROM: f64 = 30.0;

/// An axis: a range of values and its name.
#[derive(Debug, Clone)]
pub(super) struct ChartAxis {
    pub label: String,
    pub low: f64,
    pub high: f64,
    pub logarithmic: bool,
    /// Whether only whole numbers are meaningful.
    pub whole: bool,
}

impl ChartAxis {
    /// An axis from exactly `low` to `high`.
    pub fn exact(label: &str, low: f64, high: f64, logarithmic: bool) -> Self {
        let finite = |end: f64| end.clamp(-f64::MAX, f64::MAX);
        let (low, high) = (finite(low), finite(high));
        let (low, high) = if are_apart(low, high) { (low, high) } else { around(low) };
        let (low, high) = (finite(low), finite(high));
        Self { label: label.into(), low, high, logarithmic: logarithmic && low > 0.0, whole: false }
    }

    /// An axis with room for the finite values; logarithmic if they are positive and far apart. None if no value is
    /// finite.
    pub fn fitting(label: &str, values: impl Iterator<Item = f64>) -> Option<Self> {
        let (low, high) = range(values)?;
        if spans_decades(low, high) {
            let margin = (0.04 * (high.ln() - low.ln())).exp();
            return Some(Self::exact(label, (low / margin).max(f64::MIN_POSITIVE), high * margin, true));
        }
        Self::linear(label, [low, high].into_iter())
    }

    /// A linear axis with room for the finite values. None if no value is finite.
    fn linear(label: &str, values: impl Iterator<Item = f64>) -> Option<Self> {
        let (low, high) = range(values)?;
        if !are_apart(low, high) {
            return Some(Self::exact(label, low, low, false));
        }
        let margin = 0.05 * high - 0.05 * low;
        // An axis of values that cannot be negative does not go below zero.
        let floor = if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
        Some(Self::exact(label, (low - margin).max(floor), high + margin, false))
    }

    /// The place of a value, from 0 to 1 along the axis; NaN for a value that has none.
    pub fn place(&self, value: f64) -> f64 {
        let Self { low, high, .. } = *self;
        let share = if self.logarithmic {
            // Differences of logarithms, because a ratio of extreme numbers overflows.
            (value.ln() - low.ln()) / (high.ln() - low.ln())
        } else {
            // Halved, so that the range of the largest numbers does not overflow.
            (0.5 * value - 0.5 * low) / (0.5 * high - 0.5 * low)
        };
        if share.is_finite() { share } else { f64::NAN }
    }

    /// The value at a place from 0 to 1 along the axis.
    pub fn value(&self, place: f64) -> f64 {
        let Self { low, high, .. } = *self;
        if self.logarithmic {
            (low.ln() + place * (high.ln() - low.ln())).exp()
        } else {
            (1.0 - place) * low + place * high
        }
    }

    /// Tick values whose labels fit beside each other on an axis of this length, at least one.
    pub fn ticks_beside(&self, length: f64) -> Vec<(f64, String)> {
        let fit = |ticks: &[(f64, String)]| {
            ticks.windows(2).all(|pair| {
                let [a, b] = [&pair[0], &pair[1]].map(|(value, name)| (length * self.place(*value), label_width(name)));
                b.0 - a.0 >= 0.5 * (a.1 + b.1) + 5.0
            })
        };
        let most = (length / 44.0).max(1.0) as usize;
        let mut ticks = (1..=most).rev().map(|most| self.ticks(most)).find(|ticks| fit(ticks));
        ticks.get_or_insert_with(|| self.ticks(1).into_iter().take(1).collect()).drain(..).collect()
    }

    /// Tick values with their labels.
    pub fn ticks(&self, most: usize) -> Vec<(f64, String)> {
        let values = if self.logarithmic { log_steps(self.low, self.high, most) } else { Vec::new() };
        // A range of less than a decade may contain no round number of that kind.
        let by_decades = values.len() > 1;
        let mut values = if by_decades { values } else { linear_steps(self.low, self.high, most) };
        values.retain(|value| (-1e-6..=1.0 + 1e-6).contains(&self.place(*value)));
        // Numbers next to zero have no round numbers between them.
        if values.is_empty() {
            values = vec![self.low, self.high];
        }
        values.retain(|value| !self.whole || (value - value.round()).abs() < 1e-6);
        let steps = values.windows(2).map(|pair| pair[1] - pair[0]);
        // The smallest of several powers of ten is not zero, however small it is beside the others.
        let step = if by_decades { f64::INFINITY } else { steps.fold(f64::INFINITY, f64::min) };
        values.iter().map(|&value| (value, tick_name(value, step))).collect()
    }
}

/// Whether two values differ by more than rounding. Otherwise they count as one value.
fn are_apart(low: f64, high: f64) -> bool {
    0.5 * high - 0.5 * low > 0.5e-9 * low.abs().max(high.abs())
}

/// Whether values between these are drawn on a logarithmic scale.
pub(super) fn spans_decades(low: f64, high: f64) -> bool {
    low > 0.0 && high.ln() - low.ln() >= LOGARITHMIC_FROM.ln()
}

/// The range around a single value.
fn around(value: f64) -> (f64, f64) {
    let value = if value.is_finite() { value } else { 0.0 };
    // Halves of the smallest numbers are zero.
    let margin = if value == 0.0 { 1.0 } else { (0.1 * value.abs()).max(8.0 * f64::MIN_POSITIVE) };
    (value - margin, value + margin)
}

/// The smallest and the largest of the finite values.
pub(super) fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((value.min(low), value.max(high))),
    })
}

/// Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most `most` of them.
pub(super) fn linear_steps(low: f64, high: f64, most: usize) -> Vec<f64> {
    let span = high - low;
    if span == f64::INFINITY && low.is_finite() && high.is_finite() {
        return linear_steps(0.5 * low, 0.5 * high, most).into_iter().map(|half| 2.0 * half).collect();
    }
    if !span.is_finite() || span <= 0.0 {
        return Vec::new();
    }
    let power = 10f64.powf((span / most.max(1) as f64).log10().floor());
    for factor in [1.0, 2.0, 5.0, 10.0, 20.0] {
        let step = factor * power;
        let (first, last) = ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor());
        if last - first < most as f64 && step.is_normal() {
            return (0..=(last - first).max(-1.0) as i64).map(|index| (first + index as f64) * step).collect();
        }
    }
    Vec::new()
}

/// Powers of ten from `low` to `high`, and twice and five times them if there is room.
pub(super) fn log_steps(low: f64, high: f64, most: usize) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let inside = |value: &f64| (low * (1.0 - 1e-9)..=high * (1.0 + 1e-9)).contains(value);
    let powers = |factors: &[f64], stride: i32| -> Vec<f64> {
        let exponents = (first..=last).filter(|exponent| exponent.rem_euclid(stride) == 0);
        exponents.flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e))).filter(inside).collect()
    };
    let factors = [&[1.0, 2.0, 5.0][..], &[1.0, 3.0]].map(|factors| powers(factors, 1));
    let strides = [1, 2, 3, 5, 10, 20, 50, 100].map(|stride| powers(&[1.0], stride));
    factors.into_iter().chain(strides).find(|values| values.len() <= most).unwrap_or_default()
}

/// The label of a tick among others at this distance.
pub(super) fn tick_name(value: f64, step: f64) -> String {
    let size = value.abs();
    // A rounding residue of zero is zero; a single tick has no step.
    if value == 0.0 || (step.is_finite() && size < 1e-9 * step) {
        return "0".into();
    }
    let exponent = size.log10().floor() as i32;
    if !(1e-3..1e5).contains(&size) {
        let digits = if step.is_finite() { (exponent - step.log10().floor() as i32).clamp(0, 3) as usize } else { 1 };
        let text = format!("{value:.digits$e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let mantissa =
            if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
        return format!("{mantissa}e{exponent}").replace('-', "−");
    }
    let step = if step.is_finite() { step.min(size) } else { size };
    let decimals = (-(step.log10() + 1e-9).floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    text.replace('-', "−")
}

/// About the width of a label, from the width of a digit of DejaVu Sans.
pub(super) fn label_width(text: &str) -> f64 {
    0.64 * SMALL * text.chars().count() as f64
}

/// The area of a drawing that holds the lines of a chart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

impl Panel {
    pub fn x(&self, share: f64) -> f64 {
        self.left + share * (self.right - self.left)
    }

    pub fn y(&self, share: f64) -> f64 {
        self.bottom - share * (self.bottom - self.top)
    }

    /// Grid, ticks and names of both axes.
    pub fn axes(&self, drawing: &mut Drawing, x: &ChartAxis, y: &ChartAxis) {
        let mut grid = Vec::new();
        for (value, name) in y.ticks(((self.bottom - self.top) / 32.0) as usize) {
            let at = self.y(y.place(value));
            grid.push(vec![[self.left, at], [self.right, at]]);
            drawing.label([self.left - 6.0, at + 0.35 * SMALL], name, SMALL, Anchor::End, FAINT);
        }
        drawing.shape(VectorPath { paths: grid, stroke: Some((GRID, 1.0)), ..VectorPath::default() });
        self.x_ticks(drawing, x);
        drawing.line(vec![[self.left, self.bottom], [self.right, self.bottom]], RULE, 1.0);
        drawing.vertical_label([12.0, self.y(0.5)], y.label.clone(), SMALL, FAINT);
    }

    /// Ticks and name of the lower axis.
    pub fn x_ticks(&self, drawing: &mut Drawing, x: &ChartAxis) {
        let mut ticks = Vec::new();
        for (value, name) in x.ticks_beside(self.right - self.left) {
            let at = self.x(x.place(value));
            ticks.push(vec![[at, self.bottom], [at, self.bottom + 4.0]]);
            drawing.label([at, self.bottom + 16.0], name, SMALL, Anchor::Middle, FAINT);
        }
        drawing.shape(VectorPath { paths: ticks, stroke: Some((RULE, 1.0)), ..VectorPath::default() });
        drawing.label([self.x(0.5), self.bottom + 33.0], x.label.clone(), SMALL, Anchor::Middle, FAINT);
    }
}

/// The style of one series: colour, dashes and marker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Style(pub usize);

impl Style {
    /// The number of dash patterns shares no divisor with the number of colours, so that few series share both.
    const DASHES: [&'static [f64]; 4] = [&[], &[7.0, 3.0], &[2.0, 2.5], &[9.0, 3.0, 2.0, 3.0]];

    pub fn ink(self, opacity: f64) -> Ink {
        Ink::Series(self.0, opacity)
    }

    pub fn dash(self) -> &'static [f64] {
        Self::DASHES[self.0 % Self::DASHES.len()]
    }

    /// The outline of its marker around a point.
    pub fn marker(self, [x, y]: [f64; 2], radius: f64) -> Vec<[f64; 2]> {
        // Number of corners, angle of the first, and scale that makes it look as heavy as a disc.
        let (corners, turn, size) =
            [(20, 0.0, 1.0), (4, 0.125, 1.2), (3, 0.25, 1.35), (4, 0.0, 1.25), (3, 0.75, 1.35)][self.0 % 5];
        let corner = |index| {
            let angle = (index as f64 / corners as f64 + turn) * std::f64::consts::TAU;
            [x + size * radius * angle.cos(), y - size * radius * angle.sin()]
        };
        (0..corners).map(corner).collect()
    }

    /// A piece of its line with a marker, for a legend.
    pub fn sample(self, drawing: &mut Drawing, [x, y]: [f64; 2], length: f64) {
        drawing.shape(VectorPath {
            paths: vec![vec![[x, y], [x + length, y]]],
            stroke: Some((self.ink(1.0), 2.0)),
            dash: self.dash(),
            ..VectorPath::default()
        });
        drawing.polygon(self.marker([x + 0.5 * length, y], 3.2), self.ink(1.0));
    }
}

/// A series of a chart.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub name: String,
    pub style: Style,
    /// A value that is not finite interrupts the line.
    pub points: Vec<[f64; 2]>,
    /// Abscissa, lowest and highest value.
    pub band: Vec<[f64; 3]>,
    /// Values whose moving mean the points are, drawn pale; often none.
    pub raw: Vec<[f64; 2]>,
    /// Over how many values each point is a mean, for a line that readers can smooth.
    pub window: Option<usize>,
    /// Whether points have markers and show their values.
    pub markers: bool,
}

impl Line {
    fn values(&self) -> impl Iterator<Item = f64> {
        let points = self.points.iter().chain(&self.raw).map(|point| point[1]);
        points.chain(self.band.iter().flat_map(|&[_, low, high]| [low, high]))
    }

    /// Where it begins and ends, for those who cannot see it.
    fn description(&self) -> Option<String> {
        let mut finite = self.points.iter().filter(|point| point[1].is_finite());
        let (&[first, start], last) = (finite.next()?, finite.next_back());
        let begin = format!("{} {} at {}", self.name, digits(start), digits(first));
        Some(last.map_or(begin.clone(), |&[last, end]| format!("{begin}, {} at {}", digits(end), digits(last))))
    }

    /// What the page's script draws it from.
    fn data(&self, x: &ChartAxis) -> serde_json::Value {
        // A column for each pixel. The other numbers of a long line cannot be seen.
        let column = |at: f64| CHART.0 * x.place(at);
        // Five digits are enough to read, and make the page smaller.
        let short = |value: f64| format!("{value:.4e}").parse::<f64>().ok().filter(|value| value.is_finite());
        let points = |points: &[[f64; 2]]| -> Vec<(f64, Option<f64>)> {
            thinned(points.to_vec(), column).into_iter().map(|[at, value]| (at, short(value))).collect()
        };
        let side = |end: usize| -> Vec<[f64; 2]> { self.band.iter().map(|of| [of[0], of[end]]).collect() };
        // Both sides are thinned alike only if no point is left out.
        let few = self.band.len() as f64 <= CHART.0;
        let (low, high) = (points(&side(1)), points(&side(2)));
        let band: Vec<_> = low.iter().zip(&high).map(|((at, low), (_, high))| (at, low, high)).collect();
        // The script smooths the values itself, from their means over short parts. So the points are not repeated.
        let values = if self.raw.is_empty() { &self.points } else { &self.raw };
        let parts: Vec<_> = match self.window {
            None => Vec::new(),
            Some(_) => part_means(values).into_iter().map(|(at, mean, count)| (at, short(mean), count)).collect(),
        };
        json!({
            "name": self.name,
            "style": self.style.0,
            "colour": self.style.0 % SERIES.len(),
            "dash": self.style.dash(),
            "points": if self.window.is_some() { json!([]) } else { json!(points(&self.points)) },
            "parts": parts,
            "window": self.window.unwrap_or(1),
            "raw": points(&self.raw),
            "band": if few { json!(band) } else { json!([]) },
        })
    }
}

/// The most parts of a line from which the page's script smooths it.
const MOST_PARTS: usize = 720;

/// The middle of each part of a line, the mean of its finite values, and their number. The parts are single points if
/// these are few enough.
fn part_means(points: &[[f64; 2]]) -> Vec<(f64, f64, usize)> {
    let part = |part: &[[f64; 2]]| {
        let finite = part.iter().map(|point| point[1]).filter(|value| value.is_finite());
        let (sum, count) = finite.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
        (0.5 * part[0][0] + 0.5 * part[part.len() - 1][0], sum / count as f64, count)
    };
    points.chunks(points.len().div_ceil(MOST_PARTS).max(1)).map(part).collect()
}

/// The points of a line that a chart can show: the first and the last one of each column, the lowest and the highest.
/// A height that is not finite is kept, so that the line stays interrupted there.
fn thinned(line: Vec<[f64; 2]>, column: impl Fn(f64) -> f64) -> Vec<[f64; 2]> {
    let column = |point: &[f64; 2]| (column(point[0]).floor(), point[1].is_finite());
    let mut kept = Vec::new();
    for part in line.chunk_by(|a, b| column(a) == column(b)) {
        let last = part.len() - 1;
        let by_height = |&a: &usize, &b: &usize| part[a][1].total_cmp(&part[b][1]);
        let mut places = [Some(0), (0..=last).min_by(by_height), (0..=last).max_by(by_height), Some(last)];
        places.sort();
        let mut places: Vec<usize> = places.into_iter().flatten().collect();
        places.dedup();
        kept.extend(places.into_iter().map(|place| part[place]));
    }
    kept
}

/// The column of a place in a drawing, of which a pixel has two.
fn half_pixel(x: f64) -> f64 {
    2.0 * x
}

/// Draws lines within the area of their axes.
pub(super) fn draw_lines(drawing: &mut Drawing, panel: Panel, x: &ChartAxis, y: &ChartAxis, lines: &[Line]) {
    let at = |[abscissa, value]: [f64; 2]| {
        let (right, up) = (x.place(abscissa), y.place(value));
        // A point outside the axes interrupts the line, as does a value that is not finite.
        let inside = |share: &f64| (-0.01..=1.01).contains(share);
        (inside(&right) && inside(&up)).then(|| [panel.x(right), panel.y(up)])
    };
    for Line { style, band, .. } in lines {
        for part in band.split(|&[x, low, high]| at([x, low]).is_none() || at([x, high]).is_none()) {
            let below = thinned(part.iter().filter_map(|&[x, low, _]| at([x, low])).collect(), half_pixel);
            let above = thinned(part.iter().filter_map(|&[x, _, high]| at([x, high])).collect(), half_pixel);
            drawing.polygon(below.into_iter().chain(above.into_iter().rev()).collect(), style.ink(0.16));
        }
    }
    for Line { name, style, points, raw, markers, .. } in lines {
        let paths = |points: &[[f64; 2]]| {
            let parts = points.split(|&point| at(point).is_none());
            parts.map(|part| thinned(part.iter().filter_map(|&point| at(point)).collect(), half_pixel)).collect()
        };
        let stroke = Some((style.ink(0.3), 1.0));
        drawing.shape(VectorPath { paths: paths(raw), stroke, ..VectorPath::default() });
        let stroke = Some((style.ink(1.0), 2.0));
        drawing.shape(VectorPath { paths: paths(points), stroke, dash: style.dash(), ..VectorPath::default() });
        if !markers {
            continue;
        }
        // More than about thirty markers would hide their line.
        let stride = points.len().div_ceil(30).max(1);
        for &[abscissa, value] in points.iter().rev().step_by(stride) {
            let Some(place) = at([abscissa, value]) else { continue };
            let tip = Some(format!("{name}: {} at {}", digits(value), digits(abscissa)));
            let fill = Some(style.ink(1.0));
            let paths = vec![style.marker(place, 2.8)];
            drawing.shape(VectorPath { paths, closed: true, fill, tip, ..VectorPath::default() });
        }
    }
}

/// Size of the page's charts, in pixels of the page if there is room.
pub(super) const CHART: (f64, f64) = (360.0, 240.0);

/// A chart of lines, and the JSON that the page's script draws it from. None if no value is finite.
pub(super) fn line_chart(title: &str, x: ChartAxis, y_label: &str, lines: &[Line]) -> Option<(Drawing, String)> {
    let values = lines.iter().flat_map(Line::values);
    // A schedule often ends at zero, which a logarithmic axis does not have.
    let linear = y_label == LEARNING_RATE;
    let y = if linear { ChartAxis::linear(y_label, values) } else { ChartAxis::fitting(y_label, values) }?;
    let (width, height) = CHART;
    let each: Vec<String> = lines.iter().filter_map(Line::description).collect();
    let mut drawing = Drawing::new(width, height, format!("{title}: {}", each.join("; ")));
    let panel = Panel { left: 58.0, top: 12.0, right: width - 14.0, bottom: height - 42.0 };
    panel.axes(&mut drawing, &x, &y);
    draw_lines(&mut drawing, panel, &x, &y, lines);
    let axis = |axis: &ChartAxis| {
        let ChartAxis { label, low, high, logarithmic, whole } = axis;
        json!({"label": label, "low": low, "high": high, "log": logarithmic, "whole": whole})
    };
    let Panel { left, top, right, bottom } = panel;
    let data = json!({
        "x": axis(&x),
        "y": axis(&y),
        "panel": {"left": left, "top": top, "right": right, "bottom": bottom},
        "lines": lines.iter().map(|line| line.data(&x)).collect::<Vec<_>>(),
    });
    Some((drawing, data.to_string()))
}
