//! Copies between tensors of candle and vectors of polder.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, Var, WithDType};
use polder::device::{Device, Scalar, Slice, SliceMut};
use polder::optim::{Entry, Method};

use crate::error::{Error, Result};

/// A type of weights: `f32`, or on the CPU `f64`.
pub trait Weight: Scalar + WithDType + OnDevice {
    #[doc(hidden)]
    fn method(entry: &Entry) -> Box<dyn Method<Self>>;
    #[doc(hidden)]
    fn values_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Weight for f32 {
    fn method(entry: &Entry) -> Box<dyn Method<Self>> {
        (entry.new)()
    }
    fn values_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(values) = storage { Some(values) } else { None }
    }
}

impl Weight for f64 {
    fn method(entry: &Entry) -> Box<dyn Method<Self>> {
        (entry.new_f64)()
    }
    fn values_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F64(values) = storage { Some(values) } else { None }
    }
}

/// What candle's memory on a GPU asks of a type.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub trait OnDevice:
    candle_core::cuda_backend::CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr
{
}
/// Nothing: the feature `cuda` is off.
#[cfg(not(feature = "cuda"))]
#[doc(hidden)]
pub trait OnDevice {}
impl OnDevice for f32 {}
impl OnDevice for f64 {}

/// The device of polder that works where a device of candle does, in the order of its work.
///
/// # Errors
/// [`Error::Device`] for Metal, and for a GPU without the feature `cuda`; those of [`Device::adopt`].
pub(crate) fn device(of: &candle_core::Device) -> Result<Device> {
    let refused = |reason| Err(Error::Device { location: of.location(), reason });
    match of {
        candle_core::Device::Cpu => Ok(Device::host()),
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(cuda) => {
            let stream = cuda.cuda_stream();
            let ordinal = stream.context().ordinal();
            // SAFETY: a stream of the GPU's primary context, which is the only kind that candle makes. The optimizer
            // keeps candle's device, and so the stream, for longer than this one.
            Ok(unsafe { Device::adopt(ordinal, stream.cu_stream().cast()) }?)
        }
        #[cfg(not(feature = "cuda"))]
        candle_core::Device::Cuda(_) => refused("polder-candle was built without its feature `cuda`"),
        candle_core::Device::Metal(_) => refused("polder has no kernels for Metal"),
    }
}

/// Copies the numbers of a contiguous tensor.
pub(crate) fn read<T: Weight>(from: &Tensor, mut to: SliceMut<'_, T>) -> Result<()> {
    let (storage, layout) = from.storage_and_layout();
    let (start, end) = contiguous(layout)?;
    match &*storage {
        Storage::Cpu(cpu) => to.write(&cpu.as_slice::<T>()?[start..end])?,
        #[cfg(feature = "cuda")]
        Storage::Cuda(cuda) => {
            use candle_core::cuda_backend::cudarc::driver::DevicePtr;
            let stream = cuda.device.cuda_stream();
            let (address, _used) = cuda.as_cuda_slice::<T>()?.device_ptr(&stream);
            let device = to.device();
            // SAFETY: the tensor's memory, which candle allocated on this device and which stays allocated and as it is
            // until the copy, because both are ordered by one stream.
            to.copy_from(unsafe { Slice::from_raw(device, offset::<T>(address, start), end - start) }?)?;
        }
        _ => return Err(Error::Device { location: from.device().location(), reason: "polder has no kernels for it" }),
    }
    Ok(())
}

/// Copies numbers to a variable.
pub(crate) fn write<T: Weight>(from: Slice<'_, T>, to: &Var) -> Result<()> {
    Ok(to.inplace_op1(&Write { from })?)
}

struct Write<'a, T: Weight> {
    from: Slice<'a, T>,
}

impl<T: Weight> InplaceOp1 for Write<'_, T> {
    fn name(&self) -> &'static str {
        "polder-write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (start, end) = contiguous(layout)?;
        let dtype = storage.dtype();
        let Some(values) = T::values_mut(storage) else {
            return Err(candle_core::Error::UnexpectedDType { msg: "polder", expected: T::DTYPE, got: dtype }.bt());
        };
        self.from.read(&mut values[start..end]).map_err(candle_core::Error::wrap)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
        let (start, end) = contiguous(layout)?;
        let stream = storage.device.cuda_stream();
        let (address, _used) = storage.as_cuda_slice_mut::<T>()?.device_ptr_mut(&stream);
        // SAFETY: the variable's memory on this device, which nobody else uses: candle has locked it to write, and all
        // work on it is ordered by one stream.
        let to = unsafe { SliceMut::from_raw(self.from.device(), offset::<T>(address, start), end - start) };
        to.and_then(|mut to| to.copy_from(self.from)).map_err(candle_core::Error::wrap)
    }
}

#[cfg(feature = "cuda")]
fn offset<T>(address: u64, start: usize) -> u64 {
    address + (start * size_of::<T>()) as u64
}

fn contiguous(layout: &Layout) -> candle_core::Result<(usize, usize)> {
    layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op: "polder" })
}
