//! The forward pass, and the loss.

use super::graph::{Op, Shape};
use super::places::Parts;
use super::{EPSILON, Plan, RUNNING_MOMENTUM, batch_norm_shape, convolved};
use crate::device::{Compute, Result, Slice, SliceMut};
use crate::kernels::batch_norm::{self, Forward, Mode, Running};
use crate::kernels::loss::{self, LossShape};
use crate::kernels::{conv, layers};
use crate::objective::RunningStats;

impl<S: Compute> Plan<S> {
    /// All operations in their order. The weights have been [rounded](Plan::round).
    pub(super) fn forward(&mut self, weights: Slice<'_, S::Master>, pass: RunningStats) -> Result<()> {
        let Self { ops, places, arena, rounded, statistics, pending, reported, sums, .. } = self;
        let convolved = convolved(weights, rounded)?;
        // The first reported pass of a step begins with the statistics, each further one with what the one before made of them.
        let [even, odd] = pending;
        let (running, next) = match *reported {
            0 => (&*statistics, even),
            count if count % 2 == 1 => (&*even, odd),
            _ => (&*odd, even),
        };
        for (index, op) in ops.iter().enumerate() {
            let mut parts = Parts::<S>::new(places, arena);
            let weight = |parameter: usize| weights.slice(self.parameters.tensors()[parameter].range());
            match *op {
                Op::Convolution { x, y, weight: w, ref shape } => {
                    let scratch = parts.scratch(places.scratch[index].0)?;
                    let weight = convolved.slice(self.parameters.tensors()[w].range())?;
                    let (x, moments) = (parts.read(x)?, parts.tile_moments_mut(y)?);
                    match moments {
                        Some(moments) => conv::forward_with_moments(shape, x, weight, parts.write(y)?, moments)?,
                        None => conv::forward(shape, x, weight, parts.write(y)?, false, scratch)?,
                    }
                }
                Op::BatchNorm { x, y, scale, shift, statistics: first, residual, relu } => {
                    let shape = batch_norm_shape(self.shapes[x.0]);
                    let saved = parts.moments_mut(index)?;
                    let residual = residual.map(|value| parts.read(value)).transpose()?;
                    let (gamma, beta) = (weight(scale)?, weight(shift)?);
                    let input = Forward { x: parts.read(x)?, gamma, beta, eps: EPSILON, residual, relu };
                    let y = parts.write(y)?;
                    let tensors = self.statistics_layout.tensors();
                    let (means, vars) = (tensors[first].range(), tensors[first + 1].range());
                    match self.options.batch_norm {
                        Mode::Train => {
                            let (mean, var) = (running.slice(means.clone())?, running.slice(vars.clone())?);
                            let mut next = next.disjoint();
                            let (next_mean, next_var) = (next.write(means)?, next.write(vars)?);
                            let running = Running { momentum: RUNNING_MOMENTUM, mean, var, next_mean, next_var };
                            let running = (pass == RunningStats::Update).then_some(running);
                            match parts.tile_moments(x)? {
                                Some(moments) => {
                                    batch_norm::forward_from_moments(shape, input, moments, y, saved, running)?;
                                }
                                None => batch_norm::forward_train(shape, input, y, saved, running, sums)?,
                            }
                        }
                        Mode::Eval => {
                            let (mean, var) = (statistics.slice(means)?, statistics.slice(vars)?);
                            batch_norm::forward_eval(shape, input, mean, var, y, saved)?;
                        }
                    }
                }
                Op::Relu { x, y } => layers::relu(parts.read(x)?, parts.write(y)?)?,
                Op::Add { a, b, y } => layers::add(parts.read(a)?, parts.read(b)?, parts.write(y)?)?,
                Op::AveragePool { x, y, ref shape } => layers::average_pool(shape, parts.read(x)?, parts.write(y)?)?,
                Op::GlobalAveragePool { x, y } => {
                    let Shape { batch, height, width, channels } = self.shapes[x.0];
                    layers::global_average_pool(batch, height * width, channels, parts.read(x)?, parts.write(y)?)?;
                }
                Op::Shortcut { x, y, ref shape } => layers::shortcut(shape, parts.read(x)?, parts.write(y)?)?,
                Op::Linear { x, y, weight: w, bias, ref shape } => {
                    let (x, y) = (parts.read(x)?, parts.write_wide(y)?);
                    layers::linear(shape, x, weight(w)?, Some(weight(bias)?), y, false)?;
                }
            }
        }
        Ok(())
    }

    /// The mean loss over the first `samples`, and where asked for its gradient with respect to the logits. Correct predictions are
    /// added to [`Plan::correct`] if the pass is `reported`. `flag` is set where the loss is not finite.
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
        let mut parts = Parts::<S>::new(&self.places, &mut self.arena);
        let len = samples * shape.classes;
        let logits = parts.read_wide(self.logits)?.slice(0..len)?;
        let dlogits = if gradient { Some(parts.gradient_wide_mut(self.logits)?) } else { None };
        let mut sample_losses = parts.slot_mut(self.places.sample_losses)?;
        loss::cross_entropy(
            &shape,
            logits,
            self.labels.slice(0..samples)?,
            self.options.label_smoothing,
            dlogits,
            self.loss_scale.as_ref().map(|state| state.view()),
            sample_losses.slice_mut(0..samples)?,
            loss,
            self.correct.slice_mut(counter)?,
            flag,
        )
    }
}
