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
//! With G groups, channel o of `y` reads the C/G channels of its group alone: `weight` is \[K, K, C/G, O\], and the
//! sums over c and o stay within a group.
//!
//! Here `x` is zero outside the image, and the sum of `dx` runs over the taps that divide evenly and stay inside `dy`
//! (Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285). Each pass does
//! [`ConvShape::macs`] multiply-adds; on the CPU 3×3 kernels with stride 1, whole panels of channels (16 in f32, at
//! most 2,048 in all), no groups and at least 4×4 pixels do four ninths of them (Lavin and Gray, arXiv:1509.09308), a
//! few more where an extent is odd. These add up to 16 numbers before they multiply, so numbers above a sixteenth of
//! the largest one can overflow. A pass writes its result once, and if the caches hold a band of an image, it reads
//! each operand once from main memory. The order of all sums depends only on the shape.
//!
//! In f16 and bf16 the operands have 16 bits, in TF32 they are rounded to 19 bits, and a GPU multiplies them on its
//! tensor cores. Sums are in f32. `y` and `dx` are rounded once to their type, and `dw` stays in f32.

mod direct;
mod split;
mod split_winograd;
mod tensor;
mod tiled;
mod winograd;

use super::conv_batch_norm::{self, Normalized, SumsRoom, Workspace};
use super::gradient::{self, Finish};
use super::{Check, check_length};
use crate::device::arguments::{self, BatchNormSumsArgs, ConvDivisors, Divisor};
use crate::device::{Compute, Device, Error, Result, Slice, SliceMut};
use direct::PANEL;

/// A group is a row of a GPU's grid, which has no more.
const MOST_GROUPS: usize = 65_535;

/// The shape of a convolution. Kernel, stride and zero padding are the same in both directions.
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
    /// Groups of channels, which do not read each other; 1 for a dense convolution. It divides both numbers of
    /// channels.
    pub groups: usize,
}

impl ConvShape {
    /// Rows of an output image (0 if the kernel does not fit into the padded input).
    pub fn out_height(&self) -> usize {
        self.out_extent(self.height)
    }

    /// Columns of an output image (0 if the kernel does not fit into the padded input).
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
        self.taps() * self.group_inputs() * self.out_channels
    }

    /// Input channels of a group.
    pub fn group_inputs(&self) -> usize {
        self.in_channels / self.groups
    }

    /// Output channels of a group.
    pub fn group_outputs(&self) -> usize {
        self.out_channels / self.groups
    }

    /// Multiply-adds of the forward pass, padding included; the two gradients need as many each.
    pub fn macs(&self) -> u64 {
        self.output_len() as u64 * (self.taps() * self.group_inputs()) as u64
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Whether the kernels can work with this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] for an extent, kernel, stride or number of groups of zero, more than 65,535 groups, groups
    /// that do not divide the channels, a kernel larger than the padded input, and tensors of 2³¹ elements or more.
    pub fn check(&self) -> Result<()> {
        const LIMIT: usize = 1 << 31;
        let refused =
            |reason: &str| Err(Error::Argument { operation: "ConvShape", message: format!("{reason}: {self:?}") });
        let extents = [
            self.batch,
            self.height,
            self.width,
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.groups,
        ];
        if extents.contains(&0) {
            return refused("every extent but the padding must be at least 1");
        }
        if extents.iter().chain([&self.padding]).any(|&extent| extent >= LIMIT) {
            return refused("an extent is too large");
        }
        if self.groups > MOST_GROUPS {
            return refused("there are more than 65,535 groups");
        }
        if !self.in_channels.is_multiple_of(self.groups) || !self.out_channels.is_multiple_of(self.groups) {
            return refused("the groups do not divide the channels");
        }
        if self.out_height() == 0 || self.out_width() == 0 {
            return refused("the kernel is larger than the padded input");
        }
        // Padded images count too: the kernels index them with 32 bits.
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

    /// The number of elements, of the master type, of a workspace for all three passes on `device`. The passes may
    /// share one workspace, and its content need not be kept between calls. On a GPU, only the weight gradient needs
    /// it.
    pub fn workspace_len<S: Compute>(&self, device: &Device) -> usize {
        self.products_workspace_len::<S>(device).max(self.gradient_workspace_len::<S>(device))
    }

    /// As [`ConvShape::workspace_len`], for a forward or an input gradient alone.
    pub fn products_workspace_len<S: Compute>(&self, device: &Device) -> usize {
        if device.is_simt() {
            return 0;
        }
        match HostForm::of::<S>(self, device) {
            HostForm::Split => split::products_workspace_len::<S>(self),
            HostForm::SplitWinograd => split_winograd::products_workspace_len::<S>(self),
            HostForm::Winograd => winograd::products_workspace_len(self),
            HostForm::Direct => direct::products_workspace_len(self),
        }
    }

    /// As [`ConvShape::workspace_len`], for a weight gradient alone.
    fn gradient_workspace_len<S: Compute>(&self, device: &Device) -> usize {
        if device.is_simt() {
            return match self.weight_gradient_splits::<S>(device) {
                1 => 0,
                splits => splits * self.weight_len(),
            };
        }
        match HostForm::of::<S>(self, device) {
            HostForm::Split => split::gradient_workspace_len(self),
            HostForm::SplitWinograd => split_winograd::gradient_workspace_len::<S>(self),
            HostForm::Winograd => winograd::gradient_workspace_len::<S>(self),
            HostForm::Direct => direct::gradient_workspace_len::<S>(self),
        }
    }

    /// The number of parts that [`partial_weight_gradients`] leaves, each of which is a gradient over some of the
    /// pixels. It is 1 if the gradient is not split.
    pub fn weight_gradient_splits<S: Compute>(&self, device: &Device) -> usize {
        match (device.is_simt(), S::TENSOR_CORES) {
            (false, _) => 1,
            (true, true) => tensor::splits::<S>(self),
            (true, false) => tiled::splits(self),
        }
    }

    /// The number of sums of squares that [`finished_weight_gradient`] leaves. `None` if the convolution cannot finish
    /// its gradient: that needs tensor cores and a gradient that is not split.
    pub fn finished_squares<S: Compute>(&self, device: &Device) -> Option<usize> {
        let unsplit = device.is_simt() && S::TENSOR_CORES && self.weight_gradient_splits::<S>(device) == 1;
        unsplit.then(|| tensor::finished_squares(self))
    }

    /// The number of elements of the moments that [`forward_with_moments`] leaves. `None` without tensor cores, which
    /// that needs.
    pub fn moments_len<S: Compute>(&self, device: &Device) -> Option<usize> {
        (device.is_simt() && S::TENSOR_CORES).then(|| tensor::moments_len(self))
    }

    /// Whether [`input_gradient_with_sums`] is available: on tensor cores, in types of 16 bits, without groups, if the
    /// input channels are a multiple of 8.
    pub fn leaves_sums<S: Compute>(&self, device: &Device) -> bool {
        self.sums_room::<S>(device).is_some()
    }

    /// The room that it needs in batch norm's workspace.
    pub(super) fn sums_room<S: Compute>(&self, device: &Device) -> Option<SumsRoom> {
        if device.is_simt() && S::TENSOR_CORES { tensor::sums_room::<S>(self) } else { None }
    }

    /// Measures on a GPU which tile of the tensor cores computes the forward fastest, and with `backward` each of the
    /// gradients, unless that is already known. It takes 20 ms to warm up, 40 launches of each candidate, and the
    /// memory of the operands. If that memory is not free, or the device has a graph, which would keep it, nothing is
    /// measured, and a rule of thumb chooses. Results do not depend on the choice. A plan calls this when it is
    /// created.
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
            in_channels: self.group_inputs() as i32,
            out_channels: self.group_outputs() as i32,
            kernel: self.kernel as i32,
            stride: self.stride as i32,
            padding: self.padding as i32,
            out_height: self.out_height() as i32,
            out_width: self.out_width() as i32,
            in_pitch: self.in_channels as i32,
            out_pitch: self.out_channels as i32,
        }
    }
}

impl Divisor {
    /// A divisor below 2³¹; one of 0, which an empty parity class has, is taken for 1.
    fn new(divisor: usize) -> Self {
        let divisor = divisor.max(1) as u64;
        let shift = divisor.next_power_of_two().ilog2();
        let multiplier = (((1 << shift) - divisor) << 32) / divisor + 1;
        Self { divisor: divisor as u32, multiplier: multiplier as u32, shift }
    }

    /// The divisors of the two extents of parity classes: the whole part of `extent / stride`, and one more.
    fn of_classes(extent: usize, stride: usize) -> [Self; 2] {
        [Self::new(extent / stride), Self::new(extent / stride + 1)]
    }
}

impl ConvDivisors {
    fn new(shape: &ConvShape) -> Self {
        Self {
            out_width: Divisor::new(shape.out_width()),
            out_height: Divisor::new(shape.out_height()),
            in_channels: Divisor::new(shape.group_inputs()),
            out_channels: Divisor::new(shape.group_outputs()),
            kernel: Divisor::new(shape.kernel),
            class_height: Divisor::of_classes(shape.height, shape.stride),
            class_width: Divisor::of_classes(shape.width, shape.stride),
            class_taps: Divisor::of_classes(shape.kernel, shape.stride),
        }
    }
}

/// How the CPU computes a convolution.
enum HostForm {
    /// In bf16 pieces.
    Split,
    /// In bf16 pieces, with four ninths of the products.
    SplitWinograd,
    /// With four ninths of the products.
    Winograd,
    Direct,
}

impl HostForm {
    fn of<S: Compute>(shape: &ConvShape, device: &Device) -> Self {
        match (split::suits::<S>(shape, device), winograd::suits::<S>(shape)) {
            (true, true) if split_winograd::suits::<S>(shape) => Self::SplitWinograd,
            (true, _) => Self::Split,
            (false, true) => Self::Winograd,
            (false, false) => Self::Direct,
        }
    }
}

impl Workspace {
    /// The same workspace, also with room for [`input_gradient_with_sums`] of those of these convolutions that can do
    /// it.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn with_convolutions<'a, S: Compute>(self, shapes: impl IntoIterator<Item = &'a ConvShape>) -> Result<Self> {
        let device = self.device().clone();
        self.extended(shapes.into_iter().filter_map(|shape| shape.sums_room::<S>(&device)))
    }
}

/// `y = x * weight`, or with `accumulate` `y += x * weight`. Traffic: reads x and the weights, writes y (and reads it
/// to add).
///
/// # Errors
/// Those of [`ConvShape::check`]; [`Error::Length`] and [`Error::OtherDevice`] for an argument of another length or
/// device (the workspace may be longer than [`ConvShape::workspace_len`]).
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
        check_workspace::<S>(OPERATION, shape.products_workspace_len::<S>(&device), &device, &workspace)?;
        let by = match HostForm::of::<S>(shape, &device) {
            HostForm::Split => split::forward,
            HostForm::SplitWinograd => split_winograd::forward,
            HostForm::Winograd => winograd::forward,
            HostForm::Direct => direct::forward,
        };
        by(shape, x, weight, y, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::forward(shape, x, weight, y, accumulate, None)
    } else {
        tiled::forward(shape, x, weight, y, accumulate)
    }
}

/// Like [`forward`] without `accumulate`, but also leaves the moments of y's tiles for
/// [`batch_norm::forward_from_moments`](super::batch_norm::forward_from_moments). For each channel and each 128 rows of
/// y as a matrix `[N OH OW, O]`, these are the mean of the stored numbers and the sum of squared deviations from it,
/// `[O][tiles][2]`. They are computed from registers and cost 8 bytes per 128 elements.
///
/// # Errors
/// As those of [`forward`]; [`Error::Argument`] if [`ConvShape::moments_len`] is `None`.
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

/// Checks the arguments of both forms of the forward. Returns the device.
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

/// The gradient of the loss with respect to `x`, written to `dx` or, with `accumulate`, added to it. Traffic: reads dy
/// and the weights, writes dx (and reads it to add).
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
        check_workspace::<S>(OPERATION, shape.products_workspace_len::<S>(&device), &device, &workspace)?;
        let by = match HostForm::of::<S>(shape, &device) {
            HostForm::Split => split::input_gradient,
            HostForm::SplitWinograd => split_winograd::input_gradient,
            HostForm::Winograd => winograd::input_gradient,
            HostForm::Direct => direct::input_gradient,
        };
        by(shape, dy, weight, dx, accumulate, workspace)
    } else if S::TENSOR_CORES {
        tensor::input_gradient(shape, dy, weight, dx, accumulate, BatchNormSumsArgs::default())
    } else {
        tiled::input_gradient(shape, dy, weight, dx, accumulate)
    }
}

/// Like [`input_gradient`], for a convolution whose input is the output of batch norm, if this is the last contribution
/// to that input's gradient. It writes (or with `accumulate` completes) `dz`, which is the gradient where the
/// activation after batch norm passed and zero elsewhere, and also dgamma and dbeta, as
/// [`batch_norm::backward`](super::batch_norm::backward) does.
/// [`batch_norm::backward_from_sums`](super::batch_norm::backward_from_sums) does the rest of the backward.
///
/// Traffic: that of [`input_gradient`], batch norm's input once, and y if the mask comes from it; 16 bytes per channel
/// and 128 pixels. Each block leaves sums of dz, rounded as it is stored, and of dz (x − mean). They are summed in f32
/// over at most 32 rows and in double beyond that. The last block combines them.
///
/// # Errors
/// As those of [`input_gradient`] and of batch norm's backward; [`Error::Argument`] if [`ConvShape::leaves_sums`] is
/// false, or an activation does not begin at a multiple of 16 bytes.
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

/// Checks the arguments of both forms of the input gradient; `name` is the output's. Returns the device.
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

/// The gradient of the loss with respect to the weights, written to `dw` or, with `accumulate`, added to it. Traffic:
/// reads x and dy, writes dw (and reads it to add).
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
    check_workspace::<S>(OPERATION, shape.gradient_workspace_len::<S>(&device), &device, &workspace)?;
    if !device.is_simt() {
        let by = match HostForm::of::<S>(shape, &device) {
            HostForm::Split => split::weight_gradient,
            HostForm::SplitWinograd => split_winograd::weight_gradient,
            HostForm::Winograd => winograd::weight_gradient,
            HostForm::Direct => direct::weight_gradient,
        };
        return by(shape, x, dy, dw, accumulate, workspace);
    }
    let splits = shape.weight_gradient_splits::<S>(&device);
    weight_gradient_by(partial::<S>(), splits, shape, x, dy, dw, accumulate, workspace)
}

/// Writes the gradients over the pixels of each split, one after the other. With one split, it may add the gradient
/// instead.
type Partial<S> = fn(&ConvShape, Slice<'_, S>, Slice<'_, S>, SliceMut<'_, <S as Compute>::Master>, bool) -> Result<()>;

/// The GPU's implementation for this type.
fn partial<S: Compute>() -> Partial<S> {
    if S::TENSOR_CORES { tensor::partial_weight_gradients } else { tiled::partial_weight_gradients }
}

/// The weight gradient, in one part or in several that are then summed.
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

/// The first half of a [`weight_gradient`] that is split: writes to `parts` the gradients over each of
/// [`ConvShape::weight_gradient_splits`] parts of the pixels, one after the other. [`gradient::GradientStages`] sum the
/// parts of many layers in one launch.
///
/// # Errors
/// As those of [`forward`]; [`Error::Argument`] if the gradient is not split.
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
        return Err(Error::Argument { operation: OPERATION, message: format!("the gradient is not split: {shape:?}") });
    }
    partial::<S>()(shape, x, dy, parts, false)
}

/// Like [`weight_gradient`], but the gradient is [finished](Finish) before it is written, for a gradient whose last
/// stage this is. It adds 8 bytes of traffic per 128 × 16 weights. Results do not depend on the tile.
///
/// # Errors
/// As those of [`forward`], also for what `finish` refers to; [`Error::Argument`] if [`ConvShape::finished_squares`] is
/// `None`.
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
    let finish = finish.args::<S::Master>(Check { operation: OPERATION, device: &device }, squares)?;
    tensor::weight_gradient(shape, x, dy, dw, false, finish)
}

/// Checks the arguments of all forms of the weight gradient, with the output's name and length. Returns the device.
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
    expected: usize,
    device: &Device,
    workspace: &SliceMut<'_, S::Master>,
) -> Result<()> {
    if workspace.len() < expected {
        return check_length(operation, "workspace", workspace.len(), expected);
    }
    Check { operation, device }.device("workspace", workspace.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_divide() {
        // As `quotient` in conv.cuh.
        let quotient = |n: u64, by: Divisor| (((u64::from(by.multiplier) * n) >> 32) + n) >> by.shift;
        for divisor in (1..70).chain([127, 128, 1000, 4095, 65_537, 1 << 20, (1 << 30) + 1, (1 << 31) - 1]) {
            let by = Divisor::new(divisor);
            let d = divisor as u64;
            let near = (0..5).flat_map(|k| [k * d, k * d + 1, (k * d + d).saturating_sub(1)]);
            for n in near.chain([12_345_678, (1 << 31) - 1]).filter(|&n| n < 1 << 31) {
                assert_eq!(quotient(n, by), n / d, "{n} / {d}");
            }
        }
    }
}
