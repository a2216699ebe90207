//! One step of a method: the vectors and numbers that it works on, and the verbs that every method is written with.
//!
//! A method takes gradients at a few points and combines them. The verbs of [`Step`] take a gradient at a point,
//! displace a point along a vector or a combination of vectors, take the products of combined vectors, and turn them
//! into coefficients. Everything stays on the device; nothing here waits for it.

use std::ops::Range;

use super::method::Needs;
use crate::arena::ALIGNMENT;
use crate::device::{Buffer, Device, Disjoint, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::vector::{self, Combination, Rate, Reduction};
use crate::kernels::{random, sharpness};
use crate::objective::{Displacement, Objective, ObjectiveExt, Pass, RunningStats, Scattered};

/// A vector as long as the weights that a verb reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vector {
    /// The weights `w`. No verb writes them.
    Weights,
    /// The base optimizer's momentum before this step: SGD's or Muon's m or AdamW's first moment. No verb writes it. A
    /// method that reads it says so in [`Method::needs_base`](super::Method::needs_base).
    Momentum,
    /// What the method keeps from step to step, by number: [`Needs::memory`] of them. Checkpoints hold them.
    Memory(usize),
    /// A working vector, by number: [`Needs::vectors`] of them. Its contents last until the end of the step.
    Work(usize),
}
use Vector::{Memory, Momentum, Weights, Work};

/// The working vectors by what most methods put there. A method that uses number k needs k + 1 of them.
pub mod work {
    use super::Vector;

    /// The gradient at `w`.
    pub const G0: Vector = Vector::Work(0);
    /// The perturbed point. [`gradient_displaced`](super::Step::gradient_displaced) writes its point here.
    pub const P: Vector = Vector::Work(1);
    /// The gradient at the perturbed point.
    pub const G1: Vector = Vector::Work(2);
    /// A second point, on the other side of `w`.
    pub const Q: Vector = Vector::Work(3);
    /// The gradient at the second point.
    pub const G2: Vector = Vector::Work(4);
    /// A third gradient.
    pub const G3: Vector = Vector::Work(5);
    /// A seventh vector.
    pub const H: Vector = Vector::Work(6);
}
use work::{G0, G1, P, Q};

/// A row of four coefficients that are known before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row(usize);

impl Row {
    /// `(1, 0, 0, 0)`
    pub const FIRST: Self = Self(0);
    /// `(0, 1, 0, 0)`
    pub const SECOND: Self = Self(1);
    /// `(1, −1, 0, 0)`
    pub const DIFFERENCE: Self = Self(2);
    /// `(0, 0, 1, −1)`
    pub const SECOND_DIFFERENCE: Self = Self(3);
    /// `(0, −1, 0, 0)`
    const AGAINST_SECOND: Self = Self(4);

    /// The method's own row number `index` of [`Needs::rows`].
    pub const fn own(index: usize) -> Self {
        Self(COMMON_ROWS.len() + index)
    }
}

/// The rows that every method has, in the order of [`Row`].
const COMMON_ROWS: [[f64; 4]; 5] =
    [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0], [0.0, -1.0, 0.0, 0.0]];

/// Where four coefficients lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coefficients {
    /// Known before the first step.
    Known(Row),
    /// Computed in this step, in [`Numbers::coefficients`].
    Computed,
}

/// `Σ c_k x_k` over one to four vectors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Term {
    pub(super) vectors: [Vector; 4],
    pub(super) count: usize,
    pub(super) coefficients: Coefficients,
}

impl Term {
    fn new<const N: usize>(vectors: [Vector; N], coefficients: Coefficients) -> Self {
        const { assert!(N >= 1 && N <= 4, "a direction combines one to four vectors") };
        let mut all = [vectors[0]; 4];
        all[..N].copy_from_slice(&vectors);
        Self { vectors: all, count: N, coefficients }
    }
}

/// What the base optimizer follows: `Σ c_k x_k` over one to four vectors. The method can move the weights beside it,
/// too.
#[derive(Debug, Clone, Copy)]
pub struct Direction {
    pub(super) followed: Term,
    pub(super) beside: Option<Term>,
}

impl Direction {
    /// A combination of vectors. `N` is 1 to 4.
    pub fn new<const N: usize>(vectors: [Vector; N], coefficients: Coefficients) -> Self {
        Self { followed: Term::new(vectors, coefficients), beside: None }
    }

    /// One vector, unchanged.
    pub fn along(vector: Vector) -> Self {
        Self::new([vector], Coefficients::Known(Row::FIRST))
    }

    /// Beside what the base optimizer does, a step also adds `η Σ c_k x_k` to the weights, with the learning rate η and
    /// the coefficients of a row. No momentum remembers this term, and no clip shortens it. A method with such a term
    /// says so in [`Method::needs_base`](super::Method::needs_base).
    #[must_use]
    pub fn beside<const N: usize>(self, vectors: [Vector; N], row: Row) -> Self {
        Self { beside: Some(Term::new(vectors, Coefficients::Known(row))), ..self }
    }

    /// Vectors with the coefficients that the step has computed.
    pub fn combined<const N: usize>(vectors: [Vector; N]) -> Self {
        Self::new(vectors, Coefficients::Computed)
    }
}

/// The few numbers of a step, on the device.
pub struct Numbers {
    /// Losses: number 0 at `w`, the others at further points in the method's order. Four elements.
    pub losses: Buffer<f64>,
    /// The mean of loss number 0 over the groups of a mini-batch. One element.
    pub(super) mean_loss: Buffer<f64>,
    /// Norms: number 0 is ‖g(w)‖. Two elements.
    pub norms: Buffer<f64>,
    /// What [`Step::dot_products`] wrote last; see [`sharpness::combined_products`].
    pub dot_products: Buffer<f64>,
    /// The direction's coefficients. Four elements.
    pub coefficients: Buffer<f64>,
    /// Coefficients of a vector that the step needs before it has its direction. Four elements.
    pub inner: Buffer<f64>,
    /// The method's own: [`Needs::numbers`] elements. [`Method::telemetry`](super::Method::telemetry) names the first
    /// of them.
    pub own: Buffer<f64>,
    /// Products of the realised with the intended perturbation, and of g with g₊, in observed steps.
    pub(super) realised: Buffer<f64>,
    pub(super) turned: Buffer<f64>,
    /// Losses number 0 and 1 when the gradient at the perturbed point was taken, in observed steps.
    pub(super) climbed: Buffer<f64>,
    /// The table of rows.
    rows: Buffer<f64>,
    /// Whether some loss or gradient of this step was not finite. One element.
    pub flag: Buffer<u32>,
}

impl Numbers {
    pub(super) fn new(device: &Device, needs: &Needs) -> Result<Self> {
        Ok(Self {
            losses: device.zeros(4)?,
            mean_loss: device.zeros(1)?,
            norms: device.zeros(2)?,
            dot_products: device.zeros(sharpness::PRODUCTS)?,
            coefficients: device.zeros(4)?,
            inner: device.zeros(4)?,
            own: device.zeros(needs.numbers)?,
            realised: device.zeros(sharpness::PRODUCTS)?,
            turned: device.zeros(sharpness::PRODUCTS)?,
            climbed: device.zeros(2)?,
            rows: device.upload(&[&COMMON_ROWS[..], &needs.rows].concat().concat())?,
            flag: device.zeros(1)?,
        })
    }

    /// Replaces the method's own rows.
    pub(super) fn set_rows(&mut self, own: &[[f64; 4]]) -> Result<()> {
        self.rows.write(&[&COMMON_ROWS[..], own].concat().concat())
    }

    /// The direction's coefficients become those of a row.
    pub(super) fn copy_row(&mut self, row: Row) -> Result<()> {
        let row = self.rows.slice(4 * row.0..4 * row.0 + 4)?;
        self.coefficients.view_mut().copy_from(row)
    }

    /// Four coefficients that are known before the first step.
    ///
    /// # Errors
    /// [`Error::Range`] for a row of its own that the method did not ask for.
    pub fn row(&self, row: Row) -> Result<Slice<'_, f64>> {
        self.rows.slice(4 * row.0..4 * row.0 + 4)
    }
}

/// Where vector number `index` lies in a buffer of `len`-element vectors, which are whole cache lines apart.
pub(super) fn place(index: usize, len: usize) -> Range<usize> {
    let start = index * len.next_multiple_of(ALIGNMENT);
    start..start + len
}

/// Elements of a buffer of `count` such vectors.
pub(super) fn room(count: usize, len: usize) -> usize {
    if count == 0 { 0 } else { place(count - 1, len).end }
}

/// The tensors of working vectors that lie where the objective has computed them. Perturbations and updates read them
/// there. Before anything else reads such a vector, they are gathered, and from then on it is written as a whole.
pub(super) struct Elsewhere<T: Scalar> {
    /// Of each working vector; without tensors for one that lies in its place.
    tensors: Vec<Scattered<T>>,
    /// The vectors that had to be gathered in some step.
    whole: Vec<bool>,
    /// Whether this step's gradients may lie elsewhere.
    allowed: bool,
}

impl<T: Scalar> Elsewhere<T> {
    pub(super) fn new(vectors: usize) -> Self {
        let tensors = (0..vectors).map(|_| Scattered::default()).collect();
        Self { tensors, whole: vec![false; vectors], allowed: false }
    }

    /// Before the passes of a step, and with `false` after them.
    pub(super) fn allow(&mut self, allowed: bool) {
        self.tensors.fill_with(Scattered::default);
        self.allowed = allowed;
    }

    /// The tensors of a vector that do not lie in it.
    fn of(&self, vector: Vector) -> &[(Range<usize>, Buffer<T>)] {
        match vector {
            Work(index) => self.tensors.get(index).map_or(&[], |found| &found.tensors),
            _ => &[],
        }
    }

    fn lies_elsewhere(&self, vector: Vector) -> bool {
        !self.of(vector).is_empty()
    }

    /// Where the objective may list the tensors that it leaves, if it may leave some.
    fn list(&mut self, vector: Vector) -> Option<&mut Scattered<T>> {
        let Work(index) = vector else { return None };
        self.tensors.get_mut(index).filter(|_| self.allowed && !self.whole[index])
    }

    fn forget(&mut self, vector: Vector) {
        if let Work(index) = vector
            && let Some(found) = self.tensors.get_mut(index)
        {
            *found = Scattered::default();
        }
    }

    fn gather(&mut self, work: &mut Buffer<T>, len: usize) -> Result<()> {
        for (index, found) in self.tensors.iter_mut().enumerate().filter(|(_, found)| !found.tensors.is_empty()) {
            found.gather(work.slice_mut(place(index, len))?)?;
            self.whole[index] = true;
        }
        Ok(())
    }

    /// The parts of a range in each of which every one of the vectors lies in one piece.
    pub(super) fn parts(&self, vectors: [Vector; 4], range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = range.start;
        std::iter::from_fn(move || {
            let next = |vector: Vector| {
                let tensors = self.of(vector);
                let (place, _) = tensors.get(tensors.partition_point(|(place, _)| place.end <= start))?;
                Some(if start < place.start { place.start } else { place.end })
            };
            let end = vectors.into_iter().filter_map(next).fold(range.end, usize::min);
            let part = start..end;
            start = end;
            (!part.is_empty()).then_some(part)
        })
    }

    /// Such a part of a vector, where `whole` is the vector's own memory.
    pub(super) fn slice<'a>(&'a self, vector: Vector, whole: Slice<'a, T>, part: Range<usize>) -> Result<Slice<'a, T>> {
        match self.of(vector).iter().find(|(place, _)| place.start <= part.start && part.end <= place.end) {
            Some((place, tensor)) => tensor.slice(part.start - place.start..part.end - place.start),
            None => whole.slice(part),
        }
    }
}

/// All vectors of a step.
pub struct Store<'a, T: Scalar> {
    pub(super) work: &'a mut Buffer<T>,
    pub(super) weights: Slice<'a, T>,
    pub(super) momentum: Slice<'a, T>,
    pub(super) memory: &'a mut Buffer<T>,
    pub(super) elsewhere: &'a mut Elsewhere<T>,
}

impl<T: Scalar> Store<'_, T> {
    /// Borrows the vectors that one kernel reads and writes.
    ///
    /// # Errors
    /// Those of gathering a gradient whose tensors the objective has left elsewhere.
    pub fn open(&mut self) -> Result<Vectors<'_, T>> {
        self.elsewhere.gather(self.work, self.weights.len())?;
        let Self { work, weights, momentum, memory, .. } = self;
        Ok(Vectors { work: work.disjoint(), weights: *weights, momentum: *momentum, memory: memory.disjoint() })
    }

    /// The same, where tensors of gradients may lie elsewhere, but not those of the vector `point`. What will be
    /// `written` has none any more.
    fn open_in_parts(&mut self, point: Vector, written: &[Vector]) -> Result<(Vectors<'_, T>, &mut Elsewhere<T>)> {
        written.iter().for_each(|&vector| self.elsewhere.forget(vector));
        if self.elsewhere.lies_elsewhere(point) {
            self.elsewhere.gather(self.work, self.weights.len())?;
        }
        let Self { work, weights, momentum, memory, elsewhere } = self;
        let vectors =
            Vectors { work: work.disjoint(), weights: *weights, momentum: *momentum, memory: memory.disjoint() };
        Ok((vectors, elsewhere))
    }
}

/// The vectors that one kernel reads and writes.
pub struct Vectors<'a, T: Scalar> {
    work: Disjoint<'a, T>,
    weights: Slice<'a, T>,
    momentum: Slice<'a, T>,
    memory: Disjoint<'a, T>,
}

impl<'a, T: Scalar> Vectors<'a, T> {
    /// A vector to read.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector that the method did not ask for, or that is already borrowed to be written.
    pub fn read(&mut self, vector: Vector) -> Result<Slice<'a, T>> {
        match vector {
            Weights => Ok(self.weights),
            Momentum => Ok(self.momentum),
            Memory(index) => self.memory.read(place(index, self.weights.len())),
            Work(index) => self.work.read(place(index, self.weights.len())),
        }
    }

    /// A vector to write.
    ///
    /// # Errors
    /// [`Error::Argument`] for the weights and the momentum; [`Error::Range`] for a vector that the method did not ask
    /// for, or that is already borrowed.
    pub fn write(&mut self, vector: Vector) -> Result<SliceMut<'a, T>> {
        match vector {
            Weights | Momentum => {
                let message = "a method writes neither the weights nor the base optimizer's momentum".into();
                Err(Error::Argument { operation: "Vectors::write", message })
            }
            Memory(index) => self.memory.write(place(index, self.weights.len())),
            Work(index) => self.work.write(place(index, self.weights.len())),
        }
    }
}

/// A step in progress: what a method works on. The fields are for methods with kernels of their own; the verbs cover
/// the rest. A verb moves what the kernels that it calls move: see [`vector`](mod@vector), [`sharpness`] and
/// [`random`].
pub struct Step<'a, T: Scalar> {
    /// The function that is minimised.
    pub objective: &'a mut dyn Objective<T>,
    /// The vectors.
    pub vectors: Store<'a, T>,
    /// The numbers.
    pub numbers: &'a mut Numbers,
    /// Numbers that the method keeps from step to step: as many as [`Needs::scalars`]. Checkpoints hold them.
    pub scalars: &'a mut Buffer<f64>,
    /// Counters that the method keeps from step to step, in the order of
    /// [`Method::counters`](super::Method::counters). Checkpoints hold them.
    pub counters: SliceMut<'a, u32>,
    /// Steps taken before this one: one element.
    pub(super) taken: Slice<'a, u32>,
    /// The learning rate, if the step has one for all weights.
    pub(super) lr: Option<Rate<'a>>,
    /// Steps asked for before this one, skipped ones included.
    pub attempts: u64,
    /// Scratch memory of norms and products.
    pub reduction: &'a mut Reduction,
    /// What the schedule multiplies ρ by.
    pub rho_factor: f64,
    /// The number of this step's random direction.
    pub(super) draw: u64,
    /// Whether the cosines of the telemetry are wanted.
    pub(super) observe: bool,
    /// The realised perturbation; empty until a step is observed.
    pub(super) displacement: &'a mut Buffer<T>,
}

/// Batch norm's running statistics follow the pass of the reported loss, number 0.
fn running_stats(loss: usize) -> RunningStats {
    if loss == 0 { RunningStats::Update } else { RunningStats::Keep }
}

impl<T: Scalar> Step<'_, T> {
    /// Loss number `loss` and the gradient at `point`. Number 0 is the loss that is reported; batch norm's running
    /// statistics follow its pass.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient(&mut self, point: Vector, loss: usize, into: Vector) -> Result<()> {
        self.take_gradient(point, loss, into, None)
    }

    /// The same, with norm number `norm` of the gradient.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_and_norm(&mut self, point: Vector, loss: usize, into: Vector, norm: usize) -> Result<()> {
        self.take_gradient(point, loss, into, Some(norm))
    }

    fn take_gradient(&mut self, point: Vector, loss: usize, into: Vector, norm: Option<usize>) -> Result<()> {
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let (mut x, elsewhere) = self.vectors.open_in_parts(point, &[into])?;
        let (weights, gradient, running_stats) = (x.read(point)?, x.write(into)?, running_stats(loss));
        let (loss, flag) = (losses.slice_mut(loss..loss + 1)?, flag.view_mut());
        let norm = norm.map(|norm| norms.slice_mut(norm..norm + 1)).transpose()?;
        let norm = norm.map(|norm| (&mut *self.reduction, norm));
        let scattered = elsewhere.list(into);
        let pass = match (scattered, norm) {
            (Some(scattered), norm) => {
                Pass::ScatteredGradient { weights, running_stats, gradient, scattered, loss, flag, norm }
            }
            (None, None) => Pass::Gradient { weights, running_stats, gradient, loss, flag },
            (None, Some((reduction, norm))) => {
                Pass::GradientAndNorm { weights, running_stats, gradient, loss, flag, reduction, norm }
            }
        };
        self.objective.pass(pass)?;
        self.observe_turn(point, into)
    }

    /// The first pass of most methods: the reported loss, the gradient at `w` in [`work::G0`], and its norm, number 0.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_at_weights(&mut self) -> Result<()> {
        self.gradient_and_norm(Weights, 0, G0, 0)
    }

    /// Loss number `loss` and the gradient at `from + ρ along/‖along‖`, where norm number `norm` is ‖along‖.
    /// [`work::P`] is room for the point. The schedule scales ρ.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_displaced(
        &mut self,
        from: Vector,
        along: Vector,
        norm: usize,
        rho: f64,
        loss: usize,
        into: Vector,
    ) -> Result<()> {
        if self.observe || self.vectors.elsewhere.lies_elsewhere(along) {
            self.perturb(from, along, norm, rho, P, None)?;
            return self.gradient(P, loss, into);
        }
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let mut x = self.vectors.open()?;
        let (norm, rho) = (norms.slice(norm..norm + 1)?, rho * self.rho_factor);
        let displacement = Displacement { from: x.read(from)?, along: x.read(along)?, norm, rho };
        let (point, gradient, loss) = (x.write(P)?, x.write(into)?, losses.slice_mut(loss..loss + 1)?);
        self.objective.pass(Pass::GradientDisplaced { displacement, point, gradient, loss, flag: flag.view_mut() })
    }

    /// Losses number 1 and 2 and the gradients at `w ± ρ g/‖g‖`, g the vector in [`work::G0`] and norm number 0 its
    /// norm. [`work::P`] and [`work::Q`] are room for the points. The schedule scales ρ.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_pair_displaced(&mut self, rho: f64, into: [Vector; 2]) -> Result<()> {
        if self.observe {
            self.perturb(Weights, G0, 0, rho, P, Some(Q))?;
            return self.gradient_pair([P, Q], into);
        }
        if self.vectors.elsewhere.lies_elsewhere(G0) {
            self.perturb(Weights, G0, 0, rho, P, Some(Q))?;
            self.gradient(P, 1, into[0])?;
            return self.gradient(Q, 2, into[1]);
        }
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let (mut x, mut losses) = (self.vectors.open()?, losses.disjoint());
        let (norm, rho) = (norms.slice(0..1)?, rho * self.rho_factor);
        let displacement = Displacement { from: x.read(Weights)?, along: x.read(G0)?, norm, rho };
        let (points, gradients) = ([x.write(P)?, x.write(Q)?], [x.write(into[0])?, x.write(into[1])?]);
        let losses = [losses.write(1..2)?, losses.write(2..3)?];
        let flag = flag.view_mut();
        self.objective.pass(Pass::GradientPairDisplaced { displacement, points, gradients, losses, flag })
    }

    /// Losses number 1 and 2 and the gradients at two points that do not depend on each other.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_pair(&mut self, points: [Vector; 2], into: [Vector; 2]) -> Result<()> {
        let Numbers { losses, flag, .. } = &mut *self.numbers;
        let (mut x, mut losses) = (self.vectors.open()?, losses.disjoint());
        let weights = [x.read(points[0])?, x.read(points[1])?];
        let gradients = [x.write(into[0])?, x.write(into[1])?];
        let losses = [losses.write(1..2)?, losses.write(2..3)?];
        self.objective.gradient_pair(weights, gradients, losses, flag.view_mut())?;
        self.observe_turn(points[0], into[0])
    }

    /// Loss number 0 and the gradient at `points[0]`; and loss number 1 and the gradient at `points[1]` on the
    /// mini-batch that was [kept](Step::keep_batch) in the step before.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn gradient_across(&mut self, points: [Vector; 2], into: [Vector; 2]) -> Result<()> {
        let Numbers { losses, flag, .. } = &mut *self.numbers;
        let (mut x, mut losses) = (self.vectors.open()?, losses.disjoint());
        let weights = [x.read(points[0])?, x.read(points[1])?];
        let gradients = [x.write(into[0])?, x.write(into[1])?];
        let losses = [losses.write(0..1)?, losses.write(1..2)?];
        self.objective.pass(Pass::GradientAcross { weights, gradients, losses, flag: flag.view_mut() })
    }

    /// Keeps the mini-batch for [`Step::gradient_across`] in the next step, unless this step will be skipped because
    /// something was not finite. Called after the last pass.
    ///
    /// # Errors
    /// Those of the objective.
    pub fn keep_batch(&mut self) -> Result<()> {
        self.objective.pass(Pass::KeepBatch { skip: self.numbers.flag.view() })
    }

    /// `to = w − η along`, η the learning rate of the step. A method with such a point says so in
    /// [`Method::needs_base`](super::Method::needs_base).
    ///
    /// # Errors
    /// [`Error::Argument`] where groups of weights have rates of their own; [`Error::Range`] for a vector that is not
    /// there.
    pub fn descend(&mut self, along: Vector, to: Vector) -> Result<()> {
        let Some(lr) = self.lr else {
            let message = "the method needs one learning rate for all weights".into();
            return Err(Error::Argument { operation: "Step::descend", message });
        };
        let Numbers { inner, rows, .. } = &mut *self.numbers;
        let (factor, rate) = match lr {
            Rate::Fixed(lr) => (-lr, None),
            Rate::Device(rate) => (-1.0, Some(rate)),
            Rate::Scaled(rate, factor) => (-factor, Some(rate)),
        };
        sharpness::quotient(factor, rate, rows.slice(0..1)?, inner.slice_mut(0..2)?)?;
        let mut x = self.vectors.open()?;
        let vectors = [Some(x.weights), Some(x.read(along)?), None, None];
        sharpness::combine(Combination { vectors, coefficients: inner.view() }, 1.0, false, x.write(to)?, None)
    }

    /// In observed steps: the losses and the cosine between the gradients at `w` and at the perturbed point, whose loss
    /// is number 1.
    fn observe_turn(&mut self, point: Vector, into: Vector) -> Result<()> {
        if !self.observe || point != P || into != G1 {
            return Ok(());
        }
        let mut x = self.vectors.open()?;
        let gradients = [x.read(G0)?, x.read(G1)?];
        let Numbers { turned, climbed, losses, rows, .. } = &mut *self.numbers;
        climbed.view_mut().copy_from(losses.slice(0..2)?)?;
        let (a, b) = (rows.slice(0..4)?, rows.slice(4..8)?);
        sharpness::combined_products(&gradients, a, b, self.reduction, turned.view_mut())
    }

    /// The exact product of the Hessian at `point` with the vector `direction`.
    ///
    /// # Errors
    /// Those of the objective; [`Error::Argument`] where it has no exact product.
    pub fn hessian_vector(&mut self, point: Vector, direction: Vector, into: Vector) -> Result<()> {
        let mut x = self.vectors.open()?;
        let (point, direction, product) = (x.read(point)?, x.read(direction)?, x.write(into)?);
        self.objective.hessian_vector(point, direction, product, self.numbers.flag.view_mut())
    }

    /// Norm number `norm` becomes the L2 norm of a vector.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector or a number that is not there.
    pub fn norm(&mut self, vector: Vector, norm: usize) -> Result<()> {
        let mut x = self.vectors.open()?;
        vector::l2_norm(x.read(vector)?, self.reduction, self.numbers.norms.slice_mut(norm..norm + 1)?)
    }

    /// `to = from + ρ along/‖along‖`, where norm number `norm` is ‖along‖, and `other` on the other side. The schedule
    /// scales ρ. A negative ρ goes against the vector.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector or a number that is not there.
    pub fn perturb(
        &mut self,
        from: Vector,
        along: Vector,
        norm: usize,
        rho: f64,
        to: Vector,
        other: Option<Vector>,
    ) -> Result<()> {
        self.fixed_perturb(from, along, norm, rho * self.rho_factor, to, other)?;
        if self.observe && from == Weights {
            // Realised is what the objective sees of the perturbation once it has rounded the weights.
            let Numbers { realised, rows, .. } = &mut *self.numbers;
            let mut x = self.vectors.open()?;
            let (from, to, out) = (x.read(Weights)?, x.read(to)?, self.displacement.view_mut());
            self.objective.pass(Pass::RealizedStep { from, to, out })?;
            let vectors = [self.displacement.view(), x.read(along)?];
            let Row(b) = if rho < 0.0 { Row::AGAINST_SECOND } else { Row::SECOND };
            let (a, b) = (rows.slice(0..4)?, rows.slice(4 * b..4 * b + 4)?);
            sharpness::combined_products(&vectors, a, b, self.reduction, realised.view_mut())?;
        }
        Ok(())
    }

    /// As [`Step::perturb`], with a radius that no schedule scales.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector or a number that is not there.
    pub fn fixed_perturb(
        &mut self,
        from: Vector,
        along: Vector,
        norm: usize,
        rho: f64,
        to: Vector,
        other: Option<Vector>,
    ) -> Result<()> {
        let norm = self.numbers.norms.slice(norm..norm + 1)?;
        let (mut x, elsewhere) = self.vectors.open_in_parts(from, &[to, other.unwrap_or(to)])?;
        let (from, whole) = (x.read(from)?, x.read(along)?);
        let (mut to, mut other) = (x.write(to)?, other.map(|vector| x.write(vector)).transpose()?);
        for part in elsewhere.parts([along; 4], 0..whole.len()) {
            let along = elsewhere.slice(along, whole, part.clone())?;
            let other = other.as_mut().map(|other| other.slice_mut(part.clone())).transpose()?;
            let (from, to) = (from.slice(part.clone())?, to.slice_mut(part)?);
            vector::perturb_part(from, along, norm, rho, to, other, whole.len())?;
        }
        Ok(())
    }

    /// `to = w + ρ d/‖d‖`, where d is the combination of two vectors with the coefficients of a row. d is never stored.
    /// The schedule scales ρ.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector or a row that is not there.
    pub fn perturb_along(&mut self, vectors: [Vector; 2], row: Row, rho: f64, to: Vector) -> Result<()> {
        self.dot_products(&vectors, row, row)?;
        let mut x = self.vectors.open()?;
        let vectors = [Some(x.read(vectors[0])?), Some(x.read(vectors[1])?), None, None];
        let direction = Combination { vectors, coefficients: self.numbers.row(row)? };
        let (norm, rho) = (self.numbers.dot_products.slice(3..4)?, rho * self.rho_factor);
        sharpness::perturb_along(x.weights, direction, norm, rho, x.write(to)?)
    }

    /// `to = w + ρ z/‖z‖`, and `other` on the other side, z standard normal and drawn anew in each step and group. The
    /// schedule scales ρ.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector that is not there.
    pub fn perturb_randomly(&mut self, seed: u64, rho: f64, to: Vector, other: Option<Vector>) -> Result<()> {
        let n = self.vectors.weights.len();
        let first_block = self.draw * n.div_ceil(4) as u64;
        let norms = &mut self.numbers.norms;
        random::normal_norm(n, seed, first_block, self.reduction, norms.slice_mut(1..2)?)?;
        let mut x = self.vectors.open()?;
        let (norm, rho) = (norms.slice(1..2)?, rho * self.rho_factor);
        for (point, rho) in [(Some(to), rho), (other, -rho)] {
            let Some(point) = point else { continue };
            random::perturb_normal(x.weights, seed, first_block, norm, rho, x.write(point)?)?;
        }
        Ok(())
    }

    /// Dot products and norms of two combinations A and B of some vectors, to [`Numbers::dot_products`].
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are one to four vectors; [`Error::Range`] for a vector or a row that is not
    /// there.
    pub fn dot_products(&mut self, vectors: &[Vector], a: Row, b: Row) -> Result<()> {
        let mut x = self.vectors.open()?;
        let mut slices = [x.weights; 4];
        for (slice, vector) in slices.iter_mut().zip(vectors) {
            *slice = x.read(*vector)?;
        }
        let Numbers { dot_products, rows, .. } = &mut *self.numbers;
        let (a, b) = (rows.slice(4 * a.0..4 * a.0 + 4)?, rows.slice(4 * b.0..4 * b.0 + 4)?);
        let slices = &slices[..vectors.len().min(4)];
        sharpness::combined_products(slices, a, b, self.reduction, dot_products.view_mut())
    }

    /// `to = Σ c_k x_k` with the coefficients of a row.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector or a row that is not there.
    pub fn combine(&mut self, vectors: [Vector; 2], row: Row, to: Vector) -> Result<()> {
        let mut x = self.vectors.open()?;
        let vectors = [Some(x.read(vectors[0])?), Some(x.read(vectors[1])?), None, None];
        let combination = Combination { vectors, coefficients: self.numbers.row(row)? };
        sharpness::combine(combination, 1.0, false, x.write(to)?, None)
    }

    /// Copies a vector, unless this step will be skipped because something was not finite. With it a method updates its
    /// memory after its last pass.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector that is not there.
    pub fn keep(&mut self, from: Vector, to: Vector) -> Result<()> {
        let mut x = self.vectors.open()?;
        vector::commit(self.numbers.flag.view(), x.read(from)?, x.write(to)?)
    }

    /// Copies a vector in the first step that is taken, and does nothing in every later one.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector that is not there.
    pub fn initialize(&mut self, from: Vector, to: Vector) -> Result<()> {
        let mut x = self.vectors.open()?;
        vector::commit(self.taken, x.read(from)?, x.write(to)?)
    }

    /// The direction's coefficients become `1, weight, −weight`.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn weighted_difference(&mut self, weight: f64) -> Result<()> {
        let Numbers { rows, coefficients, .. } = &mut *self.numbers;
        let one = rows.slice(0..1)?;
        sharpness::quotient(-weight, None, one, coefficients.slice_mut(1..3)?)?;
        sharpness::quotient(weight, None, one, coefficients.slice_mut(0..2)?)
    }

    /// The direction's first two coefficients become `of_a` and `weight` times those of the part of B that is
    /// orthogonal to A, from the newest [dot products](Step::dot_products); see [`sharpness::rejection`].
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn rejection(&mut self, of_a: f64, weight: f64) -> Result<()> {
        let Numbers { dot_products, coefficients, .. } = &mut *self.numbers;
        sharpness::rejection(dot_products.view(), of_a, weight, coefficients.slice_mut(0..2)?)
    }

    /// `to` becomes the part of [`work::G1`] that is orthogonal to [`work::G0`], unless the step will be skipped.
    ///
    /// # Errors
    /// [`Error::Range`] for a vector that is not there.
    pub fn orthogonal(&mut self, to: Vector) -> Result<()> {
        self.dot_products(&[G0, G1], Row::FIRST, Row::SECOND)?;
        let Numbers { dot_products, inner, flag, .. } = &mut *self.numbers;
        sharpness::rejection(dot_products.view(), 0.0, 1.0, inner.slice_mut(0..2)?)?;
        let mut x = self.vectors.open()?;
        let vectors = [Some(x.read(G0)?), Some(x.read(G1)?), None, None];
        let orthogonal = Combination { vectors, coefficients: inner.view() };
        sharpness::combine(orthogonal, 1.0, false, x.write(to)?, Some(flag.view()))
    }

    /// The direction's first two coefficients become 1 and `factor` over norm number `norm`.
    ///
    /// # Errors
    /// [`Error::Range`] for a number that is not there.
    pub fn over_norm(&mut self, factor: f64, norm: usize) -> Result<()> {
        let Numbers { norms, coefficients, .. } = &mut *self.numbers;
        sharpness::quotient(factor, None, norms.slice(norm..norm + 1)?, coefficients.slice_mut(0..2)?)
    }
}
