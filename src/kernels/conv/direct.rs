//! Convolution on the CPU's own launch shapes: `kernels/host/conv_direct.cu`, one thread per block.

use super::ConvShape;
use crate::device::arguments::{
    Bands, DirectForwardArgs, DirectInputGradientArgs, DirectWeightGradientArgs, PackWeightsArgs, SumGroupsArgs,
};
use crate::device::constants::PANEL_BYTES;
use crate::device::{Compute, Launch, Result, Slice, SliceMut, id};
use crate::kernels::pick;

/// Channels to which packed weights are filled up: a panel of the CPU's kernels (half of it in double precision).
pub(super) const PANEL: usize = PANEL_BYTES / 4;

/// Blocks of a weight gradient: enough for the cores of a large machine, and for two with other work to do.
const WEIGHT_GRADIENT_BLOCKS: usize = 32;

/// Elements of workspace: the packed weights, or every group's partial weight gradient.
pub(super) fn workspace_len(shape: &ConvShape) -> usize {
    let packed_forward = shape.taps() * shape.in_channels * shape.out_channels.next_multiple_of(PANEL);
    let packed_input = shape.taps() * shape.out_channels * shape.in_channels.next_multiple_of(PANEL);
    packed_input.max(groups(shape) * packed_forward)
}

/// Groups of images, each of whose weight gradients is summed by one block per slice.
fn groups(shape: &ConvShape) -> usize {
    WEIGHT_GRADIENT_BLOCKS.div_ceil(shape.in_channels.div_ceil(slice(shape))).min(shape.batch)
}

/// Input channels of one block of the weight gradient: with several taps a panel's worth, so that pixels lie close together in
/// its padded copy of the image; with one tap more, so that a tile of the output gradient is used often enough.
fn slice(shape: &ConvShape) -> usize {
    if shape.kernel == 1 { 48 } else { 16 }.min(shape.in_channels)
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
    // What is stored in fewer bits is widened on the way, padded or not.
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * shape.in_channels;
        2 * 4 * (images * rows * width).next_multiple_of(16)
            + if shape.padding > 0 || S::NARROW { padded * size_of::<S::Master>() } else { 0 }
    };
    let bands = Bands::new(shape.batch, height, width, 256, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = PackWeightsArgs { weight: weight.address(), packed, shape: shape.argument() };
    let accumulate = accumulate.into();
    let args = DirectForwardArgs { x: x.address(), packed, y: y.address(), shape: shape.argument(), bands, accumulate };
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    // SAFETY: every slice has the length that the shape implies, the workspace holds the
    // packed weights, and the scratch memory one band.
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
    // Rows and columns of a parity class, and how many more its taps see.
    let (height, width) = (shape.height.div_ceil(shape.stride), shape.width.div_ceil(shape.stride));
    let reach = (shape.kernel - 1).div_ceil(shape.stride);
    let bytes = |images: usize, rows: usize| {
        let padded = images * (rows + reach) * (width + reach) * shape.out_channels;
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
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
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
    let (slice, groups) = (slice(shape), groups(shape));
    let bytes = |images: usize, rows: usize| {
        let columns = (width - 1) * shape.stride + shape.kernel;
        let padded = images * ((rows - 1) * shape.stride + shape.kernel) * columns * slice;
        let pixels = images * rows * width;
        (pixels * PANEL + padded.next_multiple_of(16)) * size_of::<S::Master>() + 4 * pixels
    };
    // A band of 128 pixels, its input and one panel of its output gradient about fill the L1 cache; longer bands up to this
    // limit repeat fewer of their neighbours' rows.
    let bands = Bands::new(shape.batch, height, width, 128, 48 << 10, bytes);
    let partial = workspace.address();
    let args = DirectWeightGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial,
        shape: shape.argument(),
        bands,
        slice: slice as i32,
        groups: groups as i32,
    };
    let sum = SumGroupsArgs {
        partial,
        dw: dw.address(),
        shape: shape.argument(),
        slice: slice as i32,
        groups: groups as i32,
        accumulate: accumulate.into(),
    };
    let mut launch = Launch::new(shape.in_channels.div_ceil(slice) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = groups as u32;
    // SAFETY: as in `forward`; the workspace holds every group's partial sums.
    unsafe {
        let kernel = S::choose(id::CONV_DIRECT_WEIGHT_GRADIENT);
        device.launch(kernel, launch, &args)?;
        let kernel = pick::<S::Master, _>(id::CONV_DIRECT_SUM_GROUPS_F32, id::CONV_DIRECT_SUM_GROUPS_F64);
        device.launch(kernel, packing(shape), &sum)
    }
}

/// The launch of the CPU's kernels that rearrange weights.
fn packing(shape: &ConvShape) -> Launch {
    Launch::new((shape.weight_len() / 16384).clamp(1, 64) as u32, 1)
}
