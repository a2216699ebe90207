//! Sassha's direction against its definition in double.

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64, upload};
use polder::device::{Device, Error, Scalar};
use polder::kernels::sassha::{SasshaState, SasshaStep, sassha};

/// Not those of the method, so that no two of them can be mistaken for each other. A large eps shows beside roots near
/// one.
const STEP: SasshaStep = SasshaStep { beta1: 0.8, beta2: 0.95, eps: 0.1 };
/// Around a pack, and more than the blocks of a launch take at a time.
const LENGTHS: [usize; 7] = [1, 3, 4, 31, 257, 5000, 70_003];

struct Case {
    /// Steps before this one.
    taken: u32,
    /// Whether the curvature is measured.
    probe: bool,
    /// That of the curvature before the step.
    correction: f64,
}

const CASES: [Case; 5] = [
    Case { taken: 0, probe: true, correction: 0.0 },
    Case { taken: 6, probe: true, correction: 0.05 },
    Case { taken: 8, probe: false, correction: 0.3 },
    Case { taken: 40_000, probe: false, correction: 1.0 },
    // The first step was skipped: no curvature was ever measured.
    Case { taken: 2, probe: false, correction: 0.0 },
];

/// Gradient, probe, product, average and curvature.
fn inputs<T: Scalar>(n: usize) -> [Vec<f64>; 5] {
    let mut random = Random(n as u64);
    let mut numbers = || to_f64(&random.vector::<T>(n));
    let (gradient, product, average) = (numbers(), numbers(), numbers());
    let probe = numbers().iter().map(|x| x.signum()).collect();
    // The curvature of a weight can be zero.
    let curvature = (0..n).zip(numbers()).map(|(i, x)| if i % 5 == 2 { 0.0 } else { x.abs() }).collect();
    [gradient, probe, product, average, curvature]
}

/// The direction, the average, the curvature and its correction after a step.
fn expected([g, z, h, m, d]: &[Vec<f64>; 5], case: &Case) -> [Vec<f64>; 4] {
    let SasshaStep { beta1, beta2, eps } = STEP;
    let steps = case.taken as i32 + 1;
    let correction = if case.probe { 1.0 - beta2.powi(steps) } else { case.correction };
    let average: Vec<f64> = m.iter().zip(g).map(|(m, g)| beta1 * m + (1.0 - beta1) * g).collect();
    let measured = |(i, d): (usize, &f64)| beta2 * d + (1.0 - beta2) * (z[i] * h[i]).abs();
    let curvature: Vec<f64> = if case.probe { d.iter().enumerate().map(measured).collect() } else { d.clone() };
    let direction = |(m, d): (&f64, &f64)| {
        if correction == 0.0 {
            return 0.0;
        }
        m / (1.0 - beta1.powi(steps)) / ((d / correction).sqrt() + eps)
    };
    [average.iter().zip(&curvature).map(direction).collect(), average, curvature, vec![correction]]
}

/// A step on vectors that begin `offset` elements into their buffers. `out` begins poisoned. Returns what
/// [`expected`] computes.
fn run<T: Scalar>(device: &Device, inputs: &[Vec<f64>; 5], case: &Case, offset: usize, skip: u32) -> [Vec<f64>; 4] {
    let n = inputs[0].len();
    let around = |values: &[f64]| upload::<T>(device, &[&vec![7.5; offset], values, &[7.5]].concat());
    let [gradient, probe, product, mut average, mut curvature] = inputs.each_ref().map(|values| around(values));
    let mut out = device.poisoned::<T>(offset + n + 1).unwrap();
    let mut correction = device.upload(&[case.correction]).unwrap();
    let place = offset..offset + n;
    let probes = [&probe, &product].map(|vector| vector.slice(place.clone()).unwrap());
    let state = SasshaState {
        average: average.slice_mut(place.clone()).unwrap(),
        curvature: curvature.slice_mut(place.clone()).unwrap(),
        correction: correction.view_mut(),
    };
    let (taken, skip) = (device.upload(&[case.taken]).unwrap(), device.upload(&[skip]).unwrap());
    let (gradient, to) = (gradient.slice(place.clone()).unwrap(), out.slice_mut(place.clone()).unwrap());
    sassha(gradient, case.probe.then_some(probes), state, STEP, taken.view(), skip.view(), to).unwrap();
    let [out, average, curvature] = [out, average, curvature].map(|vector| to_f64(&vector.to_vec().unwrap()));
    for vector in [&average, &curvature] {
        assert!(vector[..offset].iter().chain(&vector[offset + n..]).all(|&x| x == 7.5), "written beside the vector");
    }
    assert!(out[..offset].iter().chain(&out[offset + n..]).all(|x| x.is_nan()), "written beside the direction");
    let [out, average, curvature] = [out, average, curvature].map(|vector| vector[place.clone()].to_vec());
    [out, average, curvature, correction.to_vec().unwrap()]
}

fn check<T: Scalar>(devices: &[(String, Device)], tolerance: f64) {
    for n in LENGTHS {
        let inputs = inputs::<T>(n);
        on_devices(devices, true, |name, device| {
            let mut all = Vec::new();
            for (number, case) in CASES.iter().enumerate() {
                let expected = expected(&inputs, case);
                for offset in [0, 1] {
                    let found = run::<T>(device, &inputs, case, offset, 0);
                    for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let what = format!("{name}, {n} of {}, case {number}, offset {offset}, {part}", T::NAME);
                        assert_close(&what, found, expected, if part == 3 { 1e-15 } else { tolerance });
                    }
                    all.extend(found.iter().map(|part| bits(part)));
                }
            }
            all
        });
    }
}

#[test]
fn the_direction_is_that_of_the_definition() {
    check::<f32>(&devices(), 1e-6);
    check::<f64>(&host_devices(), 1e-14);
}

#[test]
fn a_skipped_step_writes_nothing() {
    for (name, device) in devices() {
        let inputs = inputs::<f32>(133);
        for case in &CASES {
            let [out, average, curvature, correction] = run::<f32>(&device, &inputs, case, 1, 1);
            assert!(out.iter().all(|x| x.is_nan()), "{name}");
            assert_eq!((&average, &curvature), (&inputs[3], &inputs[4]), "{name}");
            assert_eq!(correction, [case.correction], "{name}");
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let device = Device::host();
    let long = device.zeros::<f32>(6).unwrap();
    let [mut average, mut curvature, mut out] = [(); 3].map(|()| device.zeros::<f32>(6).unwrap());
    let (counter, mut correction) = (device.zeros::<u32>(1).unwrap(), device.zeros::<f64>(1).unwrap());
    let mut refused = |gradient, product, average_len| {
        let state = SasshaState {
            average: average.slice_mut(0..average_len).unwrap(),
            curvature: curvature.view_mut(),
            correction: correction.view_mut(),
        };
        let probes = Some([long.view(), long.slice(0..product).unwrap()]);
        let gradient = long.slice(0..gradient).unwrap();
        match sassha(gradient, probes, state, STEP, counter.view(), counter.view(), out.view_mut()) {
            Err(Error::Length { operation: "sassha::sassha", argument, expected: 6, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!([refused(5, 6, 6), refused(6, 4, 6), refused(6, 6, 3)], ["gradient", "product", "average"]);
}
