//! The settings of a run: every flag of `polder train` and its key in a TOML file, their defaults, and what they mean.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::arena::Layout;
use crate::device::HostOptions;
use crate::nn::{Model, Shortcut};
use crate::optim::{self, Base, CrSamTerms, Decay, Form, Method, Norm};

/// A choice that is written as one of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] #[value(name = $word)] $variant),+
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

words! {
    /// `--optimizer`.
    OptimizerName {
        /// Stochastic gradient descent with momentum.
        Sgd = "sgd",
        /// AdamW.
        AdamW = "adamw",
        /// Sharpness-aware minimisation.
        Sam = "sam",
        /// Curvature-regularised SAM.
        CrSam = "cr-sam",
    }
}
words! {
    /// `--base`: the rule under a sharpness-aware method.
    BaseName {
        /// Stochastic gradient descent with momentum.
        Sgd = "sgd",
        /// AdamW.
        AdamW = "adamw",
    }
}
words! {
    /// `--form` of CR-SAM.
    FormName {
        /// Equation 7 of the paper.
        Log = "log",
        /// The authors' code.
        Released = "released",
    }
}
words! {
    /// `--p-norm` of SAM's ball.
    NormName {
        /// p = 2.
        Two = "2",
        /// p = ∞.
        Infinity = "inf",
    }
}
words! {
    /// `--schedule`.
    ScheduleName {
        /// The peak throughout.
        Constant = "constant",
        /// Half a cosine to zero.
        Cosine = "cosine",
        /// A tenth after a half and again after three quarters of the steps.
        Step = "step",
    }
}
words! {
    /// `--augment`.
    AugmentName {
        /// None.
        None = "none",
        /// Horizontal flips, and crops after padding by 4 pixels.
        Basic = "basic",
    }
}
words! {
    /// `--precision`.
    PrecisionName {
        /// 32-bit floats throughout.
        F32 = "f32",
    }
}
words! {
    /// `--shortcut` of the CIFAR ResNets.
    ShortcutName {
        /// Every second pixel, new channels zero.
        A = "a",
        /// A 1×1 convolution with batch norm.
        B = "b",
    }
}

/// The flags of `polder train`, each of them optional; the same names are the keys of `--config` files.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Options {
    /// A folder with CIFAR-10/100 (binary) or IDX files, or `synthetic` [default: synthetic]
    #[arg(long, value_name = "PATH", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Train on the first N training images only
    #[arg(long, value_name = "N", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_size: Option<usize>,
    /// Replace this fraction of the training labels by other classes
    #[arg(long, value_name = "P", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_noise: Option<f64>,
    /// Mean of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<Vec<f32>>,
    /// Standard deviation of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<Vec<f32>>,
    /// Random changes to training images [default: basic]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment: Option<AugmentName>,
    /// Take the training images in the order of the files
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_shuffle: Option<bool>,
    /// Images per step; fewer at an epoch's end are left out [default: 128]
    #[arg(long, value_name = "N", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,

    /// resnet8, 20, 32, 44, 56, 110 (CIFAR ResNets) or resnet18 [default: resnet8]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Shortcuts of a CIFAR ResNet where its shape changes [default: a]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shortcut: Option<ShortcutName>,
    /// Begin from the weights in this file
    #[arg(long, value_name = "FILE.safetensors", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,

    /// How to train [default: sam]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<OptimizerName>,
    /// The rule under a sharpness-aware optimizer [default: sgd]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseName>,
    /// Radius of the perturbation [default: 0.05 for sam, 0.1 for cr-sam]
    #[arg(long, value_name = "RHO", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rho: Option<f64>,
    /// Norm of SAM's ball [default: 2]
    #[arg(long, value_enum, value_name = "P", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p_norm: Option<NormName>,
    /// CR-SAM's weight of the curvature term [default: 0.1]
    #[arg(long, value_name = "ALPHA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// CR-SAM's weight of the slope term [default: 0.01]
    #[arg(long, value_name = "BETA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// CR-SAM as in the paper (log) or as in its authors' code (released) [default: log]
    #[arg(long, value_enum, value_name = "FORM", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<FormName>,
    /// CR-SAM drops the curvature term at or below this A [default: 1e-8]
    #[arg(long, value_name = "A", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a_min: Option<f64>,
    /// CR-SAM drops the slope term at or below this B [default: 1e-8]
    #[arg(long, value_name = "B", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b_min: Option<f64>,
    /// Peak learning rate [default: 0.1 for SGD, 0.001 for AdamW]
    #[arg(long, value_name = "RATE", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// SGD's momentum [default: 0.9]
    #[arg(long, value_name = "MU", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// SGD with Nesterov's momentum
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// Weight decay [default: 5e-4 for SGD, 0.01 for AdamW]
    #[arg(long, value_name = "LAMBDA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Exempt biases and normalisation from weight decay
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_decay_norm: Option<bool>,
    /// Label smoothing of the training loss [default: 0]
    #[arg(long, value_name = "EPS", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,

    /// Passes over the training images [default: 10]
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Steps instead of epochs
    #[arg(long, value_name = "N", conflicts_with = "epochs", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// How the learning rate falls [default: cosine]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleName>,
    /// Steps of linear warm-up [default: 0]
    #[arg(long, value_name = "STEPS", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// Seed of initial weights, order, augmentation and label noise [default: 0]
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// auto, cpu or cuda:N [default: auto]
    #[arg(long, value_name = "NAME", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// CPU threads; 0 takes one per core [default: 0]
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Arithmetic [default: f32]
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<PrecisionName>,
    /// Write a line to log.jsonl every N steps as well; 0 for none [default: 0]
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_every: Option<u64>,
}

/// An option, whatever its type.
trait Given {
    fn given(&self) -> bool;
    fn clear(&mut self);
}

impl<T> Given for Option<T> {
    fn given(&self) -> bool {
        self.is_some()
    }

    fn clear(&mut self) {
        *self = None;
    }
}

impl Options {
    /// Reads a file of settings.
    ///
    /// # Errors
    /// The file, an unknown key, or a value of another type.
    pub fn from_file(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
        toml::from_str(&text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            let reason = format!("{place}{}", error.message().replace('\n', "; "));
            TrainError::Settings { path: path.into(), reason }
        })
    }

    /// The options that only some optimizers have, with those that do.
    fn of_some_optimizers(&mut self) -> [(&'static str, &mut dyn Given, &'static [OptimizerName]); 8] {
        use OptimizerName::{CrSam, Sam};
        [
            ("--base", &mut self.base, &[Sam, CrSam]),
            ("--rho", &mut self.rho, &[Sam, CrSam]),
            ("--p-norm", &mut self.p_norm, &[Sam]),
            ("--alpha", &mut self.alpha, &[CrSam]),
            ("--beta", &mut self.beta, &[CrSam]),
            ("--form", &mut self.form, &[CrSam]),
            ("--a-min", &mut self.a_min, &[CrSam]),
            ("--b-min", &mut self.b_min, &[CrSam]),
        ]
    }

    /// The options that only SGD has.
    fn of_sgd(&mut self) -> [(&'static str, &mut dyn Given); 2] {
        [("--momentum", &mut self.momentum), ("--nesterov", &mut self.nesterov)]
    }

    fn is_adamw(&self) -> bool {
        self.optimizer == Some(OptimizerName::AdamW) || self.base == Some(BaseName::AdamW)
    }

    /// These options, and those of `below` where these are silent. An optimizer chosen here leaves out what the one below has
    /// alone.
    #[must_use]
    pub fn over(self, mut below: Self) -> Self {
        if self.optimizer.is_some() || self.base.is_some() {
            let optimizer = self.optimizer.or(below.optimizer).unwrap_or(OptimizerName::Sam);
            for (_, option, optimizers) in below.of_some_optimizers() {
                if !optimizers.contains(&optimizer) {
                    option.clear();
                }
            }
            let chosen = Self { optimizer: Some(optimizer), base: self.base.or(below.base), ..Self::default() };
            if chosen.is_adamw() {
                below.of_sgd().into_iter().for_each(|(_, option)| option.clear());
            }
        }
        // A run is measured in epochs or in steps: the upper layer's choice hides the lower layer's other one.
        let (epochs, steps) = match (self.epochs, self.steps) {
            (None, None) => (below.epochs, below.steps),
            chosen => chosen,
        };
        Self {
            data: self.data.or(below.data),
            train_size: self.train_size.or(below.train_size),
            label_noise: self.label_noise.or(below.label_noise),
            mean: self.mean.or(below.mean),
            std: self.std.or(below.std),
            augment: self.augment.or(below.augment),
            no_shuffle: self.no_shuffle.or(below.no_shuffle),
            batch_size: self.batch_size.or(below.batch_size),
            model: self.model.or(below.model),
            shortcut: self.shortcut.or(below.shortcut),
            init: self.init.or(below.init),
            optimizer: self.optimizer.or(below.optimizer),
            base: self.base.or(below.base),
            rho: self.rho.or(below.rho),
            p_norm: self.p_norm.or(below.p_norm),
            alpha: self.alpha.or(below.alpha),
            beta: self.beta.or(below.beta),
            form: self.form.or(below.form),
            a_min: self.a_min.or(below.a_min),
            b_min: self.b_min.or(below.b_min),
            lr: self.lr.or(below.lr),
            momentum: self.momentum.or(below.momentum),
            nesterov: self.nesterov.or(below.nesterov),
            weight_decay: self.weight_decay.or(below.weight_decay),
            no_decay_norm: self.no_decay_norm.or(below.no_decay_norm),
            label_smoothing: self.label_smoothing.or(below.label_smoothing),
            epochs,
            steps,
            schedule: self.schedule.or(below.schedule),
            warmup: self.warmup.or(below.warmup),
            seed: self.seed.or(below.seed),
            device: self.device.or(below.device),
            threads: self.threads.or(below.threads),
            precision: self.precision.or(below.precision),
            log_every: self.log_every.or(below.log_every),
        }
    }

    /// The same options with every default that applies to the chosen optimizer and model filled in, and each value checked.
    ///
    /// # Errors
    /// A value out of its range, or an option that the chosen optimizer does not have.
    pub fn resolve(mut self) -> Result<Self, TrainError> {
        let optimizer = *self.optimizer.get_or_insert(OptimizerName::Sam);
        let sam = optimizer == OptimizerName::Sam;
        let cr_sam = optimizer == OptimizerName::CrSam;
        for (name, option, optimizers) in self.of_some_optimizers() {
            if option.given() && !optimizers.contains(&optimizer) {
                return Err(TrainError::option(name, format!("has no meaning for --optimizer {optimizer}")));
            }
        }
        if sam || cr_sam {
            self.base.get_or_insert(BaseName::Sgd);
            self.rho.get_or_insert(if sam { 0.05 } else { 0.1 });
        }
        if sam {
            self.p_norm.get_or_insert(NormName::Two);
        }
        if cr_sam {
            self.alpha.get_or_insert(0.1);
            self.beta.get_or_insert(0.01);
            self.form.get_or_insert(FormName::Log);
            self.a_min.get_or_insert(1e-8);
            self.b_min.get_or_insert(1e-8);
        }
        let adamw = self.is_adamw();
        if adamw {
            if let Some((name, _)) = self.of_sgd().into_iter().find(|(_, option)| option.given()) {
                return Err(TrainError::option(name, "has no meaning for AdamW"));
            }
        } else {
            self.momentum.get_or_insert(0.9);
            self.nesterov.get_or_insert(false);
        }
        self.lr.get_or_insert(if adamw { 1e-3 } else { 0.1 });
        self.weight_decay.get_or_insert(if adamw { 1e-2 } else { 5e-4 });
        self.data.get_or_insert_with(|| "synthetic".into());
        self.augment.get_or_insert(AugmentName::Basic);
        self.no_shuffle.get_or_insert(false);
        self.batch_size.get_or_insert(128);
        let model = self.model.get_or_insert_with(|| "resnet8".into()).clone();
        if model != "resnet18" {
            self.shortcut.get_or_insert(ShortcutName::A);
        }
        self.model()?;
        self.no_decay_norm.get_or_insert(false);
        self.label_smoothing.get_or_insert(0.0);
        if self.steps.is_none() {
            self.epochs.get_or_insert(10);
        }
        self.schedule.get_or_insert(ScheduleName::Cosine);
        self.warmup.get_or_insert(0);
        self.seed.get_or_insert(0);
        self.device.get_or_insert_with(|| "auto".into());
        self.threads.get_or_insert(0);
        self.precision.get_or_insert(PrecisionName::F32);
        self.log_every.get_or_insert(0);
        self.check()?;
        Ok(self)
    }

    /// Fails where these (resolved) settings would not continue the run that `before` began: only how long it lasts, where it
    /// computes and what it logs may change.
    ///
    /// # Errors
    /// The first option that differs.
    pub fn continues(&self, before: &Self) -> Result<(), TrainError> {
        // Compared by their keys, so that an option that comes later is not forgotten here.
        let free = ["epochs", "steps", "threads", "device", "log-every"];
        let keys = |options: &Self| toml::Table::try_from(options).unwrap_or_default();
        let (mine, theirs) = (keys(self), keys(before));
        let differs = |key: &&String| !free.contains(&key.as_str()) && mine.get(*key) != theirs.get(*key);
        match mine.keys().chain(theirs.keys()).find(differs) {
            Some(key) => Err(TrainError::option(&format!("--{key}"), "cannot change when a run is resumed")),
            None => Ok(()),
        }
    }

    /// The same with the paths of files written from the root, so that they hold in any folder.
    #[must_use]
    pub fn with_absolute_paths(mut self) -> Self {
        let absolute = |path: String| std::path::absolute(&path).map_or(path, |path| path.to_string_lossy().into());
        self.data = self.data.map(|data| if data == "synthetic" || data.is_empty() { data } else { absolute(data) });
        self.init = self.init.map(absolute);
        self
    }

    fn check(&self) -> Result<(), TrainError> {
        let positive = [("--lr", self.lr), ("--rho", self.rho)];
        let not_negative = [
            ("--weight-decay", self.weight_decay),
            ("--momentum", self.momentum),
            ("--alpha", self.alpha),
            ("--beta", self.beta),
            ("--a-min", self.a_min),
            ("--b-min", self.b_min),
        ];
        let fractions = [("--label-smoothing", self.label_smoothing), ("--label-noise", self.label_noise)];
        let checks =
            positive.map(|(option, value)| (option, value, "a finite number above 0", f64::MIN_POSITIVE, f64::MAX));
        let checks = checks
            .into_iter()
            .chain(not_negative.map(|(option, value)| (option, value, "a finite number, 0 or more", 0.0, f64::MAX)))
            .chain(fractions.map(|(option, value)| (option, value, "a number from 0 to 1", 0.0, 1.0)));
        for (option, value, expected, least, most) in checks {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                return Err(TrainError::option(option, format!("{value}, expected {expected}")));
            }
        }
        if let Some(threads) = self.threads.filter(|&threads| threads > HostOptions::MOST_THREADS) {
            let most = HostOptions::MOST_THREADS;
            return Err(TrainError::option("--threads", format!("{threads}, expected at most {most}")));
        }
        let counts =
            [("--batch-size", self.batch_size.map(|n| n as u64)), ("--epochs", self.epochs), ("--steps", self.steps)];
        for (option, value) in counts {
            if value == Some(0) {
                return Err(TrainError::option(option, "0, expected at least 1"));
            }
        }
        Ok(())
    }

    /// The network.
    ///
    /// # Errors
    /// An unknown name, or a shortcut that it does not have.
    pub fn model(&self) -> Result<Model, TrainError> {
        let shortcut = self.shortcut.map(|name| match name {
            ShortcutName::A => Shortcut::A,
            ShortcutName::B => Shortcut::B,
        });
        Ok(Model::from_name(self.model.as_deref().unwrap_or("resnet8"), shortcut)?)
    }

    /// What the optimizer does; of resolved options.
    pub(super) fn optimizer(&self, layout: &Layout) -> optim::Settings {
        let rho = self.rho.unwrap_or_default();
        let (method, base) = match self.optimizer.unwrap_or(OptimizerName::Sam) {
            OptimizerName::Sgd => (Method::Plain, BaseName::Sgd),
            OptimizerName::AdamW => (Method::Plain, BaseName::AdamW),
            OptimizerName::Sam => {
                let norm = if self.p_norm == Some(NormName::Infinity) { Norm::Infinity } else { Norm::Two };
                (Method::Sam { rho, norm }, self.base.unwrap_or(BaseName::Sgd))
            }
            OptimizerName::CrSam => {
                let form = if self.form == Some(FormName::Released) { Form::Released } else { Form::Log };
                let [alpha, beta, a_min, b_min] =
                    [self.alpha, self.beta, self.a_min, self.b_min].map(Option::unwrap_or_default);
                let terms = CrSamTerms { form, alpha, beta, a_min, b_min };
                (Method::CrSam { rho, terms }, self.base.unwrap_or(BaseName::Sgd))
            }
        };
        let base = match base {
            BaseName::Sgd => {
                Base::Sgd { momentum: self.momentum.unwrap_or_default(), nesterov: self.nesterov.unwrap_or_default() }
            }
            BaseName::AdamW => Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
        };
        let exempt = self.no_decay_norm.unwrap_or_default();
        optim::Settings {
            method,
            base,
            weight_decay: self.weight_decay.unwrap_or_default(),
            decay_len: if exempt { layout.weights_len() } else { layout.len() },
        }
    }

    /// How the learning rate moves over `steps` steps; of resolved options.
    pub(super) fn schedule(&self, steps: u64) -> optim::Schedule {
        let decay = match self.schedule.unwrap_or(ScheduleName::Cosine) {
            ScheduleName::Constant => Decay::Constant,
            ScheduleName::Cosine => Decay::Cosine,
            ScheduleName::Step => Decay::Step,
        };
        optim::Schedule { peak: self.lr.unwrap_or_default(), decay, warmup: self.warmup.unwrap_or_default(), steps }
    }
}
