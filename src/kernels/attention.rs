//! Multi-head self-attention over short sequences of tokens, fused: forward, gradient and the tangents of both:
//! `kernels/attention.cu`.
//!
//! The matrix of scores never reaches memory: the forward works tile by tile with a running maximum and keeps the
//! logarithm of each row's normaliser, and the backward recomputes the probabilities (Dao et al. 2022). A forward does
//! `2 batch heads tokens² depth` multiply-adds, the backward seven products of that kind instead of four, because there
//! are no atomics: dq, and dk with dv, are computed by different blocks. The order of all sums depends on the shape
//! alone.

use super::Check;
use super::layers::elements;
use crate::device::arguments::{
    self, AttentionArgs, AttentionBackwardArgs, AttentionBackwardTangentArgs, AttentionDotsArgs, AttentionTangentArgs,
};
use crate::device::constants::{
    ATTENTION_DEPTH, ATTENTION_HOST_TILE, ATTENTION_ROW, ATTENTION_THREADS, ATTENTION_TILE,
};
use crate::device::{Compute, Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};

/// The shape of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Numbers of a head: at most 64.
    pub depth: usize,
}

impl AttentionShape {
    /// Elements of the output, `[batch, tokens, heads, depth]`.
    pub fn output_len(&self) -> usize {
        self.batch * self.tokens * self.heads * self.depth
    }

    /// Rows of scores: one per sample, head and token.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.tokens
    }

    /// Multiply-adds of the forward.
    pub fn macs(&self) -> u64 {
        2 * self.rows() as u64 * (self.tokens * self.depth) as u64
    }

    /// Fails unless the kernels can work with this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] for an extent of zero, a head of more than 64 numbers, and tensors of 2³² elements and more.
    pub fn check(&self) -> Result<()> {
        const OPERATION: &str = "AttentionShape";
        let Self { batch, tokens, heads, depth } = *self;
        if [batch, tokens, heads, depth].contains(&0) || depth > ATTENTION_DEPTH {
            let message = format!("expected extents of at least 1 and heads of at most {ATTENTION_DEPTH}: {self:?}");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        elements(OPERATION, &[batch, tokens, heads, depth, 3]).map(|_| ())
    }

    fn argument(&self) -> arguments::AttentionShape {
        arguments::AttentionShape {
            batch: self.batch as u32,
            tokens: self.tokens as u32,
            heads: self.heads as u32,
            depth: self.depth as u32,
        }
    }

    /// `1/√depth`
    fn scale(&self) -> f64 {
        1.0 / (self.depth as f64).sqrt()
    }

    /// A launch of `each` blocks per tile of a head, with shared memory for so many tiles of rows and of scores.
    fn launch<T: Scalar>(&self, device: &Device, each: usize, rows: usize, scores: usize) -> Launch {
        let host = !device.is_simt();
        let tile = if host { ATTENTION_HOST_TILE } else { ATTENTION_TILE };
        let scores_row = if host { tile } else { tile + 1 };
        // Two numbers per row, and on the CPU a transposed tile.
        let further = 2 * tile + if host { tile * ATTENTION_DEPTH } else { 0 };
        let elements = rows * tile * ATTENTION_ROW + scores * tile * scores_row + further;
        let blocks = self.batch * self.heads * self.tokens.div_ceil(tile) * each;
        let (blocks, threads): (usize, usize) =
            if host { (blocks.min(64), 1) } else { (blocks.min(1 << 30), ATTENTION_THREADS) };
        Launch::new(blocks as u32, threads as u32).with_shared(elements * size_of::<T>())
    }
}

/// Queries, keys and values `[batch, tokens, 3, heads, depth]`, and the bias `[3, heads, depth]` that is added to them;
/// or the tangents of both.
#[derive(Clone, Copy)]
pub struct Projected<'a, S: Compute> {
    /// Without the bias.
    pub x: Slice<'a, S>,
    /// Of the master type.
    pub bias: Slice<'a, S::Master>,
}

impl<S: Compute> Projected<'_, S> {
    fn argument(&self, check: Check<'_>, shape: &AttentionShape) -> Result<arguments::Projected> {
        check.argument("x", self.x, 3 * shape.output_len())?;
        check.argument("bias", self.bias, 3 * shape.heads * shape.depth)?;
        Ok(arguments::Projected { p: self.x.address(), bias: self.bias.address() })
    }
}

/// What the forward has left: its output, and the logarithm of the normaliser of each [row](AttentionShape::rows).
#[derive(Clone, Copy)]
pub struct Attended<'a, S: Compute> {
    /// `[batch, tokens, heads, depth]`
    pub y: Slice<'a, S>,
    /// `[batch, heads, tokens]`
    pub normaliser: Slice<'a, S::Master>,
}

impl<S: Compute> Attended<'_, S> {
    fn check(&self, check: Check<'_>, shape: &AttentionShape) -> Result<()> {
        check.argument("y", self.y, shape.output_len())?;
        check.argument("normaliser", self.normaliser, shape.rows())
    }
}

/// `y = softmax(q kᵀ/√depth) v` for each sample and head, and the logarithm of each row's normaliser. Traffic: reads x
/// (k and v once per tile of queries), writes y and one number per row.
///
/// # Errors
/// Those of [`AttentionShape::check`], [`Error::Length`] and [`Error::OtherDevice`].
pub fn attention<S: Compute>(
    shape: &AttentionShape,
    x: Projected<'_, S>,
    mut y: SliceMut<'_, S>,
    mut normaliser: SliceMut<'_, S::Master>,
) -> Result<()> {
    shape.check()?;
    let device = x.x.device();
    let check = Check { operation: "attention::attention", device };
    Attended { y: y.view(), normaliser: normaliser.view() }.check(check, shape)?;
    let args = AttentionArgs {
        x: x.argument(check, shape)?,
        y: y.address(),
        normaliser: normaliser.address(),
        shape: shape.argument(),
        scale: shape.scale(),
    };
    // SAFETY: the lengths are those of the shape, and the shared memory holds what the kernel takes from it.
    unsafe { device.launch(S::choose(id::ATTENTION), shape.launch::<S::Master>(device, 1, 3, 1), &args) }
}

/// The tangent of [`attention`]. `moved`, one number per row, receives `Σ p s′` for the tangent of the backward.
/// Traffic: reads x, x′ and y, writes y′.
///
/// # Errors
/// As [`attention`].
pub fn attention_tangent<S: Compute>(
    shape: &AttentionShape,
    x: Projected<'_, S>,
    attended: Attended<'_, S>,
    x_tangent: Projected<'_, S>,
    mut y_tangent: SliceMut<'_, S>,
    mut moved: SliceMut<'_, S::Master>,
) -> Result<()> {
    shape.check()?;
    let device = x.x.device();
    let check = Check { operation: "attention::attention_tangent", device };
    attended.check(check, shape)?;
    check.argument("y_tangent", y_tangent.view(), shape.output_len())?;
    check.argument("moved", moved.view(), shape.rows())?;
    let args = AttentionTangentArgs {
        x: x.argument(check, shape)?,
        x_tangent: x_tangent.argument(check, shape)?,
        y: attended.y.address(),
        normaliser: attended.normaliser.address(),
        y_tangent: y_tangent.address(),
        moved: moved.address(),
        shape: shape.argument(),
        scale: shape.scale(),
    };
    // SAFETY: as in `attention`.
    unsafe { device.launch(S::choose(id::ATTENTION_TANGENT), shape.launch::<S::Master>(device, 1, 5, 2), &args) }
}

/// The gradient of [`attention`] with respect to queries, keys and values; written, or with `accumulate` added. The
/// gradient of the bias is its sum over the rows ([`bias::row_sums`](super::bias::row_sums)). `scratch` has one element
/// per row. Traffic: reads x, y and dy, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`attention`].
pub fn backward<S: Compute>(
    shape: &AttentionShape,
    x: Projected<'_, S>,
    attended: Attended<'_, S>,
    dy: Slice<'_, S>,
    mut scratch: SliceMut<'_, S::Master>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    shape.check()?;
    let device = x.x.device();
    let check = Check { operation: "attention::backward", device };
    attended.check(check, shape)?;
    check.argument("dy", dy, shape.output_len())?;
    check.argument("scratch", scratch.view(), shape.rows())?;
    check.argument("dx", dx.view(), 3 * shape.output_len())?;
    dots(shape, attended.y, dy, None, scratch.reborrow())?;
    let args = AttentionBackwardArgs {
        x: x.argument(check, shape)?,
        normaliser: attended.normaliser.address(),
        dy: dy.address(),
        dots: scratch.address(),
        dx: dx.address(),
        shape: shape.argument(),
        accumulate: accumulate.into(),
        scale: shape.scale(),
    };
    // SAFETY: as in `attention`.
    unsafe { device.launch(S::choose(id::ATTENTION_BACKWARD), shape.launch::<S::Master>(device, 2, 5, 2), &args) }
}

/// The products `dy y` of each row, and with tangents (y′, dy′) behind them also those of `dy′ y + dy y′`. The caller
/// has checked the lengths.
fn dots<S: Compute>(
    shape: &AttentionShape,
    y: Slice<'_, S>,
    dy: Slice<'_, S>,
    tangents: Option<[Slice<'_, S>; 2]>,
    mut dots: SliceMut<'_, S::Master>,
) -> Result<()> {
    let device = y.device();
    let rows = shape.rows();
    let behind = dots.address() + (rows * size_of::<S::Master>()) as u64;
    let args = AttentionDotsArgs {
        y: y.address(),
        dy: dy.address(),
        y_tangent: tangents.map_or(0, |[y, _]| y.address()),
        dy_tangent: tangents.map_or(0, |[_, dy]| dy.address()),
        dots: dots.address(),
        dots_tangent: if tangents.is_some() { behind } else { 0 },
        shape: shape.argument(),
    };
    let launch = device.elementwise(if device.is_simt() { rows } else { shape.output_len() }, 1);
    // SAFETY: `dots` has a number for each row, and with tangents two.
    unsafe { device.launch(S::choose(id::ATTENTION_DOTS), launch, &args) }
}

/// What the tangent of the backward reads besides the values.
#[derive(Clone, Copy)]
pub struct Tangents<'a, S: Compute> {
    /// Of queries, keys and values.
    pub x: Projected<'a, S>,
    /// Of the output.
    pub y: Slice<'a, S>,
    /// What [`attention_tangent`] has left.
    pub moved: Slice<'a, S::Master>,
    /// The gradient of the output, and its tangent.
    pub dy: [Slice<'a, S>; 2],
}

/// The tangent of [`backward`]; written, or with `accumulate` added. `scratch` has two elements per row. Traffic: reads
/// x, x′, y, y′, dy and dy′, writes dx′.
///
/// # Errors
/// As [`attention`].
pub fn backward_tangent<S: Compute>(
    shape: &AttentionShape,
    x: Projected<'_, S>,
    attended: Attended<'_, S>,
    tangents: Tangents<'_, S>,
    mut scratch: SliceMut<'_, S::Master>,
    mut dx_tangent: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    shape.check()?;
    let device = x.x.device();
    let check = Check { operation: "attention::backward_tangent", device };
    attended.check(check, shape)?;
    check.argument("y_tangent", tangents.y, shape.output_len())?;
    check.argument("moved", tangents.moved, shape.rows())?;
    tangents.dy.iter().try_for_each(|dy| check.argument("dy", *dy, shape.output_len()))?;
    check.argument("scratch", scratch.view(), 2 * shape.rows())?;
    check.argument("dx_tangent", dx_tangent.view(), 3 * shape.output_len())?;
    let [dy, dy_tangent] = tangents.dy;
    dots(shape, attended.y, dy, Some([tangents.y, dy_tangent]), scratch.reborrow())?;
    let args = AttentionBackwardTangentArgs {
        x: x.argument(check, shape)?,
        x_tangent: tangents.x.argument(check, shape)?,
        normaliser: attended.normaliser.address(),
        moved: tangents.moved.address(),
        dy: dy.address(),
        dy_tangent: dy_tangent.address(),
        dots: scratch.address(),
        dots_tangent: scratch.address() + (shape.rows() * size_of::<S::Master>()) as u64,
        dx_tangent: dx_tangent.address(),
        shape: shape.argument(),
        accumulate: accumulate.into(),
        scale: shape.scale(),
    };
    let launch = shape.launch::<S::Master>(device, 2, 8, 4);
    // SAFETY: as in `attention`.
    unsafe { device.launch(S::choose(id::ATTENTION_BACKWARD_TANGENT), launch, &args) }
}
