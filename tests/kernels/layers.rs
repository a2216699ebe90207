//! The small layers against naive loops in double, on asymmetric shapes, and their gradients against central
//! differences.

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use polder::device::{Buffer, Device, Error, Result, Scalar, Slice, SliceMut};
use polder::kernels::layers::{
    LinearShape, PoolShape, ShortcutShape, add, average_pool, average_pool_backward, global_average_pool,
    global_average_pool_backward, linear, linear_input_gradient, linear_weight_gradient, relu, relu_backward, shortcut,
    shortcut_backward,
};

/// Runs a function from one tensor to another of `out_len` elements, which is poisoned before.
fn map<T: Scalar>(
    device: &Device,
    input: &[T],
    out_len: usize,
    function: impl Fn(Slice<'_, T>, SliceMut<'_, T>) -> Result<()>,
) -> Vec<T> {
    let input = device.upload(input).unwrap();
    let mut out = device.poisoned::<T>(out_len).unwrap();
    function(input.view(), out.view_mut()).unwrap();
    out.to_vec().unwrap()
}

/// Runs a gradient that writes over poison, and one that adds to `old`, and compares both with `expected`.
fn check_gradient<T: Scalar>(
    what: &str,
    device: &Device,
    old: &[T],
    expected: &[f64],
    tolerance: f64,
    function: impl Fn(SliceMut<'_, T>, bool) -> Result<()>,
) {
    let mut dx = device.poisoned::<T>(old.len()).unwrap();
    function(dx.view_mut(), false).unwrap();
    assert_close(&format!("{what}: dx"), &dx.to_vec().unwrap(), expected, tolerance);
    dx.write(old).unwrap();
    function(dx.view_mut(), true).unwrap();
    let sum: Vec<f64> = to_f64(old).iter().zip(expected).map(|(old, dx)| old + dx).collect();
    assert_close(&format!("{what}: accumulated dx"), &dx.to_vec().unwrap(), &sum, tolerance);
}

fn tolerance<T: Scalar>() -> f64 {
    if T::NAME == "f32" { 1e-6 } else { 1e-14 }
}

fn element_wise<T: Scalar>(devices: &[(String, Device)]) {
    for n in [1, 3, 1027, 70_001] {
        let mut random = Random(n as u64);
        let (a, b, old): (Vec<T>, Vec<T>, Vec<T>) = (random.vector(n), random.vector(n), random.vector(n));
        let relued: Vec<f64> = to_f64(&a).iter().map(|a| a.max(0.0)).collect();
        let sum: Vec<f64> = to_f64(&a).iter().zip(to_f64(&b)).map(|(a, b)| a + b).collect();
        let masked: Vec<f64> = relued.iter().zip(to_f64(&b)).map(|(y, dy)| if *y > 0.0 { dy } else { 0.0 }).collect();
        for (name, device) in devices {
            let y = map(device, &a, n, relu);
            assert_eq!(to_f64(&y), relued, "{name}: relu of {n}");
            let (y, b) = (device.upload(&y).unwrap(), device.upload(&b).unwrap());
            check_gradient(
                &format!("{name}: relu of {n}"),
                device,
                &old,
                &masked,
                tolerance::<T>(),
                |dx, accumulate| relu_backward(y.view(), b.view(), dx, accumulate),
            );
            let out = map(device, &a, n, |a, out| add(a, b.view(), out));
            assert_close(&format!("{name}: sum of {n}"), &out, &sum, tolerance::<T>());
        }
    }
}

#[test]
fn element_wise_functions() {
    element_wise::<f32>(&devices());
    element_wise::<f64>(&host_devices());
}

#[test]
fn parts_at_any_offset() {
    let values: Vec<f32> = Random(3).vector(1000);
    for (name, device) in devices() {
        let input = device.upload(&values).unwrap();
        for offset in 0..5 {
            let n = 1000 - 7 - offset;
            let mut out = device.poisoned::<f32>(1000).unwrap();
            relu(input.slice(offset..offset + n).unwrap(), out.slice_mut(3..3 + n).unwrap()).unwrap();
            let out = out.to_vec().unwrap();
            let expected: Vec<f32> = values[offset..offset + n].iter().map(|x| x.max(0.0)).collect();
            assert_eq!(out[3..3 + n], expected, "{name}: offset {offset}");
            assert!(out[..3].iter().chain(&out[3 + n..]).all(|x| x.is_nan()), "{name}: outside the part");
        }
    }
}

#[test]
fn nan_passes_the_relu() {
    for (name, device) in devices() {
        let y = map(&device, &[f32::NAN, -1.0, 2.0, f32::INFINITY, f32::NEG_INFINITY], 5, relu);
        assert!(y[0].is_nan(), "{name}");
        assert_eq!(y[1..], [0.0, 2.0, f32::INFINITY, 0.0], "{name}");
    }
}

/// A linear map, given by its matrix [outputs, inputs]: a forward must be the product with it, a backward that with its
/// transpose.
struct Sparse {
    outputs: usize,
    inputs: usize,
    entries: Vec<(usize, usize, f64)>,
}

impl Sparse {
    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; self.outputs];
        for &(output, input, weight) in &self.entries {
            y[output] += weight * x[input];
        }
        y
    }

    fn backward(&self, dy: &[f64]) -> Vec<f64> {
        let mut dx = vec![0.0; self.inputs];
        for &(output, input, weight) in &self.entries {
            dx[input] += weight * dy[output];
        }
        dx
    }

    /// Checks a layer and its gradient on every device.
    fn check<T: Scalar>(
        &self,
        what: &str,
        devices: &[(String, Device)],
        forward: impl Fn(Slice<'_, T>, SliceMut<'_, T>) -> Result<()>,
        backward: impl Fn(Slice<'_, T>, SliceMut<'_, T>, bool) -> Result<()>,
    ) {
        let mut random = Random(self.inputs as u64);
        let (x, dy, old): (Vec<T>, Vec<T>, Vec<T>) =
            (random.vector(self.inputs), random.vector(self.outputs), random.vector(self.inputs));
        for (name, device) in devices {
            let what = format!("{name}, {what}");
            let y = map(device, &x, self.outputs, &forward);
            assert_close(&format!("{what}: y"), &y, &self.forward(&to_f64(&x)), tolerance::<T>());
            let on_device = device.upload(&dy).unwrap();
            let expected = self.backward(&to_f64(&dy));
            check_gradient(&what, device, &old, &expected, tolerance::<T>(), |dx, accumulate| {
                backward(on_device.view(), dx, accumulate)
            });
        }
    }
}

fn pooling<T: Scalar>(devices: &[(String, Device)]) {
    // Channels that fill packs and that do not; windows that overlap, touch, leave gaps, and leave a rest at the
    // border.
    for (batch, height, width, channels, kernel, stride) in
        [(2, 5, 6, 3, 2, 2), (3, 7, 5, 17, 3, 2), (1, 9, 11, 8, 2, 3), (2, 6, 8, 16, 3, 1), (1, 4, 4, 1, 4, 1)]
    {
        let shape = PoolShape { batch, height, width, channels, kernel, stride, padding: 0 };
        let (out_height, out_width) = ((height - kernel) / stride + 1, (width - kernel) / stride + 1);
        assert_eq!((shape.out_height(), shape.out_width()), (out_height, out_width));
        let mut entries = Vec::new();
        for n in 0..batch {
            for (i, j) in (0..out_height).flat_map(|i| (0..out_width).map(move |j| (i, j))) {
                for (p, q) in (0..kernel).flat_map(|p| (0..kernel).map(move |q| (p, q))) {
                    for c in 0..channels {
                        let output = ((n * out_height + i) * out_width + j) * channels + c;
                        let input = ((n * height + i * stride + p) * width + j * stride + q) * channels + c;
                        entries.push((output, input, 1.0 / (kernel * kernel) as f64));
                    }
                }
            }
        }
        let map = Sparse {
            outputs: batch * out_height * out_width * channels,
            inputs: batch * height * width * channels,
            entries,
        };
        map.check::<T>(
            &format!("{shape:?}"),
            devices,
            |x, y| average_pool(&shape, x, y),
            |dy, dx, accumulate| average_pool_backward(&shape, dy, dx, accumulate),
        );
    }
}

#[test]
fn average_pooling() {
    pooling::<f32>(&devices());
    pooling::<f64>(&host_devices());
}

fn global_pooling<T: Scalar>(devices: &[(String, Device)]) {
    for (batch, pixels, channels) in [(3, 30, 5), (2, 64, 64), (5, 1, 17), (1, 49, 12)] {
        let entries = (0..batch * pixels * channels)
            .map(|input| (input / (pixels * channels) * channels + input % channels, input, 1.0 / pixels as f64))
            .collect();
        let map = Sparse { outputs: batch * channels, inputs: batch * pixels * channels, entries };
        map.check::<T>(
            &format!("{batch} x {pixels} x {channels}"),
            devices,
            |x, y| global_average_pool(batch, pixels, channels, x, y),
            |dy, dx, accumulate| global_average_pool_backward(batch, pixels, channels, dy, dx, accumulate),
        );
    }
}

#[test]
fn global_average_pooling() {
    global_pooling::<f32>(&devices());
    global_pooling::<f64>(&host_devices());
}

fn shortcuts<T: Scalar>(devices: &[(String, Device)]) {
    // Strides that leave a rest on one side, odd numbers of added channels before and behind, the sizes of a CIFAR
    // ResNet, and those of a PyramidNet.
    for (batch, height, width, in_channels, out_channels, before, stride) in [
        (2, 5, 6, 3, 6, 1, 2),
        (1, 7, 4, 2, 7, 2, 3),
        (2, 8, 8, 16, 32, 8, 2),
        (3, 5, 3, 4, 4, 0, 1),
        (1, 3, 5, 4, 20, 8, 2),
        (2, 4, 3, 16, 21, 0, 1),
        (1, 5, 4, 8, 16, 0, 2),
        (2, 3, 4, 7, 12, 5, 1),
    ] {
        let shape = ShortcutShape { batch, height, width, in_channels, out_channels, before, stride };
        let (out_height, out_width) = (height.div_ceil(stride), width.div_ceil(stride));
        assert_eq!((shape.out_height(), shape.out_width()), (out_height, out_width));
        let mut entries = Vec::new();
        for n in 0..batch {
            for (i, j) in (0..out_height).flat_map(|i| (0..out_width).map(move |j| (i, j))) {
                for c in 0..in_channels {
                    let output = ((n * out_height + i) * out_width + j) * out_channels + before + c;
                    entries.push((output, ((n * height + i * stride) * width + j * stride) * in_channels + c, 1.0));
                }
            }
        }
        let map = Sparse {
            outputs: batch * out_height * out_width * out_channels,
            inputs: batch * height * width * in_channels,
            entries,
        };
        map.check::<T>(
            &format!("{shape:?}"),
            devices,
            |x, y| shortcut(&shape, x, y),
            |dy, dx, accumulate| shortcut_backward(&shape, dy, dx, accumulate),
        );
    }
}

#[test]
fn shortcuts_without_parameters() {
    shortcuts::<f32>(&devices());
    shortcuts::<f64>(&host_devices());
}

/// left [m, k] times right [k, n], both by index functions.
fn product(
    m: usize,
    n: usize,
    k: usize,
    left: impl Fn(usize, usize) -> f64,
    right: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    (0..m * n).map(|i| (0..k).map(|d| left(i / n, d) * right(d, i % n)).sum()).collect()
}

fn linear_layers<T: Scalar>(devices: &[(String, Device)]) {
    // Less than, equal to and more than one tile of 32 x 32, with depths that are not a multiple of a step.
    for (batch, inputs, outputs) in [(1, 1, 1), (5, 7, 3), (33, 64, 10), (32, 16, 32), (70, 45, 37)] {
        let shape = LinearShape { batch, inputs, outputs };
        let mut random = Random((batch * inputs * outputs) as u64);
        let [x, weight, bias, dy]: [Vec<T>; 4] =
            [batch * inputs, inputs * outputs, outputs, batch * outputs].map(|n| random.vector(n));
        let [old_x, old_weight, old_bias, old_y]: [Vec<T>; 4] =
            [batch * inputs, inputs * outputs, outputs, batch * outputs].map(|n| random.vector(n));
        let [x64, weight64, bias64, dy64] = [&x, &weight, &bias, &dy].map(|values| to_f64(values));
        let unbiased = product(batch, outputs, inputs, |n, i| x64[n * inputs + i], |i, o| weight64[i * outputs + o]);
        let y: Vec<f64> = unbiased.iter().enumerate().map(|(i, y)| y + bias64[i % outputs]).collect();
        let dx = product(batch, inputs, outputs, |n, o| dy64[n * outputs + o], |o, i| weight64[i * outputs + o]);
        let dweight = product(inputs, outputs, batch, |i, n| x64[n * inputs + i], |n, o| dy64[n * outputs + o]);
        let dbias = product(1, outputs, batch, |_, _| 1.0, |n, o| dy64[n * outputs + o]);
        let tolerance = 3.0 * tolerance::<T>();
        for (name, device) in devices {
            let what = format!("{name}, {shape:?}");
            let [x, weight, bias, dy] = [&x, &weight, &bias, &dy].map(|values| device.upload(values).unwrap());
            let (x, weight, bias, dy) = (x.view(), weight.view(), bias.view(), dy.view());
            check_gradient(&format!("{what}: y as"), device, &old_y, &y, tolerance, |y, accumulate| {
                linear(&shape, x, weight, Some(bias), y, accumulate)
            });
            check_gradient(
                &format!("{what}: y without bias as"),
                device,
                &old_y,
                &unbiased,
                tolerance,
                |y, accumulate| linear(&shape, x, weight, None, y, accumulate),
            );
            check_gradient(&what, device, &old_x, &dx, tolerance, |dx, accumulate| {
                linear_input_gradient(&shape, dy, weight, dx, accumulate)
            });
            check_gradient(
                &format!("{what}: dweight as"),
                device,
                &old_weight,
                &dweight,
                tolerance,
                |into, accumulate| linear_weight_gradient(&shape, x, dy, into, None, accumulate),
            );
            check_gradient(&format!("{what}: dbias as"), device, &old_bias, &dbias, tolerance, |into, accumulate| {
                let mut beside = device.upload(&old_weight)?;
                linear_weight_gradient(&shape, x, dy, beside.view_mut(), Some(into), accumulate)
            });
        }
    }
}

#[test]
fn linear_layer() {
    linear_layers::<f32>(&devices());
    linear_layers::<f64>(&host_devices());
}

/// The bits of all layers' results on one device.
fn all_bits(device: &Device) -> Vec<u64> {
    let mut random = Random(77);
    let pool = PoolShape { batch: 4, height: 19, width: 14, channels: 12, kernel: 3, stride: 2, padding: 0 };
    let cut =
        ShortcutShape { batch: 4, height: 19, width: 14, in_channels: 12, out_channels: 20, before: 4, stride: 2 };
    let fully = LinearShape { batch: 70, inputs: 90, outputs: 40 };
    let x: Vec<f32> = random.vector(pool.input_len());
    let mut results = Vec::new();
    results.extend(bits(&map(device, &x, pool.output_len(), |x, y| average_pool(&pool, x, y))));
    let dy: Vec<f32> = random.vector(pool.output_len());
    results.extend(bits(&map(device, &dy, x.len(), |dy, dx| average_pool_backward(&pool, dy, dx, false))));
    results.extend(bits(&map(device, &x, 4 * 12, |x, y| global_average_pool(4, 19 * 14, 12, x, y))));
    results.extend(bits(&map(device, &x, cut.output_len(), |x, y| shortcut(&cut, x, y))));
    let [x, weight, bias, dy]: [Buffer<f32>; 4] =
        [70 * 90, 90 * 40, 40, 70 * 40].map(|n| device.upload(&random.vector(n)).unwrap());
    let [mut y, mut dx, mut dweight, mut dbias]: [Buffer<f32>; 4] =
        [70 * 40, 70 * 90, 90 * 40, 40].map(|n| device.poisoned(n).unwrap());
    linear(&fully, x.view(), weight.view(), Some(bias.view()), y.view_mut(), false).unwrap();
    linear_input_gradient(&fully, dy.view(), weight.view(), dx.view_mut(), false).unwrap();
    let parameters = (dweight.view_mut(), Some(dbias.view_mut()));
    linear_weight_gradient(&fully, x.view(), dy.view(), parameters.0, parameters.1, false).unwrap();
    for buffer in [&y, &dx, &dweight, &dbias] {
        results.extend(bits(&buffer.to_vec().unwrap()));
    }
    // Added to the results of the first products.
    linear(&fully, x.view(), weight.view(), None, y.view_mut(), true).unwrap();
    linear_input_gradient(&fully, dy.view(), weight.view(), dx.view_mut(), true).unwrap();
    linear_weight_gradient(&fully, x.view(), dy.view(), dweight.view_mut(), Some(dbias.view_mut()), true).unwrap();
    for buffer in [y, dx, dweight, dbias] {
        results.extend(bits(&buffer.to_vec().unwrap()));
    }
    results
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    on_devices(&host_devices(), false, |_, device| vec![all_bits(device)]);
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let small = device.zeros::<f32>(5).unwrap();
    let mut out = device.zeros::<f32>(6).unwrap();
    let length = |operation, argument, found, expected| Err(Error::Length { operation, argument, found, expected });
    assert_eq!(relu(small.view(), out.view_mut()), length("layers::relu", "y", 6, 5));
    let refused = relu_backward(small.view(), small.view(), out.view_mut(), false);
    assert_eq!(refused, length("layers::relu_backward", "dx", 6, 5));
    let elsewhere = Device::host().zeros::<f32>(5).unwrap();
    let refused = add(small.view(), elsewhere.view(), out.view_mut());
    assert_eq!(refused, Err(Error::OtherDevice { operation: "layers::add", argument: "b" }));

    let pool = PoolShape { batch: 1, height: 2, width: 3, channels: 1, kernel: 2, stride: 1, padding: 0 };
    let refused = average_pool(&pool, out.view(), device.zeros::<f32>(6).unwrap().view_mut());
    assert_eq!(refused, length("layers::average_pool", "y", 6, 2));
    let refused =
        average_pool(&PoolShape { padding: 1, ..pool }, out.view(), device.zeros::<f32>(12).unwrap().view_mut());
    assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    for (kernel, stride) in [(0, 1), (1, 0), (3, 1)] {
        let pool = PoolShape { kernel, stride, ..pool };
        assert!(matches!(pool.check(), Err(Error::Argument { .. })), "{pool:?}");
        let refused = average_pool_backward(&pool, small.view(), out.view_mut(), false);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    }
    let huge =
        PoolShape { batch: 1 << 20, height: 1 << 10, width: 1 << 10, channels: 64, kernel: 2, stride: 2, padding: 0 };
    assert!(matches!(huge.check(), Err(Error::Argument { .. })));

    let cut = ShortcutShape { batch: 1, height: 2, width: 3, in_channels: 1, out_channels: 2, before: 0, stride: 1 };
    let refused = shortcut(&cut, out.view(), device.zeros::<f32>(6).unwrap().view_mut());
    assert_eq!(refused, length("layers::shortcut", "y", 6, 12));
    for (out_channels, before, stride) in [(0, 0, 1), (1, 0, 0), (2, 2, 1)] {
        let cut = ShortcutShape { out_channels, before, stride, ..cut };
        let refused = shortcut_backward(&cut, small.view(), out.view_mut(), false);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    }
    let refused = global_average_pool(1, 0, 5, small.view(), out.view_mut());
    assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");

    let shape = LinearShape { batch: 1, inputs: 5, outputs: 1 };
    let (bias, mut y) = (device.zeros::<f32>(2).unwrap(), device.zeros::<f32>(1).unwrap());
    let refused = linear(&shape, small.view(), small.view(), Some(bias.view()), y.view_mut(), false);
    assert_eq!(refused, length("layers::linear", "bias", 2, 1));
    let (mut dweight, mut dbias) = (device.zeros::<f32>(5).unwrap(), device.zeros::<f32>(2).unwrap());
    let (dy, dw) = (y.view(), dweight.view_mut());
    let refused = linear_weight_gradient(&shape, small.view(), dy, dw, Some(dbias.view_mut()), false);
    assert_eq!(refused, length("layers::linear_weight_gradient", "dbias", 2, 1));
    let refused = linear_input_gradient(&shape, small.view(), small.view(), dweight.view_mut(), false);
    assert_eq!(refused, length("layers::linear_input_gradient", "dy", 5, 1));
}
