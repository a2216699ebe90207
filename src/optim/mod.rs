//! Optimizers over a flat vector of weights: a base (SGD, AdamW) and the sharpness-aware methods on top of it.
//!
//! A step is a few passes of the [`Objective`] at chosen points and a handful of kernels over the whole vector. Norms, losses,
//! coefficients and the flag that skips a step stay on the device: nothing here waits for it. The perturbed weights have
//! buffers of their own, so `w` is never moved and restored. `method.rs` says what each [`Method`] is, `step.rs` how it is
//! composed; this table what it costs: gradients, and with SGD in f32 the launches beside theirs, the bytes that these move per
//! parameter, and the vectors held. `docs/methods.md` says more.
//!
//! | method | passes | launches | bytes | vectors |
//! |---|---|---|---|---|
//! | [`Method::Plain`] | 1 | 5 | 24 | 1 |
//! | [`Method::Sam`], p = 2 | 2 | 6 | 36 | 3 |
//! | p = ∞ | 2 | 6 | 36 | 3 |
//! | adaptive | 2 | 8 | 44 | 3 |
//! | random | 1 | 8 | 32 | 2 |
//! | K ascent steps | 1 + K | 7 + 4 (K − 1) | 40 + 28 (K − 1), less 4 for the last | 4 |
//! | second order | 2 + a product | 11 | 60 | 4 |
//! | [`Method::CrSam`] | 3 | 8 | 48 | 5 |
//! | [`Method::Gnr`], exact | 2 + 2 products | 11 | 48 | 5 |
//! | [`Method::Gnr`], differences | 6 | 12 | 92 | 7 |
//! | [`Method::Gam`] | 4 | 15 | 104 | 6 |
//! | [`Method::SaSam`] | 3 | 12 | 60 | 3, and w_prev |
//! | [`Method::SaSgd`] | 2 | 11 | 48 | 3, and w_prev |
//! | [`Method::Gsam`] | 2 | 9 | 48 | 3 |
//! | [`Method::LookSam`] | 2 in one step of k, else 1 | 12, else 6 | 60, else 28 | 3, and g_v |
//! | [`Method::RSam`] | 2 | 9 | 44 | 3 |
//!
//! Beside it the objective sees whether each gradient is finite. A network's plan has it for nothing on a GPU, with the norm; on the CPU
//! it reads the gradient once more (4 B per parameter and pass, of which it has back those of the norm; in f16, where it takes the loss
//! scale out, 8 B). Rounding weights to 16 bits takes 6 B; clipping adds 4 B for each vector of the direction. On a GPU the pairs of passes of CR-SAM and of GNR's differences run at the same time,
//! for which a plan takes its arena twice.

mod method;
mod schedule;
mod step;

pub use method::{CrSamTerms, Form, GamTerms, Gnr, Method, Perturbation, Product, Sam, Scaling, StepSize};
pub use schedule::{Decay, RhoSchedule, Schedule};

use crate::device::{Buffer, Device, Error, Result, Scalar, Slice};
use crate::kernels::vector::{self, AdamWStep, Combination, Rate, Reduction, SgdStep};
use crate::kernels::{metrics, sharpness};
use crate::objective::Objective;
use step::{Coefficients, Direction, Numbers, Point, Step, Store, place};

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

/// What an [`Optimizer`] does; its numbers do not change while it lives, except the learning rate, which each step is given, and
/// the factor of [`Optimizer::scale_rho`].
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
    /// The largest norm of the combined gradient: a longer one is scaled down to it, as PyTorch's `clip_grad_norm_` does. Weight
    /// decay is added after that.
    pub clip: Option<f64>,
}

impl Settings {
    /// A method over a base, without weight decay and clipping.
    pub fn new(method: Method, base: Base) -> Self {
        Self { method, base, weight_decay: 0.0, decay_len: usize::MAX, clip: None }
    }
}

/// What a step left on the device, read back.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Telemetry {
    /// The loss at `w` (of R-SAM and the random control at their first point).
    pub loss: f64,
    /// ‖g‖ there, over all parameters.
    pub gradient_norm: f64,
    /// `A = L+ + L− − 2L0`; CR-SAM only.
    pub a: Option<f64>,
    /// `B = L+ − L−`; CR-SAM only.
    pub b: Option<f64>,
    /// `A/ρ²`, the curvature along the gradient; CR-SAM only.
    pub vhv: Option<f64>,
    /// η of the newest step; SA-SAM and SA-SGD only.
    pub eta: Option<f64>,
    /// ρ of the newest step; SA-SAM only.
    pub rho: Option<f64>,
    /// The cosine between the gradients at `w` and at the perturbed point, of an observed step of a method that has both.
    pub cosine_gradients: Option<f64>,
    /// The cosine between the perturbation that survived rounding and the intended one, of an observed step.
    pub cosine_perturbation: Option<f64>,
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
    /// What the method remembers: SA-SAM's previous weights, LookSAM's orthogonal gradient; empty for the others.
    pub memory: Buffer<T>,
    /// SA-SAM's η, θ and whether it has begun, or LookSAM's ‖g_v‖.
    pub scalars: Buffer<f64>,
    /// Steps taken (AdamW's t), steps skipped, dropped α-terms, dropped β-terms.
    pub counters: Buffer<u32>,
    /// Steps asked for so far, skipped ones included: what happens in one of k steps follows it, and so do random directions.
    /// Replays of a recorded step are not counted; see [`Method::repeats`].
    pub attempts: u64,
}

/// A base optimizer with a sharpness-aware method, and the buffers they need.
///
/// Memory, in vectors as long as the weights, beside `w` itself: momentum (AdamW 2), and the method's working vectors, which the
/// table of [this module](self) counts.
pub struct Optimizer<T: Scalar> {
    settings: Settings,
    state: State<T>,
    arena: Buffer<T>,
    /// The sum over the groups of a mini-batch; empty unless some objective has had several.
    sum: Buffer<T>,
    /// What the objective sees of a perturbation; empty unless some step was observed.
    displacement: Buffer<T>,
    numbers: Numbers,
    reduction: Reduction,
    len: usize,
    rho_factor: f64,
    observe: bool,
}

impl<T: Scalar> Optimizer<T> {
    /// An optimizer for `len` weights.
    ///
    /// # Errors
    /// [`Error::Argument`] for a method whose settings contradict one another, and those of the allocation.
    pub fn new(device: &Device, len: usize, settings: Settings) -> Result<Self> {
        let refused = |message| Error::Argument { operation: "Optimizer::new", message };
        settings.method.check().map_err(refused)?;
        let scalars = match settings.method {
            Method::SaSam(size) | Method::SaSgd(size) => [size.eta0, size.theta0, 0.0],
            _ => [0.0; 3],
        };
        Ok(Self {
            settings,
            state: State {
                momentum: device.zeros(len)?,
                second_moment: device.zeros(if matches!(settings.base, Base::AdamW { .. }) { len } else { 0 })?,
                memory: device.zeros(if settings.method.has_memory() { len } else { 0 })?,
                scalars: device.upload(&scalars)?,
                counters: device.zeros(4)?,
                attempts: 0,
            },
            arena: device.zeros(place(step::slots(settings.method), len).start)?,
            sum: device.zeros(0)?,
            displacement: device.zeros(0)?,
            numbers: Numbers::new(device, settings.method)?,
            reduction: Reduction::new(device)?,
            len,
            rho_factor: 1.0,
            observe: false,
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
    ///
    /// # Errors
    /// None: the place lies in its buffer.
    pub fn loss(&self) -> Result<Slice<'_, f64>> {
        self.numbers.losses.slice(0..1)
    }

    /// Whether the newest step was skipped: one element, on the device.
    pub fn skipped(&self) -> Slice<'_, u32> {
        self.numbers.flag.view()
    }

    /// Multiplies the method's ρ in the steps that follow: what a schedule makes of it. The weight α ρ of GNR's regularizer and the
    /// distance of its differences stay.
    pub fn scale_rho(&mut self, factor: f64) {
        self.rho_factor = factor;
    }

    /// Whether the steps that follow leave the telemetry's cosines too: up to 64 B per parameter more (36 for SAM and CR-SAM),
    /// and a vector that the first of them allocates.
    pub fn observe(&mut self, observe: bool) {
        self.observe = observe;
    }

    /// One step: the method's passes at `weights` and around it, then the update with learning rate `lr`, a number or one on the
    /// device. Does not wait for the device. Where a loss or a gradient of any pass is not finite, weights, momenta and
    /// statistics keep their bits and the step is counted as skipped.
    ///
    /// An objective with several [groups](Objective::groups) has the method's direction taken in each of them, and their mean
    /// followed: m-sharpness (Foret et al. 2021, section 4.1). It takes one vector more, and reads each of a direction's k vectors
    /// once more: 4k + 4 B per parameter for the first group, 4k + 8 B for each further one. The loss that is reported is the
    /// groups' mean; what else the telemetry tells is of the last group, and dropped terms are counted in each.
    ///
    /// A step that fails leaves the weights as they were, and its running statistics are dropped.
    ///
    /// # Errors
    /// Those of the objective and of the device; [`Error::Length`] for weights of another length; [`Error::Argument`] for groups
    /// and a method that remembers.
    pub fn step<'r>(
        &mut self,
        objective: &mut impl Objective<T>,
        weights: &mut Buffer<T>,
        lr: impl Into<Rate<'r>>,
    ) -> Result<()> {
        let taken = self.take_step(objective, weights, lr.into());
        if taken.is_err() {
            objective.abandon();
        }
        taken
    }

    fn take_step(&mut self, objective: &mut impl Objective<T>, weights: &mut Buffer<T>, lr: Rate<'_>) -> Result<()> {
        const OPERATION: &str = "Optimizer::step";
        crate::kernels::check_length(OPERATION, "weights", weights.len(), self.len)?;
        self.numbers.flag.clear()?;
        if self.observe {
            // A step without a perturbation leaves no cosines, not those of an earlier one.
            self.numbers.realised.clear()?;
            self.numbers.turned.clear()?;
            if self.displacement.len() != self.len {
                self.displacement = weights.device().zeros(self.len)?;
            }
        }
        let groups = objective.groups().max(1);
        if groups > 1 && self.settings.method.has_memory() {
            let message = "a method that remembers earlier steps cannot be taken in groups of the mini-batch".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        if groups > 1 && self.sum.len() != self.len {
            self.sum = weights.device().zeros(self.len)?;
        }
        let mut direction = self.direction(objective, weights, (0, groups))?;
        if groups > 1 {
            for group in 1..groups {
                self.accumulate(direction, 1.0 / groups as f64, group > 1)?;
                direction = self.direction(objective, weights, (group, groups))?;
            }
            self.accumulate(direction, 1.0 / groups as f64, true)?;
            let Numbers { losses, mean_loss, .. } = &mut self.numbers;
            losses.slice_mut(0..1)?.copy_from(mean_loss.view())?;
        }
        self.state.attempts += 1;
        self.update(weights, direction, groups > 1, lr)?;
        objective.commit(self.numbers.flag.view())
    }

    /// The method's direction in one of the groups of the mini-batch.
    fn direction(
        &mut self,
        objective: &mut impl Objective<T>,
        weights: &Buffer<T>,
        (group, groups): (usize, usize),
    ) -> Result<Direction> {
        objective.select(group)?;
        let method = self.settings.method;
        let State { memory, scalars, counters, attempts, .. } = &mut self.state;
        let mut step = Step {
            objective,
            vectors: Store { arena: &mut self.arena, weights: weights.view(), memory },
            numbers: &mut self.numbers,
            scalars,
            counters,
            attempts: *attempts,
            draw: *attempts * groups as u64 + group as u64,
            reduction: &mut self.reduction,
            rho_factor: self.rho_factor,
            observe: self.observe,
            displacement: &mut self.displacement,
        };
        step.direction(method)
    }

    /// Adds a group's direction and loss to their means.
    fn accumulate(&mut self, direction: Direction, weight: f64, add: bool) -> Result<()> {
        let Numbers { losses, mean_loss, .. } = &mut self.numbers;
        metrics::mean_term(losses.slice(0..1)?, weight, add, mean_loss.view_mut())?;
        let vectors = vectors(direction, &self.arena, &self.state.memory, self.len)?;
        let coefficients = coefficients(direction, &self.numbers)?;
        let combination = combination(&vectors[..direction.count], coefficients);
        sharpness::combine(combination, weight, add, self.sum.view_mut(), None)
    }

    /// Clip, combine, momentum, decay and update.
    fn update(&mut self, weights: &mut Buffer<T>, direction: Direction, summed: bool, lr: Rate<'_>) -> Result<()> {
        let Self { settings, state, arena, sum, numbers, reduction, len, .. } = self;
        // The sum over groups is one vector, whatever it is the sum of.
        let mut direction = if summed { step::along(0) } else { direction };
        let vectors = if summed { [sum.view(); 4] } else { vectors(direction, arena, &state.memory, *len)? };
        let vectors = &vectors[..direction.count];
        if let Some(largest) = settings.clip {
            if let Coefficients::Known(row) = direction.coefficients {
                numbers.coefficients.view_mut().copy_from(step::row(&numbers.constants, row)?)?;
                direction.coefficients = Coefficients::Computed;
            }
            let Numbers { coefficients, products, .. } = &mut *numbers;
            let c = coefficients.view();
            sharpness::combined_products(vectors, c, c, reduction, products.view_mut())?;
            sharpness::clip_coefficients(products.slice(3..4)?, largest, coefficients.view_mut())?;
        }
        let gradients = combination(vectors, coefficients(direction, numbers)?);
        let lr = match settings.method {
            Method::SaSam(_) | Method::SaSgd(_) => Rate::Device(numbers.rates.slice(0..1)?),
            _ => lr,
        };
        let skip = numbers.flag.view();
        let mut counters = state.counters.disjoint();
        let (mut steps, skipped) = (counters.write(0..1)?, counters.write(1..2)?);
        vector::advance(skip, steps.reborrow(), skipped)?;
        let Settings { weight_decay, decay_len, .. } = *settings;
        match settings.base {
            Base::Sgd { momentum, nesterov } => {
                let step = SgdStep { lr, momentum, nesterov, weight_decay, decay_len };
                vector::sgd(weights.view_mut(), state.momentum.view_mut(), gradients, step, skip)
            }
            Base::AdamW { beta1, beta2, eps } => {
                let step = AdamWStep { lr, beta1, beta2, eps, weight_decay, decay_len };
                let (m, v) = (state.momentum.view_mut(), state.second_moment.view_mut());
                vector::adamw(weights.view_mut(), m, v, gradients, step, steps.view(), skip)
            }
        }
    }

    /// Waits for the device and reads what the newest step left there.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn telemetry(&self) -> Result<Telemetry> {
        let Numbers { losses, norms, curvature, rates, realised, turned, .. } = &self.numbers;
        fn numbers<const N: usize>(buffer: &Buffer<f64>) -> Result<[f64; N]> {
            let mut values = [0.0; N];
            buffer.read(&mut values)?;
            Ok(values)
        }
        let (losses, norms, curvature, rates) =
            (numbers::<4>(losses)?, numbers::<2>(norms)?, numbers::<3>(curvature)?, numbers::<4>(rates)?);
        let mut counters = [0; 4];
        self.state.counters.read(&mut counters)?;
        let method = self.settings.method;
        let curved = |value: f64| matches!(method, Method::CrSam { .. }).then_some(value);
        let [a, b, vhv] = curvature.map(curved);
        let stepped = matches!(method, Method::SaSam(_) | Method::SaSgd(_)).then_some(rates[0]);
        let radius = matches!(method, Method::SaSam(_)).then_some(rates[1]);
        let cosine = |products: &Buffer<f64>| -> Result<Option<f64>> {
            let [_, ab, _, a, b] = numbers::<{ sharpness::PRODUCTS }>(products)?;
            Ok((self.observe && a > 0.0 && b > 0.0).then(|| ab / a / b))
        };
        let [_, skipped, dropped_alpha, dropped_beta] = counters;
        Ok(Telemetry {
            loss: losses[0],
            gradient_norm: norms[0],
            a,
            b,
            vhv,
            eta: stepped,
            rho: radius,
            cosine_gradients: cosine(turned)?,
            cosine_perturbation: cosine(realised)?,
            dropped_alpha,
            dropped_beta,
            skipped,
        })
    }
}

/// The vectors of a direction; beyond its count the first one again.
fn vectors<'a, T: Scalar>(
    direction: Direction,
    arena: &'a Buffer<T>,
    memory: &'a Buffer<T>,
    len: usize,
) -> Result<[Slice<'a, T>; 4]> {
    let mut vectors = [memory.view(); 4];
    for (vector, point) in vectors.iter_mut().zip(direction.points) {
        if let Point::Slot(slot) = point {
            *vector = arena.slice(place(slot, len))?;
        }
    }
    Ok(vectors)
}

fn coefficients(direction: Direction, numbers: &Numbers) -> Result<Slice<'_, f64>> {
    match direction.coefficients {
        Coefficients::Known(row) => step::row(&numbers.constants, row),
        Coefficients::Computed => Ok(numbers.coefficients.view()),
    }
}

fn combination<'a, T: Scalar>(vectors: &[Slice<'a, T>], coefficients: Slice<'a, f64>) -> Combination<'a, T> {
    Combination { vectors: std::array::from_fn(|k| vectors.get(k).copied()), coefficients }
}
