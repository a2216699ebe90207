//! Where the pixels of images are, and what is computed over all of them.

use super::pictures::Pictures;

/// The pixels of the images of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// In memory: the images one after another, NHWC.
    Memory(Vec<u8>),
    /// In the files of pictures, which are decoded when they are needed.
    Files(Pictures),
}

impl From<Vec<u8>> for Pixels {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Memory(bytes)
    }
}

impl Pixels {
    /// The bytes in memory; none where the pixels are in files. [`Images::bytes_of`](super::Images::bytes_of) decodes
    /// these.
    pub fn memory(&self) -> Option<&[u8]> {
        match self {
            Self::Memory(bytes) => Some(bytes),
            Self::Files(_) => None,
        }
    }

    /// How many bytes there are, of images of so many bytes.
    pub(super) fn count(&self, image: usize) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::Files(pictures) => pictures.len().saturating_mul(image),
        }
    }

    /// Keeps the first images.
    pub(super) fn truncate(&mut self, count: usize, image: usize) {
        match self {
            Self::Memory(bytes) => bytes.truncate(count * image),
            Self::Files(pictures) => pictures.truncate(count),
        }
    }

    /// Some of the images.
    pub(super) fn select(&self, samples: &[usize], image: usize) -> Self {
        match self {
            Self::Memory(bytes) => {
                let of = |&sample: &usize| &bytes[sample * image..(sample + 1) * image];
                Self::Memory(samples.iter().flat_map(of).copied().collect())
            }
            Self::Files(pictures) => Self::Files(pictures.select(samples)),
        }
    }
}

/// Sums of the values of each channel, and of their squares. They are exact, so the order of the pixels does not
/// matter.
pub(super) struct Sums {
    values: Vec<u64>,
    squares: Vec<u64>,
    /// How many values each channel has.
    count: u64,
}

impl Sums {
    pub fn new(channels: usize) -> Self {
        Self { values: vec![0; channels], squares: vec![0; channels], count: 0 }
    }

    /// Adds pixels, whose channels lie side by side.
    pub fn add(&mut self, pixels: &[u8]) {
        let channels = self.values.len();
        for pixel in pixels.chunks_exact(channels) {
            for (channel, &value) in pixel.iter().enumerate() {
                self.values[channel] += u64::from(value);
                self.squares[channel] += u64::from(value) * u64::from(value);
            }
        }
        self.count += (pixels.len() / channels) as u64;
    }

    /// Adds other sums.
    pub fn merge(&mut self, other: &Self) {
        self.values.iter_mut().zip(&other.values).for_each(|(own, other)| *own += other);
        self.squares.iter_mut().zip(&other.squares).for_each(|(own, other)| *own += other);
        self.count += other.count;
    }

    /// Mean and standard deviation of value/255, per channel. A constant channel gets the deviation 1, so that it can
    /// be divided by.
    pub fn mean_and_std(&self) -> (Vec<f32>, Vec<f32>) {
        let count = self.count as f64;
        let mean_and_std = self.values.iter().zip(&self.squares).map(|(&sum, &squares)| {
            let mean = sum as f64 / count;
            let variance = squares as f64 / count - mean * mean;
            let std = if variance > 0.0 { variance.sqrt() / 255.0 } else { 1.0 };
            ((mean / 255.0) as f32, std as f32)
        });
        mean_and_std.unzip()
    }
}

/// Mean and standard deviation of pixels in memory.
pub(super) fn mean_and_std(pixels: &[u8], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let mut sums = Sums::new(channels);
    sums.add(pixels);
    sums.mean_and_std()
}
