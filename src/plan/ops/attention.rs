//! Multi-head self-attention, with the bias of the projection before it.

use super::{ExtraMemory, Operation, Site, place_of_dx};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute};
use crate::kernels::attention::{self, Attended, AttentionShape, Projected, Tangents};
use crate::kernels::bias::{self, RowsShape};
use crate::kernels::layers;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Shape, Value};
use crate::plan::memory_plan::master_len;
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands, Weights};

/// The logarithms of the normalisers, as a position in the kept memory. The tangents' arena keeps what the tangent of
/// the backward needs of each row there.
const NORMALISER: usize = 0;

/// `y = softmax(q kᵀ/√depth) v` for each head, with queries, keys and values in x, to which the bias is added.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Attention {
    x: Value,
    y: Value,
    bias: Parameter,
    shape: AttentionShape,
}

impl Graph {
    /// Multi-head self-attention over the pixels of x as tokens: `[N,H,W,3·C]`, queries, keys and values of `heads`
    /// heads, to `[N,H,W,C]`. Makes the parameter `bias`, of `[3·C]`, which is added to x first and starts uniform
    /// within `±1/√C`.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken, [`PlanError::Shape`] for channels that `3·heads`
    /// does not divide, and for heads of more than 64 numbers.
    pub fn attention(&mut self, x: Value, bias: &str, heads: usize) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let refused = |reason: String| PlanError::Shape { operation: "attention".into(), reason };
        if heads == 0 || !input.channels.is_multiple_of(3 * heads) {
            return Err(refused(format!(
                "{} channels are not queries, keys and values of {heads} heads",
                input.channels
            )));
        }
        let channels = input.channels / 3;
        let tokens = input.height * input.width;
        let shape = AttentionShape { batch: input.batch, tokens, heads, depth: channels / heads };
        shape.check().map_err(|error| refused(error.to_string()))?;
        let initial = Initial::Uniform { fan_in: channels };
        let bias = self.parameter(bias.into(), TensorKind::Bias(input.channels), initial)?;
        let y = self.value(Shape { channels, ..input });
        self.push(Attention { x, y, bias, shape });
        Ok(y)
    }
}

impl Attention {
    fn rows(&self) -> RowsShape {
        let AttentionShape { batch, tokens, heads, depth } = self.shape;
        RowsShape { rows: batch * tokens, channels: 3 * heads * depth }
    }

    fn projected<'a, S: Compute>(
        &self,
        values: &mut Operands<'a, S>,
        weights: &Weights<'a, S>,
    ) -> device::Result<Projected<'a, S>> {
        Ok(Projected { x: values.read(self.x)?, bias: weights.get(self.bias)? })
    }

    fn attended<'a, S: Compute>(&self, values: &mut Operands<'a, S>) -> device::Result<Attended<'a, S>> {
        let index = values.index();
        Ok(Attended { y: values.read(self.y)?, normaliser: values.kept(index, NORMALISER)? })
    }

    /// Ends of the parts of the scratch: two numbers per row of scores, sums over the rows, and the gradient of x where
    /// another operation has begun that.
    fn scratch<S: Compute>(&self, accumulate: bool) -> [usize; 3] {
        let rows = 2 * self.shape.rows();
        let sums = rows + self.rows().scratch_len(1);
        let dx = if accumulate { master_len::<S, S>(3 * self.shape.output_len()) } else { 0 };
        [rows, sums, sums + dx]
    }
}

impl Operation for Attention {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.bias), None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.x), Some(self.y)]
    }

    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let [.., backward] = self.scratch::<S>(site.accumulate[0]);
        ExtraMemory { kept: [self.shape.rows(), 0], backward, ..ExtraMemory::default() }
    }

    fn multiply_adds(&self) -> u64 {
        self.shape.macs()
    }

    /// The gradient of the bias is summed from that of x.
    fn always_writes_input_gradient(&self) -> bool {
        true
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let x = self.projected(&mut pass.values, &pass.weights)?;
        let normaliser = pass.values.kept_mut(NORMALISER)?;
        attention::attention(&self.shape, x, pass.values.write(self.y)?, normaliser)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let x = self.projected(&mut pass.values, &pass.weights)?;
        let (attended, dy) = (self.attended(&mut pass.values)?, pass.values.gradient(self.y)?);
        let [rows, sums, end] = self.scratch::<S>(pass.values.accumulates(0));
        let mut scratch = pass.values.backward_scratch()?;
        let mut scratch = scratch.disjoint();
        let (dots, partials) = (scratch.write(0..rows / 2)?, scratch.write(rows..sums)?);
        let (mut dx, total) = place_of_dx(self.x, &mut pass.values, scratch.write(sums..end)?)?;
        attention::backward(&self.shape, x, attended, dy, dots, dx.reborrow(), false)?;
        if let Some(gradients) = &mut pass.gradients
            && let Some(sum) = gradients.get(self.bias)?
        {
            bias::row_sums(self.rows(), dx.view(), partials, sum)?;
        }
        total.map_or(Ok(()), |total| layers::add_to(dx.view(), total))
    }

    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let x = self.projected(&mut pass.values, &pass.weights)?;
        let x_tangent = self.projected(&mut pass.tangents, &pass.direction)?;
        let attended = self.attended(&mut pass.values)?;
        let moved = pass.tangents.kept_mut(NORMALISER)?;
        attention::attention_tangent(&self.shape, x, attended, x_tangent, pass.tangents.write(self.y)?, moved)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let x = self.projected(&mut pass.values, &pass.weights)?;
        let (attended, index) = (self.attended(&mut pass.values)?, pass.values.index());
        let tangents = Tangents {
            x: self.projected(&mut pass.tangents, &pass.direction)?,
            y: pass.tangents.read(self.y)?,
            moved: pass.tangents.kept(index, NORMALISER)?,
            dy: [pass.values.gradient(self.y)?, pass.tangents.gradient(self.y)?],
        };
        let [rows, sums, end] = self.scratch::<S>(pass.tangents.accumulates(0));
        let mut scratch = pass.tangents.backward_scratch()?;
        let mut scratch = scratch.disjoint();
        let (dots, partials) = (scratch.write(0..rows)?, scratch.write(rows..sums)?);
        let (mut dx, total) = place_of_dx(self.x, &mut pass.tangents, scratch.write(sums..end)?)?;
        attention::backward_tangent(&self.shape, x, attended, tangents, dots, dx.reborrow(), false)?;
        if let Some(sum) = pass.product.get(self.bias)? {
            bias::row_sums(self.rows(), dx.view(), partials, sum)?;
        }
        total.map_or(Ok(()), |total| layers::add_to(dx.view(), total))
    }
}
