//! `polder eval`: loss and accuracy of trained weights, also under corruptions of the images.

use std::path::{Path, PathBuf};

use polder::data::{Corrupted, SEVERITIES, Split};
use polder::device::Buffer;
use polder::kernels::batch_norm::Mode;
use polder::settings;
use polder::train::{Evaluation, Evaluator, TrainError, write_npy};
use serde_json::json;

use super::flags::Flags;
use super::model::{ModelArgs, Samples, Subject};
use super::{Bar, Failure, option, print, shown};

settings! {
    /// The images to evaluate on.
    pub struct EvalSettings {
        /// Which images
        split: Split = Split::Test;
        /// The first N images
        samples: Option<usize> = None, else "all", in at_least(1);
        /// Evaluate on a corruption of CIFAR-10-C or CIFAR-100-C, or on all of them: the error at each severity. The
        /// data path is then the folder with their .npy files
        corruption: Option<String> = None, as "NAME|all";
        /// Only this severity of the corruptions
        severity: Option<usize> = None, else "1 to 5", in between(1, 5), with corruption;
    }
}

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: Flags<EvalSettings>,
    /// Write the logits (samples × classes, f32) to this file
    #[arg(long, value_name = "FILE.npy")]
    logits: Option<PathBuf>,
}

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let EvalSettings { split, samples, corruption, severity } = args.images.settings()?;
    let samples = samples.map_or(Samples::All, Samples::First);
    match (corruption, severity) {
        (Some(_), _) if split == Split::Train => {
            return Err(option("split", "train, expected test: only test images are corrupted").into());
        }
        (Some(_), _) if args.logits.is_some() => {
            return Err(option("logits", "not written for corrupted images").into());
        }
        (Some(name), severity) => {
            let severities = severity.map_or((1..=SEVERITIES).collect(), |severity| vec![severity]);
            return run_corrupted(&args.model, samples, &name, &severities);
        }
        (None, Some(_)) => return Err(option("severity", "only with --corruption").into()),
        (None, None) => {}
    }
    let subject = args.model.open(split, samples)?;
    let Subject { name, images, .. } = &subject;
    let (mut evaluator, [parameters, statistics]) = prepare(&subject)?;
    let mut logits = Vec::new();
    let found = evaluator.evaluate(parameters.view(), statistics.view(), |batch| {
        if args.logits.is_some() {
            logits.extend(batch.to_vec()?);
        }
        Ok(())
    })?;
    check_finite(&subject, &found)?;
    if let Some(path) = &args.logits {
        let shape = [images.len() as u64, images.classes as u64];
        write_npy(path, &logits, &shape)?;
    }
    if args.model.json {
        return print(&json!(found).to_string());
    }
    let Evaluation { samples, errors, accuracy, top5_accuracy, loss } = found;
    let percent = 100.0 * accuracy;
    let top5 = top5_accuracy.map(|share| format!(" (top five {:.2} %)", 100.0 * share)).unwrap_or_default();
    print(&format!(
        "{name}, {split} split: {samples} samples, {errors} errors, accuracy {percent:.2} %{top5}, loss {}",
        shown(loss, 5)
    ))
}

/// The network on the device, and its weights and running statistics.
fn prepare(subject: &Subject) -> Result<(Evaluator, [Buffer<f32>; 2]), TrainError> {
    let Subject { device, data, images, normalization, init, batch_size, .. } = subject;
    let evaluator =
        Evaluator::new(device, &subject.network(), (data, images), *normalization, *batch_size, Mode::Eval)?;
    let weights = subject.load(init, evaluator.layouts())?;
    Ok((evaluator, weights))
}

fn check_finite(subject: &Subject, found: &Evaluation) -> Result<(), TrainError> {
    match found.loss.is_finite() {
        true => Ok(()),
        false => Err(subject.weights_error(format!("the loss is not finite ({})", found.loss))),
    }
}

/// A corruption and what was found at each severity.
struct Row {
    name: String,
    found: Vec<Evaluation>,
}

/// Evaluates on corrupted images, and prints a table of the errors.
fn run_corrupted(model: &ModelArgs, samples: Samples, name: &str, severities: &[usize]) -> Result<(), Failure> {
    let mut opened = None;
    if !model.has_data() {
        return Err(option("data", "missing; --corruption needs the folder of CIFAR-10-C or CIFAR-100-C").into());
    }
    let subject = model.open_images(Split::Test, samples, true, |data, options| {
        if options.image_size.is_some() {
            return Err(option("image-size", "has no effect with --corruption: those images have one size"));
        }
        let corrupted = Corrupted::open(Path::new(data))?;
        let names = if name == "all" { corrupted.names.clone() } else { vec![name.to_string()] };
        let first = corrupted.read(&names[0], severities[0])?;
        opened = Some((corrupted, names));
        Ok(first)
    })?;
    let Some((corrupted, names)) = opened else { return Ok(()) };
    let (mut evaluator, [parameters, statistics]) = prepare(&subject)?;
    let bar = Bar::new();
    let mut rows: Vec<Row> = Vec::new();
    for (index, name) in names.iter().enumerate() {
        bar.show("corruptions", index, names.len());
        let mut found = Vec::new();
        for &severity in severities {
            let mut images = corrupted.read(name, severity).map_err(TrainError::from)?.images;
            images.classes = subject.images.classes;
            images.check().map_err(|error| option("classes", error))?;
            let images = images.take(subject.images.len()).map_err(TrainError::from)?;
            evaluator.replace_images(name, &images)?;
            let result = evaluator.evaluate(parameters.view(), statistics.view(), |_| Ok(()))?;
            check_finite(&subject, &result)?;
            found.push(result);
        }
        rows.push(Row { name: name.clone(), found });
    }
    drop(bar);
    if model.json {
        return print(&corrupted_json(&subject.name, severities, &rows).to_string());
    }
    print(&corrupted_table(&subject, severities, &rows))
}

fn error(found: &Evaluation) -> f64 {
    found.errors as f64 / found.samples as f64
}

fn mean(errors: &[f64]) -> f64 {
    errors.iter().sum::<f64>() / errors.len() as f64
}

fn errors(row: &Row) -> Vec<f64> {
    row.found.iter().map(error).collect()
}

/// How many corruptions of the benchmark there are, and the mean of their errors at each severity.
fn benchmark_means(rows: &[Row]) -> Option<(usize, Vec<f64>)> {
    let rows: Vec<Vec<f64>> = rows.iter().filter(|row| Corrupted::is_of_benchmark(&row.name)).map(errors).collect();
    let severities = rows.first()?.len();
    let at = |index: usize| mean(&rows.iter().map(|row| row[index]).collect::<Vec<_>>());
    Some((rows.len(), (0..severities).map(at).collect()))
}

fn corrupted_json(data: &str, severities: &[usize], rows: &[Row]) -> serde_json::Value {
    let corruption = |row: &Row| {
        let losses: Vec<f64> = row.found.iter().map(|found| found.loss).collect();
        json!({ "name": row.name, "errors": errors(row), "losses": losses, "mean_error": mean(&errors(row)) })
    };
    let means = benchmark_means(rows);
    json!({
        "data": data,
        "samples": rows.first().and_then(|row| row.found.first()).map(|found| found.samples),
        "severities": severities,
        "corruptions": rows.iter().map(corruption).collect::<Vec<_>>(),
        "mean_of": means.as_ref().map_or(0, |(count, _)| *count),
        "mean_errors": means.as_ref().map(|(_, means)| means.clone()),
        "mean_error": means.as_ref().map(|(_, means)| mean(means)),
    })
}

fn corrupted_table(subject: &Subject, severities: &[usize], rows: &[Row]) -> String {
    let line = |name: &str, numbers: &[f64]| {
        let numbers: String = numbers.iter().map(|number| format!("{:8.2}", 100.0 * number)).collect();
        format!("{name:<22}{numbers}")
    };
    let with_mean = |name: &str, errors: &[f64]| {
        let mean = (errors.len() > 1).then(|| mean(errors));
        line(name, &errors.iter().copied().chain(mean).collect::<Vec<_>>())
    };
    let heads: String = severities.iter().map(|severity| format!("{severity:8}")).collect();
    let mean_head = if severities.len() > 1 { "    mean" } else { "" };
    let title = format!("{}, {} images: error in % at each severity", subject.name, subject.images.len());
    let mut lines = vec![title, format!("{:<22}{heads}{mean_head}", "corruption")];
    lines.extend(rows.iter().map(|row| with_mean(&row.name, &errors(row))));
    if let Some((count, means)) = benchmark_means(rows).filter(|_| rows.len() > 1) {
        lines.push(with_mean(&format!("mean of {count}"), &means));
    }
    lines.join("\n")
}
