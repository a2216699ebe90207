//! The linear layer, whose output is the logits.

use super::{ExtraMemory, Operation, Site};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute, Slice, SliceMut};
use crate::kernels::layers::{self, LinearShape};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Shape, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, ParameterGradients};

/// `y = x W + b`, with `x` of shape `[batch, inputs]`, `W` of `[inputs, outputs]` and `b` of `[outputs]`. Output and
/// parameters are of the master type.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Linear {
    x: Value,
    y: Value,
    weight: Parameter,
    bias: Parameter,
    shape: LinearShape,
}

impl Graph {
    /// x·W + b over all features of a sample: `[N,1,1,C]` to `[N,1,1,outputs]`. Makes `NAME.weight` and `NAME.bias`.
    /// Both start uniform within `±1/√C`, as in PyTorch.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken; [`PlanError::Shape`] for no output and for an input
    /// with more than one pixel, whose features files store in another order than the activation.
    pub fn linear(&mut self, x: Value, name: &str, outputs: usize) -> Result<Value, PlanError> {
        let input = self.shape(x);
        if input.height * input.width != 1 || outputs == 0 {
            let reason = format!("expected one pixel per sample and at least one output, found {input} and {outputs}");
            return Err(PlanError::Shape { operation: name.into(), reason });
        }
        let (inputs, initial) = (input.channels, Initial::Uniform { fan_in: input.channels });
        let weight = self.parameter(format!("{name}.weight"), TensorKind::Linear { inputs, outputs }, initial)?;
        let bias = self.parameter(format!("{name}.bias"), TensorKind::Bias(outputs), initial)?;
        let shape = LinearShape { batch: input.batch, inputs, outputs };
        let y = self.value(Shape { channels: outputs, ..input });
        self.push(Linear { x, y, weight, bias, shape });
        Ok(y)
    }
}

impl Linear {
    /// dW and db. The kernel always writes dW: where the weights are frozen and the bias is not, to the scratch.
    fn weight_gradient<S: Compute>(
        &self,
        x: Slice<'_, S>,
        dy: Slice<'_, S::Master>,
        gradients: &mut ParameterGradients<'_, S::Master>,
        scratch: SliceMut<'_, S::Master>,
    ) -> device::Result<()> {
        let [dw, db] = gradients.pair(self.weight, self.bias)?;
        match (dw, db) {
            (None, None) => Ok(()),
            (None, db) => layers::linear_weight_gradient(&self.shape, x, dy, scratch, db, false),
            (Some(dw), db) => layers::linear_weight_gradient(&self.shape, x, dy, dw, db, false),
        }
    }
}

impl Operation for Linear {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.weight), Some(self.bias)]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let bias_alone = site.places[self.weight].frozen && !site.places[self.bias].frozen;
        let backward = if bias_alone { self.shape.inputs * self.shape.outputs } else { 0 };
        ExtraMemory { backward, ..ExtraMemory::default() }
    }

    fn multiply_adds(&self) -> u64 {
        (self.shape.batch * self.shape.inputs * self.shape.outputs) as u64
    }

    fn has_wide_output(&self) -> bool {
        true
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let (weight, bias) = (pass.weights.get(self.weight)?, pass.weights.get(self.bias)?);
        let (x, y) = (pass.values.read(self.x)?, pass.values.write_wide(self.y)?);
        layers::linear(&self.shape, x, weight, Some(bias), y, false)
    }

    /// `dW = xᵀ dy`, `db = Σ dy` over the batch, `dx = dy Wᵀ`.
    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let dy = pass.values.gradient_wide(self.y)?;
        if let Some(gradients) = &mut pass.gradients {
            let (x, scratch) = (pass.values.read(self.x)?, pass.values.backward_scratch()?);
            self.weight_gradient(x, dy, gradients, scratch)?;
        }
        let Some((dx, accumulate)) = pass.values.input_gradient(0, self.x)? else { return Ok(()) };
        layers::linear_input_gradient(&self.shape, dy, pass.weights.get(self.weight)?, dx, accumulate)
    }

    /// With a dot for a tangent: `ẏ = ẋ W + ḃ + x Ẇ`.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let mut y = pass.tangents.write_wide(self.y)?;
        let (weight, bias) = (pass.weights.get(self.weight)?, pass.direction.get(self.bias)?);
        layers::linear(&self.shape, pass.tangents.read(self.x)?, weight, Some(bias), y.reborrow(), false)?;
        layers::linear(&self.shape, pass.values.read(self.x)?, pass.direction.get(self.weight)?, None, y, true)
    }

    /// With a dot for a tangent: `dẆ = xᵀ dẏ + ẋᵀ dy`, `dḃ = Σ dẏ`, `dẋ = dẏ Wᵀ + dy Ẇᵀ`.
    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let (dy, dy_tangent) = (pass.values.gradient_wide(self.y)?, pass.tangents.gradient_wide(self.y)?);
        let (x, x_tangent) = (pass.values.read(self.x)?, pass.tangents.read(self.x)?);
        self.weight_gradient(x, dy_tangent, &mut pass.product, pass.tangents.backward_scratch()?)?;
        if let Some(dw) = pass.product.get(self.weight)? {
            layers::linear_weight_gradient(&self.shape, x_tangent, dy, dw, None, true)?;
        }
        let Some((mut dx, accumulate)) = pass.tangents.input_gradient(0, self.x)? else { return Ok(()) };
        let (weight, weight_tangent) = (pass.weights.get(self.weight)?, pass.direction.get(self.weight)?);
        layers::linear_input_gradient(&self.shape, dy_tangent, weight, dx.reborrow(), accumulate)?;
        layers::linear_input_gradient(&self.shape, dy, weight_tangent, dx, true)
    }
}
