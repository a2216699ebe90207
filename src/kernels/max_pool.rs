//! Max pooling over NHWC activations, with its gradient and its tangent: `kernels/max_pool.cu`.
//!
//! The forward stores which element of its window each output has chosen, in one byte. Backward and tangent read that
//! byte, so they always take the element that the forward took.

use super::Check;
use crate::device::arguments::MaxPoolArgs;
use crate::device::{Compute, Device, Error, Result, Slice, SliceMut, id};

/// Max pooling of square windows with padding, as `torch.nn.MaxPool2d` with `ceil_mode=False`. Padding never is the
/// maximum. Tensors have fewer than 2^32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxPoolShape {
    /// Images.
    pub batch: usize,
    /// Of the input.
    pub height: usize,
    /// Of the input.
    pub width: usize,
    /// Of input and output.
    pub channels: usize,
    /// Height and width of a window; at most 16.
    pub kernel: usize,
    /// Rows and columns from one window to the next.
    pub stride: usize,
    /// Rows and columns around the input; at most half of the kernel.
    pub padding: usize,
}

/// The elements of a window are numbered in one byte.
const LARGEST_KERNEL: usize = 16;

impl MaxPoolShape {
    /// `(height + 2 padding − kernel) / stride + 1`, rounded down.
    pub fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// `(width + 2 padding − kernel) / stride + 1`, rounded down.
    pub fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Fails unless there is a window, every window meets the image, and the tensors are small enough.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self) -> Result<()> {
        let refused =
            |reason: &str| Err(Error::Argument { operation: "MaxPoolShape", message: format!("{reason}: {self:?}") });
        if self.kernel == 0 || self.kernel > LARGEST_KERNEL || self.stride == 0 {
            return refused("expected a kernel of 1 to 16 and a stride of at least 1");
        }
        if self.padding > self.kernel / 2 {
            return refused("expected a padding of at most half the kernel");
        }
        let extents = [self.batch, self.height, self.width, self.channels];
        let elements = extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        let padded = self.height.min(self.width).saturating_add(2 * self.padding);
        if elements.is_none_or(|elements| elements > u32::MAX as usize) {
            return refused("a tensor has 2^32 elements or more");
        }
        if padded < self.kernel {
            return refused("the window is larger than the padded image");
        }
        // With a stride of 1 and padding the output is larger than the input, by at most 1 in each direction.
        if self.output_len() > u32::MAX as usize {
            return refused("a tensor has 2^32 elements or more");
        }
        Ok(())
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_height() * self.out_width() * self.channels
    }

    fn args(&self, from: u64, to: u64, chosen: u64, accumulate: bool) -> MaxPoolArgs {
        MaxPoolArgs {
            from,
            to,
            chosen,
            batch: self.batch as u32,
            height: self.height as u32,
            width: self.width as u32,
            channels: self.channels as u32,
            out_height: self.out_height() as u32,
            out_width: self.out_width() as u32,
            kernel: self.kernel as u32,
            stride: self.stride as u32,
            padding: self.padding as u32,
            accumulate: accumulate.into(),
        }
    }
}

/// Checks that the shape is sound and that all three tensors lie on one device and have its lengths.
fn check<S: Compute>(
    operation: &'static str,
    shape: &MaxPoolShape,
    device: &Device,
    (x_name, x): (&'static str, Slice<'_, S>),
    (y_name, y): (&'static str, Slice<'_, S>),
    chosen: Slice<'_, u8>,
) -> Result<()> {
    shape.check()?;
    let check = Check { operation, device };
    check.argument(x_name, x, shape.input_len())?;
    check.argument(y_name, y, shape.output_len())?;
    check.argument("chosen", chosen, shape.output_len())
}

/// `y[n, i, j, c]` = the largest `x[n, i·s − padding + p, j·s − padding + q, c]` over `0 ≤ p, q < kernel` inside the
/// image; y is `[batch, out_height, out_width, channels]`. `chosen`, of the same shape, becomes `p·kernel + q` of the
/// largest element: the first of equal ones. A NaN counts as the largest; of several the last is chosen, as in PyTorch.
///
/// Traffic: reads x, writes y and 1 byte per element of y. Where windows overlap, the caches serve the repeated reads.
///
/// # Errors
/// [`Error::Argument`] for a shape that [`MaxPoolShape::check`] refuses, [`Error::Length`] and [`Error::OtherDevice`].
pub fn max_pool<S: Compute>(
    shape: &MaxPoolShape,
    x: Slice<'_, S>,
    mut y: SliceMut<'_, S>,
    mut chosen: SliceMut<'_, u8>,
) -> Result<()> {
    let device = x.device();
    check("max_pool::max_pool", shape, device, ("x", x), ("y", y.view()), chosen.view())?;
    let args = shape.args(x.address(), y.address(), chosen.address(), false);
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
    shape: &MaxPoolShape,
    x: Slice<'_, S>,
    chosen: Slice<'_, u8>,
    mut y: SliceMut<'_, S>,
) -> Result<()> {
    let device = x.device();
    check("max_pool::max_pool_tangent", shape, device, ("x", x), ("y", y.view()), chosen)?;
    let args = shape.args(x.address(), y.address(), chosen.address(), false);
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
    shape: &MaxPoolShape,
    dy: Slice<'_, S>,
    chosen: Slice<'_, u8>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    check("max_pool::max_pool_backward", shape, device, ("dx", dx.view()), ("dy", dy), chosen)?;
    let args = shape.args(dy.address(), dx.address(), chosen.address(), accumulate);
    // SAFETY: the lengths are those of the shape. It only reads `chosen`.
    unsafe { device.launch(S::choose(id::MAX_POOL_BACKWARD), device.elementwise(dx.len(), 4), &args) }
}
