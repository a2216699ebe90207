//! R-SAM: SAM whose ascent follows the gradient at a random point near `w` (Liu, Mai, Cheng, Chen, Hsieh, You, "Random
//! Sharpness-Aware Minimization", NeurIPS 2022).

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P};
use crate::optim::{Context, Direction, Entry, Method, Needs, Step, Vector, direction_seed};
use crate::settings;

settings! {
    /// R-SAM: follows `g(w + ρ ĝ(w + σ z/‖z‖))`, z standard normal.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct RSam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in positive;
        /// Length of R-SAM's random displacement
        sigma: f64 = 0.05, as "SIGMA", in positive;
    }
    code {
        /// Seed of z.
        seed: u64 = 0;
    }
}

/// R-SAM by name.
pub const ENTRY: Entry = Entry::of::<RSam>("r-sam", "SAM whose ascent follows the gradient at a random point");

impl<T: Scalar> Method<T> for RSam {
    fn prepare(&mut self, context: &Context<'_>) {
        self.seed = direction_seed(context.seed);
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(3)
    }

    fn repeats(&self) -> bool {
        false
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.perturb_randomly(self.seed, self.sigma, P, None)?;
        step.gradient_and_norm(P, 0, G0, 0)?;
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        Ok(Direction::along(G1))
    }
}
