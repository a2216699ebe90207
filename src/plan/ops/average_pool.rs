//! Average pooling over square windows.

use super::LinearMap;
use crate::device::{self, Compute};
use crate::kernels::layers::{self, PoolShape};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Shape, Value};
use crate::plan::pass::Operands;

/// `y` holds the mean of every window of `x`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct AveragePool {
    x: Value,
    y: Value,
    shape: PoolShape,
}

impl Graph {
    /// The mean of every `kernel`×`kernel` window, without padding: `[N,H,W,C]` to `[N,OH,OW,C]`,
    /// `OH = (H − kernel)/stride + 1`, rounded down.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for a window larger than the image, or of size or stride zero.
    pub fn average_pool(&mut self, x: Value, kernel: usize, stride: usize) -> Result<Value, PlanError> {
        let Shape { batch, height, width, channels } = self.shape(x);
        if kernel == 0 || stride == 0 || kernel > height.min(width) {
            let reason = format!("a window of {kernel} with stride {stride} does not fit images of {height}x{width}");
            return Err(PlanError::Shape { operation: "average_pool".into(), reason });
        }
        let shape = PoolShape { batch, height, width, channels, kernel, stride, padding: 0 };
        let y = self.value(Shape { height: shape.out_height(), width: shape.out_width(), batch, channels });
        self.push(AveragePool { x, y, shape });
        Ok(y)
    }
}

impl LinearMap for AveragePool {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn apply<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        layers::average_pool(&self.shape, at.read(self.x)?, at.write(self.y)?)
    }

    fn transpose<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        layers::average_pool_backward(&self.shape, at.gradient(self.y)?, dx, accumulate)
    }
}
