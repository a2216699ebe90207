//! The runs of a report: reading their folders, grouping them, and the numbers of each group.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::landscape::LoadedLandscape;
use crate::curvature::Density;
use crate::optim;
use crate::train::{
    CurvatureFile, Finding, MOST_FINDINGS, MOST_LINES, MOST_SETTINGS, Options, Record, TrainError, checksum, if_there,
    read_regular, read_text, toml_error,
};

/// What was measured, by the measure's name.
pub(super) type Measures = BTreeMap<String, Finding>;

/// What is at a path of the report.
pub(super) enum Loaded {
    Run(Box<LoadedRun>),
    /// Nothing to report, for this reason.
    Nothing(TrainError),
}

/// The folder of a run.
pub(super) struct LoadedRun {
    pub path: PathBuf,
    /// Every setting that has a value.
    pub settings: toml::Table,
    pub records: Vec<Record>,
    /// Lines of the log that could not be read.
    pub unreadable: usize,
    /// The contents of `curvature.json`, if the folder has one.
    pub curvature: Option<Measured>,
    /// Landscapes by the names of their folders.
    pub landscapes: Vec<(String, LoadedLandscape)>,
    /// Files left out because they belong to other weights than the current ones.
    pub stale: Vec<String>,
}

/// Measures, and a description of the images.
#[derive(Clone)]
pub(super) struct Measured {
    pub measures: Measures,
    pub over: String,
    /// The checksum of the weights, if known.
    weights: Option<String>,
}

/// The line of the log for one epoch.
#[derive(Clone, Copy)]
pub(super) struct Epoch {
    pub epoch: u64,
    pub train_loss: Option<f64>,
    pub test_loss: Option<f64>,
    pub test_accuracy: f64,
    pub lr: f64,
    pub gradient_norm: Option<f64>,
    pub images_per_second: f64,
    pub seconds: f64,
}

impl LoadedRun {
    /// Reads a folder. One that does not exist, is not that of a run, or has no readable line in its log has nothing to
    /// report. Damaged settings or results are an error.
    pub fn read(path: &Path) -> Result<Loaded, TrainError> {
        let absent = |error: &std::io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
        let config = path.join("config.toml");
        match std::fs::metadata(&config) {
            Err(error) if absent(&error) => {
                let reason = match std::fs::metadata(path) {
                    Err(error) => TrainError::io(path)(error),
                    Ok(_) => TrainError::NoRun { path: path.into() },
                };
                return Ok(Loaded::Nothing(reason));
            }
            found => found.map_err(TrainError::io(&config))?,
        };
        let settings = read_settings(&config)?;

        let log = path.join("log.jsonl");
        let text = match read_regular(&log, MOST_LINES) {
            Err(TrainError::Io { path, source }) if absent(&source) => {
                return Ok(Loaded::Nothing(TrainError::Io { path, source }));
            }
            text => text?,
        };
        let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
        let lines: Vec<Option<Record>> = lines.map(Record::read).collect();
        let unreadable = lines.iter().filter(|line| line.is_none()).count();
        let records: Vec<Record> = lines.into_iter().flatten().collect();
        if records.is_empty() {
            let reason = "no line of the log can be read, so there is nothing to report".into();
            return Ok(Loaded::Nothing(TrainError::Results { path: log, reason }));
        }

        // Results of other weights than the current ones are stale.
        let model = path.join("model.safetensors");
        let weights = if model.is_file() { Some(checksum(&model)?) } else { None };
        let is_stale = |of: &Option<String>| of.is_some() && weights.is_some() && *of != weights;
        let mut stale = Vec::new();
        let mut curvature = read_curvature(&path.join("curvature.json"))?;
        if curvature.as_ref().is_some_and(|measured| is_stale(&measured.weights)) {
            curvature = None;
            stale.push("curvature.json".to_string());
        }
        let mut landscapes = Vec::new();
        for entry in std::fs::read_dir(path).map_err(TrainError::io(path))? {
            let entry = entry.map_err(TrainError::io(path))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let has = |file: &str| entry.path().join(file).is_file();
            if name.starts_with("landscape") && has("landscape.json") && has("landscape.csv") {
                let landscape = LoadedLandscape::read(&entry.path())?;
                match is_stale(&landscape.weights) {
                    true => stale.push(name),
                    false => landscapes.push((name, landscape)),
                }
            }
        }
        // A landscape without a finite loss cannot be drawn.
        landscapes.retain(|(_, landscape)| landscape.counts().0 > landscape.counts().1);
        landscapes.sort_by(|(a, _), (b, _)| a.cmp(b));
        stale.sort();
        let path = path.into();
        Ok(Loaded::Run(Box::new(Self { path, settings, records, unreadable, curvature, landscapes, stale })))
    }

    /// The lines of its epochs. If an epoch was written twice, the last line counts.
    pub fn epochs(&self) -> Vec<Epoch> {
        let mut epochs: Vec<Epoch> = Vec::new();
        for record in &self.records {
            let &Record::Epoch {
                epoch,
                train_loss,
                test_loss,
                test_accuracy,
                lr,
                gradient_norm,
                images_per_second,
                seconds,
                ..
            } = record
            else {
                continue;
            };
            epochs.retain(|earlier| earlier.epoch < epoch);
            epochs.push(Epoch {
                epoch,
                train_loss,
                test_loss,
                test_accuracy,
                lr,
                gradient_norm,
                images_per_second,
                seconds,
            });
        }
        epochs
    }

    /// The epochs after which curvature was measured, with the findings. If an epoch was measured twice, the last
    /// counts.
    pub fn curvatures(&self) -> Vec<(u64, &Measures)> {
        let mut found: Vec<(u64, &Measures)> = Vec::new();
        for record in &self.records {
            let Record::Curvature { epoch, measures, .. } = record else { continue };
            found.retain(|(earlier, _)| earlier < epoch);
            found.push((*epoch, measures));
        }
        found
    }

    /// The curvature at the end: from `curvature.json`, and for other measures the last in the log.
    pub fn final_curvature(&self) -> Option<Measured> {
        let logged = self.curvatures().pop();
        let Some((epoch, logged)) = logged else { return self.curvature.clone() };
        let (mut measures, over) = (logged.clone(), format!("after epoch {epoch}"));
        let Some(measured) = &self.curvature else { return Some(Measured { measures, over, weights: None }) };
        measures.extend(measured.measures.clone());
        let rest =
            if measures.len() > measured.measures.len() { format!(", other measures {over}") } else { String::new() };
        Some(Measured { measures, over: format!("{}{rest}", measured.over), weights: None })
    }

    /// Steps done and steps skipped, according to the log.
    pub fn steps(&self) -> (u64, u32) {
        let skipped = |record: &Record| match record {
            Record::Step { skipped, .. } | Record::Epoch { skipped, .. } => *skipped,
            Record::Curvature { .. } => 0,
        };
        let step = |record: &Record| match record {
            Record::Step { step, .. } | Record::Epoch { step, .. } | Record::Curvature { step, .. } => *step,
        };
        (self.records.iter().map(step).max().unwrap_or(0), self.records.iter().map(skipped).max().unwrap_or(0))
    }

    /// The mean of the epochs' speeds, weighted by their durations.
    pub fn images_per_second(&self) -> Option<f64> {
        let epochs = self.epochs();
        let mut before = 0.0;
        let (mut images, mut seconds) = (0.0, 0.0);
        for epoch in &epochs {
            let took = epoch.seconds - before;
            // If a run was resumed without its earlier lines, the duration of the first epoch is unknown.
            if took > 0.0 && took.is_finite() {
                images += epoch.images_per_second * took;
                seconds += took;
            }
            before = epoch.seconds;
        }
        (seconds > 0.0).then(|| images / seconds)
    }

    /// A setting as a user writes it; empty if it has no value.
    pub fn setting(&self, key: &str) -> String {
        self.settings.get(key).map(written).unwrap_or_default()
    }
}

fn written(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The settings of a run. Those of a method from outside this crate are taken as they are, since its options are not
/// known here.
fn read_settings(config: &Path) -> Result<toml::Table, TrainError> {
    let text = read_text(config, MOST_SETTINGS)?;
    let broken = |error| TrainError::Settings { path: config.into(), reason: toml_error(&text, &error) };
    let settings: toml::Table = toml::from_str(&text).map_err(broken)?;
    let method = settings.get("optimizer").and_then(toml::Value::as_str);
    if method.is_none_or(|name| optim::find(name).is_some()) {
        Options::from_file(config)?;
    }
    Ok(settings)
}

fn read_curvature(path: &Path) -> Result<Option<Measured>, TrainError> {
    let Some(text) = if_there(read_text(path, MOST_FINDINGS))? else { return Ok(None) };
    let unusable = |reason: String| TrainError::Results { path: path.into(), reason };
    let file: CurvatureFile = serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?;
    let own_statistics = file.has_batch_statistics();
    let CurvatureFile { measures, samples, split, weights, .. } = file;
    let missing = || unusable("no `measures`: expected an object of findings by the names of measures".into());
    let measures = measures.ok_or_else(missing)?;
    let samples = samples.map(|samples| format!("{samples} "));
    let over = format!("over {}{split} images", samples.unwrap_or_default());
    let own_statistics = if own_statistics { ", batch norm with each batch's statistics" } else { "" };
    let over = over.replace("train ", "training ") + own_statistics;
    Ok(Some(Measured { measures, over, weights }))
}

/// The numbers of each measure in a report, by name: the largest eigenvalue, the two counts of extrema. A spectrum and
/// traces by layer have none.
pub(super) fn numbers(measures: &Measures) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    for (name, finding) in measures {
        let mut add = |name: &str, value: Option<f64>| {
            // JSON has no numbers that are not finite.
            found.extend(value.filter(|value| value.is_finite()).map(|value| (name.to_string(), value)));
        };
        match finding {
            Finding::Eigenvalues { pairs, .. } => {
                let lanczos = name == "top-eigenvalues";
                add(if lanczos { "top eigenvalue" } else { "power eigenvalue" }, finding.value());
                add("λ1/λ5", Finding::first_over_fifth(pairs).filter(|_| lanczos));
            }
            Finding::Extrema { minima, maxima } => {
                add("minima", Some(minima.mean.value));
                add("maxima", Some(maxima.mean.value));
            }
            Finding::Rise { rise, .. } => {
                add(name, Some(rise.largest));
                add("sharpness, one step", Some(rise.one_step));
            }
            _ => add(name, finding.value()),
        }
    }
    found
}

/// The traces of layers, in the order of their names.
pub(super) fn layer_traces(measures: &Measures) -> Vec<(String, f64)> {
    let Some(Finding::Layers(layers)) = measures.get("layer-traces") else { return Vec::new() };
    let traces = layers.iter().map(|(name, estimate)| (name.clone(), estimate.value));
    traces.filter(|(_, trace)| trace.is_finite()).collect()
}

/// The peaks of a spectrum and their weights.
pub(super) fn spectrum(measures: &Measures) -> Option<&Density> {
    match measures.get("spectrum") {
        Some(Finding::Density(density)) => Some(density),
        _ => None,
    }
}

/// A number across several runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunStatistics {
    /// The mean; NaN if the number of any run is not finite, or if there are no runs.
    pub mean: f64,
    /// The standard deviation, with the number of runs minus one as the divisor; none for a single run.
    pub deviation: Option<f64>,
    /// The number of each run.
    pub values: Vec<f64>,
}

impl RunStatistics {
    pub(super) fn of(values: Vec<f64>) -> Self {
        let count = values.len() as f64;
        // 0/0 for no values, which is NaN as it should be.
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
        Self { mean, deviation, values }
    }
}

/// Runs that differ only in the seed.
pub(super) struct Group {
    /// The settings in which it differs from the other groups.
    pub name: String,
    pub runs: Vec<LoadedRun>,
}

impl Group {
    /// A number of each run's last epoch; NaN if it was not finite.
    pub fn last(&self, number: impl Fn(&Epoch) -> f64) -> RunStatistics {
        RunStatistics::of(self.runs.iter().filter_map(|run| run.epochs().last().map(&number)).collect())
    }

    pub fn test_accuracy(&self) -> RunStatistics {
        self.last(|epoch| epoch.test_accuracy)
    }

    pub fn test_loss(&self) -> RunStatistics {
        self.last(|epoch| epoch.test_loss.unwrap_or(f64::NAN))
    }

    pub fn seconds(&self) -> RunStatistics {
        self.last(|epoch| epoch.seconds)
    }

    pub fn images_per_second(&self) -> RunStatistics {
        RunStatistics::of(self.runs.iter().filter_map(LoadedRun::images_per_second).collect())
    }

    /// The numbers of the curvature at the end, by name, in the order of their occurrence.
    pub fn curvature(&self) -> Vec<(String, RunStatistics)> {
        let measured = self.runs.iter().filter_map(LoadedRun::final_curvature);
        by_name(measured.flat_map(|measured| numbers(&measured.measures)))
    }

    /// The traces of layers at the end.
    pub fn layer_traces(&self) -> Vec<(String, RunStatistics)> {
        let measured = self.runs.iter().filter_map(LoadedRun::final_curvature);
        by_name(measured.flat_map(|measured| layer_traces(&measured.measures)))
    }

    /// The spectrum of the first run that has one: its last measurement.
    pub fn spectrum(&self) -> Option<&Density> {
        fn of(run: &LoadedRun) -> Option<&Density> {
            let logged = || run.curvatures().into_iter().filter_map(|(_, measures)| spectrum(measures)).next_back();
            run.curvature.as_ref().and_then(|measured| spectrum(&measured.measures)).or_else(logged)
        }
        self.runs.iter().find_map(of)
    }
}

fn by_name(numbers: impl Iterator<Item = (String, f64)>) -> Vec<(String, RunStatistics)> {
    let mut found: Vec<(String, Vec<f64>)> = Vec::new();
    for (name, number) in numbers {
        match found.iter_mut().find(|(other, _)| *other == name) {
            Some((_, values)) => values.push(number),
            None => found.push((name, vec![number])),
        }
    }
    found.into_iter().map(|(name, values)| (name, RunStatistics::of(values))).collect()
}

/// Groups runs that differ only in the seed, in the order in which they were given.
pub(super) fn group(runs: Vec<LoadedRun>) -> Vec<Group> {
    let but_seed = |run: &LoadedRun| {
        let mut settings = run.settings.clone();
        settings.remove("seed");
        settings
    };
    let mut groups: Vec<Group> = Vec::new();
    for run in runs {
        let same =
            groups.iter_mut().find(|group| group.runs.first().is_some_and(|first| but_seed(first) == but_seed(&run)));
        match same {
            Some(group) => group.runs.push(run),
            None => groups.push(Group { name: String::new(), runs: vec![run] }),
        }
    }
    for (group, name) in names(&groups).into_iter().enumerate() {
        groups[group].name = name;
    }
    groups
}

/// The settings in which the groups differ, the optimizer first.
pub(super) fn differing(groups: &[Group]) -> Vec<String> {
    let firsts: Vec<&LoadedRun> = groups.iter().filter_map(|group| group.runs.first()).collect();
    let mut keys: Vec<&String> = firsts.iter().flat_map(|run| run.settings.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|&key| key != "seed" && firsts.iter().any(|run| run.settings.get(key) != firsts[0].settings.get(key)));
    keys.sort_by_key(|&key| key != "optimizer");
    keys.into_iter().cloned().collect()
}

/// The name of each group: the optimizer, and as many settings as are needed to distinguish them.
fn names(groups: &[Group]) -> Vec<String> {
    let firsts: Vec<&LoadedRun> = groups.iter().filter_map(|group| group.runs.first()).collect();
    let part = |run: &LoadedRun, key: &str| match run.settings.get(key) {
        None => String::new(),
        Some(toml::Value::Boolean(true)) => format!(", {key}"),
        Some(toml::Value::Boolean(false)) => String::new(),
        // The last part of a path is enough.
        Some(toml::Value::String(text)) if key == "data" || key == "init" => {
            let end = Path::new(text).file_name().map(|name| name.to_string_lossy().into_owned());
            format!(", {}", end.unwrap_or_else(|| text.clone()))
        }
        Some(value) => format!(", {key} {}", written(value)),
    };
    let mut names: Vec<String> =
        firsts.iter().map(|run| run.settings.get("optimizer").map_or_else(|| "sam".into(), written)).collect();
    let different = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names.dedup();
        names.len()
    };
    for key in differing(groups) {
        let longer: Vec<String> =
            names.iter().zip(&firsts).map(|(name, run)| format!("{name}{}", part(run, &key))).collect();
        if different(&longer) > different(&names) {
            names = longer;
        }
    }
    // Groups that still have the same name differ only in how something is written. They are numbered.
    let plain = names.clone();
    for index in 1..names.len() {
        let same = plain[..index].iter().filter(|&name| *name == plain[index]).count();
        if same > 0 {
            names[index] += &format!(" ({})", same + 1);
        }
    }
    names
}
