//! The training loop.

use std::cmp::Ordering::{Equal, Less};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
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
use super::{TrainError, weights, write_whole};
use crate::data::{self, Dataset, ImageShape, Images};
use crate::device::{self, Buffer, Compute, Device, RecordedGraph, Tf32};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{Augment, BatchShape, Normalization};
use crate::kernels::vector::Rate;
use crate::kernels::{clock, metrics};
use crate::nn;
use crate::objective::Accumulator;
use crate::optim::{Optimizer, RhoSchedule, Schedule, Telemetry};
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
/// Steps that a GPU is handed at once, as one graph, where nothing has to be looked at between them.
const STEPS_PER_LAUNCH: u64 = 8;

/// How often a run reads its sums from the device to report them.
const REPORT: Duration = Duration::from_millis(250);

/// Trains a model as the options say. With `out`, writes `config.toml`, `log.jsonl`, `model.safetensors` and `checkpoint/`
/// there; with `resume`, goes on from the checkpoint there. Setting `stop` ends the run after the current step, on a GPU after
/// the few that it has been handed.
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
    let options = options.clone().resolve()?;
    match options.precision.unwrap_or(PrecisionName::F32) {
        PrecisionName::F32 => Run::<f32>::open(&options, out, resume)?.train(stop, progress),
        PrecisionName::Tf32 => Run::<Tf32>::open(&options, out, resume)?.train(stop, progress),
        PrecisionName::F16 => Run::<f16>::open(&options, out, resume)?.train(stop, progress),
        PrecisionName::Bf16 => Run::<bf16>::open(&options, out, resume)?.train(stop, progress),
    }
}

/// A run under way, its activations stored as `S`: what trains, what looks on, and how far it is. The test is in f32 in any case:
/// of the weights as they are saved.
struct Run<'a, S: Compute<Master = f32>> {
    options: &'a Options,
    out: Option<&'a Path>,
    device: Device,
    data: String,
    images: (usize, usize),
    training: Training<S>,
    evaluator: Evaluator,
    curvature: Option<CurvatureLog>,
    log: Option<Log>,
    schedule: Schedule,
    rho_schedule: RhoSchedule,
    /// In all, and in an epoch.
    steps: u64,
    steps_per_epoch: u64,
    steps_per_launch: u64,
    /// Steps done, now and when this part of the run began.
    step: u64,
    started_at: u64,
    /// The epoch whose order and learning rates the device has.
    prepared_epoch: Option<u64>,
    recorded: Recorded,
    window: Window,
    /// The mean loss for which the run is given up.
    diverged: Option<f64>,
    /// Seconds of training: up to the epoch's beginning, and of that before this part of the run.
    seconds: f64,
    earlier: f64,
    /// Since the epoch, or this part of it, began at this step.
    clock: Instant,
    epoch_started_at: u64,
    reported: Instant,
}

/// Steps as graphs, each recorded when it is wanted first.
#[derive(Default)]
struct Recorded {
    one: Option<RecordedGraph>,
    several: Option<RecordedGraph>,
}

impl<'a, S: Compute<Master = f32>> Run<'a, S> {
    /// Opens data, device and model, and goes to where the run was left, if it is resumed.
    fn open(options: &'a Options, out: Option<&'a Path>, resume: bool) -> Result<Self, TrainError> {
        let device = open_device(options.device.as_deref().unwrap_or("auto"), options.threads.unwrap_or_default())?;
        let path = options.data.as_deref().unwrap_or("synthetic");
        let Dataset { name, mut train, test, mean, std, .. } = open_data(path)?;
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

        let model = options.model()?;
        // The network sees a part at a time: of the batch, or with m-sharpness of a group.
        let group = options.m_sharpness.unwrap_or(batch);
        let part = options.micro_batch.unwrap_or(group);
        let shape = Shape { batch: part, height, width, channels };
        let (graph, logits) = model.trace(shape, train.classes).map_err(TrainError::plan(path))?;
        let plan_options =
            PlanOptions { label_smoothing: options.label_smoothing.unwrap_or_default(), ..PlanOptions::training() };
        let plan = Plan::<S>::new(&device, graph, logits, plan_options).map_err(TrainError::plan(path))?;
        let evaluator = Evaluator::new(&device, model, path, &test, normalization, batch, Mode::Eval)?;
        let curvature = match options.curvature() {
            None => None,
            Some((every, settings)) => {
                let (part, images) = curvature_images(options, &train)?;
                let meter = CurvatureMeter::new(&device, model, (path, &images), normalization, part, Mode::Eval)?;
                Some(CurvatureLog { every, settings, meter })
            }
        };
        let layout = plan.parameters().clone();
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
        let saved = match out.filter(|_| resume) {
            Some(run) => saved(run, options)?,
            None => None,
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
        let log = out.map(|run| open_run(run, options, resume, (step, steps))).transpose()?;
        Ok(Self {
            options,
            out,
            data: name,
            images: (train.len(), test.len()),
            window: Window { earlier: [0.0; 3], start: training.read_totals()? },
            training,
            evaluator,
            curvature,
            log,
            schedule: options.schedule(steps),
            rho_schedule: options.rho_schedule(),
            steps,
            steps_per_epoch,
            // On the CPU nothing would be gained, and a run would be slower to stop.
            steps_per_launch: if device.is_host() { 1 } else { STEPS_PER_LAUNCH },
            device,
            step,
            started_at: step,
            prepared_epoch: None,
            recorded: Recorded::default(),
            diverged: None,
            seconds: earlier,
            earlier,
            clock: Instant::now(),
            epoch_started_at: step,
            reported: Instant::now(),
        })
    }

    /// To the end, or until it is told to stop or diverges.
    fn train(mut self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<Summary, TrainError> {
        progress(Progress::Start {
            device: format!("{} ({})", self.device.name(), self.device.description()),
            data: self.data.clone(),
            images: self.images,
            parameters: self.training.plan.parameters().parameters(),
            arena_bytes: self.training.plan.arena_bytes(),
            steps: (self.steps, self.step),
            steps_per_epoch: self.steps_per_epoch,
        });
        // A run that was stopped between its checkpoint and the measurement there makes up for it.
        let unknown = self.log.as_ref().is_some_and(|log| !log.has_curvature_of(self.step));
        if self.step > 0 && self.at_epoch_end() && self.curvature_is_due() && unknown {
            self.measure_curvature(progress)?;
        }
        let (mut test, mut unmeasured) = (None, false);
        (self.clock, self.reported) = (Instant::now(), Instant::now());
        while self.step < self.steps && self.diverged.is_none() && !stop.load(Ordering::Relaxed) {
            self.prepare_epoch()?;
            let logged = self.is_logged(self.step + 1);
            self.advance(logged)?;
            self.look_at_loss()?;
            if logged {
                self.log_step()?;
            }
            if self.at_epoch_end() || self.diverged.is_some() {
                self.report(progress)?;
                test = Some(self.end_epoch(progress)?);
                if self.diverged.is_none() && self.curvature_is_due() {
                    unmeasured = stop.load(Ordering::Relaxed);
                    if !unmeasured {
                        self.measure_curvature(progress)?;
                    }
                }
                (self.clock, self.epoch_started_at) = (Instant::now(), self.step);
            } else if self.reported.elapsed() > REPORT {
                self.report(progress)?;
            }
        }
        self.device.synchronize()?;
        // A run that is stopped before its last measurement makes up for it when it is resumed.
        let interrupted = (self.step < self.steps || unmeasured) && self.diverged.is_none();
        if interrupted {
            self.seconds += self.clock.elapsed().as_secs_f64();
            self.save()?;
        } else if test.is_none() {
            // A finished run was resumed: there is nothing to train, but its result can still be told, and written, if it was
            // ended when it had a checkpoint of its end and not yet the weights.
            test = Some(self.evaluate()?);
            self.out.map_or(Ok(()), |run| self.training.save_model(run))?;
        }
        let trained = (self.step - self.started_at) as f64 * self.training.batch as f64;
        let seconds = self.seconds - self.earlier;
        Ok(Summary {
            interrupted,
            diverged: self.diverged,
            steps: self.step,
            skipped: self.training.optimizer.telemetry()?.skipped,
            test: test.filter(|_| !interrupted && self.diverged.is_none()),
            seconds: self.seconds,
            images_per_second: if trained > 0.0 { trained / seconds } else { 0.0 },
            out: self.out.map(Path::to_path_buf),
        })
    }

    /// Hands the device the order of the epoch's images and its learning rates, once.
    fn prepare_epoch(&mut self) -> Result<(), TrainError> {
        let Self { training, options, schedule, step, steps_per_epoch, .. } = self;
        let (epoch, within) = (*step / *steps_per_epoch, (*step % *steps_per_epoch) as usize);
        if self.prepared_epoch.replace(epoch) == Some(epoch) {
            return Ok(());
        }
        if !options.no_shuffle.unwrap_or_default() {
            let mut order = vec![0; training.order.len()];
            data::epoch_order(options.seed.unwrap_or_default(), epoch, &mut order);
            training.order.write(&order)?;
        }
        let first = epoch * *steps_per_epoch;
        let rates: Vec<f64> = (first..first + *steps_per_epoch).map(|step| schedule.rate(step)).collect();
        training.rates.write(&rates)?;
        training.rate.write(&rates[within..=within])?;
        training.clock.write(&[within as u64, *step])?;
        Ok(())
    }

    /// The next step, or the next few.
    fn advance(&mut self, logged: bool) -> Result<(), TrainError> {
        let alone = self.steps_alone();
        let Self { training, recorded, device, step, .. } = self;
        training.optimizer.observe(logged);
        training.optimizer.scale_rho(self.rho_schedule.factor(*step, &self.schedule));
        let repeats = training.optimizer.settings().method.repeats() && self.rho_schedule == RhoSchedule::Constant;
        // The first step allocates, and those that are logged do more.
        if logged || !repeats || *step == self.started_at {
            training.step()?;
            *step += 1;
            return Ok(());
        }
        let (slot, count) = match self.steps_per_launch {
            several if several > 1 && several <= alone => (&mut recorded.several, several),
            _ => (&mut recorded.one, 1),
        };
        let graph = match slot {
            Some(graph) => graph,
            None => slot.insert(device.capture(|| (0..count).try_for_each(|_| training.step()))?),
        };
        graph.replay()?;
        *step += count;
        Ok(())
    }

    /// How many of the next steps come before anything has to be looked at or changed.
    fn steps_alone(&self) -> u64 {
        let until = |every: u64| every - self.step % every;
        let mut alone = until(self.steps_per_epoch).min(self.steps - self.step);
        if self.options.max_loss.is_some() {
            alone = alone.min(until(DIVERGENCE_STEPS));
        }
        match self.log_every() {
            // The one that is logged is taken by itself.
            Some(every) => alone.min(until(every) - 1),
            None => alone,
        }
    }

    fn log_every(&self) -> Option<u64> {
        self.options.log_every.filter(|&every| every > 0 && self.log.is_some())
    }

    fn is_logged(&self, step: u64) -> bool {
        self.log_every().is_some_and(|every| step.is_multiple_of(every))
    }

    /// Whether the newest step was the last of its epoch, or of the run.
    fn at_epoch_end(&self) -> bool {
        self.step.is_multiple_of(self.steps_per_epoch) || self.step == self.steps
    }

    /// The epoch of the newest step, counted from 1.
    fn epoch(&self) -> u64 {
        self.step.div_ceil(self.steps_per_epoch)
    }

    /// Where the loss is bounded, whether it has diverged.
    fn look_at_loss(&mut self) -> Result<(), TrainError> {
        let (window_ends, epoch_ends) = (self.step.is_multiple_of(DIVERGENCE_STEPS), self.at_epoch_end());
        let Some(most) = self.options.max_loss.filter(|_| window_ends || epoch_ends) else { return Ok(()) };
        let sums = self.training.read_totals()?;
        if window_ends {
            // Also where it is not a number, because none of the steps counted.
            self.diverged =
                Some(self.window.end(sums)).filter(|loss| !matches!(loss.partial_cmp(&most), Some(Less | Equal)));
        }
        if self.step.is_multiple_of(self.steps_per_epoch) {
            self.window.cross_epoch(sums);
        }
        // Of an epoch's few steps all may have been skipped for once; but not several that the run ends with.
        let (loss, several) = (sums[0] / sums[2], !(self.step - 1).is_multiple_of(self.steps_per_epoch));
        let diverged = epoch_ends && (loss > most || loss.is_nan() && several && self.step == self.steps);
        self.diverged = self.diverged.or(Some(loss).filter(|_| diverged));
        Ok(())
    }

    /// Since the epoch began, or the part of it that this part of the run does.
    fn images_per_second(&self) -> f64 {
        let images = (self.step - self.epoch_started_at) as f64 * self.training.batch as f64;
        images / self.clock.elapsed().as_secs_f64()
    }

    /// That of the newest step: the method's own, or the schedule's.
    fn learning_rate(&self, telemetry: &Telemetry) -> f64 {
        telemetry.own_rate.unwrap_or_else(|| self.schedule.rate(self.step - 1))
    }

    /// Writes the newest step to the log.
    fn log_step(&mut self) -> Result<(), TrainError> {
        let mut correct = [0];
        self.training.plan.correct()?.read(&mut correct)?;
        let telemetry = self.training.optimizer.telemetry()?;
        let record = Record::Step {
            step: self.step,
            epoch: self.epoch(),
            loss: finite(telemetry.loss),
            accuracy: f64::from(correct[0]) / self.training.batch as f64,
            lr: self.learning_rate(&telemetry),
            images_per_second: self.images_per_second(),
            gradient_norm: finite(telemetry.gradient_norm),
            method: finite_numbers(&telemetry),
            cosine_gradients: telemetry.cosine_gradients.and_then(finite),
            cosine_perturbation: telemetry.cosine_perturbation.and_then(finite),
            loss_scale: self.training.loss_scale()?.map(|[scale, _]| scale),
            skipped: telemetry.skipped,
            dropped_alpha: telemetry.dropped_alpha,
            dropped_beta: telemetry.dropped_beta,
        };
        match &mut self.log {
            Some(log) => log.write(&record),
            None => Ok(()),
        }
    }

    /// Tells how the epoch goes.
    fn report(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), TrainError> {
        self.reported = Instant::now();
        let [loss, correct, samples] = self.training.read_totals()?;
        let (loss, accuracy) = (loss / samples, correct / samples);
        progress(Progress::Step { step: self.step, loss, accuracy, images_per_second: self.images_per_second() });
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Evaluation, TrainError> {
        let Self { evaluator, training, .. } = self;
        evaluator.evaluate(training.parameters.view(), training.plan.statistics().view(), |_| Ok(()))
    }

    /// Tests, logs and saves what the epoch, or what there is of it, has come to.
    fn end_epoch(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<Evaluation, TrainError> {
        self.device.synchronize()?;
        let images_per_second = self.images_per_second();
        self.seconds += self.clock.elapsed().as_secs_f64();
        let [loss, correct, samples] = self.training.read_totals()?;
        progress(Progress::Testing);
        let test = self.evaluate()?;
        let telemetry = self.training.optimizer.telemetry()?;
        let record = Record::Epoch {
            epoch: self.epoch(),
            step: self.step,
            train_loss: finite(loss / samples),
            train_accuracy: finite(correct / samples),
            test_loss: finite(test.loss),
            test_accuracy: test.accuracy,
            lr: self.learning_rate(&telemetry),
            gradient_norm: finite(telemetry.gradient_norm),
            method: finite_numbers(&telemetry),
            images_per_second,
            seconds: self.seconds,
            skipped: telemetry.skipped,
            dropped_alpha: telemetry.dropped_alpha,
            dropped_beta: telemetry.dropped_beta,
        };
        // Sums of an epoch that more steps would complete stay for a run that is resumed with them.
        if self.step.is_multiple_of(self.steps_per_epoch) {
            self.training.totals.clear()?;
        }
        if let Some(log) = &mut self.log {
            log.write(&record)?;
        }
        // What has diverged does not take the place of weights that had not.
        if self.diverged.is_none() {
            self.save()?;
        }
        progress(Progress::Epoch(record));
        Ok(test)
    }

    fn curvature_is_due(&self) -> bool {
        self.curvature.as_ref().is_some_and(|curvature| self.epoch().is_multiple_of(curvature.every))
    }

    /// Measures the curvature where the run is, and writes it to the log.
    fn measure_curvature(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), TrainError> {
        let (epoch, step) = (self.epoch(), self.step);
        let Some(CurvatureLog { settings, meter, .. }) = &mut self.curvature else { return Ok(()) };
        // What is dropped while there is a graph keeps its memory, and measuring takes vectors each time. The next steps are
        // recorded again.
        self.recorded = Recorded::default();
        let (weights, statistics) = (self.training.parameters.view(), self.training.plan.statistics().view());
        let mut tell = |measure, done, of| progress(Progress::Measuring { measure, steps: (done, of) });
        let found = meter.measure(weights, statistics, settings, &mut tell)?;
        let record = Record::Curvature { epoch, step, measures: found.json() };
        if let Some(log) = &mut self.log {
            log.write(&record)?;
        }
        progress(Progress::Epoch(record));
        Ok(())
    }

    /// Saves the run where it is, if it has a folder.
    fn save(&self) -> Result<(), TrainError> {
        match self.out {
            Some(run) => self.training.save(run, settings(self.options, run)?, self.step, self.seconds),
            None => Ok(()),
        }
    }
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

/// The method's own numbers, by name. Those that are not finite are left out.
fn finite_numbers(telemetry: &Telemetry) -> BTreeMap<String, f64> {
    let finite = telemetry.method.iter().filter(|(_, value)| value.is_finite());
    finite.map(|(name, value)| (name.to_string(), *value)).collect()
}

/// All settings as TOML, for the run in a folder.
fn settings(options: &Options, run: &Path) -> Result<String, TrainError> {
    toml::to_string(options)
        .map_err(|error| TrainError::Settings { path: run.join("config.toml"), reason: error.to_string() })
}

/// The checkpoint of a run that is resumed. One that was ended before its first begins again.
fn saved(run: &Path, options: &Options) -> Result<Option<Checkpoint>, TrainError> {
    let path = checkpoint::path(run);
    if !path.is_file() {
        if !run.join("model.safetensors").exists() {
            return Ok(None);
        }
        let reason = "is missing: the run has weights, but cannot go on without its checkpoint".into();
        return Err(TrainError::Weights { path, reason });
    }
    let saved = Checkpoint::load(run)?;
    let damaged = |error: toml::de::Error| TrainError::Weights {
        path: path.clone(),
        reason: format!("damaged: `settings`: {}", error.message().replace('\n', "; ")),
    };
    let before: Options = toml::from_str(&saved.settings).map_err(damaged)?;
    // Files may have been moved, and options have come since.
    let before = Options { data: options.data.clone(), init: options.init.clone(), ..before }.resolve()?;
    options.continues(&before).map_err(|error| match error {
        TrainError::Option { option, .. } => {
            let key = option.trim_start_matches("--");
            let reason = format!("`{key}` is not what the run was begun with, as its checkpoint has it");
            TrainError::Settings { path: run.join("config.toml"), reason }
        }
        other => other,
    })?;
    Ok(Some(saved))
}

/// What a run keeps in its folder, each of which says that there is one, or what is left of it.
const KEPT: [&str; 4] = ["config.toml", "log.jsonl", "model.safetensors", "checkpoint"];

/// Prepares the folder of a run that has done `step` of `steps` steps, and its log.
fn open_run(run: &Path, options: &Options, resume: bool, (step, steps): (u64, u64)) -> Result<Log, TrainError> {
    let config = run.join("config.toml");
    if !resume && KEPT.iter().any(|name| run.join(name).exists()) {
        return Err(TrainError::RunExists { path: run.into() });
    }
    std::fs::create_dir_all(run).map_err(TrainError::io(run))?;
    let claim = claim(run)?;
    let text = settings(options, run)?;
    // A run that goes on as it was, or is longer already, leaves its settings alone.
    if step <= steps && std::fs::read(&config).map_or(true, |found| found != text.as_bytes()) {
        write_whole(&config, text.as_bytes())?;
    }
    Log::open(&run.join("log.jsonl"), step, claim)
}

/// Locks the folder for as long as the result lives: two processes would each write their lines and weights. None where folders cannot
/// be locked.
fn claim(run: &Path) -> Result<Option<File>, TrainError> {
    let Ok(folder) = File::open(run) else { return Ok(None) };
    match folder.try_lock() {
        Err(TryLockError::WouldBlock) => Err(TrainError::InUse { path: run.into() }),
        Err(TryLockError::Error(_)) => Ok(None),
        Ok(()) => Ok(Some(folder)),
    }
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

/// How the curvature is followed.
struct CurvatureLog {
    /// Epochs.
    every: u64,
    settings: CurvatureSettings,
    meter: CurvatureMeter,
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

    fn save(&self, run: &Path, settings: String, step: u64, seconds: f64) -> Result<(), TrainError> {
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
            settings,
            step,
            seconds,
        };
        // The run can go on from the moment that it has the first.
        checkpoint.save(run)?;
        self.save_model(run)
    }

    fn save_model(&self, run: &Path) -> Result<(), TrainError> {
        let (parameters, statistics) = (self.parameters.to_vec()?, self.plan.statistics().to_vec()?);
        let model = [(self.plan.parameters(), &*parameters), (self.plan.statistics_layout(), &*statistics)];
        weights::save(&run.join("model.safetensors"), &model)
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
    use std::sync::atomic::AtomicBool;

    use half::bf16;

    use super::{Compute, Options, Run, Window};

    #[test]
    fn steps_of_one_launch_are_the_steps_themselves() {
        every_way::<f32>(&[3, 5]);
        every_way::<bf16>(&[]);
    }

    /// 21 steps in epochs of 12, logged after 7, 14 and 21 or not at all, looked at after 12 and 21.
    fn every_way<S: Compute<Master = f32>>(steps_per_launch: &[u64]) {
        let options = Options {
            model: Some("resnet8".into()),
            train_size: Some(96),
            batch_size: Some(8),
            steps: Some(21),
            max_loss: Some(1e3),
            device: Some("cpu".into()),
            ..Options::default()
        };
        let options = options.resolve().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let train = |steps_per_launch: u64, log_every: u64| {
            let out = folder.path().join(format!("{steps_per_launch}-{log_every}"));
            let options = Options { log_every: Some(log_every), ..options.clone() };
            let mut run = Run::<S>::open(&options, Some(&out), false).unwrap();
            run.steps_per_launch = steps_per_launch;
            let summary = run.train(&AtomicBool::new(false), &mut |_| ()).unwrap();
            assert_eq!((summary.steps, summary.skipped), (21, 0));
            let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
            let mut records: Vec<serde_json::Value> =
                log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            for key in ["images_per_second", "seconds"] {
                records.iter_mut().for_each(|record| record[key] = 0.into());
            }
            (records, std::fs::read(out.join("model.safetensors")).unwrap())
        };
        let one_by_one = train(1, 7);
        assert_eq!(one_by_one.0.iter().filter(|record| record["kind"] == "step").count(), 3);
        for &several in steps_per_launch {
            let (log, model) = train(several, 7);
            assert_eq!(log, one_by_one.0, "{several} steps per launch in {}", S::NAME);
            assert!(model == one_by_one.1, "{several} steps per launch have other bits in {}", S::NAME);
        }
        assert!(train(1, 0).1 == one_by_one.1, "steps that nobody sees have other bits in {}", S::NAME);
    }

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
