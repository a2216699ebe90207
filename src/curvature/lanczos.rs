//! Lanczos's method with full reorthogonalisation: the largest eigenvalues with their eigenvectors, and the spectral
//! density.

use nalgebra::{DMatrix, SymmetricEigen};

use super::{Curvature, PURPOSE, multiply};
use crate::device::{Buffer, Error, Result, Scalar};
use crate::kernels::vector::{self, Combination};
use crate::kernels::{random, sharpness};

/// An eigenvalue of the Hessian with its eigenvector.
pub struct Eigenpair<T: Scalar> {
    /// The eigenvalue λ.
    pub value: f64,
    /// `‖Hx − λx‖`. Some eigenvalue lies within this distance of λ.
    pub residual: f64,
    /// The eigenvector x, of length 1.
    pub vector: Buffer<T>,
}

/// A spectral density as Lanczos's method finds it: a sum of peaks, each at a Ritz value.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Density {
    /// The positions of the peaks: Ritz values, at most one for each step of each probe.
    pub nodes: Vec<f64>,
    /// The share of each peak, in the same order. The shares add up to 1.
    pub weights: Vec<f64>,
}

impl Density {
    /// The density at `lambda` if every peak is a normal distribution with standard deviation `sigma`.
    pub fn at(&self, lambda: f64, sigma: f64) -> f64 {
        let scale = 1.0 / (sigma * (2.0 * std::f64::consts::PI).sqrt());
        let peak = |(&node, &weight): (&f64, &f64)| weight * scale * (-0.5 * ((lambda - node) / sigma).powi(2)).exp();
        self.nodes.iter().zip(&self.weights).map(peak).sum()
    }
}

/// An orthonormal basis of a Krylov space, and the tridiagonal matrix of the Hessian in that basis.
struct Krylov<T: Scalar> {
    basis: Vec<Buffer<T>>,
    diagonal: Vec<f64>,
    /// `off_diagonal[j]` couples vectors j and j + 1. The last one couples the space to its complement.
    off_diagonal: Vec<f64>,
}

/// Eigenvalues of the tridiagonal matrix, the largest first, and their eigenvectors as columns.
struct Ritz {
    values: Vec<f64>,
    vectors: DMatrix<f64>,
    order: Vec<usize>,
}

impl<T: Scalar> Krylov<T> {
    fn ritz(&self) -> Ritz {
        let n = self.diagonal.len();
        let matrix = DMatrix::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => self.diagonal[i],
            1 => self.off_diagonal[i.min(j)],
            _ => 0.0,
        });
        let SymmetricEigen { eigenvalues, eigenvectors } = SymmetricEigen::new(matrix);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| eigenvalues[b].total_cmp(&eigenvalues[a]));
        Ritz { values: order.iter().map(|&k| eigenvalues[k]).collect(), vectors: eigenvectors, order }
    }

    /// Whether the Hessian maps the space into itself. Then all Ritz values are eigenvalues.
    fn is_invariant(&self) -> bool {
        let scale = self.diagonal.iter().chain(&self.off_diagonal).fold(0.0f64, |scale, value| scale.max(value.abs()));
        let rounding = if size_of::<T>() == 8 { 1e-12 } else { 1e-5 };
        self.off_diagonal.last().is_some_and(|&left| left <= rounding * scale)
    }
}

impl Ritz {
    /// Component `row` of the eigenvector of eigenvalue number `index`.
    fn component(&self, row: usize, index: usize) -> f64 {
        self.vectors[(row, self.order[index])]
    }
}

impl<T: Scalar> Curvature<'_, T> {
    /// The `count` largest eigenvalues of the Hessian, the largest first, by Lanczos's method with full
    /// reorthogonalisation: one product with the Hessian and one vector of memory per step, and one more product per
    /// eigenvalue for its residual. Stops when each residual is at most `tolerance` times the largest magnitude, or
    /// after `most` steps; check the residuals. Calls `progress` after each step. Returns fewer eigenvalues if the
    /// Hessian has fewer distinct ones.
    ///
    /// # Errors
    /// [`Error::Argument`] for a count of zero or beyond `most`; [`Error::NotFinite`]; those of the objective.
    pub fn top_eigenvalues(
        &mut self,
        count: usize,
        (most, tolerance): (usize, f64),
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Eigenpair<T>>> {
        const OPERATION: &str = "Curvature::top_eigenvalues";
        if count == 0 || count > most {
            let message = format!("{count} eigenvalues in {most} steps, expected at least 1, and as many steps");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        random::normal(self.direction.view_mut(), random::key(seed, PURPOSE), 0)?;
        let krylov = self.krylov(most, |krylov| {
            let steps = krylov.diagonal.len();
            progress(steps);
            // Solve the small eigenvalue problem in every fifth step only.
            if steps < count || !steps.is_multiple_of(5) {
                return false;
            }
            let (ritz, left) = (krylov.ritz(), krylov.off_diagonal[steps - 1]);
            let scale = ritz.values.iter().fold(0.0f64, |scale, value| scale.max(value.abs()));
            (0..count).all(|k| (left * ritz.component(steps - 1, k)).abs() <= tolerance * scale)
        })?;
        let ritz = krylov.ritz();
        let mut pairs = Vec::new();
        for index in 0..count.min(ritz.values.len()) {
            let mut vector = self.weights.device().zeros(self.weights.len())?;
            for (row, basis) in krylov.basis.iter().take(ritz.values.len()).enumerate() {
                vector::axpy(ritz.component(row, index), basis.view(), vector.view_mut())?;
            }
            let value = ritz.values[index];
            let into = (&mut self.product, &mut self.flag, &mut self.passes);
            multiply(self.objective, self.weights, vector.view(), into)?;
            vector::axpy(-value, vector.view(), self.product.view_mut())?;
            let residual = self.product_norm(OPERATION)?;
            pairs.push(Eigenpair { value, residual, vector });
        }
        Ok(pairs)
    }

    /// The density of the Hessian's eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017). Each of
    /// `probes` vectors of random signs gives the Ritz values after `steps` steps, each weighted by the squared first
    /// component of its eigenvector. Takes `probes · steps` products with the Hessian and `steps` vectors of memory.
    /// The moments up to `2 · steps − 1` of every probe are exact. Calls `progress` after each product.
    ///
    /// # Errors
    /// [`Error::Argument`] for zero probes or zero steps; [`Error::NotFinite`]; those of the objective.
    pub fn spectral_density(
        &mut self,
        probes: usize,
        steps: usize,
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Density> {
        if probes == 0 || steps == 0 {
            let message = format!("{probes} probes of {steps} steps, expected at least 1 of each");
            return Err(Error::Argument { operation: "Curvature::spectral_density", message });
        }
        let mut density = Density::default();
        for probe in 0..probes {
            self.random_signs(seed, probe)?;
            let krylov = self.krylov(steps, |krylov| {
                progress(probe * steps + krylov.diagonal.len());
                false
            })?;
            let ritz = krylov.ritz();
            for (index, &value) in ritz.values.iter().enumerate() {
                density.nodes.push(value);
                density.weights.push(ritz.component(0, index).powi(2) / probes as f64);
            }
        }
        Ok(density)
    }

    /// Lanczos's steps, starting from the direction: at most `most`, and until `enough` returns true.
    fn krylov(&mut self, most: usize, mut enough: impl FnMut(&Krylov<T>) -> bool) -> Result<Krylov<T>> {
        const OPERATION: &str = "Lanczos's method";
        let device = self.weights.device().clone();
        // The padding between tensors is not part of a direction. Once zero, it stays zero.
        self.clear_padding()?;
        self.product.view_mut().copy_from(self.direction.view())?;
        let mut length = self.product_norm(OPERATION)?;
        let mut krylov = Krylov { basis: Vec::new(), diagonal: Vec::new(), off_diagonal: Vec::new() };
        while length > 0.0 && krylov.basis.len() < most.min(self.weights.len()) {
            let mut newest = device.zeros(self.weights.len())?;
            let left = Combination::alone(self.product.view(), self.one.view());
            sharpness::combine(left, 1.0 / length, false, newest.view_mut(), None)?;
            let into = (&mut self.product, &mut self.flag, &mut self.passes);
            multiply(self.objective, self.weights, newest.view(), into)?;
            vector::dot(newest.view(), self.product.view(), &mut self.reduction, self.number.view_mut())?;
            krylov.diagonal.push(self.finite_number(OPERATION)?);
            krylov.basis.push(newest);
            // Orthogonalise against all of them twice: removing a large component once leaves a rounding error.
            for _ in 0..2 {
                self.take_out(krylov.basis.iter().rev())?;
            }
            length = self.product_norm(OPERATION)?;
            krylov.off_diagonal.push(length);
            if krylov.is_invariant() || enough(&krylov) {
                break;
            }
        }
        Ok(krylov)
    }
}
