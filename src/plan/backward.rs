//! The backward pass.

use std::ops::Range;

use super::graph::{Op, Shape};
use super::places::{BatchNormScratch, Parts, WeightGradient};
use super::{Plan, Target, batch_norm_shape, convolved};
use crate::device::{Compute, Disjoint, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::{self, Backward, Gradients, Normalized, ResidualGradient, Summed};
use crate::kernels::{conv, layers};

/// Room for dgamma and dbeta.
fn pair<'a, T: Scalar>(
    within: &mut Disjoint<'a, T>,
    [dgamma, dbeta]: [Range<usize>; 2],
) -> Result<(SliceMut<'a, T>, SliceMut<'a, T>)> {
    Ok((within.write(dgamma)?, within.write(dbeta)?))
}

impl<S: Compute> Plan<S> {
    /// The backward of one operation: from the gradient of its output to those of its inputs, and of its parameters where there is
    /// something to leave them `into`. Without it, batch norm leaves dgamma and dbeta in its scratch. The forward has been at
    /// `weights`.
    pub(super) fn backward(
        &mut self,
        index: usize,
        weights: Slice<'_, S::Master>,
        mut into: Option<Target<'_, S::Master>>,
    ) -> Result<()> {
        let Self { ops, places, arena, rounded, sums, stages, stage_numbers, loss_scale, .. } = self;
        let op = &ops[index];
        if places.gradients[op.output().0].is_none() {
            return Ok(()); // the loss does not depend on it, and it has no parameter, or planning had failed
        }
        let mut parts = Parts::<S>::new(places, arena);
        let range = |parameter: usize| self.parameters.tensors()[parameter].range();
        let weight = |parameter: usize| weights.slice(range(parameter));
        let add = places.accumulate[index];
        match *op {
            Op::Convolution { x, y, weight: w, ref shape } => {
                let dy = parts.gradient(y)?;
                let mut scratch = parts.scratch(places.scratch[index].1)?;
                if let Some(Target { gradient, flag, norm }) = &mut into {
                    let (x, flag, norm) = (parts.read(x)?, flag.reborrow(), *norm);
                    let scale = loss_scale.as_ref().map(|state| state.view());
                    let stage = stage_numbers[index];
                    match (places.weight_gradients[index], stages) {
                        (WeightGradient::Finished, Some(stages)) => {
                            let finish = stages.finish(stage, scale, flag, norm)?;
                            conv::finished_weight_gradient(shape, x, dy, gradient.slice_mut(range(w))?, finish)?;
                        }
                        (WeightGradient::Summed, Some(stages)) => {
                            conv::partial_weight_gradients(shape, x, dy, scratch.reborrow())?;
                            stages.launch(stage, scratch.view(), gradient.reborrow(), scale, flag, norm)?;
                        }
                        (WeightGradient::Parts, Some(_)) => {
                            conv::partial_weight_gradients(shape, x, dy, scratch.reborrow())?;
                            scratch = parts.scratch(None)?; // what it holds is kept
                        }
                        _ => {
                            let dw = gradient.slice_mut(range(w))?;
                            conv::weight_gradient(shape, x, dy, dw, false, scratch.reborrow())?;
                        }
                    }
                }
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    let kernel = convolved(weights, rounded)?.slice(range(w))?;
                    let Some(norm) = places.sums_for[index] else {
                        return conv::input_gradient(shape, dy, kernel, dx, add[0], scratch);
                    };
                    let Op::BatchNorm { x: input, y, scale, shift, residual, relu, .. } = ops[norm] else {
                        unreachable!("sums are for batch norms")
                    };
                    let (mean, inv_std) = parts.moments(norm)?;
                    let activation = parts.activation(relu, residual, y, weight(shift)?)?;
                    let normalized =
                        Normalized { x: parts.read(input)?, gamma: weight(scale)?, mean, inv_std, activation };
                    let ranges = BatchNormScratch::new::<S>(self.shapes[input.0], places.accumulate[norm][0]);
                    let mut norm_scratch = parts.scratch(places.scratch[norm].1)?;
                    let mut norm_scratch = norm_scratch.disjoint();
                    let mut parameters = into.as_mut().map(|into| into.gradient.disjoint());
                    let (dgamma, dbeta) = match &mut parameters {
                        Some(parameters) => pair(parameters, [range(scale), range(shift)])?,
                        None => pair(&mut norm_scratch, [ranges.dgamma, ranges.dbeta])?,
                    };
                    conv::input_gradient_with_sums(shape, dy, kernel, dx, add[0], normalized, dgamma, dbeta, sums)?;
                }
            }
            Op::BatchNorm { x, y, scale, shift, residual, relu, .. } => {
                let shape = batch_norm_shape(self.shapes[x.0]);
                let (mean, inv_std) = parts.moments(index)?;
                let (gamma, beta) = (weight(scale)?, weight(shift)?);
                let activation = parts.activation(relu, residual, y, beta)?;
                let residual = match residual {
                    Some(value) => parts
                        .gradient_if_needed(value)?
                        .map(|gradient| ResidualGradient { gradient, accumulate: add[1] }),
                    None => None,
                };
                let ranges = BatchNormScratch::new::<S>(self.shapes[x.0], add[0]);
                let mut scratch = parts.scratch(places.scratch[index].1)?;
                let mut scratch = scratch.disjoint();
                let (mut dx, sum) = if add[0] {
                    let sum = parts.gradient_mut(x)?;
                    (scratch.write(ranges.dx)?.cast(sum.len())?, Some(sum))
                } else {
                    (parts.gradient_mut(x)?, None)
                };
                let mut parameters = into.as_mut().map(|into| into.gradient.disjoint());
                let (dgamma, dbeta) = match &mut parameters {
                    Some(parameters) => pair(parameters, [range(scale), range(shift)])?,
                    None => pair(&mut scratch, [ranges.dgamma, ranges.dbeta])?,
                };
                let (x, dy, mode) = (parts.read(x)?, parts.gradient(y)?, self.options.batch_norm);
                if places.sums_for.contains(&Some(index)) {
                    let (dgamma, dbeta) = (dgamma.view(), dbeta.view());
                    let summed = Summed { x, dz: dy, gamma, mean, inv_std, dgamma, dbeta };
                    batch_norm::backward_from_sums(shape, mode, summed, dx.reborrow(), residual)?;
                } else {
                    let input = Backward { x, dy, gamma, mean, inv_std, activation };
                    let gradients = Gradients { dx: dx.reborrow(), dgamma, dbeta };
                    batch_norm::backward(shape, mode, input, gradients, residual, sums)?;
                }
                if let Some(sum) = sum {
                    layers::add_to(dx.view(), sum)?;
                }
            }
            Op::Relu { x, y } => {
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    layers::relu_backward(parts.read(y)?, parts.gradient(y)?, dx, add[0])?;
                }
            }
            Op::Add { a, b, y } => {
                for (value, accumulate) in [(a, add[0]), (b, add[1])] {
                    // Both sides may be one activation, so each is borrowed on its own.
                    let mut parts = Parts::<S>::new(places, arena);
                    let dy = parts.gradient(y)?;
                    match parts.gradient_if_needed(value)? {
                        Some(dx) if accumulate => layers::add_to(dy, dx)?,
                        Some(mut dx) => dx.copy_from(dy)?,
                        None => {}
                    }
                }
            }
            Op::AveragePool { x, y, ref shape } => {
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    layers::average_pool_backward(shape, parts.gradient(y)?, dx, add[0])?;
                }
            }
            Op::GlobalAveragePool { x, y } => {
                let Shape { batch, height, width, channels } = self.shapes[x.0];
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    let dy = parts.gradient(y)?;
                    layers::global_average_pool_backward(batch, height * width, channels, dy, dx, add[0])?;
                }
            }
            Op::Shortcut { x, y, ref shape } => {
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    layers::shortcut_backward(shape, parts.gradient(y)?, dx, add[0])?;
                }
            }
            Op::Linear { x, y, weight: w, bias, ref shape } => {
                let dy = parts.gradient_wide(y)?;
                if let Some(into) = &mut into {
                    let mut parameters = into.gradient.disjoint();
                    let (dw, db) = (parameters.write(range(w))?, parameters.write(range(bias))?);
                    layers::linear_weight_gradient(shape, parts.read(x)?, dy, dw, Some(db), false)?;
                }
                if let Some(dx) = parts.gradient_if_needed(x)? {
                    layers::linear_input_gradient(shape, dy, weight(w)?, dx, add[0])?;
                }
            }
        }
        Ok(())
    }
}
