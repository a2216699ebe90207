//! The small layers of a ResNet over NHWC activations: relu, addition, average pooling, the parameter-free shortcut and
//! the linear classifier, with their gradients. They store activations in any type and compute in its master type. The
//! linear layer's parameters and results are of the master type, because its results are logits.
//!
//! With `accumulate`, a function adds its result to the output instead of replacing it. This serves the gradient of a
//! value that several operations read, and a tangent that is a sum of two products. All layers except the relu and the
//! linear layer are linear maps, and so their own tangents. Tensors have fewer than 2^32 elements.

use super::Check;
use crate::device::arguments::{
    AddArgs, AddToArgs, GlobalPoolArgs, LinearArgs, LinearInputArgs, LinearWeightArgs, PoolArgs, ReluArgs,
    ReluBackwardArgs, ShortcutArgs,
};
use crate::device::constants::{BLOCK_THREADS, LINEAR_TILE};
use crate::device::{Compute, Device, Error, Launch, Result, Slice, SliceMut, id};

fn refuse<R>(operation: &'static str, message: String) -> Result<R> {
    Err(Error::Argument { operation, message })
}

/// The number of a tensor's elements, which must fit into 32 bits.
pub(super) fn elements(operation: &'static str, extents: &[usize]) -> Result<usize> {
    let product = extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    match product {
        Some(elements) if elements <= u32::MAX as usize => Ok(elements),
        _ => refuse(operation, format!("a tensor of {extents:?} has 2^32 elements or more")),
    }
}

/// `y = max(x, 0)`; a NaN stays a NaN. Traffic: reads n, writes n elements.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn relu<S: Compute>(x: Slice<'_, S>, mut y: SliceMut<'_, S>) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::relu", device };
    check.argument("y", y.view(), x.len())?;
    let args = ReluArgs { x: x.address(), y: y.address(), n: x.len() as u64 };
    // SAFETY: both lengths are n.
    unsafe { device.launch(S::choose(id::RELU), device.elementwise(x.len(), 4), &args) }
}

/// `dx = dy` where the forward's output `y > 0`, else 0. Traffic: reads 2 n, writes n elements; accumulating reads
/// another n.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn relu_backward<S: Compute>(
    y: Slice<'_, S>,
    dy: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = y.device();
    let check = Check { operation: "layers::relu_backward", device };
    check.argument("dy", dy, y.len())?;
    check.argument("dx", dx.view(), y.len())?;
    let args = ReluBackwardArgs {
        y: y.address(),
        dy: dy.address(),
        dx: dx.address(),
        n: y.len() as u64,
        accumulate: accumulate.into(),
    };
    let kernel = S::choose(id::RELU_BACKWARD);
    // SAFETY: all lengths are n.
    unsafe { device.launch(kernel, device.elementwise(y.len(), 4), &args) }
}

/// `out = a + b`. Traffic: reads 2 n, writes n elements.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn add<S: Compute>(a: Slice<'_, S>, b: Slice<'_, S>, mut out: SliceMut<'_, S>) -> Result<()> {
    let device = a.device();
    let check = Check { operation: "layers::add", device };
    check.argument("b", b, a.len())?;
    check.argument("out", out.view(), a.len())?;
    let args = AddArgs { a: a.address(), b: b.address(), out: out.address(), n: a.len() as u64 };
    // SAFETY: all lengths are n.
    unsafe { device.launch(S::choose(id::ADD), device.elementwise(a.len(), 4), &args) }
}

/// `sum = sum + x`. Traffic: reads 2n, writes n elements.
///
/// # Errors
/// [`Error::Length`] and [`Error::OtherDevice`].
pub fn add_to<S: Compute>(x: Slice<'_, S>, mut sum: SliceMut<'_, S>) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::add_to", device };
    check.argument("sum", sum.view(), x.len())?;
    let args = AddToArgs { x: x.address(), sum: sum.address(), n: x.len() as u64 };
    // SAFETY: both lengths are n.
    unsafe { device.launch(S::choose(id::ADD_TO), device.elementwise(x.len(), 4), &args) }
}

/// Pooling of square windows, as PyTorch's pools with `ceil_mode=False`. Rows and columns outside of all windows are
/// ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    /// Images.
    pub batch: usize,
    /// Of the input.
    pub height: usize,
    /// Of the input.
    pub width: usize,
    /// Of input and output.
    pub channels: usize,
    /// Height and width of a window.
    pub kernel: usize,
    /// Rows and columns from one window to the next.
    pub stride: usize,
    /// Rows and columns around the input; at most half of the kernel.
    pub padding: usize,
}

impl PoolShape {
    /// `(height + 2 padding − kernel) / stride + 1`, rounded down.
    pub fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// `(width + 2 padding − kernel) / stride + 1`, rounded down.
    pub fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Fails unless there is at least one window, every window meets the image, and the tensors are small enough.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self) -> Result<()> {
        let refused = |reason: &str| refuse("PoolShape", format!("{reason}: {self:?}"));
        if self.kernel == 0 || self.stride == 0 {
            return refused("expected a kernel and a stride of at least 1");
        }
        if self.padding > self.kernel / 2 {
            return refused("expected a padding of at most half the kernel");
        }
        elements("PoolShape", &[self.batch, self.height, self.width, self.channels])?;
        if self.height.min(self.width).saturating_add(2 * self.padding) < self.kernel {
            return refused("the window is larger than the padded image");
        }
        // With a stride of 1 and padding the output is larger than the input, by at most 1 in each direction.
        elements("PoolShape", &[self.batch, self.out_height(), self.out_width(), self.channels]).map(|_| ())
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_height() * self.out_width() * self.channels
    }

    fn args(&self, from: u64, to: u64, accumulate: bool) -> PoolArgs {
        PoolArgs {
            from,
            to,
            batch: self.batch as u32,
            height: self.height as u32,
            width: self.width as u32,
            channels: self.channels as u32,
            out_height: self.out_height() as u32,
            out_width: self.out_width() as u32,
            kernel: self.kernel as u32,
            stride: self.stride as u32,
            accumulate: accumulate.into(),
        }
    }
}

/// `y[n, i, j, c]` = the mean of `x[n, i·s + p, j·s + q, c]` over `0 ≤ p, q < kernel`; y is
/// `[batch, out_height, out_width, channels]`. Traffic: reads x, writes y.
///
/// # Errors
/// [`Error::Argument`] for a shape that [`PoolShape::check`] refuses and for padding, [`Error::Length`] and
/// [`Error::OtherDevice`].
pub fn average_pool<S: Compute>(shape: &PoolShape, x: Slice<'_, S>, mut y: SliceMut<'_, S>) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::average_pool", device };
    let (input, output) = average_pool_lengths(check, shape)?;
    check.argument("x", x, input)?;
    check.argument("y", y.view(), output)?;
    let args = shape.args(x.address(), y.address(), false);
    let kernel = S::choose(id::AVERAGE_POOL);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(output, 4), &args) }
}

/// The lengths of input and output, if the shape is sound and has no padding.
fn average_pool_lengths(check: Check<'_>, shape: &PoolShape) -> Result<(usize, usize)> {
    shape.check()?;
    if shape.padding > 0 {
        return check.refuse(format!("average pooling has no padding: {shape:?}"));
    }
    Ok((shape.input_len(), shape.output_len()))
}

/// The gradient of [`average_pool`]. Traffic: reads dy, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`average_pool`].
pub fn average_pool_backward<S: Compute>(
    shape: &PoolShape,
    dy: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layers::average_pool_backward", device };
    let (input, output) = average_pool_lengths(check, shape)?;
    check.argument("dy", dy, output)?;
    check.argument("dx", dx.view(), input)?;
    let args = shape.args(dy.address(), dx.address(), accumulate);
    let kernel = S::choose(id::AVERAGE_POOL_BACKWARD);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(input, 4), &args) }
}

/// `y[n, c]` = the mean of `x[n, p, c]` over the `pixels` p. Traffic: reads x, writes y.
///
/// # Errors
/// [`Error::Argument`] for no pixels, [`Error::Length`] and [`Error::OtherDevice`].
pub fn global_average_pool<S: Compute>(
    batch: usize,
    pixels: usize,
    channels: usize,
    x: Slice<'_, S>,
    mut y: SliceMut<'_, S>,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::global_average_pool", device };
    if pixels == 0 {
        return refuse(check.operation, "an image without pixels has no mean".into());
    }
    check.argument("x", x, elements(check.operation, &[batch, pixels, channels])?)?;
    check.argument("y", y.view(), batch * channels)?;
    let args = GlobalPoolArgs {
        from: x.address(),
        to: y.address(),
        batch: batch as u32,
        pixels: pixels as u32,
        channels: channels as u32,
        accumulate: 0,
    };
    let kernel = S::choose(id::GLOBAL_AVERAGE_POOL);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(x.len(), pixels), &args) }
}

/// The gradient of [`global_average_pool`]: `dx[n, p, c] = dy[n, c] / pixels`. Traffic: reads dy, writes dx;
/// accumulating reads dx too.
///
/// # Errors
/// As [`global_average_pool`].
pub fn global_average_pool_backward<S: Compute>(
    batch: usize,
    pixels: usize,
    channels: usize,
    dy: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layers::global_average_pool_backward", device };
    if pixels == 0 {
        return refuse(check.operation, "an image without pixels has no mean".into());
    }
    check.argument("dx", dx.view(), elements(check.operation, &[batch, pixels, channels])?)?;
    check.argument("dy", dy, batch * channels)?;
    let args = GlobalPoolArgs {
        from: dy.address(),
        to: dx.address(),
        batch: batch as u32,
        pixels: pixels as u32,
        channels: channels as u32,
        accumulate: accumulate.into(),
    };
    let kernel = S::choose(id::GLOBAL_AVERAGE_POOL_BACKWARD);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(dx.len(), 4), &args) }
}

/// A shortcut without parameters: every `stride`-th pixel, with new channels of zeros. Half of them lie before the
/// input's channels in He et al. 2016 (option A), and none in PyramidNets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShortcutShape {
    /// Images.
    pub batch: usize,
    /// Of the input.
    pub height: usize,
    /// Of the input.
    pub width: usize,
    /// Of the input.
    pub in_channels: usize,
    /// Of the output; no fewer than the input's.
    pub out_channels: usize,
    /// New channels of zeros before those of the input; the other new channels lie behind them.
    pub before: usize,
    /// Rows and columns from one sampled pixel to the next.
    pub stride: usize,
}

impl ShortcutShape {
    /// `height / stride`, rounded up.
    pub fn out_height(&self) -> usize {
        self.height.div_ceil(self.stride)
    }

    /// `width / stride`, rounded up.
    pub fn out_width(&self) -> usize {
        self.width.div_ceil(self.stride)
    }

    /// Fails for a stride of zero, an output without room for the input's channels, or tensors that are too large.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self) -> Result<()> {
        if self.stride == 0 || self.out_channels.checked_sub(self.in_channels).is_none_or(|new| new < self.before) {
            return refuse("ShortcutShape", format!("too few output channels, or a stride of zero: {self:?}"));
        }
        elements("ShortcutShape", &[self.batch, self.height, self.width, self.in_channels])?;
        elements("ShortcutShape", &[self.batch, self.out_height(), self.out_width(), self.out_channels]).map(|_| ())
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.height * self.width * self.in_channels
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_height() * self.out_width() * self.out_channels
    }

    fn args(&self, from: u64, to: u64, accumulate: bool) -> ShortcutArgs {
        ShortcutArgs {
            from,
            to,
            batch: self.batch as u32,
            height: self.height as u32,
            width: self.width as u32,
            in_channels: self.in_channels as u32,
            out_height: self.out_height() as u32,
            out_width: self.out_width() as u32,
            out_channels: self.out_channels as u32,
            stride: self.stride as u32,
            pad: self.before as u32,
            accumulate: accumulate.into(),
        }
    }
}

/// `y[n, i, j, c] = x[n, i·s, j·s, c − before]`, and 0 in the added channels; y is
/// `[batch, out_height, out_width, out_channels]`. Traffic: reads the sampled pixels of x, writes y.
///
/// # Errors
/// [`Error::Argument`] as [`ShortcutShape::check`], [`Error::Length`] and [`Error::OtherDevice`].
pub fn shortcut<S: Compute>(shape: &ShortcutShape, x: Slice<'_, S>, mut y: SliceMut<'_, S>) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::shortcut", device };
    shape.check()?;
    let (input, output) = (shape.input_len(), shape.output_len());
    check.argument("x", x, input)?;
    check.argument("y", y.view(), output)?;
    let args = shape.args(x.address(), y.address(), false);
    let kernel = S::choose(id::SHORTCUT);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(output, 4), &args) }
}

/// The gradient of [`shortcut`]: zero at the pixels that were not sampled. Traffic: reads dy without the added
/// channels, writes dx; accumulating reads and writes only the sampled pixels of dx.
///
/// # Errors
/// As [`shortcut`].
pub fn shortcut_backward<S: Compute>(
    shape: &ShortcutShape,
    dy: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layers::shortcut_backward", device };
    shape.check()?;
    let (input, output) = (shape.input_len(), shape.output_len());
    check.argument("dy", dy, output)?;
    check.argument("dx", dx.view(), input)?;
    let args = shape.args(dy.address(), dx.address(), accumulate);
    let kernel = S::choose(id::SHORTCUT_BACKWARD);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, device.elementwise(input, 4), &args) }
}

/// A linear layer: x is `[batch, inputs]`, the weight `[inputs, outputs]`, y `[batch, outputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Samples.
    pub batch: usize,
    /// Features of a sample.
    pub inputs: usize,
    /// Results per sample.
    pub outputs: usize,
}

impl LinearShape {
    /// The numbers of elements of x, weight and y.
    fn elements(&self) -> Result<(usize, usize, usize)> {
        let x = elements("LinearShape", &[self.batch, self.inputs])?;
        let weight = elements("LinearShape", &[self.inputs, self.outputs])?;
        Ok((x, weight, elements("LinearShape", &[self.batch, self.outputs])?))
    }
}

/// The launch of a product of `rows` x `columns`: tiles of 32 x 32 on the GPU, ranges of rows on the CPU.
fn product_launch(device: &Device, rows: usize, columns: usize, depth: usize) -> Launch {
    if device.is_simt() {
        let tiles = |extent: usize| extent.div_ceil(LINEAR_TILE).max(1) as u32;
        return Launch { grid: [tiles(columns), tiles(rows), 1], block: [BLOCK_THREADS as u32, 1, 1], shared: 0 };
    }
    let blocks = device.elementwise(rows * columns * depth, 1).grid[0];
    Launch::new(blocks.min(rows.max(1) as u32), 1)
}

/// `y = x · weight + bias` (the bias is optional); with `accumulate`, the result is added to `y`. 2 · batch · inputs ·
/// outputs operations. Traffic: reads x, weight and bias, writes y (and reads it to add).
///
/// # Errors
/// [`Error::Argument`] for tensors that are too large, [`Error::Length`] and [`Error::OtherDevice`].
pub fn linear<S: Compute>(
    shape: &LinearShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S::Master>,
    bias: Option<Slice<'_, S::Master>>,
    mut y: SliceMut<'_, S::Master>,
    accumulate: bool,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::linear", device };
    let (x_len, weight_len, y_len) = shape.elements()?;
    check.argument("x", x, x_len)?;
    check.argument("weight", weight, weight_len)?;
    if let Some(bias) = bias {
        check.argument("bias", bias, shape.outputs)?;
    }
    check.argument("y", y.view(), y_len)?;
    let LinearShape { batch, inputs, outputs } = *shape;
    let args = LinearArgs {
        x: x.address(),
        weight: weight.address(),
        bias: bias.map_or(0, |bias| bias.address()),
        y: y.address(),
        batch: batch as u32,
        inputs: inputs as u32,
        outputs: outputs as u32,
        accumulate: accumulate.into(),
    };
    let launch = product_launch(device, batch, outputs, inputs);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::LINEAR), launch, &args) }
}

/// The gradient of [`linear`] with respect to x: `dx = dy · weightᵀ`. As many operations as the forward. Traffic: reads
/// dy and weight, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`linear`].
pub fn linear_input_gradient<S: Compute>(
    shape: &LinearShape,
    dy: Slice<'_, S::Master>,
    weight: Slice<'_, S::Master>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layers::linear_input_gradient", device };
    let (x_len, weight_len, y_len) = shape.elements()?;
    check.argument("dy", dy, y_len)?;
    check.argument("weight", weight, weight_len)?;
    check.argument("dx", dx.view(), x_len)?;
    let LinearShape { batch, inputs, outputs } = *shape;
    let args = LinearInputArgs {
        dy: dy.address(),
        weight: weight.address(),
        dx: dx.address(),
        batch: batch as u32,
        inputs: inputs as u32,
        outputs: outputs as u32,
        accumulate: accumulate.into(),
    };
    let kernel = S::choose(id::LINEAR_INPUT);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, product_launch(device, batch, inputs, outputs), &args) }
}

/// The gradients of [`linear`] with respect to its parameters: `dweight = xᵀ · dy`, and optionally `dbias` = the column
/// sums of dy. As many operations as the forward. Traffic: reads x and dy, writes the gradients; accumulating reads
/// them too.
///
/// # Errors
/// As [`linear`].
pub fn linear_weight_gradient<S: Compute>(
    shape: &LinearShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S::Master>,
    mut dweight: SliceMut<'_, S::Master>,
    dbias: Option<SliceMut<'_, S::Master>>,
    accumulate: bool,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layers::linear_weight_gradient", device };
    let (x_len, weight_len, y_len) = shape.elements()?;
    check.argument("x", x, x_len)?;
    check.argument("dy", dy, y_len)?;
    check.argument("dweight", dweight.view(), weight_len)?;
    let LinearShape { batch, inputs, outputs } = *shape;
    let mut args = LinearWeightArgs {
        x: x.address(),
        dy: dy.address(),
        dweight: dweight.address(),
        dbias: 0,
        batch: batch as u32,
        inputs: inputs as u32,
        outputs: outputs as u32,
        accumulate: accumulate.into(),
    };
    if let Some(mut dbias) = dbias {
        check.argument("dbias", dbias.view(), outputs)?;
        args.dbias = dbias.address();
    }
    let kernel = S::choose(id::LINEAR_WEIGHT);
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(kernel, product_launch(device, inputs, outputs, batch), &args) }
}
