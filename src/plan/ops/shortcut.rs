//! The shortcuts without parameters of residual networks: fewer pixels, and more channels.

use super::LinearMap;
use crate::device::{self, Compute};
use crate::kernels::layers::{self, ShortcutShape};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Shape, Value};
use crate::plan::pass::Operands;

/// `y` holds every `stride`-th pixel of `x`, with channels of zeros before and behind those of `x`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Shortcut {
    x: Value,
    y: Value,
    shape: ShortcutShape,
}

impl Graph {
    /// The shortcut without parameters of He et al. 2016 (option A): every `stride`-th pixel, with zeros in the new
    /// channels and the old channels in the middle.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for fewer output than input channels, or a stride of zero.
    pub fn shortcut(&mut self, x: Value, channels: usize, stride: usize) -> Result<Value, PlanError> {
        let before = channels.saturating_sub(self.shape(x).channels) / 2;
        self.widened("shortcut", x, channels, before, stride)
    }

    /// The same pixels with more channels: the old ones first, and zeros in the new ones (the shortcut of PyramidNets).
    ///
    /// # Errors
    /// [`PlanError::Shape`] for fewer output than input channels.
    pub fn append_channels(&mut self, x: Value, channels: usize) -> Result<Value, PlanError> {
        self.widened("append_channels", x, channels, 0, 1)
    }

    /// `before` of the new channels lie before the old ones.
    fn widened(
        &mut self,
        operation: &str,
        x: Value,
        channels: usize,
        before: usize,
        stride: usize,
    ) -> Result<Value, PlanError> {
        let input = self.shape(x);
        if stride == 0 || channels < input.channels {
            let reason = format!("cannot go from {} to {channels} channels with stride {stride}", input.channels);
            return Err(PlanError::Shape { operation: operation.into(), reason });
        }
        let shape = ShortcutShape {
            batch: input.batch,
            height: input.height,
            width: input.width,
            in_channels: input.channels,
            out_channels: channels,
            before,
            stride,
        };
        let y = self.value(Shape { height: shape.out_height(), width: shape.out_width(), channels, ..input });
        self.push(Shortcut { x, y, shape });
        Ok(y)
    }
}

impl LinearMap for Shortcut {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn apply<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        layers::shortcut(&self.shape, at.read(self.x)?, at.write(self.y)?)
    }

    fn transpose<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        layers::shortcut_backward(&self.shape, at.gradient(self.y)?, dx, accumulate)
    }
}
