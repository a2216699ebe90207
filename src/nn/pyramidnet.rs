//! PyramidNets (Han, Kim and Kim 2017), whose width grows with every block. Blocks, widths, names of parameters and
//! initial weights are those of `dyhan0920/PyramidNet-PyTorch`.

use super::{Shortcut, fan_out};
use crate::plan::{Graph, PlanError, Shape, Value};

/// An additive PyramidNet for CIFAR: three stages of blocks, 6n + 2 layers, or 9n + 2 with bottleneck blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PyramidNet {
    /// Blocks per stage (n).
    pub blocks: usize,
    /// By how much the width grows from 16 over all blocks (α).
    pub alpha: usize,
    /// Whether a block is a bottleneck of three convolutions, with four times its width in channels, or has two 3×3
    /// convolutions.
    pub bottleneck: bool,
}

impl PyramidNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images whose height or width is no multiple of 4, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        if [images.height, images.width].iter().any(|extent| extent % 4 != 0) {
            let found = format!("{}x{}", images.height, images.width);
            let reason = format!("expected images whose height and width are multiples of 4, found {found}");
            return Err(PlanError::Shape { operation: "PyramidNet".into(), reason });
        }
        let trace_block = if self.bottleneck { bottleneck } else { basic_block };
        let mut graph = Graph::new(images);
        let mut x = graph.input();
        x = graph.convolution(x, "conv1.weight", 16, 3, 1, 1)?;
        x = graph.batch_norm(x, "bn1", None, false)?;
        let growth = self.alpha as f64 / (3 * self.blocks) as f64;
        let mut width = 16.0;
        for stage in 1..=3 {
            for block in 0..self.blocks {
                width += growth;
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                // Python rounds so, too.
                let rounded = f64::round_ties_even(width) as usize;
                x = trace_block(&mut graph, x, &format!("layer{stage}.{block}"), rounded, stride)?;
            }
        }
        let x = graph.batch_norm(x, "bn_final", None, true)?;
        let x = graph.global_average_pool(x)?;
        let logits = graph.linear(x, "fc", classes)?;
        graph.initialize(|_, kind| fan_out(kind));
        Ok((graph, logits))
    }
}

/// The [`PyramidNet`] of `DEPTH` layers.
pub(super) fn named<const DEPTH: usize, const ALPHA: usize, const BOTTLENECK: bool>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let blocks = (DEPTH - 2) / if BOTTLENECK { 9 } else { 6 };
    PyramidNet { blocks, alpha: ALPHA, bottleneck: BOTTLENECK }.trace(images, classes)
}

/// Two 3×3 convolutions between three batch norms with a single ReLU, and the sum with the block's input.
fn basic_block(graph: &mut Graph, x: Value, name: &str, width: usize, stride: usize) -> Result<Value, PlanError> {
    let y = graph.batch_norm(x, &format!("{name}.bn1"), None, false)?;
    let y = graph.convolution(y, &format!("{name}.conv1.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, 1, 1)?;
    let residual = residual(graph, x, width, stride)?;
    graph.batch_norm(y, &format!("{name}.bn3"), Some(residual), false)
}

/// Convolutions of 1×1, 3×3 and 1×1 between four batch norms with two ReLUs, and the sum with the block's input.
fn bottleneck(graph: &mut Graph, x: Value, name: &str, width: usize, stride: usize) -> Result<Value, PlanError> {
    let y = graph.batch_norm(x, &format!("{name}.bn1"), None, false)?;
    let y = graph.convolution(y, &format!("{name}.conv1.weight"), width, 1, 1, 0)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn3"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv3.weight"), 4 * width, 1, 1, 0)?;
    let residual = residual(graph, x, 4 * width, stride)?;
    graph.batch_norm(y, &format!("{name}.bn4"), Some(residual), false)
}

/// A block's input in the shape of its output: the mean of 2×2 pixels where the image is halved, and zeros in the new
/// channels.
fn residual(graph: &mut Graph, x: Value, channels: usize, stride: usize) -> Result<Value, PlanError> {
    let x = if stride == 1 { x } else { graph.average_pool(x, 2, stride)? };
    if graph.shape(x).channels == channels { Ok(x) } else { graph.append_channels(x, channels) }
}
