//! The mean over all pixels.

use super::LinearMap;
use crate::device::{self, Compute};
use crate::kernels::layers;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Shape, Value};
use crate::plan::pass::Operands;

/// `y` holds the mean of `x` over the pixels of each sample and channel.
#[derive(Debug, Clone)]
pub(in crate::plan) struct GlobalAveragePool {
    x: Value,
    y: Value,
    /// Of x.
    shape: Shape,
}

impl Graph {
    /// The mean over all pixels: `[N,H,W,C]` to `[N,1,1,C]`.
    ///
    /// # Errors
    /// None today; the signature is that of the other operations.
    pub fn global_average_pool(&mut self, x: Value) -> Result<Value, PlanError> {
        let shape = self.shape(x);
        let y = self.value(Shape { height: 1, width: 1, ..shape });
        self.push(GlobalAveragePool { x, y, shape });
        Ok(y)
    }
}

impl LinearMap for GlobalAveragePool {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn apply<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Shape { batch, height, width, channels } = self.shape;
        layers::global_average_pool(batch, height * width, channels, at.read(self.x)?, at.write(self.y)?)
    }

    fn transpose<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Shape { batch, height, width, channels } = self.shape;
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        let dy = at.gradient(self.y)?;
        layers::global_average_pool_backward(batch, height * width, channels, dy, dx, accumulate)
    }
}
