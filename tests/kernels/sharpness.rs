//! The kernels of the sharpness-aware methods against double-precision references, on every device, in every launch
//! shape and order of blocks, with vectors that are parts of longer buffers.

use std::ops::Range;

use approx::{abs_diff_eq, relative_eq};

use crate::common::{Random, bits, devices, host_devices, on_devices, to_f64};
use polder::device::{Buffer, Device, Element, Error, Result, Scalar, Slice, SliceMut};
use polder::kernels::random;
use polder::kernels::sharpness::{self, GamTerms, PRODUCTS, Scaling};
use polder::kernels::vector::{self, Combination, Rate, Reduction};

/// Lengths with tails that do not fill a pack, and the number (from 1) of the vector of a call that allows no 16-byte
/// access (0: none).
fn cases() -> impl Iterator<Item = (usize, usize)> {
    let each_in_turn = (1..=5).map(|odd| (1023, odd));
    [0, 1, 3, 5, 1023, 4096, 100_003].map(|n| (n, 0)).into_iter().chain(each_in_turn).chain([(5, 1), (100_003, 2)])
}

/// Which of four vectors take part, with the coefficients on the device (those of absent vectors are NaN: they are not
/// read).
const COMBINATIONS: [([bool; 4], [f64; 4]); 6] = [
    ([true, false, false, false], [1.0, f64::NAN, f64::NAN, f64::NAN]),
    ([false, false, true, false], [f64::NAN, f64::NAN, 1.5, f64::NAN]),
    ([true, true, false, false], [-0.3, 1.25, f64::NAN, f64::NAN]),
    ([true, false, false, true], [2.1, f64::NAN, f64::NAN, -0.75]),
    ([true, true, true, false], [-1.5, 1.7, 0.5, f64::NAN]),
    ([true, true, true, true], [-1.5, 1.75, 0.6, 0.25]),
];

/// A vector on a device that is part of a longer buffer, with sevens on both sides.
struct Part<T: Scalar> {
    buffer: Buffer<T>,
    range: Range<usize>,
}

impl<T: Scalar> Part<T> {
    /// Its address is a multiple of 16 bytes unless `odd`.
    fn new(device: &Device, odd: bool, values: &[T]) -> Self {
        let start = 4 + usize::from(odd);
        let range = start..start + values.len();
        let mut all = vec![T::from_f64(7.0); range.end + 3];
        all[range.clone()].copy_from_slice(values);
        Self { buffer: device.upload(&all).unwrap(), range }
    }

    fn poisoned(device: &Device, odd: bool, n: usize) -> Self {
        Self::new(device, odd, &vec![T::from_f64(f64::NAN); n])
    }

    fn view(&self) -> Slice<'_, T> {
        self.buffer.slice(self.range.clone()).unwrap()
    }

    fn view_mut(&mut self) -> SliceMut<'_, T> {
        self.buffer.slice_mut(self.range.clone()).unwrap()
    }

    /// Its values. Fails if something outside was written.
    fn values(&self) -> Vec<T> {
        let all = self.buffer.to_vec().unwrap();
        let beside = all[..self.range.start].iter().chain(&all[self.range.end..]);
        assert!(
            to_f64(&beside.copied().collect::<Vec<_>>()).iter().all(|&x| x == 7.0),
            "wrote beside {:?}",
            self.range
        );
        all[self.range.clone()].to_vec()
    }
}

/// Fails unless every element is as close to its reference as its roundings allow: their number, each times the
/// magnitude of the rounded number. One rounding is 2^-24 in single precision. In double precision it counts twice,
/// because the reference rounds too.
fn assert_rounded<T: Scalar>(what: &str, found: &[T], expected: impl ExactSizeIterator<Item = (f64, f64)>) {
    let rounding = if size_of::<T>() == 4 { 1.0 / 16_777_216.0 } else { f64::EPSILON };
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (&found, (value, roundings))) in found.iter().zip(expected).enumerate() {
        let error = (Into::<f64>::into(found) - value).abs();
        assert!(error <= rounding * roundings, "{what}[{i}]: {found:?} instead of {value} ({error:e})");
    }
}

/// Fails unless numbers in double precision are right within a few roundings, 1e-14.
fn assert_numbers(what: &str, found: &Buffer<f64>, expected: &[f64]) {
    let found = found.to_vec().unwrap();
    let near = |(found, expected): (&f64, &f64)| relative_eq!(found, expected, epsilon = 0.0, max_relative = 1e-14);
    assert!(
        found.len() == expected.len() && found.iter().zip(expected).all(near),
        "{what}: {found:?} instead of {expected:?}"
    );
}

fn four_vectors<T: Scalar>(seed: u64, n: usize) -> [Vec<T>; 4] {
    let mut random = Random(seed + n as u64);
    [(); 4].map(|()| random.vector(n))
}

/// Σ c_k x_k at element i, and Σ |c_k x_k|, over the present vectors.
fn combined<T: Scalar>(x: &[Vec<T>; 4], (present, c): ([bool; 4], [f64; 4]), i: usize) -> (f64, f64) {
    let terms = (0..4).filter(|&k| present[k]).map(|k| c[k] * Into::<f64>::into(x[k][i]));
    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The products of A and B, on a device.
fn products<T: Scalar>(device: &Device, vectors: &[Slice<'_, T>], a: [f64; 4], b: [f64; 4]) -> Buffer<f64> {
    let (a, b) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
    let mut out = device.poisoned(PRODUCTS).unwrap();
    let mut reduction = Reduction::new(device).unwrap();
    sharpness::combined_products(vectors, a.view(), b.view(), &mut reduction, out.view_mut()).unwrap();
    out
}

// ---- Passes over vectors -------------------------------------------------------------------------------------------

fn check_combined_products<T: Scalar>(devices: &[(String, Device)]) {
    for (n, odd) in cases() {
        let x = four_vectors::<T>(100, n);
        for count in 1..=4 {
            let present = [0, 1, 2, 3].map(|k| k < count);
            let only = |c: [f64; 4]| [0, 1, 2, 3].map(|k| if present[k] { c[k] } else { f64::NAN });
            let (a, b) = (only([0.5, -1.3, 2.0, 0.75]), only([-1.5, 0.2, 1.0, -0.6]));
            let (mut sums, mut sizes) = ([0.0; 3], [0.0; 3]);
            for i in 0..n {
                let ((of_a, size_a), (of_b, size_b)) = (combined(&x, (present, a), i), combined(&x, (present, b), i));
                for (k, (p, q)) in [(of_a, of_a), (of_a, of_b), (of_b, of_b)].into_iter().enumerate() {
                    sums[k] += p * q;
                    sizes[k] += [size_a * size_a, size_a * size_b, size_b * size_b][k];
                }
            }
            on_devices(devices, false, |name, device| {
                let parts: Vec<_> = (0..count).map(|k| Part::new(device, odd == k + 1, &x[k])).collect();
                let views: Vec<_> = parts.iter().map(Part::view).collect();
                let found = products(device, &views, a, b).to_vec().unwrap();
                for k in 0..3 {
                    // In double precision, only the order of the sum differs.
                    let error = (found[k] - sums[k]).abs();
                    assert!(error <= 1e-13 * sizes[k], "{name}, n = {n}, {count} vectors: {found:?}, not {sums:?}");
                }
                let (norm_a, norm_b) = (found[0].sqrt(), found[2].sqrt());
                assert_eq!((found[3], found[4]), (norm_a, norm_b), "{name}, n = {n}, {count} vectors: norms");
                vec![bits(&found)]
            });
        }
    }
}

#[test]
fn combined_products() {
    check_combined_products::<f32>(&devices());
    check_combined_products::<f64>(&host_devices());
}

/// The difference of two gradients is 1e-4 of them. Rounding a product to single precision would leave three digits of
/// an element. The difference of products in double leaves eight digits of a sum.
#[test]
fn a_small_difference_of_large_vectors_keeps_its_digits() {
    let n = 100_003;
    let mut random = Random(3);
    let x0: Vec<f32> = (0..n).map(|_| 1000.0 * random.normal() as f32).collect();
    let x1: Vec<f32> = x0.iter().map(|&x| x + 0.1 * random.normal() as f32).collect();
    let (difference, sum): (Vec<f64>, Vec<f64>) =
        to_f64(&x0).iter().zip(to_f64(&x1)).map(|(x0, x1)| (0.3 * (x1 - x0), 0.7 * (x0 + x1))).unzip();
    let expected = [dot(&difference, &difference), dot(&difference, &sum), dot(&sum, &sum)];
    let scale = [expected[0], (expected[0] * expected[2]).sqrt(), expected[2]];
    for (name, device) in devices() {
        let (x0, x1) = (device.upload(&x0).unwrap(), device.upload(&x1).unwrap());
        let vectors = [x0.view(), x1.view()];
        let found = products(&device, &vectors, [-0.3, 0.3, 0.0, 0.0], [0.7, 0.7, 0.0, 0.0]).to_vec().unwrap();
        for k in 0..3 {
            // An element of the difference has a relative error of 1e-16/1e-4 = 1e-12, and the errors do not add up.
            assert!(
                abs_diff_eq!(found[k], expected[k], epsilon = 1e-12 * scale[k]),
                "{name}: {found:?} instead of {expected:?}"
            );
        }
    }
}

fn check_combine<T: Scalar>(devices: &[(String, Device)]) {
    for (n, odd) in cases() {
        let (x, before) = (four_vectors::<T>(200, n), Random(1).vector::<T>(n));
        for (index, combination) in COMBINATIONS.into_iter().enumerate() {
            let (weight, with_skip) = ([1.0, -0.7][index % 2], index % 3 == 0);
            on_devices(devices, true, |name, device| {
                let parts = [0, 1, 2, 3].map(|k| Part::new(device, odd == k + 1, &x[k]));
                let vectors = [0, 1, 2, 3].map(|k| combination.0[k].then(|| parts[k].view()));
                let (c, skip) = (device.upload(&combination.1).unwrap(), device.zeros::<u32>(1).unwrap());
                let there = [weight, weight / 4.0].map(|weight| device.upload(&[weight]).unwrap());
                let (mut alone, mut added) =
                    (Part::poisoned(device, odd == 5, n), Part::new(device, odd == 5, &before));
                for (out, add) in [(&mut alone, false), (&mut added, true)] {
                    let combination = Combination { vectors, coefficients: c.view() };
                    let skip = with_skip.then(|| skip.view());
                    let rates =
                        [Rate::Fixed(weight), Rate::Device(there[0].view()), Rate::Scaled(there[1].view(), 4.0)];
                    let rate = rates[index % 3];
                    sharpness::combine(combination, rate, add, out.view_mut(), skip).unwrap();
                }
                let (alone, added) = (alone.values(), added.values());
                let what = format!("{name}, n = {n}, odd {odd}, {combination:?}");
                // Roundings of each term: its coefficient, the product, up to three sums, the weight, its product.
                let exact = (0..n).map(|i| combined(&x, combination, i)).map(|(sum, size)| (weight * sum, 7.0 * size));
                assert_rounded(&what, &alone, exact.clone());
                let total = exact.zip(&before).map(|((sum, roundings), &before)| {
                    let total = sum + before.into();
                    (total, roundings + total.abs())
                });
                assert_rounded(&format!("{what}, added"), &added, total);
                vec![bits(&alone), bits(&added)]
            });
        }
    }
}

#[test]
fn combine() {
    check_combine::<f32>(&devices());
    check_combine::<f64>(&host_devices());
}

#[test]
fn a_skipped_combination_writes_nothing() {
    let before: Vec<f32> = Random(4).vector(2001);
    for (name, device) in devices() {
        let (poison, c) = (device.poisoned::<f32>(2001).unwrap(), device.poisoned::<f64>(4).unwrap());
        for flag in [1u32, 2, u32::MAX] {
            let (mut out, skip) = (device.upload(&before).unwrap(), device.upload(&[flag]).unwrap());
            for (count, add) in [(1, false), (2, true), (3, false), (4, true), (4, false)] {
                let vectors = [0, 1, 2, 3].map(|k| (k < count).then(|| poison.view()));
                let combination = Combination { vectors, coefficients: c.view() };
                sharpness::combine(combination, 0.5, add, out.view_mut(), Some(skip.view())).unwrap();
            }
            assert_eq!(bits(&out.to_vec().unwrap()), bits(&before), "{name}, flag {flag}");
        }
    }
}

fn check_perturb_along<T: Scalar>(devices: &[(String, Device)]) {
    let (rho, norm) = (0.7, 1.9);
    for (n, odd) in cases() {
        let (x, w) = (four_vectors::<T>(300, n), Random(2).vector::<T>(n));
        for combination in COMBINATIONS.into_iter().filter(|(present, _)| present.iter().filter(|&&p| p).count() == 2) {
            on_devices(devices, true, |name, device| {
                let parts = [0, 1, 2, 3].map(|k| Part::new(device, odd == 1 + k, &x[k]));
                let vectors = [0, 1, 2, 3].map(|k| combination.0[k].then(|| parts[k].view()));
                let weights = Part::new(device, odd == 3, &w);
                let (c, norm_there) = (device.upload(&combination.1).unwrap(), device.upload(&[norm]).unwrap());
                let direction = Combination { vectors, coefficients: c.view() };
                let mut out = Part::poisoned(device, odd == 5, n);
                sharpness::perturb_along(weights.view(), direction, norm_there.view(), rho, out.view_mut()).unwrap();
                let found = out.values();
                let expected = (0..n).map(|i| {
                    let (along, size) = combined(&x, combination, i);
                    let (scale, w) = (rho / (norm + 1e-12), Into::<f64>::into(w[i]));
                    // Roundings of each term: its coefficient, the product, the sum, the scale, its product; and the
                    // point.
                    (w + scale * along, 5.0 * scale * size + (w + scale * along).abs())
                });
                assert_rounded(&format!("{name}, n = {n}, odd {odd}"), &found, expected);
                vec![bits(&found)]
            });
        }
    }
}

#[test]
fn perturb_along() {
    check_perturb_along::<f32>(&devices());
    check_perturb_along::<f64>(&host_devices());
}

/// Without a direction the norm is 0, and the 1e-12 in the denominator avoids 0/0.
#[test]
fn directions_that_vanish_give_the_weights_themselves() {
    let (w, g): (Vec<f32>, Vec<f32>) = (Random(1).vector(1003), Random(2).vector(1003));
    for (name, device) in devices() {
        let (weights, g) = (device.upload(&w).unwrap(), device.upload(&g).unwrap());
        let c = [1.0, -1.0, 0.0, 0.0];
        let found = products(&device, &[g.view(), g.view()], c, c);
        let c = device.upload(&c).unwrap();
        let direction = Combination { vectors: [Some(g.view()), Some(g.view()), None, None], coefficients: c.view() };
        let mut out = device.poisoned::<f32>(1003).unwrap();
        let norm = found.slice(3..4).unwrap();
        sharpness::perturb_along(weights.view(), direction, norm, 0.5, out.view_mut()).unwrap();
        assert_eq!(out.to_vec().unwrap(), w, "{name}: along");
        let (zero, scaling) = (device.zeros::<f32>(1003).unwrap(), Scaling { eta: 0.01, scaled_len: 700 });
        let (mut norm, mut reduction) = (device.poisoned::<f64>(1).unwrap(), Reduction::new(&device).unwrap());
        sharpness::adaptive_norm(weights.view(), zero.view(), scaling, &mut reduction, norm.view_mut()).unwrap();
        let (w_view, norm) = (weights.view(), norm.view());
        sharpness::perturb_adaptive(w_view, zero.view(), scaling, norm, 0.5, out.view_mut()).unwrap();
        assert_eq!(out.to_vec().unwrap(), w, "{name}: adaptive");
    }
}

fn check_ascend<T: Scalar>(devices: &[(String, Device)]) {
    let [keep, step] = [0.8, -0.37];
    for (n, odd) in cases() {
        let [w, g, before, _] = four_vectors::<T>(400, n);
        for (first, last) in [(true, true), (true, false), (false, true), (false, false)] {
            on_devices(devices, true, |name, device| {
                let (weights, gradient) = (Part::new(device, odd == 1, &w), Part::new(device, odd == 2, &g));
                let mut displacement = match first {
                    true => Part::poisoned(device, odd == 3, n),
                    false => Part::new(device, odd == 3, &before),
                };
                let untouched = bits(&displacement.values());
                let c = device.upload(&[keep, step]).unwrap();
                let mut out = Part::poisoned(device, odd == 4, n);
                let (w_view, g_view, moved) = (weights.view(), gradient.view(), displacement.view_mut());
                sharpness::ascend(w_view, g_view, moved, c.view(), out.view_mut(), (first, last)).unwrap();
                let what = format!("{name}, n = {n}, odd {odd}, first {first}, last {last}");
                // Roundings of each term: its coefficient, the product, the sum.
                let moved = (0..n).map(|i| {
                    let (kept, along) = (keep * Into::<f64>::into(before[i]), step * Into::<f64>::into(g[i]));
                    if first { (along, 2.0 * along.abs()) } else { (kept + along, 3.0 * (kept.abs() + along.abs())) }
                });
                let (found, left) = (out.values(), displacement.values());
                if last {
                    assert!(bits(&left) == untouched, "{what}: wrote the displacement");
                } else {
                    assert_rounded(&format!("{what}: displacement"), &left, moved.clone());
                }
                let points = moved.zip(&w).map(|((moved, roundings), &w)| {
                    let point = moved + w.into();
                    (point, roundings + point.abs())
                });
                assert_rounded(&what, &found, points);
                vec![bits(&found), bits(&left)]
            });
        }
    }
}

#[test]
fn ascend() {
    check_ascend::<f32>(&devices());
    check_ascend::<f64>(&host_devices());
}

/// T g, T² g and the point of ASAM, with the roundings of the point: η, T twice, the products, the scale; and the
/// point.
fn adaptive(w: f64, g: f64, scaled: bool, eta: f64, scale: f64) -> (f64, (f64, f64)) {
    let t = if scaled { w.abs() + eta } else { 1.0 };
    let (step, point) = (scale * t * t * g, w + scale * t * t * g);
    (t * g, (point, 8.0 * step.abs() + point.abs()))
}

fn check_adaptive<T: Scalar>(devices: &[(String, Device)]) {
    let (rho, eta) = (0.7, 0.01);
    for (n, odd) in cases() {
        let [mut w, g, ..] = four_vectors::<T>(500, n);
        if n > 0 {
            w[n / 2] = T::from_f64(0.0); // η alone
        }
        for scaled_len in [0, n / 2, n, n + 7] {
            let scaling = Scaling { eta, scaled_len };
            let at = |i: usize, scale| adaptive(w[i].into(), g[i].into(), i < scaled_len, eta, scale);
            let exact = (0..n).map(|i| at(i, 0.0).0.powi(2)).sum::<f64>().sqrt();
            on_devices(devices, false, |name, device| {
                let (weights, gradient) = (Part::new(device, odd == 1, &w), Part::new(device, odd == 2, &g));
                let (mut norm, mut reduction) = (device.poisoned::<f64>(1).unwrap(), Reduction::new(device).unwrap());
                let (w_view, g_view) = (weights.view(), gradient.view());
                sharpness::adaptive_norm(w_view, g_view, scaling, &mut reduction, norm.view_mut()).unwrap();
                let found = norm.to_vec().unwrap();
                // What is left in double precision is the order of the sum.
                let right = relative_eq!(found[0], exact, epsilon = 0.0, max_relative = 1e-13);
                assert!(right, "{name}, n = {n}, {scaled_len} scaled: norm {found:?} instead of {exact}");
                vec![bits(&found)]
            });
            on_devices(devices, true, |name, device| {
                let (weights, gradient) = (Part::new(device, odd == 1, &w), Part::new(device, odd == 2, &g));
                let (norm, mut out) = (device.upload(&[exact]).unwrap(), Part::poisoned(device, odd == 3, n));
                let (w_view, g_view, norm) = (weights.view(), gradient.view(), norm.view());
                sharpness::perturb_adaptive(w_view, g_view, scaling, norm, rho, out.view_mut()).unwrap();
                let found = out.values();
                let expected = (0..n).map(|i| at(i, rho / (exact + 1e-12)).1);
                assert_rounded(&format!("{name}, n = {n}, odd {odd}, {scaled_len} scaled"), &found, expected);
                vec![bits(&found)]
            });
        }
    }
}

#[test]
fn adaptive_balls() {
    check_adaptive::<f32>(&devices());
    check_adaptive::<f64>(&host_devices());
}

/// A vector so long that the CPU writes past its caches, with a scaled part that ends in the middle of a cache line.
#[test]
fn adaptive_balls_of_long_vectors() {
    let n = 4_500_007;
    let mut random = Random(9);
    let mut uniform = || -> Vec<f32> { (0..n).map(|_| random.uniform() as f32 - 0.5).collect() };
    let (w, g) = (uniform(), uniform());
    let scaling = Scaling { eta: 0.01, scaled_len: n / 2 + 3 };
    for (name, device) in devices().into_iter().filter(|(name, device)| name.starts_with("cpu") || !device.is_host()) {
        for odd in [false, true] {
            let (weights, gradient) = (Part::new(&device, odd, &w), Part::new(&device, odd, &g));
            let (norm, mut out) = (device.upload(&[0.5]).unwrap(), Part::poisoned(&device, odd, n));
            let (w_view, g_view, norm) = (weights.view(), gradient.view(), norm.view());
            sharpness::perturb_adaptive(w_view, g_view, scaling, norm, 0.7, out.view_mut()).unwrap();
            let scale = 0.7 / (0.5 + 1e-12);
            let expected = (0..n).map(|i| adaptive(w[i].into(), g[i].into(), i < scaling.scaled_len, 0.01, scale).1);
            assert_rounded(&format!("{name}, odd {odd}"), &out.values(), expected);
        }
    }
}

fn check_perturb_normal<T: Scalar>(devices: &[(String, Device)]) {
    let (rho, seed) = (0.7, 0x0123_4567_89ab_cdef);
    for (case, (n, odd)) in cases().enumerate() {
        let first_block = [0, 1, 77, (1 << 32) - 1, 1 << 40][case % 5];
        let w: Vec<T> = Random(600).vector(n);
        let mut z = Device::host().poisoned::<T>(n).unwrap();
        random::normal(z.view_mut(), seed, 4 * first_block).unwrap();
        let z = to_f64(&z.to_vec().unwrap());
        let exact = dot(&z, &z).sqrt();
        on_devices(devices, false, |name, device| {
            let (mut norm, mut reduction) = (device.poisoned::<f64>(1).unwrap(), Reduction::new(device).unwrap());
            random::normal_norm(n, seed, first_block, &mut reduction, norm.view_mut()).unwrap();
            let found = norm.to_vec().unwrap();
            // Squares are exact and sums are in double precision: only the order of the sum differs.
            assert!(
                relative_eq!(found[0], exact, epsilon = 0.0, max_relative = 1e-13),
                "{name}, n = {n}: norm {found:?} instead of {exact}"
            );
            vec![bits(&found)]
        });
        on_devices(devices, true, |name, device| {
            let (weights, norm) = (Part::new(device, odd == 1, &w), device.upload(&[exact]).unwrap());
            let mut out = Part::poisoned(device, odd == 2, n);
            random::perturb_normal(weights.view(), seed, first_block, norm.view(), rho, out.view_mut()).unwrap();
            let found = out.values();
            let expected = z.iter().zip(&w).map(|(z, &w)| {
                let step = rho * z / (exact + 1e-12);
                let point = step + w.into();
                // Roundings: the scale, its product, and the point.
                (point, 2.0 * step.abs() + point.abs())
            });
            assert_rounded(&format!("{name}, n = {n}, odd {odd}, block {first_block}"), &found, expected);
            vec![bits(&found)]
        });
    }
}

#[test]
fn perturb_normal() {
    check_perturb_normal::<f32>(&devices());
    check_perturb_normal::<f64>(&host_devices());
}

// ---- Formulas for a few numbers ------------------------------------------------------------------------------------

#[test]
fn quotients() {
    for (name, device) in devices() {
        let upload = |value: f64| device.upload(&[value]).unwrap();
        for (factor, numerator, denominator, expected) in [
            (0.3, Some(1.7), 2.5, 0.3 * 1.7 / 2.5),
            (-0.3, None, 2.5, -0.3 / 2.5),
            (0.5, None, 0.0, 0.5e12),
            (0.5, Some(0.0), 0.0, 0.0),
            (2.0, Some(3e-12), 1e-12, 3.0),
        ] {
            let (above, below, mut c) = (numerator.map(upload), upload(denominator), device.poisoned(2).unwrap());
            let above = above.as_ref().map(|number| number.view());
            sharpness::quotient(factor, above, below.view(), c.view_mut()).unwrap();
            // 1e-12 in the denominator is 4e-13 of 2.5.
            let expected = if denominator == 2.5 { expected * (1.0 - 4e-13) } else { expected };
            assert_numbers(&format!("{name}, {factor}, {numerator:?}/{denominator}"), &c, &[1.0, expected]);
        }
    }
}

#[test]
fn rejections() {
    let (a, b): (Vec<f64>, Vec<f64>) = (Random(1).vector(1003), Random(2).vector(1003));
    for (name, device) in devices() {
        for (products, expected) in
            [([4.0, -3.0, 9.0, 2.0, 3.0], [1.0 - 0.4 * 0.75, -0.4]), ([0.0, 0.0, 9.0, 0.0, 3.0], [1.0, -0.4])]
        {
            let (products, mut c) = (device.upload(&products).unwrap(), device.poisoned(2).unwrap());
            sharpness::rejection(products.view(), 1.0, -0.4, c.view_mut()).unwrap();
            assert_numbers(&name, &c, &expected);
        }
        // The rest of B is orthogonal to A.
        if device.is_host() {
            let (x, y) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
            let found = products(&device, &[x.view(), y.view()], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]);
            let mut c = device.poisoned(2).unwrap();
            sharpness::rejection(found.view(), 0.0, 1.0, c.view_mut()).unwrap();
            let c = c.to_vec().unwrap();
            assert!(c[1] == 1.0 && (c[0] * dot(&a, &a) + dot(&b, &a)).abs() < 1e-13 * dot(&a, &a), "{name}: {c:?}");
        }
    }
}

#[test]
fn gam_coefficients() {
    let n = 1003;
    let g = four_vectors::<f64>(700, n);
    for terms in [GamTerms { beta0: 0.5, beta1: 0.6, gamma: 0.03 }, GamTerms { beta0: 1.75, beta1: -0.25, gamma: 1.5 }]
    {
        let (beta1, beta2, beta3) = (terms.beta1, 1.0 - terms.beta0, 1.0 - terms.beta1);
        let m: Vec<f64> = (0..n).map(|i| g[0][i] + beta2.abs() * g[2][i]).collect();
        let of_g: Vec<f64> = (0..n).map(|i| beta1 * g[1][i] + beta3 * g[3][i]).collect();
        let share = dot(&m, &of_g) / dot(&of_g, &of_g);
        for (name, device) in host_devices() {
            let uploaded = [0, 1, 2, 3].map(|k| device.upload(&g[k]).unwrap());
            let (a, b) = terms.combinations();
            let found = products(&device, &[0, 1, 2, 3].map(|k| uploaded[k].view()), a, b);
            let mut c = device.poisoned::<f64>(4).unwrap();
            sharpness::gam_coefficients(found.view(), terms, c.view_mut()).unwrap();
            let c: [f64; 4] = c.to_vec().unwrap().try_into().unwrap();
            let found: Vec<f64> = (0..n).map(|i| combined(&g, ([true; 4], c), i).0).collect();
            // Elements of up to 15 with about twenty roundings, and the part of G with the square root of its thousand
            // terms.
            let expected = (0..n).map(|i| (of_g[i] - terms.gamma * (m[i] - of_g[i] * share), 300.0));
            assert_rounded(&name, &found, expected);
        }
    }
    // Without G there is no projection.
    let terms = GamTerms { beta0: 1.75, beta1: 0.6, gamma: 0.03 };
    for (name, device) in devices() {
        let (products, mut c) = (device.upload(&[4.0, 0.0, 0.0, 2.0, 0.0]).unwrap(), device.poisoned(4).unwrap());
        sharpness::gam_coefficients(products.view(), terms, c.view_mut()).unwrap();
        assert_numbers(&name, &c, &[-0.03, 0.6, -0.03 * 0.75, 0.4]);
    }
}

#[test]
fn ascent_coefficients() {
    for (name, device) in devices() {
        let norm = device.upload(&[4.0]).unwrap();
        let coefficients = |products: Option<[f64; 3]>, rho| {
            let products = products.map(|[aa, ab, bb]| device.upload(&[aa, ab, bb, aa.sqrt(), bb.sqrt()]).unwrap());
            let (products, mut c) = (products.as_ref().map(|found| found.view()), device.poisoned(2).unwrap());
            sharpness::ascent_coefficients(norm.view(), products, rho, 0.5, c.view_mut()).unwrap();
            c
        };
        let near = 1.0 - 2.5e-13; // 1e-12 beside a norm of 4
        assert_numbers(&format!("{name}: first"), &coefficients(None, 0.9), &[0.0, 0.125 * near]);
        assert_numbers(&format!("{name}: first, to the edge"), &coefficients(None, 0.1), &[0.0, 0.025 * near]);
        // ε = (0.3, 0.4), and g = (4, 0) leads to (0.8, 0.4), within the first ball and beyond the second.
        let moved = Some([0.25, 1.2, 16.0]);
        assert_numbers(&format!("{name}: inside"), &coefficients(moved, 0.9), &[1.0, 0.125 * near]);
        let shrink = 0.4 / (0.3 + 0.5 * near).hypot(0.4);
        assert_numbers(&format!("{name}: outside"), &coefficients(moved, 0.4), &[shrink, shrink * 0.125 * near]);
        // A step back to the centre leaves a zero to divide by. A gradient of zero moves nothing.
        let back = coefficients(Some([0.25, -2.0, 16.0]), 0.4);
        assert_numbers(&format!("{name}: back"), &back, &[1.0, 0.125 * near]);
        let kept = coefficients(Some([0.25, 0.0, 0.0]), 0.4).to_vec().unwrap();
        assert!(abs_diff_eq!(kept[0], 0.8, epsilon = 1e-14) && kept[1].is_finite(), "{name}, no gradient: {kept:?}");
    }
}

#[test]
fn clip_coefficients() {
    let c = [1.5, -0.3, 0.0, 7.0];
    for (name, device) in devices() {
        // Because of PyTorch's 1e-6, a norm at the limit is clipped too.
        for (norm, scale) in [(0.0, 1.0), (1.999, 1.0), (2.0, 2.0 / 2.000001), (8.0, 2.0 / 8.000001)] {
            let (norm, mut clipped) = (device.upload(&[norm]).unwrap(), device.upload(&c).unwrap());
            sharpness::clip_coefficients(norm.view(), 2.0, clipped.view_mut()).unwrap();
            assert_numbers(&format!("{name}, scale {scale}"), &clipped, &c.map(|c| c * scale));
        }
    }
}

#[test]
fn adgd_rates() {
    let grown = 1.04f64.sqrt() * 0.04;
    for (name, device) in devices() {
        // ‖A‖, ‖B‖ and the state; η and θ.
        for (what, norms, state, damping, [eta, theta]) in [
            ("the first step", [f64::NAN; 2], [0.01, 1.5, 0.0], 0.5, [0.01, 1.5]),
            ("a growing step", [3.0, 1.0], [0.04, 2.0, 1.0], 0.5, [grown, 1.04f64.sqrt()]),
            ("a shrinking step", [0.3, 10.0], [0.04, 2.0, 1.0], 0.5, [0.015, 0.375]),
            ("the authors' damping", [0.3, 10.0], [0.04, 2.0, 1.0], 1.0, [0.03, 0.75]),
            ("0/0", [0.0, 0.0], [0.04, 2.0, 1.0], 0.5, [grown, 1.04f64.sqrt()]),
            ("equal gradients", [0.3, 0.0], [0.04, 2.0, 1.0], 0.5, [grown, 1.04f64.sqrt()]),
            ("equal weights", [0.0, 0.3], [0.04, 2.0, 1.0], 0.5, [grown, 1.04f64.sqrt()]),
            ("no rate", [0.3, 10.0], [0.0, 2.0, 1.0], 0.5, [0.0, 1.0]),
            ("any growth", [30.0, 1.0], [1e-4, f64::INFINITY, 1.0], 0.5, [15.0, 1.5e5]),
            ("any growth, 0/0", [0.0, 0.0], [1e-4, f64::INFINITY, 1.0], 0.5, [1e-4, f64::INFINITY]),
        ] {
            let [a, b] = norms;
            let products = device.upload(&[a * a, 0.0, b * b, a, b]).unwrap();
            let (norm, state) = (device.upload(&[3.0]).unwrap(), device.upload(&state).unwrap());
            let mut rates = device.poisoned::<f64>(4).unwrap();
            sharpness::adgd_rates(products.view(), norm.view(), state.view(), (0.02, damping), rates.view_mut())
                .unwrap();
            let per_rho = if eta > 0.0 { 3.0 / eta.sqrt() } else { 1e300 };
            assert_numbers(&format!("{name}: {what}"), &rates, &[eta, eta.sqrt(), theta, per_rho]);
            // With the fourth number as the norm, the displacement is ρ = sqrt(η), here from 0 along a gradient of norm
            // 3.
            let (w, g) = (device.zeros::<f32>(5).unwrap(), device.upload(&[3.0f32, 0.0, 0.0, 0.0, 0.0]).unwrap());
            let mut out = device.poisoned::<f32>(5).unwrap();
            let per_rho = rates.slice(3..4).unwrap();
            vector::perturb(w.view(), g.view(), per_rho, 1.0, out.view_mut(), None).unwrap();
            let exact = [eta.sqrt(), 0.0, 0.0, 0.0, 0.0].into_iter().map(|x| (x, 3.0 * x));
            assert_rounded(&format!("{name}: {what}"), &out.to_vec().unwrap(), exact); // scale, product, sum
        }
    }
}

#[test]
fn adgd_commit() {
    for (name, device) in devices() {
        for (flag, expected) in [(0u32, [0.04, 0.8, 1.0]), (1, [0.03, 1.5, 0.0]), (u32::MAX, [0.03, 1.5, 0.0])] {
            let (rates, skip) = (device.upload(&[0.04, 0.2, 0.8, 15.0]).unwrap(), device.upload(&[flag]).unwrap());
            let mut state = device.upload(&[0.03, 1.5, 0.0]).unwrap();
            sharpness::adgd_commit(rates.view(), skip.view(), state.view_mut()).unwrap();
            assert_eq!(state.to_vec().unwrap(), expected, "{name}, flag {flag}");
        }
    }
}

// ---- Errors --------------------------------------------------------------------------------------------------------

fn length(result: Result<()>, name: &str, wrong: usize, right: usize) {
    let error = result.unwrap_err();
    let Error::Length { argument, found, expected, .. } = error else { panic!("{error} instead of a length") };
    assert_eq!((argument, found, expected), (name, wrong, right));
}

fn other_device(result: Result<()>, name: &str) {
    let error = result.unwrap_err();
    let Error::OtherDevice { argument, .. } = error else { panic!("{error} instead of another device") };
    assert_eq!(argument, name);
}

/// Calls with an argument that is too long by one, and with one of another device. The errors name the argument.
fn refused<T: Element>(name: &str, len: usize, device: &Device, mut call: impl FnMut(Slice<'_, T>) -> Result<()>) {
    length(call(device.zeros(len + 1).unwrap().view()), name, len + 1, len);
    other_device(call(Device::host().zeros(len).unwrap().view()), name);
}

#[test]
fn wrong_lengths_and_devices_are_refused() {
    let here = &Device::host();
    let (x, flag) = (here.zeros::<f32>(10).unwrap(), here.zeros::<u32>(1).unwrap());
    let (x, flag, five) = (x.view(), flag.view(), here.zeros::<f64>(5).unwrap());
    let [one, two, three, four, five] = [1, 2, 3, 4, 5].map(|len| five.slice(0..len).unwrap());
    let (vector, number) = (|| here.zeros::<f32>(10).unwrap(), |len| here.zeros::<f64>(len).unwrap());
    let far = |len| Device::host().zeros::<f64>(len).unwrap();
    let sums = &mut Reduction::new(here).unwrap();
    fn of<'a>(x: Slice<'a, f32>, g: Slice<'a, f32>, coefficients: Slice<'a, f64>) -> Combination<'a, f32> {
        Combination { vectors: [None, Some(x), None, Some(g)], coefficients }
    }
    let pair = || of(x, x, four);
    let scaling = Scaling { eta: 0.01, scaled_len: 4 };
    let terms = GamTerms { beta0: 0.5, beta1: 0.5, gamma: 0.1 };

    use sharpness as s;
    refused("vectors", 10, here, |g| s::combined_products(&[x, g], four, four, sums, number(5).view_mut()));
    refused("a", 4, here, |a| s::combined_products(&[x], a, four, sums, number(5).view_mut()));
    refused("b", 4, here, |b| s::combined_products(&[x], four, b, sums, number(5).view_mut()));
    length(s::combined_products(&[x], four, four, sums, number(3).view_mut()), "out", 3, 5);
    other_device(s::combined_products(&[x], four, four, sums, far(5).view_mut()), "out");
    refused("vectors[3]", 10, here, |g| s::combine(of(x, g, four), 1.0, false, vector().view_mut(), None));
    refused("coefficients", 4, here, |c| s::combine(of(x, x, c), 1.0, false, vector().view_mut(), None));
    refused("skip", 1, here, |skip| s::combine(pair(), 1.0, true, vector().view_mut(), Some(skip)));
    refused("vectors[3]", 10, here, |g| s::perturb_along(x, of(x, g, four), one, 0.1, vector().view_mut()));
    refused("w", 10, here, |w| s::perturb_along(w, pair(), one, 0.1, vector().view_mut()));
    refused("norm", 1, here, |norm| s::perturb_along(x, pair(), norm, 0.1, vector().view_mut()));
    let steps = (true, false);
    refused("w", 10, here, |w| s::ascend(w, x, vector().view_mut(), two, vector().view_mut(), steps));
    refused("g", 10, here, |g| s::ascend(x, g, vector().view_mut(), two, vector().view_mut(), steps));
    refused("coefficients", 2, here, |c| s::ascend(x, x, vector().view_mut(), c, vector().view_mut(), steps));
    let (mut short, mut away) = (here.zeros::<f32>(9).unwrap(), Device::host().zeros::<f32>(10).unwrap());
    length(s::ascend(x, x, short.view_mut(), two, vector().view_mut(), steps), "displacement", 9, 10);
    other_device(s::ascend(x, x, away.view_mut(), two, vector().view_mut(), steps), "displacement");
    refused("g", 10, here, |g| s::adaptive_norm(x, g, scaling, sums, number(1).view_mut()));
    other_device(s::adaptive_norm(away.view(), x, scaling, sums, number(1).view_mut()), "w");
    length(s::adaptive_norm(x, x, scaling, sums, number(2).view_mut()), "norm", 2, 1);
    other_device(s::adaptive_norm(x, x, scaling, sums, far(1).view_mut()), "norm");
    refused("g", 10, here, |g| s::perturb_adaptive(x, g, scaling, one, 0.1, vector().view_mut()));
    refused("norm", 1, here, |norm| s::perturb_adaptive(x, x, scaling, norm, 0.1, vector().view_mut()));
    length(s::perturb_adaptive(x, x, scaling, one, 0.1, short.view_mut()), "out", 9, 10);
    other_device(s::perturb_adaptive(away.view(), x, scaling, one, 0.1, vector().view_mut()), "w");
    refused("numerator", 1, here, |above| s::quotient(1.0, Some(above), one, number(2).view_mut()));
    refused("denominator", 1, here, |below| s::quotient(1.0, Some(one), below, number(2).view_mut()));
    refused("denominator", 1, here, |below| s::quotient(1.0, None, below, number(2).view_mut()));
    length(s::quotient(1.0, None, one, number(1).view_mut()), "coefficients", 1, 2);
    refused("products", 5, here, |products| s::rejection(products, 1.0, 1.0, number(2).view_mut()));
    length(s::rejection(five, 1.0, 1.0, number(4).view_mut()), "coefficients", 4, 2);
    refused("products", 5, here, |products| s::gam_coefficients(products, terms, number(4).view_mut()));
    length(s::gam_coefficients(five, terms, number(2).view_mut()), "coefficients", 2, 4);
    refused("norm", 1, here, |norm| s::ascent_coefficients(norm, None, 0.1, 0.1, number(2).view_mut()));
    refused("products", 5, here, |found| s::ascent_coefficients(one, Some(found), 0.1, 0.1, number(2).view_mut()));
    length(s::ascent_coefficients(one, None, 0.1, 0.1, number(3).view_mut()), "coefficients", 3, 2);
    refused("norm", 1, here, |norm| s::clip_coefficients(norm, 1.0, number(4).view_mut()));
    length(s::clip_coefficients(one, 1.0, number(2).view_mut()), "coefficients", 2, 4);
    refused("products", 5, here, |products| s::adgd_rates(products, one, three, (0.02, 0.5), number(4).view_mut()));
    refused("norm", 1, here, |norm| s::adgd_rates(five, norm, three, (0.02, 0.5), number(4).view_mut()));
    refused("state", 3, here, |state| s::adgd_rates(five, one, state, (0.02, 0.5), number(4).view_mut()));
    length(s::adgd_rates(five, one, three, (0.02, 0.5), number(3).view_mut()), "rates", 3, 4);
    refused("rates", 4, here, |rates| s::adgd_commit(rates, flag, number(3).view_mut()));
    refused("skip", 1, here, |skip| s::adgd_commit(four, skip, number(3).view_mut()));
    length(s::adgd_commit(four, flag, number(4).view_mut()), "state", 4, 3);
    length(random::normal_norm(10, 1, 0, sums, number(2).view_mut()), "norm", 2, 1);
    other_device(random::normal_norm(10, 1, 0, sums, far(1).view_mut()), "norm");
    refused("w", 10, here, |w| random::perturb_normal(w, 1, 0, one, 0.1, vector().view_mut()));
    refused("norm", 1, here, |norm| random::perturb_normal(x, 1, 0, norm, 0.1, vector().view_mut()));

    // More or fewer vectors than any kernel takes.
    let argument = |result: Result<()>| assert!(matches!(result.unwrap_err(), Error::Argument { .. }));
    let some = |count| Combination { vectors: [0, 1, 2, 3].map(|k| (k < count).then_some(x)), coefficients: four };
    argument(s::combined_products::<f32>(&[], four, four, sums, number(5).view_mut()));
    argument(s::combined_products(&[x; 5], four, four, sums, number(5).view_mut()));
    argument(s::combine(some(0), 1.0, false, vector().view_mut(), None));
    for count in [0, 1, 3, 4] {
        argument(s::perturb_along(x, some(count), one, 0.1, vector().view_mut()));
    }
}
