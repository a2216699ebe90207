//! The training loop.

use std::cmp::Ordering::{Equal, Less};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use half::{bf16, f16};

use super::checkpoint::{self, Checkpoint};
use super::curvature::{CurvatureMeter, CurvatureSettings};
use super::evaluate::{Evaluation, Evaluator};
use super::images::{Batch, DeviceImages, normalization, open_data, open_device};
use super::log::{Log, Record};
use super::settings::{AugmentName, Measure, Options, PrecisionName};
use super::{TrainError, weights};
use crate::data::{self, Dataset, ImageShape, Images};
use crate::device::{self, Buffer, Compute, Graph, Tf32};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{Augment, BatchShape, Normalization};
use crate::kernels::vector::Rate;
use crate::kernels::{clock, metrics};
use crate::nn;
use crate::objective::Accumulator;
use crate::optim::{Optimizer, RhoSchedule, Telemetry};
use crate::plan::{Plan, PlanOptions, Shape};

/// What a run tells its caller while it goes on.
#[derive(Debug, Clone)]
pub enum Progress {
    /// An epoch's steps are done, its test begins.
    Testing,
    /// Before the first step.
    Start {
        /// The device's name and description.
        device: String,
        /// The data set's name.
        data: String,
        /// Training and test images.
        images: (usize, usize),
        /// Number of parameters.
        parameters: usize,
        /// Bytes of the training plan's arena.
        arena_bytes: usize,
        /// Steps of the whole run, and those already done.
        steps: (u64, u64),
        /// Steps per epoch.
        steps_per_epoch: u64,
    },
    /// Now and then.
    Step {
        /// Steps done.
        step: u64,
        /// Mean loss of the epoch so far.
        loss: f64,
        /// Accuracy of the epoch so far.
        accuracy: f64,
        /// Images per second of the epoch so far.
        images_per_second: f64,
    },
    /// The curvature after an epoch is being measured.
    Measuring {
        /// By this.
        measure: Measure,
        /// Done, and in all.
        steps: (usize, usize),
    },
    /// After each epoch, and after each measurement of the curvature.
    Epoch(Record),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Whether it was told to stop before its end.
    pub interrupted: bool,
    /// The mean loss of some steps that ended it before its end, by `max_loss`: not a number where none had a finite one.
    pub diverged: Option<f64>,
    /// Steps done.
    pub steps: u64,
    /// Of these, skipped because something was not finite.
    pub skipped: u32,
    /// The model on the test images; none if interrupted or diverged.
    pub test: Option<Evaluation>,
    /// Seconds of training, evaluation left out, over all its parts.
    pub seconds: f64,
    /// Images per second of training.
    pub images_per_second: f64,
    /// Where its files are.
    pub out: Option<PathBuf>,
}

/// Over so many steps, and over each epoch, a run looks whether its loss has diverged.
const DIVERGENCE_STEPS: u64 = 50;
/// Images at a time when the curvature is measured, as `polder curvature` takes them.
const CURVATURE_PART: usize = 200;

/// How often a run reads its sums from the device to report them.
const REPORT: Duration = Duration::from_millis(250);

/// Trains a model as the (resolved) options say. With `out`, writes `config.toml`, `log.jsonl`, `model.safetensors` and
/// `checkpoint/` there; with `resume`, goes on from the checkpoint there. Setting `stop` ends the run after the current step.
///
/// # Errors
/// Bad options or files, and what fails on the device. Whatever was saved before stays.
pub fn train(
    options: &Options,
    out: Option<&Path>,
    resume: bool,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Summary, TrainError> {
    match options.precision.unwrap_or(PrecisionName::F32) {
        PrecisionName::F32 => train_as::<f32>(options, out, resume, stop, progress),
        PrecisionName::Tf32 => train_as::<Tf32>(options, out, resume, stop, progress),
        PrecisionName::F16 => train_as::<f16>(options, out, resume, stop, progress),
        PrecisionName::Bf16 => train_as::<bf16>(options, out, resume, stop, progress),
    }
}

/// With activations stored as `S`. The test is in f32 in any case: of the weights as they are saved.
fn train_as<S: Compute<Master = f32>>(
    options: &Options,
    out: Option<&Path>,
    resume: bool,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Summary, TrainError> {
    let device = open_device(options.device.as_deref().unwrap_or("auto"), options.threads.unwrap_or_default())?;
    let Dataset { name, mut train, test, mean, std, .. } = open_data(options.data.as_deref().unwrap_or("synthetic"))?;
    let seed = options.seed.unwrap_or_default();
    if let Some(n) = options.train_size {
        train = train.take(n).map_err(|error| TrainError::option("--train-size", error.to_string()))?;
    }
    if let Some(fraction) = options.label_noise {
        train = train.with_label_noise(fraction, seed)?;
    }
    let ImageShape { height, width, channels } = train.shape;
    if test.shape != train.shape {
        let (found, expected) = (test.shape, train.shape);
        return Err(TrainError::option("--data", format!("test images are {found}, training images {expected}")));
    }
    let (mean, std) = (mean.as_slice(), std.as_slice());
    let normalization = normalization(options.mean.as_deref(), options.std.as_deref(), (mean, std), channels)?;

    let batch = options.batch_size.unwrap_or(128);
    let steps_per_epoch = (train.len() / batch) as u64;
    if steps_per_epoch == 0 {
        let reason = format!("{batch}, but there are only {} training images", train.len());
        return Err(TrainError::option("--batch-size", reason));
    }
    let steps = options.steps.unwrap_or_else(|| options.epochs.unwrap_or_default().saturating_mul(steps_per_epoch));
    let schedule = options.schedule(steps);

    let model = options.model()?;
    let path = options.data.as_deref().unwrap_or("synthetic");
    // The network sees a part at a time: of the batch, or with m-sharpness of a group.
    let group = options.m_sharpness.unwrap_or(batch);
    let part = options.micro_batch.unwrap_or(group);
    let shape = Shape { batch: part, height, width, channels };
    let (graph, logits) = model.trace(shape, train.classes).map_err(TrainError::plan(path))?;
    let plan_options =
        PlanOptions { label_smoothing: options.label_smoothing.unwrap_or_default(), ..PlanOptions::training() };
    let plan = Plan::<S>::new(&device, graph, logits, plan_options).map_err(TrainError::plan(path))?;
    let mut evaluator = Evaluator::new(&device, model, path, &test, normalization, batch, Mode::Eval)?;
    let mut curvature = match options.curvature() {
        None => None,
        Some((every, settings)) => {
            let (part, images) = curvature_images(options, &train)?;
            let meter = CurvatureMeter::new(&device, model, (path, &images), normalization, part, Mode::Eval)?;
            Some(CurvatureLog { every, settings, meter })
        }
    };
    let layout = plan.parameters().clone();
    let rho_schedule = options.rho_schedule();
    let mut training = Training {
        optimizer: Optimizer::new(&device, layout.len(), options.optimizer(&layout))?,
        parameters: device.upload(&nn::initial_weights(&layout, seed)?)?,
        accumulator: Accumulator::new(&device, layout.len(), group / part)?,
        plan,
        images: DeviceImages::new(&device, &train)?,
        normalization,
        augment: (options.augment == Some(AugmentName::Basic)).then_some(Augment {
            pad: 4,
            flip: true,
            seed,
            counter: 0,
        }),
        part: BatchShape { batch: part, height, width, channels },
        batch,
        order: device.upload(&(0..train.len() as u32).collect::<Vec<u32>>())?,
        rates: device.zeros(steps_per_epoch as usize)?,
        rate: device.zeros(1)?,
        clock: device.zeros(clock::LEN)?,
        totals: device.zeros(3)?,
    };
    // A run that was ended before its first checkpoint begins again.
    let saved = match out {
        Some(run) if resume && Checkpoint::exists(run) => Some(Checkpoint::load(run)?),
        _ => None,
    };
    // One with a checkpoint has its weights; the file that it began with may be gone.
    if let Some(file) = options.init.as_ref().filter(|_| saved.is_none()) {
        let [loaded, statistics] = weights::load(Path::new(file), [&layout, training.plan.statistics_layout()])?;
        training.parameters.write(&loaded)?;
        training.plan.set_statistics(device.upload(&statistics)?.view())?;
    }
    let (mut step, mut earlier) = (0, 0.0);
    if let (Some(saved), Some(run)) = (saved, out) {
        training.restore(&saved, run)?;
        (step, earlier) = (saved.step, saved.seconds);
    }
    let mut log = match out {
        None => None,
        Some(run) => Some(open_run(run, options, resume, step)?),
    };

    let count = train.len();
    progress(Progress::Start {
        device: format!("{} ({})", device.name(), device.description()),
        data: name,
        images: (count, test.len()),
        parameters: layout.parameters(),
        arena_bytes: training.plan.arena_bytes(),
        steps: (steps, step),
        steps_per_epoch,
    });

    // A run that was stopped between its checkpoint and the measurement there makes up for it.
    if let Some(curvature) = &mut curvature
        && step > 0
        && (step % steps_per_epoch == 0 || step == steps)
        && log.as_ref().is_some_and(|log| log.newest_curvature != Some(step))
    {
        curvature.measure(&training, (step.div_ceil(steps_per_epoch), step), log.as_mut(), progress)?;
    }
    let mut order: Vec<u32> = (0..count as u32).collect();
    let mut seconds = earlier;
    let mut epoch_seconds = 0.0;
    let started_at = step;
    let repeats = training.optimizer.settings().method.repeats() && rho_schedule == RhoSchedule::Constant;
    let mut recorded: Option<Graph> = None;
    let mut epoch_started_at = step;
    let mut prepared_epoch = None;
    let mut reported = Instant::now();
    let mut test_result = None;
    let mut diverged = None;
    let mut unmeasured = false;
    let mut window = Window { earlier: [0.0; 3], start: training.read_totals()? };
    let mut clock = Instant::now();
    while step < steps && !stop.load(Ordering::Relaxed) {
        let (epoch, within) = (step / steps_per_epoch, (step % steps_per_epoch) as usize);
        if prepared_epoch != Some(epoch) {
            if !options.no_shuffle.unwrap_or_default() {
                data::epoch_order(seed, epoch, &mut order);
                training.order.write(&order)?;
            }
            let first = epoch * steps_per_epoch;
            let rates: Vec<f64> = (first..first + steps_per_epoch).map(|step| schedule.rate(step)).collect();
            training.rates.write(&rates)?;
            training.rate.write(&rates[within..=within])?;
            training.clock.write(&[within as u64, step])?;
            prepared_epoch = Some(epoch);
        }
        let lr = schedule.rate(step);
        let log_step = options.log_every.is_some_and(|every| every > 0 && (step + 1) % every == 0) && log.is_some();
        training.optimizer.observe(log_step);
        training.optimizer.scale_rho(rho_schedule.factor(step, &schedule));
        // The first step allocates, and those that are logged do more.
        match &recorded {
            Some(graph) if !log_step => graph.replay()?,
            None if repeats && !log_step && step > started_at => {
                recorded.insert(device.capture(|| training.step())?).replay()?;
            }
            _ => training.step()?,
        }
        step += 1;

        let mut epoch_ends = step % steps_per_epoch == 0 || step == steps;
        if let Some(most) = options.max_loss
            && (epoch_ends || step % DIVERGENCE_STEPS == 0)
        {
            let sums = training.read_totals()?;
            if step % DIVERGENCE_STEPS == 0 {
                // Also where it is not a number, because none of the steps counted.
                diverged = Some(window.end(sums)).filter(|loss| !matches!(loss.partial_cmp(&most), Some(Less | Equal)));
            }
            if step % steps_per_epoch == 0 {
                window.cross_epoch(sums);
            }
            // Of an epoch's few steps all may have been skipped for once.
            diverged = diverged.or(Some(sums[0] / sums[2]).filter(|loss| epoch_ends && *loss > most));
            epoch_ends |= diverged.is_some();
        }
        if log_step && let Some(log) = &mut log {
            let mut correct = [0];
            training.plan.correct()?.read(&mut correct)?;
            let accuracy = f64::from(correct[0]) / batch as f64;
            let elapsed = epoch_seconds + clock.elapsed().as_secs_f64();
            let images_per_second = (step - epoch_started_at) as f64 * batch as f64 / elapsed;
            let scale = training.loss_scale()?.map(|[scale, _]| scale);
            let record = step_record(
                &training.optimizer.telemetry()?,
                (step, epoch + 1),
                lr,
                accuracy,
                images_per_second,
                scale,
            );
            log.write(&record)?;
        }
        if epoch_ends || reported.elapsed() > REPORT {
            reported = Instant::now();
            let sums = training.read_totals()?;
            let elapsed = epoch_seconds + clock.elapsed().as_secs_f64();
            let images_per_second = (step - epoch_started_at) as f64 * batch as f64 / elapsed;
            let (loss, accuracy) = (sums[0] / sums[2], sums[1] / sums[2]);
            progress(Progress::Step { step, loss, accuracy, images_per_second });
        }
        if epoch_ends {
            device.synchronize()?;
            let elapsed = clock.elapsed().as_secs_f64();
            (seconds, epoch_seconds) = (seconds + elapsed, epoch_seconds + elapsed);
            let sums = training.read_totals()?;
            progress(Progress::Testing);
            let test = evaluator.evaluate(training.parameters.view(), training.plan.statistics().view(), |_| Ok(()))?;
            let telemetry = training.optimizer.telemetry()?;
            let record = Record::Epoch {
                epoch: epoch + 1,
                step,
                train_loss: finite(sums[0] / sums[2]),
                train_accuracy: finite(sums[1] / sums[2]),
                test_loss: finite(test.loss),
                test_accuracy: test.accuracy,
                lr,
                gradient_norm: finite(telemetry.gradient_norm),
                a: telemetry.a.and_then(finite),
                b: telemetry.b.and_then(finite),
                images_per_second: (step - epoch_started_at) as f64 * batch as f64 / epoch_seconds,
                seconds,
                skipped: telemetry.skipped,
                dropped_alpha: telemetry.dropped_alpha,
                dropped_beta: telemetry.dropped_beta,
            };
            // Sums of an epoch that more steps would complete stay for a run that is resumed with them.
            let complete = step % steps_per_epoch == 0;
            if complete {
                training.totals.clear()?;
            }
            if let Some(log) = &mut log {
                log.write(&record)?;
            }
            // What has diverged does not take the place of weights that had not.
            if let Some(run) = out.filter(|_| diverged.is_none()) {
                training.save(run, step, seconds)?;
            }
            progress(Progress::Epoch(record));
            if diverged.is_some() {
                break;
            }
            if let Some(curvature) = &mut curvature {
                unmeasured = stop.load(Ordering::Relaxed) && (epoch + 1).is_multiple_of(curvature.every);
                if !unmeasured {
                    curvature.measure(&training, (epoch + 1, step), log.as_mut(), progress)?;
                }
            }
            test_result = Some(test);
            (epoch_seconds, epoch_started_at) = (0.0, step);
            clock = Instant::now();
        }
    }
    device.synchronize()?;
    // A run that is stopped before its last measurement makes up for it when it is resumed.
    let interrupted = (step < steps || unmeasured) && diverged.is_none();
    if interrupted {
        seconds += clock.elapsed().as_secs_f64();
        if let Some(run) = out {
            training.save(run, step, seconds)?;
        }
    } else if test_result.is_none() && diverged.is_none() {
        // A finished run was resumed: there is nothing to train, but its result can still be told.
        test_result =
            Some(evaluator.evaluate(training.parameters.view(), training.plan.statistics().view(), |_| Ok(()))?);
    }
    let trained = (step - started_at) as f64 * batch as f64;
    Ok(Summary {
        interrupted,
        diverged,
        steps: step,
        skipped: training.optimizer.telemetry()?.skipped,
        test: test_result.filter(|_| !interrupted && diverged.is_none()),
        seconds,
        images_per_second: if trained > 0.0 { trained / (seconds - earlier) } else { 0.0 },
        out: out.map(Path::to_path_buf),
    })
}

/// The images that the curvature is measured over, and how many of them at a time.
fn curvature_images(options: &Options, train: &Images) -> Result<(usize, Images), TrainError> {
    let part = CURVATURE_PART.min(options.curvature_samples.unwrap_or(train.len())).min(train.len());
    let samples = options.curvature_samples.unwrap_or_else(|| CurvatureMeter::usual_samples(train.len(), part));
    if samples == 0 || samples > train.len() || !samples.is_multiple_of(part) {
        let reason = format!(
            "{samples}, expected at most {CURVATURE_PART} or a multiple of it, of the {} training images",
            train.len()
        );
        return Err(TrainError::option("--curvature-samples", reason));
    }
    let (pixels, labels) = (&train.pixels[..samples * train.shape.bytes()], &train.labels[..samples]);
    Ok((part, Images { pixels: pixels.into(), labels: labels.into(), ..*train }))
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn step_record(
    telemetry: &Telemetry,
    (step, epoch): (u64, u64),
    lr: f64,
    accuracy: f64,
    images_per_second: f64,
    loss_scale: Option<f64>,
) -> Record {
    Record::Step {
        step,
        epoch,
        loss: finite(telemetry.loss),
        accuracy,
        lr,
        images_per_second,
        gradient_norm: finite(telemetry.gradient_norm),
        a: telemetry.a.and_then(finite),
        b: telemetry.b.and_then(finite),
        vhv: telemetry.vhv.and_then(finite),
        eta: telemetry.eta.and_then(finite),
        rho: telemetry.rho.and_then(finite),
        cosine_gradients: telemetry.cosine_gradients.and_then(finite),
        cosine_perturbation: telemetry.cosine_perturbation.and_then(finite),
        loss_scale,
        skipped: telemetry.skipped,
        dropped_alpha: telemetry.dropped_alpha,
        dropped_beta: telemetry.dropped_beta,
    }
}

/// Prepares the folder of a run and its log.
fn open_run(run: &Path, options: &Options, resume: bool, step: u64) -> Result<Log, TrainError> {
    let config = run.join("config.toml");
    if !resume && config.exists() {
        return Err(TrainError::RunExists { path: run.into() });
    }
    std::fs::create_dir_all(run).map_err(TrainError::io(run))?;
    let text = toml::to_string(options)
        .map_err(|error| TrainError::Settings { path: config.clone(), reason: error.to_string() })?;
    std::fs::write(&config, text).map_err(TrainError::io(&config))?;
    Log::open(&run.join("log.jsonl"), step)
}

/// The sums (loss, correct predictions, samples) of the steps since the loss was last looked at.
struct Window {
    /// Of those in epochs that have ended.
    earlier: [f64; 3],
    /// The running epoch's sums when the window or the epoch began.
    start: [f64; 3],
}

impl Window {
    /// The mean loss; the next window begins.
    fn end(&mut self, sums: [f64; 3]) -> f64 {
        let of = |k: usize| self.earlier[k] + sums[k] - self.start[k];
        let loss = of(0) / of(2);
        *self = Self { earlier: [0.0; 3], start: sums };
        loss
    }

    /// An epoch ends, after which its sums begin at zero again.
    fn cross_epoch(&mut self, sums: [f64; 3]) {
        let earlier = std::array::from_fn(|k| self.earlier[k] + sums[k] - self.start[k]);
        *self = Self { earlier, start: [0.0; 3] };
    }
}

/// What writes the curvature to the log.
struct CurvatureLog {
    /// Epochs.
    every: u64,
    settings: CurvatureSettings,
    meter: CurvatureMeter,
}

impl CurvatureLog {
    /// Measures where the training is, at the end of an epoch, if it is due.
    fn measure<S: Compute<Master = f32>>(
        &mut self,
        training: &Training<S>,
        (epoch, step): (u64, u64),
        log: Option<&mut Log>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), TrainError> {
        if !epoch.is_multiple_of(self.every) {
            return Ok(());
        }
        let (weights, statistics) = (training.parameters.view(), training.plan.statistics().view());
        let mut tell = |measure, done, of| progress(Progress::Measuring { measure, steps: (done, of) });
        let found = self.meter.measure(weights, statistics, &self.settings, &mut tell)?;
        let record = Record::Curvature { epoch, step, measures: found.json() };
        if let Some(log) = log {
            log.write(&record)?;
        }
        progress(Progress::Epoch(record));
        Ok(())
    }
}

/// Everything that a step reads and writes, on the device.
struct Training<S: Compute<Master = f32>> {
    plan: Plan<S>,
    optimizer: Optimizer<f32>,
    parameters: Buffer<f32>,
    accumulator: Accumulator<f32>,
    images: DeviceImages,
    normalization: Normalization,
    augment: Option<Augment>,
    /// What the network sees at a time.
    part: BatchShape,
    /// Images of a step.
    batch: usize,
    /// Of the images, in this epoch.
    order: Buffer<u32>,
    /// The learning rates of the epoch's steps, and that of the next.
    rates: Buffer<f64>,
    rate: Buffer<f64>,
    /// Steps of the epoch, and of the run.
    clock: Buffer<u64>,
    /// The epoch's sums: loss, correct predictions, samples.
    totals: Buffer<f64>,
}

impl<S: Compute<Master = f32>> Training<S> {
    /// One step where the clock is, which it moves on: what changes from step to step lies on the device, so that a recorded step
    /// can be replayed.
    fn step(&mut self) -> device::Result<()> {
        let Self { plan, optimizer, parameters, totals, clock, rates, rate, .. } = self;
        let (pixels, labels) = self.images.views();
        let mut images = Batch {
            plan: &mut *plan,
            shape: self.part,
            pixels,
            labels,
            order: self.order.view(),
            samples: self.batch,
            clock: Some(clock.view()),
            normalization: &self.normalization,
            augment: self.augment,
        };
        optimizer.step(&mut self.accumulator.over(&mut images), parameters, Rate::Device(rate.view()))?;
        metrics::record(optimizer.loss()?, plan.correct()?, optimizer.skipped(), self.batch, totals.view_mut())?;
        clock::advance(clock.view_mut(), rates.view(), rate.view_mut())
    }

    fn read_totals(&self) -> Result<[f64; 3], TrainError> {
        let mut sums = [0.0; 3];
        self.totals.read(&mut sums)?;
        Ok(sums)
    }

    fn loss_scale(&self) -> Result<Option<[f64; 2]>, TrainError> {
        let Some(state) = self.plan.loss_scale() else { return Ok(None) };
        let mut scale = [0.0; 2];
        state.read(&mut scale)?;
        Ok(Some(scale))
    }

    fn save(&self, run: &Path, step: u64, seconds: f64) -> Result<(), TrainError> {
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
            step,
            seconds,
        };
        let layouts = [self.plan.parameters(), self.plan.statistics_layout()];
        let model = [(layouts[0], &*checkpoint.weights), (layouts[1], &*checkpoint.statistics)];
        weights::save(&run.join("model.safetensors"), &model)?;
        checkpoint.save(run)
    }

    fn restore(&mut self, saved: &Checkpoint, run: &Path) -> Result<(), TrainError> {
        let Self { plan, parameters, totals, .. } = self;
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
        ];
        if let Some((name, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
            let reason = format!("`{name}` has {found} elements, these settings need {expected}");
            return Err(TrainError::Weights { path: checkpoint::path(run), reason });
        }
        parameters.write(&saved.weights)?;
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
        let statistics = parameters.device().upload(&saved.statistics)?;
        plan.set_statistics(statistics.view())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Window;

    #[test]
    fn a_window_is_the_mean_over_its_steps_whatever_epochs_they_belong_to() {
        // Losses 1, 2, 3 in an epoch of three steps; then 4, 5, skipped, 6 in the next.
        let mut window = Window { earlier: [0.0; 3], start: [0.0; 3] };
        assert_eq!(window.end([3.0, 0.0, 2.0]), 1.5);
        window.cross_epoch([6.0, 0.0, 3.0]);
        assert_eq!(window.end([9.0, 0.0, 2.0]), (3.0 + 4.0 + 5.0) / 3.0);
        assert!(window.end([9.0, 0.0, 2.0]).is_nan(), "no step counted");
        assert_eq!(window.end([15.0, 0.0, 3.0]), 6.0);
        // A window that ends where its epoch does leaves nothing to the next.
        window.cross_epoch([15.0, 0.0, 3.0]);
        assert_eq!(window.end([7.0, 0.0, 1.0]), 7.0);
    }
}
