//! Products with the Hessian: all weights move along a direction, and every number of the forward and the backward pass
//! has a derivative along it, its tangent (Pearlmutter 1994). The tangents of the parameters' gradients are the
//! product.
//!
//! Tangents lie in an arena of their own with the same places: where the first arena holds an activation, this one
//! holds the tangent of it, and likewise for gradients, kept values and scratch. So a tangent lives exactly as long as
//! what it is the tangent of. The tangents of the forward run after the forward, because they need only activations
//! that the backward needs too. In the backward, each operation is followed by its tangent.

use super::forward::with_zeros_behind;
use super::graph::Value;
use super::memory_plan::MemoryPlan;
use super::ops::Operation;
use super::pass::{BackwardTangentPass, ForwardTangentPass, Frozen, Operands, ParameterGradients, Weights};
use super::rounding::round;
use super::second_pass::PassBuffers;
use super::{Plan, backward, check_backward};
use crate::device::{Buffer, Compute, Device, Result, Scalar, Slice, SliceMut};
use crate::kernels::loss::{self, LossShape};
use crate::kernels::vector::{self, Combination, Reduction};
use crate::kernels::{check_length, precision, sharpness};
use crate::objective::RunningStats;

/// What a product with the Hessian needs besides what a gradient does.
pub(super) struct Tangent<S: Compute> {
    arena: Buffer<S::Master>,
    /// The direction as convolutions read it; empty where the storage type is no narrower than the master type.
    rounded: Buffer<S>,
    /// Zeros: a direction does not move frozen parameters. Empty where there are none.
    frozen: (Buffer<S::Master>, Buffer<S>),
    /// The loss itself, which shows whether the passes were finite.
    loss: Buffer<f64>,
}

impl<S: Compute> Tangent<S> {
    fn new(device: &Device, memory: &MemoryPlan, rounded: usize, frozen: [usize; 2]) -> Result<Self> {
        let mut arena = device.poisoned(memory.len())?;
        // The batch does not move. Nothing else is placed there at any step.
        arena.slice_mut(memory.value(Value(0)))?.clear()?;
        let frozen = (device.zeros(frozen[0])?, device.zeros(frozen[1])?);
        Ok(Self { arena, rounded: device.zeros(rounded)?, frozen, loss: device.zeros(1)? })
    }
}

/// A direction scaled to a size that f16 holds. A product with the Hessian is linear in the direction, so the factor is
/// taken out of the product together with the loss scale.
pub(super) struct ScaledDirection<T: Scalar> {
    direction: Buffer<T>,
    norm: Buffer<f64>,
    /// See [`precision::direction_scale`].
    factors: Buffer<f64>,
    reduction: Reduction,
}

impl<T: Scalar> ScaledDirection<T> {
    fn new(device: &Device, len: usize) -> Result<Self> {
        let (direction, reduction) = (device.zeros(len)?, Reduction::new(device)?);
        Ok(Self { direction, norm: device.zeros(1)?, factors: device.zeros(6)?, reduction })
    }

    /// Scales a direction to a mean square near that of a network's weights.
    fn scale(&mut self, direction: Slice<'_, T>, loss_scale: Slice<'_, f64>) -> Result<()> {
        let Self { direction: scaled, norm, factors, reduction } = self;
        let target = (direction.len() as f64).sqrt() / 64.0;
        vector::l2_norm(direction, reduction, norm.view_mut())?;
        precision::direction_scale(norm.view(), loss_scale, target, factors.view_mut())?;
        let alone = Combination::alone(direction, factors.slice(0..4)?);
        sharpness::combine(alone, 1.0, false, scaled.view_mut(), None)
    }

    /// The divisor of the product, as the state of a loss scale.
    fn divisor(&self) -> Result<Slice<'_, f64>> {
        self.factors.slice(4..6)
    }
}

impl<S: Compute> Plan<S> {
    /// `N` products with the Hessian in one run through the operations.
    pub(super) fn hessian_products<const N: usize>(
        &mut self,
        weights: Slice<'_, S::Master>,
        directions: [Slice<'_, S::Master>; N],
        mut products: [SliceMut<'_, S::Master>; N],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::hessian_vector";
        check_backward(OPERATION, self.options)?;
        let len = self.parameters.len();
        check_length(OPERATION, "weights", weights.len(), len)?;
        directions.iter().try_for_each(|d| check_length(OPERATION, "direction", d.len(), len))?;
        products.iter().try_for_each(|p| check_length(OPERATION, "product", p.len(), len))?;
        while self.tangents.len() < N {
            let any = self.places.iter().any(|place| place.frozen);
            let frozen = [if any { self.statistics.len() } else { 0 }, self.frozen.len()];
            self.tangents.push(Tangent::new(&self.device, &self.memory, self.buffers.rounded.len(), frozen)?);
        }
        while self.loss_scale.is_some() && self.scaled_directions.len() < N {
            self.scaled_directions.push(ScaledDirection::new(&self.device, len)?);
        }
        // Taken out of the plan during the passes, which borrow all of it.
        let mut tangents = std::mem::take(&mut self.tangents);
        let mut scaled = std::mem::take(&mut self.scaled_directions);
        let mut run = || {
            if let Some(state) = &self.loss_scale {
                for (scaled, direction) in scaled.iter_mut().zip(directions) {
                    scaled.scale(direction, state.view())?;
                }
            }
            let direction = |k: usize| scaled.get(k).map_or(directions[k], |scaled| scaled.direction.view());
            let directions = std::array::from_fn(direction);
            self.tangent_passes(weights, directions, &mut products, &mut tangents, flag.reborrow())?;
            for (index, product) in products.iter_mut().enumerate() {
                let divisor = scaled.get(index).map(ScaledDirection::divisor).transpose()?;
                backward::finish(product.reborrow(), divisor, flag.reborrow())?;
            }
            Ok(())
        };
        let done = run();
        (self.tangents, self.scaled_directions) = (tangents, scaled);
        done
    }

    /// The products without their last stage. The loss goes to the first of the tangents, because it is the same for
    /// all.
    fn tangent_passes<const N: usize>(
        &mut self,
        weights: Slice<'_, S::Master>,
        directions: [Slice<'_, S::Master>; N],
        products: &mut [SliceMut<'_, S::Master>; N],
        tangents: &mut [Tangent<S>],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.round(weights)?;
        self.forward(weights, RunningStats::Keep)?;
        self.loss(self.counted, true, false, tangents[0].loss.view_mut(), Some(flag))?;
        for (direction, tangent) in directions.into_iter().zip(&mut *tangents) {
            round(direction, &mut tangent.rounded)?;
            self.forward_tangent(weights, direction, tangent)?;
            self.loss_tangent(tangent)?;
        }
        for index in (0..self.ops.len()).rev() {
            self.backward(index, weights, None)?;
            for ((direction, product), tangent) in directions.into_iter().zip(&mut *products).zip(&mut *tangents) {
                self.backward_tangent(index, weights, direction, product.reborrow(), tangent)?;
            }
        }
        Ok(())
    }

    /// The tangents of all operations' forward, in their order.
    fn forward_tangent(
        &mut self,
        weights: Slice<'_, S::Master>,
        direction: Slice<'_, S::Master>,
        tangent: &mut Tangent<S>,
    ) -> Result<()> {
        let PassBuffers { arena, rounded, workspace } = &mut self.buffers;
        let frozen = Frozen::new(&self.statistics, &self.frozen)?;
        let weights = Weights::new(&self.places, weights, rounded, frozen)?;
        let frozen = Frozen::new(&tangent.frozen.0, &tangent.frozen.1)?;
        let direction = Weights::new(&self.places, direction, &tangent.rounded, frozen)?;
        for (index, op) in self.ops.iter().enumerate() {
            let mut tangents = Operands::new(&self.memory, index, &mut tangent.arena);
            if !self.memory.is_trained(op.output()) {
                tangents.write(op.output())?.clear()?;
                continue;
            }
            op.forward_tangent(ForwardTangentPass {
                values: Operands::new(&self.memory, index, arena),
                tangents,
                weights,
                direction,
                mode: self.options.batch_norm,
                factors: &self.factors,
                workspace,
            })?;
        }
        Ok(())
    }

    fn loss_tangent(&mut self, tangent: &mut Tangent<S>) -> Result<()> {
        let shape = LossShape { batch: self.counted, classes: self.classes() };
        let counted = shape.batch * shape.classes;
        let logits = self.logits()?.slice(0..counted)?;
        let scale = self.loss_scale.as_ref().map(|state| state.view());
        let mut arena = tangent.arena.disjoint();
        let logits_tangent = arena.read(self.memory.value(self.logits))?.slice(0..counted)?;
        let mut dlogits_tangent = arena.write(self.memory.gradient(self.logits))?;
        let dlogits_tangent = with_zeros_behind(&mut dlogits_tangent, counted)?;
        loss::cross_entropy_tangent(&shape, logits, logits_tangent, dlogits_tangent, scale)
    }

    /// The tangent of one operation's backward, after that. It writes the operation's part of the `product`.
    fn backward_tangent(
        &mut self,
        index: usize,
        weights: Slice<'_, S::Master>,
        direction: Slice<'_, S::Master>,
        product: SliceMut<'_, S::Master>,
        tangent: &mut Tangent<S>,
    ) -> Result<()> {
        let op = &self.ops[index];
        if !self.memory.is_differentiated(op.output()) {
            return Ok(()); // As in the backward.
        }
        let PassBuffers { arena, rounded, workspace } = &mut self.buffers;
        let frozen = Frozen::new(&self.statistics, &self.frozen)?;
        let still = Frozen::new(&tangent.frozen.0, &tangent.frozen.1)?;
        op.backward_tangent(BackwardTangentPass {
            values: Operands::new(&self.memory, index, arena),
            tangents: Operands::new(&self.memory, index, &mut tangent.arena),
            weights: Weights::new(&self.places, weights, rounded, frozen)?,
            direction: Weights::new(&self.places, direction, &tangent.rounded, still)?,
            mode: self.options.batch_norm,
            factors: &self.factors,
            product: ParameterGradients::new(&self.places, product, None),
            workspace,
        })
    }
}
