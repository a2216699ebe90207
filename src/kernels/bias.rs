//! The bias of a linear layer over tokens or pixels, fused with the GELU or the addition of a residual that follows it,
//! and sums over the rows of a matrix: `kernels/bias.cu`.
//!
//! `gelu(z) = z Φ(z)` with the distribution function Φ of the standard normal distribution (Hendrycks and Gimpel 2016;
//! PyTorch's default). Its relative error in f32 is below 1e-6.

use super::layers::elements;
use super::{Check, pick};
use crate::device::arguments::{BiasArgs, BiasCurveArgs, BiasSlopeArgs, ColumnSumsArgs, SumPiecesArgs};
use crate::device::constants::BLOCK_THREADS;
use crate::device::{Compute, Device, Launch, Result, Scalar, Slice, SliceMut, id};

#[cfg(doc)]
use crate::device::Error;

/// The shape of the activations: rows (samples times tokens or pixels) and channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsShape {
    /// Samples times tokens or pixels.
    pub rows: usize,
    /// The innermost dimension.
    pub channels: usize,
}

impl RowsShape {
    /// The number of elements, if there are some and fewer than 2^32.
    pub(super) fn len(self, check: Check<'_>) -> Result<usize> {
        let len = elements(check.operation, &[self.rows, self.channels])?;
        if len == 0 { check.refuse(format!("expected rows and channels, found {self:?}")) } else { Ok(len) }
    }

    /// Into how many pieces the rows are split for sums over them. It depends on the shape alone.
    fn pieces(self) -> usize {
        self.rows.div_ceil(256).clamp(1, 64)
    }

    /// Elements of the scratch for `sums` sums over the rows.
    pub fn scratch_len(self, sums: usize) -> usize {
        self.pieces() * sums * self.channels
    }

    /// The launch of the first stage of a sum over the rows.
    pub(super) fn sum_launch(self, device: &Device) -> Launch {
        let pieces = self.pieces() as u32;
        if device.is_simt() {
            let columns = self.channels.div_ceil(32) as u32;
            return Launch { grid: [columns, pieces, 1], ..Launch::new(1, BLOCK_THREADS as u32) };
        }
        Launch { grid: [1, pieces, 1], ..Launch::new(1, 1) }
    }

    /// The second stage: the sums of the pieces, of one sum per channel or of two; none where it is not asked for.
    pub(super) fn sum_pieces<T: Scalar, const N: usize>(
        self,
        check: Check<'_>,
        partials: Slice<'_, T>,
        mut sums: [Option<SliceMut<'_, T>>; N],
    ) -> Result<()> {
        sums.iter().flatten().try_for_each(|sums| check.argument("sums", sums.view(), self.channels))?;
        let mut address = |k: usize| sums.get_mut(k).and_then(Option::as_mut).map_or(0, SliceMut::address);
        let args = SumPiecesArgs {
            partials: partials.address(),
            first: address(0),
            second: address(1),
            pieces: self.pieces() as u32,
            outputs: N as u32,
            columns: self.channels as u32,
        };
        let launch = check.device.elementwise(N * self.channels, 1);
        // SAFETY: `partials` holds N sums of every piece and channel, and the outputs have one element per channel.
        unsafe { check.device.launch(pick::<T, _>(id::SUM_PIECES_F32, id::SUM_PIECES_F64), launch, &args) }
    }
}

/// What follows a bias.
#[derive(Clone, Copy)]
pub enum Then<'a, S: Compute> {
    /// Nothing.
    Nothing,
    /// The GELU.
    Gelu,
    /// The addition of this residual, `[rows, channels]`.
    Add(Slice<'a, S>),
}

/// `y = x + bias`, `gelu(x + bias)` or `x + bias + residual`, with x and y of shape `[rows, channels]` and the bias of
/// `[channels]`. Traffic: reads x (and the residual), writes y.
///
/// # Errors
/// [`Error::Argument`] for an empty shape or 2³² elements and more, [`Error::Length`] and [`Error::OtherDevice`].
pub fn bias<S: Compute>(
    shape: RowsShape,
    x: Slice<'_, S>,
    bias: Slice<'_, S::Master>,
    then: Then<'_, S>,
    mut y: SliceMut<'_, S>,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "bias::bias", device };
    let len = shape.len(check)?;
    check.argument("x", x, len)?;
    check.argument("bias", bias, shape.channels)?;
    check.argument("y", y.view(), len)?;
    let residual = match then {
        Then::Add(residual) => {
            check.argument("residual", residual, len)?;
            residual.address()
        }
        Then::Gelu | Then::Nothing => 0,
    };
    let args = BiasArgs {
        x: x.address(),
        bias: bias.address(),
        residual,
        y: y.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        gelu: matches!(then, Then::Gelu).into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::BIAS), device.elementwise(len, 4), &args) }
}

/// The tangent of [`bias`]: `y′ = gelu′(x + bias) (x′ + bias′)`, or `x′ + bias′ + residual′`. `gelu` holds x and the
/// bias if there is a GELU.
///
/// Traffic: reads x′ (with the GELU x, with a residual its tangent), writes y′.
///
/// # Errors
/// As [`bias`].
pub fn bias_tangent<S: Compute>(
    shape: RowsShape,
    gelu: Option<(Slice<'_, S>, Slice<'_, S::Master>)>,
    x_tangent: Slice<'_, S>,
    bias_tangent: Slice<'_, S::Master>,
    residual_tangent: Option<Slice<'_, S>>,
    y_tangent: SliceMut<'_, S>,
) -> Result<()> {
    let check = Check { operation: "bias::bias_tangent", device: x_tangent.device() };
    check.argument("bias_tangent", bias_tangent, shape.channels)?;
    let along = Along { from: x_tangent, bias_tangent: bias_tangent.address(), residual: residual_tangent };
    slope(check, shape, gelu, along, y_tangent, false)
}

/// The gradient of [`bias`] with a GELU with respect to x: `dx = gelu′(x + bias) dy`; written, or with `accumulate`
/// added. The gradient of the bias is the [sum](row_sums) of dx over the rows.
///
/// Traffic: reads x and dy, writes dx; accumulating reads dx too.
///
/// # Errors
/// As [`bias`].
pub fn gelu_backward<S: Compute>(
    shape: RowsShape,
    at: (Slice<'_, S>, Slice<'_, S::Master>),
    dy: Slice<'_, S>,
    dx: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let check = Check { operation: "bias::gelu_backward", device: dy.device() };
    slope(check, shape, Some(at), Along { from: dy, bias_tangent: 0, residual: None }, dx, accumulate)
}

/// What the derivative of a bias and a GELU is applied to.
struct Along<'a, S: Compute> {
    from: Slice<'a, S>,
    bias_tangent: u64,
    residual: Option<Slice<'a, S>>,
}

fn slope<S: Compute>(
    check: Check<'_>,
    shape: RowsShape,
    gelu: Option<(Slice<'_, S>, Slice<'_, S::Master>)>,
    along: Along<'_, S>,
    mut to: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let len = shape.len(check)?;
    if let Some((x, bias)) = gelu {
        check.argument("x", x, len)?;
        check.argument("bias", bias, shape.channels)?;
    }
    check.argument("from", along.from, len)?;
    check.argument("to", to.view(), len)?;
    along.residual.map_or(Ok(()), |residual| check.argument("residual", residual, len))?;
    let args = BiasSlopeArgs {
        x: gelu.map_or(0, |(x, _)| x.address()),
        bias: gelu.map_or(0, |(_, bias)| bias.address()),
        from: along.from.address(),
        bias_tangent: along.bias_tangent,
        residual: along.residual.map_or(0, |residual| residual.address()),
        to: to.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        gelu: gelu.is_some().into(),
        accumulate: accumulate.into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { check.device.launch(S::choose(id::BIAS_SLOPE), check.device.elementwise(len, 4), &args) }
}

/// The inputs of [`gelu_backward_tangent`], `[rows, channels]` and `[channels]`.
#[derive(Clone, Copy)]
pub struct GeluTangents<'a, S: Compute> {
    /// The forward's input, and its tangent.
    pub x: [Slice<'a, S>; 2],
    /// The bias, and its tangent.
    pub bias: [Slice<'a, S::Master>; 2],
    /// The gradient of the output, and its tangent.
    pub dy: [Slice<'a, S>; 2],
}

/// The tangent of the backward of [`bias`] with a GELU: `dx′ = gelu′(z) dy′ + gelu″(z) z′ dy` with `z = x + bias`;
/// written, or with `accumulate` added.
///
/// Traffic: reads x, x′, dy and dy′, writes dx′; accumulating reads dx′ too.
///
/// # Errors
/// As [`bias`].
pub fn gelu_backward_tangent<S: Compute>(
    shape: RowsShape,
    inputs: GeluTangents<'_, S>,
    mut dx_tangent: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = inputs.x[0].device();
    let check = Check { operation: "bias::gelu_backward_tangent", device };
    let len = shape.len(check)?;
    let GeluTangents { x, bias, dy } = inputs;
    x.iter().try_for_each(|x| check.argument("x", *x, len))?;
    bias.iter().try_for_each(|bias| check.argument("bias", *bias, shape.channels))?;
    dy.iter().try_for_each(|dy| check.argument("dy", *dy, len))?;
    check.argument("dx_tangent", dx_tangent.view(), len)?;
    let args = BiasCurveArgs {
        x: x[0].address(),
        bias: bias[0].address(),
        x_tangent: x[1].address(),
        bias_tangent: bias[1].address(),
        dy: dy[0].address(),
        dy_tangent: dy[1].address(),
        dx_tangent: dx_tangent.address(),
        rows: shape.rows as u32,
        channels: shape.channels as u32,
        accumulate: accumulate.into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::BIAS_CURVE), device.elementwise(len, 4), &args) }
}

/// `sums[c]` = the sum of `x[r, c]` over the rows. `scratch` has [`RowsShape::scratch_len`] elements of one sum. Rows
/// are summed in the master type in pieces of about 256, and the pieces in double.
///
/// Traffic: reads x.
///
/// # Errors
/// As [`bias`].
pub fn row_sums<S: Compute>(
    shape: RowsShape,
    x: Slice<'_, S>,
    mut scratch: SliceMut<'_, S::Master>,
    sums: SliceMut<'_, S::Master>,
) -> Result<()> {
    let device = x.device();
    let check = Check { operation: "bias::row_sums", device };
    check.argument("x", x, shape.len(check)?)?;
    check.argument("scratch", scratch.view(), shape.scratch_len(1))?;
    let args = ColumnSumsArgs {
        x: x.address(),
        partials: scratch.address(),
        rows: shape.rows as u32,
        columns: shape.channels as u32,
    };
    // SAFETY: the lengths are those of the shape, and the scratch holds a sum of every piece and channel.
    unsafe { device.launch(S::choose(id::COLUMN_SUMS), shape.sum_launch(device), &args)? };
    shape.sum_pieces(check, scratch.view(), [Some(sums)])
}
