//! The training loop.

use std::cmp::Ordering::{Equal, Less};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::curvature::{CurvatureMeter, CurvatureSettings};
use super::evaluate::{Evaluation, Evaluator};
use super::folder::{self, Config};
use super::images::{DeviceImages, normalization, open_device};
use super::log::{Log, Record};
use super::settings::{Augmentation, Measure, Settings};
use super::state::State;
use super::training::Subject;
use super::{TrainError, weights};
use crate::data::{self, Images};
use crate::device::{Compute, Device, RecordedGraph};
use crate::kernels::batch_norm::Mode;
use crate::kernels::clock;
use crate::kernels::image::{Augment, BatchShape};
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

/// A run in progress, its activations stored as `S`. Tests are in f32 whatever `S` is: of the weights as they are saved.
pub(super) struct Run<S: Compute<Master = f32>> {
    settings: Settings,
    config: Config,
    out: Option<PathBuf>,
    device: Device,
    data: String,
    images: (usize, usize),
    state: State<S>,
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
    /// The mean loss that ended the run as diverged.
    diverged: Option<f64>,
    /// Seconds of training up to the beginning of the epoch, and the share of it from earlier parts of the run.
    seconds: f64,
    earlier: f64,
    /// Since the epoch, or this part of it, began at this step.
    clock: Instant,
    epoch_started_at: u64,
    reported: Instant,
}

/// Steps as graphs, each recorded when it is first needed.
#[derive(Default)]
struct Recorded {
    one: Option<RecordedGraph>,
    several: Option<RecordedGraph>,
}

impl<S: Compute<Master = f32>> Run<S> {
    /// Puts data, network and method on the device. A run that is resumed continues from its checkpoint.
    pub fn open(subject: Subject<'_>, out: Option<PathBuf>, resume: bool) -> Result<Self, TrainError> {
        let config = subject.config()?;
        let data = subject.data();
        let Subject { settings, network, dataset, method, .. } = subject;
        let device = open_device(&settings.run.device, settings.run.threads)?;
        let (train, test) = (&dataset.train, &dataset.test);
        let (mean, std) = (dataset.mean.as_slice(), dataset.std.as_slice());
        let given = (settings.data.mean.as_deref(), settings.data.std.as_deref());
        let normalization = normalization(given.0, given.1, (mean, std), train.shape.channels)?;

        let batch = settings.data.batch_size;
        let steps_per_epoch = (train.len() / batch) as u64;
        if steps_per_epoch == 0 {
            let reason = format!("{batch}, but there are only {} training images", train.len());
            return Err(TrainError::setting("batch-size", reason));
        }
        let steps = settings.run.steps.unwrap_or(settings.run.epochs.saturating_mul(steps_per_epoch));
        let schedule = settings.schedule(&*method, steps)?;

        // The network sees one part at a time: of the batch, or with m-sharpness of a group.
        let group = settings.optimizer.m_sharpness.unwrap_or(batch);
        let part = settings.data.micro_batch.unwrap_or(group);
        let data::ImageShape { height, width, channels } = train.shape;
        let shape = BatchShape { batch: part, height, width, channels };
        let plan_options =
            PlanOptions { label_smoothing: settings.optimizer.label_smoothing, ..PlanOptions::training() };
        let traced = network(Shape { batch: part, height, width, channels }, train.classes);
        let (graph, logits) = traced.map_err(TrainError::plan(&data))?;
        let plan = Plan::<S>::new(&device, graph, logits, plan_options).map_err(TrainError::plan(&data))?;
        let evaluator = Evaluator::new(&device, network, (&data, test), normalization, batch, Mode::Eval)?;
        let curvature = match settings.curvature() {
            None => None,
            Some((every, wanted)) => {
                let (part, images) = curvature_images(settings.curvature.curvature_samples, train)?;
                let meter = CurvatureMeter::new(&device, network, (&data, &images), normalization, part, Mode::Eval)?;
                Some(CurvatureLog { every, settings: wanted, meter })
            }
        };
        let layout = plan.parameters().clone();
        let seed = settings.run.seed;
        let augment = Augment { pad: 4, flip: true, seed, counter: 0 };
        let mut state = State {
            optimizer: Optimizer::new(&device, layout.len(), settings.optimizer(method, &layout)?)?,
            parameters: device.upload(&nn::initial_weights(&layout, seed)?)?,
            accumulator: Accumulator::new(&device, layout.len(), group / part)?,
            plan,
            images: DeviceImages::new(&device, train)?,
            normalization,
            augment: (settings.data.augment == Augmentation::Basic).then_some(augment),
            part: shape,
            batch,
            order: device.upload(&(0..train.len() as u32).collect::<Vec<u32>>())?,
            rates: device.zeros(steps_per_epoch as usize)?,
            rate: device.zeros(1)?,
            clock: device.zeros(clock::LEN)?,
            totals: device.zeros(3)?,
        };
        let saved = match out.as_ref().filter(|_| resume) {
            Some(run) => folder::saved(run, &config)?,
            None => None,
        };
        // A checkpoint has the weights; the file that the run began with may be gone.
        if let Some(file) = settings.model.init.as_ref().filter(|_| saved.is_none()) {
            let [loaded, statistics] = weights::load(Path::new(file), [&layout, state.plan.statistics_layout()])?;
            state.parameters.write(&loaded)?;
            state.plan.set_statistics(device.upload(&statistics)?.view())?;
        }
        let (mut step, mut earlier) = (0, 0.0);
        if let (Some(saved), Some(run)) = (saved, &out) {
            state.restore(&saved, run)?;
            (step, earlier) = (saved.step, saved.seconds);
        }
        let log = out.as_ref().map(|run| folder::open(run, &config, resume, (step, steps))).transpose()?;
        Ok(Self {
            config,
            out,
            images: (train.len(), test.len()),
            data: dataset.name,
            window: Window { earlier: [0.0; 3], start: state.read_totals()? },
            state,
            evaluator,
            curvature,
            log,
            schedule,
            rho_schedule: settings.optimizer.rho_schedule,
            settings,
            steps,
            steps_per_epoch,
            // On the CPU several steps per launch gain nothing, and a run would stop later.
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
    pub fn train(mut self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<Summary, TrainError> {
        progress(Progress::Start {
            device: format!("{} ({})", self.device.name(), self.device.description()),
            data: self.data.clone(),
            images: self.images,
            parameters: self.state.plan.parameters().parameters(),
            arena_bytes: self.state.plan.arena_bytes(),
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
            self.check_divergence()?;
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
            self.out.as_ref().map_or(Ok(()), |run| self.state.save_model(run))?;
        }
        let trained = (self.step - self.started_at) as f64 * self.state.batch as f64;
        let seconds = self.seconds - self.earlier;
        Ok(Summary {
            interrupted,
            diverged: self.diverged,
            steps: self.step,
            skipped: self.state.optimizer.telemetry()?.skipped,
            test: test.filter(|_| !interrupted && self.diverged.is_none()),
            seconds: self.seconds,
            images_per_second: if trained > 0.0 { trained / seconds } else { 0.0 },
            out: self.out.clone(),
        })
    }

    /// Hands the device the order of the epoch's images and its learning rates, once.
    fn prepare_epoch(&mut self) -> Result<(), TrainError> {
        let Self { state, settings, schedule, step, steps_per_epoch, .. } = self;
        let (epoch, within) = (*step / *steps_per_epoch, (*step % *steps_per_epoch) as usize);
        if self.prepared_epoch.replace(epoch) == Some(epoch) {
            return Ok(());
        }
        if !settings.data.no_shuffle {
            let mut order = vec![0; state.order.len()];
            data::epoch_order(settings.run.seed, epoch, &mut order);
            state.order.write(&order)?;
        }
        let first = epoch * *steps_per_epoch;
        let rates: Vec<f64> = (first..first + *steps_per_epoch).map(|step| schedule.rate(step)).collect();
        state.rates.write(&rates)?;
        state.rate.write(&rates[within..=within])?;
        state.clock.write(&[within as u64, *step])?;
        Ok(())
    }

    /// The next step, or the next few.
    fn advance(&mut self, logged: bool) -> Result<(), TrainError> {
        let alone = self.steps_alone();
        let Self { state, recorded, device, step, .. } = self;
        state.optimizer.observe(logged);
        state.optimizer.scale_rho(self.rho_schedule.factor(*step, &self.schedule));
        let repeats = state.optimizer.settings().method.repeats() && self.rho_schedule == RhoSchedule::Constant;
        // The first step allocates, and those that are logged do more.
        if logged || !repeats || *step == self.started_at {
            state.step()?;
            *step += 1;
            return Ok(());
        }
        let (slot, count) = match self.steps_per_launch {
            several if several > 1 && several <= alone => (&mut recorded.several, several),
            _ => (&mut recorded.one, 1),
        };
        let graph = match slot {
            Some(graph) => graph,
            None => slot.insert(device.capture(|| (0..count).try_for_each(|_| state.step()))?),
        };
        graph.replay()?;
        *step += count;
        Ok(())
    }

    /// How many of the next steps come before anything has to be looked at or changed.
    fn steps_alone(&self) -> u64 {
        let until = |every: u64| every - self.step % every;
        let mut alone = until(self.steps_per_epoch).min(self.steps - self.step);
        if self.settings.run.max_loss.is_some() {
            alone = alone.min(until(DIVERGENCE_STEPS));
        }
        match self.log_every() {
            // The one that is logged is taken by itself.
            Some(every) => alone.min(until(every) - 1),
            None => alone,
        }
    }

    fn log_every(&self) -> Option<u64> {
        Some(self.settings.run.log_every).filter(|&every| every > 0 && self.log.is_some())
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
    fn check_divergence(&mut self) -> Result<(), TrainError> {
        let (window_ends, epoch_ends) = (self.step.is_multiple_of(DIVERGENCE_STEPS), self.at_epoch_end());
        let Some(most) = self.settings.run.max_loss.filter(|_| window_ends || epoch_ends) else { return Ok(()) };
        let sums = self.state.read_totals()?;
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
        let images = (self.step - self.epoch_started_at) as f64 * self.state.batch as f64;
        images / self.clock.elapsed().as_secs_f64()
    }

    /// That of the newest step: the method's own, or the schedule's.
    fn learning_rate(&self, telemetry: &Telemetry) -> f64 {
        telemetry.own_rate.unwrap_or_else(|| self.schedule.rate(self.step - 1))
    }

    /// Writes the newest step to the log.
    fn log_step(&mut self) -> Result<(), TrainError> {
        let mut correct = [0];
        self.state.plan.correct()?.read(&mut correct)?;
        let telemetry = self.state.optimizer.telemetry()?;
        let record = Record::Step {
            step: self.step,
            epoch: self.epoch(),
            loss: finite(telemetry.loss),
            accuracy: f64::from(correct[0]) / self.state.batch as f64,
            lr: self.learning_rate(&telemetry),
            images_per_second: self.images_per_second(),
            gradient_norm: finite(telemetry.gradient_norm),
            method: finite_numbers(&telemetry),
            cosine_gradients: telemetry.cosine_gradients.and_then(finite),
            cosine_perturbation: telemetry.cosine_perturbation.and_then(finite),
            loss_scale: self.state.loss_scale()?.map(|[scale, _]| scale),
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
        let [loss, correct, samples] = self.state.read_totals()?;
        let (loss, accuracy) = (loss / samples, correct / samples);
        progress(Progress::Step { step: self.step, loss, accuracy, images_per_second: self.images_per_second() });
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Evaluation, TrainError> {
        let Self { evaluator, state, .. } = self;
        evaluator.evaluate(state.parameters.view(), state.plan.statistics().view(), |_| Ok(()))
    }

    /// Tests, logs and saves what the epoch, or what there is of it, has come to.
    fn end_epoch(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<Evaluation, TrainError> {
        self.device.synchronize()?;
        let images_per_second = self.images_per_second();
        self.seconds += self.clock.elapsed().as_secs_f64();
        let [loss, correct, samples] = self.state.read_totals()?;
        progress(Progress::Testing);
        let test = self.evaluate()?;
        let telemetry = self.state.optimizer.telemetry()?;
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
            self.state.totals.clear()?;
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
        let (weights, statistics) = (self.state.parameters.view(), self.state.plan.statistics().view());
        let mut tell = |measure, done, of| progress(Progress::Measuring { measure, steps: (done, of) });
        let found = meter.measure(weights, statistics, settings, &mut tell)?;
        let record = Record::Curvature { epoch, step, measures: found.by_name() };
        if let Some(log) = &mut self.log {
            log.write(&record)?;
        }
        progress(Progress::Epoch(record));
        Ok(())
    }

    /// Saves the run where it is, if it has a folder.
    fn save(&self) -> Result<(), TrainError> {
        match &self.out {
            Some(run) => self.state.save(run, self.config.text.clone(), self.step, self.seconds),
            None => Ok(()),
        }
    }
}

/// The images that the curvature is measured over, and how many of them at a time.
fn curvature_images(samples: Option<usize>, train: &Images) -> Result<(usize, Images), TrainError> {
    let part = CURVATURE_PART.min(samples.unwrap_or(train.len())).min(train.len());
    let samples = samples.unwrap_or_else(|| CurvatureMeter::usual_samples(train.len(), part));
    if samples == 0 || samples > train.len() || !samples.is_multiple_of(part) {
        let reason = format!(
            "{samples}, expected at most {CURVATURE_PART} or a multiple of it, of the {} training images",
            train.len()
        );
        return Err(TrainError::setting("curvature-samples", reason));
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use half::bf16;

    use super::super::training::Subject;
    use super::super::{DataSettings, LoopSettings, Settings, open_data};
    use super::{Compute, Run, Window};
    use crate::plan::Shape;

    #[test]
    fn steps_of_one_launch_are_the_steps_themselves() {
        every_way::<f32>(&[3, 5]);
        every_way::<bf16>(&[]);
    }

    /// 21 steps in epochs of 12, logged after 7, 14 and 21 or not at all, checked for divergence after 12 and 21.
    fn every_way<S: Compute<Master = f32>>(steps_per_launch: &[u64]) {
        let data = DataSettings { batch_size: 8, ..DataSettings::default() };
        let run =
            LoopSettings { steps: Some(21), max_loss: Some(1e3), device: "cpu".into(), ..LoopSettings::default() };
        let settings = Settings { data, run, ..Settings::default() };
        let mut dataset = open_data("synthetic").unwrap();
        dataset.train = dataset.train.take(96).unwrap();
        let model = settings.model().unwrap();
        let network = |images: Shape, classes: usize| model.trace(images, classes);
        let folder = tempfile::tempdir().unwrap();
        let train = |steps_per_launch: u64, log_every: u64| {
            let out = folder.path().join(format!("{steps_per_launch}-{log_every}"));
            let mut settings = settings.clone();
            settings.run.log_every = log_every;
            let subject = Subject {
                network: &network,
                network_name: None,
                dataset: dataset.clone(),
                data_name: None,
                method: settings.method().unwrap(),
                method_name: None,
                settings,
            };
            let mut run = Run::<S>::open(subject, Some(out.clone()), false).unwrap();
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
