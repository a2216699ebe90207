//! Sums and means of losses on the device, so that the training loop need not wait for the loss of each step.

use super::{check_device, check_length};
use crate::device::arguments::{MeanTermArgs, RecordArgs};
use crate::device::{Launch, Result, Slice, SliceMut, id};

/// Adds a step's mean `loss`, its `correct` predictions and its number of `samples` to `totals` (three elements: loss
/// times samples, correct, samples), unless `skip` is set. Every other argument has one element. Traffic: a few bytes.
///
/// # Errors
/// Wrong lengths or devices.
pub fn record(
    loss: Slice<'_, f64>,
    correct: Slice<'_, u32>,
    skip: Slice<'_, u32>,
    samples: usize,
    mut totals: SliceMut<'_, f64>,
) -> Result<()> {
    const NAME: &str = "metrics::record";
    check_length(NAME, "loss", loss.len(), 1)?;
    check_length(NAME, "correct", correct.len(), 1)?;
    check_length(NAME, "skip", skip.len(), 1)?;
    check_length(NAME, "totals", totals.len(), 3)?;
    let device = loss.device();
    check_device(NAME, "correct", device, correct.device())?;
    check_device(NAME, "skip", device, skip.device())?;
    check_device(NAME, "totals", device, totals.device())?;
    let args = RecordArgs {
        loss: loss.address(),
        correct: correct.address(),
        skip: skip.address(),
        totals: totals.address(),
        samples: samples as f64,
    };
    // SAFETY: lengths and device are checked above.
    unsafe { device.launch(id::RECORD_STEP, Launch::new(1, 1), &args) }
}

/// `mean = weight · term`, or, with `add`, `mean += weight · term`. Both have one element. Traffic: a few bytes.
///
/// # Errors
/// Wrong lengths or devices.
pub fn mean_term(term: Slice<'_, f64>, weight: f64, add: bool, mut mean: SliceMut<'_, f64>) -> Result<()> {
    const NAME: &str = "metrics::mean_term";
    check_length(NAME, "term", term.len(), 1)?;
    check_length(NAME, "mean", mean.len(), 1)?;
    let device = term.device();
    check_device(NAME, "mean", device, mean.device())?;
    let args = MeanTermArgs { term: term.address(), mean: mean.address(), weight, add: add.into() };
    // SAFETY: lengths and device are checked above.
    unsafe { device.launch(id::MEAN_TERM, Launch::new(1, 1), &args) }
}
