//! Errors of the library as Python's exceptions.

use polder::device::Error;
use polder::settings::SettingError;
use polder::train::TrainError;
use pyo3::PyErr;
use pyo3::exceptions::{PyArithmeticError, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};

/// An error on its way to Python.
pub struct Failure(pub PyErr);

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        Self(match error {
            Error::OutOfMemory { .. } => PyMemoryError::new_err(text),
            Error::NotFinite { .. } | Error::ZeroGradient { .. } => PyArithmeticError::new_err(text),
            Error::Length { .. } | Error::Range { .. } | Error::Argument { .. } | Error::OtherDevice { .. } => {
                PyValueError::new_err(text)
            }
            _ => PyRuntimeError::new_err(text),
        })
    }
}

impl From<SettingError> for Failure {
    fn from(error: SettingError) -> Self {
        Self(PyValueError::new_err(error.to_string()))
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self(PyOSError::new_err(error.to_string()))
    }
}
