//! What the benchmarks share: the devices that they run on.

use polder::device::{Device, Error};

/// The device that `POLDER_TEST_DEVICE` names; without it the CPU, and the first GPU if there is one.
///
/// # Errors
/// The named device cannot be used.
pub fn devices() -> Result<Vec<Device>, Error> {
    match std::env::var("POLDER_TEST_DEVICE") {
        Ok(name) => Ok(vec![Device::from_name(&name)?]),
        Err(_) => Ok([Device::host()].into_iter().chain(Device::cuda(0)).collect()),
    }
}
