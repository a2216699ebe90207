//! mixup and CutMix: the images of a batch on the device, mixed in pairs, and the labels of both: `kernels/mixing.cu`.

use super::image::{BatchShape, Position};
use super::{Check, clock};
use crate::device::arguments::MixArgs;
use crate::device::constants::{BLOCK_THREADS, QUANTILES};
use crate::device::{Buffer, Compute, Device, Error, Launch, Result, Slice, SliceMut, id};

/// How the images of a batch are mixed. With both, every batch draws one of them, each with a probability of one half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixing {
    /// mixup, with weights drawn from the beta distribution (α, α); this is α, above 0 and at most
    /// [`Mixing::MOST_ALPHA`].
    pub mixup: Option<f64>,
    /// CutMix, with shares of the area drawn likewise.
    pub cutmix: Option<f64>,
    /// The stream of random numbers.
    pub seed: u64,
    /// The place in the stream of the first batch.
    pub counter: u64,
}

impl Mixing {
    /// The largest α.
    pub const MOST_ALPHA: u64 = 8;
}

/// The labels of a mixed batch beside those of its images.
pub struct MixedLabels<'a> {
    /// The label of the other image in each image's pair: `[batch]`.
    pub others: SliceMut<'a, u32>,
    /// The share of the own label, the same for the whole batch; the rest is the other one's. One element.
    pub share: SliceMut<'a, f64>,
}

/// Mixes batches. It keeps the quantiles of its distributions on the device.
pub struct Mixer {
    mixing: Mixing,
    /// Of mixup and of CutMix; empty for one that is not wanted.
    quantiles: [Buffer<f32>; 2],
}

impl Mixer {
    /// Computes the quantiles.
    ///
    /// # Errors
    /// [`Error::Argument`] without mixup and CutMix, and for an α out of its range; those of the allocation.
    pub fn new(device: &Device, mixing: Mixing) -> Result<Self> {
        let refused = |message: String| Err(Error::Argument { operation: "Mixer::new", message });
        let alphas = [mixing.mixup, mixing.cutmix];
        if alphas == [None, None] {
            return refused("expected mixup, CutMix or both".into());
        }
        for alpha in alphas.into_iter().flatten() {
            if !(alpha > 0.0 && alpha <= Mixing::MOST_ALPHA as f64) {
                return refused(format!(
                    "alpha = {alpha}, expected a number above 0 and at most {}",
                    Mixing::MOST_ALPHA
                ));
            }
        }
        let table = |alpha: Option<f64>| device.upload(&alpha.map(beta_quantiles).unwrap_or_default());
        Ok(Self { mixing, quantiles: [table(alphas[0])?, table(alphas[1])?] })
    }

    /// Mixes image n of `images`, `[batch, height, width, channels]`, with image `batch − 1 − n`. mixup: with a weight
    /// λ, `x_n ← λ x_n + (1 − λ) x_m` for both. CutMix: a box of `√(1 − λ)` of each side around a uniform centre,
    /// clipped at the edges, is exchanged, and λ becomes the share of the area outside of it. `mixed` receives the
    /// labels and λ. The draw depends on the seed and on the counter plus `position.first`, which a clock advances.
    ///
    /// Traffic: reads and writes each element once; CutMix only those in the box.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty image or too large a batch; [`Error::Length`] and [`Error::OtherDevice`].
    pub fn run<S: Compute>(
        &self,
        shape: &BatchShape,
        position: Position<'_>,
        mut images: SliceMut<'_, S>,
        labels: Slice<'_, u32>,
        mixed: &mut MixedLabels<'_>,
    ) -> Result<()> {
        const NAME: &str = "Mixer::run";
        let BatchShape { batch, height, width, channels } = *shape;
        let values = [height, width, channels].iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        let elements = values.filter(|&values| values > 0 && values <= 1 << 30).and_then(|n| n.checked_mul(batch));
        let Some(elements) = elements.filter(|_| batch <= i32::MAX as usize) else {
            return Err(Error::Argument { operation: NAME, message: format!("{shape:?} is empty or too large") });
        };
        let device = images.device().clone();
        let check = Check { operation: NAME, device: &device };
        check.argument("images", images.view(), elements)?;
        check.argument("labels", labels, batch)?;
        check.argument("others", mixed.others.view(), batch)?;
        check.argument("share", mixed.share.view(), 1)?;
        if let Some((clock, _)) = position.clock {
            check.argument("clock", clock, clock::LEN)?;
        }
        let mut tables = [0; 2];
        for (address, table) in tables.iter_mut().zip(&self.quantiles).filter(|(_, table)| !table.is_empty()) {
            check.device("quantiles", table.device())?;
            *address = table.view().address();
        }
        let args = MixArgs {
            images: images.address(),
            labels: labels.address(),
            others: mixed.others.address(),
            share: mixed.share.address(),
            clock: position.clock.map_or(0, |(clock, _)| clock.address()),
            mixup: tables[0],
            cutmix: tables[1],
            seed: self.mixing.seed,
            counter: self.mixing.counter.wrapping_add(position.first as u64),
            stride: position.clock.map_or(0, |(_, stride)| stride as u64),
            batch: batch as u32,
            height: height as u32,
            width: width as u32,
            channels: channels as u32,
        };
        let launch = if device.is_simt() {
            // A block for each pair, and several where it is large.
            let parts = (elements / batch.max(1)).div_ceil(4 * 1024).min(64) as u32;
            Launch {
                grid: [(batch / 2).max(1) as u32, parts.max(1), 1],
                block: [BLOCK_THREADS as u32, 1, 1],
                shared: 0,
            }
        } else {
            device.elementwise(elements, 1)
        };
        // SAFETY: every length is checked above, and both tables have one entry more than an index of them can be.
        unsafe { device.launch(S::choose(id::MIX_BATCH), launch, &args) }
    }
}

/// The quantiles of the beta distribution (α, α) at 0, 1/[`QUANTILES`], …, 1.
///
/// With `s = x^α` the density up to one half is that of `(1 − x)^(α − 1)` in s, which has no pole. Its integral over a
/// fine grid is inverted by linear interpolation; the other half is symmetric.
fn beta_quantiles(alpha: f64) -> Vec<f32> {
    // Below this nearly every weight rounds to 0 or 1, and powers of so small a number lose all digits.
    let alpha = alpha.max(1e-3);
    const GRID: usize = 1 << 14;
    let most = 0.5f64.powf(alpha);
    let x_at = |s: f64| s.powf(1.0 / alpha);
    let density = |s: f64| (1.0 - x_at(s)).powf(alpha - 1.0);
    let h = most / GRID as f64;
    let mut mass = Vec::with_capacity(GRID + 1);
    mass.push(0.0);
    for cell in 0..GRID {
        let from = cell as f64 * h;
        let simpson = density(from) + 4.0 * density(from + h / 2.0) + density((from + h).min(most));
        mass.push(mass[cell] + simpson * h / 6.0);
    }
    let whole = 2.0 * mass[GRID];
    let lower = |share: f64| {
        let wanted = share * whole;
        let cell = mass.partition_point(|&mass| mass < wanted).clamp(1, GRID);
        let within = (wanted - mass[cell - 1]) / (mass[cell] - mass[cell - 1]);
        x_at((cell as f64 - 1.0 + within) * h)
    };
    let quantile = |index: usize| {
        let share = index as f64 / QUANTILES as f64;
        if share <= 0.5 { lower(share) } else { 1.0 - lower(1.0 - share) }
    };
    (0..=QUANTILES).map(|index| quantile(index) as f32).collect()
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;

    /// Two distributions with a closed form, and the variance 1/(4(2α + 1)) of all.
    #[test]
    fn quantiles_are_those_of_the_distribution() {
        let uniform = beta_quantiles(1.0);
        let arcsine = beta_quantiles(0.5);
        for index in 0..=QUANTILES {
            let share = index as f64 / QUANTILES as f64;
            assert_abs_diff_eq!(f64::from(uniform[index]), share, epsilon = 1e-7);
            let expected = (std::f64::consts::FRAC_PI_2 * share).sin().powi(2);
            assert_abs_diff_eq!(f64::from(arcsine[index]), expected, epsilon = 1e-7);
        }
        assert_eq!(beta_quantiles(1e-300), beta_quantiles(1e-3));
        for alpha in [1e-3, 0.1, 0.2, 0.4, 2.0, 4.0, 8.0] {
            let table = beta_quantiles(alpha);
            assert!(table.windows(2).all(|pair| pair[0] <= pair[1]) && (table[0], table[QUANTILES]) == (0.0, 1.0));
            // Of the numbers that are drawn, uniform between two entries.
            let squares = |pair: &[f32]| {
                let (a, b) = (f64::from(pair[0]) - 0.5, f64::from(pair[1]) - 0.5);
                (a * a + a * b + b * b) / 3.0
            };
            let variance = table.windows(2).map(squares).sum::<f64>() / QUANTILES as f64;
            assert_abs_diff_eq!(variance, 1.0 / (4.0 * (2.0 * alpha + 1.0)), epsilon = 2e-4);
        }
    }
}
