//! Convolution of 3×3 on the CPU with four ninths of the products: `kernels/host/conv_winograd.cu`, one thread per
//! block.

use super::ConvShape;
use super::direct::packing;
use crate::device::arguments::{WinogradArgs, WinogradGradientArgs, WinogradSumArgs, WinogradWeightsArgs};
use crate::device::constants::{DENSE_CHANNELS, PANEL_BYTES};
use crate::device::{Compute, Kernel, Launch, Result, Scalar, Slice, SliceMut, id};
use crate::kernels::pick;

/// Elements of a transformed tile, and the rows and columns of an output tile.
pub(super) const ELEMENTS: usize = 16;
const SIDE: usize = 2;

/// The scratch memory of a block of the weight gradient for the transformed input, before its tiles are rounded up to
/// [`TILE_ROWS`]: half of an L2 cache.
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
    has_form && is_large && fits(shape.in_channels) && fits(shape.out_channels)
}

fn panel<S: Compute>() -> usize {
    PANEL_BYTES / size_of::<S::Master>()
}

/// The number of elements of the workspace of the forward and of the input gradient: for the transformed weights.
pub(super) fn products_workspace_len(shape: &ConvShape) -> usize {
    ELEMENTS * shape.in_channels * shape.out_channels
}

/// How blocks share a weight gradient: each sums it over a part of the batch, for a slice of the input channels.
pub(super) struct Shares {
    /// Input channels of a slice.
    pub slice: usize,
    pub parts: usize,
}

impl Shares {
    /// With slices of at most so many channels.
    pub fn new<S: Compute>(shape: &ConvShape, slice: usize) -> Self {
        let slice = shape.in_channels.min(slice);
        let bytes = products_workspace_len(shape) * size_of::<S::Master>();
        let parts = BLOCKS.div_ceil(shape.in_channels.div_ceil(slice)).min(PARTIAL_BYTES / bytes);
        Self { slice, parts: parts.min(shape.batch).max(1) }
    }

    /// The number of elements of the workspace: for the partial gradients of all parts.
    pub fn workspace_len(&self, shape: &ConvShape) -> usize {
        self.parts * products_workspace_len(shape)
    }

    /// The tiles of a part.
    pub fn tiles(&self, shape: &ConvShape) -> usize {
        shape.batch.div_ceil(self.parts) * tiles(shape)
    }

    /// The launch of the blocks, with so much scratch memory for each.
    pub fn launch(&self, shape: &ConvShape, bytes: usize) -> Launch {
        let mut launch = Launch::new(shape.in_channels.div_ceil(self.slice) as u32, 1).with_shared(bytes);
        launch.grid[1] = self.parts as u32;
        launch
    }

    /// Adds up the partial gradients in the workspace.
    pub fn sum<T: Scalar>(
        &self,
        shape: &ConvShape,
        mut partial: SliceMut<'_, T>,
        mut dw: SliceMut<'_, T>,
        accumulate: bool,
    ) -> Result<()> {
        let args = WinogradSumArgs {
            partial: partial.address(),
            dw: dw.address(),
            shape: shape.argument(),
            slice: self.slice as i32,
            parts: self.parts as i32,
            accumulate: accumulate.into(),
        };
        let kernel = pick::<T, _>(id::CONV_WINOGRAD_SUM_PARTS_F32, id::CONV_WINOGRAD_SUM_PARTS_F64);
        // SAFETY: every slice has the length that the shape implies, and the workspace has the partial sums of all
        // parts.
        unsafe { dw.device().launch(kernel, packing(shape), &args) }
    }
}

/// The number of elements of the workspace of the weight gradient.
pub(super) fn gradient_workspace_len<S: Compute>(shape: &ConvShape) -> usize {
    Shares::new::<S>(shape, SLICE).workspace_len(shape)
}

/// How blocks share the forward and the input gradient: each computes a group of the output's channels for a band of
/// tiles.
pub(super) struct Bands {
    /// Tiles of a band.
    pub tiles: usize,
    bands: usize,
    groups: usize,
}

impl Bands {
    /// Transformed weights of more bytes do not stay in an L2 cache from one band to the next.
    const CACHED_WEIGHTS: usize = 1 << 20;
    /// The blocks of a launch that reads such weights. Each reads all those of its channels.
    const BLOCKS_OF_MANY: usize = 16;
    /// The fewest channels of a group, each of which transforms the band's input again.
    const GROUP: usize = 128;

    /// Bands of at most `usual` tiles, a multiple of `multiple`. If the weights are large, of at most `most`, but as
    /// few bands as keep cores busy.
    pub fn new(shape: &ConvShape, weight_bytes: usize, [usual, most]: [usize; 2], multiple: usize) -> Self {
        let all = shape.batch * tiles(shape);
        if weight_bytes <= Self::CACHED_WEIGHTS {
            let tiles = usual.min(all.div_ceil(BLOCKS)).next_multiple_of(multiple);
            return Self { tiles, bands: all.div_ceil(tiles), groups: 1 };
        }
        let tiles = all.div_ceil(Self::BLOCKS_OF_MANY).clamp(usual, most).min(all).next_multiple_of(multiple);
        let bands = all.div_ceil(tiles);
        let groups = (Self::BLOCKS_OF_MANY / bands).min(shape.out_channels / Self::GROUP).max(1);
        Self { tiles, bands, groups }
    }

    /// The most output channels of a block, in panels of so many.
    pub fn channels(&self, shape: &ConvShape, panel: usize) -> usize {
        (shape.out_channels / panel).div_ceil(self.groups) * panel
    }

    /// The launch of the blocks, with so much scratch memory for each.
    pub fn launch(&self, bytes: usize) -> Launch {
        let mut launch = Launch::new(self.bands as u32, 1).with_shared(bytes);
        launch.grid[1] = self.groups as u32;
        launch
    }
}

/// Tiles of an output image.
pub(super) fn tiles(shape: &ConvShape) -> usize {
    shape.out_height().div_ceil(SIDE) * shape.out_width().div_ceil(SIDE)
}

/// The convolution of dy with the turned weights, which is the input gradient.
pub(super) fn turned(shape: &ConvShape) -> ConvShape {
    ConvShape {
        height: shape.out_height(),
        width: shape.out_width(),
        in_channels: shape.out_channels,
        out_channels: shape.in_channels,
        padding: 2 - shape.padding,
        ..*shape
    }
}

/// Bytes of two transformed bands of so many tiles, of so many channels.
fn band_bytes<S: Compute>(tiles: usize, channels: [usize; 2]) -> usize {
    // As the kernels lay a band out.
    let pitch = |channels: usize| if channels <= DENSE_CHANNELS { channels } else { channels + panel::<S>() };
    channels.iter().map(|&channels| ELEMENTS * (tiles * pitch(channels) + panel::<S>()) * size_of::<S::Master>()).sum()
}

pub(super) fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    y: SliceMut<'_, S>,
    accumulate: bool,
    mut workspace: SliceMut<'_, S::Master>,
) -> Result<()> {
    transform_weights(S::choose(id::CONV_WINOGRAD_WEIGHTS), shape, weight, &mut workspace)?;
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
    transform_weights(S::choose(id::CONV_WINOGRAD_TURNED_WEIGHTS), shape, weight, &mut workspace)?;
    multiply(&turned(shape), dy, workspace, dx, accumulate)
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

/// The convolution with weights that are transformed.
fn multiply<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    mut packed: SliceMut<'_, S::Master>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let weight_bytes = products_workspace_len(shape) * size_of::<S::Master>();
    let bands = Bands::new(shape, weight_bytes, [MOST_TILES; 2], TILE_ROWS);
    let args = WinogradArgs {
        x: x.address(),
        packed: packed.address(),
        y: y.address(),
        shape: shape.argument(),
        tiles: bands.tiles as i32,
        accumulate: accumulate.into(),
    };
    let channels = bands.channels(shape, panel::<S>());
    let launch = bands.launch(band_bytes::<S>(bands.tiles, [shape.in_channels, channels]));
    // SAFETY: as in `transform_weights`, and the scratch memory has room for one band.
    unsafe { y.device().launch(S::choose(id::CONV_WINOGRAD), launch, &args) }
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
    let most = (SCRATCH_BYTES / (ELEMENTS * shares.slice * size_of::<S::Master>())).min(MOST_TILES);
    let tiles = most.min(shares.tiles(shape)).next_multiple_of(TILE_ROWS);
    let args = WinogradGradientArgs {
        x: x.address(),
        dy: dy.address(),
        partial: workspace.address(),
        shape: shape.argument(),
        tiles: tiles as i32,
        slice: shares.slice as i32,
        parts: shares.parts as i32,
    };
    let launch = shares.launch(shape, band_bytes::<S>(tiles, [shares.slice, panel::<S>()]));
    // SAFETY: as in `multiply`; the workspace has room for the partial sums of all parts.
    unsafe { dw.device().launch(S::choose(id::CONV_WINOGRAD_WEIGHT_GRADIENT), launch, &args)? };
    shares.sum(shape, workspace, dw, accumulate)
}
