//! Reports and pictures.

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::error::Failure;

/// Writes the page that compares runs. Answers with its path.
#[pyfunction]
#[pyo3(signature = (runs, out=None, tensorboard=false))]
pub fn report(py: Python<'_>, runs: Vec<PathBuf>, out: Option<PathBuf>, tensorboard: bool) -> Result<PathBuf, Failure> {
    Ok(py.detach(|| polder::report::report(&runs, out.as_deref(), tensorboard))?.report)
}

/// Draws the pictures of a landscape from its folder; their paths.
#[pyfunction]
pub fn landscape_pictures(py: Python<'_>, folder: PathBuf) -> Result<Vec<PathBuf>, Failure> {
    Ok(py.detach(|| polder::report::landscape_pictures(&folder))?)
}
