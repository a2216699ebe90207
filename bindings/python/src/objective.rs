//! Python functions as the function that is minimised.

use std::ffi::{c_uint, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::with_exposed_provenance;
use std::sync::Arc;

use polder::arena::ALIGNMENT;
use polder::device::{self, Buffer, Device, HostOptions, Scalar, Slice, SliceMut};
use polder::kernels::gather::{Gather, Source};
use polder::kernels::vector::{self, Reduction};
use polder::objective::{Domain, Objective, Pass, RunningStats, Scattered};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::Failure;

/// `GOMP_parallel` of an OpenMP runtime: calls a function on all threads of the caller's team.
type OpenMpParallel = unsafe extern "C" fn(
    function: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
    threads: c_uint,
    flags: c_uint,
);

/// Calls the function that `data` points to.
///
/// # Safety
/// `data` is a live `&(dyn Fn() + Sync)`.
unsafe extern "C" fn call(data: *mut c_void) {
    // SAFETY: the caller's.
    let work = unsafe { &*data.cast::<&(dyn Fn() + Sync)>() };
    // A panic must not cross the runtime. What this thread leaves, the calling one does.
    let _ = catch_unwind(AssertUnwindSafe(work));
}

/// The CPU, on the threads of PyTorch. After a pass these wait for work without sleeping, so threads of our own would
/// compete with them.
fn on_openmp(threads: usize, parallel: usize) -> Device {
    // SAFETY: the package passes the address of this function in a library that PyTorch has loaded.
    let parallel: OpenMpParallel =
        unsafe { std::mem::transmute::<*const c_void, _>(with_exposed_provenance(parallel)) };
    Device::host_on(
        threads,
        Arc::new(move |work| {
            let mut data: &(dyn Fn() + Sync) = work;
            // SAFETY: the runtime returns when all calls have, so `data` outlives them. 0 is its own number of threads.
            unsafe { parallel(call, (&raw mut data).cast(), 0, 0) };
        }),
    )
}

/// Where tensors lie: `("cpu", threads, parallel)` with the address of `GOMP_parallel` of a loaded OpenMP or 0, or
/// `("cuda", ordinal, stream)`.
pub fn open(place: (&str, usize, usize)) -> Result<Device, Failure> {
    match place {
        ("cpu", threads, parallel) if parallel != 0 && threads > 1 => Ok(on_openmp(threads, parallel)),
        ("cpu", threads, _) => Ok(Device::host_with(HostOptions { threads, ..HostOptions::default() })),
        ("cuda", ordinal, stream) => {
            let stream: *mut c_void = std::ptr::with_exposed_provenance_mut(stream);
            // SAFETY: the package passes the stream that PyTorch works on, which lives as long as the process.
            Ok(unsafe { Device::adopt(ordinal, stream) }?)
        }
        (kind, ..) => Err(Failure(PyValueError::new_err(format!("device {kind}: expected cpu or cuda")))),
    }
}

/// Where each tensor lies in the flat vector.
pub struct Places {
    /// The places, in order.
    pub tensors: Vec<Range<usize>>,
    padding: Vec<Range<usize>>,
    /// Elements of the vector.
    pub len: usize,
}

impl Places {
    /// Tensors of these lengths, one behind the other, each at a multiple of [`ALIGNMENT`].
    pub fn new(lengths: &[usize]) -> Self {
        let (mut tensors, mut padding, mut end) = (Vec::with_capacity(lengths.len()), Vec::new(), 0usize);
        for &length in lengths {
            let start = end.next_multiple_of(ALIGNMENT);
            if start > end {
                padding.push(end..start);
            }
            end = start + length;
            tensors.push(start..end);
        }
        Self { tensors, padding, len: end }
    }
}

/// What a Python function answers: the loss, or the address of one in double precision on the device (0: the number
/// counts); the address of each tensor's gradient, 0 for one that the loss does not depend on, or `None` if the whole
/// gradient already lies at its place; the address of a scale to divide by, or 0; what keeps the memory at these
/// addresses alive; and whether it holds these gradients until it is dropped, whatever passes follow.
type Answer = (f64, u64, Option<Vec<u64>>, u64, Py<PyAny>, bool);

/// A shorter tensor is gathered in any case: a launch of its own would take longer than to copy it.
const SCATTERED_ELEMENTS: usize = 1 << 16;

/// Python functions over tensors as an objective of a flat vector.
pub struct Functions<'a> {
    pub device: &'a Device,
    pub places: &'a Places,
    pub gather: &'a mut Gather,
    pub reduction: &'a mut Reduction,
    /// `evaluate(weights, updates_statistics, gradient) -> Answer`
    pub evaluate: &'a Py<PyAny>,
    /// `loss(weights) -> (loss, address)`
    pub loss: Option<&'a Py<PyAny>>,
    /// `product(weights, direction) -> list of addresses`
    pub product: Option<&'a Py<PyAny>>,
    /// The exception that a function raised.
    pub raised: Option<PyErr>,
}

impl Functions<'_> {
    /// The result of a call with these functions: an exception comes before what followed from it.
    pub fn result<R>(self, result: device::Result<R>) -> Result<R, Failure> {
        match self.raised {
            Some(error) => Err(Failure(error)),
            None => Ok(result?),
        }
    }

    fn call<A>(&mut self, call: impl FnOnce(Python<'_>) -> PyResult<A>) -> device::Result<A> {
        Python::attach(call).map_err(|error| {
            let message = format!("the function raised {error}");
            self.raised.get_or_insert(error);
            device::Error::Argument { operation: "polder", message }
        })
    }

    /// Gathers the tensors at these addresses, except those that stay.
    fn gather<T: Scalar>(
        &mut self,
        addresses: Option<&[u64]>,
        scale: u64,
        mut out: SliceMut<'_, T>,
        flag: SliceMut<'_, u32>,
        norm: Option<SliceMut<'_, f64>>,
        stays: impl Fn(&Range<usize>) -> bool,
    ) -> device::Result<()> {
        let places = &self.places.tensors;
        let base = out.address();
        let address_of = |tensor: usize| match addresses {
            Some(addresses) => addresses.get(tensor).copied().unwrap_or(0),
            None => base + (places[tensor].start * size_of::<T>()) as u64,
        };
        let mut sources = Vec::with_capacity(places.len());
        for (tensor, place) in places.iter().enumerate() {
            let address = address_of(tensor);
            let source = if address == 0 {
                Source::Zeros
            } else {
                // SAFETY: the Python half keeps every tensor whose address it answers with alive until the call ends,
                // and has checked its device, type and length.
                let tensor = unsafe { Slice::from_raw(self.device, address, place.len()) }?;
                if stays(place) { Source::Stays(tensor) } else { Source::Tensor(tensor) }
            };
            sources.push((source, place.clone()));
        }
        let scale = if scale == 0 {
            None
        } else {
            // SAFETY: as above.
            Some(unsafe { Slice::from_raw(self.device, scale, 1) }?)
        };
        self.gather.run(sources, scale, out, flag, self.reduction, norm)
    }

    fn store_loss(
        &mut self,
        (number, address): (f64, u64),
        mut loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> device::Result<()> {
        if address == 0 {
            loss.write(&[number])?;
        } else {
            // SAFETY: as in `gather`.
            loss.copy_from(unsafe { Slice::from_raw(self.device, address, 1) }?)?;
        }
        // On a GPU a loss that is not finite shows in its gradient.
        if self.device.is_host() { vector::check_finite(loss.view(), flag) } else { Ok(()) }
    }

    fn gradient<T: Scalar>(
        &mut self,
        weights: Slice<'_, T>,
        running_stats: RunningStats,
        mut gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
        norm: Option<SliceMut<'_, f64>>,
        scattered: Option<&mut Scattered<T>>,
    ) -> device::Result<()> {
        let arguments = (weights.address(), running_stats == RunningStats::Update, gradient.address());
        let evaluate = self.evaluate;
        let answer: Answer = self.call(|py| evaluate.call1(py, arguments)?.extract(py))?;
        let (number, address, addresses, scale, owner, holds) = answer;
        self.store_loss((number, address), loss, flag.reborrow())?;
        // On a GPU the launches would take longer than the copy.
        let stay = scattered.is_some() && holds && scale == 0 && self.device.is_host();
        let stays = |place: &Range<usize>| stay && place.len() >= SCATTERED_ELEMENTS;
        self.gather(addresses.as_deref(), scale, gradient, flag, norm, stays)?;
        if let (Some(scattered), Some(addresses)) = (scattered, addresses) {
            for (place, &address) in self.places.tensors.iter().zip(&addresses) {
                if address != 0 && stays(place) {
                    // SAFETY: as in `gather`, and what owns the tensor is kept beside it.
                    let tensor = unsafe { Buffer::from_raw(self.device, address, place.len()) }?;
                    scattered.tensors.push((place.clone(), tensor));
                }
            }
            if !scattered.tensors.is_empty() {
                scattered.owner = Some(Box::new(owner));
            }
        }
        Ok(())
    }
}

impl<T: Scalar> Objective<T> for Functions<'_> {
    fn domain(&self) -> Domain<'_> {
        Domain { len: self.places.len, groups: 1, padding: &self.places.padding }
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> device::Result<()> {
        match pass {
            Pass::Gradient { weights, running_stats, gradient, loss, flag } => {
                self.gradient(weights, running_stats, gradient, loss, flag, None, None)
            }
            // The norm in the pass that gathers the gradient.
            Pass::GradientAndNorm { weights, running_stats, gradient, loss, flag, norm, .. } => {
                self.gradient(weights, running_stats, gradient, loss, flag, Some(norm), None)
            }
            Pass::ScatteredGradient { weights, running_stats, gradient, scattered, loss, flag, norm } => {
                let norm = norm.map(|(_, norm)| norm);
                self.gradient(weights, running_stats, gradient, loss, flag, norm, Some(scattered))
            }
            Pass::Loss { weights, scratch, loss, flag } => {
                let Some(function) = self.loss else {
                    return Pass::Loss { weights, scratch, loss, flag }.split(self);
                };
                let address = weights.address();
                let found = self.call(|py| function.call1(py, (address,))?.extract(py))?;
                self.store_loss(found, loss, flag)
            }
            Pass::HessianVector { weights, direction, product, flag } => {
                let Some(function) = self.product else {
                    return Pass::HessianVector { weights, direction, product, flag }.split(self);
                };
                let arguments = (weights.address(), direction.address());
                let addresses: Vec<u64> = self.call(|py| function.call1(py, arguments)?.extract(py))?;
                self.gather(Some(&addresses), 0, product, flag, None, |_| false)
            }
            other => other.split(self),
        }
    }
}
