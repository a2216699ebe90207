//! The tangents of the forward and the backward pass, of which a product with the Hessian consists: all weights move along a
//! direction, and every number of both passes has a derivative along it (Pearlmutter 1994).
//!
//! Tangents lie in an arena of their own with the places of the first: where that one holds an activation, this one holds its
//! tangent, and likewise for gradients, batch norm's moments and scratch. So a tangent lives exactly as long as what it is the
//! tangent of. The forward's tangents run after the forward, because they need only activations that the backward needs too;
//! the backward's run operation by operation behind it.

use super::graph::{Op, Shape, Value};
use super::places::{BatchNormScratch, Parts, Places};
use super::{Plan, batch_norm_shape, convolved, round};
use crate::device::{Buffer, Compute, Device, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::{
    self, Backward, BackwardTangents, ForwardTangents, Gradients, Normalized, ResidualGradient,
};
use crate::kernels::loss::{self, LossShape};
use crate::kernels::vector::{self, Combination, Reduction};
use crate::kernels::{conv, layers, precision, sharpness};
use crate::objective::RunningStats;

/// What a product with the Hessian needs beside what a gradient does.
pub(super) struct Tangent<S: Compute> {
    arena: Buffer<S::Master>,
    /// The direction as convolutions read it; empty where that is as it is.
    rounded: Buffer<S>,
    /// The loss itself, which shows whether the passes were finite.
    pub loss: Buffer<f64>,
}

/// A direction at a size that f16 holds: a product with the Hessian is linear in it, and what brings it there is taken out of the
/// product with the loss scale.
pub(super) struct Scaled<T: Scalar> {
    direction: Buffer<T>,
    norm: Buffer<f64>,
    /// See [`precision::direction_scale`].
    factors: Buffer<f64>,
    reduction: Reduction,
}

impl<T: Scalar> Scaled<T> {
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        let (direction, reduction) = (device.zeros(len)?, Reduction::new(device)?);
        Ok(Self { direction, norm: device.zeros(1)?, factors: device.zeros(6)?, reduction })
    }

    /// Brings a direction to a mean square near that of a network's weights.
    pub fn scale(&mut self, direction: Slice<'_, T>, loss_scale: Slice<'_, f64>) -> Result<()> {
        let Self { direction: scaled, norm, factors, reduction } = self;
        let target = (direction.len() as f64).sqrt() / 64.0;
        vector::l2_norm(direction, reduction, norm.view_mut())?;
        precision::direction_scale(norm.view(), loss_scale, target, factors.view_mut())?;
        let alone = Combination::alone(direction, factors.slice(0..4)?);
        sharpness::combine(alone, 1.0, false, scaled.view_mut(), None)
    }

    /// What became of it.
    pub fn direction(&self) -> Slice<'_, T> {
        self.direction.view()
    }

    /// What the product has to be divided by, as a loss scale.
    pub fn state(&self) -> Result<Slice<'_, f64>> {
        self.factors.slice(4..6)
    }
}

impl<S: Compute> Tangent<S> {
    pub fn new(device: &Device, places: &Places, rounded: usize) -> Result<Self> {
        let mut arena = device.poisoned(places.len)?;
        // The batch does not move. Its place is its own during all steps.
        arena.slice_mut(places.value(Value(0)))?.clear()?;
        Ok(Self { arena, rounded: device.zeros(rounded)?, loss: device.zeros(1)? })
    }
}

impl<S: Compute> Plan<S> {
    /// The products of the Hessian with some directions, and the loss in the first of the tangents, which alone is looked at.
    pub(super) fn tangent_passes<const N: usize>(
        &mut self,
        weights: Slice<'_, S::Master>,
        directions: [Slice<'_, S::Master>; N],
        products: &mut [SliceMut<'_, S::Master>; N],
        tangents: &mut [Tangent<S>],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.round(weights)?;
        self.forward(weights, RunningStats::Keep)?;
        self.loss(self.shapes[0].batch, true, false, tangents[0].loss.view_mut(), Some(flag))?;
        for (direction, tangent) in directions.into_iter().zip(&mut *tangents) {
            round(direction, &mut tangent.rounded)?;
            self.forward_tangent(weights, direction, tangent)?;
            self.loss_tangent(&mut tangent.arena)?;
        }
        for index in (0..self.ops.len()).rev() {
            self.backward(index, weights, None)?;
            for ((direction, product), tangent) in directions.into_iter().zip(&mut *products).zip(&mut *tangents) {
                self.backward_tangent(index, weights, direction, product, tangent)?;
            }
        }
        Ok(())
    }

    /// Of all operations in their order.
    fn forward_tangent(
        &mut self,
        weights: Slice<'_, S::Master>,
        direction: Slice<'_, S::Master>,
        tangents: &mut Tangent<S>,
    ) -> Result<()> {
        let Self { ops, places, arena, rounded, sums, .. } = self;
        let Tangent { arena: tangents, rounded: rounded_direction, .. } = tangents;
        let convolved_weights = convolved(weights, rounded)?;
        let convolved_direction = convolved(direction, rounded_direction)?;
        for (index, op) in ops.iter().enumerate() {
            let mut parts = Parts::<S>::new(places, arena);
            let mut tangent = Parts::<S>::new(places, tangents);
            if !places.trained[op.output().0] {
                tangent.write(op.output())?.clear()?;
                continue;
            }
            let range = |parameter: usize| self.parameters.tensors()[parameter].range();
            let weight = |parameter: usize| weights.slice(range(parameter));
            let weight_tangent = |parameter: usize| direction.slice(range(parameter));
            match *op {
                Op::Convolution { x, y, weight: w, ref shape } => {
                    let kernel = convolved_weights.slice(range(w))?;
                    let kernel_tangent = convolved_direction.slice(range(w))?;
                    let mut scratch = tangent.scratch(places.scratch[index].0)?;
                    let mut y = tangent.write(y)?;
                    let moves = places.trained[x.0];
                    if moves {
                        conv::forward(shape, tangent.read(x)?, kernel, y.reborrow(), false, scratch.reborrow())?;
                    }
                    conv::forward(shape, parts.read(x)?, kernel_tangent, y, moves, scratch)?;
                }
                Op::BatchNorm { x, y, scale, shift, residual, relu, .. } => {
                    let shape = batch_norm_shape(self.shapes[x.0]);
                    let (mean, inv_std) = parts.moments(index)?;
                    let activation = parts.activation(relu, residual, y, weight(shift)?)?;
                    let input = Normalized { x: parts.read(x)?, gamma: weight(scale)?, mean, inv_std, activation };
                    let tangents = ForwardTangents {
                        x: tangent.read(x)?,
                        gamma: weight_tangent(scale)?,
                        beta: weight_tangent(shift)?,
                        residual: residual.map(|value| tangent.read(value)).transpose()?,
                    };
                    let (y, saved) = (tangent.write(y)?, tangent.moments_mut(index)?);
                    batch_norm::forward_tangent(shape, self.options.batch_norm, input, tangents, y, saved, sums)?;
                }
                // The same factor of 0 or 1 as in the backward.
                Op::Relu { x, y } => {
                    layers::relu_backward(parts.read(y)?, tangent.read(x)?, tangent.write(y)?, false)?;
                }
                Op::Add { a, b, y } => layers::add(tangent.read(a)?, tangent.read(b)?, tangent.write(y)?)?,
                Op::AveragePool { x, y, ref shape } => {
                    layers::average_pool(shape, tangent.read(x)?, tangent.write(y)?)?;
                }
                Op::GlobalAveragePool { x, y } => {
                    let Shape { batch, height, width, channels } = self.shapes[x.0];
                    let (x, y) = (tangent.read(x)?, tangent.write(y)?);
                    layers::global_average_pool(batch, height * width, channels, x, y)?;
                }
                Op::Shortcut { x, y, ref shape } => layers::shortcut(shape, tangent.read(x)?, tangent.write(y)?)?,
                Op::Linear { x, y, weight: w, bias, ref shape } => {
                    let mut y = tangent.write_wide(y)?;
                    let bias = weight_tangent(bias)?;
                    layers::linear(shape, tangent.read(x)?, weight(w)?, Some(bias), y.reborrow(), false)?;
                    layers::linear(shape, parts.read(x)?, weight_tangent(w)?, None, y, true)?;
                }
            }
        }
        Ok(())
    }

    fn loss_tangent(&mut self, tangents: &mut Buffer<S::Master>) -> Result<()> {
        let shape = LossShape { batch: self.shapes[0].batch, classes: self.classes() };
        let logits = self.logits()?;
        let scale = self.loss_scale.as_ref().map(|state| state.view());
        let mut tangent = Parts::<S>::new(&self.places, tangents);
        let (moved, dlogits) = (tangent.read_wide(self.logits)?, tangent.gradient_wide_mut(self.logits)?);
        loss::cross_entropy_tangent(&shape, logits, moved, dlogits, scale)
    }

    /// Of one operation, after its backward: the tangents of its parameters' gradients go to `product`.
    fn backward_tangent(
        &mut self,
        index: usize,
        weights: Slice<'_, S::Master>,
        direction: Slice<'_, S::Master>,
        product: &mut SliceMut<'_, S::Master>,
        tangents: &mut Tangent<S>,
    ) -> Result<()> {
        let Self { ops, places, arena, rounded, sums, .. } = self;
        let Tangent { arena: tangents, rounded: rounded_direction, .. } = tangents;
        let convolved_weights = convolved(weights, rounded)?;
        let convolved_direction = convolved(direction, rounded_direction)?;
        let op = &ops[index];
        if places.gradients[op.output().0].is_none() {
            return Ok(()); // as in the backward
        }
        let mut parts = Parts::<S>::new(places, arena);
        let mut tangent = Parts::<S>::new(places, tangents);
        let range = |parameter: usize| self.parameters.tensors()[parameter].range();
        let weight = |parameter: usize| weights.slice(range(parameter));
        let weight_tangent = |parameter: usize| direction.slice(range(parameter));
        let add = places.accumulate[index];
        match *op {
            Op::Convolution { x, y, weight: w, ref shape } => {
                let (dy, dy_tangent) = (parts.gradient(y)?, tangent.gradient(y)?);
                let mut scratch = tangent.scratch(places.scratch[index].1)?;
                let mut dw = product.slice_mut(range(w))?;
                conv::weight_gradient(shape, parts.read(x)?, dy_tangent, dw.reborrow(), false, scratch.reborrow())?;
                if places.trained[x.0] {
                    conv::weight_gradient(shape, tangent.read(x)?, dy, dw, true, scratch.reborrow())?;
                }
                if let Some(mut dx) = tangent.gradient_if_needed(x)? {
                    let into = dx.reborrow();
                    conv::input_gradient(
                        shape,
                        dy_tangent,
                        convolved_weights.slice(range(w))?,
                        into,
                        add[0],
                        scratch.reborrow(),
                    )?;
                    conv::input_gradient(shape, dy, convolved_direction.slice(range(w))?, dx, true, scratch)?;
                }
            }
            Op::BatchNorm { x, y, scale, shift, residual, relu, .. } => {
                let shape = batch_norm_shape(self.shapes[x.0]);
                let (mean, inv_std) = parts.moments(index)?;
                let activation = parts.activation(relu, residual, y, weight(shift)?)?;
                let (x_value, dy, gamma) = (parts.read(x)?, parts.gradient(y)?, weight(scale)?);
                let input = Backward { x: x_value, dy, gamma, mean, inv_std, activation };
                // The backward left these there.
                let ranges = BatchNormScratch::new::<S>(self.shapes[x.0], add[0]);
                let parameters = parts.scratch(places.scratch[index].1)?;
                let (mean, inv_std) = tangent.moments(index)?;
                let tangents = BackwardTangents {
                    x: tangent.read(x)?,
                    dy: tangent.gradient(y)?,
                    gamma: weight_tangent(scale)?,
                    mean,
                    inv_std,
                    dgamma: parameters.view().slice(ranges.dgamma)?,
                    dbeta: parameters.view().slice(ranges.dbeta)?,
                };
                let residual = match residual {
                    Some(value) => tangent
                        .gradient_if_needed(value)?
                        .map(|gradient| ResidualGradient { gradient, accumulate: add[1] }),
                    None => None,
                };
                let mut scratch = tangent.scratch(places.scratch[index].1)?;
                let (mut dx, sum) = if add[0] {
                    let sum = tangent.gradient_mut(x)?;
                    (scratch.slice_mut(ranges.dx)?.cast(sum.len())?, Some(sum))
                } else {
                    (tangent.gradient_mut(x)?, None)
                };
                let mut product = product.disjoint();
                let (dgamma, dbeta) = (product.write(range(scale))?, product.write(range(shift))?);
                let gradients = Gradients { dx: dx.reborrow(), dgamma, dbeta };
                let mode = self.options.batch_norm;
                batch_norm::backward_tangent(shape, mode, input, tangents, gradients, residual, sums)?;
                if let Some(sum) = sum {
                    layers::add_to(dx.view(), sum)?;
                }
            }
            // From here on the backward is linear, and its tangent the same function.
            Op::Relu { x, y } => {
                if let Some(dx) = tangent.gradient_if_needed(x)? {
                    layers::relu_backward(parts.read(y)?, tangent.gradient(y)?, dx, add[0])?;
                }
            }
            Op::Add { a, b, y } => {
                for (value, accumulate) in [(a, add[0]), (b, add[1])] {
                    let mut tangent = Parts::<S>::new(places, tangents);
                    let dy = tangent.gradient(y)?;
                    match tangent.gradient_if_needed(value)? {
                        Some(dx) if accumulate => layers::add_to(dy, dx)?,
                        Some(mut dx) => dx.copy_from(dy)?,
                        None => {}
                    }
                }
            }
            Op::AveragePool { x, y, ref shape } => {
                if let Some(dx) = tangent.gradient_if_needed(x)? {
                    layers::average_pool_backward(shape, tangent.gradient(y)?, dx, add[0])?;
                }
            }
            Op::GlobalAveragePool { x, y } => {
                let Shape { batch, height, width, channels } = self.shapes[x.0];
                if let Some(dx) = tangent.gradient_if_needed(x)? {
                    let dy = tangent.gradient(y)?;
                    layers::global_average_pool_backward(batch, height * width, channels, dy, dx, add[0])?;
                }
            }
            Op::Shortcut { x, y, ref shape } => {
                if let Some(dx) = tangent.gradient_if_needed(x)? {
                    layers::shortcut_backward(shape, tangent.gradient(y)?, dx, add[0])?;
                }
            }
            // Linear in the output's gradient, but with a product more each.
            Op::Linear { x, y, weight: w, bias, ref shape } => {
                let (dy, dy_tangent) = (parts.gradient_wide(y)?, tangent.gradient_wide(y)?);
                let mut product = product.disjoint();
                let (mut dw, db) = (product.write(range(w))?, product.write(range(bias))?);
                layers::linear_weight_gradient(shape, parts.read(x)?, dy_tangent, dw.reborrow(), Some(db), false)?;
                layers::linear_weight_gradient(shape, tangent.read(x)?, dy, dw, None, true)?;
                if let Some(mut dx) = tangent.gradient_if_needed(x)? {
                    layers::linear_input_gradient(shape, dy_tangent, weight(w)?, dx.reborrow(), add[0])?;
                    layers::linear_input_gradient(shape, dy, weight_tangent(w)?, dx, true)?;
                }
            }
        }
        Ok(())
    }
}
