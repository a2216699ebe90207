//! Max pooling over square windows.

use super::{ExtraMemory, Operation, Site};
use crate::device::{self, Compute, Slice};
use crate::kernels::layers::PoolShape;
use crate::kernels::max_pool;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Shape, Value};
use crate::plan::memory_plan::master_len;
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};

/// `y` holds the largest element of every window of `x`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct MaxPool {
    x: Value,
    y: Value,
    shape: PoolShape,
}

/// The position of what the forward keeps: which element each output has chosen, in one byte.
const CHOSEN: usize = 0;

impl Graph {
    /// The largest element of every `kernel`×`kernel` window, as `torch.nn.MaxPool2d`: `[N,H,W,C]` to `[N,OH,OW,C]`,
    /// `OH = (H + 2 padding − kernel)/stride + 1`, rounded down.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for a window larger than the padded image or than 16×16, a stride of zero, and a padding of
    /// more than half the kernel.
    pub fn max_pool(&mut self, x: Value, kernel: usize, stride: usize, padding: usize) -> Result<Value, PlanError> {
        let Shape { batch, height, width, channels } = self.shape(x);
        let shape = PoolShape { batch, height, width, channels, kernel, stride, padding };
        max_pool::check_shape(&shape)
            .map_err(|e| PlanError::Shape { operation: "max_pool".into(), reason: e.to_string() })?;
        let y = self.value(Shape { height: shape.out_height(), width: shape.out_width(), batch, channels });
        self.push(MaxPool { x, y, shape });
        Ok(y)
    }
}

impl MaxPool {
    fn chosen<'a, S: Compute>(&self, values: &mut Operands<'a, S>) -> device::Result<Slice<'a, u8>> {
        values.kept(values.index(), CHOSEN)?.cast(self.shape.output_len())
    }

    /// Each element of dy goes to the element of x that the forward has chosen.
    fn spread<S: Compute>(&self, chosen: Slice<'_, u8>, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        max_pool::max_pool_backward(&self.shape, at.gradient(self.y)?, chosen, dx, accumulate)
    }
}

impl Operation for MaxPool {
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
        [None, None]
    }

    fn memory<S: Compute>(&self, _: &Site<'_>) -> ExtraMemory {
        ExtraMemory { kept: [master_len::<S, u8>(self.shape.output_len()), 0], ..ExtraMemory::default() }
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let chosen = pass.values.kept_mut(CHOSEN)?.cast(self.shape.output_len())?;
        max_pool::max_pool(&self.shape, pass.values.read(self.x)?, pass.values.write(self.y)?, chosen)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let chosen = self.chosen(&mut pass.values)?;
        self.spread(chosen, &mut pass.values)
    }

    /// While the chosen element stays the same, the operation is linear. So the tangent of y is that of the chosen
    /// element.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let chosen = self.chosen(&mut pass.values)?;
        max_pool::max_pool_tangent(&self.shape, pass.tangents.read(self.x)?, chosen, pass.tangents.write(self.y)?)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let chosen = self.chosen(&mut pass.values)?;
        self.spread(chosen, &mut pass.tangents)
    }
}
