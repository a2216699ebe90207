//! Vision transformers (Dosovitskiy et al. 2021; the sizes of Touvron et al. 2021). Blocks, names of parameters and
//! initial weights are those of timm's `VisionTransformer`: a class token, learned positions, layer norm before
//! attention and MLP with ε = 1e-6, GELU, and biases in all linear layers.

use super::Shortcut;
use crate::arena::{Initial, TensorKind};
use crate::plan::{Graph, PlanError, Shape, Value};

/// Added to the variance of every layer norm.
const EPSILON: f64 = 1e-6;

/// A vision transformer for images of any size that its patches divide.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionTransformer {
    /// Rows, and columns, of a patch.
    pub patch: usize,
    /// Numbers of a token; the MLPs have four times as many.
    pub width: usize,
    /// Blocks of attention and MLP.
    pub depth: usize,
    /// Heads of an attention; each has `width / heads` numbers, at most 64.
    pub heads: usize,
    /// Stochastic depth: the probability with which the last block's branches are left out of a sample. It falls
    /// linearly to 0 at the first block.
    pub drop_path: f64,
}

impl VisionTransformer {
    /// Traces it for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images whose height or width is no multiple of the patch, and a width that the heads do not divide.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let Self { patch, width, depth, heads, drop_path } = self;
        let refused = |reason: String| Err(PlanError::Shape { operation: "VisionTransformer".into(), reason });
        if patch == 0 || [images.height, images.width].iter().any(|extent| *extent == 0 || extent % patch != 0) {
            let found = format!("{}x{}", images.height, images.width);
            return refused(format!("expected images whose height and width are multiples of {patch}, found {found}"));
        }
        if heads == 0 || width % heads != 0 {
            return refused(format!("{heads} heads do not divide a width of {width}"));
        }
        let mut graph = Graph::new(images);
        let x = graph.input();
        let x = graph.convolution(x, "patch_embed.proj.weight", width, patch, patch, 0)?;
        let x = graph.bias(x, "patch_embed.proj.bias", patch * patch * images.channels)?;
        let mut x = graph.embed_tokens(x, "cls_token", "pos_embed")?;
        for block in 0..depth {
            let rate = drop_path * block as f64 / depth.saturating_sub(1).max(1) as f64;
            x = self.block(&mut graph, x, &format!("blocks.{block}"), rate)?;
        }
        // Only the class token is read. Layer norm works token by token, so that the others need none.
        let tokens = graph.shape(x).width;
        let x = graph.shortcut(x, width, tokens)?;
        let x = graph.layer_norm(x, "norm", EPSILON)?;
        let logits = graph.linear(x, "head", classes)?;
        graph.initialize(initial);
        Ok((graph, logits))
    }

    /// Attention and MLP, each after a layer norm and added to its input unless it is left out.
    fn block(self, graph: &mut Graph, x: Value, name: &str, rate: f64) -> Result<Value, PlanError> {
        let (width, hidden) = (self.width, 4 * self.width);
        let y = graph.layer_norm(x, &format!("{name}.norm1"), EPSILON)?;
        let y = graph.projection(y, &format!("{name}.attn.qkv.weight"), 3 * width)?;
        let y = graph.attention(y, &format!("{name}.attn.qkv.bias"), self.heads)?;
        let y = graph.projection(y, &format!("{name}.attn.proj.weight"), width)?;
        let x = added(graph, y, &format!("{name}.attn.proj.bias"), width, x, rate)?;
        let y = graph.layer_norm(x, &format!("{name}.norm2"), EPSILON)?;
        let y = graph.projection(y, &format!("{name}.mlp.fc1.weight"), hidden)?;
        let y = graph.bias_gelu(y, &format!("{name}.mlp.fc1.bias"), width)?;
        let y = graph.projection(y, &format!("{name}.mlp.fc2.weight"), width)?;
        added(graph, y, &format!("{name}.mlp.fc2.bias"), hidden, x, rate)
    }
}

/// The branch with its bias, left out of a sample with probability `rate`, and the residual.
fn added(
    graph: &mut Graph,
    branch: Value,
    bias: &str,
    fan_in: usize,
    residual: Value,
    rate: f64,
) -> Result<Value, PlanError> {
    if rate == 0.0 {
        return graph.bias_add(branch, bias, fan_in, residual);
    }
    let branch = graph.bias(branch, bias, fan_in)?;
    let kept = graph.drop_path(branch, rate)?;
    graph.add(kept, residual)
}

/// Linear layers start normal with standard deviation 0.02 and with biases of zero. The patch embedding, which is a
/// convolution, starts uniform, as PyTorch starts one.
fn initial(name: &str, kind: TensorKind) -> Option<Initial> {
    match kind {
        TensorKind::Projection { .. } | TensorKind::Linear { .. } => Some(Initial::Normal { std: 0.02 }),
        TensorKind::Bias(_) if name != "patch_embed.proj.bias" => Some(Initial::Constant(0.0)),
        TensorKind::Convolution { kernel, inputs, .. } => Some(Initial::Uniform { fan_in: kernel * kernel * inputs }),
        _ => None,
    }
}

/// The [`VisionTransformer`] of 12 blocks with this patch, width and number of heads, and stochastic depth of so many
/// hundredths.
pub(super) fn named<const PATCH: usize, const WIDTH: usize, const HEADS: usize, const DROPPED: usize>(
    images: Shape,
    classes: usize,
    _: Shortcut,
) -> Result<(Graph, Value), PlanError> {
    let drop_path = DROPPED as f64 / 100.0;
    VisionTransformer { patch: PATCH, width: WIDTH, depth: 12, heads: HEADS, drop_path }.trace(images, classes)
}
