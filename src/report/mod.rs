//! Reports: a page that compares runs, pictures of loss landscapes and spectra, and logs for TensorBoard.

mod chart;
mod curves;
mod drawing;
mod events;
mod font;
mod grid;
mod landscape;
mod page;
mod pdf;
mod picture;
mod png;
mod runs;
mod spectrum;
mod statistics;
mod text;

pub use landscape::landscape_pictures;
pub use picture::{ColourMap, PictureFormat, PictureName, PictureSettings, pictures};
pub use spectrum::spectrum_pictures;
pub use statistics::{MeasuredStatistics, RunStatistics};
pub use text::with_errors;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::train::{Held, TrainError, hold, write_whole};
use runs::{LoadedRun, Outcome};
use statistics::MeanError;
use text::{counted, digits, shortened};

/// The results of runs that differ only in the seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GroupSummary {
    /// The optimizer, and the settings in which the group differs from the others.
    pub name: String,
    /// The folders of its runs.
    pub runs: Vec<PathBuf>,
    /// Which of them diverged. Their numbers count only if those of no other run do.
    pub diverged: Vec<PathBuf>,
    /// Which of them have epochs left to do. Their numbers count only if no run is finished.
    pub unfinished: Vec<PathBuf>,
    /// Test accuracy of the last finished epoch: a share from 0 to 1.
    pub test_accuracy: RunStatistics,
    /// The same of the weights averaged over epochs, of the runs that have them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swa_test_accuracy: Option<RunStatistics>,
    /// Test loss of the last finished epoch: the mean cross-entropy in nats.
    pub test_loss: RunStatistics,
    /// Seconds of training.
    pub seconds: RunStatistics,
    /// Training images per second.
    pub images_per_second: RunStatistics,
    /// The curvature at the end: a [`MeasuredStatistics`] as JSON for each number of a measure, by its name.
    pub curvature: serde_json::Map<String, serde_json::Value>,
}

impl std::fmt::Display for GroupSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (accuracy, loss) = (self.test_accuracy.percent(), &self.test_loss);
        let mut runs = counted(self.runs.len(), "run");
        for (count, what) in [(self.diverged.len(), "diverged"), (self.unfinished.len(), "unfinished")] {
            if count > 0 {
                runs += &format!(", {count} {what}");
            }
        }
        let unit = if accuracy.mean.is_finite() { " %" } else { "" };
        write!(f, "{}: test accuracy {accuracy}{unit}, test loss {loss} ({runs})", self.name)
    }
}

/// The groups in the order of a measure of curvature, the largest first, whatever the order in which they were given.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CurvatureOrder {
    /// The measure: the trace, or else the largest eigenvalue.
    pub measure: String,
    /// The groups with this measure, the largest mean first.
    pub groups: Vec<GroupCurvature>,
}

/// The curvature of a group at its place in a [`CurvatureOrder`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GroupCurvature {
    /// The group.
    pub name: String,
    /// The mean over its runs.
    pub mean: f64,
    /// The standard error of the mean, of the measurement and over seeds together; none if neither is known.
    pub error: Option<f64>,
    /// Whether the mean lies below that of the group before it by more than twice the error of their difference. None
    /// for the first group, and if an error is not known.
    pub is_below_previous: Option<bool>,
}

impl CurvatureOrder {
    fn of(groups: &[runs::Group]) -> Option<Self> {
        if !runs::are_comparable(groups) {
            return None;
        }
        let found: Vec<_> = groups.iter().map(|group| (&group.name, group.curvature())).collect();
        ["trace", "top eigenvalue"].into_iter().find_map(|measure| {
            let mean = |(group, numbers): &(&String, Vec<(String, MeasuredStatistics)>)| {
                let (_, statistics) = numbers.iter().find(|(name, _)| name == measure)?;
                Some(((*group).clone(), statistics.mean())).filter(|(_, of)| of.mean.is_finite())
            };
            let mut means: Vec<(String, MeanError)> = found.iter().filter_map(mean).collect();
            means.sort_by(|(a, first), (b, second)| second.mean.total_cmp(&first.mean).then_with(|| a.cmp(b)));
            let before = std::iter::once(None).chain(means.iter().map(|(_, of)| Some(*of)));
            let group = |((name, of), before): (&(String, MeanError), Option<MeanError>)| GroupCurvature {
                name: name.clone(),
                mean: of.mean,
                error: of.error,
                is_below_previous: before.and_then(|before| of.is_apart_from(&before)),
            };
            let groups: Vec<GroupCurvature> = means.iter().zip(before).map(group).collect();
            (groups.len() > 1).then(|| Self { measure: measure.into(), groups })
        })
    }
}

impl std::fmt::Display for CurvatureOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { measure, groups } = self;
        let measure = if measure == "trace" { "Trace" } else { "Largest eigenvalue" };
        write!(f, "{measure} of the Hessian, the largest first:")?;
        for (index, GroupCurvature { name, mean, error, is_below_previous }) in groups.iter().enumerate() {
            let sign = match is_below_previous {
                _ if index == 0 => "",
                Some(true) => " >",
                Some(false) => " ≈",
                None => ",",
            };
            let value = match error {
                Some(error) => {
                    let (mean, errors) = with_errors(*mean, &[*error]);
                    format!("{mean} ± {}", errors.concat())
                }
                None => digits(*mean),
            };
            write!(f, "{sign} {name} ({value})")?;
        }
        let has = |below: Option<bool>| groups[1..].iter().any(|group| group.is_below_previous == below);
        let like = if has(Some(false)) { ". ≈: the difference is within twice its error" } else { "" };
        let unknown = if has(None) { ". Errors that are not known allow no comparison" } else { "" };
        write!(f, "{like}{unknown}.")
    }
}

/// A path that was left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SkippedPath {
    /// A path as it was given, which has nothing to report, or a damaged file in the folder of a run.
    pub path: PathBuf,
    /// Why, in one line that names the path or a file in it.
    pub reason: String,
}

impl SkippedPath {
    fn new(path: &Path, error: &TrainError) -> Self {
        // The longest path of a file system and a reason.
        const LONGEST: usize = 5000;
        Self { path: path.into(), reason: shortened(&error.to_string(), LONGEST) }
    }
}

/// What [`report`] wrote and found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The page.
    pub report: PathBuf,
    /// Files for TensorBoard.
    pub tensorboard: Vec<PathBuf>,
    /// In the order in which their first runs were given.
    pub groups: Vec<GroupSummary>,
    /// Paths that have nothing to report, and damaged files in the folders of runs.
    pub skipped: Vec<SkippedPath>,
    /// None if fewer than two groups have a measure of curvature in common.
    pub curvature_order: Option<CurvatureOrder>,
    /// Lines of logs that were skipped because they could not be read.
    pub unreadable_lines: usize,
}

/// Compares runs, each the folder of a [`Training`](crate::train::Training), on one HTML page: `out`; without it
/// `report.html`, in the folder of the run if a single path is given, and else in the current folder. The page needs no
/// other file. With `tensorboard`, each run's log is also written to `tensorboard/` in its folder. If there is at least
/// one run, a path that is not the folder of a run or cannot be read is left out, and so is a damaged file in the
/// folder of a run. The page says so.
///
/// # Errors
/// No path with a run; a file that cannot be written; [`TrainError::InUse`] for a page in the folder of a run that
/// another process writes to.
pub fn report(runs: &[PathBuf], out: Option<&Path>, tensorboard: bool) -> Result<Report, TrainError> {
    let (mut seen, mut found, mut skipped, mut first) = (Vec::new(), Vec::new(), Vec::new(), None);
    for path in runs {
        // A folder given twice is one run, not two with the same result.
        let place = path.canonicalize().unwrap_or_else(|_| path.clone());
        if seen.contains(&place) {
            continue;
        }
        seen.push(place);
        match LoadedRun::read(path) {
            Ok(run) => {
                skipped.extend(run.damaged.iter().map(|error| SkippedPath::new(path, error)));
                found.push(run);
            }
            Err(error) => {
                skipped.push(SkippedPath::new(path, &error));
                first.get_or_insert(error);
            }
        }
    }
    if found.is_empty() {
        return Err(first.unwrap_or_else(|| TrainError::setting("runs", "none given, expected one or more")));
    }
    // The place depends on what was given, and not on what was found there.
    let path = match (out, &seen[..]) {
        (Some(out), _) => out.to_path_buf(),
        (None, [_]) => runs[0].join("report.html"),
        (None, _) => "report.html".into(),
    };
    refuse_other_files(&path)?;
    // Nothing is written to a run while another command writes to it.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let held = folder.join("config.toml").is_file().then(|| hold(folder)).transpose()?;
    let unreadable_lines = found.iter().map(|run| run.unreadable).sum();
    let mut event_files = Vec::new();
    if tensorboard {
        for run in &found {
            event_files.push(events::write(run)?);
        }
    }
    let groups = runs::group(found);
    let curvature_order = CurvatureOrder::of(&groups);
    held.as_ref().map(Held::check).transpose()?;
    write_whole(&path, page::page(&groups, curvature_order.as_ref(), &skipped).as_bytes())?;
    Ok(Report {
        report: path,
        tensorboard: event_files,
        groups: groups.iter().map(summary).collect(),
        skipped,
        curvature_order,
        unreadable_lines,
    })
}

/// Fails if the place of a page has a file that is none of polder's pages, which would be lost.
fn refuse_other_files(path: &Path) -> Result<(), TrainError> {
    let mut start = [0; 200];
    let length = match std::fs::metadata(path) {
        Err(_) => return Ok(()),
        // What is no file is written to and not replaced.
        Ok(found) if !found.is_file() || found.len() == 0 => return Ok(()),
        Ok(_) => {
            let mut file = std::fs::File::open(path).map_err(TrainError::io(path))?;
            std::io::Read::read(&mut file, &mut start).map_err(TrainError::io(path))?
        }
    };
    if String::from_utf8_lossy(&start[..length]).contains(page::GENERATOR) {
        return Ok(());
    }
    let reason = "is there, and is no report of polder".into();
    Err(TrainError::Occupied { path: path.into(), reason })
}

fn summary(group: &runs::Group) -> GroupSummary {
    let curvature = group.curvature().into_iter();
    let those = |is: fn(Outcome) -> bool| {
        group.runs.iter().filter(|run| is(run.outcome())).map(|run| run.path.clone()).collect::<Vec<_>>()
    };
    GroupSummary {
        name: group.name.clone(),
        runs: those(|_| true),
        diverged: those(|outcome| matches!(outcome, Outcome::Diverged(_))),
        unfinished: those(|outcome| matches!(outcome, Outcome::Unfinished { .. })),
        test_accuracy: group.test_accuracy(),
        swa_test_accuracy: Some(group.swa_test_accuracy()).filter(|swa| !swa.values.is_empty()),
        test_loss: group.test_loss(),
        seconds: group.seconds(),
        images_per_second: group.images_per_second(),
        curvature: curvature.map(|(name, statistics)| (name, serde_json::json!(statistics))).collect(),
    }
}
