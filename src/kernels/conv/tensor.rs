//! Convolution on tensor cores: `kernels/conv_tensor.cu`, for operands of 16 bits, and for floats that are rounded to
//! TF32 or multiplied as sums of bf16 numbers.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError, RwLock};

use super::ConvShape;
use super::tiled::{MANY_TILES, WEIGHT_GRADIENT_PIXELS};
use crate::device::arguments::{BatchNormSumsArgs, ConvArgs, FinishArgs, InputGradientArgs, WeightGradientArgs};
use crate::device::constants::{
    MOMENT_ROWS, SQUARE_COLUMNS, STAGE_BYTES, polder_conv_split_tiles, polder_conv_tensor_tiles,
};
use crate::device::{Buffer, Compute, ComputeKernels, Device, Error, Kernel, Launch, Result, Slice, SliceMut};
use crate::kernels::conv_batch_norm::{self, SumsRoom};
use crate::kernels::{random, vector};

/// A tile of `kernels/conv_tensor.cu`, of [`MOMENT_ROWS`] rows, with the kernels of the three passes.
struct TensorTile {
    columns: usize,
    threads: u32,
    stages: usize,
    forward: ComputeKernels<ConvArgs>,
    input_gradient: ComputeKernels<InputGradientArgs>,
    weight_gradient: ComputeKernels<WeightGradientArgs>,
}

/// The kernels of one pass and tile for floats, f16 and bf16. There are none for double precision, which never comes
/// here.
macro_rules! kernels {
    ($pass:literal, $name:literal, [$floats:literal, $f16:literal, $bf16:literal]) => {{
        let floats = Kernel::named(concat!("conv_tensor_", $pass, "_", $name, "_", $floats));
        ComputeKernels {
            f32: floats,
            f64: floats,
            f16: Kernel::named(concat!("conv_tensor_", $pass, "_", $name, "_", $f16)),
            bf16: Kernel::named(concat!("conv_tensor_", $pass, "_", $name, "_", $bf16)),
        }
    }};
}

macro_rules! tile {
    (
        $types:tt, $name:literal, $columns:literal, $warp_rows:literal, $warp_columns:literal, $threads:literal,
        $stages:literal
    ) => {
        TensorTile {
            columns: $columns,
            threads: $threads,
            stages: $stages,
            forward: kernels!("forward", $name, $types),
            input_gradient: kernels!("input_gradient", $name, $types),
            weight_gradient: kernels!("weight_gradient", $name, $types),
        }
    };
}

macro_rules! rounded_tile {
    ($($row:literal),*) => { tile!(["tf32", "f16", "bf16"], $($row),*) };
}

// Sums of bf16 numbers stand for floats alone.
macro_rules! bf16x3_tile {
    ($($row:literal),*) => { tile!(["bf16x3", "bf16x3", "bf16x3"], $($row),*) };
}

macro_rules! bf16x6_tile {
    ($($row:literal),*) => { tile!(["bf16x6", "bf16x6", "bf16x6"], $($row),*) };
}

/// From the narrowest to the widest. Of two with equally many columns the first is the default, and measurement may
/// choose the other.
static TILES: [TensorTile; 5] = polder_conv_tensor_tiles!(rounded_tile);

/// The same for factors that are multiplied as sums of bf16 numbers.
static BF16X3_TILES: [TensorTile; 4] = polder_conv_split_tiles!(bf16x3_tile);
static BF16X6_TILES: [TensorTile; 4] = polder_conv_split_tiles!(bf16x6_tile);

/// The tiles for a type.
fn tiles<A: Compute>() -> &'static [TensorTile] {
    match A::PIECES {
        2 => &BF16X3_TILES,
        3 => &BF16X6_TILES,
        _ => &TILES,
    }
}

impl TensorTile {
    /// The tile for a product of `rows` times `columns`, computed `copies` times over parts of the depth, if no
    /// measurement has chosen one.
    fn new<A: Compute>(rows: usize, columns: usize, copies: usize) -> &'static Self {
        let [narrow @ .., widest] = tiles::<A>() else { unreachable!("a table without a tile") };
        if columns > 64 && widest.count(rows, columns) * copies >= MANY_TILES {
            return widest;
        }
        narrow.iter().find(|tile| columns <= tile.columns).unwrap_or(&narrow[2])
    }

    /// The tile for this pass.
    fn of<A: Compute>(pass: ConvPass, shape: &ConvShape, device: &Device) -> &'static Self {
        let key = (device.number(), A::NAME, *shape, pass);
        let chosen = CHOSEN.read().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        chosen.unwrap_or_else(|| {
            let (rows, columns, copies) = pass.product::<A>(shape);
            Self::new::<A>(rows, columns, shape.groups * copies)
        })
    }

    fn count(&self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(MOMENT_ROWS) * columns.div_ceil(self.columns)
    }

    fn launch(&self, rows: usize, columns: usize, groups: usize, copies: usize) -> Launch {
        let shared = self.stages * (MOMENT_ROWS + self.columns) * STAGE_BYTES;
        let grid = [self.count(rows, columns) as u32, groups as u32, copies as u32];
        Launch { grid, block: [self.threads, 1, 1], shared }
    }
}

/// A pass. Each has its own product, and so its own best tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ConvPass {
    Forward,
    InputGradient,
    WeightGradient,
}

impl ConvPass {
    /// Rows, columns and copies of the product, of each group.
    fn product<A: Compute>(self, shape: &ConvShape) -> (usize, usize, usize) {
        match self {
            Self::Forward => (shape.batch * shape.out_height() * shape.out_width(), shape.group_outputs(), 1),
            // All parity classes have the same launch. The first one is the largest.
            Self::InputGradient => {
                let (height, width) = (shape.height.div_ceil(shape.stride), shape.width.div_ceil(shape.stride));
                (shape.batch * height * width, shape.group_inputs(), shape.stride * shape.stride)
            }
            Self::WeightGradient => (shape.taps() * shape.group_inputs(), shape.group_outputs(), splits::<A>(shape)),
        }
    }

    /// The tiles that may be the best: not much wider than the product, but not so narrow that they read one operand
    /// many times.
    fn candidates<A: Compute>(self, shape: &ConvShape) -> impl Iterator<Item = &'static TensorTile> {
        let columns = self.product::<A>(shape).1.next_power_of_two();
        tiles::<A>().iter().filter(move |tile| tile.columns <= columns.max(16) && 4 * tile.columns >= columns.min(128))
    }
}

/// The device's number, the type's name, the shape and the pass.
type Key = (usize, &'static str, ConvShape, ConvPass);

/// The tiles that were chosen by measurement. Results do not depend on the tile, so they stay the same when a later
/// measurement chooses differently.
static CHOSEN: LazyLock<RwLock<HashMap<Key, &'static TensorTile>>> = LazyLock::new(RwLock::default);

fn choose(key: Key, tile: &'static TensorTile) {
    CHOSEN.write().unwrap_or_else(PoisonError::into_inner).insert(key, tile);
}

/// Launches that are timed together, and the number of timings, of which the shortest counts.
const TIMED_LAUNCHES: usize = 8;
const TIMINGS: usize = 5;
/// How long a GPU works before the first timing: after it was idle, its clocks rise for some milliseconds.
const WARM_UP_SECONDS: f64 = 0.02;

/// Chooses the tiles of the forward by measurement, and with `backward` those of the gradients, unless that is done
/// already or there is not enough memory for the operands.
pub(super) fn measure_tiles<A: Compute>(shape: &ConvShape, backward: bool, device: &Device) -> Result<()> {
    // One at a time: two would disturb each other.
    static MEASURING: Mutex<()> = Mutex::new(());
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let passes = [ConvPass::Forward, ConvPass::InputGradient, ConvPass::WeightGradient];
    for pass in passes.into_iter().take(if backward { 3 } else { 1 }) {
        let key = (device.number(), A::NAME, *shape, pass);
        let known = CHOSEN.read().unwrap_or_else(PoisonError::into_inner).contains_key(&key);
        if known || pass.candidates::<A>(shape).count() < 2 {
            continue;
        }
        match fastest_tile::<A>(pass, shape, device) {
            Ok(tile) => choose(key, tile),
            // Without the memory, or with a driver that records no graphs, the rule of thumb chooses.
            Err(Error::OutOfMemory { .. } | Error::Cuda { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Random numbers: on zeros a GPU draws less power and runs faster.
fn noise<A: Compute>(device: &Device, len: usize, seed: u64) -> Result<Buffer<A>> {
    let (mut wide, mut noise) = (device.zeros::<A::Master>(len)?, device.zeros::<A>(len)?);
    random::normal(wide.view_mut(), seed, 0)?;
    vector::convert(wide.view(), noise.view_mut())?;
    Ok(noise)
}

/// Times replays of a graph, because the CPU may take longer to start a small kernel than the GPU to run it. Sums for
/// batch norm and the last stage of a gradient are left out: they are the same work in every tile.
fn fastest_tile<A: Compute>(pass: ConvPass, shape: &ConvShape, device: &Device) -> Result<&'static TensorTile> {
    let (mut x, mut y) = (noise::<A>(device, shape.input_len(), 1)?, noise::<A>(device, shape.output_len(), 2)?);
    let weight = noise::<A>(device, shape.weight_len(), 3)?;
    let parts = if pass == ConvPass::WeightGradient { splits::<A>(shape) * shape.weight_len() } else { 0 };
    let mut parts = device.zeros::<A::Master>(parts)?;
    let mut launch = |tile| match pass {
        ConvPass::Forward => forward_by(tile, shape, x.view(), weight.view(), y.view_mut(), false, None),
        ConvPass::InputGradient => {
            let norm = BatchNormSumsArgs::default();
            input_gradient_by(tile, shape, y.view(), weight.view(), x.view_mut(), false, norm)
        }
        ConvPass::WeightGradient => {
            let finish = FinishArgs::default();
            weight_gradient_by(tile, shape, x.view(), y.view(), parts.view_mut(), false, finish)
        }
    };
    let mut recorded = Vec::new();
    for tile in pass.candidates::<A>(shape) {
        recorded.push((tile, device.capture(|| (0..TIMED_LAUNCHES).try_for_each(|_| launch(tile)))?));
    }
    let began = device.event()?;
    for (_, graph) in recorded.iter().cycle() {
        graph.replay()?;
        if device.event()?.elapsed_since(&began)? >= WARM_UP_SECONDS {
            break;
        }
    }
    let (mut fastest, mut shortest) = (recorded[0].0, f64::INFINITY);
    for (tile, graph) in recorded.iter().cycle().take(TIMINGS * recorded.len()) {
        let start = device.event()?;
        graph.replay()?;
        let seconds = device.event()?.elapsed_since(&start)?;
        if seconds < shortest {
            (fastest, shortest) = (*tile, seconds);
        }
    }
    Ok(fastest)
}

/// Blocks over which a weight gradient is split: two for each multiprocessor of an H100, or one if the parts would
/// cause more than half of the operands' traffic.
const WEIGHT_GRADIENT_BLOCKS: [usize; 2] = [264, 132];

/// The number of parts of a weight gradient. It depends only on the shape, because the bits of the sum depend on it.
pub(super) fn splits<A: Compute>(shape: &ConvShape) -> usize {
    let (rows, columns) = (shape.taps() * shape.group_inputs(), shape.group_outputs());
    let most = (shape.batch * shape.out_height() * shape.out_width()).div_ceil(WEIGHT_GRADIENT_PIXELS);
    let tile = TensorTile::new::<A>(rows, columns, shape.groups * most);
    let tiles = shape.groups * tile.count(rows, columns);
    let [many, few] = WEIGHT_GRADIENT_BLOCKS.map(|blocks| blocks.div_ceil(tiles).min(most));
    let operands = (shape.input_len() + shape.output_len()) * size_of::<A>();
    let parts = 2 * many * shape.weight_len() * size_of::<A::Master>();
    if 2 * parts > operands { few } else { many }
}

/// Whether rows of `channels` elements that begin at `address` consist of whole, aligned packs of `bytes`.
fn whole_packs<T>(channels: usize, address: u64, bytes: usize) -> u32 {
    u32::from((channels * size_of::<T>()).is_multiple_of(bytes) && address.is_multiple_of(bytes as u64))
}

/// Whether an operand can be copied 16 bytes at a time.
fn wide<T>(channels: usize, address: u64) -> u32 {
    whole_packs::<T>(channels, address, 16)
}

/// Whether a result can be written eight elements of 16 bits, or two of 32, at a time.
fn wide_out<T>(channels: usize, address: u64) -> u32 {
    whole_packs::<T>(channels, address, if size_of::<T>() == 2 { 16 } else { 8 })
}

/// The number of elements of the moments that a forward leaves.
pub(super) fn moments_len(shape: &ConvShape) -> usize {
    conv_batch_norm::moments_len(shape.batch * shape.out_height() * shape.out_width(), shape.out_channels)
}

pub(super) fn forward<A: Compute>(
    shape: &ConvShape,
    x: Slice<'_, A>,
    weight: Slice<'_, A>,
    y: SliceMut<'_, A>,
    accumulate: bool,
    moments: Option<SliceMut<'_, A::Master>>,
) -> Result<()> {
    forward_by(TensorTile::of::<A>(ConvPass::Forward, shape, x.device()), shape, x, weight, y, accumulate, moments)
}

fn forward_by<A: Compute>(
    tile: &TensorTile,
    shape: &ConvShape,
    x: Slice<'_, A>,
    weight: Slice<'_, A>,
    mut y: SliceMut<'_, A>,
    accumulate: bool,
    moments: Option<SliceMut<'_, A::Master>>,
) -> Result<()> {
    let (rows, columns, _) = ConvPass::Forward.product::<A>(shape);
    let addresses = [x.address(), weight.address(), y.address()];
    let wide = [
        wide::<A>(shape.group_inputs(), x.address()),
        wide::<A>(columns, weight.address()),
        wide_out::<A>(columns, y.address()),
    ];
    let moments = moments.map_or(0, |mut moments| moments.address());
    let args = ConvArgs::new(shape, addresses, wide, 1, accumulate).with_moments(moments);
    // SAFETY: every slice has the length that the shape implies, and the block and the shared memory are the tile's.
    unsafe { y.device().clone().launch(A::choose(tile.forward), tile.launch(rows, columns, shape.groups, 1), &args) }
}

/// The room for the sums that an input gradient leaves for batch norm. `None` if its results are not written in whole
/// chunks, and for groups.
pub(super) fn sums_room<A: Compute>(shape: &ConvShape) -> Option<SumsRoom> {
    let (rows, channels, classes) = ConvPass::InputGradient.product::<A>(shape);
    let column_blocks = channels.div_ceil(tiles::<A>()[0].columns); // the most of them
    let room = SumsRoom { channels, row_blocks: classes * rows.div_ceil(MOMENT_ROWS), column_blocks };
    (size_of::<A>() == 2 && channels.is_multiple_of(8) && shape.groups == 1).then_some(room)
}

/// With the arguments `norm`, the result is masked and the sums for batch norm are left; their room is that of
/// [`sums_room`].
pub(super) fn input_gradient<A: Compute>(
    shape: &ConvShape,
    dy: Slice<'_, A>,
    weight: Slice<'_, A>,
    dx: SliceMut<'_, A>,
    accumulate: bool,
    norm: BatchNormSumsArgs,
) -> Result<()> {
    input_gradient_by(
        TensorTile::of::<A>(ConvPass::InputGradient, shape, dy.device()),
        shape,
        dy,
        weight,
        dx,
        accumulate,
        norm,
    )
}

fn input_gradient_by<A: Compute>(
    tile: &TensorTile,
    shape: &ConvShape,
    dy: Slice<'_, A>,
    weight: Slice<'_, A>,
    mut dx: SliceMut<'_, A>,
    accumulate: bool,
    norm: BatchNormSumsArgs,
) -> Result<()> {
    let (rows, columns, classes) = ConvPass::InputGradient.product::<A>(shape);
    let addresses = [dy.address(), weight.address(), dx.address()];
    let wide = [
        wide::<A>(shape.group_outputs(), dy.address()),
        wide::<A>(shape.group_outputs(), weight.address()),
        wide_out::<A>(columns, dx.address()),
    ];
    let args = InputGradientArgs { conv: ConvArgs::new(shape, addresses, wide, 1, accumulate), norm };
    // SAFETY: as in `forward`.
    unsafe {
        dx.device().clone().launch(
            A::choose(tile.input_gradient),
            tile.launch(rows, columns, shape.groups, classes),
            &args,
        )
    }
}

/// Writes the gradients over the pixels of each split to `out`, one after the other. With one split, it may add the
/// gradient instead.
pub(super) fn partial_weight_gradients<A: Compute>(
    shape: &ConvShape,
    x: Slice<'_, A>,
    dy: Slice<'_, A>,
    out: SliceMut<'_, A::Master>,
    accumulate: bool,
) -> Result<()> {
    weight_gradient(shape, x, dy, out, accumulate, FinishArgs::default())
}

/// The number of sums of squares that a finished weight gradient leaves.
pub(super) fn finished_squares(shape: &ConvShape) -> usize {
    let (rows, columns) = (shape.taps() * shape.group_inputs(), shape.group_outputs());
    shape.groups * rows.div_ceil(MOMENT_ROWS) * columns.div_ceil(SQUARE_COLUMNS)
}

/// The same. If `finish` is given, the gradient is finished: then it has one part and is not added to anything.
pub(super) fn weight_gradient<A: Compute>(
    shape: &ConvShape,
    x: Slice<'_, A>,
    dy: Slice<'_, A>,
    out: SliceMut<'_, A::Master>,
    accumulate: bool,
    finish: FinishArgs,
) -> Result<()> {
    let tile = TensorTile::of::<A>(ConvPass::WeightGradient, shape, x.device());
    weight_gradient_by(tile, shape, x, dy, out, accumulate, finish)
}

fn weight_gradient_by<A: Compute>(
    tile: &TensorTile,
    shape: &ConvShape,
    x: Slice<'_, A>,
    dy: Slice<'_, A>,
    mut out: SliceMut<'_, A::Master>,
    accumulate: bool,
    finish: FinishArgs,
) -> Result<()> {
    let (rows, columns, splits) = ConvPass::WeightGradient.product::<A>(shape);
    let out_address = out.address();
    let addresses = [x.address(), dy.address(), out_address];
    let wide = [
        wide::<A>(shape.group_inputs(), x.address()),
        wide::<A>(columns, dy.address()),
        wide_out::<A::Master>(columns, out_address),
    ];
    let args = WeightGradientArgs { conv: ConvArgs::new(shape, addresses, wide, splits, accumulate), finish };
    // SAFETY: as in `forward`; `out` has room for the gradients of all splits, and `finish` has been checked.
    unsafe {
        x.device().launch(A::choose(tile.weight_gradient), tile.launch(rows, columns, shape.groups, splits), &args)
    }
}

#[cfg(test)]
mod tests {
    use approx::abs_diff_eq;
    use half::{bf16, f16};

    use super::*;
    use crate::device::selftest::{random_f32, tf32};
    use crate::device::{Bf16x3, Bf16x6, BlockOrder, HostOptions};
    use crate::kernels::Check;
    use crate::kernels::batch_norm::{Activation, Normalized, Workspace};
    use crate::kernels::gradient::Finish;

    const fn shape(extents: [usize; 5], kernel: usize, stride: usize, padding: usize) -> ConvShape {
        let [batch, height, width, in_channels, out_channels] = extents;
        ConvShape { batch, height, width, in_channels, out_channels, kernel, stride, padding, groups: 1 }
    }

    const fn grouped(groups: usize, dense: ConvShape) -> ConvShape {
        ConvShape { groups, ..dense }
    }

    /// These cover whole chunks and single elements in both operands, every tile with its tails, one split and several,
    /// all strides and paddings, and groups.
    const SHAPES: [ConvShape; 26] = [
        shape([2, 5, 6, 3, 16], 3, 1, 1),
        shape([1, 5, 6, 1, 10], 3, 2, 1),
        shape([3, 7, 5, 20, 17], 3, 1, 0),
        shape([5, 9, 7, 16, 16], 3, 1, 1),
        shape([2, 8, 8, 16, 32], 3, 2, 1),
        shape([2, 7, 9, 24, 33], 3, 2, 1),
        shape([2, 8, 7, 17, 16], 3, 2, 0),
        shape([1, 9, 8, 33, 10], 3, 2, 0),
        shape([3, 5, 6, 16, 32], 1, 2, 0),
        shape([2, 4, 3, 5, 6], 1, 1, 1),
        shape([2, 5, 4, 8, 6], 1, 2, 1),
        shape([2, 11, 9, 40, 24], 3, 1, 1),
        shape([1, 4, 4, 64, 64], 3, 1, 1),
        shape([3, 3, 3, 96, 20], 3, 2, 1),
        shape([1, 1, 1, 3, 2], 3, 1, 1),
        shape([2, 10, 12, 3, 8], 5, 2, 2),
        shape([1, 13, 14, 8, 9], 7, 2, 3),
        shape([1, 7, 8, 2, 3], 3, 3, 1),
        shape([1, 8, 9, 8, 8], 3, 3, 2),
        shape([1, 6, 9, 2, 3], 2, 3, 0),
        shape([1, 3, 4, 2, 3], 1, 1, 2),
        shape([1, 6, 7, 136, 72], 3, 1, 1),
        grouped(4, shape([2, 7, 9, 32, 64], 3, 1, 1)),
        grouped(5, shape([2, 6, 7, 20, 15], 3, 2, 1)),
        grouped(2, shape([1, 5, 6, 80, 48], 3, 2, 1)),
        grouped(3, shape([2, 4, 5, 24, 6], 1, 1, 0)),
    ];

    /// Cheap shapes that are large enough for the widest tile and for a split weight gradient: one tap, many pixels.
    const WIDE_SHAPES: [ConvShape; 4] = [
        shape([13, 32, 30, 2, 72], 1, 1, 0),
        shape([13, 30, 32, 72, 2], 1, 1, 0),
        shape([2, 12, 13, 65, 68], 1, 1, 0),
        shape([1, 24, 25, 136, 200], 1, 1, 0),
    ];

    /// A CPU that emulates a GPU, in three orders, and the GPU that `POLDER_TEST_DEVICE` names.
    fn devices() -> Vec<Device> {
        let host = |threads, order| Device::host_with(HostOptions { threads, order, emulate_gpu: true });
        let mut devices =
            vec![host(2, BlockOrder::Forwards), host(1, BlockOrder::Backwards), host(1, BlockOrder::Random(7))];
        if std::env::var_os("POLDER_SANITIZE").is_some() {
            devices.truncate(1); // as in tests/common
        }
        if let Ok(name) = std::env::var("POLDER_TEST_DEVICE") {
            if std::env::var_os("POLDER_TEST_ONLY").is_some() {
                devices.truncate(1); // likewise
            }
            devices.push(Device::from_name(&name).unwrap());
        }
        devices
    }

    /// A stored type: its rounding, the numbers whose sum is multiplied, and half a unit of its last place (relative,
    /// and the smallest absolute one).
    trait Stored: Compute<Master = f32> {
        const HALF_ULP: [f64; 2];
        fn round(value: f32) -> Self;
        fn pieces(self) -> [f64; 3] {
            [self.to_f64(), 0.0, 0.0]
        }
    }

    impl Stored for f16 {
        const HALF_ULP: [f64; 2] = [1.0 / 2048.0, 1.0 / 33_554_432.0];
        fn round(value: f32) -> Self {
            Self::from_f32(value)
        }
    }

    impl Stored for bf16 {
        const HALF_ULP: [f64; 2] = [1.0 / 256.0, 0.0];
        fn round(value: f32) -> Self {
            Self::from_f32(value)
        }
    }

    /// Multiplied as TF32.
    impl Stored for f32 {
        const HALF_ULP: [f64; 2] = [0.0; 2];
        fn round(value: f32) -> Self {
            value
        }
        fn pieces(self) -> [f64; 3] {
            [tf32(self).into(), 0.0, 0.0]
        }
    }

    impl Stored for Bf16x3 {
        const HALF_ULP: [f64; 2] = [0.0; 2];
        fn round(value: f32) -> Self {
            Self(value)
        }
        fn pieces(self) -> [f64; 3] {
            bf16_pieces(self.0)
        }
    }

    impl Stored for Bf16x6 {
        const HALF_ULP: [f64; 2] = [0.0; 2];
        fn round(value: f32) -> Self {
            Self(value)
        }
        fn pieces(self) -> [f64; 3] {
            bf16_pieces(self.0)
        }
    }

    /// Three numbers of bf16, each of which is what the ones before leave of `value`, rounded.
    fn bf16_pieces(value: f32) -> [f64; 3] {
        let mut rest = f64::from(value);
        [(); 3].map(|()| {
            // The rest has at most 24 bits, so it is a float.
            let piece = bf16::from_f32(rest as f32).to_f64();
            rest -= piece;
            piece
        })
    }

    /// The products of pieces that are summed.
    fn product<A: Stored>(a: &[f64; 3], b: &[f64; 3]) -> f64 {
        let count = A::PIECES.max(1);
        (0..count).flat_map(|i| (0..count - i).map(move |j| a[i] * b[j])).sum()
    }

    fn random<A: Stored>(count: usize, seed: u64) -> Vec<A> {
        random_f32(count, seed).into_iter().map(A::round).collect()
    }

    /// A sum of products, the sum of their magnitudes, and their number.
    #[derive(Clone, Copy, Default)]
    struct Sum {
        value: f64,
        magnitude: f64,
        terms: f64,
    }

    impl Sum {
        fn add(&mut self, term: f64) {
            self.value += term;
            self.magnitude += term.abs();
            self.terms += 1.0;
        }
    }

    /// The definition, term by term: y, dx, dw.
    fn reference<A: Stored>(shape: &ConvShape, x: &[A], weight: &[A], dy: &[A]) -> [Vec<Sum>; 3] {
        let pieces = |values: &[A]| values.iter().map(|&value| value.pieces()).collect::<Vec<[f64; 3]>>();
        let (x, weight, dy) = (pieces(x), pieces(weight), pieces(dy));
        let (channels, outs) = (shape.group_inputs(), shape.out_channels);
        let mut results = [shape.output_len(), shape.input_len(), shape.weight_len()].map(|n| vec![Sum::default(); n]);
        let [y, dx, dw] = &mut results;
        for pixel in 0..shape.batch * shape.out_height() * shape.out_width() {
            let (line, j) = (pixel / shape.out_width(), pixel % shape.out_width());
            let (n, i) = (line / shape.out_height(), line % shape.out_height());
            for tap in 0..shape.taps() {
                let row = (i * shape.stride + tap / shape.kernel).wrapping_sub(shape.padding);
                let column = (j * shape.stride + tap % shape.kernel).wrapping_sub(shape.padding);
                if row >= shape.height || column >= shape.width {
                    continue;
                }
                let input = ((n * shape.height + row) * shape.width + column) * shape.in_channels;
                for (channel, out) in (0..channels).flat_map(|channel| (0..outs).map(move |out| (channel, out))) {
                    let input = input + out / shape.group_outputs() * channels + channel;
                    let (w, output) = ((tap * channels + channel) * outs + out, pixel * outs + out);
                    y[output].add(product::<A>(&x[input], &weight[w]));
                    dx[input].add(product::<A>(&dy[output], &weight[w]));
                    dw[w].add(product::<A>(&x[input], &dy[output]));
                }
            }
        }
        results
    }

    /// The error of a sum in f32: `terms` roundings, up or down at random, and one more to the type of the result.
    fn check<D: Compute>(what: &str, found: &[D], expected: &[Sum], start: &[f64], half_ulp: [f64; 2]) {
        assert_eq!(found.len(), expected.len(), "{what}: length");
        for (index, (&found, sum)) in found.iter().zip(expected).enumerate() {
            let (found, start) = (found.to_f64(), start.get(index).copied().unwrap_or(0.0));
            let (value, magnitude) = (sum.value + start, sum.magnitude + start.abs());
            let in_sum = 4.0 * f64::from(f32::EPSILON) * (sum.terms + 1.0).sqrt() * magnitude;
            let [relative, absolute] = half_ulp;
            let tolerance = in_sum + (relative * (value.abs() + in_sum)).max(absolute);
            assert!(
                abs_diff_eq!(found, value, epsilon = tolerance),
                "{what}[{index}]: {found} instead of {value}, off by {:e}, allowed {tolerance:e}",
                (found - value).abs()
            );
        }
    }

    /// A buffer of `offset` elements followed by these, to choose their alignment.
    fn placed<T: Compute>(device: &Device, offset: usize, values: &[T]) -> Buffer<T> {
        let mut buffer = device.poisoned(offset + values.len()).unwrap();
        buffer.slice_mut(offset..offset + values.len()).unwrap().write(values).unwrap();
        buffer
    }

    /// The results of a pass that writes over NaN, and of one that adds to `start`. Asserts that nothing before or
    /// after is written.
    fn both<T: Compute>(
        device: &Device,
        offset: usize,
        start: &[T],
        pass: impl Fn(SliceMut<'_, T>, bool) -> Result<()>,
    ) -> [Vec<T>; 2] {
        [false, true].map(|accumulate| {
            let len = start.len();
            let mut buffer = device.poisoned::<T>(offset + len + 1).unwrap();
            if accumulate {
                buffer.slice_mut(offset..offset + len).unwrap().write(start).unwrap();
            }
            pass(buffer.slice_mut(offset..offset + len).unwrap(), accumulate).unwrap();
            let mut all = buffer.to_vec().unwrap();
            let last = all.pop().unwrap();
            let outside = all[..offset].iter().chain([&last]).flat_map(bytemuck::bytes_of);
            assert!(outside.copied().all(|byte| byte == 0xFF), "a write outside the result");
            all.split_off(offset)
        })
    }

    /// Compares the moments of every channel in every tile with those of the stored numbers, in double.
    fn check_moments<A: Stored>(shape: &ConvShape, y: &[A], moments: &[f32]) {
        let (rows, channels) = (y.len() / shape.out_channels, shape.out_channels);
        let tiles = rows.div_ceil(MOMENT_ROWS);
        for (channel, tile) in (0..channels).flat_map(|channel| (0..tiles).map(move |tile| (channel, tile))) {
            let inside = tile * MOMENT_ROWS..((tile + 1) * MOMENT_ROWS).min(rows);
            let values: Vec<f64> = inside.map(|row| y[row * channels + channel].to_f64()).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let magnitude = values.iter().map(|value| value.abs()).sum::<f64>() / values.len() as f64;
            let m2: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let at = (channel * tiles + tile) * 2;
            let [found_mean, found_m2] = [moments[at], moments[at + 1]].map(f64::from);
            // The errors of trees of at most 128 additions in f32. The second also has the error of the mean, squared.
            let eps = f64::from(f32::EPSILON);
            let what = format!("{shape:?}, channel {channel}, tile {tile}");
            assert!(
                abs_diff_eq!(found_mean, mean, epsilon = 8.0 * eps * magnitude),
                "{what}: mean {found_mean}, not {mean}"
            );
            let most = 16.0 * eps * m2 + values.len() as f64 * (8.0 * eps * magnitude).powi(2);
            assert!(abs_diff_eq!(found_m2, m2, epsilon = most), "{what}: squares {found_m2}, not {m2}");
        }
    }

    /// Checks all passes on every device, at `offset` elements from an aligned address: they are close to the
    /// definition and have the same bits in every order of blocks.
    fn check_shape<A: Stored>(shape: &ConvShape, seed: u64, offset: usize) {
        let numbers = |count, which| random::<A>(count, 16 * seed + which);
        let (x, weight) = (numbers(shape.input_len(), 0), numbers(shape.weight_len(), 1));
        let (dy, y, dx) =
            (numbers(shape.output_len(), 2), numbers(shape.output_len(), 3), numbers(shape.input_len(), 4));
        let dw = random_f32(shape.weight_len(), 16 * seed + 5);
        let expected = reference(shape, &x, &weight, &dy);
        let mut bits: Option<Vec<u8>> = None;
        for device in devices() {
            let upload = |values: &[A]| placed(&device, offset, values);
            let (x, weight, dy_) = (upload(&x), upload(&weight), upload(&dy));
            fn view<A: Stored>(buffer: &Buffer<A>, offset: usize) -> Slice<'_, A> {
                buffer.slice(offset..buffer.len()).unwrap()
            }
            let (x, weight, dy_) = (view(&x, offset), view(&weight, offset), view(&dy_, offset));
            let ys = both(&device, offset, &y, |y, add| forward(shape, x, weight, y, add, None));
            let mut moments = device.poisoned(moments_len(shape)).unwrap();
            let mut again = device.poisoned(shape.output_len()).unwrap();
            forward(shape, x, weight, again.view_mut(), false, Some(moments.view_mut())).unwrap();
            let moments = moments.to_vec().unwrap();
            assert!(again.to_vec().unwrap() == ys[0], "{shape:?}: moments change the result");
            check_moments(shape, &ys[0], &moments);
            let dxs = both(&device, offset, &dx, |dx, add| {
                input_gradient(shape, dy_, weight, dx, add, BatchNormSumsArgs::default())
            });
            let dws = both(&device, offset, &dw, |dw, add| {
                let mut workspace = device.poisoned(splits::<A>(shape) * shape.weight_len()).unwrap();
                super::super::weight_gradient_by(
                    partial_weight_gradients,
                    splits::<A>(shape),
                    shape,
                    x,
                    dy_,
                    dw,
                    add,
                    workspace.view_mut(),
                )
            });
            let starts = |values: &[A]| [vec![], values.iter().map(|&value| value.to_f64()).collect()];
            let dw_starts = [vec![], dw.iter().map(|&value| value.to_f64()).collect()];
            for i in 0..2 {
                let what = |pass| format!("{} on {}, {shape:?}, {pass}, added: {}", A::NAME, device.name(), i == 1);
                check(&what("y"), &ys[i], &expected[0], &starts(&y)[i], A::HALF_ULP);
                check(&what("dx"), &dxs[i], &expected[1], &starts(&dx)[i], A::HALF_ULP);
                check(&what("dw"), &dws[i], &expected[2], &dw_starts[i], [0.0; 2]);
            }
            if device.is_host() {
                let all: Vec<u8> = (ys.iter().chain(&dxs).flat_map(|values| bytemuck::cast_slice(values)))
                    .chain(dws.iter().flat_map(|values| bytemuck::cast_slice(values)))
                    .chain(bytemuck::cast_slice(&moments))
                    .copied()
                    .collect();
                assert!(
                    bits.get_or_insert_with(|| all.clone()) == &all,
                    "{shape:?}: the order of blocks changes the bits"
                );
            }
        }
    }

    #[test]
    fn equals_the_definition_in_bfloat16() {
        for (number, shape) in SHAPES.iter().chain(&WIDE_SHAPES).enumerate() {
            check_shape::<bf16>(shape, number as u64, 0);
        }
    }

    #[test]
    fn equals_the_definition_in_half_precision() {
        if std::env::var_os("POLDER_SANITIZE").is_some() {
            return; // the same code as for bfloat16
        }
        for (number, shape) in SHAPES.iter().enumerate() {
            check_shape::<f16>(shape, 100 + number as u64, 0);
        }
    }

    #[test]
    fn equals_the_definition_in_tf32() {
        for (number, shape) in SHAPES.iter().chain(&WIDE_SHAPES).enumerate() {
            check_shape::<f32>(shape, 200 + number as u64, 0);
        }
    }

    #[test]
    fn equals_the_definition_in_sums_of_bfloat16() {
        for (number, shape) in SHAPES.iter().chain(&WIDE_SHAPES).enumerate() {
            if std::env::var_os("POLDER_SANITIZE").is_none() {
                check_shape::<Bf16x3>(shape, 600 + number as u64, 0); // the same code
            }
            check_shape::<Bf16x6>(shape, 700 + number as u64, 0);
        }
    }

    /// The channels are whole chunks, but the addresses do not allow 16-byte copies.
    #[test]
    fn operands_may_begin_anywhere() {
        for (number, shape) in [shape([2, 5, 6, 8, 16], 3, 1, 1), shape([2, 8, 7, 40, 24], 3, 2, 1)].iter().enumerate()
        {
            for offset in [1, 2, 4] {
                check_shape::<bf16>(shape, 300 + number as u64, offset);
                check_shape::<f32>(shape, 400 + number as u64, offset);
                check_shape::<Bf16x3>(shape, 800 + number as u64, offset);
            }
        }
    }

    /// All results of the passes: y, the moments of its tiles, dx, dz with the sums for batch norm, the parts of dw,
    /// and the sums of squares if there is only one part.
    fn everything<A: Stored>(shape: &ConvShape, device: &Device) -> Vec<u8> {
        let upload = |len, seed| device.upload(&random::<A>(len, seed)).unwrap();
        let x = upload(shape.input_len(), 500);
        let (weight, dy) = (upload(shape.weight_len(), 501), upload(shape.output_len(), 502));
        let (mut y, mut dx) =
            (device.poisoned(shape.output_len()).unwrap(), device.poisoned(shape.input_len()).unwrap());
        let mut moments = device.poisoned::<f32>(moments_len(shape)).unwrap();
        let mut dw = device.poisoned::<f32>(splits::<A>(shape) * shape.weight_len()).unwrap();
        forward(shape, x.view(), weight.view(), y.view_mut(), false, Some(moments.view_mut())).unwrap();
        input_gradient(shape, dy.view(), weight.view(), dx.view_mut(), false, BatchNormSumsArgs::default()).unwrap();
        partial_weight_gradients(shape, x.view(), dy.view(), dw.view_mut(), false).unwrap();
        let mut all = [y.to_vec().unwrap(), dx.to_vec().unwrap()].concat();
        let mut wide = [moments.to_vec().unwrap(), dw.to_vec().unwrap()].concat();
        if shape.leaves_sums::<A>(device) {
            let channels = shape.in_channels;
            let vectors: Vec<_> = (510..514).map(|seed| device.upload(&random_f32(channels, seed)).unwrap()).collect();
            let [gamma, beta, mean, inv_std] = std::array::from_fn(|i| vectors[i].view());
            let activation = Activation::ReluRecomputed { beta };
            let normalized = Normalized { x: x.view(), gamma, mean, inv_std, activation };
            let mut dz = device.poisoned::<A>(shape.input_len()).unwrap();
            let [mut dgamma, mut dbeta] = std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
            let mut workspace = Workspace::new(device, []).unwrap().with_convolutions::<A>([shape]).unwrap();
            super::super::input_gradient_with_sums(
                shape,
                dy.view(),
                weight.view(),
                dz.view_mut(),
                false,
                normalized,
                dgamma.view_mut(),
                dbeta.view_mut(),
                &mut workspace,
            )
            .unwrap();
            all.extend(dz.to_vec().unwrap());
            wide.extend([dgamma.to_vec().unwrap(), dbeta.to_vec().unwrap()].concat());
        }
        let mut squares = Vec::new();
        if splits::<A>(shape) == 1 {
            let mut dw = device.poisoned::<f32>(shape.weight_len()).unwrap();
            let mut sums = device.poisoned::<f64>(finished_squares(shape)).unwrap();
            let mut flag = device.zeros(1).unwrap();
            let mut finish = Finish { scale: None, flag: flag.view_mut(), squares: Some(sums.view_mut()) };
            let finish = finish.args::<f32>(Check { operation: "finish", device }, finished_squares(shape)).unwrap();
            weight_gradient(shape, x.view(), dy.view(), dw.view_mut(), false, finish).unwrap();
            wide.extend(dw.to_vec().unwrap());
            squares = sums.to_vec().unwrap();
        }
        [bytemuck::cast_slice(&all), bytemuck::cast_slice::<f32, u8>(&wide), bytemuck::cast_slice(&squares)].concat()
    }

    fn check_tiles<A: Stored>() {
        let shapes = [
            shape([2, 9, 11, 16, 40], 3, 1, 1),
            shape([3, 8, 7, 72, 16], 3, 2, 1),
            shape([4, 10, 11, 16, 136], 1, 1, 0),
            shape([2, 6, 5, 3, 10], 3, 1, 1),
            shape([1, 5, 7, 24, 200], 3, 1, 1),
            grouped(2, shape([2, 6, 7, 32, 96], 3, 1, 1)),
        ];
        // Another test covers the orders of blocks.
        for device in devices().into_iter().filter(|device| !device.is_host()).chain(devices().into_iter().take(1)) {
            for shape in &shapes {
                let expected = everything::<A>(shape, &device);
                for tile in tiles::<A>() {
                    for pass in [ConvPass::Forward, ConvPass::InputGradient, ConvPass::WeightGradient] {
                        choose((device.number(), A::NAME, *shape, pass), tile);
                    }
                    let found = everything::<A>(shape, &device);
                    assert!(found == expected, "{}: {} columns change bits of {shape:?}", device.name(), tile.columns);
                }
                CHOSEN.write().unwrap().retain(|(_, name, known, _), _| *name != A::NAME || known != shape);
                if shape != &shapes[0] {
                    continue;
                }
                // The measurement too chooses a candidate of each pass.
                measure_tiles::<A>(shape, true, &device).unwrap();
                for pass in [ConvPass::Forward, ConvPass::InputGradient, ConvPass::WeightGradient] {
                    let tile = TensorTile::of::<A>(pass, shape, &device);
                    assert!(pass.candidates::<A>(shape).any(|candidate| std::ptr::eq(candidate, tile)), "{shape:?}");
                    let key = (device.number(), A::NAME, *shape, pass);
                    let chosen = CHOSEN.read().unwrap().contains_key(&key);
                    assert_eq!(chosen, pass.candidates::<A>(shape).count() > 1, "{shape:?}, {pass:?}");
                }
                assert!(everything::<A>(shape, &device) == expected, "{shape:?}: measured tiles change bits");
            }
        }
    }

    /// Tiles may be chosen by their speed, because results do not depend on them.
    #[test]
    fn no_tile_changes_a_bit() {
        check_tiles::<f16>();
        check_tiles::<f32>();
        check_tiles::<Bf16x6>();
        if std::env::var_os("POLDER_SANITIZE").is_none() {
            // The same code.
            check_tiles::<bf16>();
            check_tiles::<Bf16x3>();
        }
    }

    fn check_reach<A: Stored>() {
        let all = || SHAPES.iter().chain(&WIDE_SHAPES);
        let device = Device::host();
        let mut widest = 0;
        for tile in tiles::<A>() {
            // The rule never chooses the second of two tiles with equally many columns. `check_tiles` covers it.
            if tile.columns == std::mem::replace(&mut widest, tile.columns) {
                continue;
            }
            let is = |found: &TensorTile| std::ptr::eq(found, tile);
            let is_for = |rows, columns| is(TensorTile::new::<A>(rows, columns, 1));
            assert!(all().any(|s| is_for(s.output_len() / s.out_channels, s.out_channels)));
            assert!(all().any(|s| s.stride == 1 && is_for(s.input_len() / s.in_channels, s.in_channels)));
            assert!(all().any(|s| is(TensorTile::of::<A>(ConvPass::WeightGradient, s, &device))));
        }
        assert!(all().any(|shape| splits::<A>(shape) > 1));
    }

    #[test]
    fn the_shapes_reach_every_tile_and_several_splits() {
        check_reach::<f16>();
        check_reach::<Bf16x3>();
        check_reach::<Bf16x6>();
    }
}
