//! SAMPa: SAM whose two gradients do not depend on each other (Xie, Pethick, Cevher, "SAMPa: Sharpness-aware
//! Minimization Parallelized", NeurIPS 2024, algorithm 1).
//!
//! The ascent follows the gradient of the step before, taken ahead of the weights, at y. So a step takes its two
//! gradients at the same time: at the perturbed point on the mini-batch of the ascent's gradient, which is the one
//! before, and at the next y on its own. The authors' code (`train.py` of github.com/LIONS-EPFL/SAMPa) has the same
//! order of mini-batches. Its y also takes momentum and weight decay into account; here it is that of the paper.

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P, Q};
use crate::optim::{Coefficients, Direction, Entry, Method, Needs, Row, Step, Vector};
use crate::settings;

settings! {
    /// SAMPa: with the gradient k that the step before has taken at its y, follows `(1 − λ) g(w + ρ k/‖k‖) + λ g(y)`,
    /// `y = w − η k`, and keeps `g(y)`. The first gradient is that of the mini-batch before. The first step follows `g`
    /// and keeps it.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Sampa {
        /// Radius of the perturbation
        rho: f64 = 0.1, as "RHO", in not_negative;
        /// SAMPa's weight of the gradient at y
        lambda: f64 = 0.2, as "LAMBDA", in fraction;
    }
}

/// SAMPa by name.
pub const ENTRY: Entry = Entry::of::<Sampa>("sampa", "SAM with two gradients that can run at the same time");

/// k.
const KEPT: Vector = Vector::Memory(0);
/// `1 − λ` and `λ`.
const SHARES: Row = Row::own(0);

impl<T: Scalar> Method<T> for Sampa {
    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs { memory: 1, rows: vec![[1.0 - self.lambda, self.lambda, 0.0, 0.0]], ..Needs::vectors(4) }
    }

    /// The point y depends on the learning rate.
    fn needs_base(&self) -> bool {
        true
    }

    fn keeps_batch(&self) -> bool {
        true
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        if step.attempts == 0 {
            step.gradient_at_weights()?;
            step.keep(G0, KEPT)?;
            step.keep_batch()?;
            return Ok(Direction::along(G0));
        }
        step.norm(KEPT, 1)?;
        step.perturb(Vector::Weights, KEPT, 1, self.rho, P, None)?;
        step.descend(KEPT, Q)?;
        step.gradient_across([Q, P], [G0, G1])?;
        step.norm(G0, 0)?;
        step.keep(G0, KEPT)?;
        step.keep_batch()?;
        Ok(Direction::new([G1, G0], Coefficients::Known(SHARES)))
    }
}
