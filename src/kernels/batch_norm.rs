//! Batch normalisation (Ioffe and Szegedy 2015) of activations `[rows, channels]` (NHWC: the rows are the pixels of all
//! images), fused with the residual addition and the relu that follow it in a ResNet (He et al. 2016).
//!
//! Per channel, over the `m` rows of the batch: `mean = Σx / m`, `var = Σ(x − mean)² / m`,
//! `inv_std = 1 / √(var + eps)`, `y = act(gamma · (x − mean) · inv_std + beta + residual)`.
//!
//! Rounding: at most 64 rows are summed in `T`, relative to the first of them; a convolution sums 128, relative to
//! their mean. These sums are combined in double, relative to the first row or the first mean, so that a mean much
//! larger than the deviation does no harm. All sums have a fixed order: the same inputs give the same bits
//! on every run, with any number of threads.

pub use super::conv_batch_norm::{Activation, Normalized, Workspace};
use super::conv_batch_norm::{SumsAddresses, SumsRoom, check_extents, group_blocks, moments_len};
use super::{Check, pick};
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{
    BatchNormRows, BatchNormSumsArgs, InputArgs, InputTangentArgs, MomentsArgs, NormalizeArgs, NormalizeTangentArgs,
    ParametersTangentArgs, RunningArgs, StatisticsArgs, StatisticsTangentArgs, Upstream, UpstreamTangent,
};
use crate::device::constants::{
    BLOCK_THREADS, MASK_NONE, MASK_OUTPUT, MASK_RECOMPUTE, MOMENT_ROWS, PACK_BYTES, RESIDUAL_ACCUMULATE, RESIDUAL_NONE,
    RESIDUAL_WRITE,
};
use crate::device::{Compute, Device, Launch, Result, Scalar, Slice, SliceMut, id};

/// The shape of the activations: rows (batch · height · width) and channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchNormShape {
    /// batch · height · width
    pub rows: usize,
    /// The innermost dimension.
    pub channels: usize,
}

impl BatchNormShape {
    /// The room for the sums of all blocks. There are the most columns of blocks if each of 32 threads has one channel.
    fn sums_room(&self, device: &Device) -> SumsRoom {
        let (_, row_blocks) = row_blocks(device, *self, PER_SUMMING_THREAD);
        SumsRoom { channels: self.channels, row_blocks, column_blocks: self.channels.div_ceil(32) }
    }
}

impl Workspace {
    /// Room for [`forward_train`], [`backward`] and their tangents for each of these shapes.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn new(device: &Device, shapes: impl IntoIterator<Item = BatchNormShape>) -> Result<Self> {
        Self::with_rooms(device, shapes.into_iter().map(|shape| shape.sums_room(device)))
    }
}

/// The inputs of both forward modes.
#[derive(Clone, Copy)]
pub struct Forward<'a, S: Compute> {
    /// `[rows, channels]`
    pub x: Slice<'a, S>,
    /// Scale, `[channels]`.
    pub gamma: Slice<'a, S::Master>,
    /// Shift, `[channels]`.
    pub beta: Slice<'a, S::Master>,
    /// Added to the variance.
    pub eps: f64,
    /// Added after the normalisation and before the relu, `[rows, channels]`.
    pub residual: Option<Slice<'a, S>>,
    /// Whether a relu follows. A NaN stays a NaN.
    pub relu: bool,
}

/// What the forward saves for the backward, `[channels]` each.
pub struct Saved<'a, T: Scalar> {
    /// The mean that was subtracted.
    pub mean: SliceMut<'a, T>,
    /// `1 / √(var + eps)`
    pub inv_std: SliceMut<'a, T>,
}

/// The running statistics, `[channels]` each: `next = (1 − momentum) · old + momentum · batch`, with the unbiased
/// variance. The old ones are kept, so that a step can be skipped.
pub struct RunningUpdate<'a, T: Scalar> {
    /// The weight of the batch; PyTorch's default is 0.1.
    pub momentum: f64,
    /// The running mean before this batch.
    pub mean: Slice<'a, T>,
    /// The running variance before this batch.
    pub var: Slice<'a, T>,
    /// The running mean after it.
    pub next_mean: SliceMut<'a, T>,
    /// The running variance after it.
    pub next_var: SliceMut<'a, T>,
}

/// The statistics with which the forward normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The batch's, which depend on x.
    Train,
    /// The running ones, which do not depend on x.
    Eval,
}

/// The inputs of [`backward`]; the shapes are those of the forward.
#[derive(Clone, Copy)]
pub struct Backward<'a, S: Compute> {
    /// The forward's input.
    pub x: Slice<'a, S>,
    /// The gradient of its output.
    pub dy: Slice<'a, S>,
    /// Scale.
    pub gamma: Slice<'a, S::Master>,
    /// The mean that the forward saved.
    pub mean: Slice<'a, S::Master>,
    /// The `inv_std` that the forward saved.
    pub inv_std: Slice<'a, S::Master>,
    /// What followed the normalisation.
    pub activation: Activation<'a, S>,
}

/// The outputs of [`backward`].
pub struct Gradients<'a, S: Compute> {
    /// `[rows, channels]`
    pub dx: SliceMut<'a, S>,
    /// `[channels]`
    pub dgamma: SliceMut<'a, S::Master>,
    /// `[channels]`
    pub dbeta: SliceMut<'a, S::Master>,
}

/// The output for the gradient of the residual, `[rows, channels]`.
pub struct ResidualGradient<'a, S: Compute> {
    /// The buffer.
    pub gradient: SliceMut<'a, S>,
    /// Whether the gradient is added to the buffer.
    pub accumulate: bool,
}

/// The inputs of [`backward_from_sums`]; the shapes are those of the forward.
#[derive(Clone, Copy)]
pub struct Summed<'a, S: Compute> {
    /// The forward's input.
    pub x: Slice<'a, S>,
    /// The gradient of its output where the activation passed, and zero elsewhere.
    pub dz: Slice<'a, S>,
    /// Scale.
    pub gamma: Slice<'a, S::Master>,
    /// The mean that the forward saved.
    pub mean: Slice<'a, S::Master>,
    /// The `inv_std` that the forward saved.
    pub inv_std: Slice<'a, S::Master>,
    /// `[channels]`
    pub dgamma: Slice<'a, S::Master>,
    /// `[channels]`
    pub dbeta: Slice<'a, S::Master>,
}

/// The tangents of the inputs of the forward.
#[derive(Clone, Copy)]
pub struct ForwardTangents<'a, S: Compute> {
    /// `[rows, channels]`
    pub x: Slice<'a, S>,
    /// `[channels]`
    pub gamma: Slice<'a, S::Master>,
    /// `[channels]`
    pub beta: Slice<'a, S::Master>,
    /// `[rows, channels]`, if there was a residual.
    pub residual: Option<Slice<'a, S>>,
}

/// The tangents of the inputs of the backward, and two of its results.
#[derive(Clone, Copy)]
pub struct BackwardTangents<'a, S: Compute> {
    /// `[rows, channels]`
    pub x: Slice<'a, S>,
    /// `[rows, channels]`
    pub dy: Slice<'a, S>,
    /// `[channels]`
    pub gamma: Slice<'a, S::Master>,
    /// As [`forward_tangent`] left it.
    pub mean: Slice<'a, S::Master>,
    /// As [`forward_tangent`] left it.
    pub inv_std: Slice<'a, S::Master>,
    /// The result of [`backward`], not a tangent.
    pub dgamma: Slice<'a, S::Master>,
    /// The result of [`backward`], not a tangent.
    pub dbeta: Slice<'a, S::Master>,
}

/// Two sums in double, which each thread of a summing kernel leaves for each of its channels.
const TWO_SUMS_BYTES: usize = 2 * size_of::<f64>();

/// A launch over rows and channels, and the arguments that describe it.
struct RowLaunch {
    launch: Launch,
    rows: BatchNormRows,
}

impl RowLaunch {
    /// About `per_thread` elements for each GPU thread. Several channels at a time need 16-byte accesses, for which all
    /// of `addresses` (0 for an absent argument) must be aligned.
    fn new<S: Compute>(device: &Device, shape: BatchNormShape, per_thread: usize, addresses: &[u64]) -> Self {
        let BatchNormShape { rows, channels } = shape;
        let (block_rows, blocks) = row_blocks(device, shape, per_thread);
        let cpu = !device.is_simt();
        let aligned = addresses.iter().all(|address| address.is_multiple_of(PACK_BYTES as u64));
        let pack = match (cpu, aligned, size_of::<S>()) {
            (true, ..) => 0,
            (_, true, 2) if channels.is_multiple_of(8) => 8,
            (_, true, _) if channels.is_multiple_of(4) => 4,
            _ => 1,
        };
        // Columns of threads, and blocks side by side: one column for each channel group, but at most a warp in a
        // block, so that neighbouring threads read neighbouring addresses.
        let columns = |pack: usize| {
            let groups = channels.div_ceil(pack);
            let tiles = groups.div_ceil(32).max(1);
            (groups.div_ceil(tiles).max(1), tiles)
        };
        let launch = if cpu {
            Launch::new(blocks as u32, 1)
        } else {
            let (across, tiles) = columns(pack);
            // As many as with four channels per thread: sums have the same order in all types.
            let lines = (BLOCK_THREADS / columns(pack.min(4)).0).min(rows.max(1));
            Launch {
                grid: [blocks as u32, tiles as u32, 1],
                block: [across as u32, lines as u32, 1],
                shared: across * lines * pack * TWO_SUMS_BYTES,
            }
        };
        let rows = BatchNormRows {
            rows: rows as u64,
            inverse: 1.0 / rows as f64,
            block_rows: block_rows as u32,
            channels: channels as u32,
            pack: pack as u32,
        };
        Self { launch, rows }
    }
}

/// The rows of each block, and the number of blocks. They depend only on the shape and the device, because the
/// workspace's length does.
fn row_blocks(device: &Device, shape: BatchNormShape, per_thread: usize) -> (usize, usize) {
    let elements = shape.rows * shape.channels;
    let most = if device.is_simt() {
        let blocks = device.elementwise(elements, per_thread).grid[0] as usize;
        blocks.div_ceil(shape.channels.div_ceil(128).max(1))
    } else {
        device.elementwise(elements, 1).grid[0] as usize
    };
    let block_rows = shape.rows.div_ceil(most).max(1);
    (block_rows, shape.rows.div_ceil(block_rows).max(1))
}

/// Elements per GPU thread in kernels that sum: enough to amortise the reduction over the block.
const PER_SUMMING_THREAD: usize = 32;
/// Elements per GPU thread in other kernels.
const PER_THREAD: usize = 16;

/// A launch with one block per channel on the GPU, whose threads each take a few blocks of rows.
fn channel_launch(device: &Device, channels: usize) -> Launch {
    if !device.is_simt() {
        return Launch::new(channels.div_ceil(64).max(1) as u32, 1);
    }
    Launch { grid: [channels.max(1) as u32, 1, 1], block: [1, 128, 1], shared: 128 * TWO_SUMS_BYTES }
}

impl Upstream {
    /// The bitwise or of all addresses, which shows their common alignment.
    fn bits(&self) -> u64 {
        self.x | self.y | self.dy | self.gamma | self.beta | self.mean | self.inv_std
    }
}

impl UpstreamTangent {
    fn bits(&self) -> u64 {
        self.x | self.dy | self.gamma | self.mean | self.inv_std
    }
}

fn address<S: Compute>(slice: Option<Slice<'_, S>>) -> u64 {
    slice.map_or(0, |slice| slice.address())
}

/// Checks the arguments of one operation on activations of a shape.
struct ShapeCheck<'a> {
    check: Check<'a>,
    shape: BatchNormShape,
}

impl<'a> ShapeCheck<'a> {
    fn new(operation: &'static str, device: &'a Device, shape: BatchNormShape) -> Self {
        Self { check: Check { operation, device }, shape }
    }

    /// Checks an argument of `[rows, channels]`.
    fn full<S: Compute>(&self, name: &'static str, slice: Slice<'_, S>) -> Result<()> {
        self.check.argument(name, slice, self.shape.rows * self.shape.channels)
    }

    /// Checks an argument of `[channels]`.
    fn channels<T: Scalar>(&self, name: &'static str, slice: Slice<'_, T>) -> Result<()> {
        self.check.argument(name, slice, self.shape.channels)
    }

    fn sums(&self, workspace: &mut Workspace) -> Result<SumsAddresses> {
        workspace.sums(self.check, &self.shape.sums_room(self.check.device))
    }

    /// Fails where the mask is recomputed: that ignores the residual.
    fn no_residual(&self, mask: u32) -> Result<()> {
        if mask != MASK_RECOMPUTE {
            return Ok(());
        }
        self.check.refuse("with a residual the mask must come from the output".into())
    }

    /// Checks what both backward passes, or their tangents, read. Returns it as the kernels take it, and the mask's
    /// number.
    fn backward<S: Compute>(&self, input: &Backward<'_, S>) -> Result<(Upstream, u32)> {
        let Backward { x, dy, gamma, mean, inv_std, activation } = *input;
        let normalized = Normalized { x, gamma, mean, inv_std, activation };
        let (upstream, mask) = normalized.upstream(self.check, self.shape.rows, self.shape.channels)?;
        self.full("dy", dy)?;
        Ok((Upstream { dy: dy.address(), ..upstream }, mask))
    }

    /// The address of the residual's gradient, and the number by which the kernels know whether it is written or added.
    fn residual<S: Compute>(&self, residual: Option<ResidualGradient<'_, S>>, mask: u32) -> Result<(u64, u32)> {
        let Some(mut residual) = residual else { return Ok((0, RESIDUAL_NONE)) };
        self.full("residual", residual.gradient.view())?;
        self.no_residual(mask)?;
        let mode = if residual.accumulate { RESIDUAL_ACCUMULATE } else { RESIDUAL_WRITE };
        Ok((residual.gradient.address(), mode))
    }

    fn two_rows(&self) -> Result<()> {
        if self.shape.rows >= 2 {
            return Ok(());
        }
        self.check.refuse("training needs at least two values per channel".into())
    }

    fn forward<S: Compute>(&self, input: &Forward<'_, S>, y: Slice<'_, S>, saved: &Saved<'_, S::Master>) -> Result<()> {
        check_extents(self.check, self.shape.rows, self.shape.channels)?;
        self.full("x", input.x)?;
        self.channels("gamma", input.gamma)?;
        self.channels("beta", input.beta)?;
        if let Some(residual) = input.residual {
            self.full("residual", residual)?;
        }
        self.full("y", y)?;
        self.channels("mean", saved.mean.view())?;
        self.channels("inv_std", saved.inv_std.view())
    }
}

/// Normalises with the statistics of the batch. It saves them, and with `running` updates the running statistics.
/// `workspace` must have been made for this shape, among others.
///
/// Traffic: reads x twice, reads the residual once, and writes y once: 12 bytes per element in f32, 16 with a residual.
///
/// # Errors
/// [`Error::Argument`] for fewer than two rows, which have no unbiased variance; [`Error::Length`] and
/// [`Error::OtherDevice`].
pub fn forward_train<S: Compute>(
    shape: BatchNormShape,
    input: Forward<'_, S>,
    y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
    running: Option<RunningUpdate<'_, S::Master>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::forward_train", device, shape);
    check.forward(&input, y.view(), &saved)?;
    let SumsAddresses { dz: sums, dz_x: squares, .. } = check.sums(workspace)?;
    check.two_rows()?;
    let RowLaunch { launch, rows } = RowLaunch::new::<S>(device, shape, PER_SUMMING_THREAD, &[input.x.address()]);
    let moments = MomentsArgs { x: input.x.address(), shift: saved.mean.address(), sums, squares, rows };
    // SAFETY: every length is checked above, and the workspace has room for all row blocks of the launch.
    unsafe { device.launch(S::choose(id::BATCH_NORM_MOMENTS), launch, &moments)? };
    let of_blocks = BlockMoments { sums, squares, tiles: 0, block_rows: rows.block_rows };
    statistics(&check, input, y, saved, running, of_blocks)
}

/// Like [`forward_train`], but computes the statistics from the moments of x that
/// [`conv::forward_with_moments`](super::conv::forward_with_moments) has left, without a pass over x: 8 bytes per
/// element in f32, 12 with a residual.
///
/// # Errors
/// As [`forward_train`].
pub fn forward_from_moments<S: Compute>(
    shape: BatchNormShape,
    input: Forward<'_, S>,
    moments: Slice<'_, S::Master>,
    y: SliceMut<'_, S>,
    saved: Saved<'_, S::Master>,
    running: Option<RunningUpdate<'_, S::Master>>,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::forward_from_moments", device, shape);
    check.forward(&input, y.view(), &saved)?;
    check.two_rows()?;
    check.check.argument("moments", moments, moments_len(shape.rows, shape.channels))?;
    let moments = BlockMoments { sums: 0, squares: 0, tiles: moments.address(), block_rows: MOMENT_ROWS as u32 };
    statistics(&check, input, y, saved, running, moments)
}

/// The location of the moments of x: two arrays with the sums of blocks, or the tiles of a convolution.
struct BlockMoments {
    sums: u64,
    squares: u64,
    tiles: u64,
    block_rows: u32,
}

/// Combines the blocks' moments and normalises. The lengths have been checked.
fn statistics<S: Compute>(
    check: &ShapeCheck<'_>,
    input: Forward<'_, S>,
    y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
    running: Option<RunningUpdate<'_, S::Master>>,
    moments: BlockMoments,
) -> Result<()> {
    let (device, shape) = (check.check.device, check.shape);
    let mut args = StatisticsArgs {
        sums: moments.sums,
        squares: moments.squares,
        tiles: moments.tiles,
        mean: saved.mean.address(),
        inv_std: saved.inv_std.address(),
        running_mean: 0,
        running_var: 0,
        next_mean: 0,
        next_var: 0,
        eps: input.eps,
        momentum: 0.0,
        inverse: 1.0 / shape.rows as f64,
        unbiased_inverse: 1.0 / (shape.rows as f64 - 1.0),
        rows: shape.rows as u64,
        block_rows: moments.block_rows,
        channels: shape.channels as u32,
        blocks: shape.rows.div_ceil(moments.block_rows as usize) as u32,
    };
    if let Some(mut running) = running {
        check.channels("running.mean", running.mean)?;
        check.channels("running.var", running.var)?;
        check.channels("running.next_mean", running.next_mean.view())?;
        check.channels("running.next_var", running.next_var.view())?;
        args.running_mean = running.mean.address();
        args.running_var = running.var.address();
        args.next_mean = running.next_mean.address();
        args.next_var = running.next_var.address();
        args.momentum = running.momentum;
    }
    let kernel = pick::<S::Master, _>(id::BATCH_NORM_STATISTICS_F32, id::BATCH_NORM_STATISTICS_F64);
    // SAFETY: every length has been checked, and `moments` has the moments of this number of blocks.
    unsafe { device.launch(kernel, channel_launch(device, shape.channels), &args)? };
    normalize(shape, input, y, saved)
}

/// Normalises with the running statistics. For [`backward`] it saves a copy of the running mean, and `inv_std`.
///
/// Traffic: reads x and the residual once, and writes y once: 8 bytes per element in f32, 12 with a residual.
///
/// # Errors
/// [`Error::Argument`], [`Error::Length`] and [`Error::OtherDevice`].
pub fn forward_eval<S: Compute>(
    shape: BatchNormShape,
    input: Forward<'_, S>,
    running_mean: Slice<'_, S::Master>,
    running_var: Slice<'_, S::Master>,
    y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::forward_eval", device, shape);
    check.forward(&input, y.view(), &saved)?;
    check.channels("running_mean", running_mean)?;
    check.channels("running_var", running_var)?;
    let args = RunningArgs {
        running_mean: running_mean.address(),
        running_var: running_var.address(),
        mean: saved.mean.address(),
        inv_std: saved.inv_std.address(),
        eps: input.eps,
        channels: shape.channels as u64,
    };
    let kernel = pick::<S::Master, _>(id::BATCH_NORM_RUNNING_F32, id::BATCH_NORM_RUNNING_F64);
    // SAFETY: every length is checked above.
    unsafe { device.launch(kernel, device.elementwise(shape.channels, 1), &args)? };
    normalize(shape, input, y, saved)
}

/// The second pass of both forward modes. The lengths have been checked.
fn normalize<S: Compute>(
    shape: BatchNormShape,
    input: Forward<'_, S>,
    mut y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
) -> Result<()> {
    let device = input.x.device();
    let mut args = NormalizeArgs {
        x: input.x.address(),
        gamma: input.gamma.address(),
        beta: input.beta.address(),
        mean: saved.mean.address(),
        inv_std: saved.inv_std.address(),
        residual: address(input.residual),
        y: y.address(),
        rows: BatchNormRows::default(),
        relu: input.relu.into(),
    };
    let addresses = [args.x, args.gamma, args.beta, args.mean, args.inv_std, args.residual, args.y];
    let RowLaunch { launch, rows } = RowLaunch::new::<S>(device, shape, PER_THREAD, &addresses);
    args.rows = rows;
    // SAFETY: the callers checked every length.
    unsafe { device.launch(S::choose(id::BATCH_NORM_NORMALIZE), launch, &args) }
}

/// The gradients. With `dz = dy` where the activation passed and 0 elsewhere, and `x̂ = (x − mean) · inv_std`: `dbeta =
/// Σdz`, `dgamma = Σ dz · x̂`, and in training `dx = gamma · inv_std · (dz − Σdz/m − x̂ · Σ(dz · x̂)/m)`, in evaluation
/// `dx = gamma · inv_std · dz`. The gradient of the residual is `dz`. `workspace` is as in [`forward_train`], also in
/// evaluation.
///
/// Traffic in training, f32: 20 bytes per element; 28 if the mask is read from y; another 4 (8 to accumulate) for the
/// gradient of a residual. Writing it, rather than adding to it, saves the second read of y.
///
/// # Errors
/// [`Error::Argument`] if the mask is recomputed although there was a residual; [`Error::Length`] and
/// [`Error::OtherDevice`].
pub fn backward<S: Compute>(
    shape: BatchNormShape,
    mode: Mode,
    input: Backward<'_, S>,
    mut gradients: Gradients<'_, S>,
    residual: Option<ResidualGradient<'_, S>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::backward", device, shape);
    let (upstream, mask) = check.backward(&input)?;
    check.full("dx", gradients.dx.view())?;
    check.channels("dgamma", gradients.dgamma.view())?;
    check.channels("dbeta", gradients.dbeta.view())?;
    let SumsAddresses { dz, dz_x, tickets } = check.sums(workspace)?;
    let (residual_address, residual_mode) = check.residual(residual, mask)?;
    let RowLaunch { launch, rows } =
        RowLaunch::new::<S>(device, shape, PER_SUMMING_THREAD, &[upstream.bits(), residual_address]);
    let sums = BatchNormSumsArgs {
        upstream,
        tangent: UpstreamTangent::default(),
        residual: residual_address,
        dz,
        dz_x,
        rows,
        mask,
        residual_mode,
        dgamma: gradients.dgamma.address(),
        dbeta: gradients.dbeta.address(),
        tickets,
        group: group_blocks(device) as u32,
    };
    // SAFETY: every length is checked above, and the workspace has room for all row blocks of the launch.
    unsafe { device.launch(S::choose(id::BATCH_NORM_SUMS), launch, &sums)? };
    // If the first pass wrote dz, the second one reads it and needs no mask.
    let from_residual = residual_mode == RESIDUAL_WRITE && mask == MASK_OUTPUT;
    let inputs = InputArgs {
        upstream: if from_residual { Upstream { dy: residual_address, y: 0, ..upstream } } else { upstream },
        dgamma: sums.dgamma,
        dbeta: sums.dbeta,
        dx: gradients.dx.address(),
        residual: 0,
        rows: BatchNormRows::default(),
        mask: if from_residual { MASK_NONE } else { mask },
        train: (mode == Mode::Train).into(),
        accumulate: 0,
    };
    launch_input::<S>(device, shape, inputs)
}

/// The second pass of both backward modes. The lengths have been checked.
fn launch_input<S: Compute>(device: &Device, shape: BatchNormShape, mut args: InputArgs) -> Result<()> {
    let addresses = [args.upstream.bits(), args.residual, args.dgamma, args.dbeta, args.dx];
    let RowLaunch { launch, rows } = RowLaunch::new::<S>(device, shape, PER_THREAD, &addresses);
    args.rows = rows;
    // SAFETY: the callers checked every length.
    unsafe { device.launch(S::choose(id::BATCH_NORM_INPUT), launch, &args) }
}

/// The rest of [`backward`] after [`conv::input_gradient_with_sums`](super::conv::input_gradient_with_sums), which
/// leaves dz, dgamma and dbeta: dx, and the residual's gradient. It needs a GPU's launch shapes.
///
/// Traffic in training, in 16 bits: 6 bytes per element; another 2 (4 to accumulate) for the gradient of a residual.
///
/// # Errors
/// [`Error::Argument`] in the CPU's launch shape; [`Error::Length`] and [`Error::OtherDevice`].
pub fn backward_from_sums<S: Compute>(
    shape: BatchNormShape,
    mode: Mode,
    summed: Summed<'_, S>,
    mut dx: SliceMut<'_, S>,
    residual: Option<ResidualGradient<'_, S>>,
) -> Result<()> {
    let Summed { x, dz, gamma, mean, inv_std, dgamma, dbeta } = summed;
    let device = x.device();
    let check = ShapeCheck::new("batch_norm::backward_from_sums", device, shape);
    if !device.is_simt() {
        return check.check.refuse(format!("no convolution leaves sums on {}", device.name()));
    }
    let activation = Activation::Identity;
    let (upstream, mask) = check.backward(&Backward { x, dy: dz, gamma, mean, inv_std, activation })?;
    check.full("dx", dx.view())?;
    check.channels("dgamma", dgamma)?;
    check.channels("dbeta", dbeta)?;
    let (residual, residual_mode) = check.residual(residual, mask)?;
    let inputs = InputArgs {
        upstream,
        dgamma: dgamma.address(),
        dbeta: dbeta.address(),
        dx: dx.address(),
        residual,
        rows: BatchNormRows::default(),
        mask,
        train: (mode == Mode::Train).into(),
        accumulate: (residual_mode == RESIDUAL_ACCUMULATE).into(),
    };
    launch_input::<S>(device, shape, inputs)
}

/// The tangent of [`forward_train`] or [`forward_eval`]: with `scale = gamma · inv_std` and primes for tangents, `y' =
/// scale' · (x − mean) + scale · (x' − mean') + beta' + residual'` where the activation passed and 0 elsewhere. In
/// training `mean' = Σx' / m` and `inv_std' = −inv_std³ · Σ x' · (x − mean) / m`; in evaluation both are zero. `saved`
/// receives them, for [`backward_tangent`]. `workspace` is as in [`forward_train`], also in evaluation.
///
/// Traffic, f32: 12 bytes per element, 8 more in training, 4 more each for a mask that is read from y and for a
/// residual.
///
/// # Errors
/// As [`backward`].
pub fn forward_tangent<S: Compute>(
    shape: BatchNormShape,
    mode: Mode,
    input: Normalized<'_, S>,
    tangents: ForwardTangents<'_, S>,
    mut y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
    workspace: &mut Workspace,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::forward_tangent", device, shape);
    let Normalized { x, gamma, mean, inv_std, activation } = input;
    // The kernels read no upstream gradient. For the sums, the tangent of x takes its place.
    let (upstream, mask) = check.backward(&Backward { x, dy: tangents.x, gamma, mean, inv_std, activation })?;
    check.channels("gamma'", tangents.gamma)?;
    check.channels("beta'", tangents.beta)?;
    if let Some(residual) = tangents.residual {
        check.full("residual'", residual)?;
        check.no_residual(mask)?;
    }
    check.full("y'", y.view())?;
    check.channels("mean'", saved.mean.view())?;
    check.channels("inv_std'", saved.inv_std.view())?;
    let SumsAddresses { dz, dz_x, .. } = check.sums(workspace)?;
    match mode {
        Mode::Train => {
            let addresses = [upstream.x, upstream.dy, upstream.mean];
            let RowLaunch { launch, rows } = RowLaunch::new::<S>(device, shape, PER_SUMMING_THREAD, &addresses);
            let sums = BatchNormSumsArgs {
                upstream,
                tangent: UpstreamTangent::default(),
                residual: 0,
                dz,
                dz_x,
                rows,
                mask: MASK_NONE,
                residual_mode: RESIDUAL_NONE,
                dgamma: 0,
                dbeta: 0,
                tickets: 0,
                group: 0,
            };
            let statistics = StatisticsTangentArgs {
                x: sums.dz,
                x_x: sums.dz_x,
                inv_std: upstream.inv_std,
                mean_tangent: saved.mean.address(),
                inv_std_tangent: saved.inv_std.address(),
                inverse: rows.inverse,
                channels: rows.channels,
                blocks: launch.grid[0],
            };
            // SAFETY: every length is checked above, and the workspace has room for all row blocks of the first launch.
            unsafe {
                device.launch(S::choose(id::BATCH_NORM_SUMS), launch, &sums)?;
                let kernel =
                    pick::<S::Master, _>(id::BATCH_NORM_STATISTICS_TANGENT_F32, id::BATCH_NORM_STATISTICS_TANGENT_F64);
                device.launch(kernel, channel_launch(device, shape.channels), &statistics)?;
            }
        }
        Mode::Eval => {
            saved.mean.clear()?;
            saved.inv_std.clear()?;
        }
    }
    let tangent = UpstreamTangent {
        x: tangents.x.address(),
        dy: 0,
        gamma: tangents.gamma.address(),
        mean: saved.mean.address(),
        inv_std: saved.inv_std.address(),
    };
    let mut args = NormalizeTangentArgs {
        upstream: Upstream { dy: 0, ..upstream },
        tangent,
        beta_tangent: tangents.beta.address(),
        residual_tangent: address(tangents.residual),
        y_tangent: y.address(),
        rows: BatchNormRows::default(),
        mask,
    };
    let others = args.beta_tangent | args.residual_tangent | args.y_tangent;
    let addresses = [args.upstream.bits(), tangent.bits(), others];
    let RowLaunch { launch, rows } = RowLaunch::new::<S>(device, shape, PER_THREAD, &addresses);
    args.rows = rows;
    let kernel = S::choose(id::BATCH_NORM_NORMALIZE_TANGENT);
    // SAFETY: every length is checked above.
    unsafe { device.launch(kernel, launch, &args) }
}

/// The tangent of [`backward`], with the same `input` and `mode`: `gradients` and `residual` receive the tangents of
/// its outputs. With `scale` as in [`forward_tangent`], `dz' = dy'` where the activation passed and 0 elsewhere (a relu
/// has no second derivative), and `slope = inv_std · dgamma / m`:
///
/// ```text
/// dbeta'  = Σ dz'
/// dgamma' = inv_std · Σ (dz' · (x − mean) + dz · (x' − mean')) + inv_std' · dgamma / inv_std
/// dx'     = scale' · (dz − dbeta/m) + scale · (dz' − dbeta'/m)
///           − (scale · slope)' · (x − mean) − scale · slope · (x' − mean')
/// ```
///
/// In evaluation, `dx' = scale' · dz + scale · dz'`. These are the derivatives of [`backward`]'s formulas along the
/// tangents. `workspace` is as in [`forward_train`], also in evaluation.
///
/// Traffic in training, f32: 36 bytes per element; 44 if the mask is read from y; another 4 (8 to accumulate) for the
/// gradient of a residual.
///
/// # Errors
/// As [`backward`].
pub fn backward_tangent<S: Compute>(
    shape: BatchNormShape,
    mode: Mode,
    input: Backward<'_, S>,
    tangents: BackwardTangents<'_, S>,
    mut gradients: Gradients<'_, S>,
    residual: Option<ResidualGradient<'_, S>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let device = input.x.device();
    let check = ShapeCheck::new("batch_norm::backward_tangent", device, shape);
    let (upstream, mask) = check.backward(&input)?;
    check.full("x'", tangents.x)?;
    check.full("dy'", tangents.dy)?;
    check.channels("gamma'", tangents.gamma)?;
    check.channels("mean'", tangents.mean)?;
    check.channels("inv_std'", tangents.inv_std)?;
    check.channels("dgamma", tangents.dgamma)?;
    check.channels("dbeta", tangents.dbeta)?;
    check.full("dx'", gradients.dx.view())?;
    check.channels("dgamma'", gradients.dgamma.view())?;
    check.channels("dbeta'", gradients.dbeta.view())?;
    let SumsAddresses { dz, dz_x, .. } = check.sums(workspace)?;
    let (residual, residual_mode) = check.residual(residual, mask)?;
    let tangent = UpstreamTangent {
        x: tangents.x.address(),
        dy: tangents.dy.address(),
        gamma: tangents.gamma.address(),
        mean: tangents.mean.address(),
        inv_std: tangents.inv_std.address(),
    };
    let addresses = [upstream.bits(), tangent.bits(), residual];
    let summing = RowLaunch::new::<S>(device, shape, PER_SUMMING_THREAD, &addresses);
    let sums = BatchNormSumsArgs {
        upstream,
        tangent,
        residual,
        dz,
        dz_x,
        rows: summing.rows,
        mask,
        residual_mode,
        dgamma: 0,
        dbeta: 0,
        tickets: 0,
        group: 0,
    };
    let parameters = ParametersTangentArgs {
        dz: sums.dz,
        dz_x: sums.dz_x,
        inv_std: upstream.inv_std,
        inv_std_tangent: tangent.inv_std,
        dgamma: tangents.dgamma.address(),
        dgamma_tangent: gradients.dgamma.address(),
        dbeta_tangent: gradients.dbeta.address(),
        channels: shape.channels as u32,
        blocks: summing.launch.grid[0],
    };
    let mut inputs = InputTangentArgs {
        upstream,
        tangent,
        dgamma: parameters.dgamma,
        dbeta: tangents.dbeta.address(),
        dgamma_tangent: parameters.dgamma_tangent,
        dbeta_tangent: parameters.dbeta_tangent,
        dx_tangent: gradients.dx.address(),
        rows: BatchNormRows::default(),
        mask,
        train: (mode == Mode::Train).into(),
    };
    let others = inputs.dgamma | inputs.dbeta | inputs.dgamma_tangent | inputs.dbeta_tangent | inputs.dx_tangent;
    let RowLaunch { launch, rows } =
        RowLaunch::new::<S>(device, shape, PER_THREAD, &[upstream.bits(), tangent.bits(), others]);
    inputs.rows = rows;
    // SAFETY: every length is checked above, and the workspace has room for all row blocks of the first launch.
    unsafe {
        let kernel = S::choose(id::BATCH_NORM_SUMS_TANGENT);
        device.launch(kernel, summing.launch, &sums)?;
        let kernel = pick::<S::Master, _>(id::BATCH_NORM_PARAMETERS_TANGENT_F32, id::BATCH_NORM_PARAMETERS_TANGENT_F64);
        device.launch(kernel, channel_launch(device, shape.channels), &parameters)?;
        let kernel = S::choose(id::BATCH_NORM_INPUT_TANGENT);
        device.launch(kernel, launch, &inputs)
    }
}
