//! Convolution in bf16 pieces on the CPU: `kernels/host/conv_split.cu`, one thread per block.

use super::ConvShape;
use super::direct::packing;
use crate::device::arguments::{
    Bands, SplitForwardArgs, SplitGradientArgs, SplitInputGradientArgs, SplitSumArgs, SplitWeightsArgs,
};
use crate::device::{Compute, Device, Kernel, Launch, Result, Slice, SliceMut, id};

/// The rows and columns of a tile, and the depth of a product of tiles.
pub(super) const SIDE: usize = 16;
pub(super) const DEPTH: usize = 32;
/// Bytes of a tile of an operand.
pub(super) const TILE_BYTES: usize = 2 * SIDE * DEPTH;
/// Bytes of a pair of neighbouring pixels, of 16 channels.
const PAIR_BYTES: usize = 2 * 2 * SIDE;

/// The scratch memory of a block, which stays in the L2 cache.
const SCRATCH_BYTES: usize = 512 << 10;
/// Pixels of a band: of the forward and the input gradient, and of the weight gradient.
const BAND_PIXELS: usize = 256;
/// Blocks of a weight gradient: enough for the cores of a large machine, and to balance the load on two cores.
const BLOCKS: usize = 32;
/// Panels of input channels of a block of the weight gradient: as many as keep the copy of the output gradient, which
/// each of them repeats, a small part of the work.
const PANELS: usize = 4;
/// The most bytes of partial weight gradients. A single part may take more.
const PARTIAL_BYTES: usize = 32 << 20;

/// Whether this form is used for a shape: whole tiles of channels, without groups. In bf16 it also needs matrix units.
/// Other forms are faster there without.
pub(super) fn suits<S: Compute>(shape: &ConvShape, device: &Device) -> bool {
    let wanted = if S::NARROW { device.has_matrix_units() } else { true };
    S::PIECES > 0
        && wanted
        && shape.groups == 1
        && shape.in_channels.is_multiple_of(SIDE)
        && shape.out_channels.is_multiple_of(SIDE)
}

/// The kernel for the type's number of pieces.
fn pick<S: Compute, A>(kernels: [Kernel<A>; 3]) -> Kernel<A> {
    kernels[S::PIECES - 1]
}

/// Bytes of a pixel in the split copy, in chunks as the kernel's `row_length` counts them.
pub(super) fn pixel_bytes<S: Compute>(channels: usize) -> usize {
    let last_chunks = if channels.is_multiple_of(DEPTH) { 0 } else { [1, 1, 2][S::PIECES - 1] };
    2 * DEPTH * (S::PIECES * (channels / DEPTH) + last_chunks)
}

/// The number of elements of the workspace of the forward and of the input gradient: for the packed weights.
pub(super) fn products_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    let (input, output) = (shape.in_channels, shape.out_channels);
    shape.taps() * packed_len::<S>(input, output).max(packed_len::<S>(output, input))
}

/// The number of elements of the workspace for packed weights of one tap, of so many channels of depth and columns.
pub(super) fn packed_len<S: Compute>(depth: usize, columns: usize) -> usize {
    S::PIECES * depth.div_ceil(DEPTH) * (columns / SIDE) * TILE_BYTES / size_of::<S::Master>()
}

/// The number of elements of the workspace of the weight gradient: for the partial ones of all parts.
pub(super) fn gradient_workspace_len(shape: &ConvShape) -> usize {
    parts(shape) * shape.weight_len()
}

fn panels(shape: &ConvShape) -> usize {
    PANELS.min(shape.in_channels / SIDE)
}

/// The number of parts of the batch. For each part and some panels of input channels one block sums a weight gradient.
fn parts(shape: &ConvShape) -> usize {
    let blocks = (shape.in_channels / SIDE).div_ceil(panels(shape));
    BLOCKS.div_ceil(blocks).min(PARTIAL_BYTES / (4 * shape.weight_len())).min(shape.batch).max(1)
}

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
    // A single tap reads every pixel of the copy.
    let stride = if shape.kernel == 1 { 1 } else { shape.stride };
    let bytes = |images: usize, rows: usize| {
        let pixels = images * ((rows - 1) * stride + shape.kernel) * ((width - 1) * stride + shape.kernel);
        places_bytes(images * rows, width) + pixels * pixel_bytes::<S>(shape.in_channels)
    };
    let bands = Bands::new(shape.batch, height, width, BAND_PIXELS, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = SplitWeightsArgs { weight: weight.address(), packed, shape: shape.argument() };
    let args = SplitForwardArgs {
        x: x.address(),
        packed,
        y: y.address(),
        shape: shape.argument(),
        bands,
        accumulate: accumulate.into(),
    };
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    let packs = [id::CONV_SPLIT_WEIGHTS_BF16, id::CONV_SPLIT_WEIGHTS_BF16X3, id::CONV_SPLIT_WEIGHTS_BF16X6];
    let kernels = [id::CONV_SPLIT_FORWARD_BF16, id::CONV_SPLIT_FORWARD_BF16X3, id::CONV_SPLIT_FORWARD_BF16X6];
    // SAFETY: every slice has the length that the shape implies, the workspace has room for the packed weights, and the
    // scratch memory for one band.
    unsafe {
        device.launch(pick::<S, _>(packs), packing(shape), &pack)?;
        device.launch(pick::<S, _>(kernels), launch, &args)
    }
}

/// Bytes of the places of the tiles of so many rows of pixels.
fn places_bytes(rows: usize, width: usize) -> usize {
    12 * (rows * width.div_ceil(SIDE)).next_multiple_of(16)
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
    let bytes = |images: usize, rows: usize| {
        let pixels = images * (rows + reach) * (width + reach);
        places_bytes(images * rows, width) + pixels * pixel_bytes::<S>(shape.out_channels)
    };
    let bands = Bands::new(shape.batch, height, width, BAND_PIXELS, SCRATCH_BYTES, bytes);
    let packed = workspace.address();
    let pack = SplitWeightsArgs { weight: weight.address(), packed, shape: shape.argument() };
    let args = SplitInputGradientArgs {
        dy: dy.address(),
        packed,
        dx: dx.address(),
        shape: shape.argument(),
        bands,
        accumulate: accumulate.into(),
    };
    let launch = Launch::new(bands.count(shape.batch, height) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    let packs = [
        id::CONV_SPLIT_TURNED_WEIGHTS_BF16,
        id::CONV_SPLIT_TURNED_WEIGHTS_BF16X3,
        id::CONV_SPLIT_TURNED_WEIGHTS_BF16X6,
    ];
    let kernels = [
        id::CONV_SPLIT_INPUT_GRADIENT_BF16,
        id::CONV_SPLIT_INPUT_GRADIENT_BF16X3,
        id::CONV_SPLIT_INPUT_GRADIENT_BF16X6,
    ];
    // SAFETY: as in `forward`.
    unsafe {
        device.launch(pick::<S, _>(packs), packing(shape), &pack)?;
        device.launch(pick::<S, _>(kernels), launch, &args)
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
    let (panels, parts) = (panels(shape), parts(shape));
    let bytes = |images: usize, rows: usize| {
        // As the kernel numbers the pixels of an image's band.
        let reach = (shape.kernel - 1) / shape.stride;
        let columns = width + reach;
        let chunks = ((rows - 1) * columns + width).div_ceil(DEPTH);
        let copies = shape.kernel.min(shape.stride).pow(2) * if reach > 0 { 2 } else { 1 };
        let pairs = copies * (chunks * SIDE + (reach * (columns + 1)).div_ceil(2) + 1);
        images * S::PIECES * (shape.out_channels / SIDE * chunks * TILE_BYTES + panels * pairs * PAIR_BYTES)
    };
    let bands = Bands::new(shape.batch.div_ceil(parts), height, width, BAND_PIXELS, SCRATCH_BYTES, bytes);
    let partial = workspace.address();
    let args = SplitGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial,
        shape: shape.argument(),
        bands,
        panels: panels as i32,
        parts: parts as i32,
    };
    let sum = SplitSumArgs {
        partial,
        dw: dw.address(),
        shape: shape.argument(),
        parts: parts as i32,
        accumulate: accumulate.into(),
    };
    let mut launch = Launch::new((shape.in_channels / SIDE).div_ceil(panels) as u32, 1)
        .with_shared(bytes(bands.images as usize, bands.rows as usize));
    launch.grid[1] = parts as u32;
    let kernels = [
        id::CONV_SPLIT_WEIGHT_GRADIENT_BF16,
        id::CONV_SPLIT_WEIGHT_GRADIENT_BF16X3,
        id::CONV_SPLIT_WEIGHT_GRADIENT_BF16X6,
    ];
    // SAFETY: as in `forward`; the workspace has room for the partial sums of all parts.
    unsafe {
        device.launch(pick::<S, _>(kernels), launch, &args)?;
        device.launch(id::CONV_SPLIT_SUM_PARTS, packing(shape), &sum)
    }
}
