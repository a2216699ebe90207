//! What an optimizer needs to know of the function it minimises: loss and gradient at given weights.
//!
//! A network's [`crate::plan::Plan`] is an objective; so is any function of a flat vector that a user brings.

use crate::device::{Result, Scalar, Slice, SliceMut};

/// What a pass does with batch norm's running statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// Compute the updated statistics and hold them until [`Objective::commit`]: the pass at the unperturbed weights.
    Update,
    /// Leave them alone: every pass at perturbed weights.
    Keep,
}

/// A loss over a flat vector of weights.
///
/// Every pass of one optimizer step sees the same mini-batch: the caller changes the batch between steps only.
pub trait Objective<T: Scalar> {
    /// Number of weights.
    fn len(&self) -> usize;

    /// Whether there is no weight.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes the mean loss at `weights` to `loss` (one element) and its gradient to `gradient`, on their device. Where the
    /// loss or any element of the gradient is not finite, `flag` (one element) is set to 1 and else left as it is.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient(
        &mut self,
        weights: Slice<'_, T>,
        statistics: Statistics,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()>;

    /// Ends a step: makes the statistics of the pass with [`Statistics::Update`] permanent, unless `skip` (one element, on
    /// the device) is set.
    ///
    /// # Errors
    /// Those of the device.
    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        let _ = skip;
        Ok(())
    }
}
