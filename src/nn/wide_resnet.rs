//! Wide residual networks (Zagoruyko and Komodakis 2016) without dropout. Blocks, names of parameters and initial
//! weights are those of `xternalz/WideResNet-pytorch`.

use super::{Shortcut, fan_out};
use crate::arena::Initial;
use crate::plan::{Graph, PlanError, Shape, Value};

/// WRN-d-k: three stages of pre-activation blocks, 6n + 4 layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WideResNet {
    /// Blocks per stage (n).
    pub blocks: usize,
    /// What the widths 16-32-64 are multiplied by (k).
    pub width: usize,
}

impl WideResNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// A width of zero, or no images.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let mut graph = Graph::new(images);
        let mut x = graph.input();
        x = graph.convolution(x, "conv1.weight", 16, 3, 1, 1)?;
        for (stage, width) in [16, 32, 64].into_iter().enumerate() {
            for block in 0..self.blocks {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let name = format!("block{}.layer.{block}", stage + 1);
                x = pre_activation_block(&mut graph, x, &name, width * self.width, stride)?;
            }
        }
        let x = graph.batch_norm(x, "bn1", None, true)?;
        let x = graph.global_average_pool(x)?;
        let logits = graph.linear(x, "fc", classes)?;
        graph.initialize(|name, kind| if name == "fc.bias" { Some(Initial::Constant(0.0)) } else { fan_out(kind) });
        Ok((graph, logits))
    }
}

/// The [`WideResNet`] of `DEPTH` layers and `WIDTH` times the width.
pub(super) fn named<const DEPTH: usize, const WIDTH: usize>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    WideResNet { blocks: (DEPTH - 4) / 6, width: WIDTH }.trace(images, classes)
}

/// Batch norm and ReLU before each of two 3×3 convolutions, and the sum with the block's input. Where the number of
/// channels changes, the input is projected behind the first ReLU.
fn pre_activation_block(
    graph: &mut Graph,
    x: Value,
    name: &str,
    width: usize,
    stride: usize,
) -> Result<Value, PlanError> {
    let active = graph.batch_norm(x, &format!("{name}.bn1"), None, true)?;
    let y = graph.convolution(active, &format!("{name}.conv1.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, 1, 1)?;
    let residual = if graph.shape(x).channels == width {
        x
    } else {
        graph.convolution(active, &format!("{name}.convShortcut.weight"), width, 1, stride, 0)?
    };
    graph.add(residual, y)
}
