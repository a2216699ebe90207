//! PyramidNets (Han, Kim and Kim 2017), whose width grows with every block. Blocks, widths, names of parameters and
//! initial weights are those of `dyhan0920/PyramidNet-PyTorch`. With ShakeDrop (Yamada et al. 2018) they have the same
//! parameters.

use super::{Shortcut, fan_out};
use crate::plan::{Graph, PlanError, Shape, Value};

/// An additive PyramidNet for CIFAR: three stages of blocks, 6n + 2 layers, or 9n + 2 with bottleneck blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PyramidNet {
    /// Blocks per stage (n).
    pub blocks: usize,
    /// By how much the width grows from 16 over all blocks (α).
    pub alpha: usize,
    /// Whether a block is a bottleneck of three convolutions, with four times its width in channels, or has two 3×3
    /// convolutions.
    pub bottleneck: bool,
    /// With ShakeDrop, the probability that the last block is kept as it is (p_L). Of L blocks, number l is kept with
    /// probability `1 − (1 − p_L) l/L`.
    pub shake_drop: Option<f64>,
}

impl PyramidNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images whose height or width is no multiple of 4, or none; a probability that is not above 0 and at most 1.
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
                let number = ((stage - 1) * self.blocks + block + 1) as f64 / (3 * self.blocks) as f64;
                let keep = self.shake_drop.map(|last| 1.0 - (1.0 - last) * number);
                x = trace_block(&mut graph, x, &format!("layer{stage}.{block}"), rounded, stride, keep)?;
            }
        }
        let x = graph.batch_norm(x, "bn_final", None, true)?;
        let x = graph.global_average_pool(x)?;
        let logits = graph.linear(x, "fc", classes)?;
        graph.initialize(|_, kind| fan_out(kind));
        Ok((graph, logits))
    }
}

/// The [`PyramidNet`] of `DEPTH` layers; ShakeDrop keeps its last block with probability one half.
pub(super) fn named<const DEPTH: usize, const ALPHA: usize, const BOTTLENECK: bool, const SHAKE_DROP: bool>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let blocks = (DEPTH - 2) / if BOTTLENECK { 9 } else { 6 };
    let shake_drop = SHAKE_DROP.then_some(0.5);
    PyramidNet { blocks, alpha: ALPHA, bottleneck: BOTTLENECK, shake_drop }.trace(images, classes)
}

/// Two 3×3 convolutions between three batch norms with a single ReLU, and the sum with the block's input.
fn basic_block(
    graph: &mut Graph,
    x: Value,
    name: &str,
    width: usize,
    stride: usize,
    keep: Option<f64>,
) -> Result<Value, PlanError> {
    let y = graph.batch_norm(x, &format!("{name}.bn1"), None, false)?;
    let y = graph.convolution(y, &format!("{name}.conv1.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, 1, 1)?;
    let residual = residual(graph, x, width, stride)?;
    last_batch_norm(graph, y, &format!("{name}.bn3"), residual, keep)
}

/// Convolutions of 1×1, 3×3 and 1×1 between four batch norms with two ReLUs, and the sum with the block's input.
fn bottleneck(
    graph: &mut Graph,
    x: Value,
    name: &str,
    width: usize,
    stride: usize,
    keep: Option<f64>,
) -> Result<Value, PlanError> {
    let y = graph.batch_norm(x, &format!("{name}.bn1"), None, false)?;
    let y = graph.convolution(y, &format!("{name}.conv1.weight"), width, 1, 1, 0)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn3"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv3.weight"), 4 * width, 1, 1, 0)?;
    let residual = residual(graph, x, 4 * width, stride)?;
    last_batch_norm(graph, y, &format!("{name}.bn4"), residual, keep)
}

/// The batch norm at the end of a block, ShakeDrop, and the sum with the block's input.
fn last_batch_norm(
    graph: &mut Graph,
    y: Value,
    name: &str,
    residual: Value,
    keep: Option<f64>,
) -> Result<Value, PlanError> {
    let Some(keep) = keep else { return graph.batch_norm(y, name, Some(residual), false) };
    let y = graph.batch_norm(y, name, None, false)?;
    let y = graph.shake_drop(y, keep)?;
    graph.add(y, residual)
}

/// A block's input in the shape of its output: the mean of 2×2 pixels where the image is halved, and zeros in the new
/// channels.
fn residual(graph: &mut Graph, x: Value, channels: usize, stride: usize) -> Result<Value, PlanError> {
    let x = if stride == 1 { x } else { graph.average_pool(x, 2, stride)? };
    if graph.shape(x).channels == channels { Ok(x) } else { graph.append_channels(x, channels) }
}
