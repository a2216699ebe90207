//! A plan as the objective of an optimizer or of a measure of curvature.

use super::rounding::displace;
use super::second_pass::SecondPass;
use super::{Plan, check_backward};
use crate::device::{Compute, Result, Slice, SliceMut};
use crate::kernels::batch_norm::Mode;
use crate::kernels::{check_length, precision, vector};
use crate::objective::{Displacement, Domain, Objective, Pass, RunningStats, difference};

/// What passes do in a plan, and what they cost.
///
/// **Gradient pairs.** On a GPU both passes run at the same time; the first call allocates a second arena for that.
/// They run one after the other where there is no memory for it, and while a graph is recorded before there is one. The
/// bits are the same. [`Plan::logits`] are those of one of the two. Likewise gradients on this mini-batch and on the
/// one before, which is kept in a copy; with them the batch of a step must be written before the step.
///
/// **Displaced gradients.** In 16 bits the weights of convolutions are rounded as they are displaced, and only the rest
/// of `point` is written: 10 B per parameter instead of 12 and then 6. For a pair that runs at the same time: 12 B
/// instead of 16 and then twice 6.
///
/// **Products with the Hessian** are exact: forward and backward are differentiated along the direction (Pearlmutter,
/// "Fast exact multiplication by the Hessian", Neural Computation 1994). Where a ReLU's input is exactly zero its
/// derivative counts as zero, as in the gradient. One product costs 8/3 of a gradient, counted in convolutions: a
/// gradient takes three per layer, a product three in the forward pass and five in the backward pass, where the
/// weights' own gradients are left out. The first product allocates another arena as large as the first; later ones
/// allocate nothing. A pair costs 14/3 of a gradient, 7/8 of two products, because the passes of the network itself,
/// two convolutions of eight per layer, are shared; the first pair allocates one more arena. As in the gradient, the
/// padding between tensors is left as it was. In 16 bits the direction is rounded where it moves convolutions. In f16
/// it is first scaled to a size that f16 can hold, in a vector of its own, and the product is scaled back: 12 B per
/// parameter.
impl<S: Compute> Objective<S::Master> for Plan<S> {
    fn domain(&self) -> Domain<'_> {
        Domain { len: self.parameters.len(), groups: 1, padding: self.parameters.padding() }
    }

    fn pass(&mut self, pass: Pass<'_, S::Master>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, running_stats, gradient, loss, flag } => {
                self.round(weights)?;
                self.gradient_pass(weights, running_stats, gradient, loss, flag, None)
            }
            Pass::Loss { weights, loss, flag, .. } => {
                check_length("Plan::loss", "weights", weights.len(), self.parameters.len())?;
                self.round(weights)?;
                self.forward(weights, RunningStats::Keep)?;
                self.loss(self.counted, false, false, loss, Some(flag))
            }
            Pass::GradientAndNorm { weights, running_stats, gradient, loss, flag, reduction, norm } => {
                self.round(weights)?;
                self.gradient_pass(weights, running_stats, gradient, loss, flag, Some((reduction, norm)))
            }
            Pass::GradientPair { weights, gradients, losses, flag } => {
                check_backward("Plan::gradient_pair", self.options)?;
                let at_once = self.device.is_simt() && self.prepare_second_pass()?;
                self.gradient_passes(weights, (at_once, false), gradients, losses, flag)
            }
            Pass::GradientAcross { weights, gradients, losses, flag } => {
                self.gradient_across(weights, gradients, losses, flag)
            }
            Pass::KeepBatch { skip } => self.keep_batch(skip),
            Pass::GradientDisplaced { displacement, mut point, gradient, loss, flag }
                if !self.buffers.rounded.is_empty() =>
            {
                displace(self.parameters.len(), displacement, (&mut self.buffers.rounded, point.reborrow()), None)?;
                self.gradient_pass(point.view(), RunningStats::Keep, gradient, loss, flag, None)
            }
            Pass::GradientPairDisplaced { displacement, points, gradients, losses, flag } => {
                check_backward("Plan::gradient_pair_displaced", self.options)?;
                self.displaced_pair(displacement, points, gradients, losses, flag)
            }
            Pass::HessianVector { weights, direction, product, flag } => {
                self.hessian_products(weights, [direction], [product], flag)
            }
            Pass::HessianVectorPair { weights, directions, products, flag } => {
                self.hessian_products(weights, directions, products, flag)
            }
            Pass::RealizedStep { from, to, out } => self.realised_displacement(from, to, out),
            Pass::Abandon => {
                self.reported = 0;
                Ok(())
            }
            Pass::Commit { skip } => self.commit_step(skip),
            other @ (Pass::ScatteredGradient { .. } | Pass::GradientDisplaced { .. } | Pass::Select { .. }) => {
                other.split(self)
            }
        }
    }
}

impl<S: Compute> Plan<S> {
    /// Both sides of a displacement; in 16 bits rounded as they are displaced if both passes run at the same time.
    fn displaced_pair(
        &mut self,
        displacement: Displacement<'_, S::Master>,
        points: [SliceMut<'_, S::Master>; 2],
        gradients: [SliceMut<'_, S::Master>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        if self.buffers.rounded.is_empty() || !self.device.is_simt() || !self.prepare_second_pass()? {
            return Pass::GradientPairDisplaced { displacement, points, gradients, losses, flag }.split(self);
        }
        let [mut plus, mut minus] = points;
        if let SecondPass::Ready(second) = &mut self.second_pass {
            let other = (&mut second.rounded, minus.reborrow());
            displace(self.parameters.len(), displacement, (&mut self.buffers.rounded, plus.reborrow()), Some(other))?;
        }
        self.gradient_passes([plus.view(), minus.view()], (true, true), gradients, losses, flag)
    }

    /// The step between two points, taken from rounded weights where passes round them.
    fn realised_displacement(
        &self,
        from: Slice<'_, S::Master>,
        to: Slice<'_, S::Master>,
        mut out: SliceMut<'_, S::Master>,
    ) -> Result<()> {
        difference(from, to, out.reborrow())?;
        // TF32's rounding belongs to the products and does not show here.
        let len = self.buffers.rounded.len();
        if len == 0 {
            return Ok(());
        }
        let (from, to) = (from.slice(0..len)?.cast(len)?, to.slice(0..len)?.cast(len)?);
        precision::rounded_difference::<S>(from, to, out.slice_mut(0..len)?.cast(len)?)
    }

    /// Updates the loss scale, and makes the pending running statistics the current ones, unless the step was skipped.
    fn commit_step(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        if let Some(state) = &mut self.loss_scale {
            precision::update_scale(state.view_mut(), skip)?;
        }
        let passes = std::mem::take(&mut self.reported);
        if passes == 0 || self.options.batch_norm == Mode::Eval {
            return Ok(());
        }
        vector::commit(skip, self.pending[(passes - 1) % 2].view(), self.statistics.view_mut())
    }
}
