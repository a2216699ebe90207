//! Operations for networks in 16 bits: dynamic loss scaling, and the part of a displacement that remains after
//! rounding.
//!
//! Loss scaling (Micikevicius et al., "Mixed precision training", ICLR 2018) is for f16, in which small gradients would
//! vanish. The loss is multiplied by a power of two before the backward pass, and the gradient is divided by it
//! afterwards. The state is two numbers on the device: the scale, and the number of consecutive steps without overflow.

use super::Check;
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{DifferenceArgs, DirectionScaleArgs, UnscaleArgs, UpdateScaleArgs};
use crate::device::{Compute, ComputeKernels, Launch, Result, Scalar, Slice, SliceMut, id};

/// The initial state: the scale 2¹⁶, and no step.
pub const SCALE_START: [f64; 2] = [65536.0, 0.0];
/// Consecutive steps without overflow after which the scale is doubled.
pub const SCALE_GROWTH_INTERVAL: f64 = 2000.0;
/// The range of the scale.
const SCALE_RANGE: [f64; 2] = [1.0, 16777216.0];

/// Fails unless `scale` is a state of loss scaling on the operation's device, and gradients of type `T` may be scaled.
pub(super) fn check_scale<T: Scalar>(check: Check<'_>, scale: Slice<'_, f64>) -> Result<()> {
    check.argument("scale", scale, SCALE_START.len())?;
    if size_of::<T>() == size_of::<f32>() {
        return Ok(());
    }
    check.refuse(format!("a gradient in {} has no scale", T::NAME))
}

/// Divides `x` by the scale, and sets `flag` (one element) to 1 if any element was infinite or NaN. The division is
/// exact except for results that are subnormal. Traffic: 8 B per element.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn unscale(mut x: SliceMut<'_, f32>, state: Slice<'_, f64>, mut flag: SliceMut<'_, u32>) -> Result<()> {
    let device = x.device().clone();
    let check = Check { operation: "precision::unscale", device: &device };
    check.argument("state", state, SCALE_START.len())?;
    check.argument("flag", flag.view(), 1)?;
    let args = UnscaleArgs { x: x.address(), state: state.address(), flag: flag.address(), n: x.len() as u64 };
    // SAFETY: lengths and devices are checked above.
    unsafe { device.launch(id::UNSCALE, device.elementwise(x.len(), 4), &args) }
}

/// Ends a step: halves the scale if `skip` (one element) is set, and doubles it after [`SCALE_GROWTH_INTERVAL`]
/// consecutive steps in which it was not set. Traffic: a few bytes.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn update_scale(mut state: SliceMut<'_, f64>, skip: Slice<'_, u32>) -> Result<()> {
    let device = state.device().clone();
    let check = Check { operation: "precision::update_scale", device: &device };
    check.argument("state", state.view(), SCALE_START.len())?;
    check.argument("skip", skip, 1)?;
    let [least, most] = SCALE_RANGE;
    let args =
        UpdateScaleArgs { state: state.address(), skip: skip.address(), interval: SCALE_GROWTH_INTERVAL, least, most };
    // SAFETY: lengths and devices are checked above.
    unsafe { device.launch(id::LOSS_SCALE_UPDATE, Launch::new(1, 1), &args) }
}

/// A scale for the direction of a product with the Hessian, because f16 could not hold every direction. It is the power
/// of two that brings the direction's `norm` (one element) nearest to `target`. `out` (six elements) receives it as the
/// four coefficients of a combination of one vector, followed by a state of loss scaling. That state's scale is the
/// factor times the scale in `state`: [`unscale`] with it corrects the product. Traffic: a few bytes.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn direction_scale(
    norm: Slice<'_, f64>,
    state: Slice<'_, f64>,
    target: f64,
    mut out: SliceMut<'_, f64>,
) -> Result<()> {
    let device = out.device().clone();
    let check = Check { operation: "precision::direction_scale", device: &device };
    check.argument("norm", norm, 1)?;
    check.argument("state", state, SCALE_START.len())?;
    check.argument("out", out.view(), 4 + SCALE_START.len())?;
    let args = DirectionScaleArgs { norm: norm.address(), state: state.address(), out: out.address(), target };
    // SAFETY: lengths and devices are checked above.
    unsafe { device.launch(id::DIRECTION_SCALE, Launch::new(1, 1), &args) }
}

/// `out = S(to) − S(from)` for a type `S` of 16 bits: the part of a displacement that remains when the weights are
/// rounded before use. Traffic: 12 B per element.
///
/// # Errors
/// [`Error::Argument`] for a type that is no narrower than `f32`; [`Error::Length`] and [`Error::OtherDevice`].
pub fn rounded_difference<S: Compute>(
    from: Slice<'_, f32>,
    to: Slice<'_, f32>,
    mut out: SliceMut<'_, f32>,
) -> Result<()> {
    let (n, device) = (out.len(), out.device().clone());
    let check = Check { operation: "precision::rounded_difference", device: &device };
    if !S::NARROW {
        return check.refuse(format!("{} is not rounded to", S::NAME));
    }
    check.argument("from", from, n)?;
    check.argument("to", to, n)?;
    let (f16, bf16) = (id::ROUNDED_DIFFERENCE_F16, id::ROUNDED_DIFFERENCE_BF16);
    let kernel = S::choose(ComputeKernels { f32: f16, f64: f16, f16, bf16 });
    let args = DifferenceArgs { from: from.address(), to: to.address(), out: out.address(), n: n as u64 };
    // SAFETY: all three vectors hold n elements.
    unsafe { device.launch(kernel, device.elementwise(n, 4), &args) }
}
