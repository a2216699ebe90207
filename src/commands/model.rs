//! The options that eval, curvature and landscape share: trained weights, and images to evaluate them on.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use polder::data::{Images, Split, SplitImages};
use polder::device::{Buffer, Device};
use polder::kernels::batch_norm::Mode;
use polder::kernels::image::Normalization;
use polder::nn::{Model, Shortcut};
use polder::plan::{Graph, Plan, PlanError, Shape, Value};
use polder::train::{self, CurvatureMeter, DataSettings, ModelName, Options, TrainError, weights};

use super::flags::{self, choice};
use super::option;

#[derive(Clone, Copy, ValueEnum)]
pub enum SplitName {
    Train,
    Test,
}

impl SplitName {
    pub fn split(self) -> Split {
        match self {
            SplitName::Train => Split::Train,
            SplitName::Test => Split::Test,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum BatchNormName {
    /// Running statistics
    Eval,
    /// Each batch's statistics
    Train,
}

impl BatchNormName {
    pub fn mode(self) -> Mode {
        match self {
            BatchNormName::Eval => Mode::Eval,
            BatchNormName::Train => Mode::Train,
        }
    }
}

#[derive(clap::Args)]
pub struct ModelArgs {
    /// The folder of a run, which gives model, weights, data, normalisation and labels where they are not given
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// The network
    #[arg(long, value_name = "NAME", value_parser = flags::model(), required_unless_present = "run")]
    model: Option<ModelName>,
    /// The weights
    #[arg(long, value_name = "FILE.safetensors", required_unless_present = "run")]
    init: Option<PathBuf>,
    /// A folder with CIFAR-10/100 (binary) or IDX files, or `synthetic` [default: synthetic]
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// Shortcuts of a CIFAR ResNet where its shape changes [default: a]
    #[arg(long, value_parser = choice::<Shortcut>(), value_name = "KIND")]
    shortcut: Option<Shortcut>,
    /// Mean of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', allow_hyphen_values = true)]
    mean: Option<Vec<f32>>,
    /// Standard deviation of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', allow_hyphen_values = true)]
    std: Option<Vec<f32>>,
    /// Images per pass
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub batch_size: usize,
    /// auto, cpu or cuda:N
    #[arg(long, value_name = "NAME", default_value = "auto")]
    device: String,
    /// CPU threads; 0 takes one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How many images of a split.
pub enum Samples {
    First(usize),
    /// The first 1,000 in whole batches, or as many as there are.
    Usual,
    All,
}

/// Everything that [`ModelArgs`] name, opened.
pub struct Subject {
    model: Model,
    /// The model's name and its shortcut, as given.
    pub model_name: String,
    pub device: Device,
    /// The data set's name.
    pub name: String,
    /// Its path, or `synthetic`.
    pub data: String,
    pub images: Images,
    pub normalization: Normalization,
    /// The file of the weights.
    pub init: PathBuf,
}

impl ModelArgs {
    /// Opens everything. For the training images of a run, only those that it was trained on, with its labels.
    pub fn open(&self, split: Split, samples: Samples) -> Result<Subject, TrainError> {
        let run = match &self.run {
            None => None,
            Some(run) => Some(Options::of_run(run)?.resolve()?),
        };
        let mut settings = run.clone().unwrap_or_default();
        let shortcut = self.shortcut.or(settings.model.shortcut.filter(|_| self.model.is_none()));
        settings.model.model = self.model.unwrap_or(settings.model.model);
        settings.model.shortcut = shortcut;
        let model = settings.model()?;
        let model_name = match (settings.model.model.name(), shortcut) {
            (model, Some(shortcut)) => format!("{model}, shortcut {shortcut}"),
            (model, None) => model.into(),
        };
        let folder = self.run.as_deref().unwrap_or(Path::new(""));
        let init = self.init.clone().unwrap_or_else(|| folder.join("model.safetensors"));
        if self.batch_size == 0 {
            return Err(option("batch-size", "0, expected at least 1"));
        }
        let device = train::open_device(&self.device, self.threads)?;
        let run = run.map(|run| (run.data, run.run.seed));
        let of_run = run.as_ref().map(|(run, _)| run.data.clone());
        let data = self.data.clone().or(of_run).unwrap_or_else(|| DataSettings::default().data);
        let SplitImages { name, mut images, mean, std, .. } = train::open_split(&data, split)?;
        // What a run does to its training images does not apply to other images.
        let run = run.filter(|(run, _)| {
            run.data == data || std::path::absolute(&data).is_ok_and(|path| path.as_os_str() == run.data.as_str())
        });
        if let (Split::Train, Some((run, seed))) = (split, &run) {
            if let Some(n) = run.train_size {
                images = images.take(n)?;
            }
            if let Some(fraction) = run.label_noise {
                images = images.with_label_noise(fraction, *seed)?;
            }
        }
        let images = match samples {
            Samples::First(n) => images.take(n).map_err(|error| option("samples", error))?,
            Samples::Usual => {
                let usual = CurvatureMeter::usual_samples(images.len(), self.batch_size.min(images.len()));
                images.take(usual)?
            }
            Samples::All => images,
        };
        let channels = images.shape.channels;
        let (of_run_mean, of_run_std) = run.map_or((None, None), |(run, _)| (run.mean, run.std));
        let (wanted_mean, wanted_std) = (self.mean.clone().or(of_run_mean), self.std.clone().or(of_run_std));
        let wanted = (wanted_mean.as_deref(), wanted_std.as_deref());
        let normalization = train::normalization(wanted.0, wanted.1, (&mean, &std), channels)?;
        Ok(Subject { model, model_name, device, name, data, images, normalization, init })
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

    /// Loads parameters and running statistics from a file, for a plan of the model.
    pub fn load(&self, file: &Path, plan: &Plan<f32>) -> Result<[Buffer<f32>; 2], TrainError> {
        let [parameters, statistics] = weights::load(file, [plan.parameters(), plan.statistics_layout()])?;
        Ok([self.device.upload(&parameters)?, self.device.upload(&statistics)?])
    }
}
