//! Random vectors. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
//! The element at position p of the stream `seed` is word `p % 4` of the block with counter `p / 4` and key `seed`. So
//! element i depends only on `seed` and `offset + i`: it has the same bits on every device and in every launch shape,
//! whichever part of a vector is generated. Double precision gets the same numbers as single.

use super::vector::Reduction;
use super::{Check, pick};
#[cfg(doc)]
use crate::device::Error;
use crate::device::arguments::{PerturbNormalArgs, PhiloxArgs, PhiloxBlock, RandomArgs};
use crate::device::{Element, Kernel, Launch, Result, Scalar, Slice, SliceMut, id};

fn generate<T: Element>(kernel: Kernel<RandomArgs>, mut out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    let device = out.device().clone();
    let n = out.len();
    let args = RandomArgs { out: out.address(), n: n as u64, seed, offset };
    // SAFETY: `out` is n elements borrowed exclusively.
    unsafe { device.launch(kernel, device.elementwise(n, 4), &args) }
}

/// The key for one purpose: with it, one seed gives independent numbers for different purposes.
pub fn key(seed: u64, purpose: &[u8; 8]) -> u64 {
    seed ^ u64::from_be_bytes(*purpose)
}

/// The generator's words. Traffic: writes 4 B per element.
///
/// # Errors
/// Those of the launch.
pub fn bits(out: SliceMut<'_, u32>, seed: u64, offset: u64) -> Result<()> {
    generate(id::RANDOM_BITS, out, seed, offset)
}

/// Uniform numbers in [0, 1), multiples of 2^-24: the upper 24 bits of each word. Traffic: writes 4 B per element.
///
/// # Errors
/// Those of the launch.
pub fn uniform<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T, _>(id::UNIFORM_F32, id::UNIFORM_F64), out, seed, offset)
}

/// Standard normal numbers, at most 6.66 in magnitude, by Box and Muller's transform: positions 2k and 2k + 1 are
/// `sqrt(−2 ln u)` times `cos 2πv` and `sin 2πv`, with `u = (word + 1)/2^32` from position 2k and `v = word/2^32` from
/// position 2k + 1. Traffic: writes 4 B per element.
///
/// # Errors
/// Those of the launch.
pub fn normal<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T, _>(id::NORMAL_F32, id::NORMAL_F64), out, seed, offset)
}

/// +1 or −1, each with probability ½: the upper bit of each word. Traffic: writes 4 B per element.
///
/// # Errors
/// Those of the launch.
pub fn rademacher<T: Scalar>(out: SliceMut<'_, T>, seed: u64, offset: u64) -> Result<()> {
    generate(pick::<T, _>(id::RADEMACHER_F32, id::RADEMACHER_F64), out, seed, offset)
}

/// `norm[0] = ‖z‖` of the `n` numbers that [`normal`] draws from position `4 · first_block` on. It reads and writes no
/// vector.
///
/// # Errors
/// [`Error::Length`] unless `norm` holds one number, [`Error::OtherDevice`] unless it lives on the reduction's device.
pub fn normal_norm(
    n: usize,
    seed: u64,
    first_block: u64,
    reduction: &mut Reduction,
    norm: SliceMut<'_, f64>,
) -> Result<()> {
    let (device, partials) = reduction.parts();
    let args = PerturbNormalArgs { w: 0, norm: 0, out: 0, partials, n: n as u64, seed, first_block, rho: 0.0 };
    let shape = device.elementwise(n, 4);
    // SAFETY: this kernel writes only `partials`, which have room for each block that `elementwise` can launch.
    unsafe { device.launch(id::NORMAL_SQUARES, shape, &args)? };
    reduction.finish_norm("random::normal_norm", shape, norm)
}

/// `out = w + ρ z/(norm + 1e-12)`, with z as in [`normal_norm`]. The random direction is never stored. Traffic: 8 B per
/// element.
///
/// # Errors
/// [`Error::Length`] unless `out` is as long as `w` and `norm` holds one number, [`Error::OtherDevice`] unless all live
/// on one device.
pub fn perturb_normal<T: Scalar>(
    w: Slice<'_, T>,
    seed: u64,
    first_block: u64,
    norm: Slice<'_, f64>,
    rho: f64,
    mut out: SliceMut<'_, T>,
) -> Result<()> {
    let device = out.device().clone();
    let check = Check { operation: "random::perturb_normal", device: &device };
    let n = out.len();
    check.argument("w", w, n)?;
    check.argument("norm", norm, 1)?;
    let (w, norm, out) = (w.address(), norm.address(), out.address());
    let args = PerturbNormalArgs { w, norm, out, partials: 0, n: n as u64, seed, first_block, rho };
    let kernel = pick::<T, _>(id::PERTURB_NORMAL_F32, id::PERTURB_NORMAL_F64);
    // SAFETY: both vectors hold n elements.
    unsafe { device.launch(kernel, device.elementwise(n, 4), &args) }
}

/// One block of the generator: the four words for a counter and a key. For tests against known answers.
///
/// # Errors
/// [`crate::device::Error::Length`] unless `out` holds four words.
pub fn philox4x32_10(mut out: SliceMut<'_, u32>, counter: [u32; 4], key: [u32; 2]) -> Result<()> {
    let device = out.device().clone();
    Check { operation: "random::philox4x32_10", device: &device }.argument("out", out.view(), 4)?;
    let args = PhiloxArgs { out: out.address(), counter: PhiloxBlock { v: counter }, key };
    // SAFETY: `out` is four words borrowed exclusively.
    unsafe { device.launch(id::PHILOX_ONCE, Launch::new(1, 1), &args) }
}
