//! The class token before the patches of an image, and the position embedding (Dosovitskiy et al. 2021):
//! `kernels/tokens.cu`.

use super::Check;
use super::layers::elements;
use crate::device::arguments::{EmbedTokensArgs, EmbedTokensBackwardArgs};
use crate::device::{Compute, Result, Slice, SliceMut, id};

#[cfg(doc)]
use crate::device::Error;

/// The shape of the tokens, the class token included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokensShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample: one more than its patches.
    pub tokens: usize,
    /// Numbers of a token.
    pub channels: usize,
}

impl TokensShape {
    /// Elements of the tokens and of the patches.
    fn lengths(self, check: Check<'_>) -> Result<[usize; 2]> {
        let len = elements(check.operation, &[self.batch, self.tokens, self.channels])?;
        if len == 0 || self.tokens < 2 {
            return check.refuse(format!("expected patches and a class token, found {self:?}"));
        }
        Ok([len, len - self.batch * self.channels])
    }
}

/// `y[n, t] = positions[t] + (t = 0 ? token : patches[n, t − 1])`. The map is linear in patches, token and positions
/// together, and so it is its own tangent. Traffic: reads the patches, writes y.
///
/// # Errors
/// [`Error::Argument`] for fewer than two tokens or 2³² elements and more, [`Error::Length`] and
/// [`Error::OtherDevice`].
pub fn embed<S: Compute>(
    shape: TokensShape,
    patches: Slice<'_, S>,
    token: Slice<'_, S::Master>,
    positions: Slice<'_, S::Master>,
    mut y: SliceMut<'_, S>,
) -> Result<()> {
    let device = patches.device();
    let check = Check { operation: "tokens::embed", device };
    let [len, patches_len] = shape.lengths(check)?;
    check.argument("patches", patches, patches_len)?;
    check.argument("token", token, shape.channels)?;
    check.argument("positions", positions, shape.tokens * shape.channels)?;
    check.argument("y", y.view(), len)?;
    let args = EmbedTokensArgs {
        patches: patches.address(),
        token: token.address(),
        positions: positions.address(),
        y: y.address(),
        batch: shape.batch as u32,
        tokens: shape.tokens as u32,
        channels: shape.channels as u32,
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::EMBED_TOKENS), device.elementwise(len, 4), &args) }
}

/// The gradient of [`embed`] with respect to the patches, `dpatches[n, t] = dy[n, t + 1]`; written, or with
/// `accumulate` added. Those of the positions and of the token are sums of dy over the samples
/// ([`bias::row_sums`](super::bias::row_sums)). Traffic: reads dy, writes dpatches; accumulating reads it too.
///
/// # Errors
/// As [`embed`].
pub fn embed_backward<S: Compute>(
    shape: TokensShape,
    dy: Slice<'_, S>,
    mut dpatches: SliceMut<'_, S>,
    accumulate: bool,
) -> Result<()> {
    let device = dy.device();
    let check = Check { operation: "tokens::embed_backward", device };
    let [len, patches_len] = shape.lengths(check)?;
    check.argument("dy", dy, len)?;
    check.argument("dpatches", dpatches.view(), patches_len)?;
    let args = EmbedTokensBackwardArgs {
        dy: dy.address(),
        dpatches: dpatches.address(),
        batch: shape.batch as u32,
        tokens: shape.tokens as u32,
        channels: shape.channels as u32,
        accumulate: accumulate.into(),
    };
    // SAFETY: the lengths are those of the shape.
    unsafe { device.launch(S::choose(id::EMBED_TOKENS_BACKWARD), device.elementwise(patches_len, 4), &args) }
}
