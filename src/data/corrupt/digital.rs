//! Contrast, saturation, elastic transforms and pixelation.

use super::draws::Draws;
use super::filters::{self, Edge, from_hsv, interpolate, pixels, to_hsv};
use super::{CHANNELS, SIDE, bytes, picture};

/// Changes hue, saturation and value of each pixel.
pub fn in_hsv(image: &[u8], change: impl Fn([f64; 3]) -> [f64; 3]) -> Vec<u8> {
    let values = picture(image);
    let changed = |pixel: &[f64]| from_hsv(change(to_hsv([pixel[0], pixel[1], pixel[2]])));
    bytes(&values.chunks_exact(CHANNELS).flat_map(changed).collect::<Vec<f64>>())
}

pub fn saturate(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let (factor, more) = [(0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)][severity];
    in_hsv(image, |[hue, saturation, value]| [hue, (saturation * factor + more).clamp(0.0, 1.0), value])
}

pub fn contrast(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let factor = [0.75, 0.5, 0.4, 0.3, 0.15][severity];
    let values = picture(image);
    let mut means = [0.0; CHANNELS];
    values.iter().enumerate().for_each(|(e, value)| means[e % CHANNELS] += value);
    let means = means.map(|sum| sum / (SIDE * SIDE) as f64);
    let nearer = |(e, value): (usize, &f64)| (value - means[e % CHANNELS]) * factor + means[e % CHANNELS];
    bytes(&values.iter().enumerate().map(nearer).collect::<Vec<f64>>())
}

/// A random affine map, by three points that are moved, and then a smooth random shift of every pixel.
pub fn elastic(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let side = SIDE as f64;
    let (strength, smoothness, shift) =
        [(0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)][severity];
    let (strength, smoothness, shift) = (side * strength, side * smoothness, side * shift);
    let (middle, reach) = (side / 2.0, (SIDE / 3) as f64);
    let before = [[middle + reach, middle + reach], [middle + reach, middle - reach], [middle - reach, middle - reach]];
    let after = before.map(|point| point.map(|place| place + draws.between(-shift, shift)));
    let values = picture(image);
    let warped: Vec<f64> = match inverse_map(before, after) {
        Some(map) => pixels(CHANNELS)
            .map(|(i, j, c)| {
                let [x, y] = map([j as f64, i as f64]);
                interpolate(&values, (y, x), c, Edge::Mirror)
            })
            .collect(),
        None => values,
    };
    let mut smooth = || {
        let noise: Vec<f64> = (0..SIDE * SIDE).map(|_| draws.between(-1.0, 1.0)).collect();
        filters::gaussian(&noise, 1, smoothness, Edge::Reflect, 3.0)
    };
    let (across, down) = (smooth(), smooth());
    let shifted = |(i, j, c): (usize, usize, usize)| {
        let (dx, dy) = (across[i * SIDE + j] * strength, down[i * SIDE + j] * strength);
        interpolate(&warped, (i as f64 + dy, j as f64 + dx), c, Edge::Reflect)
    };
    bytes(&pixels(CHANNELS).map(shifted).collect::<Vec<f64>>())
}

/// The affine map, of column and row, that takes the points `after` to the points `before`; none if they lie on a line.
fn inverse_map(before: [[f64; 2]; 3], after: [[f64; 2]; 3]) -> Option<impl Fn([f64; 2]) -> [f64; 2]> {
    let along = |points: &[[f64; 2]; 3], k: usize| [points[k][0] - points[0][0], points[k][1] - points[0][1]];
    let ([ax, ay], [bx, by]) = (along(&after, 1), along(&after, 2));
    let area = ax * by - bx * ay;
    let (to_a, to_b) = (along(&before, 1), along(&before, 2));
    (area != 0.0).then_some(move |[x, y]: [f64; 2]| {
        let (dx, dy) = (x - after[0][0], y - after[0][1]);
        let (a, b) = ((dx * by - bx * dy) / area, (ax * dy - dx * ay) / area);
        [0, 1].map(|k| before[0][k] + a * to_a[k] + b * to_b[k])
    })
}

/// A smaller image and back, each pixel the mean of those whose centres it covers.
pub fn pixelate(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let small = (SIDE as f64 * [0.95, 0.9, 0.85, 0.75, 0.65][severity]) as usize;
    resize(&resize(image, SIDE, small), small, SIDE)
}

/// Pillow's box filter, over rows and then columns, with the weights in units of 2^−22.
fn resize(image: &[u8], from: usize, to: usize) -> Vec<u8> {
    let taps: Vec<(usize, Vec<i64>)> = (0..to).map(|place| box_taps(place, from, to)).collect();
    let weighed = |(first, weights): &(usize, Vec<i64>), at: &dyn Fn(usize) -> u8| {
        let sum: i64 = weights.iter().enumerate().map(|(k, weight)| weight * i64::from(at(first + k))).sum();
        ((sum + (1 << 21)) >> 22).clamp(0, 255) as u8
    };
    let mut rows = Vec::with_capacity(from * to * CHANNELS);
    for (i, j, c) in grid(from, to) {
        rows.push(weighed(&taps[j], &|k| image[(i * from + k) * CHANNELS + c]));
    }
    grid(to, to).map(|(i, j, c)| weighed(&taps[i], &|k| rows[(k * to + j) * CHANNELS + c])).collect()
}

fn grid(height: usize, width: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..height * width * CHANNELS).map(move |e| (e / (width * CHANNELS), e / CHANNELS % width, e % CHANNELS))
}

/// The first pixel that pixel `place` of `to` covers, and the weights from there on.
fn box_taps(place: usize, from: usize, to: usize) -> (usize, Vec<i64>) {
    let scale = from as f64 / to as f64;
    let wide = scale.max(1.0);
    let (center, support) = ((place as f64 + 0.5) * scale, 0.5 * wide);
    let first = (center - support + 0.5).max(0.0) as usize;
    let end = ((center + support + 0.5) as usize).min(from);
    let covered = |x: usize| {
        let distance = (x as f64 - center + 0.5) * (1.0 / wide);
        f64::from(u8::from(distance > -0.5 && distance <= 0.5))
    };
    let sum: f64 = (first..end).map(covered).sum();
    let fixed = |x: usize| (0.5 + covered(x) / sum * f64::from(1 << 22)) as i64;
    (first, (first..end).map(fixed).collect())
}
