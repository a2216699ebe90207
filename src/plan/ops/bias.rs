//! The bias of a linear layer over tokens, with the GELU or the residual sum that follows it in a transformer.

use super::{ExtraMemory, Operation, Site, pass_to_terms, place_of_dx};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute, SliceMut};
use crate::kernels::bias::{self, GeluTangents, RowsShape, Then};
use crate::kernels::layers;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Value};
use crate::plan::memory_plan::master_len;
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};

/// `y = x + b`, `gelu(x + b)` or `x + b + residual`, with b of shape `[C]`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Bias {
    x: Value,
    residual: Option<Value>,
    y: Value,
    bias: Parameter,
    gelu: bool,
    shape: RowsShape,
}

impl Graph {
    /// x + b for every pixel or token. Makes the parameter `name`, which starts uniform within `±1/√fan_in`.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken.
    pub fn bias(&mut self, x: Value, name: &str, fan_in: usize) -> Result<Value, PlanError> {
        self.biased(x, name, fan_in, None, false)
    }

    /// gelu(x + b) for every pixel or token, with `gelu(z) = z Φ(z)`. The parameter is as in [`bias`](Self::bias).
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken.
    pub fn bias_gelu(&mut self, x: Value, name: &str, fan_in: usize) -> Result<Value, PlanError> {
        self.biased(x, name, fan_in, None, true)
    }

    /// x + b + residual for every pixel or token. The parameter is as in [`bias`](Self::bias).
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken, [`PlanError::Shape`] for a residual of another
    /// shape.
    pub fn bias_add(&mut self, x: Value, name: &str, fan_in: usize, residual: Value) -> Result<Value, PlanError> {
        self.same_shape(name, x, residual)?;
        self.biased(x, name, fan_in, Some(residual), false)
    }

    fn biased(
        &mut self,
        x: Value,
        name: &str,
        fan_in: usize,
        residual: Option<Value>,
        gelu: bool,
    ) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let shape = RowsShape { rows: input.rows(), channels: input.channels };
        let kind = TensorKind::Bias(input.channels);
        let bias = self.parameter(name.into(), kind, Initial::Uniform { fan_in: fan_in.max(1) })?;
        let y = self.value(input);
        self.push(Bias { x, residual, y, bias, gelu, shape });
        Ok(y)
    }
}

impl Bias {
    /// The sum over the rows lies before the gradient of x, where another operation has begun that.
    fn scratch(&self) -> usize {
        self.shape.scratch_len(1)
    }

    /// The gradients of x and of the residual from that of y, or their tangents: `derivative` writes that of x through
    /// the GELU. `sum` receives the gradient of the bias.
    fn spread<S: Compute>(
        &self,
        at: &mut Operands<'_, S>,
        sum: Option<SliceMut<'_, S::Master>>,
        derivative: impl FnOnce(SliceMut<'_, S>) -> device::Result<()>,
    ) -> device::Result<()> {
        let dy = at.gradient(self.y)?;
        let mut scratch = at.backward_scratch()?;
        let mut scratch = scratch.disjoint();
        let partials = scratch.write(0..self.scratch())?;
        if !self.gelu {
            pass_to_terms(at, dy, self.x, self.residual)?;
            return sum.map_or(Ok(()), |sum| bias::row_sums(self.shape, dy, partials, sum));
        }
        let elsewhere = if at.accumulates(0) { self.scratch()..self.scratch() + self.dx_len::<S>() } else { 0..0 };
        let (mut dx, total) = place_of_dx(self.x, at, scratch.write(elsewhere)?)?;
        derivative(dx.reborrow())?;
        if let Some(sum) = sum {
            bias::row_sums(self.shape, dx.view(), partials, sum)?;
        }
        total.map_or(Ok(()), |total| layers::add_to(dx.view(), total))
    }

    fn dx_len<S: Compute>(&self) -> usize {
        master_len::<S, S>(self.shape.rows * self.shape.channels)
    }
}

impl Operation for Bias {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), self.residual]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.bias), None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [self.gelu.then_some(self.x), None]
    }

    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let dx = if self.gelu && site.accumulate[0] { self.dx_len::<S>() } else { 0 };
        ExtraMemory { backward: self.scratch() + dx, ..ExtraMemory::default() }
    }

    /// The gradient of the bias is summed from that of x.
    fn always_writes_input_gradient(&self) -> bool {
        self.gelu
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let then = match self.residual {
            Some(residual) => Then::Add(pass.values.read(residual)?),
            None if self.gelu => Then::Gelu,
            None => Then::Nothing,
        };
        let (x, y) = (pass.values.read(self.x)?, pass.values.write(self.y)?);
        bias::bias(self.shape, x, pass.weights.get(self.bias)?, then, y)
    }

    /// `dx = gelu′(x + b) dy` or `dy`, `db = Σ dx` over the rows, and the residual's gradient is `dy`.
    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let sum = match &mut pass.gradients {
            Some(gradients) => gradients.get(self.bias)?,
            None => None,
        };
        if !self.gelu {
            return self.spread(&mut pass.values, sum, |_| Ok(()));
        }
        let at = (pass.values.read(self.x)?, pass.weights.get(self.bias)?);
        let dy = pass.values.gradient(self.y)?;
        self.spread(&mut pass.values, sum, |dx| bias::gelu_backward(self.shape, at, dy, dx, false))
    }

    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let gelu = if self.gelu { Some((pass.values.read(self.x)?, pass.weights.get(self.bias)?)) } else { None };
        let residual = self.residual.map(|residual| pass.tangents.read(residual)).transpose()?;
        let (x_tangent, y_tangent) = (pass.tangents.read(self.x)?, pass.tangents.write(self.y)?);
        bias::bias_tangent(self.shape, gelu, x_tangent, pass.direction.get(self.bias)?, residual, y_tangent)
    }

    /// With a dot for a tangent and `z = x + b`: `dẋ = gelu′(z) dẏ + gelu″(z) ż dy`, and `dḃ = Σ dẋ`.
    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let sum = pass.product.get(self.bias)?;
        if !self.gelu {
            return self.spread(&mut pass.tangents, sum, |_| Ok(()));
        }
        let inputs = GeluTangents {
            x: [pass.values.read(self.x)?, pass.tangents.read(self.x)?],
            bias: [pass.weights.get(self.bias)?, pass.direction.get(self.bias)?],
            dy: [pass.values.gradient(self.y)?, pass.tangents.gradient(self.y)?],
        };
        self.spread(&mut pass.tangents, sum, |dx| bias::gelu_backward_tangent(self.shape, inputs, dx, false))
    }
}
