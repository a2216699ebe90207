//! Measures of curvature over tensors of another framework.

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, TryLockError};

use polder::curvature::{Curvature, Eigenpair, Estimate};
use polder::device::{Device, Scalar, Slice, SliceMut};
use polder::kernels::gather::Gather;
use polder::kernels::vector::Reduction;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::Failure;
use crate::objective::{Functions, Places, open};

struct Inner {
    device: Device,
    places: Places,
    gather: Gather,
    reduction: Reduction,
}

/// Measures at weights in a flat vector that the caller owns. The functions are those of an engine; `product` answers
/// with the addresses of the product's tensors.
#[pyclass(frozen)]
pub struct Probe {
    inner: Mutex<Inner>,
    double: bool,
    weights: u64,
    evaluate: Py<PyAny>,
    loss: Option<Py<PyAny>>,
    product: Option<Py<PyAny>>,
}

/// An estimate: the mean, its standard error if there are several probes.
type Mean = (f64, Option<f64>);

fn mean(estimate: Estimate) -> Mean {
    (estimate.value, estimate.standard_error)
}

impl Probe {
    fn lock(&self) -> Result<MutexGuard<'_, Inner>, Failure> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(inner),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Failure(PyRuntimeError::new_err("a measurement is in progress"))),
        }
    }

    fn measure<T: Scalar, R>(
        &self,
        work: impl FnOnce(&mut Curvature<'_, T>) -> polder::device::Result<R>,
    ) -> Result<R, Failure> {
        let mut inner = self.lock()?;
        let Inner { device, places, gather, reduction } = &mut *inner;
        // SAFETY: the Python half passes the address of its own flat vector, which it keeps alive.
        let weights = unsafe { Slice::from_raw(device, self.weights, places.len) }?;
        let mut functions = Functions {
            device,
            places,
            gather,
            reduction,
            evaluate: &self.evaluate,
            loss: self.loss.as_ref(),
            product: self.product.as_ref(),
            raised: None,
        };
        let result = Curvature::<T>::new(&mut functions, weights).and_then(|mut curvature| work(&mut curvature));
        functions.result(result)
    }
}

/// Runs a measurement in the probe's type, without the interpreter's lock.
macro_rules! measure {
    ($probe:expr, $py:expr, $curvature:ident => $work:expr) => {
        $py.detach(|| {
            if $probe.double {
                $probe.measure::<f64, _>(|$curvature| $work)
            } else {
                $probe.measure::<f32, _>(|$curvature| $work)
            }
        })
    };
}

/// Calls a Python function after each probe or product, and keeps the first exception of it.
struct Progress<'a> {
    function: Option<&'a Py<PyAny>>,
    raised: RefCell<Option<PyErr>>,
}

impl<'a> Progress<'a> {
    fn new(function: &'a Option<Py<PyAny>>) -> Self {
        Self { function: function.as_ref(), raised: RefCell::new(None) }
    }

    fn call(&self, done: usize) {
        let Some(function) = self.function else { return };
        if let Err(error) = Python::attach(|py| function.call1(py, (done,))) {
            self.raised.borrow_mut().get_or_insert(error);
        }
    }

    /// The result of the measurement, unless the function has raised.
    fn result<R>(self, result: polder::device::Result<R>) -> polder::device::Result<Result<R, PyErr>> {
        match self.raised.into_inner() {
            Some(error) => Ok(Err(error)),
            None => result.map(Ok),
        }
    }
}

/// The eigenvalues with their residuals. The vectors are copied to the addresses.
fn pairs<T: Scalar>(found: Vec<Eigenpair<T>>, into: &[u64]) -> polder::device::Result<Vec<(f64, f64)>> {
    for (pair, &address) in found.iter().zip(into) {
        let device = pair.vector.device();
        // SAFETY: the Python half passes the addresses of flat vectors that it has made for the results.
        unsafe { SliceMut::from_raw(device, address, pair.vector.len()) }?.copy_from(pair.vector.view())?;
    }
    Ok(found.into_iter().map(|pair| (pair.value, pair.residual)).collect())
}

#[pymethods]
impl Probe {
    #[new]
    fn new(
        place: (String, usize, usize),
        double: bool,
        lengths: Vec<usize>,
        weights: u64,
        evaluate: Py<PyAny>,
        loss: Option<Py<PyAny>>,
        product: Option<Py<PyAny>>,
    ) -> Result<Self, Failure> {
        let device = open((&place.0, place.1, place.2))?;
        let (gather, reduction) = (Gather::new(&device)?, Reduction::new(&device)?);
        let inner = Inner { device, places: Places::new(&lengths), gather, reduction };
        Ok(Self { inner: Mutex::new(inner), double, weights, evaluate, loss, product })
    }

    /// The norm of the gradient.
    fn gradient_norm(&self, py: Python<'_>) -> Result<f64, Failure> {
        measure!(self, py, curvature => curvature.gradient_norm())
    }

    /// The curvature along the gradient.
    fn along_gradient(&self, py: Python<'_>) -> Result<f64, Failure> {
        measure!(self, py, curvature => curvature.along_gradient())
    }

    /// The trace by Hutchinson's estimator.
    #[pyo3(signature = (probes, seed, progress=None))]
    fn trace(&self, py: Python<'_>, probes: usize, seed: u64, progress: Option<Py<PyAny>>) -> Result<Mean, Failure> {
        let found = measure!(self, py, curvature => {
            let progress = Progress::new(&progress);
            let found = curvature.trace(probes, seed, |done| progress.call(done));
            progress.result(found)
        })?;
        Ok(mean(found?))
    }

    /// The trace by Hutch++.
    fn hutch_plus_plus(&self, py: Python<'_>, products: usize, seed: u64) -> Result<Mean, Failure> {
        measure!(self, py, curvature => curvature.trace_hutch_plus_plus(products, seed, |_| {}).map(mean))
    }

    /// The trace of each tensor's block.
    fn traces(&self, py: Python<'_>, probes: usize, seed: u64) -> Result<Vec<Mean>, Failure> {
        let tensors = self.lock()?.places.tensors.clone();
        let found = measure!(self, py, curvature => curvature.traces(&tensors, probes, seed, |_| {}))?;
        Ok(found.into_iter().map(mean).collect())
    }

    /// Eigenvalues with residuals: the largest by Lanczos's method, or with `power` the largest in magnitude by power
    /// iteration. Eigenvectors go to the addresses in `into`.
    fn eigenvalues(
        &self,
        py: Python<'_>,
        power: bool,
        count: usize,
        most: usize,
        tolerance: f64,
        seed: u64,
        into: Vec<u64>,
    ) -> Result<Vec<(f64, f64)>, Failure> {
        let limits = (most, tolerance);
        measure!(self, py, curvature => {
            let found = if power {
                curvature.power_iteration(count, limits, seed, |_| {})
            } else {
                curvature.top_eigenvalues(count, limits, seed, |_| {})
            };
            pairs(found?, &into)
        })
    }

    /// Nodes and weights of the density of the eigenvalues.
    #[pyo3(signature = (probes, steps, seed, progress=None))]
    fn spectrum(
        &self,
        py: Python<'_>,
        probes: usize,
        steps: usize,
        seed: u64,
        progress: Option<Py<PyAny>>,
    ) -> Result<(Vec<f64>, Vec<f64>), Failure> {
        let found = measure!(self, py, curvature => {
            let progress = Progress::new(&progress);
            let found = curvature.spectral_density(probes, steps, seed, |done| progress.call(done));
            progress.result(found)
        })??;
        Ok((found.nodes, found.weights))
    }

    /// The rise of the loss within a ball: after one step along the gradient, and the largest one.
    fn rise(&self, py: Python<'_>, rho: f64, steps: usize, seed: u64) -> Result<(f64, f64), Failure> {
        let found = measure!(self, py, curvature => curvature.rise(rho, steps, seed))?;
        Ok((found.one_step, found.largest))
    }
}
