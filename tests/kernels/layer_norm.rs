//! Layer norm against naive formulas in double: output, gradients and the tangents of both.

use crate::common::{Random, bits, devices, host_devices, on_devices};
use crate::dual::{Dual, Number, compare, drawn, tolerance, upload};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice};
use polder::kernels::bias::RowsShape;
use polder::kernels::layer_norm::{
    Normalized, Saved, Tangents, backward, backward_tangent, layer_norm, parameter_gradients,
    parameter_gradients_tangent, tangent,
};

const SHAPES: [RowsShape; 5] = [rows(1, 7), rows(3, 1), rows(37, 24), rows(600, 17), rows(5, 384)];
const EPS: f64 = 1e-3;

const fn rows(rows: usize, channels: usize) -> RowsShape {
    RowsShape { rows, channels }
}

/// Output, gradient of x, of gamma and of beta.
fn reference<N: Number>(shape: RowsShape, x: &[N], [gamma, beta]: [&[N]; 2], dy: &[N]) -> [Vec<N>; 4] {
    let RowsShape { channels, .. } = shape;
    let (zero, n) = (N::from(0.0), N::from(channels as f64));
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    let (mut dgamma, mut dbeta) = (vec![zero; channels], vec![zero; channels]);
    for (x, dy) in x.chunks(channels).zip(dy.chunks(channels)) {
        let sum = |values: &[N]| values.iter().fold(zero, |sum, value| sum + *value);
        let mean = sum(x) / n;
        let centred: Vec<N> = x.iter().map(|x| *x - mean).collect();
        let squares: Vec<N> = centred.iter().map(|d| *d * *d).collect();
        let deviation = (sum(&squares) / n + N::from(EPS)).sqrt();
        let normal: Vec<N> = centred.iter().map(|d| *d / deviation).collect();
        let g: Vec<N> = dy.iter().zip(gamma).map(|(dy, gamma)| *dy * *gamma).collect();
        let products: Vec<N> = g.iter().zip(&normal).map(|(g, normal)| *g * *normal).collect();
        let (g_mean, g_n) = (sum(&g) / n, sum(&products) / n);
        for c in 0..channels {
            y.push(normal[c] * gamma[c] + beta[c]);
            dx.push((g[c] - g_mean - normal[c] * g_n) / deviation);
            dgamma[c] = dgamma[c] + dy[c] * normal[c];
            dbeta[c] = dbeta[c] + dy[c];
        }
    }
    [y, dx, dgamma, dbeta]
}

struct Found<S: Compute> {
    y: [Buffer<S>; 2],
    dx: [Buffer<S>; 2],
    sum: [Buffer<S>; 2],
    parameters: [[Buffer<S::Master>; 2]; 2],
}

fn pair<T: Compute>(device: &Device, len: usize) -> [Buffer<T>; 2] {
    [(); 2].map(|()| device.poisoned(len).unwrap())
}

fn run<S: Compute>(device: &Device, shape: RowsShape, inputs: &[Vec<Dual>; 5]) -> Result<Found<S>> {
    let [x, dy, mut sum] = [0, 3, 4].map(|k| upload::<S>(device, &inputs[k]));
    let [gamma, beta] = [1, 2].map(|k| upload::<S::Master>(device, &inputs[k]));
    let (mut y, mut dx) = (pair::<S>(device, x[0].len()), pair::<S>(device, x[0].len()));
    let (mut mean, mut inv_std) = (pair::<S::Master>(device, shape.rows), pair::<S::Master>(device, shape.rows));
    fn saved<'a, T: Scalar>(mean: &'a mut Buffer<T>, inv_std: &'a mut Buffer<T>) -> Saved<'a, T> {
        Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() }
    }
    let parameters = |k: usize| -> [Slice<'_, S::Master>; 2] { [gamma[k].view(), beta[k].view()] };
    let [y_value, y_tangent] = &mut y;
    let [mean_value, mean_tangent] = &mut mean;
    let [inv_std_value, inv_std_tangent] = &mut inv_std;
    layer_norm(shape, x[0].view(), parameters(0), EPS, y_value.view_mut(), saved(mean_value, inv_std_value))?;
    let (mean, inv_std) = (mean_value.view(), inv_std_value.view());
    let normalized = Normalized { x: x[0].view(), gamma: gamma[0].view(), mean, inv_std };
    let left = saved(mean_tangent, inv_std_tangent);
    tangent(shape, normalized, x[1].view(), parameters(1), y_tangent.view_mut(), left)?;
    let tangents = Tangents {
        x: x[1].view(),
        gamma: gamma[1].view(),
        mean: mean_tangent.view(),
        inv_std: inv_std_tangent.view(),
        dy: [dy[0].view(), dy[1].view()],
    };
    for (to, accumulate) in [(&mut dx, false), (&mut sum, true)] {
        backward(shape, normalized, dy[0].view(), to[0].view_mut(), accumulate)?;
        backward_tangent(shape, normalized, tangents, to[1].view_mut(), accumulate)?;
    }
    let (mut dgamma, mut dbeta) =
        (pair::<S::Master>(device, shape.channels), pair::<S::Master>(device, shape.channels));
    let mut scratch = device.poisoned::<S::Master>(shape.scratch_len(2))?;
    let out = [Some(dgamma[0].view_mut()), Some(dbeta[0].view_mut())];
    parameter_gradients(shape, normalized, dy[0].view(), scratch.view_mut(), out)?;
    let out = [Some(dgamma[1].view_mut()), Some(dbeta[1].view_mut())];
    parameter_gradients_tangent(shape, normalized, tangents, scratch.view_mut(), out)?;
    Ok(Found { y, dx, sum, parameters: [dgamma, dbeta] })
}

/// x, gamma, beta, dy, and gradients that are added to.
fn inputs<S: Compute>(shape: RowsShape) -> [Vec<Dual>; 5] {
    let mut random = Random((shape.rows * 1000 + shape.channels) as u64);
    let mut draw = || drawn::<S>(&mut random, shape.rows * shape.channels);
    let [x, dy, old] = [draw(), draw(), draw()];
    let [gamma, beta] = [(); 2].map(|()| drawn::<S::Master>(&mut random, shape.channels));
    [x, gamma, beta, dy, old]
}

fn check<S: Compute>(devices: &[(String, Device)]) {
    for shape in SHAPES {
        let inputs = inputs::<S>(shape);
        let [x, gamma, beta, dy, old] = &inputs;
        let [y, dx, dgamma, dbeta] = reference(shape, x, [gamma, beta], dy);
        let added: Vec<Dual> = old.iter().zip(&dx).map(|(old, dx)| *old + *dx).collect();
        // A channel alone is its own mean: in exact arithmetic everything but beta vanishes, so that only absolute
        // errors make sense, and the scale is that of 1/√eps.
        let tolerance = |scale: f64| scale * tolerance::<S>();
        for (name, device) in devices {
            let what = format!("{name}, {}, {shape:?}", S::NAME);
            let found = run::<S>(device, shape, &inputs).unwrap();
            if shape.channels == 1 {
                let dx = found.dx.iter().flat_map(|dx| dx.to_vec().unwrap());
                assert!(dx.into_iter().all(|dx| dx.to_f64() == 0.0), "{what}");
                continue;
            }
            compare(&format!("{what}: y"), &found.y[0], &found.y[1], &y, tolerance(1.0));
            compare(&format!("{what}: dx"), &found.dx[0], &found.dx[1], &dx, tolerance(2.0));
            compare(&format!("{what}: dx added"), &found.sum[0], &found.sum[1], &added, tolerance(2.0));
            for (which, found, expected) in
                [("dgamma", &found.parameters[0], &dgamma), ("dbeta", &found.parameters[1], &dbeta)]
            {
                // The inputs are exact in the storage type, and the sums are of the master type.
                compare(&format!("{what}: {which}"), &found[0], &found[1], expected, 4e-6f64.min(tolerance(10.0)));
            }
        }
    }
}

#[test]
fn layer_norm_is_its_formula_with_gradients_and_tangents() {
    check::<f64>(&host_devices());
    check::<f32>(&devices());
    check::<f16>(&devices());
    check::<bf16>(&devices());
}

/// A mean much larger than the deviation costs the accuracy of the mean and no more: it is rounded to half a unit in
/// the last place of 4096, 2⁻¹², and the largest element is 1.7 times the inverse deviation of 1.2.
#[test]
fn a_large_mean_does_no_harm() {
    let shape = rows(3, 40);
    let values: Vec<f32> = (0..120).map(|i| 4096.0 + (i * 7 % 11) as f32 * 0.25).collect();
    let numbers: Vec<Dual> = values.iter().map(|x| Dual(f64::from(*x), 0.0)).collect();
    let (ones, zeros) = (vec![Dual(1.0, 0.0); 40], vec![Dual(0.0, 0.0); 40]);
    let [expected, ..] = reference(shape, &numbers, [&ones, &zeros], &numbers);
    for (name, device) in devices() {
        let inputs = [numbers.clone(), ones.clone(), zeros.clone(), numbers.clone(), numbers.clone()];
        let found = run::<f32>(&device, shape, &inputs).unwrap();
        compare(&name, &found.y[0], &found.y[1], &expected, 1.2 / 4096.0 / 1.66);
    }
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    let shape = rows(530, 45);
    let inputs = inputs::<f32>(shape);
    on_devices(&host_devices(), false, |_, device| {
        let found = run::<f32>(device, shape, &inputs).unwrap();
        let [dgamma, dbeta] = found.parameters;
        let all = [found.y, found.dx, found.sum, dgamma, dbeta];
        all.iter().flatten().map(|buffer| bits(&buffer.to_vec().unwrap())).collect()
    });
}

#[test]
fn wrong_arguments_are_refused() -> Result<()> {
    let device = Device::host();
    let (x, gamma, mut y) = (device.zeros::<f32>(6)?, device.zeros::<f32>(3)?, device.zeros::<f32>(6)?);
    let mut run = |shape: RowsShape| {
        let (mut mean, mut inv_std) = (device.zeros::<f32>(2)?, device.zeros::<f32>(2)?);
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        layer_norm(shape, x.view(), [gamma.view(), gamma.view()], EPS, y.view_mut(), saved)
    };
    run(rows(2, 3))?;
    assert!(matches!(run(rows(0, 3)), Err(Error::Argument { .. })));
    assert!(matches!(run(rows(1 << 20, 1 << 20)), Err(Error::Argument { .. })));
    assert!(matches!(run(rows(3, 2)), Err(Error::Length { .. })));
    Ok(())
}
