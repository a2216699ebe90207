//! Models: residual networks, traced into a [`Graph`], with their initialisation.

mod init;

pub use init::initial_weights;

use std::str::FromStr;

use crate::plan::{Graph, PlanError, Shape, Value};

/// How a residual block's input reaches its output where the shape changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shortcut {
    /// Option A: every second pixel, new channels zero; no parameters (the default for CIFAR ResNets).
    #[default]
    A,
    /// Option B: a 1×1 convolution with batch norm.
    B,
}

/// A network, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers, widths 16-32-64.
    CifarResNet {
        /// Residual blocks per stage (n).
        blocks: usize,
        /// Where the shape changes.
        shortcut: Shortcut,
    },
    /// ResNet-18 with the CIFAR stem (a 3×3 convolution of stride 1, no pooling): 11.2 M parameters; always option B.
    ResNet18,
}

/// The names that [`Model::from_name`] knows.
pub const MODEL_NAMES: [&str; 7] = ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet18"];

/// A model name that is not known, or an option that it does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnknownModel(String);

impl Model {
    /// The model of that name; `shortcut` is for the CIFAR ResNets (none means option A).
    ///
    /// # Errors
    /// An unknown name, or option A for ResNet-18.
    pub fn from_name(name: &str, shortcut: Option<Shortcut>) -> Result<Self, UnknownModel> {
        let depth = name.strip_prefix("resnet").filter(|_| MODEL_NAMES.contains(&name));
        match depth.and_then(|depth| depth.parse::<usize>().ok()) {
            Some(18) if shortcut == Some(Shortcut::A) => {
                Err(UnknownModel("resnet18 has projection shortcuts only (option b)".into()))
            }
            Some(18) => Ok(Model::ResNet18),
            Some(depth) => Ok(Model::CifarResNet { blocks: (depth - 2) / 6, shortcut: shortcut.unwrap_or_default() }),
            None => Err(UnknownModel(format!("no model is named `{name}`; known: {}", MODEL_NAMES.join(", ")))),
        }
    }

    /// Traces the model for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images too small for the strides, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let mut graph = Graph::new(images);
        let x = graph.input();
        let (widths, blocks, shortcut): (&[usize], usize, Shortcut) = match self {
            Model::CifarResNet { blocks, shortcut } => (&[16, 32, 64], blocks, shortcut),
            Model::ResNet18 => (&[64, 128, 256, 512], 2, Shortcut::B),
        };
        let mut x = graph.convolution(x, "conv1.weight", widths[0], 3, 1, 1)?;
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

impl FromStr for Shortcut {
    type Err = UnknownModel;

    fn from_str(text: &str) -> Result<Self, UnknownModel> {
        match text {
            "a" => Ok(Shortcut::A),
            "b" => Ok(Shortcut::B),
            _ => Err(UnknownModel(format!("shortcut `{text}`: expected a or b"))),
        }
    }
}
