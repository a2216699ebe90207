//! Convolution of 3×3 on the CPU with four ninths of the products: `kernels/host/conv_winograd.cu`, and for bf16 pieces
//! `kernels/host/conv_split_winograd.cu`. One thread per block.

use super::ConvShape;
use super::direct::packing;
use super::split;
use crate::device::arguments::{
    SplitWinogradArgs, SplitWinogradGradientArgs, SplitWinogradWeightsArgs, WinogradArgs, WinogradGradientArgs,
    WinogradSumArgs, WinogradWeightsArgs,
};
use crate::device::constants::PANEL_BYTES;
use crate::device::{Compute, Kernel, Launch, Result, Slice, SliceMut, id};
use crate::kernels::pick;

/// Elements of a transformed tile, and the rows and columns of an output tile.
const ELEMENTS: usize = 16;
const SIDE: usize = 2;

/// The scratch memory of a block for the transformed input, before its tiles are rounded up to [`TILE_ROWS`]: half of
/// an L2 cache. The products take as much if there are as many channels on both sides.
const SCRATCH_BYTES: usize = 512 << 10;
/// The most tiles of a band: more are no faster. Bands are multiples of the rows of the kernel's register tiles.
const MOST_TILES: usize = 48;
const TILE_ROWS: usize = 12;
/// The blocks of a launch: enough for the cores of a large machine, and to balance the load on two cores.
const BLOCKS: usize = 32;
/// Input channels of a block of the weight gradient: as many as keep the transformation of the output's gradient, which
/// each of them repeats, a small part of the work.
const SLICE: usize = 64;
/// The most bytes of partial weight gradients. A single part may take more.
const PARTIAL_BYTES: usize = 32 << 20;

/// With bf16 pieces: the tiles of a band, which are more if there are many channels, so that the weights are read fewer
/// times; those of a band of the weight gradient; and the input channels of its blocks.
const SPLIT_TILES: usize = 64;
const SPLIT_TILES_OF_MANY: usize = 128;
const MANY_CHANNELS: usize = 256;
const SPLIT_GRADIENT_TILES: usize = 128;
const SPLIT_SLICE: usize = 128;
/// The fewest channels with bf16 pieces: with fewer, the transformations take longer than the products that they save.
const FEWEST_SPLIT_CHANNELS: usize = 64;

/// The fewest rows and columns of an output: on smaller images the direct form leaves out as many products.
const LEAST_SIDE: usize = 4;
/// The most channels: with more, a band of a few tiles is larger than an L2 cache.
const MOST_CHANNELS: usize = 2048;

/// Whether this form is used for a shape: 3×3 with stride 1, without groups, whole panels of channels, and images that
/// are not tiny. It does not depend on the batch, so that an image's bits do not either.
pub(super) fn suits<S: Compute>(shape: &ConvShape) -> bool {
    let has_form = shape.kernel == 3 && shape.stride == 1 && shape.padding < 3 && shape.groups == 1;
    let is_large = shape.out_height().min(shape.out_width()) >= LEAST_SIDE;
    let fits = |channels: usize| channels.is_multiple_of(panel::<S>()) && channels <= MOST_CHANNELS;
    let is_wide = !is_split::<S>() || shape.in_channels.min(shape.out_channels) >= FEWEST_SPLIT_CHANNELS;
    has_form && is_large && is_wide && fits(shape.in_channels) && fits(shape.out_channels)
}

/// Whether numbers are split into bf16 pieces.
fn is_split<S: Compute>() -> bool {
    S::PIECES > 1
}

fn panel<S: Compute>() -> usize {
    PANEL_BYTES / size_of::<S::Master>()
}

/// The number of elements of the workspace of the forward and of the input gradient: for the transformed weights.
pub(super) fn products_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    if is_split::<S>() {
        let (input, output) = (shape.in_channels, shape.out_channels);
        let len = |depth, columns| split::packed_len::<S>(depth, columns);
        return ELEMENTS * len(input, output).max(len(output, input));
    }
    transformed_len(shape)
}

/// Elements of the transformed weights.
fn transformed_len(shape: &ConvShape) -> usize {
    ELEMENTS * shape.in_channels * shape.out_channels
}

/// Input channels of a block of the weight gradient.
fn slice<S: Compute>(shape: &ConvShape) -> usize {
    shape.in_channels.min(if is_split::<S>() { SPLIT_SLICE } else { SLICE })
}

/// The number of elements of the workspace of the weight gradient: for the partial ones of all parts.
pub(super) fn gradient_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    parts::<S>(shape) * transformed_len(shape)
}

/// The number of parts of the batch. For each part and slice one block sums a weight gradient.
fn parts<S: Compute>(shape: &ConvShape) -> usize {
    let bytes = transformed_len(shape) * size_of::<S::Master>();
    BLOCKS.div_ceil(shape.in_channels.div_ceil(slice::<S>(shape))).min(PARTIAL_BYTES / bytes).min(shape.batch).max(1)
}

/// Tiles of an output image.
fn tiles(shape: &ConvShape) -> usize {
    shape.out_height().div_ceil(SIDE) * shape.out_width().div_ceil(SIDE)
}

/// Bytes of two transformed bands of so many tiles, of so many channels.
fn band_bytes<S: Compute>(tiles: usize, channels: [usize; 2]) -> usize {
    channels.iter().map(|channels| ELEMENTS * (tiles * channels + panel::<S>()) * size_of::<S::Master>()).sum()
}

/// Tiles of a band, of `all` tiles of `channels` channels that `blocks` blocks divide.
fn band<S: Compute>(all: usize, channels: usize, blocks: usize) -> usize {
    let most = (SCRATCH_BYTES / (ELEMENTS * channels * size_of::<S::Master>())).min(MOST_TILES);
    most.min(all.div_ceil(blocks)).next_multiple_of(TILE_ROWS)
}

pub(super) fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    if is_split::<S>() {
        let kernels = [id::CONV_SPLIT_WINOGRAD_WEIGHTS_BF16X3, id::CONV_SPLIT_WINOGRAD_WEIGHTS_BF16X6];
        split_weights(kernels, shape, weight, &mut workspace)?;
    } else {
        transform_weights(S::choose(id::CONV_WINOGRAD_WEIGHTS), shape, weight, &mut workspace)?;
    }
    multiply(shape, x, workspace, y, accumulate)
}

pub(super) fn input_gradient<S: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    dx: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    if is_split::<S>() {
        let kernels = [id::CONV_SPLIT_WINOGRAD_TURNED_WEIGHTS_BF16X3, id::CONV_SPLIT_WINOGRAD_TURNED_WEIGHTS_BF16X6];
        split_weights(kernels, shape, weight, &mut workspace)?;
    } else {
        transform_weights(S::choose(id::CONV_WINOGRAD_TURNED_WEIGHTS), shape, weight, &mut workspace)?;
    }
    // It is the convolution of dy with the turned weights.
    let turned = ConvShape {
        height: shape.out_height(),
        width: shape.out_width(),
        in_channels: shape.out_channels,
        out_channels: shape.in_channels,
        padding: 2 - shape.padding,
        ..*shape
    };
    multiply(&turned, dy, workspace, dx, accumulate)
}

fn transform_weights<S: Compute>(
    kernel: Kernel<WinogradWeightsArgs>,
    shape: &ConvShape,
    weight: Slice<'_, S>,
    packed: &mut SliceMut<'_, S::Master>,
) -> Result<()> {
    let args = WinogradWeightsArgs { weight: weight.address(), packed: packed.address(), shape: shape.argument() };
    // SAFETY: every slice has the length that the shape implies, and the workspace has room for the weights.
    unsafe { packed.device().launch(kernel, packing(shape), &args) }
}

/// The kernel for the type's number of pieces, two or three.
fn pick_split<S: Compute, A>(kernels: [Kernel<A>; 2]) -> Kernel<A> {
    kernels[S::PIECES - 2]
}

fn split_weights<S: Compute>(
    kernels: [Kernel<SplitWinogradWeightsArgs>; 2],
    shape: &ConvShape,
    weight: Slice<'_, S>,
    packed: &mut SliceMut<'_, S::Master>,
) -> Result<()> {
    let args = SplitWinogradWeightsArgs { weight: weight.address(), packed: packed.address(), shape: shape.argument() };
    // SAFETY: as in `transform_weights`.
    unsafe { packed.device().launch(pick_split::<S, _>(kernels), packing(shape), &args) }
}

/// The convolution with weights that are transformed and split.
fn multiply_split<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    mut packed: SliceMut<'_, S::Master>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = y.device().clone();
    let all = shape.batch * tiles(shape);
    let is_many = shape.in_channels.max(shape.out_channels) >= MANY_CHANNELS;
    let most = if is_many { SPLIT_TILES_OF_MANY } else { SPLIT_TILES };
    let tiles = most.min(all.div_ceil(BLOCKS)).next_multiple_of(split::SIDE);
    let args = SplitWinogradArgs {
        x: x.address(),
        packed: packed.address(),
        y: y.address(),
        shape: shape.argument(),
        tiles: tiles as i32,
        accumulate: accumulate.into(),
    };
    let input = tiles * split::pixel_bytes::<S>(shape.in_channels) + 2 * split::DEPTH;
    let output = 4 * (tiles * shape.out_channels + split::SIDE);
    let launch = Launch::new(all.div_ceil(tiles) as u32, 1).with_shared(ELEMENTS * (input + output));
    let kernels = [id::CONV_SPLIT_WINOGRAD_BF16X3, id::CONV_SPLIT_WINOGRAD_BF16X6];
    // SAFETY: as in `multiply`.
    unsafe { device.launch(pick_split::<S, _>(kernels), launch, &args) }
}

/// The convolution with weights that are transformed.
fn multiply<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    mut packed: SliceMut<'_, S::Master>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    if is_split::<S>() {
        return multiply_split(shape, x, packed, y, accumulate);
    }
    let device = y.device().clone();
    let all = shape.batch * tiles(shape);
    let tiles = band::<S>(all, shape.in_channels, BLOCKS);
    let args = WinogradArgs {
        x: x.address(),
        packed: packed.address(),
        y: y.address(),
        shape: shape.argument(),
        tiles: tiles as i32,
        accumulate: accumulate.into(),
    };
    let launch = Launch::new(all.div_ceil(tiles) as u32, 1)
        .with_shared(band_bytes::<S>(tiles, [shape.in_channels, shape.out_channels]));
    // SAFETY: as in `transform_weights`, and the scratch memory has room for one band.
    unsafe { device.launch(S::choose(id::CONV_WINOGRAD), launch, &args) }
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
    let (parts, slice) = (parts::<S>(shape), slice::<S>(shape));
    let part_tiles = shape.batch.div_ceil(parts) * tiles(shape);
    let partial = workspace.address();
    let sum = WinogradSumArgs {
        partial,
        dw: dw.address(),
        shape: shape.argument(),
        slice: slice as i32,
        parts: parts as i32,
        accumulate: accumulate.into(),
    };
    let mut launch = Launch::new(shape.in_channels.div_ceil(slice) as u32, 1);
    launch.grid[1] = parts as u32;
    let (x, dy, shape_args) = (x.address(), dy.address(), shape.argument());
    if is_split::<S>() {
        let tiles = SPLIT_GRADIENT_TILES.min(part_tiles).next_multiple_of(split::DEPTH);
        let args = SplitWinogradGradientArgs {
            x,
            dy,
            partial,
            shape: shape_args,
            tiles: tiles as i32,
            slice: slice as i32,
            parts: parts as i32,
        };
        let element = tiles / split::DEPTH * split::TILE_BYTES + 2 * split::DEPTH;
        let panels = slice / split::SIDE + 2;
        let launch = launch.with_shared(panels * S::PIECES * ELEMENTS * element);
        let kernels = [id::CONV_SPLIT_WINOGRAD_WEIGHT_GRADIENT_BF16X3, id::CONV_SPLIT_WINOGRAD_WEIGHT_GRADIENT_BF16X6];
        // SAFETY: as in `multiply`; the workspace has room for the partial sums of all parts.
        unsafe { device.launch(pick_split::<S, _>(kernels), launch, &args)? };
    } else {
        let tiles = band::<S>(part_tiles, slice, 1);
        let args = WinogradGradientArgs {
            x,
            dy,
            partial,
            shape: shape_args,
            tiles: tiles as i32,
            slice: slice as i32,
            parts: parts as i32,
        };
        let launch = launch.with_shared(band_bytes::<S>(tiles, [slice, panel::<S>()]));
        // SAFETY: as above.
        unsafe { device.launch(S::choose(id::CONV_WINOGRAD_WEIGHT_GRADIENT), launch, &args)? };
    }
    let kernel = pick::<S::Master, _>(id::CONV_WINOGRAD_SUM_PARTS_F32, id::CONV_WINOGRAD_SUM_PARTS_F64);
    // SAFETY: as above.
    unsafe { device.launch(kernel, packing(shape), &sum) }
}
