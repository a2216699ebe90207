//! The minimal autodiff: a network is traced once into a list of operations, every activation gets its place in one arena
//! beforehand, and a pass allocates nothing.
//!
//! [`Graph`] traces, [`Plan`] runs. A plan takes the weights to use as an argument, so that the passes of a sharpness-aware
//! step at `w`, `w + ρv` and `w − ρv` share it, and leaves loss, accuracy and gradient on the device.
//! Time in a plan is counted in steps: the forward operations 0 … n−1, the loss n, the backward operations n+1 … 2n (the
//! backward of operation i at 2n − i). Memory is planned over these steps.
//!
//! A `Plan<S>` stores activations as `S` and computes in its master type, of which weights and gradients are. In f16 and bf16 the
//! weights of convolutions are rounded to `S` before each pass, or as they are displaced for it, and the logits are kept wide. In
//! f16 the loss is scaled for the backward pass (`kernels::precision`).
//!
//! Every operation has its forward in `forward.rs`, its backward in `backward.rs`, and the tangents of both, of which products
//! with the Hessian consist, in `tangent.rs`.

mod backward;
mod error;
mod forward;
mod graph;
mod memory;
mod objective;
mod places;
mod tangent;

pub use error::PlanError;
pub use graph::{Graph, Shape, Value};

use crate::arena::{Kind, Layout};
use crate::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::{self, BatchNormShape, Mode};
use crate::kernels::gradient::{GradientStages, Stage, Unfinished};
use crate::kernels::vector::Reduction;
use crate::kernels::{check_length, precision, vector};
use crate::objective::{Displacement, RunningStats};
use graph::Op;
use places::{Parts, Places, WeightGradient};
use tangent::{Scaled, Tangent};

/// Added to the variance in batch norm, as everywhere in the field.
const EPSILON: f64 = 1e-5;
/// How much of a running statistic is replaced by each batch's.
const RUNNING_MOMENTUM: f64 = 0.1;

/// A network: a function from the shape of a batch of images and the number of classes to a traced graph and its logits.
/// [`nn::Model`](crate::nn::Model) gives one by name; any closure over [`Graph`]'s methods is another.
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
    statistics_layout: Layout,
    places: Places,
    arena: Buffer<S::Master>,
    /// The first of the newest pass's weights, as convolutions read them; empty where that is as they are.
    rounded: Buffer<S>,
    /// The state of [`precision`]; none where gradients need no scaling.
    loss_scale: Option<Buffer<f64>>,
    labels: Buffer<u32>,
    /// Correct predictions: of the passes that are reported, and of the others.
    correct: Buffer<u32>,
    statistics: Buffer<S::Master>,
    /// What the statistics become when the step is committed, written in turns.
    pending: [Buffer<S::Master>; 2],
    /// Passes with [`RunningStats::Update`] since the last commit.
    reported: usize,
    /// What finishes a gradient on a GPU, in two passes at the same time too, which ask for no norm. The CPU goes over it once more.
    stages: Option<GradientStages>,
    /// By operation: the number of its own stage.
    stage_numbers: Vec<usize>,
    /// For batch norm's sums over rows.
    sums: batch_norm::Workspace,
    /// For the second of two passes at the same time, from the first pair on.
    beside: Beside<S>,
    /// From the first product with the Hessian on, one for each that is taken at once; the second where the loss is scaled.
    tangents: Vec<Tangent<S>>,
    scaled: Vec<Scaled<S::Master>>,
}

impl<S: Compute> Plan<S> {
    /// Plans a network that ends in `logits`, for softmax cross-entropy. On a GPU's tensor cores it measures first which tiles suit
    /// its convolutions ([`ConvShape::measure_tiles`](crate::kernels::conv::ConvShape::measure_tiles)).
    ///
    /// # Errors
    /// [`PlanError::NoGradient`] where the loss does not depend on some parameter, [`PlanError::Shape`] for a batch norm in
    /// training whose channels have a single value and for a linear layer before the last in 16 bits, [`PlanError::Device`]
    /// where the memory is not to be had.
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
        // Only what nothing follows is kept wide.
        let classifies = |op: &Op| matches!(op, Op::Linear { .. });
        if S::NARROW && ops.iter().any(|op| classifies(op) != (op.output() == logits)) {
            let reason = format!("in {} the logits come from a linear layer, and it is the only one", S::NAME);
            return Err(PlanError::Shape { operation: "Plan::new".into(), reason });
        }
        for op in &ops {
            if let Op::Convolution { shape, .. } = op {
                shape.measure_tiles::<S>(options.backward, device)?;
            }
        }
        let places = Places::new::<S>(device, &ops, &shapes, logits, &parameters, options)?;
        let (stages, stage_numbers) = stages::<S>(device, &ops, &places, &parameters);
        let stages =
            if options.backward && device.is_simt() { Some(GradientStages::new(device, &stages)?) } else { None };
        let sums = workspace::<S>(device, &ops, &shapes, &places)?;
        let mut statistics = device.zeros(statistics_layout.len())?;
        let mut start = vec![S::Master::default(); statistics_layout.len()];
        for tensor in statistics_layout.tensors() {
            if matches!(tensor.kind, Kind::RunningVar(_)) {
                start[tensor.range()].fill(S::Master::from_f64(1.0));
            }
        }
        statistics.write(&start)?;
        let pending = [device.zeros(statistics_layout.len())?, device.zeros(statistics_layout.len())?];
        Ok(Self {
            arena: device.poisoned(places.len)?,
            rounded: device.zeros(if S::NARROW { convolved_len(&parameters) } else { 0 })?,
            loss_scale: if S::SCALES_LOSS { Some(device.upload(&precision::SCALE_START)?) } else { None },
            labels: device.zeros(shapes[0].batch)?,
            correct: device.zeros(2)?,
            stages,
            stage_numbers,
            sums,
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
            reported: 0,
            beside: Beside::Unasked,
            tangents: Vec::new(),
            scaled: Vec::new(),
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

    /// Bytes of the arena that holds activations, their gradients and scratch. The first product with the Hessian takes as many
    /// for their tangents, and on a GPU the first [pair of gradients](crate::objective::Pass::GradientPair) as many for its second pass.
    pub fn arena_bytes(&self) -> usize {
        self.places.len * size_of::<S::Master>()
    }

    /// Bytes that the same slots would take if none shared memory.
    pub fn unshared_bytes(&self) -> usize {
        self.places.slots.iter().map(|slot| slot.len).sum::<usize>() * size_of::<S::Master>()
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
    pub fn batch_mut(&mut self) -> Result<(SliceMut<'_, S>, SliceMut<'_, u32>)> {
        let images = Parts::new(&self.places, &mut self.arena).write(Value(0))?;
        Ok((images, self.labels.view_mut()))
    }

    /// The logits of the newest pass; of a pair, of one of the two.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn logits(&self) -> Result<Slice<'_, S::Master>> {
        self.arena.slice(self.places.value(self.logits))
    }

    /// How many samples had their largest logit at the label, in the newest evaluation or in the newest step's passes with
    /// [`RunningStats::Update`]: one element. Passes at perturbed weights leave it alone.
    ///
    /// # Errors
    /// None: the place lies in the buffer.
    pub fn correct(&self) -> Result<Slice<'_, u32>> {
        self.correct.slice(0..1)
    }

    /// The running statistics.
    pub fn statistics(&self) -> &Buffer<S::Master> {
        &self.statistics
    }

    /// Replaces the running statistics.
    ///
    /// # Errors
    /// Those of the copy.
    pub fn set_statistics(&mut self, statistics: Slice<'_, S::Master>) -> Result<()> {
        self.reported = 0;
        self.statistics.view_mut().copy_from(statistics)
    }

    /// The state of dynamic loss scaling (see [`precision`]), in f16: the scale, and its good steps in a row.
    pub fn loss_scale(&self) -> Option<&Buffer<f64>> {
        self.loss_scale.as_ref()
    }

    /// The same, to set it.
    pub fn loss_scale_mut(&mut self) -> Option<&mut Buffer<f64>> {
        self.loss_scale.as_mut()
    }

    /// A forward pass at `weights`: leaves the logits, the mean loss over the first `samples` of the batch in `loss` (one
    /// element) and their correct predictions in [`Plan::correct`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn evaluate(&mut self, weights: Slice<'_, S::Master>, samples: usize, loss: SliceMut<'_, f64>) -> Result<()> {
        self.round(weights)?;
        self.forward(weights, RunningStats::Keep)?;
        self.correct.clear()?;
        self.loss(samples, false, true, loss, None)
    }
}

/// What a pass writes beside its results and counters: a second one at the same time needs its own.
struct Scene<S: Compute> {
    arena: Buffer<S::Master>,
    rounded: Buffer<S>,
    sums: batch_norm::Workspace,
}

/// Whether there is a second scene.
enum Beside<S: Compute> {
    Unasked,
    There(Box<Scene<S>>),
    /// There is too little memory for it.
    NoRoom,
}

impl<S: Compute> Plan<S> {
    /// Makes room for a second pass at the same time; whether there is some. On a GPU as much again must stay free, for what comes
    /// later and cannot be done without; and while a graph is recorded nothing can be allocated.
    fn make_room_beside(&mut self) -> Result<bool> {
        if matches!(self.beside, Beside::Unasked) {
            if self.device.is_recording() {
                return Ok(false);
            }
            if !self.device.has_free(2 * self.arena_bytes())? {
                self.beside = Beside::NoRoom;
                return Ok(false);
            }
            let scene = || -> Result<Scene<S>> {
                let rounded = self.device.zeros(self.rounded.len())?;
                let arena = self.device.poisoned(self.places.len)?;
                Ok(Scene { arena, rounded, sums: workspace::<S>(&self.device, &self.ops, &self.shapes, &self.places)? })
            };
            self.beside = match scene() {
                Ok(scene) => Beside::There(Box::new(scene)),
                Err(Error::OutOfMemory { .. }) => Beside::NoRoom,
                Err(error) => return Err(error),
            };
        }
        Ok(matches!(self.beside, Beside::There(_)))
    }

    /// What passes write beside their results becomes the other's.
    fn swap_scenes(&mut self) {
        if let Beside::There(scene) = &mut self.beside {
            std::mem::swap(&mut self.arena, &mut scene.arena);
            std::mem::swap(&mut self.rounded, &mut scene.rounded);
            std::mem::swap(&mut self.sums, &mut scene.sums);
        }
    }

    /// Several products with the Hessian at once.
    fn products<const N: usize>(
        &mut self,
        weights: Slice<'_, S::Master>,
        directions: [Slice<'_, S::Master>; N],
        mut products: [SliceMut<'_, S::Master>; N],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::hessian_vector";
        self.check_backward(OPERATION)?;
        check_length(OPERATION, "weights", weights.len(), self.parameters.len())?;
        directions.iter().try_for_each(|d| check_length(OPERATION, "direction", d.len(), self.parameters.len()))?;
        products.iter().try_for_each(|p| check_length(OPERATION, "product", p.len(), self.parameters.len()))?;
        while self.tangents.len() < N {
            self.tangents.push(Tangent::new(&self.device, &self.places, self.rounded.len())?);
        }
        while self.loss_scale.is_some() && self.scaled.len() < N {
            self.scaled.push(Scaled::new(&self.device, self.parameters.len())?);
        }
        // Out of the plan for the time of the passes, which borrow all of it.
        let (mut tangents, mut scaled) = (std::mem::take(&mut self.tangents), std::mem::take(&mut self.scaled));
        let mut run = || {
            if let Some(state) = &self.loss_scale {
                for (scaled, direction) in scaled.iter_mut().zip(directions) {
                    scaled.scale(direction, state.view())?;
                }
            }
            let directions = std::array::from_fn(|k| scaled.get(k).map_or(directions[k], Scaled::direction));
            self.tangent_passes(weights, directions, &mut products, &mut tangents, flag.reborrow())?;
            for (index, product) in products.iter_mut().enumerate() {
                let state = scaled.get(index).map(Scaled::state).transpose()?;
                finish(product.reborrow(), state, flag.reborrow())?;
            }
            Ok(())
        };
        let done = run();
        (self.tangents, self.scaled) = (tangents, scaled);
        done
    }

    /// Makes the weights of convolutions what these read in the next pass.
    fn round(&mut self, weights: Slice<'_, S::Master>) -> Result<()> {
        check_length("Plan::round", "weights", weights.len(), self.parameters.len())?;
        round(weights, &mut self.rounded)
    }

    /// Forward, loss and backward, and the gradient finished, with its norm where that is asked for; the weights have been
    /// [rounded](Self::round).
    fn finished_pass(
        &mut self,
        weights: Slice<'_, S::Master>,
        statistics: RunningStats,
        mut gradient: SliceMut<'_, S::Master>,
        loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
        norm: Option<(&mut Reduction, SliceMut<'_, f64>)>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::gradient";
        self.check_backward(OPERATION)?;
        check_length(OPERATION, "weights", weights.len(), self.parameters.len())?;
        check_length(OPERATION, "gradient", gradient.len(), self.parameters.len())?;
        self.forward(weights, statistics)?;
        let reported = statistics == RunningStats::Update;
        if reported && self.reported == 0 {
            self.correct.clear()?;
        }
        self.loss(self.shapes[0].batch, true, reported, loss, Some(flag.reborrow()))?;
        self.reported += usize::from(reported);
        for index in (0..self.ops.len()).rev() {
            let (gradient, flag) = (gradient.reborrow(), flag.reborrow());
            self.backward(index, weights, Some(Target { gradient, flag, norm: norm.is_some() }))?;
        }
        let scale = self.loss_scale.as_ref().map(|state| state.view());
        match (&mut self.stages, norm) {
            (Some(stages), norm) => stages.end(self.arena.view(), gradient, scale, flag, norm.map(|(_, norm)| norm)),
            (None, Some((reduction, norm))) => vector::finish_gradient(gradient, scale, flag, reduction, norm),
            (None, None) => finish(gradient, scale, flag),
        }
    }

    /// Two gradients: with [room](Self::make_room_beside) at the same time, and then the weights may have been rounded for both.
    fn pair(
        &mut self,
        weights: [Slice<'_, S::Master>; 2],
        (beside, rounded): (bool, bool),
        mut gradients: [SliceMut<'_, S::Master>; 2],
        mut losses: [SliceMut<'_, f64>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::gradient_pair";
        weights.iter().try_for_each(|w| check_length(OPERATION, "weights", w.len(), self.parameters.len()))?;
        gradients.iter().try_for_each(|g| check_length(OPERATION, "gradient", g.len(), self.parameters.len()))?;
        let device = self.device.clone();
        let mut pass = |index: usize| {
            let (gradient, loss) = (gradients[index].reborrow(), losses[index].reborrow());
            let run = |plan: &mut Self| {
                if !rounded {
                    plan.round(weights[index])?;
                }
                plan.finished_pass(weights[index], RunningStats::Keep, gradient, loss, flag.reborrow(), None)
            };
            if index == 0 || !beside {
                return run(self);
            }
            if let Beside::There(scene) = &mut self.beside {
                let batch = self.places.value(Value(0));
                scene.arena.slice_mut(batch.clone())?.copy_from(self.arena.slice(batch)?)?;
            }
            self.swap_scenes();
            let done = run(self);
            self.swap_scenes();
            done
        };
        if beside { device.both(pass) } else { pass(0).and_then(|()| pass(1)) }
    }

    fn check_backward(&self, operation: &'static str) -> Result<()> {
        if self.options.backward {
            return Ok(());
        }
        Err(Error::Argument { operation, message: "the plan was made without gradients".into() })
    }
}

/// How many of the first weights convolutions alone read: theirs all, since weights of layers come first, and in 16 bits the only
/// linear layer is the last.
fn convolved_len(parameters: &Layout) -> usize {
    let others = parameters.tensors().iter().filter(|tensor| !matches!(tensor.kind, Kind::Convolution { .. }));
    others.map(|tensor| tensor.range().start).min().unwrap_or(parameters.len())
}

/// The first elements of a vector as convolutions read them.
fn round<S: Compute>(wide: Slice<'_, S::Master>, rounded: &mut Buffer<S>) -> Result<()> {
    if rounded.is_empty() { Ok(()) } else { vector::convert(wide.slice(0..rounded.len())?, rounded.view_mut()) }
}

/// `len` displaced weights as a pass reads them: rounded as far as convolutions alone do, and behind that in the vector; and on the
/// other side where it is asked for.
fn displace<S: Compute>(
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

/// Takes the scale, if there is one, out of a result, and checks it.
fn finish<T: Scalar>(
    mut result: SliceMut<'_, T>,
    scale: Option<Slice<'_, f64>>,
    flag: SliceMut<'_, u32>,
) -> Result<()> {
    match scale {
        Some(state) => {
            let len = result.len();
            precision::unscale(result.reborrow().cast(len)?, state, flag)
        }
        None => vector::check_finite(result.view(), flag),
    }
}

/// Where a pass leaves a gradient: that of the parameters, the flag for what is not finite, and whether its norm is asked for.
struct Target<'a, T: Scalar> {
    gradient: SliceMut<'a, T>,
    flag: SliceMut<'a, u32>,
    norm: bool,
}

/// What finishes every parameter's gradient: the stages of operations that have their own, and at the end one for all the others. And by
/// operation the number of its own.
fn stages<S: Compute>(device: &Device, ops: &[Op], places: &Places, parameters: &Layout) -> (Vec<Stage>, Vec<usize>) {
    let (mut stages, mut numbers, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for (index, op) in ops.iter().enumerate() {
        numbers.push(stages.len());
        let scratch = places.scratch[index].1.map_or(0..0, |slot| places.slots[slot].range());
        for parameter in op.parameters().into_iter().flatten() {
            let place = parameters.tensors()[parameter].range();
            match (places.weight_gradients[index], op) {
                (WeightGradient::Finished, Op::Convolution { shape, .. }) => {
                    stages.push(Stage::Convolution(shape.finished_squares::<S>(device).unwrap_or_default()));
                }
                (WeightGradient::Summed, _) => {
                    stages.push(Stage::Launch(vec![Unfinished { parts: Some(0..scratch.len()), place }]));
                }
                (WeightGradient::Parts, _) => rest.push(Unfinished { parts: Some(scratch.clone()), place }),
                _ => rest.push(Unfinished { parts: None, place }),
            }
        }
    }
    stages.push(Stage::Launch(rest));
    (stages, numbers)
}

/// Batch norm's workspace for all that a pass does.
fn workspace<S: Compute>(
    device: &Device,
    ops: &[Op],
    shapes: &[Shape],
    places: &Places,
) -> Result<batch_norm::Workspace> {
    let normalized = ops.iter().filter_map(|op| match op {
        Op::BatchNorm { x, .. } => Some(batch_norm_shape(shapes[x.0])),
        _ => None,
    });
    let convolutions = ops.iter().zip(&places.sums_for).filter_map(|(op, sums_for)| match op {
        Op::Convolution { shape, .. } if sums_for.is_some() => Some(shape),
        _ => None,
    });
    batch_norm::Workspace::new(device, normalized)?.with_convolutions::<S>(convolutions)
}

/// The weights as convolutions read them.
fn convolved<'a, S: Compute>(weights: Slice<'a, S::Master>, rounded: &'a Buffer<S>) -> Result<Slice<'a, S>> {
    if S::NARROW { Ok(rounded.view()) } else { weights.cast(weights.len()) }
}

fn batch_norm_shape(shape: Shape) -> BatchNormShape {
    BatchNormShape { rows: shape.rows(), channels: shape.channels }
}
