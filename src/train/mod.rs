//! Training, evaluation and curvature over images: settings, the loop, logs, weights and checkpoints in files.

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
mod run;
mod settings;
mod state;
mod training;
pub mod weights;

pub use curvature::{CurvatureMeter, CurvatureSettings};
pub use error::TrainError;
pub use evaluate::{Evaluation, Evaluator};
pub(crate) use files::read_regular;
pub use files::{Held, checksum, hold, write_whole};
pub use finding::{CurvatureFile, Finding, Findings, MeanOver};
pub use images::{normalization, open_data, open_device, open_split};
pub use listing::{RunOption, options};
pub use log::Record;
pub use options::Options;
pub(crate) use options::toml_error;
pub use run::{Progress, Summary};
pub use settings::{
    AdamWSettings, Augmentation, BaseName, CurvatureLogSettings, DataSettings, LoopSettings, Measure, MethodName,
    ModelName, ModelSettings, OptimizerSettings, Precision, RunSettings, SgdSettings, same_place,
};
pub use training::Training;
