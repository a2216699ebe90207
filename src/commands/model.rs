//! The options that eval, curvature and landscape share: trained weights, and images to evaluate them on.

use std::path::{Path, PathBuf};

use polder::arena::Layout;
use polder::data::{Images, LoadOptions, Split, SplitImages, StatisticsSource};
use polder::device::{Buffer, Device};
use polder::kernels::image::Normalization;
use polder::nn::Model;
use polder::plan::{Graph, PlanError, Shape, Value};
use polder::settings;
use polder::settings::{OptionType, Setting, SettingValue};
use polder::train::{
    self, BatchNormName, CurvatureMeter, DataSettings, ModelName, Options, RunImages, RunOption, TrainError, options,
    weights,
};

use super::flags::{FlagList, Flags};
use super::{Bar, counted, moved_images, option, tell};

settings! {
    /// Trained weights, and how to pass images through the network.
    pub struct WeightsSettings {
        /// Folder of a run. It supplies the model, weights, data, normalisation and labels that are not given
        run: Option<String> = None, as "DIR";
        /// The network
        model: Option<ModelName> = None, else "the run's", as "NAME";
        /// The weights
        init: Option<String> = None, else "the run's", as "FILE.safetensors";
        /// Take the weights of the epoch that was best on the run's validation images, not the last ones
        best: bool = false;
        /// Images per pass
        batch_size: usize = CurvatureMeter::USUAL_PART, in at_least(1);
    }
}

settings! {
    /// The images over which a loss is measured, and its batch norm.
    pub struct MeasureSettings {
        /// Which images
        split: Split = Split::Train;
        /// The first N images
        samples: Option<usize> = None, else "1000, for the approximation ratio 5000, or as many as there are",
            in at_least(1);
        /// Statistics that batch norm uses
        bn: BatchNormName = BatchNormName::Eval, as "MODE";
    }
}

/// The options of a run that also describe the images to evaluate, and the device.
pub struct OfImages;

impl OfImages {
    /// With what holds where they are not given, where this differs from a run.
    const NAMES: [(&str, &str); 9] = [
        ("data", "the run's, or synthetic"),
        ("image-size", "the run's, if data is the run's, or that of the pictures"),
        ("image-memory", ""),
        ("classes", "the run's, or those of the data set"),
        ("shortcut", "the run's, or the model's first"),
        ("mean", "the run's, or the data set's published values"),
        ("std", "the run's, or the data set's published values"),
        ("device", ""),
        ("threads", ""),
    ];
}

impl FlagList for OfImages {
    fn list() -> Vec<RunOption> {
        let of_this = |mut setting: Setting| {
            let (_, otherwise) = Self::NAMES.iter().find(|(name, _)| *name == setting.name)?;
            if !otherwise.is_empty() {
                (setting.default, setting.otherwise) = (|| SettingValue::Absent, otherwise);
            }
            Some(RunOption::general(setting, ""))
        };
        options().into_iter().filter_map(|option| of_this(option.setting)).collect()
    }
}

/// What an evaluation takes from the settings of a run. It needs no others, so that runs of methods that have no name
/// here can be evaluated.
const OF_RUN: [&str; 13] = [
    "model",
    "shortcut",
    "data",
    "image-size",
    "train-size",
    "validation",
    "label-noise",
    "label-noise-kind",
    "bootstrap",
    "classes",
    "mean",
    "std",
    "seed",
];

#[derive(clap::Args)]
pub struct ModelArgs {
    #[command(flatten)]
    weights: Flags<WeightsSettings>,
    #[command(flatten)]
    images: Flags<OfImages>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How many images of a split.
pub enum Samples {
    First(usize),
    /// The first ones, at most so many; with a batch's own statistics in whole batches.
    Usual {
        most: usize,
        bn: BatchNormName,
    },
    All,
}

/// Everything that [`ModelArgs`] name, opened.
pub struct Subject {
    model: Model,
    /// The model's name and its shortcut, as given.
    pub model_name: String,
    pub device: Device,
    /// Run, model and data in one line, for titles.
    pub title: String,
    /// The data set's name.
    pub name: String,
    /// Its path, or `synthetic`.
    pub data: String,
    pub images: Images,
    pub normalization: Normalization,
    /// The file of the weights.
    pub init: PathBuf,
    /// Images per pass, at most as many as there are.
    pub batch_size: usize,
}

impl ModelArgs {
    /// The folder of the run, if one was given.
    pub fn run(&self) -> Result<Option<PathBuf>, TrainError> {
        Ok(self.weights.settings()?.run.map(PathBuf::from))
    }

    /// Whether a place of images was given.
    pub fn has_data(&self) -> bool {
        self.images.given.has("data")
    }

    /// Whether a model was given.
    pub fn has_model(&self) -> Result<bool, TrainError> {
        Ok(self.weights.settings()?.model.is_some())
    }

    /// Opens everything. For the training images of a run, only those that it was trained on, with its labels.
    pub fn open(&self, split: Split, samples: Samples) -> Result<Subject, TrainError> {
        let bar = Bar::new();
        let mut watch = |done, of| {
            bar.show("reading pictures", done, of);
            true
        };
        self.open_images(split, samples, false, |data, options| train::open_split(data, split, options, &mut watch))
    }

    /// Opens everything, with images that `read` takes from the data path. If `others` are expected, nothing is said
    /// where they are not those of the run.
    pub fn open_images(
        &self,
        split: Split,
        samples: Samples,
        others: bool,
        read: impl FnOnce(&str, &LoadOptions) -> Result<SplitImages, TrainError>,
    ) -> Result<Subject, TrainError> {
        let WeightsSettings { run: folder, model, init, best, batch_size } = self.weights.settings()?;
        let folder = folder.map(PathBuf::from);
        if model.is_none() && folder.is_none() {
            return Err(missing("run"));
        }
        if folder.as_ref().is_some_and(|folder| folder.as_os_str().is_empty()) {
            return Err(option("run", "empty, expected a folder"));
        }
        let init = weights_file(init, folder.as_deref(), best)?;
        let mut given = self.images.given.clone();
        let of_run = match &folder {
            Some(folder) => Options::some_of_run(folder, if model.is_some() { &OF_RUN[2..] } else { &OF_RUN })?,
            None => Options::default(),
        };
        if let Some(model) = model {
            given.set("model", model.to_value());
        }
        let record = folder.as_deref().map(RunImages::of_run).transpose()?.flatten();
        let of_record = |images: &RunImages| {
            let numbers =
                |values: &[f32]| SettingValue::Numbers(values.iter().map(|value| f64::from(*value)).collect());
            let classes = SettingValue::Count(images.classes as u64);
            [("classes", classes), ("mean", numbers(&images.mean)), ("std", numbers(&images.std))]
        };
        let record_options = record.iter().flat_map(of_record).map(|(name, value)| (name.to_string(), value));
        let of_run = record_options.collect::<Options>().over(of_run);
        let file = folder.as_ref().map(|folder| folder.join("config.toml"));
        let settings = given.clone().over(of_run).resolve();
        let settings = settings.map_err(|error| error.of_file(&given, file.as_deref()))?;
        let model = settings.model()?;
        let model_name = match (settings.model.model.name(), settings.model.shortcut) {
            (model, Some(shortcut)) => format!("{model}, shortcut {shortcut}"),
            (model, None) => model.into(),
        };
        let device = train::open_device(&settings.run.device, settings.run.threads)?;
        let mut options = settings.data.load_options();
        let DataSettings { data, classes, mean, std, .. } = settings.data.clone();
        let of_run = record.is_some() && !given.has("data");
        // Other images need not be pictures, which alone are resized.
        options.image_size = options.image_size.filter(|_| given.has("image-size") || !given.has("data"));
        options.without_statistics = mean.is_some() && std.is_some();
        let opened = read(&data, &options).map_err(|error| if of_run { moved_images(error) } else { error });
        let SplitImages { name, mut images, mean: of_data_mean, std: of_data_std, statistics } = opened?;
        if let Some(channels) = record.as_ref().map(|record| record.shape[2])
            && channels != images.shape.channels
        {
            let reason = format!(
                "{data} has images of {}, the run's had {channels}",
                counted(images.shape.channels as u64, "channel")
            );
            return Err(option("data", reason));
        }
        // What a run does to its images does not apply to others.
        let of_the_run = record.as_ref().map_or(!given.has("data"), |record| record.has(split, &images));
        if record.is_some() && !of_the_run && !others {
            let own = given.has("mean") && given.has("std");
            let how = if own { "" } else { "; they are normalised as those were" };
            tell(&format!("{data}: not the {split} images of the run{how}"));
        }
        if let Some(classes) = classes {
            images.classes = classes;
            let blamed = if given.has("classes") { "classes" } else { "data" };
            images.check().map_err(|error| option(blamed, error))?;
        }
        if split == Split::Train && of_the_run {
            (images, _) = train::training_images(images, (&name, statistics), &settings)?;
            if let (Some(run), Some(_)) = (&folder, &settings.data.bootstrap) {
                images = train::bootstrapped(run, images)?;
            }
        }
        let images = match samples {
            Samples::First(n) => images.take(n).map_err(|error| option("samples", error))?,
            Samples::Usual { most, bn } => {
                let usual = most.min(images.len());
                let part = if bn == BatchNormName::Train { batch_size.min(usual) } else { 1 };
                images.take(usual / part * part)?
            }
            Samples::All => images,
        };
        let missing = [("mean", &mean), ("std", &std)].into_iter().find(|(_, given)| given.is_none());
        if let (Some((name, _)), StatisticsSource::Unknown) = (missing, statistics) {
            let reason = format!("missing: {data} has no training images to compute it from; give --mean and --std");
            return Err(option(name, reason));
        }
        let of_data = (&*of_data_mean, &*of_data_std);
        let normalization = train::normalization(mean.as_deref(), std.as_deref(), of_data, images.shape.channels)?;
        let batch_size = batch_size.min(images.len());
        let of = folder.as_deref().map_or_else(|| short(&init), run_name);
        let title = format!("{of} · {model_name} · {name}");
        Ok(Subject { model, model_name, device, title, name, data, images, normalization, init, batch_size })
    }
}

/// A path shortened to folder and name, which distinguish runs.
pub fn short(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(2).collect();
    parts.into_iter().rev().collect::<PathBuf>().display().to_string()
}

/// The name of a run's folder, also if it is given as `.`.
fn run_name(folder: &Path) -> String {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.into());
    whole.file_name().map_or_else(|| short(folder), |name| name.to_string_lossy().into_owned())
}

/// The error of a command that was given no weights.
pub fn missing(name: &str) -> TrainError {
    option(name, "missing; give --run DIR, or both --model and --init")
}

/// The file of the weights: the one that is given, or else that of the run.
fn weights_file(init: Option<String>, run: Option<&Path>, best: bool) -> Result<PathBuf, TrainError> {
    match (init, run) {
        (Some(_), _) if best => Err(option("best", "the weights are given by --init")),
        (Some(init), _) if init.is_empty() => Err(option("init", "empty, expected a file")),
        (Some(init), _) => Ok(init.into()),
        (None, Some(run)) if best => {
            let weights = run.join("best.safetensors");
            if !weights.exists() && run.join("config.toml").exists() {
                let reason = "the run has no best epoch: it was trained without --validation, or no epoch has ended";
                return Err(TrainError::Results { path: run.into(), reason: reason.into() });
            }
            Ok(weights)
        }
        (None, Some(run)) => {
            let weights = run.join("model.safetensors");
            if !weights.exists() && run.join("config.toml").exists() {
                let reason = "the run has saved no weights: it ended before its first epoch did, or it diverged";
                return Err(TrainError::Results { path: run.into(), reason: reason.into() });
            }
            Ok(weights)
        }
        (None, None) => Err(missing("init")),
    }
}

impl Subject {
    /// The network, traced for images of any shape.
    pub fn network(&self) -> impl Fn(Shape, usize) -> Result<(Graph, Value), PlanError> {
        let model = self.model;
        move |images, classes| model.trace(images, classes)
    }

    /// Blames the weights file where nothing could be computed because something is not finite.
    pub fn weights_error(&self, message: String) -> TrainError {
        TrainError::Weights { path: self.init.clone(), reason: message }
    }

    /// Loads parameters and running statistics from a file, for a plan of the model with these layouts.
    pub fn load(&self, file: &Path, layouts: [&Layout; 2]) -> Result<[Buffer<f32>; 2], TrainError> {
        let [parameters, statistics] = weights::load(file, layouts)?;
        Ok([self.device.upload(&parameters)?, self.device.upload(&statistics)?])
    }
}
