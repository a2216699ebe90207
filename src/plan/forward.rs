//! The forward pass, and the loss.

use super::Plan;
use super::ops::Operation;
use super::ops::batch_norm::RUNNING_MOMENTUM;
use super::pass::{ForwardPass, Frozen, Operands, StatisticsBuffers, Weights};
use super::second_pass::PassBuffers;
use crate::device::{Compute, Result, Scalar, Slice, SliceMut};
use crate::kernels::loss::{self, LossShape, Targets};
use crate::objective::RunningStats;

impl<S: Compute> Plan<S> {
    /// All operations in their order. The weights must have been [rounded](Plan::round).
    pub(super) fn forward(&mut self, weights: Slice<'_, S::Master>, running_stats: RunningStats) -> Result<()> {
        self.forward_with(weights, (running_stats == RunningStats::Update).then_some(RUNNING_MOMENTUM))
    }

    /// The same, where the batch replaces this share of each running statistic, if it is to replace any.
    pub(super) fn forward_with(&mut self, weights: Slice<'_, S::Master>, share: Option<f64>) -> Result<()> {
        let PassBuffers { arena, rounded, workspace } = &mut self.buffers;
        let frozen = Frozen::new(&self.statistics, &self.frozen)?;
        let weights = Weights::new(&self.places, weights, rounded, frozen)?;
        // The first pass of a step that updates the statistics starts from the committed ones, each further one from
        // the result of the one before.
        let [even, odd] = &mut self.pending;
        let (current, next) = match self.reported {
            0 => (&self.statistics, even),
            count if count % 2 == 1 => (&*even, odd),
            _ => (&*odd, even),
        };
        for (index, op) in self.ops.iter().enumerate() {
            op.forward(ForwardPass {
                values: Operands::new(&self.memory, index, arena),
                weights,
                mode: self.options.batch_norm,
                factors: &self.factors,
                statistics: StatisticsBuffers {
                    layout: &self.statistics_layout,
                    committed: &self.statistics,
                    current,
                    next: share.map(|_| &mut *next),
                    share: share.unwrap_or(0.0),
                },
                workspace,
            })?;
        }
        Ok(())
    }

    /// The mean loss over the first `samples`, and its gradient with respect to the logits if `gradient` is set. The
    /// number of correct predictions is added to [`Plan::correct`] if the pass is `reported`. `flag` is set where the
    /// loss is not finite.
    pub(super) fn loss(
        &mut self,
        samples: usize,
        gradient: bool,
        reported: bool,
        loss: SliceMut<'_, f64>,
        flag: Option<SliceMut<'_, u32>>,
    ) -> Result<()> {
        let counter = if reported { 0..1 } else { 1..2 };
        let shape = LossShape { batch: samples, classes: self.classes() };
        let mut arena = self.buffers.arena.disjoint();
        let logits = arena.read(self.memory.value(self.logits))?.slice(0..samples * shape.classes)?;
        let mut dlogits = if gradient { Some(arena.write(self.memory.gradient(self.logits))?) } else { None };
        let counted = samples * shape.classes;
        let dlogits = dlogits.as_mut().map(|all| with_zeros_behind(all, counted)).transpose()?;
        let others = if self.mixed { Some((self.others.slice(0..samples)?, self.share.view())) } else { None };
        let targets =
            Targets { labels: self.labels.slice(0..samples)?, mixed: others, smoothing: self.options.label_smoothing };
        let mut sample_losses = arena.write(self.memory.sample_losses())?;
        loss::cross_entropy(
            &shape,
            logits,
            targets,
            dlogits,
            self.loss_scale.as_ref().map(|state| state.view()),
            sample_losses.slice_mut(0..samples)?,
            loss,
            self.correct.slice_mut(counter)?,
            flag,
        )
    }
}

/// The first `len` elements, to write. The others become zero: samples that do not count have no gradient.
pub(super) fn with_zeros_behind<'a, T: Scalar>(all: &'a mut SliceMut<'_, T>, len: usize) -> Result<SliceMut<'a, T>> {
    if len < all.len() {
        all.slice_mut(len..all.len())?.clear()?;
    }
    all.slice_mut(0..len)
}
