//! VGG-11 with batch norm (Simonyan and Zisserman 2015, configuration A) in its form for CIFAR.
//!
//! The convolutions and batch norms are those of torchvision's `vgg11_bn` and have its names (`features.0.weight`,
//! `features.1.running_mean`), but for the biases of the convolutions: a bias before batch norm has no effect, so there
//! is none. In place of torchvision's three linear layers with dropout there is the single one that is usual for images
//! of 32×32, `classifier`.

use super::Shortcut;
use crate::plan::{Graph, PlanError, Shape, Value};

/// A convolution's output channels, or a max pool.
enum Layer {
    Convolution(usize),
    MaxPool,
}

/// Configuration A.
const LAYERS: [Layer; 13] = {
    use Layer::{Convolution, MaxPool};
    [
        Convolution(64),
        MaxPool,
        Convolution(128),
        MaxPool,
        Convolution(256),
        Convolution(256),
        MaxPool,
        Convolution(512),
        Convolution(512),
        MaxPool,
        Convolution(512),
        Convolution(512),
        MaxPool,
    ]
};

/// VGG-11 with batch norm: 9.2 M parameters. Five max pools of 2×2 halve the image, and the linear layer takes the one
/// pixel that is left, so images have 32 to 63 rows and columns.
pub(super) fn vgg11_bn(images: Shape, classes: usize, _: Shortcut) -> Result<(Graph, Value), PlanError> {
    if [images.height, images.width].iter().any(|extent| extent / 32 != 1) {
        let reason = format!("expected images of 32x32 (up to 63x63), found {}x{}", images.height, images.width);
        return Err(PlanError::Shape { operation: "vgg11-bn".into(), reason });
    }
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    // As torchvision counts them: convolution, batch norm, ReLU, and the max pool.
    let mut number = 0;
    for layer in LAYERS {
        match layer {
            Layer::Convolution(outputs) => {
                x = graph.convolution(x, &format!("features.{number}.weight"), outputs, 3, 1, 1)?;
                x = graph.batch_norm(x, &format!("features.{}", number + 1), None, true)?;
                number += 3;
            }
            Layer::MaxPool => {
                x = graph.max_pool(x, 2, 2, 0)?;
                number += 1;
            }
        }
    }
    let logits = graph.linear(x, "classifier", classes)?;
    Ok((graph, logits))
}
