//! Spectral densities as curves.

use std::path::{Path, PathBuf};

use super::chart::{ChartAxis, Line, Panel, Style, draw_lines, range};
use super::drawing::Drawing;
use super::picture::{Look, PictureName, PictureSettings};
use crate::curvature::Density;
use crate::train::TrainError;

/// Densities below the largest by more than this factor are left out: they are tails of the smoothing.
const SMALLEST: f64 = 1e-6;

/// The finite peaks, and their range of eigenvalues.
pub(super) fn usable(nodes: &[f64], weights: &[f64]) -> Option<(Density, f64, f64)> {
    let sound = |&(node, weight): &(&f64, &f64)| node.is_finite() && weight.is_finite() && *weight >= 0.0;
    let (nodes, weights): (Vec<f64>, Vec<f64>) = nodes.iter().zip(weights).filter(sound).unzip();
    let (low, high) = range(nodes.iter().copied())?;
    (weights.iter().sum::<f64>() > 0.0).then_some((Density { nodes, weights }, low, high))
}

/// Densities over a common range of eigenvalues. Every peak is smoothed to a hundredth of the range.
pub(super) fn lines(densities: &[(&str, Style, Density)]) -> Option<(ChartAxis, ChartAxis, Vec<Line>)> {
    let nodes = || densities.iter().flat_map(|(_, _, density)| density.nodes.iter().copied());
    let (low, high) = range(nodes())?;
    let span = if high > low { high - low } else { low.abs().max(1.0) };
    let sigma = span / 100.0;
    let (left, right) = (low - 5.5 * sigma, high + 5.5 * sigma);
    const POINTS: usize = 400;
    let lambda = |index| left + (right - left) * index as f64 / (POINTS - 1) as f64;
    let mut lines: Vec<Line> = densities
        .iter()
        .map(|(name, style, density)| {
            let points = (0..POINTS).map(|index| [lambda(index), density.at(lambda(index), sigma)]).collect();
            Line {
                name: name.to_string(),
                style: *style,
                points,
                band: Vec::new(),
                raw: Vec::new(),
                window: None,
                markers: false,
            }
        })
        .collect();
    let (_, most) = range(lines.iter().flat_map(|line| line.points.iter().map(|point| point[1])))?;
    for point in lines.iter_mut().flat_map(|line| &mut line.points) {
        if point[1] < SMALLEST * most {
            point[1] = f64::NAN;
        }
    }
    let (least, _) = range(lines.iter().flat_map(|line| line.points.iter().map(|point| point[1])))?;
    let up = ChartAxis::exact("density", 0.6 * least, 2.0 * most, true);
    Some((ChartAxis::exact("eigenvalue of the Hessian", left, right, false), up, lines))
}

/// Draws densities, from `top` downwards.
pub(super) fn spectrum(
    title: &str,
    densities: &[(&str, Style, Density)],
    (width, height): (f64, f64),
    top: f64,
) -> Option<Drawing> {
    let (x, y, lines) = lines(densities)?;
    let mut drawing = Drawing::new(width, height, title);
    let panel = Panel { left: 62.0, top, right: width - 14.0, bottom: height - 42.0 };
    panel.axes(&mut drawing, &x, &y);
    draw_lines(&mut drawing, panel, &x, &y, &lines);
    Some(drawing)
}

/// The picture of a spectrum. None if nothing can be drawn.
pub(super) fn spectrum_drawing(density: Density, subject: &str, look: &Look) -> Result<Option<Drawing>, TrainError> {
    let what = "Spectral density of the Hessian";
    let Some((x, y, lines)) = lines(&[("density", Style(0), density)]) else { return Ok(None) };
    let frame = look.frame([444.0, 274.0], [62.0 + 14.0, 42.0], &[subject, what])?;
    let mut drawing = frame.drawing(&described(subject, what));
    let panel = Panel { left: 62.0, top: frame.top(), right: frame.width - 14.0, bottom: frame.height - 42.0 };
    panel.axes(&mut drawing, &x, &y);
    draw_lines(&mut drawing, panel, &x, &y, &lines);
    Ok(Some(drawing))
}

/// What a picture shows and of what, for readers who do not see it.
pub(super) fn described(subject: &str, what: &str) -> String {
    if subject.is_empty() { what.into() } else { format!("{what}: {subject}") }
}

/// Draws the density of eigenvalues as a sum of peaks (`nodes` with their `weights`, as in a
/// [`Density`](crate::curvature::Density)), each smoothed by a normal distribution with a hundredth of the range as its
/// deviation, over a logarithmic scale. `subject` says in the title what the spectrum is of. The pictures `spectrum.…`
/// are written to a folder. If one list is longer, its rest is ignored. Returns the files written; none if there is no
/// finite peak.
///
/// # Errors
/// A folder that cannot be written to.
pub fn spectrum_pictures(
    nodes: &[f64],
    weights: &[f64],
    subject: &str,
    folder: &Path,
) -> Result<Vec<PathBuf>, TrainError> {
    let look = Look::new(&PictureSettings::default())?;
    let Some((density, _, _)) = usable(nodes, weights) else { return Ok(Vec::new()) };
    let Some(drawing) = spectrum_drawing(density, subject, &look)? else { return Ok(Vec::new()) };
    look.write(&drawing, folder, PictureName::Spectrum)
}
