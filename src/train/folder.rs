//! The folder of a run: `config.toml`, `log.jsonl`, `model.safetensors`, `checkpoint/`, with validation images
//! `best.safetensors`, and with averages `ema.safetensors` and `swa.safetensors`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::bootstrap;
use super::checkpoint::{self, Checkpoint};
use super::files::read_regular;
use super::log::Log;
use super::options::file_of_run;
use super::settings::continues;
use super::{Held, MOST_SETTINGS, Options, TrainError, hold, read_text, toml_error, write_whole};
use crate::data::{Dataset, Images, Split};
use crate::kernels::image::Normalization;

/// The files of a run. Each of them shows that the folder holds a run or a partial run.
const FILES: [&str; 8] = [
    "config.toml",
    "log.jsonl",
    "model.safetensors",
    "best.safetensors",
    "ema.safetensors",
    "swa.safetensors",
    bootstrap::FILE,
    "checkpoint",
];

/// The images that a run was trained on, and how it normalised them: the section `[images]` of `config.toml`. With it
/// a run's images are known wherever they lie, and its weights can be used where they do not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunImages {
    /// Height, width and channels of an image.
    pub shape: [usize; 3],
    /// Number of classes.
    pub classes: usize,
    /// Mean of pixel/255 per channel, which is subtracted.
    pub mean: Vec<f32>,
    /// Standard deviation of pixel/255 per channel, by which is divided.
    pub std: Vec<f32>,
    /// All training images, before `train-size`, `validation`, `label-noise` and `bootstrap`.
    pub train: RunSplit,
    /// The test images.
    pub test: RunSplit,
    /// With `bootstrap`, the training images of the run with their new labels.
    #[serde(default)]
    pub bootstrap: Option<RunSplit>,
}

/// The images of one split of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSplit {
    /// How many.
    pub count: usize,
    /// [`Images::checksum`].
    pub checksum: String,
}

/// `config.toml`, as far as it is about images.
#[derive(Serialize, Deserialize)]
struct ImagesSection {
    images: Option<RunImages>,
}

impl RunSplit {
    pub(super) fn of(images: &Images) -> Self {
        Self { count: images.len(), checksum: images.checksum() }
    }
}

impl RunImages {
    /// The record of a data set.
    pub(super) fn of(dataset: &Dataset, normalization: &Normalization) -> Self {
        let Dataset { train, test, .. } = dataset;
        let (shape, channels) = (train.shape, train.shape.channels);
        Self {
            shape: [shape.height, shape.width, channels],
            classes: train.classes,
            mean: normalization.mean[..channels].into(),
            std: normalization.std[..channels].into(),
            train: RunSplit::of(train),
            test: RunSplit::of(test),
            bootstrap: None,
        }
    }

    /// The record of the run in a folder; none in a run that has none.
    ///
    /// # Errors
    /// [`TrainError::NoRun`]; the file.
    pub fn of_run(run: &Path) -> Result<Option<Self>, TrainError> {
        let path = file_of_run(run)?;
        let text = read_text(&path, MOST_SETTINGS)?;
        let section: Result<ImagesSection, _> = toml::from_str(&text);
        let section = section.map_err(|error| TrainError::Settings { reason: toml_error(&text, &error), path })?;
        Ok(section.images)
    }

    /// Whether these are all images of a split, with their labels.
    pub fn has(&self, split: Split, images: &Images) -> bool {
        let recorded = if split == Split::Train { &self.train } else { &self.test };
        recorded.count == images.len() && recorded.checksum == images.checksum()
    }

    /// As a section of `config.toml`.
    fn to_toml(&self) -> String {
        // A value in f32 is written with the digits that it has, not with those of its f64.
        let list = |values: &[f32]| values.iter().map(|value| format!("{value:?}")).collect::<Vec<_>>().join(", ");
        let split = |split: &RunSplit| format!("{{ count = {}, checksum = \"{}\" }}", split.count, split.checksum);
        let Self { shape, classes, mean, std, train, test, bootstrap } = self;
        let labels = bootstrap.as_ref().map(|own| format!("bootstrap = {}\n", split(own))).unwrap_or_default();
        format!(
            "\n[images]\nshape = {shape:?}\nclasses = {classes}\nmean = [{}]\nstd = [{}]\ntrain = {}\ntest = {}\n{labels}",
            list(mean),
            list(std),
            split(train),
            split(test)
        )
    }

    /// How these images differ from those that a run began with; none where they are the same.
    fn difference(&self, before: &Self) -> Option<String> {
        let counts = [(&before.train, &self.train, "training"), (&before.test, &self.test, "test")];
        if let Some((before, now, name)) = counts.iter().find(|(before, now, _)| before.count != now.count) {
            return Some(format!("{} {name} images instead of {}", now.count, before.count));
        }
        if self.shape != before.shape {
            return Some(format!("images of {:?} (rows, columns, channels) instead of {:?}", self.shape, before.shape));
        }
        if self.classes != before.classes {
            return Some(format!("{} classes instead of {}", self.classes, before.classes));
        }
        let changed = counts.iter().find(|(before, now, _)| before.checksum != now.checksum);
        if let Some((_, _, name)) = changed {
            return Some(format!("other {name} images or labels (their checksum differs)"));
        }
        (self.bootstrap != before.bootstrap).then(|| "other labels by the bootstrap (their checksum differs)".into())
    }
}

/// What a run was set to, as its files hold it.
pub(super) struct Config {
    /// `config.toml`.
    pub text: String,
    /// The record in it.
    images: RunImages,
    /// Whether network, data and method are all known by name, so that the settings can be read from the text.
    pub by_name: bool,
}

impl Config {
    /// From the settings as TOML, and the images.
    pub fn new(settings: &str, images: RunImages, by_name: bool) -> Self {
        Self { text: settings.to_string() + &images.to_toml(), images, by_name }
    }

    /// The settings that the checkpoint was saved with, as a table, with the defaults of options that came later.
    fn before(&self, saved: &str) -> Result<toml::Table, TrainError> {
        let damaged = |reason: String| TrainError::setting("settings", reason);
        let text = if self.by_name {
            let mine = Options::from_toml(&self.text).map_err(damaged)?;
            let mut theirs = Options::from_toml(saved).map_err(damaged)?;
            // The file may have been moved. Images are compared by themselves.
            theirs.copy("init", &mine);
            theirs.copy("reset-head", &mine);
            theirs.copy("bootstrap", &mine);
            theirs.resolve()?.to_toml()?
        } else {
            saved.into()
        };
        toml::from_str(&text).map_err(|error| damaged(error.message().replace('\n', "; ")))
    }
}

/// Fails where the images are not those that the run in this folder began with, wherever they lie.
///
/// # Errors
/// [`TrainError::Setting`] for `data`; those of the file of settings.
pub(super) fn check_images(run: &Path, config: &Config) -> Result<(), TrainError> {
    let before = match RunImages::of_run(run) {
        Err(TrainError::NoRun { .. }) => None,
        found => found?,
    };
    match before.and_then(|before| config.images.difference(&before)) {
        Some(difference) => Err(TrainError::setting("data", format!("not the images of the run: {difference}"))),
        None => Ok(()),
    }
}

/// The checkpoint of a run that is resumed. None for a run that was stopped before its first: it starts again.
pub(super) fn saved(run: &Path, config: &Config) -> Result<Option<Checkpoint>, TrainError> {
    let path = checkpoint::path(run);
    let Some(saved) = Checkpoint::load(run)? else {
        if !run.join("model.safetensors").exists() {
            return Ok(None);
        }
        let reason = "is missing: the run has weights, but cannot be resumed without its checkpoint".into();
        return Err(TrainError::Weights { path, reason });
    };
    let damaged = |error: TrainError| TrainError::Weights { path: path.clone(), reason: format!("damaged: {error}") };
    let before = config.before(&saved.settings).map_err(damaged)?;
    let now: toml::Table = toml::from_str(&config.text)
        .map_err(|error| TrainError::Settings { path: run.join("config.toml"), reason: error.message().into() })?;
    if let Some(name) = continues(&now, &before) {
        let reason = format!("`{name}` differs from the checkpoint");
        return Err(TrainError::Settings { path: run.join("config.toml"), reason });
    }
    Ok(Some(saved))
}

/// Prepares the folder of a run that has done `step` of `steps` steps, and opens its log. A run that is resumed is held
/// already; any other must begin in a folder without a run.
pub(super) fn open(
    run: &Path,
    config: &Config,
    resumed: Option<Held>,
    (step, steps): (u64, u64),
) -> Result<Log, TrainError> {
    let path = run.join("config.toml");
    let resume = resumed.is_some();
    // What the folder holds is looked at while no other process can write to it.
    let held = resumed.map_or_else(|| hold(run), Ok)?;
    if !resume && FILES.iter().any(|name| run.join(name).exists()) {
        return Err(TrainError::RunExists { path: run.into() });
    }
    // The weights are written after the last epoch. What is in their way should not be found so late.
    if let Some(name) = FILES[..7].iter().find(|name| run.join(name).is_dir()) {
        let reason = "a folder, where the run needs a file".into();
        return Err(TrainError::Occupied { path: run.join(name), reason });
    }
    let text = config.text.as_bytes();
    // A run that is resumed unchanged, or that is already longer, keeps its settings file.
    if step <= steps && read_regular(&path, MOST_SETTINGS).map_or(true, |found| found != text) {
        write_whole(&path, text)?;
    }
    Log::open(&run.join("log.jsonl"), step, held)
}
