//! VGG with batch norm (Simonyan and Zisserman 2015) in its form for CIFAR.
//!
//! The convolutions and batch norms are those of torchvision's `vgg11_bn` and so on and have their names
//! (`features.0.weight`, `features.1.running_mean`), but for the biases of the convolutions: a bias before batch norm
//! has no effect, so there is none. In place of torchvision's three linear layers with dropout there is the single one
//! that is usual for images of 32×32, `classifier`.

use super::Shortcut;
use crate::plan::{Graph, PlanError, Shape, Value};

/// A VGG with batch norm: five stages of 3×3 convolutions, each of which ends in a max pool of 2×2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vgg {
    /// Width of the first stage: 64 in the models with a name. The next three are twice as wide as the one before, and
    /// the last is as wide as the fourth.
    pub width: usize,
    /// Convolutions of each stage.
    pub convolutions: [usize; 5],
}

impl Vgg {
    /// Traces it for one batch of images; returns the graph and its logits. The max pools halve the image five times,
    /// and the linear layer takes the one pixel that is left.
    ///
    /// # Errors
    /// Images with fewer than 32 or more than 63 rows or columns, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        if [images.height, images.width].iter().any(|extent| extent / 32 != 1) {
            let reason = format!("expected images of 32x32 (up to 63x63), found {}x{}", images.height, images.width);
            return Err(PlanError::Shape { operation: "VGG".into(), reason });
        }
        let mut graph = Graph::new(images);
        let mut x = graph.input();
        // As torchvision counts them: convolution, batch norm, ReLU, and the max pool.
        let mut number = 0;
        for (stage, convolutions) in self.convolutions.into_iter().enumerate() {
            for _ in 0..convolutions {
                x = graph.convolution(x, &format!("features.{number}.weight"), self.width << stage.min(3), 3, 1, 1)?;
                x = graph.batch_norm(x, &format!("features.{}", number + 1), None, true)?;
                number += 3;
            }
            x = graph.max_pool(x, 2, 2, 0)?;
            number += 1;
        }
        let logits = graph.linear(x, "classifier", classes)?;
        Ok((graph, logits))
    }
}

/// The [`Vgg`] of width 64 with so many convolutions in its first two stages, and so many in the others.
pub(super) fn named<const FIRST: usize, const LAST: usize>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    Vgg { width: 64, convolutions: [FIRST, FIRST, LAST, LAST, LAST] }.trace(images, classes)
}
