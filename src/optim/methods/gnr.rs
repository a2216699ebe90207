//! GNR: gradient-norm regularisation ("Gradient Norm Regularizer Seeks Flat Minima", ICLR submission, algorithm 1).

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, G2, G3, H, P, Q};
use crate::optim::{Coefficients, Direction, Entry, Method, Needs, Row, Step, Vector};
use crate::{settings, words};

words! {
    /// How GNR takes products with the Hessian.
    pub enum Hvp {
        /// By the tangent of the network
        Exact = "exact",
        /// By the difference of two gradients
        Difference = "difference",
    }
}

words! {
    /// The gradient that GNR adds its regularizer's to.
    pub enum Oracle {
        /// The gradient of the loss
        Loss = "loss",
        /// SAM's gradient
        Sam = "sam",
    }
}

settings! {
    /// GNR: follows `h + α ρ H(w_adv) ĝ(w_adv)` with `w_adv = w + ρ f/‖f‖` and `f = H ĝ`. h is the gradient of the loss
    /// or SAM's. Under a schedule of ρ, both the radius and the weight of the regularizer follow it.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Gnr {
        /// Radius of the perturbation
        rho: f64 = 0.1, as "RHO", in not_negative;
        /// Weight of what the method adds to the gradient
        alpha: f64 = 0.1, as "ALPHA", in not_negative;
        /// GNR's products with the Hessian
        hvp: Hvp = Hvp::Exact;
        /// Distance of the two points of GNR's difference from the point between them
        hvp_radius: f64 = 0.01, as "R", in positive, with hvp = "difference";
        /// The gradient to which GNR adds its regularizer's gradient
        oracle: Oracle = Oracle::Loss;
        /// Radius of GNR's SAM
        oracle_rho: f64 = 0.05, as "RHO", in positive, with oracle = "sam";
        /// Run the full step every K steps
        every: u64 = 1, as "K", in at_least(1);
    }
}

/// GNR by name.
pub const ENTRY: Entry = Entry::of::<Gnr>("gnr", "Gradient-norm regularisation");

impl<T: Scalar> Method<T> for Gnr {
    fn passes(&self) -> Passes {
        let oracle = u64::from(self.oracle == Oracle::Sam);
        match self.hvp {
            Hvp::Exact => Passes { gradients: 2 + oracle, products: 2 },
            Hvp::Difference => Passes { gradients: 6 + oracle, products: 0 },
        }
    }

    fn needs(&self) -> Needs {
        let weight = self.alpha * self.rho / (2.0 * self.hvp_radius);
        let vectors = if self.oracle == Oracle::Loss && self.hvp == Hvp::Exact { 5 } else { 7 };
        Needs { rows: vec![[1.0, weight, -weight, 0.0]], ..Needs::vectors(vectors) }
    }

    fn repeats(&self) -> bool {
        self.every == 1
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        let due = step.attempts.is_multiple_of(self.every);
        let mut oracle = G0;
        if self.oracle == Oracle::Sam {
            oracle = if due { H } else { G1 };
            step.gradient_displaced(Vector::Weights, G0, 0, self.oracle_rho, 3, oracle)?;
        }
        if !due {
            return Ok(Direction::along(oracle));
        }
        let weight = self.alpha * self.rho * step.rho_factor;
        match self.hvp {
            Hvp::Exact => {
                step.hessian_vector(Vector::Weights, G0, G1)?;
                step.norm(G1, 1)?;
                step.perturb(Vector::Weights, G1, 1, self.rho, P, None)?;
                step.gradient_and_norm(P, 1, G1, 1)?;
                step.hessian_vector(P, G1, G2)?;
                step.over_norm(weight, 1)?;
                Ok(Direction::combined([oracle, G2]))
            }
            Hvp::Difference => {
                step.fixed_perturb(Vector::Weights, G0, 0, self.hvp_radius, P, Some(Q))?;
                step.gradient_pair([P, Q], [G1, G2])?;
                step.perturb_along([G1, G2], Row::DIFFERENCE, self.rho, P)?;
                step.gradient_and_norm(P, 1, G1, 1)?;
                // The second difference is taken around w_adv. One kernel writes both of its points.
                step.fixed_perturb(P, G1, 1, self.hvp_radius, Q, Some(G3))?;
                step.gradient_pair([Q, G3], [G1, G2])?;
                if step.rho_factor == 1.0 {
                    return Ok(Direction::new([oracle, G1, G2], Coefficients::Known(Row::own(0))));
                }
                step.weighted_difference(weight / (2.0 * self.hvp_radius))?;
                Ok(Direction::combined([oracle, G1, G2]))
            }
        }
    }
}
