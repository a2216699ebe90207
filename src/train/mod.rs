//! Training, evaluation and curvature over images: settings, the loop, logs, weights and checkpoints in files.

mod checkpoint;
mod curvature;
mod error;
mod evaluate;
mod files;
mod images;
pub mod landscape;
mod log;
mod run;
mod settings;
pub mod weights;

pub use curvature::{CurvatureMeter, CurvatureSettings, Finding, Findings};
pub use error::TrainError;
pub use evaluate::{Evaluation, Evaluator};
pub use files::{checksum, write_whole};
pub use images::{Batch, normalization, open_data, open_device, open_split};
pub use log::Record;
pub use run::{Progress, Summary, train};
pub use settings::{
    AugmentName, BaseName, FormName, HvpName, Measure, NormName, OptimizerName, Options, OracleName, PrecisionName,
    RhoScheduleName, ScheduleName, ShortcutName,
};
