//! One SGD step of a ResNet-20 on the CPU in candle, burn and polder, in turns on the same batch, in f32.
//!
//! `cd interop && cargo run --profile speed -p polder-speed [-- BATCH [ROUNDS]]`
//!
//! All three begin with the same weights. Loss and gradient are compared first; if they differ, nothing is timed. In
//! each round all take a turn of about two seconds, in a new order, and ratios are taken within a round. candle's SGD
//! has no momentum; the others' has. Each uses all threads by its own default.

mod burn_side;
mod candle_side;
mod polder_side;

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

pub type Outcome<T> = Result<T, Box<dyn Error>>;

/// Tensors by the names of torchvision, with shapes as in its files.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub const CLASSES: usize = 10;
pub const SIZE: usize = 32;
pub const RATE: f64 = 0.01;
pub const MOMENTUM: f64 = 0.9;

/// Seconds of a turn.
const TURN: f64 = 2.0;
/// The largest relative error of the gradient: a ReLU input within rounding of zero may fall on either side, and each
/// of these changes it.
const LIMIT: f64 = 2e-2;

/// Images [batch, height, width, channels] and their labels.
pub struct Batch {
    pub images: Vec<f32>,
    pub labels: Vec<u32>,
}

impl Batch {
    fn noise(batch: usize) -> Self {
        let mut state = 0x9E37_79B9_u32;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 2.0 - 1.0
        };
        let images = (0..batch * SIZE * SIZE * 3).map(|_| next()).collect();
        Self { images, labels: (0..batch as u32).map(|i| i * 7 % CLASSES as u32).collect() }
    }

    /// The images as [batch, channels, height, width].
    pub fn channels_first(&self) -> Vec<f32> {
        let pixels = SIZE * SIZE;
        let at = |image: usize, channel: usize, pixel: usize| self.images[(image * pixels + pixel) * 3 + channel];
        let index = |i: usize| at(i / (3 * pixels), i / pixels % 3, i % pixels);
        (0..self.images.len()).map(index).collect()
    }
}

/// The basic blocks of a ResNet-20: name, channels in and out, stride.
pub fn blocks() -> Vec<(String, usize, usize, usize)> {
    let mut blocks = Vec::new();
    let mut inputs = 16;
    for (stage, width) in [16, 32, 64].into_iter().enumerate() {
        for block in 0..3 {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            blocks.push((format!("layer{}.{block}", stage + 1), inputs, width, stride));
            inputs = width;
        }
    }
    blocks
}

/// A framework with a network and a batch.
pub trait Side {
    /// Its name and form.
    fn name(&self) -> String;
    /// The loss and the gradient.
    fn gradient(&mut self) -> Outcome<(f64, Tensors)>;
    /// A training step.
    fn step(&mut self) -> Outcome<()>;
}

fn relative_error(ours: &Tensors, others: &Tensors) -> Outcome<f64> {
    let (mut difference, mut total) = (0.0, 0.0);
    for (name, (_, mine)) in ours {
        let (_, other) = others.get(name).ok_or_else(|| format!("no gradient of {name}"))?;
        if mine.len() != other.len() {
            return Err(format!("{name}: {} numbers against {}", other.len(), mine.len()).into());
        }
        difference += mine.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        total += mine.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
    }
    Ok((difference / total).sqrt())
}

/// The median, and the smallest and largest.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let digits = if values[0] < 10.0 { 2 } else { 0 };
    format!("{:.digits$} ({:.digits$} to {:.digits$})", values[values.len() / 2], values[0], values[values.len() - 1])
}

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| words.get(index).map_or(Ok(default), |word| word.parse());
    let (batch, rounds) = (number(0, 128)?, number(1, 10)?);
    let data = Batch::noise(batch);
    let (ours, start) = polder_side::Polder::new(&data)?;
    let mut sides: Vec<Box<dyn Side>> = vec![
        Box::new(ours),
        Box::new(candle_side::Candle::new(&data, &start)?),
        Box::new(burn_side::Burn::new(&data, &start)),
    ];
    let (loss, gradient) = sides[0].gradient()?;
    for side in &mut sides[1..] {
        let (other_loss, other) = side.gradient()?;
        let error = relative_error(&gradient, &other)?;
        println!("{}: loss {other_loss:.6} against {loss:.6}, gradient's relative error {error:.1e}", side.name());
        if error > LIMIT || (other_loss - loss).abs() > 1e-4 * loss {
            return Err(format!("{} computes something else", side.name()).into());
        }
    }
    let mut counts = Vec::new();
    for side in &mut sides {
        side.step()?;
        let begin = Instant::now();
        side.step()?;
        counts.push((TURN / begin.elapsed().as_secs_f64()).ceil() as usize);
    }
    let mut rates = vec![Vec::new(); sides.len()];
    for round in 0..rounds {
        for turn in 0..sides.len() {
            // All orders in turn: rotations, and their mirror images in every second round.
            let turn = if round % 2 == 0 { turn } else { sides.len() - 1 - turn };
            let index = (turn + round / 2) % sides.len();
            let begin = Instant::now();
            for _ in 0..counts[index] {
                sides[index].step()?;
            }
            rates[index].push((counts[index] * batch) as f64 / begin.elapsed().as_secs_f64());
        }
    }
    println!("\n| ResNet-20, SGD, {batch} images, f32 | images/s | polder's ratio |\n|---|---|---|");
    for (index, side) in sides.iter().enumerate() {
        let ratios = rates[0].iter().zip(&rates[index]).map(|(ours, other)| ours / other).collect();
        println!("| {} | {} | {} |", side.name(), spread(rates[index].clone()), spread(ratios));
    }
    Ok(())
}
