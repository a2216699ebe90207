//! Sassha: SAM whose direction is divided by the root of the curvature of each weight (Shin, Lee, Chung, Lee, "SASSHA:
//! Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation", ICML 2025, arXiv 2502.18153,
//! algorithm 1). The constants, and the bias correction of the curvature by the number of the step, are those of the
//! authors' code (`optimizers/sassha.py` of github.com/LOG-postech/Sassha).
//!
//! The direction is a whole update: its average of gradients is its momentum. So the base optimizer is SGD without
//! momentum, whose coupled weight decay is then the decoupled one of the paper.

use crate::device::{Result, Scalar};
use crate::kernels::random;
use crate::kernels::sassha::{SasshaState, SasshaStep, sassha};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, G2, P, Q};
use crate::optim::{Context, Direction, Entry, Method, Needs, Numbers, Step, Vector, direction_seed};
use crate::settings;

settings! {
    /// Sassha: with `g₊ = g(w + ρ g/‖g‖)`, `m ← β1 m + (1 − β1) g₊` and in every k-th step `d ← β2 d + (1 − β2) |z ⊙
    /// H₊z|`, follows `m/(1 − β1ᵗ) / (sqrt(d/(1 − β2ˢ)) + 10⁻⁴)`, s the step of the newest d. z is a random vector of
    /// ±1, H₊ the Hessian at the perturbed point; β1 is 0.9, β2 0.999.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Sassha {
        /// Radius of the perturbation
        rho: f64 = 0.2, as "RHO", in not_negative;
        /// Run the full step every K steps
        every: u64 = 10, as "K", in at_least(1);
    }
    code {
        /// Seed of z.
        seed: u64 = 0;
    }
}

/// Sassha by name.
pub const ENTRY: Entry = Entry::of::<Sassha>("sassha", "SAM with a diagonal of the Hessian as preconditioner");

const CONSTANTS: SasshaStep = SasshaStep { beta1: 0.9, beta2: 0.999, eps: 1e-4 };

/// m and d.
const AVERAGE: Vector = Vector::Memory(0);
const CURVATURE: Vector = Vector::Memory(1);

impl<T: Scalar> Method<T> for Sassha {
    fn prepare(&mut self, context: &Context<'_>) {
        self.seed = direction_seed(context.seed);
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 1 }
    }

    /// The number that it keeps is the bias correction of d.
    fn needs(&self) -> Needs {
        Needs { memory: 2, scalars: vec![0.0], ..Needs::vectors(5) }
    }

    /// Each product takes a random vector of its own.
    fn repeats(&self) -> bool {
        false
    }

    fn has_momentum(&self) -> bool {
        true
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        let due = step.attempts.is_multiple_of(self.every);
        if due {
            // The product needs the point, which a displaced gradient may leave undefined.
            step.perturb(Vector::Weights, G0, 0, self.rho, P, None)?;
            step.gradient(P, 1, G1)?;
            let mut x = step.vectors.open()?;
            let first = step.draw * 4 * x.read(P)?.len().div_ceil(4) as u64;
            random::rademacher(x.write(Q)?, self.seed, first)?;
            step.hessian_vector(P, Q, G2)?;
        } else {
            step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        }
        let mut x = step.vectors.open()?;
        let curvature = if due { Some([x.read(Q)?, x.read(G2)?]) } else { None };
        let (average, kept) = (x.write(AVERAGE)?, x.write(CURVATURE)?);
        let state = SasshaState { average, curvature: kept, correction: step.scalars.view_mut() };
        let Numbers { flag, .. } = &*step.numbers;
        // The gradient at w is no longer needed. Its place takes the direction.
        sassha(x.read(G1)?, curvature, state, CONSTANTS, step.taken, flag.view(), x.write(G0)?)?;
        Ok(Direction::along(G0))
    }
}
