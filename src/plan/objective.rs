//! A plan as the objective of an optimizer or of a measure of curvature.

use std::ops::Range;

use super::{Beside, Plan, displace};
use crate::arena::Kind;
use crate::device::{Compute, Result, Slice, SliceMut};
use crate::kernels::batch_norm::Mode;
use crate::kernels::vector::Reduction;
use crate::kernels::{precision, vector};
use crate::objective::{Displacement, Objective, Statistics, difference};

impl<S: Compute> Objective<S::Master> for Plan<S> {
    fn len(&self) -> usize {
        self.parameters.len()
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, S::Master>,
        statistics: Statistics,
        gradient: SliceMut<'_, S::Master>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.round(weights)?;
        self.finished_pass(weights, statistics, gradient, loss, flag, None)
    }

    fn gradient_and_norm(
        &mut self,
        weights: Slice<'_, S::Master>,
        statistics: Statistics,
        gradient: SliceMut<'_, S::Master>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
        reduction: &mut Reduction,
        norm: SliceMut<'_, f64>,
    ) -> Result<()> {
        self.round(weights)?;
        self.finished_pass(weights, statistics, gradient, loss, flag, Some((reduction, norm)))
    }

    /// On a GPU both passes run at the same time, for which the first call allocates another arena, or one after the other where there
    /// is no room for it, and while a graph is recorded before there is one. The bits are the same. [`Plan::logits`] are those of one
    /// of the two.
    fn gradient_pair(
        &mut self,
        weights: [Slice<'_, S::Master>; 2],
        gradients: [SliceMut<'_, S::Master>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.check_backward("Plan::gradient_pair")?;
        let beside = self.device.is_simt() && self.make_room_beside()?;
        self.pair(weights, (beside, false), gradients, losses, flag)
    }

    /// In 16 bits what convolutions read is rounded as it is displaced, and only the rest of `point` is written: 10 B per parameter
    /// instead of 12 and then 6.
    fn gradient_displaced(
        &mut self,
        displacement: Displacement<'_, S::Master>,
        mut point: SliceMut<'_, S::Master>,
        gradient: SliceMut<'_, S::Master>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        if self.rounded.is_empty() {
            return displacement.gradient(self, point, gradient, loss, flag);
        }
        displace(self.parameters.len(), displacement, (&mut self.rounded, point.reborrow()), None)?;
        self.finished_pass(point.view(), Statistics::Keep, gradient, loss, flag, None)
    }

    /// The same on both sides, where both passes run at the same time: 12 B per parameter instead of 16 and then twice 6.
    fn gradient_pair_displaced(
        &mut self,
        displacement: Displacement<'_, S::Master>,
        [mut plus, mut minus]: [SliceMut<'_, S::Master>; 2],
        gradients: [SliceMut<'_, S::Master>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.check_backward("Plan::gradient_pair_displaced")?;
        if self.rounded.is_empty() || !self.device.is_simt() || !self.make_room_beside()? {
            return displacement.gradients(self, [plus, minus], gradients, losses, flag);
        }
        if let Beside::There(scene) = &mut self.beside {
            let other = (&mut scene.rounded, minus.reborrow());
            displace(self.parameters.len(), displacement, (&mut self.rounded, plus.reborrow()), Some(other))?;
        }
        self.pair([plus.view(), minus.view()], (true, true), gradients, losses, flag)
    }

    /// The exact product, by differentiating forward and backward along `direction` (Pearlmutter, "Fast exact multiplication by
    /// the Hessian", Neural Computation 1994). Where a ReLU's input is exactly zero its derivative counts as zero, as in
    /// [`Plan::gradient`](Objective::gradient).
    ///
    /// Costs 8/3 of a gradient, counted in convolutions: a gradient takes three per layer, a product three in the forward pass and
    /// five in the backward pass, where the weights' own gradients are left out. The first call allocates another arena as large
    /// as the first; later calls allocate nothing. As in the gradient, the padding between tensors is left as it was.
    ///
    /// In 16 bits the direction is rounded to them where it moves convolutions. In f16 it is brought to a size that they hold
    /// before, in a vector of its own, and the product back after: 12 B per parameter.
    fn hessian_vector(
        &mut self,
        weights: Slice<'_, S::Master>,
        direction: Slice<'_, S::Master>,
        product: SliceMut<'_, S::Master>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.products(weights, [direction], [product], flag)
    }

    /// Costs 14/3 of a gradient, 7/8 of two products: the passes of the network itself, two convolutions of eight per layer, are
    /// the same for both. The first call allocates one more arena.
    fn hessian_vector_pair(
        &mut self,
        weights: Slice<'_, S::Master>,
        directions: [Slice<'_, S::Master>; 2],
        products: [SliceMut<'_, S::Master>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.products(weights, directions, products, flag)
    }

    fn displacement(
        &mut self,
        from: Slice<'_, S::Master>,
        to: Slice<'_, S::Master>,
        mut out: SliceMut<'_, S::Master>,
    ) -> Result<()> {
        difference(from, to, out.reborrow())?;
        // Convolutions alone read rounded weights. (TF32's rounding belongs to the products, and is not seen here.)
        let convolutions =
            self.parameters.tensors().iter().filter(|tensor| matches!(tensor.kind, Kind::Convolution { .. }));
        for tensor in convolutions.filter(|_| S::NARROW) {
            let (range, len) = (tensor.range(), tensor.range().len());
            let (from, to) = (from.slice(range.clone())?.cast(len)?, to.slice(range.clone())?.cast(len)?);
            precision::rounded_difference::<S>(from, to, out.slice_mut(range)?.cast(len)?)?;
        }
        Ok(())
    }

    fn padding(&self) -> Vec<Range<usize>> {
        self.parameters.padding()
    }

    fn abandon(&mut self) {
        self.reported = 0;
    }

    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
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
