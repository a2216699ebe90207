//! The rectified linear unit.

use super::Operation;
use crate::device::{self, Compute};
use crate::kernels::layers;
use crate::plan::graph::{Graph, Parameter, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass};

/// `y = max(x, 0)`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Relu {
    x: Value,
    y: Value,
}

impl Graph {
    /// max(x, 0).
    pub fn relu(&mut self, x: Value) -> Value {
        let y = self.value(self.shape(x));
        self.push(Relu { x, y });
        y
    }
}

impl Operation for Relu {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [None, None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.y), None]
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        layers::relu(pass.values.read(self.x)?, pass.values.write(self.y)?)
    }

    /// `dx = dy` where `y > 0`, else 0.
    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = pass.values.input_gradient(0, self.x)? else { return Ok(()) };
        layers::relu_backward(pass.values.read(self.y)?, pass.values.gradient(self.y)?, dx, accumulate)
    }

    /// The tangent of x passes where `y > 0`, like a gradient.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let (x, y) = (pass.tangents.read(self.x)?, pass.tangents.write(self.y)?);
        layers::relu_backward(pass.values.read(self.y)?, x, y, false)
    }

    /// The second derivative is zero, so the tangent of dy passes like dy.
    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = pass.tangents.input_gradient(0, self.x)? else { return Ok(()) };
        layers::relu_backward(pass.values.read(self.y)?, pass.tangents.gradient(self.y)?, dx, accumulate)
    }
}
