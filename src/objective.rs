//! What an optimizer needs to know of the function it minimises: loss and gradient at given weights, and products with the Hessian.
//!
//! A network's [`crate::plan::Plan`] is an objective; so is any function of a flat vector that a user brings.

use std::ops::Range;

use crate::device::{Buffer, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::vector::{self, Combination, Reduction};
use crate::kernels::{metrics, sharpness};

/// What a pass does with batch norm's running statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// Compute the updated statistics and hold them until [`Objective::commit`]: the pass at the unperturbed weights. Where a
    /// step has several of them, on groups or parts of its mini-batch, each goes on from the one before.
    Update,
    /// Leave them alone: every pass at perturbed weights.
    Keep,
}

/// Weights on both sides of others: `from ± ρ along/(norm + 1e-12)`, as [`vector::perturb`] makes them.
#[derive(Clone, Copy)]
pub struct Displacement<'a, T: Scalar> {
    /// The weights between them.
    pub from: Slice<'a, T>,
    /// The direction.
    pub along: Slice<'a, T>,
    /// Its norm: one element.
    pub norm: Slice<'a, f64>,
    /// ρ.
    pub rho: f64,
}

impl<T: Scalar> Displacement<'_, T> {
    /// Loss and gradient at the displaced weights, which are written to `point`, by a pass of its own.
    pub(crate) fn gradient(
        &self,
        objective: &mut (impl Objective<T> + ?Sized),
        mut point: SliceMut<'_, T>,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        vector::perturb(self.from, self.along, self.norm, self.rho, point.reborrow(), None)?;
        objective.gradient(point.view(), Statistics::Keep, gradient, loss, flag)
    }

    /// The same on both sides.
    pub(crate) fn gradients(
        &self,
        objective: &mut (impl Objective<T> + ?Sized),
        [mut plus, mut minus]: [SliceMut<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let (here, there) = (plus.reborrow(), Some(minus.reborrow()));
        vector::perturb(self.from, self.along, self.norm, self.rho, here, there)?;
        objective.gradient_pair([plus.view(), minus.view()], gradients, losses, flag)
    }
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

    /// As [`Objective::gradient`], and writes the gradient's norm to `norm` (one element). By default that is a pass of its own;
    /// an objective that looks at its gradient anyway, as a plan does, has it for nothing. What padding there is between tensors is taken
    /// to be zero.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient_and_norm(
        &mut self,
        weights: Slice<'_, T>,
        statistics: Statistics,
        mut gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
        reduction: &mut Reduction,
        norm: SliceMut<'_, f64>,
    ) -> Result<()> {
        self.gradient(weights, statistics, gradient.reborrow(), loss, flag)?;
        vector::l2_norm(gradient.view(), reduction, norm)
    }

    /// As [`Objective::gradient`] at two points, without the running statistics. By default one after the other; where an objective
    /// can, both at the same time.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient_pair(
        &mut self,
        weights: [Slice<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        for ((weights, gradient), loss) in weights.into_iter().zip(gradients).zip(losses) {
            self.gradient(weights, Statistics::Keep, gradient, loss, flag.reborrow())?;
        }
        Ok(())
    }

    /// As [`Objective::gradient`] at displaced weights, `from + ρ …`, without the running statistics. `point` is room for them, as
    /// long as they are; afterwards nobody should read it. By default they are written there and passed on; an objective that
    /// rounds weights before it uses them can have them rounded at once.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient_displaced(
        &mut self,
        displacement: Displacement<'_, T>,
        point: SliceMut<'_, T>,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        displacement.gradient(self, point, gradient, loss, flag)
    }

    /// As [`Objective::gradient_pair`] at the weights on both sides, `from + ρ …` and `from − ρ …`, with room for both.
    ///
    /// # Errors
    /// Those of the device.
    fn gradient_pair_displaced(
        &mut self,
        displacement: Displacement<'_, T>,
        points: [SliceMut<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        displacement.gradients(self, points, gradients, losses, flag)
    }

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

    /// Two such products at once, where one pass over the network's own numbers serves both: as many bits as one by one. By default
    /// they are taken one by one.
    ///
    /// # Errors
    /// As [`Objective::hessian_vector`].
    fn hessian_vector_pair(
        &mut self,
        weights: Slice<'_, T>,
        directions: [Slice<'_, T>; 2],
        products: [SliceMut<'_, T>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        for (direction, product) in directions.into_iter().zip(products) {
            self.hessian_vector(weights, direction, product, flag.reborrow())?;
        }
        Ok(())
    }

    /// Writes to `out` what becomes of the step from `from` to `to`: their difference, and where the objective rounds weights
    /// before it uses them, that of the rounded ones. For observation; three vectors laid out alike.
    ///
    /// # Errors
    /// Those of the device.
    fn displacement(&mut self, from: Slice<'_, T>, to: Slice<'_, T>, out: SliceMut<'_, T>) -> Result<()> {
        difference(from, to, out)
    }

    /// The parts of the vector that belong to no weight, such as what lies between aligned tensors. Where curvature is measured
    /// along a random direction, that is zero there.
    fn padding(&self) -> Vec<Range<usize>> {
        Vec::new()
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

    /// Ends a step that has failed with an error: drops what its passes have left for the end. It cannot fail itself.
    fn abandon(&mut self) {}

    /// Ends a step: makes the statistics of the passes with [`Statistics::Update`] permanent, unless `skip` (one element, on
    /// the device) is set.
    ///
    /// # Errors
    /// Those of the device.
    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        let _ = skip;
        Ok(())
    }
}

/// Gradient accumulation: makes one mini-batch of several parts that are passed through one after the other, so that a batch
/// larger than the memory for its activations can be followed.
///
/// Beside the objective it holds one vector as long as the weights, and two from the first pair of products on. Every pass moves
/// 8 B per parameter for the first part and 12 B for each further one.
pub struct Accumulator<T: Scalar> {
    parts: usize,
    vector: Buffer<T>,
    /// For the second of a pair of products; empty before.
    second: Buffer<T>,
    loss: Buffer<f64>,
    one: Buffer<f64>,
}

impl<T: Scalar> Accumulator<T> {
    /// For gradients of `len` elements, each taken over `parts` parts.
    ///
    /// # Errors
    /// [`Error::Argument`] for no part, and those of the allocation.
    pub fn new(device: &Device, len: usize, parts: usize) -> Result<Self> {
        if parts == 0 {
            let message = "a mini-batch of no part".into();
            return Err(Error::Argument { operation: "Accumulator::new", message });
        }
        let (vector, loss) = (device.zeros(if parts > 1 { len } else { 0 })?, device.zeros(1)?);
        Ok(Self { parts, vector, second: device.zeros(0)?, loss, one: device.upload(&[1.0, 0.0, 0.0, 0.0])? })
    }

    /// The objective whose every group is `parts` consecutive groups of `objective`: loss, gradient and product with the Hessian
    /// are the means of theirs, in each pass. With batch norm in training mode it is not quite that of the whole batch, because
    /// each part is normalised by itself. Groups of `objective` that do not fill a last one are left out; where there are too
    /// few for one, every pass is an [`Error::Argument`].
    pub fn over<'a, O: Objective<T>>(&'a mut self, objective: &'a mut O) -> Accumulated<'a, T, O> {
        Accumulated { accumulator: self, objective, group: 0 }
    }
}

/// What [`Accumulator::over`] makes.
pub struct Accumulated<'a, T: Scalar, O> {
    accumulator: &'a mut Accumulator<T>,
    objective: &'a mut O,
    group: usize,
}

impl<T: Scalar, O: Objective<T>> Accumulated<'_, T, O> {
    fn check(&self) -> Result<()> {
        let (parts, groups) = (self.accumulator.parts, self.objective.groups());
        if groups >= parts {
            return Ok(());
        }
        let message = format!("{parts} parts of an objective that has {groups} groups");
        Err(Error::Argument { operation: "Accumulator::over", message })
    }
}

impl<T: Scalar, O: Objective<T>> Objective<T> for Accumulated<'_, T, O> {
    fn len(&self) -> usize {
        self.objective.len()
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, T>,
        statistics: Statistics,
        mut gradient: SliceMut<'_, T>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.check()?;
        let Accumulator { parts, vector, loss: part_loss, one, .. } = &mut *self.accumulator;
        if *parts == 1 {
            return self.objective.gradient(weights, statistics, gradient, loss, flag);
        }
        for part in 0..*parts {
            self.objective.select(self.group * *parts + part)?;
            let (out, out_loss) = (vector.view_mut(), part_loss.view_mut());
            self.objective.gradient(weights, statistics, out, out_loss, flag.reborrow())?;
            let (weight, add) = (1.0 / *parts as f64, part > 0);
            let term = Combination::alone(vector.view(), one.view());
            sharpness::combine(term, weight, add, gradient.reborrow(), None)?;
            metrics::mean_term(part_loss.view(), weight, add, loss.reborrow())?;
        }
        Ok(())
    }

    fn gradient_and_norm(
        &mut self,
        weights: Slice<'_, T>,
        statistics: Statistics,
        mut gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
        reduction: &mut Reduction,
        norm: SliceMut<'_, f64>,
    ) -> Result<()> {
        if self.accumulator.parts == 1 {
            self.check()?;
            return self.objective.gradient_and_norm(weights, statistics, gradient, loss, flag, reduction, norm);
        }
        self.gradient(weights, statistics, gradient.reborrow(), loss, flag)?;
        vector::l2_norm(gradient.view(), reduction, norm)
    }

    fn gradient_pair(
        &mut self,
        weights: [Slice<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        if self.accumulator.parts == 1 {
            self.check()?;
            return self.objective.gradient_pair(weights, gradients, losses, flag);
        }
        for ((weights, gradient), loss) in weights.into_iter().zip(gradients).zip(losses) {
            self.gradient(weights, Statistics::Keep, gradient, loss, flag.reborrow())?;
        }
        Ok(())
    }

    fn gradient_displaced(
        &mut self,
        displacement: Displacement<'_, T>,
        point: SliceMut<'_, T>,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        if self.accumulator.parts == 1 {
            self.check()?;
            return self.objective.gradient_displaced(displacement, point, gradient, loss, flag);
        }
        displacement.gradient(self, point, gradient, loss, flag)
    }

    fn gradient_pair_displaced(
        &mut self,
        displacement: Displacement<'_, T>,
        points: [SliceMut<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        if self.accumulator.parts == 1 {
            self.check()?;
            return self.objective.gradient_pair_displaced(displacement, points, gradients, losses, flag);
        }
        displacement.gradients(self, points, gradients, losses, flag)
    }

    fn hessian_vector(
        &mut self,
        weights: Slice<'_, T>,
        direction: Slice<'_, T>,
        mut product: SliceMut<'_, T>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.check()?;
        let Accumulator { parts, vector, one, .. } = &mut *self.accumulator;
        if *parts == 1 {
            return self.objective.hessian_vector(weights, direction, product, flag);
        }
        for part in 0..*parts {
            self.objective.select(self.group * *parts + part)?;
            self.objective.hessian_vector(weights, direction, vector.view_mut(), flag.reborrow())?;
            let term = Combination::alone(vector.view(), one.view());
            sharpness::combine(term, 1.0 / *parts as f64, part > 0, product.reborrow(), None)?;
        }
        Ok(())
    }

    fn hessian_vector_pair(
        &mut self,
        weights: Slice<'_, T>,
        directions: [Slice<'_, T>; 2],
        mut products: [SliceMut<'_, T>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.check()?;
        let Accumulator { parts, vector, second, one, .. } = &mut *self.accumulator;
        if *parts == 1 {
            return self.objective.hessian_vector_pair(weights, directions, products, flag);
        }
        if second.is_empty() {
            *second = weights.device().zeros(vector.len())?;
        }
        for part in 0..*parts {
            self.objective.select(self.group * *parts + part)?;
            let into = [vector.view_mut(), second.view_mut()];
            self.objective.hessian_vector_pair(weights, directions, into, flag.reborrow())?;
            for (found, product) in [vector.view(), second.view()].into_iter().zip(&mut products) {
                let term = Combination::alone(found, one.view());
                sharpness::combine(term, 1.0 / *parts as f64, part > 0, product.reborrow(), None)?;
            }
        }
        Ok(())
    }

    fn displacement(&mut self, from: Slice<'_, T>, to: Slice<'_, T>, out: SliceMut<'_, T>) -> Result<()> {
        self.objective.displacement(from, to, out)
    }

    fn padding(&self) -> Vec<Range<usize>> {
        self.objective.padding()
    }

    fn groups(&self) -> usize {
        self.objective.groups() / self.accumulator.parts
    }

    fn select(&mut self, group: usize) -> Result<()> {
        self.group = group;
        match self.accumulator.parts {
            1 => self.objective.select(group),
            // Each pass goes through the parts itself.
            _ => Ok(()),
        }
    }

    fn abandon(&mut self) {
        self.objective.abandon();
    }

    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        self.objective.commit(skip)
    }
}

/// `out = to − from`
pub(crate) fn difference<T: Scalar>(from: Slice<'_, T>, to: Slice<'_, T>, mut out: SliceMut<'_, T>) -> Result<()> {
    out.copy_from(to)?;
    vector::axpy(-1.0, from, out)
}
