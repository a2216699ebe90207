//! The runs of a report: reading their folders, grouping them, and the numbers of each group.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::landscape::LoadedLandscape;
use super::statistics::{MeasuredStatistics, Measurement, RunStatistics};
use super::text::{counted, plain};
use crate::curvature::{Density, Estimate};
use crate::optim;
use crate::train::{
    CurvatureFile, Finding, MOST_LINES, MOST_SETTINGS, Options, Record, TrainError, checksum, read_regular, read_text,
    toml_error,
};

/// What was measured, by the measure's name.
pub(super) type Measures = BTreeMap<String, Finding>;

/// The folder of a run.
pub(super) struct LoadedRun {
    pub path: PathBuf,
    /// Every setting that has a value.
    pub settings: toml::Table,
    /// The record of its images, which tells whether two runs had the same ones, wherever they lay.
    images: Option<toml::Value>,
    pub records: Vec<Record>,
    /// Lines of the log that could not be read.
    pub unreadable: usize,
    /// When the last line of the log was written.
    pub date: String,
    /// The lines of its epochs. If an epoch was written twice, the last line counts.
    pub epochs: Vec<Epoch>,
    /// The chip of its last epoch, or else the setting.
    pub device: String,
    /// The contents of `curvature.json`, if the folder has one.
    pub curvature: Option<Measured>,
    /// Landscapes by the names of their folders.
    pub landscapes: Vec<(String, LoadedLandscape)>,
    /// Files left out because they belong to other weights than the current ones.
    pub stale: Vec<String>,
    /// Files left out because they are damaged or cannot be read.
    pub damaged: Vec<TrainError>,
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
    pub validation_accuracy: Option<f64>,
    pub ema_test_accuracy: Option<f64>,
    pub swa_test_accuracy: Option<f64>,
    pub lr: f64,
    pub gradient_norm: Option<f64>,
    pub images_per_second: f64,
    pub seconds: f64,
    /// Whether the loss diverged in it.
    pub diverged: bool,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Outcome {
    /// All its epochs are done.
    Finished,
    /// So many of all its epochs or steps are done.
    Unfinished { done: u64, of: u64, unit: &'static str },
    /// The loss diverged in this epoch.
    Diverged(u64),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Finished => write!(f, "finished"),
            Self::Unfinished { done, of, unit } => write!(f, "unfinished, {done} of {}", counted(*of, unit)),
            Self::Diverged(epoch) => write!(f, "diverged in epoch {epoch}"),
        }
    }
}

impl LoadedRun {
    /// Reads a folder. Damaged results are left out and noted.
    ///
    /// # Errors
    /// A folder that does not exist or is not that of a run, settings that cannot be read, a log without a readable
    /// line.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let absent = |error: &std::io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
        let config = path.join("config.toml");
        match std::fs::metadata(&config) {
            Err(error) if absent(&error) => {
                std::fs::metadata(path).map_err(TrainError::io(path))?;
                return Err(TrainError::NoRun { path: path.into() });
            }
            found => found.map_err(TrainError::io(&config))?,
        };
        let mut settings = read_settings(&config)?;
        let images = settings.remove("images");

        let log = path.join("log.jsonl");
        let text = read_regular(&log, MOST_LINES)?;
        // A line that was cut off inside a character cannot be read, like any other incomplete line.
        let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
        let (mut records, mut unreadable) = (Vec::new(), 0);
        for line in lines {
            match Record::read(line) {
                Some(record) => records.push(record),
                None => unreadable += 1,
            }
        }
        if records.is_empty() {
            let reason = match unreadable {
                0 => "has no line yet: no epoch has ended",
                _ => "no line of the log can be read, so there is nothing to report",
            };
            return Err(TrainError::Results { path: log, reason: reason.into() });
        }
        let epochs = epochs(&records);
        let chip = records.iter().rev().find_map(|record| match record {
            Record::Epoch { device, .. } if !device.is_empty() => Some(plain(device)),
            _ => None,
        });
        let device = chip.unwrap_or_else(|| settings.get("device").map(written).unwrap_or_default());
        let date = std::fs::metadata(&log).and_then(|data| data.modified()).map(date).unwrap_or_default();
        let (curvature, landscapes) = (None, Vec::new());
        let (stale, damaged) = (Vec::new(), Vec::new());
        let path = path.into();
        let mut run = Self {
            path,
            settings,
            images,
            records,
            unreadable,
            date,
            epochs,
            device,
            curvature,
            landscapes,
            stale,
            damaged,
        };
        run.read_results();
        Ok(run)
    }

    /// What is compared of a setting: of the data set the images, where they are recorded, and not their place.
    fn compared(&self, key: &str) -> Option<&toml::Value> {
        match key {
            "data" => self.images.as_ref().or_else(|| self.settings.get(key)),
            key => self.settings.get(key),
        }
    }

    /// What the test images are known by: their checksum, or else where they lie.
    fn test_images(&self) -> String {
        let checksum = self.images.as_ref().and_then(|images| images.get("test")?.get("checksum")?.as_str());
        checksum.map_or_else(|| self.setting("data"), String::from)
    }

    /// Reads what other commands have written to the folder.
    fn read_results(&mut self) {
        let model = self.path.join("model.safetensors");
        let weights = model.is_file().then(|| checksum(&model)).transpose();
        let weights = weights.unwrap_or_else(|error| {
            self.damaged.push(error);
            None
        });
        // Results of other weights than the current ones are stale.
        let is_stale = |of: &Option<String>| of.is_some() && weights.is_some() && *of != weights;
        match read_curvature(&self.path.join("curvature.json")) {
            Ok(Some(measured)) if is_stale(&measured.weights) => self.stale.push("curvature.json".into()),
            Ok(measured) => self.curvature = measured,
            Err(error) => self.damaged.push(error),
        }
        let folders = landscape_folders(&self.path).unwrap_or_else(|error| {
            self.damaged.push(error);
            Vec::new()
        });
        for (name, folder) in folders {
            match LoadedLandscape::read(&folder) {
                Ok(landscape) if is_stale(&landscape.weights) => self.stale.push(plain(&name)),
                // A landscape without a finite loss cannot be drawn.
                Ok(landscape) if landscape.counts().0 > landscape.counts().1 => {
                    self.landscapes.push((plain(&name), landscape));
                }
                Ok(_) => {}
                Err(error) => self.damaged.push(error),
            }
        }
        self.stale.sort();
    }

    /// The epochs after which curvature was measured, with the findings. If an epoch was measured twice, the last
    /// counts.
    pub fn curvatures(&self) -> Vec<(u64, &Measures)> {
        let mut found: Vec<(u64, &Measures)> = Vec::new();
        for record in &self.records {
            let Record::Curvature { epoch, measures, .. } = record else { continue };
            while found.pop_if(|(earlier, _)| *earlier >= *epoch).is_some() {}
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
        (self.records.iter().map(Record::step).max().unwrap_or(0), self.records.iter().map(skipped).max().unwrap_or(0))
    }

    /// Whether it is finished, as far as the log and the settings tell.
    pub fn outcome(&self) -> Outcome {
        let last = self.epochs.last();
        // With `max-loss` inf a run goes on to its end without a finite loss.
        if let Some(last) = last.filter(|last| last.diverged || last.test_loss.is_none()) {
            return Outcome::Diverged(last.epoch);
        }
        let planned = |key: &str| u64::try_from(self.settings.get(key)?.as_integer()?).ok();
        let step = |record: &Record| matches!(record, Record::Epoch { .. }).then(|| record.step());
        let steps = || self.records.iter().filter_map(step).max().unwrap_or(0);
        // A run has one of the two.
        let parts = planned("epochs").map(|of| (last.map_or(0, |last| last.epoch), of, "epoch"));
        match parts.or_else(|| Some((steps(), planned("steps")?, "step"))) {
            Some((done, of, unit)) if done < of => Outcome::Unfinished { done, of, unit },
            _ => Outcome::Finished,
        }
    }

    /// The epochs that were finished: the weights after one in which the loss diverged are of no use.
    pub fn finished_epochs(&self) -> impl DoubleEndedIterator<Item = &Epoch> {
        self.epochs.iter().filter(|epoch| !epoch.diverged)
    }

    pub fn last_epoch(&self) -> Option<&Epoch> {
        self.finished_epochs().next_back()
    }

    /// The epoch with the highest test accuracy, the first of several.
    pub fn best_epoch(&self) -> Option<&Epoch> {
        let finite = self.finished_epochs().rev().filter(|epoch| epoch.test_accuracy.is_finite());
        finite.max_by(|a, b| a.test_accuracy.total_cmp(&b.test_accuracy))
    }

    /// The mean of the epochs' speeds, weighted by their durations.
    pub fn images_per_second(&self) -> Option<f64> {
        let mut before = 0.0;
        let (mut images, mut seconds) = (0.0, 0.0);
        for epoch in &self.epochs {
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

/// The lines of epochs. A later line for an epoch replaces it and those after it.
fn epochs(records: &[Record]) -> Vec<Epoch> {
    let mut epochs: Vec<Epoch> = Vec::new();
    for record in records {
        let &Record::Epoch {
            epoch,
            train_loss,
            test_loss,
            test_accuracy,
            validation_accuracy,
            ema_test_accuracy,
            swa_test_accuracy,
            lr,
            gradient_norm,
            images_per_second,
            seconds,
            diverged,
            ..
        } = record
        else {
            continue;
        };
        while epochs.pop_if(|earlier| earlier.epoch >= epoch).is_some() {}
        epochs.push(Epoch {
            epoch,
            train_loss,
            test_loss,
            test_accuracy,
            validation_accuracy,
            ema_test_accuracy,
            swa_test_accuracy,
            lr,
            gradient_norm,
            images_per_second,
            seconds,
            diverged,
        });
    }
    epochs
}

/// The folders of landscapes in that of a run, with their names, in the order of the names.
pub(super) fn landscape_folders(run: &Path) -> Result<Vec<(String, PathBuf)>, TrainError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(run).map_err(TrainError::io(run))? {
        let folder = entry.map_err(TrainError::io(run))?.path();
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Something else than a file in its place is refused when it is read.
        let has = |file: &str| folder.join(file).exists();
        if name.starts_with("landscape") && has("landscape.json") && has("landscape.csv") {
            found.push((name, folder));
        }
    }
    found.sort();
    Ok(found)
}

/// A time as date, hours and minutes, in UTC.
fn date(time: std::time::SystemTime) -> String {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, minutes) = (seconds / 86_400, seconds / 60 % 1440);
    // Years that begin in March, so that the leap day is the last; from the year 0, in cycles of 400 years.
    let day = days + 719_468;
    let (cycle, of_cycle) = (day / 146_097, day % 146_097);
    let year = (of_cycle - of_cycle / 1460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    format!("{}-{month:02}-{day:02} {:02}:{:02}", 400 * cycle + year, minutes / 60, minutes % 60)
}

pub(super) fn written(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => plain(text),
        other => plain(&other.to_string()),
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
    let Some(file) = CurvatureFile::read(path)? else { return Ok(None) };
    let unusable = |reason: String| TrainError::Results { path: path.into(), reason };
    let own_statistics = file.has_batch_statistics();
    let CurvatureFile { measures, samples, split, weights, .. } = file;
    let missing = || unusable("no `measures`: expected an object of findings by the names of measures".into());
    let measures = measures.ok_or_else(missing)?;
    let samples = samples.map(|samples| format!("{samples} "));
    let over = format!("over {}{} images", samples.unwrap_or_default(), plain(&split));
    let own_statistics = if own_statistics { ", batch norm with each batch's statistics" } else { "" };
    let over = over.replace("train ", "training ") + own_statistics;
    Ok(Some(Measured { measures, over, weights }))
}

/// The numbers of each measure in a report, by name: the largest eigenvalue, the two counts of extrema. A spectrum and
/// traces by layer have none.
pub(super) fn numbers(measures: &Measures) -> Vec<(String, Measurement)> {
    let mut found = Vec::new();
    for (name, finding) in measures {
        let mut add = |name: &str, number: Measurement| {
            // JSON has no numbers that are not finite.
            found.extend(number.value.is_finite().then(|| (plain(name), number)));
        };
        let estimated = |of: &Estimate| Measurement::new(of.value, of.standard_error);
        match finding {
            Finding::Mean(estimate, _) => add(name, estimated(estimate)),
            Finding::Eigenvalues { pairs, converged } => {
                let lanczos = name == "top-eigenvalues";
                let key = |value: f64| if lanczos { value } else { value.abs() };
                let finite = pairs.iter().filter(|(value, _)| value.is_finite());
                let largest = finite.max_by(|(a, _), (b, _)| key(*a).total_cmp(&key(*b)));
                let Some(&(value, residual)) = largest else { continue };
                let open = |number: Measurement| Measurement { converged: *converged, ..number };
                let name = if lanczos { "top eigenvalue" } else { "power eigenvalue" };
                add(name, open(Measurement::new(value, Some(residual))));
                if let Some(ratio) = Finding::first_over_fifth(pairs).filter(|_| lanczos) {
                    add("λ1/λ5", open(Measurement::new(ratio, None)));
                }
            }
            Finding::Rounded { value, rounding_error } => add(name, Measurement::new(*value, Some(*rounding_error))),
            Finding::Ratio { mean, .. } => add(name, estimated(mean)),
            Finding::Extrema { minima, maxima } => {
                add("minima", estimated(&minima.mean));
                add("maxima", estimated(&maxima.mean));
            }
            Finding::Rise { rise, .. } => {
                add(name, Measurement::new(rise.largest, None));
                add("sharpness, one step", Measurement::new(rise.one_step, None));
            }
            _ => add(name, Measurement::new(finding.value().unwrap_or(f64::NAN), None)),
        }
    }
    found
}

/// The traces of layers, in the order of the file.
pub(super) fn layer_traces(measures: &Measures) -> Vec<(String, Measurement)> {
    let Some(Finding::Layers(layers)) = measures.get("layer-traces") else { return Vec::new() };
    let traces = layers.iter().map(|(name, of)| (plain(name), Measurement::new(of.value, of.standard_error)));
    traces.filter(|(_, trace)| trace.value.is_finite()).collect()
}

/// The peaks of a spectrum and their weights.
pub(super) fn spectrum(measures: &Measures) -> Option<&Density> {
    match measures.get("spectrum") {
        Some(Finding::Density(density)) => Some(density),
        _ => None,
    }
}

/// Runs that differ only in the seed.
pub(super) struct Group {
    /// The settings in which it differs from the other groups.
    pub name: String,
    pub runs: Vec<LoadedRun>,
}

impl Group {
    /// The runs whose results count: those that are finished, or else those that are not, or else those that diverged.
    /// A mean over runs of different lengths would be of no method.
    pub fn that_count(&self) -> impl Iterator<Item = &LoadedRun> {
        let rank = |run: &LoadedRun| match run.outcome() {
            Outcome::Finished => 0,
            Outcome::Unfinished { .. } => 1,
            Outcome::Diverged(_) => 2,
        };
        let best = self.runs.iter().map(rank).min();
        self.runs.iter().filter(move |run| Some(rank(run)) == best)
    }

    /// Whether any run is finished.
    pub fn is_finished(&self) -> bool {
        self.runs.iter().any(|run| run.outcome() == Outcome::Finished)
    }

    /// A number of each run's last epoch; NaN if it was not finite.
    pub fn last(&self, number: impl Fn(&Epoch) -> f64) -> RunStatistics {
        RunStatistics::of(self.that_count().filter_map(|run| run.last_epoch().map(&number)).collect())
    }

    pub fn test_accuracy(&self) -> RunStatistics {
        self.last(|epoch| epoch.test_accuracy)
    }

    /// Of the weights averaged over epochs, of the runs that have them.
    pub fn swa_test_accuracy(&self) -> RunStatistics {
        RunStatistics::of(self.that_count().filter_map(|run| run.last_epoch()?.swa_test_accuracy).collect())
    }

    pub fn test_loss(&self) -> RunStatistics {
        self.last(|epoch| epoch.test_loss.unwrap_or(f64::NAN))
    }

    pub fn seconds(&self) -> RunStatistics {
        self.last(|epoch| epoch.seconds)
    }

    pub fn images_per_second(&self) -> RunStatistics {
        RunStatistics::of(self.that_count().filter_map(LoadedRun::images_per_second).collect())
    }

    /// The numbers of the curvature at the end, by name, in the order of their occurrence.
    pub fn curvature(&self) -> Vec<(String, MeasuredStatistics)> {
        let measured = self.that_count().filter_map(LoadedRun::final_curvature);
        by_name(measured.flat_map(|measured| numbers(&measured.measures)))
    }

    /// The traces of layers at the end.
    pub fn layer_traces(&self) -> Vec<(String, MeasuredStatistics)> {
        let measured = self.that_count().filter_map(LoadedRun::final_curvature);
        by_name(measured.flat_map(|measured| layer_traces(&measured.measures)))
    }

    /// How many random lines had 0, 1, 2, … minima, and how many had so many maxima, over all runs at the end. Empty
    /// where it was not measured.
    pub fn extrema(&self) -> [Vec<usize>; 2] {
        let mut sums = [Vec::new(), Vec::new()];
        for measured in self.that_count().filter_map(LoadedRun::final_curvature) {
            let Some(Finding::Extrema { minima, maxima }) = measured.measures.get("extrema") else { continue };
            for (sum, found) in sums.iter_mut().zip([minima, maxima]) {
                sum.resize(sum.len().max(found.histogram.len()), 0);
                sum.iter_mut().zip(&found.histogram).for_each(|(sum, lines)| *sum += lines);
            }
        }
        sums
    }

    /// The spectrum of the first run that has one: its last measurement.
    pub fn spectrum(&self) -> Option<&Density> {
        fn of(run: &LoadedRun) -> Option<&Density> {
            let logged = || run.curvatures().into_iter().filter_map(|(_, measures)| spectrum(measures)).next_back();
            run.curvature.as_ref().and_then(|measured| spectrum(&measured.measures)).or_else(logged)
        }
        self.that_count().find_map(of)
    }
}

/// The numbers of each name, in the order in which the names occur.
fn by_name(numbers: impl Iterator<Item = (String, Measurement)>) -> Vec<(String, MeasuredStatistics)> {
    let (mut found, mut places) = (Vec::<(String, Vec<Measurement>)>::new(), HashMap::new());
    for (name, number) in numbers {
        let place = *places.entry(name.clone()).or_insert(found.len());
        if place == found.len() {
            found.push((name, Vec::new()));
        }
        found[place].1.push(number);
    }
    found.into_iter().map(|(name, numbers)| (name, MeasuredStatistics::of(&numbers))).collect()
}

/// Whether the results of groups can be compared: all have the same test images.
pub(super) fn are_comparable(groups: &[Group]) -> bool {
    let mut images = groups.iter().flat_map(|group| &group.runs).map(LoadedRun::test_images);
    let first = images.next();
    images.all(|other| first.as_ref() == Some(&other))
}

/// Whether two runs of a group have the same seed, so that their interval says nothing.
pub(super) fn has_repeated_seeds(group: &Group) -> bool {
    let seeds: HashSet<String> = group.runs.iter().map(|run| run.setting("seed")).collect();
    seeds.len() < group.runs.len()
}

/// Whether a setting can change a result. The others say what is looked at, and where and how long the run works.
fn matters(key: &str) -> bool {
    let aside = ["seed", "threads", "device", "log-every", "max-loss"];
    !aside.contains(&key) && !key.starts_with("curvature-")
}

/// Groups runs that differ only in the seed and in what they measured, in the order in which they were given.
pub(super) fn group(runs: Vec<LoadedRun>) -> Vec<Group> {
    let (mut groups, mut places) = (Vec::<Group>::new(), HashMap::new());
    for run in runs {
        let keys = run.settings.keys().filter(|key| matters(key));
        let settings: Vec<String> = keys.map(|key| format!("{key} = {:?}", run.compared(key))).collect();
        let place = *places.entry(settings).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Group { name: String::new(), runs: Vec::new() });
        }
        groups[place].runs.push(run);
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
    keys.retain(|&key| matters(key) && firsts.iter().any(|run| run.compared(key) != firsts[0].compared(key)));
    keys.sort_by_key(|&key| key != "optimizer");
    keys.into_iter().cloned().collect()
}

/// The name of each group: the optimizer, and as many settings as are needed to distinguish them.
fn names(groups: &[Group]) -> Vec<String> {
    let firsts: Vec<&LoadedRun> = groups.iter().filter_map(|group| group.runs.first()).collect();
    let part = |run: &LoadedRun, key: &str| match run.settings.get(key) {
        None => String::new(),
        Some(toml::Value::Boolean(true)) => format!(", {}", plain(key)),
        Some(toml::Value::Boolean(false)) => String::new(),
        // The last part of a path is enough.
        Some(toml::Value::String(text)) if ["data", "init", "bootstrap"].contains(&key) => {
            let end = Path::new(text).file_name().map(|name| name.to_string_lossy().into_owned());
            format!(", {}", plain(&end.unwrap_or_else(|| text.clone())))
        }
        Some(value) => format!(", {} {}", plain(key), written(value)),
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let of = |seconds| date(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(of(0), "1970-01-01 00:00");
        assert_eq!(of(951_782_399), "2000-02-28 23:59");
        assert_eq!(of(951_782_400), "2000-02-29 00:00");
        assert_eq!(of(1_709_251_200), "2024-03-01 00:00");
        assert_eq!(of(4_107_542_399), "2100-02-28 23:59");
        assert_eq!(of(4_107_542_400), "2100-03-01 00:00");
    }
}
