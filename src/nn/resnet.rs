//! Residual networks: those of He et al. 2016, section 4.2, for CIFAR, and ResNet-18 with the CIFAR stem. Names of
//! parameters are torchvision's.

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
        residual_network(images, classes, &[16, 32, 64], self.blocks, self.shortcut)
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

/// ResNet-18 with the CIFAR stem (a 3×3 convolution of stride 1, no pooling): 11.2 M parameters.
pub(super) fn resnet18(images: Shape, classes: usize, shortcut: Shortcut) -> Result<(Graph, Value), PlanError> {
    residual_network(images, classes, &[64, 128, 256, 512], 2, shortcut)
}

/// A stage of `blocks` residual blocks for each width; each stage but the first halves the image.
fn residual_network(
    images: Shape,
    classes: usize,
    widths: &[usize],
    blocks: usize,
    shortcut: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    x = graph.convolution(x, "conv1.weight", widths[0], 3, 1, 1)?;
    x = graph.batch_norm(x, "bn1", None, true)?;
    for (stage, &width) in widths.iter().enumerate() {
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let name = format!("layer{}.{block}", stage + 1);
            x = basic_block(&mut graph, x, &name, width, stride, shortcut)?;
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
    let residual = if stride == 1 && graph.shape(x).channels == width {
        x
    } else {
        match shortcut {
            Shortcut::A => graph.shortcut(x, width, stride)?,
            Shortcut::B => {
                let projected = graph.convolution(x, &format!("{name}.downsample.0.weight"), width, 1, stride, 0)?;
                graph.batch_norm(projected, &format!("{name}.downsample.1"), None, false)?
            }
        }
    };
    graph.batch_norm(y, &format!("{name}.bn2"), Some(residual), true)
}
