//! Batch norm, with the sum with a residual and the ReLU that may follow it.
//!
//! On tensor cores a convolution before or after it takes its sums over rows:
//! [`convolution_batch_norm`](super::convolution_batch_norm) says which and when.

use std::ops::Range;

use super::{ExtraMemory, Operation, Site, place_of_dx};
use crate::arena::{ALIGNMENT, Initial, TensorKind};
use crate::device::{self, Buffer, Compute, Device, Disjoint, Scalar, SliceMut};
use crate::kernels::batch_norm::{
    self, Activation, Backward, BackwardTangents, BatchNormShape, Forward, ForwardTangents, Gradients, Mode,
    Normalized, ResidualGradient, RunningUpdate, Saved, Summed,
};
use crate::kernels::layers;
use crate::plan::graph::{Graph, Parameter, Place, Shape, Value};
use crate::plan::memory_plan::master_len;
use crate::plan::pass::{
    BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands, ParameterGradients, Weights,
};
use crate::plan::{PlanError, PlanOptions};

/// Added to the variance, as everywhere in the field.
const EPSILON: f64 = 1e-5;
/// How much of a running statistic each batch of training replaces.
pub(in crate::plan) const RUNNING_MOMENTUM: f64 = 0.1;

/// `y = γ (x − μ)/√(σ² + ε) + β`, plus the residual if there is one, then a ReLU if asked for. μ and σ² are those of
/// the batch in training, and the running statistics in evaluation.
#[derive(Debug, Clone, Copy)]
pub(in crate::plan) struct BatchNorm {
    pub(super) x: Value,
    pub(super) y: Value,
    pub(super) scale: Parameter,
    pub(super) shift: Parameter,
    /// The index of the running mean in the layout of the statistics. The running variance follows it.
    statistics: usize,
    residual: Option<Value>,
    relu: bool,
    /// Of x, y and the residual.
    shape: Shape,
}

/// The positions of what the forward keeps for the backward.
const MEAN: usize = 0;
const INV_STD: usize = 1;

impl Graph {
    /// Batch norm over samples and pixels, then the sum with `residual` if there is one, then a ReLU if asked for: one
    /// pass. Makes the parameters `NAME.weight` (γ = 1 at the start) and `NAME.bias` (β = 0), and the statistics
    /// `NAME.running_mean` and `NAME.running_var`.
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken, [`PlanError::Shape`] for a residual of another
    /// shape.
    pub fn batch_norm(
        &mut self,
        x: Value,
        name: &str,
        residual: Option<Value>,
        relu: bool,
    ) -> Result<Value, PlanError> {
        let shape = self.shape(x);
        if let Some(residual) = residual {
            self.same_shape(name, x, residual)?;
        }
        let channels = shape.channels;
        let scale = self.parameter(format!("{name}.weight"), TensorKind::Scale(channels), Initial::Constant(1.0))?;
        let shift = self.parameter(format!("{name}.bias"), TensorKind::Shift(channels), Initial::Constant(0.0))?;
        let mean = format!("{name}.running_mean");
        let statistics = self.statistic(mean, TensorKind::RunningMean(channels), Initial::Constant(0.0));
        self.statistic(format!("{name}.running_var"), TensorKind::RunningVar(channels), Initial::Constant(1.0));
        let y = self.value(shape);
        self.push(BatchNorm { x, y, scale, shift, statistics, residual, relu, shape });
        Ok(y)
    }
}

impl BatchNorm {
    pub(super) fn rows_and_channels(&self) -> BatchNormShape {
        BatchNormShape { rows: self.shape.rows(), channels: self.shape.channels }
    }

    /// What followed the normalisation, and where the mask of the ReLU comes from: its output after a residual sum, and
    /// x otherwise, from which it is computed again.
    fn activation<'a, S: Compute>(
        &self,
        values: &mut Operands<'a, S>,
        weights: &Weights<'a, S>,
    ) -> device::Result<Activation<'a, S>> {
        Ok(match (self.relu, self.residual) {
            (false, _) => Activation::Identity,
            (true, None) => Activation::ReluRecomputed { beta: weights.get(self.shift)? },
            (true, Some(_)) => Activation::Relu { y: values.read(self.y)? },
        })
    }

    /// The forward's input and what it kept. `index` is the operation's own index.
    pub(super) fn normalized<'a, S: Compute>(
        &self,
        index: usize,
        values: &mut Operands<'a, S>,
        weights: &Weights<'a, S>,
    ) -> device::Result<Normalized<'a, S>> {
        Ok(Normalized {
            x: values.read(self.x)?,
            gamma: weights.get(self.scale)?,
            mean: values.kept(index, MEAN)?,
            inv_std: values.kept(index, INV_STD)?,
            activation: self.activation(values, weights)?,
        })
    }

    /// Where the gradient of the residual goes, if it needs one.
    fn residual_gradient<'a, S: Compute>(
        &self,
        values: &mut Operands<'a, S>,
    ) -> device::Result<Option<ResidualGradient<'a, S>>> {
        let Some(residual) = self.residual else { return Ok(None) };
        let place = values.input_gradient(1, residual)?;
        Ok(place.map(|(gradient, accumulate)| ResidualGradient { gradient, accumulate }))
    }

    /// Where dγ and dβ go: to the gradient of the parameters, and where that has no place for them to the scratch.
    pub(super) fn places_of_sums<'s, T: Scalar>(
        &self,
        gradients: &'s mut Option<ParameterGradients<'_, T>>,
        scratch: &mut Disjoint<'s, T>,
        (dgamma, dbeta): (Range<usize>, Range<usize>),
    ) -> device::Result<[SliceMut<'s, T>; 2]> {
        let pair = gradients.as_mut().map(|gradients| gradients.pair(self.scale, self.shift)).transpose()?;
        let [scale, shift] = pair.unwrap_or([None, None]);
        Ok([scale.map_or_else(|| scratch.write(dgamma), Ok)?, shift.map_or_else(|| scratch.write(dbeta), Ok)?])
    }

    /// The parts of the backward's scratch.
    pub(super) fn scratch<S: Compute>(&self, accumulate: bool) -> Scratch {
        let (channels, pitch) = (self.shape.channels, self.shape.channels.next_multiple_of(ALIGNMENT));
        let dx = if accumulate { master_len::<S, S>(self.shape.len()) } else { 0 };
        Scratch { dgamma: 0..channels, dbeta: pitch..pitch + channels, dx: 2 * pitch..2 * pitch + dx }
    }
}

/// The scratch of the backward: dγ and dβ where the pass asks for no gradients of them, and dx where another
/// operation has begun the gradient of x, because the kernels of batch norm do not add.
pub(super) struct Scratch {
    pub dgamma: Range<usize>,
    pub dbeta: Range<usize>,
    dx: Range<usize>,
}

impl Operation for BatchNorm {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), self.residual]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.scale), Some(self.shift)]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.x), (self.relu && self.residual.is_some()).then_some(self.y)]
    }

    /// Mean and inverse deviation are kept.
    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let channels = self.shape.channels;
        let backward = if site.backward { self.scratch::<S>(site.accumulate[0]).dx.end } else { 0 };
        ExtraMemory { kept: [channels, channels], backward, ..ExtraMemory::default() }
    }

    /// A channel with one value has no variance to train with.
    fn prepare<S: Compute>(&self, _: &Device, places: &[Place], options: PlanOptions) -> Result<(), PlanError> {
        if options.batch_norm == Mode::Eval || self.shape.rows() >= 2 {
            return Ok(());
        }
        let operation = places[self.scale].name.clone();
        let reason = format!("training needs two values per channel or more, found {}", self.shape);
        Err(PlanError::Shape { operation, reason })
    }

    fn always_writes_input_gradient(&self) -> bool {
        true
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let ForwardPass { values, weights, .. } = &mut pass;
        let shape = self.rows_and_channels();
        let saved = Saved { mean: values.kept_mut(MEAN)?, inv_std: values.kept_mut(INV_STD)? };
        let input = Forward {
            x: values.read(self.x)?,
            gamma: weights.get(self.scale)?,
            beta: weights.get(self.shift)?,
            eps: EPSILON,
            residual: self.residual.map(|value| values.read(value)).transpose()?,
            relu: self.relu,
        };
        let y = values.write(self.y)?;
        let [means, variances] = pass.statistics.places([self.statistics, self.statistics + 1]);
        if pass.mode == Mode::Eval {
            let (mean, var) = (pass.statistics.committed.slice(means)?, pass.statistics.committed.slice(variances)?);
            return batch_norm::forward_eval(shape, input, mean, var, y, saved);
        }
        let mut next = pass.statistics.next.map(Buffer::disjoint);
        let running = match &mut next {
            Some(next) => Some(RunningUpdate {
                momentum: pass.statistics.share,
                mean: pass.statistics.current.slice(means.clone())?,
                var: pass.statistics.current.slice(variances.clone())?,
                next_mean: next.write(means)?,
                next_var: next.write(variances)?,
            }),
            None => None,
        };
        match pass.values.tile_moments(self.x)? {
            Some(moments) => batch_norm::forward_from_moments(shape, input, moments, y, saved, running),
            None => batch_norm::forward_train(shape, input, y, saved, running, pass.workspace),
        }
    }

    /// With `dz = dy` where the ReLU passed and 0 elsewhere, `dβ = Σ dz` and `dγ = Σ dz x̂` over the rows, with `x̂ =
    /// (x − μ)/√(σ² + ε)`, and in training `dx = γ/√(σ² + ε) (dz − dβ/rows − x̂ dγ/rows)`. The residual's gradient is
    /// dz.
    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let (shape, index) = (self.rows_and_channels(), pass.values.index());
        let Normalized { x, gamma, mean, inv_std, activation } =
            self.normalized(index, &mut pass.values, &pass.weights)?;
        let dy = pass.values.gradient(self.y)?;
        let residual = self.residual_gradient(&mut pass.values)?;
        let ranges = self.scratch::<S>(pass.values.accumulates(0));
        let mut scratch = pass.values.backward_scratch()?;
        let mut scratch = scratch.disjoint();
        let (mut dx, sum) = place_of_dx(self.x, &mut pass.values, scratch.write(ranges.dx)?)?;
        let [dgamma, dbeta] = self.places_of_sums(&mut pass.gradients, &mut scratch, (ranges.dgamma, ranges.dbeta))?;
        if pass.values.is_summed() {
            let (dgamma, dbeta) = (dgamma.view(), dbeta.view());
            let summed = Summed { x, dz: dy, gamma, mean, inv_std, dgamma, dbeta };
            batch_norm::backward_from_sums(shape, pass.mode, summed, dx.reborrow(), residual)?;
        } else {
            let input = Backward { x, dy, gamma, mean, inv_std, activation };
            let gradients = Gradients { dx: dx.reborrow(), dgamma, dbeta };
            batch_norm::backward(shape, pass.mode, input, gradients, residual, pass.workspace)?;
        }
        sum.map_or(Ok(()), |sum| layers::add_to(dx.view(), sum))
    }

    /// The tangents of mean and inverse deviation are kept in the arena of the tangents. In evaluation they are zero.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let index = pass.values.index();
        let input = self.normalized(index, &mut pass.values, &pass.weights)?;
        let tangents = ForwardTangents {
            x: pass.tangents.read(self.x)?,
            gamma: pass.direction.get(self.scale)?,
            beta: pass.direction.get(self.shift)?,
            residual: self.residual.map(|value| pass.tangents.read(value)).transpose()?,
        };
        let saved = Saved { mean: pass.tangents.kept_mut(MEAN)?, inv_std: pass.tangents.kept_mut(INV_STD)? };
        let y = pass.tangents.write(self.y)?;
        batch_norm::forward_tangent(self.rows_and_channels(), pass.mode, input, tangents, y, saved, pass.workspace)
    }

    /// Reads dγ and dβ from the scratch, where the backward leaves them in a pass without gradients of parameters.
    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let (shape, index) = (self.rows_and_channels(), pass.values.index());
        let Normalized { x, gamma, mean, inv_std, activation } =
            self.normalized(index, &mut pass.values, &pass.weights)?;
        let input = Backward { x, dy: pass.values.gradient(self.y)?, gamma, mean, inv_std, activation };
        let ranges = self.scratch::<S>(pass.values.accumulates(0));
        let sums = pass.values.backward_scratch()?;
        let tangents = BackwardTangents {
            x: pass.tangents.read(self.x)?,
            dy: pass.tangents.gradient(self.y)?,
            gamma: pass.direction.get(self.scale)?,
            mean: pass.tangents.kept(index, MEAN)?,
            inv_std: pass.tangents.kept(index, INV_STD)?,
            dgamma: sums.view().slice(ranges.dgamma.clone())?,
            dbeta: sums.view().slice(ranges.dbeta.clone())?,
        };
        let residual = self.residual_gradient(&mut pass.tangents)?;
        let mut scratch = pass.tangents.backward_scratch()?;
        let mut scratch = scratch.disjoint();
        let (mut dx, sum) = place_of_dx(self.x, &mut pass.tangents, scratch.write(ranges.dx)?)?;
        let mut product = Some(pass.product);
        let [dgamma, dbeta] = self.places_of_sums(&mut product, &mut scratch, (ranges.dgamma, ranges.dbeta))?;
        let gradients = Gradients { dx: dx.reborrow(), dgamma, dbeta };
        batch_norm::backward_tangent(shape, pass.mode, input, tangents, gradients, residual, pass.workspace)?;
        sum.map_or(Ok(()), |sum| layers::add_to(dx.view(), sum))
    }
}
