//! Max pooling over NHWC activations, with its gradient and its tangent: `kernels/max_pool.cu`.
//!
//! The forward stores which element of its window each output has chosen, in one byte. Backward and tangent read that
//! byte, so they always take the element that the forward took.

use super::Check;
use super::layers::PoolShape;
use crate::device::arguments::MaxPoolArgs;
use crate::device::{Compute, Device, Error, Result, Slice, SliceMut, id};

/// The elements of a window are numbered in one byte.
const LARGEST_KERNEL: usize = 16;

/// Fails unless max pooling can work with this shape: one that [`PoolShape::check`] accepts, with windows of at most
/// 16×16.
///
/// # Errors
/// [`Error::Argument`].
pub fn check_shape(shape: &PoolShape) -> Result<()> {
    shape.check()?;
    if shape.kernel > LARGEST_KERNEL {
        let message = format!("expected a kernel of 1 to {LARGEST_KERNEL}: {shape:?}");
        return Err(Error::Argument { operation: "max_pool::check_shape", message });
    }
    Ok(())
}

fn args(shape: &PoolShape, from: u64, to: u64, chosen: u64, accumulate: bool) -> MaxPoolArgs {
    MaxPoolArgs {
        from,
        to,
        chosen,
        batch: shape.batch as u32,
        height: shape.height as u32,
        width: shape.width as u32,
        channels: shape.channels as u32,
        out_height: shape.out_height() as u32,
        out_width: shape.out_width() as u32,
        kernel: shape.kernel as u32,
        stride: shape.stride as u32,
        padding: shape.padding as u32,
        accumulate: accumulate.into(),
    }
}

/// Checks that the shape is sound and that all three tensors lie on one device and have its lengths.
fn check<S: Compute>(
    operation: &'static str,
    shape: &PoolShape,
    device: &Device,
    (x_name, x): (&'static str, Slice<'_, S>),
    (y_name, y): (&'static str, Slice<'_, S>),
    chosen: Slice<'_, u8>,
) -> Result<()> {
    check_shape(shape)?;
    let check = Check { operation, device };
    check.argument(x_name, x, shape.input_len())?;
    check.argument(y_name, y, shape.output_len())?;
    check.argument("chosen", chosen, shape.output_len())
}

/// `y[n, i, j, c]` = the largest `x[n, i·s − padding + p, j·s − padding + q, c]` over `0 ≤ p, q < kernel` inside the
/// image; y is `[batch, out_height, out_width, channels]`. `chosen`, of the same shape, becomes `p·kernel + q` of the
/// largest element: the first of equal ones. Padding is never the largest. A NaN counts as the largest; of several the
/// last is chosen, as in PyTorch.
///
/// Traffic: reads x, writes y and 1 byte per element of y. Where windows overlap, the caches serve the repeated reads.
///
/// # Errors
/// [`Error::Argument`] for a shape that [`check_shape`] refuses, [`Error::Length`] and [`Error::OtherDevice`].
pub fn max_pool<S: Compute>(
    shape: &PoolShape,
    x: Slice<'_, S>,
    mut y: SliceMut<'_, S>,
    mut chosen: SliceMut<'_, u8>,
) -> Result<()> {
    let device = x.device();
    check("max_pool::max_pool", shape, device, ("x", x), ("y", y.view()), chosen.view())?;
    let args = args(shape, x.address(), y.address(), chosen.address(), false);
    let launch = device.elementwise(y.len(), shape.kernel * shape.kernel);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::MAX_POOL), launch, &args) }
}

/// The tangent of [`max_pool`]: each element of `y` becomes the element of `x`, both tangents, that the forward has
/// chosen.
///
/// Traffic: reads 1 byte and one element of x per element of y, writes y.
///
/// # Errors
/// As [`max_pool`].
pub fn max_pool_tangent<S: Compute>(
    shape: &PoolShape,
    x: Slice<'_, S>,
    chosen: Slice<'_, u8>,
    mut y: SliceMut<'_, S>,
) -> Result<()> {
    let device = x.device();
    check("max_pool::max_pool_tangent", shape, device, ("x", x), ("y", y.view()), chosen)?;
    let args = args(shape, x.address(), y.address(), chosen.address(), false);
    // SAFETY: the lengths are those of the shape. It only reads `chosen`.
    unsafe { device.launch(S::choose(id::MAX_POOL_TANGENT), device.elementwise(y.len(), 4), &args) }
}

/// The gradient of [`max_pool`]: `dx` is the sum of `dy` over the windows that have chosen the element.
///
/// Traffic: reads dy and 1 byte per element of dy, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`max_pool`].
pub fn max_pool_backward<S: Compute>(
    shape: &PoolShape,
    dy: Slice<'_, S>,
    chosen: Slice<'_, u8>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    check("max_pool::max_pool_backward", shape, device, ("dx", dx.view()), ("dy", dy), chosen)?;
    let args = args(shape, dy.address(), dx.address(), chosen.address(), accumulate);
    // SAFETY: the lengths are those of the shape. It only reads `chosen`.
    unsafe { device.launch(S::choose(id::MAX_POOL_BACKWARD), device.elementwise(dx.len(), 4), &args) }
}
