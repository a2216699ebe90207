//! Biases with GELU and residual, sums over rows, and the embedding of tokens against naive formulas in double.

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices};
use crate::dual::{Dual, Number, compare, drawn, tolerance, upload};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result};
use polder::kernels::bias::{
    GeluTangents, RowsShape, Then, bias, bias_tangent, gelu_backward, gelu_backward_tangent, row_sums,
};
use polder::kernels::tokens::{TokensShape, embed, embed_backward};

const SHAPES: [RowsShape; 5] = [rows(1, 1), rows(3, 7), rows(40, 24), rows(700, 33), rows(9, 512)];

const fn rows(rows: usize, channels: usize) -> RowsShape {
    RowsShape { rows, channels }
}

fn gelu<N: Number>(z: N) -> N {
    z * z.below()
}

fn gelu_slope<N: Number>(z: N) -> N {
    z.below() + z * z.density()
}

/// x, bias, residual, dy, and gradients that are added to.
fn inputs<S: Compute>(shape: RowsShape) -> [Vec<Dual>; 5] {
    let mut random = Random((shape.rows * 1000 + shape.channels) as u64);
    let mut draw = || drawn::<S>(&mut random, shape.rows * shape.channels);
    let [x, residual, dy, old] = [draw(), draw(), draw(), draw()];
    [x, drawn::<S::Master>(&mut random, shape.channels), residual, dy, old]
}

/// Plain, with GELU, with residual; the gradient through the GELU, and the same added to another.
fn run<S: Compute>(device: &Device, shape: RowsShape, inputs: &[Vec<Dual>; 5]) -> Result<[[Buffer<S>; 2]; 5]> {
    let [x, residual, dy, mut sum] = [0, 2, 3, 4].map(|k| upload::<S>(device, &inputs[k]));
    let b = upload::<S::Master>(device, &inputs[1]);
    let pair = || -> Result<[Buffer<S>; 2]> { Ok([device.poisoned(x[0].len())?, device.poisoned(x[0].len())?]) };
    let [mut plain, mut curved, mut added, mut dx] = [pair()?, pair()?, pair()?, pair()?];
    let at = (x[0].view(), b[0].view());
    for (to, then, gelu, residual_tangent) in [
        (&mut plain, Then::Nothing, None, None),
        (&mut curved, Then::Gelu, Some(at), None),
        (&mut added, Then::Add(residual[0].view()), None, Some(residual[1].view())),
    ] {
        bias(shape, x[0].view(), b[0].view(), then, to[0].view_mut())?;
        bias_tangent(shape, gelu, x[1].view(), b[1].view(), residual_tangent, to[1].view_mut())?;
    }
    let tangents = GeluTangents {
        x: [x[0].view(), x[1].view()],
        bias: [b[0].view(), b[1].view()],
        dy: [dy[0].view(), dy[1].view()],
    };
    for (to, accumulate) in [(&mut dx, false), (&mut sum, true)] {
        gelu_backward(shape, at, dy[0].view(), to[0].view_mut(), accumulate)?;
        gelu_backward_tangent(shape, tangents, to[1].view_mut(), accumulate)?;
    }
    Ok([plain, curved, added, dx, sum])
}

fn check<S: Compute>(devices: &[(String, Device)]) {
    for shape in SHAPES {
        let inputs = inputs::<S>(shape);
        let [x, b, residual, dy, old] = &inputs;
        let z: Vec<Dual> = x.iter().enumerate().map(|(i, x)| *x + b[i % shape.channels]).collect();
        let curved: Vec<Dual> = z.iter().map(|z| gelu(*z)).collect();
        let added: Vec<Dual> = z.iter().zip(residual).map(|(z, r)| *z + *r).collect();
        let dx: Vec<Dual> = z.iter().zip(dy).map(|(z, dy)| *dy * gelu_slope(*z)).collect();
        let sum: Vec<Dual> = dx.iter().zip(old).map(|(dx, old)| *dx + *old).collect();
        for (name, device) in devices {
            let found = run::<S>(device, shape, &inputs).unwrap();
            let names = ["x + b", "gelu", "residual", "dx", "dx added"];
            for ((part, found), expected) in names.iter().zip(&found).zip([&z, &curved, &added, &dx, &sum]) {
                let what = format!("{name}, {}, {shape:?}: {part}", S::NAME);
                compare(&what, &found[0], &found[1], expected, tolerance::<S>());
            }
            let (from, mut sums) = (upload::<S>(device, dy), device.poisoned::<S::Master>(shape.channels).unwrap());
            let mut scratch = device.poisoned::<S::Master>(shape.scratch_len(1)).unwrap();
            row_sums(shape, from[0].view(), scratch.view_mut(), sums.view_mut()).unwrap();
            let mut expected = vec![0.0; shape.channels];
            dy.iter().enumerate().for_each(|(i, dy)| expected[i % shape.channels] += dy.0);
            // The terms are exact, and the sums are of the master type.
            let tolerance = 4e-6f64.min(10.0 * tolerance::<S>());
            assert_close(
                &format!("{name}, {}, {shape:?}: sums", S::NAME),
                &sums.to_vec().unwrap(),
                &expected,
                tolerance,
            );
        }
    }
}

#[test]
fn biases_are_their_formulas_with_gradients_and_tangents() {
    check::<f64>(&host_devices());
    check::<f32>(&devices());
    check::<f16>(&devices());
    check::<bf16>(&devices());
}

/// The polynomial in f32 against the double reference: relative to the result where that is not tiny, from far below
/// zero to far above.
#[test]
fn the_gelu_is_accurate_everywhere() {
    let x: Vec<f32> = (-1400..=1400).map(|i| i as f32 / 100.0).collect();
    let shape = rows(x.len(), 1);
    for (name, device) in devices() {
        let (from, zero) = (device.upload(&x).unwrap(), device.zeros::<f32>(1).unwrap());
        let mut y = device.poisoned::<f32>(x.len()).unwrap();
        bias(shape, from.view(), zero.view(), Then::Gelu, y.view_mut()).unwrap();
        for (x, y) in x.iter().zip(y.to_vec().unwrap()) {
            let expected = if *x < -5.0 {
                // Φ(x) = φ(x)/(|x| + 1/(|x| + 2/(|x| + …)))
                let a = -f64::from(*x);
                let fraction = (1..200).rev().fold(a, |rest, k| a + f64::from(k) / rest);
                f64::from(*x) * f64::from(*x).density() / fraction
            } else {
                gelu(f64::from(*x))
            };
            let error = (f64::from(y) - expected).abs();
            assert!(error <= 4e-6 * expected.abs() + 1e-30, "{name}: gelu({x}) = {y} instead of {expected:e}");
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    for (name, device) in devices() {
        let x = device.upload(&[f32::NAN, f32::INFINITY, -1e30]).unwrap();
        let (zero, mut y) = (device.zeros::<f32>(1).unwrap(), device.poisoned::<f32>(3).unwrap());
        bias(rows(3, 1), x.view(), zero.view(), Then::Gelu, y.view_mut()).unwrap();
        let y = y.to_vec().unwrap();
        assert!(y[0].is_nan() && y[1] == f32::INFINITY && y[2] == 0.0, "{name}: {y:?}");
    }
}

fn check_tokens<S: Compute>(devices: &[(String, Device)]) {
    for (batch, tokens, channels) in [(1, 2, 1), (3, 5, 7), (2, 21, 24), (4, 65, 32)] {
        let shape = TokensShape { batch, tokens, channels };
        let mut random = Random((tokens * channels) as u64);
        let [patches, old] = [(); 2].map(|()| drawn::<S>(&mut random, batch * (tokens - 1) * channels));
        let token = drawn::<S::Master>(&mut random, channels);
        let positions = drawn::<S::Master>(&mut random, tokens * channels);
        let dy = drawn::<S>(&mut random, batch * tokens * channels);
        let mut y = Vec::new();
        let mut dx = Vec::new();
        for (n, t) in (0..batch).flat_map(|n| (0..tokens).map(move |t| (n, t))) {
            for c in 0..channels {
                let position = positions[t * channels + c];
                let patch = || (n * (tokens - 1) + t - 1) * channels + c;
                y.push(if t == 0 { token[c] + position } else { patches[patch()] + position });
                if t > 0 {
                    dx.push(dy[(n * tokens + t) * channels + c]);
                }
            }
        }
        let sum: Vec<Dual> = dx.iter().zip(&old).map(|(dx, old)| *dx + *old).collect();
        for (name, device) in devices {
            let what = format!("{name}, {}, {shape:?}", S::NAME);
            let [patches, dy, mut added] = [&patches, &dy, &old].map(|numbers| upload::<S>(device, numbers));
            let [token, positions] = [&token, &positions].map(|numbers| upload::<S::Master>(device, numbers));
            let pair = |len| [(); 2].map(|()| device.poisoned::<S>(len).unwrap());
            let (mut found, mut gradient) = (pair(y.len()), pair(dx.len()));
            for k in 0..2 {
                let to = found[k].view_mut();
                embed(shape, patches[k].view(), token[k].view(), positions[k].view(), to).unwrap();
                embed_backward(shape, dy[k].view(), gradient[k].view_mut(), false).unwrap();
                embed_backward(shape, dy[k].view(), added[k].view_mut(), true).unwrap();
            }
            compare(&format!("{what}: y"), &found[0], &found[1], &y, tolerance::<S>());
            compare(&format!("{what}: dx"), &gradient[0], &gradient[1], &dx, 0.0);
            compare(&format!("{what}: dx added"), &added[0], &added[1], &sum, tolerance::<S>());
        }
    }
}

#[test]
fn tokens_stand_behind_the_class_token_at_their_positions() {
    check_tokens::<f64>(&host_devices());
    check_tokens::<f32>(&devices());
    check_tokens::<f16>(&devices());
    check_tokens::<bf16>(&devices());
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    let shape = rows(530, 45);
    let inputs = inputs::<f32>(shape);
    on_devices(&host_devices(), false, |_, device| {
        let found = run::<f32>(device, shape, &inputs).unwrap();
        let mut all: Vec<Vec<u64>> = found.iter().flatten().map(|buffer| bits(&buffer.to_vec().unwrap())).collect();
        let mut sums = device.poisoned::<f32>(shape.channels).unwrap();
        let mut scratch = device.poisoned::<f32>(shape.scratch_len(1)).unwrap();
        row_sums(shape, found[3][0].view(), scratch.view_mut(), sums.view_mut()).unwrap();
        all.push(bits(&sums.to_vec().unwrap()));
        all
    });
}

#[test]
fn wrong_arguments_are_refused() -> Result<()> {
    let device = Device::host();
    let (x, b, mut y) = (device.zeros::<f32>(6)?, device.zeros::<f32>(3)?, device.zeros::<f32>(6)?);
    let refused = bias(rows(3, 3), x.view(), b.view(), Then::Nothing, y.view_mut());
    assert_eq!(refused, Err(Error::Length { operation: "bias::bias", argument: "x", found: 6, expected: 9 }));
    let refused = bias(rows(2, 3), x.view(), b.view(), Then::Add(b.view()), y.view_mut());
    assert_eq!(refused, Err(Error::Length { operation: "bias::bias", argument: "residual", found: 3, expected: 6 }));
    let refused = row_sums(rows(0, 3), x.view(), y.view_mut(), device.zeros(3)?.view_mut());
    assert!(matches!(refused, Err(Error::Argument { .. })));
    let shape = TokensShape { batch: 1, tokens: 1, channels: 3 };
    let refused = embed_backward(shape, b.view(), y.view_mut(), false);
    assert!(matches!(refused, Err(Error::Argument { .. })));
    Ok(())
}
