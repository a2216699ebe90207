//! What convolution and batch norm do for each other on a GPU's tensor cores.
//!
//! Batch norm needs sums over all rows before it can write its first output. A convolution next to it has the same
//! numbers in registers, so it takes these sums while it computes, and batch norm reads its input once less.
//!
//! **Forward.** Where a batch norm in training reads the output of a convolution, the convolution leaves the moments of
//! its output's tiles (`conv::forward_with_moments`), and batch norm combines them
//! (`batch_norm::forward_from_moments`). The moments live from the convolution's forward to that of the last batch norm
//! that reads them. All types for tensor cores have this form.
//!
//! **Backward.** Where a convolution reads the output of a batch norm and is the last operation to add to the gradient
//! dy of that output, its input gradient does the first half of batch norm's backward
//! (`conv::input_gradient_with_sums`). It stores in place of dy the gradient behind the ReLU, dz, and leaves dγ and dβ
//! where batch norm would leave them: in the gradient of the parameters, or in the scratch of batch norm's backward
//! where the pass asks for none. That scratch therefore lives from the convolution's backward on. Batch norm then
//! computes dx and the gradient of the residual from dz and these sums (`batch_norm::backward_from_sums`). Types of 16
//! bits have this form, for channels in whole eights.
//!
//! Tangents use the plain kernels of both operations. Where a tangent of the backward reads dy, it finds dz, which the
//! mask of the ReLU leaves as it is.

use super::batch_norm::BatchNorm;
use super::convolution::Convolution;
use super::{Op, Operation};
use crate::device::{self, Compute, Device, Slice, SliceMut};
use crate::kernels::batch_norm::{Mode, Workspace};
use crate::kernels::conv;
use crate::plan::graph::Value;
use crate::plan::pass::BackwardPass;

/// The moments that a convolution leaves: their length, and the operation that reads them last.
pub(in crate::plan) struct TileMoments {
    pub len: usize,
    pub last: usize,
}

/// By operation: the moments that it leaves, if it is a convolution that does.
pub(in crate::plan) fn tile_moments<S: Compute>(device: &Device, ops: &[Op], mode: Mode) -> Vec<Option<TileMoments>> {
    let found = |op: &Op| {
        let Op::Convolution(convolution) = op else { return None };
        let normalizes = |op: &Op| matches!(op, Op::BatchNorm(norm) if norm.x == convolution.y);
        let last = ops.iter().rposition(normalizes).filter(|_| mode == Mode::Train)?;
        Some(TileMoments { len: convolution.shape.moments_len::<S>(device)?, last })
    };
    ops.iter().map(found).collect()
}

/// The batch norm whose dz, dγ and dβ a convolution leaves, and its index.
#[derive(Debug, Clone, Copy)]
pub(in crate::plan) struct SumsFor {
    pub index: usize,
    norm: BatchNorm,
}

/// By operation: the batch norm before it, if it is a convolution that leaves sums for that. `differentiated` tells
/// whether the backward of the operation that writes an activation runs.
pub(in crate::plan) fn sums_for<S: Compute>(
    device: &Device,
    ops: &[Op],
    logits: Value,
    differentiated: impl Fn(Value) -> bool,
) -> Vec<Option<SumsFor>> {
    let mut found = vec![None; ops.len()];
    for (index, op) in ops.iter().enumerate() {
        let Op::BatchNorm(norm) = op else { continue };
        // The first operation to read an activation is the last to add to its gradient.
        let reader = ops.iter().position(|reader| reader.inputs().contains(&Some(norm.y)));
        if let Some(first) = reader.filter(|_| norm.y != logits)
            && let Op::Convolution(convolution) = &ops[first]
            && differentiated(norm.y)
            && differentiated(convolution.y)
            && convolution.shape.leaves_sums::<S>(device)
        {
            found[first] = Some(SumsFor { index, norm: *norm });
        }
    }
    found
}

/// The room for sums over rows that the operations of a pass need, one after the other.
pub(in crate::plan) fn workspace<S: Compute>(
    device: &Device,
    ops: &[Op],
    sums_for: &[Option<SumsFor>],
) -> device::Result<Workspace> {
    let normalized = ops.iter().filter_map(|op| match op {
        Op::BatchNorm(norm) => Some(norm.rows_and_channels()),
        _ => None,
    });
    let convolutions = ops.iter().zip(sums_for).filter_map(|(op, sums_for)| match op {
        Op::Convolution(convolution) if sums_for.is_some() => Some(&convolution.shape),
        _ => None,
    });
    Workspace::new(device, normalized)?.with_convolutions::<S>(convolutions)
}

/// The backward of a convolution that leaves sums: adds to or writes dz, and writes dγ and dβ.
pub(super) fn input_gradient_with_sums<S: Compute>(
    convolution: &Convolution,
    SumsFor { index, norm }: SumsFor,
    mut pass: BackwardPass<'_, S>,
    dy: Slice<'_, S>,
    dz: SliceMut<'_, S>,
    accumulate: bool,
) -> device::Result<()> {
    let weight = pass.weights.stored(convolution.weight)?;
    let normalized = norm.normalized(index, &mut pass.values, &pass.weights)?;
    let ranges = norm.scratch::<S>(pass.values.accumulates_of(index, 0));
    let mut scratch = pass.values.backward_scratch_of(index)?;
    let mut scratch = scratch.disjoint();
    let [dgamma, dbeta] = norm.places_of_sums(&mut pass.gradients, &mut scratch, (ranges.dgamma, ranges.dbeta))?;
    let shape = &convolution.shape;
    conv::input_gradient_with_sums(shape, dy, weight, dz, accumulate, normalized, dgamma, dbeta, pass.workspace)
}
