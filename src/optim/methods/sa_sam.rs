//! SA-SAM and SA-SGD: the step size of adaptive gradient descent, for SAM and alone (Naganuma et al. 2024, algorithm 1;
//! step size of Malitsky and Mishchenko, "Adaptive Gradient Descent without Descent", ICML 2020).

use crate::device::{Result, Scalar};
use crate::kernels::{sharpness, vector};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P};
use crate::optim::{Direction, Entry, Method, Needs, Numbers, Row, Step, Vector};
use crate::settings;

settings! {
    /// SA-SAM: step size `η = min(d ‖w − w_prev‖/‖g(w) − g(w_prev)‖, sqrt(1 + δθ) η_prev)`, both gradients on this
    /// mini-batch, radius `ρ = sqrt(η)`, and the gradient at `w + ρ g/‖g‖`. The learning rate that a step is given is
    /// ignored. Without the perturbation it is SA-SGD.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct SaSam {
        /// How fast SA-SAM's and SA-SGD's step size may grow: by the factor √(1 + δθ) a step
        delta: f64 = 0.02, as "DELTA", in not_negative;
        /// Their first step size
        eta0: f64 = 1e-4, as "ETA", in positive;
        /// Their first θ; inf lets the second step take any step size, 1 is the authors' code
        theta0: f64 = f64::INFINITY, as "THETA", in above_zero;
        /// Factor of their quotient ‖Δw‖/‖Δg‖: 1/2 in the algorithm, 1 in the authors' code
        damping: f64 = 0.5, as "D", in positive;
    }
    code {
        /// Whether it follows the gradient at the perturbed weights: SA-SAM. If not, the one at `w`: SA-SGD.
        perturb: bool = true;
    }
}

/// SA-SAM by name.
pub const SA_SAM: Entry = Entry::of::<SaSam>("sa-sam", "SAM with its own step size and radius");

/// SA-SGD by name.
pub const SA_SGD: Entry = Entry {
    new: || Box::new(SaSam { perturb: false, ..SaSam::default() }),
    new_f64: || Box::new(SaSam { perturb: false, ..SaSam::default() }),
    ..Entry::of::<SaSam>("sa-sgd", "SGD with SA-SAM's step size")
};

/// The weights of the step before.
const PREVIOUS: Vector = Vector::Memory(0);

impl<T: Scalar> Method<T> for SaSam {
    fn passes(&self) -> Passes {
        Passes { gradients: if self.perturb { 3 } else { 2 }, products: 0 }
    }

    /// Numbers of a step: η, ρ, θ, ‖g‖/ρ. Kept from step to step: η, θ, and whether there was a step.
    fn needs(&self) -> Needs {
        Needs { memory: 1, scalars: vec![self.eta0, self.theta0, 0.0], numbers: 4, ..Needs::vectors(3) }
    }

    fn own_rate(&self) -> Option<usize> {
        Some(0)
    }

    fn telemetry(&self) -> &'static [&'static str] {
        if self.perturb { &["eta", "rho"] } else { &["eta"] }
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        // Before the first step there is no earlier point than this one.
        step.initialize(Vector::Weights, PREVIOUS)?;
        step.gradient_at_weights()?;
        step.gradient(PREVIOUS, 2, G1)?;
        step.dot_products(&[Vector::Weights, PREVIOUS, G0, G1], Row::DIFFERENCE, Row::SECOND_DIFFERENCE)?;
        let Numbers { dot_products, norms, own, .. } = &mut *step.numbers;
        let (norm, kept) = (norms.slice(0..1)?, step.scalars.view());
        sharpness::adgd_rates(dot_products.view(), norm, kept, (self.delta, self.damping), own.view_mut())?;
        if self.perturb {
            let mut x = step.vectors.open()?;
            let (w, g, out) = (x.read(Vector::Weights)?, x.read(G0)?, x.write(P)?);
            // The factor of g is ρ/‖g‖, as the reciprocal of one of the step's numbers.
            vector::perturb(w, g, step.numbers.own.slice(3..4)?, 1.0, out, None)?;
            step.gradient(P, 1, G1)?;
        }
        // η, θ and the weights are kept for the next step, unless this one is skipped.
        let (rates, skip) = (step.numbers.own.view(), step.numbers.flag.view());
        sharpness::adgd_commit(rates, skip, step.scalars.view_mut())?;
        step.keep(Vector::Weights, PREVIOUS)?;
        Ok(Direction::along(if self.perturb { G1 } else { G0 }))
    }
}
