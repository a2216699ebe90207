//! Corrupts images as CIFAR-10-C does (Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common
//! Corruptions and Perturbations"), with its constants for images of 32×32 pixels and five severities.
//!
//! Frost, which needs pictures, is left out, and so is spatter. What is random depends on the seed, the corruption, the
//! severity and the number of the image alone.

mod blur;
mod digital;
mod draws;
mod filters;
mod jpeg;
mod noise;
mod weather;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use draws::Draws;

use super::cifar::SHAPE;
use super::{DataError, Images, SEVERITIES};

/// Rows, and columns, of an image.
const SIDE: usize = SHAPE.width;
const CHANNELS: usize = SHAPE.channels;
/// Bytes of an image.
const BYTES: usize = SIDE * SIDE * CHANNELS;

/// An image, `[row, column, channel]`, usually from 0 to 1.
type Picture = Vec<f64>;

/// A corruption: its name, which is that of its file, and what it does.
pub struct Corruption {
    /// `gaussian_noise` and so on.
    pub name: &'static str,
    /// The corrupted bytes of an image at the severity, from 0.
    apply: fn(&[u8], usize, &mut Draws) -> Vec<u8>,
}

/// The corruptions that need no further data, in the order of the benchmark, then those for validation.
pub const CORRUPTIONS: &[Corruption] = &[
    Corruption { name: "gaussian_noise", apply: noise::gaussian },
    Corruption { name: "shot_noise", apply: noise::shot },
    Corruption { name: "impulse_noise", apply: noise::impulse },
    Corruption { name: "defocus_blur", apply: blur::defocus },
    Corruption { name: "glass_blur", apply: blur::glass },
    Corruption { name: "motion_blur", apply: blur::motion },
    Corruption { name: "zoom_blur", apply: blur::zoom },
    Corruption { name: "snow", apply: weather::snow },
    Corruption { name: "fog", apply: weather::fog },
    Corruption { name: "brightness", apply: weather::brightness },
    Corruption { name: "contrast", apply: digital::contrast },
    Corruption { name: "elastic_transform", apply: digital::elastic },
    Corruption { name: "pixelate", apply: digital::pixelate },
    Corruption { name: "jpeg_compression", apply: jpeg::compression },
    Corruption { name: "speckle_noise", apply: noise::speckle },
    Corruption { name: "gaussian_blur", apply: blur::gaussian },
    Corruption { name: "saturate", apply: digital::saturate },
];

impl Corruption {
    /// The corruption of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        CORRUPTIONS.iter().find(|corruption| corruption.name == name)
    }

    /// The images at a severity from 1 to [`SEVERITIES`], spread over `threads` threads. `done` counts the images
    /// that are ready; none is returned if `stop` was set meanwhile.
    ///
    /// # Errors
    /// [`DataError::NotCifar`] for images of another shape, [`DataError::NoSeverity`]; those of
    /// [`Images::bytes_of`].
    pub fn images(
        &self,
        images: &Images,
        severity: usize,
        (seed, threads): (u64, usize),
        stop: &AtomicBool,
        done: &AtomicUsize,
    ) -> Result<Option<Vec<u8>>, DataError> {
        if images.shape != SHAPE {
            return Err(DataError::NotCifar { found: images.shape, expected: SHAPE });
        }
        if !(1..=SEVERITIES).contains(&severity) {
            return Err(DataError::NoSeverity { severity });
        }
        let key = draws::key(seed, self.name, severity);
        let pixels = images.bytes_of(0..images.len())?;
        let mut out = vec![0; pixels.len()];
        let part = images.len().div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            let parts = pixels.chunks(part * BYTES).zip(out.chunks_mut(part * BYTES)).enumerate();
            for (number, (from, to)) in parts {
                scope.spawn(move || {
                    for (n, (from, to)) in from.chunks(BYTES).zip(to.chunks_mut(BYTES)).enumerate() {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let mut draws = Draws::new(key, (number * part + n) as u64);
                        to.copy_from_slice(&(self.apply)(from, severity - 1, &mut draws));
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Ok((!stop.load(Ordering::Relaxed)).then_some(out))
    }
}

/// The values of bytes, from 0 to 1.
fn picture(bytes: &[u8]) -> Picture {
    bytes.iter().map(|&byte| f64::from(byte) / 255.0).collect()
}

/// Values from 0 to 1 as bytes: clipped, then cut off to whole numbers.
fn bytes(picture: &[f64]) -> Vec<u8> {
    picture.iter().map(|value| (value.clamp(0.0, 1.0) * 255.0) as u8).collect()
}
