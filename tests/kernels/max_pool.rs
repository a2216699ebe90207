//! Max pooling against naive loops in double, on asymmetric shapes with equal elements, and its gradient and tangent.

use crate::common::{Random, bits, devices, host_devices, on_devices};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result};
use polder::kernels::layers::PoolShape;
use polder::kernels::max_pool::{check_shape, max_pool, max_pool_backward, max_pool_tangent};

/// Channels in and out of packs; windows that overlap, touch, leave gaps and leave a rest at the border; with padding.
const SHAPES: [PoolShape; 8] = [
    shape(2, 5, 6, 3, (2, 2, 0)),
    shape(3, 7, 5, 17, (3, 2, 1)),
    shape(1, 9, 11, 8, (2, 3, 0)),
    shape(2, 6, 8, 16, (3, 1, 1)),
    shape(1, 4, 4, 1, (4, 1, 2)),
    shape(1, 17, 20, 8, (16, 5, 8)),
    shape(2, 3, 1, 24, (1, 1, 0)),
    shape(2, 8, 10, 32, (2, 2, 1)),
];

const fn shape(
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    (kernel, stride, padding): (usize, usize, usize),
) -> PoolShape {
    PoolShape { batch, height, width, channels, kernel, stride, padding }
}

/// For each output the index of the element that it takes, and that element's number in the window.
fn reference(shape: &PoolShape, x: &[f64]) -> Vec<(usize, u8)> {
    let PoolShape { batch, height, width, channels, kernel, stride, padding } = *shape;
    let out = |extent: usize| (extent + 2 * padding - kernel) / stride + 1;
    let mut found = Vec::new();
    for n in 0..batch {
        for (i, j) in (0..out(height)).flat_map(|i| (0..out(width)).map(move |j| (i, j))) {
            for c in 0..channels {
                let mut best: Option<(usize, u8)> = None;
                for (p, q) in (0..kernel).flat_map(|p| (0..kernel).map(move |q| (p, q))) {
                    let (h, w) = (i * stride + p, j * stride + q);
                    if h < padding || w < padding || h >= height + padding || w >= width + padding {
                        continue;
                    }
                    let index = ((n * height + h - padding) * width + w - padding) * channels + c;
                    if best.is_none_or(|(taken, _)| x[index] > x[taken] || x[index].is_nan()) {
                        best = Some((index, (p * kernel + q) as u8));
                    }
                }
                found.push(best.expect("every window meets the image"));
            }
        }
    }
    found
}

/// Quarters between −4 and 4, which all types hold exactly: many windows have several largest elements.
fn quarters(random: &mut Random, n: usize) -> Vec<f64> {
    (0..n).map(|_| random.below(33) as f64 / 4.0 - 4.0).collect()
}

fn upload<S: Compute>(device: &Device, values: &[f64]) -> Buffer<S> {
    device.upload(&values.iter().map(|&value| S::from_f64(value)).collect::<Vec<_>>()).unwrap()
}

fn numbers<S: Compute>(buffer: &Buffer<S>) -> Vec<f64> {
    buffer.to_vec().unwrap().into_iter().map(Compute::to_f64).collect()
}

/// As the storage type rounds them.
fn rounded<S: Compute>(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&value| S::from_f64(value).to_f64()).collect()
}

fn check<S: Compute>(devices: &[(String, Device)]) {
    for shape in &SHAPES {
        let mut random = Random(shape.input_len() as u64);
        let x = quarters(&mut random, shape.input_len());
        let taken = reference(shape, &x);
        assert_eq!(taken.len(), shape.output_len(), "{shape:?}");
        let (x_tangent, old) = (quarters(&mut random, x.len()), quarters(&mut random, x.len()));
        let dy = quarters(&mut random, taken.len());
        let mut expected = vec![0.0; x.len()];
        taken.iter().zip(&dy).for_each(|(&(index, _), dy)| expected[index] += dy);
        let sum: Vec<f64> = old.iter().zip(&expected).map(|(old, dx)| old + dx).collect();
        for (name, device) in devices {
            let what = format!("{name}, {}, {shape:?}", S::NAME);
            let [x, x_tangent, dy] = [&x, &x_tangent, &dy].map(|values| upload::<S>(device, values));
            let (mut y, mut chosen) =
                (device.poisoned::<S>(taken.len()).unwrap(), device.poisoned(taken.len()).unwrap());
            max_pool(shape, x.view(), y.view_mut(), chosen.view_mut()).unwrap();
            let values = numbers(&x);
            assert_eq!(numbers(&y), taken.iter().map(|&(index, _)| values[index]).collect::<Vec<_>>(), "{what}: y");
            let elements: Vec<u8> = taken.iter().map(|&(_, element)| element).collect();
            assert_eq!(chosen.to_vec().unwrap(), elements, "{what}: chosen");

            let mut y_tangent = device.poisoned::<S>(taken.len()).unwrap();
            max_pool_tangent(shape, x_tangent.view(), chosen.view(), y_tangent.view_mut()).unwrap();
            let values = numbers(&x_tangent);
            let moved: Vec<f64> = taken.iter().map(|&(index, _)| values[index]).collect();
            assert_eq!(numbers(&y_tangent), moved, "{what}: tangent");

            let mut dx = device.poisoned::<S>(values.len()).unwrap();
            max_pool_backward(shape, dy.view(), chosen.view(), dx.view_mut(), false).unwrap();
            assert_eq!(numbers(&dx), rounded::<S>(&expected), "{what}: dx");
            let mut dx = upload::<S>(device, &old);
            max_pool_backward(shape, dy.view(), chosen.view(), dx.view_mut(), true).unwrap();
            assert_eq!(numbers(&dx), rounded::<S>(&sum), "{what}: dx added to another gradient");
        }
    }
}

#[test]
fn the_first_largest_element_is_taken_and_receives_the_gradient() {
    check::<f32>(&devices());
    check::<f16>(&devices());
    check::<bf16>(&devices());
    check::<f64>(&host_devices());
}

/// As PyTorch: a NaN is the largest, and of several the last is chosen. Minus infinity is a number like any other.
#[test]
fn nan_and_infinities_pass() {
    let shape = shape(1, 2, 5, 1, (2, 1, 0));
    let (nan, low) = (f32::NAN, f32::NEG_INFINITY);
    let values = [nan, 1.0, low, low, 3.0, 2.0, nan, low, low, f32::INFINITY];
    for (name, device) in devices() {
        let x = device.upload(&values).unwrap();
        let (mut y, mut chosen) = (device.zeros::<f32>(4).unwrap(), device.poisoned::<u8>(4).unwrap());
        max_pool(&shape, x.view(), y.view_mut(), chosen.view_mut()).unwrap();
        let y = y.to_vec().unwrap();
        assert!(y[0].is_nan() && y[1].is_nan(), "{name}: {y:?}");
        assert_eq!(y[2..], [low, f32::INFINITY], "{name}");
        assert_eq!(chosen.to_vec().unwrap(), [3, 2, 0, 3], "{name}");
    }
}

/// All results of one shape on one device, as bits.
fn all_bits(device: &Device) -> Vec<u64> {
    let shape = shape(4, 19, 14, 12, (3, 2, 1));
    let mut random = Random(77);
    let x: Buffer<f32> = device.upload(&random.vector::<f32>(shape.input_len())).unwrap();
    let dy: Buffer<f32> = device.upload(&random.vector::<f32>(shape.output_len())).unwrap();
    let [mut y, mut y_tangent]: [Buffer<f32>; 2] = std::array::from_fn(|_| device.poisoned(dy.len()).unwrap());
    let (mut chosen, mut dx) = (device.poisoned(dy.len()).unwrap(), device.poisoned(x.len()).unwrap());
    max_pool(&shape, x.view(), y.view_mut(), chosen.view_mut()).unwrap();
    max_pool_tangent(&shape, x.view(), chosen.view(), y_tangent.view_mut()).unwrap();
    max_pool_backward(&shape, dy.view(), chosen.view(), dx.view_mut(), false).unwrap();
    max_pool_backward(&shape, dy.view(), chosen.view(), dx.view_mut(), true).unwrap();
    let mut results: Vec<u64> = chosen.to_vec().unwrap().into_iter().map(u64::from).collect();
    [y, y_tangent, dx].iter().for_each(|buffer| results.extend(bits(&buffer.to_vec().unwrap())));
    results
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    on_devices(&host_devices(), false, |_, device| vec![all_bits(device)]);
}

/// A part of a buffer may begin anywhere; nothing outside it is written.
#[test]
fn parts_at_any_offset() {
    let shape = shape(1, 6, 5, 8, (3, 2, 1));
    let x: Vec<f64> = quarters(&mut Random(9), shape.input_len());
    let (taken, n) = (reference(&shape, &x), shape.output_len());
    for (name, device) in devices() {
        for offset in 0..5 {
            let padded: Vec<f64> = std::iter::repeat_n(9.0, offset).chain(x.iter().copied()).collect();
            let x = upload::<f32>(&device, &padded);
            let (mut y, mut chosen) = (device.poisoned::<f32>(n + 8).unwrap(), device.zeros::<u8>(n + 8).unwrap());
            let parts = (y.slice_mut(3..3 + n).unwrap(), chosen.slice_mut(offset..offset + n).unwrap());
            max_pool(&shape, x.slice(offset..padded.len()).unwrap(), parts.0, parts.1).unwrap();
            let (y, chosen) = (y.to_vec().unwrap(), chosen.to_vec().unwrap());
            let expected: Vec<f32> = taken.iter().map(|&(index, _)| padded[offset + index] as f32).collect();
            assert_eq!(y[3..3 + n], expected, "{name}: offset {offset}");
            assert!(y[..3].iter().chain(&y[3 + n..]).all(|y| y.is_nan()), "{name}: outside the part");
            assert!(chosen[..offset].iter().chain(&chosen[offset + n..]).all(|&c| c == 0), "{name}: outside the part");
        }
    }
}

#[test]
fn wrong_arguments_are_refused() -> Result<()> {
    let device = Device::host();
    let good = shape(1, 2, 3, 1, (2, 1, 0));
    let (x, mut y, mut chosen) = (device.zeros::<f32>(6)?, device.zeros::<f32>(2)?, device.zeros::<u8>(2)?);
    let mut long = device.zeros::<f32>(7)?;
    let length = |operation, argument, found, expected| Err(Error::Length { operation, argument, found, expected });
    let refused = max_pool(&good, x.view(), long.view_mut(), chosen.view_mut());
    assert_eq!(refused, length("max_pool::max_pool", "y", 7, 2));
    let refused = max_pool_tangent(&good, long.view(), chosen.view(), y.view_mut());
    assert_eq!(refused, length("max_pool::max_pool_tangent", "x", 7, 6));
    let refused = max_pool_backward(&good, y.view(), device.zeros(3)?.view(), long.view_mut(), false);
    assert_eq!(refused, length("max_pool::max_pool_backward", "dx", 7, 6));
    let mut elsewhere = Device::host().zeros::<u8>(2)?;
    let refused = max_pool(&good, x.view(), y.view_mut(), elsewhere.view_mut());
    assert_eq!(refused, Err(Error::OtherDevice { operation: "max_pool::max_pool", argument: "chosen" }));
    for window in [(0, 1, 0), (2, 0, 0), (3, 1, 0), (17, 1, 8), (2, 1, 2), (3, 1, 2)] {
        let bad = shape(1, 2, 3, 1, window);
        assert!(matches!(check_shape(&bad), Err(Error::Argument { .. })), "{bad:?}");
        let refused = max_pool(&bad, x.view(), y.view_mut(), chosen.view_mut());
        assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    }
    let huge = shape(1 << 20, 1 << 10, 1 << 10, 64, (2, 2, 0));
    assert!(matches!(check_shape(&huge), Err(Error::Argument { .. })));
    Ok(())
}
