//! The settings of a run: every flag of `polder train` and its key in a TOML file, their defaults, and what they mean.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{CurvatureSettings, TrainError};
use crate::arena::Layout;
use crate::device::HostOptions;
use crate::nn::{Model, Shortcut};
use crate::optim::{
    self, Asam, Base, Context, CrSam, Decay, Form, Gam, Gnr, Gsam, Hvp, LookSam, Method, Norm, Oracle, Plain, RSam,
    RandomSam, RhoSchedule, SaSam, SaSgd, Sam,
};

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
        /// Adaptive SAM.
        Asam = "asam",
        /// SAM along a random direction: the control.
        RandomSam = "random-sam",
        /// SAM whose ascent follows the gradient at a random point.
        RSam = "r-sam",
        /// SAM that keeps the loss at w low.
        Gsam = "gsam",
        /// SAM in one of k steps.
        LookSam = "looksam",
        /// Curvature-regularised SAM.
        CrSam = "cr-sam",
        /// Gradient-norm regularisation.
        Gnr = "gnr",
        /// Gradient-norm-aware minimisation.
        Gam = "gam",
        /// SAM with its own step size and radius.
        SaSam = "sa-sam",
        /// SGD with SA-SAM's step size.
        SaSgd = "sa-sgd",
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
    /// `--hvp` of GNR.
    HvpName {
        /// By the tangent of the network.
        Exact = "exact",
        /// By the difference of two gradients.
        Difference = "difference",
    }
}
words! {
    /// `--oracle` of GNR.
    OracleName {
        /// The gradient of the loss.
        Loss = "loss",
        /// SAM's gradient.
        Sam = "sam",
    }
}
words! {
    /// `--rho-schedule`.
    RhoScheduleName {
        /// The given radius throughout.
        Constant = "constant",
        /// From zero to the given radius.
        Linear = "linear",
        /// In proportion to the learning rate.
        LearningRate = "lr",
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
        /// The same, but a GPU's convolutions round their factors to 10 bits of mantissa.
        Tf32 = "tf32",
        /// Activations and the convolutions' weights in 16 bits with 10 of mantissa, the loss scaled.
        F16 = "f16",
        /// The same in 16 bits with 7 of mantissa, and the range of f32.
        Bf16 = "bf16",
    }
}
words! {
    /// `--measure` of `polder curvature` and `--curvature-measures` of `polder train`.
    Measure {
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
        /// The same by the difference of losses at ρ to either side
        VhvDifference = "vhv-difference",
        /// How far the loss rises within ρ: by one step, and by several of ascent
        Sharpness = "sharpness",
        /// The same for the loss of each part of the images
        MSharpness = "m-sharpness",
        /// What of the rise one step finds, for the loss of each part of the images
        ApproximationRatio = "approximation-ratio",
        /// ρ times the largest ‖∇L‖ within it
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
words! {
    /// `--shortcut` of the CIFAR ResNets.
    ShortcutName {
        /// Every second pixel, new channels zero.
        A = "a",
        /// A 1×1 convolution with batch norm.
        B = "b",
    }
}

impl OptimizerName {
    /// All but the base optimizers themselves.
    const SHARPNESS_AWARE: [Self; 11] = [
        Self::Sam,
        Self::Asam,
        Self::RandomSam,
        Self::RSam,
        Self::Gsam,
        Self::LookSam,
        Self::CrSam,
        Self::Gnr,
        Self::Gam,
        Self::SaSam,
        Self::SaSgd,
    ];

    /// The ρ and α that are usual for it.
    fn usual(self) -> (Option<f64>, Option<f64>) {
        match self {
            Self::Sgd | Self::AdamW | Self::SaSam | Self::SaSgd => (None, None),
            Self::Sam | Self::RandomSam | Self::RSam => (Some(0.05), None),
            Self::Asam => (Some(0.5), None),
            Self::Gsam => (Some(0.05), Some(0.1)),
            Self::LookSam => (Some(0.05), Some(0.7)),
            Self::CrSam | Self::Gnr => (Some(0.1), Some(0.1)),
            Self::Gam => (Some(0.02), None),
        }
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
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', allow_hyphen_values = true, help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<Vec<f32>>,
    /// Standard deviation of pixel/255 per channel [default: the data set's published values]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', allow_hyphen_values = true, help_heading = "Data")]
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
    /// Images per pass: gradients are accumulated over the batch [default: the batch, or --m-sharpness]
    #[arg(long, value_name = "N", help_heading = "Data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,

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
    /// Radius of the perturbation [default: 0.05; asam 0.5, cr-sam and gnr 0.1, gam 0.02]
    #[arg(long, value_name = "RHO", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rho: Option<f64>,
    /// Norm of SAM's ball [default: 2]
    #[arg(long, value_enum, value_name = "P", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p_norm: Option<NormName>,
    /// Weight of what cr-sam, gnr, gsam and looksam add to the gradient [default: 0.1; looksam 0.7]
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
    /// ASAM's η in T = |w| + η [default: 0.01]
    #[arg(long, value_name = "ETA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    /// Steps of SAM's ascent [default: 1]
    #[arg(long, value_name = "K", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ascent_steps: Option<usize>,
    /// SAM with the term that it drops: one product with the Hessian
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second_order: Option<bool>,
    /// Length of R-SAM's random displacement [default: 0.05]
    #[arg(long, value_name = "SIGMA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// LookSAM and GNR: do the whole step once in so many [default: 5 and 1]
    #[arg(long, value_name = "K", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// GNR's products with the Hessian [default: difference]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hvp: Option<HvpName>,
    /// GNR adds to this gradient [default: loss]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oracle: Option<OracleName>,
    /// Radius of GNR's SAM [default: 0.05]
    #[arg(long, value_name = "RHO", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oracle_rho: Option<f64>,
    /// GAM's r, along the change of the gradient (--rho is its r') [default: 0.2]
    #[arg(long, value_name = "R", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rho_norm: Option<f64>,
    /// GAM's β0 [default: 0.5]
    #[arg(long, value_name = "BETA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta0: Option<f64>,
    /// GAM's β1 [default: 0.6]
    #[arg(long, value_name = "BETA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// GAM's γ [default: 0.03]
    #[arg(long, value_name = "GAMMA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// SA-SAM's and SA-SGD's δ; their η_0 is --lr [default: 0.02]
    #[arg(long, value_name = "DELTA", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// How ρ moves [default: constant]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rho_schedule: Option<RhoScheduleName>,
    /// Groups of so many images, each with a perturbation of its own [default: the batch]
    #[arg(long, value_name = "M", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub m_sharpness: Option<usize>,
    /// Scale a longer combined gradient down to this norm
    #[arg(long, value_name = "NORM", help_heading = "Optimizer")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
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
    /// Seed of all that is random: weights, order, augmentation, label noise, directions, probes [default: 0]
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
    /// What activations and the convolutions' weights are stored in; f16 scales the loss [default: f32]
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<PrecisionName>,
    /// Write a line to log.jsonl every N steps as well; 0 for none [default: 0]
    #[arg(long, value_name = "N", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_every: Option<u64>,
    /// End the run once the mean loss of 50 steps or of an epoch is above this, or none of 50 steps, or of the last epoch's, had a
    /// finite one
    #[arg(long, value_name = "LOSS", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_loss: Option<f64>,

    /// Measure the curvature after every N epochs and write it to log.jsonl; 0 for never [default: 0]
    #[arg(long, value_name = "N", help_heading = "Curvature")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curvature_every: Option<u64>,
    /// What to measure [default: grad-norm,trace,normalized-trace]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", help_heading = "Curvature")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curvature_measures: Option<Vec<Measure>>,
    /// Over the first N training images, at most 200 or a multiple of 200 [default: 1000, or as many as there are in 200s]
    #[arg(long, value_name = "N", help_heading = "Curvature")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curvature_samples: Option<usize>,
    /// Random directions for traces, spectrum and extrema [default: 20]
    #[arg(long, value_name = "N", help_heading = "Curvature")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curvature_probes: Option<usize>,
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
    /// The settings of the run in a folder.
    ///
    /// # Errors
    /// [`TrainError::NoRun`]; those of [`Options::from_file`].
    pub fn of_run(run: &Path) -> Result<Self, TrainError> {
        let file = run.join("config.toml");
        if !file.is_file() {
            return Err(TrainError::NoRun { path: run.into() });
        }
        Self::from_file(&file)
    }

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
    fn of_some_optimizers(&mut self) -> [(&'static str, &mut dyn Given, &'static [OptimizerName]); 25] {
        use OptimizerName::{AdamW, Asam, CrSam, Gam, Gnr, Gsam, LookSam, RSam, RandomSam, SaSam, SaSgd, Sam, Sgd};
        // SA-SAM finds its step size itself.
        const SCHEDULED: &[OptimizerName] = &[Sgd, AdamW, Sam, Asam, RandomSam, RSam, Gsam, LookSam, CrSam, Gnr, Gam];
        [
            ("--schedule", &mut self.schedule, SCHEDULED),
            ("--warmup", &mut self.warmup, SCHEDULED),
            ("--base", &mut self.base, &OptimizerName::SHARPNESS_AWARE),
            ("--rho", &mut self.rho, &[Sam, Asam, RandomSam, RSam, Gsam, LookSam, CrSam, Gnr, Gam]),
            ("--rho-schedule", &mut self.rho_schedule, &[Sam, Asam, RandomSam, RSam, Gsam, LookSam, CrSam, Gnr, Gam]),
            ("--p-norm", &mut self.p_norm, &[Sam]),
            ("--ascent-steps", &mut self.ascent_steps, &[Sam]),
            ("--second-order", &mut self.second_order, &[Sam]),
            ("--eta", &mut self.eta, &[Asam]),
            ("--sigma", &mut self.sigma, &[RSam]),
            ("--alpha", &mut self.alpha, &[CrSam, Gnr, Gsam, LookSam]),
            ("--beta", &mut self.beta, &[CrSam]),
            ("--form", &mut self.form, &[CrSam]),
            ("--a-min", &mut self.a_min, &[CrSam]),
            ("--b-min", &mut self.b_min, &[CrSam]),
            ("--every", &mut self.every, &[LookSam, Gnr]),
            ("--hvp", &mut self.hvp, &[Gnr]),
            ("--oracle", &mut self.oracle, &[Gnr]),
            ("--oracle-rho", &mut self.oracle_rho, &[Gnr]),
            ("--rho-norm", &mut self.rho_norm, &[Gam]),
            ("--beta0", &mut self.beta0, &[Gam]),
            ("--beta1", &mut self.beta1, &[Gam]),
            ("--gamma", &mut self.gamma, &[Gam]),
            ("--delta", &mut self.delta, &[SaSam, SaSgd]),
            ("--m-sharpness", &mut self.m_sharpness, &[Sam, Asam, RandomSam, RSam, Gsam, CrSam, Gnr, Gam]),
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
        if self.curvature_every == Some(0) {
            (below.curvature_measures, below.curvature_samples, below.curvature_probes) = (None, None, None);
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
            eta: self.eta.or(below.eta),
            ascent_steps: self.ascent_steps.or(below.ascent_steps),
            second_order: self.second_order.or(below.second_order),
            sigma: self.sigma.or(below.sigma),
            every: self.every.or(below.every),
            hvp: self.hvp.or(below.hvp),
            oracle: self.oracle.or(below.oracle),
            oracle_rho: self.oracle_rho.or(below.oracle_rho),
            rho_norm: self.rho_norm.or(below.rho_norm),
            beta0: self.beta0.or(below.beta0),
            beta1: self.beta1.or(below.beta1),
            gamma: self.gamma.or(below.gamma),
            delta: self.delta.or(below.delta),
            rho_schedule: self.rho_schedule.or(below.rho_schedule),
            micro_batch: self.micro_batch.or(below.micro_batch),
            m_sharpness: self.m_sharpness.or(below.m_sharpness),
            clip: self.clip.or(below.clip),
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
            max_loss: self.max_loss.or(below.max_loss),
            curvature_every: self.curvature_every.or(below.curvature_every),
            curvature_measures: self.curvature_measures.or(below.curvature_measures),
            curvature_samples: self.curvature_samples.or(below.curvature_samples),
            curvature_probes: self.curvature_probes.or(below.curvature_probes),
        }
    }

    /// The same options with every default that applies to the chosen optimizer and model filled in, and each value checked.
    ///
    /// # Errors
    /// A value out of its range, or an option that the chosen optimizer does not have.
    pub fn resolve(mut self) -> Result<Self, TrainError> {
        let optimizer = *self.optimizer.get_or_insert(OptimizerName::Sam);
        for (name, option, optimizers) in self.of_some_optimizers() {
            if option.given() && !optimizers.contains(&optimizer) {
                return Err(TrainError::option(name, format!("has no meaning for --optimizer {optimizer}")));
            }
        }
        // The step size of SA-SAM is its own, and that of plain gradient descent.
        let own_step = matches!(optimizer, OptimizerName::SaSam | OptimizerName::SaSgd);
        if !own_step {
            self.schedule.get_or_insert(ScheduleName::Cosine);
            self.warmup.get_or_insert(0);
        }
        let (rho, alpha) = optimizer.usual();
        self.rho = self.rho.or(rho);
        self.alpha = self.alpha.or(alpha);
        if OptimizerName::SHARPNESS_AWARE.contains(&optimizer) {
            self.base.get_or_insert(BaseName::Sgd);
        }
        if rho.is_some() {
            self.rho_schedule.get_or_insert(RhoScheduleName::Constant);
        }
        match optimizer {
            OptimizerName::Sam => {
                self.p_norm.get_or_insert(NormName::Two);
                self.ascent_steps.get_or_insert(1);
                self.second_order.get_or_insert(false);
            }
            OptimizerName::Asam => drop(self.eta.get_or_insert(0.01)),
            OptimizerName::RSam => drop(self.sigma.get_or_insert(0.05)),
            OptimizerName::LookSam => drop(self.every.get_or_insert(5)),
            OptimizerName::CrSam => {
                self.beta.get_or_insert(0.01);
                self.form.get_or_insert(FormName::Log);
                self.a_min.get_or_insert(1e-8);
                self.b_min.get_or_insert(1e-8);
            }
            OptimizerName::Gnr => {
                self.every.get_or_insert(1);
                self.hvp.get_or_insert(HvpName::Difference);
                if *self.oracle.get_or_insert(OracleName::Loss) == OracleName::Sam {
                    self.oracle_rho.get_or_insert(0.05);
                } else if self.oracle_rho.is_some() {
                    return Err(TrainError::option("--oracle-rho", "has no meaning for --oracle loss"));
                }
            }
            OptimizerName::Gam => {
                self.rho_norm.get_or_insert(0.2);
                self.beta0.get_or_insert(0.5);
                self.beta1.get_or_insert(0.6);
                self.gamma.get_or_insert(0.03);
            }
            OptimizerName::SaSam | OptimizerName::SaSgd => drop(self.delta.get_or_insert(0.02)),
            OptimizerName::Sgd | OptimizerName::AdamW | OptimizerName::RandomSam | OptimizerName::Gsam => {}
        }
        let adamw = self.is_adamw();
        if adamw {
            if let Some((name, _)) = self.of_sgd().into_iter().find(|(_, option)| option.given()) {
                return Err(TrainError::option(name, "has no meaning for AdamW"));
            }
        } else {
            self.momentum.get_or_insert(if own_step { 0.0 } else { 0.9 });
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
        self.seed.get_or_insert(0);
        self.device.get_or_insert_with(|| "auto".into());
        self.threads.get_or_insert(0);
        self.precision.get_or_insert(PrecisionName::F32);
        self.log_every.get_or_insert(0);
        if *self.curvature_every.get_or_insert(0) > 0 {
            let CurvatureSettings { measures, .. } = CurvatureSettings::default();
            self.curvature_measures.get_or_insert(measures);
            self.curvature_probes.get_or_insert(20);
        }
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
        let free = ["epochs", "steps", "threads", "device", "log-every", "max-loss"];
        let free = |key: &str| free.contains(&key) || key.starts_with("curvature-");
        let keys = |options: &Self| toml::Table::try_from(options).unwrap_or_default();
        let (mine, theirs) = (keys(self), keys(before));
        let differs = |key: &&String| !free(key) && mine.get(*key) != theirs.get(*key);
        match mine.keys().chain(theirs.keys()).find(differs) {
            Some(key) => Err(TrainError::option(&format!("--{key}"), "cannot change when a run is resumed")),
            None => Ok(()),
        }
    }

    /// Whether an option, as `--lr`, has a value here.
    pub(super) fn has(&self, option: &str) -> bool {
        toml::Table::try_from(self).unwrap_or_default().contains_key(option.trim_start_matches("--"))
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
        let positive = [
            ("--lr", self.lr),
            ("--rho", self.rho),
            ("--oracle-rho", self.oracle_rho),
            ("--rho-norm", self.rho_norm),
            ("--sigma", self.sigma),
            ("--clip", self.clip),
            ("--max-loss", self.max_loss),
        ];
        let not_negative = [
            ("--eta", self.eta),
            ("--gamma", self.gamma),
            ("--beta0", self.beta0),
            ("--beta1", self.beta1),
            ("--delta", self.delta),
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
        let counts = [
            ("--batch-size", self.batch_size.map(|n| n as u64)),
            ("--epochs", self.epochs),
            ("--steps", self.steps),
            ("--every", self.every),
            ("--ascent-steps", self.ascent_steps.map(|n| n as u64)),
            ("--micro-batch", self.micro_batch.map(|n| n as u64)),
            ("--m-sharpness", self.m_sharpness.map(|n| n as u64)),
        ];
        for (option, value) in counts {
            if value == Some(0) {
                return Err(TrainError::option(option, "0, expected at least 1"));
            }
        }
        if self.steps.is_some() && self.epochs.is_some() {
            return Err(TrainError::option("--steps", "cannot be given together with --epochs"));
        }
        match self.curvature() {
            Some((_, curvature)) => curvature.check("--curvature-")?,
            None => {
                let given = [
                    ("--curvature-measures", self.curvature_measures.is_some()),
                    ("--curvature-samples", self.curvature_samples.is_some()),
                    ("--curvature-probes", self.curvature_probes.is_some()),
                ];
                if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
                    return Err(TrainError::option(option, "has no meaning without --curvature-every"));
                }
            }
        }
        let plain = self.p_norm != Some(NormName::Infinity);
        let several = self.ascent_steps.is_some_and(|steps| steps > 1);
        if several && !plain {
            return Err(TrainError::option("--ascent-steps", "several are for --p-norm 2"));
        }
        if self.second_order == Some(true) && (several || !plain) {
            return Err(TrainError::option("--second-order", "is for --p-norm 2 and one ascent step"));
        }
        if let (Some(group), Some(batch)) = (self.m_sharpness, self.batch_size)
            && (group == 0 || batch % group != 0)
        {
            let reason = format!("{group}, expected a divisor of --batch-size {batch}");
            return Err(TrainError::option("--m-sharpness", reason));
        }
        if let (Some(part), Some(group)) = (self.micro_batch, self.m_sharpness.or(self.batch_size))
            && group % part != 0
        {
            let whole = if self.m_sharpness.is_some() { "--m-sharpness" } else { "--batch-size" };
            return Err(TrainError::option("--micro-batch", format!("{part}, expected a divisor of {whole} {group}")));
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

    /// The method with its settings; of resolved options.
    fn method(&self) -> Box<dyn Method<f32>> {
        let number = |option: Option<f64>| option.unwrap_or_default();
        let (rho, alpha) = (number(self.rho), number(self.alpha));
        let every = self.every.unwrap_or(1);
        match self.optimizer.unwrap_or(OptimizerName::Sam) {
            OptimizerName::Sgd | OptimizerName::AdamW => Box::new(Plain {}),
            OptimizerName::Sam => Box::new(Sam {
                rho,
                p_norm: if self.p_norm == Some(NormName::Infinity) { Norm::Infinity } else { Norm::Two },
                ascent_steps: self.ascent_steps.unwrap_or(1),
                second_order: self.second_order.unwrap_or_default(),
            }),
            OptimizerName::Asam => Box::new(Asam { rho, eta: number(self.eta), ..Asam::default() }),
            OptimizerName::RandomSam => Box::new(RandomSam { rho, ..RandomSam::default() }),
            OptimizerName::RSam => Box::new(RSam { rho, sigma: number(self.sigma), ..RSam::default() }),
            OptimizerName::Gsam => Box::new(Gsam { rho, alpha }),
            OptimizerName::LookSam => Box::new(LookSam { rho, alpha, every }),
            OptimizerName::CrSam => {
                let form = if self.form == Some(FormName::Released) { Form::Released } else { Form::Log };
                let [beta, a_min, b_min] = [self.beta, self.a_min, self.b_min].map(number);
                Box::new(CrSam { rho, alpha, beta, form, a_min, b_min })
            }
            OptimizerName::Gnr => Box::new(Gnr {
                rho,
                alpha,
                hvp: if self.hvp == Some(HvpName::Exact) { Hvp::Exact } else { Hvp::Difference },
                oracle: if self.oracle == Some(OracleName::Sam) { Oracle::Sam } else { Oracle::Loss },
                oracle_rho: self.oracle_rho.unwrap_or(Gnr::default().oracle_rho),
                every,
                ..Gnr::default()
            }),
            OptimizerName::Gam => {
                let [beta0, beta1, gamma] = [self.beta0, self.beta1, self.gamma].map(number);
                Box::new(Gam { rho, rho_norm: number(self.rho_norm), beta0, beta1, gamma })
            }
            OptimizerName::SaSam => Box::new(SaSam { delta: number(self.delta), ..SaSam::default() }),
            OptimizerName::SaSgd => Box::new(SaSgd { delta: number(self.delta), ..SaSgd::default() }),
        }
    }

    /// What the optimizer does; of resolved options.
    pub(super) fn optimizer(&self, layout: &Layout) -> optim::Settings<f32> {
        let mut method = self.method();
        let (seed, learning_rate) = (self.seed.unwrap_or_default(), self.lr.unwrap_or_default());
        method.prepare(&Context { layout, seed, learning_rate });
        let name = self.optimizer.unwrap_or(OptimizerName::Sam);
        let base = match name {
            OptimizerName::Sgd => BaseName::Sgd,
            OptimizerName::AdamW => BaseName::AdamW,
            _ => self.base.unwrap_or(BaseName::Sgd),
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
            clip: self.clip,
        }
    }

    /// After every how many epochs to measure the curvature, and what of it.
    pub(super) fn curvature(&self) -> Option<(u64, CurvatureSettings)> {
        let every = self.curvature_every.filter(|&every| every > 0)?;
        let mut settings = CurvatureSettings { seed: self.seed.unwrap_or_default(), ..CurvatureSettings::default() };
        settings.measures = self.curvature_measures.clone().unwrap_or(settings.measures);
        settings.probes = self.curvature_probes.unwrap_or(settings.probes);
        Some((every, settings))
    }

    /// How ρ moves; of resolved options.
    pub(super) fn rho_schedule(&self) -> RhoSchedule {
        match self.rho_schedule {
            Some(RhoScheduleName::Linear) => RhoSchedule::Linear,
            Some(RhoScheduleName::LearningRate) => RhoSchedule::LearningRate,
            _ => RhoSchedule::Constant,
        }
    }

    /// How the learning rate moves over `steps` steps; of resolved options.
    pub(super) fn schedule(&self, steps: u64) -> optim::Schedule {
        let decay = match self.schedule.unwrap_or(ScheduleName::Constant) {
            ScheduleName::Constant => Decay::Constant,
            ScheduleName::Cosine => Decay::Cosine,
            ScheduleName::Step => Decay::Step,
        };
        optim::Schedule { peak: self.lr.unwrap_or_default(), decay, warmup: self.warmup.unwrap_or_default(), steps }
    }
}
