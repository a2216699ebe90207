//! Factors for the samples of a batch, for stochastic depth and ShakeDrop: `kernels/scale_samples.cu`.

use std::ops::Range;

use super::image::Position;
use super::{Check, clock, pick};
use crate::device::arguments::{DrawFactorsArgs, ScaleSamplesArgs};
use crate::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice, SliceMut, id};

/// How the factors of one operation are distributed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FactorLaw {
    /// The probability that a sample is kept.
    keep: f64,
    /// The factor of one that is kept, in the forward and in the backward.
    kept: [f64; 2],
    /// The range of the factor of another one, in the forward and in the backward.
    dropped: [(f64, f64); 2],
    /// Whether all samples of a batch are kept or dropped together.
    per_batch: bool,
    /// The factor where nothing is drawn.
    expected: f64,
}

impl FactorLaw {
    /// Stochastic depth (Huang et al. 2016) for each sample: the factor is 0 with probability `rate`, and otherwise
    /// 1/(1 − rate), so that its mean is 1.
    pub fn drop_path(rate: f64) -> Self {
        let keep = 1.0 - rate;
        Self { keep, kept: [1.0 / keep; 2], dropped: [(0.0, 0.0); 2], per_batch: false, expected: 1.0 }
    }

    /// ShakeDrop (Yamada et al. 2018): with probability `keep` the whole batch keeps the factor 1. Otherwise each
    /// sample has a factor α uniform in [−1, 1] in the forward and another one, β uniform in [0, 1], in the backward.
    /// The mean of the forward's factor is `keep`.
    pub fn shake_drop(keep: f64) -> Self {
        Self { keep, kept: [1.0; 2], dropped: [(-1.0, 1.0), (0.0, 1.0)], per_batch: true, expected: keep }
    }

    /// As the kernel reads it.
    fn numbers(&self) -> [f64; 8] {
        let (low, width) = (self.dropped.map(|(low, _)| low), self.dropped.map(|(low, high)| high - low));
        let per_batch = if self.per_batch { 1.0 } else { 0.0 };
        [self.keep, self.kept[0], self.kept[1], low[0], low[1], width[0], width[1], per_batch]
    }
}

/// The factors of all operations that have some, for one batch, on the device.
pub struct SampleFactors<T: Scalar> {
    /// `[operations][2][batch]`: of the forward and of the backward.
    factors: Buffer<T>,
    laws: Buffer<f64>,
    operations: usize,
    batch: usize,
}

impl<T: Scalar> SampleFactors<T> {
    /// The expected factors.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn new(device: &Device, laws: &[FactorLaw], batch: usize) -> Result<Self> {
        let numbers: Vec<f64> = laws.iter().flat_map(FactorLaw::numbers).collect();
        let expected = laws.iter().flat_map(|law| std::iter::repeat_n(T::from_f64(law.expected), 2 * batch));
        let factors = device.upload(&expected.collect::<Vec<T>>())?;
        Ok(Self { factors, laws: device.upload(&numbers)?, operations: laws.len(), batch })
    }

    /// Whether the network has no operation with factors.
    pub(crate) fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }

    /// Draws all factors anew. They depend on the seed, on the number of the operation, and on the number of the sample
    /// in the run: the place n in the batch, `position.first`, and what the clock adds. Without operations it launches
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] for a batch of more than 2^32 factors, [`Error::Length`] and [`Error::OtherDevice`].
    pub fn draw(&mut self, seed: u64, position: Position<'_>) -> Result<()> {
        const NAME: &str = "SampleFactors::draw";
        if self.factors.is_empty() {
            return Ok(());
        }
        let device = self.factors.view().device().clone();
        if self.factors.len() > u32::MAX as usize {
            let message = format!("{} factors, expected at most {}", self.factors.len(), u32::MAX);
            return Err(Error::Argument { operation: NAME, message });
        }
        if let Some((clock, _)) = position.clock {
            Check { operation: NAME, device: &device }.argument("clock", clock, clock::LEN)?;
        }
        let args = DrawFactorsArgs {
            factors: self.factors.view_mut().address(),
            laws: self.laws.view().address(),
            clock: position.clock.map_or(0, |(clock, _)| clock.address()),
            seed,
            counter: position.first as u64,
            stride: position.clock.map_or(0, |(_, stride)| stride as u64),
            operations: self.operations as u32,
            batch: self.batch as u32,
        };
        let launch = device.elementwise(self.factors.len() / 2, 1);
        let kernel = pick::<T, _>(id::DRAW_FACTORS_F32, id::DRAW_FACTORS_F64);
        // SAFETY: there is a law for every operation and room for two factors of each sample.
        unsafe { device.launch(kernel, launch, &args) }
    }

    /// The factors of an operation's forward: one for each sample.
    ///
    /// # Errors
    /// [`Error::Range`] for an operation that there is not.
    pub fn forward(&self, operation: usize) -> Result<Slice<'_, T>> {
        self.factors.slice(self.range(2 * operation))
    }

    /// The factors of an operation's backward.
    ///
    /// # Errors
    /// As [`SampleFactors::forward`].
    pub fn backward(&self, operation: usize) -> Result<Slice<'_, T>> {
        self.factors.slice(self.range(2 * operation + 1))
    }

    fn range(&self, row: usize) -> Range<usize> {
        row * self.batch..(row + 1) * self.batch
    }
}

/// `to[n, i] = factors[n]·from[n, i]` for each sample n, or added to `to`. Traffic: reads and writes each element once;
/// accumulating reads `to` too.
///
/// # Errors
/// [`Error::Argument`] where the factors do not divide the elements, or for 2^32 elements or more;
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn scale_samples<S: Compute>(
    factors: Slice<'_, S::Master>,
    from: Slice<'_, S>,
    mut to: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    const NAME: &str = "scale_samples::scale_samples";
    let device = from.device();
    let (batch, len) = (factors.len(), from.len());
    if batch == 0 || len % batch != 0 || len > u32::MAX as usize {
        let message = format!("{len} elements of {batch} samples");
        return Err(Error::Argument { operation: NAME, message });
    }
    let check = Check { operation: NAME, device };
    check.argument("to", to.view(), len)?;
    check.device("factors", factors.device())?;
    let args = ScaleSamplesArgs {
        from: from.address(),
        to: to.address(),
        factors: factors.address(),
        batch: batch as u32,
        values: (len / batch) as u32,
        accumulate: accumulate.into(),
    };
    // SAFETY: `from` and `to` have the same length, `values` for each factor.
    unsafe { device.launch(S::choose(id::SCALE_SAMPLES), device.elementwise(len, 4), &args) }
}
