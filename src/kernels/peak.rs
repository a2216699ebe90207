//! Peak rates of multiply-adds, against which other kernels can be measured: `kernels/host/peak.cu` on the CPU,
//! `kernels/mma_peak.cu` on a GPU.

use crate::device::arguments::{MmaPeakArgs, PeakArgs};
use crate::device::{Device, Error, Launch, Result, id};

/// What multiplies and adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A CPU's vector units, in f32.
    Vector,
    /// Matrix units, which multiply bf16 on a CPU and f16 on a GPU, and add in f32. On a CPU without them vector code
    /// does the same.
    Matrix,
}

/// Threads of a block on a GPU: a warp for each quarter of a multiprocessor.
const GPU_THREADS: u32 = 128;
/// Multiply-adds of a warp in a round: eight products of 16 × 16 by 16 × 8.
const WARP_MULTIPLY_ADDS: u64 = 8 * 16 * 16 * 8;

/// Keeps a unit busy: each of `blocks` blocks does `rounds` rounds of multiply-adds, on 12 vectors or on 4 tiles of
/// sums on the CPU, where a block has one thread, and on 8 tiles in each of four warps on a GPU. Returns the number of
/// multiply-adds. There is no traffic.
///
/// # Errors
/// [`Error::Argument`] for the vector units of a GPU; those of the allocation.
pub fn multiply_adds(device: &Device, unit: Unit, blocks: u32, rounds: u32) -> Result<u64> {
    if device.is_simt() {
        if unit == Unit::Vector {
            let message = "a GPU has this kernel for its matrix units alone".into();
            return Err(Error::Argument { operation: "peak::multiply_adds", message });
        }
        let mut out = device.zeros::<f32>((blocks * GPU_THREADS) as usize)?;
        let args = MmaPeakArgs { out: out.view_mut().address(), rounds };
        // SAFETY: there is an element for each thread.
        unsafe { device.launch(id::MMA_PEAK_F16, Launch::new(blocks, GPU_THREADS), &args)? };
        return Ok(u64::from(blocks) * u64::from(GPU_THREADS / 32) * u64::from(rounds) * WARP_MULTIPLY_ADDS);
    }
    let (mut out, mut counts) = (device.zeros::<f32>(blocks as usize)?, device.zeros::<u64>(blocks as usize)?);
    let args = PeakArgs {
        out: out.view_mut().address(),
        multiply_adds: counts.view_mut().address(),
        factor: 0.5,
        addend: 1.0,
        rounds: rounds.into(),
    };
    let kernel = match unit {
        Unit::Vector => id::PEAK_VECTOR,
        Unit::Matrix => id::PEAK_MATRIX,
    };
    // SAFETY: both buffers have an element for each block.
    unsafe { device.launch(kernel, Launch::new(blocks, 1), &args)? };
    Ok(counts.to_vec()?.iter().sum())
}
