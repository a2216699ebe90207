//! Fused attention against naive sums over all pairs of tokens in double: output, gradients and the tangents of both.

use crate::common::{Random, bits, devices, host_devices, on_devices};
use crate::dual::{Dual, Number, compare, drawn, tolerance, upload};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result};
use polder::kernels::attention::{
    Attended, AttentionShape, Projected, Tangents, attention, attention_tangent, backward, backward_tangent,
};

/// One tile and several, with rests; heads that fill a vector and do not; the largest head.
const SHAPES: [AttentionShape; 6] = [
    shape(2, 5, 3, 4),
    shape(1, 1, 2, 16),
    shape(2, 33, 1, 17),
    shape(1, 65, 2, 64),
    shape(1, 97, 1, 8),
    shape(1, 130, 1, 33),
];

const fn shape(batch: usize, tokens: usize, heads: usize, depth: usize) -> AttentionShape {
    AttentionShape { batch, tokens, heads, depth }
}

/// Output and gradient of x for the gradient `dy` of the output, over all heads.
fn reference<N: Number>(shape: &AttentionShape, x: &[N], bias: &[N], dy: &[N]) -> [Vec<N>; 2] {
    let AttentionShape { batch, tokens, heads, depth } = *shape;
    let zero = N::from(0.0);
    let scale = N::from(1.0 / (depth as f64).sqrt());
    let (mut y, mut dx) = (vec![zero; shape.output_len()], vec![zero; 3 * shape.output_len()]);
    for (sample, head) in (0..batch).flat_map(|n| (0..heads).map(move |h| (n, h))) {
        let place =
            |token: usize, part: usize, c: usize| (((sample * tokens + token) * 3 + part) * heads + head) * depth + c;
        let out = |token: usize, c: usize| ((sample * tokens + token) * heads + head) * depth + c;
        let at =
            |token: usize, part: usize, c: usize| x[place(token, part, c)] + bias[(part * heads + head) * depth + c];
        for i in 0..tokens {
            let exponentials: Vec<N> = (0..tokens)
                .map(|j| (0..depth).fold(zero, |sum, c| sum + at(i, 0, c) * at(j, 1, c)))
                .map(|score| (score * scale).exp())
                .collect();
            let total = exponentials.iter().fold(zero, |sum, e| sum + *e);
            let p: Vec<N> = exponentials.iter().map(|e| *e / total).collect();
            let dp: Vec<N> =
                (0..tokens).map(|j| (0..depth).fold(zero, |sum, c| sum + dy[out(i, c)] * at(j, 2, c))).collect();
            let mean = p.iter().zip(&dp).fold(zero, |sum, (p, dp)| sum + *p * *dp);
            for (j, c) in (0..tokens).flat_map(|j| (0..depth).map(move |c| (j, c))) {
                y[out(i, c)] = y[out(i, c)] + p[j] * at(j, 2, c);
                let ds = p[j] * (dp[j] - mean) * scale;
                dx[place(i, 0, c)] = dx[place(i, 0, c)] + ds * at(j, 1, c);
                dx[place(j, 1, c)] = dx[place(j, 1, c)] + ds * at(i, 0, c);
                dx[place(j, 2, c)] = dx[place(j, 2, c)] + p[j] * dy[out(i, c)];
            }
        }
    }
    [y, dx]
}

/// What the kernels leave.
struct Found<S: Compute> {
    y: [Buffer<S>; 2],
    dx: [Buffer<S>; 2],
    /// The gradient added to one that was there.
    sum: [Buffer<S>; 2],
}

fn run<S: Compute>(device: &Device, shape: &AttentionShape, inputs: [&[Dual]; 4]) -> Result<Found<S>> {
    let [x, dy, old] = [inputs[0], inputs[2], inputs[3]].map(|numbers| upload::<S>(device, numbers));
    let bias = upload::<S::Master>(device, inputs[1]);
    let projected = |k: usize| Projected { x: x[k].view(), bias: bias[k].view() };
    let rows = shape.rows();
    let poisoned = |len| device.poisoned::<S>(len);
    let mut y = [poisoned(shape.output_len())?, poisoned(shape.output_len())?];
    let mut dx = [poisoned(x[0].len())?, poisoned(x[0].len())?];
    let mut sum = old;
    let (mut normaliser, mut moved) = (device.poisoned(rows)?, device.poisoned(rows)?);
    let mut scratch = device.poisoned::<S::Master>(2 * rows)?;
    attention(shape, projected(0), y[0].view_mut(), normaliser.view_mut())?;
    let [value, tangent] = &mut y;
    let attended = Attended { y: value.view(), normaliser: normaliser.view() };
    attention_tangent(shape, projected(0), attended, projected(1), tangent.view_mut(), moved.view_mut())?;
    let tangents =
        Tangents { x: projected(1), y: tangent.view(), moved: moved.view(), dy: [dy[0].view(), dy[1].view()] };
    for (to, accumulate) in [(&mut dx, false), (&mut sum, true)] {
        let dots = scratch.slice_mut(0..rows)?;
        backward(shape, projected(0), attended, dy[0].view(), dots, to[0].view_mut(), accumulate)?;
        let dots = scratch.view_mut();
        backward_tangent(shape, projected(0), attended, tangents, dots, to[1].view_mut(), accumulate)?;
    }
    Ok(Found { y, dx, sum })
}

/// Values, tangents and gradients that are added to.
fn inputs<S: Compute>(shape: &AttentionShape) -> [Vec<Dual>; 4] {
    let mut random = Random(shape.output_len() as u64);
    let [x, old] = [(); 2].map(|()| drawn::<S>(&mut random, 3 * shape.output_len()));
    let bias = drawn::<S::Master>(&mut random, 3 * shape.heads * shape.depth);
    let dy = drawn::<S>(&mut random, shape.output_len());
    [x, bias, dy, old]
}

fn check<S: Compute>(devices: &[(String, Device)]) {
    for shape in &SHAPES {
        let [x, bias, dy, old] = inputs::<S>(shape);
        let [y, dx] = reference(shape, &x, &bias, &dy);
        let added: Vec<Dual> = old.iter().zip(&dx).map(|(old, dx)| *old + *dx).collect();
        for (name, device) in devices {
            let what = format!("{name}, {}, {shape:?}", S::NAME);
            let found = run::<S>(device, shape, [&x, &bias, &dy, &old]).unwrap();
            for (part, found, expected) in
                [("y", &found.y, &y), ("dx", &found.dx, &dx), ("dx added", &found.sum, &added)]
            {
                compare(&format!("{what}: {part}"), &found[0], &found[1], expected, tolerance::<S>());
            }
        }
    }
}

#[test]
fn attention_is_its_formula_with_gradient_and_tangents() {
    check::<f64>(&host_devices());
    check::<f32>(&devices());
    check::<f16>(&devices());
    check::<bf16>(&devices());
}

/// The reference itself: its gradient is the derivative of its output.
#[test]
fn the_reference_is_consistent() {
    let shape = shape(1, 4, 2, 3);
    let [x, bias, dy, _] = inputs::<f64>(&shape);
    let constant: Vec<Dual> = dy.iter().map(|dy| Dual(dy.0, 0.0)).collect();
    let still: Vec<Dual> = bias.iter().map(|bias| Dual(bias.0, 0.0)).collect();
    let [y, dx] = reference(&shape, &x, &still, &constant);
    let along: f64 = y.iter().zip(&dy).map(|(y, dy)| y.1 * dy.0).sum();
    let gradient: f64 = dx.iter().zip(&x).map(|(dx, x)| dx.0 * x.1).sum();
    assert!((along - gradient).abs() < 1e-12 * along.abs(), "{along} and {gradient}");
}

/// Scores far apart: one key takes all of the weight, and nothing overflows.
#[test]
fn large_scores_choose_one_key() {
    let shape = shape(1, 40, 1, 4);
    for (name, device) in devices() {
        let mut x = vec![0.0f32; 3 * shape.output_len()];
        for token in 0..shape.tokens {
            let row = &mut x[token * 12..token * 12 + 12];
            row[0] = 300.0;
            row[4] = token as f32;
            row[8] = token as f32 + 1.0;
        }
        let (x, bias) = (device.upload(&x).unwrap(), device.zeros::<f32>(12).unwrap());
        let (mut y, mut normaliser) = (device.poisoned::<f32>(160).unwrap(), device.poisoned::<f32>(40).unwrap());
        let projected = Projected { x: x.view(), bias: bias.view() };
        attention(&shape, projected, y.view_mut(), normaliser.view_mut()).unwrap();
        assert!(y.to_vec().unwrap().chunks(4).all(|row| row == [40.0, 0.0, 0.0, 0.0]), "{name}");
        assert!(normaliser.to_vec().unwrap().iter().all(|l| (l - 150.0 * 39.0).abs() < 1e-2), "{name}");
    }
}

#[test]
fn a_score_that_is_not_finite_shows() {
    let shape = shape(1, 34, 1, 4);
    for (name, device) in devices() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![0.5f32; 3 * shape.output_len()];
            x[33 * 12] = bad;
            let (x, bias) = (device.upload(&x).unwrap(), device.zeros::<f32>(12).unwrap());
            let (mut y, mut normaliser) = (device.poisoned::<f32>(136).unwrap(), device.poisoned::<f32>(34).unwrap());
            let projected = Projected { x: x.view(), bias: bias.view() };
            attention(&shape, projected, y.view_mut(), normaliser.view_mut()).unwrap();
            let y = y.to_vec().unwrap();
            assert!(y[33 * 4].is_nan() && y[0] == 0.5, "{name}: {bad}: {} {}", y[0], y[33 * 4]);
        }
    }
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    let shape = shape(2, 70, 3, 20);
    let inputs = inputs::<f32>(&shape);
    on_devices(&host_devices(), false, |_, device| {
        let found = run::<f32>(device, &shape, inputs.each_ref().map(Vec::as_slice)).unwrap();
        [found.y, found.dx, found.sum].iter().flatten().map(|buffer| bits(&buffer.to_vec().unwrap())).collect()
    });
}

#[test]
fn wrong_arguments_are_refused() -> Result<()> {
    let device = Device::host();
    for bad in [shape(1, 0, 1, 4), shape(1, 4, 1, 65), shape(1 << 20, 1 << 10, 1, 64)] {
        assert!(matches!(bad.check(), Err(Error::Argument { .. })), "{bad:?}");
    }
    let good = shape(1, 2, 1, 4);
    let (x, bias) = (device.zeros::<f32>(24)?, device.zeros::<f32>(12)?);
    let (mut y, mut normaliser) = (device.zeros::<f32>(7)?, device.zeros::<f32>(2)?);
    let projected = Projected { x: x.view(), bias: bias.view() };
    let refused = attention(&good, projected, y.view_mut(), normaliser.view_mut());
    let operation = "attention::attention";
    assert_eq!(refused, Err(Error::Length { operation, argument: "y", found: 7, expected: 8 }));
    let short = Projected { x: x.slice(0..12)?, bias: bias.view() };
    let mut y = device.zeros::<f32>(8)?;
    let refused = attention(&good, short, y.view_mut(), normaliser.view_mut());
    assert_eq!(refused, Err(Error::Length { operation, argument: "x", found: 12, expected: 24 }));
    Ok(())
}
