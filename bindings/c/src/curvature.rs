//! The curvature of a callback at weights of the caller.

use std::ffi::c_void;

use polder::curvature::{Curvature, Density};
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
    unsafe fn typed<T: Scalar>(
        on: &polder_device,
        objective: *const polder_objective,
        weights: *const c_void,
        n: usize,
    ) -> Result<f64> {
        // SAFETY: the caller's.
        unsafe { measure::<T, _>(on, objective, weights, n, |curvature| curvature.gradient_norm()) }
    }
    // SAFETY: the caller's.
    guard(|| unsafe {
        let found = for_type!(dtype, typed(object("device", device)?, objective, weights, n))?;
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
    unsafe fn typed<T: Scalar>(
        on: &polder_device,
        objective: *const polder_objective,
        weights: *const c_void,
        n: usize,
        (probes, seed): (usize, u64),
    ) -> Result<[f64; 2]> {
        // SAFETY: the caller's.
        let found = unsafe { measure::<T, _>(on, objective, weights, n, |it| it.trace(probes, seed, |_| ()))? };
        Ok([found.value, found.standard_error.unwrap_or(f64::NAN)])
    }
    // SAFETY: the caller's.
    guard(|| unsafe {
        let [value, error] = for_type!(dtype, typed(object("device", device)?, objective, weights, n, (probes, seed)))?;
        give("trace", trace, value)?;
        give("standard_error", standard_error, error)
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
    unsafe fn typed<T: Scalar>(
        on: &polder_device,
        objective: *const polder_objective,
        weights: *const c_void,
        n: usize,
        (room, steps, tolerance, seed): (usize, usize, f64, u64),
    ) -> Result<Vec<[f64; 2]>> {
        let pairs = |it: &mut Curvature<'_, T>| {
            let pairs = it.top_eigenvalues(room, (steps, tolerance), seed, |_| ())?;
            Ok(pairs.iter().map(|pair| [pair.value, pair.residual]).collect())
        };
        // SAFETY: the caller's.
        unsafe { measure::<T, _>(on, objective, weights, n, pairs) }
    }
    // SAFETY: the caller's.
    guard(|| unsafe {
        for (name, place) in [("values", values), ("residuals", residuals)] {
            if place.is_null() {
                return Err(Failure::null(name));
            }
        }
        let settings = (room, steps, tolerance, seed);
        let pairs = for_type!(dtype, typed(object("device", device)?, objective, weights, n, settings))?;
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
    unsafe fn typed<T: Scalar>(
        on: &polder_device,
        objective: *const polder_objective,
        weights: *const c_void,
        n: usize,
        (probes, steps, seed): (usize, usize, u64),
    ) -> Result<Density> {
        let density = |it: &mut Curvature<'_, T>| it.spectral_density(probes, steps, seed, |_| ());
        // SAFETY: the caller's.
        unsafe { measure::<T, _>(on, objective, weights, n, density) }
    }
    // SAFETY: the caller's.
    guard(|| unsafe {
        for (name, place) in [("nodes", nodes), ("shares", shares)] {
            if place.is_null() {
                return Err(Failure::null(name));
            }
        }
        let settings = (probes, steps, seed);
        let density = for_type!(dtype, typed(object("device", device)?, objective, weights, n, settings))?;
        for (k, (node, share)) in density.nodes.iter().zip(&density.weights).enumerate() {
            nodes.add(k).write(*node);
            shares.add(k).write(*share);
        }
        give("count", count, density.nodes.len())
    })
}
