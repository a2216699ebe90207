//! Loss landscapes: reading them, and their pictures: contours and a surface over two axes, a curve over one.

use std::path::{Path, PathBuf};

use super::chart::{
    self, ChartAxis, FAINT, Line, Panel, SMALL, Style, draw_lines, label_width, linear_steps, log_steps, range,
    spans_decades,
};
use super::drawing::{Anchor, Drawing, Ink, VectorPath};
use super::picture::{ColourMap, Look, PictureName, PictureSettings};
use super::spectrum::described;
use super::text::{exactly, plain};
use crate::settings::Choice;
use crate::train::landscape::{Axis, Landscape};
use crate::train::{MOST_LINES, TrainError, read_regular};

/// On a logarithmic scale, losses below the largest by more than this factor count as zero.
const NEGLIGIBLE: f64 = 1e-12;

/// What a landscape is of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Quantity {
    Loss,
    Accuracy,
}

impl Quantity {
    fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Accuracy => "accuracy (%)",
        }
    }
}

/// Losses over one or two directions.
#[derive(Debug, Clone)]
pub(super) struct LoadedLandscape {
    pub title: String,
    /// Run, model and data; empty where they are not known.
    pub subject: String,
    pub axes: Vec<Axis>,
    pub quantity: Quantity,
    /// In the order of the grid, the first direction fastest; none where a point has not been evaluated.
    pub loss: Vec<Option<f64>>,
    /// NaN where it is unknown.
    pub accuracy: Vec<f64>,
    /// The checksum of the weights, where it is known.
    pub weights: Option<String>,
}

impl LoadedLandscape {
    /// Reads `landscape.json` and the lines of `landscape.csv`.
    pub fn read(folder: &Path) -> Result<Self, TrainError> {
        let Landscape { title, subject, axes, settings } = Landscape::read(folder)?;
        let unusable = |reason: String| TrainError::Results { path: folder.join("landscape.json"), reason };
        if !(1..=2).contains(&axes.len()) {
            return Err(unusable(format!("{} axes, expected one or two", axes.len())));
        }
        for Axis { name, values } in &axes {
            let rises = values.windows(2).all(|pair| pair[0] < pair[1]);
            if values.len() < 2 || !rises || values.iter().any(|value| !value.is_finite()) {
                return Err(unusable(format!(
                    "the values of axis `{}`: expected two or more, finite and rising",
                    plain(name)
                )));
            }
        }
        let count = axes.iter().try_fold(1usize, |count, axis| count.checked_mul(axis.values.len()));
        let count =
            count.filter(|&count| count <= Landscape::MOST_POINTS).ok_or_else(|| unusable("too many points".into()))?;
        let path = folder.join("landscape.csv");
        let text = read_regular(&path, MOST_LINES)?;
        let text = String::from_utf8_lossy(&text);
        let weights = settings.get("weights").cloned();
        let axes = axes.into_iter().map(|axis| Axis { name: plain(&axis.name), ..axis }).collect::<Vec<_>>();
        let (title, subject) = (plain(&title), plain(&subject));
        let mut landscape = Self {
            title,
            subject,
            axes,
            quantity: Quantity::Loss,
            loss: vec![None; count],
            accuracy: vec![f64::NAN; count],
            weights,
        };
        // A last line without its end was cut off and may lack digits.
        for line in text.split_inclusive('\n').skip(1).filter_map(|line| line.strip_suffix('\n')) {
            landscape.take_row(line);
        }
        Ok(landscape)
    }

    /// Reads one line of the table. A line that cannot be read counts as not evaluated.
    fn take_row(&mut self, line: &str) -> Option<()> {
        let fields: Vec<f64> = line.split(',').map(|field| field.trim().parse().ok()).collect::<Option<_>>()?;
        let (places, results) = fields.split_at_checked(self.axes.len())?;
        let &[loss, accuracy] = results else { return None };
        let (mut index, mut stride) = (0, 1);
        for (axis, &place) in self.axes.iter().zip(places) {
            index += stride * axis.nearest(place)?;
            stride *= axis.values.len();
        }
        (self.loss[index], self.accuracy[index]) = (Some(loss), accuracy);
        Some(())
    }

    /// The number of evaluated points, and how many of them have a loss that is not finite.
    pub fn counts(&self) -> (usize, usize) {
        let found = || self.loss.iter().flatten();
        (found().count(), found().filter(|loss| !loss.is_finite()).count())
    }

    /// The remark about missing points below a picture.
    pub fn remark(&self) -> Option<String> {
        let (found, wild) = self.counts();
        let missing = (found < self.loss.len()).then(|| format!("{found} of {} points evaluated", self.loss.len()));
        let what = if self.axes.len() == 2 { "drawn as the highest" } else { "left out" };
        let wild = (wild > 0).then(|| format!("{wild} not finite, {what}"));
        let remarks: Vec<String> = missing.into_iter().chain(wild).collect();
        (!remarks.is_empty()).then(|| remarks.join("; "))
    }

    /// The accuracy in percent as a landscape of its own, if any is known.
    fn of_accuracy(&self) -> Option<Self> {
        let percent = |share: &f64| share.is_finite().then_some(100.0 * share);
        let loss: Vec<Option<f64>> = self.accuracy.iter().map(percent).collect();
        let title = match self.title.strip_prefix("Loss") {
            Some(rest) => format!("Accuracy{rest}"),
            None => format!("{}: accuracy", self.title),
        };
        let found = loss.iter().any(Option::is_some);
        found.then(|| Self { title, quantity: Quantity::Accuracy, loss, ..self.clone() })
    }

    /// The point with the lowest loss, or with the highest accuracy.
    fn best(&self) -> Option<usize> {
        let sign = if self.quantity == Quantity::Loss { 1.0 } else { -1.0 };
        let finite = self.loss.iter().enumerate().filter_map(|(point, loss)| Some((point, sign * (*loss)?)));
        let finite = finite.filter(|(_, loss)| loss.is_finite());
        finite.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(point, _)| point)
    }

    fn finite_losses(&self) -> impl Iterator<Item = f64> {
        self.loss.iter().flatten().copied()
    }
}

impl Axis {
    /// The index of the value that equals this one up to rounding.
    fn nearest(&self, place: f64) -> Option<usize> {
        // The values rise.
        let above = self.values.partition_point(|value| *value < place);
        let distance = |index: usize| Some((self.values.get(index)? - place).abs());
        let index =
            if above > 0 && distance(above).is_none_or(|far| distance(above - 1).is_some_and(|near| near <= far)) {
                above - 1
            } else {
                above
            };
        // Halved, so that the span of the largest numbers does not overflow.
        let half_span = 0.5 * self.values.last()? - 0.5 * self.values.first()?;
        (distance(index)? <= 2e-6 * half_span).then_some(index)
    }

    pub(super) fn axis(&self) -> ChartAxis {
        let (low, high) = range(self.values.iter().copied()).unwrap_or_default();
        ChartAxis::exact(&self.name, low, high, false)
    }
}

/// The losses that separate bands of colour.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Levels {
    pub bounds: Vec<f64>,
    pub logarithmic: bool,
    pub colours: ColourMap,
}

impl Levels {
    /// The most levels, unless a user gives another number.
    pub const MOST: usize = 13;
    /// The largest share of the points below the lowest level.
    const MOST_BELOW: f64 = 0.1;

    /// At most so many round numbers that divide the losses of all the landscapes, and some more where much of the area
    /// lies below the lowest; logarithmic if the losses are far apart. None if no loss is finite.
    pub fn of(landscapes: &[&LoadedLandscape], most: usize, colours: ColourMap) -> Option<Self> {
        let losses = || landscapes.iter().flat_map(|landscape| landscape.finite_losses());
        let (low, high) = range(losses())?;
        // A loss of zero is below every level. It must not prevent a logarithmic scale for the others.
        let floor = range(losses().filter(|&loss| loss > 0.0)).map_or(low, |(least, _)| least.max(NEGLIGIBLE * high));
        let logarithmic = low >= 0.0 && spans_decades(floor, high);
        let bounds = match logarithmic {
            true => log_steps(floor, high, most),
            false => linear_steps(low, high, most),
        };
        let inside = |bounds: Vec<f64>, high: f64| -> Vec<f64> {
            bounds.into_iter().filter(|&bound| bound > low && bound < high).collect()
        };
        let mut bounds = inside(bounds, high);
        // Where much of the area lies below the lowest level, the levels are finer there.
        let (mut all, mut area): (Vec<f64>, f64) = (losses().filter(|loss| loss.is_finite()).collect(), 0.0);
        all.sort_by(f64::total_cmp);
        for _ in 0..4 {
            let Some(&lowest) = bounds.first() else { break };
            let below = all.partition_point(|&loss| loss < lowest) as f64 / all.len() as f64;
            let finer = inside(linear_steps(low, lowest, 5), lowest);
            if below <= Self::MOST_BELOW || below == area || finer.is_empty() {
                break;
            }
            area = below;
            bounds.splice(0..0, finer);
        }
        Some(Self { bounds, logarithmic, colours })
    }

    /// The colour of a band. Band 0 is below the first bound.
    pub fn colour(&self, band: usize) -> [u8; 3] {
        self.colours.at(band as f64 / self.bounds.len().max(1) as f64)
    }

    /// The place of a loss between its neighbours, from 0 to 1. It is logarithmic if the levels are.
    fn height(&self, loss: f64) -> f64 {
        match self.bounds.first() {
            // A loss far below the lowest level must not pull the line towards it.
            Some(&lowest) if self.logarithmic => loss.max(0.1 * lowest).ln(),
            _ => loss,
        }
    }

    /// The band of a loss.
    fn band(&self, loss: f64) -> usize {
        self.bounds.partition_point(|&bound| bound <= loss)
    }

    /// Labels of the bounds, with the digits that distinguish each from its neighbours.
    fn names(&self) -> Vec<String> {
        let bounds = &self.bounds;
        let gap = |index: usize| {
            let gaps = bounds[index.saturating_sub(1)..(index + 2).min(bounds.len())].windows(2);
            gaps.map(|pair| pair[1] - pair[0]).fold(f64::INFINITY, f64::min)
        };
        let name = |(index, &bound): (usize, &f64)| {
            let name = chart::tick_name(bound, gap(index));
            let shown = name.replace('−', "-").parse().unwrap_or(f64::NAN);
            // A level that a user gives may need more digits than a round number beside it.
            if (shown - bound).abs() <= 1e-6 * bound.abs() { name } else { exactly(bound) }
        };
        bounds.iter().enumerate().map(name).collect()
    }
}

/// The part of a cell at or above a level, as a polygon, and the line of the level through the cell.
fn part_above(corners: [([f64; 2], f64); 4], level: f64) -> (Vec<[f64; 2]>, Vec<Vec<[f64; 2]>>) {
    let (mut polygon, mut crossings) = (Vec::new(), Vec::new());
    for index in 0..4 {
        let ((from, a), (to, b)) = (corners[index], corners[(index + 1) % 4]);
        if a >= level {
            polygon.push(from);
        }
        if (a >= level) != (b >= level) {
            // Computed from the lower end in both cells at this edge, so that they agree exactly.
            // Halved, so that the difference of the largest numbers does not overflow.
            let share = |low: f64, high: f64| (0.5 * level - 0.5 * low) / (0.5 * high - 0.5 * low);
            let (low, high, share) = if a < b { (from, to, share(a, b)) } else { (to, from, share(b, a)) };
            // The difference of the smallest numbers is lost.
            let share = if share.is_finite() { share } else { 0.5 };
            let crossing = [low[0] + share * (high[0] - low[0]), low[1] + share * (high[1] - low[1])];
            polygon.push(crossing);
            crossings.push((crossing, a < b));
        }
    }
    // The line runs from where the perimeter leaves the upper part to where it enters it next.
    let count = crossings.len();
    let leaves = (0..count).filter(|&index| !crossings[index].1);
    let lines = leaves.map(|index| vec![crossings[index].0, crossings[(index + 1) % count].0]).collect();
    (polygon, lines)
}

/// Labels on the lines of the levels, apart from each other, from the marks and from the edges.
fn label_contours(drawing: &mut Drawing, panel: Panel, levels: &Levels, lines: &[Vec<[f64; 2]>], marks: Vec<[f64; 2]>) {
    let mut placed = marks;
    for (index, (name, places)) in levels.names().into_iter().zip(lines).enumerate() {
        let half = 3.4 * name.chars().count() as f64 + 2.0;
        let fits = |&[x, y]: &[f64; 2]| {
            (panel.left + half + 2.0..panel.right - half - 2.0).contains(&x)
                && (panel.top + 12.0..panel.bottom - 12.0).contains(&y)
        };
        let room = |&[x, y]: &[f64; 2]| placed.iter().map(|&[a, b]| (x - a).hypot(1.8 * (y - b))).fold(1e3, f64::min);
        // Some of the places are enough to choose from.
        let some = places.iter().step_by(places.len().div_ceil(400).max(1)).filter(|place| fits(place));
        let Some(&[x, y]) = some.max_by(|a, b| room(a).total_cmp(&room(b))) else { continue };
        if room(&[x, y]) < 2.0 * half + 8.0 {
            continue;
        }
        placed.push([x, y]);
        let corners = vec![[x - half, y - 7.0], [x + half, y - 7.0], [x + half, y + 7.0], [x - half, y + 7.0]];
        let behind = levels.colour(index + 1);
        drawing.polygon(corners, Ink::Colour(behind, 0.85));
        let is_light = behind.iter().map(|&channel| u32::from(channel)).sum::<u32>() > 330;
        let ink = Ink::Colour(if is_light { [0; 3] } else { [255; 3] }, 1.0);
        drawing.label([x, y + 0.35 * SMALL], name, SMALL, Anchor::Middle, ink);
    }
}

/// Bands of colour between the levels, lines along them, a cross at the origin and a ring at the best point.
fn draw_contours(drawing: &mut Drawing, panel: Panel, landscape: &LoadedLandscape, levels: &Levels) {
    let [x, y] = &landscape.axes[..] else { return };
    let (across, up) = (x.axis(), y.axis());
    let place = |i: usize, j: usize| [panel.x(across.place(x.values[i])), panel.y(up.place(y.values[j]))];
    // A loss that is not finite is higher than any other, but limited so that a line can be interpolated.
    let highest = range(landscape.finite_losses()).map_or(0.0, |(_, high)| high);
    let top = levels.bounds.last().map_or(highest, |&bound| highest.max(bound));
    let value = |i: usize, j: usize| {
        let loss = landscape.loss[j * x.values.len() + i]?;
        Some(levels.height(if loss.is_finite() { loss } else { top }))
    };
    let mut cells = Vec::new();
    for j in 0..y.values.len() - 1 {
        for i in 0..x.values.len() - 1 {
            let corner = |(i, j): (usize, usize)| Some((place(i, j), value(i, j)?));
            let corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)].map(corner);
            if let [Some(a), Some(b), Some(c), Some(d)] = corners {
                cells.push([a, b, c, d]);
            }
        }
    }
    // Each band covers all higher ones, and the next is drawn over it. So no seam shows between them.
    let below = f64::NEG_INFINITY;
    let mut places: Vec<Vec<[f64; 2]>> = Vec::new();
    for (band, level) in
        std::iter::once(below).chain(levels.bounds.iter().map(|&bound| levels.height(bound))).enumerate()
    {
        let (mut paths, mut lines) = (Vec::<Vec<[f64; 2]>>::new(), Vec::new());
        // Whether the last path is a rectangle of whole cells, which the next cell may extend.
        let mut whole = false;
        for &cell in &cells {
            let (polygon, border) = part_above(cell, level);
            let is_whole = border.is_empty() && !polygon.is_empty();
            match paths.last_mut() {
                Some(last) if whole && is_whole && (last[1], last[2]) == (polygon[0], polygon[3]) => {
                    (last[1], last[2]) = (polygon[1], polygon[2]);
                }
                _ if !polygon.is_empty() => paths.push(polygon),
                _ => {}
            }
            whole = is_whole;
            lines.extend(border);
        }
        let fill = Some(Ink::Colour(levels.colour(band), 1.0));
        drawing.shape(VectorPath { paths, closed: true, fill, ..VectorPath::default() });
        if band > 0 {
            places.push(lines.iter().map(|line| [0, 1].map(|k| 0.5 * line[0][k] + 0.5 * line[1][k])).collect());
        }
        let stroke = Some((Ink::Colour([255, 255, 255], 0.5), 0.8));
        drawing.shape(VectorPath { paths: lines, stroke, ..VectorPath::default() });
    }
    let (left, bottom) = (across.place(0.0), up.place(0.0));
    let inside = (0.0..=1.0).contains(&left) && (0.0..=1.0).contains(&bottom);
    let origin = inside.then(|| [panel.x(left), panel.y(bottom)]);
    let best = landscape.best().map(|point| place(point % x.values.len(), point / x.values.len()));
    label_contours(drawing, panel, levels, &places, origin.into_iter().chain(best).collect());
    if let Some([x, y]) = origin {
        let arm = 5.0;
        let cross = vec![vec![[x - arm, y - arm], [x + arm, y + arm]], vec![[x - arm, y + arm], [x + arm, y - arm]]];
        for (ink, width) in MARK {
            drawing.shape(VectorPath { paths: cross.clone(), stroke: Some((ink, width)), ..VectorPath::default() });
        }
    }
    if let Some(centre) = best {
        for stroke in MARK {
            let paths = vec![Style(0).marker(centre, 6.0)];
            drawing.shape(VectorPath { paths, closed: true, stroke: Some(stroke), ..VectorPath::default() });
        }
    }
}

/// Inks and widths of marks that show on any colour.
const MARK: [(Ink, f64); 2] = [(Ink::Colour([0, 0, 0], 0.7), 4.0), (Ink::Colour([255, 255, 255], 1.0), 1.8)];

/// The bands of colour from bottom to top, with the losses that separate them.
fn draw_colour_bar(drawing: &mut Drawing, panel: Panel, levels: &Levels, name: &str) {
    let bands = levels.bounds.len() + 1;
    let height = |bound: usize| panel.y(bound as f64 / bands as f64);
    for band in 0..bands {
        let (low, high) = (height(band), height(band + 1));
        let corners = vec![[panel.left, low], [panel.right, low], [panel.right, high], [panel.left, high]];
        drawing.polygon(corners, Ink::Colour(levels.colour(band), 1.0));
    }
    // The labels of many levels would lie over each other.
    let stride = (1.1 * SMALL * bands as f64 / (panel.bottom - panel.top)).ceil().max(1.0) as usize;
    for (index, name) in levels.names().into_iter().enumerate().step_by(stride) {
        let at = height(index + 1) + 0.35 * SMALL;
        drawing.label([panel.right + 5.0, at], name, SMALL, Anchor::Start, FAINT);
    }
    drawing.label([panel.left, panel.top - 7.0], name, SMALL, Anchor::Start, FAINT);
}

/// A horizontal colour bar for several pictures.
pub(super) fn colour_bar(levels: &Levels) -> Drawing {
    let names = levels.names();
    let bands = levels.bounds.len() + 1;
    let (width, height) = (chart::CHART.0, 58.0);
    let mut drawing = Drawing::new(width, height, "colours of the loss");
    let place = |bound: usize| 10.0 + (width - 20.0) * bound as f64 / bands as f64;
    for band in 0..bands {
        let (left, right) = (place(band), place(band + 1));
        let corners = vec![[left, 4.0], [right, 4.0], [right, 16.0], [left, 16.0]];
        drawing.polygon(corners, Ink::Colour(levels.colour(band), 1.0));
    }
    for (index, name) in names.into_iter().enumerate() {
        drawing.label([place(index + 1), if index % 2 == 0 { 28.0 } else { 40.0 }], name, SMALL, Anchor::Middle, FAINT);
    }
    drawing.label([0.5 * width, 54.0], "loss", SMALL, Anchor::Middle, FAINT);
    drawing
}

/// Contours over two axes, for the page.
pub(super) fn contour_chart(landscape: &LoadedLandscape, title: &str, levels: &Levels) -> Option<Drawing> {
    let [x, y] = &landscape.axes[..] else { return None };
    let (side, left, top) = (300.0, 58.0, 12.0);
    let mut drawing = Drawing::new(left + side + 14.0, top + side + 42.0, title);
    let panel = Panel { left, top, right: left + side, bottom: top + side };
    panel.axes(&mut drawing, &x.axis(), &y.axis());
    draw_contours(&mut drawing, panel, landscape, levels);
    Some(drawing)
}

/// Contours over two axes with a colour bar, for paper.
fn contours(landscape: &LoadedLandscape, levels: &Levels, look: &Look) -> Result<Option<Drawing>, TrainError> {
    let [x, y] = &landscape.axes[..] else { return Ok(None) };
    let (left, right, bottom) = (58.0, 14.0 + 82.0, 42.0 + remark_height(landscape));
    let LoadedLandscape { title, subject, .. } = landscape;
    let frame = look.frame([300.0, 300.0], [left + right, bottom], &[subject, title])?;
    let mut drawing = frame.drawing(&described(subject, title));
    let panel = Panel { left, top: frame.top(), right: frame.width - right, bottom: frame.height - bottom };
    panel.axes(&mut drawing, &x.axis(), &y.axis());
    draw_contours(&mut drawing, panel, landscape, levels);
    let (left, right) = (panel.right + 16.0, panel.right + 32.0);
    let bar = Panel { left, right, top: panel.top + 12.0, bottom: panel.bottom };
    draw_colour_bar(&mut drawing, bar, levels, landscape.quantity.name());
    draw_remark(&mut drawing, landscape);
    Ok(Some(drawing))
}

/// A view of a box whose three coordinates run from 0 to 1: turned about its vertical axis, then seen from above the
/// horizon, in parallel projection.
struct View {
    /// The place of the middle of the floor.
    middle: [f64; 2],
    /// Half of an edge of the floor.
    size: f64,
}

impl View {
    const TURN: f64 = 35.0 * std::f64::consts::PI / 180.0;
    const ABOVE: f64 = 48.0 * std::f64::consts::PI / 180.0;
    /// The height of the box over half of an edge of its floor.
    const HEIGHT: f64 = 1.3;

    /// The width and the height of the box as seen, for a size of 1, and how far it reaches below its middle.
    fn extent() -> ([f64; 2], f64) {
        let corner = Self::TURN.sin() + Self::TURN.cos();
        let below = corner * Self::ABOVE.sin();
        ([2.0 * corner, 2.0 * below + Self::HEIGHT * Self::ABOVE.cos()], below)
    }

    /// The largest view within an area.
    fn within(area: Panel) -> Self {
        let ([width, height], below) = Self::extent();
        let size = ((area.right - area.left) / width).min((area.bottom - area.top) / height);
        // What is left of the height goes above and below in equal parts.
        let spare = area.bottom - area.top - size * height;
        Self { middle: [area.x(0.5), area.bottom - 0.5 * spare - size * below], size }
    }

    /// How far away a place of the floor is.
    fn depth(x: f64, y: f64) -> f64 {
        (2.0 * x - 1.0) * Self::TURN.sin() + (2.0 * y - 1.0) * Self::TURN.cos()
    }

    fn see(&self, [x, y, z]: [f64; 3]) -> [f64; 2] {
        let right = (2.0 * x - 1.0) * Self::TURN.cos() - (2.0 * y - 1.0) * Self::TURN.sin();
        let upward = Self::HEIGHT * z * Self::ABOVE.cos() + Self::depth(x, y) * Self::ABOVE.sin();
        [self.middle[0] + self.size * right, self.middle[1] - self.size * upward]
    }

    /// The walls behind the surface with lines at these heights, and the edges of the floor.
    fn draw_box(&self, drawing: &mut Drawing, heights: &[f64]) {
        let wall = |&z: &f64| [[0.0, 1.0, z], [1.0, 1.0, z], [1.0, 0.0, z]].map(|place| self.see(place)).to_vec();
        let mut paths: Vec<_> = heights.iter().map(wall).collect();
        let edge = |[x, y]: [f64; 2]| vec![self.see([x, y, 0.0]), self.see([x, y, 1.0])];
        paths.extend([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]].map(edge));
        drawing.shape(VectorPath { paths, stroke: Some((Ink::Text(0.16), 1.0)), ..VectorPath::default() });
        let floor = [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]].map(|[x, y]| self.see([x, y, 0.0]));
        let stroke = Some((Ink::Text(0.35), 1.0));
        drawing.shape(VectorPath { paths: vec![floor.to_vec()], closed: true, stroke, ..VectorPath::default() });
    }

    /// The labels of the two axes along the front edges of the floor, and of the heights at the left edge. The names of
    /// the axes lie beside their edges if they fit before `end`, and else below the box.
    fn draw_labels(
        &self,
        drawing: &mut Drawing,
        [across, along, up]: [&ChartAxis; 3],
        heights: &[(f64, String)],
        end: f64,
    ) {
        for (value, name) in heights {
            let [x, y] = self.see([0.0, 1.0, up.place(*value).clamp(0.0, 1.0)]);
            drawing.label([x - 8.0, y + 4.0], name, SMALL, Anchor::End, FAINT);
        }
        let [left, top] = self.see([0.0, 1.0, 1.0]);
        drawing.label([left, top - 14.0], &up.label, SMALL, Anchor::End, FAINT);
        // Labels of the right edge begin at it and those of the left one end at it, so that they do not meet at the
        // corner in front. They lie below each other, so their height must fit, and not their width.
        let most = |axis: usize| {
            let ends = [[0.0, 0.0, 0.0], if axis == 0 { [1.0, 0.0, 0.0] } else { [0.0, 1.0, 0.0] }];
            let [a, b] = ends.map(|end| self.see(end));
            ((b[1] - a[1]).abs() / (2.2 * SMALL)).clamp(2.0, 6.0) as usize
        };
        let widest = |ticks: &[(f64, String)]| ticks.iter().map(|(_, name)| label_width(name)).fold(0.0, f64::max);
        let right = across.ticks(most(0));
        for (value, name) in &right {
            let [x, y] = self.see([across.place(*value), 0.0, 0.0]);
            drawing.label([x + 5.0, y + 15.0], name, SMALL, Anchor::Start, FAINT);
        }
        let left = along.ticks(most(1));
        for (value, name) in &left {
            let [x, y] = self.see([0.0, along.place(*value), 0.0]);
            drawing.label([x - 5.0, y + 15.0], name, SMALL, Anchor::End, FAINT);
        }
        let [mut x, y] = self.see([0.5, 0.0, 0.0]);
        x += 14.0 + widest(&right);
        let [mut other, _] = self.see([0.0, 0.5, 0.0]);
        other -= 14.0 + widest(&left);
        if x + label_width(&across.label) < end && other - label_width(&along.label) > 4.0 {
            drawing.label([x, y + 32.0], &across.label, SMALL, Anchor::Start, FAINT);
            drawing.label([other, y + 32.0], &along.label, SMALL, Anchor::End, FAINT);
        } else {
            let below = self.see([0.0, 0.0, 0.0])[1] + 32.0;
            drawing.label([end, below], &across.label, SMALL, Anchor::End, FAINT);
            drawing.label([4.0, below], &along.label, SMALL, Anchor::Start, FAINT);
        }
    }
}

/// A surface over two axes, seen from above one of its corners.
fn surface(landscape: &LoadedLandscape, levels: &Levels, look: &Look) -> Result<Option<Drawing>, TrainError> {
    let [x, y] = &landscape.axes[..] else { return Ok(None) };
    let Some((low, high)) = range(landscape.finite_losses()) else { return Ok(None) };
    let up = match levels.logarithmic {
        // Zeros lie on the floor.
        true => {
            let least = range(landscape.finite_losses().filter(|&loss| loss > 0.0)).map_or(low, |(least, _)| least);
            ChartAxis::exact("loss", least.max(NEGLIGIBLE * high), high, true)
        }
        false => ChartAxis::exact("loss", low, high, false),
    };
    let (across, along) = (x.axis(), y.axis());
    let LoadedLandscape { title, subject, .. } = landscape;
    // Room for the labels on both sides, and for the colour bar on the right.
    let (left, right, bottom) = (60.0, 116.0, 38.0 + remark_height(landscape));
    let (area, below_title) = (View::extent().0.map(|length| 150.0 * length), 16.0);
    let frame = look.frame(area, [left + right, below_title + bottom], &[subject, title])?;
    let mut drawing = frame.drawing(&described(subject, &format!("{title}, as a surface")));
    let area =
        Panel { left, top: frame.top() + below_title, right: frame.width - right, bottom: frame.height - bottom };
    let view = View::within(area);
    let heights = up.ticks(((area.bottom - area.top) / 60.0).clamp(2.0, 6.0) as usize);
    let share = |value: f64| up.place(value).clamp(0.0, 1.0);
    view.draw_box(&mut drawing, &heights.iter().map(|(value, _)| share(*value)).collect::<Vec<_>>());

    let mut cells = Vec::new();
    for j in 0..y.values.len() - 1 {
        for i in 0..x.values.len() - 1 {
            let corner = |(i, j): (usize, usize)| {
                let loss = landscape.loss[j * x.values.len() + i]?;
                let z = if loss.is_finite() { share(loss.max(up.low)) } else { 1.0 };
                Some([across.place(x.values[i]), along.place(y.values[j]), z])
            };
            if let [Some(a), Some(b), Some(c), Some(d)] = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)].map(corner) {
                let far = View::depth(0.5 * (a[0] + c[0]), 0.5 * (a[1] + c[1]));
                let mean = [a, b, c, d].iter().map(|corner| corner[2]).sum::<f64>() / 4.0;
                cells.push((far, levels.colour(levels.band(up.value(mean))), [a, b, c, d]));
            }
        }
    }
    cells.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    for (_, colour, cell) in cells {
        let paths = vec![cell.map(|corner| view.see(corner)).to_vec()];
        let (fill, stroke) = (Some(Ink::Colour(colour, 1.0)), Some((Ink::Colour([0, 0, 0], 0.35), 0.4)));
        drawing.shape(VectorPath { paths, closed: true, fill, stroke, ..VectorPath::default() });
    }
    let (left, right) = (frame.width - 76.0, frame.width - 60.0);
    view.draw_labels(&mut drawing, [&across, &along, &up], &heights, left - 8.0);
    let bar = Panel { left, right, top: area.top + 20.0, bottom: area.bottom };
    draw_colour_bar(&mut drawing, bar, levels, landscape.quantity.name());
    draw_remark(&mut drawing, landscape);
    Ok(Some(drawing))
}

/// A line of the chart of a landscape over one axis.
pub(super) fn line(landscape: &LoadedLandscape, values: impl Iterator<Item = f64>, name: &str, style: Style) -> Line {
    let places = landscape.axes.first().map(|axis| axis.values.clone()).unwrap_or_default();
    let points = places.into_iter().zip(values).map(|(x, value)| [x, value]).collect();
    Line { name: name.into(), style, points, band: Vec::new(), raw: Vec::new(), window: None, markers: false }
}

/// The losses; NaN where there is none.
pub(super) fn losses(landscape: &LoadedLandscape) -> impl Iterator<Item = f64> {
    landscape.loss.iter().map(|loss| loss.unwrap_or(f64::NAN))
}

/// Loss and accuracy over one axis, each with its own vertical axis.
fn curve(landscape: &LoadedLandscape, look: &Look) -> Result<Option<Drawing>, TrainError> {
    let [direction] = &landscape.axes[..] else { return Ok(None) };
    let Some(loss) = ChartAxis::fitting("loss", losses(landscape)) else { return Ok(None) };
    let LoadedLandscape { title, subject, .. } = landscape;
    let (left, right, legend, bottom) = (64.0, 62.0, 22.0, 46.0 + remark_height(landscape));
    let frame = look.frame([394.0, 248.0], [left + right, legend + bottom], &[subject, title])?;
    let mut drawing = frame.drawing(&described(subject, title));
    let top = frame.top() + legend;
    let panel = Panel { left, top, right: frame.width - right, bottom: frame.height - bottom };
    let x = direction.axis();
    panel.axes(&mut drawing, &x, &loss);
    let percent = || landscape.accuracy.iter().map(|share| 100.0 * share);
    let right = ChartAxis::fitting("accuracy (%)", percent()).map(|axis| {
        ChartAxis::exact(&axis.label, axis.low.max(0.0), axis.high.min(100.0).max(axis.low.max(0.0) + 1.0), false)
    });
    let (first, second) = (Style(0), Style(1));
    draw_lines(&mut drawing, panel, &x, &loss, &[line(landscape, losses(landscape), "loss", first)]);
    let mut legend = vec![("loss (left)", first)];
    if let Some(accuracy) = &right {
        draw_lines(&mut drawing, panel, &x, accuracy, &[line(landscape, percent(), "accuracy", second)]);
        for (value, name) in accuracy.ticks(((panel.bottom - panel.top) / 40.0).clamp(2.0, 6.0) as usize) {
            let at = panel.y(accuracy.place(value)) + 0.35 * SMALL;
            drawing.label([panel.right + 6.0, at], name, SMALL, Anchor::Start, FAINT);
        }
        drawing.vertical_label([frame.width - 10.0, panel.y(0.5)], accuracy.label.as_str(), SMALL, FAINT);
        legend.push(("accuracy (right)", second));
    }
    for (index, (name, style)) in legend.into_iter().enumerate() {
        let (left, y) = (panel.left + 130.0 * index as f64, panel.top - 16.0);
        drawing.shape(VectorPath {
            paths: vec![vec![[left, y], [left + 26.0, y]]],
            stroke: Some((style.ink(1.0), 2.0)),
            dash: style.dash(),
            ..VectorPath::default()
        });
        drawing.label([left + 32.0, y + 4.0], name, SMALL, Anchor::Start, FAINT);
    }
    draw_remark(&mut drawing, landscape);
    Ok(Some(drawing))
}

/// The height of the remark about missing points below a picture.
fn remark_height(landscape: &LoadedLandscape) -> f64 {
    if landscape.remark().is_some() { 16.0 } else { 0.0 }
}

fn draw_remark(drawing: &mut Drawing, landscape: &LoadedLandscape) {
    if let Some(remark) = landscape.remark() {
        drawing.label([8.0, drawing.height - 7.0], remark, SMALL, Anchor::Start, FAINT);
    }
}

/// The wanted pictures of a landscape; none if no loss is finite.
pub(super) fn landscape_drawings(
    landscape: &LoadedLandscape,
    look: &Look,
) -> Result<Vec<(PictureName, Drawing)>, TrainError> {
    let Some(mut levels) = Levels::of(&[landscape], look.level_count, look.colours) else { return Ok(Vec::new()) };
    let accuracy = landscape.of_accuracy();
    let of_accuracy = accuracy
        .as_ref()
        .and_then(|accuracy| Some((accuracy, Levels::of(&[accuracy], look.level_count, look.colours)?)));
    if let Some(own) = &look.levels {
        levels.bounds.clone_from(own);
    }
    let draw = |name: PictureName| match name {
        PictureName::Contour => contours(landscape, &levels, look),
        PictureName::Surface => surface(landscape, &levels, look),
        PictureName::Accuracy => match &of_accuracy {
            Some((accuracy, levels)) => contours(accuracy, levels, look),
            None => Ok(None),
        },
        PictureName::Curve => curve(landscape, look),
        PictureName::Spectrum => Ok(None),
    };
    let mut drawings = Vec::new();
    for &name in PictureName::ALL.iter().filter(|name| look.draws(**name)) {
        drawings.extend(draw(name)?.map(|drawing| (name, drawing)));
    }
    Ok(drawings)
}

/// Writes pictures of the landscape in this folder (`landscape.json` and `landscape.csv`) beside these files, as SVG,
/// PNG and PDF on white: `contour`, `surface` and `accuracy` for two axes, `curve` for one. Points that have not been
/// evaluated stay blank. Levels and heights are logarithmic if the largest loss is at least thirty times the smallest,
/// and levels are finer where much of the area lies below the lowest. Returns the files written; none if no loss is
/// finite.
///
/// # Errors
/// Files that cannot be read as a landscape, or that cannot be written.
pub fn landscape_pictures(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let look = Look::new(&PictureSettings::default())?;
    let mut written = Vec::new();
    for (name, drawing) in landscape_drawings(&LoadedLandscape::read(folder)?, &look)? {
        written.extend(look.write(&drawing, folder, name)?);
    }
    Ok(written)
}
