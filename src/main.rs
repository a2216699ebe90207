//! The command line: `polder train`, `polder eval`, `polder curvature`, `polder report`, `polder devices`.
//!
//! Exit codes: 0 done; 1 the machine failed; 2 bad usage or input, told in one line; 130 interrupted, with everything saved.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use polder::arena::Layout;
use polder::curvature::{Curvature, Density, Estimate, Rise};
use polder::data::{Images, Split, SplitImages};
use polder::device::{self, Buffer, Device};
use polder::kernels::batch_norm::Mode;
use polder::kernels::image::Normalization;
use polder::nn::{Model, Shortcut};
use polder::objective::Objective;
use polder::plan::Plan;
use polder::report;
use polder::train::{
    self, CurvatureMeter, Evaluation, Evaluator, Options, Progress, Record, ShortcutName, TrainError, weights,
};
use serde_json::json;

/// Sharpness-aware training on hand-written kernels: small ResNets, on the CPU or on a GPU.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a network; without options, a ResNet-8 with SAM on a generated image set
    #[command(allow_negative_numbers = true)]
    Train(Box<TrainArgs>),
    /// Measure loss and accuracy of trained weights
    Eval(EvalArgs),
    /// Measure how flat the loss is around trained weights
    Curvature(CurvatureArgs),
    /// Compare runs on one HTML page: accuracy, learning curves, curvature, loss landscapes, settings
    Report(ReportArgs),
    /// List the devices that this program can use
    Devices {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args)]
struct TrainArgs {
    #[command(flatten)]
    options: Options,
    /// Take the options that are not given from this file
    #[arg(long, value_name = "FILE.toml", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Write settings, log, weights and checkpoints to this folder
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    out: Option<PathBuf>,
    /// Go on with the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "init"], help_heading = "Run")]
    resume: Option<PathBuf>,
    /// Print one JSON object on standard output, everything else on standard error
    #[arg(long, help_heading = "Run")]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitName {
    Train,
    Test,
}

/// Trained weights, and the images to look at them with.
#[derive(clap::Args)]
struct ModelArgs {
    /// resnet8, 20, 32, 44, 56, 110 (CIFAR ResNets) or resnet18
    #[arg(long, value_name = "NAME")]
    model: String,
    /// The weights
    #[arg(long, value_name = "FILE.safetensors")]
    init: PathBuf,
    /// A folder with CIFAR-10/100 (binary) or IDX files, or `synthetic`
    #[arg(long, value_name = "PATH", default_value = "synthetic")]
    data: String,
    /// Shortcuts of a CIFAR ResNet where its shape changes
    #[arg(long, value_enum, value_name = "KIND")]
    shortcut: Option<ShortcutName>,
    /// Mean of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    mean: Option<Vec<f32>>,
    /// Standard deviation of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    std: Option<Vec<f32>>,
    /// Images at a time
    #[arg(long, value_name = "N", default_value_t = 200)]
    batch_size: usize,
    /// auto, cpu or cuda:N
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// CPU threads; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What [`ModelArgs`] name, opened.
struct Subject {
    model: Model,
    device: Device,
    name: String,
    images: Images,
    normalization: Normalization,
}

impl ModelArgs {
    /// The first `samples` images of the split, or all.
    fn open(&self, split: Split, samples: Option<usize>) -> Result<Subject, TrainError> {
        let shortcut = self.shortcut.map(|name| match name {
            ShortcutName::A => Shortcut::A,
            ShortcutName::B => Shortcut::B,
        });
        let model = Model::from_name(&self.model, shortcut)?;
        if self.batch_size == 0 {
            return Err(option("--batch-size", "0, expected at least 1"));
        }
        let device = train::open_device(&self.device, self.threads)?;
        let SplitImages { name, images, mean, std, .. } = train::open_split(&self.data, split)?;
        let images = match samples {
            Some(n) => images.take(n).map_err(|error| option("--samples", error))?,
            None => images,
        };
        let channels = images.shape.channels;
        let normalization = train::normalization(self.mean.as_deref(), self.std.as_deref(), (&mean, &std), channels)?;
        Ok(Subject { model, device, name, images, normalization })
    }

    /// Weights and running statistics of a plan for the model.
    fn load(&self, device: &Device, plan: &Plan<f32>) -> Result<[Buffer<f32>; 2], TrainError> {
        let [parameters, statistics] = weights::load(&self.init, [plan.parameters(), plan.statistics_layout()])?;
        Ok([device.upload(&parameters)?, device.upload(&statistics)?])
    }
}

#[derive(clap::Args)]
struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Which images
    #[arg(long, value_enum, default_value = "test")]
    split: SplitName,
    /// The first N images only
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Write the logits (samples × classes, f32) to this file
    #[arg(long, value_name = "FILE.npy")]
    logits: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Measure {
    /// ‖∇L‖
    GradNorm,
    /// Trace of the Hessian
    Trace,
    /// Tr(H)/‖∇L‖
    NormalizedTrace,
    /// The trace by Hutch++, with --probes products
    #[value(name = "hutch++")]
    HutchPlusPlus,
    /// The trace of each layer's block of the Hessian
    LayerTraces,
    /// vᵀHv along the gradient, v = ∇L/‖∇L‖
    Vhv,
    /// The same by the difference of losses at --rho to either side
    VhvDifference,
    /// How far the loss rises within --rho: by one step, and by --ascent-steps
    Sharpness,
    /// The same for the loss of every --batch-size images
    MSharpness,
    /// What of the rise one step finds, for the loss of every --batch-size images
    ApproximationRatio,
    /// --rho times the largest ‖∇L‖ within it
    Gnr,
    /// Local minima and maxima within 0.1 along --probes random lines
    Extrema,
    /// The largest eigenvalues of the Hessian
    TopEigenvalues,
    /// The density of its eigenvalues
    Spectrum,
}

impl Measure {
    /// As on the command line and in JSON.
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum BatchNormName {
    /// Running statistics
    Eval,
    /// Each batch's statistics
    Train,
}

#[derive(clap::Args)]
struct CurvatureArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Which images
    #[arg(long, value_enum, default_value = "train")]
    split: SplitName,
    /// The first N images, a multiple of --batch-size [default: 1000, or as many as there are]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// What to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "grad-norm,trace,normalized-trace"
    )]
    measure: Vec<Measure>,
    /// Random directions for traces, spectrum and extrema
    #[arg(long, value_name = "N", default_value_t = 100)]
    probes: usize,
    /// How many eigenvalues
    #[arg(long, value_name = "K", default_value_t = 5)]
    top: usize,
    /// Lanczos steps: at most for eigenvalues, for each probe of the spectrum
    #[arg(long, value_name = "N", default_value_t = 80)]
    steps: usize,
    /// Eigenvalues are found when no residual is more than this share of the largest
    #[arg(long, value_name = "T", default_value_t = 1e-4)]
    tolerance: f64,
    /// Radius of the neighbourhood that sharpness and its like look at
    #[arg(long, value_name = "RHO", default_value_t = 0.05)]
    rho: f64,
    /// Steps of the ascents there
    #[arg(long, value_name = "N", default_value_t = 20)]
    ascent_steps: usize,
    /// Seed of the random directions
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// What batch norm normalises with
    #[arg(long, value_enum, value_name = "MODE", default_value = "eval")]
    bn: BatchNormName,
}

#[derive(clap::Args)]
struct ReportArgs {
    /// Folders that `polder train --out` wrote
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: report.html, of one run in its folder]
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// Also write each run's log for TensorBoard, to tensorboard/ in its folder
    #[arg(long)]
    tensorboard: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are printed in full; of a mistake, clap's first paragraph is the line that says it.
            if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                let text = error.render().to_string();
                let message: Vec<&str> =
                    text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
                tell(&format!("{} (see --help)", message.join(" ")));
            } else {
                let _ = error.print();
            }
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let done = match cli.command {
        Command::Train(args) => run_train(*args),
        Command::Eval(args) => run_eval(&args).map(|()| ExitCode::SUCCESS),
        Command::Curvature(args) => run_curvature(&args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => run_report(&args).map(|()| ExitCode::SUCCESS),
        Command::Devices { json } => run_devices(json).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        tell(&format!("error: {error}"));
        ExitCode::from(if error.is_input() { 2 } else { 1 })
    })
}

/// An option that cannot be used.
fn option(option: &str, reason: impl ToString) -> TrainError {
    TrainError::Option { option: option.into(), reason: reason.to_string() }
}

/// Prints to standard output; a reader that has gone away is no error of ours.
///
/// # Errors
/// Any other reason why the text was lost.
fn print(text: &str) -> Result<(), TrainError> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(TrainError::Output(error)),
        _ => Ok(()),
    }
}

/// Says something on standard error; where nobody can hear it, nothing else is to be done.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn run_devices(json: bool) -> Result<(), TrainError> {
    let devices = device::available();
    if json {
        let list: Vec<_> = devices
            .iter()
            .map(|(name, found)| match found {
                Ok(description) => json!({"name": name, "usable": true, "description": description}),
                Err(reason) => json!({"name": name, "usable": false, "reason": reason}),
            })
            .collect();
        return print(&json!({"devices": list}).to_string());
    }
    for (name, found) in devices {
        match found {
            Ok(description) => print(&format!("{name:<8} {description}"))?,
            Err(reason) => print(&format!("{name:<8} not usable: {reason}"))?,
        }
    }
    Ok(())
}

fn run_report(args: &ReportArgs) -> Result<(), TrainError> {
    let report = report::report(&args.runs, args.out.as_deref(), args.tensorboard)?;
    if args.json {
        return print(&json!(report).to_string());
    }
    for group in &report.groups {
        print(&group.to_string())?;
    }
    if let Some(order) = &report.curvature_order {
        print(&order.to_string())?;
    }
    for path in &report.tensorboard {
        print(&format!("TensorBoard: {}", path.display()))?;
    }
    print(&format!("report: {}", report.report.display()))
}

impl SplitName {
    fn split(self) -> Split {
        match self {
            SplitName::Train => Split::Train,
            SplitName::Test => Split::Test,
        }
    }
}

fn run_eval(args: &EvalArgs) -> Result<(), TrainError> {
    let split = args.split.split();
    let Subject { model, device, name, images, normalization } = args.model.open(split, args.samples)?;
    let ModelArgs { data, batch_size, .. } = &args.model;
    let mut evaluator = Evaluator::new(&device, model, data, &images, normalization, *batch_size)?;
    let [parameters, statistics] = args.model.load(&device, evaluator.plan())?;
    let mut logits = Vec::new();
    let found = evaluator.evaluate(parameters.view(), statistics.view(), |batch| {
        if args.logits.is_some() {
            logits.extend(batch.to_vec()?);
        }
        Ok(())
    })?;
    if let Some(path) = &args.logits {
        write_npy(path, &logits, images.classes).map_err(|source| TrainError::Io { path: path.clone(), source })?;
    }
    if args.model.json {
        return print(&json!(found).to_string());
    }
    let Evaluation { samples, errors, accuracy, loss } = found;
    let percent = 100.0 * accuracy;
    print(&format!(
        "{name}, {split} split: {samples} samples, {errors} errors, accuracy {percent:.2} %, loss {loss:.5}"
    ))
}

fn run_curvature(args: &CurvatureArgs) -> Result<(), TrainError> {
    let counts = [
        ("--probes", args.probes),
        ("--steps", args.steps),
        ("--top", args.top),
        ("--ascent-steps", args.ascent_steps),
    ];
    for (name, number) in counts {
        if number == 0 {
            return Err(option(name, "0, expected at least 1"));
        }
    }
    if args.top > args.steps {
        return Err(option("--top", format!("{}, expected at most --steps {}", args.top, args.steps)));
    }
    if !args.rho.is_finite() || args.rho <= 0.0 {
        return Err(option("--rho", format!("{}, expected a finite number above 0", args.rho)));
    }
    if args.measure.contains(&Measure::HutchPlusPlus) && args.probes < 3 {
        return Err(option("--probes", format!("{}, expected at least 3 for hutch++", args.probes)));
    }
    if args.tolerance.is_nan() || args.tolerance < 0.0 {
        return Err(option("--tolerance", format!("{}, expected 0 or more", args.tolerance)));
    }
    let split = args.split.split();
    let Subject { model, device, name, mut images, normalization } = args.model.open(split, args.samples)?;
    let ModelArgs { data, init, .. } = &args.model;
    let batch_size = args.model.batch_size.min(images.len());
    if args.samples.is_none() {
        let count = images.len().min(1000);
        images = images.take(count.max(batch_size) / batch_size * batch_size)?;
    }
    let mode = match args.bn {
        BatchNormName::Eval => Mode::Eval,
        BatchNormName::Train => Mode::Train,
    };
    let mut meter = CurvatureMeter::new(&device, model, (data, &images), normalization, batch_size, mode)?;
    let [parameters, statistics] = args.model.load(&device, meter.plan())?;
    // What is not finite is the fault of the weights.
    let unsound = |error| match error {
        TrainError::Device(device::Error::Argument { message, .. }) => {
            TrainError::Weights { path: init.clone(), reason: message }
        }
        other => other,
    };
    let layout = meter.plan().parameters().clone();
    let (w, running) = (parameters.view(), statistics.view());
    let mut found = meter.at(w, running, |curvature| measure(curvature, args, &layout)).map_err(unsound)?;
    let of_parts = [Measure::MSharpness, Measure::ApproximationRatio].map(|measure| args.measure.contains(&measure));
    if of_parts.contains(&true) {
        let rises = meter.at_each_part(w, running, |part| part.rise(args.rho, args.ascent_steps, args.seed));
        let rises = rises.map_err(unsound)?;
        if of_parts[0] {
            let largest: Vec<f64> = rises.iter().map(|rise| rise.largest).collect();
            found.push(Found::estimate(Measure::MSharpness, Estimate::of(&largest), "parts"));
        }
        let ratios: Vec<f64> = rises.iter().filter_map(Rise::approximation_ratio).collect();
        if of_parts[1] && ratios.is_empty() {
            found.push(Found::none(Measure::ApproximationRatio, "none, because the loss does not rise"));
        } else if of_parts[1] {
            found.push(Found::estimate(Measure::ApproximationRatio, Estimate::of(&ratios), "parts"));
        }
    }
    if args.model.json {
        let measures: serde_json::Map<_, _> =
            found.into_iter().map(|Found { measure, json, .. }| (measure.name(), json)).collect();
        let split = split.to_string();
        return print(&json!({"samples": images.len(), "split": split, "measures": measures}).to_string());
    }
    print(&format!("{name}, {split} split: {} samples", images.len()))?;
    for Found { measure, text, .. } in found {
        print(&format!("{:<19} {text}", measure.name()))?;
    }
    Ok(())
}

/// What a measure found, for programs and for people.
struct Found {
    measure: Measure,
    json: serde_json::Value,
    text: String,
}

impl Found {
    fn value(measure: Measure, value: f64) -> Self {
        Self { measure, json: json!({"value": value}), text: digits(value) }
    }

    /// The mean over so many of what the word says.
    fn estimate(measure: Measure, estimate: Estimate, of: &str) -> Self {
        let Estimate { value, standard_error, probes } = estimate;
        let json = json!({"value": value, "standard_error": standard_error, of: probes});
        Self { measure, json, text: format!("{} ({probes} {of})", with_error(estimate)) }
    }

    fn none(measure: Measure, text: &str) -> Self {
        Self { measure, json: json!({"value": null}), text: text.into() }
    }
}

/// A value and its standard error, if it has one.
fn with_error(Estimate { value, standard_error, .. }: Estimate) -> String {
    match standard_error {
        Some(error) => format!("{} ± {}", digits(value), digits(error)),
        None => digits(value),
    }
}

/// Takes the measures that are asked for, but for those of parts.
fn measure<O: Objective<f32>>(
    curvature: &mut Curvature<'_, f32, O>,
    args: &CurvatureArgs,
    layout: &Layout,
) -> device::Result<Vec<Found>> {
    let CurvatureArgs { probes, steps, seed, top, tolerance, rho, ascent_steps, .. } = *args;
    let mut found = Vec::new();
    let wants = |measure| args.measure.contains(&measure);
    let mut norm = 0.0;
    if wants(Measure::GradNorm) || wants(Measure::NormalizedTrace) {
        norm = curvature.gradient_norm()?;
    }
    if wants(Measure::GradNorm) {
        found.push(Found::value(Measure::GradNorm, norm));
    }
    if wants(Measure::Trace) || wants(Measure::NormalizedTrace) {
        let trace = with_bar("trace", probes, |step| curvature.trace(probes, seed, step))?;
        if wants(Measure::Trace) {
            found.push(Found::estimate(Measure::Trace, trace, "probes"));
        }
        if wants(Measure::NormalizedTrace) && norm > 0.0 {
            found.push(Found::estimate(Measure::NormalizedTrace, trace.over(norm), "probes"));
        } else if wants(Measure::NormalizedTrace) {
            found.push(Found::none(Measure::NormalizedTrace, "none, because the gradient is zero"));
        }
    }
    if wants(Measure::HutchPlusPlus) {
        let trace = with_bar("hutch++", probes, |step| curvature.trace_hutch_plus_plus(probes, seed, step))?;
        found.push(Found::estimate(Measure::HutchPlusPlus, trace, "probes"));
    }
    if wants(Measure::LayerTraces) {
        let parts: Vec<_> = layout.tensors().iter().map(|tensor| tensor.range()).collect();
        let traces = with_bar("layer-traces", probes, |step| curvature.traces(&parts, probes, seed, step))?;
        let (mut lines, mut layers) = (format!("({probes} probes)"), serde_json::Map::new());
        for (tensor, trace) in layout.tensors().iter().zip(traces) {
            lines += &format!("\n  {:<30} {}", tensor.name, with_error(trace));
            let Estimate { value, standard_error, .. } = trace;
            layers.insert(tensor.name.clone(), json!({"value": value, "standard_error": standard_error}));
        }
        let json = json!({"probes": probes, "layers": layers});
        found.push(Found { measure: Measure::LayerTraces, json, text: lines });
    }
    if wants(Measure::Vhv) {
        found.push(Found::value(Measure::Vhv, curvature.along_gradient()?));
    }
    if wants(Measure::VhvDifference) {
        found.push(Found::value(Measure::VhvDifference, curvature.along_gradient_by_difference(rho)?));
    }
    if wants(Measure::Sharpness) {
        let Rise { one_step, largest } = curvature.rise(rho, ascent_steps, seed)?;
        let text = format!("{} (one step {}, {ascent_steps} steps of ascent)", digits(largest), digits(one_step));
        let json = json!({"value": largest, "one_step": one_step, "ascent_steps": ascent_steps, "rho": rho});
        found.push(Found { measure: Measure::Sharpness, json, text });
    }
    if wants(Measure::Gnr) {
        let value = curvature.steepest(rho, ascent_steps, seed)?;
        let json = json!({"value": value, "ascent_steps": ascent_steps, "rho": rho});
        let text = format!("{} ({ascent_steps} steps of ascent)", digits(value));
        found.push(Found { measure: Measure::Gnr, json, text });
    }
    if wants(Measure::Extrema) {
        let lines = (10, 0.01);
        let counts = with_bar("extrema", probes, |step| curvature.extrema(probes, lines, seed, step))?;
        let [minima, maxima] = counts.map(with_error);
        let text = format!("{minima} minima, {maxima} maxima ({probes} lines)");
        let [minima, maxima] =
            counts.map(|count| json!({"value": count.value, "standard_error": count.standard_error}));
        let json = json!({"minima": minima, "maxima": maxima, "lines": probes});
        found.push(Found { measure: Measure::Extrema, json, text });
    }
    if wants(Measure::TopEigenvalues) {
        let pairs =
            with_bar("top-eigenvalues", steps, |step| curvature.top_eigenvalues(top, (steps, tolerance), seed, step))?;
        let values: Vec<f64> = pairs.iter().map(|pair| pair.value).collect();
        let residuals: Vec<f64> = pairs.iter().map(|pair| pair.residual).collect();
        let texts: Vec<String> =
            pairs.iter().map(|pair| format!("{} ± {}", digits(pair.value), digits(pair.residual))).collect();
        // λ1/λ5, which papers tell.
        let ratio = values.get(4).map(|fifth| values[0] / fifth);
        let json = json!({"values": values, "residuals": residuals, "first_over_fifth": ratio});
        let ratio = ratio.map_or(String::new(), |ratio| format!("; first over fifth {}", digits(ratio)));
        found.push(Found { measure: Measure::TopEigenvalues, json, text: texts.join(", ") + &ratio });
    }
    if wants(Measure::Spectrum) {
        let Density { nodes, weights } = with_bar("spectrum", probes.saturating_mul(steps), |step| {
            curvature.spectral_density(probes, steps, seed, step)
        })?;
        let least = nodes.iter().copied().fold(f64::INFINITY, f64::min);
        let most = nodes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let text = format!("{} … {} ({probes} probes of {steps} steps)", digits(least), digits(most));
        found.push(Found { measure: Measure::Spectrum, json: json!({"nodes": nodes, "weights": weights}), text });
    }
    Ok(found)
}

/// Does something of so many steps, and on a terminal shows how far it is.
fn with_bar<R>(name: &'static str, length: usize, work: impl FnOnce(&mut dyn FnMut(usize)) -> R) -> R {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("{bar:12} {pos}/{len}, {eta} left  {msg}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(length as u64).with_style(style).with_message(name)
    });
    let done = work(&mut |step| bar.iter().for_each(|bar| bar.set_position(step as u64)));
    bar.iter().for_each(ProgressBar::finish_and_clear);
    done
}

/// Four digits or more, whatever the size.
fn digits(value: f64) -> String {
    if value == 0.0 || (1e-2..1e6).contains(&value.abs()) { format!("{value:.4}") } else { format!("{value:.4e}") }
}

/// Writes a matrix of f32 with so many columns.
fn write_npy(path: &Path, values: &[f32], columns: usize) -> std::io::Result<()> {
    use npyz::WriterBuilder;
    let file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let shape = [(values.len() / columns) as u64, columns as u64];
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(file).begin_nd()?;
    writer.extend(values.iter().copied())?;
    writer.finish()
}

fn run_train(args: TrainArgs) -> Result<ExitCode, TrainError> {
    let below = match (&args.config, &args.resume) {
        (Some(file), _) => Options::from_file(file)?,
        (None, Some(run)) => {
            let file = run.join("config.toml");
            if !file.is_file() {
                return Err(TrainError::NoRun { path: run.clone() });
            }
            Options::from_file(&file)?
        }
        (None, None) => Options::default(),
    };
    let before = args.resume.is_some().then(|| below.clone());
    let given = args.options.clone();
    let file = args.config.clone().or(args.resume.as_ref().map(|run| run.join("config.toml")));
    let options = args.options.over(below).resolve().map_err(|error| error.of_file(&given, file.as_deref()))?;
    let options = options.with_absolute_paths();
    if let Some(before) = before {
        options.continues(&before.resolve()?.with_absolute_paths())?;
    }
    let out = args.out.or(args.resume.clone());

    let stop = Arc::new(AtomicBool::new(false));
    let mut display = Display::new(args.json);
    stop_on_signals(&stop, display.bar.clone());
    let summary = train::train(&options, out.as_deref(), args.resume.is_some(), &stop, &mut |p| display.show(p));
    display.finish();
    let summary = summary?;
    if args.json {
        let test = summary.test;
        print(
            &json!({
                "interrupted": summary.interrupted,
                "steps": summary.steps,
                "skipped": summary.skipped,
                "test": test,
                "seconds": summary.seconds,
                "images_per_second": summary.images_per_second,
                "out": summary.out,
                "options": options,
            })
            .to_string(),
        )?;
    }
    if summary.interrupted {
        let then = match &summary.out {
            Some(run) => format!("`polder train --resume {}` goes on from there", run.display()),
            None => "nothing was saved, because there was no --out".into(),
        };
        tell(&format!("interrupted after step {}; {then}", summary.steps));
        return Ok(ExitCode::from(130));
    }
    if let (Some(test), false) = (summary.test, args.json) {
        let (accuracy, skipped) = (100.0 * test.accuracy, summary.skipped);
        let skips = if skipped > 0 { format!("; {skipped} steps skipped as not finite") } else { String::new() };
        print(&format!(
            "test accuracy {accuracy:.2} % ({} of {} wrong), test loss {:.4}; {} steps in {:.1} s, {:.0} images/s{skips}",
            test.errors, test.samples, test.loss, summary.steps, summary.seconds, summary.images_per_second
        ))?;
        if let Some(run) = &summary.out {
            print(&format!("weights: {}", run.join("model.safetensors").display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends the run after its step at the first SIGINT, SIGTERM or SIGHUP, and the program at the second. A signal that the program was
/// started to ignore (by `nohup`, say) stays ignored.
fn stop_on_signals(stop: &Arc<AtomicBool>, bar: Option<ProgressBar>) {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    // Linux tells which; elsewhere none is taken to be ignored.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let heard = [SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    // Without a handler a signal would end the program unsaved: go on anyway.
    let Ok(mut signals) = signal_hook::iterator::Signals::new(heard) else { return };
    let asked = stop.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if asked.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            let text = "stopping after this step; once more to stop at once";
            match &bar {
                Some(bar) => bar.println(text),
                None => tell(text),
            }
        }
    });
}

/// What a person sees while training goes on: a bar on a terminal, plain lines otherwise.
struct Display {
    bar: Option<ProgressBar>,
    /// Whether standard output belongs to the JSON object.
    json: bool,
}

impl Display {
    fn new(json: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            // The message is cut where the line ends, so that the bar never takes two.
            let template = "{bar:12} {pos}/{len}, {eta} left  {wide_msg}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, json }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if self.json => tell(text),
            // What cannot be printed at the end either is told there.
            None => drop(print(text)),
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
                    self.line(&format!("already at step {done}: nothing left of {all} to train"));
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
                    bar.set_message(format!("loss {loss:.3}, {percent:.1} % right, {images_per_second:.0} images/s"));
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
            Progress::Epoch(Record::Step { .. } | Record::Curvature { .. }) => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
