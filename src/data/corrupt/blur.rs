//! Blurs.

use super::draws::Draws;
use super::filters::{self, Edge};
use super::{CHANNELS, SIDE, bytes, picture};

/// SciPy's usual extent of a Gaussian, in deviations.
const EXTENT: f64 = 4.0;

fn blurred(values: &[f64], sigma: f64) -> Vec<f64> {
    filters::gaussian(values, CHANNELS, sigma, Edge::Nearest, EXTENT)
}

pub fn gaussian(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    bytes(&blurred(&picture(image), [0.4, 0.6, 0.7, 0.8, 1.0][severity]))
}

/// A disk of a radius, itself blurred by a Gaussian over 3 × 3 pixels.
pub fn defocus(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let (radius, alias): (f64, f64) = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)][severity];
    const KERNEL: usize = 17;
    let half = (KERNEL / 2) as isize;
    let square = |x: usize| (x as isize - half).pow(2) as f64;
    let inside = |e: usize| square(e / KERNEL) + square(e % KERNEL) <= radius * radius;
    let disk: Vec<f64> = (0..KERNEL * KERNEL).map(|e| f64::from(u8::from(inside(e)))).collect();
    let count: f64 = disk.iter().sum();
    let side = (-1.0 / (2.0 * alias * alias)).exp();
    let weights = [side, 1.0, side].map(|weight| weight / (1.0 + 2.0 * side));
    let mut kernel = vec![0.0; disk.len()];
    // The disk ends before the edge.
    for (e, share) in disk.iter().enumerate().filter(|(_, share)| **share > 0.0) {
        let (i, j) = (e / KERNEL, e % KERNEL);
        for (k, weight) in (0..9).map(|k| (k, weights[k / 3] * weights[k % 3])) {
            kernel[(i + k / 3 - 1) * KERNEL + j + k % 3 - 1] += weight * share / count;
        }
    }
    bytes(&filters::correlate(&picture(image), &kernel, KERNEL, Edge::Mirror))
}

/// Between two blurs each pixel takes the value of one near to it, from the lower right to the upper left. The authors'
/// code means to exchange both, but its exchange of two views of one array copies one of them.
pub fn glass(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let (sigma, rounds) = [(0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)][severity];
    let truncated = |value: f64| (value * 255.0) as u8;
    let mut pixels: Vec<u8> = blurred(&picture(image), sigma).into_iter().map(truncated).collect();
    for _ in 0..rounds {
        for row in (2..SIDE).rev() {
            for column in (2..SIDE).rev() {
                let left = usize::from(draws.uniform() < 0.5);
                let up = usize::from(draws.uniform() < 0.5);
                let from = ((row - up) * SIDE + column - left) * CHANNELS;
                pixels.copy_within(from..from + CHANNELS, (row * SIDE + column) * CHANNELS);
            }
        }
    }
    bytes(&blurred(&picture(&pixels), sigma))
}

pub fn motion(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let (radius, sigma) = [(6.0, 1.0), (6.0, 1.5), (6.0, 2.0), (8.0, 2.0), (9.0, 2.5)][severity];
    filters::motion_blur(image, CHANNELS, radius, sigma, draws.between(-45.0, 45.0))
}

/// The mean of the image at several zooms, in single precision.
pub fn zoom(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let end = [1.06, 1.11, 1.16, 1.21, 1.26][severity];
    let count = ((end - 1.0) / 0.01f64).ceil() as usize;
    let step = (1.0 + 0.01) - 1.0;
    let values: Vec<f64> = picture(image).into_iter().map(|value| f64::from(value as f32)).collect();
    let mut sum = vec![0.0f32; values.len()];
    for index in 0..count {
        let zoomed = filters::clipped_zoom(&values, CHANNELS, 1.0 + index as f64 * step);
        sum.iter_mut().zip(zoomed).for_each(|(sum, value)| *sum += value as f32);
    }
    let mean = |(value, sum): (&f64, &f32)| (*value as f32 + sum) / (count + 1) as f32;
    let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0) as u8;
    values.iter().zip(&sum).map(mean).map(byte).collect()
}
