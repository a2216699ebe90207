//! The generated data set: ten classes of coloured images that need no download.
//!
//! A class is a pair of a texture (horizontal stripes, vertical stripes, checks, diamonds, rings) and a scale (coarse,
//! fine). Only both together determine it. The texture fills a disc or a square somewhere in the image; place, size,
//! rotation, phase, exact scale, colours and contrast vary. Around it are a gradient and smaller patches of any class,
//! and every pixel is noisy. So there is something to learn, and enough noise to overfit. Mirroring and shifting an
//! image keep its class.
//!
//! The bytes are the same on every platform: all arithmetic is integer or single IEEE operations (`+ - * /`, square
//! root, comparison), with a polynomial in place of the sine, because the sines of mathematics libraries differ in
//! the last bit.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, below, generator,
};

/// The synthetic set, by its name in place of a path.
pub(super) const FORMAT: Format = Format {
    name: "synthetic",
    files: "",
    recognise: Recognise::ByName,
    load: |_| synthetic(&SyntheticSpec::default()),
    load_split: |_, split| {
        let Dataset { name, train, test, mean, std, statistics } = synthetic(&SyntheticSpec::default())?;
        let images = if split == Split::Train { train } else { test };
        Ok(SplitImages { name, images, mean, std, statistics })
    },
};

const CLASSES: usize = 10;
const TEXTURES: u32 = 5;
const CHANNELS: usize = 3;

/// Standard deviation of the pixel noise, of 255.
const NOISE: f32 = 28.0;
/// Smallest and largest difference between the extremes of a texture, per channel, of 255.
const CONTRAST: (f32, f32) = (40.0, 150.0);
/// Periods per unit of length (half an image) of a coarse and a fine texture, and the share by which they vary.
const SCALES: [f32; 2] = [1.4, 3.0];
const SCALE_VARIATION: f32 = 0.15;
/// Largest rotation of a texture, in full turns.
const TURN: f32 = 0.04;
/// Number of patches of other textures around the main one.
const DISTRACTORS: usize = 2;

/// Size and seed of a synthetic data set.
///
/// The default is the data set `synthetic`: 2,048 training and 1,024 test images of 32x32, seed 0. An image depends
/// only on the seed, the split, its index and `side`: a larger set begins with the images of a smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntheticSpec {
    /// Training images.
    pub train: usize,
    /// Test images.
    pub test: usize,
    /// Height and width of an image, at least 8 pixels; from about 16 on the classes can be told apart.
    pub side: usize,
    /// Equal specifications with equal seeds give equal bytes.
    pub seed: u64,
}

impl Default for SyntheticSpec {
    fn default() -> Self {
        SyntheticSpec { train: 2048, test: 1024, side: 32, seed: 0 }
    }
}

/// Generates the ten-class image set. The classes take turns, so that every run of ten samples has each of them once.
/// Mean and standard deviation are computed from the training images.
///
/// # Errors
/// [`DataError::Synthetic`] if a split has no images or more than `u32::MAX`, or if `side` is not within 8 to 1024;
/// [`DataError::SyntheticMemory`] if the images do not fit in memory.
///
/// ```
/// use polder::data::{SyntheticSpec, synthetic};
///
/// let data = synthetic(&SyntheticSpec { train: 20, test: 10, ..Default::default() })?;
/// assert_eq!(data.train.bytes_of(0..20)?.len(), 20 * 32 * 32 * 3);
/// assert_eq!(data.test.labels, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
/// # Ok::<(), polder::data::DataError>(())
/// ```
pub fn synthetic(spec: &SyntheticSpec) -> Result<Dataset, DataError> {
    for (name, found) in [("train", spec.train), ("test", spec.test)] {
        if found == 0 || u32::try_from(found).is_err() {
            return Err(DataError::Synthetic { name, found, expected: "1 to 4294967295" });
        }
    }
    if !(8..=1024).contains(&spec.side) {
        return Err(DataError::Synthetic { name: "side", found: spec.side, expected: "8 to 1024" });
    }
    let train = images(spec, b"syntrain", spec.train)?;
    let test = images(spec, b"syn-test", spec.test)?;
    let (mean, std) = train.mean_and_std()?;
    Ok(Dataset { name: "synthetic".into(), train, test, mean, std, statistics: StatisticsSource::TrainImages })
}

fn images(spec: &SyntheticSpec, purpose: &[u8; 8], count: usize) -> Result<Images, DataError> {
    let shape = ImageShape { height: spec.side, width: spec.side, channels: CHANNELS };
    let bytes = count.saturating_mul(shape.bytes());
    let mut pixels = Vec::new();
    pixels.try_reserve_exact(bytes).map_err(|_| DataError::SyntheticMemory { bytes })?;
    pixels.resize(bytes, 0);
    let labels: Vec<u32> = (0..count).map(|index| (index % CLASSES) as u32).collect();
    for ((index, image), &label) in (0..).zip(pixels.chunks_exact_mut(shape.bytes())).zip(&labels) {
        draw(&mut generator(spec.seed, purpose, index), label, spec.side, image);
    }
    Ok(Images { pixels: pixels.into(), labels, shape, classes: CLASSES })
}

/// Draws one image of a class, NHWC. Coordinates run from -1 to 1, `y` downwards.
fn draw(rng: &mut ChaCha8Rng, label: u32, side: usize, image: &mut [u8]) {
    let background = colour(rng);
    let gradient: [(f32, f32); CHANNELS] =
        std::array::from_fn(|_| (between(rng, -30.0, 30.0), between(rng, -30.0, 30.0)));
    let distractors: [Patch; DISTRACTORS] = std::array::from_fn(|_| {
        let label = below(rng, CLASSES as u32);
        Patch::new(rng, label, 0.9, 0.15, 0.3)
    });
    let patch = Patch::new(rng, label, 0.3, 0.55, 0.8);

    let coordinate = |index: usize| (2 * index + 1) as f32 / side as f32 - 1.0;
    for (index, pixel) in image.chunks_exact_mut(CHANNELS).enumerate() {
        let (x, y) = (coordinate(index % side), coordinate(index / side));
        let covering = std::iter::once(&patch).chain(&distractors).find_map(|patch| patch.colour_at(x, y));
        let clean = covering.unwrap_or_else(|| {
            std::array::from_fn(|channel| background[channel] + x * gradient[channel].0 + y * gradient[channel].1)
        });
        for (value, clean) in pixel.iter_mut().zip(clean) {
            // A conversion to u8 saturates, so this clamps to 0 and 255.
            *value = (clean + NOISE * normal(rng) + 0.5) as u8;
        }
    }
}

/// A textured disc or square somewhere in the image.
struct Patch {
    texture: u32,
    centre: (f32, f32),
    radius: f32,
    round: bool,
    /// Cosine and sine of the patch's rotation.
    axis: (f32, f32),
    /// Periods per unit of length.
    frequency: f32,
    phases: (f32, f32),
    middle: [f32; CHANNELS],
    /// Half the difference of the extremes.
    amplitude: [f32; CHANNELS],
}

impl Patch {
    /// A patch of a class, its centre up to `away` from that of the image in x and y, its radius from `smallest` to
    /// `largest`.
    fn new(rng: &mut ChaCha8Rng, label: u32, away: f32, smallest: f32, largest: f32) -> Patch {
        Patch {
            texture: label % TEXTURES,
            centre: (between(rng, -away, away), between(rng, -away, away)),
            radius: between(rng, smallest, largest),
            round: below(rng, 2) == 0,
            axis: direction(between(rng, -TURN, TURN)),
            frequency: SCALES[(label / TEXTURES) as usize] * between(rng, 1.0 - SCALE_VARIATION, 1.0 + SCALE_VARIATION),
            phases: (between(rng, 0.0, 1.0), between(rng, 0.0, 1.0)),
            middle: colour(rng),
            amplitude: std::array::from_fn(|_| {
                let half = between(rng, CONTRAST.0, CONTRAST.1) / 2.0;
                if below(rng, 2) == 0 { half } else { -half }
            }),
        }
    }

    /// The colour at a place, or none outside the patch.
    fn colour_at(&self, x: f32, y: f32) -> Option<[f32; CHANNELS]> {
        let (x, y) = (x - self.centre.0, y - self.centre.1);
        let (u, v) = (x * self.axis.0 + y * self.axis.1, y * self.axis.0 - x * self.axis.1);
        let square_distance = u * u + v * v;
        let inside = if self.round {
            square_distance < self.radius * self.radius
        } else {
            u.abs().max(v.abs()) < SQUARE_HALF_SIDE * self.radius
        };
        if !inside {
            return None;
        }
        let (f, (p, q)) = (self.frequency, self.phases);
        let wave = match self.texture {
            0 => sine(f * v + p),
            1 => sine(f * u + p),
            2 => PRODUCT_GAIN * sine(DIAGONAL * f * u + p) * sine(DIAGONAL * f * v + q),
            3 => PRODUCT_GAIN * sine(0.5 * f * (u + v) + p) * sine(0.5 * f * (u - v) + q),
            _ => sine(f * square_distance.sqrt() + p),
        };
        Some(std::array::from_fn(|channel| self.middle[channel] + self.amplitude[channel] * wave))
    }
}

/// Half the side of the square that has the area of a disc of radius 1: √π/2.
const SQUARE_HALF_SIDE: f32 = 0.886;
/// √½: with it the waves that add up to a check pattern have the frequency of the stripes.
const DIAGONAL: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// √2, nearly: gives a product of two sines the variance of one.
const PRODUCT_GAIN: f32 = 1.4;

fn colour(rng: &mut ChaCha8Rng) -> [f32; CHANNELS] {
    std::array::from_fn(|_| between(rng, 60.0, 195.0))
}

/// A uniform number, in steps of 2^-24 of the interval.
fn between(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * ((rng.next_u32() >> 8) as f32 / (1 << 24) as f32)
}

/// Nearly a standard normal number: the sum of four random bytes, of mean 510 and variance 4 · (256² - 1) / 12.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let sum: i32 = rng.next_u32().to_le_bytes().iter().map(|&byte| i32::from(byte)).sum();
    (sum - 510) as f32 / 147.8
}

/// The unit vector at an angle given in turns.
fn direction(turns: f32) -> (f32, f32) {
    let (cos, sin) = (sine(turns + 0.25), sine(turns));
    let length = (cos * cos + sin * sin).sqrt();
    (cos / length, sin / length)
}

/// A sine of an angle given in turns, to within 0.06: a parabola over each half-turn.
fn sine(turns: f32) -> f32 {
    let turns = turns - (turns + 0.5).floor();
    16.0 * turns * (0.5 - turns.abs())
}
