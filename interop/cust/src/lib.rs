//! polder's kernels and optimizers on memory and streams of [cust](https://docs.rs/cust).
//!
//! Both work in the primary context of a GPU, so an address of one is an address of the other. [`adopt`] makes a device
//! of polder that works on a stream of cust; [`slice()`] and [`slice_mut`] lend it cust's memory. Nothing is copied.
//!
//! ```no_run
//! use cust::prelude::*;
//! use polder::kernels::vector;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let _context = cust::quick_init()?;
//! let stream = Stream::new(StreamFlags::DEFAULT, None)?;
//! let x = DeviceBuffer::from_slice(&[1.0f32; 100])?;
//! let mut y = DeviceBuffer::from_slice(&[2.0f32; 100])?;
//! // SAFETY: the stream outlives the device, and the buffers are not used otherwise before the stream is waited for.
//! unsafe {
//!     let device = polder_cust::adopt(&Device::get_device(0)?, &stream)?;
//!     vector::axpy(3.0, polder_cust::slice(&device, &x)?, polder_cust::slice_mut(&device, &mut y)?)?;
//! }
//! stream.synchronize()?;
//! assert_eq!(y.as_host_vec()?, [5.0; 100]);
//! # Ok(())
//! # }
//! ```

use cust::memory::{DeviceCopy, DevicePointer, DeviceSlice};
use cust::stream::Stream;
use polder::Device;
use polder::device::{Element, Error, Result, Slice, SliceMut};

/// A device of polder whose work runs on a stream of cust, in the order of the stream.
///
/// # Errors
/// As [`Device::adopt`], for example if polder was built without nvcc.
///
/// # Safety
/// The stream was made in the primary context of this GPU, as cust makes every stream outside of
/// `cust::context::legacy`. It outlives the device, its clones and everything made from them.
pub unsafe fn adopt(gpu: &cust::device::Device, stream: &Stream) -> Result<Device> {
    let number = gpu.as_raw();
    let ordinal = usize::try_from(number)
        .map_err(|_| Error::Unavailable { device: format!("cuda:{number}"), reason: "no such GPU".into() })?;
    // SAFETY: the caller's.
    unsafe { Device::adopt(ordinal, stream.as_inner().cast()) }
}

/// Memory of cust, to read. A [`DeviceBuffer`](cust::memory::DeviceBuffer) is a [`DeviceSlice`] too.
///
/// # Errors
/// As [`Slice::from_raw`].
///
/// # Safety
/// The memory lies on this device. Until the work that reads it has finished, it is not freed, and only work on the
/// device's stream writes to it.
pub unsafe fn slice<'a, T: Element + DeviceCopy>(
    device: &'a Device,
    memory: &'a DeviceSlice<T>,
) -> Result<Slice<'a, T>> {
    // SAFETY: the caller's.
    unsafe { slice_at(device, memory.as_device_ptr(), memory.len()) }
}

/// Memory of cust, to write.
///
/// # Errors
/// As [`SliceMut::from_raw`].
///
/// # Safety
/// The memory lies on this device. Until the work that uses it has finished, it is not freed, and only work on the
/// device's stream reads it or writes to it.
pub unsafe fn slice_mut<'a, T: Element + DeviceCopy>(
    device: &'a Device,
    memory: &'a mut DeviceSlice<T>,
) -> Result<SliceMut<'a, T>> {
    // SAFETY: the caller's.
    unsafe { slice_mut_at(device, memory.as_device_ptr(), memory.len()) }
}

/// `len` elements at a pointer of cust, to read.
///
/// # Errors
/// As [`Slice::from_raw`].
///
/// # Safety
/// As [`slice()`], for `len` elements that are allocated and initialised there, for as long as the slice exists.
pub unsafe fn slice_at<T: Element + DeviceCopy>(
    device: &Device,
    pointer: DevicePointer<T>,
    len: usize,
) -> Result<Slice<'_, T>> {
    // SAFETY: the caller's.
    unsafe { Slice::from_raw(device, pointer.as_raw(), len) }
}

/// `len` elements at a pointer of cust, to write.
///
/// # Errors
/// As [`SliceMut::from_raw`].
///
/// # Safety
/// As [`slice_mut`], for `len` elements that are allocated there, for as long as the slice exists.
pub unsafe fn slice_mut_at<T: Element + DeviceCopy>(
    device: &Device,
    pointer: DevicePointer<T>,
    len: usize,
) -> Result<SliceMut<'_, T>> {
    // SAFETY: the caller's.
    unsafe { SliceMut::from_raw(device, pointer.as_raw(), len) }
}
