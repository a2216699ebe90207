//! What an optimizer needs to know of the function it minimises: loss and gradient at given weights, and products with the Hessian.
//!
//! A network's [`crate::plan::Plan`] is an objective; so is any function of a flat vector that a user brings.

use crate::device::{Error, Result, Scalar, Slice, SliceMut};

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

    /// The Hessian of the loss at `weights` times `direction`, exact, written to `product`; all three are laid out alike. `flag` is
    /// as in [`Objective::gradient`], for the loss and the product. Batch norm's running statistics stay as they are.
    ///
    /// # Errors
    /// [`Error::Argument`] where the objective has no exact product, as by default; those of the device.
    fn hessian_vector(
        &mut self,
        weights: Slice<'_, T>,
        direction: Slice<'_, T>,
        product: SliceMut<'_, T>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let _ = (weights, direction, product, flag);
        let message = "this objective has no exact product with its Hessian".into();
        Err(Error::Argument { operation: "Objective::hessian_vector", message })
    }

    /// The number of groups that the mini-batch can be taken in, for m-sharpness: one, unless the objective says otherwise.
    fn groups(&self) -> usize {
        1
    }

    /// Makes group number `group` of the mini-batch the one that the following passes see.
    ///
    /// # Errors
    /// Those of the device.
    fn select(&mut self, group: usize) -> Result<()> {
        let _ = group;
        Ok(())
    }

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
