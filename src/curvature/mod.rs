//! Curvature of a loss at given weights, measured through an [`Objective`]. The Hessian is used only through its
//! products with vectors; it is never stored.
//!
//! ```
//! use polder::Device;
//! use polder::curvature::Curvature;
//! use polder::device::Result;
//! use polder::objective::{Domain, Objective, Pass};
//!
//! /// ½(w_0² + 3 w_1²).
//! struct Valley;
//!
//! impl Objective<f32> for Valley {
//!     fn domain(&self) -> Domain<'_> {
//!         Domain::of_len(2)
//!     }
//!
//!     fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
//!         match pass {
//!             Pass::Gradient { weights, mut gradient, mut loss, .. } => {
//!                 let w = weights.to_vec()?;
//!                 loss.write(&[f64::from(0.5 * (w[0] * w[0] + 3.0 * w[1] * w[1]))])?;
//!                 gradient.write(&[w[0], 3.0 * w[1]])
//!             }
//!             Pass::HessianVector { direction, mut product, .. } => {
//!                 let d = direction.to_vec()?;
//!                 product.write(&[d[0], 3.0 * d[1]])
//!             }
//!             other => other.split(self),
//!         }
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let weights = Device::host().upload(&[4.0f32, 1.0])?;
//! let mut valley = Valley;
//! let mut curvature = Curvature::new(&mut valley, weights.view())?;
//! assert_eq!(curvature.gradient_norm()?, 5.0);
//! let trace = curvature.trace(10, 0, |_| ())?;
//! assert_eq!((trace.value, trace.standard_error), (4.0, Some(0.0)));
//!
//! // Eigenvalues, each with an eigenvector and a residual; then the rise of the loss within 0.5 of these weights.
//! let largest = &curvature.top_eigenvalues(2, (2, 1e-6), 0, |_| ())?[0];
//! assert!((largest.value - 3.0).abs() < 1e-6 && largest.residual < 1e-5);
//! let rise = curvature.rise(0.5, 20, 0)?;
//! assert!(rise.one_step > 0.0 && rise.largest >= rise.one_step);
//! assert_eq!(curvature.passes().products, 10 + 2 + 2);
//! # Ok(())
//! # }
//! ```

mod filter_normalized;
mod lanczos;
mod neighbourhood;
mod power;
mod trace;

pub use filter_normalized::filter_normalized;
pub use lanczos::{Density, Eigenpair};
pub use neighbourhood::{Difference, Extrema, Rise};

use crate::device::{Buffer, Error, Result, Scalar, Slice};
use crate::kernels::random;
use crate::kernels::vector::{self, Reduction};
pub use crate::objective::Passes;
use crate::objective::{Objective, ObjectiveExt, RunningStats};

/// Purpose of the key of random directions. It makes them independent of initial weights that were drawn from the same
/// seed.
const PURPOSE: &[u8; 8] = b"curvatur";

/// A mean over random probes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// The standard error of the mean: the probes' standard deviation over the square root of their number. A single
    /// probe has none.
    pub standard_error: Option<f64>,
    /// The number of probes.
    pub probes: usize,
}

impl Estimate {
    /// The mean of these samples, with its standard error. The mean of no samples is NaN.
    pub fn of(samples: &[f64]) -> Self {
        let count = samples.len() as f64;
        let value = samples.iter().sum::<f64>() / count;
        let squares: f64 = samples.iter().map(|sample| (sample - value).powi(2)).sum();
        let standard_error = (samples.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt());
        Self { value, standard_error, probes: samples.len() }
    }

    /// The mean divided by a number that is known exactly.
    #[must_use]
    pub fn over(self, divisor: f64) -> Self {
        let standard_error = self.standard_error.map(|error| error / divisor.abs());
        Self { value: self.value / divisor, standard_error, ..self }
    }
}

/// Measures an objective's curvature at given weights. All its vectors are as long as the weights, padding between
/// tensors included, which stays zero. It holds two, and two more from the first trace on.
pub struct Curvature<'a, T: Scalar> {
    objective: &'a mut dyn Objective<T>,
    weights: Slice<'a, T>,
    direction: Buffer<T>,
    product: Buffer<T>,
    /// Direction and product of the second probe of a pair.
    second: Option<[Buffer<T>; 2]>,
    number: Buffer<f64>,
    /// The coefficients (1, 0, 0, 0), for a combination of a single vector.
    one: Buffer<f64>,
    flag: Buffer<u32>,
    reduction: Reduction,
    passes: Passes,
    losses: u64,
}

impl<'a, T: Scalar> Curvature<'a, T> {
    /// Prepares to measure `objective` at `weights`.
    ///
    /// # Errors
    /// [`Error::Length`] for weights of another length than the objective's; [`Error::Argument`] for an objective of
    /// several groups, of which an [`Accumulator`](crate::objective::Accumulator) makes one; those of the allocation.
    pub fn new(objective: &'a mut dyn Objective<T>, weights: Slice<'a, T>) -> Result<Self> {
        const OPERATION: &str = "Curvature::new";
        crate::kernels::check_length(OPERATION, "weights", weights.len(), objective.len())?;
        let groups = objective.domain().groups;
        if groups > 1 {
            let message = format!("{groups} groups, expected one; an Accumulator combines several");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        objective.select(0)?;
        let device = weights.device();
        let (direction, product) = (device.zeros(weights.len())?, device.zeros(weights.len())?);
        let (number, flag, reduction) = (device.zeros(1)?, device.zeros(1)?, Reduction::new(device)?);
        let one = device.upload(&[1.0, 0.0, 0.0, 0.0])?;
        let passes = Passes::default();
        Ok(Self {
            objective,
            weights,
            direction,
            product,
            second: None,
            number,
            one,
            flag,
            reduction,
            passes,
            losses: 0,
        })
    }

    /// Gradients and products so far.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Losses without their gradients so far. Each costs a third of a gradient.
    pub fn losses(&self) -> u64 {
        self.losses
    }

    /// `‖∇L(w)‖`. One gradient.
    ///
    /// # Errors
    /// [`Error::NotFinite`]; those of the objective.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        self.gradient()?;
        self.product_norm("Curvature::gradient_norm")
    }

    /// `vᵀHv` with `v = ∇L/‖∇L‖`: the curvature that a step of SAM meets. One gradient and one product with the
    /// Hessian.
    ///
    /// # Errors
    /// [`Error::ZeroGradient`], [`Error::NotFinite`]; those of the objective.
    pub fn along_gradient(&mut self) -> Result<f64> {
        const OPERATION: &str = "Curvature::along_gradient";
        self.gradient()?;
        let norm = self.product_norm(OPERATION)?;
        if norm == 0.0 {
            return Err(Error::ZeroGradient { operation: OPERATION });
        }
        self.direction.view_mut().copy_from(self.product.view())?;
        Ok(self.quadratic_form(OPERATION)? / (norm * norm))
    }

    /// Sets the direction to zero in the padding.
    fn clear_padding(&mut self) -> Result<()> {
        for gap in self.objective.domain().padding.iter().cloned() {
            self.direction.slice_mut(gap)?.clear()?;
        }
        Ok(())
    }

    /// Fills the direction with random signs, those of probe number `probe`.
    fn random_signs(&mut self, seed: u64, probe: usize) -> Result<()> {
        let first = probe * self.weights.len().next_multiple_of(4);
        random::rademacher(self.direction.view_mut(), random::key(seed, PURPOSE), first as u64)
    }

    /// Writes the gradient at the weights to `product`.
    fn gradient(&mut self) -> Result<()> {
        self.gradient_at(self.weights)
    }

    /// Writes the loss at a point to `number` and the gradient to `product`.
    fn gradient_at(&mut self, point: Slice<'_, T>) -> Result<()> {
        let Self { objective, product, number, flag, passes, .. } = self;
        flag.clear()?;
        product.clear()?;
        passes.gradients += 1;
        objective.gradient(point, RunningStats::Keep, product.view_mut(), number.view_mut(), flag.view_mut())
    }

    /// The loss at a point, without its gradient. Overwrites `product`.
    fn loss_alone(&mut self, point: Slice<'_, T>) -> Result<f64> {
        let Self { objective, product, number, flag, losses, .. } = self;
        flag.clear()?;
        *losses += 1;
        objective.loss(point, product.view_mut(), number.view_mut(), flag.view_mut())?;
        self.finite_number("Curvature")
    }

    /// Writes the product of the Hessian at the weights with the direction to `product`.
    fn multiply(&mut self) -> Result<()> {
        let Self { objective, weights, direction, product, flag, passes, .. } = self;
        multiply(*objective, *weights, direction.view(), (product, flag, passes))
    }

    /// dᵀHd of the direction d.
    fn quadratic_form(&mut self, operation: &'static str) -> Result<f64> {
        self.multiply()?;
        vector::dot(self.direction.view(), self.product.view(), &mut self.reduction, self.number.view_mut())?;
        self.finite_number(operation)
    }

    /// Makes the product orthogonal to these orthonormal vectors, one after the other.
    fn take_out<'b>(&mut self, basis: impl IntoIterator<Item = &'b Buffer<T>>) -> Result<()> {
        for unit in basis {
            vector::dot(unit.view(), self.product.view(), &mut self.reduction, self.number.view_mut())?;
            let along = self.finite_number("Curvature")?;
            vector::axpy(-along, unit.view(), self.product.view_mut())?;
        }
        Ok(())
    }

    /// The norm of the product.
    fn product_norm(&mut self, operation: &'static str) -> Result<f64> {
        vector::l2_norm(self.product.view(), &mut self.reduction, self.number.view_mut())?;
        self.finite_number(operation)
    }

    /// Reads `number`. Fails if it, or what it was computed from, is not finite.
    fn finite_number(&self, operation: &'static str) -> Result<f64> {
        let (mut value, mut flag) = ([0.0], [0]);
        self.number.read(&mut value)?;
        self.flag.read(&mut flag)?;
        if flag[0] != 0 || !value[0].is_finite() {
            return Err(Error::NotFinite { operation });
        }
        Ok(value[0])
    }
}

/// Writes the product of the Hessian with a vector.
fn multiply<T: Scalar>(
    objective: &mut dyn Objective<T>,
    weights: Slice<'_, T>,
    vector: Slice<'_, T>,
    (product, flag, passes): (&mut Buffer<T>, &mut Buffer<u32>, &mut Passes),
) -> Result<()> {
    passes.products += 1;
    flag.clear()?;
    // An objective does not write the padding between its tensors, so it must be zero before.
    product.clear()?;
    objective.hessian_vector(weights, vector, product.view_mut(), flag.view_mut())
}
