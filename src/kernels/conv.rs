//! Convolution in two dimensions, NHWC activations and HWIO weights: forward, input gradient and weight gradient.
//!
//! With `x` \[N, H, W, C\], `weight` \[K, K, C, O\] and `y` \[N, OH, OW, O\], stride s and padding p,
//!
//! ```text
//! y[n, i, j, o]  = sum over a, b, c of  x[n, i s + a - p, j s + b - p, c] * weight[a, b, c, o]
//! dx[n, h, w, c] = sum over a, b, o of  dy[n, (h + p - a) / s, (w + p - b) / s, o] * weight[a, b, c, o]
//! dw[a, b, c, o] = sum over n, i, j of  x[n, i s + a - p, j s + b - p, c] * dy[n, i, j, o]
//! ```
//!
//! where `x` is zero outside the image, and the sum of `dx` runs over the taps that divide evenly and stay inside `dy`
//! (Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285). Each pass does
//! [`ConvShape::macs`] multiply-adds, reads each of its two operands once from main memory where the caches hold a band of
//! an image, and writes its result once. All sums are taken in an order that the shape alone fixes.
//!
//! In f16 and bf16 the operands are of 16 bits, in TF32 they are rounded to 19, and the GPU multiplies them on its tensor
//! cores. Sums are taken in f32; `y` and `dx` are rounded once to their type, and `dw` stays in f32.

mod direct;
mod tensor;
mod tiled;

use super::{check_device, check_length};
use crate::device::{Compute, Device, Error, Result, Slice, SliceMut};
use direct::PANEL;

/// The shape of a convolution with square kernel, stride and zero padding alike in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Images.
    pub batch: usize,
    /// Rows of an input image.
    pub height: usize,
    /// Columns of an input image.
    pub width: usize,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Rows, and columns, of the kernel.
    pub kernel: usize,
    /// Input rows, and columns, from one output pixel to the next.
    pub stride: usize,
    /// Rows, and columns, of zeros on every side of the input.
    pub padding: usize,
}

impl ConvShape {
    /// Rows of an output image (0 where the kernel does not fit into the padded input).
    pub fn out_height(&self) -> usize {
        self.out_extent(self.height)
    }

    /// Columns of an output image (0 where the kernel does not fit into the padded input).
    pub fn out_width(&self) -> usize {
        self.out_extent(self.width)
    }

    fn out_extent(&self, extent: usize) -> usize {
        match (extent + 2 * self.padding).checked_sub(self.kernel) {
            Some(room) if self.stride > 0 => room / self.stride + 1,
            _ => 0,
        }
    }

    /// Elements of `x`.
    pub fn input_len(&self) -> usize {
        self.batch * self.height * self.width * self.in_channels
    }

    /// Elements of `y`.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_height() * self.out_width() * self.out_channels
    }

    /// Elements of the weights.
    pub fn weight_len(&self) -> usize {
        self.taps() * self.in_channels * self.out_channels
    }

    /// Multiply-adds of the forward pass, padding included; the two gradients need as many each.
    pub fn macs(&self) -> u64 {
        self.output_len() as u64 * (self.taps() * self.in_channels) as u64
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Whether the kernels can work with this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] for an extent, kernel or stride of zero, a kernel larger than the padded input, and tensors of
    /// 2³¹ elements or more.
    pub fn check(&self) -> Result<()> {
        const LIMIT: usize = 1 << 31;
        let refused =
            |reason: &str| Err(Error::Argument { operation: "ConvShape", message: format!("{reason}: {self:?}") });
        let extents =
            [self.batch, self.height, self.width, self.in_channels, self.out_channels, self.kernel, self.stride];
        if extents.contains(&0) {
            return refused("every extent but the padding must be at least 1");
        }
        if extents.iter().chain([&self.padding]).any(|&extent| extent >= LIMIT) {
            return refused("an extent is too large");
        }
        if self.out_height() == 0 || self.out_width() == 0 {
            return refused("the kernel is larger than the padded input");
        }
        // Padded images are counted too: the kernels index them with 32 bits.
        let padded = |extent: usize| extent + 2 * (self.padding + self.kernel);
        let product =
            |factors: &[usize]| factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor));
        let tensors = [
            product(&[self.batch, padded(self.height), padded(self.width), self.in_channels.next_multiple_of(PANEL)]),
            product(&[
                self.batch,
                padded(self.out_height()),
                padded(self.out_width()),
                self.out_channels.next_multiple_of(PANEL),
            ]),
            product(&[
                self.kernel,
                self.kernel,
                self.in_channels.next_multiple_of(PANEL),
                self.out_channels.next_multiple_of(PANEL),
            ]),
        ];
        if tensors.iter().any(|elements| elements.is_none_or(|elements| elements >= LIMIT)) {
            return refused("a tensor has 2^31 elements or more");
        }
        Ok(())
    }

    /// Elements of workspace, of the master type, that suffice for all three passes on `device`. The passes may share one
    /// workspace; nothing in it need be kept from one call to the next.
    pub fn workspace_len<S: Compute>(&self, device: &Device) -> usize {
        if !device.is_simt() {
            direct::workspace_len(self)
        } else if S::TENSOR_CORES {
            tensor::workspace_len(self)
        } else {
            tiled::workspace_len(self)
        }
    }

    /// The kernels' own struct of it.
    fn twin(&self) -> Shape {
        Shape {
            batch: self.batch as i32,
            height: self.height as i32,
            width: self.width as i32,
            in_channels: self.in_channels as i32,
            out_channels: self.out_channels as i32,
            kernel: self.kernel as i32,
            stride: self.stride as i32,
            padding: self.padding as i32,
            out_height: self.out_height() as i32,
            out_width: self.out_width() as i32,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    batch: i32,
    height: i32,
    width: i32,
    in_channels: i32,
    out_channels: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
    out_height: i32,
    out_width: i32,
}

/// `y = x * weight`, or with `accumulate` `y += x * weight`. Traffic: reads x and the weights, writes y (and reads it to add).
///
/// # Errors
/// Those of [`ConvShape::check`]; [`Error::Length`] and [`Error::OtherDevice`] for an argument of another length or device
/// (the workspace may be longer than [`ConvShape::workspace_len`]).
pub fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: SliceMut<'_, S>,
    accumulate: bool,
    workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    const OPERATION: &str = "conv::forward";
    shape.check()?;
    let device = y.device().clone();
    check_length(OPERATION, "x", x.len(), shape.input_len())?;
    check_length(OPERATION, "weight", weight.len(), shape.weight_len())?;
    check_length(OPERATION, "y", y.len(), shape.output_len())?;
    check_device(OPERATION, "x", &device, x.device())?;
    check_device(OPERATION, "weight", &device, weight.device())?;
    check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
    if !device.is_simt() {
        direct::forward(shape, x, weight, y, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::forward(shape, x, weight, y, accumulate)
    } else {
        tiled::forward(shape, x, weight, y, accumulate)
    }
}

/// The gradient of the loss with respect to `x`, written to `dx` or, with `accumulate`, added to it. Traffic: reads dy and
/// the weights, writes dx (and reads it to add).
///
/// # Errors
/// As those of [`forward`].
pub fn input_gradient<S: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    dx: SliceMut<'_, S>,
    accumulate: bool,
    workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    const OPERATION: &str = "conv::input_gradient";
    shape.check()?;
    let device = dx.device().clone();
    check_length(OPERATION, "dy", dy.len(), shape.output_len())?;
    check_length(OPERATION, "weight", weight.len(), shape.weight_len())?;
    check_length(OPERATION, "dx", dx.len(), shape.input_len())?;
    check_device(OPERATION, "dy", &device, dy.device())?;
    check_device(OPERATION, "weight", &device, weight.device())?;
    check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
    if !device.is_simt() {
        direct::input_gradient(shape, dy, weight, dx, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::input_gradient(shape, dy, weight, dx, accumulate)
    } else {
        tiled::input_gradient(shape, dy, weight, dx, accumulate)
    }
}

/// The gradient of the loss with respect to the weights, written to `dw` or, with `accumulate`, added to it. Traffic: reads x
/// and dy, writes dw (and reads it to add).
///
/// # Errors
/// As those of [`forward`].
pub fn weight_gradient<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    dw: SliceMut<'_, S::Master>,
    accumulate: bool,
    workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    const OPERATION: &str = "conv::weight_gradient";
    shape.check()?;
    let device = dw.device().clone();
    check_length(OPERATION, "x", x.len(), shape.input_len())?;
    check_length(OPERATION, "dy", dy.len(), shape.output_len())?;
    check_length(OPERATION, "dw", dw.len(), shape.weight_len())?;
    check_device(OPERATION, "x", &device, x.device())?;
    check_device(OPERATION, "dy", &device, dy.device())?;
    check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
    if !device.is_simt() {
        direct::weight_gradient(shape, x, dy, dw, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::weight_gradient(shape, x, dy, dw, accumulate, workspace)
    } else {
        tiled::weight_gradient(shape, x, dy, dw, accumulate, workspace)
    }
}

fn check_workspace<S: Compute>(
    operation: &'static str,
    shape: &ConvShape,
    device: &Device,
    workspace: &SliceMut<'_, S::Master>,
) -> Result<()> {
    let expected = shape.workspace_len::<S>(device);
    if workspace.len() < expected {
        return check_length(operation, "workspace", workspace.len(), expected);
    }
    check_device(operation, "workspace", device, workspace.device())
}
