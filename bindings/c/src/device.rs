//! Devices, and memory of the caller on them.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard};

use polder::device::{Device, Element, HostOptions, Slice, SliceMut};
use polder::kernels::vector::Reduction;

use crate::error::{Failure, Result, give, guard, object, polder_status};

/// The type of the numbers of a vector.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum polder_type {
    /// 32-bit floats.
    F32 = 0,
    /// 64-bit floats, on the CPU only.
    F64 = 1,
}

/// The type that a caller names. C passes any number, so it is checked before it becomes an enum.
pub(crate) fn checked_type(number: i32) -> Result<polder_type> {
    match number {
        0 => Ok(polder_type::F32),
        1 => Ok(polder_type::F64),
        other => Err(Failure::argument(format!("type {other}, expected POLDER_TYPE_F32 or POLDER_TYPE_F64"))),
    }
}

/// A device: the CPU or a GPU with a stream.
pub struct polder_device {
    pub(crate) device: Device,
    /// Memory for the partial sums of norms and products.
    reduction: Mutex<Reduction>,
}

impl polder_device {
    pub(crate) fn new(device: Device) -> Result<Self> {
        let reduction = Mutex::new(Reduction::new(&device)?);
        Ok(Self { device, reduction })
    }

    fn boxed(device: Device) -> Result<*mut Self> {
        Ok(Box::into_raw(Box::new(Self::new(device)?)))
    }

    pub(crate) fn reduction(&self) -> Result<MutexGuard<'_, Reduction>> {
        // Partial sums are written before they are read, so those of a call that panicked do no harm.
        self.reduction.try_lock().or_else(|error| match error {
            std::sync::TryLockError::Poisoned(poisoned) => Ok(poisoned.into_inner()),
            std::sync::TryLockError::WouldBlock => Err(Failure::busy("device")),
        })
    }

    /// Numbers of the caller, to read.
    ///
    /// # Safety
    /// As [`Slice::from_raw`], for the length of the call.
    pub(crate) unsafe fn read<T: Element>(&self, name: &str, data: *const c_void, n: usize) -> Result<Slice<'_, T>> {
        if data.is_null() && n > 0 {
            return Err(Failure::null(name));
        }
        // SAFETY: the caller's.
        let slice = unsafe { Slice::from_raw(&self.device, data.expose_provenance() as u64, n) };
        slice.map_err(|error| Failure::argument(format!("`{name}`: {error}")))
    }

    /// Numbers of the caller, to write.
    ///
    /// # Safety
    /// As [`SliceMut::from_raw`], for the length of the call.
    pub(crate) unsafe fn write<T: Element>(&self, name: &str, data: *mut c_void, n: usize) -> Result<SliceMut<'_, T>> {
        if data.is_null() && n > 0 {
            return Err(Failure::null(name));
        }
        // SAFETY: the caller's.
        let slice = unsafe { SliceMut::from_raw(&self.device, data.expose_provenance() as u64, n) };
        slice.map_err(|error| Failure::argument(format!("`{name}`: {error}")))
    }
}

/// The CPU, with so many threads; 0 takes one per core.
///
/// # Safety
/// `device` is NULL or valid for a pointer to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_device_cpu(threads: u32, device: *mut *mut polder_device) -> polder_status {
    guard(|| {
        let most = HostOptions::MOST_THREADS;
        if threads as usize > most {
            return Err(Failure::argument(format!("{threads} threads, expected at most {most}")));
        }
        let mut options = HostOptions::default();
        if threads > 0 {
            options.threads = threads as usize;
        }
        // SAFETY: the caller's.
        unsafe { give("device", device, std::ptr::null_mut())? };
        let made = polder_device::boxed(Device::host_with(options))?;
        // SAFETY: as above.
        unsafe { give("device", device, made) }
    })
}

/// GPU number `ordinal`, with a stream of its own.
///
/// # Safety
/// `device` is NULL or valid for a pointer to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_device_cuda(ordinal: u32, device: *mut *mut polder_device) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        unsafe { give("device", device, std::ptr::null_mut())? };
        let made = polder_device::boxed(Device::cuda(ordinal as usize)?)?;
        // SAFETY: as above.
        unsafe { give("device", device, made) }
    })
}

/// GPU number `ordinal`, with its work on a stream of the caller: a `CUstream` or `cudaStream_t` of the GPU's primary
/// context, NULL for the default stream. The stream must outlive the device and every optimizer made for it.
///
/// # Safety
/// `stream` is as described; `device` is NULL or valid for a pointer to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_device_adopt(
    ordinal: u32,
    stream: *mut c_void,
    device: *mut *mut polder_device,
) -> polder_status {
    guard(|| {
        // SAFETY: the caller's.
        unsafe { give("device", device, std::ptr::null_mut())? };
        // SAFETY: the caller's.
        let made = polder_device::boxed(unsafe { Device::adopt(ordinal as usize, stream) }?)?;
        // SAFETY: as above.
        unsafe { give("device", device, made) }
    })
}

/// Waits until all work of the device so far has finished. On the CPU there is nothing to wait for.
///
/// # Safety
/// `device` is NULL or a live device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_device_synchronize(device: *const polder_device) -> polder_status {
    // SAFETY: the caller's.
    guard(|| Ok(unsafe { object("device", device) }?.device.synchronize()?))
}

/// Gives a device up. Optimizers that were made for it stay usable. NULL does nothing.
///
/// # Safety
/// `device` is NULL, or a live device that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polder_device_free(device: *mut polder_device) {
    guard(|| {
        if !device.is_null() {
            // SAFETY: `polder_device::new` made it with a box, and the caller gives it up.
            drop(unsafe { Box::from_raw(device) });
        }
        Ok(())
    });
}
