//! The minimal autodiff: a network is traced once into a list of operations, every activation gets its place in one arena
//! beforehand, and a pass allocates nothing.
//!
//! [`Graph`] traces, [`Plan`] runs. A plan takes the weights to use as an argument, so that the passes of a sharpness-aware
//! step at `w`, `w + ρv` and `w − ρv` share it, and leaves loss, accuracy and gradient on the device.
//! Time in a plan is counted in steps: the forward operations 0 … n−1, the loss n, the backward operations n+1 … 2n (the
//! backward of operation i at 2n − i). Memory is planned over these steps.

mod error;
mod graph;
mod memory;

pub use error::PlanError;
pub use graph::{Graph, Shape, Value};

use crate::arena::Layout;
use crate::device::{Buffer, Device, Disjoint, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::{
    self, Activation, Backward, BatchNormShape, Forward, Gradients, Mode, ResidualGradient, Running, Saved,
};
use crate::kernels::loss::LossShape;
use crate::kernels::{conv, layers, loss, vector};
use crate::objective::{Objective, Statistics};
use graph::Op;
use memory::Slot;

/// Added to the variance in batch norm, as everywhere in the field.
const EPSILON: f64 = 1e-5;
/// How much of a running statistic is replaced by each batch's.
const RUNNING_MOMENTUM: f64 = 0.1;

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanOptions {
    /// Whether it computes gradients; without them activations die young and the arena is small.
    pub backward: bool,
    /// Whether batch norm uses the batch's statistics or the running ones.
    pub batch_norm: Mode,
    /// ε of label smoothing.
    pub label_smoothing: f64,
}

impl PlanOptions {
    /// For training: gradients, batch statistics, no smoothing.
    pub fn training() -> Self {
        Self { backward: true, batch_norm: Mode::Train, label_smoothing: 0.0 }
    }

    /// For evaluation: no gradients, running statistics.
    pub fn evaluation() -> Self {
        Self { backward: false, batch_norm: Mode::Eval, label_smoothing: 0.0 }
    }
}

/// A network ready to run on one device for one batch shape.
pub struct Plan<T: Scalar> {
    device: Device,
    options: PlanOptions,
    ops: Vec<Op>,
    shapes: Vec<Shape>,
    logits: Value,
    parameters: Layout,
    statistics_layout: Layout,
    places: Places,
    arena: Buffer<T>,
    labels: Buffer<u32>,
    /// Correct predictions: of the pass that is reported, and of the others.
    correct: Buffer<u32>,
    statistics: Buffer<T>,
    /// What the statistics become when the step is committed.
    pending: Buffer<T>,
    /// Partial sums of batch norm, in double.
    sums: Buffer<f64>,
}

/// The slot of everything that lies in the arena.
struct Places {
    slots: Vec<Slot>,
    /// By activation.
    values: Vec<usize>,
    /// By activation; none where no gradient is needed.
    gradients: Vec<Option<usize>>,
    /// By operation: batch norm's mean and inverse deviation.
    moments: Vec<Option<(usize, usize)>>,
    /// By operation: scratch of its forward and of its backward.
    scratch: Vec<(Option<usize>, Option<usize>)>,
    /// By operation and input: whether its backward adds to a gradient that another operation has begun.
    accumulate: Vec<[bool; 2]>,
    sample_losses: usize,
    len: usize,
}

impl<T: Scalar> Plan<T> {
    /// Plans a network that ends in `logits`, for softmax cross-entropy.
    ///
    /// # Errors
    /// [`PlanError::NoGradient`] where the loss does not depend on some parameter, [`PlanError::Shape`] for a batch norm in
    /// training whose channels have a single value, [`PlanError::Device`] where the memory is not to be had.
    pub fn new(
        device: &Device,
        graph: Graph,
        logits: Value,
        options: PlanOptions,
    ) -> std::result::Result<Self, PlanError> {
        let parameters = graph.parameters();
        let statistics_layout = graph.statistics();
        let Graph { ops, shapes, .. } = graph;
        for op in &ops {
            if let Op::BatchNorm { x, scale, .. } = op
                && options.batch_norm == Mode::Train
                && shapes[x.0].rows() < 2
            {
                let operation = parameters.tensors()[*scale].name.clone();
                let reason = format!("training needs two values per channel or more, found {}", shapes[x.0]);
                return Err(PlanError::Shape { operation, reason });
            }
        }
        let places = Places::new(device, &ops, &shapes, logits, &parameters, options)?;
        let sums = ops.iter().filter_map(|op| match op {
            Op::BatchNorm { x, .. } => Some(batch_norm_shape(shapes[x.0]).workspace_len(device)),
            _ => None,
        });
        let mut statistics = device.zeros(statistics_layout.len())?;
        let mut start = vec![T::default(); statistics_layout.len()];
        for tensor in statistics_layout.tensors() {
            if matches!(tensor.kind, crate::arena::Kind::RunningVar(_)) {
                start[tensor.range()].fill(T::from_f64(1.0));
            }
        }
        statistics.write(&start)?;
        let mut pending = device.zeros(statistics_layout.len())?;
        pending.write(&start)?;
        Ok(Self {
            arena: device.poisoned(places.len)?,
            labels: device.zeros(shapes[0].batch)?,
            correct: device.zeros(2)?,
            sums: device.zeros(sums.max().unwrap_or(0))?,
            device: device.clone(),
            options,
            ops,
            shapes,
            logits,
            parameters,
            statistics_layout,
            places,
            statistics,
            pending,
        })
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where each parameter lies in the arenas of weights and gradients.
    pub fn parameters(&self) -> &Layout {
        &self.parameters
    }

    /// Where each running statistic lies.
    pub fn statistics_layout(&self) -> &Layout {
        &self.statistics_layout
    }

    /// Bytes of the arena that holds activations, their gradients and scratch.
    pub fn arena_bytes(&self) -> usize {
        self.places.len * size_of::<T>()
    }

    /// Bytes that the same slots would take if none shared memory.
    pub fn unshared_bytes(&self) -> usize {
        self.places.slots.iter().map(|slot| slot.len).sum::<usize>() * size_of::<T>()
    }

    /// The shape of the input batch.
    pub fn input_shape(&self) -> Shape {
        self.shapes[0]
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.shapes[self.logits.0].channels
    }

    /// The batch to work on: normalised images, and labels. They stay until written again.
    ///
    /// # Errors
    /// None: the places lie in their buffers.
    pub fn batch_mut(&mut self) -> Result<(SliceMut<'_, T>, SliceMut<'_, u32>)> {
        let input = self.places.value(Value(0));
        Ok((self.arena.slice_mut(input)?, self.labels.view_mut()))
    }

    /// The logits of the newest pass.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn logits(&self) -> Result<Slice<'_, T>> {
        self.arena.slice(self.places.value(self.logits))
    }

    /// How many samples had their largest logit at the label, in the newest evaluation or pass with [`Statistics::Update`]: one
    /// element. Passes at perturbed weights leave it alone.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn correct(&self) -> Result<Slice<'_, u32>> {
        self.correct.slice(0..1)
    }

    /// The running statistics.
    pub fn statistics(&self) -> &Buffer<T> {
        &self.statistics
    }

    /// Replaces the running statistics.
    ///
    /// # Errors
    /// Those of the copy.
    pub fn set_statistics(&mut self, statistics: Slice<'_, T>) -> Result<()> {
        self.statistics.view_mut().copy_from(statistics)?;
        self.pending.view_mut().copy_from(statistics)
    }

    /// A forward pass at `weights`: leaves the logits, the mean loss over the first `samples` of the batch in `loss` (one
    /// element) and their correct predictions in [`Plan::correct`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn evaluate(&mut self, weights: Slice<'_, T>, samples: usize, loss: SliceMut<'_, f64>) -> Result<()> {
        self.forward(weights, Statistics::Keep)?;
        self.loss(samples, false, Statistics::Update, loss)
    }

    fn forward(&mut self, weights: Slice<'_, T>, statistics: Statistics) -> Result<()> {
        let Self { ops, places, arena, statistics: running, pending, sums, .. } = self;
        for (index, op) in ops.iter().enumerate() {
            let mut parts = Parts { places, arena: arena.disjoint() };
            let weight = |parameter: usize| weights.slice(self.parameters.tensors()[parameter].range());
            match *op {
                Op::Convolution { x, y, weight: w, ref shape } => {
                    let scratch = parts.scratch(places.scratch[index].0)?;
                    conv::forward(shape, parts.read(x)?, weight(w)?, parts.write(y)?, scratch)?;
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
                    let (mean, var) = (running.slice(means.clone())?, running.slice(vars.clone())?);
                    match self.options.batch_norm {
                        Mode::Train => {
                            let mut next = pending.disjoint();
                            let (next_mean, next_var) = (next.write(means)?, next.write(vars)?);
                            let running = Running { momentum: RUNNING_MOMENTUM, mean, var, next_mean, next_var };
                            let running = (statistics == Statistics::Update).then_some(running);
                            let sums = sums.slice_mut(0..shape.workspace_len(&self.device))?;
                            batch_norm::forward_train(shape, input, y, saved, running, sums)?;
                        }
                        Mode::Eval => batch_norm::forward_eval(shape, input, mean, var, y, saved)?,
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
                    layers::linear(shape, parts.read(x)?, weight(w)?, weight(bias)?, parts.write(y)?)?;
                }
            }
        }
        Ok(())
    }

    fn loss(&mut self, samples: usize, gradient: bool, statistics: Statistics, loss: SliceMut<'_, f64>) -> Result<()> {
        let reported = if statistics == Statistics::Update { 0..1 } else { 1..2 };
        let shape = LossShape { batch: samples, classes: self.classes() };
        let mut parts = Parts { places: &self.places, arena: self.arena.disjoint() };
        let len = samples * shape.classes;
        let logits = parts.read(self.logits)?.slice(0..len)?;
        let dlogits = if gradient { Some(parts.gradient_mut(self.logits)?) } else { None };
        let mut sample_losses = parts.slot_mut(self.places.sample_losses)?;
        loss::cross_entropy(
            &shape,
            logits,
            self.labels.slice(0..samples)?,
            self.options.label_smoothing,
            dlogits,
            sample_losses.slice_mut(0..samples)?,
            loss,
            self.correct.slice_mut(reported)?,
        )
    }

    fn backward(&mut self, weights: Slice<'_, T>, gradient: &mut SliceMut<'_, T>) -> Result<()> {
        let Self { ops, places, arena, sums, .. } = self;
        for (index, op) in ops.iter().enumerate().rev() {
            if places.gradients[op.output().0].is_none() {
                continue; // the loss does not depend on it, and it has no parameter, or planning had failed
            }
            let mut parts = Parts { places, arena: arena.disjoint() };
            let range = |parameter: usize| self.parameters.tensors()[parameter].range();
            let weight = |parameter: usize| weights.slice(range(parameter));
            let add = places.accumulate[index];
            match *op {
                Op::Convolution { x, y, weight: w, ref shape } => {
                    let dy = parts.gradient(y)?;
                    let mut scratch = parts.scratch(places.scratch[index].1)?;
                    conv::weight_gradient(
                        shape,
                        parts.read(x)?,
                        dy,
                        gradient.slice_mut(range(w))?,
                        scratch.reborrow(),
                    )?;
                    if let Some(dx) = parts.gradient_if_needed(x)? {
                        conv::input_gradient(shape, dy, weight(w)?, dx, add[0], scratch)?;
                    }
                }
                Op::BatchNorm { x, y, scale, shift, residual, relu, .. } => {
                    let shape = batch_norm_shape(self.shapes[x.0]);
                    let (mean, inv_std) = parts.moments(index)?;
                    let (gamma, beta) = (weight(scale)?, weight(shift)?);
                    let activation = match (relu, residual) {
                        (false, _) => Activation::Identity,
                        (true, None) => Activation::ReluRecomputed { beta },
                        (true, Some(_)) => Activation::Relu { y: parts.read(y)? },
                    };
                    let residual = match residual {
                        Some(value) => parts
                            .gradient_if_needed(value)?
                            .map(|gradient| ResidualGradient { gradient, accumulate: add[1] }),
                        None => None,
                    };
                    let (x_value, dy, dx) = (parts.read(x)?, parts.gradient(y)?, parts.gradient_mut(x)?);
                    let input = Backward { x: x_value, dy, gamma, mean, inv_std, activation };
                    let mut parameters = gradient.disjoint();
                    let (dgamma, dbeta) = (parameters.write(range(scale))?, parameters.write(range(shift))?);
                    let gradients = Gradients { dx, dgamma, dbeta };
                    let sums = sums.slice_mut(0..shape.workspace_len(&self.device))?;
                    batch_norm::backward(shape, self.options.batch_norm, input, gradients, residual, sums)?;
                }
                Op::Relu { x, y } => {
                    if let Some(dx) = parts.gradient_if_needed(x)? {
                        layers::relu_backward(parts.read(y)?, parts.gradient(y)?, dx, add[0])?;
                    }
                }
                Op::Add { a, b, y } => {
                    for (value, accumulate) in [(a, add[0]), (b, add[1])] {
                        // Both sides may be one activation, so each is borrowed on its own.
                        let mut parts = Parts { places, arena: arena.disjoint() };
                        let dy = parts.gradient(y)?;
                        match parts.gradient_if_needed(value)? {
                            Some(dx) if accumulate => vector::axpy(1.0, dy, dx)?,
                            Some(mut dx) => dx.copy_from(dy)?,
                            None => {}
                        }
                    }
                }
                Op::AveragePool { x, y, ref shape } => {
                    if let Some(dx) = parts.gradient_if_needed(x)? {
                        layers::average_pool_backward(shape, parts.gradient(y)?, dx, add[0])?;
                    }
                }
                Op::GlobalAveragePool { x, y } => {
                    let Shape { batch, height, width, channels } = self.shapes[x.0];
                    if let Some(dx) = parts.gradient_if_needed(x)? {
                        let dy = parts.gradient(y)?;
                        layers::global_average_pool_backward(batch, height * width, channels, dy, dx, add[0])?;
                    }
                }
                Op::Shortcut { x, y, ref shape } => {
                    if let Some(dx) = parts.gradient_if_needed(x)? {
                        layers::shortcut_backward(shape, parts.gradient(y)?, dx, add[0])?;
                    }
                }
                Op::Linear { x, y, weight: w, bias, ref shape } => {
                    let mut parameters = gradient.disjoint();
                    let (dweight, dbias) = (parameters.write(range(w))?, parameters.write(range(bias))?);
                    let dx = parts.gradient_if_needed(x)?;
                    let (x, dy) = (parts.read(x)?, parts.gradient(y)?);
                    layers::linear_backward(shape, x, weight(w)?, dy, dx, add[0], dweight, dbias)?;
                }
            }
        }
        Ok(())
    }
}

impl<T: Scalar> Objective<T> for Plan<T> {
    fn len(&self) -> usize {
        self.parameters.len()
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, T>,
        statistics: Statistics,
        mut gradient: SliceMut<'_, T>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        crate::kernels::check_length("Plan::gradient", "weights", weights.len(), self.len())?;
        crate::kernels::check_length("Plan::gradient", "gradient", gradient.len(), self.len())?;
        if !self.options.backward {
            let message = "the plan was made without gradients".into();
            return Err(crate::device::Error::Argument { operation: "Plan::gradient", message });
        }
        self.forward(weights, statistics)?;
        self.loss(self.shapes[0].batch, true, statistics, loss.reborrow())?;
        self.backward(weights, &mut gradient)?;
        vector::check_finite_f64(loss.view(), flag.reborrow())?;
        vector::check_finite(gradient.view(), flag)
    }

    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        vector::commit(skip, self.pending.view(), self.statistics.view_mut())
    }
}

fn batch_norm_shape(shape: Shape) -> BatchNormShape {
    BatchNormShape { rows: shape.rows(), channels: shape.channels }
}

impl Places {
    fn new(
        device: &Device,
        ops: &[Op],
        shapes: &[Shape],
        logits: Value,
        parameters: &Layout,
        options: PlanOptions,
    ) -> std::result::Result<Self, PlanError> {
        let (loss_step, end) = (ops.len(), 2 * ops.len());
        let backward_step = |op: usize| end - op;
        let mut slots = Vec::new();
        let mut slot = |len: usize, first: usize, last: usize| {
            slots.push(Slot::new(len, first, last));
            slots.len() - 1
        };

        // Which activations lead from a parameter to the loss, and so need a gradient.
        let mut trained = vec![false; shapes.len()];
        for op in ops {
            trained[op.output().0] = op.parameters().iter().any(Option::is_some)
                || op.inputs().iter().flatten().any(|input| trained[input.0]);
        }
        let mut first_use = vec![None; shapes.len()];
        let mut accumulate = vec![[false; 2]; ops.len()];
        let mut reached = vec![false; parameters.tensors().len()];
        first_use[logits.0] = Some(loss_step);
        for (index, op) in ops.iter().enumerate().rev() {
            if first_use[op.output().0].is_none() {
                continue;
            }
            op.parameters().iter().flatten().for_each(|&parameter| reached[parameter] = true);
            for (position, input) in op.inputs().iter().enumerate().filter_map(|(p, v)| Some((p, (*v)?))) {
                // Batch norm computes its input's gradient in any case.
                if trained[input.0] || (matches!(op, Op::BatchNorm { .. }) && position == 0) {
                    accumulate[index][position] = first_use[input.0].is_some();
                    first_use[input.0].get_or_insert(backward_step(index));
                }
            }
        }
        if let Some(missing) = reached.iter().position(|&reached| !reached) {
            return Err(PlanError::NoGradient { parameter: parameters.tensors()[missing].name.clone() });
        }

        // The batch and the logits stay for all passes and for the caller.
        let mut last_use: Vec<usize> = vec![0; shapes.len()];
        let mut made: Vec<usize> = vec![0; shapes.len()];
        for (index, op) in ops.iter().enumerate() {
            made[op.output().0] = index;
            last_use[op.output().0] = index;
            op.inputs().iter().flatten().for_each(|input| last_use[input.0] = index);
        }
        if options.backward {
            for (index, op) in ops.iter().enumerate() {
                for value in op.saved().iter().flatten() {
                    last_use[value.0] = last_use[value.0].max(backward_step(index));
                }
            }
        }
        (last_use[0], last_use[logits.0]) = (end, end);
        let values: Vec<usize> =
            (0..shapes.len()).map(|value| slot(shapes[value].len(), made[value], last_use[value])).collect();
        let gradients = (0..shapes.len())
            .map(|value| match first_use[value] {
                Some(first) if options.backward => Some(slot(shapes[value].len(), first, backward_step(made[value]))),
                _ => None,
            })
            .collect();
        let mut moments = Vec::new();
        let mut scratch = Vec::new();
        for (index, op) in ops.iter().enumerate() {
            let last = if options.backward { backward_step(index) } else { index };
            moments.push(match op {
                Op::BatchNorm { x, .. } => {
                    let channels = shapes[x.0].channels;
                    Some((slot(channels, index, last), slot(channels, index, last)))
                }
                _ => None,
            });
            scratch.push(match op {
                Op::Convolution { shape, .. } => {
                    let len = shape.workspace_len(device);
                    (Some(slot(len, index, index)), options.backward.then(|| slot(len, last, last)))
                }
                _ => (None, None),
            });
        }
        let sample_losses = slot(shapes[0].batch, loss_step, loss_step);
        let len = memory::place(&mut slots);
        Ok(Self { slots, values, gradients, moments, scratch, accumulate, sample_losses, len })
    }

    fn value(&self, value: Value) -> std::ops::Range<usize> {
        self.slots[self.values[value.0]].range()
    }
}

/// The parts of the arena that one operation uses.
struct Parts<'p, 'a, T: Scalar> {
    places: &'p Places,
    arena: Disjoint<'a, T>,
}

impl<'a, T: Scalar> Parts<'_, 'a, T> {
    fn read(&mut self, value: Value) -> Result<Slice<'a, T>> {
        self.arena.read(self.places.value(value))
    }

    fn write(&mut self, value: Value) -> Result<SliceMut<'a, T>> {
        self.arena.write(self.places.value(value))
    }

    fn slot_mut(&mut self, slot: usize) -> Result<SliceMut<'a, T>> {
        self.arena.write(self.places.slots[slot].range())
    }

    /// Scratch memory; empty where the operation needs none.
    fn scratch(&mut self, slot: Option<usize>) -> Result<SliceMut<'a, T>> {
        self.arena.write(slot.map_or(0..0, |slot| self.places.slots[slot].range()))
    }

    fn gradient_range(&self, value: Value) -> std::ops::Range<usize> {
        self.places.gradients[value.0].map_or(0..0, |slot| self.places.slots[slot].range())
    }

    fn gradient(&mut self, value: Value) -> Result<Slice<'a, T>> {
        let range = self.gradient_range(value);
        self.arena.read(range)
    }

    fn gradient_mut(&mut self, value: Value) -> Result<SliceMut<'a, T>> {
        let range = self.gradient_range(value);
        self.arena.write(range)
    }

    /// The gradient of an activation, or none where nothing before it is trained.
    fn gradient_if_needed(&mut self, value: Value) -> Result<Option<SliceMut<'a, T>>> {
        if self.places.gradients[value.0].is_none() {
            return Ok(None);
        }
        self.gradient_mut(value).map(Some)
    }

    fn moments(&mut self, op: usize) -> Result<(Slice<'a, T>, Slice<'a, T>)> {
        let (mean, inv_std) = self.places.moments[op].unwrap_or_default();
        let [mean, inv_std] = [mean, inv_std].map(|slot| self.places.slots[slot].range());
        Ok((self.arena.read(mean)?, self.arena.read(inv_std)?))
    }

    fn moments_mut(&mut self, op: usize) -> Result<Saved<'a, T>> {
        let (mean, inv_std) = self.places.moments[op].unwrap_or_default();
        Ok(Saved { mean: self.slot_mut(mean)?, inv_std: self.slot_mut(inv_std)? })
    }
}
