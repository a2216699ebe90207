//! Convolution on the CPU: `kernels/host/conv_direct.cu`, one thread per block.

use super::ConvShape;
use crate::device::arguments::{
    Bands, DirectForwardArgs, DirectInputGradientArgs, DirectWeightGradientArgs, PackWeightsArgs, SumPartsOfBatchArgs,
};
use crate::device::constants::PANEL_BYTES;
use crate::device::{Compute, Launch, Result, Slice, SliceMut, id};
use crate::kernels::pick;

/// Packed weights are padded to a multiple of so many channels: a panel of the kernels in single precision, two in
/// double.
pub(super) const PANEL: usize = PANEL_BYTES / 4;

/// Blocks of a weight gradient: enough for the cores of a large machine, and to balance the load on two cores.
const WEIGHT_GRADIENT_BLOCKS: usize = 32;

/// The number of elements of the workspace of the forward and of the input gradient: for the packed weights.
pub(super) fn products_workspace_len(shape: &ConvShape) -> usize {
    let packed_input = shape.taps() * shape.group_outputs() * shape.in_channels.next_multiple_of(PANEL);
    packed_input.max(packed_forward(shape))
}

/// The number of elements of the workspace of the weight gradient: for the partial ones of all parts.
pub(super) fn gradient_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    parts::<S>(shape) * packed_forward(shape)
}

fn packed_forward(shape: &ConvShape) -> usize {
    shape.taps() * shape.group_inputs() * shape.out_channels.next_multiple_of(PANEL)
}

/// The number of parts of the batch. For each part and slice, or for each part and some groups of channels, one block
/// sums a weight gradient.
fn parts<S: Compute>(shape: &ConvShape) -> usize {
    WEIGHT_GRADIENT_BLOCKS.div_ceil(weight_gradient_blocks::<S>(shape)).min(shape.batch)
}

/// Blocks of a weight gradient for one part of the batch.
fn weight_gradient_blocks<S: Compute>(shape: &ConvShape) -> usize {
    if shape.groups > 1 { Sets::outputs::<S>(shape).count } else { shape.in_channels.div_ceil(slice(shape)) }
}

/// Input channels of one block of the weight gradient. With several taps this is a panel, so that pixels are close
/// together in the block's padded copy of the image. With one tap it is more, so that a tile of the output gradient is
/// used often enough. A group is not divided.
fn slice(shape: &ConvShape) -> usize {
    let most = if shape.groups > 1 {
        shape.group_inputs()
    } else if shape.kernel == 1 {
        48
    } else {
        16
    };
    most.min(shape.group_inputs())
}

/// The sets of channels that blocks compute: all of them, or those of a group if they are whole panels, or a panel of
/// several groups, for which the block's copy of the other image holds each number once for every lane.
struct Sets {
    count: usize,
    /// Copies of a number in the block's copy.
    copies: usize,
}

impl Sets {
    fn new<S: Compute>(groups: usize, channels: usize) -> Self {
        let panel = PANEL_BYTES / size_of::<S::Master>();
        match (channels / groups).is_multiple_of(panel) {
            _ if groups == 1 => Self { count: 1, copies: 1 },
            true => Self { count: groups, copies: 1 },
            false => Self { count: channels.div_ceil(panel), copies: panel },
        }
    }

    fn inputs<S: Compute>(shape: &ConvShape) -> Self {
        Self::new::<S>(shape.groups, shape.in_channels)
    }

    fn outputs<S: Compute>(shape: &ConvShape) -> Self {
        Self::new::<S>(shape.groups, shape.out_channels)
    }
}

impl Bands {
    /// Bands of at least `pixels` pixels of images of `height` times `width`, with scratch memory of `bytes(images,
    /// rows)` up to `limit`. A band is several small images, a whole image if that fits, or rows of one.
    pub(super) fn new(
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

    pub(super) fn count(self, batch: usize, height: usize) -> usize {
        batch.div_ceil(self.images as usize) * height.div_ceil(self.rows as usize)
    }
}

/// The scratch memory of a block, which stays in the L2 cache.
const SCRATCH_BYTES: usize = 256 << 10;

pub(super) fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    let device = y.device().clone();
    let (height, width) = (shape.out_height(), shape.out_width());
    let sets = Sets::outputs::<S>(shape);
    // Narrow types are widened in the copy, even without padding, and groups are separated.
    let copied = shape.padding > 0 || S::NARROW || shape.groups > 1;
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let channels = shape.group_inputs() * sets.copies;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * channels;
        2 * 4 * (images * rows * width).next_multiple_of(16) + if copied { padded * size_of::<S::Master>() } else { 0 }
    };
    let bands = Bands::new(shape.batch, height, width, 256, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = PackWeightsArgs { weight: weight.address(), packed, shape: shape.argument() };
    let accumulate = accumulate.into();
    let args = DirectForwardArgs { x: x.address(), packed, y: y.address(), shape: shape.argument(), bands, accumulate };
    let mut launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = sets.count as u32;
    // SAFETY: every slice has the length that the shape implies, the workspace has room for the packed weights, and the
    // scratch memory for one band.
    unsafe {
        let kernel = S::choose(id::CONV_DIRECT_PACK_FORWARD);
        device.launch(kernel, packing(shape), &pack)?;
        device.launch(S::choose(id::CONV_DIRECT_FORWARD), launch, &args)
    }
}

pub(super) fn input_gradient<S: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    let device = dx.device().clone();
    // Rows and columns of a parity class, and by how many more its taps reach.
    let (height, width) = (shape.height.div_ceil(shape.stride), shape.width.div_ceil(shape.stride));
    let reach = (shape.kernel - 1).div_ceil(shape.stride);
    let sets = Sets::inputs::<S>(shape);
    let bytes = |images: usize, rows: usize| {
        let padded = images * (rows + reach) * (width + reach) * shape.group_outputs() * sets.copies;
        2 * 4 * (images * rows * width).next_multiple_of(16) + padded * size_of::<S::Master>()
    };
    let bands = Bands::new(shape.batch, height, width, 256, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = PackWeightsArgs { weight: weight.address(), packed, shape: shape.argument() };
    let args = DirectInputGradientArgs {
        dy: dy.address(),
        packed,
        dx: dx.address(),
        shape: shape.argument(),
        bands,
        accumulate: accumulate.into(),
    };
    let mut launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = sets.count as u32;
    // SAFETY: as in `forward`.
    unsafe {
        let kernel = S::choose(id::CONV_DIRECT_PACK_INPUT_GRADIENT);
        device.launch(kernel, packing(shape), &pack)?;
        let kernel = S::choose(id::CONV_DIRECT_INPUT_GRADIENT);
        device.launch(kernel, launch, &args)
    }
}

pub(super) fn weight_gradient<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    mut dw: SliceMut<'_, S::Master>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    let device = dw.device().clone();
    let (height, width) = (shape.out_height(), shape.out_width());
    let (slice, parts) = (slice(shape), parts::<S>(shape));
    let copies = Sets::outputs::<S>(shape).copies;
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * slice * copies;
        let pixels = images * rows * width;
        (pixels * PANEL + padded.next_multiple_of(16)) * size_of::<S::Master>() + 4 * pixels
    };
    // A band of 128 pixels, with its input and one panel of its output gradient, about fills the L1 cache. Longer
    // bands, up to this limit, copy fewer rows twice. A row of a copy for groups takes as much as several others.
    let limit = if copies > 1 { SCRATCH_BYTES } else { 48 << 10 };
    let bands = Bands::new(shape.batch, height, width, 128, limit, bytes);
    let partial = workspace.address();
    let args = DirectWeightGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial,
        shape: shape.argument(),
        bands,
        slice: slice as i32,
        parts: parts as i32,
    };
    let sum = SumPartsOfBatchArgs {
        partial,
        dw: dw.address(),
        shape: shape.argument(),
        slice: slice as i32,
        parts: parts as i32,
        accumulate: accumulate.into(),
    };
    let mut launch = Launch::new(weight_gradient_blocks::<S>(shape) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = parts as u32;
    // SAFETY: as in `forward`; the workspace has room for the partial sums of all parts.
    unsafe {
        let kernel = S::choose(id::CONV_DIRECT_WEIGHT_GRADIENT);
        device.launch(kernel, launch, &args)?;
        let kernel = pick::<S::Master, _>(id::CONV_DIRECT_SUM_PARTS_F32, id::CONV_DIRECT_SUM_PARTS_F64);
        device.launch(kernel, packing(shape), &sum)
    }
}

/// The launch of the kernels that rearrange weights.
pub(super) fn packing(shape: &ConvShape) -> Launch {
    Launch::new((shape.weight_len() / 16384).clamp(1, 64) as u32, 1)
}
