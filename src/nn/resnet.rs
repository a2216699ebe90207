//! Residual networks: those of He et al. 2016, section 4.2, for CIFAR, and those of section 4.1, also as ResNeXts (Xie
//! et al. 2017). Names of parameters are torchvision's.

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
        let block = Block { bottleneck: false, groups: 1, group_width: 0, shortcut: self.shortcut };
        residual_network(images, classes, &stages, block, Stem::Cifar)
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

/// The ResNet of He et al. 2016, section 4.1, in torchvision's form. Bottleneck blocks have their stride in the 3×3
/// convolution. Images of 64×64 and more go through torchvision's stem: a 7×7 convolution of stride 2 and a max pool of
/// 3×3 with stride 2. Smaller ones go through the stem that is usual for CIFAR: a 3×3 convolution of stride 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResNet {
    /// Width of the first stage: 64 in the models with a name. Each further stage is twice as wide.
    pub width: usize,
    /// Residual blocks of each stage.
    pub blocks: [usize; 4],
    /// Whether a block is a bottleneck of three convolutions, with four times its stage's width in channels, or a basic
    /// block of two.
    pub bottleneck: bool,
    /// Groups of the 3×3 convolution of a bottleneck: 1 in ResNets, more in ResNeXts.
    pub groups: usize,
    /// Channels of a group in the first stage, if that is 64 wide (torchvision's `width_per_group`): 64 in ResNets.
    pub group_width: usize,
}

impl ResNet {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images too small for the strides, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let stages: Vec<Stage> = (0..).zip(self.blocks).map(|(n, blocks)| (self.width << n, blocks)).collect();
        let Self { bottleneck, groups, group_width, .. } = self;
        let block = Block { bottleneck, groups, group_width, shortcut: Shortcut::B };
        let stem = if images.height.min(images.width) >= 64 { Stem::ImageNet } else { Stem::Cifar };
        residual_network(images, classes, &stages, block, stem)
    }
}

/// The [`ResNet`] of width 64 with so many blocks in its stages.
pub(super) fn staged<const A: usize, const B: usize, const C: usize, const D: usize, const BOTTLENECK: bool>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let blocks = [A, B, C, D];
    ResNet { width: 64, blocks, bottleneck: BOTTLENECK, groups: 1, group_width: 64 }.trace(images, classes)
}

/// ResNeXt-50, 32×4d.
pub(super) fn resnext50(images: Shape, classes: usize, _: Shortcut) -> Result<(Graph, Value), PlanError> {
    ResNet { width: 64, blocks: [3, 4, 6, 3], bottleneck: true, groups: 32, group_width: 4 }.trace(images, classes)
}

/// A stage's width and number of blocks.
type Stage = (usize, usize);

/// What comes before the first stage.
#[derive(Clone, Copy, PartialEq)]
enum Stem {
    /// A 3×3 convolution, which keeps the size of the image.
    Cifar,
    /// A 7×7 convolution and a max pool, which halve it twice.
    ImageNet,
}

/// What the blocks of a network have in common.
#[derive(Clone, Copy)]
struct Block {
    bottleneck: bool,
    groups: usize,
    group_width: usize,
    shortcut: Shortcut,
}

/// The first stage keeps the size of the stem's output, and each further one halves it.
fn residual_network(
    images: Shape,
    classes: usize,
    stages: &[Stage],
    block: Block,
    stem: Stem,
) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    let (kernel, stride, padding) = if stem == Stem::ImageNet { (7, 2, 3) } else { (3, 1, 1) };
    x = graph.convolution(x, "conv1.weight", stages[0].0, kernel, stride, padding)?;
    x = graph.batch_norm(x, "bn1", None, true)?;
    if stem == Stem::ImageNet {
        x = graph.max_pool(x, 3, 2, 1)?;
    }
    for (stage, &(width, blocks)) in stages.iter().enumerate() {
        for number in 0..blocks {
            let stride = if stage > 0 && number == 0 { 2 } else { 1 };
            let name = format!("layer{}.{number}", stage + 1);
            let trace = if block.bottleneck { Block::bottleneck } else { Block::basic };
            x = trace(block, &mut graph, x, &name, width, stride)?;
        }
    }
    let x = graph.global_average_pool(x)?;
    let logits = graph.linear(x, "fc", classes)?;
    Ok((graph, logits))
}

impl Block {
    /// Two 3×3 convolutions with batch norm, and the sum with the block's input.
    fn basic(self, graph: &mut Graph, x: Value, name: &str, width: usize, stride: usize) -> Result<Value, PlanError> {
        let y = graph.convolution(x, &format!("{name}.conv1.weight"), width, 3, stride, 1)?;
        let y = graph.batch_norm(y, &format!("{name}.bn1"), None, true)?;
        let y = graph.convolution(y, &format!("{name}.conv2.weight"), width, 3, 1, 1)?;
        let residual = self.residual(graph, x, name, width, stride)?;
        graph.batch_norm(y, &format!("{name}.bn2"), Some(residual), true)
    }

    /// Convolutions of 1×1, 3×3 and 1×1 with batch norm, and the sum with the block's input.
    fn bottleneck(
        self,
        graph: &mut Graph,
        x: Value,
        name: &str,
        width: usize,
        stride: usize,
    ) -> Result<Value, PlanError> {
        let inner = width * self.group_width / 64 * self.groups;
        let y = graph.convolution(x, &format!("{name}.conv1.weight"), inner, 1, 1, 0)?;
        let y = graph.batch_norm(y, &format!("{name}.bn1"), None, true)?;
        let y = graph.grouped_convolution(y, &format!("{name}.conv2.weight"), inner, self.groups, 3, stride, 1)?;
        let y = graph.batch_norm(y, &format!("{name}.bn2"), None, true)?;
        let y = graph.convolution(y, &format!("{name}.conv3.weight"), 4 * width, 1, 1, 0)?;
        let residual = self.residual(graph, x, name, 4 * width, stride)?;
        graph.batch_norm(y, &format!("{name}.bn3"), Some(residual), true)
    }

    /// A block's input in the shape of its output.
    fn residual(
        self,
        graph: &mut Graph,
        x: Value,
        name: &str,
        channels: usize,
        stride: usize,
    ) -> Result<Value, PlanError> {
        if stride == 1 && graph.shape(x).channels == channels {
            return Ok(x);
        }
        match self.shortcut {
            Shortcut::A => graph.shortcut(x, channels, stride),
            Shortcut::B => {
                let projected = graph.convolution(x, &format!("{name}.downsample.0.weight"), channels, 1, stride, 0)?;
                graph.batch_norm(projected, &format!("{name}.downsample.1"), None, false)
            }
        }
    }
}
