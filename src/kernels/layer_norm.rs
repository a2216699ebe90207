//! Layer normalisation (Ba, Kiros and Hinton 2016) of the rows of activations `[rows, channels]`, with its gradients
//! and tangents: `kernels/layer_norm.cu`.
//!
//! `y = gamma · (x − mean) · inv_std + beta` with the mean of each row and `inv_std = 1/√(var + eps)`, `var` the biased
//! variance, from two passes over the row. All sums are in the master type.

use super::Check;
use super::bias::RowsShape;
use crate::device::arguments::{
    LayerNormArgs, LayerNormBackwardArgs, LayerNormBackwardTangentArgs, LayerNormParametersArgs,
    LayerNormParametersTangentArgs, LayerNormTangentArgs,
};
use crate::device::{Compute, Device, Launch, Result, Scalar, Slice, SliceMut, id};

#[cfg(doc)]
use crate::device::Error;

/// A warp per row on a GPU.
fn launch(device: &Device, shape: RowsShape) -> Launch {
    device.elementwise(if device.is_simt() { shape.rows * 32 } else { shape.rows * shape.channels }, 1)
}

/// What the forward leaves for the backward, `[rows]` each; or its tangents: `mean(x′)` and `mean(n x′)` with
/// `n = (x − mean) inv_std`.
pub struct Saved<'a, T: Scalar> {
    /// The mean that was subtracted.
    pub mean: SliceMut<'a, T>,
    /// `1 / √(var + eps)`
    pub inv_std: SliceMut<'a, T>,
}

/// The forward's input, the scale, and what the forward has left.
#[derive(Clone, Copy)]
pub struct Normalized<'a, S: Compute> {
    /// `[rows, channels]`
    pub x: Slice<'a, S>,
    /// Scale, `[channels]`.
    pub gamma: Slice<'a, S::Master>,
    /// `[rows]`
    pub mean: Slice<'a, S::Master>,
    /// `[rows]`
    pub inv_std: Slice<'a, S::Master>,
}

impl<S: Compute> Normalized<'_, S> {
    fn check(&self, check: Check<'_>, shape: RowsShape) -> Result<usize> {
        let len = shape.len(check)?;
        check.argument("x", self.x, len)?;
        check.argument("gamma", self.gamma, shape.channels)?;
        check.argument("mean", self.mean, shape.rows)?;
        check.argument("inv_std", self.inv_std, shape.rows)?;
        Ok(len)
    }
}

/// Normalises the rows of x. `parameters` are gamma and beta.
///
/// Traffic: reads x, writes y and two numbers per row; the caches serve the other two passes over a row.
///
/// # Errors
/// [`Error::Argument`] for an empty shape or 2³² elements and more, [`Error::Length`] and [`Error::OtherDevice`].
pub fn layer_norm<S: Compute>(
    shape: RowsShape,
    x: Slice<'_, S>,
    [gamma, beta]: [Slice<'_, S::Master>; 2],
    eps: f64,
    mut y: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "layer_norm::layer_norm", device };
    let normalized = Normalized { x, gamma, mean: saved.mean.view(), inv_std: saved.inv_std.view() };
    check.argument("y", y.view(), normalized.check(check, shape)?)?;
    check.argument("beta", beta, shape.channels)?;
    let args = LayerNormArgs {
        x: x.address(),
        gamma: gamma.address(),
        beta: beta.address(),
        y: y.address(),
        mean: saved.mean.address(),
        inv_std: saved.inv_std.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        eps,
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::LAYER_NORM), launch(device, shape), &args) }
}

/// The gradient with respect to x: `dx = inv_std (g − mean(g) − n mean(n g))` with `g = gamma dy`; written, or with
/// `accumulate` added. Traffic: reads x and dy, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`layer_norm`].
pub fn backward<S: Compute>(
    shape: RowsShape,
    normalized: Normalized<'_, S>,
    dy: Slice<'_, S>,
    mut dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layer_norm::backward", device };
    let len = normalized.check(check, shape)?;
    check.argument("dy", dy, len)?;
    check.argument("dx", dx.view(), len)?;
    let args = LayerNormBackwardArgs {
        x: normalized.x.address(),
        gamma: normalized.gamma.address(),
        mean: normalized.mean.address(),
        inv_std: normalized.inv_std.address(),
        dy: dy.address(),
        dx: dx.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        accumulate: accumulate.into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::LAYER_NORM_BACKWARD), launch(device, shape), &args) }
}

/// The gradients of the parameters that are asked for: `dgamma = Σ dy n` and `dbeta = Σ dy` over the rows. `scratch`
/// has [`RowsShape::scratch_len`] elements of two sums. Traffic: reads x and dy.
///
/// # Errors
/// As [`layer_norm`].
pub fn parameter_gradients<S: Compute>(
    shape: RowsShape,
    normalized: Normalized<'_, S>,
    dy: Slice<'_, S>,
    mut scratch: SliceMut<'_, S::Master>,
    gradients: [Option<SliceMut<'_, S::Master>>; 2],
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "layer_norm::parameter_gradients", device };
    check.argument("dy", dy, normalized.check(check, shape)?)?;
    check.argument("scratch", scratch.view(), shape.scratch_len(2))?;
    let args = LayerNormParametersArgs {
        x: normalized.x.address(),
        mean: normalized.mean.address(),
        inv_std: normalized.inv_std.address(),
        dy: dy.address(),
        partials: scratch.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
    };
    // SAFETY: the lengths are those of the shape, and the scratch holds two sums of every piece and channel.
    unsafe { device.launch(S::choose(id::LAYER_NORM_PARAMETERS), shape.sum_launch(device), &args)? };
    shape.sum_pieces(check, scratch.view(), gradients)
}

/// The tangent of [`layer_norm`]: `y′ = gamma n′ + gamma′ n + beta′`. `parameters` are gamma′ and beta′. Traffic: reads
/// x and x′, writes y′.
///
/// # Errors
/// As [`layer_norm`].
pub fn tangent<S: Compute>(
    shape: RowsShape,
    normalized: Normalized<'_, S>,
    x_tangent: Slice<'_, S>,
    [gamma_tangent, beta_tangent]: [Slice<'_, S::Master>; 2],
    mut y_tangent: SliceMut<'_, S>,
    mut saved: Saved<'_, S::Master>,
) -> Result<()> {
    let device = x_tangent.device();
    let check = Check { operation: "layer_norm::tangent", device };
    let len = normalized.check(check, shape)?;
    check.argument("x_tangent", x_tangent, len)?;
    check.argument("gamma_tangent", gamma_tangent, shape.channels)?;
    check.argument("beta_tangent", beta_tangent, shape.channels)?;
    check.argument("y_tangent", y_tangent.view(), len)?;
    check.argument("saved", saved.mean.view(), shape.rows)?;
    check.argument("saved", saved.inv_std.view(), shape.rows)?;
    let args = LayerNormTangentArgs {
        x: normalized.x.address(),
        gamma: normalized.gamma.address(),
        mean: normalized.mean.address(),
        inv_std: normalized.inv_std.address(),
        x_tangent: x_tangent.address(),
        gamma_tangent: gamma_tangent.address(),
        beta_tangent: beta_tangent.address(),
        y_tangent: y_tangent.address(),
        moved_mean: saved.mean.address(),
        moved_scale: saved.inv_std.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::LAYER_NORM_TANGENT), launch(device, shape), &args) }
}

/// What the tangents of the backward read besides [`Normalized`].
#[derive(Clone, Copy)]
pub struct Tangents<'a, S: Compute> {
    /// `[rows, channels]`
    pub x: Slice<'a, S>,
    /// `[channels]`
    pub gamma: Slice<'a, S::Master>,
    /// What [`tangent`] has left, `[rows]`.
    pub mean: Slice<'a, S::Master>,
    /// The same.
    pub inv_std: Slice<'a, S::Master>,
    /// The gradient of the output, and its tangent.
    pub dy: [Slice<'a, S>; 2],
}

impl<S: Compute> Tangents<'_, S> {
    fn check(&self, check: Check<'_>, shape: RowsShape, len: usize) -> Result<()> {
        check.argument("x_tangent", self.x, len)?;
        check.argument("gamma_tangent", self.gamma, shape.channels)?;
        check.argument("saved", self.mean, shape.rows)?;
        check.argument("saved", self.inv_std, shape.rows)?;
        self.dy.iter().try_for_each(|dy| check.argument("dy", *dy, len))
    }
}

/// The tangent of [`backward`]; written, or with `accumulate` added. Traffic: reads x, x′, dy and dy′, writes dx′.
///
/// # Errors
/// As [`layer_norm`].
pub fn backward_tangent<S: Compute>(
    shape: RowsShape,
    normalized: Normalized<'_, S>,
    tangents: Tangents<'_, S>,
    mut dx_tangent: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = tangents.x.device();
    let check = Check { operation: "layer_norm::backward_tangent", device };
    let len = normalized.check(check, shape)?;
    tangents.check(check, shape, len)?;
    check.argument("dx_tangent", dx_tangent.view(), len)?;
    let args = LayerNormBackwardTangentArgs {
        x: normalized.x.address(),
        gamma: normalized.gamma.address(),
        mean: normalized.mean.address(),
        inv_std: normalized.inv_std.address(),
        dy: tangents.dy[0].address(),
        x_tangent: tangents.x.address(),
        gamma_tangent: tangents.gamma.address(),
        moved_mean: tangents.mean.address(),
        moved_scale: tangents.inv_std.address(),
        dy_tangent: tangents.dy[1].address(),
        dx_tangent: dx_tangent.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        accumulate: accumulate.into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::LAYER_NORM_BACKWARD_TANGENT), launch(device, shape), &args) }
}

/// The tangents of [`parameter_gradients`]: `Σ (dy′ n + dy n′)` and `Σ dy′`. Traffic: reads x, x′, dy and dy′.
///
/// # Errors
/// As [`layer_norm`].
pub fn parameter_gradients_tangent<S: Compute>(
    shape: RowsShape,
    normalized: Normalized<'_, S>,
    tangents: Tangents<'_, S>,
    mut scratch: SliceMut<'_, S::Master>,
    gradients: [Option<SliceMut<'_, S::Master>>; 2],
) -> Result<()> {
    let device = tangents.x.device();
    let check = Check { operation: "layer_norm::parameter_gradients_tangent", device };
    let len = normalized.check(check, shape)?;
    tangents.check(check, shape, len)?;
    check.argument("scratch", scratch.view(), shape.scratch_len(2))?;
    let args = LayerNormParametersTangentArgs {
        x: normalized.x.address(),
        mean: normalized.mean.address(),
        inv_std: normalized.inv_std.address(),
        dy: tangents.dy[0].address(),
        x_tangent: tangents.x.address(),
        moved_mean: tangents.mean.address(),
        moved_scale: tangents.inv_std.address(),
        dy_tangent: tangents.dy[1].address(),
        partials: scratch.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
    };
    let kernel = S::choose(id::LAYER_NORM_PARAMETERS_TANGENT);
    // SAFETY: the lengths are those of the shape, and the scratch holds two sums of every piece and channel.
    unsafe { device.launch(kernel, shape.sum_launch(device), &args)? };
    shape.sum_pieces(check, scratch.view(), gradients)
}
