//! The generated data set: ten classes of coloured images that need no download.
//!
//! A class is a pair: one of five shapes (disc, square, triangle, ring, cross), filled with one of two textures (stripes that
//! lie, stripes that stand). Neither the shape nor the texture alone tells the class. Place, size and turn of the shape, all
//! colours, and the stripes' slant, width and phase vary; the background has stripes of its own, of either texture, and plain
//! shapes that belong to any class; and every pixel is noisy. So a network has to learn something, and learns too much of the
//! noise if it can.
//!
//! The bytes are the same on every platform: all arithmetic is integer or single IEEE operations (`+ - * /`, square root,
//! comparison), with a polynomial in place of the sine, because the sines of mathematics libraries differ in the last bit.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

use super::{DataError, Dataset, ImageShape, Images, Statistics, below, generator, mean_and_std};

const CLASSES: usize = 10;
const SHAPES: u32 = 5;
const CHANNELS: usize = 3;

/// Standard deviation of the pixel noise, of 255.
const NOISE: f32 = 40.0;
/// Smallest and largest difference between the two colours of a set of stripes, per channel, of 255.
const CONTRAST: (f32, f32) = (30.0, 90.0);
/// Distracting shapes behind the one that counts.
const DISTRACTORS: usize = 2;

/// Size and seed of a synthetic data set.
///
/// The default is what the command line uses: 2,048 training and 1,024 test images of 32x32, seed 0. An image depends on the
/// seed, the split, its index and `side` alone: a larger set begins with the images of a smaller one.
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
/// [`DataError::Synthetic`] if a split has no images or more than `u32::MAX`, or if `side` is not within 8 to 1024.
///
/// ```
/// use polder::data::{SyntheticSpec, synthetic};
///
/// let data = synthetic(&SyntheticSpec { train: 20, test: 10, ..Default::default() })?;
/// assert_eq!(data.train.pixels.len(), 20 * 32 * 32 * 3);
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
    let train = images(spec, b"syntrain", spec.train);
    let test = images(spec, b"syn-test", spec.test);
    let (mean, std) = mean_and_std(&train.pixels, CHANNELS);
    Ok(Dataset { name: "synthetic".into(), train, test, mean, std, statistics: Statistics::TrainImages })
}

fn images(spec: &SyntheticSpec, purpose: &[u8; 8], count: usize) -> Images {
    let shape = ImageShape { height: spec.side, width: spec.side, channels: CHANNELS };
    let mut pixels = vec![0; count * shape.bytes()];
    let labels: Vec<u32> = (0..count).map(|index| (index % CLASSES) as u32).collect();
    for ((index, image), &label) in (0..).zip(pixels.chunks_exact_mut(shape.bytes())).zip(&labels) {
        draw(&mut generator(spec.seed, purpose, index), label, spec.side, image);
    }
    Images { pixels, labels, shape, classes: CLASSES }
}

/// Draws one image of a class, NHWC. Coordinates run from -1 to 1, `y` downwards.
fn draw(rng: &mut ChaCha8Rng, label: u32, side: usize, image: &mut [u8]) {
    let background_lies = below(rng, 2) == 0;
    let background = Stripes::new(rng, background_lies);
    let distractors: [_; DISTRACTORS] = std::array::from_fn(|_| {
        let kind = below(rng, SHAPES);
        (Shape::new(rng, kind, 0.9, 0.15, 0.3), colour(rng))
    });
    let shape = Shape::new(rng, label % SHAPES, 0.35, 0.45, 0.65);
    let filling = Stripes::new(rng, label / SHAPES == 0);

    let coordinate = |index: usize| (2 * index + 1) as f32 / side as f32 - 1.0;
    for (index, pixel) in image.chunks_exact_mut(CHANNELS).enumerate() {
        let (x, y) = (coordinate(index % side), coordinate(index / side));
        let clean = if shape.covers(x, y) {
            filling.colour_at(x, y)
        } else if let Some((_, colour)) = distractors.iter().find(|(shape, _)| shape.covers(x, y)) {
            *colour
        } else {
            background.colour_at(x, y)
        };
        for (value, clean) in pixel.iter_mut().zip(clean) {
            // A conversion to u8 saturates, so this clamps to 0 and 255.
            *value = (clean + NOISE * normal(rng) + 0.5) as u8;
        }
    }
}

/// A figure somewhere in the image.
struct Shape {
    kind: u32,
    centre: (f32, f32),
    /// The figure's own axes: cosine and sine of its turn, divided by its radius.
    axis: (f32, f32),
}

impl Shape {
    /// A figure whose centre is up to `away` from that of the image, of a radius from `smallest` to `largest`.
    fn new(rng: &mut ChaCha8Rng, kind: u32, away: f32, smallest: f32, largest: f32) -> Shape {
        let centre = (between(rng, -away, away), between(rng, -away, away));
        let radius = between(rng, smallest, largest);
        let (cos, sin) = direction(between(rng, -0.06, 0.06));
        Shape { kind, centre, axis: (cos / radius, sin / radius) }
    }

    /// The five figures have about the same area: 2.0 to 2.3 squared radii.
    fn covers(&self, x: f32, y: f32) -> bool {
        let (x, y) = (x - self.centre.0, y - self.centre.1);
        let (u, v) = (x * self.axis.0 + y * self.axis.1, y * self.axis.0 - x * self.axis.1);
        let (across, along) = (u.abs().min(v.abs()), u.abs().max(v.abs()));
        let square_radius = u * u + v * v;
        match self.kind {
            0 => square_radius < 0.7,                        // disc
            1 => along < 0.74,                               // square
            2 => v < 0.75 && v > 2.0 * u.abs() - 1.25,       // triangle
            3 => square_radius > 0.3 && square_radius < 1.0, // ring
            _ => across < 0.33 && along < 1.0,               // cross
        }
    }
}

/// A grating of two colours.
struct Stripes {
    /// Turns per unit of length along x and y, and the turn at the centre.
    frequency: (f32, f32),
    phase: f32,
    middle: [f32; CHANNELS],
    /// Half the difference of the two colours.
    amplitude: [f32; CHANNELS],
}

impl Stripes {
    fn new(rng: &mut ChaCha8Rng, lies: bool) -> Stripes {
        let (cos, sin) = direction(between(rng, -0.06, 0.06));
        let turns = between(rng, 2.2, 3.6);
        let frequency = if lies { (-sin * turns, cos * turns) } else { (cos * turns, sin * turns) };
        let phase = between(rng, 0.0, 1.0);
        let middle = colour(rng);
        let amplitude = std::array::from_fn(|_| {
            let half = between(rng, CONTRAST.0, CONTRAST.1) / 2.0;
            if below(rng, 2) == 0 { half } else { -half }
        });
        Stripes { frequency, phase, middle, amplitude }
    }

    fn colour_at(&self, x: f32, y: f32) -> [f32; CHANNELS] {
        let wave = sine(x * self.frequency.0 + y * self.frequency.1 + self.phase);
        std::array::from_fn(|channel| self.middle[channel] + self.amplitude[channel] * wave)
    }
}

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
