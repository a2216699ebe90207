//! SAM along a random direction, `ε = ρ z/‖z‖` with z standard normal: the control experiment for SAM.

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, P};
use crate::optim::{Context, Direction, Entry, Method, Needs, Step, direction_seed};
use crate::settings;

settings! {
    /// Random SAM: follows `g(w + ρ z/‖z‖)`, z standard normal. It needs no gradient at `w`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct RandomSam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
    }
    code {
        /// Seed of z.
        seed: u64 = 0;
    }
}

/// Random SAM by name.
pub const ENTRY: Entry = Entry::of::<RandomSam>("random-sam", "SAM along a random direction: the control");

impl<T: Scalar> Method<T> for RandomSam {
    fn prepare(&mut self, context: &Context<'_>) {
        self.seed = direction_seed(context.seed);
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 1, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(2)
    }

    fn repeats(&self) -> bool {
        false
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.perturb_randomly(self.seed, self.rho, P, None)?;
        step.gradient_and_norm(P, 0, G0, 0)?;
        Ok(Direction::along(G0))
    }
}
