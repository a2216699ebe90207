//! The trace of the Hessian: of all weights, by parts of the weights, and with reduced variance (Hutch++).

use std::ops::Range;

use super::{Curvature, Estimate};
use crate::device::{Buffer, Error, Result, Scalar};
use crate::kernels::sharpness;
use crate::kernels::vector::{self, Combination};
use crate::objective::ObjectiveExt;

impl<T: Scalar> Curvature<'_, T> {
    /// The trace of the Hessian by Hutchinson's estimator (1990): the mean of `vᵀHv` over vectors v of random signs.
    /// Its expected value is the trace; the variance of one probe is `2 Σ_{i≠j} h_ij²`. Takes one product with the
    /// Hessian per probe, computed in pairs; the memory does not depend on the number of probes. Calls `progress` after
    /// each probe. Probe p depends on `seed` and p alone, so a run with more probes begins with the same ones.
    ///
    /// # Errors
    /// [`Error::Argument`] for zero probes; [`Error::NotFinite`]; those of the objective.
    pub fn trace(&mut self, probes: usize, seed: u64, mut progress: impl FnMut(usize)) -> Result<Estimate> {
        const OPERATION: &str = "Curvature::trace";
        check_probes(OPERATION, probes)?;
        let mut samples = Vec::new();
        for probe in 0..probes {
            self.probe(seed, probe, probes)?;
            vector::dot(self.direction.view(), self.product.view(), &mut self.reduction, self.number.view_mut())?;
            samples.push(self.finite_number(OPERATION)?);
            progress(probe + 1);
        }
        Ok(Estimate::of(&samples))
    }

    /// The traces of the Hessian's diagonal blocks, one block for each of these parts of the weights, in their order. A
    /// part is a range of elements, such as [`Tensor::range`](crate::arena::Tensor::range). Hutchinson's estimator with
    /// the probes of [`Curvature::trace`]; each product serves all parts.
    ///
    /// # Errors
    /// As [`Curvature::trace`], and [`Error::Range`] for a part outside the weights.
    pub fn traces(
        &mut self,
        parts: &[Range<usize>],
        probes: usize,
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Estimate>> {
        const OPERATION: &str = "Curvature::traces";
        check_probes(OPERATION, probes)?;
        let mut samples = vec![Vec::new(); parts.len()];
        for probe in 0..probes {
            self.probe(seed, probe, probes)?;
            for (part, samples) in parts.iter().zip(&mut samples) {
                let (signs, product) = (self.direction.slice(part.clone())?, self.product.slice(part.clone())?);
                vector::dot(signs, product, &mut self.reduction, self.number.view_mut())?;
                samples.push(self.finite_number(OPERATION)?);
            }
            progress(probe + 1);
        }
        Ok(samples.iter().map(|samples| Estimate::of(samples)).collect())
    }

    /// The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021). A third of the `products` finds directions in
    /// which the Hessian is large, a third computes its trace in their span exactly, and Hutchinson's estimator uses
    /// the rest for the complement. If few eigenvalues are large, its error falls as the inverse of the number of
    /// products instead of the inverse square root. The standard error is that of the last part. Memory: one vector for
    /// every three products.
    ///
    /// # Errors
    /// [`Error::Argument`] for fewer than three products; [`Error::NotFinite`]; those of the objective.
    pub fn trace_hutch_plus_plus(
        &mut self,
        products: usize,
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Estimate> {
        const OPERATION: &str = "Curvature::trace_hutch_plus_plus";
        let directions = products / 3;
        if directions == 0 {
            let message = format!("{products} products, expected at least 3");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        let mut done = 0;
        let mut report = || {
            done += 1;
            progress(done);
        };
        let mut basis: Vec<Buffer<T>> = Vec::new();
        for probe in 0..directions {
            self.random_signs(seed, probe)?;
            self.multiply()?;
            report();
            let whole = self.product_norm(OPERATION)?;
            // Twice: removing a large component once leaves a rounding error.
            self.take_out(&basis)?;
            self.take_out(&basis)?;
            let left = self.product_norm(OPERATION)?;
            // A product that lies in the span already, up to rounding, adds no direction.
            if left > 1e-5 * whole {
                let mut unit = self.weights.device().zeros(self.weights.len())?;
                let alone = Combination::alone(self.product.view(), self.one.view());
                sharpness::combine(alone, 1.0 / left, false, unit.view_mut(), None)?;
                basis.push(unit);
            }
        }
        let mut inside = 0.0;
        for unit in &basis {
            self.direction.view_mut().copy_from(unit.view())?;
            inside += self.quadratic_form(OPERATION)?;
            report();
        }
        let mut outside = Vec::new();
        for probe in directions..products - directions {
            self.random_signs(seed, probe)?;
            std::mem::swap(&mut self.direction, &mut self.product);
            self.take_out(&basis)?;
            std::mem::swap(&mut self.direction, &mut self.product);
            outside.push(self.quadratic_form(OPERATION)?);
            report();
        }
        let outside = Estimate::of(&outside);
        Ok(Estimate { value: inside + outside.value, ..outside })
    }

    /// Random signs and their product with the Hessian, for probes in order. Two are computed together, which costs
    /// less.
    fn probe(&mut self, seed: u64, probe: usize, probes: usize) -> Result<()> {
        if probe % 2 == 1 {
            self.swap_second();
            return Ok(());
        }
        if probe + 1 == probes {
            self.random_signs(seed, probe)?;
            return self.multiply();
        }
        let [mut second_direction, mut second_product] = match self.second.take() {
            Some(second) => second,
            None => {
                [self.weights.device().zeros(self.weights.len())?, self.weights.device().zeros(self.weights.len())?]
            }
        };
        self.random_signs(seed, probe + 1)?;
        std::mem::swap(&mut self.direction, &mut second_direction);
        self.random_signs(seed, probe)?;
        let Self { objective, weights, direction, product, flag, passes, .. } = self;
        passes.products += 2;
        flag.clear()?;
        product.clear()?;
        second_product.clear()?;
        let directions = [direction.view(), second_direction.view()];
        let products = [product.view_mut(), second_product.view_mut()];
        objective.hessian_vector_pair(*weights, directions, products, flag.view_mut())?;
        self.second = Some([second_direction, second_product]);
        Ok(())
    }

    fn swap_second(&mut self) {
        if let Some([direction, product]) = &mut self.second {
            std::mem::swap(&mut self.direction, direction);
            std::mem::swap(&mut self.product, product);
        }
    }
}

fn check_probes(operation: &'static str, probes: usize) -> Result<()> {
    if probes > 0 {
        return Ok(());
    }
    Err(Error::Argument { operation, message: "0 probes, expected at least 1".into() })
}
