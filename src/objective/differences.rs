//! Products with the Hessian for an objective that has gradients alone.

use super::{Answer, Displacement, Objective, ObjectiveExt, Pass, Wrapper};
use crate::device::{Buffer, Device, Error, Result, Scalar};
use crate::kernels::sharpness;
use crate::kernels::vector::{self, Combination, Reduction};

/// Answers products with the Hessian with central differences of gradients, `‖d‖ (g(w + s d/‖d‖) − g(w − s d/‖d‖))/2s`,
/// of two gradients each. Every other pass reaches the objective inside as it is.
///
/// Without rounding the error is about `‖d‖ s²/6` times the third derivative of the gradient along `d/‖d‖`. Rounding
/// adds about `‖d‖ ε (‖g‖ + ‖H‖ ‖w‖)/s`, where ε is 1e-7 for `f32` and 2e-16 for `f64`. A good s lies near `ε^⅓ ‖w‖`:
/// 5e-3 ‖w‖ for `f32`, 6e-6 ‖w‖ for `f64`. Where the gradient has kinks, as in a ReLU network, no s makes the error
/// small.
///
/// It holds four vectors as long as the weights. A product moves 52 B per parameter beside its gradients.
pub struct Differences<'a, T: Scalar> {
    objective: &'a mut dyn Objective<T>,
    step: f64,
    points: [Buffer<T>; 2],
    gradients: [Buffer<T>; 2],
    losses: [Buffer<f64>; 2],
    /// The norm of the direction; then three numbers that are not used.
    norm: Buffer<f64>,
    reduction: Reduction,
}

impl<'a, T: Scalar> Differences<'a, T> {
    /// Differences between points at the distance `step` from the weights.
    ///
    /// # Errors
    /// [`Error::Argument`] for a step that is not finite and above 0, and those of the allocation.
    pub fn new(device: &Device, objective: &'a mut dyn Objective<T>, step: f64) -> Result<Self> {
        if !(step > 0.0 && step.is_finite()) {
            let message = format!("a step of {step}, expected a finite number above 0");
            return Err(Error::Argument { operation: "Differences::new", message });
        }
        let len = objective.len();
        Ok(Self {
            objective,
            step,
            points: [device.zeros(len)?, device.zeros(len)?],
            gradients: [device.zeros(len)?, device.zeros(len)?],
            losses: [device.zeros(1)?, device.zeros(1)?],
            norm: device.zeros(4)?,
            reduction: Reduction::new(device)?,
        })
    }
}

impl<T: Scalar> Wrapper<T> for Differences<'_, T> {
    fn inner(&self) -> &dyn Objective<T> {
        self.objective
    }

    fn inner_mut(&mut self) -> &mut dyn Objective<T> {
        self.objective
    }

    fn answer<'p>(&mut self, pass: Pass<'p, T>) -> Result<Answer<'p, T>> {
        let (weights, direction, mut product, mut flag) = match pass {
            Pass::HessianVector { weights, direction, product, flag } => (weights, direction, product, flag),
            Pass::HessianVectorPair { .. } => return Ok(Answer::Split(pass)),
            other => return Ok(Answer::Forward(other)),
        };
        let Self { objective, step, points, gradients, losses, norm, reduction } = self;
        vector::l2_norm(direction, reduction, norm.slice_mut(0..1)?)?;
        let displacement = Displacement { from: weights, along: direction, norm: norm.slice(0..1)?, rho: *step };
        objective.pass(Pass::GradientPairDisplaced {
            displacement,
            points: points.each_mut().map(Buffer::view_mut),
            gradients: gradients.each_mut().map(Buffer::view_mut),
            losses: losses.each_mut().map(Buffer::view_mut),
            flag: flag.reborrow(),
        })?;
        // The difference comes first: of the scaled gradients it would lose digits.
        let [plus, minus] = gradients;
        vector::axpy(-1.0, minus.view(), plus.view_mut())?;
        let difference = Combination { vectors: [Some(plus.view()), None, None, None], coefficients: norm.view() };
        sharpness::combine(difference, 0.5 / *step, false, product.reborrow(), None)?;
        vector::check_finite(product.view(), flag)?;
        Ok(Answer::Done)
    }
}
