//! The random generator: its published known answers, that an element depends only on seed and position, that every
//! device gives the same bits, and that the numbers have the right distributions.

use approx::abs_diff_eq;

use crate::common::{bits as bits_of, devices, host_devices};
use polder::device::{Device, Error, Scalar};
use polder::kernels::random;

/// The relative error of a normal number: six roundings of 2^-24 (logarithm, root, angle, sine, product). The largest
/// error that was found among 10^8 numbers, with many small and large ones, is 5.3 roundings.
const NORMAL_ERROR: f64 = 6.0 / 16_777_216.0;

/// Philox4x32-10 as its paper defines it, as an independent reference.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |multiplier: u32, factor: u32| {
            let wide = u64::from(multiplier) * u64::from(factor);
            ((wide >> 32) as u32, wide as u32)
        };
        let (high0, low0) = product(0xD251_1F53, counter[0]);
        let (high1, low1) = product(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The word at a position of a stream.
fn word(seed: u64, position: u64) -> u32 {
    let block = position / 4;
    philox([block as u32, (block >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32])[(position % 4) as usize]
}

fn words(device: &Device, n: usize, seed: u64, offset: u64) -> Vec<u32> {
    let mut out = device.poisoned(n).unwrap();
    random::bits(out.view_mut(), seed, offset).unwrap();
    out.to_vec().unwrap()
}

fn numbers<T: Scalar>(
    device: &Device,
    n: usize,
    generate: impl Fn(polder::device::SliceMut<'_, T>) -> polder::device::Result<()>,
) -> Vec<T> {
    let mut out = device.poisoned(n).unwrap();
    generate(out.view_mut()).unwrap();
    out.to_vec().unwrap()
}

#[test]
fn known_answers() {
    // Published with Random123 for philox4x32-10.
    let cases = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in cases {
        assert_eq!(philox(counter, key), expected, "the reference itself");
        for (name, device) in devices() {
            let mut out = device.poisoned(4).unwrap();
            random::philox4x32_10(out.view_mut(), counter, key).unwrap();
            assert_eq!(out.to_vec().unwrap(), expected, "{name}");
        }
    }
    let device = Device::host();
    let mut short = device.zeros(3).unwrap();
    let error = random::philox4x32_10(short.view_mut(), [0; 4], [0; 2]).unwrap_err();
    assert!(matches!(error, Error::Length { argument: "out", found: 3, expected: 4, .. }), "{error}");
}

#[test]
fn words_depend_on_seed_and_position_alone() {
    let seed = 0x0123_4567_89ab_cdef;
    for (name, device) in devices() {
        for n in [1, 2, 3, 4, 5, 7, 1023, 100_003] {
            for offset in [0, 1, 2, 3, 4, 6, (1 << 34) - 2] {
                let found = words(&device, n, seed, offset);
                for (i, &found) in found.iter().enumerate() {
                    assert_eq!(found, word(seed, offset + i as u64), "{name}, n = {n}, offset = {offset}, i = {i}");
                }
            }
        }
    }
}

#[test]
fn a_part_of_a_buffer_gets_its_own_positions_and_nothing_beside_it() {
    for (name, device) in devices() {
        let mut out = device.upload(&[7u32; 64]).unwrap();
        random::bits(out.slice_mut(5..58).unwrap(), 9, 5).unwrap();
        let found = out.to_vec().unwrap();
        for (i, &found) in found.iter().enumerate() {
            let expected = if (5..58).contains(&i) { word(9, i as u64) } else { 7 };
            assert_eq!(found, expected, "{name}, {i}");
        }
    }
}

#[test]
fn numbers_are_made_of_the_words_as_documented() {
    let (n, seed, offset) = (20_001, 42, 6);
    let u = |position: u64| (f64::from(word(seed, position)) + 1.0) / 2f64.powi(32);
    let v = |position: u64| f64::from(word(seed, position)) / 2f64.powi(32);
    for (name, device) in devices() {
        let uniform = numbers::<f32>(&device, n, |out| random::uniform(out, seed, offset));
        let signs = numbers::<f32>(&device, n, |out| random::rademacher(out, seed, offset));
        let normal = numbers::<f32>(&device, n, |out| random::normal(out, seed, offset));
        for i in 0..n {
            let position = offset + i as u64;
            let bits = word(seed, position);
            assert_eq!(f64::from(uniform[i]), f64::from(bits >> 8) / 2f64.powi(24), "{name}, uniform {i}");
            assert_eq!(signs[i], if bits >> 31 == 1 { -1.0 } else { 1.0 }, "{name}, sign {i}");
            let even = position & !1;
            let radius = (-2.0 * u(even).ln()).sqrt();
            let angle = std::f64::consts::TAU * v(even + 1);
            let exact = radius * if position.is_multiple_of(2) { angle.cos() } else { angle.sin() };
            let error = (f64::from(normal[i]) - exact).abs();
            assert!(error <= NORMAL_ERROR * exact.abs() + 1e-14, "{name}, normal {i}: {error:e} of {exact}");
        }
    }
}

/// The extremes of normal numbers, from a long stream: the largest and the smallest radius of four million pairs.
/// (Chosen words would need a kernel that nothing else uses.)
#[test]
fn normal_numbers_are_accurate_in_the_tails_and_near_zero() {
    let (n, seed) = (8 << 20, 3);
    let device = Device::host();
    let normal = numbers::<f32>(&device, n, |out| random::normal(out, seed, 0));
    let words = words(&device, n, seed, 0);
    let (mut largest, mut smallest) = (0.0f64, f64::MAX);
    for (pair, word) in normal.chunks_exact(2).zip(words.chunks_exact(2)) {
        let u = (f64::from(word[0]) + 1.0) / 2f64.powi(32);
        let radius = (-2.0 * u.ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * f64::from(word[1]) / 2f64.powi(32)).sin_cos();
        for (found, exact) in [(pair[0], radius * cosine), (pair[1], radius * sine)] {
            let error = (f64::from(found) - exact).abs();
            // The reference's own angle is exact to 1e-16 of a turn, which shows where its sine or cosine vanishes.
            assert!(error <= NORMAL_ERROR * exact.abs() + 1e-14, "{found} instead of {exact}, radius {radius}");
        }
        largest = largest.max(radius);
        smallest = smallest.min(radius);
    }
    assert!(largest > 5.0 && smallest < 1e-2, "radii from {smallest} to {largest}");
}

#[test]
fn every_device_gives_the_same_bits() {
    for n in [1, 3, 5, 1023, 100_003] {
        let mut first: Option<Vec<Vec<u64>>> = None;
        for (name, device) in devices() {
            let found = vec![
                bits_of(&numbers::<f32>(&device, n, |out| random::uniform(out, 5, 11))),
                bits_of(&numbers::<f32>(&device, n, |out| random::normal(out, 5, 11))),
                bits_of(&numbers::<f32>(&device, n, |out| random::rademacher(out, 5, 11))),
            ];
            assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{name}, n = {n}");
        }
        for (name, device) in host_devices() {
            let doubles = vec![
                bits_of(&numbers::<f64>(&device, n, |out| random::uniform(out, 5, 11))),
                bits_of(&numbers::<f64>(&device, n, |out| random::normal(out, 5, 11))),
                bits_of(&numbers::<f64>(&device, n, |out| random::rademacher(out, 5, 11))),
            ];
            assert_eq!(first.as_ref(), Some(&doubles), "{name}, n = {n}: double precision");
        }
    }
}

/// Mean, variance and kurtosis, each within five of its standard errors.
fn check_moments(what: &str, values: &[f32], mean: f64, variance: f64, kurtosis: f64, eighth: f64) {
    let n = values.len() as f64;
    let moment = |power: i32| values.iter().map(|&x| (f64::from(x) - mean).powi(power)).sum::<f64>() / n;
    let fourth = kurtosis * variance * variance;
    let first = moment(1);
    assert!(first.abs() < 5.0 * (variance / n).sqrt(), "{what}: mean off by {first}");
    let second = moment(2);
    let error = 5.0 * ((fourth - variance * variance) / n).sqrt() + 1e-12;
    assert!(abs_diff_eq!(second, variance, epsilon = error), "{what}: variance {second}");
    let fourth_found = moment(4);
    let error = 5.0 * ((eighth - fourth * fourth) / n).sqrt() + 1e-12;
    assert!(abs_diff_eq!(fourth_found, fourth, epsilon = error), "{what}: fourth moment {fourth_found}");
}

#[test]
fn moments() {
    let device = Device::host();
    let n = 1 << 20;
    for seed in [0, 1, u64::MAX] {
        let uniform = numbers::<f32>(&device, n, |out| random::uniform(out, seed, 0));
        check_moments("uniform", &uniform, 0.5, 1.0 / 12.0, 1.8, 1.0 / (9.0 * 256.0));
        let normal = numbers::<f32>(&device, n, |out| random::normal(out, seed, 0));
        check_moments("normal", &normal, 0.0, 1.0, 3.0, 105.0);
        let signs = numbers::<f32>(&device, n, |out| random::rademacher(out, seed, 0));
        check_moments("rademacher", &signs, 0.0, 1.0, 1.0, 1.0);
        // Neighbours are independent, also the two halves of one Box–Muller pair.
        let normal: Vec<f64> = normal.iter().map(|&x| x.into()).collect();
        for lag in [1, 2, 4] {
            let products = normal.iter().zip(&normal[lag..]).map(|(a, b)| a * b).sum::<f64>();
            let correlation = products / (n - lag) as f64;
            assert!(correlation.abs() < 5.0 / (n as f64).sqrt(), "lag {lag}: {correlation}");
        }
    }
}

#[test]
fn uniform_numbers_fill_their_bins_evenly() {
    let n = 1 << 20;
    let values = numbers::<f32>(&Device::host(), n, |out| random::uniform(out, 17, 0));
    let mut counts = [0u32; 256];
    for value in values {
        counts[(value * 256.0) as usize] += 1;
    }
    let expected = n as f64 / 256.0;
    let chi_square: f64 = counts.iter().map(|&count| (f64::from(count) - expected).powi(2) / expected).sum();
    // 255 degrees of freedom: mean 255, standard deviation 22.6; five of them to either side.
    assert!((142.0..368.0).contains(&chi_square), "{chi_square}");
}

#[test]
fn normal_numbers_follow_the_normal_distribution() {
    // Φ by the series φ(x) Σ x^(2k+1)/(1·3·5···(2k+1)).
    let normal_cdf = |x: f64| {
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-17 * sum.abs() {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
    };
    let n = 200_000;
    let mut values = numbers::<f32>(&Device::host(), n, |out| random::normal(out, 23, 1));
    values.sort_by(f32::total_cmp);
    let distance = values.iter().enumerate().fold(0.0f64, |distance, (i, &value)| {
        let expected = normal_cdf(value.into());
        distance.max((expected - i as f64 / n as f64).abs()).max((expected - (i + 1) as f64 / n as f64).abs())
    });
    // Kolmogorov and Smirnov's critical value at a level of 1e-4.
    assert!(distance * (n as f64).sqrt() < 2.23, "{distance}");
}
