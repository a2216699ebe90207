//! The training loop.

use std::cmp::Ordering::{Equal, Less};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Number;

use super::TrainError;
use super::bootstrap;
use super::curvature::{BatchNormName, CurvatureMeter, CurvatureSettings};
use super::evaluate::{Evaluation, Evaluator};
use super::files::{hold, write_npy};
use super::folder::{self, Config};
use super::images::open_device;
use super::log::{Log, Record, is_better};
use super::queue::Queue;
use super::settings::{CurvatureLogSettings, Measure, RunSettings};
use super::state::State;
use super::training::Subject;
use super::tuning;
use crate::data::{self, Dataset, Images, Split};
use crate::device::{Compute, Device, Error, Event, RecordedGraph, Slice, no_gpu};
use crate::kernels::batch_norm::Mode;
use crate::optim::{Decay, RhoSchedule, Schedule, Telemetry};

/// A sign that a run does not do what it should.
#[derive(Debug, Clone, PartialEq)]
pub enum Warning {
    /// The driver refuses to record steps, so each of their kernels is launched by itself, with the same results.
    NotRecorded {
        /// The driver's reason.
        reason: String,
    },
    /// The mean loss of 50 steps, or of an epoch, is above ten times the first of these means, or that of guessing if
    /// this is less.
    LossRose {
        /// Steps done.
        step: u64,
        /// The mean loss now.
        loss: f64,
        /// The first mean, or that of guessing.
        first: f64,
    },
    /// Steps were skipped because something was not finite, in f32 or bf16, where no loss scale explains it.
    StepsSkipped {
        /// Steps done.
        step: u64,
        /// How many steps of this part of the run were skipped.
        skipped: u32,
    },
    /// The rate does not fall at a milestone, because the run ends before.
    MilestoneBehindEnd {
        /// The steps of the run.
        steps: u64,
        /// The step of the milestone.
        milestone: u64,
    },
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotRecorded { reason } => {
                write!(f, "steps cannot be recorded for the GPU, and are slower: {reason}")
            }
            Self::LossRose { step, loss, first } => {
                let loss = if *loss < 1e4 { format!("{loss:.2}") } else { format!("{loss:.2e}") };
                write!(f, "step {step}: the mean loss has risen from {first:.2} to {loss}")
            }
            Self::StepsSkipped { step, skipped } => {
                let steps = if *skipped == 1 { "step was" } else { "steps were" };
                write!(f, "step {step}: {skipped} {steps} skipped as not finite")
            }
            Self::MilestoneBehindEnd { steps, milestone } => {
                write!(f, "the rate does not fall at step {milestone}, because the run has {steps} steps")
            }
        }
    }
}

/// What a run reports to its caller.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Before the start, the pictures of a split are decoded for the first time.
    Reading {
        /// Pictures done.
        done: usize,
        /// Pictures of the split.
        of: usize,
    },
    /// The steps of an epoch are done, and its test begins.
    Testing,
    /// Before the first step.
    Start {
        /// The device's name and description.
        device: String,
        /// The data set's name.
        data: String,
        /// Training and test images.
        images: (usize, usize),
        /// Number of classes.
        classes: usize,
        /// The classes without an image.
        absent_classes: Vec<u32>,
        /// With a bootstrap: training images whose label it has changed.
        relabelled: Option<usize>,
        /// Number of parameters that are trained, and of frozen ones.
        parameters: [usize; 2],
        /// Bytes of the training plan's arena.
        arena_bytes: usize,
        /// Steps of the whole run, and those already done.
        steps: (u64, u64),
        /// Steps per epoch.
        steps_per_epoch: u64,
    },
    /// A few times a second.
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
        /// The measure.
        measure: Measure,
        /// Steps of the measure done, and in all.
        steps: (usize, usize),
    },
    /// After each epoch, and after each measurement of the curvature.
    Epoch(Record),
    /// The run does not do what it should. Each kind of warning is given once.
    Warning(Warning),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Whether it was stopped before its end.
    pub interrupted: bool,
    /// The mean loss that exceeded `max_loss` and ended the run; NaN where no loss was finite.
    pub diverged: Option<f64>,
    /// Steps done.
    pub steps: u64,
    /// Steps skipped because something was not finite.
    pub skipped: u32,
    /// The result on the test images; none if interrupted or diverged.
    pub test: Option<Evaluation>,
    /// The best accuracy of an epoch on the validation images, if there are any.
    pub best_validation_accuracy: Option<f64>,
    /// Seconds of training over all parts of the run, without evaluation.
    pub seconds: f64,
    /// Images per second of training.
    pub images_per_second: f64,
    /// The mean loss above which the run counts as diverged.
    pub max_loss: f64,
    /// The folder with its files.
    pub out: Option<PathBuf>,
}

/// The loss is checked for divergence after this many steps, and after each epoch.
const WINDOW_STEPS: u64 = 50;
/// Steps that are launched on a GPU at once, as one graph, where the host has nothing to do between them.
const STEPS_PER_LAUNCH: u64 = 8;

/// While a GPU runs a launch, the images of so many are decoded: those of the next, and of one more, so that pictures
/// that take longer delay nothing.
const LAUNCHES_AHEAD: usize = 2;

/// How often a run reads its sums from the device to report them.
const REPORT: Duration = Duration::from_millis(250);

/// A run in progress, its activations stored as `S`. Tests are in f32 whatever `S` is: of the weights as they are
/// saved.
pub(super) struct Run<S: Compute<Master = f32>> {
    settings: RunSettings,
    config: Config,
    out: Option<PathBuf>,
    device: Device,
    data: String,
    images: (usize, usize),
    classes: usize,
    absent_classes: Vec<u32>,
    relabelled: Option<usize>,
    state: State<S>,
    evaluator: Evaluator,
    /// On the training images that are held out, and the best result so far: accuracy and loss.
    validator: Option<Evaluator>,
    best: Option<(f64, f64)>,
    curvature: Option<CurvatureLog>,
    log: Option<Log>,
    schedule: Schedule,
    rho_schedule: RhoSchedule,
    /// The steps before weights are averaged over epochs, if they are.
    swa_start: Option<u64>,
    /// Steps of the run, and of an epoch.
    steps: u64,
    steps_per_epoch: u64,
    steps_per_launch: u64,
    /// Steps done now, and when this part of the run began.
    step: u64,
    started_at: u64,
    /// The epoch whose order and learning rates are on the device.
    prepared_epoch: Option<u64>,
    recorded: Recorded,
    /// Whether the driver has refused to record a step.
    recording_refused: bool,
    /// The images of the steps to come, where the pictures stay in files.
    queue: Option<Queue>,
    window: Window,
    /// The mean loss above which the run counts as diverged, and the one that ended it.
    max_loss: f64,
    diverged: Option<f64>,
    /// The first mean loss, which warnings were given, and the steps that were skipped before this part of the run.
    first_loss: Option<f64>,
    warned: [bool; 2],
    skipped_before: u32,
    /// The line of an epoch whose test was stopped.
    untested: Option<Record>,
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
    /// The ends of the last two launches, the older one first.
    ends: [Option<Event>; 2],
}

impl<S: Compute<Master = f32>> Run<S> {
    /// Puts data, network and method on the device. A run that is resumed continues from its checkpoint.
    pub fn open(mut subject: Subject<'_>, out: Option<PathBuf>, resume: bool) -> Result<Self, TrainError> {
        let data = subject.data();
        let resumed = out.as_deref().filter(|_| resume);
        // Nobody else may change a run after its checkpoint is read and before it goes on.
        let held = resumed.map(hold).transpose()?;
        let device = open_device(&subject.settings.run.device, subject.settings.run.threads)?;
        let relabelled = bootstrap::relabel(&mut subject, &device, resumed)?;
        let config = subject.config()?;
        resumed.map_or(Ok(()), |run| folder::check_images(run, &config))?;
        // On the CPU several steps per launch gain nothing, and a run would stop later.
        let steps_per_launch = subject.steps_per_launch.unwrap_or(if device.is_host() { 1 } else { STEPS_PER_LAUNCH });
        let Subject { settings, network, dataset, validation, absent_classes, normalization, method, .. } = subject;
        let (train, test) = (&dataset.train, &dataset.test);

        let max_loss = settings.run.max_loss.unwrap_or(10.0 * (train.classes.max(2) as f64).ln());

        let batch = settings.data.batch_size;
        let steps_per_epoch = (train.len() / batch) as u64;
        if steps_per_epoch == 0 {
            let reason = format!("{batch}, but there are only {} training images", train.len());
            return Err(TrainError::setting("batch-size", reason));
        }
        let steps = settings.run.steps.unwrap_or(settings.run.epochs.saturating_mul(steps_per_epoch));
        let schedule = settings.schedule(&*method, steps, steps_per_epoch)?;

        let measured = settings.curvature(&*method);
        let mut state =
            State::new(&device, &settings, (network, &data), (train, steps_per_launch), normalization, method)?;
        // Weights and statistics are those of the state, so what it freezes is frozen everywhere.
        let frozen = settings.model.freeze.clone().unwrap_or_default();
        let network = &tuning::frozen(network, &frozen);
        let evaluator = Evaluator::new(&device, network, (&data, test), normalization, batch, Mode::Eval)?;
        let validator = validation
            .map(|images| Evaluator::new(&device, network, (&data, &images), normalization, batch, Mode::Eval))
            .transpose()?;
        let meter = |(every, wanted)| {
            let images = curvature_images(&settings.curvature, &dataset)?;
            let (part, mode) = (CurvatureMeter::USUAL_PART, settings.curvature.curvature_bn.mode());
            let meter = CurvatureMeter::new(&device, network, (&data, &images), normalization, part, mode)?;
            Ok::<_, TrainError>(CurvatureLog { every, settings: wanted, meter })
        };
        let curvature = measured.map(meter).transpose()?;
        let saved = resumed.map(|run| folder::saved(run, &config)).transpose()?.flatten();
        // A checkpoint has the weights; the file that the run began with may be gone.
        if let Some(file) = settings.model.init.as_ref().filter(|_| saved.is_none()) {
            state.load(Path::new(file), settings.model.reset_head)?;
        }
        let (mut step, mut earlier, mut untested) = (0, 0.0, None);
        if let (Some(saved), Some(run)) = (saved, &out) {
            state.restore(&saved, run)?;
            (step, earlier, untested) = (saved.step, saved.seconds, saved.untested);
        }
        let parts = samples_of_steps(&settings, train.len(), step..steps);
        let queue = state.images.queue(parts, LAUNCHES_AHEAD * steps_per_launch as usize);
        let log = out.as_ref().map(|run| folder::open(run, &config, held, (step, steps))).transpose()?;
        if let (Some(run), Some(relabelled)) = (&out, &relabelled) {
            write_npy(&run.join(bootstrap::FILE), &relabelled.labels, &[relabelled.labels.len() as u64])?;
        }
        Ok(Self {
            config,
            out,
            images: (train.len(), test.len()),
            classes: train.classes,
            absent_classes,
            relabelled: relabelled.map(|relabelled| relabelled.changed),
            data: dataset.name,
            window: Window { earlier: [0.0; 3], start: state.read_totals()? },
            skipped_before: state.optimizer.telemetry()?.skipped,
            state,
            evaluator,
            validator,
            best: log.as_ref().and_then(|log| log.best),
            curvature,
            log,
            schedule,
            rho_schedule: settings.optimizer.rho_schedule,
            swa_start: settings.swa_start(steps, steps_per_epoch)?,
            settings,
            steps,
            steps_per_epoch,
            steps_per_launch,
            device,
            step,
            started_at: step,
            prepared_epoch: None,
            recorded: Recorded::default(),
            recording_refused: false,
            queue,
            max_loss,
            diverged: None,
            first_loss: None,
            warned: [false; 2],
            untested,
            seconds: earlier,
            earlier,
            clock: Instant::now(),
            epoch_started_at: step,
            reported: Instant::now(),
        })
    }

    /// Trains to the end, or until the run is stopped or diverges. If a picture cannot be read, what was trained before
    /// is saved.
    pub fn train(mut self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<Summary, TrainError> {
        let found = self.train_to_end(stop, progress);
        if matches!(found, Err(TrainError::Data(_))) && self.diverged.is_none() {
            self.seconds += self.clock.elapsed().as_secs_f64();
            self.save()?;
        }
        found
    }

    fn train_to_end(&mut self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<Summary, TrainError> {
        let mut device = format!("{} ({})", self.device.name(), self.device.description());
        if self.settings.run.device == "auto" && self.device.is_host() {
            device += &no_gpu().map(|reason| format!("; no GPU: {reason}")).unwrap_or_default();
        }
        progress(Progress::Start {
            device,
            data: self.data.clone(),
            images: self.images,
            classes: self.classes,
            absent_classes: self.absent_classes.clone(),
            relabelled: self.relabelled,
            parameters: self.state.parameter_counts(),
            arena_bytes: self.state.plan.arena_bytes(),
            steps: (self.steps, self.step),
            steps_per_epoch: self.steps_per_epoch,
        });
        let late = self.schedule.milestones.iter().find(|&&milestone| milestone >= self.steps);
        if let (Decay::Step, Some(&milestone)) = (self.schedule.decay, late) {
            progress(Progress::Warning(Warning::MilestoneBehindEnd { steps: self.steps, milestone }));
        }
        // A run that was stopped during its test or its measurement catches up on it.
        let (mut test, mut unfinished) = (None, false);
        if let Some(record) = self.untested.take() {
            test = self.test_epoch(record, stop, progress)?;
            unfinished = test.is_none();
            // The epoch's sums begin again after its test.
            self.window = Window { earlier: [0.0; 3], start: self.state.read_totals()? };
        }
        let unmeasured = self.log.as_ref().is_some_and(|log| !log.has_curvature_of(self.step));
        if self.step > 0 && self.at_epoch_end() && unmeasured && self.curvature_is_due() && !unfinished {
            unfinished = !self.measure_curvature(stop, progress)?;
        }
        (self.clock, self.reported) = (Instant::now(), Instant::now());
        while self.step < self.steps && self.diverged.is_none() && !stop.load(Ordering::Relaxed) {
            self.prepare_epoch()?;
            let logged = self.is_logged(self.step + 1);
            if !self.advance(logged, stop, progress)? {
                break;
            }
            self.check_divergence(progress)?;
            if logged {
                self.log_step()?;
            }
            if self.at_epoch_end() || self.diverged.is_some() {
                self.report(progress)?;
                let record = self.end_epoch()?;
                // A run that has diverged is not resumed, so its last line is completed.
                let ended = AtomicBool::new(false);
                test = self.test_epoch(record, if self.diverged.is_some() { &ended } else { stop }, progress)?;
                unfinished = test.is_none();
                if self.diverged.is_none() && self.curvature_is_due() && !unfinished {
                    unfinished = !self.measure_curvature(stop, progress)?;
                }
                (self.clock, self.epoch_started_at) = (Instant::now(), self.step);
            } else if self.reported.elapsed() > REPORT {
                self.report(progress)?;
            }
        }
        self.device.synchronize()?;
        let mut interrupted = (self.step < self.steps || unfinished) && self.diverged.is_none();
        if interrupted {
            self.seconds += self.clock.elapsed().as_secs_f64();
            self.save()?;
        } else if test.is_none() && self.diverged.is_none() {
            // A finished run was resumed. Its result is reported, and its weights are written if it was stopped
            // between its last checkpoint and its weights.
            test = self.evaluate(stop)?;
            interrupted = test.is_none();
            if let (Some(run), Some(log)) = (&self.out, &self.log) {
                log.held().check()?;
                self.state.save_weights(run)?;
            }
        }
        let trained = (self.step - self.started_at) as f64 * self.state.batch as f64;
        let seconds = self.seconds - self.earlier;
        Ok(Summary {
            interrupted,
            diverged: self.diverged,
            steps: self.step,
            skipped: self.state.optimizer.telemetry()?.skipped,
            test: test.filter(|_| !interrupted && self.diverged.is_none()),
            best_validation_accuracy: self.best.map(|(accuracy, _)| accuracy),
            seconds: self.seconds,
            images_per_second: if trained > 0.0 { trained / seconds } else { 0.0 },
            max_loss: self.max_loss,
            out: self.out.clone(),
        })
    }

    /// Writes the epoch's order of images and its learning rates to the device, once.
    fn prepare_epoch(&mut self) -> Result<(), TrainError> {
        let Self { state, settings, schedule, step, steps_per_epoch, .. } = self;
        let (epoch, within) = (*step / *steps_per_epoch, (*step % *steps_per_epoch) as usize);
        if self.prepared_epoch.replace(epoch) == Some(epoch) {
            return Ok(());
        }
        // Slots are taken in turn, whatever the order.
        if !settings.data.no_shuffle && !state.images.is_streamed() {
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

    /// Takes the next step, or the next few. Returns whether it was not stopped while it waited for images.
    fn advance(
        &mut self,
        logged: bool,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<bool, TrainError> {
        let repeats = self.state.optimizer.settings().method.repeats()
            && self.rho_schedule == RhoSchedule::Constant
            && !self.recording_refused;
        // The first step allocates memory, and a logged step does more work.
        let is_alone = logged || !repeats || self.step == self.started_at;
        let count = match self.steps_per_launch {
            several if !is_alone && several <= self.steps_alone() => several,
            _ => 1,
        };
        if !self.take_images(count, stop)? {
            return Ok(false);
        }
        let Self { state, recorded, device, step, .. } = self;
        state.optimizer.observe(logged);
        state.optimizer.scale_rho(self.rho_schedule.factor(*step, &self.schedule));
        if is_alone {
            state.step()?;
            *step += 1;
            return Ok(true);
        }
        let Recorded { one, several, ends } = recorded;
        let slot = if count > 1 { several } else { one };
        let graph = match slot {
            Some(graph) => graph,
            None => match device.capture(|| (0..count).try_for_each(|_| state.step())) {
                Ok(graph) => slot.insert(graph),
                // Nothing has been done yet.
                Err(Error::Cuda { message: reason, .. }) => {
                    self.recording_refused = true;
                    progress(Progress::Warning(Warning::NotRecorded { reason }));
                    (0..count).try_for_each(|_| state.step())?;
                    *step += count;
                    return Ok(true);
                }
                Err(other) => return Err(other.into()),
            },
        };
        // The host stays at most two launches ahead. So progress is shown as it is made, and Ctrl-C waits for little.
        if let Some(end) = &ends[0] {
            end.wait()?;
        }
        graph.replay()?;
        ends.rotate_left(1);
        ends[1] = Some(device.event()?);
        *step += count;
        Ok(true)
    }

    /// Puts the images of the next steps on the device, where they are not there already. Returns whether it was not
    /// stopped.
    fn take_images(&mut self, steps: u64, stop: &AtomicBool) -> Result<bool, TrainError> {
        let Some(queue) = &mut self.queue else { return Ok(true) };
        for step in self.step..self.step + steps {
            let Some(part) = queue.next(stop)? else { return Ok(false) };
            let place = (step % self.steps_per_epoch) as usize * self.state.batch;
            self.state.images.put(place, part)?;
        }
        Ok(true)
    }

    /// How many of the next steps need nothing from the host in between.
    fn steps_alone(&self) -> u64 {
        let until = |every: u64| every - self.step % every;
        let alone = until(self.steps_per_epoch).min(self.steps - self.step).min(until(WINDOW_STEPS));
        match self.log_every() {
            // A logged step is taken alone.
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

    /// Checks whether the loss has exceeded `max_loss`, and warns before it does.
    fn check_divergence(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), TrainError> {
        let (window_ends, epoch_ends) = (self.step.is_multiple_of(WINDOW_STEPS), self.at_epoch_end());
        if !(window_ends || epoch_ends) {
            return Ok(());
        }
        let sums = self.state.read_totals()?;
        let most = self.max_loss;
        if window_ends {
            let loss = self.window.end(sums);
            // A loss that is NaN, because every step was skipped, counts as diverged.
            let within = most.is_infinite() || matches!(loss.partial_cmp(&most), Some(Less | Equal));
            self.diverged = Some(loss).filter(|_| !within);
            self.warn(loss, progress)?;
        }
        if self.step.is_multiple_of(self.steps_per_epoch) {
            self.window.cross_epoch(sums);
        }
        // The few steps of one epoch may all be skipped once. Several at the end of a run may not.
        let (loss, several) = (sums[0] / sums[2], !(self.step - 1).is_multiple_of(self.steps_per_epoch));
        let diverged = epoch_ends && (loss > most || loss.is_nan() && several && self.step == self.steps);
        self.diverged = self.diverged.or(Some(loss).filter(|_| diverged && most.is_finite()));
        if epoch_ends { self.warn(loss, progress) } else { Ok(()) }
    }

    /// Tells the first signs of a divergence, of which a mean loss is one. The error of a run that has diverged says
    /// more.
    fn warn(&mut self, loss: f64, progress: &mut dyn FnMut(Progress)) -> Result<(), TrainError> {
        if self.diverged.is_some() {
            return Ok(());
        }
        let step = self.step;
        // Steps that have diverged already are no measure: nothing begins much above the loss of guessing.
        let guess = (self.classes.max(2) as f64).ln();
        let first = *self.first_loss.get_or_insert(loss.min(guess));
        if loss > 10.0 * first && !std::mem::replace(&mut self.warned[0], true) {
            progress(Progress::Warning(Warning::LossRose { step, loss, first }));
        }
        let skipped = self.state.optimizer.telemetry()?.skipped.saturating_sub(self.skipped_before);
        // The scale of the loss is found by steps that are skipped.
        if skipped > 0 && self.state.loss_scale()?.is_none() && !std::mem::replace(&mut self.warned[1], true) {
            progress(Progress::Warning(Warning::StepsSkipped { step, skipped }));
        }
        Ok(())
    }

    /// Training speed since the epoch, or this part of it, began.
    fn images_per_second(&self) -> f64 {
        let images = (self.step - self.epoch_started_at) as f64 * self.state.batch as f64;
        images / self.clock.elapsed().as_secs_f64()
    }

    /// The newest step's learning rate: the method's own, or the schedule's.
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
            method: own_numbers(&telemetry),
            sharpness: telemetry.sharpness.and_then(finite),
            cosine_gradients: telemetry.cosine_gradients.and_then(finite),
            cosine_perturbation: telemetry.cosine_perturbation.and_then(finite),
            loss_scale: self.state.loss_scale()?.map(|[scale, _]| scale),
            skipped: telemetry.skipped,
        };
        match &mut self.log {
            Some(log) => log.write(&record),
            None => Ok(()),
        }
    }

    /// Reports the progress of the epoch.
    fn report(&mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), TrainError> {
        self.reported = Instant::now();
        let [loss, correct, samples] = self.state.read_totals()?;
        let (loss, accuracy) = (loss / samples, correct / samples);
        progress(Progress::Step { step: self.step, loss, accuracy, images_per_second: self.images_per_second() });
        Ok(())
    }

    /// Tests the current weights; none if it was stopped.
    fn evaluate(&mut self, stop: &AtomicBool) -> Result<Option<Evaluation>, TrainError> {
        let Self { evaluator, state, .. } = self;
        evaluate(evaluator, state.parameters.view(), state.plan.statistics().view(), stop)
    }

    /// Tests whatever an epoch's line of the log has a place for; none if it was stopped.
    fn test(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<Option<Tests>, TrainError> {
        let Some(test) = self.evaluate(stop)? else { return Ok(None) };
        let Self { evaluator, validator, state, .. } = self;
        let (mut validation, mut averaged) = (None, None);
        if let Some(validator) = validator {
            let (weights, statistics) = (state.parameters.view(), state.plan.statistics().view());
            let Some(found) = evaluate(validator, weights, statistics, stop)? else { return Ok(None) };
            validation = Some(found);
        }
        if let Some(average) = &state.average {
            let (weights, statistics) = (average.of.weights.view(), average.of.statistics.view());
            let Some(found) = evaluate(evaluator, weights, statistics, stop)? else { return Ok(None) };
            averaged = Some(found);
        }
        let Some(swa) = self.test_swa(stop)? else { return Ok(None) };
        if let Record::Epoch {
            test_loss,
            test_accuracy,
            validation_loss,
            validation_accuracy,
            ema_test_loss,
            ema_test_accuracy,
            swa_test_loss,
            swa_test_accuracy,
            ..
        } = record
        {
            let of = |found: Option<Evaluation>| found.map(|found| (finite(found.loss), found.accuracy)).unzip();
            (*test_loss, *test_accuracy) = (finite(test.loss), test.accuracy);
            let (loss, accuracy) = of(validation);
            (*validation_loss, *validation_accuracy) = (loss.flatten(), accuracy);
            let (loss, accuracy) = of(averaged);
            (*ema_test_loss, *ema_test_accuracy) = (loss.flatten(), accuracy);
            let (loss, accuracy) = of(swa);
            (*swa_test_loss, *swa_test_accuracy) = (loss.flatten(), accuracy);
        }
        Ok(Some(Tests { test, validation }))
    }

    /// At the end of the run: completes the mean of the weights over epochs, and tests it. Some(None) where there is
    /// none to test yet, and None if it was stopped.
    fn test_swa(&mut self, stop: &AtomicBool) -> Result<Option<Option<Evaluation>>, TrainError> {
        let Self { evaluator, state, .. } = self;
        if state.swa.is_none() || self.step < self.steps || self.diverged.is_some() {
            return Ok(Some(None));
        }
        let mut order: Vec<u32> = (0..state.images.count as u32).collect();
        // Files are often sorted by class, and a batch of one class has other statistics.
        data::epoch_order(self.settings.run.seed, self.steps / self.steps_per_epoch, &mut order);
        if !state.complete_average(&order, stop)? {
            return Ok(None);
        }
        let Some(swa) = &state.swa else { return Ok(Some(None)) };
        Ok(evaluate(evaluator, swa.of.weights.view(), swa.of.statistics.view(), stop)?.map(Some))
    }

    /// The line of the log of a (partial) epoch whose steps are done, before its test.
    fn end_epoch(&mut self) -> Result<Record, TrainError> {
        self.device.synchronize()?;
        let images_per_second = self.images_per_second();
        self.seconds += self.clock.elapsed().as_secs_f64();
        let averaged = self.swa_start.is_some_and(|start| self.step > start);
        if averaged && self.step.is_multiple_of(self.steps_per_epoch) && self.diverged.is_none() {
            // A run that was resumed with more epochs can have a mean from before the new start.
            let is_first = self.swa_start.is_some_and(|start| self.step - start <= self.steps_per_epoch);
            self.state.average_epoch(is_first)?;
        }
        let [loss, correct, samples] = self.state.read_totals()?;
        let telemetry = self.state.optimizer.telemetry()?;
        Ok(Record::Epoch {
            epoch: self.epoch(),
            step: self.step,
            train_loss: finite(loss / samples),
            train_accuracy: finite(correct / samples),
            test_loss: None,
            test_accuracy: 0.0,
            validation_loss: None,
            validation_accuracy: None,
            ema_test_loss: None,
            ema_test_accuracy: None,
            swa_test_loss: None,
            swa_test_accuracy: None,
            lr: self.learning_rate(&telemetry),
            gradient_norm: finite(telemetry.gradient_norm),
            method: own_numbers(&telemetry),
            images_per_second,
            seconds: self.seconds,
            device: self.device.chip().into(),
            diverged: self.diverged.is_some(),
            skipped: telemetry.skipped,
        })
    }

    /// Tests, logs and saves at the end of a (partial) epoch. Returns none if the test was stopped.
    fn test_epoch(
        &mut self,
        mut record: Record,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Evaluation>, TrainError> {
        progress(Progress::Testing);
        let tested = self.test(&mut record, stop);
        let Ok(Some(Tests { test, validation })) = tested else {
            // The seconds up to the test have been added.
            (self.untested, self.clock) = (Some(record), Instant::now());
            return tested.map(|_| None);
        };
        if let Some(found) = validation.filter(|_| self.diverged.is_none()) {
            self.keep_if_best(found)?;
        }
        // The sums of a partial epoch stay for a run that is resumed with more steps.
        if self.step.is_multiple_of(self.steps_per_epoch) {
            self.state.totals.clear()?;
        }
        if let Some(log) = &mut self.log {
            log.write(&record)?;
        }
        // Diverged weights do not replace good ones.
        if self.diverged.is_none() {
            self.save()?;
        }
        progress(Progress::Epoch(record));
        Ok(Some(test))
    }

    /// Saves the weights of the best epoch so far. This comes before the epoch's line in the log: a run that is killed
    /// in between and resumed repeats the epoch, with the same weights.
    fn keep_if_best(&mut self, found: Evaluation) -> Result<(), TrainError> {
        let found = (found.accuracy, if found.loss.is_finite() { found.loss } else { f64::INFINITY });
        if self.best.is_some_and(|best| !is_better(found, best)) {
            return Ok(());
        }
        self.best = Some(found);
        if let (Some(run), Some(log)) = (&self.out, &self.log) {
            log.held().check()?;
            self.state.save_now(&run.join("best.safetensors"))?;
        }
        Ok(())
    }

    fn curvature_is_due(&self) -> bool {
        self.curvature.as_ref().is_some_and(|curvature| self.epoch().is_multiple_of(curvature.every))
    }

    /// Measures the curvature at the current weights and writes it to the log. Returns whether it was not stopped.
    fn measure_curvature(&mut self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<bool, TrainError> {
        let (epoch, step) = (self.epoch(), self.step);
        let Some(CurvatureLog { settings, meter, .. }) = &mut self.curvature else { return Ok(true) };
        // Memory that is dropped while a graph exists is held, and each measurement allocates vectors. So the graphs
        // are dropped, and the next steps are recorded again.
        self.recorded = Recorded::default();
        let (weights, statistics) = (self.state.parameters.view(), self.state.plan.statistics().view());
        let mut tell = |measure, done, of| progress(Progress::Measuring { measure, steps: (done, of) });
        let found = TrainError::unless_stopped(meter.measure(stop, weights, statistics, settings, &mut tell))?;
        let Some(found) = found else { return Ok(false) };
        let record = Record::Curvature { epoch, step, measures: found.by_name() };
        if let Some(log) = &mut self.log {
            log.write(&record)?;
        }
        progress(Progress::Epoch(record));
        Ok(true)
    }

    /// Saves the current state of the run, if it has a folder.
    fn save(&self) -> Result<(), TrainError> {
        match &self.out {
            Some(run) => {
                self.log.as_ref().map_or(Ok(()), |log| log.held().check())?;
                let (settings, untested) = (self.config.text.clone(), self.untested.clone());
                self.state.save(run, settings, untested, (self.step, self.seconds))
            }
            None => Ok(()),
        }
    }
}

/// The results after an epoch.
struct Tests {
    test: Evaluation,
    validation: Option<Evaluation>,
}

/// Tests weights and running statistics; none if it was stopped.
fn evaluate(
    evaluator: &mut Evaluator,
    weights: Slice<'_, f32>,
    statistics: Slice<'_, f32>,
    stop: &AtomicBool,
) -> Result<Option<Evaluation>, TrainError> {
    let go_on = |_: Slice<'_, f32>| {
        let stopped = stop.load(Ordering::Relaxed);
        if stopped { Err(TrainError::Device(Error::Stopped)) } else { Ok(()) }
    };
    TrainError::unless_stopped(evaluator.evaluate(weights, statistics, go_on))
}

/// The samples of each of these steps, in the orders of their epochs.
fn samples_of_steps(
    settings: &RunSettings,
    samples: usize,
    steps: Range<u64>,
) -> impl Iterator<Item = Vec<u32>> + Send + 'static {
    let (batch, seed, is_shuffled) = (settings.data.batch_size, settings.run.seed, !settings.data.no_shuffle);
    let mut order: Vec<u32> = (0..samples as u32).collect();
    let (steps_per_epoch, mut epoch_of_order) = ((samples / batch) as u64, None);
    steps.map(move |step| {
        let epoch = step / steps_per_epoch;
        if is_shuffled && epoch_of_order.replace(epoch) != Some(epoch) {
            data::epoch_order(seed, epoch, &mut order);
        }
        let first = (step % steps_per_epoch) as usize * batch;
        order[first..first + batch].to_vec()
    })
}

/// The first images of a split, over which the curvature is measured.
fn curvature_images(settings: &CurvatureLogSettings, dataset: &Dataset) -> Result<Images, TrainError> {
    let images = match settings.curvature_split {
        Split::Train => &dataset.train,
        Split::Test => &dataset.test,
    };
    let usual = CurvatureMeter::usual_samples(&settings.curvature_measures).min(images.len());
    let samples = match (settings.curvature_samples, settings.curvature_bn) {
        (Some(samples), _) => samples,
        (None, BatchNormName::Eval) => usual,
        // Only whole parts have the statistics of a batch.
        (None, BatchNormName::Train) => {
            let part = CurvatureMeter::USUAL_PART.min(usual);
            usual / part * part
        }
    };
    if samples > images.len() {
        let reason = format!("{samples}, but there are only {} {} images", images.len(), settings.curvature_split);
        return Err(TrainError::setting("curvature-samples", reason));
    }
    let part = CurvatureMeter::USUAL_PART.min(samples);
    if settings.curvature_bn == BatchNormName::Train && !samples.is_multiple_of(part) {
        let reason = format!("{samples}, expected at most {part} or a multiple of it with `curvature-bn` train");
        return Err(TrainError::setting("curvature-samples", reason));
    }
    let pixels = images.bytes_of(0..samples)?.into_owned().into();
    Ok(Images { pixels, labels: images.labels[..samples].into(), ..*images })
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The method's own numbers and counters, by name. Numbers that are not finite are left out.
fn own_numbers(telemetry: &Telemetry) -> BTreeMap<String, Number> {
    let numbers = telemetry.method.iter().filter_map(|&(name, value)| Some((name, Number::from_f64(value)?)));
    let counters = telemetry.counters.iter().map(|&(name, count)| (name, Number::from(count)));
    numbers.chain(counters).map(|(name, number)| (name.to_string(), number)).collect()
}

/// Sums (loss, correct predictions, samples) of the steps since the loss was last checked.
struct Window {
    /// Sums of the epochs that have ended.
    earlier: [f64; 3],
    /// The current epoch's sums when the window or the epoch began.
    start: [f64; 3],
}

impl Window {
    /// Returns the mean loss and starts the next window.
    fn end(&mut self, sums: [f64; 3]) -> f64 {
        let of = |k: usize| self.earlier[k] + sums[k] - self.start[k];
        let loss = of(0) / of(2);
        *self = Self { earlier: [0.0; 3], start: sums };
        loss
    }

    /// An epoch ends, and its sums begin at zero again.
    fn cross_epoch(&mut self, sums: [f64; 3]) {
        let earlier = std::array::from_fn(|k| self.earlier[k] + sums[k] - self.start[k]);
        *self = Self { earlier, start: [0.0; 3] };
    }
}

/// What curvature is measured, and when.
struct CurvatureLog {
    /// After every so many epochs.
    every: u64,
    settings: CurvatureSettings,
    meter: CurvatureMeter,
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use half::bf16;

    use super::super::training::{Names, Subject};
    use super::super::{DataSettings, LoopSettings, RunImages, RunSettings, normalization, open_data};
    use super::{Compute, Run, Window};
    use crate::data::{Dataset, LoadOptions};
    use crate::plan::Shape;

    #[test]
    fn steps_of_one_launch_are_the_steps_themselves() {
        let mut dataset = open_data("synthetic", &LoadOptions::default(), &mut |_, _| true).unwrap();
        dataset.train = dataset.train.take(96).unwrap();
        dataset.test = dataset.test.take(24).unwrap();
        let folder = tempfile::tempdir().unwrap();
        every_way::<f32>(&dataset, &[3, 5], &folder.path().join("f32"));
        every_way::<bf16>(&dataset, &[], &folder.path().join("bf16"));
    }

    /// The slots of a launch are those of its steps, whatever steps of the epoch these are.
    #[test]
    fn streamed_images_are_those_in_memory_in_every_launch() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("pictures");
        for (split, count) in [("train", 96u32), ("test", 9)] {
            for index in 0..count {
                let class = data.join(split).join((index % 3).to_string());
                std::fs::create_dir_all(&class).unwrap();
                let pixel = |x: u32, y: u32| image::Rgb([1u32, 5, 9].map(|c| (index * 37 * c + x * y * 11) as u8));
                image::RgbImage::from_fn(12, 12, pixel).save(class.join(format!("{index}.png"))).unwrap();
            }
        }
        let models = [None, Some(0)].map(|memory| {
            let options = LoadOptions { memory, ..LoadOptions::default() };
            let dataset = open_data(data.to_str().unwrap(), &options, &mut |_, _| true).unwrap();
            assert_eq!(dataset.train.pixels.memory().is_none(), memory.is_some());
            every_way::<f32>(&dataset, &[3, 5], &folder.path().join(format!("{memory:?}")))
        });
        assert!(models[0] == models[1], "other bits when streamed");
    }

    /// 21 steps in epochs of 12, logged after 7, 14 and 21 or not at all, checked for divergence after 12 and 21.
    /// Returns the weights.
    fn every_way<S: Compute<Master = f32>>(dataset: &Dataset, steps_per_launch: &[u64], folder: &Path) -> Vec<u8> {
        let one_by_one = train::<S>(dataset, 1, 7, &folder.join("one by one"));
        assert_eq!(one_by_one.0.iter().filter(|record| record["kind"] == "step").count(), 3);
        for &several in steps_per_launch {
            let (log, model) = train::<S>(dataset, several, 7, &folder.join(several.to_string()));
            assert_eq!(log, one_by_one.0, "{several} steps per launch in {}", S::NAME);
            assert!(model == one_by_one.1, "{several} steps per launch have other bits in {}", S::NAME);
        }
        let unseen = train::<S>(dataset, 1, 0, &folder.join("unseen"));
        assert!(unseen.1 == one_by_one.1, "steps that nobody sees have other bits in {}", S::NAME);
        unseen.1
    }

    /// The log, without what depends on the clock, and the weights.
    fn train<S: Compute<Master = f32>>(
        dataset: &Dataset,
        steps_per_launch: u64,
        log_every: u64,
        out: &Path,
    ) -> (Vec<serde_json::Value>, Vec<u8>) {
        let data = DataSettings { batch_size: 8, ..DataSettings::default() };
        let run = LoopSettings {
            steps: Some(21),
            max_loss: Some(1e3),
            device: "cpu".into(),
            log_every,
            ..LoopSettings::default()
        };
        let settings = RunSettings { data, run, ..RunSettings::default() };
        let model = settings.model().unwrap();
        let network = |images: Shape, classes: usize| model.trace(images, classes);
        let normalization = normalization(None, None, (&dataset.mean, &dataset.std), 3).unwrap();
        let subject = Subject {
            network: &network,
            images: RunImages::of(dataset, &normalization),
            dataset: dataset.clone(),
            validation: None,
            absent_classes: Vec::new(),
            normalization,
            method: settings.method().unwrap(),
            names: Names::default(),
            settings,
            steps_per_launch: Some(steps_per_launch),
        };
        let run = Run::<S>::open(subject, Some(out.into()), false).unwrap();
        let summary = run.train(&AtomicBool::new(false), &mut |_| ()).unwrap();
        assert_eq!((summary.steps, summary.skipped), (21, 0));
        let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
        let mut records: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for key in ["images_per_second", "seconds"] {
            records.iter_mut().for_each(|record| record[key] = 0.into());
        }
        (records, std::fs::read(out.join("model.safetensors")).unwrap())
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
        // A window that ends with its epoch passes nothing on to the next.
        window.cross_epoch([15.0, 0.0, 3.0]);
        assert_eq!(window.end([7.0, 0.0, 1.0]), 7.0);
    }
}
