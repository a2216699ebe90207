//! The compiled half of the Python package `polder`. The Python half (`python/polder`) knows tensors; this one knows
//! addresses. It links no other framework: tensors come as addresses and lengths, and stay alive until a call returns.

mod curvature;
mod error;
mod objective;
mod optimizer;
mod report;

use pyo3::prelude::*;

/// The compiled half of polder.
#[pymodule]
mod _polder {
    #[pymodule_export]
    use super::curvature::Probe;
    #[pymodule_export]
    use super::optimizer::{Engine, check_options, direction_seed, methods};
    #[pymodule_export]
    use super::report::{landscape_pictures, report};

    use super::{PyModule, PyModuleMethods, PyResult};
    use pyo3::Bound;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("ALIGNMENT", polder::arena::ALIGNMENT)
    }
}
