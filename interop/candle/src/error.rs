//! What can go wrong between candle and polder.

use candle_core::{DType, DeviceLocation};

/// An error of an optimizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// candle failed, for example in the closure that computes the loss.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// polder failed.
    #[error(transparent)]
    Polder(#[from] polder::device::Error),
    /// An option of a method.
    #[error(transparent)]
    Setting(#[from] polder::settings::SettingError),
    /// Options that are not a list of `name=value`.
    #[error("option {text}: expected name=value")]
    Option {
        /// The part that is not.
        text: String,
    },
    /// No method has this name.
    #[error("method {name}: expected one of {known}")]
    Method {
        /// The name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A method that is a base optimizer alone was given another base.
    #[error("method {method}: it is a base optimizer itself, and another base was given")]
    Base {
        /// The name of the method.
        method: String,
    },
    /// There is nothing to train.
    #[error("there are no variables to train")]
    NoVariables,
    /// A variable that the optimizer cannot train.
    #[error("variable {index} of shape {shape:?}: {reason}")]
    Variable {
        /// Its place in the list.
        index: usize,
        /// Its shape.
        shape: Vec<usize>,
        /// What is wrong with it.
        reason: String,
    },
    /// A device that polder cannot use.
    #[error("device {location:?}: {reason}")]
    Device {
        /// The device.
        location: DeviceLocation,
        /// Why it cannot be used.
        reason: &'static str,
    },
    /// The closure returned something else than a loss.
    #[error("the loss has the shape {shape:?} and the type {dtype:?}, expected one floating-point number")]
    Loss {
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: DType,
    },
    /// A method took a step without a gradient. None of polder's does.
    #[error("the method took no gradient")]
    NoGradient,
    /// A learning rate that is not a finite number.
    #[error("the learning rate is {lr}, expected a finite number")]
    LearningRate {
        /// The learning rate.
        lr: f64,
    },
    /// The lock of a `VarMap` is poisoned: a thread panicked while it held it.
    #[error("the map of variables cannot be read, because a thread panicked while it used it")]
    Poisoned,
}

/// The result of an optimizer's call.
pub type Result<T> = std::result::Result<T, Error>;
