//! `polder train`: settings from flags and files, progress, and how a run ends early.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use polder::optim::Decay;
use polder::train::{Finding, Options, Progress, Recipe, Record, RunSettings, Summary, TrainError, Training};
use serde_json::json;

use super::flags::{Flags, OfRun};
use super::{Failure, counted, moved_images, option, print, shown, stop_on_signals, tell, tell_error};

#[derive(clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    options: Flags<OfRun>,
    /// Begin with the settings of a published experiment (see `polder recipes`); other options replace them
    #[arg(long, value_name = "NAME", conflicts_with = "config", help_heading = "Run")]
    recipe: Option<String>,
    /// Read options from this file; those on the command line replace them
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Write settings, log, weights and checkpoints to this folder
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "init", "recipe"], help_heading = "Run")]
    resume: Option<PathBuf>,
    /// Print one JSON object on standard output, everything else on standard error
    #[arg(long, help_heading = "Run")]
    json: bool,
    /// Print the result alone
    #[arg(long, help_heading = "Run")]
    quiet: bool,
    /// Also print every setting that has a value, more about each epoch, and without a terminal a line of progress
    /// every second
    #[arg(long, conflicts_with = "quiet", help_heading = "Run")]
    verbose: bool,
}

/// The settings, with the file that some of them come from, and a remark about a resumed run.
fn settings(args: &TrainArgs) -> Result<(RunSettings, Option<PathBuf>, Option<String>), TrainError> {
    let below = match (&args.config, &args.resume) {
        (Some(file), _) => Options::from_file(file)?,
        (None, Some(run)) => Options::of_run(run)?,
        (None, None) => Options::default(),
    };
    let below = match &args.recipe {
        Some(name) => below.over(Recipe::find(name)?.options()?),
        None => below,
    };
    // The other values of a recipe are those of its method.
    for name in ["optimizer", "base"] {
        let (of_recipe, given) = (below.get(name), args.options.given.get(name));
        if let (Some(recipe), Some(_), true) = (&args.recipe, given, given != of_recipe) {
            return Err(option(name, format!("cannot be changed in the recipe {recipe}")));
        }
    }
    let given = &args.options.given;
    let file = args.config.clone().or(args.resume.as_ref().map(|run| run.join("config.toml")));
    let settings = given.clone().over(below.clone()).resolve();
    let settings = settings.map_err(|error| error.of_file(given, file.as_deref()))?.with_absolute_paths();
    if args.resume.is_some() {
        let before = below.resolve()?.with_absolute_paths();
        settings.continues(&before)?;
        let length = |settings: &RunSettings| (settings.run.epochs, settings.run.steps);
        if length(&settings) != length(&before) && settings.run.schedule != Decay::Constant {
            let remark = format!("the {} schedule now ends with the run's new length", settings.run.schedule);
            return Ok((settings, file, Some(remark)));
        }
    }
    Ok((settings, file, None))
}

pub fn run(args: TrainArgs) -> Result<ExitCode, Failure> {
    let (settings, file, remark) = settings(&args)?;
    let given = args.options.given;
    if settings.run.log_every > 0 && args.out.is_none() && args.resume.is_none() {
        tell("--log-every has no effect without --out, because there is no log");
    }
    if settings.curvature.curvature_every > 0 && args.quiet && args.out.is_none() && args.resume.is_none() {
        tell("--curvature-every has no effect with --quiet and without --out, because nothing is shown or written");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut display = Display::new(args.json, args.quiet, args.verbose, remark);
    if args.verbose {
        settings.to_toml()?.lines().for_each(|setting| display.line(setting));
    }
    stop_on_signals(&stop, "step", display.bar.clone());
    let resumed = args.resume.is_some();
    let training = Training::new(settings.clone());
    let training = match (args.out, args.resume) {
        (Some(out), _) => training.out(out),
        (None, Some(run)) => training.resume(run),
        (None, None) => training,
    };
    let summary = training.run_with(&stop, &mut |progress| display.show(progress));
    display.finish();
    let of_run = resumed && !given.has("data");
    let summary = summary.map_err(|error| if of_run { moved_images(error) } else { error });
    let summary = summary.map_err(|error| error.of_file(&given, file.as_deref()));
    let Some(summary) = TrainError::unless_stopped(summary)? else {
        tell("interrupted while the data set was read; nothing was begun");
        return Ok(ExitCode::from(130));
    };
    if args.json {
        print_json(&summary, &settings)?;
    }
    if summary.interrupted {
        let then = match &summary.out {
            Some(run) => format!("`polder train --resume {}` continues from there", run.display()),
            None => "nothing was saved, because there was no --out".into(),
        };
        tell(&format!("interrupted after step {}; {then}", summary.steps));
        return Ok(ExitCode::from(130));
    }
    if let Some(loss) = summary.diverged {
        let most = summary.max_loss;
        let found =
            if loss.is_finite() { format!("a mean loss of {}", shown(loss, 4)) } else { "no finite loss".into() };
        let log = match &summary.out {
            Some(run) => format!("; the log is in {}", run.join("log.jsonl").display()),
            None => String::new(),
        };
        tell_error(&format!("diverged: {found} up to step {}, --max-loss {}{log}", summary.steps, shown(most, 3)));
        return Ok(ExitCode::FAILURE);
    }
    if let (Some(test), false) = (summary.test, args.json) {
        let (accuracy, skipped) = (100.0 * test.accuracy, summary.skipped);
        let skips =
            if skipped > 0 { format!("; {} skipped as not finite", counted(skipped, "step")) } else { String::new() };
        print(&format!(
            "test accuracy {accuracy:.2} % ({} of {} wrong), test loss {}; {} in {:.1} s, {:.0} images/s{skips}",
            test.errors,
            test.samples,
            shown(test.loss, 4),
            counted(summary.steps, "step"),
            summary.seconds,
            summary.images_per_second
        ))?;
        if let Some(run) = &summary.out {
            print(&format!("weights: {}", run.join("model.safetensors").display()))?;
            if !args.quiet {
                let run = run.display();
                print(&format!("next: polder eval, curvature or landscape --run {run}; polder report {run}"))?;
                // Another schedule would stretch over the longer run, which then is not the one that was begun.
                if settings.run.schedule == Decay::Constant {
                    print(&format!("longer: polder train --resume {run} --epochs N"))?;
                }
            }
        } else if !args.quiet {
            print("nothing was saved; --out DIR keeps weights, log and settings")?;
        }
    }
    if summary.test.is_some_and(|test| !test.loss.is_finite()) {
        tell_error("the test loss is not finite");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(summary: &Summary, settings: &RunSettings) -> Result<(), Failure> {
    print(
        &json!({
            "interrupted": summary.interrupted,
            "diverged": summary.diverged.is_some(),
            "steps": summary.steps,
            "skipped": summary.skipped,
            "test": summary.test,
            "best_validation_accuracy": summary.best_validation_accuracy,
            "seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
            "out": summary.out.as_ref().map(|run| run.display().to_string()),
            "options": settings.to_json()?,
        })
        .to_string(),
    )
}

/// Without a terminal, a line about a long epoch is printed this often, and with `--verbose`.
const EVERY: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(1)];

/// Progress of training: a bar on a terminal, plain lines otherwise.
struct Display {
    bar: Option<ProgressBar>,
    /// Whether standard output is reserved for the JSON object.
    json: bool,
    /// Whether nothing is shown before the result.
    quiet: bool,
    /// Whether more is shown.
    verbose: bool,
    /// What is shown once the run has begun.
    remark: Option<String>,
    clock: Clock,
    steps: u64,
    steps_per_epoch: u64,
    /// When the last line was printed.
    told: Instant,
}

/// What the remaining time is computed from: the time of training, and that of tests and measurements.
struct Clock {
    start: Instant,
    /// Steps done when this part of the run began, and now.
    first: u64,
    step: u64,
    /// When the current test or measurement began, and the duration and number of those that have ended.
    pause: Option<Instant>,
    paused: Duration,
    pauses: u64,
}

impl Clock {
    fn new() -> Self {
        let start = Instant::now();
        Self { start, first: 0, step: 0, pause: None, paused: Duration::ZERO, pauses: 0 }
    }

    /// A test or a measurement begins or goes on.
    fn pause(&mut self) {
        self.pause.get_or_insert_with(Instant::now);
    }

    /// Training goes on.
    fn resume(&mut self, step: u64) {
        if let Some(pause) = self.pause.take() {
            self.paused += pause.elapsed();
            self.pauses += 1;
        }
        self.step = step;
    }

    /// The time until the end, with the tests and measurements to come. None before the first steps.
    fn remaining(&self, steps: u64, steps_per_epoch: u64) -> Option<Duration> {
        let done = self.step.checked_sub(self.first).filter(|&done| done > 0)?;
        let current = self.pause.map_or(Duration::ZERO, |pause| pause.elapsed());
        let training = (self.start.elapsed() - self.paused).saturating_sub(current).as_secs_f64();
        let left = steps.saturating_sub(self.step) as f64 * training / done as f64;
        let tests = steps.div_ceil(steps_per_epoch.max(1)) - self.step / steps_per_epoch.max(1);
        let each = if self.pauses > 0 { self.paused.as_secs_f64() / self.pauses as f64 } else { 0.0 };
        // What is left of the current one.
        let rest = if self.pause.is_some() { (each - current.as_secs_f64()).max(0.0) } else { 0.0 };
        Duration::try_from_secs_f64(left + tests as f64 * each + rest).ok()
    }
}

/// A duration as a user reads it: 1:02:03, or 2:03.
fn written(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

impl Display {
    fn new(json: bool, quiet: bool, verbose: bool, remark: Option<String>) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            // The message is cut at the end of the line, so that the bar never takes two. The prefix says what is left.
            let template = "{spinner} {wide_bar} {prefix}\n  {wide_msg}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            // It moves while nothing is reported, too.
            // It panics where no thread can be made.
            if std::thread::Builder::new().spawn(|| ()).is_ok() {
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            bar
        });
        Self {
            bar,
            json,
            quiet,
            verbose,
            remark,
            clock: Clock::new(),
            steps: 0,
            steps_per_epoch: 1,
            told: Instant::now(),
        }
    }

    fn line(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        self.told = Instant::now();
        // A failure to print is reported at the end, by the last line.
        self.above_the_bar(|| if self.json { tell(text) } else { drop(print(text)) });
    }

    /// Writes a line, and draws the bar again below it.
    fn above_the_bar(&self, write: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Epoch, step, elapsed and remaining time.
    fn place(&self) -> String {
        let Self { clock, steps, steps_per_epoch, .. } = self;
        let per_epoch = (*steps_per_epoch).max(1);
        let (epoch, epochs) = (clock.step.div_ceil(per_epoch).max(1), steps.div_ceil(per_epoch));
        let left = clock.remaining(*steps, per_epoch).map_or("?".into(), written);
        let elapsed = written(clock.start.elapsed());
        format!("epoch {epoch}/{epochs}, step {}/{steps}, {elapsed} elapsed, {left} left", clock.step)
    }

    /// Shows what is going on: on the bar, or as a line if the last one was printed long ago.
    fn activity(&mut self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_position(self.clock.step);
            bar.set_prefix(self.place());
            bar.set_message(text);
        } else if self.told.elapsed() >= EVERY[usize::from(self.verbose)] {
            self.line(&format!("{}: {text}", self.place()));
        }
    }

    fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Start {
                device,
                data,
                images,
                classes,
                absent_classes,
                relabelled,
                parameters,
                arena_bytes,
                steps,
                steps_per_epoch,
            } => {
                let (train, test) = images;
                let mebibytes = arena_bytes as f64 / f64::from(1 << 20);
                self.line(&format!("{data}: {train} training and {test} test images; {device}"));
                if !absent_classes.is_empty() {
                    let first: Vec<String> = absent_classes.iter().take(5).map(u32::to_string).collect();
                    let more = if absent_classes.len() > 5 { ", …" } else { "" };
                    let labels = first.join(", ") + more;
                    self.line(&format!(
                        "{classes} classes, but no image has label {labels}; --classes sets the number"
                    ));
                }
                if let Some(changed) = relabelled {
                    self.line(&format!("bootstrap: other labels for {changed} of the {train} training images"));
                }
                let [trained, frozen] = parameters;
                let frozen = if frozen > 0 { format!(" and {frozen} frozen ones") } else { String::new() };
                self.line(&format!("{trained} parameters{frozen}, {mebibytes:.0} MiB of activations and gradients"));
                let (all, done) = steps;
                if done > 0 && done < all {
                    self.line(&format!("resuming at step {done} of {all} (epoch {} on)", done / steps_per_epoch + 1));
                } else if done > 0 {
                    self.line(&format!("already at step {done}, {all} were asked for: nothing left to train"));
                }
                if let Some(remark) = self.remark.take() {
                    self.line(&remark);
                }
                (self.steps, self.steps_per_epoch) = (all, steps_per_epoch);
                self.clock = Clock { first: done, step: done, ..Clock::new() };
                if let Some(bar) = &self.bar {
                    bar.set_length(all);
                    bar.set_position(done);
                }
            }
            Progress::Reading { done, of } => {
                let text = format!("reading pictures: {} of {}", HumanCount(done as u64), HumanCount(of as u64));
                if let Some(bar) = &self.bar {
                    bar.set_length(of as u64);
                    bar.set_position(done as u64);
                    bar.set_message(text);
                } else if self.told.elapsed() >= EVERY[usize::from(self.verbose)] {
                    self.line(&text);
                }
            }
            Progress::Step { step, loss, accuracy, images_per_second } => {
                self.clock.resume(step);
                let percent = 100.0 * accuracy;
                self.activity(format!("loss {loss:.3}, accuracy {percent:.1} %, {images_per_second:.0} images/s"));
            }
            Progress::Testing => {
                self.clock.pause();
                self.activity("testing".into());
            }
            Progress::Measuring { measure, steps: (done, of) } => {
                self.clock.pause();
                self.activity(format!("measuring {measure}: {done} of {of}"));
            }
            Progress::Epoch(record) => self.record(&record),
            Progress::Warning(warning) => self.above_the_bar(|| tell(&format!("warning: {warning}"))),
        }
    }

    /// A line for an epoch or a measurement.
    fn record(&mut self, record: &Record) {
        match record {
            Record::Epoch {
                epoch,
                step,
                train_loss,
                train_accuracy,
                test_loss,
                test_accuracy,
                validation_loss,
                validation_accuracy,
                ema_test_accuracy,
                swa_test_accuracy,
                lr,
                gradient_norm,
                method,
                images_per_second,
                seconds,
                skipped,
                ..
            } => {
                let number = |value: Option<f64>, decimals: usize| match value {
                    Some(value) => shown(value, decimals),
                    None => "not finite".into(),
                };
                let train_percent = train_accuracy.map_or(String::new(), |share| format!(" ({:.2} %)", 100.0 * share));
                let held = validation_accuracy.map_or(String::new(), |share| {
                    format!("  validation loss {} ({:.2} %)", number(*validation_loss, 3), 100.0 * share)
                });
                let average =
                    ema_test_accuracy.map_or(String::new(), |share| format!(", averaged {:.2} %", 100.0 * share));
                let swa = swa_test_accuracy.map_or(String::new(), |share| format!(", SWA {:.2} %", 100.0 * share));
                self.line(&format!(
                    "epoch {epoch:>3}  train loss {}{train_percent}{held}  test loss {} ({:.2} %{average}{swa})  {images_per_second:.0} images/s",
                    number(*train_loss, 3),
                    number(*test_loss, 3),
                    100.0 * test_accuracy,
                ));
                if self.verbose {
                    let own: Vec<String> = method.iter().map(|(name, value)| format!(", {name} {value}")).collect();
                    self.line(&format!(
                        "           step {step}, lr {lr:.4e}, gradient norm {}{}, {skipped} skipped, {seconds:.1} s of training",
                        number(*gradient_norm, 4),
                        own.concat()
                    ));
                }
            }
            Record::Curvature { epoch, measures, .. } => {
                let value = |(name, found): (&String, &Finding)| Some(format!("{name} {:.4}", found.value()?));
                let found: Vec<String> = measures.iter().filter_map(value).collect();
                let found = if found.is_empty() { "no curvature was found".into() } else { found.join("  ") };
                self.line(&format!("epoch {epoch:>3}  {found}"));
            }
            Record::Step { .. } => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
