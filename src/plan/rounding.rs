//! The weights as convolutions read them: in 16 bits rounded to the storage type before a pass.
//!
//! Convolutions alone read rounded weights, those of linear layers over tokens included. Their weights are the first of
//! the arena, because weights come before biases and because in 16 bits the only other linear layer is the last.

use super::Plan;
use crate::arena::{Layout, TensorKind};
use crate::device::{Buffer, Compute, Result, Slice, SliceMut};
use crate::kernels::{check_length, vector};
use crate::objective::Displacement;

/// How many of the first weights are rounded: those of all convolutions, or none where the storage type is as wide as
/// the master type.
pub(super) fn rounded_len<S: Compute>(parameters: &Layout) -> usize {
    if !S::NARROW {
        return 0;
    }
    let is_rounded = |kind| matches!(kind, TensorKind::Convolution { .. } | TensorKind::Projection { .. });
    let others = parameters.tensors().iter().filter(|tensor| !is_rounded(tensor.kind));
    others.map(|tensor| tensor.range().start).min().unwrap_or(parameters.len())
}

/// Rounds the first elements of a vector, as many as `rounded` holds: reads 4 B and writes 2 B each.
pub(super) fn round<S: Compute>(wide: Slice<'_, S::Master>, rounded: &mut Buffer<S>) -> Result<()> {
    if rounded.is_empty() { Ok(()) } else { vector::convert(wide.slice(0..rounded.len())?, rounded.view_mut()) }
}

impl<S: Compute> Plan<S> {
    /// Rounds the weights of convolutions for the next pass.
    pub(super) fn round(&mut self, weights: Slice<'_, S::Master>) -> Result<()> {
        check_length("Plan::round", "weights", weights.len(), self.parameters.len())?;
        round(weights, &mut self.buffers.rounded)
    }
}

/// Displaces `len` weights for a pass, or for two passes on both sides. Of each point, the first buffer receives the
/// rounded weights of convolutions, and the second all others in the master type, at their places.
pub(super) fn displace<S: Compute>(
    len: usize,
    Displacement { from, along, norm, rho }: Displacement<'_, S::Master>,
    (rounded, mut wide): (&mut Buffer<S>, SliceMut<'_, S::Master>),
    other: Option<(&mut Buffer<S>, SliceMut<'_, S::Master>)>,
) -> Result<()> {
    let (first, rest) = (0..rounded.len(), rounded.len()..len);
    let (other_rounded, mut other_wide) = other.unzip();
    let lengths = [("from", from.len()), ("along", along.len()), ("point", wide.len())];
    let other_length = other_wide.as_ref().map(|wide| ("point", wide.len()));
    for (name, found) in lengths.into_iter().chain(other_length) {
        check_length("Plan::gradient_displaced", name, found, len)?;
    }
    let other_rounded = other_rounded.map(Buffer::view_mut);
    vector::perturb(from.slice(first.clone())?, along.slice(first)?, norm, rho, rounded.view_mut(), other_rounded)?;
    let other_wide = other_wide.as_mut().map(|wide| wide.slice_mut(rest.clone())).transpose()?;
    let (from, along) = (from.slice(rest.clone())?, along.slice(rest.clone())?);
    vector::perturb(from, along, norm, rho, wide.slice_mut(rest)?, other_wide)
}
