//! Factors for the samples of a batch: their draws against the definition, and the products.

use super::image::philox_with;
use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use half::{bf16, f16};
use polder::device::{Compute, Device, Error, Scalar};
use polder::kernels::image::Position;
use polder::kernels::scale_samples::{FactorLaw, SampleFactors, scale_samples};

const SEED: u64 = 0x1234_5678_9abc_def0;

fn laws() -> [FactorLaw; 4] {
    [FactorLaw::drop_path(0.3), FactorLaw::shake_drop(0.5), FactorLaw::drop_path(0.75), FactorLaw::shake_drop(0.1)]
}

/// The factors of all operations, forward and backward in turn.
fn factors<T: Scalar>(drawn: &SampleFactors<T>) -> Vec<Vec<f64>> {
    let of = |operation| [drawn.forward(operation), drawn.backward(operation)];
    (0..4).flat_map(of).map(|row| to_f64(&row.unwrap().to_vec().unwrap())).collect()
}

/// Factors by the definition, for samples with numbers from `first` on.
fn expected(first: u64, batch: usize) -> Vec<Vec<f64>> {
    let words = |sample: u64, operation: u32| philox_with([sample as u32, (sample >> 32) as u32, operation, 0], SEED);
    let uniform = |word: u32| f64::from(word >> 8) / f64::from(1 << 24);
    let mut rows = Vec::new();
    for (operation, keep) in [(0, 0.7), (1, 0.5), (2, 0.25), (3, 0.1)] {
        let shakes = operation % 2 == 1;
        let of = |n: u64| {
            let own = words(first + n, operation);
            let gate = if shakes { words(first, operation)[0] } else { own[0] };
            match (shakes, uniform(gate) < keep) {
                (false, kept) => [f64::from(u8::from(kept)) / keep; 2],
                (true, true) => [1.0; 2],
                (true, false) => [2.0 * uniform(own[1]) - 1.0, uniform(own[2])],
            }
        };
        let both: Vec<[f64; 2]> = (0..batch as u64).map(of).collect();
        rows.extend([0, 1].map(|pass| both.iter().map(|pair| pair[pass]).collect::<Vec<_>>()));
    }
    rows
}

fn check_draws<T: Scalar>(device: &Device, tolerance: f64) -> Vec<Vec<u64>> {
    let batch = 37;
    let mut drawn = SampleFactors::<T>::new(device, &laws(), batch).unwrap();
    // Without a draw the factors are the means of the forward's.
    let means: Vec<f64> = factors(&drawn).iter().map(|row| row.iter().sum::<f64>() / batch as f64).collect();
    assert_close("expected factors", &means, &[1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.1, 0.1], tolerance);
    let mut all = Vec::new();
    for first in [0, 5, (1 << 32) - 9] {
        drawn.draw(SEED, Position { first, clock: None }).unwrap();
        let found = factors(&drawn);
        for (row, expected) in expected(first as u64, batch).iter().enumerate() {
            assert_close(&format!("row {row} from {first}"), &found[row], expected, tolerance);
        }
        all.extend(found.iter().map(|row| bits(row)));
    }
    // Three steps of 37 samples on the clock are as many samples.
    let clock = device.upload(&[1u64, 3]).unwrap();
    drawn.draw(SEED, Position { first: 2, clock: Some((clock.view(), batch)) }).unwrap();
    let by_clock = factors(&drawn);
    drawn.draw(SEED, Position { first: 2 + 3 * batch, clock: None }).unwrap();
    assert_eq!(by_clock, factors(&drawn));
    all
}

#[test]
fn draws_are_those_of_the_definition() {
    on_devices(&devices(), true, |_, device| check_draws::<f32>(device, 1e-7));
    on_devices(&host_devices(), true, |_, device| check_draws::<f64>(device, 1e-15));
}

/// Over many samples: the share that is kept, the mean and the variance.
#[test]
fn factors_have_the_moments_of_their_distributions() {
    let batch = 20_000;
    let mut drawn = SampleFactors::<f64>::new(&Device::host(), &laws()[..2], batch).unwrap();
    // A position at which ShakeDrop drops the batch.
    let dropped = (0..).find(|&first| expected(first, 1)[2][0] != 1.0).unwrap();
    drawn.draw(SEED, Position { first: dropped as usize, clock: None }).unwrap();
    let moments = |row: Vec<f64>| {
        let mean = row.iter().sum::<f64>() / batch as f64;
        [mean, row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / batch as f64]
    };
    let rows = [drawn.forward(0), drawn.forward(1), drawn.backward(1)].map(|row| row.unwrap().to_vec().unwrap());
    let found: Vec<f64> = rows.into_iter().flat_map(moments).collect();
    // Of 0 and 1/0.7, and of uniform numbers in [−1, 1] and [0, 1]: five standard errors are below 0.025.
    let close =
        [1.0, 3.0 / 7.0, 0.0, 1.0 / 3.0, 0.5, 1.0 / 12.0].iter().zip(&found).all(|(a, b)| (a - b).abs() < 0.025);
    assert!(close, "{found:?}");
}

fn check_products<S: Compute>(device: &Device, tolerance: f64) -> Vec<Vec<u64>> {
    let mut all = Vec::new();
    for (batch, values) in [(1, 1), (3, 7), (5, 64), (4, 1000), (130, 16)] {
        let mut random = Random((batch * values) as u64);
        let (x, start) = (random.vector::<S>(batch * values), random.vector::<S>(batch * values));
        let by: Vec<S::Master> = random.vector(batch);
        let (from, by_) = (device.upload(&x).unwrap(), device.upload(&by).unwrap());
        for accumulate in [false, true] {
            let mut to =
                if accumulate { device.upload(&start).unwrap() } else { device.poisoned::<S>(start.len()).unwrap() };
            scale_samples::<S>(by_.view(), from.view(), to.view_mut(), accumulate).unwrap();
            let found = to.to_vec().unwrap();
            let expected: Vec<f64> = (0..x.len())
                .map(|i| {
                    let scaled = by[i / values].to_f64() * x[i].to_f64();
                    if accumulate { start[i].to_f64() + scaled } else { scaled }
                })
                .collect();
            assert_close(&format!("{}, {batch}x{values}, {accumulate}", S::NAME), &found, &expected, tolerance);
            all.push(bits(&found));
        }
    }
    all
}

#[test]
fn products_are_those_of_the_definition() {
    on_devices(&devices(), true, |_, device| check_products::<f32>(device, 2e-7));
    on_devices(&devices(), true, |_, device| check_products::<f16>(device, 2f64.powi(-11) + 1e-6));
    on_devices(&devices(), true, |_, device| check_products::<bf16>(device, 2f64.powi(-8) + 1e-6));
    on_devices(&host_devices(), true, |_, device| check_products::<f64>(device, 1e-15));
}

#[test]
fn refuses_wrong_lengths_and_clocks() {
    let device = Device::host();
    let (x, factors) = (device.zeros::<f32>(12).unwrap(), device.zeros::<f32>(5).unwrap());
    let mut y = device.zeros::<f32>(12).unwrap();
    let refused = scale_samples::<f32>(factors.view(), x.view(), y.view_mut(), false);
    assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    let mut short = device.zeros::<f32>(10).unwrap();
    let refused = scale_samples::<f32>(factors.slice(0..4).unwrap(), x.view(), short.view_mut(), false);
    assert!(matches!(refused, Err(Error::Length { argument: "to", .. })), "{refused:?}");
    let clock = device.zeros::<u64>(1).unwrap();
    let mut drawn = SampleFactors::<f32>::new(&device, &laws(), 3).unwrap();
    let refused = drawn.draw(1, Position { first: 0, clock: Some((clock.view(), 3)) });
    assert!(matches!(refused, Err(Error::Length { argument: "clock", .. })), "{refused:?}");
}
