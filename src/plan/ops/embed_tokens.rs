//! The class token before the patches of an image, and the position embedding.

use super::{ExtraMemory, Operation, Site};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute, Slice, SliceMut};
use crate::kernels::bias::{self, RowsShape};
use crate::kernels::tokens::{self, TokensShape};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Shape, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};

/// `y[n, t] = positions[t] + (t = 0 ? token : x[n, t − 1])`, with the pixels of x as its tokens.
#[derive(Debug, Clone)]
pub(in crate::plan) struct EmbedTokens {
    x: Value,
    y: Value,
    token: Parameter,
    positions: Parameter,
    shape: TokensShape,
}

impl Graph {
    /// The pixels of x as tokens, a class token before them, and the embedding of their positions: `[N,H,W,C]` to
    /// `[N,1,1 + H·W,C]`. Makes the parameters `token`, of shape `[1, 1, C]` in files, and `positions`, of
    /// `[1, 1 + H·W, C]`. They start as in timm: normal with standard deviations 1e-6 and 0.02.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken.
    pub fn embed_tokens(&mut self, x: Value, token: &str, positions: &str) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let (tokens, channels) = (input.height * input.width + 1, input.channels);
        let normal = |std| Initial::Normal { std };
        let token = self.parameter(token.into(), TensorKind::Tokens { tokens: 1, channels }, normal(1e-6))?;
        let positions = self.parameter(positions.into(), TensorKind::Tokens { tokens, channels }, normal(0.02))?;
        let y = self.value(Shape { height: 1, width: tokens, ..input });
        let shape = TokensShape { batch: input.batch, tokens, channels };
        self.push(EmbedTokens { x, y, token, positions, shape });
        Ok(y)
    }
}

impl EmbedTokens {
    /// A sample as one row, over which the gradient of the positions is summed.
    fn rows(&self) -> RowsShape {
        RowsShape { rows: self.shape.batch, channels: self.shape.tokens * self.shape.channels }
    }

    /// The gradients of the parameters from that of y, or their tangents. The token's is that of the first position.
    fn sums<S: Compute>(
        &self,
        at: &mut Operands<'_, S>,
        dy: Slice<'_, S>,
        [token, positions]: [Option<SliceMut<'_, S::Master>>; 2],
    ) -> device::Result<()> {
        if token.is_none() && positions.is_none() {
            return Ok(());
        }
        let mut scratch = at.backward_scratch()?;
        let (mut scratch, rows) = (scratch.disjoint(), self.rows());
        let partials = rows.scratch_len(1);
        // The sums over all positions, where the positions are frozen and the token is not.
        let elsewhere = scratch.write(partials..partials + rows.channels)?;
        let mut sums = positions.unwrap_or(elsewhere);
        bias::row_sums(rows, dy, scratch.write(0..partials)?, sums.reborrow())?;
        token.map_or(Ok(()), |mut token| token.copy_from(sums.view().slice(0..self.shape.channels)?))
    }

    fn spread<S: Compute>(&self, at: &mut Operands<'_, S>, dy: Slice<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        tokens::embed_backward(self.shape, dy, dx, accumulate)
    }
}

impl Operation for EmbedTokens {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.token), Some(self.positions)]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [None, None]
    }

    fn memory<S: Compute>(&self, _: &Site<'_>) -> ExtraMemory {
        let rows = self.rows();
        ExtraMemory { backward: rows.scratch_len(1) + rows.channels, ..ExtraMemory::default() }
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let (token, positions) = (pass.weights.get(self.token)?, pass.weights.get(self.positions)?);
        let (x, y) = (pass.values.read(self.x)?, pass.values.write(self.y)?);
        tokens::embed(self.shape, x, token, positions, y)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let dy = pass.values.gradient(self.y)?;
        if let Some(gradients) = &mut pass.gradients {
            self.sums(&mut pass.values, dy, gradients.pair(self.token, self.positions)?)?;
        }
        self.spread(&mut pass.values, dy)
    }

    /// The operation is linear in x, token and positions together.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let (token, positions) = (pass.direction.get(self.token)?, pass.direction.get(self.positions)?);
        let (x, y) = (pass.tangents.read(self.x)?, pass.tangents.write(self.y)?);
        tokens::embed(self.shape, x, token, positions, y)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let dy = pass.tangents.gradient(self.y)?;
        self.sums(&mut pass.tangents, dy, pass.product.pair(self.token, self.positions)?)?;
        self.spread(&mut pass.tangents, dy)
    }
}
