//! Convolution in f32 on a GPU: `kernels/conv.cu`, tiled matrix products.

use super::ConvShape;
use crate::device::arguments::{ConvArgs, ConvDivisors};
use crate::device::constants::{BLOCK_THREADS, CONV_LINE_PADDING, polder_conv_tiles};
use crate::device::{Compute, ComputeKernels, Kernel, Launch, Result, Slice, SliceMut};

impl ConvArgs {
    /// Arguments for operands and a result (left, right, out) at these addresses. `wide`: whether packs of each are
    /// whole and aligned.
    pub fn new(shape: &ConvShape, addresses: [u64; 3], wide: [u32; 3], splits: usize, accumulate: bool) -> Self {
        let ([left, right, out], [wide_left, wide_right, wide_out]) = (addresses, wide);
        let pixels = shape.batch * shape.out_height() * shape.out_width();
        Self {
            left,
            right,
            out,
            shape: shape.argument(),
            divisors: ConvDivisors::new(shape),
            part_pixels: pixels.div_ceil(splits) as i32,
            accumulate: accumulate.into(),
            wide_left,
            wide_right,
            wide_out,
            moments: 0,
        }
    }

    /// The same for a forward that leaves the moments of its tiles at this address; 0 for none.
    pub fn with_moments(self, moments: u64) -> Self {
        Self { moments, ..self }
    }
}

/// A tile of `kernels/conv.cu`, with the kernels of the three passes in single and in double precision.
struct ConvTile {
    rows: usize,
    columns: usize,
    depth: usize,
    forward: [Kernel<ConvArgs>; 2],
    input_gradient: [Kernel<ConvArgs>; 2],
    weight_gradient: [Kernel<ConvArgs>; 2],
}

macro_rules! kernels {
    ($pass:literal, $name:literal) => {
        [
            Kernel::named(concat!("conv_", $pass, "_", $name, "_f32")),
            Kernel::named(concat!("conv_", $pass, "_", $name, "_f64")),
        ]
    };
}

macro_rules! tile {
    ($name:literal, $rows:literal, $columns:literal, $depth:literal, $thread_rows:literal, $thread_columns:literal) => {
        ConvTile {
            rows: $rows,
            columns: $columns,
            depth: $depth,
            forward: kernels!("forward", $name),
            input_gradient: kernels!("input_gradient", $name),
            weight_gradient: kernels!("weight_gradient", $name),
        }
    };
}

/// From the narrowest to the widest.
static TILES: [ConvTile; 4] = polder_conv_tiles!(tile);

/// The widest tile is used if there are at least so many of them. Otherwise narrower ones keep more multiprocessors
/// busy.
pub(super) const MANY_TILES: usize = 96;

/// The number of blocks over which a weight gradient is split, and the minimum of pixels per block.
const WEIGHT_GRADIENT_BLOCKS: usize = 512;
pub(super) const WEIGHT_GRADIENT_PIXELS: usize = 128;

impl ConvTile {
    /// The tile for a product of `rows` times `columns`, computed `copies` times over parts of the depth.
    fn new(rows: usize, columns: usize, copies: usize) -> &'static Self {
        let [narrow @ .., widest] = &TILES;
        if columns > 64 && widest.count(rows, columns) * copies >= MANY_TILES {
            return widest;
        }
        narrow.iter().find(|tile| columns <= tile.columns).unwrap_or(&narrow[2])
    }

    fn count(&self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.rows) * columns.div_ceil(self.columns)
    }

    /// With shared memory for two buffers of both operands.
    fn launch<T>(&self, rows: usize, columns: usize, groups: usize, copies: usize) -> Launch {
        let shared = 2 * self.depth * (self.rows + self.columns + 2 * CONV_LINE_PADDING) * size_of::<T>();
        Launch {
            grid: [self.count(rows, columns) as u32, groups as u32, copies as u32],
            block: [BLOCK_THREADS as u32, 1, 1],
            shared,
        }
    }
}

/// The kernel for a type without tensor cores, which is as wide as its master.
fn full_precision<S: Compute>([f32, f64]: [Kernel<ConvArgs>; 2]) -> Kernel<ConvArgs> {
    S::choose(ComputeKernels { f32, f64, f16: f32, bf16: f32 })
}

/// The tile and the number of splits of a weight gradient.
fn weight_gradient_tile(shape: &ConvShape) -> (&'static ConvTile, usize) {
    let (rows, columns) = (shape.taps() * shape.group_inputs(), shape.group_outputs());
    let most = (shape.batch * shape.out_height() * shape.out_width()).div_ceil(WEIGHT_GRADIENT_PIXELS);
    let tile = ConvTile::new(rows, columns, shape.groups * most);
    (tile, WEIGHT_GRADIENT_BLOCKS.div_ceil(shape.groups * tile.count(rows, columns)).min(most))
}

/// The number of parts of a weight gradient.
pub(super) fn splits(shape: &ConvShape) -> usize {
    weight_gradient_tile(shape).1
}

/// Whether rows of `channels` elements that begin at `address` consist of whole, aligned packs of four.
fn wide<T>(channels: usize, address: u64) -> u32 {
    u32::from(channels.is_multiple_of(4) && address.is_multiple_of(4 * size_of::<T>() as u64))
}

pub(super) fn forward<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    weight: Slice<'_, S>,
    mut y: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let (rows, columns) = (shape.batch * shape.out_height() * shape.out_width(), shape.group_outputs());
    let tile = ConvTile::new(rows, columns, shape.groups);
    let addresses = [x.address(), weight.address(), y.address()];
    let wide = [
        wide::<S>(shape.group_inputs(), x.address()),
        wide::<S>(columns, weight.address()),
        wide::<S>(columns, y.address()),
    ];
    let args = ConvArgs::new(shape, addresses, wide, 1, accumulate);
    let kernel = full_precision::<S>(tile.forward);
    // SAFETY: every slice has the length that the shape implies, and the shared memory is the tile's.
    unsafe { y.device().clone().launch(kernel, tile.launch::<S>(rows, columns, shape.groups, 1), &args) }
}

pub(super) fn input_gradient<S: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, S>,
    weight: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    // All parity classes have the same launch. The first one is the largest.
    let (class_height, class_width) = (shape.height.div_ceil(shape.stride), shape.width.div_ceil(shape.stride));
    let (rows, columns) = (shape.batch * class_height * class_width, shape.group_inputs());
    let classes = shape.stride * shape.stride;
    let tile = ConvTile::new(rows, columns, shape.groups * classes);
    let addresses = [dy.address(), weight.address(), dx.address()];
    let wide = [
        wide::<S>(shape.group_outputs(), dy.address()),
        wide::<S>(shape.group_outputs(), weight.address()),
        wide::<S>(columns, dx.address()),
    ];
    let args = ConvArgs::new(shape, addresses, wide, 1, accumulate);
    let kernel = full_precision::<S>(tile.input_gradient);
    // SAFETY: as in `forward`.
    unsafe { dx.device().clone().launch(kernel, tile.launch::<S>(rows, columns, shape.groups, classes), &args) }
}

/// Writes the gradients over the pixels of each split to `out`, one after the other. With one split, it may add the
/// gradient instead.
pub(super) fn partial_weight_gradients<S: Compute>(
    shape: &ConvShape,
    x: Slice<'_, S>,
    dy: Slice<'_, S>,
    mut out: SliceMut<'_, S::Master>,
    accumulate: bool,
) -> Result<()> {
    let (rows, columns) = (shape.taps() * shape.group_inputs(), shape.group_outputs());
    let (tile, splits) = weight_gradient_tile(shape);
    let out_address = out.address();
    let addresses = [x.address(), dy.address(), out_address];
    let wide = [
        wide::<S>(shape.group_inputs(), x.address()),
        wide::<S>(columns, dy.address()),
        wide::<S>(columns, out_address),
    ];
    let args = ConvArgs::new(shape, addresses, wide, splits, accumulate);
    let kernel = full_precision::<S>(tile.weight_gradient);
    // SAFETY: as in `forward`; `out` has room for the gradients of all splits.
    unsafe { x.device().launch(kernel, tile.launch::<S>(rows, columns, shape.groups, splits), &args) }
}
