//! MSAM: SAM whose perturbation follows the base optimizer's momentum, so that a step has one pass (Becker, Altrock,
//! Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv 2401.12033, algorithm 1).
//!
//! The momentum is a sum of gradients, and the update goes against it. The perturbation goes the same way as the
//! update: `− ρ m/‖m‖` in the paper's algorithm and in the authors' code (`optimizer/msam.py` and `adamW_msam.py` of
//! github.com/MarlonBecker/MSAM), with a positive ρ. Before the first step m is zero, and so is the perturbation.

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, P};
use crate::optim::{Direction, Entry, Method, Needs, Step, Vector};
use crate::settings;

settings! {
    /// MSAM: follows `g(w − ρ m/‖m‖)`, m the base optimizer's momentum.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Msam {
        /// Radius of the perturbation
        rho: f64 = 0.3, as "RHO", in not_negative;
    }
}

/// MSAM by name.
pub const ENTRY: Entry = Entry::of::<Msam>("msam", "SAM along the momentum, at the cost of the base optimizer");

impl<T: Scalar> Method<T> for Msam {
    fn passes(&self) -> Passes {
        Passes { gradients: 1, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(2)
    }

    fn needs_base(&self) -> bool {
        true
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.norm(Vector::Momentum, 1)?;
        step.perturb(Vector::Weights, Vector::Momentum, 1, -self.rho, P, None)?;
        step.gradient_and_norm(P, 0, G0, 0)?;
        Ok(Direction::along(G0))
    }
}
