//! The curvature of a callback at weights of the caller.

use std::ffi::c_void;

use polder::curvature::Curvature;
use polder::device::{self, Scalar};
use polder::objective::{Differences, Wrapped};

use crate::device::{checked_type, polder_device, polder_type};
use crate::error::{Failure, Result, give, guard, object, polder_status};
use crate::objective::{Callbacks, polder_objective};
use crate::vector::for_type;

/// Measures with a callback as the objective.
///
/// # Safety
/// As `polder_curvature_trace`.
unsafe fn measure<T: Scalar, R>(
    on: &polder_device,
    objective: *const polder_objective,
    weights: *const c_void,
    n: usize,
    of: impl FnOnce(&mut Curvature<'_, T>) -> device::Result<R>,
) -> Result<R> {
    // SAFETY: the caller's.
    let (mut callbacks, weights) = unsafe { (Callbacks::new(objective, n)?, on.read::<T>("weights", weights, n)?) };
    let measured = match callbacks.difference_step() {
        None => Curvature::new(&mut callbacks, weights).and_then(|mut curvature| of(&mut curvature)),
        Some(step) => Differences::new(&on.device, &mut callbacks, step)
            .and_then(|differences| of(&mut Curvature::new(&mut Wrapped(differences), weights)?)),
    };
    callbacks.result(measured)
}

/// Results have a place.
fn not_null(places: [(&str, *mut f64); 2]) -> Result<()> {
    places.iter().try_for_each(|(name, place)| if place.is_null() { Err(Failure::null(name)) } else { Ok(()) })
}

/// The L2 norm of the gradient.
///
/// # Safety
/// As `polder_curvature_trace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_curvature_gradient_norm(
    device: *const polder_device,
    dtype: i32,
    objective: *const polder_objective,
    weights: *const c_void,
    n: usize,
    norm: *mut f64,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let found = for_type!(dtype, T => measure::<T, _>(on, objective, weights, n, |it| it.gradient_norm())?);
        give("norm", norm, found)
    })
}

/// The trace of the Hessian by Hutchinson's estimator, with its standard error, from products with `probes` random
/// vectors. With a single probe the standard error is NaN.
///
/// # Safety
/// `device` is NULL or a live device; `objective` is NULL or as `polder_objective` says; `weights` are `n` numbers on
/// the device; the results are NULL or valid for a number to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_curvature_trace(
    device: *const polder_device,
    dtype: i32,
    objective: *const polder_objective,
    weights: *const c_void,
    n: usize,
    probes: usize,
    seed: u64,
    trace: *mut f64,
    standard_error: *mut f64,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let on = object("device", device)?;
        let found = for_type!(dtype, T => {
            measure::<T, _>(on, objective, weights, n, |it| it.trace(probes, seed, |_| ()))?
        });
        give("trace", trace, found.value)?;
        give("standard_error", standard_error, found.standard_error.unwrap_or(f64::NAN))
    })
}

/// The largest eigenvalues of the Hessian, the largest first, by Lanczos's method with at most `steps` products. Writes
/// at most `room` eigenvalues with their residuals, and their number to `count`. A residual above `tolerance` times the
/// largest magnitude says that an eigenvalue has not converged.
///
/// # Safety
/// As `polder_curvature_trace`; `values` and `residuals` are NULL or valid for `room` numbers each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_curvature_eigenvalues(
    device: *const polder_device,
    dtype: i32,
    objective: *const polder_objective,
    weights: *const c_void,
    n: usize,
    steps: usize,
    tolerance: f64,
    seed: u64,
    room: usize,
    values: *mut f64,
    residuals: *mut f64,
    count: *mut usize,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        not_null([("values", values), ("residuals", residuals)])?;
        let on = object("device", device)?;
        let pairs: Vec<[f64; 2]> = for_type!(dtype, T => measure::<T, _>(on, objective, weights, n, |it| {
            let pairs = it.top_eigenvalues(room, (steps, tolerance), seed, |_| ())?;
            Ok(pairs.iter().map(|pair| [pair.value, pair.residual]).collect())
        })?);
        for (k, [value, residual]) in pairs.iter().enumerate() {
            values.add(k).write(*value);
            residuals.add(k).write(*residual);
        }
        give("count", count, pairs.len())
    })
}

/// The density of the Hessian's eigenvalues by stochastic Lanczos quadrature: peaks at `nodes` with shares `shares`
/// that add up to 1. Both have room for `probes` times `steps` numbers; `count` receives how many were written.
///
/// # Safety
/// As `polder_curvature_trace`; `nodes` and `shares` are NULL or valid for `probes` times `steps` numbers each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_curvature_spectrum(
    device: *const polder_device,
    dtype: i32,
    objective: *const polder_objective,
    weights: *const c_void,
    n: usize,
    probes: usize,
    steps: usize,
    seed: u64,
    nodes: *mut f64,
    shares: *mut f64,
    count: *mut usize,
) -> polder_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        not_null([("nodes", nodes), ("shares", shares)])?;
        let on = object("device", device)?;
        let density = for_type!(dtype, T => {
            measure::<T, _>(on, objective, weights, n, |it| it.spectral_density(probes, steps, seed, |_| ()))?
        });
        for (k, (node, share)) in density.nodes.iter().zip(&density.weights).enumerate() {
            nodes.add(k).write(*node);
            shares.add(k).write(*share);
        }
        give("count", count, density.nodes.len())
    })
}
