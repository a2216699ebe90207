//! Optimizers over a flat vector of weights: a base (SGD, AdamW, Muon) and the sharpness-aware methods on top of it.
//!
//! A step is a few passes of the [`Objective`] at chosen points and a handful of kernels over the whole vector. Norms,
//! losses, coefficients and the flag that skips a step stay on the device: nothing here waits for it. The perturbed
//! weights have buffers of their own, so `w` is never moved and restored.
//!
//! Each method is one file in `methods/`, a struct of its settings that implements [`Method`]; [`METHODS`] lists them.
//! `method.rs` says what a method is, `step.rs` has the verbs that methods are written with. `docs/methods.md` lists
//! what a step of each method costs: passes, launches, bytes per parameter, vectors.

mod method;
mod methods;
mod schedule;
mod snapshot;
mod step;

pub use method::{Context, Entry, Method, Needs};
pub use methods::*;
pub use schedule::{Decay, Ending, RhoSchedule, Schedule};
pub use snapshot::SnapshotError;
pub use step::{Coefficients, Direction, Numbers, Row, Step, Store, Vector, Vectors, work};

use std::ops::Range;

use crate::arena::Matrix;
use crate::device::{Buffer, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::Check;
use crate::kernels::muon::{Muon, MuonStep};
use crate::kernels::vector::{self, AdamWStep, Combination, Rate, Reduction, SgdStep};
use crate::kernels::{metrics, random, sharpness};
use crate::objective::{Objective, ObjectiveExt, Pass};
use crate::settings::SettingError;
use step::{Elsewhere, Term, place, room};

/// The key of the random directions of a run's methods, from the seed of the run.
pub fn direction_seed(seed: u64) -> u64 {
    random::key(seed, b"polderzz")
}

/// The entry of that name in [`METHODS`].
pub fn find(name: &str) -> Option<&'static Entry> {
    METHODS.iter().find(|entry| entry.name == name)
}

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
    /// Muon (Jordan et al. 2024) for the [matrices](Settings::matrices): Nesterov's momentum, five Newton–Schulz steps,
    /// and `w ← (1 − ηλ)w − 0.2 η sqrt(max(rows, columns)) X` (Liu et al. 2025); see [`Muon::step`]. An update of it is
    /// as large as one of AdamW, so all other weights have [`Base::ADAMW`] with the same η and λ.
    Muon {
        /// μ, by default 0.95.
        momentum: f64,
    },
    /// An optimizer of the caller. [`Optimizer::direction_into`] leaves it the direction to follow.
    External,
}

impl Base {
    /// AdamW with PyTorch's defaults.
    pub const ADAMW: Self = Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    /// Muon with PyTorch's default.
    pub const MUON: Self = Base::Muon { momentum: 0.95 };

    /// The base of that name, with its usual numbers: `sgd` with a momentum of 0.9, `adamw` or `muon`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Base::sgd(0.9), Base::ADAMW, Base::MUON].into_iter().find(|base| base.name() == name)
    }

    /// Its name, such as `adamw`.
    pub fn name(self) -> &'static str {
        match self {
            Base::Sgd { .. } => "sgd",
            Base::AdamW { .. } => "adamw",
            Base::Muon { .. } => "muon",
            Base::External => "external",
        }
    }

    /// SGD without Nesterov's form.
    pub const fn sgd(momentum: f64) -> Self {
        Base::Sgd { momentum, nesterov: false }
    }
}

/// What an [`Optimizer`] does. The numbers do not change while it lives, except what each step is given: the learning
/// rate, or the groups of weights; and what [`Optimizer::scale_rho`] and [`Optimizer::set_method`] change.
#[derive(Debug)]
pub struct Settings<T: Scalar> {
    /// The sharpness-aware method.
    pub method: Box<dyn Method<T>>,
    /// The base optimizer, which follows the method's direction.
    pub base: Base,
    /// λ: coupled for SGD, decoupled for AdamW and Muon. It does not change the direction of the perturbation.
    pub weight_decay: f64,
    /// Weight decay acts on the first `decay_len` elements: all of them, or [`crate::arena::Layout::weights_len`] to
    /// exempt biases and normalisation.
    pub decay_len: usize,
    /// The largest norm of the combined gradient. A longer one is scaled down to it, as PyTorch's `clip_grad_norm_`
    /// does. Weight decay is added after that.
    pub clip: Option<f64>,
    /// The matrices that Muon orthogonalises, in the order of their places, such as
    /// [`crate::arena::Layout::hidden_matrices`]. Other bases do not read them.
    pub matrices: Vec<Matrix>,
}

impl<T: Scalar> Settings<T> {
    /// A method over a base, without weight decay and clipping.
    pub fn new(method: impl Method<T> + 'static, base: Base) -> Self {
        Self::boxed(Box::new(method), base)
    }

    /// The same for a method whose type is not known at compile time.
    pub fn boxed(method: Box<dyn Method<T>>, base: Base) -> Self {
        Self { method, base, weight_decay: 0.0, decay_len: usize::MAX, clip: None, matrices: Vec::new() }
    }
}

/// A part of the weights with its own update; see [`Optimizer::step_groups`].
#[derive(Clone)]
pub struct Group<'a> {
    /// Its place in the vector of weights.
    pub place: Range<usize>,
    /// The base optimizer. All groups have the optimizer's own kind.
    pub base: Base,
    /// λ, as [`Settings::weight_decay`].
    pub weight_decay: f64,
    /// Learning rate η. A method that computes the step size replaces it, but not the factor of [`Rate::Scaled`].
    pub lr: Rate<'a>,
}

/// What a step left on the device, read back.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Telemetry {
    /// The mean loss of the mini-batch at `w`. For methods that take no gradient there, at their first point.
    pub loss: f64,
    /// The L2 norm of the gradient there, over all parameters.
    pub gradient_norm: f64,
    /// The method's own numbers by name, as [`Method::telemetry`] names them: A, B and A/ρ² of CR-SAM, η and ρ of
    /// SA-SAM.
    pub method: Vec<(&'static str, f64)>,
    /// The step size that the method computed, if it computes one.
    pub own_rate: Option<f64>,
    /// The cosine between the gradients at `w` and at the perturbed point, in an observed step of a method that has
    /// both.
    pub cosine_gradients: Option<f64>,
    /// How far the mini-batch's loss rises from `w` to the perturbed point, in such a step: SAM's sharpness `L(w + ε) −
    /// L(w)`. With m-sharpness, of the last group.
    pub sharpness: Option<f64>,
    /// The cosine between the perturbation that survived rounding and the intended one, in an observed step.
    pub cosine_perturbation: Option<f64>,
    /// The method's own counters by name, as [`Method::counters`] names them: dropped terms of CR-SAM.
    pub counters: Vec<(&'static str, u32)>,
    /// Steps skipped because a loss or a gradient was not finite, since the start.
    pub skipped: u32,
}

impl Telemetry {
    /// The method's own number of that name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.method.iter().find(|(own, _)| *own == name).map(|(_, value)| *value)
    }

    /// The method's own counter of that name.
    pub fn count(&self, name: &str) -> Option<u32> {
        self.counters.iter().find(|(own, _)| *own == name).map(|(_, count)| *count)
    }
}

/// The buffers of an optimizer that a checkpoint must hold, so that a resumed run has the same bits.
pub struct State<T: Scalar> {
    /// SGD's or Muon's momentum, or AdamW's first moment: as long as the weights; empty for [`Base::External`].
    pub momentum: Buffer<T>,
    /// AdamW's second moment: as long as the weights for AdamW and Muon, which leaves it 0 at matrices; otherwise
    /// empty.
    pub second_moment: Buffer<T>,
    /// The vectors that the method keeps: [`Needs::memory`] of them, such as SA-SAM's previous weights. Each begins at
    /// a multiple of [`ALIGNMENT`](crate::arena::ALIGNMENT) elements.
    pub memory: Buffer<T>,
    /// The numbers that the method keeps: as many as [`Needs::scalars`].
    pub scalars: Buffer<f64>,
    /// Steps taken (AdamW's t), steps skipped, and the method's own counters: [`Method::counters`].
    pub counters: Buffer<u32>,
    /// Steps asked for so far, skipped ones included. Methods that do something every k steps count by it, and random
    /// directions are drawn by it. Replays of a recorded step are not counted; see [`Method::repeats`].
    pub attempts: u64,
}

/// One of the long vectors that [`Optimizer::with_memory`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// [`State::momentum`]
    Momentum,
    /// [`State::second_moment`]
    SecondMoment,
    /// [`State::memory`]
    Memory,
    /// The working vectors, which last for one step.
    Work,
}

impl Part {
    /// All of them, in the order in which they are asked for.
    pub const ALL: [Self; 4] = [Part::Momentum, Part::SecondMoment, Part::Memory, Part::Work];

    /// Its name, such as `momentum`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Momentum => "momentum",
            Part::SecondMoment => "second_moment",
            Part::Memory => "memory",
            Part::Work => "work",
        }
    }
}

/// The counters before the method's own: steps taken, steps skipped.
const STEP_COUNTERS: usize = 2;

/// A base optimizer with a sharpness-aware method, and the buffers they need.
///
/// Memory, in vectors as long as the weights, beside `w` itself: momentum (two vectors for AdamW; for Muon four, and
/// five squares of the smaller side of each matrix), and the method's working vectors, which a table in
/// `docs/methods.md` counts.
pub struct Optimizer<T: Scalar> {
    settings: Settings<T>,
    state: State<T>,
    /// Muon's working memory, if it is the base.
    muon: Option<Muon<T>>,
    /// The method's working vectors.
    work: Buffer<T>,
    /// Their tensors that the objective has left where it computed them.
    elsewhere: Elsewhere<T>,
    /// Means over the groups of a mini-batch, of what is followed and of what is added beside it; empty until they are
    /// needed.
    means: [Buffer<T>; 2],
    /// The realised perturbation; empty unless some step was observed.
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
    /// [`Error::Argument`] for a method whose settings are out of range or contradict each other, and those of the
    /// allocation.
    pub fn new(device: &Device, len: usize, settings: Settings<T>) -> Result<Self> {
        Self::with_memory(device, len, settings, |_, len| device.zeros(len))
    }

    /// The same, with the long vectors in memory that `allocate` answers with: so many elements, all zero. It is asked
    /// once for each kind of vector that is needed, and for length 0 of the others.
    ///
    /// # Errors
    /// As [`Optimizer::new`]; [`Error::Length`] and [`Error::OtherDevice`] for an answer of another length or device.
    pub fn with_memory(
        device: &Device,
        len: usize,
        settings: Settings<T>,
        mut allocate: impl FnMut(Part, usize) -> Result<Buffer<T>>,
    ) -> Result<Self> {
        const OPERATION: &str = "Optimizer::new";
        check_method(OPERATION, &*settings.method)?;
        let needs = settings.method.needs();
        let mut allocate = |part: Part, len: usize| {
            let buffer = allocate(part, len)?;
            Check { operation: OPERATION, device }.argument(part.name(), buffer.view(), len)?;
            Ok(buffer)
        };
        let moments = match settings.base {
            Base::Sgd { .. } => [len, 0],
            Base::AdamW { .. } | Base::Muon { .. } => [len, len],
            Base::External => [0, 0],
        };
        let muon = match settings.base {
            Base::Muon { .. } => Some(Muon::new(device, len, &settings.matrices)?),
            _ => None,
        };
        Ok(Self {
            state: State {
                momentum: allocate(Part::Momentum, moments[0])?,
                second_moment: allocate(Part::SecondMoment, moments[1])?,
                memory: allocate(Part::Memory, room(needs.memory, len))?,
                scalars: device.upload(&needs.scalars)?,
                counters: device.zeros(STEP_COUNTERS + settings.method.counters().len())?,
                attempts: 0,
            },
            work: allocate(Part::Work, room(needs.vectors, len))?,
            elsewhere: Elsewhere::new(needs.vectors),
            means: [device.zeros(0)?, device.zeros(0)?],
            displacement: device.zeros(0)?,
            numbers: Numbers::new(device, &needs)?,
            reduction: Reduction::new(device)?,
            muon,
            settings,
            len,
            rho_factor: 1.0,
            observe: false,
        })
    }

    /// What it does.
    pub fn settings(&self) -> &Settings<T> {
        &self.settings
    }

    /// Changes the method's settings between two steps: the same method with other numbers.
    ///
    /// # Errors
    /// [`Error::Argument`] for settings that are out of range or contradict each other, and for a method that needs
    /// other vectors or numbers; those of the device.
    pub fn set_method(&mut self, method: Box<dyn Method<T>>) -> Result<()> {
        const OPERATION: &str = "Optimizer::set_method";
        check_method(OPERATION, &*method)?;
        let (old, new) = (self.settings.method.needs(), method.needs());
        let same = (old.vectors, old.memory, old.numbers, old.scalars.len(), old.rows.len())
            == (new.vectors, new.memory, new.numbers, new.scalars.len(), new.rows.len());
        if !same || self.settings.method.counters() != method.counters() {
            let message = "the new settings need other vectors or numbers: make a new optimizer".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        if old.rows != new.rows {
            self.numbers.set_rows(&new.rows)?;
        }
        self.settings.method = method;
        Ok(())
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

    /// Multiplies the method's ρ in the steps that follow, as a schedule asks, and with it the weight α ρ of GNR's
    /// regularizer. The distance of its differences stays.
    pub fn scale_rho(&mut self, factor: f64) {
        self.rho_factor = factor;
    }

    /// Whether the steps that follow also compute the telemetry's cosines. This moves up to 64 B per parameter more (36
    /// for SAM and CR-SAM) and needs a vector that the first observed step allocates.
    pub fn observe(&mut self, observe: bool) {
        self.observe = observe;
    }

    /// One step: the method's passes at `weights` and around it, then the update with learning rate `lr`, a number or
    /// one on the device. Does not wait for the device. If a loss or a gradient of any pass is not finite, weights,
    /// momenta and statistics keep their bits and the step is counted as skipped.
    ///
    /// For an objective with several groups, the method's direction is taken in each of them, and their mean is
    /// followed: m-sharpness (Foret et al. 2021, section 4.1). It needs one vector more, and reads each of a
    /// direction's k vectors once more: 4k + 4 B per parameter for the first group, 4k + 8 B for each further one. The
    /// reported loss is the groups' mean; the rest of the telemetry is of the last group, and the method's counters
    /// count each group.
    ///
    /// A step that fails leaves the weights as they were, and its running statistics are discarded.
    ///
    /// # Errors
    /// Those of the objective and of the device; [`Error::Length`] for weights of another length; [`Error::Argument`]
    /// for several groups with a method that has memory.
    pub fn step<'r>(
        &mut self,
        objective: &mut dyn Objective<T>,
        weights: SliceMut<'_, T>,
        lr: impl Into<Rate<'r>>,
    ) -> Result<()> {
        let Settings { base, weight_decay, decay_len, .. } = self.settings;
        let group = Group { place: 0..self.len, base, weight_decay, lr: lr.into() };
        self.guard(objective, |optimizer, objective| {
            let taken = optimizer.take_direction(objective, weights.view(), Some(group.lr))?;
            optimizer.update(weights, taken, &[group], decay_len)
        })
    }

    /// As [`Optimizer::step`], where groups of weights have their own learning rate, decay and numbers of the base
    /// optimizer, in a launch for each. Weights of no group keep their bits.
    ///
    /// # Errors
    /// As [`Optimizer::step`]; [`Error::Argument`] for a group with another kind of base optimizer, or whose place
    /// overlaps the one before; [`Error::Range`] for a place outside of the weights.
    pub fn step_groups(
        &mut self,
        objective: &mut dyn Objective<T>,
        weights: SliceMut<'_, T>,
        groups: &[Group<'_>],
    ) -> Result<()> {
        const OPERATION: &str = "Optimizer::step_groups";
        let refused = |message| Err(Error::Argument { operation: OPERATION, message });
        let mut end = 0;
        for Group { place, base, .. } in groups {
            if std::mem::discriminant(base) != std::mem::discriminant(&self.settings.base) {
                return refused(format!("{base:?} in an optimizer with {:?}", self.settings.base));
            }
            if place.start < end {
                return refused(format!("the place {place:?} is not behind the one before, which ends at {end}"));
            }
            // Before anything is updated: a step that fails leaves all groups as they were.
            if place.end > self.len || place.end < place.start {
                let reason = format!("does not lie in {} weights", self.len);
                return Err(Error::Range { operation: OPERATION, start: place.start, end: place.end, reason });
            }
            let matrices = self.muon.as_ref().map_or(&[][..], Muon::matrices).iter().map(Matrix::range);
            let inside = |at: usize| place.start <= at && at < place.end;
            if let Some(cut) = matrices.into_iter().find(|range| inside(range.start) != inside(range.end - 1)) {
                return refused(format!("the place {place:?} cuts the matrix at {cut:?}"));
            }
            end = place.end;
        }
        let same = |group: &Group<'_>| match (group.lr, groups[0].lr) {
            (Rate::Fixed(lr), Rate::Fixed(first)) => lr.to_bits() == first.to_bits(),
            _ => groups.len() == 1,
        };
        let lr = groups.first().filter(|_| groups.iter().all(same)).map(|group| group.lr);
        self.guard(objective, |optimizer, objective| {
            let taken = optimizer.take_direction(objective, weights.view(), lr)?;
            optimizer.update(weights, taken, groups, usize::MAX)
        })
    }

    /// The passes of a step at `weights` and around it, without an update: writes the direction that the base optimizer
    /// would follow, clipped, to `out`. For [`Base::External`] and for any other base. If a step is to be skipped,
    /// [`Optimizer::skipped`] is 1, and `out` may hold what is not finite.
    ///
    /// Traffic beside the passes: 4k + 4 B per parameter for a direction of k vectors.
    ///
    /// # Errors
    /// As [`Optimizer::step`]; [`Error::Argument`] for a method that [needs](Method::needs_base) a base optimizer.
    pub fn direction_into(
        &mut self,
        objective: &mut dyn Objective<T>,
        weights: Slice<'_, T>,
        out: SliceMut<'_, T>,
    ) -> Result<()> {
        const OPERATION: &str = "Optimizer::direction_into";
        crate::kernels::check_length(OPERATION, "out", out.len(), self.len)?;
        if self.settings.method.needs_base() {
            let message =
                "the method needs a base optimizer of this library: its direction has no meaning alone".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        self.guard(objective, |optimizer, objective| {
            let Taken { followed, .. } = optimizer.take_direction(objective, weights, None)?;
            optimizer.count()?;
            let mut out = out;
            let Self { state, work, elsewhere, means, numbers, len, .. } = optimizer;
            let gradients = followed.combination(work, &state.memory, means, numbers, *len)?;
            for part in elsewhere.parts(followed.vectors(), 0..*len) {
                let gradients = followed.part(elsewhere, gradients, part.clone())?;
                sharpness::combine(gradients, 1.0, false, out.slice_mut(part)?, None)?;
            }
            Ok(())
        })
    }

    /// The work of a step, and what ends it.
    fn guard(
        &mut self,
        objective: &mut dyn Objective<T>,
        work: impl FnOnce(&mut Self, &mut dyn Objective<T>) -> Result<()>,
    ) -> Result<()> {
        let taken = work(self, objective).and_then(|()| objective.commit(self.numbers.flag.view()));
        self.elsewhere.allow(false);
        if taken.is_err() {
            // It does not fail, and the error of the step is the one to report.
            let _ = objective.pass(Pass::Abandon);
        }
        taken
    }

    /// The passes of a step, and the clip of what is to be followed.
    fn take_direction(
        &mut self,
        objective: &mut dyn Objective<T>,
        weights: Slice<'_, T>,
        lr: Option<Rate<'_>>,
    ) -> Result<Taken> {
        const OPERATION: &str = "Optimizer::step";
        crate::kernels::check_length(OPERATION, "weights", weights.len(), self.len)?;
        self.numbers.flag.clear()?;
        if self.observe {
            // A step without a perturbation leaves no cosines. Those of an earlier step must not stay.
            self.numbers.realised.clear()?;
            self.numbers.turned.clear()?;
            if self.displacement.len() != self.len {
                self.displacement = weights.device().zeros(self.len)?;
            }
        }
        let groups = objective.domain().groups.max(1);
        if groups > 1 && !self.state.memory.is_empty() {
            let message = "a method with memory cannot be taken in groups of the mini-batch".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        // A clip, a mean, telemetry and Muon read gradients in ways that need them in one piece.
        let in_parts = groups == 1 && self.settings.clip.is_none() && !self.observe && self.muon.is_none();
        self.elsewhere.allow(in_parts);
        let mut direction = self.direction(objective, weights, lr, (0, groups))?;
        if groups > 1 {
            for group in 1..groups {
                self.accumulate(direction, 1.0 / groups as f64, group > 1)?;
                direction = self.direction(objective, weights, lr, (group, groups))?;
            }
            self.accumulate(direction, 1.0 / groups as f64, true)?;
            let Numbers { losses, mean_loss, .. } = &mut self.numbers;
            losses.slice_mut(0..1)?.copy_from(mean_loss.view())?;
        }
        self.state.attempts += 1;
        let of = |number: usize, term: Term| match groups {
            1 => Followed { term, mean: None },
            _ => Followed { term: Direction::along(Vector::Work(0)).followed, mean: Some(number) },
        };
        let (followed, beside) = (of(0, direction.followed), direction.beside.map(|term| of(1, term)));
        let followed = self.settings.clip.map_or(Ok(followed), |largest| self.clip(followed, largest))?;
        Ok(Taken { followed, beside })
    }

    /// Scales a direction down to a norm of at most `largest`.
    fn clip(&mut self, mut followed: Followed, largest: f64) -> Result<Followed> {
        let Self { state, work, means, numbers, reduction, len, .. } = self;
        if let Coefficients::Known(row) = followed.term.coefficients {
            numbers.copy_row(row)?;
            followed.term.coefficients = Coefficients::Computed;
        }
        let vectors = followed.slices(work, &state.memory, means, *len)?;
        let Numbers { coefficients, dot_products, .. } = &mut *numbers;
        let c = coefficients.view();
        sharpness::combined_products(&vectors[..followed.term.count], c, c, reduction, dot_products.view_mut())?;
        sharpness::clip_coefficients(dot_products.slice(3..4)?, largest, coefficients.view_mut())?;
        Ok(followed)
    }

    /// The method's direction in one of the groups of the mini-batch.
    fn direction(
        &mut self,
        objective: &mut dyn Objective<T>,
        weights: Slice<'_, T>,
        lr: Option<Rate<'_>>,
        (group, groups): (usize, usize),
    ) -> Result<Direction> {
        objective.select(group)?;
        let State { momentum, memory, scalars, counters, attempts, .. } = &mut self.state;
        let all = counters.len();
        let mut counters = counters.disjoint();
        let mut step = Step {
            objective,
            vectors: Store {
                work: &mut self.work,
                weights,
                momentum: momentum.view(),
                memory,
                elsewhere: &mut self.elsewhere,
            },
            numbers: &mut self.numbers,
            scalars,
            counters: counters.write(STEP_COUNTERS..all)?,
            taken: counters.read(0..1)?,
            lr,
            attempts: *attempts,
            draw: *attempts * groups as u64 + group as u64,
            reduction: &mut self.reduction,
            rho_factor: self.rho_factor,
            observe: self.observe,
            displacement: &mut self.displacement,
        };
        self.settings.method.direction(&mut step)
    }

    /// Adds a group's direction, its term beside it and its loss to their means.
    fn accumulate(&mut self, direction: Direction, weight: f64, add: bool) -> Result<()> {
        let Numbers { losses, mean_loss, .. } = &mut self.numbers;
        metrics::mean_term(losses.slice(0..1)?, weight, add, mean_loss.view_mut())?;
        for (term, mean) in [Some(direction.followed), direction.beside].into_iter().zip(&mut self.means) {
            let Some(term) = term else { continue };
            if mean.len() != self.len {
                *mean = self.work.device().zeros(self.len)?;
            }
            let vectors = slices(term, &self.work, &self.state.memory, self.len)?;
            let combination = combination(&vectors[..term.count], coefficients(term, &self.numbers)?);
            sharpness::combine(combination, weight, add, mean.view_mut(), None)?;
        }
        Ok(())
    }

    /// Counts the step as taken or skipped.
    fn count(&mut self) -> Result<()> {
        let mut counters = self.state.counters.disjoint();
        vector::advance(self.numbers.flag.view(), counters.write(0..1)?, counters.write(1..2)?)
    }

    /// Combine, momentum, decay and update, and what the method adds beside it.
    fn update(
        &mut self,
        mut weights: SliceMut<'_, T>,
        Taken { followed, beside }: Taken,
        groups: &[Group<'_>],
        decay_len: usize,
    ) -> Result<()> {
        self.count()?;
        let Self { settings, state, muon, work, elsewhere, means, numbers, len, .. } = self;
        let gradients = followed.combination(work, &state.memory, means, numbers, *len)?;
        let own_rate = settings.method.own_rate().map(|index| numbers.own.slice(index..index + 1)).transpose()?;
        let (skip, steps) = (numbers.flag.view(), state.counters.slice(0..1)?);
        for Group { place, base, weight_decay, lr } in groups.iter().cloned() {
            let lr = own_rate.map_or(lr, |own| lr.replaced_by(own));
            if let (Base::Muon { momentum }, Some(muon)) = (base, &mut *muon) {
                let (w, m) = (weights.reborrow(), state.momentum.view_mut());
                let step = MuonStep { lr, momentum, weight_decay, decay_len };
                muon.step(place.clone(), w, m, gradients, step, skip)?;
            }
            let matrices = muon.as_ref().map_or(&[][..], Muon::matrices);
            let rest = between(matrices, place.clone());
            for part in rest.flat_map(|place| elsewhere.parts(followed.vectors(), place)) {
                let gradients = followed.part(elsewhere, gradients, part.clone())?;
                let decay_len = decay_len.saturating_sub(part.start);
                let (w, m) = (weights.slice_mut(part.clone())?, state.momentum.slice_mut(part.clone()));
                match if muon.is_some() { Base::ADAMW } else { base } {
                    Base::Sgd { momentum, nesterov } => {
                        let step = SgdStep { lr, momentum, nesterov, weight_decay, decay_len };
                        vector::sgd(w, m?, gradients, step, skip)?;
                    }
                    Base::AdamW { beta1, beta2, eps } => {
                        let step = AdamWStep { lr, beta1, beta2, eps, weight_decay, decay_len };
                        vector::adamw(w, m?, state.second_moment.slice_mut(part)?, gradients, step, steps, skip)?;
                    }
                    Base::Muon { .. } | Base::External => {
                        let message = "the base optimizer is the caller's: take the direction".into();
                        return Err(Error::Argument { operation: "Optimizer::step", message });
                    }
                }
            }
            let Some(beside) = beside else { continue };
            let term = beside.combination(work, &state.memory, means, numbers, *len)?;
            for part in elsewhere.parts(beside.vectors(), place) {
                let term = beside.part(elsewhere, term, part.clone())?;
                sharpness::combine(term, lr, true, weights.slice_mut(part)?, Some(skip))?;
            }
        }
        Ok(())
    }

    /// Waits for the device and reads the newest step's telemetry.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn telemetry(&self) -> Result<Telemetry> {
        let Numbers { losses, norms, own, realised, turned, climbed, .. } = &self.numbers;
        let method = &self.settings.method;
        let (losses, norms, own) = (losses.to_vec()?, norms.to_vec()?, own.to_vec()?);
        let counters = self.state.counters.to_vec()?;
        let cosine = |products: &Buffer<f64>| -> Result<Option<f64>> {
            let mut values = [0.0; sharpness::PRODUCTS];
            products.read(&mut values)?;
            let [_, ab, _, a, b] = values;
            Ok((self.observe && a > 0.0 && b > 0.0).then(|| ab / a / b))
        };
        let cosine_gradients = cosine(turned)?;
        let climbed = climbed.to_vec()?;
        Ok(Telemetry {
            loss: losses[0],
            gradient_norm: norms[0],
            own_rate: method.own_rate().and_then(|index| own.get(index).copied()),
            method: method.telemetry().iter().copied().zip(own).collect(),
            sharpness: cosine_gradients.map(|_| climbed[1] - climbed[0]),
            cosine_gradients,
            cosine_perturbation: cosine(realised)?,
            counters: method.counters().iter().copied().zip(counters[STEP_COUNTERS..].iter().copied()).collect(),
            skipped: counters[1],
        })
    }
}

/// The parts of a place that are in no matrix.
fn between(matrices: &[Matrix], place: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let of = |end: usize| matrices.partition_point(|matrix| matrix.offset < end);
    let inside = &matrices[of(place.start)..of(place.end)];
    let starts = std::iter::once(place.start).chain(inside.iter().map(|matrix| matrix.range().end));
    let ends = inside.iter().map(|matrix| matrix.offset).chain([place.end]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|part| !part.is_empty())
}

/// Fails for settings that are out of range or contradict each other.
fn check_method<T: Scalar>(operation: &'static str, method: &dyn Method<T>) -> Result<()> {
    let refused = |error: SettingError| Error::Argument { operation, message: error.to_string() };
    method.check().and_then(|()| method.check_combination()).map_err(refused)
}

/// A step's direction as it is taken: what the base optimizer follows, and what is added beside it.
#[derive(Clone, Copy)]
struct Taken {
    followed: Followed,
    beside: Option<Followed>,
}

/// A combination of vectors: the method's, or the mean of the method's over the groups of the mini-batch.
#[derive(Clone, Copy)]
struct Followed {
    term: Term,
    /// Which of the means it is, if it is one: a single vector.
    mean: Option<usize>,
}

impl Followed {
    fn slices<'a, T: Scalar>(
        self,
        work: &'a Buffer<T>,
        memory: &'a Buffer<T>,
        means: &'a [Buffer<T>; 2],
        len: usize,
    ) -> Result<[Slice<'a, T>; 4]> {
        match self.mean {
            Some(number) => Ok([means[number].view(); 4]),
            None => slices(self.term, work, memory, len),
        }
    }

    fn combination<'a, T: Scalar>(
        self,
        work: &'a Buffer<T>,
        memory: &'a Buffer<T>,
        means: &'a [Buffer<T>; 2],
        numbers: &'a Numbers,
        len: usize,
    ) -> Result<Combination<'a, T>> {
        let vectors = self.slices(work, memory, means, len)?;
        Ok(combination(&vectors[..self.term.count], coefficients(self.term, numbers)?))
    }

    fn vectors(&self) -> [Vector; 4] {
        self.term.vectors
    }

    /// A part of the combination in which all its vectors lie in one piece.
    fn part<'a, T: Scalar>(
        self,
        elsewhere: &'a Elsewhere<T>,
        mut whole: Combination<'a, T>,
        part: Range<usize>,
    ) -> Result<Combination<'a, T>> {
        for (slice, vector) in whole.vectors.iter_mut().zip(self.term.vectors) {
            if let Some(found) = *slice {
                *slice = Some(elsewhere.slice(vector, found, part.clone())?);
            }
        }
        Ok(whole)
    }
}

/// The vectors of a term. Those beyond its count are copies of the first.
fn slices<'a, T: Scalar>(
    term: Term,
    work: &'a Buffer<T>,
    memory: &'a Buffer<T>,
    len: usize,
) -> Result<[Slice<'a, T>; 4]> {
    let mut slices = [memory.view(); 4];
    for (slice, vector) in slices.iter_mut().zip(term.vectors) {
        *slice = match vector {
            Vector::Work(index) => work.slice(place(index, len))?,
            Vector::Memory(index) => memory.slice(place(index, len))?,
            Vector::Weights | Vector::Momentum => {
                let message = "a direction contains neither the weights nor the base optimizer's momentum".into();
                return Err(Error::Argument { operation: "Optimizer::step", message });
            }
        };
    }
    Ok(slices)
}

fn coefficients(term: Term, numbers: &Numbers) -> Result<Slice<'_, f64>> {
    match term.coefficients {
        Coefficients::Known(row) => numbers.row(row),
        Coefficients::Computed => Ok(numbers.coefficients.view()),
    }
}

fn combination<'a, T: Scalar>(vectors: &[Slice<'a, T>], coefficients: Slice<'a, f64>) -> Combination<'a, T> {
    Combination { vectors: std::array::from_fn(|k| vectors.get(k).copied()), coefficients }
}
