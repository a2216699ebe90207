//! Gradient accumulation: one mini-batch made of several parts, each passed through on its own.

use super::{Answer, Objective, ObjectiveExt, Pass, RunningStats, Wrapped, Wrapper};
use crate::device::{Buffer, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::vector::Combination;
use crate::kernels::{metrics, sharpness};

/// Accumulates gradients over several parts, so that a mini-batch can be larger than the memory for its activations.
///
/// It holds one vector as long as the weights, and two from the first pair of products on. Every pass moves 8 B per
/// parameter for the first part and 12 B for each further one.
pub struct Accumulator<T: Scalar> {
    /// The weight of each part in the mean.
    weights: Vec<f64>,
    vector: Buffer<T>,
    /// For the second of a pair of products; empty before.
    second: Buffer<T>,
    loss: Buffer<f64>,
    one: Buffer<f64>,
}

impl<T: Scalar> Accumulator<T> {
    /// For vectors of `len` elements, each accumulated over `parts` parts.
    ///
    /// # Errors
    /// [`Error::Argument`] for zero parts, and those of the allocation.
    pub fn new(device: &Device, len: usize, parts: usize) -> Result<Self> {
        Self::weighted(device, len, vec![1.0 / parts as f64; parts])
    }

    /// The same with a weight for each part, such as its share of the samples. The weights add up to 1.
    ///
    /// # Errors
    /// [`Error::Argument`] for zero parts, and those of the allocation.
    pub fn weighted(device: &Device, len: usize, weights: Vec<f64>) -> Result<Self> {
        let parts = weights.len();
        if parts == 0 {
            let message = "0 parts, expected at least 1".into();
            return Err(Error::Argument { operation: "Accumulator::new", message });
        }
        let (vector, loss) = (device.zeros(if parts > 1 { len } else { 0 })?, device.zeros(1)?);
        Ok(Self { weights, vector, second: device.zeros(0)?, loss, one: device.upload(&[1.0, 0.0, 0.0, 0.0])? })
    }

    /// An objective each of whose groups consists of `parts` consecutive groups of `objective`. Loss, gradient and
    /// product with the Hessian are the (weighted) means over the parts, in each pass. With batch norm in training mode
    /// this differs slightly from the whole batch, because each part is normalised by itself. Groups of `objective`
    /// that do not fill a last one are left out. If there are too few for one, every pass is an [`Error::Argument`].
    pub fn over<'a>(&'a mut self, objective: &'a mut dyn Objective<T>) -> Wrapped<Accumulated<'a, T>> {
        Wrapped(Accumulated { accumulator: self, objective, group: 0 })
    }
}

/// The objective that [`Accumulator::over`] returns.
pub struct Accumulated<'a, T: Scalar> {
    accumulator: &'a mut Accumulator<T>,
    objective: &'a mut dyn Objective<T>,
    group: usize,
}

impl<T: Scalar> Accumulated<'_, T> {
    fn check(&self) -> Result<()> {
        let (parts, groups) = (self.accumulator.weights.len(), self.objective.domain().groups);
        if groups >= parts {
            return Ok(());
        }
        let message = format!("{parts} parts of an objective that has {groups} groups");
        Err(Error::Argument { operation: "Accumulator::over", message })
    }

    /// The mean over the parts of their losses and gradients.
    fn mean_gradient(
        &mut self,
        weights: Slice<'_, T>,
        running_stats: RunningStats,
        mut gradient: SliceMut<'_, T>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let Accumulator { weights: shares, vector, loss: part_loss, one, .. } = &mut *self.accumulator;
        for (part, &share) in shares.iter().enumerate() {
            self.objective.select(self.group * shares.len() + part)?;
            let (out, out_loss) = (vector.view_mut(), part_loss.view_mut());
            self.objective.gradient(weights, running_stats, out, out_loss, flag.reborrow())?;
            let term = Combination::alone(vector.view(), one.view());
            sharpness::combine(term, share, part > 0, gradient.reborrow(), None)?;
            metrics::mean_term(part_loss.view(), share, part > 0, loss.reborrow())?;
        }
        Ok(())
    }

    /// The mean over the parts of their losses.
    fn mean_loss(
        &mut self,
        weights: Slice<'_, T>,
        mut scratch: SliceMut<'_, T>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let Accumulator { weights: shares, loss: part_loss, .. } = &mut *self.accumulator;
        for (part, &share) in shares.iter().enumerate() {
            self.objective.select(self.group * shares.len() + part)?;
            self.objective.loss(weights, scratch.reborrow(), part_loss.view_mut(), flag.reborrow())?;
            metrics::mean_term(part_loss.view(), share, part > 0, loss.reborrow())?;
        }
        Ok(())
    }

    /// The mean over the parts of one product with the Hessian.
    fn mean_product(
        &mut self,
        weights: Slice<'_, T>,
        direction: Slice<'_, T>,
        mut product: SliceMut<'_, T>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let Accumulator { weights: shares, vector, one, .. } = &mut *self.accumulator;
        for (part, &share) in shares.iter().enumerate() {
            self.objective.select(self.group * shares.len() + part)?;
            self.objective.hessian_vector(weights, direction, vector.view_mut(), flag.reborrow())?;
            let term = Combination::alone(vector.view(), one.view());
            sharpness::combine(term, share, part > 0, product.reborrow(), None)?;
        }
        Ok(())
    }

    /// The means over the parts of two products with the Hessian, which the objective computes together.
    fn mean_products(
        &mut self,
        weights: Slice<'_, T>,
        directions: [Slice<'_, T>; 2],
        mut products: [SliceMut<'_, T>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let Accumulator { weights: shares, vector, second, one, .. } = &mut *self.accumulator;
        if second.is_empty() {
            *second = weights.device().zeros(vector.len())?;
        }
        for (part, &share) in shares.iter().enumerate() {
            self.objective.select(self.group * shares.len() + part)?;
            let into = [vector.view_mut(), second.view_mut()];
            self.objective.hessian_vector_pair(weights, directions, into, flag.reborrow())?;
            for (found, product) in [vector.view(), second.view()].into_iter().zip(&mut products) {
                let term = Combination::alone(found, one.view());
                sharpness::combine(term, share, part > 0, product.reborrow(), None)?;
            }
        }
        Ok(())
    }
}

impl<T: Scalar> Wrapper<T> for Accumulated<'_, T> {
    fn inner(&self) -> &dyn Objective<T> {
        self.objective
    }

    fn inner_mut(&mut self) -> &mut dyn Objective<T> {
        self.objective
    }

    fn groups(&self) -> usize {
        self.objective.domain().groups / self.accumulator.weights.len()
    }

    fn answer<'p>(&mut self, pass: Pass<'p, T>) -> Result<Answer<'p, T>> {
        match pass {
            Pass::Commit { .. } | Pass::Abandon | Pass::RealizedStep { .. } => return Ok(Answer::Forward(pass)),
            Pass::Select { group } => self.group = group,
            _ => self.check()?,
        }
        if self.accumulator.weights.len() == 1 {
            return Ok(Answer::Forward(pass));
        }
        match pass {
            Pass::Gradient { weights, running_stats, gradient, loss, flag } => {
                self.mean_gradient(weights, running_stats, gradient, loss, flag)?;
            }
            Pass::Loss { weights, scratch, loss, flag } => self.mean_loss(weights, scratch, loss, flag)?,
            Pass::HessianVector { weights, direction, product, flag } => {
                self.mean_product(weights, direction, product, flag)?;
            }
            Pass::HessianVectorPair { weights, directions, products, flag } => {
                self.mean_products(weights, directions, products, flag)?;
            }
            Pass::GradientAcross { .. } => {
                let message = "the mini-batch of the step before is not kept in parts".into();
                return Err(Error::Argument { operation: "Accumulator::over", message });
            }
            // The passes above select each part.
            Pass::Select { .. } => {}
            // Every other pass consists of these.
            pass => return Ok(Answer::Split(pass)),
        }
        Ok(Answer::Done)
    }
}
