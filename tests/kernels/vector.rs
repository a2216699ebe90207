//! The vector kernels against double-precision references, on every device, in every launch shape and order of blocks.

use approx::{abs_diff_eq, relative_eq};

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice, SliceMut};
use polder::kernels::precision;
use polder::kernels::vector::{self, AdamWStep, Combination, CrSamTerms, Rate, Reduction, SgdStep};

const LENGTHS: [usize; 6] = [1, 3, 5, 1023, 4096, 100_003];

/// One rounding to single precision, relative.
const ROUNDING: f64 = 1.0 / 16_777_216.0;

fn half_bits<P: Compute>(buffer: &Buffer<P>) -> Vec<u64> {
    buffer
        .to_vec()
        .unwrap()
        .iter()
        .map(|value| bytemuck::bytes_of(value).iter().fold(0, |bits, &b| bits << 8 | u64::from(b)))
        .collect()
}

/// A vector that spans several orders of magnitude.
fn spread<T: Scalar>(random: &mut Random, n: usize) -> Vec<T> {
    (0..n).map(|_| T::from_f64(random.normal() * 10f64.powi(random.below(5) as i32 - 3))).collect()
}

fn norm_of(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

// ---- Element-wise --------------------------------------------------------------------------------------------------

fn check_fill_and_axpy<T: Scalar>(devices: Vec<(String, Device)>, rounding: f64) {
    for n in LENGTHS {
        let mut random = Random(n as u64);
        let (x, y) = (random.vector::<T>(n), random.vector::<T>(n));
        let alpha = T::from_f64(-0.37);
        let expected: Vec<f64> = to_f64(&x).iter().zip(to_f64(&y)).map(|(x, y)| y + alpha.into() * x).collect();
        on_devices(&devices, true, |name, device| {
            let mut filled = device.poisoned::<T>(n).unwrap();
            vector::fill(filled.view_mut(), 0.1).unwrap();
            let filled = filled.to_vec().unwrap();
            assert!(filled.iter().all(|&value| value == T::from_f64(0.1)), "{name}, n = {n}: fill");
            let from = device.upload(&x).unwrap();
            let mut to = device.upload(&y).unwrap();
            vector::axpy(alpha.into(), from.view(), to.view_mut()).unwrap();
            let to = to.to_vec().unwrap();
            assert_close(&format!("{name}, n = {n}: axpy"), &to, &expected, 2.0 * rounding);
            vec![bits(&filled), bits(&to)]
        });
    }
}

fn check_moving_average<T: Scalar>(devices: Vec<(String, Device)>, rounding: f64) {
    for n in LENGTHS {
        let mut random = Random(n as u64);
        let (x, y) = (random.vector::<T>(n), random.vector::<T>(n));
        // At 8 steps (1 + 8)/(10 + 8) is one half.
        for (steps, decay, used) in [(0, 0.999, 0.1), (8, 0.999, 0.5), (8, 0.25, 0.25), (1_000_000, 0.999, 0.999)] {
            let expected: Vec<f64> =
                to_f64(&x).iter().zip(to_f64(&y)).map(|(x, y)| used * y + (1.0 - used) * x).collect();
            on_devices(&devices, true, |name, device| {
                let clock = device.upload(&[77, steps]).unwrap();
                let (x, mut average) = (device.upload(&x).unwrap(), device.upload(&y).unwrap());
                vector::moving_average(x.view(), decay, clock.view(), average.view_mut()).unwrap();
                let found = average.to_vec().unwrap();
                assert_close(
                    &format!("{name}, n = {n}, {steps} steps, decay {decay}"),
                    &found,
                    &expected,
                    4.0 * rounding,
                );
                vec![bits(&found)]
            });
        }
    }
}

#[test]
fn moving_average() {
    check_moving_average::<f32>(devices(), ROUNDING);
    check_moving_average::<f64>(host_devices(), f64::EPSILON);
    let device = Device::host();
    let (x, clock, mut average) = (device.zeros::<f32>(3).unwrap(), device.zeros(2).unwrap(), device.zeros(3).unwrap());
    for decay in [-0.1, 1.1, f64::NAN] {
        let refused = vector::moving_average(x.view(), decay, clock.view(), average.view_mut());
        assert!(matches!(refused, Err(Error::Argument { .. })), "{decay}");
    }
}

#[test]
fn fill_and_axpy() {
    check_fill_and_axpy::<f32>(devices(), ROUNDING);
    check_fill_and_axpy::<f64>(host_devices(), f64::EPSILON);
}

/// The value of a 16-bit type that is nearest to x, ties to even, among the neighbours of the library's result.
fn nearest<P: Copy>(x: f64, guess: u16, value: impl Fn(u16) -> f64, from_bits: impl Fn(u16) -> P) -> P {
    let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = guess & 0x7fff;
    let candidates = [magnitude.saturating_sub(1), magnitude, (magnitude + 1).min(0x7fff)];
    // Infinity counts as the next power of two: rounding overflows there.
    let distance = |bits: u16| {
        let found = value(bits);
        let found = if found.is_infinite() { 2.0 * value(bits - 1) - value(bits - 2) } else { found };
        (found - x.abs()).abs()
    };
    let best = candidates
        .into_iter()
        .filter(|&bits| !value(bits).is_nan())
        .min_by(|&a, &b| distance(a).partial_cmp(&distance(b)).unwrap().then((a & 1).cmp(&(b & 1))));
    from_bits(sign | best.unwrap())
}

fn nearest_f16(x: f64) -> f16 {
    nearest(x, f16::from_f64(x).to_bits(), |bits| f16::from_bits(bits).to_f64(), f16::from_bits)
}

fn nearest_bf16(x: f64) -> bf16 {
    nearest(x, bf16::from_f64(x).to_bits(), |bits| bf16::from_bits(bits).to_f64(), bf16::from_bits)
}

/// Numbers of every size, and difficult ones: ties, numbers next to ties, subnormals, overflow.
fn delicate_numbers() -> Vec<f64> {
    let mut random = Random(5);
    let mut numbers: Vec<f64> =
        (0..3000).map(|_| random.normal() * 2f64.powi(random.below(300) as i32 - 150)).collect();
    for exponent in [-160, -140, -127, -26, -25, -24, -15, -14, -1, 0, 3, 15, 16, 127] {
        let unit = 2f64.powi(exponent);
        for steps in
            [1.0, 1.0 + 2f64.powi(-11), 1.0 + 3.0 * 2f64.powi(-11), 1.0 + 2f64.powi(-8), 1.0 + 3.0 * 2f64.powi(-8)]
        {
            for hair in [0.0, 2f64.powi(-23), -(2f64.powi(-23)), 2f64.powi(-40), -(2f64.powi(-40))] {
                numbers.extend([unit * (steps + hair), -unit * (steps + hair)]);
            }
        }
    }
    numbers.extend([
        0.0,
        -0.0,
        65504.0,
        65519.0,
        65519.999,
        65520.0,
        3.3895e38,
        3.4e38,
        1e300,
        f64::INFINITY,
        -f64::INFINITY,
    ]);
    numbers
}

fn converted<S: Compute, D: Compute>(device: &Device, x: &[S]) -> Vec<D> {
    let from = device.upload(x).unwrap();
    let mut to = device.poisoned::<D>(x.len()).unwrap();
    vector::convert(from.view(), to.view_mut()).unwrap();
    to.to_vec().unwrap()
}

#[test]
fn conversions_round_to_the_nearest_even() {
    let doubles = delicate_numbers();
    let singles: Vec<f32> = doubles.iter().map(|&x| x as f32).collect();
    for (name, device) in devices() {
        for (found, &x) in converted::<f32, f16>(&device, &singles).iter().zip(&singles) {
            assert_eq!(found.to_bits(), nearest_f16(x.into()).to_bits(), "{name}: {x:e} to f16");
        }
        for (found, &x) in converted::<f32, bf16>(&device, &singles).iter().zip(&singles) {
            assert_eq!(found.to_bits(), nearest_bf16(x.into()).to_bits(), "{name}: {x:e} to bf16");
        }
        assert_eq!(bits(&converted::<f32, f32>(&device, &singles)), bits(&singles), "{name}");
    }
    for (name, device) in host_devices() {
        for (found, &x) in converted::<f64, f16>(&device, &doubles).iter().zip(&doubles) {
            assert_eq!(found.to_bits(), nearest_f16(x).to_bits(), "{name}: {x:e} to f16");
        }
        for (found, &x) in converted::<f64, bf16>(&device, &doubles).iter().zip(&doubles) {
            assert_eq!(found.to_bits(), nearest_bf16(x).to_bits(), "{name}: {x:e} to bf16");
        }
        assert_eq!(bits(&converted::<f64, f32>(&device, &doubles)), bits(&singles), "{name}");
        assert_eq!(bits(&converted::<f64, f64>(&device, &doubles)), bits(&doubles), "{name}");
    }
}

#[test]
fn conversions_from_every_16_bit_pattern() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bfloats: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let same =
        |found: f64, expected: f64| found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
    let check = |what: String, found: Vec<f64>, expected: Vec<f64>| {
        for (pattern, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            assert!(same(found, expected), "{what} {pattern:#06x}: {found:e} instead of {expected:e}");
        }
    };
    let halves_expected: Vec<f64> = halves.iter().map(|x| x.to_f64()).collect();
    let bfloats_expected: Vec<f64> = bfloats.iter().map(|x| x.to_f64()).collect();
    for (name, device) in devices() {
        check(format!("{name}, f16"), to_f64(&converted::<f16, f32>(&device, &halves)), halves_expected.clone());
        check(format!("{name}, bf16"), to_f64(&converted::<bf16, f32>(&device, &bfloats)), bfloats_expected.clone());
        let across: Vec<f64> = converted::<f16, bf16>(&device, &halves).iter().map(|x| x.to_f64()).collect();
        let expected = halves.iter().map(|x| if x.is_nan() { f64::NAN } else { nearest_bf16(x.to_f64()).to_f64() });
        check(format!("{name}, f16 to bf16"), across, expected.collect());
        let across: Vec<f64> = converted::<bf16, f16>(&device, &bfloats).iter().map(|x| x.to_f64()).collect();
        let expected = bfloats.iter().map(|x| if x.is_nan() { f64::NAN } else { nearest_f16(x.to_f64()).to_f64() });
        check(format!("{name}, bf16 to f16"), across, expected.collect());
        let unchanged = |found: Vec<u16>, nan: fn(u16) -> bool| {
            found.iter().enumerate().all(|(pattern, &found)| found == pattern as u16 || nan(pattern as u16))
        };
        let found = converted::<f16, f16>(&device, &halves).iter().map(|x| x.to_bits()).collect();
        assert!(unchanged(found, |pattern| f16::from_bits(pattern).is_nan()), "{name}");
        let found = converted::<bf16, bf16>(&device, &bfloats).iter().map(|x| x.to_bits()).collect();
        assert!(unchanged(found, |pattern| bf16::from_bits(pattern).is_nan()), "{name}");
    }
    for (name, device) in host_devices() {
        check(format!("{name}, f16 to f64"), converted(&device, &halves), halves_expected.clone());
        check(format!("{name}, bf16 to f64"), converted(&device, &bfloats), bfloats_expected.clone());
    }
}

#[test]
fn nan_stays_nan() {
    for (name, device) in devices() {
        let x = vec![f32::NAN; 37];
        assert!(converted::<f32, f16>(&device, &x).iter().all(|x| x.is_nan()), "{name}");
        assert!(converted::<f32, bf16>(&device, &x).iter().all(|x| x.is_nan()), "{name}");
    }
    for (name, device) in host_devices() {
        let x = vec![f64::NAN; 37];
        assert!(converted::<f64, f16>(&device, &x).iter().all(|x| x.is_nan()), "{name}");
        assert!(converted::<f64, bf16>(&device, &x).iter().all(|x| x.is_nan()), "{name}");
        assert!(converted::<f64, f32>(&device, &x).iter().all(|x| x.is_nan()), "{name}");
    }
}

// ---- Reductions ----------------------------------------------------------------------------------------------------

fn check_norm_and_dot<T: Scalar>(devices: Vec<(String, Device)>) {
    for n in LENGTHS {
        let mut random = Random(100 + n as u64);
        let (x, y) = (spread::<T>(&mut random, n), spread::<T>(&mut random, n));
        let (x64, y64) = (to_f64(&x), to_f64(&y));
        let dot: f64 = x64.iter().zip(&y64).map(|(x, y)| x * y).sum();
        let scale: f64 = x64.iter().zip(&y64).map(|(x, y)| (x * y).abs()).sum();
        on_devices(&devices, false, |name, device| {
            let (a, b) = (device.upload(&x).unwrap(), device.upload(&y).unwrap());
            let mut reduction = Reduction::new(device).unwrap();
            let mut out = device.poisoned::<f64>(2).unwrap();
            vector::l2_norm(a.view(), &mut reduction, out.slice_mut(0..1).unwrap()).unwrap();
            vector::dot(a.view(), b.view(), &mut reduction, out.slice_mut(1..2).unwrap()).unwrap();
            let found = out.to_vec().unwrap();
            // Products are exact and sums are in double precision: only the order of the sum differs.
            assert!(
                relative_eq!(found[0], norm_of(&x64), epsilon = 0.0, max_relative = 1e-13),
                "{name}, n = {n}: norm {}",
                found[0]
            );
            assert!(
                abs_diff_eq!(found[1], dot, epsilon = 1e-13 * scale),
                "{name}, n = {n}: dot {} instead of {dot}",
                found[1]
            );
            vec![bits(&found)]
        });
    }
}

#[test]
fn norm_and_dot() {
    check_norm_and_dot::<f32>(devices());
    check_norm_and_dot::<f64>(host_devices());
}

#[test]
fn norms_neither_overflow_nor_vanish() {
    for (name, device) in devices() {
        let mut reduction = Reduction::new(&device).unwrap();
        let mut norm = device.poisoned::<f64>(1).unwrap();
        for size in [1e-38f32, 1e-30, 1e30, 3e38] {
            let x = device.upload(&[size; 100]).unwrap();
            vector::l2_norm(x.view(), &mut reduction, norm.view_mut()).unwrap();
            let found = norm.to_vec().unwrap()[0];
            assert!(abs_diff_eq!(found / (10.0 * f64::from(size)), 1.0, epsilon = 1e-14), "{name}: {found} of {size}");
        }
        let nothing = device.zeros::<f32>(0).unwrap();
        vector::l2_norm(nothing.view(), &mut reduction, norm.view_mut()).unwrap();
        assert_eq!(norm.to_vec().unwrap(), [0.0], "{name}: of no element");
    }
}

#[test]
fn norms_show_what_is_not_finite() {
    for (name, device) in devices() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0f32; 1000];
            x[637] = bad;
            let x = device.upload(&x).unwrap();
            let mut norm = device.zeros::<f64>(1).unwrap();
            vector::l2_norm(x.view(), &mut Reduction::new(&device).unwrap(), norm.view_mut()).unwrap();
            assert!(!norm.to_vec().unwrap()[0].is_finite(), "{name}: {bad}");
        }
    }
}

// ---- Perturbed weights ---------------------------------------------------------------------------------------------

/// `to_f64` for any compute type, and the type's rounding.
trait Side: Compute {
    const ROUNDING: f64;
    fn value(self) -> f64;
}
impl Side for f32 {
    const ROUNDING: f64 = ROUNDING;
    fn value(self) -> f64 {
        self.into()
    }
}
impl Side for f64 {
    const ROUNDING: f64 = f64::EPSILON / 2.0;
    fn value(self) -> f64 {
        self
    }
}
impl Side for f16 {
    const ROUNDING: f64 = 1.0 / 2048.0;
    fn value(self) -> f64 {
        self.to_f64()
    }
}
impl Side for bf16 {
    const ROUNDING: f64 = 1.0 / 256.0;
    fn value(self) -> f64 {
        self.to_f64()
    }
}

fn check_perturb<T: Scalar, P: Side>(devices: Vec<(String, Device)>, rounding: f64) {
    for n in LENGTHS {
        let mut random = Random(200 + n as u64);
        let (w, mut g) = (random.vector::<T>(n), spread::<T>(&mut random, n));
        g[n / 2] = T::from_f64(0.0);
        let (w64, g64) = (to_f64(&w), to_f64(&g));
        let norm = norm_of(&g64).max(0.25);
        let rho = 0.7;
        on_devices(&devices, true, |name, device| {
            let (weights, gradient) = (device.upload(&w).unwrap(), device.upload(&g).unwrap());
            let on_device = device.upload(&[norm]).unwrap();
            let poisoned = || device.poisoned::<P>(n).unwrap();
            let (mut plus, mut minus, mut alone) = (poisoned(), poisoned(), poisoned());
            let mut all = Vec::new();
            for infinity in [false, true] {
                let (w, g) = (weights.view(), gradient.view());
                if infinity {
                    vector::perturb_linf(w, g, rho, plus.view_mut(), Some(minus.view_mut())).unwrap();
                    vector::perturb_linf(w, g, rho, alone.view_mut(), None).unwrap();
                } else {
                    vector::perturb(w, g, on_device.view(), rho, plus.view_mut(), Some(minus.view_mut())).unwrap();
                    vector::perturb(w, g, on_device.view(), rho, alone.view_mut(), None).unwrap();
                }
                let (found_plus, found_minus) = (plus.to_vec().unwrap(), minus.to_vec().unwrap());
                for i in 0..n {
                    let step = match infinity {
                        false => rho * g64[i] / (norm + 1e-12),
                        true if g64[i] == 0.0 => 0.0,
                        true => rho * g64[i].signum(),
                    };
                    for (found, exact) in
                        [(found_plus[i].value(), w64[i] + step), (found_minus[i].value(), w64[i] - step)]
                    {
                        // Scale and product are rounded to T, the sum to T and then to P. The subnormals of P begin at
                        // 6e-5.
                        let bound = 3.0 * rounding * (w64[i].abs() + step.abs()) + P::ROUNDING * exact.abs() + 3e-8;
                        let bound = if P::ROUNDING < 1e-4 { bound - 3e-8 } else { bound };
                        let error = (found - exact).abs();
                        assert!(
                            error <= bound,
                            "{name}, n = {n}, {i}: {found} instead of {exact} ({error:e} > {bound:e})"
                        );
                    }
                    if step == 0.0 {
                        assert_eq!(found_plus[i].value(), found_minus[i].value(), "{name}: a zero gradient");
                    }
                }
                assert!(half_bits(&plus) == half_bits(&alone), "{name}, n = {n}: one side alone differs");
                all.extend([half_bits(&plus), half_bits(&minus)]);
            }
            all
        });
    }
}

#[test]
fn perturb() {
    check_perturb::<f32, f32>(devices(), ROUNDING);
    check_perturb::<f32, f16>(devices(), ROUNDING);
    check_perturb::<f32, bf16>(devices(), ROUNDING);
    check_perturb::<f32, f64>(host_devices(), ROUNDING);
    check_perturb::<f64, f64>(host_devices(), f64::EPSILON / 2.0);
    check_perturb::<f64, f32>(host_devices(), f64::EPSILON / 2.0);
    check_perturb::<f64, f16>(host_devices(), f64::EPSILON / 2.0);
    check_perturb::<f64, bf16>(host_devices(), f64::EPSILON / 2.0);
}

#[test]
fn a_zero_gradient_gives_the_weights_themselves() {
    for (name, device) in devices() {
        let w: Vec<f32> = Random(1).vector(1000);
        let (weights, zero) = (device.upload(&w).unwrap(), device.zeros::<f32>(1000).unwrap());
        let mut norm = device.poisoned::<f64>(1).unwrap();
        vector::l2_norm(zero.view(), &mut Reduction::new(&device).unwrap(), norm.view_mut()).unwrap();
        let (mut plus, mut minus) = (device.poisoned::<f32>(1000).unwrap(), device.poisoned::<f32>(1000).unwrap());
        let sides = (plus.view_mut(), Some(minus.view_mut()));
        vector::perturb(weights.view(), zero.view(), norm.view(), 0.05, sides.0, sides.1).unwrap();
        assert_eq!(plus.to_vec().unwrap(), w, "{name}");
        assert_eq!(minus.to_vec().unwrap(), w, "{name}");
    }
}

#[test]
fn a_nan_in_the_gradient_shows_in_the_perturbed_weights() {
    for (name, device) in devices() {
        let weights = device.upload(&[1.0f32; 9]).unwrap();
        let mut g = [0.5f32; 9];
        g[7] = f32::NAN;
        let gradient = device.upload(&g).unwrap();
        let mut plus = device.poisoned::<f32>(9).unwrap();
        vector::perturb_linf(weights.view(), gradient.view(), 0.1, plus.view_mut(), None).unwrap();
        let found = plus.to_vec().unwrap();
        assert!(found[7].is_nan() && found.iter().filter(|x| x.is_nan()).count() == 1, "{name}: {found:?}");
    }
}

/// Vectors so long that the CPU writes past its caches, in parts that begin at unaligned addresses.
#[test]
fn long_vectors_are_written_to_the_last_element() {
    let n = 9_000_011;
    let mut random = Random(9);
    let w: Vec<f32> = (0..n).map(|_| random.uniform() as f32).collect();
    let g: Vec<f32> = (0..n).map(|_| random.uniform() as f32 - 0.5).collect();
    let host = devices().into_iter().filter(|(name, device)| name.starts_with("cpu") || !device.is_host());
    for (name, device) in host {
        let (weights, gradient) = (device.upload(&w).unwrap(), device.upload(&g).unwrap());
        let norm = device.upload(&[1.0f64]).unwrap();
        for start in [0, 1, 16] {
            let len = n - start - 5;
            let (w, g) = (&w[start..start + len], &g[start..start + len]);
            let (from, by) = (weights.slice(start..start + len).unwrap(), gradient.slice(start..start + len).unwrap());
            let mut plus = device.upload(&vec![7.0f32; n]).unwrap();
            let mut minus = device.upload(&vec![7.0f32; n]).unwrap();
            let (plus_part, minus_part) = (start..start + len, start..start + len);
            let sides = (plus.slice_mut(plus_part).unwrap(), Some(minus.slice_mut(minus_part).unwrap()));
            vector::perturb(from, by, norm.view(), 1.0, sides.0, sides.1).unwrap();
            for (found, sign) in [(plus.to_vec().unwrap(), 1.0), (minus.to_vec().unwrap(), -1.0)] {
                let untouched = found[..start].iter().chain(&found[start + len..]).all(|&x| x == 7.0);
                assert!(untouched, "{name}: wrote beside its part");
                let written = found[start..].iter().zip(w).zip(g);
                let wrong = written.enumerate().find(|(_, ((found, w), g))| {
                    (f64::from(**found) - (f64::from(**w) + sign * f64::from(**g))).abs() > 2.0 * ROUNDING
                });
                assert!(wrong.is_none(), "{name}, start {start}: {wrong:?}");
            }
            let mut halves = device.upload(&vec![f16::from_f32(7.0); n]).unwrap();
            vector::convert(from, halves.slice_mut(start..start + len).unwrap()).unwrap();
            let found = halves.to_vec().unwrap();
            let untouched = found[..start].iter().chain(&found[start + len..]).all(|x| x.to_f32() == 7.0);
            assert!(untouched, "{name}: wrote beside its part");
            let wrong =
                found[start..].iter().zip(w).position(|(found, &w)| found.to_bits() != f16::from_f32(w).to_bits());
            assert_eq!(wrong, None, "{name}, start {start}: f16");
            vector::fill(plus.slice_mut(start..start + len).unwrap(), 0.5).unwrap();
            let found = plus.to_vec().unwrap();
            let right =
                found.iter().enumerate().all(|(i, &x)| x == if (start..start + len).contains(&i) { 0.5 } else { 7.0 });
            assert!(right, "{name}, start {start}: fill");
        }
    }
}

/// Parts of buffers that allow no 16-byte access. Their neighbours must not change.
#[test]
fn parts_of_buffers_that_begin_anywhere() {
    let n = 5000;
    let mut random = Random(12);
    let x: Vec<f32> = random.vector(n);
    let y: Vec<f32> = random.vector(n);
    on_devices(&devices(), false, |name, device| {
        let from = device.upload(&x).unwrap();
        let mut reduction = Reduction::new(device).unwrap();
        let mut all = Vec::new();
        for start in 0..5 {
            for len in [1, 2, 3, 4, 7, 4001] {
                let part = start..start + len;
                let mut to = device.upload(&y).unwrap();
                vector::axpy(2.0, from.slice(part.clone()).unwrap(), to.slice_mut(part.clone()).unwrap()).unwrap();
                let found = to.to_vec().unwrap();
                let expected: Vec<f64> = (0..n)
                    .map(|i| f64::from(y[i]) + if part.contains(&i) { 2.0 * f64::from(x[i]) } else { 0.0 })
                    .collect();
                assert_close(&format!("{name}, {part:?}"), &found, &expected, 2.0 * ROUNDING);
                let mut norm = device.poisoned::<f64>(1).unwrap();
                vector::l2_norm(from.slice(part.clone()).unwrap(), &mut reduction, norm.view_mut()).unwrap();
                let found_norm = norm.to_vec().unwrap()[0];
                let exact = norm_of(&to_f64(&x[part.clone()]));
                assert!(relative_eq!(found_norm, exact, epsilon = 0.0, max_relative = 1e-13), "{name}, {part:?}: norm");
                all.extend([bits(&found), vec![found_norm.to_bits()]]);
            }
        }
        all
    });
}

// ---- Curvature along the gradient ----------------------------------------------------------------------------------

#[test]
fn curvature_from_losses() {
    for (name, device) in devices() {
        let losses = device.upload(&[2.25, 2.5, 2.125]).unwrap();
        let mut out = device.poisoned::<f64>(4).unwrap();
        vector::curvature_from_losses(losses.view(), (0.125, 0.5), out.view_mut()).unwrap();
        assert_eq!(out.to_vec().unwrap(), [0.125, 0.375, 8.0, 72.0], "{name}");
    }
}

// ---- CR-SAM --------------------------------------------------------------------------------------------------------

/// L = ½(10x² + y²) + quartic (x⁴ + y⁴)/4 and its gradient.
fn bowl(w: [f64; 2], quartic: f64) -> (f64, [f64; 2]) {
    let [x, y] = w;
    let loss = 0.5 * (10.0 * x * x + y * y) + quartic * (x.powi(4) + y.powi(4)) / 4.0;
    (loss, [10.0 * x + quartic * x.powi(3), y + quartic * y.powi(3)])
}

const CR_SAM: CrSamTerms =
    CrSamTerms { log_form: true, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8, loss_error: 0.0 };

/// CR-SAM's direction at (1, 1) with ρ = 0.1, α = 0.1 and β = 0.01, computed by the kernels only.
fn cr_sam_direction(device: &Device, log_form: bool, quartic: f64) -> [f64; 2] {
    let (loss0, g0) = bowl([1.0, 1.0], quartic);
    let norm = g0[0].hypot(g0[1]);
    let at = |sign: f64| bowl([1.0 + sign * 0.1 * g0[0] / norm, 1.0 + sign * 0.1 * g0[1] / norm], quartic);
    let ((loss_plus, plus), (loss_minus, minus)) = (at(1.0), at(-1.0));
    let losses = device.upload(&[loss0, loss_plus, loss_minus]).unwrap();
    let mut coefficients = device.poisoned::<f64>(3).unwrap();
    let mut dropped = device.zeros::<u32>(2).unwrap();
    let terms = CrSamTerms { log_form, ..CR_SAM };
    let (skip, out) = (device.zeros(1).unwrap(), coefficients.view_mut());
    vector::cr_sam_coefficients(losses.view(), terms, out, skip.view(), dropped.view_mut()).unwrap();
    assert_eq!(dropped.to_vec().unwrap(), [0, 0]);
    let c = coefficients.to_vec().unwrap();
    [0, 1].map(|i| c[0] * g0[i] + c[1] * plus[i] + c[2] * minus[i])
}

#[test]
fn cr_sam_coefficients_give_the_closed_forms_direction() {
    // The log form or the released one, the quartic term, and the direction, computed by hand from the definition in
    // double precision, to eight decimals.
    let golden = [
        (false, 0.0, [11.01493793, 1.01014938]),
        (true, 0.0, [11.00493818, 1.01004938]),
        (false, 1.0, [12.34043093, 2.07414310]),
        (true, 1.0, [12.36613425, 2.07466923]),
    ];
    for (name, device) in devices() {
        for (log_form, quartic, expected) in golden {
            let found = cr_sam_direction(&device, log_form, quartic);
            for i in 0..2 {
                assert!(
                    abs_diff_eq!(found[i], expected[i], epsilon = 6e-9),
                    "{name}, log {log_form}, {quartic}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn cr_sam_drops_terms_whose_logarithm_is_undefined() {
    let (alpha, beta) = (0.1, 0.01);
    // The losses, and whether the α term and the β term are dropped.
    let cases = [
        ([1.0, 1.5, 0.75], false, false),
        ([1.0, 1.25, 0.5], true, false),
        ([1.0, 0.75, 1.5], false, true),
        ([1.0, 0.5, 0.75], true, true),
        ([1.0, 1.0, 1.0], true, true),
        ([f64::NAN, 1.5, 0.75], true, false),
        ([1.0, f64::INFINITY, 0.75], true, true),
    ];
    for (name, device) in devices() {
        let (go_on, skip) = (device.zeros(1).unwrap(), device.upload(&[1]).unwrap());
        let mut dropped = device.zeros::<u32>(2).unwrap();
        let mut expected_dropped = [0, 0];
        for (losses, no_alpha, no_beta) in cases {
            let on_device = device.upload(&losses).unwrap();
            let mut coefficients = device.poisoned::<f64>(3).unwrap();
            let terms = CrSamTerms { alpha, beta, ..CR_SAM };
            let out = coefficients.view_mut();
            vector::cr_sam_coefficients(on_device.view(), terms, out, go_on.view(), dropped.view_mut()).unwrap();
            let a = if no_alpha { 0.0 } else { alpha / (losses[1] + losses[2] - 2.0 * losses[0]) };
            let b = if no_beta { 0.0 } else { beta / (losses[1] - losses[2]) };
            assert_close(&name, &coefficients.to_vec().unwrap(), &[-2.0 * a, 1.0 + a + b, a - b], 1e-15);
            expected_dropped = [expected_dropped[0] + u32::from(no_alpha), expected_dropped[1] + u32::from(no_beta)];
            assert_eq!(dropped.to_vec().unwrap(), expected_dropped, "{name}: {losses:?}");
            // The released form divides by neither, and a term of weight 0 is not counted.
            for terms in [CrSamTerms { log_form: false, ..terms }, CrSamTerms { alpha: 0.0, beta: 0.0, ..terms }] {
                let out = coefficients.view_mut();
                vector::cr_sam_coefficients(on_device.view(), terms, out, go_on.view(), dropped.view_mut()).unwrap();
                let (a, b) = if !terms.log_form { (alpha, beta) } else { (0.0, 0.0) };
                assert_close(&name, &coefficients.to_vec().unwrap(), &[-2.0 * a, 1.0 + a + b, a - b], 1e-15);
                assert_eq!(dropped.to_vec().unwrap(), expected_dropped, "{name}: {losses:?}");
            }
        }
        // At the threshold itself the term is dropped; just above it is not.
        let losses = device.upload(&[1.0, 1.5, 0.75]).unwrap();
        for (a_min, b_min, loss_error, expected) in [
            (0.25, 0.75, 0.0, [1, 1]),
            (0.2499, 0.7499, 0.0, [0, 0]),
            // The error of the losses is relative to the first, 1.
            (0.0, 0.0, 0.25, [1, 0]),
            (0.0, 0.0, 0.2499, [0, 0]),
            (0.0, 0.75, 0.3, [1, 1]),
        ] {
            let mut dropped = device.zeros::<u32>(2).unwrap();
            let mut coefficients = device.poisoned::<f64>(3).unwrap();
            let terms = CrSamTerms { a_min, b_min, loss_error, ..CR_SAM };
            let out = coefficients.view_mut();
            vector::cr_sam_coefficients(losses.view(), terms, out, go_on.view(), dropped.view_mut()).unwrap();
            assert_eq!(dropped.to_vec().unwrap(), expected, "{name}");
            // A skipped step counts nothing.
            let out = coefficients.view_mut();
            vector::cr_sam_coefficients(losses.view(), terms, out, skip.view(), dropped.view_mut()).unwrap();
            assert_eq!(dropped.to_vec().unwrap(), expected, "{name}");
        }
    }
}

// ---- Updates -------------------------------------------------------------------------------------------------------

/// Which of the four gradients take part, with the coefficients on the device (those of absent ones are NaN: they are
/// not read).
const COMBINATIONS: [([bool; 4], [f64; 4]); 6] = [
    ([true, false, false, false], [1.0, f64::NAN, f64::NAN, f64::NAN]),
    ([false, false, true, false], [f64::NAN, f64::NAN, 1.5, f64::NAN]),
    ([true, true, false, false], [-0.5, 1.25, f64::NAN, f64::NAN]),
    ([true, false, false, true], [2.0, f64::NAN, f64::NAN, -0.75]),
    ([true, true, true, false], [-1.5, 1.75, 0.5, f64::NAN]),
    ([true, true, true, true], [-1.5, 1.75, 0.5, 0.25]),
];

/// The gradients of five steps, and for each step their combination in double precision.
struct Steps<T> {
    gradients: Vec<[Vec<T>; 4]>,
    combined: Vec<Vec<f64>>,
}

fn five_steps<T: Scalar>(n: usize, present: [bool; 4], coefficients: [f64; 4]) -> Steps<T> {
    let mut random = Random(400 + n as u64);
    let gradients: Vec<[Vec<T>; 4]> = (0..5).map(|_| [(); 4].map(|()| random.vector(n))).collect();
    let combined = gradients
        .iter()
        .map(|step| {
            let term =
                |k: usize, i: usize| if present[k] { coefficients[k] * Into::<f64>::into(step[k][i]) } else { 0.0 };
            (0..n).map(|i| (0..4).map(|k| term(k, i)).sum()).collect()
        })
        .collect();
    Steps { gradients, combined }
}

/// A rate as a number, from the device, or as four times a quarter of it from the device: all give the same step.
fn same_rate<'a>(case: usize, fixed: Rate<'a>, [there, quarter]: &'a [Buffer<f64>; 2]) -> Rate<'a> {
    [fixed, Rate::Device(there.view()), Rate::Scaled(quarter.view(), 4.0)][case % 3]
}

fn check_sgd<T: Scalar>(devices: Vec<(String, Device)>, rounding: f64) {
    for (case, n) in LENGTHS.into_iter().enumerate() {
        for (index, (present, coefficients)) in COMBINATIONS.into_iter().enumerate() {
            let decay_len = [0, n / 2, n][(case + index) % 3];
            let (lr, nesterov) = (0.1, index % 2 == 1);
            let settings = SgdStep { lr: Rate::Fixed(lr), momentum: 0.9, nesterov, weight_decay: 0.05, decay_len };
            let steps = five_steps::<T>(n, present, coefficients);
            let w: Vec<T> = Random(7).vector(n);
            let (mut w64, mut m64) = (to_f64(&w), vec![0.0; n]);
            for g in &steps.combined {
                for i in 0..n {
                    let g = g[i] + if i < decay_len { settings.weight_decay * w64[i] } else { 0.0 };
                    m64[i] = settings.momentum * m64[i] + g;
                    w64[i] -= lr * if settings.nesterov { g + settings.momentum * m64[i] } else { m64[i] };
                }
            }
            on_devices(&devices, true, |name, device| {
                let mut weights = device.upload(&w).unwrap();
                let mut momentum = device.zeros::<T>(n).unwrap();
                let (on_device, skip) = (device.upload(&coefficients).unwrap(), device.zeros::<u32>(1).unwrap());
                let there = [lr, lr / 4.0].map(|rate| device.upload(&[rate]).unwrap());
                let settings = SgdStep { lr: same_rate(case, settings.lr, &there), ..settings };
                for step in &steps.gradients {
                    let uploaded = [0, 1, 2, 3].map(|k| present[k].then(|| device.upload(&step[k]).unwrap()));
                    let vectors = [0, 1, 2, 3].map(|k| uploaded[k].as_ref().map(|g| g.view()));
                    let combination = Combination { vectors, coefficients: on_device.view() };
                    vector::sgd(weights.view_mut(), momentum.view_mut(), combination, settings, skip.view()).unwrap();
                }
                let (found_w, found_m) = (weights.to_vec().unwrap(), momentum.to_vec().unwrap());
                // Five steps with about six roundings each, of numbers up to the largest gradient.
                let what = format!("{name}, n = {n}, {present:?}, decay_len {decay_len}");
                assert_close(&format!("{what}: m"), &found_m, &m64, 30.0 * rounding);
                assert_close(&format!("{what}: w"), &found_w, &w64, 30.0 * rounding);
                vec![bits(&found_w), bits(&found_m)]
            });
        }
    }
}

#[test]
fn sgd() {
    check_sgd::<f32>(devices(), ROUNDING);
    check_sgd::<f64>(host_devices(), f64::EPSILON);
}

#[test]
fn a_single_gradient_with_coefficient_one_is_exact() {
    let n = 1000;
    let (w, g): (Vec<f32>, Vec<f32>) = (Random(1).vector(n), Random(2).vector(n));
    for (name, device) in devices() {
        let (mut weights, mut momentum) = (device.upload(&w).unwrap(), device.zeros::<f32>(n).unwrap());
        let (gradient, one) = (device.upload(&g).unwrap(), device.upload(&[1.0, 0.0, 0.0, 0.0]).unwrap());
        let skip = device.zeros::<u32>(1).unwrap();
        let settings =
            SgdStep { lr: Rate::Fixed(1.0), momentum: 0.9, nesterov: false, weight_decay: 0.0, decay_len: n };
        let gradients = Combination { vectors: [Some(gradient.view()), None, None, None], coefficients: one.view() };
        vector::sgd(weights.view_mut(), momentum.view_mut(), gradients, settings, skip.view()).unwrap();
        assert_eq!(momentum.to_vec().unwrap(), g, "{name}");
        let expected: Vec<f32> = w.iter().zip(&g).map(|(w, g)| w - g).collect();
        assert_eq!(weights.to_vec().unwrap(), expected, "{name}");
    }
}

fn check_adamw<T: Scalar>(devices: Vec<(String, Device)>, rounding: f64) {
    for (case, n) in LENGTHS.into_iter().enumerate() {
        for (index, (present, coefficients)) in COMBINATIONS.into_iter().enumerate() {
            let decay_len = [n, 0, n / 2][(case + index) % 3];
            let lr = 0.01;
            let settings =
                AdamWStep { lr: Rate::Fixed(lr), beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, decay_len };
            let steps = five_steps::<T>(n, present, coefficients);
            let w: Vec<T> = Random(7).vector(n);
            let (mut w64, mut m64, mut v64) = (to_f64(&w), vec![0.0f64; n], vec![0.0f64; n]);
            for (g, t) in steps.combined.iter().zip(1..) {
                let (correction1, correction2) = (1.0 - 0.9f64.powi(t), 1.0 - 0.999f64.powi(t));
                for i in 0..n {
                    if i < decay_len {
                        w64[i] *= 1.0 - lr * settings.weight_decay;
                    }
                    m64[i] = 0.9 * m64[i] + (1.0 - 0.9) * g[i];
                    v64[i] = 0.999 * v64[i] + (1.0 - 0.999) * g[i] * g[i];
                    w64[i] -= lr / correction1 * m64[i] / (v64[i].sqrt() / correction2.sqrt() + settings.eps);
                }
            }
            on_devices(&devices, true, |name, device| {
                let mut weights = device.upload(&w).unwrap();
                let (mut m, mut v) = (device.zeros::<T>(n).unwrap(), device.zeros::<T>(n).unwrap());
                let (on_device, skip) = (device.upload(&coefficients).unwrap(), device.zeros::<u32>(1).unwrap());
                let (mut t, mut skipped) = (device.zeros::<u32>(1).unwrap(), device.zeros::<u32>(1).unwrap());
                let there = [lr, lr / 4.0].map(|rate| device.upload(&[rate]).unwrap());
                let settings = AdamWStep { lr: same_rate(case, settings.lr, &there), ..settings };
                for step in &steps.gradients {
                    let uploaded = [0, 1, 2, 3].map(|k| present[k].then(|| device.upload(&step[k]).unwrap()));
                    let vectors = [0, 1, 2, 3].map(|k| uploaded[k].as_ref().map(|g| g.view()));
                    let combination = Combination { vectors, coefficients: on_device.view() };
                    vector::advance(skip.view(), t.view_mut(), skipped.view_mut()).unwrap();
                    let (weights, m, v) = (weights.view_mut(), m.view_mut(), v.view_mut());
                    vector::adamw(weights, m, v, combination, settings, t.view(), skip.view()).unwrap();
                }
                assert_eq!((t.to_vec().unwrap()[0], skipped.to_vec().unwrap()[0]), (5, 0), "{name}");
                let found = [&weights, &m, &v].map(|buffer| buffer.to_vec().unwrap());
                let what = format!("{name}, n = {n}, {present:?}, decay_len {decay_len}");
                assert_close(&format!("{what}: m"), &found[1], &m64, 30.0 * rounding);
                assert_close(&format!("{what}: v"), &found[2], &v64, 30.0 * rounding);
                // A step is ±lr/(1 − β1^t) m/sqrt(v), at most a few lr. If g nearly cancels, its relative error counts.
                assert_close(&format!("{what}: w"), &found[0], &w64, 30.0 * rounding);
                found.iter().map(|values| bits(values)).collect()
            });
        }
    }
}

#[test]
fn adamw() {
    check_adamw::<f32>(devices(), ROUNDING);
    check_adamw::<f64>(host_devices(), f64::EPSILON);
}

#[test]
fn adamw_late_in_training() {
    // The bias corrections are computed on the device; at t = 100 000 the first has vanished and the second nearly.
    for (t, beta2) in [(1, 0.999), (2, 0.999), (37, 0.999), (1000, 0.999), (100_000, 0.99999), (u32::MAX, 0.999)] {
        let (m, v, g) = (0.02, 0.0003, -0.01);
        let settings =
            AdamWStep { lr: Rate::Fixed(0.5), beta1: 0.9, beta2, eps: 1e-8, weight_decay: 0.0, decay_len: 0 };
        let (m_next, v_next) = (0.9 * m + (1.0 - 0.9) * g, beta2 * v + (1.0 - beta2) * g * g);
        let (c1, c2) = (1.0 - 0.9f64.powf(t.into()), 1.0 - beta2.powf(t.into()));
        let expected = 1.0 - 0.5 / c1 * m_next / (v_next.sqrt() / c2.sqrt() + 1e-8);
        for (name, device) in host_devices() {
            let upload = |value: f64| device.upload(&[value]).unwrap();
            let (mut w, mut m, mut v, g) = (upload(1.0), upload(m), upload(v), upload(g));
            let (step, skip) = (device.upload(&[t]).unwrap(), device.zeros::<u32>(1).unwrap());
            let one = device.upload(&[1.0, 0.0, 0.0, 0.0]).unwrap();
            let gradients = Combination { vectors: [Some(g.view()), None, None, None], coefficients: one.view() };
            let (w_view, m, v) = (w.view_mut(), m.view_mut(), v.view_mut());
            vector::adamw(w_view, m, v, gradients, settings, step.view(), skip.view()).unwrap();
            let found = w.to_vec().unwrap()[0];
            assert!(abs_diff_eq!(found, expected, epsilon = 1e-11), "{name}, t = {t}: {found} instead of {expected}");
        }
    }
}

#[test]
fn a_skipped_step_changes_no_bit() {
    let n = 2001;
    let mut random = Random(31);
    let (w, m, v): (Vec<f32>, Vec<f32>, Vec<f32>) = (random.vector(n), random.vector(n), random.vector(n));
    for (name, device) in devices() {
        // A NaN in one gradient has set the flag, whatever its value.
        for flag in [1u32, 2, u32::MAX] {
            let skip = device.upload(&[flag]).unwrap();
            let upload = |x: &[f32]| device.upload(x).unwrap();
            let (mut weights, mut first, mut second) = (upload(&w), upload(&m), upload(&v));
            let poison = device.poisoned::<f32>(n).unwrap();
            let coefficients = device.poisoned::<f64>(4).unwrap();
            let (mut step, mut skipped) = (device.upload(&[4u32]).unwrap(), device.upload(&[2u32]).unwrap());
            vector::advance(skip.view(), step.view_mut(), skipped.view_mut()).unwrap();
            assert_eq!((step.to_vec().unwrap()[0], skipped.to_vec().unwrap()[0]), (4, 3), "{name}");
            for count in 1..=4 {
                let vectors = [0, 1, 2, 3].map(|k| (k < count).then(|| poison.view()));
                let gradients = Combination { vectors, coefficients: coefficients.view() };
                let settings =
                    SgdStep { lr: Rate::Fixed(0.1), momentum: 0.9, nesterov: true, weight_decay: 0.1, decay_len: n };
                vector::sgd(weights.view_mut(), first.view_mut(), gradients, settings, skip.view()).unwrap();
                let settings = AdamWStep {
                    lr: Rate::Fixed(0.1),
                    beta1: 0.9,
                    beta2: 0.999,
                    eps: 1e-8,
                    weight_decay: 0.1,
                    decay_len: n,
                };
                let (weights, first, second) = (weights.view_mut(), first.view_mut(), second.view_mut());
                vector::adamw(weights, first, second, gradients, settings, step.view(), skip.view()).unwrap();
            }
            vector::commit(skip.view(), poison.view(), second.view_mut()).unwrap();
            for (found, expected) in [(&weights, &w), (&first, &m), (&second, &v)] {
                assert_eq!(bits(&found.to_vec().unwrap()), bits(expected), "{name}, flag {flag}");
            }
        }
    }
}

#[test]
fn commit_takes_the_pending_state() {
    for n in LENGTHS {
        let pending: Vec<f32> = Random(3).vector(n);
        for (name, device) in devices() {
            let (from, skip) = (device.upload(&pending).unwrap(), device.zeros::<u32>(1).unwrap());
            let mut state = device.poisoned::<f32>(n).unwrap();
            vector::commit(skip.view(), from.view(), state.view_mut()).unwrap();
            assert_eq!(state.to_vec().unwrap(), pending, "{name}, n = {n}");
        }
    }
}

// ---- Finiteness ----------------------------------------------------------------------------------------------------

fn flag_of<T: Scalar>(device: &Device, x: &[T], before: u32) -> u32 {
    let x = device.upload(x).unwrap();
    let mut flag = device.upload(&[before]).unwrap();
    vector::check_finite(x.view(), flag.view_mut()).unwrap();
    flag.to_vec().unwrap()[0]
}

#[test]
fn check_finite_finds_a_single_bad_element_anywhere() {
    for (name, device) in devices() {
        for n in [1, 3, 5, 257, 4099] {
            let good: Vec<f32> =
                (0..n).map(|i| [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, 0.0, -0.0][i % 6]).collect();
            assert_eq!(flag_of(&device, &good, 0), 0, "{name}, n = {n}");
            assert_eq!(flag_of(&device, &good, 1), 1, "{name}, n = {n}: a flag that is set stays");
            for place in [0, n / 3, n / 2, n - 1] {
                for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)] {
                    let mut x = good.clone();
                    x[place] = bad;
                    assert_eq!(flag_of(&device, &x, 0), 1, "{name}, n = {n}, {bad} at {place}");
                }
            }
        }
    }
    for (name, device) in host_devices() {
        for good in [[1.0, f64::MAX, -f64::MAX], [0.0, 5e-324, 1e308]] {
            assert_eq!(flag_of(&device, &good, 0), 0, "{name}: {good:?}");
            for bad in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, f64::from_bits(0x7ff0_0000_0000_0001)] {
                for place in 0..3 {
                    let mut x = good;
                    x[place] = bad;
                    assert_eq!(flag_of(&device, &x, 0), 1, "{name}: {x:?}");
                }
            }
        }
    }
}

/// The separate passes that finish a gradient, without the norm.
type InTurn<T> = fn(&mut Buffer<T>, Option<Slice<'_, f64>>, SliceMut<'_, u32>) -> Result<()>;

fn check_finish_gradient<T: Scalar>(devices: &[(String, Device)], scale: Option<f64>, in_turn: InTurn<T>) {
    for (name, device) in devices {
        let (mut reduction, mut random) = (Reduction::new(device).unwrap(), Random(77));
        for (n, bad) in [(1, None), (5, Some(4)), (4099, None), (4099, Some(1234)), (600_001, None)] {
            let mut values = random.vector::<T>(n);
            if let Some(bad) = bad {
                values[bad] = T::from_f64(f64::INFINITY);
            }
            let state = scale.map(|scale| device.upload(&[scale, 3.0]).unwrap());
            let state = state.as_ref().map(|state| state.view());
            let (mut x, mut apart) = (device.upload(&values).unwrap(), device.upload(&values).unwrap());
            let (mut flags, mut norms) = (device.zeros::<u32>(2).unwrap(), device.poisoned::<f64>(2).unwrap());
            let norm = norms.slice_mut(0..1).unwrap();
            vector::finish_gradient(x.view_mut(), state, flags.slice_mut(0..1).unwrap(), &mut reduction, norm).unwrap();
            in_turn(&mut apart, state, flags.slice_mut(1..2).unwrap()).unwrap();
            vector::l2_norm(apart.view(), &mut reduction, norms.slice_mut(1..2).unwrap()).unwrap();
            let (flags, norms) = (flags.to_vec().unwrap(), norms.to_vec().unwrap());
            assert_eq!(flags, [u32::from(bad.is_some()); 2], "{name}, n = {n}");
            assert_eq!(norms[0].to_bits(), norms[1].to_bits(), "{name}, n = {n}");
            assert_eq!(bits(&x.to_vec().unwrap()), bits(&apart.to_vec().unwrap()), "{name}, n = {n}");
        }
    }
}

/// One pass gives the bits of the two or three separate ones.
#[test]
fn a_gradient_is_finished_in_one_pass() {
    check_finish_gradient::<f32>(&devices(), None, |x, _, flag| vector::check_finite(x.view(), flag));
    check_finish_gradient::<f64>(&host_devices(), None, |x, _, flag| vector::check_finite(x.view(), flag));
    check_finish_gradient::<f32>(&devices(), Some(1024.0), |x, state, flag| {
        precision::unscale(x.view_mut(), state.expect("there is a scale"), flag)
    });
}

// ---- Errors --------------------------------------------------------------------------------------------------------

#[test]
fn wrong_lengths_and_devices_are_refused() {
    let device = Device::host();
    let elsewhere = Device::host();
    let long = || device.zeros::<f32>(10).unwrap();
    let (x, short, far) = (long(), device.zeros::<f32>(9).unwrap(), elsewhere.zeros::<f32>(10).unwrap());
    let (one, three) = (device.zeros::<f64>(1).unwrap(), device.zeros::<f64>(3).unwrap());
    let (skip, flags) = (device.zeros::<u32>(1).unwrap(), device.zeros::<u32>(2).unwrap());
    let (mut out, mut other, mut wide) = (long(), long(), device.zeros::<f64>(5).unwrap());
    let mut reduction = Reduction::new(&device).unwrap();
    let length = |result: polder::device::Result<()>, name: &str, wrong: usize, right: usize| {
        let error = result.unwrap_err();
        let Error::Length { argument, found, expected, .. } = error else { panic!("{error} instead of a length") };
        assert_eq!((argument, found, expected), (name, wrong, right));
    };
    let other_device = |result: polder::device::Result<()>, name: &str| {
        let error = result.unwrap_err();
        let Error::OtherDevice { argument, .. } = error else { panic!("{error} instead of another device") };
        assert_eq!(argument, name);
    };
    length(vector::axpy(1.0, short.view(), out.view_mut()), "x", 9, 10);
    let clock = device.zeros(2).unwrap();
    length(vector::moving_average(short.view(), 0.9, clock.view(), out.view_mut()), "x", 9, 10);
    other_device(vector::axpy(1.0, far.view(), out.view_mut()), "x");
    length(vector::convert(short.view(), out.view_mut()), "x", 9, 10);
    other_device(vector::convert(far.view(), out.view_mut()), "x");
    length(vector::commit(skip.view(), short.view(), out.view_mut()), "pending", 9, 10);
    length(vector::commit(flags.view(), x.view(), out.view_mut()), "skip", 2, 1);
    length(vector::l2_norm(x.view(), &mut reduction, wide.view_mut()), "norm", 5, 1);
    other_device(vector::l2_norm(far.view(), &mut reduction, wide.slice_mut(0..1).unwrap()), "x");
    length(vector::dot(x.view(), short.view(), &mut reduction, wide.slice_mut(0..1).unwrap()), "y", 9, 10);
    length(vector::perturb(x.view(), short.view(), one.view(), 0.1, out.view_mut(), None), "g", 9, 10);
    length(vector::perturb(x.view(), x.view(), three.view(), 0.1, out.view_mut(), None), "norm", 3, 1);
    length(vector::perturb(short.view(), short.view(), one.view(), 0.1, out.view_mut(), None), "plus", 10, 9);
    let nine = other.slice_mut(0..9).unwrap();
    length(vector::perturb(x.view(), x.view(), one.view(), 0.1, out.view_mut(), Some(nine)), "minus", 9, 10);
    other_device(vector::perturb_linf(far.view(), x.view(), 0.1, out.view_mut(), None), "w");
    other_device(vector::perturb_linf(x.view(), far.view(), 0.1, out.view_mut(), None), "g");
    let (x, three, one) = (x.view(), three.view(), one.view());
    length(vector::curvature_from_losses(one, (0.1, 0.0), wide.slice_mut(0..4).unwrap()), "losses", 1, 3);
    for rho in [-0.1, f64::NAN, f64::INFINITY] {
        let error = vector::curvature_from_losses(three, (rho, 0.0), wide.slice_mut(0..4).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
    }
    length(vector::curvature_from_losses(three, (0.1, 0.0), wide.view_mut()), "out", 5, 4);

    let settings = SgdStep { lr: Rate::Fixed(0.1), momentum: 0.9, nesterov: false, weight_decay: 0.0, decay_len: 10 };
    let four = device.zeros::<f64>(4).unwrap();
    let combine = |vectors| Combination { vectors, coefficients: four.view() };
    let mut sgd = |gradients| vector::sgd(out.view_mut(), other.view_mut(), gradients, settings, skip.view());
    length(sgd(combine([Some(short.view()), None, None, None])), "vectors[0]", 9, 10);
    length(sgd(combine([Some(x), None, Some(short.view()), None])), "vectors[2]", 9, 10);
    other_device(sgd(combine([None, Some(far.view()), None, None])), "vectors[1]");
    length(sgd(Combination { vectors: [Some(x), None, None, None], coefficients: one }), "coefficients", 1, 4);
    let error = sgd(combine([None, None, None, None])).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error}");
}
