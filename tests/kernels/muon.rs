//! Muon's step against Newton–Schulz steps as they are written, in double on the host.

use crate::common::{Random, assert_close, bits, devices, host_devices, newton_schulz, on_devices, to_f64, upload};
use polder::arena::Matrix;
use polder::device::{Device, Error, Scalar};
use polder::kernels::muon::{Muon, MuonStep};
use polder::kernels::vector::{Combination, Rate};

/// Sides around those of a register tile, a strip, a tile on the GPU and on the CPU, and of the depth that is packed.
const SIDES: [(usize, usize); 9] =
    [(27, 16), (1, 7), (7, 1), (64, 64), (65, 40), (40, 140), (133, 129), (300, 12), (5, 270)];

/// One after the other, with gaps between some.
fn placed() -> (Vec<Matrix>, usize) {
    let mut offset = 3;
    let place = |(index, &(rows, columns)): (usize, &(usize, usize))| {
        let matrix = Matrix { offset, rows, columns };
        offset = matrix.range().end + index % 3;
        matrix
    };
    let matrices = SIDES.iter().enumerate().map(place).collect();
    (matrices, offset + 5)
}

const MOMENTUM: f64 = 0.95;
const DECAY: f64 = 0.1;
const RATE: f64 = 0.02;

/// Two steps with a combination of two gradients; the last matrices are not decayed.
fn check<T: Scalar>(devices: &[(String, Device)], tolerance: f64) {
    let (matrices, len) = placed();
    let mut random = Random(77);
    let start: Vec<T> = random.vector(len);
    // Gradients of very different sizes: the update does not depend on them.
    let gradients: Vec<[Vec<T>; 2]> = [1.0, 1e-4]
        .map(|scale| {
            [(); 2].map(|()| random.vector::<f64>(len).iter().map(|x| T::from_f64(scale * x)).collect::<Vec<T>>())
        })
        .to_vec();
    let decay_len = matrices[5].offset;
    let (mut w, mut m) = (to_f64(&start), vec![0.0; len]);
    for [a, b] in &gradients {
        for matrix in &matrices {
            let update: Vec<f64> = matrix
                .range()
                .map(|i| {
                    let g = a[i].to_f64() - 0.5 * b[i].to_f64();
                    m[i] = MOMENTUM * m[i] + (1.0 - MOMENTUM) * g;
                    MOMENTUM * m[i] + (1.0 - MOMENTUM) * g
                })
                .collect();
            let orthogonal = newton_schulz(&update, matrix.rows, matrix.columns);
            let scale = 0.2 * (matrix.rows.max(matrix.columns) as f64).sqrt();
            let kept = if matrix.offset < decay_len { 1.0 - RATE * DECAY } else { 1.0 };
            for (i, x) in matrix.range().zip(orthogonal) {
                w[i] = kept * w[i] - RATE * scale * x;
            }
        }
    }
    on_devices(devices, false, |name, device| {
        let mut muon = Muon::<T>::new(device, len, &matrices).unwrap();
        let mut weights = device.upload(&start).unwrap();
        let mut momentum = device.zeros(len).unwrap();
        let coefficients = device.upload(&[1.0, -0.5, 0.0, 0.0]).unwrap();
        let (go, skip, rate) =
            (device.zeros(1).unwrap(), device.upload(&[1]).unwrap(), device.upload(&[RATE]).unwrap());
        for (number, [a, b]) in gradients.iter().enumerate() {
            let [a, b] = [a, b].map(|g| device.upload(g).unwrap());
            let combination = Combination {
                vectors: [Some(a.view()), Some(b.view()), None, None],
                coefficients: coefficients.view(),
            };
            let lr = if number == 0 { Rate::Fixed(RATE) } else { Rate::Device(rate.view()) };
            let step = MuonStep { lr, momentum: MOMENTUM, weight_decay: DECAY, decay_len };
            let mut run = |place, skip| {
                muon.step(place, weights.view_mut(), momentum.view_mut(), combination, step, skip).unwrap();
            };
            run(0..len, skip.view());
            // In two parts.
            run(0..matrices[4].offset, go.view());
            run(matrices[4].offset..len, go.view());
        }
        let (found, average) = (weights.to_vec().unwrap(), momentum.to_vec().unwrap());
        for matrix in &matrices {
            let what = format!("{name}: {} x {}", matrix.rows, matrix.columns);
            // What the steps have added, which is smaller than the weights.
            let moved = |w: &[f64]| matrix.range().map(|i| w[i] - start[i].to_f64()).collect::<Vec<f64>>();
            assert_close(&what, &moved(&to_f64(&found)), &moved(&w), tolerance);
            assert_close(&what, &average[matrix.range()], &m[matrix.range()], tolerance);
        }
        let inside = |i: &usize| matrices.iter().any(|matrix| matrix.range().contains(i));
        for i in (0..len).filter(|i| !inside(i)) {
            assert_eq!((found[i], average[i]), (start[i], T::default()), "{name}: element {i} is in no matrix");
        }
        vec![bits(&found), bits(&average)]
    });
}

#[test]
fn a_step_is_momentum_and_newton_schulz_steps() {
    check::<f32>(&devices(), 2e-4);
    check::<f64>(&host_devices(), 1e-9);
}

/// A gradient of zeros moves nothing; one that is almost of rank one is orthogonalised as far as its size allows.
#[test]
fn degenerate_gradients_stay_finite() {
    for (name, device) in devices() {
        let (rows, columns) = (70, 30);
        let matrix = Matrix { offset: 0, rows, columns };
        let mut random = Random(5);
        let (left, right): (Vec<f64>, Vec<f64>) = (random.vector(rows), random.vector(columns));
        let outer = |noise: f64| -> Vec<f64> {
            let mut random = Random(6);
            (0..rows * columns).map(|i| left[i / columns] * right[i % columns] + noise * random.normal()).collect()
        };
        for (what, gradient) in [("zero", vec![0.0; rows * columns]), ("one", outer(0.0)), ("noisy", outer(1e-3))] {
            let mut muon = Muon::<f32>::new(&device, rows * columns, &[matrix]).unwrap();
            let mut weights = device.zeros(rows * columns).unwrap();
            let mut momentum = device.zeros(rows * columns).unwrap();
            let gradient_there = upload::<f32>(&device, &gradient);
            let (coefficients, go) = (device.upload(&[1.0; 4]).unwrap(), device.zeros(1).unwrap());
            let combination = Combination {
                vectors: [Some(gradient_there.view()), None, None, None],
                coefficients: coefficients.view(),
            };
            let step = MuonStep { lr: Rate::Fixed(1.0), momentum: 0.0, weight_decay: 0.0, decay_len: 0 };
            let (w, m) = (weights.view_mut(), momentum.view_mut());
            muon.step(0..rows * columns, w, m, combination, step, go.view()).unwrap();
            let scale = -0.2 * 70f64.sqrt();
            let expected: Vec<f64> = newton_schulz(&gradient, rows, columns).iter().map(|x| scale * x).collect();
            // Errors of the smallest singular values are those of the Gram matrix, times up to 3.4445^8.
            assert_close(&format!("{name}: {what}"), &weights.to_vec().unwrap(), &expected, 5e-3);
        }
    }
}

#[test]
fn vectors_that_do_not_fit_are_refused() {
    let device = Device::host();
    let mut muon = Muon::<f32>::new(&device, 6, &[Matrix { offset: 0, rows: 2, columns: 3 }]).unwrap();
    let (mut w, mut short) = (device.zeros(6).unwrap(), device.zeros(5).unwrap());
    let (gradient, coefficients, go) = (device.zeros(6).unwrap(), device.zeros(4).unwrap(), device.zeros(1).unwrap());
    let combination =
        Combination { vectors: [Some(gradient.view()), None, None, None], coefficients: coefficients.view() };
    let step = MuonStep { lr: Rate::Fixed(1.0), momentum: 0.9, weight_decay: 0.0, decay_len: 6 };
    let found = muon.step(0..6, w.view_mut(), short.view_mut(), combination, step, go.view());
    assert!(matches!(found, Err(Error::Length { argument: "m", .. })), "{found:?}");
    let found = muon.step(0..6, short.view_mut(), w.view_mut(), combination, step, go.view());
    assert!(found.is_err(), "{found:?}");
}
