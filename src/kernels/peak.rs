//! The CPU's peak rates, against which other kernels can be measured: `kernels/host/peak.cu`.

use crate::device::arguments::PeakArgs;
use crate::device::{Device, Error, Launch, Result, id};

/// What multiplies and adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Vector units, in f32.
    Vector,
    /// Matrix units, which multiply bf16 and add in f32. On a CPU without them vector code does the same.
    Matrix,
}

/// Keeps a unit busy: each of `blocks` blocks does `rounds` rounds of multiply-adds, on 12 vectors or on 4 tiles of
/// sums. A block has one thread. Returns the number of multiply-adds. There is no traffic.
///
/// # Errors
/// [`Error::Argument`] on a GPU; those of the allocation.
pub fn multiply_adds(device: &Device, unit: Unit, blocks: u32, rounds: u64) -> Result<u64> {
    if !device.is_host() {
        let message = "only the CPU has this kernel".into();
        return Err(Error::Argument { operation: "peak::multiply_adds", message });
    }
    let (mut out, mut counts) = (device.zeros::<f32>(blocks as usize)?, device.zeros::<u64>(blocks as usize)?);
    let args = PeakArgs {
        out: out.view_mut().address(),
        multiply_adds: counts.view_mut().address(),
        factor: 0.5,
        addend: 1.0,
        rounds,
    };
    let kernel = match unit {
        Unit::Vector => id::PEAK_VECTOR,
        Unit::Matrix => id::PEAK_MATRIX,
    };
    // SAFETY: both buffers have an element for each block.
    unsafe { device.launch(kernel, Launch::new(blocks, 1), &args)? };
    Ok(counts.to_vec()?.iter().sum())
}
