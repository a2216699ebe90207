//! The position of a training run, on the device. Kernels read there what changes from step to step, so that a recorded
//! step can be replayed.

use super::Check;
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::AdvanceClockArgs;
use crate::device::{Launch, Result, Slice, SliceMut, id};

/// The length of a clock: it holds the number of batches since the epoch began, and of steps since the run began.
pub const LEN: usize = 2;

/// Ends a step: adds one to both numbers of `clock`, and writes the next step's learning rate to `rate` (one element).
/// `rates` holds one rate for each step of the epoch; after the last step, the rate is 0. Traffic: a few bytes.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn advance(mut clock: SliceMut<'_, u64>, rates: Slice<'_, f64>, mut rate: SliceMut<'_, f64>) -> Result<()> {
    let device = clock.device().clone();
    let check = Check { operation: "clock::advance", device: &device };
    check.argument("clock", clock.view(), LEN)?;
    check.device("rates", rates.device())?;
    check.argument("rate", rate.view(), 1)?;
    let args = AdvanceClockArgs {
        clock: clock.address(),
        rates: rates.address(),
        rate: rate.address(),
        count: rates.len() as u64,
    };
    // SAFETY: lengths and devices are checked above.
    unsafe { device.launch(id::CLOCK_ADVANCE, Launch::new(1, 1), &args) }
}
