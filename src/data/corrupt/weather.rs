//! Snow, fog and brightness.

use super::draws::Draws;
use super::filters::{clipped_zoom, motion_blur, pixels};
use super::{CHANNELS, SIDE, bytes, picture};

/// Flakes are what is left of noise above a threshold, enlarged and blurred along a direction, and the same turned by
/// half a circle; the image itself is brightened.
pub fn snow(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let (mean, scale, zoom, threshold, radius, sigma, kept) = [
        (0.1, 0.2, 1.0, 0.6, 8.0, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10.0, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10.0, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12.0, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14.0, 12.0, 0.8),
    ][severity];
    let noise: Vec<f64> = (0..SIDE * SIDE).map(|_| mean + scale * draws.normal()).collect();
    let flakes: Vec<f64> =
        clipped_zoom(&noise, 1, zoom).into_iter().map(|value| if value < threshold { 0.0 } else { value }).collect();
    let layer = motion_blur(&bytes(&flakes), 1, radius, sigma, draws.between(-135.0, -45.0));
    let values = picture(image);
    let value = |(i, j, c): (usize, usize, usize)| {
        let at = (i * SIDE + j) * CHANNELS;
        let grey = 0.299 * values[at] + 0.587 * values[at + 1] + 0.114 * values[at + 2];
        let bright = kept * values[at + c] + (1.0 - kept) * values[at + c].max(grey * 1.5 + 0.5);
        let turned = (SIDE - 1 - i) * SIDE + SIDE - 1 - j;
        bright + f64::from(layer[i * SIDE + j]) / 255.0 + f64::from(layer[turned]) / 255.0
    };
    bytes(&pixels(CHANNELS).map(value).collect::<Vec<f64>>())
}

pub fn fog(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let (strength, decay) = [(0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)][severity];
    let (values, haze) = (picture(image), plasma(decay, draws));
    let most = values.iter().copied().fold(0.0, f64::max);
    let foggy = |(e, value): (usize, &f64)| (value + strength * haze[e / CHANNELS]) * most / (most + strength);
    bytes(&values.iter().enumerate().map(foggy).collect::<Vec<f64>>())
}

/// A height map between 0 and 1 by the diamond-square algorithm, whose edges meet.
fn plasma(decay: f64, draws: &mut Draws) -> Vec<f64> {
    let mut map = vec![0.0; SIDE * SIDE];
    let (mut step, mut wibble) = (SIDE, 100.0);
    while step >= 2 {
        let half = step / 2;
        let at = |map: &[f64], i: usize, j: usize| map[(i % SIDE) * SIDE + j % SIDE];
        let mut moved = |sum: f64| sum / 4.0 + wibble * draws.between(-wibble, wibble);
        let places = |first: usize| (first..SIDE).step_by(step);
        for (i, j) in places(0).flat_map(|i| places(0).map(move |j| (i, j))) {
            let corners = at(&map, i, j) + at(&map, i + step, j) + at(&map, i, j + step) + at(&map, i + step, j + step);
            map[(i + half) * SIDE + j + half] = moved(corners);
        }
        // Of the points in the middle of an edge, first those in the rows of the corners.
        for (first_row, first_column) in [(0, half), (half, 0)] {
            for (i, j) in places(first_row).flat_map(|i| places(first_column).map(move |j| (i, j))) {
                let (up, left) = (i + SIDE - half, j + SIDE - half);
                let around = at(&map, i + half, j) + at(&map, up, j) + at(&map, i, j + half) + at(&map, i, left);
                map[i * SIDE + j] = moved(around);
            }
        }
        step = half;
        wibble /= decay;
    }
    let least = map.iter().copied().fold(f64::INFINITY, f64::min);
    map.iter_mut().for_each(|value| *value -= least);
    let most = map.iter().copied().fold(0.0, f64::max);
    map.into_iter().map(|value| value / most).collect()
}

pub fn brightness(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let more = [0.05, 0.1, 0.15, 0.2, 0.3][severity];
    super::digital::in_hsv(image, |[hue, saturation, value]| [hue, saturation, (value + more).clamp(0.0, 1.0)])
}
