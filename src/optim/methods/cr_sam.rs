//! CR-SAM: curvature-regularised SAM (Wu, Luo, Wunsch, "CR-SAM: Curvature Regularized Sharpness-Aware Minimization",
//! AAAI 2024, equation 7). Its curvature along a random direction is that of the paper's theorem 1, an estimate of the
//! trace of the Hessian.

use crate::device::{Result, Scalar};
use crate::kernels::vector::{self, CrSamTerms};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, G2, P, Q};
use crate::optim::{Context, Direction, Entry, Method, Needs, Numbers, Step, direction_seed};
use crate::{settings, words};

words! {
    /// The form of CR-SAM's regularizer.
    pub enum Form {
        /// Equation 7 of the paper: the gradient of `α log A + β log B`
        Log = "log",
        /// The authors' code: that of `α A + β B`
        Released = "released",
    }
}

words! {
    /// The direction of CR-SAM's two points.
    pub enum Along {
        /// The gradient at `w`, as in algorithm 1
        Gradient = "gradient",
        /// A random direction, uniform over all and drawn anew in each step
        Random = "random",
    }
}

settings! {
    /// CR-SAM: follows `g₊ + α (g₊ + g₋ − 2g)/A + β (g₊ − g₋)/B` with the gradients at `w ± ρ g/‖g‖`, `A = L₊ + L₋ −
    /// 2L` and `B = L₊ − L₋`. The released form has no divisions. The log form drops a term for a step whose A or B is
    /// at most its threshold or the error of the losses, and counts it.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct CrSam {
        /// Radius of the perturbation
        rho: f64 = 0.1, as "RHO", in not_negative;
        /// Weight of what the method adds to the gradient
        alpha: f64 = 0.02, as "ALPHA", in not_negative;
        /// CR-SAM's weight of the slope term
        beta: f64 = 0.01, as "BETA", in not_negative;
        /// CR-SAM as in the paper (log) or as in its authors' code (released)
        form: Form = Form::Log, as "FORM";
        /// CR-SAM drops the curvature term at or below this A, or where A is smaller than the error of the losses
        a_min: f64 = 1e-8, as "A", in not_negative;
        /// CR-SAM drops the slope term at or below this B, or where B is smaller than the error of the losses
        b_min: f64 = 1e-8, as "B", in not_negative;
        /// Whether CR-SAM's two points lie along the gradient or along a random direction
        direction: Along = Along::Gradient;
    }
    code {
        /// Seed of the random direction.
        seed: u64 = 0;
        /// The error of A and B, relative to the loss.
        loss_error: f64 = 0.0;
    }
}

/// CR-SAM by name.
pub const ENTRY: Entry = Entry::of::<CrSam>("cr-sam", "Curvature-regularised SAM");

impl<T: Scalar> Method<T> for CrSam {
    /// A is a sum of four losses.
    fn prepare(&mut self, context: &Context<'_>) {
        self.loss_error = 4.0 * context.loss_error;
        self.seed = direction_seed(context.seed);
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 3, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs { numbers: 4, ..Needs::vectors(5) }
    }

    fn repeats(&self) -> bool {
        self.direction == Along::Gradient
    }

    /// A, B, and `A/ρ²`, the curvature along the direction, with its error from the rounding of the losses.
    fn telemetry(&self) -> &'static [&'static str] {
        &["a", "b", "vhv", "vhv_error"]
    }

    /// Steps whose α-term was dropped because A was too small, and likewise the β-term and B.
    fn counters(&self) -> &'static [&'static str] {
        &["dropped_alpha", "dropped_beta"]
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        match self.direction {
            Along::Gradient => step.gradient_pair_displaced(self.rho, [G1, G2])?,
            Along::Random => {
                step.perturb_randomly(self.seed, self.rho, P, Some(Q))?;
                step.gradient_pair([P, Q], [G1, G2])?;
            }
        }
        let Self { alpha, beta, form, a_min, b_min, loss_error, .. } = *self;
        let terms = CrSamTerms { log_form: form == Form::Log, alpha, beta, a_min, b_min, loss_error };
        let Numbers { losses, own, coefficients, flag, .. } = &mut *step.numbers;
        let (losses, dropped) = (losses.slice(0..3)?, step.counters.reborrow());
        vector::curvature_from_losses(losses, (self.rho * step.rho_factor, loss_error), own.view_mut())?;
        vector::cr_sam_coefficients(losses, terms, coefficients.slice_mut(0..3)?, flag.view(), dropped)?;
        Ok(Direction::combined([G0, G1, G2]))
    }
}
