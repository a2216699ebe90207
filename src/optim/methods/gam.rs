//! GAM: gradient-norm-aware minimisation (Zhang, Xu, Yu, Zou, Cui, "Gradient Norm Aware Minimization Seeks First-Order
//! Flatness and Improves Generalization", CVPR 2023), as in the authors' code.

use crate::device::{Result, Scalar};
use crate::kernels::sharpness::{self, GamTerms};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, G2, G3, Q};
use crate::optim::{Direction, Entry, Method, Needs, Numbers, Row, Step, Vector};
use crate::settings;

settings! {
    /// GAM takes `g1` at `w + r′ĝ0`, `g2` at `w2 = w + r d/‖d‖` with `d = g1 − g0`, and `g3` at `w2 + r′ĝ2`. With
    /// `G = β1 g1 + (1 − β1) g3` and `m = g0 + |1 − β0| g2` it follows `G − γ (m − proj_G m)`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Gam {
        /// Radius of the perturbation
        rho: f64 = 0.02, as "RHO", in positive;
        /// GAM's radius r along the change of the gradient; `rho` is its r'
        rho_norm: f64 = 0.2, as "R", in positive;
        /// GAM's β0
        beta0: f64 = 0.5, as "BETA", in not_negative;
        /// GAM's β1
        beta1: f64 = 0.6, as "BETA", in not_negative;
        /// GAM's γ
        gamma: f64 = 0.03, as "GAMMA", in not_negative;
    }
}

/// GAM by name.
pub const ENTRY: Entry = Entry::of::<Gam>("gam", "Gradient-norm-aware minimisation");

impl Gam {
    fn terms(&self) -> GamTerms {
        GamTerms { beta0: self.beta0, beta1: self.beta1, gamma: self.gamma }
    }
}

impl<T: Scalar> Method<T> for Gam {
    fn passes(&self) -> Passes {
        Passes { gradients: 4, products: 0 }
    }

    fn needs(&self) -> Needs {
        let (m, g) = self.terms().combinations();
        Needs { rows: vec![m, g], ..Needs::vectors(6) }
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        step.perturb_along([G1, G0], Row::DIFFERENCE, self.rho_norm, Q)?;
        step.gradient_and_norm(Q, 2, G2, 1)?;
        step.gradient_displaced(Q, G2, 1, self.rho, 3, G3)?;
        let gradients = [G0, G1, G2, G3];
        step.dot_products(&gradients, Row::own(0), Row::own(1))?;
        let Numbers { dot_products, coefficients, .. } = &mut *step.numbers;
        sharpness::gam_coefficients(dot_products.view(), self.terms(), coefficients.view_mut())?;
        Ok(Direction::combined(gradients))
    }
}
