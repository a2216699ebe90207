//! Sassha's direction: `kernels/sassha.cu`.
//!
//! Sassha is Shin, Lee, Chung and Lee 2025, "SASSHA: Sharpness-aware Adaptive Second-order Optimization with Stable
//! Hessian Approximation".

use super::vector::pack;
use super::{Check, pick};
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::SasshaArgs;
use crate::device::{Result, Scalar, Slice, SliceMut, id};

/// What Sassha keeps from step to step.
pub struct SasshaState<'a, T: Scalar> {
    /// The average gradient m.
    pub average: SliceMut<'a, T>,
    /// The average curvature d of each weight.
    pub curvature: SliceMut<'a, T>,
    /// c, the bias correction of d: one element. It is 0 before the first curvature.
    pub correction: SliceMut<'a, f64>,
}

/// The constants of the averages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SasshaStep {
    /// Decay β1 of the average gradient.
    pub beta1: f64,
    /// Decay β2 of the average curvature.
    pub beta2: f64,
    /// Added to the root of the curvature.
    pub eps: f64,
}

/// `m = β1 m + (1 − β1) g` and `out = m/(1 − β1^t) / (sqrt(d/c) + eps)`, t one more than `taken[0]`. With `curvature`,
/// a probe z of ±1 and the Hessian's product h with it, first `d = β2 d + (1 − β2) |z h|` and `c = 1 − β2^t`. While c
/// is 0, `out` is 0. Nothing is written if `skip[0]` is not zero.
///
/// Traffic: 20 B per element, with a probe 32 B.
///
/// # Errors
/// [`Error::Length`] unless all vectors are as long as `out`, and `taken`, `skip` and the correction hold one number;
/// [`Error::OtherDevice`] unless all live on one device.
pub fn sassha<T: Scalar>(
    gradient: Slice<'_, T>,
    curvature: Option<[Slice<'_, T>; 2]>,
    state: SasshaState<'_, T>,
    step: SasshaStep,
    taken: Slice<'_, u32>,
    skip: Slice<'_, u32>,
    mut out: SliceMut<'_, T>,
) -> Result<()> {
    let SasshaState { average: mut m, curvature: mut d, mut correction } = state;
    let (device, n) = (out.device().clone(), out.len());
    let check = Check { operation: "sassha::sassha", device: &device };
    check.argument("gradient", gradient, n)?;
    for (name, vector) in ["probe", "product"].into_iter().zip(curvature.into_iter().flatten()) {
        check.argument(name, vector, n)?;
    }
    check.argument("average", m.view(), n)?;
    check.argument("curvature", d.view(), n)?;
    check.argument("correction", correction.view(), 1)?;
    check.argument("taken", taken, 1)?;
    check.argument("skip", skip, 1)?;
    let [probe, product] = curvature.map_or([0; 2], |vectors| vectors.map(|vector| vector.address()));
    let args = SasshaArgs {
        gradient: gradient.address(),
        probe,
        product,
        m: m.address(),
        curvature: d.address(),
        out: out.address(),
        correction: correction.address(),
        taken: taken.address(),
        skip: skip.address(),
        n: n as u64,
        beta1: step.beta1,
        beta2: step.beta2,
        eps: step.eps,
    };
    // SAFETY: the vectors hold n elements each, or probe and product are absent; the rest holds one number each.
    unsafe { device.launch(pick::<T, _>(id::SASSHA_F32, id::SASSHA_F64), device.elementwise(n, pack::<T>()), &args) }
}
