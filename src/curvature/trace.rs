//! The trace of the Hessian: as a whole, by parts of the weights, and with most of its variance taken out.

use std::ops::Range;

use super::{Curvature, Estimate};
use crate::device::{Buffer, Error, Result, Scalar};
use crate::kernels::sharpness;
use crate::kernels::vector::{self, Combination};

impl<T: Scalar> Curvature<'_, T> {
    /// The trace of the Hessian by Hutchinson's estimator (1990): the mean of `vᵀHv` over vectors v of random signs, whose expected
    /// value it is and whose variance is `2 Σ_{i≠j} h_ij²`. One product with the Hessian per probe, two at a time, whatever their
    /// number in the same memory; `progress` is told of them. Probe p is drawn from `seed` and p alone, so more probes go on where fewer ended.
    ///
    /// # Errors
    /// [`Error::Argument`] for no probe; [`Error::NotFinite`]; those of the objective.
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

    /// The traces of the Hessian's diagonal blocks: of each of these parts of the weights. By Hutchinson's estimator with the
    /// probes of [`Curvature::trace`], whose products each serve all parts.
    ///
    /// # Errors
    /// As [`Curvature::trace`], and [`Error::Range`] for a part that is none.
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

    /// The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021): a third of the `products` finds directions in which the
    /// Hessian is large, a third its trace there, exactly, and Hutchinson's estimator takes the rest for what is left. Its
    /// error falls as the inverse of the products instead of their root where few eigenvalues are large. The standard error is
    /// that of the last part. Memory: a vector for each three products.
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
        let mut tell = || {
            done += 1;
            progress(done);
        };
        let mut basis: Vec<Buffer<T>> = Vec::new();
        for probe in 0..directions {
            self.random_signs(seed, probe)?;
            self.multiply()?;
            tell();
            let whole = self.product_norm(OPERATION)?;
            // Twice: once leaves what rounding makes of a large part that is taken out.
            self.take_out(&basis)?;
            self.take_out(&basis)?;
            let left = self.product_norm(OPERATION)?;
            // What lies in the space already, but for rounding, is no new direction.
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
            tell();
        }
        let mut outside = Vec::new();
        for probe in directions..products - directions {
            self.random_signs(seed, probe)?;
            std::mem::swap(&mut self.direction, &mut self.product);
            self.take_out(&basis)?;
            std::mem::swap(&mut self.direction, &mut self.product);
            outside.push(self.quadratic_form(OPERATION)?);
            tell();
        }
        let outside = Estimate::of(&outside);
        Ok(Estimate { value: inside + outside.value, ..outside })
    }

    /// Random signs and their product, for probe after probe from the first on: two are taken at once, which costs less.
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
    Err(Error::Argument { operation, message: "no probe".into() })
}
