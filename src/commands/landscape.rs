//! `polder landscape`: the loss on a line or a plane around trained weights, as numbers and as pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder::arena::Layout;
use polder::curvature::filter_normalized;
use polder::data::Split;
use polder::device::{self, Buffer};
use polder::kernels::vector;
use polder::report::landscape_pictures;
use polder::train::landscape::{Axis, Heights, Landscape, load_direction, save_direction};
use polder::train::{
    BatchNormName, CurvatureMeter, CurvatureSettings, Evaluator, Finding, TrainError, checksum, hold, write_npy,
};
use polder::{settings, words};
use serde_json::json;

use super::flags::Flags;
use super::model::{self, MeasureSettings, ModelArgs, Samples, Subject, short};
use super::{Bar, Failure, counted, option, print, shown, stop_on_signals, tell};

words! {
    /// The directions of the axes.
    pub enum Directions {
        /// Random, filter-normalised
        Random = "random",
        /// Eigenvectors of the Hessian's largest eigenvalues
        Eigenvectors = "eigenvectors",
    }
}

settings! {
    /// The grid of a landscape.
    pub struct LandscapeSettings {
        /// 1 for a line, 2 for a plane
        dimensions: Option<usize> = None, else "2; with --to, the number of files", as "D", in between(1, 2);
        /// Directions of the axes
        directions: Directions = Directions::Random;
        /// Points along each axis
        points: usize = 21, in at_least(2);
        /// The ends of each axis
        range: Option<Vec<f64>> = None, else "-1,1; with --to, -0.5,1.5", as "LOW,HIGH";
        /// Seed of random directions
        seed: u64 = 0;
    }
}

#[derive(clap::Args)]
pub struct LandscapeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder for the landscape: pictures, npy, csv. The same command continues an interrupted one [default: landscape
    /// in the folder of --run]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    images: Flags<MeasureSettings>,
    #[command(flatten)]
    grid: Flags<LandscapeSettings>,
    /// The first axis runs from the weights, at 0, to these, at 1; given twice, the second axis likewise
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = ["directions", "dimensions"])]
    to: Vec<PathBuf>,
}

/// What a landscape is of, read from the flags and checked.
struct Grid {
    split: Split,
    samples: Option<usize>,
    bn: BatchNormName,
    dimensions: usize,
    directions: Directions,
    points: usize,
    range: (f64, f64),
    seed: u64,
}

/// A direction and the name of its axis.
struct Direction {
    name: String,
    vector: Buffer<f32>,
}

impl LandscapeArgs {
    fn grid(&self) -> Result<Grid, TrainError> {
        let MeasureSettings { split, samples, bn } = self.images.settings()?;
        let LandscapeSettings { dimensions, directions, points, range, seed } = self.grid.settings()?;
        let (dimensions, usual) = match self.to.len() {
            0 => (dimensions.unwrap_or(2), vec![-1.0, 1.0]),
            files @ 1..=2 => (files, vec![-0.5, 1.5]),
            files => return Err(option("to", format!("{files} files, expected one or two"))),
        };
        let range = range.unwrap_or(usual);
        let [low, high] = *range else {
            return Err(option("range", format!("{}, expected LOW,HIGH", counted(range.len() as u64, "number"))));
        };
        if !low.is_finite() || !high.is_finite() || !(high - low).is_finite() || low >= high {
            return Err(option("range", format!("{low},{high}, expected finite numbers, the lower one first")));
        }
        if points.checked_pow(dimensions as u32).is_none_or(|points| points > Landscape::MOST_POINTS) {
            let reason = format!("{points}, expected at most {} points in all", Landscape::MOST_POINTS);
            return Err(option("points", reason));
        }
        Ok(Grid { split, samples, bn, dimensions, directions, points, range: (low, high), seed })
    }
}

pub fn run(args: &LandscapeArgs) -> Result<ExitCode, Failure> {
    let grid = args.grid()?;
    let Grid { split, samples, bn, dimensions, points, range: (low, high), .. } = grid;
    let out = match (&args.out, args.model.run()?) {
        (Some(out), _) => out.clone(),
        (None, Some(run)) => run.join("landscape"),
        (None, None) if args.model.has_model()? => {
            return Err(option("out", "missing; give --run, or a folder").into());
        }
        (None, None) => return Err(model::missing("run").into()),
    };
    let usual = Samples::Usual { most: CurvatureMeter::usual_samples(&[]), bn };
    let mut subject = args.model.open(split, samples.map_or(usual, Samples::First))?;
    // Every point is of all images.
    subject.images = subject.images.into_memory().map_err(TrainError::from)?;
    let settings = settings(args, &grid, &subject)?;
    let held = hold(&out)?;
    let begun = Landscape::begun(&out, &settings)?;

    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop, "point", None);
    let Subject { device, data, images, normalization, init, batch_size, .. } = &subject;
    let network = subject.network();
    let mut evaluator = Evaluator::new(device, &network, (data, images), *normalization, *batch_size, bn.mode())?;
    let [weights, statistics] = subject.load(init, evaluator.layouts())?;
    let layout = evaluator.layouts()[0].clone();
    let (landscape, directions) = match begun {
        Some(landscape) => {
            let kept = |axis| Ok(device.upload(&load_direction(&out, axis, &layout)?)?);
            let directions: Vec<Buffer<f32>> = (0..dimensions).map(kept).collect::<Result<_, TrainError>>()?;
            (landscape, directions)
        }
        None => {
            let found = directions(args, &grid, &subject, &stop, evaluator.layouts(), [&weights, &statistics]);
            let Some((title, found)) = TrainError::unless_stopped(found)? else {
                tell("interrupted before the first point; nothing is kept");
                return Ok(ExitCode::from(130));
            };
            held.check()?;
            let step = (high - low) / (points - 1) as f64;
            let values: Vec<f64> = (0..points).map(|point| low + step * point as f64).collect();
            if low < 0.0 && high > 0.0 && values.iter().all(|value| value.abs() > 1e-6 * step) {
                tell(
                    "no point of the grid is the weights themselves; an odd --points with a symmetric --range has one",
                );
            }
            let (mut axes, mut directions) = (Vec::new(), Vec::new());
            for (axis, Direction { name, vector }) in found.into_iter().enumerate() {
                save_direction(&out, axis, &layout, &vector.to_vec().map_err(TrainError::from)?)?;
                axes.push(Axis { name, values: values.clone() });
                directions.push(vector);
            }
            let landscape = Landscape { title, subject: subject.title.clone(), axes, settings };
            landscape.write(&out)?;
            (landscape, directions)
        }
    };
    let mut heights = Heights::open(&out, &landscape)?;
    let earlier = heights.list().len();
    if earlier > 0 && !args.model.json {
        print(&format!("{}: continuing from {earlier} of {} points", out.display(), landscape.len()))?;
    }
    let bar = Bar::new();
    let go_on = |done| {
        bar.show("points", done, landscape.len());
        !stop.load(Ordering::Relaxed)
    };
    heights.complete(&landscape, &mut evaluator, (weights.view(), statistics.view()), &directions, go_on)?;
    drop(bar);
    held.check()?;
    if heights.list().len() < landscape.len() {
        let done = heights.list().len();
        tell(&format!("interrupted after {done} of {} points; the same command continues from there", landscape.len()));
        return Ok(ExitCode::from(130));
    }
    if heights.list().iter().all(|height| !height.loss.is_finite()) {
        let reason = "no point of the landscape has a finite loss".into();
        return Err(TrainError::Results { path: out, reason }.into());
    }
    tell_result(args, &out, &landscape, &heights)?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that the values depend on. Files are identified by their contents, so that a run and its landscape can
/// be moved.
fn settings(args: &LandscapeArgs, grid: &Grid, subject: &Subject) -> Result<BTreeMap<String, String>, TrainError> {
    let Grid { split, bn, dimensions, directions, points, range: (low, high), seed, .. } = grid;
    let channels = subject.images.shape.channels;
    let list = |values: &[f32]| values.iter().map(f32::to_string).collect::<Vec<_>>().join(",");
    let mut settings: BTreeMap<&str, String> = BTreeMap::from([
        ("model", subject.model_name.clone()),
        ("weights", checksum(&subject.init)?),
        ("images", format!("checksum {}", subject.images.checksum())),
        ("mean", list(&subject.normalization.mean[..channels])),
        ("std", list(&subject.normalization.std[..channels])),
        ("split", split.to_string()),
        ("samples", subject.images.len().to_string()),
        ("batch-size", subject.batch_size.to_string()),
        ("bn", bn.to_string()),
        ("dimensions", dimensions.to_string()),
        ("points", points.to_string()),
        ("range", format!("{low},{high}")),
        ("seed", seed.to_string()),
    ]);
    match &*args.to {
        [] => drop(settings.insert("directions", directions.to_string())),
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
    grid: &Grid,
    subject: &Subject,
    stop: &AtomicBool,
    layouts: [&Layout; 2],
    [weights, statistics]: [&Buffer<f32>; 2],
) -> Result<(String, Vec<Direction>), TrainError> {
    let Grid { bn, dimensions, seed, .. } = *grid;
    let Subject { device, data, images, normalization, init, batch_size, .. } = subject;
    if !args.to.is_empty() {
        let mut found = Vec::new();
        for file in &args.to {
            let [mut vector, _] = subject.load(file, layouts)?;
            vector::axpy(-1.0, weights.view(), vector.view_mut())?;
            found.push(Direction { name: format!("to {}", short(file)), vector });
        }
        return Ok((format!("Loss from {}", short(init)), found));
    }
    if grid.directions == Directions::Random {
        let direction = |axis: usize| {
            let vector = filter_normalized(layouts[0], weights.view(), seed, axis)?;
            Ok(Direction { name: format!("direction {}", axis + 1), vector })
        };
        let found = (0..dimensions).map(direction).collect::<device::Result<_>>()?;
        return Ok(("Loss along filter-normalised random directions".into(), found));
    }
    let mut meter =
        CurvatureMeter::new(device, &subject.network(), (data, images), *normalization, *batch_size, bn.mode())?;
    let CurvatureSettings { steps, tolerance, .. } = CurvatureSettings::default();
    let bar = Bar::new();
    let progress = |done| bar.show("eigenvectors", done, steps);
    let pairs = meter.at_until(stop, weights.view(), statistics.view(), |curvature| {
        curvature.top_eigenvalues(dimensions, (steps, tolerance), seed, progress)
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

/// Writes the arrays and the pictures, and prints the result.
fn tell_result(args: &LandscapeArgs, out: &Path, landscape: &Landscape, heights: &Heights) -> Result<(), Failure> {
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
            "{}: {} points, from {} at {} to {} at {}",
            landscape.title,
            landscape.len(),
            shown(lowest, 4),
            at(a),
            shown(highest, 4),
            at(b)
        ))?,
        _ => print(&format!("{}: {} points, none finite", landscape.title, landscape.len()))?,
    }
    for picture in pictures {
        print(&format!("picture: {}", picture.display()))?;
    }
    Ok(())
}
