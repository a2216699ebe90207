//! Training and evaluation: settings, the loop, logs, weights and checkpoints in files.

mod checkpoint;
mod error;
mod evaluate;
mod log;
mod run;
mod settings;
pub mod weights;

pub use error::TrainError;
pub use evaluate::{Evaluation, Evaluator};
pub use log::Record;
pub use run::{Progress, Summary, normalization, open_data, open_device, open_split, train};
pub use settings::{
    AugmentName, BaseName, FormName, NormName, OptimizerName, Options, PrecisionName, ScheduleName, ShortcutName,
};
