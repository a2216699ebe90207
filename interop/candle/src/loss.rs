//! A closure that computes a loss of candle, as the function that polder minimises.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};
use polder::device::{self, Slice, SliceMut};
use polder::kernels::vector;
use polder::objective::{Domain, Objective, Pass};

use crate::error::{Error, Result};
use crate::tensor::{self, Weight};

/// A variable and its place in the vector of weights.
pub(crate) struct Parameter {
    pub var: Var,
    pub place: Range<usize>,
    /// Whether a loss of the newest step depends on it.
    pub used: bool,
    /// Whether a pass of the newest step has written to it.
    pub moved: bool,
}

/// The loss of one step.
pub(crate) struct Loss<'a, F> {
    pub parameters: &'a mut [Parameter],
    pub len: usize,
    /// The address of the weights. The variables hold them until a pass moves the variables elsewhere.
    pub weights: u64,
    pub closure: F,
    /// Whether a pass has moved the variables from there.
    pub moved: bool,
    /// The loss of the first pass.
    pub first: Option<Tensor>,
    /// Why a pass failed. polder's errors have no place for it.
    pub failed: Option<Error>,
}

impl<F: FnMut() -> candle_core::Result<Tensor>> Loss<'_, F> {
    /// Computes the loss with the variables at `weights`.
    fn evaluate<T: Weight>(&mut self, weights: Slice<'_, T>, loss: SliceMut<'_, f64>) -> Result<Tensor> {
        if self.moved || weights.address() != self.weights {
            self.moved = true;
            // Others stay as they are. They may be running statistics, which the closure itself updates.
            for parameter in self.parameters.iter_mut().filter(|parameter| parameter.used) {
                tensor::write(weights.slice(parameter.place.clone())?, &parameter.var)?;
                parameter.moved = true;
            }
        }
        let found = (self.closure)()?;
        if found.elem_count() != 1 || !found.dtype().is_float() {
            return Err(Error::Loss { shape: found.dims().to_vec(), dtype: found.dtype() });
        }
        let detached = found.detach();
        tensor::read(&detached.to_dtype(DType::F64)?, loss)?;
        self.first.get_or_insert(detached);
        Ok(found)
    }

    /// Computes the loss and its gradient there.
    fn differentiate<T: Weight>(
        &mut self,
        weights: Slice<'_, T>,
        gradient: &mut SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
    ) -> Result<()> {
        let is_first = self.first.is_none();
        let gradients = self.evaluate(weights, loss)?.backward()?;
        for Parameter { var, place, used, .. } in self.parameters.iter_mut() {
            let mut to = gradient.slice_mut(place.clone())?;
            let found = gradients.get(var);
            *used = found.is_some() || (*used && !is_first);
            match found {
                Some(found) => tensor::read(&found.contiguous()?, to)?,
                None => to.clear()?,
            }
        }
        Ok(())
    }

    /// Keeps the reason of a failure, and hands polder an error to stop with.
    fn keep(&mut self, result: Result<()>) -> device::Result<()> {
        result.map_err(|error| {
            let message = error.to_string();
            self.failed = Some(error);
            device::Error::Argument { operation: "polder_candle::Optimizer::step", message }
        })
    }
}

/// Sets the flag if the loss is not finite. A GPU has no kernel for that in double precision; a loss that is not finite
/// shows in the gradient there.
fn check_loss(loss: Slice<'_, f64>, flag: &mut SliceMut<'_, u32>) -> device::Result<()> {
    if loss.device().is_host() { vector::check_finite(loss, flag.reborrow()) } else { Ok(()) }
}

impl<T: Weight, F: FnMut() -> candle_core::Result<Tensor>> Objective<T> for Loss<'_, F> {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.len)
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> device::Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, mut flag, .. } => {
                let result = self.differentiate(weights, &mut gradient, loss.reborrow());
                self.keep(result)?;
                check_loss(loss.view(), &mut flag)?;
                vector::check_finite(gradient.view(), flag)
            }
            // The check and the norm in one pass.
            Pass::GradientAndNorm { weights, mut gradient, mut loss, mut flag, reduction, norm, .. } => {
                let result = self.differentiate(weights, &mut gradient, loss.reborrow());
                self.keep(result)?;
                check_loss(loss.view(), &mut flag)?;
                vector::finish_gradient(gradient, None, flag, reduction, norm)
            }
            Pass::Loss { weights, mut loss, mut flag, .. } => {
                let result = self.evaluate(weights, loss.reborrow()).map(|_| ());
                self.keep(result)?;
                check_loss(loss.view(), &mut flag)
            }
            other => other.split(self),
        }
    }
}
