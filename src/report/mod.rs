//! Reports: a page that compares runs, pictures of loss landscapes and spectra, and logs for TensorBoard.

mod chart;
mod drawing;
mod events;
mod landscape;
mod page;
mod runs;
mod spectrum;

pub use landscape::landscape_pictures;
pub use runs::RunStatistics;
pub use spectrum::spectrum_picture;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::train::{TrainError, write_whole};
use page::plus_minus;
use runs::{Loaded, LoadedRun};

/// The results of runs that differ only in the seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GroupSummary {
    /// The optimizer, and the settings in which the group differs from the others.
    pub name: String,
    /// The folders of its runs.
    pub runs: Vec<PathBuf>,
    /// Test accuracy of the last epoch: a share from 0 to 1.
    pub test_accuracy: RunStatistics,
    /// Test loss of the last epoch: the mean cross-entropy in nats.
    pub test_loss: RunStatistics,
    /// Seconds of training.
    pub seconds: RunStatistics,
    /// Training images per second.
    pub images_per_second: RunStatistics,
    /// The curvature at the end: a [`RunStatistics`] as JSON for each number of a measure, by its name.
    pub curvature: serde_json::Map<String, serde_json::Value>,
}

impl std::fmt::Display for GroupSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = RunStatistics::of(self.test_accuracy.values.iter().map(|share| 100.0 * share).collect());
        let (accuracy, loss, count) = (plus_minus(&percent), plus_minus(&self.test_loss), self.runs.len());
        let runs = if count == 1 { "run" } else { "runs" };
        write!(f, "{}: test accuracy {accuracy} %, test loss {loss} ({count} {runs})", self.name)
    }
}

/// Whether curvature falls from each group to the next, in the order in which they were given.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CurvatureOrder {
    /// The measure: the trace, or else the largest eigenvalue.
    pub measure: String,
    /// Whether it falls from each group to the next.
    pub falls: bool,
    /// The groups with this measure, and their means.
    pub means: Vec<(String, f64)>,
}

impl CurvatureOrder {
    fn of(groups: &[runs::Group]) -> Option<Self> {
        let found: Vec<_> = groups.iter().map(|group| (group.name.clone(), group.curvature())).collect();
        ["trace", "top eigenvalue"].into_iter().find_map(|measure| {
            let mean = |(group, numbers): &(String, Vec<(String, RunStatistics)>)| {
                let (_, statistics) = numbers.iter().find(|(name, _)| name == measure)?;
                Some((group.clone(), statistics.mean))
            };
            let means: Vec<(String, f64)> = found.iter().filter_map(mean).collect();
            let falls = means.windows(2).all(|pair| pair[1].1 < pair[0].1);
            (means.len() > 1).then(|| Self { measure: measure.into(), falls, means })
        })
    }
}

impl std::fmt::Display for CurvatureOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { measure, falls, means } = self;
        let measure = if measure == "trace" { "trace of the Hessian" } else { "largest eigenvalue of the Hessian" };
        let means: Vec<String> = means.iter().map(|(name, mean)| format!("{name} {}", chart::digits(*mean))).collect();
        let falls = if *falls { "falls" } else { "does not fall" };
        write!(f, "The {measure} {falls} in the order of the groups: {}.", means.join("; "))
    }
}

/// A path that has nothing to report.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SkippedPath {
    /// The path as it was given.
    pub path: PathBuf,
    /// Why, in one line that names the path or a file in it.
    pub reason: String,
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
    /// Paths that have nothing to report.
    pub skipped: Vec<SkippedPath>,
    /// None if fewer than two groups have a measure of curvature in common.
    pub curvature_order: Option<CurvatureOrder>,
    /// Lines of logs that were skipped because they could not be read.
    pub unreadable_lines: usize,
}

/// Compares runs, each the folder of a [`Training`](crate::train::Training), on one HTML page: `out`, or `report.html`
/// in the folder of a single run or in the current folder. The page needs no other file. With `tensorboard`, each run's
/// log is also written to `tensorboard/` in its folder. A path that does not exist, is not the folder of a run, or has
/// no readable line in its log is skipped if there is at least one run.
///
/// # Errors
/// No path with a run; a file that is damaged, or cannot be read or written.
pub fn report(runs: &[PathBuf], out: Option<&Path>, tensorboard: bool) -> Result<Report, TrainError> {
    let (mut seen, mut found, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    for path in runs {
        // A folder given twice is one run, not two with the same result.
        let place = path.canonicalize().unwrap_or_else(|_| path.clone());
        if seen.contains(&place) {
            continue;
        }
        seen.push(place);
        match LoadedRun::read(path)? {
            Loaded::Run(run) => found.push(*run),
            Loaded::Nothing(reason) => skipped.push((path, reason)),
        }
    }
    let path = match (out, &found[..]) {
        (_, []) => {
            return Err(match skipped.into_iter().next() {
                Some((_, reason)) => reason,
                None => TrainError::setting("runs", "none given, expected one or more"),
            });
        }
        (Some(out), _) => out.to_path_buf(),
        (None, [run]) => run.path.join("report.html"),
        (None, _) => "report.html".into(),
    };
    let unreadable_lines = found.iter().map(|run| run.unreadable).sum();
    let mut event_files = Vec::new();
    if tensorboard {
        for run in &found {
            event_files.push(events::write(run)?);
        }
    }
    let groups = runs::group(found);
    let curvature_order = CurvatureOrder::of(&groups);
    write_whole(&path, page::page(&groups, curvature_order.as_ref()).as_bytes())?;
    let summary = |group: &runs::Group| GroupSummary {
        name: group.name.clone(),
        runs: group.runs.iter().map(|run| run.path.clone()).collect(),
        test_accuracy: group.test_accuracy(),
        test_loss: group.test_loss(),
        seconds: group.seconds(),
        images_per_second: group.images_per_second(),
        curvature: group
            .curvature()
            .into_iter()
            .map(|(name, statistics)| (name, serde_json::json!(statistics)))
            .collect(),
    };
    let skipped_path =
        |(path, reason): (&PathBuf, TrainError)| SkippedPath { path: path.clone(), reason: reason.to_string() };
    Ok(Report {
        report: path,
        tensorboard: event_files,
        groups: groups.iter().map(summary).collect(),
        skipped: skipped.into_iter().map(skipped_path).collect(),
        curvature_order,
        unreadable_lines,
    })
}
