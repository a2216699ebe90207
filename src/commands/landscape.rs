//! `polder landscape`: the loss on a line or a plane around trained weights, as numbers and as pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use flate2::Crc;
use polder::curvature::filter_normalized;
use polder::device::{self, Buffer};
use polder::kernels::vector;
use polder::plan::Plan;
use polder::report::landscape_pictures;
use polder::train::landscape::{Axis, Heights, Landscape, load_direction, save_direction};
use polder::train::{CurvatureMeter, CurvatureSettings, Evaluator, Finding, TrainError, checksum};
use serde_json::json;

use super::model::{BatchNormName, ModelArgs, Samples, SplitName, Subject};
use super::{Bar, make_folder, option, print, stop_on_signals, tell, write_npy};

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DirectionsName {
    /// Random, filter-normalised
    Random,
    /// Eigenvectors of the Hessian's largest eigenvalues
    Eigenvectors,
}

#[derive(clap::Args)]
pub struct LandscapeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder for the landscape: pictures, npy, csv. The same command continues an interrupted one [default: landscape
    /// in the folder of --run]
    #[arg(long, value_name = "DIR", required_unless_present = "run")]
    out: Option<PathBuf>,
    /// Which images
    #[arg(long, value_enum, default_value = "train")]
    split: SplitName,
    /// The first N images [default: 1000 or as many as there are, in whole batches]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// 1 for a line, 2 for a plane [default: 2; the number of --to]
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u8).range(1..=2))]
    dimensions: Option<u8>,
    /// Directions of the axes
    #[arg(long, value_enum, value_name = "KIND", default_value = "random")]
    directions: DirectionsName,
    /// The first axis runs from the weights, at 0, to these, at 1; given twice, the second axis likewise
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = ["directions", "dimensions"])]
    to: Vec<PathBuf>,
    /// Points along each axis
    #[arg(long, value_name = "N", default_value_t = 21)]
    points: usize,
    /// The ends of each axis [default: -1,1; with --to -0.5,1.5]
    #[arg(long, value_name = "LOW,HIGH", value_delimiter = ',', num_args = 1, allow_hyphen_values = true)]
    range: Option<Vec<f64>>,
    /// Seed of random directions
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Statistics that batch norm uses
    #[arg(long, value_enum, value_name = "MODE", default_value = "eval")]
    bn: BatchNormName,
}

/// A direction and the name of its axis.
struct Direction {
    name: String,
    vector: Buffer<f32>,
}

pub fn run(args: &LandscapeArgs) -> Result<ExitCode, TrainError> {
    if args.to.len() > 2 {
        return Err(option("to", format!("{} files, expected one or two", args.to.len())));
    }
    if args.points < 2 {
        return Err(option("points", format!("{}, expected at least 2", args.points)));
    }
    let range =
        args.range.clone().unwrap_or_else(|| if args.to.is_empty() { vec![-1.0, 1.0] } else { vec![-0.5, 1.5] });
    let [low, high] = *range else {
        return Err(option("range", format!("{} numbers, expected LOW,HIGH", range.len())));
    };
    if !low.is_finite() || !high.is_finite() || !(high - low).is_finite() || low >= high {
        return Err(option("range", format!("{low},{high}, expected finite numbers, the lower one first")));
    }
    let split = args.split.split();
    let dimensions = if args.to.is_empty() { usize::from(args.dimensions.unwrap_or(2)) } else { args.to.len() };
    if args.points.checked_pow(dimensions as u32).is_none_or(|points| points > Landscape::MOST_POINTS) {
        let reason = format!("{}, expected at most {} points in all", args.points, Landscape::MOST_POINTS);
        return Err(option("points", reason));
    }
    let subject = args.model.open(split, args.samples.map_or(Samples::Usual, Samples::First))?;
    let batch_size = args.model.batch_size.min(subject.images.len());
    let out = match (&args.out, &args.model.run) {
        (Some(out), _) => out.clone(),
        (None, run) => run.clone().unwrap_or_default().join("landscape"),
    };
    let settings = settings(args, &subject, (low, high), dimensions)?;
    make_folder(&out)?;
    let begun = Landscape::begun(&out, &settings)?;

    let Subject { device, data, images, normalization, init, .. } = &subject;
    let network = subject.network();
    let mut evaluator = Evaluator::new(device, &network, (data, images), *normalization, batch_size, args.bn.mode())?;
    let [weights, statistics] = subject.load(init, evaluator.plan())?;
    let layout = evaluator.plan().parameters().clone();
    let (landscape, directions) = match begun {
        Some(landscape) => {
            let kept = |axis| Ok(device.upload(&load_direction(&out, axis, &layout)?)?);
            let directions: Vec<Buffer<f32>> = (0..dimensions).map(kept).collect::<Result<_, TrainError>>()?;
            (landscape, directions)
        }
        None => {
            let (title, found) = directions(args, &subject, dimensions, evaluator.plan(), [&weights, &statistics])?;
            let step = (high - low) / (args.points - 1) as f64;
            let values: Vec<f64> = (0..args.points).map(|point| low + step * point as f64).collect();
            let (mut axes, mut directions) = (Vec::new(), Vec::new());
            for (axis, Direction { name, vector }) in found.into_iter().enumerate() {
                save_direction(&out, axis, &layout, &vector.to_vec()?)?;
                axes.push(Axis { name, values: values.clone() });
                directions.push(vector);
            }
            let landscape = Landscape { title, axes, settings };
            landscape.write(&out)?;
            (landscape, directions)
        }
    };
    let mut heights = Heights::open(&out, &landscape)?;
    let earlier = heights.list().len();
    if earlier > 0 && !args.model.json {
        print(&format!("{}: continuing from {earlier} of {} points", out.display(), landscape.len()))?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, "point", None);
    let bar = Bar::new();
    let go_on = |done| {
        bar.show("points", done, landscape.len());
        !stop.load(Ordering::Relaxed)
    };
    heights.complete(&landscape, &mut evaluator, (weights.view(), statistics.view()), &directions, go_on)?;
    drop(bar);
    if heights.list().len() < landscape.len() {
        let done = heights.list().len();
        tell(&format!("interrupted after {done} of {} points; the same command continues from there", landscape.len()));
        return Ok(ExitCode::from(130));
    }
    tell_result(args, &out, &landscape, &heights)?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that the values depend on. Files are identified by their contents, so that a run and its landscape can
/// be moved.
fn settings(
    args: &LandscapeArgs,
    subject: &Subject,
    (low, high): (f64, f64),
    dimensions: usize,
) -> Result<BTreeMap<String, String>, TrainError> {
    let channels = subject.images.shape.channels;
    let list = |values: &[f32]| values.iter().map(f32::to_string).collect::<Vec<_>>().join(",");
    let mut images = Crc::new();
    images.update(&subject.images.pixels);
    subject.images.labels.iter().for_each(|label| images.update(&label.to_le_bytes()));
    let name = |value: Option<clap::builder::PossibleValue>| value.map_or(String::new(), |v| v.get_name().to_string());
    let mut settings: BTreeMap<&str, String> = BTreeMap::from([
        ("model", subject.model_name.clone()),
        ("weights", checksum(&subject.init)?),
        ("images", format!("checksum {:08x}", images.sum())),
        ("mean", list(&subject.normalization.mean[..channels])),
        ("std", list(&subject.normalization.std[..channels])),
        ("split", args.split.split().to_string()),
        ("samples", subject.images.len().to_string()),
        ("batch-size", args.model.batch_size.min(subject.images.len()).to_string()),
        ("bn", name(args.bn.to_possible_value())),
        ("dimensions", dimensions.to_string()),
        ("points", args.points.to_string()),
        ("range", format!("{low},{high}")),
        ("seed", args.seed.to_string()),
    ]);
    match &*args.to {
        [] => drop(settings.insert("directions", name(args.directions.to_possible_value()))),
        files => {
            let files: Vec<String> = files.iter().map(|path| checksum(path)).collect::<Result<_, _>>()?;
            settings.insert("to", format!("weights of checksum {}", files.join(", ")));
        }
    }
    Ok(settings.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

/// The directions that the options request, and a title.
fn directions(
    args: &LandscapeArgs,
    subject: &Subject,
    dimensions: usize,
    plan: &Plan<f32>,
    [weights, statistics]: [&Buffer<f32>; 2],
) -> Result<(String, Vec<Direction>), TrainError> {
    let Subject { device, data, images, normalization, init, .. } = subject;
    if !args.to.is_empty() {
        let mut found = Vec::new();
        for file in &args.to {
            let [mut vector, _] = subject.load(file, plan)?;
            vector::axpy(-1.0, weights.view(), vector.view_mut())?;
            found.push(Direction { name: format!("to {}", short(file)), vector });
        }
        return Ok((format!("Loss from {}", short(init)), found));
    }
    if args.directions == DirectionsName::Random {
        let direction = |axis: usize| {
            let vector = filter_normalized(plan.parameters(), weights.view(), args.seed, axis)?;
            Ok(Direction { name: format!("direction {}", axis + 1), vector })
        };
        let found = (0..dimensions).map(direction).collect::<device::Result<_>>()?;
        return Ok(("Loss along filter-normalised random directions".into(), found));
    }
    let batch_size = args.model.batch_size.min(images.len());
    let mut meter =
        CurvatureMeter::new(device, &subject.network(), (data, images), *normalization, batch_size, args.bn.mode())?;
    let CurvatureSettings { steps, tolerance, .. } = CurvatureSettings::default();
    let bar = Bar::new();
    let progress = |done| bar.show("eigenvectors", done, steps);
    let pairs = meter.at(weights.view(), statistics.view(), |curvature| {
        curvature.top_eigenvalues(dimensions, (steps, tolerance), args.seed, progress)
    });
    let pairs = pairs.map_err(|error| match error {
        TrainError::Device(device::Error::NotFinite { .. }) => subject.weights_error(Finding::NOT_FINITE.into()),
        other => other,
    })?;
    if pairs.len() < dimensions {
        let reason = format!("only {} distinct eigenvectors of the Hessian were found", pairs.len());
        return Err(subject.weights_error(reason));
    }
    let found = pairs.into_iter().enumerate().map(|(axis, pair)| Direction {
        name: format!("eigenvector {} (λ = {:.3})", axis + 1, pair.value),
        vector: pair.vector,
    });
    Ok(("Loss along eigenvectors of the Hessian".into(), found.collect()))
}

/// A path shortened to folder and name, which distinguish runs.
fn short(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(2).collect();
    parts.into_iter().rev().collect::<PathBuf>().display().to_string()
}

/// Writes the arrays and the pictures, and prints the result.
fn tell_result(args: &LandscapeArgs, out: &Path, landscape: &Landscape, heights: &Heights) -> Result<(), TrainError> {
    let shape: Vec<u64> = landscape.axes.iter().rev().map(|axis| axis.values.len() as u64).collect();
    let column = |of: fn(&polder::train::landscape::Height) -> f64| heights.list().iter().map(of).collect::<Vec<f64>>();
    let (losses, accuracies) = (column(|height| height.loss), column(|height| height.accuracy));
    write_npy(&out.join("loss.npy"), &losses, &shape)?;
    write_npy(&out.join("accuracy.npy"), &accuracies, &shape)?;
    let mut finite: Vec<(f64, usize)> = losses.iter().copied().zip(0..).filter(|(loss, _)| loss.is_finite()).collect();
    finite.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let at = |point: usize| {
        let place: Vec<String> = landscape.place(point).iter().map(|coordinate| format!("{coordinate:.3}")).collect();
        place.join(", ")
    };
    let pictures = landscape_pictures(out)?;
    if args.model.json {
        let extreme = |found: Option<&(f64, usize)>| {
            found.map(|&(loss, point)| json!({"loss": loss, "at": landscape.place(point)}))
        };
        return print(
            &json!({
                "title": landscape.title,
                "axes": landscape.axes,
                "points": landscape.len(),
                "lowest": extreme(finite.first()),
                "highest": extreme(finite.last()),
                "not_finite": landscape.len() - finite.len(),
                "out": out.display().to_string(),
                "pictures": pictures.iter().map(|path| path.display().to_string()).collect::<Vec<_>>(),
            })
            .to_string(),
        );
    }
    match (finite.first(), finite.last()) {
        (Some(&(lowest, a)), Some(&(highest, b))) => print(&format!(
            "{}: {} points, from {lowest:.4} at {} to {highest:.4} at {}",
            landscape.title,
            landscape.len(),
            at(a),
            at(b)
        ))?,
        _ => print(&format!("{}: {} points, none finite", landscape.title, landscape.len()))?,
    }
    for picture in pictures {
        print(&format!("picture: {}", picture.display()))?;
    }
    Ok(())
}
