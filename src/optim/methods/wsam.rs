//! WSAM: the loss plus its sharpness, weighted (Yue, Jiang, Ye, Gao, Liu, Zhang, "Sharpness-Aware Minimization
//! Revisited: Weighted Sharpness as a Regularization Term", KDD 2023). The decoupled form is the paper's, in which the
//! sharpness moves the weights beside the base optimizer as decoupled weight decay does; the coupled form is its
//! ablation. Both are as in the authors' code (`atorch/optimizers/wsam.py`).

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1};
use crate::optim::{Coefficients, Direction, Entry, Method, Needs, Row, Step, Vector};
use crate::{settings, words};

words! {
    /// Where WSAM's sharpness term acts.
    pub enum Sharpness {
        /// Beside the base optimizer, which follows the gradient of the loss alone
        Decoupled = "decoupled",
        /// In what the base optimizer follows
        Coupled = "coupled",
    }
}

settings! {
    /// WSAM: with `c = γ/(1 − γ)` and `g₊ = g(w + ρ g/‖g‖)`, the base optimizer follows g, and `η c (g₊ − g)` is
    /// subtracted beside it. In the coupled form it follows `g + c (g₊ − g)`. γ = 0 is the base optimizer alone, and in
    /// the coupled form γ = 1/2 is SAM.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Wsam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
        /// WSAM's γ: the sharpness has the weight γ/(1 − γ)
        gamma: f64 = 0.9, as "GAMMA", in below_one;
        /// Whether WSAM's sharpness term acts beside the base optimizer (decoupled) or through it (coupled)
        sharpness: Sharpness = Sharpness::Decoupled;
    }
}

/// WSAM by name.
pub const ENTRY: Entry = Entry::of::<Wsam>("wsam", "SAM with a weight of the sharpness");

impl<T: Scalar> Method<T> for Wsam {
    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        let weight = self.gamma / (1.0 - self.gamma);
        let row = match self.sharpness {
            Sharpness::Decoupled => [weight, -weight, 0.0, 0.0],
            Sharpness::Coupled => [1.0 - weight, weight, 0.0, 0.0],
        };
        Needs { rows: vec![row], ..Needs::vectors(3) }
    }

    fn needs_base(&self) -> bool {
        self.sharpness == Sharpness::Decoupled
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        Ok(match self.sharpness {
            Sharpness::Decoupled => Direction::along(G0).beside([G0, G1], Row::own(0)),
            Sharpness::Coupled => Direction::new([G0, G1], Coefficients::Known(Row::own(0))),
        })
    }
}
