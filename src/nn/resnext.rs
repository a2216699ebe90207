//! ResNeXts for CIFAR (Xie et al. 2017), whose bottlenecks have grouped convolutions. Blocks, names of parameters and
//! initial weights are those of `prlz77/ResNeXt.pytorch`.

use super::{Shortcut, fan_out};
use crate::arena::{Initial, TensorKind};
use crate::plan::{Graph, PlanError, Shape, Value};

/// A ResNeXt for CIFAR: three stages of bottleneck blocks, 9n + 2 layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResNeXt {
    /// Blocks per stage (n).
    pub blocks: usize,
    /// Groups of each 3×3 convolution (the cardinality).
    pub groups: usize,
    /// Channels of a group in the first stage, and of the stem: 64 in the models with a name. Each further stage has
    /// groups twice as wide.
    pub width: usize,
    /// How many times a block's output is as wide as one group: 4 in the models with a name.
    pub widening: usize,
}

impl ResNeXt {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// A number of zero, or no images.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let mut graph = Graph::new(images);
        let mut x = graph.input();
        x = graph.convolution(x, "conv_1_3x3.weight", self.width, 3, 1, 1)?;
        x = graph.batch_norm(x, "bn_1", None, true)?;
        for stage in 1..=3 {
            for block in 0..self.blocks {
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                let name = format!("stage_{stage}.stage_{stage}_bottleneck_{block}");
                x = self.bottleneck(&mut graph, x, &name, self.width << (stage - 1), stride)?;
            }
        }
        let x = graph.global_average_pool(x)?;
        let logits = graph.linear(x, "classifier", classes)?;
        graph.initialize(|name, kind| match kind {
            TensorKind::Linear { inputs, .. } => Some(Initial::HeNormal { fan: inputs }),
            _ if name == "classifier.bias" => Some(Initial::Constant(0.0)),
            _ => fan_out(kind),
        });
        Ok((graph, logits))
    }

    /// Convolutions of 1×1, 3×3 in groups of `width` channels, and 1×1 with batch norm, and the sum with the block's
    /// input.
    fn bottleneck(
        self,
        graph: &mut Graph,
        x: Value,
        name: &str,
        width: usize,
        stride: usize,
    ) -> Result<Value, PlanError> {
        let (inner, outputs) = (self.groups * width, self.widening * width);
        let y = graph.convolution(x, &format!("{name}.conv_reduce.weight"), inner, 1, 1, 0)?;
        let y = graph.batch_norm(y, &format!("{name}.bn_reduce"), None, true)?;
        let y = graph.grouped_convolution(y, &format!("{name}.conv_conv.weight"), inner, self.groups, 3, stride, 1)?;
        let y = graph.batch_norm(y, &format!("{name}.bn"), None, true)?;
        let y = graph.convolution(y, &format!("{name}.conv_expand.weight"), outputs, 1, 1, 0)?;
        let residual = if graph.shape(x).channels == outputs {
            x
        } else {
            let projected =
                graph.convolution(x, &format!("{name}.shortcut.shortcut_conv.weight"), outputs, 1, stride, 0)?;
            graph.batch_norm(projected, &format!("{name}.shortcut.shortcut_bn"), None, false)?
        };
        graph.batch_norm(y, &format!("{name}.bn_expand"), Some(residual), true)
    }
}

/// ResNeXt-29, 8×64d.
pub(super) fn resnext29(images: Shape, classes: usize, _: Shortcut) -> Result<(Graph, Value), PlanError> {
    ResNeXt { blocks: 3, groups: 8, width: 64, widening: 4 }.trace(images, classes)
}
