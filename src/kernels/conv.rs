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

use super::{check_device, check_length, pick};
use crate::device::{Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};

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

    /// Elements of workspace that suffice for all three passes on `device`. The passes may share one workspace; nothing in
    /// it need be kept from one call to the next.
    pub fn workspace_len(&self, device: &Device) -> usize {
        let _ = device;
        let packed_forward = self.taps() * self.in_channels * self.out_channels.next_multiple_of(PANEL);
        let packed_input = self.taps() * self.out_channels * self.in_channels.next_multiple_of(PANEL);
        packed_forward.max(packed_input).max(self.groups() * packed_forward)
    }

    /// Groups of images, each of whose weight gradients is summed by one block.
    fn groups(&self) -> usize {
        WEIGHT_GRADIENT_BLOCKS.div_ceil(self.in_channels.div_ceil(self.slice())).min(self.batch)
    }

    /// Input channels of one block of the weight gradient.
    fn slice(&self) -> usize {
        if self.kernel == 1 { 48 } else { 16 }.min(self.in_channels)
    }

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

/// Channels to which packed weights are filled up: a panel of the CPU's kernels (half of it in double precision).
const PANEL: usize = 16;

/// Blocks of a weight gradient: enough for the cores of a large machine, and for two with other work to do.
const WEIGHT_GRADIENT_BLOCKS: usize = 32;

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

/// What a block of the CPU's kernels works on: `images` whole images, or `rows` rows of one.
#[repr(C)]
#[derive(Clone, Copy)]
struct Bands {
    images: i32,
    rows: i32,
}

impl Bands {
    /// Bands of at least `pixels` pixels of images of `height` times `width` (several images where they are smaller, all
    /// of an image where it fits), as long as `bytes(images, rows)` of scratch fit into `limit`.
    fn new(
        batch: usize,
        height: usize,
        width: usize,
        pixels: usize,
        limit: usize,
        bytes: impl Fn(usize, usize) -> usize,
    ) -> Self {
        let mut images = pixels.div_ceil(height * width).clamp(1, batch);
        while images > 1 && bytes(images, height) > limit {
            images -= 1;
        }
        let mut parts = 1;
        while parts < height && bytes(images, height.div_ceil(parts)) > limit {
            parts += 1;
        }
        Self { images: images as i32, rows: height.div_ceil(parts) as i32 }
    }

    fn count(self, batch: usize, height: usize) -> usize {
        batch.div_ceil(self.images as usize) * height.div_ceil(self.rows as usize)
    }
}

/// What of the L2 cache a block takes for its scratch.
const SCRATCH_BYTES: usize = 256 << 10;

#[repr(C)]
#[derive(Clone, Copy)]
struct PackArgs {
    weight: u64,
    packed: u64,
    shape: Shape,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArgs {
    x: u64,
    packed: u64,
    y: u64,
    shape: Shape,
    bands: Bands,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct InputGradientArgs {
    dy: u64,
    packed: u64,
    dx: u64,
    shape: Shape,
    bands: Bands,
    accumulate: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct WeightGradientArgs {
    x: u64,
    dy: u64,
    partial: u64,
    shape: Shape,
    bands: Bands,
    slice: i32,
    groups: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumGroupsArgs {
    partial: u64,
    dw: u64,
    shape: Shape,
    slice: i32,
    groups: i32,
}

/// `y = x * weight`. Traffic: reads x and the weights, writes y.
///
/// # Errors
/// Those of [`ConvShape::check`]; [`Error::Length`] and [`Error::OtherDevice`] for an argument of another length or device
/// (the workspace may be longer than [`ConvShape::workspace_len`]).
pub fn forward<T: Scalar>(
    shape: &ConvShape,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    mut y: SliceMut<'_, T>,
    mut workspace: SliceMut<'_, T>,
) -> Result<()> {
    const OPERATION: &str = "conv::forward";
    shape.check()?;
    let device = y.device().clone();
    check_length(OPERATION, "x", x.len(), shape.input_len())?;
    check_length(OPERATION, "weight", weight.len(), shape.weight_len())?;
    check_length(OPERATION, "y", y.len(), shape.output_len())?;
    check_device(OPERATION, "x", &device, x.device())?;
    check_device(OPERATION, "weight", &device, weight.device())?;
    check_workspace(OPERATION, shape, &device, &workspace)?;

    let (height, width) = (shape.out_height(), shape.out_width());
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * shape.in_channels;
        2 * 4 * (images * rows * width).next_multiple_of(16)
            + if shape.padding > 0 { padded * size_of::<T>() } else { 0 }
    };
    let bands = Bands::new(shape.batch, height, width, 256, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = PackArgs { weight: weight.address(), packed, shape: shape.twin() };
    let args = ForwardArgs { x: x.address(), packed, y: y.address(), shape: shape.twin(), bands };
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    // SAFETY: the twins of the kernels' structs; every slice has the length that the shape implies, the workspace holds the
    // packed weights, and the scratch memory one band.
    unsafe {
        let kernel = pick::<T>(id::CONV_DIRECT_PACK_FORWARD_F32, id::CONV_DIRECT_PACK_FORWARD_F64);
        device.launch(kernel, packing(shape), &pack)?;
        device.launch(pick::<T>(id::CONV_DIRECT_FORWARD_F32, id::CONV_DIRECT_FORWARD_F64), launch, &args)
    }
}

/// The gradient of the loss with respect to `x`, written to `dx` or, with `accumulate`, added to it. Traffic: reads dy and
/// the weights, writes dx (and reads it to add).
///
/// # Errors
/// As those of [`forward`].
pub fn input_gradient<T: Scalar>(
    shape: &ConvShape,
    dy: Slice<'_, T>,
    weight: Slice<'_, T>,
    mut dx: SliceMut<'_, T>,
    accumulate: bool,
    mut workspace: SliceMut<'_, T>,
) -> Result<()> {
    const OPERATION: &str = "conv::input_gradient";
    shape.check()?;
    let device = dx.device().clone();
    check_length(OPERATION, "dy", dy.len(), shape.output_len())?;
    check_length(OPERATION, "weight", weight.len(), shape.weight_len())?;
    check_length(OPERATION, "dx", dx.len(), shape.input_len())?;
    check_device(OPERATION, "dy", &device, dy.device())?;
    check_device(OPERATION, "weight", &device, weight.device())?;
    check_workspace(OPERATION, shape, &device, &workspace)?;

    // Rows and columns of a parity class, and how many more its taps see.
    let (height, width) = (shape.height.div_ceil(shape.stride), shape.width.div_ceil(shape.stride));
    let reach = (shape.kernel - 1).div_ceil(shape.stride);
    let bytes = |images: usize, rows: usize| {
        let padded = images * (rows + reach) * (width + reach) * shape.out_channels;
        2 * 4 * (images * rows * width).next_multiple_of(16) + padded * size_of::<T>()
    };
    let bands = Bands::new(shape.batch, height, width, 256, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = PackArgs { weight: weight.address(), packed, shape: shape.twin() };
    let args = InputGradientArgs {
        dy: dy.address(),
        packed,
        dx: dx.address(),
        shape: shape.twin(),
        bands,
        accumulate: accumulate.into(),
    };
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    // SAFETY: as in `forward`.
    unsafe {
        let kernel = pick::<T>(id::CONV_DIRECT_PACK_INPUT_GRADIENT_F32, id::CONV_DIRECT_PACK_INPUT_GRADIENT_F64);
        device.launch(kernel, packing(shape), &pack)?;
        let kernel = pick::<T>(id::CONV_DIRECT_INPUT_GRADIENT_F32, id::CONV_DIRECT_INPUT_GRADIENT_F64);
        device.launch(kernel, launch, &args)
    }
}

/// The gradient of the loss with respect to the weights, written to `dw`. Traffic: reads x and dy, writes dw.
///
/// # Errors
/// As those of [`forward`].
pub fn weight_gradient<T: Scalar>(
    shape: &ConvShape,
    x: Slice<'_, T>,
    dy: Slice<'_, T>,
    mut dw: SliceMut<'_, T>,
    mut workspace: SliceMut<'_, T>,
) -> Result<()> {
    const OPERATION: &str = "conv::weight_gradient";
    shape.check()?;
    let device = dw.device().clone();
    check_length(OPERATION, "x", x.len(), shape.input_len())?;
    check_length(OPERATION, "dy", dy.len(), shape.output_len())?;
    check_length(OPERATION, "dw", dw.len(), shape.weight_len())?;
    check_device(OPERATION, "x", &device, x.device())?;
    check_device(OPERATION, "dy", &device, dy.device())?;
    check_workspace(OPERATION, shape, &device, &workspace)?;

    let (height, width) = (shape.out_height(), shape.out_width());
    let (slice, groups) = (shape.slice(), shape.groups());
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * slice;
        let pixels = images * rows * width;
        (pixels * PANEL + padded.next_multiple_of(16)) * size_of::<T>() + 4 * pixels
    };
    // A band of 128 pixels, its input and one panel of its output gradient fit into the L1 cache.
    let bands = Bands::new(shape.batch, height, width, 128, 32 << 10, bytes);
    let partial = workspace.address();
    let args = WeightGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial,
        shape: shape.twin(),
        bands,
        slice: slice as i32,
        groups: groups as i32,
    };
    let sum =
        SumGroupsArgs { partial, dw: dw.address(), shape: shape.twin(), slice: slice as i32, groups: groups as i32 };
    let mut launch = Launch::new(shape.in_channels.div_ceil(slice) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = groups as u32;
    // SAFETY: as in `forward`; the workspace holds every group's partial sums.
    unsafe {
        let kernel = pick::<T>(id::CONV_DIRECT_WEIGHT_GRADIENT_F32, id::CONV_DIRECT_WEIGHT_GRADIENT_F64);
        device.launch(kernel, launch, &args)?;
        let kernel = pick::<T>(id::CONV_DIRECT_SUM_GROUPS_F32, id::CONV_DIRECT_SUM_GROUPS_F64);
        device.launch(kernel, packing(shape), &sum)
    }
}

/// The launch of the CPU's kernels that rearrange weights.
fn packing(shape: &ConvShape) -> Launch {
    Launch::new((shape.weight_len() / 16384).clamp(1, 64) as u32, 1)
}

fn check_workspace<T: Scalar>(
    operation: &'static str,
    shape: &ConvShape,
    device: &Device,
    workspace: &SliceMut<'_, T>,
) -> Result<()> {
    let expected = shape.workspace_len(device);
    if workspace.len() < expected {
        return check_length(operation, "workspace", workspace.len(), expected);
    }
    check_device(operation, "workspace", device, workspace.device())
}
