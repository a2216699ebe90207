//! Layer normalisation over the channels of every pixel or token.

use super::{ExtraMemory, Operation, Site};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute};
use crate::kernels::bias::RowsShape;
use crate::kernels::layer_norm::{self, Normalized, Saved, Tangents};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands, Weights};

/// What the forward keeps, as positions in its kept memory. The tangents' arena keeps their derivatives there.
const MEAN: usize = 0;
const INV_STD: usize = 1;

/// `y = γ (x − mean)/√(var + ε) + β` with mean and biased variance over the channels.
#[derive(Debug, Clone)]
pub(in crate::plan) struct LayerNorm {
    x: Value,
    y: Value,
    scale: Parameter,
    shift: Parameter,
    eps: f64,
    shape: RowsShape,
}

impl Graph {
    /// Normalises the channels of every pixel or token to mean 0 and variance 1, then scales and shifts them. Makes
    /// `NAME.weight`, which starts with ones, and `NAME.bias`, which starts with zeros. `eps` is added to the variance.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken.
    pub fn layer_norm(&mut self, x: Value, name: &str, eps: f64) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let channels = input.channels;
        let scale = self.parameter(format!("{name}.weight"), TensorKind::Scale(channels), Initial::Constant(1.0))?;
        let shift = self.parameter(format!("{name}.bias"), TensorKind::Shift(channels), Initial::Constant(0.0))?;
        let y = self.value(input);
        self.push(LayerNorm { x, y, scale, shift, eps, shape: RowsShape { rows: input.rows(), channels } });
        Ok(y)
    }
}

impl LayerNorm {
    fn normalized<'a, S: Compute>(
        &self,
        values: &mut Operands<'a, S>,
        weights: &Weights<'a, S>,
    ) -> device::Result<Normalized<'a, S>> {
        let index = values.index();
        Ok(Normalized {
            x: values.read(self.x)?,
            gamma: weights.get(self.scale)?,
            mean: values.kept(index, MEAN)?,
            inv_std: values.kept(index, INV_STD)?,
        })
    }
}

impl Operation for LayerNorm {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.scale), Some(self.shift)]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn memory<S: Compute>(&self, _: &Site<'_>) -> ExtraMemory {
        let kept = [self.shape.rows; 2];
        ExtraMemory { kept, backward: self.shape.scratch_len(2), ..ExtraMemory::default() }
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let saved = Saved { mean: pass.values.kept_mut(MEAN)?, inv_std: pass.values.kept_mut(INV_STD)? };
        let (x, y) = (pass.values.read(self.x)?, pass.values.write(self.y)?);
        let parameters = [pass.weights.get(self.scale)?, pass.weights.get(self.shift)?];
        layer_norm::layer_norm(self.shape, x, parameters, self.eps, y, saved)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let normalized = self.normalized(&mut pass.values, &pass.weights)?;
        let dy = pass.values.gradient(self.y)?;
        if let Some(gradients) = &mut pass.gradients {
            let scratch = pass.values.backward_scratch()?;
            let pair = gradients.pair(self.scale, self.shift)?;
            if pair.iter().any(Option::is_some) {
                layer_norm::parameter_gradients(self.shape, normalized, dy, scratch, pair)?;
            }
        }
        let Some((dx, accumulate)) = pass.values.input_gradient(0, self.x)? else { return Ok(()) };
        layer_norm::backward(self.shape, normalized, dy, dx, accumulate)
    }

    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let normalized = self.normalized(&mut pass.values, &pass.weights)?;
        let saved = Saved { mean: pass.tangents.kept_mut(MEAN)?, inv_std: pass.tangents.kept_mut(INV_STD)? };
        let (x_tangent, y_tangent) = (pass.tangents.read(self.x)?, pass.tangents.write(self.y)?);
        let parameters = [pass.direction.get(self.scale)?, pass.direction.get(self.shift)?];
        layer_norm::tangent(self.shape, normalized, x_tangent, parameters, y_tangent, saved)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let index = pass.values.index();
        let normalized = self.normalized(&mut pass.values, &pass.weights)?;
        let tangents = Tangents {
            x: pass.tangents.read(self.x)?,
            gamma: pass.direction.get(self.scale)?,
            mean: pass.tangents.kept(index, MEAN)?,
            inv_std: pass.tangents.kept(index, INV_STD)?,
            dy: [pass.values.gradient(self.y)?, pass.tangents.gradient(self.y)?],
        };
        let scratch = pass.tangents.backward_scratch()?;
        let pair = pass.product.pair(self.scale, self.shift)?;
        if pair.iter().any(Option::is_some) {
            layer_norm::parameter_gradients_tangent(self.shape, normalized, tangents, scratch, pair)?;
        }
        let Some((dx, accumulate)) = pass.tangents.input_gradient(0, self.x)? else { return Ok(()) };
        layer_norm::backward_tangent(self.shape, normalized, tangents, dx, accumulate)
    }
}
