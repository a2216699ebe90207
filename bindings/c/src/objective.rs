//! A callback of the caller as the function that is minimised.

use std::ffi::c_void;
use std::ptr;

use polder::device::{self, Error, Scalar, Slice, SliceMut};
use polder::kernels::vector;
use polder::objective::{Domain, Objective, Pass, RunningStats};

use crate::error::{Failure, Result, object, polder_status};

/// A loss with its gradient, as functions of the caller. They are called on the thread of the call that needs them, and
/// must not throw. Each returns 0, or another number to end the call with `POLDER_STATUS_CALLBACK`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polder_objective {
    /// sizeof(polder_objective). Later versions may add fields at the end.
    pub size: usize,
    /// Passed to the functions as it is.
    pub context: *mut c_void,
    /// Writes the loss at `weights` to `loss` and its gradient to `gradient`. All three lie on the device.
    /// `updates_statistics` is 1 in a pass at the unperturbed weights, where running statistics follow, and 0 in all
    /// others.
    pub gradient: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            weights: *const c_void,
            gradient: *mut c_void,
            loss: *mut f64,
            updates_statistics: i32,
        ) -> i32,
    >,
    /// Writes the product of the Hessian at `weights` with `direction` to `product`. NULL if there is none: then
    /// methods that need it are answered with `POLDER_STATUS_ARGUMENT`, and so are measurements without a
    /// `difference_step`.
    pub hessian_vector: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            weights: *const c_void,
            direction: *const c_void,
            product: *mut c_void,
        ) -> i32,
    >,
    /// If `hessian_vector` is NULL: the distance s from the weights at which `polder_curvature_*` takes two gradients
    /// for each product with a direction d, as the central difference of both. 0 if it shall not. Without rounding the
    /// error of a product is about |d| s^2/6 times the third derivative of the gradient along d/|d|. Rounding adds
    /// about |d| e (|g| + |H| |w|)/s, where e is 1e-7 for f32 and 2e-16 for f64. A good s lies near 5e-3 |w| for f32
    /// and 6e-6 |w| for f64. Where the gradient has kinks, as in a network with ReLU, no s makes the error small.
    pub difference_step: f64,
}

/// The callbacks as an objective of `len` weights.
pub(crate) struct Callbacks {
    functions: polder_objective,
    len: usize,
    /// What a callback returned, and which.
    failed: Option<(&'static str, i32)>,
}

impl Callbacks {
    /// # Safety
    /// `functions` is NULL, or valid for the `size` bytes that it begins with; its functions may be called until the
    /// call of the library ends.
    pub unsafe fn new(functions: *const polder_objective, len: usize) -> Result<Self> {
        // SAFETY: the caller's. The size is read before anything else.
        let size = unsafe { *object("objective", functions.cast::<usize>())? };
        if size != size_of::<polder_objective>() {
            let expected = size_of::<polder_objective>();
            return Err(Failure::argument(format!("`objective`: size {size}, expected {expected}")));
        }
        // SAFETY: the caller's.
        let functions = unsafe { *functions };
        if functions.gradient.is_none() {
            return Err(Failure::null("objective.gradient"));
        }
        Ok(Self { functions, len, failed: None })
    }

    /// The distance of differences that stand for products with the Hessian, if there are no others.
    pub fn difference_step(&self) -> Option<f64> {
        let polder_objective { hessian_vector, difference_step, .. } = self.functions;
        (hessian_vector.is_none() && difference_step != 0.0).then_some(difference_step)
    }

    /// The result of a call with this objective: a callback that failed comes before what followed from it.
    pub fn result<R>(&self, result: device::Result<R>) -> Result<R> {
        match self.failed {
            None => Ok(result?),
            Some((name, code)) => {
                Err(Failure { status: polder_status::Callback, reason: format!("objective.{name} returned {code}") })
            }
        }
    }

    /// Notes what a callback returned.
    fn check(&mut self, name: &'static str, code: i32) -> device::Result<()> {
        if code == 0 {
            return Ok(());
        }
        self.failed.get_or_insert((name, code));
        Err(Error::Argument { operation: "polder_objective", message: format!("{name} returned {code}") })
    }

    fn gradient<T: Scalar>(
        &mut self,
        weights: Slice<'_, T>,
        running_stats: RunningStats,
        gradient: &mut SliceMut<'_, T>,
        loss: &mut SliceMut<'_, f64>,
    ) -> device::Result<()> {
        let Some(function) = self.functions.gradient else { return Ok(()) };
        let updates = i32::from(running_stats == RunningStats::Update);
        let (to, number) = (write_pointer(gradient), write_pointer(loss).cast());
        // SAFETY: the caller of the library vouches for the function. The pointers are to vectors of `len` elements and
        // to one number, borrowed for the call.
        let code = unsafe { function(self.functions.context, read_pointer(&weights), to, number, updates) };
        self.check("gradient", code)
    }
}

fn read_pointer<T: Scalar>(slice: &Slice<'_, T>) -> *const c_void {
    ptr::with_exposed_provenance(slice.address() as usize)
}

fn write_pointer<T: Scalar>(slice: &mut SliceMut<'_, T>) -> *mut c_void {
    ptr::with_exposed_provenance_mut(slice.address() as usize)
}

/// Sets the flag if the loss is not finite. On a GPU it stays on the device, where a loss that is not finite shows in
/// the gradient.
fn check_loss(loss: Slice<'_, f64>, flag: &mut SliceMut<'_, u32>) -> device::Result<()> {
    if loss.device().is_host() { vector::check_finite(loss, flag.reborrow()) } else { Ok(()) }
}

impl<T: Scalar> Objective<T> for Callbacks {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.len)
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> device::Result<()> {
        match pass {
            Pass::Gradient { weights, running_stats, mut gradient, mut loss, mut flag } => {
                self.gradient(weights, running_stats, &mut gradient, &mut loss)?;
                check_loss(loss.view(), &mut flag)?;
                vector::check_finite(gradient.view(), flag)
            }
            // The check and the norm in one pass.
            Pass::GradientAndNorm { weights, running_stats, mut gradient, mut loss, mut flag, reduction, norm } => {
                self.gradient(weights, running_stats, &mut gradient, &mut loss)?;
                check_loss(loss.view(), &mut flag)?;
                vector::finish_gradient(gradient, None, flag, reduction, norm)
            }
            Pass::HessianVector { weights, direction, mut product, flag } => {
                let Some(function) = self.functions.hessian_vector else {
                    return Pass::HessianVector { weights, direction, product, flag }.split(self);
                };
                let (at, along) = (read_pointer(&weights), read_pointer(&direction));
                // SAFETY: as in `gradient`.
                let code = unsafe { function(self.functions.context, at, along, write_pointer(&mut product)) };
                self.check("hessian_vector", code)?;
                vector::check_finite(product.view(), flag)
            }
            other => other.split(self),
        }
    }
}
