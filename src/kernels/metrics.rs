//! Sums and means of losses on the device, so that the training loop need not wait for the loss of each step.

use super::Check;
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{MeanTermArgs, RecordArgs};
use crate::device::{Launch, Result, Slice, SliceMut, id};

/// Adds a step's mean `loss`, its `correct` predictions and its number of `samples` to `totals` (three elements: loss
/// times samples, correct, samples), unless `skip` is set. Every other argument has one element. Traffic: a few bytes.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn record(
    loss: Slice<'_, f64>,
    correct: Slice<'_, u32>,
    skip: Slice<'_, u32>,
    samples: usize,
    mut totals: SliceMut<'_, f64>,
) -> Result<()> {
    let device = loss.device();
    let check = Check { operation: "metrics::record", device };
    check.argument("loss", loss, 1)?;
    check.argument("correct", correct, 1)?;
    check.argument("skip", skip, 1)?;
    check.argument("totals", totals.view(), 3)?;
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
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn mean_term(term: Slice<'_, f64>, weight: f64, add: bool, mut mean: SliceMut<'_, f64>) -> Result<()> {
    let device = term.device();
    let check = Check { operation: "metrics::mean_term", device };
    check.argument("term", term, 1)?;
    check.argument("mean", mean.view(), 1)?;
    let args = MeanTermArgs { term: term.address(), mean: mean.address(), weight, add: add.into() };
    // SAFETY: lengths and device are checked above.
    unsafe { device.launch(id::MEAN_TERM, Launch::new(1, 1), &args) }
}
