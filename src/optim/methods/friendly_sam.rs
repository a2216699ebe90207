//! Friendly-SAM: SAM whose ascent leaves out the part of the gradient that all mini-batches share (Li et al., "Friendly
//! Sharpness-Aware Minimization", CVPR 2024).

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P};
use crate::optim::{Direction, Entry, Method, Needs, Row, Step, Vector};
use crate::settings;

settings! {
    /// Friendly-SAM: with the moving average `m ← λ m + (1 − λ) g` of the gradients and `d = g − σ m`, follows `g(w + ρ
    /// d/‖d‖)`. The first step has `m = d = g`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct FriendlySam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
        /// Friendly-SAM's weight of the average gradient
        sigma: f64 = 1.0, as "SIGMA", in not_negative;
        /// Friendly-SAM's decay of the average gradient
        lambda: f64 = 0.9, as "LAMBDA", in fraction;
    }
}

/// Friendly-SAM by name.
pub const ENTRY: Entry = Entry::of::<FriendlySam>("friendly-sam", "SAM whose ascent leaves out the average gradient");

/// m. It is zero before the first step, so that d is g there.
const AVERAGE: Vector = Vector::Memory(0);
/// `(1, −σ)` for g and m, and `(λ, 1 − λ)` for m and g.
const DISPLACEMENT: Row = Row::own(0);
const MOVING_AVERAGE: Row = Row::own(1);

impl<T: Scalar> Method<T> for FriendlySam {
    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        let rows = vec![[1.0, -self.sigma, 0.0, 0.0], [self.lambda, 1.0 - self.lambda, 0.0, 0.0]];
        Needs { memory: 1, rows, ..Needs::vectors(3) }
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        step.perturb_along([G0, AVERAGE], DISPLACEMENT, self.rho, P)?;
        step.gradient(P, 1, G1)?;
        // The perturbed point is no longer needed. Its place takes the new average: g itself in the first step.
        step.combine([AVERAGE, G0], MOVING_AVERAGE, P)?;
        step.initialize(G0, P)?;
        step.keep(P, AVERAGE)?;
        Ok(Direction::along(G1))
    }
}
