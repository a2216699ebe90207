//! GSAM: `g₊ − α g⊥`, g⊥ the part of the gradient at `w` that is orthogonal to `g₊` (Zhuang, Gong, Yuan, Cui, Adam,
//! Dvornek, Tatikonda, Duncan, Liu, "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022).

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1};
use crate::optim::{Direction, Entry, Method, Needs, Row, Step, Vector};
use crate::settings;

settings! {
    /// GSAM: follows `g₊ − α g⊥` with `g₊ = g(w + ρ g/‖g‖)`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Gsam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
        /// Weight of what the method adds to the gradient
        alpha: f64 = 0.1, as "ALPHA", in not_negative;
    }
}

/// GSAM by name.
pub const ENTRY: Entry = Entry::of::<Gsam>("gsam", "SAM that keeps the loss at w low");

impl<T: Scalar> Method<T> for Gsam {
    fn passes(&self) -> Passes {
        Passes { gradients: if self.rho == 0.0 { 1 } else { 2 }, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(3)
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        // Without a displacement the part to take out would be rounding noise.
        if self.rho == 0.0 {
            return Ok(Direction::along(G0));
        }
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        step.dot_products(&[G1, G0], Row::FIRST, Row::SECOND)?;
        step.rejection(1.0, -self.alpha)?;
        Ok(Direction::combined([G1, G0]))
    }
}
