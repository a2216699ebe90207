//! LookSAM: SAM in one of k steps (Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware
//! Minimization", CVPR 2022).

use crate::device::{Result, Scalar};
use crate::kernels::{sharpness, vector};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1};
use crate::optim::{Direction, Entry, Method, Needs, Numbers, Step, Vector};
use crate::settings;

settings! {
    /// LookSAM: every k-th step follows `g₊ = g(w + ρ g/‖g‖)` and keeps g_v, the part of `g₊` that is orthogonal to g.
    /// The other steps follow `g + α (‖g‖/‖g_v‖) g_v`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct LookSam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
        /// Weight of what the method adds to the gradient
        alpha: f64 = 0.1, as "ALPHA", in not_negative;
        /// Run the full step every K steps
        every: u64 = 5, as "K", in at_least(1);
    }
}

/// LookSAM by name.
pub const ENTRY: Entry = Entry::of::<LookSam>("looksam", "SAM in one of k steps");

/// What is kept: g_v, and its norm.
const KEPT: Vector = Vector::Memory(0);

impl<T: Scalar> Method<T> for LookSam {
    fn passes(&self) -> Passes {
        Passes { gradients: if self.rho == 0.0 { 1 } else { 2 }, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs { memory: 1, scalars: vec![0.0], ..Needs::vectors(3) }
    }

    fn repeats(&self) -> bool {
        self.every == 1
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        // Without a displacement the direction to keep would be rounding noise.
        if self.rho == 0.0 {
            return Ok(Direction::along(G0));
        }
        if !step.attempts.is_multiple_of(self.every) {
            let Numbers { norms, coefficients, .. } = &mut *step.numbers;
            let (norm, kept) = (norms.slice(0..1)?, step.scalars.slice(0..1)?);
            sharpness::quotient(self.alpha, Some(norm), kept, coefficients.slice_mut(0..2)?)?;
            return Ok(Direction::combined([G0, KEPT]));
        }
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        step.orthogonal(KEPT)?;
        vector::l2_norm(step.vectors.open()?.read(KEPT)?, step.reduction, step.scalars.slice_mut(0..1)?)?;
        Ok(Direction::along(G1))
    }
}
