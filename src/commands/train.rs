//! `polder train`: settings from flags and files, progress, and how a run ends early.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use indicatif::{ProgressBar, ProgressStyle};
use polder::train::{Finding, Options, Progress, Record, Training};
use serde_json::json;

use super::flags::{Flags, OfRun};
use super::{Failure, counted, print, stop_on_signals, tell};

#[derive(clap::Args)]
pub struct TrainArgs {
    #[command(flatten)]
    options: Flags<OfRun>,
    /// Read options from this file; those on the command line replace them
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Write settings, log, weights and checkpoints to this folder
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "init"], help_heading = "Run")]
    resume: Option<PathBuf>,
    /// Print one JSON object on standard output, everything else on standard error
    #[arg(long, help_heading = "Run")]
    json: bool,
    /// Print the result alone
    #[arg(long, help_heading = "Run")]
    quiet: bool,
}

pub fn run(args: TrainArgs) -> Result<ExitCode, Failure> {
    let below = match (&args.config, &args.resume) {
        (Some(file), _) => Options::from_file(file)?,
        (None, Some(run)) => Options::of_run(run)?,
        (None, None) => Options::default(),
    };
    let given = args.options.given;
    let file = args.config.clone().or(args.resume.as_ref().map(|run| run.join("config.toml")));
    let settings = given.clone().over(below.clone()).resolve();
    let settings = settings.map_err(|error| error.of_file(&given, file.as_deref()))?.with_absolute_paths();
    if args.resume.is_some() {
        settings.continues(&below.resolve()?.with_absolute_paths())?;
    }

    let stop = Arc::new(AtomicBool::new(false));
    let mut display = Display::new(args.json, args.quiet);
    stop_on_signals(&stop, "step", display.bar.clone());
    let training = Training::new(settings.clone());
    let training = match (args.out, args.resume) {
        (Some(out), _) => training.out(out),
        (None, Some(run)) => training.resume(run),
        (None, None) => training,
    };
    let summary = training.run_with(&stop, &mut |progress| display.show(progress));
    display.finish();
    let summary = summary.map_err(|error| error.of_file(&given, file.as_deref()))?;
    if args.json {
        let test = summary.test;
        print(
            &json!({
                "interrupted": summary.interrupted,
                "diverged": summary.diverged.is_some(),
                "steps": summary.steps,
                "skipped": summary.skipped,
                "test": test,
                "seconds": summary.seconds,
                "images_per_second": summary.images_per_second,
                "out": summary.out.as_ref().map(|run| run.display().to_string()),
                "options": settings.to_json()?,
            })
            .to_string(),
        )?;
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
        let most = settings.run.max_loss.unwrap_or_default();
        let found = if loss.is_finite() { format!("a mean loss of {loss:.4}") } else { "no finite loss".into() };
        let log = match &summary.out {
            Some(run) => format!("; the log is in {}", run.join("log.jsonl").display()),
            None => String::new(),
        };
        tell(&format!("error: diverged: {found} up to step {}, --max-loss {most}{log}", summary.steps));
        return Ok(ExitCode::FAILURE);
    }
    if let (Some(test), false) = (summary.test, args.json) {
        let (accuracy, skipped) = (100.0 * test.accuracy, summary.skipped);
        let skips =
            if skipped > 0 { format!("; {} skipped as not finite", counted(skipped, "step")) } else { String::new() };
        print(&format!(
            "test accuracy {accuracy:.2} % ({} of {} wrong), test loss {:.4}; {} in {:.1} s, {:.0} images/s{skips}",
            test.errors,
            test.samples,
            test.loss,
            counted(summary.steps, "step"),
            summary.seconds,
            summary.images_per_second
        ))?;
        if let Some(run) = &summary.out {
            print(&format!("weights: {}", run.join("model.safetensors").display()))?;
            if !args.quiet {
                let run = run.display();
                print(&format!("next: polder eval, curvature or landscape --run {run}; polder report {run}"))?;
                print(&format!("longer: polder train --resume {run} --epochs N"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Progress of training: a bar on a terminal, plain lines otherwise.
struct Display {
    bar: Option<ProgressBar>,
    /// Whether standard output is reserved for the JSON object.
    json: bool,
    /// Whether nothing is shown before the result.
    quiet: bool,
}

impl Display {
    fn new(json: bool, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            // The message is cut at the end of the line, so that the bar never takes two.
            let template = "{bar:12} {pos}/{len}, {eta} left  {wide_msg}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, json, quiet }
    }

    fn line(&self, text: &str) {
        if self.quiet {
            return;
        }
        // A failure to print is reported at the end, by the last line.
        let write = || if self.json { tell(text) } else { drop(print(text)) };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Start { device, data, images, parameters, arena_bytes, steps, steps_per_epoch } => {
                let (train, test) = images;
                let mebibytes = arena_bytes as f64 / f64::from(1 << 20);
                self.line(&format!("{data}: {train} training and {test} test images; {device}"));
                self.line(&format!("{parameters} parameters, {mebibytes:.0} MiB of activations and gradients"));
                let (all, done) = steps;
                if done > 0 && done < all {
                    self.line(&format!("resuming at step {done} of {all} (epoch {} on)", done / steps_per_epoch + 1));
                } else if done > 0 {
                    self.line(&format!("already at step {done}, {all} were asked for: nothing left to train"));
                }
                if let Some(bar) = &self.bar {
                    bar.set_length(all);
                    bar.set_position(done);
                    bar.reset_eta();
                }
            }
            Progress::Step { step, loss, accuracy, images_per_second } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(step);
                    let percent = 100.0 * accuracy;
                    bar.set_message(format!(
                        "loss {loss:.3}, accuracy {percent:.1} %, {images_per_second:.0} images/s"
                    ));
                }
            }
            Progress::Testing => {
                if let Some(bar) = &self.bar {
                    bar.set_message("testing");
                }
            }
            Progress::Epoch(Record::Epoch {
                epoch,
                train_loss,
                train_accuracy,
                test_loss,
                test_accuracy,
                images_per_second,
                ..
            }) => {
                let number = |value: Option<f64>, decimals: usize| match value {
                    Some(value) => format!("{value:.decimals$}"),
                    None => "not finite".into(),
                };
                self.line(&format!(
                    "epoch {epoch:>3}  train loss {} ({} %)  test loss {} ({:.2} %)  {images_per_second:.0} images/s",
                    number(train_loss, 3),
                    number(train_accuracy.map(|share| 100.0 * share), 2),
                    number(test_loss, 3),
                    100.0 * test_accuracy,
                ));
            }
            Progress::Measuring { measure, steps: (done, of) } => {
                if let Some(bar) = &self.bar {
                    bar.set_message(format!("measuring {measure}: {done} of {of}"));
                }
            }
            Progress::Epoch(Record::Curvature { epoch, measures, .. }) => {
                let value = |(name, found): (&String, &Finding)| Some(format!("{name} {:.4}", found.value()?));
                let found: Vec<String> = measures.iter().filter_map(value).collect();
                let found = if found.is_empty() { "no curvature was found".into() } else { found.join("  ") };
                self.line(&format!("epoch {epoch:>3}  {found}"));
            }
            Progress::Epoch(Record::Step { .. }) => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
