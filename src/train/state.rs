//! What a training step reads and writes, on the device; how it is saved and restored.

use std::path::Path;

use std::sync::atomic::{AtomicBool, Ordering};

use super::average::{Averaged, EpochAverage, MovingAverage};
use super::checkpoint::{self, Checkpoint};
use super::evaluate::AHEAD;
use super::images::{Assembly, Batch, DeviceImages};
use super::settings::RunSettings;
use super::tuning::{self, Piece};
use super::{Record, TrainError, weights};
use crate::arena::{Layout, TensorKind};
use crate::data::{ImageShape, Images};
use crate::device::{self, Buffer, Compute, Device};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{self, BatchShape, Normalization, Position};
use crate::kernels::mixing::{Mixer, Mixing};
use crate::kernels::vector::Rate;
use crate::kernels::{clock, metrics, random};
use crate::nn;
use crate::objective::{Accumulator, Wrapped};
use crate::optim::{Group, Method, Optimizer, Settings};
use crate::plan::{Network, Plan, PlanOptions, Shape};

/// Everything that a step reads and writes, on the device.
pub(super) struct State<S: Compute<Master = f32>> {
    pub plan: Plan<S>,
    pub optimizer: Optimizer<f32>,
    pub parameters: Buffer<f32>,
    /// Where the learning rate has factors; otherwise empty.
    pieces: Vec<Piece>,
    pub accumulator: Accumulator<f32>,
    pub average: Option<MovingAverage>,
    pub swa: Option<EpochAverage>,
    pub images: DeviceImages,
    pub normalization: Normalization,
    pub assembly: Assembly,
    pub mixer: Option<Mixer>,
    /// The stream of the network's own random numbers.
    pub draws: u64,
    /// The images of one pass.
    pub part: BatchShape,
    /// Images per step.
    pub batch: usize,
    /// Where the images are, in the epoch's order.
    pub order: Buffer<u32>,
    /// Learning rates of the epoch's steps, and of the next step.
    pub rates: Buffer<f64>,
    pub rate: Buffer<f64>,
    /// Steps of the epoch and of the run.
    pub clock: Buffer<u64>,
    /// The epoch's sums: loss, correct predictions, samples.
    pub totals: Buffer<f64>,
}

impl<S: Compute<Master = f32>> State<S> {
    /// Plans the network, of which the settings freeze a part, and puts initial weights and the training images on the
    /// device, or slots for those of the steps of a launch. Errors call the network's images `data`.
    pub fn new(
        device: &Device,
        settings: &RunSettings,
        (network, data): (Network<'_>, &str),
        (train, steps_per_launch): (&Images, u64),
        normalization: Normalization,
        method: Box<dyn Method<f32>>,
    ) -> Result<Self, TrainError> {
        // The network sees one part at a time: of the batch, or with m-sharpness of a group.
        let batch = settings.data.batch_size;
        let group = settings.optimizer.m_sharpness.unwrap_or(batch);
        let part = settings.data.micro_batch.unwrap_or(group);
        let ImageShape { height, width, channels } = train.shape;
        let label_smoothing = settings.optimizer.label_smoothing;
        let batch_norm = if settings.model.freeze_bn { Mode::Eval } else { Mode::Train };
        let options = PlanOptions { label_smoothing, batch_norm, ..PlanOptions::training() };
        let shape = Shape { batch: part, height, width, channels };
        let frozen = settings.model.freeze.as_deref().unwrap_or_default();
        // All tensors of the model, from which frozen ones differ in nothing but that they stay as they are.
        let model = network(shape, train.classes).map_err(TrainError::plan(data))?.0.parameters();
        tuning::check_frozen(frozen, &model)?;
        let (graph, logits) = tuning::frozen(network, frozen)(shape, train.classes).map_err(TrainError::plan(data))?;
        if method.keeps_batch() && graph.has_random_factors() {
            let reason = "has stochastic depth or ShakeDrop, and the method takes the mini-batch of the step before, \
                          whose factors are not kept";
            return Err(TrainError::setting("model", reason));
        }
        let mut plan = Plan::<S>::new(device, graph, logits, options).map_err(TrainError::plan(data))?;
        let (layout, seed) = (plan.parameters().clone(), settings.run.seed);
        let part = BatchShape { batch: part, height, width, channels };
        let assembly = Assembly::new(device, part, settings.augmentation((height, width))?)?;
        let (mixup, cutmix) = (settings.data.mixup, settings.data.cutmix);
        let mixing = Mixing { mixup, cutmix, seed: random::key(seed, b"mixbatch"), counter: 0 };
        let mixer = (mixup.is_some() || cutmix.is_some()).then(|| Mixer::new(device, mixing)).transpose()?;
        let (all, mut initial, mut statistics) =
            (nn::initial_weights(&model, seed)?, vec![0.0; layout.len()], plan.statistics().to_vec()?);
        take_tensors((&model, &all), (&layout, &mut initial));
        take_tensors((&model, &all), (plan.statistics_layout(), &mut statistics));
        plan.set_statistics(device.upload(&statistics)?.view())?;
        let averaged = || Averaged::new(device, &initial, &statistics);
        let average = settings.optimizer.ema.map(|decay| averaged().map(|of| MovingAverage::new(decay, of)));
        let swa = settings.optimizer.swa.map(|_| averaged().map(EpochAverage::new));
        let images = DeviceImages::new(device, train, steps_per_launch as usize * batch)?;
        let order: Vec<u32> = (0..train.len() as u32).collect();
        Ok(Self {
            average: average.transpose()?,
            swa: swa.transpose()?,
            optimizer: Optimizer::new(device, layout.len(), settings.optimizer(method, &layout)?)?,
            parameters: device.upload(&initial)?,
            pieces: tuning::pieces(&settings.optimizer, &layout, &model)?,
            accumulator: Accumulator::new(device, layout.len(), group / part.batch)?,
            plan,
            order: device.upload(&images.places(&order))?,
            images,
            normalization,
            assembly,
            mixer,
            draws: random::key(seed, b"droppath"),
            part,
            batch,
            rates: device.zeros(train.len() / batch)?,
            rate: device.zeros(1)?,
            clock: device.zeros(clock::LEN)?,
            totals: device.zeros(3)?,
        })
    }

    /// How many parameters are trained, and how many are frozen.
    pub fn parameter_counts(&self) -> [usize; 2] {
        let others = self.plan.statistics_layout().tensors().iter();
        let frozen = others.filter(|tensor| !tensor.kind.is_statistic()).map(|tensor| tensor.kind.len()).sum();
        [self.plan.parameters().parameters(), frozen]
    }

    /// Takes weights and running statistics from a file. The last linear layer keeps its own if the `head` is reset.
    pub fn load(&mut self, file: &Path, reset_head: bool) -> Result<(), TrainError> {
        // A frozen head is one, too.
        let layouts = [self.plan.parameters(), self.plan.statistics_layout()];
        let mut tensors = layouts.iter().flat_map(|layout| layout.tensors().iter().rev());
        let last = tensors.find(|tensor| matches!(tensor.kind, TensorKind::Linear { .. }));
        let head = last.and_then(|tensor| tensor.name.rsplit_once('.')).map(|(layer, _)| layer.to_string());
        let head = head.filter(|_| reset_head);
        let mut loaded = weights::load_but(file, layouts, head.as_deref())?;
        if let Some(head) = head {
            let own = [self.parameters.to_vec()?, self.plan.statistics().to_vec()?];
            for ((layout, own), loaded) in layouts.iter().zip(&own).zip(&mut loaded) {
                for tensor in layout.tensors().iter().filter(|tensor| weights::belongs_to(&tensor.name, &head)) {
                    loaded[tensor.range()].copy_from_slice(&own[tensor.range()]);
                }
            }
        }
        let [parameters, statistics] = loaded;
        self.parameters.write(&parameters)?;
        self.plan.set_statistics(self.parameters.device().upload(&statistics)?.view())?;
        if let Some(average) = &mut self.average {
            average.of.restore(&[&*parameters, &*statistics].concat())?;
        }
        if let Some(swa) = &mut self.swa {
            swa.of.restore(&[parameters, statistics].concat())?;
        }
        Ok(())
    }

    /// Takes one step at the position of the clock, and advances the clock. Everything that changes from step to step
    /// is on the device, so that a recorded step can be replayed.
    pub fn step(&mut self) -> device::Result<()> {
        let Self { plan, optimizer, parameters, pieces, average, totals, clock, rates, rate, .. } = self;
        let (pixels, labels) = self.images.views();
        let mut images = Wrapped(Batch {
            plan: &mut *plan,
            shape: self.part,
            pixels,
            labels,
            order: self.order.view(),
            samples: self.batch,
            stop: None,
            clock: Some(clock.view()),
            normalization: &self.normalization,
            assembly: &mut self.assembly,
            mixer: self.mixer.as_ref(),
            draws: Some(self.draws),
        });
        let mut objective = self.accumulator.over(&mut images);
        if pieces.is_empty() {
            optimizer.step(&mut objective, parameters.view_mut(), Rate::Device(rate.view()))?;
        } else {
            let Settings { base, weight_decay, .. } = *optimizer.settings();
            let group = |piece: &Piece| Group {
                place: piece.place.clone(),
                base,
                weight_decay: if piece.decays { weight_decay } else { 0.0 },
                lr: Rate::Scaled(rate.view(), piece.factor),
            };
            let groups: Vec<Group<'_>> = pieces.iter().map(group).collect();
            optimizer.step_groups(&mut objective, parameters.view_mut(), &groups)?;
        }
        metrics::record(optimizer.loss()?, plan.correct()?, optimizer.skipped(), self.batch, totals.view_mut())?;
        if let Some(average) = average {
            average.take(parameters.view(), plan.statistics().view(), clock.view())?;
        }
        clock::advance(clock.view_mut(), rates.view(), rate.view_mut())
    }

    /// Takes the weights after an epoch into their mean, if there is one. The first epoch begins it anew.
    pub fn average_epoch(&mut self, is_first: bool) -> Result<(), TrainError> {
        match &mut self.swa {
            Some(swa) => {
                if is_first {
                    (swa.count, swa.complete) = (0, false);
                }
                swa.take(&self.parameters.to_vec()?)
            }
            None => Ok(()),
        }
    }

    /// Computes batch norm's statistics for the mean of the weights: the means over batches of the training images in
    /// this order, as they are. Returns whether it was not stopped. Frozen statistics stay as they are.
    pub fn complete_average(&mut self, order: &[u32], stop: &AtomicBool) -> Result<bool, TrainError> {
        let Self { plan, swa: Some(swa), part, images, normalization, draws, .. } = self else { return Ok(true) };
        let device = plan.device().clone();
        let places = device.upload(&images.places(order))?;
        let own = device.upload(&plan.statistics().to_vec()?)?;
        let shape = *part;
        let batches = if plan.has_fixed_statistics() { 0 } else { order.len() / shape.batch };
        let parts: Vec<Vec<u32>> = order.chunks_exact(shape.batch).take(batches).map(<[u32]>::to_vec).collect();
        let mut queue = images.queue(parts.into_iter(), AHEAD);
        for number in 0..batches {
            if let Some(queue) = &mut queue
                && let Some(part) = queue.next(stop)?
            {
                images.put(number * shape.batch, part)?;
            }
            if stop.load(Ordering::Relaxed) {
                plan.set_statistics(own.view())?;
                return Ok(false);
            }
            let (pixels, labels) = images.views();
            let order = places.slice(number * shape.batch..(number + 1) * shape.batch)?;
            // What stochastic depth draws depends on the number of the batch alone, so a resumed run has the same.
            plan.draw(*draws, Position { first: number * shape.batch, clock: None })?;
            let (out, truth) = plan.batch_mut()?;
            let start = Position::default();
            image::batch(&shape, pixels, labels, order, start, normalization, None, out, truth)?;
            plan.average_statistics(swa.of.weights.view(), 1.0 / (number + 1) as f64)?;
        }
        swa.of.statistics.view_mut().copy_from(plan.statistics().view())?;
        swa.complete = true;
        Ok(plan.set_statistics(own.view()).map(|()| true)?)
    }

    pub fn read_totals(&self) -> Result<[f64; 3], TrainError> {
        let mut sums = [0.0; 3];
        self.totals.read(&mut sums)?;
        Ok(sums)
    }

    pub fn loss_scale(&self) -> Result<Option<[f64; 2]>, TrainError> {
        let Some(state) = self.plan.loss_scale() else { return Ok(None) };
        let mut scale = [0.0; 2];
        state.read(&mut scale)?;
        Ok(Some(scale))
    }

    pub fn save(
        &self,
        run: &Path,
        settings: String,
        untested: Option<Record>,
        (step, seconds): (u64, f64),
    ) -> Result<(), TrainError> {
        let state = self.optimizer.state();
        let checkpoint = Checkpoint {
            weights: self.parameters.to_vec()?,
            statistics: self.plan.statistics().to_vec()?,
            momentum: state.momentum.to_vec()?,
            second_moment: state.second_moment.to_vec()?,
            memory: state.memory.to_vec()?,
            scalars: state.scalars.to_vec()?,
            counters: state.counters.to_vec()?,
            totals: self.totals.to_vec()?,
            loss_scale: self.loss_scale()?.map(|state| state.to_vec()).unwrap_or_default(),
            average: self.average.as_ref().map(|average| average.of.to_vec()).transpose()?.unwrap_or_default(),
            swa: self.swa.as_ref().map(|swa| swa.of.to_vec()).transpose()?.unwrap_or_default(),
            swa_progress: self.swa.as_ref().map(EpochAverage::progress).unwrap_or_default(),
            kept_batch: self.plan.kept_batch()?,
            settings,
            untested,
            step,
            seconds,
        };
        // The run can be resumed as soon as the checkpoint exists.
        checkpoint.save(run)?;
        self.save_weights(run)
    }

    /// Writes the weights, and the averages of them that there are.
    pub fn save_weights(&self, run: &Path) -> Result<(), TrainError> {
        self.save_now(&run.join("model.safetensors"))?;
        let moving = self.average.as_ref().map(|average| ("ema.safetensors", &average.of));
        let swa = self.swa.as_ref().filter(|swa| swa.complete).map(|swa| ("swa.safetensors", &swa.of));
        for (name, of) in moving.into_iter().chain(swa) {
            self.save_model(&run.join(name), &of.weights, &of.statistics)?;
        }
        Ok(())
    }

    /// Writes the weights to a file.
    pub fn save_now(&self, file: &Path) -> Result<(), TrainError> {
        self.save_model(file, &self.parameters, self.plan.statistics())
    }

    fn save_model(&self, file: &Path, weights: &Buffer<f32>, statistics: &Buffer<f32>) -> Result<(), TrainError> {
        let (weights, statistics) = (weights.to_vec()?, statistics.to_vec()?);
        let model = [(self.plan.parameters(), &*weights), (self.plan.statistics_layout(), &*statistics)];
        weights::save(file, &model)
    }

    pub fn restore(&mut self, saved: &Checkpoint, run: &Path) -> Result<(), TrainError> {
        let Self { plan, parameters, average, swa, totals, .. } = self;
        let state = self.optimizer.state_mut();
        let lengths = [
            ("weights", saved.weights.len(), parameters.len()),
            ("statistics", saved.statistics.len(), plan.statistics().len()),
            ("momentum", saved.momentum.len(), state.momentum.len()),
            ("second_moment", saved.second_moment.len(), state.second_moment.len()),
            ("memory", saved.memory.len(), state.memory.len()),
            ("scalars", saved.scalars.len(), state.scalars.len()),
            ("counters", saved.counters.len(), state.counters.len()),
            ("totals", saved.totals.len(), totals.len()),
            ("loss_scale", saved.loss_scale.len(), plan.loss_scale().map_or(0, Buffer::len)),
            ("average", saved.average.len(), average.as_ref().map_or(0, |average| average.of.len())),
            ("swa", saved.swa.len(), swa.as_ref().map_or(0, |swa| swa.of.len())),
            ("swa_progress", saved.swa_progress.len(), swa.as_ref().map_or(0, |swa| swa.progress().len())),
            ("kept_batch", saved.kept_batch.len(), if saved.kept_batch.is_empty() { 0 } else { plan.kept_batch_len() }),
        ];
        if let Some((name, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
            let reason = format!("`{name}` has {found} elements, these settings need {expected}");
            return Err(TrainError::Weights { path: checkpoint::path(run), reason });
        }
        parameters.write(&saved.weights)?;
        if let Some(average) = average {
            average.of.restore(&saved.average)?;
        }
        if let (Some(swa), &[count, complete]) = (swa, &*saved.swa_progress) {
            swa.of.restore(&saved.swa)?;
            (swa.count, swa.complete) = (count, complete == 1);
        }
        state.momentum.write(&saved.momentum)?;
        state.second_moment.write(&saved.second_moment)?;
        state.memory.write(&saved.memory)?;
        state.scalars.write(&saved.scalars)?;
        state.attempts = saved.step;
        state.counters.write(&saved.counters)?;
        totals.write(&saved.totals)?;
        if let Some(state) = plan.loss_scale_mut() {
            state.write(&saved.loss_scale)?;
        }
        plan.restore_kept_batch(&saved.kept_batch)?;
        let statistics = parameters.device().upload(&saved.statistics)?;
        plan.set_statistics(statistics.view())?;
        Ok(())
    }
}

/// Copies the tensors of a layout that another one has, too, by name.
fn take_tensors((from, values): (&Layout, &[f32]), (to, into): (&Layout, &mut [f32])) {
    for tensor in to.tensors() {
        if let Some(found) = from.find(&tensor.name) {
            into[tensor.range()].copy_from_slice(&values[found.range()]);
        }
    }
}
