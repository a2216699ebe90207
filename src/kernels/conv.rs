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

use super::conv_batch_norm::{self, Normalized, SumsRoom, Workspace};
use super::gradient::{self, Finish};
use super::{Check, check_length};
use crate::device::arguments::{self, SumsArgs};
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
    /// workspace; nothing in it need be kept from one call to the next. On a GPU, the weight gradient alone needs it.
    pub fn workspace_len<S: Compute>(&self, device: &Device) -> usize {
        if !device.is_simt() {
            return direct::workspace_len(self);
        }
        match self.weight_gradient_splits::<S>(device) {
            1 => 0,
            splits => splits * self.weight_len(),
        }
    }

    /// The parts that [`partial_weight_gradients`] leaves: so many gradients over some of the pixels each. One where the gradient
    /// is made at once.
    pub fn weight_gradient_splits<S: Compute>(&self, device: &Device) -> usize {
        match (device.is_simt(), S::TENSOR_CORES) {
            (false, _) => 1,
            (true, true) => tensor::splits::<S>(self),
            (true, false) => tiled::splits(self),
        }
    }

    /// The sums of squares that [`finished_weight_gradient`] leaves; none where the convolution has no such form: it is the tensor
    /// cores', where the gradient is made at once.
    pub fn finished_squares<S: Compute>(&self, device: &Device) -> Option<usize> {
        let at_once = device.is_simt() && S::TENSOR_CORES && self.weight_gradient_splits::<S>(device) == 1;
        at_once.then(|| tensor::finished_squares(self))
    }

    /// Elements of the moments that [`forward_with_moments`] leaves; none where the convolution has no such form: it is the tensor
    /// cores'.
    pub fn moments_len<S: Compute>(&self, device: &Device) -> Option<usize> {
        (device.is_simt() && S::TENSOR_CORES).then(|| tensor::moments_len(self))
    }

    /// Whether [`input_gradient_with_sums`] is to be had: on tensor cores, in types of 16 bits, for input channels in whole eights.
    pub fn leaves_sums<S: Compute>(&self, device: &Device) -> bool {
        self.sums_room::<S>(device).is_some()
    }

    /// What that takes of batch norm's workspace.
    pub(super) fn sums_room<S: Compute>(&self, device: &Device) -> Option<SumsRoom> {
        if device.is_simt() && S::TENSOR_CORES { tensor::sums_room::<S>(self) } else { None }
    }

    /// Measures on a GPU which of the tensor cores' tiles computes the forward fastest, and with `backward` each of the gradients,
    /// unless that is known already. It takes 24 launches of each tile in question and the memory of the operands; without that
    /// memory, or while the device has a graph, which would keep it, nothing is measured, and a rule of thumb stands. No bit of any
    /// result depends on it. A plan asks for it when it is made.
    ///
    /// # Errors
    /// Those of [`ConvShape::check`] and of the device.
    pub fn measure_tiles<S: Compute>(&self, backward: bool, device: &Device) -> Result<()> {
        self.check()?;
        if device.is_host() || !S::TENSOR_CORES || device.holds_memory() {
            return Ok(());
        }
        tensor::measure_tiles::<S>(self, backward, device)
    }

    /// The shape as the kernels take it.
    fn argument(&self) -> arguments::ConvShape {
        arguments::ConvShape {
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

impl Workspace {
    /// The same workspace with room for the sums of [`input_gradient_with_sums`] for each of these convolutions that has that form.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn with_convolutions<'a, S: Compute>(self, shapes: impl IntoIterator<Item = &'a ConvShape>) -> Result<Self> {
        let device = self.device().clone();
        self.extended(shapes.into_iter().filter_map(|shape| shape.sums_room::<S>(&device)))
    }
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
    let device = check_forward(OPERATION, shape, x, weight, y.view())?;
    if !device.is_simt() {
        check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
        direct::forward(shape, x, weight, y, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::forward(shape, x, weight, y, accumulate, None)
    } else {
        tiled::forward(shape, x, weight, y, accumulate)
    }
}

/// As [`forward`] without `accumulate`, and leaves of every channel the moments of y's tiles, from which
/// [`batch_norm::forward_from_moments`](super::batch_norm::forward_from_moments) goes on: of each 128 rows of y as a matrix
/// `[N OH OW, O]` the mean and the sum of squared deviations from it, of the numbers as they are stored, `[O][tiles][2]`. They are
/// taken from registers and cost 8 bytes per 128 elements.
///
/// # Errors
/// As those of [`forward`]; [`Error::Argument`] where [`ConvShape::moments_len`] is none.
pub fn forward_with_moments<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: SliceMut<'_, S>,
    moments: SliceMut<'_, S::Master>,
) -> Result<()> {
    const OPERATION: &str = "conv::forward_with_moments";
    let device = check_forward(OPERATION, shape, x, weight, y.view())?;
    let Some(expected) = shape.moments_len::<S>(&device) else {
        let message = format!("convolutions in {} leave no moments on {}", S::NAME, device.name());
        return Err(Error::Argument { operation: OPERATION, message });
    };
    Check { operation: OPERATION, device: &device }.argument("moments", moments.view(), expected)?;
    tensor::forward(shape, x, weight, y, false, Some(moments))
}

/// Checks what both forms of the forward read and write; returns the device.
fn check_forward<S: Compute>(
    operation: &'static str,
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: Slice<'_, S>,
) -> Result<Device> {
    shape.check()?;
    let device = y.device().clone();
    let check = Check { operation, device: &device };
    check.argument("x", x, shape.input_len())?;
    check.argument("weight", weight, shape.weight_len())?;
    check.argument("y", y, shape.output_len())?;
    Ok(device)
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
    let device = check_input_gradient(OPERATION, shape, dy, weight, ("dx", dx.view()))?;
    if !device.is_simt() {
        check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
        direct::input_gradient(shape, dy, weight, dx, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::input_gradient(shape, dy, weight, dx, accumulate, SumsArgs::default())
    } else {
        tiled::input_gradient(shape, dy, weight, dx, accumulate)
    }
}

/// As [`input_gradient`] where batch norm has made the convolution's input, and no other gradient of that is to be added any more:
/// writes (or with `accumulate` adds up) `dz`, the gradient where the activation after batch norm passed and zero elsewhere, and
/// dgamma and dbeta, as [`batch_norm::backward`](super::batch_norm::backward) does.
/// [`batch_norm::backward_from_sums`](super::batch_norm::backward_from_sums) goes on from there.
///
/// Traffic: that of [`input_gradient`], reads batch norm's input once, and y where the mask comes from it; 16 bytes per channel and
/// 128 pixels. Blocks leave their sums of dz, rounded as it is stored, and of dz (x − mean), taken in f32 over at most 32 rows and in
/// double from there; the last block to come combines them.
///
/// # Errors
/// As those of [`input_gradient`] and of batch norm's backward; [`Error::Argument`] where [`ConvShape::leaves_sums`] is false, or an
/// activation does not begin at a multiple of 16 bytes.
pub fn input_gradient_with_sums<S: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    mut dz: SliceMut<'_, S>,
    accumulate: bool,
    normalized: Normalized<'_, S>,
    dgamma: SliceMut<'_, S::Master>,
    dbeta: SliceMut<'_, S::Master>,
    workspace: &mut Workspace,
) -> Result<()> {
    const OPERATION: &str = "conv::input_gradient_with_sums";
    let device = check_input_gradient(OPERATION, shape, dy, weight, ("dz", dz.view()))?;
    let refused = |message: String| Err(Error::Argument { operation: OPERATION, message });
    let Some(room) = shape.sums_room::<S>(&device) else {
        return refused(format!("this convolution in {} leaves no sums on {}: {shape:?}", S::NAME, device.name()));
    };
    if !dz.address().is_multiple_of(16) {
        return refused("dz does not begin at a multiple of 16 bytes".into());
    }
    let rows = shape.batch * shape.height * shape.width;
    let check = Check { operation: OPERATION, device: &device };
    let norm = conv_batch_norm::sums_args(check, rows, &room, normalized, dgamma, dbeta, workspace)?;
    tensor::input_gradient(shape, dy, weight, dz, accumulate, norm)
}

/// Checks what both forms of the input gradient read and write, this by name; returns the device.
fn check_input_gradient<S: Compute>(
    operation: &'static str,
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    (name, out): (&'static str, Slice<'_, S>),
) -> Result<Device> {
    shape.check()?;
    let device = out.device().clone();
    let check = Check { operation, device: &device };
    check.argument("dy", dy, shape.output_len())?;
    check.argument("weight", weight, shape.weight_len())?;
    check.argument(name, out, shape.input_len())?;
    Ok(device)
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
    let device = check_weight_gradient(OPERATION, shape, x, dy, ("dw", dw.view(), shape.weight_len()))?;
    check_workspace::<S>(OPERATION, shape, &device, &workspace)?;
    if !device.is_simt() {
        return direct::weight_gradient(shape, x, dy, dw, accumulate, workspace);
    }
    let splits = shape.weight_gradient_splits::<S>(&device);
    weight_gradient_by(partial::<S>(), splits, shape, x, dy, dw, accumulate, workspace)
}

/// Writes the gradients over each split's pixels, one after the other, or adds the only one.
type Partial<S> = fn(&ConvShape, Slice<'_, S>, Slice<'_, S>, SliceMut<'_, <S as Compute>::Master>, bool) -> Result<()>;

/// The GPU's form for this type.
fn partial<S: Compute>() -> Partial<S> {
    if S::TENSOR_CORES { tensor::partial_weight_gradients } else { tiled::partial_weight_gradients }
}

/// The weight gradient, at once or in parts that are then added up.
fn weight_gradient_by<S: Compute>(
    partial: Partial<S>,
    splits: usize,
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    dw: SliceMut<'_, S::Master>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    if splits == 1 {
        return partial(shape, x, dy, dw, accumulate);
    }
    partial(shape, x, dy, workspace.reborrow(), false)?;
    gradient::sum_parts(workspace, splits, dw, accumulate)
}

/// The first half of [`weight_gradient`] where that takes two: writes to `parts` the gradients over each of
/// [`ConvShape::weight_gradient_splits`] parts of the pixels, one after the other. [`gradient::GradientStages`] add up those of many
/// layers in one launch.
///
/// # Errors
/// As those of [`forward`]; [`Error::Argument`] where the gradient is made at once.
pub fn partial_weight_gradients<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    parts: SliceMut<'_, S::Master>,
) -> Result<()> {
    const OPERATION: &str = "conv::partial_weight_gradients";
    shape.check()?;
    let splits = shape.weight_gradient_splits::<S>(parts.device());
    check_weight_gradient(OPERATION, shape, x, dy, ("parts", parts.view(), splits * shape.weight_len()))?;
    if splits == 1 {
        return Err(Error::Argument { operation: OPERATION, message: format!("made at once: {shape:?}") });
    }
    partial::<S>()(shape, x, dy, parts, false)
}

/// As [`weight_gradient`] where that is the last stage of a gradient: it is [finished](Finish) before it is written, at no traffic but
/// 8 bytes per 128 × 16 weights. No bit depends on the tile.
///
/// # Errors
/// As those of [`forward`], and of what `finish` names; [`Error::Argument`] where [`ConvShape::finished_squares`] is none.
pub fn finished_weight_gradient<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    dw: SliceMut<'_, S::Master>,
    mut finish: Finish<'_>,
) -> Result<()> {
    const OPERATION: &str = "conv::finished_weight_gradient";
    let device = check_weight_gradient(OPERATION, shape, x, dy, ("dw", dw.view(), shape.weight_len()))?;
    let Some(squares) = shape.finished_squares::<S>(&device) else {
        let message = format!("this convolution in {} does not finish on {}: {shape:?}", S::NAME, device.name());
        return Err(Error::Argument { operation: OPERATION, message });
    };
    let finish = finish.args::<S::Master>(OPERATION, &device, squares)?;
    tensor::weight_gradient(shape, x, dy, dw, false, finish)
}

/// Checks what all forms of the weight gradient read and write, this by name and length; returns the device.
fn check_weight_gradient<S: Compute>(
    operation: &'static str,
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    (name, out, expected): (&'static str, Slice<'_, S::Master>, usize),
) -> Result<Device> {
    shape.check()?;
    let device = out.device().clone();
    let check = Check { operation, device: &device };
    check.argument("x", x, shape.input_len())?;
    check.argument("dy", dy, shape.output_len())?;
    check.argument(name, out, expected)?;
    Ok(device)
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
    Check { operation, device }.device("workspace", workspace.device())
}
