//! Training, evaluation and curvature over images: settings, the loop, logs, weights and checkpoints in files.

mod average;
mod bootstrap;
mod checkpoint;
mod curvature;
mod error;
mod evaluate;
mod files;
mod finding;
mod folder;
mod images;
pub mod landscape;
mod listing;
mod log;
mod options;
mod queue;
mod recipes;
mod run;
mod settings;
mod state;
mod training;
mod tuning;
pub mod weights;

pub use bootstrap::bootstrapped;
pub use checkpoint::Checkpoint;
pub use curvature::{BatchNormName, CurvatureMeter, CurvatureSettings};
pub use error::TrainError;
pub use evaluate::{Evaluation, Evaluator};
pub use files::{Held, checksum, hold, write_npy, write_whole};
pub(crate) use files::{MOST_FINDINGS, MOST_LINES, MOST_SETTINGS, if_there, read_regular, read_text};
pub use finding::{CurvatureFile, Distribution, Finding, Findings, MeanOver};
pub use folder::{RunImages, RunSplit};
pub use images::{normalization, open_data, open_device, open_split, training_images};
pub use listing::{RunOption, options};
pub use log::Record;
pub use options::Options;
pub(crate) use options::toml_error;
pub use recipes::Recipe;
pub use run::{Progress, Summary, Warning};
pub use settings::{
    AdamWSettings, AugmentPolicy, Augmentation, BaseName, CurvatureLogSettings, DataSettings, LoopSettings, Measure,
    MethodName, ModelName, ModelSettings, MuonSettings, NoiseKind, OptimizerSettings, Precision, RunSettings,
    SgdSettings,
};
pub use training::Training;
