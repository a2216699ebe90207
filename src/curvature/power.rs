//! Power iteration with deflation: eigenvalues one after the other, with one vector of memory for each.

use super::{Curvature, Eigenpair, PURPOSE};
use crate::device::{Buffer, Error, Result, Scalar};
use crate::kernels::vector::{self, Combination};
use crate::kernels::{random, sharpness};

impl<T: Scalar> Curvature<'_, T> {
    /// The `count` eigenvalues of the Hessian that are largest in magnitude, the largest first, by power iteration.
    /// Each vector is multiplied until its residual is at most `tolerance` times the eigenvalue's magnitude, or `most`
    /// times; the vectors that follow are kept orthogonal to it. It needs one vector of memory per eigenvalue, where
    /// [`Curvature::top_eigenvalues`] needs one per step, but many more products: each reduces the error by λ2/λ1.
    /// Calls `progress` after each product. Returns fewer eigenvalues if the others are zero.
    ///
    /// # Errors
    /// [`Error::Argument`] for a count or `most` of zero; [`Error::NotFinite`]; those of the objective.
    pub fn power_iteration(
        &mut self,
        count: usize,
        (most, tolerance): (usize, f64),
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Eigenpair<T>>> {
        const OPERATION: &str = "Curvature::power_iteration";
        if count == 0 || most == 0 {
            let message = format!("{count} eigenvalues of {most} products each, expected at least 1 of each");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        fn found<T: Scalar>(pairs: &[Eigenpair<T>]) -> impl Iterator<Item = &Buffer<T>> {
            pairs.iter().map(|pair| &pair.vector)
        }
        let mut pairs: Vec<Eigenpair<T>> = Vec::new();
        for index in 0..count {
            let first = index * self.weights.len().next_multiple_of(4);
            random::normal(self.direction.view_mut(), random::key(seed, PURPOSE), first as u64)?;
            self.clear_padding()?;
            self.product.view_mut().copy_from(self.direction.view())?;
            let mut value = 0.0;
            for step in 1..=most {
                // The next vector is the newest product without its components along the vectors found already. Twice:
                // removing a large component once leaves a rounding error.
                self.take_out(found(&pairs).chain(found(&pairs)))?;
                let length = self.product_norm(OPERATION)?;
                if length == 0.0 {
                    return Ok(pairs);
                }
                let alone = Combination::alone(self.product.view(), self.one.view());
                sharpness::combine(alone, 1.0 / length, false, self.direction.view_mut(), None)?;
                value = self.quadratic_form(OPERATION)?;
                progress(index * most + step);
                self.take_out(found(&pairs).chain(found(&pairs)))?;
                vector::axpy(-value, self.direction.view(), self.product.view_mut())?;
                if self.product_norm(OPERATION)? <= tolerance * value.abs() {
                    break;
                }
                vector::axpy(value, self.direction.view(), self.product.view_mut())?;
            }
            if value == 0.0 {
                return Ok(pairs);
            }
            // The residual is that of the whole Hessian, not of the deflated one.
            self.multiply()?;
            vector::axpy(-value, self.direction.view(), self.product.view_mut())?;
            let residual = self.product_norm(OPERATION)?;
            let mut vector: Buffer<T> = self.weights.device().zeros(self.weights.len())?;
            vector.view_mut().copy_from(self.direction.view())?;
            pairs.push(Eigenpair { value, residual, vector });
        }
        Ok(pairs)
    }
}
