//! Convolution of 3×3 in bf16 pieces on the CPU with four ninths of the products:
//! `kernels/host/conv_split_winograd.cu`, one thread per block.

use super::ConvShape;
use super::direct::packing;
use super::split::{DEPTH, SIDE, TILE_BYTES, packed_len, pixel_bytes};
use super::winograd::{Bands, ELEMENTS, Shares, turned};
use crate::device::arguments::{SplitWinogradArgs, SplitWinogradGradientArgs, SplitWinogradWeightsArgs};
use crate::device::constants::DENSE_CHANNELS;
use crate::device::{Compute, Kernel, Result, Slice, SliceMut, id};

/// The most tiles of a band, and of one whose weights are large.
const TILES: [usize; 2] = [64, 128];
/// The tiles of a band of the weight gradient with two and with three pieces, of which one band stays in the L2 cache.
const GRADIENT_TILES: [usize; 2] = [128, 64];
/// The input channels of a block of the weight gradient.
const SLICE: usize = 128;
/// The fewest channels: with fewer, the transformations take longer than the products that they save.
const FEWEST_CHANNELS: usize = 64;

/// Whether this form is used for a shape that suits [`super::winograd`]: for two or three pieces and many channels. In
/// bf16 alone, the transformations' rounding would add to that of the numbers.
pub(super) fn suits<S: Compute>(shape: &ConvShape) -> bool {
    S::PIECES > 1 && shape.in_channels.min(shape.out_channels) >= FEWEST_CHANNELS
}

/// The kernel for the type's number of pieces, two or three.
fn pick<S: Compute, A>(kernels: [Kernel<A>; 2]) -> Kernel<A> {
    kernels[S::PIECES - 2]
}

/// The number of elements of the workspace of the forward and of the input gradient: for the transformed weights.
pub(super) fn products_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    let (input, output) = (shape.in_channels, shape.out_channels);
    ELEMENTS * packed_len::<S>(input, output).max(packed_len::<S>(output, input))
}

/// The number of elements of the workspace of the weight gradient.
pub(super) fn gradient_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    Shares::new::<S>(shape, SLICE).workspace_len(shape)
}

pub(super) fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    let kernels = [id::CONV_SPLIT_WINOGRAD_WEIGHTS_BF16X3, id::CONV_SPLIT_WINOGRAD_WEIGHTS_BF16X6];
    transform_weights(kernels, shape, weight, &mut workspace)?;
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
    let kernels = [id::CONV_SPLIT_WINOGRAD_TURNED_WEIGHTS_BF16X3, id::CONV_SPLIT_WINOGRAD_TURNED_WEIGHTS_BF16X6];
    transform_weights(kernels, shape, weight, &mut workspace)?;
    multiply(&turned(shape), dy, workspace, dx, accumulate)
}

fn transform_weights<S: Compute>(
    kernels: [Kernel<SplitWinogradWeightsArgs>; 2],
    shape: &ConvShape,
    weight: Slice<'_, S>,
    packed: &mut SliceMut<'_, S::Master>,
) -> Result<()> {
    let args = SplitWinogradWeightsArgs { weight: weight.address(), packed: packed.address(), shape: shape.argument() };
    // SAFETY: every slice has the length that the shape implies, and the workspace has room for the weights.
    unsafe { packed.device().launch(pick::<S, _>(kernels), packing(shape), &args) }
}

/// The convolution with weights that are transformed and split.
fn multiply<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    mut packed: SliceMut<'_, S::Master>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let weight_bytes = ELEMENTS * packed_len::<S>(shape.in_channels, shape.out_channels) * size_of::<S::Master>();
    let bands = Bands::new(shape, weight_bytes, TILES, SIDE);
    let args = SplitWinogradArgs {
        x: x.address(),
        packed: packed.address(),
        y: y.address(),
        shape: shape.argument(),
        tiles: bands.tiles as i32,
        accumulate: accumulate.into(),
    };
    // As the kernel lays a band out.
    let between = if shape.in_channels <= DENSE_CHANNELS { 0 } else { 2 * DEPTH };
    let row = pixel_bytes::<S>(shape.in_channels) + between;
    let input = bands.tiles * row + 2 * DEPTH;
    let output = 4 * (bands.tiles * bands.channels(shape, SIDE) + SIDE);
    let launch = bands.launch(ELEMENTS * (input + output));
    let kernels = [id::CONV_SPLIT_WINOGRAD_BF16X3, id::CONV_SPLIT_WINOGRAD_BF16X6];
    // SAFETY: as in `transform_weights`, and the scratch memory has room for one band.
    unsafe { y.device().launch(pick::<S, _>(kernels), launch, &args) }
}

pub(super) fn weight_gradient<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    dw: SliceMut<'_, S::Master>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    let shares = Shares::new::<S>(shape, SLICE);
    let tiles = GRADIENT_TILES[S::PIECES - 2].min(shares.tiles(shape)).next_multiple_of(DEPTH);
    let args = SplitWinogradGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial: workspace.address(),
        shape: shape.argument(),
        tiles: tiles as i32,
        slice: shares.slice as i32,
        parts: shares.parts as i32,
    };
    let element = tiles / DEPTH * TILE_BYTES + 2 * DEPTH;
    let panels = shares.slice / SIDE + 2;
    let launch = shares.launch(shape, panels * S::PIECES * ELEMENTS * element);
    let kernels = [id::CONV_SPLIT_WINOGRAD_WEIGHT_GRADIENT_BF16X3, id::CONV_SPLIT_WINOGRAD_WEIGHT_GRADIENT_BF16X6];
    // SAFETY: as in `multiply`; the workspace has room for the partial sums of all parts.
    unsafe { dw.device().launch(pick::<S, _>(kernels), launch, &args)? };
    shares.sum(shape, workspace, dw, accumulate)
}
