//! Residual networks: those of He et al. 2016, section 4.2, for CIFAR, and those of section 4.1 with the CIFAR stem.
//! Names of parameters are torchvision's.

use crate::plan::{Graph, PlanError, Shape, Value};
use crate::words;

words! {
    /// How a residual block's input reaches its output where the shape changes.
    pub enum Shortcut {
        /// Every second pixel, zeros in the new channels: no parameters
        A = "a",
        /// A 1×1 convolution with batch norm
        B = "b",
    }
}

impl Default for Shortcut {
    /// Option A, the default of CIFAR ResNets.
    fn default() -> Self {
        Self::A
    }
}

impl Shortcut {
    /// What a model offers that can have either; the default is option A.
    pub(super) const BOTH: &[Self] = &[Self::A, Self::B];
}

/// The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers, widths 16-32-64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CifarResNet {
    /// Residual blocks per stage (n).
    pub blocks: usize,
    /// Where the shape changes.
    pub shortcut: Shortcut,
}

impl CifarResNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images too small for the strides, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let stages = [16, 32, 64].map(|width| (width, self.blocks));
        residual_network(images, classes, &stages, basic_block, self.shortcut)
    }
}

/// The [`CifarResNet`] of `DEPTH` layers.
pub(super) fn cifar<const DEPTH: usize>(
    images: Shape,
    classes: usize,
    shortcut: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    CifarResNet { blocks: (DEPTH - 2) / 6, shortcut }.trace(images, classes)
}

/// The ResNet of He et al. 2016, section 4.1, in torchvision's form with the CIFAR stem (a 3×3 convolution of stride 1,
/// no pooling). Bottleneck blocks have their stride in the 3×3 convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResNet {
    /// Width of the first stage: 64 in the models with a name. Each further stage is twice as wide.
    pub width: usize,
    /// Residual blocks of each stage.
    pub blocks: [usize; 4],
    /// Whether a block is a bottleneck of three convolutions, with four times its stage's width in channels, or a basic
    /// block of two.
    pub bottleneck: bool,
}

impl ResNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images too small for the strides, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let stages: Vec<Stage> = (0..).zip(self.blocks).map(|(n, blocks)| (self.width << n, blocks)).collect();
        residual_network(images, classes, &stages, if self.bottleneck { bottleneck } else { basic_block }, Shortcut::B)
    }
}

/// The [`ResNet`] of width 64 with so many blocks in its stages.
pub(super) fn staged<const A: usize, const B: usize, const C: usize, const D: usize, const BOTTLENECK: bool>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    ResNet { width: 64, blocks: [A, B, C, D], bottleneck: BOTTLENECK }.trace(images, classes)
}

/// A stage's width and number of blocks.
type Stage = (usize, usize);

/// Traces a block with this name, width and stride.
type Block = fn(&mut Graph, Value, &str, usize, usize, Shortcut) -> Result<Value, PlanError>;

/// The first stage keeps the size of the image, and each further one halves it.
fn residual_network(
    images: Shape,
    classes: usize,
    stages: &[Stage],
    trace_block: Block,
    shortcut: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    x = graph.convolution(x, "conv1.weight", stages[0].0, 3, 1, 1)?;
    x = graph.batch_norm(x, "bn1", None, true)?;
    for (stage, &(width, blocks)) in stages.iter().enumerate() {
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let name = format!("layer{}.{block}", stage + 1);
            x = trace_block(&mut graph, x, &name, width, stride, shortcut)?;
        }
    }
    let x = graph.global_average_pool(x)?;
    let logits = graph.linear(x, "fc", classes)?;
    Ok((graph, logits))
}

/// Two 3×3 convolutions with batch norm, and the sum with the block's input.
fn basic_block(
    graph: &mut Graph,
    x: Value,
    name: &str,
    width: usize,
    stride: usize,
    shortcut: Shortcut,
) -> Result<Value, PlanError> {
    let y = graph.convolution(x, &format!("{name}.conv1.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn1"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, 1, 1)?;
    let residual = residual(graph, x, name, width, stride, shortcut)?;
    graph.batch_norm(y, &format!("{name}.bn2"), Some(residual), true)
}

/// Convolutions of 1×1, 3×3 and 1×1 with batch norm, and the sum with the block's input.
fn bottleneck(
    graph: &mut Graph,
    x: Value,
    name: &str,
    width: usize,
    stride: usize,
    shortcut: Shortcut,
) -> Result<Value, PlanError> {
    let y = graph.convolution(x, &format!("{name}.conv1.weight"), width, 1, 1, 0)?;
    let y = graph.batch_norm(y, &format!("{name}.bn1"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, stride, 1)?;
    let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
    let y = graph.convolution(y, &format!("{name}.conv3.weight"), 4 * width, 1, 1, 0)?;
    let residual = residual(graph, x, name, 4 * width, stride, shortcut)?;
    graph.batch_norm(y, &format!("{name}.bn3"), Some(residual), true)
}

/// A block's input in the shape of its output.
fn residual(
    graph: &mut Graph,
    x: Value,
    name: &str,
    channels: usize,
    stride: usize,
    shortcut: Shortcut,
) -> Result<Value, PlanError> {
    if stride == 1 && graph.shape(x).channels == channels {
        return Ok(x);
    }
    match shortcut {
        Shortcut::A => graph.shortcut(x, channels, stride),
        Shortcut::B => {
            let projected = graph.convolution(x, &format!("{name}.downsample.0.weight"), channels, 1, stride, 0)?;
            graph.batch_norm(projected, &format!("{name}.downsample.1"), None, false)
        }
    }
}
