//! Dynamic loss scaling (Micikevicius et al., "Mixed precision training", ICLR 2018) for networks in f16, whose small gradients
//! would vanish: the loss is multiplied by a power of two before the backward pass, its gradient divided by it after.
//!
//! The state is two numbers on the device: the scale, and how many good steps in a row it has seen.

use super::{check_device, check_length};
use crate::device::{Launch, Result, Slice, SliceMut, id};

/// What a run begins with: the scale 2¹⁶, and no good step yet.
pub const START: [f64; 2] = [65536.0, 0.0];
/// Good steps in a row after which the scale is doubled.
pub const GROWTH_INTERVAL: f64 = 2000.0;
/// The range of the scale: what lies above would overflow f16 in the first gradient, that of the logits.
const RANGE: [f64; 2] = [1.0, 16777216.0];

#[repr(C)]
#[derive(Clone, Copy)]
struct UnscaleArgs {
    x: u64,
    state: u64,
    flag: u64,
    n: u64,
}

/// Divides `x` by the scale, which is exact but for what becomes subnormal, and sets `flag` (one element) to 1 if any element was
/// infinite or NaN. Traffic: 8 B per element.
///
/// # Errors
/// Wrong lengths or devices.
pub fn unscale(mut x: SliceMut<'_, f32>, state: Slice<'_, f64>, mut flag: SliceMut<'_, u32>) -> Result<()> {
    const NAME: &str = "loss_scale::unscale";
    check_length(NAME, "state", state.len(), START.len())?;
    check_length(NAME, "flag", flag.len(), 1)?;
    let device = x.device().clone();
    check_device(NAME, "state", &device, state.device())?;
    check_device(NAME, "flag", &device, flag.device())?;
    let args = UnscaleArgs { x: x.address(), state: state.address(), flag: flag.address(), n: x.len() as u64 };
    // SAFETY: the twin of the kernel's struct; lengths and devices are checked above.
    unsafe { device.launch(id::UNSCALE, device.elementwise(x.len(), 4), &args) }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UpdateArgs {
    state: u64,
    skip: u64,
    interval: f64,
    least: f64,
    most: f64,
}

/// Ends a step: halves the scale if `skip` (one element) is set, and doubles it after [`GROWTH_INTERVAL`] steps in a row in which
/// it was not. Traffic: a few bytes.
///
/// # Errors
/// Wrong lengths or devices.
pub fn update(mut state: SliceMut<'_, f64>, skip: Slice<'_, u32>) -> Result<()> {
    const NAME: &str = "loss_scale::update";
    check_length(NAME, "state", state.len(), START.len())?;
    check_length(NAME, "skip", skip.len(), 1)?;
    let device = state.device().clone();
    check_device(NAME, "skip", &device, skip.device())?;
    let [least, most] = RANGE;
    let args = UpdateArgs { state: state.address(), skip: skip.address(), interval: GROWTH_INTERVAL, least, most };
    // SAFETY: the twin of the kernel's struct; lengths and devices are checked above.
    unsafe { device.launch(id::LOSS_SCALE_UPDATE, Launch::new(1, 1), &args) }
}
