//! Filters that several corruptions share. Rounding and edges follow SciPy, OpenCV, ImageMagick and Pillow, which the
//! authors' code calls.

use super::{CHANNELS, SIDE};

/// What lies beyond the edge of a line of `len` values.
#[derive(Clone, Copy)]
pub enum Edge {
    /// The last value.
    Nearest,
    /// The values in reverse, with the last one twice.
    Reflect,
    /// The values in reverse, with the last one once.
    Mirror,
}

impl Edge {
    /// The index of the value at a place, which may lie outside by less than the length.
    pub fn index(self, place: isize, len: usize) -> usize {
        let last = len as isize - 1;
        let found = match self {
            Self::Nearest => place.clamp(0, last),
            Self::Reflect if place < 0 => -place - 1,
            Self::Reflect if place > last => 2 * last + 1 - place,
            Self::Mirror if place < 0 => -place,
            Self::Mirror if place > last => 2 * last - place,
            _ => place,
        };
        found.clamp(0, last) as usize
    }
}

/// A Gaussian filter over rows and columns of `[SIDE, SIDE, channels]`, cut off at `truncate` deviations.
pub fn gaussian(values: &[f64], channels: usize, sigma: f64, edge: Edge, truncate: f64) -> Vec<f64> {
    if sigma <= 1e-15 {
        return values.to_vec();
    }
    let radius = (truncate * sigma + 0.5) as isize;
    let weight = |x: isize| (-0.5 / (sigma * sigma) * (x * x) as f64).exp();
    let sum: f64 = (-radius..=radius).map(weight).sum();
    let weights: Vec<f64> = (0..=radius).map(|x| weight(x) / sum).collect();
    let pass = |from: &[f64], stride: usize, across: usize| {
        let mut to = vec![0.0; from.len()];
        for line in 0..SIDE {
            for c in 0..channels {
                let place = |k: usize| line * across + k * stride + c;
                for k in 0..SIDE {
                    let at = |x: isize| from[place(edge.index(k as isize + x, SIDE))];
                    let mut value = at(0) * weights[0];
                    for x in (1..=radius).rev() {
                        value += (at(-x) + at(x)) * weights[x as usize];
                    }
                    to[place(k)] = value;
                }
            }
        }
        to
    };
    let rows = pass(values, SIDE * channels, channels);
    pass(&rows, channels, SIDE * channels)
}

/// A correlation of an image with a square kernel of odd side.
pub fn correlate(values: &[f64], kernel: &[f64], side: usize, edge: Edge) -> Vec<f64> {
    let half = (side / 2) as isize;
    let mut out = Vec::with_capacity(values.len());
    for (i, j, c) in pixels(CHANNELS) {
        let mut sum = 0.0;
        for (e, &weight) in kernel.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
            let row = edge.index(i as isize + (e / side) as isize - half, SIDE);
            let column = edge.index(j as isize + (e % side) as isize - half, SIDE);
            sum += weight * values[(row * SIDE + column) * CHANNELS + c];
        }
        out.push(sum);
    }
    out
}

/// Row, column and channel of every value.
pub fn pixels(channels: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..SIDE * SIDE * channels).map(move |e| (e / (SIDE * channels), e / channels % SIDE, e % channels))
}

/// ImageMagick's motion blur of bytes `[SIDE, SIDE, channels]`: half a Gaussian along the angle, in degrees, over
/// `2 ⌈radius⌉ + 1` pixels.
pub fn motion_blur(bytes: &[u8], channels: usize, radius: f64, sigma: f64, angle: f64) -> Vec<u8> {
    let width = 2 * radius.ceil() as usize + 1;
    let weights: Vec<f64> = (0..width).map(|i| (-((i * i) as f64) / (2.0 * sigma * sigma)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let (sine, cosine) = angle.to_radians().sin_cos();
    let offset = |i: usize, share: f64| (i as f64 * share - 0.5).ceil() as isize;
    let value = |(row, column, c): (usize, usize, usize)| {
        let mut blurred = 0.0;
        for (i, weight) in weights.iter().enumerate() {
            let row = Edge::Nearest.index(row as isize + offset(i, sine), SIDE);
            let column = Edge::Nearest.index(column as isize + offset(i, cosine), SIDE);
            blurred += weight / sum * f64::from(bytes[(row * SIDE + column) * channels + c]);
        }
        (blurred + 0.5) as u8
    };
    pixels(channels).map(value).collect()
}

/// The middle of an image `[SIDE, SIDE, channels]`, enlarged by linear interpolation between its corner pixels, and cut
/// to its size.
pub fn clipped_zoom(values: &[f64], channels: usize, factor: f64) -> Vec<f64> {
    let part = (SIDE as f64 / factor).ceil() as usize;
    let top = (SIDE - part) / 2;
    let size = (part as f64 * factor).round_ties_even() as usize;
    let trim = (size - SIDE) / 2;
    let step = if size > 1 { (part - 1) as f64 / (size - 1) as f64 } else { 1.0 };
    let taps: Vec<(usize, f64)> = (trim..trim + SIDE)
        .map(|place| {
            let at = (place as f64 * step).min((part - 1) as f64);
            (at.floor() as usize, at - at.floor())
        })
        .collect();
    let at =
        |i: usize, j: usize, c: usize| values[((top + i.min(part - 1)) * SIDE + top + j.min(part - 1)) * channels + c];
    let value = |(row, column, c): (usize, usize, usize)| {
        let ((i, y), (j, x)) = (taps[row], taps[column]);
        let upper = (1.0 - x) * at(i, j, c) + x * at(i, j + 1, c);
        let lower = (1.0 - x) * at(i + 1, j, c) + x * at(i + 1, j + 1, c);
        (1.0 - y) * upper + y * lower
    };
    pixels(channels).map(value).collect()
}

/// Linear interpolation of channel `c` at a row and a column.
pub fn interpolate(values: &[f64], (row, column): (f64, f64), c: usize, edge: Edge) -> f64 {
    let (top, left) = (row.floor(), column.floor());
    let (y, x) = (row - top, column - left);
    let at = |i: f64, j: f64| {
        let (i, j) = (edge.index(i as isize, SIDE), edge.index(j as isize, SIDE));
        values[(i * SIDE + j) * CHANNELS + c]
    };
    (1.0 - y) * ((1.0 - x) * at(top, left) + x * at(top, left + 1.0))
        + y * ((1.0 - x) * at(top + 1.0, left) + x * at(top + 1.0, left + 1.0))
}

/// Hue, saturation and value, each from 0 to 1.
pub fn to_hsv([red, green, blue]: [f64; 3]) -> [f64; 3] {
    let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
    let range = most - least;
    if range == 0.0 {
        return [0.0, 0.0, most];
    }
    let hue = if blue == most {
        4.0 + (red - green) / range
    } else if green == most {
        2.0 + (blue - red) / range
    } else {
        (green - blue) / range
    };
    [(hue / 6.0).rem_euclid(1.0), range / most, most]
}

/// The colour of hue, saturation and value.
pub fn from_hsv([hue, saturation, value]: [f64; 3]) -> [f64; 3] {
    let sector = (hue * 6.0).floor();
    let rest = hue * 6.0 - sector;
    let low = value * (1.0 - saturation);
    let falls = value * (1.0 - rest * saturation);
    let rises = value * (1.0 - (1.0 - rest) * saturation);
    match sector as i64 % 6 {
        0 => [value, rises, low],
        1 => [falls, value, low],
        2 => [low, value, rises],
        3 => [low, falls, value],
        4 => [rises, low, value],
        _ => [value, low, falls],
    }
}
