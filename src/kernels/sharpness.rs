//! Operations of the sharpness-aware methods beyond those of [`super::vector`]: products of combined vectors, points
//! displaced along them, and the formulas that compute coefficients from norms and products, all on the device. Traffic
//! is in bytes per element for `f32`.
//!
//! Sources: ASAM is Kwon et al. 2021, "ASAM: Adaptive Sharpness-Aware Minimization"; GSAM is Zhuang et al. 2022,
//! "Surrogate Gap Minimization Improves Sharpness-Aware Training"; LookSAM is Liu et al. 2022, "Towards Efficient and
//! Scalable Sharpness-Aware Minimization"; GAM is Zhang et al. 2023, "Gradient Norm Aware Minimization"; AdGD is
//! Malitsky and Mishchenko 2020, "Adaptive Gradient Descent without Descent".

use super::vector::{Combination, Rate, Reduction, one_block, pack};
use super::{Check, pick};
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{
    AdaptiveArgs, AdgdCommitArgs, AdgdRatesArgs, AscendArgs, AscentArgs, ClipArgs, CombineArgs, CombinedProductsArgs,
    FinishProductsArgs, GamArgs, PerturbAlongArgs, QuotientArgs, RejectionArgs,
};
use crate::device::constants::{self, MAX_TERMS};
use crate::device::{Launch, Result, Scalar, Slice, SliceMut, id};

/// The number of results of [`combined_products`]: A·A, A·B, B·B, ‖A‖, ‖B‖.
pub const PRODUCTS: usize = constants::PRODUCTS;

/// With `A = Σ a_k x_k` and `B = Σ b_k x_k`, `out` receives A·A, A·B, B·B, ‖A‖ and ‖B‖, computed and summed in double.
/// `a` and `b` hold four coefficients each, on the device. Traffic: 4 B per element and vector.
///
/// # Errors
/// [`Error::Argument`] unless there are one to four vectors; [`Error::Length`] unless they are equally long, `a` and
/// `b` hold 4 numbers and `out` 5; [`Error::OtherDevice`] unless all live on the reduction's device.
pub fn combined_products<T: Scalar>(
    vectors: &[Slice<'_, T>],
    a: Slice<'_, f64>,
    b: Slice<'_, f64>,
    reduction: &mut Reduction,
    mut out: SliceMut<'_, f64>,
) -> Result<()> {
    let (device, partials) = reduction.parts();
    let check = Check { operation: "sharpness::combined_products", device: &device };
    let kernel = match vectors.len() {
        1 => pick::<T, _>(id::COMBINED_PRODUCTS1_F32, id::COMBINED_PRODUCTS1_F64),
        2 => pick::<T, _>(id::COMBINED_PRODUCTS2_F32, id::COMBINED_PRODUCTS2_F64),
        3 => pick::<T, _>(id::COMBINED_PRODUCTS3_F32, id::COMBINED_PRODUCTS3_F64),
        4 => pick::<T, _>(id::COMBINED_PRODUCTS4_F32, id::COMBINED_PRODUCTS4_F64),
        count => return check.refuse(format!("{count} vectors, expected 1 to 4")),
    };
    let n = vectors[0].len();
    let mut addresses = [0; MAX_TERMS];
    for (address, &vector) in addresses.iter_mut().zip(vectors) {
        check.argument("vectors", vector, n)?;
        *address = vector.address();
    }
    check.argument("a", a, 4)?;
    check.argument("b", b, 4)?;
    check.argument("out", out.view(), PRODUCTS)?;
    let args = CombinedProductsArgs { vectors: addresses, a: a.address(), b: b.address(), partials, n: n as u64 };
    let shape = device.elementwise(n, pack::<T>());
    let finish = FinishProductsArgs { partials, out: out.address(), count: u64::from(shape.grid[0]) };
    // SAFETY: the vectors that the kernel reads hold n elements each, the partial sums have room for three of each
    // block, and `out` holds five numbers.
    unsafe {
        device.launch(kernel, shape, &args)?;
        device.launch(id::FINISH_PRODUCTS, one_block(&device), &finish)
    }
}

/// `out = weight · Σ c_k x_k`, or, with `add`, `out += weight · Σ c_k x_k`. Nothing is written if `skip` (one number)
/// is given and not zero. The weight is a number, one on the device, or so many times that. Traffic: 4 B per element
/// and vector, 4 B to write and 4 B more to add.
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `out`, [`Error::OtherDevice`] unless all live on one device,
/// [`Error::Argument`] for an empty combination.
pub fn combine<'r, T: Scalar>(
    combination: Combination<'_, T>,
    weight: impl Into<Rate<'r>>,
    add: bool,
    mut out: SliceMut<'_, T>,
    skip: Option<Slice<'_, u32>>,
) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let check = Check { operation: "sharpness::combine", device: &device };
    let (combination, count) = combination.args(check, n)?;
    if let Some(skip) = skip {
        check.argument("skip", skip, 1)?;
    }
    let kernel = match count {
        1 => pick::<T, _>(id::COMBINE1_F32, id::COMBINE1_F64),
        2 => pick::<T, _>(id::COMBINE2_F32, id::COMBINE2_F64),
        3 => pick::<T, _>(id::COMBINE3_F32, id::COMBINE3_F64),
        _ => pick::<T, _>(id::COMBINE4_F32, id::COMBINE4_F64),
    };
    let skip = skip.map_or(0, |skip| skip.address());
    let (weight_on_device, weight) = weight.into().args(check)?;
    let args =
        CombineArgs { combination, out: out.address(), skip, weight_on_device, n: n as u64, weight, add: add.into() };
    // SAFETY: every vector holds n elements, and `count` of them are set. A weight on the device is one number.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// `out = w + ρ d/(norm + 1e-12)` with `d = Σ c_k x_k` of two vectors: a point displaced along a difference of
/// gradients that is never stored. Traffic: 16 B per element.
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `out` and `norm` holds one number, [`Error::OtherDevice`] unless
/// all live on one device, [`Error::Argument`] unless the combination has two vectors.
pub fn perturb_along<T: Scalar>(
    w: Slice<'_, T>,
    direction: Combination<'_, T>,
    norm: Slice<'_, f64>,
    rho: f64,
    mut out: SliceMut<'_, T>,
) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let check = Check { operation: "sharpness::perturb_along", device: &device };
    let (direction, count) = direction.args(check, n)?;
    if count != 2 {
        return check.refuse(format!("a direction of {count} vectors, expected 2"));
    }
    check.argument("w", w, n)?;
    check.argument("norm", norm, 1)?;
    let args =
        PerturbAlongArgs { direction, w: w.address(), norm: norm.address(), out: out.address(), n: n as u64, rho };
    let kernel = pick::<T, _>(id::PERTURB_ALONG2_F32, id::PERTURB_ALONG2_F64);
    // SAFETY: every vector holds n elements.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// One step of an ascent: `ε = c_0 ε + c_1 g`, `out = w + ε`. The `first` step has no ε yet and does not read
/// `displacement`; the `last` step does not write it. Traffic: 12 B per element, and 4 B each if ε is read and if it is
/// written.
///
/// # Errors
/// [`Error::Length`] unless all vectors are equally long and `coefficients` holds two numbers, [`Error::OtherDevice`]
/// unless all live on one device.
pub fn ascend<T: Scalar>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    mut displacement: SliceMut<'_, T>,
    coefficients: Slice<'_, f64>,
    mut out: SliceMut<'_, T>,
    (first, last): (bool, bool),
) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let check = Check { operation: "sharpness::ascend", device: &device };
    check.argument("w", w, n)?;
    check.argument("g", g, n)?;
    check.argument("displacement", displacement.view(), n)?;
    check.argument("coefficients", coefficients, 2)?;
    let args = AscendArgs {
        w: w.address(),
        g: g.address(),
        displacement: displacement.address(),
        out: out.address(),
        coefficients: coefficients.address(),
        n: n as u64,
        first: first.into(),
        last: last.into(),
    };
    // SAFETY: every vector holds n elements.
    unsafe { device.launch(pick::<T, _>(id::ASCEND_F32, id::ASCEND_F64), device.elementwise(n, pack::<T>()), &args) }
}

/// ASAM's scaling of the ball: `T = |w| + η` for the first `scaled_len` elements, `T = 1` for the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// η, by default 0.01.
    pub eta: f64,
    /// The number of weights that are scaled. Biases and the parameters of normalisation follow them.
    pub scaled_len: usize,
}

impl AdaptiveArgs {
    fn new<T: Scalar>(check: Check<'_>, w: Slice<'_, T>, g: Slice<'_, T>, scaling: Scaling) -> Result<Self> {
        let n = w.len();
        check.device("w", w.device())?;
        check.argument("g", g, n)?;
        let scaled_len = scaling.scaled_len.min(n) as u64;
        let (w, g, n, eta) = (w.address(), g.address(), n as u64, scaling.eta);
        Ok(Self { w, g, norm: 0, out: 0, partials: 0, n, scaled_len, rho: 0.0, eta })
    }
}

/// `norm[0] = ‖T g‖`. Traffic: 8 B per element.
///
/// # Errors
/// [`Error::Length`] unless `g` is as long as `w` and `norm` holds one number, [`Error::OtherDevice`] unless all live
/// on the reduction's device.
pub fn adaptive_norm<T: Scalar>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    scaling: Scaling,
    reduction: &mut Reduction,
    norm: SliceMut<'_, f64>,
) -> Result<()> {
    let (device, partials) = reduction.parts();
    let check = Check { operation: "sharpness::adaptive_norm", device: &device };
    let args = AdaptiveArgs { partials, ..AdaptiveArgs::new(check, w, g, scaling)? };
    let shape = device.elementwise(w.len(), pack::<T>());
    // SAFETY: both vectors hold n elements, and there is room for the sum of each block.
    unsafe { device.launch(pick::<T, _>(id::ADAPTIVE_SQUARES_F32, id::ADAPTIVE_SQUARES_F64), shape, &args)? };
    reduction.finish_norm(check.operation, shape, norm)
}

/// `out = w + ρ T² g/(norm + 1e-12)` with the norm of [`adaptive_norm`]. Traffic: 12 B per element. [ASAM, eq. 5]
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `out` and `norm` holds one number, [`Error::OtherDevice`] unless
/// all live on one device.
pub fn perturb_adaptive<T: Scalar>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    scaling: Scaling,
    norm: Slice<'_, f64>,
    rho: f64,
    mut out: SliceMut<'_, T>,
) -> Result<()> {
    let device = out.device().clone();
    let check = Check { operation: "sharpness::perturb_adaptive", device: &device };
    check.argument("out", out.view(), w.len())?;
    check.argument("norm", norm, 1)?;
    let args = AdaptiveArgs::new(check, w, g, scaling)?;
    let args = AdaptiveArgs { norm: norm.address(), out: out.address(), rho, ..args };
    let kernel = pick::<T, _>(id::PERTURB_ADAPTIVE_F32, id::PERTURB_ADAPTIVE_F64);
    // SAFETY: every vector holds n elements.
    unsafe { device.launch(kernel, device.elementwise(w.len(), pack::<T>()), &args) }
}

// ---- Formulas for a few numbers, each a kernel of one thread --------------------------------------------------------

/// `coefficients = 1, factor · numerator/(denominator + 1e-12)`. Without a numerator, it is 1.
///
/// # Errors
/// [`Error::Length`] unless `coefficients` holds two numbers and the others one, [`Error::OtherDevice`] unless all live
/// on one device.
pub fn quotient(
    factor: f64,
    numerator: Option<Slice<'_, f64>>,
    denominator: Slice<'_, f64>,
    mut coefficients: SliceMut<'_, f64>,
) -> Result<()> {
    let device = coefficients.device().clone();
    let check = Check { operation: "sharpness::quotient", device: &device };
    check.argument("denominator", denominator, 1)?;
    if let Some(numerator) = numerator {
        check.argument("numerator", numerator, 1)?;
    }
    check.argument("coefficients", coefficients.view(), 2)?;
    let numerator = numerator.map_or(0, |number| number.address());
    let (denominator, coefficients) = (denominator.address(), coefficients.address());
    let args = QuotientArgs { numerator, denominator, coefficients, factor };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::QUOTIENT, Launch::new(1, 1), &args) }
}

/// `of_a · A + weight · (B − A (A·B)/(A·A))` as coefficients of A and B, from their [`combined_products`]. The second
/// term is the part of B that is orthogonal to A. For GSAM's direction, `A = g+`, `B = g0`, `of_a = 1` and `weight =
/// −α`. For LookSAM's orthogonal part, `A = g0`, `B = g+`, `of_a = 0` and `weight = 1`.
///
/// # Errors
/// [`Error::Length`] unless `products` holds 5 numbers and `coefficients` two, [`Error::OtherDevice`] unless they live
/// on one device.
pub fn rejection(products: Slice<'_, f64>, of_a: f64, weight: f64, mut coefficients: SliceMut<'_, f64>) -> Result<()> {
    let device = coefficients.device().clone();
    let check = Check { operation: "sharpness::rejection", device: &device };
    check.argument("products", products, PRODUCTS)?;
    check.argument("coefficients", coefficients.view(), 2)?;
    let args = RejectionArgs { products: products.address(), coefficients: coefficients.address(), of_a, weight };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::REJECTION, Launch::new(1, 1), &args) }
}

/// GAM's hyper-parameters; `β2 = 1 − β0` and `β3 = 1 − β1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GamTerms {
    /// β0.
    pub beta0: f64,
    /// β1.
    pub beta1: f64,
    /// γ.
    pub gamma: f64,
}

impl GamTerms {
    /// The coefficients of `m = g0 + |β2| g2` and of `G = β1 g1 + β3 g3` over g0 … g3.
    pub fn combinations(&self) -> ([f64; 4], [f64; 4]) {
        ([1.0, 0.0, (1.0 - self.beta0).abs(), 0.0], [0.0, self.beta1, 0.0, 1.0 - self.beta1])
    }
}

/// `G − γ (m − G (m·G)/(G·G))` as coefficients of g0 … g3, from the [`combined_products`] of the two combinations of
/// [`GamTerms::combinations`]. [the authors' code]
///
/// # Errors
/// [`Error::Length`] unless `products` holds 5 numbers and `coefficients` four, [`Error::OtherDevice`] unless they live
/// on one device.
pub fn gam_coefficients(products: Slice<'_, f64>, terms: GamTerms, mut coefficients: SliceMut<'_, f64>) -> Result<()> {
    let device = coefficients.device().clone();
    let check = Check { operation: "sharpness::gam_coefficients", device: &device };
    check.argument("products", products, PRODUCTS)?;
    check.argument("coefficients", coefficients.view(), 4)?;
    let args = GamArgs {
        products: products.address(),
        coefficients: coefficients.address(),
        beta1: terms.beta1,
        beta2: 1.0 - terms.beta0,
        beta3: 1.0 - terms.beta1,
        gamma: terms.gamma,
    };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::GAM_COEFFICIENTS, Launch::new(1, 1), &args) }
}

/// The coefficients of [`ascend`]: a step of length `step` along the gradient, then a projection onto the ball of
/// radius `rho` if it leaves the ball. The first step needs only the gradient's `norm`, later ones the
/// [`combined_products`] of displacement and gradient.
///
/// # Errors
/// [`Error::Length`] unless `norm` holds one number, `products` 5 and `coefficients` two, [`Error::OtherDevice`] unless
/// they live on one device.
pub fn ascent_coefficients(
    norm: Slice<'_, f64>,
    products: Option<Slice<'_, f64>>,
    rho: f64,
    step: f64,
    mut coefficients: SliceMut<'_, f64>,
) -> Result<()> {
    let device = coefficients.device().clone();
    let check = Check { operation: "sharpness::ascent_coefficients", device: &device };
    check.argument("norm", norm, 1)?;
    check.argument("coefficients", coefficients.view(), 2)?;
    if let Some(products) = products {
        check.argument("products", products, PRODUCTS)?;
    }
    let products = products.map_or(0, |products| products.address());
    let args = AscentArgs { products, norm: norm.address(), coefficients: coefficients.address(), rho, step };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::ASCENT_COEFFICIENTS, Launch::new(1, 1), &args) }
}

/// Scales the four `coefficients` of a combination by `min(1, largest/(norm + 1e-6))`, as PyTorch's `clip_grad_norm_`
/// does.
///
/// # Errors
/// [`Error::Length`] unless `norm` holds one number and `coefficients` four, [`Error::OtherDevice`] unless they live on
/// one device.
pub fn clip_coefficients(norm: Slice<'_, f64>, largest: f64, mut coefficients: SliceMut<'_, f64>) -> Result<()> {
    let device = coefficients.device().clone();
    let check = Check { operation: "sharpness::clip_coefficients", device: &device };
    check.argument("norm", norm, 1)?;
    check.argument("coefficients", coefficients.view(), 4)?;
    let args = ClipArgs { norm: norm.address(), coefficients: coefficients.address(), largest };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::CLIP_COEFFICIENTS, Launch::new(1, 1), &args) }
}

/// SA-SAM's step size and radius. With the [`combined_products`] of `A = w − w_prev` and `B = g(w) − g(w_prev)`, `η =
/// min(damping ‖A‖/‖B‖, sqrt(1 + δ θ_prev) η_prev)`, `θ = η/η_prev` and `ρ = sqrt(η)`. If `A` or `B` vanishes, η is the
/// second of the two, or stays as it is if θ is infinite. `state` holds η, θ and whether any step was taken (0 or 1).
/// Before the first step, η and θ keep their initial values. `rates` receives η, ρ, θ and ‖g‖/ρ:
/// [`super::vector::perturb`] takes the last as the norm, with a radius of one. [SA-SAM, algorithm 1; AdGD]
///
/// # Errors
/// [`Error::Length`] unless `products` holds 5 numbers, `norm` 1, `state` 3 and `rates` 4, [`Error::OtherDevice`]
/// unless they live on one device.
pub fn adgd_rates(
    products: Slice<'_, f64>,
    norm: Slice<'_, f64>,
    state: Slice<'_, f64>,
    (delta, damping): (f64, f64),
    mut rates: SliceMut<'_, f64>,
) -> Result<()> {
    let device = rates.device().clone();
    let check = Check { operation: "sharpness::adgd_rates", device: &device };
    check.argument("products", products, PRODUCTS)?;
    check.argument("norm", norm, 1)?;
    check.argument("state", state, 3)?;
    check.argument("rates", rates.view(), 4)?;
    let (products, norm, state, rates) = (products.address(), norm.address(), state.address(), rates.address());
    let args = AdgdRatesArgs { products, norm, state, rates, delta, damping };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::ADGD_RATES, Launch::new(1, 1), &args) }
}

/// Stores η and θ in the state of [`adgd_rates`], unless `skip[0]` is not zero.
///
/// # Errors
/// [`Error::Length`] unless `rates` holds 4 numbers, `state` 3 and `skip` 1, [`Error::OtherDevice`] unless they live on
/// one device.
pub fn adgd_commit(rates: Slice<'_, f64>, skip: Slice<'_, u32>, mut state: SliceMut<'_, f64>) -> Result<()> {
    let device = state.device().clone();
    let check = Check { operation: "sharpness::adgd_commit", device: &device };
    check.argument("rates", rates, 4)?;
    check.argument("state", state.view(), 3)?;
    check.argument("skip", skip, 1)?;
    let args = AdgdCommitArgs { rates: rates.address(), skip: skip.address(), state: state.address() };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::ADGD_COMMIT, Launch::new(1, 1), &args) }
}
