//! The settings of a run, with help, defaults and ranges: the keys of `config.toml`.
//!
//! General options are declared here, those of a method in its file in [`crate::optim`], those of a base optimizer in
//! [`SgdSettings`], [`AdamWSettings`] and [`MuonSettings`]. [`options`](super::options()) lists all of them, and the
//! command line, `--help`, checks, `config.toml` and the table in `docs/methods.md` are made from that list.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use super::listing::{find_option, of_bases};
use super::options::{Options, to_json, to_toml};
use super::{BatchNormName, CurvatureSettings, TrainError};
use crate::arena::Layout;
use crate::data::{LoadOptions, Split};
use crate::device::HostOptions;
use crate::kernels::augment::{self, Jitter, Policy};
use crate::kernels::image::Augment;
use crate::kernels::mixing::Mixing;
use crate::nn::{MODELS, Model, Shortcut};
use crate::optim::{self, Base, Context, Decay, Ending, Entry, METHODS, Method, RhoSchedule};
use crate::settings::{
    Choice, Configurable, OptionType, Setting, SettingError, SettingKind, SettingValue, UnknownWord, Word, applies,
    number,
};
use crate::{settings, words};

words! {
    /// The rule under a sharpness-aware method.
    pub enum BaseName {
        /// Stochastic gradient descent with momentum
        Sgd = "sgd",
        /// AdamW
        AdamW = "adamw",
        /// Muon for the weights of convolutions and of all linear layers but the last, AdamW for the rest
        Muon = "muon",
    }
}
words! {
    /// Random changes to training images.
    pub enum Augmentation {
        /// The images as they are
        None = "none",
        /// Random horizontal flips, and random crops after padding by 4 pixels
        Basic = "basic",
    }
}
words! {
    /// A policy of AutoAugment.
    pub enum AugmentPolicy {
        /// That for CIFAR-10
        Cifar10 = "cifar10",
    }
}
words! {
    /// How label noise chooses the other class.
    pub enum NoiseKind {
        /// Any other class
        Symmetric = "symmetric",
        /// The class that is often mistaken for it: known pairs in CIFAR-10, MNIST and Fashion-MNIST, otherwise the
        /// next class
        Asymmetric = "asymmetric",
    }
}
words! {
    /// What activations and the weights of convolutions are stored in.
    pub enum Precision {
        /// 32-bit floats throughout
        F32 = "f32",
        /// 32-bit floats; a GPU's convolutions round their factors to 10 bits of mantissa
        Tf32 = "tf32",
        /// 32-bit floats; convolutions multiply them as sums of two bf16 numbers: fast on tensor cores and AMX, slow on
        /// other CPUs
        Bf16x3 = "bf16x3",
        /// The same with three bf16 numbers, which is as exact as f32
        Bf16x6 = "bf16x6",
        /// 16 bits with 10 bits of mantissa; the loss is scaled
        F16 = "f16",
        /// 16 bits with 7 bits of mantissa and the range of f32
        Bf16 = "bf16",
    }
}

impl Precision {
    /// The relative error of the mean loss of a mini-batch, as `docs/methods.md` reports it for a ResNet-8 at a loss of
    /// 2.3; in f32 an error in the last place.
    fn loss_error(self) -> f64 {
        match self {
            Self::F32 | Self::Bf16x6 => 1e-7,
            Self::Bf16x3 => 1e-6,
            // The factors of convolutions are rounded as in f16.
            Self::Tf32 | Self::F16 => 2e-5,
            Self::Bf16 => 1e-4,
        }
    }
}

words! {
    /// A measure of curvature.
    pub enum Measure {
        /// ‖∇L‖
        GradNorm = "grad-norm",
        /// Trace of the Hessian
        Trace = "trace",
        /// Tr(H)/‖∇L‖
        NormalizedTrace = "normalized-trace",
        /// The trace by Hutch++, with as many products as there are probes
        HutchPlusPlus = "hutch++",
        /// The trace of each layer's block of the Hessian
        LayerTraces = "layer-traces",
        /// vᵀHv along the gradient, v = ∇L/‖∇L‖
        Vhv = "vhv",
        /// The same from the losses at distance ρ on both sides
        VhvDifference = "vhv-difference",
        /// How far the loss rises within ρ: after one step of ascent, and after several
        Sharpness = "sharpness",
        /// The same for the loss of each part of the images
        MSharpness = "m-sharpness",
        /// The share of the rise that one step finds, for the loss of each part of the images
        ApproximationRatio = "approximation-ratio",
        /// ρ times the largest ‖∇L‖ within ρ
        Gnr = "gnr",
        /// Local minima and maxima within 0.1 along random lines
        Extrema = "extrema",
        /// The largest eigenvalues of the Hessian, by Lanczos's method
        TopEigenvalues = "top-eigenvalues",
        /// The eigenvalues largest in magnitude, by power iteration
        PowerIteration = "power-iteration",
        /// The density of the eigenvalues
        Spectrum = "spectrum",
    }
}
/// Declares the name of an entry of a list as the type of an option.
macro_rules! name_in_list {
    ($(#[$doc:meta])* $name:ident, $list:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name(&'static str);

        impl $name {
            /// All names, with a line of help.
            const WORDS: [Word; $list.len()] = {
                let mut words = [Word { name: "", doc: "" }; $list.len()];
                let mut index = 0;
                while index < $list.len() {
                    words[index] = Word { name: $list[index].name, doc: $list[index].summary };
                    index += 1;
                }
                words
            };

            /// The name.
            pub fn name(self) -> &'static str {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                let entry = $list.iter().find(|entry| entry.name == text);
                let unknown = || UnknownWord { found: text.into(), words: &Self::WORDS };
                entry.map(|entry| Self(entry.name)).ok_or_else(unknown)
            }
        }

        impl OptionType for $name {
            const KIND: SettingKind = SettingKind::Word(&Self::WORDS);

            fn to_value(&self) -> SettingValue {
                SettingValue::Word(self.0.into())
            }

            fn from_value(value: &SettingValue) -> Option<Self> {
                if let SettingValue::Word(name) | SettingValue::Text(name) = value { name.parse().ok() } else { None }
            }
        }
    };
}

impl DataSettings {
    /// How the pictures of a folder are read.
    pub fn load_options(&self) -> LoadOptions {
        let memory = self.image_memory.map(|mebibytes| mebibytes << 20);
        LoadOptions { image_size: self.image_size, memory, without_statistics: false }
    }
}

name_in_list! {
    /// A method by its name in [`METHODS`].
    MethodName, METHODS
}
name_in_list! {
    /// A model by its name in [`MODELS`].
    ModelName, MODELS
}

settings! {
    /// What to train on.
    #[derive(Debug, Clone, PartialEq)]
    pub struct DataSettings {
        /// A folder with CIFAR, SVHN, IDX or .npy files or pictures by class, an archive of CIFAR, or `synthetic`
        data: String = "synthetic".into(), as "PATH";
        /// Cut the pictures of a folder to their middle square, and resize it to N x N pixels
        image_size: Option<usize> = None, else "that of the pictures", in between(1, 4096);
        /// Decode the pictures of a folder as they are needed if a split would take more MiB than this in memory; 0
        /// always does. Sets of other formats are always in memory
        image_memory: Option<u64> = None, else "a quarter of the memory that is available", as "MIB", in at_most(1 << 30);
        /// Train on the first N training images
        train_size: Option<usize> = None, else "all", in at_least(1);
        /// Replace this fraction of the training labels by other classes
        label_noise: Option<f64> = None, else "0", as "P", in fraction;
        /// How label noise chooses the new class
        label_noise_kind: NoiseKind = NoiseKind::Symmetric, with label_noise;
        /// Hold out this fraction of the training images, test on them after each epoch, and keep the weights of the
        /// best epoch in best.safetensors. They get no label noise
        validation: Option<f64> = None, else "0", as "P", in below_one;
        /// Replace the training labels by the predictions of a model that was trained before: the folder of its run, or
        /// a file with weights of this run's network
        bootstrap: Option<String> = None, else "the labels as they are", as "RUN_OR_WEIGHTS";
        /// Mean of pixel/255 per channel
        mean: Option<Vec<f32>> = None, else "the data set's published values";
        /// Standard deviation of pixel/255 per channel
        std: Option<Vec<f32>> = None, else "the data set's published values";
        /// Number of classes
        classes: Option<usize> = None, else "those of the data set; in IDX and .npy files the largest label plus one",
            in at_least(1);
        /// Random changes to training images
        augment: Augmentation = Augmentation::Basic;
        /// Enlarge a random part of each training image, of at least this share of its area, in place of the crop
        /// after padding
        random_resized_crop: Option<f64> = None, else "no resized crop", as "SHARE", in up_to(1);
        /// Apply one of 25 pairs of operations to each training image, AutoAugment's policy
        auto_augment: Option<AugmentPolicy> = None, else "no policy";
        /// Apply N random operations to each training image, at magnitude M of 30 (RandAugment)
        rand_augment: Option<Vec<f64>> = None, else "no policy", as "N,M", in not_negative;
        /// Change brightness, contrast, saturation and hue of each training image by up to these
        color_jitter: Option<Vec<f64>> = None, else "no jitter", as "B,C,S,H", in not_negative;
        /// Cut a square of this side out of each training image; 0 for none
        cutout: usize = 0, as "PIXELS", in at_most(65_535);
        /// Erase a random rectangle from this share of the training images
        erasing: Option<f64> = None, else "0", as "P", in fraction;
        /// Blend the training images of a batch in pairs, with a weight from the beta distribution (A, A)
        mixup: Option<f64> = None, else "no mixup", as "A", in up_to(Mixing::MOST_ALPHA);
        /// Exchange a box between the images of a pair, with a share of the area from the beta distribution (A, A).
        /// With mixup, every batch takes one of both
        cutmix: Option<f64> = None, else "no CutMix", as "A", in up_to(Mixing::MOST_ALPHA);
        /// Take the training images in the order of the files
        no_shuffle: bool = false;
        /// Images per step. The last images of an epoch are left out if they do not fill a step
        batch_size: usize = 128, in at_least(1);
        /// Images per pass: gradients are accumulated over the batch
        micro_batch: Option<usize> = None, else "the whole batch or group", in at_least(1);
    }
}

settings! {
    /// Which network to train.
    #[derive(Debug, Clone, PartialEq)]
    pub struct ModelSettings {
        /// The network
        model: ModelName = ModelName("resnet8"), as "NAME";
        /// Kind of shortcut where a CIFAR ResNet changes its shape
        shortcut: Option<Shortcut> = None, else "a";
        /// Begin from the weights in this file
        init: Option<String> = None, else "random weights", as "FILE.safetensors";
        /// Do not take the last linear layer from the file: it begins with random weights, so that the number of
        /// classes may differ
        reset_head: bool = false, with init;
        /// Do not train the tensors whose names match one of these patterns, such as layer1.*: they get no update and
        /// no perturbation, and count in no norm. * stands for any characters, ? for one
        freeze: Option<Vec<String>> = None, else "nothing", as "PATTERN";
        /// Normalise with batch norm's running statistics in training, too, and leave them as they are
        freeze_bn: bool = false;
    }
}

settings! {
    /// How to train: the method's name, and what all methods have.
    #[derive(Debug, Clone, PartialEq)]
    pub struct OptimizerSettings {
        /// The training method
        optimizer: MethodName = MethodName("sam"), as "NAME";
        /// The base optimizer, which follows the method's direction
        base: BaseName = BaseName::Sgd, as "NAME";
        /// How ρ changes over the run
        rho_schedule: RhoSchedule = RhoSchedule::Constant;
        /// Perturb each group of M images separately
        m_sharpness: Option<usize> = None, else "the whole batch", as "M", in at_least(1);
        /// Scale a longer combined gradient down to this norm
        clip: Option<f64> = None, else "no limit", as "NORM", in positive;
        /// Exempt biases and normalisation from weight decay
        no_decay_norm: bool = false;
        /// Multiply the learning rate of the tensors whose names match a pattern, as in layer1.*=0.1. The last pattern
        /// that matches a tensor counts
        layer_rate: Option<Vec<String>> = None, else "1 for all", as "PATTERN=FACTOR";
        /// Give each layer this times the learning rate of the next one. The last layer has the full rate, and a
        /// residual block counts as one layer
        layer_decay: Option<f64> = None, else "1", as "F", in up_to(1);
        /// Keep a moving average of weights and running statistics with this decay, and test it too
        ema: Option<f64> = None, else "no average", as "DECAY", in below_one;
        /// Average the weights at the end of each epoch after this one, or, below 1, after this share of the steps. The
        /// average is tested at the end, with batch norm's statistics computed anew (SWA)
        swa: Option<f64> = None, else "no average", as "START", in not_negative;
        /// SWA's learning rate
        swa_lr: Option<f64> = None, else "the schedule's", as "RATE", in positive, with swa;
        /// Epochs in which the rate goes from the schedule's to SWA's, along a cosine
        swa_anneal: u64 = 1, as "EPOCHS", with swa_lr;
        /// Label smoothing of the training loss
        label_smoothing: f64 = 0.0, as "EPS", in fraction;
    }
}

settings! {
    /// SGD, alone or under a method.
    #[derive(Debug, Clone, PartialEq)]
    pub struct SgdSettings {
        /// Peak learning rate
        lr: f64 = 0.1, as "RATE", in positive;
        /// Momentum
        momentum: f64 = 0.9, as "MU", in below_one;
        /// SGD with Nesterov's momentum
        nesterov: bool = false;
        /// Weight decay
        weight_decay: f64 = 5e-4, as "LAMBDA", in not_negative;
    }
}

settings! {
    /// AdamW, alone or under a method.
    #[derive(Debug, Clone, PartialEq)]
    pub struct AdamWSettings {
        /// Peak learning rate
        lr: f64 = 1e-3, as "RATE", in positive;
        /// Weight decay
        weight_decay: f64 = 1e-2, as "LAMBDA", in not_negative;
    }
}

settings! {
    /// Muon, alone or under a method.
    #[derive(Debug, Clone, PartialEq)]
    pub struct MuonSettings {
        /// Peak learning rate
        lr: f64 = 0.02, as "RATE", in positive;
        /// Momentum
        momentum: f64 = 0.95, as "MU", in below_one;
        /// Weight decay
        weight_decay: f64 = 0.1, as "LAMBDA", in not_negative;
    }
}

settings! {
    /// How long to train, where, and what to log.
    #[derive(Debug, Clone, PartialEq)]
    pub struct LoopSettings {
        /// Passes over the training images
        epochs: u64 = 10, in at_least(1);
        /// Number of training steps, instead of epochs
        steps: Option<u64> = None, else "the epochs' steps", in at_least(1);
        /// How the learning rate falls
        schedule: Decay = Decay::Cosine;
        /// Where the step schedule multiplies the learning rate: after so many epochs, or, below 1, after this share of
        /// the steps after the warm-up
        milestones: Vec<f64> = vec![0.5, 0.75], in not_negative, with schedule = "step";
        /// What the step schedule multiplies it by
        decay_factor: f64 = 0.1, as "FACTOR", in positive, with schedule = "step";
        /// Steps of linear warm-up
        warmup: u64 = 0, as "STEPS";
        /// Seed of everything random: weights, order, augmentation, label noise, directions, probes
        seed: u64 = 0;
        /// auto, cpu, cuda (the first GPU) or cuda:N
        device: String = "auto".into(), as "NAME";
        /// CPU threads; 0 takes one per core
        threads: usize = 0, in at_most(HostOptions::MOST_THREADS as u64);
        /// Storage type of activations and convolution weights; f16 also scales the loss
        precision: Precision = Precision::F32, as "TYPE";
        /// Write a line to log.jsonl every N steps as well; 0 for none
        log_every: u64 = 0;
        /// End the run with an error when the mean loss of 50 steps, or of an epoch, is above this, or when 50 steps in
        /// a row are not finite; inf for no limit
        max_loss: Option<f64> = None, else "ten times the loss of guessing, ln(classes)", as "LOSS", in above_zero;
    }
}

settings! {
    /// Curvature that is measured during training.
    #[derive(Debug, Clone, PartialEq)]
    pub struct CurvatureLogSettings {
        /// Measure the curvature after every N epochs and write it to log.jsonl; 0 for never
        curvature_every: u64 = 0;
        /// What to measure
        curvature_measures: Vec<Measure> = CurvatureSettings::default().measure, with curvature_every;
        /// Over which images
        curvature_split: Split = Split::Train, with curvature_every;
        /// Measure over the first N of them
        curvature_samples: Option<usize> = None, else "1000, for the approximation ratio 5000, or as many as there are",
            in at_least(1), with curvature_every;
        /// Statistics that batch norm uses in the measurement
        curvature_bn: BatchNormName = BatchNormName::Eval, as "MODE", with curvature_every;
        /// Radius for sharpness measures
        curvature_rho: Option<f64> = None, else "the method's rho, or 0.05", as "RHO", in positive, with curvature_every;
        /// How many eigenvalues
        curvature_top: usize = 5, as "K", in at_least(1), with curvature_every;
        /// Lanczos steps for each probe of the spectrum, and at most so many for eigenvalues. For power iteration:
        /// products per eigenvalue
        curvature_steps: usize = 80, in at_least(1), with curvature_every;
        /// Random directions for traces, spectrum and extrema
        curvature_probes: usize = 20, in at_least(1), with curvature_every;
    }
}

/// The method and the base optimizer of a run, which decide what other options there are.
pub(super) struct Chosen {
    entry: &'static Entry,
    method: Box<dyn Method<f32>>,
    base: BaseName,
}

impl Chosen {
    /// What these options choose.
    ///
    /// # Errors
    /// A name that is not known.
    pub fn by(options: &Options) -> Result<Self, SettingError> {
        let mut settings = OptimizerSettings::default();
        for name in ["optimizer", "base"] {
            options.get(name).map_or(Ok(()), |value| settings.set(name, value))?;
        }
        Self::of(&settings)
    }

    fn of(settings: &OptimizerSettings) -> Result<Self, SettingError> {
        let name = settings.optimizer.name();
        let entry = optim::find(name).ok_or_else(|| SettingError::Unknown { name: name.into() })?;
        let own_base = entry.base.and_then(BaseName::from_word);
        Ok(Self { entry, method: (entry.new)(), base: own_base.unwrap_or(settings.base) })
    }

    fn base_options(&self) -> &'static [Setting] {
        match self.base {
            BaseName::Sgd => SgdSettings::OPTIONS,
            BaseName::AdamW => AdamWSettings::OPTIONS,
            BaseName::Muon => MuonSettings::OPTIONS,
        }
    }

    /// Whether a run of this method over this base has an option.
    pub fn has(&self, name: &str) -> bool {
        let among = |options: &[Setting]| options.iter().any(|option| option.name == name);
        let declared = GENERAL.iter().any(|(_, options)| among(options))
            || among(self.method.options())
            || among(self.base_options());
        declared && is_offered(name, &*self.method, self.entry.base.is_none())
    }
}

/// Whether a general option has a meaning for a method. `has_base` is false for a base optimizer alone.
pub(super) fn is_offered(name: &str, method: &dyn Method<f32>, has_base: bool) -> bool {
    match name {
        "base" => has_base,
        // A method that computes its step size ignores the learning rate and its schedule.
        "lr" | "schedule" | "milestones" | "decay-factor" | "warmup" | "swa-lr" | "swa-anneal" => {
            method.own_rate().is_none()
        }
        "rho-schedule" => method.get("rho").is_some(),
        // A method with memory has one state for the whole mini-batch.
        "m-sharpness" => has_base && method.needs().memory == 0,
        _ => true,
    }
}

/// The general options under the headings of `--help`.
pub(super) const GENERAL: [(&str, &[Setting]); 5] = [
    ("Data", DataSettings::OPTIONS),
    ("Model", ModelSettings::OPTIONS),
    ("Optimizer", OptimizerSettings::OPTIONS),
    ("Run", LoopSettings::OPTIONS),
    ("Curvature", CurvatureLogSettings::OPTIONS),
];

/// The settings of a run: a value for every option.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunSettings {
    /// What to train on.
    pub data: DataSettings,
    /// Which network to train.
    pub model: ModelSettings,
    /// How to train.
    pub optimizer: OptimizerSettings,
    /// The method's options that differ from their defaults.
    pub method: Options,
    /// SGD, if it is the base.
    pub sgd: SgdSettings,
    /// AdamW, if it is the base.
    pub adamw: AdamWSettings,
    /// Muon, if it is the base.
    pub muon: MuonSettings,
    /// How long to train, where, and what to log.
    pub run: LoopSettings,
    /// What curvature to measure.
    pub curvature: CurvatureLogSettings,
}

impl RunSettings {
    /// The general settings.
    fn general(&self) -> [&dyn Configurable; 5] {
        [&self.data, &self.model, &self.optimizer, &self.run, &self.curvature]
    }

    fn general_mut(&mut self) -> [&mut dyn Configurable; 5] {
        [&mut self.data, &mut self.model, &mut self.optimizer, &mut self.run, &mut self.curvature]
    }

    fn chosen(&self) -> Result<Chosen, SettingError> {
        Chosen::of(&self.optimizer)
    }

    /// The base optimizer's settings.
    fn base(&self, chosen: &Chosen) -> &dyn Configurable {
        match chosen.base {
            BaseName::Sgd => &self.sgd,
            BaseName::AdamW => &self.adamw,
            BaseName::Muon => &self.muon,
        }
    }

    /// The method that the settings name.
    ///
    /// # Errors
    /// Options that it does not have, or that contradict each other.
    pub fn method(&self) -> Result<Box<dyn Method<f32>>, TrainError> {
        let mut method = self.chosen()?.method;
        for (name, value) in self.method.iter() {
            method.set(name, value)?;
        }
        method.check_combination()?;
        Ok(method)
    }

    /// The network that the settings name.
    ///
    /// # Errors
    /// A shortcut that it does not have.
    pub fn model(&self) -> Result<Model, TrainError> {
        let model = Model::from_name(self.model.model.name(), self.model.shortcut);
        // The name is one of the list.
        model.map_err(|error| TrainError::setting("shortcut", error.to_string()))
    }

    /// Every option that has a value, in the order of their declarations. `own` has the names of a network, a data set
    /// and a method that these settings do not know.
    fn values(
        &self,
        method: &dyn Method<f32>,
        own: &[(&str, String)],
    ) -> Result<Vec<(&'static str, SettingValue)>, TrainError> {
        let chosen = self.chosen()?;
        let own_name = |option: &str| own.iter().find(|(name, _)| *name == option).map(|(_, name)| name);
        let has_base = chosen.entry.base.is_none() || own_name("optimizer").is_some();
        let mut values = Vec::new();
        let [data, model, optimizer, run, curvature] = self.general();
        for settings in [data, model, optimizer, method, self.base(&chosen), run, curvature] {
            for option in settings.options() {
                let hidden = option.name == "epochs" && self.run.steps.is_some();
                if hidden || !is_offered(option.name, method, has_base) || !applies(settings, option.name) {
                    continue;
                }
                match (own_name(option.name), settings.get(option.name)) {
                    (Some(name), _) => values.push((option.name, SettingValue::Text(name.clone()))),
                    (None, None | Some(SettingValue::Absent)) => {}
                    (None, Some(value)) => values.push((option.name, value)),
                }
            }
        }
        Ok(values)
    }

    /// As TOML: a file from which [`Options::from_file`] reads the same settings.
    ///
    /// # Errors
    /// A method that is not known.
    pub fn to_toml(&self) -> Result<String, TrainError> {
        self.to_toml_with(&*self.method()?, &[])
    }

    /// The same for a run whose network, data set or method have their own names.
    pub(super) fn to_toml_with(&self, method: &dyn Method<f32>, own: &[(&str, String)]) -> Result<String, TrainError> {
        let mut text = String::new();
        for (name, value) in self.values(method, own)? {
            if let Some(value) = to_toml(&value) {
                let _ = writeln!(text, "{name} = {value}");
            }
        }
        Ok(text)
    }

    /// As a JSON object.
    ///
    /// # Errors
    /// A method that is not known.
    pub fn to_json(&self) -> Result<serde_json::Value, TrainError> {
        let values = self.values(&*self.method()?, &[])?;
        Ok(values.iter().map(|(name, value)| (name.to_string(), to_json(value))).collect())
    }

    /// Fails where these settings would not continue the run that `before` began: only how long it lasts, where it
    /// runs and what it logs may change.
    ///
    /// # Errors
    /// The first option that differs.
    pub fn continues(&self, before: &Self) -> Result<(), TrainError> {
        let table = |settings: &Self| -> Result<toml::Table, TrainError> {
            let broken = |error: toml::de::Error| TrainError::setting("settings", error.message());
            toml::from_str(&settings.to_toml()?).map_err(broken)
        };
        match continues(&table(self)?, &table(before)?) {
            Some(name) => Err(TrainError::setting(&name, "cannot change when a run is resumed")),
            None => Ok(()),
        }
    }

    /// The same with absolute paths of files, which are valid in any folder, without `.`, `..` and symbolic links. A
    /// path that is not Unicode stays as it is.
    #[must_use]
    pub fn with_absolute_paths(mut self) -> Self {
        // A path that is no text stays as it was given, because settings are text.
        let absolute = |path: &String| same_place(path).into_os_string().into_string().unwrap_or(path.clone());
        if !crate::data::is_generated(&self.data.data) && !self.data.data.is_empty() {
            self.data.data = absolute(&self.data.data);
        }
        self.model.init = self.model.init.as_ref().map(absolute);
        self.data.bootstrap = self.data.bootstrap.as_ref().map(absolute);
        self
    }

    /// Checks every range and what must fit together.
    ///
    /// # Errors
    /// [`TrainError::Setting`].
    pub fn check(&self) -> Result<(), TrainError> {
        self.general().into_iter().try_for_each(Configurable::check)?;
        self.base(&self.chosen()?).check()?;
        if let Some((_, curvature)) = self.curvature(&*self.method()?) {
            let prefixed = |error: TrainError| match error {
                TrainError::Setting { name, reason } => TrainError::setting(&format!("curvature-{name}"), reason),
                other => other,
            };
            curvature.check_combination().map_err(prefixed)?;
        }
        if self.model.init.as_deref() == Some("") {
            return Err(TrainError::setting("init", "empty, expected a file"));
        }
        if self.data.bootstrap.as_deref() == Some("") {
            return Err(TrainError::setting("bootstrap", "empty, expected the folder of a run or a file of weights"));
        }
        if self.data.bootstrap.is_some() && self.data.label_noise.is_some_and(|fraction| fraction > 0.0) {
            let reason = "cannot be given together with `label-noise`, whose labels it would replace";
            return Err(TrainError::setting("bootstrap", reason));
        }
        let (batch, group) = (self.data.batch_size, self.optimizer.m_sharpness);
        if let Some(group) = group.filter(|group| !batch.is_multiple_of(*group)) {
            let reason = format!("{group}, expected a divisor of `batch-size` {batch}");
            return Err(TrainError::setting("m-sharpness", reason));
        }
        self.augmentation((1, 1))?;
        let (whole, size) = group.map_or(("batch-size", batch), |group| ("m-sharpness", group));
        if let Some(part) = self.data.micro_batch.filter(|part| !size.is_multiple_of(*part)) {
            return Err(TrainError::setting("micro-batch", format!("{part}, expected a divisor of `{whole}` {size}")));
        }
        if self.data.micro_batch.is_some() && self.method()?.keeps_batch() {
            let method = self.optimizer.optimizer.name();
            let reason = format!("has no meaning for `optimizer` {method}: it keeps whole batches");
            return Err(TrainError::setting("micro-batch", reason));
        }
        let OptimizerSettings { layer_rate, layer_decay, .. } = &self.optimizer;
        for (name, given) in [("layer-rate", layer_rate.is_some()), ("layer-decay", layer_decay.is_some())] {
            if given && self.method()?.keeps_batch() {
                let method = self.optimizer.optimizer.name();
                return Err(TrainError::setting(name, format!("`optimizer` {method} needs one rate for all weights")));
            }
        }
        let part = self.data.micro_batch.unwrap_or(size);
        for (name, alpha) in [("mixup", self.data.mixup), ("cutmix", self.data.cutmix)] {
            if alpha.is_some() && part < 2 {
                return Err(TrainError::setting(
                    name,
                    "the images of a pass are mixed with each other, and it has one",
                ));
            }
        }
        Ok(())
    }

    /// What happens to training images of this height and width; none if they stay as they are.
    ///
    /// # Errors
    /// Lists of another length than expected, or values out of their range; two policies.
    pub(super) fn augmentation(
        &self,
        (height, width): (usize, usize),
    ) -> Result<Option<augment::Augmentation>, TrainError> {
        let data = &self.data;
        let flip = data.augment == Augmentation::Basic;
        let basic = Augment {
            pad: if flip && data.random_resized_crop.is_none() { 4 } else { 0 },
            flip,
            cutout: data.cutout,
            erasing: data.erasing.unwrap_or(0.0),
            seed: self.run.seed,
            counter: 0,
        };
        let jitter = match data.color_jitter.as_deref() {
            None => Jitter::default(),
            Some(&[brightness, contrast, saturation, hue]) if hue <= 0.5 => {
                Jitter { brightness, contrast, saturation, hue }
            }
            Some(_) => {
                let reason = "expected four numbers: brightness, contrast, saturation, and hue of at most 0.5";
                return Err(TrainError::setting("color-jitter", reason));
            }
        };
        let policy = match (data.auto_augment, data.rand_augment.as_deref()) {
            (Some(_), Some(_)) => {
                return Err(TrainError::setting("rand-augment", "cannot be given together with `auto-augment`"));
            }
            (Some(AugmentPolicy::Cifar10), None) => Some(Policy::auto_augment_cifar10(height, width)),
            (None, Some(numbers)) => Some(rand_augment(numbers, height, width)?),
            (None, None) => None,
        };
        let augmentation = augment::Augmentation { basic, resized_crop: data.random_resized_crop, policy, jitter };
        let nothing =
            augment::Augmentation { basic: Augment { seed: basic.seed, ..Augment::default() }, ..Default::default() };
        Ok((augmentation != nothing).then_some(augmentation))
    }

    /// What the optimizer does, for a method that was prepared for the network.
    pub(super) fn optimizer(
        &self,
        mut method: Box<dyn Method<f32>>,
        layout: &Layout,
    ) -> Result<optim::Settings<f32>, TrainError> {
        let base = self.chosen()?.base;
        let (weight_decay, base) = match base {
            BaseName::Sgd => {
                let SgdSettings { momentum, nesterov, weight_decay, .. } = self.sgd;
                (weight_decay, Base::Sgd { momentum, nesterov })
            }
            BaseName::AdamW => (self.adamw.weight_decay, Base::ADAMW),
            BaseName::Muon => (self.muon.weight_decay, Base::Muon { momentum: self.muon.momentum }),
        };
        let loss_error = self.run.precision.loss_error();
        method.prepare(&Context { layout, seed: self.run.seed, loss_error });
        // Now it knows the network, too.
        method.check_combination()?;
        let decay_len = if self.optimizer.no_decay_norm { layout.weights_len() } else { layout.len() };
        let (clip, matrices) = (self.optimizer.clip, layout.hidden_matrices());
        Ok(optim::Settings { method, base, weight_decay, decay_len, clip, matrices })
    }

    /// After every how many epochs to measure the curvature, and what of it, within the radius of the run's method.
    pub(super) fn curvature(&self, method: &dyn Method<f32>) -> Option<(u64, CurvatureSettings)> {
        let log = &self.curvature;
        let usual = CurvatureSettings::default();
        let of_method = match method.get("rho") {
            Some(SettingValue::Number(rho)) if rho > 0.0 => rho,
            _ => usual.rho,
        };
        let settings = CurvatureSettings {
            measure: log.curvature_measures.clone(),
            probes: log.curvature_probes,
            rho: log.curvature_rho.unwrap_or(of_method),
            top: log.curvature_top,
            steps: log.curvature_steps,
            seed: self.run.seed,
            ..usual
        };
        (log.curvature_every > 0).then_some((log.curvature_every, settings))
    }

    /// How the learning rate changes over `steps` steps.
    ///
    /// # Errors
    /// A warm-up that is longer than the run.
    pub(super) fn schedule(
        &self,
        method: &dyn Method<f32>,
        steps: u64,
        steps_per_epoch: u64,
    ) -> Result<optim::Schedule, TrainError> {
        let peak = match self.chosen()?.base {
            BaseName::Sgd => self.sgd.lr,
            BaseName::AdamW => self.adamw.lr,
            BaseName::Muon => self.muon.lr,
        };
        let factor = self.run.decay_factor;
        // A method that computes its step size ignores the rate.
        if method.own_rate().is_some() {
            return Ok(optim::Schedule { peak, steps, factor, ..optim::Schedule::default() });
        }
        let warmup = self.run.warmup;
        if warmup > steps {
            return Err(TrainError::setting("warmup", format!("{warmup}, but the run has {steps} steps")));
        }
        let at = |milestone: &f64| match *milestone {
            share if share < 1.0 => warmup + (share * (steps - warmup) as f64).ceil() as u64,
            epochs => (epochs * steps_per_epoch as f64).ceil() as u64,
        };
        let milestones = self.run.milestones.iter().map(at).collect();
        let anneal = self.optimizer.swa_anneal.saturating_mul(steps_per_epoch);
        let ending = |start| Some(Ending { start, rate: self.optimizer.swa_lr?, anneal });
        let ending = self.swa_start(steps, steps_per_epoch)?.and_then(ending);
        Ok(optim::Schedule { peak, decay: self.run.schedule, warmup, steps, milestones, factor, ending })
    }

    /// After how many steps the average of weights begins, if there is one.
    ///
    /// # Errors
    /// One that begins too late for a single epoch.
    pub(super) fn swa_start(&self, steps: u64, steps_per_epoch: u64) -> Result<Option<u64>, TrainError> {
        let Some(given) = self.optimizer.swa else { return Ok(None) };
        let start = if given < 1.0 { given * steps as f64 } else { given * steps_per_epoch as f64 };
        let (start, last) = (start.ceil() as u64, steps / steps_per_epoch * steps_per_epoch);
        if start >= last {
            let epochs = steps / steps_per_epoch;
            let reason = format!("{}, but no whole epoch ends after that: the run has {epochs}", number(given));
            return Err(TrainError::setting("swa", reason));
        }
        Ok(Some(start))
    }
}

/// RandAugment's policy from N and M.
fn rand_augment(numbers: &[f64], height: usize, width: usize) -> Result<Policy, TrainError> {
    let expected = || {
        let (draws, magnitude) = (Policy::MOST_DRAWS, Policy::MAGNITUDES - 1);
        let reason = format!("expected two whole numbers: N from 1 to {draws}, M from 0 to {magnitude}");
        TrainError::setting("rand-augment", reason)
    };
    match *numbers {
        [draws, magnitude]
            if draws.fract() == 0.0
                && (1.0..=Policy::MOST_DRAWS as f64).contains(&draws)
                && magnitude.fract() == 0.0
                && (0.0..Policy::MAGNITUDES as f64).contains(&magnitude) =>
        {
            Ok(Policy::rand_augment(height, width, draws as usize, magnitude as usize)?)
        }
        _ => Err(expected()),
    }
}

/// The absolute path of a file or folder, the same for every spelling of it: without `.`, `..` and symbolic links. Of a
/// path that does not exist, the absolute path alone.
fn same_place(path: &str) -> PathBuf {
    let absolute = || std::path::absolute(path).unwrap_or_else(|_| path.into());
    std::fs::canonicalize(path).unwrap_or_else(|_| absolute())
}

/// The first option in which two runs differ, among those that cannot change when a run is resumed.
pub(super) fn continues(now: &toml::Table, before: &toml::Table) -> Option<String> {
    // Images are compared by what they are, not by where they lie.
    let free = [
        "data",
        "images",
        "image-memory",
        "bootstrap",
        "epochs",
        "steps",
        "threads",
        "device",
        "log-every",
        "max-loss",
    ];
    let free = |name: &str| free.contains(&name) || name.starts_with("curvature-");
    let differs = |name: &&str| !free(name) && now.get(*name) != before.get(*name);
    // Those on which others depend come first.
    let first = ["optimizer", "base", "model"].into_iter();
    first.chain(now.keys().chain(before.keys()).map(String::as_str)).find(differs).map(String::from)
}

/// The default momentum of SGD under a method that [has its own](Method::has_momentum).
pub(super) const NO_MOMENTUM: f64 = 0.0;

/// Whether this value asks for what holds without the option. It is accepted where the option has no meaning, too.
fn changes_nothing(name: &str, value: &SettingValue) -> bool {
    matches!((name, value.to_string().as_str()), ("schedule" | "rho-schedule", "constant") | ("warmup", "0"))
}

/// See [`Options::resolve`].
pub(super) fn resolve(options: &Options) -> Result<RunSettings, TrainError> {
    let chosen = Chosen::by(options)?;
    let mut settings = RunSettings::default();
    let mut method = (chosen.entry.new)();
    if chosen.method.has_momentum() {
        settings.sgd.momentum = NO_MOMENTUM;
    }
    if options.has("epochs") && options.has("steps") {
        return Err(TrainError::setting("steps", "cannot be given together with `epochs`"));
    }
    for (name, value) in options.iter() {
        if !chosen.has(name) && changes_nothing(name, value) {
            continue;
        }
        if !chosen.has(name) {
            // Of the base that was not chosen; its own options are hidden by methods alone.
            let of_base = of_bases().iter().any(|option| option.setting.name == name)
                && !chosen.base_options().iter().any(|option| option.name == name);
            let beside = match (of_base, chosen.entry.base) {
                (true, None) => format!("for `base` {}", chosen.base),
                _ => format!("for `optimizer` {}", chosen.entry.name),
            };
            return Err(match find_option(name) {
                Some(_) => SettingError::Meaningless { name: name.into(), reason: beside },
                None => SettingError::Unknown { name: name.into() },
            }
            .into());
        }
        if method.get(name).is_some() {
            method.set(name, value)?;
            settings.method.set(name, value.clone());
            continue;
        }
        let base: &mut dyn Configurable = match chosen.base {
            BaseName::Sgd => &mut settings.sgd,
            BaseName::AdamW => &mut settings.adamw,
            BaseName::Muon => &mut settings.muon,
        };
        if base.get(name).is_some() {
            base.set(name, value)?;
            continue;
        }
        let general = settings.general_mut().into_iter().find(|settings| settings.get(name).is_some());
        general.ok_or_else(|| SettingError::Unknown { name: name.into() })?.set(name, value)?;
    }
    let depend: &dyn Configurable = &*method;
    for settings in settings.general().into_iter().chain([depend]) {
        meaningful(settings, options)?;
    }
    method.check_combination()?;
    // The values as the method has them, however they were written.
    settings.method =
        settings.method.iter().filter_map(|(name, _)| Some((name.to_string(), method.get(name)?))).collect();
    let default = settings.model()?.shortcuts().first().copied();
    settings.model.shortcut = settings.model.shortcut.or(default);
    settings.check()?;
    Ok(settings)
}

/// Fails for an option that is given and has no meaning beside the others.
fn meaningful(settings: &dyn Configurable, given: &Options) -> Result<(), SettingError> {
    for option in settings.options() {
        let Some(condition) = option.only_with.filter(|condition| !condition.holds(settings)) else { continue };
        if given.has(option.name) {
            let other = condition.option();
            let reason = match (condition.value(), settings.get(&other)) {
                (Some(_), Some(found)) => format!("for `{other}` {found}"),
                _ => format!("without `{other}`"),
            };
            return Err(SettingError::Meaningless { name: option.name.into(), reason });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_are_epochs_or_shares_of_the_steps_after_the_warm_up() {
        let mut settings = RunSettings::default();
        settings.run.schedule = Decay::Step;
        settings.run.warmup = 10;
        settings.run.milestones = vec![0.5, 0.75, 1.0, 2.5];
        let method = settings.method().unwrap();
        let schedule = settings.schedule(&*method, 110, 20).unwrap();
        assert_eq!(schedule.milestones, [60, 85, 20, 50]);
        assert_eq!(schedule.rate(19), 0.1);
        assert!((schedule.rate(20) - 0.01).abs() < 1e-12 && (schedule.rate(109) - 1e-5).abs() < 1e-15);
        assert!(settings.schedule(&*method, 10, 20).is_ok());
        let error = settings.schedule(&*method, 9, 20).unwrap_err().to_string();
        assert_eq!(error, "warmup: 10, but the run has 9 steps");
        let milestones = |text: &str| Options::from_toml(text).unwrap().resolve();
        assert!(milestones("schedule = \"step\"\nmilestones = [0.5, 60.0]").is_ok());
        assert!(milestones("schedule = \"step\"\nmilestones = [0.5, -1.0]").is_err());
    }
}
