//! Optimizers over a flat vector of weights: a base (SGD, AdamW) and the sharpness-aware methods on top of it.
//!
//! A step is a few passes of the [`Objective`] at chosen points and a handful of kernels over the whole vector. Norms, losses,
//! coefficients and the flag that skips a step stay on the device: nothing here waits for it. The perturbed weights have
//! buffers of their own, so `w` is never moved and restored.
//!
//! | method | update direction | passes | vector traffic, SGD, f32 |
//! |---|---|---|---|
//! | [`Method::Plain`] | `g(w)` | 1 | 24 B/parameter |
//! | [`Method::Sam`] | `g(w + ε)` | 2 | 36 B/parameter |
//! | [`Method::CrSam`] | `g+ + α(g+ + g− − 2g0)/A + β(g+ − g−)/B` | 3 | 48 B/parameter |
//!
//! The objective reads each gradient once more to see whether it is finite (4 B/parameter and pass).

mod schedule;

pub use crate::kernels::vector::{CrSam as CrSamTerms, CrSamForm as Form};
pub use schedule::{Decay, Schedule};

use crate::device::{Buffer, Device, Result, Scalar};
use crate::kernels::vector::{self, AdamWStep, Combination, CrSam, Reduction, SgdStep};
use crate::objective::{Objective, Statistics};

/// The rule that turns a gradient into a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Base {
    /// `m ← μm + (g + λw)`, `w ← w − ηm`, or `w − η(g + λw + μm)` with Nesterov: PyTorch's form, coupled weight decay.
    Sgd {
        /// μ, by default 0.9.
        momentum: f64,
        /// Whether to look ahead.
        nesterov: bool,
    },
    /// AdamW (Loshchilov & Hutter 2019) with decoupled weight decay: PyTorch's form.
    AdamW {
        /// Decay of the first moment, by default 0.9.
        beta1: f64,
        /// Decay of the second moment, by default 0.999.
        beta2: f64,
        /// Added to the root of the second moment, by default 1e-8.
        eps: f64,
    },
}

/// The norm of SAM's ball.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// p = 2: `ε = ρ g/‖g‖`.
    Two,
    /// p = ∞: `ε = ρ sign(g)`.
    Infinity,
}

/// Where the gradients of a step are taken and how they are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The gradient at `w`.
    Plain,
    /// Sharpness-aware minimisation (Foret et al. 2021, algorithm 1): the gradient at `w + ε`.
    Sam {
        /// The ball's radius, by default 0.05.
        rho: f64,
        /// Its norm.
        norm: Norm,
    },
    /// Curvature-regularised SAM (Wu, Luo, Wunsch 2024, eq. 7): gradients at `w`, `w + ρv` and `w − ρv` with
    /// `A = L+ + L− − 2L0` and `B = L+ − L−`; [`Form::Released`] leaves the divisions out, as the authors' code does. A term
    /// whose `A` or `B` is at most its threshold is dropped for the step and counted.
    CrSam {
        /// The radius, by default 0.1.
        rho: f64,
        /// Its coefficients, form and thresholds.
        terms: CrSam,
    },
}

impl Method {
    /// Forward and backward passes per step.
    pub fn passes(self) -> usize {
        match self {
            Method::Plain => 1,
            Method::Sam { .. } => 2,
            Method::CrSam { .. } => 3,
        }
    }
}

/// What an [`Optimizer`] does; its numbers do not change while it lives, except the learning rate, which each step is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The sharpness-aware method.
    pub method: Method,
    /// The rule it feeds.
    pub base: Base,
    /// λ: coupled for SGD, decoupled for AdamW. It does not bend the direction of the perturbation.
    pub weight_decay: f64,
    /// Weight decay acts on the first so many elements: all of them, or [`crate::arena::Layout::weights_len`] to exempt biases
    /// and normalisation.
    pub decay_len: usize,
}

/// What a step left on the device, read back.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Telemetry {
    /// The loss at `w`.
    pub loss: f64,
    /// ‖g(w)‖ over all parameters.
    pub gradient_norm: f64,
    /// `A = L+ + L− − 2L0`; CR-SAM only.
    pub a: Option<f64>,
    /// `B = L+ − L−`; CR-SAM only.
    pub b: Option<f64>,
    /// `A/ρ²`, the curvature along the gradient; CR-SAM only.
    pub vhv: Option<f64>,
    /// Steps whose α-term was dropped because `A` was too small, since the start.
    pub dropped_alpha: u32,
    /// Steps whose β-term was dropped because `B` was too small, since the start.
    pub dropped_beta: u32,
    /// Steps skipped because a loss or a gradient was not finite, since the start.
    pub skipped: u32,
}

/// The buffers of an optimizer that a checkpoint must hold for a run to go on bit for bit.
pub struct State<T: Scalar> {
    /// SGD's momentum or AdamW's first moment.
    pub momentum: Buffer<T>,
    /// AdamW's second moment; empty for SGD.
    pub second_moment: Buffer<T>,
    /// Steps taken (AdamW's t), steps skipped, dropped α-terms, dropped β-terms.
    pub counters: Buffer<u32>,
}

/// A base optimizer with a sharpness-aware method, and the buffers they need.
///
/// Memory, in vectors as long as the weights, beside `w` itself: gradient and momentum (2; AdamW 3), one more for SAM's
/// perturbed weights, four more for CR-SAM (two sides, two gradients).
pub struct Optimizer<T: Scalar> {
    settings: Settings,
    state: State<T>,
    gradient: Buffer<T>,
    plus: Buffer<T>,
    minus: Buffer<T>,
    gradient_plus: Buffer<T>,
    gradient_minus: Buffer<T>,
    /// L0, L+, L−.
    losses: Buffer<f64>,
    norm: Buffer<f64>,
    /// A, B, vᵀHv.
    curvature: Buffer<f64>,
    coefficients: Buffer<f64>,
    /// Whether some loss or gradient of this step was not finite.
    flag: Buffer<u32>,
    reduction: Reduction,
}

impl<T: Scalar> Optimizer<T> {
    /// An optimizer for `len` weights.
    ///
    /// # Errors
    /// Those of the allocation, or a `decay_len` beyond `len`.
    pub fn new(device: &Device, len: usize, settings: Settings) -> Result<Self> {
        if settings.decay_len > len {
            return Err(crate::device::Error::Length {
                operation: "Optimizer::new",
                argument: "decay_len",
                found: settings.decay_len,
                expected: len,
            });
        }
        let (sides, gradients) = match settings.method {
            Method::Plain => (0, 0),
            Method::Sam { .. } => (1, 0),
            Method::CrSam { .. } => (2, 2),
        };
        let vector_if = |wanted: bool| device.zeros(if wanted { len } else { 0 });
        Ok(Self {
            settings,
            state: State {
                momentum: device.zeros(len)?,
                second_moment: vector_if(matches!(settings.base, Base::AdamW { .. }))?,
                counters: device.zeros(4)?,
            },
            gradient: device.zeros(len)?,
            plus: vector_if(sides > 0)?,
            minus: vector_if(sides > 1)?,
            gradient_plus: vector_if(gradients > 0)?,
            gradient_minus: vector_if(gradients > 1)?,
            losses: device.zeros(3)?,
            norm: device.zeros(1)?,
            curvature: device.zeros(3)?,
            coefficients: device.upload(&[1.0, 0.0, 0.0])?,
            flag: device.zeros(1)?,
            reduction: Reduction::new(device)?,
        })
    }

    /// What it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What a checkpoint must hold.
    pub fn state(&self) -> &State<T> {
        &self.state
    }

    /// What a checkpoint restores.
    pub fn state_mut(&mut self) -> &mut State<T> {
        &mut self.state
    }

    /// The loss at `w` of the newest step: one element, on the device.
    pub fn loss(&self) -> Result<crate::device::Slice<'_, f64>> {
        self.losses.slice(0..1)
    }

    /// Whether the newest step was skipped: one element, on the device.
    pub fn skipped(&self) -> crate::device::Slice<'_, u32> {
        self.flag.view()
    }

    /// One step: the method's passes at `weights` and around it, then the update with learning rate `lr`. Does not wait for
    /// the device. Where a loss or a gradient of any pass is not finite, weights, momenta and statistics keep their bits and
    /// the step is counted as skipped.
    ///
    /// # Errors
    /// Those of the objective and of the device.
    pub fn step(&mut self, objective: &mut impl Objective<T>, weights: &mut Buffer<T>, lr: f64) -> Result<()> {
        self.flag.clear()?;
        let loss = self.losses.slice_mut(0..1)?;
        let flag = self.flag.view_mut();
        objective.gradient(weights.view(), Statistics::Update, self.gradient.view_mut(), loss, flag)?;
        vector::l2_norm(self.gradient.view(), &mut self.reduction, self.norm.view_mut())?;
        match self.settings.method {
            Method::Plain => self.update(weights, lr)?,
            Method::Sam { rho, norm } => {
                let (w, g, plus) = (weights.view(), self.gradient.view(), self.plus.view_mut());
                match norm {
                    Norm::Two => vector::perturb(w, g, self.norm.view(), rho, plus, None)?,
                    Norm::Infinity => vector::perturb_linf(w, g, rho, plus, None)?,
                }
                // The gradient at w has done its work: the one at w + ε takes its place.
                let (plus, gradient) = (self.plus.view(), self.gradient.view_mut());
                let loss = self.losses.slice_mut(1..2)?;
                objective.gradient(plus, Statistics::Keep, gradient, loss, self.flag.view_mut())?;
                self.update(weights, lr)?;
            }
            Method::CrSam { rho, terms } => {
                let (plus, minus) = (self.plus.view_mut(), self.minus.view_mut());
                vector::perturb(weights.view(), self.gradient.view(), self.norm.view(), rho, plus, Some(minus))?;
                let loss = self.losses.slice_mut(1..2)?;
                let (plus, gradient) = (self.plus.view(), self.gradient_plus.view_mut());
                objective.gradient(plus, Statistics::Keep, gradient, loss, self.flag.view_mut())?;
                let loss = self.losses.slice_mut(2..3)?;
                let (minus, gradient) = (self.minus.view(), self.gradient_minus.view_mut());
                objective.gradient(minus, Statistics::Keep, gradient, loss, self.flag.view_mut())?;
                vector::curvature_from_losses(self.losses.view(), rho, self.curvature.view_mut())?;
                let dropped = self.state.counters.slice_mut(2..4)?;
                vector::cr_sam_coefficients(self.losses.view(), terms, self.coefficients.view_mut(), dropped)?;
                self.update(weights, lr)?;
            }
        }
        objective.commit(self.flag.view())
    }

    /// Combine, momentum, decay and update in one pass.
    fn update(&mut self, weights: &mut Buffer<T>, lr: f64) -> Result<()> {
        let Self { settings, state, gradient, gradient_plus, gradient_minus, coefficients, flag, .. } = self;
        let three = matches!(settings.method, Method::CrSam { .. });
        let gradients = Combination {
            gradients: [
                Some(gradient.view()),
                three.then(|| gradient_plus.view()),
                three.then(|| gradient_minus.view()),
            ],
            coefficients: coefficients.view(),
        };
        let mut counters = state.counters.disjoint();
        let (mut steps, skipped) = (counters.write(0..1)?, counters.write(1..2)?);
        vector::advance(flag.view(), steps.reborrow(), skipped)?;
        let Settings { weight_decay, decay_len, .. } = *settings;
        match settings.base {
            Base::Sgd { momentum, nesterov } => {
                let step = SgdStep { lr, momentum, nesterov, weight_decay, decay_len };
                vector::sgd(weights.view_mut(), state.momentum.view_mut(), gradients, step, flag.view())
            }
            Base::AdamW { beta1, beta2, eps } => {
                let step = AdamWStep { lr, beta1, beta2, eps, weight_decay, decay_len };
                let (m, v) = (state.momentum.view_mut(), state.second_moment.view_mut());
                vector::adamw(weights.view_mut(), m, v, gradients, step, steps.view(), flag.view())
            }
        }
    }

    /// Waits for the device and reads what the newest step left there.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn telemetry(&self) -> Result<Telemetry> {
        let (mut losses, mut norm, mut curvature, mut counters) = ([0.0; 3], [0.0], [0.0; 3], [0; 4]);
        self.losses.read(&mut losses)?;
        self.norm.read(&mut norm)?;
        self.curvature.read(&mut curvature)?;
        self.state.counters.read(&mut counters)?;
        let curved = |value: f64| matches!(self.settings.method, Method::CrSam { .. }).then_some(value);
        let [a, b, vhv] = curvature.map(curved);
        let [_, skipped, dropped_alpha, dropped_beta] = counters;
        Ok(Telemetry { loss: losses[0], gradient_norm: norm[0], a, b, vhv, dropped_alpha, dropped_beta, skipped })
    }
}
