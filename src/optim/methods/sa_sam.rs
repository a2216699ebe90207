//! SA-SAM and SA-SGD: the step size of adaptive gradient descent, for SAM and alone (Naganuma et al. 2024, algorithm 1;
//! step size of Malitsky and Mishchenko, "Adaptive Gradient Descent without Descent", ICML 2020).

use crate::device::{Result, Scalar};
use crate::kernels::{sharpness, vector};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P};
use crate::optim::{Context, Direction, Entry, Method, Needs, Numbers, Row, Step, Vector};
use crate::settings;

settings! {
    /// SA-SAM: step size `η = min(‖w − w_prev‖/(2‖g(w) − g(w_prev)‖), sqrt(1 + δθ) η_prev)`, both gradients on this
    /// mini-batch, radius `ρ = sqrt(η)`, and the gradient at `w + ρ g/‖g‖`. The learning rate that a step is given is
    /// ignored.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct SaSam {
        /// SA-SAM's and SA-SGD's δ; their η_0 is lr
        delta: f64 = 0.02, as "DELTA", in not_negative;
    }
    code {
        /// η_0, the step size of the first step.
        eta0: f64 = 0.1;
        /// θ_0. The algorithm's text has infinity.
        theta0: f64 = 1.0;
    }
}

settings! {
    /// SA-SGD: SA-SAM's step size without a perturbation.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct SaSgd {
        /// SA-SAM's and SA-SGD's δ; their η_0 is lr
        delta: f64 = 0.02, as "DELTA", in not_negative;
    }
    code {
        /// η_0, the step size of the first step.
        eta0: f64 = 0.1;
        /// θ_0. The algorithm's text has infinity.
        theta0: f64 = 1.0;
    }
}

/// SA-SAM by name.
pub const SA_SAM: Entry = Entry {
    name: "sa-sam",
    summary: "SAM with its own step size and radius",
    base: None,
    new: || Box::new(SaSam::default()),
};

/// SA-SGD by name.
pub const SA_SGD: Entry =
    Entry { name: "sa-sgd", summary: "SGD with SA-SAM's step size", base: None, new: || Box::new(SaSgd::default()) };

/// The weights of the step before.
const PREVIOUS: Vector = Vector::Memory(0);

/// Numbers of a step: η, ρ, θ, ‖g‖/ρ. Kept from step to step: η, θ, and whether there was a step.
fn needs([eta0, theta0]: [f64; 2]) -> Needs {
    Needs { memory: 1, scalars: vec![eta0, theta0, 0.0], numbers: 4, ..Needs::vectors(3) }
}

/// The gradients at `w` and at the previous weights, and the step size that follows from them.
fn step_size<T: Scalar>(step: &mut Step<'_, T>, delta: f64) -> Result<()> {
    // Before the first step there is no earlier point than this one.
    step.initialize(Vector::Weights, PREVIOUS)?;
    step.gradient_at_weights()?;
    step.gradient(PREVIOUS, 2, G1)?;
    step.products(&[Vector::Weights, PREVIOUS, G0, G1], Row::DIFFERENCE, Row::SECOND_DIFFERENCE)?;
    let Numbers { products, norms, own, .. } = &mut *step.numbers;
    sharpness::adgd_rates(products.view(), norms.slice(0..1)?, step.scalars.view(), delta, own.view_mut())
}

/// Keeps η, θ and the weights for the next step, unless this one is skipped.
fn remember<T: Scalar>(step: &mut Step<'_, T>) -> Result<()> {
    let (rates, skip) = (step.numbers.own.view(), step.numbers.flag.view());
    sharpness::adgd_commit(rates, skip, step.scalars.view_mut())?;
    step.keep(Vector::Weights, PREVIOUS)
}

impl<T: Scalar> Method<T> for SaSam {
    fn prepare(&mut self, context: &Context<'_>) {
        self.eta0 = context.learning_rate;
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 3, products: 0 }
    }

    fn needs(&self) -> Needs {
        needs([self.eta0, self.theta0])
    }

    fn own_rate(&self) -> Option<usize> {
        Some(0)
    }

    fn telemetry(&self) -> &'static [&'static str] {
        &["eta", "rho"]
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step_size(step, self.delta)?;
        let mut x = step.vectors.open();
        let (w, g, out) = (x.read(Vector::Weights)?, x.read(G0)?, x.write(P)?);
        // The factor of g is ρ/‖g‖, as the reciprocal of one of the step's numbers.
        vector::perturb(w, g, step.numbers.own.slice(3..4)?, 1.0, out, None)?;
        step.gradient(P, 1, G1)?;
        remember(step)?;
        Ok(Direction::along(G1))
    }
}

impl<T: Scalar> Method<T> for SaSgd {
    fn prepare(&mut self, context: &Context<'_>) {
        self.eta0 = context.learning_rate;
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        needs([self.eta0, self.theta0])
    }

    fn own_rate(&self) -> Option<usize> {
        Some(0)
    }

    fn telemetry(&self) -> &'static [&'static str] {
        &["eta"]
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step_size(step, self.delta)?;
        remember(step)?;
        Ok(Direction::along(G0))
    }
}
