//! One safe, typed function per kernel. Each checks lengths and devices, chooses the launch shape, and documents its
//! memory traffic. Element types are `f32`, and on the CPU also `f64`, which makes gradient checks precise.

pub mod attention;
pub mod augment;
pub mod batch_norm;
pub mod bias;
pub mod clock;
pub mod conv;
mod conv_batch_norm;
pub mod gather;
pub mod gradient;
pub mod image;
pub mod layer_norm;
pub mod layers;
pub mod loss;
pub mod max_pool;
pub mod metrics;
pub mod mixing;
pub mod muon;
pub mod peak;
pub mod precision;
pub mod random;
pub mod sassha;
pub mod scale_samples;
pub mod sharpness;
pub mod tokens;
pub mod vector;

pub(crate) use crate::device::check_length;
use crate::device::{ComputeKernels, Device, Element, Error, Kernel, Result, Scalar, Slice};

/// Checks the arguments of one operation: that they live on one device and have the lengths that its shape implies.
#[derive(Clone, Copy)]
pub(crate) struct Check<'a> {
    pub operation: &'static str,
    pub device: &'a Device,
}

impl Check<'_> {
    /// Fails unless the argument has this length and lives on the operation's device.
    pub fn argument<T: Element>(&self, name: &'static str, slice: Slice<'_, T>, expected: usize) -> Result<()> {
        self.device(name, slice.device())?;
        check_length(self.operation, name, slice.len(), expected)
    }

    /// Fails unless an argument's device is the operation's.
    pub fn device(&self, argument: &'static str, device: &Device) -> Result<()> {
        let operation = self.operation;
        if device == self.device { Ok(()) } else { Err(Error::OtherDevice { operation, argument }) }
    }

    /// Fails with a message.
    pub fn refuse<R>(&self, message: String) -> Result<R> {
        Err(Error::Argument { operation: self.operation, message })
    }
}

/// Selects the kernel for `T`. Double precision exists on the CPU only.
pub(crate) fn pick<T: Scalar, A>(f32: Kernel<A>, f64: Kernel<A>) -> Kernel<A> {
    T::choose(ComputeKernels { f32, f64, f16: f32, bf16: f32 })
}
