//! ASAM: SAM whose ball is scaled by the weights, `ε = ρ T² g/‖T g‖` with `T = |w| + η` (Kwon, Kim, Park, Choi, "ASAM:
//! Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks", ICML 2021).

use crate::device::{Result, Scalar};
use crate::kernels::sharpness::{self, Scaling};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P};
use crate::optim::{Context, Direction, Entry, Method, Needs, Step, Vector};
use crate::settings;

settings! {
    /// ASAM: follows `g(w + ρ T² g/‖T g‖)` with `T = |w| + η`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Asam {
        /// Radius of the perturbation
        rho: f64 = 0.5, as "RHO", in not_negative;
        /// ASAM's η in T = |w| + η
        eta: f64 = 0.01, as "ETA", in not_negative;
    }
    code {
        /// Only the first `scaled_len` weights are scaled; `T = 1` for the others, which in a network are biases and
        /// normalisation.
        scaled_len: usize = usize::MAX;
    }
}

/// ASAM by name.
pub const ENTRY: Entry = Entry::of::<Asam>("asam", "Adaptive SAM");

impl<T: Scalar> Method<T> for Asam {
    fn prepare(&mut self, context: &Context<'_>) {
        self.scaled_len = context.layout.weights_len();
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(3)
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        let (scaling, rho) = (Scaling { eta: self.eta, scaled_len: self.scaled_len }, self.rho * step.rho_factor);
        let mut x = step.vectors.open()?;
        let (w, g, norms) = (x.read(Vector::Weights)?, x.read(G0)?, &mut step.numbers.norms);
        sharpness::adaptive_norm(w, g, scaling, step.reduction, norms.slice_mut(1..2)?)?;
        sharpness::perturb_adaptive(w, g, scaling, norms.slice(1..2)?, rho, x.write(P)?)?;
        step.gradient(P, 1, G1)?;
        Ok(Direction::along(G1))
    }
}
