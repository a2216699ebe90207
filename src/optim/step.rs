//! The family on one screen: a method is the points at which it takes gradients and the combination of them that it steps along,
//! written with a few verbs over vectors and numbers that lie on the device.

use super::method::{Gnr, Method, Perturbation, Product, Sam, StepSize};
use crate::arena::ALIGNMENT;
use crate::device::{Buffer, Device, Disjoint, Result, Scalar, Slice, SliceMut};
use crate::kernels::vector::{self, Combination, Reduction};
use crate::kernels::{random, sharpness};
use crate::objective::{Displacement, Objective, Statistics};

/// A vector: the weights, what a method remembers from step to step, or a working vector by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    Weights,
    Memory,
    Slot(usize),
}
use Point::{Memory, Slot, Weights};

// The working vectors by what they hold. A method that uses number k has k + 1 of them.
const G0: usize = 0; // the gradient at w
const P: usize = 1; // a perturbed point
const G1: usize = 2; // the gradient there
const Q: usize = 3; // a second point
const G2: usize = 4;
const G3: usize = 5;
const H: usize = 6;

/// The working vectors that a method needs.
pub(super) fn slots(method: Method) -> usize {
    1 + match method {
        Method::Plain => G0,
        Method::Sam(Sam { perturbation: Perturbation::Random { .. }, .. }) => P,
        Method::Sam(Sam { ascent_steps: 1, second_order: false, .. }) => G1,
        Method::Sam(_) => Q,
        Method::CrSam { .. } => G2,
        Method::Gnr(Gnr { oracle_rho: None, product: Product::Exact, .. }) => G2,
        Method::Gnr(_) => H,
        Method::Gam { .. } => G3,
        Method::SaSam(_) | Method::SaSgd(_) => G1,
        Method::Gsam { .. } | Method::LookSam { .. } | Method::RSam { .. } => G1,
    }
}

/// Rows of the table of coefficients that a method knows beforehand.
pub(super) type Row = usize;
const FIRST: Row = 0;
const SECOND: Row = 1;
const DIFFERENCE: Row = 2;
const SECOND_DIFFERENCE: Row = 3;
const OWN_A: Row = 4;
const OWN_B: Row = 5;

/// The table: rows of four.
pub(super) fn constants(method: Method) -> Vec<f64> {
    let (a, b) = match method {
        Method::Gam { terms, .. } => terms.combinations(),
        Method::Gnr(Gnr { rho, alpha, product: Product::Difference { radius }, .. }) => {
            let weight = alpha * rho / (2.0 * radius);
            ([1.0, weight, -weight, 0.0], [0.0; 4])
        }
        _ => ([0.0; 4], [0.0; 4]),
    };
    let (first, second) = ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]);
    [first, second, [1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0], a, b].concat()
}

/// Where the coefficients of a direction lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coefficients {
    Known(Row),
    Computed,
}

/// What a method steps along: `Σ c_k x_k` over the first `count` points, of which there is at least one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direction {
    pub points: [Point; 4],
    pub count: usize,
    pub coefficients: Coefficients,
}

impl Direction {
    fn new<const N: usize>(points: [Point; N], coefficients: Coefficients) -> Self {
        let mut all = [points[0]; 4];
        all[..N].copy_from_slice(&points);
        Self { points: all, count: N, coefficients }
    }
}

/// One vector as it is.
pub(super) fn along(slot: usize) -> Direction {
    Direction::new([Slot(slot)], Coefficients::Known(FIRST))
}

/// Vectors with the coefficients computed last.
fn combined<const N: usize>(points: [Point; N]) -> Result<Direction> {
    Ok(Direction::new(points, Coefficients::Computed))
}

// ---- The methods -------------------------------------------------------------------------------------------------------------

impl<T: Scalar, O: Objective<T>> Step<'_, T, O> {
    pub(super) fn direction(&mut self, method: Method) -> Result<Direction> {
        match method {
            Method::Plain => self.plain(),
            Method::Sam(settings) => self.sam(settings),
            Method::CrSam { rho, terms } => self.cr_sam(rho, terms),
            Method::Gnr(settings) => self.gnr(settings),
            Method::Gam { rho, rho_norm, terms } => self.gam(rho, rho_norm, terms),
            Method::SaSam(settings) => self.sa_sam(settings, true),
            Method::SaSgd(settings) => self.sa_sam(settings, false),
            Method::Gsam { rho, alpha } => self.gsam(rho, alpha),
            Method::LookSam { rho, alpha, every } => self.look_sam(rho, alpha, every),
            Method::RSam { rho, sigma, seed } => self.r_sam(rho, sigma, seed),
        }
    }

    fn plain(&mut self) -> Result<Direction> {
        self.gradient_and_norm(Weights, 0, G0, 0)?;
        Ok(along(G0))
    }

    fn sam(&mut self, Sam { rho, perturbation, ascent_steps, second_order }: Sam) -> Result<Direction> {
        if let Perturbation::Random { seed } = perturbation {
            self.perturb_randomly(seed, rho)?;
            self.gradient_and_norm(Slot(P), 0, G0, 0)?;
            return Ok(along(G0));
        }
        self.plain()?;
        match perturbation {
            Perturbation::Linf => {
                let rho = rho * self.rho_factor;
                let mut x = self.vectors.open();
                vector::perturb_linf(x.read(Weights)?, x.read(Slot(G0))?, rho, x.write(P)?, None)?;
                self.gradient(Slot(P), 1, G1)?;
            }
            Perturbation::Adaptive(scaling) => {
                let rho = rho * self.rho_factor;
                let mut x = self.vectors.open();
                let (w, g, norms) = (x.read(Weights)?, x.read(Slot(G0))?, &mut self.numbers.norms);
                sharpness::adaptive_norm(w, g, scaling, self.reduction, norms.slice_mut(1..2)?)?;
                sharpness::perturb_adaptive(w, g, scaling, norms.slice(1..2)?, rho, x.write(P)?)?;
                self.gradient(Slot(P), 1, G1)?;
            }
            _ if ascent_steps == 1 => self.gradient_beside(Weights, G0, 0, rho, 1, G1)?,
            _ => {
                self.ascend(rho, ascent_steps)?;
                self.gradient(Slot(P), 1, G1)?;
            }
        }
        if !second_order {
            return Ok(along(G1));
        }
        // d = g_adv − v vᵀg_adv takes the place of the perturbed point, H d that of the second.
        self.orthogonal(Some(P))?;
        self.hessian_vector(Weights, P, Q)?;
        self.over_norm(rho * self.rho_factor, 0)?;
        combined([Slot(G1), Slot(Q)])
    }

    fn cr_sam(&mut self, rho: f64, terms: super::CrSamTerms) -> Result<Direction> {
        self.plain()?;
        self.gradients_beside(rho, [G1, G2])?;
        let Numbers { losses, curvature, coefficients, flag, .. } = &mut *self.numbers;
        let (losses, dropped) = (losses.slice(0..3)?, self.counters.slice_mut(2..4)?);
        vector::curvature_from_losses(losses, rho * self.rho_factor, curvature.view_mut())?;
        vector::cr_sam_coefficients(losses, terms, coefficients.slice_mut(0..3)?, flag.view(), dropped)?;
        combined([Slot(G0), Slot(G1), Slot(G2)])
    }

    fn gnr(&mut self, Gnr { rho, product, every, oracle_rho, alpha }: Gnr) -> Result<Direction> {
        self.plain()?;
        let due = self.attempts.is_multiple_of(every);
        let mut oracle = G0;
        if let Some(rho) = oracle_rho {
            oracle = if due { H } else { G1 };
            self.gradient_beside(Weights, G0, 0, rho, 3, oracle)?;
        }
        if !due {
            return Ok(along(oracle));
        }
        match product {
            Product::Exact => {
                self.hessian_vector(Weights, G0, G1)?;
                self.norm(Slot(G1), 1)?;
                self.perturb(Weights, G1, 1, rho, P, None)?;
                self.gradient_and_norm(Slot(P), 1, G1, 1)?;
                self.hessian_vector(Slot(P), G1, G2)?;
                self.over_norm(alpha * rho, 1)?;
                combined([Slot(oracle), Slot(G2)])
            }
            Product::Difference { radius } => {
                self.fixed_perturb(Weights, G0, 0, radius, P, Some(Q))?;
                self.gradient_pair([Slot(P), Slot(Q)], [G1, G2])?;
                self.perturb_along_difference(G1, G2, rho, P)?;
                self.gradient_and_norm(Slot(P), 1, G1, 1)?;
                // The points of the second difference lie around w_adv, which is read once more for both.
                self.fixed_perturb(Slot(P), G1, 1, radius, Q, Some(G3))?;
                self.gradient_pair([Slot(Q), Slot(G3)], [G1, G2])?;
                Ok(Direction::new([Slot(oracle), Slot(G1), Slot(G2)], Coefficients::Known(OWN_A)))
            }
        }
    }

    fn gam(&mut self, rho: f64, rho_norm: f64, terms: super::GamTerms) -> Result<Direction> {
        self.plain()?;
        self.gradient_beside(Weights, G0, 0, rho, 1, G1)?;
        self.perturb_along_difference(G1, G0, rho_norm, Q)?;
        self.gradient_and_norm(Slot(Q), 2, G2, 1)?;
        self.gradient_beside(Slot(Q), G2, 1, rho, 3, G3)?;
        let gradients = [Slot(G0), Slot(G1), Slot(G2), Slot(G3)];
        self.products(&gradients, OWN_A, OWN_B)?;
        let Numbers { products, coefficients, .. } = &mut *self.numbers;
        sharpness::gam_coefficients(products.view(), terms, coefficients.view_mut())?;
        combined(gradients)
    }

    fn sa_sam(&mut self, StepSize { delta, .. }: StepSize, perturb: bool) -> Result<Direction> {
        // Before the first step that is taken there is no earlier point but this one.
        let taken = self.counters.slice(0..1)?;
        self.vectors.remember(taken)?;
        self.plain()?;
        self.gradient(Memory, 2, G1)?;
        self.products(&[Weights, Memory, Slot(G0), Slot(G1)], DIFFERENCE, SECOND_DIFFERENCE)?;
        let Numbers { products, norms, rates, .. } = &mut *self.numbers;
        let state = self.scalars.view();
        sharpness::adgd_rates(products.view(), norms.slice(0..1)?, state, delta, rates.view_mut())?;
        if perturb {
            let mut x = self.vectors.open();
            let (w, g, out) = (x.read(Weights)?, x.read(Slot(G0))?, x.write(P)?);
            vector::perturb(w, g, self.numbers.rates.slice(3..4)?, 1.0, out, None)?;
            self.gradient(Slot(P), 1, G1)?;
        }
        let (rates, skip) = (self.numbers.rates.view(), self.numbers.flag.view());
        sharpness::adgd_commit(rates, skip, self.scalars.view_mut())?;
        self.vectors.remember(skip)?;
        Ok(along(if perturb { G1 } else { G0 }))
    }

    fn gsam(&mut self, rho: f64, alpha: f64) -> Result<Direction> {
        self.plain()?;
        self.gradient_beside(Weights, G0, 0, rho, 1, G1)?;
        self.products(&[Slot(G1), Slot(G0)], FIRST, SECOND)?;
        self.rejection(1.0, -alpha, Aim::Direction)?;
        combined([Slot(G1), Slot(G0)])
    }

    fn look_sam(&mut self, rho: f64, alpha: f64, every: u64) -> Result<Direction> {
        self.plain()?;
        if !self.attempts.is_multiple_of(every) {
            let Numbers { norms, coefficients, .. } = &mut *self.numbers;
            let (norm, kept) = (norms.slice(0..1)?, self.scalars.slice(0..1)?);
            sharpness::quotient(alpha, Some(norm), kept, coefficients.slice_mut(0..2)?)?;
            return combined([Slot(G0), Memory]);
        }
        self.gradient_beside(Weights, G0, 0, rho, 1, G1)?;
        self.orthogonal(None)?;
        vector::l2_norm(self.vectors.open().read(Memory)?, self.reduction, self.scalars.slice_mut(0..1)?)?;
        Ok(along(G1))
    }

    fn r_sam(&mut self, rho: f64, sigma: f64, seed: u64) -> Result<Direction> {
        self.perturb_randomly(seed, sigma)?;
        self.gradient_and_norm(Slot(P), 0, G0, 0)?;
        self.gradient_beside(Weights, G0, 0, rho, 1, G1)?;
        Ok(along(G1))
    }
}

// ---- The verbs ---------------------------------------------------------------------------------------------------------------

/// The few numbers of a step, on the device.
pub(super) struct Numbers {
    /// L at w, and at the further points in a method's order.
    pub losses: Buffer<f64>,
    /// The mean of the first over the groups of a mini-batch.
    pub mean_loss: Buffer<f64>,
    /// ‖g(w)‖, and another norm.
    pub norms: Buffer<f64>,
    /// The newest products.
    pub products: Buffer<f64>,
    /// The coefficients of the direction, and those of a vector on the way to it.
    pub coefficients: Buffer<f64>,
    pub inner: Buffer<f64>,
    /// A, B, vᵀHv.
    pub curvature: Buffer<f64>,
    /// η, ρ, θ, ‖g‖/ρ of SA-SAM.
    pub rates: Buffer<f64>,
    /// Products of the realised with the intended perturbation, and of g with g+, where they were asked for.
    pub realised: Buffer<f64>,
    pub turned: Buffer<f64>,
    /// The table of [`constants`].
    pub constants: Buffer<f64>,
    /// Whether some loss or gradient of this step was not finite.
    pub flag: Buffer<u32>,
}

impl Numbers {
    pub fn new(device: &Device, method: Method) -> Result<Self> {
        Ok(Self {
            losses: device.zeros(4)?,
            mean_loss: device.zeros(1)?,
            norms: device.zeros(2)?,
            products: device.zeros(sharpness::PRODUCTS)?,
            coefficients: device.zeros(4)?,
            inner: device.zeros(4)?,
            curvature: device.zeros(3)?,
            rates: device.zeros(4)?,
            realised: device.zeros(sharpness::PRODUCTS)?,
            turned: device.zeros(sharpness::PRODUCTS)?,
            constants: device.upload(&constants(method))?,
            flag: device.zeros(1)?,
        })
    }
}

/// A row of the table of [`constants`].
pub(super) fn row(constants: &Buffer<f64>, row: Row) -> Result<Slice<'_, f64>> {
    constants.slice(4 * row..4 * row + 4)
}

/// Where a working vector lies in the arena of `len`-element vectors: apart by whole cache lines.
pub(super) fn place(slot: usize, len: usize) -> std::ops::Range<usize> {
    let start = slot * len.next_multiple_of(ALIGNMENT);
    start..start + len
}

/// All vectors of a step.
pub(super) struct Store<'a, T: Scalar> {
    pub arena: &'a mut Buffer<T>,
    pub weights: Slice<'a, T>,
    pub memory: &'a mut Buffer<T>,
}

impl<T: Scalar> Store<'_, T> {
    /// Those that one kernel reads and writes are taken from here.
    fn open(&mut self) -> Vectors<'_, T> {
        Vectors { arena: self.arena.disjoint(), weights: self.weights, memory: self.memory.disjoint() }
    }

    /// The memory becomes w, unless `skip` is set.
    fn remember(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        vector::commit(skip, self.weights, self.memory.view_mut())
    }
}

/// The vectors that one kernel reads and writes.
struct Vectors<'a, T: Scalar> {
    arena: Disjoint<'a, T>,
    weights: Slice<'a, T>,
    memory: Disjoint<'a, T>,
}

impl<'a, T: Scalar> Vectors<'a, T> {
    fn read(&mut self, point: Point) -> Result<Slice<'a, T>> {
        match point {
            Weights => Ok(self.weights),
            Memory => self.memory.read(0..self.weights.len()),
            Slot(slot) => self.arena.read(place(slot, self.weights.len())),
        }
    }

    fn write(&mut self, slot: usize) -> Result<SliceMut<'a, T>> {
        self.arena.write(place(slot, self.weights.len()))
    }
}

/// Which coefficients are computed: those of the direction, or of a vector on the way to it.
#[derive(PartialEq)]
enum Aim {
    Direction,
    Inner,
}

/// One step under way.
pub(super) struct Step<'a, T: Scalar, O> {
    pub objective: &'a mut O,
    pub vectors: Store<'a, T>,
    pub numbers: &'a mut Numbers,
    /// What the optimizer's [`State`](super::State) holds beside vectors.
    pub scalars: &'a mut Buffer<f64>,
    pub counters: &'a mut Buffer<u32>,
    pub attempts: u64,
    /// The number of this step's random direction.
    pub draw: u64,
    pub reduction: &'a mut Reduction,
    /// What the schedule makes of ρ.
    pub rho_factor: f64,
    /// Whether the cosines of the telemetry are wanted.
    pub observe: bool,
    /// What the objective sees of a perturbation; empty until a step is observed.
    pub displacement: &'a mut Buffer<T>,
}

/// Whether the running statistics follow the pass of this loss.
fn followed_by_statistics(loss: usize) -> Statistics {
    if loss == 0 { Statistics::Update } else { Statistics::Keep }
}

impl<T: Scalar, O: Objective<T>> Step<'_, T, O> {
    /// Loss number `loss` and the gradient at `point`. The first loss is the one that is reported, and its pass the one that the
    /// running statistics follow.
    fn gradient(&mut self, point: Point, loss: usize, into: usize) -> Result<()> {
        let Numbers { losses, flag, .. } = &mut *self.numbers;
        let mut x = self.vectors.open();
        let (weights, gradient) = (x.read(point)?, x.write(into)?);
        let loss_value = losses.slice_mut(loss..loss + 1)?;
        self.objective.gradient(weights, followed_by_statistics(loss), gradient, loss_value, flag.view_mut())?;
        self.observe_turn(point, into)
    }

    /// The same, with norm number `norm` of the gradient.
    fn gradient_and_norm(&mut self, point: Point, loss: usize, into: usize, norm: usize) -> Result<()> {
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let mut x = self.vectors.open();
        let (weights, gradient) = (x.read(point)?, x.write(into)?);
        let loss_value = losses.slice_mut(loss..loss + 1)?;
        let (statistics, norm) = (followed_by_statistics(loss), norms.slice_mut(norm..norm + 1)?);
        let flag = flag.view_mut();
        self.objective.gradient_and_norm(weights, statistics, gradient, loss_value, flag, self.reduction, norm)?;
        self.observe_turn(point, into)
    }

    /// Loss number `loss` and the gradient at `from + ρ x/norm`, x the vector `along`. P is room for that point.
    fn gradient_beside(
        &mut self,
        from: Point,
        along: usize,
        norm: usize,
        rho: f64,
        loss: usize,
        into: usize,
    ) -> Result<()> {
        if self.observe {
            self.perturb(from, along, norm, rho, P, None)?;
            return self.gradient(Slot(P), loss, into);
        }
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let mut x = self.vectors.open();
        let (norm, rho) = (norms.slice(norm..norm + 1)?, rho * self.rho_factor);
        let displacement = Displacement { from: x.read(from)?, along: x.read(Slot(along))?, norm, rho };
        let (point, gradient, loss) = (x.write(P)?, x.write(into)?, losses.slice_mut(loss..loss + 1)?);
        self.objective.gradient_displaced(displacement, point, gradient, loss, flag.view_mut())
    }

    /// Losses number 1 and 2 and the gradients on both sides of w, at `w ± ρ v`. P and Q are room for these points.
    fn gradients_beside(&mut self, rho: f64, into: [usize; 2]) -> Result<()> {
        if self.observe {
            self.perturb(Weights, G0, 0, rho, P, Some(Q))?;
            return self.gradient_pair([Slot(P), Slot(Q)], into);
        }
        let Numbers { losses, norms, flag, .. } = &mut *self.numbers;
        let (mut x, mut losses) = (self.vectors.open(), losses.disjoint());
        let (norm, rho) = (norms.slice(0..1)?, rho * self.rho_factor);
        let displacement = Displacement { from: x.read(Weights)?, along: x.read(Slot(G0))?, norm, rho };
        let (points, gradients) = ([x.write(P)?, x.write(Q)?], [x.write(into[0])?, x.write(into[1])?]);
        let losses = [losses.write(1..2)?, losses.write(2..3)?];
        self.objective.gradient_pair_displaced(displacement, points, gradients, losses, flag.view_mut())
    }

    /// Losses number 1 and 2 and the gradients at two points, which do not depend on one another.
    fn gradient_pair(&mut self, points: [Point; 2], into: [usize; 2]) -> Result<()> {
        let Numbers { losses, flag, .. } = &mut *self.numbers;
        let (mut x, mut losses) = (self.vectors.open(), losses.disjoint());
        let weights = [x.read(points[0])?, x.read(points[1])?];
        let gradients = [x.write(into[0])?, x.write(into[1])?];
        let losses = [losses.write(1..2)?, losses.write(2..3)?];
        self.objective.gradient_pair(weights, gradients, losses, flag.view_mut())?;
        self.observe_turn(points[0], into[0])
    }

    /// Where it is asked for: how far the gradient at the perturbed point has turned.
    fn observe_turn(&mut self, point: Point, into: usize) -> Result<()> {
        if !self.observe || point != Slot(P) || into != G1 {
            return Ok(());
        }
        let mut x = self.vectors.open();
        let Numbers { turned, constants, .. } = &mut *self.numbers;
        let gradients = [x.read(Slot(G0))?, x.read(Slot(G1))?];
        let (a, b) = (row(constants, FIRST)?, row(constants, SECOND)?);
        sharpness::combined_products(&gradients, a, b, self.reduction, turned.view_mut())
    }

    /// The Hessian at `point` times the vector `direction`, exactly.
    fn hessian_vector(&mut self, point: Point, direction: usize, into: usize) -> Result<()> {
        let mut x = self.vectors.open();
        let (point, direction, product) = (x.read(point)?, x.read(Slot(direction))?, x.write(into)?);
        self.objective.hessian_vector(point, direction, product, self.numbers.flag.view_mut())
    }

    /// Norm number `norm` of a vector.
    fn norm(&mut self, point: Point, norm: usize) -> Result<()> {
        let mut x = self.vectors.open();
        vector::l2_norm(x.read(point)?, self.reduction, self.numbers.norms.slice_mut(norm..norm + 1)?)
    }

    /// `to = from + ρ x/norm`, x the vector `along`, and `other` on the other side.
    fn perturb(
        &mut self,
        from: Point,
        along: usize,
        norm: usize,
        rho: f64,
        to: usize,
        other: Option<usize>,
    ) -> Result<()> {
        self.fixed_perturb(from, along, norm, rho * self.rho_factor, to, other)?;
        if self.observe && from == Weights {
            // Realised is what the objective sees of ε once weights are rounded.
            let Numbers { realised, constants, .. } = &mut *self.numbers;
            let mut x = self.vectors.open();
            self.objective.displacement(x.read(Weights)?, x.read(Slot(to))?, self.displacement.view_mut())?;
            let vectors = [self.displacement.view(), x.read(Slot(along))?];
            let (a, b) = (row(constants, FIRST)?, row(constants, SECOND)?);
            sharpness::combined_products(&vectors, a, b, self.reduction, realised.view_mut())?;
        }
        Ok(())
    }

    /// The same with a radius that no schedule moves.
    fn fixed_perturb(
        &mut self,
        from: Point,
        along: usize,
        norm: usize,
        rho: f64,
        to: usize,
        other: Option<usize>,
    ) -> Result<()> {
        let norm = self.numbers.norms.slice(norm..norm + 1)?;
        let mut x = self.vectors.open();
        let (from, along) = (x.read(from)?, x.read(Slot(along))?);
        let (to, other) = (x.write(to)?, other.map(|slot| x.write(slot)).transpose()?);
        vector::perturb(from, along, norm, rho, to, other)
    }

    /// `to = w + ρ d/‖d‖`, d the vector `a` less the vector `b`, which is never stored.
    fn perturb_along_difference(&mut self, a: usize, b: usize, rho: f64, to: usize) -> Result<()> {
        self.products(&[Slot(a), Slot(b)], DIFFERENCE, DIFFERENCE)?;
        let Numbers { products, constants, .. } = &mut *self.numbers;
        let mut x = self.vectors.open();
        let vectors = [Some(x.read(Slot(a))?), Some(x.read(Slot(b))?), None, None];
        let difference = Combination { vectors, coefficients: row(constants, DIFFERENCE)? };
        let rho = rho * self.rho_factor;
        sharpness::perturb_along(x.weights, difference, products.slice(3..4)?, rho, x.write(to)?)
    }

    /// `P = w + ρ z/‖z‖`, z normal and another in each step and group.
    fn perturb_randomly(&mut self, seed: u64, rho: f64) -> Result<()> {
        let n = self.vectors.weights.len();
        let first_block = self.draw * n.div_ceil(4) as u64;
        let norms = &mut self.numbers.norms;
        random::normal_norm(n, seed, first_block, self.reduction, norms.slice_mut(1..2)?)?;
        let mut x = self.vectors.open();
        let (norm, rho) = (norms.slice(1..2)?, rho * self.rho_factor);
        random::perturb_normal(x.weights, seed, first_block, norm, rho, x.write(P)?)
    }

    /// K steps of projected ascent, each of length ρ, from w onto the ball of radius ρ around it.
    fn ascend(&mut self, rho: f64, steps: usize) -> Result<()> {
        let rho = rho * self.rho_factor;
        for step in 0..steps {
            let first = step == 0;
            if !first {
                self.gradient(Slot(P), 1, G1)?;
                self.products(&[Slot(Q), Slot(G1)], FIRST, SECOND)?;
            }
            let Numbers { norms, products, inner, .. } = &mut *self.numbers;
            let products = (!first).then(|| products.view());
            sharpness::ascent_coefficients(norms.slice(0..1)?, products, rho, rho, inner.slice_mut(0..2)?)?;
            let mut x = self.vectors.open();
            let gradient = x.read(Slot(if first { G0 } else { G1 }))?;
            let (displacement, out) = (x.write(Q)?, x.write(P)?);
            let ends = (first, step + 1 == steps);
            sharpness::ascend(x.weights, gradient, displacement, inner.slice(0..2)?, out, ends)?;
        }
        Ok(())
    }

    /// The products of two combinations of some vectors.
    fn products(&mut self, points: &[Point], a: Row, b: Row) -> Result<()> {
        let Numbers { products, constants, .. } = &mut *self.numbers;
        let mut x = self.vectors.open();
        let mut vectors = [x.weights; 4];
        for (vector, point) in vectors.iter_mut().zip(points) {
            *vector = x.read(*point)?;
        }
        let (a, b) = (row(constants, a)?, row(constants, b)?);
        sharpness::combined_products(&vectors[..points.len()], a, b, self.reduction, products.view_mut())
    }

    /// Coefficients of the newest products' A and B; see [`sharpness::rejection`].
    fn rejection(&mut self, of_a: f64, weight: f64, aim: Aim) -> Result<()> {
        let Numbers { products, coefficients, inner, .. } = &mut *self.numbers;
        let into = if aim == Aim::Direction { coefficients } else { inner };
        sharpness::rejection(products.view(), of_a, weight, into.slice_mut(0..2)?)
    }

    /// The part of g+ that is orthogonal to g, into a working vector or else the memory; not where the step will be skipped.
    fn orthogonal(&mut self, into: Option<usize>) -> Result<()> {
        self.products(&[Slot(G0), Slot(G1)], FIRST, SECOND)?;
        self.rejection(0.0, 1.0, Aim::Inner)?;
        let Numbers { inner, flag, .. } = &*self.numbers;
        let mut x = self.vectors.open();
        let vectors = [Some(x.read(Slot(G0))?), Some(x.read(Slot(G1))?), None, None];
        let out = match into {
            Some(slot) => x.write(slot)?,
            None => x.memory.write(0..x.weights.len())?,
        };
        let orthogonal = Combination { vectors, coefficients: inner.view() };
        sharpness::combine(orthogonal, 1.0, false, out, Some(flag.view()))
    }

    /// The direction's coefficients 1 and `factor`/norm number `norm`.
    fn over_norm(&mut self, factor: f64, norm: usize) -> Result<()> {
        let Numbers { norms, coefficients, .. } = &mut *self.numbers;
        sharpness::quotient(factor, None, norms.slice(norm..norm + 1)?, coefficients.slice_mut(0..2)?)
    }
}
