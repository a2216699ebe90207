//! Random vectors. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): the
//! element at position p of the stream `seed` is word `p % 4` of the block with counter `p / 4` and key `seed`. So element i
//! depends on `seed` and `offset + i` alone, and has the same bits on every device, in every launch shape, and whatever part
//! of a vector is generated. Double precision gets the same numbers as single.

use super::{check_length, pick};
use crate::device::{Element, KernelId, Launch, Result, Scalar, SliceMut, id};

#[repr(C)]
#[derive(Clone, Copy)]
struct RandomArgs {
    out: u64,
    n: u64,
    seed: u64,
    offset: u64,
}

fn generate<T: Element>(kernel: KernelId, mut out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let args = RandomArgs { out: out.address(), n: n as u64, seed, offset };
    // SAFETY: the twin of the kernel's struct; `out` is n elements borrowed exclusively.
    unsafe { device.launch(kernel, device.elementwise(n, 4), &args) }
}

/// The generator's words. Traffic: writes 4 B per element.
pub fn bits(out: SliceMut<'_, u32>, seed: u64, offset: u64) -> Result<()> {
    generate(id::RANDOM_BITS, out, seed, offset)
}

/// Uniform numbers in [0, 1), multiples of 2^-24: the upper 24 bits of each word. Traffic: writes 4 B per element.
pub fn uniform<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T>(id::UNIFORM_F32, id::UNIFORM_F64), out, seed, offset)
}

/// Standard normal numbers, at most 6.66 in magnitude, by Box and Muller's transform: positions 2k and 2k + 1 are
/// `sqrt(−2 ln u)` times `cos 2πv` and `sin 2πv`, with `u = (word + 1)/2^32` from position 2k and `v = word/2^32` from position
/// 2k + 1. Traffic: writes 4 B per element.
pub fn normal<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T>(id::NORMAL_F32, id::NORMAL_F64), out, seed, offset)
}

/// +1 or −1, each with probability ½: the upper bit of each word. Traffic: writes 4 B per element.
pub fn rademacher<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T>(id::RADEMACHER_F32, id::RADEMACHER_F64), out, seed, offset)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PhiloxArgs {
    out: u64,
    counter: [u32; 4],
    key: [u32; 2],
}

/// One block of the generator: the four words that it makes of any counter and key.
///
/// # Errors
/// [`crate::device::Error::Length`] unless `out` holds four words.
pub fn philox4x32_10(mut out: SliceMut<'_, u32>, counter: [u32; 4], key: [u32; 2]) -> Result<()> {
    check_length("random::philox4x32_10", "out", out.len(), 4)?;
    let device = out.device().clone();
    let args = PhiloxArgs { out: out.address(), counter, key };
    // SAFETY: the twin of the kernel's struct; `out` is four words borrowed exclusively.
    unsafe { device.launch(id::PHILOX_ONCE, Launch::new(1, 1), &args) }
}
