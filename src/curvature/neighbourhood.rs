//! The loss around the weights: its rise within a ball, the largest gradient there, and its extrema along random lines.

use super::{Curvature, PURPOSE, multiply};
use crate::device::{Error, Result, Scalar, Slice};
use crate::kernels::vector::{self, Combination};
use crate::kernels::{random, sharpness};

/// A gradient of at most this norm has no usable direction. An ascent takes a random direction instead.
const STATIONARY: f64 = 1e-12;

/// The rise of the loss above `L(w)` within the ball of radius ρ around w.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rise {
    /// `L(w + ρv) − L(w)` with v = ∇L/‖∇L‖: SAM's estimate. 0 if the gradient vanishes.
    pub one_step: f64,
    /// The largest rise that was found, by one step or by several.
    pub largest: f64,
}

impl Rise {
    /// The share of the rise that one step finds: CR-SAM's approximation ratio, at most 1. None if the loss does not
    /// rise.
    pub fn approximation_ratio(&self) -> Option<f64> {
        (self.largest > 0.0).then(|| self.one_step / self.largest)
    }
}

/// The numbers of local minima and maxima of the loss at the inner points of each of several lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extrema {
    /// Minima, by line.
    pub minima: Vec<usize>,
    /// Maxima, by line.
    pub maxima: Vec<usize>,
}

/// `A/ρ²`, and its error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The curvature along the gradient over the distance ρ.
    pub value: f64,
    /// How far the rounding of the losses may have moved it.
    pub rounding_error: f64,
}

impl<T: Scalar> Curvature<'_, T> {
    /// `(L(w + ρv) + L(w − ρv) − 2 L(w))/ρ²` with v = ∇L/‖∇L‖: the curvature along the gradient over the distance ρ, as
    /// CR-SAM estimates it. [`Curvature::along_gradient`] is its value at w itself. One gradient and two losses. The
    /// losses cancel: each has an error of some units in the last place of its samples' losses.
    ///
    /// # Errors
    /// [`Error::Argument`] for a ρ that is not a finite number above 0; [`Error::ZeroGradient`], [`Error::NotFinite`];
    /// those of the objective.
    pub fn along_gradient_by_difference(&mut self, rho: f64) -> Result<Difference> {
        const OPERATION: &str = "Curvature::along_gradient_by_difference";
        check_rho(OPERATION, rho)?;
        let middle = self.loss_at(self.weights)?;
        let norm = self.product_norm(OPERATION)?;
        if norm <= STATIONARY {
            return Err(Error::ZeroGradient { operation: OPERATION });
        }
        self.direction.view_mut().copy_from(self.product.view())?;
        let mut point = self.weights.device().zeros(self.weights.len())?;
        let (mut sum, mut largest) = (0.0, middle.abs());
        for side in [rho, -rho] {
            point.view_mut().copy_from(self.weights)?;
            vector::axpy(side / norm, self.direction.view(), point.view_mut())?;
            let loss = self.loss_alone(point.view())?;
            (sum, largest) = (sum + loss - middle, largest.max(loss.abs()));
        }
        // A is a sum of four losses.
        let rounding_error = 4.0 * loss_error::<T>() * largest / (rho * rho);
        Ok(Difference { value: sum / (rho * rho), rounding_error })
    }

    /// The rise of the loss within the ball of radius ρ: after one step along the gradient (Foret et al. 2021), and at
    /// the highest point of `steps` steps of projected ascent, whose lengths fall from 4ρ/steps to zero (CR-SAM's
    /// section 3 takes 20). `steps` + 2 gradients and a loss. If the gradient vanishes, the ascent begins in a random
    /// direction, drawn from `seed`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a ρ that is not a finite number above 0; [`Error::NotFinite`]; those of the objective.
    pub fn rise(&mut self, rho: f64, steps: usize, seed: u64) -> Result<Rise> {
        const OPERATION: &str = "Curvature::rise";
        check_rho(OPERATION, rho)?;
        let start = self.loss_at(self.weights)?;
        let norm = self.product_norm(OPERATION)?;
        let mut one_step = 0.0;
        if norm > STATIONARY {
            let mut point = self.weights.device().zeros(self.weights.len())?;
            point.view_mut().copy_from(self.weights)?;
            vector::axpy(rho / norm, self.product.view(), point.view_mut())?;
            one_step = self.loss_alone(point.view())? - start;
        }
        let highest = self.ascend((rho, steps, seed), |curvature, point| curvature.loss_at(point))?;
        Ok(Rise { one_step, largest: (highest - start).max(one_step) })
    }

    /// `ρ · max ‖∇L(w + ε)‖` over ‖ε‖ ≤ ρ, GNR's bound of the sharpness (its section 2.3). The maximum is taken over
    /// `steps` steps of projected ascent as in [`Curvature::rise`], along `H∇L`, the direction in which the norm grows.
    /// `steps` + 1 gradients and products with the Hessian.
    ///
    /// # Errors
    /// As [`Curvature::rise`].
    pub fn steepest(&mut self, rho: f64, steps: usize, seed: u64) -> Result<f64> {
        const OPERATION: &str = "Curvature::steepest";
        check_rho(OPERATION, rho)?;
        let steepest = self.ascend((rho, steps, seed), |curvature, point| {
            curvature.loss_at(point)?;
            let norm = curvature.product_norm(OPERATION)?;
            let Curvature { objective, direction, product, flag, passes, .. } = curvature;
            direction.view_mut().copy_from(product.view())?;
            multiply(*objective, point, direction.view(), (product, flag, passes))?;
            Ok(norm)
        })?;
        Ok(rho * steepest)
    }

    /// The numbers of local minima and maxima of the loss at the inner points of lines from w in random directions:
    /// `directions` lines of `steps` steps of this length (GNR's section 3.1 has 100, 10 and 0.01). One loss per point,
    /// without its gradient where the objective can. Calls `progress` after each line.
    ///
    /// # Errors
    /// [`Error::Argument`] for zero directions; [`Error::NotFinite`]; those of the objective.
    pub fn extrema(
        &mut self,
        directions: usize,
        (steps, length): (usize, f64),
        seed: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Extrema> {
        const OPERATION: &str = "Curvature::extrema";
        if directions == 0 {
            return Err(Error::Argument { operation: OPERATION, message: "0 directions, expected at least 1".into() });
        }
        let start = self.loss_alone(self.weights)?;
        let mut point = self.weights.device().zeros(self.weights.len())?;
        let mut found = Extrema { minima: Vec::new(), maxima: Vec::new() };
        for line in 0..directions {
            let norm = self.random_direction(seed, line)?;
            let mut losses = vec![start];
            for step in 1..=steps {
                point.view_mut().copy_from(self.weights)?;
                vector::axpy(step as f64 * length / norm, self.direction.view(), point.view_mut())?;
                losses.push(self.loss_alone(point.view())?);
            }
            let inner = |sign: f64| {
                let above = |of: &[f64]| sign * of[1] > sign * of[0] && sign * of[1] > sign * of[2];
                losses.windows(3).filter(|of| above(of)).count()
            };
            found.minima.push(inner(-1.0));
            found.maxima.push(inner(1.0));
            progress(line + 1);
        }
        Ok(found)
    }

    /// The loss at a point. Writes its gradient to `product`.
    fn loss_at(&mut self, point: Slice<'_, T>) -> Result<f64> {
        self.gradient_at(point)?;
        self.finite_number("Curvature")
    }

    /// Fills the direction with normal numbers and returns its length.
    fn random_direction(&mut self, seed: u64, number: usize) -> Result<f64> {
        let first = number * self.weights.len().next_multiple_of(4);
        random::normal(self.direction.view_mut(), random::key(seed, PURPOSE), first as u64)?;
        self.clear_padding()?;
        vector::l2_norm(self.direction.view(), &mut self.reduction, self.number.view_mut())?;
        self.finite_number("Curvature")
    }

    /// Ascends from w within the ball of radius ρ and returns the highest value. `uphill` returns the value at a point
    /// and writes the direction of ascent there to `product`.
    fn ascend(
        &mut self,
        (rho, steps, seed): (f64, usize, u64),
        mut uphill: impl FnMut(&mut Self, Slice<'_, T>) -> Result<f64>,
    ) -> Result<f64> {
        let (device, len) = (self.weights.device().clone(), self.weights.len());
        let (mut point, mut displacement) = (device.zeros(len)?, device.zeros(len)?);
        let mut highest = uphill(self, self.weights)?;
        for step in 0..steps {
            let length = 4.0 * rho / steps as f64 * (1.0 - step as f64 / steps as f64);
            vector::l2_norm(self.product.view(), &mut self.reduction, self.number.view_mut())?;
            let norm = self.finite_number("Curvature")?;
            if norm > STATIONARY {
                vector::axpy(length / norm, self.product.view(), displacement.view_mut())?;
            } else {
                let norm = self.random_direction(seed, step)?;
                vector::axpy(length / norm, self.direction.view(), displacement.view_mut())?;
            }
            vector::l2_norm(displacement.view(), &mut self.reduction, self.number.view_mut())?;
            let from_centre = self.finite_number("Curvature")?;
            if from_centre > rho {
                let alone = Combination::alone(displacement.view(), self.one.view());
                sharpness::combine(alone, rho / from_centre, false, self.product.view_mut(), None)?;
                displacement.view_mut().copy_from(self.product.view())?;
            }
            point.view_mut().copy_from(self.weights)?;
            vector::axpy(1.0, displacement.view(), point.view_mut())?;
            highest = highest.max(uphill(self, point.view())?);
        }
        Ok(highest)
    }
}

/// The relative error of a loss: in the last place of the losses of its samples.
fn loss_error<T: Scalar>() -> f64 {
    if size_of::<T>() == 8 { 2e-16 } else { 1e-7 }
}

fn check_rho(operation: &'static str, rho: f64) -> Result<()> {
    if rho.is_finite() && rho > 0.0 {
        return Ok(());
    }
    Err(Error::Argument { operation, message: format!("a radius of {rho}, expected a finite number above 0") })
}
