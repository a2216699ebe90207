//! What the benchmarks share: devices and input numbers.
#![allow(dead_code)]

use polder::device::{Buffer, Compute, Device, Result};

/// The device that `POLDER_TEST_DEVICE` names; without it the CPU, and the first GPU if there is one.
///
/// # Errors
/// The named device cannot be used.
pub fn devices() -> Result<Vec<Device>> {
    match std::env::var("POLDER_TEST_DEVICE") {
        Ok(name) => Ok(vec![Device::from_name(&name)?]),
        Err(_) => Ok([Device::host()].into_iter().chain(Device::cuda(0)).collect()),
    }
}

/// Numbers without a pattern that a cache or a branch predictor could use.
pub fn noise<S: Compute>(device: &Device, len: usize, seed: u32) -> Result<Buffer<S>> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let values: Vec<S> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        S::from_f64(f64::from(state) / f64::from(u32::MAX) - 0.5)
    })
    .take(len)
    .collect();
    device.upload(&values)
}
