//! One safe, typed function per kernel: each checks lengths and devices, chooses the launch shape, and states its memory
//! traffic. Element types are `f32`, and on the CPU `f64` too, which makes gradient checks sharp.

pub mod batch_norm;
pub mod clock;
pub mod conv;
pub mod gradient;
pub mod image;
pub mod layers;
pub mod loss;
pub mod max_pool;
pub mod metrics;
pub mod precision;
pub mod random;
pub mod sharpness;
pub mod vector;

use crate::device::{ComputeKernels, Device, Error, Kernel, Result, Scalar};

/// Fails unless `found` is `expected`.
pub(crate) fn check_length(
    operation: &'static str,
    argument: &'static str,
    found: usize,
    expected: usize,
) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { operation, argument, found, expected }) }
}

/// Fails unless `other` is `device`.
pub(crate) fn check_device(
    operation: &'static str,
    argument: &'static str,
    device: &Device,
    other: &Device,
) -> Result<()> {
    if device == other { Ok(()) } else { Err(Error::OtherDevice { operation, argument }) }
}

/// The kernel for `T` out of its two precisions. Double precision exists on the CPU alone.
pub(crate) fn pick<T: Scalar, A>(f32: Kernel<A>, f64: Kernel<A>) -> Kernel<A> {
    T::choose(ComputeKernels { f32, f64, f16: f32, bf16: f32 })
}
