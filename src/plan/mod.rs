//! Networks as plans: a network is traced once into a list of operations, every activation gets its place in one arena,
//! and a pass allocates nothing.
//!
//! [`Graph`] traces and [`Plan`] runs. A plan takes the weights as an argument, so that the passes of a sharpness-aware
//! step at `w`, `w + ρv` and `w − ρv` share it. It leaves loss, accuracy and gradient on the device.
//!
//! A `Plan<S>` stores activations as `S` and computes in the master type of `S`, which is also the type of weights and
//! gradients. In f16 and bf16 the weights of convolutions are rounded to `S` before each pass (`rounding.rs`), and the
//! logits stay wide. In f16 the loss is scaled for the backward pass (`kernels::precision`).
//!
//! Each operation has a file in `ops/`: tracing, parameters, memory, forward, backward and the tangents of both, of
//! which products with the Hessian consist. The other files run through the operations: `forward.rs`, `backward.rs`,
//! `tangent.rs`; `pass.rs` is what they give to an operation, and `memory_plan.rs` places everything in the arena.

mod backward;
mod error;
mod forward;
mod graph;
mod kept_batch;
mod memory;
mod memory_plan;
mod objective;
mod ops;
mod pass;
mod rounding;
mod second_pass;
mod tangent;

pub use error::PlanError;
pub use graph::{Graph, OperationSummary, Shape, Value};

use crate::arena::{Initial, Layout};
use crate::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::Position;
use crate::kernels::mixing::MixedLabels;
use crate::kernels::precision;
use crate::kernels::scale_samples::SampleFactors;
use crate::objective::RunningStats;
use backward::LastStages;
use graph::Place;
use kept_batch::KeptBatch;
use memory_plan::MemoryPlan;
use ops::{Op, Operation};
use second_pass::{PassBuffers, SecondPass};
use tangent::{ScaledDirection, Tangent};

/// A network: a function from the shape of a batch of images and the number of classes to a traced graph and its
/// logits. [`nn::Model`](crate::nn::Model) gives one by name; any closure over [`Graph`]'s methods is another.
///
/// # Errors
/// A network that the image shape or the number of classes does not fit.
pub type Network<'a> = &'a dyn Fn(Shape, usize) -> std::result::Result<(Graph, Value), PlanError>;

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

/// A network ready to run on one device for one batch shape, its activations stored as `S`.
pub struct Plan<S: Compute> {
    device: Device,
    options: PlanOptions,
    ops: Vec<Op>,
    shapes: Vec<Shape>,
    logits: Value,
    parameters: Layout,
    /// By parameter, frozen ones too.
    places: Vec<Place>,
    statistics_layout: Layout,
    memory: MemoryPlan,
    /// What the operations that multiply samples multiply them by.
    factors: SampleFactors<S::Master>,
    buffers: PassBuffers<S>,
    /// For pairs of gradients.
    second_pass: SecondPass<S>,
    /// The state of [`precision`]; none where gradients need no scaling.
    loss_scale: Option<Buffer<f64>>,
    /// The mini-batch of the step before, if one was kept.
    kept_batch: Option<KeptBatch<S::Master>>,
    labels: Buffer<u32>,
    /// The other label of each image of a mixed batch, and the share of the own one.
    others: Buffer<u32>,
    share: Buffer<f64>,
    /// Whether the batch is mixed.
    mixed: bool,
    /// The loss is the mean over so many samples of the batch, the first ones.
    counted: usize,
    /// Correct predictions: of the passes that are reported, and of the others.
    correct: Buffer<u32>,
    statistics: Buffer<S::Master>,
    /// What the statistics become when the step is committed, written in turns.
    pending: [Buffer<S::Master>; 2],
    /// The frozen weights of convolutions as passes read them; empty where these need no rounding.
    frozen: Buffer<S>,
    /// Passes with [`RunningStats::Update`] since the last commit.
    reported: usize,
    /// On a GPU.
    last_stages: Option<LastStages>,
    /// One for each product with the Hessian that is taken at once; none before the first.
    tangents: Vec<Tangent<S>>,
    /// Likewise, where the loss is scaled.
    scaled_directions: Vec<ScaledDirection<S::Master>>,
}

impl<S: Compute> Plan<S> {
    /// Plans a network that ends in `logits`, for softmax cross-entropy. On a GPU's tensor cores it measures first
    /// which tiles suit its convolutions
    /// ([`ConvShape::measure_tiles`](crate::kernels::conv::ConvShape::measure_tiles)).
    ///
    /// # Errors
    /// [`PlanError::NoGradient`] where the loss does not depend on some parameter, [`PlanError::Shape`] for a batch
    /// norm in training whose channels have a single value and for a linear layer before the last in 16 bits,
    /// [`PlanError::Device`] where the device has too little memory.
    pub fn new(
        device: &Device,
        graph: Graph,
        logits: Value,
        options: PlanOptions,
    ) -> std::result::Result<Self, PlanError> {
        let (parameters, places) = (graph.parameters(), graph.places());
        let statistics_layout = graph.statistics();
        let Graph { ops, shapes, factors, .. } = graph;
        // In 16 bits only the logits are stored in the master type.
        if S::NARROW && ops.iter().any(|op| op.has_wide_output() != (op.output() == logits)) {
            let reason = format!("in {} the logits come from a linear layer, and it is the only one", S::NAME);
            return Err(PlanError::Shape { operation: "Plan::new".into(), reason });
        }
        ops.iter().try_for_each(|op| op.prepare::<S>(device, &places, options))?;
        let memory = MemoryPlan::new::<S>(device, &ops, &shapes, logits, &places, options)?;
        let last_stages = if options.backward && device.is_simt() {
            Some(LastStages::new(device, &ops, &memory, &places)?)
        } else {
            None
        };
        Ok(Self {
            buffers: PassBuffers::new(device, &ops, &memory, rounding::rounded_len::<S>(&parameters))?,
            factors: SampleFactors::new(device, &factors, shapes[0].batch)?,
            second_pass: SecondPass::NotMade,
            kept_batch: None,
            loss_scale: if S::SCALES_LOSS { Some(device.upload(&precision::SCALE_START)?) } else { None },
            labels: device.zeros(shapes[0].batch)?,
            others: device.zeros(shapes[0].batch)?,
            share: device.zeros(1)?,
            mixed: false,
            counted: shapes[0].batch,
            correct: device.zeros(2)?,
            statistics: initial_statistics(device, &statistics_layout)?,
            pending: [device.zeros(statistics_layout.len())?, device.zeros(statistics_layout.len())?],
            frozen: device.zeros(rounding::rounded_len::<S>(&statistics_layout))?,
            reported: 0,
            last_stages,
            tangents: Vec::new(),
            scaled_directions: Vec::new(),
            device: device.clone(),
            options,
            ops,
            shapes,
            logits,
            parameters,
            places,
            statistics_layout,
            memory,
        })
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where each parameter lies in the arenas of weights and gradients, without [frozen](Graph::freeze) ones.
    pub fn parameters(&self) -> &Layout {
        &self.parameters
    }

    /// Where each running statistic and each [frozen](Graph::freeze) parameter lies.
    pub fn statistics_layout(&self) -> &Layout {
        &self.statistics_layout
    }

    /// Bytes of the arena that holds activations, their gradients and scratch. The first product with the Hessian takes
    /// as many for their tangents, and on a GPU the first [pair of gradients](crate::objective::Pass::GradientPair) as
    /// many for its second pass.
    pub fn arena_bytes(&self) -> usize {
        self.memory.len() * size_of::<S::Master>()
    }

    /// The [`arena_bytes`](Self::arena_bytes) that a plan of this network would have, without its memory.
    ///
    /// # Errors
    /// [`PlanError::NoGradient`] where the loss does not depend on some parameter.
    pub fn arena_bytes_of(
        device: &Device,
        graph: &Graph,
        logits: Value,
        options: PlanOptions,
    ) -> std::result::Result<usize, PlanError> {
        let Graph { ops, shapes, .. } = graph;
        let memory = MemoryPlan::new::<S>(device, ops, shapes, logits, &graph.places(), options)?;
        Ok(memory.len() * size_of::<S::Master>())
    }

    /// The shape of the input batch.
    pub fn input_shape(&self) -> Shape {
        self.shapes[0]
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.shapes[self.logits.0].channels
    }

    /// The batch to work on: normalised images of the [shape of the input](Self::input_shape), NHWC, and one label per
    /// image, below the number of [classes](Self::classes). They stay until written again.
    ///
    /// # Errors
    /// None: the places lie in their buffers.
    pub fn batch_mut(&mut self) -> Result<(SliceMut<'_, S>, SliceMut<'_, u32>)> {
        self.mixed = false;
        let images = self.buffers.arena.slice_mut(self.memory.value(Value(0)))?;
        Ok((images.cast(self.shapes[0].len())?, self.labels.view_mut()))
    }

    /// The same for a batch whose images are mixtures of two, with the other label of each. Both labels of an image are
    /// below the number of classes. [`Plan::correct`] counts the first one.
    ///
    /// # Errors
    /// None: the places lie in their buffers.
    pub fn mixed_batch_mut(&mut self) -> Result<(SliceMut<'_, S>, SliceMut<'_, u32>, MixedLabels<'_>)> {
        self.mixed = true;
        let images = self.buffers.arena.slice_mut(self.memory.value(Value(0)))?;
        let mixed = MixedLabels { others: self.others.view_mut(), share: self.share.view_mut() };
        Ok((images.cast(self.shapes[0].len())?, self.labels.view_mut(), mixed))
    }

    /// Draws the factors of [`Graph::drop_path`] and [`Graph::shake_drop`] for the batch. All passes use them until the
    /// next draw, so the passes of a step see one function. They depend on the seed and on the number of each sample in
    /// the run: its place in the batch plus `position.first` and what the clock adds. Without a draw, as in evaluation,
    /// the factors are the expected ones. A network without such operations draws nothing.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::OtherDevice`] for a clock of another length or device.
    pub fn draw(&mut self, seed: u64, position: Position<'_>) -> Result<()> {
        self.factors.draw(seed, position)
    }

    /// Takes losses, gradients and products over the first `samples` of the batch alone, until it is called again. The
    /// others pass through the network, too.
    ///
    /// # Errors
    /// [`Error::Argument`] for no samples, for more than the batch has, and for a part of the batch in
    /// [`Mode::Train`], where all of them take part in the statistics.
    pub fn count_samples(&mut self, samples: usize) -> Result<()> {
        const OPERATION: &str = "Plan::count_samples";
        let batch = self.shapes[0].batch;
        if samples == 0 || samples > batch {
            let message = format!("{samples} samples of a batch of {batch}");
            return Err(Error::Argument { operation: OPERATION, message });
        }
        if samples < batch && self.options.batch_norm == Mode::Train {
            let message = "a part of a batch whose statistics normalise it".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        self.counted = samples;
        Ok(())
    }

    /// The logits of the newest pass, `[batch, classes]`; of a pair, of one of the two.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn logits(&self) -> Result<Slice<'_, S::Master>> {
        self.buffers.arena.slice(self.memory.value(self.logits))
    }

    /// How many samples had their largest logit at the label, in the newest evaluation or in the newest step's passes
    /// with [`RunningStats::Update`]: one element. Passes at perturbed weights leave it alone.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn correct(&self) -> Result<Slice<'_, u32>> {
        self.correct.slice(0..1)
    }

    /// The running statistics as the newest committed step left them, and the [frozen](Graph::freeze) parameters,
    /// placed as [`statistics_layout`](Self::statistics_layout) says.
    pub fn statistics(&self) -> &Buffer<S::Master> {
        &self.statistics
    }

    /// Replaces the running statistics and the [frozen](Graph::freeze) parameters by others with the same layout as
    /// [`statistics`](Self::statistics). Statistics of passes that are not yet committed are dropped.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::OtherDevice`] for a vector of another length or device.
    pub fn set_statistics(&mut self, statistics: Slice<'_, S::Master>) -> Result<()> {
        self.reported = 0;
        self.statistics.view_mut().copy_from(statistics)?;
        if self.places.iter().any(|place| place.frozen) {
            // A step replaces all statistics by the pending ones, so these hold the frozen parameters, too.
            self.pending.iter_mut().try_for_each(|pending| pending.view_mut().copy_from(statistics))?;
            rounding::round(statistics, &mut self.frozen)?;
        }
        Ok(())
    }

    /// Whether batch norm uses the running statistics as they are, and no pass changes them.
    pub fn has_fixed_statistics(&self) -> bool {
        self.options.batch_norm == Mode::Eval
    }

    /// A forward pass at `weights` after which this share of each running statistic is that of the batch. With shares
    /// 1, 1/2, 1/3 … for one batch after the other they become the means over all of them. A plan in [`Mode::Eval`]
    /// keeps its statistics.
    ///
    /// # Errors
    /// [`Error::Length`] for weights of another length than the parameters' layout, those of the device.
    pub fn average_statistics(&mut self, weights: Slice<'_, S::Master>, share: f64) -> Result<()> {
        self.round(weights)?;
        self.reported = 0;
        self.forward_with(weights, Some(share))?;
        if self.has_fixed_statistics() {
            return Ok(());
        }
        self.statistics.view_mut().copy_from(self.pending[0].view())
    }

    /// The state of dynamic loss scaling (see [`precision`]), in f16: the scale, and its good steps in a row.
    pub fn loss_scale(&self) -> Option<&Buffer<f64>> {
        self.loss_scale.as_ref()
    }

    /// The same, to set it.
    pub fn loss_scale_mut(&mut self) -> Option<&mut Buffer<f64>> {
        self.loss_scale.as_mut()
    }

    /// A forward pass at `weights`: leaves the logits, the mean loss over the first `samples` of the batch in `loss`
    /// (one element) and their correct predictions in [`Plan::correct`].
    ///
    /// # Errors
    /// [`Error::Length`] for weights of another length than the parameters' layout, [`Error::Range`] for more samples
    /// than the batch has, those of the device.
    pub fn evaluate(&mut self, weights: Slice<'_, S::Master>, samples: usize, loss: SliceMut<'_, f64>) -> Result<()> {
        self.round(weights)?;
        self.forward(weights, RunningStats::Keep)?;
        self.correct.clear()?;
        self.loss(samples, false, true, loss, None)
    }
}

/// The running statistics before training.
fn initial_statistics<T: Scalar>(device: &Device, layout: &Layout) -> Result<Buffer<T>> {
    let mut values = vec![T::default(); layout.len()];
    for tensor in layout.tensors() {
        if let Initial::Constant(value) = tensor.initial {
            values[tensor.range()].fill(T::from_f64(value.into()));
        }
    }
    device.upload(&values)
}

fn check_backward(operation: &'static str, options: PlanOptions) -> Result<()> {
    if options.backward {
        return Ok(());
    }
    Err(Error::Argument { operation, message: "the plan was made without gradients".into() })
}
