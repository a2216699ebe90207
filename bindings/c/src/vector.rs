//! The kernels of sharpness-aware steps on vectors of the caller.
//!
//! Pointers to vectors are addresses on the device. `n` is the number of elements of every vector of a call. Single
//! numbers, such as norms and coefficients, lie on the device too, so that no call has to wait: on the CPU a pointer to
//! a `double` will do.

use std::ffi::c_void;

use polder::device::Scalar;
use polder::kernels::sharpness::{self, Scaling};
use polder::kernels::vector::{self, AdamWStep, Combination, CrSamTerms, SgdStep};

use crate::device::{checked_type, polder_device, polder_type};
use crate::error::{Failure, Result, guard, object, polder_status};

/// Evaluates an expression with `$T` as the type that the caller names.
macro_rules! for_type {
    ($dtype:expr, $T:ident => $body:expr) => {
        match checked_type($dtype)? {
            polder_type::F32 => {
                type $T = f32;
                $body
            }
            polder_type::F64 => {
                type $T = f64;
                $body
            }
        }
    };
}
pub(crate) use for_type;

/// norm[0] = the L2 norm of x, summed in double precision.
///
/// # Safety
/// Every pointer is NULL or valid for its elements on the device; `device` is NULL or a live device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_norm(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    x: *const c_void,
    norm: *mut f64,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        for_type!(dtype, T => {
            let (x, norm) = (on.read::<T>("x", x, n)?, on.write("norm", norm.cast(), 1)?);
            Ok(vector::l2_norm(x, &mut *on.reduction()?, norm)?)
        })
    })
}

/// product[0] = the inner product of x and y, summed in double precision.
///
/// # Safety
/// As `polder_norm`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_dot(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    x: *const c_void,
    y: *const c_void,
    product: *mut f64,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        for_type!(dtype, T => {
            let (x, y) = (on.read::<T>("x", x, n)?, on.read::<T>("y", y, n)?);
            let product = on.write("product", product.cast(), 1)?;
            Ok(vector::dot(x, y, &mut *on.reduction()?, product)?)
        })
    })
}

/// y += alpha x.
///
/// # Safety
/// As `polder_norm`; x and y do not overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_axpy(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    alpha: f64,
    x: *const c_void,
    y: *mut c_void,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        for_type!(dtype, T => {
            Ok(vector::axpy(alpha, on.read::<T>("x", x, n)?, on.write::<T>("y", y, n)?)?)
        })
    })
}

/// SAM's perturbed weights: plus = w + rho g/(norm + 1e-12) and, unless minus is NULL, minus = w − rho g/(norm +
/// 1e-12), both in one pass over the vectors.
///
/// # Safety
/// As `polder_norm`; plus and minus overlap no other vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_perturb(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    w: *const c_void,
    g: *const c_void,
    norm: *const f64,
    rho: f64,
    plus: *mut c_void,
    minus: *mut c_void,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        for_type!(dtype, T => {
            let (w, g) = (on.read::<T>("w", w, n)?, on.read::<T>("g", g, n)?);
            let (norm, plus) = (on.read("norm", norm.cast(), 1)?, on.write::<T>("plus", plus, n)?);
            let minus = if minus.is_null() { None } else { Some(on.write::<T>("minus", minus, n)?) };
            Ok(vector::perturb(w, g, norm, rho, plus, minus)?)
        })
    })
}

/// ASAM's norm: norm[0] = the L2 norm of T g, where T = |w| + eta for the first scaled elements and 1 for the others.
///
/// # Safety
/// As `polder_norm`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_asam_norm(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    w: *const c_void,
    g: *const c_void,
    eta: f64,
    scaled: usize,
    norm: *mut f64,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let scaling = Scaling { eta, scaled_len: scaled };
        for_type!(dtype, T => {
            let (w, g) = (on.read::<T>("w", w, n)?, on.read::<T>("g", g, n)?);
            let norm = on.write("norm", norm.cast(), 1)?;
            Ok(sharpness::adaptive_norm(w, g, scaling, &mut *on.reduction()?, norm)?)
        })
    })
}

/// ASAM's perturbed weights: plus = w + rho T² g/(norm + 1e-12), with the norm of `polder_asam_norm`.
///
/// # Safety
/// As `polder_perturb`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_asam_perturb(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    w: *const c_void,
    g: *const c_void,
    eta: f64,
    scaled: usize,
    norm: *const f64,
    rho: f64,
    plus: *mut c_void,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let scaling = Scaling { eta, scaled_len: scaled };
        for_type!(dtype, T => {
            let (w, g) = (on.read::<T>("w", w, n)?, on.read::<T>("g", g, n)?);
            let (norm, plus) = (on.read("norm", norm.cast(), 1)?, on.write::<T>("plus", plus, n)?);
            Ok(sharpness::perturb_adaptive(w, g, scaling, norm, rho, plus)?)
        })
    })
}

/// CR-SAM's terms.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct polder_cr_sam {
    /// Weight of the curvature term.
    pub alpha: f64,
    /// Weight of the slope term.
    pub beta: f64,
    /// The curvature term is dropped where A is not above this.
    pub a_min: f64,
    /// The slope term is dropped where B is not above this.
    pub b_min: f64,
    /// The error of a loss, relative to the first one; a term below its error is dropped.
    pub loss_error: f64,
    /// 1 for the logarithms of the paper's equation 7, 0 for the form of the authors' code.
    pub log_form: i32,
}

/// The coefficients c0, c+, c− of CR-SAM's gradient c0 g0 + c+ g+ + c− g−, from the losses at w, w + rho v and w − rho
/// v. coefficients has room for four numbers (the fourth is not written). dropped[0] and dropped[1] count the dropped
/// terms.
///
/// # Safety
/// Every pointer is NULL or valid on the device: three losses, four coefficients, one flag, two counters; `terms` in
/// the host's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_cr_sam_coefficients(
    device: *const polder_device,
    losses: *const f64,
    terms: *const polder_cr_sam,
    coefficients: *mut f64,
    skip: *const u32,
    dropped: *mut u32,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        let (on, terms) = unsafe { (object("device", device)?, *object("terms", terms)?) };
        let polder_cr_sam { alpha, beta, a_min, b_min, loss_error, log_form } = terms;
        let terms = CrSamTerms { log_form: log_form != 0, alpha, beta, a_min, b_min, loss_error };
        // SAFETY: the caller's.
        let (losses, skip) = unsafe { (on.read("losses", losses.cast(), 3)?, on.read("skip", skip.cast(), 1)?) };
        // SAFETY: as above.
        let coefficients = unsafe { on.write("coefficients", coefficients.cast(), 3)? };
        // SAFETY: as above.
        let dropped = unsafe { on.write("dropped", dropped.cast(), 2)? };
        Ok(vector::cr_sam_coefficients(losses, terms, coefficients, skip, dropped)?)
    })
}

/// One to four vectors whose combination is followed.
///
/// # Safety
/// As `polder_sgd`.
unsafe fn combination<'a, T: Scalar>(
    on: &'a polder_device,
    n: usize,
    gradients: *const *const c_void,
    count: usize,
    coefficients: *const f64,
) -> Result<Combination<'a, T>> {
    if gradients.is_null() {
        return Err(Failure::null("gradients"));
    }
    if !(1..=4).contains(&count) {
        return Err(Failure::argument(format!("{count} gradients, expected 1 to 4")));
    }
    let mut vectors = [None; 4];
    for (k, vector) in vectors.iter_mut().enumerate().take(count) {
        // SAFETY: the caller's.
        *vector = Some(unsafe { on.read("gradients", *gradients.add(k), n)? });
    }
    // SAFETY: the caller's.
    let coefficients = unsafe { on.read("coefficients", coefficients.cast(), 4)? };
    Ok(Combination { vectors, coefficients })
}

/// One step of SGD in one pass: g = Σ c_k g_k + weight_decay w, m = momentum m + g, w −= lr m (with Nesterov's momentum
/// w −= lr (g + momentum m)). Nothing is written where skip[0] is not 0.
///
/// # Safety
/// Every pointer is NULL or valid on the device; `gradients` is an array of `count` pointers in the host's memory;
/// `coefficients` has four numbers, of which the first `count` are used; w and m overlap no other vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_sgd(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    w: *mut c_void,
    m: *mut c_void,
    gradients: *const *const c_void,
    count: usize,
    coefficients: *const f64,
    lr: f64,
    momentum: f64,
    nesterov: i32,
    weight_decay: f64,
    skip: *const u32,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let nesterov = nesterov != 0;
        let step = SgdStep { lr: lr.into(), momentum, nesterov, weight_decay, decay_len: usize::MAX };
        for_type!(dtype, T => {
            let gradients = combination(on, n, gradients, count, coefficients)?;
            let (w, m) = (on.write::<T>("w", w, n)?, on.write::<T>("m", m, n)?);
            Ok(vector::sgd(w, m, gradients, step, on.read("skip", skip.cast(), 1)?)?)
        })
    })
}

/// One step of AdamW in one pass: g = Σ c_k g_k, m = beta1 m + (1 − beta1) g, v = beta2 v + (1 − beta2) g²,
/// w = (1 − lr weight_decay) w − lr/(1 − beta1^t) m/(sqrt(v)/sqrt(1 − beta2^t) + eps), where t = step[0] counts from 1.
/// Nothing is written where skip[0] is not 0.
///
/// # Safety
/// As `polder_sgd`; `step` and `skip` are one number each on the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_adamw(
    device: *const polder_device,
    dtype: i32,
    n: usize,
    w: *mut c_void,
    m: *mut c_void,
    v: *mut c_void,
    gradients: *const *const c_void,
    count: usize,
    coefficients: *const f64,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    step: *const u32,
    skip: *const u32,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let settings = AdamWStep { lr: lr.into(), beta1, beta2, eps, weight_decay, decay_len: usize::MAX };
        for_type!(dtype, T => {
            let gradients = combination(on, n, gradients, count, coefficients)?;
            let (w, m, v) = (on.write::<T>("w", w, n)?, on.write::<T>("m", m, n)?, on.write::<T>("v", v, n)?);
            let (step, skip) = (on.read("step", step.cast(), 1)?, on.read("skip", skip.cast(), 1)?);
            Ok(vector::adamw(w, m, v, gradients, settings, step, skip)?)
        })
    })
}
