//! Operations of the optimizers on one long vector: norms, perturbed weights, curvature along a direction, combined
//! gradients and updates. A model's parameters lie in one vector, so each operation is one pass at the speed of memory.
//!
//! Numbers that one pass computes for another (a norm, coefficients, a flag that skips the step) stay in device memory,
//! so a training step never waits for the device. Traffic is in bytes per element for `f32`.
//!
//! Sources: SAM is Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization"; CR-SAM
//! is Wu, Luo and Wunsch 2024, "CR-SAM: Curvature Regularized Sharpness-Aware Minimization"; AdamW is Loshchilov and
//! Hutter 2019. SGD and AdamW have PyTorch's form.

use super::{Check, pick};
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{
    AdamWArgs, AdvanceArgs, AverageArgs, AxpyArgs, CheckFiniteArgs, CombinationArgs, CommitArgs, ConvertArgs,
    CrSamArgs, CurvatureArgs, FillArgs, GradientArgs, PartialsArgs, PerturbArgs, SgdArgs, SumArgs,
};
use crate::device::constants::{BLOCK_THREADS, MAX_SUMS, PACK_BYTES};
use crate::device::{Buffer, Compute, ComputeKernels, Device, Kernel, Launch, Result, Scalar, Slice, SliceMut, id};

/// Elements that one thread of a GPU loads or stores at a time: 16 bytes.
pub(super) const fn pack<T>() -> usize {
    PACK_BYTES / size_of::<T>()
}

/// One block for the second stage of a reduction.
pub(super) fn one_block(device: &Device) -> Launch {
    Launch::new(1, if device.is_simt() { BLOCK_THREADS as u32 } else { 1 })
}

/// Memory for the partial sums of the blocks of a reduction. It serves every reduction on one device, of any length.
///
/// The number of blocks depends only on the length and the device, so results have the same bits on every run and for
/// every number of CPU threads.
pub struct Reduction {
    partials: Buffer<f64>,
}

impl Reduction {
    /// Room for the partial sums of one reduction at a time on `device`.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn new(device: &Device) -> Result<Self> {
        let blocks = device.elementwise(usize::MAX, 1).grid[0] as usize;
        Ok(Self { partials: device.zeros(blocks * MAX_SUMS)? })
    }

    /// The device, and the address of the partial sums, with room for three sums of each block that `elementwise` can
    /// launch.
    pub(super) fn parts(&mut self) -> (Device, u64) {
        (self.partials.device().clone(), self.partials.view_mut().address())
    }

    /// The second stage of a norm, after a launch of that shape.
    pub(super) fn finish_norm(
        &mut self,
        operation: &'static str,
        shape: Launch,
        norm: SliceMut<'_, f64>,
    ) -> Result<()> {
        finish(operation, id::FINISH_NORM, self, u64::from(shape.grid[0]), "norm", norm)
    }

    /// The first stage: sums of each block over its part of one or two vectors of one length. Returns the number of
    /// blocks.
    fn partials<T: Scalar>(
        &mut self,
        operation: &'static str,
        kernel: Kernel<PartialsArgs>,
        vectors: &[(&'static str, Slice<'_, T>)],
    ) -> Result<u64> {
        let device = self.partials.device().clone();
        let check = Check { operation, device: &device };
        let n = vectors[0].1.len();
        let mut addresses = [0; 2];
        for (address, &(argument, vector)) in addresses.iter_mut().zip(vectors) {
            check.argument(argument, vector, n)?;
            *address = vector.address();
        }
        let [x, y] = addresses;
        let args = PartialsArgs { x, y, partials: self.partials.view_mut().address(), n: n as u64 };
        let shape = device.elementwise(n, pack::<T>());
        // SAFETY: the vectors hold n elements each (a kernel reads only those that it was given), and `partials` has
        // room for three sums of each block that `elementwise` can launch.
        unsafe { device.launch(kernel, shape, &args)? };
        Ok(u64::from(shape.grid[0]))
    }
}

/// The second stage of a reduction to one number.
fn finish(
    operation: &'static str,
    kernel: Kernel<SumArgs>,
    reduction: &mut Reduction,
    count: u64,
    argument: &'static str,
    mut out: SliceMut<'_, f64>,
) -> Result<()> {
    let device = reduction.partials.device().clone();
    Check { operation, device: &device }.argument(argument, out.view(), 1)?;
    let args = SumArgs { partials: reduction.partials.view().address(), out: out.address(), count };
    // SAFETY: the first stage wrote `count` partial sums, and `out` is one number.
    unsafe { device.launch(kernel, one_block(&device), &args) }
}

/// `norm[0] = sqrt(Σ x²)`, summed in double precision. Traffic: 4 B per element.
///
/// # Errors
/// [`Error::Length`] unless `norm` holds one number, [`Error::OtherDevice`] unless all live on the reduction's device.
pub fn l2_norm<T: Scalar>(x: Slice<'_, T>, reduction: &mut Reduction, norm: SliceMut<'_, f64>) -> Result<()> {
    let operation = "vector::l2_norm";
    let count = reduction.partials(operation, pick::<T, _>(id::SQUARES_F32, id::SQUARES_F64), &[("x", x)])?;
    finish(operation, id::FINISH_NORM, reduction, count, "norm", norm)
}

/// Finishes a gradient in one pass: [`check_finite`] and [`l2_norm`], with the same bits, and with a `scale` (the state
/// of [`super::precision`]) also [`super::precision::unscale`]. Traffic: 4 B per element, 8 B with a scale.
///
/// # Errors
/// [`Error::Length`] unless `flag` and `norm` hold one number and `scale` two, [`Error::OtherDevice`] unless all live
/// on the reduction's device, [`Error::Argument`] for a scale in double precision.
pub fn finish_gradient<T: Scalar>(
    mut x: SliceMut<'_, T>,
    scale: Option<Slice<'_, f64>>,
    mut flag: SliceMut<'_, u32>,
    reduction: &mut Reduction,
    norm: SliceMut<'_, f64>,
) -> Result<()> {
    let operation = "vector::finish_gradient";
    let (device, partials) = reduction.parts();
    let check = Check { operation, device: &device };
    check.device("x", x.device())?;
    check.argument("flag", flag.view(), 1)?;
    check.argument("norm", norm.view(), 1)?;
    let mut kernel = pick::<T, _>(id::FINISH_GRADIENT_F32, id::FINISH_GRADIENT_F64);
    if let Some(scale) = scale {
        super::precision::check_scale::<T>(check, scale)?;
        kernel = id::FINISH_SCALED_GRADIENT;
    }
    let state = scale.map_or(0, |scale| scale.address());
    let shape = device.elementwise(x.len(), pack::<T>());
    let args = GradientArgs { x: x.address(), state, flag: flag.address(), partials, n: x.len() as u64 };
    // SAFETY: lengths and devices are checked above, and there is room for the partial sums of each block.
    unsafe { device.launch(kernel, shape, &args)? };
    reduction.finish_norm(operation, shape, norm)
}

/// `out[0] = Σ x y`, multiplied and summed in double precision. Traffic: 8 B per element.
///
/// # Errors
/// [`Error::Length`] unless `x` and `y` are equally long and `out` holds one number, [`Error::OtherDevice`] unless all
/// live on the reduction's device.
pub fn dot<T: Scalar>(
    x: Slice<'_, T>,
    y: Slice<'_, T>,
    reduction: &mut Reduction,
    out: SliceMut<'_, f64>,
) -> Result<()> {
    let operation = "vector::dot";
    let kernel = pick::<T, _>(id::PRODUCTS_F32, id::PRODUCTS_F64);
    let count = reduction.partials(operation, kernel, &[("x", x), ("y", y)])?;
    finish(operation, id::FINISH_SUM, reduction, count, "out", out)
}

/// What both perturbations of the weights share: they differ in the kernels, and in whether these need a norm.
fn perturb_with<T: Scalar, P: Compute>(
    operation: &'static str,
    kernel: Kernel<PerturbArgs>,
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    norm: Option<Slice<'_, f64>>,
    rho: f64,
    mut plus: SliceMut<'_, P>,
    mut minus: Option<SliceMut<'_, P>>,
    whole: usize,
) -> Result<()> {
    let device = plus.device().clone();
    let n = w.len();
    let check = Check { operation, device: &device };
    check.device("w", w.device())?;
    check.argument("g", g, n)?;
    check.argument("plus", plus.view(), n)?;
    if let Some(norm) = norm {
        check.argument("norm", norm, 1)?;
    }
    if let Some(minus) = &minus {
        check.argument("minus", minus.view(), n)?;
    }
    let args = PerturbArgs {
        w: w.address(),
        g: g.address(),
        norm: norm.map_or(0, |norm| norm.address()),
        plus: plus.address(),
        minus: minus.as_mut().map_or(0, |minus| minus.address()),
        n: n as u64,
        whole: whole as u64,
        rho,
    };
    // SAFETY: w, g, plus and minus (if given) hold n elements, and a kernel that reads the norm is given one.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// The perturbed weights of SAM: `plus = w + ρ g/(norm + 1e-12)` and, if given, `minus = w − ρ g/(norm + 1e-12)`,
/// both in one pass and rounded to the compute type `P`. A zero gradient gives `w`. [SAM, eq. 2; CR-SAM, algorithm 1]
///
/// Traffic with `P = f32`: 12 B per element for one side, 16 B for both (a 2-byte `P`: 10 B and 12 B).
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `w` and `norm` holds one number, [`Error::OtherDevice`] unless
/// all live on one device.
pub fn perturb<T: Scalar, P: Compute>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    norm: Slice<'_, f64>,
    rho: f64,
    plus: SliceMut<'_, P>,
    minus: Option<SliceMut<'_, P>>,
) -> Result<()> {
    let whole = w.len();
    perturb_part(w, g, norm, rho, plus, minus, whole)
}

/// The same for a part of vectors of `whole` elements.
pub(crate) fn perturb_part<T: Scalar, P: Compute>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    norm: Slice<'_, f64>,
    rho: f64,
    plus: SliceMut<'_, P>,
    minus: Option<SliceMut<'_, P>>,
    whole: usize,
) -> Result<()> {
    let kernel = pick::<T, _>(
        P::choose(ComputeKernels {
            f32: id::PERTURB_F32_F32,
            f64: id::PERTURB_F32_F64,
            f16: id::PERTURB_F32_F16,
            bf16: id::PERTURB_F32_BF16,
        }),
        P::choose(ComputeKernels {
            f32: id::PERTURB_F64_F32,
            f64: id::PERTURB_F64_F64,
            f16: id::PERTURB_F64_F16,
            bf16: id::PERTURB_F64_BF16,
        }),
    );
    perturb_with("vector::perturb", kernel, w, g, Some(norm), rho, plus, minus, whole)
}

/// The perturbed weights of SAM with p = ∞: `plus = w + ρ sign(g)` and, if given, `minus = w − ρ sign(g)`, with
/// `sign(0) = 0`; a NaN in `g` stays a NaN. [SAM, eq. 2]
///
/// Traffic: that of [`perturb`].
///
/// # Errors
/// Those of [`perturb`].
pub fn perturb_linf<T: Scalar, P: Compute>(
    w: Slice<'_, T>,
    g: Slice<'_, T>,
    rho: f64,
    plus: SliceMut<'_, P>,
    minus: Option<SliceMut<'_, P>>,
) -> Result<()> {
    let kernel = pick::<T, _>(
        P::choose(ComputeKernels {
            f32: id::PERTURB_LINF_F32_F32,
            f64: id::PERTURB_LINF_F32_F64,
            f16: id::PERTURB_LINF_F32_F16,
            bf16: id::PERTURB_LINF_F32_BF16,
        }),
        P::choose(ComputeKernels {
            f32: id::PERTURB_LINF_F64_F32,
            f64: id::PERTURB_LINF_F64_F64,
            f16: id::PERTURB_LINF_F64_F16,
            bf16: id::PERTURB_LINF_F64_BF16,
        }),
    );
    let whole = w.len();
    perturb_with("vector::perturb_linf", kernel, w, g, None, rho, plus, minus, whole)
}

/// Curvature along a direction from the losses `L0, L+, L−` at `w`, `w + ρv` and `w − ρv`: `out` receives `A = L+ + L−
/// − 2 L0`, `B = L+ − L−`, `A/ρ²`, an estimate of `vᵀHv` [CR-SAM, eq. 5 to 7], and its error `loss_error |L0|/ρ²`,
/// where `loss_error` is that of A relative to the loss. With ρ = 0 the last two are not finite.
///
/// # Errors
/// [`Error::Length`] unless `losses` holds 3 numbers and `out` 4, [`Error::OtherDevice`] unless they live on one
/// device, [`Error::Argument`] unless `rho` is finite and not negative.
pub fn curvature_from_losses(
    losses: Slice<'_, f64>,
    (rho, loss_error): (f64, f64),
    mut out: SliceMut<'_, f64>,
) -> Result<()> {
    let operation = "vector::curvature_from_losses";
    let device = out.device().clone();
    let check = Check { operation, device: &device };
    check.argument("losses", losses, 3)?;
    check.argument("out", out.view(), 4)?;
    if !(rho >= 0.0 && rho.is_finite()) {
        return check.refuse(format!("rho = {rho}, expected a finite number, 0 or more"));
    }
    let args = CurvatureArgs { losses: losses.address(), out: out.address(), rho, loss_error };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::CURVATURE_FROM_LOSSES, Launch::new(1, 1), &args) }
}

/// What CR-SAM's regularizer adds to the gradient of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrSamTerms {
    /// Whether it is the gradient of `α log A + β log B`, as in the paper (eq. 7), or else of `α A + β B`, as in the
    /// authors' code.
    pub log_form: bool,
    /// α, the weight of the curvature term.
    pub alpha: f64,
    /// β, the weight of the slope term.
    pub beta: f64,
    /// The log form drops the α term if `A` is not above this.
    pub a_min: f64,
    /// The log form drops the β term if `B` is not above this.
    pub b_min: f64,
    /// The error of the losses, relative to the first one. The log form drops a term whose `A` or `B` is not above
    /// this times `L0`, too.
    pub loss_error: f64,
}

/// The coefficients `c0, c+, c−` of CR-SAM's gradient `c0 g0 + c+ g+ + c− g−`, from `losses` (`L0, L+, L−`). With
/// `A = L+ + L− − 2 L0` and `B = L+ − L−` the log form is `g+ + α (g+ + g− − 2 g0)/A + β (g+ − g−)/B`, so
/// `c+ = 1 + α/A + β/B`, `c− = α/A − β/B`, `c0 = −2α/A`; the released form has 1 for `A` and `B`. [CR-SAM, eq. 7]
///
/// The log form drops a term whose `A` or `B` is not finite or at most its threshold or its error, and adds one to
/// `dropped[0]` (α) or `dropped[1]` (β). A term of weight 0 is not counted, and no term is counted if `skip` is already
/// set.
///
/// # Errors
/// [`Error::Length`] unless `losses` and `coefficients` hold 3 numbers, `skip` 1 and `dropped` 2,
/// [`Error::OtherDevice`] unless they live on one device.
pub fn cr_sam_coefficients(
    losses: Slice<'_, f64>,
    terms: CrSamTerms,
    mut coefficients: SliceMut<'_, f64>,
    skip: Slice<'_, u32>,
    mut dropped: SliceMut<'_, u32>,
) -> Result<()> {
    let operation = "vector::cr_sam_coefficients";
    let device = coefficients.device().clone();
    let check = Check { operation, device: &device };
    check.argument("losses", losses, 3)?;
    check.argument("coefficients", coefficients.view(), 3)?;
    check.argument("skip", skip, 1)?;
    check.argument("dropped", dropped.view(), 2)?;
    let args = CrSamArgs {
        losses: losses.address(),
        coefficients: coefficients.address(),
        skip: skip.address(),
        dropped: dropped.address(),
        alpha: terms.alpha,
        beta: terms.beta,
        a_min: terms.a_min,
        b_min: terms.b_min,
        loss_error: terms.loss_error,
        log_form: terms.log_form.into(),
    };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::CR_SAM_COEFFICIENTS, Launch::new(1, 1), &args) }
}

/// A combination of one to four vectors, `Σ c_k x_k`, which kernels compute as they read the vectors. It is never
/// stored.
#[derive(Clone, Copy)]
pub struct Combination<'a, T: Scalar> {
    /// The vectors, at least one.
    pub vectors: [Option<Slice<'a, T>>; 4],
    /// Four coefficients, on the device. The coefficient of an absent vector is not read.
    pub coefficients: Slice<'a, f64>,
}

impl<'a, T: Scalar> Combination<'a, T> {
    /// One vector, times the first of the coefficients.
    pub(crate) fn alone(vector: Slice<'a, T>, coefficients: Slice<'a, f64>) -> Self {
        Self { vectors: [Some(vector), None, None, None], coefficients }
    }

    /// The combination of vectors of `n` elements as kernels take it, and the number of vectors, checked.
    pub(super) fn args(&self, check: Check<'_>, n: usize) -> Result<(CombinationArgs, usize)> {
        const NAMES: [&str; 4] = ["vectors[0]", "vectors[1]", "vectors[2]", "vectors[3]"];
        check.argument("coefficients", self.coefficients, 4)?;
        let mut args = CombinationArgs { vectors: [0; 4], coefficients: self.coefficients.address(), slot: [0; 4] };
        let mut count = 0;
        for (slot, vector) in self.vectors.iter().enumerate() {
            let Some(vector) = *vector else { continue };
            check.argument(NAMES[slot], vector, n)?;
            args.vectors[count] = vector.address();
            args.slot[count] = slot as u32;
            count += 1;
        }
        if count == 0 {
            return check.refuse("empty combination".into());
        }
        Ok((args, count))
    }
}

/// A learning rate: a number, one on the device that a kernel has computed, or so many times that.
#[derive(Clone, Copy)]
pub enum Rate<'a> {
    /// This number.
    Fixed(f64),
    /// The number there (one element).
    Device(Slice<'a, f64>),
    /// So many times the number there (one element).
    Scaled(Slice<'a, f64>, f64),
}

impl From<f64> for Rate<'_> {
    fn from(lr: f64) -> Self {
        Rate::Fixed(lr)
    }
}

impl<'a> Rate<'a> {
    /// The rate that a method computes, in place of this one. Its factor stays.
    pub(crate) fn replaced_by(self, own: Slice<'a, f64>) -> Self {
        match self {
            Rate::Scaled(_, factor) => Rate::Scaled(own, factor),
            Rate::Fixed(_) | Rate::Device(_) => Rate::Device(own),
        }
    }

    /// The address of a rate on the device (0 if there is none), and the given number: the rate, or the factor.
    pub(super) fn args(&self, check: Check<'_>) -> Result<(u64, f64)> {
        let (lr, factor) = match *self {
            Rate::Fixed(lr) => return Ok((0, lr)),
            Rate::Device(lr) => (lr, 1.0),
            Rate::Scaled(lr, factor) => (lr, factor),
        };
        check.argument("lr", lr, 1)?;
        Ok((lr.address(), factor))
    }
}

/// One step of SGD.
#[derive(Clone, Copy)]
pub struct SgdStep<'a> {
    /// Learning rate η.
    pub lr: Rate<'a>,
    /// Momentum μ.
    pub momentum: f64,
    /// Nesterov's form of momentum.
    pub nesterov: bool,
    /// Coupled weight decay λ: `λ w` is added to the gradient.
    pub weight_decay: f64,
    /// Elements from this one on are not decayed.
    pub decay_len: usize,
}

/// One step of SGD in one pass: `g = Σ c_i g_i + λ w`, `m = μ m + g`, `w −= η m` (with Nesterov's momentum `w −= η (g +
/// μ m)`). Nothing is written if `skip[0]` is not zero.
///
/// Traffic: 20 B per element with one gradient, and 4 B more with each further one.
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `w` and `skip` holds one number, [`Error::OtherDevice`] unless
/// all live on one device, [`Error::Argument`] for an empty combination.
pub fn sgd<T: Scalar>(
    mut w: SliceMut<'_, T>,
    mut m: SliceMut<'_, T>,
    gradients: Combination<'_, T>,
    step: SgdStep<'_>,
    skip: Slice<'_, u32>,
) -> Result<()> {
    let operation = "vector::sgd";
    let device = w.device().clone();
    let n = w.len();
    let check = Check { operation, device: &device };
    check.argument("m", m.view(), n)?;
    check.argument("skip", skip, 1)?;
    let (combination, count) = gradients.args(check, n)?;
    let kernel = match count {
        1 => pick::<T, _>(id::SGD1_F32, id::SGD1_F64),
        2 => pick::<T, _>(id::SGD2_F32, id::SGD2_F64),
        3 => pick::<T, _>(id::SGD3_F32, id::SGD3_F64),
        _ => pick::<T, _>(id::SGD4_F32, id::SGD4_F64),
    };
    let (lr_on_device, lr) = step.lr.args(check)?;
    let args = SgdArgs {
        w: w.address(),
        m: m.address(),
        combination,
        skip: skip.address(),
        lr_on_device,
        n: n as u64,
        decay_len: step.decay_len as u64,
        lr,
        momentum: step.momentum,
        weight_decay: step.weight_decay,
        nesterov: u32::from(step.nesterov),
    };
    // SAFETY: every vector holds n elements, and `count` gradients are set.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// One step of AdamW.
#[derive(Clone, Copy)]
pub struct AdamWStep<'a> {
    /// Learning rate η.
    pub lr: Rate<'a>,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay λ: the weights are multiplied by `1 − ηλ`.
    pub weight_decay: f64,
    /// Elements from this one on are not decayed.
    pub decay_len: usize,
}

/// One step of AdamW in one pass: `g = Σ c_i g_i`, `m = β1 m + (1 − β1) g`, `v = β2 v + (1 − β2) g²`, `w = (1 − ηλ) w −
/// η/(1 − β1^t) · m/(sqrt(v)/sqrt(1 − β2^t) + eps)`. `step[0]` is t, the number of this step from 1 on (see
/// [`advance`]). Nothing is written if `skip[0]` is not zero.
///
/// Traffic: 28 B per element with one gradient, and 4 B more with each further one.
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `w` and `step` and `skip` hold one number each,
/// [`Error::OtherDevice`] unless all live on one device, [`Error::Argument`] for an empty combination.
pub fn adamw<T: Scalar>(
    mut w: SliceMut<'_, T>,
    mut m: SliceMut<'_, T>,
    mut v: SliceMut<'_, T>,
    gradients: Combination<'_, T>,
    settings: AdamWStep<'_>,
    step: Slice<'_, u32>,
    skip: Slice<'_, u32>,
) -> Result<()> {
    let operation = "vector::adamw";
    let device = w.device().clone();
    let n = w.len();
    let check = Check { operation, device: &device };
    check.argument("m", m.view(), n)?;
    check.argument("v", v.view(), n)?;
    check.argument("step", step, 1)?;
    check.argument("skip", skip, 1)?;
    let (combination, count) = gradients.args(check, n)?;
    let kernel = match count {
        1 => pick::<T, _>(id::ADAMW1_F32, id::ADAMW1_F64),
        2 => pick::<T, _>(id::ADAMW2_F32, id::ADAMW2_F64),
        3 => pick::<T, _>(id::ADAMW3_F32, id::ADAMW3_F64),
        _ => pick::<T, _>(id::ADAMW4_F32, id::ADAMW4_F64),
    };
    let (lr_on_device, lr) = settings.lr.args(check)?;
    let args = AdamWArgs {
        w: w.address(),
        m: m.address(),
        v: v.address(),
        combination,
        step: step.address(),
        skip: skip.address(),
        lr_on_device,
        n: n as u64,
        decay_len: settings.decay_len as u64,
        lr,
        beta1: settings.beta1,
        beta2: settings.beta2,
        eps: settings.eps,
        weight_decay: settings.weight_decay,
    };
    // SAFETY: every vector holds n elements, and `count` gradients are set.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// Counts a step: adds one to `step[0]`, or to `skipped[0]` if `skip[0]` is not zero. Called before [`adamw`], it sets
/// `step` to the number t of the next step. Skipped steps do not advance t.
///
/// # Errors
/// [`Error::Length`] unless each holds one number, [`Error::OtherDevice`] unless they live on one device.
pub fn advance(skip: Slice<'_, u32>, mut step: SliceMut<'_, u32>, mut skipped: SliceMut<'_, u32>) -> Result<()> {
    let operation = "vector::advance";
    let device = step.device().clone();
    let check = Check { operation, device: &device };
    check.argument("skip", skip, 1)?;
    check.argument("step", step.view(), 1)?;
    check.argument("skipped", skipped.view(), 1)?;
    let args = AdvanceArgs { skip: skip.address(), step: step.address(), skipped: skipped.address() };
    // SAFETY: the lengths are checked.
    unsafe { device.launch(id::ADVANCE, Launch::new(1, 1), &args) }
}

/// Sets the lowest bit of `flag[0]` if any element of `x` is infinite or NaN.
/// Traffic: 4 B per element.
///
/// # Errors
/// [`Error::Length`] unless `flag` holds one number, [`Error::OtherDevice`] unless both live on one device.
pub fn check_finite<T: Scalar>(x: Slice<'_, T>, mut flag: SliceMut<'_, u32>) -> Result<()> {
    let operation = "vector::check_finite";
    let device = flag.device().clone();
    let n = x.len();
    let check = Check { operation, device: &device };
    check.argument("flag", flag.view(), 1)?;
    check.device("x", x.device())?;
    let args = CheckFiniteArgs { x: x.address(), flag: flag.address(), n: n as u64 };
    let kernel = pick::<T, _>(id::CHECK_FINITE_F32, id::CHECK_FINITE_F64);
    // SAFETY: `x` holds n elements and `flag` one.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// `state = pending`, unless `skip[0]` is not zero. It applies the other results of a step (batch norm's running
/// statistics) together with the step. Traffic: 8 B per element.
///
/// # Errors
/// [`Error::Length`] unless `pending` and `state` are equally long and `skip` holds one number, [`Error::OtherDevice`]
/// unless all live on one device.
pub fn commit<T: Scalar>(skip: Slice<'_, u32>, pending: Slice<'_, T>, mut state: SliceMut<'_, T>) -> Result<()> {
    let operation = "vector::commit";
    let device = state.device().clone();
    let n = state.len();
    let check = Check { operation, device: &device };
    check.argument("skip", skip, 1)?;
    check.argument("pending", pending, n)?;
    let args = CommitArgs { pending: pending.address(), state: state.address(), skip: skip.address(), n: n as u64 };
    // SAFETY: both vectors hold n elements.
    unsafe { device.launch(pick::<T, _>(id::COMMIT_F32, id::COMMIT_F64), device.elementwise(n, pack::<T>()), &args) }
}

/// `y += alpha x`. Traffic: 12 B per element.
///
/// # Errors
/// [`Error::Length`] unless the two are equally long, [`Error::OtherDevice`] unless they live on one device.
pub fn axpy<T: Scalar>(alpha: f64, x: Slice<'_, T>, mut y: SliceMut<'_, T>) -> Result<()> {
    let operation = "vector::axpy";
    let device = y.device().clone();
    let n = y.len();
    Check { operation, device: &device }.argument("x", x, n)?;
    let args = AxpyArgs { x: x.address(), y: y.address(), n: n as u64, alpha };
    let kernel = pick::<T, _>(id::AXPY_F32, id::AXPY_F64);
    // SAFETY: both vectors hold n elements.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// A moving average of the vectors of a run's steps: `average += (1 − d)(x − average)` with `d = min(decay, (1 + t)/(10
/// + t))`, so that the first steps do not keep what the average began with. The number of steps done, t, is the second
/// of the [`clock`](super::clock). Traffic: 12 B per element.
///
/// # Errors
/// [`Error::Length`] unless the vectors are equally long and the clock is one, [`Error::OtherDevice`] unless all live
/// on one device, [`Error::Argument`] for a decay outside of 0 to 1.
pub fn moving_average<T: Scalar>(
    x: Slice<'_, T>,
    decay: f64,
    clock: Slice<'_, u64>,
    mut average: SliceMut<'_, T>,
) -> Result<()> {
    let operation = "vector::moving_average";
    let device = average.device().clone();
    let n = average.len();
    let check = Check { operation, device: &device };
    check.argument("x", x, n)?;
    check.argument("clock", clock, super::clock::LEN)?;
    if !(0.0..=1.0).contains(&decay) {
        return check.refuse(format!("decay = {decay}, expected a number from 0 to 1"));
    }
    let args = AverageArgs { x: x.address(), average: average.address(), clock: clock.address(), n: n as u64, decay };
    let kernel = pick::<T, _>(id::MOVING_AVERAGE_F32, id::MOVING_AVERAGE_F64);
    // SAFETY: both vectors hold n elements, and the clock has a number of steps.
    unsafe { device.launch(kernel, device.elementwise(n, pack::<T>()), &args) }
}

/// `out[i] = value`. Traffic: 4 B per element.
///
/// # Errors
/// Those of the launch.
pub fn fill<T: Scalar>(mut out: SliceMut<'_, T>, value: f64) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let args = FillArgs { out: out.address(), n: n as u64, value };
    // SAFETY: `out` is n elements and is borrowed exclusively.
    unsafe { device.launch(pick::<T, _>(id::FILL_F32, id::FILL_F64), device.elementwise(n, pack::<T>()), &args) }
}

/// `out[i] = x[i]`, rounded to the nearest value of `D`, ties to even. Traffic: `size_of::<S>() + size_of::<D>()` B per
/// element.
///
/// # Errors
/// [`Error::Length`] unless the two are equally long, [`Error::OtherDevice`] unless they live on one device.
pub fn convert<S: Compute, D: Compute>(x: Slice<'_, S>, mut out: SliceMut<'_, D>) -> Result<()> {
    let operation = "vector::convert";
    let device = out.device().clone();
    let n = out.len();
    Check { operation, device: &device }.argument("x", x, n)?;
    let kernel = S::choose(ComputeKernels {
        f32: D::choose(ComputeKernels {
            f32: id::CONVERT_F32_F32,
            f64: id::CONVERT_F32_F64,
            f16: id::CONVERT_F32_F16,
            bf16: id::CONVERT_F32_BF16,
        }),
        f64: D::choose(ComputeKernels {
            f32: id::CONVERT_F64_F32,
            f64: id::CONVERT_F64_F64,
            f16: id::CONVERT_F64_F16,
            bf16: id::CONVERT_F64_BF16,
        }),
        f16: D::choose(ComputeKernels {
            f32: id::CONVERT_F16_F32,
            f64: id::CONVERT_F16_F64,
            f16: id::CONVERT_F16_F16,
            bf16: id::CONVERT_F16_BF16,
        }),
        bf16: D::choose(ComputeKernels {
            f32: id::CONVERT_BF16_F32,
            f64: id::CONVERT_BF16_F64,
            f16: id::CONVERT_BF16_F16,
            bf16: id::CONVERT_BF16_BF16,
        }),
    });
    let args = ConvertArgs { x: x.address(), out: out.address(), n: n as u64 };
    // SAFETY: both vectors hold n elements.
    unsafe { device.launch(kernel, device.elementwise(n, 16 / size_of::<S>().max(size_of::<D>())), &args) }
}
